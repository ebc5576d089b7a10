"""WiSE-FT: mixtures of the weights before and after fine-tuning, measured on the old and the new task.

Reads two models and two caption files, and writes wise_ft.json, wise_ft.md and wise_ft.png to --output_dir."""

from pathlib import Path

from miniclip.commands.common import check_folder_or_weights, finish
from miniclip.utils.command_line import Parser, find_device, starting
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    example = "--before runs/base --after runs/tuned --old_file old.json --new_file new.json --output_dir runs/wise_ft"
    parser = Parser.command("wise_ft", __doc__, example)
    parser.add_argument("--before", required=True, help="the model before fine-tuning: a folder, or a config name")
    parser.share("pretrained")
    parser.add_argument("--after", required=True, help="folder of the model after fine-tuning")
    parser.add_argument("--new_file", required=True, help="captions of the new task")
    parser.add_argument("--old_file", required=True, help="captions of the old task")
    parser.share("image_root", "on_bad_sample", "allow_outside_image_root")
    parser.share("output_dir", required=True)
    parser.add_argument("--alphas", type=float, nargs="+", help="weights of the model after (default: 0 0.1 ... 1)")
    parser.add_argument("--save_alpha", help="save the model of this alpha, or of the best one, in output_dir/model")
    parser.share("precision", choices=["fp32", "bf16"])
    parser.share("batch_size", default=64)
    parser.share("num_workers", "device", "json")
    options = parser.parse_args(argv)
    save = options.save_alpha
    try:
        save = save if save in (None, "best") else float(save)
    except ValueError:
        raise InputError(f"--save_alpha {save!r} is neither a number nor best") from None
    with starting():
        from miniclip.datasets.read import read_source
        from miniclip.datasets.records import ReadOptions, one_per_image
        from miniclip.inference.load import load
        from miniclip.reports.charts import draw_sweep
        from miniclip.training.wise_ft import ALPHAS, best, format_sweep, sweep
        from miniclip.utils.bad_samples import BadSamples
        from miniclip.weights.interpolate import interpolate
        from miniclip.weights.pretrained import is_folder

    check_folder_or_weights("--before", options.before, options.pretrained)
    if not is_folder(options.after):
        raise InputError(f"--after {options.after} is not a folder")
    alphas = {*(options.alphas or ALPHAS), *({save} - {None, "best"})}
    if outside := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
        raise InputError(f"alpha {outside[0]} lies outside of 0 (the model before) to 1 (the model after)")
    device = find_device(options.device)
    before, *_ = load(options.before, options.pretrained, device)
    after, preprocess, tokenizer = load(options.after, None, device)
    files, bad_samples = {"new": options.new_file, "old": options.old_file}, BadSamples()
    check = {"check_images": options.on_bad_sample == "skip", "check_handles": True}
    reading = ReadOptions.from_args(options, bad_samples=bad_samples, **check)
    records = {name: one_per_image(read_source(path, reading), path) for name, path in files.items()}
    how = {"precision": options.precision, "batch_size": options.batch_size, "num_workers": options.num_workers}
    found = sweep(before, after, preprocess, tokenizer, records, sorted(alphas), progress=True, **how)

    folder = Path(options.output_dir)
    table, chosen = format_sweep(found), best(found)
    about = {"before": str(options.before), "after": str(options.after), **files, "best_alpha": chosen}
    new, old = (Path(path).stem for path in files.values())
    title = f"{options.before} to {options.after}: {new} (new) and {old} (old)"
    draw_sweep(folder / "wise_ft.png", found, chosen, title)
    results, summary = {**about, "sweep": found}, f"{table}\nbest mean of both: alpha {chosen:g}"
    finish(options, "wise_ft", results, table, bad_samples, summary, "wise_ft.png")
    if save is not None:
        alpha = chosen if save == "best" else save
        after.save_pretrained(folder / "model", interpolate(before.state_dict(), after.state_dict(), alpha))
        print(f"the model of alpha {alpha:g} is in {folder / 'model'}")
