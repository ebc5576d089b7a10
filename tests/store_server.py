"""An S3-compatible server on this machine (moto's), behind a TCP proxy that breaks connections as it is told to.

pip install "moto[server]" s3fs
"""

import os
import re
import socket
import threading
import time
from contextlib import suppress

import pytest

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}


class Proxy:
    """Passes connections on to a server. `fault` is what happens to each request on them:

    None; "refuse": the connection is closed; "hang": no answer; "slow": 200 KB a second; "503" or "500": that answer;
    "drop": the connection is reset in the middle of what is sent to the server, or comes from it, once over `drop_at`
    bytes. `only` is a pattern of the request's first line; other requests pass. `count` faults, and then none.
    """

    def __init__(self, port: int):
        self.target, self.fault, self.only, self.count, self.drop_at, self.hits = port, None, "", -1, 60_000, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.open, self.requests = self.listener.getsockname()[1], set(), []
        threading.Thread(target=self.accept, daemon=True).start()

    def set(self, fault: str | None, only: str = "", count: int = -1, drop_at: int = 60_000):
        self.only, self.count, self.drop_at, self.fault = only, count, drop_at, fault
        for one in list(self.open):  # no connection that is kept alive escapes it
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def hit(self, line: str) -> str | None:
        if not self.fault or not self.count or not re.search(self.only, line):
            return None
        self.count, self.hits = self.count - 1, self.hits + 1
        return self.fault

    def serve(self, client: socket.socket):
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self.target)) as server:
            self.open |= {client, server}
            head = client.recv(1 << 16)
            while head:
                line = head.partition(b"\r\n")[0].decode("latin-1")
                self.requests.append(line)
                fault = self.hit(line)
                if fault == "refuse":
                    return
                if fault == "hang":
                    time.sleep(60)
                    return
                if fault in ("500", "503"):
                    client.sendall(f"HTTP/1.1 {fault} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                    return
                state = [0]
                back = threading.Thread(target=self.pump, args=(server, client, fault, state), daemon=True)
                back.start()
                server.sendall(head)
                self.pump(client, server, fault, state)
                return

    def pump(self, source, target, fault, state):
        with suppress(OSError):
            while data := source.recv(1 << 14):
                state[0] += len(data)
                if fault == "slow":
                    time.sleep(len(data) / 200_000)
                if fault == "drop" and state[0] > self.drop_at:
                    for one in (source, target):
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        one.shutdown(socket.SHUT_RDWR)  # else it stays open while the other thread reads from it
                        one.close()
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """The proxy before a new, empty server, whose address and keys are in the environment; `files()` and `write()` go
    around the proxy. Requests on a connection are one by one: the server closes it after each."""
    reason = 'needs an S3 server: pip install "moto[server]" s3fs'
    moto = pytest.importorskip("moto.server", reason=reason)
    s3fs = pytest.importorskip("s3fs", reason=reason)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    proxy = Proxy(port)
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    how = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "x", "secret": "y", "skip_instance_cache": True}
    proxy.fs = s3fs.S3FileSystem(**how, use_listings_cache=False)
    with suppress(Exception):
        proxy.fs.rm(BUCKET, recursive=True)
    proxy.fs.mkdir(BUCKET)
    proxy.env = {name: os.environ[name] for name in (*KEYS, "AWS_ENDPOINT_URL", "XDG_CACHE_HOME")}
    yield proxy
    proxy.set(None)
    server.stop()
