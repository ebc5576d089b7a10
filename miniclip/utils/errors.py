"""Errors in what the user gave: the message names what is wrong, where it is, and what to do."""

from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used."""


class CheckpointError(InputError):
    """Weights that cannot be used."""


def shorten(names: Iterable) -> str:
    """Returns the first few names, for a message."""
    names = [str(name)[:200] for name in names]
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "") or "none"


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip(": ").partition("\n")[0][:300]
