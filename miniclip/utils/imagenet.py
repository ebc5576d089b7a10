"""ImageNet's classes, {WordNet's id: words} in the order of their numbers, and OpenAI's prompts (imagenet.LICENSE)."""

import json
from pathlib import Path

IMAGENET = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
