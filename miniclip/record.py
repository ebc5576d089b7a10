"""What was run, on what, with which versions? Enough is written down to do it again, and to tell that it is the same.

`train.py` keeps it as `run.json` in output_dir and in each checkpoint, `evaluate.py` beside its metrics.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from miniclip.config import InputError
from miniclip.files import sha256

RECORD = "run.json"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "pillow", "faiss-cpu", "numpy", "ftfy")
MOST = 1 << 30  # bytes of a file that are read for its sha256; of a larger one the size has to tell


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


@cache
def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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


def fingerprint(spec: str, records: Sequence[dict] | None = None) -> dict:
    """A data set: the sha256 of its files, and how many records and captions were taken from it. Of a folder and of
    shards it is that of the files' names and sizes; of a data set on the hub there is none."""
    from miniclip.sources import split

    found = {"files": [_digest(part) for part in split(spec)]}  # wherever they lie
    if isinstance(records, list):
        found["records"], found["captions"] = len(records), sum(len(record["caption"]) for record in records)
        paths = [record["image"] for record in records if isinstance(record["image"], (str, Path))]
        found["image_bytes"] = sum(os.path.getsize(path) for path in paths)
    elif records is not None:
        found["records"] = len(records)
    return found


def _digest(part: str) -> str | None:
    from miniclip.shards import expand

    path = Path(part)
    if path.is_file():
        return sha256(path) if path.stat().st_size <= MOST else f"{path.stat().st_size} bytes"
    if path.is_dir():
        files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    else:
        try:
            files = [Path(name) for name in expand(part)]
        except InputError:
            return None
    files = sorted(file for file in files if file.is_file())
    if not files:
        return None
    listing = "\n".join(f"{os.path.relpath(file, path.parent)} {file.stat().st_size}" for file in files)
    return f"names and sizes {hashlib.sha256(listing.encode('utf-8', 'surrogateescape')).hexdigest()}"


def training_record(argv: Sequence[str], options, args, model, records, eval_records=None) -> dict:
    """The record of a training run. `options` is a TrainOptions, `args` the ClipTrainingArguments."""
    from miniclip.fast import arithmetic

    plain = {name: value for name, value in args.to_dict().items() if isinstance(value, (str, int, float, bool, list))}
    # A stream has no index: what has been read of it depends on how many read it.
    readers = {"readers": args.world_size * max(1, args.dataloader_num_workers)} if options.streaming else {}
    return record_of(["train.py", *argv], args.device) | readers | {
        "model": json.loads(json.dumps(model.config.to_dict())),
        "data": fingerprint(options.train_file, records),
        "eval_data": fingerprint(options.eval_file, eval_records) if options.eval_file else None,
        "seed": args.seed,
        "pairs_per_step": args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "processes": args.world_size,
        "arithmetic": arithmetic(args.device) if args.fast else "plain",
        "options": dataclasses.asdict(options),
        "arguments": plain,
    }


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
