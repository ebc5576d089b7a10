"""The forms in which data sets are published, tables that went through pandas, and splits."""

import csv
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import evaluate
import miniclip
from miniclip.commands.convert_data import main as convert_data
from miniclip.config import PreprocessConfig
from miniclip.datasets.captions import parse_list
from miniclip.datasets.read import fingerprint, read_source
from miniclip.datasets.records import ReadOptions
from miniclip.datasets.splits import at_split
from miniclip.training.parse import parse_train
from miniclip.training.streaming import StreamDataset
from miniclip.transforms import Preprocess
from miniclip.utils.bad_samples import BadSamples
from miniclip.utils.errors import InputError

TEXTS = [['a "red" field, seen', "it's red", "größer; rot"], ["green | paint", "two", "a green one"],
         ["blue", "a blue [one]", "sky"], ["grey", "a 12 inch sheet", "nothing"]]  # fmt: skip
NAMES, SPLITS = [f"{i}.png" for i in range(4)], ["train", "train", "val", "test"]
PAIRS = list(zip(NAMES, TEXTS))
ROWS = [(name, text, split) for name, texts, split in zip(NAMES, TEXTS, SPLITS) for text in texts]


@pytest.fixture
def place(tmp_path) -> Path:
    for i, name in enumerate(NAMES):
        Image.new("RGB", (20, 16), (60 * i, 0, 90)).save(tmp_path / name)
    return tmp_path


def table(path: Path, head: list, rows, delimiter=",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([head, *rows])
    return path


def lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def saved(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def shards(place: Path, several: bool) -> Path:
    with tarfile.open(place / "s.tar", "w") as tar:
        for name, texts in PAIRS:
            text = place / f"{name[0]}.{'txt' if several else 'json'}"
            text.write_text("\r\n".join(texts) + "\n" if several else json.dumps([{"raw": t} for t in texts]), "utf-8")
            tar.add(place / name, name)
            tar.add(text, text.name)
    return place / "s.tar"


def coco(place: Path, **more) -> Path:
    images = [{"license": 1, "file_name": name, "coco_url": "", "id": 7 + i} for i, name in enumerate(NAMES)]
    numbered = [(7 + int(name[0]), text) for name, text, _ in ROWS]
    found = [{"image_id": image, "id": n, "caption": text} for n, (image, text) in enumerate(numbered)]
    found = found[::2] + found[1::2] if more else found
    return saved(place / "captions_val2017.json", {"info": {}, "licenses": [], "images": images, "annotations": found})


def karpathy(place: Path, folder: str = "") -> Path:
    (place / folder).mkdir(exist_ok=True)
    records = []
    for name, texts, split in zip(NAMES, TEXTS, SPLITS):
        if folder:
            (place / name).rename(place / folder / name)
        sentences = [{"tokens": text.split(), "raw": text, "imgid": 0, "sentid": n} for n, text in enumerate(texts)]
        where = {"filepath": folder} if folder else {}
        records.append(where | {"sentids": [0], "imgid": 0, "sentences": sentences, "split": split, "filename": name})
    return saved(place / "dataset_flickr8k.json", {"images": records, "dataset": "flickr8k"})


def results_csv(place: Path) -> Path:
    rows = [f"{name}| {i % 3}| {text.replace('|', '/')}" for i, (name, text, _) in enumerate(ROWS)]
    rows[4] = rows[4].replace("1| ", "1   ")  # as one line of the published file is
    (place / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *rows]), "utf-8")
    return place / "results.csv"


def token(place: Path, name: str) -> Path:
    (place / name).write_text("".join(f"{image}#{i % 3}\t{text}\n" for i, (image, text, _) in enumerate(ROWS)), "utf-8")
    return place / name


def hub(place: Path, part="test", **columns) -> datasets.Dataset:
    """A table with images in it; on disk as a data set of the hub."""
    images = [{"bytes": (place / name).read_bytes(), "path": None} for name in NAMES]
    found = datasets.Dataset.from_dict({"image": images, **columns})
    found = found.cast_column("image", datasets.Image())
    (place / "hub").mkdir(exist_ok=True)
    found.to_parquet(place / "hub" / f"{part}-0.parquet")
    return found


def parquet(place: Path, images, captions) -> Path:
    datasets.Dataset.from_dict({"file_name": images, "caption": captions}).to_parquet(place / "t.parquet")
    return place / "t.parquet"


def beside(place: Path, several: bool) -> Path:
    shards(place, several).unlink()
    return place


def imagefolder(place: Path, name: str, rows) -> Path:
    """Images with a table among them, in a folder of the folder."""
    (place / "in").mkdir()
    for image in NAMES:
        (place / image).rename(place / "in" / image)
    rows = [{"file_name": name, "text": text} for name, text in rows]
    path = place / "in" / f"metadata.{name}"
    table(path, ["file_name", "text"], [row.values() for row in rows]) if name == "csv" else lines(path, rows)
    return place


def one_image(texts=TEXTS):
    return [{"image": name, "caption": found} for name, found in zip(NAMES, texts)]


FORMS = {
    "records": lambda p: saved(p / "a.json", one_image()),
    "a caption a record": lambda p: saved(p / "a.json", [{"img_path": i, "Text": t, "id": 3} for i, t, _ in ROWS]),
    "sentences": lambda p: saved(p / "a.json", [{"filename": i, "sentences": [{"raw": t}]} for i, t, _ in ROWS]),
    "lines": lambda p: lines(p / "a.jsonl", one_image()),
    "lines named .json": lambda p: lines(p / "a.json", [{"file_name": i, "text": t} for i, t, _ in ROWS]),
    "mapping": lambda p: saved(p / "a.json", dict(PAIRS)),
    "mapping to objects": lambda p: saved(p / "a.json", {i: {"captions": t} for i, t in PAIRS}),
    "pandas to_json": lambda p: saved(p / "a.json", {
        column: {str(i): row[n] for i, row in enumerate(PAIRS)} for n, column in enumerate(["filename", "raw"])}),
    "data": lambda p: saved(p / "a.json", {"version": 1, "data": one_image()}),
    "coco": coco,
    "csv": lambda p: table(p / "a.csv", ["image", "caption"], [row[:2] for row in ROWS]),
    "semicolons": lambda p: table(p / "a.csv", ["image", "caption"], [row[:2] for row in ROWS], ";"),
    "tsv": lambda p: table(p / "a.tsv", ["filepath", "title"], [row[:2] for row in ROWS], "\t"),
    "flickr8k captions.txt": lambda p: table(p / "captions.txt", ["image", "caption"], [row[:2] for row in ROWS]),
    "flickr8k token": lambda p: token(p, "Flickr8k.token.txt"),
    "flickr30k token": lambda p: token(p, "results_20130124.token"),
    "flickr30k results": results_csv,
    "cells in JSON": lambda p: table(p / "a.csv", ["raw", "filename"], [(json.dumps(t), i) for i, t in PAIRS]),
    "cells in Python": lambda p: table(p / "a.tsv", ["raw", "img"], [(f" {t} ", i) for i, t in PAIRS], "\t"),
    "cells in NumPy": lambda p: table(p / "a.csv", ["raw", "img"], [(np.array(t, object), i) for i, t in PAIRS]),
    "tuples": lambda p: lines(p / "a.jsonl", [{"image": i, "caption": str(tuple(t))} for i, t in PAIRS]),
    "cells of objects": lambda p: table(
        p / "a.csv", ["sentences", "path"], [([{"raw": x, "sentid": 3} for x in t], i) for i, t in PAIRS]),
    "folder, texts": lambda p: beside(p, True), "folder, JSON": lambda p: beside(p, False),
    "shards, texts": lambda p: shards(p, True), "shards, JSON": lambda p: shards(p, False),
    "metadata.csv": lambda p: imagefolder(p, "csv", [row[:2] for row in ROWS]),
    "metadata.csv, lists": lambda p: imagefolder(p, "csv", zip(NAMES, map(json.dumps, TEXTS))),
    "metadata.jsonl": lambda p: imagefolder(p, "jsonl", PAIRS),
    "parquet": lambda p: parquet(p, NAMES, TEXTS),
    "parquet, JSON": lambda p: parquet(p, NAMES, list(map(json.dumps, TEXTS))),
    "parquet, a caption a row": lambda p: parquet(p, [row[0] for row in ROWS], [row[1] for row in ROWS]),
    "saved": lambda p: hub(p, caption=TEXTS).save_to_disk(p / "d") or p / "d",
    "arrow": lambda p: hub(p, caption=[str(t) for t in TEXTS]).save_to_disk(p / "d") or next((p / "d").glob("*.arrow")),
    "hub": lambda p: hub(p, "train", sentences=[{"raw": t, "id": [1]} for t in TEXTS]) and f"hf:{p}/hub",
}  # fmt: skip
LABEL = datasets.ClassLabel(names=["test", "train", "val"])


def split_folders(place: Path) -> Path:
    for i, split in enumerate(SPLITS):
        (place / split).mkdir(exist_ok=True)
        (place / NAMES[i]).rename(place / split / NAMES[i])
    for split in set(SPLITS):
        table(place / split / "metadata.csv", ["file_name", "text"], [row[:2] for row in ROWS if row[2] == split])
    return place


def saved_splits(place: Path) -> Path:
    parts = {"train": [0, 1], "val": [2], "test": [3]}
    found = hub(place, caption=TEXTS)
    datasets.DatasetDict({k: found.select(v) for k, v in parts.items()}).save_to_disk(place / "d")
    return place / "d"


SPLIT_FORMS = {
    "karpathy": karpathy,
    "karpathy's coco": lambda p: karpathy(p, "val2014"),
    "flickr30k table": lambda p: table(p / "flickr_annotations_30k.csv", ["raw", "sentids", "split", "filename"],
                                       [(json.dumps(t), "[0, 1]", s, i) for i, t, s in zip(NAMES, TEXTS, SPLITS)]),
    "lines": lambda p: lines(p / "a.jsonl", [{"image": i, "text": t, "Split": s} for i, t, s in ROWS]),
    "mapping": lambda p: saved(p / "a.json", {i: {"text": t, "split": s} for i, t, s in zip(NAMES, TEXTS, SPLITS)}),
    "folders": split_folders,
    "saved": saved_splits,
    "saved, a column": lambda p: hub(p, caption=TEXTS, split=SPLITS).save_to_disk(p / "d") or p / "d",
    "parquet": lambda p: hub(p, raw=list(map(json.dumps, TEXTS)), split=SPLITS) and p / "hub" / "test-0.parquet",
    "hub": lambda p: hub(p, raw=TEXTS, split=SPLITS) and f"hf:{p}/hub",  # all of it is the library's split `test`
    "label": lambda p: hub(p, raw=TEXTS, split=[1, 1, 2, 0]).cast_column("split", LABEL).save_to_disk(p / "d")
    or p / "d",
}  # fmt: skip


def content(source) -> list:
    images = [record["image"] for record in source]
    data = [Path(image).read_bytes() if isinstance(image, str) else image.read() for image in images]
    return list(zip(data, (record["caption"] for record in source)))


@pytest.mark.parametrize("form", FORMS)
def test_the_same_content_gives_the_same_records(form, place, recwarn, caplog):
    expected = [((place / name).read_bytes(), texts) for name, texts in PAIRS]
    if form == "flickr30k results":
        expected = [(data, [text.replace("|", "/") for text in texts]) for data, texts in expected]
    source = str(FORMS[form](place))
    assert content(read_source(source)) == content(miniclip.read_captions(source)) == expected
    assert not caplog.records and not [w for w in recwarn if w.category is UserWarning]
    if form != "hub":
        assert content(read_source(f"{source}[:2]")) == expected[:2]
    with pytest.raises(InputError, match="split|Unknown"):  # an option without effect is refused
        read_source(source, ReadOptions(split="val"))
    if not source.endswith(".tar"):
        convert_data([source, str(place / "out" / "0.tar")])
        assert content(read_source(f"{place}/out/0.tar")) == expected


@pytest.mark.parametrize("form", SPLIT_FORMS)
def test_a_split_is_chosen_or_its_absence_is_said(form, place, caplog, capsys):
    expected = {split: [] for split in SPLITS}
    for name, texts, split in zip(NAMES, TEXTS, SPLITS):
        expected[split].append(((place / name).read_bytes(), texts))
    source = str(SPLIT_FORMS[form](place))
    for split, records in expected.items():
        assert (
            content(read_source(f"{source}:{split}"))
            == content(read_source(source, ReadOptions(split=split)))
            == records
        )
    assert not [r for r in caplog.records if "rows are read, those with" not in r.message]
    caplog.clear()
    known = "Bad split" if form == "saved" else "dev"
    with pytest.raises(InputError, match=f"there is no split 'dev'|it has no folder 'dev'|{known}"):
        read_source(f"{source}:dev")
    everything = sorted(content(read_source(source)))
    assert everything == sorted(expected["train"] if form == "saved" else sum(expected.values(), []))
    if form != "saved":  # which is read as Hugging Face's library reads it
        assert "all its splits are used together: train (" in caplog.text and "To read one: " in caplog.text
    if form != "hub":
        assert content(read_source(f"{source}:train[:1]")) == expected["train"][:1]
    if form not in ("saved", "folders"):
        assert content(read_source(f"{source}:train+test")) == expected["train"] + expected["test"]
    convert_data([source, str(place / "out.jsonl"), "--split", "test"])
    assert content(read_source(str(place / "out.jsonl"))) == expected["test"]
    assert fingerprint(f"{source}:val")["files"] == fingerprint(source)["files"] or source.startswith("hf:")


def test_splits_that_are_none(tmp_path):
    (tmp_path / "a:val").touch()
    for source in ("C:a.csv", "C:\\a.csv", "a.csv", f"{tmp_path}/a:val", "hf:name:val", "a/{0..3}.tar"):
        assert at_split(source) == (source, None)
    assert at_split("C:\\a.csv:val") == ("C:\\a.csv", "val") and at_split("a/{0..3}.parquet:val+test")[1] == "val+test"


def test_evaluation_and_training_take_a_split(place, tiny_model, tmp_path, capsys, monkeypatch):
    tiny_model.save_pretrained(tmp_path / "model")
    file = str(karpathy(place))
    for flags in (["--eval_file", f"{file}:train"], ["--eval_file", file, "--split", "train"]):
        evaluate.main(["--model", str(tmp_path / "model"), "--device", "cpu", *flags])
        shown = capsys.readouterr().out
        assert f"on {file}:train: 2 images, 6 captions" in shown
        written = tmp_path / "model" / "retrieval_dataset_flickr8k_train.json"
        assert f"written to {written}" in shown
        written.unlink()  # the other spelling would be kept beside it
    with pytest.raises(SystemExit):
        parse_train(["--split", "train"])
    assert "nearest: train_file FILE:SPLIT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["--features", str(tmp_path), "--split", "train"])


def test_streams_take_a_split(place, caplog):
    hub(place, caption=list(map(json.dumps, TEXTS)), split=SPLITS)
    args = SimpleNamespace(max_steps=3)

    def captions(source):
        dataset = StreamDataset.opened(source, args)(None, Preprocess(PreprocessConfig(size=16)))
        return {next(t for t in TEXTS if item["caption"] in t)[0] for item in dataset.one_pass(0, 1)}

    spec = f"{place}/hub/test-0.parquet"
    assert captions(f"{spec}:val") == captions(f"hf:{place}/hub:val") == {"blue"}
    assert not caplog.records and len(captions(spec)) == 4 and "whatever their column 'split'" in caplog.text
    parquet(place, NAMES, TEXTS)
    with pytest.raises(InputError, match="no column 'split'"):
        StreamDataset.opened(f"{place}/t.parquet:val", args)


NONE = ["nan", "None", "NULL", " NaN ", "<NA>", "n/a", "null", "", " \t"]


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "list", "parquet", "pandas", "txt", "tar", "metadata"])
def test_missing_captions_are_bad_samples(form, place):
    """As pandas writes them, in a cell, in a list in a cell, or in a file beside the image."""
    for i in range(4, len(NONE) + 1):
        Image.new("RGB", (20, 16)).save(place / f"{i}.png")
    texts, path = [*NONE, "a green field"], place / ("a.parquet" if form == "pandas" else f"a.{form}")
    names = [f"{i}.png" for i in range(len(texts))]
    if form in ("csv", "list", "metadata"):
        cells = [f"['fine', {text!r}]" if form == "list" else text for text in texts]
        cells[0] = "['fine', nan]" if form == "list" else cells[0]
        path = place if form == "metadata" else place / "a.csv"
        table(place / "metadata.csv" if form == "metadata" else path, ["image", "caption"], zip(names, cells))
    elif form in ("jsonl", "json"):
        rows = [{"image": name, "caption": text} for name, text in zip(names, texts)]
        (lines if form == "jsonl" else saved)(path, rows)
    elif form in ("parquet", "pandas"):
        texts[0] = None if form == "pandas" else texts[0]
        pq.write_table(pa.table({"image": names, "caption": texts}), path)
    else:
        for name, text in zip(names, texts):
            (place / name).with_suffix(".txt").write_text(text)
        path = place if form == "txt" else path
        with tarfile.open(place / "a.tar", "w") as tar:
            for file in place.glob("*.[pt][nx][gt]"):
                tar.add(file, file.name)
        None if form == "tar" else (place / "a.tar").unlink()
    skip = ReadOptions(on_bad_sample="skip", bad_samples=BadSamples())
    with pytest.raises(InputError, match=f"{len(NONE)} (of|problems)(.|\n)*(nan|None)(.|\n)*'n/a' stands for an empty"):
        read_source(str(path))
    with pytest.warns(UserWarning, match="The other 1 are used"):
        (record,) = read_source(str(path), skip)
    assert record["caption"][-1] == "a green field" and len(skip.bad_samples) == len(NONE)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
@pytest.mark.parametrize("columns", [["caption_0", "caption_1", "caption_10"], ["Comment2", "Comment1", "Comment 3"]])
def test_captions_in_numbered_columns(columns, name, place, caplog):
    rows = [["0.png", "x", "y", "z"], ["1.png", "p", "", None], ["0.png", "last", "nan", " "]]
    table = [dict(zip(["image_name", *columns], row)) for row in rows]
    if name == "t.csv":
        cells = [["image_name", *columns], *([cell or "" for cell in row] for row in rows)]
        (place / name).write_text("".join(f"{','.join(row)}\n" for row in cells))
    elif name == "t.jsonl":
        (place / name).write_text("".join(f"{json.dumps(row)}\n" for row in table))
    else:
        datasets.Dataset.from_list(table).to_parquet(place / name)
    records = list(read_source(str(place / name)))
    first = ["x", "y", "z"] if columns[0] == "caption_0" else ["y", "x", "z"]
    assert [record["caption"] for record in records] == [[*first, "last"], ["p"]]
    by_number = sorted(columns, key=lambda column: int(re.search(r"\d+", column)[0]))
    assert f"captions are in 3 columns, {by_number[0]!r} to {by_number[-1]!r}" in caplog.text


def test_numbered_columns_that_may_mean_anything(place, caplog):
    (place / "t.csv").write_text("image,text1,text2,title1\n0.png,a,b,c\n")
    with pytest.raises(InputError, match="which column has the caption"):
        read_source(str(place / "t.csv"))
    chosen = read_source(str(place / "t.csv"), ReadOptions(image_column="image", caption_column="text2"))
    assert chosen[0]["caption"] == ["b"] and not caplog.records
    (place / "t.csv").write_text("image,caption,caption_2\n0.png,a,b\n")
    assert read_source(str(place / "t.csv"))[0]["caption"] == ["a"]
    assert "using column 'caption' for the caption, not 'caption_2'" in caplog.text
    (place / "t.csv").write_text("image,caption,caption.1\n0.png,a,b\n")  # as pandas tells two of one name apart
    assert read_source(str(place / "t.csv"))[0]["caption"] == ["a"]
    assert "using column 'caption' for the caption, not 'caption.1'" in caplog.text


def test_columns_that_share_a_name_are_refused(place, caplog):
    (place / "a.csv").write_text("image,caption,id,caption\n0.png,a red field,1,one more\n")
    for options in (ReadOptions(), ReadOptions(image_column="image", caption_column="caption")):
        with pytest.raises(InputError, match="a.csv: two columns are named 'caption': rename or remove one"):
            read_source(str(place / "a.csv"), options)
    (place / "a.csv").write_text("image,caption,,\n0.png,a red field,,\n")  # a spreadsheet's empty columns
    assert read_source(str(place / "a.csv"))[0]["caption"] == ["a red field"] and not caplog.records
    (place / "a.csv").write_text("image,Caption,caption\n0.png,a red field,one more\n")
    read_source(str(place / "a.csv"))
    assert "using column 'Caption' for the caption, not 'caption'" in caplog.text
    row = pa.table([pa.array(["0.png"]), pa.array(["x"]), pa.array(["y"])], ["image", "caption", "caption"])
    pq.write_table(row, place / "a.parquet")
    with pa.OSFile(str(place / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, row.schema) as writer:
        writer.write_table(row)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(InputError, match=f"{name}: two columns are named 'caption'"):
            read_source(str(place / name))


@pytest.mark.parametrize(("cell", "found"), [
    ("a dog", "a dog"), ("[a dog]", "[a dog]"), ("[Music]", "[Music]"), ("[none of them]", "[none of them]"),
    ("[1, 2]", "[1, 2]"), ('"a", she said', '"a", she said'), ("(a dog)", "(a dog)"), ("('a') dog", "('a') dog"),
    ("[]", []), ('["a", null]', ["a", None]), ("['a', None, nan]", ["a", None, None]),
    ("['a' \"it's\"\n 'b']", ["a", "it's", "b"]),
    (r"['it\'s', 'é\n']", ["it's", "é\n"]), ('["a"]', ["a"]), ("['a, b', \"c]\"]", ["a, b", "c]"]),
    ("[" * 5000 + "]" * 5000, "[" * 5000 + "]" * 5000), ("[__import__('os')]", "[__import__('os')]"),
])  # fmt: skip
def test_lists_in_cells(cell, found):
    assert parse_list(cell) == found


@pytest.mark.parametrize("cell", ["['a', \"b]", '["a" b]', "[{'raw': open('x')}]", "['" + "[" * 9999 + "]"])
def test_a_broken_list_is_a_bad_sample(cell, place):
    table(place / "a.csv", ["image", "caption"], [("0.png", cell), ("1.png", "fine")])
    with pytest.raises(
        InputError, match="1 of 2 records(.|\n)*line 2: 0.png: caption is a list of captions that cannot be read"
    ):
        read_source(str(place / "a.csv"))
    parquet(place, NAMES[:2], [cell, "fine"])
    with pytest.raises(InputError, match="1 of 2 rows(.|\n)*row 0: a list of captions that cannot"):
        read_source(str(place / "t.parquet"))


def test_published_json_that_is_incomplete(place):
    value = json.loads(coco(place).read_text())
    value["annotations"] = [{"image_id": 99, "caption": "x"}, {"caption": "x"}, 3, *value["annotations"][3:]]
    value["images"].append(None)
    with pytest.raises(InputError) as caught:
        read_source(str(saved(place / "a.json", value)))
    for reason in ("5 of 8 records", "annotation 0: there is no image with the id 99", "image 4: expected an object",
                   "annotation 1: expected an image_id", "annotation 2: expected",
                   "image 0: no annotation has its id"):  # fmt: skip
        assert reason in str(caught.value)
    value["annotations"] = [{"image_id": 7, "segmentation": [], "category_id": 3}]
    with pytest.raises(InputError, match="no captions: take COCO's captions_"):
        read_source(str(saved(place / "a.json", value)))
    (place / "a.json").write_text('{"0.png": ["a"], "0.png": ["b"]}')
    with pytest.raises(InputError, match="a.json: '0.png' occurs twice"):
        read_source(str(place / "a.json"))
    with pytest.raises(InputError, match="1 of 2 records(.|\n)*record 1: 1.png: caption 0 is not text: None"):
        read_source(str(saved(place / "a.json", {"0.png": ["a"], "1.png": None})))
    (place / "a.token").write_text("0.png#0\ta dog\n1.png a dog\n")
    with pytest.raises(InputError, match="line 2: expected image.jpg#0, a tab and a caption"):
        read_source(str(place / "a.token"))


def test_an_imagefolder_names_what_its_table_lacks(place, caplog):
    rows = [("0.png", "a", "x"), ("gone.png", "b", "x"), ("1.png", "c", "y")]
    table(place / "metadata.csv", ["file_name", "text", "split"], rows)
    (place / "1.txt").write_text("not used")
    (place / "2.txt").write_text("beside it")
    with pytest.raises(InputError, match="2 of 5 records") as caught:
        read_source(str(place))
    said = str(caught.value)
    assert "metadata.csv, line 3: 'gone.png': no such file" in said
    assert "3.png: there is no caption file (.txt, .caption or .json) beside it and no line of metadata" in said
    with pytest.warns(UserWarning, match="The other 3 are used"):
        records = read_source(str(place), ReadOptions(on_bad_sample="skip"))
    assert [record["caption"] for record in records] == [["a"], ["c"], ["beside it"]]
    assert "metadata.csv: 1 images have a caption file beside them too" in caplog.text
    assert [record["caption"] for record in read_source(f"{place}:y")] == [["c"]]
    (place / "metadata.csv").write_text("file_name,licence\n0.png,CC0\n")
    with pytest.warns(UserWarning, match="2 of 4 records"):
        assert len(read_source(str(place), ReadOptions(on_bad_sample="skip"))) == 2
    assert "metadata.csv: which column has the caption? Name both with --columns" in caplog.text
    (place / "1.txt").unlink()
    (place / "2.txt").unlink()
    with pytest.raises(InputError, match="metadata.csv: which column has the caption"):
        read_source(str(place))


def test_columns_of_published_json_can_be_named(place):
    value = json.loads(coco(place).read_text())
    value["annotations"] = [a | {"caption_ja": "ja"} for a in value["annotations"]]
    options = ReadOptions(image_column="file_name", caption_column="caption_ja")
    assert read_source(str(saved(place / "a.json", value)), options)[0]["caption"] == ["ja"] * 3
    with pytest.raises(InputError, match="no caption"):
        read_source(str(place / "a.json"), replace(options, caption_column="caption_zh"))
