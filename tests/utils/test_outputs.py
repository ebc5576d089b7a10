"""Outputs of commands on another store, and addresses in places where only a path can be."""

import os

import fsspec
import pytest

from miniclip.utils.errors import InputError
from miniclip.utils.files import write_text
from miniclip.utils.outputs import local_outputs


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_outputs_are_copied_when_the_command_is_done(tmp_path):
    url = f"file://{tmp_path}/store"
    for _ in range(2):  # nothing of the first is left for the second
        argv = ["--report", f"{url}/out", f"--output-file={url}/a.json", "--table", f"{url}/t.md", f"{url}/t.tex"]
        with local_outputs([*argv, "--eval_file", "s3://bucket/captions.json"]) as words:
            places = [words[1], words[2].partition("=")[2], words[4], words[5]]
            assert words[2].startswith("--output-file=/") and words[-1] == "s3://bucket/captions.json"
            (tmp_path / "out").mkdir(exist_ok=True)
            for place, name in zip(places, ("out/sub/report.html", "", "", "")):
                path = tmp_path.joinpath(place, *name.split("/")[1:]) if name else tmp_path / place
                assert not path.exists()
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(place)
            assert not (tmp_path / "store").exists() or _
    found = {path.relative_to(tmp_path / "store").as_posix() for path in (tmp_path / "store").rglob("*.*")}
    assert found == {"out/sub/report.html", "a.json", "t.md", "t.tex"}
    with pytest.raises(ZeroDivisionError):
        with local_outputs(["--output_dir", f"{url}/failed"]) as words:
            raise ZeroDivisionError
    assert not (tmp_path / "store" / "failed").exists()


def test_what_cannot_be_copied_is_said(tmp_path, monkeypatch):
    def gone(*args, **kwargs):
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr("miniclip.utils.remote.time.sleep", lambda seconds: None)
    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "put_file", gone)
    with pytest.raises(
        InputError, match="nobody there.* It is in .*/a.json; to copy it: miniclip sync .*/a.json file://"
    ):
        with local_outputs(["--output_file", f"file://{tmp_path}/a.json"]) as words:
            (tmp_path / words[1]).write_text("{}")


@pytest.mark.parametrize("words", [
    ["s3://bucket/shapes"], ["a.json", "s3://bucket/0.tar"], ["index", "photos", "--index", "s3://bucket/i.mc"],
    ["--images", "s3://bucket/photos"], ["s3://bucket/run", "--seed", "1"], ["--feature_cache=s3://bucket/cache"],
    ["--output_dir", "https://host/a"], ["--output_dir", "memory://bucket/a"], ["--output_dir", "zz://bucket/a"],
    ["--output_dir", "s3:/bucket/a"],
])  # fmt: skip
def test_no_folder_is_called_s3(words, tmp_path):
    with pytest.raises(InputError, match="://"):
        with local_outputs(words):
            pass
    assert not list(tmp_path.glob("*:*"))


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    """Nor is a device: as root `--html /dev/null` would leave a file in its place."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "found")
    assert os.read(reader, 100) == b"found" and (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    os.close(reader)
