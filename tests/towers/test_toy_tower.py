"""A tower of another kind is one file, and the package does not know it: here a small convolutional network trains, is
saved, loaded, measured and converted."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import miniclip
from miniclip.config import SECTIONS, MiniClipConfig, VisionConfig
from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.model import TOWERS, MiniClip, Tower
from miniclip.towers.registry import register_tower
from miniclip.trainer import ClipTrainer, ClipTrainingArguments
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.weight_files import read_state_dict
from miniclip.weights.convert import convert
from miniclip.weights.load import load_weights
from tests.towers.test_hf_towers import save_config, save_text_encoder, train


@dataclass
class ToyConfig:
    toy_channels: int = 8
    image_size: int = 32
    pretrained = False

    def problems(self):
        yield self.toy_channels > 0, "vision_cfg.toy_channels is not positive"

    def preprocess(self) -> dict:
        return {"size": self.image_size}


class ToyTower(Tower):
    """Images (B, 3, S, S) to embeddings (B, E)."""

    def __init__(self, cfg: ToyConfig, embed_dim: int, quick_gelu: bool):
        super().__init__()
        self.width = 2 * cfg.toy_channels
        sizes = (3, cfg.toy_channels, self.width)
        self.blocks = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2) for a, b in zip(sizes, sizes[1:]))
        self.proj = nn.Linear(self.width, embed_dim, bias=False)

    def features(self, pixel_values: Tensor) -> Tensor:
        for block in self.blocks:
            pixel_values = block(pixel_values).relu()
        return pixel_values.mean(dim=(2, 3))

    def key_rows(self) -> list[tuple[str, str, str]]:
        names = [name for name in self.state_dict() if name != "proj.weight"]
        return [("{t}" + n, "{t}net." + n, "{t}" + n) for n in names] + [
            ("{t}proj.weight", "{t}head | transpose", "{t}head")
        ]


@pytest.fixture(autouse=True)
def toy():
    register_tower(VisionConfig, lambda values: "toy_channels" in values, ToyConfig, ToyTower)
    yield
    SECTIONS.pop()
    del TOWERS[ToyConfig]


@pytest.fixture
def config() -> MiniClipConfig:
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return MiniClipConfig.from_dict({"embed_dim": 16, "vision_cfg": {"toy_channels": 8}, "text_cfg": text})


def equal(a: MiniClip, b: MiniClip) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_trains_is_saved_loaded_and_measured(config, caption_set, tmp_path):
    model = MiniClip(config)
    preprocess, tokenizer = miniclip.Preprocess(config.preprocess_cfg), model.text.tokenizer
    records = miniclip.read_captions(caption_set / "captions.json")
    args = ClipTrainingArguments(
        str(tmp_path / "run"), use_cpu=True, num_train_epochs=1, per_device_train_batch_size=12, report_to="none",
        save_strategy="no", disable_tqdm=True, learning_rate=1e-3, gradient_checkpointing=True,
    )  # fmt: skip
    before = {name: t.clone() for name, t in model.state_dict().items()}
    data = miniclip.CaptionDataset(records, preprocess)
    evaluator = RetrievalEvaluator(records, preprocess, tokenizer)
    trainer = ClipTrainer(model, args, data, tokenizer=tokenizer, evaluator=evaluator)
    trainer.train()
    assert all(not torch.equal(t, before[name]) for name, t in model.state_dict().items() if name.startswith("visual."))
    measured = trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    assert 0 < measured["eval_mean_recall"] <= 1
    loaded, preprocess, tokenizer = miniclip.load(tmp_path / "saved")
    assert isinstance(loaded.visual, ToyTower) and equal(loaded, model)
    assert equal(MiniClip.from_pretrained(tmp_path / "saved"), model) and loaded.config == config
    images = miniclip.embed_images(loaded, preprocess, [record["image"] for record in records])
    texts = miniclip.embed_texts(loaded, tokenizer, [caption for record in records for caption in record["caption"]])
    again = miniclip.retrieval_metrics(images, texts, [i for i in range(24) for _ in range(2)])
    assert again["mean_recall"] == pytest.approx(measured["eval_mean_recall"], abs=0.01)
    fast, _, _ = miniclip.load(tmp_path / "saved", precision="fp32")
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fast.encode_image(pixels), loaded.encode_image(pixels), atol=1e-5, rtol=1e-4)


def test_it_converts_there_and_back(config, tmp_path):
    model = MiniClip(config).eval()
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.safetensors", "openclip")
    theirs = load_file(tmp_path / "b.safetensors")
    assert torch.equal(theirs["visual.net.blocks.1.weight"], model.visual.blocks[1].weight)
    assert torch.equal(theirs["visual.head"].T, model.visual.proj.weight)
    assert "transformer.resblocks.0.ln_1.weight" in theirs
    convert(tmp_path / "b.safetensors", tmp_path / "c", "miniclip", str(tmp_path / "a" / "config.json"))
    assert equal(MiniClip.from_pretrained(tmp_path / "c"), model)
    other = MiniClip(config)
    load_weights(other, tmp_path / "b.safetensors")
    assert equal(other, model)
    with pytest.raises(CheckpointError, match="no other towers than CLIP's own"):
        convert(tmp_path / "a", tmp_path / "d", "hf")


def test_its_weights_are_as_strict_as_clips(config, tmp_path):
    model = MiniClip(config)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    for change, message in (
        ({"visual.blocks.1.bias": None}, "missing visual.blocks.1.bias; unknown none"),
        ({"visual.extra": torch.zeros(1)}, "missing none; unknown visual.extra"),
        ({"module.visual.proj.weight": torch.zeros(1)}, "visual.proj.weight twice"),
        ({"visual.proj.weight": torch.zeros(4)}, r"shapes that no CLIP model has: visual.proj.weight \(4,\)"),
        ({"visual.proj.weight": torch.zeros(4, 16)}, r"proj.weight is \(4, 16\) in the file and \(16, 16\)"),
        ({"visual.proj.weight": torch.full((16, 16), torch.nan)}, "undefined numbers in visual.proj.weight"),
    ):
        changed = {name: t for name, t in (weights | change).items() if t is not None}
        save_file(changed, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_weights(model, tmp_path / "x.safetensors")
    assert read_state_dict(tmp_path / "x.safetensors").keys() == weights.keys()


def test_its_config_is_checked():
    with pytest.raises(InputError, match="unknown field 'width'; the fields are toy_channels, image_size"):
        MiniClipConfig.from_dict({"vision_cfg": {"toy_channels": 8, "width": 3}})
    with pytest.raises(InputError, match="toy_channels is not positive"):
        MiniClipConfig.from_dict({"vision_cfg": {"toy_channels": 0}})
    values = MiniClipConfig.from_dict({"vision_cfg": {"toy_channels": 8}}).to_dict()
    assert isinstance(MiniClipConfig.from_dict(values).vision_cfg, ToyConfig)


def test_its_projection_begins_in_closed_form_beside_another_pretrained_encoder(
    caption_set, tmp_path, monkeypatch, capsys
):
    for name, value in {"pretrained": True, "hf_proj_type": "linear"}.items():
        monkeypatch.setattr(ToyConfig, name, value, raising=False)
    save_text_encoder(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_proj_type": "linear", "context_length": 16}
    config = save_config(tmp_path / "toy.json", {"toy_channels": 8}, text)
    train(config, caption_set, tmp_path / "run", "--num_train_epochs", "1")
    assert "projections: regularised CCA" in capsys.readouterr().out
