"""Caption files, images, shards, tables and models on other stores are read like local ones."""

import json
import pickle
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

import miniclip
from miniclip.config import PreprocessConfig
from miniclip.datasets.convert import convert
from miniclip.datasets.read import fingerprint, read_source
from miniclip.datasets.records import ReadOptions
from miniclip.datasets.remote import RemoteImage
from miniclip.inference.embed import embed_images
from miniclip.training.holdout import hold_out
from miniclip.transforms import Preprocess
from miniclip.utils import remote
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError
from miniclip.utils.local_copy import localised
from miniclip.utils.remote import StoreError, read_range
from tests.store_server import s3  # noqa: F401


@pytest.fixture
def bucket(caption_set, tmp_path, monkeypatch):
    """memory://bucket/data with the caption set as JSON, images beside it; and the filesystem."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    for file in caption_set.iterdir():
        if file.is_file():
            fs.pipe_file(f"/bucket/data/{file.name}", file.read_bytes())
    yield fs
    fs.store.clear()


def same(records, local) -> bool:
    read = [record["image"].read() for record in records]
    return [record["caption"] for record in records] == [record["caption"] for record in local] and read == [
        open(record["image"], "rb").read() for record in local
    ]


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "parquet", "tar", "saved"])
def test_each_form_is_read_like_a_local_one(form, bucket, caption_set, tmp_path, tiny_model):
    datasets = pytest.importorskip("datasets")
    local, made = read_source(str(caption_set / "captions.json")), tmp_path / f"other.{form}"
    rows = [{"image": Path(record["image"]).name, "caption": record["caption"]} for record in local]
    if form == "jsonl":
        made.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        lines = [f'{row["image"]},"{text}"\n' for row in rows for text in row["caption"]]
        made.write_text("image,caption\n" + "".join(lines))
    elif form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(made)
    elif form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(made)
    elif form == "tar":
        made = tmp_path / "shards"
        made.mkdir()
        convert(local, str(made / "{0..2}.tar"))
    else:
        made = caption_set / "captions.json"
    bucket.put(str(made), f"/bucket/data/{made.name}", recursive=made.is_dir())
    source = f"memory://bucket/data/{made.name}" + ("/{0..2}.tar" if form == "tar" else "")
    records = read_source(source, ReadOptions(image_root="memory://bucket/data"))
    assert same(records, local)
    assert same(read_source(f"{source}[:5]", ReadOptions(image_root="memory://bucket/data")), local[:5])
    images = [record["image"] for record in records]
    assert pickle.loads(pickle.dumps(images[0])).read() == images[0].read()
    preprocess = Preprocess(PreprocessConfig(size=32))
    embeds = embed_images(tiny_model, preprocess, images)
    here = embed_images(tiny_model, preprocess, [record["image"] for record in local])
    assert torch.equal(torch.from_numpy(embeds), torch.from_numpy(here))
    assert fingerprint(source, records)["records"] == 24 and fingerprint(source) == fingerprint(source)
    if form == "json":
        assert fingerprint(source)["files"] == fingerprint(str(caption_set / "captions.json"))["files"]
        assert len({record["image"] for record in records}) == 24 and str(images[3]) == "memory://bucket/data/3.png"
        kept, held, _ = hold_out(records, None, 0, source)
        assert len(kept) + len(held) == 24
    if form == "tar":
        folder = "memory://bucket/data/shards"
        assert f"{folder}/0.tar: " in str(images[0])
        assert same(read_source(f"{folder}/"), local) and same(read_source(f"{folder}/*.tar"), local)
        bucket.rm_file("/bucket/data/shards/1.tar")
        with pytest.raises(InputError, match=f"1 of 3 shards are missing:\n  {folder}/1.tar: no such file"):
            read_source(source)


def test_paths_do_not_lead_out(bucket, caption_set):
    source, records = "memory://bucket/data/captions.json", json.loads((caption_set / "captions.json").read_text())
    bad = ["../x.png", "/x.png", "memory://other/x.png", "file:///etc/passwd", "..\\x.png", "a/../../x.png",
           "memory://bucket/data/../x.png", "memory://bucket/database/x.png", "s3://b/x.png"]  # fmt: skip
    for record, image in zip(records, bad):
        record["image"] = image
    records[9]["image"] = "memory://bucket/data/9.png"
    records[10]["image"] = "sub\\..\\10.png"
    bucket.pipe_file("/bucket/data/captions.json", json.dumps(records).encode())
    with pytest.raises(InputError, match="9 of 24 records cannot be used") as error:
        read_source(source)
    message = str(error.value)
    assert all(f"record {i}: " in message for i in range(9)) and message.startswith(f"{source}: ")
    assert message.count("leads out of the image folder memory://bucket/data") == 9
    records = records[9:]
    bucket.pipe_file("/bucket/data/captions.json", json.dumps(records).encode())
    assert len(read_source(source)) == 15
    # From a local file: only images that the user allows.
    for record in records:
        record["image"] = f"memory://bucket/data/{record['image'].split('/')[-1]}".replace("sub\\..\\", "")
    (caption_set / "urls.json").write_text(json.dumps(records))
    with pytest.raises(InputError, match="an image on another store: allow it with --image_root memory://bucket, or"):
        read_source(str(caption_set / "urls.json"))
    for options in ({"image_root": "memory://bucket"}, {"image_root": "memory://"}, {"allow_outside_image_root": True}):
        assert len(read_source(str(caption_set / "urls.json"), ReadOptions(**options))) == 15


def test_missing_files_and_broken_connections(bucket, caption_set, monkeypatch):
    with pytest.raises(InputError, match="data/nope.json: no such file or folder on the store"):
        read_source("memory://bucket/data/nope.json")
    with pytest.raises(InputError, match="images with texts beside them are not read from a store: .*convert_data"):
        read_source("memory://bucket/data")
    with pytest.raises(InputError, match="cannot be opened .Protocol not known: zz"):
        read_source("zz://bucket/data.json")
    records = read_source("memory://bucket/data/captions.json")
    kind, cat, calls = type(bucket), type(bucket).cat_file, []

    def flaky(self, path, **kwargs):
        calls.append(path)
        if len(calls) % 4:
            raise ConnectionResetError("reset by peer")
        return cat(self, path, **kwargs)

    monkeypatch.setattr(kind, "cat_file", flaky)
    assert records[0]["image"].read() == (caption_set / "0.png").read_bytes() and len(calls) == 4
    calls.clear()

    def gone(self, path, **kwargs):
        calls.append(path)
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(kind, "cat_file", gone)
    with pytest.raises(ImageError, match="0.png: cannot be reached .*reset by peer.*check the network"):
        records[0]["image"].read()
    assert len(calls) == 4
    with pytest.raises(StoreError, match="reset by peer"):  # the index of shards is not made of what did not come
        convert_to_shard(bucket, caption_set)
        read_source("memory://bucket/one.tar")
    monkeypatch.setattr(kind, "cat_file", cat)
    assert len(read_source("memory://bucket/one.tar")) == 24

    def denied(self, path, **kwargs):
        raise PermissionError("denied")

    monkeypatch.setattr(kind, "cat_file", denied)
    with pytest.raises(StoreError, match="denied.: check the credentials"):
        read_range("memory://bucket/data/0.png")


def convert_to_shard(bucket, caption_set):
    if not bucket.exists("/bucket/one.tar"):
        convert(read_source(str(caption_set / "captions.json")), str(caption_set / "one.tar"))
        bucket.put_file(str(caption_set / "one.tar"), "/bucket/one.tar")


def test_models_are_loaded_from_a_store(bucket, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "checkpoint-2").mkdir()
    (tmp_path / "model" / "checkpoint-2" / "optimizer.pt").write_bytes(b"x")
    bucket.put(str(tmp_path / "model"), "/bucket/run", recursive=True)
    model, _, _ = miniclip.load("memory://bucket/run")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tiny_model.state_dict().values()))
    place = localised("memory://bucket/run")
    names = {path.name for path in Path(place).iterdir()}
    assert names == {"config.json", "model.safetensors", "manifest.json"}, "no checkpoints"
    config = str(tmp_path / "model" / "config.json")
    weights, _, _ = miniclip.load(config, "memory://bucket/run/model.safetensors")
    assert torch.equal(weights.logit_scale, model.logit_scale)
    data = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    bucket.pipe_file("/bucket/run/model.safetensors", bytes(data[:-4]))
    assert localised("memory://bucket/run") != place, "another version is another copy"
    with pytest.raises(InputError):
        miniclip.load("memory://bucket/run")
    with pytest.raises(InputError, match="nope: no such file or folder on the store"):
        miniclip.load("memory://bucket/nope")


def test_the_package_that_is_missing_is_named(monkeypatch):
    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        monkeypatch.setattr(remote, "_opened", {})
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
        with pytest.raises(InputError, match=f"{scheme}:// needs a package .*pip install {package}"):
            RemoteImage(f"{scheme}://bucket/a.png").read()


@pytest.mark.slow
def test_training_and_measuring_on_a_real_server(s3, caption_set, tiny_config, run_script, tmp_path):  # noqa: F811
    """Captions, images and shards on S3, with workers, and a connection that breaks now and then."""
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config.to_dict()))
    convert(read_source(str(caption_set / "captions.json")), str(tmp_path / "{0..2}.tar"))
    for file in caption_set.iterdir():
        if file.suffix in (".png", ".json", ".tar"):
            s3.fs.put_file(str(file), f"bucket/{'shards' if file.suffix == '.tar' else 'data'}/{file.name}")
    more = ["--model", tmp_path / "tiny.json", "--per_device_train_batch_size", "6", "--max_steps", "4", "--use_cpu"]
    more += ["--save_strategy", "no", "--fast", "false", "--dataloader_num_workers", "2", "--report_to", "none"]
    sources = ("s3://bucket/data/captions.json", "s3://bucket/shards/{0..2}.tar")
    for name, source, here in zip("ab", sources, (caption_set / "captions.json", tmp_path / "{0..2}.tar")):
        s3.set("drop", "GET", 20, drop_at=100)
        for data, folder in ((source, f"{name}1"), (here, f"{name}2")):
            files = ["--train_file", data, "--eval_file", data, "--output_dir", tmp_path / folder]
            done = run_script("train.py", *more, *files, env=s3.env)
            assert "bad samples" not in done.stdout
        assert s3.hits >= 20
        a, b = (load_file(tmp_path / f"{name}{number}" / "model.safetensors") for number in (1, 2))
        assert all(torch.equal(a[key], b[key]) for key in a)
    s3.fs.put(str(tmp_path / "a1"), "bucket/run", recursive=True)
    argv = ["--model", "s3://bucket/run", "--eval_file", sources[0], "--output_file", "s3://bucket/out/result.json"]
    done = run_script("evaluate.py", *argv, env=s3.env)
    assert "s3://bucket/run on s3://bucket/data/captions.json: 24 images, 48 captions" in done.stdout
    assert json.loads(s3.fs.cat_file("bucket/out/result.json"))["metrics"]
