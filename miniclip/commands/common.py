"""Flags and steps that several commands share."""

import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

from miniclip.utils.command_line import Parser, find_device, printable
from miniclip.utils.errors import InputError


def share_image_flags(parser: Parser, output_dir: str):
    """Adds the flags of commands that encode images."""
    parser.share("model", required=True)
    parser.share("pretrained")
    parser.add_argument("--images", required=True, nargs="+", help="images, folders, or a folder of class folders")
    parser.share("on_bad_sample")
    parser.share("output_dir", default=output_dir, help="folder to write to (default: %(default)s)")
    parser.share("batch_size", default=32, help="images encoded at once (default: %(default)s)")
    parser.share("num_workers", "precision", "device")


def share_class_flags(parser: Parser):
    """Adds the flags that name classes; `read_class_flags` reads them."""
    classes = "a,b,c; name=words,...; or a .txt or .json file of them (docs/zero_shot.md). Default: the folder names"
    parser.add_argument("--classes", help=classes)
    parser.add_argument(
        "--templates", help="file of sentences with {} for the class name (default: the language's own)"
    )
    parser.add_argument("--language", default="en", help="of classes and templates: en, zh, fr, es (default: en)")


def read_class_flags(options) -> tuple[dict[str, str] | None, list[str]]:
    """The classes, None if they are not given, and the templates."""
    from miniclip.classify.prompts import TEMPLATES, read_classes, read_templates

    if options.language not in TEMPLATES and not (options.templates and options.classes):
        known = ", ".join(TEMPLATES)
        raise InputError(f"--language {options.language} is none of {known}: add --templates and --classes")
    templates = read_templates(options.templates) if options.templates else TEMPLATES[options.language]
    return read_classes(options.classes, options.language) if options.classes is not None else None, templates


def open_model(options):
    """`(model, preprocess, tokenizer)`, with an inference copy of the model."""
    from miniclip.inference.fast import fast_model
    from miniclip.inference.load import load

    Path(options.output_dir).mkdir(parents=True, exist_ok=True)  # fail before the work, not after it
    model, preprocess, tokenizer = load(options.model, options.pretrained, find_device(options.device))
    return fast_model(model, options.precision), preprocess, tokenizer


def report_bad_samples(bad_samples, path: Path | str):
    """Writes the list of bad samples to a file, if there are any, and prints where it is."""
    bad_samples.open(path)
    if bad_samples:
        print(f"{len(bad_samples)} bad samples were left out: {bad_samples.path}")


def check_folder_or_weights(flag: str, model: str, pretrained: str | None):
    """Raises InputError for a model that is a config without weights."""
    if not Path(model).is_dir() and pretrained is None:
        raise InputError(f"{flag} {model} is not a folder. If it is the name of a config, add --pretrained")


@contextmanager
def plain_warnings():
    """Prints warnings as single lines."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return printable(text).replace("|", "\\|")
