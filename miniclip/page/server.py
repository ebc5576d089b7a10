"""The page: search, classification and a heat map in the browser, built with Gradio.

By default only this machine can reach it. It connects to no other machine, serves no file, and answers only the
requests that the page itself sends (docs/page.md)."""

import os
import shlex
import socket
import threading
import traceback
from html import escape

from miniclip.classify.prompts import OBJECTS, TEMPLATES
from miniclip.page.answers import CAPTIONS, IMAGES, MOST, Page, note
from miniclip.page.labels import CSS, LANGUAGES, SAYINGS, SCRIPT, Words
from miniclip.page.requests import Guard, is_here, keep_sweeping
from miniclip.utils.errors import InputError


def build(page: Page):
    """Returns the Gradio blocks (tabs, fields, and the method behind each button) and the texts."""
    import gradio as gr

    english, chinese = ({key: texts[i] for key, texts in SAYINGS.items()} for i in (0, 1))
    numbers = {"images": IMAGES, "captions": CAPTIONS, "megabytes": f"{page.megabytes:g}"}
    for texts in (english, chinese):
        texts |= {key: texts[key].format(**numbers) for key in ("pictures", "captions", "limits")}
    say = gr.I18n(en=english, zh=chinese, **{"zh-CN": chinese, "zh-TW": chinese})

    def on(triggers, method, inputs, place: str):
        def answer(request: gr.Request, *values):
            words = Words(request.headers.get("accept-language", ""))
            try:
                return method(words, *values)
            except InputError as error:
                problem = str(error)
            except Exception:
                traceback.print_exc()
                problem = words("fault")
            return f'<p class="mc-problem" role="alert">{escape(problem)}</p>'

        # One at a time: an answer uses all cores. What is asked meanwhile is asked again: gradio would drop it.
        output = gr.HTML(elem_id=f"found-{place}", elem_classes="mc-answer")  # here on the page
        gr.on(triggers, answer, inputs, output, concurrency_id="model", concurrency_limit=1,
              api_visibility="private", show_progress="minimal", trigger_mode="always_last")  # fmt: skip

    def head(request: gr.Request):
        words = Words(request.headers.get("accept-language", ""))
        key, line = words.language, words("about_model", model=page.name)
        if page.search:
            index = page.search.index
            line = words("about", pictures=f"{len(index):,}", index=index.folder.name, model=page.name)
        return f"<h1>{words('title')}</h1>{note(line)}", "\n".join(OBJECTS[key]), key, "\n".join(TEMPLATES[key])

    def in_language(key: str, *texts: str):
        """Returns the templates and classes of a language, except those that the reader has edited."""
        stocks = [{name: "\n".join(lines) for name, lines in stock.items()} for stock in (TEMPLATES, OBJECTS)]
        return [stock[key] if text.strip() in stock.values() else text for text, stock in zip(texts, stocks)]

    def image_field(place: str, label: str = "upload", count: str = "single"):
        field = gr.File(label=say(label), file_count=count, file_types=["image"], height=140, elem_id=f"file-{place}",
                        elem_classes="mc-file")  # fmt: skip
        gr.Markdown(say("limits"), elem_classes="mc-limits")
        return field

    def how_many_and_search():
        with gr.Row(equal_height=True):
            k = gr.Slider(1, MOST, 10, step=1, label=say("k"), scale=3, min_width=200, buttons=[])
            return k, gr.Button(say("search"), variant="primary", scale=1, min_width=120)

    def by_words():
        with gr.Row():
            query = gr.Textbox(label=say("query"), placeholder=say("query_hint"), scale=3, min_width=220, max_lines=1,
                               autofocus=True)  # fmt: skip
            minus = gr.Textbox(label=say("minus"), placeholder=say("minus_hint"), scale=1, min_width=160, max_lines=1)
        k, button = how_many_and_search()
        on([query.submit, minus.submit, button.click], page.words, [query, minus, k], "words")

    def by_image():
        image = image_field("picture")
        beside = gr.Textbox(label=say("beside"), placeholder=say("beside_hint"), max_lines=1)
        k, button = how_many_and_search()
        on([image.upload, beside.submit, button.click], page.image, [image, beside, k], "picture")

    def no_index():
        gr.Markdown(say("no_index"))
        command = f"python -m miniclip search index photos --model {shlex.quote(page.name)} --index products.mc"
        gr.HTML(f'<pre class="mc-code">{escape(command)}\npython -m miniclip page --index products.mc</pre>')

    with gr.Blocks(title="MiniCLIP", analytics_enabled=False) as blocks:
        top = gr.HTML(elem_classes="mc-head")
        with gr.Tabs():
            with gr.Tab(say("words")):
                by_words() if page.search else no_index()
            with gr.Tab(say("picture")):
                by_image() if page.search else no_index()
            with gr.Tab(say("classes")):
                with gr.Row():
                    with gr.Column(min_width=280):
                        image = image_field("classes")
                        names = gr.Textbox(label=say("names"), info=say("names_hint"), lines=6, max_lines=12)
                        language = gr.Radio([(text, key) for key, text in LANGUAGES.items()], label=say("language"))
                        with gr.Accordion(say("templates"), open=False):
                            sentences = gr.Textbox(label=say("templates"), lines=5, max_lines=12, show_label=False,
                                                   elem_id="sentences")  # fmt: skip
                        button = gr.Button(say("classify"), variant="primary")
                    with gr.Column(min_width=280):
                        on([image.upload, button.click], page.classes, [image, names, sentences], "classes")
                language.input(in_language, [language, sentences, names], [sentences, names], api_visibility="private")
            with gr.Tab(say("heat")):
                with gr.Row():
                    with gr.Column(min_width=280):
                        images = image_field("heat", "pictures", "multiple")
                    with gr.Column(min_width=280):
                        captions = gr.Textbox(label=say("captions"), placeholder=say("captions_hint"), lines=6,
                                              max_lines=16, elem_id="captions")  # fmt: skip
                button = gr.Button(say("compare"), variant="primary")
                on([button.click], page.heat, [images, captions], "heat")
            if page.captioner:
                with gr.Tab(say("write")), gr.Row():
                    with gr.Column(min_width=280):
                        image = image_field("write")
                        # Without an index it is not there, and stays empty.
                        named = gr.Textbox(label=say("in_index"), placeholder=say("in_index_hint"), max_lines=1,
                                           visible=bool(page.search))  # fmt: skip
                        button = gr.Button(say("write_it"), variant="primary")
                    with gr.Column(min_width=280):
                        on([image.upload, named.submit, button.click], page.caption, [image, named], "write")
        blocks.load(head, None, [top, names, language, sentences], api_visibility="private", show_progress="hidden")
    return blocks.queue(max_size=64), say


def serve(page: Page, host: str, sock: socket.socket):
    import fastapi
    import gradio as gr
    import uvicorn
    from gradio import processing_utils

    async def fetch(url, cache_dir):
        raise InputError(f"{url} is not an uploaded image")

    processing_utils.async_ssrf_protected_download = fetch  # a request may name an address instead of a file
    blocks, say = build(page)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing to download
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", **fonts)
    theme.set(button_primary_background_fill="*primary_600", button_primary_background_fill_dark="*primary_600",
              block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
              input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400")  # fmt: skip
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None), blocks, "/", footer_links=[], run_history=False, ssr_mode=False, i18n=say,
        max_file_size=int(page.megabytes * (1 << 20)), theme=theme, css=CSS, js=SCRIPT, show_error=False,
        enable_monitoring=False,
    )  # fmt: skip
    blocks.has_launched = True  # otherwise gradio accepts any file as an uploaded one
    here, port = is_here(host), sock.getsockname()[1]
    uploads = os.environ["GRADIO_TEMP_DIR"]
    threading.Thread(target=keep_sweeping, args=(uploads,), daemon=True).start()
    guard = Guard(app, here, int((IMAGES * page.megabytes + 1) * (1 << 20)), uploads)
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}   (Ctrl-C stops it)", flush=True)
    if not here:
        print("warning: everyone who can reach this machine can search and see the results", flush=True)
    server = uvicorn.Server(uvicorn.Config(guard, log_level="warning", timeout_graceful_shutdown=1))
    server.run([sock])  # until a signal, which it raises again
    if not server.started:
        raise InputError("the page did not start, for the reason above")
