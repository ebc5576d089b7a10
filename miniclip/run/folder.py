"""The output folder of a run: locked while the run lasts, cleared or resumed, with its metadata, log and curves."""

import logging
import os
import posixpath
from contextlib import ExitStack
from pathlib import Path

from miniclip.datasets.read import split
from miniclip.datasets.records import is_within
from miniclip.datasets.splits import at_split
from miniclip.run.checkpoints import checkpoints, clean
from miniclip.run.metadata import RECORD
from miniclip.run.progress import CURVES, LOG, Progress, check_reporters
from miniclip.run.store import Sync, holds_run, restore
from miniclip.run.sync import CHECKPOINT, clear
from miniclip.utils.bad_samples import NAME, BadSamples
from miniclip.utils.errors import InputError
from miniclip.utils.files import lock, write_json
from miniclip.utils.remote import is_remote


class Run(ExitStack):
    """A run's output folder, for this process inside the `with` block (see train.py); `bad_samples` collects what is
    skipped. Raises InputError for a folder with an earlier run that is neither to be resumed nor replaced."""

    def __init__(self, options, args):
        super().__init__()
        logging.basicConfig(level=args.get_process_log_level(), format="%(message)s")
        check_reporters(args)
        check_place(options, args.output_dir)
        self.options, self.args, self.folder = options, args, Path(args.output_dir)
        given = args.resume_from_checkpoint
        self.resume = given in ("latest", "True", "true") or given
        self.bad_samples, self.remote = BadSamples(), is_remote(given)
        if not self.resume and not options.overwrite_output_dir:
            earlier = [*checkpoints(self.folder), *self.folder.glob("model.safetensors")]
            if earlier or options.store and args.process_index == 0 and holds_run(options.store):
                fix = "resume it with --resume, replace it with --overwrite_output_dir, or name another --output_dir"
                raise InputError(f"{self.folder if earlier else options.store} holds an earlier run: {fix}")

    def hold(self):
        """Locks the folder, once all that was named is known to be there, until the end of the `with` block."""
        if self.args.process_index == 0:
            self.enter_context(lock(self.folder))
            if self.options.store:
                print(f"the run works in {self.folder}, which is copied to {self.options.store} in the background")

    def start(self, trainer):
        """Clears the folder and begins to log. Returns the checkpoint to resume from (True: the newest), if any."""
        first = trainer.is_world_process_zero()
        if first:
            clean(self.folder, anew=not self.resume)  # all is well so far: now the earlier run may go
            if self.remote or self.resume is True and self.options.store:
                restore(self.resume if self.remote else self.options.store, self.folder)
            write_json(self.folder / RECORD, trainer.run_metadata)
            if self.options.store:
                if not self.resume:
                    clear(self.options.store)
                self.enter_context(Sync(self.options.store, self.folder, self.args.save_total_limit))
        if self.remote:  # now it is here
            name = posixpath.basename(self.resume.rstrip("/"))
            self.resume = str(self.folder / name) if CHECKPOINT.fullmatch(name) else True
        self.bad_samples.open(self.folder / NAME, first, go_on=bool(self.resume))
        trainer.accelerator.wait_for_everyone()  # no other process may look for checkpoints before
        # Ended by `finish`, or by the error that ends the run: it draws curves.png in either case.
        self.enter_context(Progress(trainer, contrasts=self.options.loss == "clip"))
        return self.resume

    def finish(self, trainer):
        """Saves the trainer's state and says where everything is."""
        trainer.save_state()
        self.close()
        if trainer.is_world_process_zero():
            print(f"log     {self.folder / LOG}\ncurves  {self.folder / CURVES}\nmodel   {self.folder}", flush=True)
            if len(self.bad_samples):
                print(f"bad samples were skipped {len(self.bad_samples)} times: {self.bad_samples.path}")
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()  # destroys the process group


def check_place(options, folder: str):
    """Raises InputError for an output folder in a folder of data, and for one to replace that holds its start."""
    place, sources = os.path.realpath(folder), (options.train_file, options.eval_file, options.eval_classes)
    for source in (at_split(part.partition("[:")[0])[0] for parts in sources if parts for part in split(parts)):
        if os.path.isdir(source) and is_within(place, os.path.realpath(source)):
            wrong = f"lies in the data {source}, where its files would be taken for images and captions"
            raise InputError(f"output_dir {folder} {wrong}. Choose a folder elsewhere")
    starts = (options.model, options.pretrained, *(options.teacher or ())) if options.overwrite_output_dir else ()
    for path in (path.removeprefix("local-dir:") for path in starts if path):
        if os.path.exists(path) and not path.endswith(".json") and is_within(os.path.realpath(path), place):
            raise InputError(f"{path} is in {folder}, whose run overwrite_output_dir deletes. Use another output_dir")
