"""CoCa behind OpenCLIP's calls."""

import json

import pytest
import torch

import miniclip.compat.open_clip as open_clip
from benchmarks.make_coca_golden import COCA, IDS
from benchmarks.make_towers_golden import make_inputs
from miniclip.utils.errors import InputError

GREEDY = IDS | {"seq_len": 12, "generation_type": "top_k"}


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(open_clip, "ADDED", {"tiny-coca": COCA})
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="random weights"):
        model, _, preprocess = open_clip.create_model_and_transforms("tiny-coca")
    assert model.training and all(p.requires_grad for p in model.parameters())
    return model.eval()


def test_its_calls(model):
    images, text = make_inputs(COCA)
    assert torch.equal(model.encode_image(images), model.miniclip.encode_image(images, normalize=True))
    found = model(images, text)
    assert torch.equal(found["labels"], text[:, 1:]) and found["logits"].shape[:2] == found["labels"].shape
    alone = model(images)
    again = model(None, text, alone["image_features"], alone["image_embs"], output_labels=False)
    torch.testing.assert_close(again["logits"][:, :-1], found["logits"])
    assert "labels" not in again and torch.equal(again["image_features"], found["image_features"])
    assert torch.equal(model.generate(images, **GREEDY), model.miniclip.generate(images, **GREEDY))
    for wrong in ({"max_seq_len": 11}, {"stopping_criteria": []}):
        with pytest.raises(InputError, match="cannot be honoured: lower seq_len"):
            model.generate(images, **GREEDY | wrong)
    with pytest.raises(InputError, match="precision fp16 cannot be honoured: a decoder takes amp or pure_bf16"):
        open_clip.create_model("tiny-coca", precision="fp16")
    with pytest.warns(UserWarning, match="random weights"):
        low = open_clip.create_model("tiny-coca", precision="pure_bf16")
    assert low(images, text)["logits"].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("image", ["its own", "an encoder"])
def test_it_is_traced_and_its_sizes_are_forced(model, image, monkeypatch, tmp_path):
    images, text = make_inputs(COCA)
    if image == "an encoder":
        values = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
        encoder = {"hf_model_config": values, "image_size": 32, "attentional_pool": True, "attn_pooler_heads": 2}
        monkeypatch.setitem(open_clip.ADDED, "tiny-coca", COCA | {"vision_cfg": encoder})
        model = open_clip.create_model("tiny-coca").eval()
        with pytest.raises(InputError, match="force_patch_dropout cannot be honoured: this image tower drops no pat"):
            open_clip.create_model("tiny-coca", force_patch_dropout=0.5)
    else:
        assert open_clip.create_model("tiny-coca", force_patch_dropout=0.5).visual.patch_dropout == 0.5
    traced = open_clip.trace_model(model, batch_size=2)
    for ids in (text, text[:, :7]):  # also with another number of them, and without padding
        torch.testing.assert_close(traced.encode_text(ids), model.encode_text(ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(traced(images, text), model(images, text))
    model.miniclip.save_pretrained(tmp_path / "saved")
    sizes = {"force_context_length": 24, "force_image_size": 64, "force_quick_gelu": True}
    larger = open_clip.create_model(f"local-dir:{tmp_path / 'saved'}", **sizes).eval()
    config, pixels = larger.miniclip.config, torch.randn(1, 3, 64, 64)
    assert larger.context_length == config.multimodal_cfg.context_length == config.text_cfg.context_length == 24
    assert larger.visual.image_size == config.preprocess_cfg.size == 64 and config.quick_gelu
    assert larger.visual.features(pixels).shape[1] == larger.visual.width
    assert larger(pixels, torch.ones(1, 24).long())["logits"].shape == (1, 23, 100)
    assert larger.generate(pixels, **GREEDY | {"seq_len": 24}).shape[0] == 1


@pytest.mark.filterwarnings("ignore:.*was interpolated")
def test_it_answers_as_open_clip(model, tmp_path):
    # Not generate, which does not run there with transformers 5: tests/towers/test_coca.py has its recorded tokens.
    theirs = pytest.importorskip("open_clip", reason="OpenCLIP is not installed: pip install open_clip_torch")
    (tmp_path / "tiny-coca.json").write_text(json.dumps(COCA | {"custom_text": True}))
    theirs.add_model_config(tmp_path / "tiny-coca.json")
    peer = theirs.create_model("tiny-coca").eval()
    peer.load_state_dict(model.state_dict())
    model.load_state_dict(peer.state_dict())
    images, text = make_inputs(COCA)
    with torch.no_grad():
        for inputs in ((images, text), (images,)):
            ours, wanted = model(*inputs), peer(*inputs)
            assert ours.keys() == wanted.keys()
            for name in wanted:
                torch.testing.assert_close(ours[name], wanted[name], atol=1e-5, rtol=1e-5)
        for method, inputs in (("encode_image", images), ("encode_text", text)):
            for normalize in ((), (False,)):
                a, b = (getattr(m, method)(inputs, *normalize) for m in (model, peer))
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        how = {"pretrained": str(tmp_path / "weights.pt"), "force_context_length": 12, "force_image_size": 64}
        with pytest.warns(UserWarning, match="was interpolated from 21 to 13 positions"):
            model = open_clip.create_model("tiny-coca", **how).eval()
        inputs = torch.randn(3, 3, 64, 64), text[:, :12]
        ours, wanted = model(*inputs), theirs.create_model("tiny-coca", **how).eval()(*inputs)
        for name in wanted:
            torch.testing.assert_close(ours[name], wanted[name], atol=1e-5, rtol=1e-5)
