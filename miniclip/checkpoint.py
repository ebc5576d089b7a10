"""How do anyone's CLIP weights become ours, and back?

Everybody stores the same tensors under other names. One table gives the names side by side; read in one direction it
loads, in the other it exports. A tensor without a row and a row without its tensor both raise, so that nothing is left
out, or left random, in silence. `weight_files.py` reads the files, `convert.py` writes them:

    python -m miniclip convert ViT-B-32.pt clip-vit-base-patch32 --to hf
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from miniclip.utils.errors import CheckpointError
from miniclip.utils.weight_files import shorten

# {v}, {t}: prefix of the image and the text tower. {b}: prefix of a block, of both. {s}: name of the scale. {p}: weight
# and bias. {qkv}: each of q, k and v. Behind the bar: the operation that makes our tensor from theirs.
ROWS = [
    # MiniCLIP                     OpenAI, OpenCLIP                    Hugging Face
    ("logit_scale",                "{s} | scalar",                     "logit_scale | scalar"),
    ("{v}conv1.weight",            "{v}conv1.weight",                  "{v}embeddings.patch_embedding.weight"),
    ("{v}class_embedding",         "{v}class_embedding",               "{v}embeddings.class_embedding"),
    ("{v}positional_embedding",    "{v}positional_embedding",          "{v}embeddings.position_embedding.weight"),
    ("{v}ln_pre.{p}",              "{v}ln_pre.{p}",                    "{v}pre_layrnorm.{p}"),  # sic
    ("{v}ln_post.{p}",             "{v}ln_post.{p}",                   "{v}post_layernorm.{p}"),
    ("{v}proj.weight",             "{v}proj | transpose",              "visual_projection.weight"),
    ("{t}token_embedding.weight",  "{t}token_embedding.weight",        "{t}embeddings.token_embedding.weight"),
    ("{t}positional_embedding",    "{t}positional_embedding",          "{t}embeddings.position_embedding.weight"),
    ("{t}ln_final.{p}",            "{t}ln_final.{p}",                  "{t}final_layer_norm.{p}"),
    ("{t}text_projection.weight",  "{t}text_projection | transpose",   "text_projection.weight"),
    ("{b}ln_1.{p}",                "{b}ln_1.{p}",                      "{b}layer_norm1.{p}"),
    ("{b}attn.in_proj.{p}",        "{b}attn.in_proj_{p}",              "{b}self_attn.{qkv}_proj.{p} | fuse_qkv"),
    ("{b}attn.out_proj.{p}",       "{b}attn.out_proj.{p}",             "{b}self_attn.out_proj.{p}"),
    ("{b}ln_2.{p}",                "{b}ln_2.{p}",                      "{b}layer_norm2.{p}"),
    ("{b}mlp.c_fc.{p}",            "{b}mlp.c_fc.{p}",                  "{b}mlp.fc1.{p}"),
    ("{b}mlp.c_proj.{p}",          "{b}mlp.c_proj.{p}",                "{b}mlp.fc2.{p}"),
]  # fmt: skip
OPERATIONS = {  # (their tensors -> ours, ours -> theirs)
    "": (lambda tensors: tensors, lambda tensors: tensors),
    "transpose": (lambda tensors: [tensors[0].mT], lambda tensors: [tensors[0].mT]),  # x @ matrix against nn.Linear
    "fuse_qkv": (lambda tensors: [torch.cat(tensors)], lambda tensors: tensors[0].chunk(3)),  # first q, then k, then v
    "scalar": (lambda tensors: [tensors[0].squeeze()], lambda tensors: tensors),  # some files have the shape (1,)
}


def make_layout(
    visual: str, text: str, scale: str = "logit_scale", blocks: str = "transformer.resblocks", column: int = 1
) -> dict[str, tuple[str, str]]:
    """One source's rules, {our name: (their name, operation)}, from its prefixes and its column of the table. In the
    names {i}, the number of a block, {p} and {qkv} are left: `_rename` fills them in. For OpenCLIP, among others:

    "text.blocks.{i}.attn.in_proj.{p}": ("transformer.resblocks.{i}.attn.in_proj_{p}", "")
    "visual.proj.weight": ("visual.proj", "transpose")
    """
    rules, later = {}, {"p": "{p}", "qkv": "{qkv}"}
    for row in ROWS:
        name, _, operation = row[column].partition(" | ")
        for tower, our_tower in ((visual, "visual."), (text, "text.")):  # the rows of a block stand for both towers
            theirs = name.format(v=visual, t=text, s=scale, b=f"{tower}{blocks}.{{i}}.", **later)
            rules[row[0].format(v="visual.", t="text.", b=our_tower + "blocks.{i}.", **later)] = theirs, operation
    return rules


LAYOUTS = {
    "miniclip": make_layout("visual.", "text.", blocks="blocks", column=0),
    "openclip": make_layout("visual.", ""),  # and OpenAI, and TinyCLIP's releases
    "custom_text": make_layout("visual.", "text."),  # OpenCLIP's CustomTextCLIP
    "tinyclip": make_layout("_image_encoder.visual.", "_text_encoder.", "_logit_scale.logit_scale"),
    "article": make_layout("image_encoder.visual.", "text_encoder.", "logit_scale.logit_scale"),
    "hf": make_layout("vision_model.", "text_model.", blocks="encoder.layers", column=2),  # transformers' CLIPModel
}
HARMLESS = {  # last parts of keys that hold no weights
    "input_resolution", "context_length", "vocab_size",  # sizes, in OpenAI's archives
    "attn_mask", "position_ids",  # constants, which older versions of OpenCLIP and of transformers stored
}  # fmt: skip
UNLOADABLE = [  # (what one of the keys begins with, why); the first that applies is reported
    (r"(.*\.)?l0_module\.|image_encoder_without_ddp\.",
     "a TinyCLIP 'auto' file, pruned to blocks of different sizes; take one of TinyCLIP's manual ViT files"),
    (r"(.*\.)?visual\.trunk\.",
     "its image tower comes from timm or transformers; only OpenAI's vision transformer can be loaded"),
    (r"(.*\.)?visual\.layer1\.", "its image tower is a ModifiedResNet (RN50); only vision transformers can be loaded"),
    (r"embeddings\.|encoder\.layers\.", "one tower alone, of a Hugging Face model; save the whole CLIPModel"),
]  # fmt: skip


def detect_source(keys: Iterable[str]) -> str:
    """Names the layout (see `LAYOUTS`) of a state dict, or raises CheckpointError with the reason why it has none."""
    keys = sorted(keys)
    if "logit_bias" in keys and any(re.match(r"(visual\.trunk|vision_model)\.", key) for key in keys):
        raise CheckpointError("a SigLIP model, whose towers are others than CLIP's (it holds 'logit_bias')")
    for pattern, reason in UNLOADABLE:
        if found := next(filter(re.compile(pattern).match, keys), None):
            raise CheckpointError(f"{reason} (it holds {found!r})")
    towers = {"text_model", "vision_model"} & {key.partition(".")[0] for key in keys}
    if len(towers) == 1:
        raise CheckpointError(f"one tower alone ({towers.pop()}), of a Hugging Face model; save the whole CLIPModel")
    for source, rules in LAYOUTS.items():  # no two of them agree on the name of the text tower's first block
        if rules["text.blocks.{i}.ln_1.{p}"][0].format(i=0, p="weight") in keys:
            return source
    raise CheckpointError(f"its layout is none of {', '.join(LAYOUTS)}; its keys: {shorten(keys)}")


def to_miniclip(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Gives the weights under MiniCLIP's names, and the name of the layout that they came in. Raises CheckpointError
    for a layout that is not known, for missing and left-over keys and for pruned blocks."""
    weights = {}
    for key, tensor in state_dict.items():
        # DistributedDataParallel and torch.compile put a part of their own into the path, at any depth
        path = [part for part in key.split(".") if part not in ("module", "_orig_mod")]
        if path[-1] not in HARMLESS and weights.setdefault(".".join(path), tensor) is not tensor:
            raise CheckpointError(f"it holds {'.'.join(path)} twice, with and without a wrapper's prefix")
    source, first = detect_source(weights), {}
    for key, tensor in weights.items():
        if block := re.fullmatch(r"(.+)\.\d+\.(.+)", key):
            name, shape = first.setdefault(block.groups(), (key, tensor.shape))
            if tensor.shape != shape:
                sizes = f"{name} is {tuple(shape)}, {key} is {tuple(tensor.shape)}"
                raise CheckpointError(f"its blocks differ in size, as in TinyCLIP's pruned 'auto' files: {sizes}")
    return _rename(weights, source, export=False), source


def from_miniclip(state_dict: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The inverse of `to_miniclip`: the weights as `layout` names and shapes them, each a copy of its own."""
    renamed = _rename(state_dict, layout, export=True)
    return {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in renamed.items()}


def _rename(state_dict: dict[str, Tensor], layout: str, export: bool, part: str = "") -> dict[str, Tensor]:
    left, renamed, missing = dict(state_dict), {}, []
    if "logit_bias" in left and layout in ("openclip", "miniclip"):  # models for SigLIP's loss have one
        renamed["logit_bias"] = left.pop("logit_bias").squeeze()
    for ours, (theirs, operation) in LAYOUTS[layout].items():
        if not ours.startswith(part):
            continue
        blocks = re.compile(re.escape((ours if export else theirs).partition("{i}")[0]) + r"(\d+)\.")
        numbers = {found[1] for found in map(blocks.match, state_dict) if found}  # none where the row is not a block's
        for i in range(len(numbers) or 1):
            for p in ("weight", "bias") if "{p}" in ours else ("",):
                old = [theirs.format(i=i, p=p, qkv=letter) for letter in ("qkv" if "{qkv}" in theirs else "-")]
                old, new = ([ours.format(i=i, p=p)], old) if export else (old, [ours.format(i=i, p=p)])
                missing += (absent := [key for key in old if key not in left])
                if not absent:
                    tensors = OPERATIONS[operation][export]([left.pop(key) for key in old])
                    renamed |= zip(new, tensors, strict=True)
    if missing or left:
        raise CheckpointError(f"not complete as {layout} weights: missing {shorten(missing)}; unknown {shorten(left)}")
    return renamed
