"""Jobs of several processes on one machine: the programs as users start them, beside one process.

Each process has CPU devices of its own, and all talk over localhost as hosts of a pod do.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from tests import recipes

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", tempfile.gettempdir())) / "tokgen"
pytestmark = pytest.mark.long

# As jax.make_mesh orders the chips of v5e:4x4: no process has rows that follow each other
PERMUTED = """
import sys, runpy
import jax, numpy as np
def make_mesh(sizes, axes, *, axis_types, devices=None):
    found = jax.devices() if devices is None else devices
    found = np.array(found)[[0, 4, 1, 5, 2, 6, 3, 7]] if len(found) == 8 else np.array(found)
    return jax.sharding.Mesh(found.reshape(sizes), axes, axis_types=axis_types)
jax.make_mesh = make_mesh
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TOKENIZER = [
    *("train_tokenizer.py", "--config", "configs/tokenizer/shapes.py"),
    *("--config.steps=6", "--config.batch_size=16", "--config.held_out.images=20"),
    *("--config.report.scalars=1", "--config.report.save=3"),
    *("--config.encoder.widths=(16,)", "--config.decoder.widths=(16,)"),
    *("--config.encoder.blocks=1", "--config.decoder.blocks=1"),
]
GAN = ["--config.discriminator.weight=0.1", "--config.discriminator.start=0.3"]
GAN += ["--config.discriminator.network.width=8"]
GENERATOR = [
    *("train_generator.py", "--config", "configs/generator/shapes.py"),
    *("--config.steps=6", "--config.batch_size=16", "--config.held_out.images=20"),
    *("--config.report.scalars=1", "--config.report.save=3", "--config.held_out.samples=0"),
    *("--config.generator.width=32", "--config.generator.depth=2", "--config.generator.heads=8"),
]


class Job:
    """The processes of one job, and what they print."""

    def __init__(self, words, *, processes=1, devices=8, differing=(), permuted=False, wait=60):
        address = f"localhost:{_port()}"
        start = [sys.executable, *(["-c", PERMUTED] if permuted else [])]
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "NPROC": "32",
            "TOKGEN_CACHE": str(CACHE),
            "JAX_PLATFORMS": "cpu",
        }
        environment.pop("XLA_FLAGS", None)
        self.logs = [tempfile.TemporaryFile("w+") for _ in range(processes)]  # noqa: SIM115
        self.processes = []
        for index, log in enumerate(self.logs):
            who = ["--coordinator", address, "--processes", processes, "--process", index]
            own = differing[index] if differing else []
            who = [*who, "--wait", wait] if processes > 1 else []
            self.processes.append(
                subprocess.Popen(
                    [*start, *map(str, [*words, *who, *own])],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )

    def end(self, seconds=400):
        """(exit codes, what each printed)."""
        until = time.monotonic() + seconds
        codes = [process.wait(max(1, until - time.monotonic())) for process in self.processes]
        return codes, self.said()

    def said(self):
        texts = []
        for log in self.logs:
            log.seek(0)
            texts.append(log.read())
        return texts

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


def _port():
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return opened.getsockname()[1]


def done(words, **how):
    with Job(words, **how) as job:
        codes, texts = job.end()
    assert codes == [0] * len(codes), "\n".join(texts)
    return texts


def lines(workdir):
    """What a run logged, without its clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def same(left, right):
    left, right = lines(left), lines(right)
    assert [line.keys() for line in left] == [line.keys() for line in right] and left
    for ours, theirs in zip(left, right, strict=True):
        for name, value in ours.items():
            near = value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-6)
            assert theirs[name] == near, (name, ours, theirs)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A work directory of one process of eight devices."""
    path = tmp_path_factory.mktemp("one") / "tokenizer"
    done([*TOKENIZER, *GAN, "--workdir", path])
    return path


@pytest.fixture(scope="module")
def tokens(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    done(["-m", "tokgen.cli", "pretokenize", "--tokenizer", tokenizer, "--out", path])
    return path


@pytest.mark.parametrize("processes, permuted", [(2, False), (4, True)])
def test_processes_train_a_gan_as_one_does(processes, permuted, tokenizer, tmp_path):
    words = [*TOKENIZER, *GAN, "--workdir", tmp_path / "run"]
    texts = done(words, processes=processes, devices=8 // processes, permuted=permuted)
    same(tmp_path / "run", tokenizer)
    assert "started a new run" in texts[0]
    assert not [text for text in texts[1:] if "step" in text]  # one speaks


@pytest.mark.parametrize(
    "processes, permuted, mesh, strategy",
    [
        (2, False, (8, 1, 1), "data"),
        (2, False, (1, 1, 8), "tensor"),  # every process has all rows
        (4, True, (2, 2, 2), "tensor"),
        (2, True, (2, 4, 1), "fsdp"),
    ],
)
def test_processes_train_a_generator_as_one_does(
    processes, permuted, mesh, strategy, tokens, tmp_path
):
    words = [*GENERATOR, f"--config.data.tokens={tokens}"]
    sizes = [
        f"--config.mesh.{n}={s}" for n, s in zip(("data", "fsdp", "tensor"), mesh, strict=True)
    ]
    words += [*sizes, f"--config.strategy={strategy}"]
    done([*words, "--workdir", tmp_path / "one"])
    how = dict(processes=processes, devices=8 // processes, permuted=permuted)
    done([*words, "--workdir", tmp_path / "many"], **how)
    same(tmp_path / "many", tmp_path / "one")


def waited(job, words, seconds=300):
    """Until the first process has printed some words."""
    until = time.monotonic() + seconds
    while words not in job.said()[0]:
        assert time.monotonic() < until and job.processes[0].poll() is None, job.said()[0]
        time.sleep(0.2)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_job_that_is_asked_to_end_saves_one_step(asked, tokenizer, tmp_path):
    """Whichever process hears it; the run then goes on with another number of processes."""
    words = [*TOKENIZER, *GAN, "--workdir", tmp_path / "run"]
    with Job([*words, "--config.steps=2000"], processes=2, devices=4) as job:
        waited(job, "step 3: held out")
        job.processes[asked].send_signal(signal.SIGTERM)
        codes, texts = job.end()
    assert codes == [143, 143], "\n".join(texts)
    (step,) = re.findall(r"step (\d+) of 2000 .*is saved", texts[0])
    saved = [int(f.name) for f in (tmp_path / "run" / "checkpoints").iterdir() if f.name.isdigit()]
    assert max(saved) == int(step)
    with Job([*words, f"--config.steps={int(step) + 2}"]) as job:
        codes, texts = job.end()
    assert codes == [0] and f"resumed step {step}" in texts[0], texts


def test_a_job_ends_when_one_of_its_processes_is_killed(tmp_path):
    words = [*TOKENIZER, "--config.steps=2000", "--workdir", tmp_path / "run"]
    with Job(words, processes=2, devices=4) as job:
        waited(job, "step 3: held out")
        job.processes[1].kill()
        began = time.monotonic()
        codes, _ = job.end(60)
    assert codes[0] not in (0, None) and time.monotonic() - began < 60
    last = ["--config.steps=2002", "--workdir", tmp_path / "run"]
    with Job([*TOKENIZER, *last]) as job:  # one process goes on where two were
        waited(job, "resumed step 3")


@pytest.mark.parametrize(
    "differing, found",
    [
        ([[], ["--config.seed=3"]], "config.seed: 0 (process 0), 3 (process 1)"),
        ([["--config.data.count=900"], []], "config.data"),
        ([[], ["--accept-data"]], "option.accept_data: false (process 0), true (process 1)"),
    ],
)
def test_processes_that_were_not_started_alike_end_with_one_message(differing, found, tmp_path):
    words = [*TOKENIZER, "--workdir", tmp_path / "run"]
    with Job(words, processes=2, devices=4, differing=differing) as job:
        codes, texts = job.end(60)
    errors = [[line for line in text.splitlines() if found in line] for text in texts]
    assert codes == [2, 2] and errors[0] and errors[0] == errors[1], "\n".join(texts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_whose_others_never_come_ends(process, tmp_path):
    """The first by jax, after it has said for whom it waits; another with one message."""
    words = [*TOKENIZER, "--workdir", tmp_path / "run"]
    address = f"localhost:{_port()}"
    words += ["--coordinator", address, "--processes", 2, "--process", process, "--wait", 5]
    with Job(words) as job:
        (code,), (text,) = job.end(60)
    assert f"process {process} of 2, at {address}: waiting up to 5 s" in text
    assert code not in (0, None)
    if process:
        assert code == 2 and "process 0 is not there" in text and "Traceback" not in text, text


def test_a_work_directory_in_use_is_refused_by_all(tmp_path):
    words = [*TOKENIZER, "--config.steps=2000", "--workdir", tmp_path / "run"]
    with Job(words) as first:
        waited(first, "started a new run")
        with Job(words, processes=2, devices=4) as job:
            codes, texts = job.end(60)
    assert codes == [2, 2] and all("is in use by" in text for text in texts), "\n".join(texts)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_processes_pretokenize_as_one_does(tokenizer, tokens, tmp_path):
    words = [
        "-m",
        "tokgen.cli",
        "pretokenize",
        "--tokenizer",
        tokenizer,
        "--out",
        tmp_path / "tokens",
    ]
    done(words, processes=2, devices=4)
    assert files(tmp_path / "tokens") == files(tokens)


def test_processes_draw_as_one_does(tmp_path):
    """Each its part, on its own devices; what one process began, two go on with."""
    recipes.tiny(tmp_path, "raster")
    words = ["-m", "tokgen.cli", "sample", tmp_path / "runs" / "generator", "--total", 96]
    done([*words, "--batch", 16, "--out", tmp_path / "one"])
    done([*words, "--batch", 16, "--part", "1/3", "--out", tmp_path / "two"])
    done([*words, "--batch", 8, "--out", tmp_path / "two"], processes=2, devices=4)
    one, two = (np.load(tmp_path / name / "samples.npz") for name in ("one", "two"))
    assert one["arr_1"].tolist() == two["arr_1"].tolist()
    np.testing.assert_array_equal(*(np.load(tmp_path / n / "tokens.npy") for n in ("one", "two")))
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    with Job([*words[:-2], "--out", tmp_path / "three"], processes=2, devices=4) as job:
        codes, texts = job.end()
    assert codes == [2, 2] and all("say --total" in text for text in texts), texts
