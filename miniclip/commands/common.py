"""Flags and steps that several commands share."""

from pathlib import Path

from miniclip.utils.command_line import AUTO, FLAGS, Parser, find_device, print_json, starting
from miniclip.utils.errors import InputError


def share_image_flags(parser: Parser, output_dir: str, precision: str = "fp32"):
    """Adds the flags of commands that encode images. `precision`: the default."""
    parser.share("model", required=True)
    parser.share("pretrained")
    parser.add_argument("--images", required=True, nargs="+", help="images, folders, or a folder of class folders")
    parser.share("on_bad_sample")
    parser.share("output_dir", default=output_dir)
    parser.share("batch_size", default=32, help="images encoded at once")
    parser.share("num_workers", "device", "json")
    parser.share("precision", choices=["auto", *FLAGS["precision"]["choices"]], default=precision, help=AUTO)


def share_class_flags(parser: Parser):
    """Adds the flags that name classes; `read_class_flags` reads them."""
    classes = "a,b,c; name=words,...; a .txt or .json file; or imagenet (docs/classify.md; default: the folder names)"
    parser.add_argument("--classes", help=classes)
    templates = "file of sentences, {} for the class name; or imagenet (default: the language's own)"
    parser.add_argument("--templates", help=templates)
    parser.add_argument("--language", default="en", help="of classes and templates: en, zh, fr, es")


def read_class_flags(options) -> tuple[dict[str, str] | None, list[str]]:
    """Returns the classes, None if they are not given, and the templates."""
    from miniclip.classify.prompts import TEMPLATES, read_classes, read_templates

    language, known = options.language, ", ".join(TEMPLATES)
    if language not in TEMPLATES and not (options.templates and options.classes):
        raise InputError(f"--language {language} is not one of {known}: add --templates and --classes")
    templates = read_templates(options.templates) if options.templates else TEMPLATES[language]
    return None if options.classes is None else read_classes(options.classes, language), templates


def open_model(options):
    """Returns `(model, preprocess, tokenizer)` with an inference copy of the model."""
    from miniclip.inference.load import load
    from miniclip.inference.precision import suggest_bf16
    from miniclip.utils.files import make_folder

    make_folder(options.output_dir)
    with starting():
        loaded = load(options.model, options.pretrained, find_device(options.device), options.precision)
    suggest_bf16(loaded[0], options.precision)
    return loaded


def find_usable(options, images: list[tuple], bad_samples) -> list[tuple]:
    """Returns the `usable` images. They are decoded first only to skip bad ones: the encoding finds all of them."""
    from miniclip.classify.images import usable

    how = options.on_bad_sample, bad_samples, options.num_workers, options.on_bad_sample == "skip"
    return usable(images, ", ".join(options.images), *how)


def embed_usable(options, model, preprocess, images: list[tuple], bad_samples):
    """Returns what `find_usable` does, and the embeddings (n, E) of these images."""
    from miniclip.inference.embed import embed_images

    images = find_usable(options, images, bad_samples)
    paths = [image[0] for image in images]
    return images, embed_images(model, preprocess, paths, options.batch_size, options.num_workers, progress=True)


def first_rows(lines: list[str]) -> str:
    """Returns the head and the first 20 rows of a Markdown table, and how many more there are."""
    more = len(lines) - 22
    return "\n".join(lines[:22] + [f"| and {more} more |" + " |" * (lines[1].count("|") - 2)] * (more > 0))


def finish(options, name: str, results: dict, table: str, bad_samples, summary: str, *more_files: str):
    """Writes `<name>.json`, the table as `<name>.md` and the bad samples to the output folder, and prints a summary."""
    from miniclip.utils.bad_samples import NAME
    from miniclip.utils.files import write_json, write_text

    folder = Path(options.output_dir)
    write_json(folder / f"{name}.json", results)
    write_text(folder / f"{name}.md", table + "\n")
    print(f"{summary}. Written: {', '.join([f'{name}.json', f'{name}.md', *more_files])} in {folder}")
    bad_samples.report(folder / NAME)
    print_json(options, results)


def check_folder_or_weights(flag: str, model: str, pretrained: str | None):
    """Raises InputError for a model that is a config without weights."""
    with starting():
        from miniclip.weights.pretrained import is_folder

    if not is_folder(model) and pretrained is None:
        raise InputError(f"{flag} {model} is not a folder. If it is the name of a config, add --pretrained")
