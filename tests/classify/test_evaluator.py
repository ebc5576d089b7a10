"""Is zero-shot accuracy measured while a model trains, and can it choose the best checkpoint?"""

import json

import pytest
from PIL import Image

import miniclip
from miniclip.classify.evaluator import ZeroShotEvaluator
from miniclip.training.parse import parse_train
from miniclip.utils.errors import InputError
from tests.conftest import COLORS


@pytest.fixture
def class_folder(caption_set):
    """Plain images in a folder for each of six colours."""
    for color in COLORS[:6]:
        (caption_set / "classes" / color).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 40 + i), color).save(caption_set / "classes" / color / f"{i}.png")
    return caption_set / "classes"


def train(run_script, caption_set, class_folder, *more, captions="captions.json", check=True):
    file = caption_set / captions if captions != "none" else "none"
    return run_script(
        "train.py", "--model", caption_set / "m", "--train_file", caption_set / "captions.json", "--eval_file", file,
        class_folder, "--output_dir", caption_set / "run", "--num_train_epochs", 4, "--learning_rate", 3e-3,
        "--per_device_train_batch_size", 12, "--use_cpu", "true", "--warmup_steps", 0, *more, check=check,
    )  # fmt: skip


@pytest.mark.slow
def test_zero_shot_accuracy_is_logged_and_chooses_the_best_checkpoint(
    run_script, caption_set, class_folder, tiny_model
):
    tiny_model.save_pretrained(caption_set / "m")
    best = "--load_best_model_at_end", "--metric_for_best_model", "eval_zero_shot_top1"
    done = train(run_script, caption_set, class_folder, *best)
    state = json.loads((caption_set / "run" / "trainer_state.json").read_text())
    found = [entry for entry in state["log_history"] if "eval_zero_shot_top1" in entry][:4]
    accuracies = [entry["eval_zero_shot_top1"] for entry in found]
    assert len(found) == 4 and len(set(accuracies)) > 1 and all("eval_mean_recall" in entry for entry in found)
    assert state["best_metric"] == max(accuracies)
    assert state["best_global_step"] == found[accuracies.index(max(accuracies))]["step"]

    model, preprocess, tokenizer = miniclip.load(caption_set / "run")  # the best model was kept, by our own measure
    measured = ZeroShotEvaluator(class_folder, preprocess, tokenizer)(model)
    assert measured["zero_shot_top1"] == max(accuracies)
    assert f"zero shot top1 {100 * max(accuracies):.1f}" in done.stdout and "zero-shot top1" in done.stdout
    assert set(measured) == ZeroShotEvaluator(class_folder, preprocess, tokenizer).metric_names()


def test_it_equals_the_command(run_script, caption_set, class_folder, tiny_model):
    tiny_model.save_pretrained(caption_set / "m")
    out = caption_set / "out"
    run_script(
        "-m", "miniclip", "zero_shot", "--model", caption_set / "m", "--images", class_folder, "--output_dir", out
    )
    metrics = json.loads((out / "zero_shot.json").read_text())["metrics"]
    model, preprocess, tokenizer = miniclip.load(caption_set / "m")
    measured = ZeroShotEvaluator(class_folder, preprocess, tokenizer)(model)
    assert measured == {f"zero_shot_{name}": value for name, value in metrics.items()}


def test_it_works_without_captions(run_script, caption_set, class_folder, tiny_model):
    tiny_model.save_pretrained(caption_set / "m")
    more = "--holdout", 0, "--load_best_model_at_end", "--num_train_epochs", 1
    done = train(run_script, caption_set, class_folder, *more, captions="none")
    assert "zero shot top1" in done.stdout and "median rank" not in done.stdout


def test_damaged_images_of_classes_are_found_before_the_first_step(run_script, caption_set, class_folder, tiny_model):
    """As those of caption files: after an epoch they would end the run."""
    tiny_model.save_pretrained(caption_set / "m")
    bad = class_folder / "red" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    done = train(run_script, caption_set, class_folder, "--max_steps", 1, check=False)
    assert done.returncode == 1 and "1 of 12 images cannot be used:" in done.stderr and str(bad) in done.stderr
    assert "skip them with --on_bad_sample skip" in done.stderr and "loss" not in done.stdout + done.stderr
    done = train(run_script, caption_set, class_folder, "--max_steps", 1, "--on_bad_sample", "skip")
    assert "zero shot top1" in done.stdout
    listed = (caption_set / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in listed] == [str(bad)]


def test_what_cannot_be_measured_is_refused(run_script, caption_set, class_folder, tiny_model, capsys):
    with pytest.raises(InputError, match="zero-shot accuracy needs a folder with a folder of images for each class"):
        ZeroShotEvaluator(caption_set, None, None)
    with pytest.raises(InputError, match="eval_file is .* It must be one data set, and perhaps a folder of class"):
        parse_train(["--model", "x", "--train_file", "a", "--eval_file", "a", "b", "c", "--output_dir", "o"])
    with pytest.raises(SystemExit):
        parse_train(["--imagenet-val", "x"])
    assert "nearest: eval_file CAPTIONS CLASS_FOLDER" in capsys.readouterr().err
