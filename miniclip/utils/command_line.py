"""Command lines: the parser of all commands, the flags that they share, and how errors end a command."""

import argparse
import atexit
import dataclasses
import difflib
import errno
import gc
import inspect
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from miniclip.utils.errors import InputError


def at_least(lowest: int) -> Callable[[str], int]:
    """Returns a type for argparse: a whole number of at least `lowest`."""

    def number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is less than {lowest}")
        return int(text)

    number.__name__ = "whole number"
    return number


FLAGS = {  # flags that mean the same in every command, as arguments of add_argument
    "model": {"help": "a folder of MiniCLIP, OpenCLIP or transformers, hf-hub:org/repo, a config's name or .json"},
    "pretrained": {"help": "weights for a config: a tag (miniclip pretrained MODEL lists them), or a file or folder of"
                   " OpenCLIP, OpenAI, TinyCLIP, Hugging Face or MiniCLIP"},
    "eval_file": {"help": "captions: .json, .jsonl, .csv, .tsv, .txt, shards/{000..123}.tar, a folder of images with "
                  "texts, hf:NAME, .parquet; FILE:SPLIT for one split, several with ::, the first N records with [:N] "
                  "(docs/datasets.md)"},
    "split": {"help": "the split to read, as in FILE:SPLIT; two with train+val"},
    "image_root": {"help": "folder that image paths are relative to (default: the caption file's folder)"},
    "columns": {"nargs": 2, "metavar": ("IMAGE", "CAPTION"), "help": "names of the image and the caption column, if "
                "they cannot be guessed (OpenCLIP: --csv-img-key and --csv-caption-key)"},
    "on_bad_sample": {"choices": ["stop", "skip"], "default": "stop",
                      "help": "at bad records and images: stop, or skip them and list them in a .jsonl file"},
    "allow_outside_image_root": {"action": "store_true",
                                 "help": "allow image paths that lead out of image_root: .., absolute paths, links"},
    "output_dir": {"help": "folder to write to"},
    "batch_size": {"type": at_least(1), "help": "images or captions encoded at once"},
    "num_workers": {"type": at_least(0), "help": "threads that read images (default: one per core)"},
    "precision": {"choices": ["fp32", "bf16", "int8"], "default": "fp32", "help": "of the matrix products"},
    "json": {"action": "store_true",
             "help": "print one JSON document with all figures on stdout, and everything else on stderr"},
    "device": {"help": "cpu, cuda, cuda:1, mps (default: a GPU if there is one)"},
}  # fmt: skip
AUTO = "of the matrix products; auto: bf16 where it is measured to be exact and faster, else fp32"
HELP = {name: flag["help"] for name, flag in FLAGS.items()}


def closest(word: str, known: Collection[str]) -> str:
    """Returns up to three known words that are like a word, or the one most like it."""
    return ", ".join(difflib.get_close_matches(word, known) or difflib.get_close_matches(word, known, 1, 0.0))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        known = action.default in (None, argparse.SUPPRESS) or action.default is False or "default" in action.help
        return action.help if known else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """A parser whose help has an example and defaults, and whose errors are one line with the nearest right words."""

    aliases = {}  # names that another program has for our options

    def __init__(self, *args, example: str | None = None, **more):
        epilog = example and "example:\n" + "\n".join(f"  {line}" for line in example.splitlines())
        super().__init__(*args, **{"formatter_class": HelpFormatter, "epilog": epilog, "allow_abbrev": False} | more)

    @classmethod
    def command(cls, name: str, docstring: str, example: str):
        """Returns the parser of `miniclip NAME`, with `miniclip NAME EXAMPLE` as example."""
        return cls(f"miniclip {name}", description=docstring, example=f"miniclip {name} {example}")

    def share(self, *names: str, **more):
        """Adds flags of FLAGS; `more` replaces some of their arguments."""
        for name in names:
            self.add_argument(f"--{name}", **FLAGS[name] | more)

    def parse_args(self, *args, **kwargs):
        """argparse's. With --json, only `print_json` writes to stdout from here on."""
        options = super().parse_args(*args, **kwargs)
        if vars(options).get("json"):
            OUT[:], sys.stdout = [sys.stdout], sys.stderr
        return options

    def nearest(self, word: str) -> str:
        """Returns a message about an option that does not exist."""
        name, known = word.lstrip("-").partition("=")[0], {action.dest for action in self._actions}
        return f"unknown option {name!r}; nearest: {self.aliases.get(name.replace('_', '-')) or closest(name, known)}"

    def error(self, message: str):
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            word = unknown[1]
            message = self.nearest(word) if word.startswith("-") else f"unexpected argument {word!r}"
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            near = closest(str(value), [str(choice) for choice in action.choices])
            raise argparse.ArgumentError(action, f"{value!r} is not a possible value; nearest: {near}")


def option(default, help: str, **more):
    """A dataclass field with a help text."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def dataclass_help(options: type, **more) -> str:
    """Returns the help on a dataclass of options, whose docstring is a description and an example."""
    description, _, example = inspect.cleandoc(options.__doc__).partition("\n\nexample:\n")
    parser = Parser(description=description, example=inspect.cleandoc(example), **more)
    for f in dataclasses.fields(options):
        how = {"nargs": "+" if "list" in str(f.type) else None, "metavar": None if "choices" in f.metadata else "X"}
        how = {"action": "store_true"} if f.type is bool else how
        parser.add_argument(f"--{f.name}", default=f.default, **how, **f.metadata)
    return parser.format_help()


@contextmanager
def starting() -> Iterator[None]:
    """Around the imports of a command, and the loading of its only model, which may import more. What they make is no
    garbage: to search it for some, meanwhile and once more when the process ends, would take a third of the start."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch and faiss: threads that wait spin only briefly
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # a power of 2, in cycles
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def find_device(name: str | None):
    """Returns a torch device, by default the GPU if there is one. Raises InputError for one that cannot be used."""
    import torch

    try:
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def printable(text: str) -> str:
    """Returns text with line ends and control characters escaped: a file name may contain any character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(text: str) -> str:
    """Returns text for a cell of a Markdown table."""
    return printable(text).replace("|", "\\|")


OUT = []  # stdout, while --json keeps it for `print_json`


def print_json(options, value):
    """With --json, prints a command's result as the only thing on stdout. NaN and infinity become null."""
    if options.json:
        print(json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None)), file=OUT[0], flush=True)


# System errors that the user can fix by another file name or other permissions; any other one keeps its traceback.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
           errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)  # fmt: skip


def run(main: Callable[[list[str]], None]):
    """Runs a command. Wrong input ends it with one line instead of a traceback, and an interruption with the exit
    status that shells expect. Unexpected errors keep their traceback."""
    try:
        _run(main)
    finally:
        if "RANK" in os.environ and "torch.distributed" in sys.modules:  # torchrun and its like set it
            leave()


def leave():
    """Ends a process of several, with the exit status of the exception that is being handled, if there is one.

    The threads of a process group may still be releasing tensors, in Python, and where the interpreter goes first they
    abort the process ("terminate called without an active exception", status 134). So this does what the interpreter
    does at its end, without taking it apart. The group is not destroyed here: after an error or a second Ctrl-C that
    would wait for processes that still wait for this one; as it is, they see its connections close."""
    kind, error, trace = sys.exc_info()
    status = 0 if error is None else 1
    try:
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        elif error is not None:
            sys.excepthook(kind, error, trace)
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    finally:
        os._exit(status)


def _run(main: Callable[[list[str]], None]):
    name = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):  # file names may contain characters that cannot be printed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without a line of our code
    try:
        itself = name in ("train.py", "miniclip train", "miniclip sync")  # which know addresses
        if itself or not any(":/" in word for word in sys.argv[1:]):
            main(sys.argv[1:])
        else:
            from miniclip.utils.outputs import local_outputs

            with local_outputs(sys.argv[1:]) as argv:
                main(argv)
    except InputError as error:
        message = str(error)
        if "\nOriginal Traceback" in message:  # a data-loader process puts its traceback before the message
            message = message.rpartition(f"{type(error).__qualname__}: ")[2].strip()
        sys.exit(f"{name}: {message}")
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        sys.stdout = sys.stderr = open(os.devnull, "w")  # else Python complains when it closes them
        sys.exit(128 + getattr(signal, "SIGPIPE", 13))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"{name}: the disk is full: {error}. Earlier files are unchanged: free some space and try again")
        if error.filename is None or error.errno not in REFUSED:
            raise
        path = re.sub(r"(^|[/\\])\.\d+\.(?=[^/\\]+$)", r"\1", os.fsdecode(error.filename))  # without scratch_path's
        sys.exit(f"{name}: {path}: {error.strerror}")
    except KeyboardInterrupt as stopped:
        with suppress(OSError):  # a pipe that nobody reads any more
            print(f"{name}: {str(stopped) or 'stopped'}", file=sys.stderr)
        sys.exit(128 + getattr(stopped, "signal", signal.SIGINT))
