"""Frozen towers and blocks: the gradients of one step, precomputed features, and whole runs."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import miniclip
from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.loss import clip_loss
from miniclip.model import MiniClip, Tower
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.freeze import FrozenDataset, freeze, freeze_towers, hold_statistics
from miniclip.training.grad_cache import wrap_towers
from miniclip.training.options import TrainOptions
from miniclip.training.trainer import RunTrainer
from miniclip.utils.errors import InputError
from tests.inference.test_fast import make_batch, make_model
from tests.training.test_training import largest_difference, recipe, weights  # noqa: F401


def step(model, chunk_size: int, pixel_values, input_ids, fast=False) -> dict[str, torch.Tensor]:
    model.zero_grad()
    clip_loss(*wrap_towers(model, None, chunk_size, fast)(pixel_values, input_ids)[:3]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fast, checkpointing, chunk_size", [
    (False, False, 0), (True, False, 0), (False, True, 0), (True, True, 0), (True, False, 3),
])  # fmt: skip
def test_the_last_blocks_get_the_gradients_of_a_full_backward_pass_and_the_rest_none(
    fast, checkpointing, chunk_size, monkeypatch
):
    model, (pixel_values, input_ids) = make_model().train(), make_batch()
    full = step(model, 0, pixel_values, input_ids)
    if checkpointing:
        model.gradient_checkpointing_enable()
    freeze(model, "all_but_1", "all_but_2")
    learning = {name for name in full if name.startswith((
        "visual.blocks.2.", "visual.ln_post.", "visual.proj.", "text.blocks.1.", "text.blocks.2.", "text.ln_final.",
        "text.text_projection.", "logit_scale",
    ))}  # fmt: skip
    seen, passed = [], {}
    for tower, first in ((model.visual, 2), (model.text, 1)):
        passed |= {block.ln_1.weight: number > first for number, block in enumerate(tower.blocks)}

    def layer_norm(x, shape, weight, *rest, normalize=F.layer_norm):  # a hook would turn the fast path off
        seen.extend([(x.requires_grad, passed[weight])] if weight in passed else [])
        return normalize(x, shape, weight, *rest)

    monkeypatch.setattr(F, "layer_norm", layer_norm)
    ours = step(model, chunk_size, pixel_values, input_ids, fast)
    assert ours.keys() == learning
    for name, gradient in ours.items():
        assert torch.allclose(gradient, full[name], atol=1e-6), name
    backward = [found for found in seen if found[0]]
    assert len(seen) >= 6 and backward and all(passed for _, passed in backward), "nothing is recorded of frozen blocks"


def test_all_but_no_block_is_a_frozen_tower(tiny_config):
    models = [miniclip.MiniClip(tiny_config) for _ in range(2)]
    freeze(models[0], "all_but_0", "all_but_2")
    freeze(models[1], image="tower")
    learning = [{name for name, p in model.named_parameters() if p.requires_grad} for model in models]
    frozen = {"text.token_embedding.weight", "text.positional_embedding"}
    assert learning[0] == learning[1] - frozen and "visual.proj.weight" in learning[0]
    with pytest.raises(InputError, match="all_but_3: the image tower has 2 blocks"):
        freeze(models[0], "all_but_3")


def test_a_frozen_batch_norm_keeps_its_statistics():
    class Small(Tower):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.head = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.head(self.stem(x))

    def changed(model) -> set[str]:
        before = copy.deepcopy(model.state_dict())
        model.train()(torch.randn(5, 3, 8, 8) + 3)
        return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}

    torch.manual_seed(0)
    tower = Small()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed(tower) == {f"{norm}.{name}" for norm in ("stem.1", "head") for name in statistics}
    tower.stem.requires_grad_(False)
    hold_statistics(tower)
    assert not changed(tower) and not changed(copy.deepcopy(tower))
    assert tower.head.weight.requires_grad


@pytest.fixture
def parts(tiny_model, caption_set):
    records = miniclip.read_captions(caption_set / "captions.json")
    preprocess, tokenizer = miniclip.Preprocess(tiny_model.config.preprocess_cfg), miniclip.Tokenizer(16)
    args = RunArguments(
        str(caption_set / "run"), use_cpu=True, bf16=False, per_device_train_batch_size=12, max_steps=5,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2, adam_epsilon=1e-3,
    )  # fmt: skip
    return tiny_model, args, records, preprocess, tokenizer


@pytest.mark.parametrize("image, text", [("all", "none"), ("tower", "tower"), ("none", "tower")])
def test_features_computed_once_train_as_the_frozen_tower_would(image, text, parts, caption_set):
    model, args, records, preprocess, tokenizer = parts
    running, before = copy.deepcopy(model), copy.deepcopy(model).state_dict()
    freeze(running, image, text)
    dataset = RunDataset(records, preprocess, seed=args.seed)
    RunTrainer(running, args, dataset, preprocess=preprocess, tokenizer=tokenizer).train()

    options = TrainOptions(freeze_image=image, freeze_text=text)
    make_dataset, caches = freeze_towers(model, options, args, records, preprocess, tokenizer)
    trainer = RunTrainer(
        model, args, make_dataset(records, preprocess, seed=args.seed), preprocess=preprocess, tokenizer=tokenizer,
        evaluator=RetrievalEvaluator(records, preprocess, tokenizer, caches=caches),
    )  # fmt: skip
    calls = []
    tower = model.visual if image != "none" else model.text
    tower.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))  # so that no fast path goes around it
    trainer.train()
    assert not calls
    for (name, p), q in zip(model.named_parameters(), running.parameters()):
        assert torch.allclose(p, q, atol=1e-5), name
    projections = {"visual.proj.weight": image, "text.text_projection.weight": text}
    towers = {"visual": image, "text": text}
    for name, p in model.named_parameters():
        how = projections.get(name) or towers.get(name.split(".")[0], "none")
        frozen = how == "all" or (how == "tower" and name not in projections)
        assert torch.equal(p, before[name]) == frozen, name
    metrics, after = trainer.evaluate(), [None if cache is None else cache.reused for cache in caches]
    assert 0 < metrics["eval_mean_recall"] <= 1
    assert after == [24 if image != "none" else None, 48 if text != "none" else None]


def test_in_bf16_training_features_are_bf16_where_that_is_proved(parts, monkeypatch, tmp_path):
    model, args, records, preprocess, tokenizer = parts
    args.bf16, found = True, {}
    for taken in ("fp32", "bf16"):
        monkeypatch.setattr("miniclip.training.freeze.settle", lambda model, precision, quiet, taken=taken: taken)
        options = TrainOptions(freeze_image="tower", freeze_text="tower", feature_cache=str(tmp_path / "cache"))
        dataset, caches = freeze_towers(model, options, args, records, preprocess, tokenizer)
        found[taken] = dataset(records, preprocess).image_features
        assert [cache.precision for cache in caches] == [taken] * 2 and not caches[0].reused, "each has its own"
        evaluator = RetrievalEvaluator(records, preprocess, tokenizer, precision=taken, caches=caches)
        assert evaluator(model) and caches[0].reused == len(records)
    assert 1e-5 < (found["fp32"] - found["bf16"]).abs().max() < 0.1
    options.check_gradients = True  # against fp32, so that what the tower rounds would count as a mistake
    _, caches = freeze_towers(model, options, args, records, preprocess, tokenizer)
    assert [cache.precision for cache in caches] == ["fp32"] * 2


def test_a_frozen_dataset_draws_the_captions_that_the_usual_one_draws(parts):
    model, args, records, preprocess, tokenizer = parts
    usual = RunDataset(records, preprocess, seed=5)
    texts = [text for record in records for text in record["caption"]]
    image, text = torch.randn(24, 8).numpy(), torch.arange(48.0).view(48, 1).numpy()
    ours = FrozenDataset(records, preprocess, seed=5, image_features=image, text_features=None)
    both = FrozenDataset(records, preprocess, seed=5, image_features=image, text_features=text)
    captions = FrozenDataset(records, preprocess, seed=5, image_features=None, text_features=text)
    for dataset in (usual, ours, both, captions):
        dataset.set_epoch(2)
    assert np.shares_memory(ours.image_features.numpy(), image), "not a second time, in shared memory"
    for i in range(24):
        assert ours[i]["caption"] == usual[i]["caption"] == texts[int(both[i]["text_features"])]
        assert torch.equal(captions[i]["pixel_values"], usual[i]["pixel_values"])
        assert set(captions[i]) == {"pixel_values", "text_features", "pair_ids", "row"}
        assert set(both[i]) == {"image_features", "text_features", "pair_ids", "row"}
        assert ours[i]["pair_ids"] == both[i]["pair_ids"] == captions[i]["pair_ids"] == usual[i]["pair_ids"]


@pytest.mark.parametrize("bias", [None, -10.0])
def test_freezing_everything_is_refused(bias, tiny_config):
    """The scale and the bias of the logits alone are no training."""
    tiny_config.init_logit_bias = bias
    options = TrainOptions(freeze_image="all", freeze_text="all")
    with pytest.raises(InputError, match="nothing is left to train"):
        freeze_towers(MiniClip(tiny_config), options, None, [], None, None)


def test_train_with_a_frozen_tower_and_a_cache(recipe, caption_set, run_script):  # noqa: F811
    options = ["--freeze_image", "tower", "--hflip", "0", "--color_jitter", "0", "--num_train_epochs", "2"]
    options += ["--eval_file", caption_set / "captions.json", "--feature_cache", caption_set / "cache"]
    options += ["--fast", "false"]  # how products are made is chosen by a measurement, which a busy moment can turn
    start = ["--model", caption_set / "start"]
    config = miniclip.MiniClipConfig.from_json(caption_set / "tiny.json")
    miniclip.MiniClip(config).save_pretrained(caption_set / "start")
    first = run_script("train.py", recipe, *options, *start)
    assert "0 of 24 images were cached" in first.stdout
    second = run_script("train.py", recipe, *options, *start, "--output_dir", caption_set / "again")
    assert "24 of 24 images were cached" in second.stdout
    assert largest_difference(caption_set / "run", caption_set / "again") == 0
    started = miniclip.load(caption_set / "start")[0].state_dict()
    for name, tensor in weights(caption_set / "run").items():
        frozen = name.startswith("visual") and name != "visual.proj.weight"
        assert torch.equal(tensor, started[name]) == frozen, name
    done = run_script("train.py", recipe, "--freeze_image", "all", check=False)
    assert done.returncode != 0 and "hflip has no effect: the image tower is frozen" in done.stderr
