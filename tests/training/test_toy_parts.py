"""A loss and an evaluator of somebody's own, without a line in the package: registered, trained with, measured with."""

import json

import pytest
import torch

import miniclip
import train
from miniclip.inference.evaluator import Evaluator, RetrievalEvaluator
from miniclip.loss import clip_loss
from miniclip.training.losses import LOSSES
from miniclip.utils.errors import InputError


class Spread(Evaluator):
    """The mean cosine between different images: a metric that retrieval does not have."""

    primary_metric = "spread"

    def __init__(self, paths, preprocess):
        self.paths, self.preprocess = paths, preprocess

    def metric_names(self) -> set[str]:
        return {"spread"}

    def __call__(self, model) -> dict[str, float]:
        embeds = torch.from_numpy(miniclip.embed_images(model, self.preprocess, self.paths))
        cosines = embeds @ embeds.T
        return {"spread": 1 - (cosines.sum() - cosines.trace()).item() / (len(cosines) * (len(cosines) - 1))}


@pytest.fixture
def parts(tiny_model, caption_set):
    records = miniclip.read_captions(caption_set / "captions.json")
    return tiny_model, records, miniclip.Preprocess(tiny_model.config.preprocess_cfg), miniclip.Tokenizer(16)


@pytest.mark.parametrize("trainer_class", ["ClipTrainer", "RunTrainer"])
def test_an_evaluator_chooses_the_best_checkpoint(trainer_class, parts, caption_set):
    model, records, preprocess, tokenizer = parts
    how = {
        "num_train_epochs": 3, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True,
        "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "warmup_steps": 0,
        "metric_for_best_model": "spread",
    }  # fmt: skip
    evaluator, more = Spread([record["image"] for record in records], preprocess), {}
    if trainer_class == "ClipTrainer":
        args = miniclip.ClipTrainingArguments(str(caption_set / "run"), **how)
        dataset = miniclip.CaptionDataset(records, preprocess)
    else:
        args = miniclip.RunArguments(str(caption_set / "run"), **how)
        dataset, more = miniclip.RunDataset(records, preprocess), {"preprocess": preprocess}
    trainer_of = getattr(miniclip, trainer_class)
    trainer = trainer_of(model, args, dataset, tokenizer=tokenizer, evaluator=evaluator, **more)
    before = evaluator(model)["spread"]
    trainer.train()
    found = [entry["eval_spread"] for entry in trainer.state.log_history if "eval_spread" in entry]
    assert len(found) == 3 and before not in found
    assert trainer.state.best_metric == max(found) and trainer.evaluate()["eval_spread"] == max(found)


def test_a_loss_is_named_on_the_command_line(parts, caption_set, monkeypatch):
    """Twice InfoNCE, registered under a name: the first loss is twice that of `--loss clip`."""
    model, *_ = parts
    model.save_pretrained(caption_set / "model")

    def twice(model, options, args):
        return lambda outputs, batch: 2 * clip_loss(*outputs[:3])

    monkeypatch.setitem(LOSSES, "twice", twice)
    losses = {}
    for name in ("clip", "twice"):
        train.main([
            "--model", str(caption_set / "model"), "--train_file", str(caption_set / "captions.json"), "--loss", name,
            "--output_dir", str(caption_set / name), "--max_steps", "1", "--per_device_train_batch_size", "24",
            "--logging_steps", "1", "--warmup_steps", "0", "--use_cpu", "--duplicates", "ignore",
            "--disable_tqdm", "true", "--holdout", "0",
        ])  # fmt: skip
        log = json.loads((caption_set / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = log[0]["loss"]
    assert losses["twice"] == pytest.approx(2 * losses["clip"], rel=1e-5)
    trained, _, _ = miniclip.load(caption_set / "twice")
    assert any(not torch.equal(p, q) for p, q in zip(trained.parameters(), model.parameters()))
    with pytest.raises(InputError, match="loss is twise. It must be clip, siglip"):
        train.main(["--model", str(caption_set / "model"), "--train_file", "x.json", "--loss", "twise"])


def test_metrics_of_a_second_evaluation_set(parts):
    """Two retrieval evaluators as one, each under its own name."""
    model, records, preprocess, tokenizer = parts

    class Both(Evaluator):
        def __init__(self, **evaluators):
            self.evaluators = evaluators

        def __call__(self, model):
            found = {name: evaluator(model) for name, evaluator in self.evaluators.items()}
            return {f"{name}_{metric}": value for name, metrics in found.items() for metric, value in metrics.items()}

    few = RetrievalEvaluator(records[:6], preprocess, tokenizer)
    metrics = Both(all=RetrievalEvaluator(records, preprocess, tokenizer), few=few)(model)
    assert metrics["few_mean_recall"] >= metrics["all_mean_recall"], "fewer images are easier to search"
    assert {name.split("_")[0] for name in metrics} == {"all", "few"}
