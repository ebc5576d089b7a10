"""Small models under well-known names, and their weights where the real ones would be after a download."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from miniclip.checkpoint import from_miniclip
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip

SMALL = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
REPOS = {  # where the tags' weights are, and the config that they fit
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "ViT-B-32", "timm/vit_base_patch32_clip_224.openai": "ViT-B-32-quickgelu",
}  # fmt: skip


@pytest.fixture(scope="session")
def small() -> dict[str, MiniClip]:
    torch.manual_seed(0)
    configs = {name: SMALL | {"quick_gelu": name.endswith("quickgelu")} for name in REPOS.values()}
    return {name: MiniClip(MiniClipConfig.from_dict(values)).eval() for name, values in configs.items()}


@pytest.fixture
def names(small, tmp_path, monkeypatch):
    """ViT-B-32 is a small model here, and the cache has its weights. Gives a folder with pictures and nothing else."""
    from huggingface_hub import constants

    import miniclip.compat.open_clip as open_clip

    monkeypatch.setattr(open_clip, "ADDED", {})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "configs").mkdir()
    for repo, name in REPOS.items():
        model, commit = small[name], "0" * 40
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(SMALL | {"quick_gelu": model.config.quick_gelu}))
        folder = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        weights = from_miniclip(model.state_dict(), "openclip")
        save_file(weights, folder / "snapshots" / commit / "open_clip_model.safetensors", {"format": "pt"})
        about = {
            "model_cfg": SMALL | {"quick_gelu": model.config.quick_gelu},
            "preprocess_cfg": {"std": [0.5, 0.5, 0.5]},
        }
        (folder / "snapshots" / commit / "open_clip_config.json").write_text(json.dumps(about))
    open_clip.add_model_config(tmp_path / "configs")
    (tmp_path / "pictures").mkdir()
    for name, color, size in (("CLIP.png", "red", (300, 200)), ("test_image.jpg", "blue", (131, 224))):
        Image.new("RGB", size, color).save(tmp_path / "pictures" / name)
    monkeypatch.chdir(tmp_path / "pictures")
    return tmp_path / "pictures"
