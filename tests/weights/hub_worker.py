"""Runs the real client code with HF_ENDPOINT set: huggingface_hub reads it when it is imported.

Reads a line of JSON for each job, [code, environment], and answers with [result, error, log messages]. The error is
that of an InputError; any other one ends the process. `code` is an expression with `load`, `hub`, `pretrained`, ...
"""

import json
import logging
import os
import sys
import tempfile
import warnings

from huggingface_hub import constants

import miniclip.inference.load
import miniclip.weights.hub as hub
import miniclip.weights.pretrained as pretrained
from miniclip.utils.errors import InputError
from tests.forge import fork, status

hub.WAIT = 0.01
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # only whole chunks are kept when a connection breaks
messages = logging.Handler()
logging.getLogger("miniclip").addHandler(messages)


def load(*names, **more):
    """What can be compared of a loaded model: config, and a digest of the weights."""
    model, preprocess, _ = miniclip.inference.load.load(*names, **more)
    values = {name: t.double().sum().item() for name, t in model.state_dict().items()}
    return {"config": model.config.to_dict(), "images": preprocess.cfg.mean, "weights": values}


def script(*argv) -> tuple[int, str]:
    """Runs a script of the project in a process of its own: its exit status and what it printed."""
    with tempfile.TemporaryFile() as out:
        code = status([fork(list(argv), out.fileno(), out.fileno())], 120)
        out.seek(0)
        return code, out.read().decode()


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    names = {"load": load, "hub": hub, "pretrained": pretrained, "script": script}
    for line in sys.stdin:
        code, environment = json.loads(line)
        said, result, error, before = [], None, None, dict(os.environ)
        messages.emit = lambda record, said=said: said.append(record.getMessage())
        os.environ.update(environment)
        constants.ENDPOINT = os.environ["HF_ENDPOINT"]  # which is read only once
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, said=said: said.append(str(message))
            try:
                result = eval(code, names)
            except InputError as refused:
                error = str(refused)
        os.environ.clear()
        os.environ.update(before)
        answers.write(json.dumps([result, error, said], default=str) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
