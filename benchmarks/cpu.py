"""How fast is MiniCLIP on the CPU beside OpenCLIP, transformers and a plain implementation?

    python benchmarks/cpu.py --peers peers/bin/python        (benchmarks/peers.md makes that environment)
    python benchmarks/cpu.py --peers peers/bin/python --cases texts,one_text
    python benchmarks/cpu.py --render                        writes RESULTS.md anew from what was measured last

All contestants load the same random weights, get the same inputs, work one at a time and take turns, in another order
each round; what is reported is the median of the rounds. Each is a process of its own (`contestants.py`). What is
measured goes to results/<processor>.jsonl as it comes, and from there to the part "cpu" of RESULTS.md.
"""

import argparse
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from inputs import make_inputs
from results import file_name, write_section

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "results" / f"{file_name()}.jsonl"
CONFIG = "TinyCLIP-ViT-40M-32-Text-19M"
CASES = (
    "texts", "one_text", "images", "one_image", "picture", "evaluate", "train", "train_bf16", "memory", "features",
    "growth", "precisions",
)  # fmt: skip
ALL, PAIR = ("open_clip", "transformers", "plain", "miniclip"), ("open_clip", "miniclip")
FOUR_FIT = (
    64  # the largest batch at which four contestants that train fit into 24 GB: who waits keeps most of its memory
)
# (at least, aim): OpenCLIP's time over MiniCLIP's
TARGETS = {
    "texts": (6, 9), "one_text": (4.5, 5.5), "images": (1.6, 2.0), "one_image": (2.0, 2.3), "picture": (3.8, 5),
    "evaluate": (2.5, 4), "train": (2.2, 2.6), "train_bf16": (3.1, 4),
}  # fmt: skip
# Ways of use to choose from: the fastest of them counts.
WAYS = {
    ("open_clip", "texts"): [{"batch_size": 32}, {"batch_size": 256}],
    ("open_clip", "images"): [{"batch_size": 32}, {"batch_size": 32, "num_workers": 1}],
    ("transformers", "texts"): [{"batch_size": 32}, {"batch_size": 256}],
    ("transformers", "images"): [{"batch_size": 32}],
    ("plain", "texts"): [{"batch_size": 32}, {"batch_size": 256}],
    ("plain", "images"): [{"batch_size": 32}],
    ("miniclip", "images"): [{"batch_size": 32}],
}
PEER_EVALUATE_WAYS = [["--num_workers", "0"]]  # with a worker, two cores take as long or longer: see the case images
THREAD_SETTINGS = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # nothing here sets one unasked
SIZES = {
    "config": CONFIG, "files": 128, "batches": (16, 32, 64, 128), "cached": (1024,), "chunk": 8, "vectors": 1000,
    "batches_bf16": (16, 64),
    "growth_texts": (250, 1000, 5000), "growth_images": (32, 128, 512),
    "batch_texts": (1, 4, 16, 64, 256), "batch_images": (1, 4, 16, 64), "cheap": 250,
}  # fmt: skip
QUICK = {
    "config": "shapes-demo", "files": 8, "batches": (4, 8), "batches_bf16": (4,), "cached": (64,), "chunk": 16,
    "vectors": 50,
    "growth_texts": (16, 32), "growth_images": (4, 8), "batch_texts": (1, 4), "batch_images": (1, 4), "cheap": 16,
}  # fmt: skip


class WorkerLost(Exception):
    """A contestant that did not answer."""


class Worker:
    """A process that works when it is told to, and else sleeps."""

    def __init__(self, python: str, name: str, kind: str, folder: Path, settings: dict, limit: float):
        self.log, self.limit = tempfile.TemporaryFile("w+"), limit
        self.process = subprocess.Popen(
            [python, HERE / "contestants.py", name, kind, folder, json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip
        try:
            self.answer()
        except WorkerLost:
            self.close()
            raise

    def go(self, request: dict) -> dict:
        time.sleep(0.05)  # until the threads of whoever worked before have stopped looking out for more
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise WorkerLost(self.last_words()) from None
        return self.answer()

    def answer(self) -> dict:
        if not select.select([self.process.stdout], [], [], self.limit)[0]:
            self.process.kill()
            raise WorkerLost(f"no answer in {self.limit:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise WorkerLost(self.last_words())
        return json.loads(line)

    def last_words(self) -> str:
        self.process.wait()
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return lines[-1] if lines else f"ended with {self.process.returncode}"

    def close(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


class Benchmark:
    """One run of the command: where things are, and what has been measured."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder, self.rounds = options, folder, options.rounds
        self.sizes = QUICK if options.quick else SIZES
        self.records = [] if options.quick else read_records(without=options.cases)
        self.run = {}  # how and where this run is made, for each record
        if not options.quick:
            write_records(self.records)

    def python(self, name: str) -> str:
        return self.options.peers if name == "open_clip" else sys.executable

    def record(self, case: str, contestant: str, size: str = "", **result):
        """Keeps a result, in memory and in the file, so that what was measured outlives an interruption."""
        record = {"case": case, "contestant": contestant, "size": size, **result, **self.run}
        self.records.append(record)
        if not self.options.quick:
            with open(RECORDS, "a") as file:
                file.write(json.dumps(record) + "\n")
        what = f"{statistics.median(result['seconds']):.4g} s" if result.get("seconds") else result.get("error")
        print(f"{case:11} {size:16} {contestant:17} {what}", file=sys.stderr)

    def race(self, case: str, labels: tuple, requests: list, kind="infer", rounds=None, **settings):
        """The contestants take turns at each of `requests`: (size, request, labels that sit it out). A label is a name
        and, behind a space, a precision."""
        rounds, workers = rounds or self.rounds, {}
        for label in labels:
            name, _, precision = label.partition(" ")
            given = {**settings, "precision": precision or "fp32"}
            try:
                workers[label] = Worker(self.python(name), name, kind, self.folder, given, self.options.limit)
            except WorkerLost as lost:
                self.record(case, label, error=str(lost))
        for size, request, *out in requests:
            if takes_part := {label: worker for label, worker in workers.items() if label not in out}:
                self.one_race(case, size, request, takes_part, rounds)
        for worker in workers.values():
            worker.close()

    def one_race(self, case: str, size: str, request: dict, workers: dict, rounds: int):
        requests, firsts, results = {}, {}, {}
        for label, worker in list(workers.items()):
            saved = self.folder / f"{label}.npy"
            try:
                requests[label] = self.best_way(label, worker, request)
                firsts[label] = worker.go(requests[label] | {"save": str(saved)})
                if "what" in request:
                    firsts[label]["result"] = np.load(saved)
                results[label] = []
                if "options" in requests[label] and len(WAYS.get((label, request.get("what")), ())) > 1:
                    results[label] = [firsts[label]]  # warm from choosing the way
                for _ in range(0 if "what" in request else 2):
                    worker.go(requests[label])  # until a training step's memory is there, the first ones are slow
            except WorkerLost as lost:
                workers.pop(label)
                self.record(case, label, size, error=str(lost))
        for number in range(rounds):
            order, first = list(workers), number % max(1, len(workers))
            for label in order[first:] + order[:first]:
                try:
                    results[label].append(workers[label].go(requests[label]))
                except WorkerLost as lost:
                    workers.pop(label)
                    self.record(case, label, size, error=str(lost))
        reference = next((firsts[label] for label in (*ALL, *firsts) if label in firsts), {})
        for label in workers:
            first, more = firsts[label], {"way": requests[label].get("options", {})}
            if "loss" in first:
                more["first_peak_gb"] = first["peak_gb"]
                more |= {"loss": first["loss"], "off": abs(first["loss"] - reference["loss"]) / reference["loss"]}
            elif request.get("what") == "picture":
                more["levels_off"] = levels_off(first["result"], reference["result"])
            elif "result" in first:
                more["cosine"] = float((first["result"] * reference["result"]).sum(axis=1).min())
            self.record(
                case, label, size, seconds=[r["seconds"] for r in results[label]], **more,
                cpu=[r["cpu"] for r in results[label]], peak_gb=results[label][-1]["peak_gb"],
            )  # fmt: skip

    def best_way(self, label: str, worker: Worker, request: dict) -> dict:
        """The request with the fastest of the contestant's ways to do it, tried on a part of the work."""
        ways = WAYS.get((label.partition(" ")[0], request.get("what")), [{}])
        if "options" in request or request.get("count") == 1:
            return request
        if len(ways) > 1:
            trial = request | {"count": min(512, request["count"])}
            worker.go(trial | {"options": ways[0]})
            ways = sorted(ways, key=lambda way: worker.go(trial | {"options": way})["seconds"])
        return request | {"options": ways[0]}

    def time_process(self, command: list, **more) -> dict:
        """Runs a command from start to end: seconds, those of the processors, and the peak of its largest process."""
        start = time.perf_counter()
        with open(self.folder / "process.log", "w+") as log:
            process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, cwd=HERE.parent)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            output = log.read()
        if process.returncode:
            raise WorkerLost((output.strip().splitlines() or ["no output"])[-1])
        cpu = usage.ru_utime + usage.ru_stime
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "cpu": cpu, "peak_gb": usage.ru_maxrss * 1024 / 1e9}

    # The cases

    def texts(self):
        n = self.options.captions
        some = ("open_clip", "transformers", "miniclip")  # `plain` takes as long as OpenCLIP, see one_text
        self.race("texts", some, [(f"{n} captions", {"what": "texts", "count": n, "repeat": 1})])

    def one_text(self):
        self.race("one_text", ALL, [("1 caption", {"what": "texts", "count": 1, "repeat": 20})])

    def images(self):
        n = self.sizes["files"]
        self.race("images", ALL, [(f"{n} files", {"what": "images", "count": n, "repeat": 1})])

    def one_image(self):
        self.race("one_image", ALL, [("1 file", {"what": "images", "count": 1, "repeat": 10})])

    def picture(self):
        self.race("picture", ALL, [("4000 x 3000", {"what": "picture", "count": 1, "repeat": 5})])

    def evaluate(self):
        data = ["--eval_file", self.folder / "eval.json"]
        weights = ["--pretrained", self.folder / "openclip.safetensors"]
        ours = [sys.executable, "evaluate.py", "--model", self.sizes["config"], *weights, *data, "--device", "cpu"]
        ours += ["--output_file", self.folder / "ours.json"]
        theirs = [self.options.peers, HERE / "peer_evaluate.py", "--model", self.folder / "model.json", *weights, *data]
        self.take_turns("evaluate", f"{self.options.images} images", {
            "open_clip": [theirs + way for way in PEER_EVALUATE_WAYS], "miniclip": [ours]
        })  # fmt: skip

    def features(self):
        vectors, n = self.folder / "vectors", self.sizes["vectors"]
        vectors.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for kind, rows in (("image", n), ("text", 5 * n)):
            embeds = rng.normal(size=(rows, 512)).astype(np.float32)
            np.save(vectors / f"{kind}.npy", embeds / np.linalg.norm(embeds, axis=1, keepdims=True))
        command = [sys.executable, "evaluate.py", "--features", vectors, "--output_file", self.folder / "ours.json"]
        self.take_turns("features", f"{n} x {5 * n} vectors", {"miniclip": [command]})

    def take_turns(self, case: str, size: str, contestants: dict[str, list]):
        """Processes that take turns, each first tried in all of its ways."""
        best, results = {}, {label: [] for label in contestants}
        try:
            for label, ways in contestants.items():
                tried = [self.time_process(way) for way in ways]
                fastest = min(range(len(ways)), key=lambda i: tried[i]["seconds"])
                best[label], results[label] = ways[fastest], [tried[fastest]]
            for number in range(self.rounds):
                for label in list(contestants)[:: -1 if number % 2 else 1]:
                    results[label].append(self.time_process(best[label]))
        except WorkerLost as lost:
            self.record(case, label, size, error=str(lost))
        for label, runs in results.items():
            if runs:
                found = {name: [run[name] for run in runs] for name in ("seconds", "cpu")}
                way = " ".join(best[label][-2:]) if len(contestants[label]) > 1 else {}
                peak = max(run["peak_gb"] for run in runs)
                self.record(case, label, size, **found, peak_gb=peak, way=way)

    def train(self):
        for batch in self.sizes["batches"]:
            self.race("train", ALL if batch <= FOUR_FIT else PAIR, [(f"batch {batch}", {})], "train", batch=batch)

    def train_bf16(self):
        for batch in self.sizes["batches_bf16"]:
            labels = ("open_clip", "open_clip bf16", "miniclip bf16")
            self.race("train_bf16", labels, [(f"batch {batch}", {})], "train", batch=batch)

    def memory(self):
        """Two steps each, since the optimiser's memory is there from the second one on."""
        chunk = {"chunk": self.sizes["chunk"], "made": True}
        for batch in self.sizes["cached"]:
            size = f"batch {batch} in chunks of {self.sizes['chunk']}"
            for label in ("miniclip", "loop"):
                self.race("memory", (label,), [(size, {})], "train", rounds=1, batch=batch, **chunk)

    def growth(self):
        """How the cost grows with the number of items, and with how many of them are encoded at once."""
        sizes, requests = self.sizes, []
        for what, unit in (("texts", "caption"), ("images", "file")):
            for n in sizes[f"growth_{what}"]:
                request = {"what": what, "count": n, "repeat": 1}
                requests.append((f"{n} {unit}s", request, *(["open_clip"] if n > sizes["cheap"] else [])))
            for n in sizes[f"batch_{what}"]:
                request = {"what": what, "count": n, "repeat": max(1, 32 // n), "options": {"batch_size": n}}
                requests.append((f"{n} {unit}{'s' if n > 1 else ''} at once", request))
        self.race("growth", PAIR, requests, rounds=min(3, self.rounds))

    def precisions(self):
        n, files = min(self.options.captions, 4 * self.sizes["cheap"]), self.sizes["files"]
        for size, request in (
            (f"{n} captions", {"what": "texts", "count": n, "repeat": 1}),
            ("1 caption", {"what": "texts", "count": 1, "repeat": 20}),
            (f"{files} files", {"what": "images", "count": files, "repeat": 1}),
            ("1 file", {"what": "images", "count": 1, "repeat": 10}),
        ):
            self.race("precisions", ("miniclip", "miniclip bf16", "miniclip int8"), [(size, request)])


def levels_off(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean difference of two normalised pictures in levels of 255."""
    deviation = np.float32([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return float(np.abs((ours - theirs) * deviation).mean() * 255)


def read_records(without: tuple = ()) -> list[dict]:
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return [record for record in map(json.loads, lines) if record["case"] not in without]


def write_records(records: list[dict]):
    RECORDS.write_text("".join(json.dumps(record) + "\n" for record in records))


# What is made of the records


def render(records: list[dict]) -> str:
    """The part of RESULTS.md, in Markdown."""
    done = {}  # (case, size) -> contestant -> record
    for record in sorted(records, key=lambda record: CASES.index(record["case"])):
        done.setdefault((record["case"], record["size"]), {})[record["contestant"]] = record
    runs = {record["command"]: record["run"] for record in records if "run" in record}
    parts = ["## On the CPU", INTRODUCTION, summary(done)]
    for heading, cases, table in (
        ("All contestants", ("texts", "one_text", "images", "one_image", "picture", "evaluate"), everyone),
        ("Training steps", ("train", "train_bf16"), everyone),
        ("Memory of a large batch", ("memory",), memory),
        ("Precisions of MiniCLIP", ("precisions",), precisions),
        ("Growth", ("growth",), growth),
    ):
        chosen = {key: found for key, found in done.items() if key[0] in cases}
        if chosen:
            parts += [f"### {heading}", table(chosen)]
    parts += [f"`{command}`: {run}." for command, run in runs.items()]
    return "\n\n".join(parts)


INTRODUCTION = f"""
{CONFIG} with the same random weights for all, in fp32 unless stated. Each contestant is a process of its own; they take
turns, and the median of the rounds counts (smallest to largest in brackets); peak memory is that of its largest
process. OpenCLIP is used as its README and its training script do; of two ways the faster one. `plain` is MiniCLIP's
own model, used without what makes it fast:
captions padded to 77, torch's default arithmetic, one image after the other. A training step goes from captions and
decoded images to updated weights. With batches above {FOUR_FIT} not all contestants fit into memory at once: two or
three take turns. `at least / aim`: ratios that the project had set itself.
""".strip().replace("\n", " ")


def median(record: dict | None, what: str = "seconds") -> float | None:
    return statistics.median(record[what]) if record and record.get(what) else None


def shown(seconds: list[float]) -> str:
    """The median, and the range in brackets."""
    middle = statistics.median(seconds)
    unit, factor = ("s", 1) if middle >= 1 else ("ms", 1000)
    digits = max(0, 2 - int(np.floor(np.log10(middle * factor))))
    a, b, c = (f"{factor * x:.{digits}f}" for x in (middle, min(seconds), max(seconds)))
    return f"{a} {unit} ({b} to {c})"


def times(ours: dict | None, theirs: dict | None) -> str:
    """How many times as fast."""
    a, b = median(theirs), median(ours)
    return f"{a / b:.2f}" if a and b else "-"


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


TITLES = {
    "texts": "captions to embeddings", "one_text": "one caption to its embedding", "images": "JPEGs to embeddings",
    "one_image": "one JPEG to its embedding", "picture": "12 megapixel JPEG to tensor",
    "evaluate": "evaluation, from start to table", "train": "training step", "train_bf16": "training step, bf16",
}  # fmt: skip


def summary(done: dict) -> str:
    """OpenCLIP and MiniCLIP, beside what was aimed at."""
    rows = []
    for case, target in TARGETS.items():
        for (name, size), found in done.items():
            if name != case:
                continue
            ours = found.get("miniclip bf16" if case == "train_bf16" else "miniclip")
            for rival in ("open_clip", "open_clip bf16") if case == "train_bf16" else ("open_clip",):
                theirs = found.get(rival)
                if not (median(ours) and median(theirs)):
                    continue
                title = f"{TITLES[case]}, {size}" + (", against bf16" if rival == "open_clip bf16" else "")
                aims = "-" if rival == "open_clip bf16" else f"{target[0]} / {target[1]}"
                rows.append([
                    title, shown(theirs["seconds"]), shown(ours["seconds"]), f"**{times(ours, theirs)}**", aims,
                    agreement(ours), f"{theirs['peak_gb']:.2f} / {ours['peak_gb']:.2f}",
                ])  # fmt: skip
    head = ["", "OpenCLIP", "MiniCLIP", "times as fast", "at least / aim", "agreement", "peak GB, OpenCLIP / MiniCLIP"]
    parts = [markdown(head, rows)] if rows else []
    for (case, size), found in done.items():
        ours = found.get("miniclip", {})
        if case == "features" and median(ours):
            cpu, wall = median(ours, "cpu"), median(ours)
            parts.append(f"`evaluate.py --features`, {size}: {cpu:.2f} s of CPU, {wall:.2f} s (aim: less than 1 s).")
    return "\n\n".join(parts)


def agreement(record: dict) -> str:
    """How well a result agrees with OpenCLIP's: the least cosine, or what else there is to compare."""
    if "cosine" in record:
        return f"cosine {record['cosine']:.6f}"
    if "off" in record:
        return f"loss {record['loss']:.4f}, {record['off']:.0e} off"
    return f"{record['levels_off']:.2f} of 255 levels off" if "levels_off" in record else "-"


def everyone(done: dict) -> str:
    rows = []
    for (case, size), found in done.items():
        for label, record in found.items():
            if "error" in record:
                rows.append([f"{TITLES[case]}, {size}", label, record["error"].replace("|", "/"), "", "", "", ""])
                continue
            way = (
                record["way"]
                if isinstance(record["way"], str)
                else " ".join(f"{k} {v}" for k, v in record["way"].items())
            )
            rows.append([
                f"{TITLES[case]}, {size}", label, shown(record["seconds"]), times(record, found.get("open_clip")),
                f"{median(record, 'cpu'):.3g}", share(size, label, record), agreement(record),
                f"{record['peak_gb']:.2f}", way,
            ])  # fmt: skip
    head = ["", "", "time", "times as fast as OpenCLIP", "CPU seconds", "of the machine's matrix speed"]
    head += ["agreement", "peak GB", "way"]
    return markdown(head, [row + [""] * (len(head) - len(row)) for row in rows])


def share(size: str, label: str, record: dict) -> str:
    """The share of this machine's speed in large matrix products (`limit.py`) that a result reached. Operations are
    those of the plain model on captions without padding; a training step has three times as many."""
    peak = record.get("limit", {}).get("peak", {}).get(label.partition(" ")[2] or "fp32")
    unit = re.match(r"(\d+) (caption|file)|batch (\d+)", size)
    if not peak or not unit or record["case"] == "evaluate":
        return ""
    each = {"caption": record["limit"]["caption"], "file": record["limit"]["image"]}
    work = int(unit[1]) * each[unit[2]] if unit[1] else 3 * int(unit[3]) * sum(each.values())
    return f"{100 * work / median(record) / peak:.0f}%"


def memory(done: dict) -> str:
    rows = []
    for (_, size), found in done.items():
        for label, record in found.items():
            peaks = [f"{record[peak]:.2f}" for peak in ("first_peak_gb", "peak_gb") if "seconds" in record]
            step = shown(record["seconds"]) if "seconds" in record else record["error"].replace("|", "/")
            rows.append([size, label, *(peaks or ["-", "-"]), step])
    table = markdown(["", "", "peak GB, first step", "peak GB, second step", "second step"], rows)
    return (
        f"{table}\n\nFrom the second step on AdamW's averages are there too. `miniclip` is its trainer with all it"
        " imports and the next batch, which it fetches ahead; `loop` makes the same step in a bare loop. Aim for batch"
        " 1,024: less than 2.3 GB."
    )


def precisions(done: dict) -> str:
    rows = []
    for (_, size), found in done.items():
        for label, record in found.items():
            if "seconds" in record:
                name, cosine = label.partition(" ")[2] or "fp32", f"{record['cosine']:.6f}"
                rows.append([size, name, shown(record["seconds"]), times(record, found.get("miniclip")), cosine])
    return markdown(["", "precision", "time", "times as fast as fp32", "least cosine to fp32"], rows)


def growth(done: dict) -> str:
    rows = []
    for (_, size), found in done.items():
        each = {name: median(record) / int(size.split()[0]) for name, record in found.items() if median(record)}
        cells = [f"{1000 * each[name]:.2f} ms" if name in each else "-" for name in ("open_clip", "miniclip")]
        rows.append([size, *cells, times(found.get("miniclip"), found.get("open_clip"))])
    return markdown(["", "OpenCLIP, each", "MiniCLIP, each", "times as fast"], rows)


def describe(options: argparse.Namespace) -> str:
    """The machine, the versions in both environments, and what is set for the threads."""

    def said(python: str, code: str) -> str:
        run = subprocess.run([python, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True, check=True)
        return run.stdout.strip()

    code = "import importlib.metadata as m; print(', '.join(f'{{p}} {{m.version(p)}}' for p in {}))"
    parts = [
        said(sys.executable, "from results import machine; print(machine())"),
        said(sys.executable, code.format(("transformers", "pillow", "faiss-cpu"))),
        "beside " + said(options.peers, code.format(("open_clip_torch", "torch", "pillow", "torchvision"))),
        said(sys.executable, "import torch; print(torch.get_num_threads())") + " threads",
        *(f"{name}={os.environ[name]}" for name in THREAD_SETTINGS if name in os.environ),
    ]
    return "; ".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="the Python of the environment that OpenCLIP is in")
    parser.add_argument("--cases", default=",".join(CASES), help="some of %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--captions", type=int, default=5000, help="of the case texts")
    parser.add_argument("--images", type=int, default=1000, help="of the case evaluate, with five captions each")
    parser.add_argument("--threads", type=int, help="as many as torch chooses unless given")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one turn; who takes longer is left out")
    parser.add_argument("--folder", type=Path, help="for inputs and weights, to use them again (else a temporary one)")
    parser.add_argument("--quick", action="store_true", help="try everything with tiny sizes, and write no results")
    parser.add_argument("--render", action="store_true", help="only write RESULTS.md anew")
    options = parser.parse_args()
    chosen = ("cases", "rounds", "captions", "images", "threads", "limit", "quick")
    given = [f"--{n} {getattr(options, n)}" for n in chosen if getattr(options, n) != parser.get_default(n)]
    options.command = " ".join(["python benchmarks/cpu.py --peers peers/bin/python", *given]).replace(" True", "")
    options.cases = tuple(options.cases.split(","))
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"{', '.join(unknown)}: the cases are {', '.join(CASES)}")
    if not options.render and not options.peers:
        parser.error("give --peers")
    table = RECORDS.with_suffix(".json")
    if not options.quick and not RECORDS.exists() and (options.render or set(options.cases) < set(CASES)):
        if table.exists() and "cpu" in json.loads(table.read_text()):
            parser.error(f"{RECORDS} is missing: the tables of the other cases would be lost. Run all cases")
    if options.quick:
        options.captions, options.images, options.rounds = 64, 12, min(2, options.rounds)
    if options.threads:  # the one way that reaches every library's threads, in all processes alike
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.render:
        records = read_records()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            records = measure(options, options.folder or Path(temporary))
    if options.quick:
        print(render(records))
    else:
        write_section("cpu", render(records))


def measure(options: argparse.Namespace, folder: Path) -> list[dict]:
    """Runs the cases."""
    benchmark = Benchmark(options, folder)
    sizes = benchmark.sizes
    photos = max(options.images, sizes["files"], *sizes["growth_images"], *sizes["batch_images"])
    make_inputs(folder, max(options.captions, *sizes["growth_texts"], *sizes["cached"]), photos, options.images)
    subprocess.run([sys.executable, HERE / "contestants.py", "weights", folder, sizes["config"]], check=True)
    limit = [sys.executable, HERE / "limit.py", sizes["config"], folder / "captions.json"]
    limit = json.loads(subprocess.run(limit, check=True, stdout=subprocess.PIPE, text=True).stdout)
    benchmark.run |= {"command": options.command, "run": describe(options), "limit": limit}
    for case in options.cases:
        getattr(benchmark, case)()
    return benchmark.records


if __name__ == "__main__":
    main()
