"""A file of a hub on the loopback: whole and verified, or one message; nothing else is asked."""

import hashlib
import os
import pathlib
import subprocess
import sys
import types

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from tests import loopback
from tokgen import errors, report
from tokgen.pretrained import hub

NAME, FILE = "somebody/models", "deep/model.pth"
RESOLVED = f"/{NAME}/resolve/{loopback.COMMIT}/{FILE}"
BYTES = np.random.default_rng(5).bytes(3 * hub.CHUNK + 7)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with one large file, which huggingface_hub takes for the only one."""
    with loopback.serving() as found:
        file = tmp_path / "served"
        file.write_bytes(BYTES)
        found.files[f"{NAME}/{FILE}"] = file
        monkeypatch.setattr(hub, "PAUSE", 0.001)
        pointed(monkeypatch, found.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield found


def pointed(monkeypatch, address):
    """What HF_ENDPOINT does, which huggingface_hub reads when it is imported."""
    form = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", form)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(report, "say", lines.append)
    return lines


def fetched(folder):
    return hub.fetch(NAME, FILE, folder)


def left(folder):
    """What lies in a folder, with its size."""
    files = (file for file in pathlib.Path(folder).rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def test_a_file_is_fetched_whole_once_and_nothing_else_is_asked(served, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = fetched(tmp_path / "place")
    assert found.read_bytes() == BYTES and found.name == "model.pth"
    path = f"/stored/{NAME}/{FILE}"
    assert served.asked() == [f"HEAD /{NAME}/resolve/main/{FILE}", f"GET {RESOLVED}", f"GET {path}"]
    for request in served.requests:
        assert not {"authorization", "cookie"} & set(request.headers)
        assert "secret" not in str(request.headers)
        assert request.headers["user-agent"].startswith("tokgen/")
    assert fetched(tmp_path / "place") == found and len(served.requests) == 3
    assert left(tmp_path / "place") == {f"{loopback.digest(BYTES)}/model.pth": len(BYTES)}


def test_a_small_file_has_the_hash_of_git(served, tmp_path):
    small = tmp_path / "small"
    small.write_bytes(b"few")
    served.files[f"{NAME}/{FILE}"] = small
    assert fetched(tmp_path / "place").read_bytes() == b"few"
    served.alters, served.requests = True, []
    with pytest.raises(errors.UserError, match="is not what .* says it is"):
        fetched(tmp_path / "other")
    assert left(tmp_path / "other") == {}


def test_a_file_that_is_cut_is_gone_on_with(served, tmp_path):
    served.cuts = 3
    assert fetched(tmp_path / "place").read_bytes() == BYTES
    ranges = [r.headers.get("range") for r in served.requests if r.path.startswith("/stored/")]
    half = len(BYTES) // 2
    assert ranges[:2] == [None, f"bytes={half}-"] and len(ranges) == 4


def test_the_next_call_goes_on_where_one_gave_up(served, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "TRIES", 1)
    served.cuts = 1
    with pytest.raises(errors.UserError, match="run the same command again, which goes on"):
        fetched(tmp_path / "place")
    half = len(BYTES) // 2
    assert list(left(tmp_path / "place").values()) == [half]
    served.requests.clear()
    assert fetched(tmp_path / "place").read_bytes() == BYTES
    assert served.requests[-1].headers["range"] == f"bytes={half}-"


def test_a_part_of_another_revision_is_not_gone_on_with(served, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "TRIES", 1)
    served.cuts = 1
    with pytest.raises(errors.UserError):
        fetched(tmp_path / "place")
    later = BYTES[::-1]
    served.files[f"{NAME}/{FILE}"].write_bytes(later)
    assert fetched(tmp_path / "place").read_bytes() == later
    assert list(left(tmp_path / "place").values()) == [len(later)]


def test_a_size_other_than_told_is_said_before_a_byte_is_read(served, said, tmp_path):
    size = len(BYTES)
    hub.fetch(NAME, FILE, tmp_path / "one", about=int(0.95 * size))
    assert said == []
    served.cuts = 1
    hub.fetch(NAME, FILE, tmp_path / "two", about=size // 2)
    assert said[0] == f"{FILE} is {report.amount(size)} large, and not {report.amount(size // 2)}"


def test_a_password_of_a_mirror_is_not_told(monkeypatch):
    pointed(monkeypatch, "https://me:secret@mirror.example/hub")
    assert hub.host() == "mirror.example/hub"


def test_a_server_without_ranges_begins_anew(served, tmp_path):
    served.cuts, served.ignores = 1, True
    assert fetched(tmp_path / "place").read_bytes() == BYTES


def test_what_is_altered_on_the_way_is_refused_and_removed(served, tmp_path):
    served.alters = True
    with pytest.raises(errors.UserError, match="hash is not"):
        fetched(tmp_path / "place")
    assert left(tmp_path / "place") == {}


def test_more_bytes_than_the_hub_tells_are_refused(served, tmp_path):
    served.longer = 5
    with pytest.raises(errors.UserError, match="more than the .* bytes"):
        fetched(tmp_path / "place")
    assert sum(left(tmp_path / "place").values()) == 0


def test_a_part_that_was_damaged_between_two_calls_is_found_out(served, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "TRIES", 1)
    served.cuts = 1
    with pytest.raises(errors.UserError):
        fetched(tmp_path / "place")
    (part,) = (tmp_path / "place").rglob("*.part")
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(errors.UserError, match="hash is not"):
        fetched(tmp_path / "place")
    assert fetched(tmp_path / "place").read_bytes() == BYTES


def test_a_file_may_lie_at_another_address(served, tmp_path):
    with loopback.serving() as other:
        other.files = served.files
        served.location = other.address
        assert fetched(tmp_path / "place").read_bytes() == BYTES
        assert other.asked() == [f"GET /stored/{NAME}/{FILE}"]
        assert not {"authorization", "cookie"} & set(other.requests[0].headers)


def test_a_repository_that_was_renamed(served, tmp_path):
    served.moved["somebody/former"] = NAME
    found = hub.fetch("somebody/former", FILE, tmp_path / "place")
    assert found.read_bytes() == BYTES


def test_other_bytes_at_another_address_are_refused(served, tmp_path):
    with loopback.serving() as other:
        other.files, other.alters = served.files, True
        served.location = other.address
        with pytest.raises(errors.UserError, match="hash is not"):
            fetched(tmp_path / "place")


@pytest.mark.parametrize("location", ["ftp://127.0.0.1", "file:///etc"])
def test_an_address_that_cannot_be_read(location, served, tmp_path):
    served.location = location
    with pytest.raises(errors.UserError, match="leads from .* to an address that cannot be read"):
        fetched(tmp_path / "place")
    assert len(served.requests) == 2  # once: no other attempt can help


@pytest.mark.parametrize(
    ("status", "words", "requests"),
    [
        (401, "does not give .* fetch it elsewhere", 1),
        (403, "does not give .* fetch it elsewhere", 1),
        (404, "has no deep/model.pth", 1),
        (429, "no more requests for now .* in 7 s", 1),
        (500, "out of order", hub.TRIES),
        (418, "status 418", 1),
    ],
)
def test_a_refusal_is_one_message(status, words, requests, served, tmp_path):
    served.status = status
    with pytest.raises(errors.UserError, match=words) as caught:
        fetched(tmp_path / "place")
    assert "\n" not in str(caught.value) and served.address.split("//")[1] in str(caught.value)
    assert len(served.requests) == requests


def test_a_hub_that_is_busy_for_a_moment(served, said, tmp_path):
    served.busy = 2
    assert fetched(tmp_path / "place").read_bytes() == BYTES
    assert [line for line in said if "status 503; trying again" in line]


def test_what_is_no_hub(served, tmp_path):
    served.bare = True
    with pytest.raises(errors.UserError, match="does not answer as the Hugging Face hub"):
        fetched(tmp_path / "place")


def test_a_hub_that_does_not_answer(served, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "TRIES", 2)
    pointed(monkeypatch, loopback.nobody())
    with pytest.raises(
        errors.UserError, match="(?i)connection refused.*HF_ENDPOINT.*fetch it elsewhere"
    ):
        fetched(tmp_path / "place")


def test_a_hub_that_hangs(served, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "TRIES", 2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    served.hangs = 0.3
    with pytest.raises(errors.UserError, match="(?i)timed? ?out"):
        fetched(tmp_path / "place")


def test_without_a_network(served, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(errors.UserError, match="HF_HUB_OFFLINE is set.*fetch it elsewhere"):
        fetched(tmp_path / "place")
    assert served.requests == []


def test_a_disk_without_room_is_told_before_a_byte_is_read(served, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    with pytest.raises(errors.UserError, match="found 100 bytes free .* TOKGEN_CACHE"):
        fetched(tmp_path / "place")
    assert len(served.requests) == 1


def cached(tmp_path, data, name=""):
    """The file in the hub's own cache, as huggingface_hub lays it out."""
    home = pathlib.Path(constants.HF_HUB_CACHE) / "models--somebody--models"
    blob = home / "blobs" / (name or hashlib.sha256(data).hexdigest())
    link = home / "snapshots" / loopback.COMMIT / FILE
    for file in (blob, link, home / "refs" / "main"):
        file.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link.symlink_to(blob)
    (home / "refs" / "main").write_text(loopback.COMMIT)
    return link


def test_the_hubs_own_cache_is_used_without_a_request(served, said, tmp_path):
    link = cached(tmp_path, BYTES)
    assert fetched(tmp_path / "place") == link and served.requests == []
    assert "taken from the hub's cache" in said[0]


def test_a_damaged_file_of_the_hubs_own_cache_is_left_and_fetched_anew(served, said, tmp_path):
    link = cached(tmp_path, BYTES[1:], hashlib.sha256(BYTES).hexdigest())
    assert fetched(tmp_path / "place").read_bytes() == BYTES
    assert "does not match its hash" in said[0] and link.read_bytes() == BYTES[1:]


def test_an_environment_that_cannot_be_meant(served, tmp_path, monkeypatch):
    pointed(monkeypatch, "127.0.0.1:80")
    with pytest.raises(errors.UserError, match="HF_ENDPOINT must begin with"):
        fetched(tmp_path / "place")
    code = "from tokgen.pretrained import hub; hub._check_environment()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "soon"},
        capture_output=True,
        text=True,
    )
    assert "UserError: a variable of the environment that begins with HF_" in done.stderr


# ---------------------------------------------------------------- hf://


def test_folder_of_a_repository(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = hub.folder("hf://somebody/tokens/runs/tokenizer/checkpoints/7")
    assert found == tmp_path / "runs" / "tokenizer" / "checkpoints" / "7"
    assert asked == [("somebody/tokens", ["runs/tokenizer/checkpoints/7/**"])]
    with pytest.raises(errors.UserError, match="hf://OWNER/NAME"):
        hub.folder("hf:///x")


def test_a_folder_that_cannot_be_fetched_is_one_message(served):
    served.status = 404
    with pytest.raises(errors.UserError, match="has no runs of somebody/tokens"):
        hub.folder("hf://somebody/tokens/runs")
