"""The page under requests that no browser makes: nothing ends it, and memory does not grow."""

import concurrent.futures
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.app import served

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
GROWTH = 200  # MB
JOIN = "/gradio_api/queue/join"
FILE = {"meta": {"_type": "gradio.FileData"}}
VALUES = [
    *(None, True, -1, 0.5, 1e308, -1e308, 2**70, 10**300, "", "x" * 20_000, "NaN", "Infinity"),
    *("<script>alert(1)</script>", "../../etc/passwd", [], [[]], {}, [None] * 1000),
    FILE | {"path": "/etc/passwd"},
    FILE | {"path": "../../../etc/passwd"},
    {"background": None, "layers": [FILE | {"path": "/etc/passwd"}] * 9, "composite": None},
    {"background": None, "layers": [], "composite": None, "id": "none"},
]
PATHS = [
    *("/gradio_api/file=/etc/passwd", "/gradio_api/file=../../etc/passwd", "/config/../etc/passwd"),
    *("/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/file=http://127.0.0.1:1/"),
    *(
        "/gradio_api/deep_link",
        "/monitoring",
        "/docs",
        "/gradio_api/openapi.json",
        "/%00",
        "/a" * 9,
    ),
    "/gradio_api/stream/a/b/1/playlist.m3u8",
]
BODIES = [
    *(b"[" * 30_000 + b"]" * 30_000, b'{"data": [NaN]}', b'{"data": [1e999]}', b"", b"null", b"[]"),
    *(
        b"{",
        b'{"data": ' + b"9" * 5000 + b"}",
        b"\xff" * 1000,
        b'"' + b"x" * 60_000 + b'"',
        b"0" * 70_000,
    ),
    b'{"data": [], "fn_index": 100000, "session_hash": "a"}',
    b'{"data": [], "fn_index": -1, "session_hash": "a"}',
    b'{"data": {}, "fn_index": "x", "session_hash": []}',
    json.dumps({"data": [FILE | {"path": "http://127.0.0.1:1/a.png"}], "fn_index": 0}).encode(),
]
BUTTONS = ("m0-draw-draw", "m1-draw-trace", "m2-edit-draw", "side-draw", "m0-tokens-upload")


def bomb(side: int) -> bytes:
    """A PNG of few bytes and many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        found = kind + data
        return len(data).to_bytes(4, "big") + found + zlib.crc32(found).to_bytes(4, "big")

    size = side.to_bytes(4, "big")
    rows = zlib.compress(bytes(side // 8 + 1) * min(side, 2000), 9)
    head = chunk(b"IHDR", size + size + b"\x01\x00\x00\x00\x00")
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def noise(side: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def drawn(page: served.Page, seed: int = 0) -> dict:
    event = page.event("m0-draw-draw")
    label, count, _, *rest = page.values(event)
    status, message = page.ask(event, [label, count, seed, *rest])
    return message | {"status": status}


def looked(page: served.Page, data: bytes, name: str = "a.png") -> dict:
    """What comes of a file that is uploaded to be looked at."""
    status, body = page.upload(data, name)
    if status != 200:
        return {"status": status}
    path = json.loads(body)[0]
    given = FILE | {"path": path, "orig_name": name}
    status, message = page.ask(page.event("m0-tokens-upload"), [given])
    return message | {"status": status}


def layer(page: served.Page, index: str, data: bytes) -> int:
    """The status of a painted layer as the editor sends it."""
    edge = "y" * 24
    fields = dict(type="layer", index=index, id="a", session_hash="a", fn_name="accept_blobs")
    fields |= dict(component_id=str(page.named["m0-edit-editor"]))
    parts = [
        f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    parts.append(
        f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="b"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = "".join(parts).encode() + data + f"\r\n--{edge}--\r\n".encode()
    kind = f"multipart/form-data; boundary={edge}"
    return page.request("POST", "/gradio_api/component_server", body, content_type=kind)[0]


def pictures(message: dict) -> int:
    return len(message["output"]["data"][0])


def test_200_hostile_requests_end_nothing_and_leave_no_memory(page):
    assert pictures(drawn(page)) == 4
    assert looked(page, noise(64))["success"]
    for name in BUTTONS[:4]:  # what is compiled once is not what requests leave
        event = page.event(name)
        page.ask(event, page.values(event))
    before, asked = page.megabytes(), 0
    for name in BUTTONS:
        event = page.event(name)
        values = page.values(event)
        for number, value in enumerate(VALUES):
            changed = list(values)
            changed[number % len(values)] = value
            status, message = page.ask(event, changed)
            asked += 1
            if status == 200:
                assert not (isinstance(value, dict) and "/etc/" in json.dumps(value))
                said = json.dumps(message)
                assert "Traceback" not in said and ".py" not in said and "root:" not in said
    for path in PATHS:
        status, body = page.request("GET", path)
        assert status in (400, 403, 404) and b"root:" not in body, path
        asked += 1
    for body in BODIES:
        status, said = page.request("POST", JOIN, body, content_type="application/json")
        assert status in (400, 404, 413, 422, 500) and b"Traceback" not in said, body[:80]
        asked += 1
    assert looked(page, noise(2500))["status"] == 413  # 18 MB
    for data in (bomb(60_000), bomb(9000), noise(2000), b"", b"GIF89a", noise(64)[:500]):
        for name in ("a.png", "a.svg", "../../a", "a" * 300):
            looked(page, data, name)
            asked += 1
    for index in ("0", str(10**9), "-1", "x", "null"):
        for data in (b"", b"x" * 10_000, bomb(9000), noise(800)):
            assert layer(page, index, data) in (200, 400, 413, 500)
            asked += 1
    event = page.event("m0-edit-draw")
    values = page.values(event)
    values[1] = {"background": None, "layers": [], "composite": None, "id": "a"}
    page.ask(event, values)
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda seed: drawn(page, seed), range(50)))
        asked += len(answers)
    assert asked >= 200
    full = [answer for answer in answers if answer["status"] != 200]  # none of a machine so quick
    assert len(full) < len(answers) and all(answer["status"] in (503, 429) for answer in full)
    assert all(pictures(answer) == 4 for answer in answers if answer["status"] == 200)
    assert pictures(drawn(page, 99)) == 4 and page.process.poll() is None
    assert "ASKED ELSEWHERE" not in page.said()
    grown = page.megabytes() - before
    print(f"{asked} requests, {len(full)} of 50 at once refused, {grown:.0f} MB more")
    assert grown < GROWTH


def test_what_a_request_of_a_queue_may_not_skip_is_refused(page):
    event = page.event("m0-draw-draw")
    asked = {"data": page.values(event), "fn_index": event["id"], "session_hash": "direct"}
    body = json.dumps(asked).encode()
    kind = dict(content_type="application/json")
    assert page.request("POST", "/gradio_api/run/predict", body, **kind)[0] == 404
