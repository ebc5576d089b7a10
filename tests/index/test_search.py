"""Image search: what is found, what an index has after any change or kill, what is refused, what is written."""

import base64
import io
import json
import pickle
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import miniclip
from miniclip.commands.search import describe
from miniclip.datasets.records import ImageRoot
from miniclip.index import build
from miniclip.index.build import update
from miniclip.index.image_index import ImageIndex, ImageIndexError
from miniclip.index.neighbours import Neighbours, choose, exact
from miniclip.index.parts import export, merge
from miniclip.index.search import Found, ImageSearch, split_minus, unit
from miniclip.inference.embed import embed_patches, embed_words
from miniclip.inference.fast import inference_copy
from miniclip.inference.late_interaction import maxsim
from miniclip.model import VisionTransformer
from miniclip.reports.contact_sheet import write_sheet
from miniclip.towers.tokens import add_tokens
from miniclip.utils.errors import InputError
from miniclip.utils.files import sha256
from tests.conftest import ROOT
from tests.survival_worker import over

SEARCH = ("-m", "miniclip", "search")


def picture(path: Path, seed: int, size=(40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(levels).resize(size, Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def album(tiny_model, tmp_path):
    """A model and eight pictures in two folders; gives how to index them."""
    tiny_model.save_pretrained(tmp_path / "model")
    for number in range(8):
        picture(tmp_path / "pictures" / ("deep/er" if number % 2 else ".") / f"{number}.png", number)
    loaded = miniclip.load(tmp_path / "model")

    def index(folder="products.mc", pictures="pictures", model=loaded, **how):
        named = {"name": str(tmp_path / "model"), "pretrained": None}
        return update(tmp_path / pictures, tmp_path / folder, *model, named, num_workers=0, **how)

    index.folder, index.loaded, index.pictures = tmp_path, loaded, tmp_path / "pictures"
    return index


def listed(folder: Path) -> set[str]:
    return set(ImageIndex(folder, check=True).files())


def check_vectors(index, folder: Path):
    """Each file has the vector that the model makes of it now."""
    opened = ImageIndex(folder, check=True)
    names = list(opened.files())
    paths = [str(index.pictures / name) for name in names]
    wanted = miniclip.embed_images(index.loaded[0], index.loaded[1], paths)
    row = {name: row for name, row in zip(opened.table["path"].to_pylist(), opened.rows)}
    assert np.abs(opened.vectors[[row[name] for name in names]] - wanted).max() < 1e-5


def test_pictures_are_found_by_themselves_and_texts_as_the_model_scores_them(album):
    album()
    search = miniclip.ImageSearch(album.folder / "products.mc", album.loaded)
    assert len(search) == 8
    for number in range(8):
        name = f"deep/er/{number}.png" if number % 2 else f"{number}.png"
        best = search.query(image=album.pictures / name, k=1)
        assert best[0].path == name and best[0].score == pytest.approx(1, abs=1e-5) and best[0].rank == 1
    found = search.query("a red dress", k=20)
    assert [one.rank for one in found] == list(range(1, 9)), "no more than there are"
    model, preprocess, tokenizer = album.loaded
    paths = [search.file(one.path) for one in found]
    text = miniclip.embed_texts(model, tokenizer, ["a red dress"])[0]
    scores = miniclip.embed_images(model, preprocess, paths) @ text
    assert [one.score for one in found] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)


def test_texts_pictures_and_minus_make_one_vector_by_the_formula(album):
    album()
    search = miniclip.ImageSearch(album.folder / "products.mc", album.loaded)
    model, preprocess, tokenizer = album.loaded
    red, dress, blue = miniclip.embed_texts(model, tokenizer, ["red", "a dress", "blue"])
    shown = miniclip.embed_images(model, preprocess, [album.pictures / "0.png"])[0]
    both = unit(0.5 * unit(red + dress) + 0.5 * shown - 0.5 * blue)
    assert search.vector(["red", "a dress"], album.pictures / "0.png", "blue") == pytest.approx(both, abs=1e-5)
    weights = {"image_weight": 0.2, "minus_weight": 0.1}
    wanted = unit(0.8 * red + 0.2 * shown - 0.1 * blue)
    found = search.vector("red", [album.pictures / "0.png"], ["blue"], **weights)
    assert found == pytest.approx(wanted, abs=1e-5)
    spoken = search.query("red -blue", image=album.pictures / "0.png", k=8, **weights)
    assert [one.path for one in spoken] == [one.path for one in search.nearest(wanted, 8)]
    texts = ["red dress -floral -x1", "a t-shirt - 3 -5"]
    assert split_minus(texts) == (["red dress", "a t-shirt - 3 -5"], ["floral", "x1"])
    for nothing in ({"text": ""}, {"text": "-red"}, {"minus": "red"}):
        with pytest.raises(InputError, match="the query is empty"):
            search.query(**nothing)
    with pytest.raises(InputError, match="image_weight 2"):
        search.query("red", image=album.pictures / "0.png", image_weight=2)
    with pytest.raises(InputError, match="cancels the query"):
        search.query("red -red", minus_weight=1)
    for weights in ({"image_weight": 7}, {"minus_weight": float("inf")}):
        with pytest.raises(InputError, match="must be from 0 to 1"):
            search.query("red", **weights)
    with pytest.raises(InputError, match="k is 0"):
        search.query("red", k=0)


def test_changes_of_files_are_followed_by_content(album, monkeypatch):
    monkeypatch.setattr("miniclip.index.build.SETTLED", 1 << 62)  # whatever passes between two runs
    assert album()["encoded"] == 8
    pictures, folder = album.pictures, album.folder / "products.mc"
    picture(pictures / "new.JPG", 100)
    picture(pictures / "0.png", 101)  # another content under the same name
    (pictures / "1").mkdir()
    (pictures / "2.png").rename(pictures / "1" / "moved.png")
    (pictures / "4.png").unlink()
    (pictures / "copy.png").write_bytes((pictures / "6.png").read_bytes())
    (pictures / "broken.png").write_bytes((pictures / "6.png").read_bytes()[:60])
    (pictures / "note.txt").write_text("no picture")
    (pictures / ".hidden.png").write_bytes(b"")
    changes = album()
    wanted = {"added": 3, "changed": 1, "removed": 2, "unchanged": 5, "bad": 1, "encoded": 2, "resumed": 0, "kept": 0}
    assert dict(changes) == wanted
    names = {"0.png", "1/moved.png", "6.png", "copy.png", "new.JPG", *(f"deep/er/{n}.png" for n in (1, 3, 5, 7))}
    assert listed(folder) == names
    check_vectors(album, folder)
    opened = ImageIndex(folder)
    assert list(opened.bad) == ["broken.png"] and "damaged" in opened.bad["broken.png"]
    assert opened.about["pictures"] == len(opened) == 8 and opened.about["copies"] == 1 and opened.about["bad"] == 1
    search = miniclip.ImageSearch(folder, album.loaded)
    assert search.query(image=pictures / "copy.png", k=1)[0].copies == ["copy.png"]
    generation = opened.about["generation"]
    assert album()["encoded"] == 0 and ImageIndex(folder).about["generation"] == generation, "nothing has changed"
    (pictures / "broken.png").unlink()
    assert album()["bad"] == 0 and ImageIndex(folder).bad == {}
    left = [".lock", f"generation-{int(generation[-6:]) + 1:06d}", "index.json"]
    assert sorted(path.name for path in folder.iterdir()) == left


def test_a_folder_of_pictures_is_no_place_for_an_index(album, tmp_path):
    """Whatever its folders are called: months, years, the names of an index's own."""
    for name in ("2023", "202401", "generation-2", "under-way"):
        picture(tmp_path / "mine" / name / "a.png", 5)
    before = sorted(tmp_path.rglob("*"))
    for folder in ("pictures", "mine", "mine/2023"):
        with pytest.raises(ImageIndexError, match="must contain nothing but the index, and has"):
            album(folder)
    album("a.mc", "pictures/deep")
    with pytest.raises(ImageIndexError, match="must contain nothing but the index"):
        merge([tmp_path / "a.mc"], tmp_path / "mine")
    assert [path for path in sorted(tmp_path.rglob("*")) if "a.mc" not in str(path)] == before
    (tmp_path / "a.mc" / "202401").mkdir()
    with pytest.raises(ImageIndexError, match="'202401'"):
        album("a.mc", "pictures/deep")
    assert (tmp_path / "a.mc" / "202401").is_dir()


def test_a_folder_that_cannot_be_opened_loses_nothing(album, monkeypatch, shut_folder):
    album()
    (album.pictures / "0.png").unlink()
    shut_folder("deep")
    changes = album()
    assert (changes["kept"], changes["removed"], changes["unchanged"], changes["encoded"]) == (4, 1, 3, 0)
    assert len(listed(album.folder / "products.mc")) == 7
    assert ImageIndex(album.folder / "products.mc").bad == {"deep": "cannot be opened (Permission denied)"}
    monkeypatch.undo()
    assert album()["unchanged"] == 7 and ImageIndex(album.folder / "products.mc").bad == {}


def test_a_model_that_was_moved_is_found_again_after_an_update(album):
    album()
    index, folder = album.folder / "products.mc", album.folder
    (folder / "model").rename(folder / "moved")
    with pytest.raises(InputError, match="Pass it as --model"):
        ImageSearch(index)
    named = {"name": str(folder / "moved"), "pretrained": None}
    found = update(album.pictures, index, *album.loaded, named, num_workers=0)
    assert found["unchanged"] == 8 and not found["encoded"]
    assert len(ImageSearch(index).query("red", k=3)) == 3


def test_a_query_in_words_waits_for_no_batchnorms(album, monkeypatch):
    album()
    fused = []
    monkeypatch.setattr(VisionTransformer, "for_inference", lambda tower: fused.append(1) or tower)
    search = ImageSearch(album.folder / "products.mc", album.loaded)
    pickle.loads(pickle.dumps(search)).query("red")  # it goes to other processes
    search.query("red")
    assert not fused
    for _ in range(2):
        search.query("red", image=album.pictures / "0.png")
    assert len(fused) == 1, "once, for the first image"


def test_a_model_that_computes_nan_makes_no_index(album):
    album.loaded[0].visual.proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="VisionTransformer computes NaN or infinity for 8 of 8 inputs in fp32: its"):
        album()
    assert not (album.folder / "products.mc" / "index.json").exists()


def test_a_picture_is_read_from_whichever_file_still_has_it(album):
    from miniclip.index.build import IndexedImage
    from miniclip.utils.image_files import ImageError

    one = IndexedImage(bytes.fromhex(sha256(album.pictures / "0.png")))
    one.paths = [str(album.pictures / "gone.png"), str(album.pictures / "2.png"), str(album.pictures / "0.png")]
    assert one.read() == (album.pictures / "0.png").read_bytes()
    one.paths.pop()
    with pytest.raises(ImageError, match="gone.png: it was changed or removed while it was read"):
        one.read()


def test_equal_pictures_come_in_one_order_however_many_are_asked_for(album):
    same = Image.open(album.pictures / "0.png").convert("RGB")
    for name in ("z.bmp", "y.tif", "x.tga", "w.ppm"):
        same.save(album.pictures / name)
    album()
    search = miniclip.ImageSearch(album.folder / "products.mc", album.loaded)
    found = [[one.path for one in search.query(image=album.pictures / "0.png", k=k)] for k in range(1, 14)]
    assert all(more[: len(fewer)] == fewer for fewer, more in zip(found, found[1:]))
    assert set(found[4]) == {"0.png", "z.bmp", "y.tif", "x.tga", "w.ppm"}


def test_a_file_of_the_same_size_and_time_is_seen_by_check(album):
    import os

    old = time.time() - 1000
    for path in album.pictures.rglob("*.png"):
        os.utime(path, (old, old))
    album()
    path = album.pictures / "0.png"
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(album.folder / "other.png")
    data, before = (album.folder / "other.png").read_bytes(), path.stat()
    path.write_bytes(data.ljust(before.st_size, b"\0")[: max(len(data), before.st_size)])
    os.utime(path, (old, old))
    assert album(check=True)["changed"] == 1
    check_vectors(album, album.folder / "products.mc")


@pytest.mark.parametrize("method", ["hnsw", "ivf"])
def test_a_graph_and_lists_follow_changes_too(album, method):
    for number in range(40):
        picture(album.pictures / "many" / f"{number}.png", 1000 + number)
    folder = album.folder / "products.mc"
    album(method=method)
    first = ImageIndex(folder)
    assert first.about["search"]["method"] == method and first.about["search"]["why"] == "as it was asked for"
    picture(album.pictures / "late.png", 5000)
    (album.pictures / "0.png").unlink()
    assert album(method=method)["encoded"] == 1
    grown = ImageIndex(folder)
    assert len(grown.vectors) == 49 and len(grown) == 48 and not grown.alive.all(), "it grew; the dead row stays"
    search = miniclip.ImageSearch(folder, album.loaded)
    found = search.query("anything", k=100)
    assert {one.path for one in found} <= listed(folder) and "0.png" not in listed(folder)
    assert search.query(image=album.pictures / "late.png", k=1)[0].path == "late.png"
    assert len(found) == 48, "as many as are asked for, whatever the effort"
    for number in range(20):
        (album.pictures / "many" / f"{number}.png").unlink()
    album()
    assert ImageIndex(folder).about["search"]["method"] == method, "as it was said the last time"
    assert ImageIndex(folder).alive is None and len(ImageIndex(folder).vectors) == 28, "built anew"
    check_vectors(album, folder)


def test_methods_are_chosen_by_number_and_measured():
    assert [choose(n)[0] for n in (1, 100_000, 100_001)] == ["exact", "exact", "ivf"]
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4000, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, alive = vectors[:50] + 0.1, np.arange(4000) % 3 > 0
    order = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")
    scores, rows = exact(vectors, queries, 10)
    assert np.array_equal(rows, order[:, :10]) and (np.diff(scores, axis=1) <= 0).all()
    living = np.array([[row for row in line if alive[row]][:10] for line in order])
    assert np.array_equal(exact(vectors, queries, 10, alive)[1], living)
    assert exact(vectors[:3], queries, 10)[1].shape == (50, 3)
    for method in ("hnsw", "ivf"):
        index = Neighbours.build(vectors, method)
        told = index.tune(vectors, alive, queries)
        found, got = index.find(vectors, queries, 10, alive)
        recall = np.mean([np.isin(line, some).mean() for line, some in zip(living, got)])
        assert told["recall@10"]["texts"] == pytest.approx(recall, abs=0.02) and recall >= 0.9
        assert alive[got].all() and np.allclose(found, np.einsum("qkd,qd->qk", vectors[got], queries), atol=1e-5)
        few = np.arange(4000) < 3  # where there are fewer than k
        scores, rows = index.find(vectors, queries, 10, few)
        assert rows.shape == (50, 3) and np.array_equal(np.sort(rows), np.tile([0, 1, 2], (50, 1)))
        assert np.array_equal(np.sort(index.find(vectors, queries[:2], 9999)[1]), np.arange(4000)[None].repeat(2, 0))
        one = Neighbours.build(vectors[:1], method)
        assert one.tune(vectors[:1], None, queries)["recall@10"] == {"pictures": 1, "texts": 1}
        with pytest.raises(OSError, match="No space left on device"):
            index.write("/dev/full")


def test_the_wrong_model_folder_or_shard_is_refused_by_name(album, tiny_config):
    from miniclip.model import MiniClip

    album()
    torch.manual_seed(1)
    other = MiniClip(tiny_config).eval()
    other.save_pretrained(album.folder / "other")
    index = album.folder / "products.mc"
    before = (index / "index.json").read_bytes()
    with pytest.raises(ImageIndexError, match="was made by the model .*model .*this is .*other .*cannot be compared"):
        miniclip.ImageSearch(index, album.folder / "other")
    with pytest.raises(ImageIndexError, match="was made by the model"):
        album(model=miniclip.load(album.folder / "other"))
    projected = miniclip.load(album.folder / "model")
    projected[0].visual.proj.weight.data[0, 0] += 1
    with pytest.raises(ImageIndexError, match="was made by the model"):
        miniclip.ImageSearch(index, projected)
    resized = miniclip.load(album.folder / "model")
    resized[1].cfg.crop_pct = 0.5
    with pytest.raises(ImageIndexError, match="was made by the model"):
        miniclip.ImageSearch(index, resized)
    picture(album.folder / "elsewhere" / "a.png", 1)
    with pytest.raises(ImageIndexError, match="not of .*elsewhere.*--moved"):
        album(pictures="elsewhere")
    with pytest.raises(ImageIndexError, match="is shard 1/1 of its images, not 2/3"):
        album(shard=(2, 3))
    (album.folder / "empty").mkdir()
    with pytest.raises(ImageIndexError, match="contains no images"):
        album(pictures="empty", moved=True)
    with pytest.raises(ImageIndexError, match="is not an index, it has no index.json"):
        ImageIndex(album.folder)
    assert (index / "index.json").read_bytes() == before
    assert album(pictures="elsewhere", moved=True)["encoded"] == 0, "one of its contents is known"


def test_what_is_damaged_is_found(album):
    album(method="hnsw")
    folder = album.folder / "products.mc"
    place = ImageIndex(folder).place
    names = sorted(path.name for path in place.iterdir())
    assert names == ["files.parquet", "keys.npy", "search.faiss", "texts.npy", "vectors.npy"]
    for name in names:
        data = bytearray((place / name).read_bytes())
        data[len(data) // 2] ^= 1
        whole = (place / name).read_bytes()
        (place / name).write_bytes(data)
        with pytest.raises(ImageIndexError, match=f"{name} is not what was written"):
            ImageIndex(folder)
        (place / name).unlink()
        with pytest.raises(ImageIndexError, match=f"{name} is missing"):
            ImageIndex(folder)
        (place / name).write_bytes(whole)
    about = json.loads((folder / "index.json").read_text())
    whole, was = (place / "search.faiss").read_bytes(), about["files"]["search.faiss"]
    (place / "search.faiss").write_bytes(whole[:-40])
    about["files"]["search.faiss"] = [(place / "search.faiss").stat().st_size, sha256(place / "search.faiss")]
    (folder / "index.json").write_text(json.dumps(about))
    with pytest.raises(ImageIndexError, match="search.faiss cannot be read"):
        ImageIndex(folder)
    (place / "search.faiss").write_bytes(whole)
    about["files"]["search.faiss"] = was
    for part in (about, about["model"], about["files"], about["search"]):
        for name in set(part) - {"search.faiss"}:
            for value in (None, [] if isinstance(part[name], str) else "x"):
                was, part[name] = part[name], value
                if (name, value) not in (("pretrained", None), ("pretrained", "x")):
                    (folder / "index.json").write_text(json.dumps(about))
                    with pytest.raises(ImageIndexError, match="index.json"):
                        ImageIndex(folder)
                part[name] = was
    for text in ("{", "[]", '{"format": 9}', (folder / "index.json").read_text().replace(place.name, "../../x")):
        (folder / "index.json").write_text(text)
        with pytest.raises(ImageIndexError, match="index.json"):
            ImageIndex(folder)


def test_nothing_outside_of_the_folder_is_indexed_or_shown(album, tmp_path):
    outside = picture(tmp_path / "secret" / "secret.png", 50)
    (album.pictures / "link.png").symlink_to(outside)
    (album.pictures / "folder").symlink_to(outside.parent)
    (album.pictures / "ring").symlink_to(album.pictures)
    album()
    index = ImageIndex(tmp_path / "products.mc")
    assert set(index.bad) == {"link.png", "folder", "ring"} and "leads out" in index.bad["link.png"]
    assert not any("secret" in path or "link" in path for path in index.files())
    found = [Found(1, 0.5, "../secret/secret.png", []), Found(2, 0.4, "link.png", []), Found(3, 0.3, "gone.png", [])]
    write_sheet(tmp_path / "sheet.html", "t", found, ImageRoot(album.pictures).file)
    text = (tmp_path / "sheet.html").read_text()
    assert "<img" not in text and text.count("leads out") == 2 and "no such file" in text
    album(allow_outside=True)
    assert {"link.png", "folder/secret.png"} & listed(tmp_path / "products.mc")


class Sheet(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.images, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        self.text += data


def test_the_sheet_needs_nothing_else_and_escapes_names(album, tmp_path):
    name = '<script>alert(1)<&">.png' if sys.platform != "win32" else "&.png"
    picture(album.pictures / name, 77, (900, 500))
    album()
    search = miniclip.ImageSearch(tmp_path / "products.mc", album.loaded)
    found = search.query("what", k=9)
    search.write_sheet(tmp_path / "found.html", "red <b>dress</b>", found)
    text = (tmp_path / "found.html").read_text()
    sheet = Sheet(text)
    assert "script" not in sheet.tags and "b" not in sheet.tags and "red <b>dress</b>" in sheet.text
    assert name in sheet.text and len(sheet.images) == 9 and not re.search(r"(src|href|url)\W{0,3}(http|file|//)", text)
    shown = next(image for image in sheet.images if image["alt"] == name)
    with Image.open(io.BytesIO(base64.b64decode(shown["src"].partition("base64,")[2]))) as image:
        assert image.format == "JPEG" and max(image.size) == 320
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text


def test_shards_merge_to_what_one_run_makes_and_export_row_by_row(album, tmp_path):
    (album.pictures / "copy.png").write_bytes((album.pictures / "6.png").read_bytes())
    (album.pictures / "bad.png").write_bytes(b"bad")
    album()
    parts = [f"part{i}.mc" for i in (1, 2, 3)]
    assert sum(album(part, shard=(i, 3))["added"] for i, part in enumerate(parts, 1)) == 9
    merge([tmp_path / part for part in parts], tmp_path / "all.mc")
    one, whole = ImageIndex(tmp_path / "products.mc"), ImageIndex(tmp_path / "all.mc", check=True)
    assert whole.files().keys() == one.files().keys() and whole.bad.keys() == one.bad.keys() == {"bad.png"}
    check_vectors(album, tmp_path / "all.mc")
    with pytest.warns(UserWarning, match="is without the shards 2/3 of .*pictures"):
        merge([tmp_path / "part1.mc", tmp_path / "part3.mc"], tmp_path / "some.mc")
    assert listed(tmp_path / "some.mc") == listed(tmp_path / "part1.mc") | listed(tmp_path / "part3.mc")
    empty = [i for i in range(1, 100) if not album(f"of99_{i}.mc", "pictures/deep", shard=(i, 99))]
    assert len(empty) >= 95 and not (tmp_path / f"of99_{empty[0]}.mc").exists()
    picture(album.pictures / "later.png", 99)
    assert album("all.mc")["encoded"] == 1, "a merged index goes on as any other"

    assert export(whole, tmp_path / "out") == 9
    vectors = np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy")
    table = pyarrow.parquet.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet")
    paths = table["image_path"].to_pylist()
    assert table.column_names == ["image_path"] and vectors.dtype == np.float32 and vectors.shape == (9, 16)
    assert np.abs(vectors - miniclip.embed_images(*album.loaded[:2], paths)).max() < 1e-5
    with pytest.raises(InputError, match="not empty"):
        export(whole, tmp_path / "out")

    with pytest.raises(ImageIndexError, match="must be different indexes"):
        merge([tmp_path / "part1.mc", tmp_path / "part1.mc"], tmp_path / "all.mc")
    album("left.mc", "pictures/deep")
    (tmp_path / "other" / "er").mkdir(parents=True)
    picture(tmp_path / "other" / "er" / "1.png", 60)
    album("right.mc", "other")
    merge([tmp_path / "left.mc", tmp_path / "right.mc"], tmp_path / "two.mc")
    assert {"pictures/deep/er/1.png", "other/er/1.png"} <= listed(tmp_path / "two.mc")
    picture(album.pictures / "deep" / "er" / "1.png", 61)
    album("newer.mc", "pictures/deep")
    with pytest.raises(ImageIndexError, match="different contents"):
        merge([tmp_path / "left.mc", tmp_path / "newer.mc"], tmp_path / "three.mc")


def test_late_interaction_reorders_what_a_text_finds(album, tmp_path):
    """The index has the patches of each image, whether made at once, by an update or from parts."""
    model, preprocess, tokenizer = album.loaded
    album("plain.mc")
    with pytest.raises(InputError, match="only a model with late interaction"):
        ImageSearch(tmp_path / "plain.mc").query("a red sheet", rerank=5)
    add_tokens(model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ImageIndexError, match="was made by the model"):
        album("plain.mc")  # it has none
    for i in (1, 2):
        album(f"part{i}.mc", shard=(i, 2))
    merge([tmp_path / "part1.mc", tmp_path / "part2.mc"], tmp_path / "late.mc")
    picture(album.pictures / "later.png", 99)
    album("late.mc")
    search = ImageSearch(tmp_path / "late.mc")
    paths = [search.index.paths(row)[0] for row in range(len(search))]
    wanted = embed_patches(model, preprocess, [str(album.pictures / path) for path in paths])
    assert np.abs(np.asarray(search.index.patches, np.float32) - wanted).max() < 2e-3 and len(paths) == 9
    words = torch.from_numpy(embed_words(model, tokenizer, ["a red sheet"]))
    scores = search.index.vectors @ search.vector("a red sheet")
    scores += maxsim(words, torch.from_numpy(wanted).float())[0].numpy()
    found = search.query("a red sheet", k=4)
    assert [one.path for one in found] == [paths[row] for row in np.argsort(-scores)[:4]]
    assert np.allclose([one.score for one in found], np.sort(scores)[::-1][:4], atol=1e-3)
    plain = [one.path for one in search.query("a red sheet", k=4, rerank=0)]
    assert sorted(plain) == sorted(one.path for one in search.query("a red sheet", k=4, rerank=4)) != plain
    assert search.query(image=str(album.pictures / "2.png"), k=1)[0].score > 0.999, "without words there is none"


def test_an_index_keeps_the_precision_of_its_first_run(album, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "settle", lambda model, precision: "bf16" if precision == "auto" else precision)
    album("auto.mc")
    album("exact.mc", precision="fp32")
    how = {name: ImageIndex(tmp_path / name).about["model"]["precision"] for name in ("auto.mc", "exact.mc")}
    assert how == {"auto.mc": "bf16", "exact.mc": "fp32"}
    low, exact = (ImageIndex(tmp_path / folder).vectors for folder in how)
    assert 1e-5 < np.abs(low - exact).max() < 0.02
    picture(album.pictures / "later.png", 99)
    monkeypatch.setattr(build, "settle", lambda model, precision: pytest.fail("it is not measured again"))
    assert [album(folder)["encoded"] for folder in how] == [1, 1]
    model, preprocess, _ = album.loaded
    wanted = miniclip.embed_images(inference_copy(model, "bf16"), preprocess, album.pictures / "later.png")
    assert np.abs(ImageIndex(tmp_path / "auto.mc").vectors[-1] - wanted).max() < 1e-6
    with pytest.raises(ImageIndexError, match="auto.mc is in bf16, not in fp32: remove --precision"):
        album("auto.mc", precision="fp32")
    assert album("auto.mc", precision="auto")["encoded"] == 0
    merge([tmp_path / "exact.mc", tmp_path / "auto.mc"], tmp_path / "both.mc")
    assert ImageIndex(tmp_path / "both.mc").about["model"]["precision"] == "bf16"
    for name in ("both.mc", "exact.mc"):
        describe(tmp_path / name)
    told = [line for line in capsys.readouterr().out.splitlines() if "images" in line and " by " in line]
    assert [line.endswith(", in bf16") for line in told] == [True, False]

    file = tmp_path / "exact.mc" / "index.json"  # as it was written before there was a choice
    about = json.loads(file.read_text())
    del about["model"]["precision"]
    file.write_text(json.dumps(about))
    picture(album.pictures / "last.png", 100)
    assert album("exact.mc")["encoded"] == 1 and ImageIndex(tmp_path / "exact.mc").about["model"]["precision"] == "fp32"


def test_exported_files_are_in_order(album, tmp_path, monkeypatch):
    from miniclip.index import parts as index_parts

    album()
    monkeypatch.setattr(index_parts, "FILE", 3)
    export(ImageIndex(tmp_path / "products.mc"), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out" / "img_emb").iterdir())
    assert names == ["img_emb_0.npy", "img_emb_1.npy", "img_emb_2.npy"]
    parts = [np.load(tmp_path / "out" / "img_emb" / name) for name in names]
    assert [len(part) for part in parts] == [3, 3, 2]
    assert np.array_equal(np.concatenate(parts), ImageIndex(tmp_path / "products.mc").vectors)


def test_the_command_from_folder_to_table_json_and_sheet(album, run_script, tmp_path):
    index = tmp_path / "products.mc"
    (album.pictures / "bad.png").write_bytes(b"no picture")
    done = run_script(*SEARCH, "index", album.pictures, "--model", tmp_path / "model", "--index", index)
    assert "8 added, 0 changed, 0 removed, 0 unchanged; 8 images encoded" in done.stdout
    assert "1 could not be read" in done.stdout and "exact, up to 100,000" in done.stdout
    bad = Path(re.search(r"could not be read: (.+)", done.stdout)[1])
    assert json.loads(bad.read_text())["sample"] == "bad.png"
    again = run_script(*SEARCH, "index", album.pictures, "--index", index, "--method", "ivf")
    assert "8 unchanged; 0 images encoded" in again.stdout
    assert re.search(r"IVF, nlist=\d+, nprobe=\d+, 8 bits; recall@10 against exact search: [01]\.\d+ for", again.stdout)
    done = run_script(*SEARCH, "query", index, "red dress", "-k", 3, "--html", tmp_path / "found.html")
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and re.fullmatch(r" +1 +-?0\.\d{4}  \S+\.png", lines[1]), lines
    assert len(Sheet((tmp_path / "found.html").read_text()).images) == 3
    long = run_script(*SEARCH, "query", index, "red dress " * 20, "--json")
    assert "the query was cut off at 16 tokens" in long.stderr and "cut off" not in done.stderr
    image = album.pictures / "0.png"
    done = run_script(
        *SEARCH, "query", index, "--image", image, "a dress -floral", "--minus", "blue", "-k", 2, "--json"
    )
    result = json.loads(done.stdout)
    assert len(result["results"]) == 2 and result["results"][0]["rank"] == 1 and "- blue" in result["query"]
    assert run_script(*SEARCH, "check", index).stdout.endswith("all files are intact\n")
    assert "8 vectors" in run_script(*SEARCH, "export", index, "--to", tmp_path / "out").stdout
    merged = run_script(*SEARCH, "merge", index, "--index", tmp_path / "all.mc")
    assert "all.mc: 8 images" in merged.stdout
    for words, problem in (
        (["query", tmp_path / "nothing.mc", "x"], "is not an index"),
        (["index", tmp_path / "none", "--index", index], "is not a folder"),
        (["index", album.pictures, "--index", tmp_path / "new.mc"], "run `search index --model`"),
        (["index", album.pictures, "--index", index, "--shard", "3/2"], "--shard 3/2: use"),
        (["index", album.pictures, "--index", index, "--pretrained", "x.pt"], "no effect without --model"),
        (["query", index, "x", "--pretrained", "x.pt"], "no effect without the name of a model"),
        (["query", index, "x", "--image_root", tmp_path / "none"], "none is not a folder"),
        (["query", index, "x", "--html", image], "0.png: give a name that ends in .html"),
    ):  # fmt: skip
        done = run_script(*SEARCH, *words, check=False)
        assert done.returncode and problem in done.stderr and "Traceback" not in done.stderr
    assert image.read_bytes().startswith(b"\x89PNG")


def test_queries_come_a_line_each(album):
    album()
    command = [sys.executable, "-m", "miniclip", "search", "query", album.folder / "products.mc", "-k", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, input="a dog\n\n-x\na cat\n", capture_output=True, text=True, timeout=600)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["query"] for one in answers] == ["a dog", "", "-x", "a cat"] and done.returncode == 1, done.stderr
    assert ["error" in one for one in answers] == [False, True, True, False]
    assert "the query is empty" in done.stderr and "the query is empty" in answers[2]["error"]


def test_queries_that_are_not_utf8_are_named(album):
    album()
    command = [sys.executable, "-m", "miniclip", "search", "query", album.folder / "products.mc", "-k", "1", "--json"]
    lines = b"\xef\xbb\xbfa dog -cat\ncaf\xe9\na cat\n"  # a byte order mark, as Windows writes it, and Latin-1
    done = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, timeout=600)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["query"] for one in answers] == ["a dog -cat", "caf\udce9", "a cat"] and done.returncode == 1
    assert ["results" in one for one in answers] == [True, False, True]
    assert answers[1]["error"] == "the query 'caf\\udce9' is not UTF-8" and b"Traceback" not in done.stderr


def test_a_query_imports_only_what_it_uses(album):
    """And looks for garbage neither in what torch makes nor in the model, a third of the time to the answer."""
    album()
    code = (
        "import atexit, gc, sys\n"
        "blocks = lambda: [one for one in gc.get_objects() if type(one).__name__ == 'Block']\n"
        "frozen = lambda: gc.get_freeze_count() > 1e5 and not blocks()\n"
        "atexit.register(lambda: print('END', gc.isenabled(), frozen(), *sys.modules))\n"
        "from miniclip.__main__ import main\nmain()"
    )
    command = [sys.executable, "-c", code, "search", "query", album.folder / "products.mc", "a dog"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    answer, _, end = done.stdout.partition("END ")
    enabled, frozen, *imported = end.split()
    assert answer.count(".png") == 8 and enabled == frozen == "True" and "torch" in imported, done.stderr
    unused = {"transformers", "torch._dynamo", "torch._inductor", "torchvision", "sympy", "datasets", "huggingface_hub"}
    unused |= {"faiss", "pandas", "matplotlib", "gradio", "onnxruntime", "fsspec"}
    unused |= {f"miniclip.{part}" for part in ("training", "run", "classify", "page", "compat")}
    assert not unused & set(imported)


def test_help_of_search_answers_at_once():
    command = [sys.executable, "-X", "importtime", "-m", "miniclip", "search", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "merge" in done.stdout
    assert not re.search(r"\| +(torch|numpy|faiss)$", done.stderr, re.MULTILINE), "--help is to answer at once"


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_an_index_is_whole_whenever_a_run_is_killed(album, tmp_path, step):
    """SIGKILL before and after everything that bringing an index up to date does with files, or every fifth of it."""
    album(method="hnsw")
    old = sorted((path, key.hex()) for path, (key, _) in ImageIndex(tmp_path / "products.mc").files().items())
    for number in range(6):
        picture(album.pictures / f"new{number}.png", 300 + number)
    picture(album.pictures / "0.png", 400)
    (album.pictures / "2.png").rename(album.pictures / "two.png")
    (album.pictures / "4.png").unlink()
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "search_worker.py", tmp_path, str(step)], cwd=ROOT, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    found = [[tuple(file) for file in files] for files in result["found"]]
    new = found[-1]
    assert len(new) == 13 and new != old and result["killed"] > 40 / step
    switch = found.index(new)
    assert found == [old] * switch + [new] * (len(found) - switch) and 0 < switch < len(found) - 1
    assert result["left"] == [".lock", "generation-000002", "index.json"]


def test_a_killed_run_goes_on_with_what_it_had_computed(album, tmp_path):
    for number in range(1100):
        picture(album.pictures / "many" / f"{number}.png", 2000 + number)
    command = [sys.executable, "-m", "miniclip", "search", "index", album.pictures, "--model", tmp_path / "model"]
    command += ["--index", tmp_path / "products.mc", "--device", "cpu"]
    with open(tmp_path / "log.txt", "wb") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not over([run.pid]) and not list((tmp_path / "products.mc").glob("under-way/*/*.npy")):
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    with pytest.raises(ImageIndexError, match="is not an index"):
        ImageIndex(tmp_path / "products.mc")
    changes = album()
    assert changes["resumed"] >= 512 and changes["resumed"] + changes["encoded"] == 1108 == changes["added"]
    assert build.PIECE == 512 and not (tmp_path / "products.mc" / "under-way").exists()
    check_vectors(album, tmp_path / "products.mc")


def test_two_runs_do_not_write_to_one_index(album, tmp_path):
    program = (
        "import sys, time; from miniclip.utils.files import lock; held = lock(sys.argv[1]); print('held', flush=True);"
    )
    program += " time.sleep(600)"
    other = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "products.mc"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {other.pid} is writing to .*products.mc.* another --index"):
            album()
    finally:
        other.kill()
        other.wait()
    assert album()["added"] == 8


def test_a_disk_that_takes_no_more_leaves_the_index_as_it_was(album, tmp_path):
    """The system lets the process write no file above 2,000 bytes; where it fails depends on what is written."""
    pytest.importorskip("resource", reason="limits of files are Unix's")
    album()
    folder = tmp_path / "products.mc"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    for number in range(40):
        picture(album.pictures / f"more{number}.png", 700 + number)
    program = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
    program += " sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        program,
        "miniclip/__main__.py",
        "search",
        "index",
        album.pictures,
        "--index",
        folder,
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode and "File too large" in done.stderr
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {path: data for path, data in after.items() if path.parent.parent.name != "under-way"} == before
    assert album()["added"] == 40


def test_what_systems_leave_in_a_folder_is_passed_over_and_an_old_format_said(album, tmp_path):
    album()
    folder = tmp_path / "products.mc"
    for name in (".DS_Store", ".nfs0001", "Thumbs.db"):
        (folder / name).write_text("")
    (folder / "lost+found").mkdir()
    picture(album.pictures / "new.png", 9)
    assert album()["added"] == 1 and (folder / ".DS_Store").exists()
    (folder / "index.json").write_text((folder / "index.json").read_text().replace('"format": 2', '"format": 1'))
    (folder / "000001").mkdir()
    with pytest.raises(ImageIndexError, match="has format 1, not 2: delete the folder and rebuild the index"):
        album()


def test_a_file_that_cannot_be_opened_is_not_gone(album, monkeypatch, shut_folder):
    import os

    album()
    stat, named = os.lstat, []

    def closed(path, **how):
        if str(path).endswith(("0.png", "1.png")):
            named.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(os, "lstat", closed)
    changes = album()
    assert named and (changes["kept"], changes["removed"], changes["unchanged"], changes["bad"]) == (2, 0, 6, 2)
    monkeypatch.undo()
    assert album()["encoded"] == 0 and len(ImageIndex(album.folder / "products.mc")) == 8
    for path in list(album.pictures.iterdir()):
        if path.name != "deep":
            path.unlink()
    shut_folder("deep")
    for how in ({}, {"folder": "of2.mc", "shard": (1, 2)}):
        with pytest.raises(ImageIndexError, match=r"contains no images(.|\n)*deep: cannot be opened"):
            album(**how)


def test_a_link_that_is_put_in_the_place_of_a_folder_is_not_followed(album, tmp_path):
    album()
    search = miniclip.ImageSearch(tmp_path / "products.mc", album.loaded)
    assert search.file("deep/er/1.png").endswith("1.png")
    (tmp_path / "secret" / "er").mkdir(parents=True)
    picture(tmp_path / "secret" / "er" / "1.png", 1)
    (album.pictures / "deep").rename(album.pictures / "old")
    (album.pictures / "deep").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="leads out of the image folder"):
        search.file("deep/er/1.png")
