"""The demo's data set: split by held-out combination, and captions that say what is drawn."""

import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from miniclip.commands.shapes import main
from miniclip.datasets.shapes import (
    COLORS,
    COUNTS,
    FAMILY,
    KINDS,
    OPPOSITE,
    SHAPES,
    SIZES,
    Group,
    Scene,
    captions,
    draw,
    make_families,
    make_scenes,
    split_pairs,
    write,
)
from miniclip.utils.errors import InputError
from tests.conftest import ROOT


def pair(scene: Scene) -> frozenset:
    return frozenset({scene.first.kind, scene.second.kind})


def splits(seed: int = 0, train: int = 6000, evaluation: int = 600) -> tuple[list[Scene], list[Scene]]:
    train_pairs, eval_pairs = split_pairs(seed)
    return make_families(train_pairs, train, random.Random(1)), make_scenes(eval_pairs, evaluation, random.Random(2))


def test_pairs_of_kinds_are_held_out_and_single_kinds_are_not():
    train_pairs, eval_pairs = split_pairs(0)
    assert len(set(train_pairs) | set(eval_pairs)) == 48 * 47 // 2 and not set(train_pairs) & set(eval_pairs)
    train, evaluation = splits()
    assert not {pair(scene) for scene in train} & {pair(scene) for scene in evaluation}
    for side in ("first", "second"):  # each kind is met on either side of the relation
        assert {getattr(scene, side).kind for scene in train} == set(KINDS)
    assert len({pair(scene) for scene in evaluation}) == len(eval_pairs) == 282
    assert split_pairs(1) != split_pairs(0)


def test_no_scene_comes_twice():
    for scenes in splits():
        assert len(set(scenes)) == len(scenes)
        assert {scene.relation for scene in scenes} == {"left", "above"}  # "right" would be "left" said again
        assert all(len(pair(scene)) == 2 for scene in scenes)


def test_families_are_hard_negatives():
    """Neighbours in the file differ in shapes and places alone, and a batch of the recipe holds whole families."""
    recipe = json.loads((ROOT / "recipes" / "demo.json").read_text())
    assert recipe["train_sampling_strategy"] == "sequential" and recipe["per_device_train_batch_size"] % FAMILY == 0
    scenes = splits(train=1600)[0]
    for start in range(0, 1600, FAMILY):
        family = set(scenes[start : start + FAMILY])
        assert len({frozenset(group._replace(shape="") for group in scene[:2]) for scene in family}) == 1
        for one, other, _ in family:
            places = {Scene(*order, way) for order in ((one, other), (other, one)) for way in ("left", "above")}
            assert places <= family and len(family) == FAMILY


def test_more_scenes_than_there_are_is_an_error():
    pairs = split_pairs(0)[1][:1]
    assert len(make_scenes(pairs, 144, random.Random(0))) == 144  # all of them: 2 relations, 2 orders, (3 * 2) ** 2
    with pytest.raises(ValueError, match="145 .* only 144"):
        make_scenes(pairs, 145, random.Random(0))
    assert set(make_families(pairs, 144, random.Random(0))) == set(make_scenes(pairs, 144, random.Random(1)))


class Fixed(random.Random):
    """Chooses the first or last option always, and swaps the groups or not."""

    def __init__(self, option: int, swap: bool):
        super().__init__(0)
        self.option, self.swap = option, swap

    def choice(self, options):
        return options[self.option]

    def sample(self, options, number):
        return options[:number]

    def random(self):
        return 0.0 if self.swap else 0.9


def test_captions_by_hand():
    scene = Scene(Group(1, "small", "red", "circle"), Group(2, "large", "blue", "square"), "left")
    assert captions(scene, Fixed(0, swap=False)) == [
        "a small red circle to the left of two large blue squares",
        "a small red circle is to the left of two large blue squares",
        "there is a small red circle to the left of two large blue squares",
        "to the left of two large blue squares there is a small red circle",
        "a small red circle on the left and two large blue squares on the right",
    ]
    assert captions(scene._replace(relation="above"), Fixed(0, swap=True), 9)[1:] == [
        "two large blue squares are below a small red circle",
        "there are two large blue squares below a small red circle",
        "below a small red circle there are two large blue squares",
        "two large blue squares at the bottom and a small red circle at the top",
        "at the bottom are two large blue squares, at the top is a small red circle",
        "two large blue squares at the bottom, with a small red circle at the top",
        "a picture of two large blue squares below a small red circle",
        "an image with two large blue squares at the bottom and a small red circle at the top",
    ]
    assert captions(scene, Fixed(-1, swap=True), 2) == [
        "a pair of huge boxes in blue on the right side of a single tiny disc in red",
        "a pair of huge boxes in blue is on the right side of a single tiny disc in red",
    ]


WORDS = {  # back from words to what they mean, written down here once more
    "count": {"a": 1, "one": 1, "a single": 1, "two": 2, "a pair of": 2, "three": 3, "a group of three": 3},
    "size": {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"},
    "shape": {"circle": "circle", "disc": "circle", "square": "square", "box": "square", "triangle": "triangle",
              "star": "star", "diamond": "diamond", "rhombus": "diamond", "cross": "cross", "plus sign": "cross"},
}  # fmt: skip
PLURALS = {"box": "boxes", "rhombus": "rhombuses", "cross": "crosses"}
PHRASE = re.compile(
    rf"\b(?P<count>a pair of|a group of three|a single|a|one|two|three) (?P<size>{'|'.join(WORDS['size'])}) "
    rf"(?:(?P<c1>{'|'.join(COLORS)}) )?(?P<noun>[a-z]+(?: signs?)?)(?: in (?P<c2>{'|'.join(COLORS)}))?\b"
)


def parse(caption: str) -> Scene:
    """Understand a caption without the code that wrote it."""
    groups, rest, verbs = [], caption, []
    for found in PHRASE.finditer(caption):
        count = WORDS["count"][found["count"]]
        singular = {PLURALS.get(word, word + "s"): word for word in WORDS["shape"]}
        noun = singular[found["noun"]] if count > 1 else found["noun"]  # a KeyError: singular and plural mixed up
        assert bool(found["c1"]) != bool(found["c2"])
        groups.append(Group(count, WORDS["size"][found["size"]], found["c1"] or found["c2"], WORDS["shape"][noun]))
        verbs.append("are" if found["count"] in ("two", "three") else "is")
        rest = rest.replace(found[0], "XY"[len(groups) - 1], 1)
    assert len(groups) == 2, caption
    for verb, group in re.findall(r"\b(is|are) ([XY])\b", rest):
        assert verb == verbs["XY".index(group)], caption
    if found := re.match(r"X (is|are)\b", rest):
        assert found[1] == verbs[0], caption
    first, second = groups
    sides = {"to the left of": "left", "on the left side of": "left", "left of": "left", "to the right of": "right",
             "on the right side of": "right", "right of": "right", "above": "above", "over": "above",
             "higher than": "above", "below": "below", "under": "below", "beneath": "below"}  # fmt: skip
    places = {"on the left": "left", "on the right": "right", "at the top": "above", "at the bottom": "below"}
    if found := re.search(rf"({'|'.join(sides)}) Y", rest):  # X ... above Y
        relation = sides[found[1]]
    elif found := re.fullmatch(rf"({'|'.join(sides)}) X there (is|are) Y", rest):
        relation = OPPOSITE[sides[found[1]]]
    else:
        found = re.search(rf"X ({'|'.join(places)})", rest) or re.search(rf"({'|'.join(places)}) (?:is|are) X", rest)
        relation = places[found[1]]
        other = re.search(rf"Y ({'|'.join(places)})", rest) or re.search(rf"({'|'.join(places)}) (?:is|are) Y", rest)
        assert places[other[1]] == OPPOSITE[relation], caption
    if relation in ("right", "below"):
        first, second, relation = second, first, OPPOSITE[relation]
    return Scene(first, second, relation)


def test_every_caption_says_exactly_what_the_scene_holds():
    rng = random.Random(0)
    for scene in splits(evaluation=400)[1]:
        said = captions(scene, rng, 9)
        assert len(set(said)) == 9
        for caption in said:
            assert parse(caption) == scene, caption
            assert not re.search(r"\ba [aeio]|\ban [^aeio]|  |[A-Z{}]", caption), caption


def pixels(scene: Scene, color: str, size: int = 64, seed: int = 0) -> np.ndarray:
    image = np.asarray(draw(scene, random.Random(seed), size)).astype(int)
    assert image.shape == (size, size, 3)
    return np.abs(image - COLORS[color]).max(-1) <= 30


def runs(line: np.ndarray) -> int:
    """How many separate stretches of True."""
    return int((np.diff(np.concatenate([[0], line.astype(int)])) == 1).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", COUNTS)
def test_counts_and_sizes_are_visible(shape, count):
    area = {}
    for size in SIZES:
        for seed in range(4):
            scene = Scene(Group(count, size, "blue", shape), Group(1, "small", "red", "star"), "above")
            mask = pixels(scene, "blue", seed=seed)
            assert runs(mask.any(0)) == count, "shapes in a row do not touch each other"
            assert mask[:32].sum() == mask.sum(), "above: all in the upper half"
            assert not mask[0].any() and not mask[:, 0].any() and not mask[:, -1].any(), "nothing is cut off"
            area.setdefault(size, []).append(mask.sum() / count)
    assert min(area["large"]) > 2 * max(area["small"])


def test_the_relation_is_where_things_are():
    for relation, axis in (("left", 1), ("above", 0)):
        for seed in range(10):
            scene = Scene(Group(3, "large", "green", "circle"), Group(2, "large", "purple", "square"), relation)
            first, second = (np.argwhere(pixels(scene, color, seed=seed)) for color in ("green", "purple"))
            assert first[:, axis].max() < second[:, axis].min()
            distance = np.abs(first.mean(0) - second.mean(0))
            assert distance[axis] > 1.5 * distance[1 - axis], "clearly left, or clearly above"


def test_the_shades_of_two_colors_never_meet():
    for name, color in COLORS.items():
        for other, another in COLORS.items():
            assert name == other or np.abs(np.subtract(color, another)).max() > 2 * 14, (name, other)


def test_draws_differ_in_detail_and_not_by_chance():
    scene = Scene(Group(1, "large", "pink", "star"), Group(2, "small", "black", "cross"), "left")
    assert draw(scene, random.Random(1)).tobytes() == draw(scene, random.Random(1)).tobytes()
    assert draw(scene, random.Random(1)).tobytes() != draw(scene, random.Random(2)).tobytes()


def test_the_files_are_an_ordinary_caption_set_and_the_same_each_time(tmp_path):
    for folder, seed in (("one", 0), ("two", 0), ("three", 1)):
        write(tmp_path / folder, train=12, evaluation=5, seed=seed, size=48)
    for split, number in (("train", 12), ("eval", 5)):
        records = json.loads((tmp_path / "one" / f"{split}.json").read_text())
        assert len(records) == number
        for record in records:
            assert record["image"].startswith(f"images/{split}_") and len(set(record["caption"])) == 5
            with Image.open(tmp_path / "one" / record["image"]) as image:
                image.load()
                assert (image.mode, image.size, image.format) == ("RGB", (48, 48), "PNG")
            assert len({parse(caption) for caption in record["caption"]}) == 1
    files = {folder: {str(path.relative_to(tmp_path / folder)): path.read_bytes()
                      for path in (tmp_path / folder).rglob("*.*")} for folder in ("one", "two", "three")}  # fmt: skip
    assert files["one"] == files["two"] and len(files["one"]) == 12 + 5 + 2
    assert files["one"]["eval.json"] != files["three"]["eval.json"]


def test_command_line(tmp_path):
    main([str(tmp_path / "set"), "--train", "3", "--eval", "2", "--seed", "7"])
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["eval.json", "images", "train.json"]
    with pytest.raises(InputError, match="only 40,608 different ones exist"):
        main([str(tmp_path / "set"), "--train", "0", "--eval", "99999"])
