"""An image that is not a path: anybody's ImageFile is embedded, cached, trained on and converted like the package's."""

import json
import pickle
import tarfile

import pytest
import torch

import miniclip
from miniclip.config import PreprocessConfig
from miniclip.data import CaptionDataset, image_id, text_id
from miniclip.datasets.convert import convert
from miniclip.datasets.mixture import Mixture
from miniclip.datasets.read import read_source
from miniclip.datasets.records import one_per_image
from miniclip.inference.embed import embed_images
from miniclip.inference.evaluator import RetrievalEvaluator
from miniclip.inference.feature_cache import FeatureCache, file_key
from miniclip.training.arguments import RunArguments
from miniclip.training.dataset import RunDataset
from miniclip.training.trainer import RunTrainer
from miniclip.transforms import Preprocess
from miniclip.utils.files import sha256
from miniclip.utils.image_files import BufferedImage, ImageError, ImageFile, open_image


class InMemory(ImageFile):
    """Bytes in memory, as from a remote store; counts how often they are read."""

    reads = 0

    def __init__(self, name: str, data: bytes):
        self.name, self.data = name, data

    def read(self) -> bytes:
        type(self).reads += 1
        return self.data

    def __str__(self) -> str:
        return f"memory: {self.name}"


class Keyed(InMemory):
    """One whose store knows the content's hash."""

    def key(self) -> bytes:
        return self.name.encode().rjust(32)


@pytest.fixture
def records(caption_set) -> list[dict]:
    found = json.loads((caption_set / "captions.json").read_text())
    return [
        {"image": InMemory(record["image"], (caption_set / record["image"]).read_bytes()), "caption": record["caption"]}
        for record in found
    ]


def test_it_is_embedded_and_cached_like_the_file(records, caption_set, tiny_model):
    preprocess = Preprocess(PreprocessConfig(size=32))
    images, files = [record["image"] for record in records], [caption_set / r["image"].name for r in records]
    cache = FeatureCache.for_images(None, tiny_model, preprocess)
    embeds = embed_images(tiny_model, preprocess, images, cache=cache)
    assert torch.equal(torch.from_numpy(embeds), torch.from_numpy(embed_images(tiny_model, preprocess, files)))
    assert embed_images(tiny_model, preprocess, images[3]).shape == (1, embeds.shape[1])
    assert file_key(images[0]) == images[0].key() == bytes.fromhex(sha256(files[0])) and file_key(files[0]) in cache
    with pytest.raises(ImageError, match="memory: x: not an image in a supported format"):
        open_image(InMemory("x", b"<html>"))


def test_a_model_is_trained_on_it(records, tiny_config, tmp_path):
    preprocess, tokenizer = Preprocess(tiny_config.preprocess_cfg), miniclip.Tokenizer(16)
    args = RunArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True,
        dataloader_num_workers=1,
    )  # fmt: skip
    trainer = RunTrainer(
        miniclip.MiniClip(tiny_config), args, RunDataset(records, preprocess), preprocess=preprocess,
        tokenizer=tokenizer, evaluator=RetrievalEvaluator(records, preprocess, tokenizer),
    )  # fmt: skip
    assert trainer.train().global_step == 2
    assert any("R@1" in name for name in trainer.evaluate())
    assert one_per_image(records, "x") == records and len(Mixture([records, records])) == 2 * len(records)


def test_it_is_read_once_for_each_sample_and_known_by_its_key(records):
    dataset = CaptionDataset(records, Preprocess(PreprocessConfig(size=8)))
    InMemory.reads = 0
    item = dataset[3]
    assert InMemory.reads == 1
    assert item["pair_ids"] == (image_id(records[3]["image"]), text_id(item["caption"]))
    keyed = Keyed("etag", records[3]["image"].data)
    assert BufferedImage(keyed).key() == keyed.key() == b"etag".rjust(32)
    assert BufferedImage(records[3]["image"]).key() == records[3]["image"].key() != keyed.key()
    assert str(BufferedImage(keyed)) == "memory: etag" and pickle.loads(pickle.dumps(keyed)).read() == keyed.data
    dataset = CaptionDataset([{"image": keyed, "caption": ["x"]}], Preprocess(PreprocessConfig(size=8)))
    assert dataset[0]["pair_ids"] == (image_id(keyed), text_id("x"))


def test_it_is_packed_into_shards(records, tmp_path):
    records[5]["image"].data, tmp_path = b"<html>", tmp_path / "out"
    with pytest.warns(UserWarning, match="memory: 5.png: not an image"):
        assert convert(records, str(tmp_path / "0.tar")) == len(records) - 1
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert tar.extractfile(tar.getmembers()[0]).read() == records[0]["image"].data
    with pytest.warns(UserWarning, match="memory: 5.png: not an image"):
        assert convert(records, str(tmp_path / "a.json")) == len(records) - 1
    source = read_source(str(tmp_path / "a.json"))
    assert [open(record["image"], "rb").read() for record in source[:5]] == [r["image"].data for r in records[:5]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "a.json", "a_images"]


def test_read_and_a_name_are_required():
    with pytest.raises(TypeError, match="abstract"):
        ImageFile()
