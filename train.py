"""Trains or fine-tunes a CLIP model: `python train.py recipe.json`, or `python train.py --help`."""

import os
import sys
from pathlib import Path

from miniclip.training.parse import parse_train, train_help
from miniclip.utils.command_line import run
from miniclip.utils.errors import InputError

# On the CPU, threads that wait for one another spin before they sleep, by default for so long that beside another busy
# program a step takes several times as long. A short spin costs nothing alone. To be said before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main(argv: list[str]):
    if not argv or {"-h", "--help"} & set(argv):
        print(train_help())
        return
    options, args = parse_train(argv)
    for name in ("model", "train_file"):
        if getattr(options, name) is None:
            sys.exit(f"train.py: --{name} is missing (see --help)")

    import logging
    import math
    import warnings

    from transformers import set_seed

    from miniclip.data import CaptionDataset
    from miniclip.datasets.read import describe as describe_data
    from miniclip.datasets.read import read_source
    from miniclip.datasets.records import one_per_image
    from miniclip.datasets.text_files import ColumnError
    from miniclip.inference.load import load
    from miniclip.inference.matmul import arithmetic, describe
    from miniclip.retrieval import format_table
    from miniclip.run.checkpoints import checkpoints, clean, start_anew
    from miniclip.run.metadata import RECORD, training_metadata
    from miniclip.run.progress import check_reporters, watch
    from miniclip.training.augment import TrainTransform
    from miniclip.training.finetune import fine_tuning
    from miniclip.training.objectives import make_objective
    from miniclip.training.streaming import StreamDataset
    from miniclip.training.trainer import ClipTrainer
    from miniclip.utils.bad_samples import NAME, BadSamples, CaptionFileError
    from miniclip.utils.files import lock, write_json

    logging.basicConfig(level=args.get_process_log_level(), format="%(message)s")
    check_reporters(args)
    resume = options.resume or args.resume_from_checkpoint in ("latest", "True", "true") or args.resume_from_checkpoint
    earlier = [*checkpoints(args.output_dir), *Path(args.output_dir).glob("model.safetensors")]
    if earlier and not resume and not options.overwrite_output_dir:
        raise InputError(
            f"{args.output_dir} holds an earlier run: go on with it by --resume, replace it by --overwrite_output_dir,"
            " or name another --output_dir"
        )

    records, eval_records, problems, make_dataset = None, None, [], CaptionDataset
    columns = dict(zip(("image_column", "caption_column"), options.columns or (None, None)))
    image_root, eval_image_root = (options.image_root or [None])[0], (options.image_root or [None])[-1]
    bad_samples, outside = BadSamples(), {"allow_outside": options.allow_outside_image_root}
    where = {"image_root": image_root, "on_bad": options.on_bad_sample or "stop", **columns, **outside}
    where["bad_samples"] = bad_samples
    try:
        if options.streaming:
            make_dataset = StreamDataset.opened(
                options.train_file, args, options.train_num_samples, image_root=image_root, **columns, **outside
            )
        else:
            epoch = {"factors": options.train_data_upsampling_factors, "num_samples": options.train_num_samples}
            locked = options.frozen[0] != "none"  # then all images are seen at once, before the first step
            records = read_source(options.train_file, check_handles=locked, **where, **epoch)
    except InputError as error:
        problems.append(str(error))
    try:
        if options.eval_file:
            where["image_root"] = eval_image_root
            try:
                eval_records = read_source(options.eval_file, check_handles=True, **where)
            except ColumnError as error:  # it may be of another form than the training data
                logging.warning("%s: its columns are guessed", error)
                where |= dict.fromkeys(columns)
                eval_records = read_source(options.eval_file, check_handles=True, **where)
            eval_records = one_per_image(eval_records, options.eval_file)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise CaptionFileError("\n".join(problems))
    held = lock(args.output_dir) if args.process_index == 0 else None  # until this process ends

    set_seed(args.seed)
    warnings.filterwarnings("ignore", ".*random weights")  # here they may be what is wanted; the next line says so
    model, preprocess, tokenizer = load(options.model, options.pretrained)
    model.float()  # small steps would be lost on weights in half precision
    objective = make_objective(options.loss, options.duplicates, model, options.teacher, bf16=args.bf16)
    if options.fixed_logit_scale is not None:
        model.logit_scale.data.fill_(math.log(options.fixed_logit_scale))
        model.logit_scale.requires_grad_(False)
    if args.process_index == 0:
        data = f"a stream of {options.train_file}" if options.streaming else describe_data(records, tokenizer)
        encoders = [getattr(cfg, "pretrained", False) for cfg in (model.config.vision_cfg, model.config.text_cfg)]
        start = ", from scratch" if not any(encoders) else ", from pretrained encoders"
        start = "" if options.pretrained or Path(options.model).is_dir() else start
        print(f"{options.model}{start}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters; {data}")
        if args.fast:
            print(describe(args.device))

    caches = None, None
    if options.frozen != ("none", "none"):
        from miniclip.training.freeze import lock_towers

        folder = options.feature_cache
        make_dataset, caches = lock_towers(model, *options.frozen, args, records, preprocess, tokenizer, folder)
    callbacks, remedies = fine_tuning(model, options, args)
    jitter = options.color_jitter
    transform = TrainTransform(
        model.config.preprocess_cfg,
        scale=(options.crop_scale, 1.0),
        hflip=options.hflip,
        color_jitter=(jitter, jitter, jitter, 0.0) if jitter else None,
    )
    bad = {"on_bad": options.on_bad_sample, "bad_samples": bad_samples}
    dataset = make_dataset(records, preprocess, seed=args.seed, transform=transform, **bad)
    products = arithmetic(args.device) if args.fast else "plain"
    record = training_metadata(argv, options, args, model, records, eval_records, products)
    trainer = ClipTrainer(
        model, args, dataset, eval_records, preprocess=preprocess, tokenizer=tokenizer, caches=caches,
        objective=objective, callbacks=callbacks, record=record, **remedies,
    )  # fmt: skip
    if trainer.is_world_process_zero():
        clean(args.output_dir)
        if not resume:  # all is well so far: now the earlier run may go
            start_anew(args.output_dir)
        write_json(Path(args.output_dir) / RECORD, record)
    bad_samples.open(Path(args.output_dir, NAME), trainer.is_world_process_zero(), go_on=bool(resume))
    trainer.accelerator.wait_for_everyone()  # no other may look for checkpoints before
    # The bar, log.jsonl and warnings; and curves.png, however it ends.
    with watch(trainer, contrasts=options.loss == "clip") as progress:
        trainer.train(resume)
    trainer.save_model()  # with config.json: a folder for miniclip.load
    if eval_records:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            print(format_table({name.removeprefix("eval_"): value for name, value in metrics.items()}))
    trainer.save_state()
    progress.summary()
    if trainer.is_world_process_zero() and len(bad_samples):
        print(f"bad samples were left out {len(bad_samples)} times: {bad_samples.path}")
    trainer.accelerator.wait_for_everyone()
    if held:
        held.close()
    trainer.accelerator.end_training()  # threads of a process group that is left open can abort the process at its exit


if __name__ == "__main__":
    run(main)
