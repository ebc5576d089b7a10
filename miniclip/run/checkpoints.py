"""Checkpoints: atomic saving, validation, deletion of old ones, and whether a run may resume from one.

A checkpoint is written under a scratch name, gets a manifest with the sha256 of its files (`files.py`), and is renamed
when all of it is on the disk. So a folder `checkpoint-40` is complete even if the process was killed, and the manifest
detects later damage.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from transformers.trainer_callback import ExportableState

from miniclip.run.metadata import RECORD, differences, read_metadata
from miniclip.utils.errors import InputError
from miniclip.utils.files import (
    MANIFEST,
    check_manifest,
    remove_folder,
    remove_scratch,
    replacing,
    scratch_path,
    write_json,
    write_manifest,
)

logger = logging.getLogger(__name__)


class SaveError(InputError):
    """A checkpoint could not be written. The message says why, and which checkpoint is the newest."""


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first."""
    found = (path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-", 1)[1].isdecimal())
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def check_checkpoint(folder: str | Path):
    """Raises InputError for an incomplete or damaged checkpoint."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        what = (
            f"is incomplete: it has no {MANIFEST}, which is written last" if Path(folder).is_dir() else "does not exist"
        )
        raise InputError(f"the checkpoint {folder} {what}")
    listed = manifest.read_text(encoding="utf-8", errors="replace")
    for part in ("model.safetensors", "optimizer.", "scheduler.pt", "rng_state", "trainer_state.json"):
        if f'"{part}' not in listed:
            raise InputError(f"the checkpoint {folder} is incomplete: its {MANIFEST} does not list {part.rstrip('.')}")
    check_manifest(folder)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Returns the newest complete and undamaged checkpoint of a run, or None. Warns about those it skips."""
    for folder in reversed(checkpoints(output_dir)):
        try:
            check_checkpoint(folder)
            return str(folder)
        except (InputError, OSError) as error:
            logger.warning("skipping %s: %s", folder, error)
    return None


def save_checkpoint(trainer):
    """Saves what Trainer saves, and the run metadata, atomically. Called by all processes together."""
    args, state = trainer.args, trainer.state
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    best = folder.with_name(f"checkpoint-{state.best_global_step}")
    if best == folder or state.best_global_step and best.is_dir():
        state.best_model_checkpoint = str(best)
    trainer.store_flos()
    with saving(folder, args.should_save, trainer.accelerator.wait_for_everyone) as scratch:
        trainer.save_model(str(scratch), _internal_call=True)
        if not args.save_only_model:
            trainer._save_optimizer_and_scheduler(str(scratch))
            trainer._save_scaler(str(scratch))
            trainer._save_rng_state(str(scratch))
        if args.should_save:
            for part in (*trainer.callback_handler.callbacks, trainer.control):
                if isinstance(part, ExportableState):
                    state.stateful_callbacks[type(part).__name__] = part.state()
            state.save_to_json(str(scratch / "trainer_state.json"))
            if trainer.metadata:
                write_json(scratch / RECORD, trainer.metadata)
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(folder))
    if args.should_save:
        keep_newest(args.output_dir, folder, args.save_total_limit, state.best_model_checkpoint)


@contextmanager
def saving(folder: Path, is_first: bool, wait) -> Iterator[Path]:
    """Yields a scratch folder, into which all processes of a run write a checkpoint, and renames it to `folder` at the
    end of the `with` block. `is_first` is true on one process; `wait` waits for all. After an exception nothing of it
    is left, and SaveError names the newest checkpoint."""
    try:
        with replacing(folder, shared=True) if is_first else nullcontext(scratch_path(folder, True)) as scratch:
            wait()
            yield scratch
            wait()
            if is_first:
                write_manifest(scratch)
                remove_folder(folder)  # one that was found damaged
        wait()
    except Exception as error:
        shutil.rmtree(scratch_path(folder, True), ignore_errors=True)
        if "DataLoader worker" in str(error):  # a worker died, which can surface at any time
            raise
        left, needed = checkpoints(folder.parent), f"{type(error).__name__}: {error}".partition("\n")[0]
        free = shutil.disk_usage(folder.parent).free / 1e6
        raise SaveError(
            f"{folder} could not be saved, with {free:.0f} MB free on that disk ({needed}). The newest checkpoint is"
            f" {left[-1] if left else 'none'}, untouched: free space and continue from it with --resume"
        ) from error


def keep_newest(output_dir: str | Path, newest: Path, limit: int | None, best: str | None):
    """Deletes checkpoints until `limit` are left: first those with a higher step than `newest`, the one just saved,
    which are from before the run was resumed; then the oldest. Never deletes `newest` or `best`."""
    folders = checkpoints(output_dir)
    place = folders.index(newest)
    spared = {newest, Path(best) if best else newest}
    doomed = [folder for folder in folders[place + 1 :] + folders[:place] if folder not in spared]
    for folder in doomed[: max(0, len(folders) - limit)] if limit and limit > 0 else []:
        remove_folder(folder)


def start_anew(output_dir: str | Path):
    """Deletes what an earlier run left in the folder and what could be mistaken for the new run's."""
    folder = Path(output_dir)
    whole = [folder / name for name in (MANIFEST, "model.safetensors", "trainer_state.json")]
    for path in (*whole, *folder.glob("nonfinite-*.json")):
        path.unlink(missing_ok=True)
    for old in reversed(checkpoints(folder)):
        remove_folder(old)


def clean(output_dir: str | Path):
    """Deletes what a killed process left half written or half deleted."""
    for folder in Path(output_dir).glob(scratch_path("checkpoint-*", shared=True).name):
        logger.warning("deleting %s, which was being written when the run was stopped", folder)
    remove_scratch(output_dir)


# What must be the same for a run to resume, and why.
SAME = {
    "data": "the order of the pairs, and which have been seen, would change",
    "seed": "the random draws for the rest of the epoch would change",
    "pairs_per_step": "the position in the epoch is counted in steps of the old size",
    "model": "the checkpoint has the weights of another model",
    "readers": "each worker of each process reads a share of the stream, and the shares would change",
}


def check_same_run(checkpoint: str | Path, metadata: dict):
    """Compares the run metadata of a checkpoint with that of the run that resumes from it. Warns about differences;
    raises InputError for those in SAME."""
    if not (Path(checkpoint) / RECORD).is_file():
        logger.warning("%s has no %s: data and options cannot be compared with those of this run", checkpoint, RECORD)
        return
    found = differences(read_metadata(checkpoint), metadata)
    parts = {name: name.partition(".")[0] for name in found}
    if wrong := [f"  {line}: {SAME[parts[name]]}" for name, line in found.items() if parts[name] in SAME]:
        raise InputError(
            "\n".join([f"{checkpoint} is from a different run:", *wrong])
            + f"\nUse its options, or start a new run from its weights: --model {checkpoint} --output_dir ..."
        )
    if found:
        logger.warning("changed since %s:\n  %s", checkpoint, "\n  ".join(found.values()))
