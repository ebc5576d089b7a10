"""Copies the folder of a run, or any file, to another store: s3://, gs://, hf://, ...

What is there already is left as it is. A checkpoint's manifest is copied last."""

import os
import signal
import sys
import threading
from pathlib import Path

from miniclip.utils.command_line import Parser, at_least, starting
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = Parser.command("sync", __doc__, "runs/mine s3://bucket/mine")
    parser.add_argument("source", help="a folder or file")
    parser.add_argument("target", help="output: its address on a store")
    parser.add_argument("--save_total_limit", type=at_least(1), help="complete checkpoints to keep on the store")
    parser.add_argument("--follow", type=int, metavar="PID", help="go on until this process ends, or standard input")
    options = parser.parse_args(argv)
    with starting():
        from miniclip.run.sync import Copier, follow, say
        from miniclip.utils.files import lock
        from miniclip.utils.remote import is_remote, upload

    source, parent, closed = Path(options.source), options.follow, threading.Event()
    if not is_remote(options.target) or not source.exists():
        wrong = f"{source}: no such file or folder" if not source.exists() else f"{options.target} is not an address"
        raise InputError(f"{wrong}: give a folder and its address, for example runs/mine s3://bucket/mine")
    if source.is_file():
        upload(source, options.target)
        print(f"copied to {options.target}")
        return
    if parent:  # only its end ends this process, whatever signals both get
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=lambda: (sys.stdin.readline(), closed.set()), daemon=True).start()
    copier = Copier(source, options.target, options.save_total_limit, alone=parent is not None)
    with lock(source / ".sync", wait=True):  # an earlier process that copies this folder
        follow(copier, lambda: closed.is_set() or parent is None or os.getppid() != parent)
        say(f"everything is copied to {options.target}")
