"""TODO docstring."""

import dataclasses
import json
from collections.abc import Sequence

from miniclip.datasets.fingerprint import fingerprint
from miniclip.run.record import record_of


def training_record(argv: Sequence[str], options, args, model, records, eval_records=None) -> dict:
    """The record of a training run. `options` is a TrainOptions, `args` the ClipTrainingArguments."""
    from miniclip.inference.matmul import arithmetic

    plain = {name: value for name, value in args.to_dict().items() if isinstance(value, (str, int, float, bool, list))}
    # A stream has no index: what has been read of it depends on how many read it.
    readers = {"readers": args.world_size * max(1, args.dataloader_num_workers)} if options.streaming else {}
    return (
        record_of(["train.py", *argv], args.device)
        | readers
        | {
            "model": json.loads(json.dumps(model.config.to_dict())),
            "data": fingerprint(options.train_file, records),
            "eval_data": fingerprint(options.eval_file, eval_records) if options.eval_file else None,
            "seed": args.seed,
            "pairs_per_step": args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
            "processes": args.world_size,
            "arithmetic": arithmetic(args.device) if args.fast else "plain",
            "options": dataclasses.asdict(options),
            "arguments": plain,
        }
    )
