"""Small models from slices of large ones: which numbers they get, what cannot be had, and that it is worth it."""

import json

import pytest
import torch

import miniclip
from miniclip.commands.inherit import main
from miniclip.config import MiniClipConfig
from miniclip.loss import clip_loss
from miniclip.model import MiniClip
from miniclip.towers.coca import CocaConfig
from miniclip.utils.errors import InputError
from miniclip.weights.inherit import inherit, spaced
from miniclip.weights.load import resize_positions
from tests.inference.test_fast import (  # 3 layers, width 128, 4 heads of 32, 16 patches of 16, 24 tokens
    make_batch,
    make_model,
)
from tests.training.test_training import weights

SMALL = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 1, "mlp_ratio": 2.0},
}


def changed(tower: str | None = None, **changes) -> MiniClipConfig:
    """SMALL with other values."""
    values = {**SMALL, tower: {**SMALL[tower], **changes}} if tower else SMALL | changes
    return MiniClipConfig.from_dict(values)


def test_each_slice_by_number():
    source = make_model()
    small = inherit(source, MiniClipConfig.from_dict(SMALL), layers_image=[0, 2])
    big, ours = source.state_dict(), small.state_dict()
    assert small.config.to_dict() == MiniClipConfig.from_dict(SMALL).to_dict() and not small.training
    for name, shape in (  # what lies outside of the blocks: the first entries
        ("visual.conv1.weight", (64, 3, 16, 16)), ("visual.class_embedding", (64,)), ("visual.ln_pre.bias", (64,)),
        ("visual.positional_embedding", (17, 64)), ("visual.ln_post.weight", (64,)), ("visual.proj.weight", (48, 64)),
        ("text.token_embedding.weight", (49408, 96)), ("text.text_projection.weight", (48, 96)), ("logit_scale", ()),
    ):  # fmt: skip
        assert ours[name].shape == shape
        assert torch.equal(ours[name], big[name][tuple(slice(n) for n in shape)]), name
    for new, theirs, width, hidden in (
        ("visual.blocks.0.", "visual.blocks.0.", 64, 256), ("visual.blocks.1.", "visual.blocks.2.", 64, 256),
        ("text.blocks.0.", "text.blocks.0.", 96, 192),
    ):  # fmt: skip
        qkv, big_qkv = (weights[name + "attn.in_proj.weight"] for weights, name in ((ours, new), (big, theirs)))
        for part in range(3):  # queries, keys, values: in each the first heads, from the first channels
            rows = slice(part * 128, part * 128 + width)
            assert torch.equal(qkv[part * width : (part + 1) * width], big_qkv[rows, :width])
            bias = ours[new + "attn.in_proj.bias"][part * width : (part + 1) * width]
            assert torch.equal(bias, big[theirs + "attn.in_proj.bias"][rows])
        assert qkv.shape == (3 * width, width)
        for name, rows, columns in (
            ("attn.out_proj", width, width), ("mlp.c_fc", hidden, width), ("mlp.c_proj", width, hidden),
        ):  # fmt: skip
            assert torch.equal(ours[f"{new}{name}.weight"], big[f"{theirs}{name}.weight"][:rows, :columns])
            assert torch.equal(ours[f"{new}{name}.bias"], big[f"{theirs}{name}.bias"][:rows])
        assert torch.equal(ours[new + "ln_2.weight"], big[theirs + "ln_2.weight"][:width])
    assert small(*make_batch()).image_embeds.shape == (7, 48)


def test_a_head_computes_what_it_did():
    """Where the channels that are cut off carry nothing, the small tower's attention is that of the first heads."""
    source = make_model()
    small = inherit(source, changed())
    attention, big = small.visual.blocks[0].attn, source.visual.blocks[0].attn
    x = torch.randn(2, 5, 128)
    x[..., 64:] = 0
    heads = {}
    for name, module in (("small", attention), ("big", big)):
        module.out_proj.register_forward_pre_hook(lambda _, inputs, name=name: heads.setdefault(name, inputs[0]))
    attention(x[..., :64], is_causal=False), big(x, is_causal=False)
    assert torch.allclose(heads["small"], heads["big"][..., :64], atol=1e-6)


def test_the_same_sizes_give_the_same_weights_and_another_depth_whole_blocks():
    source = make_model()
    weights = source.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in inherit(source, source.config).state_dict().items())

    values = source.config.to_dict()
    values["vision_cfg"]["layers"], values["text_cfg"]["layers"] = 2, 1
    shallow = inherit(source, MiniClipConfig.from_dict(values), layers_image=[0, 2], layers_text=[1])
    kept = {"visual": [0, 2], "text": [1]}
    for name, tensor in shallow.state_dict().items():
        tower, *path = name.split(".")
        if path and path[0] == "blocks":
            path[1] = str(kept[tower][int(path[1])])
        assert torch.equal(tensor, weights[".".join([tower, *path])]), name
    shallow.visual.proj.weight.data.zero_()
    assert source.visual.proj.weight.abs().max() > 0, "it has numbers of its own"


@pytest.mark.parametrize("layers, wanted, expected", [
    (12, 6, [0, 2, 4, 6, 8, 10]), (12, 12, list(range(12))), (12, 5, [0, 2, 4, 7, 9]), (3, 2, [0, 1]), (3, 1, [0]),
])  # fmt: skip
def test_blocks_are_evenly_spaced(layers, wanted, expected):
    assert spaced(layers, wanted) == expected


def test_positions_are_interpolated_and_pictures_prepared_as_for_the_source():
    source = make_model(preprocess_cfg={"mean": [0.5, 0.5, 0.5], "interpolation": "bilinear"})
    values = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": 96}}
    values["text_cfg"] = {**SMALL["text_cfg"], "context_length": 32}
    small = inherit(source, MiniClipConfig.from_dict(values))
    assert (small.config.preprocess_cfg.size, small.config.preprocess_cfg.mean) == (96, (0.5, 0.5, 0.5))
    assert small.config.preprocess_cfg.interpolation == "bilinear" and source.config.preprocess_cfg.size == 64
    grid = resize_positions(source.visual.positional_embedding.data, 37, is_grid=True)
    line = resize_positions(source.text.positional_embedding.data, 32, is_grid=False)
    assert torch.equal(small.visual.positional_embedding, grid[:, :64])
    assert torch.equal(small.text.positional_embedding, line[:, :96])


@pytest.mark.parametrize("config, problem", [
    (changed("vision_cfg", width=256), "image tower's width is 256, the source's only 128"),
    (changed("text_cfg", layers=4), "text tower has 4 layers, the source's only 3"),
    (changed("vision_cfg", mlp_ratio=9.0), "image tower's MLP width is 576, the source's only 512"),
    (changed("vision_cfg", patch_size=32), "patch_size is 32, the source's 16"),
    (changed("vision_cfg", head_width=64), "image tower's head_width is 64, the source's 32"),
    (changed("text_cfg", heads=6), "text tower's head_width is 16, the source's 32"),
    (changed("text_cfg", vocab_size=100), "vocab_size is 100, the source's 49408"),
    (changed(embed_dim=65), "embed_dim is 65, the source's only 64"),
    (changed(quick_gelu=True), "activation is QuickGELU, the source's GELU"),
])  # fmt: skip
def test_slices_that_do_not_exist_are_refused(config, problem):
    with pytest.raises(InputError, match=problem):
        inherit(make_model(), config)


VIT = {"image_size": 32, "layers": 4, "width": 32, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 4}
POOL = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4}
COCA = {"embed_dim": 32, "vision_cfg": VIT | POOL, "text_cfg": TEXT | {"embed_cls": True}, "multimodal_cfg": TEXT}
SIGLIP = {
    "embed_dim": 32, "init_logit_bias": -10.0, "vision_cfg": VIT | {"pool_type": "map"},
    "text_cfg": TEXT | {"pool_type": "last", "no_causal_mask": True, "proj_bias": True},
}  # fmt: skip


def cut(values: dict, **changes) -> MiniClipConfig:
    """A config with other values in its sections, or beside them."""
    new = {name: values[name] | more if isinstance(more, dict) else more for name, more in changes.items()}
    return MiniClipConfig.from_dict(values | new)


@pytest.mark.parametrize("source, config", [
    (COCA, cut(COCA, embed_dim=16, vision_cfg={"width": 24, "attn_pooler_heads": 2}, text_cfg={"width": 16, "heads": 2},
               multimodal_cfg={"width": 16, "heads": 2, "layers": 2})),
    (cut(COCA, vision_cfg={"width": 40}).to_dict(), cut(COCA, vision_cfg={"attn_pooler_queries": 3})),
    (SIGLIP, cut(SIGLIP, embed_dim=16, vision_cfg={"width": 16, "layers": 2}, text_cfg={"width": 16, "heads": 2})),
], ids=["CoCa", "CoCa, of another width than its embeddings", "SigLIP"])  # fmt: skip
def test_poolers_and_the_decoder_are_cut_too(source, config, tmp_path):
    """Queries, keys and values that lie above one another are cut one by one, however a tensor holds them."""
    torch.manual_seed(0)
    source = MiniClip(MiniClipConfig.from_dict(source))
    small = inherit(source, config)

    def parts(model: MiniClip, attention: str) -> list[torch.Tensor]:
        weights = {name: t for name, t in model.state_dict().items() if name.startswith(attention) and t.ndim == 2}
        return [part for name, t in weights.items() for part in t.split(model.config.embed_dim) if "out" not in name]

    block = {2: 2, 4: 1}[len(small.text_decoder.blocks)] if isinstance(config, CocaConfig) else None
    for ours, theirs in (
        ("visual.attn_pool.attn.",) * 2, ("visual.attn_pool.q.",) * 2, ("visual.attn_pool.kv.",) * 2,
        ("text_decoder.cross_attn.1.attn.", f"text_decoder.cross_attn.{block}.attn."),
    ):  # fmt: skip
        for slice_, whole in zip(parts(small, ours), parts(source, theirs), strict=True):
            assert torch.equal(slice_, whole[tuple(map(slice, slice_.shape))]), ours
    small.save_pretrained(tmp_path / "small")
    model, preprocess, tokenizer = miniclip.load(tmp_path / "small")
    pixels, ids = torch.randn(2, 3, 32, 32), tokenizer(["a dog", "a cat"])
    assert model(pixels, ids).image_embeds.shape == (2, config.embed_dim)
    if isinstance(config, CocaConfig):
        assert model.generate(pixels, seq_len=7).shape[0] == 2
    whole = inherit(source, source.config)
    torch.testing.assert_close(whole.state_dict(), source.state_dict(), atol=0, rtol=0)


CLIP = {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT}
LAST = CLIP | {"text_cfg": TEXT | {"pool_type": "last"}}
TIMM = CLIP | {"vision_cfg": {"timm_model_name": "convnext_atto"}}


@pytest.mark.parametrize("source, config, problem", [
    (COCA, cut(COCA, embed_dim=16, text_cfg={"width": 16, "heads": 2}, multimodal_cfg={"width": 16, "heads": 2}),
     "the image tower's pooler's head width is 4, the source's 8"),
    (COCA, cut(COCA, multimodal_cfg={"heads": 8}), "the decoder's head_width is 4, the source's 8"),
    (COCA, cut(COCA, multimodal_cfg={"layers": 6}), "the decoder has 6 layers, the source's only 4"),
    (COCA, cut(COCA, vision_cfg={"attn_pooler_queries": 6}), r"pool.query is \(6, 32\), the source has .*\(5, 32\)"),
    (CLIP, cut(COCA), "the image tower, CocaVisionConfig, cannot inherit from VisionConfig"),
    (SIGLIP, cut(CLIP), "the image tower, VisionConfig, cannot inherit from SigLipVisionConfig"),
    (SIGLIP, cut(SIGLIP, text_cfg={"no_causal_mask": False}), "tower's no_causal_mask is False, the source's True"),
    (LAST, cut(CLIP), "the text tower's pool_type is argmax, the source's last"),
    (CLIP, cut(TIMM), "the image tower, TimmVisionConfig, cannot inherit from VisionConfig: docs/finetuning.md says"),
])  # fmt: skip
def test_towers_of_another_kind_are_refused_by_name(source, config, problem):
    with pytest.raises(InputError, match=problem):
        inherit(MiniClip(MiniClipConfig.from_dict(source)), config)


@pytest.mark.parametrize("layers", [[0], [0, 3], [-1, 0]])
def test_blocks_that_do_not_exist_are_refused(layers):
    with pytest.raises(InputError, match="layers_image .* are no 2 of the source's 0 to 2"):
        inherit(make_model(), MiniClipConfig.from_dict(SMALL), layers_image=layers)


def train(model: MiniClip, pixel_values, input_ids, steps: int) -> float:
    """The loss of the last of some steps on one batch."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = clip_loss(*model(pixel_values, input_ids)[:3])
        loss.backward()
        optimizer.step()
    return loss.item()


def test_what_is_inherited_is_a_better_start_than_random_numbers(caption_set):
    """A model that has learned the coloured sheets hands it down: its heir learns them in fewer steps."""
    records = miniclip.read_captions(caption_set / "captions.json")[:12]
    torch.manual_seed(0)
    source = MiniClip(make_model().config)
    preprocess, tokenizer = miniclip.Preprocess(source.config.preprocess_cfg), miniclip.Tokenizer(24)
    pixel_values = torch.stack([preprocess.load(record["image"]) for record in records])
    first, second = (tokenizer([record["caption"][n] for record in records], trim=True) for n in (0, 1))
    assert train(source, pixel_values, first, 25) < 0.8
    config = MiniClipConfig.from_dict(SMALL)
    inherited = train(inherit(source, config), pixel_values, second, 8)
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        losses.append(train(MiniClip(config), pixel_values, second, 8))
    assert inherited < min(losses) and inherited < 0.6 * sum(losses) / 2


def test_the_command_writes_a_folder_to_load(caption_set, tiny_model, capsys):
    tiny_model.save_pretrained(caption_set / "large")
    values = tiny_model.config.to_dict()
    values["vision_cfg"] |= {"width": 16, "layers": 1}
    (caption_set / "small.json").write_text(json.dumps(values))
    argv = ["--from", caption_set / "large", "--to", caption_set / "small.json", "--output_dir", caption_set / "small"]
    argv = [str(word) for word in (*argv, "--layers_image", "1")]
    main(argv)
    said = capsys.readouterr().out
    assert "image tower: 16 of 32 channels, blocks 1 of 2" in said
    assert "text tower: 32 of 32 channels, blocks 0, 1 of 2" in said
    kept, ours = weights(caption_set / "large"), weights(caption_set / "small")
    assert torch.equal(ours["visual.blocks.0.ln_1.weight"], kept["visual.blocks.1.ln_1.weight"][:16])
    with pytest.raises(InputError, match="already holds a model"):
        main(argv)
    with pytest.raises(InputError, match="add --pretrained"):
        main([*argv, "--from", "ViT-B-32"])
    model, _, tokenizer = miniclip.load(caption_set / "small")
    assert model.encode_text(tokenizer(["a red sheet"])).shape == (1, 16)


@pytest.mark.slow
def test_the_command_and_then_train(caption_set, tiny_model, run_script):
    tiny_model.save_pretrained(caption_set / "large")
    values = tiny_model.config.to_dict()
    values["text_cfg"] |= {"layers": 1}
    (caption_set / "small.json").write_text(json.dumps(values))
    run_script(
        "-m", "miniclip", "inherit", "--from", caption_set / "large", "--to", caption_set / "small.json",
        "--output_dir", caption_set / "small",
    )  # fmt: skip
    run_script(
        "train.py", "--model", caption_set / "small", "--train_file", caption_set / "captions.json",
        "--output_dir", caption_set / "run", "--max_steps", "2", "--per_device_train_batch_size", "12", "--use_cpu",
    )  # fmt: skip
    start, trained = weights(caption_set / "small"), weights(caption_set / "run")
    assert 0 < max((trained[name] - tensor).abs().max() for name, tensor in start.items()) < 0.01
