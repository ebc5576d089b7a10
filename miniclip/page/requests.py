"""What may be asked of the page's server, and whom does it ask? Nothing but what the page needs, and nobody.

Gradio can do much that the page has no use for: it gives out files, fetches addresses that a request names, answers
programs. Each of these has an address, and only the page's own pass here.
"""

import ipaddress
import re
import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from miniclip.page.labels import Words
from miniclip.utils.errors import InputError

# What the page itself asks for. Gradio has fifty more, among them some that read files and fetch addresses for others.
PUBLIC = re.compile(
    r"GET /|GET /(theme\.css|favicon\.ico|manifest\.json)|GET /(assets|static|svelte)/.+"
    r"|GET /gradio_api/(queue/data|heartbeat/\w+|upload_progress|startup-events)"
    r"|POST /gradio_api/(queue/join|upload|cancel|reset)"
)
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self'"
    " 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none';"
    " frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

HOUR, OFTEN = 3600, 600  # seconds after which an upload is deleted, and after which it is looked whether it is time


class Guard:
    """Lets through what the page asks for, and nothing else: no address but PUBLIC's, no other site's pages, no name
    for this machine but its own, no body above the limits, no upload for which there is no room. Takes the tags that
    name other hosts out of the page."""

    def __init__(self, app, here: bool, most: int, uploads: str):
        """`here`: whether this machine alone can ask; `most`: bytes of an upload, which may be several files, and which
        go to the folder `uploads`."""
        self.app, self.here, self.most, self.uploads = app, here, {"/gradio_api/upload": most}, uploads
        self.name = socket.gethostname().split(".")[0].lower()

    def knows(self, host: str) -> bool:
        """Whether a name is one of this machine's: another site could give it one of its own."""
        name = re.sub(r":\d+$", "", host).strip("[]").rstrip(".").lower()
        return is_here(name) or not self.here and (is_number(name) or name.split(".")[0] == self.name)

    def refused(self, scope, headers: dict) -> int:
        """The status by which a request is refused, or 0."""
        host = headers.get("host", "")
        if not self.knows(host):
            return 421
        if headers.get("origin", f"http://{host}").partition("://")[2] != host:  # another site's page asks
            return 403
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if not PUBLIC.fullmatch(f"{method} {scope['path']}"):
            return 404
        if "transfer-encoding" in headers or method == "POST" and not headers.get("content-length", "").isdecimal():
            return 411
        size, most = int(headers.get("content-length", 0)), self.most.get(scope["path"], 1_000_000)
        if size > most:
            return 413
        return 507 if scope["path"] in self.most and not has_room(self.uploads, 2 * size, 4 * most) else 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        status = self.refused(scope, headers) if scope["type"] == "http" else None
        if status is None:  # a web socket, of which the page has none
            return await send({"type": "websocket.close"})
        own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        words = Words(headers.get("accept-language", ""))
        if status:  # what is said is shown where the picture was dropped
            own.append((b"content-type", b"text/plain; charset=utf-8"))
            most = self.most["/gradio_api/upload"] >> 20
            said = words({413: "too_much", 507: "no_room"}.get(status, "refused"), most=most)
            await send({"type": "http.response.start", "status": status, "headers": own})
            return await send({"type": "http.response.body", "body": said.encode()})
        # What a proxy would say, and nobody need believe.
        scope = {**scope, "headers": [pair for pair in scope["headers"] if not pair[0].startswith(b"x-forwarded")]}
        page, start, body = scope["path"] == "/" and scope["method"] == "GET", {}, b""
        if page:  # as it is, to be changed
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0].lower() != b"accept-encoding"]}

        async def sending(message):
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = {**message, "headers": [*message["headers"], *own]}
                return None if page else await send(start)
            if not page:
                return await send(message)
            body += message.get("body", b"")
            if not message.get("more_body"):
                text = own_page(body.decode(), words.language).encode()
                kept = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
                await send({**start, "headers": [*kept, (b"content-length", str(len(text)).encode())]})
                await send({"type": "http.response.body", "body": text})

        await self.app(scope, receive, sending)


def own_page(html: str, language: str) -> str:
    """Gradio's page in the reader's language, without what it tells other sites of itself, and without its examples of
    requests, which name other hosts. Its script looks for a language by itself, and has others than the page."""
    html = re.sub(r'<meta\s+(property="og:|name="twitter:)[^>]*>', "", html)
    html = re.sub(r'https://(github\.com|raw\.githubusercontent\.com)/gradio-app/[^"]*', "", html)
    code = "zh-CN" if language == "zh" else "en"
    told = f'{{get: () => "{code}"}}), Object.defineProperty(navigator, "languages", {{get: () => ["{code}"]}})'
    script = f'<script>Object.defineProperty(navigator, "language", {told}</script>'
    return html.replace('lang="en"', f'lang="{code}"', 1).replace("<head>", f"<head>{script}", 1)


def has_room(folder: str, size: int, most: int) -> bool:
    """Whether so many bytes more fit on the disk of a folder, and it has not more than `most` then."""
    there = 0
    for path in Path(folder).rglob("*"):
        with suppress(OSError):  # it may be deleted just now
            there += path.stat().st_size if path.is_file() else 0
    return there <= most and shutil.disk_usage(folder).free > size + (1 << 20)


def sweep(folder: str, seconds: float = HOUR):
    """Deletes what has lain in a folder for longer: uploads, and what is left of those that were broken off."""
    for path in Path(folder).rglob("*"):
        with suppress(OSError):  # gradio deletes too
            if path.is_file() and time.time() - path.stat().st_mtime > seconds:
                path.unlink()


def keep_sweeping(folder: str):
    """Does so as long as the process lives."""

    def work():
        while True:
            time.sleep(OFTEN)
            sweep(folder)

    threading.Thread(target=work, daemon=True).start()


def stay_inside():
    """From here on this process connects to nothing but the machine it runs on, and asks for no name."""

    def watch(event, values):
        if event in ("socket.connect", "socket.sendto") and isinstance(values[1], tuple):
            address = values[1][0]
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            address = values[0] or "localhost"
        else:
            return
        address = address.decode() if isinstance(address, bytes) else str(address)
        if not is_here(address) and not (event == "socket.getaddrinfo" and is_number(address)):
            raise PermissionError(f"the page connects to nothing outside: {address}")

    sys.addaudithook(watch)


def listen(host: str, port: int) -> socket.socket:
    """Raises InputError where that cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"port {port} of {host} cannot be had ({why}): name another by --port, or --host") from None


def is_here(host: str) -> bool:
    """Whether a host is this machine alone."""
    return host == "localhost" or is_number(host) and ipaddress.ip_address(host).is_loopback


def is_number(host: str) -> bool:
    """Whether a host is an address rather than a name, which somebody would have to be asked for."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False
