"""Mixing the weights before and after fine-tuning: the numbers, what is measured, what is written."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

import miniclip
from miniclip.commands import wise_ft
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.inference.fast import InferenceClip
from miniclip.retrieval import retrieval_metrics
from miniclip.towers.tokens import add_tokens
from miniclip.training.wise_ft import best, format_sweep, sweep
from miniclip.utils.errors import InputError
from miniclip.weights.interpolate import check_same, interpolate
from tests.training.test_training import weights


def test_interpolation_by_hand():
    before = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    after = {"w": torch.tensor([3.0, -2.0]), "b": torch.tensor(3.0)}
    quarter = interpolate(before, after, 0.25)
    assert quarter["w"].tolist() == [1.5, 1.0] and quarter["b"].item() == 3
    torch.manual_seed(0)
    a, b = {"w": torch.randn(1000)}, {"w": torch.randn(1000)}
    assert torch.equal(interpolate(a, b, 0)["w"], a["w"]) and torch.equal(interpolate(a, b, 1)["w"], b["w"])
    assert torch.equal(interpolate(a, a, 0.3)["w"], a["w"]) and torch.equal(interpolate(a, a, 0.7)["w"], a["w"])
    for other in ({"w": torch.randn(999)}, {"w": torch.randn(1000).half()}, {}):
        with pytest.raises(InputError, match="w is .* before and .* after"):
            interpolate(a, other, 0.5)


def test_other_models_are_refused_by_name(tiny_config):
    values = tiny_config.to_dict()
    values["vision_cfg"]["patch_dropout"] = 0.5
    check_same(tiny_config, miniclip.MiniClipConfig.from_dict(values))  # which training alone knows of
    values["vision_cfg"]["layers"], values["quick_gelu"] = 3, True
    with pytest.raises(InputError, match="layers is 2 before and 3 after, quick_gelu is False before and True after"):
        check_same(tiny_config, miniclip.MiniClipConfig.from_dict(values))


@pytest.fixture
def two(tiny_model, caption_set):
    """A model before and after some change of both towers, and two caption files that share half of their images."""
    torch.manual_seed(1)
    after = copy.deepcopy(tiny_model)
    for p in after.parameters():
        p.data += 0.5 * p.std(correction=0) * torch.randn_like(p)
    tiny_model.save_pretrained(caption_set / "before")
    after.save_pretrained(caption_set / "after")
    records = json.loads((caption_set / "captions.json").read_text())
    (caption_set / "old.json").write_text(json.dumps(records[:16]))
    new = [{**record, "caption": [f"{text} here" for text in record["caption"]][:1]} for record in records[8:]]
    (caption_set / "new.json").write_text(json.dumps(new[::-1]))
    return tiny_model, after, caption_set


def measured(model, folder, name: str) -> dict[str, float]:
    preprocess, tokenizer = miniclip.Preprocess(model.config.preprocess_cfg), miniclip.Tokenizer(16)
    records = miniclip.read_captions(folder / name)
    texts = [text for record in records for text in record["caption"]]
    image_of_text = np.repeat(np.arange(len(records)), [len(record["caption"]) for record in records])
    images = embed_images(model, preprocess, [record["image"] for record in records])
    return retrieval_metrics(images, embed_texts(model, tokenizer, texts), image_of_text)


def test_the_command_measures_each_mix_and_writes_what_it_found(two, capsys):
    before, after, folder = two
    out = folder / "out"
    wise_ft.main([
        "--before", str(folder / "before"), "--after", str(folder / "after"), "--new_file", str(folder / "new.json"),
        "--old_file", str(folder / "old.json"), "--output_dir", str(out), "--alphas", "0", "1", "--save_alpha", "0.25",
        "--device", "cpu",
    ])  # fmt: skip
    result = json.loads((out / "wise_ft.json").read_text())
    entries = {entry["alpha"]: entry for entry in result["sweep"]}
    assert list(entries) == [0, 0.25, 1]
    mixed = miniclip.MiniClip.from_pretrained(out / "model")
    for alpha, model in ((0, before), (0.25, mixed), (1, after)):
        for task in ("new", "old"):
            assert entries[alpha][task] == pytest.approx(measured(model, folder, f"{task}.json"), abs=1e-6)
        both = (entries[alpha]["new"]["mean_recall"] + entries[alpha]["old"]["mean_recall"]) / 2
        assert entries[alpha]["mean"] == pytest.approx(both)
    ends = weights(folder / "before"), weights(folder / "after")
    for name, tensor in weights(out / "model").items():
        assert torch.allclose(tensor, 0.75 * ends[0][name] + 0.25 * ends[1][name], atol=1e-6)
    assert result["best_alpha"] == max(entries.values(), key=lambda entry: entry["mean"])["alpha"]
    table = (out / "wise_ft.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 5
    assert table.splitlines()[2].startswith(f"| 0 | {100 * entries[0]['new']['mean_recall']:.1f} |")
    with Image.open(out / "wise_ft.png") as image:
        assert image.width == 2360 and len(image.getcolors(1 << 20)) > 20


def test_late_interaction_is_measured_of_each_mix(two):
    before, after, folder = two
    for model in (before, after):
        add_tokens(model)
    preprocess, tokenizer = miniclip.Preprocess(before.config.preprocess_cfg), miniclip.Tokenizer(16)
    records = {"old": miniclip.read_captions(folder / "old.json")}
    found = sweep(before, after, preprocess, tokenizer, records, (0.0, 1.0))
    for entry, model in zip(found, (before, after)):
        assert entry["old"] == pytest.approx(RetrievalEvaluator(records["old"], preprocess, tokenizer)(model))
    assert found[0]["old"] != found[1]["old"]


def test_shared_images_and_towers_are_encoded_once(two, monkeypatch):
    before, after, folder = two
    records = {name: miniclip.read_captions(folder / f"{name}.json") for name in ("new", "old")}
    preprocess, tokenizer = miniclip.Preprocess(before.config.preprocess_cfg), miniclip.Tokenizer(16)
    after.visual.load_state_dict(before.visual.state_dict())
    encoded, features = {"image": 0, "text": 0}, InferenceClip.features

    def count(self, tower, inputs):
        encoded["image" if tower is self.visual else "text"] += len(inputs)
        return features(self, tower, inputs)

    monkeypatch.setattr(InferenceClip, "features", count)
    found = sweep(before, after, preprocess, tokenizer, records, [0, 0.5, 1])
    assert encoded == {"image": 24, "text": 3 * (32 + 16)}
    assert found[2]["old"] == pytest.approx(measured(after, folder, "old.json"), abs=1e-6)


def test_the_best_is_that_of_both_tasks():
    def entry(alpha, new, old):
        shares = {"text_to_image_R@1": 0, "text_to_image_R@10": 0, "image_to_text_R@1": 0, "image_to_text_R@10": 0.125}
        tasks = {"new": {**shares, "mean_recall": new}, "old": {**shares, "mean_recall": old}}
        return {"alpha": alpha, "mean": (new + old) / 2, **tasks}

    found = [entry(0, 0.1, 0.5), entry(0.5, 0.4, 0.4), entry(0.8, 0.5, 0.3), entry(1, 0.6, 0.1)]
    assert best(found) == 0.5  # of two alike the one nearer to the old model
    task = "40.0 | 0.0 | 0.0 | 0.0 | 12.5"
    assert format_sweep(found).splitlines()[3] == f"| 0.5 | {task} | {task} | 40.0 |"


def test_what_is_wrong_is_said_without_a_traceback(two, run_script):
    _, _, folder = two
    config = json.loads((folder / "after" / "config.json").read_text())
    config["quick_gelu"] = True
    (folder / "after" / "config.json").write_text(json.dumps(config))
    (folder / "after" / "manifest.json").unlink()
    command = ["-m", "miniclip", "wise_ft", "--before", folder / "before", "--after", folder / "after"]
    command += ["--new_file", folder / "new.json", "--old_file", folder / "old.json", "--output_dir", folder / "out"]
    done = run_script(*command, check=False)
    assert done.returncode != 0 and "quick_gelu is False before and True after" in done.stderr
    assert "Traceback" not in done.stderr and not (folder / "out").exists()
    base = [str(word) for word in command[3:]]
    for more, problem in (
        (["--alphas", "1.5"], "alpha 1.5 lies outside"), (["--save_alpha", "most"], "neither a number nor best"),
        (["--after", "nowhere"], "--after nowhere is not a folder"), (["--before", "ViT-B-32"], "add --pretrained"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=problem):
            wise_ft.main([*base, *more])
