"""How is a weight file read without trusting it?

A pickle, and so a torch file, can name any function to be called while it is read. Here none is: tensors are read, and
a file that wants more is refused. Nor is it believed what it says about sizes: no file takes much more memory than it
has bytes, or shows memory that is not its own.
"""

import io
import json
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import MANIFEST, check_manifest, files_in, replacing, write_manifest

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # where training checkpoints keep the weights
HEADER = 4 << 20  # bytes: no model has so many tensors that the list of their names and sizes is longer
NAME, MODULES = 1000, 10_000  # letters of a tensor's name, modules of an archive: the same
TORCH = (0x1950A86A20F9469CFC6C, 1001)  # what torch files in the old format begin with


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads weights by the names that they have in the file: safetensors, torch (new or old format), TorchScript, bare
    or inside a training checkpoint. Raises CheckpointError for anything else, and runs none of it; DamagedFile for
    weights that are not what the manifest beside them says."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """As `read_state_dict`; also gives the name of the run, which OpenCLIP's training stores with the weights."""
    path = Path(path)
    content = _read(path)
    run = content.get("name") if isinstance(content, dict) else None
    for _ in range(len(WRAPPERS)):  # a pickle can make a dict that holds itself
        inner = isinstance(content, dict) and [content[w] for w in WRAPPERS if isinstance(content.get(w), dict)]
        content = inner[0] if inner else content
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        held = shorten(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} holds no state dict (names and tensors), but {held}")
    if not all(isinstance(name, str) and len(name) <= NAME for name in content):
        raise CheckpointError(f"{path} is refused: its tensors have no names, or endless ones: {shorten(content)}")
    # Views of one storage could be a thousand tensors, each as large as the file, or one whose rows are all the same.
    if sum(math.prod(t.shape) * t.element_size() for t in content.values()) > _room(path.stat().st_size):
        raise CheckpointError(f"{path} is refused: its tensors are far larger together than the file")
    return content, run if isinstance(run, str) else ""


def _room(size: int) -> int:
    """How many bytes a file of so many bytes may become: tied weights are there once, and code is compressed."""
    return 2 * size + (16 << 20)


def _read(path: Path):
    if path.is_dir():
        files = shorten(sorted(f.name for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth")))
        raise CheckpointError(f"{path} is a folder: name the weight file itself (in this folder: {files})")
    if path.exists() and not path.is_file():  # a pipe would keep us waiting, a device never end
        raise CheckpointError(f"{path} is no file, but a pipe, a socket or a device: name the weight file itself")
    if path.exists() and not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} must not be read by this user: change its permissions")
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        if not head:
            raise CheckpointError(f"{path} is empty: fetch it again")
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer, a note of where the weights are: run `git lfs pull`")
        check_manifest(path.parent, [path.name])
        try:
            if head[6:9] == b"\0\0{":  # safetensors: the length of the header in eight bytes, then its JSON
                _check_header(file, path.stat().st_size)
                return load_file(path)
            if head.startswith(b"PK\3\4"):
                with zipfile.ZipFile(file) as archive:
                    return _read_zip(archive, _room(path.stat().st_size))
            if head.startswith(b"\x80"):
                return _read_legacy(file)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is {error}") from None
        except Exception as error:  # whatever a damaged file leads to
            problem = f"{type(error).__name__} {error}".partition("\n")[0]
            raise CheckpointError(f"{path} is damaged, probably cut short: fetch it again ({problem:.300})") from error
    kind = "a web page: download the file itself" if head.lstrip().startswith(b"<") else "no weight file that is known"
    raise CheckpointError(f"{path} is {kind} (it begins with {head[:24]!r})")


def _check_header(file: BinaryIO, size: int):
    """Checks that the tensors of a safetensors file have each its own name and its own bytes, from the first byte after
    the header to the last of the file."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, HEADER):
        raise CheckpointError(f"damaged: its header would be {length} bytes long, of a file of {size}; fetch it again")

    def once(pairs: list) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise CheckpointError(f"refused: a name comes twice in its header, among {shorten(found)}")
        return found

    entries = json.loads(file.read(length), object_pairs_hook=once)
    ranges = [(*entry["data_offsets"], name) for name, entry in entries.items() if name != "__metadata__"]
    end = 0
    for start, stop, name in sorted(ranges):
        if start != end or stop < start:
            raise CheckpointError(f"damaged: in its header {name:.200} overlaps another tensor or leaves a gap")
        end = stop
    if 8 + length + end != size:
        raise CheckpointError(f"damaged, probably cut short: {size} bytes, {8 + length + end} by its header")


def _read_zip(archive: zipfile.ZipFile, room: int):
    """What torch saved in its present format, or the tensors of a TorchScript archive (OpenAI's releases)."""
    members = {member.filename: member for member in archive.infolist()}
    root = next(iter(members)).partition("/")[0] + "/"
    if len(members) < len(archive.infolist()):
        raise CheckpointError("refused: two members of the archive have the same name")
    if outside := [name for name in members if not name.startswith(root) or ".." in name.split("/")]:
        raise CheckpointError(f"refused: {shorten(outside)} in the archive lies outside of its folder {root}")
    kinds = {member.compress_type for member in members.values()} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
    if kinds or sum(member.file_size for member in members.values()) > room:
        raise CheckpointError("refused: the archive would be far larger unpacked than it is")
    if f"{root}data.pkl" not in members:
        raise CheckpointError(f"a ZIP archive, but none of torch's: there is no {root}data.pkl in it")

    def read(name: str) -> bytes:
        with archive.open(name) as member:
            return member.read(members[name].file_size)  # and no more, whatever it would unpack to

    def storage(key: str, dtype: torch.dtype) -> Tensor:
        if key not in storages:  # several tensors may look into one storage
            storages[key] = _numbers(read(f"{root}data/{key}"), dtype)
        return storages[key]

    storages = {}
    if members[f"{root}data.pkl"].file_size > HEADER:
        raise CheckpointError("refused: the list of its tensors is longer than any model's")
    if f"{root}byteorder" in members and read(f"{root}byteorder") != b"little":
        raise CheckpointError("from a computer with another order of bytes: save it again as safetensors")
    content = _Tensors(io.BytesIO(read(f"{root}data.pkl")), storage).load()
    return _script_tensors(content) if f"{root}constants.pkl" in members else content


def _read_legacy(file: BinaryIO):
    """What torch saved before 1.6, or when asked to: pickles, and behind them the numbers of one storage after another.
    The pickle of the tensors is read twice, because only its storages' types tell how long each of them is."""
    pickles, kinds, storages = io.BytesIO(file.read(HEADER)), {}, {}
    if _Tensors(pickles).load() != TORCH[0] or _Tensors(pickles).load() != TORCH[1]:
        raise CheckpointError("a pickle, but none of torch's")
    if not _Tensors(pickles).load()["little_endian"]:
        raise CheckpointError("from a computer with another order of bytes: save it again as safetensors")
    start = pickles.tell()
    _Tensors(pickles, kinds.setdefault).load()
    keys = _Tensors(pickles).load()
    left = file.seek(0, io.SEEK_END) - file.seek(pickles.tell())
    for key in keys:
        length = int.from_bytes(file.read(8), "little") * kinds[key].itemsize
        left -= 8 + length
        if left < 0:
            raise CheckpointError(f"damaged, probably cut short: a storage of {length} bytes goes beyond its end")
        storages[key] = _numbers(file.read(length), kinds[key])
    pickles.seek(start)
    return _Tensors(pickles, lambda key, dtype: storages[key]).load()


def _numbers(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _first(value, *_):
    """What stands for types around the tensors: their content as it is, and not once more."""
    return value


def _rebuild(storage, offset: int, size: tuple, stride: tuple, requires_grad=False, hooks=None, metadata=None):
    if metadata:
        raise CheckpointError("refused: it holds tensors that are to be negated or conjugated; save plain ones")
    # The storage has the size that it has: what looks beyond it raises. A type stands for one that is not read yet.
    return None if isinstance(storage, torch.dtype) else torch.as_strided(storage, size, stride, offset)


class _Module:
    """What stands for any module of a TorchScript archive: only the program in it has their classes."""


class _Tensors(pickle._Unpickler):
    """Reads a pickle of torch that holds tensors, and plain things around them.

    No name is looked up but those that tensors need, so that a hostile pickle finds nothing to call. Python's own
    unpickler, not the one in C: that one takes memory for as many objects as the pickle says that there will be.
    """

    DTYPES = {
        "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
        "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
        "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
        "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    }  # fmt: skip
    KNOWN = {
        "torch._utils._rebuild_tensor": _rebuild,
        "torch._utils._rebuild_tensor_v2": _rebuild,
        **dict.fromkeys(("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"), _first),
        **dict.fromkeys(("torch.Size", "torch.device", "collections.Counter", "__builtin__.set"), _first),
        "_codecs.encode": _first,  # of bytes
        "collections.OrderedDict": lambda: OrderedDict(),
        **{str(dtype): dtype for dtype in DTYPES.values()},
    }
    OPCODES = (
        "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE"
        " SHORT_BINSTRING EMPTY_TUPLE EMPTY_LIST EMPTY_DICT TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS BINPUT"
        " LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BINPERSID"
    )
    dispatch = {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, n)[0] for n in OPCODES.split())}

    def __init__(self, file: BinaryIO, storage: Callable[[str, torch.dtype], Tensor] | None = None):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str):
        if module.partition(".")[0] == "__torch__":
            return _Module
        if module == "torch.jit._pickle":  # marks of what a list or a dict contains
            return _first
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if found := self.KNOWN.get(f"{module}.{name}"):
            return found
        if name.startswith("_rebuild_") or name.endswith("Storage"):
            kind = f"quantised, sparse, on no device or the like ({module}.{name})"
            raise CheckpointError(f"refused: it holds tensors that are {kind}; save plain ones")
        raise CheckpointError(
            f"refused: it asks for {module}.{name}, and a pickle that may do so can run any program. If you trust its "
            "author, load it yourself and save its state dict alone"
        )

    def persistent_load(self, reference: tuple) -> Tensor:
        _, dtype, key, *_, view = (*reference, None)[:6]  # ("storage", type, key, device, number of elements, view)
        if type(key) is not str or view is not None:
            raise CheckpointError("refused: its storages are of a form that torch gave up in 2018; save it again")
        storage = self.storage(key, dtype)
        if dtype != (storage if isinstance(storage, torch.dtype) else storage.dtype):
            raise ValueError(f"storage {key} is of two types")
        return storage

    def set_items(self, items: list):
        # Keys are compared and hashed, and there is a depth of tuples in tuples at which Python dies of that.
        if type(self.stack[-1]) not in (dict, OrderedDict) or not {type(key) for key in items[::2]} <= {str, int}:
            raise ValueError("a dict whose keys are neither names nor numbers")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self):
        self.set_items(self.pop_mark())

    def load_newobj(self):
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind is not _Module or arguments:
            raise ValueError("an object of no class")
        self.stack.append(_Module())

    def load_build(self):
        state = self.stack.pop()
        if isinstance(self.stack[-1], _Module):
            self.stack[-1].__dict__ = state  # the rest is dropped: the modules' versions beside a state dict

    dispatch |= {
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
    }  # fmt: skip


def _script_tensors(root: _Module) -> dict[str, Tensor]:
    tensors, modules = {}, [("", root)]
    for prefix, module in modules:  # a list that grows
        if len(modules) > MODULES or len(prefix) > NAME:
            raise CheckpointError("refused: its modules hold one another without end")
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _Module):
                modules.append((f"{prefix}{name}.", value))
    return tensors


def read_json(path: Path) -> dict:
    """What a JSON file holds; nothing where there is none, or one of another kind. Raises CheckpointError for what is
    no JSON, DamagedFile for what is not what the manifest beside it says."""
    check_manifest(path.parent, [path.name])
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    return values if isinstance(values, dict) else {}


def shorten(names: Iterable[str]) -> str:
    """The first few of a list, for a message."""
    names = [str(name)[:200] for name in names]
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "") or "none"


def write_model_folder(directory: Path, config: dict, weights: dict[str, Tensor], others: Iterable[Callable]):
    """Writes `config.json`, `model.safetensors`, what the functions `others` write into the folder (a tokenizer, below
    `tokenizer/`) and `manifest.json`. The first two replace the old ones together, after all is written."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
    with replacing(directory / "config.json") as file, replacing(directory / "model.safetensors") as tensors:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(weights, tensors, metadata={"format": "pt"})
        (directory / MANIFEST).unlink(missing_ok=True)  # from here on it would not be true
        for write in others:
            write(directory)
    tokenizer = [f"tokenizer/{name}" for name in files_in(directory / "tokenizer")]
    write_manifest(directory, ["config.json", "model.safetensors", *tokenizer])


def check_model_folder(directory: Path):
    """Raises InputError for a folder that `write_model_folder` did not write, DamagedFile for one that has changed. The
    weights are checked when they are read."""
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise InputError(f"{directory} was not saved by MiniCLIP: it has no {name}")
    check_manifest(directory, ["config.json", "tokenizer"])


def load_state_dict(model: nn.Module, weights: dict[str, Tensor], source: str | Path):
    """Makes weights, in their own precision, a model's parameters. Raises CheckpointError for integers in the place of
    floating point numbers, or the reverse, and RuntimeError for missing, unexpected and misshapen ones."""
    expected = model.state_dict()
    for name in weights.keys() & expected.keys():
        if weights[name].is_floating_point() != expected[name].is_floating_point():
            raise CheckpointError(f"{source}: {name} is {weights[name].dtype}, not {expected[name].dtype}")
    model.load_state_dict(weights, strict=True, assign=True)
