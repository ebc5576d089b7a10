"""Checkpoints: atomic saving, validation, and deletion of old ones.

A checkpoint gets its name when all of it is on the disk; its manifest (`utils/files.py`) detects later damage."""

import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

from transformers.trainer_callback import ExportableState

from miniclip.run.metadata import RECORD
from miniclip.utils import files
from miniclip.utils.errors import InputError, first_line
from miniclip.utils.files import MANIFEST

logger = logging.getLogger(__name__)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first."""
    found = (path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-", 1)[1].isdecimal())
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def check_checkpoint(folder: str | Path):
    """Raises InputError for an incomplete or damaged checkpoint."""
    if not Path(folder).is_dir():
        raise InputError(f"the checkpoint {folder} does not exist")
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        raise InputError(f"the checkpoint {folder} is incomplete: it has no {MANIFEST}, which is written last")
    listed = manifest.read_text(encoding="utf-8", errors="replace")
    for part in ("model.safetensors", "optimizer.", "scheduler.pt", "rng_state", "trainer_state.json"):
        if f'"{part}' not in listed:
            raise InputError(f"the checkpoint {folder} is incomplete: its {MANIFEST} does not list {part.rstrip('.')}")
    files.check_manifest(folder)


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
    """Saves a checkpoint, whole or not at all, by all processes together. An InputError names the newest one."""
    args, state, wait = trainer.args, trainer.state, trainer.accelerator.wait_for_everyone
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    best = folder.with_name(f"checkpoint-{state.best_global_step}")
    if best == folder or state.best_global_step and best.is_dir():
        state.best_model_checkpoint = str(best)
    trainer.store_flos()
    scratch = files.scratch_path(folder, shared=True)
    try:
        with files.replacing(folder, shared=True) if args.should_save else nullcontext():
            wait()
            trainer.save_model(str(scratch), _internal_call=True)
            if not args.save_only_model:
                trainer._save_optimizer_and_scheduler(str(scratch))
                trainer._save_scaler(str(scratch))
                trainer._save_rng_state(str(scratch))
            wait()
            if args.should_save:
                for part in (*trainer.callback_handler.callbacks, trainer.control):
                    if isinstance(part, ExportableState):
                        state.stateful_callbacks[type(part).__name__] = part.state()
                state.save_to_json(str(scratch / "trainer_state.json"))
                if trainer.run_metadata:
                    files.write_json(scratch / RECORD, trainer.run_metadata)
                files.write_manifest(scratch)
                files.remove_folder(folder)  # one that was found damaged
        wait()
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if "DataLoader worker" in str(error):  # a worker died, which can surface at any time
            raise
        why, free = first_line(error), shutil.disk_usage(folder.parent).free / 1e6
        newest = (checkpoints(folder.parent) or ["none"])[-1]
        fix = f"The newest checkpoint is {newest}, untouched: free space and continue from it with --resume"
        raise InputError(f"{folder} could not be saved, with {free:.0f} MB free on that disk ({why}). {fix}") from error
    if args.should_save:
        keep_newest(args.output_dir, folder, args.save_total_limit, state.best_model_checkpoint)


def keep_newest(output_dir: str | Path, newest: Path, limit: int | None, best: str | None):
    """Deletes checkpoints until `limit` are left: first those with a higher step than `newest`, the one just saved,
    which are from before the run was resumed; then the oldest. Never deletes `newest` or `best`."""
    folders = checkpoints(output_dir)
    place = folders.index(newest)
    doomed = [folder for folder in folders[place + 1 :] + folders[:place] if folder != Path(best or newest)]
    for folder in doomed[: max(0, len(folders) - limit)] if limit and limit > 0 else []:
        files.remove_folder(folder)


def clean(output_dir: str | Path, anew: bool):
    """Deletes what a killed process left half written or deleted, and with `anew` all that an earlier run left."""
    for folder in Path(output_dir).glob(files.scratch_path("checkpoint-*", shared=True).name):
        logger.warning("deleting %s, which was being written when the run was stopped", folder)
    files.remove_scratch(output_dir)
    if anew:
        for pattern in (MANIFEST, "model.safetensors", "trainer_state.json", "nonfinite-*.json"):
            for path in Path(output_dir).glob(pattern):
                path.unlink()
        for old in reversed(checkpoints(output_dir)):
            files.remove_folder(old)
