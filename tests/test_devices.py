"""Do tensors lie where those lie that they meet? A step and captions on a device that is not the CPU, with tensors that
have sizes and devices but no numbers. What a GPU computes, test_gpu.py compares."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from benchmarks.make_coca_golden import COCA
from benchmarks.make_towers_golden import MODELS, TEXT, VIT
from miniclip.config import MiniClipConfig
from miniclip.inference.fast import inference_copy
from miniclip.loss import DUPLICATES, clip_loss_with_duplicates
from miniclip.model import ClipOutput, MiniClip, TextTransformer
from miniclip.towers.coca import CoCa
from miniclip.training.coca import caption_loss
from miniclip.training.distill import affinity_loss
from miniclip.training.freeze import hold_statistics
from miniclip.training.grad_cache import wrap_towers
from miniclip.training.siglip import siglip_loss
from miniclip.training.superclip import word_loss
from miniclip.transforms import Preprocess

DEVICE = "meta"  # which every build of torch has
SWIN = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 100}
TRANSFORMERS = {
    "embed_dim": 24,
    "vision_cfg": {"hf_model_config": SWIN, "image_size": 32},
    "text_cfg": {"hf_model_config": BERT, "context_length": 12},
}
PLAIN = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}
FAMILIES = {"CLIP": PLAIN, "CoCa": COCA, "transformers": TRANSFORMERS, **{n: MODELS[n] for n in ("ResNet", "SigLIP")}}


@pytest.fixture
def family(request, monkeypatch):
    """A model, its inference copy, images as the collator gives them, and token ids."""
    cfg = {name: value for name, value in FAMILIES[request.param].items() if name != "custom_text"}
    model = MiniClip(MiniClipConfig.from_dict(cfg)).to(DEVICE)
    copy = inference_copy(model.eval(), "bf16")
    side, length = model.visual.image_size, model.config.text_cfg.context_length
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no such device
    monkeypatch.setattr(Tensor, "nonzero", lambda mask: torch.arange(len(mask), device=mask.device)[:, None])
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        images = torch.empty(3, 3, side, side, dtype=torch.uint8, device=DEVICE)
        yield model, copy, images, torch.empty(3, length, dtype=torch.long, device=DEVICE)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_a_step_and_embeddings(family):
    model, copy, images, ids = family
    if isinstance(model, CoCa):
        model.train_captions()
    hold_statistics(model.train().visual)
    normalize = Preprocess(model.config.preprocess_cfg).normalize
    pairs, bias = torch.empty(3, 2, dtype=torch.long, device=DEVICE), torch.empty((), device=DEVICE)
    for fast, chunk in ((True, 2), (False, 0)):
        out = wrap_towers(model, normalize, chunk, fast)(images, ids)
        losses = [clip_loss_with_duplicates(*out[:3], pairs, way) for way in DUPLICATES]
        losses += [siglip_loss(ClipOutput(*out[:3], bias), pairs, way, 2) for way in DUPLICATES]
        losses += [affinity_loss(out, out)]
        if type(model.text) is TextTransformer:
            losses += [word_loss(out, ids, model.text.token_embedding, model.text.projection, 0)]
        if isinstance(model, CoCa):
            losses += [caption_loss(out.caption_logits, ids, 0)]
        sum(losses).backward()
    for embeds in (copy.encode_image(normalize(images), normalize=True), copy.encode_text(ids, normalize=True)):
        assert (embeds.device.type, embeds.dtype) == (DEVICE, torch.float32)


@pytest.mark.parametrize("way", [
    {"num_beams": 2, "num_beam_groups": 1, "repetition_penalty": 1.3}, {"generation_type": "top_k"},
    {"generation_type": "top_p", "top_p": 0.5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", ["CoCa"], indirect=True)
def test_captions(family, way, monkeypatch):
    model, _, images, _ = family
    for name in ("tolist", "item"):
        monkeypatch.setattr(Tensor, name, numbers)
    ids = model.generate(images.float(), seq_len=5, min_seq_len=3, **way, sot_token_id=98, eos_token_id=22)
    assert ids.device.type == DEVICE and ids.shape == (3, 5)


def numbers(tensor: Tensor):
    """A list of lists, like `tolist`, but of zeros."""
    return [numbers(row) for row in tensor] if tensor.ndim else 0.0 if tensor.is_floating_point() else 0


@pytest.mark.parametrize("family", ["CLIP"], indirect=True)
def test_a_tensor_elsewhere_is_found(family):
    model, *_, ids = family
    model.text.positional_embedding = torch.nn.Parameter(torch.empty(12, 32))
    with pytest.raises(RuntimeError, match="two (different )?devices"):
        model.encode_text(ids)
