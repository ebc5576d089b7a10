"""Weight files that somebody made to harm, or that were damaged on the way: nothing in them is run, none takes the
memory away, none crashes Python. Each loads or raises InputError, with its name."""

import io
import json
import os
import pickle
import random
import re
import resource
import socket
import struct
import sys
import threading
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from miniclip.checkpoint import from_miniclip
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import DamagedFile
from miniclip.utils.weight_files import read_state_dict
from miniclip.weights.convert import convert
from miniclip.weights.load import load_weights, open_checkpoint
from tests.core.test_checkpoint import Branch, assert_equal

CONFIG = {
    "embed_dim": 4,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 8, "head_width": 4, "patch_size": 4},
    "text_cfg": {"context_length": 5, "vocab_size": 12, "width": 8, "heads": 2, "layers": 1},
}
SPACE = 256 << 20  # bytes that reading a small file may take: the allocator takes more than it needs


def small() -> MiniClip:
    torch.manual_seed(0)
    return MiniClip(MiniClipConfig.from_dict(CONFIG)).eval()


WEIGHTS = from_miniclip(small().state_dict(), "openclip")
EVENTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "subprocess.Popen",
          "socket.connect", "shutil.rmtree", "pickle.find_class")  # fmt: skip
watch = threading.local()
sys.addaudithook(lambda event, _: watch.seen.append(event) if event in EVENTS and hasattr(watch, "seen") else None)


@contextmanager
def guarded():
    """Inside, little memory can be had, and nothing may be run: neither a program nor the lookup that comes first."""
    watch.seen, limits = [], resource.getrlimit(resource.RLIMIT_AS)
    if Path("/proc/self/statm").is_file():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + SPACE, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        seen = watch.seen
        del watch.seen
    assert not seen


def refusal(path: Path) -> str:
    """Why a file is refused, which it has to be: by its name, and not because it took too much memory."""
    with guarded(), pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert str(path) in message and len(message) < 2500
    assert "MemoryError" not in message and "allocate" not in message, message
    return message


def to_bytes(content, **how) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def to_script(weights: dict) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Branch(weights)), file)
    return file.getvalue()


def archive(members: dict | list, how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how, compresslevel=1) as written, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of two members of one name
        for name, content in members.items() if isinstance(members, dict) else members:
            written.writestr(name, content)
    return file.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as read:
        return {name: read.read(name) for name in read.namelist()}


def pickled(data: bytes, change) -> bytes:
    """An archive of torch whose pickle was changed, with all checksums right."""
    return archive({name: change(c) if name.endswith("data.pkl") else c for name, c in members(data).items()})


def changed(old: bytes, new: bytes):
    """A function that replaces bytes that must be there."""

    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new)

    return change


def header(entries: dict | str, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = entries.encode() if isinstance(entries, str) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


LEGACY = {"_use_new_zipfile_serialization": False}
FORMATS = {
    "safetensors": save(WEIGHTS),
    "hf": save(from_miniclip(small().state_dict(), "hf"), {"format": "pt"}),
    "zip": to_bytes({"epoch": 1, "state_dict": WEIGHTS, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}}),
    "legacy": to_bytes(WEIGHTS, **LEGACY),
    "script": to_script({k: t.half() for k, t in WEIGHTS.items()} | {"input_resolution": torch.tensor(8)}),
}


def around(kind: str, content: bytes) -> bytes:
    """A file whose pickle is another one."""
    if kind == "bare":
        return content
    if kind == "legacy":  # behind its magic number, its version and the sizes of numbers
        return FORMATS["legacy"][:137] + content + FORMATS["legacy"][137:]
    return pickled(FORMATS[kind], lambda _: content)


# ---- What is there to be run


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trap: Path):
        self.trap = trap

    def __reduce__(self):
        return os.system, (f"touch '{self.trap}'",)


def calls(trap: Path) -> dict[str, bytes]:
    """Pickles that do so, each by other means."""
    command = f"touch '{trap}'".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    python = f"open({str(trap)!r}, 'w')".encode()
    return {
        **{f"reduce{protocol}": pickle.dumps(Evil(trap), protocol) for protocol in range(6)},
        "global": b"\x80\x02cos\nsystem\n" + text + b"\x85R.",
        "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text + b"\x85R.",
        "inst": b"\x80\x02(S'" + command.replace(b"'", b"\\'") + b"'\nios\nsystem\n.",
        "obj": b"\x80\x02(cos\nsystem\n" + text + b"o.",
        "newobj": b"\x80\x02cos\nsystem\n" + text + b"\x85\x81.",
        "eval": b"\x80\x02cbuiltins\neval\nX" + struct.pack("<I", len(python)) + python + b"\x85R.",
        "build": b"\x80\x02c__torch__\nM\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb" + text + b"b.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\ncos\nX\x06\x00\x00\x00system\x86R" + text + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93" + text + b"\x85R.",
    }


def test_nothing_that_a_pickle_asks_for_is_run(tmp_path):
    trap, tried = tmp_path / "trap", 0
    for name, call in calls(trap).items():
        body = call.removesuffix(b".")
        at = 2 if body[:1] == b"\x80" else 0
        nested = b"\x80\x02}X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00w" + body[at:] + b"ss."
        for label, content in ((name, call), (f"{name} nested", nested)):
            for kind in ("zip", "script", "legacy", "bare"):
                path = tmp_path / f"{label} {kind}.pt"
                path.write_bytes(around(kind, content))
                refusal(path)
                tried += 1
    torch.save({"state": {0: {"exp_avg": Evil(trap)}}, "param_groups": []}, tmp_path / "optimizer.pt")
    assert "it asks for posix.system, and a pickle that may do so can run any program" in refusal(
        tmp_path / "optimizer.pt"
    )
    # What a TorchScript archive has besides its tensors is not even looked at.
    script = {
        n: calls(trap)["global"] if n.endswith("constants.pkl") else c for n, c in members(FORMATS["script"]).items()
    }
    (tmp_path / "constants.pt").write_bytes(archive(script))
    with guarded():
        read_state_dict(tmp_path / "constants.pt")
    assert tried == 120 and not trap.exists()
    pickle.loads(calls(trap)["stack_global"])
    assert trap.exists()  # it would have worked


# ---- What the sizes in a file make believe


def test_archives_that_are_not_what_they_seem(tmp_path):
    plain = members(to_bytes(WEIGHTS))
    assert all(name.startswith("archive/") for name in plain)
    bomb = archive({**plain, "archive/data/bomb": bytes(64 << 20)}, zipfile.ZIP_DEFLATED)
    small_bomb = bytearray(archive({**plain, "archive/data.pkl": bytes(1 << 20)}, zipfile.ZIP_DEFLATED))
    for name, data, reason in (
        ("twice", archive([*plain.items(), ("archive/data.pkl", b"\x80\x02}.")]), "two members .* same name"),
        ("bomb", bomb, "unpacked, the archive would be far larger"),
        ("other", archive(plain, zipfile.ZIP_LZMA), "unpacked, the archive would be far larger"),
        ("outside", archive({**plain, "../x": b""}), r"\.\./x in the archive is outside"),
        ("upwards", archive({**plain, "archive/../../x": b""}), "is outside"),
        ("absolute", archive({**plain, "/etc/x": b""}), "is outside"),
        ("photos", archive({"photos/1.jpg": b"", "photos/2.jpg": b""}), "not torch's"),
        ("names", archive({**plain, "archive/data.pkl": bytes(5 << 20)}), "longer than any model's"),
        ("zeros", bytes(small_bomb), "damaged"),
        ("order", archive({**plain, "archive/byteorder": b"big"}), "big-endian"),
        ("missing", archive({n: c for n, c in plain.items() if not n.endswith("data/3")}), "damaged.*data/3"),
        ("short", archive({n: c[:-4] if n.endswith("data/3") else c for n, c in plain.items()}), "damaged.*storage"),
        ("odd", archive({n: c[:-3] if n.endswith("data/3") else c for n, c in plain.items()}), "damaged"),
    ):
        (tmp_path / name).write_bytes(data)
        assert re.search(reason, refusal(tmp_path / name)), (name, refusal(tmp_path / name))
    # A member that says it is small and unpacks to 600 MB: no more is unpacked than it says.
    data = archive({**plain, "archive/data/0": bytes(600 << 20)}, zipfile.ZIP_DEFLATED)
    data = data.replace(struct.pack("<I", 600 << 20), struct.pack("<I", 64))
    (tmp_path / "liar").write_bytes(data)
    assert "damaged" in refusal(tmp_path / "liar")
    # Compressed by somebody, but honest: it loads.
    (tmp_path / "honest").write_bytes(archive(plain, zipfile.ZIP_DEFLATED))
    assert_equal(read_state_dict(tmp_path / "honest"), WEIGHTS)


def test_safetensors_headers_that_lie(tmp_path):
    def entry(start, stop, shape=None, dtype="F32"):
        return {
            "dtype": dtype,
            "shape": [(stop - start) // 4] if shape is None else shape,
            "data_offsets": [start, stop],
        }

    one = json.dumps(entry(0, 16))
    for name, data, reason in (
        ("huge", header({"w": entry(0, 16)}, length=1 << 47), "a header of 140737488355328 bytes"),
        ("long", header({"w": entry(0, 16)}, length=10**6), "a header of 1000000 bytes"),
        ("spaces", header(json.dumps({"w": entry(0, 16)}) + " " * (5 << 20)), "a header of"),
        ("twice", header(f'{{"w": {one}, "w": {one}}}'), "its header repeats a name"),
        (
            "twice within",
            header('{"w": {"dtype": "F32", "dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}'),
            "repeats a name",
        ),
        ("overlap", header({"v": entry(0, 12), "w": entry(8, 16)}), "w overlaps another"),
        ("same bytes", header({"v": entry(0, 16), "w": entry(0, 16)}), "overlaps"),
        ("gap", header({"v": entry(0, 4), "w": entry(8, 16)}), "leaves a gap"),
        ("backwards", header({"w": entry(16, 0, [4])}), "overlaps|gap"),
        ("beyond", header({"w": entry(0, 10**12)}), "truncated: .* bytes instead of 1000000"),
        ("behind", header({"w": entry(0, 16)}, bytes(20)), "truncated"),
        ("shape", header({"w": entry(0, 16, [10**6, 10**6])}), "damaged"),
        ("shape overflows", header({"w": entry(0, 16, [2**33, 2**33])}), "damaged"),
        ("negative", header({"w": entry(0, 16, [-4])}), "damaged"),
        ("type", header({"w": entry(0, 16, dtype="F33")}), "damaged"),
        ("nested", header("{" + '"w": [' + "[" * 100_000), "damaged"),
        ("list", header(f"{{}}{one}"), "damaged"),
        ("empty", header({}, b""), "no state dict"),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        assert re.search(reason, refusal(path)), (name, refusal(path))
    (tmp_path / "good.safetensors").write_bytes(header({"w": entry(0, 16)}))
    assert torch.equal(read_state_dict(tmp_path / "good.safetensors")["w"], torch.zeros(4))


def test_sizes_that_a_pickle_claims_are_not_believed(tmp_path):
    trillion = b"\x8a\x06" + (10**12).to_bytes(6, "little")
    w = {"w": torch.arange(7.0)}
    path = tmp_path / "x.pt"
    for data, insert in ((to_bytes(w), pickled), (to_bytes(w, **LEGACY), lambda data, change: change(data))):
        # The number of elements that a storage is said to have allots nothing: the tensor is what is there.
        old = b"X\x03\x00\x00\x00cpuq\x06K\x07"
        path.write_bytes(insert(data, changed(old, old[:-2] + trillion)))
        with guarded():
            assert torch.equal(read_state_dict(path)["w"], w["w"])
        for size in (b"K\x08", trillion, b"J\xff\xff\xff\xff"):  # a tensor longer than its storage
            path.write_bytes(insert(data, changed(b"K\x00K\x07\x85", b"K\x00" + size + b"\x85")))
            assert "damaged" in refusal(path)
        for offset in (b"K\x01", trillion, b"J\xff\xff\xff\xff"):  # one that begins behind it, or before
            path.write_bytes(insert(data, changed(b"K\x00K\x07\x85", offset + b"K\x07\x85")))
            assert "damaged" in refusal(path)
        for stride in (b"K\x02", trillion, b"J\xff\xff\xff\xff"):
            path.write_bytes(insert(data, changed(b"K\x01\x85", stride + b"\x85")))
            assert "damaged" in refusal(path)
        # All its numbers the same one: a trillion of them are in the file's few bytes.
        path.write_bytes(
            insert(data, lambda d: changed(b"K\x07\x85", trillion + b"\x85")(changed(b"K\x01\x85", b"K\x00\x85")(d)))
        )
        assert "together are far larger than the file" in refusal(path)
    count = len(data) - 28 - 8
    for number in (8, 10**12, 2**64 - 1):  # behind the pickles of the old format, before the numbers
        path.write_bytes(data[:count] + struct.pack("<Q", number) + data[count + 8 :])
        assert "goes beyond its end" in refusal(path)
    # A thousand names for one large tensor.
    shared = torch.zeros(1 << 18)
    torch.save({str(i): shared for i in range(1000)}, path)
    assert "together are far larger" in refusal(path)


def test_pickles_that_ask_for_memory(tmp_path):
    for number, body in enumerate((
        b"}r\xff\xff\xff\x7f.",  # remembered as number two billion
        b"cbuiltins\nbytearray\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R.",
        b"ctorch\nFloatTensor\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R.",
        b"X\xff\xff\xff\xffabc",
        b"\x8e" + struct.pack("<Q", 1 << 60) + b"abc",
        b"\x96" + struct.pack("<Q", 1 << 40) + b"abc",
        b"(" * (1 << 18) + b".",
        b"c__torch__\nM\n" + b")\x81" * 2,
        b"c_codecs\nencode\nX\x04\x00\x00\x00abcdX\x03\x00\x00\x00hex" + b"\x86R.",
    )):  # fmt: skip
        for kind in ("zip", "script", "legacy"):
            path = tmp_path / f"{number} {kind}.pt"
            path.write_bytes(around(kind, b"\x80\x02" + body))
            refusal(path)


# ---- What has no end


def test_things_within_things(tmp_path):
    deep = 300_000

    def text(word: str) -> bytes:
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    for name, body, reason in (
        ("key", b"}" + b")" + b"\x85" * deep + b"K\x01s.", "names nor numbers"),
        ("tuples", b"}" + text("w") + b")" + b"\x85" * deep + b"s.", "no state dict"),
        ("lists", b"]" * deep + b"a" * (deep - 1) + b".", "no state dict"),
        ("name", b"}" + text("name") + b"]" * deep + b"a" * (deep - 1) + b"s.", "no state dict"),
        ("itself", b"}q\x00" + text("model") + b"h\x00s.", "no state dict"),
        ("storage", b"}" + text("w") + b"(" + text("storage") + b"ctorch\nFloatStorage\n)" + b"\x85" * deep
         + text("cpu") + b"K\x01tQs.", "refused"),
        ("long", b"}" + text("w" * 2000) + b"K\x01s.", "no state dict"),
    ):  # fmt: skip
        path = tmp_path / f"{name}.pt"
        path.write_bytes(around("zip", b"\x80\x02" + body))
        assert reason in refusal(path), (name, refusal(path))
    module, doubled = b"c__torch__\nM\n)\x81", b""
    for i in range(60):  # each holds the one before twice: 2 ** 60 paths lead to the first
        inner = b"}(" + text("a") + b"h" + bytes([i]) + text("b") + b"h" + bytes([i]) + b"ub" if i else b""
        doubled += module + inner + b"q" + bytes([i + 1])
    for name, body, reason in (
        ("ring", module + b"q\x00}" + text("a") + b"h\x00sb.", "contain one another without end"),
        ("doubled", doubled + b".", "contain one another without end"),
        ("state", module + b"K\x01b.", "damaged"),
        ("no module", b"}.", "damaged"),
    ):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(around("script", b"\x80\x02" + body))
        assert reason in refusal(path), (name, refusal(path))


# ---- Tensors and files of other kinds


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_tensors_without_plain_floats(tmp_path):
    numbers = torch.arange(4.0)
    for tensor in (
        torch.quantize_per_tensor(numbers, 0.1, 0, torch.qint8),
        numbers.to_sparse(),
        torch.zeros(2, device="meta"),
        torch._neg_view(numbers),
        torch.zeros(2, dtype=torch.uint16),
    ):
        torch.save({"w": tensor}, tmp_path / "x.pt")
        assert "refused: it contains tensors that are" in refusal(tmp_path / "x.pt")
    for kind in (torch.int32, torch.int8, torch.bool, torch.complex64):  # they are read, and are no model's weights
        torch.save(WEIGHTS | {"ln_final.bias": torch.ones(8, dtype=kind)}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="integers, infinite.*text.ln_final.bias"):
            load_weights(small(), tmp_path / "x.pt")
    for name, shape in (("ln_final.bias", (2, 4)), ("positional_embedding", (40,)), ("visual.conv1.weight", (8, 48)),
                        ("token_embedding.weight", (0, 8)), ("logit_scale", (3,)), ("visual.proj", (32,))):  # fmt: skip
        torch.save(WEIGHTS | {name: torch.ones(shape)}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="shapes that no CLIP model has|only supported on matrices"):
            load_weights(small(), tmp_path / "x.pt")
    small().save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file(weights | {"text.ln_final.bias": torch.ones(8, dtype=torch.int32)}, tmp_path / "model/model.safetensors")
    (tmp_path / "model" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="text.ln_final.bias is torch.int32, not torch.float32"):
        MiniClip.from_pretrained(tmp_path / "model")


@pytest.mark.skipif(os.name == "nt", reason="pipes there are no files")
def test_what_is_no_file_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.safetensors")
    monkeypatch.chdir(tmp_path)  # the paths of sockets are short
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket.pt")
    (tmp_path / "folder.safetensors").mkdir()
    for path in ("pipe.safetensors", "socket.pt", "/dev/zero"):
        assert "is a pipe, a socket or a device" in refusal(Path(path))
    server.close()
    assert "is a folder" in refusal(tmp_path / "folder.safetensors")
    os.symlink("loop.pt", "loop.pt")
    with pytest.raises(OSError, match="loop.pt"):
        read_state_dict("loop.pt")
    Path("mine.pt").write_bytes(FORMATS["zip"])
    Path("mine.pt").chmod(0)
    if not os.access("mine.pt", os.R_OK):  # root may read everything
        assert "is not readable by this user" in refusal(Path("mine.pt"))


# ---- What has changed since it was saved


def test_each_changed_byte_of_a_saved_folder_is_found(tmp_path):
    small().save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "hf", "hf")
    tried = 0
    for folder, read in (
        (tmp_path / "model", MiniClip.from_pretrained),
        (tmp_path / "model", lambda folder: load_weights(small(), folder / "model.safetensors")),
        (tmp_path / "hf", lambda folder: convert(folder, tmp_path / "out", "miniclip", force=True)),
    ):
        for name in ("config.json", "model.safetensors"):
            whole = (folder / name).read_bytes()
            for at in [*range(0, 20), *range(20, len(whole), len(whole) // 30), len(whole) - 1]:
                broken = bytearray(whole)
                broken[at] ^= 1 << at % 8
                (folder / name).write_bytes(broken)
                with pytest.raises(DamagedFile, match=f"{name} is not what was saved"):
                    read(folder)
                tried += 1
            (folder / name).write_bytes(whole)
        read(folder)  # all is as it was
    assert tried > 300
    (tmp_path / "model" / "manifest.json").write_text("{")
    with pytest.raises(DamagedFile, match="not a valid manifest"):
        MiniClip.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    assert_equal(MiniClip.from_pretrained(tmp_path / "model").state_dict(), small().state_dict())


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a system that can refuse large files")
def test_a_disk_that_is_full_leaves_what_was_there(tmp_path):
    """Files may not grow beyond a size, as on a full disk: the old model stays, with its manifest, or there is none."""
    small().save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    other, size = small(), len(before["model.safetensors"])
    other.load_state_dict({name: t + 1 for name, t in other.state_dict().items()})
    other.config.quick_gelu = True
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 100, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            for folder in ("model", "new"):
                with pytest.raises(Exception, match="large|space|os error"):
                    other.save_pretrained(tmp_path / folder)
            for name, to in (("x.safetensors", "openclip"), ("x.pt", "openclip"), ("hf", "hf")):
                with pytest.raises(Exception, match="."):
                    convert(tmp_path / "model", tmp_path / name, to)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]
        assert not list((tmp_path / "new").iterdir())
    other.save_pretrained(tmp_path / "model")
    assert MiniClip.from_pretrained(tmp_path / "model").config.quick_gelu


# ---- Damage of all kinds


def test_files_cut_anywhere_are_refused(tmp_path):
    for name, data in FORMATS.items():
        (tmp_path / name).write_bytes(data)
        assert len(read_state_dict(tmp_path / name)) >= len(WEIGHTS)
        for length in [*range(1, 20), *range(20, len(data), len(data) // 30), len(data) - 1]:
            (tmp_path / name).write_bytes(data[:length])
            refusal(tmp_path / name)


PLACE = st.integers(-400, 1 << 16)  # from the end or from the start, where sizes and names are
MUTATION = st.tuples(
    st.sampled_from(["flip", "number", "cut", "drop", "insert", "double", "swap"]),
    PLACE, PLACE, st.integers(1, 64), st.one_of(st.integers(0, 255), st.integers(0, 2**64 - 1)),
)  # fmt: skip


def mutate(data: bytes, mutations: list[tuple]) -> bytes:
    for kind, at, other, length, number in mutations:
        at, other = at % max(1, len(data)), other % max(1, len(data))
        piece, rest = data[other : other + length], data[at + length :]
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << number % 8]) + data[at + 1 :]
        elif kind == "number":
            width = 8 if number > 255 else 1
            data = data[:at] + number.to_bytes(width, "little") + data[at + width :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + rest
        elif kind == "insert":
            data = data[:at] + random.Random(number).randbytes(length) + data[at:]
        elif kind == "double":
            data = data[:at] + piece + data[at:]
        elif kind == "swap" and at + length <= other:
            data = data[:at] + piece + data[at + length : other] + data[at : at + length] + data[other + length :]
    return data


def mutants(name: str, where: str, mutations: list[tuple]) -> bytes:
    """A file of a format, changed: anywhere, or only its pickle or header, checksums and lengths made right."""
    data = FORMATS[name]
    if where == "anywhere":
        return mutate(data, mutations)
    if name in ("zip", "script"):
        return pickled(data, lambda content: mutate(content, mutations))
    start = 8 if name in ("safetensors", "hf") else 137
    end = 8 + int.from_bytes(data[:8], "little") if start == 8 else data.index(b"\x80\x02]")
    text = mutate(data[start:end], mutations)
    return (struct.pack("<Q", len(text)) if start == 8 else data[:start]) + text + data[end:]


counts = {"loaded": 0, "refused": 0, "fits": 0}


def survives(path: Path, data: bytes):
    """A file that is what it is: it loads, strictly, or InputError is raised, and nothing else happens."""
    path.write_bytes(data)
    model = small()
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    with guarded(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of positions that are resized
        try:
            weights = read_state_dict(path)
            assert all(type(name) is str and type(t) is torch.Tensor for name, t in weights.items())
            counts["loaded"] += 1
            load_weights(model, path)
            counts["fits"] += 1
            assert open_checkpoint(path).weights.keys() == shapes.keys()
        except InputError as error:
            assert "MemoryError" not in str(error) and "allocate" not in str(error)
            counts["refused"] += 1
    state = model.state_dict()
    assert all(t.isfinite().all() for t in state.values())
    assert {name: t.shape for name, t in state.items()} == shapes


FUZZ = dict(
    derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
ANY = given(
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from(["anywhere", "inside"]),
    st.lists(MUTATION, min_size=1, max_size=3),
)


@settings(max_examples=400, **FUZZ)
@ANY
def test_damaged_files_load_or_are_refused(tmp_path, name, where, mutations):
    survives(tmp_path / "x", mutants(name, where, mutations))


@pytest.mark.slow
def test_many_damaged_files(tmp_path, capsys):
    counts.update(dict.fromkeys(counts, 0))

    @settings(max_examples=20_000, **FUZZ)
    @ANY
    def many(name, where, mutations):
        survives(tmp_path / "x", mutants(name, where, mutations))

    many()
    with capsys.disabled():
        print(f"\ndamaged files: {counts}")
    assert counts["refused"] + counts["fits"] > 15_000 and counts["fits"] > 100
