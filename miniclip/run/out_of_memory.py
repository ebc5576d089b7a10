"""TODO docstring."""

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was short, on a GPU or not."""
    known = ("can't allocate memory", "out of memory", "not enough memory", "could not create a")  # oneDNN
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in known)
    )


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]
