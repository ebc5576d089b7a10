"""Encoders other than CLIP's own: each is one file with its config section, its module and its key rows.

This table says by which fields of the model config each is recognised; it is imported only then.
"""

from miniclip.config import SECTIONS, TextConfig, VisionConfig


def _hf(values: dict) -> bool:
    return any(str(name).startswith("hf_") for name in values) and not _joint(values)


def _joint(values: dict) -> bool:
    return "towers" in values


def _own(values: dict) -> bool:
    return not (_hf(values) or _joint(values))


def _tokens(tells):
    return lambda values: "token_dim" in values and tells(values)


for base, tells, section in (  # with `token_dim`, of late interaction
    (VisionConfig, _own, "tokens:TokenVisionConfig"), (TextConfig, _own, "tokens:TokenTextConfig"),
    (VisionConfig, _hf, "huggingface:TokenHfVisionConfig"), (TextConfig, _hf, "huggingface:TokenHfTextConfig"),
    (VisionConfig, _joint, "joint:TokenJointVisionConfig"),
):  # fmt: skip
    SECTIONS.append((base, _tokens(tells), f"miniclip.towers.{section}"))
SECTIONS.append((VisionConfig, _joint, "miniclip.towers.joint:JointVisionConfig"))
SECTIONS.append((VisionConfig, _hf, "miniclip.towers.huggingface:HfVisionConfig"))
SECTIONS.append((TextConfig, _hf, "miniclip.towers.huggingface:HfTextConfig"))
