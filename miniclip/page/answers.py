"""What does the page answer? Each answer is HTML, with the pictures in it, so that none of its addresses is a file's.

All that is shown of names, captions and messages is escaped.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from PIL import Image

from miniclip.classify.prompts import legibility
from miniclip.page.labels import Words
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import FORMATS, ImageError, ImageFile

IMAGES, CAPTIONS, CLASSES, MOST, LETTERS = 16, 32, 200, 100, 20_000  # the most that is taken of each at once
PIXELS = 50  # millions of a picture: small files may hold pictures that take gigabytes and minutes


class Upload(ImageFile):
    """A picture that somebody sent: `read` gives its bytes, `str` its name, as messages have it."""

    def __init__(self, path: str):
        self.path = path

    def __str__(self) -> str:
        return Path(self.path).name

    def read(self) -> bytes:
        return Path(self.path).read_bytes()


class Page:
    """What the page answers, as HTML. Each method takes `say`, the language, and what stands in the fields; it raises
    InputError for what cannot be answered."""

    def __init__(self, search, loaded, name: str, megabytes: float):
        self.search, self.name, self.megabytes = search, name, megabytes
        self.model, self.preprocess, self.tokenizer = loaded

    def words(self, say: Words, text: str, minus: str, k: int) -> str:
        """Words to pictures."""
        from miniclip.index.search import split_minus

        unwanted = split(self.checked(say, minus))
        limit(say, unwanted, CAPTIONS)
        if not split_minus([self.checked(say, text)])[0]:
            raise InputError(say("nothing"))
        title = f"{text.strip()} − {minus.strip()}" if minus.strip() else text.strip()
        found = self.search.query(text, self.many(say, k), minus=unwanted)
        head = say("found", n=len(found), pictures=f"{len(self.search):,}", query=title)
        return self.read(say, [text, *unwanted]) + self.cards(say, head, found)

    def picture(self, say: Words, path: str | None, text: str, k: int) -> str:
        """A picture, and words beside it, to pictures."""
        image, shown = self.upload(say, path)
        found = self.search.query(self.checked(say, text), self.many(say, k), image=[image])
        head = say("like", n=len(found), pictures=f"{len(self.search):,}", name=image)
        asked = f'<div class="mc-asked">{figure(shown, str(image), say("gone"))}{note(text and f"+ {text}")}</div>'
        return (self.read(say, [text]) if text.strip() else "") + self.cards(say, head, found, asked)

    def classes(self, say: Words, path: str | None, text: str, sentences: str) -> str:
        """Which of some classes a picture shows."""
        from miniclip.classify.zero_shot import build_zero_shot_classifier, probabilities
        from miniclip.inference.embed import embed_images

        classes = read_classes(say, self.checked(say, text))
        templates = [line.strip() for line in self.checked(say, sentences).splitlines() if line.strip()]
        if not templates:
            raise InputError(say("no_sentences"))
        for template in templates:  # all other braces would be instructions to Python's formatting
            if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
                raise InputError(say("no_braces", name=template))
        limit(say, templates, CAPTIONS)
        image, shown = self.upload(say, path)
        classifier = build_zero_shot_classifier(self.model, self.tokenizer, list(classes.values()), templates)
        shares = probabilities(self.model, embed_images(self.model, self.preprocess, [image]), classifier)[0]
        picture = f'<div class="mc-asked mc-large">{figure(shown, str(image), say("gone"))}</div>'
        return self.read(say, list(classes.values())) + picture + bars(list(classes), shares, say)

    def heat(self, say: Words, paths: list[str] | None, text: str) -> str:
        """How near several pictures and several captions are."""
        import torch

        from miniclip.classify.zero_shot import probabilities
        from miniclip.inference.embed import embed_images, embed_texts

        captions = [line.strip() for line in self.checked(say, text).splitlines() if line.strip()]
        if not captions:
            raise InputError(say("no_captions"))
        limit(say, captions, CAPTIONS)
        limit(say, paths or [None], IMAGES)
        images, shown = zip(*[self.upload(say, path) for path in paths or [None]])
        embeds = embed_images(self.model, self.preprocess, images)
        texts = embed_texts(self.model, self.tokenizer, captions).T
        shares = probabilities(self.model, embeds, torch.from_numpy(texts.copy()))
        names = [str(image) for image in images]
        return self.read(say, captions) + heat_table(captions, names, shown, embeds @ texts, shares, say)

    def cards(self, say: Words, head: str, found: list, asked: str = "") -> str:
        """What was found, with its pictures; those that are not there any more, or lead out of the folder, without."""
        from miniclip.reports.contact_sheet import thumbnail
        from miniclip.utils.parallel import read_ahead

        def picture(one):
            try:
                return thumbnail(self.search.file(one.path))
            except InputError:  # what it says has the whole path
                return None

        return cards(head, found, list(read_ahead(picture, found, None, len(found))), say, asked)

    def upload(self, say: Words, path: str | None) -> tuple[Upload, str]:
        """A picture that was sent, and what to show of it."""
        from miniclip.reports.contact_sheet import thumbnail

        if not path:
            raise InputError(say("no_picture"))
        if not os.path.isfile(path):
            raise InputError(say("deleted", name=Path(path).name))
        image, size = Upload(path), os.path.getsize(path) / (1 << 20)
        if size > self.megabytes:
            raise InputError(say("too_large", name=image, n=size, most=self.megabytes))
        pixels = 0.0
        with suppress(Exception), Image.open(path, formats=FORMATS) as opened:  # of a broken one it is said below
            pixels = opened.size[0] * opened.size[1] / 1e6
        if pixels > PIXELS:
            raise InputError(say("too_many_pixels", name=image, n=pixels, most=PIXELS))
        try:
            return image, thumbnail(image)
        except ImageError as error:
            why = re.sub(r"(; replace it)? or remove its record", "", str(error))  # there is no record here
            raise InputError(say("broken", why=why)) from None

    def read(self, say: Words, texts: list[str]) -> str:
        """A warning where the text tower cannot read the texts, with the numbers."""
        seen = legibility(self.tokenizer, texts)
        said = []
        if bad := seen["illegible"]:
            numbers = legibility(self.tokenizer, bad)
            said.append(say("illegible", names=", ".join(bad[:6]), **numbers))
        if seen["alike"]:
            said.append(say("alike", names=", ".join(seen["alike"][:6])))
        return note(" ".join(said), "mc-warning")

    def many(self, say: Words, k) -> int:
        """How many pictures are asked for: a request need not come from the slider."""
        if not isinstance(k, (int, float)) or not 1 <= k <= MOST:
            raise InputError(say("bad_k", most=MOST))
        return int(k)

    def checked(self, say: Words, text: str | None) -> str:
        """A text that is not too long to be read."""
        if len(text or "") > LETTERS:
            raise InputError(say("too_long", most=LETTERS))
        return text or ""


def split(text: str) -> list[str]:
    """The parts of a text with commas or lines between, in Latin or Chinese writing."""
    return [part.strip() for part in re.split(r"[\n,;，、；]", text) if part.strip()]


def limit(say: Words, items: list, most: int):
    """Raises InputError for too many."""
    if len(items) > most:
        raise InputError(say("too_many", n=len(items), most=most))


def read_classes(say: Words, text: str) -> dict[str, str]:
    """{name: the words that are asked for}. Names no file, as `prompts.read_classes` may: the text is anybody's."""
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
    """A message in the place of an answer; what was typed stays."""
    return f'<p class="mc-problem" role="alert">{escape(text)}</p>'


def note(text: str, kind: str = "mc-note") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def heading(text: str) -> str:
    """What an answer begins with; programs that read pages aloud say it by themselves."""
    return f'<div role="status"><h2>{escape(text)}</h2></div>'


def figure(picture: str | None, name: str, missing: str) -> str:
    """A picture, the text of a `data:` address, or what is said where there is none."""
    return f'<img src="{picture}" alt="{escape(name)}">' if picture else f'<div class="mc-gone">{escape(missing)}</div>'


def cards(title: str, found: Sequence, pictures: Sequence, say: Words, asked: str = "") -> str:
    """What was found, best first: `found` as ImageSearch has it, each with its picture or None."""
    cells = []
    for one, picture in zip(found, pictures):
        same = f"<small>{escape(say('same', names=', '.join(one.copies)))}</small>" if one.copies else ""
        cells.append(
            f"<li>{figure(picture, one.path, say('gone'))}<div><b>{one.rank}</b> {escape(one.path)}</div>"
            f"<small>{one.score:.4f}</small>{same}</li>"
        )
    return f'{heading(title)}{asked}<ol class="mc-cards">{"".join(cells)}</ol>{note(say("score"))}'


def bars(names: Sequence[str], shares: Sequence[float], say: Words) -> str:
    """Probabilities as bars, the greatest first. The numbers are text, the bars are for the eye alone."""
    rows = sorted(zip(names, map(float, shares)), key=lambda row: -row[1])
    items = "".join(
        f'<li><span class="mc-name">{escape(name)}</span><span class="mc-bar" aria-hidden="true">'
        f'<i style="width:{100 * share:.2f}%"></i></span><span class="mc-share">{100 * share:.1f}%</span></li>'
        for name, share in rows
    )
    head = heading(f"{rows[0][0]}: {100 * rows[0][1]:.1f}%")
    return f'{head}<ol class="mc-bars">{items}</ol>{note(say("among", n=len(rows)))}'


def heat_table(captions: Sequence[str], names: Sequence[str], pictures: Sequence, cosines, shares, say: Words) -> str:
    """Cosines (images, captions) and probabilities as a table, a caption in each row and a picture in each column; the
    colour of a cell is where its cosine lies between the lowest and the highest."""
    low, high = float(cosines.min()), float(cosines.max())
    heads = "".join(
        f'<th scope="col">{figure(picture, "", say("gone"))}<span>{escape(name)}</span></th>'
        for name, picture in zip(names, pictures)
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
