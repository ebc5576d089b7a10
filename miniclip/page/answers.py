"""The page's answers: HTML with the images embedded, so that no file needs an address. All names, captions and messages
are escaped."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

import torch
from PIL import Image

from miniclip.classify.prompts import tokenizer_coverage
from miniclip.classify.zero_shot import build_zero_shot_classifier, probabilities
from miniclip.index.search import split_minus
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.page.labels import Words
from miniclip.reports.contact_sheet import thumbnail
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import FORMATS, ImageError, ImageFile
from miniclip.utils.parallel import read_ahead

IMAGES, CAPTIONS, CLASSES, MOST, LETTERS = 16, 32, 200, 100, 20_000  # limits of a single request
PIXELS = 50  # million per image: small files may contain images that take gigabytes and minutes


class Upload(ImageFile):
    """An uploaded image. `read` returns its bytes, `str` its name for messages."""

    def __init__(self, path: str):
        self.path = path

    def __str__(self) -> str:
        return Path(self.path).name

    def read(self) -> bytes:
        return Path(self.path).read_bytes()


class Page:
    """The page's answers. Each method takes `say`, the texts in the reader's language, and the values of the fields.
    It returns HTML, or raises InputError for what cannot be answered."""

    def __init__(self, search, loaded, name: str, megabytes: float):
        self.search, self.name, self.megabytes = search, name, megabytes
        self.model, self.preprocess, self.tokenizer = loaded

    def words(self, say: Words, text: str, minus: str, k: int) -> str:
        """Searches by words."""
        unwanted = split(checked(say, minus))
        limit(say, unwanted, CAPTIONS)
        if not split_minus([checked(say, text)])[0]:
            raise InputError(say("nothing"))
        title = f"{text.strip()} − {minus.strip()}" if minus.strip() else text.strip()
        found = self.search.query(text, checked_k(say, k), minus=unwanted)
        head = say("found", n=len(found), pictures=f"{len(self.search):,}", query=title)
        return self.coverage(say, [text, *unwanted]) + self.cards(say, head, found)

    def image(self, say: Words, path: str | None, text: str, k: int) -> str:
        """Searches by an image and optional words."""
        image, shown = self.upload(say, path)
        found = self.search.query(checked(say, text), checked_k(say, k), image=[image])
        head = say("like", n=len(found), pictures=f"{len(self.search):,}", name=image)
        asked = f'<div class="mc-asked">{figure(shown, str(image), say("gone"))}{note(text and f"+ {text}")}</div>'
        return (self.coverage(say, [text]) if text.strip() else "") + self.cards(say, head, found, asked)

    def classes(self, say: Words, path: str | None, text: str, sentences: str) -> str:
        """Classifies an image."""
        classes, templates = read_classes(say, checked(say, text)), lines(checked(say, sentences))
        if not templates:
            raise InputError(say("no_sentences"))
        for template in templates:  # other braces would be instructions to Python's formatting
            if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
                raise InputError(say("no_braces", name=template))
        limit(say, templates, CAPTIONS)
        image, shown = self.upload(say, path)
        classifier = build_zero_shot_classifier(self.model, self.tokenizer, list(classes.values()), templates)
        shares = probabilities(self.model, embed_images(self.model, self.preprocess, [image]), classifier)[0]
        asked = f'<div class="mc-asked mc-large">{figure(shown, str(image), say("gone"))}</div>'
        return self.coverage(say, list(classes.values())) + asked + bars(list(classes), shares, say)

    def heat(self, say: Words, paths: list[str] | None, text: str) -> str:
        """Compares several images with several captions."""
        captions, paths = lines(checked(say, text)), paths or [None]
        if not captions:
            raise InputError(say("no_captions"))
        limit(say, captions, CAPTIONS)
        limit(say, paths, IMAGES)
        images, shown = zip(*[self.upload(say, path) for path in paths])
        embeds = embed_images(self.model, self.preprocess, images)
        texts = embed_texts(self.model, self.tokenizer, captions).T
        shares = probabilities(self.model, embeds, torch.from_numpy(texts.copy()))
        names = [str(image) for image in images]
        return self.coverage(say, captions) + heat_table(captions, names, shown, embeds @ texts, shares, say)

    def cards(self, say: Words, head: str, found: list, asked: str = "") -> str:
        """Returns the search results with their images, except those that are gone or lead out of the image folder."""

        def shown(one):
            try:
                return thumbnail(self.search.file(one.path))
            except InputError:  # its message has the whole path
                return None

        return cards(head, found, list(read_ahead(shown, found, None, len(found))), say, asked)

    def upload(self, say: Words, path: str | None) -> tuple[Upload, str]:
        """Checks an uploaded image. Returns it and a thumbnail."""
        if not path:
            raise InputError(say("no_picture"))
        if not os.path.isfile(path):
            raise InputError(say("deleted", name=Path(path).name))
        image, size = Upload(path), os.path.getsize(path) / (1 << 20)
        if size > self.megabytes:
            raise InputError(say("too_large", name=image, n=size, most=self.megabytes))
        pixels = 0.0
        with suppress(Exception), Image.open(path, formats=FORMATS) as opened:  # broken files are reported below
            pixels = opened.size[0] * opened.size[1] / 1e6
        if pixels > PIXELS:
            raise InputError(say("too_many_pixels", name=image, n=pixels, most=PIXELS))
        try:
            return image, thumbnail(image)
        except ImageError as error:
            why = re.sub(r"(; replace it)? or remove its record", "", str(error))  # there is no record here
            raise InputError(say("broken", why=why)) from None

    def coverage(self, say: Words, texts: list[str]) -> str:
        """Returns a warning, with the numbers, if the text tower cannot read the texts."""
        found, said = tokenizer_coverage(self.tokenizer, texts), []
        if bad := found["unreadable"]:
            said.append(say("unreadable", names=", ".join(bad[:6]), **tokenizer_coverage(self.tokenizer, bad)))
        if found["identical"]:
            said.append(say("identical", names=", ".join(found["identical"][:6])))
        return note(" ".join(said), "mc-warning")


def checked_k(say: Words, k) -> int:
    """Returns the number of results asked for. Raises InputError: a request need not come from the slider."""
    if not isinstance(k, (int, float)) or not 1 <= k <= MOST:
        raise InputError(say("bad_k", most=MOST))
    return int(k)


def checked(say: Words, text: str | None) -> str:
    """Returns a text, or raises InputError if it is too long."""
    if len(text or "") > LETTERS:
        raise InputError(say("too_long", most=LETTERS))
    return text or ""


def lines(text: str) -> list[str]:
    """Returns the lines of a text that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def split(text: str) -> list[str]:
    """Returns the parts of a text between Latin or Chinese commas, semicolons and line ends."""
    return [part.strip() for part in re.split(r"[\n,;，、；]", text) if part.strip()]


def limit(say: Words, items: list, most: int):
    """Raises InputError for too many."""
    if len(items) > most:
        raise InputError(say("too_many", n=len(items), most=most))


def read_classes(say: Words, text: str) -> dict[str, str]:
    """Returns {name: words}. Unlike `prompts.read_classes` it reads no file: anybody may have written the text."""
    classes = {}
    for part in split(text):
        name, equals, words = (piece.strip() for piece in part.partition("="))
        if not name or equals and not words:
            raise InputError(say("half", name=part))
        if name in classes:
            raise InputError(say("twice", name=name))
        classes[name] = words or name
    if len(classes) < 2:
        raise InputError(say("no_classes"))
    limit(say, list(classes), CLASSES)
    return classes


def problem(text: str) -> str:
    """Returns a message in place of an answer."""
    return f'<p class="mc-problem" role="alert">{escape(text)}</p>'


def note(text: str, kind: str = "mc-note") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def heading(text: str) -> str:
    """Returns the heading of an answer, which screen readers announce."""
    return f'<div role="status"><h2>{escape(text)}</h2></div>'


def figure(image: str | None, name: str, missing: str) -> str:
    """Returns an image, given as a `data:` address, or the text for a missing one."""
    return f'<img src="{image}" alt="{escape(name)}">' if image else f'<div class="mc-gone">{escape(missing)}</div>'


def cards(title: str, found: Sequence, images: Sequence, say: Words, asked: str = "") -> str:
    """Returns search results, best first, each with its image or None."""
    cells = []
    for one, image in zip(found, images):
        same = f"<small>{escape(say('same', names=', '.join(one.copies)))}</small>" if one.copies else ""
        cells.append(
            f"<li>{figure(image, one.path, say('gone'))}<div><b>{one.rank}</b> {escape(one.path)}</div>"
            f"<small>{one.score:.4f}</small>{same}</li>"
        )
    return f'{heading(title)}{asked}<ol class="mc-cards">{"".join(cells)}</ol>{note(say("score"))}'


def bars(names: Sequence[str], shares: Sequence[float], say: Words) -> str:
    """Returns probabilities as bars, highest first. The numbers are text; screen readers skip the bars."""
    rows = sorted(zip(names, map(float, shares)), key=lambda row: -row[1])
    items = "".join(
        f'<li><span class="mc-name">{escape(name)}</span><span class="mc-bar" aria-hidden="true">'
        f'<i style="width:{100 * share:.2f}%"></i></span><span class="mc-share">{100 * share:.1f}%</span></li>'
        for name, share in rows
    )
    head = heading(f"{rows[0][0]}: {100 * rows[0][1]:.1f}%")
    return f'{head}<ol class="mc-bars">{items}</ol>{note(say("among", n=len(rows)))}'


def heat_table(captions: Sequence[str], names: Sequence[str], thumbnails: Sequence, cosines, shares, say: Words) -> str:
    """Returns a table of cosines (images, captions) and probabilities, one row per caption and one column per image. A
    cell's colour is the position of its cosine between the lowest and the highest."""
    low, high = float(cosines.min()), float(cosines.max())
    heads = "".join(
        f'<th scope="col">{figure(image, "", say("gone"))}<span>{escape(name)}</span></th>'
        for name, image in zip(names, thumbnails)
    )
    rows = []
    for column, caption in enumerate(captions):
        cells = "".join(
            f'<td style="--heat:{(cosine - low) / max(high - low, 1e-9):.2f}">{cosine:.3f}<small>{share:.0%}</small>'
            for cosine, share in zip(map(float, cosines[:, column]), map(float, shares[:, column]))
        )
        rows.append(f'<tr><th scope="row">{escape(caption)}</th>{cells}</tr>')
    title = escape(say("heat_title"))
    return (
        f'{heading(say("heat_title"))}<div class="mc-scroll" tabindex="0" role="region" aria-label="{title}">'
        f'<table class="mc-heat"><thead><tr><td>{escape(say("caption"))}</td>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note(say('cells'))}"
    )
