import json
import pickle
import warnings

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from miniclip.config import PreprocessConfig
from miniclip.data import Collator
from miniclip.datasets.read import read_captions
from miniclip.datasets.records import flatten_captions
from miniclip.tokenizer import Tokenizer
from miniclip.training.augment import TrainTransform
from miniclip.training.dataset import RunDataset
from miniclip.transforms import Preprocess
from miniclip.utils.bad_samples import CaptionFileError


def write(folder, records, name="captions.json", **kwargs):
    (folder / name).write_text(json.dumps(records), **kwargs)
    return folder / name


def test_reads_the_published_form(caption_set):
    (caption_set / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(caption_set / "sub" / "a.png")
    path = write(caption_set, [{"image": "sub\\a.png", "caption": "one string"}], encoding="utf-8-sig")
    (record,) = read_captions(path)
    assert record == {"image": str(caption_set / "sub" / "a.png"), "caption": ["one string"]}
    path = write(caption_set, [{"image": "a.png", "caption": ["x", "y"], "id": 3}])
    (again,) = read_captions(path, caption_set / "sub")
    assert again["caption"] == ["x", "y"]
    assert flatten_captions([record, again]) == (["one string", "x", "y"], [0, 1, 1])


def test_all_bad_records_are_reported_together(caption_set):
    (caption_set / "page.png").write_text("<html>")
    good = {"image": "0.png", "caption": ["fine"]}
    bad = {
        1: ({"image": "../../etc/passwd", "caption": ["x"]}, "leads out of the image folder"),
        2: ({"image": "/etc/passwd", "caption": ["x"]}, "leads out of the image folder"),
        3: ({"image": "none.png", "caption": ["x"]}, "no such file"),
        4: ({"image": "0.png", "caption": []}, "neither a string nor a list"),
        5: ({"image": "0.png", "caption": [3]}, "caption 0 is not text"),
        6: ({"image": "0.png", "caption": ["x", " "]}, "caption 1 is not text"),
        7: ({"image": "0.png", "caption": [None]}, "caption 0 is not text"),
        8: ({"image": "0.png"}, "there is no 'caption' in it"),
        9: ("0.png", "expected an object, found"),
        10: ({"image": 7, "caption": ["x"]}, "image is not a path: 7"),
        11: ({"image": "page.png", "caption": ["x"]}, "not an image in a supported format"),
        12: ({"image": "0.png", "caption": {"en": "x"}}, "caption 0 is not text"),
    }
    path = write(caption_set, [good, *(record for record, _ in bad.values())])
    with pytest.raises(CaptionFileError) as caught:
        read_captions(path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("captions.json: 12 of 13 records cannot be used:")
    for index, (_, reason) in bad.items():
        assert lines[index].startswith(f"  record {index}: ") and reason in lines[index]

    with pytest.warns(UserWarning, match="12 of 13 records(.|\n)*The other 1 are used"):
        assert [record["caption"] for record in read_captions(path, on_bad_sample="skip")] == [["fine"]]


def test_a_long_report_is_whole(caption_set):
    path = write(caption_set, [{"image": "0.png", "caption": ""}] * 50)
    with pytest.raises(CaptionFileError, match="50 of 50(.|\n)*record 49:(.|\n)*skipping them would leave no records"):
        read_captions(path)


@pytest.mark.parametrize(
    ("text", "reason"), [("[", "invalid JSON"), ("{}", "expected a list"), ("[]", "expected a list")]
)
def test_what_is_no_caption_file(tmp_path, text, reason):
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(CaptionFileError, match=f"captions.json: {reason}"):
        read_captions(tmp_path / "captions.json")
    with pytest.raises(CaptionFileError, match="other.json: no such file"):
        read_captions(tmp_path / "other.json")


def test_half_a_jpeg_is_found(caption_set):
    Image.effect_noise((200, 200), 50).save(caption_set / "half.jpg")
    data = (caption_set / "half.jpg").read_bytes()
    (caption_set / "half.jpg").write_bytes(data[: len(data) // 2])
    path = write(caption_set, [{"image": "half.jpg", "caption": "x"}, {"image": "0.png", "caption": "y"}])
    with pytest.raises(CaptionFileError, match="record 0: .*half.jpg: damaged"):
        read_captions(path)
    assert len(read_captions(path, check_images=False)) == 2


@pytest.fixture
def dataset(caption_set):
    cfg = PreprocessConfig(size=16)
    records = read_captions(caption_set / "captions.json")
    transform = TrainTransform(cfg, scale=(0.5, 1.0), hflip=0.5)
    return RunDataset(records, Preprocess(cfg), seed=5, transform=transform)


def test_items_depend_on_seed_epoch_and_index_alone(dataset):
    first = [dataset[i] for i in range(24)]
    again = [dataset[i] for i in reversed(range(24))][::-1]
    for a, b in zip(first, again):
        assert a["caption"] == b["caption"] and torch.equal(a["pixel_values"], b["pixel_values"])
    dataset.set_epoch(1)
    other = [dataset[i] for i in range(24)]
    changed = sum(a["caption"] != b["caption"] for a, b in zip(first, other))
    assert 4 <= changed <= 20  # two captions an image: about half of them change
    assert not any(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, other))


def test_every_caption_gets_its_turn(dataset):
    seen = set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        seen.add(dataset[7]["caption"])
    assert seen == set(dataset.records[7]["caption"])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_see_the_epoch_and_change_nothing(dataset, workers):
    expected = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected += [dataset[i]["pixel_values"] for i in range(24)]
    dataset.set_epoch(0)
    loader = DataLoader(
        dataset, 8, num_workers=workers, persistent_workers=workers > 0, collate_fn=Collator(Tokenizer(16))
    )
    got = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        got += [batch["pixel_values"] for batch in loader]
    assert torch.equal(torch.cat(got), torch.stack(expected))


def test_collator_trims_to_the_longest():
    items = [{"pixel_values": torch.zeros(3, 4, 4), "caption": text} for text in ("a dog", "a very small dog")]
    batch = Collator(Tokenizer())(items)
    assert batch["pixel_values"].shape == (2, 3, 4, 4) and batch["pixel_values"].dtype == torch.float32
    assert batch["input_ids"].shape == (2, 6)
    assert batch["input_ids"][0].tolist() == [49406, 320, 1929, 49407, 0, 0]
    assert Collator(Tokenizer(), multiple=8)(items)["input_ids"][0].tolist() == [49406, 320, 1929, 49407, 0, 0, 0, 0]
    assert Collator(Tokenizer(7), multiple=8)(items)["input_ids"].shape == (2, 7)
    items = [{"image_features": torch.full((5,), float(i)), "text_features": torch.zeros(4)} for i in range(3)]
    batch = Collator(Tokenizer())(items)
    assert set(batch) == {"image_features", "text_features"} and batch["image_features"][:, 0].tolist() == [0, 1, 2]


def test_flickr8k_is_read_whole(flickr8k):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        val = read_captions(flickr8k / "en_val.json")
        train = read_captions(flickr8k / "en_train.json", check_images=False)
    assert (len(val), len(train)) == (1000, 6000)
    assert all(len(record["caption"]) == 5 for record in val + train)
    assert not {record["image"] for record in val} & {record["image"] for record in train}


def test_odd_paths_and_broken_text_are_reported_not_crashed_on(caption_set):
    bad = ["x" * 300 + ".png", "a\0.png", "sub/../../0.png", "", "."]
    records = [{"image": image, "caption": "x"} for image in bad]
    records += [{"image": "0.png", "caption": ["ok", "half \ud83d"]}]
    with pytest.raises(CaptionFileError) as caught:
        read_captions(write(caption_set, records), on_bad_sample="skip")
    lines = str(caught.value).splitlines()
    reasons = [
        "File name too long",
        "NUL character",
        "leads out",
        "is not a path: ''",
        "a folder",
        "is not valid Unicode",
    ]
    for index, reason in enumerate(reasons):
        assert lines[1 + index].startswith(f"  record {index}: ") and reason in lines[1 + index]
    assert "skipping them would leave no records" in lines[-1]


def test_links_that_lead_out_of_the_folder_want_leave(caption_set, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk")
    Image.new("RGB", (8, 8)).save(elsewhere / "a.png")
    (caption_set / "images").symlink_to(elsewhere)
    (caption_set / "a.png").symlink_to(elsewhere / "a.png")
    (caption_set / "b.png").symlink_to(caption_set / "0.png")
    images = ["images\\a.png", "a.png", "b.png"]
    path = write(caption_set, [{"image": image, "caption": "x"} for image in images])
    with pytest.raises(CaptionFileError, match="2 of 3 (.|\n)*0: images/a.png: a link lea(.|\n)*1: a.png: a link"):
        read_captions(path)
    record, *_ = read_captions(path, allow_outside_image_root=True)
    assert record["image"] == str(caption_set / "images" / "a.png")


def test_broken_json_names_the_line(tmp_path):
    (tmp_path / "captions.json").write_text('[{"image": "a.png",\n  "caption": }]')
    with pytest.raises(CaptionFileError, match="captions.json: invalid JSON: .*line 2 column 14"):
        read_captions(tmp_path / "captions.json")


def test_the_draw_is_the_same_in_every_process(dataset):
    """Worked out once: a change would make resumed runs differ from the runs they resume."""
    drawn = [dataset.records[i]["caption"].index(dataset[i]["caption"]) for i in range(12)]
    assert drawn == [1, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0]


def test_collator_and_dataset_can_be_sent_to_workers(dataset):
    copy, collate = pickle.loads(pickle.dumps((dataset, Collator(Tokenizer(16)))))
    assert torch.equal(copy[3]["pixel_values"], dataset[3]["pixel_values"])
    assert torch.equal(collate([copy[3]])["input_ids"], Tokenizer(16)([dataset[3]["caption"]], trim=True))
