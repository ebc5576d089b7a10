"""Exports to other runtimes: equal to PyTorch at every batch and length, complete for a program without torch, and
loaded like any other model."""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import miniclip
from evaluate import main as evaluate
from miniclip.commands.export import main
from miniclip.commands.speed import main as speed
from miniclip.utils.errors import InputError
from miniclip.utils.files import write_manifest
from miniclip.weights import onnx as exports
from miniclip.weights.convert import convert
from tests.conftest import ROOT

HERE = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HERE, reason=f"needs {exports.PIP}")
CAPTIONS = ["a red sheet", "it's TWO  cats &amp; a dog", "一只狗在雪地里奔跑", "naïve “quotes” " * 20]
BLOCK = "import sys\nfor name in ('torch', 'transformers', 'miniclip'): sys.modules[name] = None\n"  # imports fail


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model's folder, and, where ONNX is installed, its export with both towers in one graph as well."""
    folder = tmp_path_factory.mktemp("exports")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    texts = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": sizes, "text_cfg": texts, "init_logit_bias": -10.0}
    miniclip.MiniClip(miniclip.MiniClipConfig.from_dict(config)).save_pretrained(folder / "model")
    if HERE:
        main(["onnx", "--model", str(folder / "model"), "--output_dir", str(folder / "onnx"), "--single_graph"])
    return folder


@pytest.fixture
def photo(tmp_path):
    """An image with an odd margin on both sides of its crop."""
    noise = np.random.default_rng(0).integers(0, 256, (41, 57, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((77, 53), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def embed(folder, photo):
    model, preprocess, tokenizer = miniclip.load(folder)
    images = miniclip.embed_images(model, preprocess, [photo])
    return images, miniclip.embed_texts(model, tokenizer, CAPTIONS)


def test_torch_export_runs_in_another_process_at_every_batch_and_length(saved, photo, tmp_path):
    main(["torch", "--model", str(saved / "model"), "--output_dir", str(tmp_path / "out")])
    files = "config.json export.json image.pt2 manifest.json preprocess.json text.pt2 tokenizer.json"
    assert " ".join(sorted(path.name for path in (tmp_path / "out").iterdir())) == files
    model, preprocess, tokenizer = miniclip.load(saved / "model")
    inputs = {"image": preprocess.load(photo).expand(7, -1, -1, -1).clone(), "text": tokenizer(CAPTIONS, trim=True)}
    torch.save(inputs, tmp_path / "inputs.pt")
    code = BLOCK.replace("'torch', ", "") + (
        "import torch\n"
        f"inputs, found = torch.load({str(tmp_path / 'inputs.pt')!r}), {{}}\n"
        "for name, x in inputs.items():\n"
        f"    run = torch.export.load({str(tmp_path / 'out')!r} + f'/{{name}}.pt2').module()\n"
        "    found[name] = [run(x), run(x[:1])]\n"
        f"torch.save(found, {str(tmp_path / 'found.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    found, exact = torch.load(tmp_path / "found.pt"), model(inputs["image"], inputs["text"])
    for name, theirs in (("image", exact.image_embeds), ("text", exact.text_embeds)):
        torch.testing.assert_close(found[name][0], theirs.detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(found[name][1], theirs[:1].detach(), atol=1e-6, rtol=0)


@needs_onnx
def test_a_program_without_torch_gets_the_same_embeddings(saved, photo):
    consumer = ROOT / "docs" / "onnx_consumer.py"
    assert len(consumer.read_text().partition('"""\n\n')[2].splitlines()) <= 30
    code = BLOCK + f"import runpy\nrunpy.run_path({str(consumer)!r})"
    argv = [sys.executable, "-c", code, saved / "onnx", photo, *CAPTIONS]
    found = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    for ours, theirs in zip(embed(saved / "model", photo), (found["image"], found["text"])):
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert sum(found["shares"]) == pytest.approx(1)


@needs_onnx
def test_an_export_is_used_like_any_model(saved, photo, caption_set, run_script, tmp_path):
    model, _, tokenizer = miniclip.load(saved / "onnx")
    exact = miniclip.load(saved / "model")[0]
    for ours, theirs in zip(embed(saved / "model", photo), embed(f"local-dir:{saved}/onnx", photo)):
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert model.logit_scale.item() == pytest.approx(exact.logit_scale.item()) and model.logit_bias.item() == -10
    tables = []
    for name in ("model", "onnx"):
        argv = ["--model", saved / name, "--eval_file", caption_set / "captions.json"]
        argv += ["--feature_cache", tmp_path / "cache", "--output_file", tmp_path / f"{name}.json"]
        done = run_script("evaluate.py", *argv)
        close = "onnx fp32: cosine to PyTorch in fp32 at least 1.000000 (image.onnx)"
        assert (close in done.stdout) == (name == "onnx")
        tables.append(json.loads((tmp_path / f"{name}.json").read_text())["metrics"])
    assert tables[0] == pytest.approx(tables[1]) and len(list((tmp_path / "cache").iterdir())) == 2
    found = run_script("-m", "miniclip", "zero_shot", "--model", saved / "onnx", "--images", photo, "--classes", "a,b",
                       "--output_dir", tmp_path / "out")  # fmt: skip
    assert "photo.png" in found.stdout
    run_script(
        "-m", "miniclip", "search", "index", caption_set, "--model", saved / "onnx", "--index", tmp_path / "i.mc"
    )
    assert "red" not in run_script("-m", "miniclip", "search", "query", tmp_path / "i.mc", "red", "-k", 2).stderr


@needs_onnx
@pytest.mark.parametrize("change, message", [
    ({"precision": "bf16"}, "computes in fp32, as it was loaded or exported: remove bf16"),
    ({"pretrained": "x.pt"}, "with its own weights: remove pretrained"),
    ({"device": "cuda"}, "ONNX Runtime cannot compute on cuda here, only with .*: add --device cpu"),
])  # fmt: skip
def test_options_without_effect_are_refused(saved, change, message):
    with pytest.raises(InputError, match=message):
        miniclip.load(saved / "onnx", **change)


@needs_onnx
def test_an_export_can_be_neither_trained_nor_converted(saved, caption_set, run_script, tmp_path):
    argv = ["--train_file", caption_set / "captions.json", "--output_dir", tmp_path / "run"]
    done = run_script("train.py", "--model", saved / "onnx", *argv, check=False)
    assert done.returncode and "an export to ONNX cannot be trained" in done.stderr and "Traceback" not in done.stderr
    for form in ("onnx", "hf"):
        with pytest.raises(InputError, match="export"):
            main([form, "--model", str(saved / "onnx"), "--output_dir", str(tmp_path / form)])
    with pytest.raises(InputError, match="export to ONNX"):
        miniclip.MiniClip.from_pretrained(saved / "onnx")


def test_an_export_named_as_weights_is_refused_by_its_kind(tmp_path, tiny_model):
    """Of torch.export too; and a folder without any weights is not taken for weights of a small model."""
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").rename(tmp_path / "config.json")
    for name in ("image.onnx", "image.pt2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tmp_path / "config.json").read_text())
        (tmp_path / name / name).write_bytes(b"a graph")
        said = "is an export to ONNX or torch.export, without weights: name the original"
        if name != "image.onnx":
            with pytest.raises(InputError, match=said):
                miniclip.load(tmp_path / name)
        with pytest.raises(InputError, match=said):
            miniclip.load("ViT-B-32", pretrained=tmp_path / name)
        with pytest.raises(InputError, match=said):
            convert(tmp_path / name, tmp_path / "out", "openclip")
        with pytest.raises(InputError, match=said):
            speed(["--model", str(tmp_path / name)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is a folder: name the weight file itself"):
        miniclip.load("ViT-B-32", pretrained=tmp_path / "empty")


@needs_onnx
def test_lower_precisions_say_how_close_they_are(saved, caption_set, tmp_path, capsys):
    """Smaller files, embeddings that are close, and the recall of both kept in export.json."""
    for precision, cosine, share in (("fp16", 0.9999, 0.6), ("int8", 0.99, 0.5)):
        out = tmp_path / precision
        main(["onnx", "--model", str(saved / "model"), "--output_dir", str(out), "--precision", precision,
              "--eval_file", str(caption_set / "captions.json")])  # fmt: skip
        about, said = json.loads((out / "export.json").read_text()), capsys.readouterr().out
        assert about["precision"] == precision and f"onnx {precision} on " in said and "PyTorch fp32 on" in said
        assert all(cosine < found["min_cosine"] < 1 for found in about["checked"].values())
        assert about["measured"]["recall"].keys() == {"PyTorch fp32", f"onnx {precision}"}
        assert (out / "text.onnx").stat().st_size < share * (saved / "onnx" / "text.onnx").stat().st_size
        assert miniclip.load(out)[0].encode_text(torch.tensor([[49406, 320, 49407]])).dtype == torch.float32
        argv = ["--model", out, "--eval_file", caption_set / "captions.json", "--output_file", tmp_path / "e.json"]
        evaluate([str(word) for word in [*argv, "--report", tmp_path / "r.html"]])
        assert json.loads((tmp_path / "e.json").read_text())["record"]["precision"] == precision
        assert f"precision {precision}" in (tmp_path / "r.html").read_text()


@needs_onnx
def test_a_graph_that_differs_is_not_written(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "TOLERANCE", 1e-12)
    with pytest.raises(InputError, match="image.onnx is .* off PyTorch"):
        main(["onnx", "--model", str(saved / "model"), "--output_dir", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_a_strangers_folder(saved, tmp_path):
    """A changed file, a graph that is not what config.json says, and weights from outside of the folder."""
    import onnx

    folder = tmp_path / "onnx"
    shutil.copytree(saved / "onnx", folder)
    shutil.copy(folder / "clip.onnx", folder / "text.onnx")
    with pytest.raises(InputError, match="text.onnx is not what was saved"):
        miniclip.load(folder)
    write_manifest(folder)
    with pytest.raises(InputError, match="text.onnx is not a graph from input_ids"):
        miniclip.load(folder)
    graph = onnx.load(saved / "onnx" / "text.onnx")
    outside = tmp_path / "outside.bin"
    onnx.save(graph, folder / "text.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    shutil.move(folder / "weights.bin", outside)
    for location in ("../outside.bin", str(outside), "link.bin"):
        (folder / "link.bin").unlink(missing_ok=True)
        (folder / "link.bin").symlink_to(outside)
        graph = onnx.load(folder / "text.onnx", load_external_data=False)
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        (folder / "text.onnx").write_bytes(graph.SerializeToString())
        write_manifest(folder)
        with pytest.raises(InputError, match="text.onnx cannot be read by ONNX Runtime"):
            miniclip.load(folder)
    (folder / "export.json").write_text("[]")
    write_manifest(folder)
    with pytest.raises(InputError, match="export.json"):
        miniclip.load(folder)


@needs_onnx
def test_openvino_reads_the_same_files(saved, photo):
    openvino = pytest.importorskip("openvino", reason="needs pip install openvino")
    model, preprocess, tokenizer = miniclip.load(saved / "model")
    pixel_values, ids = preprocess.load(photo)[None].expand(3, -1, -1, -1), tokenizer(CAPTIONS, trim=True)
    exact = model(pixel_values, ids)
    for name, x, theirs in (("image", pixel_values, exact.image_embeds), ("text", ids, exact.text_embeds)):
        run = openvino.compile_model(saved / "onnx" / f"{name}.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for n in (1, len(x)):
            np.testing.assert_allclose(run(x[:n].numpy())[0], theirs[:n].detach().numpy(), atol=1e-5)


def test_what_is_missing_or_has_no_effect_is_said(saved, tmp_path, monkeypatch):
    model, out = str(saved / "model"), str(tmp_path / "out")
    for argv, message in (
        (
            ["tensorrt", "--model", model, "--output_dir", out],
            "cannot export to 'tensorrt', only to onnx, torch, openclip",
        ),
        (["torch", "--model", model, "--output_dir", out, "--precision", "int8"], "--precision has no effect on torch"),
        (["hf", "--model", model, "--output_dir", out, "--single_graph"], "--single_graph has no effect on hf"),
        (["onnx", "--model", model, "--output_dir", out, "--image_root", "x"], "--image_root is for --eval_file"),
        (["torch", "--model", model, "--output_dir", model, "--force"], "is the folder of a model"),
        (["torch", "--model", model, "--output_dir", str(saved)], "exists already"),
    ):
        with pytest.raises(InputError, match=message):
            main(argv)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="ONNX needs the Python package onnx: pip install onnx onnxscript"):
        main(["onnx", "--model", model, "--output_dir", out])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form, file", [
    ("openclip", "open_clip_config.json"), ("hf", "config.json"), ("sentence-transformers", "modules.json"),
])  # fmt: skip
def test_other_forms_are_those_of_convert(form, file, tiny_model, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path / "model")
    main([form, "--model", f"local-dir:{tmp_path / 'model'}", "--output_dir", str(tmp_path / "out")])
    assert f"({form})" in capsys.readouterr().out and (tmp_path / "out" / file).is_file()
    image, model = torch.randn(1, 3, 32, 32), miniclip.load(tmp_path / "out")[0]
    torch.testing.assert_close(model.encode_image(image), tiny_model.eval().encode_image(image))


@needs_onnx
def test_an_encoder_of_transformers(tmp_path):
    """A convolutional network with BatchNorm, whose batch is dynamic too: the export checks batches of 1, 2 and 5."""
    trunk = {
        "model_type": "resnet",
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
    }
    texts = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": {"hf_model_config": trunk, "image_size": 32}, "text_cfg": texts}
    model = miniclip.MiniClip(miniclip.MiniClipConfig.from_dict(config))
    assert exports.export(model, tmp_path / "out")["checked"]["image.onnx"]["max_difference"] < 1e-5
    pixel_values = torch.randn(3, 3, 32, 32)
    theirs = miniclip.load(tmp_path / "out")[0].encode_image(pixel_values)
    torch.testing.assert_close(theirs, model(pixel_values).image_embeds.detach(), atol=1e-5, rtol=0)
