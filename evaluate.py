"""Measures a model, or embeddings made elsewhere, by retrieval: `python evaluate.py --help`."""

import json
import sys
from pathlib import Path

from miniclip.options import EvalOptions, make_parser


def main(argv: list[str]):
    parser = make_parser(EvalOptions, prog="evaluate.py")
    if not argv:
        parser.print_help()
        return
    options = parser.parse_args(argv)
    if not options.features and not (options.model and options.eval_file):
        parser.error("give --model and --eval_file, or --features")

    import numpy as np

    from miniclip.retrieval import KS, format_table, retrieval_metrics

    records = None
    if options.eval_file:
        from miniclip.data import read_captions

        records = read_captions(options.eval_file, options.image_root, check_images=False)
    if options.features:
        folder = Path(options.features)
        image_embeds, text_embeds = (np.load(folder / f"{kind}.npy") for kind in ("image", "text"))
        each = len(text_embeds) // max(1, len(image_embeds))
        counts = [len(record["caption"]) for record in records] if records else [each] * len(image_embeds)
    else:
        image_embeds, text_embeds = encode(options, records)
        counts = [1 if options.captions == "first" else len(record["caption"]) for record in records]

    image_of_text = np.repeat(np.arange(len(counts)), counts)
    if options.captions == "first" and len(text_embeds) == len(image_of_text):
        first = np.unique(image_of_text, return_index=True)[1]
        text_embeds, image_of_text = text_embeds[first], image_of_text[first]
    elif options.captions == "first":
        image_of_text = np.arange(len(counts))  # the features hold first captions only
    ks = KS if len(text_embeds) > len(image_embeds) else (1, 3, 5, 10)  # the article gives 3 too

    metrics = retrieval_metrics(image_embeds, text_embeds, image_of_text, ks)
    source, dataset = options.model or options.features, options.eval_file or options.features
    print(f"{source} on {dataset}: {len(image_embeds)} images, {len(text_embeds)} captions")
    print(format_table(metrics, ks))
    if options.save_features:
        Path(options.save_features).mkdir(parents=True, exist_ok=True)
        np.save(Path(options.save_features) / "image.npy", image_embeds)
        np.save(Path(options.save_features) / "text.npy", text_embeds)
    beside = Path(options.model) if Path(options.model or "").is_dir() and options.model else Path()
    output = Path(options.output or beside / "retrieval.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"model": str(source), "dataset": str(dataset), "metrics": metrics}, indent=2) + "\n")
    print(f"written to {output}")
    if options.report:
        draw(options, records, image_embeds, text_embeds, image_of_text, metrics)


def encode(options: EvalOptions, records: list[dict]):
    """The embeddings of all images, and of all captions or the first ones."""
    import torch

    from miniclip.data import flatten_captions
    from miniclip.inference import embed_images, embed_texts, load

    device = options.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model, preprocess, tokenizer = load(options.model, options.pretrained, device)
    images = [record["image"] for record in records]
    texts = [record["caption"][0] for record in records] if options.captions == "first" else flatten_captions(records)[0]
    image_embeds = embed_images(model, preprocess, images, options.batch_size, options.num_workers, progress=True)
    text_embeds = embed_texts(model, tokenizer, texts, 4 * options.batch_size, progress=True)
    if tokenizer.truncated:
        print(f"{tokenizer.truncated} of {len(texts)} captions were cut off at {tokenizer.context_length} tokens")
    return image_embeds, text_embeds


def draw(options: EvalOptions, records: list[dict], image_embeds, text_embeds, image_of_text, metrics: dict):
    """Draws the run's curves, if the model's folder has them, and four searches."""
    import numpy as np

    from miniclip.report import draw_report
    from miniclip.retrieval import first_ranks, search

    state = Path(options.model or "") / "trainer_state.json"
    log_history = json.loads(state.read_text())["log_history"] if state.is_file() else []
    first = options.captions == "first"
    captions = [caption for record in records for caption in record["caption"][: 1 if first else None]]
    ranks = first_ranks(image_embeds, text_embeds, [image_of_text[row : row + 1] for row in range(len(captions))])
    rows = [int(len(captions) * share) for share in (0.1, 0.37, 0.64)]
    rows.append(int(np.argmax(ranks * (ranks <= 5))))  # and one that is not found at once, if there is any
    examples = []
    for row in rows:
        scores, found = search(image_embeds, text_embeds[row : row + 1], 5)
        examples.append({
            "caption": captions[row],
            "retrieved": [(records[i]["image"], float(score)) for i, score in zip(found[0], scores[0])],
            "correct": records[image_of_text[row]]["image"],
            "rank": int(ranks[row]),
        })  # fmt: skip
    draw_report(options.report, log_history, examples, f"{options.model} on {options.eval_file}")
    print(f"drawn in {options.report}")


if __name__ == "__main__":
    main(sys.argv[1:])
