"""TODO docstring."""

import argparse
from pathlib import Path

from miniclip.datasets.read import read_source
from miniclip.datasets.records import ReadOptions, one_per_image
from miniclip.inference.fast import PRECISIONS
from miniclip.inference.load import load
from miniclip.reports.charts import draw_sweep
from miniclip.training.wise_ft import ALPHAS, best, format_sweep, sweep
from miniclip.utils.bad_samples import NAME, BadSamples
from miniclip.utils.command_line import find_device
from miniclip.utils.errors import InputError
from miniclip.utils.files import write_json, write_text
from miniclip.weights.interpolate import interpolate


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        "python -m miniclip wise_ft", description="Mixes the weights before and after fine-tuning; measures each mix."
    )
    parser.add_argument("--before", required=True, help="folder of the model before, or a config with --pretrained")
    parser.add_argument("--pretrained", help="weights of --before where that is the name of a config")
    parser.add_argument("--after", required=True, help="folder of the model after fine-tuning")
    parser.add_argument("--new_file", required=True, help="captions of the new task")
    parser.add_argument("--old_file", required=True, help="captions of the old task")
    parser.add_argument("--image_root", help="folder that image paths start from; the caption file's own unless given")
    parser.add_argument("--on_bad_sample", choices=["stop", "skip"], default="stop", help="stop, or go on without")
    parser.add_argument("--allow_outside_image_root", action="store_true", help="image paths may lead out of it")
    parser.add_argument("--output_dir", required=True, help="folder for wise_ft.json, wise_ft.md and wise_ft.png")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS, help="default: 0 0.1 ... 1")
    parser.add_argument("--save_alpha", help="write the model of this alpha, or of the best one, to output_dir/model")
    parser.add_argument("--precision", default="fp32", choices=[p for p in PRECISIONS if p != "int8"])
    parser.add_argument("--batch_size", type=int, default=64, help="images or captions encoded at once")
    parser.add_argument("--num_workers", type=int, help="threads that read images; as many as there are cores")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; a GPU if there is one unless given")
    options = parser.parse_args(argv)
    alphas, save = set(options.alphas), options.save_alpha
    if save not in (None, "best"):
        try:
            save = float(save)
        except ValueError:
            raise InputError(f"--save_alpha {save!r} is neither a number nor best") from None
        alphas.add(save)
    if outside := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
        raise InputError(f"alpha {outside[0]} lies outside of 0 (the model before) to 1 (the model after)")

    device = find_device(options.device)
    if not Path(options.before).is_dir() and options.pretrained is None:
        raise InputError(f"--before {options.before} is no folder; the name of a config needs --pretrained too")
    if not Path(options.after).is_dir():
        raise InputError(f"--after {options.after} is no folder that MiniCLIP saved")
    before, *_ = load(options.before, options.pretrained, device)
    after, preprocess, tokenizer = load(options.after, None, device)
    files = {"new": options.new_file, "old": options.old_file}
    bad_samples = BadSamples()
    check = {"check_images": options.on_bad_sample == "skip", "check_handles": True}
    reading = ReadOptions.from_args(options, bad_samples=bad_samples, **check)
    records = {name: one_per_image(read_source(path, reading), path) for name, path in files.items()}
    how = {"precision": options.precision, "batch_size": options.batch_size, "num_workers": options.num_workers}
    found = sweep(before, after, preprocess, tokenizer, records, sorted(alphas), progress=True, **how)

    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table, chosen = format_sweep(found), best(found)
    about = {"before": str(options.before), "after": str(options.after), **files, "best_alpha": chosen}
    write_json(folder / "wise_ft.json", {**about, "sweep": found})
    write_text(folder / "wise_ft.md", table + "\n")
    new, old = (Path(path).stem for path in files.values())
    title = f"{options.before} to {options.after}: {new} (new) and {old} (old)"
    draw_sweep(folder / "wise_ft.png", found, chosen, title)
    bad_samples.open(folder / NAME)
    if bad_samples:
        print(f"{len(bad_samples)} bad samples were left out: {bad_samples.path}")
    print(f"{table}\nbest mean of both: alpha {chosen:g}. Written: wise_ft.json, wise_ft.md, wise_ft.png in {folder}")
    if save is not None:
        alpha = chosen if save == "best" else save
        after.save_pretrained(folder / "model", interpolate(before.state_dict(), after.state_dict(), alpha))
        print(f"the model of alpha {alpha:g} is in {folder / 'model'}")
