"""A MiniClip behind the calls, results and weight names of OpenCLIP's and OpenAI's models."""

import copy
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.checkpoint import rename, to_miniclip
from miniclip.config import TextConfig
from miniclip.model import MiniClip, TextTransformer, Tower, VisionTransformer
from miniclip.towers.huggingface import HfTextTower
from miniclip.towers.intermediates import forward_intermediates
from miniclip.towers.siglip import SigLipVisionTransformer
from miniclip.towers.timm_model import TimmTower
from miniclip.training.freeze import freeze
from miniclip.utils.errors import CheckpointError, InputError

AS_IS = "fp32", "amp", "amp_bf16", "amp_bfloat16"  # in fp32; with amp the caller's autocast decides
LOW = {"fp16": torch.float16, "bf16": torch.bfloat16, "pure_fp16": torch.float16, "pure_bf16": torch.bfloat16}


class CLIP(nn.Module):
    """OpenCLIP's model. `miniclip` is the model inside, for all that MiniCLIP does: saving, training, search.

    `state_dict` has OpenCLIP's names (those of its CustomTextCLIP with `custom_text` or a text tower from elsewhere);
    `load_state_dict` takes those of any layout that `miniclip.checkpoint` knows."""

    def __init__(self, model: MiniClip, output_dict: bool = False, custom_text: bool = False):
        super().__init__()
        self.miniclip, self.output_dict = model, output_dict
        self.layout = "openclip" if isinstance(model.config.text_cfg, TextConfig) and not custom_text else "custom_text"
        for tower in (model.visual, model.text):
            if type(tower) in (VisionTransformer, TextTransformer):  # stored as OpenCLIP does: no copy to rename it
                tower.projection.weight.data = tower.projection.weight.data.mT.contiguous().mT
        self.visual.output_dim, self.visual.preprocess_cfg = model.config.embed_dim, self.config["preprocess_cfg"]
        self.visual.image_mean, self.visual.image_std = (self.visual.preprocess_cfg[name] for name in ("mean", "std"))
        self.register_state_dict_post_hook(_to_openclip)
        self.register_load_state_dict_pre_hook(_from_any)

    visual = property(lambda self: self.miniclip.visual)
    text = property(lambda self: self.miniclip.text)
    logit_scale = property(lambda self: self.miniclip.logit_scale)
    logit_bias = property(lambda self: self.miniclip.logit_bias)
    context_length = property(lambda self: self.text.tokenizer.context_length)
    vocab_size = property(lambda self: self.config["text_cfg"]["vocab_size"])
    config = property(lambda self: self.miniclip.config.to_dict(), doc="plain values, which every torch.load takes")
    dtype = property(lambda self: next(self.visual.parameters()).dtype)
    token_embedding = property(lambda self: self.text.token_embedding)
    positional_embedding = property(lambda self: self.text.positional_embedding)
    ln_final = property(lambda self: self.text.ln_final)
    text_projection = property(lambda self: self.text.text_projection.weight.mT)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        return self.miniclip.encode_image(image.to(self.dtype), normalize)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return self.miniclip.encode_text(text, normalize)

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logit_scale.exp() * self.encode_image(image, True) @ self.encode_text(text, True).T
        logits = logits if self.logit_bias is None else logits + self.logit_bias
        return logits, logits.T

    def forward(self, image: Tensor | None = None, text: Tensor | None = None):
        """(image_features, text_features, logit_scale), and logit_bias if there is one; a dict with `output_dict`."""
        image_features = None if image is None else self.encode_image(image, normalize=True)
        text_features = None if text is None else self.encode_text(text, normalize=True)
        outputs = image_features, text_features, self.logit_scale.exp(), self.logit_bias
        outputs = outputs[:3] if self.logit_bias is None else outputs
        names = "image_features", "text_features", "logit_scale", "logit_bias"
        return dict(zip(names, outputs)) if self.output_dict else outputs

    @wraps(forward_intermediates)
    def forward_intermediates(self, *args, **options) -> dict[str, Tensor | list[Tensor]]:
        return forward_intermediates(self.miniclip, *args, **options, custom_text=self.layout == "custom_text")

    def set_grad_checkpointing(self, enable: bool = True):
        self.miniclip.activation_checkpointing_enable(every_n_layers=int(enable))

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False):
        if isinstance(self.visual, TimmTower):
            self.visual.freeze_groups(unlocked_groups)
        else:
            freeze(self.miniclip, image=_locked(self.visual, unlocked_groups))
        if isinstance(self.visual, SigLipVisionTransformer) and unlocked_groups == 1:  # a group of timm's there
            self.visual.attn_pool.requires_grad_(True)
        if not freeze_bn_stats:  # as there, they follow the batches
            self.visual.fixed_norms = ()
        self.visual.train(self.visual.training)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True):
        if not freeze_layer_norm:
            raise InputError("freeze_layer_norm=False cannot be honoured: a layer is frozen with its norms, as there")
        projection = isinstance(self.text, HfTextTower)  # there it learns in any case
        freeze(self.miniclip, text=_locked(self.text, unlocked_layers + projection))


class OpenAIClip(CLIP):
    """OpenAI's model: called with images and token ids it returns the logits of both directions."""

    forward = CLIP.get_logits

    def transformer(self, x: Tensor) -> Tensor:
        """The text tower's blocks, on a sequence (L, B, W) as OpenAI's code arranges it."""
        return self.text.run_blocks(x.transpose(0, 1), is_causal=True).transpose(0, 1)


class LayerNormFp32(nn.LayerNorm):
    """A LayerNorm with float32 parameters, for activations in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


def convert_weights_to_lp(model: nn.Module, dtype: torch.dtype = torch.float16):
    """Converts a model's towers to half precision, but for the parameters of LayerNorm, as OpenAI's models are."""
    for tower in (model.visual, model.text):
        if type(tower) not in (VisionTransformer, TextTransformer):
            tower.to(dtype)
            continue
        for module in tower.modules():
            if isinstance(module, nn.LayerNorm):
                module.__class__ = LayerNormFp32
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)


def set_precision(model: CLIP, precision: str):
    """Gives a model one of OpenCLIP's precisions. Raises InputError for another one."""
    if precision not in (*AS_IS, *LOW):
        raise InputError(f"precision {precision!r} is not one of {', '.join((*AS_IS, *LOW))}")
    if precision.startswith("pure_"):
        model.to(LOW[precision])
    elif precision in LOW:
        convert_weights_to_lp(model, LOW[precision])


def full_precision(model: CLIP | MiniClip) -> MiniClip:
    """The model inside; of one in half precision a copy in float32."""
    inner = model.miniclip if isinstance(model, CLIP) else model
    if all(p.dtype == torch.float32 for p in inner.parameters()):
        return inner
    twin = copy.deepcopy(inner).float().eval()  # with its tokenizer, which may say what padding is
    for module in twin.modules():
        if isinstance(module, LayerNormFp32):
            module.__class__ = nn.LayerNorm
    return twin


def _locked(tower: Tower, groups: int) -> str:  # OpenCLIP's groups count the projection too, and what is before blocks
    if groups > len(tower.blocks) + 1:
        tower.requires_grad_(True)
        return "none"
    return ("all", "tower")[groups] if groups < 2 else f"all_but_{groups - 1}"


def _rows(model: CLIP) -> tuple[list, list]:
    return model.visual.key_rows(), model.text.key_rows()


def _to_openclip(model: CLIP, state_dict: dict, prefix: str, metadata):
    inner = prefix + "miniclip."
    ours = {key[len(inner) :]: state_dict.pop(key) for key in [key for key in state_dict if key.startswith(inner)]}
    for key, tensor in rename(ours, model.layout, _rows(model), export=True).items():
        state_dict[prefix + key] = tensor


def _from_any(model: CLIP, state_dict: dict, prefix: str, metadata, strict, missing: list, unexpected: list, errors):
    given = {key[len(prefix) :]: state_dict.pop(key) for key in [key for key in state_dict if key.startswith(prefix)]}
    try:
        ours, _ = to_miniclip(given, _rows(model))
    except CheckpointError:  # torch names what is missing and unexpected, and ignores it unless strict
        full = rename(model.miniclip.state_dict(), model.layout, _rows(model), export=True)
        missing += [key for key in full if key not in given]
        unexpected += [key for key in given if key not in full]
        ours = rename(full | {key: given[key] for key in given if key in full}, model.layout, _rows(model), False)
    for key, tensor in ours.items():
        state_dict[f"{prefix}miniclip.{key}"] = tensor
