"""What is each precision worth? How fast and how exact a model is in it, measured on this machine.

`--precision auto` takes bf16 where that is proved: at least 0.9999 of cosine to fp32 and more than 1.3 times its speed.
What was found for a model is kept in the user's cache, so that the next run decides alike."""

import sys
import time
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.inference.feature_cache import FORMATS, fingerprint
from miniclip.inference.matmul import OneDnnLinear, cpu_routes, packs, remembered
from miniclip.model import MiniClip
from miniclip.utils.machine import keep_freed_memory, processor, return_freed_memory

say = cache(print)  # once each
LEAST, FASTER = 0.9999, 1.3
SMALL = 5_000_000  # weights in the layers of a model whose images take longer to read than to encode
CASES = ((("image", 8), ("text", 32)), (("image", 64), ("text", 64)))  # so many at once, on a CPU and elsewhere
LONG = 5  # seconds after which no further round begins
SENTENCES = [f"a photo of {what} {where}" for what in ("a person", "two dogs on the grass", "a red car", "some food")
             for where in ("", "outdoors", "on white", "at night", "in the snow", "by the sea", "in an old street",
                           "from above")]  # fmt: skip


class Rate(NamedTuple):
    """A precision of a model on this machine."""

    image: float  # seconds for one, in batches, as `Seconds.busy`
    text: float
    cosine: float  # the lowest to the embeddings in fp32, of images and texts

    @property
    def both(self) -> float:
        return self.image + self.text


class Seconds(NamedTuple):
    """How long something takes, the least of some rounds."""

    wall: float
    busy: float  # of processor time, which does not count when others have the processor; on a GPU `wall`


def settle(model: MiniClip, precision: str, quiet: bool = False) -> str:
    """The precision to compute in: for "auto" what is proved, else the one that is given. Says in one line what was
    found, and that bf16 is better where int8 is asked for and takes longer."""
    if isinstance(model, InferenceClip):
        return model.precision if precision == "auto" else precision
    device = model.logit_scale.device
    able = packs("bf16") if device.type == "cpu" else device.type == "cuda"
    if precision not in ("auto", "int8") or not able or not large(model):
        return "fp32" if precision == "auto" else precision
    if precision == "int8":
        found = rates(model, ("bf16", "int8")) if device.type == "cpu" else {}  # elsewhere it is refused
        if found and (slower := found["int8"].both / found["bf16"].both) > 1 and not quiet:
            print(f"int8 takes {slower:.1f} times as long as bf16 here: try --precision bf16", file=sys.stderr)
        return precision
    found = rates(model, ("fp32", "bf16"))
    speedup, cosine = found["fp32"].both / found["bf16"].both, found["bf16"].cosine
    proved = cosine >= LEAST and speedup > FASTER
    if not quiet:
        why = "" if proved else f" (bf16 needs more than {FASTER} and at least {LEAST})"
        took = f"precision auto takes {'bf16' if proved else 'fp32'}"
        print(f"{took}: bf16 is {speedup:.1f} times as fast here, cosine {cosine:.5f} or more{why}", file=sys.stderr)
    return "bf16" if proved else "fp32"


def large(model: MiniClip) -> bool:
    """Whether its layers have so many weights that encoding an image takes longer than reading it."""
    layers = (module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d, OneDnnLinear)))
    return sum(layer.weight.numel() for layer in layers) >= SMALL


def suggest_bf16(model: MiniClip, precision: str):
    """Prints a line, once, if fp32 was asked for and products in bf16 are more than FASTER times as fast here."""
    if precision != "fp32" or model.logit_scale.device.type != "cpu" or not large(model):
        return
    routes = cpu_routes()
    best = max(route.speedup for way, route in routes.items() if way == "default" or route.used)
    if "bf16" in routes and (speedup := routes["bf16"].speedup / best) > FASTER:
        times = f"{speedup:.1f} times as fast as fp32 on this processor ({processor()})"
        say(f"matrix products in bf16 are {times}: try --precision bf16", file=sys.stderr)


def rates(model: MiniClip, precisions: tuple[str, ...]) -> dict[str, Rate]:
    """What `measure` found for this model on this machine the first time."""
    device = model.logit_scale.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    formats = {name: FORMATS[name] for name in precisions if name in FORMATS}
    weights = [fingerprint(model, tower, formats) for tower in (model.visual, model.text)]
    about = " ".join([machine, torch.__version__, str(torch.get_num_threads()), *precisions, *weights])

    def measure() -> dict[str, Rate]:
        seconds, cosines = compare(model, precisions, cases := CASES[device.type != "cpu"])
        return {p: Rate(*(seconds[p, case].busy / case[1] for case in cases), cosines[p]) for p in precisions}

    return remembered("precisions", "rates", about, Rate, measure)


@torch.inference_mode()
def compare(model: MiniClip, precisions: tuple[str, ...], cases: tuple[tuple[str, int], ...], rounds=3, **others):
    """Times inference copies of a model on made-up images and sentences, from pixel values and token ids to embeddings.
    They take turns with the functions `others`. `cases` are ("image" or "text", how many at once). Returns `Seconds` by
    (precision, case) or name, and the lowest cosine of each precision to the model in fp32."""
    keep_freed_memory()  # as embedding a set does
    inputs = made_up(model, max(n for _, n in cases))
    copies = {precision: inference_copy(model, precision) for precision in precisions}
    plain = copies.get("fp32") or inference_copy(model)
    exact = {case: embed(plain, case, inputs) for case in cases}
    cosines = {p: torch.cat([(embed(one, case, inputs) * exact[case]).sum(dim=1) for case in cases]).min().item()
               for p, one in copies.items()}  # fmt: skip
    works = {(p, case): partial(embed, one, case, inputs) for case in cases for p, one in copies.items()} | others
    busy = time.process_time if model.logit_scale.device.type == "cpu" else time.perf_counter
    seconds, began = {}, time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - began > LONG:
            break
        for name, work in works.items():
            start = time.perf_counter(), busy()
            work()
            took = time.perf_counter() - start[0], busy() - start[1]
            seconds[name] = Seconds(*map(min, took, seconds.get(name, took)))
    return_freed_memory()
    return seconds, cosines


def made_up(model: MiniClip, n: int) -> dict[str, torch.Tensor]:
    """The pixel values of n images with large areas, as pictures have them, and the token ids of n sentences."""
    device, size = model.logit_scale.device, (model.visual.image_size,) * 2
    coarse = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    input_ids = model.text.tokenizer([SENTENCES[i % len(SENTENCES)] for i in range(n)], trim=True)
    return {"image": F.interpolate(coarse, size=size, mode="bicubic").to(device), "text": input_ids.to(device)}


def embed(model: InferenceClip, case: tuple[str, int], inputs: dict) -> torch.Tensor:
    encode = model.encode_image if case[0] == "image" else model.encode_text
    return encode(inputs[case[0]][: case[1]], normalize=True).cpu()  # which waits for a GPU
