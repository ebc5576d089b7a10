"""GradCache: large batches in chunks, the gradients of one step and whole runs."""

import json

import pytest
import torch

import miniclip
from miniclip.loss import clip_loss
from miniclip.training import grad_cache
from miniclip.training.grad_cache import wrap_towers
from tests.inference.test_fast import make_batch, make_model
from tests.survival_trainer import make_trainer
from tests.towers.test_hf_towers import save_config, save_text_encoder
from tests.training.test_training import largest_difference, recipe, weights  # noqa: F401


def step(model, chunk_size: int, dtype=None, fast=False, **inputs) -> tuple[float, list[torch.Tensor]]:
    """The loss of a batch and its gradients, with the random numbers that follow seed 3."""
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        outputs = wrap_towers(model, None, chunk_size, fast)(**inputs)
    loss = clip_loss(*outputs[:3])
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("chunk_size", [1, 3, 7])
@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_chunks_give_the_gradients_of_the_whole_batch(chunk_size, patch_dropout):
    model, (pixel_values, input_ids) = make_model().train(), make_batch()
    model.visual.patch_dropout = patch_dropout
    batch = {"pixel_values": pixel_values, "input_ids": input_ids, "fast": True}
    # chunks draw the same uniform numbers, one after another, as the whole batch
    loss, direct = step(model, 0, **batch)
    ours, cached = step(model, chunk_size, **batch)
    assert ours == pytest.approx(loss, abs=1e-5)
    for (name, _), a, b in zip(model.named_parameters(), direct, cached):
        assert torch.allclose(a, b, atol=1e-5), name
    assert patch_dropout == 0 or step(model, 0, **batch)[0] == loss


def test_chunks_in_bf16():
    """Each chunk's gradient is rounded to bf16 before it is added: close to the direct gradients, and no further than
    they are from those in fp32."""
    model, (pixel_values, input_ids) = make_model().train(), make_batch()
    batch = {"pixel_values": pixel_values, "input_ids": input_ids}
    exact, (_, direct), (_, cached) = (
        step(model, 0, **batch)[1], step(model, 0, torch.bfloat16, **batch), step(model, 3, torch.bfloat16, **batch)
    )  # fmt: skip
    exact, direct, cached = (torch.cat([g.flatten() for g in grads]) for grads in (exact, direct, cached))
    assert (cached - exact).norm() < 1.1 * (direct - exact).norm()
    assert torch.nn.functional.cosine_similarity(direct, cached, dim=0) > 0.9999
    assert (cached - direct).abs().mean() < 1e-5


def test_the_backward_pass_keeps_one_chunk():
    model, (pixel_values, input_ids) = make_model().train(), make_batch()
    kept = {}
    for chunk_size in (0, 1):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.nbytes) or t, lambda t: t):
            wrap_towers(model, None, chunk_size, fast=False)(pixel_values, input_ids)
        kept[chunk_size] = sum(sizes)
    assert kept[1] < kept[0] / 20


@pytest.mark.parametrize("fast", [False, True])
def test_each_tower_starts_its_backward_pass_in_memory_without_gaps(fast, monkeypatch):
    """Before the backward pass computes a tower's first chunk again, which is its last, freed memory goes back to the
    system: the chunks of the tower before it have left gaps that these would not fit. Not before each chunk."""
    model, (pixel_values, input_ids) = make_model().train(), make_batch()
    events = []
    monkeypatch.setattr(grad_cache, "return_freed_memory", lambda: events.append("freed"))
    for name, tower in (("image", model.visual), ("text", model.text)):
        tower.blocks[0].ln_1.register_forward_hook(lambda *_, name=name: events.append(name))
    outputs = wrap_towers(model, None, 2, fast)(pixel_values, input_ids)
    forward, chunks = len(events), -(-len(pixel_values) // 2)
    clip_loss(*outputs[:3]).backward()
    backward = events[forward:]
    assert backward.count("freed") == 2
    if not fast:  # whose blocks are not called as modules
        assert backward in (
            ["freed", *["text"] * chunks, "freed", *["image"] * chunks],
            ["freed", *["image"] * chunks, "freed", *["text"] * chunks],
        )


def test_uint8_pixels_are_normalised_by_the_model():
    model = make_model()
    preprocess = miniclip.Preprocess(model.config.preprocess_cfg)
    levels = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    expected = model.encode_image(preprocess.normalize(levels), normalize=True)
    for chunk_size in (0, 2):
        ours = wrap_towers(model, preprocess.normalize, chunk_size)(pixel_values=levels)
        assert torch.allclose(ours.image_embeds, expected, atol=1e-6) and ours.text_embeds is None


def test_a_run_in_chunks_ends_at_the_same_weights(recipe, caption_set, run_script):  # noqa: F811
    steps = ["--max_steps", "4", "--adam_epsilon", "1e-3"]  # Adam's first steps make 1 of the smallest difference
    run_script("train.py", recipe, *steps, "--output_dir", caption_set / "whole")
    run_script("train.py", recipe, *steps, "--output_dir", caption_set / "chunks", "--grad_cache_chunk_size", "5")
    assert largest_difference(caption_set / "whole", caption_set / "chunks") < 1e-5


def test_pixels_are_normalised_within_a_compiled_graph_in_chunks(tmp_path):
    """Moments are on the device before: no graph in chunks may fill a cache."""
    how = {"torch_compile": True, "torch_compile_backend": "eager", "grad_cache_chunk_size": 2}
    trainer = make_trainer(tmp_path, steps=1, **how)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    trainer.train()
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert not [reason for reason in breaks if "side effect" in reason]


def test_accumulation_warns_that_it_adds_no_negatives(tmp_path, caplog):
    make_trainer(tmp_path, batch=2, gradient_accumulation_steps=4)
    assert "adds no negatives" in caplog.text
    assert "_batch_size 8 does, and takes as little memory with --grad_cache_chunk_size 2" in caplog.text
    make_trainer(tmp_path, batch=4, gradient_accumulation_steps=2, grad_cache_chunk_size=1)
    assert "with --grad_cache_chunk_size 1" in caplog.text, "and not with more"


@pytest.mark.parametrize("frozen", [True, False])
def test_chunks_are_not_advised_where_they_are_refused(frozen, recipe, caption_set, run_script):  # noqa: F811
    """Between frozen towers, and where BatchNorms learn."""
    if not frozen:
        tiny = json.loads((caption_set / "tiny.json").read_text())
        tiny["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
        (caption_set / "tiny.json").write_text(json.dumps(tiny))
    steps = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    towers = "--freeze_image tower --freeze_text tower --hflip 0 --color_jitter 0".split() * frozen
    done = run_script("train.py", recipe, *steps, *towers, processes=2)
    assert done.stderr.count("adds no negatives. --per_device_train_batch_size 8 does\n") == 1, "nor by each process"
    checked = run_script("train.py", recipe, *steps, *towers, "--check_gradients")
    assert "(--per_device_train_batch_size 8 has them)" in checked.stdout


@pytest.mark.parametrize("joint", [False, True])
def test_captions_of_similar_length_go_through_an_encoder_together(joint, tmp_path):
    for number, kind in enumerate(("bert", "mpnet")):
        save_text_encoder(tmp_path / kind, kind, pad=number)
    one = {"hf_model_name": str(tmp_path / "mpnet"), "hf_pooler_type": "mean", "context_length": 20}
    both = {"towers": [one, one | {"hf_model_name": str(tmp_path / "bert")}], "context_length": 20}
    model, _, tokenizer = miniclip.load(save_config(tmp_path / "model.json", text=both if joint else one))
    words = [" ".join(["dog", "red", "a"][i % 3] for i in range(1 + n * 7 % 17)) for n in range(75)]
    ids, seen = tokenizer(words, trim=True), []
    assert len(set(tokenizer.lengths(ids).tolist())) == 17
    model.double().train().text.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its random numbers come in another order
    for part in model.text.towers if joint else [model.text]:
        part.trunk.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
    found = {}
    for fast in (False, True):
        model.zero_grad()
        embeds = wrap_towers(model, None, 0, fast).encode_text(ids)
        (embeds * torch.arange(embeds.numel()).view_as(embeds).sin()).sum().backward()
        found[fast] = {name: p.grad.clone() for name, p in model.text.named_parameters() if p.grad is not None}
        found[fast]["embeds"] = embeds.detach()
    each = 1 + joint
    assert len(seen) == each * (1 + 3) and sum(seen[each:]) < 0.8 * sum(seen[:each])
    assert found[True].keys() == found[False].keys()
    for name, tensor in found[False].items():
        assert torch.allclose(found[True][name], tensor, atol=1e-9), name
