"""Rates by layer, patch dropout, EMA and early stopping, and runs that are resumed with them."""

import copy
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import miniclip
from miniclip.config import MiniClipConfig
from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.model import MiniClip
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.finetune import EMA, EarlyStopping, PatchDropout, fine_tuning, layer_rates
from miniclip.training.freeze import freeze
from miniclip.training.options import TrainOptions
from miniclip.training.parse import parse_train
from miniclip.training.trainer import RunTrainer
from miniclip.utils.errors import InputError
from tests.training.test_training import ROOT, largest_difference, recipe, weights  # noqa: F401


@pytest.fixture
def parts(tiny_model, caption_set):
    """What a trainer wants: `make(model, callbacks, **more)` gives one for 6 steps of 12 of 24 pairs."""
    records = miniclip.read_captions(caption_set / "captions.json")
    preprocess, tokenizer = miniclip.Preprocess(tiny_model.config.preprocess_cfg), miniclip.Tokenizer(16)

    def make(model, callbacks=(), lr_scale=None, ema=None, **arguments):
        arguments = {
            "output_dir": str(caption_set / "run"), "use_cpu": True, "bf16": False, "per_device_train_batch_size": 12,
            "max_steps": 6, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 3e-3, "warmup_steps": 0,
            **arguments,
        }  # fmt: skip
        args = RunArguments(**arguments)
        dataset = RunDataset(records, preprocess, seed=args.seed)
        return RunTrainer(
            model, args, dataset, preprocess=preprocess, tokenizer=tokenizer, callbacks=list(callbacks),
            evaluator=RetrievalEvaluator(records, preprocess, tokenizer), lr_scale=lr_scale, ema=ema,
        )  # fmt: skip

    return SimpleNamespace(make=make, model=tiny_model, records=records, preprocess=preprocess, tokenizer=tokenizer)


def test_rates_by_hand(parts):
    rate = layer_rates(parts.model, image=0.5, text=2, layer_decay=0.1)
    expected = {
        "visual.proj.weight": 0.5, "visual.ln_post.bias": 0.5, "visual.blocks.1.mlp.c_fc.weight": 0.05,
        "visual.blocks.0.ln_1.weight": 0.005, "visual.conv1.weight": 0.0005, "visual.class_embedding": 0.0005,
        "visual.positional_embedding": 0.0005, "visual.ln_pre.weight": 0.0005, "text.text_projection.weight": 2,
        "text.ln_final.weight": 2, "text.blocks.1.attn.in_proj.bias": 0.2, "text.blocks.0.attn.in_proj.bias": 0.02,
        "text.token_embedding.weight": 0.002, "text.positional_embedding": 0.002, "logit_scale": 1,
    }  # fmt: skip
    assert {name: rate(name) for name in expected} == pytest.approx(expected)

    trainer = parts.make(parts.model, lr_scale=rate, weight_decay=0.3)
    groups = trainer.create_optimizer().param_groups
    names = {p: name for name, p in parts.model.named_parameters()}
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    decayed = trainer.get_decay_parameter_names(parts.model)
    assert found == {name: (3e-3 * rate(name), 0.3 if name in decayed else 0.0) for name in names.values()}
    assert groups[0]["lr"] == 6e-3 and len(groups) < 20, "the highest rate, which is logged, first"


def test_each_parameter_moves_by_its_rate(parts):
    """By plain gradient descent, a step is the gradient times the rate."""
    rate, moved = layer_rates(parts.model, image=0.5, layer_decay=0.5), []
    for scale in (None, rate):
        model = copy.deepcopy(parts.model)
        how = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        parts.make(model, lr_scale=scale, learning_rate=1.0, **how).train()
        before = dict(parts.model.named_parameters())
        moved.append({name: p.detach() - before[name].detach() for name, p in model.named_parameters()})
    for name, full in moved[0].items():
        assert torch.allclose(moved[1][name], rate(name) * full, atol=1e-6), name
    assert moved[1]["visual.conv1.weight"].abs().max() > 1e-4


class Watch(TrainerCallback):
    """Calls a function after each step."""

    def __init__(self, function):
        self.on_step_end = lambda *args, **kwargs: function()


def test_patches_are_hidden_but_for_the_last_steps(parts):
    lengths = []
    parts.model.visual.ln_pre.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    parts.make(parts.model, [PatchDropout(parts.model.visual, 0.5, 0.34)]).train()
    assert lengths == [3, 3, 3, 3, 5, 5]  # the class token, and 2 of 4 patches
    parts.make(parts.model, [PatchDropout(parts.model.visual, 0.5)], max_steps=1).train()
    assert lengths[6:] == [3]
    assert parts.model.visual.patch_dropout == parts.model.config.vision_cfg.patch_dropout == 0


def test_towers_without_patches_refuse_to_leave_some_out(tiny_config):
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    model = MiniClip(MiniClipConfig.from_dict(tiny_config.to_dict() | {"vision_cfg": resnet}))
    with pytest.raises(InputError, match="patch_dropout has no effect: this image tower has no patches to leave out"):
        fine_tuning(model, TrainOptions(patch_dropout=[0.5]), None)


def test_the_average_by_hand(parts, caption_set):
    model, name = parts.model, "text.ln_final.weight"
    freeze(model, image="all")
    ema, seen, averages = EMA(model, 0.3), [model.state_dict()[name].clone()], []

    def look():
        seen.append(model.state_dict()[name].clone())
        averages.append(ema.average.module.state_dict()[name].clone())

    trainer = parts.make(
        model, [ema, Watch(look)], ema=ema.average.module, learning_rate=3e-2, save_strategy="steps", save_steps=4
    )  # fmt: skip
    frozen = {n: p.clone() for n, p in model.named_parameters() if n.startswith("visual.")}
    trainer.train()
    average = seen[0]
    for value, found, d in zip(seen[1:], averages, (2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3), strict=True):
        average = d * average + (1 - d) * value
        assert torch.allclose(found, average, atol=1e-6)
        assert not torch.allclose(average, value, atol=1e-3)
    assert torch.equal(model.state_dict()[name], averages[-1]), "at the end the average is the model"
    assert all(torch.equal(p, model.state_dict()[n]) for n, p in frozen.items()), "what is frozen stays bit-equal"

    checkpoint = caption_set / "run" / "checkpoint-4"
    assert torch.equal(weights(checkpoint)[name], seen[4])
    kept = load_file(checkpoint / "ema.safetensors")
    assert not torch.equal(kept[name], seen[4])
    miniclip.load_weights(model, checkpoint / "ema.safetensors")  # it can be started from
    assert torch.equal(model.state_dict()[name], kept[name])
    with pytest.raises(InputError, match="checkpoint-4 was saved with --ema. Resume with it"):
        parts.make(model).train(str(checkpoint))
    trainer.save_model()
    assert not (caption_set / "run" / "ema.safetensors").exists()


def test_the_average_is_measured_and_that_of_the_best_checkpoint_kept(parts, caption_set):
    model = parts.model
    ema, measured = EMA(model, 0.9), []

    class Measure(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            images = [record["image"] for record in parts.records]
            embeds = miniclip.embed_images(ema.average.module, parts.preprocess, images)
            texts = [text for record in parts.records for text in record["caption"]]
            text_embeds = miniclip.embed_texts(ema.average.module, parts.tokenizer, texts)
            exact = miniclip.retrieval_metrics(embeds, text_embeds, np.repeat(np.arange(24), 2))["mean_recall"]
            measured.append((metrics["eval_mean_recall"], exact))

    trainer = parts.make(
        model, [ema, Measure()], ema=ema.average.module, max_steps=40, learning_rate=1e-2, eval_strategy="steps",
        eval_steps=8, save_strategy="steps", save_steps=8, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert all(ours == pytest.approx(exact) for ours, exact in measured) and len({ours for ours, _ in measured}) > 1
    best = trainer.state.best_model_checkpoint
    kept = load_file(f"{best}/ema.safetensors")
    assert all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())
    assert trainer.evaluate()["eval_mean_recall"] == pytest.approx(max(ours for ours, _ in measured))


def test_a_run_without_progress_stops(parts):
    trainer = parts.make(
        parts.model, [EarlyStopping(2)], learning_rate=0.0, max_steps=20, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 6, "of three evaluations the first is the best, two are no better"
    assert trainer.state.best_global_step == 2
    resumed = parts.make(
        parts.model, [EarlyStopping(3)], learning_rate=0.0, max_steps=20, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    resumed.train(trainer.args.output_dir + "/checkpoint-6")
    assert resumed.state.global_step == 8, "it continues counting from two, with its own patience"


REMEDIES = [
    "--ema", "0.95", "--patch_dropout", "0.5", "0.3", "--tower_lr_scales", "0.5", "1",
    "--layer_decay", "0.7", "--freeze_text", "all_but_1", "--save_strategy", "steps", "--save_steps", "3",
]  # fmt: skip


def test_resuming_with_every_remedy_gives_the_same_weights(recipe, caption_set, run_script):  # noqa: F811
    whole, cut = caption_set / "whole", caption_set / "cut"
    start = caption_set / "start"
    miniclip.MiniClip(miniclip.MiniClipConfig.from_json(caption_set / "tiny.json")).save_pretrained(start)
    more = [*REMEDIES, "--model", start, "--save_total_limit", "9"]
    done = run_script("train.py", recipe, *more, "--output_dir", whole)
    assert "fine-tuning: the last 1 of 2 blocks of the text tower are trained" in done.stdout
    assert re.search(r"learning rates from 0.00051[45] \(visual.c\S+\) to 0.003 \(logit_scale\)", done.stdout)
    assert json.loads((whole / "config.json").read_text())["vision_cfg"]["patch_dropout"] == 0
    before, after = weights(start), weights(whole)
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if name.startswith(("text.blocks.0.", "text.token", "text.posit"))}

    for folder in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(whole / folder, cut / folder)
    (cut / "checkpoint-6" / "trainer_state.json").unlink()  # as a kill may leave it
    run_script("train.py", recipe, *more, "--output_dir", cut, "--resume_from_checkpoint", "latest")
    assert largest_difference(whole, cut) == 0
    for kind in ("model", "ema"):
        one, two = (load_file(run / "checkpoint-15" / f"{kind}.safetensors") for run in (whole, cut))
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_killed_run_with_every_remedy_resumes_to_the_same_weights(recipe, caption_set, run_script):  # noqa: F811
    more = [*REMEDIES, "--num_train_epochs", "20"]
    run_script("train.py", recipe, *more, "--output_dir", caption_set / "whole")
    cut = caption_set / "cut"
    process = subprocess.Popen(
        [sys.executable, "train.py", recipe, *more, "--output_dir", cut],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len(list(cut.glob("checkpoint-*/trainer_state.json"))) < 2:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_script("train.py", recipe, *more, "--output_dir", cut, "--resume_from_checkpoint", "latest")
    assert largest_difference(caption_set / "whole", cut) == 0


@pytest.mark.slow
def test_two_processes_with_every_remedy_equal_one(recipe, caption_set, run_script):  # noqa: F811
    steps = ["--ema", "0.95", "--tower_lr_scales", "0.5", "1", "--layer_decay", "0.7", "--freeze_text", "all_but_1"]
    steps += ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "6", "--adam_epsilon", "1e-3"]
    run_script("train.py", recipe, *steps, "--output_dir", caption_set / "one")
    half = ["--per_device_train_batch_size", "6", "--output_dir", caption_set / "two"]
    run_script("train.py", recipe, *steps, *half, processes=2)
    assert largest_difference(caption_set / "one", caption_set / "two") < 1e-4


@pytest.mark.parametrize("options, problem", [
    (["--freeze_image", "all_but_"], "freeze_image is all_but_. It must be none, tower, all or all_but_N"),
    (["--freeze_text", "all_but_-1"], "freeze_text is all_but_-1"),
    (["--tower_lr_scales", "0", "1"], "freeze_image"),
    (["--tower_lr_scales", "0.5"], "two numbers above 0"),
    (["--tower_lr_scales", "1", "2", "--freeze_text", "all"], "tower_lr_scales has no effect on the text tower"),
    (["--layer_decay", "1.5"], "layer_decay"),
    (["--patch_dropout", "1"], "patch_dropout"),
    (["--patch_dropout", "0.5", "--freeze_image", "tower"], "patch_dropout has no effect"),
    (["--patch_dropout", "0.5", "--freeze_image", "all_but_0"], "patch_dropout has no effect"),
    (["--early_stopping_patience", "2", "--holdout", "0"], "Add --eval_file"),
    (["--holdout", "0.2", "--eval_file", "x.json"], "holdout has no effect with eval_file"),
    (["--holdout", "0.2", "--streaming", "true"], "holdout cannot be drawn from a stream"),
    (["--holdout", "1"], "holdout is 1.0. It must be from 0 to 0.9"),
    (["--early_stopping_patience", "0", "--eval_file", "x.json"], "1 or more"),
    (["--early_stopping_patience", "2", "--eval_file", "x.json", "--save_strategy", "no"], "save_strategy is 'no'"),
    (["--early_stopping_patience", "2", "--eval_file", "x.json", "--eval_strategy", "no"], "eval_strategy is 'no'"),
    (["--patch_dropout", "0", "0.1"], "a fraction below 1 and, if it is above 0"),
    (["--ema", "1"], "ema"),
    (["--resume", "--overwrite_output_dir"], "Remove one of them"),
    (["--image_root", "a", "b"], "Add --eval_file"),
    (["--columns", "image"], "two names"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(options, problem, tmp_path):
    with pytest.raises(InputError, match=problem):
        parse_train(["--output_dir", str(tmp_path), "--use_cpu", *options])


def test_early_stopping_brings_what_it_needs(tmp_path):
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--early_stopping_patience", "2", "--eval_file", "x.json"]
    options, args = parse_train(common)
    assert (args.eval_strategy, args.save_strategy, args.load_best_model_at_end) == ("epoch", "epoch", True)
    assert options.freeze_image == "none"
    _, args = parse_train([*common, "--eval_strategy", "steps", "--eval_steps", "30"])
    assert (args.save_strategy, args.save_steps, args.load_best_model_at_end) == ("steps", 30, True)
    options, _ = parse_train([*common, "--freeze_image", "all_but_0"])
    assert options.freeze_image == "tower"
