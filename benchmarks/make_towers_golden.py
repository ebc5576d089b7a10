"""What does OpenCLIP compute with other towers? Writes tests/data/towers_golden.json and
intermediates_golden.json.

    /path/to/peers/bin/python benchmarks/make_towers_golden.py     (an environment with open_clip_torch and timm)

As in make_parity_golden.py every number of a weight follows from its OpenCLIP name. Recorded of each small model are
outputs in evaluation mode, and of one step of training in float64 the loss, one number of each gradient (its product
with numbers that follow from the name), and of BatchNorm's statistics. Where open_clip is installed, the tests compare
with it.
"""

import importlib.metadata
import json
import math
import re
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.make_parity_golden import draw, rounded  # noqa: E402

GOLDEN = ROOT / "tests" / "data" / "towers_golden.json"
TEXT = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
RESNET = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
EPS, TANH = {"eps": 1e-6}, {"approximate": "tanh"}
INTERMEDIATES = [  # arguments of `forward_intermediates`
    {},
    {"image_indices": [0, -1], "text_indices": 1, "normalize_intermediates": True, "image_output_extra_tokens": True}
    | {"text_output_extra_tokens": True, "output_logits": True, "output_logit_scale_bias": True},
    {"image_indices": [0], "text_indices": [-2], "stop_early": True, "normalize": False, "image_output_fmt": "NLC"},
    {"image_indices": 2, "intermediates_only": True, "stop_early": True, "output_logits": True},
]
MODELS = {  # in OpenCLIP's config form
    "ResNet": {"embed_dim": 24, "vision_cfg": RESNET, "text_cfg": TEXT},
    "ResNet, QuickGELU": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": RESNET, "text_cfg": TEXT},
    "CLIPA": {
        "embed_dim": 24,
        "vision_cfg": VIT | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": TEXT | {"pool_type": "last", "no_causal_mask": True},
    },
    "MetaCLIP 2": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": VIT | {"ls_init_value": 1e-4, "pool_type": "avg"},
        "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 99, "ls_init_value": 0.1},
    },
    "SigLIP's text tower": {
        "embed_dim": 24,
        "vision_cfg": VIT | {"ls_init_value": 0.1, "norm_kwargs": EPS, "act_kwargs": TANH},
        "text_cfg": TEXT
        | {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}
        | {
            "act_kwargs": TANH,
            "norm_kwargs": EPS,
        },
        "custom_text": True,
        "init_logit_bias": -10.0,
    },
    "SigLIP": {  # 36 pixels are no multiple of the patches, as in ViT-SO400M-14-SigLIP-384
        "embed_dim": 32,
        "vision_cfg": VIT | {"image_size": 36, "pool_type": "map", "act_kwargs": TANH},
        "text_cfg": TEXT | {"pool_type": "last", "no_causal_mask": True, "proj_bias": True, "norm_kwargs": EPS},
        "custom_text": True,
        "init_logit_bias": -10.0,
    },
}


def make_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights for OpenCLIP's names, of the size that training leaves."""
    weights = {}
    for name, shape in shapes.items():
        last = name.rpartition(".")[2]
        low, high = -0.2, 0.2  # biases, class tokens, means
        if name == "logit_scale":
            low = high = 2.5
        elif name == "logit_bias":
            low = high = -1.0
        elif last == "num_batches_tracked":
            weights[name] = torch.tensor(7)
            continue
        elif last in ("running_var", "gamma") or last == "weight" and len(shape) == 1:
            low, high = 0.6, 1.5
        elif "embedding" in name or "query" in name:
            low, high = -0.5, 0.5
        elif len(shape) > 1:  # a matrix or a kernel: variance 1 / inputs
            inputs = shape[0] if last in ("proj", "text_projection") else math.prod(shape[1:])
            low, high = -((3 / inputs) ** 0.5), (3 / inputs) ** 0.5
        weights[name] = draw(name, shape, low, high)
    return weights


def make_inputs(cfg: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Three images and three texts, of 3, 7 and as many tokens as there is room for."""
    text = cfg["text_cfg"]
    size, room, words = cfg["vision_cfg"]["image_size"], text["context_length"], text["vocab_size"]
    input_ids = torch.zeros(3, room, dtype=torch.int64)
    for row, length in enumerate((3, 7, room)):
        middle = draw(f"text {row}", (length - 2,), 1, words - 3).long()
        input_ids[row, :length] = torch.cat([torch.tensor([words - 2]), middle, torch.tensor([words - 1])])
    return draw("images", (3, 3, size, size), -2, 2), input_ids


def build(cfg: dict) -> torch.nn.Module:
    """OpenCLIP's model with the weights of `make_weights`."""
    import open_clip

    kwargs = {name: value for name, value in cfg.items() if name != "custom_text"}
    if siglip := cfg["vision_cfg"].get("pool_type") == "map":
        kwargs["vision_cfg"] = VIT
    model = (open_clip.CustomTextCLIP if cfg.get("custom_text") else open_clip.CLIP)(**kwargs)
    if siglip:  # OpenCLIP asks timm for towers by their names, and none of those is small
        model.visual = small_timm(cfg["vision_cfg"])
    model.load_state_dict(make_weights({name: tuple(t.shape) for name, t in model.state_dict().items()}))
    return model.eval()


def record(cfg: dict) -> dict:
    """What OpenCLIP computes."""
    model, (images, input_ids) = build(cfg), make_inputs(cfg)
    with torch.no_grad():
        image, text = model.encode_image(images, normalize=True), model.encode_text(input_ids, normalize=True)
        found = {"image": image, "text": text, "logits": model.get_logits(images, input_ids)[0]}
    image, text, scale = model.train().double()(images.double(), input_ids)[:3]
    loss = contrastive(scale * image @ text.T)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: t for name, t in model.state_dict().items() if "running" in name or "batches" in name}
    return {key: rounded(t) for key, t in found.items()} | summary(loss, gradients, statistics)


def numbers(outputs: dict) -> dict:
    """The shape of each tensor in a result of `forward_intermediates`, and one number that depends on all of it."""
    found = {}
    for key, value in outputs.items():
        for i, t in enumerate(value if isinstance(value, list) else [value]):
            shown = draw(f"shown {key}", tuple(t.shape), -1, 1)
            number = (t.detach().double() * shown.double()).sum().item() / max(shown.norm().item(), 1e-9)
            found[f"{key} {i}"] = [list(t.shape), float(f"{number:.8g}")]
    return found


def record_intermediates(cfg: dict, build=build) -> list[dict]:
    """What OpenCLIP's `forward_intermediates` returns with the options in INTERMEDIATES."""
    model, (images, input_ids), found = build(cfg), make_inputs(cfg), []
    for options in options_for(cfg):
        with torch.no_grad():
            outputs = model.forward_intermediates(images, input_ids, **options)
        if "image_features" in outputs:  # CoCa's second poolers leave a dimension too many
            outputs["image_features"] = outputs["image_features"].flatten(1)
        found.append(numbers(outputs))
    return found


def options_for(cfg: dict) -> list[dict]:
    """Those that OpenCLIP has: a ResNet gives only maps, a CoCa no logits, and its norm has the embeddings' width."""
    vision, coca = cfg["vision_cfg"], "multimodal_cfg" in cfg
    no = ["image_output_fmt"] if isinstance(vision["layers"], list) else ["output_logits"] if coca else []
    no += ["normalize_intermediates"] if coca and vision["width"] != cfg["embed_dim"] else []
    return [{name: value for name, value in options.items() if name not in no} for options in INTERMEDIATES]


def small_timm(cfg: dict) -> torch.nn.Module:
    """OpenCLIP's TimmModel around another trunk."""
    from open_clip.timm_model import TimmModel

    class Small(torch.nn.Sequential):
        forward_intermediates = TimmModel.forward_intermediates

    return Small(OrderedDict(trunk=timm_vit(cfg), head=torch.nn.Sequential()))


def timm_vit(cfg: dict) -> torch.nn.Module:
    """What OpenCLIP makes by timm_pool "map" and timm_proj "none", in other sizes."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=cfg["image_size"], patch_size=cfg["patch_size"], embed_dim=cfg["width"], depth=cfg["layers"],
        num_heads=cfg["width"] // cfg["head_width"], class_token=False, global_pool="map", num_classes=0,
        act_layer="gelu_tanh",
    )  # fmt: skip


def contrastive(logits: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def summary(loss: torch.Tensor, gradients: dict, statistics: dict) -> dict:
    """One number of each tensor: an error anywhere in it changes the number."""

    def number(name: str, tensor: torch.Tensor) -> float:
        shown = draw(f"shown {name}", tuple(tensor.shape), -1, 1).double()
        return (tensor.double() * shown).sum().item() / max(shown.norm().item(), 1e-9)

    return {"loss": loss.item()} | {
        kind: {name: float(f"{number(name, t):.8g}") for name, t in sorted(tensors.items())}
        for kind, tensors in (("gradients", gradients), ("statistics", statistics))
    }


def main():
    versions = {name: importlib.metadata.version(name) for name in ("open_clip_torch", "timm", "torch")}
    golden = {"made_with": versions, "models": {name: record(cfg) for name, cfg in MODELS.items()}}
    text = re.sub(r"(?<=[\[\d,])\s+(?=[-\d\]])", " ", json.dumps(golden, indent=1))
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    found = {"made_with": versions, "models": {name: record_intermediates(cfg) for name, cfg in MODELS.items()}}
    text = re.sub(r"(?<=[\[\d,])\s+(?=[-\d\]\[])", " ", json.dumps(found, indent=1))
    GOLDEN.with_name("intermediates_golden.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
