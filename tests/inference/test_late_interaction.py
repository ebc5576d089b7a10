"""Late interaction: MaxSim, the features of positions in each kind of tower, training, re-ranking, and heat maps."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import miniclip
from miniclip.inference.embed import WORDS, embed_patches, embed_words
from miniclip.inference.late_interaction import maxsim, rerank, where_seen
from miniclip.retrieval import metrics_of, search_both
from miniclip.towers.tokens import add_tokens, token_features
from miniclip.utils.errors import InputError
from miniclip.weights.convert import convert
from tests.towers.test_hf_towers import encoders  # noqa: F401
from tests.towers.test_joint import joint  # noqa: F401


def test_maxsim_is_the_sum_over_words_of_the_best_patch():
    torch.manual_seed(0)
    words, patches = torch.randn(3, 4, 5), torch.randn(2, 6, 5)
    words[1, 2:], words[2] = 0, 0  # a short text, and one without words
    for i, text in enumerate(words):
        for j, image in enumerate(patches):
            expected = sum(max((w @ p).item() for p in image) for w in text if w.any())
            assert abs(maxsim(words, patches)[i, j] - expected) < 1e-5


@pytest.mark.parametrize("kind", ["encoders", "joint"])
def test_positions_of_other_encoders(kind, request, tmp_path):
    model, _, tokenizer = miniclip.load(request.getfixturevalue(kind))
    model.eval()
    side = model.config.vision_cfg.image_size
    ids = tokenizer(["a red cat", "red"], trim=True)
    with torch.no_grad():
        patches, words = token_features(model.visual, torch.randn(2, 3, side, side)), token_features(model.text, ids)
        assert patches.shape == (2, 16 if kind == "encoders" else 1, model.visual.width)
        assert words.shape[1] == 5 and not words[1, 3:].any() and words[1, :3].any(dim=1).all()  # padding is zero
        pooled = words.sum(dim=1) / (ids != 0).sum(dim=1, keepdim=True)
        assert torch.allclose(pooled, model.text.features(ids), atol=1e-5)  # their mean is what the tower pools
    add_tokens(model)
    model.save_pretrained(tmp_path / "late")
    again, _, _ = miniclip.load(tmp_path / "late")
    assert torch.equal(again.visual.token_proj.weight, model.visual.token_proj.weight)
    assert not again.visual.token_proj.weight.requires_grad, "only late interaction trains it"


def test_positions_of_our_own_towers(tiny_model, tmp_path, monkeypatch):
    tokenizer = tiny_model.text.tokenizer
    ids = tokenizer(["a red cat", "red"], trim=True)
    with torch.no_grad():
        words = token_features(tiny_model.text, ids)
        ends = torch.stack([words[0, 4], words[1, 2]])
        assert torch.allclose(ends, tiny_model.text.features(ids), atol=1e-6) and not words[1, 3:].any()
    add_tokens(tiny_model)
    weights = tmp_path / "weights"
    tiny_model.save_pretrained(weights)
    with pytest.warns(UserWarning, match="late interaction is not written"):
        convert(weights, tmp_path / "openclip.safetensors", "openclip", force=True)
    assert not any("token_proj" in name for name in load_file(tmp_path / "openclip.safetensors"))
    model, preprocess, _ = miniclip.load(weights)
    images = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    plain = embed_patches(model, preprocess, images)
    fast = embed_patches(miniclip.load(weights, precision="fp32")[0], preprocess, images)
    assert plain.shape == (2, 4, 128) and np.allclose(np.linalg.norm(plain.astype(float), axis=2), 1, atol=1e-3)
    assert np.allclose(plain.astype(float), fast, atol=2e-3)
    monkeypatch.setattr("miniclip.inference.embed.PIECE", 2)  # the rows of faults are those of all images
    (bad := tmp_path / "bad.png").write_bytes(b"no image")
    found = embed_patches(model, preprocess, [*images, images[1], bad, images[0]], faults=(faults := {}))
    assert list(faults) == [3] and np.array_equal(found[[0, 1, 2, 4]], plain[[0, 1, 1, 0]])


@pytest.fixture
def late(tiny_model, caption_set, tmp_path):
    """A model that has learned nothing, and one that has learned late interaction on top of it."""
    from train import main

    tiny_model.save_pretrained(tmp_path / "model")
    main([
        "--model", str(tmp_path / "model"), "--train_file", str(caption_set / "captions.json"), "--holdout", "0",
        "--output_dir", str(tmp_path / "late"), "--loss", "late_interaction", "--learning_rate", "1e-2",
        "--num_train_epochs", "30", "--per_device_train_batch_size", "24", "--use_cpu", "true", "--report_to", "none",
        "--disable_tqdm", "true", "--save_strategy", "no", "--feature_cache", str(tmp_path / "cache"),
    ])  # fmt: skip
    return tmp_path / "model", tmp_path / "late"


def test_it_is_trained_and_reranks_and_shows_where(late, caption_set, tmp_path, capsys):
    from evaluate import main

    before, after = (miniclip.load(folder)[0].state_dict() for folder in late)
    assert all(torch.equal(after[name], weight) for name, weight in before.items()), "the model itself stays as it is"
    results = {}
    for n in (None, 0, 5):
        argv = ["--model", str(late[1]), "--eval_file", str(caption_set / "captions.json"), "--device", "cpu"]
        argv += ["--report", str(tmp_path / "report")] if n is None else ["--rerank", str(n)]
        main([*argv, "--output_file", str(tmp_path / f"{n}.json")])
        results[n] = json.loads((tmp_path / f"{n}.json").read_text())["metrics"]
    assert "re-ranked the first 100" in capsys.readouterr().out
    recall = {n: metrics["text_to_image_R@1"] for n, metrics in results.items()}
    assert recall[None] > max(0.3, 3 * recall[0]) and recall[0] <= recall[5] < recall[None]
    assert results[5]["text_to_image_R@5"] == results[0]["text_to_image_R@5"]  # the same five, in another order
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count('is seen"') > 12 and "Where words are seen" in page and "cosine plus MaxSim" in page
    with pytest.raises(InputError, match="only a model with late interaction"):
        main(["--model", str(late[0]), "--eval_file", str(caption_set / "captions.json"), "--rerank", "10"])

    # The shares of the words, with those of the start and the end, are the whole score.
    model, preprocess, tokenizer = miniclip.load(late[1])
    text, image = "a tall red sheet", caption_set / "0.png"
    levels, seen = where_seen(model, preprocess, tokenizer, image, text)
    assert levels.shape == (3, 32, 32) and [word for word, _, _ in seen] == text.split()
    assert all(heat.shape == (2, 2) for _, _, heat in seen)
    words, patches = embed_words(model, tokenizer, [text]), embed_patches(model, preprocess, [image])
    total = maxsim(torch.from_numpy(words), torch.from_numpy(patches).float()).item()
    ends = (torch.from_numpy(words[0, [0, 5]]) @ torch.from_numpy(patches[0]).float().T).amax(dim=1).sum().item()
    assert abs(sum(score for _, score, _ in seen) + ends - total) < 1e-4


def test_reranking_equals_the_whole_table():
    rng = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)  # noqa: E731
    images, texts = unit(rng.normal(size=(12, 8))), unit(rng.normal(size=(24, 8)))
    patches, words = unit(rng.normal(size=(12, 4, 6))).astype(np.float16), rng.normal(size=(24, WORDS, 6)).astype("f4")
    words[:, 5:] = 0
    owner = np.repeat(np.arange(12), 2)
    table = texts @ images.T + maxsim(torch.from_numpy(words), torch.from_numpy(patches).float()).numpy()
    found = rerank(search_both(images, texts, owner, 24), words, patches, 24)
    assert np.array_equal(found["text_to_image"].found, np.argsort(-table, axis=1))
    assert np.array_equal(found["image_to_text"].found, np.argsort(-table.T, axis=1))
    right = table[np.arange(24), owner]
    assert metrics_of(found)["text_to_image_R@1"] == (right == table.max(axis=1)).mean()
    first = search_both(images, texts, owner, 6)
    few = rerank(first, words, patches, 3)["text_to_image"]
    assert np.array_equal(few.found[:, 3:], first["text_to_image"].found[:, 3:])
    assert np.array_equal(np.sort(few.found), np.sort(first["text_to_image"].found))
    places = few.found == owner[:, None]
    assert np.array_equal(few.ranks[places.any(axis=1)], 1 + places.argmax(axis=1)[places.any(axis=1)])


@pytest.mark.parametrize("more, message", [
    (("--freeze_image", "none"), "stays as it is"),
    (("--duplicates", "exclude"), "counts duplicates as positives"),
    (("--model", "ViT-B-32"), "has no weights"),
])  # fmt: skip
def test_what_is_refused(more, message, tiny_model, caption_set, tmp_path):
    from train import main

    tiny_model.save_pretrained(tmp_path / "model")
    data, out = str(caption_set / "captions.json"), str(tmp_path / "out")
    with pytest.raises(InputError, match=message):
        main(["--model", str(tmp_path / "model"), "--train_file", data, "--output_dir", out, "--use_cpu", "true",
              "--loss", "late_interaction", *more])  # fmt: skip


def test_fsdp_is_refused_as_it_would_learn_nothing(tiny_model, caption_set, tmp_path, run_script):
    tiny_model.save_pretrained(tmp_path / "model")
    refused = run_script(
        "train.py", "--model", tmp_path / "model", "--train_file", caption_set / "captions.json", "--use_cpu", "true",
        "--loss", "late_interaction", "--output_dir", tmp_path / "out", "--fsdp", "full_shard",
        "--fsdp_config", '{"version": 2}', processes=2, check=False,
    )  # fmt: skip
    assert refused.returncode and "fsdp do not know the weights of loss late_interaction" in refused.stderr
