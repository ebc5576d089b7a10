"""Self-contained HTML pages: thumbnails inside the page, no scripts, no network; and the contact sheet of a search."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from pathlib import Path

from miniclip.utils.files import write_text
from miniclip.utils.image_files import ImageFile, open_image


def safe(text) -> str:
    """Any text as HTML, even file names that are not valid UTF-8."""
    return escape(str(text).encode("utf-8", "replace").decode())


@cache
def read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def fill(part: str, **values) -> str:
    """A part of report.html with its values, which must be HTML or numbers."""
    return re.search(rf"<!-- {part} -->\n(.*?)\n(?=<!-- |\Z)", read("report.html"), re.DOTALL)[1].format(**values)


def write_page(path: str | Path, title: str, body: str):
    """Writes an HTML page with the style sheet report.css. `title` is plain text, `body` HTML."""
    write_text(path, fill("page", title=safe(title), style=read("report.css"), body=body))


def thumbnail(path: str | Path | ImageFile, side: int = 320) -> str:
    """An image as a `data:` URL: a JPEG of at most `side` pixels a side, without metadata. Raises ImageError."""
    image, file = open_image(path, side), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=82, comment=b"")  # an empty comment replaces that of the original
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def write_sheet(path: str | Path, title: str, found: Sequence, locate: Callable, note: str = ""):
    """Writes search results, with `rank`, `score`, `path` and `copies`, as an HTML page. `locate(path)` returns the
    file. Where that or reading it raises InputError, the message replaces the image."""
    cells = []
    for one in found:
        name = safe(one.path)
        try:
            image = f'<img src="{thumbnail(locate(one.path))}" alt="{name}">'
        except ValueError as error:  # InputError and ImageError are ValueErrors
            image = f'<p class="note">{safe(error)}</p>'
        copies = "".join(f'<p class="note">the same: {safe(copy)}</p>' for copy in one.copies)
        cells.append(f'<li>{image}<p>{one.rank}. {name}</p>{copies}<p class="note">{one.score:.4f}</p></li>')
    write_page(path, title, fill("sheet", title=safe(title), cells="\n".join(cells), note=safe(note)))
