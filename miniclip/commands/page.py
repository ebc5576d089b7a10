"""The command `page`: search in the browser."""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from miniclip.page.requests import listen, stay_inside
from miniclip.utils.command_line import find_device
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        "python -m miniclip page", description="Serves a web page to search and classify images."
    )
    parser.add_argument("--model", help="a folder saved by MiniCLIP, or a config's name (default: the index's own)")
    parser.add_argument(
        "--index", help="an index made by python -m miniclip search index; without it there is no search"
    )
    parser.add_argument("--pretrained", help="weights for the named config")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument("--pictures", metavar="DIR", help="the image folder, if it was moved since it was indexed")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0: everyone who can reach this machine (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument(
        "--max_upload_mb", type=float, default=20, help="maximum size of an image (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if not options.model and not options.index:
        parser.error("name an --index, a --model or both")
    if not options.max_upload_mb > 0:
        parser.error("--max_upload_mb must be more than 0")
    with tempfile.TemporaryDirectory(prefix="miniclip-page-") as uploads:
        os.environ.update(GRADIO_TEMP_DIR=uploads, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1",
                          HF_HUB_OFFLINE="1")  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder is deleted too
        with listen(options.host, options.port) as sock:
            stay_inside()
            try:
                import gradio  # noqa: F401
            except ImportError as error:
                raise InputError(f"{error}: pip install -r requirements-ui.txt") from None
            from miniclip.page.server import serve

            serve(open_page(options), options.host, sock)


def open_page(options: argparse.Namespace):
    """Loads the index and the model, and returns the Page."""
    from miniclip.index.search import ImageSearch
    from miniclip.inference.load import load
    from miniclip.page.answers import Page

    device = find_device(options.device)
    if options.index:
        search = ImageSearch(options.index, options.model, options.pretrained, device, options.pictures)
        name = options.model or search.index.about["model"]["name"]
        return Page(search, (search.model, search.preprocess, search.tokenizer), Path(name).name, options.max_upload_mb)
    return Page(None, load(options.model, options.pretrained, device, "fp32"), options.model, options.max_upload_mb)
