"""Models exported to ONNX, used like any other model: ONNX Runtime computes, for evaluation, search and the rest."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from miniclip.config import MiniClipConfig, TextConfig
from miniclip.inference.fast import InferenceClip
from miniclip.model import Tower
from miniclip.tokenizer import BaseTokenizer
from miniclip.towers.hf_config import open_tokenizer
from miniclip.towers.hf_tokenizer import HfTokenizer, tokenizer_folder
from miniclip.utils.errors import InputError
from miniclip.utils.files import check_manifest, sha256
from miniclip.utils.weight_files import read_json
from miniclip.weights.load import empty_model
from miniclip.weights.onnx import ABOUT, NAMES, need, open_session
from miniclip.weights.pretrained import LOCAL


def is_onnx(folder: str | Path) -> bool:
    """Whether a folder is an export to ONNX."""
    folder = Path(str(folder).removeprefix(LOCAL))
    return (folder / "image.onnx").is_file() and not (folder / "model.safetensors").exists()


class OnnxTower(Tower):
    """One graph as a tower: images or token ids to embeddings of unit length, (B, E), which stand for features too."""

    def __init__(self, kind: str, folder: Path, config: MiniClipConfig, providers: list[str]):
        super().__init__()
        self.kind, self.width = kind, config.embed_dim
        self.proj = nn.Identity()
        file = folder / f"{kind}.onnx"
        self.session = open_session(file, providers)
        size = config.vision_cfg.image_size
        given, got = self.session.get_inputs(), self.session.get_outputs()
        expected = (3, size, size) if kind == "image" else (None,)
        shapes = [tuple(d if isinstance(d, int) else None for d in one.shape) for one in (*given, *got)]
        if [one.name for one in (*given, *got)] != [*NAMES[kind]] or shapes != [(None, *expected), (None, self.width)]:
            takes = f"{NAMES[kind][0]} {('batch', *expected)} to {NAMES[kind][1]} ('batch', {self.width})"
            raise InputError(f"{file} is not a graph from {takes.replace('None', 'length')}, as its config.json says")
        # In place of weights, so that caches and indexes know which graph made their vectors.
        self.register_buffer("sha256", torch.frombuffer(bytearray.fromhex(sha256(file)), dtype=torch.uint8))

    def features(self, inputs: Tensor) -> Tensor:
        given, got = NAMES[self.kind]
        return torch.from_numpy(self.session.run([got], {given: inputs.cpu().numpy()})[0])


class OnnxClip(InferenceClip):
    """A folder that `miniclip export onnx` wrote, with the interface of a MiniClip. Its embeddings have unit length,
    with `normalize` or without. Raises InputError for a damaged folder and a missing package."""

    weights_as_loaded = True

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        nn.Module.__init__(self)
        folder = Path(str(folder).removeprefix(LOCAL))
        check_manifest(folder)
        about = read_json(folder / ABOUT)
        self.config = MiniClipConfig.from_json(folder / "config.json")
        try:
            found = ", ".join(f"{values['min_cosine']:.6f} ({name})" for name, values in about["checked"].items())
            self.precision = about["precision"]
            self.about = f"onnx {self.precision}: cosine to PyTorch in fp32 at least {found}, when it was exported"
            scale, bias = math.log(about["logit_scale"]), about["logit_bias"]
            self.logit_scale = nn.Parameter(torch.tensor(scale), requires_grad=False)  # on the CPU, as all inputs
            self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)), requires_grad=False)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            problem = f"{folder / ABOUT} is not that of an export to ONNX ({error!r})"
            raise InputError(f"{problem}: export the model again") from None
        self.dtype, self.training = torch.float32, False
        providers = find_providers(torch.device(device))
        self.visual, self.text = (OnnxTower(kind, folder, self.config, providers) for kind in NAMES)
        self.text.tokenizer = read_tokenizer(folder, self.config)

    def state_dict(self, *args, **kwargs):
        fix = "name the model that it was made of"
        raise InputError(f"an export to ONNX has no weights to train, mix or convert: {fix}")

    def train(self, mode: bool = True):
        return self.state_dict() if mode else self


def find_providers(device: torch.device) -> list[str]:
    """ONNX Runtime's names for a device. Raises InputError for one that it cannot compute on here."""
    need("onnxruntime")
    import onnxruntime

    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    known = onnxruntime.get_available_providers()
    if device.type != "cuda" or "CUDAExecutionProvider" not in known:
        how = "add --device cpu, or pip install onnxruntime-gpu in place of onnxruntime"
        raise InputError(f"ONNX Runtime cannot compute on {device} here, only with {', '.join(known)}: {how}")
    return [("CUDAExecutionProvider", {"device_id": device.index or 0}), "CPUExecutionProvider"]


def read_tokenizer(folder: Path, config: MiniClipConfig) -> BaseTokenizer:
    """The tokenizer of the text tower that was exported."""
    if isinstance(config.text_cfg, TextConfig):  # CLIP's tower, which may have another tokenizer
        text = empty_model(config).text
        text.load_files(folder)
        return text.tokenizer
    return HfTokenizer(open_tokenizer(tokenizer_folder(folder)), config.text_cfg.context_length)
