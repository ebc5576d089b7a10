"""Every training argument of transformers: it works, or it is refused by name before anything is loaded."""

import json
from dataclasses import fields

import pytest
import torch
from transformers import TrainingArguments, training_args

from miniclip.run.progress import check_reporters
from miniclip.training import arguments
from miniclip.training.arguments import RunArguments
from miniclip.training.parse import parse_train
from miniclip.utils.errors import InputError
from tests.training.test_training import recipe  # noqa: F401

# Each argument with a value that works on a CPU, and the options that it needs beside it.
EVAL, NOTHING = ("--eval_file", "x.json"), ("--holdout", "0")  # to measure
WORKERS = ("--dataloader_num_workers", "1")
FROZEN = ("--freeze_image", "all", "--freeze_text", "tower")
WORKS = {
    "output_dir": "out", "per_device_train_batch_size": 7, "num_train_epochs": 2.5, "max_steps": 3,
    "learning_rate": 0.5, "lr_scheduler_type": "linear", "warmup_steps": 0.5, "weight_decay": 0.5,
    "lr_scheduler_kwargs": ({"min_lr": 1e-5}, "--lr_scheduler_type", "cosine_with_min_lr"),
    "optim": "sgd", "optim_args": ("momentum=0.5", "--optim", "sgd"), "adam_beta1": 0.5, "adam_beta2": 0.5,
    "adam_epsilon": 0.5, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "bf16": True, "tf32": False,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": ({"every_n_layers": 2}, "--activation_checkpointing"),
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": ({"every_n_layers": 2}, "--gradient_checkpointing"),
    "torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "max-autotune",
    "torch_empty_cache_steps": 2, "logging_strategy": "epoch", "logging_steps": 3, "logging_first_step": True,
    "log_on_each_node": False, "log_level": "error", "log_level_replica": "error", "disable_tqdm": True,
    "report_to": (["none"],), "run_name": "x", "project": ("x", "--report_to", "trackio"),
    "trackio_space_id": ("x", "--report_to", "trackio"), "trackio_bucket_id": ("x", "--report_to", "trackio"),
    "trackio_static_space_id": ("x", "--report_to", "trackio"), "eval_strategy": ("steps", *EVAL),
    "eval_steps": (3, *EVAL), "eval_delay": (3.0, *EVAL), "per_device_eval_batch_size": 3,
    "eval_on_start": (True, *EVAL),
    "save_only_model": True, "save_strategy": ("best", *EVAL), "save_steps": 3, "save_total_limit": 3,
    "load_best_model_at_end": (True, *EVAL), "metric_for_best_model": ("text_to_image_MRR", *EVAL),
    "greater_is_better": (False, *EVAL),
    "ignore_data_skip": True, "full_determinism": True, "seed": 3, "data_seed": 3, "use_cpu": True,
    "accelerator_config": ({"non_blocking": True},), "dataloader_drop_last": False, "dataloader_num_workers": 1,
    "dataloader_pin_memory": False, "dataloader_persistent_workers": (True, *WORKERS),
    "dataloader_prefetch_factor": (3, *WORKERS), "dataloader_multiprocessing_context": ("fork", *WORKERS),
    "train_sampling_strategy": "sequential", "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 3,
    "ddp_broadcast_buffers": True, "ddp_static_graph": True, "ddp_timeout": 3, "do_train": True,
    "do_eval": (True, *EVAL), "resume_from_checkpoint": "x", "local_rank": 0,
}  # fmt: skip
NEED_MACHINES = {"fp16", "fsdp", "fsdp_config", "ddp_backend"}
# Each argument that nothing here can do, with a value that asks for it.
REFUSED = {
    "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "remove_unused_columns": True, "label_names": ["labels"],
    "length_column_name": "len", "optim_target_modules": "all-linear", "include_num_input_tokens_seen": True,
    "average_tokens_across_devices": False, "use_liger_kernel": True, "liger_kernel_config": {"rope": True},
    "use_cache": True, "auto_find_batch_size": True, "prediction_loss_only": True, "eval_do_concat_batches": False,
    "eval_use_gather_object": True, "eval_accumulation_steps": 2, "include_for_metrics": ["loss"],
    "batch_eval_metrics": True, "bf16_full_eval": True, "fp16_full_eval": True, "do_predict": True,
    "logging_nan_inf_filter": True, "enable_jit_checkpoint": True, "restore_callback_states_from_checkpoint": True,
    "save_on_each_node": True, "debug": "underflow_overflow", "dataloader_in_order": False, "push_to_hub": True,
    "hub_token": "x", "hub_private_repo": True, "hub_model_id": "x/y", "hub_strategy": "end", "hub_always_push": True,
    "hub_revision": "x", "deepspeed": "x.json", "parallelism_config": "x",
}  # fmt: skip


def parse(folder, *argv, **values):
    """The arguments of a recipe with these values, and of this command line."""
    base = {"model": "ViT-B-32", "output_dir": str(folder), "use_cpu": True}
    (folder / "recipe.json").write_text(json.dumps(base | values))
    return parse_train([str(folder / "recipe.json"), *map(str, argv)])[1]


def test_every_argument_is_in_the_table():
    known = WORKS.keys() | REFUSED.keys() | NEED_MACHINES | {"skip_memory_metrics"}
    assert {f.name for f in fields(TrainingArguments)} - known == set(), "decide what they do, and test it"
    assert len(WORKS) + len(REFUSED) > 100 and not WORKS.keys() & REFUSED.keys()


def test_what_works_is_taken_as_given(tmp_path):
    for name, value in WORKS.items():
        value, *needs = value if isinstance(value, tuple) else (value,)
        args = parse(tmp_path, *needs, **{name: value})
        found = {"report_to": ["none"]} if name == "report_to" else args.to_dict()
        same = value.items() <= found[name].items() if isinstance(value, dict) else found[name] == value
        assert same, name


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_nothing_is_refused_by_name(name, tmp_path, capsys):
    with pytest.raises((InputError, SystemExit)) as refused:
        parse(tmp_path, **{name: REFUSED[name]})
    said = str(refused.value) if isinstance(refused.value, InputError) else capsys.readouterr().err
    assert name in said.partition(":")[0] or said.startswith(f"train.py: argument --{name}")


@pytest.mark.parametrize("argv, words", [
    (["--fp16"], "fp16 needs a GPU"), (["--fp16", "--bf16"], "fp16 and bf16"), (["--fsdp", "full_shard"], "only one"),
    (["--ddp_backend", "gloo"], "ddp_backend needs several processes"),
    (["--fsdp_config", "{}"], "fsdp_config has no effect without fsdp"), (["--do_train", "false"], "do_train"),
    (["--no_do_train"], "do_train"), (["--tf32"], "tf32"), (["--optim", "adamw_8bit"], "pip install -U bitsandbytes"),
    (["--optim", "stable_adamw"], "pip install torch-optimi"),
    (["--optim", "galore_adamw"], "galore_adamw is not supp"),
    (["--optim", "schedule_free_adamw"], "schedule_free_adamw is not"), (["--optim", "lomo"], "lomo is not supported"),
    (["--optim_args", "momentum=1"], "momentum has no effect with optim adamw_torch_fused"),
    (["--optim", "sgd", "--optim_args", "momentm=1"], "momentm has no effect"),
    (["--optim", "sgd", "--optim_args", "momentum=-1"], "Invalid momentum"),
    (["--optim_args", "x"], "is not name=value"),
    (["--optim", "sgd", "--adam_beta2", "0.9"], "adam_beta2 has no effect with optim sgd"),
    (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
    (["--lr_scheduler_type", "warmup_stable_decay"], "num_decay_steps"),
    (["--lr_scheduler_type", "polynomial", "--learning_rate", "1e-9"], "lr_end"),
    (["--lr_scheduler_kwargs", '{"powr": 2}'], "powr"),
    (["--lr_scheduler_kwargs", "{x"], "lr_scheduler_kwargs {x is not JSON"),
    (["--lr_scheduler_kwargs", "x"], "not a JSON object"),
    (["--lr_scheduler_type", "constant", "--warmup_steps", "9"], "warmup_steps has no effect"),
    (["--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", '{"a": 1}'], "lr_scheduler_kwargs has no effect"),
    (["--lr_scheduler_type", "reduce_lr_on_plateau", *NOTHING], "eval"),
    (["--lr_scheduler_type", "greedy", *EVAL], "max_lr"),
    (["--train_sampling_strategy", "group_by_length"], "train_sampling_strategy"),
    (["--do_eval", *NOTHING], "Add --eval_file"),
    (["--do_eval", "false", *EVAL], "do_eval is false"), (["--eval_strategy", "epoch", *NOTHING], "Add --eval_file"),
    (["--load_best_model_at_end", *NOTHING], "Add --eval_file"),
    (["--save_strategy", "best", *NOTHING], "Add --eval_file"),
    (["--eval_on_start", *NOTHING], "Add --eval_file"), (["--eval_steps", "3", *NOTHING], "eval_steps has no effect"),
    (["--eval_steps", "3", "--eval_strategy", "epoch", *EVAL], "eval_steps has no effect with eval_strategy epoch"),
    (["--save_steps", "3", "--save_strategy", "no"], "save_steps has no effect"), (["--save_steps", "0"], "save_steps"),
    (["--logging_steps", "0"], "logging_steps"), (["--max_steps", "0"], "max_steps is 0"),
    (["--seed", "-1"], "seed is -1"),
    (["--learning_rate", "nan"], "learning_rate is nan"), (["--adam_beta1", "1"], "adam_beta1"),
    (["--per_device_train_batch_size", "0"], "per_device_train_batch_size"),
    (["--per_device_train_batch_size", "1"], "a pair alone has no negatives"),
    (["--num_train_epochs", "-2"], "num_train"),
    (["--dataloader_num_workers", "-1"], "workers"), (["--project", "x"], "project has no effect without --report_to"),
    (["--dataloader_num_workers", "0", "--dataloader_persistent_workers"], "persistent_workers has no effect"),
    (["--torch_compile_backend", "x"], "torch_compile_backend 'x' is not one of"),
    (["--torch_compile_mode", "x"], "mode"),
    (["--accelerator_config", '{"split_batches": true}'], "split_batches"), (["--accelerator_config", '{"x": 1}'], "x"),
    (["--accelerator_config", '{"gradient_accumulation_kwargs": {"num_steps": 2}}'], "num_steps"),
    (["--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'], "Add --activation_checkpointing"),
    (["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"offload": true}'], "offload"),
    (["--metric_for_best_model", "R@1", "--load_best_model_at_end", *EVAL], "'R@1' is not one of image_to_text_MRR"),
    (["--data_seed", "1", "--train_file", "a::b"], "data_seed"),
    (["--resume_from_checkpoint", "x", "--overwrite_output_dir"], "resume continues the run"),
    (["--resume_from_checkpoint", "x", "--resume"], "contradict"),
    (["--eval_strategy", "steps", "--eval_steps", "5", "--save_steps", "10", "--load_best_model_at_end", *EVAL],
     "save_steps 10.0 differs from the 5.0 steps between evaluations"),
    (["--freeze_image", "tower", "--crop_scale", "0.5"], "crop_scale has no effect on a frozen image tower"),
    ([*FROZEN, "--grad_cache_chunk_size", "8"], "grad_cache_chunk_size has no effect between frozen towers"),
    ([*FROZEN, "--layer_decay", "0.8"], "layer_decay has no effect between frozen towers"),
    ([*FROZEN, "--activation_checkpointing"], "activation_checkpointing has no effect between frozen towers"),
    ([*FROZEN, "--gradient_checkpointing"], "gradient_checkpointing has no effect between frozen towers"),
    (["--loss", "late_interaction", "--layer_decay", "0.8"], "layer_decay has no effect between frozen towers"),
])  # fmt: skip
def test_what_needs_something_else_says_so(argv, words, tmp_path):
    with pytest.raises(InputError) as refused:
        parse(tmp_path, *argv)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_an_argument_of_a_recipe_may_become_useless_on_the_command_line(tmp_path):
    args = parse(tmp_path, *FROZEN, layer_decay=0.8, grad_cache_chunk_size=8)
    assert args.grad_cache_chunk_size == 8
    args = parse(tmp_path, *FROZEN[:3], "all_but_1", "--layer_decay", "0.8", "--grad_cache_chunk_size", "8")
    assert args.grad_cache_chunk_size == 8, "the last block learns"
    args = parse(tmp_path, "--eval_strategy", "epoch", eval_file="x.json", eval_strategy="steps", eval_steps=3)
    assert args.eval_strategy == "epoch"
    assert parse(tmp_path, "--bf16", "--no_dataloader_drop_last").bf16 is True


def test_eval_steps_means_evaluation_by_steps(tmp_path):
    args = parse(tmp_path, "--eval_steps", "3", "--load_best_model_at_end", *EVAL)
    assert (args.eval_strategy, args.save_strategy, args.eval_steps, args.save_steps) == ("steps", "steps", 3, 3)


@pytest.mark.parametrize("metric, mode", [(None, "max"), ("text_to_image_median_rank", "min")])
def test_a_schedule_that_follows_a_metric_knows_which_way_is_better(metric, mode, tmp_path):
    """The default of transformers would lower the rate whenever recall rises."""
    args = RunArguments(str(tmp_path), use_cpu=True, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch",
                        metric_for_best_model=metric)  # fmt: skip
    assert args.lr_scheduler_kwargs == {"mode": mode}
    assert args.metric_for_best_model == (metric or "mean_recall")


def test_services(tmp_path):
    for name, words in (("nonsense", "is not one of"), ("neptune", "pip install neptune"), ("flyte", "install flyte")):
        with pytest.raises(InputError, match=words):
            check_reporters(RunArguments(str(tmp_path), use_cpu=True, report_to=name))


def test_it_is_refused_before_anything_is_read(recipe, run_script):  # noqa: F811
    for argv in (["--label_smoothing_factor", "0.1"], ["--report_to", "neptune"]):
        done = run_script("train.py", recipe, "--train_file", "nowhere.json", *argv, check=False)
        assert done.returncode == 1 and argv[0][2:] in done.stderr and "nowhere" not in done.stderr
        assert "Traceback" not in done.stderr


def test_memory_is_not_pinned_for_a_run_on_the_cpu(tmp_path):
    """Where there is a GPU too, `dataloader_pin_memory` is the default."""
    assert not RunArguments(str(tmp_path), use_cpu=True, dataloader_pin_memory=True).dataloader_pin_memory


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_the_default_on_gpus_that_compute_in_it(native, tmp_path, monkeypatch):
    """torch also calls it supported where it is emulated, which takes longer than fp32."""
    monkeypatch.setattr(arguments, "CUDA", True)
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert RunArguments(str(tmp_path), use_cpu=False).bf16 is native
    assert not RunArguments(str(tmp_path), use_cpu=True).bf16


@pytest.mark.parametrize("given, steps", [([], [1, 2, 3]), (["--logging_steps", "2"], [2])])
def test_a_short_run_has_a_curve(given, steps, recipe, caption_set, run_script):  # noqa: F811
    values = json.loads(recipe.read_text())
    del values["logging_steps"]
    recipe.write_text(json.dumps(values))
    memory = ["--skip_memory_metrics", "false"]
    run_script("train.py", recipe, "--max_steps", "3", *memory, *given)
    log = [json.loads(line) for line in (caption_set / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == steps
    assert any("train_mem_cpu_alloc_delta" in entry for entry in log)


def test_many_at_once_have_their_effect(recipe, caption_set, run_script):  # noqa: F811
    """Adafactor, a schedule with parameters, evaluation by steps, and the whole set in order."""
    words = [
        "--optim", "adafactor", "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs",
        '{"min_lr": 0.001}',
        "--train_sampling_strategy", "sequential", "--full_determinism", "--eval_steps", "2", "--eval_on_start",
        "--eval_file", caption_set / "captions.json", "--max_steps", "4", "--dataloader_num_workers", "1",
        "--dataloader_multiprocessing_context", "fork", "--save_strategy", "best", "--activation_checkpointing",
        "--max_grad_norm", "0", "--no_dataloader_drop_last", "--per_device_train_batch_size", "10", "--warmup_steps",
        "0",
    ]  # fmt: skip
    run_script("train.py", recipe, *words)
    log = [json.loads(line) for line in (caption_set / "run" / "log.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert rates[0] == 3e-3 and rates == sorted(rates, reverse=True) and 1e-3 < rates[-1] < 2e-3
    assert [entry["step"] for entry in log if "eval_mean_recall" in entry] == [0, 2, 4, 4]
    assert log[0]["max_steps"] == 4 and list((caption_set / "run").glob("checkpoint-*"))
