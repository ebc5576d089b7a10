"""What is read is what runs: whoever changes the model, in model.py or in memory, sees the effect everywhere."""

import copy
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miniclip.inference import fast
from miniclip.inference.fast import WRITTEN_FOR, fingerprint, inference_copy, plain_reason
from miniclip.inference.feature_cache import FeatureCache
from miniclip.model import MLP, Attention, Block, QuickGELU, TextTransformer, Tower, VisionTransformer
from miniclip.training.grad_cache import wrap_towers
from miniclip.transforms import Preprocess
from tests.inference.test_fast import lowest_cosine, make_batch, make_model

ROOT = Path(__file__).resolve().parents[2]


def hashed(function) -> str | None:
    return fingerprint(function, function.__code__)


def test_fast_py_was_written_for_this_model_py():
    now = {(owner.__name__, name): hashed(getattr(owner, name)) for owner, name in WRITTEN_FOR}
    then = {(owner.__name__, name): expected for (owner, name), expected in WRITTEN_FOR.items()}
    assert now == then, "model.py has changed: bring inference/fast.py into line with it, then its WRITTEN_FOR"


def test_nothing_is_changed_by_what_training_does():
    model = make_model(quick_gelu=True)
    model.gradient_checkpointing_enable()
    wrap_towers(model, chunk_size=3)
    copies = [inference_copy(model, precision) for precision in fast.PRECISIONS]
    for ours in (model, copy.deepcopy(model), *copies):
        assert [plain_reason(tower) for tower in (ours.visual, ours.text)] == [None, None]
    assert all(tower.wrappers == (fast.fast_features,) for ours in copies for tower in (ours.visual, ours.text))


def silu(model, monkeypatch):
    model.visual.blocks[1].mlp.act = nn.SiLU()
    model.text.blocks[1].mlp.act = nn.SiLU()
    return "Block.mlp.act is a SiLU"


def rms_norm(model, monkeypatch):
    for tower in (model.visual, model.text):
        tower.blocks[2].ln_1 = nn.RMSNorm(tower.width)
    return "Block.ln_1 is a RMSNorm"


def no_mlp(model, monkeypatch):
    for tower in (model.visual, model.text):
        tower.blocks[0].mlp = nn.Linear(tower.width, tower.width)
    return "Block.mlp is a Linear"


class LoudBlock(Block):
    def forward(self, x, is_causal):
        return -super().forward(x, is_causal)


def subclass(model, monkeypatch):
    for tower in (model.visual, model.text):
        tower.blocks[-1].__class__ = LoudBlock
    return "Block is a LoudBlock"


def post_norm(self, x, is_causal):
    x = self.ln_1(x + self.attn(x, is_causal))
    return self.ln_2(x + self.mlp(x))


def function(model, monkeypatch):
    monkeypatch.setattr(Block, "forward", post_norm)
    return "Block.forward differs"


def a_lambda(model, monkeypatch):
    monkeypatch.setattr(Block, "forward", lambda self, x, is_causal: x + self.attn(self.ln_1(x), is_causal))
    return "Block.forward differs"


def no_source(model, monkeypatch):
    exec("def forward(self, x):\n    return x * torch.sigmoid(1.5 * x)", {"torch": torch}, space := {})
    monkeypatch.setattr(MLP, "forward", lambda self, x: self.c_proj(space["forward"](self, self.c_fc(x))))
    monkeypatch.setattr(QuickGELU, "forward", space["forward"])
    return "MLP.forward differs"


def decorated(model, monkeypatch):
    plain = Attention.forward

    @functools.wraps(plain)
    def forward(*args):
        return -plain(*args)

    monkeypatch.setattr(Attention, "forward", forward)
    return "Attention.forward differs"


def dropout(model, monkeypatch):
    def forward(self, x, is_causal):
        x = x + F.dropout(self.attn(self.ln_1(x), is_causal), 0.5, self.training)
        return x + self.mlp(self.ln_2(x))

    monkeypatch.setattr(Block, "forward", forward)
    return "Block.forward differs"


def run_blocks(model, monkeypatch):
    def backwards(self, x, is_causal):
        for block in self.blocks[::-1]:
            x = block(x, is_causal)
        return x

    monkeypatch.setattr(Tower, "run_blocks", backwards)
    return "Tower.run_blocks differs"


def features(model, monkeypatch):
    for kind, name in ((VisionTransformer, "features"), (TextTransformer, "embed_tokens")):
        plain = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, x, plain=plain: plain(self, x).abs())
    return "VisionTransformer.features differs"


def instance_method(model, monkeypatch):
    for tower in (model.visual, model.text):
        tower.blocks[1].forward = types.MethodType(post_norm, tower.blocks[1])
    return "Block.forward is replaced in an instance"


def instance_lambda(model, monkeypatch):
    for tower in (model.visual, model.text):
        tower.blocks[1].attn.forward = lambda x, is_causal: x
    return "Block.attn.forward is replaced in an instance"


def own_tower(model, monkeypatch):
    class Pooled(VisionTransformer):
        def features(self, pixel_values):
            x = self.embed_patches(self.conv1(pixel_values))
            return self.ln_post(self.run_blocks(x, is_causal=False).mean(dim=1))

    model.visual.__class__ = Pooled
    return "Pooled is not VisionTransformer itself"


def patches_of_another_kind(model, monkeypatch):
    model.visual.conv1.padding = (16, 16)
    model.visual.positional_embedding = nn.Parameter(torch.randn(37, 128))
    return "VisionTransformer.conv1 does not cut images into patches"


CHANGES = [
    silu, rms_norm, no_mlp, subclass, function, a_lambda, no_source, decorated, dropout, run_blocks, features,
    instance_method, instance_lambda, own_tower, patches_of_another_kind,
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_said_yet():
    fast._say.cache_clear()


def lines(caplog) -> list[str]:
    return [message for message in caplog.messages if "the plain model runs" in message]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_obeyed_and_said(change, when, monkeypatch, caplog):
    """In training and in inference copies, whether it comes before or after the towers are wrapped."""
    model, batch = make_model(), make_batch()
    unchanged = model(*batch)
    if when == "after":
        wrap_towers(model)
    reason = change(model, monkeypatch)
    plain = unwrapped(model)
    if when == "before":
        wrap_towers(model)
    for training in (True, False):
        ours, theirs = (seeded(each.train(training), batch) for each in (model, plain))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours[:2], theirs[:2]))
    assert change is dropout or not torch.allclose(ours.image_embeds, unchanged.image_embeds, atol=1e-3)
    for precision, least in (("fp32", 0.999999), ("bf16", 0.99), ("int8", 0.99)):
        assert lowest_cosine(inference_copy(model, precision), plain, *batch) > least, precision
    said = [
        line for line in caplog.messages if line.endswith(": the plain model runs (slower, same result as the code)")
    ]
    assert said[0].startswith(reason) and len(said) == (2 if change is features else 1), said


def unwrapped(model):
    """A copy that runs the plain code."""
    plain = copy.deepcopy(model)
    plain.visual.wrappers = plain.text.wrappers = ()
    return plain


def seeded(model, batch):
    torch.manual_seed(0)
    return model(*batch)


@pytest.mark.parametrize("where", ["blocks.1", "blocks.2.attn", "blocks.0.mlp.c_fc", "everywhere"])
def test_hooks_see_what_the_plain_code_computes(where, caplog):
    model, batch = make_model(), make_batch()
    shapes, wrapped = [], wrap_towers(copy.deepcopy(model))

    def see(module, args, output):
        if where != "everywhere" or type(module) is Block:
            shapes.append(tuple(output.shape))

    for ours in (model, wrapped):
        if where != "everywhere":
            ours.visual.get_submodule(where).register_forward_hook(see)
    every = nn.modules.module.register_module_forward_hook(see) if where == "everywhere" else None
    try:
        seen = []
        for encode in (model.encode_image, wrapped.encode_image,
                       *(inference_copy(model, precision).encode_image for precision in fast.PRECISIONS)):  # fmt: skip
            shapes.clear()
            encode(batch[0])
            seen.append(list(shapes))
        assert seen[0] and all(found == seen[0] for found in seen[1:]) and seen[0][0][:2] == (7, 17)
    finally:
        if every:
            every.remove()
    assert "a hook: the plain model runs" in caplog.text
    assert where != "everywhere" or plain_reason(wrapped.visual) is None, "and then the fast path again"


def test_features_of_changed_code_are_not_kept(tmp_path, monkeypatch, caplog):
    model = make_model()
    preprocess = Preprocess(model.config.preprocess_cfg)
    first = FeatureCache.for_images(tmp_path, model, preprocess)
    first.update([(b"0" * 32, np.zeros(128, np.float32))])
    first.save()
    assert len(FeatureCache.for_images(tmp_path, model, preprocess)) == 1
    function(model, monkeypatch)
    cache = FeatureCache.for_images(tmp_path, model, preprocess)
    assert len(cache) == 0 and "is neither read nor written" in caplog.text
    cache.update([(b"1" * 32, np.zeros(128, np.float32))])
    cache.save()
    assert len(list(tmp_path.glob("*/*.npy"))) == 1 and len(cache) == 1


def test_what_a_fingerprint_tells_apart(tmp_path):
    def variant(text: str):
        path = tmp_path / f"v{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        return path, module.C.forward

    text = "class C:\n    def forward(self, x):\n        return x * 1.702\n"
    path, forward = variant(text)
    same = text.replace("x * ", "(x\n                *  ").replace("702", "702)  # so it is").replace(
        "        return", '        """Doc."""\n\n        return')  # fmt: skip
    assert hashed(variant(same)[1]) == hashed(forward) is not None
    for old, new in (("1.702", "1.7020001"), ("return", "print(x)\n        return"), ("self, x", "self, x=2"),
                     ("    def", "    @staticmethod\n    def")):  # fmt: skip
        other = text.replace(old, new)
        assert hashed(variant(other)[1]) not in (None, hashed(forward))
    path, forward = variant(text.replace("702", "7"))
    path.write_text(text)  # what is imported is another
    assert hashed(forward) is None and fingerprint(len, None) is None


EDITS = {
    "none": {},
    "print and dropout": {
        "        x = x + self.attn(self.ln_1(x), is_causal)\n": "        print('block', *x.shape)\n"
        "        x = x + F.dropout(self.attn(self.ln_1(x), is_causal), 0.5, self.training)\n"
    },
    "activation": {"self.c_proj(self.act(self.c_fc(x)))": "self.c_proj(F.silu(self.c_fc(x)))"},
}
SCRIPT = """
import gc, json, os, runpy, sys
import datasets, faiss, torch, transformers.hf_argparser, transformers.trainer  # what all copies of the package import
import matplotlib.figure, matplotlib.font_manager, matplotlib.projections, matplotlib.backends.backend_agg
gc.freeze()
torch.set_num_threads(1)
children = []
for edit in sys.argv[2:]:
    if not (pid := os.fork()):
        break
    children.append(pid)
else:
    sys.exit(any([os.waitpid(pid, 0)[1] for pid in children]))
os.chdir(edit)
sys.path[0] = os.getcwd()
for stream, name in ((1, "out.txt"), (2, "err.txt")):
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
import miniclip
assert miniclip.__file__.startswith(os.getcwd())
for argv in json.loads(sys.argv[1]):
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
    print("=====")
for precision in (None, "fp32", "bf16", "int8"):
    model, preprocess, tokenizer = miniclip.load("start", precision=precision)
    image = miniclip.embed_images(model, preprocess, [f"{i}.png" for i in range(24)])
    print(json.dumps([image.tolist(), miniclip.embed_texts(model, tokenizer, ["a red sheet", "blue"]).tolist()]))
    print("=====")
"""


def test_an_edit_of_model_py_has_its_effect_everywhere(tiny_model, caption_set):
    """Copies of the package are edited, and train.py, evaluate.py and the library run from there."""
    for edit, lines in EDITS.items():
        folder = caption_set / edit
        shutil.copytree(ROOT / "miniclip", folder / "miniclip", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "model_configs", folder / "model_configs")
        for name in ("train.py", "evaluate.py"):
            shutil.copy(ROOT / name, folder)
        for path in (*caption_set.glob("*.png"), caption_set / "captions.json"):
            shutil.copy(path, folder)
        tiny_model.save_pretrained(folder / "start")
        model_py = folder / "miniclip" / "model.py"
        for old, new in lines.items():
            assert model_py.read_text().count(old) == 1
            model_py.write_text(model_py.read_text().replace(old, new))
        data = ["captions.json", "--output_dir", "run", "--use_cpu", "--bf16", "false", "--max_steps", "2"]
        data += ["--logging_steps", "1", "--per_device_train_batch_size", "12", "--disable_tqdm", "true"]
        argvs = [["train.py", "--model", "start", "--save_strategy", "no", "--train_file", *data],
                 ["evaluate.py", "--model", "start", "--eval_file", "captions.json"]]  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, json.dumps(argvs), *EDITS]
    done = subprocess.run(command, cwd=caption_set, text=True, capture_output=True, timeout=600)
    found = {}
    for edit in EDITS:
        out, err = ((caption_set / edit / name).read_text() for name in ("out.txt", "err.txt"))
        assert done.returncode == 0, done.stderr + err[-3000:]
        assert (out + err).count("the plain model runs") == (1 if EDITS[edit] else 0), err[-3000:]
        parts = out.split("=====\n")
        state = json.loads((caption_set / edit / "run" / "trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        metrics = json.loads((caption_set / edit / "start" / "retrieval_captions.json").read_text())["metrics"]
        found[edit] = parts, losses, metrics, [np.array(json.loads(part.splitlines()[-1])[0]) for part in parts[2:6]]
    plain, edited, other = found.values()
    assert "block" not in "".join(plain[0])
    assert "block 12 5 32" in edited[0][0] and "block 24 5 32" in edited[0][1], "training and evaluation"
    assert all("block 24 5 32" in part and part.count("block 2 ") == 2 for part in edited[0][2:6]), "the library"
    assert abs(edited[1][0] - plain[1][0]) > 1e-3, "dropout is for training alone"
    assert edited[2] == pytest.approx(plain[2])
    for a, b, c, atol in zip(plain[3], edited[3], other[3], (1e-5, 1e-5, 0.05, 0.05)):
        assert np.allclose(a, b, atol=atol) and np.abs(a - c).max() > 1e-2
    assert abs(other[1][0] - plain[1][0]) > 1e-3
