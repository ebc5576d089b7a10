"""Export of a model to other runtimes and libraries: ONNX, torch.export, OpenCLIP and others.

Reads a model and writes a folder. For onnx and torch: a graph of each tower, checked against PyTorch, with what other
programs need to prepare images and captions (docs/inference.md). For the others: what `miniclip convert` writes.
"""

from argparse import SUPPRESS
from pathlib import Path

from miniclip.utils.command_line import Parser, starting
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = Parser.command("export", __doc__, "onnx --model runs/mine --output_dir mine.onnx --precision int8")
    parser.add_argument("FORM", help="onnx, torch (torch.export), or a form of miniclip convert such as openclip or hf")
    parser.share("model", required=True)
    parser.share("pretrained", "output_dir")
    parser.add_argument("--out", dest="output_dir", default=SUPPRESS, help=SUPPRESS)
    precision = "of onnx: fp32, fp16 (half the size, for GPUs) or int8 (weights of a quarter of the size, for CPUs)"
    parser.share("precision", choices=["fp32", "fp16", "int8"], help=precision)
    one = "also write clip.onnx, one graph from image and text to image_features and text_features"
    parser.add_argument("--single_graph", action="store_true", help=one)
    parser.share("eval_file", help="captions to measure the recall of onnx with, beside the model's")
    parser.share("image_root")
    parser.add_argument("--force", action="store_true", help="replace files in output_dir")
    options = parser.parse_args(argv)
    form, for_onnx = options.FORM, ("single_graph", "eval_file", "image_root")
    if options.output_dir is None:
        parser.error("the following arguments are required: --output_dir")
    with starting():
        from miniclip.inference.onnx import is_onnx
        from miniclip.weights.convert import EXPORTERS, convert
        from miniclip.weights.onnx import FORMS

    if form not in (known := [*FORMS, *(name for name in EXPORTERS if name != "miniclip")]):
        raise InputError(f"cannot export to {form!r}, only to {', '.join(known)}")
    given = [name for name in for_onnx if vars(options)[name]] + ["precision"] * (options.precision != "fp32")
    if form != "onnx" and given:
        raise InputError(f"--{given[0]} has no effect on {form}: remove it")
    if options.image_root and not options.eval_file:
        raise InputError("--image_root is for --eval_file: add it")
    if is_onnx(options.model):
        raise InputError(f"{options.model} is an export itself: name the model it was made from")
    try:
        if form in FORMS:
            write(options)
        else:
            source, name = (options.pretrained, options.model) if options.pretrained else (options.model, None)
            print(convert(source, options.output_dir, form, name, options.force))
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None


def write(options):
    """Writes a folder of graphs, and prints how far they are from the model."""
    from miniclip.inference.load import load
    from miniclip.weights.onnx import export

    model, preprocess, tokenizer = load(options.model, options.pretrained)
    what = f"{options.FORM} {options.precision}"
    measure = measuring(options, model, preprocess, tokenizer, what) if options.eval_file else None
    how = {"single_graph": options.single_graph, "force": options.force, "measure": measure}
    about = export(model, options.output_dir, options.FORM, options.precision, **how)
    for name, found in about["checked"].items():
        size = (Path(options.output_dir) / name).stat().st_size / 1e6
        cosines = f"cosine to PyTorch at least {found['min_cosine']:.6f}, {found['mean_cosine']:.6f} on average"
        print(f"{name} ({size:.1f} MB): {cosines}; largest difference {found['max_difference']:.1e}")
    print(f"{options.model} -> {options.output_dir} ({what})")


def measuring(options, model, preprocess, tokenizer, what: str):
    """Returns a function of an exported folder that prints its recall beside the model's and returns both."""
    from miniclip.datasets.read import read_source
    from miniclip.datasets.records import ReadOptions, one_per_image
    from miniclip.inference.evaluator import RetrievalEvaluator
    from miniclip.inference.load import load
    from miniclip.reports.html_page import format_table

    reading = ReadOptions.from_args(options, check_images=False)
    records = one_per_image(read_source(options.eval_file, reading), options.eval_file)

    def measure(folder: Path) -> dict:
        found, embeds = {}, []
        for name, one in (("PyTorch fp32", model), (what, load(folder)[0])):
            evaluator = RetrievalEvaluator(records, preprocess, tokenizer, batch_size=32, progress=True)
            found[name] = evaluator(one)
            embeds.append((evaluator.image_embeds, evaluator.text_embeds))
            print(f"{name} on {options.eval_file}: {len(evaluator.images)} images, {len(evaluator.texts)} captions")
            print(format_table(found[name], evaluator.ks))
        cosines = {kind: (a * b).sum(1) for kind, a, b in zip(("image", "text"), *embeds)}
        cosines = {kind: {"min": float(c.min()), "mean": float(c.mean())} for kind, c in cosines.items()}
        said = (f"{kind}s at least {c['min']:.6f}, mean {c['mean']:.6f}" for kind, c in cosines.items())
        print("cosine of", ", of ".join(said))
        return {"measured": {"eval_file": str(options.eval_file), "recall": found, "cosine": cosines}}

    return measure
