"""How do reading and checking grow with a data set? Time, memory, time to the first step, and indexing shards.

    python benchmarks/data.py                         1,000, 10,000 and 100,000 pictures with ten captions each
    python benchmarks/data.py --sizes 1000000 --captions 1 --unchecked     records alone, without decoding a picture
    python benchmarks/data.py --waiting               what a training step waits for pictures

Pictures are 64 made ones of 500 x 375 pixels under many names (hard links) in a temporary folder; a shard holds the
same. Each size is a process of its own. Writes its part of RESULTS.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
KINDS = 64  # different pictures: file systems limit the names of one to 32,000 or more
SHARD = 10_000  # samples


def make_set(folder: Path, pictures: int, captions: int):
    """Makes captions.json and, in folders of 10,000, its pictures."""
    from inputs import make_captions, make_inputs

    make_inputs(folder, 100, KINDS, 10)
    kinds, texts, records = sorted((folder / "photos").glob("*.jpg")), make_captions(5000), []
    for number in range(pictures):
        name = f"{number // 10_000:03}/{number:07}.jpg"
        if number % 10_000 == 0:
            (folder / name).parent.mkdir()
        os.link(kinds[number % KINDS], folder / name)
        found = [f"{texts[(7 * number + 13 * turn) % len(texts)]} {number}" for turn in range(captions)]
        records.append({"image": name, "caption": found})
    (folder / "captions.json").write_text(json.dumps(records))


def memory(kind: str = "VmRSS:") -> float:
    """What this process has, or with "VmHWM:" has had at most, in MB."""
    return int(Path("/proc/self/status").read_text().partition(kind)[2].split()[0]) * 1024 / 1e6


def measure(folder: Path, unchecked: bool) -> dict:
    """Reads a set as train.py does, phase by phase: seconds, seconds of the processor, MB that stay."""
    import datasets  # noqa: F401  (what it takes is not that of the records)
    import torch  # noqa: F401

    from miniclip.datasets.read import describe, fingerprint, read_source
    from miniclip.datasets.records import ReadOptions
    from miniclip.datasets.shards import Shards, add_sample
    from miniclip.tokenizer import Tokenizer
    from miniclip.utils.parallel import as_table

    source, found = str(folder / "captions.json"), {}

    def phase(name: str, run):
        start, cpu, before = time.perf_counter(), time.process_time(), memory()
        result = run()
        found[name] = [time.perf_counter() - start, time.process_time() - cpu, memory() - before]
        return result

    records = phase("read", lambda: read_source(source, ReadOptions(check_images=False)))
    if not unchecked:
        phase("check", lambda: read_source(source, ReadOptions()))
        phase("check again", lambda: read_source(source, ReadOptions()))
    phase("describe", lambda: (describe(records, Tokenizer()), fingerprint(source, records)))
    table = phase("table", lambda: as_table(records))
    phase("1,000 records", lambda: [table[7919 * number % len(table)] for number in range(1000)])
    found["peak"] = memory("VmHWM:")
    with tarfile.open(folder / "000.tar", "w") as tar:
        for number in range(min(SHARD, len(records))):
            add_sample(tar, f"{number:07}", bytes(20_000), "jpg", records[number]["caption"])
    phase("shard", lambda: Shards([str(folder / "000.tar")]))
    return found


def first_step(folder: Path) -> float:
    """Seconds from the command to the end of the first step, of a tiny model."""
    command = [sys.executable, ROOT / "train.py", "--model", "shapes-demo", "--train_file", folder / "captions.json",
               "--holdout", "0", "--max_steps", "1", "--per_device_train_batch_size", "64", "--eval_strategy", "no",
               "--save_strategy", "no", "--output_dir", folder / "run", "--overwrite_output_dir"]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def waiting(model: str, steps: int, bf16: bool) -> str:
    """A row: how long the steps of an epoch wait for their pictures, decoded as train.py does by default."""
    import torch
    from transformers import TrainerCallback

    from miniclip.config import MiniClipConfig
    from miniclip.datasets.read import read_captions
    from miniclip.model import MiniClip
    from miniclip.training.arguments import RunArguments
    from miniclip.training.dataset import RunDataset
    from miniclip.training.trainer import RunTrainer
    from miniclip.transforms import Preprocess

    class Waits(TrainerCallback):
        def __init__(self):
            self.waited, self.worked, self.since = [], [], time.perf_counter()

        def on_step_begin(self, *args, **kwargs):
            self.waited.append(time.perf_counter() - self.since)
            self.since = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.worked.append(time.perf_counter() - self.since)
            self.since = time.perf_counter()

    batch, waits = 64, Waits()
    with tempfile.TemporaryDirectory() as place:
        make_set(Path(place), batch * steps, 1)
        records = read_captions(Path(place) / "captions.json", check_images=False)
        torch.manual_seed(0)
        clip = MiniClip(MiniClipConfig.from_name(model))
        preprocess = Preprocess(clip.config.preprocess_cfg)
        args = RunArguments(
            str(Path(place) / "run"), per_device_train_batch_size=batch, num_train_epochs=1, save_strategy="no",
            disable_tqdm=True, logging_strategy="no", report_to="none", learning_rate=1e-5, bf16=bf16,
        )  # fmt: skip
        trainer = RunTrainer(
            clip, args, RunDataset(records, preprocess), preprocess=preprocess, tokenizer=clip.text.tokenizer,
            callbacks=[waits],
        )  # fmt: skip
        waits.since = time.perf_counter()
        trainer.train()
    first, later, worked = waits.waited[0], sum(waits.waited[1:]), sum(waits.worked)
    share = 100 * later / (later + worked)
    return f"| {model}{', bf16' * bf16} | {steps} | {first:.1f} | {later:.1f} | {worked:.1f} | {share:.0f}% |"


def table(rows: list[dict], options: argparse.Namespace) -> str:
    from results import machine

    def cell(row: dict, name: str) -> str:
        return f"{row[name][0]:.1f} ({row[name][1]:.1f})" if name in row else ""

    lines = [
        "## Data sets that grow", "",
        f"{machine()}. `python benchmarks/data.py --sizes {' '.join(map(str, options.sizes))} --captions"
        f" {options.captions}{' --unchecked' * options.unchecked}`.", "",
        f"{options.captions} captions a picture. Seconds (of the processor in brackets): to read the captions and find"
        " the files; to check the pictures by decoding all, and once more, when they are known to be sound; for the"
        " line and the record about them. MB: of the records, and of their Arrow table. A shard: pictures indexed in a"
        " second. `train.py` to the end of its first step, a tiny model's: the first time, and again.", "",
        "| pictures | read | check | check again | describe | records, MB | table, MB | peak, MB | ms a record"
        " | shard, pictures/s | first step, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        cells = [f"{row['pictures']:,}", *(cell(row, name) for name in ("read", "check", "check again", "describe"))]
        cells += [f"{row['read'][2]:.0f}", f"{row['table'][2]:.0f}", f"{row['peak']:.0f}"]
        cells += [f"{row['1,000 records'][0]:.2f}", f"{min(SHARD, row['pictures']) / row['shard'][0]:,.0f}"]
        lines.append(f"| {' | '.join([*cells, ', '.join(f'{s:.1f}' for s in row['first']) or ''])} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="pictures")
    parser.add_argument("--captions", type=int, default=10, help="of each")
    parser.add_argument("--unchecked", action="store_true", help="decode no picture, and train no step")
    parser.add_argument("--waiting", action="store_true", help="measure what training steps wait for pictures")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the process that measures
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measure(options.folder, options.unchecked)))
        return
    if options.waiting:
        from results import machine, write_section

        lines = [
            "## What a training step waits for its pictures", "",
            f"{machine()}. `python benchmarks/data.py --waiting`.", "",
            "One epoch of photos of 500 x 375, 64 a step. On fewer than five cores `train.py` decodes them in the"
            " training process, unless told otherwise, since workers would take the cores from the steps. Seconds from"
            " the start to the first batch, of waiting before the other steps together, and of the steps;"
            " the share of waiting in the last two.", "",
            "| model | steps | first batch | waiting | steps, s | share |", "|---|---|---|---|---|---|",
            waiting("shapes-demo", 60, False), waiting("TinyCLIP-ViT-40M-32-Text-19M", 20, True),
        ]  # fmt: skip
        write_section("data waiting", "\n".join(lines))
        print("\n".join(lines))
        return
    rows = []
    for pictures in options.sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
            make_set(folder, pictures, options.captions)
            time.sleep(3)  # a file that was written just now is not remembered
            command = [sys.executable, __file__, "--folder", place, *["--unchecked"] * options.unchecked]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1]) | {"pictures": pictures, "first": []}
            if not options.unchecked:
                for path in (folder / "cache").rglob("sound-*"):
                    path.unlink()
                row["first"] = [first_step(folder), first_step(folder)]
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    from results import section, write_section

    name = "data unchecked" if options.unchecked else section("data", parser, options, "sizes")
    write_section(name, table(rows, options))
    print(table(rows, options))


if __name__ == "__main__":
    main()
