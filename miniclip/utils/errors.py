"""Errors in what the user gave: the message names what is wrong, where it is, and what to do."""


class InputError(ValueError):
    """Input that cannot be used."""


class CheckpointError(InputError):
    """Weights that cannot be used."""


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip(": ").partition("\n")[0][:300]
