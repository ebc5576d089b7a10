"""What does OpenCLIP make with a text tower from transformers? Writes tests/data/hf_golden.json for test_hf_towers.py.

    /path/to/peers/bin/python benchmarks/make_hf_golden.py     (benchmarks/peers.md; it needs transformers there too)

Whole models (`CustomTextCLIP`), tiny ones, with weights drawn by name from NumPy so that the test can draw the same.
OpenCLIP's max pooler is left out: that of 3.3.0 hands `masked_fill` a mask of integers, which torch refuses, and one
that is true at the words: as booleans it would pool the padding.
"""

import importlib.metadata
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.make_towers_golden import contrastive, summary  # noqa: E402

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "data" / "hf_golden.json"
SIZES = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 24,
}  # fmt: skip
VISION = {"image_size": 16, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8}
CASES = [  # (transformers' model_type, padding id, pooler, projection, embed_dim)
    ("bert", 0, "cls_pooler", "linear", 8),
    ("bert", 0, "cls_last_hidden_state_pooler", "mlp", 8),
    ("bert", 0, "mean_pooler", None, 16),
    ("roberta", 1, "mean_pooler", "mlp", 8),
    ("xlm-roberta", 1, "mean_pooler", "mlp", 8),
    ("roberta", 1, None, "linear", 8),
    ("bert", 0, None, "linear", 8),
]


def draw(name: str, shape: list[int]) -> torch.Tensor:
    """Weights (shape) that follow from a name."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * 0.3
    return torch.from_numpy(np.asarray(numbers, dtype=np.float32))


def record(model_type: str, pad: int, pooler: str | None, proj: str | None, embed_dim: int) -> dict:
    """What OpenCLIP computes: the embeddings, and the gradients of the first two pairs' loss in float64."""
    import transformers
    from open_clip.model import CustomTextCLIP

    config = SIZES | {"pad_token_id": pad}
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoConfig.for_model(model_type, **config).save_pretrained(folder)
        text = {"hf_model_name": folder, "hf_model_pretrained": False, "hf_pooler_type": pooler, "hf_proj_type": proj}
        model = CustomTextCLIP(embed_dim, VISION, text).eval()
    shapes = {name: list(t.shape) for name, t in model.state_dict().items() if t.is_floating_point()}
    model.load_state_dict({name: draw(name, shape) for name, shape in shapes.items()}, strict=False)
    ids = torch.tensor([[2, 17, 33, 5, 3, pad, pad], [2, 9, 3, *[pad] * 4], [2, *range(10, 15), 3]])
    pixels = draw("pixel_values", [2, 3, 16, 16])
    with torch.no_grad():
        texts, images, logits = model.encode_text(ids), model.encode_image(pixels), model.get_logits(pixels, ids)[0]
    loss = contrastive(model.double().get_logits(pixels.double(), ids[:2])[0])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        "hf_model_config": {"model_type": model_type} | config, "hf_pooler_type": pooler, "hf_proj_type": proj,
        "embed_dim": embed_dim, "vision_cfg": VISION, "shapes": shapes, "input_ids": ids.tolist(),
        "text_embeds": texts.tolist(), "image_embeds": images.tolist(), "logits": logits.tolist(),
        "step": summary(loss, gradients, {}),
    }  # fmt: skip


def main():
    cases = [record(*case) for case in CASES]
    versions = {name: importlib.metadata.version(name) for name in ("open_clip_torch", "transformers", "torch")}
    GOLDEN.write_text(json.dumps({"versions": versions, "cases": cases}) + "\n")
    print(f"{GOLDEN}: {len(cases)} cases")


if __name__ == "__main__":
    main()
