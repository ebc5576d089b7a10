"""Encoders other than CLIP's own: each is one file with its config section, its module and its key rows.

This table says by which fields of the model config each is recognised; it is imported only then.
"""

from miniclip.config import SECTIONS, MiniClipConfig, TextConfig, VisionConfig


def _hf(values: dict) -> bool:
    return any(str(name).startswith("hf_") for name in values) and not _joint(values)


def _joint(values: dict) -> bool:
    return "towers" in values


def _pruned(values: dict) -> bool:
    return "block_heads" in values


VARIED = {"ls_init_value", "act_kwargs", "norm_kwargs", "pool_type", "no_ln_pre", "final_ln_after_pool"}
VARIED_TEXT = VARIED | {"no_causal_mask", "eos_id", "pad_id", "proj_bias", "token_dropout"}
VARIED_TEXT |= {"hf_tokenizer_name", "tokenizer_kwargs"}


def _variant(values: dict) -> bool:
    return bool(VARIED & values.keys()) and "attentional_pool" not in values


def _variant_text(values: dict) -> bool:
    return bool(VARIED_TEXT & values.keys()) and not {"hf_model_name", "hf_model_config", "embed_cls"} & values.keys()


def _resnet(values: dict) -> bool:
    return isinstance(values.get("layers"), list | tuple)


def _timm(values: dict) -> bool:
    return "timm_model_name" in values and not _siglip(values)


def _siglip(values: dict) -> bool:
    timm = "siglip" in str(values.get("timm_model_name")) and values.get("timm_proj") == "none"
    return values.get("pool_type") == "map" or timm and values.get("timm_pool") == "map"


def _siglip_text(values: dict) -> bool:
    found = values.get("pool_type") == "last" and values.get("no_causal_mask") and values.get("proj_bias")
    return bool(found) and "hf_model_name" not in values


def _coca(values: dict) -> bool:
    return bool(values.get("attentional_pool") or values.get("embed_cls"))


def _coca_hf(values: dict) -> bool:
    return _coca(values) and _hf(values)


OTHERS = _coca, _hf, _joint, _pruned, _resnet, _siglip, _siglip_text, _timm, _variant, _variant_text


def _own(values: dict) -> bool:
    return not any(other(values) for other in OTHERS)


def _tokens(tells):
    return lambda values: "token_dim" in values and tells(values)


for base, tells, section in (  # with `token_dim`, of late interaction
    (VisionConfig, _own, "tokens:TokenVisionConfig"), (TextConfig, _own, "tokens:TokenTextConfig"),
    (VisionConfig, _hf, "huggingface:TokenHfVisionConfig"), (TextConfig, _hf, "huggingface:TokenHfTextConfig"),
    (VisionConfig, _joint, "joint:TokenJointVisionConfig"),
):  # fmt: skip
    SECTIONS.append((base, _tokens(tells), f"miniclip.towers.{section}"))
SECTIONS.append((VisionConfig, _coca_hf, "miniclip.towers.coca_encoder:CocaHfVisionConfig"))
SECTIONS.append((VisionConfig, _coca, "miniclip.towers.coca:CocaVisionConfig"))
SECTIONS.append((TextConfig, _coca, "miniclip.towers.coca:CocaTextConfig"))
SECTIONS.append((MiniClipConfig, lambda values: "multimodal_cfg" in values, "miniclip.towers.coca:CocaConfig"))
SECTIONS.append((VisionConfig, _siglip, "miniclip.towers.siglip:SigLipVisionConfig"))
SECTIONS.append((TextConfig, _siglip_text, "miniclip.towers.siglip:SigLipTextConfig"))
SECTIONS.append((VisionConfig, _timm, "miniclip.towers.timm_model:TimmVisionConfig"))
SECTIONS.append((VisionConfig, _joint, "miniclip.towers.joint:JointVisionConfig"))
SECTIONS.append((TextConfig, _joint, "miniclip.towers.joint:JointTextConfig"))
SECTIONS.append((VisionConfig, _pruned, "miniclip.towers.pruned:PrunedVisionConfig"))
SECTIONS.append((TextConfig, _pruned, "miniclip.towers.pruned:PrunedTextConfig"))
SECTIONS.append((VisionConfig, _resnet, "miniclip.towers.resnet:ResNetConfig"))
SECTIONS.append((VisionConfig, _variant, "miniclip.towers.variants:VariantVisionConfig"))
SECTIONS.append((TextConfig, _variant_text, "miniclip.towers.variants:VariantTextConfig"))
SECTIONS.append((VisionConfig, _hf, "miniclip.towers.huggingface:HfVisionConfig"))
SECTIONS.append((TextConfig, _hf, "miniclip.towers.huggingface:HfTextConfig"))
