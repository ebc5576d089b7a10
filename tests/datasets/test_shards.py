"""WebDataset shards: real tar files, whole and broken."""

import json
import os
import pickle
import tarfile
import warnings

import pytest
from torch.utils.data import DataLoader

from miniclip.config import PreprocessConfig
from miniclip.datasets import shards as shards_module
from miniclip.datasets.convert import convert
from miniclip.datasets.read import read_captions, read_source
from miniclip.datasets.records import ReadOptions
from miniclip.datasets.shards import Shards, expand
from miniclip.training.dataset import RunDataset
from miniclip.transforms import Preprocess
from miniclip.utils.errors import InputError

SKIP = ReadOptions(on_bad_sample="skip")


def pack(path, members: dict[str, bytes], format=tarfile.PAX_FORMAT):
    """A tar file with members in the order given."""
    import io

    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            if data is None:
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def shards(caption_set):
    """The caption set in four shards of six samples."""
    records = read_captions(caption_set / "captions.json")
    assert convert(records, str(caption_set / "shards" / "{000..003}.tar")) == 24
    return caption_set / "shards"


def test_patterns():
    assert expand("a/{008..011}.tar") == [f"a/{n}.tar" for n in ("008", "009", "010", "011")]
    assert expand("{0..1}-{x,y}.tar") == ["0-x.tar", "0-y.tar", "1-x.tar", "1-y.tar"]
    assert expand("{8..11}.tar") == ["8.tar", "9.tar", "10.tar", "11.tar"]
    assert expand("plain.tar") == ["plain.tar"]
    with pytest.raises(InputError, match="counts down"):
        expand("{9..3}.tar")
    with pytest.raises(InputError, match="no file matches"):
        expand("/nowhere/*.tar")


def test_a_key_of_the_json_can_be_named(tmp_path):
    members = {
        "a.jpg": b"first", "a.txt": b"alt", "a.json": b'{"caption": "alt text", "recaption": "a long one"}',
        "b.jpg": b"second", "b.json": b'{"caption": "alt text"}',
    }  # fmt: skip
    path = pack(tmp_path / "a.tar", members)
    assert [record["caption"] for record in Shards([path])] == [["alt"], ["alt text"]]
    with pytest.warns(UserWarning, match="b.json"):
        source = Shards([path], ReadOptions(caption_column="recaption", on_bad_sample="skip"))
    assert [record["caption"] for record in source] == [["a long one"]]
    with pytest.raises(InputError, match="skipping them would leave no samples"):
        Shards([path], ReadOptions(caption_column="nonsense", on_bad_sample="skip"))


def test_links_are_reported(tmp_path):
    path = pack(tmp_path / "a.tar", {"a.jpg": b"first", "a.txt": b"one"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
    with pytest.warns(UserWarning, match="b.jpg: not a file but a link"):
        assert len(Shards([path], SKIP)) == 1


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_tar_format_is_read(tmp_path, format):
    """Names too long for a header, and of other letters; a folder; extensions in capitals and with several dots."""
    long = "x" * 80 + "/" + ("y" * 90 if format == tarfile.USTAR_FORMAT else "y" * 150 + "é")
    members = {
        "d": None, f"{long}.jpg": b"first", f"{long}.txt": " größer \n".encode(), "d/b.JPG": b"second",
        "d/b.json": b'{"caption": ["one", "two"], "id": 3}', "c.txt": b"third caption", "c.seg.png": b"third",
        "__meta__.json": b"{}", "._c.png": b"of a Mac",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = Shards([pack(tmp_path / "a.tar", members, format)])
    got = [(record["image"].read(), record["caption"]) for record in source]
    assert got == [(b"first", ["größer"]), (b"second", ["one", "two"]), (b"third", ["third caption"])]
    assert str(source[0]["image"]) == f"{tmp_path / 'a.tar'}: {long}.jpg"
    assert pickle.loads(pickle.dumps(source[1]["image"])).read() == b"second"
    assert list(source)[-1]["caption"] == pickle.loads(pickle.dumps(source))[2]["caption"]


def test_what_is_wrong_in_shards_is_named_and_the_rest_used(tmp_path):
    members = {
        "0.jpg": b"0", "0.txt": b"sound", "1.jpg": b"1", "2.txt": b"no image", "3.psd": b"3", "3.txt": b"unknown",
        "4.png": b"4", "4.json": b"{broken", "5.png": b"5", "5.txt": b" \n", "6.webp": b"6", "6.txt": b"\xff\xfe",
        "7.jpg": b"7", "7.txt": b"also sound", "8.png": b"8", "8.json": b'{"id": 8}',
    }  # fmt: skip
    first = pack(tmp_path / "0.tar", members)
    whole = pack(tmp_path / "1.tar", {"9.jpg": b"9" * 2000, "9.txt": b"sound", "a.txt": b"cut", "a.jpg": b"a" * 2000})
    whole.write_bytes(whole.read_bytes()[: 512 * 9 + 700])  # within the last image
    (tmp_path / "2.tar").write_bytes(b"no tar at all, but an error page" * 40)
    broken = pack(tmp_path / "3.tar", {"b.jpg": b"b", "b.txt": b"sound", "c.jpg": b"c", "c.txt": b"lost"})
    data = bytearray(broken.read_bytes())
    data[4 * 512 + 150] ^= 1  # the header of the third member
    broken.write_bytes(data)
    paths = [str(tmp_path / f"{n}.tar") for n in range(4)]
    expected = [
        "0.tar: 1: no caption in a known format among .jpg", "0.tar: 2: no image in a known format among .txt",
        "0.tar: 3: no image in a known format among .psd, .txt",
        "0.tar: 4.json: invalid JSON", "0.tar: 5.txt: caption 0 is not",
        "0.tar: 6.txt: the caption is not UTF-8", "0.tar: 8.json: caption 0 is not text", "1.tar: a.jpg: the shard is",
        "1.tar: a: no image", "2.tar: damaged or cut off", "3.tar: damaged or cut off at byte 2048",
    ]  # fmt: skip
    for _ in range(2):  # from the tar files, then from the index that was kept
        with pytest.warns(UserWarning, match=f"{len(expected)} problems in the shards:(.|\n)*The other 4 are") as said:
            source = Shards(paths, SKIP)
        for part in expected:
            assert part in str(said[0].message)
        assert [record["caption"][0] for record in source] == ["sound", "also sound", "sound", "sound"]
    assert len(list(tmp_path.glob(".miniclip-*.npz"))) == 1
    with pytest.raises(InputError, match="11 problems (.|\n)*skip them with --on_bad_sample skip"):
        Shards(paths)
    with (
        pytest.raises(InputError, match="2.tar: damaged(.|\n)*skipping them would leave no samples"),
        warnings.catch_warnings(),
    ):
        Shards(paths[2:3], SKIP)
    with pytest.raises(InputError, match="1 of 2 shards are missing"):
        read_source(f"{tmp_path}/{{0,nine}}.tar")
    with pytest.warns(UserWarning, match="1 of 2 shards are missing"):
        assert len(read_source(f"{tmp_path}/{{0,nine}}.tar", SKIP)) == 2
    for name in ("a.tar.gz", "a.tar"):
        (tmp_path / name).write_bytes(b"\x1f\x8b" + first.read_bytes())
        with pytest.raises(InputError, match="decompress it"):
            read_source(str(tmp_path / name))


def test_archives_joined_end_to_end_lose_nothing_unsaid(tmp_path):
    """tar stops at the end mark of the first, as the other archives after it may be anything."""
    parts = [pack(tmp_path / f"{n}.tar", {f"{n}.jpg": b"x", f"{n}.txt": b"a dog"}).read_bytes() for n in "ab"]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    with pytest.raises(InputError, match=r"all.tar: there is more after its end at byte \d+"):
        Shards([str(tmp_path / "all.tar")])
    with pytest.warns(UserWarning, match="The other 1 are used"):
        assert len(Shards([str(tmp_path / "all.tar")], SKIP)) == 1


def test_many_shards_are_indexed_once(tmp_path, monkeypatch):
    read, index = [], shards_module._index_shard
    monkeypatch.setattr(shards_module, "_index_shard", lambda *about: read.append(about) or index(*about))
    for n in range(300):
        pack(tmp_path / "s" / f"{n:05d}.tar", {f"{n}-{i}.{kind}": b"%d" % n for i in "ab" for kind in ("jpg", "txt")})
    source = read_source(f"{tmp_path}/s/{{00000..00299}}.tar")
    assert len(source) == 600 and source[599]["caption"] == ["299"] and source[2 * 123]["image"].read() == b"123"
    assert len(read) == 300 and len(Shards(source.paths)) == 600 and len(read) == 300
    pack(tmp_path / "s" / "00007.tar", {"new.png": b"new", "new.txt": b"new"})
    assert len(Shards(source.paths)) == 599 and Shards(source.paths)[14]["caption"] == ["new"]


def test_a_folder_that_cannot_be_written_to(shards, monkeypatch, tmp_path):
    """The index then goes to the user's cache folder; a damaged index is made anew."""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = os.replace

    def refuse(source, target):
        if str(target).startswith(str(shards)):
            raise PermissionError(13, "read-only")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert len(read_source(str(shards))) == 24
    (index,) = (tmp_path / "cache" / "miniclip").glob("*.npz")
    assert not list(shards.glob(".*"))
    index.write_bytes(index.read_bytes()[:100])
    assert len(read_source(str(shards))) == 24 and index.stat().st_size > 1000


@pytest.fixture
def damaged(caption_set):
    """24 samples of which 5 and 6 are no picture and 11 is cut off: (source, the same images as files)."""
    members = {}
    for i in range(24):
        data = (caption_set / f"{i}.png").read_bytes()
        data = {5: b"<html>", 6: b"", 11: data[: len(data) // 2]}.get(i, data)
        members |= {f"{i:03d}.png": data, f"{i:03d}.txt": b"number %d" % i}
    pack(caption_set / "damaged" / "0.tar", members)
    return read_source(str(caption_set / "damaged" / "0.tar"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named_counted_and_replaced(damaged, workers, caplog):
    dataset = RunDataset(damaged, Preprocess(PreprocessConfig(size=16)))
    loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=list)
    got = [int(item["caption"].split()[1]) for batch in loader for item in batch]
    instead = {5: 7, 6: 7, 11: 12}
    assert got == [instead.get(i, i) for i in range(24)]
    assert dataset.bad.sum() == 4  # 5 and 6 for item 5, 6 for item 6, 11
    if not workers:
        named = [message.partition(":")[2].split(":")[0].strip() for message in caplog.messages]
        assert named == ["005.png", "006.png", "006.png", "011.png"]


def test_a_set_to_measure_on_leaves_corrupt_images_out(damaged, caption_set):
    with pytest.warns(UserWarning, match="3 of 24 images are damaged(.|\n)*005.png(.|\n)*The other 21 are used"):
        source = read_source(
            str(caption_set / "damaged" / "0.tar"), ReadOptions(on_bad_sample="skip", check_handles=True)
        )
    assert [record["caption"] for record in source] == [[f"number {i}"] for i in range(24) if i not in (5, 6, 11)]


def test_a_corrupt_image_stops_the_run_where_that_is_asked_for(damaged):
    dataset = RunDataset(damaged, Preprocess(PreprocessConfig(size=16)), on_bad="stop")
    assert dataset[4]["caption"] == "number 4" and dataset.bad.sum() == 0
    with pytest.raises(InputError, match="0.tar: 005.png: not an image"):
        dataset[5]


def test_when_nothing_can_be_read_the_run_stops(damaged, caption_set):
    dataset = RunDataset(damaged, Preprocess(PreprocessConfig(size=16)))
    (caption_set / "damaged" / "0.tar").unlink()
    with pytest.raises(InputError, match="No such file"):
        dataset[0]
    assert dataset.bad.sum() == 99


def test_training_and_measuring_on_shards(shards, caption_set, tiny_config, run_script):
    """A run on shards with a damaged image in them ends well and says so; evaluate.py gives for shards what it gives
    for the caption file."""
    (caption_set / "tiny.json").write_text(json.dumps(tiny_config.to_dict()))
    with tarfile.open(shards / "001.tar") as tar:
        member = tar.getmembers()[4]
    data = bytearray((shards / "001.tar").read_bytes())
    data[member.offset_data : member.offset_data + 8] = b"no image"
    (caption_set / "train").mkdir()
    for n in range(4):
        (caption_set / "train" / f"{n}.tar").write_bytes(data if n == 1 else (shards / f"00{n}.tar").read_bytes())
    out = caption_set / "run"
    done = run_script(
        "train.py", "--model", caption_set / "tiny.json", "--train_file", f"{caption_set}/train/{{0..3}}.tar",
        "--eval_file", shards, "--output_dir", out, "--per_device_train_batch_size", "8", "--num_train_epochs", "4",
        "--dataloader_num_workers", "1", "--use_cpu", "--disable_tqdm", "true", "--eval_strategy", "no",
    )  # fmt: skip
    assert "24 images, 48 captions, 0 of them cut off" in done.stdout
    named = done.stderr.count("000008.png: not an image")
    assert 1 <= named <= 4 and f"replaced by the next sample: {named} (" in done.stderr
    listed = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert len(listed) == named and {line["when"] for line in listed} <= {f"epoch {n}" for n in range(4)}
    assert all(line["sample"].endswith("000008.png") and line["reason"].startswith("not an image") for line in listed)
    assert f"skipped {named} times: {out}/bad_samples.jsonl" in done.stdout

    import evaluate

    metrics = []
    for source in (caption_set / "captions.json", shards):
        evaluate.main(["--model", str(out), "--eval_file", str(source), "--output_file", str(caption_set / "out.json"),
                       "--device", "cpu", "--feature_cache", str(caption_set / "cache")])  # fmt: skip
        metrics.append(json.loads((caption_set / "out.json").read_text())["metrics"])
    assert metrics[0] == metrics[1]
