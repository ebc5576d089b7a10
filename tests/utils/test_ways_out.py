"""Processes of a distributed run end cleanly, whatever ends them."""

import json
import os
import subprocess
import sys

from tests.conftest import ROOT


def test_no_way_out_aborts():
    """Threads of a process group that outlive the interpreter would abort it: status -6, "terminate called"."""
    expected = {"end": [0, 0], "exit": [3, 3], "error": [1, 1], "bug": [1, 1], "interrupt": [130, 1]}
    done = subprocess.run(
        [sys.executable, "tests/ways_out_worker.py", *expected], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the last words of one process") == 2, "what was printed is not lost"
    assert json.loads(done.stdout.splitlines()[-1]) == expected, done.stderr[-3000:]
    assert "terminate called" not in done.stderr
    for line in ("train.py: captions.json is missing", "RuntimeError: unexpected", "train.py: stopped"):
        assert done.stderr.count(line) == 1, line
