"""The fast path: what model.py computes, with less work. And copies of a model for inference.

    padding    nothing after a caption's end token has any influence: on the CPU a batch's captions lie end to end
    read-out   only one position of the last block is read, so only that one goes through its query and MLP
    patches    are cut out and multiplied as one matrix, which is faster than a general convolution
    bf16       on a GPU, under autocast, is also what the blocks add to and normalise: half the memory to wait for
    oneDNN     multiplies fp32 matrices on processors where `cpu_routes` finds it faster and as exact

It runs only while model.py's code and the parts of the model are those it was written for. `plain_reason` names what
has been changed; then the plain code runs, and one line says so. `grad_cache.wrap_towers` lets a model train by it."""

import ast
import copy
import hashlib
import inspect
import linecache
import logging
import textwrap
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import CodeType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from miniclip.inference import matmul
from miniclip.inference.matmul import Int8Linear, OneDnnLinear, PatchLinear, packs, patch_product
from miniclip.model import MLP, TOWERS, Attention, Block, MiniClip, QuickGELU, TextTransformer, Tower, VisionTransformer
from miniclip.towers import AS_IN_MODEL
from miniclip.utils.errors import InputError

logger = logging.getLogger(__name__)
_say = cache(partial(logger.warning, "%s: the plain model runs (slower, same result as the code)"))  # once each

PRECISIONS = ("fp32", "bf16", "int8")
# Hashes of the functions that this file computes in another way. After a change of one, change this file accordingly,
# then the hash: tests/inference/test_read_is_run.py prints the new one.
WRITTEN_FOR = {
    (Block, "forward"): "ae0c0d7e975b", (Attention, "forward"): "63a1e8a15492", (MLP, "forward"): "a2e2ed7fac6d",
    (QuickGELU, "forward"): "27877a203c3f", (Tower, "run_blocks"): "8f53a0d8d38c",
    (VisionTransformer, "features"): "5bbed1e91378", (VisionTransformer, "embed_patches"): "32d81aa3fb13",
    (TextTransformer, "features"): "a75cd464db07", (TextTransformer, "embed_tokens"): "6de43c921259",
}  # fmt: skip
LINEAR, NORM = ((nn.Linear, OneDnnLinear, Int8Linear), {}), ((nn.LayerNorm,), {})
PARTS = {  # of a block: their types, and their own parts
    "ln_1": NORM, "ln_2": NORM,
    "attn": ((Attention,), {"in_proj": LINEAR, "out_proj": LINEAR}),
    "mlp": ((MLP,), {"c_fc": LINEAR, "act": ((nn.GELU, QuickGELU), {}), "c_proj": LINEAR}),
}  # fmt: skip


def plain_reason(tower: Tower) -> str | None:
    """What has been changed in a tower of model.py, or in model.py, so that the plain code has to run. None if nothing
    has, and for towers from elsewhere. Takes less than 0.1 ms. Comparing results would not show a hook or dropout."""
    kind = _kind(tower)
    if kind is None or (type(tower) in TOWERS.values() and not _as_in_model(tower)):  # of towers/, with its own code
        return None
    if not _as_in_model(tower):
        return f"{type(tower).__name__} is not {kind.__name__} itself"
    for (owner, name), expected in WRITTEN_FOR.items():
        of_tower = issubclass(owner, Tower)
        if of_tower and not isinstance(tower, owner):
            continue
        function = getattr(kind if of_tower else owner, name)
        replaced = (of_tower and name in vars(tower)) or function.__module__ != Tower.__module__
        if replaced or fingerprint(function, getattr(function, "__code__", None)) != expected:
            return f"{owner.__name__}.{name} differs from the code that inference/fast.py was written for"
    if kind is VisionTransformer:
        if changed := _changed(conv := tower.conv1, (nn.Conv2d, PatchLinear), {}):
            return f"VisionTransformer.conv1{changed}"
        how = type(conv) is nn.Conv2d and (conv.kernel_size, conv.padding, conv.dilation, conv.groups, conv.bias)
        if how and how != (conv.stride, (0, 0), (1, 1), 1, None):
            return "VisionTransformer.conv1 does not cut images into patches"
    for block in tower.blocks:
        if changed := _changed(block, (Block,), PARTS):
            return f"Block{changed}"
    return "every module has a hook" if _has_any_global_hook() else None


def _kind(tower: Tower) -> type[Tower] | None:
    return next((kind for kind in FAST if isinstance(tower, kind)), None)


def _as_in_model(tower: Tower) -> bool:
    return AS_IN_MODEL.get(type(tower), lambda tower: type(tower) in FAST)(tower)


def _changed(module: nn.Module | None, types: tuple[type, ...], parts: dict) -> str | None:
    """How a module or one of its parts differs from model.py's, to be read after its name."""
    if type(module) not in types:
        return f" is a {type(module).__name__}"
    own = vars(module)
    if "forward" in own:
        return ".forward is replaced in an instance"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return " has a hook"
    for name, part in parts.items():
        if changed := _changed(own["_modules"].get(name), *part):
            return f".{name}{changed}"
    return None


@cache
def fingerprint(function: Callable, code: CodeType | None) -> str | None:
    """A hash of a function's source without comments, docstring and layout; None if that is not what runs, `code`."""
    try:
        lines = linecache.getlines(code.co_filename, function.__globals__)  # inspect would look through all modules
        if code not in _compiled("".join(lines)):
            return None
        function = ast.parse(textwrap.dedent("".join(inspect.getblock(lines[code.co_firstlineno - 1 :])))).body[0]
    except Exception:  # OSError, TypeError, SyntaxError, and what the tokenizer of each Python version raises
        return None
    if ast.get_docstring(function) is not None:
        del function.body[0]
    return hashlib.sha256(repr(_nodes(function)).encode()).hexdigest()[:12]


@cache
def _compiled(source: str) -> set[CodeType]:
    """The code of all functions in a file, nested ones included."""
    found = [compile(source, "source", "exec", dont_inherit=True)]
    for code in found:
        found += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(found)


def _nodes(node):
    """A syntax tree as nested lists: the same in Python 3.10 to 3.13, unlike `ast.dump` and `ast.unparse`."""
    if isinstance(node, list):
        return [_nodes(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    fields = ((name, _nodes(value)) for name, value in ast.iter_fields(node))
    return [type(node).__name__, *((name, value) for name, value in fields if value not in (None, []))]


def fast_wrappers(tower: Tower) -> tuple[Callable, ...]:
    """The innermost of a tower's `wrappers`: the fast path, or for changed code nothing, and one line says so."""
    if reason := plain_reason(tower):
        _say(reason)
    return (fast_features,) if reason is None and _as_in_model(tower) else ()


def fast_features(tower: Tower, features: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """What `features(inputs)` returns, computed by this file unless something has been changed since."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return features(inputs)  # the sizes below would become constants
    # torch.compile would trace the check: there what `fast_wrappers` found holds.
    if not torch.compiler.is_compiling() and (reason := plain_reason(tower)):
        _say(reason)
        return features(inputs)
    return FAST[_kind(tower)](tower, inputs)


def image_features(tower: VisionTransformer, pixel_values: Tensor) -> Tensor:
    """What `tower.features(pixel_values)` returns: (B, 3, S, S) to (B, W)."""
    if pixel_values.shape[1:] != (3, tower.image_size, tower.image_size):
        return tower.features(pixel_values)  # which says what is wrong
    conv = tower.conv1
    if isinstance(conv, nn.Conv2d):
        linear = partial(F.linear, weight=conv.weight.flatten(1))
        conv = partial(patch_product, patch_size=conv.stride[0], linear=linear)
    x = tower.embed_patches(conv(pixel_values))
    B, L, W = x.shape
    ends = torch.arange(0, B * L, L, device=x.device)  # the class tokens: the first of each L positions
    return tower.ln_post(_blocks(tower, x.reshape(B * L, W), (B, L), ends, is_causal=False))


def text_features(tower: TextTransformer, input_ids: Tensor) -> Tensor:
    """What `tower.features(input_ids)` returns: (B, L) to (B, W)."""
    end = input_ids.argmax(dim=1)
    cuts = input_ids.is_cpu and len(end) > 0  # elsewhere sizes that change with the batch cost more than they save
    if cuts and not torch.compiler.is_compiling():  # the graph would break here
        input_ids = input_ids[:, : end.max() + 1]
    B, L = input_ids.shape
    x = tower.embed_tokens(input_ids).flatten(0, 1)
    ends, kept = torch.arange(B, device=x.device) * L + end, None
    if cuts:
        inside = (torch.arange(L) <= end[:, None]).flatten()
        captions, padding = inside.nonzero().squeeze(1), (~inside).nonzero().squeeze(1)
        # oneDNN generates code for each new number of rows: some padding rounds it.
        room = -len(captions) % (8 if len(captions) < 64 else 64)
        if room < len(padding):
            kept = torch.cat([captions, padding[:room]])  # (T,)
            ends, x = end.cumsum(0) + torch.arange(B), x[kept]  # where among them the captions end
    return tower.ln_final(_blocks(tower, x, (B, L), ends, True, kept))


FAST = {VisionTransformer: image_features, TextTransformer: text_features}


def _blocks(tower, x: Tensor, shape: tuple[int, int], ends: Tensor, is_causal: bool, kept: Tensor | None = None):
    """All blocks of a tower: rows (T, W) to those to read out, `ends` (B,): (B, W). The rows are B sequences of up to L
    (`shape`), end to end; with `kept` (T,) only these of the B x L positions are there."""
    if x.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16:
        x = x.bfloat16()  # what is not a product waits for memory. In fp16 the sums could overflow
    for number, block in enumerate(tower.blocks):
        run = partial(_block, block, shape=shape, is_causal=is_causal, kept=kept)
        if tower.checkpoint_every and number % tower.checkpoint_every == 0 and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False)
        x = run(x, ends=ends if number == len(tower.blocks) - 1 else None)
    return x


def _block(block: nn.Module, x: Tensor, ends: Tensor | None, shape: tuple[int, int], is_causal: bool, kept):
    """`block(x)` for rows (T, W); with `ends`, for those rows alone."""
    (B, L), W, H = shape, x.shape[1], block.attn.heads
    qkv = _linear(block.attn.in_proj, _norm(block.ln_1, x))  # (T, 3 W)
    if kept is not None:
        qkv = qkv.new_zeros(B * L, 3 * W).index_copy(0, kept, qkv)
    q, k, v = (part.transpose(1, 2) for part in qkv.view(B, L, 3, H, W // H).unbind(2))  # (B, H, L, W / H)
    if ends is None:
        attended = _attention(q, k, v, is_causal=is_causal).transpose(1, 2).reshape(B * L, W)
        attended = attended if kept is None else attended[kept]
    else:
        position = (ends if kept is None else kept[ends]) % L  # (B,)
        q = q[torch.arange(B, device=x.device), :, position][:, :, None]  # (B, H, 1, W / H)
        mask = (torch.arange(L, device=x.device) <= position[:, None])[:, None, None] if is_causal else None
        attended, x = _attention(q, k, v, attn_mask=mask).reshape(B, W), x[ends]
    x = _linear(block.attn.out_proj, attended, residual=x)
    hidden = _linear(block.mlp.c_fc, _norm(block.ln_2, x), activation=block.mlp.act)
    return _linear(block.mlp.c_proj, hidden, residual=x)


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """`layer(x)` in the type of x: on a GPU autocast would read and write fp32. The mean and the variance are fp32."""
    if not x.is_cuda or x.dtype == layer.weight.dtype:
        return layer(x)
    with torch.autocast("cuda", enabled=False):
        return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def _linear(layer: nn.Module, x: Tensor, activation: nn.Module | None = None, residual: Tensor | None = None):
    """A linear layer, then an activation or the residual, fused where the layer can do that."""
    if isinstance(layer, OneDnnLinear):
        return layer(x, activation, residual)
    x = layer(x) if activation is None else activation(layer(x))
    return x if residual is None else residual + x


def _attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, attn_mask: Tensor | None = None) -> Tensor:
    """torch's attention, or on a CPU its steps, where they take half the time: while torch's products use oneDNN, and
    for images in bf16, but a small one (the scores are then rounded, as the queries and the keys were)."""
    (B, H, L, D), S, on_cpu = q.shape, k.shape[2], q.device.type == "cpu"
    faster = on_cpu and (matmul.rounds("cpu") or q.dtype == torch.bfloat16 and not is_causal and B * S >= 64)
    if attn_mask is not None or q.dtype == torch.float16 or not faster:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, attn_mask=attn_mask)
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    later = q.new_full((L, S), -torch.inf if is_causal else 0).triu_(1)
    scores = torch.baddbmm(later.expand(B * H, L, S), q, k.transpose(1, 2), beta=int(is_causal), alpha=D**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v).view(B, H, L, D)


class InferenceClip(MiniClip):
    """A copy of a MiniClip for inference, made by `inference_copy`; it can be neither trained nor saved."""

    weights_as_loaded = False  # whether `state_dict` of a tower tells its features from those of any other
    about = ""  # how close it is to the model in fp32, where that is known

    def __init__(self, model: MiniClip, precision: str, pack: bool, fuse: bool):
        nn.Module.__init__(self)
        self.config, self.precision, self.training = model.config, precision, False
        int8 = precision == "int8"  # between its products it computes in bf16, if the processor has instructions for it
        bf16 = packs("int8") and torch.cpu._is_avx512_bf16_supported() if int8 else precision == "bf16"
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        one_dnn = model.logit_scale.is_cpu and pack and packs(precision)
        layer = Int8Linear if int8 else OneDnnLinear if one_dnn else copy.copy
        with matmul.full_precision():  # `for_inference` compares towers, and TF32, the default of GPUs, is off by 1%
            towers = [tower.for_inference() if fuse else tower for tower in (model.visual, model.text)]
        self.visual, self.text = (_tower_copy(tower, self.dtype, layer) for tower in towers)
        self.logit_scale = nn.Parameter(model.logit_scale.detach().float(), requires_grad=False)
        self.logit_bias = model.logit_bias

    def features(self, tower: Tower, inputs: Tensor) -> Tensor:
        """One of its towers up to the projection: images (B, 3, S, S) or token ids (B, L) to (B, W) float32."""
        with self.inference():
            inputs = inputs.to(self.dtype) if tower is self.visual else inputs
            features = fast_features(tower, tower.features, inputs) if tower.wrappers else tower.features(inputs)
            return features.float()

    def project(self, tower: Tower, features: Tensor, normalize: bool = True) -> Tensor:
        """The last step of one of its towers: features (B, W) to embeddings (B, E) float32."""
        with self.inference():
            embeds = tower.projection(features.to(self.dtype)).float()
            return F.normalize(embeds, dim=-1) if normalize else embeds

    def encode_image(self, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        return self.project(self.visual, self.features(self.visual, pixel_values), normalize)

    def encode_text(self, input_ids: Tensor, normalize: bool = False) -> Tensor:
        return self.project(self.text, self.features(self.text, input_ids), normalize)

    @contextmanager
    def inference(self):
        """No gradients, and the copy's own precision whatever autocast is active outside, as during training."""
        kind = self.logit_scale.device.type
        attention = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]) if kind == "cpu" else nullcontext()
        with torch.inference_mode(), torch.autocast(kind, enabled=False), matmul.full_precision(), attention:
            yield

    def train(self, mode: bool = True):
        if mode:
            raise InputError("a model loaded with a precision is for inference: load it without, to train it")
        return self

    def save_pretrained(self, directory, state_dict=None):
        raise InputError("a model loaded with a precision cannot be saved: load it without")


def inference_copy(model: MiniClip, precision: str = "fp32", pack: bool = True, fuse: bool = True) -> InferenceClip:
    """A faster copy of a model for inference on its device. Its embeddings, float32, are the same (fp32) or nearly
    so (bf16, int8); changes of the weights after its first use do not reach it. `pack` lays them out for oneDNN then:
    half a second for a large model on the CPU. `fuse` makes one of each convolution and its BatchNorm. A copy is
    returned as it is. Raises InputError for an unknown precision, int8 off the CPU, and another than a copy has."""
    if isinstance(model, InferenceClip) and precision in ("fp32", model.precision):
        return model
    if isinstance(model, InferenceClip):
        raise InputError(f"the model computes in {model.precision}, as it was loaded or exported: remove {precision}")
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    if precision == "int8" and model.logit_scale.device.type != "cpu":
        raise InputError(f"precision int8 is for the CPU; on {model.logit_scale.device} take bf16")
    return InferenceClip(model, precision, pack, fuse)


def _tower_copy(tower: Tower, dtype: torch.dtype, layer) -> Tower:
    if layer is OneDnnLinear and plain_reason(tower):
        layer = copy.copy  # changed code may read the weights, which oneDNN lays out anew
    twin = _module_copy(tower, dtype, layer)
    twin.wrappers = fast_wrappers(tower)  # and not what training has put there
    if twin.wrappers and isinstance(twin, VisionTransformer):
        twin.conv1 = PatchLinear(twin.conv1, layer)
    return twin


def _module_copy(module: nn.Module, dtype: torch.dtype, layer) -> nn.Module:
    """A copy of a tree of modules with other linear layers, which shares what it can with the original."""
    twin = copy.deepcopy(module).float() if isinstance(module, _BatchNorm) else copy.copy(module)
    twin.training = False
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            twin.__dict__[name] = MethodType(value.__func__, twin)
    if isinstance(forward := vars(module).get("forward"), partial) and forward.func is checkpoint:
        del twin.__dict__["forward"]  # of an encoder from elsewhere, whose blocks are checkpointed by this
    kept = torch.float32 if isinstance(module, _BatchNorm) else dtype  # its statistics are in fp32 in any case
    twin._parameters = {name: None if p is None else nn.Parameter(p.detach().to(kept), requires_grad=False)
                        for name, p in module._parameters.items()}  # fmt: skip
    if type(module) is nn.Linear and "forward" not in vars(module):  # a subclass's weights may be read elsewhere
        linear = layer(twin)
        linear.__dict__.update((name, value) for name, value in vars(module).items() if name.startswith("_forward_"))
        return linear
    children = module._modules.items()
    twin._modules = {name: None if child is None else _module_copy(child, dtype, layer) for name, child in children}
    return twin
