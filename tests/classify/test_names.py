"""Names of classes as data sets write them: run together, numbered, or ids with their words in another file."""

import json
import shutil
import unicodedata
import warnings

import pytest

import miniclip
from miniclip.classify import prompts
from miniclip.classify.images import choose_classes
from miniclip.classify.names import spell_out
from miniclip.classify.zero_shot import build_zero_shot_classifier
from miniclip.commands import zero_shot
from miniclip.utils.errors import InputError
from miniclip.utils.imagenet import IMAGENET

TOKENIZER = miniclip.Tokenizer(16)


NAMES = {
    "hot_dog": "hot dog", "AnnualCrop": "annual crop", "SeaLake": "sea lake", "annualCrop": "annual crop",
    "Apple___Black_rot": "Apple Black rot", "MRIScan": "MRI scan", "TShirt": "t shirt", "DVDs": "DVDs", "dog": "dog",
    "McDonald": "McDonald", "iPhone": "iPhone", "New York": "New York", "t-shirt": "t-shirt", "737-300": "737-300",
    "3_wheeler": "3 wheeler", "热狗": "热狗", "_": "_", "n01440764": "n01440764",
}  # fmt: skip


def test_class_names_are_spelled_out():
    assert [spell_out([name])[name] for name in NAMES] == list(NAMES.values())
    birds = ["001.Black_footed_Albatross", "002.LaysanAlbatross"]
    assert list(spell_out(birds).values()) == ["Black footed Albatross", "laysan albatross"]
    assert list(spell_out(["n02085620-Chihuahua", "n02085782-Japanese_spaniel"]).values()) == [
        "Chihuahua", "Japanese spaniel"
    ]  # fmt: skip
    assert spell_out(["1_dog", "2_dog"]) == {"1_dog": "1_dog", "2_dog": "2_dog"}, "not equal"
    assert spell_out(["hot_dog", "hot dog"]) == {"hot_dog": "hot_dog", "hot dog": "hot dog"}
    given = prompts.read_classes("AnnualCrop,x=SeaLake,hot_dog")
    assert list(given.values())[:2] == ["annual crop", "SeaLake"] and given["hot_dog"] == "hot dog"


@pytest.mark.parametrize("ids, name, content", [
    (["n01440764", "n02012849"], "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn02012849 great_crane\nn1 x"),
    (["n01440764", "n02012849"], "words.txt", "n02012849\tGreat crane, bird\nn01440764\ttench"),
    (["n01440764", "n02012849"], "map_clsloc.txt", "n01440764 1 tench\nn02012849 2 great_crane"),
    (["n01440764", "n02012849"], "imagenet_class_index.json",
     '{"0": ["n01440764", "tench"], "1": ["n02012849", "great_crane"], "2": ["n1", "x"]}'),
    (["0", "1"], "imagenet_class_index.json", '{"0": ["n01440764", "tench"], "1": ["n02012849", "great_crane"]}'),
    (["0", "1"], "class_to_idx.json", '{"great crane": 1, "tench": 0}'),
    (["0", "1"], "classes.txt", "tench\ngreat crane\n"), (["01", "02"], "labels.txt", "tench\ngreat crane"),
    (["0", "1"], "classes.json", '["tench", "GreatCrane"]'), (["0", "1"], "names.txt", "0: tench\n1: great crane"),
])  # fmt: skip
def test_words_of_ids_are_found_beside_the_folders(tmp_path, caplog, ids, name, content):
    (tmp_path / "val").mkdir()
    folders = [*ids, ids[0]]
    classes = dict(zip(ids, ["tench", "great crane"]))
    for place in (tmp_path, tmp_path / "val"):
        (place / name).write_text(content)
        found, rows = choose_classes(None, folders, "en", [str(tmp_path / "val")])
        assert {key: words.lower() for key, words in found.items()} == classes and rows == [0, 1, 0]
        assert name in caplog.text
        (place / name).unlink()
    for bad in ("", "tench", "a\nb\nc", "{", "\udcff"):  # of other classes, or anything
        (tmp_path / name).write_bytes(bad.encode(errors="surrogateescape"))
        own = {key: IMAGENET["classes"].get(key, key) for key in ids}  # ImageNet's words are known
        assert choose_classes(None, folders, "en", [str(tmp_path / "val")]) == (own, [0, 1, 0])


def test_an_accent_in_a_folder_may_be_written_in_the_other_form():
    """é is one character here and two there: a folder from a Mac has the name of a class that was typed on Linux."""
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for given, folder in ((one, two), (two, one)):
        assert choose_classes({given: "coffee", "thé": "tea"}, [folder, "thé"], "en")[1] == [0, 1]
        assert choose_classes({"a": given, "b": "tea"}, ["b", folder], "en")[1] == [1, 0]
    assert choose_classes(None, [one, two, "the"], "en") == ({"café": "café", "the": "the"}, [0, 0, 1])
    for text, problem in (f"{one},{two}", "named twice"), (f"a={one},b={two}", "two classes have the words"):
        with pytest.raises(InputError, match=problem):
            prompts.read_classes(text)


def test_imagenet():
    classes = prompts.read_classes("imagenet")
    assert len(classes) == 1000 and classes["n01440764"] == "tench" and list(classes) == sorted(classes)
    assert len(prompts.read_templates("imagenet")) == 80
    for template in (*IMAGENET["templates"], *IMAGENET["simple_templates"]):
        assert prompts.fill(template, "tench").count("tench") == 1


def test_ids_are_told_of_where_no_words_are_found(tiny_model):
    for names in (["n01440764", "n02012849"], ["0", "17"], ["class_1", "class_2"]):
        with pytest.warns(UserWarning, match=f"2 of 2 class names are ids, not words .*--classes {names[0]}=words"):
            build_zero_shot_classifier(tiny_model, TOKENIZER, names, ["a {}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_zero_shot_classifier(tiny_model, TOKENIZER, ["A320", "737-300", "dog", "7"], ["a {}"])


def test_the_command_asks_for_the_words(caption_set, tiny_model):
    tiny_model.save_pretrained(caption_set / "model")
    for i, name in enumerate(["n01440764", "n02012849", "n03126707"]):
        (caption_set / "set" / "val" / name).mkdir(parents=True)
        shutil.copy(caption_set / f"{i}.png", caption_set / "set" / "val" / name)
    (caption_set / "set" / "synset_words.txt").write_text("n01440764 blue, azure\nn02012849 AnnualCrop\nn03126707 red")
    command = ["--model", caption_set / "model", "--images", caption_set / "set" / "val", "--output_dir", caption_set]
    zero_shot.main([*map(str, command), "--device", "cpu"])
    found = json.loads((caption_set / "zero_shot.json").read_text())
    assert found["classes"] == {"n01440764": "blue", "n02012849": "annual crop", "n03126707": "red"}
    assert "top1" in found["metrics"]
