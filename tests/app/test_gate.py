"""The gate: what comes in, how large, and what a browser is told."""

import asyncio
import json
import pathlib

import pytest

from tokgen.app import bounds, gate

HOST = (b"host", b"127.0.0.1:7860")
JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"
FOLDER = pathlib.Path("/srv/page")


def asked(method, path, headers=(), body=b"", *, local=True, folder="/srv/page"):
    """(status, headers, what the application saw) of a request."""
    seen, sent = [], []

    async def application(scope, receive, send):
        message = await receive()
        seen.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    headers = [HOST, *headers]
    if method == "POST":
        headers.append((b"content-length", str(len(body)).encode()))
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(gate.Gate(application, folder, local=local)(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), seen


@pytest.mark.parametrize(
    "path",
    ["/", "/config", "/assets/index.js", "/gradio_api/queue/data", "/gradio_api/file=/tmp/a.png"],
)
def test_what_the_page_needs_comes_in(path):
    status, headers, seen = asked("GET", path, [(b"content-length", b"9" * 5000)])
    assert status == 200 and seen
    assert headers[b"content-security-policy"].startswith(b"default-src 'self'")
    asked_of, _, framed_by = headers[b"content-security-policy"].partition(b"frame-ancestors ")
    assert b"http" not in asked_of
    assert framed_by == b"'self' http://localhost:* http://127.0.0.1:*"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://example.com/a.png",
        "/gradio_api/proxy=http://example.com",
        "/gradio_api/openapi.json",
        "/gradio_api/vibe-code",
        "/gradio_api/deep_link",
        "/monitoring",
        "/login",
        "/docs",
    ],
)
def test_what_it_does_not_need_stays_out(path):
    for method in ("GET", "POST", "PUT", "DELETE"):
        status, _, seen = asked(method, path)
        assert status == 404 and not seen


def test_a_body_is_passed_on_as_it_came():
    body = json.dumps({"data": [1, "x", None], "fn_index": 3}).encode()
    status, _, seen = asked("POST", JOIN, body=body)
    assert status == 200 and seen == [body]


BODIES = {
    "deep": (b"[" * 10_000 + b"]" * 10_000, "brackets"),
    "cut": (b'{"data": [', "no JSON"),
    "nan": (b'{"data": [NaN]}', "no JSON"),
    "infinite": (b'{"data": [1e999]}', "no JSON"),
    "digits": (b'{"data": [' + b"9" * 6000 + b"]}", "no JSON"),
    "bytes": (b"\xff\xfe\x00", "no JSON"),
    "address": (b'{"data": [{"path": "http://example.com/a.png"}]}', "uploaded"),
    "file": (b'{"data": {"a": [{"path": " file:///etc/passwd"}]}}', "uploaded"),
    "path": (b'{"data": [{"path": "/etc/passwd"}]}', "uploaded"),
    "above": (b'{"data": [{"path": "/srv/page/../passwd"}]}', "uploaded"),
    "null": (b'{"data": [{"path": "/srv/page/a\\u0000"}]}', "uploaded"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_refused_before_it_is_read(name):
    body, why = BODIES[name]
    status, _, seen = asked("POST", JOIN, body=body)
    assert status == 400 and not seen and why in gate.wrong(body, FOLDER)


def test_an_upload_is_named_by_its_path():
    body = b'{"data": [{"path": "/srv/page/uploads/ab/a.png", "meta": {}}, [], null]}'
    assert gate.wrong(body, FOLDER) == ""


def test_large_bodies_are_refused_by_what_they_say():
    def refusal(path, **headers):
        headers = {name.encode().replace(b"_", b"-"): value for name, value in headers.items()}
        return gate.refusal("POST", path, {b"host": "localhost"} | headers, local=True)[0]

    assert refusal(JOIN, content_length=str(bounds.BODY)) == 0
    assert refusal(JOIN, content_length=str(bounds.BODY + 1)) == 413
    assert refusal("/gradio_api/upload", content_length=str(2 * bounds.UPLOAD)) == 413
    assert refusal(JOIN) == refusal(JOIN, content_length="-1") == 411
    assert refusal(JOIN, content_length="9" * 5000) == 411


def test_a_body_in_chunks_is_refused_whatever_length_it_says():
    chunks = [(b"transfer-encoding", b"chunked")]
    for method, path in (("POST", JOIN), ("POST", UPLOAD), ("GET", "/")):
        status, _, seen = asked(method, path, chunks, b"{}")
        assert status == 411 and not seen


def filed(parts, said: int, folder) -> tuple[list, int, gate.Gate]:
    """(statuses, bytes that passed, the gate) of an upload that comes in parts, or not at all."""
    sent, passed, parts = [], [], list(parts)

    async def application(scope, receive, send):
        try:
            while (message := await receive()).get("more_body"):
                passed.append(len(message["body"]))
            status = 200
        except gate._Cut:  # as a framework that has its own answer to what goes wrong
            status = 500
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        if not parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": parts.pop(0), "more_body": True}

    async def send(message):
        sent.append(message)

    headers = [HOST, (b"content-length", str(said).encode())]
    scope = {"type": "http", "method": "POST", "path": UPLOAD, "headers": headers}
    door = gate.Gate(application, folder, local=True)
    asyncio.run(door(scope, receive, send))
    return [each["status"] for each in sent if "status" in each], sum(passed), door


def test_an_upload_longer_than_it_said_is_cut_off(tmp_path):
    statuses, passed, _ = filed([b"x" * 8] * 9, 20, tmp_path)
    assert statuses == [413] and passed == 16


def test_silent_uploads_do_not_keep_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "ARRIVES", 0.05)
    statuses, _, door = filed([b"x"], 20, tmp_path)
    assert statuses == [408] and door._filed == 0


def test_a_silent_request_ends(monkeypatch):
    monkeypatch.setattr(bounds, "ARRIVES", 0.05)
    sent = []

    async def send(message):
        sent.append(message)

    headers = [HOST, (b"content-length", b"20")]
    scope = {"type": "http", "method": "POST", "path": JOIN, "headers": headers}
    door = gate.Gate(None, FOLDER, local=True)
    asyncio.run(door(scope, asyncio.Event().wait, send))
    assert sent[0]["status"] == 408


def test_a_name_that_leads_here_from_elsewhere_and_another_page_are_refused():
    elsewhere = {b"host": "evil.example:7860", b"content-length": "2"}
    assert gate.refusal("GET", "/", elsewhere, local=True)[0] == 421
    assert gate.refusal("GET", "/", elsewhere, local=False)[0] == 0
    other = {b"host": "localhost:7860", b"origin": "http://evil.example", b"content-length": "2"}
    assert gate.refusal("POST", JOIN, other, local=True)[0] == 403
    own = other | {b"origin": "http://localhost:7860"}
    assert gate.refusal("POST", JOIN, own, local=True)[0] == 0


def test_files_that_come_in_at_the_same_time_are_few():
    door = gate.Gate(None, "nowhere", local=True)
    door._filed = bounds.FILED - 1
    assert door._crowded()[0] == 0
    door._filed = bounds.FILED
    assert door._crowded()[0] == 503


def test_uploads_end_where_the_disk_is_full(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert asked("POST", "/gradio_api/upload", body=b"x", folder=tmp_path)[0] == 200
    monkeypatch.setattr(bounds, "DISK", 99)
    assert asked("POST", "/gradio_api/upload", body=b"x", folder=tmp_path)[0] == 507
