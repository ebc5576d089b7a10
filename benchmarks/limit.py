"""What is the limit? Prints this machine's speed in large matrix products and the operations of a model, as JSON.

    python benchmarks/limit.py CONFIG captions.json     (a list of captions)
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import miniclip  # noqa: E402
from miniclip.inference.peak import SQUARE, least_seconds, model_flops, products  # noqa: E402

SOME = 32  # captions whose mean length stands for all


def matrix_peak(device: str = "cpu") -> dict[str, float]:
    """Floating point (int8: integer) operations a second in products of large matrices, by precision."""
    return {precision: 2 * SQUARE**3 / least_seconds(multiply) for precision, multiply in products(device).items()}


def main(name: str, captions: str):
    config = miniclip.MiniClipConfig.from_name(name)
    model, tokenizer = miniclip.MiniClip(config).eval(), miniclip.Tokenizer(config.text_cfg.context_length)
    size = config.vision_cfg.image_size
    image = model_flops(model.encode_image, torch.zeros(1, 3, size, size))
    texts = json.loads(Path(captions).read_text())[:SOME]
    each = [model_flops(model.encode_text, tokenizer([text], trim=True)) for text in texts]
    print(json.dumps({"peak": matrix_peak(), "image": image, "caption": sum(each) / len(each)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
