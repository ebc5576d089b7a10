"""Options of `train.py`, beside the Hugging Face training arguments. `--help` reads them without importing torch."""

import re
from dataclasses import dataclass, fields
from typing import ClassVar

from miniclip.training import losses
from miniclip.utils.command_line import HELP, option
from miniclip.utils.errors import InputError
from miniclip.utils.remote import is_remote


@dataclass
class TrainOptions:
    """Trains or fine-tunes a CLIP model. Writes the model, checkpoints, log.jsonl and curves.png to --output_dir.

    example:
      python train.py --model ViT-S-28-112 --train_file train.json --eval_file eval.json --output_dir runs/mine"""

    model: str | None = option(None, HELP["model"] + "; a folder's weights are loaded too")
    pretrained: str | None = option(None, HELP["pretrained"])
    train_file: str | None = option(None, HELP["eval_file"])
    eval_file: list[str] | None = option(
        None, "evaluation data, in the same forms (none or without it: see holdout); a second one is a folder of class "
        "folders, for zero-shot accuracy"
    )  # fmt: skip
    holdout: float | None = option(
        None, "without eval_file: share of the training images held out to measure (default: 0.1); 0: train on all"
    )
    image_root: list[str] | None = option(None, HELP["image_root"] + "; a second one is for eval_file")
    columns: list[str] | None = option(None, HELP["columns"])
    train_num_samples: int | None = option(None, "samples per epoch, drawn with replacement")
    train_data_upsampling_factors: str | None = option(None, "weights of several :: sources in an epoch: 1::2.5")
    streaming: bool = option(False, "read hf:NAME or .parquet from end to end; needs max_steps or train_num_samples")
    on_bad_sample: str | None = option(
        None, HELP["on_bad_sample"] + "; default: stop before training, skip during it", choices=["stop", "skip"]
    )
    allow_outside_image_root: bool = option(False, HELP["allow_outside_image_root"])
    crop_scale: float = option(0.9, "smallest fraction of the image area that a random crop keeps; 1: no cropping")
    hflip: float = option(0.0, "probability of mirroring an image; wrong for captions that say left or right")
    color_jitter: float = option(0.0, "strength of random brightness, contrast and saturation; 0.4 is common")
    freeze_image: str = option(
        "none", "freeze the image tower: all; tower: all but the projection (default for pretrained encoders); "
        "all_but_N: all but the last N blocks"
    )  # fmt: skip
    freeze_text: str = option("none", "the same for the text tower")
    tower_lr_scales: list[float] | None = option(None, "multiples of learning_rate for the image and text tower: 0.1 1")
    layer_decay: float = option(1.0, "learning rate of each layer relative to the one above; 0.7 to 0.9 are common")
    patch_dropout: list[float] | None = option(
        None, "fraction of patches to drop (default: the config's), and the last fraction of steps without it: 0.5 0.1"
    )
    early_stopping_patience: int | None = option(None, "stop after this many evaluations without better recall")
    ema: float | None = option(None, "keep an exponential moving average of the weights, with this decay: 0.999")
    feature_cache: str | None = option(None, "folder that keeps the features of frozen towers for later runs")
    loss: str = option("clip", "; ".join(map(": ".join, losses.HELP.items())))
    teacher: list[str] | None = option(None, "what distill and affinity learn from: a folder, or a config and weights")
    duplicates: str = option(
        "positive", "pairs of a batch with the same image or caption: also positives, excluded, or negatives",
        choices=["positive", "exclude", "ignore"],
    )  # fmt: skip
    fixed_logit_scale: float | None = option(None, "keep the logit scale at this value, from 1 to 100")
    overwrite_output_dir: bool = option(False, "replace an earlier run in output_dir and delete its checkpoints")

    eval_classes: ClassVar[str | None] = None  # the second eval_file; the first is in `eval_file` by itself
    given: ClassVar[frozenset[str]] = frozenset()  # names set by the command line or the recipe, also arguments
    store: ClassVar[str | None] = None  # the address of output_dir, if it is on a store
    note: ClassVar[str] = ""  # of `parse_train`, about a model that it chose
    check_gradients: ClassVar[bool] = False  # set by `parse_train`: it checks a run, and is no option of one

    def __post_init__(self):
        for f in fields(self):
            if getattr(self, f.name) == "all_but_0":
                setattr(self, f.name, "tower")
        if isinstance(self.eval_file, list) and len(self.eval_file) < 3:
            first, self.eval_classes = (*self.eval_file, None)[:2]
            self.eval_file = None if first == "none" else first
        for problem in self.problems():
            raise InputError(problem)

    @property
    def frozen(self) -> tuple[bool, bool]:
        """Whether the image and the text tower are frozen as wholes, at least up to their projections."""
        return self.freeze_image in ("tower", "all"), self.freeze_text in ("tower", "all")

    def problems(self):
        """Yields what is wrong with the options and what to do about it."""
        for f in fields(self):
            value = getattr(self, f.name)
            allowed, test = RANGES.get(f.name, (None, None))
            if value is not None and test and not test(value):
                yield f"{f.name} is {value}. It must be {allowed}"
        frozen = "frozen (pretrained encoders are, unless you add --freeze_image none --freeze_text none)"
        for name in ("hflip", "color_jitter", "patch_dropout"):
            if self.frozen[0] and getattr(self, name):
                yield f"{name} has no effect: the image tower is {frozen} and sees each image once, as it is. Remove it"
        if self.streaming and any(self.frozen):
            yield f"streaming needs towers that learn, but one is {frozen}; its features are computed before training"
        if self.streaming and self.train_data_upsampling_factors:
            yield "train_data_upsampling_factors weight several sources, but streaming reads one. Remove one of them"
        if self.streaming and re.search(r"\[:\d+\]$", self.train_file or ""):
            yield f"train_file {self.train_file}: [:N] does not work with streaming. Use max_steps"
        if is_remote(self.feature_cache):
            yield f"feature_cache {self.feature_cache} is an address. Give a folder on this machine"
        if self.feature_cache and not any(self.frozen) and "none" in (self.freeze_image, self.freeze_text):
            yield "feature_cache stores features of frozen towers, but both learn. Add --freeze_image or --freeze_text"
        for tower, scale in zip(("image", "text"), self.tower_lr_scales or ()):
            if getattr(self, f"freeze_{tower}") == "all" and scale != 1:
                yield f"tower_lr_scales has no effect on the {tower} tower, which is frozen. Set its scale to 1"
        if (self.loss in losses.NEED_TEACHER) != (self.teacher is not None):
            yield f"the losses {' and '.join(sorted(losses.NEED_TEACHER))} need a teacher; the others do not use one"
        if self.teacher and any(self.frozen):
            yield f"a teacher needs images and captions, but a tower is {frozen} and only its features are kept"
        late = self.loss == "late_interaction"
        if late and (self.freeze_image, self.freeze_text) != ("all", "all"):
            yield "late_interaction is trained on a model that stays as it is. Remove freeze_image and freeze_text"
        if late and self.duplicates != "positive":
            yield "late_interaction counts duplicates as positives. Remove duplicates"
        if self.loss == "superclip" and self.frozen[1]:
            yield f"the superclip loss needs captions, but the text tower is {frozen} and only its features are kept"
        if self.loss == "affinity" and self.duplicates != "positive":
            yield "duplicates has no effect with the affinity loss, which has only the teacher's scores. Remove it"
        if self.holdout and self.eval_file:
            yield "holdout has no effect with eval_file, which has images of its own. Remove one of them"
        if self.holdout and self.streaming:
            yield "holdout cannot be drawn from a stream, which is read once. Use --eval_file"
        measured = self.eval_file or self.eval_classes
        if self.early_stopping_patience and not measured and (self.streaming or self.holdout == 0):
            yield "early_stopping_patience needs recall to watch. Add --eval_file"
        if len(self.image_root or ()) == 2 and not self.eval_file:
            yield "the second folder of image_root is for eval_file. Add --eval_file or remove the folder"


_FRACTION = "from 0 to 1", lambda x: 0 <= x <= 1
_SHARE = "above 0 and at most 1", lambda x: 0 < x <= 1
_COUNT = "1 or more", lambda x: x > 0
_FREEZE = "none, tower, all or all_but_N", re.compile(r"none|tower|all|all_but_\d+").fullmatch
RANGES = {  # the values that are allowed, as words and as a test
    "loss": (", ".join(losses.LOSSES) + ", or coca:2:1 with two weights",
             lambda x: x in losses.LOSSES or re.fullmatch(r"coca(:\d+(\.\d+)?){2}", x)),
    "image_root": ("one folder, or one for train_file and one for eval_file", lambda x: len(x) < 3),
    "eval_file": ("one data set, and perhaps a folder of class folders", lambda x: isinstance(x, str) or len(x) < 3),
    "columns": ("two names: the image column and the caption column", lambda x: len(x) == 2),
    "train_num_samples": _COUNT, "early_stopping_patience": _COUNT, "crop_scale": _SHARE, "layer_decay": _SHARE,
    "hflip": _FRACTION, "color_jitter": _FRACTION, "freeze_image": _FREEZE, "freeze_text": _FREEZE,
    "tower_lr_scales": ("two numbers above 0 (0 is freeze_image or freeze_text)", lambda x: len(x) == 2 and min(x) > 0),
    "patch_dropout": ("a fraction below 1 and, if it is above 0, the last fraction of the steps without it",
                      lambda x: len(x) < 3 and 0 <= x[0] < 1 and (len(x) == 1 or x[0] and 0 <= x[1] <= 1)),
    "ema": ("at least 0 and below 1", lambda x: 0 <= x < 1), "holdout": ("from 0 to 0.9", lambda x: 0 <= x <= 0.9),
    "teacher": ("a folder, or a config and its weights", lambda x: len(x) < 3),
    "fixed_logit_scale": ("from 1 to 100", lambda x: 1 <= x <= 100),
}  # fmt: skip
