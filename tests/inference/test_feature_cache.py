"""The cache of a frozen tower's features: when it is used, when not, and how it finds damage."""

import errno
import json

import pytest
import torch

import miniclip
from miniclip.inference import feature_cache
from miniclip.inference.fast import inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.utils.errors import InputError


def test_evaluate_takes_features_from_the_cache(tiny_model, caption_set, run_script):
    tiny_model.save_pretrained(caption_set / "model")
    common = ["evaluate.py", "--model", caption_set / "model", "--eval_file", caption_set / "captions.json"]
    results = []
    for expected in ("0 of 24", "24 of 24", "23 of 24"):
        if expected == "23 of 24":  # other content, same name
            (caption_set / "3.png").write_bytes((caption_set / "4.png").read_bytes() + b"\0")
        done = run_script(*common, "--feature_cache", caption_set / "cache", "--output_file", caption_set / "out.json")
        assert f"{expected} images were in" in done.stdout
        assert "fp32: cosine to plain fp32 at least 1.0000" in done.stdout
        results.append(json.loads((caption_set / "out.json").read_text())["metrics"])
    assert results[0] == results[1]
    done = run_script(*common, "--precision", "bf16", "--output_file", caption_set / "out.json")
    assert "bf16: cosine to plain fp32 at least 0.99" in done.stdout


def test_a_cache_that_cannot_be_written_is_read_and_the_results_are_kept(tiny_model, caption_set, monkeypatch, caplog):
    """As one that others share, on a disk that is mounted for reading."""
    preprocess = miniclip.Preprocess(tiny_model.config.preprocess_cfg)
    paths = [caption_set / f"{i}.png" for i in range(6)]

    def embed(n):
        cache = FeatureCache.for_images(caption_set / "cache", tiny_model, preprocess)
        return cache, miniclip.embed_images(tiny_model, preprocess, paths[:n], cache=cache)

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    embed(4)
    monkeypatch.setattr(feature_cache, "write_npy", read_only)
    cache, embeds = embed(6)
    exact = miniclip.embed_images(tiny_model, preprocess, paths)
    assert cache.reused == 4 and embeds == pytest.approx(exact, abs=1e-6)
    assert "cannot be written to (Read-only file system): new features are not kept" in caplog.text
    assert len(cache) == 6 and embed(4)[0].reused == 4

    def quota(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(feature_cache, "write_npy", quota)
    with pytest.raises(OSError, match="quota"):  # the disk is full, in a way
        embed(6)


def test_a_cache_is_for_one_tower_and_finds_damage(tiny_model, caption_set, tmp_path, monkeypatch):
    preprocess = miniclip.Preprocess(tiny_model.config.preprocess_cfg)
    paths = [caption_set / f"{i}.png" for i in range(24)]
    folder = tmp_path / "cache"

    def embed(preprocess=preprocess):
        cache = FeatureCache.for_images(folder, tiny_model, preprocess)
        return cache, miniclip.embed_images(tiny_model, preprocess, paths, cache=cache)

    plain = miniclip.embed_images(tiny_model, preprocess, paths)
    assert all((embed()[1] == plain).all() for _ in range(2))
    assert embed()[0].reused == 24 and len(embed()[0]) == 24
    torch.nn.init.normal_(tiny_model.visual.proj.weight)  # the projection: the features stay
    cache, embeds = embed()
    assert cache.reused == 24 and (embeds != plain).any()
    assert (embeds == miniclip.embed_images(tiny_model, preprocess, paths)).all()
    assert embed(miniclip.Preprocess(preprocess.cfg, "full"))[0].reused == 0
    caches = [FeatureCache.for_images(folder, tiny_model, preprocess, name).folder for name in ("fp32", "bf16", "int8")]
    monkeypatch.setitem(feature_cache.FORMATS, "int8", 0)  # as before the arithmetic of int8 became another
    caches.append(FeatureCache.for_images(folder, tiny_model, preprocess, "int8").folder)
    assert len(set(caches)) == 4
    with torch.no_grad():
        tiny_model.visual.blocks[1].mlp.c_proj.bias[0] += 1e-3
    assert embed()[0].reused == 0

    part = max(folder.glob("*/*.npy"), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged: its features are computed again"):
        cache, embeds = embed()
    assert cache.reused == 0 and (embeds == miniclip.embed_images(tiny_model, preprocess, paths)).all()
    assert not list(folder.glob("*/.*"))
    with pytest.raises(InputError, match="without a precision"):
        FeatureCache.for_images(folder, inference_copy(tiny_model), preprocess)
