"""The page as a process of its own, and requests to it as a browser makes them, or worse ones."""

import contextlib
import http.client
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds: of a machine that others use, too
SESSIONS = itertools.count()
# `tokgen`, which says of every connection and every name that it asks for outside of this machine
WATCHED = """
import sys
from tokgen import cli

def watch(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments
    else:
        return
    host = address[0] if isinstance(address, tuple) else ""
    if host not in ("", "127.0.0.1", "localhost", "::1", None):
        print("ASKED ELSEWHERE", address, flush=True)

sys.addaudithook(watch)
sys.exit(cli.main())
"""


class Page:
    """A page that is served.

    Attributes:
        port: on 127.0.0.1.
        said: gives what the process said until now.
    """

    def __init__(self, process: subprocess.Popen, port: int, said: Callable[[], str]):
        self.process, self.port, self.said = process, port, said
        self.address = f"http://127.0.0.1:{port}"
        status, body = self.request("GET", "/config")
        assert status == 200
        self.config = json.loads(body)
        self.components = {each["id"]: each for each in self.config["components"]}
        self.named = {
            each["props"].get("elem_id"): each["id"] for each in self.config["components"]
        }

    def megabytes(self) -> float:
        """Memory that the process holds."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """(status, body) of the answer."""
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        ) as asked:
            asked.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            answer = asked.getresponse()
            return answer.status, answer.read(2**22)

    def upload(self, data: bytes, name: str = "a.png") -> tuple[int, bytes]:
        """A file, as a browser sends it."""
        edge = "x" * 24
        head = (
            f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            "Content-Type: image/png\r\n\r\n"
        )
        body = head.encode() + data + f"\r\n--{edge}--\r\n".encode()
        kind = f"multipart/form-data; boundary={edge}"
        return self.request("POST", "/gradio_api/upload", body, content_type=kind)

    def event(self, name: str) -> dict[str, Any]:
        """What happens at a component that is named: `m0-draw-draw`."""
        here = self.named[name]
        (found, *_) = [
            each
            for each in self.config["dependencies"]
            if any(target[0] == here for target in each["targets"])
        ]
        return found

    def values(self, event: dict[str, Any]) -> list:
        """The values that its components begin with."""
        return [self.components[id_]["props"].get("value") for id_ in event["inputs"]]

    def ask(self, event: dict[str, Any], values: list) -> tuple[int, dict[str, Any]]:
        """(status, the last message) of an event, waited for as a browser does."""
        session = f"test{next(SESSIONS)}"
        asked = {"data": values, "fn_index": event["id"], "session_hash": session}
        asked |= {"trigger_id": event["targets"][0][0], "event_data": None}
        path = (
            "/gradio_api/queue/join" if event["queue"] is not False else "/gradio_api/run/predict"
        )
        status, body = self.request(
            "POST", path, json.dumps(asked).encode(), content_type="application/json"
        )
        if status != 200 or path.endswith("predict"):
            return status, {"body": body}
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        ) as stream:
            stream.request("GET", f"/gradio_api/queue/data?session_hash={session}")
            answer, until = stream.getresponse(), time.monotonic() + PATIENCE
            while time.monotonic() < until and (line := answer.readline()):
                if line.startswith(b"data:"):
                    message = json.loads(line[5:])
                    if message["msg"] in ("process_completed", "close_stream"):
                        return status, message
        raise AssertionError(f"no end of {event['id']}")


@contextlib.contextmanager
def page(*checkpoints: object) -> Iterator[Page]:
    """A page of checkpoints, until the block ends."""
    words = [sys.executable, "-c", WATCHED, "app", *map(str, checkpoints), "--port", "0"]
    with tempfile.TemporaryFile("w+") as said:  # a pipe that nobody reads would fill, and stop it
        process = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        try:
            until, found = time.monotonic() + PATIENCE, None
            while not found:
                assert time.monotonic() < until and process.poll() is None, _read(said)
                time.sleep(0.2)
                found = re.search(r"open http://127\.0\.0\.1:(\d+) ", _read(said))
            yield Page(process, int(found[1]), lambda: _read(said))
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _read(file: TextIO) -> str:
    return os.pread(file.fileno(), 2**24, 0).decode()
