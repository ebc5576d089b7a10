import math

import pytest
import torch
from safetensors.torch import load_file

from miniclip.config import MiniClipConfig
from miniclip.model import MiniClip
from miniclip.utils.errors import CheckpointError


def batch(n=3, length=10, size=32):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 49405, (n, length), generator=g)
    ids[:, 0] = 49406
    for row in range(n):
        ids[row, 4 + row] = 49407
        ids[row, 5 + row :] = 0
    return torch.randn(n, 3, size, size, generator=g), ids


def test_forward_gives_unit_vectors_and_the_scale(tiny_model):
    pixel_values, input_ids = batch()
    out = tiny_model(pixel_values, input_ids)
    assert out.image_embeds.shape == out.text_embeds.shape == (3, 16)
    assert torch.allclose(out.image_embeds.norm(dim=1), torch.ones(3), atol=1e-6)
    assert out.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert torch.equal(out.image_embeds, tiny_model.encode_image(pixel_values, normalize=True))
    raw = tiny_model.encode_text(input_ids)
    assert not torch.allclose(raw.norm(dim=1), torch.ones(3), atol=1e-2)
    assert torch.allclose(raw / raw.norm(dim=1, keepdim=True), out.text_embeds, atol=1e-6)


def test_one_modality_alone(tiny_model):
    pixel_values, input_ids = batch()
    assert tiny_model(pixel_values=pixel_values).text_embeds is None
    assert tiny_model(input_ids=input_ids).image_embeds is None


def test_get_logits_is_scale_times_cosine(tiny_model):
    pixel_values, input_ids = batch()
    per_image, per_text = tiny_model.get_logits(pixel_values[:2], input_ids)
    cosine = torch.nn.functional.cosine_similarity(
        tiny_model.encode_image(pixel_values[:2])[:, None], tiny_model.encode_text(input_ids)[None], dim=-1
    )
    assert per_image.shape == (2, 3) and torch.equal(per_text, per_image.T)
    assert torch.allclose(per_image, cosine / 0.07, atol=1e-4)


def test_text_does_not_depend_on_padding_or_on_what_follows_the_end(tiny_model):
    _, input_ids = batch()
    whole = tiny_model.encode_text(torch.nn.functional.pad(input_ids, (0, 6)))
    trimmed = tiny_model.encode_text(input_ids[:, :7])
    assert torch.allclose(whole, trimmed, atol=1e-5)
    after = input_ids.clone()
    after[0, 5:] = 1234
    assert torch.allclose(tiny_model.encode_text(after)[0], whole[0], atol=1e-5)


def test_images_attend_in_both_directions(tiny_model):
    pixel_values, _ = batch()
    changed = pixel_values.clone()
    changed[:, :, -1, -1] += 5  # the last patch; the embedding is read at the class token, which comes first
    assert not torch.allclose(tiny_model.encode_image(pixel_values), tiny_model.encode_image(changed), atol=1e-3)


def test_activation_comes_from_the_config(tiny_config):
    pixel_values, _ = batch()
    values = tiny_config.to_dict()
    plain = MiniClip(tiny_config).eval()
    quick = MiniClip(MiniClipConfig.from_dict({**values, "quick_gelu": True})).eval()
    quick.load_state_dict(plain.state_dict())
    difference = (plain.encode_image(pixel_values) - quick.encode_image(pixel_values)).abs().max()
    assert 1e-4 < difference < 1


def test_patch_dropout_only_in_training(tiny_config):
    tiny_config.vision_cfg.patch_dropout = 0.5
    model = MiniClip(tiny_config).eval()
    pixel_values, _ = batch()
    assert torch.equal(model.encode_image(pixel_values), model.encode_image(pixel_values))
    seen = []
    model.visual.ln_pre.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    model.train()
    first, second = model.encode_image(pixel_values), model.encode_image(pixel_values)
    assert seen == [3, 3] and not torch.equal(first, second)  # the class token and two of the four patches


def test_save_and_load_are_bit_equal_and_strict(tiny_model, tmp_path):
    with torch.no_grad():
        for p in tiny_model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    tiny_model.config.quick_gelu = True
    tiny_model.config.preprocess_cfg.resize_mode = "squash"
    tiny_model.save_pretrained(tmp_path)
    again = MiniClip.from_pretrained(tmp_path)
    assert again.config == tiny_model.config and not again.training
    for (name, a), (_, b) in zip(tiny_model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name

    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual.proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "manifest.json").unlink()  # which would say that the file has changed
    with pytest.raises(CheckpointError, match='the weights do not fit the config. Missing.* "visual.proj.weight'):
        MiniClip.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_kept_in_the_file_and_loaded_as_float32(dtype, tiny_model, tmp_path):
    tiny_model.to(dtype).save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    again = MiniClip.from_pretrained(tmp_path)
    assert all(torch.equal(a.float(), b) for a, b in zip(tiny_model.parameters(), again.parameters()))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in again.parameters())


def test_inputs_of_another_size_say_so(tiny_model):
    pixel_values, input_ids = batch(length=17)
    with pytest.raises(ValueError, match=r"images are \(3, 3, 64, 64\), not \(B, 3, 32, 32\)"):
        tiny_model.encode_image(torch.zeros(3, 3, 64, 64))
    with pytest.raises(ValueError, match="17 tokens; the context is 16"):
        tiny_model.encode_text(input_ids)


def test_initial_weights_have_the_stated_deviations():
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_dict({
        "embed_dim": 256, "vision_cfg": {"image_size": 64, "layers": 4, "width": 256, "patch_size": 16},
        "text_cfg": {"layers": 4, "width": 256, "heads": 4},
    }))  # fmt: skip
    for tower in (model.visual, model.text):
        block = tower.blocks[0]
        assert block.attn.in_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
        assert block.attn.out_proj.weight.std().item() == pytest.approx(256**-0.5 * 8**-0.5, rel=0.02)
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
        assert block.mlp.c_proj.weight.std().item() == pytest.approx(256**-0.5 * 8**-0.5, rel=0.02)
    assert math.exp(model.logit_scale.item()) == pytest.approx(1 / 0.07, rel=1e-5)
