"""What the tests share: a tiny model, a tiny caption set, and the way to Flickr8k where it is."""

import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # CPU only: scripts run in forks, which CUDA does not survive
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish():
    gc.freeze()  # what all tests share: each collection that transformers asks for would look through it


@pytest.fixture
def flickr8k() -> Path:
    """The folder with Flickr8k's caption files and images, in the form published with the MiniClip article."""
    folder = Path(os.environ.get("MINICLIP_FLICKR8K", ROOT.parent / "shared" / "flickr8k"))
    if not (folder / "en_val.json").is_file():
        pytest.skip("Flickr8k is not here: set MINICLIP_FLICKR8K to the folder with en_val.json")
    return folder


@pytest.fixture
def tiny_config():
    """A model small enough to train in a test: 32 px, width 32, two blocks each."""
    from miniclip.config import MiniClipConfig

    return MiniClipConfig.from_dict({
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    })  # fmt: skip


@pytest.fixture
def tiny_model(tiny_config):
    from miniclip.model import MiniClip

    torch.manual_seed(0)
    return MiniClip(tiny_config).eval()


COLORS = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange", "pink", "brown", "gray", "cyan"]


@pytest.fixture
def caption_set(tmp_path) -> Path:
    """24 plain images in 12 colours and two heights, with two captions each: captions.json and the files."""
    records = []
    for i, color in enumerate(COLORS * 2):
        shape = "tall" if i < len(COLORS) else "wide"
        size = (30, 50) if shape == "tall" else (50, 30)
        image = Image.new("RGB", size, "gray" if color != "gray" else "lightgray")
        image.paste(Image.new("RGB", (size[0] // 2, size[1] // 2), color), (size[0] // 4, size[1] // 4))
        image.save(tmp_path / f"{i}.png")
        records.append({"image": f"{i}.png", "caption": [f"a {shape} {color} sheet", f"{color} paper, {shape}"]})
    (tmp_path / "captions.json").write_text(json.dumps(records))
    return tmp_path


@pytest.fixture(scope="session")
def forge():
    """Runs train.py and evaluate.py as `forge.py` does; gives exit status, stdout and stderr."""
    import subprocess

    server = None

    def run(argv: list[str], timeout: float, processes: int = 1, env: dict | None = None):
        nonlocal server
        if server is None or server.poll() is not None:
            server = subprocess.Popen(
                [sys.executable, ROOT / "tests" / "forge.py"], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        server.stdin.write(json.dumps([argv, timeout, processes, env or {}]) + "\n")
        server.stdin.flush()
        code, out, err = json.loads(server.stdout.readline())
        assert code is not None, f"{argv} took more than {timeout} seconds\n{out[-3000:]}\n{err[-3000:]}"
        return subprocess.CompletedProcess(argv, code, out, err)

    yield run
    if server is not None:
        server.stdin.close()
        server.wait()


@pytest.fixture
def run_script(forge):
    """Runs a script of the project as a user would, in a process of its own; gives the finished process. Several
    `processes` are one run, as if torchrun had started them."""
    import subprocess

    def run(*argv, check=True, timeout=600, env=None, processes=1):
        argv = list(map(str, argv))
        if argv[:2] == ["-m", "miniclip"] and not env:
            done = forge(["miniclip/__main__.py", *argv[2:]], timeout, processes)
        elif (argv[0] in ("train.py", "evaluate.py") or argv[0].startswith("tests/")) and not env:
            done = forge(argv, timeout, processes)
        else:
            done = subprocess.run(
                [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            )  # fmt: skip
        assert not check or done.returncode == 0, f"{argv}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    return run


@pytest.fixture
def shut_folder(monkeypatch):
    """Makes a folder, by its name, one that must not be looked into, as root, who may run the tests, could."""

    def shut(name: str):
        def scandir(path, look=os.scandir):
            if isinstance(path, str) and os.path.basename(path) == name:
                raise PermissionError(13, "Permission denied", path)
            return look(path)

        monkeypatch.setattr(os, "scandir", scandir)

    return shut
