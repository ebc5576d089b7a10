"""Run metadata: the command line, data, versions and machine of a run, enough to repeat it or compare it with others.

`train.py` writes it as `run.json` into output_dir and each checkpoint; `evaluate.py` adds it to its metrics."""

import dataclasses
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from miniclip.datasets.read import fingerprint
from miniclip.utils.files import sha256
from miniclip.utils.machine import CORES, processor

RECORD = "run.json"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "pillow", "faiss-cpu", "numpy", "ftfy")


def run_metadata(command: Sequence[str], device) -> dict:
    """Returns the metadata of any command: its command line, the time, the commit, versions and the machine."""
    torch = sys.modules.get("torch")  # evaluating stored embeddings does not import it
    versions = {"python": platform.python_version(), **dict.fromkeys(PACKAGES)}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    name = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else processor()
    threads = torch.get_num_threads() if torch else CORES
    return {
        "command": shlex.join([Path(sys.executable).name, *command]), "folder": os.getcwd(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit(), "versions": versions,
        "machine": {"device": f"{device}: {name}", "threads": threads, "system": platform.platform()},
    }  # fmt: skip


def commit() -> str | None:
    """Returns the commit of this copy of MiniCLIP, with `-dirty` if files differ from it, or None outside git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # git would otherwise report a repository that merely contains this folder
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.check_output(command, cwd=root, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def training_metadata(argv: Sequence[str], options, args, model, records, eval_records, arithmetic: str) -> dict:
    """Returns the metadata of a training run. `arithmetic` is how fp32 products are computed with `args.fast`."""
    # Which samples of a stream have been read depends on the number of readers.
    readers = {"readers": args.world_size * max(1, args.dataloader_num_workers)} if options.streaming else {}
    plain = (str, int, float, bool, list, dict)
    drawn = eval_records and not options.eval_file  # of the training data: told by its captions
    held = [record["caption"] for record in eval_records] if drawn else None
    return {
        **run_metadata(["train.py", *argv], args.device), **readers,
        "model": json.loads(json.dumps(model.config.to_dict())), "data": fingerprint(options.train_file, records),
        "eval_data": fingerprint(options.eval_file, eval_records) if options.eval_file else None,
        "eval_classes": fingerprint(options.eval_classes) if options.eval_classes else None,
        "holdout": held and {"images": len(held), "sha256": hashlib.sha256(json.dumps(held).encode()).hexdigest()},
        "seed": args.seed, "processes": args.world_size, "arithmetic": arithmetic if args.fast else "plain",
        "pairs_per_step": args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "options": dataclasses.asdict(options),
        "arguments": {name: value for name, value in args.to_dict().items() if isinstance(value, plain)},
    }  # fmt: skip


def evaluation_metadata(argv: Sequence[str], options, records, device, files: Sequence = ()) -> dict:
    """Returns the metadata of an evaluation, with the sha256 of the weights or feature files and the data it used."""
    metadata = run_metadata(["evaluate.py", *argv], device) | {"options": vars(options)}
    if options.eval_file:
        metadata["data"] = fingerprint(options.eval_file, records)
    weights = options.pretrained or options.model and os.path.join(options.model, "model.safetensors")
    files = [str(path) for path in (weights, *files) if path and os.path.isfile(path)]
    return metadata | {"sha256": {path: sha256(path) for path in files}}


# Differences in these do not matter.
IGNORED = ("command", "folder", "started", "options.overwrite_output_dir", "options.train_file", "options.resume",
           "arguments.output_dir", "arguments.resume_from_checkpoint", "arguments.run_name", "arguments.disable_tqdm",
           "arguments.log", "arguments.report_to", "arguments.local_rank",
           "arguments.seed", "arguments.do_")  # fmt: skip


def differences(before: dict, now: dict, path: str = "") -> dict[str, str]:
    """Returns the differences between the metadata of two runs: for each name, a line with both values."""
    found = {}
    for key in before | now:
        name, old, new = f"{path}{key}", before.get(key), now.get(key)
        if name.startswith(IGNORED) or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{name}.")
        else:
            found[name] = f"{name} was {json.dumps(old)} and is {json.dumps(new)}"
    return found
