"""From where can a run go on, and is it the same run?

A checkpoint is written into a folder of another name, gets a manifest with the sha256 of its files (`files.py`), and is
renamed when all of it is on the disk. So a folder `checkpoint-40` is complete, whenever the process was killed; should
a disk have damaged it since, the manifest tells.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_callback import ExportableState

from miniclip.run.record import RECORD, differences, read_record
from miniclip.utils.errors import InputError
from miniclip.utils.files import MANIFEST, check_manifest, files_in, remove_scratch, sync, write_json, write_manifest

logger = logging.getLogger(__name__)
SCRATCH = "tmp-"  # before the names of folders that are being written, or deleted


class SaveError(InputError):
    """A checkpoint could not be written; the message says why, and what is left."""


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; not those that somebody named otherwise."""
    found = (path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-", 1)[1].isdecimal())
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def check_checkpoint(folder: str | Path):
    """Raises InputError for a folder that no run can go on from: what is in it is incomplete, or damaged."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        what = f"has no {MANIFEST}, which comes last" if Path(folder).is_dir() else "does not exist"
        raise InputError(f"the checkpoint {folder} {what}")
    listed = manifest.read_text(encoding="utf-8", errors="replace")
    for part in ("model.safetensors", "optimizer.", "scheduler.pt", "rng_state", "trainer_state.json"):
        if f'"{part}' not in listed:
            raise InputError(f"{folder} is no complete checkpoint: its {MANIFEST} has no {part.rstrip('.')}")
    check_manifest(folder)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run that is complete and undamaged, or None. Those passed over are said."""
    for folder in reversed(checkpoints(output_dir)):
        try:
            check_checkpoint(folder)
            return str(folder)
        except (InputError, OSError) as error:  # an older one may do
            logger.warning("passing over %s: %s", folder, error)
    return None


def save_checkpoint(trainer):
    """What Trainer saves, and a ClipTrainer's record of its run, all or nothing. All processes come here together."""
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
            if trainer.record:
                write_json(scratch / RECORD, trainer.record)
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(folder))
    if args.should_save:
        keep_newest(args.output_dir, folder, args.save_total_limit, state.best_model_checkpoint)


@contextmanager
def saving(folder: Path, is_first: bool, wait) -> Iterator[Path]:
    """Within it a checkpoint is written, by all processes of a run, into the folder that it gives; then that becomes
    `folder`, in one step. `is_first` on one process, `wait` waits for all. After an exception there is no trace of it,
    and a SaveError says which checkpoint is left."""
    scratch = folder.with_name(SCRATCH + folder.name)
    try:
        if is_first:
            shutil.rmtree(scratch, ignore_errors=True)
        wait()
        yield scratch
        wait()
        if is_first:
            for name in files_in(scratch):
                sync(scratch / name)
            write_manifest(scratch)
            remove(folder)  # one that was found damaged
            os.rename(scratch, folder)
            sync(folder.parent)
        wait()
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if "DataLoader worker" in str(error):  # one died, which can be heard of at any time
            raise
        left, needed = checkpoints(folder.parent), f"{type(error).__name__}: {error}".partition("\n")[0]
        free = shutil.disk_usage(folder.parent).free / 1e6
        raise SaveError(
            f"{folder} could not be saved, with {free:.0f} MB free on that disk ({needed}). The newest checkpoint is"
            f" {left[-1] if left else 'none'}, untouched: free space and go on from it by --resume"
        ) from error


def remove(folder: Path):
    """Deletes a folder; a process that is killed meanwhile leaves no half of it under its name."""
    if folder.is_dir():
        doomed = folder.with_name(f"{SCRATCH}old-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def keep_newest(output_dir: str | Path, newest: Path, limit: int | None, best: str | None):
    """Deletes checkpoints until there are `limit`: those after the newest, left by a run that was resumed from before
    them, then the oldest. The newest is the one just saved; neither it nor the best is ever deleted."""
    folders = checkpoints(output_dir)
    place = folders.index(newest)
    spared = {newest, Path(best) if best else newest}
    doomed = [folder for folder in folders[place + 1 :] + folders[:place] if folder not in spared]
    for folder in doomed[: max(0, len(folders) - limit)] if limit and limit > 0 else []:
        remove(folder)


def start_anew(output_dir: str | Path):
    """Deletes what an earlier run left in its folder, as far as it could be taken for the new one's."""
    folder = Path(output_dir)
    whole = [folder / name for name in (MANIFEST, "model.safetensors", "trainer_state.json")]
    for path in (*whole, *folder.glob("nonfinite-*.json")):
        path.unlink(missing_ok=True)
    for old in reversed(checkpoints(folder)):
        remove(old)


def clean(output_dir: str | Path):
    """Deletes what a killed process left half written, or half deleted."""
    for folder in Path(output_dir).glob(f"{SCRATCH}*checkpoint-*"):
        if not folder.name.startswith(f"{SCRATCH}old"):
            logger.warning("passing over %s, which was being written when the run was stopped", folder)
        shutil.rmtree(folder, ignore_errors=True)
    remove_scratch(output_dir)


# What a run may not differ in from the one that it goes on with, and why.
SAME = {
    "data": "the order of the pairs, and which have been seen, would not be what they were",
    "seed": "what is drawn for the rest of the epoch would not be what it was",
    "pairs_per_step": "its place in the epoch is counted in steps of another size",
    "model": "its weights are of another model",
    "readers": "each worker of each process reads a share of the stream, and the shares would be others",
}


def check_same_run(checkpoint: str | Path, record: dict):
    """Compares a checkpoint's record of its run (`record.py`) with that of the run that is to go on from it. What
    differs is said; raises InputError where the outcome would be wrong."""
    if not (Path(checkpoint) / RECORD).is_file():
        logger.warning("%s has no %s: nobody can tell whether data and options are the same", checkpoint, RECORD)
        return
    found = differences(read_record(checkpoint), record)
    parts = {name: name.partition(".")[0] for name in found}
    if wrong := [f"  {line}: {SAME[parts[name]]}" for name, line in found.items() if parts[name] in SAME]:
        raise InputError(
            "\n".join([f"{checkpoint} is of another run:", *wrong])
            + f"\nSay what was said then, or start anew from its weights: --model {checkpoint} --output_dir ..."
        )
    if found:
        logger.warning("other than before %s:\n  %s", checkpoint, "\n  ".join(found.values()))
