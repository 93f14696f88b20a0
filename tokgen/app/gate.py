"""What stands before the page's server: which requests come in, how large, and what may go out.

Plain ASGI. The page's framework serves more than the page needs, and reads bodies of any size and
depth; and it would fetch a picture that a request names by an address. Nothing of that passes here.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import pathlib
import re
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tokgen.app import bounds

API = "/gradio_api"
READ = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(/\d+)?"
    r"|/(static|assets|svelte)/[^:]*"
    rf"|{API}/(info|theme\.css|app_id|startup-events|queue/data|upload_progress|heartbeat/\w+)/?"
    rf"|{API}/file=(?!\w+:).*"
)
# Path of a POST -> bytes of its body, at most
WRITTEN = {
    f"{API}/queue/join": bounds.BODY,
    f"{API}/run/predict": bounds.BODY,
    f"{API}/cancel": bounds.BODY,
    f"{API}/reset": bounds.BODY,
    f"{API}/component_server": bounds.BLOB,
    f"{API}/upload": bounds.UPLOAD + bounds.BODY,
}
FILED = (f"{API}/component_server", f"{API}/upload")
FULL = "no room for more pictures: older ones go within the hour"
LOCAL = {"127.0.0.1", "localhost", "[::1]"}
# A browser that opens the page asks nobody else, whatever the page holds.
HEADERS = {
    b"content-security-policy": b"default-src 'self' data: blob:; "
    b"script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    b"form-action 'none'; base-uri 'self'; "
    # a notebook of this machine may show it within its own page, and nobody else
    b"frame-ancestors 'self' http://localhost:* http://127.0.0.1:*",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}

Application = Callable[..., Awaitable[None]]


class _Cut(Exception):
    """A body does not come as it said."""


class _Arriving:
    """A body on its way, no longer than it said, and here within a minute.

    Attributes:
        cut: (status, why) of one that is neither; (0, "") until then.
    """

    def __init__(self, receive: Callable, length: int):
        self.cut = 0, ""
        self._receive, self._left, self._more = receive, length, True
        self._until = asyncio.get_running_loop().time() + bounds.ARRIVES

    async def receive(self) -> dict:
        """The next message, as an application asks for it; _Cut where the body is cut off."""
        if not self._more:  # the body is here: what is waited for is the end of the connection
            return await self._receive()
        if self.cut[0]:
            raise _Cut
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            self.cut = 408, f"a body must be here within {bounds.ARRIVES} seconds"
            raise _Cut from None
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.cut = 413, "the body is longer than it said"
            raise _Cut
        self._more = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def all(self) -> bytes:
        """The body; of a connection that ended, what there was."""
        parts = []
        while self._more:
            parts.append((await self.receive()).get("body", b""))
        return b"".join(parts)


class Gate:
    """An application behind its bounds.

    Args:
        app: what serves the page.
        folder: where uploads and pictures lie.
        local: whether only this machine is meant: a name that leads here from elsewhere is refused.
    """

    def __init__(self, app: Application, folder: str | os.PathLike, *, local: bool):
        self._app, self._folder, self._local = app, pathlib.Path(folder), local
        self._filed = 0  # files that are coming in

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no web sockets
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        code, why = refusal(scope["method"], scope["path"], headers, local=self._local)
        filed = scope["path"].rstrip("/") in FILED
        if not code and filed:
            code, why = self._crowded()
        if code:
            return await _say(send, code, why)
        if scope["method"] != "POST":
            return await self._app(scope, receive, _told(send))
        body = _Arriving(receive, int(headers[b"content-length"]))
        if filed:
            return await self._file(scope, body, send)
        try:
            data = await body.all()
        except _Cut:
            return await _say(send, *body.cut, close=True)
        if why := wrong(data, self._folder):
            return await _say(send, 400, why)
        return await self._app(scope, _again(data, receive), _told(send))

    async def _file(self, scope: dict, body: _Arriving, send: Callable) -> None:
        """A file comes in; where it does not come as it said, its place is free again."""

        async def answer(message: dict) -> None:
            if not body.cut[0]:  # else the application has its own idea of what went wrong
                await told(message)

        told = _told(send)
        self._filed += 1
        try:
            await self._app(scope, body.receive, answer)
        except Exception:  # of a body that was cut off, whatever its reader made of that
            if not body.cut[0]:
                raise
        finally:
            self._filed -= 1
        if body.cut[0]:
            await _say(send, *body.cut, close=True)

    def _crowded(self) -> tuple[int, str]:
        """(status, why) where no file may come in now."""
        if self._filed >= bounds.FILED:
            return 503, f"{bounds.FILED} files are coming in: try again"
        if size(self._folder) > bounds.DISK:
            return 507, FULL
        return 0, ""


def refusal(
    method: str, path: str, headers: Mapping[bytes, str], *, local: bool
) -> tuple[int, str]:
    """(status, why) of a request that does not come in; (0, "") of one that does."""
    # of a body in chunks the server would go by these, whatever length it says
    if b"transfer-encoding" in headers:
        return 411, "a body must say its length, and come in one piece"
    host = headers.get(b"host", "")
    if local and re.sub(r":\d+$", "", host) not in LOCAL:
        return 421, "this page answers on this machine alone"
    origin = headers.get(b"origin", "")
    if method == "POST" and origin and urllib.parse.urlsplit(origin).netloc != host:
        return 403, "another page asked"
    if method in ("GET", "HEAD"):
        return (0, "") if READ.fullmatch(path) else (404, "not a part of this page")
    if method != "POST" or path.rstrip("/") not in WRITTEN:
        return 404, "not a part of this page"
    length, most = headers.get(b"content-length", ""), WRITTEN[path.rstrip("/")]
    if not re.fullmatch(r"\d{1,15}", length):
        return 411, "a body must say its length"
    if int(length) > most:
        return 413, f"at most {most} bytes; found {int(length)}"
    return 0, ""


def wrong(body: bytes, folder: pathlib.Path) -> str:
    """Why the body of a request is refused; "" of one that is not. Its files lie in the folder."""
    deep = most = 0
    for byte in body:  # before a parser that calls itself
        deep += (byte in b"[{") - (byte in b"]}")
        most = max(most, deep)
    if most > bounds.DEEP:
        return f"at most {bounds.DEEP} brackets within brackets; found {most}"
    try:
        found = json.loads(body, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, UnicodeDecodeError):
        return "no JSON"
    if elsewhere(found, folder):
        return "files of a request are those that were uploaded: none by its address or path"
    return ""


def elsewhere(found: Any, folder: pathlib.Path) -> bool:
    """Whether a file of a request lies outside of the folder, here or on another machine."""
    if isinstance(found, list):
        return any(elsewhere(each, folder) for each in found)
    if not isinstance(found, dict):
        return False
    if isinstance(path := found.get("path"), str):
        real = os.path.realpath(path) if "\0" not in path else "/"
        if not pathlib.Path(real).is_relative_to(folder):
            return True
    return any(elsewhere(each, folder) for each in found.values())


def size(folder: pathlib.Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(place, file)).st_size
            except FileNotFoundError:  # deleted meanwhile
                continue
    return total


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _finite(word: str) -> float:
    number = float(word)
    return number if math.isfinite(number) else _no_number(word)


def _again(body: bytes, receive: Callable) -> Callable:
    """A `receive` that gives a body once more, and then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def once_more() -> dict:
        return waiting.pop() if waiting else await receive()

    return once_more


def _told(send: Callable) -> Callable:
    """A `send` that tells a browser what it may do."""

    async def answer(message: dict) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in HEADERS]
            message = message | {"headers": [*kept, *HEADERS.items()]}
        await send(message)

    return answer


async def _say(send: Callable, code: int, why: str, *, close: bool = False) -> None:
    """An answer in the place of the application's; `close` ends the connection with it."""
    body = json.dumps({"detail": why}).encode()
    headers = [(b"content-type", b"application/json"), *HEADERS.items()]
    headers += [(b"connection", b"close")] if close else []
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
