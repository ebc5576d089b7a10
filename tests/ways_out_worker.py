"""Two processes of one run for each way out that is named, forked from this one, which has imported torch; they end as
any Python does. Prints their exit statuses as JSON, {way: [first, second]}.

    python tests/ways_out_worker.py end error ...
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from miniclip.utils.command_line import run  # noqa: E402
from miniclip.utils.errors import InputError  # noqa: E402

torch.set_num_threads(1)


class Mark:
    pass


def main(way: str):
    """Leaves while threads of the process group still hold tensors that Python has to release."""
    dist.init_process_group("gloo")
    tensors = [torch.ones(100_000) for _ in range(30)]
    for tensor in tensors:
        tensor.mark = Mark()
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    first = dist.get_rank() == 0
    if first and way == "error":
        raise InputError("captions.json is missing")
    if first and way == "bug":
        raise RuntimeError("unexpected")
    if first and way == "interrupt":
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
    if way == "exit":
        sys.exit(3)
    if way == "end":
        print("the last words of one process")
        return
    for work in works:
        work.wait()
    dist.barrier()  # the second process waits for the first until its connection closes


def start(way: str, rank: int, port: int):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["train.py"]
    run(lambda argv: main(way))


def fork(way: str) -> list[int]:
    """Starts both processes; gives their ids, or in one of them none, when its work is done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in (0, 1):
        if not (pid := os.fork()):
            start(way, rank, port)
            return []
        pids.append(pid)
    return pids


if __name__ == "__main__":
    found = {}
    for way in sys.argv[1:]:
        if not (pids := fork(way)):
            break
        found[way] = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    else:
        print(json.dumps(found))
