"""Out-of-memory errors: how to recognise one, and which batch size fits."""

import gc

import torch

from miniclip.utils.errors import InputError
from miniclip.utils.machine import return_freed_memory


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the CPU."""
    known = ("can't allocate memory", "out of memory", "not enough memory", "could not create a")  # the last: oneDNN
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in known)
    )


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]


def batch_too_large(trainer, model, inputs: dict, cause: str) -> InputError:
    """The error for a batch that did not fit in memory (`cause`), with a batch size that does, found by halving."""
    args, size = trainer.args, len(next(iter(inputs.values())))
    if chunk := args.grad_cache_chunk_size:
        return InputError(
            f"out of memory in chunks of {chunk} ({cause}): try --grad_cache_chunk_size {chunk // 2 or 1}"
        )
    advice = "lower --per_device_train_batch_size, or add --grad_cache_chunk_size"
    if args.world_size == 1 and (fits := largest_batch(trainer, model, inputs, size // 2)):
        advice = f"{fits} fit (tried). Use --per_device_train_batch_size {fits}, or --grad_cache_chunk_size {fits},"
        advice += f" which keeps the negatives of all {size}"
    elif args.world_size == 1:
        advice = "not even one pair fits. Use a smaller model or image size"
    return InputError(f"out of memory with {size} pairs at once ({cause}): {advice}")


def largest_batch(trainer, model, inputs: dict, size: int) -> int:
    """The first of `size`, size / 2, size / 4, ... pairs whose forward and backward pass fit; 0 if none do."""
    while size:
        model.zero_grad(set_to_none=True)
        trainer.guard.batches.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return_freed_memory()  # other allocators may need what glibc keeps
        # The optimizer allocates its two averages in the first step: leave room for them.
        reserved = [] if trainer.optimizer.state else [torch.empty_like(p) for p in model.parameters() for _ in "mv"]
        try:
            part = trainer._prepare_inputs({name: value[:size] for name, value in inputs.items()})
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, part)
            trainer.accelerator.backward(loss)
            return size
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        finally:
            reserved.clear()
            loss = part = None
        size //= 2
    return 0
