"""The page's texts in English and Chinese (labels.json), its style and its script."""

import json
from pathlib import Path

HERE = Path(__file__).parent
SAYINGS = json.loads((HERE / "labels.json").read_text(encoding="utf-8"))  # labels, messages: [English, Chinese]
LANGUAGES = {"en": "English", "zh": "中文", "fr": "Français", "es": "Español"}  # each in its own language
CSS = (HERE / "page.css").read_text(encoding="utf-8")
SCRIPT = (HERE / "page.js").read_text(encoding="utf-8")  # arrow keys switch tabs; Gradio handles Tab, Enter and space


class Words:
    """The page's texts in one language: `say("k")`. Chinese if that is the browser's first language, else English."""

    def __init__(self, accepted: str = ""):
        self.language = "zh" if accepted.strip().lower().startswith("zh") else "en"

    def __call__(self, saying: str, **values) -> str:
        return SAYINGS[saying][self.language == "zh"].format(**values)
