"""The page, in a real Chromium and by bare requests: what is found, what is said, what is refused, whom it calls.

`make test-ui` runs this; elsewhere it is skipped where gradio, playwright or Chromium is not installed.
"""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import miniclip
from miniclip.classify.prompts import OBJECTS, TEMPLATES
from miniclip.classify.zero_shot import build_zero_shot_classifier, zero_shot_classify
from miniclip.datasets.shapes import drawn
from miniclip.inference.caption import caption_images
from miniclip.page.answers import Page, read_classes
from miniclip.page.labels import SAYINGS, Words
from miniclip.page.requests import Guard, has_room, own_page, sweep
from miniclip.towers.tokens import add_tokens
from miniclip.utils.errors import InputError
from tests.conftest import ROOT

MUST = bool(os.environ.get("MINICLIP_UI"))  # make test-ui: what is missing is a failure there
GRADIO = importlib.util.find_spec("gradio") is not None
BROWSER = importlib.util.find_spec("playwright") is not None and shutil.which("chromium") is not None
needs_gradio = pytest.mark.skipif(not (GRADIO or MUST), reason="gradio is not installed: make test-ui")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
HOSTILE = "<img src=x onerror=alert(1)>${1+1}{{value}}.png"
SECRET = "a secret that nobody may see"
# Notes each host that the server's process wants to connect to, or to know the address of, but for its own machine.
WATCH = """
import os, sys
log = os.open(os.environ["MINICLIP_TEST_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def watch(event, values):
    host = None
    if event in ("socket.connect", "socket.sendto") and isinstance(values[1], tuple):
        host = values[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = values[0]
    if host is not None and host not in ("127.0.0.1", "localhost", "::1"):
        os.write(log, f"{event} {host}\\n".encode())
sys.addaudithook(watch)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


PROXIES = {"ALL_PROXY": "socks5://127.0.0.1:9", "https_proxy": "nonsense://[", "no_proxy": "[::1", "FTP_PROXY": ":"}


def command(folder, *words):
    """The command as a process; what it writes goes to a file, what it wants from outside to another. It is started as
    a script's background job, amid settings that concern connections to elsewhere."""
    (folder / "watch").mkdir(exist_ok=True)
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    (folder / "temporary").mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "watch"), "TMPDIR": f"{folder}/temporary"}
    env |= {"MINICLIP_TEST_LOG": str(folder / "connections.txt"), **PROXIES, "SSL_CERT_FILE": "missing.pem",
            "GRADIO_ALLOWED_PATHS": "/", "GRADIO_ROOT_PATH": "/elsewhere", "GRADIO_DEBUG": "1"}  # fmt: skip
    with open(folder / "output.txt", "wb") as output:
        words = [sys.executable, "-m", "miniclip", "page", *map(str, words)]
        ignored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
        return subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output, env=env, **ignored)


def ready(process, folder, seconds=600) -> str:
    """Waits for the line with the address; gives all that was written."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if "http://" in (text := (folder / "output.txt").read_text()):
            return text
        time.sleep(0.05)
    raise AssertionError((folder / "output.txt").read_text()[-3000:])


def stop(process, number=signal.SIGINT) -> int:
    process.send_signal(number)
    try:
        return process.wait(120)
    finally:
        process.kill()


def tiny(folder):
    """A model of random weights, the same each time."""
    config = miniclip.MiniClipConfig.from_dict({
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    })  # fmt: skip
    torch.manual_seed(0)
    miniclip.MiniClip(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page of a small index: twelve scenes of shapes, a copy, a hostile name; beside them what is not in it."""
    if not (GRADIO or MUST):
        pytest.skip("gradio is not installed: make test-ui")
    folder = tmp_path_factory.mktemp("page")
    pictures, outside = folder / "pictures", folder / "outside"
    pictures.mkdir(), outside.mkdir()
    for number, (_, image, _) in enumerate(drawn("eval", 13)):
        image.save(pictures / (HOSTILE if number == 12 else f"scene_{number:02}.png"))
    shutil.copy(pictures / "scene_00.png", pictures / "twin.png")
    search = miniclip.ImageSearch.build(pictures, folder / "products.mc", tiny(folder / "model"))
    shutil.copy(pictures / "scene_01.png", pictures / "later.png")  # not in the index
    (pictures / "notes.txt").write_text(SECRET)
    Image.new("RGB", (64, 64), "red").save(outside / "secret.png")
    (outside / "secret.txt").write_text(SECRET)
    (pictures / "scene_11.png").unlink()
    (pictures / "scene_11.png").symlink_to(outside / "secret.png")
    port = free_port()
    process = command(
        folder, "--index", folder / "products.mc", "--port", port, "--max_upload_mb", 2, "--device", "cpu"
    )
    try:
        said = ready(process, folder)
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{port}", port=port, folder=folder, pictures=pictures, outside=outside, said=said,
            search=search, name=lambda saying, **values: Words("en")(saying, **values),
        )  # fmt: skip
        with socket.create_connection(("127.0.0.1", port), 20) as sock:  # an upload that is under way at the end
            head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 900000\r\n"
            part = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            sock.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n{part}".encode() + bytes(400_000))
            code = stop(process)
    finally:
        process.kill()
    output = (folder / "output.txt").read_text()
    assert code == 128 + signal.SIGINT and output.splitlines()[-1].startswith("miniclip page:"), output[-3000:]
    assert not list((folder / "temporary").iterdir()), "its temporary folder is to go with it"
    assert (folder / "connections.txt").read_text() == "", "it is to connect to nothing outside, nor to try"


def request(site, method, path, body=None, **headers):
    """Status and body."""
    connection = HTTPConnection("127.0.0.1", site.port, timeout=300)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode("utf-8", "replace")


def config(site) -> dict:
    """What Gradio's own page knows of fields and of what they call."""
    page = request(site, "GET", "/")[1]
    return json.JSONDecoder().raw_decode(page[page.index("window.gradio_config = ") + 23 :])[0]


def call(site, kinds: list[str], data: list) -> tuple[dict, str]:
    """Calls what answers fields of these kinds, as the page's own script does: what came last, and all of it."""
    known = config(site)
    kind = {component["id"]: component["type"] for component in known["components"]}
    number = next(d["id"] for d in known["dependencies"] if [kind[i] for i in d["inputs"]] == kinds)
    session = f"s{time.monotonic_ns()}"
    body = json.dumps({"data": data, "fn_index": number, "session_hash": session})
    status, text = request(site, "POST", "/gradio_api/queue/join", body, **{"content-type": "application/json"})
    if status != 200:
        return {"success": False, "status": status}, text
    text = request(site, "GET", f"/gradio_api/queue/data?session_hash={session}")[1]
    messages = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
    return next(message for message in reversed(messages) if message["msg"] == "process_completed"), text


PICTURE, WORDS = ["file", "textbox", "slider"], ["textbox", "textbox", "slider"]


def send(site, name: str, data: bytes) -> tuple[int, str]:
    """Sends a file as the page does."""
    body = (
        f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n--x--"
    )
    return request(site, "POST", "/gradio_api/upload", body, **{"content-type": "multipart/form-data; boundary=x"})


def upload(site, name: str, data: bytes) -> dict:
    """Sends a file; gives what stands for it in a call."""
    status, text = send(site, name, data)
    assert status == 200, text
    return {"path": json.loads(text)[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def test_help_answers_at_once_and_what_is_wrong_is_said(tmp_path):
    start = [sys.executable, "-X", "importtime", "-m", "miniclip", "page"]
    done = subprocess.run([*start, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "--max_upload_mb" in done.stdout
    assert not re.search(r"\| +(torch|numpy|gradio|fastapi)$", done.stderr, re.MULTILINE)
    done = subprocess.run([*start], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "give --index, --model or both" in done.stderr
    (tmp_path / "gradio.py").write_text("raise ImportError('No module named gradio')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-m", "miniclip", "page", "--index", tmp_path, "--port", str(free_port())]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 1
    assert done.stderr == "miniclip page: No module named gradio: pip install -r requirements-ui.txt\n"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words[-1] = str(taken.getsockname()[1])
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, env=env)
    assert f"cannot listen on port {words[-1]} of 127.0.0.1" in done.stderr and "Traceback" not in done.stderr
    for size in ("0", "-1", "inf", "nan"):
        done = subprocess.run([*words, "--max_upload_mb", size], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 2 and "--max_upload_mb must be above 0" in done.stderr


def test_both_languages_say_the_same_things():
    for key, (english, chinese) in SAYINGS.items():
        fields = [sorted(re.findall(r"\{[^}]*\}", text)) for text in (english, chinese)]
        assert fields[0] == fields[1] and re.search("[\u4e00-\u9fff]", chinese), key
    chosen = [Words(accepted).language for accepted in ("zh-CN,zh;q=0.9,en", "zh", "en-US,zh", "fr", "")]
    assert chosen == ["zh", "zh", "en", "en", "en"]
    assert own_page('<html lang="en"><meta name="twitter:x" content="y">', "zh") == '<html lang="zh-CN">'


def test_its_process_connects_to_nothing_outside():
    program = """
import socket
from miniclip.page.requests import stay_inside
with socket.create_server(("127.0.0.1", 0)) as server:
    stay_inside()
    socket.create_connection(server.getsockname()).close()
    socket.getaddrinfo("localhost", 80)
    for ask in (lambda: socket.create_connection(("192.0.2.1", 80), 1), lambda: socket.getaddrinfo("example.com", 80),
                lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
                lambda: socket.gethostbyname("example.com")):
        try:
            ask()
        except PermissionError as error:
            print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.count("the page connects to nothing outside") == 4, done.stderr


@needs_gradio
def test_it_is_this_machines_alone_and_names_no_other_host(site):
    assert site.said == f"{site.url}   (Ctrl-C stops it)\n"
    assert (site.folder / "connections.txt").read_text() == ""
    for path in ("/", "/theme.css", "/manifest.json"):
        status, text = request(site, "GET", path)
        assert status == 200
        hosts = set(re.findall(r"https?://([^/\"'\s)>]+)", text)) - {f"127.0.0.1:{site.port}", "www.w3.org"}
        assert not hosts, (path, hosts)  # w3.org: the name of SVG in a data: address, which nothing fetches
    assert config(site)["analytics_enabled"] is False
    assert request(site, "GET", "/", Host="evil.example")[0] == 421
    assert request(site, "GET", "/", Host=f"localhost:{site.port}")[0] == 200
    body = '{"data": []}'
    assert request(site, "POST", "/gradio_api/queue/join", body, Origin="http://evil.example")[0] == 403
    assert request(site, "POST", "/gradio_api/queue/join", "x" * 1_100_000)[0] == 413
    assert request(site, "POST", "/gradio_api/upload", iter([b"x"]))[0] == 411  # whose length is not said
    with socket.create_connection(("127.0.0.1", site.port), 20) as sock:  # said, and then not kept to
        head = f"POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost:{site.port}\r\nContent-Length: 5\r\n"
        sock.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n".encode())
        assert re.match(rb"HTTP/1.1 (400|411) ", sock.recv(100))
    connection = HTTPConnection("127.0.0.1", site.port, timeout=300)
    connection.request("GET", "/", headers={"X-Forwarded-Host": "evil.example"})
    answer = connection.getresponse()
    assert "default-src 'self'" in answer.headers["content-security-policy"] and b"evil" not in answer.read()
    assert (answer.headers["x-content-type-options"], answer.headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert send(site, "large.png", bytes(2_100_000))[0] == 413 and send(site, "many.png", bytes(36_000_000))[0] == 413
    assert not [file for file in (site.folder / "temporary").rglob("*") if file.is_file() and file.stat().st_size > 1e6]


def test_names_of_this_machine_and_of_others():
    alone, shared = Guard(None, True, 1, "."), Guard(None, False, 1, ".")
    for host in ("127.0.0.1:7860", "127.0.0.2", "LOCALHOST:1", "localhost.", "[::1]:7860"):
        assert alone.knows(host) and shared.knows(host), host
    for host in ("192.168.1.5:7860", f"{socket.gethostname()}:7860", f"{socket.gethostname()}.lan"):
        assert shared.knows(host) and not alone.knows(host), host
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example"):
        assert not alone.knows(host) and not shared.knows(host), host


def test_uploads_go_after_an_hour_and_have_room(tmp_path):
    (tmp_path / "a").mkdir()
    for name, age in (("a/old.png", 4000), ("tmpbroken", 4000), ("new.png", 10)):
        (tmp_path / name).write_bytes(b"123")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    sweep(str(tmp_path))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["new.png"]
    assert has_room(str(tmp_path), 1, 3) and not has_room(str(tmp_path), 1, 2)
    assert not has_room(str(tmp_path), shutil.disk_usage(tmp_path).total, 3)


def test_the_command_shuts_its_process_in(tmp_path):
    program = """
import socket, miniclip.commands.page as command, miniclip.page.server as server
command.open_page = lambda options: None
server.serve = lambda *about: socket.create_connection(("192.0.2.1", 9), 0.1)
try:
    command.main(["--model", "x", "--port", "0"])
except PermissionError as error:
    print(error)
"""
    pytest.importorskip("gradio", reason="gradio is not installed: make test-ui")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout == "the page connects to nothing outside: 192.0.2.1\n", done.stderr


def test_no_more_is_taken_than_is_said():
    say = Words()
    with pytest.raises(InputError, match="201 are too many: 200 at most"):
        read_classes(say, ",".join(map(str, range(201))))
    page = Page(None, (None, None, None), "", 20)
    sentences, captions, unwanted = "{}\n" * 33, "a\n" * 33, "x," * 33
    for ask in (lambda: page.classes(say, None, "a, b", sentences), lambda: page.heat(say, None, captions),
                lambda: page.words(say, "a", unwanted, 3)):  # fmt: skip
        with pytest.raises(InputError, match="33 are too many: 32 at most"):
            ask()
    with pytest.raises(InputError, match="17 are too many: 16 at most"):
        page.heat(say, ["x"] * 17, "a")


@needs_gradio
def test_words_are_shown_where_late_interaction_sees_them(tmp_path):
    loaded = miniclip.load(tiny(tmp_path / "model"))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    page, say = Page(None, loaded, "model", 20), Words("en")
    assert "mc-words" not in page.heat(say, [str(tmp_path / "a.png")], "a <b>dog</b>")
    add_tokens(loaded[0])
    shown = page.heat(say, [str(tmp_path / "a.png")], "a <b>dog</b>")
    assert shown.count("<li>") == 2 and shown.count("data:image/jpeg") == 3  # the picture, and one for each word
    assert "where “&lt;b&gt;dog&lt;/b&gt;” is seen" in shown and "<b>dog" not in shown


@needs_gradio
def test_a_model_with_a_decoder_writes_captions(tmp_path, chromium):
    """Of a picture that is sent, and of one of the index: what `miniclip caption` writes."""
    words = {"vocab_size": 49408, "context_length": 16, "width": 32, "heads": 2, "layers": 1}
    tokens = {"output_tokens": True}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "attentional_pool": True}
    vision |= tokens | {"attn_pooler_heads": 2, "attn_pooler_queries": 5}
    text = words | tokens | {"embed_cls": True}
    torch.manual_seed(0)
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "multimodal_cfg": words}
    model = miniclip.MiniClip(miniclip.MiniClipConfig.from_dict(config))
    for p in model.text_decoder.parameters():
        p.data *= 3  # so that what it writes differs
    model.save_pretrained(tmp_path / "model")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, (_, image, _) in enumerate(drawn("eval", 3)):
        image.save(pictures / f"scene_{number}.png")
    miniclip.ImageSearch.build(pictures, tmp_path / "products.mc", tmp_path / "model")
    (tmp_path / "new.png").write_bytes((pictures / "scene_2.png").read_bytes())
    (pictures / "scene_2.png").unlink()
    loaded = miniclip.load(tmp_path / "model")
    mine, its = caption_images(*loaded, [tmp_path / "new.png", pictures / "scene_1.png"])
    assert mine != its
    port = free_port()
    process = command(tmp_path, "--index", tmp_path / "products.mc", "--port", port)
    try:
        ready(process, tmp_path)
        page = chromium.new_page(locale="en-US")
        page.goto(f"http://127.0.0.1:{port}")
        page.locator(".mc-head h1").wait_for()
        page.get_by_role("tab", name="Caption").click()
        write, answer = page.get_by_role("button", name="Write a caption"), page.locator("#found-write")
        write.click()
        assert problem(page, "write") == SAYINGS["no_picture"][0]
        page.locator("#file-write input[type=file]").set_input_files(tmp_path / "new.png")
        answer.get_by_role("status").filter(has_text=mine).wait_for()
        name = page.get_by_label("Or a picture of the index")
        for text, said in (("scene_1.png", "There are two pictures"), ("../new.png", "“../new.png” is not in the"),
                           ("scene_2.png", "The picture cannot be shown.")):  # fmt: skip
            name.fill(text)
            name.press("Enter")
            answer.get_by_role("alert").filter(has_text=said).wait_for()
            if page.locator("#file-write").get_by_label("Clear").count():
                page.locator("#file-write").get_by_label("Clear").click()
        name.fill("scene_1.png")
        write.click()
        answer.get_by_role("status").filter(has_text=its).wait_for()
        assert answer.locator("img").get_attribute("alt") == "scene_1.png"
        page.set_viewport_size({"width": 375, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= 376
        page.close()
    finally:
        stop(process)
    assert (tmp_path / "connections.txt").read_text() == ""


def test_no_file_is_served_at_any_address(site):
    shown = upload(site, "mine.png", (site.pictures / "scene_02.png").read_bytes())["path"]
    files = ["/etc/passwd", "../../../../../../etc/passwd", "README.md", "./README.md", f"{ROOT}/README.md", shown]
    files += [site.pictures / name for name in ("later.png", "notes.txt", "scene_11.png", "scene_00.png")]
    files += [site.outside / "secret.txt", site.folder / "model" / "config.json"]
    for file in files:
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "//gradio_api/file=", "/gradio_api%2Ffile="):
            assert request(site, "GET", f"{route}{file}") == (404, SAYINGS["refused"][0]), (route, file)
        for route in ("/assets/", "/static/", "/svelte/", "/"):
            for up in ("", "../" * 12, "..%2f" * 12):
                status, text = request(site, "GET", f"{route}{up}{file}")
                assert status in (403, 404) and SECRET not in text and "root:" not in text, (route, up, file)
    for route in ("/gradio_api/file=http://127.0.0.1/", "/gradio_api/proxy=http://127.0.0.1/", "/docs", "/openapi.json",
                  "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/runs", "/monitoring", "/config",
                  "/gradio_api/vibe-code/", "/gradio_api/stream/a/b/c/playlist.m3u8"):  # fmt: skip
        assert request(site, "GET", route)[0] == 404, route
    for route in ("/gradio_api/run/predict", "/gradio_api/call/predict", "/gradio_api/component_server", "/login"):
        assert request(site, "POST", route, "{}")[0] == 404, route


@needs_gradio
def test_a_call_cannot_name_a_file_that_was_not_sent(site):
    sent = upload(site, "mine.png", (site.pictures / "scene_02.png").read_bytes())
    done, text = call(site, PICTURE, [sent, "", 3])
    assert done["success"] and "scene_02.png" in text and "1.0000" in text
    inside = os.path.dirname(os.path.dirname(sent["path"]))
    paths = ["/etc/passwd", "README.md", f"{ROOT}/docs/demo.png", site.outside / "secret.png", inside]
    paths += [site.pictures / "scene_00.png", site.pictures / "later.png", f"{inside}/../../../outside/secret.png"]
    for path in [*map(str, paths), "http://example.com/a.png", f"{site.url}/theme.css"]:
        for more in ({}, {"url": path}, {"orig_name": "a.png", "mime_type": "image/png"}, {"is_stream": True}):
            done, text = call(site, PICTURE, [{**sent, "path": path, **more}, "", 3])
            assert not done["success"] or "mc-problem" in text, (path, more)
            assert not re.search(f"data:image|root:|{SECRET}|<li>", text), (path, more)
    for query in ("/etc/passwd", str(site.outside / "secret.txt")):  # nor do texts that are names of files
        assert SECRET not in call(site, WORDS, [query, query, 3])[1]
    done, text = call(site, ["file", "textbox", "textbox"], [sent, str(site.outside / "secret.txt"), "a {}"])
    assert SECRET not in text and "at least two classes" in text


@needs_gradio
def test_odd_texts_are_answered(site):
    """Half of an emoji, which would break the stream of answers, and no text at all."""
    file = upload(site, "a.png", (site.pictures / "scene_00.png").read_bytes())
    for kinds, data in ((WORDS, ["a dog \ud83d", None, 3]), (PICTURE, [file, None, 3]), (PICTURE, [file, "\ude00", 3])):
        answer, _ = call(site, kinds, data)
        assert "3 of 13 pictures" in answer["output"]["data"][0] and "mc-problem" not in str(answer)


@needs_gradio
def test_the_pictures_shown_are_those_of_the_index(site):
    done, text = call(site, WORDS, ["a red circle", "", 100])
    html = done["output"]["data"][0]
    assert html.count("<li>") == 13 and html.count("data:image/jpeg;base64,") == 12
    assert "later.png" not in html and "notes" not in html and str(site.folder) not in html
    gone = next(cell for cell in html.split("<li>") if "scene_11.png" in cell)
    assert "data:image" not in gone and "The picture cannot be shown" in gone
    assert "same content: twin.png" in html and "<img src=x" not in html and "&lt;img src=x" in html
    for k in (0, 101, -1, None, "many", 1e9):
        done, text = call(site, WORDS, ["a red circle", "", k])
        assert not done["success"] and "<li>" not in text, k
    assert "is too long" in call(site, WORDS, ["x" * 20_001, "", 3])[1]
    for template in ("{:>9999999999}", "{0.__class__}", "{} {}", "none", "{"):
        sent = upload(site, "mine.png", (site.pictures / "scene_02.png").read_bytes())
        text = call(site, ["file", "textbox", "textbox"], [sent, "a, b", template])[1]
        assert "must have exactly one {}, for the class" in text, template


@pytest.fixture(scope="module")
def chromium():
    if not (BROWSER or MUST):
        pytest.skip("playwright or Chromium is not installed: make test-ui")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, site):
    """Opens the page in a fresh profile; at the end all that it asked for must have been of this page's own server."""
    contexts, asked, faults = [], [], []

    def visit(locale="en-US", width=1200, **how):
        context = chromium.new_context(locale=locale, viewport={"width": width, "height": 900}, **how)
        contexts.append(context)
        context.set_default_timeout(20_000)
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(site.url)
        page.locator(".mc-head h1").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    outside = [url for url in asked if not url.startswith((site.url + "/", "data:", "blob:"))]
    assert asked and not outside and not faults, (outside, faults)


def cards(page, place: str) -> list[tuple[str, str]]:
    """What is shown: path and cosine, in order."""
    found = page.locator(f"#found-{place} .mc-cards li")
    found.first.wait_for()
    texts = "[x.querySelector('b').nextSibling.data.trim(), x.querySelector('small').innerText]"
    return [tuple(texts) for texts in found.evaluate_all(f"all => all.map(x => {texts})")]


def expected(found) -> list[tuple[str, str]]:
    return [(one.path, f"{one.score:.4f}") for one in found]


def problem(page, place: str) -> str:
    return page.locator(f"#found-{place} [role=alert]").inner_text()


def test_words_find_the_right_pictures(visit, site):
    page = visit()
    page.get_by_label("What should be in the pictures?").fill("two small red circles")
    page.get_by_label("Not wanted").fill("blue, stars")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("status").filter(has_text="two small red circles − blue, stars").wait_for()
    wanted = site.search.query("two small red circles", 10, minus=["blue", "stars"])
    assert cards(page, "words") == expected(wanted)
    alts = page.locator("#found-words .mc-cards img").evaluate_all("all => all.map(x => [x.alt, x.naturalWidth])")
    shown = [one.path for one in wanted if one.path != "scene_11.png"]
    assert alts == [[path, 64] for path in shown], "each picture is there, and says its name"
    for path in shown[:3]:  # and it is that picture: its middle is what it should be
        pixels = page.locator(f'#found-words img[alt="{path}"]').first.evaluate("""x => {
            const c = document.createElement('canvas'); c.width = c.height = 64; const d = c.getContext('2d');
            d.drawImage(x, 0, 0); return [...d.getImageData(0, 0, 64, 64).data]}""")
        there = np.asarray(Image.open(site.pictures / path).convert("RGB"), dtype=float)
        levels = np.array(pixels, dtype=float).reshape(64, 64, 4)[:, :, :3]
        assert np.abs(levels - there).mean() < 6, path


def test_a_search_by_the_keyboard_alone(visit, site):
    page = visit()
    page.evaluate("document.activeElement.blur()")

    def tab_to(what: str, most=30):
        for _ in range(most):
            page.keyboard.press("Tab")
            at = page.evaluate("""(x => x == document.body ? "" : [x.innerText, x.ariaLabel,
                x.labels?.[0]?.innerText].join(" "))(document.activeElement)""")
            if what in at:
                style = page.evaluate(
                    "(x => [x.outlineStyle, x.outlineWidth])(getComputedStyle(document.activeElement))"
                )
                assert style == ["solid", "3px"], "where one is must be seen"
                return
        raise AssertionError(f"{what} is not reached")

    tab_to("What should be in the pictures?")
    page.keyboard.type("a green triangle")
    page.keyboard.press("Enter")
    page.get_by_role("status").filter(has_text="a green triangle").wait_for()
    assert cards(page, "words") == expected(site.search.query("a green triangle", 10))
    tab_to("How many")
    page.keyboard.press("Control+a")
    page.keyboard.type("3")
    tab_to("Search")
    page.keyboard.press("Enter")
    page.get_by_role("status").filter(has_text="3 of 13").wait_for()
    page.evaluate("window.scrollTo(0, 0); document.activeElement.blur()")
    tab_to("By words", 60)
    for key, tab in (("ArrowLeft", "Heat map"), ("ArrowRight", "By words"), ("ArrowRight", "By picture")):
        page.keyboard.press(key)
        page.get_by_role("tab", name=tab, selected=True).wait_for()
    tab_to("What is it?")
    page.keyboard.press("Enter")
    page.get_by_role("tab", name="What is it?", selected=True).wait_for()
    page.keyboard.press("ArrowLeft")
    page.get_by_label("Words beside it").wait_for()
    with page.expect_file_chooser() as chooser:
        tab_to("upload")
        page.keyboard.press("Enter")
    chooser.value.set_files(site.pictures / "scene_05.png")
    assert cards(page, "picture")[0] == ("scene_05.png", "1.0000")


def test_a_picture_finds_itself_and_broken_ones_are_said(visit, site, tmp_path):
    page = visit()
    page.get_by_role("tab", name="By picture").click()
    file = page.locator("#file-picture input[type=file]")
    page.get_by_role("button", name="Search").click()
    assert problem(page, "picture") == site.name("no_picture")
    scene = (site.pictures / "scene_03.png").read_bytes()
    whole = io.BytesIO()
    Image.open(io.BytesIO(scene)).resize((400, 400)).save(whole, "JPEG")
    broken = {
        "text.jpg": (b"I am no picture", "not an image in a supported format"),
        "half.jpg": (whole.getvalue()[: len(whole.getvalue()) // 2], "damaged"),
        "empty.png": (b"", "an empty file"),
        "page.webp": (b"<!doctype html><script>alert(1)</script>", "not an image in a supported format"),
    }
    for name, (data, why) in broken.items():
        (tmp_path / name).write_bytes(data)
        file.set_input_files(tmp_path / name)
        page.locator("#found-picture [role=alert]").filter(has_text=f"{name}: ").wait_for()
        said = problem(page, "picture")
        assert said.startswith("This picture cannot be used.") and why in said, said
        assert "Traceback" not in said and "record" not in said and "/" not in said, "nor where it lies"
        page.locator("#file-picture").get_by_label("Clear").click()
    for side, said in ((8000, "wide.png has 64 million pixels: at most 50"), (14_000, "Shrink it")):
        Image.new("1", (side, side)).save(tmp_path / "wide.png")  # a few kilobytes
        file.set_input_files(tmp_path / "wide.png")
        page.locator("#found-picture [role=alert]").filter(has_text=said).wait_for()
        assert "record" not in problem(page, "picture")
        page.locator("#file-picture").get_by_label("Clear").click()
    (tmp_path / "large.png").write_bytes(scene + bytes(2_200_000))
    (tmp_path / "page.html").write_text("<p>I am no picture")
    for name, said in (("large.png", "exceed the maximum allowed size of 2"), ("page.html", "Invalid file type")):
        file.set_input_files(tmp_path / name)
        page.get_by_text(said).first.wait_for()
        page.locator("#file-picture").get_by_text("Drop File Here").wait_for()
    file.set_input_files(site.pictures / "scene_03.png")
    found = cards(page, "picture")
    assert found[0] == ("scene_03.png", "1.0000")
    assert found == expected(site.search.query(image=site.pictures / "scene_03.png", k=10))
    page.get_by_label("Words beside it").fill("in blue")
    page.keyboard.press("Enter")
    page.get_by_text("+ in blue").wait_for()
    wanted = site.search.query("in blue", 10, image=site.pictures / "scene_03.png")
    assert cards(page, "picture") == expected(wanted)


@pytest.mark.filterwarnings("ignore:the text tower cannot read")
def test_classes_are_edited_and_weighed(visit, site):
    from playwright.sync_api import expect

    page = visit()
    page.get_by_role("tab", name="What is it?").click()
    names = page.get_by_label("Classes", exact=False).first
    assert names.input_value().split("\n") == OBJECTS["en"]
    page.locator("#file-classes input[type=file]").set_input_files(site.pictures / "scene_04.png")
    bars = page.locator("#found-classes .mc-bars li")
    bars.first.wait_for()
    search = site.search

    def shown():
        return {name: share for name, share in (row.split("\n") for row in bars.all_inner_texts())}

    def wanted(names, words, language="en"):
        classifier = build_zero_shot_classifier(search.model, search.tokenizer, words, TEMPLATES[language])
        image = str(site.pictures / "scene_04.png")
        scores = zero_shot_classify(search.model, search.preprocess, classifier, image, names)["scores"]
        return {name: f"{100 * share:.1f}%" for name, share in zip(names, scores)}

    assert shown() == wanted(OBJECTS["en"], OBJECTS["en"])
    shares = [float(share[:-1]) for share in shown().values()]
    assert shares == sorted(shares, reverse=True)
    for text, said in (("", "no_classes"), ("dog", "no_classes"), ("dog\ndog", "twice"), ("dog, =cat", "half")):
        names.fill(text)
        page.get_by_role("button", name="Classify").click()
        values = {"twice": {"name": "dog"}, "half": {"name": "=cat"}}.get(said, {})
        page.locator("#found-classes [role=alert]").filter(has_text=site.name(said, **values)).wait_for()
    names.fill("红=red\n蓝=blue，green")
    page.get_by_role("button", name="Classify").click()
    bars.filter(has_text="蓝").wait_for()
    assert shown() == wanted(["红", "蓝", "green"], ["red", "blue", "green"])
    assert not page.locator(".mc-warning").count()
    names.fill("\n".join(OBJECTS["en"]))
    page.get_by_label("中文").check()
    expect(names).to_have_value("\n".join(OBJECTS["zh"]))  # those not edited follow the language
    page.get_by_role("button", name="Classify").click()
    bars.filter(has_text="自行车").wait_for()
    assert "cannot read this: 猫" in page.locator(".mc-warning").inner_text()
    assert shown().keys() == wanted(OBJECTS["zh"], OBJECTS["zh"], "zh").keys()
    page.get_by_role("button", name="Sentences").click()
    sentences = page.locator("#sentences textarea")
    expect(sentences).to_have_value("\n".join(TEMPLATES["zh"]))  # it is drawn anew when it is opened
    page.wait_for_timeout(500)  # on a busy machine once more, which would undo what is written meanwhile
    sentences.fill("a photo")
    expect(sentences).to_have_value("a photo")
    page.get_by_role("button", name="Classify").click()
    page.locator("#found-classes [role=alert]").filter(has_text="“a photo” must have exactly one {}").wait_for()


def test_the_heat_map_has_the_cosines(visit, site, tmp_path):
    page = visit()
    page.get_by_role("tab", name="Heat map").click()
    captions = ["a red circle", "two <b>blue</b> stars", "nothing"]
    files = [site.pictures / name for name in ("scene_00.png", "scene_06.png", HOSTILE)]
    file = page.locator("#file-heat input[type=file]")
    compare = page.get_by_role("button", name="Compare")
    compare.click()
    page.locator("#found-heat [role=alert]").filter(has_text=site.name("no_captions")).wait_for()
    page.get_by_label("Captions").fill("\n".join(captions))
    file.set_input_files(files)
    page.locator("#file-heat").get_by_text("scene_06").first.wait_for()
    compare.click()
    table = page.locator("#found-heat table")
    table.wait_for()
    assert table.locator("tbody th").all_inner_texts() == captions
    search = site.search
    cosines = miniclip.embed_images(search.model, search.preprocess, files)
    cosines = miniclip.embed_texts(search.model, search.tokenizer, captions) @ cosines.T
    shares = torch.from_numpy(cosines * search.model.logit_scale.exp().item()).softmax(0).tolist()
    cells = [cell.split("\n") for cell in table.locator("tbody td").all_inner_texts()]
    assert cells == [[f"{c:.3f}", f"{p:.0%}"] for row, part in zip(cosines, shares) for c, p in zip(row, part)]
    heats = table.locator("tbody td").evaluate_all("all => all.map(x => x.style.getPropertyValue('--heat'))")
    heats = np.float64(heats)  # of two decimals, so that two may be the highest
    assert heats[cosines.argmax()] == heats.max() and heats[cosines.argmin()] == heats.min()
    assert table.locator("thead img").evaluate_all("all => all.map(x => x.naturalWidth)") == [64, 64, 64]
    page.reload()
    page.get_by_role("tab", name="Heat map").click()
    page.get_by_label("Captions").fill("\n".join(["a"] * 33))
    compare.click()
    page.locator("#found-heat [role=alert]").filter(has_text="33 are too many: 32 at most").wait_for()
    many = []
    for number in range(17):
        many.append(shutil.copy(site.pictures / "scene_00.png", tmp_path / f"p{number}.png"))
    page.get_by_label("Captions").fill("a")
    file.set_input_files(many)
    page.locator("#file-heat").get_by_text("p16").first.wait_for()
    compare.click()
    page.locator("#found-heat [role=alert]").filter(has_text="17 are too many: 16 at most").wait_for()


def test_in_chinese(visit, site):
    page = visit("zh-CN")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert page.get_by_role("tab").all_inner_texts() == [
        SAYINGS[key][1] for key in ("words", "picture", "classes", "heat")
    ]
    page.get_by_role("button", name="搜索").click()
    assert problem(page, "words") == SAYINGS["nothing"][1]
    page.get_by_label("图片里要有什么").fill("红色")
    page.keyboard.press("Enter")
    page.get_by_role("status").filter(has_text="13 张中的 10 张：红色").wait_for()
    assert cards(page, "words") == expected(site.search.query("红色", 10))
    assert "读不懂：红色" in page.locator(".mc-warning").inner_text()
    page.get_by_role("tab", name="图片分类").click()
    assert page.get_by_label("类别", exact=False).first.input_value().split("\n") == OBJECTS["zh"]
    assert page.get_by_label("中文").is_checked()
    for locale in ("zh", "zh-HK", "zh-Hans-CN"):
        other = visit(locale)
        assert other.get_by_role("tab").first.inner_text() == SAYINGS["words"][1], locale
        assert other.evaluate("document.documentElement.lang") == "zh-CN"
    german = visit("de-DE")
    assert german.evaluate("document.documentElement.lang") == "en"
    assert german.get_by_role("tab").first.inner_text() == "By words"
    english = visit("en-US")
    assert english.evaluate("document.documentElement.lang") == "en"
    assert english.get_by_role("tab").first.inner_text() == "By words"
    english.get_by_role("button", name="Search").click()
    assert problem(english, "words") == SAYINGS["nothing"][0]


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_narrow_screen_needs_no_scrolling_sideways(visit, site, locale):
    page = visit(locale, 375)
    say = Words(locale)

    def fits():
        widths = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")
        assert max(widths[:2]) <= widths[2] + 1 == 376

    for saying in ("words", "picture", "classes", "heat"):
        tab = page.get_by_role("tab", name=say(saying))
        tab.click()
        assert tab.get_attribute("aria-selected") == "true"
        if saying == "words":
            page.get_by_label(say("query")).fill("a red circle " * 10)
            page.keyboard.press("Enter")
        elif saying == "heat":
            page.locator("#captions textarea").fill("one\ntwo\n" + "three" * 30)
            page.locator("#file-heat input[type=file]").set_input_files(sorted(site.pictures.glob("scene_0*.png")))
            page.locator("#file-heat").get_by_text("scene_09").first.wait_for()
            page.get_by_role("button", name=say("compare")).click()
        else:
            page.locator(f"#file-{saying} input[type=file]").set_input_files(site.pictures / "scene_03.png")
        page.locator(f"#found-{saying} img").first.wait_for()
        fits()
    box = page.locator(".mc-scroll").evaluate("x => [x.scrollWidth, x.clientWidth]")
    assert box[0] > box[1] <= 375, "the table scrolls in its own box"


def test_two_pages_at_once(visit, site):
    pages = [visit(), visit()]
    texts = ["a red circle", "three large blue stars"]
    for _ in range(2):
        for page, text in zip(pages, texts):
            page.get_by_label("What should be in the pictures?").fill(text)
            page.keyboard.press("Enter")
        for page, text in zip(pages, texts):
            page.get_by_role("status").filter(has_text=text).wait_for()
            assert cards(page, "words") == expected(site.search.query(text, 10))
        texts.reverse()


@needs_gradio
def test_without_an_index_the_tabs_say_how_to_make_one(tmp_path, chromium):
    port = free_port()
    process = command(tmp_path, "--model", tiny(tmp_path / "model"), "--port", port, "--host", "0.0.0.0")
    try:
        assert "warning: everyone who can reach this machine can search" in ready(process, tmp_path)
        page = chromium.new_page(locale="en-US")
        page.goto(f"http://127.0.0.1:{port}")
        page.locator(".mc-head h1").wait_for()  # with it come the classes
        page.get_by_text("There is no index to search.").wait_for()
        assert "python -m miniclip search index photos --model" in page.locator(".mc-code").first.inner_text()
        page.get_by_role("tab", name="What is it?").click()
        _, image, _ = next(drawn("eval", 1))
        image.save(tmp_path / "a.png")
        page.locator("#file-classes input[type=file]").set_input_files(tmp_path / "a.png")
        page.locator(".mc-bars li").first.wait_for()
        page.close()
    finally:
        code = stop(process, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and not list((tmp_path / "temporary").iterdir())
    assert (tmp_path / "connections.txt").read_text() == ""
