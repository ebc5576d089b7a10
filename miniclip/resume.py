"""From which checkpoint can a run go on?"""

import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open

logger = logging.getLogger(__name__)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; not those that somebody named otherwise."""
    found = (path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-", 1)[1].isdecimal())
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run, or None.

    A process that is killed while it saves leaves a folder that cannot be resumed from: those are passed over, and
    it is said.
    """
    for folder in reversed(checkpoints(output_dir)):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            with safe_open(folder / "model.safetensors", "pt") as weights:
                weights.keys()
            optimizer = "optimizer.bin" if (folder / "optimizer.bin").is_file() else "optimizer.pt"  # the first by FSDP
            for name in (optimizer, "scheduler.pt"):
                torch.load(folder / name, map_location="cpu", weights_only=True)
            return str(folder)
        except Exception as error:  # whatever is wrong with it, an older one may do
            logger.warning("passing over %s, which is incomplete: %s", folder, error)
    return None
