"""How fast is each runtime that MiniCLIP exports to, beside MiniCLIP's own inference?

    pip install onnx onnxscript 'onnxruntime>=1.24' openvino
    python benchmarks/runtimes.py                            writes the part of RESULTS.md between the marks "runtimes"

All have the same random weights, the same inputs and as many threads; they take turns, in another order each round, and
the median of the rounds counts. Preparing images and captions is not included: it is the same for all.
"""

import argparse
import importlib.util
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from inputs import make_captions
from limit import matrix_peak
from results import machine, write_section

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import miniclip  # noqa: E402
from miniclip.inference.peak import model_flops  # noqa: E402
from miniclip.utils.machine import keep_freed_memory  # noqa: E402
from miniclip.weights.onnx import export, runner  # noqa: E402

KINDS, OURS = ("image", "text"), "MiniCLIP, fp32"


def contestants(config: str, folder: Path, threads: int) -> dict:
    """name -> the functions that embed a batch of images and one of token ids."""
    torch.manual_seed(0)
    model = miniclip.MiniClip(miniclip.MiniClipConfig.from_name(config)).eval()
    model.save_pretrained(folder / "model")
    for form, precision in (("torch", "fp32"), ("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8")):
        export(model, folder / f"{form}-{precision}", form, precision)

    def own(model):
        return [
            lambda x, encode=encode: encode(x, normalize=True) for encode in (model.encode_image, model.encode_text)
        ]

    found = {"the model in PyTorch, fp32": own(model)}
    for precision in ("fp32", "bf16", "int8"):
        found[f"MiniCLIP, {precision}"] = own(miniclip.load(folder / "model", precision=precision)[0])
    found["torch.export, fp32"] = graphs(folder / "torch-fp32", ".pt2")
    for precision in ("fp32", "fp16", "int8"):
        found[f"ONNX Runtime, {precision}"] = graphs(folder / f"onnx-{precision}", ".onnx")
    if importlib.util.find_spec("openvino"):
        for precision, file, computed in (("fp32", "fp32", "f32"), ("bf16", "fp32", "bf16"), ("int8", "int8", "f32")):
            hint = {"INFERENCE_PRECISION_HINT": computed, "INFERENCE_NUM_THREADS": threads}
            found[f"OpenVINO, {precision}"] = [openvino(folder / f"onnx-{file}/{kind}.onnx", hint) for kind in KINDS]
    return found


def graphs(folder: Path, suffix: str) -> list:
    runs = [runner(folder / (kind + suffix)) for kind in KINDS]
    return [lambda x, run=run: run(x)[0] for run in runs]


def openvino(file: Path, hint: dict):
    import openvino

    compiled = openvino.compile_model(file, "CPU", hint)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="TinyCLIP-ViT-40M-32-Text-19M")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--results", type=Path, help="file to write to (default: RESULTS.md)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as embed_images and embed_texts do
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runs = contestants(options.config, Path(folder), options.threads)
        config = miniclip.MiniClipConfig.from_name(options.config)
        size, most = config.vision_cfg.image_size, max(options.batches)
        tokenizer = miniclip.Tokenizer(config.text_cfg.context_length)
        images, captions = torch.randn(most, 3, size, size), make_captions(most)
        inputs = {(kind, n): images[:n] if kind == "image" else tokenizer(captions[:n], trim=True)
                  for kind in KINDS for n in options.batches}  # fmt: skip
        exact = {kind: run(inputs[kind, most]) for kind, run in zip(KINDS, next(iter(runs.values())))}
        cosines = {name: [(run(inputs[kind, most]) * exact[kind]).sum(1).min().item() for kind, run in zip(KINDS, both)]
                   for name, both in runs.items()}  # fmt: skip
        peak = matrix_peak()
        seconds = measure(runs, inputs, options.rounds)
        plain = miniclip.MiniClip(config).eval()
        flops = {(kind, n): model_flops(plain.encode_image if kind == "image" else plain.encode_text, x)
                 for (kind, n), x in inputs.items()}  # fmt: skip
    packages = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]
    tokens = " and ".join(str(inputs["text", n].shape[1]) for n in options.batches)
    head = [f"{kind}s, {n} at once" for kind, n in inputs]
    lines = [
        f"## Runtimes\n\n{machine()}; {'; '.join(f'{name} {version(name)}' for name in packages)}; threads:"
        f" {options.threads}. `python benchmarks/runtimes.py --rounds {options.rounds}`.\n",
        f"{options.config} with random weights, from pixel values and token ids to embeddings of unit length; captions"
        f" as long as the longest of their batch, {tokens} tokens. Milliseconds for a batch: the median of"
        f" {options.rounds} rounds in which all take turns (smallest to largest). In bold: times as fast as MiniCLIP in"
        " fp32. After it, the share of this machine's speed in large matrix products of the same precision"
        f" ({', '.join(f'{name} {speed / 1e9:,.0f}' for name, speed in peak.items())} GFLOP/s; operations are those of"
        " the plain model, with padding, which MiniCLIP leaves out). In brackets after the name: the lowest cosine to"
        " the model in PyTorch, of images and captions.\n",
        f"| runtime, precision (cosines) | {' | '.join(head)} |\n|---|{'---|' * len(head)}",
    ]
    for name, both in cosines.items():
        cells = [
            f"{1e3 * statistics.median(s):.1f} ({1e3 * min(s):.1f} to {1e3 * max(s):.1f})"
            f" **{statistics.median(seconds[OURS][case]) / statistics.median(s):.2f}**"
            + share(flops[case] / statistics.median(s), peak.get(name.rpartition(" ")[2]))
            for case, s in seconds[name].items()
        ]
        lines.append(f"| {name} ({both[0]:.5f}, {both[1]:.5f}) | {' | '.join(cells)} |")
    write_section("runtimes", "\n".join(lines), options.results)
    print("\n".join(lines))


def share(speed: float, peak: float | None) -> str:
    return f" {100 * speed / peak:.0f}%" if peak else ""


def measure(runs: dict, inputs: dict, rounds: int) -> dict:
    """name -> case -> the seconds of each round."""
    seconds = {name: {case: [] for case in inputs} for name in runs}
    for number in range(rounds + 1):  # the first does not count
        for case, x in inputs.items():
            for name in random.Random(number).sample(list(runs), len(runs)):
                run = runs[name][KINDS.index(case[0])]
                time.sleep(0.02)  # until the threads of whoever worked before have stopped looking out for more
                run(x)
                start = time.perf_counter()
                run(x)
                if number:
                    seconds[name][case].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main(sys.argv[1:])
