"""Each shipped config belongs to a family of towers, and each family is exported to the forms that can hold it and
refused, by a name, by those that cannot."""

import importlib.util
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

from miniclip.config import MiniClipConfig, list_models
from miniclip.index.build import update
from miniclip.index.image_index import ImageIndexError
from miniclip.index.search import ImageSearch
from miniclip.inference.feature_cache import fingerprint
from miniclip.model import MiniClip
from miniclip.towers import siglip
from miniclip.transforms import Preprocess
from miniclip.utils.errors import InputError
from miniclip.weights import onnx as exports
from miniclip.weights.convert import EXPORTERS
from tests.towers.test_hf_towers import save_text_encoder

CLIPS, SIZES = "no other towers than CLIP's own", "OpenCLIP has no towers with blocks that differ in size"
REFUSED = {"hf": CLIPS, "sentence-transformers": CLIPS}
FAMILIES = {  # sections of the config -> (the config that is tried, what refuses it and why)
    "VisionConfig, TextConfig": ("ViT-B-32", {}),
    "ResNetConfig, TextConfig": ("RN50", REFUSED),
    "VariantVisionConfig, VariantTextConfig": ("ViT-H-14-CLIPA", REFUSED),
    "VisionConfig, VariantTextConfig": ("ViT-H-14-worldwide", REFUSED),
    "VariantVisionConfig, TextConfig": ("ViT-M-16-alt", REFUSED),
    "PrunedVisionConfig, PrunedTextConfig": (
        "TinyCLIP-auto-ViT-22M-32-Text-10M",
        REFUSED | {"openclip": SIZES, "openclip.pt": SIZES},
    ),
    "SigLipVisionConfig, SigLipTextConfig": ("ViT-B-16-SigLIP2", {"sentence-transformers": CLIPS}),
    "VisionConfig, HfTextConfig": ("xlm-roberta-base-ViT-B-32", REFUSED),
}
ENCODERS = [name for name in list_models() if name.startswith(("EfficientNet", "ResNet-S"))]  # of packages: test_joint


def family(name: str) -> str:
    config = MiniClipConfig.from_name(name)
    return f"{type(config.vision_cfg).__name__}, {type(config.text_cfg).__name__}"


def test_each_shipped_config_belongs_to_a_family():
    others = {family(name) for name in list_models() if name not in ENCODERS} - FAMILIES.keys()
    assert all(found.startswith(("Timm", "Coca")) for found in others), others  # test_timm and test_coca export these
    assert all(family(name) == found for found, (name, _) in FAMILIES.items())


@pytest.fixture(params=FAMILIES)
def small(request, tmp_path, monkeypatch) -> tuple[MiniClip, dict[str, str]]:
    """A model of the family with the fields of its config in small sizes, and what refuses it."""
    name, refused = FAMILIES[request.param]
    values = MiniClipConfig.from_name(name).to_dict()
    vision, text = values["vision_cfg"], values["text_cfg"]
    if vision.get("timm_model_name"):  # SigLIP's names say the sizes
        monkeypatch.setitem(siglip.TIMM, "base", (32, 1, 2, 4.0))
        vision = {key: vision[key] for key in ("timm_model_name", "timm_pool", "timm_proj")}
    else:
        resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
        sizes = {"layers": 1, "width": 32, "patch_size": 8, "image_size": 16}
        vision |= {"head_width": 16} | (resnet if request.param.startswith("ResNet") else sizes)
    if "Hf" in request.param:
        save_text_encoder(tmp_path / "encoder", "xlm-roberta", pad=1)
        text = {key: text[key] for key in ("hf_pooler_type", "hf_proj_type")}
        text |= {"hf_model_name": str(tmp_path / "encoder"), "context_length": 12}
    else:
        text |= {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        text |= {key: None for key in ("hf_tokenizer_name", "tokenizer_kwargs") if key in text}
    for section in (vision, text):
        section.update({key: [] for key in ("block_heads", "block_mlp_widths") if key in section})
        section.update({"head_width": 16} if "head_width" in section else {})
    values |= {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "preprocess_cfg": {}}
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_dict(values)).eval()
    assert f"{type(model.config.vision_cfg).__name__}, {type(model.config.text_cfg).__name__}" == request.param
    return model, refused


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_are_written_or_refused_by_name(small, tmp_path):
    model, refused = small
    for form in (*EXPORTERS, "openclip.pt"):
        with pytest.raises(InputError, match=refused[form]) if form in refused else nullcontext():
            EXPORTERS[form.removesuffix(".pt")](tmp_path / form, model)
        assert (tmp_path / form).exists() == (form not in refused), form


def find_a_picture(model: MiniClip, folder: Path):
    """Indexes two pictures and finds one; with another projection the index is another model's, but features stay."""
    (folder / "pictures").mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (20, 30), color).save(folder / "pictures" / f"{color}.png")
    loaded = model, Preprocess(model.config.preprocess_cfg), model.text.tokenizer
    update(folder / "pictures", folder / "p.mc", *loaded, {"name": "small", "pretrained": None}, num_workers=0)
    found = ImageSearch(folder / "p.mc", loaded).query(image=folder / "pictures" / "red.png")
    assert {one.path for one in found} == {"red.png", "blue.png"} and found[0].score == pytest.approx(1, abs=1e-5)
    if parameters := list(model.visual.projection.parameters()):
        before = fingerprint(model, model.visual, {})
        parameters[0].data += 1
        assert fingerprint(model, model.visual, {}) == before
        with pytest.raises(ImageIndexError, match="their vectors cannot be compared"):
            ImageSearch(folder / "p.mc", loaded)


def test_pictures_are_searched(small, tmp_path):
    find_a_picture(small[0], tmp_path)


def test_a_form_or_precision_that_there_is_not_is_refused(tiny_model, tmp_path):
    for form, precision in (("onnx", "bf16"), ("tflite", "fp32")):
        with pytest.raises(InputError, match=f"out cannot be written as {form} in {precision}: exports are onnx and"):
            exports.export(tiny_model, tmp_path / "out", form, precision)


@pytest.mark.slow
@pytest.mark.parametrize("form", exports.FORMS)
def test_graphs_are_written(small, form, tmp_path):
    if form == "onnx" and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        pytest.skip(f"needs {exports.PIP}")
    about = exports.export(small[0], tmp_path / "out", form)
    assert len(about["checked"]) == 2 and all(found["max_difference"] < 1e-5 for found in about["checked"].values())
