"""SigLIP's loss, distillation and duplicates: by hand, against OpenCLIP, across processes and in whole runs."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import miniclip
from miniclip.commands.convert import main as weights_main
from miniclip.commands.convert_data import main as repack
from miniclip.data import Collator, image_id, text_id
from miniclip.datasets.read import read_captions, read_source
from miniclip.loss import clip_loss, clip_loss_with_duplicates, find_duplicates
from miniclip.model import ClipOutput, MiniClip
from miniclip.training.dataset import RunDataset
from miniclip.training.distill import Distillation, affinity_loss
from miniclip.training.grad_cache import wrap_towers
from miniclip.training.losses import make_loss
from miniclip.training.options import TrainOptions
from miniclip.training.siglip import add_logit_bias, siglip_loss
from miniclip.training.superclip import word_loss
from miniclip.transforms import Preprocess
from miniclip.utils.errors import InputError
from miniclip.weights.load import load_weights
from tests.training.test_training import ROOT, recipe, weights  # noqa: F401

GOLDEN = json.loads((ROOT / "tests" / "data" / "loss_golden.json").read_text())


def draw(seed: int, width: int, rows: int = 12) -> torch.Tensor:
    numbers = np.random.default_rng(seed).standard_normal((rows, width))
    return F.normalize(torch.from_numpy(numbers), dim=1)


@pytest.mark.parametrize("name", ["clip", "siglip", "distill", "affinity"])
def test_as_openclip(name):
    """Values and gradients within 1e-6 of what OpenCLIP's classes gave (benchmarks/make_loss_golden.py)."""
    given = {"image": draw(0, 8), "text": draw(1, 8), "scale": torch.tensor(7.5), "bias": torch.tensor(-3.25)}
    for tensor in given.values():
        tensor.requires_grad_()
    student = ClipOutput(given["image"], given["text"], given["scale"])
    teacher = ClipOutput(draw(2, 6), draw(3, 6), torch.tensor(11.0))
    loss = {
        "clip": lambda: clip_loss(*student[:3]),
        "siglip": lambda: siglip_loss(student._replace(logit_bias=given["bias"]), chunk_size=5),
        "distill": lambda: clip_loss(*student[:3]) + affinity_loss(student, teacher),
        "affinity": lambda: affinity_loss(student, teacher),
    }[name]()
    loss.backward()
    golden = GOLDEN[name]
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-6)
    for key in golden.keys() - {"loss"}:
        assert given[key].grad.flatten()[:24].tolist() == pytest.approx(golden[key], abs=1e-6), key


def two_duplicates():
    """Three pairs of which the first and the last show the same image."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    text = torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.8, -0.6]])
    return image, text, torch.tensor([[5, 1], [6, 2], [5, 3]])


def test_duplicates_are_found():
    _, _, ids = two_duplicates()
    assert find_duplicates(ids, ids).tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    ids = torch.tensor([[5, 1], [6, 2], [7, 2]])
    assert find_duplicates(ids, ids).tolist() == [[True, False, False], [False, True, True], [False, True, True]]


@pytest.mark.parametrize("duplicates", ["positive", "exclude", "ignore"])
def test_duplicates_by_hand(duplicates):
    image, text, ids = two_duplicates()
    # with scale 1 the logits are the cosines: rows images, columns texts
    logits = [[0.6, 0.0, 0.8], [0.8, 1.0, -0.6], [0.6, 0.0, 0.8]]

    def row(values, own, mates):
        if duplicates == "exclude":
            values = [v for j, v in enumerate(values) if j == own or j not in mates]
            own = 0 if len(values) < 3 and own == 0 else len(values) - 1 if own == 2 else own
        log_sum = math.log(sum(math.exp(v) for v in values))
        right = mates if duplicates == "positive" else [own]
        return sum(log_sum - values[j] for j in right) / len(right)

    mates = [[0, 2], [1], [0, 2]]
    of_images = sum(row(logits[i], i, mates[i]) for i in range(3)) / 3
    of_texts = sum(row([logits[j][i] for j in range(3)], i, mates[i]) for i in range(3)) / 3
    loss = clip_loss_with_duplicates(image, text, torch.tensor(1.0), ids, duplicates)
    assert loss.item() == pytest.approx((of_images + of_texts) / 2, abs=1e-6)

    yes = [[i == j or (duplicates == "positive" and j in mates[i]) for j in range(3)] for i in range(3)]
    counts = [[duplicates != "exclude" or i == j or j not in mates[i] for j in range(3)] for i in range(3)]
    losses = [
        math.log(1 + math.exp(-(2 * logits[i][j] - 1) * (1 if yes[i][j] else -1))) * counts[i][j]
        for i in range(3) for j in range(3)
    ]  # fmt: skip
    loss = siglip_loss(ClipOutput(image, text, torch.tensor(2.0), torch.tensor(-1.0)), ids, duplicates, chunk_size=2)
    assert loss.item() == pytest.approx(sum(losses) / 3, abs=1e-6)


def test_without_duplicates_all_ways_agree():
    image, text, scale = draw(0, 8).float(), draw(1, 8).float(), torch.tensor(9.0)
    alone = torch.arange(24).view(12, 2)
    for duplicates in ("positive", "exclude", "ignore"):
        ours = clip_loss_with_duplicates(image, text, scale, alone, duplicates).item()
        assert ours == pytest.approx(clip_loss(image, text, scale).item())
    with pytest.raises(ValueError, match="positive, exclude, ignore"):
        clip_loss_with_duplicates(image, text, scale, alone, "drop")


@pytest.mark.parametrize("duplicates, direction", [("positive", -1), ("exclude", 0), ("ignore", 1)])
def test_what_happens_to_a_duplicate(duplicates, direction):
    """Two crops of one image, and their captions: a caption is pulled to the other crop, left alone, or pushed off."""
    text, same_image = torch.eye(2, requires_grad=True), torch.tensor([[5, 1], [5, 2]])
    clip_loss_with_duplicates(torch.eye(2), text, torch.tensor(2.0), same_image, duplicates).backward()
    assert torch.sign(text.grad[1, 0]) == torch.sign(text.grad[0, 1]) == direction


def test_siglip_memory_does_not_grow_with_the_square():
    """What the backward pass keeps: all logits at once would be 4 bytes x 512 x 512."""
    image, text = (draw(seed, 4, 512).float().requires_grad_() for seed in (0, 1))

    def run(chunk_size):
        sizes = []
        with saved_tensors_hooks(lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t):
            outputs = ClipOutput(image, text, torch.tensor(10.0), torch.tensor(-10.0))
            loss = siglip_loss(outputs, chunk_size=chunk_size)
        return loss.item(), max(sizes)

    (loss, kept), (whole, _) = run(64), run(512)
    assert kept < 512 * 64  # nothing for each pair
    assert loss == pytest.approx(whole, rel=1e-5)


def test_siglip_starts_where_the_paper_says(tiny_config, tmp_path):
    model = MiniClip(tiny_config)
    add_logit_bias(model)
    assert model.logit_scale.exp().item() == pytest.approx(10) and model.logit_bias.item() == -10
    model.logit_bias.data.fill_(-3.5)
    model.save_pretrained(tmp_path)
    loaded, preprocess, tokenizer = miniclip.load(tmp_path)
    assert loaded.logit_bias.item() == -3.5
    images, ids = torch.zeros(1, 3, 32, 32), tokenizer(["a dog"])
    image, text, scale, _ = loaded(images, ids)
    expected = scale * image @ text.T - 3.5
    for model in (loaded, miniclip.load(tmp_path, precision="fp32")[0]):
        assert torch.allclose(model.get_logits(images, ids)[0], expected, atol=1e-5)


def test_siglip_keeps_a_fixed_scale(tiny_model):
    tiny_model.logit_scale.data.fill_(math.log(50))
    tiny_model.logit_scale.requires_grad_(False)
    make_loss(tiny_model, TrainOptions(loss="siglip"), None)
    assert tiny_model.logit_scale.exp().item() == pytest.approx(50) and tiny_model.logit_bias.item() == -10


def test_a_student_equal_to_its_teacher_has_no_gradient(tiny_model):
    """The cross-entropy is then the entropy, its minimum."""
    preprocess = Preprocess(tiny_model.config.preprocess_cfg)
    objective = Distillation(tiny_model, preprocess, tiny_model)
    tiny_model.requires_grad_(True)
    levels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    ids = miniclip.tokenizer.Tokenizer(16)([f"image {n}" for n in range(6)])
    inputs = {"pixel_values": levels, "input_ids": ids}
    outputs = wrap_towers(tiny_model, preprocess.normalize)(**inputs)
    objective(outputs, inputs).backward()
    assert max(p.grad.abs().max() for p in tiny_model.parameters()) < 1e-5
    other = MiniClip(tiny_model.config)
    outputs = wrap_towers(other, preprocess.normalize)(**inputs)
    objective(outputs, inputs).backward()
    assert max(p.grad.abs().max() for p in other.parameters()) > 1e-3


def test_words_by_hand():
    """Three captions: start and end, which all of them have, do not count, and a word counts once."""
    images, scale, table = torch.eye(3)[:, :2] + 0.0, torch.tensor(2.0), nn.Embedding(9, 2)
    ids = torch.tensor([[7, 1, 2, 8, 0], [7, 2, 2, 8, 0], [7, 3, 8, 0, 0]])  # start, words, end, padding
    table.weight.data = torch.arange(18.0).view(9, 2).sin()
    words = F.normalize(table.weight[[1, 2, 3, 7, 8]].detach(), dim=1)
    log_p = (2 * images @ words.T).log_softmax(dim=1)
    rare, common = math.log(3 / 1), math.log(3 / 2)
    first = -(rare * log_p[0, 0] + common * log_p[0, 1]) / (rare + common)
    outputs = ClipOutput(images.requires_grad_(), None, scale.requires_grad_())
    loss = word_loss(outputs, ids, table, nn.Identity(), pad=0)
    assert loss.item() == pytest.approx((first - log_p[1, 1] - log_p[2, 2]).item() / 3, abs=1e-6)
    loss.backward()
    assert scale.grad is None and images.grad.any() and table.weight.grad[[1, 2, 3]].all()
    assert not table.weight.grad[[0, 4, 5, 6]].any()


def test_a_model_with_a_bias_goes_through_weight_files(tiny_config, tmp_path):
    """Trained by SigLIP's loss, converted, loaded into a model that has no bias, and trained by another loss."""
    model = MiniClip(tiny_config)
    add_logit_bias(model)
    model.logit_bias.data.fill_(-3.5)
    model.save_pretrained(tmp_path / "run")
    weights_main([str(tmp_path / "run"), str(tmp_path / "w.safetensors"), "--to", "openclip"])
    fresh = MiniClip(miniclip.MiniClipConfig.from_dict(tiny_config.to_dict() | {"init_logit_bias": None}))
    load_weights(fresh, tmp_path / "w.safetensors")
    assert fresh.logit_bias.item() == -3.5 and fresh.config.init_logit_bias == -3.5
    make_loss(fresh, SimpleNamespace(loss="clip", duplicates="positive"), None)
    assert not fresh.logit_bias.requires_grad  # several processes would wait for its gradient
    with pytest.raises(InputError, match="logit_bias"):
        weights_main([str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf"])


def test_a_teacher_without_weights_is_refused(tiny_model):
    with pytest.raises(InputError, match="ViT-B-32 has no weights"):
        make_loss(tiny_model, TrainOptions(loss="distill", teacher=["ViT-B-32"]), SimpleNamespace(bf16=False))


def test_half_precision_weights_are_trained_in_fp32(tiny_model, caption_set, recipe, run_script):  # noqa: F811
    half = {name: t.bfloat16() for name, t in tiny_model.state_dict().items()}
    tiny_model.save_pretrained(caption_set / "half", half)
    options = ["--max_steps", "2", "--learning_rate", "1e-5"]
    run_script("train.py", recipe, "--model", caption_set / "half", *options)
    after = weights(caption_set / "run")
    changed = [(after[name] != t.float()).float().mean().item() for name, t in half.items() if t.ndim >= 2]
    assert min(changed) > 0 and after["visual.proj.weight"].dtype == torch.float32
    assert sum(changed) / len(changed) > 0.5


def test_a_teacher_that_cannot_read_is_refused(tiny_model, tiny_config):
    tiny_config.text_cfg.context_length = 77
    with pytest.raises(InputError, match="reads 16 tokens .* the student 77"):
        preprocess = Preprocess(tiny_model.config.preprocess_cfg)
        tiny_model.config.text_cfg.context_length = 16
        student = MiniClip(miniclip.MiniClipConfig.from_dict(tiny_config.to_dict()))
        student.config.text_cfg.context_length = 77
        Distillation(tiny_model, preprocess, student)


# Which pairs are duplicates


def test_pair_ids_identify_images_and_captions(caption_set):
    assert text_id("A  dog.") == text_id("a dog.") != text_id("a dog")
    assert image_id("/a/dog.jpg") == image_id(Path("/a/dog.jpg")) != image_id("/b/dog.jpg")
    run_convert = [str(caption_set / "captions.json"), str(caption_set / "a.tar")]
    repack(run_convert)
    packed = read_source(str(caption_set / "a.tar"))
    numbers = {image_id(record["image"]) for record in packed}
    assert len(numbers) == 24  # by content: the same image packed twice has one id
    repack([run_convert[0], str(caption_set / "b.tar")])
    assert {image_id(record["image"]) for record in read_source(str(caption_set / "b.tar"))} == numbers


def flat(caption_set) -> Path:
    """The caption set with one record for each caption: every image comes twice, one after the other."""
    records = json.loads((caption_set / "captions.json").read_text())
    pairs = [{"image": record["image"], "caption": [text]} for record in records for text in record["caption"]]
    (caption_set / "flat.json").write_text(json.dumps(pairs))
    return caption_set / "flat.json"


def test_a_batch_knows_its_duplicates(caption_set, tiny_config):
    records = read_captions(caption_set / "captions.json")
    records = [{"image": r["image"], "caption": [text]} for r in records for text in r["caption"]]
    data = RunDataset(records, Preprocess(tiny_config.preprocess_cfg))
    batch = Collator(miniclip.tokenizer.Tokenizer(16))([data[0], data[1], data[2]])
    ids = batch["pair_ids"]
    assert find_duplicates(ids, ids).tolist() == [[True, True, False], [True, True, False], [False, False, True]]


# Across processes and in chunks


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_gradients_equal_those_of_one_process(tiny_config, tmp_path, run_script, processes):
    """Of every loss, with duplicates within and across processes, whole and in chunks: within 1e-6."""
    torch.manual_seed(0)
    tiny_config.text_cfg.vocab_size = 600
    model, teacher = MiniClip(tiny_config), MiniClip(tiny_config)
    add_logit_bias(model)
    rows = 12
    ids = torch.randint(1, 598, (rows, 10))
    ids[:, -1] = 599
    batch = {"pixel_values": torch.randn(rows, 3, 32, 32), "input_ids": ids}
    batch["pair_ids"] = torch.arange(2 * rows).view(rows, 2)
    for column, one, other in ((0, 7, 1), (0, 3, 2), (1, 11, 0)):  # within a process, and in two
        batch["pair_ids"][one, column] = batch["pair_ids"][other, column]
    cases = [
        {"loss": loss, "duplicates": duplicates, "chunk_size": chunk}
        for loss in ("clip", "siglip", "superclip", "distill", "affinity")
        for duplicates in ("positive", "exclude", "ignore")
        for chunk in (0, 3)
        if not (loss == "affinity" and duplicates != "positive")
    ]
    saved = {
        "batch": batch, "cases": cases, "config": model.config.to_dict(), "weights": model.state_dict(),
        "teacher_config": tiny_config.to_dict() | {"init_logit_bias": None}, "teacher": teacher.state_dict(),
    }  # fmt: skip
    torch.save(saved, tmp_path / "batch.pt")
    results = []
    for n in (1, processes):
        output = tmp_path / f"{n}.pt"
        run_script("tests/losses_worker.py", tmp_path / "batch.pt", output, processes=n)
        results.append(torch.load(output, weights_only=True))
    for case, one, many in zip(cases, *results):
        assert many["loss"].item() == pytest.approx(one["loss"].item(), abs=2e-6), case
        largest = max(g.abs().max().item() for g in one["grads"].values())
        for name in one["grads"]:
            assert (one["grads"][name] - many["grads"][name]).abs().max() < 2e-6 * max(1, largest), (case, name)
    by_case = {json.dumps(case, sort_keys=True): one["loss"].item() for case, one in zip(cases, results[0])}
    assert len({round(loss, 4) for loss in by_case.values()}) == len(cases) / 2  # chunks change nothing, the rest does


@pytest.mark.parametrize(
    "options",
    [
        ["--loss", "siglip", "--duplicates", "exclude"],
        ["--loss", "superclip"],
        ["--loss", "distill"],
        pytest.param(["--loss", "affinity"], marks=pytest.mark.slow),
    ],
    ids=lambda options: options[1],
)
def test_train_by_each_loss(options, caption_set, recipe, run_script, tiny_model):  # noqa: F811
    """From the command line, with GradCache: the loss falls, and the saved model loads."""
    if "distill" in options or "affinity" in options:
        tiny_model.save_pretrained(caption_set / "teacher")
        options = [*options, "--teacher", str(caption_set / "teacher")]
    flat(caption_set)
    run_script(
        "train.py", recipe, "--train_file", caption_set / "flat.json", "--max_steps", "12", "--logging_steps", "3",
        "--grad_cache_chunk_size", "6", *options,
    )  # fmt: skip
    history = json.loads((caption_set / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    model, _, _ = miniclip.load(caption_set / "run")
    assert (model.logit_bias is not None) == ("siglip" in options)
