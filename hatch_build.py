"""Build hooks: dependencies from the requirements files, and files from outside the package in the wheel."""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

EXTRAS = {"test": "requirements-test.txt", "ui": "requirements-ui.txt", "heic": "requirements-heic.txt"}
PACKAGES = {  # extras without a file
    "onnx": ["onnx", "onnxscript", "onnxruntime>=1.24"], "stores": ["s3fs", "gcsfs"], "timm": ["timm", "torchvision"],
    "captions": ["pycocoevalcap"],  # CIDEr and BLEU
    "peers": ["open-clip-torch", "sentence-transformers", "mteb>=2", "clip-benchmark"],
}  # fmt: skip
INCLUDED = {"model_configs": "miniclip/model_configs", "train.py": "miniclip/commands/train.py",
            "evaluate.py": "miniclip/commands/evaluate.py"}  # fmt: skip


class Metadata(MetadataHookInterface):
    def update(self, metadata: dict):
        metadata["dependencies"] = self.read("requirements.txt")
        metadata["optional-dependencies"] = {name: self.read(file) for name, file in EXTRAS.items()} | PACKAGES

    def read(self, name: str) -> list[str]:
        lines = (Path(self.root) / name).read_text(encoding="utf-8").splitlines()
        return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


class Build(BuildHookInterface):
    def initialize(self, version: str, build_data: dict):
        if version != "editable":  # an editable installation finds them beside the package
            build_data["force_include"] |= {str(Path(self.root) / file): place for file, place in INCLUDED.items()}
