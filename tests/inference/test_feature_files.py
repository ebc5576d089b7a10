"""Embeddings made elsewhere: under which names and in which forms they are read, and what is refused."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import evaluate
from miniclip.inference.feature_files import is_kind, read_features
from miniclip.retrieval import retrieval_metrics
from miniclip.utils.errors import InputError


def unit(n: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


IMAGE, TEXT = unit(6), unit(12, 1)


def npz(path, **arrays):
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def clip_retrieval(folder):
    for kind, rows in (("img", IMAGE), ("text", TEXT)):
        (folder / f"{kind}_emb").mkdir()
        for part in range(3):  # as float16, as it writes them
            piece = rows[part * len(rows) // 3 : (part + 1) * len(rows) // 3].astype(np.float16)
            np.save(folder / f"{kind}_emb" / f"{kind}_emb_{part}.npy", piece)


def eleven_parts(folder):
    for part in range(11):  # 10 comes after 9, not after 1
        np.save(
            folder / f"image_embeds_{part}.npy",
            IMAGE[part : part + 1] if part < 5 else IMAGE[5:] if part > 9 else IMAGE[:0],
        )
    np.save(folder / "text_embeds.npy", TEXT)


FORMS = {
    "plain": lambda f: [np.save(f / f"{n}.npy", x) for n, x in (("image", IMAGE), ("text", TEXT), ("images", TEXT))],
    "transformers": lambda f: (np.save(f / "image_embeds.npy", IMAGE), np.save(f / "text_embeds.npy", TEXT)),
    "float16": lambda f: (np.save(f / "image_features.npy", np.float16(IMAGE)), np.save(f / "text_features.npy", TEXT)),
    "fortran, big-endian": lambda f: (
        np.save(f / "img_feats.npy", np.asfortranarray(IMAGE)), np.save(f / "captions.npy", TEXT.astype(">f8")),
    ),
    "captions of each image": lambda f: (
        np.save(f / "image.npy", IMAGE[:, None]), np.save(f / "text.npy", TEXT.reshape(6, 2, 8)),
    ),
    "tensors": lambda f: (
        torch.save(torch.tensor(IMAGE), f / "images.pt"), torch.save(torch.tensor(TEXT), f / "texts.pth"),
    ),
    "a dict beside ids": lambda f: (
        torch.save({"image_features": torch.tensor(IMAGE), "ids": torch.arange(6), "names": ["a"]}, f / "img.pt"),
        npz(f / "txt.npz", arr_0=TEXT),
    ),
    "one npz": lambda f: npz(f / "all.npz", imageFeatures=IMAGE, text_features=TEXT, paths=np.array([None], object)),
    "one safetensors": lambda f: save_file(
        {"image_embeds": torch.tensor(IMAGE), "text_embeds": torch.tensor(TEXT)}, f / "e.safetensors"
    ),
    "clip-retrieval": clip_retrieval,
    "eleven parts": eleven_parts,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_usual_names_and_forms(form, tmp_path):
    FORMS[form](tmp_path)
    (tmp_path / "notes.txt").write_text("not an array")
    images, texts, records = read_features(tmp_path, None)
    for found, expected in ((images, IMAGE), (texts, TEXT)):
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert np.abs(found - expected).max() <= (1e-3 if form in ("float16", "clip-retrieval") else 1e-7)
    assert [len(record["caption"]) for record in records] == [2] * 6
    if form.startswith("one "):  # the file itself can be named too
        (file,) = (path for path in tmp_path.iterdir() if path.suffix != ".txt")
        assert np.array_equal(read_features(file, None)[1], texts)


def test_arrays_are_measured_without_torch(tmp_path, run_script):
    """It would take longer than all the rest; only files of tensors need it."""
    np.save(tmp_path / "image.npy", IMAGE)
    np.save(tmp_path / "text.npy", TEXT)
    code = (
        "import sys, evaluate\n"
        "evaluate.main(sys.argv[1:])\n"
        "print('END', *{'torch', 'transformers', 'safetensors', 'ftfy', 'matplotlib'} & set(sys.modules))"
    )
    table = tmp_path / "table.md"
    done = run_script("-c", code, "--features", tmp_path, "--output_file", tmp_path / "r.json", "--table", table)
    assert "6 images, 12 captions" in done.stdout and done.stdout.endswith("END\n"), done.stdout
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert metrics == retrieval_metrics(IMAGE, TEXT, np.arange(12) // 2) and table.is_file()


def test_bfloat16_tensors(tmp_path):
    for kind, rows in (("image", IMAGE), ("text", TEXT)):
        torch.save(torch.nn.Parameter(torch.tensor(rows, dtype=torch.bfloat16)), tmp_path / f"{kind}.pt")
    images, _, _ = read_features(tmp_path, None, normalize=True)
    assert np.abs(images - IMAGE).max() < 1e-2 and np.abs(np.linalg.norm(images, axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_other_lengths_are_normalized_or_refused_with_the_fix(dtype, tmp_path):
    np.save(tmp_path / "image.npy", np.float16(IMAGE))
    np.save(tmp_path / "text.npy", (100 * TEXT).astype(dtype))
    with pytest.raises(InputError, match=r"text.npy: row \d+ has the length \d+(\.\d+)?, not 1: add --normalize"):
        read_features(tmp_path, None)
    _, texts, _ = read_features(tmp_path, None, normalize=True)
    assert np.abs(np.linalg.norm(texts, axis=1) - 1).max() < 1e-6 and (texts * TEXT).sum(1).min() > 0.999
    np.save(tmp_path / "text.npy", TEXT * (np.arange(12) != 3)[:, None])
    with pytest.raises(InputError, match="text.npy: row 3 is zero"):
        read_features(tmp_path, None, normalize=True)


class Evil:
    def __reduce__(self):
        return print, ("CODE RAN",)


def huge(shape) -> bytes:
    """A .npy file whose header declares a shape that its 32 bytes do not have."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(32)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", bytes(64 << 20))


BAD = {
    "pickled array": (lambda f: np.save(f / "image.npy", np.array([Evil()], object)), "image.npy is a pickled array"),
    "pickle": (lambda f: (f / "image.npy").write_bytes(pickle.dumps(Evil())), "image.npy is a pickle, which could run"),
    "pickled in npz": (lambda f: npz(f / "image.npz", x=np.array([Evil()], object)), "image.npz is a pickled array"),
    "pickled tensor": (lambda f: torch.save({"image": Evil()}, f / "image.pt"), "it asks for .*print"),
    "huge": (lambda f: (f / "image.npy").write_bytes(huge((1 << 40, 512))), r"damaged.*32 bytes for the shape"),
    "negative": (lambda f: (f / "image.npy").write_bytes(huge((-2, -4))), "damaged"),
    "cut off": (lambda f: (f / "image.npy").write_bytes(huge((3, 8))), "damaged"),
    "bomb": (lambda f: bomb(f / "image.npz"), "image.npz is refused: unpacked it would be far larger"),
    "repeated view": (lambda f: torch.save(torch.ones(1).expand(9000, 9000), f / "image.pt"), "larger than the file"),
    "web page": (lambda f: (f / "image.npy").write_bytes(b"<!DOCTYPE html>"), "begins with b'<!DOCTYP'"),
    "empty": (lambda f: (f / "image.npy").touch(), "damaged"),
    "no rows": (lambda f: np.save(f / "image.npy", IMAGE[:0]), r"one row for each image.*\(0, 8\)"),
    "one row": (lambda f: np.save(f / "image.npy", IMAGE[0]), r"one row for each image.*\(8,\)"),
    "strings": (lambda f: np.save(f / "image.npy", np.array(["a", "b"])), "not real numbers"),
    "complex": (lambda f: np.save(f / "image.npy", IMAGE + 0j), "holds complex64, not real numbers"),
    "two": (lambda f: [np.save(f / f"{n}.npy", IMAGE) for n in ("b32_img", "l14_img")], "which of .* is meant"),
    "two keys": (lambda f: npz(f / "image.npz", b32_img=IMAGE, l14_img=IMAGE), "b32_img, l14_img could be the image"),
    "missing part": (lambda f: [np.save(f / f"image_{n}.npy", IMAGE) for n in (0, 2)], "a part is missing"),
    "widths": (lambda f: [np.save(f / f"image_{n}.npy", IMAGE[:, n:]) for n in (0, 1)], "parts of different widths"),
    "unknown name": (lambda f: np.save(f / "x.npy", IMAGE), r"no image.npy in .*in it: text.npy, x.npy"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_what_is_refused_is_named_in_a_line(bad, tmp_path, capfd):
    write, message = BAD[bad]
    np.save(tmp_path / "text.npy", TEXT)
    write(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        read_features(tmp_path, None)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert "CODE RAN" not in "".join(capfd.readouterr())


def test_rows_of_a_caption_file_that_repeats_images(tmp_path):
    """As they are listed, or merged, as evaluate.py --save_features writes them."""
    rows = [("a", "x"), ("b", "y"), ("a", "z"), ("a", "x")]
    records = [{"image": f"/{image}.jpg", "caption": [text]} for image, text in rows]
    for images, texts, expected in ((4, 4, rows), (2, 3, [("a", "x z"), ("b", "y")])):
        np.save(tmp_path / "image.npy", unit(images))
        np.save(tmp_path / "text.npy", unit(texts))
        found = read_features(tmp_path, records)[2]
        assert [(r["image"][1:2], " ".join(r["caption"])) for r in found] == expected
    np.save(tmp_path / "image.npy", unit(12))
    with pytest.raises(InputError, match="12 image embeddings for 4 images$"):
        read_features(tmp_path, records)
    with pytest.raises(InputError, match="12 image embeddings for 6 images: that is one for each caption"):
        read_features(tmp_path, [{"image": f"/{i}.jpg", "caption": ["x", "y"]} for i in range(6)])


def test_names():
    for name in (
        "image",
        "images",
        "img_emb",
        "imageFeatures",
        "image_embeds",
        "test_image_features",
        "image_feats_val",
    ):
        assert is_kind(name, "image") and not is_kind(name, "text"), name
    for name in ("image_ids", "image_paths", "imagenet", "metadata", "text_embeds", "logits"):
        assert not is_kind(name, "image"), name


def test_an_eval_file_needs_no_images(tmp_path, capsys):
    """The images may be anywhere, or nowhere. Only the report shows them."""
    np.save(tmp_path / "image.npy", IMAGE)
    np.save(tmp_path / "text.npy", TEXT)
    names = ["/data/of/others/0.jpg", "../1.jpg", "C:\\photos\\2.jpg", "3.jpg", "4", "https://a.b/5.jpg"]
    lines = [json.dumps({"filepath": x, "title": f"{x} {c}"}) for x in names for c in "ab"]
    (tmp_path / "c.json").write_text(json.dumps([{"image": x, "caption": [f"{x} a", f"{x} b"]} for x in names]))
    (tmp_path / "c.csv").write_text("image,caption\n" + "".join(f"{x},{x} {c}\n" for x in names for c in "ab"))
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    results = []
    for file in ("c.json", "c.csv", "c.jsonl"):
        argv = ["--features", str(tmp_path), "--eval_file", str(tmp_path / file), "--output_file"]
        evaluate.main([*argv, str(tmp_path / f"{file}.result")])
        assert "6 images, 12 captions" in capsys.readouterr().out
        results.append(json.loads((tmp_path / f"{file}.result").read_text())["metrics"])
    assert results[0] == results[1] == results[2]
    with pytest.raises(InputError, match="leads out of the image folder"):
        evaluate.main([*argv, str(tmp_path / "r.json"), "--report", str(tmp_path)])
