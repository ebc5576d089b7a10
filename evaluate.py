"""Measures a model, or embeddings made elsewhere, by retrieval: `python evaluate.py --help`."""

from miniclip.inference.options import parse_evaluate, result_file
from miniclip.utils.command_line import print_json, run, starting


def main(argv: list[str]):
    options = parse_evaluate(argv)
    output, said = result_file(options)

    with starting():
        from miniclip.inference.evaluations import evaluations
        from miniclip.inference.measure import save_features
        from miniclip.reports.comparison import as_text, compare, count_hits, write_table
        from miniclip.reports.html_page import Evaluation, format_table, write_report
        from miniclip.run.metadata import evaluation_metadata, run_metadata
        from miniclip.utils.bad_samples import BadSamples
        from miniclip.utils.files import write_json

        Model = None
        if options.model:  # embeddings are measured without torch
            from miniclip.inference.measure_model import Model

    # Each model, or embeddings from files, on each data set: a table
    bad_samples, results, hits = BadSamples(), [], []
    for e in evaluations(options, output, bad_samples, Model):
        evaluator, source, dataset = e.evaluator, e.model, e.dataset
        if options.save_features:
            save_features(options.save_features, evaluator.image_embeds, evaluator.text_embeds)
        print(f"{source} on {dataset}: {len(evaluator.images)} images, {len(evaluator.texts)} captions")
        print(format_table(e.metrics, evaluator.ks))
        metadata = evaluation_metadata(argv, e.options, e.records, e.device, e.files) | {"precision": e.precision}
        result = {"model": source, "dataset": dataset, "metrics": e.metrics, "repeated_captions": e.repeated}
        results.append({name: value for name, value in result.items() if value} | {"record": metadata})
        hits.append((dataset, source, count_hits(evaluator.result, evaluator.image_of_text)))
        if options.several:  # written each time: nothing is lost if the next model fails
            record = run_metadata(["evaluate.py", *argv], e.device) | {"options": vars(options)}
            write_json(output, {"evaluations": results, "record": record})

    # The results: a JSON file, a table with intervals, and a page
    rows = compare(hits) if options.several or options.table else []
    for path in options.table or ():
        write_table(path, rows)
    if options.several:
        results = [{"evaluations": results, "comparison": [vars(row) for row in rows], "record": record}]
    write_json(output, results[0])
    comparison = as_text(rows) if options.several else ""  # printed when it is written: a pipe may be closed
    print(f"{comparison}written to {', '.join([str(output), *(options.table or ())])}{said}")
    notes = (*e.notes, *bad_samples.report(output.with_suffix(".bad_samples.jsonl")))
    if options.report:
        about = (
            source, dataset, evaluator.images, evaluator.texts, evaluator.image_embeds, evaluator.text_embeds,
            evaluator.image_of_text, evaluator.result, e.metrics, metadata, e.temperature, notes, e.seen, e.write,
        )  # fmt: skip
        print(f"the report is {write_report(options.report, Evaluation(*about))}")
    print_json(options, results[0])


if __name__ == "__main__":
    run(main)
