"""How do anyone's CLIP weights become ours, and back?

Everybody stores the same tensors under other names. One table lists the names side by side; read in one direction it
loads, in the other it exports. A tensor without a row and a row without its tensor both raise, so nothing is dropped or
left random without a word. A tower of another kind brings its own rows (`Tower.key_rows`)."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from miniclip.utils.errors import CheckpointError
from miniclip.utils.weight_files import mismatch

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
LAYOUTS = {  # column of the table, prefix of the image tower, of the text tower, name of the scale
    "miniclip": (0, "visual.", "text.", "logit_scale"),
    "openclip": (1, "visual.", "", "logit_scale"),  # and OpenAI, and TinyCLIP's releases
    "custom_text": (1, "visual.", "text.", "logit_scale"),  # OpenCLIP's CustomTextCLIP
    "tinyclip": (1, "_image_encoder.visual.", "_text_encoder.", "_logit_scale.logit_scale"),
    "article": (1, "image_encoder.visual.", "text_encoder.", "logit_scale.logit_scale"),
    "hf": (2, "vision_model.", "text_model.", "logit_scale"),  # transformers' CLIPModel
}
WITH_BIAS = "miniclip", "openclip", "custom_text"  # these may have the bias of SigLIP's loss, the others cannot
# Last parts of keys that hold no weights: sizes, in OpenAI's archives, and constants that older versions stored.
HARMLESS = {"input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids"}


def make_layout(layout: str, rows=CLIP_ROWS) -> dict[str, tuple[str, str]]:
    """One source's rules, {our name: (their name, operation)}, from the rows of both towers, with {i}, {p} and {qkv}
    left in the names: "visual.proj.weight": ("visual.proj", "transpose"), for OpenCLIP."""
    column, image, text, scale = LAYOUTS[layout]
    rules = {"logit_scale": (scale, "scalar")}
    if layout in WITH_BIAS:
        rules["logit_bias"] = "logit_bias", "scalar"
    for tower, prefix, tower_rows in zip(("visual.", "text."), (image, text), rows):
        for row in tower_rows:
            name, _, operation = row[column].partition(" | ")
            ours = row[0].replace("{b}", "{t}blocks.{i}.").replace("{t}", tower)
            rules[ours] = name.replace("{b}", f"{{t}}{BLOCKS[column]}.{{i}}.").replace("{t}", prefix), operation
    return rules


def to_miniclip(state_dict: dict[str, Tensor], rows=CLIP_ROWS) -> tuple[dict[str, Tensor], str]:
    """Returns the weights under MiniCLIP's names and the name of their layout. `rows` are those of the model's towers.
    Raises CheckpointError for an unknown layout, missing, unknown and duplicate keys."""
    weights = {}
    for key, tensor in state_dict.items():
        # DistributedDataParallel and torch.compile put a part of their own into the path, at any depth
        path = [part for part in key.split(".") if part not in ("module", "_orig_mod")]
        if path[-1] not in HARMLESS and weights.setdefault(".".join(path), tensor) is not tensor:
            raise CheckpointError(f"it holds {'.'.join(path)} twice, with and without a wrapper's prefix")
    known = {}  # layout -> how many keys it has names for; the scale has the same name in many
    for layout in LAYOUTS:
        names = pair_names(make_layout(layout, rows), weights, export=False)
        known[layout] = sum(key in weights for old, (new, *_), _ in names for key in old if "logit" not in new)
    source = max(known, key=known.get)
    if not known[source]:
        raise mismatch(f"its layout is none of {', '.join(LAYOUTS)}", [], weights)
    return rename(weights, source, rows, export=False), source


def from_miniclip(state_dict: dict[str, Tensor], layout: str, rows=CLIP_ROWS) -> dict[str, Tensor]:
    """The inverse of `to_miniclip`: the weights as `layout` names and shapes them, each a copy of its own."""
    renamed = rename(state_dict, layout, rows, export=True)
    return {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in renamed.items()}


def pair_names(rules: dict, names: Iterable[str], export: bool) -> Iterator[tuple[list[str], list[str], str]]:
    """The rules for a state dict with these names, block by block: (old names, new names, operation)."""
    counts = {}
    for ours, (theirs, operation) in rules.items():
        start, per_block, _ = (ours if export else theirs).partition("{i}")
        if per_block and start not in counts:
            counts[start] = len({name[len(start) :].partition(".")[0] for name in names if name.startswith(start)})
        for i in range(counts[start] or 1) if per_block else (0,):
            for p in ("weight", "bias") if "{p}" in ours else ("",):
                our, their = (name.replace("{i}", str(i)).replace("{p}", p) for name in (ours, theirs))
                parts = [their.replace("{qkv}", letter) for letter in ("qkv" if "{qkv}" in their else "-")]
                yield ([our], parts, operation) if export else (parts, [our], operation)


def rename(state_dict: dict[str, Tensor], layout: str, rows, export: bool) -> dict[str, Tensor]:
    """The weights under their new names. Raises CheckpointError for missing and unknown keys."""
    left = dict(state_dict)
    renamed, missing = {}, []
    for old, new, operation in pair_names(make_layout(layout, rows), state_dict, export):
        if absent := [key for key in old if key not in left]:
            missing += [key for key in absent if key != "logit_bias"]
        else:
            renamed |= zip(new, OPERATIONS[operation][export]([left.pop(key) for key in old]), strict=True)
    if missing or left:
        towers = {key.partition(".")[0] for key in renamed} & {"visual", "text"}
        alone = ": one tower alone; save the whole model" if len(towers) == 1 and not (left or export) else ""
        raise mismatch(f"not complete as {layout} weights{alone}", missing, left)
    return renamed
