"""Makes tests/data/coca_golden.json: what OpenCLIP's CoCa computes, and the captions it writes, with random weights.

    python benchmarks/make_coca_golden.py

OpenCLIP's `generate` needs a transformers that still has BeamSearchScorer: open_clip_torch 3.3.0, transformers 4.49.
"""

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.make_parity_golden import rounded  # noqa: E402
from benchmarks.make_towers_golden import (  # noqa: E402
    TEXT,
    VIT,
    make_inputs,
    make_weights,
    record_intermediates,
    summary,
)

GOLDEN = ROOT / "tests" / "data" / "coca_golden.json"
POOL = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True}
SIZES = TEXT | {"context_length": 20}
COCA = {
    "embed_dim": 32,
    "vision_cfg": VIT | POOL | {"width": 48},
    "text_cfg": SIZES | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": SIZES,
}
MODELS = {
    "published": COCA,
    "cascade": COCA | {"vision_cfg": VIT | POOL | {"attentional_pool": "cascade"}, "quick_gelu": True},
    "parallel": COCA | {"vision_cfg": VIT | POOL | {"attentional_pool": "parallel"}},
}
# The end token is one that these weights often predict: captions end at different lengths, or are cut off.
IDS = {"sot_token_id": 98, "eos_token_id": 22, "pad_token_id": 0}
WAYS = [
    {"seq_len": 20},
    {"seq_len": 20, "num_beams": 4, "num_beam_groups": 1},
    {"seq_len": 20, "num_beams": 3, "num_beam_groups": 3},
    {"seq_len": 20, "num_beams": 8, "num_beam_groups": 2, "repetition_penalty": 1.3, "min_seq_len": 8},
    {"seq_len": 8, "fixed_output_length": True},
    {"seq_len": 20, "generation_type": "top_k"},
    {"seq_len": 20, "generation_type": "top_k", "repetition_penalty": 1.5, "min_seq_len": 8},
    {"seq_len": 20, "generation_type": "top_k", "top_k": 5, "temperature": 0.5, "fixed_output_length": True},
    {"seq_len": 20, "generation_type": "top_p", "top_p": 0.5},
]


def build(cfg: dict):
    import open_clip

    model = open_clip.CoCa(**cfg)
    model.load_state_dict(make_weights({name: tuple(t.shape) for name, t in model.state_dict().items()}))
    return model.eval()


def record(cfg: dict) -> dict:
    """OpenCLIP's embeddings, and of its loss the value and gradients. Its other poolers leave a dimension too many."""
    from open_clip.loss import CoCaLoss

    model, (images, input_ids) = build(cfg), make_inputs(cfg)
    with torch.no_grad():
        out = model(images, input_ids)
        found = {"image": out["image_features"].flatten(1), "text": out["text_features"]}
    out64 = model.train().double()(images.double(), input_ids)
    out64["image_features"] = out64["image_features"].flatten(1)
    loss = sum(CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**out64))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {key: rounded(t) for key, t in found.items()} | summary(loss, gradients, {"logits": out["logits"]})


def captions() -> list:
    model, images = build(COCA), make_inputs(COCA)[0]
    found = []
    for way in WAYS:
        torch.manual_seed(0)
        found.append(model.generate(images, **IDS | way).tolist())
    return found


def main():
    versions = {name: importlib.metadata.version(name) for name in ("open_clip_torch", "transformers", "torch")}
    golden = {"made_with": versions, "models": {name: record(cfg) for name, cfg in MODELS.items()}}
    golden["captions"] = captions()
    golden["intermediates"] = {name: record_intermediates(cfg, build) for name, cfg in MODELS.items()}
    text = re.sub(r"(?<=[\[\d,])\s+(?=[-\d\]])", " ", json.dumps(golden, indent=1))
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
