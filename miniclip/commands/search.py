"""How is a folder of pictures searched by words?

    python -m miniclip search index photos --model runs/mine --index photos.mc      # again: brings it up to date
    python -m miniclip search query photos.mc "red dress with floral pattern" -k 5
    python -m miniclip search query photos.mc "on a beach -people" --image photo.jpg --html found.html
    python -m miniclip search query photos.mc                                       # a query a line
    python -m miniclip search check photos.mc

In Python it is `miniclip.ImageSearch`.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from miniclip.utils.command_line import at_least, find_device, printable
from miniclip.utils.errors import InputError

# As in evaluate.py: threads of faiss and of torch that wait for one another would spin, and a query take a second.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m miniclip search", description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True)
    methods = {"choices": ["auto", "exact", "hnsw", "ivf"]}
    how = "how it is searched; auto: exact up to 100,000 pictures, then what is fast (default: auto{})"
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", help="a folder saved by MiniCLIP, or a config's name; the index's own unless given")
    model.add_argument("--pretrained", help="weights for the named config")
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps; a GPU if there is one unless given")

    index = commands.add_parser("index", parents=[model], help="make an index, or bring it up to date")
    index.add_argument("pictures", metavar="DIR", help="folder of the pictures, at any depth")
    index.add_argument("--index", required=True, help="folder for the index: products.mc")
    index.add_argument("--shard", default="1/1", metavar="I/N", help="only the I-th N-th of the files, for `merge`")
    index.add_argument("--method", **methods, help=how.format(", or what was said before"))
    index.add_argument("--check", action="store_true", help="read all files, not only those of another size or time")
    index.add_argument("--moved", action="store_true", help="the folder of the pictures has been moved to DIR")
    index.add_argument("--allow_outside_image_root", action="store_true", help="links may lead out of DIR")
    index.add_argument("--batch_size", type=at_least(1), help="pictures encoded at once (32 on a CPU, 256 elsewhere)")
    index.add_argument("--num_workers", type=at_least(0), help="threads that read pictures; as many as there are cores")

    query = commands.add_parser("query", parents=[model], help="search an index")
    query.add_argument("index", metavar="INDEX")
    what = 'what to look for, quoted; -word in it is not wanted: "a dog -kids"; none: a query a line'
    query.add_argument("text", nargs="*", help=what)
    query.add_argument("-k", type=at_least(1), default=10, help="how many (default: 10)")
    query.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture to be like; repeatable")
    query.add_argument("--minus", action="append", default=[], metavar="TEXT", help="what is not wanted; repeatable")
    query.add_argument("--image_weight", type=float, help="of the pictures, beside a text: 0 to 1 (default: 0.5)")
    query.add_argument("--minus_weight", type=float, default=0.5, help="of what is not wanted (default: 0.5)")
    query.add_argument("--pictures", metavar="DIR", help="their folder, where it is another than when it was indexed")
    query.add_argument("--json", action="store_true", help="JSON instead of a table; an object a query")
    query.add_argument("--html", metavar="FILE", help="write the pictures into an HTML file that needs no other")

    merge = commands.add_parser("merge", help="make one index of several")
    merge.add_argument("parts", nargs="+", metavar="PART")
    merge.add_argument("--index", required=True, help="folder for the index")
    merge.add_argument("--method", **methods, default="auto", help=how.format(""))

    export = commands.add_parser("export", help="write vectors and paths in clip-retrieval's form")
    export.add_argument("index", metavar="INDEX")
    export.add_argument("--to", required=True, metavar="FOLDER", help="a new folder")

    check = commands.add_parser("check", help="read all of an index, compare it with its sha256, say what is in it")
    check.add_argument("index", metavar="INDEX")
    return parser


def main(argv: list[str]):
    parser = make_parser()
    options, rest = parser.parse_known_args(argv)
    if rest and (options.command != "query" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # a text that comes after an option, which argparse does not expect there
        options.text += rest
    {"index": index, "query": query, "merge": merge, "export": export, "check": check}[options.command](options)


def index(options: argparse.Namespace):
    """Makes an index or brings it up to date, and says what was done."""
    from miniclip.index.build import update
    from miniclip.index.image_index import INDEX, read_about
    from miniclip.index.search import model_name
    from miniclip.inference.load import load

    if not (shard := re.fullmatch(r"(\d+)/(\d+)", options.shard)) or not 1 <= int(shard[1]) <= int(shard[2]):
        raise InputError(f"--shard {options.shard}: say 1/8, 2/8, ... 8/8")
    if not os.path.isdir(options.pictures):
        raise InputError(f"{options.pictures} is no folder")
    named = model_name(options.model, options.pretrained) if options.model else None
    if named is None:
        if not (Path(options.index) / INDEX).is_file():
            raise InputError(f"{options.index} is no index yet: name the model that is to make it by --model")
        named = {name: read_about(Path(options.index))["model"][name] for name in ("name", "pretrained")}
    device = find_device(options.device)
    model = load(named["name"], named["pretrained"], device)
    changes = update(
        options.pictures, options.index, *model, named, (int(shard[1]), int(shard[2])), options.method, options.check,
        options.allow_outside_image_root, options.moved, options.batch_size or (32 if device.type == "cpu" else 256),
        options.num_workers, progress=True,
    )  # fmt: skip
    if not changes:
        print(f"the shard {options.shard} has none of the pictures in {options.pictures}: there is nothing to index")
        return
    if changes["resumed"]:
        print(f"{changes['resumed']} pictures were encoded by a run that did not come to its end")
    names = ("added", "changed", "removed", "unchanged")
    print(", ".join(f"{changes[name]} {name}" for name in names) + f"; {changes['encoded']} pictures encoded")
    if changes["kept"]:
        print(f"{changes['kept']} cannot be opened now, or their folders cannot, and were kept as they were")
    describe(options.index)


def describe(folder: str):
    """Says what is in an index, and how it is searched."""
    from miniclip.index.image_index import read_about
    from miniclip.utils.bad_samples import NAME as BAD

    about = read_about(Path(folder))
    how = about["search"]
    copies = f" and {about['copies']} copies of them" if about["copies"] else ""
    print(f"{folder}: {about['pictures']} pictures{copies} in {about['root']}, by {about['model']['name']}")
    if about["bad"]:
        print(f"{about['bad']} could not be read: {Path(folder) / about['generation'] / BAD}")
    print(f"search: {how['method']}, {how['why']}")
    if how["method"] != "exact":
        found = ", ".join(f"{recall:.3f} for {name}" for name, recall in how["recall@10"].items())
        print(f"{how['parameters']}; recall@10 against exact search: {found}; {how['milliseconds']} ms a query")


def query(options: argparse.Namespace):
    """Answers the query of the command line, or those that come, one a line."""
    from miniclip.index.search import ImageSearch

    device = find_device(options.device)
    search = ImageSearch(options.index, options.model, options.pretrained, device, options.pictures)
    how = {"image": options.image, "minus": options.minus, "image_weight": options.image_weight}
    how |= {"minus_weight": options.minus_weight}
    if options.text or options.image:
        answer(search, options, " ".join(options.text), how)
        return
    if options.html:
        raise InputError("--html shows what one query found: give a text or --image")
    failed = False
    for line in map(str.strip, sys.stdin):
        if line or options.json:  # then each line has its answer
            try:
                answer(search, options, line, how)
            except InputError as error:
                failed = True
                print(error, file=sys.stderr, flush=True)
                if options.json:
                    print(json.dumps({"query": line, "error": str(error)}), flush=True)
    if failed:
        sys.exit(1)


def answer(search, options: argparse.Namespace, text: str, how: dict):
    """Searches once and shows what was found."""
    found = search.query(text, options.k, **how)
    title = " + ".join([*([text] if text else []), *options.image]) + "".join(f" - {minus}" for minus in options.minus)
    if options.html:
        search.write_sheet(options.html, title, found)
    if options.json:
        results = [{**one._asdict(), "score": round(one.score, 6)} for one in found]
        print(json.dumps({"query": title, "folder": search.root.folder, "results": results}), flush=True)
        return
    print("rank   score  path")
    for one in found:
        copies = f"  (the same: {', '.join(one.copies)})" if one.copies else ""
        print(f"{one.rank:4}  {one.score:6.4f}  {printable(one.path + copies)}", flush=True)
    if options.html:
        print(f"written to {options.html}")


def merge(options: argparse.Namespace):
    """Makes one index of several."""
    from miniclip.index import parts as index_parts

    index_parts.merge(options.parts, options.index, options.method, progress=True)
    describe(options.index)


def export(options: argparse.Namespace):
    """Writes vectors and paths for clip-retrieval, autofaiss or faiss."""
    from miniclip.index import parts as index_parts
    from miniclip.index.image_index import ImageIndex

    n = index_parts.export(ImageIndex(options.index, check=True), options.to)
    print(f"{options.to}: {n} vectors in img_emb, their paths in metadata")


def check(options: argparse.Namespace):
    """Reads all of an index."""
    from miniclip.index.image_index import ImageIndex

    ImageIndex(options.index, check=True)
    describe(options.index)
    print("all files are what was written")
