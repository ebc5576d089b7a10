"""What evaluate.py measures: each model, or each set of embeddings, on each data set. Imports no torch."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from miniclip.datasets.read import read_source
from miniclip.datasets.records import ReadOptions
from miniclip.inference.feature_files import find_features, read_features
from miniclip.inference.measure import RetrievalMeasure
from miniclip.inference.options import merged, single
from miniclip.retrieval import KS
from miniclip.utils.bad_samples import BadSamples
from miniclip.utils.files import make_folder
from miniclip.utils.local_copy import ADDRESSES


@dataclass(frozen=True)
class Measured:
    """One model, or one set of embeddings, measured on one data set."""

    options: Namespace  # evaluate.py's, with one `model`, `pretrained`, `features`, `eval_file` and `image_root`
    model: str  # its name in tables
    dataset: str
    records: Sequence[dict]
    evaluator: RetrievalMeasure
    metrics: dict[str, float]
    device: object = "cpu"
    precision: str | None = None  # that the model computed in: an export has its own, whatever was asked for
    files: tuple[Path, ...] = ()  # those of the embeddings, or downloaded weights
    temperature: dict | None = None  # {"scale", "bias" (or None), "start"}; None: measured without a model
    notes: tuple[str, ...] = ()  # on truncated and on repeated captions
    repeated: dict | None = None  # from `repeated_captions`
    seen: Callable | None = None  # (image, text) -> where its words are seen; of a model with late interaction
    write: Callable | None = None  # images -> the captions that the model writes; of a model with a decoder


def evaluations(options: Namespace, output: Path, bad_samples: BadSamples, model: type | None) -> Iterator[Measured]:
    """Measures all that evaluate.py's options name, one after the other. Makes the folders of all results, reads all
    data sets, and looks for all models, before it starts. `model`: `measure_model.Model`, or None for embeddings."""
    report, files = Path(options.report or ""), [output, *map(Path, options.table or ())]
    folders = [*(file.parent for file in files), report.parent if report.suffix else options.report]
    for folder in filter(None, [*folders, options.save_features]):
        make_folder(folder)
    sources, data = single(options)
    # The images are decoded first only to skip bad ones: the encoding finds all that is wrong.
    skip = options.on_bad_sample == "skip"
    need = not options.features or bool(options.report)
    check = {"check_images": skip and need, "check_handles": need, "image_files": need, "bad_samples": bad_samples}
    read = [d.eval_file and read_source(d.eval_file, ReadOptions.from_args(merged(options, d), **check)) for d in data]
    for source in sources:
        find_features(source.features) if model is None else model.check(source)
    for source in sources:
        measure = measure_features if model is None else model(merged(options, source)).measure
        for dataset, records in zip(data, read):
            one = merged(options, source, dataset)
            first = " (first captions)" if options.captions == "first" else ""
            about = measure(one, records)
            notes = about.pop("notes", [])
            if repeated := about["evaluator"].repeated_captions():
                notes.append(describe_repeated(repeated, len(about["evaluator"].texts)))
                print(notes[-1])
            name = one.features or ADDRESSES.get(one.model, one.model)
            name += f" {one.pretrained}" if len(sources) > 1 and one.pretrained else ""
            dataset_name = (one.eval_file or one.features) + (f":{one.split}" if one.split else "") + first
            dataset_name += f" in {one.image_root}" if len(options.image_root or ()) > 1 else ""
            yield Measured(one, name, dataset_name, notes=tuple(notes), repeated=repeated, **about)


def describe_repeated(repeated: dict, captions: int) -> str:
    """A line on captions that several images share."""
    shares, n = [], repeated["captions"]
    for way in ("image_to_text", "text_to_image"):
        found = ", ".join(f"R@{k} {100 * repeated['metrics'][f'{way}_R@{k}']:.1f}" for k in KS)
        shares.append(f"{way.replace('_', ' ')} {found}")
    what = f"{n} of {captions} captions are also those of another image, for which they count as wrong"
    return f"{what}, as in published figures. Counted as right: {'; '.join(shares)}"


def measure_features(options: Namespace, records: Sequence[dict] | None) -> dict:
    """Measures embeddings made elsewhere. Returns fields of `Measured`."""
    first = options.captions == "first"
    images, texts, records = read_features(options.features, records, first, options.normalize)
    evaluator = RetrievalMeasure(records, None, first)
    files = tuple(dict.fromkeys(file for files in find_features(options.features).values() for file in files))
    return {"records": records, "evaluator": evaluator, "metrics": evaluator.measure(images, texts), "files": files}
