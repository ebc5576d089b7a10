"""Weights and configs as they come from other people: in half and 8-bit precision, split into several files, with sizes
that cannot be, and in forms that other libraries read."""

import json
import shutil
import socket
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

import miniclip
from miniclip.checkpoint import from_miniclip, to_miniclip
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.utils.files import write_json
from miniclip.utils.weight_files import read_state_dict
from miniclip.weights.convert import convert
from miniclip.weights.load import load_weights
from tests.core.test_checkpoint import assert_equal


def save_hf(folder, dtype=torch.float32, **how) -> CLIPModel:
    """A tiny CLIPModel of transformers."""
    torch.manual_seed(0)
    both = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2}
    vision = both | {"image_size": 32, "patch_size": 16}
    text = both | {"vocab_size": 49408, "max_position_embeddings": 16, "eos_token_id": 49407}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).to(dtype).eval()
    model.save_pretrained(folder, **how)
    return model


# ---- Precision


def test_a_folder_in_half_precision_works_everywhere(caption_set, tmp_path, run_script):
    save_hf(tmp_path / "hf", torch.float16)
    convert(tmp_path / "hf", ours := tmp_path / "ours", "miniclip")
    assert {t.dtype for t in load_file(ours / "model.safetensors").values()} == {torch.float16}  # not twice as big
    model, preprocess, tokenizer = miniclip.load(ours)
    image = preprocess(miniclip.open_image(caption_set / "0.png"))
    logits, _ = model.get_logits(image[None], tokenizer(["a red sheet", "a wide one"]))
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    run_script("evaluate.py", "--model", ours, "--eval_file", caption_set / "captions.json")
    images = ["--images", caption_set / "0.png", "--classes", "red,blue", "--output_dir", tmp_path / "zero"]
    run_script("-m", "miniclip", "zero_shot", "--model", ours, *images)
    run_script("-m", "miniclip", "search", "index", caption_set, "--model", ours, "--index", tmp_path / "i.mc")
    short = ["--output_dir", tmp_path / "run", "--max_steps", 1, "--per_device_train_batch_size", 8]
    run_script("train.py", "--model", ours, "--train_file", caption_set / "captions.json", *short)
    assert {t.dtype for t in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_8_bits_are_read_as_what_they_stand_for(dtype, name, tiny_model, tmp_path):
    small = {
        k: t.to(dtype) if t.ndim == 2 else t for k, t in from_miniclip(tiny_model.state_dict(), "openclip").items()
    }
    save_file(small, tmp_path / name) if name.endswith("safetensors") else torch.save(small, tmp_path / name)
    expected, _ = to_miniclip({key: t.float() for key, t in small.items()})
    load_weights(tiny_model, tmp_path / name)
    assert_equal(tiny_model.state_dict(), expected)
    convert(tmp_path / name, tmp_path / "single.pt", "openclip")
    assert {t.dtype for t in read_state_dict(tmp_path / "single.pt").values()} == {torch.float32}


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch is older")
def test_floats_of_4_bits_are_refused(tmp_path):
    packed = torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file({"w": packed}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="x.safetensors holds numbers of 4 bits.*: w"):
        read_state_dict(tmp_path / "x.safetensors")


# ---- Several files


def split(folder, kind: str) -> CLIPModel:
    """A CLIPModel in several files, of safetensors or of pickles."""
    model = save_hf(folder, max_shard_size="2MB")
    if kind == "bin":
        for file in sorted(folder.glob("model-*.safetensors")):
            name = f"pytorch_{file.name}".replace(".safetensors", ".bin")
            torch.save(load_file(file), folder / name)
            file.unlink()
        index = folder / "model.safetensors.index.json"
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        index.unlink()
        (folder / "pytorch_model.bin.index.json").write_text(text)
    return model


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files(kind, tmp_path):
    model = split(tmp_path / "hf", kind)
    index, shards = *(tmp_path / "hf").glob("*.index.json"), sorted((tmp_path / "hf").glob(f"*-of-*.{kind}"))
    assert len(shards) > 1
    convert(tmp_path / "hf", tmp_path / "ours", "miniclip")
    weights = MiniClip.from_pretrained(tmp_path / "ours").state_dict()
    assert_equal(from_miniclip(weights, "hf"), model.state_dict())
    other = MiniClip.from_pretrained(tmp_path / "ours")
    for path in (tmp_path / "hf", index, shards[0], shards[-1]):
        torch.nn.init.zeros_(other.visual.proj.weight)
        load_weights(other, path)
        assert_equal(other.state_dict(), weights)
    # A download that has stopped half-way
    shards[1].rename(tmp_path / "kept")
    for path in (tmp_path / "hf", index, shards[0]):
        with pytest.raises(CheckpointError, match=rf"{len(shards)} files .* missing: {shards[1].name}"):
            load_weights(other, path)
    shards[1].write_bytes((tmp_path / "kept").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{shards[1].name} is (damaged|refused)"):
        load_weights(other, index)
    # Shards of another model, and an index that means to read elsewhere
    shutil.copy(shards[0], shards[1])
    with pytest.raises(CheckpointError, match=f"{shards[1].name} does not belong to"):
        load_weights(other, index)
    with pytest.raises(CheckpointError, match=f"{shards[1].name} does not belong to"):
        load_weights(other, shards[0])
    index.write_text(json.dumps({"weight_map": {"a": "../kept"}}))
    with pytest.raises(CheckpointError, match=r"outside its folder: \.\./kept"):
        load_weights(other, index)
    # Other names with "-of-" in them
    (tmp_path / "none" / "pytest-of-me").mkdir(parents=True)
    (tmp_path / "none" / "list-of-files.txt").write_text("a")
    with pytest.raises(CheckpointError, match="none is a folder: name the weight file itself"):
        load_weights(other, tmp_path / "none")
    index.write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load_weights(other, tmp_path / "hf")


@pytest.mark.parametrize("name", ["openai", "laion2b_s34b_b79k", "none/model.safetensors"])
def test_weights_that_are_no_file_say_what_is_needed(name):
    with pytest.raises(
        InputError, match=f"no file or folder '{name}'" + ("" if "/" in name else ", and shapes-demo has no tags")
    ):
        miniclip.load("shapes-demo", pretrained=name)
    with pytest.raises(InputError, match="no file"):
        convert(name, "out", "miniclip")


# ---- Configs


def nested(depth: int):
    values = []
    for _ in range(depth):
        values = [values]
    return values


HUGE = 10**9
CONFIGS = {  # what a config.json says -> what the error says, besides its name
    "layers": ({"vision_cfg": {"layers": 10**7}}, "layers is 10000000"),
    "text layers": ({"text_cfg": {"layers": 999}}, "far larger model than the weights"),
    "context": ({"text_cfg": {"context_length": HUGE}}, "context_length"),
    "long context": ({"text_cfg": {"context_length": 16000, "width": 65536, "heads": 1}}, "far larger model"),
    "vocabulary": ({"text_cfg": {"vocab_size": HUGE}}, "vocab_size"),
    "image": ({"vision_cfg": {"image_size": 1 << 40}}, "image_size"),
    "negative image": ({"vision_cfg": {"image_size": -32}}, "image_size"),
    "patches": ({"vision_cfg": {"patch_size": 0}}, "patch_size is 0"),
    "heads": ({"text_cfg": {"heads": 0}}, "heads is 0"),
    "negative": ({"vision_cfg": {"width": -64}}, "width is -64"),
    "wide": ({"embed_dim": 60000, "vision_cfg": {"width": 65536, "layers": 500}}, "far larger model"),
    "ratio": ({"text_cfg": {"mlp_ratio": 1e6}}, "mlp_ratio"),
    "list": ({"vision_cfg": [1]}, "expected an object"),
    "whole list": ([1, 2], "expected an object"),
    "nothing": ({"text_cfg": None}, "expected an object"),
    "nested": ({"vision_cfg": nested(1000)}, "nested more than"),
    "deeply nested": ({"preprocess_cfg": {"mean": nested(900)}}, "nested more than"),
    "infinite": ({"init_logit_scale": float("inf")}, "Infinity is not a number"),
    "undefined": ({"preprocess_cfg": {"crop_pct": float("nan")}}, "NaN is not a number"),
    "scale": ({"init_logit_scale": 1e5}, "init_logit_scale"),
    "string": ({"vision_cfg": {"image_size": "32"}}, "image_size is '32', not of type int"),
    "crop": ({"preprocess_cfg": {"crop_pct": 1e-9}}, "crop_pct"),
    "means": ({"preprocess_cfg": {"mean": [0.5]}}, "mean is"),
    "mean": ({"preprocess_cfg": {"mean": "grey"}}, "mean is 'grey'"),
    "deviation": ({"preprocess_cfg": {"std": [0.0, 1.0, 1.0]}}, "std is"),
    "interpolation": ({"preprocess_cfg": {"interpolation": "lanczos"}}, "interpolation is 'lanczos', not 'bicubic' or"),
    "bias": ({"init_logit_bias": [1]}, "init_logit_bias"),
}


def nested_text(values) -> str:
    """JSON, also of lists that are nested too deep for Python's own writer."""
    if values == {"vision_cfg": CONFIGS["nested"][0]["vision_cfg"]}:
        return '{"vision_cfg": ' + "[" * 100_000 + "]" * 100_000 + "}"
    return json.dumps(values)


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_asks_for_no_more_than_its_weights_hold(what, tiny_model, tmp_path):
    values, reason = CONFIGS[what]
    tiny_model.save_pretrained(tmp_path / "a")
    weights = from_miniclip(tiny_model.state_dict(), "openclip")
    save_file(weights, tmp_path / "weights.safetensors")
    whole = tiny_model.config.to_dict()
    if isinstance(values, dict):
        values = {k: whole.get(k, {}) | v if isinstance(v, dict) else v for k, v in values.items()}
        text = nested_text(whole | values) if what != "nested" else nested_text(values)
    else:
        text = json.dumps(values)
    for path in (tmp_path / "a" / "config.json", tmp_path / "c.json"):
        path.write_text(text)
    (tmp_path / "a" / "manifest.json").unlink()
    start = time.monotonic()
    with pytest.raises(InputError, match=f"(?s){reason}") as caught:
        miniclip.load(tmp_path / "a")
    with pytest.raises(InputError, match=reason) as again:
        miniclip.load(tmp_path / "c.json", pretrained=tmp_path / "weights.safetensors")
    if "far larger" in reason:
        assert f"{tmp_path / 'a' / 'config.json'} is" in str(caught.value) and "c.json is" in str(again.value)
    assert time.monotonic() - start < 10 and len(str(caught.value)) < 1500
    assert str(tmp_path / "a") in str(caught.value)
    with pytest.raises(InputError) as converting:
        convert(tmp_path / "a", tmp_path / "b", "hf")
    assert "far larger" not in reason or str(converting.value) == str(caught.value)


@pytest.mark.parametrize("values", [
    {"vision_config": {"layer_norm_eps": 1e-6}}, {"text_config": {"layer_norm_eps": "small"}},
    {"vision_config": [1]}, {"vision_config": {"num_attention_heads": 0}}, {"vision_config": {"hidden_act": ["gelu"]}},
    {"text_config": {"num_attention_heads": "many"}}, {"vision_config": {"num_attention_heads": 5}},
])  # fmt: skip
def test_odd_configs_of_transformers_are_refused_by_name(values, tmp_path):
    save_hf(tmp_path / "hf")
    theirs = json.loads((tmp_path / "hf" / "config.json").read_text())
    for name, value in values.items():
        theirs[name] = theirs[name] | value if isinstance(value, dict) else value
    write_json(tmp_path / "hf" / "config.json", theirs)
    with pytest.raises(InputError, match=f"{tmp_path / 'hf'}"):
        convert(tmp_path / "hf", tmp_path / "out", "miniclip")


@pytest.mark.parametrize("values", [
    {"size": "256"}, {"size": []}, {"size": {"shortest_edge": "x"}}, {"size": {"shortest_edge": -3}}, {"resample": [3]},
    {"crop_size": [224]}, {"crop_size": {"height": 32, "width": 40}}, {"image_mean": 0.5}, {"image_std": [0, 0, 0]},
    {"size": {"shortest_edge": 32, "longest_edge": 40}}, {"rescale_factor": "1/255"}, {"image_mean": nested(300)},
    {"size": {"shortest_edge": 10**12}, "crop_size": 32},
])  # fmt: skip
def test_odd_preprocessing_is_refused_by_name(values, tmp_path):
    save_hf(tmp_path / "hf")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(InputError, match="preprocessor_config.json"):
        convert(tmp_path / "hf", tmp_path / "out", "miniclip")


# ---- To other libraries


def photos(n: int = 12):
    rng = np.random.default_rng(0)
    for _ in range(n):
        width, height = (int(side) for side in rng.integers(40, 600, 2))
        noise = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        yield Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_resize_40_crop_32_is_kept_or_said(name, tmp_path, recwarn):
    """From transformers to ours and back to the same pixels, whichever of its two files has them."""
    save_hf(tmp_path / "hf")
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32)
    theirs.save_pretrained(tmp_path / "hf")
    if name == "processor_config.json":
        settings = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
        write_json(tmp_path / "hf" / name, {"processor_class": "CLIPProcessor", "image_processor": settings})
        (tmp_path / "hf" / "preprocessor_config.json").unlink()
    convert(tmp_path / "hf", tmp_path / "ours", "miniclip")
    convert(tmp_path / "ours", tmp_path / "again", "hf")
    assert not recwarn.list
    _, preprocess, _ = miniclip.load(tmp_path / "ours")
    again = CLIPImageProcessorPil.from_pretrained(tmp_path / "again")
    for image in photos():
        expected = torch.as_tensor(theirs(image, return_tensors="pt")["pixel_values"][0])
        torch.testing.assert_close(preprocess(image), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(torch.as_tensor(again(image, return_tensors="pt")["pixel_values"][0]), expected)
    for target in ("x.pt", "x.safetensors", "folder"):
        with pytest.warns(UserWarning) as warned:
            convert(tmp_path / "ours", tmp_path / target, "openclip")
        said = " ".join(str(w.message) for w in warned)
        assert "crop_pct 0.8" in said and "one pixel elsewhere" in said
    with pytest.warns(UserWarning, match="ours.json prepares images otherwise than .*hf, in .*crop_pct"):
        whole = MiniClip.from_pretrained(tmp_path / "ours").config.to_dict()
        (tmp_path / "ours.json").write_text(json.dumps(whole | {"preprocess_cfg": {}}))
        convert(tmp_path / "hf", tmp_path / "named", "miniclip", model=str(tmp_path / "ours.json"))


def test_an_image_size_beside_the_models_is_said(tmp_path):
    save_hf(tmp_path / "hf")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "hf")
    with pytest.warns(UserWarning, match="cropped to 224, but the model's images are of 32"):
        convert(tmp_path / "hf", tmp_path / "ours", "miniclip")


def test_a_folder_for_openclip(tiny_config, tmp_path, recwarn):
    """`open_clip.create_model("local-dir:...")` passes model_cfg to its class and preprocess_cfg to its transform."""
    images = {"mean": (0.5, 0.4, 0.3), "interpolation": "bilinear", "resize_mode": "squash"}
    tiny_config.init_logit_bias, tiny_config.quick_gelu = -10.0, True
    for name, value in images.items():
        setattr(tiny_config.preprocess_cfg, name, value)
    model = MiniClip(tiny_config).eval()
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "openclip.v1", "openclip")
    assert not recwarn.list
    folder = tmp_path / "openclip.v1"
    assert {"open_clip_config.json", "open_clip_model.safetensors"} <= {path.name for path in folder.iterdir()}
    written = json.loads((folder / "open_clip_config.json").read_text())
    known = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
    assert written["preprocess_cfg"].keys() == known and written["preprocess_cfg"]["mean"] == [0.5, 0.4, 0.3]
    assert written["model_cfg"].keys() == {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale",
                                           "init_logit_bias"}  # fmt: skip
    assert_equal(load_file(folder / "open_clip_model.safetensors"), from_miniclip(model.state_dict(), "openclip"))
    convert(folder, tmp_path / "back", "miniclip")
    back = MiniClip.from_pretrained(tmp_path / "back")
    assert back.config == tiny_config
    assert_equal(back.state_dict(), model.state_dict())
    there, *_ = miniclip.load(folder)
    assert there.config == tiny_config
    assert_equal(there.state_dict(), model.state_dict())
    save_file(from_miniclip(model.state_dict(), "openclip"), tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match="--model"):  # a folder needs the config
        convert(tmp_path / "alone.safetensors", tmp_path / "x", "openclip")
    (folder / "open_clip_config.json").write_text('{"model_cfg": []}')
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="open_clip_config.json has no objects"):
        convert(folder, tmp_path / "odd", "miniclip")


# ---- Encoders


@pytest.fixture
def no_network(monkeypatch):
    """Counts and refuses connections."""
    tried = []

    def connect(self, address):
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: connect(None, address))
    yield tried
    assert not tried


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VIT = {"model_type": "vit", "image_size": 32, "patch_size": 16} | SIZES


@pytest.fixture
def vit_folder(tiny_config, tmp_path):
    """A saved model with a tiny ViT of transformers; returns the folder and its config."""
    values = tiny_config.to_dict() | {"vision_cfg": {"hf_model_config": VIT, "image_size": 32}}
    del values["preprocess_cfg"]
    MiniClip(MiniClipConfig.from_dict(values)).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "manifest.json").unlink()
    return tmp_path / "vit", json.loads((tmp_path / "vit" / "config.json").read_text())


ENCODERS = {  # what the encoder's config says -> what the error says
    "own code": ({"auto_map": {"AutoModel": "evil--model.Model"}}, "auto_map"),
    "quantised": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "quantization_config",
    ),
    "kernel": ({"attn_implementation": "somebody/kernel"}, "attn_implementation"),
    "kernel inside": ({"_attn_implementation": "somebody/kernel:fast"}, "_attn_implementation"),
    "kernels by part": ({"attn_implementation": {"": "sdpa", "text_config": "somebody/kernel"}}, "kernel"),
    "experts": ({"experts_implementation": "somebody/kernel"}, "experts_implementation"),
    "nested": ({"vision_config": {"auto_map": {"AutoModel": "x.Y"}}}, "auto_map"),
    "backbone": ({"use_pretrained_backbone": True, "backbone": "microsoft/resnet-50"}, "use_pretrained_backbone"),
    "layers": ({"num_hidden_layers": 10**7}, "far larger model"),
    "more layers": ({"num_hidden_layers": 10**10}, "more than any encoder"),
    "width": ({"hidden_size": 1 << 20, "num_attention_heads": 1}, "far larger model"),
    "image": ({"image_size": 1 << 22}, "far larger model|cannot be used"),
    "string": ({"hidden_size": "large"}, "cannot be used"),
    "unknown": ({"model_type": "evil"}, "cannot be used"),
    "list": ({"model_type": ["vit"]}, "cannot be used"),
}


@pytest.mark.parametrize("what", ENCODERS)
def test_a_strangers_encoder_config_is_refused(what, vit_folder, no_network):
    (folder, values), (change, reason) = vit_folder, ENCODERS[what]
    values["vision_cfg"]["hf_model_config"] |= change
    (folder / "config.json").write_text(json.dumps(values))
    start = time.monotonic()
    with pytest.raises(InputError, match=reason):
        miniclip.load(folder)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("what", ["own code", "quantised", "kernel"])
def test_so_is_that_of_an_encoder_in_a_folder(what, tiny_config, tmp_path, no_network):
    change, reason = ENCODERS[what]
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(VIT | change))
    (tmp_path / "encoder" / "preprocessor_config.json").write_text('{"size": 32}')
    values = tiny_config.to_dict() | {"vision_cfg": {"hf_model_name": str(tmp_path / "encoder")}}
    (tmp_path / "c.json").write_text(json.dumps({k: v for k, v in values.items() if k != "preprocess_cfg"}))
    with pytest.raises(InputError, match=f"{tmp_path / 'encoder'}.*{reason}"):
        miniclip.load(tmp_path / "c.json")


@pytest.mark.parametrize("change", [
    {"hf_model_config": None}, {"hf_model_config": {}}, {"hf_model_config": [1]}, {"hf_model_config": "facebook/x"},
])  # fmt: skip
@pytest.mark.parametrize("preprocess", [True, False])
def test_a_saved_folder_never_asks_the_hub(change, preprocess, vit_folder, no_network):
    folder, values = vit_folder
    values["vision_cfg"] |= change | {"hf_model_name": "facebook/dinov2-small"}
    values.pop("preprocess_cfg") if not preprocess else None
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="hf_model_config"):
        miniclip.load(folder)


# ---- A module around the model


@pytest.mark.parametrize("start", ["model.", "clip.", "module.net."])
def test_weights_of_a_module_around_the_model_load(start, tiny_model, tmp_path):
    """Lightning's checkpoints call it model; more in that module is refused, as anywhere."""
    rows = tiny_model.visual.key_rows(), tiny_model.text.key_rows()
    weights = {f"{start}{name}": t for name, t in from_miniclip(tiny_model.state_dict(), "openclip", rows).items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "last.ckpt")
    model = MiniClip(tiny_model.config)
    load_weights(model, tmp_path / "last.ckpt")
    assert_equal(model.state_dict(), tiny_model.state_dict())
    torch.save({"state_dict": weights | {f"{start}head.weight": torch.ones(2)}}, tmp_path / "more.ckpt")
    with pytest.raises(CheckpointError, match="unknown .*head.weight"):
        load_weights(model, tmp_path / "more.ckpt")
