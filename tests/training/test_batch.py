"""Large batches in chunks, and locked towers: the gradients of one step, and whole runs."""

import json
from types import SimpleNamespace

import pytest
import torch

import miniclip
from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.inference.fast import inference_copy
from miniclip.inference.feature_cache import FeatureCache
from miniclip.loss import clip_loss
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.freeze import FrozenDataset, freeze, freeze_towers
from miniclip.training.grad_cache import wrap_towers
from miniclip.training.trainer import RunTrainer
from miniclip.utils.errors import InputError
from tests.inference.test_fast import make_batch, make_model
from tests.training.test_training import ROOT, largest_difference, recipe, weights  # noqa: F401


def step(model, chunk_size: int, dtype=None, fast=False, **inputs) -> tuple[float, list[torch.Tensor]]:
    """The loss of a batch and its gradients, with the random numbers that follow seed 3."""
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        outputs = wrap_towers(model, None, chunk_size, fast)(**inputs)
    loss = clip_loss(*outputs[:3])
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("chunk_size", [1, 3, 7])
@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_chunks_give_the_gradients_of_the_whole_batch(chunk_size, patch_dropout):
    model, (pixel_values, input_ids) = make_model().train(), make_batch()
    model.visual.patch_dropout = patch_dropout
    batch = {"pixel_values": pixel_values, "input_ids": input_ids, "fast": True}
    # uniform numbers come one after another, so that chunks draw those that the batch would
    loss, direct = step(model, 0, **batch)
    ours, cached = step(model, chunk_size, **batch)
    assert ours == pytest.approx(loss, abs=1e-5)
    for (name, _), a, b in zip(model.named_parameters(), direct, cached):
        assert torch.allclose(a, b, atol=1e-5), name
    assert patch_dropout == 0 or step(model, 0, **batch)[0] == loss


def test_chunks_in_bf16():
    """Each chunk's gradient is rounded to bf16 before it is added; so near the direct gradients, and no further from
    those in fp32 than they are."""
    model, (pixel_values, input_ids) = make_model().train(), make_batch()
    batch = {"pixel_values": pixel_values, "input_ids": input_ids}
    exact, (_, direct), (_, cached) = (
        step(model, 0, **batch)[1], step(model, 0, torch.bfloat16, **batch), step(model, 3, torch.bfloat16, **batch)
    )  # fmt: skip
    exact, direct, cached = (torch.cat([g.flatten() for g in grads]) for grads in (exact, direct, cached))
    assert (cached - exact).norm() < 1.1 * (direct - exact).norm()
    assert torch.nn.functional.cosine_similarity(direct, cached, dim=0) > 0.9999
    assert (cached - direct).abs().mean() < 1e-5


def test_what_is_kept_for_the_backward_pass_is_that_of_a_chunk():
    model, (pixel_values, input_ids) = make_model().train(), make_batch()
    kept = {}
    for chunk_size in (0, 1):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.nbytes) or t, lambda t: t):
            wrap_towers(model, None, chunk_size, fast=False)(pixel_values, input_ids)
        kept[chunk_size] = sum(sizes)
    assert kept[1] < kept[0] / 20


def test_levels_are_normalised_on_the_way():
    model = make_model()
    preprocess = miniclip.Preprocess(model.config.preprocess_cfg)
    levels = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    expected = model.encode_image(preprocess.normalize(levels), normalize=True)
    for chunk_size in (0, 2):
        ours = wrap_towers(model, preprocess.normalize, chunk_size)(pixel_values=levels)
        assert torch.allclose(ours.image_embeds, expected, atol=1e-6) and ours.text_embeds is None


def test_two_processes_in_chunks_equal_one_with_the_whole_batch(tmp_path, tiny_model, tiny_config, run_script):
    from tests.core.test_model import batch

    pixel_values, input_ids = batch(8, 14)
    loss = clip_loss(*tiny_model.train()(pixel_values, input_ids)[:3])
    loss.backward()
    saved = {"config": tiny_config.to_dict(), "weights": tiny_model.state_dict(), "chunk_size": 3}
    torch.save({**saved, "pixel_values": pixel_values, "input_ids": input_ids}, tmp_path / "batch.pt")
    run_script(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "tests/gradients_worker.py", tmp_path / "batch.pt", tmp_path / "grads.pt", env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    two = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert two["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
    for name, p in tiny_model.named_parameters():
        assert torch.allclose(p.grad, two["grads"][name], atol=1e-5), name


def test_a_run_in_chunks_ends_at_the_same_weights(recipe, caption_set, run_script):  # noqa: F811
    steps = ["--max_steps", "4", "--adam_epsilon", "1e-3"]  # Adam's first steps make 1 of the smallest difference
    run_script("train.py", recipe, *steps, "--output_dir", caption_set / "whole")
    run_script("train.py", recipe, *steps, "--output_dir", caption_set / "chunks", "--grad_cache_chunk_size", "5")
    assert largest_difference(caption_set / "whole", caption_set / "chunks") < 1e-5


def test_accumulation_says_what_it_does_not_do(tmp_path, caplog):
    RunArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert "adds no negatives" in caplog.text
    assert "--per_device_train_batch_size 32 --grad_cache_chunk_size 8" in caplog.text


@pytest.fixture
def parts(tiny_model, caption_set):
    records = miniclip.read_captions(caption_set / "captions.json")
    preprocess, tokenizer = miniclip.Preprocess(tiny_model.config.preprocess_cfg), miniclip.Tokenizer(16)
    args = RunArguments(
        str(caption_set / "run"), use_cpu=True, bf16=False, per_device_train_batch_size=12, max_steps=5,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2, adam_epsilon=1e-3,
    )  # fmt: skip
    return tiny_model, args, records, preprocess, tokenizer


@pytest.mark.parametrize("image, text", [("all", "none"), ("tower", "tower"), ("none", "tower")])
def test_features_computed_once_train_as_the_locked_tower_would(image, text, parts, caption_set):
    import copy

    model, args, records, preprocess, tokenizer = parts
    running, before = copy.deepcopy(model), copy.deepcopy(model).state_dict()
    freeze(running, image, text)
    dataset = RunDataset(records, preprocess, seed=args.seed)
    RunTrainer(running, args, dataset, preprocess=preprocess, tokenizer=tokenizer).train()

    options = SimpleNamespace(frozen=(image, text), feature_cache=None)
    make_dataset, caches = freeze_towers(model, options, args, records, preprocess, tokenizer)
    trainer = RunTrainer(
        model, args, make_dataset(records, preprocess, seed=args.seed), preprocess=preprocess, tokenizer=tokenizer,
        evaluator=RetrievalEvaluator(records, preprocess, tokenizer, caches=caches),
    )  # fmt: skip
    calls = []
    tower = model.visual if image != "none" else model.text
    tower.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))  # so that no fast path goes around it
    trainer.train()
    assert not calls
    for (name, p), q in zip(model.named_parameters(), running.parameters()):
        assert torch.allclose(p, q, atol=1e-5), name
    projections = {"visual.proj.weight": image, "text.text_projection.weight": text}
    towers = {"visual": image, "text": text}
    for name, p in model.named_parameters():
        how = projections.get(name) or towers.get(name.split(".")[0], "none")
        locked = how == "all" or (how == "tower" and name not in projections)
        assert torch.equal(p, before[name]) == locked, name
    metrics, after = trainer.evaluate(), [None if cache is None else cache.reused for cache in caches]
    assert 0 < metrics["eval_mean_recall"] <= 1
    assert after == [24 if image != "none" else None, 48 if text != "none" else None]


def test_a_locked_dataset_draws_the_captions_that_the_usual_one_draws(parts):
    model, args, records, preprocess, tokenizer = parts
    usual = RunDataset(records, preprocess, seed=5)
    texts = [text for record in records for text in record["caption"]]
    image, text = torch.randn(24, 8).numpy(), torch.arange(48.0).view(48, 1).numpy()
    ours = FrozenDataset(records, preprocess, seed=5, image_features=image, text_features=None)
    both = FrozenDataset(records, preprocess, seed=5, image_features=image, text_features=text)
    captions = FrozenDataset(records, preprocess, seed=5, image_features=None, text_features=text)
    for dataset in (usual, ours, both, captions):
        dataset.set_epoch(2)
    for i in range(24):
        assert ours[i]["caption"] == usual[i]["caption"] == texts[int(both[i]["text_features"])]
        assert torch.equal(captions[i]["pixel_values"], usual[i]["pixel_values"])
        assert set(captions[i]) == {"pixel_values", "text_features", "pair_ids", "row"}
        assert set(both[i]) == {"image_features", "text_features", "pair_ids", "row"}
        assert ours[i]["pair_ids"] == both[i]["pair_ids"] == captions[i]["pair_ids"] == usual[i]["pair_ids"]


def test_locking_everything_is_refused(tiny_model):
    with pytest.raises(InputError, match="nothing is left to learn"):
        freeze(tiny_model, "all", "all")


def test_train_with_a_locked_tower_and_a_cache(recipe, caption_set, run_script):  # noqa: F811
    options = ["--freeze_image", "tower", "--hflip", "0", "--color_jitter", "0", "--num_train_epochs", "2"]
    options += ["--eval_file", caption_set / "captions.json", "--feature_cache", caption_set / "cache"]
    options += ["--fast", "false"]  # how products are made is chosen by a measurement, which a busy moment can turn
    start = ["--model", caption_set / "start"]
    config = miniclip.MiniClipConfig.from_json(caption_set / "tiny.json")
    miniclip.MiniClip(config).save_pretrained(caption_set / "start")
    first = run_script("train.py", recipe, *options, *start)
    assert "0 of 24 images were cached" in first.stdout
    second = run_script("train.py", recipe, *options, *start, "--output_dir", caption_set / "again")
    assert "24 of 24 images were cached" in second.stdout
    assert largest_difference(caption_set / "run", caption_set / "again") == 0
    started = miniclip.load(caption_set / "start")[0].state_dict()
    for name, tensor in weights(caption_set / "run").items():
        locked = name.startswith("visual") and name != "visual.proj.weight"
        assert torch.equal(tensor, started[name]) == locked, name
    done = run_script("train.py", recipe, "--freeze_image", "all", check=False)
    assert done.returncode != 0 and "hflip and color_jitter make other pictures" in done.stderr


def test_evaluate_takes_features_from_the_cache(tiny_model, caption_set, run_script):
    tiny_model.save_pretrained(caption_set / "model")
    common = ["evaluate.py", "--model", caption_set / "model", "--eval_file", caption_set / "captions.json"]
    results = []
    for expected in ("0 of 24", "24 of 24", "23 of 24"):
        if expected == "23 of 24":  # other content, same name
            (caption_set / "3.png").write_bytes((caption_set / "4.png").read_bytes() + b"\0")
        done = run_script(*common, "--feature_cache", caption_set / "cache", "--output_file", caption_set / "out.json")
        assert f"{expected} images were in" in done.stdout
        assert "fp32: cosine to plain fp32 at least 1.0000" in done.stdout
        results.append(json.loads((caption_set / "out.json").read_text())["metrics"])
    assert results[0] == results[1]
    done = run_script(*common, "--precision", "bf16", "--output_file", caption_set / "out.json")
    assert "bf16: cosine to plain fp32 at least 0.99" in done.stdout


def test_a_cache_is_for_one_tower_and_finds_damage(tiny_model, caption_set, tmp_path):
    preprocess = miniclip.Preprocess(tiny_model.config.preprocess_cfg)
    paths = [caption_set / f"{i}.png" for i in range(24)]
    folder = tmp_path / "cache"

    def embed(preprocess=preprocess):
        cache = FeatureCache.for_images(folder, tiny_model, preprocess)
        return cache, miniclip.embed_images(tiny_model, preprocess, paths, cache=cache)

    plain = miniclip.embed_images(tiny_model, preprocess, paths)
    assert all((embed()[1] == plain).all() for _ in range(2))
    assert embed()[0].reused == 24 and len(embed()[0]) == 24
    torch.nn.init.normal_(tiny_model.visual.proj.weight)  # comes after the features
    cache, embeds = embed()
    assert cache.reused == 24 and (embeds != plain).any()
    assert (embeds == miniclip.embed_images(tiny_model, preprocess, paths)).all()
    assert embed(miniclip.Preprocess(preprocess.cfg, draft=False))[0].reused == 0
    with torch.no_grad():
        tiny_model.visual.blocks[1].mlp.c_proj.bias[0] += 1e-3
    assert embed()[0].reused == 0

    part = max(folder.glob("*/*.npy"), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged: its features are computed again"):
        cache, embeds = embed()
    assert cache.reused == 0 and (embeds == miniclip.embed_images(tiny_model, preprocess, paths)).all()
    assert not list(folder.glob("*/.*"))
    with pytest.raises(InputError, match="without a precision"):
        FeatureCache.for_images(folder, inference_copy(tiny_model), preprocess)
