"""A few photos and no evaluation file: a share of the images is held out, and the batch follows the data."""

import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import pytest

from miniclip.commands.convert_data import main as repack
from miniclip.data import image_id
from miniclip.datasets.read import read_source
from miniclip.training.holdout import fit_batch, hold_out
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import open_image
from tests.training.test_losses import flat
from tests.training.test_training import largest_difference, recipe  # noqa: F401


def images(records) -> list[int]:
    return [image_id(record["image"]) for record in records]


def pixels(image) -> bytes:
    return open_image(image).tobytes()


def source(caption_set, form: str) -> str:
    """Every image in two records, one after the other, in a form of data."""
    path, out = flat(caption_set), caption_set / f"flat.{form}"
    if form == "tar":
        repack([str(path), str(out)])
    if form == "parquet":
        import datasets

        rows = [(caption_set / record["image"]).read_bytes() for record in json.loads(path.read_text())]
        texts = [record["caption"][0] for record in json.loads(path.read_text())]
        datasets.Dataset.from_dict({"image": rows, "text": texts}).to_parquet(out)
    return str(out)


@pytest.mark.parametrize("form", ["json", "tar", "parquet", "two"])
def test_no_image_is_on_both_sides(form, caption_set):
    records = read_source(f"{source(caption_set, 'tar')}::{source(caption_set, 'json')}" if form == "two"
                          else source(caption_set, form))  # fmt: skip
    train, held_out, line = hold_out(records, None, 7, "data")
    assert "2 of 24 images" in line
    assert len(held_out) == len(set(images(held_out))) == 2, "each is in the gallery once"
    content = [{hashlib.sha256(pixels(record["image"])).hexdigest() for record in side} for side in (train, held_out)]
    assert len(content[0]) == 22 and not content[0] & content[1], "also where a shard has a copy of a file"
    assert all(len(record["caption"]) == 2 for record in held_out), "each caption is asked for once"
    texts = {text for side in (train, held_out) for record in side for text in record["caption"]}
    assert len(train) == (44 if form in ("parquet", "two") else 22) and len(texts) == 48, "all others are trained on"
    again, other = (images(hold_out(records, None, seed, "data")[1]) for seed in (7, 8))
    assert again == images(held_out) != other


def test_copies_of_a_file_stay_together(caption_set):
    records = json.loads((caption_set / "captions.json").read_text())
    for number in range(24):
        shutil.copy(caption_set / f"{number}.png", caption_set / f"copy{number}.png")
    copies = [{**record, "image": f"copy{record['image']}"} for record in records]
    (caption_set / "copies.json").write_text(json.dumps(records + copies))
    train, held_out, line = hold_out(read_source(str(caption_set / "copies.json")), 0.5, 0, "data")
    assert "12 of 24 images" in line and len(held_out) == 12 and len(train) == 24
    sides = [{(caption_set / record["image"]).read_bytes() for record in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]


def test_a_damaged_image_in_a_shard_is_not_measured(caption_set):
    path = source(caption_set, "tar")
    data = bytearray((caption_set / "flat.tar").read_bytes())
    records = read_source(path)
    _, held_out, _ = hold_out(records, 0.5, 0, "data")
    bad = held_out[0]["image"]
    data[bad.offset : bad.offset + bad.size] = bytes(bad.size)
    (caption_set / "flat.tar").write_bytes(data)
    train, held_out, line = hold_out(read_source(path), 0.5, 0, "data")
    assert re.search("1[12] of 2[45] images", line), line
    assert str(bad) in [str(record["image"]) for record in train]
    assert all(record["image"].read().strip(b"\0") for record in held_out)


def test_images_of_which_none_can_be_read_are_said(caption_set):
    """The reason is: a table's paths, for example, that start somewhere else."""
    import datasets

    rows = [{"image": f"{number}.png", "text": "a sheet"} for number in range(24)]
    (caption_set / "tables").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(caption_set / "tables" / "data.parquet")
    with pytest.raises(InputError, match="The first: .*row [0-9]*: '[0-9]*.png': no such file in .*tables"):
        hold_out(read_source(str(caption_set / "tables" / "data.parquet")), None, 0, "data")


def test_data_too_few_to_split(caption_set):
    records = read_source(f"{caption_set / 'captions.json'}[:4]")
    train, held_out, _ = hold_out(records, None, 0, "data")
    assert len(train) == len(held_out) == 2
    assert len(hold_out(records, 0.9, 0, "data")[0]) == 2, "and two are always left"
    train, held_out, line = hold_out(records[:3], None, 0, "data")
    assert len(train) == 3 and held_out is None and "nothing is measured" in line and "--eval_file" in line
    with pytest.raises(InputError, match="data: 3 records with fewer than 4 images are too few"):
        hold_out(records[:3], 0.1, 0, "data")


@pytest.mark.parametrize("number, processes, given, batch", [
    (90, 1, False, 90), (90, 4, False, 22), (2, 1, False, 2), (2, 2, False, 1), (500, 1, False, 128),
    (1, 1, False, "1 pair to train on: 2 at least"), (0, 1, False, "0 pairs"),
    (3, 4, False, "3 pairs to train on: 4.*fewer processes"),
    (90, 1, True, "90 pairs do not fill a batch of 128. Use --per_device_train_batch_size 90"),
])  # fmt: skip
def test_the_batch_follows_the_data(number, processes, given, batch):
    args = SimpleNamespace(per_device_train_batch_size=128, world_size=processes, dataloader_drop_last=True)
    if isinstance(batch, str):
        with pytest.raises(InputError, match=batch):
            fit_batch(args, number, given)
        return
    line = fit_batch(args, number, given)
    assert args.per_device_train_batch_size == batch and (line is None) == (number == 500)


def test_a_few_photos_end_with_a_quality(recipe, caption_set, run_script):  # noqa: F811
    """By train.py without a batch size or an evaluation file; cut and resumed it ends at the same weights."""
    values = json.loads(recipe.read_text())
    for name in ("per_device_train_batch_size", "holdout"):
        del values[name]
    (caption_set / "few.json").write_text(json.dumps(values | {"num_train_epochs": 6}))
    save = ["--save_strategy", "steps", "--save_steps", "3"]
    done = run_script("train.py", caption_set / "few.json", *save, "--output_dir", caption_set / "whole")
    assert "held out to measure: 2 of 24 images, drawn by seed 3" in done.stdout and "--holdout 0" in done.stdout
    assert "the batch is 22 pairs: there are 22, fewer than the usual 128" in done.stdout
    assert "22 images, 44 captions" in done.stdout and "text to image" in done.stdout
    shutil.copytree(caption_set / "whole", caption_set / "run")
    for name in ("checkpoint-6/trainer_state.json", "model.safetensors"):
        (caption_set / "run" / name).unlink()
    run_script("train.py", caption_set / "few.json", *save, "--resume")
    assert largest_difference(caption_set / "whole", caption_set / "run") == 0
    record = json.loads((caption_set / "run" / "run.json").read_text())
    assert record["holdout"]["images"] == 2 and record["pairs_per_step"] == 22
    done = run_script("train.py", caption_set / "few.json", "--resume", "--holdout", "0.2", check=False)
    assert done.returncode == 1 and "holdout.images was 2 and is 5" in done.stderr
    run_script("train.py", caption_set / "few.json", "--holdout", "0", "--max_steps", "1", "--output_dir",
               caption_set / "all")  # fmt: skip
    done = run_script("train.py", caption_set / "few.json", "--train_file", f"{caption_set / 'captions.json'}[:1]",
                      "--output_dir", caption_set / "one", check=False)  # fmt: skip
    assert done.returncode == 1 and "1 pair to train on: 2 at least are needed" in done.stderr
