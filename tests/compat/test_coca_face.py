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
