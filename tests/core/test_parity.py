"""With the same weights, does MiniCLIP compute what the others compute? Within 1e-5, in float32.

OpenCLIP and OpenAI's code are not installed here: `benchmarks/make_parity_golden.py` recorded what they gave for
weights and inputs that are made from formulas, and these tests make the same ones.
"""

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks.make_parity_golden import (
    DIMENSIONS,
    GOLDEN,
    SHAPES,
    draw,
    formula_inputs,
    formula_weights,
    names_digest,
)  # fmt: skip
from miniclip.checkpoint import from_miniclip, to_miniclip
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.weights.load import resize_positions
from miniclip.weights.to_huggingface import hf_config

RECORDED = json.loads(GOLDEN.read_text(encoding="utf-8"))
ACTIVATIONS = pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a machine that is busy otherwise, two threads that wait for one another take many times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=SHAPES)
def shape(request):
    """The name of a shape, and formula weights for it under MiniCLIP's names, mapped from OpenCLIP's."""
    with torch.device("meta"):  # a model without numbers tells the names
        exported = from_miniclip(MiniClip(MiniClipConfig.from_dict(SHAPES[request.param])).state_dict(), "openclip")
    shapes = {key: tuple(tensor.shape) for key, tensor in exported.items()}
    assert names_digest(shapes) == RECORDED["models"][request.param]["names"]  # both peers have just these
    weights, source = to_miniclip(formula_weights(shapes))
    assert source == "openclip"
    return request.param, weights


def our_model(shape, quick_gelu: bool) -> MiniClip:
    name, weights = shape
    with torch.device("meta"):
        model = MiniClip(MiniClipConfig.from_dict(SHAPES[name] | {"quick_gelu": quick_gelu}))
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, what: str):
    difference = (ours - theirs).abs().max().item()
    assert difference <= 1e-5, f"{what} differs by {difference:.1e}"


@ACTIVATIONS
@torch.inference_mode()
def test_openclip_and_openai(shape, quick_gelu):
    model = our_model(shape, quick_gelu)
    images, input_ids = formula_inputs(model.config.vision_cfg.image_size)
    embeds = {"image": model.encode_image(images), "text": model.encode_text(input_ids)}
    peers = ["openclip, QuickGELU", "openai, QuickGELU"] if quick_gelu else ["openclip, GELU"]
    for peer in peers:
        recorded = RECORDED["models"][shape[0]][peer]
        for kind, ours in embeds.items():
            theirs, norm = torch.tensor(recorded[kind]), torch.tensor(recorded[f"{kind}_norm"])
            torch.testing.assert_close(ours.norm(dim=-1), norm, rtol=1e-5, atol=0)
            assert_same(F.normalize(ours, dim=-1)[:, :DIMENSIONS], theirs / norm[:, None], f"{peer}, {kind}")
            # no pair of inputs is so alike, or so small, that a wrong result would pass
            assert theirs.abs().mean() > 0.1 and (theirs[0] - theirs[1]).abs().mean() > 0.05


@ACTIVATIONS
@torch.inference_mode()
def test_transformers(shape, quick_gelu):
    from transformers import CLIPConfig, CLIPModel

    model = our_model(shape, quick_gelu)
    theirs, report = CLIPModel.from_pretrained(
        None, config=CLIPConfig(**hf_config(model.config)), state_dict=from_miniclip(model.state_dict(), "hf"),
        output_loading_info=True,
    )  # fmt: skip
    assert not any(report.values()), report
    images, input_ids = formula_inputs(model.config.vision_cfg.image_size)
    ours, peer = model(images, input_ids), theirs.eval()(pixel_values=images, input_ids=input_ids)
    assert_same(ours.image_embeds, peer.image_embeds, "image_embeds")
    assert_same(ours.text_embeds, peer.text_embeds, "text_embeds")
    logits_per_image, logits_per_text = model.get_logits(images, input_ids)
    torch.testing.assert_close(logits_per_image, peer.logits_per_image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_per_text, peer.logits_per_text, rtol=1e-4, atol=1e-4)
    raw = (
        (model.encode_image(images), theirs.get_image_features(pixel_values=images).pooler_output),
        (model.encode_text(input_ids), theirs.get_text_features(input_ids=input_ids).pooler_output),
    )
    for mine, other in raw:
        assert_same(mine / other.norm(dim=-1, keepdim=True), other / other.norm(dim=-1, keepdim=True), "features")


def test_activation_matters_here():
    """The recorded numbers tell the activations apart by far more than the tolerance."""
    for recorded in RECORDED["models"].values():
        gelu, quick = (torch.tensor(recorded[f"openclip, {name}"]["image"]) for name in ("GELU", "QuickGELU"))
        assert (F.normalize(gelu, dim=-1) - F.normalize(quick, dim=-1)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "case", RECORDED["resized"], ids=lambda c: f"{'grid' if c['grid'] else 'line'}-{c['old']}-{c['new']}"
)
def test_positions_are_resized_as_openclip_does(case):
    old, new, width = case["old"], case["new"], case["width"]
    if case["grid"]:
        ours = resize_positions(draw(f"grid {old}", (1 + old * old, width), -1, 1), 1 + new * new, is_grid=True)
    else:
        ours = resize_positions(draw(f"line {old}", (old, width), -1, 1), new, is_grid=False)
    torch.testing.assert_close(ours.flatten(), torch.tensor(case["numbers"]), rtol=0, atol=1e-6)
