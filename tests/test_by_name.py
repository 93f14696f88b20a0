"""As a user has it: the wheel in an environment of its own, a hub on the loopback, one command.

The zoo of that environment has a file more, with rows for the small files of this test under the
published names: what is imported is what its rows say.
"""

import dataclasses
import os
import pathlib
import signal
import site
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import loopback, published

ROOT = pathlib.Path(__file__).resolve().parents[1]
FAMILIES = ("llamagen-b", "rar-b", "var-d16", "maskbit-14bit")  # raster, random, next scale, masked


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(rows, files) of a model of each family and their tokenizers."""
    return published.rows(tmp_path_factory.mktemp("files"), *FAMILIES)


@pytest.fixture(scope="module")
def program(made, tmp_path_factory) -> pathlib.Path:
    """The console program of the wheel, in an environment with the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run = dict(check=True, cwd=ROOT, capture_output=True, timeout=300)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], **run
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], **run)
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--quiet", str(wheel)], **run)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    rows = {name: dataclasses.asdict(row) for name, row in made[0].items()}
    text = f"from tokgen.zoo.model import Model\nROWS = {rows!r}\n"
    text += "MODELS = {name: Model(**row) for name, row in ROWS.items()}\n"
    (packages / "tokgen" / "zoo" / "zz_small.py").write_text(text)
    return folder / "env" / "bin" / "tokgen"


@pytest.fixture
def hub(made):
    with loopback.serving() as found:
        found.files |= made[1]
        yield found


@pytest.fixture
def call(program, hub, tmp_path):
    """`tokgen WORDS` in an empty folder, with an empty home; more of its environment by name."""
    (tmp_path / "here").mkdir()

    def called(*words, start=subprocess.run, **more):
        kept = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "NPROC"))}
        named = dict(HOME=str(tmp_path / "home"), PATH="/usr/bin:/bin", HF_ENDPOINT=hub.address)
        how = dict(timeout=280) if start is subprocess.run else {}
        return start(
            [str(program), *words],
            **dict(cwd=tmp_path / "here", env=kept | named | more, text=True, **how),
            **dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE),
        )

    return called


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_from_nothing_to_a_picture_with_one_command_and_then_without_a_network(
    name, call, hub, made, tmp_path
):
    rows, _ = made
    words = ("sample", name, "--classes", "207", "--number", "1", "--out")
    done = call(*words, "one")
    assert done.returncode == 2 and "add --yes" in done.stderr and hub.requests == []
    done = call(*words, "one", "--yes")
    assert done.returncode == 0, done.stderr
    files = {rows[one].file for one in (name, rows[name].tokenizer)}
    assert {pathlib.PurePosixPath(request.path).name for request in hub.requests} == files
    # of each file: is it there, what is it, where is it, the file itself
    assert [r.method for r in hub.requests] == ["HEAD"] * 2 + 2 * ["HEAD", "GET", "GET"]
    hub.requests.clear()
    done = call(*words, "two", HF_ENDPOINT=loopback.nobody(), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    one, two = (np.load(tmp_path / "here" / out / "samples.npz") for out in ("one", "two"))
    assert one["arr_0"].shape == (1, 8, 8, 3) and (one["arr_1"] == 207).all()
    np.testing.assert_array_equal(one["arr_0"], two["arr_0"])
    assert sorted(os.listdir(tmp_path / "here")) == ["one", "two"]


@pytest.mark.long
def test_a_download_that_is_killed_is_gone_on_with(call, hub, made):
    row = made[0]["var-tokenizer"]
    hub.stalls = 120.0
    killed = call("pull", "var-tokenizer", "--yes", start=subprocess.Popen)
    while not [line for line in hub.asked() if line.startswith("GET /stored")]:
        time.sleep(0.05)
    time.sleep(1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    hub.stalls = 0.0
    hub.requests.clear()
    done = call("pull", "var-tokenizer", "--yes")
    assert done.returncode == 0, done.stderr
    assert hub.requests[-1].headers["range"].startswith("bytes=")
    assert "are here already; going on" in done.stderr and row.size > loopback.LARGE


@pytest.mark.long
@pytest.mark.parametrize("seconds", [0.0, 0.7, 1.5])
def test_an_import_that_is_killed_is_made_anew(seconds, call, hub):
    killed = call("pull", "var-d16", "--yes", start=subprocess.Popen)
    for line in killed.stderr:
        if line.startswith("var-tokenizer: importing"):
            break
    time.sleep(seconds)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    fetched = hub.asked()
    done = call("pull", "var-d16", "--yes")
    assert done.returncode == 0, done.stderr
    again = [line for line in hub.asked()[len(fetched) :] if line in fetched]
    assert not [line for line in again if line.startswith("GET")]  # nothing is fetched twice
    assert call("checkpoint", "var-d16", "--verify").returncode == 0
    assert call("checkpoint", "var-tokenizer", "--verify").returncode == 0


@pytest.mark.long
def test_two_processes_at_once(call, hub):
    both = [call("pull", "var-d16", "--yes", start=subprocess.Popen) for _ in range(2)]
    told = [process.communicate(timeout=250)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert len([line for line in hub.asked() if line.startswith("GET /stored")]) == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (dict(alters=True), "is not what"),
        (dict(status=403), "does not give"),
        (dict(status=404), "it was moved or removed"),
        (dict(location="ftp://127.0.0.1"), "an address that cannot be read"),
    ],
)
def test_a_fault_of_the_hub_is_one_message(fault, words, call, hub, tmp_path):
    for name, value in fault.items():
        setattr(hub, name, value)
    done = call("pull", "var-d16", "--yes")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert words in done.stderr.splitlines()[-1]
    models = tmp_path / "home" / ".cache" / "tokgen" / "models"
    assert [path for path in models.rglob("*") if path.is_file()] == []
