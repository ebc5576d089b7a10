import argparse
import json
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest

from miniclip.trainer import ClipTrainingArguments
from miniclip.training.arguments import RunArguments
from miniclip.training.losses import HELP, LOSSES, make_loss
from miniclip.training.options import TrainOptions
from miniclip.training.parse import ALIASES, FINE_TUNE, FROM_SCRATCH, parse_train, train_help
from miniclip.utils.command_line import at_least, find_device, printable, run
from miniclip.utils.errors import InputError
from miniclip.utils.files import write_text
from tests.conftest import ROOT


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_and_no_arguments_need_neither_torch_nor_transformers(script, run_script):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers', 'faiss', 'numpy'} & set(sys.modules)"
    )
    texts = [run_script("-c", code, script, *argv).stdout for argv in (["--help"], ["-h"], [])]
    assert texts[0] == texts[1] == texts[2]
    assert "--image_root" in texts[0]


def test_flags_of_openclip_are_answered_with_ours(capsys):
    with pytest.raises(SystemExit):
        parse_train(["--accum_freq", "2"])
    assert "unknown option 'accum_freq'; nearest: grad_cache_chunk_size" in capsys.readouterr().err
    known = {field.name for options in (TrainOptions, RunArguments) for field in fields(options)}
    assert not {part.split()[0] for ours in ALIASES.values() for part in ours.split(", ")} - known


def test_defaults_follow_the_start(tmp_path):
    common = ["--model", "ViT-B-32", "--output_dir", str(tmp_path), "--use_cpu"]
    options, args = parse_train(common)
    assert {name: getattr(args, name) for name in FROM_SCRATCH} == FROM_SCRATCH
    _, args = parse_train([*common, "--pretrained", "x.pt", "--learning_rate", "3e-6"])
    assert {name: getattr(args, name) for name in FINE_TUNE} == {**FINE_TUNE, "learning_rate": 3e-6}
    assert (args.adam_beta2, args.adam_epsilon, args.dataloader_drop_last) == (0.98, 1e-6, True)


def test_the_command_line_overrides_the_recipe(tmp_path):
    recipe = {"_about": "a comment", "model": "ViT-B-32", "output_dir": str(tmp_path), "learning_rate": 2e-4,
              "pretrained": "x.pt", "hflip": 0.5, "use_cpu": True}  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    options, args = parse_train([str(tmp_path / "recipe.json"), "--hflip", "0.25"])
    assert (options.model, options.hflip, options.pretrained) == ("ViT-B-32", 0.25, "x.pt")
    assert args.learning_rate == 2e-4
    assert args.num_train_epochs == FINE_TUNE["num_train_epochs"]


@pytest.mark.parametrize("option", [
    ["--on_bad_sample", "skp"], ["--crop_scale", "0"], ["--hflip", "2"], ["--color_jitter", "-1"],
    ["--fixed_logit_scale", "0.5"], ["--fixed_logit_scale", "0"], ["--loss", "triplet"], ["--duplicates", "drop"],
])  # fmt: skip
def test_values_out_of_range_are_refused_on_the_command_line_and_in_recipes(option, tmp_path):
    with pytest.raises((InputError, SystemExit)):
        parse_train(["--output_dir", str(tmp_path), *option])
    (tmp_path / "recipe.json").write_text(json.dumps({option[0][2:]: option[1], "output_dir": str(tmp_path)}))
    with pytest.raises((InputError, SystemExit)):
        parse_train([str(tmp_path / "recipe.json")])


@pytest.mark.parametrize("name, value, message", [
    ("per_device_train_batch_size", 8.5, "invalid int value: '8.5'"), ("train_num_samples", 10.5, "invalid int value"),
    ("hflip", True, "invalid float value: 'true'"), ("tower_lr_scales", ["a", "b"], "invalid float value: 'a'"),
    ("train_file", ["a.json", "b.json"], "unexpected argument 'b.json'"), ("save_total_limit", None, "invalid int"),
    ("freeze_image", True, "freeze_image is true. It must be none"), ("loss", 3, "loss is 3. It must be clip"),
])  # fmt: skip
def test_values_in_a_recipe_are_of_the_kind_of_their_option(name, value, message, tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(json.dumps({name: value, "output_dir": str(tmp_path), "model": "ViT-B-32"}))
    with pytest.raises((InputError, SystemExit)) as stop:
        parse_train([str(tmp_path / "recipe.json")])
    assert message in str(stop.value) + capsys.readouterr().err


def test_a_recipe_may_say_words_null_and_what_to_resume(tmp_path):
    def read(**recipe):
        (tmp_path / "r.json").write_text(json.dumps({"output_dir": str(tmp_path), "model": "ViT-B-32"} | recipe))
        return parse_train([str(tmp_path / "r.json")])

    kwargs = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}, "report_to": ["none"]}
    options, args = read(hflip=None, streaming="false", holdout="0", bf16=None, fsdp=False, debug=[], **kwargs)
    assert (options.hflip, options.streaming, options.holdout) == (0.0, False, 0.0)
    assert args.eval_strategy == "no", "nothing is held out"
    assert args.lr_scheduler_kwargs == {"power": 2} and args.report_to == []
    odd = {"max_steps": -1, "run_name": "--a run", "tower_lr_scales": [1e-5, 1], "eval_file": "-a.json"}
    options, args = read(**odd)
    assert [args.max_steps, args.run_name, options.tower_lr_scales, options.eval_file] == list(odd.values())
    resumed = {"x/checkpoint-5": "x/checkpoint-5", "true": "latest", True: "latest", "false": None, False: None}
    assert {value: read(resume=value)[1].resume_from_checkpoint for value in resumed} == resumed
    assert {value: read(resume_from_checkpoint=value)[1].resume_from_checkpoint for value in resumed} == resumed
    assert read(max_steps=1e2)[1].max_steps == 100


def test_a_value_that_is_called_like_an_option_sets_none(tmp_path):
    options, _ = parse_train(["--model", "ViT-B-32", "--output_dir", str(tmp_path), "--train_file", "hflip"])
    assert "hflip" not in options.given


def test_an_eval_file_is_used_each_epoch_unless_told(tmp_path):
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--model", "ViT-B-32"]
    assert parse_train(common)[1].eval_strategy == "epoch", "a tenth is held out"
    for more in (["--holdout", "0"], ["--streaming"]):
        assert parse_train([*common, *more])[1].eval_strategy == "no"
    assert parse_train([*common, "--eval_file", "x.json"])[1].eval_strategy == "epoch"
    assert parse_train([*common, "--eval_file", "x.json", "--eval_strategy", "no"])[1].eval_strategy == "no"


def test_own_options_are_few():
    core = {f.name for f in fields(ClipTrainingArguments)}
    own = [f.name for f in fields(RunArguments) if f.name not in core]
    assert own == ["fast", "grad_cache_chunk_size"]
    assert len(fields(TrainOptions)) + len(own) <= 30


def test_unknown_options_are_named_in_one_line(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text('{"learnin_rate": 1}')
    (tmp_path / "list.json").write_text('["a"]')
    recipe, model = [str(tmp_path / "recipe.json")], ["--model", "ViT-B-32"]
    for argv, message in (
        (recipe, "recipe.json: unknown option 'learnin_rate'; nearest: learning_rate"),
        ([str(tmp_path / "list.json")], "list.json is not a JSON object"),
        (["no-such.json"], "no-such.json cannot be read"),
        ([*model, "--train_fil", "x"], "unknown option 'train_fil'; nearest: train_file"),
        ([*model, "--lr", "1"], "unknown option 'lr'; nearest: learning_rate"),
        ([*model, "--optim", "adamw"], "adamw_8bit"),
        ([*model, "--hflip", "often"], "argument --hflip: invalid float value: 'often'"),
        ([*model, "stray"], "unexpected argument 'stray'"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse_train(argv)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--loss", "clap"], "loss is clap. It must be clip, siglip, superclip, coca,"),
        (["--loss", "coca:2"], "or coca:2:1 with two weights"),
        (["--loss", "distill"], "need a teacher"),
        (["--teacher", "ViT-B-32"], "need a teacher"),
        (["--loss", "affinity", "--teacher", "ViT-B-32", "--freeze_image", "all"], "a tower is frozen"),
        (["--loss", "superclip", "--freeze_text", "tower"], "the superclip loss needs captions"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        parse_train(["--output_dir", str(tmp_path), *options])


def test_what_the_system_refuses_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder, reason in (("file", "Not a directory"), ("no", "No such file")):
        path = tmp_path / folder / "x.json"
        with pytest.raises(SystemExit, match=rf"{path.parent.name}/x\.json: {reason}"):
            run(lambda argv, path=path: write_text(path, "x"))
    with pytest.raises(OSError, match="bug"):
        run(lambda argv: (_ for _ in ()).throw(OSError("bug")))
    code = "from miniclip.utils.command_line import run\nrun(lambda argv: [print(n, flush=True) for n in range(99999)])"
    command = f"{sys.executable} -c '{code}' | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_numbers_and_devices_that_cannot_be():
    assert at_least(1)("3") == 3 and printable("a\x1b[2J\n|é狗") == "a\\x1b[2J\\n|é狗"
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=at_least(1))
    for text in ("0", "-1", "x", "1.5"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--n", text])
    assert find_device("cpu").type == "cpu"
    for name in ("nope", "cuda:99"):
        with pytest.raises(InputError, match=f"--device {name}: "):
            find_device(name)


def test_from_scratch_has_the_defaults_of_clip_trainer():
    assert {f.name: f.default for f in fields(ClipTrainingArguments) if f.name in FROM_SCRATCH} == FROM_SCRATCH


def test_a_loss_is_registered_in_one_place(monkeypatch, tmp_path):
    monkeypatch.setitem(LOSSES, "toy", lambda model, options, args: lambda outputs, batch: outputs.logit_scale)
    options, args = parse_train(["--output_dir", str(tmp_path), "--use_cpu", "--loss", "toy"])
    model = SimpleNamespace(logit_bias=None)
    assert make_loss(model, options, args)(SimpleNamespace(logit_scale=3), {}) == 3
    assert all(text in train_help() for text in HELP) and HELP.keys() < LOSSES.keys()
