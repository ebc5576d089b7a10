"""Does the OpenCLIP face honour every argument of the real functions, or refuse it by name?"""

import importlib.util
import inspect
import json
import sys
import warnings
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import miniclip
import miniclip.compat.clip as clip
import miniclip.compat.open_clip as open_clip
from miniclip.checkpoint import from_miniclip
from miniclip.compat.model import CLIP, OpenAIClip
from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.training.siglip import add_logit_bias
from miniclip.transforms import Preprocess
from miniclip.utils.errors import CheckpointError, InputError

SIGNATURES = {  # of OpenCLIP 3.3.0 and OpenAI's package, in their order
    "create_model": "model_name pretrained load_weights precision device jit force_quick_gelu force_custom_text "
    "force_patch_dropout force_image_size force_preprocess_cfg force_context_length pretrained_image pretrained_text "
    "pretrained_image_path pretrained_text_path cache_dir output_dict require_pretrained weights_only model_kwargs",
    "create_model_and_transforms": "model_name pretrained load_weights precision device jit force_quick_gelu "
    "force_custom_text force_patch_dropout force_image_size force_context_length image_mean image_std "
    "image_interpolation image_resize_mode aug_cfg pretrained_image pretrained_text pretrained_image_path "
    "pretrained_text_path cache_dir output_dict weights_only model_kwargs",
    "create_model_from_pretrained": "model_name pretrained precision device jit force_quick_gelu force_custom_text "
    "force_image_size force_context_length image_mean image_std image_interpolation image_resize_mode "
    "return_transform cache_dir weights_only model_kwargs",
    "get_tokenizer": "model_name context_length cache_dir kwargs",
    "tokenize": "texts context_length",
    "decode": "output_ids",
    "list_models": "",
    "add_model_config": "path",
    "get_model_config": "model_name",
    "load_checkpoint": "model checkpoint_path strict weights_only device",
    "image_transform": "image_size is_train mean std resize_mode interpolation fill_color aug_cfg",
    "image_transform_v2": "cfg is_train aug_cfg",
    "AugmentationCfg": "scale ratio color_jitter re_prob re_count use_timm color_jitter_prob gray_scale_prob",
    "SimpleTokenizer": "bpe_path additional_special_tokens context_length clean reduction_mask",
    "ClipLoss": "local_loss gather_with_grad cache_labels rank world_size use_horovod",
    "SigLipLoss": "cache_labels rank world_size dist_impl",
    "build_zero_shot_classifier": "model tokenizer classnames templates num_classes_per_batch device use_tqdm",
    "convert_weights_to_lp": "model dtype",
    "trace_model": "model batch_size device",
    "list_pretrained": "as_str",
    "list_pretrained_tags_by_model": "model",
    "list_pretrained_models_by_tag": "tag",
    "get_pretrained_cfg": "model tag",
    "download_pretrained": "cfg prefer_hf_hub cache_dir",
}
# What `import open_clip` has besides modules and these functions.
NAMES = """CLIP CLIPTextCfg CLIPVisionCfg CoCa CoCaLoss CustomTextCLIP DistillClipLoss IMAGENET_CLASSNAMES
    OPENAI_DATASET_MEAN OPENAI_DATASET_STD OPENAI_IMAGENET_TEMPLATES SIMPLE_IMAGENET_TEMPLATES
    build_zero_shot_classifier_legacy convert_weights_to_fp16 create_loss download_pretrained_from_url get_cast_dtype
    get_input_dtype get_model_preprocess_cfg get_model_tokenize_cfg get_pretrained_url is_pretrained_cfg
    list_openai_models load_openai_model push_pretrained_to_hf_hub push_to_hf_hub set_model_preprocess_cfg""".split()

IMAGE = torch.linspace(-2, 2, 2 * 3 * 224 * 224).view(2, 3, 224, 224)
pytestmark = pytest.mark.usefixtures("names")


def create(**more) -> CLIP:
    return open_clip.create_model("ViT-B-32", **{"pretrained": "laion2b_s34b_b79k"} | more)


def assert_near(a, b):
    """Projections lie in memory the other way round, so that the last bit may differ."""
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.fixture
def file(small, tmp_path):
    torch.save(from_miniclip(small["ViT-B-32"].state_dict(), "openclip"), tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert list(inspect.signature(getattr(open_clip, name)).parameters) == SIGNATURES[name].split()


def test_recorded_facts_are_those_of_open_clip():
    theirs = real_open_clip()
    for name in SIGNATURES:
        module = theirs if hasattr(theirs, name) else theirs.loss if "Loss" in name else theirs.transform
        assert list(inspect.signature(getattr(module, name)).parameters) == SIGNATURES[name].split(), name
    public = {name for name in vars(theirs) if name[0] != "_" and not inspect.ismodule(getattr(theirs, name))}
    assert public - {*SIGNATURES} == {*NAMES}


def real_open_clip():
    """OpenCLIP, where it is installed; benchmarks/peers.md says how, and what torchvision needs there."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("needs open_clip: see benchmarks/peers.md")
    if "torchvision" not in sys.modules:
        LIBRARY.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            LIBRARY[0].define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return importlib.import_module("open_clip")


LIBRARY = []  # kept, or the operators would go


def test_every_name_is_there_or_refused_with_a_reason():
    for name in [*NAMES, "tokenizer", "transform"]:
        if name not in vars(open_clip):
            with pytest.raises(AttributeError, match=f"no {name}: .*docs/compat.md"):
                getattr(open_clip, name)
    assert clip.__dict__.keys() >= {"available_models", "load", "tokenize"}
    assert list(inspect.signature(clip.load).parameters) == ["name", "device", "jit", "download_root"]
    assert list(inspect.signature(clip.tokenize).parameters) == ["texts", "context_length", "truncate"]


@pytest.mark.parametrize("given, reason", [
    ({"jit": True}, "jit cannot be honoured: TorchScript"),
    ({"weights_only": False}, "weights_only cannot be honoured: code in weight files never runs"),
    ({"force_image_size": (224, 256)}, r"force_image_size \(224, 256\): .* square"),
    ({"pretrained_image": True}, "pretrained_image cannot be honoured: its config names no weights"),
    ({"precision": "int8"}, "precision 'int8' is not one of fp32"),
    ({"nonscalar_logit_scale": True}, "nonscalar_logit_scale cannot be honoured"),
    ({"cast_dtype": torch.float16}, "cast_dtype cannot be honoured"),
    ({"no_such_field": 1}, "unknown field 'no_such_field'"),
    ({"force_preprocess_cfg": {"sharpen": 1}}, "unknown field 'sharpen'"),
    ({"force_preprocess_cfg": {"interpolation": "random"}}, "interpolation is 'random'"),
    ({"pretrained": None, "require_pretrained": True}, "require_pretrained cannot be honoured: ViT-B-32 comes without"),
    ({"pretrained": "laion2b_s34b"}, "no file or folder .* a tag of ViT-B-32; nearest: laion2b_s34b_b79k"),
])  # fmt: skip
def test_arguments_that_are_refused(given, reason):
    with pytest.raises(InputError, match=reason):
        create(**given)


@pytest.mark.parametrize("given, check", [
    ({}, lambda m: m.training and m.dtype == torch.float32 and m.layout == "openclip"),
    ({"force_quick_gelu": True}, lambda m: m.config["quick_gelu"]),
    ({"force_custom_text": True}, lambda m: "text.ln_final.bias" in m.state_dict()),
    ({"force_patch_dropout": 0.5}, lambda m: m.visual.patch_dropout == 0.5),
    ({"force_image_size": (256, 256)}, lambda m: m.visual.preprocess_cfg["size"] == m.visual.image_size == 256),
    ({"force_context_length": 32}, lambda m: m.context_length == 32 and len(m.positional_embedding) == 32),
    ({"force_preprocess_cfg": {"mean": (0.5, 0.5, 0.5)}}, lambda m: m.visual.preprocess_cfg["mean"] == (0.5,) * 3),
    ({"init_logit_scale": 1.0, "load_weights": False}, lambda m: m.logit_scale.item() == 1),
    ({"output_dict": True}, lambda m: set(m(IMAGE)) == {"image_features", "text_features", "logit_scale"}),
    ({"precision": "pure_bf16"}, lambda m: {p.dtype for p in m.parameters()} == {torch.bfloat16}),
    ({"precision": "bf16"}, lambda m: m.logit_scale.dtype == m.ln_final.weight.dtype == torch.float32),
    ({"pretrained": ""}, lambda m: m.visual.image_mean == miniclip.compat.open_clip.OPENAI_DATASET_MEAN),
    ({"precision": "amp"}, lambda m: {p.dtype for p in m.parameters()} == {torch.float32}),
    ({"device": "meta"}, lambda m: m.logit_scale.is_meta),
    ({"pretrained_hf": False, "require_pretrained": True}, lambda m: True),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*(interpolated|random weights)")
def test_arguments_that_are_honoured(given, check):
    assert check(create(**given))


def test_low_precision_computes_nearly_the_same():
    ids = open_clip.tokenize(["a dog", "a cat"])
    expected, model = create().eval().get_logits(IMAGE, ids)[0], create(precision="bf16").eval()
    torch.testing.assert_close(model.get_logits(IMAGE, ids)[0].float(), expected, atol=0.2, rtol=0)
    classifier = open_clip.build_zero_shot_classifier(model, open_clip.SimpleTokenizer(), ["dog"], ["a {}"])
    assert classifier.dtype == model.dtype and classifier.shape == (512, 1)


def test_weights_of_one_tower(small, file, tmp_path):
    other = small["ViT-B-32-quickgelu"].state_dict()
    theirs = from_miniclip(other, "openclip")
    image = {key[7:]: tensor for key, tensor in theirs.items() if key.startswith("visual.")}
    torch.save(image, tmp_path / "image.pt")
    torch.save(theirs, tmp_path / "whole.pt")
    for image_file in ("image.pt", "whole.pt"):
        model = create(pretrained=file, pretrained_image_path=str(tmp_path / image_file))
        assert torch.equal(model.visual.proj.weight, other["visual.proj.weight"])
        assert torch.equal(model.ln_final.bias, small["ViT-B-32"].text.ln_final.bias)
    model = create(pretrained_text_path=str(tmp_path / "whole.pt"), pretrained=None)
    assert torch.equal(model.text.text_projection.weight, other["text.text_projection.weight"])
    del image["proj"]
    torch.save(image | {"head": torch.ones(1)}, tmp_path / "image.pt")
    with pytest.raises(CheckpointError, match="image.pt is not complete .* missing visual.proj; unknown head"):
        create(pretrained=file, pretrained_image_path=str(tmp_path / "image.pt"))


def test_from_pretrained_and_overridden_preprocessing(small, names):
    model, preprocess = open_clip.create_model_from_pretrained(
        "ViT-B-32", "laion2b_s34b_b79k", image_mean=(0.5, 0.5, 0.5), image_resize_mode="squash"
    )
    assert "mean=(0.5, 0.5, 0.5)" in str(preprocess) and "resize_mode='squash'" in str(preprocess)
    assert isinstance(open_clip.create_model_from_pretrained("ViT-B-32", "openai", return_transform=False), CLIP)
    repo = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    model, preprocess = open_clip.create_model_from_pretrained(repo, cache_dir=str(names.parent / "cache"))
    assert model.context_length == open_clip.get_tokenizer(repo).context_length and "std=(0.5, 0.5, 0.5)" in str(
        preprocess
    )
    small["ViT-B-32"].save_pretrained(names / "mine")
    with pytest.warns(UserWarning, match="pretrained 'openai' is ignored"):
        model, _ = open_clip.create_model_from_pretrained(f"local-dir:{names / 'mine'}", "openai")
    assert torch.equal(model.visual.proj.weight, small["ViT-B-32"].visual.proj.weight)


def test_weight_names(small, file, tmp_path):
    """The model gives and takes OpenCLIP's names, also inside another module, and takes MiniCLIP's and OpenAI's."""
    model, theirs = create(pretrained=file), torch.load(file)
    found = model.state_dict()
    assert found.keys() == theirs.keys() and all(torch.equal(found[key], theirs[key]) for key in theirs)
    assert all(tensor.is_contiguous() for tensor in found.values())  # so that safetensors takes it
    found["text_projection"].zero_()  # the tensors are the model's own, as everywhere
    assert not model.text.text_projection.weight.any()
    wrapped = torch.nn.Sequential(model)
    wrapped.load_state_dict({f"0.{key}": tensor for key, tensor in theirs.items()})
    assert wrapped.state_dict().keys() == {f"0.{key}" for key in theirs}
    for other in (small["ViT-B-32"].state_dict(), theirs | {"input_resolution": torch.tensor(224)}):
        with warnings.catch_warnings(action="ignore"):
            again = open_clip.create_model("ViT-B-32")
        again.load_state_dict(other)
        assert_near(again.encode_text(torch.ones(1, 3, dtype=int)), model_text(small))
    del theirs["ln_final.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*ln_final.bias"):
        model.load_state_dict(theirs)
    assert model.load_state_dict(theirs | {"head": torch.ones(1)}, strict=False) == (["ln_final.bias"], ["head"])
    assert open_clip.load_checkpoint(model, file) == ([], [])
    with pytest.raises(InputError, match="strict cannot be honoured"):
        open_clip.load_checkpoint(model, file, strict=False)


@pytest.mark.parametrize("peer", [False, True], ids=["here", "openclip"])
def test_a_bias_that_the_weights_lack_is_zero(peer, small, file, names):
    """From a tag (not asked of OpenCLIP, which would download it), a file and a folder; the logits stay the same."""
    library = real_open_clip() if peer else open_clip
    sizes = json.loads((names.parent / "configs" / "ViT-B-32.json").read_text()) | {"init_logit_bias": -10.0}
    (names / "with-bias.json").write_text(json.dumps(sizes))
    library.add_model_config(names / "with-bias.json")
    with warnings.catch_warnings(action="ignore"):
        made = library.create_model("with-bias", init_logit_scale=1.0)
        found = [library.create_model("with-bias", file)]
    assert made.logit_bias.item() == -10 and made.logit_scale.item() == 1
    if not peer:
        small["ViT-B-32"].save_pretrained(names / "folder")
        for name, tag in (("ViT-B-32", "laion2b_s34b_b79k"), (f"local-dir:{names / 'folder'}", None)):
            with pytest.warns(UserWarning, match="have no logit_bias: it is 0, as in OpenCLIP"):
                found.append(library.create_model(name, tag, init_logit_bias=-10.0, init_logit_scale=1.0))
        assert found[-1].config["init_logit_bias"] == -10.0
    with warnings.catch_warnings(action="ignore"):
        library.load_checkpoint(made, file)
    for model in [*found, made]:
        assert model.logit_bias.item() == 0 and model.logit_scale.item() == small["ViT-B-32"].logit_scale.item()
        logits = model.eval().get_logits(IMAGE, torch.ones(1, 77, dtype=int))[0]
        assert_near(logits, small["ViT-B-32"].get_logits(IMAGE, torch.ones(1, 77, dtype=int))[0])
    if not peer:  # a bias that they have is theirs
        torch.save(found[0].state_dict() | {"logit_bias": torch.tensor(-3.0)}, names / "own.pt")
        for given in ({"init_logit_bias": -10.0}, {}):
            assert create(pretrained=str(names / "own.pt"), **given).logit_bias.item() == -3


def test_models_of_custom_text_have_its_names(names):
    """Those that OpenCLIP builds so by their configs, in its package or on the hub."""
    with torch.device("meta"):
        model = open_clip.create_model("ViT-B-16-SigLIP", device="meta")
    assert {"text.ln_final.bias", "text.text_projection.bias"} <= model.state_dict().keys()
    (about,) = (names.parent / "cache").glob("*laion2B*/snapshots/*/open_clip_config.json")
    values = json.loads(about.read_text())
    for custom in (False, True):
        values["model_cfg"]["custom_text"] = custom
        about.write_text(json.dumps(values))
        found = open_clip.create_model("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K").state_dict()
        assert ("text.ln_final.bias" in found) == custom != ("ln_final.bias" in found)


def model_text(small):
    return small["ViT-B-32"].encode_text(torch.ones(1, 3, dtype=int))


def test_outputs(small):
    model, ids = create().eval(), open_clip.tokenize(["a dog", "a cat"])
    image, text, scale = model(IMAGE, ids)
    plain = small["ViT-B-32"](IMAGE, ids)
    assert_near(torch.cat([image, text]), torch.cat([plain.image_embeds, plain.text_embeds]))
    assert scale == plain.logit_scale
    assert model(image=IMAGE)[1] is None and model(text=ids)[0] is None
    assert_near(model.get_logits(IMAGE, ids)[0], small["ViT-B-32"].get_logits(IMAGE, ids)[0])
    assert_near(model.encode_image(IMAGE, normalize=True), F.normalize(model.encode_image(IMAGE), dim=-1))
    assert (model.context_length, model.vocab_size, model.visual.output_dim) == (77, 49408, 512)
    model.encode_image = lambda image, normalize=False: text  # of a subclass, say
    assert model(IMAGE, ids)[0] is text and model.get_logits(IMAGE, ids)[0].shape == (2, 2)
    del model.encode_image
    add_logit_bias(model.miniclip)
    assert len(model(IMAGE, ids)) == 4 and model(IMAGE, ids)[3] is model.logit_bias
    model.lock_image_tower(1), model.lock_text_tower(0)
    with pytest.raises(InputError, match="freeze_layer_norm=False cannot be honoured"):
        model.lock_text_tower(1, freeze_layer_norm=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"miniclip.visual.proj.weight", "miniclip.logit_scale", "miniclip.logit_bias"}


LOCKED = {  # sections of a small model
    "CLIP": ({"layers": 2, "width": 64, "patch_size": 16}, {}),
    "ResNet": ({"layers": [1, 1, 1, 1], "width": 16, "patch_size": None}, {}),
    "CLIPA": ({"layers": 2, "width": 64, "no_ln_pre": True, "pool_type": "avg"}, {"no_causal_mask": True}),
    "with a bias": ({"layers": 2, "width": 64}, {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}),
    "SigLIP": ({"layers": 2, "width": 32, "head_width": 16, "pool_type": "map"}, {}),
    "TinyCLIP auto": ({"layers": 2, "width": 64, "block_heads": [1, 0]}, {}),
}


@pytest.mark.parametrize("family", LOCKED)
def test_both_towers_are_locked(family):
    """In either order, as many groups as are asked for, as in OpenCLIP; with more than there are everything learns."""
    usual = {"image_size": 32}, {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
    vision, text = (common | fields for common, fields in zip(usual, LOCKED[family]))
    values = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "init_logit_bias": -10.0}
    custom = "proj_bias" in text

    def learning(image: int, layers: int, order: int) -> set[str]:
        model = CLIP(MiniClip(MiniClipConfig.from_dict(values)), custom_text=custom)
        for lock, unlocked in ((model.lock_image_tower, image), (model.lock_text_tower, layers))[::order]:
            lock(unlocked)
        model.get_logits(torch.randn(2, 3, 32, 32), torch.ones(2, 8).long())[0].sum().backward()
        assert model.logit_scale.grad is not None
        for p in model.parameters():
            p.data.fill_(p.requires_grad)
        counted = "running_mean", "running_var", "num_batches_tracked"
        return {name for name, t in model.state_dict().items() if t.any() and not name.endswith(counted)}

    assert learning(0, 0, 1) == learning(0, 0, -1) == {"logit_scale", "logit_bias"}
    everything = learning(9, 9, 1)
    assert len(everything) > 20 and learning(1, 1, 1) == learning(1, 1, -1) < learning(4, 4, 1) <= everything
    if importlib.util.find_spec("open_clip") and family not in ("SigLIP", "TinyCLIP auto"):
        theirs = real_open_clip()
        for image, layers in product((0,) if family == "ResNet" else (0, 1, 2, 3, 4, 9), (0, 1, 2, 3, 4, 9)):
            peer = (theirs.CustomTextCLIP if custom else theirs.CLIP)(**values)
            peer.lock_image_tower(image), peer.lock_text_tower(layers)
            expected = {name for name, p in peer.named_parameters() if p.requires_grad}
            assert learning(image, layers, 1) == expected, (image, layers)


def test_transforms(names):
    """Steps print, can be taken apart, and show transparent pixels in their hidden colour."""
    transform = open_clip.image_transform(224, is_train=False, mean=0.5, std=(0.2, 0.3, 0.4))
    assert repr(transform).startswith("Compose(\n    Resize(size=224, interpolation='bicubic', resize_mode='shortest')")
    assert transform.transforms[-1].mean == (0.5, 0.5, 0.5)
    image = Image.new("RGBA", (300, 201), (255, 0, 0, 0))
    preprocess = create().visual.preprocess_cfg
    full = open_clip.image_transform_v2(open_clip.PreprocessCfg(**preprocess), is_train=False)
    assert torch.equal(full(image), Preprocess(open_clip.PreprocessCfg(), "openclip")(image))
    levels = open_clip.Compose(full.transforms[:-1])(Image.new("RGBA", (224, 224), (255, 0, 0, 0)))
    assert levels[:, 0, 0].tolist() == [1, 0, 0]
    assert open_clip.PreprocessCfg((64, 64)).input_size == (3, 64, 64)
    with pytest.raises(InputError, match="square"):
        open_clip.PreprocessCfg((64, 32))
    with pytest.raises(TypeError, match="expected a PIL image, found Tensor"):
        full(torch.zeros(3, 8, 8))


def test_training_transform():
    augment = {
        "scale": (0.2, 0.5),
        "color_jitter": (0.4, 0.4, 0.4, 0.1),
        "color_jitter_prob": 0.8,
        "gray_scale_prob": 1,
    }
    _, train, _ = open_clip.create_model_and_transforms("ViT-B-32", "openai", aug_cfg=augment)
    assert "RandomResizedCrop(size=224, scale=(0.2, 0.5))" in str(train) and "RandomGrayscale(p=1)" in str(train)
    image = Image.effect_noise((300, 200), 90).convert("RGB")
    torch.manual_seed(3)
    first, second = train(image), train(image)
    torch.manual_seed(3)
    assert torch.equal(train(image), first) and not torch.equal(first, second)
    gray = open_clip.Compose(train.transforms[:-1])(image)
    assert gray.shape == (3, 224, 224) and torch.equal(gray[0], gray[1])
    for strengths in (0.4, (0.4, 0.4, 0.4)):  # the third would be the hue's
        with pytest.raises(InputError, match="color_jitter .*: give brightness, contrast, saturation and hue"):
            open_clip.AugmentationCfg(color_jitter=strengths, color_jitter_prob=0.8)
    for name, value in (("use_timm", True), ("ratio", (1.0, 1.0)), ("re_prob", 0.1), ("re_count", 2)):
        with pytest.raises(InputError, match=f"aug_cfg: {name} .* timm"):
            open_clip.image_transform(224, True, aug_cfg={name: value})
    with pytest.raises(InputError, match="color_jitter and color_jitter_prob"):
        open_clip.AugmentationCfg(color_jitter=(0.4, 0.4, 0.4, 0.1))
    with pytest.raises(InputError, match="unknown field 'flip'"):
        open_clip.image_transform(224, True, aug_cfg={"flip": 1})


def test_tokenizers(names, small):
    tokenizer = open_clip.get_tokenizer("ViT-B/32", context_length=16)
    ids = tokenizer("a dog")
    assert ids.shape == (1, 16) and tokenizer(["a", "b"], context_length=8).shape == (2, 8)
    assert tokenizer.decode(ids[0][:4]) == "<start_of_text>a dog <end_of_text>"
    assert open_clip.decode(ids[0]).split("<end_of_text>")[0].replace("<start_of_text>", "") == "a dog "
    assert torch.equal(open_clip.tokenize(["a dog"] * 2), miniclip.Tokenizer()(["a dog"] * 2))
    small["ViT-B-32"].save_pretrained(names / "mine")
    assert open_clip.get_tokenizer(f"local-dir:{names / 'mine'}").context_length == 77
    for name, value in (("clean", "canonicalize"), ("reduction_mask", "simple"), ("bpe_path", "x.gz")):
        with pytest.raises(InputError, match=f"{name}.* cannot be honoured"):
            open_clip.get_tokenizer("ViT-B-32", **{name: value})
    with pytest.raises(InputError, match="nearest"):
        open_clip.get_tokenizer("ViT-B-33")
    with pytest.raises(RuntimeError, match="Input .* is too long for context length 5"):
        clip.tokenize((text for text in ("a", "one two three four")), context_length=5)
    assert clip.tokenize("one two three four", 5, truncate=True)[0, -1] == 49407


def test_losses():
    image, text = F.normalize(torch.randn(2, 6, 8), dim=-1)
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0)
    logits = scale * image @ text.T
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    loss = open_clip.ClipLoss()(image, text, scale, output_dict=True)
    torch.testing.assert_close(loss["contrastive_loss"], expected)
    torch.testing.assert_close(open_clip.ClipLoss()(image, text, 10.0), expected)  # numbers, as there
    signs = 2 * torch.eye(6) - 1
    expected = -F.logsigmoid(signs * (logits + bias)).sum() / 6
    for given in (scale, bias), (10.0, -5.0):
        torch.testing.assert_close(open_clip.SigLipLoss()(image, text, *given), expected)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}
    for precision in ("fp32", "fp16", "bf16", "pure_bf16"):
        name = precision.removeprefix("pure_")
        assert open_clip.get_input_dtype(precision=precision) is half.get(name)
        assert open_clip.get_cast_dtype(precision=precision) is half.get(precision)
    for refused in ({"world_size": 2}, {"use_horovod": True}):
        with pytest.raises(InputError, match="cannot be honoured"):
            open_clip.ClipLoss(**refused)
    with pytest.raises(InputError, match="dist_impl 'ring'"):
        open_clip.SigLipLoss(dist_impl="ring")


def test_configs(tmp_path):
    models = open_clip.list_models()
    assert models.index("ViT-B-16") < models.index("ViT-B-32") and open_clip.get_model_config("no such") is None
    config = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}, "custom_text": True}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "mine.json")
    assert "mine" in open_clip.list_models() and open_clip.get_model_config("mine")["embed_dim"] == 8
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="broken.json cannot be read"):
        open_clip.add_model_config(tmp_path / "broken.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="contains no model config"):
        open_clip.add_model_config(tmp_path / "empty")


def test_imagenet():
    assert len(open_clip.IMAGENET_CLASSNAMES) == 1000 and open_clip.IMAGENET_CLASSNAMES[:2] == ("tench", "goldfish")
    assert len(open_clip.OPENAI_IMAGENET_TEMPLATES) == 80 and len(open_clip.SIMPLE_IMAGENET_TEMPLATES) == 7
    assert open_clip.OPENAI_IMAGENET_TEMPLATES[0]("tench") == "a bad photo of a tench."


def test_openai_files(file, small, names):
    """A weight file's config follows from its shapes; QuickGELU is OpenAI's unless the file is known to be GELU."""
    model, preprocess = clip.load(file, device="cpu")
    assert isinstance(model, OpenAIClip) and model.config["quick_gelu"] and not model.training
    assert model.visual.input_resolution == 224 and preprocess(Image.new("L", (9, 8))).shape == (3, 224, 224)
    small["ViT-B-32"].save_pretrained(names / "mine")
    model, _ = clip.load(str(names / "mine"), device="cpu")
    assert not model.config["quick_gelu"]
    with pytest.raises(InputError, match="jit cannot be honoured"):
        clip.load(file, jit=True)
    with pytest.raises(InputError, match=r"Model ViT not found; available models = \['RN50'"):
        clip.load("ViT")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_trace():
    model, ids = create(), open_clip.tokenize(["a dog", "a cat"])
    traced = open_clip.trace_model(model, batch_size=1)
    torch.testing.assert_close(traced(IMAGE, ids), model(IMAGE, ids))
    torch.testing.assert_close(traced.encode_text(ids), model.encode_text(ids))


class TestParity:
    """The same weight file and pictures in OpenCLIP and here."""

    @pytest.fixture
    def both(self, file, tmp_path):
        theirs = real_open_clip()
        theirs.add_model_config(tmp_path / "configs")
        return [m.create_model_and_transforms("ViT-B-32", pretrained=file) for m in (theirs, open_clip)]

    def test_features(self, both):
        image = Image.effect_noise((301, 200), 90).convert("RGB")
        clear = Image.merge("RGBA", (*image.split(), Image.effect_noise(image.size, 120)))
        for picture in (image, clear, image.convert("P"), image.convert("L"), image.resize((9, 200))):
            pixels = [preprocess(picture)[None] for _, _, preprocess in both]
            assert torch.equal(*pixels), picture.mode
        ids = open_clip.tokenize(["a photo of a cat", "猫", "x " * 100])
        assert torch.equal(ids, real_open_clip().tokenize(["a photo of a cat", "猫", "x " * 100]))
        for ours, reals in zip(*(model.eval()(pixels[0], ids) for model, _, _ in both)):
            torch.testing.assert_close(ours, reals, atol=1e-5, rtol=0)

    def test_openai(self, file):
        if (spec := importlib.util.find_spec("clip")) is None:
            pytest.skip("needs OpenAI's package: see benchmarks/peers.md")
        spec = importlib.util.spec_from_file_location("theirs", f"{spec.submodule_search_locations[0]}/model.py")
        theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        theirs.convert_weights = lambda model: None  # to half precision
        ids, (model, _) = clip.tokenize(["a photo of a cat", "two dogs"]), clip.load(file, device="cpu")
        for ours, real in zip(model(IMAGE, ids), theirs.build_model(torch.load(file))(IMAGE, ids)):
            torch.testing.assert_close(ours, real, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
    def test_low_precision(self, file, both, precision):
        ids, found = open_clip.tokenize(["a photo of a cat", "two dogs"]), []
        for module in (real_open_clip(), open_clip):
            model = module.create_model("ViT-B-32", pretrained=file, precision=precision).eval()
            found.append(model(IMAGE.bfloat16(), ids))
        assert found[0][2].dtype == found[1][2].dtype
        for ours, reals in zip(*found):
            torch.testing.assert_close(ours, reals, atol=4e-3, rtol=0)

    def test_weights_go_both_ways(self, both):
        (real, *_), (ours, *_) = both
        assert real.load_state_dict(ours.state_dict()) == ([], [])
        assert list(sorted(real.state_dict())) == list(sorted(ours.state_dict()))
        ours.load_state_dict(real.state_dict())

    def test_classifier_and_losses(self, both):
        theirs, (real, *_), (ours, *_) = real_open_clip(), *both
        tokenizer, classes = open_clip.SimpleTokenizer(), ["cat", "dog", "tench"]
        found = [
            module.build_zero_shot_classifier(model.eval(), tokenizer, classes, module.OPENAI_IMAGENET_TEMPLATES)
            for module, model in ((theirs, real), (open_clip, ours))
        ]
        torch.testing.assert_close(*found, atol=1e-5, rtol=0)
        assert theirs.IMAGENET_CLASSNAMES == open_clip.IMAGENET_CLASSNAMES
        for a, b in zip(theirs.OPENAI_IMAGENET_TEMPLATES, open_clip.OPENAI_IMAGENET_TEMPLATES):
            assert a("x") == b("x")
        image, text = F.normalize(torch.randn(2, 6, 8), dim=-1)
        for name, bias in (("ClipLoss", None), ("SigLipLoss", torch.tensor(-3.0))):
            pair = [getattr(m, name)()(image, text, torch.tensor(9.0), bias) for m in (theirs.loss, open_clip)]
            torch.testing.assert_close(*pair)


def test_a_model_of_the_face_is_a_model_of_miniclip(names):
    """`miniclip` is the model inside: everything else takes it."""
    model = create()
    assert isinstance(model.miniclip, MiniClip)
    model.miniclip.save_pretrained(names / "saved")
    again, preprocess, tokenizer = miniclip.load(names / "saved")
    pixels, ids = preprocess(Image.open("CLIP.png"))[None], tokenizer(["a dog"])
    assert_near(again.get_logits(pixels, ids)[0], model.eval().get_logits(pixels, ids)[0])
