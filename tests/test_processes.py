"""Jobs of several processes on one machine: the programs as users start them, beside one process.

Each process has CPU devices of its own, and all talk over localhost as hosts of a pod do.
"""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from PIL import Image

from tests import recipes, references
from tokgen import metrics_log, sharding
from tokgen.checkpoints import checkpoint

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
# The program, and beside it which images each step is given: the first byte that tells them apart
# is a hash. STOP=PROCESS,BATCH lets a process have SIGTERM when it asks for its n-th batch.
RECORDED = """
import hashlib, json, os, pathlib, runpy, signal, sys
from tokgen import sharding
laid, seen = sharding.global_batch, []
process = sys.argv[sys.argv.index("--process") + 1] if "--process" in sys.argv else "0"
file = pathlib.Path(os.environ["RECORD"], f"{os.getpid()}.jsonl")
def global_batch(batch, mesh):
    rows = sharding.rows_here(len(batch["image"]) * int(os.environ["PROCESSES"]), mesh)
    images = [hashlib.sha256(image.tobytes()).hexdigest()[:12] for image in batch["image"]]
    seen.append(dict(zip(rows.tolist(), images, strict=True)))
    with file.open("a") as opened:
        print(json.dumps(seen[-1]), file=opened)
    if os.environ.get("STOP") == f"{process},{len(seen)}":
        os.kill(os.getpid(), signal.SIGTERM)
    return laid(batch, mesh)
sharding.global_batch = global_batch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TOKENIZER = [
    *(ROOT / "train_tokenizer.py", "--config", ROOT / "configs/tokenizer/shapes.py"),
    *("--config.steps=6", "--config.batch_size=16", "--config.held_out.images=20"),
    *("--config.report.scalars=1", "--config.report.save=3"),
    *("--config.encoder.widths=(16,)", "--config.decoder.widths=(16,)"),
    *("--config.encoder.blocks=1", "--config.decoder.blocks=1"),
]
GAN = ["--config.discriminator.weight=0.1", "--config.discriminator.start=0.3"]
GAN += ["--config.discriminator.network.width=8"]
GENERATOR = [
    *(ROOT / "train_generator.py", "--config", ROOT / "configs/generator/shapes.py"),
    *("--config.steps=6", "--config.batch_size=16", "--config.held_out.images=20"),
    *("--config.report.scalars=1", "--config.report.save=3", "--config.held_out.samples=0"),
    *("--config.generator.width=32", "--config.generator.depth=2", "--config.generator.heads=8"),
]


class Job:
    """The processes of one job, and what they print.

    Each may have words of its own (`differing`), settings of its environment (`told`), and a folder
    where it runs (`hosts`): relative paths are then as disks of its own.
    """

    def __init__(
        self,
        words,
        *,
        processes=1,
        devices=8,
        differing=(),
        program="",
        told=({},),
        hosts=(ROOT,),
        wait=60,
    ):
        address = f"localhost:{_port()}"
        start = [sys.executable, *(["-c", program] if program else [])]
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "NPROC": "32",
            "TOKGEN_CACHE": str(CACHE),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PROCESSES": str(processes),
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
                    cwd=hosts[index % len(hosts)],
                    env=environment | told[index % len(told)],
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
    return [{k: v for k, v in line.items() if k not in metrics_log.PACE} for line in found]


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


@pytest.mark.parametrize("processes, program", [(2, ""), (4, PERMUTED)], ids=["2", "4"])
def test_processes_train_a_gan_as_one_does(processes, program, tokenizer, tmp_path):
    words = [*TOKENIZER, *GAN, "--workdir", tmp_path / "run"]
    texts = done(words, processes=processes, devices=8 // processes, program=program)
    same(tmp_path / "run", tokenizer)
    assert "started a new run" in texts[0]
    assert not [text for text in texts[1:] if "step" in text]  # one speaks


@pytest.mark.parametrize(
    "processes, program, mesh, strategy",
    [
        (2, "", (8, 1, 1), "data"),
        (2, "", (1, 1, 8), "tensor"),  # every process has all rows
        (4, PERMUTED, (2, 2, 2), "tensor"),
        (2, PERMUTED, (2, 4, 1), "fsdp"),
    ],
    ids=["2 8x1x1", "2 1x1x8", "4 2x2x2", "2 2x4x1"],
)
def test_processes_train_a_generator_as_one_does(
    processes, program, mesh, strategy, tokens, tmp_path
):
    words = [*GENERATOR, f"--config.data.tokens={tokens}"]
    sizes = [
        f"--config.mesh.{n}={s}" for n, s in zip(("data", "fsdp", "tensor"), mesh, strict=True)
    ]
    words += [*sizes, f"--config.strategy={strategy}"]
    # what a run measures meanwhile, each at steps of its own
    references.of_noise(tmp_path / "local.npz", (32, 32), tuple(map(str, range(10))))
    for name, every, preset in (("plain", 2, "no_guidance"), ("guided", 4, "default")):
        given = dict(kind="score", every=every, preset=preset, reference=tmp_path / "local.npz")
        given |= dict(samples=24, metrics="('sfid','precision')", accept="('few',)")
        words += [f"--config.evaluators.{name}.{key}={value}" for key, value in given.items()]
    words += [f"--config.evaluators.nats.{x}" for x in ("kind=likelihood", "every=5", "images=9")]
    done([*words, "--workdir", tmp_path / "one"])
    how = dict(processes=processes, devices=8 // processes, program=program)
    done([*words, "--workdir", tmp_path / "many"], **how)
    same(tmp_path / "many", tmp_path / "one")


def test_a_job_goes_on_from_a_step_where_an_evaluator_was_due(tmp_path):
    """What was measured is not measured again; what was added since is."""
    sizes = ["--config.held_out.images=4", "--config.data.count=200", "--config.report.save=1"]
    words = [*TOKENIZER, *sizes, "--workdir", tmp_path / "run"]
    for steps, name in ((1, "own"), (2, "more")):
        for key in ("kind=reconstruction", "every=1", "images=4", "shown=2"):
            words += [f"--config.evaluators.{name}.{key}"]
        done([*words, f"--config.steps={steps}"], processes=2, devices=1)
    logged = [(line["split"], line["step"]) for line in lines(tmp_path / "run")]
    for name in ("own", "more"):
        assert [step for split, step in logged if split == name] == [1, 2]


def waited(job, words, seconds=300):
    """Until the first process has printed some words."""
    until = time.monotonic() + seconds
    while words not in job.said()[0]:
        assert time.monotonic() < until and job.processes[0].poll() is None, job.said()[0]
        time.sleep(0.2)


STEPS = 12
ENDED = [*TOKENIZER, *GAN, f"--config.steps={STEPS}", "--config.report.save=2"]


class Recorded:
    """A run that is ended and begun again: which image was each row of each step, by its starts."""

    def __init__(self, folder):
        self.folder, self.workdir, self.starts = folder, folder / "run", []

    def start(self, processes, stop="", **how):
        """A job of the run; `ended` is what follows."""
        record = self.folder / f"record-{len(self.starts)}"
        record.mkdir(parents=True)
        self.starts.append((self.saved()[-1] if self.saved() else 0, record))
        return Job(
            [*ENDED, "--workdir", self.workdir],
            program=RECORDED,
            processes=processes,
            devices=8 // processes,
            told=[{"RECORD": str(record), "STOP": stop}],
            **how,
        )

    def saved(self):
        """The steps on the disk, all of them whole."""
        steps = (self.workdir / "checkpoints").glob("*")
        found = [step for step in steps if step.name.isdigit()]
        assert all(map(checkpoint.is_whole, found)), found
        return sorted(int(step.name) for step in found)

    def images(self):
        """{step: {row: image}}; the processes of a start have each row once, and all of them."""
        found = {}
        for begun, record in self.starts:
            for file in record.iterdir():
                for step, line in enumerate(file.read_text().splitlines(), begun + 1):
                    for row, image in json.loads(line).items():
                        found.setdefault((record, step), []).append((int(row), image))
        images = {}
        for (_, step), rows in found.items():
            assert len(rows) == len(dict(rows))
            # a step that was begun before a start was ended is taken again, as it was
            for row, image in rows:
                assert images.setdefault(step, {}).setdefault(row, image) == image
        assert all(sorted(rows) == list(range(16)) for rows in images.values())
        return images

    def state(self):
        """The arrays of its last step."""
        step = checkpoint.find(self.workdir / "checkpoints" / str(STEPS))
        meta, whole = checkpoint.read_meta(step), sharding.replicated(sharding.current())
        wanted = {
            path: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"], sharding=whole)
            for path, entry in meta["manifest"].items()
        }
        return jax.device_get(checkpoint.restore(step, wanted, meta))


def equal(run, whole):
    """A run in parts has the images, the figures and the end of one that nothing ended."""
    images = run.images()
    assert images == whole.images() and sorted(images) == [*range(1, STEPS + 1)]
    same(run.workdir, whole.workdir)
    one, other = run.state(), whole.state()
    assert one.keys() == other.keys()
    for path, array in other.items():
        scale = max(np.abs(array).max(), 1e-6)
        assert np.abs(np.asarray(one[path], np.float64) - array).max() <= 1e-4 * scale, path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing ended, of one process."""
    run = Recorded(tmp_path_factory.mktemp("whole"))
    with run.start(1) as job:
        codes, texts = job.end()
    assert codes == [0], texts
    return run


@pytest.mark.timeout(600)  # five programs
def test_no_sample_is_repeated_or_skipped_over_two_processes_one_and_two(whole, tmp_path):
    """SIGTERM to either of them: all save one step, where the next start goes on."""
    run, step = Recorded(tmp_path), 0
    for processes, stop in [(2, "1,2"), (1, "0,2"), (2, "0,2"), (2, "")]:
        with run.start(processes, stop) as job:
            codes, texts = job.end()
        assert codes == [143 if stop else 0] * processes, "\n".join(texts)
        assert (f"resumed step {step} of" if step else "started a new run") in texts[0]
        (step,) = map(int, re.findall(rf"step (\d+) of {STEPS} is saved", texts[0]))
        assert run.saved()[-1] == step
    assert len({begun for begun, _ in run.starts}) == 4
    equal(run, whole)


@pytest.mark.timeout(600)  # a process that was killed is missed after 20 s
@pytest.mark.parametrize("seed", range(2))
def test_what_ends_at_random_moments_ends_as_what_never_did(seed, whole, tmp_path):
    """Signals to one process or all, before the first step, while it saves, one after another."""
    random_ = random.Random(seed)
    run, told = Recorded(tmp_path), []
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        processes, begun = random_.choice([1, 2]), run.saved()
        with run.start(processes, wait=20) as job:
            who = random_.choice([job.processes, [random_.choice(job.processes)]])
            place, again = random_.choice(["start", "step", "save"]), random_.random() < 0.5
            told.append((number.name, processes, len(who), place, again))
            if place != "start":
                waited(job, "images,")
            until = time.monotonic() + random_.uniform(0, 8 if place == "start" else 2)
            while time.monotonic() < until and job.processes[0].poll() is None:
                if place == "save" and [*run.workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")]:
                    break
                time.sleep(0.002)
            for _ in range(1 + (again and number == signal.SIGTERM)):
                for process in who:
                    process.send_signal(number)
                time.sleep(random_.uniform(0, 4))
            codes, texts = job.end(60)
        said = "\n".join([str(told), *map(str, codes), *texts])
        # 0: it was done before; 1 and an abort: of another process; 2: that never came
        ends = {0, 143, -number, -signal.SIGABRT, 1, *[2] * (place == "start")}
        assert set(codes) <= ends, said
        saved = run.saved()
        assert not begun or saved[-1] >= begun[-1], said
        for step in re.findall(rf"step (\d+) of {STEPS} is saved", texts[0]):
            assert saved[-1] == int(step), said
        if "images," in texts[0]:
            assert (f"resumed step {begun[-1]} of" if begun else "started a new") in texts[0], said
    with run.start(random_.choice([1, 2])) as job:
        codes, texts = job.end()
    assert set(codes) == {0}, "\n".join(texts)
    equal(run, whole)


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


@pytest.fixture
def hosts(tmp_path):
    """Two folders for two processes: what each has on a disk of its own."""
    found = [tmp_path / "host-0", tmp_path / "host-1"]
    for host in found:
        for name in ("cat", "dog"):
            (host / "pictures" / name).mkdir(parents=True)
        for index in range(40):
            array = np.random.default_rng(index).integers(0, 255, (32, 32, 3), np.uint8)
            file = host / "pictures" / ("cat", "dog")[index % 2] / f"{index}.png"
            Image.fromarray(array).save(file)
    return found


FOLDER = ["--config.data.name=folder", "--config.data.path=pictures"]


def _bad_config(hosts, request):
    return dict(differing=[[], ["--config.seed=much"]], found="seed")


def _no_option(hosts, request):
    return dict(differing=[["--no-such-option"], []], found="--no-such-option")


def _no_data(hosts, request):
    shutil.rmtree(hosts[1] / "pictures")
    return dict(differing=[FOLDER, FOLDER], found="pictures")


def _other_data(hosts, request):
    shutil.copy(hosts[0] / "pictures/cat/0.png", hosts[0] / "pictures/cat/1000.png")
    return dict(differing=[FOLDER, FOLDER], found="data: ")


def _other_versions(hosts, request):
    other = hosts[1] / "packages" / "optax-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n")
    paths = os.pathsep.join([str(other.parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return dict(told=[{}, {"PYTHONPATH": paths}], found="version.optax")


def _other_devices(hosts, request):
    return dict(told=[{}, {"JAX_NUM_CPU_DEVICES": "2"}], found="process 1 has 2 cpu")


def _other_platform(hosts, request):
    return dict(told=[{}, {"JAX_PLATFORMS": "cuda"}], found="JAX_PLATFORMS")


def _damaged(hosts, request):
    for host in hosts:
        shutil.copytree(request.getfixturevalue("tokenizer"), host / "run")
    (hosts[1] / "run/checkpoints/6/meta/metadata").write_text("{")
    return dict(differing=[GAN, GAN], found="damaged")


@pytest.mark.parametrize(
    "case",
    [
        *(_bad_config, _no_option, _no_data, _other_data, _other_versions, _other_devices),
        *(_other_platform, _damaged),
    ],
)
def test_what_one_process_finds_ends_all_with_one_message(case, hosts, request):
    """Whatever it is, and whenever before the first step: nobody waits for it."""
    how = case(hosts, request)
    found = how.pop("found")
    with Job([*TOKENIZER, "--workdir", "run"], processes=2, devices=4, hosts=hosts, **how) as job:
        codes, texts = job.end(60)
    errors = [[line for line in text.splitlines() if ": error: " in line] for text in texts]
    assert codes == [2, 2] and len(errors[0]) == 1 and errors[0] == errors[1], "\n".join(texts)
    after = texts[0].partition(errors[0][0])
    assert found in "".join(after[1:]) and after[2] == texts[1].partition(errors[0][0])[2], texts
    assert "Traceback" not in "".join(texts)


def test_a_bug_in_one_process_ends_all(tmp_path):
    """It shows its traceback; the others say which it was."""
    broken = """
import os, runpy, sys
from tokgen import sharding
laid = sharding.global_batch
def global_batch(batch, mesh):
    if sys.argv[sys.argv.index("--process") + 1] == "0":
        raise KeyError("a bug")
    return laid(batch, mesh)
sharding.global_batch = global_batch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    with Job(
        [*TOKENIZER, "--workdir", tmp_path / "run"], processes=2, devices=4, program=broken
    ) as job:
        codes, texts = job.end(60)
    assert codes == [1, 1] and ["Traceback" in text for text in texts] == [True, False], texts
    assert all(re.search(r"process 0 of 2 \(.*\) ended in KeyError", text) for text in texts), texts


def test_images_that_no_process_can_read_end_all_at_one_step(hosts, tmp_path):
    """Those of all together are too many: what was trained is saved, as of one process alone."""
    spoiled = sorted((hosts[0] / "pictures" / "cat").iterdir())[:4]
    spoiling = f"""
import pathlib, runpy, sys
from tokgen import sharding
laid = sharding.global_batch
def global_batch(batch, mesh):
    for file in {list(map(str, spoiled))}:  # they were whole when they were looked at
        pathlib.Path(file).write_bytes(b"none")
    return laid(batch, mesh)
sharding.global_batch = global_batch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    words = [*TOKENIZER, *FOLDER, "--config.steps=60", "--config.report.save=60"]
    words += ["--config.max_bad=2e-4", "--workdir", tmp_path / "run"]  # 2 of 10,000
    with Job(words, processes=2, devices=4, hosts=hosts[:1], program=spoiling) as job:
        codes, texts = job.end()
    assert codes == [2, 2], "\n".join(texts)
    errors = [text[text.index(": error: ") :] for text in texts]
    (step,) = re.findall(r"step (\d+) is saved in", errors[0])
    assert errors[0] == errors[1] and "of them, or 2, may be" in errors[0]
    assert int(step) < 60 and checkpoint.is_whole(tmp_path / "run/checkpoints" / step)


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


@pytest.mark.parametrize(
    "there, ended",
    [([0], 0), ([1], 1), ([0, 1], 1)],
    ids=["the first", "another", "another that has met the first"],
)
def test_a_process_that_waits_for_others_to_come_hears_sigterm(there, ended, tmp_path):
    """It says so in one line, and does not wait as long as the others may take."""
    address = f"localhost:{_port()}"
    words = [*TOKENIZER, "--workdir", tmp_path / "run", "--wait", 300]
    words += ["--coordinator", address, "--processes", 3, "--process"]
    with contextlib.ExitStack() as stack:
        jobs = {process: stack.enter_context(Job([*words, process])) for process in there}
        for job in jobs.values():
            waited(job, "waiting up to 300 s")
        time.sleep(3)
        jobs[ended].processes[0].terminate()
        (code,), (text,) = jobs[ended].end(5)
    first, *others = text.splitlines()
    assert code == 143 and others == ["train_tokenizer.py: terminated"], text
    assert first.startswith(f"process {ended} of 3")


# Process 1 is told late, or never, what lies in the work directory, as by a network's file system
STALE = """
import os, runpy, sys
import orbax.checkpoint as ocp
from tokgen import distributed
from tokgen.checkpoints import checkpoint
from tokgen.training import safeguards
late = int(os.environ["LOOKS"])
distributed.LATE = 3
if sys.argv[sys.argv.index("--process") + 1] == "1":
    load, looks = ocp.CheckpointManager._load_checkpoint_infos, []
    def infos(manager, *args, **how):
        looks.append(1)
        found = load(manager, *args, **how)
        return found[:-1] if len(looks) <= late else found
    ocp.CheckpointManager._load_checkpoint_infos = infos
    checkpoint.steps = lambda folder: []
    checkpoint._noted = lambda step: None
    def _noted(*_):
        return {"returns": 5, "settled": False}
    safeguards._noted = _noted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_what_is_resumed_and_kept_is_what_all_processes_see(tokenizer, tmp_path):
    """Not what each finds by itself: they would go on from different steps, or wait for ever."""
    words = [*TOKENIZER, *GAN, "--config.steps=9"]
    for name in ("one", "many", "never"):
        shutil.copytree(tokenizer, tmp_path / name)
    done([*words, "--workdir", tmp_path / "one"])
    how = dict(processes=2, devices=4, program=STALE)
    texts = done([*words, "--workdir", tmp_path / "many"], told=[{"LOOKS": "4"}], **how)
    assert "resumed step 6 of" in texts[0]
    same(tmp_path / "many", tmp_path / "one")
    one, many = (
        sorted(step.name for step in (tmp_path / name / "checkpoints").iterdir())
        for name in ("one", "many")
    )
    assert one == many
    with Job([*words, "--workdir", tmp_path / "never"], told=[{"LOOKS": "1000"}], **how) as job:
        codes, texts = job.end(60)
    errors = [[line for line in text.splitlines() if ": error: " in line] for text in texts]
    assert codes == [2, 2] and len(errors[0]) == 1 and errors[0] == errors[1], "\n".join(texts)
    assert re.search(r"process 0 finds \[.*6\], process 1 finds \[.*\]; ", errors[0][0])


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


WAITING = """
import sys, time
from tokgen import coordination, runtime
def run():
    runtime.join(sys.argv[1:])
    job = coordination.job()
    long = [str(index) * 5_000_000 for index in range(2)]  # over what a message of the service has
    assert job.exchange("a", long[job.index]) == long
    assert job.of_first("b", long[job.index]) == long[0]
    print("waits", flush=True)
    if job.index == 0:
        time.sleep(100)
    elif "--first" in sys.argv:
        job.of_first("c", "")
sys.exit(runtime.call("prog", run))
"""


@pytest.mark.parametrize("words", [[], ["--first"]], ids=["at its end", "for what the first says"])
def test_a_process_that_waits_for_the_others_hears_sigterm(words):
    with Job(words, processes=2, devices=1, program=WAITING) as job:
        until = time.monotonic() + 60
        while not all("waits" in text for text in job.said()):
            assert time.monotonic() < until, job.said()
            time.sleep(0.1)
        time.sleep(1)
        job.processes[1].terminate()
        codes, texts = job.end(60)
    assert codes == [143, 143] and all("prog: terminated" in text for text in texts), texts
