"""How much memory do evaluation and training take, and does it stay so?

    python benchmarks/memory.py ranking               # 100,000 images x 500,000 captions, 512 wide
    python benchmarks/memory.py soak --steps 2000     # memory and open files of a training with workers, over its steps
    python benchmarks/memory.py training              # a batch of 1,024 in chunks of 8, by how AdamW keeps its averages
    python benchmarks/memory.py recall                # the demo's model by each kind of averages, over three seeds

Each prints one line of JSON, and with --write puts its figures into RESULTS.md. A matrix of all scores would be 200 GB;
what is measured is the most that the process had.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands, before NumPy and faiss
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


def ranking(images: int, captions: int, width: int) -> dict:
    """Ranks made-up embeddings: a caption is its image's vector and noise, so that nearly all are found early, as with
    a good model, and some far down."""
    import numpy as np

    from miniclip.retrieval import retrieval_metrics

    draw = np.random.default_rng(0)

    def unit(x):
        return np.divide(x, np.sqrt(np.einsum("nd,nd->n", x, x))[:, None], out=x)

    image_embeds = unit(draw.standard_normal((images, width), dtype=np.float32))
    image_of_text = np.arange(captions) % images
    text_embeds = np.empty((captions, width), np.float32)
    for start in range(0, captions, 10_000):
        rows = slice(start, start + 10_000)
        noise = unit(draw.standard_normal((len(text_embeds[rows]), width), dtype=np.float32))
        text_embeds[rows] = unit(image_embeds[image_of_text[rows]] + 1.5 * noise)
    before, start = peak(), time.perf_counter()
    metrics = retrieval_metrics(image_embeds, text_embeds, image_of_text)
    return {
        "images": images, "captions": captions, "width": width, "embeddings_GB": (images + captions) * width * 4e-9,
        "peak_GB": peak(), "peak_before_GB": before, "seconds": time.perf_counter() - start,
        "text_to_image_R@1": metrics["text_to_image_R@1"],
    }  # fmt: skip


def peak() -> float:
    """The most memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def soak(steps: int, every: int) -> dict:
    """A training with two workers that start anew every epoch: what it holds after so many steps."""
    import torch
    from transformers import TrainerCallback

    from tests.survival_trainer import make_trainer

    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % every == 0:
                memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
                files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
                seen.append({"step": state.global_step, "MB": round(memory, 1), "files": files, "threads": threads})

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        more = {"dataloader_num_workers": 2, "save_steps": steps // 10, "save_total_limit": 1, "logging_steps": 100}
        trainer = make_trainer(Path(folder), steps, n=260, **more)  # 65 steps an epoch: none ends where we look
        trainer.add_callback(Look())
        trainer.train()
    return {"steps": steps, "seen": seen}


STATES = {"fp32": {}, "bf16": {"optim_args": "states=bf16"}, "adafactor": {"optim": "adafactor"}}


def training(batch: int, chunk: int, computed: int) -> dict:
    """Two steps of TinyCLIP-40M with each kind of optimizer states, in a process of its own each."""
    rows = {}
    for name in STATES:
        command = [sys.executable, __file__, "training", "--states", name, "--batch", str(batch), "--chunk", str(chunk),
                   "--computed", str(computed)]  # fmt: skip
        rows[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    return {"batch": batch, "chunk": chunk, "computed": computed, "states": rows}


def two_steps(batch: int, chunk: int, states: str, computed: int) -> dict:
    """The peak of two steps. `MadePairs` takes no memory but the batch's. With `computed` that many chunks of each
    tower are, and their features stand for the others': what is in memory at once is the same."""
    import torch
    from contestants import MadePairs, peak_gb
    from inputs import make_captions
    from torch.utils.checkpoint import checkpoint

    import miniclip
    from miniclip.training import grad_cache
    from miniclip.training.arguments import RunArguments
    from miniclip.training.dataset import RunDataset
    from miniclip.training.trainer import RunTrainer

    def some_chunks(size: int, tower, features, inputs):
        parts = [checkpoint(features, part, use_reentrant=False) for part in inputs.split(size)[:computed]]
        return torch.cat(parts).repeat(-(-len(inputs) // (size * len(parts))), 1)[: len(inputs)]

    if computed:
        grad_cache.in_chunks = some_chunks

    class Made(RunDataset):
        def __len__(self) -> int:
            return 10 * batch

        def __getitem__(self, index: int) -> dict:
            return pairs[index]

    pairs = MadePairs(make_captions(batch), 224, batch, as_levels=True)
    model, preprocess, tokenizer = miniclip.load("TinyCLIP-ViT-40M-32-Text-19M")
    with tempfile.TemporaryDirectory() as folder:
        args = RunArguments(
            folder, per_device_train_batch_size=batch, max_steps=2, use_cpu=True, save_strategy="no",
            report_to="none", disable_tqdm=True, grad_cache_chunk_size=chunk, **STATES[states],
        )  # fmt: skip
        trainer = RunTrainer(model, args, Made((), None), preprocess=preprocess, tokenizer=tokenizer)
        trainer.train()
    parts = [part.numel() * part.element_size() for state in trainer.optimizer.state.values()
             for part in state.values() if hasattr(part, "numel")]  # fmt: skip
    return {"peak_GB": peak_gb(), "states_GB": sum(parts) / 1e9}


def recall(seeds: int, epochs: int) -> dict:
    """Mean recall of the demo's model (`make demo`, shorter) for each kind of averages and each seed."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        run = partial(subprocess.run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        run([sys.executable, "-m", "miniclip", "shapes", f"{place}/shapes"])
        for seed, name in itertools.product(range(seeds), STATES):
            options = {**STATES[name], "seed": seed, "num_train_epochs": epochs, "output_dir": f"{place}/run",
                       "train_file": f"{place}/shapes/train.json", "eval_file": f"{place}/shapes/eval.json",
                       "eval_strategy": "no", "eval_on_start": "false"}  # fmt: skip
            words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
            run([sys.executable, "train.py", "recipes/demo.json", *words, "--overwrite_output_dir"])
            lines = map(json.loads, Path(place, "run", "log.jsonl").read_text().splitlines())
            measured = [line["eval_mean_recall"] for line in lines if "eval_mean_recall" in line]
            found.setdefault(name, []).append(measured[-1])
    return {"epochs": epochs, "recall": found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ranking", "soak", "training", "recall"])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--captions", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--computed", type=int, default=0, help="of the chunks, so many in each tower; 0: all")
    parser.add_argument("--states", choices=STATES, help=argparse.SUPPRESS)  # of the process that trains
    parser.add_argument("--write", action="store_true")
    o = parser.parse_args()
    if o.states:
        print(json.dumps(two_steps(o.batch, o.chunk, o.states, o.computed)))
        return
    what = {"ranking": lambda: ranking(o.images, o.captions, o.width), "soak": lambda: soak(o.steps, o.every),
            "training": lambda: training(o.batch, o.chunk, o.computed),
            "recall": lambda: recall(o.seeds, o.epochs)}  # fmt: skip
    result = what[o.what]()
    print(json.dumps(result))
    if o.write:
        from results import machine, write_section

        words = " ".join(word for word in sys.argv[1:] if word != "--write")
        write_section(f"memory-{o.what}", f"{describe(result)}\n\n{machine()}. `python benchmarks/memory.py {words}`.")


def describe(found: dict) -> str:
    """The figures in words."""
    if "recall" in found:
        rows = "\n".join(f"| {name} | {sum(each) / len(each):.2%} | {', '.join(f'{one:.2%}' for one in each)} |"
                         for name, each in found["recall"].items())  # fmt: skip
        return (
            f"## Recall, by optimizer\n\nThe demo's model after {found['epochs']} epochs, mean recall on its 600 scenes"
            f" over the seeds.\n\n| averages | mean | each seed |\n|---|---|---|\n{rows}"
        )
    if "states" in found:
        rows = "\n".join(f"| {name} | {row['states_GB']:.2f} | **{row['peak_GB']:.2f}** |"
                         for name, row in found["states"].items())  # fmt: skip
        few = f" in which {found['computed']} of the chunks of each tower are computed" if found["computed"] else ""
        return (
            f"## Memory of a large batch, by optimizer\n\nTinyCLIP-ViT-40M-32-Text-19M, a batch of {found['batch']:,}"
            f" in chunks of {found['chunk']}, two steps{few}.\n\n"
            f"| averages | GB of them | peak, GB |\n|---|---|---|\n{rows}"
        )
    if "seen" not in found:
        return (
            f"## Memory of ranking\n\n{found['images']:,} images against {found['captions']:,} captions, both ways,"
            f" {found['width']} dimensions: {found['embeddings_GB']:.2f} GB of embeddings, at most"
            f" **{found['peak_GB']:.2f} GB** for the process ({found['peak_before_GB']:.2f} before it ranked), in"
            f" {found['seconds']:,.0f} s. Text to image R@1 of these made-up vectors: {found['text_to_image_R@1']:.1%}."
        )
    rows = "\n".join(f"| {row['step']:,} | {row['MB']} | {row['files']} | {row['threads']} |" for row in found["seen"])
    return (
        f"## A long training\n\n{found['steps']:,} steps with two workers that start anew every epoch, and ten"
        f" checkpoints.\n\n| step | MB | open files | threads |\n|---|---|---|---|\n{rows}"
    )


if __name__ == "__main__":
    main()
