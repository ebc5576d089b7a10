"""A traced or exported model is right for batches and lengths other than those it was made with."""

import pytest
import torch
from torch import nn

from miniclip.training.grad_cache import wrap_towers
from tests.core.test_model import batch


class ImageTower(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.encode_image(x)


class TextTower(ImageTower):
    def forward(self, x):
        return self.model.encode_text(x)


def trace(module, example, dynamic):
    return torch.jit.trace(module, (example[:1],))


def export(module, example, dynamic):
    dims = {0: torch.export.Dim.DYNAMIC} | ({1: torch.export.Dim.DYNAMIC} if dynamic else {})
    return torch.export.export(module, (example,), dynamic_shapes=(dims,)).module()


def onnx(module, example, dynamic, dynamo=True):
    """ONNX in onnxruntime, by the exporter of today, or by the older one, which traces."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    path = f"{onnx.folder}/model.onnx"
    axes = {0: "batch", 1: "length"} if dynamic else {0: "batch"}
    given = {"dynamic_shapes": (axes,)} if dynamo else {"dynamic_axes": {"x": axes}}
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(module, (example[: 2 if dynamo else 1],), path, dynamo=dynamo, verbose=False, **names, **given)
    session = runtime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def onnx_traced(module, example, dynamic):
    return onnx(module, example, dynamic, dynamo=False)


@pytest.mark.filterwarnings("ignore")  # the tracer's, on the checks of shapes; torch.jit's, on its age
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "as trained"])
@pytest.mark.parametrize("make", [trace, export, onnx, onnx_traced])
def test_other_batches_and_lengths(make, fast, tiny_model, tmp_path):
    pixel_values, input_ids = batch(5, length=12)
    model, onnx.folder = wrap_towers(tiny_model) if fast else tiny_model, tmp_path
    with torch.no_grad():
        images, texts = tiny_model.encode_image(pixel_values), tiny_model.encode_text(input_ids)
        made = (
            make(ImageTower(model).eval(), pixel_values[:2], False),
            make(TextTower(model).eval(), input_ids[:2, :9].clone(), True),
        )
        for n in (1, 5):
            torch.testing.assert_close(made[0](pixel_values[:n]), images[:n], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(made[1](input_ids[:n]), texts[:n], atol=1e-5, rtol=1e-5)
        shorter = input_ids[:2, :7]  # their ends are at 4 and 5
        torch.testing.assert_close(made[1](shorter), texts[:2], atol=1e-5, rtol=1e-5)


def test_the_whole_model(tiny_model):
    pixel_values, input_ids = batch(4)
    dims = {0: torch.export.Dim.DYNAMIC}
    made = torch.export.export(tiny_model, (pixel_values[:2], input_ids[:2]), dynamic_shapes=(dims, dims)).module()
    for ours, theirs in zip(tiny_model(pixel_values, input_ids)[:3], made(pixel_values, input_ids)[:3]):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
