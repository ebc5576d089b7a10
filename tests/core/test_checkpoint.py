"""Weights of every known form load, exactly; everything else is refused, with the reason."""

import json
import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from miniclip.checkpoint import LAYOUTS, from_miniclip, to_miniclip
from miniclip.commands.convert import main
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import replacing
from miniclip.utils.weight_files import read_state_dict
from miniclip.weights.convert import convert
from miniclip.weights.load import fitting_configs, infer_config, load_weights, open_checkpoint

SIZES = {  # heads of 64 channels, so that they can be inferred
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 64, "heads": 1, "layers": 2},
}


def tiny(seed: int = 0, **changes) -> MiniClip:
    """A tiny model, none of whose parameters is constant."""
    torch.manual_seed(seed)
    model = MiniClip(MiniClipConfig.from_dict(SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.encode_image(images), model.encode_text(torch.tensor([[58, 3, 4, 59], [58, 7, 59, 0]]))


def assert_equal(ours: dict, theirs: dict):
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


# ---- Names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trips_are_exact(layout):
    weights = tiny().state_dict()
    theirs = from_miniclip(weights, layout)
    back, source = to_miniclip(theirs)
    assert source == layout
    assert_equal(back, weights)
    assert_equal(from_miniclip(back, layout), theirs)


def test_names_of_each_layout():
    """A few names and values, as the projects themselves have them."""
    weights = tiny().state_dict()
    q, k, v = weights["visual.blocks.2.attn.in_proj.weight"].split(64)
    for layout, names in {
        "openclip": ("visual.transformer.resblocks.2.attn.in_proj_weight", "transformer.resblocks.1.mlp.c_fc.bias",
                     "positional_embedding", "logit_scale", "visual.proj", "text_projection"),
        "custom_text": ("visual.transformer.resblocks.2.attn.in_proj_weight",
                        "text.transformer.resblocks.1.mlp.c_fc.bias", "text.positional_embedding",
                        "logit_scale", "visual.proj", "text.text_projection"),
        "tinyclip": ("_image_encoder.visual.transformer.resblocks.2.attn.in_proj_weight",
                     "_text_encoder.transformer.resblocks.1.mlp.c_fc.bias", "_text_encoder.positional_embedding",
                     "_logit_scale.logit_scale", "_image_encoder.visual.proj", "_text_encoder.text_projection"),
        "article": ("image_encoder.visual.transformer.resblocks.2.attn.in_proj_weight",
                    "text_encoder.transformer.resblocks.1.mlp.c_fc.bias", "text_encoder.positional_embedding",
                    "logit_scale.logit_scale", "image_encoder.visual.proj", "text_encoder.text_projection"),
    }.items():  # fmt: skip
        exported = from_miniclip(weights, layout)
        attention, bias, positions, scale, proj, text_proj = (exported[name] for name in names)
        assert torch.equal(attention, torch.cat([q, k, v])) and torch.equal(
            bias, weights["text.blocks.1.mlp.c_fc.bias"]
        )
        assert torch.equal(positions, weights["text.positional_embedding"]) and scale.shape == ()
        assert proj.shape == (64, 24) and torch.equal(proj.T, weights["visual.proj.weight"])
        assert torch.equal(text_proj.T, weights["text.text_projection.weight"])
    hf = from_miniclip(weights, "hf")
    assert torch.equal(hf["vision_model.encoder.layers.2.self_attn.k_proj.weight"], k)
    assert torch.equal(hf["text_model.encoder.layers.1.mlp.fc1.bias"], weights["text.blocks.1.mlp.c_fc.bias"])
    assert torch.equal(hf["visual_projection.weight"], weights["visual.proj.weight"])


def test_transformers_names_are_these():
    from transformers import CLIPConfig, CLIPModel

    from miniclip.weights.to_huggingface import hf_config

    model = tiny()
    theirs = CLIPModel(CLIPConfig(**hf_config(model.config))).state_dict()
    weights, source = to_miniclip(theirs)
    assert source == "hf"
    assert_equal(from_miniclip(weights, "hf"), theirs)
    model.load_state_dict(weights, strict=True)


@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefixes_of_wrappers(layout, wrap):
    weights = tiny().state_dict()
    wrapped = {wrap.format(key): tensor for key, tensor in from_miniclip(weights, layout).items()}
    back, source = to_miniclip(wrapped)
    assert source == layout
    assert_equal(back, weights)


def test_wrappers_inside_a_path():
    """TinyCLIP wraps each tower, torch.compile whatever it is asked to."""
    weights = tiny().state_dict()
    theirs = from_miniclip(weights, "tinyclip")
    renamed = {}
    for key, tensor in theirs.items():
        tower, _, rest = key.partition(".")
        renamed[f"module.{tower}.module.{rest}"] = tensor
    assert_equal(to_miniclip(renamed)[0], weights)
    with pytest.raises(CheckpointError, match="logit_scale twice"):
        to_miniclip({"logit_scale": torch.zeros(()), "module.logit_scale": torch.ones(())})


def test_harmless_keys_are_dropped_and_the_scale_reshaped():
    weights = tiny().state_dict()
    theirs = from_miniclip(weights, "openclip")
    theirs |= {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(12),
        "attn_mask": torch.zeros(12, 12),
    }
    theirs["logit_scale"] = theirs["logit_scale"].reshape(1)
    assert_equal(to_miniclip(theirs)[0], weights)
    hf = from_miniclip(weights, "hf") | {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    assert_equal(to_miniclip(hf)[0], weights)


def test_missing_and_left_over_keys_raise():
    theirs = from_miniclip(tiny().state_dict(), "hf")
    del theirs["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"missing vision_model\.encoder\.layers\.1\.self_attn\.k_proj\.bias"):
        to_miniclip(theirs)
    theirs = from_miniclip(tiny().state_dict(), "openclip") | {"visual.extra": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"missing none; unknown visual\.extra"):
        to_miniclip(theirs)
    without_vision = {key: t for key, t in theirs.items() if not key.startswith("visual.")}
    with pytest.raises(CheckpointError, match=r"missing visual\.conv1\.weight"):
        to_miniclip(without_vision)
    with pytest.raises(CheckpointError, match=r"missing .*; unknown .*blocks\.7\.ln_1"):  # a gap between the blocks
        to_miniclip({key.replace("blocks.1.", "blocks.7."): t for key, t in tiny().state_dict().items()})


@pytest.mark.parametrize(
    "keys, reason",
    [
        (["visual.trunk.blocks.0.norm1.weight", "text.transformer.resblocks.0.ln_1.weight"], "timm"),
        (["visual.layer1.0.conv1.weight", "transformer.resblocks.0.ln_1.weight"], "ModifiedResNet"),
        (["_image_encoder.visual.layer1.0.conv1.weight"], "ModifiedResNet"),
        (["logit_bias", "visual.trunk.x", "text.y"], "timm or transformers"),
        (["logit_bias", "vision_model.a", "text_model.b"], "SigLIP"),
        (["_image_encoder.l0_module.heads_loga", "_image_encoder.visual.conv1.weight"], "'auto'"),
        (["text_model.encoder.layers.0.layer_norm1.weight", "text_projection.weight"], "one tower alone"),
        (["vision_model.encoder.layers.0.layer_norm1.weight"], "one tower alone"),
        (["embeddings.token_embedding.weight", "encoder.layers.0.layer_norm1.weight"], "one tower alone"),
        (["visual.conv1.weight", "text.transformer.embeddings.x"], r"^(?!.*tower alone).*; unknown text\.transformer"),
        (["conv.weight", "fc.bias"], "conv.weight, fc.bias"),
    ],
)
def test_what_cannot_be_loaded_says_why(keys, reason):
    with pytest.raises(CheckpointError, match=reason):
        to_miniclip({key: torch.zeros(1) for key in keys})


def test_pruned_blocks_are_refused(tmp_path):
    theirs = from_miniclip(tiny().state_dict(), "tinyclip")
    for name, dimension in (("c_fc.weight", 0), ("c_fc.bias", 0), ("c_proj.weight", 1)):
        key = f"_image_encoder.visual.transformer.resblocks.1.mlp.{name}"
        theirs[key] = theirs[key].narrow(dimension, 0, 100).contiguous()
    save_file(theirs, tmp_path / "pruned.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks differ in size.*auto.*\(256, 64\).*\(100, 64\)"):
        open_checkpoint(tmp_path / "pruned.safetensors")


def test_sizes_are_inferred():
    assert infer_config(tiny().state_dict()) == {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "mlp_ratio": 4.0},
        "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 64, "heads": 1, "layers": 2, "mlp_ratio": 4.0},
    }
    with torch.device("meta"):
        shapes = {name: MiniClip(MiniClipConfig.from_name(name)).state_dict() for name in ("ViT-B-32", "ViT-L-14-336")}
    assert fitting_configs(shapes["ViT-B-32"]) == ["ViT-B-32", "ViT-B-32-quickgelu"]
    assert fitting_configs(shapes["ViT-L-14-336"], quick_gelu=True) == ["ViT-L-14-336-quickgelu"]


# ---- Files


def test_every_container(tmp_path):
    weights = from_miniclip(tiny().state_dict(), "openclip")
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "b.pt")
    torch.save(weights, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": {"state": {}}}, tmp_path / "d.pt")
    torch.save({"model": {"module": weights}}, tmp_path / "e.pt")
    torch.save({"model_state_dict": weights}, tmp_path / "f.pt")
    for path in sorted(tmp_path.iterdir()):
        assert_equal(read_state_dict(path), weights)


class Branch(nn.Module):
    """A tree of modules whose state dict is the one given."""

    def __init__(self, state_dict: dict[str, torch.Tensor]):
        super().__init__()
        inner = {}
        for key, tensor in state_dict.items():
            head, _, rest = key.partition(".")
            if rest:
                inner.setdefault(head, {})[rest] = tensor
            elif tensor.is_floating_point():
                setattr(self, head, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(head, tensor)
        for head, rest in inner.items():
            self.add_module(head, Branch(rest))

    def forward(self, x):
        return x + 1


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(1))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archives_are_read_without_running_them(tmp_path, make, monkeypatch):
    """In the form of OpenAI's releases: half precision but for LayerNorm, and three sizes among the weights."""
    weights = from_miniclip(tiny(quick_gelu=True).state_dict(), "openclip")
    half = {key: t if "ln_" in key else t.half() for key, t in weights.items()}
    half["visual.proj"] = half["visual.proj"].T.contiguous().T  # other strides
    flat = torch.cat([half["text_projection"].flatten(), half["positional_embedding"].flatten()])  # a shared storage
    half["text_projection"] = flat[: 64 * 24].view(64, 24)
    half["positional_embedding"] = flat[64 * 24 :].view(12, 64)
    half |= {
        name: torch.tensor(n) for name, n in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 60))
    }
    make(Branch(half)).save(tmp_path / "ViT.pt")
    theirs = torch.jit.load(tmp_path / "ViT.pt").state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    assert_equal(read_state_dict(tmp_path / "ViT.pt"), dict(theirs))
    assert half.keys() == theirs.keys()
    ours = read_state_dict(tmp_path / "ViT.pt")
    shared = {ours[key].untyped_storage().data_ptr() for key in ("text_projection", "positional_embedding")}
    assert len(shared) == 1  # read once

    model = tiny(seed=1, quick_gelu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(model, tmp_path / "ViT.pt")
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, to_miniclip(half)[0][key].float()), key
    with pytest.warns(UserWarning, match="trained with QuickGELU .*input_resolution.* computes GELU"):
        load_weights(tiny(), tmp_path / "ViT.pt")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def script_archive(path, pickled: bytes, **files: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickled, "constants.pkl": pickle.dumps(()), "version": b"3", **files}.items():
            archive.writestr(f"ViT/{name}", content)


def test_nothing_of_a_malicious_pickle_runs(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"state_dict": {"logit_scale": Evil(trap)}}, tmp_path / "zip.pt")
    torch.save({"x": Evil(trap)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil(trap), protocol=2))
    for protocol in (2, 4):
        script_archive(tmp_path / f"script{protocol}.pt", pickle.dumps(Evil(trap), protocol=protocol))
    getattr_call = b"\x80\x02cbuiltins\ngetattr\nc__torch__.x\nModel\nX\x05\x00\x00\x00__mro\x86R."
    script_archive(tmp_path / "getattr.pt", getattr_call)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(CheckpointError, match=f"{path.name} is refused.*any program"):
            read_state_dict(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Evil(trap))).close()
    assert trap.exists()  # it would have worked


def test_a_script_archive_cannot_reach_beyond_a_storage(tmp_path):
    """A tensor whose size or offset exceed its storage would show memory that is not its own."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    for offset, size in ((0, 5), (2, 3)):
        tensor = (
            b"ctorch._utils\n_rebuild_tensor_v2\n("
            + storage
            + b"K"
            + bytes([offset])
            + b"(K"
            + bytes([size])
            + b"t(K\x01t"
            b"\x89ccollections\nOrderedDict\n)RtR"
        )
        module = b"\x80\x02c__torch__.M\nModel\n)\x81}X\x01\x00\x00\x00w" + tensor + b"sb."
        script_archive(tmp_path / "x.pt", module, **{"data/0": bytes(16)})
        with pytest.raises(CheckpointError, match="damaged.*storage"):
            read_state_dict(tmp_path / "x.pt")
    script_archive(tmp_path / "x.pt", module, **{"data/0": bytes(20)})
    assert torch.equal(read_state_dict(tmp_path / "x.pt")["w"], torch.zeros(3))  # the same with a longer one


def test_other_things_are_called_by_their_names(tmp_path):
    weights = from_miniclip(tiny().state_dict(), "openclip")
    save_file(weights, tmp_path / "whole.safetensors")
    torch.save(weights, tmp_path / "whole.pt")
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("whole.safetensors", "whole.pt", "legacy.pt"):
        content = (tmp_path / name).read_bytes()
        for part in (len(content) // 2, len(content) - 1000, 200):
            (tmp_path / f"cut-{name}").write_bytes(content[:part])
            with pytest.raises(CheckpointError, match=f"cut-{name}.* (damaged|refused)"):
                read_state_dict(tmp_path / f"cut-{name}")
    for content, reason in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>not found</html>", "web page: download"),
        (b"", "is empty"),
        (b'{"error": "not found"}', "not a known weight file"),
        (b"\x89PNG\r\n\x1a\n", "not a known weight file.*PNG"),
    ):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"x\.pt is .*{reason}" if content else reason):
            read_state_dict(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"is a folder.*whole\.pt"):
        read_state_dict(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.pt"):
        read_state_dict(tmp_path / "none.pt")
    for content, held in (({"epoch": 1, "args": "x"}, "epoch, args"), (torch.zeros(3), "Tensor"), ({}, "none")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=f"no state dict .* but {held}"):
            read_state_dict(tmp_path / "x.pt")


# ---- Models


def saved(tmp_path, model: MiniClip, layout: str = "openclip", name: str = "weights.safetensors", **changed):
    save_file(from_miniclip(model.state_dict(), layout) | changed, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_weights(tmp_path, layout):
    there, here = tiny(), tiny(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(here, saved(tmp_path, there, layout))
    assert_equal(here.state_dict(), there.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads(tmp_path, dtype):
    there, here = tiny().to(dtype), tiny(seed=1)
    load_weights(here, saved(tmp_path, there))
    assert_equal(here.state_dict(), {key: tensor.float() for key, tensor in there.state_dict().items()})


def test_weights_of_other_sizes_name_the_key_both_shapes_and_the_config(tmp_path):
    wide = {"embed_dim": 32}
    with pytest.raises(
        CheckpointError, match=r"visual\.proj\.weight is \(32, 64\) in the file and \(24, 64\) in the model"
    ):
        load_weights(tiny(), saved(tmp_path, tiny(**wide)))
    deeper = {"text_cfg": SIZES["text_cfg"] | {"layers": 3}}
    with pytest.raises(CheckpointError, match=r"text\.blocks\.2\.\S+ is missing in the file and \(\d.* in the model"):
        load_weights(tiny(**deeper), saved(tmp_path, tiny()))
    with pytest.raises(CheckpointError, match=r"text\.blocks\.2\.\S+ is \(\d.* in the file and missing in the model"):
        load_weights(tiny(), saved(tmp_path, tiny(**deeper)))
    before = tiny().state_dict()
    model = tiny()
    small = MiniClipConfig.from_name("TinyCLIP-ViT-8M-16-Text-3M")
    with pytest.raises(CheckpointError, match="config that fits: TinyCLIP-ViT-8M-16-Text-3M"):
        load_weights(model, saved(tmp_path, MiniClip(small), name="tiny.safetensors"))
    assert_equal(model.state_dict(), before)  # and nothing was loaded


def test_values_that_are_not_finite_raise(tmp_path):
    path = saved(tmp_path, tiny(), **{"visual.class_embedding": torch.full((64,), torch.nan)})
    with pytest.raises(CheckpointError, match=r"undefined numbers in visual\.class_embedding"):
        load_weights(tiny(), path)


def test_positions_are_resized_and_it_is_said(tmp_path):
    there = tiny()
    bigger = {"image_size": 48}, {"context_length": 16}
    here = tiny(seed=1, vision_cfg=SIZES["vision_cfg"] | bigger[0], text_cfg=SIZES["text_cfg"] | bigger[1])
    with pytest.warns(UserWarning) as warned:
        load_weights(here, saved(tmp_path, there))
    said = "\n".join(str(w.message) for w in warned)
    assert "visual.positional_embedding was interpolated from 17 to 37" in said
    assert "text.positional_embedding was interpolated from 12 to 16" in said and len(warned) == 2
    assert torch.equal(here.visual.positional_embedding[0], there.visual.positional_embedding[0])  # the class token's
    assert torch.equal(here.visual.blocks[2].mlp.c_fc.weight, there.visual.blocks[2].mlp.c_fc.weight)
    # 4 x 4 to 6 x 6 keeps left left and top top: the values of a plane that rises in one direction still rise
    rows = torch.arange(4.0).repeat_interleave(4)
    there.visual.positional_embedding.data[1:, 0] = rows
    there.visual.positional_embedding.data[1:, 1] = torch.arange(4.0).repeat(4)
    with pytest.warns(UserWarning, match="interpolated"):
        load_weights(here, saved(tmp_path, there))
    grid = here.visual.positional_embedding[1:].detach().reshape(6, 6, 64)
    assert (grid[1:, :, 0] > grid[:-1, :, 0]).all() and (grid[:, 1:, 1] > grid[:, :-1, 1]).all()
    torch.testing.assert_close(grid[:, 0, 0], grid[:, 5, 0])


@pytest.mark.parametrize(
    "file, beside, known",
    [
        ("ViT-B-32-quickgelu-laion400m.safetensors", {}, True),
        ("vit_b_32-openai.safetensors", {}, True),
        ("TinyCLIP-ViT-40M-32-Text-19M-LAION400M.safetensors", {}, False),
        ("vit_b_32-laion2b_e16.safetensors", {}, False),
        ("model.safetensors", {}, None),
        ("model.safetensors", {"config.json": {"model_type": "clip"}}, True),
        ("model.safetensors", {"config.json": {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}}, False),
        ("openai.safetensors", {"open_clip_config.json": {"model_cfg": {"embed_dim": 24}}}, False),
        ("model.safetensors", {"open_clip_config.json": {"model_cfg": {"quick_gelu": True}}}, True),
        ("model.safetensors", {"config.json": SIZES | {"quick_gelu": True}}, True),
        ("model.safetensors", {"config.json": {"model_type": "bert"}}, None),
        ("model.safetensors", {"config.json": ["of something else"]}, None),
    ],
)
def test_the_other_activation_warns(tmp_path, file, beside, known):
    for name, values in beside.items():
        (tmp_path / name).write_text(json.dumps(values))
    path = saved(tmp_path, tiny(), name=file)
    for quick_gelu, names in ((True, "QuickGELU"), (False, "GELU")):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            load_weights(tiny(quick_gelu=quick_gelu), path)
        assert len(warned) == (known is not None and known != quick_gelu)
        assert all(f"the model computes {names}:" in str(w.message) for w in warned)


def test_a_broken_config_beside_the_weights_is_named(tmp_path):
    path = saved(tmp_path, tiny())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load_weights(tiny(), path)


def test_the_name_of_a_training_run_tells_the_activation(tmp_path):
    weights = from_miniclip(tiny().state_dict(), "openclip")
    torch.save(
        {"epoch": 1, "name": "model_ViT-B-32-quickgelu-lr_0.001", "state_dict": weights}, tmp_path / "epoch_1.pt"
    )
    with pytest.warns(UserWarning, match="trained with QuickGELU .*model_ViT-B-32-quickgelu"):
        load_weights(tiny(), tmp_path / "epoch_1.pt")


# ---- Conversion


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_convert_there_and_back(tmp_path, quick_gelu):
    images = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "center_crop": "transformers"}
    model = tiny(quick_gelu=quick_gelu, preprocess_cfg=images)
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "tiny.json").write_text(json.dumps(model.config.to_dict()))
    convert(tmp_path / "a", tmp_path / "b", "hf")
    with pytest.warns(UserWarning, match=r"weights only: mean .*std|one pixel elsewhere"):
        convert(tmp_path / "b", tmp_path / "c.safetensors", "openclip")
    convert(tmp_path / "c.safetensors", tmp_path / "d.pt", "openclip")
    convert(tmp_path / "d.pt", tmp_path / "e", "miniclip", model=str(tmp_path / "tiny.json"))
    convert(tmp_path / "b", tmp_path / "f", "miniclip")
    assert_equal(load_file(tmp_path / "c.safetensors"), read_state_dict(tmp_path / "d.pt"))
    for folder in ("e", "f"):
        back = MiniClip.from_pretrained(tmp_path / folder)
        assert back.config == model.config
        assert_equal(back.state_dict(), model.state_dict())
    convert(tmp_path / "f", tmp_path / "g", "hf")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "g" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a",
        "b",
        "c.safetensors",
        "d.pt",
        "e",
        "f",
        "g",
        "tiny.json",
    ]


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_loads_what_is_converted(tmp_path, quick_gelu):
    from transformers import CLIPModel

    model = tiny(quick_gelu=quick_gelu)
    model.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="transformers crops images with odd margins one pixel elsewhere"):
        convert(tmp_path / "ours", tmp_path / "hf", "hf")
    theirs, report = CLIPModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        image = theirs.eval().get_image_features(pixel_values=images).pooler_output
        text = theirs.get_text_features(input_ids=torch.tensor([[58, 3, 4, 59], [58, 7, 59, 0]])).pooler_output
    torch.testing.assert_close(outputs(model), (image, text), rtol=1e-5, atol=1e-5)
    assert theirs.config.text_config.eos_token_id == 59  # its own token, not 2, the relic of early configs
    settings = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 32} and settings["resample"] == 3 and settings["do_center_crop"]
    # and a folder that transformers itself writes comes back
    theirs.save_pretrained(tmp_path / "theirs")
    said = convert(tmp_path / "theirs", tmp_path / "back", "miniclip")
    assert ("QuickGELU" in said) == quick_gelu
    assert_equal(MiniClip.from_pretrained(tmp_path / "back").state_dict(), model.state_dict())


def test_mixed_precision_becomes_single(tmp_path):
    model = tiny()
    half = {"visual.proj": from_miniclip(model.state_dict(), "openclip")["visual.proj"].half()}
    path = saved(tmp_path, model, **half)
    convert(path, tmp_path / "out.pt", "openclip")
    back = read_state_dict(tmp_path / "out.pt")
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}
    assert torch.equal(back["visual.proj"], half["visual.proj"].float())


def test_convert_asks_for_the_activation_where_it_cannot_know(tmp_path):
    small = MiniClipConfig.from_name("TinyCLIP-ViT-8M-16-Text-3M")
    path = saved(tmp_path, MiniClip(small))
    assert "TinyCLIP-ViT-8M-16-Text-3M" in convert(path, tmp_path / "a", "miniclip")  # the one that ships
    assert MiniClip.from_pretrained(tmp_path / "a").config == small
    path = saved(tmp_path, tiny(), name="tiny.safetensors")
    with pytest.raises(CheckpointError, match="no shipped config.*--model"):
        convert(path, tmp_path / "b", "miniclip")
    (tmp_path / "tiny.json").write_text(json.dumps(SIZES))
    renamed = path.rename(tmp_path / "tiny-quickgelu.safetensors")
    with pytest.warns(UserWarning, match="trained with QuickGELU.*config says GELU"):
        convert(renamed, tmp_path / "b", "miniclip", model=str(tmp_path / "tiny.json"))


def test_both_activations_ship_for_some_sizes(tmp_path, monkeypatch):
    """As for ViT-B-32: without another sign the choice is the user's, except where it does not go into the file."""
    path = saved(tmp_path, tiny())
    monkeypatch.setattr(
        "miniclip.weights.layouts.fitting_configs", lambda weights, quick_gelu=None: ["X", "X-quickgelu"]
    )
    for to in ("hf", "miniclip"):
        with pytest.raises(CheckpointError, match="fits X and X-quickgelu: name one with --model"):
            convert(path, tmp_path / "out", to)
    assert "it fits X and X-quickgelu" in convert(path, tmp_path / "out.pt", "openclip")


def test_convert_to_another_image_size(tmp_path):
    path = saved(tmp_path, tiny())
    bigger = SIZES | {"vision_cfg": SIZES["vision_cfg"] | {"image_size": 48}}
    (tmp_path / "bigger.json").write_text(json.dumps(bigger))
    with pytest.warns(UserWarning, match="from 17 to 37 positions"):
        main([str(path), str(tmp_path / "out"), "--to", "miniclip", "--model", str(tmp_path / "bigger.json")])
    here = MiniClip(MiniClipConfig.from_dict(bigger))
    with pytest.warns(UserWarning, match="interpolated"):
        load_weights(here, path)
    assert_equal(MiniClip.from_pretrained(tmp_path / "out").state_dict(), here.state_dict())


def test_convert_overwrites_only_when_told_and_never_half(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="safetensors or .pt"):
        convert(tmp_path / "a", tmp_path / "out.bin", "openclip")
    (tmp_path / "out.pt").write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        convert(tmp_path / "a", tmp_path / "out.pt", "openclip")
    assert (tmp_path / "out.pt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="another name"):
        convert(tmp_path / "a", tmp_path / "out.pt", "hf", force=True)  # a folder instead of a file
    convert(tmp_path / "a", tmp_path / "out.pt", "openclip", force=True)
    assert_equal(to_miniclip(read_state_dict(tmp_path / "out.pt"))[0], tiny().state_dict())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    convert(tmp_path / "a", tmp_path / "folder", "miniclip", force=True)
    files = ["config.json", "manifest.json", "model.safetensors", "notes.txt"]
    assert sorted(f.name for f in (tmp_path / "folder").iterdir()) == files

    def breaks(path):
        path.mkdir()
        (path / "config.json").write_text("half")
        raise OSError("disk full")

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="disk full"):
        with replacing(tmp_path / "folder") as scratch:
            breaks(scratch)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "folder" / "config.json").read_text() != "half"


def test_command_line(tmp_path, run_script, capsys):
    model = tiny(quick_gelu=True)
    model.save_pretrained(tmp_path / "a")
    done = run_script("-m", "miniclip", "convert", tmp_path / "a", tmp_path / "b.safetensors", "--to", "openclip")
    assert "QuickGELU" in done.stdout and not done.stderr
    assert_equal(load_file(tmp_path / "b.safetensors"), from_miniclip(model.state_dict(), "openclip"))
    with pytest.raises(InputError, match="exists already.*--force"):
        main([str(tmp_path / "a"), str(tmp_path / "b.safetensors"), "--to", "openclip"])
    with pytest.raises(InputError, match="none.pt"):
        main([str(tmp_path / "none.pt"), str(tmp_path / "c"), "--to", "hf"])


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_survives_the_way_through_transformers(resize_mode, interpolation, tmp_path):
    from miniclip.towers.hf_config import read_preprocessing
    from miniclip.weights.to_huggingface import hf_preprocessor

    pictures = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0), "resize_mode": resize_mode}
    pictures["center_crop"] = "transformers"
    config = MiniClipConfig.from_dict({"preprocess_cfg": pictures | {"interpolation": interpolation}})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hf_preprocessor(config)))
    again = read_preprocessing(tmp_path / "preprocessor_config.json")
    assert MiniClipConfig.from_dict({"preprocess_cfg": again}) == config

    (tmp_path / "odd.json").write_text('{"resample": 0}')
    with pytest.raises(InputError, match="odd.json: resample 0"):
        read_preprocessing(tmp_path / "odd.json")


def test_patches_that_form_no_square_are_named_with_the_file(tmp_path):
    path = saved(tmp_path, tiny(), **{"visual.positional_embedding": torch.zeros(13, 64)})
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: 13 image positions are no class token"):
        open_checkpoint(path)
