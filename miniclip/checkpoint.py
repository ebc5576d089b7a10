"""How do anyone's CLIP weights become ours, and back?

Everybody stores the same tensors under other names. One table lists the names side by side; read in one direction it
loads, in the other it exports. A tensor without a row and a row without its tensor both raise, so nothing is dropped or
left random without a word. A tower of another kind brings its own rows (`Tower.key_rows`).

    python -m miniclip convert ViT-B-32.pt clip-vit-base-patch32 --to hf
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.utils.errors import CheckpointError
from miniclip.utils.weight_files import shorten

# {t}: prefix of the tower. {b}: prefix of block {i}. {p}: weight and bias. {qkv}: each of q, k and v. Behind the bar:
# the operation that makes our tensor from theirs.
BLOCK_ROWS = [  # of both towers
    # MiniCLIP                     OpenAI, OpenCLIP                    Hugging Face
    ("{b}ln_1.{p}",                "{b}ln_1.{p}",                      "{b}layer_norm1.{p}"),
    ("{b}attn.in_proj.{p}",        "{b}attn.in_proj_{p}",              "{b}self_attn.{qkv}_proj.{p} | fuse_qkv"),
    ("{b}attn.out_proj.{p}",       "{b}attn.out_proj.{p}",             "{b}self_attn.out_proj.{p}"),
    ("{b}ln_2.{p}",                "{b}ln_2.{p}",                      "{b}layer_norm2.{p}"),
    ("{b}mlp.c_fc.{p}",            "{b}mlp.c_fc.{p}",                  "{b}mlp.fc1.{p}"),
    ("{b}mlp.c_proj.{p}",          "{b}mlp.c_proj.{p}",                "{b}mlp.fc2.{p}"),
]  # fmt: skip
IMAGE_ROWS = [
    ("{t}conv1.weight",            "{t}conv1.weight",                  "{t}embeddings.patch_embedding.weight"),
    ("{t}class_embedding",         "{t}class_embedding",               "{t}embeddings.class_embedding"),
    ("{t}positional_embedding",    "{t}positional_embedding",          "{t}embeddings.position_embedding.weight"),
    ("{t}ln_pre.{p}",              "{t}ln_pre.{p}",                    "{t}pre_layrnorm.{p}"),  # sic
    ("{t}ln_post.{p}",             "{t}ln_post.{p}",                   "{t}post_layernorm.{p}"),
    ("{t}proj.weight",             "{t}proj | transpose",              "visual_projection.weight"),
    *BLOCK_ROWS,
]  # fmt: skip
TEXT_ROWS = [
    ("{t}token_embedding.weight",  "{t}token_embedding.weight",        "{t}embeddings.token_embedding.weight"),
    ("{t}positional_embedding",    "{t}positional_embedding",          "{t}embeddings.position_embedding.weight"),
    ("{t}ln_final.{p}",            "{t}ln_final.{p}",                  "{t}final_layer_norm.{p}"),
    ("{t}text_projection.weight",  "{t}text_projection | transpose",   "text_projection.weight"),
    *BLOCK_ROWS,
]  # fmt: skip
CLIP_ROWS = IMAGE_ROWS, TEXT_ROWS
BLOCKS = "blocks", "transformer.resblocks", "encoder.layers"  # where each column of the table has the blocks
OPERATIONS = {  # (their tensors -> ours, ours -> theirs)
    "": (lambda tensors: tensors, lambda tensors: tensors),
    "transpose": (lambda tensors: [tensors[0].mT], lambda tensors: [tensors[0].mT]),  # x @ matrix against nn.Linear
    "fuse_qkv": (lambda tensors: [torch.cat(tensors)], lambda tensors: tensors[0].chunk(3)),  # first q, then k, then v
    "scalar": (lambda tensors: [tensors[0].squeeze()], lambda tensors: tensors),  # some files have the shape (1,)
}


class Layout(NamedTuple):
    """Where a source has its tensors: prefixes of the towers, name of the scale, column of the table."""

    image: str
    text: str
    scale: str = "logit_scale"
    column: int = 1
    bias: str | None = "logit_bias"  # of models for SigLIP's loss, which need not have one; None: cannot have one


LAYOUTS = {
    "miniclip": Layout("visual.", "text.", column=0),
    "openclip": Layout("visual.", ""),  # and OpenAI, and TinyCLIP's releases
    "custom_text": Layout("visual.", "text."),  # OpenCLIP's CustomTextCLIP
    "tinyclip": Layout("_image_encoder.visual.", "_text_encoder.", "_logit_scale.logit_scale", bias=None),
    "article": Layout("image_encoder.visual.", "text_encoder.", "logit_scale.logit_scale", bias=None),
    "hf": Layout("vision_model.", "text_model.", column=2, bias=None),  # transformers' CLIPModel
}
HARMLESS = {  # last parts of keys that hold no weights
    "input_resolution", "context_length", "vocab_size",  # sizes, in OpenAI's archives
    "attn_mask", "position_ids",  # constants, which older versions of OpenCLIP and of transformers stored
}  # fmt: skip
HINTS = [  # (how an unknown key begins, what that tells)
    (r"(.*\.)?l0_module\.|image_encoder_without_ddp\.",
     "a TinyCLIP 'auto' file, pruned to blocks of different sizes; take one of TinyCLIP's manual ViT files"),
    (r"(.*\.)?visual\.trunk\.",
     "its image tower comes from timm (as SigLIP's does) or transformers, the model's does not"),
    (r"(.*\.)?visual\.layer1\.", "its image tower is a ModifiedResNet (RN50), the model's is not"),
    (r"(vision|text)_model\.", "a Hugging Face model with other towers than CLIPModel's, as SigLIP has"),
    (r"embeddings\.|encoder\.layers\.", "one tower alone, of a Hugging Face model; save the whole CLIPModel"),
]  # fmt: skip


def make_layout(layout: str, rows=CLIP_ROWS) -> dict[str, tuple[str, str]]:
    """One source's rules, {our name: (their name, operation)}, from the rows of an image and a text tower. {i}, {p} and
    {qkv} are left in the names. For OpenCLIP, among others:

    "text.blocks.{i}.attn.in_proj.{p}": ("transformer.resblocks.{i}.attn.in_proj_{p}", "")
    "visual.proj.weight": ("visual.proj", "transpose")
    """
    image, text, scale, column, bias = LAYOUTS[layout]
    rules = {"logit_scale": (scale, "scalar")} | ({"logit_bias": (bias, "scalar")} if bias else {})
    for tower, prefix, tower_rows in zip(("visual.", "text."), (image, text), rows):
        for row in tower_rows:
            name, _, operation = row[column].partition(" | ")
            ours, theirs = (
                pattern.replace("{b}", f"{{t}}{blocks}.{{i}}.").replace("{t}", start)
                for pattern, blocks, start in ((row[0], BLOCKS[0], tower), (name, BLOCKS[column], prefix))
            )
            rules[ours] = theirs, operation
    return rules


def to_miniclip(state_dict: dict[str, Tensor], rows=CLIP_ROWS) -> tuple[dict[str, Tensor], str]:
    """Returns the weights under MiniCLIP's names, and the name of the layout that they came in. `rows` are those of the
    model's two towers. Raises CheckpointError for an unknown layout, for missing, unknown and duplicate keys and for
    pruned blocks."""
    weights, first = {}, {}
    for key, tensor in state_dict.items():
        # DistributedDataParallel and torch.compile put a part of their own into the path, at any depth
        path = [part for part in key.split(".") if part not in ("module", "_orig_mod")]
        if path[-1] not in HARMLESS and weights.setdefault(".".join(path), tensor) is not tensor:
            raise CheckpointError(f"it holds {'.'.join(path)} twice, with and without a wrapper's prefix")
    known = {  # how many of the keys each layout has; the scale is no sign, it has the same name in many
        layout: sum(key in weights for old, new, _ in pair_names(make_layout(layout, rows), weights, export=False)
                    if not new[0].startswith("logit_") for key in old)
        for layout in LAYOUTS
    }  # fmt: skip
    source = max(known, key=known.get)
    if not known[source]:
        hints = "".join(f": {hint}" for hint in find_hints(weights))
        raise CheckpointError(
            f"its layout is none of {', '.join(LAYOUTS)}{hints}; its keys: {shorten(sorted(weights))}"
        )
    renamed = rename(weights, source, rows, export=False)
    for key, tensor in renamed.items():
        if block := re.fullmatch(r"(\w+\.blocks)\.\d+\.(.+)", key):
            name, shape = first.setdefault(block.groups(), (key, tensor.shape))
            if tensor.shape != shape:
                sizes = f"{name} is {tuple(shape)}, {key} is {tuple(tensor.shape)}"
                raise CheckpointError(f"its blocks differ in size, as in TinyCLIP's pruned 'auto' files: {sizes}")
    return renamed, source


def from_miniclip(state_dict: dict[str, Tensor], layout: str, rows=CLIP_ROWS) -> dict[str, Tensor]:
    """The inverse of `to_miniclip`: the weights as `layout` names and shapes them, each a copy of its own."""
    renamed = rename(state_dict, layout, rows, export=True)
    return {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in renamed.items()}


def pair_names(rules: dict, names: Iterable[str], export: bool) -> Iterator[tuple[list[str], list[str], str]]:
    """The rules for a state dict of these names, block by block: (old names, new names, operation)."""
    counts = {}
    for ours, (theirs, operation) in rules.items():
        start, per_block, _ = (ours if export else theirs).partition("{i}")
        if per_block and start not in counts:
            counts[start] = len({name[len(start) :].partition(".")[0] for name in names if name.startswith(start)})
        for i in range(counts[start] or 1) if per_block else (0,):
            for p in ("weight", "bias") if "{p}" in ours else ("",):
                ours_p, theirs_p = (name.replace("{i}", str(i)).replace("{p}", p) for name in (ours, theirs))
                parts = [theirs_p.replace("{qkv}", letter) for letter in ("qkv" if "{qkv}" in theirs else "-")]
                yield ([ours_p], parts, operation) if export else (parts, [ours_p], operation)


def rename(state_dict: dict[str, Tensor], layout: str, rows, export: bool) -> dict[str, Tensor]:
    """The weights under their new names. Raises CheckpointError for missing and unknown keys."""
    left, renamed, missing = dict(state_dict), {}, []
    for old, new, operation in pair_names(make_layout(layout, rows), state_dict, export):
        if absent := [key for key in old if key not in left]:
            missing += [key for key in absent if key != "logit_bias"]
        else:
            tensors = OPERATIONS[operation][export]([left.pop(key) for key in old])
            renamed |= zip(new, tensors, strict=True)
    if missing or left:
        hints = find_hints(left)
        if not export and not all(any(key.startswith(tower) for key in renamed) for tower in ("visual.", "text.")):
            hints.append("one tower alone; save the whole model")
        reason = f"missing {shorten(missing)}; unknown {shorten(left)}"
        raise CheckpointError(": ".join([f"not complete as {layout} weights", *hints, reason]))
    return renamed


def find_hints(unknown: Iterable[str]) -> list[str]:
    """The first hint that applies to unknown keys, with the key that it is about; none where none does."""
    found = ((key, hint) for pattern, hint in HINTS for key in sorted(unknown) if re.match(pattern, key))
    return [f"{hint} (it holds {key!r})" for key, hint in found][:1]
