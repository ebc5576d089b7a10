"""Fixed BatchNorms as parts of convolutions, and gradients of depthwise convolutions, against torch's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import miniclip
from miniclip.config import MiniClipConfig
from miniclip.inference.fast import inference_copy
from miniclip.towers.resnet import ModifiedResNet
from miniclip.training.arguments import RunArguments
from miniclip.training.convolutions import CHUNK, FastDepthwise, convolution_wrappers
from miniclip.training.dataset import RunDataset
from miniclip.training.finetune import no_dropout
from miniclip.training.freeze import freeze, hold_statistics
from miniclip.training.trainer import RunTrainer

TOWERS = {
    "ResNet of transformers": {"hf_model_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
    }},
    "MobileNetV2": {"hf_model_config": {"model_type": "mobilenet_v2", "depth_multiplier": 0.35}},
    "ModifiedResNet": {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
}  # fmt: skip


@pytest.fixture(params=TOWERS)
def model(request, tiny_config):
    torch.manual_seed(0)
    values = tiny_config.to_dict() | {"vision_cfg": {"image_size": 32} | TOWERS[request.param]}
    model = miniclip.MiniClip(MiniClipConfig.from_dict(values))
    for module in model.visual.modules():  # as after a training, so that no BatchNorm is the identity
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def gradients(model, images) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)  # of dropout, if there is any
    embeds = model.encode_image(images)
    (embeds * torch.arange(embeds.numel()).view_as(embeds).sin()).sum().backward()
    return {name: p.grad.clone() for name, p in model.visual.named_parameters() if p.grad is not None}


def test_a_fixed_batch_norm_learns_the_same_as_part_of_a_convolution(model):
    freeze(model, f"all_but_{len(model.visual.blocks) - 1}")
    model.double().train()
    images = torch.randn(CHUNK + 2, 3, 32, 32, dtype=torch.float64)
    before, expected = copy.deepcopy(model.state_dict()), gradients(model, images)
    model.visual.wrappers = convolution_wrappers(model.float().visual, 32)
    model.double()  # as a move to another device, which the twin has to follow
    modules = {type(module) for found in model.visual.wrappers[0].args[0].values() for module in found.values()}
    calls = []
    for norm in model.visual.fixed_norms:
        norm.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, images)
    assert not calls and nn.Identity in modules, "a BatchNorm ran"
    assert found.keys() == expected.keys() and any(name.endswith("bias") for name in found)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_statistics_that_are_no_longer_fixed(model):
    hold_statistics(model.visual)
    model.visual.wrappers = convolution_wrappers(model.visual, 32)
    model.visual.fixed_norms = ()
    before = copy.deepcopy(model.visual.state_dict())
    model.train().encode_image(torch.randn(4, 3, 32, 32))
    changed = [name for name, tensor in model.visual.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("running_mean" in name for name in changed)


def test_a_frozen_tower_gains_nothing(model):
    freeze(model, "tower")
    assert convolution_wrappers(model.visual, 32) == ()
    freeze(model, "all_but_1")
    assert convolution_wrappers(model.visual, 32) != ()


def test_a_batch_norm_that_does_not_follow_the_convolution_beside_it(tiny_model):
    class Tower(type(tiny_model.visual)):
        def features(self, pixel_values):
            return super().features(self.conv(self.norm(pixel_values)))

    tower = tiny_model.visual
    tower.__class__ = Tower
    tower.conv, tower.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    nn.init.constant_(tower.norm.running_mean, 1.0)
    hold_statistics(tower)
    assert convolution_wrappers(tower, tower.image_size) == ()


def test_what_is_set_in_the_tower_holds(tiny_model):
    class Tower(type(tiny_model.visual)):
        def features(self, pixel_values):
            return super().features(self.drop(self.norm(self.conv(pixel_values))))

    tower, images = tiny_model.visual, torch.randn(4, 3, 32, 32)
    tower.__class__, tower.drop = Tower, nn.Dropout(0.5)
    tower.conv, tower.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    hold_statistics(tower)
    expected, tower.wrappers = tower.eval()(images), convolution_wrappers(tower, tower.image_size)
    assert tower.wrappers and not torch.allclose(tower.train()(images), expected, atol=1e-3)
    with no_dropout(tower):
        torch.testing.assert_close(tower(images), expected)


def test_what_a_gpu_rounds_by_default_hides_nothing(model, monkeypatch):
    """A deep network and its folded form differ by 1% of TF32; these small ones do if eight bits are left."""
    convolve = F.conv2d

    def rounding(x, weight, *more):
        if torch.backends.cudnn.conv.fp32_precision == "tf32":
            x, weight = (t.bfloat16().float() for t in (x, weight))
        return convolve(x, weight, *more)

    monkeypatch.setattr(F, "conv2d", rounding)
    hold_statistics(model.visual)
    assert any(wrapper.args[0] for wrapper in convolution_wrappers(model.visual, 32))
    fused = inference_copy(model).visual
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "side, kernel, stride, padding",
    [(19, 5, 1, 2), (20, 5, 2, 0), (19, 5, 2, 2), (17, 7, 1, 3), (17, 3, 2, 1), (18, 3, 2, 1), (18, 6, 3, 1)],
)
def test_gradients_of_depthwise_convolutions(side, kernel, stride, padding, bias):
    torch.manual_seed(0)
    shapes = (3, 8, side, side + 2), (8, 1, kernel, kernel), (8,)
    inputs = [torch.randn(shape).bfloat16().float().requires_grad_() for shape in shapes][: 2 + bias]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.conv2d(*exact, *(() if bias else (None,)), stride, padding, 1, 8)
    weights = torch.randn(expected.shape).bfloat16().double()
    expected.backward(weights)
    with torch.autocast("cpu", torch.bfloat16), FastDepthwise():
        found = F.conv2d(*inputs, *(() if bias else (None,)), stride, padding, 1, 8)
    assert found.dtype == torch.bfloat16 and "DepthwiseConv" in type(found.grad_fn).__name__
    found.backward(weights.bfloat16())
    for ours, right in ((found, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact))):
        assert (ours.double() - right).norm() <= 3e-3 * right.norm()  # results are rounded to eight bits


def test_other_convolutions_are_torchs():
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    weights = {
        "all channels": torch.randn(8, 8, 5, 5),
        "3 x 3": torch.randn(8, 1, 3, 3),
        "flat": torch.randn(8, 1, 1, 5),
    }
    with torch.autocast("cpu", torch.bfloat16), FastDepthwise():
        for name, weight in weights.items():
            y = F.conv2d(x, weight.requires_grad_(), groups=8 // weight.shape[1])
            assert "DepthwiseConv" not in type(y.grad_fn).__name__, name
        assert "DepthwiseConv" not in type(F.conv2d(x, torch.randn(8, 1, 5, 5), None, 1, "same", 1, 8).grad_fn).__name__
        with torch.no_grad():
            assert F.conv2d(x, torch.randn(8, 1, 5, 5), groups=8).grad_fn is None
    with FastDepthwise():  # fp32
        assert "DepthwiseConv" not in type(F.conv2d(x, torch.randn(8, 1, 5, 5), groups=8).grad_fn).__name__


@pytest.mark.parametrize("how", [{}, {"fast": False}, {"activation_checkpointing": True}])
def test_a_run_takes_it_unless_it_has_to_be_plain(how, model, caption_set):
    if "activation_checkpointing" in how and not isinstance(model.visual, ModifiedResNet):
        pytest.skip("refused for these towers")
    freeze(model, f"all_but_{len(model.visual.blocks) - 1}")
    args = RunArguments(str(caption_set / "run"), use_cpu=True, bf16=True, per_device_train_batch_size=4, max_steps=2,
                        save_strategy="no", disable_tqdm=True, report_to="none", **how)  # fmt: skip
    records, preprocess = (
        miniclip.read_captions(caption_set / "captions.json"),
        miniclip.Preprocess(model.config.preprocess_cfg),
    )
    before = copy.deepcopy(model.state_dict())
    dataset = RunDataset(records, preprocess, seed=0)
    trainer = RunTrainer(model, args, dataset, preprocess=preprocess, tokenizer=miniclip.Tokenizer(16))
    taken = any("learn_faster" in repr(wrapper) for wrapper in model.visual.wrappers)
    assert taken == (not how)
    trainer.train()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(tensor.isfinite().all() for tensor in after.values())
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("visual.") for name in changed) and not any("running" in name for name in changed)
