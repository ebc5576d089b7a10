"""Real runs of train.py that are killed. They are forked from this process, which has imported everything, so that each
begins in a moment. Prints what came of it as JSON.

    python tests/survival_worker.py chain OUT PROCESSES KILLS SEED -- train.py's options
    python tests/survival_worker.py boundaries OUT
    python tests/survival_worker.py memory OUT BATCH
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.forge import KilledAt, launch, prepare  # noqa: E402


def start(argv: list[str], processes: int, log: Path) -> list[int]:
    """Starts a run of so many processes; gives their ids."""
    with open(log, "ab") as file:
        return launch(["train.py", *argv], processes, file.fileno(), file.fileno())


def wait(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def kill(pids: list[int], number: int = signal.SIGKILL):
    for pid in pids:
        os.kill(pid, number)


def over(pids: list[int]) -> bool:
    return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids)


def chain(out: Path, processes: int, kills: int, seed: int, argv: list[str]) -> dict:
    """One run, killed so many times at random moments, half of them while a checkpoint is written, and resumed each
    time; and the same undisturbed."""
    draw, log, inside, killed = random.Random(seed), out / "log.txt", 0, 0
    out.mkdir()
    run = [*argv, "--output_dir", str(out / "cut"), "--resume"]
    while killed < kills:
        pids = start(run, processes, log)
        before, saves = state(out / "cut"), draw.randrange(3)  # so many checkpoints are made first
        in_save = killed % 2 == 0
        while not over(pids):
            now = state(out / "cut")
            if len(now[0] - before[0]) >= saves and (now[1] or not in_save):
                time.sleep(draw.random() * (0.02 if in_save else 0.3))
                break
            time.sleep(0.0005)
        if over(pids):
            wait(pids)
            break
        kill(draw.sample(pids, len(pids)))
        wait(pids)
        killed += 1
        inside += bool(state(out / "cut")[1])
    last = wait(start(run, processes, log))
    whole = wait(start([*argv, "--output_dir", str(out / "whole")], processes, log))
    return {"killed": killed, "inside": inside, "codes": last + whole, "log": log.read_text()}


def state(folder: Path) -> tuple[set, bool]:
    """The checkpoints there are, and whether one is being written."""
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    return {name for name in names if name.startswith("checkpoint-")}, any(n.startswith(".0.") for n in names)


def boundaries(out: Path) -> dict:
    """A trainer saves its third checkpoint, which replaces the first, and is killed before and after each thing that it
    does with files, one after the other."""
    import shutil

    import safetensors.torch
    import torch

    from miniclip.run.checkpoints import check_checkpoint, last_checkpoint
    from tests.survival_trainer import make_trainer

    trainer = make_trainer(out / "run")
    trainer.train()  # leaves checkpoint-1 and -2
    shutil.copytree(out / "run", out / "start")

    def save(fatal: int) -> int:
        """Saves; kills itself at that event, or gives how many there were."""
        killed = KilledAt(fatal, out / "run")
        torch.save = killed.around(torch.save)
        for module in list(sys.modules.values()):
            if getattr(module, "save_file", None) is safetensors.torch.save_file and module is not safetensors.torch:
                module.save_file = killed.around(module.save_file)
        trainer.state.global_step = 3
        trainer._save_checkpoint(trainer.model, None)
        return killed.count

    found, fatal = [], 0
    while True:
        fatal += 1
        shutil.rmtree(out / "run")
        shutil.copytree(out / "start", out / "run")
        if not (pid := os.fork()):
            save(fatal)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        last = last_checkpoint(out / "run")
        check_checkpoint(last)
        found.append(int(last.rpartition("-")[2]))
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
    left = sorted(path.name for path in (out / "run").iterdir() if "checkpoint" in path.name)
    return {"moments": fatal - 1, "newest": found, "left": left}


def memory(out: Path, batch: int) -> str:
    """Trains with a batch in an address space too small for 2,048; gives the error, if there is one."""
    import resource

    from miniclip.utils.errors import InputError
    from tests.survival_trainer import make_trainer

    make_trainer(out, 1, 4, 256, 2048, save_strategy="no").train()  # then all that is loaded late is there
    trainer = make_trainer(out, 1, batch, 256, 2048, save_strategy="no")
    room = 4096 * int(Path("/proc/self/statm").read_text().split()[0]) + 450_000_000
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    try:
        trainer.train()
        return "trained"
    except InputError as error:
        return str(error)


def main(argv: list[str]):
    prepare()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    what, out, *rest = argv
    if what == "chain":
        number = rest.index("--")
        result = chain(Path(out), *map(int, rest[:number]), rest[number + 1 :])
    elif what == "memory":
        result = memory(Path(out), int(rest[0]))
    else:
        result = boundaries(Path(out))
    print(json.dumps(result), file=answer, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
