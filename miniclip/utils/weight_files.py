"""Untrusted weight files: safetensors, torch and TorchScript, read without running any code in them.

A pickle, and so a torch file, can name any function to be called while it is read. Here only tensors are read, and a
file that asks for more is refused. Declared sizes are not trusted either: no file takes much more memory than it has
bytes, or exposes memory that is not its own."""

import io
import json
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from miniclip.utils.config_files import parse_json
from miniclip.utils.errors import CheckpointError, shorten
from miniclip.utils.files import check_manifest

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # keys of the weights in training checkpoints
HEADER = 4 << 20  # bytes: no model's list of tensors is longer
NAME, MODULES = 1000, 10_000  # maximum characters of a tensor's name, modules of an archive
WEIGHT_FILES = "model.safetensors pytorch_model.bin open_clip_model.safetensors open_clip_pytorch_model.bin".split()
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.safetensors|\.bin)")  # as transformers names them
FLOAT8 = [dtype for name, dtype in vars(torch).items() if name.startswith("float8_")]
PACKED = {getattr(torch, "float4_e2m1fn_x2", None)}
TORCH = (0x1950A86A20F9469CFC6C, 1001)  # the first two values of torch files in the old format


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads weights under their names in a file: safetensors, torch (new or old) or TorchScript, bare or in a training
    checkpoint. Raises CheckpointError for anything else, DamagedFile for weights that the manifest does not match."""
    return read_checkpoint(path)[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors that a file of the same kinds holds, as they are: a single one under the file's name. Views
    among them may be larger than the file. Raises as `read_state_dict` does."""
    content = _read(path, 2 * path.stat().st_size + (16 << 20))
    content = content if isinstance(content, dict) else {path.stem: content}
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Like `read_state_dict`; also returns the name of the run, which OpenCLIP's training stores with the weights."""
    path, weights = Path(path), {}
    if (shards := find_shards(path)) is None:
        return _read_one(path)
    for shard, names in shards.items():
        part, _ = _read_one(shard)
        if odd := (weights.keys() & part.keys()) | ((names or part.keys()) ^ part.keys()):
            raise CheckpointError(f"{shard} does not belong to {path}, in {shorten(sorted(odd))}: download both again")
        weights |= part
    return weights, ""


def find_weights(path: str | Path) -> Path:
    """The weight file that a path means: itself, or of a folder the one with a usual name, the index of its shards or
    the first of them. Raises CheckpointError if there is none."""
    path = Path(path)
    if not path.exists():
        forms = "the path of a weight file (.safetensors, .pt, .bin) or of a folder with one"
        raise CheckpointError(f"there is no file {str(path)!r}: give {forms}")
    if not path.is_dir():
        return path
    kinds = weight_names((path / "open_clip_config.json").is_file())
    names = [name + end for name in kinds for end in ("", ".index.json")]
    found = [path / name for name in names if (path / name).is_file()]
    found += sorted(file for file in path.glob("*-of-*") if SHARD.fullmatch(file.name))
    return next((file for file in found if not file.name.endswith(".json") or find_shards(file)), path)


def refuse_export(folder: str | Path):
    """Raises CheckpointError for a folder of graphs, which `miniclip export` wrote."""
    graphs = any((Path(folder) / name).is_file() for name in ("image.onnx", "image.pt2"))
    if graphs and not (Path(folder) / "model.safetensors").exists():
        raise CheckpointError(f"{folder} is an export to ONNX or torch.export, without weights: name the original")


def weight_names(openclip_first: bool) -> list[str]:
    """The usual names of weight files, best first. With OpenCLIP's config, `model.safetensors` may be one tower's."""
    return sorted(WEIGHT_FILES, key=lambda name: openclip_first and not name.startswith("open_clip"))


def find_shards(path: Path) -> dict[Path, set[str] | None] | None:
    """The files of weights that were split into several, given the index (`*.index.json`) or any of them: {file: the
    names of its tensors, None without an index}; None for another file. Raises CheckpointError for missing ones."""
    if path.name.endswith(".index.json") and path.is_file():
        table, files = read_json(path).get("weight_map"), {}
        if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
            raise CheckpointError(f"{path} has no weight_map, from tensors to files: download it again")
        for tensor, name in table.items():
            files.setdefault(path.with_name(Path(name).name), set()).add(tensor)
        if outside := {name for name in table.values() if name != Path(name).name}:
            raise CheckpointError(f"{path} is refused: it names files outside its folder: {shorten(sorted(outside))}")
    elif part := SHARD.fullmatch(path.name):
        start, count, end = part.groups()
        files = {path.with_name(f"{start}-{i:05}-of-{count}{end}"): None for i in range(1, int(count) + 1)}
    else:
        return None
    if missing := [file.name for file in files if not file.is_file()]:
        whole = f"{len(missing)} of the {len(files)} files that the weights are split into are missing"
        raise CheckpointError(f"{path.parent}: {whole}: {shorten(missing)}. Download them again")
    return files


def _read_one(path: Path) -> tuple[dict[str, Tensor], str]:
    room = 2 * path.stat().st_size + (16 << 20)  # unpacked: tied weights are stored once, and code is compressed
    content = _read(path, room)
    run = content.get("name") if isinstance(content, dict) else None
    for _ in WRAPPERS:  # no more often: a pickle can make a dict that contains itself
        inner = isinstance(content, dict) and [content[w] for w in WRAPPERS if isinstance(content.get(w), dict)]
        content = inner[0] if inner else content
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        held = shorten(content) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} contains no state dict (names and tensors), but {held}")
    if not all(isinstance(name, str) and len(name) <= NAME for name in content):
        raise CheckpointError(f"{path} is refused: names of tensors are not text or too long: {shorten(content)}")
    # Views of one storage can make a thousand tensors, each as large as the file, or a huge one with equal rows.
    if sum(math.prod(t.shape) * t.element_size() for t in content.values()) > room:
        raise CheckpointError(f"{path} is refused: its tensors together are far larger than the file")
    if packed := [name for name, t in content.items() if t.dtype in PACKED]:
        raise CheckpointError(f"{path} holds numbers of 4 bits, which need scales to read: {shorten(packed)}")
    # Numbers of 8 bits can only be stored: torch does not compute with them.
    floats = {name: t.float() for name, t in content.items() if t.is_floating_point() and t.itemsize == 1}
    return content | floats, run if isinstance(run, str) else ""


def _read(path: Path, room: int):
    if path.is_dir():
        refuse_export(path)
        files = shorten(sorted(f.name for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth")))
        raise CheckpointError(f"{path} is a folder: name the weight file itself (in this folder: {files})")
    if not path.is_file():  # reading a pipe may block, a device never end
        raise CheckpointError(f"{path} is a pipe, a socket or a device: name the weight file itself")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} is not readable by this user: change its permissions")
    with path.open("rb") as file:
        size, head = path.stat().st_size, file.read(64)
        file.seek(0)
        if not head:
            raise CheckpointError(f"{path} is empty: download it again")
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer instead of the weights: run `git lfs pull`")
        check_manifest(path.parent, [path.name])
        try:
            if head[6:9] == b"\0\0{":  # safetensors: the length of the header in eight bytes, then its JSON
                check_header(file, size)
                return load_file(path)
            if head.startswith(b"PK\3\4"):
                return _read_zip(zipfile.ZipFile(file), room)
            if head.startswith(b"\x80"):
                return _read_legacy(file)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is {error}") from None
        except Exception as error:  # whatever a damaged file leads to
            why = f"{type(error).__name__} {error}".partition("\n")[0]
            raise CheckpointError(f"{path} is damaged, probably truncated: download it again ({why:.300})") from error
    kind = "a web page: download the file itself" if head.lstrip().startswith(b"<") else "not a known weight file"
    raise CheckpointError(f"{path} is {kind} (it begins with {head[:24]!r})")


def check_header(file: BinaryIO, size: int) -> dict[str, dict]:
    """The header of a safetensors file, of which each tensor has its own name and bytes, and all fill the file."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, HEADER):
        raise CheckpointError(f"damaged: a header of {length} bytes in a file of {size}; download it again")

    def once(pairs: list) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise CheckpointError(f"refused: its header repeats a name, one of {shorten(found)}")
        return found

    entries, end = json.loads(file.read(length), object_pairs_hook=once), 0
    entries.pop("__metadata__", None)
    for start, stop, name in sorted((*entry["data_offsets"], name) for name, entry in entries.items()):
        if start != end or stop < start:
            raise CheckpointError(f"damaged: in its header {name:.200} overlaps another tensor or leaves a gap")
        end = stop
    if 8 + length + end != size:
        raise CheckpointError(f"damaged, probably truncated: {size} bytes instead of {8 + length + end}")
    return entries


def _read_zip(archive: zipfile.ZipFile, room: int):
    """Reads torch's present format, or the tensors of a TorchScript archive (OpenAI's releases)."""
    members = {member.filename: member for member in archive.infolist()}
    root = next(iter(members)).partition("/")[0] + "/"
    if len(members) < len(archive.infolist()):
        raise CheckpointError("refused: two members of the archive have the same name")
    if outside := [name for name in members if not name.startswith(root) or ".." in name.split("/")]:
        raise CheckpointError(f"refused: {shorten(outside)} in the archive is outside its folder {root}")
    kinds = {member.compress_type for member in members.values()} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
    if kinds or sum(member.file_size for member in members.values()) > room:
        raise CheckpointError("refused: unpacked, the archive would be far larger")
    if f"{root}data.pkl" not in members:
        raise CheckpointError(f"a ZIP archive, but not torch's: it has no {root}data.pkl")
    if members[f"{root}data.pkl"].file_size > HEADER:
        raise CheckpointError("refused: its list of tensors is longer than any model's")

    def read(name: str) -> bytes:
        with archive.open(root + name) as member:
            return member.read(members[root + name].file_size)  # no more than declared

    def storage(key: str, dtype: torch.dtype) -> Tensor:
        if key not in storages:  # several tensors may share one storage
            storages[key] = _numbers(read(f"data/{key}"), dtype)
        return storages[key]

    storages = {}
    if f"{root}byteorder" in members and read("byteorder") != b"little":
        raise CheckpointError("big-endian: save it again as safetensors")
    content = _Tensors(io.BytesIO(read("data.pkl")), storage).load()
    return _script_tensors(content) if f"{root}constants.pkl" in members else content


def _read_legacy(file: BinaryIO):
    """Reads torch's format before 1.6: pickles, followed by the numbers of one storage after another. The pickle of the
    tensors is read twice, because the byte lengths of the storages depend on their types."""
    pickles, kinds, storages = io.BytesIO(file.read(HEADER)), {}, {}
    if _Tensors(pickles).load() != TORCH[0] or _Tensors(pickles).load() != TORCH[1]:
        raise CheckpointError("a pickle, but not torch's")
    if not _Tensors(pickles).load()["little_endian"]:
        raise CheckpointError("big-endian: save it again as safetensors")
    start = pickles.tell()
    _Tensors(pickles, kinds.setdefault).load()
    keys = _Tensors(pickles).load()
    left = file.seek(0, io.SEEK_END) - file.seek(pickles.tell())
    for key in keys:
        length = int.from_bytes(file.read(8), "little") * kinds[key].itemsize
        left -= 8 + length
        if left < 0:
            raise CheckpointError(f"damaged, probably truncated: a storage of {length} bytes goes beyond its end")
        storages[key] = _numbers(file.read(length), kinds[key])
    pickles.seek(start)
    return _Tensors(pickles, lambda key, dtype: storages[key]).load()


def _numbers(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _first(value, *_):  # stands for the types around tensors
    return value


def _rebuild(storage, offset: int, size: tuple, stride: tuple, requires_grad=False, hooks=None, metadata=None):
    if metadata:
        raise CheckpointError("refused: it contains tensors that are negated or conjugated views; save plain ones")
    # as_strided raises for a view beyond the storage. A type stands for a storage that has not been read yet.
    return None if isinstance(storage, torch.dtype) else torch.as_strided(storage, size, stride, offset)


def _rebuild_view(storage, offset, size, stride, requires_grad, hooks, dtype: torch.dtype, metadata=None):
    """A tensor whose storage has no type of its own, as those of 8-bit floats."""
    if metadata or not isinstance(dtype, torch.dtype):
        raise CheckpointError("refused: it contains tensors of an unknown kind; save plain ones")
    return _rebuild(storage if isinstance(storage, torch.dtype) else storage.view(dtype), offset, size, stride)


class _Module:
    """Stands for any module of a TorchScript archive, whose classes exist only in its program."""


class _Tensors(pickle._Unpickler):
    """Reads a torch pickle of tensors and plain containers. A hostile one finds nothing to call: only the names that
    tensors need are looked up. The unpickler in C would allocate memory for as many objects as the pickle declares."""

    types = torch.storage._storage_type_to_dtype_map()
    DTYPES = {name: dtype for name, dtype in types.items() if not name.startswith("Q")}  # without quantised numbers
    KNOWN = {
        "torch._utils._rebuild_tensor": _rebuild, "torch._utils._rebuild_tensor_v2": _rebuild,
        "torch._utils._rebuild_tensor_v3": _rebuild_view, "torch.storage.UntypedStorage": torch.uint8,
        "torch._utils._rebuild_parameter": _first, "torch._utils._rebuild_parameter_with_state": _first,
        "torch.Size": _first, "torch.device": _first, "collections.Counter": _first, "__builtin__.set": _first,
        "_codecs.encode": _first, "collections.OrderedDict": lambda: OrderedDict(),
        **{str(dtype): dtype for dtype in (*DTYPES.values(), *FLOAT8)},
    }  # fmt: skip
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
        if module == "torch.jit._pickle":  # element types of lists and dicts
            return _first
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if found := self.KNOWN.get(f"{module}.{name}"):
            return found
        other_type = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if name.startswith("_rebuild_") or name.endswith("Storage") or other_type:
            kind = f"quantised, sparse, on the meta device or the like ({module}.{name})"
            raise CheckpointError(f"refused: it contains tensors that are {kind}; save plain ones")
        raise CheckpointError(f"refused: it asks for {module}.{name}, and a pickle that may do so can run any program."
                              " If you trust its author, load it yourself and save only its state dict")  # fmt: skip

    def persistent_load(self, reference: tuple) -> Tensor:
        _, dtype, key, *_, view = (*reference, None)[:6]  # ("storage", type, key, device, number of elements, view)
        if type(key) is not str or view is not None:
            raise CheckpointError("refused: its storages have a format that torch abandoned in 2018; save it again")
        storage = self.storage(key, dtype)
        if dtype != (storage if isinstance(storage, torch.dtype) else storage.dtype):
            raise ValueError(f"storage {key} has two types")
        return storage

    def set_items(self, items: list):
        # Keys are compared and hashed, which crashes Python for deeply nested tuples.
        if type(self.stack[-1]) not in (dict, OrderedDict) or not {type(key) for key in items[::2]} <= {str, int}:
            raise ValueError("a dict whose keys are neither names nor numbers")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_newobj(self):
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind is not _Module or arguments:
            raise ValueError("an object of an unknown class")
        self.stack.append(_Module())

    def load_build(self):
        state = self.stack.pop()
        if isinstance(self.stack[-1], _Module):
            self.stack[-1].__dict__ = state  # other state is dropped: module versions in a state dict

    dispatch |= {
        pickle.SETITEM[0]: lambda self: self.set_items([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self.set_items(self.pop_mark()),
        pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build,
    }  # fmt: skip


def _script_tensors(root: _Module) -> dict[str, Tensor]:
    tensors, modules = {}, [("", root)]
    for prefix, module in modules:  # the list grows
        if len(modules) > MODULES or len(prefix) > NAME:
            raise CheckpointError("refused: its modules contain one another without end")
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _Module):
                modules.append((f"{prefix}{name}.", value))
    return tensors


def read_json(path: Path) -> dict:
    """Reads a JSON object; {} for no file or other content. Raises CheckpointError for no JSON, and DamagedFile."""
    check_manifest(path.parent, [path.name])
    try:
        values = parse_json(path) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    return values if isinstance(values, dict) else {}


HINTS = {  # how an unknown key begins -> what that means; the first that applies is reported
    r"(.*\.)?l0_module\.|image_encoder_without_ddp\.": "a pruned TinyCLIP 'auto' file, for a TinyCLIP-auto config",
    r"(.*\.)?visual\.trunk\.attn_pool\.": "its image tower is SigLIP's: name such a config",
    r"(.*\.)?visual\.trunk\.": "its image tower is from timm or transformers: name such a config",
    r"(.*\.)?visual\.layer1\.": "its image tower is a ModifiedResNet (RN50), the model's is not",
    r"(vision|text)_model\.": "a Hugging Face model with other towers than CLIPModel's (SigLIP: keep its config.json)",
    r"embeddings\.|encoder\.layers\.": "one tower alone, of a Hugging Face model; save the whole CLIPModel",
    r"logit_bias$": "it has the bias of SigLIP's loss, which this form cannot hold: OpenCLIP's and MiniCLIP's can",
}  # fmt: skip


def mismatch(problem: str, missing: Iterable[str], unknown: Iterable[str]) -> CheckpointError:
    """The error for weights that are not those of a layout, with a hint if one of HINTS applies."""
    found = ((hint, key) for start, hint in HINTS.items() for key in sorted(unknown) if re.match(start, key))
    hint = "".join(f": {hint} (it holds {key!r})" for hint, key in list(found)[:1])
    return CheckpointError(f"{problem}{hint}: missing {shorten(missing)}; unknown {shorten(unknown)}")
