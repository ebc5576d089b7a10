"""Every form that data comes in, read to the same records; what an epoch is; the converter."""

import csv
import json
import pickle
import shutil
import tarfile
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import miniclip
from miniclip.commands.convert_data import main
from miniclip.config import PreprocessConfig
from miniclip.datasets.convert import convert
from miniclip.datasets.mixture import Mixture, parse_factors
from miniclip.datasets.read import read_captions, read_source
from miniclip.datasets.records import ReadOptions, flatten_captions
from miniclip.datasets.shards import add_sample
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.streaming import StreamDataset
from miniclip.training.trainer import RunTrainer
from miniclip.transforms import Preprocess
from miniclip.utils.bad_samples import CaptionFileError
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError, open_image

ROOT = Path(__file__).resolve().parents[2]


def content(source) -> list[tuple[bytes, list[str]]]:
    """What counts of a source: the bytes of each image and its captions."""
    images = [record["image"] for record in source]
    data = [Path(image).read_bytes() if isinstance(image, str) else image.read() for image in images]
    return [(image, record["caption"]) for image, record in zip(data, source)]


@pytest.fixture
def records(caption_set):
    return read_captions(caption_set / "captions.json")


def as_form(records, folder: Path, form: str) -> str:
    """The caption set in another form, written by other means than ours; gives what to ask for."""
    rows = [(Path(record["image"]).name, text) for record in records for text in record["caption"]]
    if form == "jsonl":
        lines = [json.dumps({"image": Path(r["image"]).name, "caption": r["caption"]}) for r in records]
        (folder / "a.jsonl").write_text("\n\n".join(lines))
    elif form == "jsonl, a caption a line":
        (folder / "a.jsonl").write_text("".join(json.dumps({"img_path": i, "text": t}) + "\n" for i, t in rows))
    elif form in ("csv", "openclip", "tsv"):  # OpenCLIP's .csv has tabs between its columns
        name, delimiter = {"csv": ("a.csv", ","), "openclip": ("a.csv", "\t"), "tsv": ("a.tsv", "\t")}[form]
        with open(folder / name, "w", newline="", encoding="utf-8-sig") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerows([("id", "Title", "filepath"), *((n, text, i) for n, (i, text) in enumerate(rows))])
        return str(folder / name)
    elif form == "folder":
        for record in records:
            Path(record["image"]).with_suffix(".json").write_text(json.dumps({"captions": record["caption"]}))
        (folder / "captions.json").unlink()
        return str(folder)
    elif form == "shards":
        convert(records, str(folder / "s" / "{0..4}.tar"))
        return str(folder / "s")
    else:
        table = datasets.Dataset.from_dict(
            {"sentences": [r["caption"] for r in records], "jpg": [r["image"] for r in records], "id": list(range(24))}
        )
        if form == "bytes":
            table = table.map(lambda row: {"jpg": Path(row["jpg"]).read_bytes()}, features=None)
        elif form != "paths":
            table = table.cast_column("jpg", datasets.Image())
        if form == "disk":
            datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(str(folder / "disk"))
            return str(folder / "disk")
        (folder / "hub").mkdir()
        for n in range(3):
            table.shard(3, n, contiguous=True).to_parquet(folder / "hub" / f"train-{n}.parquet")
        if form == "arrow":
            table.save_to_disk(str(folder / "disk"))
            return str(next((folder / "disk").glob("*.arrow")))
        return f"hf:{folder}/hub:train" if form == "hf" else f"{folder}/hub/train-{{0..2}}.parquet"
    return str(folder / "a.jsonl")


FORMS = ["jsonl", "jsonl, a caption a line", "csv", "openclip", "tsv", "folder", "shards", "disk", "parquet", "paths",
         "bytes", "arrow", "hf"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(records, caption_set, form, recwarn):
    source = read_source(
        as_form(records, caption_set, form), ReadOptions("/" if form in ("paths", "parquet") else None)
    )
    expected = content(records)
    if form == "folder":
        expected = content(sorted(records, key=lambda record: Path(record["image"]).stem))
    assert len(source) == 24 and content(source) == expected
    assert not [w for w in recwarn if w.category is UserWarning]
    assert flatten_captions(source)[1] == [i for i in range(24) for _ in "ab"]
    again = pickle.loads(pickle.dumps(source))
    assert content(again) == expected
    assert open_image(again[3]["image"]).size == open_image(source[3]["image"]).size in ((30, 50), (50, 30))
    dataset = RunDataset(source, Preprocess(PreprocessConfig(size=16)), seed=5)
    assert dataset[7]["caption"] in source[7]["caption"]
    joined = read_source(f"{as_form(records, caption_set, 'csv')}::{caption_set}/a.csv")
    assert content(joined) == content(records) * 2


def test_tables_as_programs_and_people_write_them(caption_set):
    """Cells that are empty at the end of a line, left out or too many; blanks after the separators."""
    for text in (
        'image,caption\n0.png,a red sheet,\n1.png,a sheet,,\n2.png,"red, wide"\n',
        'image,caption,note,,\n0.png,a red sheet,new,,\n1.png,a sheet\n2.png,"red, wide",\n',
        'image, caption\n0.png, a red sheet\n1.png,a sheet\n2.png, "red, wide"\n',
        'image , "caption"\n0.png , a red sheet\n 1.png,a sheet \n2.png, "red, wide"\n',
    ):
        (caption_set / "a.csv").write_text(text)
        found = read_source(str(caption_set / "a.csv"))
        images = [str(caption_set / f"{number}.png") for number in range(3)]
        texts = [["a red sheet"], ["a sheet"], ["red, wide"]]
        assert [(record["image"], record["caption"]) for record in found] == list(zip(images, texts)), text
    for wrong in ("image,note,caption\n0.png,new\n1.png,new,a sheet\n", "image,caption,w\n0.png,a sheet, red, wide\n"):
        (caption_set / "a.csv").write_text(wrong)
        with pytest.raises(CaptionFileError, match="line 2: . cells for 3 columns"):
            read_source(str(caption_set / "a.csv"))
    (caption_set / "a.csv").write_text("image,caption,w,h\n0.png,a sheet, red\n")  # a comma without quotes
    with pytest.raises(CaptionFileError, match="line 2: 3 cells for 4 columns"):
        read_source(str(caption_set / "a.csv"))


@pytest.mark.parametrize("form", ["json", "shards", "bytes"])
def test_of_the_first_few_no_others_are_checked(form, records, caption_set):
    """A damaged image after them stops nothing; one among them does."""
    (caption_set / "5.png").write_bytes(b"damaged")
    source = str(caption_set / "captions.json") if form == "json" else None
    if form == "shards":
        with tarfile.open(caption_set / "a.tar", "w") as tar:
            for number in range(9):
                add_sample(tar, f"{number}", (caption_set / f"{number}.png").read_bytes(), "png", ["a sheet"])
        source = str(caption_set / "a.tar")
    elif form == "bytes":
        rows = [{"image": (caption_set / f"{number}.png").read_bytes(), "text": "a sheet"} for number in range(9)]
        datasets.Dataset.from_list(rows).to_parquet(caption_set / "a.parquet")
        source = str(caption_set / "a.parquet")
    how = ReadOptions(check_handles=True)
    assert len(read_source(f"{source}[:5]", how)) == 5
    assert len(read_source(f"{source}[:5][:2]", how)) == len(read_source(f"{source}[:2][:5]", how)) == 2
    with pytest.raises(InputError, match="1 of 6 (records|images)"):
        read_source(f"{source}[:6]", how)


def test_the_first_none_are_no_data(caption_set):
    with pytest.raises(InputError, match=r"captions.json\[:0\]: \[:0\] leaves no record"):
        read_source(f"{caption_set}/captions.json[:0]")


def test_shards_and_tables_in_a_folder_with_braces(records, caption_set):
    """What is there is no pattern."""
    usual, place = Path(as_form(records, caption_set, "shards")), caption_set / "data{1,2}"
    shutil.copytree(usual, place)
    assert content(read_source(str(place / "0.tar"))) == content(read_source(str(usual / "0.tar")))


def test_a_lone_quote_costs_its_own_line_and_is_named(caption_set):
    """A reader that is not strict would swallow all lines up to the next quote."""
    lines = ["image\tcaption", *(f"{i}.png\tsheet {i}" for i in range(10))]
    lines[3], lines[8] = '2.png\t"Beautiful day', '7.png\ta 12" sheet'
    lines[5] = '4.png\t"says ""hello"" twice"'
    lines[2:2] = [""]  # empty lines are no records, before the fault and after it
    lines += ["", ""]
    (caption_set / "a.tsv").write_text("\n".join(lines))
    with pytest.raises(CaptionFileError, match="line 5: an unmatched quote") as error:
        read_source(str(caption_set / "a.tsv"))
    assert str(error.value).count("\n  ") == 1  # a quote within a cell is none of the separator's business
    with pytest.warns(UserWarning, match="line 5"):
        source = read_source(str(caption_set / "a.tsv"), ReadOptions(on_bad_sample="skip"))
    texts = [record["caption"] for record in source]
    assert texts == [[f"sheet {i}"] for i in (0, 1, 3)] + [['says "hello" twice'], ["sheet 5"], ["sheet 6"],
                     ['a 12" sheet'], ["sheet 8"], ["sheet 9"]]  # fmt: skip


def test_a_wrong_image_root_is_said_once(caption_set, tmp_path_factory):
    with pytest.raises(CaptionFileError, match="none of its 24 records .* is --image_root right") as error:
        read_source(str(caption_set / "captions.json"), ReadOptions(str(tmp_path_factory.mktemp("empty"))))
    assert str(error.value).count("no such file") == 1


def test_files_that_differ_in_letter_case_alone(tmp_path, caption_set):
    for name in ("a.png", "a.PNG"):
        (tmp_path / "f" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "f" / name).write_bytes((caption_set / "0.png").read_bytes())
    (tmp_path / "f" / "a.txt").write_text("a sheet")
    if len(list((tmp_path / "f").iterdir())) < 3:
        pytest.skip("this file system does not tell letter cases apart")
    with pytest.raises(CaptionFileError, match="differs only in letter case"):
        read_source(str(tmp_path / "f"))


@pytest.mark.parametrize("stored, written", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_may_be_written_in_the_other_form(stored, written, tmp_path, caption_set):
    """é is one character here and two there: a caption file of a Mac names what another system has stored."""
    here, there = (unicodedata.normalize(form, "été/café 한국.png") for form in (stored, written))
    (tmp_path / here).parent.mkdir()
    (tmp_path / here).write_bytes((caption_set / "0.png").read_bytes())
    if (tmp_path / there).exists():
        pytest.skip("this file system takes both forms for one name")
    (tmp_path / "a.json").write_text(json.dumps([{"image": there, "caption": "a"}, {"image": here, "caption": "b"}]))
    (tmp_path / "b.csv").write_text(f"image,caption\n{there.replace('/', chr(92))},a\n")  # with Windows' separator
    records = read_source(f"{tmp_path}/a.json::{tmp_path}/b.csv")
    assert [record["image"] for record in records] == [str(tmp_path / here)] * 3
    datasets.Dataset.from_dict({"image": [there], "caption": ["a"]}).to_parquet(tmp_path / "t.parquet")
    assert open_image(read_source(str(tmp_path / "t.parquet"))[0]["image"]).size == (30, 50)
    folder = (tmp_path / here).parent
    (folder / "metadata.csv").write_text(f"file_name,text\n{there.partition('/')[2]},a table\n")
    assert read_source(str(folder)) == [{"image": str(tmp_path / here), "caption": ["a table"]}]
    (folder / "metadata.csv").unlink()
    (folder / there.partition("/")[2]).with_suffix(".txt").write_text("beside it")
    assert read_source(str(folder)) == [{"image": str(tmp_path / here), "caption": ["beside it"]}]
    (tmp_path / "a.json").write_text(json.dumps([{"image": "école.png", "caption": "a"}]))
    with pytest.raises(CaptionFileError, match="'école.png': no such file"):
        read_source(str(tmp_path / "a.json"))


def test_paths_in_tables_stay_in_their_folder(caption_set):
    inside = datasets.Dataset.from_dict({"image": ["0.png", "../0.png"], "caption": ["one", "two"]})
    inside.to_parquet(caption_set / "t.parquet")
    source = read_source(str(caption_set / "t.parquet"))
    assert open_image(source[0]["image"]).size == (30, 50)
    with pytest.raises(ImageError, match="leads out of the image folder"):
        open_image(source[1]["image"])


def test_tables_in_a_folder_whose_name_is_a_pattern(caption_set):
    folder = caption_set / "run[1]"
    folder.mkdir()
    datasets.Dataset.from_dict({"image": ["../0.png"], "caption": ["a dog"]}).to_parquet(folder / "t.parquet")
    for source in (folder, folder / "t.parquet"):
        assert read_source(str(source), ReadOptions("."))[0]["caption"] == ["a dog"]


def test_the_evaluation_file_may_have_other_columns(caption_set, run_script, tiny_config):
    (caption_set / "tiny.json").write_text(json.dumps(tiny_config.to_dict()))
    rows = [f"{i}.png,sheet {i}" for i in range(24)]
    (caption_set / "own.csv").write_text("\n".join(["bild,wort", *rows]))
    done = run_script(
        "train.py", "--model", caption_set / "tiny.json", "--train_file", caption_set / "own.csv",
        "--columns", "bild", "wort", "--eval_file", caption_set / "captions.json",
        "--max_steps", "1", "--per_device_train_batch_size", "8", "--output_dir", caption_set / "run", "--use_cpu",
    )  # fmt: skip
    assert "its columns are guessed" in done.stderr + done.stdout


def test_columns_are_named_guessed_or_asked_for(caption_set):
    (caption_set / "a.csv").write_text("where;what;imag\n0.png;a red sheet;x\n1.png;a sheet; green;x\n")
    with pytest.raises(
        InputError, match="which column has the image. Name both with --columns. There are 'where', 'what', 'im"
    ):
        read_source(str(caption_set / "a.csv"))
    columns = ReadOptions(image_column="where", caption_column="what")
    with pytest.raises(CaptionFileError, match="line 3: 4 cells for 3 columns"):
        read_source(str(caption_set / "a.csv"), columns)
    with pytest.warns(UserWarning, match="line 3"):
        (record,) = read_source(str(caption_set / "a.csv"), replace(columns, on_bad_sample="skip"))
    assert record == {"image": str(caption_set / "0.png"), "caption": ["a red sheet"]}
    with pytest.raises(InputError, match="there is no column 'who'"):
        read_source(str(caption_set / "a.csv"), replace(columns, caption_column="who"))
    (caption_set / "b.json").write_text('[{"picture": "0.png", "alt": "a", "x": "b"}]')
    (record,) = read_source(str(caption_set / "b.json"), ReadOptions(image_column="picture", caption_column="x"))
    assert record["caption"] == ["b"]


def test_bad_lines_are_named_by_their_numbers(caption_set):
    lines = ['{"image": "0.png", "caption": "fine"}', "", '{"image": "1.png", "caption"', '{"image": "2.png"}', "[]",
             '{"image": "3.png", "caption": " "}', '{"image": "no.png", "caption": "x"}',
             '{"image": "0.png", "caption": ["also", "fine"]}', '{"image": 3, "caption": "x"}']  # fmt: skip
    (caption_set / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(CaptionFileError) as caught:
        read_source(str(caption_set / "a.jsonl"))
    said = [line.strip() for line in str(caught.value).splitlines()]
    for expected, line in zip(["a.jsonl: 6 of 7", "line 3: invalid JSON", "line 4: there is no 'caption'",
                               "line 5: expec", "line 6: 3.png: caption 0 is not text", "line 7: 'no.png'",
                               "line 9: image is not a path"],
                              [said[0].rpartition("/")[2], *said[1:]]):  # fmt: skip
        assert line.startswith(expected)
    with pytest.warns(UserWarning, match="The other 1 are used"):
        (record,) = read_source(str(caption_set / "a.jsonl"), ReadOptions(on_bad_sample="skip"))
    assert record["caption"] == ["fine", "also", "fine"]
    (caption_set / "a.csv").write_text('filepath,title\n0.png,"two\nlines, ""quoted"""\n1.png,\n2.png,x\n')
    with pytest.raises(
        CaptionFileError, match="1 of 3 records cannot be used:\n  line 4: 1.png: caption 0 is not text"
    ):
        read_source(str(caption_set / "a.csv"))
    (caption_set / "a.csv").write_text('filepath,title\n0.png,"two\nlines, ""quoted"""\n')
    assert read_source(str(caption_set / "a.csv"))[0]["caption"] == ['two\nlines, "quoted"']
    (caption_set / "0.txt").write_text("a caption")
    (caption_set / "alone.txt").write_text("a caption")
    with pytest.raises(CaptionFileError, match="25 of 26 (.|\n)*1.png: there is no caption (.|\n)*alone.txt: there"):
        read_source(str(caption_set))
    with pytest.raises(CaptionFileError, match="x.json: no such file\n.*y.csv: no such file"):
        read_source(f"{caption_set}/x.json::{caption_set}/y.csv")


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "tsv", "shards", "disk"])
def test_shards_and_back_are_the_same_bits(records, caption_set, form, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    source = str(caption_set / "captions.json") if form == "json" else as_form(records, caption_set, form)
    main([source, f"{out}/s/{{00..02}}.tar"])
    assert len(list((out / "s").glob("*.tar"))) == 3 and not list((out / "s").glob(".*"))
    for target in ("back.json", "back.jsonl", "back.csv", "back.tsv"):
        main([f"{out}/s/{{00..02}}.tar", f"{out}/{target}"])
        assert content(read_source(str(out / target))) == content(records)
        (out / "back_images").rename(out / "gone")
        with pytest.raises(InputError, match="already exists"):
            main([source, f"{out}/{target}"])
        (out / "gone").rename(out / "back_images")
        (out / target).unlink()
        with pytest.raises(InputError, match="back_images already exists"):
            main([f"{out}/s/{{00..02}}.tar", f"{out}/{target}"])
        for file in (out / "back_images").iterdir():
            file.unlink()
        (out / "back_images").rmdir()
    assert sorted(path.name for path in out.iterdir()) == ["s"]


@pytest.mark.parametrize("target", ["a.json", "a.jsonl", "a.csv", "a.tsv", "000.tar"])
def test_any_caption_is_converted_as_it_is(caption_set, tmp_path, target):
    texts = [" two\nlines\r", '"quoted", "too"', "tab\there", "('hi')", '["a", "b"]', "[null]", "['it's']", "[]", "(x)"]
    records = [{"image": str(caption_set / f"{n}.png"), "caption": [text]} for n, text in enumerate(texts)]
    records.append({"image": str(caption_set / "11.png"), "caption": texts})
    convert(records, str(tmp_path / "out" / target))
    found = read_source(str(tmp_path / "out" / target), ReadOptions("/"))
    assert [record["caption"] for record in found] == [record["caption"] for record in records]


def test_the_converter_counts_shards_and_leaves_bad_images_out(records, caption_set, capsys):
    (caption_set / "3.png").write_text("<html>")
    target = str(caption_set / "s" / "07.tar")
    command = [str(caption_set / "captions.json"), target, "--samples_per_shard", "10"]
    with pytest.raises(InputError, match="1 of 24 images cannot be used:\n.*3.png: not an image"):
        main(command)
    assert not list((caption_set / "s").iterdir())
    with pytest.warns(UserWarning, match="3.png: not an image"):
        main([*command, "--on_bad_sample", "skip"])
    assert "3.png" in (caption_set / "s" / "07.tar.bad_samples.jsonl").read_text()
    assert [path.name for path in sorted((caption_set / "s").glob("*.tar"))] == ["07.tar", "08.tar", "09.tar"]
    assert "23 images\n1 bad samples were skipped: " in capsys.readouterr().out
    assert content(read_source(str(caption_set / "s"))) == content(records[:3] + records[4:])
    with pytest.raises(InputError, match="07.tar already exists"):
        convert(records, str(caption_set / "s" / "07.tar"))
    with pytest.raises(InputError, match="need a number in their name"):
        convert(records, str(caption_set / "s" / "out.tar"), 10)
    with pytest.raises(InputError, match="expected .json"):
        convert(records, str(caption_set / "out.zip"))
    for target in (str(caption_set / "s" / "{1..3}.tar"), str(caption_set / "out.csv")):  # as many as are named; none
        with pytest.raises(InputError, match="--samples_per_shard has no effect on .*: remove it"):
            main([command[0], target, *command[2:]])


def test_factors_and_resampling():
    """Three sources of 4, 6 and 10: what an epoch of them is, counted."""
    sizes = {"a": 4, "b": 6, "c": 10}
    sources = [[{"image": f"{name}{i}", "caption": ["x"]} for i in range(n)] for name, n in sizes.items()]
    mixture = Mixture(sources, parse_factors("1::2.5::0.3", 3))
    assert [mixture[i]["image"] for i in (0, 3, 4, 19)] == ["a0", "a3", "b0", "c9"] and len(list(mixture)) == 20
    epoch = torch.tensor(0)
    sampler = mixture.sampler(7, epoch)
    orders = []
    for _ in range(2):
        order = list(sampler)
        assert len(order) == len(sampler) == 4 + 2 * 6 + 3 + 3 and len(set(order)) == 22
        counts = Counter(index % 20 for index in order)
        assert [counts[i] for i in range(4)] == [1] * 4
        assert sorted(counts[i] for i in range(4, 10)) == [2, 2, 2, 3, 3, 3]
        assert sorted(counts[i] for i in range(10, 20)) == [0] * 7 + [1] * 3
        assert list(mixture.sampler(7, epoch)) == order != list(mixture.sampler(8, epoch))
        orders.append(order)
        epoch.fill_(1)
    assert orders[0] != orders[1] and {i for i in orders[0] if i < 20} != {i for i in orders[1] if i < 20}

    drawn = Mixture(sources, [1, 2.5, 0.3], num_samples=22000).order(0, 3)
    assert len(set(drawn)) == 22000
    counts = np.bincount(drawn % 20)  # weights 4, 15 and 3 of 22
    assert abs(counts[:4] - 1000).max() < 160 and abs(counts[4:10] - 2500).max() < 250
    assert abs(counts[10:] - 300).max() < 90 and counts.sum() == 22000
    assert Mixture(sources).sampler(0, epoch) is None
    for wrong in ("1::2", "1::2::-1", "1::x::1", "0::0::0", ""):
        with pytest.raises(InputError, match="expected 3 numbers"):
            parse_factors(wrong, 3)


def test_a_sample_that_comes_again_is_drawn_anew(records):
    dataset = RunDataset(Mixture([records], num_samples=5), Preprocess(PreprocessConfig(size=16)))
    seen = {dataset[3 + 24 * copy]["caption"] for copy in range(12)}
    assert seen == set(records[3]["caption"])


def test_tables_name_what_cannot_be_used(records, caption_set, caplog):
    images = [Path(record["image"]).read_bytes() for record in records]
    images[3], images[23] = b"<html>", None
    texts = ["a"] * 24
    texts[5], texts[6] = "", None
    table = datasets.Dataset.from_dict({"image": images, "text": texts})
    table.to_parquet(caption_set / "a.parquet")
    with pytest.warns(UserWarning, match="2 of 24 rows cannot be used:\n  row 5: .*\n  row 6: (.|\n)*The other 22"):
        source = read_source(str(caption_set / "a.parquet"), ReadOptions(on_bad_sample="skip"))
    dataset = RunDataset(source, Preprocess(PreprocessConfig(size=16)))
    assert torch.equal(dataset[3]["pixel_values"], dataset[4]["pixel_values"]) and dataset.bad.sum() == 1
    assert "a.parquet: row 3: not an image" in caplog.messages[0]
    assert torch.equal(dataset[21]["pixel_values"], dataset[0]["pixel_values"])
    assert "a.parquet: row 23: expected an image, found None" in caplog.messages[1]
    with pytest.raises(ImageError, match="row 3: not an image"):
        open_image(source[3]["image"])
    table.select_columns(["text"]).save_to_disk(str(caption_set / "t"))
    with pytest.raises(InputError, match="which column has the image"):
        read_source(str(caption_set / "t"))
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(str(caption_set / "d"))
    with pytest.raises(InputError, match="which split. Name one: .*/d:a, .*/d:b"):
        read_source(str(caption_set / "d"))
    with pytest.raises(InputError, match="there is no split 'c'"):
        read_source(f"{caption_set}/d:c")
    with pytest.raises(InputError, match="no such file"):
        read_source(f"{caption_set}/no-{{0..3}}.parquet")
    with pytest.raises(InputError, match="hf:no/such-name: "):
        read_source("hf:no/such-name")
    with pytest.raises(InputError, match="no such file or folder .a data set of the Hugging Face hub is hf:no/such"):
        read_source("no/such")
    with pytest.raises(InputError, match="unknown form of data"):
        read_source(str(ROOT / "Makefile"))


# --- Order and shares: through the trainer's loader, in one process and in two.


def numbered(folder: Path, n: int, files: int) -> tuple[str, str]:
    """n images with the captions "number 0", ...: shards and parquet files of them."""
    rows = []
    for i in range(n):
        from PIL import Image

        Image.new("RGB", (8, 8), (i * 10 % 256, 0, 0)).save(folder / f"n{i}.png")
        rows.append({"image": str(folder / f"n{i}.png"), "caption": [f"number {i}"]})
    convert(rows, f"{folder}/n/{{0..{files - 1}}}.tar")
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    for i in range(files):
        table.shard(files, i).to_parquet(folder / f"n{i}.parquet")
    return f"{folder}/n/{{0..{files - 1}}}.tar", f"{folder}/n{{0..{files - 1}}}.parquet"


@pytest.fixture(scope="module")
def shares(tmp_path_factory, forge):
    """What two processes got, and what one got: {case: epochs} of each process."""
    folder = tmp_path_factory.mktemp("shares")
    shards, tables = numbered(folder, 23, 3)
    one_table = str(folder / "n0.parquet")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    stream = {"source": tables, "streaming": True}
    cases = {
        "shards": {"source": shards, "batch": 2, "workers": 0},
        "shards, workers": {"source": shards, "batch": 3, "workers": 2},
        "resampled": {"source": shards, "batch": 4, "workers": 0, "num_samples": 50},
        "factors": {"source": f"{shards}::{shards}", "batch": 3, "workers": 1, "factors": "1::1.5"},
        "stream, workers": {**stream, "batch": 1, "workers": 2, "max_steps": 10, "epochs": 1},
        "stream, counted": {**stream, "batch": 2, "workers": 0, "num_samples": 21},
        "stream": {**stream, "batch": 1, "workers": 0, "max_steps": 11},
        "stream, one file": {"source": one_table, "streaming": True, "batch": 2, "workers": 0, "max_steps": 2},
    }
    (folder / "cases.json").write_text(json.dumps({**cases, "config": config}))
    done = forge(["tests/sources_worker.py", str(folder / "cases.json"), str(folder / "got")], 600, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"got.{rank}").read_text()) for rank in (0, 1)]


def epochs(shares, case: str) -> list[list[int]]:
    """All that both processes saw in each epoch, batches in their order; every batch is full and every loader ends."""
    both = [share[case] for share in shares]
    seen = []
    for epoch in range(len(both[0])):
        parts = [process[epoch] for process in both]
        assert all(part["ended"] and part["resumes"] for part in parts)
        assert len(parts[0]["batches"]) == len(parts[1]["batches"])
        seen.append([n for pair in zip(*(part["batches"] for part in parts)) for batch in pair for n in batch])
    return seen


@pytest.mark.parametrize(("case", "many"), [("shards", 20), ("shards, workers", 18)])
def test_two_processes_see_each_sample_once(shares, case, many):
    """23 samples, in batches of 2 x 2 or 2 x 3: what fills no batch is left out, other samples in the next epoch."""
    first, second = epochs(shares, case)
    for seen in (first, second):
        assert len(seen) == len(set(seen)) == many and set(seen) <= set(range(23))
    assert first != second and set(first) != set(second)


def test_resampled_and_upsampled_by_two_processes(shares):
    for seen in epochs(shares, "resampled"):
        assert len(seen) == 48 and 12 <= len(set(seen)) <= 23
    for seen in epochs(shares, "factors"):  # 23 + 23 + 12 = 58 samples, of which 9 x 6 fill batches
        counts = Counter(seen)
        assert len(seen) == 54 and set(counts) == set(range(23)) and max(counts.values()) <= 3


def test_a_stream_is_shared_out(shares):
    """3 files and 23 samples; each process reads 12 or 11 of them, whichever way the files can be dealt out."""
    for seen in epochs(shares, "stream, workers"):  # 4 readers of at least 5 each: none is in its second pass yet
        assert len(seen) == len(set(seen)) == 20
    for seen in epochs(shares, "stream, one file"):
        assert len(seen) == len(set(seen)) == 8 == len(set(seen) & set(range(8)))
    for seen in epochs(shares, "stream"):
        assert len(seen) == 22 and len(set(seen)) >= 7 + 11
    first, second = epochs(shares, "stream, counted")
    assert len(first) == len(second) == 20 and first != second


@pytest.mark.parametrize(("files", "readers"), [(3, 1), (3, 2), (3, 3), (1, 4), (3, 8)])
def test_one_pass_of_a_stream_has_every_sample_once(tmp_path, files, readers):
    _, tables = numbered(tmp_path, 23, files)
    args = RunArguments(str(tmp_path / "out"), use_cpu=True, max_steps=1)
    preprocess = Preprocess(PreprocessConfig(size=8))
    dataset = StreamDataset.opened(tables, args)(None, preprocess, seed=3)
    passes = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        together = []
        for reader in range(readers):
            share = [item["caption"] for item in dataset.one_pass(reader, readers)]
            assert [item["caption"] for item in dataset.share(reader, readers, len(share))] == share
            together += [int(caption.split()[1]) for caption in share]
        assert sorted(together) == list(range(23))
        passes.append(together)
    assert passes[0] != passes[1]


def test_a_stream_passes_over_what_is_corrupt(tmp_path, caplog):
    _, tables = numbered(tmp_path, 6, 1)
    images = [(tmp_path / f"n{i}.png").read_bytes() for i in range(6)]
    images[2] = b"<html>"
    texts = [f"number {i}" for i in range(6)]
    texts[4] = ""
    datasets.Dataset.from_dict({"image": images, "caption": texts}).to_parquet(tmp_path / "bad.parquet")
    args = RunArguments(str(tmp_path / "out"), use_cpu=True, max_steps=1)
    open_stream = StreamDataset.opened(str(tmp_path / "bad.parquet"), args)
    dataset = open_stream(None, Preprocess(PreprocessConfig(size=8)))
    seen = sorted(item["caption"] for item in dataset.share(0, 1, 4))
    assert seen == ["number 0", "number 1", "number 3", "number 5"]
    assert dataset.bad.sum() in (1, 2) and "bad.parquet: sample" in caplog.text
    list(dataset.share(0, 1, 8))
    with pytest.raises(InputError, match="a whole pass has no sample for reader 6"):
        list(dataset.share(6, 7, 1))
    for spec, said in (
        ("a::b", "one source"),
        (str(tmp_path / "a.csv"), "only hf:NAME"),
        ("hf:no/such", "hf:no/such: "),
    ):
        with pytest.raises(InputError, match=said):
            StreamDataset.opened(spec, args)
    args.max_steps = -1
    with pytest.raises(InputError, match="give --max_steps, or --train_num_samples"):
        StreamDataset.opened(tables, args)


@pytest.mark.parametrize("form", ["factors", pytest.param("resampled", marks=pytest.mark.slow), "stream"])
def test_a_run_resumes_in_mid_epoch_with_any_order(records, caption_set, tiny_config, form, tmp_path):
    """Stopped after 5 of 9 steps, in the second epoch of 3 steps each, and resumed: the weights are the same bits."""
    preprocess, tokenizer = Preprocess(tiny_config.preprocess_cfg), miniclip.Tokenizer(16)
    tables = as_form(records, caption_set, "parquet")

    def run(folder, steps, resume=None):
        args = RunArguments(
            str(tmp_path / folder), num_train_epochs=3, max_steps=steps, per_device_train_batch_size=8, use_cpu=True,
            save_steps=5, save_strategy="steps", disable_tqdm=True, lr_scheduler_type="constant", learning_rate=1e-3,
        )  # fmt: skip
        if form == "stream":
            dataset = StreamDataset.opened(tables, args, ReadOptions("/"), num_samples=24)(None, preprocess, seed=1)
        else:
            epoch = {"factors": [0.5, 0.75]} if form == "factors" else {"num_samples": 24}
            dataset = RunDataset(Mixture([records[:12], records], **epoch), preprocess, seed=1)
        torch.manual_seed(0)
        trainer = RunTrainer(
            miniclip.MiniClip(tiny_config), args, dataset, preprocess=preprocess, tokenizer=tokenizer
        )  # fmt: skip
        trainer.train(resume)
        trainer.save_model()
        return load_file(tmp_path / folder / "model.safetensors")

    whole = run("whole", 9)
    run("cut", 5)
    resumed = run("cut", 9, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
