"""The registry of published weights, and the names that models are loaded by."""

import json
import re
import sys

import pytest

import miniclip
from miniclip.commands.export import main as export
from miniclip.commands.pretrained import main as command
from miniclip.config import MiniClipConfig, list_models
from miniclip.utils.errors import InputError
from miniclip.weights import convert as conversion
from miniclip.weights import pretrained
from miniclip.weights.convert import write_openclip
from miniclip.weights.load import empty_model
from tests.conftest import ROOT

PAIRS = miniclip.list_pretrained()


@pytest.mark.parametrize("name", sorted({model for model, _ in PAIRS}))
def test_what_is_known_about_a_model_is_whole(name):
    assert name in list_models()
    tags = miniclip.list_pretrained_tags_by_model(name)
    assert tags == [tag for model, tag in PAIRS if model == name] and tags
    for tag in tags:
        facts = miniclip.get_pretrained_cfg(name, tag)
        assert facts == miniclip.get_pretrained_cfg(name, tag.upper().replace("_", "-"))  # as OpenCLIP takes them
        assert name in miniclip.list_pretrained_models_by_tag(tag)
        assert facts["hf_hub"] or facts["url"]
        assert re.fullmatch(r"([\w-]+/[\w.-]+/)?", facts["hf_hub"])
        assert re.fullmatch(r"(https://[\w./-]+\.pth?)?", facts["url"])
        assert re.fullmatch(r"([0-9a-f]{8}|[0-9a-f]{64})?", facts["sha256"])
        published = re.search(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pth?$", facts["url"])
        assert facts["sha256"] == (published[1] or published[2] if published else "")
        assert type(facts["quick_gelu"]) is bool and len(facts["mean"]) == len(facts["std"]) == 3
        if name.endswith("-quickgelu"):
            assert facts == miniclip.get_pretrained_cfg(name.removesuffix("-quickgelu"), tag)
            assert facts["quick_gelu"] and MiniClipConfig.from_name(name).quick_gelu


def test_the_lists_have_openclips_names_and_tinyclips():
    assert len(PAIRS) == len(set(PAIRS)) == 200
    assert miniclip.list_pretrained(as_str=True)[0] == "ViT-B-32:openai"
    assert {tag for _, tag in PAIRS} >= {
        "openai",
        "laion2b_s34b_b79k",
        "datacomp_xl_s13b_b90k",
        "metaclip_fullcc",
        "dfn2b",
    }
    assert miniclip.list_pretrained_tags_by_model("TinyCLIP-ViT-8M-16-Text-3M") == ["yfcc15m"]
    assert miniclip.list_pretrained_tags_by_model("RN50") == ["openai", "yfcc15m", "cc12m"]
    assert miniclip.get_pretrained_cfg("ViT-L-14", "laion2b_s32b_b82k")["mean"] == [0.5, 0.5, 0.5]
    assert miniclip.get_pretrained_cfg("ViT-H-14-378", "dfn5b")["resize_mode"] == "squash"


@pytest.mark.parametrize("name, millions", [  # by OpenCLIP's model_profile.csv
    ("ViT-B-32-256", 151.29), ("ViT-B-16-plus-240", 208.38), ("ViT-H-14", 986.11), ("ViT-H-14-quickgelu", 986.11),
    ("ViT-H-14-378-quickgelu", 986.71), ("ViT-g-14", 1366.68), ("ViT-bigG-14", 2539.57),
    ("RN50", 102.01), ("RN101", 119.69), ("RN50x4", 178.3), ("RN50x16", 290.98), ("RN50x64", 623.26),
    ("ViT-L-14-CLIPA", 414.21), ("ViT-H-14-CLIPA", 968.24), ("ViT-bigG-14-CLIPA", 2517.22),
    ("ViT-B-16-SigLIP", 203.16), ("ViT-L-16-SigLIP-384", 652.48), ("ViT-SO400M-14-SigLIP", 877.36),
    ("TinyCLIP-ResNet-30M-Text-29M", 83.82), ("TinyCLIP-ResNet-19M-Text-19M", 63.37),
])  # fmt: skip
def test_large_configs_have_as_many_parameters_as_published(name, millions):
    model = empty_model(MiniClipConfig.from_name(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("name, tag, message", [
    ("ViT-B/32", None, "'ViT-B/32' is neither a folder nor .* nearest: ViT-B-32.* list published weights"),
    ("ViT-B-23", "openai", "nearest: ViT-B-32"),
    ("ViT-SO400M-16-SigLIP-i18n-256", "webli", "does not have a text tower of SigLIP without its projection"),
    ("coca_base", None, "CoCa"), ("nllb-clip-base-siglip", None, "NLLB text towers"),
    ("mt5-base-ViT-B-32", None, "text tower"), ("ViT-L-14-worldwide", None, "mT5"),
    ("openai/clip-vit-base-patch32", None, "name it hf-hub:openai/clip-vit-base-patch32"),
    ("local-dir:nowhere", None, "local-dir:nowhere: there is no such folder"), ("local-dir:", None, "no such folder"),
    ("hf-hub:", None, "'' is not the name of a repository"),
    ("ViT-B-32", "laion2b_s34b", "no file or folder 'laion2b_s34b', and it is not a tag of ViT-B-32; nearest: "
                                 "laion2b_s34b_b79k.*`miniclip pretrained ViT-B-32` lists all"),
    ("ViT-B-32", "hf-hub:x", "HF_HUB_OFFLINE is set"),
    ("ViT-B-32", "dfn2b", "it is not a tag of ViT-B-32; it is one of ViT-B-16, "),
    ("ViT-B-32", "gone/x.pt", "^there is no file or folder 'gone/x.pt'$"),
    (__file__, None, "test_pretrained.py is a file of weights: name the model's config first"),
    ("", None, "the name of the model is empty"),
    ("ViT-S-16-112", "openai", "no file or folder 'openai', and ViT-S-16-112 has no tags"),
])  # fmt: skip
def test_a_wrong_name_is_answered_with_the_nearest_or_the_reason(name, tag, message):
    with pytest.raises(InputError, match=message) as error:
        miniclip.load(name, tag)
    assert "\n" not in str(error.value)


def test_a_file_goes_before_a_tag_of_the_same_name(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained("openai")
    assert pretrained.find_tag("ViT-B-32", "openai") is None
    assert pretrained.find_tag("ViT-B-32", "metaclip_400m")["quick_gelu"] is True
    assert pretrained.find_folder("local-dir:openai") == pretrained.find_folder("openai")


def test_a_tag_is_converted_with_its_activation_and_preprocessing(tmp_path, monkeypatch):
    """`miniclip export hf --model NAME --pretrained TAG` hands both to `convert`."""
    facts = pretrained.get_pretrained_cfg("ViT-B-32", "openai") | {"mean": [0.5] * 3}
    monkeypatch.setitem(pretrained.registry()[0], "shapes-demo", {"some_tag": facts})
    model = miniclip.MiniClip(MiniClipConfig.from_name("shapes-demo"))
    write_openclip(tmp_path / "published.pt", model)
    monkeypatch.setattr(conversion, "download_pretrained", lambda facts: tmp_path / "published.pt")
    export(["hf", "--model", "shapes-demo", "--pretrained", "some-tag", "--output_dir", str(tmp_path / "hf")])
    config = miniclip.load(tmp_path / "hf")[0].config
    assert config.quick_gelu and config.preprocess_cfg.mean == (0.5, 0.5, 0.5)
    with pytest.raises(InputError, match="not a tag of shapes-demo; nearest: some_tag"):
        export(["hf", "--model", "shapes-demo", "--pretrained", "sometag", "--output_dir", str(tmp_path / "x")])


def test_a_vocabulary_that_is_not_clips_is_refused(tiny_config, tmp_path):
    (tmp_path / "x").mkdir()
    values = tiny_config.to_dict() | {"text_cfg": tiny_config.to_dict()["text_cfg"] | {"vocab_size": 1000}}
    model = miniclip.MiniClip(MiniClipConfig.from_dict(values))
    write_openclip(tmp_path / "open", model)
    with pytest.raises(InputError, match="another tokenizer, with a vocabulary of 1000"):
        miniclip.load(tmp_path / "open")


def test_commands_take_a_folder_of_another_library(tiny_model, caption_set, tmp_path, run_script):
    write_openclip(tmp_path / "open", tiny_model)
    name, image = f"local-dir:{tmp_path / 'open'}", caption_set / "0.png"
    zero = ["--images", image, "--classes", "red,blue", "--output_dir", tmp_path / "zero"]
    run_script("-m", "miniclip", "zero_shot", "--model", name, *zero)
    run_script("-m", "miniclip", "search", "index", caption_set, "--model", name, "--index", tmp_path / "i.mc")
    found = run_script("-m", "miniclip", "search", "query", tmp_path / "i.mc", "a red sheet", "-k", 2)
    assert ".png" in found.stdout  # the index names the folder, wherever it is asked from
    inherit = ["--from", name, "--to", ROOT / "model_configs" / "shapes-demo.json", "--output_dir", tmp_path / "small"]
    refused = run_script("-m", "miniclip", "inherit", *inherit, check=False)
    assert "is not a folder" not in refused.stderr


def test_the_command_lists_names_and_sources(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", sys.stdout)  # which --json replaces

    def run(*words) -> str:
        command(list(words))
        return capsys.readouterr().out

    line = next(line for line in run("ViT-B-32").splitlines() if "laion2b_s34b_b79k" in line)
    assert line.split() == ["ViT-B-32", "laion2b_s34b_b79k", "GELU", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"]
    assert "no published weights of ViT-S-16-112 are known" in run("ViT-S-16-112")
    with pytest.raises(InputError, match="'openia' is not known: it is not a tag of ViT-B-32; nearest: openai"):
        run("ViT-B-32", "openia")
    assert [(row["model"], row["tag"]) for row in json.loads(run("--json"))] == PAIRS
