"""Runs the project's scripts in processes that are forked from this one, which has imported everything: each is a
process of its own, as if a user had started it, and begins in a moment.

Reads a line of JSON for each run, [["train.py", "recipe.json", ...], seconds, processes, environment], and answers with
[exit status, stdout, stderr]. Several processes are started as torchrun would start them.
"""

import atexit
import gc
import io
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def prepare():
    """Imports what scripts import, most of it at leisure."""
    import datasets  # noqa: F401
    import faiss  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    from matplotlib import style  # noqa: F401
    from matplotlib.figure import Figure
    from PIL import Image
    from transformers import HfArgumentParser, Trainer  # noqa: F401

    import miniclip.datasets.read
    import miniclip.index.parts
    import miniclip.index.search
    import miniclip.reports.charts
    import miniclip.towers.huggingface
    import miniclip.training.freeze
    import miniclip.training.parse
    import miniclip.training.siglip
    import miniclip.training.streaming
    import miniclip.training.trainer  # noqa: F401
    from miniclip.tokenizer import load_table

    Image.init()
    Figure(layout="constrained").savefig(io.BytesIO())
    load_table()
    torch.set_num_threads(1)  # threads would not come along when this process is forked
    os.chdir(ROOT)
    gc.freeze()  # what is here needs no look in the processes forked, whose pages a collection would copy


def fork(argv: list[str], out: int, err: int, env: dict | None = None) -> int:
    """Starts a script with its output going to two open files; gives the process's id. It leads a group of its own, to
    which its data workers belong."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ |= env or {}
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def launch(argv: list[str], processes: int, out: int, err: int, env: dict | None = None) -> list[int]:
    """Starts a run of so many processes, as torchrun would; gives their ids."""
    if processes == 1:
        return [fork(argv, out, err, env)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = (env or {}) | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        fork(argv, out, err, several | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)
    ]  # fmt: skip


class KilledAt:
    """Ends this process by SIGKILL at the `fatal`-th thing that it does with files below a folder; counts them."""

    EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}

    def __init__(self, fatal: int, inside: str | Path):
        self.fatal, self.count, self.inside = fatal, 0, str(inside)
        sys.addaudithook(self.heard)

    def heard(self, name: str, args: tuple):
        if name in self.EVENTS and self.inside in str(args[0]):
            self.event()

    def event(self):
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function):
        """A writer that is no Python, and causes no such event: so there is one before it, and one after."""

        def wrapped(*args, **kwargs):
            self.event()
            result = function(*args, **kwargs)
            self.event()
            return result

        return wrapped


def status(pids: list[int], timeout: float) -> int:
    """Waits for all processes of a run and gives the first exit status that is not 0. Where one failed the others get
    SIGTERM, as from torchrun. Those that take too long are killed with their groups."""
    end, left, codes = time.monotonic() + timeout, set(pids), []
    while left and time.monotonic() < end:
        for pid in [pid for pid in pids if pid in left]:
            found, code = os.waitpid(pid, os.WNOHANG)
            if found:
                left.remove(pid)
                codes.append(os.waitstatus_to_exitcode(code))
                for other in left if codes[-1] else ():
                    os.kill(other, signal.SIGTERM)
        time.sleep(0.01)
    for pid in left:
        os.killpg(pid, 9)
        os.waitpid(pid, 0)
    if left:
        raise TimeoutError
    return next(filter(None, codes), 0)


def main():
    prepare()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        argv, timeout, processes, env = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                code = status(launch(argv, processes, out.fileno(), err.fileno(), env), timeout)
            except TimeoutError:
                code = None
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode("utf-8", "replace"))
        answers.write(json.dumps([code, *texts]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
