"""What train.py sets up from its options: the data, the model and the transform of its images."""

import logging
import math
import random
import warnings
from dataclasses import replace

from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from miniclip.datasets.read import describe, read_source
from miniclip.datasets.records import ReadOptions, one_per_image
from miniclip.datasets.text_files import ColumnError
from miniclip.inference import matmul
from miniclip.inference.fast import InferenceClip
from miniclip.inference.load import load
from miniclip.training.augment import TrainTransform
from miniclip.training.closed_form import may_start_in_closed_form
from miniclip.training.dataset import RunDataset
from miniclip.training.holdout import epoch_length, fit_batch, hold_out
from miniclip.training.streaming import StreamDataset
from miniclip.utils.bad_samples import BadSamples, CaptionFileError
from miniclip.utils.errors import InputError
from miniclip.weights.pretrained import is_folder


def read_data(options, args, bad_samples: BadSamples):
    """Reads both caption files: training records (None for a stream), evaluation records or None, and the dataset class
    for the former. Without an evaluation file a share of the training images is held out. Lowers a batch that was not
    asked for to the number of images. Raises CaptionFileError with all that is wrong with either."""
    for name in ("model", "train_file"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is missing (see --help)")
    records, eval_records = None, None
    make_dataset = RunDataset
    problems = []
    roots = options.image_root or [None]
    check = {"check_images": not options.check_gradients}  # that is for one step
    reading = ReadOptions.from_args(options, image_root=roots[0], bad_samples=bad_samples, **check)
    try:
        if options.streaming:
            num_samples = options.train_num_samples
            make_dataset = StreamDataset.opened(options.train_file, args, reading, num_samples=num_samples)
        else:  # a frozen tower and the closed form see all images at once, before the first step
            checked = replace(reading, check_handles=options.frozen[0] or may_start_in_closed_form(options))
            drawn = {"factors": options.train_data_upsampling_factors, "num_samples": options.train_num_samples}
            records = read_source(options.train_file, checked, **drawn)
    except InputError as error:
        problems.append(str(error))
    try:
        if options.eval_file:
            reading = replace(reading, image_root=roots[-1], check_handles=True)
            try:
                eval_records = read_source(options.eval_file, reading)
            except ColumnError as error:  # it may be in another format than the training data
                logging.warning("%s: its columns are guessed", error)
                reading = replace(reading, image_column=None, caption_column=None)
                eval_records = read_source(options.eval_file, reading)
            eval_records = one_per_image(eval_records, options.eval_file)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise CaptionFileError("\n".join(problems))
    lines = []
    if not options.eval_file and not options.streaming and options.holdout != 0:
        records, eval_records, line = hold_out(records, options.holdout, args.seed, options.train_file)
        lines.append(line)
        measured = eval_records or options.eval_classes
        if not measured and args.load_best_model_at_end:
            raise InputError(f"the best model cannot be found: {line}")
        if not measured and "eval_strategy" not in options.given:
            args.eval_strategy = IntervalStrategy.NO  # it was on because there should have been something to measure
    if (number := options.train_num_samples if options.streaming else records and epoch_length(records)) is not None:
        lines.append(fit_batch(args, number, "per_device_train_batch_size" in options.given))
    if args.process_index == 0:
        print(*filter(None, lines), sep="\n", end="\n" * any(lines), flush=True)
    if options.check_gradients and any(options.frozen):  # all of their features would be computed
        n = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        records = random.Random(args.seed).sample(list(records), min(n, len(records)))
    return records, eval_records, make_dataset


def load_model(options, args, records):
    """Loads the model to train, its preprocessing and its tokenizer, and prints a line about them and the data."""
    set_seed(args.seed)  # for random weights, and all that is drawn afterwards
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*random weights")  # they may be what is wanted; the line below says so
        model, preprocess, tokenizer = load(options.model, options.pretrained)
    if isinstance(model, InferenceClip):
        raise InputError(f"{options.model}: an export to ONNX cannot be trained: name the model it was made from")
    if options.fixed_logit_scale is not None:
        model.logit_scale.data.fill_(math.log(options.fixed_logit_scale))
        model.logit_scale.requires_grad_(False)
    if args.process_index == 0:
        if options.note:
            print(options.note)
        given = options.pretrained or is_folder(options.model)
        encoders = model.config.vision_cfg.pretrained or model.config.text_cfg.pretrained
        start = "" if given else ", from pretrained encoders" if encoders else ", from scratch"
        data = f"a stream of {options.train_file}" if options.streaming else describe(records, tokenizer)
        print(f"{options.model}{start}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters; {data}")
        if args.fast:
            print(matmul.describe(args.device))
    return model, preprocess, tokenizer


def make_transform(options, model) -> TrainTransform:
    """The random crops, flips and colours of training images."""
    jitter = options.color_jitter
    color_jitter = (jitter, jitter, jitter, 0.0) if jitter else None
    return TrainTransform(model.config.preprocess_cfg, (options.crop_scale, 1.0), options.hflip, color_jitter)
