"""Out-of-memory errors: how to recognise one, and which batch size fits."""

import gc
import re

import torch

from miniclip.utils.errors import InputError
from miniclip.utils.machine import return_freed_memory


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the CPU."""
    words = "can't allocate memory|out of memory|not enough memory|could not create a"  # the last: oneDNN
    known = isinstance(error, RuntimeError) and re.search(words, str(error))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(known)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]


def batch_too_large(trainer, model, inputs: dict, cause: str) -> InputError:
    """Returns the error for a batch that did not fit (`cause`), with a batch size that does, found by halving."""
    args, size = trainer.args, len(next(iter(inputs.values())))
    if chunk := args.grad_cache_chunk_size:
        half = chunk // 2 or 1
        return InputError(f"out of memory in chunks of {chunk} ({cause}): try --grad_cache_chunk_size {half}")
    advice = "lower --per_device_train_batch_size, or add --grad_cache_chunk_size"
    if args.world_size == 1:
        n = size // 2
        while n and not fits(trainer, model, {name: value[:n] for name, value in inputs.items()}):
            n //= 2
        advice = f"{n} fit (tried). Use --per_device_train_batch_size {n}, or --grad_cache_chunk_size {n}, which keeps"
        advice = advice + f" all {size} negatives" if n else "not even one pair fits. Use a smaller model or image size"
    return InputError(f"out of memory with {size} pairs at once ({cause}): {advice}")


def fits(trainer, model, inputs: dict) -> bool:
    """Whether a forward and backward pass of a batch fits in memory, beside the state of the optimizer."""
    model.zero_grad(set_to_none=True)
    trainer.guard.batches.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_freed_memory()  # other allocators may need what glibc keeps
    # The optimizer allocates its two averages in the first step: leave room for them.
    averages = 0 if trainer.optimizer.state else 2
    reserved = [torch.empty_like(p) for p in model.parameters() for _ in range(averages)]
    try:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs))
        trainer.accelerator.backward(loss)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    del reserved
    return True
