"""What is refused before a page is served; and the page of a machine without its extra."""

import http.client
import importlib.util
import signal
import socket

import pytest

from tests import command_line
from tests.app import served
from tokgen.app import bounds, server
from tokgen.interfaces import UserError


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"found 127.0.0.1 port {port}"):
            server.check(["runs/a"], "127.0.0.1", port)
    server.check(["runs/a"], "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("host", "port", "count", "said"),
    [
        ("127.0.0.1", 70000, 1, "--port must lie in"),
        ("127.0.0.1", -1, 1, "--port must lie in"),
        ("no host", 0, 1, "--host and --port must be free"),
        ("127.0.0.1", 0, bounds.MODELS + 1, "at most 8 models; found 9"),
    ],
)
def test_what_cannot_be_served_is_refused(host, port, count, said):
    with pytest.raises(UserError, match=said):
        server.check(["runs/a"] * count, host, port)


def test_without_the_extra_the_command_says_how_to_install_it(capfd, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = command_line.refused(capfd, "app", "runs/generator", "--port", 0)
    assert 'pip install "tokgen[app]"' in said


@pytest.mark.long
def test_what_is_no_checkpoint_is_told(capfd, monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    assert "no checkpoint at" in command_line.refused(capfd, "app", tmp_path / "no", "--port", 0)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ctrl_c_ends_the_page_and_open_tabs_with_it(runs):
    pytest.importorskip("gradio")
    with served.page(runs / "tokenizer") as page:
        tab = http.client.HTTPConnection("127.0.0.1", page.port, timeout=served.PATIENCE)
        tab.request("GET", "/gradio_api/heartbeat/a")
        assert tab.getresponse().status == 200
        page.process.send_signal(signal.SIGINT)
        assert page.process.wait(served.PATIENCE) == 130
        tab.close()
        lines = page.said().splitlines()
    assert lines[-1] == "tokgen app: interrupted" and "Traceback" not in "".join(lines)
