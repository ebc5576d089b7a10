"""Conversion to another form: one function in a registry, and one parser of transformers' preprocessing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

import miniclip
from miniclip.commands.convert import main
from miniclip.model import MiniClip
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.weight_files import read_state_dict
from miniclip.weights.convert import EXPORTERS, convert


def write_names(path, model):
    """A form that holds the names of the tensors, the activation and how images are prepared."""
    names = {name: list(t.shape) for name, t in model.state_dict().items()}
    path.write_text(json.dumps({"names": names, "size": model.config.preprocess_cfg.size}))


def test_an_exporter_is_one_function(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(EXPORTERS, "names", write_names)
    tiny_model.save_pretrained(tmp_path / "a")
    said = convert(tmp_path / "a", tmp_path / "b.json", "names")
    assert "(names)" in said
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["size"] == 32 and written["names"].keys() == tiny_model.state_dict().keys()
    with pytest.raises(FileExistsError, match="--force"):
        convert(tmp_path / "a", tmp_path / "b.json", "names")
    main([str(tmp_path / "a"), str(tmp_path / "c.json"), "--to", "names"])
    assert (tmp_path / "b.json").read_text() == (tmp_path / "c.json").read_text()


def test_an_unknown_form_lists_the_known_ones(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="'onnx', only to openclip, hf, sentence-transformers, miniclip"):
        convert(tmp_path / "a", tmp_path / "b", "onnx")
    with pytest.raises(InputError, match="cannot convert to 'onnx'"):
        main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "onnx"])


def test_resize_256_crop_224_survives_conversion(tiny_config, tmp_path):
    """The pixels are transformers' own, there and back: a crop of 7/8 of the shorter side, not all of it."""
    tiny_config.vision_cfg.image_size = tiny_config.preprocess_cfg.size = 224
    MiniClip(tiny_config).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    file = tmp_path / "hf" / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {"size": {"shortest_edge": 256}}
    file.write_text(json.dumps(settings))
    (tmp_path / "hf" / "manifest.json").unlink()
    convert(tmp_path / "hf", tmp_path / "back", "miniclip")
    _, preprocess, _ = miniclip.load(tmp_path / "back")
    assert preprocess.cfg.crop_pct == 224 / 256 and preprocess.cfg.size == 224
    convert(tmp_path / "back", tmp_path / "again", "hf")
    assert json.loads((tmp_path / "again" / "preprocessor_config.json").read_text()) == settings
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((500, 400), Image.Resampling.BICUBIC)
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path / "again")(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(preprocess(image), torch.as_tensor(theirs), atol=1e-5, rtol=1e-5)


def test_the_bias_of_siglips_loss_is_kept(tiny_config, tmp_path):
    tiny_config.init_logit_bias = -10.0
    model = MiniClip(tiny_config)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.pt", "openclip")
    convert(tmp_path / "b.pt", tmp_path / "c.safetensors", "openclip")  # without a config
    assert read_state_dict(tmp_path / "c.safetensors")["logit_bias"].item() == -10
    with pytest.raises(CheckpointError, match="the bias of SigLIP's loss, which this form cannot hold"):
        convert(tmp_path / "a", tmp_path / "d", "hf")
