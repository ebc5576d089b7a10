"""Published weights by name: OpenCLIP's model names and tags, and TinyCLIP's, from `pretrained.json`.

    miniclip.load("ViT-B-32", pretrained="laion2b_s34b_b79k")
    miniclip.load("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K")

The file says for each tag what is published: the repository on the Hugging Face hub, the address of a single file with
its sha256 (or the first digits of it), the activation, and the preprocessing where it is not OpenAI's. Each tag of
QuickGELU weights is also one of the config whose name ends in `-quickgelu`, if there is one."""

import functools
import json
import logging
import re
from pathlib import Path

from miniclip.config import MiniClipConfig, PreprocessConfig, list_models
from miniclip.utils.command_line import closest
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.weight_files import find_weights
from miniclip.weights.hub import download_repo, download_url

HUB, LOCAL, QUICK = "hf-hub:", "local-dir:", "-quickgelu"
IMAGES = ("mean", "std", "interpolation", "resize_mode")  # the preprocessing that a tag settles
WHERE = "`miniclip pretrained` and miniclip.list_pretrained() list published weights"
logger = logging.getLogger(__name__)


@functools.cache
def registry() -> tuple[dict[str, dict[str, dict]], dict[str, str]]:
    """{model: {tag: facts}}, and {pattern of OpenCLIP's other model names: the towers that they need}."""
    values = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    weights, usual = {}, PreprocessConfig()
    for model, tags in values["weights"].items():
        for tag, facts in tags.items():
            images = {name: facts.get(name, getattr(usual, name)) for name in IMAGES}
            known = {"hf_hub": "", "url": "", "sha256": "", "size": None, "quick_gelu": False}
            weights.setdefault(model, {})[tag] = known | facts | images
    for model, tags in list(weights.items()):
        quick = {tag: facts for tag, facts in tags.items() if facts["quick_gelu"]}
        if quick and model + QUICK in list_models():
            weights[model + QUICK] = quick
    return weights, values["missing"]


def list_pretrained(as_str: bool = False) -> list:
    """Returns the pairs (model, tag) of all published weights that are known, or strings "model:tag"."""
    pairs = [(model, tag) for model, tags in registry()[0].items() for tag in tags]
    return [":".join(pair) for pair in pairs] if as_str else pairs


def list_pretrained_tags_by_model(model: str) -> list[str]:
    """Returns the tags of a model's published weights; none for an unknown model."""
    return list(registry()[0].get(model, ()))


def list_pretrained_models_by_tag(tag: str) -> list[str]:
    """Returns the models that have published weights with this tag."""
    return [model for model, tags in registry()[0].items() if clean(tag) in tags]


def clean(tag: str) -> str:
    """Returns a tag as the registry writes it: OpenCLIP takes capitals and dashes too."""
    return str(tag).lower().replace("-", "_")


def get_pretrained_cfg(model: str, tag: str) -> dict:
    """Returns what is known about published weights: `hf_hub` (a repository, "" if there is none), `url`, `sha256` (all
    or the first digits, "" if it is not published), `size` (bytes, None if not published), `quick_gelu`, `mean`, `std`,
    `interpolation` and `resize_mode`. Raises InputError for an unknown model or tag, with the nearest."""
    check_model(model)
    tags = registry()[0].get(model, {})
    if clean(tag) not in tags:
        raise InputError(f"{tag!r} is not known: {why_no_tag(model, tag)}")
    return dict(tags[clean(tag)])


def why_no_tag(model: str, tag: str) -> str:
    """Says that a tag is not one of a model, and which models have it or which tags are the nearest."""
    if not (tags := list_pretrained_tags_by_model(model)):
        return f"{model} has no tags; {WHERE}"
    models = ", ".join(list_pretrained_models_by_tag(tag))
    near = f"it is one of {models}" if models else f"nearest: {closest(clean(tag), tags)}"
    return f"it is not a tag of {model}; {near} (`miniclip pretrained {model}` lists all)"


def download_pretrained(cfg: dict, prefer_hf_hub: bool = True, cache_dir: str | Path | None = None) -> Path:
    """Returns the weight file that `get_pretrained_cfg` describes, downloaded unless the cache has it: from the hub, or
    from its plain address if there is no repository or the hub fails. Raises InputError if it cannot be had."""
    ways = [
        lambda: find_weights(download_repo(cfg["hf_hub"].rstrip("/"), cache_dir=cache_dir)),
        lambda: download_url(cfg["url"], cfg.get("sha256", ""), cfg.get("size"), cache_dir),
    ]
    ways = [way for way, name in zip(ways, ("hf_hub", "url")) if cfg.get(name)]
    problems = []
    for way in ways if prefer_hf_hub else ways[::-1]:
        if problems:
            logger.warning("%s. The other source is tried", problems[0])
        try:
            return way()
        except InputError as error:
            problems.append(str(error))
    raise InputError("; and ".join(problems) or "these weights have neither a repository nor an address")


def is_folder(name: str | Path | None) -> bool:
    """Whether a model's name means a folder, here or on the hub, and not a config."""
    return str(name or "").startswith((HUB, LOCAL)) or Path(name or "").is_dir() and bool(name)


def find_folder(name: str | Path, cache_dir: str | Path | None = None) -> Path | None:
    """Returns the folder that a model's name means, downloaded for `hf-hub:org/repo` and `hf-hub:org/repo@revision`;
    None for a config's name or file. Raises InputError for a folder or repository that cannot be had."""
    text = str(name)
    if text.startswith(HUB):
        repo, _, revision = text.removeprefix(HUB).partition("@")
        return download_repo(repo, revision or None, cache_dir)
    if text.startswith(LOCAL) and not Path(text.removeprefix(LOCAL) or "?").is_dir():
        raise InputError(f"{text}: there is no such folder")
    folder = Path(text.removeprefix(LOCAL))
    return folder if text and folder.is_dir() else None


def check_model(name: str | Path):
    """Raises InputError for a model's name that means nothing, without any download."""
    name = str(name)
    if is_folder(name) or name.endswith(".json") or name in list_models():
        return
    if not name:
        raise InputError("the name of the model is empty: name a folder, hf-hub:org/repo or one of list_models()")
    if Path(name).is_file():
        raise InputError(f"{name} is a file of weights: name the model's config first, and the file as `pretrained`")
    for pattern, towers in registry()[1].items():
        if re.match(pattern, name):
            raise InputError(f"{name} cannot be built: MiniCLIP does not have {towers}; {WHERE}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(("ViT-", ".")):
        raise InputError(f"there is no folder {name}. If it is a repository on the hub, name it {HUB}{name}")
    try:
        MiniClipConfig.from_name(name)
    except InputError as error:
        raise InputError(f"{error}; {WHERE}") from None


def find_tag(model: str | Path, pretrained: str | Path | None) -> dict | None:
    """Returns the registry's entry if `pretrained` is a tag of the model; None for the path of existing weights, for a
    folder's name, and for None or "". Raises InputError, with the nearest tag, for anything else."""
    model, name = str(model), str(pretrained or "")
    if not name or is_folder(name) or Path(name).exists():
        return None
    if clean(name) in list_pretrained_tags_by_model(model):
        return get_pretrained_cfg(model, name)
    problem = f"there is no file or folder {name!r}"
    if "/" in name or name.endswith((".pt", ".bin", ".safetensors")):  # a path, and no misspelt tag
        raise CheckpointError(problem)
    raise CheckpointError(f"{problem}, and {why_no_tag(model, name)}")


def prefetch(model: str | Path, pretrained: str | Path | None = None) -> Path | None:
    """Downloads what `miniclip.load` would download, and returns the weight file; None if all of it is here anyway."""
    if facts := find_tag(model, pretrained):
        return download_pretrained(facts)
    files = [find_weights(find_folder(name)) for name in (pretrained, model) if str(name or "").startswith(HUB)]
    return files[0] if files else None


def follow(config: MiniClipConfig, facts: dict, name: str):
    """Gives a config the activation and the preprocessing of published weights, and says so if they were others."""
    images, changed = config.preprocess_cfg, []
    if config.quick_gelu != facts["quick_gelu"]:
        config.quick_gelu = facts["quick_gelu"]
        changed.append("QuickGELU" if config.quick_gelu else "GELU")
    for field in IMAGES:
        value = tuple(facts[field]) if isinstance(facts[field], list) else facts[field]
        if getattr(images, field) != value:
            setattr(images, field, value)
            changed.append(f"{field} {value}")
    if changed:
        said = ", ".join(changed)
        logger.warning("%s: as these weights were trained, with %s, other than the config says", name, said)
