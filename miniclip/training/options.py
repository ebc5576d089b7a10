"""Options of `train.py`, beside the Hugging Face training arguments.

Each option is a field with its help text. Nothing here imports torch or transformers, so that `--help` is fast.
"""

import re
from dataclasses import dataclass, fields

from miniclip.training import losses
from miniclip.training.losses import LOSSES
from miniclip.utils.command_line import HELP, option
from miniclip.utils.errors import InputError

FREEZE = (
    "none; tower: all but the projection (default for pretrained encoders); all; all_but_N: all but the last N blocks"
)


@dataclass
class TrainOptions:
    """Trains or fine-tunes a CLIP model. Writes the model, checkpoints, log.jsonl and curves.png to --output_dir.

    example:
      python train.py --model ViT-S-28-112 --train_file train.json --eval_file eval.json --output_dir runs/mine
    """

    model: str | None = option(None, HELP["model"] + "; a folder's weights are loaded too")
    pretrained: str | None = option(None, HELP["pretrained"])
    train_file: str | None = option(None, HELP["eval_file"])
    eval_file: str | None = option(None, "evaluation data, in the same forms; without it nothing is measured")
    image_root: list[str] | None = option(None, HELP["image_root"] + "; a second one is for eval_file")
    columns: list[str] | None = option(None, HELP["columns"])
    train_num_samples: int | None = option(None, "samples per epoch, drawn with replacement")
    train_data_upsampling_factors: str | None = option(None, "weights of several :: sources in an epoch: 1::2.5")
    streaming: bool = option(False, "read hf:NAME or .parquet from end to end; needs max_steps or train_num_samples")
    on_bad_sample: str | None = option(
        None,
        HELP["on_bad_sample"] + "; by default, stop for those found before training and skip those found during it",
        choices=["stop", "skip"],
    )
    allow_outside_image_root: bool = option(False, HELP["allow_outside_image_root"])
    crop_scale: float = option(0.9, "smallest fraction of the image area that a random crop keeps; 1: no cropping")
    hflip: float = option(0.0, "probability of mirroring an image; wrong for captions that say left or right")
    color_jitter: float = option(0.0, "strength of random brightness, contrast and saturation; 0.4 is common")
    freeze_image: str = option("none", f"freeze the image tower: {FREEZE}")
    freeze_text: str = option("none", "the same for the text tower")
    tower_lr_scales: list[float] | None = option(None, "multiples of learning_rate for the image and text tower: 0.1 1")
    layer_decay: float = option(1.0, "learning rate of each layer relative to the one above; 0.7 to 0.9 are common")
    patch_dropout: list[float] | None = option(
        None,
        "fraction of patches to drop (default: the config's), and the last fraction of the steps without it: 0.5 0.1",
    )
    early_stopping_patience: int | None = option(None, "stop after this many evaluations without better recall")
    ema: float | None = option(None, "keep an exponential moving average of the weights, with this decay: 0.999")
    feature_cache: str | None = option(None, "folder that keeps the features of frozen towers for later runs")
    loss: str = option(
        "clip",
        "; ".join(f"{name}: {text}" for name, text in losses.HELP.items()),
        choices=LOSSES,
    )
    teacher: list[str] | None = option(None, "what distill and affinity learn from: a folder, or a config and weights")
    duplicates: str = option(
        "positive",
        "pairs of a batch with the same image or caption: also positives, excluded, or negatives like any other",
        choices=["positive", "exclude", "ignore"],
    )
    fixed_logit_scale: float | None = option(None, "keep the logit scale at this value, from 1 to 100")
    resume: bool = option(False, "resume from the newest complete checkpoint in output_dir, if there is one")
    overwrite_output_dir: bool = option(False, "replace an earlier run in output_dir and delete its checkpoints")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if "list" in str(f.type) and value is not None and not isinstance(value, list):  # one value in a recipe
                setattr(self, f.name, [value])
            if value == "all_but_0":
                setattr(self, f.name, "tower")
        for problem in self.problems():
            raise InputError(problem)

    @property
    def frozen(self) -> tuple[str, str]:
        """How the image and the text tower are frozen as wholes: "none", "tower" or "all"."""
        return tuple(how if how in ("tower", "all") else "none" for how in (self.freeze_image, self.freeze_text))

    @property
    def learning_blocks(self) -> tuple[int | None, int | None]:
        """The number of last blocks that learn in each tower with all_but_N, otherwise None."""
        freeze = self.freeze_image, self.freeze_text
        return tuple(int(how[8:]) if how.startswith("all_but_") else None for how in freeze)

    def problems(self):
        """Yields what is wrong with the options and what to do about it."""
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value is not None and value not in choices:
                yield f"{f.name} {value!r} is not one of {', '.join(choices)}"
            allowed, test = RANGES.get(f.name, (None, None))
            if value is not None and test and not test(value):
                yield f"{f.name} is {value}. It must be {allowed}"
        image, text = self.frozen
        frozen = (
            "frozen (pretrained encoders are, by default; to train them, add --freeze_image none --freeze_text none)"
        )
        for name in ("hflip", "color_jitter", "patch_dropout"):
            if image != "none" and getattr(self, name):
                yield f"{name} has no effect: the image tower is {frozen} and sees each image once, as it is. Remove it"
        if self.streaming and (image, text) != ("none", "none"):
            yield f"streaming needs towers that learn, but one is {frozen}; its features are computed before training"
        if self.streaming and self.train_data_upsampling_factors:
            yield "train_data_upsampling_factors weight several sources, but streaming reads one. Remove one of them"
        if self.streaming and re.search(r"\[:\d+\]$", self.train_file or ""):
            yield f"train_file {self.train_file}: [:N] does not work with streaming. Use max_steps"
        if self.feature_cache and (image, text) == ("none", "none"):
            yield "feature_cache stores features of frozen towers, but both learn. Add --freeze_image or --freeze_text"
        for tower, how, scale in zip(("image", "text"), (image, text), self.tower_lr_scales or ()):
            if how == "all" and scale != 1:
                yield f"tower_lr_scales has no effect on the {tower} tower, which is frozen. Set its scale to 1"
        if (self.loss in ("distill", "affinity")) != (self.teacher is not None):
            yield "the losses distill and affinity need a teacher, and the others have no use for one"
        if self.teacher and (image, text) != ("none", "none"):
            yield f"a teacher needs images and captions, but a tower is {frozen} and only its features are kept"
        if self.loss == "affinity" and self.duplicates != "positive":
            yield "duplicates has no effect with the affinity loss, which has only the teacher's scores. Remove it"
        if self.early_stopping_patience and not self.eval_file:
            yield "early_stopping_patience needs recall to watch. Add --eval_file"
        if self.resume and self.overwrite_output_dir:
            yield "resume continues the run that overwrite_output_dir deletes. Remove one of them"
        if len(self.image_root or ()) == 2 and not self.eval_file:
            yield "the second folder of image_root is for eval_file. Add --eval_file or remove the folder"


_FREEZE = "none, tower, all or all_but_N", re.compile(r"none|tower|all|all_but_\d+").fullmatch
RANGES = {  # the values that are allowed, as words and as a test
    "image_root": ("one folder, or one for train_file and one for eval_file", lambda x: len(x) < 3),
    "columns": ("two names: the image column and the caption column", lambda x: len(x) == 2),
    "train_num_samples": ("1 or more", lambda x: x > 0),
    "crop_scale": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "hflip": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "color_jitter": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "freeze_image": _FREEZE,
    "freeze_text": _FREEZE,
    "tower_lr_scales": (
        "two numbers above 0 (freeze_image and freeze_text freeze)",
        lambda x: len(x) == 2 and min(x) > 0,
    ),
    "layer_decay": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "patch_dropout": (
        "a fraction below 1 and, if it is above 0, the last fraction of the steps without it",
        lambda x: len(x) < 3 and 0 <= x[0] < 1 and (len(x) == 1 or x[0] and 0 <= x[1] <= 1),
    ),
    "early_stopping_patience": ("1 or more", lambda x: x > 0),
    "ema": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "teacher": ("a folder, or a config and its weights", lambda x: len(x) < 3),
    "fixed_logit_scale": ("from 1 to 100", lambda x: 1 <= x <= 100),
}
