import numpy as np
import pytest
import torch
from PIL import Image

import miniclip
from miniclip.inference.embed import embed_images
from miniclip.inference.feature_cache import FeatureCache
from miniclip.model import MiniClip, VisionTransformer
from miniclip.transforms import Preprocess
from miniclip.utils.errors import InputError


def test_load_by_name_by_file_and_by_folder(tiny_config, tmp_path):
    import json

    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config.to_dict()))
    with pytest.warns(UserWarning, match="tiny.json has random weights"):
        model, preprocess, tokenizer = miniclip.load(str(tmp_path / "tiny.json"))
    assert isinstance(model, MiniClip) and not model.training
    model.save_pretrained(tmp_path / "saved")
    again, _, _ = miniclip.load(tmp_path / "saved")
    other, _, _ = miniclip.load(str(tmp_path / "tiny.json"), pretrained=tmp_path / "saved" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) and torch.equal(tensor, other.state_dict()[name])
    assert preprocess(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    assert tokenizer(["a", "b"]).shape == (2, 16)
    with pytest.raises(ValueError, match="'ViT-B/32' is neither a folder nor .* nearest: ViT-B-32"):
        miniclip.load("ViT-B/32")
    with pytest.raises(ValueError, match="was not saved by MiniCLIP: it has no config.json"):
        miniclip.load(tmp_path)


def test_embeddings_do_not_depend_on_batches_workers_or_order(tiny_model, caption_set):
    preprocess, tokenizer = miniclip.Preprocess(tiny_model.config.preprocess_cfg), miniclip.Tokenizer(16)
    paths = [caption_set / f"{i}.png" for i in (3, 1, 2, 23, 7)]
    one = miniclip.embed_images(tiny_model, preprocess, paths, batch_size=1)
    many = miniclip.embed_images(tiny_model, preprocess, paths, batch_size=4, num_workers=2)
    assert one.dtype == np.float32 and np.allclose(one, many, atol=1e-6)
    alone = tiny_model.encode_image(preprocess(miniclip.open_image(paths[3]))[None], normalize=True)
    assert np.allclose(one[3], alone.detach()[0], atol=1e-6)

    # "!!!" holds token id 0, which is what padding looks like
    texts = ["a very long caption about a small dog that runs", "dog", "wow !!! a dog!!!", "", "two dogs", "cat " * 40]
    one = miniclip.embed_texts(tiny_model, tokenizer, texts, batch_size=1)
    many = miniclip.embed_texts(tiny_model, tokenizer, texts, batch_size=3)
    padded = tiny_model.encode_text(tokenizer(texts), normalize=True).detach().numpy()
    assert one.dtype == np.float32 and one.shape == (6, 16)
    assert np.allclose(one, many, atol=1e-6) and np.allclose(one, padded, atol=1e-5)


def test_one_string_a_generator_a_half_precision_model_and_training_mode(tiny_model, caption_set):
    preprocess, tokenizer = miniclip.Preprocess(tiny_model.config.preprocess_cfg), miniclip.Tokenizer(16)
    one = miniclip.embed_texts(tiny_model, tokenizer, "a dog")
    assert one.shape == (1, 16)
    assert np.array_equal(one, miniclip.embed_texts(tiny_model, tokenizer, (t for t in ["a dog"])))
    path = caption_set / "3.png"
    one = miniclip.embed_images(tiny_model, preprocess, path)
    assert np.array_equal(one, miniclip.embed_images(tiny_model, preprocess, (p for p in [str(path)])))

    tiny_model.visual.patch_dropout = 0.5
    tiny_model.train()
    assert np.array_equal(one, miniclip.embed_images(tiny_model, preprocess, path)) and tiny_model.training
    half = miniclip.embed_images(tiny_model.to(torch.bfloat16), preprocess, path)
    assert half.dtype == np.float32 and 0 < np.abs(half - one).max() < 0.05


def test_neither_texts_nor_a_single_image_wait_for_batchnorms(tiny_model, monkeypatch):
    """Fusing those of a convolutional tower takes longer than an image, and texts have nothing from it."""
    fused, tokenizer = [], miniclip.Tokenizer(16)
    preprocess = Preprocess(tiny_model.config.preprocess_cfg)
    monkeypatch.setattr(VisionTransformer, "for_inference", lambda tower: fused.append(1) or tower)
    few, many = (miniclip.embed_texts(tiny_model, tokenizer, ["a dog", "a cat"] * n) for n in (1, 40))
    images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "white", "green")]
    one = miniclip.embed_images(tiny_model, preprocess, images[0])
    assert not fused and np.allclose(few, many[:2], atol=1e-6)
    some = miniclip.embed_images(tiny_model, preprocess, images * 2)
    assert fused and np.allclose(one, some[:1], atol=1e-6)


def test_nothing_to_embed(tiny_model):
    preprocess, tokenizer = miniclip.Preprocess(tiny_model.config.preprocess_cfg), miniclip.Tokenizer(16)
    assert miniclip.embed_texts(tiny_model, tokenizer, []).shape == (0, 16)
    assert miniclip.embed_images(tiny_model, preprocess, []).shape == (0, 16)


@pytest.mark.parametrize("what", ["proj.weight", "text_projection.weight", "blocks.0.mlp.c_fc.weight"])
def test_embeddings_that_are_no_numbers_raise(what, tiny_model, caption_set):
    """Comparisons with NaN are false, so that a search or a classifier would give its results in any order."""
    preprocess, tokenizer = miniclip.Preprocess(tiny_model.config.preprocess_cfg), miniclip.Tokenizer(16)
    paths = [caption_set / "0.png", caption_set / "missing.png", caption_set / "1.png"]
    found = miniclip.embed_images(tiny_model, preprocess, paths, faults={})
    assert np.isfinite(found).all(axis=1).tolist() == [True, False, True]
    tower = tiny_model.text if what.startswith("text") else tiny_model.visual
    tower.get_parameter(what).data[0] = torch.inf
    project = what.startswith("blocks")
    with pytest.raises(InputError, match="Transformer computes NaN or infinity for 2 of . inputs in fp32"):
        if tower is tiny_model.text:
            miniclip.embed_texts(tiny_model, tokenizer, ["a dog", "a cat"])
        miniclip.embed_images(tiny_model, preprocess, paths, faults={}, project=not project)


def test_an_unreadable_image_is_named(tiny_model, caption_set):
    (caption_set / "bad.png").write_text("no picture")
    preprocess = miniclip.Preprocess(tiny_model.config.preprocess_cfg)
    with pytest.raises(ValueError, match="bad.png"):
        miniclip.embed_images(tiny_model, preprocess, [caption_set / "0.png", caption_set / "bad.png"])


@pytest.mark.parametrize("num_workers", [0, 3])
def test_all_unreadable_images_are_named_at_once(tiny_model, caption_set, num_workers):
    paths = [caption_set / f"{i}.png" for i in range(24)]
    paths[3].write_text("no picture")
    paths[20].unlink()
    preprocess = miniclip.Preprocess(tiny_model.config.preprocess_cfg)
    with pytest.raises(ValueError, match=r"3\.png: not an image.*\n.*20\.png: no such file"):
        miniclip.embed_images(tiny_model, preprocess, paths, batch_size=4, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 1, 4, None])
def test_reading_ahead_keeps_the_order_and_goes_only_so_far(num_workers):
    import time

    from miniclip.utils.parallel import read_ahead

    started = []

    def read(n: int) -> int:
        started.append(n)
        time.sleep(0.001 * (n % 3))
        return n * n

    results = read_ahead(read, range(50), num_workers, ahead=5)
    for n in range(20):
        assert next(results) == n * n
        assert len(started) <= n + 7
    results.close()
    time.sleep(0.02)
    assert len(started) <= 27

    def fail(n: int):
        raise KeyError(n)

    with pytest.raises(KeyError):
        list(read_ahead(fail, range(9), num_workers, ahead=5))


def test_public_names_are_all_there():
    for name in miniclip.__all__:
        assert getattr(miniclip, name) is not None
    with pytest.raises(AttributeError, match="lod"):
        miniclip.lod  # noqa: B018


@pytest.mark.parametrize("decode", ["full", "openclip"])
def test_files_are_read_as_the_preprocessing_says(decode, tiny_model, tmp_path):
    """A photo turned by EXIF and a picture with transparent colours, from the file and opened by Pillow, cached."""
    config, exif = tiny_model.config.preprocess_cfg, Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    noise = np.random.default_rng(0).integers(0, 256, (60, 40, 4), dtype=np.uint8)
    Image.fromarray(noise[..., :3]).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(noise).save(tmp_path / "clear.png")
    paths, preprocess = [tmp_path / "turned.png", tmp_path / "clear.png"], Preprocess(config, decode)
    with torch.no_grad():
        expected = tiny_model.encode_image(torch.stack([preprocess.load(path) for path in paths]), True).numpy()
    for other in ("full", "openclip"):  # whose features are not taken for these
        cache = FeatureCache.for_images(tmp_path / "cache", tiny_model, Preprocess(config, other))
        embeds = embed_images(tiny_model, Preprocess(config, other), paths, cache=cache)
        assert (abs(embeds - expected).max() < 1e-5) == (other == decode)
    if decode == "openclip":  # with Pillow's images, which are as they are in the file
        opened = embed_images(tiny_model, preprocess, [Image.open(path) for path in paths])
        np.testing.assert_allclose(opened, expected, atol=1e-5)
