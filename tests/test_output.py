"""Places of results: reserved before any work, never mixed, replaced whole or not at all."""

import ctypes
import errno
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest

from tokgen import output
from tokgen.checkpoints import run as runs
from tokgen.interfaces import UserError
from tokgen.output import locks

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDS = {"made.json": ("seed",)}


def made(path, text="new", **options):
    """A result of two files."""
    with output.folder(path, records=RECORDS, **options) as out:
        (out.path / "made.json").write_text(json.dumps({"seed": text}))
        (out.path / f"{text}.png").write_text(text)


def names(folder):
    """All that lies in a folder, hidden ones too."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_a_folder_is_one_result(tmp_path):
    out = tmp_path / "deep" / "out"
    made(out, "old")
    assert names(tmp_path) == ["deep", "deep/out", "deep/out/made.json", "deep/out/old.png"]
    with pytest.raises(UserError, match="not empty: it holds made.json, old.png.*--overwrite"):
        made(out)
    made(out, overwrite=True)
    assert names(out) == ["made.json", "new.png"] and names(tmp_path / "deep")[0] == "out"
    (tmp_path / "empty").mkdir(mode=0o750)
    made(tmp_path / "empty")
    assert names(tmp_path / "empty") == ["made.json", "new.png"]
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("there", ["photograph.jpg", ".git", "samples.json", "made.json"])
def test_what_is_no_result_of_the_command_is_never_replaced(tmp_path, there):
    out = tmp_path / "out"
    out.mkdir()
    (out / there).write_text('{"of": "something else"}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match="name a(nother|  ?new| new) folder"):
            made(out, overwrite=overwrite)
    assert names(tmp_path) == ["out", f"out/{there}"]


def test_a_run_or_a_repository_around_a_result_is_not_replaced(tmp_path):
    made(tmp_path / "out", "old")
    for inside in ("checkpoints", ".git"):
        (tmp_path / "out" / inside).mkdir()
        with pytest.raises(UserError, match=inside):
            made(tmp_path / "out", overwrite=True)
        (tmp_path / "out" / inside).rmdir()


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "deep" / "out"


def a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


PLACES = {
    "empty": (lambda tmp_path: "", "--out is empty"),
    "below a file": (below_a_file, "cannot write .*/out: .*file is a file"),
    "a file": (a_file, "is a file|is there already"),
    "no place": (lambda tmp_path: "/proc/tokgen/out", "cannot write /proc/tokgen/out"),
    "a long name": (lambda tmp_path: tmp_path / ("x" * 300), "cannot write .*too long"),
    "the input": (lambda tmp_path: tmp_path / "data", "is what the command reads|is a folder"),
    "in the input": (lambda tmp_path: tmp_path / "data" / "out", "must not lie in what is read"),
    "by way of a link": (lambda tmp_path: tmp_path / "link" / "out", "must not lie in what is"),
    "around the input": (lambda tmp_path: tmp_path, "holds what the command reads|is a folder"),
    "in checkpoints": (lambda tmp_path: tmp_path / "run" / "checkpoints" / "out", "must not lie"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["folder", "growing", "file", "lines"])
def test_a_place_that_cannot_be_is_told_before_any_work(tmp_path, place, kind):
    (tmp_path / "data").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "data" / "image.png").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    of, words = PLACES[place]
    path, before = of(tmp_path), names(tmp_path)
    options = {"records": RECORDS} if kind in ("folder", "growing") else {}
    words += "|does not end in one" * (kind == "lines")
    if (kind, place) == ("lines", "a file"):
        path.write_text("no JSON")
    with pytest.raises(UserError, match=words) as told:
        with getattr(output, kind)(
            path, inputs=(tmp_path / "data", "", tmp_path / "run", "tfds:none"), **options
        ):
            raise AssertionError("work was begun")
    assert "\n" not in str(told.value) and names(tmp_path) == before


def test_beside_the_checkpoints_of_a_run_is_a_place(tmp_path):
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    made(tmp_path / "run" / "samples", inputs=(tmp_path / "run",))
    assert names(tmp_path / "run" / "samples") == ["made.json", "new.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to the superuser")
def test_a_folder_that_is_not_ours_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write .*permission"):
        made(tmp_path / "out")


@pytest.mark.parametrize("mounted", [False, True])
def test_a_parent_that_cannot_be_written_but_a_folder_that_can(tmp_path, monkeypatch, mounted):
    """As a mounted one in a container: filled from within, and not replaced."""
    out = tmp_path / "out"
    out.mkdir()
    before = out.stat().st_ino
    real = os.access

    def access(path, how):
        return pathlib.Path(path) != tmp_path and real(path, how)

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(UserError, match="cannot write .*other: permission denied"):
        made(tmp_path / "other")
    if mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: pathlib.Path(path) == out)
    made(out, "old")
    assert names(tmp_path) == ["out", "out/made.json", "out/old.png"]
    assert out.stat().st_ino == before
    with pytest.raises(UserError, match="mounted"):
        made(out, overwrite=True)
    assert names(out) == ["made.json", "old.png"]
    (tmp_path / "a.jsonl").write_text("{}\n")
    with output.lines(tmp_path / "a.jsonl") as records:
        records.append({"number": 1})
    assert (tmp_path / "a.jsonl").read_text() == '{}\n{"number": 1}\n'
    monkeypatch.undo()
    monkeypatch.chdir(out)
    with pytest.raises(UserError, match="current folder"):
        made(".", overwrite=True)


class Full(OSError):
    def __init__(self, number=errno.ENOSPC, file=None):
        super().__init__(number, os.strerror(number), file)


@pytest.mark.parametrize(
    "error", [Full(), Full(errno.EDQUOT), KeyboardInterrupt(), ZeroDivisionError()]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_end_in_between_leaves_what_was_there(tmp_path, error, overwrite):
    if overwrite:
        made(tmp_path / "out", "old")
    before = names(tmp_path)
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as told:
        with output.folder(tmp_path / "out", records=RECORDS, overwrite=overwrite) as out:
            (out.path / "made.json").write_text("{")
            raise error
    assert names(tmp_path) == before
    if expected is UserError:
        said = str(told.value)
        assert str(tmp_path / "out") in said and "make room" in said and "was removed" in said


def test_an_error_of_ours_is_none_of_the_place(tmp_path):
    with pytest.raises(FileNotFoundError):
        with output.folder(tmp_path / "out", records=RECORDS):
            (tmp_path / "nothing").read_text()
    (tmp_path / "locked").write_text("")
    with pytest.raises(UserError, match="cannot use /data/image.png: permission denied"):
        with output.folder(tmp_path / "out", records=RECORDS):
            raise Full(errno.EACCES, "/data/image.png")


def test_the_same_command_goes_on_with_its_unfinished_result(tmp_path):
    def go_on(seed, found, **options):
        with output.folder(tmp_path / "out", records=RECORDS, **options) as out:
            assert out.claim({"seed": seed, "of": {"a": [1, 2]}}) is found
            with open(out.path / "parts", "a") as file:
                file.write(f"{seed}")
            if not found:
                raise KeyboardInterrupt
            (out.path / "made.json").write_text('{"seed": 0}')
            return (out.path / "parts").read_text()

    with pytest.raises(KeyboardInterrupt):
        go_on(1, False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="seed: 1 there, 2 here") as told:
        go_on(2, False)
    assert "of.a" not in str(told.value) and "--overwrite" in str(told.value)
    assert go_on(1, True) == "11"
    assert names(tmp_path) == ["out", "out/made.json", "out/parts"]
    # another one in its place: what is there stays until the new one is whole
    with pytest.raises(KeyboardInterrupt):
        go_on(3, False, overwrite=True)
    with pytest.raises(KeyboardInterrupt):  # which may replace an unfinished one, too
        go_on(4, False, overwrite=True)
    assert (tmp_path / "out" / "parts").read_text() == "11"
    assert go_on(4, True, overwrite=True) == "44"
    assert names(tmp_path) == ["out", "out/made.json", "out/parts"]


KILLED = """
import ctypes, os, pathlib, shutil, signal, sys
from tests import test_output
from tokgen import output
name, nth = sys.argv[2], int(sys.argv[3])
where = pathlib.Path if name in ("replace", "unlink", "mkdir") else shutil
real, calls = getattr(where, name), []
def killed(*words, **options):
    calls.append(1)
    if len(calls) == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*words, **options)
setattr(where, name, killed)
if sys.argv[4] == "third":
    ctypes.CDLL = lambda *words, **options: None
test_output.made(sys.argv[1], "new", overwrite=True)
"""


@pytest.mark.parametrize("how", ["exchange", "third"])
@pytest.mark.parametrize("name", ["replace", "rmtree", "unlink"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, name, how, monkeypatch):
    """In one process that raises what nothing catches; one real kill is in the long test."""

    class Killed(BaseException):
        pass

    if how == "third":
        monkeypatch.setattr(ctypes, "CDLL", lambda *words, **options: None)
    where = shutil if name == "rmtree" else pathlib.Path
    seen = set()
    for nth in range(1, 9):
        out = tmp_path / f"{nth}" / "out"
        made(out, "old")
        calls, real = [], getattr(where, name)

        def dying(*words, calls=calls, real=real, nth=nth, **options):
            calls.append(1)
            if len(calls) >= nth:  # and nothing is cleaned up
                raise Killed
            return real(*words, **options)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, dying)
            try:
                made(out, overwrite=True)
            except Killed:
                seen.add(nth)
        # the next command finds all of one of them, and nothing of it is in the way
        if out.exists():
            visible = [name for name in names(out) if not name.startswith(".")]
            assert visible in (["made.json", "old.png"], ["made.json", "new.png"])
        else:
            assert how == "third"
        made(out, "next", overwrite=True)
        assert names(out.parent) == ["out", "out/made.json", "out/next.png"]
    assert seen or (how, name) == ("exchange", "replace")  # of which there is none


def test_one_process_at_a_time(tmp_path):
    with output.folder(tmp_path / "out", records=RECORDS):
        told = []

        def second():
            for option in ({}, {"overwrite": True}):
                with pytest.raises(UserError) as error:
                    made(tmp_path / "out", **option)
                told.append(str(error.value))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert len(told) == 2 and all(f"in use by process {os.getpid()} " in t for t in told)
    made(tmp_path / "out", overwrite=False)


def test_a_lock_file_that_is_removed_meanwhile_is_none(tmp_path, monkeypatch):
    real, calls = os.fstat, []

    def fstat(number):
        if not calls:  # another process ended in this moment
            calls.append(1)
            (tmp_path / ".out.lock").unlink()
        return real(number)

    monkeypatch.setattr(os, "fstat", fstat)
    with output.folder(tmp_path / "out", records=RECORDS):
        assert calls and (tmp_path / ".out.lock").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_once_and_works(tmp_path, monkeypatch, capsys, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_unlocked", set())
    with runs.lock(tmp_path / "run"), runs.lock(tmp_path / "run"):
        made(tmp_path / "out")
    said = capsys.readouterr().err
    assert said.count("has no locks") == 1 and "in use" not in said


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_only_a_lock_that_is_held_is_in_use(tmp_path, monkeypatch, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for hold in (lambda: runs.lock(tmp_path / "run"), lambda: output.file(tmp_path / "a.npz")):
        with pytest.raises(UserError, match="in use by"), hold():
            pass


def test_a_growing_folder_is_filled_in_place_and_replaced_whole(tmp_path):
    def grown(found, fail=False, **options):
        about = dict(records={"run.json": ("seed",)}, record="run.json")
        with output.growing(tmp_path / "out", **about, **options) as out:
            assert out.claim({"seed": found}) in (True, False)
            with open(out.path / "text", "a") as file:
                file.write(str(found))
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grown(1, fail=True)
    assert names(tmp_path / "out") == ["run.json", "text"]
    with pytest.raises(UserError, match="seed: 1 there, 2 here"):
        grown(2)
    grown(1)
    with pytest.raises(KeyboardInterrupt):
        grown(2, fail=True, overwrite=True)
    assert (tmp_path / "out" / "text").read_text() == "11"
    grown(2, overwrite=True)
    assert (tmp_path / "out" / "text").read_text() == "22"
    assert names(tmp_path) == ["out", "out/run.json", "out/text"]
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "a.jpg").write_text("")
    with pytest.raises(UserError, match="holds a.jpg of something else"):
        with output.growing(tmp_path / "photographs", records=RECORDS):
            pass
    assert names(tmp_path / "photographs") == ["a.jpg"]


def test_a_file_appears_whole_and_is_replaced_on_request(tmp_path):
    out = tmp_path / "deep" / "a.npz"
    with output.file(out) as file:
        assert file.name == "a.npz" and file.parent.parent == out.parent
        file.write_text("old")
        assert not out.exists()
    with pytest.raises(UserError, match="there already"), output.file(out):
        pass
    with pytest.raises(ZeroDivisionError), output.file(out, overwrite=True) as file:
        file.write_text("half")
        file.with_suffix(".part").write_text("what a writer leaves")
        raise ZeroDivisionError
    assert out.read_text() == "old" and names(tmp_path / "deep") == ["a.npz"]
    with pytest.raises(UserError, match="is none"):
        with output.file(out, overwrite=True, own=lambda file: False):
            pass
    with output.file(out, overwrite=True) as file:
        file.write_text("new")
    assert out.read_text() == "new" and names(tmp_path / "deep") == ["a.npz"]


def test_lines_are_added_whole_to_lines_alone(tmp_path):
    out = tmp_path / "deep" / "a.jsonl"
    for number in range(2):
        with output.lines(out) as records:
            records.append({"number": number})
    with pytest.raises(ZeroDivisionError), output.lines(out):
        raise ZeroDivisionError
    assert out.read_text() == '{"number": 0}\n{"number": 1}\n'
    with pytest.raises(ZeroDivisionError), output.lines(tmp_path / "other" / "b.jsonl"):
        raise ZeroDivisionError
    assert not (tmp_path / "other").exists()
    for text in ('{"number": 0}\n{"numb', "my thesis\n"):
        out.write_text(text)
        with pytest.raises(UserError, match="does not end in one"), output.lines(out):
            pass
        assert out.read_text() == text
    if pathlib.Path("/dev/full").exists():
        with pytest.raises(UserError, match="cannot write /dev/full: no space left"):
            with output.lines("/dev/full") as records:
                records.append({})


@pytest.mark.long
def test_a_process_that_is_killed_lets_go_of_its_place(tmp_path):
    for at in ("unlink 1 exchange", "rmtree 1 exchange", "replace 2 third", "rmtree 1 third"):
        made(tmp_path / "out", "old", overwrite=(tmp_path / "out").exists())
        words = [sys.executable, "-c", KILLED, tmp_path / "out", *at.split()]
        killed = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert killed.returncode < 0, at
        made(tmp_path / "out", "next", overwrite=True)
        assert names(tmp_path) == ["out", "out/made.json", "out/next.png"]


def test_braces_in_a_path_are_no_place_for_who_holds_it():
    path = "runs/{0} and {}"
    assert locks.plain(path).format("process 7") == path
    assert locks.in_use(path, "--out").format("process 7").startswith(f"{path} is in use by pro")
