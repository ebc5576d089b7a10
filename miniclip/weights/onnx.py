"""Exports to other runtimes: the towers as graphs of ONNX or torch.export, checked against PyTorch as they are written.

    image.onnx        pixel_values (batch, 3, S, S) float32 to image_embeds (batch, E) float32, of unit length
    text.onnx         input_ids (batch, length) int64, length up to the context, to text_embeds (batch, E)
    clip.onnx         if asked for: both in one graph, from image and text to image_features and text_features
    preprocess.json   from an image file to pixel_values, step by step
    tokenizer.json    from a caption to input_ids, for the library tokenizers; cut and padded
    export.json       precision, logit scale, context length, padding, and how close the graphs are to PyTorch
    config.json, manifest.json, tokenizer/    what MiniCLIP itself needs to measure and search with the folder

For torch.export: image.pt2 and text.pt2."""

import copy
import dataclasses
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import PreprocessConfig
from miniclip.model import MiniClip, Tower
from miniclip.tokenizer import Tokenizer
from miniclip.towers.registry import CAPTIONERS
from miniclip.towers.tokens import without_tokens
from miniclip.utils.errors import InputError, first_line
from miniclip.utils.files import replacing, write_json, write_manifest

FORMS = ("onnx", "torch")
PRECISIONS = ("fp32", "fp16", "int8")
ABOUT = "export.json"
TOLERANCE = 1e-5  # the largest difference of an fp32 export's embeddings, which are of unit length
ONE_FILE = 1_900_000_000  # bytes of weights: above, ONNX keeps them in a second file, since protobuf ends at 2 GB
NAMES = {"image": ("pixel_values", "image_embeds"), "text": ("input_ids", "text_embeds")}  # of inputs and outputs
SINGLE = ["image", "text"], ["image_features", "text_features"]
GRAPHS = [f"{name}{suffix}" for name in ("image", "text", "clip") for suffix in (".onnx", ".onnx.data", ".pt2")]
CAPTIONS = "a", "a dog runs through the snow", "two cats on a red sofa", f"a photo of {'a very ' * 100}big dog", "!"
SAFE = (1, 24)  # ONNX Runtime refuses weights outside of a model's folder from here on
PIP = "pip install onnx onnxscript 'onnxruntime>=1.24'"


class UnitTower(nn.Module):
    """A tower that computes in `dtype`, from float32 or ids to embeddings in float32, of unit length."""

    def __init__(self, tower: Tower, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.tower = tower if dtype == torch.float32 else copy.deepcopy(tower).to(dtype)
        self.dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.dtype) if inputs.is_floating_point() else inputs
        return F.normalize(self.tower(inputs).float(), dim=-1)


class BothTowers(nn.ModuleList):
    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self[0](image), self[1](text)


def export(
    model: MiniClip, target: str | Path, form: str = "onnx", precision: str = "fp32", single_graph: bool = False,
    force: bool = False, measure: Callable[[Path], dict] | None = None,
) -> dict:  # fmt: skip
    """Writes the folder `target` atomically and returns what its export.json says, under "checked" how far each graph
    is from the model in PyTorch. `single_graph` adds clip.onnx; `measure(folder)` may add to export.json.

    fp16 has half-precision weights and products, int8 products of 8-bit integers, with float32 inputs and outputs in
    both. Raises InputError for a tower that cannot be exported, a missing package, an fp32 graph that is more than 1e-5
    off on some batch, and FileExistsError if `target` exists, unless `force`."""
    target = Path(target)
    if form not in FORMS or precision not in PRECISIONS:
        known = f"{' and '.join(FORMS)}, in {', '.join(PRECISIONS)}"
        raise InputError(f"{target} cannot be written as {form} in {precision}: exports are {known}")
    if form == "torch" and (precision != "fp32" or single_graph):
        raise InputError("a precision and one graph for both towers are for onnx: torch.export writes towers in fp32")
    if target.exists() and (not force or not target.is_dir()):
        raise FileExistsError(f"{target} exists already: choose another name, or add --force")
    if (target / "model.safetensors").exists():
        raise InputError(f"{target} is the folder of a model: export to another one")
    if form == "onnx":
        need("onnx", "onnxscript", "onnxruntime")
    model = without_tokens(model).eval()
    if type(model) in CAPTIONERS:
        warnings.warn("the decoder is not exported: MiniCLIP's and OpenCLIP's forms have it", stacklevel=2)
    about = describe(model, form, precision)
    write, suffix = (write_onnx, ".onnx") if form == "onnx" else (write_pt2, ".pt2")
    images, captions = examples(model)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    half = {"image": UnitTower(model.visual, dtype).eval(), "text": UnitTower(model.text, dtype).eval()}
    exact = {"image": UnitTower(model.visual).eval(), "text": UnitTower(model.text).eval()}
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=captions[0].shape[1])
    shapes = {"image": {0: batch}, "text": {0: batch, 1: length}}
    one = {"image": images[0][:2], "text": captions[0][:2, :8].clone()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as folder:
        folder.mkdir()
        with torch.no_grad(), quiet():
            for kind, batches in (("image", images), ("text", captions)):
                file, names = folder / (kind + suffix), ([name] for name in NAMES[kind])
                write(file, half[kind], (one[kind],), (shapes[kind],), precision, *names)
                run = runner(file)
                about["checked"][file.name] = compare(file, precision, [(run(x)[0], exact[kind](x)) for x in batches])
            if single_graph:
                file, both = folder / "clip.onnx", BothTowers(half.values()).eval()
                free = shapes["image"], {0: torch.export.Dim("texts", min=1), 1: length}
                write(file, both, tuple(one.values()), free, precision, *SINGLE)
                run, pairs = runner(file), []
                for x, ids in zip(images, captions[::-1]):  # as many texts as images, fewer, more
                    pairs += zip(run(x, ids), (exact["image"](x), exact["text"](ids)))
                about["checked"][file.name] = compare(file, precision, pairs)
        model.text.save_files(folder)
        write_tokenizer(folder / "tokenizer.json", model)
        write_json(folder / "config.json", model.config.to_dict())
        write_json(folder / "preprocess.json", describe_preprocessing(model.config.preprocess_cfg))
        write_json(folder / ABOUT, about)
        if measure:
            about |= measure(folder)
            write_json(folder / ABOUT, about)
        write_manifest(folder)
        written = {path.name for path in folder.iterdir()}
    for name in set(GRAPHS) - written:  # of an earlier export
        (target / name).unlink(missing_ok=True)
    return about


def need(*packages: str):
    """Raises InputError, with the command to install them, unless these packages are installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise InputError(f"ONNX needs the Python package {missing[0]}: {PIP}")


@contextmanager
def quiet():
    """Inside, the exporters' libraries do not report on their work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def examples(model: MiniClip) -> tuple[list[Tensor], list[Tensor]]:
    """Batches to compare with: images (B, 3, S, S) and token ids (B, L), of several B and L; the first has the most."""
    size = model.config.vision_cfg.image_size
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    before, tokenizer = model.text.tokenizer.truncated, model.text.tokenizer
    ids = [tokenizer(CAPTIONS), tokenizer(CAPTIONS[1:3], trim=True), tokenizer(CAPTIONS[:1], trim=True)]
    tokenizer.truncated = before
    return [images, images[2:4], images[:1]], ids


def write_pt2(file: Path, module: nn.Module, example: tuple, shapes: tuple, *_):
    """Writes one graph of torch.export."""
    torch.export.save(traced(module, torch.export.export, (example,), {"dynamic_shapes": shapes}), file)


def write_onnx(file: Path, module: nn.Module, example: tuple, shapes: tuple, precision: str, given: list, got: list):
    """Writes one graph of ONNX, in the opset that torch prefers, by its exporter that is built on torch.export."""
    how = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False, "input_names": given, "output_names": got}
    program = traced(module, torch.onnx.export, (example,), how)
    large = sum(p.numel() * p.element_size() for p in module.parameters()) > ONE_FILE
    program.save(file, external_data=large)
    if precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # Weights, each output channel with its own scale, and the token embeddings. Activations get their scales as
        # they are computed. Not convolutions: EfficientNet-Lite0 would end at a cosine of 0.89 on average.
        how = {"per_channel": True, "weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul", "Gather"]}
        quantize_dynamic(file, file, use_external_data_format=large, **how)


def traced(module: nn.Module, export: Callable, args: tuple, kwargs: dict):
    """`export(module, *args, **kwargs)`. Raises InputError that names the towers if they cannot be exported."""
    try:
        return export(module, *args, **kwargs)
    except Exception as error:  # of many kinds, from torch and from the code of the tower
        towers = ", ".join(type(part.tower).__name__ for part in module.modules() if isinstance(part, UnitTower))
        raise InputError(f"the tower cannot be exported ({towers}): {first_line(error)}") from error


def runner(file: Path) -> Callable[..., tuple]:
    """A function that runs a graph on tensors and returns its outputs."""
    if file.suffix == ".pt2":
        module = torch.export.load(file).module()
        return lambda x: (module(x),)
    session = open_session(file)
    names = [one.name for one in session.get_inputs()]
    return lambda *inputs: tuple(map(torch.from_numpy, session.run(None, dict(zip(names, map(Tensor.numpy, inputs))))))


def open_session(file: Path, providers: Iterable[str] = ("CPUExecutionProvider",)):
    """A graph in ONNX Runtime, with as many threads as torch has. Raises InputError for one that it cannot read."""
    need("onnxruntime")
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < SAFE:
        raise InputError(f"ONNX Runtime {onnxruntime.__version__} reads files outside of a model's folder: {PIP}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        return onnxruntime.InferenceSession(file, options, list(providers))
    except Exception as error:  # its own kinds have no common base
        raise InputError(f"{file} cannot be read by ONNX Runtime {onnxruntime.__version__}: {error}"[:500]) from None


def compare(file: Path, precision: str, pairs: list[tuple[Tensor, Tensor]]) -> dict:
    """How far embeddings are from the exact ones. Raises InputError for those in fp32 that are not within 1e-5."""
    difference = max((ours - exact).abs().max().item() for ours, exact in pairs)
    cosines = torch.cat([(ours * exact).sum(dim=1) for ours, exact in pairs])
    if precision == "fp32" and not difference <= TOLERANCE:  # NaN is no such difference
        raise InputError(f"{file.name} is {difference:.1e} off PyTorch, more than {TOLERANCE}: nothing is written")
    if not cosines.isfinite().all():
        raise InputError(f"{file.name} returns NaN in {precision}: export in fp32; nothing is written")
    return {"max_difference": difference, "min_cosine": cosines.min().item(), "mean_cosine": cosines.mean().item()}


def describe(model: MiniClip, form: str, precision: str) -> dict:
    """What export.json says of a model."""
    bias, tokenizer = model.logit_bias, model.text.tokenizer
    packages = ("torch", "onnx", "onnxruntime") if form == "onnx" else ("torch",)
    return {
        "form": form, "precision": precision, "embed_dim": model.config.embed_dim,
        "logit_scale": model.logit_scale.exp().item(), "logit_bias": None if bias is None else bias.item(),
        "context_length": tokenizer.context_length, "pad_token_id": tokenizer.pad_token_id,
        "versions": {name: importlib.import_module(name).__version__ for name in packages}, "checked": {},
    }  # fmt: skip


def write_tokenizer(file: Path, model: MiniClip):
    """Writes the tokenizer for the library tokenizers: cut to the context length, padded to the longest caption."""
    from miniclip.weights.clip_tokenizer import clip_tokenizer

    ours = model.text.tokenizer
    tokenizer = clip_tokenizer() if isinstance(ours, Tokenizer) else ours.fast()
    tokenizer.enable_truncation(ours.context_length)
    tokenizer.enable_padding(pad_id=ours.pad_token_id, pad_token=tokenizer.id_to_token(ours.pad_token_id))
    tokenizer.save(str(file))


def describe_preprocessing(cfg: PreprocessConfig) -> dict:
    """What preprocess.json says: the settings, and in `steps` what they mean."""
    resized = int(cfg.size / cfg.crop_pct + 1e-6)
    half = {"torchvision": "rounded, half to even", "transformers": "rounded down"}
    pillow = f"with Pillow's {cfg.interpolation} filter, antialiased, on 8-bit levels"
    geometry = {
        "shortest": [
            f"resize {pillow}: the shorter side to {resized} pixels, the longer to int({resized} * longer / shorter)",
            f"crop {cfg.size} x {cfg.size}; left and top are (side - {cfg.size}) / 2 {half[cfg.center_crop]}",
        ],
        "squash": [f"resize {pillow} to {cfg.size} x {cfg.size}"],
        "longest": [
            f"resize {pillow}: both sides to max(1, round(side * {cfg.size} / longer))",
            f"paste at ({cfg.size} - side) // 2 on {cfg.size} x {cfg.size} of grey level {cfg.fill_color}",
        ],
    }[cfg.resize_mode]
    first = "turn as EXIF says; convert to RGB, transparent pixels on white"
    steps = [first, *geometry, "(level / 255 - mean) / std for each channel", "float32, channels first"]
    return dataclasses.asdict(cfg) | {"resize_to": resized, "steps": steps}
