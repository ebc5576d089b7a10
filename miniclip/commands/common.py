"""What the commands that classify images share: options, the model, embeddings, and the files they write."""

import argparse
from pathlib import Path

from miniclip.utils.command_line import at_least, find_device, printable


def common_options(parser: argparse.ArgumentParser, output_dir: str):
    """Adds the options that all of these commands have."""
    parser.add_argument("--model", required=True, help="a folder saved by MiniCLIP, or a config with --pretrained")
    parser.add_argument("--pretrained", help="weights for the named config")
    parser.add_argument("--images", required=True, nargs="+", help="images, folders, or a folder of class folders")
    parser.add_argument("--on_bad_sample", choices=["stop", "skip"], default="stop", help="stop, or skip bad samples")
    parser.add_argument("--output_dir", default=output_dir, help=f"output folder (default: {output_dir})")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="images encoded at once (default: 32)")
    parser.add_argument("--num_workers", type=at_least(0), help="threads that read images (default: one per core)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "int8"], help="of matrix products")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")


def open_model(options):
    """Returns `(model, preprocess, tokenizer)` with an inference copy of the model."""
    from miniclip.inference.fast import inference_copy
    from miniclip.inference.load import load

    Path(options.output_dir).mkdir(parents=True, exist_ok=True)  # fails now rather than after the work
    model, preprocess, tokenizer = load(options.model, options.pretrained, find_device(options.device))
    return inference_copy(model, options.precision), preprocess, tokenizer


def embed_usable(options, model, preprocess, images: list[tuple], bad_samples):
    """Returns those of `images`, tuples that begin with a path, that can be read, and their embeddings (n, E). Raises
    InputError for the others, or with `--on_bad_sample skip` lists them in `bad_samples`."""
    from miniclip.datasets.records import image_fault
    from miniclip.inference.embed import embed_images
    from miniclip.utils.bad_samples import raise_or_skip
    from miniclip.utils.parallel import read_ahead

    paths = [image[0] for image in images]
    faults = [name_fault(path) for path in paths]
    if options.on_bad_sample == "skip":
        faults = list(read_ahead(lambda path: name_fault(path) or image_fault(path), paths, options.num_workers, 1000))
    if any(faults):
        bad = [(path, fault) for path, fault in zip(paths, faults) if fault]
        images = [image for image, fault in zip(images, faults) if not fault]
        what, where = f"{len(bad)} of {len(paths)} images cannot be used", ", ".join(options.images)
        raise_or_skip(where, what, bad, len(images), "", options.on_bad_sample, bad_samples, "no images")
    paths = [image[0] for image in images]
    return images, embed_images(model, preprocess, paths, options.batch_size, options.num_workers, progress=True)


def name_fault(path: str) -> str | None:
    """Returns what is wrong with the name of a file, if anything: the output could not contain it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "the name is no valid Unicode: rename the file"


def finish(options, name: str, results: dict, table: str, bad_samples, summary: str, *more_files: str):
    """Writes results as `<name>.json`, their table as `<name>.md` and the list of bad samples into the output folder,
    and prints a summary and the names of these files."""
    from miniclip.utils.bad_samples import NAME
    from miniclip.utils.files import write_json, write_text

    folder = Path(options.output_dir)
    write_json(folder / f"{name}.json", results)
    write_text(folder / f"{name}.md", table + "\n")
    print(f"{summary}. Written: {', '.join([f'{name}.json', f'{name}.md', *more_files])} in {folder}")
    bad_samples.open(folder / NAME)
    if bad_samples:
        print(f"{len(bad_samples)} bad samples were skipped: {bad_samples.path}")


def cell(text: str) -> str:
    """Returns text for a cell of a Markdown table."""
    return printable(text).replace("|", "\\|")
