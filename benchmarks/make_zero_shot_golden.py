"""What does OpenCLIP make of class names and templates? Writes tests/data/zero_shot_golden.json for test_zero_shot.py.

    /path/to/peers/bin/python benchmarks/make_zero_shot_golden.py     (benchmarks/peers.md)

Its own `build_zero_shot_classifier` and its own tokenizer, on a tiny model whose weights are drawn by name, so that the
test can draw the same.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from contestants import import_open_clip  # noqa: E402
from make_parity_golden import formula_weights  # noqa: E402

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "data" / "zero_shot_golden.json"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CLASSES = ["dog", "hot dog", "tree frog", "{braces}", "Café", "a", "zebra crossing", "dog"]
STRINGS = ["a photo of a {}.", "{}", "itap of the {0}, seen from very far away on a grey day."]
FUNCTIONS = [lambda name: f"a photo of {name}", lambda name: name.upper()]


def main():
    open_clip = import_open_clip()
    from open_clip.model import CLIP

    model = CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"]).eval()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if t.is_floating_point()}
    model.load_state_dict(formula_weights(shapes), strict=False)
    tokenizer, build = open_clip.SimpleTokenizer(context_length=77), open_clip.build_zero_shot_classifier
    recorded = {
        kind: build(model, tokenizer, CLASSES, templates, num_classes_per_batch=3).tolist()
        for kind, templates in (("strings", STRINGS), ("functions", FUNCTIONS))
    }
    versions = {name: importlib.metadata.version(name) for name in ("open_clip_torch", "torch")}
    shapes = {name: list(shape) for name, shape in shapes.items()}
    GOLDEN.write_text(json.dumps({"versions": versions, "shapes": shapes, **recorded}) + "\n")
    print(f"{GOLDEN}: {', '.join(recorded)}")


if __name__ == "__main__":
    main()
