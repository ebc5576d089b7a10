"""Downloads: the real client code against a local server that speaks the hub's file protocol. (The public hub itself is
never asked by the tests.)"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.utils.errors import InputError
from miniclip.utils.files import sha256
from miniclip.weights import hub as hub_module
from miniclip.weights.convert import convert
from tests.conftest import ROOT
from tests.weights.hub_server import HubServer

ONLINE = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def tiny(**more) -> MiniClip:
    """A model of 32 px with a vocabulary of CLIP's, and other means than OpenAI's."""
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 1}
    return MiniClip(MiniClipConfig.from_dict({
        "embed_dim": 8, "vision_cfg": sizes | {"image_size": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": sizes | {"context_length": 16, "heads": 1}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}, **more,
    })).eval()  # fmt: skip


@pytest.fixture(scope="module")
def repos(tmp_path_factory) -> Path:
    """Repositories with the same weights in each layout, and with files that nobody needs."""
    folder = tmp_path_factory.mktemp("repos")
    tiny(quick_gelu=True).save_pretrained(ours := folder / "org" / "ours")
    for layout in ("hf", "openclip"):
        convert(ours, folder / "org" / layout, layout)
        (folder / "org" / layout / "manifest.json").unlink()
    hf, weights = folder / "org" / "hf", load_file(folder / "org" / "hf" / "model.safetensors")
    torch.save({name: t + 1 for name, t in weights.items()}, hf / "pytorch_model.bin")  # what must not be taken
    for name in ("flax_model.msgpack", "tf_model.h5", "onnx/model.onnx", "README.md", "tokenizer.json"):
        (hf / name).parent.mkdir(exist_ok=True)
        (hf / name).write_bytes(b"not needed")
    shutil.copytree(hf, split := folder / "org" / "split")
    (split / "model.safetensors").unlink()
    table = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for part in set(table.values()):
        save_file({name: weights[name] for name in table if table[name] == part}, split / part, {"format": "pt"})
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    shutil.copytree(hf, binary := folder / "org" / "binary")
    (binary / "model.safetensors").unlink()
    torch.save(weights, binary / "pytorch_model.bin")
    # As timm's repositories are: the file with the usual name is the image tower alone.
    (folder / "org" / "openclip" / "config.json").write_text('{"architecture": "vit_base_patch32_clip_224"}')
    save_file({"cls_token": torch.zeros(1)}, folder / "org" / "openclip" / "model.safetensors")
    (folder / "org" / "empty").mkdir()
    (folder / "org" / "empty" / "README.md").write_text("soon")
    (folder / "org" / "naflex").mkdir()
    (folder / "org" / "naflex" / "config.json").write_text('{"model_type": "siglip2"}')
    (folder / "org" / "naflex" / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def server(repos):
    with HubServer(repos) as server:
        yield server


@pytest.fixture(scope="module")
def worker(server, tmp_path_factory):
    """Runs an expression in a process that has the local server for a hub: gives (result, error, messages)."""
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, **ONLINE, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_TOKEN": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.weights.hub_worker"], cwd=ROOT, text=True, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def run(code: str, **more: str):
        process.stdin.write(json.dumps([code, more]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline() or '[null, "the worker has died", []]')

    run.environment = environment
    yield run
    process.stdin.close()
    process.wait()


@pytest.fixture
def hub(server, worker):
    """The server, with no faults and an empty log."""
    server.gated.clear(), server.private.clear(), server.extra_names.clear()
    server.faults.clear(), server.log.clear()
    server.status = None
    return server


def fetched(hub: HubServer) -> set[str]:
    return {path.partition("/resolve/")[2].partition("/")[2] for _, path, _ in hub.requests("/resolve/")}


# ---- Repositories

FILES = {
    "ours": {"config.json", "manifest.json", "model.safetensors"},
    "openclip": {"config.json", "open_clip_config.json", "open_clip_model.safetensors"},
    "hf": {"config.json", "preprocessor_config.json", "model.safetensors"},
    "binary": {"config.json", "preprocessor_config.json", "pytorch_model.bin"},
    "split": {"config.json", "preprocessor_config.json", "model.safetensors.index.json",
              "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
}  # fmt: skip


@pytest.mark.parametrize("layout", FILES)
def test_each_layout_from_the_hub_and_from_a_folder(layout, hub, worker, repos, tmp_path):
    found, error, said = worker(f"load('hf-hub:org/{layout}', cache_dir={str(tmp_path)!r})")
    expected, _, _ = worker(f"load({str(repos / 'org' / 'ours')!r})")
    assert not error and not said
    assert found["weights"] == pytest.approx(expected["weights"], abs=1e-6)
    assert found["config"]["quick_gelu"] is True and found["images"] == [0.5, 0.5, 0.5]
    assert found["config"]["vision_cfg"] == expected["config"]["vision_cfg"]
    assert fetched(hub) == FILES[layout]  # and nothing else
    folder = repos / "org" / layout
    for name in (f"local-dir:{folder}", str(folder)):
        assert worker(f"load({name!r})")[0]["weights"] == found["weights"]
    hub.log.clear()
    offline = worker(f"load('hf-hub:org/{layout}', cache_dir={str(tmp_path)!r})", HF_HUB_OFFLINE="1")
    assert offline == [found, None, []] and not hub.log


def test_a_revision_and_a_newer_commit(hub, worker, repos, tmp_path):
    shutil.copytree(repos / "org" / "ours", folder := repos / "org" / "moving")
    try:
        load = f"load('hf-hub:org/moving{{}}', cache_dir={str(tmp_path)!r})['weights']['logit_scale']"
        first, commit = worker(load.format("")), hub.commit("org/moving")
        model = tiny(quick_gelu=True)
        model.logit_scale.data.fill_(1.5)
        model.save_pretrained(folder)
        assert worker(load.format("")) == [1.5, None, []] != first
        assert worker(load.format(f"@{commit}")) == first  # from the cache: the server has that commit no more
        _, error, _ = worker(load.format("@v9"))
        assert f"org/moving at revision v9: {hub.url}/org/moving has no branch, tag or commit 'v9'" in error
    finally:
        shutil.rmtree(folder)


def test_an_interrupted_download_continues(hub, worker, tmp_path):
    hub.faults["model.safetensors"] = ["cut"]
    found, error, _ = worker(f"load('hf-hub:org/ours', cache_dir={str(tmp_path)!r})")
    assert found and not error
    first, second = hub.requests("model.safetensors")
    half = (hub.folder / "org" / "ours" / "model.safetensors").stat().st_size // 2
    assert first[2] is None and second[2] == f"bytes={half - half % (1 << 16)}-"


def test_content_that_is_not_what_the_hub_announced_is_deleted(hub, worker, tmp_path):
    hub.faults["model.safetensors"] = ["changed"]
    load = f"load('hf-hub:org/ours', cache_dir={str(tmp_path)!r})"
    _, error, _ = worker(load)
    assert "model.safetensors of org/ours is not what the hub announced" in error and "try again" in error
    found, error, _ = worker(load)
    assert found and not error


@pytest.mark.parametrize("name, token, message", [
    ("org/none", "", "URL has no such repository, or it is private: check the name, or set HF_TOKEN"),
    ("org/private", "", "URL has no such repository, or it is private: check the name, or set HF_TOKEN"),
    ("org/gated", "", "it is gated: ask for access at URL/org/gated, then set HF_TOKEN, or run `hf auth login`"),
    ("org/gated", "hf_other", "it is gated: ask for access at URL/org/gated"),
    ("org/empty", "", "org/empty has no weights named model.safetensors, pytorch_model.bin"),
    ("org/naflex", "", "holds a model of type 'siglip2', and MiniCLIP has no such towers"),
    ("org/broken", "", "a file is missing there"),
    ("a/b/c", "", "'a/b/c' is not the name of a repository: write org/name"),
])  # fmt: skip
def test_a_repository_that_cannot_be_had(name, token, message, hub, worker, repos, tmp_path):
    hub.private, hub.gated, hub.extra_names = {"org/private"}, {"org/gated"}, {"org/broken": ["processor_config.json"]}
    load = f"load('hf-hub:{name}', cache_dir={str(tmp_path)!r})"
    for closed in ("private", "gated", "broken"):
        if not (repos / "org" / closed).exists():
            shutil.copytree(repos / "org" / "ours", repos / "org" / closed)
    found, error, _ = worker(load, HF_TOKEN=token)
    assert (
        found is None
        and message.replace("URL", hub.url) in error
        and name.rpartition("/")[2] in error
        and "\n" not in error
    )
    if name in hub.private | hub.gated:
        assert worker(load, HF_TOKEN=hub.token)[0]  # and its owner's token opens it


def test_without_a_connection(hub, worker, tmp_path):
    load = f"load('hf-hub:org/ours', cache_dir={str(tmp_path)!r})"
    _, error, _ = worker(load, HF_HUB_OFFLINE="1")
    assert "org/ours: HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or copy the cache" in error
    assert f"(the cache {tmp_path} has no copy of it)" in error and not hub.log
    found, _, _ = worker(load)
    assert worker(load, HF_HUB_OFFLINE="1") == [found, None, []]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    problem = "http://127.0.0.1:9 cannot be reached (ConnectError: [Errno 111] Connection refused)"
    problem += ": check the network, or set HF_ENDPOINT"
    again, error, said = worker(load, **nowhere)
    assert again == found and not error and said == [f"org/ours is taken from the cache: {problem} to a mirror"]
    hub.status = 503
    again, error, said = worker(load)
    assert again == found and said == [f"org/ours is taken from the cache: {hub.url} answered 503: try again later"]
    hub.status = None
    convert = ["miniclip/__main__.py", "convert", "hf-hub:org/ours", str(tmp_path / "x.pt"), "--to", "openclip"]
    (code, out), _, _ = worker(f"script(*{convert!r})", **nowhere)
    line = f"miniclip convert: repository org/ours: {problem} to a mirror (the cache HUB has no copy of it)"
    assert code == 1 and out.strip() == line.replace("HUB", worker.environment["HF_HOME"] + "/hub")
    (code, out), _, _ = worker(f"script(*{convert!r})")
    assert code == 0 and (tmp_path / "x.pt").is_file(), out


def test_names_that_lead_out_of_the_cache_are_not_asked_for(hub, worker, tmp_path):
    hub.extra_names["org/ours"] = ["tokenizer/../../../evil", "tokenizer/.evil", "../config.json", "/etc/passwd",
                                   "x/model-00001-of-00001.safetensors", "tokenizer\\..\\evil"]  # fmt: skip
    found, error, _ = worker(f"load('hf-hub:org/ours', cache_dir={str(tmp_path)!r})")
    assert found and not error and fetched(hub) == FILES["ours"]


def test_a_tag_from_the_hub_or_else_from_its_address(hub, worker, repos, tmp_path):
    """`shapes-demo` with weights that were trained with QuickGELU and other means than the config says."""
    config = MiniClipConfig.from_name("shapes-demo")
    MiniClip(config).save_pretrained(tmp_path / "demo")
    convert(tmp_path / "demo", repos / "org" / "tagged" / "open_clip_model.safetensors", "openclip")
    file = repos / "org" / "tagged" / "open_clip_model.safetensors"
    facts = {"hf_hub": "org/tagged/", "url": f"{hub.url}/plain/org/tagged/{file.name}", "sha256": sha256(file)[:8]}
    facts |= {"size": None, "quick_gelu": True, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    facts["interpolation"] = "bicubic"
    worker(f"pretrained.registry()[0].update({{'shapes-demo': {{'some_tag': {facts!r}}}}})")
    load = "load('shapes-demo', 'Some-Tag', cache_dir=%r)"
    found, error, said = worker(load % str(tmp_path / "a"))
    assert not error and found["images"] == [0.5] * 3 and fetched(hub) == {file.name}
    assert found["config"]["quick_gelu"] is True and found["config"]["preprocess_cfg"]["resize_mode"] == "squash"
    assert len(said) == 1 and "shapes-demo Some-Tag: as these weights were trained, with QuickGELU, mean" in said[0]
    hub.gated.add("org/tagged")  # then from the address
    again, error, said = worker(load % str(tmp_path / "b"))
    assert again == found and not error and "it is gated" in said[0] and "The other source is tried" in said[0]
    facts["sha256"] = "0" * 8
    worker(f"pretrained.registry()[0].update({{'shapes-demo': {{'some_tag': {facts!r}}}}})")
    _, error, _ = worker(load % str(tmp_path / "c"))
    assert "it is gated" in error and "is not the published file (its sha256 is" in error


def test_train_and_evaluate_take_names(hub, worker, caption_set, tmp_path):
    """As a user would, in processes of their own."""
    data = str(caption_set / "captions.json")
    train = ["train.py", "--model", "hf-hub:org/hf", "--train_file", data, "--max_steps", "1", "--eval_strategy", "no",
             "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    (code, out), _, _ = worker(f"script(*{train!r})")
    assert code == 0 and "hf-hub:org/hf: 0.8M parameters" in out, out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["learning_rate"] == 1e-5
    evaluate = ["evaluate.py", "--model", "hf-hub:org/hf", str(tmp_path / "run"), "--eval_file", data]
    (code, out), _, _ = worker(f"script(*{evaluate!r}, '--output_file', {str(tmp_path / 'found.json')!r})")
    found = (tmp_path / "found.json").read_text()
    assert code == 0 and sha256(hub.folder / "org" / "hf" / "model.safetensors") in found, out


# ---- Plain addresses


@pytest.fixture
def plain(hub, monkeypatch, tmp_path):
    """Downloads a file of 1 MB: gives the function, and its expected content."""
    monkeypatch.setattr(hub_module, "offline", lambda: False)
    monkeypatch.setattr(hub_module, "WAIT", 0.01)
    content = torch.randint(256, (1 << 20,), dtype=torch.uint8).numpy().tobytes()
    (hub.folder / "file.pt").write_bytes(content)

    published = sha256(hub.folder / "file.pt")

    def download(name="file.pt", digest=published, size=1 << 20) -> bytes:
        return hub_module.download_url(f"{hub.url}/plain/{name}", digest, size, tmp_path).read_bytes()

    return download, content


HALF = f"bytes={1 << 19}-"


@pytest.mark.parametrize("faults, ranges", [
    ([], [None]),
    (["cut"], [None, HALF]),
    (["cut", "cut", 503], [None, HALF, f"bytes={(1 << 19) + (1 << 18)}-", f"bytes={(1 << 19) + (1 << 18)}-"]),
    (["cut", "whole"], [None, HALF]),  # a server that ignores Range sends all of it
    ([500, 429], [None] * 3),
])  # fmt: skip
def test_a_plain_file_is_continued_where_it_broke(faults, ranges, hub, plain, tmp_path):
    download, content = plain
    hub.faults["file.pt"] = list(faults)
    assert download() == content
    assert [one[2] for one in hub.requests("file.pt")] == ranges
    assert download() == content and len(hub.requests("file.pt")) == len(ranges)  # from the cache
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".lock", "file.pt"]


def test_a_file_that_has_changed_meanwhile_is_not_glued_together(hub, plain):
    download, content = plain
    hub.faults["file.pt"] = ["cut"] + [500] * 5
    with pytest.raises(InputError, match="the server answered 500.*524288 bytes are kept, and the next try continues"):
        download()
    (hub.folder / "file.pt").write_bytes(new := content[::-1])
    assert download(digest="") == new
    assert hub.requests("file.pt")[-1][2] == HALF  # it was asked for, and If-Range refused it


@pytest.mark.parametrize("wrong, message", [
    ({"digest": "0123abcd"}, "is not the published file .its sha256 is .* not 0123abcd.*was deleted"),
    ({"size": 5}, "is not the published file: it has 1048576 bytes, not 5. It was deleted"),
    ({"name": "none.pt"}, "none.pt cannot be downloaded: the server answered 404"),
])  # fmt: skip
def test_another_file_than_the_published_one(wrong, message, plain, tmp_path):
    download, content = plain
    with pytest.raises(InputError, match=message):
        download(**wrong)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(("file", "none"))]
    assert download() == content


def test_addresses_and_the_offline_flag(plain, monkeypatch, tmp_path):
    for url in ("file:///etc/passwd", "ftp://x/y.pt", "https://example.org/"):
        with pytest.raises(InputError, match="not the http or https address of a file"):
            hub_module.download_url(url, cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"127.0.0.1:9/x.pt cannot be downloaded \(.*refused.*check the network"):
        hub_module.download_url("http://127.0.0.1:9/x.pt", cache_dir=tmp_path)
    monkeypatch.setattr(hub_module, "offline", lambda: True)
    with pytest.raises(InputError, match="is not in the cache .* and HF_HUB_OFFLINE is set"):
        plain[0]()


def test_a_killed_download_is_continued_and_two_processes_share_one(hub, plain, tmp_path):
    _, content = plain
    hub.faults["file.pt"] = ["stall"]
    start = multiprocessing.get_context("fork").Process
    download = {
        "target": hub_module.download_url,
        "args": (f"{hub.url}/plain/file.pt",),
        "kwargs": {"cache_dir": tmp_path},
    }
    (first := start(**download)).start()
    deadline = time.monotonic() + 60
    while not [p for p in tmp_path.rglob("*.incomplete") if p.stat().st_size] and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.join()
    hub.stalled.set()
    (kept,) = (path.stat().st_size for path in tmp_path.rglob("*.incomplete"))
    both = [start(**download), start(**download)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0] and next(tmp_path.rglob("file.pt")).read_bytes() == content
    assert [one[2] for one in hub.requests("file.pt")] == [None, f"bytes={kept}-"]
