"""CoCa: with OpenCLIP's weights it computes what OpenCLIP computes and writes the same captions; it is trained, saved
and converted."""

import html
import json
import re
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import miniclip
from benchmarks.make_coca_golden import COCA, GOLDEN, IDS, MODELS, WAYS, record
from benchmarks.make_towers_golden import make_inputs, make_weights, summary
from miniclip.checkpoint import from_miniclip, to_miniclip
from miniclip.commands.caption import main as write_captions
from miniclip.config import MiniClipConfig
from miniclip.inference.caption import caption_images, caption_metrics
from miniclip.model import MiniClip
from miniclip.towers.coca import CoCa
from miniclip.towers.generate import Writer
from miniclip.training.grad_cache import wrap_towers
from miniclip.training.losses import make_loss
from miniclip.utils.errors import CheckpointError, InputError
from miniclip.weights.convert import convert
from miniclip.weights.load import empty_model, load_weights
from miniclip.weights.onnx import PIP, examples, export
from tests.datasets.test_shards import pack
from tests.training.test_training import recipe, trained_and_resumed  # noqa: F401

RECORDED = json.loads(GOLDEN.read_text(encoding="utf-8"))
WORDS = {"vocab_size": 49408, "context_length": 16, "width": 32, "heads": 2, "layers": 1}
TINY = COCA | {"text_cfg": COCA["text_cfg"] | WORDS, "multimodal_cfg": WORDS}  # with CLIP's tokenizer
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
ENCODER = {"hf_model_config": RESNET, "image_size": 32, "attentional_pool": True, "attn_pooler_heads": 2}


def options(loss: str = "coca", frozen: bool = False) -> SimpleNamespace:
    return SimpleNamespace(loss=loss, frozen=(frozen, False), check_gradients=False, duplicates="ignore")


ARGS = SimpleNamespace(grad_cache_chunk_size=0, fsdp=None)


def rows(model: MiniClip) -> tuple[list, list]:
    return model.visual.key_rows(), model.text.key_rows()


def load_openclips(cfg: dict) -> tuple[CoCa, dict]:
    """A model with the weights that OpenCLIP has in the golden file, and these."""
    model = MiniClip(MiniClipConfig.from_dict(cfg)).eval()
    names = from_miniclip(model.state_dict(), "custom_text", rows(model))
    theirs = make_weights({name: tuple(t.shape) for name, t in names.items()})
    ours, found = to_miniclip(theirs, rows(model))
    assert found == "custom_text"
    model.load_state_dict(ours, strict=True)
    return model, theirs


@pytest.mark.parametrize("source", ["recorded", "live"])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_openclip_does(name, source):
    """Embeddings, the logits of captions, the loss and each gradient; names in both directions."""
    if source == "live":
        pytest.importorskip("open_clip", reason="OpenCLIP is not installed: pip install open_clip_torch")
    peer = RECORDED["models"][name] if source == "recorded" else record(MODELS[name])
    model, theirs = load_openclips(MODELS[name])
    back = from_miniclip(model.state_dict(), "custom_text", rows(model))
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    images, input_ids = make_inputs(MODELS[name])
    loss = make_loss(model, options(), ARGS)
    with torch.no_grad():
        out = model(images, input_ids)
    assert out.image_embeds.flatten().tolist() == pytest.approx(peer["image"], abs=1e-5)
    assert out.text_embeds.flatten().tolist() == pytest.approx(peer["text"], abs=1e-5)
    short = model.encode_text(input_ids[:2, :7], normalize=True)  # without padding
    torch.testing.assert_close(short, out.text_embeds[:2], atol=1e-5, rtol=0)
    read = []
    hook = model.text.token_embedding.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    model.encode_text(input_ids[:2])
    hook.remove()
    assert read == [8] and input_ids.shape[1] > 8, "of padding only the one token is computed that has a part in it"
    model.double()
    for every in (0, 1):  # the same with activation checkpointing
        model.zero_grad()
        model.activation_checkpointing_enable(every_n_layers=every)
        value = loss(model.train()(images.double(), input_ids), {"input_ids": input_ids})
        value.backward()
        filled = model.state_dict() | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients = from_miniclip(filled, "custom_text", rows(model))
        mine = summary(value, gradients, {"logits": out.caption_logits})
        assert mine["loss"] == pytest.approx(peer["loss"], abs=1e-6)
        assert mine["gradients"] == pytest.approx(peer["gradients"], abs=1e-6, rel=1e-6)
        assert mine["statistics"] == pytest.approx(peer["statistics"], abs=1e-5)


def test_captions_are_openclips_token_for_token():
    model, images = load_openclips(COCA)[0], make_inputs(COCA)[0]
    end = IDS["eos_token_id"]
    assert len({(row + [end]).index(end) for ids in RECORDED["captions"] for row in ids}) > 5, "many lengths"
    for way, ids in zip(WAYS, RECORDED["captions"], strict=True):
        torch.manual_seed(0)  # for those that are drawn
        assert model.generate(images, **IDS | way).tolist() == ids, way
    greedy = model.generate(images, seq_len=20, generation_type="top_k", **IDS)
    further = model.generate(images, text=greedy[:, :4], seq_len=20, generation_type="top_k", **IDS)
    assert torch.equal(further, greedy)
    for wrong, message in (
        ({"seq_len": 21}, "seq_len 21 is not above min_seq_len 5, up to 20"),
        ({"seq_len": 9, "generation_type": "greedy"}, "'greedy' is none of beam_search, top_p, top_k"),
        ({"seq_len": 9, "num_beams": 4}, "num_beams 4 is not a multiple of num_beam_groups 3"),
        ({"seq_len": 9, "text": greedy}, "beam_search cannot go on from a text"),
        ({"seq_len": 9, "temperature": 0.0}, "for no chance use top_k 1"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(images, **IDS | wrong)


def test_a_step_reads_the_new_token_and_gives_the_logits_of_the_whole_text():
    """Of three texts about each of two images, which continue one another; token 0 is padding."""
    model, images = load_openclips(COCA)[0], make_inputs(COCA)[0][:2]
    torch.manual_seed(0)
    ids, read = torch.randint(0, 4, (6, 3)), []
    with torch.no_grad():
        write = Writer(model.text, model.text_decoder, model.visual.with_tokens(images)[1])
        for rows in (None, torch.tensor([1, 1, 0, 5, 3, 3]), torch.tensor([2, 0, 0, 4, 5, 3])):
            ids = ids if rows is None else torch.cat([ids[rows], torch.randint(0, 4, (6, 1))], dim=1)
            hook = model.text.token_embedding.register_forward_hook(lambda _, args, out: read.append(args[0].shape))
            found = write(ids, rows)
            hook.remove()
            whole = model.caption_logits(images.repeat_interleave(3, dim=0), ids)[:, -1]
            torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    assert read == [(6, 3), (6, 1), (6, 1)]


def test_it_is_saved_converted_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_dict(TINY)).eval()
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="transformers' CLIPModel has no other towers than CLIP's own"):
        convert(tmp_path / "saved", tmp_path / "hf", "hf")
    for name in ("openclip.pt", "openclip"):
        convert(tmp_path / "saved", tmp_path / name, "openclip")
    narrower = TINY | {"vision_cfg": TINY["vision_cfg"] | {"width": 16}}
    with pytest.raises(CheckpointError, match="The config that fits: the one it was made with"):
        load_weights(empty_model(MiniClipConfig.from_dict(narrower)), tmp_path / "openclip.pt")
    (tmp_path / "coca.json").write_text(json.dumps(TINY))
    pixels = torch.randn(2, 3, 32, 32)
    ids = model.generate(pixels, seq_len=12)
    folders = (tmp_path / "saved",), (tmp_path / "openclip",), (tmp_path / "coca.json", tmp_path / "openclip.pt")
    for folder in folders:
        other, _, tokenizer = miniclip.load(*folder)
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in other.state_dict().items())
        assert torch.equal(other.generate(pixels, seq_len=12), ids) and len(tokenizer.decode(ids)) == 2
    fast, _, _ = miniclip.load(tmp_path / "saved", precision="fp32")
    torch.testing.assert_close(fast.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=1e-5)
    if find_spec("open_clip"):
        import open_clip

        peer, text = open_clip.create_model(f"local-dir:{tmp_path / 'openclip'}").eval(), torch.zeros(2, 16).long()
        text[:, :3] = torch.tensor([49406, 5, 49407])
        torch.testing.assert_close(peer(pixels, text)["logits"], model.caption_logits(pixels, text)[:, :-1])


def test_published_configs():
    for name, millions in (("coca_ViT-B-32", 253.56), ("coca_ViT-L-14", 638.45)):  # OpenCLIP's
        model = empty_model(MiniClipConfig.from_name(name))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
        assert name in miniclip.list_models() and miniclip.list_pretrained_tags_by_model(name)
    for wrong, message in (
        ({"vision_cfg": TINY["vision_cfg"] | {"attentional_pool": "serial"}}, "is 'serial', not true, parallel or"),
        ({"vision_cfg": {}}, "multimodal_cfg needs attentional_pool in vision_cfg and embed_cls in text_cfg"),
        ({"embed_dim": 64}, "embed_dim and the widths of text and decoder differ"),
        ({"multimodal_cfg": WORDS | {"context_length": 15}}, "context_length differs in text_cfg and multimodal_cfg"),
        ({"multimodal_cfg": WORDS | {"mlp_ratio": 2}}, "multimodal_cfg: unknown field 'mlp_ratio'"),
        ({"text_cfg": TINY["text_cfg"] | {"pad_id": -1}}, "text_cfg.pad_id is not from 0 to vocab_size - 1"),
    ):
        with pytest.raises(InputError, match=message):
            MiniClipConfig.from_dict(TINY | wrong)


def test_what_the_loss_needs():
    model = MiniClip(MiniClipConfig.from_dict(COCA))
    images, input_ids = make_inputs(COCA)
    make_loss(model, options("clip"), ARGS)
    assert len(model(images, input_ids)) == 4 and not any(p.requires_grad for p in model.text_decoder.parameters())
    batch, found = {"input_ids": input_ids}, {}
    for loss in ("coca", "coca:1:0", "coca:0:1"):
        value = make_loss(model, options(loss), ARGS)
        found[loss] = value(model.eval()(images, input_ids), batch).item()
    assert found["coca"] == pytest.approx(2 * found["coca:1:0"] + found["coca:0:1"], rel=1e-6)
    plain = MiniClip(MiniClipConfig.from_dict({name: TINY[name] for name in ("embed_dim", "text_cfg", "vision_cfg")}))
    for given, args, other, message in (
        (options(frozen=True), ARGS, model, "a tower is frozen"),
        (options(), SimpleNamespace(grad_cache_chunk_size=4, fsdp=None), model, "grad_cache_chunk_size does not help"),
        (options(), ARGS, plain, "this one has no decoder: use coca_ViT-B-32"),
    ):
        with pytest.raises(InputError, match=message):
            make_loss(other, given, args)


def test_the_command_writes_captions_and_measures_them(tmp_path, caption_set, capsys):
    torch.manual_seed(0)
    MiniClip(MiniClipConfig.from_dict(TINY)).save_pretrained(tmp_path / "coca")
    model = ["--model", str(tmp_path / "coca"), "--output_dir", str(tmp_path / "out"), "--seq_len", "8"]
    images = [str(caption_set / f"{i}.png") for i in range(3)]
    write_captions([*model, "--images", *images, "--batch_size", "2"])
    found = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert [picture["image"] for picture in found["captions"]] == images and "metrics" not in found
    loaded, preprocess, tokenizer = miniclip.load(tmp_path / "coca")
    pixels = torch.stack([preprocess(miniclip.open_image(path)) for path in images])
    ids = loaded.generate(pixels, seq_len=8, num_beams=2, num_beam_groups=1)
    assert [picture["caption"] for picture in found["captions"]] == tokenizer.decode(ids)
    assert "3 captions. Written: captions.json, captions.md" in capsys.readouterr().out
    for wrong in ([], ["--images", images[0], "--eval_file", "x.json"]):
        with pytest.raises(InputError, match="name images by --images, or a caption file by --eval_file, and not both"):
            write_captions([*model, *wrong])
    greedy = ["--generation_type", "top_k"]
    for wrong, name in (([*greedy, "--num_beams", "3"], "num_beams"), (["--temperature", "2"], "temperature"),
                        (["--image_root", "x"], "image_root"), ([*greedy, "--top_p", "0.5"], "top_p")):  # fmt: skip
        with pytest.raises(InputError, match=f"--{name} has no effect with --"):
            write_captions([*model, "--images", *images, *wrong])
    for wrong in ({"top_k": 0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
            loaded.generate(pixels, seq_len=8, generation_type="top_k", **wrong)
    with pytest.raises(InputError, match="this model has no decoder"):
        caption_images(empty_model(MiniClipConfig()), preprocess, tokenizer, images)
    pytest.importorskip("pycocoevalcap", reason="CIDEr and BLEU: pip install --no-deps pycocoevalcap")
    write_captions([*model, "--eval_file", str(caption_set / "captions.json")])
    found = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert set(found["metrics"]) == {"CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"} and len(found["captions"]) == 24
    texts = ["A dog, running.", "two red cats sit"], [["a dog running", "a hound"], ["A blue bird flies!"]]
    metrics = caption_metrics(*texts)
    assert metrics["BLEU-1"] == pytest.approx(3 / 7) and 0 < metrics["CIDEr"] < 10
    assert caption_metrics([refs[0] for refs in texts[1]], texts[1])["BLEU-3"] == pytest.approx(1, abs=1e-6)


@pytest.mark.filterwarnings("ignore:(.|\n)*1 of 4 images are damaged:UserWarning")
def test_a_damaged_image_of_a_shard_gets_no_caption(tmp_path, caption_set, monkeypatch):
    MiniClip(MiniClipConfig.from_dict(TINY)).save_pretrained(tmp_path / "coca")
    members = {}
    for i in range(4):
        members[f"{i}.png"] = b"<html>" if i == 2 else (caption_set / f"{i}.png").read_bytes()
        members[f"{i}.txt"] = b"a sheet"
    pack(tmp_path / "a.tar", members)
    monkeypatch.setattr("miniclip.inference.caption.scorers", lambda: None)  # of a package that may be missing
    monkeypatch.setattr("miniclip.inference.caption.caption_metrics", lambda captions, references: {})
    command = ["--model", str(tmp_path / "coca"), "--output_dir", str(tmp_path / "out"), "--seq_len", "8"]
    command += ["--eval_file", str(tmp_path / "a.tar")]
    with pytest.raises(InputError, match="1 of 4 images are damaged:\n .*2.png(.|\n)*--on_bad_sample skip"):
        write_captions(command)
    write_captions([*command, "--on_bad_sample", "skip"])
    written = json.loads((tmp_path / "out" / "captions.json").read_text())["captions"]
    assert [picture["image"].partition(": ")[2] for picture in written] == ["0.png", "1.png", "3.png"]
    assert "2.png" in (tmp_path / "out" / "bad_samples.jsonl").read_text()


def test_the_report_has_the_captions_that_the_command_writes(caption_set, run_script):
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_dict(TINY))
    for p in model.text_decoder.parameters():
        p.data *= 3  # so that what it writes differs
    model.save_pretrained(caption_set / "coca")
    records = json.loads((caption_set / "captions.json").read_text())[:3]
    (caption_set / "few.json").write_text(json.dumps(records))
    pictures = [str(caption_set / record["image"]) for record in records]
    common = ["--model", str(caption_set / "coca")]
    write_captions([*common, "--images", *pictures, "--output_dir", str(caption_set / "out")])
    found = json.loads((caption_set / "out" / "captions.json").read_text())
    captions = [one["caption"] for one in found["captions"]]
    assert len(set(captions)) > 1 and found["generation"]["seq_len"] == 16, "30, but the model reads no more"
    how = ["--precision", "bf16", "--output_file", caption_set / "o.json", "--report", caption_set]  # of the embeddings
    run_script("evaluate.py", *common, "--eval_file", caption_set / "few.json", *how)
    page = (caption_set / "report.html").read_text(encoding="utf-8").partition("What the model writes")[2]
    assert [html.unescape(one) for one in re.findall('<p dir="auto"><b>(.*?)</b>', page, re.DOTALL)] == captions


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx", "onnx fp16", "onnx int8"])
@pytest.mark.parametrize("image", ["its own", "an encoder"])
def test_its_towers_are_exported(tmp_path, image, form):
    form, _, precision = form.partition(" ")
    if form == "onnx" and not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        pytest.skip(f"needs {PIP}")
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_dict(TINY | ({} if image == "its own" else {"vision_cfg": ENCODER}))).eval()
    how = {"precision": precision or "fp32", "single_graph": form == "onnx"}
    with pytest.warns(UserWarning, match="the decoder is not exported"):
        about = export(model, tmp_path / "towers", form, **how)  # which compares the graphs with the model
    assert all(found["min_cosine"] > 0.999 for found in about["checked"].values())
    if find_spec("openvino") and form == "onnx" and not precision:
        import openvino

        for name, batches in zip(("image", "text"), examples(model)):
            file = tmp_path / "towers" / f"{name}.onnx"
            run = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            for x in batches:
                wanted = getattr(model, f"encode_{name}")(x, normalize=True)
                torch.testing.assert_close(torch.from_numpy(run(x.numpy())[0]), wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_it_trains_on_two_processes_and_resumes_bit_for_bit(recipe, caption_set, run_script):  # noqa: F811
    (caption_set / "coca.json").write_text(json.dumps(TINY))
    steps = ["--model", caption_set / "coca.json", "--loss", "coca:1:1"]
    trained = trained_and_resumed(recipe, caption_set, run_script, steps)
    fresh = MiniClip(MiniClipConfig.from_dict(TINY)).state_dict()
    assert not any(torch.equal(t, fresh[name]) for name, t in trained.items() if t.ndim > 1)
    model, preprocess, tokenizer = miniclip.load(caption_set / "run")
    assert len(tokenizer.decode(model.generate(torch.zeros(1, 3, 32, 32), seq_len=8))) == 1


def test_an_encoder_of_transformers_is_its_image_tower(tmp_path):
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_dict(TINY | {"vision_cfg": ENCODER})).eval()
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 9, (2, 6))
    features = model.visual.features(pixels)
    assert features.shape == (2, 4 * 4 * 16) and model.visual.width == 256
    embeds, tokens = model.visual.with_tokens(pixels)
    assert torch.equal(embeds, model.encode_image(pixels)) and tokens.shape == (2, 16, 32)
    wrap_towers(model)  # as in training: features that were computed before take the place of images
    make_loss(model, options(frozen=True), ARGS)
    torch.testing.assert_close(model(features, ids).caption_logits, model(pixels, ids).caption_logits)
    model.caption_logits(pixels, ids).sum().backward()
    assert model.visual.proj.to_tokens.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "saved")
    again = miniclip.load(tmp_path / "saved")[0]
    assert torch.equal(again.generate(pixels, seq_len=8), model.generate(pixels, seq_len=8))
    with pytest.raises(CheckpointError, match="OpenCLIP has no towers with an encoder of transformers"):
        convert(tmp_path / "saved", tmp_path / "openclip", "openclip")
    for form in ("hf", "sentence-transformers"):
        with pytest.raises(CheckpointError, match="no other towers than CLIP's own"):
            convert(tmp_path / "saved", tmp_path / form, form)
    with pytest.raises(InputError, match="a tower is frozen"):
        make_loss(model, SimpleNamespace(**vars(options()) | {"frozen": (True, True)}), ARGS)
    for wrong, message in (
        ({"hf_pooler_type": "mean"}, "beside hf_pooler_type or hf_proj_type, which have no effect here"),
        ({"attn_pooler_heads": 5}, "embed_dim 32 is not a multiple of attn_pooler_heads 5"),
    ):
        with pytest.raises(InputError, match=message):
            MiniClip(MiniClipConfig.from_dict(TINY | {"vision_cfg": ENCODER | wrong}))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["none", "tower"])
def test_it_trains_on_an_encoder_and_resumes_bit_for_bit(recipe, caption_set, run_script, frozen):  # noqa: F811
    (caption_set / "coca.json").write_text(json.dumps(TINY | {"vision_cfg": ENCODER}))
    steps = ["--model", caption_set / "coca.json", "--loss", "coca", "--freeze_image", frozen, "--bf16", "true"]
    steps += ["--hflip", "0", "--color_jitter", "0"] if frozen == "tower" else []
    trained = trained_and_resumed(recipe, caption_set, run_script, steps)
    assert trained["visual.proj.to_tokens.weight"].shape == (32, 16)
