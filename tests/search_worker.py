"""An index that is brought up to date by processes that are killed before and after each thing they do with files.
Prints what is left each time as JSON.

    python tests/search_worker.py FOLDER STEP

FOLDER has model/, pictures/ and products.mc, which is old; STEP 1 tries every moment, 3 every third.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faiss
import numpy as np
import pandas  # noqa: F401
import pyarrow.parquet
import torch

import miniclip.run.checkpoints  # noqa: F401
from miniclip.index import build
from miniclip.index.image_index import ImageIndex
from miniclip.inference.embed import embed_texts
from miniclip.inference.load import load
from tests.forge import KilledAt


def bring_up_to_date(folder: Path, loaded, fatal: int) -> int:
    """Updates; kills itself at that event, or gives how many there were."""
    inner = str(folder / "products.mc")
    killed = KilledAt(fatal, inner)
    pyarrow.parquet.write_table = killed.around(pyarrow.parquet.write_table)
    faiss.write_index = killed.around(faiss.write_index)
    build.PIECE, build.TEXTS = 4, build.TEXTS[:4]
    named = {"name": str(folder / "model"), "pretrained": None}
    build.update(folder / "pictures", inner, *loaded, named, method="hnsw", num_workers=0)
    return killed.count


def state(index: ImageIndex) -> list:
    """Which files there are, and whether each has the vector of its content, by what is searched: each file's own
    vector, asked for, finds it."""
    for path, (key, _) in index.files().items():
        row = index.keys.index(key)
        best = index.find(np.array(index.vectors[row]), 1)[0][1]
        assert path in index.paths(best), (path, index.paths(best))
    return sorted((path, key.hex()) for path, (key, _) in index.files().items())


def main(folder: Path, step: int):
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    loaded, found, fatal = load(folder / "model"), [], 1 - step
    embed_texts(*loaded[::2], ["what is imported and prepared here need not be after each fork"])
    state(ImageIndex(folder / "products.mc"))
    shutil.copytree(folder / "products.mc", folder / "start")
    while True:
        fatal += step
        shutil.rmtree(folder / "products.mc")
        shutil.copytree(folder / "start", folder / "products.mc")
        if not (pid := os.fork()):
            try:
                bring_up_to_date(folder, loaded, fatal)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        found.append(state(ImageIndex(folder / "products.mc", check=True)))
        if code == 0:
            break
    left = sorted(path.name for path in (folder / "products.mc").iterdir())
    print(json.dumps({"killed": len(found) - 1, "found": found, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
