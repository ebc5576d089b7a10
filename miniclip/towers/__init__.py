"""Encoders other than CLIP's own: each is one file with its config section, its module and its key rows.

This table says by which fields of the model config each is recognised; it is imported only then.
"""

from miniclip.config import TextConfig, VisionConfig, register_section


def _hf(values: dict) -> bool:
    return any(str(name).startswith("hf_") for name in values)


register_section(VisionConfig, _hf, "miniclip.towers.huggingface:HfVisionConfig")
register_section(TextConfig, _hf, "miniclip.towers.huggingface:HfTextConfig")
