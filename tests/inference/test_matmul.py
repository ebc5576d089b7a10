"""The precision of fp32 products, which torch has two ways to set."""

import pytest
import torch

from miniclip.inference.fast import inference_copy
from miniclip.inference.matmul import full_precision, matmul_precision, rounds

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
        assert [setting.fp32_precision for setting in SETTINGS] == before
        if way.startswith("as Trainer"):  # what it sets later still counts
            BACKENDS.fp32_precision = "ieee"
            assert not rounds("cuda") and not rounds("cpu")
    finally:
        BACKENDS.fp32_precision, BACKENDS.cudnn.allow_tf32 = "none", True
        torch.set_float32_matmul_precision("highest")
