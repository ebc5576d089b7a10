"""How is a weight file read without trusting it?

A pickle, and so a torch file, can name any function to be called while it is read. Here none is: tensors are read, and
a file that wants more is refused.
"""

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from miniclip.config import InputError

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # where training checkpoints keep the weights


class CheckpointError(InputError):
    """Weights that cannot be used; the message says why, and what to do."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads weights by the names that they have in the file: safetensors, torch (new or old format), TorchScript, bare
    or inside a training checkpoint. Raises CheckpointError for anything else, and runs none of it."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """As `read_state_dict`; also gives the name of the run, which OpenCLIP's training stores with the weights."""
    content = _read(Path(path))
    run = str(content.get("name", "")) if isinstance(content, dict) else ""
    while inner := isinstance(content, dict) and [content[w] for w in WRAPPERS if isinstance(content.get(w), dict)]:
        content = inner[0]
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        held = shorten(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} holds no state dict (names and tensors), but {held}")
    return content, run


def _read(path: Path):
    if path.is_dir():
        files = shorten(sorted(f.name for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth")))
        raise CheckpointError(f"{path} is a folder: name the weight file itself (in this folder: {files})")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path} is empty: fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, a note of where the weights are: run `git lfs pull`")
    try:
        if head[6:9] == b"\0\0{":  # safetensors: the length of the header in eight bytes, then its JSON
            return load_file(path)
        if head.startswith(b"PK\3\4"):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return _ScriptArchive(archive).state_dict()
        if head.startswith((b"PK\3\4", b"\x80")):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} is refused: it asks for {wanted[1] if wanted else 'more than tensors'}, and a pickle that may do "
            "so can run any program. If you trust its author, load it yourself and save its state dict alone"
        ) from error
    except Exception as error:  # whatever a damaged file leads to
        problem = f"{type(error).__name__} {error}".partition("\n")[0]
        raise CheckpointError(f"{path} is damaged, probably cut short: fetch it again ({problem})") from error
    kind = "a web page: download the file itself" if head.lstrip().startswith(b"<") else "no weight file that is known"
    raise CheckpointError(f"{path} is {kind} (it begins with {head[:24]!r})")


class _ScriptArchive(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive (OpenAI's releases) without running the program that is in it.

    Modules are stored as a pickle of objects whose classes only that program has: empty classes take their place. No
    other name is looked up but those that tensors need, so that a hostile pickle finds nothing to call.
    """

    class Module:
        pass

    DTYPES = {
        "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
        "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
        "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    }  # fmt: skip

    def __init__(self, archive: zipfile.ZipFile):
        self.archive, self.storages = archive, {}
        constants = next(name for name in archive.namelist() if name.endswith("/constants.pkl"))
        self.root = constants.removesuffix("constants.pkl")
        super().__init__(archive.open(self.root + "data.pkl"))

    def find_class(self, module: str, name: str):
        if module.partition(".")[0] == "__torch__":
            return type(name, (self.Module,), {})
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if module == "torch.jit._pickle":  # marks of what a list or a dict contains
            return lambda value, *_: value
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, reference: tuple):
        _, dtype, key, _, _ = reference  # ("storage", type, file, device, number of elements)
        if key not in self.storages:  # several tensors may look into one storage
            self.storages[key] = torch.frombuffer(bytearray(self.archive.read(f"{self.root}data/{key}")), dtype=dtype)
        return self.storages[key]

    def state_dict(self) -> dict[str, Tensor]:
        tensors, modules = {}, [("", self.load())]
        for prefix, module in modules:  # a list that grows
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    tensors[prefix + name] = value
                elif isinstance(value, self.Module):
                    modules.append((f"{prefix}{name}.", value))
        return tensors


def read_json(path: Path) -> dict:
    """What a JSON file holds; nothing where there is none, or one of another kind."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    return values if isinstance(values, dict) else {}


def shorten(names: Iterable[str]) -> str:
    """The first few of a list, for a message."""
    names = list(names)
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "") or "none"
