"""What evaluate.py measures: each model, or each set of embeddings, on each data set."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from miniclip.datasets.read import read_source
from miniclip.datasets.records import ReadOptions, one_per_image
from miniclip.inference.caption import caption_images, captioner
from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.inference.feature_files import find_features, read_features
from miniclip.inference.late_interaction import reranked, where_seen
from miniclip.inference.load import load
from miniclip.inference.matmul import suggest_bf16
from miniclip.inference.options import merged, single
from miniclip.inference.precision import settle
from miniclip.retrieval import KS
from miniclip.towers.tokens import has_tokens
from miniclip.transforms import Preprocess
from miniclip.utils.bad_samples import BadSamples
from miniclip.utils.command_line import find_device
from miniclip.utils.local_copy import ADDRESSES
from miniclip.weights.pretrained import check_model, find_tag, prefetch


@dataclass(frozen=True)
class Measured:
    """One model, or one set of embeddings, measured on one data set."""

    options: Namespace  # evaluate.py's, with one `model`, `pretrained`, `features`, `eval_file` and `image_root`
    model: str  # its name in tables
    dataset: str
    records: Sequence[dict]
    evaluator: RetrievalEvaluator
    metrics: dict[str, float]
    device: object = "cpu"
    files: tuple[Path, ...] = ()  # those of the embeddings, or downloaded weights
    temperature: dict | None = None  # {"scale", "bias" (or None), "start"}; None: measured without a model
    notes: tuple[str, ...] = ()  # on truncated and on repeated captions
    repeated: dict | None = None  # from `RetrievalEvaluator.repeated_captions`
    seen: Callable | None = None  # (image, text) -> where its words are seen; of a model with late interaction
    write: Callable | None = None  # images -> the captions that the model writes; of a model with a decoder


def evaluations(options: Namespace, bad_samples: BadSamples) -> Iterator[Measured]:
    """Measures all that evaluate.py's options name, one after the other. Reads all data sets, and looks for all models,
    before it starts."""
    sources, datasets = single(options)
    # The images are decoded first only to skip bad ones: the encoding finds all that is wrong.
    skip, need = options.on_bad_sample == "skip", not options.features or bool(options.report)
    check = {"check_images": skip and need, "check_handles": need, "image_files": need, "bad_samples": bad_samples}
    each = [merged(options, dataset) for dataset in datasets]
    read = [one.eval_file and read_source(one.eval_file, ReadOptions.from_args(one, **check)) for one in each]
    for source in sources:
        if source.features:
            find_features(source.features)
        else:
            check_model(source.model)
            find_tag(source.model, source.pretrained)
    for source in sources:
        model = None if source.features else Model(merged(options, source))
        for dataset, records in zip(datasets, read):
            one = merged(options, source, dataset)
            first = " (first captions)" if options.captions == "first" else ""
            if model is None:
                about = measure_features(one, records)
            else:
                about = model.measure(one, one_per_image(records, one.eval_file))
            repeated, notes = about["evaluator"].repeated_captions(), about.pop("notes", [])
            if repeated:
                notes.append(describe_repeated(repeated, len(about["evaluator"].texts)))
                print(notes[-1])
            name = one.features or ADDRESSES.get(one.model, one.model)
            name += f" {one.pretrained}" if len(sources) > 1 and one.pretrained else ""
            part = f":{one.split}" if one.split else ""
            dataset_name = (one.eval_file or one.features) + part + first
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
    evaluator = RetrievalEvaluator(records, None, None, ks=None, first_caption_only=first)
    files = tuple(dict.fromkeys(file for files in find_features(options.features).values() for file in files))
    return {"records": records, "evaluator": evaluator, "metrics": evaluator.measure(images, texts), "files": files}


class Model:
    """A model as evaluate.py's options name it, loaded once for all data sets."""

    def __init__(self, options: Namespace):
        self.device = find_device(options.device)
        self.files = tuple(filter(None, [prefetch(options.model, options.pretrained)]))
        self.model, self.preprocess, self.tokenizer = load(options.model, options.pretrained, self.device)
        if isinstance(self.model, InferenceClip):
            inference_copy(self.model, options.precision)  # refuses another one
        else:
            suggest_bf16(options.precision, self.device)
            settle(self.model, options.precision)  # says what int8 takes
        self.preprocess, self.cache = Preprocess(self.model.config.preprocess_cfg, options.decode), None
        if options.feature_cache:
            about = options.feature_cache, self.model, self.preprocess, options.precision
            self.cache = FeatureCache.for_images(*about)

    def measure(self, options: Namespace, records: Sequence[dict]) -> dict:
        """Measures the model. Returns fields of `Measured`."""
        model, tokenizer = self.model, self.tokenizer
        image_batch, text_batch = (32, 64) if self.device.type == "cpu" else (256, 256)
        evaluator = RetrievalEvaluator(
            records, self.preprocess, tokenizer, ks=None, precision=options.precision, progress=True,
            first_caption_only=options.captions == "first", batch_size=options.batch_size or image_batch,
            text_batch_size=options.batch_size or text_batch, num_workers=options.num_workers,
            caches=(self.cache, None), rerank=options.rerank,
        )  # fmt: skip
        reused, tokenizer.truncated = self.cache.reused if self.cache else 0, 0
        metrics, notes = evaluator(model), []
        if tokenizer.truncated:
            length = tokenizer.context_length
            notes.append(f"{tokenizer.truncated} of {len(evaluator.texts)} captions were truncated to {length} tokens")
            print(notes[0])
        if n := reranked(model, options.rerank):
            notes.append(f"late interaction re-ranked the first {n} results of each query: cosine plus MaxSim")
            print(notes[-1])
        if self.cache is not None:
            reused = self.cache.reused - reused
            print(f"{reused} of {len(evaluator.images)} images were in {options.feature_cache}")
        print(evaluator.check_precision(model))
        scale, bias, start = model.logit_scale.exp().item(), model.logit_bias, math.exp(model.config.init_logit_scale)
        temperature = {"scale": scale, "bias": None if bias is None else bias.item(), "start": start}
        return {
            "records": records, "evaluator": evaluator, "metrics": metrics, "device": self.device,
            "temperature": temperature, "notes": notes, "files": self.files,
            "seen": partial(where_seen, model, self.preprocess, tokenizer) if has_tokens(model) else None,
            "write": partial(caption_images, model, self.preprocess, tokenizer) if captioner(model) else None,
        }  # fmt: skip
