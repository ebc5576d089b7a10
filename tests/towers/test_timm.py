"""Image towers of timm: with OpenCLIP's weights they compute what OpenCLIP computes; they train, are saved, converted
and exported; a config from elsewhere fetches nothing and asks for no more than it may."""

import json
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import miniclip
from benchmarks.make_towers_golden import contrastive, make_inputs, make_weights
from miniclip.checkpoint import from_miniclip, to_miniclip
from miniclip.compat.model import CLIP
from miniclip.config import MiniClipConfig, list_models
from miniclip.model import MiniClip
from miniclip.towers.intermediates import forward_intermediates
from miniclip.training.finetune import PatchDropout, no_dropout
from miniclip.training.freeze import depths, freeze
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.weights.convert import convert
from miniclip.weights.onnx import export
from tests.training.test_training import recipe, trained_and_resumed  # noqa: F401
from tests.weights.test_families_exported import find_a_picture

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
CONVNEXT = {"image_size": 32, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}
MLP = CONVNEXT | {"timm_proj": "mlp"}
TOKEN = {"image_size": 32, "timm_pool": "token", "timm_proj": None}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {  # a family: the published tower that is made small, its sizes, and the fields of its published config
    "convnext": ("convnext_base", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, CONVNEXT),
    "convnext, mlp": ("convnext_large", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 32)}, MLP),
    "EVA02": ("eva02_base_patch16_clip_224", VIT, TOKEN),
    "PE-Core": ("vit_pe_core_tiny_patch16_384", VIT | {"ref_feat_shape": (4, 4)}, TOKEN | {"timm_pool": "map"}),
    "MobileCLIP2-L": ("vit_large_patch14_clip_224", VIT, TOKEN),
    "MobileCLIP-S": (
        "fastvit_mci0", {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 64)}, TOKEN | {"timm_pool": "avg"},
    ),
    "ViTamin": (
        "vitamin_small_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, CONVNEXT,
    ),
    "features as embeddings": ("vit_tiny_patch16_224", VIT, TOKEN | {"timm_pool": "map", "timm_proj": "none"}),
}  # fmt: skip


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed: pip install timm torchvision")


def config_of(vision: dict, embed_dim: int = 24) -> MiniClipConfig:
    return MiniClipConfig.from_dict({"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": TEXT})


def rows(model: MiniClip) -> tuple[list, list]:
    return model.visual.key_rows(), model.text.key_rows()


def small_tower(timm, family: str) -> dict:
    """Registers a family's small model at timm; returns its fields of vision_cfg."""
    published, sizes, fields = SMALL[family]
    if family == "ViTamin":
        from timm.models.vitamin import VitCfg, VitConvCfg

        conv = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        sizes = sizes | {"embed_cfg": VitCfg((8, 16, 32), (1, 1, 1), stem_width=8, conv_cfg=conv, head_type="1d")}
    entry = timm.models.model_entrypoint(published)

    def make(pretrained=False, **kwargs):
        return entry(pretrained=pretrained, **sizes, **kwargs)

    make.__name__ = "small_" + "".join(c for c in family.lower() if c.isalnum())
    if not timm.is_model(make.__name__):
        timm.models.register_model(make)
    return fields | {"timm_model_name": make.__name__}


@pytest.mark.parametrize("family", SMALL)
def test_it_computes_what_openclip_does(family, timm):
    """Outputs, logits, the loss, each gradient and BatchNorm's statistics after a step; names in both directions."""
    open_clip = pytest.importorskip("open_clip", reason="OpenCLIP is not installed: pip install open_clip_torch")
    vision = small_tower(timm, family)
    cfg = {"embed_dim": 32 if vision["timm_proj"] == "none" else 24, "vision_cfg": vision, "text_cfg": TEXT}
    custom = vision["timm_proj"] is None or family == "ViTamin"
    peer = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**cfg)
    weights = make_weights({name: tuple(t.shape) for name, t in peer.state_dict().items()})
    weights |= {name: t.abs() for name, t in weights.items() if name.endswith("gamma")}
    peer.load_state_dict(weights)
    model = MiniClip(MiniClipConfig.from_dict(cfg))
    ours, layout = to_miniclip(weights, rows(model))
    assert layout == ("custom_text" if custom else "openclip")
    model.load_state_dict(ours, strict=True)
    back = from_miniclip(model.state_dict(), layout, rows(model))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    images, input_ids = make_inputs(cfg)
    close = partial(torch.testing.assert_close, rtol=1e-5)
    with torch.no_grad():
        model.eval(), peer.eval()
        for method, inputs in (("encode_image", images), ("encode_text", input_ids)):
            close(getattr(model, method)(inputs), getattr(peer, method)(inputs), atol=1e-5)
        close(model.get_logits(images, input_ids)[0], peer.get_logits(images, input_ids)[0], atol=1e-5)
        check_intermediates(model, peer, images)
    check_locks(CLIP(MiniClip(model.config), custom_text=custom), deepcopy(peer), images)
    image, text, scale = peer.double().train()(images.double(), input_ids)[:3]
    contrastive(scale * image @ text.T).backward()
    expected = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    counted = any("running" in name for name in weights)
    model.double().train()
    for every in (0,) if counted else (0, 1):  # the same with activation checkpointing
        model.activation_checkpointing_enable(every_n_layers=every)
        model.zero_grad()
        image, text, scale, _ = model(images.double(), input_ids)
        contrastive(scale * image @ text.T).backward()
        filled = model.state_dict() | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients = from_miniclip(filled, layout, rows(model))
        for name, gradient in expected.items():
            close(gradients[name], gradient, atol=1e-9, rtol=1e-6)
    after = from_miniclip(model.state_dict(), layout, rows(model))
    for name, buffer in peer.named_buffers():
        if name in after:
            close(after[name], buffer, atol=1e-9)


def check_locks(face: CLIP, peer, images: torch.Tensor):
    """`lock_image_tower` freezes what OpenCLIP's does, and statistics if asked to."""
    learning, moved = [], []
    for groups in (0, 1, 2):
        for one in (face, peer):
            one.requires_grad_(True).lock_image_tower(groups, freeze_bn_stats=groups == 2)
        for visual in (face.visual, peer.visual):
            learning.append({name for name, p in visual.named_parameters() if p.requires_grad})
        assert learning.pop() == learning.pop(), groups
    for visual in (face.visual, peer.visual):
        before = {name: t.clone() for name, t in visual.state_dict().items()}
        visual.train()(images)
        moved.append({name for name, t in visual.state_dict().items() if not torch.equal(t, before[name])})
    assert moved[0] == moved[1]


def check_intermediates(model: MiniClip, peer, images: torch.Tensor):
    """`forward_intermediates` gives what OpenCLIP's does, and an error where that one has none for a model."""
    for options in ({}, {"image_indices": 1, "normalize_intermediates": True}, {"image_output_fmt": "NLC"},
                    {"image_output_extra_tokens": True, "image_indices": [0], "stop_early": True}):  # fmt: skip
        try:
            theirs = peer.forward_intermediates(images, **options)
        except (TypeError, AssertionError):
            with pytest.raises(InputError, match="of timm cannot give this"):
                forward_intermediates(model, images, **options)
            continue
        ours = forward_intermediates(model, images, **options)
        assert ours.keys() == theirs.keys()
        for name, wanted in theirs.items():
            torch.testing.assert_close(ours[name], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", SMALL)
def test_patches_are_left_out_as_in_openclip(family, timm):
    """In training, by a config or `--patch_dropout`; a tower without patches to leave out says so."""
    vision, embed_dim = small_tower(timm, family), 32 if "features" in family else 24
    images, _ = make_inputs({"vision_cfg": vision, "text_cfg": TEXT})
    model = MiniClip(config_of(vision, embed_dim)).train()
    whole, tower = model.encode_image(images), model.visual
    if "convnext" in family or family == "MobileCLIP-S":
        with pytest.raises(InputError, match=f"{vision['timm_model_name']} of timm leaves out no patches"):
            MiniClip(config_of(vision | {"patch_dropout": 0.5}, embed_dim))
        with pytest.raises(InputError, match="leaves out no patches"):
            PatchDropout(tower, 0.5)
        return
    callback, state = PatchDropout(tower, 0.5, 0.5), SimpleNamespace(global_step=0, max_steps=2)
    callback.on_step_begin(None, state, None)
    some = [model.encode_image(images) for _ in range(2)]
    assert not torch.allclose(some[0], whole) and not torch.allclose(some[0], some[1])
    with no_dropout(model):
        torch.testing.assert_close(model.encode_image(images), whole)
    assert tower.patch_dropout == 0.5
    with pytest.raises(InputError, match="leaves no grid of patches in training: call model.eval"):
        forward_intermediates(model, images)
    torch.testing.assert_close(model.eval().encode_image(images), whole)
    model.train()
    callback.on_step_begin(None, SimpleNamespace(global_step=1, max_steps=2), None)
    torch.testing.assert_close(model.encode_image(images), whole)
    open_clip = pytest.importorskip("open_clip", reason="OpenCLIP is not installed: pip install open_clip_torch")
    cfg = {"embed_dim": embed_dim, "vision_cfg": vision | {"patch_dropout": 0.5}, "text_cfg": TEXT}
    peer, model = open_clip.CustomTextCLIP(**cfg).train(), MiniClip(MiniClipConfig.from_dict(cfg)).train()
    model.load_state_dict(to_miniclip(peer.state_dict(), rows(model))[0])
    outputs = []
    for one in (model, peer):
        torch.manual_seed(0)
        outputs.append(one.encode_image(images))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", SMALL)
def test_blocks_are_timms_groups(family, timm):
    vision = small_tower(timm, family)
    model = MiniClip(config_of(vision, 32 if vision["timm_proj"] == "none" else 24))
    tower, n = model.visual, len(model.visual.blocks)
    assert n == {"convnext": 5, "convnext, mlp": 4, "MobileCLIP-S": 4}.get(family, 2)
    depth = depths(tower)
    first = next(iter(tower.trunk.named_parameters()))[0]
    assert depth[f"trunk.{first}"] == n + 1 == max(depth.values())
    projection = {f"{tower.projection_name}.{name}" for name, _ in tower.projection.named_parameters()}
    assert {depth[name] for name in projection} <= {0}
    freeze(model, image="all_but_1")
    learning = {name for name, p in tower.named_parameters() if p.requires_grad}
    last = {f"trunk.{tower.block_names[-1]}.{name}" for name, _ in tower.blocks[-1].named_parameters()}
    assert projection | last <= learning and learning < set(depth)
    assert all(depth[name] in (0, 1) for name in learning)
    before = {name: t.clone() for name, t in model.visual.named_buffers()}
    model.train()(*make_inputs({"vision_cfg": vision, "text_cfg": TEXT}))
    assert all(torch.equal(t, before[name]) for name, t in model.visual.named_buffers())  # BatchNorm's too


def test_batchnorm_is_not_recomputed(timm):
    model = MiniClip(config_of(small_tower(timm, "MobileCLIP-S")))
    with pytest.raises(InputError, match="would count each batch twice: remove --activation_checkpointing"):
        model.activation_checkpointing_enable()
    freeze(model, image="all_but_1")
    model.activation_checkpointing_enable()
    with pytest.raises(InputError, match="all blocks of small_mobileclips or none: remove every_n_layers"):
        model.activation_checkpointing_enable(every_n_layers=2)
    fused = model.eval().visual.for_inference()
    assert len(fused.state_dict()) < len(model.visual.state_dict())
    images, _ = make_inputs({"vision_cfg": {"image_size": 32}, "text_cfg": TEXT})
    torch.testing.assert_close(fused(images), model.encode_image(images), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_it_trains_on_two_processes_and_resumes_bit_for_bit(timm, recipe, caption_set, run_script):  # noqa: F811
    values = {"embed_dim": 16, "vision_cfg": CONVNEXT | {"timm_drop_path": 0.2}, "text_cfg": TEXT}
    (caption_set / "timm.json").write_text(json.dumps(values))
    options = ["--model", caption_set / "timm.json", "--layer_decay", "0.8", "--gradient_checkpointing"]
    trained = trained_and_resumed(recipe, caption_set, run_script, options)
    model, *_ = miniclip.load(caption_set / "run")
    assert all(torch.equal(model.state_dict()[name], t) for name, t in trained.items())


@pytest.mark.parametrize("vision", [CONVNEXT, TOKEN | {"timm_model_name": "test_vit"}], ids=["ConvNeXt", "ViT"])
def test_it_is_saved_converted_and_loaded(vision, timm, tmp_path):
    torch.manual_seed(0)
    model = MiniClip(config_of(vision)).eval()
    model.save_pretrained(tmp_path / "saved")
    for to in ("hf", "sentence-transformers"):
        with pytest.raises(CheckpointError, match="transformers' CLIPModel has no other towers than CLIP's own"):
            convert(tmp_path / "saved", tmp_path / "hf", to)
    convert(tmp_path / "saved", tmp_path / "openclip", "openclip")
    convert(tmp_path / "saved", tmp_path / "openclip.pt", "openclip")
    (tmp_path / "timm.json").write_text(json.dumps(model.config.to_dict()))
    images, input_ids = make_inputs({"vision_cfg": vision, "text_cfg": TEXT})
    for name, file in (("saved", None), ("openclip", None), ("timm.json", tmp_path / "openclip.pt")):
        other, preprocess, _ = miniclip.load(tmp_path / name, file)
        assert all(torch.equal(t, model.state_dict()[key]) for key, t in other.state_dict().items())
        assert torch.equal(other.encode_image(images), model.encode_image(images)) and preprocess.cfg.size == 32
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.1), ("int8", 0.1)):
        fast, *_ = miniclip.load(tmp_path / "saved", precision=precision)
        one, other = fast.encode_image(images, True), model.encode_image(images, True)
        torch.testing.assert_close(one, other, atol=tolerance, rtol=1e-4)
    with pytest.raises(CheckpointError, match="its image tower is from timm"):
        convert(tmp_path / "openclip.pt", tmp_path / "unnamed", "miniclip")
    find_a_picture(miniclip.load(tmp_path / "saved")[0], tmp_path)
    if "convnext" in vision["timm_model_name"]:  # without positions it takes OpenCLIP's other image sizes too
        open_clip = pytest.importorskip("open_clip", reason="OpenCLIP is not installed: pip install open_clip_torch")
        peer = open_clip.create_model(f"local-dir:{tmp_path / 'openclip'}").eval()
        torch.testing.assert_close(peer.encode_image(images), model.encode_image(images), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
@pytest.mark.parametrize("family", SMALL)
def test_it_is_exported(family, form, timm, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
        pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
    vision = small_tower(timm, family)
    about = export(MiniClip(config_of(vision, 32 if vision["timm_proj"] == "none" else 24)), tmp_path / "out", form)
    assert set(about["checked"]) == {f"{kind}.{'onnx' if form == 'onnx' else 'pt2'}" for kind in ("image", "text")}


def test_a_saved_folder_fetches_nothing(timm, tmp_path, monkeypatch):
    """Training starts from timm's weights, with their preprocessing, where a config says so; a folder is complete."""
    vision, asked, create = CONVNEXT | {"timm_model_pretrained": True}, [], timm.create_model

    def downloaded(name, pretrained=False, **options):
        asked.append(pretrained)
        trunk = create(name, pretrained=False, **options)
        if pretrained:
            for parameter in trunk.parameters():
                torch.nn.init.constant_(parameter, 0.25)
        return trunk

    monkeypatch.setattr(timm, "create_model", downloaded)
    (tmp_path / "timm.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}))
    model, preprocess, _ = miniclip.load(tmp_path / "timm.json")
    assert asked == [False, True] and (model.visual.trunk.stem[0].weight == 0.25).all()
    theirs = timm.get_pretrained_cfg("test_convnext")
    assert preprocess.cfg.mean == theirs.mean and preprocess.cfg.crop_pct == theirs.crop_pct
    model.save_pretrained(tmp_path / "saved")
    again, *_ = miniclip.load(tmp_path / "saved")
    assert asked == [False, True, False] and torch.equal(again.visual.head.proj.weight, model.visual.head.proj.weight)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    for name, message in (("hf-hub:someone/model", "not the name of a model of timm"),
                          ("local-dir:/etc", "not the name of a model of timm"),
                          ("vit_giant_patch14_dinov2", "far larger model than the weights")):  # fmt: skip
        config["vision_cfg"] |= {"timm_model_name": name}
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
        Path(tmp_path / "saved" / "manifest.json").unlink(missing_ok=True)
        with pytest.raises(InputError, match=message):
            miniclip.load(tmp_path / "saved")


def test_another_image_size(timm):
    """Where a tower has positions their number changes; a size that it cannot take is refused."""
    vit = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    tower = MiniClip(config_of(vit | {"image_size": 96})).visual
    assert tower.trunk.pos_embed.shape[1] == 1 + 6 * 6 and tower(torch.zeros(2, 3, 96, 96)).shape == (2, 24)
    for fields, message in (
        (vit | {"image_size": 90}, "'test_vit' cannot be used: .*should be divisible by patch size"),
        (vit | {"timm_model_name": "no_such_model"}, "'no_such_model' cannot be used: .*Unknown model"),
        (CONVNEXT | {"timm_pool": "token"}, "'test_convnext' cannot be used: .*Invalid pool type: token"),
        (vit | {"timm_proj": "none", "image_size": 160}, "timm_proj none: test_vit is 64 wide, embed_dim is 24"),
    ):
        with pytest.raises(InputError, match=message):
            MiniClip(config_of(fields))


@pytest.mark.parametrize("fields, message", [
    ({"timm_pool": "abs_attn"}, "timm_pool is 'abs_attn', not '' or 'avg' or 'token' or 'map'"),
    ({"timm_proj": "conv"}, "timm_proj is 'conv', not linear, mlp or none"),
    ({"timm_proj": None}, "timm_pool is '', which needs timm_proj linear or mlp"),
    ({"timm_pool": "avg", "timm_proj": "none", "timm_drop": 0.1}, "timm_drop has no effect without timm_proj"),
    ({"timm_pool": "avg", "timm_proj": "", "timm_proj_bias": True}, "timm_proj_bias has no effect without timm_proj"),
    ({"timm_drop_path": 1.0}, r"timm_drop_path is not in \[0, 1\)"),
    ({"patch_dropout": -0.5}, "patch_dropout is not in"),
    ({"image_size": 4096}, "image_size is 4096, not above 0 and at most 1024"),
    ({"timm_model_name": "hf-hub:timm/resnet50.a1_in1k"}, "'hf-hub:timm/.*', not the name of a model of timm"),
    ({"timm_model_name": "../weights"}, "not the name of a model of timm"), ({"depth": 3}, "unknown field 'depth'"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(fields, message):
    with pytest.raises(InputError, match=message):
        config_of(CONVNEXT | fields)


def test_without_timm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install timm torchvision"):
        MiniClip(config_of(CONVNEXT))


def test_the_shipped_configs():
    """They are read without timm, which knows their names, and have the preprocessing of their weights."""
    configs = {name: MiniClipConfig.from_name(name) for name in list_models()}
    configs = {name: c for name, c in configs.items() if type(c.vision_cfg).__name__ == "TimmVisionConfig"}
    assert len(configs) == 50 and {"convnext_base_w", "EVA02-L-14", "ViTamin-XL-384", "MobileCLIP2-S4"} <= set(configs)
    for name in configs.keys() & {model for model, _ in miniclip.list_pretrained()}:
        for tag in miniclip.list_pretrained_tags_by_model(name):
            facts, ours = miniclip.get_pretrained_cfg(name, tag), configs[name].preprocess_cfg
            assert list(ours.mean) == list(facts["mean"]) and ours.interpolation == facts["interpolation"], name
            assert list(ours.std) == list(facts["std"]) and ours.resize_mode == facts["resize_mode"], name
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm torchvision")
    assert all(timm.is_model(c.vision_cfg.timm_model_name) for c in configs.values())


@pytest.mark.slow
@pytest.mark.parametrize("name, millions", [  # by OpenCLIP's model_profile.csv
    ("convnext_base", 151.52), ("EVA02-B-16", 149.69), ("vit_medium_patch16_gap_256", 102.04), ("convnext_tiny", 92.3),
])  # fmt: skip
def test_towers_have_as_many_parameters_as_published(name, millions, timm):
    model = MiniClip(MiniClipConfig.from_name(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
