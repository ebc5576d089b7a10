"""TODO docstring."""

import argparse
import dataclasses
import errno
import os
import re
import signal
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import field
from pathlib import Path

from miniclip.utils.errors import InputError


def option(default, help: str, **more):
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": help, **more})


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
        # Without the prefix of `files.scratch_path`.
        path = re.sub(r"(^|[/\\])\.\d+\.(?=[^/\\]+$)", r"\1", os.fsdecode(error.filename))
        sys.exit(f"{name}: {path}: {error.strerror}")
    except KeyboardInterrupt as stopped:
        with suppress(OSError):  # of a pipe that nobody reads any more
            print(f"{name}: {str(stopped) or 'stopped'}", file=sys.stderr)
        sys.exit(128 + getattr(stopped, "signal", signal.SIGINT))
