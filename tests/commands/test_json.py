"""Does --json print one JSON document on stdout, with the figures of the table, and nothing else there?"""

import json
import shutil

import pytest
from PIL import Image


@pytest.fixture
def files(tmp_path, caption_set, tiny_model):
    """A model in `m`, the captions `c.json`, and the class folders `classes` and `held` of two colours."""
    tiny_model.save_pretrained(tmp_path / "m")
    tiny_model.save_pretrained(tmp_path / "m2")
    shutil.copy(caption_set / "captions.json", tmp_path / "c.json")
    for folder in ("classes", "held"):
        for color in ("red", "blue"):
            (tmp_path / folder / color).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (32, 32 + i), color).save(tmp_path / folder / color / f"{i}.png")
    return tmp_path


COMMANDS = [  # the command, and a figure of its document by name, with the table's decimals
    ("evaluate.py --model {d}/m --eval_file {d}/c.json --device cpu", "metrics text_to_image_R@1"),
    ("evaluate.py --model {d}/m {d}/m2 --eval_file {d}/c.json --output_file {d}/b.json",
     "evaluations 0 metrics text_to_image_R@1"),
    ("-m miniclip zero_shot --model {d}/m --images {d}/classes --output_dir {d}/o", "metrics top1"),
    ("-m miniclip moderate --model {d}/m --images {d}/classes --ask dog --output_dir {d}/o", "pictures 0 score"),
    ("-m miniclip linear_probe --model {d}/m --examples {d}/classes --images {d}/held --shots 1 --seeds 1"
     " --output_dir {d}/o", "found 0 top1"),
    ("-m miniclip scene_quiz --model {d}/m --eval 8 --output_file {d}/q.json", "told colour"),
    ("-m miniclip wise_ft --before {d}/m --after {d}/m2 --old_file {d}/c.json --new_file {d}/c.json --alphas 0 1"
     " --output_dir {d}/o", "best_alpha"),
    ("-m miniclip check --model shapes-demo --train_file {d}/c.json --output_dir {d}/run --use_cpu true"
     " --per_device_train_batch_size 8 --json", "parts image tower cosine"),
    ("-m miniclip pretrained ViT-B-32", "0 tag"),
]  # fmt: skip


@pytest.mark.parametrize("command, where", COMMANDS, ids=lambda text: " ".join(text.split()[:3]))
def test_stdout_is_one_json_document(run_script, files, command, where):
    argv = command.format(d=files).split() + ["--json"] * ("--json" not in command)
    done = run_script(*argv)
    found = json.loads(done.stdout)
    keys = ["parts", "image tower", "cosine"] if "image tower" in where else where.split()
    for key in keys:
        found = found[int(key) if isinstance(found, list) else key]
    shown = found if isinstance(found, str) else float(found)
    table = done.stderr
    forms = (
        [str(shown)] if isinstance(shown, str) else [f"{100 * shown:.1f}", f"{shown:.2f}", f"{shown:g}", f"{shown:.6f}"]
    )
    assert any(form in table for form in forms), (shown, table)


def test_numbers_that_json_lacks_are_null(capsys):
    from miniclip.utils import command_line

    parser = command_line.Parser()
    parser.share("json")
    import sys

    before = sys.stdout
    try:
        options = parser.parse_args(["--json"])
        print("a message")
        command_line.print_json(options, {"a": float("nan"), "b": (1, float("inf"))})
    finally:
        sys.stdout = before
    said = capsys.readouterr()
    assert json.loads(said.out) == {"a": None, "b": [1, None]} and said.err == "a message\n"
