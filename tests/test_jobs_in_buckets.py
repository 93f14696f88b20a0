"""Jobs whose paths lie in a bucket, as users start them: train, kill, go on, draw."""

import pathlib
import re
import signal

import numpy as np
import pytest

from tests import test_processes as jobs
from tokgen import storage
from tokgen.checkpoints import checkpoint, run as runs

pytestmark = pytest.mark.long
STEPS = ["--config.steps=9"]


def manifest(workdir):
    (step,) = [s for s in checkpoint.steps(workdir / "checkpoints") if s == 9]
    return checkpoint.read_meta(workdir / "checkpoints" / str(step))["manifest"]


FAILS = """
import runpy, sys
from tokgen.errors import UserError
from tokgen.training import train_state
def give_up(values, step):
    if step == 5:
        raise UserError("step 5 fails")
train_state.give_up = give_up
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def failing(words):
    """A run that ends in an error before its first save: what it logged is in the bucket."""
    words = [*words, "--config.steps=9", "--config.report.save=9"]
    with jobs.Job(words, devices=1, program=FAILS) as job:
        codes, (said,) = job.end(120)
    assert codes == [2] and "error: step 5 fails" in said, said
    workdir = storage.path(words[words.index("--workdir") + 1])
    assert [line["step"] for line in jobs.lines(workdir)] == [1, 2, 3, 4, 5]
    assert "lock" not in storage.names(workdir)


def _figures(said):
    """What evaluate printed, without what it said on the way."""
    return [line for line in said.splitlines() if re.match(r"[a-z]\w+ +(-?[\d.e-]+|none)$", line)]


def test_a_run_that_is_killed_goes_on_to_the_bits_of_one_that_was_not(bucket, tmp_path):
    """A job is refused while another lives, and takes the place of one that is dead."""
    jobs.done([*jobs.TOKENIZER, *STEPS, "--workdir", tmp_path / "run"], devices=1)
    remote = storage.path(bucket) / "run"
    words = [*jobs.TOKENIZER, *STEPS, "--workdir", remote]
    with runs.lock(remote), jobs.Job(words, devices=1) as job:
        codes, (said,) = job.end(120)
    assert codes == [2], said
    assert re.search(r"is in use by process \d+ on .* until \d\d:\d\d:\d\d UTC; wait", said)
    with jobs.Job(words, devices=1) as job:
        jobs.waited(job, "step 3: held out")
        job.processes[0].kill()
    assert (remote / "lock").exists()  # it left its lease behind
    assert 3 <= max(checkpoint.steps(remote / "checkpoints")) < 9
    (said,) = jobs.done(words, devices=1)
    assert "is held by process" in said and "resumed step" in said
    jobs.same(remote, tmp_path / "run")
    assert manifest(remote) == manifest(tmp_path / "run")
    there = storage.names(remote)
    assert {"checkpoints", "curves.png", "images", "metrics.jsonl", "tensorboard"} <= set(there)
    assert "lock" not in there
    assert not pathlib.Path(jobs.ROOT, "gs:").exists()


def test_what_was_logged_before_an_error_is_kept(bucket):
    """The minute before is what one looks at; no save has come yet."""
    failing([*jobs.TOKENIZER, "--workdir", f"{bucket}/run"])


def test_tokens_and_a_generator_of_two_processes_in_a_bucket(bucket, tmp_path):
    """All of it in the bucket, and drawn from there: the images of a copy on this host."""
    tokenizer, tokens, run = (f"{bucket}/{name}" for name in ("tokenizer", "tokens", "run"))
    jobs.done([*jobs.TOKENIZER, "--config.steps=3", "--workdir", tokenizer])
    pretokenize = ["-m", "tokgen.cli", "pretokenize", "--tokenizer", tokenizer, "--out"]
    jobs.done([*pretokenize, tokens], processes=2, devices=4)
    jobs.done([*pretokenize, tmp_path / "tokens"])
    there = storage.path(tokens)
    assert {n: (there / n).read_bytes() for n in storage.names(there)} == jobs.files(
        tmp_path / "tokens"
    )
    words = [*jobs.GENERATOR, f"--config.data.tokens={tokens}", "--workdir", run]
    with jobs.Job([*words, "--config.steps=2000"], processes=2, devices=4) as job:
        jobs.waited(job, "step 3: held out")  # and both are killed
    with jobs.Job([*words, "--config.steps=2000"], processes=2, devices=4) as job:
        jobs.waited(job, ": held out nats")
        assert "is held by process" in job.said()[0]
        job.processes[1].send_signal(signal.SIGTERM)
        codes, texts = job.end()
    assert codes == [143, 143], "\n".join(texts)
    (step,) = re.findall(r"step (\d+) of 2000 .*is saved", texts[0])
    assert checkpoint.steps(storage.path(run) / "checkpoints")[-1] == int(step)
    (said,) = jobs.done([*words, f"--config.steps={int(step) + 2}"])  # one goes on
    assert f"resumed step {step} of {run}" in said
    for name, size in storage.sizes(storage.path(bucket)).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if not name.startswith("tokens"):
            storage.download(storage.path(bucket) / name, tmp_path / name)
            assert (tmp_path / name).stat().st_size == size
    draw = ["-m", "tokgen.cli", "sample", "--number", "2", "--classes", "disc,ring"]
    jobs.done([*draw, run, "--out", tmp_path / "ours"])
    jobs.done([*draw, tmp_path / "run", "--out", tmp_path / "theirs"])
    ours, theirs = (np.load(tmp_path / name / "samples.npz") for name in ("ours", "theirs"))
    np.testing.assert_array_equal(ours["arr_0"], theirs["arr_0"])
    for name in ("run", "tokenizer"):  # measured and written for others as the copies are
        evaluate = ["-m", "tokgen.cli", "evaluate", "--images", "8"]
        told = [jobs.done([*evaluate, at])[0] for at in (f"{bucket}/{name}", tmp_path / name)]
        assert _figures(told[0]) == _figures(told[1]) != []
        for at, out in ((f"{bucket}/{name}", "ours"), (tmp_path / name, "theirs")):
            words_ = ["-m", "tokgen.cli", "export", at, "--out", tmp_path / f"{out}-{name}"]
            jobs.done(words_)
        ours, theirs = (jobs.files(tmp_path / f"{out}-{name}") for out in ("ours", "theirs"))
        assert ours.keys() == theirs.keys() == {"config.json", "model.safetensors"}
        assert ours["model.safetensors"] == theirs["model.safetensors"]
    failing([*words[:-1], f"{bucket}/failed"])
    with jobs.Job([*draw, run, "--out", f"{bucket}/samples"]) as job:
        codes, (said,) = job.end()
    assert codes == [2] and "--out: results of this command must be local files" in said
    with jobs.Job([*words[:-1], "s3://bucket/run"]) as job:
        codes, (said,) = job.end()
    assert codes == [2] and "s3://bucket/run: need a local path or gs://BUCKET/FOLDER" in said
    assert not list(pathlib.Path(jobs.ROOT).glob("*:"))
