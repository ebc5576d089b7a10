"""Does a model that is pushed to the hub load from there, and does nothing else go along?"""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

import miniclip
from miniclip.model import MiniClip
from miniclip.utils.errors import InputError
from miniclip.utils.files import sha256
from miniclip.weights.card import write_card
from tests.conftest import ROOT
from tests.weights.push_server import PushServer


@pytest.fixture
def hub(tmp_path):
    with PushServer(tmp_path / "hub") as server:
        yield server


def client(hub, *argv, token="hf_test", check=True):
    """Runs Python with huggingface_hub's real client against the server."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
           "HF_HOME": str(hub.folder.with_name("home")), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    env = {name: value for name, value in env.items() if name != "HF_TOKEN"} | ({"HF_TOKEN": token} if token else {})
    done = subprocess.run([sys.executable, *map(str, argv)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def push(hub, folder, *more, **how):
    return client(hub, "-m", "miniclip", "push", "--model", folder, "--repo", "org/mine", *more, **how)


@pytest.fixture
def run(tmp_path, tiny_model):
    """A run's folder, with all that must not be uploaded."""
    folder = tmp_path / "run"
    tiny_model.config.preprocess_cfg.crop_pct = 0.9  # OpenCLIP does not know it
    tiny_model.save_pretrained(folder)
    options = {
        "train_file": f"{tmp_path}/train.json",
        "eval_file": None,
        "model": str(tmp_path / "base"),
        "loss": "clip",
    }
    (folder / "run.json").write_text(json.dumps({
        "command": f"python train.py {tmp_path}", "folder": str(tmp_path), "options": options, "pairs_per_step": 64,
        "data": {"records": 20, "captions": 40}, "arguments": {"learning_rate": 0.001, "output_dir": str(folder)},
    }))  # fmt: skip
    for name in (".lock", "log.jsonl", "checkpoint-1/optimizer.pt", "checkpoint-1/model.safetensors", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(str(tmp_path))
    metrics = {"text_to_image_R@1": 0.25, "mean_recall": 0.5, "text_to_image_mean_rank": 3.0}
    for name, digest in (("val", sha256(folder / "model.safetensors")), ("old", "of other weights")):
        record = {"sha256": {str(folder / "model.safetensors"): digest}}
        result = {"dataset": f"{tmp_path}/{name}.json", "metrics": metrics, "record": record}
        (folder / f"retrieval_{name}.json").write_text(json.dumps(result))
    return folder


def test_a_pushed_model_loads_from_the_hub(hub, run, tmp_path, tiny_model):
    done = push(hub, run, "--license", "mit", "--private")
    assert f"uploaded: {hub.url}/org/mine" in done.stdout
    assert hub.created["org/mine"]["visibility"] == "private"
    repo = hub.folder / "org" / "mine"
    names = {path.relative_to(repo).as_posix() for path in repo.rglob("*") if path.is_file()} - {".repo"}
    weights = {"model.safetensors", "open_clip_model.safetensors"}
    configs = {"README.md", "config.json", "open_clip_config.json", "preprocessor_config.json"}
    assert names >= weights | configs and {name for name in names if name.endswith(".safetensors")} == weights
    for name in names:
        content = (repo / name).read_bytes()
        assert str(tmp_path).encode() not in content and b"/tmp" not in content[:5000], name

    _, header, body = (repo / "README.md").read_text().split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "mit" and header["pipeline_tag"] == "zero-shot-image-classification"
    found = header["model-index"][0]["results"]
    assert [one["dataset"]["name"] for one in found] == ["val.json"], "not of other weights, nor twice"
    assert {m["type"]: m["value"] for m in found[0]["metrics"]} == {"text_to_image_R@1": 0.25, "mean_recall": 0.5}
    assert "| val.json | mean recall | 50.0 |" in body and "train.json: 20 records, 40 captions" in body
    assert 'AutoProcessor.from_pretrained("org/mine", trust_remote_code=True)' in body  # or it asks
    assert all('"hf-hub:org/mine"' in body or name in body for name in ("miniclip.load", "open_clip", "CLIPModel"))

    code = "import sys, torch, miniclip; m, p, _ = miniclip.load('hf-hub:org/mine'); print(p.cfg if hasattr(p, 'cfg') "
    code += "else ''); m.save_pretrained(sys.argv[1])"
    client(hub, "-c", code, tmp_path / "back")
    back = MiniClip.from_pretrained(tmp_path / "back")
    assert back.config == tiny_model.config, "crop_pct included"
    assert all(torch.equal(back.state_dict()[name], value) for name, value in tiny_model.state_dict().items())

    from transformers import CLIPModel

    theirs, pixels = CLIPModel.from_pretrained(repo), torch.randn(2, 3, 32, 32)
    embeds = torch.nn.functional.normalize(theirs.visual_projection(theirs.vision_model(pixels).pooler_output))
    assert torch.allclose(embeds, tiny_model.encode_image(pixels, normalize=True), atol=1e-5)


def test_a_second_push_replaces_files_and_keeps_a_card_of_the_users_own(hub, run):
    push(hub, run, "--license", "mit")
    repo = hub.folder / "org" / "mine"
    (repo / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    (repo / "merges.txt").write_text("of another model")
    (repo / "photo.jpg").write_text("the user's")
    (run / "run.json").unlink()
    done = push(hub, run, "--license", "mit")
    assert "has a model card of its own, which is kept" in done.stderr
    assert "My own words" in (repo / "README.md").read_text() and (repo / "photo.jpg").exists()
    if "merges.txt" not in hub.commits[0]["files"]:
        assert hub.commits[1]["deleted"] == ["merges.txt"]


FAILURES = [  # licence, token, faults of the server, the message
    (None, "hf_test", {}, "a licence is missing (--license): name the one you give the weights, usually mit, apache-2"),
    ("My License", "hf_test", {}, "'My License' is not a licence's name on the hub"),
    ("mit", False, {}, "answered 401, and nothing there was changed: a token that may write to org is needed"),
    ("mit", "hf_wrong", {}, "answered 401, and nothing there was changed: a token that may write to org is needed"),
    ("mit", "hf_test", {"create": [403]}, "answered 403, and nothing there was changed: a token that may write to org"),
    ("mit", "hf_test", {"put": [400, 400]}, "answered 400, and nothing there was changed: try again later"),
    ("mit", "hf_test", {"commit": [500]}, "answered 500, and nothing there was changed: try again later"),
    ("mit", "hf_test", None, "cannot be reached"),  # the server is gone
]
TRY = """
import json, sys
from huggingface_hub import constants
from miniclip.model import MiniClip
from miniclip.utils.errors import InputError
model = MiniClip.from_pretrained(sys.argv[1])
for license, token, gone in json.loads(sys.argv[2]):
    if gone:
        constants.ENDPOINT = "http://127.0.0.1:9"
    try:
        model.push_to_hub("org/mine", license=license, token=token)
        print("uploaded")
    except InputError as error:
        print(str(error).replace(chr(10), " "))
"""


def test_what_goes_wrong_is_said_and_changes_nothing(hub, run):
    for *_, faults, _ in FAILURES:
        hub.faults.update(faults or {})  # each is met by the first upload that comes so far
    cases = [(license, token, faults is None) for license, token, faults, _ in FAILURES]
    said = client(hub, "-c", TRY, run, json.dumps(cases), token=None).stdout.splitlines()
    for line, (*_, message) in zip(said, FAILURES, strict=True):
        assert message in line, said
    assert not hub.commits and not hub.files("org/mine") and not any(hub.faults.values())


def test_the_command_asks_for_a_licence(run_script, run):
    done = run_script("-m", "miniclip", "push", "--model", run, "--repo", "org/mine", check=False)
    assert done.returncode == 1 and "a licence is missing (--license)" in done.stderr


def test_a_tower_that_others_lack_goes_in_miniclips_own_form(tmp_path, tiny_model, monkeypatch):
    from miniclip.utils.errors import CheckpointError
    from miniclip.weights import push as module

    def refuse(path, model):
        raise CheckpointError("it has no such towers")

    monkeypatch.setattr(module, "EXPORTERS", module.EXPORTERS | {"openclip": refuse, "hf": refuse})
    notes = module.write_files(tmp_path / "files", tiny_model)
    assert notes == {"miniclip": [], "openclip": "it has no such towers", "hf": "it has no such towers"}
    assert {path.name for path in (tmp_path / "files").iterdir()} >= {"config.json", "model.safetensors"}
    card = module.write_card(tiny_model, "org/mine", "mit", notes, None)
    assert "OpenCLIP cannot load this model: it has no such towers." in card and "library_name: miniclip" in card
    MiniClip.from_pretrained(tmp_path / "files")


def test_trainers_own_upload_is_refused_by_name(tmp_path):
    from miniclip.training.arguments import RunArguments

    command = "miniclip push --model OUTPUT_DIR --repo .* --license "
    with pytest.raises(InputError, match=f"push_to_hub is not supported.*{command}"):
        RunArguments(str(tmp_path), push_to_hub=True)


def test_trainers_own_upload_is_refused_before_training(tmp_path, tiny_model):
    args = {"use_cpu": True, "report_to": []}
    with pytest.raises(InputError, match=r"Trainer's push_to_hub .* trainer.model.push_to_hub\(repo, license"):
        miniclip.ClipTrainer(tiny_model, miniclip.ClipTrainingArguments(str(tmp_path), push_to_hub=True, **args),
                             tokenizer=tiny_model.text.tokenizer)  # fmt: skip
    trainer = miniclip.ClipTrainer(
        tiny_model, miniclip.ClipTrainingArguments(str(tmp_path), **args), tokenizer=tiny_model.text.tokenizer
    )
    with pytest.raises(InputError, match="Trainer's push_to_hub"):
        trainer.push_to_hub()


def test_the_results_of_a_long_run_that_logged_nan_are_on_the_card(tiny_model, tmp_path):
    log = [{"loss": float("nan"), "step": step} for step in range(200_000)]
    log += [{"eval_text_to_image_R@1": 0.25, "eval_loss": 1.0}, {"train_loss": 0.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    card = write_card(tiny_model, "org/mine", "mit", {"miniclip": []}, tmp_path)
    assert "| a held-out part of the training data | text to image R@1 | 25.0 |" in card


def test_a_run_that_is_not_there_is_an_error(tiny_model, tmp_path):
    with pytest.raises(InputError, match="run .*gone is not a folder"):
        tiny_model.push_to_hub("org/mine", license="mit", run=tmp_path / "gone")
