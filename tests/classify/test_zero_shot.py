"""Classes from words: the vectors, the probabilities, what is measured; questions, moderation, probes, the quiz."""

import importlib
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import miniclip
from benchmarks.make_parity_golden import formula_weights
from benchmarks.make_zero_shot_golden import CLASSES, CONFIG, FUNCTIONS, GOLDEN, STRINGS
from miniclip.checkpoint import to_miniclip
from miniclip.classify import linear_probe, moderate, prompts, scene_quiz, zero_shot
from miniclip.classify.zero_shot import build_zero_shot_classifier, zero_shot_classify
from miniclip.config import MiniClipConfig
from miniclip.datasets.shapes import Group, Scene, captions, drawn
from miniclip.inference.embed import embed_images
from miniclip.reports.confusion import classification_metrics, draw_confusion, format_classes
from miniclip.towers.hf_tokenizer import HfTokenizer
from miniclip.utils.errors import InputError
from tests.conftest import ROOT
from tests.towers.test_hf_towers import save_tokenizer

TOKENIZER = miniclip.Tokenizer(16)


@pytest.mark.parametrize(("kind", "templates"), [("strings", STRINGS), ("functions", FUNCTIONS)])
@pytest.mark.filterwarnings("ignore:.*are identical to it")  # a name that comes twice
@pytest.mark.parametrize("batch", [3, 10, None])
def test_the_classifier_is_openclips(kind, templates, batch):
    golden = json.loads(GOLDEN.read_text())
    model = miniclip.MiniClip(MiniClipConfig.from_dict(CONFIG)).eval()
    weights = formula_weights({name: tuple(shape) for name, shape in golden["shapes"].items()})
    model.load_state_dict(to_miniclip(weights)[0])
    found = build_zero_shot_classifier(model, miniclip.Tokenizer(77), CLASSES, templates, batch)
    assert found.shape == (16, 8) and found.dtype == torch.float32
    assert (found - torch.tensor(golden[kind])).abs().max() <= 1e-6
    assert (found.norm(dim=0) - 1).abs().max() <= 1e-6


def test_a_class_is_the_mean_of_unit_vectors(tiny_model):
    found = build_zero_shot_classifier(tiny_model, TOKENIZER, ["dog"], ["a {}", "many {}s", str.upper])
    with torch.no_grad():
        rows = F.normalize(tiny_model.encode_text(TOKENIZER(["a dog", "many dogs", "DOG"])), dim=1)
    assert torch.allclose(found[:, 0], F.normalize(rows.mean(0), dim=0), atol=1e-6)


@pytest.mark.parametrize(
    ("classnames", "templates", "message"),
    [
        ("dog", ["a {}"], "classnames must be a list"), (["dog"], "a {}", "templates must be a list"),
        ([], ["{}"], "at least"),
        (["dog"], ["a photo"], "'a photo' has no {}"), (["dog"], ["a {name}"], "exactly one {}"),
        (["dog"], ["{} {}"], "exactly one {}"), (["dog"], ["a {"], "exactly one {}"),
        (["dog"], ["a {:>9999999999}"], "exactly one {}"), (["dog"], ["{!r}"], "exactly one {}"),
    ],
)  # fmt: skip
def test_what_makes_no_classifier_is_said(tiny_model, classnames, templates, message):
    with pytest.raises(InputError, match=message):
        build_zero_shot_classifier(tiny_model, TOKENIZER, classnames, templates)


def test_probabilities_are_by_the_models_own_temperature(tiny_model, caption_set):
    tiny_model.logit_scale.data.fill_(math.log(2))
    images, classifier = np.float32([[1, 0]]), torch.tensor([[0.6, 0.0], [0.8, 1.0]])
    expected = math.exp(1.2) / (math.exp(1.2) + 1)  # cosines 0.6 and 0, times 2
    assert zero_shot.probabilities(tiny_model, images, classifier)[0] == pytest.approx([expected, 1 - expected])
    names, preprocess = ["red", "green", "blue"], miniclip.Preprocess(tiny_model.config.preprocess_cfg)
    classifier = build_zero_shot_classifier(tiny_model, TOKENIZER, names, ["a {} sheet"])
    one = zero_shot_classify(tiny_model, preprocess, classifier, caption_set / "0.png", names)
    with torch.no_grad():
        pixels = preprocess.load(caption_set / "0.png")[None]
        logits, _ = tiny_model.get_logits(pixels, TOKENIZER([f"a {name} sheet" for name in names]))
    assert one["scores"] == pytest.approx(logits.softmax(1)[0].numpy(), abs=1e-6)
    assert one["class_names"] == names and one["top_class"] == names[logits.argmax()]
    two = zero_shot_classify(tiny_model, preprocess, classifier, [caption_set / "5.png", caption_set / "0.png"], names)
    assert len(two) == 2 and two[1]["scores"] == pytest.approx(one["scores"], abs=1e-6)


def test_metrics_by_hand():
    found = np.array([[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    metrics, confusion = classification_metrics(found, np.array([0, 0, 0, 0]) + [0, 0, 1, 0], 6)
    assert metrics == {"top1": 0.25, "mean_per_class_recall": pytest.approx((1 / 3 + 0) / 2), "top5": 0.75}
    assert confusion[0].tolist() == [1, 1, 0, 0, 0, 1] and confusion[1].tolist() == [1, 0, 0, 0, 0, 0]
    assert confusion.sum() == 4
    table = format_classes(list("abcdef"), confusion).splitlines()
    assert table[2:4] == ["| a | 3 | 33.3 | b (1) |", "| b | 1 | 0.0 | a (1) |"] and table[4] == "| c | 0 |  |  |"
    assert "top5" not in classification_metrics(found[:, :5] % 5, np.zeros(4, int), 5)[0]


def test_the_confusion_picture_shows_right_and_wrong(tmp_path):
    def colours(matrix) -> set:
        draw_confusion(tmp_path / "c.png", np.array(matrix), [f"class {i}" for i in range(len(matrix))], "title")
        with Image.open(tmp_path / "c.png") as image:
            pixels = {pixel for _, pixel in image.getcolors(1 << 20)}
        green = {p for p in pixels if p[1] > max(p[0], p[2]) + 30}
        red = {p for p in pixels if p[0] > max(p[1], p[2]) + 10}
        return (bool(green), bool(red))

    assert colours([[3, 0], [0, 2]]) == (True, False)
    assert colours([[0, 3], [2, 0]]) == (False, True)
    matrix = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 1500]])
    axes = draw_confusion(tmp_path / "c.png", matrix, ["a", "b", "c " * 99], "title").axes[0]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert {place: text for place, text in shown.items() if place in {(x, y) for x in range(3) for y in range(3)}} == {
        (0, 0): "3", (1, 0): "1", (0, 2): "2", (2, 2): "1,500"
    }  # fmt: skip
    told = list(shown.values())
    assert "75% of 4" in told and "no images" in told and "100% of 1,502" in told and "a  1" in told
    assert any(text.startswith("c c") and text.endswith("...  3") for text in told)
    assert colours(np.eye(60, dtype=int) + np.eye(60, k=1, dtype=int)) == (True, True)  # of 60 the worst 40


@pytest.fixture
def folders(caption_set, tiny_model):
    """Pictures in a folder for each class, and a model."""
    for i, name in enumerate(["red", "green", "blue"]):
        (caption_set / "set" / name).mkdir(parents=True)
        for k in (i, i + 12):
            shutil.copy(caption_set / f"{k}.png", caption_set / "set" / name)
    tiny_model.save_pretrained(caption_set / "model")
    return caption_set


def run(module, folder, *argv) -> dict:
    argv = ["--model", folder / "model", "--output_dir", folder / "out", "--device", "cpu", *argv]
    importlib.import_module(module.__name__.replace("classify", "commands")).main([str(word) for word in argv])
    name = {zero_shot: "zero_shot", moderate: "moderation", linear_probe: "linear_probe"}[module]
    return json.loads((folder / "out" / f"{name}.json").read_text())


def test_the_command_measures_folders_of_classes(folders, tiny_model, capsys):
    found = run(zero_shot, folders, "--images", folders / "set")
    preprocess = miniclip.Preprocess(tiny_model.config.preprocess_cfg)
    paths = [folders / "set" / name / f"{i}.png" for name, rows in (("blue", [14, 2]), ("green", [1, 13]),
             ("red", [0, 12])) for i in rows]  # fmt: skip
    classifier = build_zero_shot_classifier(tiny_model, TOKENIZER, ["blue", "green", "red"], prompts.TEMPLATES["en"])
    shares = zero_shot.probabilities(tiny_model, embed_images(tiny_model, preprocess, paths), classifier)
    assert [p["image"] for p in found["pictures"]] == [str(path) for path in paths]
    for picture, share in zip(found["pictures"], shares):
        assert dict(picture["top"]) == pytest.approx(dict(zip(["blue", "green", "red"], share.tolist())), abs=1e-5)
    guess = shares.argmax(1)
    assert found["metrics"]["top1"] == pytest.approx((guess == [0, 0, 1, 1, 2, 2]).mean())
    assert np.array(found["confusion"]).sum(0).tolist() == np.bincount(guess, minlength=3).tolist()
    assert (folders / "out" / "confusion.png").is_file()
    assert (folders / "out" / "zero_shot.md").read_text() in capsys.readouterr().out


def test_names_words_and_folders(folders, capsys):
    words = "rouge=red,vert=green,bleu=blue,gris=gray"
    found = run(zero_shot, folders, "--images", folders / "set", "--classes", words)
    assert [p["class"] for p in found["pictures"]] == ["bleu"] * 2 + ["vert"] * 2 + ["rouge"] * 2
    assert np.array(found["confusion"]).shape == (4, 4)
    found = run(zero_shot, folders, "--images", folders / "0.png", folders / "set" / "red", "--classes", "red,blue")
    assert [p["class"] for p in found["pictures"]] == [None] * 3 and "metrics" not in found
    assert [len(p["top"]) for p in found["pictures"]] == [2] * 3
    found = run(zero_shot, folders, "--images", folders / "set", "--classes", "cat,dog")
    assert "metrics" not in found and "the folders are none of the classes" in capsys.readouterr().out
    with pytest.raises(InputError, match="the folder 'blue' is not one of the classes red, green"):
        run(zero_shot, folders, "--images", folders / "set", "--classes", "red,green")
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        run(zero_shot, folders, "--images", folders / "nowhere")
    with pytest.raises(InputError, match="--language de is not one of en"):
        run(zero_shot, folders, "--images", folders / "set", "--language", "de")


def test_names_of_classes_break_no_table_and_no_terminal(folders, capsys):
    hostile = "a|b", "x\ny", "\x1b[31mred"
    for name, folder in zip(hostile, ("red", "green", "blue")):
        (folders / "set" / folder).rename(folders / "set" / name)
    run(zero_shot, folders, "--images", folders / "set")
    run(zero_shot, folders, "--images", folders / "0.png", "--classes", "a|b,\x1b[31mred")
    (folders / "c.json").write_text(json.dumps({"harmless": ["a"], "x\ny": ["b"], "a|b": ["c"]}))
    run(moderate, folders, "--images", folders / "0.png", "--categories", folders / "c.json")
    run(moderate, folders, "--images", folders / "0.png", "--ask", "a|b\x1b[31m")
    said = capsys.readouterr().out
    assert "\x1b" not in said and "| x\\ny |" in said and "| a\\|b |" in said and "| \\x1b[31mred |" in said
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows) and "x\\ny: threshold" in said


def test_empty_words_are_no_question(folders):
    for words in ["--ask", " "], ["--ask", "a dog", "--against", ""], ["--ask", "a dog", "--against", "a cat", " "]:
        with pytest.raises(InputError, match="--ask or --against is empty"):
            run(moderate, folders, "--images", folders / "0.png", *words)


def test_what_is_found_is_written_before_it_is_printed(folders, monkeypatch):
    """A reader such as head closes the pipe after some lines."""

    def closed(*args, **kwargs):
        raise BrokenPipeError

    for module, name in (zero_shot, "zero_shot"), (moderate, "moderation"):
        with monkeypatch.context() as patched, pytest.raises(BrokenPipeError):
            patched.setattr("builtins.print", closed)
            run(module, folders, "--images", folders / "set")
        assert json.loads((folders / "out" / f"{name}.json").read_text())["pictures"]


def test_bad_pictures_stop_or_are_listed(folders):
    (folders / "set" / "red" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="bad.png: not an image in a supported format"):
        run(zero_shot, folders, "--images", folders / "set")
    with pytest.warns(UserWarning, match="1 of 7 images cannot be used"):
        found = run(zero_shot, folders, "--images", folders / "set", "--on_bad_sample", "skip")
    assert len(found["pictures"]) == 6 and sum(map(sum, found["confusion"])) == 6
    listed = json.loads((folders / "out" / "bad_samples.jsonl").read_text())
    assert listed["sample"].endswith("red/bad.png") and "not an image" in listed["reason"]


def test_no_picture_of_a_folder_is_passed_over_in_silence(folders, tmp_path, capsys, shut_folder):
    (tmp_path / "elsewhere").mkdir()
    (folders / "set" / "red").rename(tmp_path / "elsewhere" / "red")
    (folders / "set" / "red").symlink_to(tmp_path / "elsewhere" / "red")
    shutil.copy(folders / "1.png", folders / "set" / "green" / "x.JFIF")
    (folders / "set" / ".thumbs").mkdir()
    shutil.copy(folders / "1.png", folders / "set" / ".thumbs")
    (folders / "set" / "grey").mkdir()
    with pytest.warns(UserWarning, match="no image in grey"):
        found = run(zero_shot, folders, "--images", folders / "set")
    assert list(found["classes"]) == ["blue", "green", "red"] and len(found["pictures"]) == 7 and "metrics" in found
    (folders / "set" / "grey").rmdir()

    for words, reason in (
        ([folders / "set", folders / "0.png"], "0.png is not in a class folder"),
        ([folders / "loose"], "images beside its folders"),
    ):
        shutil.copytree(folders / "set", folders / "loose", dirs_exist_ok=True)
        shutil.copy(folders / "0.png", folders / "loose" / "cover.png")
        assert "metrics" not in run(zero_shot, folders, "--images", *words, "--classes", "red,blue,green")
        assert reason in capsys.readouterr().out and not (folders / "out" / "confusion.png").exists()

    with open(os.fsencode(folders / "set" / "green") + b"/\xff.png", "wb") as file:
        file.write((folders / "1.png").read_bytes())
    with pytest.raises(InputError, match=r"1 of 8 images cannot be used:\n.*no valid Unicode"):
        run(zero_shot, folders, "--images", folders / "set")
    with pytest.warns(UserWarning, match="no valid Unicode"):
        assert len(run(zero_shot, folders, "--images", folders / "set", "--on_bad_sample", "skip")["pictures"]) == 7
    with pytest.raises(InputError, match="one class alone fits every image"):
        run(zero_shot, folders, "--images", folders / "0.png", "--classes", "red")

    shut_folder("blue")
    with pytest.raises(InputError, match=r"blue: cannot be opened \(Permission denied\)"):
        run(zero_shot, folders, "--images", folders / "set")


def test_a_picture_is_classified_by_all_classes_or_none(folders, tiny_model):
    classifier = build_zero_shot_classifier(tiny_model, TOKENIZER, (name for name in ("a", "b")), ["{}"], use_tqdm=True)
    preprocess = miniclip.Preprocess(tiny_model.config.preprocess_cfg)
    for names in (["a"], ["a", "b", "c"]):
        with pytest.raises(InputError, match=f"{len(names)} class names for a classifier of 2 classes"):
            zero_shot_classify(tiny_model, preprocess, classifier, folders / "0.png", names)


def test_classes_and_templates_from_files(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"n1": "tench", "n2": {"en": "dog", "zh": "狗"}}), encoding="utf-8")
    assert prompts.read_classes(str(path), "zh") == {"n1": "tench", "n2": "狗"}
    with pytest.raises(InputError, match="n2 has no words in 'fr', only in en, zh"):
        prompts.read_classes(str(path), "fr")
    path.write_text(json.dumps(["hot dog", "b"]))
    assert prompts.read_classes(str(path)) == {"hot dog": "hot dog", "b": "b"}
    (tmp_path / "c.txt").write_text("n1=hot dog\n\ncat\n")
    assert prompts.read_classes(str(tmp_path / "c.txt")) == {"n1": "hot dog", "cat": "cat"}
    for name, content in ("C.TXT", "a\nb"), ("C.JSON", '["a", "b"]'):
        (tmp_path / name).write_text(content)
        assert prompts.read_classes(str(tmp_path / name)) == {"a": "a", "b": "b"}
    missing = str(tmp_path / "no.txt")
    (tmp_path / "c.csv").write_text("a,b")
    for text, message in (
        ("a,b,a", "'a' is named twice"), ("a,,b", "without a name"), (missing, "no such file"), ("", "without a name"),
        ("a=x,b=x", "two classes have the words 'x'"), (str(tmp_path / "c.csv"), "are read from .txt and .json"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            prompts.read_classes(text)
    many = [f"class {n}" for n in range(300)]
    assert list(prompts.read_classes(",".join(many))) == many, "longer than the name of a file may be"
    for content in ("{}", "[1]", '"a {}"'):
        path.write_text(content)
        with pytest.raises(InputError, match="classes.json: expected templates"):
            prompts.read_templates(path)
    (tmp_path / "t.txt").write_text("a {}\nmy {}\n")
    assert prompts.read_templates(tmp_path / "t.txt") == ["a {}", "my {}"]
    (tmp_path / "t.txt").write_text("a {}\nmine\n")
    with pytest.raises(InputError, match="t.txt: 'mine' has no {}"):
        prompts.read_templates(tmp_path / "t.txt")
    for language, templates in prompts.TEMPLATES.items():
        assert len(prompts.OBJECTS[language]) == 10 and all("x" in prompts.fill(t, "x") for t in templates)


def test_what_clips_tokenizer_reads(tiny_model):
    assert prompts.tokenizer_coverage(TOKENIZER, ["dog", "cat"]) == {
        "tokens_per_character": pytest.approx(2 / 6), "unknown": 0, "fragments": 0, "unreadable": [], "identical": []
    }  # fmt: skip
    found = prompts.tokenizer_coverage(TOKENIZER, ["狗"])  # three bytes, none of which is a character
    assert found["tokens_per_character"] == len(TOKENIZER.encode("狗")) >= 2
    assert found["fragments"] == 1 and found["unreadable"] == ["狗"] and found["unknown"] == 0
    assert prompts.tokenizer_coverage(TOKENIZER, ["dog", "Dog"])["identical"] == ["dog", "Dog"]
    assert prompts.tokenizer_coverage(TOKENIZER, prompts.OBJECTS["fr"])["unreadable"] == []
    with pytest.warns(
        UserWarning, match=r"cannot read 2 of 3 class names \(猫, 狗\).*tokens per character.*near chance"
    ):
        build_zero_shot_classifier(tiny_model, TOKENIZER, ["猫", "狗", "dog"], ["{}"])


def test_what_a_tokenizer_of_words_reads(tmp_path):
    import transformers

    save_tokenizer(tmp_path)
    tokenizer = HfTokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path), 16)
    found = prompts.tokenizer_coverage(tokenizer, ["red shape", "猫", "狗", "green"])
    assert found["unknown"] == 2 / 5 and found["fragments"] == 0  # red, shape, [UNK], [UNK], green
    assert found["unreadable"] == found["identical"] == ["猫", "狗"]
    assert found["tokens_per_character"] == 5 / 15
    with pytest.warns(UserWarning, match="40% of the tokens unknown.*猫, 狗 are identical to it"):
        prompts.warn_of_poor_coverage(tokenizer, ["red shape", "猫", "狗", "green"])


def test_a_harmless_picture_is_approved(tiny_model):
    """Against banned classes alone one of them is always likely. Cosines: 0.3 to a banned class, 0.5 to a harmless
    text, temperature 1/10."""
    tiny_model.logit_scale.data.fill_(math.log(10))
    image, classes = np.float32([[1, 0]]), torch.tensor([[0.3, 0.5, 0.2], [0, 0, 0]])
    score = zero_shot.probabilities(tiny_model, image, classes)[:, 0]
    assert score == pytest.approx(math.exp(3) / (math.exp(3) + math.exp(5) + math.exp(2)))
    thresholds = {"weapon": {"threshold": 0.5, "review": 0.25}, "alcohol": {"threshold": 0.9, "review": 0.6}}
    decided = moderate.decide({"weapon": score[0], "alcohol": 0.05}, thresholds)
    assert decided == {"status": "approved", "reason": "harmless", "confidence": pytest.approx(1 - score[0])}
    decided = moderate.decide({"weapon": 0.55, "alcohol": 0.8}, thresholds)
    assert decided == {"status": "rejected", "reason": "weapon", "confidence": 0.55}
    decided = moderate.decide({"weapon": 0.3, "alcohol": 0.8}, thresholds)
    assert decided == {"status": "review", "reason": "alcohol", "confidence": 0.8}


def test_thresholds_by_hand():
    found = moderate.calibrate(np.array([0.6, 0.9]), np.array([0.1, 0.2, 0.3]))
    assert found == {"threshold": pytest.approx(0.45), "review": pytest.approx(0.45), "balanced_accuracy": 1}
    # One of three with it scores low: 5/6 at 0.35, and the person who looks from 0.2 on misses none.
    found = moderate.calibrate(np.array([0.2, 0.4, 0.8]), np.array([0.1, 0.3, 0.1, 0.1]))
    expected = {"threshold": pytest.approx(0.15), "review": pytest.approx(0.15), "balanced_accuracy": 1 / 2 + 3 / 8}
    assert found == expected
    found = moderate.calibrate(np.array([0.2, 0.4, 0.8]), np.array([0.1, 0.3, 0.3, 0.3]))
    assert found["threshold"] == pytest.approx(0.35) and found["review"] == pytest.approx(0.2)
    # 3/4 at 0.15, 0.25 and 0.35: the lowest.
    found = moderate.calibrate(np.array([0.2, 0.4]), np.array([0.1, 0.3]))
    assert found["threshold"] == pytest.approx(0.15) and found["balanced_accuracy"] == 0.75
    for yes, no, message in (([0.1], [0.2, 0.3], "1 examples with and 2"), ([0.1, 0.1], [0.1, 0.1], "cannot tell"),
                             ([0.1, 0.2], [0.3, 0.4], "cannot tell")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            moderate.calibrate(np.array(yes), np.array(no))


def test_a_question_with_examples(folders, tiny_model):
    (folders / "set" / "red").rename(folders / "set" / "yes")
    (folders / "set" / "green").rename(folders / "set" / "no")
    with pytest.raises(InputError, match="'blue' is not one of no, yes: rename it"):
        run(moderate, folders, "--images", folders / "0.png", "--ask", "red paper", "--examples", folders / "set")
    shutil.rmtree(folders / "set" / "blue")
    preprocess = miniclip.Preprocess(tiny_model.config.preprocess_cfg)
    paths = [folders / f"{i}.png" for i in (0, 12, 1, 13)]
    scores = moderate.ask(tiny_model, TOKENIZER, embed_images(tiny_model, preprocess, paths), "red paper")
    if scores[:2].mean() < scores[2:].mean():  # a random model: ask for what it takes for it
        (folders / "set" / "yes").rename(folders / "set" / "x")
        (folders / "set" / "no").rename(folders / "set" / "yes")
        (folders / "set" / "x").rename(folders / "set" / "no")
        scores = scores[[2, 3, 0, 1]]
    expected = moderate.calibrate(scores[:2], scores[2:])
    found = run(moderate, folders, "--images", *paths, "--ask", "red paper", "--examples", folders / "set")
    assert found["thresholds"]["yes"] == pytest.approx(expected, abs=1e-6)
    for picture in found["pictures"]:
        assert picture["answer"] == ("yes" if picture["score"] >= expected["threshold"] else "no")


def test_categories_are_each_against_what_is_harmless(folders, tiny_model):
    categories = {"harmless": ["a photo", "a wide sheet"], "red": ["red paper", "a red sheet"], "ink": ["blue ink"]}
    (folders / "categories.json").write_text(json.dumps(categories))
    found = run(moderate, folders, "--images", folders / "set", "--categories", folders / "categories.json")
    assert [p["status"] for p in found["pictures"]].count("approved") < 6  # a random model is not sure of anything
    picture = found["pictures"][0]
    with torch.no_grad():
        texts = tiny_model.encode_text(TOKENIZER(["a photo", "a wide sheet", "red paper", "a red sheet"]), True)
        pixels = miniclip.Preprocess(tiny_model.config.preprocess_cfg).load(picture["image"])[None]
        image = tiny_model.encode_image(pixels, True)
        vectors = torch.stack([F.normalize(texts[2:].mean(0), dim=0), texts[0], texts[1]])
        share = (tiny_model.logit_scale.exp() * image @ vectors.T).softmax(1)[0, 0]
    assert picture["scores"]["red"] == pytest.approx(share.item(), abs=1e-5)
    for content in ("[]", '{"red": ["x"]}', '{"harmless": ["x"], "red": "x"}'):
        (folders / "categories.json").write_text(content)
        with pytest.raises(InputError, match="categories.json: expected"):
            run(moderate, folders, "--images", folders / "set", "--categories", folders / "categories.json")


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("started", [False, True])
def test_a_probe_is_where_its_gradient_is_zero(started):
    rng = np.random.default_rng(0)
    features, labels = unit(rng.standard_normal((40, 6))), rng.integers(0, 3, 40)
    start = torch.from_numpy(rng.standard_normal((6, 3))) if started else None
    weight, bias = linear_probe.fit(features, labels, 3, 0.5, start, scale=5)
    logits = 5 * features @ weight.numpy() + bias.numpy()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    residual = (shares - np.eye(3)[labels]) / 40
    gradient = 5 * features.T @ residual + 0.5 * (weight - (0 if start is None else start)).numpy()
    assert np.abs(gradient).max() < 1e-5 and np.abs(residual.sum(0)).max() < 1e-5
    held, _ = linear_probe.fit(features, labels, 3, 1e9, start, scale=5)  # an endless strength: the start itself
    assert (held - (0 if start is None else start)).abs().max() < 1e-6


def test_the_strength_is_chosen_by_what_was_left_out():
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    noise = unit(rng.standard_normal((80, 20)))
    assert linear_probe.choose_strength(noise[:40], labels[:40], 2, scale=10) >= 1  # nothing to learn: hold it back
    clear = unit(noise + 5 * np.eye(20)[labels])
    assert linear_probe.choose_strength(clear[:24], labels[:24], 2, scale=10) < 0.1
    assert linear_probe.choose_strength(clear[:2], labels[:2], 2) == linear_probe.STRENGTHS[-1]
    rows = linear_probe.draw_shots(labels, 3, 0)
    assert np.bincount(labels[rows]).tolist() == [3, 3] and len(set(rows)) == 6
    assert len(linear_probe.draw_shots(labels, 100, 0)) == 80


def test_a_probe_learns_what_the_words_do_not_say(folders):
    """A random model's words mean nothing, its pictures still differ."""
    with pytest.raises(InputError, match="6 images are both in --examples and in --images"):
        run(linear_probe, folders, "--examples", folders / "set", "--images", folders / "set")
    shutil.copytree(folders / "set", folders / "copy")
    found = run(linear_probe, folders, "--examples", folders / "set", "--images", folders / "copy", "--shots", "2",
                "--seeds", "1")  # fmt: skip
    zero, nothing, started = found["found"]
    assert zero["shots"] == 0 and nothing["shots"] == started["shots"] == 2
    assert nothing["top1"] == 1 > zero["top1"]  # measured on its own examples
    with np.load(folders / "out" / "probe.npz") as saved:
        assert saved["weight"].shape == (16, 3) and saved["classes"].tolist() == ["blue", "green", "red"]
        model = miniclip.MiniClip.from_pretrained(folders / "model").eval()
        paths = sorted((folders / "set").rglob("*.png"))
        embeds = embed_images(model, miniclip.Preprocess(model.config.preprocess_cfg), paths)
        guess = saved["classes"][(embeds @ saved["weight"] + saved["bias"]).argmax(1)]
    assert (guess == [path.parent.name for path in paths]).mean() == pytest.approx(found["all_examples"]["top1"])
    for path in (folders / "set" / "red").iterdir():
        path.write_bytes(b"bad")
    skip = ("--examples", folders / "set", "--images", folders / "copy", "--on_bad_sample", "skip")
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no usable example of 'red'"):
        run(linear_probe, folders, *skip)
    with pytest.raises(InputError, match="--examples: expected a folder with one folder for each"):
        run(
            linear_probe,
            folders,
            "--examples",
            folders / "set" / "red",
            "--images",
            folders / "set",
            "--classes",
            "a,b",
        )


SCENE = Scene(Group(2, "small", "red", "circle"), Group(1, "large", "blue", "star"), "left")


def test_an_answer_changes_the_scene_in_one_thing():
    assert scene_quiz.replaced(SCENE, "colour", 1, "pink").second == Group(1, "large", "pink", "star")
    assert scene_quiz.replaced(SCENE, "position", 0, "below") == Scene(SCENE.second, SCENE.first, "above")
    assert scene_quiz.replaced(SCENE, "position", 1, "above") == Scene(SCENE.second, SCENE.first, "above")
    assert scene_quiz.right_answer(SCENE, "position", 1) == "right"
    for scene, _, _ in drawn("eval", 20):
        for which in (0, 1):
            for question, answers in scene_quiz.CLASSES.items():
                right = scene_quiz.right_answer(scene, question, which)
                same = [answer for answer in answers if scene_quiz.replaced(scene, question, which, answer) == scene]
                assert same == [right]
                for other in scene_quiz.drawn_scenes(scene, question, which)[:3]:
                    for answer in answers:
                        asked = scene_quiz.replaced(other, question, which, answer)
                        mine = which if question != "position" else int(answer in ("right", "below"))
                        assert scene_quiz.right_answer(asked, question, mine) == answer


def test_the_quiz_marks_what_a_model_says(tiny_config):
    """Pictures that say what a description of them says, to a model that reads all of it: no mistake. Pictures that say
    what describes another answer: none is right."""
    tiny_config.text_cfg.context_length = 32
    torch.manual_seed(0)
    model, tokenizer = miniclip.MiniClip(tiny_config).eval(), miniclip.Tokenizer(32)
    scenes = [scene for scene, _, _ in drawn("eval", 12)]

    def described(drawn, asked):
        sentences = [captions(s, random.Random(f"{one} 0"), 1, scene_quiz.EITHER)[0] for s, one in zip(drawn, asked)]
        return miniclip.embed_texts(model, tokenizer, sentences)

    right = {"colour": 1, "shape": 1, "position": 1}
    assert scene_quiz.quiz(model, tokenizer, scenes, described(scenes, scenes), alone=False) == right
    left = [scene for scene in scenes if scene.relation == "left"]
    mirrored = [scene_quiz.replaced(scene, "position", 0, "right") for scene in left]
    found = scene_quiz.quiz(model, tokenizer, left, described(mirrored, left), False)
    assert found["position"] == 0
    alone = scene_quiz.quiz(model, tokenizer, scenes, described(scenes, scenes), alone=True)
    assert set(alone) == set(right) and all(0 <= share <= 1 for share in alone.values())


@pytest.mark.parametrize("module", ["zero_shot", "moderate", "linear_probe", "scene_quiz"])
def test_help_imports_no_torch(module):
    code = f"import sys\nfrom miniclip.commands.{module} import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert not {'torch', 'transformers'} & set(sys.modules)"], cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "--model" in done.stdout, done.stderr
