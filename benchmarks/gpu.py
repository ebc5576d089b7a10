"""How much of a GPU does MiniCLIP use, and how fast does it train and encode there?

    python benchmarks/gpu.py --out FOLDER                       what 9 minutes on a large card are enough for
    python benchmarks/gpu.py --parts rate compiled chunks       what they may not be enough for
    python benchmarks/gpu.py --parts rate train --models ViT-B-16 --batches 512
    python benchmarks/gpu.py --parts rate profile peers         where time goes; OpenCLIP by turns, if installed
    python benchmarks/gpu.py --render FOLDER/gpu.jsonl          RESULTS.md from what was measured elsewhere
    python benchmarks/gpu.py --device cpu --quick --out FOLDER  does it run? (with --results FILE: also writes)

Every speed is the median of repetitions that alternate with large bf16 products of square matrices, so that the share
of what the card can do holds also when its clock changes. A row that fails says why, and the next one follows. What is
measured goes to FOLDER/gpu.jsonl as it comes, and after each part to the part of RESULTS.md between the marks "gpu"; a
run of some parts, models or batches has a part of its own, such as "gpu rate train". A run that was killed has its rows
in gpu.jsonl.

FLOPs are those of the model's matrix products and attention, on the tokens that really went through (`flops`); what
activation checkpointing and chunks compute again is not counted, nor are the logits.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import results  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from contestants import import_open_clip  # noqa: E402
from inputs import make_captions  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import PrinterCallback, TrainerCallback  # noqa: E402

from miniclip.config import MiniClipConfig  # noqa: E402
from miniclip.data import Collator  # noqa: E402
from miniclip.inference.fast import image_features, inference_copy, text_features  # noqa: E402
from miniclip.inference.matmul import matmul_precision  # noqa: E402
from miniclip.loss import clip_loss  # noqa: E402
from miniclip.model import MAX_LOGIT_SCALE, MiniClip  # noqa: E402
from miniclip.tokenizer import Tokenizer  # noqa: E402
from miniclip.training.arguments import RunArguments  # noqa: E402
from miniclip.training.dataset import RunDataset  # noqa: E402
from miniclip.training.grad_cache import wrap_towers  # noqa: E402
from miniclip.training.trainer import RunTrainer  # noqa: E402
from miniclip.transforms import Preprocess  # noqa: E402

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SHAPE = ("layers", "width", "mlp_ratio")
PARTS = (
    "rate", "profile", "attention", "sync", "transfer", "train", "peers", "trainer", "inference", "compiled", "chunks",
)  # fmt: skip
MODELS = ["ViT-B-32", "TinyCLIP-ViT-40M-32-Text-19M", "ViT-B-16", "ViT-L-14"]
BATCHES = {"ViT-B-16": [256, 512], "ViT-L-14": [128, 256]}  # what the memory of a large card holds; else --batches
LARGE = tuple(BATCHES)  # they get the rows that matter most, so that there is time for all
TITLES = {
    "rate": "What the card can do: products of square bf16 matrices",
    "profile": "One training step on the GPU by kind of kernel, a bare loop",
    "attention": "Which attention kernels run, under bf16 autocast",
    "sync": "Where a training step makes the host wait for the GPU",
    "transfer": "From host memory to the GPU: one batch of images",
    "train": "Training, a bare loop: bf16 autocast, contrastive loss, fused AdamW, the batch on the GPU already",
    "peers": "OpenCLIP by turns with MiniCLIP: the same loop; its model, loss and 77 tokens, images normalised before",
    "trainer": "Training by `RunTrainer`, from images in memory through its data loader",
    "inference": "Inference, encoding levels or token ids that are on the GPU already",
    "compiled": "With torch.compile: training, `RunTrainer` and inference",
    "chunks": "Training with large batches in chunks (`grad_cache_chunk_size`), a bare loop",
}


class Skipped(Exception):  # noqa: N818
    """Why a row is not measured."""


# What a model costs


def tower_flops(width: int, layers: int, mlp_ratio: float, sequences: int, length: int) -> float:
    """Of the blocks of a tower, forward: 2 for each weight and row, and 4 x length x width a row for attention, whose
    whole square is counted, with a causal mask too. Of the last block only queries, keys and values are computed for
    all rows; the rest for the one row of each sequence that is read out (`miniclip/inference/fast.py`)."""
    rows, qkv = sequences * length, 2 * 3 * width**2
    rest = 2 * width**2 + 2 * 2 * width * int(width * mlp_ratio) + 4 * length * width
    return layers * rows * qkv + ((layers - 1) * rows + sequences) * rest


def flops(config: MiniClipConfig, images: int = 0, captions: int = 0, length: int = 0, training: bool = False) -> float:
    """Of a model for so many images and so many captions of `length` tokens each, padding included: those of one
    forward pass, or, `training`, of the backward pass too, which costs twice as much. (Only once as much for the
    patches: pixels need no gradient.)"""
    vision, text = config.vision_cfg, config.text_cfg
    patches = (vision.image_size // vision.patch_size) ** 2
    first = images * patches * 2 * 3 * vision.patch_size**2 * vision.width
    forward = (
        first
        + tower_flops(vision.width, vision.layers, vision.mlp_ratio, images, 1 + patches)
        + tower_flops(text.width, text.layers, text.mlp_ratio, captions, length)
        + 2 * config.embed_dim * (images * vision.width + captions * text.width)
    )
    return 3 * forward - first if training else forward


# What it works on


@cache
def captions() -> list[str]:
    """Of Flickr8k's lengths."""
    return make_captions(40_000)


def token_ids(config: MiniClipConfig, n: int, trimmed: bool) -> Tensor:
    """(n, L), L the longest caption's length rounded up to a multiple of 8, or the model's whole context."""
    tokenizer = Tokenizer(config.text_cfg.context_length)
    if not trimmed:
        return tokenizer(captions()[:n])
    return Collator(tokenizer, 8)([{"caption": text} for text in captions()[:n]])["input_ids"]


def random_levels(config: MiniClipConfig, n: int, device="cpu") -> Tensor:
    """Images as the collator gives them: (n, 3, S, S) uint8."""
    size = config.vision_cfg.image_size
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=device)


class Pairs(RunDataset):
    """As many pairs as are asked for, from a few images in memory, in the form that RunDataset gives them."""

    def __init__(self, config: MiniClipConfig, n: int, dtype: torch.dtype = torch.uint8):
        super().__init__((), None)
        self.n, self.images = n, random_levels(config, min(n, 256)).to(dtype)
        self.captions = captions()  # made here, once, and not in each worker

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        caption = self.captions[index % len(self.captions)]
        return {"pixel_values": self.images[index % len(self.images)], "caption": caption}


def new_model(config: MiniClipConfig, device) -> MiniClip:
    torch.manual_seed(0)
    with torch.device(device):
        return MiniClip(config)


class Step:
    """One training step of a bare loop, as RunTrainer makes it, on a batch that stays the same."""

    def __init__(self, config, device, batch: int, trimmed=True, checkpointing=False, compiled=False, chunk=0):
        self.device, self.config = torch.device(device), config
        self.model = new_model(config, device).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        normalize = Preprocess(config.preprocess_cfg).normalize
        wrap_towers(self.model, normalize, chunk)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.batch = {
            "pixel_values": random_levels(config, batch, device),
            "input_ids": token_ids(config, batch, trimmed).to(device),
        }
        self.prepare()

    def prepare(self):
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True
        )

    def loss(self) -> Tensor:
        return clip_loss(*self.forward(**self.batch)[:3])

    def __call__(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)
        self.optimizer.zero_grad()
        return loss.detach()

    def flops(self) -> float:
        n, length = self.batch["input_ids"].shape
        return flops(self.config, n, n, length, training=True)


class OpenClipStep(Step):
    """The same step of OpenCLIP's model, as its own trainer computes it with `--precision amp_bf16`."""

    def __init__(self, config, device, batch: int, compiled=False):
        open_clip = load_open_clip()
        self.device, self.config = torch.device(device), config
        parts = {"vision_cfg": (*SHAPE, "image_size", "patch_size", "head_width"),
                 "text_cfg": (*SHAPE, "context_length", "vocab_size", "heads")}  # fmt: skip
        sections = {part: {name: getattr(getattr(config, part), name) for name in of} for part, of in parts.items()}
        torch.manual_seed(0)
        with torch.device(device):
            self.model = open_clip.CLIP(config.embed_dim, **sections, quick_gelu=config.quick_gelu).train()
        self.forward = torch.compile(self.model) if compiled else self.model
        levels = random_levels(config, batch, device)
        pixel_values = Preprocess(config.preprocess_cfg).normalize(levels)
        self.batch = {"image": pixel_values, "text": token_ids(config, batch, False).to(device)}
        self.criterion = open_clip.ClipLoss()
        self.prepare()

    def loss(self) -> Tensor:
        return self.criterion(*self.forward(**self.batch)[:3])

    def flops(self) -> float:
        n, length = self.batch["text"].shape
        return flops(self.config, n, n, length, training=True)


@cache
def load_open_clip():
    try:
        import open_clip
    except RuntimeError:  # torchvision is of another build than torch
        open_clip = import_open_clip()
    return open_clip


class Benchmark:
    """One run of the command: its rows, and the clock."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.start, self.records = time.perf_counter(), []
        names = ["tiny"] if options.quick else options.models
        self.configs = {
            name: MiniClipConfig.from_dict(TINY) if options.quick else MiniClipConfig.from_name(name) for name in names
        }
        batches = [4, 8] if options.quick else options.batches
        self.batches = {name: batches or BATCHES.get(name, [64, 256, 1024, 4096]) for name in names}
        # Where one batch has to do: one that any card has the memory for, of OpenCLIP's step too.
        some = {name: [b for b in own if b <= 1024 and name not in LARGE] for name, own in self.batches.items()}
        self.middle = {name: max(some[name] or [min(own)]) for name, own in self.batches.items()}
        self.small = [name for name in names if name not in LARGE] or names
        self.repetitions, self.span = (2, 0.01) if options.quick else (5, 0.2)  # seconds that one is to take, or more
        self.square = 256 if options.quick else 8192
        options.out.mkdir(parents=True, exist_ok=True)
        self.file = options.out / "gpu.jsonl"
        self.file.write_text("")
        command = " ".join(sys.argv[1:]).replace(f"--out {options.out}", "").strip()
        about = {"result": results.machine(), "command": command, "section": options.section}
        self.keep({"part": "machine", **about})

    # The frame of every row

    def keep(self, record: dict):
        self.records.append(record)
        with open(self.file, "a") as file:
            file.write(json.dumps(record) + "\n")

    def row(self, part: str, measure: Callable[[], dict], needs_cuda: bool = False, **about):
        """Measures a row and keeps it, or keeps why there is none. `about` are the cells that tell rows apart."""
        record, began = {"part": part, **about}, time.perf_counter()
        try:
            if needs_cuda and not self.cuda:
                raise Skipped("for CUDA only")
            self.check_time()
            record |= measure()
        except Skipped as reason:
            record["error"] = f"skipped: {reason}"
        except torch.OutOfMemoryError:
            record["error"] = "out of memory"
        except ModuleNotFoundError as error:
            record["error"] = f"skipped: {error.name} is not installed"
        except Exception as error:  # whatever it is, the other rows are worth having
            record["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            record["trace"] = traceback.format_exc()[-4000:]
        self.tidy()
        record["took"] = round(time.perf_counter() - began, 1)
        self.keep(record)
        summary = record.get("error") or record.get("result") or f"{speed(record)[0]} a second, {speed(record)[2]}"
        label = ", ".join(str(value) for value in about.values())
        print(f"{time.perf_counter() - self.start:4.0f} s  {part:9} {label}: {summary}", file=sys.stderr, flush=True)

    def check_time(self):
        if time.perf_counter() - self.start > 60 * self.options.minutes:
            raise Skipped(f"{self.options.minutes:g} minutes are over")

    def tidy(self):
        gc.collect()  # models and their hooks refer to one another
        if self.cuda:
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, work: Callable, times: int) -> float:
        """Seconds of one call, the mean of a span of `times`."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.synchronize()
        return (time.perf_counter() - start) / times

    def matmul(self, size: int | None = None) -> float:
        """TFLOP/s of bf16 products of square matrices, over some 30 ms."""
        n = size or self.square
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        with torch.no_grad():
            seconds = self.time(lambda: a @ b, 2)
            seconds = self.time(lambda: a @ b, min(200, 1 + int(0.03 / seconds)))
        return 2 * n**3 / seconds / 1e12

    def speed(self, work: Callable, items: int, work_flops: float, warm_up: int = 3) -> dict:
        """Seconds of `work`, in repetitions, with the card's rate before each and the memory at its peak."""
        found, times = self.warm(work, items, work_flops, warm_up)
        for _ in range(self.repetitions):
            self.repeat(work, found, times)
        return found

    def warm(self, work: Callable, items: int, work_flops: float, warm_up: int = 3) -> tuple[dict, int]:
        """What is known of `work` before its repetitions, and how often each of them calls it."""
        seconds = [self.time(work, 1) for _ in range(warm_up)]  # the first ones allocate, choose kernels, compile
        times = max(1, min(100, int(self.span / seconds[-1])))
        found = {"items": items, "tflop": work_flops / 1e12, "seconds": [], "matmul": []}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.time(work, 1)
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9  # before the card's rate takes memory of its own
        return found, times

    def repeat(self, work: Callable, found: dict, times: int):
        found["matmul"].append(self.matmul())
        found["seconds"].append(self.time(work, times))

    # The parts

    def rate(self):
        def measure(n):
            rates = [self.matmul(n) for _ in range(5)]
            return {"rates": rates, "result": f"{spread(rates)} TFLOP/s"}

        sizes = [128, 256] if self.options.quick else [4096, 8192, 16384]
        for n in sizes:
            self.row("rate", partial(measure, n), size=f"{n} x {n}")
        best = {n: statistics.median(r["rates"]) for n, r in zip(sizes, self.records[-len(sizes) :]) if "rates" in r}
        self.square = max(best, key=best.get, default=self.square)

    def profile(self):
        def measure(make):
            step = make()
            for _ in range(3):
                step()
            return kinds_of_kernels(self, step)

        for name, config in self.configs.items():
            makers = {"MiniCLIP": Step, "OpenCLIP": OpenClipStep}
            for how, step in makers.items() if name not in LARGE else [("MiniCLIP", Step)]:
                make = partial(step, config, self.device, self.middle[name])
                self.row("profile", partial(measure, make), model=name, batch=self.middle[name], how=f"{how}, eager")

    def peers(self):
        """By turns, the first model compiled too. A peer that is missing or fails leaves the others their rows."""
        cases = [(name, False) for name in self.configs] + [(next(iter(self.configs)), True)] * (not self.options.quick)
        for name, compiled in cases:
            torch.compiler.reset()
            args, settings = (self.configs[name], self.device, self.middle[name]), {"compiled": compiled}
            makers = {
                "MiniCLIP": partial(Step, *args, **settings),
                "MiniCLIP, text not trimmed": partial(Step, *args, **settings, trimmed=False),
                "OpenCLIP": partial(OpenClipStep, *args, **settings),
            }
            turns = cache(partial(self.by_turns, makers, self.middle[name]))
            for maker in makers:
                how = f"{maker}, {'compiled' if compiled else 'eager'}"
                measure = partial(self.of_turns, turns, maker)
                self.row("peers", measure, model=name, batch=self.middle[name], how=how)

    def by_turns(self, makers: dict[str, Callable], batch: int) -> dict[str, dict | Exception]:
        found, works = {}, {}

        def attempt(name: str, work: Callable):
            try:
                work()
            except Exception as error:  # its row says so
                traceback.clear_frames(error.__traceback__)  # which would keep what filled the memory
                found[name] = error
                works.pop(name, None)
                self.tidy()

        def start(name: str, make: Callable):
            self.check_time()
            step = make()
            known, times = self.warm(step, batch, step.flops())
            found[name] = known | {"tokens": list(step.batch.values())[1].shape[1]}
            works[name] = step, times

        for name, make in makers.items():
            attempt(name, partial(start, name, make))
        for _ in range(self.repetitions):
            for name, (step, times) in list(works.items()):
                attempt(name, partial(self.repeat, step, found[name], times))
        return found

    @staticmethod
    def of_turns(turns: Callable[[], dict], name: str) -> dict:
        if isinstance(turns()[name], Exception):
            raise turns()[name]
        return turns()[name]

    def attention(self):
        def kernels(config, name):
            step = Step(config, self.device, self.batches[name][0])
            step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                step()
            prefix = "aten::_scaled_dot_product_"
            ran = Counter(e.name.removeprefix(prefix) for e in profile.events() if e.name.startswith(prefix))
            return {"result": ", ".join(f"{name} {n} times" for name, n in ran.items()) or "none of torch's fused ones"}

        def flash_only(config, fast):
            model = new_model(config, self.device).train()
            model = wrap_towers(model) if fast else model
            pixel_values = torch.randn_like(random_levels(config, 8, self.device), dtype=torch.float32)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast(self.device.type, torch.bfloat16):
                clip_loss(*model(pixel_values, token_ids(config, 8, True).to(self.device))[:3]).backward()
            self.synchronize()
            return {"result": "runs"}

        for name in self.small:
            config = self.configs[name]
            self.row("attention", partial(kernels, config, name), model=name, what="a training step")
            for fast, what in ((False, "flash attention only, model.py"), (True, "flash attention only, fast.py")):
                self.row("attention", partial(flash_only, config, fast), needs_cuda=True, model=name, what=what)

    def sync(self):
        def bare(config, batch):
            step = Step(config, self.device, batch)
            for _ in range(3):
                step()
            return {"result": watch(step)}

        def trainer(config, batch):
            found = {}
            self.train_by_trainer(config, batch, 12, found=found, logging_steps=1000)
            return {"result": f"training_step: {found['training_step']}; the whole step: {found['whole']}"}

        for name in self.small:
            args = self.configs[name], self.batches[name][0]
            self.row("sync", partial(bare, *args), needs_cuda=True, model=name, what="the bare loop's step")
            self.row("sync", partial(trainer, *args), needs_cuda=True, model=name, what="RunTrainer's step")

    def transfer(self):
        (name, config), *_ = self.configs.items()
        n = min(256, self.middle[name])

        def copy(dtype, pinned):
            batch = random_levels(config, n).to(dtype)
            batch = batch.pin_memory() if pinned else batch
            seconds = [self.time(lambda: batch.to(self.device, non_blocking=pinned), 5) for _ in range(6)][1:]
            gigabytes = batch.nbytes / 1e9
            rate = gigabytes / statistics.median(seconds)
            return {"seconds": seconds, "result": f"{spread([1e3 * s for s in seconds])} ms, {rate:.1f} GB/s"}

        def load(dtype, workers):
            data = Pairs(config, 60 * n, dtype)
            collate = Collator(Tokenizer(config.text_cfg.context_length), 8)
            loader = DataLoader(data, n, num_workers=workers, collate_fn=collate, pin_memory=self.cuda)
            seconds, start = [], None
            for batch in loader:
                batch["pixel_values"].to(self.device, non_blocking=True)
                self.synchronize()
                seconds.append(time.perf_counter() - (start or time.perf_counter()))
                start = time.perf_counter()
            seconds = seconds[20:]  # the first ones wait for workers to start, or were made meanwhile
            mean = statistics.mean(seconds)
            return {"seconds": seconds, "result": f"{1e3 * mean:.3g} ms on average, {n / mean:,.0f} images/s"}

        for dtype, name in ((torch.uint8, "uint8"), (torch.float32, "float32")):
            for pinned in (False, True):
                what = f"{n} images, {name}, {'pinned' if pinned else 'pageable'} memory"
                self.row("transfer", partial(copy, dtype, pinned), needs_cuda=True, what=what)
            workers = 0 if self.options.quick else RunArguments.dataloader_num_workers
            what = f"{n} images, {name}, by a data loader with {workers} workers, captions tokenized too"
            self.row("transfer", partial(load, dtype, workers), what=what)

    def train(self):
        for batch in self.all_batches():
            for name in self.configs:
                if batch in self.batches[name]:
                    self.train_row("train", name, batch, "eager")
        for batch in self.all_batches():
            for name in self.small:
                if batch in self.batches[name]:
                    self.train_row("train", name, batch, "eager, text not trimmed", trimmed=False)
                    self.train_row("train", name, batch, "eager, activation checkpointing", checkpointing=True)

    def all_batches(self) -> list[int]:
        return sorted({batch for own in self.batches.values() for batch in own})

    def train_row(self, part: str, name: str, batch: int, how: str, warm_up: int = 3, **settings):
        def measure():
            step = Step(self.configs[name], self.device, batch, **settings)
            found = self.speed(step, batch, step.flops(), warm_up)
            loss = step().item()
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss}")
            return found | {"tokens": step.batch["input_ids"].shape[1], "loss": loss}

        self.row(part, measure, model=name, batch=batch, how=how)

    def trainer(self):
        for name in self.small:
            batch = self.middle[name]
            self.row("trainer", partial(self.trainer_speed, name, batch), model=name, batch=batch, how="eager")

    def trainer_speed(self, name: str, batch: int, **settings) -> dict:
        """Whole steps of the real trainer, from the end of one to the end of a later one."""
        config, warm_up, every = self.configs[name], 2 if self.options.quick else 6, 2 if self.options.quick else 6
        spans = _Spans(self, warm_up, every)
        workers = self.train_by_trainer(config, batch, warm_up + every * self.repetitions, [spans], **settings)
        length = statistics.mean(spans.lengths)  # batches differ
        return {
            "items": batch, "tflop": flops(config, batch, batch, length, training=True) / 1e12,
            "tokens": f"{length:.3g}", "seconds": spans.seconds, "matmul": spans.rates, "workers": workers,
            **({"peak_gb": spans.peak / 1e9} if self.cuda else {}),
        }  # fmt: skip

    def train_by_trainer(self, config, batch: int, steps: int, callbacks=(), found: dict | None = None, **settings):
        """Trains a new model so many steps; where worker processes fail, as with little shared memory, without them.
        Gives their number."""
        workers = [0] if self.options.quick else [RunArguments.dataloader_num_workers, 0]
        for number in workers:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    args = RunArguments(
                        folder, per_device_train_batch_size=batch, max_steps=steps, save_strategy="no",
                        report_to="none", disable_tqdm=True, learning_rate=1e-5, bf16=True, use_cpu=not self.cuda,
                        dataloader_num_workers=number, **settings,
                    )  # fmt: skip
                    trainer = _Watched(
                        new_model(config, self.device), args, Pairs(config, batch * (steps + 1)),
                        preprocess=Preprocess(config.preprocess_cfg), callbacks=list(callbacks),
                        tokenizer=Tokenizer(config.text_cfg.context_length),
                    )  # fmt: skip
                    trainer.remove_callback(PrinterCallback)
                    trainer.found = found
                    for callback in callbacks:
                        callback.trainer = trainer
                    trainer.train()
                return number
            except RuntimeError as error:
                if number == 0 or "worker" not in str(error):
                    raise
                print(f"data loader workers failed, going on without: {error}", file=sys.stderr)

    def inference(self):
        for name in self.configs:
            for kind in ("images", "captions"):
                for batch in sorted({self.batches[name][0], self.middle[name]}):
                    for how in ("bf16",) if name in LARGE else ("fp32, TF32 off", "fp32, TF32 on", "bf16"):
                        measure = partial(self.encode_speed, name, kind, batch, how)
                        self.row("inference", measure, model=name, batch=f"{batch} {kind}", how=how)

    def encode_speed(self, name: str, kind: str, batch: int, how: str) -> dict:
        config = self.configs[name]
        model, normalize = new_model(config, self.device).eval(), Preprocess(config.preprocess_cfg).normalize
        # oneDNN's layers, of the CPU alone, are none that torch.compile knows.
        fast = inference_copy(model, "bf16" if how.startswith("bf16") else "fp32", pack=not how.endswith("compiled"))
        levels = random_levels(config, batch, self.device) if kind == "images" else None
        ids = token_ids(config, batch, True).to(self.device)

        def encode(by: MiniClip = fast) -> Tensor:
            if kind == "images":
                return by.encode_image(normalize(levels), normalize=True)
            return by.encode_text(ids, normalize=True)

        precision, work = "highest", encode
        if how == "fp32, TF32 on":  # the inference copy never rounds so; the model itself does as torch is told
            precision, work = "high", partial(encode, wrap_towers(model))
        elif how == "bf16, compiled":

            def towers(levels: Tensor | None, ids: Tensor) -> Tensor:
                if kind == "images":
                    embeds = fast.visual.proj(image_features(fast.visual, normalize(levels).to(torch.bfloat16)))
                else:
                    embeds = fast.text.text_projection(text_features(fast.text, ids))
                return F.normalize(embeds.float(), dim=-1)

            work = partial(torch.compile(towers), levels, ids)
        count = {"images": batch} if kind == "images" else {"captions": batch, "length": ids.shape[1]}
        with torch.no_grad(), matmul_precision(precision):
            found = self.speed(work, batch, flops(config, **count))
            if not work().isfinite().all():
                raise FloatingPointError("an embedding is not finite")
        return found | {"tokens": "" if kind == "images" else ids.shape[1]}

    def compiled(self):
        """Each row compiles anew, which takes up to a minute."""
        for name in self.configs:
            torch.compiler.reset()
            self.train_row("compiled", name, self.middle[name], "training", compiled=True)
        for name in list(self.configs)[:1]:
            batch = self.middle[name]
            for kind in ("images", "captions"):
                torch.compiler.reset()
                measure = partial(self.encode_speed, name, kind, batch, "bf16, compiled")
                self.row("compiled", measure, model=name, batch=f"{batch} {kind}", how="inference, bf16")
            torch.compiler.reset()
            measure = partial(self.trainer_speed, name, batch, torch_compile=True)
            self.row("compiled", measure, model=name, batch=batch, how="RunTrainer, --torch_compile")

    def chunks(self):
        sizes, chunk = ([16], 4) if self.options.quick else (self.options.chunked, self.options.chunk)
        repetitions, self.repetitions = self.repetitions, 2  # a step takes seconds
        for batch in sizes:
            for name in self.small:
                self.train_row("chunks", name, batch, f"chunks of {chunk}", warm_up=1, chunk=chunk)
        self.repetitions = repetitions


class _Spans(TrainerCallback):
    """Times spans of a trainer's steps, the GPU made to finish at both ends of each, the card's rate between them."""

    def __init__(self, benchmark: Benchmark, first: int, every: int):
        self.benchmark, self.first, self.every = benchmark, first, every

    def on_train_begin(self, *args, **kwargs):  # which may be a second attempt
        self.seconds, self.rates, self.lengths, self.start, self.peak = [], [], [], None, 0

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step > self.first:
            self.lengths.append(self.trainer.length)
        if step < self.first or (step - self.first) % self.every:
            return
        self.benchmark.synchronize()
        if self.start is not None:
            self.seconds.append((time.perf_counter() - self.start) / self.every)
            self.peak = max(self.peak, torch.cuda.max_memory_allocated()) if self.benchmark.cuda else 0
        if len(self.seconds) < self.benchmark.repetitions:
            self.rates.append(self.benchmark.matmul())
        if self.benchmark.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()


class _Watched(RunTrainer):
    """RunTrainer, which remembers how long its captions are and, given a dict `found`, watches two of its steps."""

    found, length, stack = None, 0, None

    def training_step(self, model, inputs, *args, **kwargs):
        self.length = inputs["input_ids"].shape[1]
        step = partial(super().training_step, model, inputs, *args, **kwargs)
        if self.found is None:
            return step()
        number = self.state.global_step
        if number == 5:
            self.found["training_step"] = watch(step)
        elif number == 8:  # from here to the same place of the next step, with the optimiser and the next batch
            self.stack = contextlib.ExitStack()
            self.places = self.stack.enter_context(syncs_noted())
        elif number == 9:
            self.stack.close()
            self.found["whole"] = tell(self.places)
        return step()


# Kernels

KINDS = {  # of kernels, by parts of their names; the first that fits
    "optimizer and clipping": "multi_tensor|FusedAdam|lpnorm|NormTwoOps",
    "attention": "fmha|flash|sdpa|_attend|attention|mha_|cudnn::fusion",
    "convolution of patches": "cudnn::cnn|fprop|wgrad|dgrad",
    "matrix products": "gemm|nvjet|cutlass|cublas|splitKreduce|xmma",
    "LayerNorm": "layer_norm|GammaBeta|_add_norm",
    "loss": "softmax|nll_loss",
    "GELU": "[Gg]elu|sigmoid",
    "casts and copies": "copy_kernel|CatArray|[Mm]emcpy|memset|Memset|transpose|_to_copy",
    "embedding, rows taken and put": "embedding|index|gather|scatter|sort|Radix|radix|arange|krn_partial|compute_grad",
    "sums of a bias's gradient and others": "reduce_kernel|Reduce|triton_red|triton_per",
    "additions and other elementwise": "elementwise|triton_poi|fill",
}


def kinds_of_kernels(benchmark: Benchmark, step: Callable) -> dict:
    """Milliseconds of one call by kind of kernel; the GPU is idle where none runs between the first and the last."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * benchmark.cuda
    plain = benchmark.time(step, 3)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        benchmark.synchronize()
    events = [e for e in profile.events() if (e.device_type == torch.autograd.DeviceType.CUDA) == benchmark.cuda]
    events = [e for e in events if not e.is_user_annotation and not e.name.startswith(("Optimizer", "##", "Torch-"))]
    kinds, kernels, busy, end = Counter(), {}, 0.0, 0.0
    for event in sorted(events, key=lambda e: e.time_range.start):
        start, stop = event.time_range.start, event.time_range.end
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.name)), "others")
        kinds[kind] += (stop - start) / 1e3
        ms, n = kernels.get(event.name, (0.0, 0))
        kernels[event.name] = ms + (stop - start) / 1e3, n + 1
        busy += max(0, stop - max(start, end)) / 1e3
        end = max(end, stop)
    whole = (end - min(e.time_range.start for e in events)) / 1e3
    kinds["no kernel runs"] = whole - busy
    text = "; ".join(f"{kind} {ms:.1f} ({ms / whole:.0%})" for kind, ms in kinds.most_common())
    largest = sorted(kernels.items(), key=lambda item: -item[1][0])[:40]
    return {
        "kinds": kinds, "whole_ms": whole, "unprofiled_ms": 1e3 * plain, "launches": len(events),
        "kernels": [[name[:200], ms, n] for name, (ms, n) in largest],
        "result": f"{whole:.1f} ms ({1e3 * plain:.1f} unprofiled), {len(events):,} kernels: {text}",
    }  # fmt: skip


# Synchronisation


def watch(work: Callable) -> str:
    """Runs `work` with every wait of the host for the GPU made an error; where there is one, again, to list all."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
        return "none"
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        first = place(traceback.extract_tb(error.__traceback__))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with syncs_noted() as places:
        work()
    return tell(places) if places else f"{first} 1 time"


@contextlib.contextmanager
def syncs_noted():
    """Gives a Counter of the places within at which the host waits for the GPU."""
    places = Counter()

    def note(message, *args, **kwargs):
        if "synchroniz" in str(message):
            places[place(traceback.extract_stack()[:-1])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def place(frames) -> str:
    """The innermost line of MiniCLIP and, if that is elsewhere, the innermost line of all."""
    lines = [f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} `{(f.line or '').strip()}`" for f in frames]
    lines = [line for line in lines if not line.startswith(("python3", "warnings.py"))]
    ours = [line for line in lines if line.startswith(("miniclip/", "benchmarks/"))]
    if not lines:
        return "an unknown place"
    return lines[-1] if not ours or ours[-1] == lines[-1] else f"{ours[-1]} > {lines[-1]}"


def tell(places: Counter) -> str:
    return "; ".join(f"{where} {n} times" for where, n in places.items()) or "none"


# The report


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def spread(values: list[float]) -> str:
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def speed(record: dict) -> tuple[str, str, str]:
    """Of a row: items per second; TFLOP/s; its share of what bf16 products reached meanwhile."""
    rates = [record["items"] / s for s in record["seconds"]]
    tflops = record["tflop"] / statistics.median(record["seconds"])
    return spread(rates), number(tflops), f"{100 * tflops / statistics.median(record['matmul']):.0f}%"


def report(records: list[dict]) -> str:
    """The part of RESULTS.md."""
    about = next(r for r in records if r["part"] == "machine")
    some = about.get("section", "").removeprefix("gpu")
    lines = [f"## GPU{some}", "", f"{about['result']}. `python benchmarks/gpu.py {about['command']}`.", ""]
    lines += [
        "Medians (lowest to highest) of repetitions. Share: of the bf16 products measured between them; the aim is half"
        " or more. FLOPs: 2 for each weight of a matrix and token (padding included) and 4 x length x width a token and"
        " layer for attention, three times that for training; not what is computed again, not the logits. Captions of"
        " Flickr8k's lengths, trimmed to the batch's longest and padded to a multiple of 8 unless it says otherwise."
        " The loss's products are fp32, TF32 off. Memory: the peak that torch allocated in a step.", "",
    ]  # fmt: skip
    for part, title in TITLES.items():
        rows = [r for r in records if r["part"] == part]
        if not rows:
            continue
        known = ("model", "batch", "what", "how", "size")
        keys = [key for key in known if any(key in r for r in rows)]
        fast = part in ("train", "peers", "trainer", "inference", "compiled", "chunks")
        heads = ["tokens", "items/s", "TFLOP/s", "share", "peak GB"] if fast else ["result"]
        lines += [f"### {title}", "", f"| {' | '.join(keys + heads)} |", "|---" * len(keys + heads) + "|"]
        for r in rows:
            cells = [str(r.get(key, "")) for key in keys]
            if "error" in r:
                cells += [r["error"], *[""] * (len(heads) - 1)]
            elif fast:
                peak = f"{r['peak_gb']:.1f}" if "peak_gb" in r else ""
                cells += [str(r.get("tokens", "")), *speed(r), peak]
            else:
                cells.append(r["result"])
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", help="the same for all models; default: what fits each")
    parser.add_argument("--chunked", type=int, nargs="+", default=[8192, 32768], help="batches that go in chunks")
    parser.add_argument("--chunk", type=int, default=1024, help="pairs in a chunk")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7.5, help="no row begins later; compiling one may take one")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for gpu.jsonl")
    parser.add_argument("--results", type=Path, help="the file that gets the tables: RESULTS.md; of --quick none")
    parser.add_argument("--render", type=Path, help="a gpu.jsonl: only writes the tables from it")
    options = parser.parse_args()
    options.section = results.section("gpu", parser, options, "parts", "models", "batches", "chunked", "chunk")
    write = options.results or options.render or not options.quick
    results.RESULTS = options.results or results.RESULTS
    if options.render:
        records = [json.loads(line) for line in options.render.read_text().splitlines()]
        results.write_section(records[0].get("section", "gpu"), report(records))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --device cpu --quick tries the rest")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    benchmark = Benchmark(options)
    for part in options.parts:
        try:
            getattr(benchmark, part)()
        except Exception:  # outside of any row: a fault of this file
            benchmark.keep({"part": "fault", "of": part, "trace": traceback.format_exc()})
            traceback.print_exc()
        if write:
            results.write_section(options.section, report(benchmark.records))
    print(report(benchmark.records))


if __name__ == "__main__":
    main()
