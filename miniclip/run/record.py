"""What was run, on what, with which versions? Enough is written down to do it again, and to tell that it is the same.

`train.py` keeps it as `run.json` in output_dir and in each checkpoint, `evaluate.py` beside its metrics.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from miniclip.datasets.fingerprint import fingerprint
from miniclip.utils.errors import InputError
from miniclip.utils.files import sha256
from miniclip.utils.machine import processor

RECORD = "run.json"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "pillow", "faiss-cpu", "numpy", "ftfy")


def record_of(command: Sequence[str], device) -> dict:
    """What any command has to say: the command line, when, and on what it runs."""
    torch = sys.modules.get("torch")  # who measures stored vectors does without, and does not wait for it
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else processor()
    threads = torch.get_num_threads() if torch else len(os.sched_getaffinity(0)) if sys.platform == "linux" else None
    return {
        "command": shlex.join([Path(sys.executable).name, *command]),
        "folder": os.getcwd(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions,
        "machine": {"device": f"{device}: {name}", "threads": threads, "system": platform.platform()},
    }


def commit() -> str | None:
    """The commit of this copy of MiniCLIP, `-dirty` where files differ from it; None where git knows nothing."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # it may lie in a repository of somebody else's
        return None
    try:
        how = {"cwd": root, "capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], **how).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def evaluation_record(argv: Sequence[str], options, records, device) -> dict:
    """The record of an evaluation: with what it takes to do it again, and to see that it is the same model and data."""
    about = record_of(["evaluate.py", *argv], device) | {"options": vars(options)}
    if options.eval_file:
        about["data"] = fingerprint(options.eval_file, records)
    weights = options.pretrained or options.model and os.path.join(options.model, "model.safetensors")
    features = [os.path.join(options.features, f"{kind}.npy") for kind in ("image", "text")] if options.features else []
    files = [path for path in (weights, *features) if path and os.path.isfile(path)]
    about["sha256"] = {path: sha256(path) for path in files}
    return about


def read_record(folder: str | Path) -> dict:
    """The record in a folder. Raises InputError where it cannot be read."""
    try:
        return json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{Path(folder) / RECORD} cannot be read: {error}") from None


# Of these it does not matter that they differ.
ASIDE = ("command", "folder", "started", "options.overwrite_output_dir", "options.train_file", "options.resume",
         "arguments.output_dir", "arguments.resume_from_checkpoint", "arguments.run_name", "arguments.disable_tqdm",
         "arguments.logging", "arguments.log_", "arguments.report_to", "arguments.local_rank",
         "arguments.seed", "arguments.data_seed")  # fmt: skip


def differences(before: dict, now: dict, path: str = "") -> dict[str, str]:
    """What differs between two records: by its name, a line that says both values."""
    found = {}
    for key in [*before, *(key for key in now if key not in before)]:
        name, old, new = f"{path}{key}", before.get(key), now.get(key)
        if name.startswith(ASIDE) or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{name}.")
        else:
            found[name] = f"{name} was {json.dumps(old)} and is {json.dumps(new)}"
    return found
