"""Several encoders side by side: their features joined, saved and loaded, frozen from the top."""

import json

import pytest
import torch
import torch.nn.functional as F

import miniclip
from miniclip.inference.embed import embed_texts
from miniclip.inference.fast import inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.training.freeze import depths, freeze
from miniclip.utils.errors import InputError
from tests.towers.test_hf_towers import save_config, save_image_encoder, save_text_encoder, train


@pytest.fixture
def joint(tmp_path):
    """A model config of a tiny ViT of 32 pixels and a tiny ConvNeXt of 48 with another mean, and a tiny BERT."""
    save_image_encoder(tmp_path / "vit")
    save_image_encoder(tmp_path / "convnext", "convnext", size={"shortest_edge": 48}, image_mean=[0.1, 0.2, 0.3])
    save_text_encoder(tmp_path / "bert")
    names = [{"hf_model_name": str(tmp_path / name)} for name in ("vit", "convnext")]
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_proj_type": "linear", "context_length": 16}
    return save_config(tmp_path / "joint.json", {"towers": names, "hf_proj_type": "linear"}, text)


def test_features_are_those_of_each_encoder_of_its_own_pixels(joint, tmp_path):
    model, preprocess, _ = miniclip.load(joint)
    model.eval()
    assert (preprocess.cfg.size, preprocess.cfg.mean) == (48, (0.1, 0.2, 0.3))
    pixels = torch.randn(3, 3, 48, 48)
    raw = pixels * torch.tensor([0.3, 0.2, 0.1]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    small = F.interpolate(raw, (32, 32), mode="bicubic", antialias=True) - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    alone = []
    for name, x in (("vit", small / torch.tensor([0.3, 0.2, 0.1]).view(3, 1, 1)), ("convnext", pixels)):
        config = save_config(tmp_path / f"{name}.json", {"hf_model_name": str(tmp_path / name)})
        alone.append(F.normalize(miniclip.load(config)[0].eval().visual.features(x), dim=1))
    ours = model.visual.features(pixels)
    assert torch.allclose(ours, torch.cat(alone, dim=1), atol=1e-5) and model.visual.width == ours.shape[1]
    fast = inference_copy(model)
    assert torch.allclose(fast.features(fast.visual, pixels), ours, atol=1e-5)
    for precision in ("bf16", "int8"):
        rough = inference_copy(model, precision)
        assert (F.cosine_similarity(rough.features(rough.visual, pixels).float(), ours) > 0.99).all()
    model.save_pretrained(tmp_path / "saved")
    for name in ("vit", "convnext", "bert"):
        (tmp_path / name).rename(tmp_path / f"no-{name}")  # a folder is complete
    again, prepared, _ = miniclip.load(tmp_path / "saved")
    assert prepared.cfg == preprocess.cfg and torch.equal(again.eval().visual.features(pixels), ours)


@pytest.fixture
def joint_texts(joint, tmp_path):
    """The same with a tiny DistilBERT beside the BERT, with another padding id."""
    save_text_encoder(tmp_path / "distilbert", "distilbert", pad=3)
    values = json.loads(joint.read_text())
    names = [{"hf_model_name": str(tmp_path / name)} for name in ("bert", "distilbert")]
    return save_config(tmp_path / "texts.json", values["vision_cfg"], {"towers": names, "context_length": 16})


CAPTIONS = ["a red square", "blue", "a tall green shape in the wide yellow shape " * 3, "a red shape in a blue shape"]


def test_texts_are_read_by_each_encoder_with_its_own_tokenizer(joint_texts, tmp_path):
    model, _, tokenizer = miniclip.load(joint_texts)
    before = tokenizer.fingerprint()
    ours = embed_texts(model.eval(), tokenizer, CAPTIONS, project=False)
    assert tokenizer.truncated == 1 and tokenizer(CAPTIONS).shape == (4, 32)
    padded = model.text.features(F.pad(tokenizer(CAPTIONS, trim=True), (0, 1)))
    assert torch.allclose(padded, torch.from_numpy(ours), atol=1e-5)
    alone = []
    for name in ("bert", "distilbert"):
        section = {"hf_model_name": str(tmp_path / name), "context_length": 16}
        config = save_config(tmp_path / f"{name}.json", json.loads(joint_texts.read_text())["vision_cfg"], section)
        one, _, own = miniclip.load(config)
        alone.append(F.normalize(torch.from_numpy(embed_texts(one.eval(), own, CAPTIONS, project=False)), dim=1))
        assert tokenizer.decode([int(i) for i in tokenizer(CAPTIONS[0])[0]]) == own.decode(own(CAPTIONS[0])[0])
    assert torch.allclose(torch.from_numpy(ours), torch.cat(alone, dim=1), atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    for name in ("vit", "convnext", "bert", "distilbert"):
        (tmp_path / name).rename(tmp_path / f"no-{name}")
    again, _, read = miniclip.load(tmp_path / "saved")
    assert torch.equal(torch.from_numpy(embed_texts(again, read, CAPTIONS, project=False)), torch.from_numpy(ours))
    # The key of a cache does not depend on what the tokenizer read before.
    assert before == tokenizer.fingerprint() == read.fingerprint()
    folders = [FeatureCache.for_texts(tmp_path, model).folder for model in (model, again)]
    assert folders[0] == folders[1]


def test_joined_texts_train_from_the_top_of_each(joint_texts, caption_set, tmp_path, capsys):
    train(joint_texts, caption_set, tmp_path / "one", "--num_train_epochs", "1")
    assert "projections: regularised CCA" in capsys.readouterr().out
    # Blocks of both towers learn: a run from the encoders begins in closed form too, with cached features if they are.
    top, cache = ["--freeze_text", "all_but_1", "--freeze_image", "all_but_1"], ["--feature_cache", str(tmp_path / "c")]
    train(joint_texts, caption_set, tmp_path / "top", "--num_train_epochs", "1", *top, *cache)
    said = capsys.readouterr().out
    assert "projections: regularised CCA" in said and "after training" not in said and (tmp_path / "c").is_dir()
    with pytest.raises(InputError, match="feature_cache has no effect"):
        train(tmp_path / "top", caption_set, tmp_path / "none", *top, *cache)
    train(tmp_path / "one", caption_set, tmp_path / "two", "--num_train_epochs", "1", "--freeze_text", "all_but_1")
    before, after = (miniclip.load(tmp_path / name)[0].text.state_dict() for name in ("one", "two"))
    moved = {name.rpartition("layer.")[0] + name.rpartition("layer.")[2][:1] for name in before
             if not torch.equal(before[name], after[name]) and "layer." in name}  # fmt: skip
    assert moved == {"towers.0.trunk.encoder.2", "towers.1.trunk.transformer.2"}


def test_it_trains_from_the_top_of_each(joint, caption_set, tmp_path, capsys):
    train(joint, caption_set, tmp_path / "one", "--num_train_epochs", "1")
    assert "projections: regularised CCA" in capsys.readouterr().out
    model, _, _ = miniclip.load(tmp_path / "one")
    freeze(model, "all_but_1", "tower")
    learning = {name for name, p in model.visual.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in learning if name.startswith("towers.")} == {"0", "1"}
    assert any(name.startswith("towers.0.trunk.layers.2.") or ".layer.2." in name for name in learning), learning
    assert not any("embed" in name for name in learning) and max(depths(model.visual).values()) > 1


@pytest.mark.parametrize("change, message", [
    ({"towers": []}, "two encoders or more"), ({"hf_pooler_type": "mean"}, "belongs to each of the towers"),
    ({"towers": [{"hf_model_name": "package:nothing"}] * 2}, "is not one of"),
    ({"towers": [{"x": 1}] * 2}, "unknown field 'x'"),
])  # fmt: skip
def test_what_cannot_be_is_said(change, message, joint):
    values = json.loads(joint.read_text())
    values["vision_cfg"] |= change
    joint.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        miniclip.load(joint)
