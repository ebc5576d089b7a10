"""Conversion of weights into the form of another library."""

import warnings
from collections.abc import Callable
from pathlib import Path

from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import replacing
from miniclip.utils.local_copy import localised
from miniclip.utils.model_folder import load_state_dict
from miniclip.utils.weight_files import find_weights
from miniclip.weights.layouts import open_layout
from miniclip.weights.load import ACTIVATION_NAMES, empty_model, fit_weights, infer_config, read_tokenizer_beside
from miniclip.weights.pretrained import download_pretrained, find_folder, find_tag, follow
from miniclip.weights.to_huggingface import write_hf, write_sentence_transformers
from miniclip.weights.to_openclip import SUFFIXES, write_openclip


def convert(source: str | Path, target: str | Path, to: str, model: str | None = None, force: bool = False) -> str:
    """Writes weights in another library's form, atomically, and returns a sentence on what it did.

    `source` is a weight file of any known layout, a folder of MiniCLIP, transformers or OpenCLIP, the name of one
    (`hf-hub:org/repo`), or a tag of `model`; `to` is a key of EXPORTERS, each of which warns of what its form cannot
    hold. The model config, which folders need for the activation, is `model` (a name or a .json file), the one in the
    folder of `source`, or the only shipped one that fits. Raises CheckpointError for weights that cannot be used or an
    unclear config, InputError for what cannot be downloaded, and FileExistsError if `target` exists, unless `force`."""
    target = Path(target)
    if to not in EXPORTERS:
        raise InputError(f"cannot convert to {to!r}, only to {', '.join(EXPORTERS)}")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already: choose another name, or add --force")
    source = localised(source)
    tag = find_tag(model, source) if model else None
    source = download_pretrained(tag) if tag else find_weights(find_folder(source) or source)
    config, reason, checkpoint = open_layout(source, model)
    if tag:
        follow(config, tag, model)
    if config is None and (to != "openclip" or target.suffix not in SUFFIXES):  # such files do not contain the config
        raise CheckpointError(f"{source}: {reason}: name one with --model")
    name = "" if config is None else f", {ACTIVATION_NAMES[config.quick_gelu]}"
    sizes = config or MiniClipConfig.from_dict(infer_config(checkpoint.weights))
    if "logit_bias" in checkpoint.weights:  # trained with SigLIP's loss
        sizes.init_logit_bias = checkpoint.weights["logit_bias"].item()
    network = empty_model(sizes)
    weights = fit_weights(checkpoint.weights, network.state_dict(), source)
    if config and checkpoint.quick_gelu not in (None, config.quick_gelu):
        trained = f"{source} was trained with {ACTIVATION_NAMES[checkpoint.quick_gelu]} ({checkpoint.evidence})"
        warnings.warn(f"{trained}, the config says {ACTIVATION_NAMES[config.quick_gelu]}", stacklevel=2)
    if len({t.dtype for t in weights.values() if t.is_floating_point()}) > 1:  # OpenAI's; others have one precision
        weights = {key: t.float() if t.is_floating_point() else t for key, t in weights.items()}
    load_state_dict(network, weights, source)
    if (source.parent / "tokenizer").is_dir():
        network.text.load_files(source.parent)
    read_tokenizer_beside(network, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as scratch:
        EXPORTERS[to](scratch, network)
        if target.exists() and target.is_dir() != scratch.is_dir():
            kinds = ["a folder" if path.is_dir() else "a file" for path in (target, scratch)]
            raise FileExistsError(f"{target} exists already, and is {kinds[0]}, not {kinds[1]}: choose another name")
    return f"{source} ({checkpoint.source} layout{name}) -> {target} ({to}); {reason}"


EXPORTERS: dict[str, Callable[[Path, MiniClip], None]] = {  # each writes a new file or folder
    "openclip": write_openclip, "hf": write_hf, "sentence-transformers": write_sentence_transformers,
    "miniclip": lambda path, model: model.save_pretrained(path),
}  # fmt: skip
