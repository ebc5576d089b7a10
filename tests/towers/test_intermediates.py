"""`forward_intermediates`: what OpenCLIP's gives, for each kind of tower."""

import json
from inspect import signature

import pytest
import torch

from benchmarks import make_coca_golden
from benchmarks.make_towers_golden import (
    GOLDEN,
    MODELS,
    VIT,
    make_inputs,
    make_weights,
    numbers,
    options_for,
    record_intermediates,
)
from miniclip.compat.coca import CoCa
from miniclip.compat.model import CLIP
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.towers.intermediates import chosen, forward_intermediates
from miniclip.utils.errors import InputError
from tests.towers.test_families import config_of

RECORDED = json.loads(GOLDEN.with_name("intermediates_golden.json").read_text(encoding="utf-8"))["models"]
RECORDED |= json.loads(make_coca_golden.GOLDEN.read_text(encoding="utf-8"))["intermediates"]
COCAS = make_coca_golden.MODELS
CONFIGS = MODELS | COCAS


def build(name: str) -> CLIP:
    cfg = CONFIGS[name]
    model = MiniClip(config_of(cfg))
    model = (CoCa(model) if name in COCAS else CLIP(model, custom_text=cfg.get("custom_text", False))).eval()
    model.load_state_dict(make_weights({name: tuple(t.shape) for name, t in model.state_dict().items()}))
    return model


@pytest.mark.parametrize("source", ["recorded", "live"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_gives_what_openclip_gives(name, source):
    cfg, peer, model = CONFIGS[name], RECORDED[name], build(name)
    if source == "live":
        pytest.importorskip("open_clip", reason="OpenCLIP is not installed: pip install open_clip_torch")
        peer = record_intermediates(cfg, *[make_coca_golden.build] * (name in COCAS))
    images, input_ids = make_inputs(cfg)
    for options, wanted in zip(options_for(cfg), peer, strict=True):
        with torch.no_grad():
            found = numbers(model.forward_intermediates(images, input_ids, **options))
        assert list(found) == list(wanted)
        for key, (shape, number) in wanted.items():
            loose = 1e-4 if "logit" in key else 1e-5
            assert found[key][0] == shape and found[key][1] == pytest.approx(number, abs=loose, rel=1e-5), key


def test_its_arguments_are_openclips():
    open_clip = pytest.importorskip("open_clip", reason="OpenCLIP is not installed: pip install open_clip_torch")
    theirs = list(signature(open_clip.CLIP.forward_intermediates).parameters.values())[1:]
    ours = list(signature(forward_intermediates).parameters.values())[1:-1]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_features_are_those_of_the_model_and_gradients_flow():
    """Also with activation checkpointing, and without leaving a trace in the model."""
    model = build("CLIPA")
    images, input_ids = make_inputs(MODELS["CLIPA"])
    names, gradients = list(model.state_dict()), []
    for every in (0, 1):
        model.miniclip.activation_checkpointing_enable(every_n_layers=every)
        model.zero_grad()
        found = model.train().forward_intermediates(images, input_ids, normalize=False)
        torch.testing.assert_close(found["image_features"], model.encode_image(images))
        torch.testing.assert_close(found["text_features"], model.encode_text(input_ids))
        (found["image_intermediates"][0].sum() + found["text_intermediates"][0].square().sum()).backward()
        assert len(found["image_intermediates"]) == 2
        gradients.append([p.grad for p in (model.visual.conv1.weight, model.text.token_embedding.weight)])
    assert list(model.state_dict()) == names
    assert all(a.abs().sum() > 0 and torch.allclose(a, b) for a, b in zip(*gradients))


def test_what_openclips_coca_cannot_give():
    """Logits, which are those of other models; a norm of another width and the blocks of an encoder are refused."""
    model, (images, ids) = build("published").miniclip, make_inputs(COCAS["published"])
    with torch.no_grad():
        found = forward_intermediates(model, images, ids, output_logits=True, text_output_extra_tokens=True)
        short = forward_intermediates(model, text=ids[:2, :7], text_output_extra_tokens=True)
        torch.testing.assert_close(found["image_logits"], model.get_logits(images, ids)[0])
        torch.testing.assert_close(found["text_intermediates"][-1], model.text.with_tokens(ids)[1])
    for key in ("text_intermediates", "text_intermediates_suffix"):  # padding may be cut off
        assert len(short[key]) == len(found[key]) == 2
        torch.testing.assert_close(short[key][-1], found[key][-1][:2, :7], atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="normalize_intermediates: CoCa's norm is of what its pooler returns"):
        forward_intermediates(model, images, normalize_intermediates=True)
    values = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    encoder = {"hf_model_config": values, "image_size": 32, "attentional_pool": True, "attn_pooler_heads": 2}
    model = MiniClip(MiniClipConfig.from_dict(COCAS["published"] | {"vision_cfg": encoder}))
    with pytest.raises(InputError, match="knows no blocks of a CocaHfVisionTower"):
        forward_intermediates(model, images)
    assert len(forward_intermediates(model, text=ids)["text_intermediates"]) == 2


def test_a_pruned_tower_and_what_is_refused():
    text = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
    pruned = {"image_size": 32, "patch_size": 8, "width": 30, "head_width": 8, "layers": 2}
    pruned |= {"block_heads": [2, 0], "block_mlp_widths": [20, 7]}
    model = MiniClip(MiniClipConfig.from_dict({"embed_dim": 16, "vision_cfg": pruned, "text_cfg": text})).eval()
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(0, 60, (2, 8))
    found = forward_intermediates(model, images, ids, image_indices=1)
    assert [t.shape for t in found["image_intermediates"]] == [(2, 30, 4, 4)]
    torch.testing.assert_close(found["image_features"], model.encode_image(images, normalize=True))
    assert chosen(5, [0, -1, 4]) == [0, 4] and chosen(5, 2) == [3, 4] and chosen(2, None) == [0, 1]
    for options, message in (
        ({"image_indices": 3}, "indices are 3, but the tower has 2 blocks: from -2 to 1"),
        ({"text_indices": [2]}, r"indices are \[2\], but the tower has 2 blocks"),
        ({"image_output_fmt": "NHWC"}, "image_output_fmt is 'NHWC', not NCHW or NLC"),
        ({"text_output_fmt": "NCHW"}, "text_output_fmt is 'NCHW', not 'NLC'"),
    ):
        with pytest.raises(InputError, match=message):
            forward_intermediates(model, images, ids, **options)
    with pytest.raises(InputError, match="output_logits needs image and text"):
        forward_intermediates(model, images, output_logits=True)
    values = {"model_type": "bert", "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 2, "intermediate_size": 32}
    model = MiniClip(MiniClipConfig.from_dict({"vision_cfg": VIT, "text_cfg": {"hf_model_config": values}}))
    with pytest.raises(InputError, match="knows no blocks of a HfTextTower"):
        forward_intermediates(model, text=ids)
