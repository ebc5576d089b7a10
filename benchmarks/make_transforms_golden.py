"""Which pixels do OpenCLIP, OpenAI and timm give a model? Writes tests/data/transforms_golden.json.

    /path/to/peers/bin/python benchmarks/make_transforms_golden.py     (benchmarks/peers.md makes that environment)

For each setting and each of its image sizes, the crc32 of the 8-bit levels that the peer's evaluation transform gives
for an image made from a formula, so that the test can make the same one without the peers.
"""

import importlib.metadata
import json
import math
import random
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "data" / "transforms_golden.json"
# MiniCLIP's preprocess_cfg. The model sizes are those of model_configs/ and two odd ones.
SETTINGS = [
    *({"size": size, "resize_mode": "shortest", "interpolation": "bicubic"} for size in (224, 64, 112, 63, 336)),
    {"size": 224, "resize_mode": "shortest", "interpolation": "bilinear"},
    *({"size": 224, "interpolation": "bicubic", "crop_pct": pct} for pct in (0.875, 0.9, 0.95)),  # timm's
    {"size": 75, "interpolation": "bilinear", "crop_pct": 0.875},
    {"size": 224, "resize_mode": "longest", "interpolation": "bicubic", "fill_color": 51},
    {"size": 65, "resize_mode": "longest", "interpolation": "bilinear"},
    {"size": 224, "resize_mode": "squash", "interpolation": "bicubic"},
]
MODES = ("L", "P", "RGBA", "LA", "CMYK", "1", "I;16")  # as files may hold them; MiniCLIP's decode "openclip" only


def image_sizes(number: int) -> list[tuple[int, int]]:
    """160 of the number-th setting: 1 to 4,000 pixels a side, a third of them below 100, at most 100:1."""
    rng, sizes = random.Random(number), [(500, 351), (351, 500), (1, 1), (2, 3), (4000, 3001), (100, 1)]
    while len(sizes) < 160:
        width, height = (round(math.exp(rng.uniform(0, math.log(4000)))) for _ in range(2))
        if max(width, height) <= 100 * min(width, height):
            sizes.append((width, height))
    return sizes


def small_sizes() -> list[tuple[int, int]]:
    return [size for size in image_sizes(0) if max(size) < 400][:25]


def formula_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Waves that no two places share; of another mode: what an image of that mode may hold."""
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    channels = [(x * a + y * b + x * y // c) % 256 for a, b, c in ((3, 7, 29), (5, 2, 31), (1, 11, 37), (2, 3, 41))]
    levels = np.stack(channels, axis=2).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(levels[..., 0].astype(np.uint16) * 255)
    return Image.fromarray(levels, "RGBA").convert("RGB" if mode in ("P", "1") else mode).convert(mode)


def main():
    from make_parity_golden import import_peers
    from PIL import __version__ as pillow

    import_peers()
    from open_clip.transform import image_transform
    from timm.data import create_transform

    def transform(setting):
        common = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": setting["interpolation"]}
        if "crop_pct" in setting:
            return create_transform(setting["size"], crop_pct=setting["crop_pct"], **common)
        fill = setting.get("fill_color", 0)
        resize_mode = setting["resize_mode"]
        return image_transform(setting["size"], is_train=False, resize_mode=resize_mode, fill_color=fill, **common)

    def digest(setting, image):
        return zlib.crc32(transform(setting)(image).mul(255).round().byte().contiguous().numpy().tobytes())

    found = [[digest(setting, formula_image(*size)) for size in image_sizes(n)] for n, setting in enumerate(SETTINGS)]
    modes = {mode: [digest(SETTINGS[0], formula_image(*size, mode)) for size in small_sizes()] for mode in MODES}
    versions = {name: importlib.metadata.version(name) for name in ("open_clip_torch", "timm", "torchvision")}
    GOLDEN.write_text(json.dumps({"versions": versions | {"pillow": pillow}, "settings": found, "modes": modes}) + "\n")


if __name__ == "__main__":
    main()
