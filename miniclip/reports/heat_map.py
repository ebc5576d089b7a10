"""Heat maps: where in an image a model sees the words of a text."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

HEAT = (222, 66, 8)  # the colour of the patch where a word is seen best


def heat_maps(levels: np.ndarray, heats: Sequence[np.ndarray], side: int = 180) -> list[str]:
    """Images of `side` pixels, as `data:` URLs: the levels (3, S, S) uint8 in grey, coloured by each of several `heats`
    (rows, columns). They share one scale, from 0 to the largest of all: a word that is seen nowhere stays grey."""
    grey = Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0))).convert("L").resize((side, side))
    grey = 90 + 0.55 * np.asarray(grey, np.float32)[..., None]
    most, urls = max([1e-9, *(float(heat.max()) for heat in heats)]), []
    for heat in heats:
        mask = Image.fromarray(heat.clip(0).astype(np.float32) / most).resize((side, side), Image.Resampling.BICUBIC)
        share = 0.8 * np.asarray(mask).clip(0, 1)[..., None]
        file, pixels = io.BytesIO(), (1 - share) * grey + share * np.array(HEAT, np.float32)
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=82)
        urls.append(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")
    return urls
