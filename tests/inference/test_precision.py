"""`--precision auto`: what is measured decides, once for a model and a machine."""

import copy
import json
import time

import pytest
import torch

import miniclip
from miniclip.commands import speed
from miniclip.config import MiniClipConfig
from miniclip.inference import peak, precision
from miniclip.inference.fast import InferenceClip, inference_copy
from miniclip.inference.matmul import Route
from miniclip.inference.precision import Seconds, compare, made_up, settle, suggest_bf16


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Plays a machine: gives the list of what was measured; `set(speed, cosine)` says what is found."""
    calls, found = [], {}

    def play(model, precisions, cases):
        calls.append(precisions)
        seconds = {(p, case): Seconds(9.0, 1 / found[p][0]) for p in precisions for case in cases}
        return seconds, {p: found[p][1] for p in precisions}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "SMALL", 0)
    monkeypatch.setattr(precision, "packs", lambda precision: True)
    monkeypatch.setattr(precision, "compare", play)
    calls_and_found = type("Machine", (), {"calls": calls, "found": found})
    found["fp32"] = (1.0, 1.0)
    return calls_and_found


@pytest.mark.parametrize("speed, cosine, chosen", [
    (1.4, 0.99991, "bf16"), (1.29, 0.99999, "fp32"), (3.0, 0.99989, "fp32"), (3.0, float("nan"), "fp32"),
])  # fmt: skip
def test_bf16_is_taken_where_it_is_proved(speed, cosine, chosen, measured, tiny_model, capsys, monkeypatch):
    measured.found["bf16"] = (speed, cosine)
    assert settle(tiny_model, "auto") == chosen
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"precision auto takes {chosen}: bf16 is {speed:.1f} times as fast")
    assert (f"{cosine:.5f}" in line) and ("needs more than 1.3" in line) == (chosen == "fp32")
    measured.found["bf16"] = (9, 1) if chosen == "fp32" else (0.1, 0)
    assert settle(tiny_model, "auto", quiet=True) == chosen, "what was found the first time"
    assert measured.calls == [("fp32", "bf16")] and not capsys.readouterr().err
    tiny_model.text.ln_final.weight.data *= 2
    assert settle(tiny_model, "auto") != chosen, "another model is measured anew"


@pytest.mark.parametrize("bf16, packed, said", [
    (9.2, 1.1, "9.2"), (9.2, 2.0, "4.6"), (3.0, 2.0, "1.5"), (2.5, 2.0, None), (None, 2.0, None),
])  # fmt: skip
def test_bf16_is_suggested_where_it_is_faster(bf16, packed, said, monkeypatch, capsys, tiny_model):
    routes = {
        "default": Route(False, 1.0, 1e-7), "medium": Route(False, 9.0, 1e-3),  # which rounds to bf16
        "packed": Route(packed >= 1.2, packed, 1e-7), **({"bf16": Route(False, bf16, 1e-3)} if bf16 else {}),
    }  # fmt: skip
    monkeypatch.setattr(precision, "cpu_routes", lambda: routes)
    suggest_bf16(tiny_model, "fp32")
    assert not capsys.readouterr().err, "a small model waits for its images"
    monkeypatch.setattr(precision, "SMALL", 1000)
    for asked, model in (
        ("bf16", tiny_model), ("int8", tiny_model), ("fp32", copy.deepcopy(tiny_model).to("meta")),
        ("fp32", tiny_model), ("fp32", inference_copy(tiny_model)),
    ):  # fmt: skip
        suggest_bf16(model, asked)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (said is not None) and all(f"{said} times as fast as fp32" in line for line in lines)


def test_a_gpu_is_measured_with_as_many_as_make_it_work(measured, tiny_model, monkeypatch):
    """In batches of a few it waits for the CPU in either precision."""
    seen, play = [], precision.compare
    monkeypatch.setattr(precision, "compare", lambda *args: seen.append(args[2]) or play(*args))
    measured.found["bf16"] = (2.0, 0.99995)
    for model in (tiny_model, copy.deepcopy(tiny_model).to("meta")):
        monkeypatch.setattr(precision, "fingerprint", lambda *_, device=model.logit_scale.device: str(device))
        precision.rates(model, ("fp32", "bf16"))
    assert seen == [(("image", 8), ("text", 32)), (("image", 64), ("text", 64))]


def test_where_nothing_is_measured(measured, tiny_model, monkeypatch):
    assert [settle(tiny_model, given) for given in ("fp32", "bf16")] == ["fp32", "bf16"]
    copies = [inference_copy(tiny_model, given) for given in ("fp32", "bf16")]
    assert [settle(copy, "auto") for copy in copies] == ["fp32", "bf16"], "as it was loaded"
    monkeypatch.setattr(precision, "packs", lambda precision: False)
    assert settle(tiny_model, "auto") == "fp32"
    monkeypatch.setattr(precision, "packs", lambda precision: True)
    monkeypatch.setattr(precision, "SMALL", 5_000_000)
    assert settle(tiny_model, "auto") == "fp32" and not measured.calls


@pytest.mark.parametrize("int8, said", [(0.5, "int8 takes 4.0 times as long as bf16 here"), (2.5, None)])
def test_int8_is_computed_but_slower_int8_is_told(int8, said, measured, tiny_model, capsys, monkeypatch):
    measured.found |= {"bf16": (2.0, 0.99995), "int8": (int8, 0.999)}
    assert settle(tiny_model, "int8") == "int8" and measured.calls == [("bf16", "int8")]
    assert capsys.readouterr().err.startswith(said) if said else not capsys.readouterr().err
    settle(tiny_model, "int8")
    assert len(measured.calls) == 1
    monkeypatch.setitem(precision.FORMATS, "int8", 0)  # as before its arithmetic became another
    settle(tiny_model, "int8")
    assert len(measured.calls) == 2


def test_load_takes_what_is_found(measured, tiny_model, tmp_path):
    measured.found["bf16"] = (2.0, 0.99995)
    tiny_model.save_pretrained(tmp_path / "model")
    model, _, _ = miniclip.load(tmp_path / "model", precision="auto")
    assert isinstance(model, InferenceClip) and model.precision == "bf16"
    (kept,) = (tmp_path / "cache" / "miniclip").glob("precisions-*.json")
    assert json.loads(kept.read_text())["rates"]["bf16"][2] == 0.99995


def test_what_is_measured(tiny_model):
    cases = (("image", 3), ("text", 5))
    seconds, cosines = compare(tiny_model, ("fp32", "bf16", "int8"), cases, rounds=1)
    assert set(seconds) == {(precision, case) for precision in ("fp32", "bf16", "int8") for case in cases}
    assert all(0 < one.wall < 60 and 0 < one.busy < 60 for one in seconds.values())
    assert cosines["fp32"] > 1 - 1e-6 > cosines["bf16"] > 0.999 and cosines["int8"] > 0.98
    with torch.inference_mode():  # of the same pictures and sentences in each run
        assert compare(tiny_model, ("bf16",), cases, rounds=1)[1]["bf16"] == cosines["bf16"]


def test_the_limit_and_the_share_of_it(tiny_model, monkeypatch, capsys, tmp_path):
    """Operations are counted as by hand; the command prints what was measured beside them."""
    monkeypatch.setattr(peak, "LONG", 0.01)
    found = {name: peak.least_seconds(multiply) for name, multiply in peak.products(square=64).items()}
    assert {"fp32", "int8"} <= set(found) and max(found.values()) < 0.5
    rows, W, layers = 5, 32, 2  # a class token and 2 x 2 patches of 16 x 16
    blocks = layers * (rows * 2 * 12 * W**2 + 4 * rows**2 * W)
    image = 4 * 2 * 3 * 16**2 * W + blocks + 2 * W * 16
    inputs = made_up(tiny_model, 3)
    with torch.inference_mode():
        assert peak.model_flops(tiny_model.encode_image, inputs["image"]) == 3 * image
    small = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16, "pool_type": "map"}
    text = {"layers": 1, "width": 32, "heads": 2}
    pool = miniclip.MiniClip(MiniClipConfig.from_dict({"embed_dim": 32, "vision_cfg": small, "text_cfg": text}))
    assert peak.model_flops(pool.encode_image, torch.zeros(1, 3, 16, 16)) > 4 * 2 * 12 * W**2

    matrix, seconds = 2 * peak.SQUARE**3, {"fp32": 2.0, "int8": 1.0}
    monkeypatch.setattr(precision, "compare", lambda model, precisions, cases, **products: (
        {(p, case): Seconds(seconds[p] * case[1], 3 * case[1]) for p in precisions for case in cases}
        | {"fp32": Seconds(matrix / 1e9, 7.0), "int8": Seconds(matrix / 4e9, 6.0)}, {"fp32": 1.0, "int8": 0.99}
    ))  # fmt: skip
    monkeypatch.setattr(peak, "products", lambda device, square: seconds)
    tiny_model.save_pretrained(tmp_path)
    speed.main(["--model", str(tmp_path), "--device", "cpu", "--json"])
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["auto"] == "fp32" and result["precisions"]["int8"]["cosine"] == 0.99
    one = result["precisions"]["int8"]["32 images"]
    assert one == {"ms": 1000.0, "share": pytest.approx(result["flops"]["image"] / matrix * 6 / 3)}
    assert "fp32 1, int8 4 GFLOP/s" in shown.err and "1000.00" in shown.err


def test_other_programs_change_no_ratio(tiny_model):
    """One that has to wait as if others had the processor takes longer, but no more processor time."""
    seconds, _ = compare(tiny_model, ("fp32",), (("image", 1),), 2, waits=lambda: time.sleep(0.2))
    assert seconds["waits"].wall >= 0.2 > 0.1 > seconds["waits"].busy >= 0
