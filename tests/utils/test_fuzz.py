"""Inputs that nobody would think of: caption files, captions, pictures and shards made and mutated at random.

The default suite tries a few hundred of each, always the same ones; `make test-all` tens of thousands.
"""

import io
import json
import os
import tarfile
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from miniclip.config import PreprocessConfig
from miniclip.datasets.read import read_source
from miniclip.datasets.records import ReadOptions, one_per_image
from miniclip.datasets.shards import add_sample
from miniclip.tokenizer import WORD, Tokenizer, clean
from miniclip.training.augment import TrainTransform
from miniclip.training.dataset import RunDataset
from miniclip.transforms import Preprocess
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError, ImageFile

SOME = [300, pytest.param(20_000, marks=pytest.mark.slow)]


def tried(check, number: int, *strategies):
    """Calls `check` with as many examples."""
    how = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=number, **how)(given(*strategies)(check))()


def mutated(seeds: list[bytes]):
    """Seeds, a few bytes of which are changed, left out, doubled, or taken from another seed."""
    change = st.tuples(
        st.sampled_from(["set", "drop", "double", "cut", "splice", "big"]), st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=4), st.integers(1, 64), st.sampled_from(seeds),
    )  # fmt: skip

    def apply(seed: bytes, changes: list[tuple]) -> bytes:
        for kind, where, new, size, other in changes:
            at = int(where * len(seed)) if kind in ("cut", "splice") or size % 2 else int(where * min(len(seed), 64))
            seed = {
                "set": seed[:at] + new + seed[at + len(new) :], "drop": seed[:at] + seed[at + size :],
                "double": seed[: at + size] + seed[at:], "cut": seed[:at],
                "splice": seed[:at] + other[at : at + 8 * size] + seed[at + 8 * size :],
                "big": seed[:at] + b"\xff\xff\x7f" + seed[at + 3 :],
            }[kind]  # fmt: skip
        return seed

    return st.builds(apply, st.sampled_from(seeds), st.lists(change, min_size=1, max_size=4))


# --- Caption files.

RECORDS = [{"image": "a.png", "caption": ["a dog", "my dog"]}, {"image": "sub\\b.png", "caption": 'two "cats"; a, mat'}]
CAPTION_SEEDS = [
    json.dumps(RECORDS).encode(), json.dumps(RECORDS, indent=1).encode("utf-8-sig"),
    "\n".join(json.dumps(record) for record in RECORDS).encode(), json.dumps(RECORDS).encode("utf-16"),
    b'filepath,title\na.png,a dog\r\na.png,"my ""dog"", Rex"\nsub\\b.png,two cats\n',
    b"image\tcaption\na.png\ta dog\nsub/b.png\t'two' cats\n", b"id;image;caption\n1;a.png;a dog\n2;../a.png;out\n",
    b'[{"image": "link.png", "caption": "x"}, {"image": "/etc/passwd", "caption": [[["deep"]]]}, {"image": "sub"}]',
]  # fmt: skip
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["a.png", "sub\\b.png", "../x", "link.png", "ring", "sub", "a\0.png", "x" * 300, "\ud83d"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["image", "caption", "a"]), inner),
    max_leaves=12,
)  # fmt: skip
CAPTION_FILES = st.one_of(
    st.binary(max_size=200), mutated(CAPTION_SEEDS), st.builds(lambda value: json.dumps(value).encode(), VALUE),
    st.builds(lambda records: json.dumps([{"image": i, "caption": c} for i, c in records]).encode(),
              st.lists(st.tuples(st.just("a.png") | VALUE, st.just("a dog") | VALUE), min_size=1, max_size=4)),
)  # fmt: skip


@pytest.mark.parametrize("examples", SOME)
def test_any_caption_file_gives_records_or_an_input_error(examples, tmp_path, recwarn):
    root, outside = tmp_path / "root", tmp_path / "outside.png"
    (root / "sub").mkdir(parents=True)
    for path in (root / "a.png", root / "sub" / "b.png", outside):
        Image.new("RGB", (4, 4)).save(path)
    (root / "link.png").symlink_to(outside)
    (root / "ring").symlink_to("ring")

    def check(data, suffix, on_bad):
        (root / f"f{suffix}").write_bytes(data)
        try:
            records = read_source(str(root / f"f{suffix}"), ReadOptions(check_images=False, on_bad_sample=on_bad))
        except InputError as error:
            assert str(root) in str(error)
            return
        finally:
            recwarn.clear()
        assert records
        for record in one_per_image(records, "f"):
            assert record.keys() == {"image", "caption"} and record["caption"]
            assert (
                record["image"] in (str(root / "a.png"), str(root / "sub" / "b.png"))
                or os.path.isfile(record["image"])
                and os.path.realpath(record["image"]).startswith(f"{root}/")
            )
            assert all(isinstance(text, str) and text.strip() and text.encode() for text in record["caption"])
        RunDataset(records, Preprocess(PreprocessConfig(size=4)))  # a table can be made of them

    tried(check, examples, CAPTION_FILES, st.sampled_from([".json", ".jsonl", ".csv", ".tsv"]),
          st.sampled_from(["stop", "skip"]))  # fmt: skip


# --- Captions.

PIECES = st.sampled_from(["<|endoftext|>", "<|startoftext|>", "<end_of_text>", "&amp;lt;", "&#xD800;", "\x00", "\x1f",
                          "\ud83d", "\udc00", "\u0130", "\u017f", "\u2028", "'s", "ﬁ", "Ã©", "0" * 50])  # fmt: skip
TEXTS = st.one_of(
    st.text(st.characters(), max_size=60),
    st.lists(PIECES | st.text(st.characters(), max_size=4)).map("".join),
    st.builds(lambda text, n: text * n, st.text(st.characters(), min_size=1, max_size=20), st.integers(1, 300)),
)


@pytest.mark.parametrize("examples", SOME)
def test_any_text_is_encoded_and_comes_back_in_its_cleaned_form(examples):
    tokenizer = Tokenizer()

    def check(text):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.sot_token_id for i in ids)
        words = [word for piece in clean(text).split() for word in WORD.findall(piece)]
        assert tokenizer.decode(ids) == " ".join(words).strip()
        row = tokenizer(text)[0].tolist()
        assert row == ([tokenizer.sot_token_id, *ids[:75], tokenizer.eot_token_id] + [0] * 77)[:77]

    tried(check, examples, TEXTS)


# --- Pictures.


def saved(image: Image.Image, kind: str, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """A small picture in every format that is read, and in the modes and compressions that it has."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8))
    rgb, gray = noise.convert("RGB"), noise.convert("L")
    deep = Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 300)
    real = Image.fromarray(np.linspace(-1, 2, 192, dtype=np.float32).reshape(12, 16))
    moving = {"save_all": True, "append_images": [rgb.rotate(90)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    every = [(rgb, "JPEG", {"exif": exif}), (rgb, "JPEG", {"progressive": True}), (noise.convert("CMYK"), "JPEG", {}),
             (gray, "JPEG", {}), (noise, "PNG", {"exif": exif}), (deep, "PNG", {}), (gray.convert("1"), "PNG", {}),
             (noise.convert("LA"), "PNG", {}), (rgb.convert("P"), "PNG", {"transparency": 3}), (rgb, "PNG", moving),
             (rgb, "WEBP", {}), (noise, "WEBP", {"lossless": True}), (rgb, "WEBP", moving), (rgb, "GIF", moving),
             (rgb.convert("P"), "GIF", {"transparency": 3}), (rgb, "BMP", {}), (rgb.convert("P"), "BMP", {}),
             (rgb, "AVIF", {}), (rgb, "PPM", {}), (gray.convert("1"), "PPM", {}), (noise, "JPEG2000", {}),
             (noise, "ICO", {"sizes": [(16, 16), (8, 8)]}), (noise, "TGA", {}),
             (rgb, "TGA", {"compression": "tga_rle"}),
             (deep, "TIFF", {}), (real, "TIFF", {}), (noise.convert("CMYK"), "TIFF", {}),
             *((rgb, "TIFF", {"compression": name}) for name in (None, "tiff_lzw", "jpeg", "tiff_deflate", "packbits")),
             (gray.convert("1"), "TIFF", {"compression": "group4"})]  # fmt: skip
    return [saved(image, kind, **how) for image, kind, how in every]


class Handle(ImageFile):
    def __init__(self, data: bytes):
        self.data = data

    def read(self) -> bytes:
        return self.data

    def __str__(self) -> str:
        return "handle"


def usable(data: bytes) -> bool:
    """Whether bytes make a tensor, as they should, or an ImageError; anything else raises."""
    cfg = PreprocessConfig(size=8, mean=(0, 0, 0), std=(1, 1, 1))
    dataset = RunDataset((), Preprocess(cfg), transform=TrainTransform(cfg, scale=(0.5, 1), hflip=0.5))
    record = {"image": Handle(data), "caption": ["x"]}
    try:
        pixels = dataset.preprocess.load(record["image"])
        levels = dataset.draw(record, dataset.rng(0))["pixel_values"]
    except ImageError as error:
        assert str(error).startswith(("handle: ", "the picture: "))
        return False
    assert pixels.shape == levels.shape == (3, 8, 8) and levels.dtype == torch.uint8
    assert torch.isfinite(pixels).all() and 0 <= pixels.min() and pixels.max() <= 1
    return True


def test_every_format_is_read():
    seeds = pictures()
    assert len(seeds) == 33 and all(map(usable, seeds))


@pytest.mark.parametrize("examples", SOME)
def test_any_picture_is_a_tensor_or_an_image_error(examples, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)  # for speed; the real limit is tried in test_bad_input
    counts = {True: 0, False: 0}

    def check(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts[usable(data)] += 1

    tried(check, examples, st.binary(max_size=100) | mutated(pictures()))
    assert min(counts.values()) > examples / 20  # some are good still, some are not


# --- Shards.


@pytest.mark.parametrize("examples", [100, pytest.param(5_000, marks=pytest.mark.slow)])
def test_any_shard_gives_samples_or_an_input_error(examples, tmp_path, recwarn):
    with tarfile.open(tmp_path / "seed.tar", "w") as tar:
        for key, captions in (("000", ["a dog"]), ("d/001", ["two", "cats"]), ("größer" * 30, ["x"])):
            add_sample(tar, key, saved(Image.new("RGB", (4, 4)), "PNG"), "png", captions)
    seeds = [(tmp_path / "seed.tar").read_bytes().rstrip(b"\0") + bytes(1024)]

    def check(data):
        (tmp_path / "f.tar").write_bytes(data)
        for index in tmp_path.glob(".miniclip*"):  # the same size within the same tick of the clock
            index.unlink()
        try:
            source = read_source(str(tmp_path / "f.tar"), ReadOptions(on_bad_sample="skip"))
        except InputError as error:
            assert "f.tar" in str(error)
            return
        finally:
            recwarn.clear()
        for record in source:
            assert record["caption"] and all(text.strip() for text in record["caption"])
            assert str(record["image"]).startswith(f"{tmp_path}/f.tar: ")
            usable(record["image"].read())

    tried(check, examples, st.binary(max_size=1100) | mutated(seeds))
