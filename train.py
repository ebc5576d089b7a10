"""Trains or fine-tunes a CLIP model: `python train.py recipe.json`, or `python train.py --help`."""

from miniclip.training.parse import parse_train
from miniclip.utils.command_line import run, starting


def main(argv: list[str]):
    options, args = parse_train(argv)

    with starting():
        from miniclip.classify.evaluator import make_evaluator
        from miniclip.inference.matmul import arithmetic
        from miniclip.reports.html_page import format_table
        from miniclip.run.folder import Run
        from miniclip.run.metadata import training_metadata
        from miniclip.training.finetune import fine_tuning
        from miniclip.training.freeze import freeze_towers
        from miniclip.training.losses import make_loss
        from miniclip.training.setup import load_model, make_transform, read_data
        from miniclip.training.trainer import RunTrainer

    with Run(options, args) as run:
        train, held_out, dataset_class = read_data(options, args, run.bad_samples)
        run.hold()

        # The model, and what of it learns by which loss
        model, preprocess, tokenizer = load_model(options, args, train)
        loss = make_loss(model, options, args)
        dataset_class, caches = freeze_towers(model, options, args, train, preprocess, tokenizer, dataset_class)
        callbacks, extras = fine_tuning(model, options, args)

        transform = make_transform(options, model)
        dataset = dataset_class(train, preprocess, args.seed, transform, options.on_bad_sample, run.bad_samples)
        precision = min((c.precision for c in caches if c is not None), default="bf16" if args.bf16 else "fp32")
        evaluator = make_evaluator(
            held_out, options.eval_classes, preprocess, tokenizer, precision=precision, caches=caches,
            batch_size=args.per_device_eval_batch_size, num_workers=args.dataloader_num_workers or None,
            bad={"on_bad_sample": options.on_bad_sample or "stop", "bad_samples": run.bad_samples},
        )  # fmt: skip
        metadata = training_metadata(argv, options, args, model, train, held_out, arithmetic(args.device))
        trainer = RunTrainer(
            model, args, dataset, preprocess=preprocess, tokenizer=tokenizer, loss=loss, evaluator=evaluator,
            callbacks=callbacks, run_metadata=metadata, **extras,
        )  # fmt: skip

        # Train, save, measure
        if options.check_gradients:
            return trainer.check_gradients()
        trainer.train(run.start(trainer))
        trainer.save_model()  # with config.json: a folder for miniclip.load
        metrics = trainer.evaluate() if evaluator else {}
        if metrics and trainer.is_world_process_zero():
            print(format_table({name.removeprefix("eval_"): value for name, value in metrics.items()}))
        run.finish(trainer)


if __name__ == "__main__":
    run(main)
