"""evaluate.py on vectors made elsewhere: no model, no images."""

import json

import numpy as np
import pytest

from miniclip.retrieval import retrieval_metrics


@pytest.fixture
def features(tmp_path):
    """Unit vectors of 6 images and 12 captions, two for each."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((6, 8)).astype(np.float32)
    text = np.repeat(image, 2, 0) + rng.standard_normal((12, 8)).astype(np.float32)
    for name, rows in (("image", image), ("text", text)):
        np.save(tmp_path / f"{name}.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return tmp_path


def measured(run_script, folder, *argv):
    done = run_script("evaluate.py", "--features", folder, "--output_file", folder / "result.json", *argv)
    return done.stdout, json.loads((folder / "result.json").read_text())


def test_vectors_alone(features, run_script):
    """Without a caption file the captions are taken to come in order, the same number for each image."""
    image, text = (np.load(features / f"{name}.npy") for name in ("image", "text"))
    shown, result = measured(run_script, features)
    assert "6 images, 12 captions" in shown and "R@3" not in shown
    assert result["metrics"] == pytest.approx(retrieval_metrics(image, text, np.repeat(np.arange(6), 2)))
    shown, result = measured(run_script, features, "--captions", "first")
    assert "6 images, 6 captions" in shown and "R@3" in shown
    assert result["metrics"] == pytest.approx(retrieval_metrics(image, text[::2], np.arange(6), ks=(1, 3, 5, 10)))
    assert (result["model"], result["dataset"]) == (str(features), f"{features} (first captions)")


def test_published_features_print_the_published_figures(flickr8k, tmp_path, run_script):
    for argv in ([], ["--eval_file", flickr8k / "en_val.json", "--captions", "first"]):
        done = run_script(
            "evaluate.py", "--features", flickr8k / "published_features", "--output_file", tmp_path / "o.json", *argv
        )
        table = [line.split() for line in done.stdout.splitlines()]
        assert ["text", "to", "image", "52.0", "70.5", "78.5", "86.3"] in [row[:7] for row in table]
        assert ["image", "to", "text", "55.6", "73.6", "81.5", "89.7"] in [row[:7] for row in table]


def test_misuse_is_said_in_one_line(features, run_script):
    np.save(features / "text.npy", np.load(features / "text.npy")[:7])
    for argv, problem in (
        (["--features", features], "7 text embeddings for 6 captions"),
        (["--features", features / "none"], "there is no image.npy in"),
        (["--features", features, "--model", "ViT-B-32"], "remove --model"),
        (["--model", "ViT-B-32"], "give --model and --eval_file, or --features"),
        (["--features", features, "--report", "x.png"], "add --eval_file"),
    ):
        done = run_script("evaluate.py", *argv, check=False)
        assert done.returncode != 0 and problem in done.stderr and "Traceback" not in done.stderr
