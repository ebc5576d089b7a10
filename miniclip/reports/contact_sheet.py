"""What was found, to look at: one HTML file with the pictures in it, which needs no other file and no network."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from miniclip.utils.files import write_text
from miniclip.utils.image_files import open_image

SIDE = 320  # pixels of a picture's longer side
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; --ink: #1f2328; --grey: #6b7280; --paper: #ffffff; --cell: #f1f3f5; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8eb; --grey: #9aa3ad; --paper: #16181b; --cell: #23272c; }}
}}
body {{ margin: 32px; background: var(--paper); color: var(--ink); font: 15px/1.4 system-ui, sans-serif; }}
h1 {{ font-size: 22px; font-weight: 600; overflow-wrap: anywhere; }}
ol {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 14px; padding: 0; }}
li {{ list-style: none; background: var(--cell); border-radius: 5px; padding: 10px; }}
img {{ width: 100%; height: 220px; object-fit: contain; }}
p {{ margin: 6px 0 0; overflow-wrap: anywhere; }}
.grey {{ color: var(--grey); font-size: 13px; }}
</style></head><body>
<h1>{title}</h1>
<ol>
{cells}
</ol>
<p class="grey">{note}</p>
</body></html>
"""


def thumbnail(path, side: int = SIDE) -> str:
    """A picture, a file or a handle, as the text of a `data:` address: JPEG, its longer side at most `side` pixels.
    Raises ImageError."""
    image, file = open_image(path, side), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=82, comment=b"")  # else that of the file, of whatever length, would come along
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def write_sheet(path: str | Path, title: str, found: Sequence, locate, note: str = ""):
    """Writes what was found, best first, as an HTML file. `found` has `rank`, `score`, `path` and `copies` each (see
    `image_search.Found`); `locate(path)` gives where the picture lies, or raises InputError, which is then said in the
    picture's place."""
    cells = []
    for one in found:
        name = escape(one.path)
        try:
            picture = f'<img src="{thumbnail(locate(one.path))}" alt="{name}">'
        except ValueError as error:  # InputError, of which it is one
            picture = f'<p class="grey">{escape(str(error))}</p>'
        copies = "".join(f'<p class="grey">the same: {escape(copy)}</p>' for copy in one.copies)
        cells.append(f'<li>{picture}<p>{one.rank}. {name}</p>{copies}<p class="grey">{one.score:.4f}</p></li>')
    write_text(path, PAGE.format(title=escape(title), cells="\n".join(cells), note=escape(note)))
