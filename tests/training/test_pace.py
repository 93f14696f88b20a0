"""What a run logs of its pace, and when; and the trace of some of its steps."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from tests.training import test_safeguards
from tokgen import chips, errors, flops, metrics_log
from tokgen.config import reading
from tokgen.training import fields, pace as paces, trace as traces

# ---------------------------------------------------------------- operations of a step


def loss(policy, weights, x):
    """Two layers in a scan, under a policy of remat."""
    layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    if policy is not None:
        layer = jax.checkpoint(layer, policy=policy)
    return jnp.sum(jax.lax.scan(layer, x, weights)[0])


def stepped(policy, weights, x):
    gradient = jax.grad(functools.partial(loss, policy))(weights, x)
    with jax.named_scope("optimizer"):
        gradient = gradient @ gradient
    return weights - gradient, {}


POLICIES = jax.checkpoint_policies


@pytest.mark.parametrize(
    "policy",
    [None, POLICIES.nothing_saveable, POLICIES.dots_saveable],
    ids=["none", "full", "dots"],
)
def test_what_is_computed_again_is_no_work_of_the_model(policy):
    weights, x = jnp.ones((2, 8, 8)), jnp.ones((4, 8))
    step = jax.jit(functools.partial(stepped, policy))
    product = 2 * 4 * 8 * 8
    # a forward product and two backwards, but of the first layer's input none: scans have it
    assert flops.of_training(step, weights, x) == 2 * 3 * product
    again = 2 * product if policy is POLICIES.nothing_saveable else 0
    muon = 2 * 2 * 8 * 8 * 8
    assert flops.of(step, weights, x) == 2 * 3 * product + again + muon


def test_a_step_is_traced_once_for_its_operations_and_its_call():
    traced = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(weights, x):
        traced.append(1)
        return weights @ x, {}

    weights, x = jnp.ones((8, 8)), jnp.ones((8, 8))
    assert flops.of_training(step, weights, x) == 2 * 8**3
    step(weights, x)
    assert len(traced) == 1


# ---------------------------------------------------------------- clocks


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@dataclasses.dataclass
class Device:
    """A device of a kind whose rate is known."""

    device_kind: str = "TPU v5 lite"
    process_index: int = 0

    def memory_stats(self):
        return {"peak_bytes_in_use": 3e9, "bytes_in_use": 1e9}


def test_figures_are_those_of_the_steps_between_two_reports():
    clock = Clock()

    def took(seconds, found=None):
        clock.now += seconds
        return found

    pace = paces.Pace(16, [Device(), Device()], clock=clock)
    product = jax.jit(lambda x: (x @ x, {}))
    work, x = 2 * 8**3, jnp.ones((8, 8))
    took(50)  # loading, compiling
    for step in range(1, 8):
        pace.waits(took, 1.0)
        pace.calls(product, x)
        if step == 1:
            took(3)
            assert pace.figures((16, work)) == {
                **{"images_per_second": 16 / 3, "waited": 0.0, "memory_gb": 3.0},
                "mfu": pytest.approx(work / 3 / (2 * chips.CHIPS["v5e"].flops)),
            }
            continue
        took(3)
        if step == 5:
            counted = pace.counted()
        if step == 6:
            found = pace.figures(counted)
    # four steps, in the time of five waits and of as many steps: the sixth is under way
    assert found["images_per_second"] == 4 * 16 / 20 and found["waited"] == 5 / 20
    assert found["mfu"] == pytest.approx(4 * work / 20 / (2 * chips.CHIPS["v5e"].flops))
    pace.again()  # a step was saved
    took(7)
    assert pace.figures(pace.counted()) == {"memory_gb": 3.0}


def test_a_chip_without_a_rate_has_no_utilization():
    pace = paces.Pace(16, jax.devices()[:1])
    for _ in range(2):
        pace.calls(jax.jit(lambda x: (x, {})), jnp.ones(3))
        found = pace.figures(pace.counted())
    assert "mfu" not in found and found["memory_gb"] > 0.05


# ---------------------------------------------------------------- a run


@pytest.mark.usefixtures("one_device")
def test_figures_are_read_while_the_next_step_is_under_way(tmp_path, monkeypatch, capfd):
    """But where it is saved, and at the end: then nothing is left unsaid."""
    said, log = [], metrics_log.Log.scalars
    calls = paces.Pace.calls

    def called(self, *given):
        said.append("step")
        return calls(self, *given)

    def scalars(self, step, values, *, split="train"):
        said.append((split, step))
        log(self, step, values, split=split)

    monkeypatch.setattr(paces.Pace, "calls", called)
    monkeypatch.setattr(metrics_log.Log, "scalars", scalars)
    overrides = ("steps=5", "report.save=3", "profile=(2, 3)", "discriminator.weight=0.0")
    test_safeguards.train(tmp_path, *overrides)
    assert said == [
        *("step", "step", ("train", 1), "step", ("train", 2), ("train", 3), ("held_out", 3)),
        *("step", "step", ("train", 4), ("train", 5), ("held_out", 5)),
    ]
    records = [r for r in metrics_log.read(tmp_path) if r["split"] == "train"]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    for record in records:
        assert record["images_per_second"] > 0 and record["memory_gb"] > 0
        assert 0 <= record["waited"] <= 1 and "mfu" not in record
    files = [file for file in (tmp_path / "profile").rglob("*") if file.is_file()]
    assert {"xplane.pb", "trace.json.gz"} <= {file.name.partition(".")[2] for file in files}
    assert f"in {tmp_path / 'profile'}: open it with" in capfd.readouterr().err


@pytest.mark.parametrize("profile", [(3,), (3, 2), (0, 2), (1, 10**6), (1, 2, 3)])
def test_a_trace_is_of_steps_of_the_run(profile):
    with pytest.raises(errors.UserError, match="profile"):
        settings = reading.load("configs/tokenizer/shapes.py", (f"profile={profile}",))
        fields.check_tokenizer(settings)


def test_no_trace_into_a_bucket():
    with pytest.raises(errors.UserError, match="bucket"):
        traces.Trace((1, 2), pathlib.Path("gs://bucket/run"))
    traces.Trace((), pathlib.Path("gs://bucket/run")).stop()


def test_a_trace_of_steps_that_lie_behind_is_said(tmp_path, capfd):
    trace = traces.Trace((2, 3), tmp_path)
    trace.told(2)
    assert not capfd.readouterr().err
    trace.told(3)
    assert "profile=(2, 3) has no effect: the run goes on after step 3" in capfd.readouterr().err
