"""Encoders other than CLIP's own: each is one file with its config section, its module and its key rows.

This table says by which fields of the model config each is recognised; it is imported only then. Of several rows that
apply the first one does."""

from miniclip.config import SECTIONS, MiniClipConfig, TextConfig, VisionConfig

VARIED = {"ls_init_value", "act_kwargs", "norm_kwargs", "pool_type", "no_ln_pre", "final_ln_after_pool"}
VARIED_TEXT = VARIED | {"no_causal_mask", "eos_id", "pad_id", "proj_bias", "token_dropout"}
VARIED_TEXT |= {"hf_tokenizer_name", "tokenizer_kwargs"}
OTHER_TEXT = {"hf_model_name", "hf_model_config", "embed_cls"}  # beside which they say nothing

# Towers that may compute features by model.py's code, as the fast path can: functions that tell whether one does.
AS_IN_MODEL = {}


def _hf(values: dict) -> bool:
    return any(str(name).startswith("hf_") for name in values)


def _coca(values: dict) -> bool:
    return bool(values.get("attentional_pool") or values.get("embed_cls"))


def _siglip(values: dict) -> bool:
    timm = "siglip" in str(values.get("timm_model_name")) and values.get("timm_proj") == "none"
    return values.get("pool_type") == "map" or timm and values.get("timm_pool") == "map"


def _siglip_text(values: dict) -> bool:
    found = values.get("pool_type") == "last" and values.get("no_causal_mask") and values.get("proj_bias")
    return bool(found) and "hf_model_name" not in values


for base, tells, section in (
    (VisionConfig, lambda v: {"token_dim", "towers"} <= v.keys(), "joint:TokenJointVisionConfig"),
    (VisionConfig, lambda v: "towers" in v, "joint:JointVisionConfig"),
    (TextConfig, lambda v: "towers" in v, "joint:JointTextConfig"),
    (VisionConfig, lambda v: "token_dim" in v and _hf(v), "huggingface:TokenHfVisionConfig"),
    (TextConfig, lambda v: "token_dim" in v and _hf(v), "huggingface:TokenHfTextConfig"),
    (VisionConfig, lambda v: _coca(v) and _hf(v), "coca_encoder:CocaHfVisionConfig"),
    (VisionConfig, _coca, "coca:CocaVisionConfig"),
    (TextConfig, _coca, "coca:CocaTextConfig"),
    (MiniClipConfig, lambda v: "multimodal_cfg" in v, "coca:CocaConfig"),
    (VisionConfig, _siglip, "siglip:SigLipVisionConfig"),
    (TextConfig, _siglip_text, "siglip:SigLipTextConfig"),
    (VisionConfig, lambda v: "timm_model_name" in v, "timm_model:TimmVisionConfig"),
    (VisionConfig, lambda v: "block_heads" in v, "pruned:PrunedVisionConfig"),
    (TextConfig, lambda v: "block_heads" in v, "pruned:PrunedTextConfig"),
    (VisionConfig, lambda v: isinstance(v.get("layers"), list | tuple), "resnet:ResNetConfig"),
    (VisionConfig, lambda v: VARIED & v.keys() and "attentional_pool" not in v, "variants:VariantVisionConfig"),
    (TextConfig, lambda v: VARIED_TEXT & v.keys() and not OTHER_TEXT & v.keys(), "variants:VariantTextConfig"),
    (VisionConfig, _hf, "huggingface:HfVisionConfig"),
    (TextConfig, _hf, "huggingface:HfTextConfig"),
    (VisionConfig, lambda v: "token_dim" in v, "tokens:TokenVisionConfig"),  # of late interaction, as are all with it
    (TextConfig, lambda v: "token_dim" in v, "tokens:TokenTextConfig"),
):
    SECTIONS.append((base, tells, f"miniclip.towers.{section}"))
