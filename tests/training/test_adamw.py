"""AdamW with averages in bf16: how close it stays to torch's, what it keeps, and that a run resumes with it."""

import copy

import pytest
import torch
from torch import nn

from miniclip.training.adamw import AdamWBf16
from miniclip.training.grad_cache import wrap_towers
from miniclip.utils.errors import InputError
from tests.inference.test_fast import make_batch, make_model
from tests.survival_trainer import make_trainer

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


def make_parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((500, 8), (24, 8), (8,), ())]


def train(optimizer, steps: range):
    """Draws gradients around 1 from the number of a step; of the first matrix rows 0 to 2 n + 20 occur in step n."""
    for step in steps:
        torch.manual_seed(step)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p) + 1
            if len(p.shape) and len(p) == 500:
                p.grad[2 * step + 20 :] = 0
        optimizer.step()


def test_it_stays_close_to_adamw_and_keeps_half_or_less():
    ours, plain = (kind(make_parameters(), **OPTIONS) for kind in (AdamWBf16, torch.optim.AdamW))
    start = make_parameters()
    for optimizer in (ours, plain):
        train(optimizer, range(40))
    for p, q, before in zip(ours.param_groups[0]["params"], plain.param_groups[0]["params"], start):
        assert (p - q).norm() < 0.01 * (q - before).norm()
        state = ours.state[p]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    table, other = ours.param_groups[0]["params"][0], plain.param_groups[0]["params"][0]
    assert torch.allclose(table[98:], other[98:], rtol=1e-5)  # those that never occurred only decayed
    assert sorted(ours.state[table]["rows"].tolist()) == list(range(98)) and len(ours.state[table]["exp_avg"]) == 98


def test_an_average_with_a_long_memory_still_decays():
    p = nn.Parameter(torch.ones(1000, 4))
    optimizer = AdamWBf16([p], **OPTIONS | {"betas": (0.9, 0.999)})
    for step in range(500):
        p.grad = torch.full_like(p, float(step == 0))
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].float().mean() == pytest.approx(0.001 * 0.999**499, rel=0.01)


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    whole, first = (AdamWBf16(make_parameters(), **OPTIONS) for _ in range(2))
    train(whole, range(8))
    train(first, range(4))
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = AdamWBf16(copy.deepcopy(first.param_groups[0]["params"]), **OPTIONS)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(second, range(4, 8))
    for p, q in zip(second.param_groups[0]["params"], whole.param_groups[0]["params"]):
        assert torch.equal(p, q) and second.state[p]["exp_avg"].dtype == torch.bfloat16


def test_a_run_has_it_by_an_argument_and_holds_one_batch(tmp_path):
    options = {"optim_args": "states=bf16", "grad_cache_chunk_size": 2, "save_steps": 2}
    trainer = make_trainer(tmp_path / "a", 3, **options)
    read, draw, seen = [], trainer.train_dataset.__class__.__getitem__, []
    trainer.train_dataset.__class__ = type("Counted", (trainer.train_dataset.__class__,), {
        "__getitem__": lambda self, index: read.append(index) or draw(self, index)})  # fmt: skip
    trainer.callback_handler.callbacks[-1].on_step_end = lambda *args, **more: seen.append(len(read))
    trainer.train()
    assert seen == [4, 8, 12]  # nothing is read ahead
    state = trainer.optimizer.state[trainer.model.text.token_embedding.weight]
    assert state["exp_avg"].dtype == torch.bfloat16 and 8 < len(state["rows"]) < 16
    again = make_trainer(tmp_path / "a", 3, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for p, q in zip(again.model.parameters(), trainer.model.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("given, words", [
    ({"optim_args": "states=fp8"}, "states is fp8. It must be bf16"),
    ({"optim_args": "states=bf16", "optim": "adafactor"}, "states has no effect with optim adafactor"),
])  # fmt: skip
def test_other_states_are_refused(tmp_path, given, words):
    with pytest.raises(InputError, match=words):
        make_trainer(tmp_path, **given)


def test_chunks_read_no_more_of_the_embedding_than_occurs(monkeypatch):
    """The gradient is the same, without a table of the whole vocabulary for each chunk."""
    model, (pixel_values, input_ids) = make_model().train(), make_batch()
    sizes, embed, gradients = [], nn.functional.embedding, []
    monkeypatch.setattr(nn.functional, "embedding",
                        lambda ids, weight, *more: sizes.append(len(weight)) or embed(ids, weight, *more))  # fmt: skip
    for fast in (True, False):
        model.zero_grad()
        outputs = wrap_towers(model, None, 2, fast)(pixel_values, input_ids)
        outputs.text_embeds[:, 0].sum().backward()
        gradients.append(model.text.token_embedding.weight.grad)
    vocabulary = model.config.text_cfg.vocab_size
    assert set(sizes) == {len(input_ids.unique()), vocabulary} and gradients[0].shape[0] == vocabulary
    assert torch.allclose(*gradients, atol=1e-6) and isinstance(model.text.token_embedding.weight, nn.Parameter)
