"""TODO docstring."""


class InputError(ValueError):
    """Something is wrong with what somebody gave us. The message names it, and says what to do."""


class CheckpointError(InputError):
    """Weights that cannot be used; the message says why, and what to do."""
