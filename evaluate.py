"""Measures a model, or embeddings made elsewhere, by retrieval: `python evaluate.py --help`."""

import os
import re
from pathlib import Path

from miniclip.inference.options import EvalOptions
from miniclip.utils.command_line import find_device, make_parser, run

# Threads that wait for one another spin before they sleep, by default for so long that a short search costs twice its
# time. To be said before NumPy and faiss are imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # a power of 2, in cycles


def main(argv: list[str]):
    parser = make_parser(EvalOptions, prog="evaluate.py")
    if not argv:
        parser.print_help()
        return
    options = parser.parse_args(argv)
    if not options.features and not (options.model and options.eval_file):
        parser.error("give --model and --eval_file, or --features")
    if options.features and options.model:
        parser.error("--features are measured without a model: leave out --model")
    for kind in ("image", "text") if options.features else ():
        if not (Path(options.features) / f"{kind}.npy").is_file():
            parser.error(f"there is no {kind}.npy in {options.features}")
    if options.report and not options.eval_file:
        parser.error("--report shows images: give --eval_file too")
    if options.report:
        from miniclip.reports.html_page import report_file

        report_file(options.report)

    import numpy as np

    from miniclip.retrieval import KS, format_table, metrics_of, search_both
    from miniclip.run.metadata import evaluation_metadata
    from miniclip.utils.bad_samples import BadSamples
    from miniclip.utils.files import replacing, write_json

    first_only, bad_samples = options.captions == "first", BadSamples()
    records = None
    if options.eval_file:
        from miniclip.datasets.read import read_source
        from miniclip.datasets.records import ReadOptions, one_per_image

        # Images in files are checked in advance only to leave bad ones out: otherwise whoever decodes them for the
        # model finds all that is wrong with them.
        how = dict(zip(("image_column", "caption_column"), options.columns or (None, None)))
        how |= {"on_bad": options.on_bad_sample, "bad_samples": bad_samples, "check_handles": True}
        how |= {"allow_outside": options.allow_outside_image_root}
        records = read_source(options.eval_file, options.image_root, options.on_bad_sample == "skip", **how)
        if not options.features:  # which have a row for each record as it stands in the file
            records = one_per_image(records, options.eval_file)
    if options.features:
        embeds = (np.load(Path(options.features) / f"{kind}.npy") for kind in ("image", "text"))
        image_embeds, text_embeds = (array.astype(np.float32, copy=False) for array in embeds)
        device, temperature, left_out = "cpu", None, []
    else:
        image_embeds, text_embeds, device, temperature, left_out = encode(options, records)
    each = len(text_embeds) // max(1, len(image_embeds))
    counts = [len(record["caption"]) for record in records] if records else [each] * len(image_embeds)
    image_of_text = np.repeat(np.arange(len(counts)), counts)
    if first_only and len(text_embeds) == len(image_of_text):  # features of all captions: take the first ones
        first = np.unique(image_of_text, return_index=True)[1]
        text_embeds, image_of_text = text_embeds[first], image_of_text[first]
    elif first_only:
        image_of_text = np.arange(len(counts))
    ks = KS if len(text_embeds) > len(image_embeds) else (1, 3, 5, 10)  # the article gives 3 too

    searched = search_both(image_embeds, text_embeds, image_of_text, max(ks))
    metrics = metrics_of(searched, ks)
    source, dataset = options.model or options.features, options.eval_file or options.features
    if first_only:
        dataset += " (first captions)"
    print(f"{source} on {dataset}: {len(image_embeds)} images, {len(text_embeds)} captions")
    print(format_table(metrics, ks))
    if options.save_features:
        from miniclip.utils.files import write_npy

        folder = Path(options.save_features)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "image.npy") as image, replacing(folder / "text.npy") as text:
            write_npy(image, np.float32, image_embeds.shape, [image_embeds])
            write_npy(text, np.float32, text_embeds.shape, [text_embeds])
            (folder / "image.npy").unlink(missing_ok=True)  # which comes last: old images never lie beside new texts
    beside = Path(options.model if os.path.isdir(options.model or "") else "")
    name = re.sub(r"\.\w+(?=(\[:\d+\])?$)", "", Path(options.eval_file or options.features).name)
    name = re.sub(r"[][{}*?:]+", "_", name).strip("_")
    name += "_first" if first_only else ""
    output = Path(options.output_file or beside / f"retrieval_{name}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    record = evaluation_metadata(argv, options, records, device)
    write_json(output, {"model": str(source), "dataset": str(dataset), "metrics": metrics, "record": record})
    print(f"written to {output}")
    bad_samples.open(output.with_suffix(".bad_samples.jsonl"))
    if bad_samples:
        print(f"{len(bad_samples)} bad samples were left out: {bad_samples.path}")
        left_out.append(f"{len(bad_samples)} bad samples were left out")
    if options.report:
        from miniclip.reports.html_page import Evaluation, write_report

        embeds = (image_embeds, text_embeds, image_of_text)
        about = (searched, metrics, record, temperature, tuple(left_out))
        report = write_report(options.report, Evaluation(str(source), str(dataset), records, *embeds, *about))
        print(f"the report is {report}")


def encode(options: EvalOptions, records: list[dict]):
    """The embeddings of all images, and of all captions or the first ones; the device that they were made on; and the
    model's temperature, and what was left out, as `html_page.Evaluation` has them."""
    import math

    import torch

    from miniclip.datasets.records import flatten_captions
    from miniclip.inference.embed import embed_images, embed_texts
    from miniclip.inference.fast import cosine_to_fp32, inference_copy
    from miniclip.inference.feature_cache import FeatureCache
    from miniclip.inference.load import load
    from miniclip.transforms import Preprocess

    device = find_device(options.device)
    model, preprocess, tokenizer = load(options.model, options.pretrained, device)
    preprocess = Preprocess(model.config.preprocess_cfg, draft=not options.full_decode)
    images = [record["image"] for record in records]
    texts, _ = flatten_captions(records)
    if options.captions == "first":
        texts = [record["caption"][0] for record in records]
    cache = None
    if options.feature_cache:
        cache = FeatureCache.for_images(options.feature_cache, model, preprocess, options.precision)
    fast = inference_copy(model, options.precision)
    image_size, text_size = (options.batch_size,) * 2 if options.batch_size else (32, 64)
    if device.type != "cpu" and not options.batch_size:
        image_size = text_size = 256
    image_embeds = embed_images(fast, preprocess, images, image_size, options.num_workers, progress=True, cache=cache)
    text_embeds = embed_texts(fast, tokenizer, texts, text_size, progress=True)
    left_out = []
    if tokenizer.truncated:
        told = f"{tokenizer.truncated} of {len(texts)} captions were cut off at {tokenizer.context_length} tokens"
        left_out.append(told)
        print(told)
    if cache is not None:
        print(f"{cache.reused} of {len(images)} images were in {options.feature_cache}")
    sample = slice(0, 8 if options.precision == "fp32" else 64)
    pixel_values = torch.stack([preprocess.load(path) for path in images[sample]]).to(device)
    cosines = cosine_to_fp32(fast, model, pixel_values, tokenizer(texts[sample], trim=True).to(device))
    print(
        f"{options.precision}: cosine to plain fp32 at least {cosines[0]:.6f} (images), {cosines[1]:.6f} (texts),"
        f" of the first {len(pixel_values)}"
    )
    bias = None if model.logit_bias is None else model.logit_bias.item()
    start = math.exp(model.config.init_logit_scale)
    temperature = {"scale": model.logit_scale.exp().item(), "bias": bias, "start": start}
    return image_embeds, text_embeds, device, temperature, left_out


if __name__ == "__main__":
    run(main)
