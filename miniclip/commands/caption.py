"""Captions of images, written by a CoCa model.

Reads images, or a caption file, and writes captions.json and captions.md to --output_dir. With --eval_file the model's
captions are compared with those of the file, by CIDEr and BLEU (printed times 100, as in papers)."""

from miniclip.commands import common
from miniclip.utils.command_line import Parser, at_least, cell, starting
from miniclip.utils.errors import InputError

READS = {"beam_search": ("num_beams",), "top_k": ("top_k", "temperature"), "top_p": ("top_p", "temperature")}


def main(argv: list[str]):
    parser = Parser.command("caption", __doc__, "--model runs/coca --images photos")
    parser.share("model", required=True)
    parser.share("pretrained")
    parser.add_argument("--images", nargs="+", help="images or folders")
    parser.share("eval_file", "image_root", "columns", "allow_outside_image_root", "on_bad_sample")
    parser.share("output_dir", default="captions")
    parser.share("batch_size", default=32, help="images captioned at once")
    parser.share("num_workers", "device", "json")
    ways = "beam_search; top_k or top_p: draw each token from the likeliest (top_k with --top_k 1: the likeliest)"
    parser.add_argument("--generation_type", choices=READS, default="beam_search", help=ways)
    longest = "tokens of a caption, start and end included (default: 30, or as many as the model reads)"
    parser.add_argument("--seq_len", type=at_least(2), help=longest)
    parser.add_argument("--num_beams", type=at_least(1), default=2, help="texts kept by beam_search")
    parser.add_argument("--top_k", type=at_least(1), default=1, help="tokens to draw from")
    parser.add_argument("--top_p", type=float, default=0.1, help="probability of the tokens to draw from, together")
    parser.add_argument("--temperature", type=float, default=1.0, help="of what is drawn")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: words are repeated less")
    options = parser.parse_args(argv)
    if (options.images is None) == (options.eval_file is None):
        raise InputError("name images by --images, or a caption file by --eval_file, and not both")
    without = {"num_beams", "top_k", "top_p", "temperature"} - set(READS[options.generation_type])
    reason = dict.fromkeys(without, f"with --generation_type {options.generation_type}")
    if options.images:
        reason |= dict.fromkeys(("image_root", "columns", "allow_outside_image_root"), "with --images")
    for name, why in reason.items():
        if vars(options)[name] != parser.get_default(name):
            raise InputError(f"--{name} has no effect {why}: remove it")
    with starting():
        from miniclip.classify.images import find_images
        from miniclip.datasets.read import read_source
        from miniclip.datasets.records import ReadOptions, one_per_image
        from miniclip.inference.caption import caption_images, caption_metrics, lengths, scorers
        from miniclip.utils.bad_samples import BadSamples

    bad_samples, references = BadSamples(), None
    options.precision = None  # the decoder has no faster copy
    if options.eval_file:
        scorers()  # fails before the work, not after it, if their package is missing
        reading = ReadOptions.from_args(options, bad_samples=bad_samples, check_handles=True)
        records = one_per_image(read_source(options.eval_file, reading), options.eval_file)
        paths, references = zip(*((record["image"], record["caption"]) for record in records))
    else:
        paths = [path for path, _ in common.find_usable(options, find_images(options.images), bad_samples)]
    model, preprocess, tokenizer = common.open_model(options)
    names = "generation_type", "num_beams", "top_k", "top_p", "temperature", "repetition_penalty"
    how = {name: vars(options)[name] for name in names} | {"num_beam_groups": 1} | lengths(model, options.seq_len)
    captions = caption_images(model, preprocess, tokenizer, paths, options.batch_size, options.num_workers, True, **how)
    pictures = [{"image": str(path), "caption": caption} for path, caption in zip(paths, captions)]
    results = {"model": str(options.model), "generation": how, "captions": pictures}
    lines = ["| image | caption |", "|---|---|"]
    lines += [f"| {cell(picture['image'])} | {cell(picture['caption'])} |" for picture in pictures]
    summary = f"{common.first_rows(lines)}\n{len(pictures)} captions"
    if references is not None:
        results["metrics"] = caption_metrics(captions, references)
        for picture, texts in zip(pictures, references):
            picture["references"] = list(texts)
        summary += ": " + ", ".join(f"{name} {100 * value:.1f}" for name, value in results["metrics"].items())
    common.finish(options, "captions", results, "\n".join(lines), bad_samples, summary)
