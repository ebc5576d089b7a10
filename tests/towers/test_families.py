"""Families of towers that OpenCLIP has too: with its weights they compute what it computes; they train, are saved, and
converted into each form that can hold them."""

import json
import shutil

import pytest
import torch

import miniclip
from benchmarks.make_towers_golden import GOLDEN, MODELS, contrastive, make_inputs, make_weights, record, summary
from miniclip.checkpoint import from_miniclip, to_miniclip
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.utils.errors import CheckpointError
from miniclip.utils.weight_files import read_state_dict
from miniclip.weights.convert import convert
from miniclip.weights.load import load_weights
from tests.training.test_training import recipe, weights  # noqa: F401

RECORDED = json.loads(GOLDEN.read_text(encoding="utf-8"))["models"]
TRAINED = {  # with CLIP's tokenizer
    "ResNet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
}


def config_of(cfg: dict) -> MiniClipConfig:
    return MiniClipConfig.from_dict({name: value for name, value in cfg.items() if name != "custom_text"})


@pytest.mark.parametrize("source", ["recorded", "live"])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_openclip_does(name, source):
    """Outputs, logits, the loss, each gradient and BatchNorm's statistics after a step; names in both directions."""
    if source == "live":
        pytest.importorskip("open_clip", reason="OpenCLIP is not installed: pip install open_clip_torch")
    peer = RECORDED[name] if source == "recorded" else record(MODELS[name])
    model = MiniClip(config_of(MODELS[name]))
    rows, layout = (model.visual.key_rows(), model.text.key_rows()), "openclip"
    layout = "custom_text" if MODELS[name].get("custom_text") else "openclip"
    names = from_miniclip(model.state_dict(), layout, rows)
    theirs = make_weights({name: tuple(t.shape) for name, t in names.items()})
    ours, found = to_miniclip(theirs, rows)
    assert found == layout
    model.load_state_dict(ours, strict=True)
    back = from_miniclip(model.state_dict(), layout, rows)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    images, input_ids = make_inputs(MODELS[name])
    with torch.no_grad():
        out = model.eval()(images, input_ids)
        for kind, got in (("image", out.image_embeds), ("text", out.text_embeds)):
            assert got.flatten().tolist() == pytest.approx(peer[kind], abs=1e-5), kind
        assert model.get_logits(images, input_ids)[0].flatten().tolist() == pytest.approx(peer["logits"], abs=1e-4)
    model.double()
    for every in (0, 2):  # the same with activation checkpointing
        model.load_state_dict(ours)
        model.activation_checkpointing_enable(every_n_layers=every)
        model.zero_grad()
        image, text, scale, _ = model.train()(images.double(), input_ids)
        loss = contrastive(scale * image @ text.T)
        loss.backward()
        filled = model.state_dict() | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients = {n: t for n, t in from_miniclip(filled, layout, rows).items() if n in peer["gradients"]}
        after = {n: t for n, t in from_miniclip(model.state_dict(), layout, rows).items() if n in peer["statistics"]}
        mine = summary(loss, gradients, after)
        assert mine["loss"] == pytest.approx(peer["loss"], abs=1e-6)
        for kind in ("gradients", "statistics"):
            assert mine[kind] == pytest.approx(peer[kind], abs=1e-6, rel=1e-6), kind


@pytest.fixture(params=TRAINED)
def config_file(request, tmp_path):
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    values = {"embed_dim": 16, "vision_cfg": TRAINED[request.param], "text_cfg": text}
    (tmp_path / "model.json").write_text(json.dumps(values))
    return tmp_path / "model.json"


def test_it_trains_on_two_processes_and_resumes_bit_for_bit(config_file, recipe, caption_set, run_script):  # noqa: F811
    steps = ["--model", config_file, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
    steps += ["--per_device_train_batch_size", "6"]
    run_script("train.py", recipe, *steps, processes=2)
    trained = weights(caption_set / "run")
    shutil.rmtree(caption_set / "run" / "checkpoint-2")
    (caption_set / "run" / "model.safetensors").unlink()
    run_script("train.py", recipe, *steps, "--resume", processes=2)
    again = weights(caption_set / "run")
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    fresh = MiniClip(MiniClipConfig.from_json(config_file)).state_dict()
    assert not any(torch.equal(t, fresh[n]) for n, t in trained.items() if n.startswith("visual.") and t.ndim > 1)


def test_it_is_saved_converted_and_loaded(config_file, tmp_path):
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_json(config_file)).eval()
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "openclip.pt", "openclip")
    convert(tmp_path / "saved", tmp_path / "openclip", "openclip")
    for to in ("hf", "sentence-transformers"):
        with pytest.raises(CheckpointError, match="transformers' CLIPModel has no other towers than CLIP's own"):
            convert(tmp_path / "saved", tmp_path / "hf", to)
    tinyclip = {}  # as TinyCLIP stores it: of a wrapped model, beside the optimizer
    for key, tensor in read_state_dict(tmp_path / "openclip.pt").items():
        tinyclip[f"module.{key}"] = tensor
    torch.save({"state_dict": tinyclip, "epoch": 1}, tmp_path / "tinyclip.pt")
    pixels = torch.randn(2, 3, 32, 32)
    for file in ("openclip.pt", "tinyclip.pt"):
        other = MiniClip(model.config)
        load_weights(other, tmp_path / file)
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in other.state_dict().items())
    for folder in ("saved", "openclip"):
        other, preprocess, _ = miniclip.load(tmp_path / folder)
        assert torch.equal(other.encode_image(pixels), model.encode_image(pixels)) and preprocess.cfg.size == 32
    fast, _, _ = miniclip.load(tmp_path / "saved", precision="fp32")
    torch.testing.assert_close(fast.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=1e-5)
