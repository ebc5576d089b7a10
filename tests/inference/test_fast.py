"""The fast ways give what the plain ones give."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import miniclip
from miniclip.config import MiniClipConfig
from miniclip.inference import fast, matmul
from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.inference.matmul import Int8Linear, OneDnnLinear, cpu_routes, fast_arithmetic
from miniclip.loss import clip_loss
from miniclip.model import MiniClip
from miniclip.training.grad_cache import wrap_towers
from miniclip.utils.errors import InputError

SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}


def make_model(**changes) -> MiniClip:
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_dict(SMALL | changes)).eval()
    for name, p in model.named_parameters():  # zeros hide mistakes
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    return model


def make_batch(n: int = 7, image_size: int = 64):
    torch.manual_seed(1)
    lengths = [24, 3, 11, 2, 24, 7, 16][:n]
    input_ids = torch.zeros(n, 24, dtype=torch.long)
    for row, length in zip(input_ids, lengths):
        row[:length] = torch.randint(0, 40000, (length,))
        row[0], row[length - 1] = 49406, 49407
    return torch.randn(n, 3, image_size, image_size), input_ids


def lowest_cosine(ours: MiniClip, model: MiniClip, pixel_values, input_ids) -> float:
    """Between the embeddings of two models."""
    with torch.inference_mode():
        images = ours.encode_image(pixel_values, True) * model.encode_image(pixel_values, True)
        texts = ours.encode_text(input_ids, True) * model.encode_text(input_ids, True)
    return min(images.sum(dim=1).min().item(), texts.sum(dim=1).min().item())


def gradients(model: MiniClip, pixel_values, input_ids) -> list[torch.Tensor]:
    model.zero_grad()
    clip_loss(*model(pixel_values, input_ids)[:3]).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sped_up_model_has_the_outputs_and_gradients_of_the_plain_one(quick_gelu, checkpointing):
    model, (pixel_values, input_ids) = make_model(quick_gelu=quick_gelu), make_batch()
    expected, outputs = gradients(model, pixel_values, input_ids), model(pixel_values, input_ids)
    if checkpointing:
        model.gradient_checkpointing_enable()
    wrap_towers(model)
    ours = model(pixel_values, input_ids)
    assert torch.allclose(ours.image_embeds, outputs.image_embeds, atol=1e-6)
    assert torch.allclose(ours.text_embeds, outputs.text_embeds, atol=1e-6)
    for (name, _), a, b in zip(model.named_parameters(), expected, gradients(model, pixel_values, input_ids)):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4), name
    with fast_arithmetic("cpu"):
        assert torch.allclose(model(pixel_values, input_ids).text_embeds, outputs.text_embeds, atol=1e-5)
    assert torch.get_float32_matmul_precision() == "highest"


def test_less_is_computed(monkeypatch):
    """Most padding does not reach the blocks, and of the last block's MLP only one row a sequence is computed."""
    model, (pixel_values, input_ids) = wrap_towers(make_model()), make_batch()
    rows, layers = {}, {}
    for kind, tower in (("image", model.visual), ("text", model.text)):
        layers |= {block.mlp.c_fc.weight: (kind, number) for number, block in enumerate(tower.blocks)}

    def linear(x, weight, bias=None, multiply=F.linear):  # a hook would turn the fast path off
        rows[layers.get(weight)] = x.shape[:-1].numel()
        return multiply(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    model(pixel_values, input_ids)
    captions = 24 + 3 + 11 + 2 + 24 + 7 + 16
    assert captions == 87 and 7 * 24 == 168
    assert [rows["text", i] for i in range(3)] == [128, 128, 7]  # a multiple of 64
    assert [rows["image", i] for i in range(3)] == [7 * 17, 7 * 17, 7]


@pytest.mark.parametrize(
    "captions, positions, rows", [([1], 3, 3), ([1, 2], 11, 16), ([3, 1], 3, 6), (range(1, 7), 24, 64)]
)
def test_padded_captions_take_no_longer_than_trimmed_ones(captions, positions, rows, monkeypatch):
    """Whoever pads to the context, as OpenCLIP's tokenizer does: attention sees the longest caption of the batch, and
    the products its tokens, few of them rounded up to a multiple of 8. In the batch [3, 1] there is nothing to leave
    out that would pay for it."""
    model, input_ids = make_model(), make_batch()[1][list(captions)]
    seen, attention = [], fast._attention

    def attend(q, k, v, **how):
        seen.append(k.shape[2])
        return attention(q, k, v, **how)

    def multiply(layer, x, **how):
        seen.append(-len(x))
        return linear(layer, x, **how)

    linear = fast._linear
    monkeypatch.setattr(fast, "_attention", attend)
    monkeypatch.setattr(fast, "_linear", multiply)
    found = inference_copy(model).encode_text(input_ids)
    assert seen[:2] == [-rows, positions]
    torch.testing.assert_close(found, model.encode_text(input_ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("inference", [False, True])
def test_captions_beyond_the_context_are_refused(inference):
    model, input_ids = make_model(), F.pad(make_batch()[1], (1, 0), value=5)
    with pytest.raises(InputError, match="25 tokens; the context is 24"):
        (inference_copy(model) if inference else wrap_towers(model)).encode_text(input_ids)


@pytest.mark.parametrize("precision, least", [("fp32", 0.999999), ("bf16", 0.999), ("int8", 0.998)])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_each_precision_is_as_close_as_it_should_be(precision, least, quick_gelu):
    model, (pixel_values, input_ids) = make_model(quick_gelu=quick_gelu), make_batch()
    model.visual.patch_dropout = 0.5
    model.train()  # whatever the mode of the original
    ours = inference_copy(model, precision)
    model.eval()
    assert isinstance(ours, MiniClip) and not ours.training and ours.precision == precision
    assert lowest_cosine(ours, model, pixel_values, input_ids) >= least
    image = ours.encode_image(pixel_values, normalize=True)
    assert image.dtype == torch.float32 and torch.allclose(image.norm(dim=1), torch.ones(7), atol=1e-6)
    exact = model.get_logits(pixel_values, input_ids)[0]
    assert (ours.get_logits(pixel_values, input_ids)[0] - exact).abs().max() < 14.3 * (1 - least) ** 0.5 * 2
    with torch.autocast("cpu", torch.bfloat16):  # what is set around it does not reach it
        assert torch.equal(ours.encode_text(input_ids), ours.encode_text(input_ids).float())
        assert torch.equal(image, ours.encode_image(pixel_values, normalize=True))
    exact = model.encode_image(pixel_values)
    difference = {p: (inference_copy(model, p).encode_image(pixel_values) - exact).abs().max()
                  for p in ("fp32", precision)}  # fmt: skip
    assert precision == "fp32" or difference["fp32"] * 10 < difference[precision]  # the option does something


def test_an_inference_copy_is_for_inference(tmp_path):
    model, (pixel_values, _) = make_model(), make_batch()
    ours = inference_copy(model)
    before = ours.encode_image(pixel_values)
    nn.init.normal_(model.visual.proj.weight)
    packed = any(isinstance(module, OneDnnLinear) for module in ours.modules())
    assert torch.equal(before, ours.encode_image(pixel_values)) == packed
    for attempt in (ours.train, lambda: ours.save_pretrained(tmp_path), lambda: inference_copy(model, "fp8")):
        with pytest.raises(InputError):
            attempt()
    assert ours.eval() is ours and model.requires_grad_(True).visual.proj.weight.requires_grad
    with pytest.raises(InputError, match="int8 is for the CPU"):
        inference_copy(model.to("meta"), "int8")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_an_inference_copy_can_be_copied_and_takes_an_empty_batch(precision):
    model, (pixel_values, input_ids) = make_model(), make_batch()
    ours = inference_copy(model, precision)
    image, text = ours.encode_image(pixel_values), ours.encode_text(input_ids)
    again = copy.deepcopy(ours)
    again.visual.blocks[0].attn.in_proj.register_forward_hook(lambda *_: pytest.fail("that of the copy"))
    assert torch.equal(ours.encode_image(pixel_values), image)
    assert torch.equal(again.encode_text(input_ids), text)
    assert ours.encode_image(pixel_values[:0]).shape == ours.encode_text(input_ids[:0]).shape == (0, image.shape[1])
    assert Int8Linear(nn.Linear(32, 8))(torch.zeros(2, 0, 32)).shape == (2, 0, 8)


def test_int8_computes_in_bf16_only_where_the_processor_does(monkeypatch):
    """oneDNN takes bf16 on others too, but converts it to fp32 and back for each product: slower than fp32 as it is."""
    for able in (True, False):
        monkeypatch.setattr(fast, "packs", lambda precision: True)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        ours = inference_copy(make_model(), "int8")
        assert ours.dtype == ours.visual.ln_post.weight.dtype == (torch.bfloat16 if able else torch.float32)


def test_load_with_a_precision(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    ours, preprocess, tokenizer = miniclip.load(tmp_path, precision="fp32")
    assert isinstance(ours, InferenceClip)
    texts = ["a dog", "two small cats on a mat"] * 40
    same = miniclip.embed_texts(ours, tokenizer, texts)
    assert np.allclose(same, miniclip.embed_texts(model, tokenizer, texts), atol=1e-6)
    assert np.allclose(same[:2], F.normalize(model.encode_text(tokenizer(texts[:2])), dim=-1).detach(), atol=1e-6)


def test_how_to_multiply_is_decided_once(monkeypatch, tmp_path):
    """A busy moment may find otherwise: what the first process found is kept, and read by the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_routes.cache_clear()
    try:
        first = cpu_routes()
        (kept,) = (tmp_path / "miniclip").iterdir()
        cpu_routes.cache_clear()
        assert cpu_routes() == first
        text = kept.read_text()
        for damaged in (text[: len(text) // 2], text.replace('"routes"', '"roads"'), "[]"):
            kept.write_text(damaged)
            cpu_routes.cache_clear()
            assert cpu_routes().keys() == first.keys(), "it is measured again"
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
        cpu_routes.cache_clear()
        assert cpu_routes().keys() == first.keys()
    finally:
        cpu_routes.cache_clear()


def test_the_self_check_refuses_what_is_not_exact(monkeypatch, tmp_path):
    """A processor that rounds to bf16 is played by a layer that does so."""
    routes = cpu_routes()
    assert set(routes) <= {"default", "medium", "packed", "bf16"} and not routes["default"].used
    assert all(0 < route.error < 1e-5 for route in routes.values() if route.used or route.speedup == 1)

    class Rounding(OneDnnLinear):
        def forward(self, x, activation=None, residual=None):
            return super().forward(x.bfloat16().to(x.dtype), activation, residual)

    monkeypatch.setattr(matmul, "OneDnnLinear", Rounding)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where nobody has measured yet
    cpu_routes.cache_clear()
    try:
        packed = cpu_routes()["packed"]
        assert packed.error > 100 * cpu_routes()["default"].error and not packed.used
        layers = {type(layer) for layer in inference_copy(make_model()).modules()}
        assert Rounding not in layers and nn.Linear in layers
        monkeypatch.setattr(matmul, "cpu_routes", lambda: {"default": routes["default"]})
        with fast_arithmetic("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        cpu_routes.cache_clear()


def test_copies_of_a_sped_up_model_stand_alone():
    model, (pixel_values, _) = wrap_towers(make_model()), make_batch()
    twin = copy.deepcopy(model)
    before = model.encode_image(pixel_values)
    nn.init.normal_(twin.visual.proj.weight)
    assert torch.equal(before, model.encode_image(pixel_values))
    assert not torch.equal(before, twin.encode_image(pixel_values))


def test_weights_are_laid_out_when_they_are_first_used(monkeypatch):
    """A query in words starts sooner without the image tower's; two threads may be the first at once."""
    monkeypatch.setattr(fast, "packs", lambda precision: True)
    ours, (_, input_ids) = inference_copy(make_model()), make_batch()

    def laid_out(tower) -> set[bool]:
        return {layer.weight.is_mkldnn for layer in tower.modules() if isinstance(layer, OneDnnLinear)}

    assert laid_out(ours.text) == laid_out(ours.visual) == {False}
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ours.encode_text, [input_ids] * 2)
    assert torch.equal(first, second) and laid_out(ours.text) == {True} and laid_out(ours.visual) == {False}


@pytest.mark.parametrize("fast", [True, False])
def test_torch_compile_compiles_the_fast_path(fast):
    """Before torch 2.13 it took compiling for exporting, and so compiled the plain code."""
    model, batch = wrap_towers(make_model(), fast=fast), make_batch()
    calls = []

    def note(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compiler.reset()
    ours, plain = torch.compile(model, backend=note)(*batch), model(*batch)
    assert any("conv" in call for call in calls) != fast, "the fast path cuts patches out and multiplies"
    torch.testing.assert_close(ours[:2], plain[:2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype, at_most", [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("queries, is_causal", [(11, False), (11, True), (1, False)])
def test_attention_written_out(dtype, at_most, queries, is_causal, monkeypatch):
    """Outputs and gradients are those of torch's attention in fp32, to `at_most` of the largest number."""
    monkeypatch.setattr(matmul, "rounds", lambda device: True)  # without rounding, where the processor could
    torch.manual_seed(0)
    parts = [torch.randn(9, length, 3, 16).transpose(1, 2).mul(1.5).to(dtype) for length in (queries, 11, 11)]
    found = []
    for attend, kind in ((F.scaled_dot_product_attention, torch.float32), (fast._attention, dtype)):
        qkv = [part.to(kind).requires_grad_() for part in parts]
        attended = attend(*qkv, is_causal=is_causal)
        attended.float().square().sum().backward()
        found.append([attended, *(part.grad for part in qkv)])
    assert "Bmm" in attended.grad_fn.next_functions[0][0].name()  # and not of fused attention
    for expected, close in zip(*found):
        assert (close - expected).abs().max() <= at_most * expected.abs().max()
