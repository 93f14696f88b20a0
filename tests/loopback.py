"""A hub of the Hugging Face kind on the loopback, with the faults of networks and mirrors.

It answers as the hub does (huggingface_hub 2.4): HEAD and GET of /OWNER/NAME/resolve/REVISION/FILE,
with the commit, the size and the hash of the file; large ones lie at another address, to which it
redirects. Every request is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import pathlib
import re
import socket
import threading
import time
from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATH = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
LARGE = 4096  # bytes from which on a file has a SHA-256 and an address of its own


@dataclasses.dataclass
class Request:
    """What was asked: the method, the path, the headers by their names in small letters."""

    method: str
    path: str
    headers: dict[str, str]


@dataclasses.dataclass
class Hub:
    """The files of a hub, its faults, and what it was asked.

    Attributes:
        files: by "OWNER/NAME/FILE".
        cuts: of so many answers with a body, only a half is sent.
        alters: a byte of each file is another one than its hash is of.
        longer: bytes that are sent beyond the size that is told.
        status: what is answered to everything, where it is not 0.
        busy: so many first requests are answered with status 503.
        moved: repositories by the names that they had, which lead to those that they have.
        location: where large files are said to lie, in the place of here.
        ignores: ranges are not heard of.
        hangs: seconds before each answer.
        stalls: seconds in the middle of every body.
        bare: without commit, size and hash, as a login page.
        requests: all of them, in order.
    """

    files: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    cuts: int = 0
    alters: bool = False
    longer: int = 0
    status: int = 0
    busy: int = 0
    moved: dict[str, str] = dataclasses.field(default_factory=dict)
    location: str = ""
    ignores: bool = False
    hangs: float = 0.0
    stalls: float = 0.0
    bare: bool = False
    requests: list[Request] = dataclasses.field(default_factory=list)
    address: str = ""

    @property
    def stored(self) -> str:
        """Where large files lie: at another host by its name, so that a HEAD is not led there."""
        return self.address.replace("127.0.0.1", "localhost")

    def asked(self) -> list[str]:
        """`GET /a/b/resolve/main/c` of every request."""
        return [f"{request.method} {request.path}" for request in self.requests]


def digest(data: bytes) -> str:
    """The hash that the hub gives: SHA-256 of a large file, git's SHA-1 of a small one."""
    if len(data) >= LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub that listens while the block runs."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def nobody() -> str:
    """An address at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.served
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append(Request(self.command, self.path, headers))
        time.sleep(hub.hangs)
        if hub.status:
            return self._empty(hub.status, {"Retry-After": "7"} if hub.status == 429 else {})
        if hub.busy:
            hub.busy -= 1
            return self._empty(503, {})
        stored = self.path.startswith("/stored/")
        match = PATH.fullmatch(self.path)
        if match and match[1] in hub.moved:
            now = self.path.replace(match[1], hub.moved[match[1]])
            return self._empty(307, {"Location": now})
        key = self.path.removeprefix("/stored/") if stored else match and f"{match[1]}/{match[3]}"
        if key not in hub.files:
            return self._empty(404, {"X-Error-Code": "EntryNotFound"})
        data = hub.files[key].read_bytes()
        if hub.bare:
            return self._empty(200, {})
        said = {"X-Repo-Commit": COMMIT}
        if len(data) >= LARGE and not stored:
            said |= {
                "X-Linked-Etag": f'"{digest(data)}"',
                "X-Linked-Size": str(len(data)),
                "Location": (hub.location or hub.stored) + f"/stored/{key}",
            }
            return self._empty(302, said)
        self._send(data, said | {"ETag": f'"{digest(data)}"'}, body)

    def _empty(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, data: bytes, headers: dict[str, str], body: bool) -> None:
        hub, begin, status = self.served, 0, 200
        size = len(data)
        if hub.alters:
            data = data[:-1] + bytes([data[-1] ^ 1])
        data += bytes(hub.longer)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not hub.ignores:
            begin, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        data = data[begin:]
        headers["Content-Length"] = str(len(data) if body else size)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if hub.cuts:
            hub.cuts -= 1
            data = data[: len(data) // 2]
            self.close_connection = True
        if hub.stalls:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            data = data[len(data) // 2 :]
            time.sleep(hub.stalls)
        with contextlib.suppress(OSError):  # whoever asked may be gone
            self.wfile.write(data)
