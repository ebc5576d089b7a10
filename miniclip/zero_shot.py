"""What is in a picture, where the classes are words and there was no example of any?

Each class becomes a vector, the mean of a few sentences about it; a picture belongs to the class whose vector is
nearest to its own, and the model's temperature turns the cosines into probabilities (CLIP: Radford et al., arXiv
2103.00020, section 3.1):

    python -m miniclip.zero_shot --model runs/mine --images photos --classes dog,cat,horse

Of pictures in a folder for each class the truth is known: then top-1, top-5, the mean recall of the classes and a
confusion picture come with it. Probabilities are among the classes named: one of them always wins, however far it is.
For "is there any?" see moderate.py.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from miniclip.config import InputError
from miniclip.options import at_least, find_device, printable, run
from miniclip.prompts import (
    OBJECTS,
    TEMPLATES,
    describe_legibility,
    fill,
    legibility,
    read_classes,
    read_templates,
    warn_if_illegible,
)

if TYPE_CHECKING:  # all of it is imported when it is used: --help answers at once
    import numpy as np
    from torch import Tensor


def build_zero_shot_classifier(
    model,
    tokenizer,
    classnames: Sequence[str],
    templates: Sequence[str | Callable[[str], str]],
    num_classes_per_batch: int | None = 10,
    device="cpu",
    use_tqdm: bool = False,
) -> Tensor:
    """The vectors of classes, one a column: (embed_dim, num_classes) float32, of unit length, on `device`.

    A template is a string with {} for the class name, or a function of it that gives a sentence. A class is the mean of
    its sentences' unit vectors, brought to unit length again: OpenCLIP's semantics, and its results to 1e-6. So many
    classes are in memory at once; None: all. `image_embeds @ classifier` are cosines. Warns of names that the text
    tower cannot read. Raises InputError where there is no class or template, or a template makes no use of the name.
    """
    import torch
    from tqdm.auto import tqdm

    from miniclip.inference import for_inference

    classnames, templates = (x if isinstance(x, str) else list(x) for x in (classnames, templates))
    for name, values in (("classnames", classnames), ("templates", templates)):
        if isinstance(values, str) or not len(values):
            raise InputError(f"{name} is a list of at least one, not {values!r}")
    warn_if_illegible(tokenizer, classnames)
    step = max(1, num_classes_per_batch or len(classnames))
    model = for_inference(model, len(classnames) * len(templates))  # laid out once for all batches
    parts = [
        embed_classes(model, tokenizer, [[fill(t, name) for t in templates] for name in classnames[at : at + step]])
        for at in tqdm(range(0, len(classnames), step), desc="classes", disable=not use_tqdm, leave=False)
    ]
    return torch.cat(parts, dim=1).to(device)


def embed_classes(model, tokenizer, sentences: Sequence[Sequence[str]]) -> Tensor:
    """The unit vectors of n classes, (embed_dim, n), each the mean of those of its own sentences."""
    import torch
    import torch.nn.functional as F

    from miniclip.inference import embed_texts

    embeds = torch.from_numpy(embed_texts(model, tokenizer, [text for texts in sentences for text in texts]))
    means = [part.mean(dim=0) for part in embeds.split([len(texts) for texts in sentences])]
    return F.normalize(torch.stack(means), dim=1).T.contiguous()


def probabilities(model, image_embeds: np.ndarray, classifier: Tensor) -> np.ndarray:
    """Those of each class for images (N, E), of unit length: (N, C) float32, which add up to 1 for an image. Softmax of
    the cosines by the model's own temperature; SigLIP's bias, the same for all classes, makes no difference to it."""
    import torch

    cosines = torch.from_numpy(image_embeds) @ classifier.cpu()
    return (model.logit_scale.detach().cpu().exp() * cosines).softmax(dim=1).numpy()


def zero_shot_classify(model, preprocess, classifier: Tensor, images, classnames: Sequence[str]):
    """What a picture shows: `{"class_names": [...], "scores": (C,) probabilities, "top_class": name}`; of several
    pictures a list of these. `images` is a path, or a list. Raises ImageError for what cannot be read."""
    from miniclip.inference import embed_images

    one = isinstance(images, (str, Path))
    scores = probabilities(model, embed_images(model, preprocess, [images] if one else images), classifier)
    names = list(classnames)
    if len(names) != classifier.shape[1]:
        raise InputError(f"{len(names)} class names for a classifier of {classifier.shape[1]} classes")
    found = [{"class_names": names, "scores": row, "top_class": names[row.argmax()]} for row in scores]
    return found[0] if one else found


def find_pictures(paths: Sequence[str]) -> list[tuple[str, str | None]]:
    """The pictures that paths stand for, each with the folder that may be its class, in order of their names.

    A path is a picture, or a folder with some at any depth. A folder with none of its own is one of classes: what lies
    below each of its folders belongs to that. Links are followed; names that begin with a dot are passed over. Raises
    InputError for a path that is not there, has no picture or cannot be read through; warns of folders without one.
    """
    found = []
    for path in paths:
        if os.path.isdir(path):
            found += _pictures_in(path)
        elif os.path.exists(path):
            found.append((str(path), None))
        else:
            raise InputError(f"{path}: there is no such file or folder")
    return found


def _pictures_in(path: str) -> list[tuple[str, str | None]]:
    from miniclip.captions import ImageRoot
    from miniclip.transforms import endings

    def fault(name: str, reason: str):
        raise InputError(f"{os.path.join(path, name)}: {reason}")

    known, names, counts = endings(), [], {}
    for here, files in ImageRoot(path, allow_outside=True).walk(fault):
        files = [name for name in files if os.path.splitext(name)[1].lower() in known]
        names += [os.path.normpath(os.path.join(here, name)) for name in files]
        folder = here.split(os.sep)[0]
        counts[folder] = counts.get(folder, 0) + len(files)
    if not names:
        raise InputError(f"{path}: there is no picture in it ({', '.join(sorted(known))})")
    flat = counts.pop(".") > 0
    if empty := [name for name, n in counts.items() if not n and not flat]:
        warnings.warn(f"{path}: there is no picture in {', '.join(sorted(empty))}", stacklevel=3)
    return [(os.path.join(path, name), None if flat else name.split(os.sep)[0]) for name in sorted(names)]


def choose_classes(given: dict[str, str] | None, folders: list[str | None], language: str) -> tuple[dict, list | None]:
    """The classes, {name: words}, and the number of each picture's class where folders say it.

    Without any given, the folders' names are the classes ("hot_dog" is asked for as "hot dog"), or there are the ten
    OBJECTS. With some given, a folder is a class by its name or by its words. Raises InputError where only some are.
    """
    there = list(dict.fromkeys(folders))
    if given is None:
        if None in there:
            return {name: name for name in OBJECTS[language]}, None
        given = {name: name.replace("_", " ") for name in there}
    row = {key: i for keys in (given.values(), given) for i, key in enumerate(keys)}  # names go before words
    unknown = [name for name in there if name not in row]
    if unknown and len(unknown) < len(there) and None not in there:
        raise InputError(f"the folder {unknown[0]!r} is none of the classes {', '.join(given)}: add it to --classes")
    return given, None if unknown else [row[name] for name in folders]


def why_no_truth(paths: Sequence[str], pictures: list[tuple[str, str | None]]) -> str | None:
    """Why it cannot be told how many are right, where one may have thought so. `paths`: those that were named."""
    loose = [path for path, folder in pictures if folder is None]
    if len(loose) < len(pictures):
        return f"{loose[0]} lies in no folder of a class" if loose else "the folders are none of the classes"
    for top in filter(os.path.isdir, paths):
        if len({os.path.dirname(path) for path in loose if path.startswith(os.path.join(top, ""))}) > 1:
            return f"{top} has pictures beside its folders, which are then no classes"
    return None


def embed_pictures(options, model, preprocess, pictures: list, bad_samples=None) -> tuple[list, np.ndarray]:
    """The pictures that can be read, of (path, ...) each, and their embeddings. Raises InputError naming the others,
    which `--on_bad_sample skip` leaves out and lists."""
    from miniclip.captions import image_fault, leave_out
    from miniclip.inference import embed_images, read_ahead

    paths = [picture[0] for picture in pictures]
    faults = [name_fault(path) for path in paths]
    if options.on_bad_sample == "skip":
        faults = list(read_ahead(lambda path: name_fault(path) or image_fault(path), paths, options.num_workers, 1000))
    if any(faults):
        bad = [(path, fault) for path, fault in zip(paths, faults) if fault]
        pictures = [picture for picture, fault in zip(pictures, faults) if not fault]
        what, where = f"{len(bad)} of {len(paths)} pictures cannot be used", ", ".join(options.images)
        leave_out(where, what, bad, len(pictures), "", options.on_bad_sample, bad_samples, "none would be left")
    paths = [picture[0] for picture in pictures]
    embeds = embed_images(model, preprocess, paths, options.batch_size, options.num_workers, progress=True)
    return pictures, embeds


def name_fault(path: str) -> str | None:
    """What is wrong with the name of a file, if anything is: what is written could not hold it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "the name is no valid Unicode: rename the file"


def drawable(classes: dict[str, str], folders: Sequence[str]) -> list[str]:
    """Names that the picture's font has letters for: a class's name, its words or its folder."""
    rows = zip(classes, classes.values(), folders)
    return [next((text for text in row if text and text.isprintable() and max(text) < "\u0250"), "?") for row in rows]


def format_pictures(pictures: list[dict], most: int = 20) -> str:
    """The first pictures as a Markdown table: the three best classes, with their probabilities in percent."""
    rows = ["| picture | class | then |", "|---|---|---|"]
    for picture in pictures[:most]:
        first, *others = [f"{name} {100 * share:.1f}" for name, share in picture["top"][:3]]
        rows.append(f"| {cell(picture['image'])} | {first} | {', '.join(others)} |")
    return "\n".join(rows + [f"| and {len(pictures) - most} more | | |"] * (len(pictures) > most))


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return printable(text).replace("|", "\\|")


def common_options(parser: argparse.ArgumentParser, output_dir: str):
    """What each command takes that looks at pictures."""
    parser.add_argument("--model", required=True, help="a folder saved by MiniCLIP, or a config with --pretrained")
    parser.add_argument("--pretrained", help="weights for the named config")
    parser.add_argument("--images", required=True, nargs="+", help="pictures, folders, or a folder of class folders")
    parser.add_argument("--on_bad_sample", choices=["stop", "skip"], default="stop", help="stop, or go on without")
    parser.add_argument("--output_dir", default=output_dir, help=f"folder for what is written (default: {output_dir})")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="images encoded at once")
    parser.add_argument("--num_workers", type=at_least(0), help="threads that read images; as many as there are cores")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "int8"], help="of matrix products")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; a GPU if there is one unless given")


def open_model(options):
    """`(model, preprocess, tokenizer)`, the model in its form for inference."""
    from miniclip.fast import fast_model
    from miniclip.inference import load

    Path(options.output_dir).mkdir(parents=True, exist_ok=True)  # now: if it cannot be, nothing is done in vain
    model, preprocess, tokenizer = load(options.model, options.pretrained, find_device(options.device))
    return fast_model(model, options.precision), preprocess, tokenizer


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        "python -m miniclip.zero_shot", description="Tells which of some classes pictures show, from their names."
    )
    parser.add_argument("--classes", help="a,b,c; or name=words,...; or a .txt or .json of them (docs/zero_shot.md)")
    parser.add_argument("--templates", help="a file of sentences with {} for the class name; the language's own unless")
    parser.add_argument("--language", default="en", help="of classes and templates: en, zh, fr, es (default: en)")
    common_options(parser, "zero_shot")
    options = parser.parse_args(argv)
    if options.language not in TEMPLATES and not (options.templates and options.classes):
        known = ", ".join(TEMPLATES)
        raise InputError(f"--language {options.language} is none of {known}: give --templates and --classes for it")
    templates = read_templates(options.templates) if options.templates else TEMPLATES[options.language]
    pictures = find_pictures(options.images)
    given = read_classes(options.classes, options.language) if options.classes is not None else None
    classes, truth = choose_classes(given, [folder for _, folder in pictures], options.language)

    if len(classes) == 1:
        raise InputError("of one class alone every picture is: name others too, or ask by miniclip.moderate --ask")

    import numpy as np

    from miniclip.bad_samples import NAME, BadSamples
    from miniclip.confusion import classification_metrics, draw_confusion, format_classes, format_metrics
    from miniclip.files import write_json, write_text
    from miniclip.retrieval import search

    model, preprocess, tokenizer = open_model(options)
    names, bad_samples, start = list(classes), BadSamples(), time.perf_counter()
    classifier = build_zero_shot_classifier(model, tokenizer, list(classes.values()), templates)
    ready = time.perf_counter()
    rows = [(*picture, row) for picture, row in zip(pictures, truth or [None] * len(pictures))]
    rows, embeds = embed_pictures(options, model, preprocess, rows, bad_samples)
    seconds = {"classes": ready - start, "pictures": time.perf_counter() - ready}
    shares = probabilities(model, embeds, classifier)
    found = search(classifier.T.numpy(), embeds, min(5, len(names)))[1]  # of equal ones the first, as everywhere
    results = [
        {"image": path, "class": None if row is None else names[row],
         "top": [(names[c], float(share[c])) for c in best]}
        for (path, _, row), best, share in zip(rows, found, shares)
    ]  # fmt: skip
    reading = legibility(tokenizer, list(classes.values()))
    about = {"model": str(options.model), "classes": classes, "templates": templates, "language": options.language,
             "temperature": float(1 / model.logit_scale.exp()), "reading": reading, "seconds": seconds}  # fmt: skip

    folder = Path(options.output_dir)
    written = ["zero_shot.json", "zero_shot.md"] + ["confusion.png"] * bool(truth)
    if truth:
        right = np.array([row for *_, row in rows])
        about["metrics"], confusion = classification_metrics(found, right, len(names))
        about["confusion"] = confusion.tolist()
        table = format_classes(names, confusion)
        folders = {row: name for (_, name), row in zip(pictures, truth)}
        labels = drawable(classes, [folders.get(row, "") for row in range(len(names))])
        percent = format_metrics(about["metrics"], len(names))
        draw_confusion(folder / "confusion.png", confusion, labels, f"{options.model}: {percent}")
        table += f"\n\n{percent}"
    else:
        table = format_pictures(results)
        if why := why_no_truth(options.images, pictures):
            table += f"\n\nno accuracy: {printable(why)}"
        (folder / "confusion.png").unlink(missing_ok=True)  # an earlier run's
    write_json(folder / "zero_shot.json", {**about, "pictures": results})
    write_text(folder / "zero_shot.md", table + "\n")
    print(table)
    if options.language != "en":
        told = f"{describe_legibility(reading)}. Whether the tower learned the language, they do not tell: measure it"
        print(f"the class names in {options.language!r}: {told}")
    if tokenizer.truncated:
        print(f"{tokenizer.truncated} sentences were cut off at {tokenizer.context_length} tokens")
    speed = [f"{n} {kind} in {seconds[kind]:.1f} s" for kind, n in (("classes", len(names)), ("pictures", len(rows)))]
    print(f"{', '.join(speed)}. Written: {', '.join(written)} in {folder}")
    bad_samples.open(folder / NAME)
    if bad_samples:
        print(f"{len(bad_samples)} bad samples were left out: {bad_samples.path}")


if __name__ == "__main__":
    run(main)
