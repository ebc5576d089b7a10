import math

import pytest
import torch
import torch.nn.functional as F

from miniclip.loss import clip_loss


def test_two_pairs_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits with scale 2: [[2, 1.2], [0, 1.6]]; the mean of the cross-entropies of rows and of columns
    rows = (math.log(math.exp(2) + math.exp(1.2)) - 2 + math.log(1 + math.exp(1.6)) - 1.6) / 2
    columns = (math.log(math.exp(2) + 1) - 2 + math.log(math.exp(1.2) + math.exp(1.6)) - 1.6) / 2
    assert clip_loss(image, text, torch.tensor(2.0)).item() == pytest.approx((rows + columns) / 2, abs=1e-6)


def test_random_embeddings_cost_the_logarithm_of_the_batch():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(64, 512), dim=1) for _ in range(2))
    assert clip_loss(image, text, torch.tensor(1.0)).item() == pytest.approx(math.log(64), abs=0.01)


def test_the_temperature_is_used_and_learns():
    """Without it, 16 perfect pairs could not get below log(1 + 15 / e), and the scale would have no gradient."""
    embeds, scale = torch.eye(16), torch.tensor(100.0, requires_grad=True)
    loss = clip_loss(embeds, embeds, scale)
    assert loss.item() < 1e-6 < math.log(1 + 15 / math.e)
    scale = torch.tensor(2.0, requires_grad=True)
    clip_loss(embeds, embeds, scale).backward()
    assert scale.grad < 0  # perfect pairs ask for a larger scale


def test_symmetry():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
    scale = torch.tensor(10.0)
    assert clip_loss(image, text, scale).item() == pytest.approx(clip_loss(text, image, scale).item(), abs=1e-6)
