"""How fast are the other towers, beside OpenCLIP's? Prints a table.

    /path/to/peers/bin/python benchmarks/towers.py RN50 ViT-L-14-CLIPA      (names of configs, or .json files)

Both libraries compute with the same random weights in one process, in turns: images and captions embedded, and steps of
training (forward, contrastive loss, backward; AdamW costs both the same). The median of the rounds is shown, in images
or pairs a second, and how far the embeddings are apart. CoCa's steps include its decoder and the caption loss. OpenCLIP
has no blocks that differ in size (`block_heads`, of TinyCLIP auto): the other model is then MiniCLIP's own with whole
blocks and other weights. Run it on a quiet machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.limit import matrix_peak  # noqa: E402
from benchmarks.make_towers_golden import contrastive  # noqa: E402
from miniclip.checkpoint import to_miniclip  # noqa: E402
from miniclip.config import MODEL_CONFIGS, MiniClipConfig  # noqa: E402
from miniclip.inference.fast import fast_wrappers, inference_copy  # noqa: E402
from miniclip.inference.peak import model_flops  # noqa: E402
from miniclip.model import MiniClip  # noqa: E402
from miniclip.towers.hf_config import KNOWN  # noqa: E402


def pair(values: dict, device: str) -> tuple[MiniClip, torch.nn.Module]:
    """A model of ours and OpenCLIP's with the same weights, or of pruned blocks ours with whole ones."""
    kwargs = {name: value for name, value in values.items() if name not in ("custom_text", "preprocess_cfg")}
    if "block_heads" in values["vision_cfg"]:
        sections = {name: kwargs[name] for name in ("vision_cfg", "text_cfg")}
        whole = {name: {k: v for k, v in cfg.items() if not k.startswith("block_")} for name, cfg in sections.items()}
        ours, theirs = (MiniClip(MiniClipConfig.from_dict(cfg)).to(device).eval() for cfg in (kwargs, kwargs | whole))
        for tower in (theirs.visual, theirs.text):
            tower.wrappers = fast_wrappers(tower)
        return ours, theirs
    import open_clip

    encoder = KNOWN.get(values["text_cfg"].get("hf_model_name"))
    with tempfile.TemporaryDirectory() as folder:
        their_kwargs = kwargs
        if encoder:  # whose config OpenCLIP would read from the hub
            (Path(folder) / "config.json").write_text(json.dumps(encoder))
            named = {"hf_model_name": folder, "hf_model_pretrained": False}
            their_kwargs = kwargs | {"text_cfg": values["text_cfg"] | named}
        kind = open_clip.CustomTextCLIP if encoder or values.get("custom_text") else open_clip.CLIP
        theirs = (open_clip.CoCa if "multimodal_cfg" in values else kind)(**their_kwargs)
    ours = MiniClip(MiniClipConfig.from_dict(kwargs))
    weights, _ = to_miniclip(theirs.state_dict(), (ours.visual.key_rows(), ours.text.key_rows()))
    ours.load_state_dict(weights)
    return ours.to(device).eval(), theirs.to(device).eval()


def timed(functions: dict, rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each function; they take turns, and the first round does not count."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def measure(name: str, options: argparse.Namespace, peak: float) -> str:
    path = Path(name) if name.endswith(".json") else MODEL_CONFIGS / f"{name}.json"
    values, B, device = json.loads(path.read_text()), options.batch_size, options.device
    ours, theirs = pair(values, device)
    fast, text = inference_copy(ours), values["text_cfg"]
    size, room, words = ours.visual.image_size, text.get("context_length", 77), text.get("vocab_size", 49408)
    images = torch.randn(B, 3, size, size, device=device)
    input_ids = torch.randint(1, words - 1, (B, room), device=device)
    input_ids[:, -1] = words - 1

    def step(model):
        out = model(images, input_ids)
        if isinstance(out, dict):  # OpenCLIP's CoCa
            out = [out[name] for name in ("image_features", "text_features", "logit_scale", "logits")]
        image, text, scale = out[:3]
        loss = contrastive(scale * image @ text.T)
        if decoder:
            loss = loss + 2 * F.cross_entropy(out[-1].flatten(0, 1), input_ids[:, 1:].flatten())
        loss.backward()
        model.zero_grad()

    decoder, pruned = "multimodal_cfg" in values, "block_heads" in values["vision_cfg"]
    cells, apart, flops = [], 0.0, []
    with torch.inference_mode():
        for method, inputs in (("encode_image", images), ("encode_text", input_ids)):
            a, b = (getattr(model, method)(inputs, normalize=True) for model in (fast, theirs))
            apart = max(apart, (a - b).abs().max().item())
            flops.append(model_flops(getattr(ours, method), inputs))
            work = {n: partial(getattr(m, method), inputs) for n, m in (("ours", fast), ("theirs", theirs))}
            cells.append(timed(work, options.rounds, device))
    for tower in (ours.visual, ours.text):  # as train.py does
        tower.wrappers = fast_wrappers(tower)
    flops.append(3 * sum(flops))
    if decoder:
        flops[2] = 3 * model_flops(lambda pixel_values: ours.caption_logits(pixel_values, input_ids), images)
        ours.train_captions()
    training = {"ours": lambda: step(ours.train()), "theirs": lambda: step(theirs.train())}
    cells.append(timed(training, options.rounds, device))
    shown = []
    for s, work in zip(cells, flops):
        both, times = f"{B / s['ours']:.1f} / {B / s['theirs']:.1f}", s["theirs"] / s["ours"]
        shown.append(f"{both} ({times:.2f}; {work / s['ours'] / peak:.0%})")
    return f"| {name} | {' | '.join(shown)} | {'-' if pruned else f'{apart:.0e}'} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {options.batch_size}, {options.device}")
    peak = matrix_peak(options.device)["fp32"]
    print(f"large matrix products in fp32: {peak / 1e9:,.0f} GFLOP/s")
    print("MiniCLIP / OpenCLIP (times as fast; MiniCLIP's share of that), a second:\n")
    print("| model | images embedded | captions embedded | pairs trained | apart |\n|---|---|---|---|---|")
    for name in options.models:
        print(measure(name, options, peak), flush=True)


if __name__ == "__main__":
    main()
