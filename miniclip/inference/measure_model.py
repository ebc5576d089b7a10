"""Models as evaluate.py measures them."""

import math
from argparse import Namespace
from collections.abc import Sequence
from functools import partial

from miniclip.datasets.records import one_per_image
from miniclip.inference.caption import caption_images, captioner
from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.inference.late_interaction import reranked, where_seen
from miniclip.inference.load import load
from miniclip.inference.precision import settle, suggest_bf16
from miniclip.towers.tokens import has_tokens
from miniclip.transforms import Preprocess
from miniclip.utils.command_line import find_device
from miniclip.weights.pretrained import check_model, find_tag, prefetch


class Model:
    """A model as evaluate.py's options name it, loaded once for all data sets."""

    @staticmethod
    def check(source: Namespace):
        check_model(source.model)
        find_tag(source.model, source.pretrained)

    def __init__(self, options: Namespace):
        self.device = find_device(options.device)
        self.files = tuple(filter(None, [prefetch(options.model, options.pretrained)]))
        self.model, self.preprocess, self.tokenizer = load(options.model, options.pretrained, self.device)
        if isinstance(self.model, InferenceClip):
            inference_copy(self.model, options.precision)  # refuses another one
        else:
            suggest_bf16(self.model, options.precision)
            settle(self.model, options.precision)  # says what int8 takes
        self.preprocess = Preprocess(self.model.config.preprocess_cfg, options.decode)
        about = options.feature_cache, self.model, self.preprocess, options.precision
        self.cache = FeatureCache.for_images(*about) if options.feature_cache else None

    def measure(self, options: Namespace, records: Sequence[dict]) -> dict:
        """Measures the model. Returns fields of `Measured`."""
        records = one_per_image(records, options.eval_file)
        model, tokenizer = self.model, self.tokenizer
        precision = model.precision if isinstance(model, InferenceClip) else options.precision
        image_batch, text_batch = (32, 64) if self.device.type == "cpu" else (256, 256)
        evaluator = RetrievalEvaluator(
            records, self.preprocess, tokenizer, ks=None, precision=options.precision, progress=True,
            first_caption_only=options.captions == "first", batch_size=options.batch_size or image_batch,
            text_batch_size=options.batch_size or text_batch, num_workers=options.num_workers,
            caches=(self.cache, None), rerank=options.rerank,
        )  # fmt: skip
        reused = self.cache.reused if self.cache else 0
        tokenizer.truncated = 0
        metrics = evaluator(model)
        notes = []
        if tokenizer.truncated:
            length = tokenizer.context_length
            notes.append(f"{tokenizer.truncated} of {len(evaluator.texts)} captions were truncated to {length} tokens")
        if n := reranked(model, options.rerank):
            notes.append(f"late interaction re-ranked the first {n} results of each query: cosine plus MaxSim")
        print(*notes, sep="\n", end="\n" * bool(notes))
        if self.cache is not None:
            reused = self.cache.reused - reused
            print(f"{reused} of {len(evaluator.images)} images were in {options.feature_cache}")
        print(evaluator.check_precision(model))
        bias = None if model.logit_bias is None else model.logit_bias.item()
        temperature = {"scale": model.logit_scale.exp().item(), "bias": bias}
        temperature["start"] = math.exp(model.config.init_logit_scale)
        return {
            "records": records, "evaluator": evaluator, "metrics": metrics, "device": self.device,
            "temperature": temperature, "notes": notes, "files": self.files, "precision": precision,
            "seen": partial(where_seen, model, self.preprocess, tokenizer) if has_tokens(model) else None,
            "write": partial(caption_images, model, self.preprocess, tokenizer) if captioner(model) else None,
        }  # fmt: skip
