"""Search for images by text or by image, in an index of a folder.

`miniclip search index` reads a folder of images and writes an index; `miniclip search query` reads the index and prints
a table, JSON or an HTML page. Again on the same folder, `index` updates. In Python: `miniclip.ImageSearch`."""

import json
import os
import re
import sys
from pathlib import Path

from miniclip.utils.command_line import AUTO, Parser, at_least, find_device, printable, starting
from miniclip.utils.errors import InputError


def make_parsers() -> tuple[Parser, dict[str, Parser]]:
    """Returns the parser and that of each subcommand."""
    parser = Parser("miniclip search", description=__doc__, example="miniclip search index photos --model runs/mine "
                    '--index photos.mc\nminiclip search query photos.mc "a dog on a beach -people"')  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, about: str, example: str) -> Parser:
        return commands.add_parser(name, help=about, description=about, example=f"miniclip search {name} {example}")

    index = add("index", "Make or update a folder's index, written to --index.", "photos --model runs/me --index x.mc")
    about = "Search an index. Prints rank, score and path of each image found; writes --html."
    query = add("query", about, 'photos.mc "red dress -stripes" --image photo.jpg -k 5 --html found.html')
    merge = add("merge", "Merge several indexes into one, written to --index.", "part1.mc part2.mc --index photos.mc")
    export = add("export", "Write vectors and paths in the format of clip-retrieval.", "photos.mc --to vectors")
    check = add("check", "Verify all files of an index against their sha256, and print what is in it.", "photos.mc")
    for sub in (query, export, check):
        sub.add_argument("index", metavar="INDEX", help="folder of the index")
    for sub in (index, query):
        sub.share("model", help="a folder saved by MiniCLIP, or a config (default: the index's model)")
        sub.share("pretrained", "device")
    methods = ["auto", "exact", "hnsw", "ivf"]
    how = "search method; auto: exact up to 100,000 images, then an approximate one"

    index.add_argument("pictures", metavar="DIR", help="folder of the images, at any depth")
    index.add_argument("--index", required=True, help="folder for the index: products.mc")
    index.add_argument("--shard", default="1/1", metavar="I/N", help="only shard I of N of the files, for merge")
    index.add_argument("--method", choices=methods, help=f"{how} (default: the index's, or auto)")
    index.add_argument("--check", action="store_true", help="read all files, not only those with another size or time")
    index.add_argument("--moved", action="store_true", help="the folder of the images has been moved to DIR")
    index.share("allow_outside_image_root", help="allow links that lead out of DIR")
    index.share("batch_size", help="images encoded at once (default: 32 on a CPU, 256 elsewhere)")
    index.share("num_workers")
    precision = f"{AUTO} (default: the index's, or auto)"
    index.share("precision", choices=["auto", "fp32", "bf16"], default=None, help=precision)

    what = 'what to look for, quoted; -word excludes: "a dog -kids"; without it, queries are read from stdin'
    query.add_argument("text", nargs="*", help=what)
    query.add_argument("-k", type=at_least(1), default=10, help="number of results")
    query.add_argument("--image", action="append", default=[], metavar="FILE", help="find similar images; repeatable")
    query.add_argument("--minus", action="append", default=[], metavar="TEXT", help="text to avoid; repeatable")
    query.add_argument("--image_weight", type=float, help="weight of the images beside a text: 0 to 1 (default: 0.5)")
    query.add_argument("--minus_weight", type=float, default=0.5, help="weight of what to avoid")
    query.add_argument("--rerank", type=at_least(0), metavar="N", help="results that late interaction puts into a new"
                       " order (default: 100, if the model has it)")  # fmt: skip
    query.share("image_root", help="folder of the indexed images, if it was moved")
    query.share("json", help="print JSON instead of a table: one object per query")
    query.add_argument("--html", metavar="FILE", help="also write the images found to a self-contained HTML file")

    merge.add_argument("parts", nargs="+", metavar="PART")
    merge.add_argument("--index", required=True, help="folder for the merged index")
    merge.add_argument("--method", choices=methods, default="auto", help=how)
    export.add_argument("--to", required=True, metavar="FOLDER", help="a new folder to write to")
    return parser, commands.choices


def main(argv: list[str]):
    parser, subs = make_parsers()
    options, rest = parser.parse_known_args(argv)
    if rest and (options.command != "query" or any(word.startswith("-") for word in rest)):
        subs[options.command].error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # a text after an option, which argparse does not expect there
        options.text += rest
    {"index": index, "query": query}.get(options.command, maintain)(options)


def index(options):
    """Makes or updates an index, and prints what changed."""
    with starting():
        from miniclip.index.build import update
        from miniclip.index.image_index import read_about
        from miniclip.index.search import model_name
        from miniclip.inference.load import load

    if not (shard := re.fullmatch(r"(\d+)/(\d+)", options.shard)) or not 1 <= int(shard[1]) <= int(shard[2]):
        raise InputError(f"--shard {options.shard}: use 1/8, 2/8, ... 8/8")
    if not os.path.isdir(options.pictures):
        raise InputError(f"{options.pictures} is not a folder")
    if options.pretrained and not options.model:
        raise InputError("--pretrained has no effect without --model: add it")
    named = model_name(options.model, options.pretrained) if options.model else read_about(Path(options.index))["model"]
    named = {name: named[name] for name in ("name", "pretrained")}
    device = find_device(options.device)
    with starting():
        model = load(named["name"], named["pretrained"], device)
    changes = update(
        options.pictures, options.index, *model, named, (int(shard[1]), int(shard[2])), options.method, options.check,
        options.allow_outside_image_root, options.moved, options.batch_size or (32 if device.type == "cpu" else 256),
        options.num_workers, progress=True, precision=options.precision,
    )  # fmt: skip
    if not changes:
        print(f"the shard {options.shard} has no images of {options.pictures}: nothing to index")
        return
    if changes["resumed"]:
        print(f"{changes['resumed']} images had been encoded by an interrupted run")
    counts = ", ".join(f"{changes[name]} {name}" for name in ("added", "changed", "removed", "unchanged"))
    print(f"{counts}; {changes['encoded']} images encoded")
    if changes["kept"]:
        print(f"{changes['kept']} cannot be opened at the moment (or their folders cannot) and were kept")
    describe(options.index)


def describe(folder: str):
    """Prints what is in an index and how it is searched."""
    from miniclip.index.image_index import read_about
    from miniclip.utils.bad_samples import NAME as BAD

    about = read_about(Path(folder))
    how = about["search"]
    inside = f", in {precision}" if (precision := about["model"]["precision"]) != "fp32" else ""
    copies = f" and {about['copies']} copies of them" if about["copies"] else ""
    print(f"{folder}: {about['pictures']} images{copies} in {about['root']}, by {about['model']['name']}{inside}")
    if about["bad"]:
        print(f"{about['bad']} could not be read: {Path(folder) / about['generation'] / BAD}")
    print(f"search: {how['method']}, {how['why']}")
    if how["method"] != "exact":
        found = ", ".join(f"{recall:.3f} for {name}" for name, recall in how["recall@10"].items())
        print(f"{how['parameters']}; recall@10 against exact search: {found}; {how['milliseconds']} ms a query")


def query(options):
    """Answers the query of the command line, or those of stdin, one per line."""
    if options.html and Path(options.html).suffix.lower() not in (".html", ".htm"):  # some other file
        raise InputError(f"--html {options.html}: give a name that ends in .html")
    with starting():
        from miniclip.index.search import ImageSearch

        device = find_device(options.device)
        search = ImageSearch(options.index, options.model, options.pretrained, device, options.image_root)
    if options.text or options.image:
        answer(search, options, " ".join(options.text))
        return
    if options.html:
        raise InputError("--html shows the results of one query: give a text or --image")
    failed = False
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    for line in map(str.strip, sys.stdin):
        if line or options.json:  # with JSON every line has an answer
            try:
                answer(search, options, line)
            except InputError as error:
                failed = True
                print(error, file=sys.stderr, flush=True)
                if options.json:
                    print(json.dumps({"query": line, "error": str(error)}), flush=True)
    if failed:
        sys.exit(1)


def answer(search, options, text: str):
    """Searches once and prints the results."""
    if text != text.encode(errors="ignore").decode():
        raise InputError(f"the query {text!a} is not UTF-8")
    weights = {"image_weight": options.image_weight, "minus_weight": options.minus_weight}
    cut = search.tokenizer.truncated
    found = search.query(text, options.k, options.image, options.minus, options.rerank, **weights)
    if search.tokenizer.truncated > cut:
        print(f"the query was cut off at {search.tokenizer.context_length} tokens", file=sys.stderr)
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


def maintain(options):
    """Merges, exports or checks indexes."""
    with starting():
        from miniclip.index import parts
        from miniclip.index.image_index import ImageIndex

    if options.command == "export":
        n = parts.export(ImageIndex(options.index, check=True), options.to)
        print(f"{options.to}: {n} vectors in img_emb, paths in metadata")
        return
    if options.command == "merge":
        parts.merge(options.parts, options.index, options.method, progress=True)
    else:
        ImageIndex(options.index, check=True)
    describe(options.index)
    if options.command == "check":
        print("all files are intact")
