"""Families of towers that OpenCLIP has too: with its weights they compute what it computes; they train, are saved, and
converted into each form that can hold them."""

import json
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from PIL import Image

import miniclip
from benchmarks.make_towers_golden import GOLDEN, MODELS, VIT, contrastive, make_inputs, make_weights, record, summary
from miniclip.checkpoint import from_miniclip, to_miniclip
from miniclip.config import MiniClipConfig
from miniclip.inference.fast import fast_features, inference_copy
from miniclip.model import MiniClip
from miniclip.training.distill import Distillation
from miniclip.training.finetune import no_dropout
from miniclip.training.freeze import depths, freeze
from miniclip.training.grad_cache import wrap_towers
from miniclip.transforms import Preprocess
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.weight_files import read_state_dict
from miniclip.weights.convert import convert
from miniclip.weights.inherit import chosen_layers, inherit
from miniclip.weights.load import empty_model, fitting_configs, load_weights, resize_positions
from tests.towers.test_hf_towers import save_text_encoder
from tests.training.test_training import recipe, trained_and_resumed  # noqa: F401

RECORDED = json.loads(GOLDEN.read_text(encoding="utf-8"))["models"]
# Of the family that is trained, with CLIP's tokenizer: fields of vision_cfg, and more of text_cfg.
PRUNED = {"head_width": 8, "block_heads": [2, 0, 3], "block_mlp_widths": [20, 7, 0], "width": 30, "layers": 3}
TRAINED = {
    "ResNet": ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, {}),
    "CLIPA": (VIT | {"no_ln_pre": True, "pool_type": "avg", "ls_init_value": 1}, {"pool_type": "last"}),
    "TinyCLIP auto": ({"image_size": 32, "patch_size": 8, **PRUNED}, PRUNED),
}
REFUSED = {"TinyCLIP auto": "OpenCLIP has no towers with blocks that differ in size"}


def config_of(cfg: dict) -> MiniClipConfig:
    return MiniClipConfig.from_dict({name: value for name, value in cfg.items() if name != "custom_text"})


def rows(model: MiniClip) -> tuple[list, list]:
    return model.visual.key_rows(), model.text.key_rows()


@pytest.mark.parametrize("source", ["recorded", "live"])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_openclip_does(name, source):
    """Outputs, logits, the loss, each gradient and BatchNorm's statistics after a step; names in both directions."""
    if source == "live":
        pytest.importorskip("open_clip", reason="OpenCLIP is not installed: pip install open_clip_torch")
    peer = RECORDED[name] if source == "recorded" else record(MODELS[name])
    model = MiniClip(config_of(MODELS[name]))
    layout = "custom_text" if MODELS[name].get("custom_text") else "openclip"
    names = from_miniclip(model.state_dict(), layout, rows(model))
    theirs = make_weights({name: tuple(t.shape) for name, t in names.items()})
    ours, found = to_miniclip(theirs, rows(model))
    assert found == layout
    model.load_state_dict(ours, strict=True)
    back = from_miniclip(model.state_dict(), layout, rows(model))
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    images, input_ids = make_inputs(MODELS[name])
    with torch.no_grad():
        out = model.eval()(images, input_ids)
        for kind, got in (("image", out.image_embeds), ("text", out.text_embeds)):
            assert got.flatten().tolist() == pytest.approx(peer[kind], abs=1e-5), kind
        assert model.get_logits(images, input_ids)[0].flatten().tolist() == pytest.approx(peer["logits"], abs=1e-4)
    model.double()
    for every in (0, 2):  # the same with activation checkpointing
        model.load_state_dict(ours)
        model.activation_checkpointing_enable(every_n_layers=every)
        model.zero_grad()
        image, text, scale, _ = model.train()(images.double(), input_ids)
        loss = contrastive(scale * image @ text.T)
        loss.backward()
        filled = model.state_dict() | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients = {n: t for n, t in from_miniclip(filled, layout, rows(model)).items() if n in peer["gradients"]}
        after = {
            n: t for n, t in from_miniclip(model.state_dict(), layout, rows(model)).items() if n in peer["statistics"]
        }
        mine = summary(loss, gradients, after)
        assert mine["loss"] == pytest.approx(peer["loss"], abs=1e-6)
        for kind in ("gradients", "statistics"):
            assert mine[kind] == pytest.approx(peer[kind], abs=1e-6, rel=1e-6), kind


def test_a_resnet_whose_activations_are_checkpointed_can_be_compiled():
    """The gradients are the same, and BatchNorm counts the batch once."""
    torch.manual_seed(0)
    tower, images = MiniClip(config_of(MODELS["ResNet"])).visual.train(), make_inputs(MODELS["ResNet"])[0]
    tower.checkpoint_activations(1)
    before, found = {name: t.clone() for name, t in tower.state_dict().items()}, []
    for run in (tower, torch.compile(tower, backend="aot_eager")):
        tower.load_state_dict(before)
        tower.zero_grad()
        run(images).square().sum().backward()
        found.append([*(p.grad for p in tower.parameters()), *(t.clone() for t in tower.buffers())])
    for ours, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, ours)


@pytest.fixture(params=TRAINED)
def config_file(request, tmp_path):
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision, more = TRAINED[request.param]
    (tmp_path / "model.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text | more}))
    return tmp_path / "model.json"


@pytest.mark.parametrize(
    "config_file",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "ResNet")) for name in TRAINED],
    indirect=True,
)
def test_it_trains_on_two_processes_and_resumes_bit_for_bit(config_file, recipe, caption_set, run_script):  # noqa: F811
    steps = ["--model", config_file]
    trained = trained_and_resumed(recipe, caption_set, run_script, steps)
    fresh = MiniClip(MiniClipConfig.from_json(config_file)).state_dict()
    assert not any(torch.equal(t, fresh[n]) for n, t in trained.items() if n.startswith("visual.") and t.ndim > 1)


def test_it_is_saved_converted_and_loaded(config_file, tmp_path, request):
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_json(config_file)).eval()
    model.save_pretrained(tmp_path / "saved")
    for to in ("hf", "sentence-transformers"):
        with pytest.raises(CheckpointError, match="transformers' CLIPModel has no other towers than CLIP's own"):
            convert(tmp_path / "saved", tmp_path / "hf", to)
    folders, refused = ["saved", "openclip"], REFUSED.get(request.node.callspec.params["config_file"])
    for name in ("openclip.pt", "openclip"):
        with pytest.raises(CheckpointError, match=refused) if refused else nullcontext():
            convert(tmp_path / "saved", tmp_path / name, "openclip")
    if refused:
        folders.pop()
        torch.save(from_miniclip(model.state_dict(), "openclip", rows(model)), tmp_path / "openclip.pt")
    tinyclip = {}  # as TinyCLIP stores it: of a wrapped model, beside the optimizer
    for key, tensor in read_state_dict(tmp_path / "openclip.pt").items():
        tinyclip[f"module.{key}"] = tensor
    torch.save({"state_dict": tinyclip, "epoch": 1}, tmp_path / "tinyclip.pt")
    pixels = torch.randn(2, 3, 32, 32)
    for file in ("openclip.pt", "tinyclip.pt"):
        other = MiniClip(model.config)
        load_weights(other, tmp_path / file)
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in other.state_dict().items())
    for folder in folders:
        other, preprocess, _ = miniclip.load(tmp_path / folder)
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in other.state_dict().items())
        torch.testing.assert_close(other.encode_image(pixels), model.encode_image(pixels), atol=1e-6, rtol=1e-5)
        assert preprocess.cfg.size == 32
    if not refused and find_spec("open_clip"):
        import open_clip

        peer = open_clip.create_model(f"local-dir:{tmp_path / 'openclip'}").eval()
        torch.testing.assert_close(peer.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=1e-5)
    fast, _, _ = miniclip.load(tmp_path / "saved", precision="fp32")
    torch.testing.assert_close(fast.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=1e-5)


def test_openais_archives_of_resnets(tmp_path, recwarn):
    """Half precision, sizes beside the weights, no config: recognised. Positions are resized with the image size."""
    values = MODELS["ResNet, QuickGELU"] | {"text_cfg": {"vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}}
    model = MiniClip(config_of(values))
    theirs = {
        name: t.half() if t.ndim > 1 else t
        for name, t in from_miniclip(model.state_dict(), "openclip", rows(model)).items()
    }
    torch.save(theirs | {"input_resolution": torch.tensor(64)}, tmp_path / "RN.pt")
    convert(tmp_path / "RN.pt", tmp_path / "RN.safetensors", "openclip")
    assert {t.dtype for t in read_state_dict(tmp_path / "RN.safetensors").values()} == {torch.float32, torch.int64}
    larger = values | {"vision_cfg": values["vision_cfg"] | {"image_size": 96}}
    other = MiniClip(config_of(larger))
    load_weights(other, tmp_path / "RN.pt")
    assert "visual.attnpool.positional_embedding was interpolated from 5 to 10 positions" in str(recwarn[-1].message)
    resized = resize_positions(model.visual.attnpool.positional_embedding.half(), 10, is_grid=True)
    assert torch.equal(other.visual.attnpool.positional_embedding, resized)
    for name in ("RN50", "TinyCLIP-ResNet-30M-Text-29M"):
        shapes = empty_model(MiniClipConfig.from_name(name)).state_dict()
        assert fitting_configs(shapes, quick_gelu=False) == [name]
    with pytest.raises(CheckpointError, match=r"none that ships, but one with .*'layers': \(1, 2, 1, 1\), 'width': 8"):
        load_weights(MiniClip(config_of(values | {"embed_dim": 25})), tmp_path / "RN.pt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_resnet_of_another_type_embeds_one_image_and_some(dtype):
    """One is not worth fusing BatchNorms, whose statistics are of that type too; from eight on they are."""
    model = MiniClip(config_of(MODELS["ResNet"])).eval()
    preprocess = Preprocess(model.config.preprocess_cfg)
    images = [Image.new("RGB", (40, 30), (20 * i, 90, 255 - 20 * i)) for i in range(8)]
    exact = miniclip.embed_images(model, preprocess, images)
    for n in (1, 8):
        found = miniclip.embed_images(model.to(dtype), preprocess, images[:n])
        assert found.dtype == exact.dtype and (found * exact[:n]).sum(axis=1).min() > 0.999


def test_a_frozen_resnet_keeps_its_statistics():
    model = MiniClip(config_of(MODELS["ResNet"])).train()
    images, input_ids = make_inputs(MODELS["ResNet"])
    depth = depths(model.visual)
    assert depth["conv1.weight"] == depth["bn1.weight"] == 6 and depth["layer1.0.conv1.weight"] == 5
    assert depth["layer4.0.bn3.bias"] == 1 and {d for n, d in depth.items() if n.startswith("attnpool")} == {0}
    freeze(model, image="all_but_1")
    learning = {name.split(".")[0] for name, p in model.visual.named_parameters() if p.requires_grad}
    assert learning == {"layer4", "attnpool"}
    before = {name: t.clone() for name, t in model.visual.named_buffers()}
    model.train()(images, input_ids)
    assert all(torch.equal(t, before[name]) for name, t in model.visual.named_buffers())


def test_pruning_is_leaving_out(tmp_path):
    """Heads and channels that a whole model does not read from are gone; the sizes come from the file, in TinyCLIP's
    names, and a whole model gives the first of its heads and channels to a pruned one."""
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}
    whole = MiniClip(MiniClipConfig.from_dict({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})).eval()
    sizes = {"block_heads": [3, 0], "block_mlp_widths": [50, 0]}
    values = {"embed_dim": 16, "vision_cfg": vision | sizes, "text_cfg": text | sizes | {"head_width": 8}}
    small = inherit(whole, MiniClipConfig.from_dict(values))
    for tower in (whole.visual, whole.text):
        for block, heads, hidden in zip(tower.blocks, *sizes.values()):
            block.attn.out_proj.weight.data[:, 8 * heads :] = 0
            block.mlp.c_proj.weight.data[:, hidden:] = 0
    pixels, input_ids = torch.randn(2, 3, 32, 32), torch.tensor([[49406, 320, 49407, 0], [49406, 1, 2, 49407]])
    assert torch.allclose(small.encode_image(pixels), whole.encode_image(pixels), atol=1e-5)
    assert torch.allclose(small.encode_text(input_ids), whole.encode_text(input_ids), atol=1e-5)
    names = {"_image_encoder.": "image_encoder_without_ddp.", "_text_encoder.": "text_encoder_without_ddp."}
    theirs = {"module._image_encoder.l0_module.heads_loga": torch.zeros(2, 4)}
    for name, tensor in from_miniclip(small.state_dict(), "tinyclip", rows(small)).items():
        start = next((start for start in names if name.startswith(start)), "")
        theirs["module." + names.get(start, "") + name.removeprefix(start)] = tensor
    torch.save({"state_dict": theirs}, tmp_path / "TinyCLIP-auto.pt")
    unsized = {name: cfg | {"block_heads": [], "block_mlp_widths": []} for name, cfg in values.items() if "cfg" in name}
    (tmp_path / "auto.json").write_text(json.dumps(values | unsized))
    with pytest.warns(UserWarning, match="random"):
        assert isinstance(miniclip.load(tmp_path / "auto.json")[0].visual.blocks[1].attn.heads, int)  # whole
    loaded, _, _ = miniclip.load(tmp_path / "auto.json", pretrained=tmp_path / "TinyCLIP-auto.pt")
    assert loaded.config.vision_cfg.block_heads == [3] and loaded.config.text_cfg.block_mlp_widths == [50]
    assert torch.equal(loaded.encode_image(pixels), small.encode_image(pixels))
    convert(tmp_path / "TinyCLIP-auto.pt", tmp_path / "folder", "miniclip", str(tmp_path / "auto.json"))
    assert torch.equal(miniclip.load(tmp_path / "folder")[0].encode_text(input_ids), small.encode_text(input_ids))
    more = values | {"vision_cfg": vision | {"block_heads": [5, 0], "block_mlp_widths": [50, 200]}}
    with pytest.raises(InputError, match=r"blocks.0.attn.in_proj.weight is \(120, 32\), the source has .* \(96, 32\)"):
        inherit(whole, MiniClipConfig.from_dict(more))
    with pytest.raises(InputError, match=r"block_heads is \[1\], not a number from 0 for each of 2 layers"):
        MiniClipConfig.from_dict({"vision_cfg": vision | {"block_heads": [1]}})
    learns_from = Distillation(whole, Preprocess(whole.config.preprocess_cfg), small)  # it reads the same tokens
    scores = learns_from.embed(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), input_ids)
    assert torch.allclose(scores.text_embeds, whole.encode_text(input_ids, normalize=True), atol=1e-5)


def test_a_small_resnet_inherits_from_a_large_one():
    large = config_of(MODELS["ResNet"] | {"vision_cfg": {"image_size": 64, "layers": [2, 4, 1, 3], "width": 16}})
    source, small = MiniClip(large), config_of(MODELS["ResNet"])
    model = inherit(source, small)
    assert chosen_layers(large.vision_cfg, small.vision_cfg) == [0, 2, 4, 6, 7]
    big, ours = source.state_dict(), model.state_dict()
    for name, there, shape in (
        ("layer2.1.conv2.weight", "layer2.2.conv2.weight", (16, 16, 3, 3)),
        ("layer4.0.downsample.0.weight", "layer4.0.downsample.0.weight", (256, 128, 1, 1)),
        ("attnpool.q_proj.weight", "attnpool.q_proj.weight", (256, 256)), ("bn1.running_var", "bn1.running_var", (4,)),
    ):  # fmt: skip
        assert ours[f"visual.{name}"].shape == shape
        assert torch.equal(ours[f"visual.{name}"], big[f"visual.{there}"][tuple(map(slice, shape))]), name
    with pytest.raises(
        InputError, match=r"the image tower has \(2, 4, 1, 3\) layers, the source's only \(1, 2, 1, 1\)"
    ):
        inherit(model, large)
    with pytest.raises(InputError, match="layers_image is for transformers"):
        inherit(source, small, layers_image=[0, 1, 2, 3, 4])


def test_a_text_tower_with_another_tokenizer(tmp_path):
    """CLIPA's: a BERT tokenizer whose last token is written as 0, and positions of padding that have a part in the
    result, also of batches without any."""
    save_text_encoder(tmp_path / "bert")
    text = {"context_length": 10, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1, "pool_type": "last"}
    text |= {"no_causal_mask": True, "hf_tokenizer_name": str(tmp_path / "bert")}
    values = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": text | {"tokenizer_kwargs": {"strip_sep_token": True}}}
    model = MiniClip(MiniClipConfig.from_dict(values)).eval()
    model.save_pretrained(tmp_path / "saved")
    for force in (False, True):  # also over a folder with a tokenizer
        convert(tmp_path / "saved", tmp_path / "again", "miniclip", force=force)
    plain = MiniClip(MiniClipConfig.from_dict(values | {"text_cfg": text})).text.tokenizer
    (tmp_path / "bert").rename(tmp_path / "no-bert")  # a folder is complete
    loaded, _, tokenizer = miniclip.load(tmp_path / "saved")
    captions = ["a dog", "a dog runs"]
    ids, whole = tokenizer(captions), plain(captions)
    end = plain.tokenizer.sep_token_id
    assert end in whole and end not in ids and torch.equal(ids, torch.where(whole == end, 0, whole))
    assert tokenizer(captions, trim=True).shape[1] < 10 == ids.shape[1]
    expected = model.encode_text(ids)
    assert torch.equal(loaded.encode_text(tokenizer(captions, trim=True)), expected)
    assert (loaded.encode_text(ids[:, :1]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("section, fields, message", [
    ("text_cfg", {"act_kwargs": {"inplace": True}}, "act_kwargs has inplace, and only approximate is supported"),
    ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokenizer_kwargs has clean, and only strip_sep"),
    ("text_cfg", {"tokenizer_kwargs": {"strip_sep_token": True}}, "tokenizer_kwargs needs hf_tokenizer_name"),
    ("text_cfg", {"pool_type": "none"}, "pool_type is 'none', not 'argmax' or"),
    ("text_cfg", {"act_kwargs": {"approximate": "x"}}, "act_kwargs: approximate is 'x', not none or tanh"),
    ("vision_cfg", {"norm_kwargs": {"bias": False}}, "vision_cfg.norm_kwargs has bias, and only eps"),
    ("vision_cfg", {"norm_kwargs": {"eps": "1e-6"}}, "norm_kwargs: eps is '1e-6', not a number between 0 and 1"),
    ("vision_cfg", {"global_average_pool": True}, "unknown field 'global_average_pool'"),
    ("vision_cfg", {"output_tokens": True, "pool_type": "avg"}, "unknown field 'output_tokens'"),
    ("vision_cfg", {"layers": [1, 1, 1]}, r"layers is \[1, 1, 1\], not of type tuple"),
    ("vision_cfg", {"layers": [1, 1, 1, 0]}, "layers is .* not four from 1 to 1000"),
    ("vision_cfg", {"layers": [1, 1, 1, 1], "patch_size": 16}, "patch_size is given, but a ResNet has no patches"),
    ("vision_cfg", {"layers": [1, 1, 1, 1], "image_size": 100}, "image_size is not a multiple of 32"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(section, fields, message):
    with pytest.raises(InputError, match=message):
        MiniClipConfig.from_dict({"vision_cfg": {}} | {section: fields})


@pytest.mark.parametrize(("vision", "text", "fast"), [
    ({}, {"token_dropout": 0.9}, (True, True)),
    ({"no_ln_pre": True}, {"proj_bias": True, "norm_kwargs": {"eps": 1e-6}}, (True, True)),
    ({"ls_init_value": 0.1}, {"ls_init_value": 0.1}, (False, False)),
    ({"pool_type": "avg"}, {"pool_type": "first"}, (False, False)),
    ({}, {"no_causal_mask": True}, (True, False)),
])  # fmt: skip
def test_the_fast_path_computes_the_variants_that_it_can(vision, text, fast, caplog):
    sizes = {"width": 16, "heads": 2, "layers": 3, "vocab_size": 99, "context_length": 12}
    cfg = {"embed_dim": 8, "vision_cfg": {**VIT, "image_size": 32, **vision}, "text_cfg": {**sizes, **text}}
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_dict(cfg))
    input_ids = torch.randint(1, 98, (5, 12))
    input_ids[range(5), [3, 11, 6, 7, 8]] = 98
    found = []
    for wrapped in (False, True):
        wrap_towers(model.train(), fast=wrapped)
        assert not wrapped or [fast_features in tower.wrappers for tower in (model.visual, model.text)] == list(fast)
        model.zero_grad()
        torch.manual_seed(1)  # hides the same tokens
        out = model(torch.ones(5, 3, 32, 32).cumsum(2) / 9, input_ids)
        (out.image_embeds.sin().sum() + out.text_embeds.cumsum(1).sin().sum()).backward()
        found.append([out.image_embeds, out.text_embeds, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert max(grad.abs().max() for grad in found[-1]) < 1e4, "a hidden first token would give 4e8"
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    copied = inference_copy(model.eval())
    ours, plain = copied.encode_text(input_ids), model.encode_text(input_ids)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert not caplog.text, "a tower with code of its own is not changed code"


def test_a_share_of_the_tokens_is_hidden_in_training_only(tmp_path):
    sizes = {"width": 16, "heads": 2, "layers": 1, "vocab_size": 49408, "context_length": 40}
    cfg = {"embed_dim": 8, "vision_cfg": {**VIT, "image_size": 32}, "text_cfg": sizes}
    plain = MiniClip(MiniClipConfig.from_dict(cfg)).eval()
    model = MiniClip(MiniClipConfig.from_dict({**cfg, "text_cfg": {**sizes, "token_dropout": 0.4}})).eval()
    model.load_state_dict(plain.state_dict())
    input_ids = torch.zeros(50, 40, dtype=torch.long)
    input_ids[:, :30] = torch.randint(1, 49000, (50, 30))
    input_ids[:, 30] = 49407
    whole = plain.text.embed_tokens(input_ids)
    assert torch.equal(model.text(input_ids), plain.text(input_ids))
    hidden = model.train().text.embed_tokens(input_ids)
    zeros = (hidden == 0).all(dim=2)
    assert torch.equal(hidden[~zeros], whole[~zeros]) and not zeros[:, [0, 30]].any()
    assert 0.3 < zeros[:, 1:30].float().mean() < 0.5
    with no_dropout(model):  # as for a check of the gradients
        assert torch.equal(model.text.embed_tokens(input_ids), whole)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "openclip")  # which has no such field
    assert "token_dropout" not in (tmp_path / "theirs" / "open_clip_config.json").read_text()
    for changed in ({"token_dropout": 1.0}, {"token_dropout": 0.2, "pool_type": "last"}):
        with pytest.raises(InputError, match="token_dropout"):
            MiniClipConfig.from_dict({**cfg, "text_cfg": {**sizes, **changed}})
