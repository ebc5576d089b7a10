"""A web page that searches images and answers questions about them.

Reads a model, a search index or both, and serves the page until it is stopped; writes nothing but temporary uploads."""

import os
import re
import signal
import sys
import tempfile
from pathlib import Path

from miniclip.utils.command_line import Parser, find_device, starting
from miniclip.utils.errors import InputError

# Gradio's own settings, and those of connections to elsewhere, which the page does not make: on import Gradio would
# fail for a SOCKS proxy, which needs one more package, for a proxy of unknown scheme and for a missing certificate.
OUTSIDE = re.compile(r"(all|https?|ftp|no)_proxy|ssl_cert_(file|dir)|gradio_\w+", re.IGNORECASE)


def main(argv: list[str]):
    parser = Parser.command("page", __doc__, "--index photos.mc  # then open http://127.0.0.1:7860; stop it by Ctrl-C")
    parser.share("model", help="a folder saved by MiniCLIP, or a config (default: the index's model)")
    parser.share("pretrained", "device")
    parser.add_argument("--index", help="an index made by miniclip search index; without one, the page has no search")
    parser.share("image_root", help="folder of the indexed images, if it was moved")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from other machines")
    parser.add_argument("--port", type=int, default=7860, help="port to serve on")
    parser.add_argument("--max_upload_mb", type=float, default=20, help="maximum size of an image")
    options = parser.parse_args(argv)
    if not options.model and not options.index:
        parser.error("give --index, --model or both")
    if not 0 < options.max_upload_mb < 1 << 20:  # a terabyte
        parser.error(f"--max_upload_mb must be above 0 and below {1 << 20}")
    with starting():
        from miniclip.page.requests import listen, stay_inside
        from miniclip.page.server import serve
        from miniclip.weights.pretrained import prefetch

    if options.model:
        prefetch(options.model, options.pretrained)  # before the page is cut off from the network

    # An upload under way may still be written while the folder is removed.
    with tempfile.TemporaryDirectory(prefix="miniclip-page-", ignore_cleanup_errors=True) as uploads:
        for name in [name for name in os.environ if OUTSIDE.fullmatch(name)]:
            del os.environ[name]
        os.environ.update(GRADIO_TEMP_DIR=uploads, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1",
                          HF_HUB_OFFLINE="1")  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder is removed
        # A shell's background job starts with it ignored; uvicorn stops for it all the same, and would seem to succeed.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with listen(options.host, options.port) as sock:
            stay_inside()
            try:
                with starting():
                    import gradio  # noqa: F401
            except ImportError as error:
                raise InputError(f"{error}: pip install -r requirements-ui.txt") from None
            serve(open_page(options), options.host, sock)


def open_page(options):
    """Returns the Page for the model and the index of the command line."""
    with starting():
        from miniclip.index.search import ImageSearch
        from miniclip.inference.caption import captioner
        from miniclip.inference.fast import inference_copy
        from miniclip.inference.load import load
        from miniclip.page.answers import Page

        device = find_device(options.device)
        if options.index:
            search = ImageSearch(options.index, options.model, options.pretrained, device, options.image_root)
            name = options.model or search.index.about["model"]["name"]
            loaded, name = (search.model, search.preprocess, search.tokenizer), Path(name).name
            return Page(search, loaded, name, options.max_upload_mb, search.captioner)
        model, *others = load(options.model, options.pretrained, device)
        return Page(None, (inference_copy(model), *others), options.model, options.max_upload_mb, captioner(model))
