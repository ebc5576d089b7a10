"""What if there are encoders already, of pictures and of sentences, but no CLIP?

Then two small projections between them are all that has to be learned, and six thousand pairs teach those well. A tower
of a MiniClip can be any encoder that transformers loads, or one that comes inside a Python package. In the model's
config `hf_` fields, most of them OpenCLIP's, say which:

    "vision_cfg": {"hf_model_name": "facebook/dinov2-small", "hf_proj_type": "mlp"},
    "text_cfg": {"hf_model_name": "roberta-base", "hf_pooler_type": "mean", "hf_proj_type": "mlp", "context_length": 64}

`hf_model_name` is a folder, a name on the Hugging Face hub, or `package:` and a key of `PACKAGES` below. Without it,
and with a config of transformers as `hf_model_config`, the tower starts from random numbers. What a saved model needs
is in its folder: the sizes in config.json, all weights, the tokenizer. Nothing is fetched again, and code that comes
with somebody's weights is never run.
"""

import copy
import json
import shutil
import tempfile
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from miniclip.checkpoint import HARMLESS, _rename
from miniclip.model import TOWERS, Tower
from miniclip.towers.hf_config import (
    HfTextConfig,
    HfVisionConfig,
    _ask,
    _HfConfig,
)
from miniclip.towers.hf_tokenizer import HfTokenizer
from miniclip.towers.packages import packaged, source
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import files_in, replacing
from miniclip.utils.weight_files import read_checkpoint


class Head(nn.Sequential):
    """Layers behind a dropout, which has no number among them: with and without it weights have the same names."""

    def __init__(self, dropout: float, *layers: nn.Module):
        super().__init__(*layers)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, self.dropout, self.training))


class _HfTower(Tower):
    """What both towers have: the encoder, `trunk`, and how its features are projected."""

    kind = "image"
    uses_all_parameters = False

    def __init__(self, cfg: _HfConfig):
        super().__init__()
        self.cfg, entry = cfg, packaged(cfg.hf_model_name)
        # On the CPU even where a model is made for its shapes alone ("meta"): the encoder's constants are no weights.
        with torch.device("cpu"):
            self.trunk = entry() if isinstance(entry, type) else self._transformers_model()

    def _transformers_model(self) -> nn.Module:
        from transformers import AutoConfig, AutoModel

        cfg = self.cfg
        if cfg.hf_model_config is None:
            name = source(cfg.hf_model_name)
            config = _ask(cfg.hf_model_name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=False))
        else:
            values = dict(cfg.hf_model_config)
            config = _ask("hf_model_config", lambda: AutoConfig.for_model(values.pop("model_type"), **values))
        config = getattr(config, f"{'vision' if self.kind == 'image' else 'text'}_config", config)  # of two, our half
        config.use_cache = False  # of a decoder: nothing is written on here
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0  # a masked autoencoder is to see whole pictures
        if "/" in str(config._attn_implementation):  # code from the hub
            config._attn_implementation = "eager"
        cfg.hf_model_config = json.loads(config.to_json_string(use_diff=False))
        for field in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "attn_implementation"):
            cfg.hf_model_config.pop(field, None)
        self.trunk_config = config
        make = partial(AutoModel.from_config, config, dtype=torch.float32)
        return self._pruned(_ask("hf_model_config", make))

    def _pruned(self, trunk: nn.Module) -> nn.Module:
        """Without the layers whose results nobody looks at, which a distributed run would miss."""
        if getattr(trunk.config, "is_encoder_decoder", False):
            trunk = trunk.get_encoder()
        if hasattr(getattr(trunk, "pooler", None), "dense") and not self._uses_pooler(trunk):
            trunk.pooler = None
        return trunk

    def load_pretrained(self):
        """Gives the trunk the weights of the encoder that the config names. Raises InputError where some are missing:
        they would stay random."""
        if hasattr(self.trunk, "load_pretrained"):
            return self.trunk.load_pretrained()
        from transformers import AutoModel
        from transformers.utils import logging

        how = {"config": self.trunk_config, "dtype": torch.float32, "output_loading_info": True}
        name, said = self.cfg.hf_model_name, logging.get_verbosity()
        bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # the table of what a half of a CLIP has no use for
        logging.disable_progress_bar()
        try:
            load = partial(AutoModel.from_pretrained, source(name), trust_remote_code=False, **how)
            model, info = _ask(name, load)
        finally:
            logging.set_verbosity(said)
            if bars:
                logging.enable_progress_bar()
        # By identity: half of a model calls its weights by other names than the whole does.
        absent = {id(t) for key, t in chain(model.named_parameters(), model.named_buffers())
                  if key in info["missing_keys"]}  # fmt: skip
        trunk = self._pruned(model)
        weights = trunk.state_dict()
        tensors = chain(trunk.named_parameters(), trunk.named_buffers())
        if missing := [key for key, t in tensors if id(t) in absent and not key.endswith("num_batches_tracked")]:
            raise InputError(f"{name} lacks weights of this encoder: {', '.join(missing[:5])} and others like them")
        self.trunk.load_state_dict(weights, strict=True)

    def head(self, embed_dim: int) -> nn.Module:
        """The projection: features (B, width) to (B, E). The mlp is OpenCLIP's."""
        cfg, width = self.cfg, self.width
        if cfg.hf_proj_type in (None, "none"):
            if width != embed_dim:
                raise InputError(f"hf_proj_type none: the {self.kind} tower is {width} wide, embed_dim is {embed_dim}")
            layers = []
        elif cfg.hf_proj_type == "linear":
            layers = [nn.Linear(width, embed_dim, bias=False)]
        else:
            hidden = (width + embed_dim) // 2
            layers = [nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)]
        return Head(cfg.hf_proj_dropout, *layers)

    def checkpoint_activations(self, every: int):
        for block in self.blocks[::every]:
            block.forward = partial(checkpoint, type(block).forward, block, use_reentrant=False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of a transformer, the stages of a convolutional network: the longest list of modules."""
        lists = [module for module in self.trunk.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        return list(max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=[]))


class HfVisionTower(_HfTower):
    """Images (B, 3, S, S) to embeddings (B, E)."""

    def __init__(self, cfg: HfVisionConfig, embed_dim: int, quick_gelu: bool):
        super().__init__(cfg)
        self.image_size = cfg.image_size
        # A convolutional network is faster with the channels of a pixel side by side.
        self.layout = torch.contiguous_format
        if any(isinstance(module, nn.BatchNorm2d) for module in self.trunk.modules()):
            self.layout = torch.channels_last
        if cfg.width is None:
            with torch.no_grad(), torch.device("cpu"):
                picture = torch.zeros(1, 3, cfg.image_size, cfg.image_size)
                cfg.width = _ask(cfg.hf_model_name, lambda: self.eval().features(picture)).shape[1]
            self.train()
        self.width = cfg.width
        self.proj = self.head(embed_dim)

    @property
    def projection(self) -> nn.Module:
        return self.proj

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the projection is made from: (B, W)."""
        if pixel_values.shape[1:] != (3, self.image_size, self.image_size):
            size = self.image_size
            raise InputError(f"images are {tuple(pixel_values.shape)}, not (B, 3, {size}, {size})")
        pixel_values = pixel_values.contiguous(memory_format=self.layout)
        if packaged(self.cfg.hf_model_name):
            return self.trunk(pixel_values)
        outputs, pooler = self.trunk(pixel_values=pixel_values), self.cfg.hf_pooler_type
        if pooler is None and getattr(outputs, "pooler_output", None) is not None:
            return outputs.pooler_output.flatten(1)
        x = outputs.last_hidden_state  # (B, L, W), or of a convolutional network (B, W, height, width)
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        return {"mean": lambda: x.mean(dim=1), "max": lambda: x.amax(dim=1)}.get(_plain(pooler), lambda: x[:, 0])()

    @staticmethod
    def _uses_pooler(trunk: nn.Module) -> bool:
        return False  # a ViT's is what is left of its first training, and often not in the file

    @torch.no_grad()
    def for_inference(self) -> "HfVisionTower":
        """The tower for inference: in a copy each BatchNorm has become part of the convolution before it, which is a
        third of the time (Jacob et al., arXiv 1712.05877, section 3.2). A tower without any is given as it is."""
        if self.layout != torch.channels_last:
            return self
        twin = copy.deepcopy(self).float().eval()
        for module in twin.trunk.modules():
            layers = [(name, m) for name, m in module.named_children() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
            for (_, conv), (name, norm) in pairwise(layers):
                if isinstance(conv, nn.Conv2d) and getattr(norm, "num_features", None) == conv.out_channels:
                    whole = fuse_conv_bn_eval(conv, norm)
                    conv.weight, conv.bias = whole.weight, whole.bias
                    setattr(module, name, nn.Identity())
        twin.trunk.to(memory_format=self.layout)
        # That one follows the other is told by the order in which they are registered: whether it is so is tried.
        device, side = next(self.parameters()).device, self.image_size
        picture = torch.linspace(-2, 2, 3 * side * side, device=device).sin().view(1, 3, side, side)
        with torch.autocast(device.type, enabled=False):
            mine, theirs = (tower.features(picture) for tower in (copy.deepcopy(self).float().eval(), twin))
        return twin if torch.allclose(theirs, mine, atol=1e-3 * mine.abs().max().item()) else self


class HfTextTower(_HfTower):
    """Token ids (B, L) to embeddings (B, E). What equals the padding id is no text: it is masked, and not pooled."""

    kind = "text"

    def __init__(self, cfg: HfTextConfig, embed_dim: int, quick_gelu: bool):
        super().__init__(cfg)
        config = self.trunk_config
        if not hasattr(config, "vocab_size"):
            raise InputError(f"{cfg.hf_model_name or config.model_type} is no text encoder")
        cfg.vocab_size, self.pad_token_id = config.vocab_size, getattr(config, "pad_token_id", None) or 0
        with torch.no_grad(), torch.device("cpu"):  # how many positions there are is told in many ways
            longest = torch.full((1, cfg.context_length), self.pad_token_id ^ 1)
            try:
                self.width = cfg.width = self.eval().features(longest).shape[1]
            except (IndexError, RuntimeError, ValueError) as error:
                room = getattr(config, "max_position_embeddings", "fewer")
                raise InputError(
                    f"context_length is {cfg.context_length}, and {cfg.hf_model_name or config.model_type} has {room}"
                    f" positions, some of which may be its own: {error}"
                ) from None
        self.train()
        self.text_projection = self.head(embed_dim)
        self.tokenizer = None

    @property
    def projection(self) -> nn.Module:
        return self.text_projection

    def features(self, input_ids: Tensor) -> Tensor:
        """What the projection is made from: (B, W)."""
        mask = input_ids != self.pad_token_id  # (B, L)
        outputs = self.trunk(input_ids=input_ids, attention_mask=mask.long())
        x, pooler = outputs.last_hidden_state, _plain(self.pooler_type(self.trunk))  # (B, L, W)
        if pooler == "mean":
            return (x * mask[..., None].to(x.dtype)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1).to(x.dtype)
        if pooler == "max":
            return x.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
        pooled = getattr(outputs, "pooler_output", None)
        return x[:, 0] if pooled is None or pooler == "cls_last_hidden_state" else pooled

    def pooler_type(self, trunk: nn.Module) -> str:
        return self.cfg.hf_pooler_type or ("cls_last_hidden_state" if trunk.config.model_type == "bert" else "mean")

    def _uses_pooler(self, trunk: nn.Module) -> bool:
        return _plain(self.pooler_type(trunk)) == "cls"

    def load_tokenizer(self, where: str | Path | None = None):
        """Reads the tokenizer that belongs to the encoder, or the one in a folder."""
        from transformers import AutoTokenizer

        name = self.cfg.hf_tokenizer_name or self.cfg.hf_model_name
        where = where or (name and source(name))
        if where is None:
            raise InputError("the text tower has no tokenizer: say hf_tokenizer_name")
        tokenizer = _ask(name, lambda: AutoTokenizer.from_pretrained(where, trust_remote_code=False))
        if tokenizer.pad_token_id is None:
            raise InputError(f"the tokenizer {where} has no padding token: give it one, tokenizer.pad_token = ...")
        if tokenizer.pad_token_id != self.pad_token_id or len(tokenizer) > self.cfg.vocab_size:
            raise InputError(
                f"the tokenizer {where} has {len(tokenizer)} words and pads with {tokenizer.pad_token_id}, its encoder"
                f" has {self.cfg.vocab_size} and {self.pad_token_id}: they do not belong together"
            )
        self.tokenizer = HfTokenizer(tokenizer, self.cfg.context_length)

    def save_files(self, directory: Path):
        if self.tokenizer is not None:
            (directory / "tokenizer").mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory() as scratch:
                self.tokenizer.tokenizer.save_pretrained(scratch)
                for name in files_in(scratch):
                    with replacing(directory / "tokenizer" / name) as file:
                        shutil.copyfile(Path(scratch) / name, file)

    def load_files(self, directory: Path):
        if not (directory / "tokenizer").is_dir():
            raise InputError(f"{directory}: the folder tokenizer, which the text tower needs, is missing")
        self.load_tokenizer(directory / "tokenizer")


def _plain(pooler: str | None) -> str | None:
    """Without the ending that OpenCLIP's names have."""
    return pooler and pooler.removesuffix("_pooler")


TOWERS.update({HfVisionConfig: HfVisionTower, HfTextConfig: HfTextTower})


def load_towers(model, weights: bool = True) -> None:
    """Gives the towers of a new model from transformers their pretrained weights, and the text tower its tokenizer."""
    for tower in (model.visual, model.text):
        if weights and isinstance(tower, _HfTower) and tower.cfg.pretrained:
            tower.load_pretrained()
    if isinstance(model.text, HfTextTower):
        model.text.load_tokenizer()


def load_hf_weights(model, path: str | Path) -> None:
    """Loads a weight file of a whole model with such towers, strictly: MiniCLIP's own (a checkpoint's ema.safetensors,
    say), or OpenCLIP's with a text tower from transformers (`roberta-ViT-B-32`, `xlm-roberta-base-ViT-B-32`). Raises
    CheckpointError, naming what does not fit."""
    weights = {}
    for name, tensor in read_checkpoint(path)[0].items():
        name = ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
        if name.rpartition(".")[2] not in HARMLESS:
            weights[name] = tensor
    if not any(name.startswith(("text.trunk.", "visual.trunk.")) for name in weights):
        weights = from_openclip(weights)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from None


def from_openclip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names to ours, of a model with its own image tower and a text tower from transformers."""
    text, rest = {}, {}
    for name, tensor in weights.items():
        if name.startswith("text.transformer."):
            text["text.trunk." + name.removeprefix("text.transformer.")] = tensor
        elif name.startswith("text.proj."):
            number = name.removeprefix("text.proj.").removesuffix("weight").strip(".") or "0"
            text[f"text.text_projection.{number}.weight"] = tensor
        else:
            rest[name] = tensor
    scale = {"logit_scale": rest.pop("logit_scale").squeeze()} if "logit_scale" in rest else {}
    return text | scale | _rename(rest, "custom_text", export=False, part="visual.")
