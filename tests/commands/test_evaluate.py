"""evaluate.py on vectors made elsewhere, and on several models or data sets: tables, and files that are kept."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from miniclip.inference.options import merged, parse_evaluate, result_file, single
from miniclip.retrieval import retrieval_metrics
from miniclip.utils.errors import InputError


@pytest.fixture
def features(tmp_path):
    """Unit vectors of 6 images and 12 captions, two for each."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((6, 8)).astype(np.float32)
    text = np.repeat(image, 2, 0) + rng.standard_normal((12, 8)).astype(np.float32)
    for name, rows in (("image", image), ("text", text)):
        np.save(tmp_path / f"{name}.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return tmp_path


def measured(run_script, folder, *argv):
    done = run_script("evaluate.py", "--features", folder, "--output_file", folder / "result.json", *argv)
    return done.stdout, json.loads((folder / "result.json").read_text())


def test_vectors_alone(features, run_script):
    """Without a caption file the captions are taken to come in order, the same number for each image."""
    image, text = (np.load(features / f"{name}.npy") for name in ("image", "text"))
    shown, result = measured(run_script, features)
    assert "6 images, 12 captions" in shown and "R@3" not in shown
    assert result["metrics"] == pytest.approx(retrieval_metrics(image, text, np.repeat(np.arange(6), 2)))
    shown, result = measured(run_script, features, "--captions", "first")
    assert "6 images, 6 captions" in shown and "R@3" in shown
    assert result["metrics"] == pytest.approx(retrieval_metrics(image, text[::2], np.arange(6), ks=(1, 3, 5, 10)))
    assert (result["model"], result["dataset"]) == (str(features), f"{features} (first captions)")


def test_published_features_print_the_published_figures(flickr8k, tmp_path, run_script):
    for argv in ([], ["--eval_file", flickr8k / "en_val.json", "--captions", "first"]):
        done = run_script(
            "evaluate.py", "--features", flickr8k / "published_features", "--output_file", tmp_path / "o.json", *argv
        )
        table = [line.split() for line in done.stdout.splitlines()]
        assert ["text", "to", "image", "52.0", "70.5", "78.5", "86.3"] in [row[:7] for row in table]
        assert ["image", "to", "text", "55.6", "73.6", "81.5", "89.7"] in [row[:7] for row in table]


def test_misuse_is_said_in_one_line(features, run_script):
    np.save(features / "text.npy", np.load(features / "text.npy")[:7])
    for argv, problem in (
        (["--features", features], "7 text embeddings for 6 captions"),
        (["--features", features / "none"], "there is no image.npy in"),
        (["--features", features, "--model", "ViT-B-32"], "remove --model"),
        (["--model", "ViT-B-32"], "give --model and --eval_file, or --features"),
        (["--model", "", "--eval_file", "x"], "give --model and --eval_file, or --features"),  # "$MODEL"
        (["--features", features, "--report", "x.png"], "add --eval_file"),
        (["--features", features, features / "x"], "several --features: add --eval_file"),
        (["--features", features, "--eval_file", "x", "x"], "x is given twice"),
        (
            ["--features", features, "--eval_file", "x", "y", "--report", "r"],
            "--report takes one model and one data set",
        ),
        (["--features", features, "--precision", "bf16"], "--precision has no effect on --features"),
        (["--features", features, "--on_bad_sample", "skip"], "mend the caption file"),
        (["--features", features, "--eval_file", "x.csv", "--table", "x.txt", "./x.csv"], "would replace the data set"),
        (["--features", features, "--table", "a.doc"], "its ending says how to write it: .txt, .csv, .md, .tex"),
        (["--features", features, "--output_file", features / "text.npy"], "is no result of evaluate.py"),
        (
            ["--model", "a", "b", "--eval_file", "x", "--pretrained", "p"],
            "--pretrained: 1 for 2 models: give one for each",
        ),
        (["--model", "a", "--eval_file", "x", "--normalize"], "--normalize is for --features"),
        (["--model", "a", "--eval_file", "x", "--image_root", "b", "c"], "--image_root: 2 for 1 --eval_file"),
    ):
        done = run_script("evaluate.py", *argv, check=False)
        assert done.returncode != 0 and problem in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_captions_that_several_images_share(tmp_path, capsys):
    """Eight perfect embeddings with two titles: as published figures count, three of four answers are wrong."""
    kinds = np.arange(8) % 2
    titles = ["A red  bus", "a dog"], ["a red bus ", "a dog"]  # letter case and spaces do not count, as in training
    records = [{"image": f"{i}.jpg", "caption": titles[i // 4][kinds[i]]} for i in range(8)]
    (tmp_path / "c.json").write_text(json.dumps(records))
    for name in ("image", "text"):
        np.save(tmp_path / f"{name}.npy", np.eye(2, dtype=np.float32)[kinds])
    argv = [
        "--features",
        str(tmp_path),
        "--eval_file",
        str(tmp_path / "c.json"),
        "--output_file",
        str(tmp_path / "o.json"),
    ]
    evaluate.main(argv)
    result, said = json.loads((tmp_path / "o.json").read_text()), capsys.readouterr().out
    assert result["metrics"]["text_to_image_R@1"] == result["metrics"]["image_to_text_R@1"] == 0.25
    repeated = result["repeated_captions"]
    assert repeated["captions"] == 8 and set(repeated["metrics"].values()) == {1.0}
    assert "8 of 8 captions are also those of another image" in said and "text to image R@1 100.0, R@5 100.0" in said

    # Only one title is shared, and an image has a caption of its own besides.
    records = [{"image": f"{i}.jpg", "caption": c} for i, c in enumerate((["a", "b"], ["c", "a"], ["d"]))]
    (tmp_path / "c.json").write_text(json.dumps(records))
    turned = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]], np.float32)  # image 0 is where the captions of 1 are
    np.save(tmp_path / "image.npy", turned)
    np.save(tmp_path / "text.npy", np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2]])
    evaluate.main(argv)
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["repeated_captions"]["captions"] == 2
    assert result["metrics"]["text_to_image_R@1"] == 1 / 5  # d
    assert result["repeated_captions"]["metrics"]["text_to_image_R@1"] == 3 / 5  # both a, too
    assert result["metrics"]["image_to_text_R@1"] == 1 / 3  # in a tie the first caption: 0 finds c, 1 finds a
    assert result["repeated_captions"]["metrics"]["image_to_text_R@1"] == 2 / 3


@pytest.fixture
def models(caption_set, tiny_config):
    """Two models, and a second data set of the first twelve images."""
    from miniclip.model import MiniClip

    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        MiniClip(tiny_config).save_pretrained(caption_set / name)
    records = json.loads((caption_set / "captions.json").read_text())
    (caption_set / "half").mkdir()
    (caption_set / "half" / "captions.json").write_text(json.dumps(records[:12]))
    return caption_set


def test_each_data_set_is_read_with_all_options(features, monkeypatch, capsys):
    """Its own image root, and the columns and the rest that hold for all."""
    monkeypatch.chdir(features)
    rows = [f"{i}.png,wrong,caption {i} {k}" for i in range(6) for k in "ab"]
    for name in ("one", "two"):
        Path(name).mkdir()
        (features / f"{name}.csv").write_text("\n".join(["pic,caption,title", *rows]))
    argv = ["--features", ".", "--eval_file", "one.csv", "two.csv", "--columns", "pic", "title", "--image_root"]
    evaluate.main([*argv, "one", "two"])
    said = capsys.readouterr().out
    assert said.count("6 images, 12 captions") == 2 and "are also those of another image" not in said
    records = [e["record"]["options"] for e in json.loads(Path("retrieval_comparison.json").read_text())["evaluations"]]
    assert [(r["eval_file"], r["image_root"]) for r in records] == [("one.csv", "one"), ("two.csv", "two")]
    argv[3:5] = ["one.csv", "one.csv"]  # other images of the same names: two data sets, and no differences
    evaluate.main([*argv, "one", "two", "--output_file", "o.json"])
    rows = json.loads(Path("o.json").read_text())["comparison"]
    assert [(row["dataset"], row["minus"]) for row in rows] == [("one.csv in one", None), ("one.csv in two", None)]


def test_several_models_and_data_sets_in_one_table(models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    more = ["--device", "cpu", "--image_root", "."]
    tables = ["o/t.csv", "t.tex", "t.md", "t.txt"]
    evaluate.main(
        ["--model", "a", "b", "--eval_file", "captions.json", "half/captions.json", *more, "--table", *tables]
    )
    said, rows = capsys.readouterr().out, list(csv.DictReader(open("o/t.csv")))
    assert [(row["dataset"], row["model"], row["minus"]) for row in rows] == [
        (data, *names)
        for data in ("captions.json", "half/captions.json")
        for names in (("a", ""), ("b", ""), ("b", "a"))
    ]
    assert open("t.txt").read() in said and "b - a" in said and "95% intervals" in said
    assert said.count("cosine to plain fp32") == 4 and said.count("image to text  ") == 5
    result = json.loads(open("retrieval_comparison.json").read())
    assert not list(models.glob("[ab]/retrieval*")) and len(result["comparison"]) == 6
    evaluate.main(["--model", "b", "--eval_file", "half/captions.json", *more])
    alone = json.loads(open("b/retrieval_captions.json").read())
    assert alone["metrics"] == result["evaluations"][3]["metrics"] != result["evaluations"][2]["metrics"]
    assert float(rows[4]["mean_recall"]) == pytest.approx(alone["metrics"]["mean_recall"], abs=1e-6)
    for e, row, images in zip(result["evaluations"], [rows[0], rows[3], rows[1], rows[4]], (24, 12, 24, 12)):
        assert (e["model"], e["dataset"]) == (row["model"], row["dataset"]) and row["images"] == str(images)
        assert e["record"]["data"]["records"] == images and len(e["record"]["sha256"]) == 1
    capsys.readouterr()

    # What was measured before a model that fails is kept, and an unknown model is found at once.
    shutil.copytree("a", "broken")
    (models / "broken" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError):
        evaluate.main(["--model", "b", "broken", "--eval_file", "captions.json", *more, "--output_file", "kept.json"])
    assert [e["model"] for e in json.loads(open("kept.json").read())["evaluations"]] == ["b"]
    capsys.readouterr()
    with pytest.raises(InputError, match="'typo' is neither a folder"):
        evaluate.main(["--model", "a", "typo", "--eval_file", "captions.json", *more])
    assert "R@1" not in capsys.readouterr().out


def test_no_result_replaces_that_of_another_model_data_set_or_setting(models, monkeypatch):
    monkeypatch.chdir(models)
    for name in "ab":
        shutil.copy(models / name / "config.json", f"{name}.json")
    config, first = ["--model", "a.json", "--pretrained"], ["--captions", "first"]
    data, half = ["--eval_file", "captions.json"], ["--eval_file", "half/captions.json", "--image_root", "."]
    calls = {
        "a/retrieval_captions.json": ["--model", "a", *data],
        "a/retrieval_captions_2.json": ["--model", "a", *half],
        "a/retrieval_captions_3.json": ["--model", "a", *data, "--precision", "bf16"],
        "a/retrieval_captions_4.json": ["--model", "a", *data, "--rerank", "0"],
        "a/retrieval_captions_first.json": ["--model", "a", *data, *first],
        "retrieval_captions_a_model.json": [*config, "a/model.safetensors", *data],
        "retrieval_captions_a_model_2.json": [*config, "b/model.safetensors", *data],
        "retrieval_captions_a.json": ["--features", "a", *data],
        "retrieval_captions_b.json": ["--features", "b", *data],
        "retrieval_captions_first_b.json": ["--features", "b", *data, *first],
        "retrieval_a.json": ["--features", "a"],
        "retrieval_comparison.json": ["--model", "a", "b", *data],
        "retrieval_comparison_2.json": ["--model", "a", "b", *half],
    }
    for call in ("first", "the same evaluation once more"):
        for name, argv in calls.items():
            options = parse_evaluate(argv)
            path, said = result_file(options)
            assert path.as_posix() == name and ("is the result for" in said) == bool(re.search(r"_\d", name)), call
            one = options if options.several else merged(options, *(part for (part,) in single(options)))
            path.write_text(json.dumps({"record": {"options": vars(one), "folder": str(models)}}))
    monkeypatch.chdir(models / "a")  # paths are compared, not their spelling
    argv = ["--model", "../a", "--eval_file", "../captions.json"]
    assert result_file(parse_evaluate(argv)) == (Path("../a/retrieval_captions.json"), "")
    path, said = result_file(parse_evaluate([*argv, "--output_file", "../retrieval_a.json"]))
    assert path == Path("../retrieval_a.json") and said == ", instead of the result for a"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "a")  # a model that others share
    assert result_file(parse_evaluate(argv))[0] == Path("retrieval_captions_a.json")


def test_what_cannot_be_written_is_said_before_the_work(features, monkeypatch, capsys):
    monkeypatch.chdir(features)
    argv, file = ["--features", ".", "--output_file", "result.json"], features / "image.npy"
    report = ["--report", file / "report.html", "--eval_file", "c.json"]
    for more in (["--table", file / "table.md"], report, ["--save_features", file]):
        with pytest.raises(OSError, match="File exists|Not a directory"):
            evaluate.main([*argv, *map(str, more)])
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "kept")
    with pytest.raises(InputError, match="kept cannot be written to: choose another folder"):
        evaluate.main([*argv, "--table", "kept/table.md"])
    assert "R@1" not in capsys.readouterr().out and not (features / "result.json").exists()


def test_features_one_after_the_other_keep_their_results(features, monkeypatch, capsys):
    monkeypatch.chdir(features)
    for name in ("x", "y"):
        (features / name / "f").mkdir(parents=True)
        for kind in ("image", "text"):
            np.save(features / name / "f" / f"{kind}.npy", np.roll(np.load(f"{kind}.npy"), int(name == "y"), axis=1))
    for name, file in ("x", "retrieval_f.json"), ("y", "retrieval_f_2.json"), ("x", "retrieval_f.json"):
        evaluate.main(["--features", f"{name}/f"])
        assert f"written to {file}" in capsys.readouterr().out
        assert json.loads((features / file).read_text())["model"] == f"{name}/f"
