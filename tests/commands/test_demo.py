"""The README's first promise, kept: the demo's commands, and what they reach."""

import json

import pytest


@pytest.mark.slow
def test_the_demo_reaches_what_the_readme_says(tmp_path, run_script):
    data, out = tmp_path / "shapes", tmp_path / "run"
    run_script("-m", "miniclip", "shapes", data)
    run_script(
        "train.py", "recipes/demo.json", "--train_file", data / "train.json", "--eval_file", data / "eval.json",
        "--output_dir", out, timeout=1500, env={"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    run_script("evaluate.py", "--model", out, "--eval_file", data / "eval.json", "--report", out)
    run_script("-m", "miniclip", "scene_quiz", "--model", out)
    quiz = json.loads((out / "scene_quiz.json").read_text())
    assert all(quiz["told"][question] >= 0.9 for question in ("colour", "shape", "position"))
    metrics = json.loads((out / "retrieval_eval.json").read_text())["metrics"]
    assert metrics["text_to_image_R@1"] >= 0.9 and metrics["image_to_text_R@1"] >= 0.9
    assert (out / "report.html").stat().st_size > 50_000
