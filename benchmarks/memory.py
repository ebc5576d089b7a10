"""How much memory do evaluation and training take, and does it stay so?

    python benchmarks/memory.py ranking               # 100,000 images x 500,000 captions, 512 wide
    python benchmarks/memory.py soak --steps 2000     # memory and open files of a training with workers, over its steps

Each prints one line of JSON, and with --write puts its figures into RESULTS.md. A matrix of all scores would be 200 GB;
what is measured is the most that the process had.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as evaluate.py: before NumPy and faiss are imported
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ranking", "soak"])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--captions", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    o = parser.parse_args()
    result = ranking(o.images, o.captions, o.width) if o.what == "ranking" else soak(o.steps, o.every)
    print(json.dumps(result))
    if o.write:
        from results import machine, write_section

        write_section(f"memory-{o.what}", f"{describe(result)}\n\n{machine()}. `python benchmarks/memory.py {o.what}`.")


def describe(found: dict) -> str:
    """The figures in words."""
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
