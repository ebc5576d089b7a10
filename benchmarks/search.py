"""How long does it take to index pictures, to bring an index up to date, and to search in it?

    python benchmarks/search.py --model runs/lite0 --pictures data/flickr8k/flickr8k-images
    python benchmarks/search.py --part vectors                  100k and 1M vectors, without a model; peak about 6 GB
    python benchmarks/search.py --part vectors --quick          10k, in a minute

Images: `miniclip search` as it is, on copies of the first images of a folder. Vectors: the search of an index, on the
vectors of `benchmarks/retrieval.py`, one query at a time. Each writes its part of RESULTS.md; vectors of other sizes
have a part of their own.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands have it
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import numpy as np  # noqa: E402
import results  # noqa: E402
from retrieval import make_gallery, make_queries  # noqa: E402
from tqdm import tqdm  # noqa: E402

from miniclip.index.neighbours import METHODS, Neighbours, exact  # noqa: E402


def milliseconds(run, queries) -> str:
    """Of each query alone: the median, and what 95 of 100 do not exceed."""
    run(queries[0])
    times = []
    for query in queries:
        start = time.perf_counter()
        run(query)
        times.append(1000 * (time.perf_counter() - start))
    return f"{statistics.median(times):.2f} ({np.percentile(times, 95):.2f})"


def find(search, gallery: np.ndarray, query: np.ndarray):
    return search(gallery, query[None], 10)


def vectors(sizes: list[int], asked: int) -> str:
    """The methods on vectors that are made, as a table."""
    lines = [
        "## Image search: a million vectors", "",
        f"{results.machine()}. `python benchmarks/search.py --part vectors --sizes {' '.join(map(str, sizes))}`.", "",
        f"512 dimensions, made as above; k=10, {asked} queries one at a time: members of the gallery moved to a cosine"
        " of about 0.8. HNSW names 40 candidates by 8 bits a number, IVF 80 by 2, the float32 vectors decide; their"
        " effort is the least that reaches a recall@10 of 0.98 against the exact search, by the queries and by 200 of"
        " the vectors themselves, or the greatest that is tried. ms: median (95 of 100 are not above).", "",
        "| vectors | method | build, s | index beside the vectors, MB | ms a query | recall@10: vectors, queries |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for n in sizes:
        gallery = make_gallery(n)
        queries = make_queries(gallery, asked)
        for method in METHODS:
            tqdm.write(f"{n:,} vectors, {method}", sys.stderr)
            if method == "exact":
                spent = milliseconds(partial(find, exact, gallery), queries[:50])
                lines.append(f"| {n:,} | exact | | | {spent} | 1, 1 |")
                continue
            start = time.perf_counter()
            index = Neighbours.build(gallery, method, progress=True)
            seconds = time.perf_counter() - start
            found = index.tune(gallery, None, queries)
            with tempfile.TemporaryDirectory() as folder:
                index.write(Path(folder) / "search.faiss")
                size = (Path(folder) / "search.faiss").stat().st_size / 1e6
            spent = milliseconds(partial(find, index.find, gallery), queries)
            recall = found["recall@10"]
            cells = [f"{n:,}", found["parameters"], f"{seconds:.0f}", f"{size:,.0f}", spent]
            cells.append(f"{recall['pictures']:.3f}, {recall['texts']:.3f}")
            lines.append(f"| {' | '.join(cells)} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return "\n".join([*lines, "", f"Peak {peak:.1f} GB."])


def pictures(model: Path, folder: Path, limit: int) -> str:
    """The commands on real pictures, as a table."""
    with tempfile.TemporaryDirectory() as place:
        copy, index = Path(place) / "pictures", Path(place) / "index.mc"
        copy.mkdir()
        names = sorted(path for path in folder.iterdir() if path.suffix == ".jpg")[:limit]
        for path in names[:-20]:
            shutil.copyfile(path, copy / path.name)
        rows = [("index: all are new", timed("index", copy, "--model", model, "--index", index))]
        rows.append(("index: nothing has changed", timed("index", copy, "--index", index)))
        rows.append(("index: nothing has changed, `--check`", timed("index", copy, "--index", index, "--check")))
        for path in names[-20:]:
            shutil.copyfile(path, copy / path.name)
        for path in names[:100]:
            (copy / path.name).rename(copy / f"renamed_{path.name}")
        for path in names[100:110]:
            (copy / path.name).unlink()
        rows.append(("index: 20 new, 100 renamed, 10 deleted", timed("index", copy, "--index", index)))
        rows.append(("query: start, model, text, answer", timed("query", index, "a dog runs through the snow")))
        import miniclip

        search = miniclip.ImageSearch(index)
        texts = [f"a {thing} {where}" for thing in ("dog", "man", "girl", "bicycle", "boat")
                 for where in ("in the snow", "at the beach", "in a street", "on grass", "at night")]  # fmt: skip
        asked = [sorted(copy.iterdir())[number] for number in range(0, 250, 10)]
        by_text = milliseconds(lambda text: search.query(text), texts)
        by_image = milliseconds(lambda path: search.query(image=path), asked)
    lines = [
        "## Image search: pictures", "",
        f"{results.machine()}. `python benchmarks/search.py --part pictures --limit {limit}`, {model.name}, Flickr8k's"
        f" photos of 500 x 375 pixels, {limit - 20:,} of them at first. Whole commands, start and loading of the model"
        " included.", "",
        "| | seconds | pictures encoded |", "|---|---|---|",
        *(f"| {name} | {seconds:.1f} | {encoded} |" for name, (seconds, encoded) in rows), "",
        f"In Python, the model being loaded, a text takes {by_text} ms, a picture {by_image} ms: median (95 of 100 are"
        " not above), from the words or the file to the list.",
    ]  # fmt: skip
    return "\n".join(lines)


def timed(*words) -> tuple[float, str]:
    """Seconds that a command takes, and how many pictures it says it has encoded."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "miniclip", "search", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    encoded = [line.split("; ")[1].split()[0] for line in done.stdout.splitlines() if line.endswith("encoded")]
    return time.perf_counter() - start, encoded[0] if encoded else ""


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--part", choices=["pictures", "vectors"], nargs="+", default=["pictures", "vectors"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000], help="vectors to search in")
    parser.add_argument("--quick", action="store_true", help="10,000 vectors and 200 pictures only")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--model", type=Path, default=Path("runs/lite0"), help="a folder saved by MiniCLIP")
    parser.add_argument("--pictures", type=Path, default=Path("data/flickr8k/flickr8k-images"))
    parser.add_argument("--limit", type=int, default=2000, help="pictures to index")
    parser.add_argument("--results", type=Path, help="the file that gets the tables: RESULTS.md; of --quick none")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.limit = [10_000], 200
    for part in options.part:
        if part == "pictures":
            text = pictures(options.model.resolve(), options.pictures, options.limit)
        else:
            text = vectors(options.sizes, options.queries)
        if options.results or not options.quick:
            chosen = ["sizes"] * (part == "vectors")
            results.write_section(results.section(f"search {part}", parser, options, *chosen), text, options.results)
        print(text)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
