"""Image towers from timm, as OpenCLIP builds them: ConvNeXt, EVA, ViTamin, MobileCLIP's, the Perception Encoder's, and
any other image model of timm.

    "vision_cfg": {"image_size": 224, "timm_model_name": "convnext_base", "timm_pool": "", "timm_proj": "linear"}

timm builds `trunk` by its name and with `timm_pool`. `timm_proj` "linear" or "mlp" adds a projection, `head`; with null
or "" timm's own classifier is the projection, and with "none" the features are the embeddings. Submodules have
OpenCLIP's names, so weights need no table of names. timm is an optional package, which needs torchvision."""

import re
from collections import OrderedDict
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from miniclip.model import TOWERS, Tower
from miniclip.towers.hf_config import ask
from miniclip.towers.registry import IN_OPENCLIP, check_images
from miniclip.utils.config_files import in_range
from miniclip.utils.errors import InputError
from miniclip.utils.model_folder import limited_by

LARGEST = {"image_size": 1024}  # timm makes tables of each patch and each other, as large as the image says


def import_timm():
    """The package timm. Raises InputError if it, or the torchvision that it needs, cannot be imported."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter beside another version of torch
        problem = "image towers of timm need the packages timm and torchvision"
        raise InputError(f"{problem}: pip install timm torchvision ({error})") from None
    return timm


@dataclass
class TimmVisionConfig:
    """The image tower. A larger or smaller image than timm's name says changes the number of positions."""

    timm_model_name: str
    timm_model_pretrained: bool = False  # whether training starts from timm's weights, which come from the hub
    timm_pool: Literal["", "avg", "token", "map"] = "avg"  # "": as the model does by itself
    timm_proj: str | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: float = 0.0  # dropout of the features in training, before the projection
    timm_drop_path: float | None = None  # share of a block's branches left out in training (arXiv 1603.09382)
    patch_dropout: float = 0.0  # share of patches left out in training
    image_size: int = 224

    def problems(self):
        yield from in_range("vision_cfg.", self, LARGEST)
        plain = re.fullmatch(r"\w+(\.\w+)?", self.timm_model_name)  # no hf-hub:, no local-dir:
        yield plain, f"vision_cfg.timm_model_name is {self.timm_model_name!r:.100}, not the name of a model of timm"
        projections = None, "", "none", "linear", "mlp"
        yield self.timm_proj in projections, f"vision_cfg.timm_proj is {self.timm_proj!r:.50}, not linear, mlp or none"
        for name in ("timm_drop", "timm_drop_path", "patch_dropout"):
            yield 0 <= (getattr(self, name) or 0) < 1, f"vision_cfg.{name} is not in [0, 1)"
        head = self.timm_proj in ("linear", "mlp")
        yield head or self.timm_pool, "vision_cfg.timm_pool is '', which needs timm_proj linear or mlp"
        for name in ("timm_drop", "timm_proj_bias"):
            yield head or not getattr(self, name), f"vision_cfg.{name} has no effect without timm_proj linear or mlp"

    # As other pretrained encoders say whether they are, and the kind of their projection.
    pretrained = property(lambda self: self.timm_model_pretrained)
    hf_proj_type = property(lambda self: self.timm_proj or "linear")

    def preprocess(self) -> dict:
        """OpenAI's, as in OpenCLIP, or of timm's weights their own."""
        if not self.timm_model_pretrained:
            return {"size": self.image_size}
        theirs = ask(self.timm_model_name, import_timm().get_pretrained_cfg, self.timm_model_name)
        whole = theirs.crop_mode != "center"
        crop = {"resize_mode": "squash"} if whole else {"resize_mode": "shortest", "crop_pct": theirs.crop_pct}
        images = {"interpolation": theirs.interpolation, "mean": theirs.mean, "std": theirs.std}
        return {"size": self.image_size} | images | crop


class TimmTower(Tower):
    """Images (B, 3, S, S) to embeddings (B, E). Blocks are timm's groups of layers but the stem."""

    projection_name = "head"

    def __init__(self, cfg: TimmVisionConfig, embed_dim: int, quick_gelu: bool):
        super().__init__()
        self.cfg, self.image_size, self.embed_dim = cfg, cfg.image_size, embed_dim
        self.has_head = cfg.timm_proj in ("linear", "mlp")
        # On the CPU even if the model is on "meta", for its shapes alone: some of timm's constants are not weights.
        with torch.device("cpu"), limited_by(None):
            self.trunk = ask(cfg.timm_model_name, self.make_trunk)
        self.patch_dropout = cfg.patch_dropout
        self.width = W = self.trunk.num_features
        if cfg.timm_proj == "none" and embed_dim != W:
            raise InputError(f"timm_proj none: {cfg.timm_model_name} is {W} wide, embed_dim is {embed_dim}")
        layers = {}
        if cfg.timm_proj == "linear":
            layers = {"drop": nn.Dropout(cfg.timm_drop), "proj": nn.Linear(W, embed_dim, bias=cfg.timm_proj_bias)}
        elif cfg.timm_proj == "mlp":
            drop, bias = (cfg.timm_drop, 0.0), (True, cfg.timm_proj_bias)
            layers = {"mlp": import_timm().layers.Mlp(W, 2 * embed_dim, embed_dim, drop=drop, bias=bias)}
        self.head = nn.Sequential(OrderedDict(layers))
        if not self.has_head and cfg.timm_proj != "none":
            last = self.trunk.get_classifier()
            name = next(name for name, module in self.trunk.named_modules() if module is last)
            self.projection_name, self.width = f"trunk.{name}", last.in_features
        self.block_names = self.name_blocks()

    def make_trunk(self, pretrained: bool = False) -> nn.Module:
        cfg = self.cfg
        side = self.image_size
        options = {"drop_path_rate": cfg.timm_drop_path}
        if not self.has_head:
            options |= {"num_classes": 0 if cfg.timm_proj == "none" else self.embed_dim, "global_pool": cfg.timm_pool}
        trunk = import_timm().create_model(cfg.timm_model_name, pretrained=pretrained, **options)
        if self.has_head:
            trunk.reset_classifier(0, **({"global_pool": cfg.timm_pool} if cfg.timm_pool else {}))
        if (usual := trunk.default_cfg["input_size"][-1]) != side:
            if hasattr(trunk, "set_input_size"):
                trunk.set_input_size((side, side))
                with torch.no_grad():
                    trunk.eval()(torch.zeros(1, 3, side, side))  # which says what is wrong with a size
                trunk.train()
            elif trunk.default_cfg.get("fixed_input_size"):
                raise InputError(f"image_size is {side}, but {cfg.timm_model_name} takes only images of {usual}")
        return trunk

    @property
    def patch_dropout(self) -> float:
        """The share of patches left out in training. To set it raises InputError for a model that leaves out none."""
        drop = getattr(self.trunk, "patch_drop", None)
        return getattr(self.trunk, "patch_drop_rate", getattr(drop, "prob", 0.0))

    @patch_dropout.setter
    def patch_dropout(self, share: float):
        trunk, layers = self.trunk, import_timm().layers
        if hasattr(trunk, "patch_drop_rate"):  # Hiera
            trunk.patch_drop_rate = share
        elif hasattr(trunk, "patch_drop") and hasattr(trunk.patch_drop, "prob"):
            trunk.patch_drop.prob = share
        elif share and hasattr(trunk, "patch_drop") and hasattr(trunk, "num_prefix_tokens"):  # SAM has a map instead
            kind = layers.PatchDropout if trunk.patch_drop else layers.PatchDropoutWithIndices  # EVA has None at first
            trunk.patch_drop = kind(share, trunk.num_prefix_tokens).train(trunk.training)
        elif share:
            raise InputError(f"{self.cfg.timm_model_name} of timm leaves out no patches. Remove patch_dropout")

    def name_blocks(self) -> list[str]:
        """The largest module in each group of layers that timm tells, but the stem, norms and the classifier."""
        from timm.models._manipulate import group_with_matcher

        named = chain(self.trunk.named_parameters(), [("", None)])  # the last is in no group
        group = ask(self.cfg.timm_model_name, group_with_matcher, named, self.trunk.group_matcher(), reverse=True)
        largest = {}
        for name, module in self.trunk.named_modules():
            sizes = {f"{name}.{inner}": p.numel() for inner, p in module.named_parameters()}
            groups = {group.get(inner) for inner in sizes} if name else ()
            if len(groups) == 1 and (number := groups.pop()) not in (0, group[""]):
                largest[number] = max(largest.get(number, (0, "")), (sum(sizes.values()), name), key=lambda one: one[0])
        return [name for _, (_, name) in sorted(largest.items())]

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.trunk.get_submodule(name) for name in self.block_names]

    def freeze_groups(self, unlocked: int):
        """Freezes the trunk but the last `unlocked` of timm's groups of layers, with the statistics of frozen
        BatchNorms; `head` learns. So does OpenCLIP."""
        from timm.models import group_parameters

        groups = ask(self.cfg.timm_model_name, group_parameters, self.trunk, self.trunk.group_matcher())
        for number, names in groups.items():
            for name in names:
                self.trunk.get_parameter(name).requires_grad_(number + unlocked > max(groups))
        self.head.requires_grad_(True)
        norms = (module for module in self.modules() if isinstance(module, _BatchNorm))
        self.fixed_norms = tuple(norm for norm in norms if not any(p.requires_grad for p in norm.parameters()))

    def load_pretrained(self):
        if self.cfg.pretrained:
            theirs = ask(self.cfg.timm_model_name, self.make_trunk, pretrained=True)
            self.trunk.load_state_dict(theirs.state_dict(), strict=True)

    def features(self, pixel_values: Tensor) -> Tensor:
        check_images(pixel_values, self.image_size)
        if self.projection_name == "head":
            return self.trunk(pixel_values)
        return self.trunk.forward_head(self.trunk.forward_features(pixel_values), pre_logits=True)

    def checkpoint_activations(self, every: int):
        name = self.cfg.timm_model_name
        norms = {module for module in self.trunk.modules() if isinstance(module, _BatchNorm)}
        if every > 1:
            raise InputError(f"timm recomputes all blocks of {name} or none: remove every_n_layers")
        if every and not norms <= set(self.fixed_norms):
            problem = f"the BatchNorm of {name} would count each batch twice"
            raise InputError(f"{problem}: remove --activation_checkpointing, or add --freeze_image all_but_N")
        ask(name, self.trunk.set_grad_checkpointing, bool(every))

    @torch.no_grad()
    def for_inference(self) -> "TimmTower":
        """A copy in which branches that add up to one convolution, MobileCLIP's, are one; or the tower itself."""
        if not any(hasattr(module, "reparameterize") for module in self.trunk.modules()):
            return self
        from timm.utils.model import reparameterize_model

        fused = deepcopy(self).float().eval()
        fused.trunk = reparameterize_model(fused.trunk, inplace=True)
        return fused


TOWERS[TimmVisionConfig] = TimmTower
IN_OPENCLIP.add(TimmVisionConfig)
