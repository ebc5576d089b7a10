"""OpenCLIP's everyday functions (3.3.0): `import miniclip.compat.open_clip as open_clip`. See docs/compat.md."""

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from miniclip import config as configs
from miniclip.checkpoint import HARMLESS
from miniclip.classify import zero_shot
from miniclip.compat import transforms
from miniclip.compat.coca import CoCa
from miniclip.compat.model import CLIP, LOW, convert_weights_to_lp, full_precision, set_precision
from miniclip.compat.transforms import AugmentationCfg, Compose, PreprocessCfg, image_transform, image_transform_v2  # noqa: F401
from miniclip.config import MODEL_CONFIGS, MODELS, MiniClipConfig, PreprocessConfig
from miniclip.loss import clip_loss
from miniclip.model import ClipOutput, MiniClip
from miniclip.tokenizer import BaseTokenizer, Tokenizer
from miniclip.training.siglip import siglip_loss
from miniclip.utils.config_files import parse_json
from miniclip.utils.errors import InputError
from miniclip.utils.imagenet import IMAGENET
from miniclip.utils.weight_files import find_weights, mismatch, read_json, read_state_dict
from miniclip.weights.layouts import config_file, load_folder, named_config
from miniclip.weights.load import empty_model, fill, fit_weights, open_checkpoint, read_tokenizer_beside
from miniclip.weights.pretrained import (  # noqa: F401
    check_model,
    download_pretrained,
    find_folder,
    find_tag,
    follow,
    get_pretrained_cfg,
    list_pretrained,
    list_pretrained_models_by_tag,
    list_pretrained_tags_by_model,
)

OPENAI_DATASET_MEAN, OPENAI_DATASET_STD = PreprocessConfig.mean, PreprocessConfig.std
IMAGENET_CLASSNAMES = tuple(IMAGENET["classes"].values())
OPENAI_IMAGENET_TEMPLATES = tuple(text.format for text in IMAGENET["templates"])  # functions of a name, as OpenCLIP's
SIMPLE_IMAGENET_TEMPLATES = tuple(text.format for text in IMAGENET["simple_templates"])
DEFAULT_CONTEXT_LENGTH = 77
__version__ = "3.3.0"  # of OpenCLIP, whose names, arguments and results these are
CODE = "code in weight files never runs here, and weights do not need it"
convert_weights_to_fp16 = convert_weights_to_lp
get_input_dtype = lambda precision: LOW.get(precision)  # noqa: E731
get_cast_dtype = lambda precision: LOW[precision] if precision in ("fp16", "bf16") else None  # noqa: E731
ADDED: dict[str, dict] = {}  # configs that `add_model_config` read
CUSTOM_TEXT = re.compile(r"EVA0|MobileCLIP|PE-Core|ViTamin|.*SigLIP")  # configs with custom_text in OpenCLIP

MODULES = "factory loss model pretrained tokenizer transform zero_shot_classifier zero_shot_metadata".split()
ABSENT = {  # what OpenCLIP exports and MiniCLIP does not have, and why
    **dict.fromkeys(MODULES, "it is one file, without modules: take the names in it from open_clip itself"),
    "CoCaLoss": "train.py --loss coca has it, these calls do not",
    "CustomTextCLIP": "create_model(..., force_custom_text=True) makes such a model",
    "CLIPTextCfg": "text_cfg is a dict, or a miniclip.config.TextConfig",
    "CLIPVisionCfg": "vision_cfg is a dict, or a miniclip.config.VisionConfig",
    "DistillClipLoss": "distillation is `train.py --loss distill`",
    "create_loss": "its argument is OpenCLIP's own command line: use ClipLoss or SigLipLoss",
    "push_to_hf_hub": "use model.miniclip.push_to_hub(repo), or `miniclip push`",
    "push_pretrained_to_hf_hub": "load the model and push it: model.miniclip.push_to_hub(repo)",
    "load_openai_model": "use create_model(name, pretrained='openai'), or miniclip.compat.clip.load",
    "list_openai_models": "use list_pretrained_models_by_tag('openai')",
    "get_pretrained_url": "use get_pretrained_cfg(model, tag)['url']",
    "download_pretrained_from_url": "use download_pretrained(get_pretrained_cfg(model, tag))",
    "is_pretrained_cfg": "use tag in list_pretrained_tags_by_model(model)",
    "get_model_preprocess_cfg": "use model.visual.preprocess_cfg",
    "set_model_preprocess_cfg": "use create_model(..., force_preprocess_cfg=...)",
    "get_model_tokenize_cfg": "use model.context_length and model.vocab_size",
    "build_zero_shot_classifier_legacy": "use build_zero_shot_classifier, which computes the same",
}


def __getattr__(name: str):
    why = f": {ABSENT[name]}" if name in ABSENT else ""
    raise AttributeError(f"miniclip.compat.open_clip has no {name}{why} (docs/compat.md)")


def list_models() -> list[str]:
    """Returns the names of the model configs, numbers in them sorted as numbers."""
    names = {*configs.list_models(), *ADDED}
    return sorted(names, key=lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name.lower())])


def add_model_config(path: str | Path):
    """Makes a config file, or those of a folder, known here by their names. Raises InputError for what is no config."""
    if not (files := sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)]):
        raise InputError(f"{path}: contains no model config (.json)")
    for file in files:
        try:
            ADDED[file.stem] = parse_json(file)
        except (OSError, ValueError) as error:
            raise InputError(f"the model config {file} cannot be read: {error}") from None


def get_model_config(model_name: str) -> dict | None:
    """Returns the config of a name, `hf-hub:org/repo` or `local-dir:/path`; None for an unknown name."""
    if folder := find_folder(model_name):
        return (named_config(folder, None)[0] or load_folder(folder).config).to_dict()
    if model_name in ADDED:
        return copy.deepcopy(ADDED[model_name])
    return parse_json(MODEL_CONFIGS / f"{model_name}.json") if model_name in configs.list_models() else None


def create_model(
    model_name: str, pretrained: str | None = None, load_weights: bool = True, precision: str = "fp32",
    device: str | torch.device = "cpu", jit: bool = False, force_quick_gelu: bool = False,
    force_custom_text: bool = False, force_patch_dropout: float | None = None,
    force_image_size: int | tuple[int, int] | None = None, force_preprocess_cfg: dict | None = None,
    force_context_length: int | None = None, pretrained_image: bool = False, pretrained_text: bool = True,
    pretrained_image_path: str | None = None, pretrained_text_path: str | None = None, cache_dir: str | None = None,
    output_dict: bool | None = None, require_pretrained: bool = False, weights_only: bool = True, **model_kwargs,
) -> CLIP:  # fmt: skip
    """Returns OpenCLIP's model of this name, in training mode as there.

    `model_name` is a config's name, `hf-hub:org/repo` or `local-dir:/path`; `pretrained` a tag or a weight file of any
    layout that MiniCLIP reads. The arguments mean what they mean in OpenCLIP. Raises InputError for those that cannot
    be honoured and for unknown names, and CheckpointError for weights that cannot be used."""
    model_kwargs = model_kwargs.pop("model_kwargs", {}) | model_kwargs
    pretrained_text = model_kwargs.pop("pretrained_hf", pretrained_text)
    refuse("jit", jit, "TorchScript is deprecated: use torch.compile(model), or trace_model(model)")
    refuse("weights_only", not weights_only, CODE)
    refuse("nonscalar_logit_scale", model_kwargs.pop("nonscalar_logit_scale", False), "logit_scale is a scalar")
    refuse("cast_dtype", model_kwargs.pop("cast_dtype", None), "precision decides it")
    output_dict = model_kwargs.pop("output_dict", output_dict)
    config, custom_text, load = find_model(model_name, pretrained, model_kwargs, cache_dir)
    load = load if load_weights else None
    captions = type(config) in MODELS
    refuse(f"precision {precision}", captions and precision in ("fp16", "bf16"), "a decoder takes amp or pure_bf16")
    refuse("require_pretrained", require_pretrained and load is None, f"{model_name} comes without weights: name some")
    refuse("pretrained_image", pretrained_image and not config.vision_cfg.pretrained, "its config names no weights")
    size = None if force_image_size is None else transforms.square(force_image_size, "force_image_size")
    values = config.to_dict()
    if "patch_dropout" not in values["vision_cfg"]:
        refuse("force_patch_dropout", force_patch_dropout, "this image tower drops no patches")
        force_patch_dropout = None
    for section, forced in (
        (values, {"quick_gelu": force_quick_gelu or None}),
        (values["vision_cfg"], {"image_size": size, "patch_dropout": force_patch_dropout}),
        (values["text_cfg"], {"context_length": force_context_length}),
        (values.get("multimodal_cfg", {}), {"context_length": force_context_length}),
        (values["preprocess_cfg"], {"size": size, **(force_preprocess_cfg or {})}),
    ):
        section.update({name: value for name, value in forced.items() if value is not None})
    if size and "channels" in values["vision_cfg"]:  # CoCa's encoder: the width is that of a whole feature map
        values["vision_cfg"]["width"] = None
    model = MiniClip(MiniClipConfig.from_dict(values, model_name))
    if load is not None:
        load(model)
    elif pretrained_image and pretrained_image_path is None:
        model.visual.load_pretrained()
    if load is None and pretrained_text and pretrained_text_path is None:
        model.text.load_pretrained()
    if load is None and not (pretrained_image_path or pretrained_text_path or config.text_cfg.pretrained):
        warnings.warn(f"{model_name} has random weights: no pretrained weights were named", stacklevel=2)
    model = CoCa(model) if captions else CLIP(model, bool(output_dict), custom_text or force_custom_text)
    for path, is_image in ((pretrained_image_path, True), (pretrained_text_path, False)):
        if path is not None:
            load_tower(model, path, is_image)
    set_precision(model, precision)
    return model.to(device)


def refuse(name: str, given, why: str):
    """Raises InputError, which names an argument and the reason, if it is given."""
    if given:
        raise InputError(f"{name} cannot be honoured: {why} (docs/compat.md)")


def find_model(name: str, pretrained: str | None, more: dict, cache_dir: str | None):
    """Returns the config that a name means, with the fields of `more` changed; whether it asks for CustomTextCLIP; and
    a function that loads the weights into a model of such a config, None if there are none."""
    if folder := find_folder(name, cache_dir):
        saved = load_folder(folder)
        if pretrained:
            warnings.warn(f"pretrained {pretrained!r} is ignored: {name} has weights of its own", stacklevel=3)

        def load(model: MiniClip):
            model.load_state_dict(fit_weights(with_bias(saved.state_dict(), model), model.state_dict(), folder))
            if (folder / "tokenizer").is_dir():
                model.text.load_files(folder)
            else:  # in folders of OpenCLIP and transformers
                read_tokenizer_beside(model, folder / "config.json")

        custom_text = (read_json(config_file(folder)).get("model_cfg") or {}).get("custom_text", False)
        return MiniClipConfig.from_dict(saved.config.to_dict() | more, name), custom_text, load
    name = name.replace("/", "-")
    values = get_model_config(name)
    if values is None and not {"embed_dim", "vision_cfg", "text_cfg"} <= more.keys():
        check_model(name)  # which raises, with the nearest names
    values = (values or {}) | more
    custom_text = values.pop("custom_text", name not in ADDED and bool(CUSTOM_TEXT.match(name)))
    config, tag = MiniClipConfig.from_dict(values, name), find_tag(name, pretrained)
    if tag is None:
        return config, custom_text, (lambda model: load_file(model, pretrained)) if pretrained else None
    follow(config, tag, f"{name} {pretrained}")
    return config, custom_text, lambda model: load_file(model, download_pretrained(tag, cache_dir=cache_dir), False)


def with_bias(weights: dict[str, Tensor], model: MiniClip) -> dict[str, Tensor]:
    """The weights; if only the model has a bias of the logits, with one of 0, as in OpenCLIP: their logits stay."""
    if model.logit_bias is None or "logit_bias" in weights:
        return weights
    warnings.warn("the weights have no logit_bias: it is 0, as in OpenCLIP, whatever init_logit_bias", stacklevel=4)
    return weights | {"logit_bias": torch.zeros_like(model.logit_bias)}


def load_file(model: MiniClip, path: str | Path, check_activation: bool = True):
    """Loads a weight file, or that in a folder, into a model."""
    checkpoint = open_checkpoint(path := find_weights(path), model)
    fill(model, checkpoint._replace(weights=with_bias(checkpoint.weights, model)), path, check_activation)


def load_tower(model: CLIP, path: str | Path, is_image: bool):
    """Loads one tower from a file with its own names or a whole model's. Raises CheckpointError if some are missing."""
    file, full, part = read_state_dict(find_weights(path)), model.state_dict(), "visual." if is_image else "text."
    wanted = [key for key in full if key.startswith("visual.") == is_image and not key.startswith("logit_")]
    names = {key: (key, f"text.{key}", key.removeprefix(part)) for key in wanted}
    names = {key: next((name for name in given if name in file), None) for key, given in names.items()}
    known = {*names.values(), *full, *(f"text.{key}" for key in full)}
    missing = [key for key, name in names.items() if name is None]
    unknown = [key for key in file if key not in known and key.rpartition(".")[2] not in HARMLESS]
    if missing or unknown:
        what = f"{path} is not complete as weights of the {'image' if is_image else 'text'} tower"
        raise mismatch(what, missing, unknown)
    model.load_state_dict(full | {key: file[name] for key, name in names.items()})


def load_checkpoint(
    model: CLIP | MiniClip, checkpoint_path: str | Path, strict: bool = True, weights_only: bool = True,
    device: str | torch.device = "cpu",
) -> _IncompatibleKeys:  # fmt: skip
    """Loads a weight file of any known layout into a model. No keys are missing or unexpected: that is an error."""
    refuse("strict", not strict, "parts of a file are for model.load_state_dict(..., strict=False)")
    refuse("weights_only", not weights_only, CODE)
    load_file(model.miniclip if isinstance(model, CLIP) else model, checkpoint_path)
    return _IncompatibleKeys([], [])


def create_model_and_transforms(
    model_name: str, pretrained: str | None = None, load_weights: bool = True, precision: str = "fp32",
    device: str | torch.device = "cpu", jit: bool = False, force_quick_gelu: bool = False,
    force_custom_text: bool = False, force_patch_dropout: float | None = None,
    force_image_size: int | tuple[int, int] | None = None, force_context_length: int | None = None,
    image_mean: tuple[float, ...] | None = None, image_std: tuple[float, ...] | None = None,
    image_interpolation: str | None = None, image_resize_mode: str | None = None,
    aug_cfg: dict | AugmentationCfg | None = None, pretrained_image: bool = False, pretrained_text: bool = True,
    pretrained_image_path: str | None = None, pretrained_text_path: str | None = None, cache_dir: str | None = None,
    output_dict: bool | None = None, weights_only: bool = True, **model_kwargs,
) -> tuple[CLIP, Compose, Compose]:  # fmt: skip
    """Returns `create_model`'s model, and its transforms for training and for evaluation."""
    images = dict(mean=image_mean, std=image_std, interpolation=image_interpolation, resize_mode=image_resize_mode)
    model = create_model(
        model_name, pretrained, load_weights, precision, device, jit, force_quick_gelu, force_custom_text,
        force_patch_dropout, force_image_size, images, force_context_length, pretrained_image, pretrained_text,
        pretrained_image_path, pretrained_text_path, cache_dir, output_dict, weights_only=weights_only, **model_kwargs,
    )  # fmt: skip
    cfg = model.miniclip.config.preprocess_cfg
    return model, image_transform_v2(cfg, is_train=True, aug_cfg=aug_cfg), image_transform_v2(cfg, is_train=False)


def create_model_from_pretrained(
    model_name: str, pretrained: str | None = None, precision: str = "fp32", device: str | torch.device = "cpu",
    jit: bool = False, force_quick_gelu: bool = False, force_custom_text: bool = False,
    force_image_size: int | tuple[int, int] | None = None, force_context_length: int | None = None,
    image_mean: tuple[float, ...] | None = None, image_std: tuple[float, ...] | None = None,
    image_interpolation: str | None = None, image_resize_mode: str | None = None, return_transform: bool = True,
    cache_dir: str | None = None, weights_only: bool = True, **model_kwargs,
) -> CLIP | tuple[CLIP, Compose]:  # fmt: skip
    """Returns a model with weights, and its transform for evaluation unless `return_transform` is false."""
    model, _, transform = create_model_and_transforms(
        model_name, pretrained, True, precision, device, jit, force_quick_gelu, force_custom_text, None,
        force_image_size, force_context_length, image_mean, image_std, image_interpolation, image_resize_mode,
        cache_dir=cache_dir, require_pretrained=True, weights_only=weights_only, **model_kwargs,
    )  # fmt: skip
    return (model, transform) if return_transform else model


class SimpleTokenizer(Tokenizer):
    """CLIP's tokenizer; `decode` shows the start and end tokens, as OpenCLIP's does."""

    def __init__(
        self, bpe_path: str | None = None, additional_special_tokens: list[str] | None = None,
        context_length: int | None = 77, clean: str = "lower", reduction_mask: str = "",
    ):  # fmt: skip
        refuse("bpe_path", bpe_path, "CLIP's merges are part of MiniCLIP")
        refuse("additional_special_tokens", additional_special_tokens, "the vocabulary has the size of CLIP's")
        refuse(f"clean {clean!r}", clean != "lower", "CLIP's models were trained with 'lower'")
        refuse(f"reduction_mask {reduction_mask!r}", reduction_mask, "captions are cut at their end, as in CLIP")
        super().__init__(context_length or DEFAULT_CONTEXT_LENGTH)
        self.all_special_ids = [self.sot_token_id, self.eot_token_id]

    def text_of(self, ids: list[int]) -> str:
        pieces = [*self.vocabulary(), b"<start_of_text>", b"<end_of_text>"]
        return b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace")


def get_tokenizer(
    model_name: str = "", context_length: int | None = None, cache_dir: str | None = None, **kwargs
) -> BaseTokenizer:  # fmt: skip
    """Returns the tokenizer of a model, called with one text or several and, if need be, `context_length`."""
    folder = find_folder(model_name, cache_dir)
    name = f"local-dir:{folder}" if folder else model_name.replace("/", "-")
    if (values := get_model_config(name) if name else {}) is None:
        check_model(name)  # which raises, with the nearest names
    text = values.get("text_cfg", {})
    if any(map(text.get, ("hf_model_name", "hf_model_config", "hf_tokenizer_name"))):
        refuse(", ".join(kwargs), kwargs, "the text tower's own tokenizer has no options")
        values.pop("custom_text", None)
        model = load_folder(folder) if folder else empty_model(MiniClipConfig.from_dict(values, name))
        tokenizer = model.text.tokenizer
        tokenizer.context_length = context_length or tokenizer.context_length
        return tokenizer
    return SimpleTokenizer(context_length=context_length or text.get("context_length"), **kwargs)


TOKENIZER = SimpleTokenizer()


def tokenize(texts: str | list[str], context_length: int = DEFAULT_CONTEXT_LENGTH) -> Tensor:
    """Returns token ids (n, context_length); a text that is too long is cut and keeps its end token."""
    return TOKENIZER(texts, context_length)


def decode(output_ids: Tensor) -> str:
    """Returns the text of one row of ids, with its start and end tokens."""
    return TOKENIZER.decode(output_ids)


def build_zero_shot_classifier(
    model: CLIP, tokenizer: BaseTokenizer, classnames: Sequence[str], templates: Sequence[str | Callable],
    num_classes_per_batch: int | None = 10, device: str | torch.device = "cpu", use_tqdm: bool = False,
) -> Tensor:  # fmt: skip
    """Returns the unit vectors of classes as columns, (embed_dim, num_classes), in the model's precision."""
    how = classnames, templates, num_classes_per_batch, device, use_tqdm
    return zero_shot.build_zero_shot_classifier(full_precision(model), tokenizer, *how).to(model.dtype)


class ClipLoss(nn.Module):
    """Symmetric InfoNCE. Each process returns the loss of its rows against all: local_loss, gather_with_grad."""

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0,
        world_size: int = 1, use_horovod: bool = False,
    ):  # fmt: skip
        super().__init__()
        refuse("use_horovod", use_horovod, "processes talk through torch.distributed")
        apart = world_size > 1 and not (local_loss and gather_with_grad)
        refuse("local_loss or gather_with_grad False", apart, "only with both are gradients those of the whole batch")

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict: bool = False):
        loss = clip_loss(image_features, text_features, torch.as_tensor(logit_scale))  # a bias would change no softmax
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """SigLIP's sigmoid loss. Each process compares its images with all texts, whichever way `dist_impl` names."""

    def __init__(self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None):
        super().__init__()
        known = "bidir", "shift", "reduce", "gather"
        refuse(f"dist_impl {dist_impl!r}", dist_impl not in (None, *known), f"it is none of {', '.join(known)}")

    def forward(self, image_features, text_features, logit_scale, logit_bias, output_dict: bool = False):
        scale, bias = map(torch.as_tensor, (logit_scale, 0.0 if logit_bias is None else logit_bias))
        loss = siglip_loss(ClipOutput(image_features, text_features, scale, bias))
        return {"contrastive_loss": loss} if output_dict else loss


def trace_model(model: CLIP, batch_size: int = 256, device: str | torch.device = "cpu") -> torch.jit.ScriptModule:
    """Returns the TorchScript of a model's forward, encode_image and encode_text."""
    model.eval()
    image = torch.ones(batch_size, 3, model.visual.image_size, model.visual.image_size, device=device)
    text = torch.zeros(batch_size, model.context_length, dtype=torch.int, device=device)
    inputs = {"forward": (image, text), "encode_text": (text,), "encode_image": (image,)}
    return torch.jit.trace_module(model, inputs, check_trace=False, strict=False)  # which lets CoCa return its dict
