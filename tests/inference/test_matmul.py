"""Matrix products: the precision of those in fp32, which torch has two ways to set, and those of integers."""

import pytest
import torch

from miniclip.inference import matmul
from miniclip.inference.fast import inference_copy
from miniclip.inference.matmul import Int8Linear, full_precision, matmul_precision, packs, rounds

BACKENDS = torch.backends
SETTINGS = (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)
WAYS = {
    "defaults": lambda: None,
    "as Trainer does, for --tf32 and --torch_compile": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "as Trainer does, for --tf32 false": lambda: setattr(BACKENDS, "fp32_precision", "ieee"),
    "the older way": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.mark.parametrize("way", WAYS)
def test_both_ways_to_set_the_precision(way, tiny_model):
    """After the newer way the older one cannot be read, which ended every evaluation during training with --tf32."""
    try:
        WAYS[way]()
        before = [setting.fp32_precision for setting in SETTINGS]
        with full_precision():
            assert not rounds("cpu") and not rounds("cuda") and torch.get_float32_matmul_precision() == "highest"
            assert not BACKENDS.cudnn.allow_tf32 and [s.fp32_precision for s in SETTINGS] == ["ieee"] * 4
            with matmul_precision("high"):
                assert rounds("cpu") and rounds("cuda")
            assert not rounds("cpu")
        assert [setting.fp32_precision for setting in SETTINGS] == before
        copy = inference_copy(tiny_model)
        assert copy.encode_text(torch.tensor([[49406, 320, 49407]])).isfinite().all()
        with copy.inference():
            assert [s.fp32_precision for s in SETTINGS] == ["ieee"] * 4, "nor do convolutions round on a GPU"
        assert [setting.fp32_precision for setting in SETTINGS] == before
        if way.startswith("as Trainer"):  # what it sets later still counts
            BACKENDS.fp32_precision = "ieee"
            assert not rounds("cuda") and not rounds("cpu")
    finally:
        BACKENDS.fp32_precision, BACKENDS.cudnn.allow_tf32 = "none", True
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("one_dnn", [True, False])
def test_products_of_8_bit_integers(one_dnn, dtype, error, bias, monkeypatch):
    """Each row and each column has a scale of its own, whatever is in the others, NaN included; rows may be zero."""
    if one_dnn and not packs("int8"):
        pytest.skip("this processor has no instruction for it")
    monkeypatch.setattr(matmul, "packs", lambda precision: one_dnn)
    linear = torch.nn.Linear(96, 40, bias=bias, dtype=dtype)
    linear.weight.data *= torch.logspace(-3, 3, 40)[:, None]
    x = torch.randn(5, 96).mul(torch.tensor([1e-3, 1, 0, 1e3, 7])[:, None]).to(dtype)
    with torch.inference_mode():
        alone = (layer := Int8Linear(linear))(x[3:4])
        x[1, 7] = torch.nan
        broken, x[1, 7] = layer(x), 1
        products, rest = layer(x), [0, 2, 3, 4]
    assert products.dtype == dtype and torch.equal(alone, products[3:4])
    assert broken[1].isnan().all() and torch.equal(broken[rest], products[rest])
    if bias:
        assert torch.equal(products[2], linear.bias)
    integers, scales = [], []
    for rows in (x, linear.weight.detach().float()):
        scales.append((rows.abs().amax(dim=1, keepdim=True) / 126).double().clamp_min(1e-30))
        integers.append((rows / scales[-1].to(rows.dtype)).double().round())
        assert integers[-1].abs().max() in (126, 127)
    by_hand = integers[0] @ integers[1].T * scales[0] * scales[1].T
    terms = by_hand.abs() + scales[0] * scales[1].T
    if bias:
        by_hand, terms = by_hand + linear.bias.double(), terms + linear.bias.abs()
    assert ((products - by_hand).abs() <= error * terms).all()
    with torch.no_grad():
        exact = linear.double()(x.double())
    assert torch.nn.functional.cosine_similarity(products.double(), exact)[[0, 1, 3, 4]].min() > 0.999
