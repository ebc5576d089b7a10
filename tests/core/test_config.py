import json

import pytest

from miniclip.config import MODEL_CONFIGS, MiniClipConfig, list_models
from miniclip.model import MiniClip


@pytest.mark.parametrize("name", list_models())
def test_shipped_config_survives_a_round_trip(name):
    config = MiniClipConfig.from_name(name)
    assert MiniClipConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.quick_gelu == (name.endswith("-quickgelu") or name == "roberta-ViT-B-32")


def test_the_models_asked_for_are_there():
    assert set(list_models()) >= {
        "TinyCLIP-ViT-39M-16-Text-19M", "TinyCLIP-ViT-8M-16-Text-3M", "TinyCLIP-ViT-61M-32-Text-29M",
        "TinyCLIP-ViT-40M-32-Text-19M", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336",
        "ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu",
    }  # fmt: skip


# Million parameters in all, as TinyCLIP publishes them (towers and token embedding) and as OpenAI's file has them.
@pytest.mark.parametrize(("name", "millions"), [
    ("TinyCLIP-ViT-39M-16-Text-19M", 83.10), ("TinyCLIP-ViT-8M-16-Text-3M", 23.45),
    ("TinyCLIP-ViT-61M-32-Text-29M", 115.38), ("TinyCLIP-ViT-40M-32-Text-19M", 84.21), ("ViT-B-32", 151.28),
])  # fmt: skip
def test_parameter_counts_are_the_published_ones(name, millions):
    import torch

    with torch.device("meta"):
        model = MiniClip(MiniClipConfig.from_name(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_unknown_fields_raise_and_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown field 'patchsize'.*image_size, layers, width.*patch_size"):
        MiniClipConfig.from_dict({"vision_cfg": {"patchsize": 32}})
    with pytest.raises(ValueError, match="unknown field 'quickgelu'.*embed_dim, vision_cfg.*quick_gelu"):
        MiniClipConfig.from_dict({"quickgelu": True})


def test_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match="'ViT-B/32'.*ViT-B-32"):
        MiniClipConfig.from_name("ViT-B/32")
    with pytest.raises(ValueError, match=r"nearest: [^,]+, [^,]+, [^,]+$"):
        MiniClipConfig.from_name("/no/model")


def test_sizes_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        MiniClipConfig.from_dict({"vision_cfg": {"image_size": 225}})
    with pytest.raises(ValueError, match="expected an object"):
        MiniClipConfig.from_dict({"vision_cfg": [1]})


def test_config_file_errors_name_the_file(tmp_path):
    (tmp_path / "odd.json").write_text('{"embed_dims": 3}')
    with pytest.raises(ValueError, match="odd.json.*embed_dims.*fields are embed_dim"):
        MiniClipConfig.from_name(str(tmp_path / "odd.json"))
    (tmp_path / "odd.json").write_text("{")
    with pytest.raises(ValueError, match="odd.json cannot be read"):
        MiniClipConfig.from_name(str(tmp_path / "odd.json"))
    with pytest.raises(ValueError, match="none.json cannot be read"):
        MiniClipConfig.from_name(str(tmp_path / "none.json"))


def test_every_config_file_is_in_openclips_form():
    for path in MODEL_CONFIGS.glob("*.json"):
        known = {"embed_dim", "quick_gelu", "init_logit_bias", "vision_cfg", "text_cfg", "preprocess_cfg"}
        known |= {"multimodal_cfg"}  # CoCa's
        assert set(json.loads(path.read_text())) <= known
