"""Encoders other than CLIP's own: each is one file with its config section, its module and its key rows.

This table says by which fields of the model config each is recognised; it is imported only then.
"""

from miniclip.config import SECTIONS, TextConfig, VisionConfig


def _hf(values: dict) -> bool:
    return any(str(name).startswith("hf_") for name in values) and not _joint(values)


def _joint(values: dict) -> bool:
    return "towers" in values


SECTIONS.append((VisionConfig, _joint, "miniclip.towers.joint:JointVisionConfig"))
SECTIONS.append((TextConfig, _joint, "miniclip.towers.joint:JointTextConfig"))
SECTIONS.append((VisionConfig, _hf, "miniclip.towers.huggingface:HfVisionConfig"))
SECTIONS.append((TextConfig, _hf, "miniclip.towers.huggingface:HfTextConfig"))
