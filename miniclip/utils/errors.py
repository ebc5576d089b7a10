"""Errors in what the user gave: the message names what is wrong, where it is, and what to do."""


class InputError(ValueError):
    """Input that cannot be used."""


class CheckpointError(InputError):
    """Weights that cannot be used."""
