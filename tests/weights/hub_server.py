"""A local server that speaks the Hugging Face hub's file protocol, and serves plain files, with faults on demand.

    with HubServer(folder) as hub:                      # folder/org/name/... are the repositories' files
        hub.faults["model.safetensors"] = ["cut"]       # what goes wrong with the next requests for a file

Set HF_ENDPOINT to `hub.url` before huggingface_hub is imported, in a process of its own. `hub.log` lists the requests
as (method, path, the Range header). Plain files are at `hub.url + "/plain/" + name`.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LARGE = (".safetensors", ".bin", ".pt")  # kept by Git LFS: their ETag is the sha256


class HubServer:
    """`gated` and `private` are names of repositories, `token` opens them. `faults` maps a file's name to a list: "cut"
    (the connection breaks in the middle), "stall" (it stays silent there until `stalled` is set), "whole" (Range is
    ignored), "changed" (another content of the same size), a status code, or None for a request without one; each
    request takes one."""

    def __init__(self, folder: Path, token: str = "hf_test"):
        self.folder, self.token = Path(folder), token
        self.gated, self.private, self.faults, self.log = set(), set(), {}, []
        self.status = None  # a status with which everything is refused
        self.digests = {}
        self.stalled = threading.Event()
        self.extra_names = {}  # files that a repository lists and does not have
        hub = self

        class Handler(Answers):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str) -> list[str]:
        folder = self.folder / repo
        found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return sorted(found) + self.extra_names.get(repo, [])

    def commit(self, repo: str) -> str:
        """The commit of a repository's present content."""
        digests = [name + self.digest(self.folder / repo / name, "sha1") for name in self.files(repo)]
        return hashlib.sha1("".join(digests).encode()).hexdigest()

    def digest(self, path: Path, kind: str) -> str:
        """A hash of a file's content, computed again only where it has changed."""
        if not path.is_file():
            return hashlib.new(kind).hexdigest()
        key = path, kind, path.stat().st_mtime_ns, path.stat().st_size
        if key not in self.digests:
            self.digests[key] = hashlib.new(kind, path.read_bytes()).hexdigest()
        return self.digests[key]

    def requests(self, word: str, method: str = "GET") -> list[tuple]:
        """The requests whose path contains a word."""
        return [one for one in self.log if one[0] == method and word in one[1]]


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(send_body=False)

    def do_GET(self):
        self.answer(send_body=True)

    def answer(self, send_body: bool):
        path, hub = self.path.partition("?")[0], self.server_hub
        hub.log.append((self.command, path, self.headers.get("Range")))
        if hub.status:
            return self.refuse(hub.status)
        if match := re.fullmatch(r"/plain/(.+)", path):
            file = hub.folder / match[1]
            return self.file(file, {}, send_body) if file.is_file() else self.refuse(404)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, kind, revision = match.groups()
            if self.allowed(repo, revision):
                entries = [self.entry(repo, name) for name in hub.files(repo)]
                about = {"id": repo, "sha": hub.commit(repo), "siblings": [{"rfilename": e["path"]} for e in entries]}
                self.send(json.dumps(entries if kind == "tree" else about).encode(), {})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = match.groups()
            if self.allowed(repo, revision):
                commit = {"X-Repo-Commit": hub.commit(repo)}
                file = hub.folder / repo / name
                if name not in hub.files(repo) or not file.is_file():
                    return self.refuse(404, "EntryNotFound", commit)
                etag = self.entry(repo, name)
                etag = etag["lfs"]["oid"] if "lfs" in etag else etag["oid"]
                linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(file.stat().st_size)}
                self.file(file, commit | linked | {"ETag": f'"{etag}"'}, send_body)
        else:
            self.refuse(404)

    def entry(self, repo: str, name: str) -> dict:
        """A line of the list of files."""
        path = self.server_hub.folder / repo / name
        size, digest = path.stat().st_size if path.is_file() else 0, self.server_hub.digest
        entry = {"type": "file", "path": name, "size": size, "oid": digest(path, "sha1")}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": digest(path, "sha256"), "size": size, "pointerSize": 134}
        return entry

    def allowed(self, repo: str, revision: str | None) -> bool:
        """Whether a repository may be read; says why not."""
        hub, known = self.server_hub, self.headers.get("Authorization") == f"Bearer {self.server_hub.token}"
        if not hub.files(repo) or repo in hub.private and not known:
            self.refuse(401, "RepoNotFound")
        elif repo in hub.gated and not known:
            self.refuse(401 if "Authorization" not in self.headers else 403, "GatedRepo")
        elif revision not in (None, "main", hub.commit(repo)):
            self.refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def file(self, path: Path, headers: dict, send_body: bool):
        """A file or the rest of it, with the next of its faults."""
        faults = self.server_hub.faults.get(path.name, []) if send_body else []
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            return self.refuse(fault)
        content = path.read_bytes()
        if fault == "changed":
            content = bytes(len(content))
        etag = headers.setdefault("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        start, status = 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and fault != "whole" and self.headers.get("If-Range", etag) == etag:
            start, status = int(asked[1]), 206
            if start >= len(content):
                return self.refuse(416)
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.send(content[start:], headers, status, send_body, fault)

    def send(self, content: bytes, headers: dict, status: int = 200, send_body: bool = True, fault: str | None = None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if not send_body:
            return
        broken = fault in ("cut", "stall")
        self.wfile.write(content[: len(content) // 2] if broken else content)
        self.close_connection = self.close_connection or broken
        if fault == "stall":
            self.wfile.flush()
            self.server_hub.stalled.wait(60)

    def refuse(self, status: int, code: str = "", headers: dict | None = None):
        self.send(b"", (headers or {}) | ({"X-Error-Code": code, "X-Error-Message": code} if code else {}), status)
