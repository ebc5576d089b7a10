"""The demo's data set: scenes of coloured shapes, drawn with Pillow and described by templates.

A scene is two groups of shapes, one left of or above the other: two small red circles (the first group) to the left of
(the relation) three large blue stars (the second group).

The two kinds of shape of an eval scene (say, red circle and blue star) never meet in a training scene, although each is
there with other partners: memorising scenes does not help, the model has to compose what it learned of their parts.

Training scenes come in families of eight with equal colours, sizes and numbers, one after the other. In a batch that
keeps this order they are one another's hard negatives: only shapes and places tell them apart."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tqdm import tqdm

from miniclip.utils.errors import InputError
from miniclip.utils.files import write_text

# With several words for one thing: shapes have (singular, plural); relations, of the first group to the second, have
# prepositions and the first one's place. The colours are far apart, even after the jitter of `draw`.
SCENES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
COLORS, SHAPES, SIZES, RELATIONS = (SCENES[name] for name in ("colors", "shapes", "sizes", "relations"))
COUNTS = {int(count): words for count, words in SCENES["counts"].items()}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
DIAMETER = {"small": 7, "large": 11.5}  # in 64ths of the image
CELL = 16  # in the same: each shape lies in one cell of 4 x 4, the patches of the demo's model
COLUMNS = 0, 3  # of the two groups
ROWS = {1: (1, 2), 2: (1,), 3: (0, 1)}  # of a group's first member: "left" never looks like "above"
HELD_OUT = 0.25  # of all pairs of kinds
SECOND_FIRST = 0.25  # see `captions`
FAMILY = 8  # training scenes with equal colours, sizes and numbers, one after the other
Kind = tuple[str, str]  # (color, shape)
KINDS: list[Kind] = list(itertools.product(COLORS, SHAPES))


class Group(NamedTuple):
    """One to three equal shapes, drawn side by side."""

    count: int
    size: str
    color: str
    shape: str

    @property
    def kind(self) -> Kind:
        return self.color, self.shape


class Scene(NamedTuple):
    """`first` is left of or above `second`; "B is right of A" is the same scene as "A is left of B"."""

    first: Group
    second: Group
    relation: str  # "left" or "above"


def split_pairs(seed: int) -> tuple[list[frozenset[Kind]], list[frozenset[Kind]]]:
    """Deals the 1,128 unordered pairs of the 48 kinds to training and evaluation, none to both: (train, eval)."""
    pairs = [frozenset(pair) for pair in itertools.combinations(KINDS, 2)]
    random.Random(f"{seed} pairs").shuffle(pairs)
    held_out = round(len(pairs) * HELD_OUT)
    return pairs[held_out:], pairs[:held_out]


def make_scenes(pairs: list[frozenset[Kind]], number: int, rng: random.Random) -> list[Scene]:
    """Returns `number` different scenes (R@1 can be 100%), all pairs equally often. Raises InputError for too many."""
    possible = len(pairs) * 2 * 2 * (len(COUNTS) * len(SIZES)) ** 2  # relations, orders, counts and sizes of both
    if number > possible:
        raise InputError(f"{number:,} scenes asked for, but only {possible:,} different ones exist")
    scenes: dict[Scene, None] = {}  # a set that keeps its order
    while len(scenes) < number:
        for pair in pairs[: number - len(scenes)]:
            kinds = rng.sample(sorted(pair), 2)
            groups = [Group(rng.choice(list(COUNTS)), rng.choice(list(SIZES)), *kind) for kind in kinds]
            scenes[Scene(*groups, rng.choice(["left", "above"]))] = None
    return list(scenes)


def make_families(pairs: list[frozenset[Kind]], number: int, rng: random.Random) -> list[Scene]:
    """Returns `number` different scenes, in families: the colours, sizes and numbers of a scene with two choices of
    shapes, each in all four places (left, right, above, below)."""
    allowed, scenes = set(pairs), {}
    for base in make_scenes(pairs, number, rng):  # more than are needed, as a rule
        choices = {}
        for one, other in itertools.product(SHAPES, SHAPES):
            groups = base.first._replace(shape=one), base.second._replace(shape=other)
            if frozenset(group.kind for group in groups) in allowed and Scene(*groups, "left") not in scenes:
                choices[frozenset(groups)] = groups
        for one, other in rng.sample(list(choices.values()), min(2, len(choices))):
            scenes |= {Scene(*order, way): None for order in ((one, other), (other, one)) for way in ("left", "above")}
        if len(scenes) >= number:
            break
    return list(scenes)[:number]


def captions(scene: Scene, rng: random.Random, number: int = 5, second_first: float = SECOND_FIRST) -> list[str]:
    """Describes all of a scene in `number` (up to 9) sentences, the share `second_first` from its second group on."""

    def words(group: Group) -> tuple[str, str]:
        count, size = rng.choice(COUNTS[group.count]), rng.choice(SIZES[group.size])
        noun = rng.choice(SHAPES[group.shape])[group.count > 1]
        description = rng.choice([f"{size} {group.color} {noun}", f"{size} {noun} in {group.color}"])
        return f"{count} {description}", "are" if count in ("two", "three") else "is"  # a pair is, a group is

    sentences = []
    for frame in rng.sample(SCENES["frames"], number):
        x, y, relation = scene
        if rng.random() < second_first:
            x, y, relation = y, x, OPPOSITE[relation]
        (x, is_x), (y, is_y) = words(x), words(y)
        ways, at_x = RELATIONS[relation]
        rel, at_y = rng.choice(ways), RELATIONS[OPPOSITE[relation]][1]
        sentences.append(frame.format(x=x, y=y, is_x=is_x, is_y=is_y, rel=rel, at_x=at_x, at_y=at_y))
    return sentences


# The corners of shapes of diameter about 1 around (0, 0), y down. All look equally large.
STAR = [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate([0.58, 0.24] * 5)]
OUTLINES = SCENES["outlines"] | {"star": STAR}


def draw(scene: Scene, rng: random.Random, size: int = 64) -> Image.Image:
    """Draws the scene as a (size, size) RGB image; `rng` moves, scales and shades everything a little."""
    oversampling = 4  # draw large and shrink: smooth edges
    unit = size * oversampling / 64
    shade = rng.randint(222, 250)
    background = tuple(min(255, shade + rng.randint(-8, 8)) for _ in range(3))
    image = Image.new("RGB", (size * oversampling, size * oversampling), background)
    canvas = ImageDraw.Draw(image)
    for group, column in zip(scene[:2], COLUMNS):
        diameter = DIAMETER[group.size] * rng.uniform(0.95, 1.05)
        color = tuple(max(0, min(255, channel + rng.randint(-14, 14))) for channel in COLORS[group.color])
        row = rng.choice(ROWS[group.count])
        for member in range(group.count):  # the members line up across the relation's axis: x for "left"
            x, y = (CELL * (place + 0.5) + rng.uniform(-0.6, 0.6) for place in (column, row + member))
            if scene.relation == "above":
                x, y = y, x
            x, y, d = x * unit, y * unit, diameter * unit
            if group.shape == "circle":
                canvas.ellipse((x - d / 2, y - d / 2, x + d / 2, y + d / 2), fill=color)
            else:
                canvas.polygon([(x + d * dx, y + d * dy) for dx, dy in OUTLINES[group.shape]], fill=color)
    return image.reduce(oversampling)


def drawn(split: str, number: int, seed: int = 0, size: int = 64):
    """Yields the scenes of a split, "train" or "eval", as `write` draws them: (scene, image, its captions' rng)."""
    pairs = split_pairs(seed)[("train", "eval").index(split)]
    make = make_families if split == "train" else make_scenes
    for index, scene in enumerate(make(pairs, number, random.Random(f"{seed} {split}"))):
        rng = random.Random(f"{seed} {split} {index}")
        yield scene, draw(scene, rng, size), rng


def write(out_dir: str | Path, train: int = 6000, evaluation: int = 600, seed: int = 0, size: int = 64) -> None:
    """Writes `images/*.png`, `train.json` and `eval.json`; the same arguments always write the same files."""
    (images := Path(out_dir, "images")).mkdir(parents=True, exist_ok=True)
    for split, number in (("train", train), ("eval", evaluation)):
        records, scenes = [], tqdm(drawn(split, number, seed, size), f"drawing {split} scenes", number, unit="image")
        for index, (scene, image, rng) in enumerate(scenes):
            name = f"{split}_{index:05d}.png"
            image.save(images / name, compress_level=1)
            records.append({"image": f"images/{name}", "caption": captions(scene, rng)})
        write_text(Path(out_dir, f"{split}.json"), json.dumps(records, indent=1))  # once it exists, all images do
