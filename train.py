"""Trains or fine-tunes a CLIP model: `python train.py recipe.json`, or `python train.py --help`."""

import os
import sys
from pathlib import Path

from miniclip.options import parse_train, run, train_help

# On the CPU: let threads that wait sleep instead of spinning. Beside another busy program that is five times faster,
# alone it costs nothing. Has to be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: list[str]):
    if not argv or {"-h", "--help"} & set(argv):
        print(train_help())
        return
    options, args = parse_train(argv)
    for name in ("model_config", "train_file"):
        if getattr(options, name) is None:
            sys.exit(f"train.py: --{name} is missing (see --help)")

    import logging
    import math
    import warnings

    from transformers import set_seed

    from miniclip.data import CaptionDataset, flatten_captions, read_captions
    from miniclip.inference import load
    from miniclip.retrieval import format_table
    from miniclip.trainer import ClipTrainer, start_afresh
    from miniclip.transforms import TrainTransform

    logging.basicConfig(level=args.get_process_log_level(), format="%(message)s")
    resume = True if args.resume_from_checkpoint in ("latest", "True", "true") else args.resume_from_checkpoint
    if args.should_save and not resume:
        start_afresh(args.output_dir, options.overwrite_output_dir)

    records = read_captions(options.train_file, options.image_root, on_bad=options.bad_records)
    eval_records = None
    if options.eval_file:
        eval_records = read_captions(options.eval_file, options.image_root, on_bad=options.bad_records)

    set_seed(args.seed)
    warnings.filterwarnings("ignore", ".*random weights")  # here they may be what is wanted; the next line says so
    model, preprocess, tokenizer = load(options.model_config, options.pretrained)
    if options.fixed_logit_scale is not None:
        model.logit_scale.data.fill_(math.log(options.fixed_logit_scale))
        model.logit_scale.requires_grad_(False)
    texts, _ = flatten_captions(records)
    tokenizer(texts)
    start = "" if options.pretrained or Path(options.model_config).is_dir() else ", from scratch"
    print(
        f"{options.model_config}{start}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters; "
        f"{len(records)} images, {len(texts)} captions, {tokenizer.truncated} of them cut off at "
        f"{tokenizer.context_length} tokens"
    )

    jitter = options.color_jitter
    transform = TrainTransform(
        model.config.preprocess_cfg,
        scale=(options.crop_scale, 1.0),
        hflip=options.hflip,
        color_jitter=(jitter, jitter, jitter, 0.0) if jitter else None,
    )
    dataset = CaptionDataset(records, preprocess, tokenizer, seed=args.seed, transform=transform)
    trainer = ClipTrainer(model, args, dataset, eval_records, preprocess=preprocess, tokenizer=tokenizer)
    trainer.train(resume)
    trainer.save_model()  # with config.json: a folder for miniclip.load
    if eval_records:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            print(format_table({name.removeprefix("eval_"): value for name, value in metrics.items()}))
    trainer.save_state()


if __name__ == "__main__":
    run(main)
