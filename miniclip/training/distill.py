"""Distillation: a small model learns to score the pairs of a batch as a larger one does."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.inference.load import load
from miniclip.loss import gather
from miniclip.model import ClipOutput, MiniClip
from miniclip.training.losses import clip
from miniclip.utils.errors import InputError
from miniclip.weights.pretrained import is_folder

CHUNK = 256  # pairs that the teacher embeds at once


def affinity_loss(student: ClipOutput, teacher: ClipOutput) -> Tensor:
    """Affinity mimicking (Wu et al., TinyCLIP, ICCV 2023, equations 2 and 3), the same as OpenCLIP's distillation loss:
    the cross-entropy from the teacher's softmax over a row of logits to the student's, in nats, averaged over both
    directions. Embeddings are (B, E), of unit length; E may differ. Across processes as `clip_loss`."""
    with torch.autocast(student.image_embeds.device.type, enabled=False):
        losses = []
        for rows, columns in ((0, 1), (1, 0)):
            both = [(m.logit_scale.float(), m[rows].float(), gather(m[columns].float())) for m in (student, teacher)]
            logits, wanted = (scale * ours @ theirs.T for scale, ours, theirs in both)
            losses.append(F.cross_entropy(logits, wanted.softmax(dim=1)))
        return sum(losses) / 2


class Distillation:
    """A loss: the student learns to score a batch as `teacher` does, a MiniClip that is frozen here and sees the
    student's images, resized to its own size. It is added to `contrast` (OpenCLIP's `--distill-model`), or is all there
    is (TinyCLIP). Raises InputError for a teacher that cannot read the student's tokens."""

    def __init__(self, teacher: MiniClip, preprocess, student: MiniClip, contrast: Callable | None = None, bf16=False):
        theirs, ours = teacher.config.text_cfg, student.config.text_cfg
        readers = teacher.text.tokenizer, student.text.tokenizer
        words = [(type(reader), reader.vocabulary(), reader.pad_token_id) for reader in readers]
        same = theirs.vocab_size == ours.vocab_size and words[0] == words[1]
        if not same or theirs.context_length < ours.context_length:
            reads = f"reads {theirs.context_length} tokens from a vocabulary of {theirs.vocab_size}"
            wanted = f"the student {ours.context_length} from {ours.vocab_size}"
            raise InputError(f"the teacher {reads}, {wanted}. Use a teacher with the student's tokenizer")
        self.teacher = teacher.float().eval().requires_grad_(False)
        self.preprocess, self.contrast = preprocess, contrast
        self.precision = "bf16" if bf16 else "fp32"

    def __call__(self, outputs: ClipOutput, batch: dict[str, Tensor]) -> Tensor:
        loss = affinity_loss(outputs, self.embed(batch["pixel_values"], batch["input_ids"]))
        return loss + self.contrast(outputs, batch) if self.contrast else loss

    @torch.no_grad()
    def embed(self, pixel_values: Tensor, input_ids: Tensor) -> ClipOutput:
        """The teacher's outputs for uint8 pixels (B, 3, S, S) and token ids (B, L)."""
        if not isinstance(self.teacher, InferenceClip):  # not before: its weights are laid out for a device
            self.teacher = inference_copy(self.teacher.to(pixel_values.device), self.precision)
        size = (self.preprocess.cfg.size,) * 2
        images, texts = [], []
        for levels, ids in zip(pixel_values.split(CHUNK), input_ids.split(CHUNK)):
            if levels.shape[2:] != size:
                levels = F.interpolate(levels.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
            images.append(self.teacher.encode_image(self.preprocess.normalize(levels), normalize=True))
            texts.append(self.teacher.encode_text(ids, normalize=True))
        return ClipOutput(torch.cat(images), torch.cat(texts), self.teacher.logit_scale.exp())


def distill(model: MiniClip, options, args) -> Distillation:
    """CLIP's loss plus the teacher's scores."""
    return affinity(model, options, args, clip(model, options, args))


def affinity(model: MiniClip, options, args, contrast: Callable | None = None) -> Distillation:
    """The teacher's scores alone, unless there is a contrastive loss to add."""
    name, *weights = options.teacher
    if not weights and not is_folder(name):
        raise InputError(f"the teacher {name} has no weights. Name a folder, or add them: --teacher {name} WEIGHTS")
    teacher, preprocess, _ = load(name, *weights)
    return Distillation(teacher, preprocess, model, contrast, args.bf16)
