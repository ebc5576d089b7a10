"""The wheel: what is in it, what it requires, and that it runs from anywhere."""

import os
import runpy
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the files of the wheel, as pip installs them."""
    pytest.importorskip("hatchling", reason="the wheel needs hatchling: pip install -r requirements-test.txt")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", folder, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_every_file_of_the_package(installed):
    skip = {"__pycache__"}
    here = {p.relative_to(ROOT) for p in (ROOT / "miniclip").rglob("*") if p.is_file() and not skip & set(p.parts)}
    there = {p.relative_to(installed) for p in (installed / "miniclip").rglob("*") if p.is_file()}
    added = {str(path.relative_to("miniclip")) for path in there - here}
    configs = {f"model_configs/{path.name}" for path in (ROOT / "model_configs").glob("*.json")}
    assert here <= there and added == configs | {"commands/train.py", "commands/evaluate.py"}
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"miniclip"}


def test_it_requires_what_the_requirements_files_say(installed):
    about = Parser().parsestr(next(installed.glob("*.dist-info/METADATA")).read_text())
    required = [line.replace("'", '"').split(" ; ")[0].split("; extra")[0] for line in about.get_all("Requires-Dist")]
    lines = [line for path in ROOT.glob("requirements*.txt") for line in path.read_text().splitlines()]
    encoders = (ROOT / "requirements-encoders.txt").read_text()  # those are installed with --no-deps
    lines = [line for line in lines if line[:1] not in ("", "#") and line not in encoders]
    more = runpy.run_path(str(ROOT / "hatch_build.py"))["PACKAGES"]  # extras without a file
    assert sorted(required) == sorted([*lines, *(package for packages in more.values() for package in packages)])
    assert set(about.get_all("Provides-Extra")) == {"test", "ui", "heic", *more}
    entry = next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    assert "miniclip = miniclip.__main__:main" in entry


def test_it_runs_from_anywhere(installed, tmp_path):
    def run(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = run("-c", "import miniclip; print(miniclip.__file__, *miniclip.list_models())").split()
    assert found[0] == str(installed / "miniclip" / "__init__.py")
    assert found[1:] == sorted(path.stem for path in (ROOT / "model_configs").glob("*.json"))
    assert {line.split()[0] for line in run("-m", "miniclip").splitlines()[3:-2]} >= {"train", "evaluate", "search"}
    assert "--train_file" in run("-m", "miniclip", "train", "--help")
    assert "--eval_file" in run("-m", "miniclip", "evaluate", "--help")
    run("-m", "miniclip", "shapes", "set", "--train", "2", "--eval", "1")
    assert (tmp_path / "set" / "train.json").is_file()
