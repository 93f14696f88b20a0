"""How programs end: one message, and the exit code that says why."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from tokgen import interfaces, runtime

ROOT = pathlib.Path(__file__).resolve().parents[1]


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "prog: interrupted\n"),
        (runtime.Stopped(signal.SIGINT, "step 3 is saved"), 130, "prog: step 3 is saved\n"),
        (runtime.Stopped(signal.SIGTERM, "step 3 is saved"), 143, "prog: step 3 is saved\n"),
        (interfaces.UserError("need, found"), 2, "prog: error: need, found\n"),
    ],
)
def test_codes_and_the_one_line(capsys, error, code, said):
    assert runtime.call("prog", raising(error)) == code
    assert capsys.readouterr().err == said


def test_sigterm_ends_a_command_as_ctrl_c_does(capsys):
    """Files are closed on the way; afterwards the signal is what it was."""
    closed = []

    def run():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(10**6):  # the handler runs between two lines
                pass
        finally:
            closed.append(signal.getsignal(signal.SIGTERM))

    assert runtime.call("prog", run) == 143 and capsys.readouterr().err == "prog: terminated\n"
    assert closed == [signal.SIG_DFL]  # a second one is not waited for
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    mine = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who has one of his own keeps it
    try:
        assert runtime.call("prog", run) == 0 and closed[-1] is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, mine)


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_command_ends_with_the_code_of_its_signal(tmp_path, number, code):
    words = ("demo", "--out", tmp_path / "demo")
    process = subprocess.Popen(
        [sys.executable, "-m", "tokgen.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    said = process.stdout.readline()  # it has begun
    process.send_signal(number)
    said += process.communicate(timeout=300)[0]
    assert process.returncode == code and "Traceback" not in said, said
