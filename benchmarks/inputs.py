"""What do the contestants work on? Captions and pictures that cost as much as real ones, made from a seed."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Each is one token of CLIP's vocabulary, so that a caption of n words has n + 2 tokens.
WORDS = """
a the in on of and with is are at to from his her while two three young little old small large big black white red blue
green yellow brown orange pink gray dog dogs cat man woman boy girl child children people person men women group player
ball water grass snow beach field street park road tree trees rock mountain river lake pool sand building wall bike
bicycle car horse bird shirt jacket hat dress shorts hair face hand mouth camera crowd game football soccer basketball
running jumping playing standing sitting walking riding holding looking wearing climbing swimming smiling watching
throwing catching through over down up into near behind front around by for it as another something background air top
side one four several dirt boat skateboard race toy frisbee stick fence bench table city night day
""".split()
MEDIAN_TOKENS, LONGEST, SPREAD = 14, 36, 0.27  # of Flickr8k's captions; with this spread the 99th percentile is 26


def make_captions(n: int, seed: int = 0) -> list[str]:
    """Captions of Flickr8k's lengths: a median of 14 tokens, 26 in the 99th percentile, 36 at most."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(math.log(MEDIAN_TOKENS), SPREAD, n)).round().clip(5, LONGEST).astype(int)
    lengths[n // 2] = LONGEST
    return [" ".join(rng.choice(WORDS, length - 2)) for length in lengths]


def canvas(width: int, height: int, finest: int, seed: int = 0) -> Image.Image:
    """A picture with the spectrum of photos: as much contrast in each octave, from `finest` pixels on. Its colours
    vary less than its brightness does."""
    rng = np.random.default_rng(seed)
    channels = []
    for contrast in (13, 5, 5):  # brightness, blue, red
        sum_of_octaves = np.full((height, width), 128, np.float32)
        for cell in (finest * 2**octave for octave in range(int(math.log2(width / finest)))):
            noise = rng.normal(0, contrast, (math.ceil(height / cell) + 1, math.ceil(width / cell) + 1))
            sum_of_octaves += np.asarray(Image.fromarray(noise.astype(np.float32)).resize((width, height)))
        channels.append(Image.fromarray(sum_of_octaves.clip(0, 255).astype(np.uint8)))
    return Image.merge("YCbCr", channels).convert("RGB")


def add_shapes(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A brightness gradient, and a few things with edges and even surfaces."""
    width, height = image.size
    light = Image.linear_gradient("L").rotate(int(rng.integers(4)) * 90).resize((width, height))
    image = Image.blend(image, Image.merge("RGB", [light] * 3), 0.3)
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, w, h = rng.integers((0, 0, width // 20, height // 20), (width, height, width // 3, height // 3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=tuple(int(level) for level in rng.integers(0, 256, 3)))
    return image


def make_inputs(folder: Path, captions: int, photos: int, evaluated: int):
    """Fills a folder: captions.json, photos/*.jpg (500 x 375), big.jpg (4000 x 3000), and eval.json, so many photos
    with five captions each. Pictures that are there already stay."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    paths = [folder / "photos" / f"{i:04}.jpg" for i in range(photos)]
    texts = make_captions(max(captions, 5 * evaluated))
    (folder / "captions.json").write_text(json.dumps(texts))
    records = [{"image": f"photos/{i:04}.jpg", "caption": texts[5 * i : 5 * i + 5]} for i in range(evaluated)]
    (folder / "eval.json").write_text(json.dumps(records))
    if not (folder / "big.jpg").exists():  # a sensor's 12 million pixels are never as sharp as a small picture's
        add_shapes(canvas(4000, 3000, finest=4), np.random.default_rng(1)).save(folder / "big.jpg", quality=90)
    if not all(path.exists() for path in paths):
        wide, rng = canvas(2000, 1500, finest=2), np.random.default_rng(2)
        for path in paths:
            x, y = int(rng.integers(1500)), int(rng.integers(1125))
            add_shapes(wide.crop((x, y, x + 500, y + 375)), rng).save(path, quality=90)
