"""Towers from transformers or from a Python package.

Between encoders of images and of sentences that exist already, only two small projections have to be learned, from six
thousand pairs. Fields of the model config that begin with `hf_`, most of them OpenCLIP's, name the encoders:

    "vision_cfg": {"hf_model_name": "facebook/dinov2-small", "hf_proj_type": "mlp"},
    "text_cfg": {"hf_model_name": "roberta-base", "hf_pooler_type": "mean", "hf_proj_type": "mlp", "context_length": 64}

`hf_model_name` is a folder, a name on the Hugging Face hub, or `package:` and a key of `packages.PACKAGES`. Without it,
and with a transformers config as `hf_model_config`, the tower starts from random weights. The folder of a saved model
is complete: nothing is downloaded again. Code that comes with weights never runs."""

import copy
import math
from collections import OrderedDict
from contextlib import nullcontext
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from miniclip.model import TOWERS, Tower
from miniclip.towers.hf_config import HfConfig, HfTextConfig, HfVisionConfig, ask, offline, open_tokenizer
from miniclip.towers.hf_tokenizer import TOKENIZER_FILES, HfTokenizer, tokenizer_folder
from miniclip.towers.packages import PackagedEncoder, packaged, source
from miniclip.towers.registry import TOKENIZER_BESIDE, check_images, trimmed
from miniclip.towers.tokens import token_features, token_section
from miniclip.utils.errors import InputError
from miniclip.utils.files import replacing
from miniclip.utils.model_folder import limited_by


class HfTower(Tower):
    """Base class of both towers: the encoder, `trunk`, and the projection of its features."""

    kind = "image"

    def __init__(self, cfg: HfConfig):
        super().__init__()
        self.cfg, entry = cfg, packaged(cfg.hf_model_name)
        # On the CPU even if the model is on "meta", for its shapes alone: the encoder's constants are not weights.
        with torch.device("cpu"):
            self.trunk = entry() if isinstance(entry, type) else self._transformers_model()

    def _transformers_model(self) -> nn.Module:
        from transformers import AutoModel

        with offline() if self.cfg.hf_model_config else nullcontext():  # which says all there is to know
            name = self.cfg.hf_model_name if self.cfg.hf_model_config is None else "hf_model_config"
            self.trunk_config = ask(name, self.cfg.encoder_config, self.kind)
            # First without memory: that it is not far larger than its weights is found before anything is filled.
            with torch.device("meta"), limited_by(None):
                ask(name, AutoModel.from_config, copy.deepcopy(self.trunk_config))
            return ask(name, lambda: self._pruned(AutoModel.from_config(self.trunk_config, dtype=torch.float32)))

    def _pruned(self, trunk: nn.Module) -> nn.Module:
        """Removes layers whose results are not used: their gradients would be missing in a distributed run."""
        if getattr(trunk.config, "is_encoder_decoder", False):
            trunk = trunk.get_encoder()
        # A ViT's pooler was for its first training, and is often not in the file.
        if hasattr(getattr(trunk, "pooler", None), "dense") and not (self.kind == "text" and self.pooler == "cls"):
            trunk.pooler = None
        return trunk

    def load_pretrained(self):
        """Loads the weights of the encoder that the config names. Raises InputError if some are missing."""
        if not self.cfg.pretrained:
            return
        if isinstance(self.trunk, PackagedEncoder):
            return self.trunk.load_pretrained()
        from transformers import AutoModel
        from transformers.utils import logging

        name, verbosity, bars = self.cfg.hf_model_name, logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # it lists the other half of a CLIP as unexpected
        logging.disable_progress_bar()
        try:
            kwargs = {"config": self.trunk_config, "dtype": torch.float32, "output_loading_info": True}
            model, info = ask(name, AutoModel.from_pretrained, source(name), trust_remote_code=False, **kwargs)
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
        # By identity: half of a model has other names for its weights than the whole.
        absent = {id(t) for key, t in model.state_dict(keep_vars=True).items() if key in info["missing_keys"]}
        weights = self._pruned(model).state_dict(keep_vars=True)
        if missing := [k for k, t in weights.items() if id(t) in absent and not k.endswith("num_batches_tracked")]:
            raise InputError(f"{name} lacks weights of this encoder: {', '.join(missing[:5])} and others like them")
        self.trunk.load_state_dict(weights, strict=True)

    def head(self, embed_dim: int) -> nn.Module:
        """The projection, features (B, W) to embeddings (B, E). The mlp is OpenCLIP's."""
        kind, width = self.cfg.hf_proj_type or "none", self.width
        if kind == "none" and width != embed_dim:
            raise InputError(f"hf_proj_type none: the {self.kind} tower is {width} wide, embed_dim is {embed_dim}")
        hidden = {"none": [], "linear": [embed_dim], "mlp": [(width + embed_dim) // 2, embed_dim]}[kind]
        sizes = pairwise([width, *hidden])
        layers = [layer for a, b in sizes for layer in (nn.GELU(), nn.Linear(a, b, bias=False))][1:]
        # The dropout has no number: the weights have the same names without it.
        numbered = {str(number): layer for number, layer in enumerate(layers)}
        return nn.Sequential(OrderedDict(dropout=nn.Dropout(self.cfg.hf_proj_dropout), **numbered))

    @property
    def may_skip_parameters(self) -> bool:
        return any(p.requires_grad for p in self.trunk.parameters())  # an encoder has parts that nothing here reads

    def checkpoint_activations(self, every: int):
        if not self.may_skip_parameters:
            return  # frozen: there is no backward pass
        if not every:
            for module in self.trunk.modules():
                module.gradient_checkpointing = False  # what transformers' layers look at
            return
        if isinstance(self.trunk, PackagedEncoder) or not self.trunk.supports_gradient_checkpointing:
            problem = f"the {self.kind} tower ({type(self.trunk).__name__}) does not support activation checkpointing"
            raise InputError(f"{problem}: remove --activation_checkpointing, or freeze the tower")
        if hasattr(self.trunk, "activation_checkpointing_enable"):
            self.trunk.activation_checkpointing_enable(every_n_layers=every)
        else:  # transformers before 5.23
            self.trunk.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of a transformer, the stages of a convolutional network: the longest list of modules."""
        lists = [module for module in self.trunk.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        return list(max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=[]))


class HfVisionTower(HfTower):
    """Images (B, 3, S, S) to embeddings (B, E)."""

    def __init__(self, cfg: HfVisionConfig, embed_dim: int, quick_gelu: bool):
        super().__init__(cfg)
        self.image_size = cfg.image_size
        # A convolutional network is faster with the channels of a pixel side by side.
        convolutional = any(isinstance(module, nn.BatchNorm2d) for module in self.trunk.modules())
        self.layout = torch.channels_last if convolutional else torch.contiguous_format
        if cfg.width is None:
            with torch.no_grad(), torch.device("cpu"):
                image = torch.zeros(1, 3, cfg.image_size, cfg.image_size)
                cfg.width = ask(cfg.hf_model_name, self.eval().features, image).shape[1]
            self.train()
        self.width = cfg.width
        self.proj = self.head(embed_dim)

    @property
    def classes(self) -> dict[int, str]:
        """Which of the features are probabilities: number of the feature to the name of its class."""
        names = self.trunk.classes() if isinstance(self.trunk, PackagedEncoder) else []
        return dict(enumerate(names, self.width - len(names)))

    def features(self, pixel_values: Tensor) -> Tensor:
        check_images(pixel_values, self.image_size)
        pixel_values = pixel_values.contiguous(memory_format=self.layout)
        if isinstance(self.trunk, PackagedEncoder):
            return self.trunk(pixel_values)
        outputs, pooler = self.trunk(pixel_values=pixel_values), self.cfg.pooler
        if pooler is None and getattr(outputs, "pooler_output", None) is not None:
            return outputs.pooler_output.flatten(1)
        x = outputs.last_hidden_state  # (B, L, W), or of a convolutional network (B, W, height, width)
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        return x.mean(dim=1) if pooler == "mean" else x.amax(dim=1) if pooler == "max" else x[:, 0]

    @torch.no_grad()
    def for_inference(self) -> "HfVisionTower":
        """A copy with each BatchNorm fused into the convolution before it, which saves a third of the time (Jacob et
        al., arXiv 1712.05877, section 3.2), and on a CPU ReLUs if it knows them; or itself if it has no BatchNorm."""
        if self.layout != torch.channels_last:
            return self
        fused = copy.deepcopy(self).float().eval()
        fuse_norms(fused.trunk)
        device, side = next(self.parameters()).device, self.image_size
        if isinstance(fused.trunk, PackagedEncoder) and device.type == "cpu" and torch.backends.mkldnn.is_available():
            fused.trunk.fuse_relus()
        fused.trunk.to(memory_format=self.layout)
        # That a BatchNorm follows a convolution is a guess, from their order in the module: the result is tested.
        image = torch.linspace(-2, 2, 3 * side * side, device=device).sin().view(1, 3, side, side)
        with torch.autocast(device.type, enabled=False):
            before, after = (tower.features(image) for tower in (copy.deepcopy(self).float().eval(), fused))
        return fused if torch.allclose(after, before, atol=1e-3 * before.abs().max().item()) else self


class HfTextTower(HfTower):
    """Token ids (B, L) to embeddings (B, E). Padding is masked, and not pooled."""

    kind, projection_name = "text", "text_projection"

    def __init__(self, cfg: HfTextConfig, embed_dim: int, quick_gelu: bool):
        super().__init__(cfg)
        config, name = self.trunk_config, cfg.hf_model_name or self.trunk_config.model_type
        if not hasattr(config, "vocab_size"):
            raise InputError(f"{name} is not a text encoder")
        cfg.vocab_size, self.pad_token_id = config.vocab_size, getattr(config, "pad_token_id", None) or 0
        with torch.no_grad(), torch.device("cpu"):  # configs say in many ways how many positions there are
            longest = torch.full((1, cfg.context_length), self.pad_token_id ^ 1)
            try:
                self.width = cfg.width = self.eval().features(longest).shape[1]
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                room = f"{getattr(config, 'max_position_embeddings', 'fewer')} positions, some maybe for its own use"
                raise InputError(f"context_length is {cfg.context_length}, and {name} has {room}: {error}") from None
        self.train()
        self.text_projection = self.head(embed_dim)

    def features(self, input_ids: Tensor) -> Tensor:
        input_ids = trimmed(input_ids, self.pad_token_id)
        mask = input_ids != self.pad_token_id  # (B, L)
        outputs = self.trunk(input_ids=input_ids, attention_mask=mask.long())
        x = outputs.last_hidden_state  # (B, L, W)
        if self.pooler == "mean":
            return (x * mask[..., None].to(x.dtype)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1).to(x.dtype)
        if self.pooler == "max":
            return x.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
        pooled = getattr(outputs, "pooler_output", None)
        return x[:, 0] if pooled is None or self.pooler == "cls_last_hidden_state" else pooled

    @property
    def pooler(self) -> str:
        return self.cfg.pooler or ("cls_last_hidden_state" if self.trunk_config.model_type == "bert" else "mean")

    def key_rows(self) -> list[tuple[str, str, str]]:
        # In OpenCLIP a projection of one layer has no number.
        ours, head = list(self.state_dict()), "text_projection." + ("" if self.cfg.hf_proj_type == "mlp" else "0.")
        theirs = [name.replace("trunk.", "transformer.", 1).replace(head, "proj.", 1) for name in ours]
        return [("{t}" + name, "{t}" + their, "{t}" + name) for name, their in zip(ours, theirs)]

    @cached_property
    def tokenizer(self) -> HfTokenizer:
        """The encoder's tokenizer. Raises InputError if it cannot be read or does not fit."""
        name = self.cfg.hf_tokenizer_name or self.cfg.hf_model_name
        if name is None:
            raise InputError("the text tower has no tokenizer: set hf_tokenizer_name")
        return self.read_tokenizer(source(name))

    def read_tokenizer(self, folder: str | Path) -> HfTokenizer:
        tokenizer = open_tokenizer(folder)
        if tokenizer.pad_token_id is None:
            raise InputError(f"the tokenizer {folder} has no padding token: set tokenizer.pad_token and save it again")
        if tokenizer.pad_token_id != self.pad_token_id or len(tokenizer) > self.cfg.vocab_size:
            sizes = f"{len(tokenizer)} words and padding id {tokenizer.pad_token_id}, the encoder {self.cfg.vocab_size}"
            raise InputError(f"the tokenizer {folder} has {sizes} and {self.pad_token_id}: they do not belong together")
        return HfTokenizer(tokenizer, self.cfg.context_length)

    def save_files(self, directory: Path):
        if "tokenizer" in vars(self) or self.cfg.hf_tokenizer_name or self.cfg.hf_model_name:
            with replacing(directory / "tokenizer") as scratch:
                self.tokenizer.tokenizer.save_pretrained(scratch)

    def load_files(self, directory: Path, folder: str = "tokenizer"):
        self.tokenizer = self.read_tokenizer(tokenizer_folder(directory, folder))


def fuse_norms(network: nn.Module) -> nn.Module:
    """Fuses each BatchNorm in a network into the convolution before it, in the order of submodules, in place."""
    for module in network.modules():
        layers = [(name, m) for name, m in module.named_children() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
        for (before, conv), (name, norm) in pairwise(layers):
            if isinstance(conv, nn.Conv2d) and getattr(norm, "num_features", None) == conv.out_channels:
                setattr(module, before, fuse_conv_bn_eval(conv, norm))
                setattr(module, name, nn.Identity())
    return network


TOWERS.update({HfVisionConfig: HfVisionTower, HfTextConfig: HfTextTower})
TOKENIZER_BESIDE[HfTextConfig] = TOKENIZER_FILES[:1]
TokenHfVisionConfig, TokenHfTextConfig = (token_section(cfg, __name__) for cfg in (HfVisionConfig, HfTextConfig))


@token_features.register
def _(tower: HfVisionTower, pixel_values: Tensor) -> Tensor:
    pixel_values = pixel_values.contiguous(memory_format=tower.layout)
    if isinstance(tower.trunk, PackagedEncoder):
        x = tower.trunk.feature_map(pixel_values)
    else:
        x = tower.trunk(pixel_values=pixel_values).last_hidden_state
    x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
    return x[:, -(math.isqrt(x.shape[1]) ** 2) :]  # the patches are a square, behind class and register tokens


@token_features.register
def _(tower: HfTextTower, input_ids: Tensor) -> Tensor:
    mask = input_ids != tower.pad_token_id
    return tower.trunk(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
