"""What do OpenCLIP and OpenAI's code compute? Writes tests/data/parity_golden.json.

    /path/to/peers/bin/python benchmarks/make_parity_golden.py     (benchmarks/peers.md makes that environment)

Nobody's weights are needed: every parameter is drawn from a generator that is seeded with its OpenCLIP name, so that
the test can draw the same ones without the peers. All in float32.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "data" / "parity_golden.json"
DIMENSIONS = 16  # of each embedding, that are kept
SHAPES = {  # in OpenCLIP's config form
    "ViT-B-32": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    },
    "TinyCLIP-ViT-40M-32-Text-19M": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 512, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 6},
    },
    "ViT-L-14, 2 layers": {
        "embed_dim": 768,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 1024, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 2},
    },
}


def draw(name: str, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
    """Numbers between `low` and `high` that depend on the name and the shape alone."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).random(shape, dtype=np.float32)
    return torch.from_numpy(np.asarray(numbers * np.float32(high - low) + np.float32(low)))


def formula_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights for OpenCLIP's names: of the size that training leaves, no bias zero, no gain one."""
    weights = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        if name == "logit_scale":
            weights[name] = torch.tensor(3.5)
        elif parts[-2:-1] and parts[-2].startswith("ln_"):
            weights[name] = draw(name, shape, 0.6, 1.5) if parts[-1] == "weight" else draw(name, shape, -0.3, 0.3)
        elif parts[-1].endswith("bias"):
            weights[name] = draw(name, shape, -0.2, 0.2)
        elif "embedding" in name:
            weights[name] = draw(name, shape, -0.05, 0.05)
        else:  # a matrix, stored transposed where it is called a projection; the patch kernel has its inputs last
            inputs = shape[0] if parts[-1] in ("proj", "text_projection") else math.prod(shape[1:])
            weights[name] = draw(name, shape, -((3 / inputs) ** 0.5), (3 / inputs) ** 0.5)  # variance 1 / inputs
    return weights


def formula_inputs(image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images and three texts, of 3, 20 and 77 tokens."""
    input_ids = torch.zeros(3, 77, dtype=torch.int64)
    for row, length in enumerate((3, 20, 77)):
        words = draw(f"text {row}", (length - 2,), 1, 49405).long()
        input_ids[row, :length] = torch.cat([torch.tensor([49406]), words, torch.tensor([49407])])
    return draw("images", (2, 3, image_size, image_size), -2, 2), input_ids


def names_digest(shapes: dict[str, tuple[int, ...]]) -> str:
    return hashlib.sha256(json.dumps(sorted((k, list(s)) for k, s in shapes.items())).encode()).hexdigest()[:16]


def import_peers():
    """Imports both peers. Only their models are used: torchvision's compiled operators are declared, not present."""
    for name in ("nms", "qnms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_peers.keep = getattr(import_peers, "keep", []) + [library]  # what is collected is undefined again
    import open_clip

    # The package's __init__ wants an old setuptools, its model file nothing.
    package = importlib.util.find_spec("clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("openai_clip_model", Path(package) / "model.py")
    openai = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(openai)
    return open_clip, openai


def openai_model(openai, cfg: dict):
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    return openai.CLIP(
        cfg["embed_dim"], vision["image_size"], vision["layers"], vision["width"], vision["patch_size"],
        text["context_length"], text["vocab_size"], text["width"], text["heads"], text["layers"],
    )  # fmt: skip


@torch.inference_mode()
def embeddings(model, weights: dict[str, torch.Tensor], image_size: int) -> dict[str, list]:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"attn_mask"}, (missing, unexpected)
    images, input_ids = formula_inputs(image_size)
    model.eval()
    return {
        "image": [rounded(row[:DIMENSIONS]) for row in model.encode_image(images)],
        "text": [rounded(row[:DIMENSIONS]) for row in model.encode_text(input_ids)],
        "image_norm": rounded(model.encode_image(images).norm(dim=-1)),
        "text_norm": rounded(model.encode_text(input_ids).norm(dim=-1)),
    }


def rounded(numbers: torch.Tensor) -> list[float]:
    return [float(f"{number:.8g}") for number in numbers.flatten().tolist()]


def resized_positions(open_clip) -> list[dict]:
    """What OpenCLIP makes of position embeddings for another image size or context length."""
    cases = []
    for old, new, width in ((4, 6, 3), (6, 4, 3)):
        key, state = "visual.positional_embedding", {}
        state[key] = draw(f"grid {old}", (1 + old * old, width), -1, 1)
        open_clip.model.resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(new, new))))
        cases.append({"grid": True, "old": old, "new": new, "width": width, "numbers": rounded(state[key])})
    for old, new, width in ((8, 12, 3), (12, 5, 3)):
        state = {"positional_embedding": draw(f"line {old}", (old, width), -1, 1)}
        open_clip.model.resize_text_pos_embed(state, SimpleNamespace(positional_embedding=torch.empty(new, width)))
        numbers = rounded(state["positional_embedding"])
        cases.append({"grid": False, "old": old, "new": new, "width": width, "numbers": numbers})
    return cases


def main():
    open_clip, openai = import_peers()
    versions = {name: importlib.metadata.version(name) for name in ("open_clip_torch", "clip-anytorch", "torch")}
    golden = {"made_with": versions, "models": {}, "resized": resized_positions(open_clip)}
    for name, cfg in SHAPES.items():
        entry = golden["models"][name] = {}
        weights, size = None, cfg["vision_cfg"]["image_size"]
        for peer, quick_gelu in (("openai", True), ("openclip", True), ("openclip", False)):
            model = openai_model(openai, cfg) if peer == "openai" else open_clip.CLIP(**cfg, quick_gelu=quick_gelu)
            shapes = {key: tuple(t.shape) for key, t in model.state_dict().items() if key != "attn_mask"}
            weights = weights or formula_weights(shapes)
            entry.setdefault("names", names_digest(shapes))
            assert entry["names"] == names_digest(shapes)
            entry[f"{peer}, {'QuickGELU' if quick_gelu else 'GELU'}"] = embeddings(model.float(), weights, size)
            print(name, peer, quick_gelu, entry["names"], file=sys.stderr)
    text = re.sub(r"(?<=[\[\d,])\s+(?=[-\d\]])", " ", json.dumps(golden, indent=1))  # a list of numbers on one line
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
