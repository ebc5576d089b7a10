"""The README's Python example runs as it stands, on a small data set."""

import re

import pytest

import miniclip
from miniclip.datasets.shapes import write
from tests.conftest import ROOT


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.filterwarnings("error:.*pin_memory")
def test_the_python_example_trains_measures_and_saves(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (example,) = [block for block in blocks if "ClipTrainer(" in block]
    monkeypatch.chdir(tmp_path)
    write("data/shapes", 130, 12, 0, 64)
    exec(compile(example, "README.md", "exec"), {})
    printed = float(capsys.readouterr().out.split()[-1])
    assert 0 <= printed <= 1
    model, preprocess, tokenizer = miniclip.load("runs/python")
    held_out = miniclip.read_captions("data/shapes/eval.json")
    metrics = miniclip.RetrievalEvaluator(held_out, preprocess, tokenizer)(model)
    assert metrics["text_to_image_R@1"] == pytest.approx(printed, abs=1e-6)
