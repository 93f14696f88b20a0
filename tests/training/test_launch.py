"""From a command line to a work directory, one message before any work; how a run hears its end."""

import os
import signal
import sys

import ml_collections
import pytest

from tokgen import runtime
from tokgen.checkpoints import run as runs
from tokgen.interfaces import UserError
from tokgen.training import launch


def test_a_work_directory_is_none_of_what_the_run_reads(tmp_path, capsys):
    settings = ml_collections.ConfigDict({"data": {"name": "folder", "path": str(tmp_path)}})
    (tmp_path / "cat.png").write_text("")
    for inside in (tmp_path, tmp_path / "run"):
        with pytest.raises(UserError, match="--workdir"):
            with runs.lock(inside, launch._pictures(settings, inside)):
                pass
    assert [file.name for file in tmp_path.iterdir()] == ["cat.png"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # one that began before this was said
    assert launch._pictures(settings, tmp_path / "run") == []
    with pytest.raises(SystemExit) as end:
        launch.parse(["--config", "a.py", "--workdir="], "")
    assert end.value.code == 2 and "--workdir: it is empty" in capsys.readouterr().err


def test_a_work_directory_of_another_scheme_is_refused_before_a_folder_is_made(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        launch.parse(["--config", "a.py", "--workdir=s3://bucket/run"], "")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "s3://bucket/run: need a local path or gs://BUCKET" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("yes", [False, True])
def test_checkpoints_of_a_config_may_be_names(yes, tmp_path, monkeypatch):
    """Each field that is a CKPT; what is no name is left alone."""
    pulled, begun = [], []
    monkeypatch.setattr(launch.pulling, "pull", lambda name, yes: pulled.append((name, yes)))
    monkeypatch.setattr(runtime, "devices", lambda batch_size: None)
    words = ["train", "--config", "configs/generator/shapes.py", "--workdir", str(tmp_path / "run")]
    words += ["--config.init_from=rar-b", "--config.data.tokenizer=maskgit-vqgan"]
    monkeypatch.setattr(sys, "argv", [*words, *["--yes"] * yes])
    with pytest.raises(SystemExit) as end:
        launch.run(begun.append, lambda settings: None, "")
    assert end.value.code == 0 and pulled == [("rar-b", yes), ("maskgit-vqgan", yes)]
    (request,) = begun
    assert request.settings.init_from == "rar-b"  # the name stays, and finds its folder anywhere
    teacher = {"teacher": "maskgit-vqgan", "init_from": "runs/other", "data": {}}
    assert "maskgit-vqgan" in launch._checkpoints(ml_collections.ConfigDict(teacher))


# ---------------------------------------------------------------- how a run hears its end

CONFIG = "configs/tokenizer/shapes.py"


@pytest.fixture
def stop(monkeypatch):
    """(a Stop whose signals reach nobody, its clock, what it did to the process)."""
    clock, done = [100.0], []
    monkeypatch.setattr(launch.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(signal, "signal", lambda number, handler: done.append((number, handler)))
    monkeypatch.setattr(os, "kill", lambda process, number: done.append(number))
    made = launch.Stop()
    assert {number for number, _ in done} == {signal.SIGINT, signal.SIGTERM}
    done.clear()
    return made, clock, done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_twice_is_one_request(stop, capfd, number):
    """A terminal and a wrapper both pass it on; after two seconds it means at once."""
    made, clock, done = stop
    assert not made.agreed()
    made._ask(number, None)
    for seconds in (0.0, 1.0, 2.0):
        clock[0] = 100.0 + seconds
        made._ask(number, None)
        made._ask(signal.SIGTERM, None)
    assert made.agreed() and not done
    assert capfd.readouterr().err.count("stopping after this step") == 1
    clock[0] = 102.01
    made._ask(number, None)
    assert done == [(number, signal.SIG_DFL), number]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_was_asked_to_end_says_so_in_its_code(stop, capsys, number, code):
    made, _, _ = stop
    assert runtime.call("prog", lambda: made.end("step 9 of 9 is saved in runs")) == 0
    assert capsys.readouterr().err == "step 9 of 9 is saved in runs\n"
    made._ask(number, None)
    capsys.readouterr()
    assert runtime.call("prog", lambda: made.end("step 3 of 9 is saved in runs")) == code
    said = "prog: step 3 of 9 is saved in runs; the same command goes on from there\n"
    assert capsys.readouterr().err == said


def test_options_beside_the_config():
    words = ["--config", CONFIG, "--workdir", "runs/x"]
    settings, found = launch.parse([*words, "--config.seed=5"], "")
    assert settings.seed == 5 and str(found.workdir) == "runs/x"
    assert found.start is None and not found.accept_data
    _, found = launch.parse([*words, "--from", "3000", "--accept-data"], "")
    assert found.start == 3000 and found.accept_data
    with pytest.raises(SystemExit):
        launch.parse([*words, "--from", "last"], "")
