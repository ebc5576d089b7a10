"""The page's answers: HTML with escaped texts and embedded images, so that no file needs an address."""

import re
from contextlib import suppress
from html import escape
from pathlib import Path

import numpy as np
import torch

from miniclip.classify.names import spell_out
from miniclip.classify.prompts import tokenizer_coverage
from miniclip.classify.zero_shot import build_zero_shot_classifier, probabilities
from miniclip.index.search import split_minus
from miniclip.inference.caption import caption_images
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.inference.late_interaction import has_tokens, where_seen
from miniclip.page.labels import Words
from miniclip.reports.contact_sheet import thumbnail
from miniclip.reports.heat_map import heat_maps
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError, ImageFile, identify
from miniclip.utils.parallel import read_ahead

IMAGES, CAPTIONS, CLASSES, MOST, LETTERS = 16, 32, 200, 100, 20_000  # limits of a single request
PIXELS = 50  # million per image: small files may contain images that take gigabytes and minutes


class Upload(ImageFile):
    """An uploaded image. `str` returns its name for messages, without its folder."""

    def __init__(self, path: str):
        self.path = Path(path)

    def __str__(self) -> str:
        return self.path.name

    def read(self) -> bytes:
        return self.path.read_bytes()


class Page:
    """The page's answers. Each method takes `say`, the texts in the reader's language, and the values of the fields.
    It returns HTML, or raises InputError for what cannot be answered."""

    def __init__(self, search, loaded, name: str, megabytes: float, captioner=None):
        self.search, self.name, self.megabytes, self.captioner = search, name, megabytes, captioner
        self.model, self.preprocess, self.tokenizer = loaded

    def words(self, say: Words, text: str, minus: str, k: int) -> str:
        text = checked(say, text)
        unwanted = parts(say, minus, CAPTIONS)
        if not split_minus([text])[0]:
            raise InputError(say("nothing"))
        title = f"{text.strip()} − {minus.strip()}" if unwanted else text.strip()
        found = self.search.query(text, int(k), minus=unwanted)
        return self.coverage(say, [text, *unwanted]) + self.cards(say, "found", found, query=title)

    def image(self, say: Words, path: str | None, text: str, k: int) -> str:
        """Searches by an image and optional words."""
        image, shown = self.upload(say, path)
        text = checked(say, text)
        found = self.search.query(text, int(k), image=[image])
        asked = f'<div class="mc-asked">{figure(shown, image)}{note(text and f"+ {text}")}</div>'
        return (self.coverage(say, [text]) if text.strip() else "") + self.cards(say, "like", found, asked, name=image)

    def classes(self, say: Words, path: str | None, text: str, sentences: str) -> str:
        """Classifies an image. Shows probabilities as bars, highest first: as text, too, for screen readers."""
        classes = read_classes(say, text)
        if not (templates := parts(say, sentences, CAPTIONS, "\n")):
            raise InputError(say("no_sentences"))
        # Other braces would be instructions to Python's formatting.
        if wrong := [text for text in templates if not re.fullmatch(r"[^{}]*{}[^{}]*", text)]:
            raise InputError(say("no_braces", name=wrong[0]))
        image, shown = self.upload(say, path)
        classifier = build_zero_shot_classifier(self.model, self.tokenizer, list(classes.values()), templates)
        shares = probabilities(self.model, embed_images(self.model, self.preprocess, [image]), classifier)[0]
        rows = sorted(zip(classes, shares.tolist()), key=lambda row: -row[1])
        items = "".join(
            f'<li><span class="mc-name">{escape(name)}</span><span class="mc-bar" aria-hidden="true">'
            f'<i style="width:{100 * share:.2f}%"></i></span><span class="mc-share">{100 * share:.1f}%</span></li>'
            for name, share in rows
        )
        asked = f'<div class="mc-asked mc-large">{figure(shown, image)}</div>'
        head = self.coverage(say, list(classes.values())) + asked + heading(f"{rows[0][0]}: {100 * rows[0][1]:.1f}%")
        kind = "among" if self.model.logit_bias is None else "each"
        return f'{head}<ol class="mc-bars">{items}</ol>{note(say(kind, n=len(rows)))}'

    def heat(self, say: Words, paths: list[str] | None, text: str) -> str:
        """Compares images with captions: a table of probabilities and cosines, coloured from lowest to highest."""
        captions = parts(say, text, CAPTIONS, "\n")
        paths = paths or [None]
        if not captions:
            raise InputError(say("no_captions"))
        if len(paths) > IMAGES:
            raise InputError(say("too_many", n=len(paths), most=IMAGES))
        uploads = [self.upload(say, path) for path in paths]
        embeds = embed_images(self.model, self.preprocess, [image for image, _ in uploads])
        texts = embed_texts(self.model, self.tokenizer, captions)
        shares = probabilities(self.model, embeds, torch.from_numpy(texts).T)
        cosines = texts @ embeds.T
        heats = (cosines - cosines.min()) / max(np.ptp(cosines), 1e-9)
        rows = ""
        for caption, *numbers in zip(captions, heats, cosines, shares.T):
            cells = "".join(
                f'<td style="--heat:{heat:.2f}">{cosine:.3f}<small>{share:.0%}</small>'
                for heat, cosine, share in zip(*numbers)
            )
            rows += f'<tr><th scope="row">{escape(caption)}</th>{cells}</tr>'
        names = [f"{figure(url, '')}<span>{escape(str(image))}</span>" for image, url in uploads]
        heads = "".join(f'<th scope="col">{name}</th>' for name in names)
        title = say("heat_title")
        return (
            f'{self.coverage(say, captions)}{heading(title)}<div class="mc-scroll" tabindex="0" role="region"'
            f' aria-label="{escape(title)}"><table class="mc-heat"><thead><tr><td>{escape(say("caption"))}</td>{heads}'
            f"</tr></thead><tbody>{rows}</tbody></table></div>{note(say('cells'))}"
            + self.seen(say, [image for image, _ in uploads], [captions[row] for row in cosines.argmax(axis=0)])
        )

    def seen(self, say: Words, images: list[Upload], captions: list[str]) -> str:
        """Shows where in each image the words of a caption are seen, if the model has late interaction."""
        answer = ""
        for image, caption in zip(images, captions) if has_tokens(self.model) else ():
            levels, words = where_seen(self.model, self.preprocess, self.tokenizer, image, caption)
            items = (
                f"<li>{figure(url, say('seen_word', word=word))}<div>{escape(word)}</div><small>{n:.3f}</small></li>"
                for url, (word, n, _) in zip(heat_maps(levels, [heat for _, _, heat in words]), words)
            )
            title = escape(say("seen", name=image, caption=caption))
            answer += f'<h2>{title}</h2><ol class="mc-cards mc-words">{"".join(items)}</ol>'
        return answer and answer + note(say("seen_note"))

    def caption(self, say: Words, path: str | None, name: str = "") -> str:
        """Writes a caption of an uploaded image, or of one of the index, by its name there."""
        if name := checked(say, name).strip():
            if path:
                raise InputError(say("both_pictures"))
            if not self.search or name not in self.search.index:
                raise InputError(say("not_in_index", name=name))
            try:
                image = self.search.file(name)
                shown = thumbnail(image)
            except InputError:  # its message has the whole path
                raise InputError(say("gone")) from None
        else:
            image, shown = self.upload(say, path)
        text = caption_images(self.captioner, self.preprocess, self.tokenizer, [image])[0]
        asked = f'<div class="mc-asked mc-large">{figure(shown, name or image)}</div>'
        return f"{asked}{heading(text)}{note(say('written'))}"

    def cards(self, say: Words, title: str, found: list, asked: str = "", **values) -> str:
        """Returns the search results with their images, except those that are gone or lead out of the image folder."""

        def shown(one):
            try:
                return figure(thumbnail(self.search.file(one.path)), one.path)
            except InputError:  # its message has the whole path
                return f'<div class="mc-gone">{escape(say("gone"))}</div>'

        cells = []
        for one, image in zip(found, read_ahead(shown, found, None, len(found))):
            same = f"<small>{escape(say('same', names=', '.join(one.copies)))}</small>" if one.copies else ""
            name = f"<div><b>{one.rank}</b> {escape(one.path)}</div>"
            cells.append(f"<li>{image}{name}<small>{one.score:.4f}</small>{same}</li>")
        score = "score_late" if has_tokens(self.model) else "score"
        head = heading(say(title, n=len(found), pictures=f"{len(self.search):,}", **values))
        return f'{head}{asked}<ol class="mc-cards">{"".join(cells)}</ol>{note(say(score))}'

    def upload(self, say: Words, path: str | None) -> tuple[Upload, str]:
        """Checks an uploaded image. Returns it and a thumbnail."""
        if not path:
            raise InputError(say("no_picture"))
        image = Upload(path)
        if not image.path.is_file():
            raise InputError(say("deleted", name=image))
        pixels = 0
        with suppress(Exception), identify(path) as opened:  # broken files are reported below
            pixels = opened.width * opened.height / 1e6
        if pixels > PIXELS:
            raise InputError(say("too_many_pixels", name=image, n=pixels, most=PIXELS))
        try:
            return image, thumbnail(image)
        except ImageError as error:
            why = re.sub(r"(; replace it)? or remove its record", "", str(error))  # there is no record here
            raise InputError(say("broken", why=why)) from None

    def coverage(self, say: Words, texts: list[str]) -> str:
        """Returns a warning, with the numbers, if the text tower cannot read the texts."""
        found = tokenizer_coverage(self.tokenizer, texts)
        said = []
        if bad := found["unreadable"]:
            said.append(say("unreadable", names=", ".join(bad[:6]), **tokenizer_coverage(self.tokenizer, bad)))
        if same := found["identical"]:
            said.append(say("identical", names=", ".join(same[:6])))
        return note(" ".join(said), "mc-warning")


def checked(say: Words, text: str | None) -> str:
    """Returns a text, half of an emoji as "?", which no answer can hold. Raises InputError if it is too long."""
    if len(text or "") > LETTERS:
        raise InputError(say("too_long", most=LETTERS))
    return (text or "").encode("utf-8", "replace").decode()


def parts(say: Words, text: str, most: int, separators: str = "\n,;，、；") -> list[str]:
    """Splits a text. Raises InputError if it is too long or has too many parts."""
    found = [part.strip() for part in re.split(f"[{separators}]", checked(say, text)) if part.strip()]
    if len(found) > most:
        raise InputError(say("too_many", n=len(found), most=most))
    return found


def read_classes(say: Words, text: str) -> dict[str, str]:
    """Returns {name: words}. Unlike `prompts.read_classes` it reads no file: anybody may have written the text."""
    classes = {}
    for part in parts(say, text, CLASSES):
        name, equals, words = (piece.strip() for piece in part.partition("="))
        if not name or equals and not words:
            raise InputError(say("half", name=part))
        if name in classes:
            raise InputError(say("twice", name=name))
        classes[name] = words
    if len(classes) < 2:
        raise InputError(say("no_classes"))
    spelled = spell_out(name for name, words in classes.items() if not words)
    return {name: words or spelled[name] for name, words in classes.items()}


def note(text: str, kind: str = "mc-note") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def heading(text: str) -> str:
    """Returns the heading of an answer, which screen readers announce."""
    return f'<div role="status"><h2>{escape(text)}</h2></div>'


def figure(image: str, name) -> str:
    return f'<img src="{image}" alt="{escape(str(name))}">'
