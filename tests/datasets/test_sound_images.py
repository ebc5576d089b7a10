"""Images that were found sound are not decoded again, unless they change."""

import json
import os

import pytest

from miniclip.datasets import records, sound_images
from miniclip.datasets.read import read_captions
from miniclip.utils.bad_samples import CaptionFileError


@pytest.fixture
def opened(monkeypatch, tmp_path) -> list:
    """The images that are decoded, in a cache of their own; a dozen count as many, and each as settled."""
    found, decode = [], records.open_image
    monkeypatch.setattr(records, "open_image", lambda image, **more: found.append(image) or decode(image, **more))
    monkeypatch.setattr(records, "MANY", 12)
    monkeypatch.setattr(sound_images, "SETTLED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def test_only_new_and_changed_images_are_decoded(caption_set, opened):
    source = caption_set / "captions.json"
    assert len(read_captions(source)) == len(opened) == 24
    assert read_captions(source) and len(opened) == 24
    os.utime(caption_set / "3.png", (1, 1))
    assert read_captions(source) and opened[24:] == [str(caption_set / "3.png")]

    data = (caption_set / "5.png").read_bytes()
    (caption_set / "5.png").write_bytes(data[:-30])
    for _ in range(2):  # what is damaged is not remembered
        with pytest.raises(CaptionFileError, match="1 of 24 records cannot be used:\n  record 5: .*damaged"):
            read_captions(source)
    assert opened[25:] == [str(caption_set / "5.png")] * 2

    os.remove(caption_set / "7.png")
    with pytest.raises(CaptionFileError, match="2 of 24 records"):
        read_captions(source)


def test_what_has_just_been_written_and_half_a_cache_are_not_trusted(caption_set, opened, monkeypatch):
    monkeypatch.setattr(sound_images, "SETTLED", 1e12)
    source = caption_set / "captions.json"
    assert read_captions(source) and read_captions(source) and len(opened) == 48
    monkeypatch.setattr(sound_images, "SETTLED", 0)
    assert read_captions(source) and len(opened) == 72
    (cache,) = (caption_set / "cache" / "miniclip").glob("sound-*.npy")
    cache.write_bytes(cache.read_bytes()[:-9])
    assert read_captions(source) and len(opened) == 96
    source.write_text(json.dumps(json.loads(source.read_text())[:11]))
    assert read_captions(source) and len(opened) == 107  # few are quickly read


def test_a_folder_whose_name_is_not_unicode(opened):
    """Its images are reported as such, not by an error of Python's."""
    images = [{"image": os.fsdecode(b"/no such folder\xff/%d.png" % number)} for number in range(12)]
    assert all("no such file" in fault for fault in records.image_faults(images, "images"))
