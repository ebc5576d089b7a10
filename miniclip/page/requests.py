"""Request filter, upload limits and network isolation of the page's server."""

import ipaddress
import re
import shutil
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from miniclip.page.labels import Words
from miniclip.utils.errors import InputError

# The requests that the page sends. Gradio has fifty more routes, some of which read files and fetch addresses.
PUBLIC = re.compile(
    r"GET /|GET /(theme\.css|favicon\.ico|manifest\.json)|GET /(assets|static|svelte)/.+"
    r"|GET /gradio_api/(queue/data|heartbeat/\w+|upload_progress|startup-events)"
    r"|POST /gradio_api/(queue/join|upload|cancel|reset)"
)
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self'"
    " 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none';"
    " frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
}  # fmt: skip
HOUR, OFTEN = 3600, 600  # seconds after which uploads are deleted, and between checks


class Guard:
    """ASGI middleware that refuses addresses outside PUBLIC, requests from other sites' pages, foreign host names,
    bodies above the limits and uploads without room on the disk, and removes tags that name other hosts. `here`: only
    this machine can connect; `most`: bytes of an upload, which may be several files; `uploads`: their folder."""

    def __init__(self, app, here: bool, most: int, uploads: str):
        self.app, self.here, self.most, self.uploads = app, here, {"/gradio_api/upload": most}, uploads
        self.name = socket.gethostname().split(".")[0].lower()

    def knows(self, host: str) -> bool:
        """Returns whether a host name is this machine's: another site could point a name of its own here."""
        name = re.sub(r":\d+$", "", host).strip("[]").rstrip(".").lower()
        return is_here(name) or not self.here and (is_number(name) or name.split(".")[0] == self.name)

    def refused(self, scope, headers: dict) -> int:
        """Returns the HTTP status for a refused request, or 0."""
        host = headers.get("host", "")
        if not self.knows(host):
            return 421
        if headers.get("origin", f"http://{host}").partition("://")[2] != host:  # from another site's page
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
        if scope["type"] != "http":  # a web socket, which the page does not use
            return await send({"type": "websocket.close"})
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        words = Words(headers.get("accept-language", ""))
        if status := self.refused(scope, headers):  # the text is shown at the upload field
            own.append((b"content-type", b"text/plain; charset=utf-8"))
            most = self.most["/gradio_api/upload"] >> 20
            said = words({413: "too_much", 507: "no_room"}.get(status, "refused"), most=most)
            await send({"type": "http.response.start", "status": status, "headers": own})
            return await send({"type": "http.response.body", "body": said.encode()})
        page, start, body = scope["path"] == "/" and scope["method"] == "GET", {}, b""
        # Anybody can claim to be a proxy. The page itself has to come uncompressed, so that it can be changed.
        dropped = (b"x-forwarded", b"accept-encoding") if page else b"x-forwarded"
        scope = {**scope, "headers": [pair for pair in scope["headers"] if not pair[0].lower().startswith(dropped)]}

        async def sending(message):
            nonlocal start, body
            if message["type"] == "http.response.start":
                message = start = {**message, "headers": [*message["headers"], *own]}
            if not page:
                return await send(message)
            body += message.get("body", b"")
            if message is not start and not message.get("more_body"):
                text = own_page(body.decode(), words.language).encode()
                kept = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
                await send({**start, "headers": [*kept, (b"content-length", str(len(text)).encode())]})
                await send({"type": "http.response.body", "body": text})

        await self.app(scope, receive, sending)


def own_page(html: str, language: str) -> str:
    """Returns Gradio's page in the reader's language, without previews for other sites and links to them. Its script
    detects the language itself and knows more than the two of the page, so the browser's language is overridden."""
    html = re.sub(r'<meta\s+(property="og:|name="twitter:)[^>]*>', "", html)
    html = re.sub(r'https://(github\.com|raw\.githubusercontent\.com)/gradio-app/[^"]*', "", html)
    code = "zh-CN" if language == "zh" else "en"
    getters = f'{{get: () => "{code}"}}), Object.defineProperty(navigator, "languages", {{get: () => ["{code}"]}})'
    script = f'<script>Object.defineProperty(navigator, "language", {getters}</script>'
    return html.replace('lang="en"', f'lang="{code}"', 1).replace("<head>", f"<head>{script}", 1)


def has_room(folder: str, size: int, most: int) -> bool:
    """Returns whether `size` more bytes fit on the disk of a folder that holds at most `most` bytes."""
    there = 0
    for path in Path(folder).rglob("*"):
        with suppress(OSError):  # it may have just been deleted
            there += path.stat().st_size if path.is_file() else 0
    return there <= most and shutil.disk_usage(folder).free > size + (1 << 20)


def sweep(folder: str):
    """Deletes uploads, and remains of interrupted ones, that are older than an hour."""
    for path in Path(folder).rglob("*"):
        with suppress(OSError):  # gradio deletes too
            if path.is_file() and time.time() - path.stat().st_mtime > HOUR:
                path.unlink()


def keep_sweeping(folder: str):
    while True:
        time.sleep(OFTEN)
        sweep(folder)


def stay_inside():
    """Keeps this process from connecting to another machine, and from looking up names, from now on."""

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
    """Opens a server socket. Raises InputError if that is impossible."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"cannot listen on port {port} of {host} ({why}): choose another --port or --host") from None


def is_here(host: str) -> bool:
    """Returns whether a host is this machine itself, reachable from nowhere else."""
    return host == "localhost" or is_number(host) and ipaddress.ip_address(host).is_loopback


def is_number(host: str) -> bool:
    """Returns whether a host is an address and not a name, which would have to be looked up."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False
