"""Measures a model, or embeddings made elsewhere, by retrieval: `python evaluate.py --help`."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before NumPy and faiss: threads that wait spin only briefly
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # a power of 2, in cycles

from miniclip.inference.options import parse_evaluate, result_file  # noqa: E402
from miniclip.utils.command_line import find_device, run  # noqa: E402


def main(argv: list[str]):
    options = parse_evaluate(argv)

    from miniclip.datasets.read import read_source
    from miniclip.datasets.records import ReadOptions, one_per_image
    from miniclip.inference.evaluator import RetrievalEvaluator, evaluate_model, read_features, save_features
    from miniclip.reports.html_page import Evaluation, format_table, write_report
    from miniclip.run.metadata import evaluation_metadata
    from miniclip.utils.bad_samples import BadSamples
    from miniclip.utils.files import write_json

    # The images and their captions. They are decoded first only to skip bad ones: the encoding finds all that is wrong.
    bad_samples = BadSamples()
    check = {"check_images": options.on_bad_sample == "skip", "check_handles": True, "bad_samples": bad_samples}
    records = read_source(options.eval_file, ReadOptions.from_args(options, **check)) if options.eval_file else None

    # Their embeddings, from a model or from files, and the metrics
    first_only = options.captions == "first"
    if options.features:
        images, texts, records = read_features(options.features, records, first_only)
        evaluator = RetrievalEvaluator(records, None, None, ks=None, first_caption_only=first_only)
        metrics, device, temperature, notes = evaluator.measure(images, texts), "cpu", None, []
    else:
        records, device = one_per_image(records, options.eval_file), find_device(options.device)
        evaluator, metrics, temperature, notes = evaluate_model(options, records, device)
    if options.save_features:
        save_features(options.save_features, evaluator.image_embeds, evaluator.text_embeds)

    # The results: a table, a JSON file, and a page
    source = options.model or options.features
    dataset = (options.eval_file or options.features) + (f":{options.split}" if options.split else "")
    dataset += " (first captions)" if first_only else ""
    print(f"{source} on {dataset}: {len(evaluator.images)} images, {len(evaluator.texts)} captions")
    print(format_table(metrics, evaluator.ks))
    output, metadata = result_file(options), evaluation_metadata(argv, options, records, device)
    write_json(output, {"model": source, "dataset": dataset, "metrics": metrics, "record": metadata})
    print(f"written to {output}")
    notes += bad_samples.report(output.with_suffix(".bad_samples.jsonl"))
    if options.report:
        about = (
            source, dataset, evaluator.images, evaluator.texts, evaluator.image_embeds, evaluator.text_embeds,
            evaluator.image_of_text, evaluator.result, metrics, metadata, temperature, tuple(notes),
        )  # fmt: skip
        print(f"the report is {write_report(options.report, Evaluation(*about))}")


if __name__ == "__main__":
    run(main)
