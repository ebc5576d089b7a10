"""A corpus of everything that is bad, or only looks so, through the commands that read captions and pictures."""

import datetime
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import evaluate
import train
from miniclip.commands import convert_data as repack
from miniclip.commands import wise_ft
from miniclip.config import PreprocessConfig
from miniclip.datasets.read import describe, read_source
from miniclip.datasets.records import NO_FILE, ReadOptions
from miniclip.datasets.shards import add_sample
from miniclip.inference.embed import embed_images
from miniclip.inference.feature_cache import FeatureCache
from miniclip.tokenizer import Tokenizer
from miniclip.transforms import Preprocess
from miniclip.utils.bad_samples import BadSamples
from miniclip.utils.command_line import run
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError, open_image
from tests.utils.test_fuzz import pictures, saved, usable

ROOT = Path(__file__).resolve().parents[2]
SKIP = ReadOptions(on_bad_sample="skip")


def noise(width=40, height=30, mode="RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)).convert(mode)


def png(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of one bit a pixel, all black, that says it has any size; more chunks before its data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(min(1 << 20, height * (width // 8 + 2))))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


def tiff(width: int, height: int) -> bytes:
    """A TIFF that says it has any size."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 100)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(104)


def ico(data: bytes) -> bytes:
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(data), 22) + data


def sound_pictures() -> dict[str, bytes]:
    """What must be read, though it is rare or its name odd."""
    deep = np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54
    real = np.where(np.eye(30, 40) > 0, np.nan, 0.5).astype(np.float32)
    frames = {"save_all": True, "append_images": [noise().rotate(90)]}
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (8 << 20), zip=True)
    exif, broken = Image.Exif(), b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9
    found = {
        "png named.jpg": saved(noise(), "PNG"), "jpeg named.png": saved(noise(), "JPEG"),
        "no extension": saved(noise(), "PNG"),
        "cmyk.jpg": saved(noise(mode="CMYK"), "JPEG"), "16 bit.png": saved(Image.fromarray(deep), "PNG"),
        "big endian.tif": saved(Image.frombytes("I;16B", (40, 30), deep.byteswap().tobytes()), "TIFF"),
        "nan.tif": saved(Image.fromarray(real), "TIFF"), "all nan.tif": saved(Image.fromarray(real * np.nan), "TIFF"),
        "inf.tif": saved(Image.fromarray(real * np.inf), "TIFF"), "one bit.png": saved(noise(mode="1"), "PNG"),
        "la.png": saved(noise(mode="LA"), "PNG"),
        "palette.png": saved(noise(mode="P"), "PNG", transparency=b"\0\x80" * 9),
        "pa.tif": saved(noise(mode="LA").convert("PA"), "TIFF"), "moving.gif": saved(noise(), "GIF", **frames),
        "moving.webp": saved(noise(), "WEBP", **frames), "moving.png": saved(noise(), "PNG", **frames),
        "icc.jpg": saved(noise(), "JPEG", icc_profile=b"no profile at all"), "one pixel.png": saved(noise(1, 1), "PNG"),
        "strip.png": saved(Image.new("L", (30_000, 300)), "PNG"),
        "broken exif.jpg": saved(noise(), "JPEG", exif=broken), "chunk.png": saved(noise(), "PNG", pnginfo=text),
        "space  two.png": saved(noise(), "PNG"), "tab\t.png": saved(noise(), "PNG"),
        "new\nline.png": saved(noise(), "PNG"),
        "\U0001f415.png": saved(noise(), "PNG"), "größe.png": saved(noise(), "PNG"),
        "back\\slash.png": saved(noise(), "PNG"),
        "x" * 240 + ".png": saved(noise(), "PNG"), "UPPER.PNG": saved(noise(), "PNG"),
        "quote\".png": saved(noise(), "PNG"),
    }  # fmt: skip
    for turn in range(1, 9):
        exif[0x0112] = turn
        found[f"turned {turn}.jpg"] = saved(noise(), "JPEG", exif=exif)
    return found | {f"format {n}.png": data for n, data in enumerate(pictures())}


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """What must be refused, and why."""
    half, postscript = saved(noise(), "JPEG"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    found = {
        "empty.jpg": (b"", "an empty file"), "text.jpg": (b"no picture", "begins with b'no picture'"),
        "page.jpg": (b"<!DOCTYPE html><html>", "not an image in a supported format"),
        "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version https://'"),
        "half.jpg": (half[: len(half) // 2], "damaged"),
        "drawing.jpg": (b"<svg xmlns='x'/>", "not an image in a supported format"),
        "document.jpg": (b"%PDF-1.7\n%%EOF\n", "begins with b'%PDF-1.7"),
        "postscript.jpg": (postscript, "not an image in a supported format"),
        "layers.png": (b"8BPS\0\x01" + bytes(40), "not an image in a supported format"),
        "film.jpg": (b"\0\0\x01\xb3" + bytes(40), "not an image in a supported format"),
        "icons.png": (b"icns" + bytes(40), "not an image in a supported format"),
        "meta.png": (b"\xd7\xcd\xc6\x9a" + bytes(40), "not an image in a supported format"),
        "bomb.png": (png(15_000, 15_000), "225000000 pixels"), "bomb.tif": (tiff(20_000, 20_000), "400000000 pixels"),
        "bomb.ico": (ico(png(15_000, 15_000)), "225000000 pixels"),
        "bomb.gif": (b"GIF89a" + b"\xff" * 4 + saved(noise(), "GIF")[10:], "4294836225 pixels"),
        "sliver.png": (png(30_000, 1), "30000 x 1 has an aspect ratio above 100:1"),
        "icon sliver.ico": (ico(png(30_000, 1)), "30000 x 1|damaged"),
    }  # fmt: skip
    for number, data in enumerate(pictures()):
        found |= {f"cut {number} {share}.png": (data[: int(len(data) * share)], ".") for share in (0.02, 0.2)}
    return found


CAPTIONS = {
    "an empty list": ([], "neither a string nor a list"), "a number": ([3], "caption 0 is not text"),
    "nothing": ([""], "caption 0 is not text"), "null": ([None], "caption 0 is not text"),
    "null itself": (None, "caption 0 is not text: None"), "blank": (["x", " \n"], "caption 1 is not text"),
    "an object": ({"en": "x"}, "caption 0 is not text: {'en'"), "nested": ([[3]], "caption 0 is not text: 3"),
    "half an emoji": ("half \ud83d", "not valid Unicode"), "no number": ([float("nan")], "caption 0 is not text"),
}  # fmt: skip
NAMES = {
    "../outside.png": "leads out of the image folder", "/etc/passwd": "leads out of the image folder",
    "..\\outside.png": "leads out of the image folder", "sub/../../outside.png": "leads out of the image folder",
    "link.png": "a link leads out of the image folder", "linked/outside.png": "a link leads out",
    "missing.png": NO_FILE,
    "dangling.png": NO_FILE, "ring.png": "symbolic links", "a\0.png": "NUL character", "y" * 300: "File name too long",
    "upper.png": NO_FILE, "bytes \udcff.png": "not valid Unicode", "folder.png": "a folder",
    "pipe.png": "a device or a pipe",
    "": "image is not a path", "C:\\pictures\\a.png": NO_FILE, "text.jpg/a.png": NO_FILE,
}  # fmt: skip


@pytest.fixture
def corpus(tmp_path, tiny_config):
    """A folder with all pictures and captions.json: (folder, the records that are sound, reasons of the others)."""
    folder = tmp_path / "images"
    (folder / "folder.png").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(saved(noise(), "PNG"))
    sound, bad = sound_pictures(), bad_pictures()
    for name, data in (sound | {name: data for name, (data, _) in bad.items()}).items():
        (folder / name).write_bytes(data)
    (folder / os.fsdecode(b"bytes \xff.png")).write_bytes(saved(noise(), "PNG"))
    (folder / "link.png").symlink_to("../outside.png")
    (folder / "linked").symlink_to("..")
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "ring.png").symlink_to("ring.png")
    os.mkfifo(folder / "pipe.png")
    good = [{"image": name, "caption": [f"picture {number}", "twice", "twice"]} for number, name in enumerate(sound)]
    wrong = [({"image": name, "caption": "x"}, reason) for name, (_, reason) in bad.items()]
    wrong += [({"image": name, "caption": "x"}, reason) for name, reason in NAMES.items()]
    wrong += [({"image": "UPPER.PNG", "caption": value}, reason) for value, reason in CAPTIONS.values()]
    wrong += [(3, "expected an object"), ({"image": "UPPER.PNG"}, "expected an object"), ({}, "expected an object"),
              ({"image": 7, "caption": "x"}, "image is not a path: 7"), (["a"], "expected an object")]  # fmt: skip
    lines = [json.dumps(record) for record in [*good, *(record for record, _ in wrong)]]
    lines.append('{"image": "UPPER.PNG", "image": "turned 1.jpg", "caption": "x"}')
    wrong.append((None, "'image' occurs twice: remove one"))
    (folder / "captions.json").write_text(f"[{', '.join(lines)}]")
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config.to_dict()))
    return folder, good, {f"record {len(good) + number}": reason for number, (_, reason) in enumerate(wrong)}


def check_report(report: str, reasons: dict[str, str]):
    """Every bad record, by its number, with its reason, and no other."""
    found = dict(re.findall(r"^  (record \d+): (.*)$", report, re.MULTILINE))
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert re.search(reason, found[name]), (name, reason, found[name])


def listed(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_118_bad_records_of_training_are_said_at_once_or_left_out_and_listed(
    corpus, run_script, tmp_path, monkeypatch, capsys
):
    folder, good, reasons = corpus
    assert (len(good), len(reasons)) == (71, 118)
    command = ["train.py", "--model", tmp_path / "tiny.json", "--train_file", folder / "captions.json",
               "--output_dir", tmp_path / "run", "--per_device_train_batch_size", "8", "--max_steps", "2",
               "--use_cpu", "--holdout", "0"]  # fmt: skip
    done = run_script(*command, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    check_report(done.stderr, reasons)
    skip = ["--on_bad_sample", "skip", "--dataloader_num_workers", "1", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), *skip])
    with pytest.warns(UserWarning, match="records cannot be used"):
        run(train.main)
    said = capsys.readouterr().out
    assert f"{len(good)} images" in said and f"skipped {len(reasons)} times: {tmp_path}/run/bad" in said
    lines = listed(tmp_path / "run" / "bad_samples.jsonl")
    check_report("\n".join(f"  {line['sample'].rpartition(': ')[2]}: {line['reason']}" for line in lines), reasons)
    assert {line["when"] for line in lines} == {"before the start"}
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_warning_is_no_line_of_our_code(caption_set, tiny_config, run_script):
    (caption_set / "tiny.json").write_text(json.dumps(tiny_config.to_dict()))
    (caption_set / "3.png").unlink()
    how = ["--model", caption_set / "tiny.json", "--train_file", caption_set / "captions.json", "--max_steps", "1"]
    done = run_script("train.py", *how, "--on_bad_sample", "skip", "--output_dir", caption_set / "run")
    assert done.stderr.startswith(f"warning: {caption_set}/captions.json: 1 of 24 records cannot be used:\n")
    assert "UserWarning" not in done.stderr and "read_source" not in done.stderr


def test_evaluation_stops_or_leaves_out_alike(corpus, tmp_path, tiny_model, capsys):
    folder, good, reasons = corpus
    tiny_model.save_pretrained(tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--eval_file", str(folder / "captions.json"), "--device", "cpu"]
    with pytest.raises(InputError) as caught:  # without decoding: what is wrong with captions and names
        evaluate.main(command)
    first = len(good) + len(bad_pictures())
    early = {name: reason for name, reason in reasons.items() if int(name.split()[1]) >= first}
    check_report(str(caught.value), early)
    with pytest.warns(UserWarning, match="records cannot be used"):
        evaluate.main([*command, "--on_bad_sample", "skip", "--output_file", str(tmp_path / "r.json")])
    said = capsys.readouterr().out
    assert f"{len(good)} images, {2 * len(good)} captions" in said  # "twice" counts once for each
    assert f"{len(reasons)} bad samples were skipped: {tmp_path}/r.bad_samples.jsonl" in said
    assert len(listed(tmp_path / "r.bad_samples.jsonl")) == len(reasons)


def test_wise_ft_and_the_converter_take_the_same_options(corpus, tmp_path, tiny_model, capsys):
    folder, good, reasons = corpus
    tiny_model.save_pretrained(tmp_path / "model")
    file = str(folder / "captions.json")
    command = ["--before", str(tmp_path / "model"), "--after", str(tmp_path / "model"), "--device", "cpu"]
    command += ["--new_file", file, "--old_file", file, "--output_dir", str(tmp_path / "mix"), "--alphas", "0"]
    with pytest.raises(InputError, match="skip them with --on_bad_sample skip"):
        wise_ft.main(command)
    with pytest.warns(UserWarning, match="records cannot be used"):
        wise_ft.main([*command, "--on_bad_sample", "skip"])
    lines = listed(tmp_path / "mix" / "bad_samples.jsonl")
    assert {line["sample"] for line in lines} == {f"{file}: {name}" for name in reasons}
    for target in ("out.json", "out.csv", "000.tar"):
        target = tmp_path / "converted" / target
        with pytest.raises(InputError, match="skip them with --on_bad_sample skip"):
            repack.main([file, str(target)])
        assert not target.exists()
        with pytest.warns(UserWarning, match="cannot be used"):
            repack.main([file, str(target), "--on_bad_sample", "skip"])
        lines = listed(Path(f"{target}.bad_samples.jsonl"))
        if target.suffix == ".tar":  # whose images are looked at
            assert len(read_source(str(target))) >= len(good) and len(lines) > len(NAMES) + len(CAPTIONS)
    names = ("../outside.png", str(tmp_path / "outside.png"), "link.png")
    outside = [{"image": name, "caption": "x"} for name in names]
    (folder / "out.json").write_text(json.dumps(outside))
    with pytest.raises(InputError, match="3 of 3 records"):
        repack.main([str(folder / "out.json"), str(tmp_path / "x.json")])
    repack.main([str(folder / "out.json"), str(tmp_path / "x.json"), "--allow_outside_image_root"])
    assert len(read_source(str(tmp_path / "x.json"), ReadOptions(allow_outside_image_root=True))) == 2  # one twice


DEEP = "[" * 100_000
NESTED, FAR = (f'{{"image": "a.png", "caption": {"[" * depth}{"]" * depth}}}' for depth in (100, 400))
FILES = {
    "empty.json": (b"", "it is empty"), "space.json": (b" \n", "it is empty"),
    "numbers.json": (b"[1, 2]", "1: expected an object"), "object.json": (b'{"a": 1}', "expected a list of records"),
    "none.json": (b"[]", "expected a list"), "null.json": (b"null", "expected a list"),
    "text.json": (b'"x"', "expected a list"),
    "comma.json": (b'[{"image": "a.png", "caption": "x"},]', "invalid JSON: "),
    "cut.json": (b'[{"image": "a.pn', "invalid JSON: "),
    "nan.json": (b"NaN", "expected a list"),
    "nan2.json": (b'[{"image": NaN, "caption": "x"}]', "image is not a path: nan"),
    "utf16.json": (
        '[{"image": "a.png", "caption": "x"}]'.encode("utf-16"), "not UTF-8 .it is UTF-16, in line 1.: save"),
    "latin.json": ('[\n{"image": "a.png", "caption": "\xe9"}]'.encode("latin-1"), "not UTF-8 .byte 0xe9, in line 2"),
    "latin.csv": ("image,caption\na.png,\xe9\n".encode("latin-1"), "not UTF-8 .byte 0xe9, in line 2"),
    "utf16.tsv": ("image\tcaption\na.png\tx\n".encode("utf-16"), "it is UTF-16"),
    "deep.json": (DEEP.encode(), "invalid JSON: nested too deeply"),
    "deep.jsonl": (DEEP.encode(), "line 1: invalid JSON: nested"),
    "deep2.json": (f"[{NESTED}]".encode(), "record 0: a.png: caption 0 is not"),
    "deep2.jsonl": (FAR.encode(), "line 1: a.png: caption 0 is not"),
    "twice.json": (b'[{"image": "a.png", "caption": "x", "caption": "y"}]', "record 0: 'caption' occurs twice"),
    "twice.jsonl": (b'{"image": "a.png", "image": "b.png", "caption": "y"}', "line 1: 'image' occurs twice"),
    "digits.json": (b"[" + b"9" * 5000 + b"]", "invalid JSON: "), "page.json": (b"<!DOCTYPE html>", "invalid JSON: "),
    "bare.jsonl": (
        b'{"image": "a.png", "caption": "x"}\nnonsense\n[1]', "line 2: invalid JSON(.|\n)*line 3: expected an"),
    "empty.jsonl": (b"", "there is no record in it"), "empty.csv": (b"", "which column"),
    "head.csv": (b"image,caption\n", "no record"),
    "cells.csv": (b"image,caption\na.png,x,y\n", "line 2: 3 cells for 2 columns"),
    "nul.csv": (b"image,caption\na\0.png,x\n", "NUL"),
    "wide.csv": (b"x" * 200_000 + b",caption\n", "field larger|which column"),
    "header.tsv": (b'image\t"caption\na.png\tx\n', "unexpected end of data|which column"),
    "quote.csv": (b'image,caption\na.png,"x\n', "line 2: an unmatched q"),
    "names.csv": (b"bild,wort\na.png,x\n", "which column has the image"), "page.tsv": (b"<html>\n", "which column"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_34_bad_caption_files_through_four_commands(name, tmp_path, monkeypatch, tiny_config):
    data, reason = FILES[name]
    (tmp_path / "a.png").write_bytes(saved(noise(), "PNG"))
    (tmp_path / name).write_bytes(data)
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config.to_dict()))
    file, out = str(tmp_path / name), str(tmp_path / "out")
    tiny = str(tmp_path / "tiny.json")
    for how in ("stop", "skip"):
        for main, command in (
            (train.main, ["--model", tiny, "--train_file", file, "--output_dir", out, "--use_cpu"]),
            (evaluate.main, ["--model", tiny, "--eval_file", file]), (repack.main, [file, f"{out}.csv"]),
        ):  # fmt: skip
            if how == "skip" and name == "bare.jsonl":  # one of its lines is sound
                continue
            with pytest.raises(InputError, match=f"{name}(.|\n)*({reason})"):
                main([*command, "--on_bad_sample", how])
    assert len(FILES) == 34


def test_what_looks_bad_in_a_caption_file_and_is_not(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(noise(), "PNG"))
    records = [{"image": "a.png", "caption": "x\0y"}]
    for name, data in {
        "bom.json": b"\xef\xbb\xbf" + json.dumps(records).encode(),
        "bom.csv": b"\xef\xbb\xbfimage,caption\na.png,x\0y\n",
        "mac.csv": b"image,caption\ra.png,x\0y\r", "windows.csv": b"image,caption\r\na.png,x\0y\r\n",
        "deep.json": f'[{{"image": "a.png", "caption": "x\\u0000y", "id": {"[" * 100}{"]" * 100}}}]'.encode(),
        "nan.json": b'[{"image": "a.png", "caption": "x\\u0000y", "score": NaN, "most": -Infinity}]',
        "again.jsonl": b'{"image": "a.png", "caption": "x\\u0000y"}\n\n',
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        assert read_source(str(tmp_path / name)) == [{"image": str(tmp_path / "a.png"), "caption": ["x\0y"]}], name


def test_the_same_picture_in_several_records(corpus, tmp_path, caplog, tiny_model):
    """One image of the gallery in evaluation, duplicates in training; both say so."""
    folder = corpus[0]
    names = ["UPPER.PNG", "turned 1.jpg", "folder.png/../UPPER.PNG", "UPPER.PNG"]
    texts = [["a", "a"], ["b"], ["c", "a"], ["a", "a"]]
    file = folder / "again.json"
    file.write_text(json.dumps([{"image": name, "caption": text} for name, text in zip(names, texts)]))
    tiny_model.save_pretrained(tmp_path / "model")
    evaluate.main(["--model", str(tmp_path / "model"), "--eval_file", str(file), "--device", "cpu", "--save_features",
                   str(tmp_path / "features"), "--output_file", str(tmp_path / "r.json")])  # fmt: skip
    assert "again.json: merged 1 records that repeat an image and dropped 4 repeated captions" in caplog.text
    assert [len(np.load(tmp_path / "features" / f"{kind}.npy")) for kind in ("image", "text")] == [2, 3]
    said = "; 1 records repeat the image of another: duplicates (--duplicates)"
    assert describe(read_source(str(file)), Tokenizer()).endswith(said)


def test_folders_with_rings_of_links_and_worse(tmp_path):
    folder = tmp_path / "f"
    (folder / "d").mkdir(parents=True)
    for name in ("a.png", "b.png", "d/c.png", "e.png", "g.png", "../outside.png", "back\\slash.png"):
        (folder / name).write_bytes(saved(noise(), "PNG"))
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    (folder / "d" / "up").symlink_to("..")
    (folder / "again").symlink_to("d")
    (folder / "out").symlink_to("..")
    (folder / "ring").symlink_to("ring")
    for name in ("b.txt", "e.txt", "g.txt"):
        (folder / name).unlink()
    os.mkfifo(folder / "b.txt")
    (folder / "e.txt").symlink_to("../outside.txt")
    (folder / "g.txt").write_bytes(b"\xff\xfe\0")
    with pytest.raises(InputError) as caught:
        read_source(str(folder))
    said = str(caught.value)
    assert "6 of 9 records" in said
    for reason in (
        "d/up: a second path to a folder", "again: a second path", "out: a link out of the image", "g.png: g.txt: the",
        "b.png: 'b.txt': a device or a pipe", "e.png: e.txt: a link leads out",
    ):  # fmt: skip
        assert reason in said
    with pytest.warns(UserWarning, match="The other 3 are used"):
        records = read_source(str(folder), SKIP)
    names = ("a.png", "back\\slash.png", "d/c.png")
    assert sorted(record["caption"][0] for record in records) == [f"caption of {name}" for name in names]
    (folder / "link").symlink_to(folder)
    (tmp_path / "root").symlink_to(folder)  # the root may be a link itself
    with pytest.warns(UserWarning, match="The other 3 are used"):
        assert len(read_source(str(tmp_path / "root"), SKIP)) == 3


def test_bad_shards_stop_or_are_left_out_and_listed(tmp_path):
    picture = saved(noise(), "PNG")
    names = ["../../up", "/abs", "new\nline", "sp ace", os.fsdecode(b"by\xfftes"), "\U0001f415", "z" * 300]
    with tarfile.open(tmp_path / "names.tar", "w") as tar:
        for name in names:
            add_sample(tar, name, picture, "png", [f"caption of {len(name)}"])
    records = read_source(str(tmp_path / "names.tar"))
    assert [record["caption"] for record in records] == [[f"caption of {len(name)}"] for name in names]
    assert all(open_image(record["image"]).size == (40, 30) for record in records)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".npz"] == ["names.tar"]  # nothing was unpacked

    whole = (tmp_path / "names.tar").read_bytes()
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name, data in (("a.png", picture), ("a.txt", b"one"), ("a.txt", b"two"), ("a.json", DEEP.encode()),
                           ("b.png", picture), ("b.json", DEEP.encode()), ("c.png", b"<html>"),
                           ("c.txt", b"three")):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind in (("d.png", tarfile.SYMTYPE), ("e.png", tarfile.FIFOTYPE), ("f.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "zero.tar").write_bytes(b"")
    spec = f"{tmp_path}/{{names,twice,cut,zero,missing}}.tar"
    with pytest.raises(InputError, match="missing.tar"):
        read_source(spec)
    spec = f"{tmp_path}/{{names,twice,cut}}.tar"
    with pytest.raises(
        InputError, match="a.txt: a second .txt(.|\n)*b.json: invalid JSON: nested(.|\n)*cut.tar.*cut off"
    ):
        read_source(spec)
    bad = BadSamples()
    with pytest.warns(UserWarning, match="d.png: not a file but a link"):
        source = read_source(spec, replace(SKIP, check_handles=True, bad_samples=bad))
    bad.open(tmp_path / "bad_samples.jsonl")
    named = {line["sample"].removeprefix(f"{tmp_path}/") for line in listed(bad.path)}
    assert {"twice.tar: a.txt", "twice.tar: d.png", "twice.tar: e.png", "twice.tar: f.png"} < named
    assert len(bad) == len(listed(bad.path)) and len(source) >= len(names) + 1
    for size in range(0, len(whole), 997):  # wherever it is cut off
        (tmp_path / "some.tar").write_bytes(whole[:size])
        try:
            assert len(read_source(str(tmp_path / "some.tar"))) == len(names)  # nothing but zeros was lost
        except InputError as error:
            assert "some.tar" in str(error) and size < len(whole.rstrip(b"\0")) + 1024


def test_bad_tables_stop_or_are_left_out(tmp_path):
    picture = saved(noise(), "PNG")
    (tmp_path / "t" / "sub").mkdir(parents=True)
    for name in ("t/a.png", "outside.png"):
        (tmp_path / name).write_bytes(picture)
    (tmp_path / "t" / "link.png").symlink_to("../outside.png")
    os.mkfifo(tmp_path / "t" / "pipe.png")
    images = ["a.png", "../outside.png", str(tmp_path / "outside.png"), "link.png", "pipe.png", "sub", "", None]
    images += ["a\0.png", "a.png"]
    rows = datasets.Dataset.from_dict({"image": images, "caption": ["x"] * 9 + [None]})
    rows.to_parquet(tmp_path / "t" / "t.parquet")
    spec = str(tmp_path / "t" / "t.parquet")
    with pytest.raises(InputError, match="1 of 10 rows(.|\n)*row 9: a.png: caption 0 is not text: None"):
        read_source(spec)
    with pytest.warns(UserWarning, match="1 of 10 rows"):
        source = read_source(spec, SKIP)
    reasons = [
        "leads out",
        "leads out",
        "a link leads",
        "a pipe",
        "a folder",
        "expected an image, found ''",
        "expected an image, found None",
        "NUL",
    ]
    for row, reason in enumerate(reasons, 1):
        with pytest.raises(ImageError, match=f"row {row}: .*{reason}"):
            open_image(source[row]["image"])
    assert open_image(source[0]["image"]).size == (40, 30)
    with pytest.warns(UserWarning, match="8 of 9 images are damaged"):
        assert len(read_source(spec, replace(SKIP, check_handles=True))) == 1
    with pytest.warns(UserWarning, match="5 of 9 images are damaged"):
        assert len(read_source(spec, replace(SKIP, check_handles=True, allow_outside_image_root=True))) == 4
    data = (tmp_path / "t" / "t.parquet").read_bytes()
    head = data[:4] + bytes(99) + data[-4:]
    for name, broken in (("cut", data[:-20]), ("empty", b""), ("page", b"<html>"), ("head", head)):
        (tmp_path / f"{name}.parquet").write_bytes(broken)
        with pytest.raises(InputError, match=f"{name}.parquet"):
            read_source(str(tmp_path / f"{name}.parquet"))


@pytest.mark.parametrize("how", ["stop", None])
def test_a_bad_sample_first_met_in_training(how, tmp_path, tiny_config, monkeypatch, capsys):
    """It ends the run where that was said, also from a data-loader process; else the next one takes its place."""
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        for number in range(16):
            data = b"<html>" if number == 5 else saved(noise(), "PNG")
            add_sample(tar, f"{number:03d}", data, "png", [f"picture {number}"])
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config.to_dict()))
    command = ["train.py", "--model", tmp_path / "tiny.json", "--train_file", tmp_path / "000.tar", "--use_cpu",
               "--output_dir", tmp_path / "run", "--per_device_train_batch_size", "8", "--num_train_epochs", "2",
               "--dataloader_num_workers", "2", "--disable_tqdm", "true", "--report_to", "none"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*map(str, command), *(["--on_bad_sample", how] if how else [])])
    if how:
        with pytest.raises(SystemExit, match=rf"^train.py: {tmp_path}/000.tar: 005.png: not an image [^\n]*$"):
            run(train.main)
        return
    run(train.main)
    lines = listed(tmp_path / "run" / "bad_samples.jsonl")
    assert [line["sample"] for line in lines] == [f"{tmp_path}/000.tar: 005.png"] * len(lines)
    assert len(lines) >= 2 and [line["when"] for line in lines] == sorted(line["when"] for line in lines)
    assert f"bad samples were skipped {len(lines)} times: {tmp_path}/run/bad_samples.jsonl" in capsys.readouterr().out


def test_lines_of_several_processes_do_not_mix(tmp_path):
    code = (
        "import sys; from miniclip.utils.bad_samples import BadSamples\n"
        "bad = BadSamples(); bad.open(sys.argv[1], write=False)\n"
        "for n in range(500): bad.add(f'{sys.argv[2]} {n}', sys.argv[2] * 300, 'epoch 0')"
    )
    command = [sys.executable, "-c", code, tmp_path / "b.jsonl"]
    running = [subprocess.Popen([*command, name], cwd=ROOT) for name in "abcd"]
    assert [process.wait(60) for process in running] == [0] * 4
    lines = listed(tmp_path / "b.jsonl")
    assert {line["sample"] for line in lines} == {f"{name} {n}" for name in "abcd" for n in range(500)}
    assert len(lines) == 2000 and all(line["reason"] == line["sample"][0] * 300 for line in lines)


def test_a_run_that_goes_on_keeps_the_list_and_a_new_one_drops_it(tmp_path):
    path = tmp_path / "run" / "bad_samples.jsonl"
    runs = (False, "a", "a"), (True, "b", "ab"), (True, "a", "ab"), (False, "c", "c"), (False, "", "")
    for go_on, more, expected in runs:
        bad = BadSamples()
        for name in more:
            bad.add(name, "x")
        bad.open(path, go_on=go_on)
        assert "".join(line["sample"] for line in listed(path)) == expected if expected else not path.exists()
        if expected == "ab":
            path.write_text(path.read_text() + '{"sample": "cut o')  # by a full disk


def test_every_point_at_which_a_picture_may_be_cut_off():
    tried = 0
    for data in pictures():
        for size in range(0, len(data), max(1, len(data) // 40)):
            usable(data[:size])
            tried += 1
    assert tried > 1300


def bpe_by_definition(ids: tuple[int, ...], merges: dict) -> tuple[int, ...]:
    """Joins neighbours, always everywhere the pair that was learned first, until no pair is known."""
    while len(ids) > 1:
        pair = min(pairwise(ids), key=lambda pair: merges.get(pair, 1 << 30))
        if pair not in merges:
            break
        joined, i = [], 0
        while i < len(ids):
            found = ids[i : i + 2] == pair
            joined.append(merges[pair] if found else ids[i])
            i += 2 if found else 1
        ids = tuple(joined)
    return ids


def test_long_words_are_encoded_fast_and_alike():
    """A hundred thousand letters without a space took minutes, as many digits seconds."""
    from miniclip.tokenizer import bpe, load_table

    table, merges, _ = load_table()
    rng = np.random.default_rng(0)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    for length, letters in ((1, "a"), (2, "ab"), (30, "ab"), (190, "etaoin"), (200, "aab"), (150, alphabet)):
        word = "".join(rng.choice(list(letters), length))
        ids = tuple(table[byte] for byte in word.encode())
        ids = (*ids[:-1], ids[-1] + 256)
        assert bpe(ids, merges) == bpe_by_definition(ids, merges), word
    text = "".join(rng.choice(list(alphabet), 100_000))
    start = datetime.datetime.now()
    assert Tokenizer().decode(Tokenizer().encode(text)) == text
    assert (datetime.datetime.now() - start).total_seconds() < 20
    for piece in ("\ud800", "<|endoftext|>", "&amp;", "\0", "é", "日本", "9", "!?"):
        row = Tokenizer()(piece * (100_000 // len(piece)))[0]
        assert row[0] == 49406 and row.tolist().count(49407) == 1


@pytest.mark.skipif(not os.path.isfile("/proc/self/mem"), reason="there is no file here that cannot be read")
def test_a_file_that_cannot_be_read_is_named_with_a_cache_and_without(tiny_model):
    cache = FeatureCache.for_images(None, tiny_model, preprocess := Preprocess(PreprocessConfig(size=32)))
    for how in ({}, {"cache": cache}):
        with pytest.raises(ImageError, match=r"/proc/self/mem: cannot be opened \("):
            embed_images(tiny_model, preprocess, ["/proc/self/mem"], **how)


def test_odd_pictures_are_right_not_only_read(tmp_path):
    sound = sound_pictures()
    for turn in range(1, 9):
        (tmp_path / f"{turn}.jpg").write_bytes(sound[f"turned {turn}.jpg"])
        assert open_image(tmp_path / f"{turn}.jpg").size == ((40, 30) if turn < 5 else (30, 40))
    cfg = PreprocessConfig(size=16)
    for name in ("big endian.tif", "16 bit.png"):
        (tmp_path / "x").write_bytes(sound[name])
        levels = np.asarray(open_image(tmp_path / "x"))[:, :, 0]
        assert abs(levels.astype(int) - np.arange(1200).reshape(30, 40) * 54 / 257).max() < 1, name
    (tmp_path / "x").write_bytes(sound["strip.png"])
    assert Preprocess(cfg).load(tmp_path / "x").shape == (3, 16, 16)
