"""SigLIP: transformers' SiglipModel computes the same, in both directions; its tokenizers; probabilities by sigmoid."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

import miniclip
from miniclip.checkpoint import from_miniclip
from miniclip.classify.zero_shot import build_zero_shot_classifier, probabilities, zero_shot_classify
from miniclip.compat import open_clip as face
from miniclip.compat.model import CLIP
from miniclip.config import MiniClipConfig, list_models
from miniclip.inference.embed import embed_texts
from miniclip.model import MiniClip
from miniclip.towers.siglip import join_in_proj
from miniclip.training.freeze import depths
from miniclip.training.siglip import siglip_loss
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.weight_files import read_state_dict
from miniclip.weights.convert import convert
from miniclip.weights.inherit import inherit
from miniclip.weights.load import empty_model, load_weights
from miniclip.weights.onnx import export
from tests.training.test_training import recipe, trained_and_resumed  # noqa: F401

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 70}
CAPTIONS = [
    "a Dog, running!",
    "two_cats",
    "a photo of a dog &amp; a very long story about it and all of the cats in town",
]


def save_tokenizer(folder):
    """A sentencepiece-like tokenizer as SigLIP's: unigrams, </s> at the end and as padding."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([text.lower() for text in CAPTIONS] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.fixture
def theirs(tmp_path):
    """transformers' folder of a tiny SiglipModel with random weights, and that model."""
    torch.manual_seed(1)
    text = SIZES | {"vocab_size": 100, "max_position_embeddings": 24, "pad_token_id": 1, "eos_token_id": 1}
    vision = SIZES | {"image_size": 30, "patch_size": 8}  # 30 is no multiple of 8, as 384 is none of 14
    model = SiglipModel(SiglipConfig(text_config=text | {"bos_token_id": 1}, vision_config=vision)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-2.0)
    model.save_pretrained(tmp_path / "theirs")
    images = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 30, "width": 30}, "resample": 3}
    images |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(images))
    save_tokenizer(tmp_path / "theirs")
    return tmp_path / "theirs", model


def test_it_computes_what_transformers_does(theirs, tmp_path):
    """Outputs, logits, gradients of SigLIP's loss; then the folder that is written for transformers."""
    folder, peer = theirs
    model, preprocess, tokenizer = miniclip.load(folder)
    cfg = preprocess.cfg
    assert (cfg.size, cfg.resize_mode, cfg.mean, cfg.std) == (30, "squash", (0.5,) * 3, (0.5,) * 3)
    pixels, ids = torch.randn(3, 3, 30, 30), tokenizer(CAPTIONS)
    trimmed = tokenizer(CAPTIONS[:2], trim=True)
    assert ids.shape == (3, 24) and (ids[1, -3:] == 1).all() and ids[2, -1] == 1 and trimmed.shape[1] < 24
    out = peer(pixel_values=pixels, input_ids=ids)
    with torch.no_grad():
        ours = model(pixels, ids)
        torch.testing.assert_close(ours.image_embeds, out.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.text_embeds, out.text_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_text(trimmed, True), out.text_embeds[:2], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.get_logits(pixels, ids)[0], out.logits_per_image, atol=1e-4, rtol=0)
    model.double().train(), peer.double().train()
    wanted = -F.logsigmoid((2 * torch.eye(3) - 1) * peer(pixel_values=pixels.double(), input_ids=ids).logits_per_text)
    (wanted.sum() / 3).backward()
    siglip_loss(model(pixels.double(), ids)).backward()  # in float32, at the end
    gradients = {name: p.grad for name, p in model.named_parameters()}
    rows = model.visual.key_rows(), model.text.key_rows()
    found = join_in_proj(from_miniclip(gradients, "hf", rows))
    for name, p in peer.named_parameters():
        torch.testing.assert_close(found[name].reshape(p.shape), p.grad, atol=1e-5, rtol=1e-5, msg=name)
    convert(folder, tmp_path / "back", "hf")
    again = AutoModel.from_pretrained(tmp_path / "back")
    original = SiglipModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(t, original[name]) for name, t in again.state_dict().items())
    their_ids = AutoTokenizer.from_pretrained(tmp_path / "back")(
        [caption.replace("&amp;", "&") for caption in CAPTIONS], padding="max_length", truncation=True
    )
    assert their_ids["input_ids"] == tokenizer(CAPTIONS).tolist() and "attention_mask" not in their_ids
    with pytest.raises(CheckpointError, match="CLIPModel has no other towers"):
        convert(folder, tmp_path / "st", "sentence-transformers")


@pytest.mark.parametrize("pool", ["last", "eos"])
def test_an_end_token_that_is_padding_too_ends_no_caption_early(pool, theirs, tmp_path):
    """SigLIP's "</s>" typed in a caption, and, where the end token is pooled, the only one of a caption."""
    published, _, _ = miniclip.load(theirs[0])
    text = {"context_length": 24, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1, "pool_type": pool}
    text |= {"hf_tokenizer_name": str(theirs[0]), "eos_id": 1}
    values = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}}
    own = MiniClip(MiniClipConfig.from_dict(values | {"text_cfg": text})).eval()
    for model in (published, own):
        texts = ["two </s> cats", "a dog", "a very long story </s></s> about it", *CAPTIONS]
        with torch.no_grad():
            whole = model.encode_text(model.text.tokenizer(texts), normalize=True)
        torch.testing.assert_close(torch.from_numpy(embed_texts(model, model.text.tokenizer, texts, 1)), whole)


def test_a_folder_is_complete_and_probabilities_are_sigmoids(theirs, tmp_path):
    folder, _ = theirs
    model, _, tokenizer = miniclip.load(folder)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "photo.png").parent.mkdir(exist_ok=True)
    Image.new("RGB", (50, 20), "red").save(tmp_path / "photo.png")
    file = folder / "model.safetensors"
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    values["text_cfg"]["hf_tokenizer_name"] = "google/a-repository-that-is-not-here"
    (tmp_path / "mine.json").write_text(json.dumps(values))
    beside, _, found = miniclip.load(tmp_path / "mine.json", pretrained=file)  # the tokenizer beside the weights
    assert torch.equal(found(CAPTIONS), tokenizer(CAPTIONS))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="put the model's tokenizer.json and tokenizer_config.json beside the weights"):
        miniclip.load(tmp_path / "mine.json", pretrained=file)
    with pytest.raises(InputError, match="theirs has no tokenizer.json or spiece.model: copy the model's tokenizer"):
        miniclip.load(folder)
    shutil.rmtree(folder)
    values["vision_cfg"]["layers"] = values["text_cfg"]["layers"] = 1
    inherit(model, MiniClipConfig.from_dict(values)).save_pretrained(tmp_path / "small")  # the tokenizer goes along
    assert torch.equal(miniclip.load(tmp_path / "small")[2](CAPTIONS), tokenizer(CAPTIONS))
    model, preprocess, tokenizer = miniclip.load(tmp_path / "saved")
    names = ["dog", "cat", "red"]
    classifier = build_zero_shot_classifier(model, tokenizer, names, ["a photo of a {}"])
    scores = zero_shot_classify(model, preprocess, classifier, tmp_path / "photo.png", names)["scores"]
    pixels = preprocess.load(tmp_path / "photo.png")[None]
    ids = tokenizer([f"a photo of a {name}" for name in names])
    with torch.no_grad():
        expected = model.get_logits(pixels, ids)[0].sigmoid()[0].numpy()
    assert scores == pytest.approx(expected, abs=1e-6) and abs(scores.sum() - 1) > 1e-3
    fast = miniclip.load(tmp_path / "saved", precision="fp32")[0]
    embeds = model.encode_image(pixels, normalize=True).detach().numpy()
    assert np.allclose(probabilities(fast, embeds, classifier), expected, atol=1e-6)
    CLIP(model).lock_image_tower(1)  # the last of timm's groups in OpenCLIP is the pool
    assert {name.partition(".")[0] for name, p in model.visual.named_parameters() if p.requires_grad} == {"attn_pool"}
    depth = depths(model.visual)
    assert {d for name, d in depth.items() if name.startswith(("ln_post", "attn_pool"))} == {0}
    assert depth["conv1.weight"] == depth["positional_embedding"] == 3


def test_the_shipped_configs():
    """Sizes that timm's names say, positions of another image size, and what does not exist."""
    names = [name for name in list_models() if "SigLIP" in name]
    assert len(names) == 25 and {"ViT-B-16-SigLIP", "ViT-gopt-16-SigLIP2-384"} <= set(names)
    for name in names:
        cfg = MiniClipConfig.from_name(name)
        assert cfg.embed_dim == cfg.vision_cfg.width and cfg.preprocess_cfg.resize_mode == "squash", name
        assert f"-{cfg.vision_cfg.patch_size}-" in name and cfg.init_logit_bias == -10, name
    model = empty_model(MiniClipConfig.from_name("ViT-SO400M-14-SigLIP-384"))
    assert len(model.visual.positional_embedding) == 27**2 and model.visual.attn_pool.mlp.c_fc.out_features == 4304
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 878


@pytest.mark.parametrize("fields, message", [
    ({"timm_model_name": "vit_base_patch16_siglip_gap_224"}, "not SigLIP's ViT of a fixed image size"),
    ({"timm_model_name": "naflexvit_base_patch16_siglip"}, "not SigLIP's ViT of a fixed image size"),
    ({"timm_model_name": "vit_base_patch16_siglip_224", "image_size": 256}, "image_size is 256, but 224 in vit_base"),
    ({"timm_model_name": "vit_base_patch16_siglip_224", "timm_model_pretrained": True}, "timm_model_pretrained is"),
    ({"pool_type": "map", "patch_dropout": 1.0}, r"patch_dropout is not in \[0, 1\)"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(fields, message):
    with pytest.raises(InputError, match=message):
        MiniClipConfig.from_dict({"vision_cfg": {"timm_pool": "map", "timm_proj": "none"} | fields})


def test_patches_are_left_out_in_training():
    """Others of each image's at each step, with their positions."""
    sizes = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.75}
    tower = MiniClip(MiniClipConfig.from_dict({"embed_dim": 32, "vision_cfg": sizes | {"pool_type": "map"}})).visual
    images, seen = torch.randn(3, 3, 32, 32), []
    tower.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    whole = tower.eval()(images)
    some = [tower.train()(images) for _ in range(2)]
    assert [tuple(x.shape) for x in seen] == [(3, 16, 32), (3, 4, 32), (3, 4, 32)]
    assert all((x[:, :, None] == seen[0][:, None]).all(dim=3).sum() == 12 for x in seen[1:])  # each its own
    assert not torch.allclose(some[0], some[1]) and torch.equal(tower.eval()(images), whole)


def test_positions_are_interpolated_without_a_class_token(tmp_path):
    small = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "pool_type": "map"}
    values = {"embed_dim": 32, "text_cfg": {"width": 32, "heads": 1, "layers": 1, "vocab_size": 49408}}
    model = MiniClip(MiniClipConfig.from_dict(values | {"vision_cfg": small | {"image_size": 24}}))
    torch.save(model.state_dict(), tmp_path / "small.pt")
    larger = MiniClip(MiniClipConfig.from_dict(values | {"vision_cfg": small | {"image_size": 40}}))
    with pytest.warns(UserWarning, match="visual.positional_embedding was interpolated from 9 to 25 positions"):
        load_weights(larger, tmp_path / "small.pt")
    grid = model.visual.positional_embedding.detach().T.reshape(1, 32, 3, 3)
    wanted = F.interpolate(grid, (5, 5), mode="bicubic", antialias=True).flatten(2)[0].T
    assert torch.equal(larger.visual.positional_embedding, wanted)


@pytest.mark.slow
def test_it_is_fine_tuned_on_two_processes_and_resumes_bit_for_bit(theirs, recipe, caption_set, run_script):  # noqa: F811
    steps = ["--model", theirs[0], "--loss", "siglip"]
    trained = trained_and_resumed(recipe, caption_set, run_script, steps)
    before = miniclip.load(theirs[0])[0].state_dict()
    assert not any(torch.equal(t, before[name]) for name, t in trained.items())
    shutil.rmtree(theirs[0])  # what was trained is complete
    convert(caption_set / "run", caption_set / "hf", "hf")
    assert AutoModel.from_pretrained(caption_set / "hf").logit_bias.item() == trained["logit_bias"].item()


@pytest.mark.parametrize("form", ["config", "our folder", "their folder"])
def test_openclips_calls_use_its_tokenizer(theirs, tmp_path, form):
    """Not CLIP's, whose ids mean other words here; and its padding, which has a part in the result."""
    model, _, tokenizer = miniclip.load(theirs[0])
    values, name, precision = model.config.to_dict(), "siglip-mine", "fp32"
    values["text_cfg"]["hf_tokenizer_name"] = str(theirs[0])
    (tmp_path / "siglip-mine.json").write_text(json.dumps(values | {"custom_text": True}))
    face.add_model_config(tmp_path / "siglip-mine.json")
    if form == "their folder":
        name = f"local-dir:{theirs[0]}"
    if form == "our folder":  # which alone has the tokenizer
        model.save_pretrained(tmp_path / "saved")
        shutil.rmtree(theirs[0])
        name, precision = f"local-dir:{tmp_path / 'saved'}", "pure_bf16"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "siglip-mine has random weights")
        peer = face.create_model(name, precision=precision).eval()
    found = face.get_tokenizer(name)
    assert torch.equal(found(CAPTIONS), tokenizer(CAPTIONS))
    assert face.get_tokenizer(name, context_length=9)("a dog").shape == (1, 9)
    classifier = face.build_zero_shot_classifier(peer, found, ["dog", "cat"], ["a photo of a {}"])
    with torch.no_grad():
        wanted = peer.encode_text(found(["a photo of a dog", "a photo of a cat"]), normalize=True).T
    torch.testing.assert_close(classifier, wanted, atol=1e-5 if precision == "fp32" else 1e-2, rtol=0)


def test_openclips_file_and_folder(theirs, tmp_path):
    """In timm's names. A folder needs a name of timm's, as that is how OpenCLIP makes such a tower."""
    convert(theirs[0], tmp_path / "open.pt", "openclip")
    stored = read_state_dict(tmp_path / "open.pt")
    assert stored["visual.trunk.pos_embed"].shape == (1, 9, 32) and "text.positional_embedding" in stored
    model, _, tokenizer = miniclip.load(theirs[0])
    other = MiniClip(model.config)
    load_weights(other, tmp_path / "open.pt")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in other.state_dict().items())
    with pytest.raises(CheckpointError, match="name a config with timm_model_name, or end the target in .safetensors"):
        convert(theirs[0], tmp_path / "folder", "openclip")
    with pytest.raises(CheckpointError, match="its image tower is SigLIP's: name such a config"):
        convert(tmp_path / "open.pt", tmp_path / "unknown", "miniclip")


@pytest.mark.slow
def test_the_real_library_at_full_size(theirs, tmp_path):
    """OpenCLIP's own ViT-B-32-SigLIP2-256: outputs, logits, its folder with the tokenizer."""
    open_clip = pytest.importorskip("open_clip", reason="OpenCLIP is not installed: pip install open_clip_torch")
    config = MiniClipConfig.from_name("ViT-B-32-SigLIP2-256").to_dict()
    config["text_cfg"] |= {"vocab_size": 100, "layers": 2, "hf_tokenizer_name": str(theirs[0])}
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_dict(config)).eval()
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "open", "openclip")
    peer = open_clip.create_model(f"local-dir:{tmp_path / 'open'}").eval()
    ids = model.text.tokenizer(CAPTIONS)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'open'}")(CAPTIONS), ids)
    pixels = torch.randn(2, 3, 256, 256)
    with torch.no_grad():
        ours, others = model.get_logits(pixels, ids)[0], peer.get_logits(pixels, ids)[0]
        for method, inputs in (("encode_image", pixels), ("encode_text", ids)):
            mine, wanted = (getattr(one, method)(inputs, normalize=True) for one in (model, peer))
            torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=0, msg=method)
    torch.testing.assert_close(ours, others, atol=1e-4, rtol=0)
    again, _, tokenizer = miniclip.load(tmp_path / "open")
    assert torch.equal(again.encode_text(tokenizer(CAPTIONS)), model.encode_text(ids))


def test_it_is_exported_to_onnx_with_its_tokenizer(theirs, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    model, _, tokenizer = miniclip.load(theirs[0])
    export(model, tmp_path / "graphs", "onnx", "fp32")  # compared with the model's embeddings there
    graphs, _, found = miniclip.load(tmp_path / "graphs")
    ids = found(CAPTIONS[:2], trim=True)
    assert torch.equal(ids, tokenizer(CAPTIONS[:2], trim=True))
    expected = model.encode_text(ids, normalize=True)
    torch.testing.assert_close(graphs.encode_text(ids, normalize=True), expected, atol=1e-5, rtol=0)
    plain = Tokenizer.from_file(str(tmp_path / "graphs" / "tokenizer.json"))
    assert [row.ids for row in plain.encode_batch(CAPTIONS[:2])] == ids.tolist()
