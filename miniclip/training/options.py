"""What can be asked of `train.py` and `evaluate.py`?

Each option is a field with its help beside it. Nothing here imports torch or transformers, which take seconds: so
`--help` answers at once.
"""

from dataclasses import dataclass

from miniclip.utils.command_line import option
from miniclip.utils.errors import InputError


@dataclass
class TrainOptions:
    """What `train.py` takes besides the Hugging Face training arguments."""

    model_config: str | None = option(
        None, "a name from model_configs/, a config .json, or a folder saved by MiniCLIP (whose weights are taken too)"
    )
    pretrained: str | None = option(None, "weights to start from: OpenCLIP, OpenAI, TinyCLIP, Hugging Face, MiniCLIP")
    train_file: str | None = option(
        None,
        "captions: .json, .jsonl, .csv, .tsv, shards/{000..123}.tar, a folder of images with texts, hf:NAME[:SPLIT], "
        ".parquet; several with :: (docs/datasets.md)",
    )
    eval_file: str | None = option(None, "the same for evaluation; without it nothing is measured")
    image_root: str | None = option(None, "folder that image paths start from; the caption file's own unless given")
    eval_image_root: str | None = option(None, "the same for eval_file, where it is another one")
    image_column: str | None = option(
        None, "column of the images where it is not to be guessed (OpenCLIP: --csv-img-key); the separator is found"
    )
    caption_column: str | None = option(None, "the same for the captions (OpenCLIP: --csv-caption-key)")
    max_train_samples: int | None = option(None, "only the first so many records of train_file")
    train_num_samples: int | None = option(None, "samples that make an epoch, drawn with replacement")
    train_data_upsampling_factors: str | None = option(
        None, "how often each of the :: sources comes in an epoch: 1::2.5; with train_num_samples, how likely"
    )
    streaming: bool = option(False, "read hf:NAME or .parquet from end to end; needs max_steps or train_num_samples")
    on_bad_sample: str | None = option(
        None,
        "bad records and images: stop, or skip and list them in bad_samples.jsonl; unless given, stop for those found "
        "before training, skip those met in it",
        choices=["stop", "skip"],
    )
    allow_outside_image_root: bool = option(False, "image paths may lead out of their folder: .., absolute ones, links")
    crop_scale: float = option(0.9, "smallest share of the image's area that a random crop keeps; 1: no cropping")
    hflip: float = option(0.0, "probability of a mirrored image; wrong for captions that say left or right")
    color_jitter: float = option(0.0, "strength of random brightness, contrast and saturation; 0.4 is common")
    lock_image: str = option(
        "none",
        "keep the image tower as it is, all of it or but for its projection, which is the default for an encoder "
        "named by hf_model_name",
        choices=["none", "tower", "all"],
    )
    lock_text: str = option("none", "the same for the text tower", choices=["none", "tower", "all"])
    unlock_image_blocks: int | None = option(
        None, "only the last so many blocks of the image tower learn, and its projection; 0 is lock_image tower"
    )
    unlock_text_blocks: int | None = option(None, "the same for the text tower")
    image_lr_scale: float = option(1.0, "the image tower's learning rate, as a multiple of learning_rate")
    text_lr_scale: float = option(1.0, "the text tower's")
    layer_decay: float = option(1.0, "factor of the learning rate from a layer to the one below; 0.7 to 0.9 are common")
    patch_dropout: float | None = option(None, "share of patches hidden in this training; the config's unless given")
    patch_dropout_off: float = option(0.0, "last share of the training's steps that hide no patches; 0.1, say")
    early_stopping_patience: int | None = option(
        None, "stop after so many evaluations that bring no better recall; the best model is kept"
    )
    ema: float | None = option(None, "average the weights over the steps, with this decay, and keep that; 0.999, say")
    feature_cache: str | None = option(None, "folder for what locked towers give, to be used again by later runs")
    loss: str = option(
        "clip",
        "symmetric InfoNCE; SigLIP's sigmoid loss; InfoNCE and a teacher's scores; a teacher's scores alone (TinyCLIP)",
        choices=["clip", "siglip", "distill", "affinity"],
    )
    teacher: str | None = option(None, "the model that distill and affinity learn from: as --model_config")
    teacher_pretrained: str | None = option(None, "its weights, where --teacher is a config")
    twins: str = option(
        "positive",
        "pairs of a batch with the same image or caption: right answers too, left out, or wrong answers as elsewhere",
        choices=["positive", "exclude", "ignore"],
    )
    avoid_twins: bool = option(False, "draw batches in which no image and no caption occurs twice")
    fixed_logit_scale: float | None = option(None, "keep the logit scale at this value instead of learning it")
    resume: bool = option(False, "go on from the newest complete checkpoint in output_dir; from the start without one")
    overwrite_output_dir: bool = option(False, "replace an earlier run in output_dir, and delete its checkpoints")

    def __post_init__(self):
        for tower in ("image", "text"):
            lock, blocks = getattr(self, f"lock_{tower}"), getattr(self, f"unlock_{tower}_blocks")
            if blocks is not None and (blocks < 0 or lock != "none") and (lock, blocks) != ("tower", 0):
                raise InputError(f"unlock_{tower}_blocks {blocks} and lock_{tower} {lock} do not go together: {self}")
            if blocks == 0:
                setattr(self, f"lock_{tower}", "tower")
        for fits, problem in (
            (self.on_bad_sample in (None, "stop", "skip"), "on_bad_sample must be stop or skip"),
            (0 < self.crop_scale <= 1, "crop_scale must lie above 0 and not above 1"),
            (0 <= self.hflip <= 1, "hflip must lie in 0 to 1"),
            (0 <= self.color_jitter <= 1, "color_jitter must lie in 0 to 1"),
            (self.loss in ("clip", "siglip", "distill", "affinity"), "loss must be clip, siglip, distill or affinity"),
            (self.twins in ("positive", "exclude", "ignore"), "twins must be positive, exclude or ignore"),
            (
                self.teacher is not None or self.teacher_pretrained is None,
                "teacher_pretrained has the weights of a teacher: add teacher",
            ),
            (
                self.loss != "affinity" or self.twins == "positive",
                "twins: affinity has no right answers but the teacher's scores, in which twins are what they are",
            ),
            (
                (self.loss in ("distill", "affinity")) == (self.teacher is not None),
                "teacher goes with the losses distill and affinity, which need one",
            ),
            (
                self.teacher is None or self.lock_image == self.lock_text == "none",
                "a teacher has to see pictures and captions, and in the place of a locked tower's come its features",
            ),
            (self.lock_image in ("none", "tower", "all"), "lock_image must be none, tower or all"),
            (self.lock_text in ("none", "tower", "all"), "lock_text must be none, tower or all"),
            (
                self.lock_image == "none" or not (self.hflip or self.color_jitter),
                "hflip and color_jitter make other pictures every epoch; those of a locked image tower, as one that is"
                " pretrained is unless you say --lock_image none, are seen once",
            ),
            (
                self.feature_cache is None or self.lock_image != "none" or self.lock_text != "none",
                "feature_cache keeps what a locked tower gives: add lock_image or lock_text",
            ),
            (self.image_lr_scale > 0, "image_lr_scale must be above 0; lock_image keeps the tower as it is"),
            (self.text_lr_scale > 0, "text_lr_scale must be above 0; lock_text keeps the tower as it is"),
            (self.lock_image != "all" or self.image_lr_scale == 1, "image_lr_scale: all of the image tower is locked"),
            (self.lock_text != "all" or self.text_lr_scale == 1, "text_lr_scale: all of the text tower is locked"),
            (0 < self.layer_decay <= 1, "layer_decay must lie above 0 and not above 1"),
            (self.patch_dropout is None or 0 <= self.patch_dropout < 1, "patch_dropout must lie in 0 to 1, without 1"),
            (0 <= self.patch_dropout_off <= 1, "patch_dropout_off must lie in 0 to 1"),
            (
                self.lock_image == "none" or not (self.patch_dropout or self.patch_dropout_off),
                "patch_dropout and patch_dropout_off: a locked image tower sees whole pictures, once",
            ),
            (
                self.early_stopping_patience is None or self.early_stopping_patience > 0,
                "early_stopping_patience must be 1 or more",
            ),
            (
                self.early_stopping_patience is None or self.eval_file is not None,
                "early_stopping_patience watches recall: add eval_file",
            ),
            (self.ema is None or 0 <= self.ema < 1, "ema must lie in 0 to 1, without 1"),
            (self.train_num_samples is None or self.train_num_samples > 0, "train_num_samples must be at least 1"),
            (self.max_train_samples is None or self.max_train_samples > 0, "max_train_samples must be at least 1"),
            (not (self.streaming and self.max_train_samples), "max_train_samples is not for streams: say max_steps"),
            (
                not self.streaming or self.lock_image == self.lock_text == "none",
                "a locked tower, as a pretrained one is unless you say --lock_image none --lock_text none, sees all"
                " data before the first step, which a stream never ends: leave out streaming",
            ),
            (
                not (self.streaming and self.avoid_twins),
                "avoid_twins orders the whole set, of which a stream shows a little at a time: leave out one of them",
            ),
            (
                not (self.streaming and self.train_data_upsampling_factors),
                "train_data_upsampling_factors are for several sources, streaming is for one",
            ),
            (self.fixed_logit_scale is None or 1 <= self.fixed_logit_scale <= 100, "fixed_logit_scale: only 1 to 100"),
        ):
            if not fits:
                raise InputError(f"{problem}: {self}")
