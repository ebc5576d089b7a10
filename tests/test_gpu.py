"""What a CUDA device computes: `CUDA_VISIBLE_DEVICES=0 python -m pytest -n 0 tests/test_gpu.py`. The other tests, and
these without that variable, see no GPU."""

import copy
import json
import os

import pytest
import torch
import torch.nn.functional as F

from benchmarks.make_coca_golden import COCA, GOLDEN, IDS, WAYS
from benchmarks.make_towers_golden import MODELS, TEXT, VIT, make_inputs, make_weights
from miniclip.checkpoint import from_miniclip, to_miniclip
from miniclip.config import MiniClipConfig
from miniclip.inference import fast
from miniclip.inference.fast import inference_copy
from miniclip.inference.matmul import full_precision
from miniclip.loss import clip_loss
from miniclip.model import MiniClip
from miniclip.training.convolutions import convolution_wrappers
from miniclip.training.freeze import hold_statistics
from miniclip.training.grad_cache import wrap_towers
from miniclip.utils.errors import InputError
from tests.survival_trainer import make_trainer
from tests.training.test_training import largest_difference, recipe, weights  # noqa: F401

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
PLAIN = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}  # CLIP's own towers, which have a fast path
FAMILIES = {"CLIP": PLAIN, "CoCa": COCA, **MODELS}


def golden_model(cfg: dict) -> MiniClip:
    """With the weights of the golden files, on the CPU."""
    cfg = {name: value for name, value in cfg.items() if name != "custom_text"}
    model = MiniClip(MiniClipConfig.from_dict(cfg)).eval()
    rows = model.visual.key_rows(), model.text.key_rows()
    names = from_miniclip(model.state_dict(), "custom_text", rows)
    model.load_state_dict(to_miniclip(make_weights({n: tuple(t.shape) for n, t in names.items()}), rows)[0])
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    """A model, images and texts."""
    return golden_model(FAMILIES[request.param]), *make_inputs(FAMILIES[request.param])


def step(model, images, input_ids, chunk: int = 0, fast: bool = True, dtype=None, folded: bool = False):
    """Embeddings of a training step and all its gradients, on the CPU. `folded`: BatchNorms in convolutions."""
    model, device = copy.deepcopy(model).train(), images.device
    hold_statistics(model.visual)  # three images' statistics would make much of a little noise
    wrap_towers(model.to(device), None, chunk, fast)
    if folded:
        (wrapper,) = convolution_wrappers(model.visual, model.visual.image_size)
        model.visual.wrappers = (wrapper, *model.visual.wrappers)
    with full_precision(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        out = model(images, input_ids)
        loss = clip_loss(*out[:3]) + sum(t.float().square().mean() for t in out[4:] if isinstance(t, torch.Tensor))
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [t.detach().float().cpu() for t in (*out[:2], *gradients)]


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_a_step_is_that_of_the_cpu(family, fast):
    model, *batch = family
    expected, ours = step(model, *batch, fast=fast), step(model, *(t.to(GPU) for t in batch), fast=fast)
    for a, b in zip(expected, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * max(1.0, a.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_close(family, dtype):
    model, *batch = family
    expected, ours = step(model, *batch), step(model, *(t.to(GPU) for t in batch), dtype=dtype)
    for a, b in zip(expected[:2], ours[:2]):
        assert F.cosine_similarity(a, b).min() > 0.995
    a, b = (torch.cat([t.flatten() for t in found[2:]]) for found in (expected, ours))
    assert F.cosine_similarity(a, b, dim=0) > 0.95


@pytest.mark.parametrize("dtype, stream", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
                                           (None, torch.float32)], ids=str)  # fmt: skip
def test_blocks_add_in_bf16_where_products_are_bf16(dtype, stream, monkeypatch):
    torch.manual_seed(0)
    model, (images, input_ids) = MiniClip(MiniClipConfig.from_dict(PLAIN)), make_inputs(PLAIN)
    batch, block, seen = (images.to(GPU), input_ids.to(GPU)), fast._block, set()

    def noted(*args, **kwargs):
        out = block(*args, **kwargs)
        seen.update((args[1].dtype, out.dtype))
        return out

    monkeypatch.setattr(fast, "_block", noted)
    plain, ours = (step(model, *batch, fast=way, dtype=dtype) for way in (False, True))
    assert seen == {stream}
    model.gradient_checkpointing_enable()
    for a, b, c in zip(plain, ours, step(model, *batch, dtype=dtype), strict=True):
        torch.testing.assert_close(c, b, rtol=1e-3, atol=1e-5)  # its atomic additions have no fixed order
        torch.testing.assert_close(b, a, rtol=0, atol=max(1e-5, (0.1 if dtype else 1e-3) * a.abs().max().item()))


def test_chunks_give_the_gradients_of_the_whole_batch(family):
    model, *batch = family
    batch = [t.to(GPU) for t in batch]
    for a, b in zip(step(model, *batch), step(model, *batch, chunk=2), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * max(1.0, a.abs().max().item()))


@pytest.mark.parametrize("dtype, error", [(None, 1e-4), (torch.bfloat16, 0.3)], ids=str)
def test_folded_convolutions_have_the_gradients_of_their_own(dtype, error):
    model, batch = golden_model(MODELS["ResNet"]), [t.to(GPU) for t in make_inputs(MODELS["ResNet"])]
    expected, ours = (torch.cat([t.flatten() for t in step(model, *batch, dtype=dtype, folded=way)])
                      for way in (False, True))  # fmt: skip
    assert (ours - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("precision, least", [("fp32", 0.999999), ("bf16", 0.999)])
def test_embeddings_of_an_inference_copy(family, precision, least):
    model, images, input_ids = family
    ours = inference_copy(copy.deepcopy(model).to(GPU), precision)
    with torch.no_grad():
        for a, b in (
            (model.encode_image(images, True), ours.encode_image(images.to(GPU), True)),
            (model.encode_text(input_ids, True), ours.encode_text(input_ids.to(GPU), True)),
        ):
            assert F.cosine_similarity(a, b.float().cpu()).min() > least


def test_captions_are_those_of_the_cpu():
    model = golden_model(COCA).to(GPU)
    for way, ids in zip(WAYS, json.loads(GOLDEN.read_text(encoding="utf-8"))["captions"], strict=True):
        if way.get("generation_type", "beam_search") == "beam_search":  # the others draw other numbers there
            with full_precision():  # two captions may be nearly as good
                assert model.generate(make_inputs(COCA)[0].to(GPU), **IDS | way).tolist() == ids


@pytest.fixture
def gpu_recipe(recipe):  # noqa: F811
    values = json.loads(recipe.read_text())
    recipe.write_text(json.dumps(values | {"use_cpu": False, "dataloader_num_workers": 2}))
    return recipe


@pytest.fixture
def run_on_gpu(run_script):
    seen = {"CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"]}  # and not in a fork
    return lambda *argv, **more: run_script(*argv, env=seen, **more)


@pytest.mark.parametrize("options", [
    (), ("--bf16", "true"), ("--fp16", "true"), ("--grad_cache_chunk_size", "5"), ("--optim_args", "states=bf16"),
    ("--ema", "0.9", "--patch_dropout", "0.25"), ("--loss", "siglip"), ("--loss", "superclip"),
], ids=" ".join)  # fmt: skip
def test_a_run_resumed_is_a_run_that_was_not_stopped(options, gpu_recipe, caption_set, run_on_gpu):
    saved = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--adam_epsilon", "1e-3", *options]
    run_on_gpu("train.py", gpu_recipe, *saved, "--output_dir", caption_set / "whole")
    checkpoint = caption_set / "whole" / "checkpoint-2"
    checkpoint.rename((caption_set / "again").mkdir() or caption_set / "again" / "checkpoint-2")
    run_on_gpu("train.py", gpu_recipe, *saved, "--output_dir", caption_set / "again", "--resume")
    # A GPU adds in an order of its own, and without the epsilon Adam makes a whole step of the smallest difference.
    assert largest_difference(caption_set / "whole", caption_set / "again") < 1e-3
    moved = weights(caption_set / "whole")
    assert all(t.isfinite().all() for t in moved.values())


def test_the_first_steps_are_those_of_the_cpu(gpu_recipe, caption_set, run_on_gpu):
    steps = ["--max_steps", "4", "--adam_epsilon", "1e-3", "--output_dir"]
    run_on_gpu("train.py", gpu_recipe, *steps, caption_set / "gpu")
    run_on_gpu("train.py", gpu_recipe, "--use_cpu", "true", *steps, caption_set / "cpu")
    assert largest_difference(caption_set / "cpu", caption_set / "gpu") < 1e-4


def test_it_is_measured_as_on_the_cpu(gpu_recipe, caption_set, run_on_gpu):
    run_on_gpu("train.py", gpu_recipe)
    found = {}
    for device in ("cpu", "cuda"):
        run_on_gpu(
            "evaluate.py", "--model", caption_set / "run", "--eval_file", caption_set / "captions.json",
            "--device", device, "--output_file", caption_set / f"{device}.json",
        )  # fmt: skip
        found[device] = json.loads((caption_set / f"{device}.json").read_text())["metrics"]
    assert found["cuda"] == pytest.approx(found["cpu"], abs=0.03)
    assert found["cuda"]["text_to_image_R@5"] > 0.3, "it has learned: 5 of 24 is 0.21 by chance"


def test_a_loss_that_is_not_a_number_is_found(tmp_path):
    trainer = make_trainer(tmp_path, use_cpu=False)
    with torch.no_grad():
        trainer.model.visual.proj.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan"):
        trainer.train()


@pytest.mark.parametrize("options", [
    {}, {"bf16": True}, {"fp16": True}, {"tf32": True}, {"bf16": True, "grad_cache_chunk_size": 2}, {"fast": False},
], ids=str)  # fmt: skip
def test_the_gradients_are_found_right(options, tmp_path):
    before = torch.backends.fp32_precision, torch.backends.cudnn.allow_tf32
    try:
        figures = make_trainer(tmp_path, use_cpu=False, **options).check_gradients()
    finally:  # the trainer sets it for the whole process
        torch.backends.fp32_precision, torch.backends.cudnn.allow_tf32 = before
        torch.set_float32_matmul_precision("highest")
    assert all(part["unexplained"] < 1e-3 for part in figures.values())
