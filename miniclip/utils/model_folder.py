"""A saved model's folder: written whole, read without trust in its config's sizes."""

import json
import math
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode

from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import MANIFEST, check_manifest, replacing, write_manifest
from miniclip.utils.weight_files import check_header, find_shards, read_json, read_state_dict, refuse_export

READING: ContextVar[Path | None] = ContextVar("READING", default=None)  # the saved folder that is being read


def write_model_folder(directory: Path, config: dict, weights: dict[str, Tensor], others: Iterable[Callable]):
    """Writes `config.json`, `model.safetensors`, what `others` write into the folder (a tokenizer, below `tokenizer/`)
    and `manifest.json`. The first two replace the old ones together, once everything is written."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
    with replacing(directory / "config.json") as file, replacing(directory / "model.safetensors") as tensors:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(weights, tensors, metadata={"format": "pt"})
        (directory / MANIFEST).unlink(missing_ok=True)  # from here on it would not be true
        for write in others:
            write(directory)
    write_manifest(directory, ["config.json", "model.safetensors", "tokenizer/**/*"])


def read_model_folder(directory: Path, make: Callable[[Path], nn.Module]) -> nn.Module:
    """The model in a folder that `write_model_folder` wrote, in float32 whatever precision the file has. `make` builds
    it from the path of its config. Raises InputError for another folder, for a config of a far larger model than the
    weights are, DamagedFile for a changed file, and what `load_state_dict` raises."""
    missing = [name for name in ("config.json", "model.safetensors") if not (directory / name).is_file()]
    if missing:
        refuse_export(directory)
    if missing or "model_type" in read_json(directory / "config.json"):
        problem = f"it has no {missing[0]}" if missing else "its config.json is transformers'"
        advice = f"run `python -m miniclip convert {directory} NEW_FOLDER --to miniclip`"
        raise InputError(f"{directory} was not saved by MiniCLIP: {problem}; if another library wrote it, {advice}")
    check_manifest(directory, ["config.json", "tokenizer"])
    token = READING.set(directory)
    try:
        limited = limited_by(directory / "model.safetensors", directory / "config.json")
        with _Undrawn(), torch.device("meta"), limited:  # shapes; the numbers are the file's
            model = make(directory / "config.json")
    finally:
        READING.reset(token)
    weights = read_state_dict(directory / "model.safetensors")
    # In half precision it could not compute with float32 images, nor learn by small steps.
    load_state_dict(model, {n: t.float() if t.is_floating_point() else t for n, t in weights.items()}, directory)
    return model


class _Undrawn(TorchFunctionMode):
    """No random numbers are drawn for new parameters: for those without memory torch would import its compiler first,
    which takes longer than all the rest."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        draws = function in (Tensor.normal_, Tensor.uniform_) or getattr(function, "__module__", "") == init.__name__
        tensor = args[0] if args else (kwargs or {}).get("tensor")
        # Others are drawn: transformers builds on the CPU, and its truncated normal numbers repeat until they fit.
        return tensor if draws and tensor.is_meta else function(*args, **kwargs or {})


@contextmanager
def limited_by(path: Path | None, config: Path | str | None = None):
    """Inside, this thread builds no far larger model than a weight file holds, or without one than fits the memory.
    Raises InputError at the first parameter too many, before it is filled: a config can ask for any size."""
    tensors, numbers, thread = 1 << 17, 1 << 34, threading.get_ident()
    reason = "this machine's memory can hold"
    if path is not None and not path.is_dir():  # without weights, which is said when they are read
        sizes, reason = [_declared(file) for file in find_shards(path) or [path]], f"the weights in {path} are"
        tensors, numbers = (8 * sum(size[i] for size in sizes) + room for i, room in enumerate((1000, 1 << 26)))
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        numbers = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4

    name = f"the config {config}" if config else "the config"
    problem = f"{name} is that of a far larger model than {reason}: its sizes must be wrong"

    def count(module, name, tensor):
        nonlocal tensors, numbers
        if isinstance(tensor, Tensor) and threading.get_ident() == thread:
            tensors, numbers = tensors - 1, numbers - tensor.numel()
            if tensors < 0 or numbers < 0:
                raise InputError(problem)

    parameters = modules.register_module_parameter_registration_hook(count)
    with parameters, modules.register_module_buffer_registration_hook(count):  # which ends them
        try:
            yield
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            raise InputError(problem) from None


def _declared(path: Path) -> tuple[int, int]:
    """How many tensors and numbers a weight file has at most: by its header, or as many as it has bytes."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            shapes = [entry["shape"] for entry in check_header(file, size).values()]
        return len(shapes), sum(map(math.prod, shapes))
    except Exception:  # not safetensors, or damaged, which is said when it is read
        return 10_000, size


def load_state_dict(model: nn.Module, weights: dict[str, Tensor], source: str | Path):
    """Makes weights, in their own precision, a model's parameters. Raises CheckpointError for missing, unexpected and
    misshapen ones, and for integers in the place of floating point numbers, or the reverse."""
    expected = model.state_dict()
    for name in weights.keys() & expected.keys():
        if weights[name].is_floating_point() != expected[name].is_floating_point():
            raise CheckpointError(f"{source}: {name} is {weights[name].dtype}, not {expected[name].dtype}")
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        _, *faults = str(error).split("\n\t")
        raise CheckpointError(f"{source}: the weights do not fit the config. {faults[0]:.300}") from None
