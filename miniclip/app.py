"""How do people search who do not type commands? A page in the browser, for this machine alone unless told otherwise:

    pip install -r requirements-ui.txt
    python -m miniclip.app --model runs/mine --index products.mc      # then open http://127.0.0.1:7860

By words, by picture, zero-shot classes, and how near pictures and captions are. It is Gradio's, with less: it connects
to nothing outside, gives out no file at any address, answers no address that the page does not use (docs/page.md).
"""

import argparse
import os
import re
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

from miniclip.app_guard import Guard, is_here, listen, stay_inside
from miniclip.app_labels import CSS, LANGUAGES, SAYINGS, Words, bars, cards, figure, heat_table, note, problem
from miniclip.config import InputError
from miniclip.options import run
from miniclip.prompts import OBJECTS, TEMPLATES, legibility

IMAGES, CAPTIONS, CLASSES, MOST, LETTERS = 16, 32, 200, 100, 20_000  # the most that is taken of each at once


class Upload:
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
        if not text.strip():
            raise InputError(say("nothing"))
        title = f"{text.strip()} − {minus.strip()}" if minus.strip() else text.strip()
        found = self.search.query(self.checked(say, text), self.many(say, k), minus=split(self.checked(say, minus)))
        head = say("found", n=len(found), pictures=f"{len(self.search):,}", query=title)
        return self.read(say, [text]) + self.cards(say, head, found)

    def picture(self, say: Words, path: str | None, text: str, k: int) -> str:
        """A picture, and words beside it, to pictures."""
        image, shown = self.upload(say, path)
        found = self.search.query(self.checked(say, text), self.many(say, k), image=[image])
        head = say("like", n=len(found), pictures=f"{len(self.search):,}", name=image)
        asked = f'<div class="mc-asked">{figure(shown, str(image), say("gone"))}{note(text and f"+ {text}")}</div>'
        return (self.read(say, [text]) if text.strip() else "") + self.cards(say, head, found, asked)

    def classes(self, say: Words, path: str | None, text: str, sentences: str) -> str:
        """Which of some classes a picture shows."""
        from miniclip.inference import embed_images
        from miniclip.zero_shot import build_zero_shot_classifier, probabilities

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

        from miniclip.inference import embed_images, embed_texts
        from miniclip.zero_shot import probabilities

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
        from miniclip.inference import read_ahead
        from miniclip.sheet import thumbnail

        def picture(one):
            try:
                return thumbnail(self.search.file(one.path))
            except InputError:  # what it says has the whole path
                return None

        return cards(head, found, list(read_ahead(picture, found, None, len(found))), say, asked)

    def upload(self, say: Words, path: str | None) -> tuple[Upload, str]:
        """A picture that was sent, and what to show of it."""
        from miniclip.sheet import thumbnail
        from miniclip.transforms import ImageError

        if not path:
            raise InputError(say("no_picture"))
        image, size = Upload(path), os.path.getsize(path) / 1e6
        if size > self.megabytes:
            raise InputError(say("too_large", name=image, n=size, most=self.megabytes))
        try:
            return image, thumbnail(image)
        except ImageError as error:
            raise InputError(say("broken", why=error)) from None

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


def build(page: Page):
    """The page as Gradio has it: tabs, fields, and which method answers what."""
    import gradio as gr

    numbers = {"images": IMAGES, "captions": CAPTIONS, "megabytes": f"{page.megabytes:g}"}
    fixed = [key for key, texts in SAYINGS.items() if not re.search(r"\{(?!images|captions|megabytes|\})", texts[0])]
    english, chinese = (
        {key: re.sub(r"{(\w+)}", lambda found: str(numbers[found[1]]), SAYINGS[key][row]) for key in fixed}
        for row in (0, 1)
    )
    say = gr.I18n(en=english, zh=chinese, **{"zh-CN": chinese, "zh-TW": chinese})

    def answering(method):
        def answer(request: gr.Request, *values):
            words = Words(request.headers.get("accept-language", ""))
            try:
                return method(words, *values)
            except InputError as error:
                return problem(str(error))
            except Exception:
                traceback.print_exc()
                return problem(words("fault"))

        return answer

    def on(triggers, method, inputs, output):
        # One at a time: an answer takes all cores, and the others see that they wait.
        gr.on(triggers, answering(method), inputs, output, concurrency_id="model", concurrency_limit=1,
              api_visibility="private", show_progress="minimal")  # fmt: skip

    def head(request: gr.Request):
        words = Words(request.headers.get("accept-language", ""))
        about = {"model": page.name}
        if page.search is not None:
            about |= {"pictures": f"{len(page.search):,}", "index": page.search.index.folder.name}
        line = words("about" if page.search is not None else "about_model", **about)
        key = words.language
        return f"<h1>{words('title')}</h1>{note(line)}", "\n".join(OBJECTS[key]), key, "\n".join(TEMPLATES[key])

    def sentences_of(key: str, names: str):
        """The sentences of a language; the ten objects too, where they were not changed."""
        return "\n".join(TEMPLATES[key]), "\n".join(OBJECTS[key]) if split(names) in OBJECTS.values() else names

    def picture_field(place: str, **more):
        more = {"label": say("upload"), **more}
        field = gr.File(file_types=["image"], height=140, elem_id=f"file-{place}", **more)
        gr.Markdown(say("limits"), elem_classes="mc-limits")
        return field

    def answer_field(place: str):
        return gr.HTML(elem_id=f"found-{place}", elem_classes="mc-answer")

    def how_many_and(button: str):
        with gr.Row(equal_height=True):
            k = gr.Slider(1, MOST, 10, step=1, label=say("k"), scale=3, min_width=200, buttons=[])
            return k, gr.Button(say(button), variant="primary", scale=1, min_width=120)

    with gr.Blocks(title="MiniCLIP", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        top = gr.HTML(elem_classes="mc-head")
        with gr.Tabs():
            with gr.Tab(say("words")):
                if page.search is None:
                    no_index(gr, say, page.name)
                else:
                    with gr.Row():
                        query = gr.Textbox(label=say("query"), placeholder=say("query_hint"), scale=3, min_width=220,
                                           max_lines=1, autofocus=True)  # fmt: skip
                        minus = gr.Textbox(label=say("minus"), placeholder=say("minus_hint"), scale=1, min_width=160,
                                           max_lines=1)  # fmt: skip
                    k, button = how_many_and("search")
                    on([query.submit, minus.submit, button.click], page.words, [query, minus, k], answer_field("words"))
            with gr.Tab(say("picture")):
                if page.search is None:
                    no_index(gr, say, page.name)
                else:
                    image = picture_field("picture")
                    beside = gr.Textbox(label=say("beside"), placeholder=say("beside_hint"), max_lines=1)
                    k, button = how_many_and("search")
                    triggers = [image.upload, beside.submit, button.click]
                    on(triggers, page.picture, [image, beside, k], answer_field("picture"))
            with gr.Tab(say("classes")):
                with gr.Row():
                    with gr.Column(min_width=280):
                        image = picture_field("classes")
                        names = gr.Textbox(label=say("names"), info=say("names_hint"), lines=6, max_lines=12)
                        language = gr.Radio([(text, key) for key, text in LANGUAGES.items()], label=say("language"))
                        with gr.Accordion(say("templates"), open=False):
                            sentences = gr.Textbox(label=say("templates"), lines=5, max_lines=12, show_label=False)
                        button = gr.Button(say("classify"), variant="primary")
                    with gr.Column(min_width=280):
                        found = answer_field("classes")
                language.input(sentences_of, [language, names], [sentences, names], api_visibility="private")
                on([image.upload, button.click], page.classes, [image, names, sentences], found)
            with gr.Tab(say("heat")):
                with gr.Row():
                    with gr.Column(min_width=280):
                        images = picture_field("heat", label=say("pictures"), file_count="multiple")
                    with gr.Column(min_width=280):
                        captions = gr.Textbox(label=say("captions"), placeholder=say("captions_hint"), lines=6,
                                              max_lines=16)  # fmt: skip
                button = gr.Button(say("compare"), variant="primary")
                on([button.click], page.heat, [images, captions], answer_field("heat"))
        start = [top, names, language, sentences]
        blocks.load(head, None, start, api_visibility="private", show_progress="hidden")
    return blocks.queue(max_size=64), say


def no_index(gr, say, model: str):
    """What stands in a tab that searches, where there is nothing to be searched."""
    gr.Markdown(say("no_index"))
    command = f"python -m miniclip.search index photos --model {model} --index products.mc"
    gr.HTML(f'<pre class="mc-code">{command}\npython -m miniclip.app --index products.mc</pre>')


def serve(page: Page, host: str, sock: socket.socket):
    """Answers until it is stopped."""
    import fastapi
    import gradio as gr
    import uvicorn

    blocks, say = build(page)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to be fetched
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", **fonts)
    theme.set(button_primary_background_fill="*primary_600", button_primary_background_fill_dark="*primary_600",
              block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
              input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400")  # fmt: skip
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None), blocks, "/", footer_links=[], run_history=False, ssr_mode=False, i18n=say,
        max_file_size=int(page.megabytes * 1e6), theme=theme, css=CSS, show_error=False, enable_monitoring=False,
    )  # fmt: skip
    blocks.has_launched = True  # without it gradio lets a request name any file as one that was uploaded
    here, port = is_here(host), sock.getsockname()[1]
    name = f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            print(f"http://{name}:{port}   (Ctrl-C ends it)", flush=True)
            if not here:
                print("warning: whoever can reach this machine can search, and see what is found", flush=True)

    guard = Guard(app, here, int((IMAGES * page.megabytes + 1) * 1e6))
    Server(uvicorn.Config(guard, log_level="warning", timeout_graceful_shutdown=1)).run([sock])


def main(argv: list[str]):
    parser = argparse.ArgumentParser("python -m miniclip.app", description="A page in the browser that searches.")
    parser.add_argument("--model", help="a folder saved by MiniCLIP, or a config's name; the index's own unless given")
    parser.add_argument("--index", help="an index, made by python -m miniclip.search index; none: no search")
    parser.add_argument("--pretrained", help="weights for the named config")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; a GPU if there is one unless given")
    parser.add_argument("--pictures", metavar="DIR", help="their folder, where it is another than when it was indexed")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: all that can reach this machine (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("--max_upload_mb", type=float, default=20, help="of a picture (default: %(default)s)")
    options = parser.parse_args(argv)
    if not options.model and not options.index:
        parser.error("name an --index, a --model or both")
    if not options.max_upload_mb > 0:
        parser.error("--max_upload_mb: more than 0")
    with tempfile.TemporaryDirectory(prefix="miniclip-page-") as uploads:
        os.environ.update(GRADIO_TEMP_DIR=uploads, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1",
                          HF_HUB_OFFLINE="1")  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder goes too
        with listen(options.host, options.port) as sock:
            stay_inside()
            try:
                import gradio  # noqa: F401
            except ImportError as error:
                raise InputError(f"{error}: pip install -r requirements-ui.txt") from None
            serve(open_page(options), options.host, sock)


def open_page(options: argparse.Namespace) -> Page:
    """Loads what is asked for."""
    import torch

    from miniclip.image_search import ImageSearch
    from miniclip.inference import load

    device = torch.device(options.device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if options.index:
        search = ImageSearch(options.index, options.model, options.pretrained, device, options.pictures)
        name = options.model or search.index.about["model"]["name"]
        return Page(search, (search.model, search.preprocess, search.tokenizer), Path(name).name, options.max_upload_mb)
    return Page(None, load(options.model, options.pretrained, device, "fp32"), options.model, options.max_upload_mb)


if __name__ == "__main__":
    run(main)
