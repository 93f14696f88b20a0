"""Safeguards: what the meter shows, when a run stops, and when it goes back."""

import json
import math
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_tokenizer
from tokgen import interfaces, metrics_log, runtime, sharding
from tokgen.checkpoints import checkpoint, loading, run as runs
from tokgen.config import building, reading
from tokgen.data import datasets
from tokgen.evaluation import validation
from tokgen.training import launch, safeguards

# ---------------------------------------------------------------- the meter


def bits_of(tokens, count):
    return (tokens[..., None] >> np.arange(count)) & 1


def test_figures_of_one_alphabet():
    layout = interfaces.TokenLayout((8,), ((2, 3),))
    tokens_BLG = np.array([[0, 0, 1, 2, 2, 2], [0, 0, 1, 2, 2, 0]])[..., None]
    meter = safeguards.Meter(layout)
    meter.add(jnp.asarray(tokens_BLG[:1]))
    meter.add(jnp.asarray(tokens_BLG[1:]))
    found = meter.figures()
    share = np.array([5, 2, 5]) / 12
    assert found["usage"] == 3 / 8 and found["dead_codes"] == 5
    np.testing.assert_allclose(found["perplexity"], np.exp(-(share * np.log(share)).sum()))
    # 12 uniform draws would have touched 8 (1 - e^(-12/8)) codes
    np.testing.assert_allclose(found["reached"], 3 / (8 * (1 - math.exp(-1.5))))
    assert found["idle_bits"] == 1  # nobody uses 4 to 7; the other bits change
    assert set(found) == {"usage", "reached", "perplexity", "dead_codes", "idle_bits"}


def test_figures_forget_what_they_told():
    meter = safeguards.Meter(interfaces.TokenLayout((4,), ((1, 4),)))
    meter.add(jnp.arange(4).reshape(1, 4, 1))
    assert meter.figures()["usage"] == 1
    meter.add(jnp.zeros((1, 4, 1), jnp.int32))
    assert meter.figures()["usage"] == 1 / 4


def test_the_meter_looks_back_on_so_many_symbols(monkeypatch):
    monkeypatch.setattr(safeguards, "KEPT", 12)
    meter = safeguards.Meter(interfaces.TokenLayout((8,), ((1, 4),)))
    for value in range(5):
        meter.add(jnp.full((1, 4, 1), value))
    assert meter.figures()["usage"] == 3 / 8  # the last three
    meter.add(jnp.full((9, 4, 1), 7))  # one that is larger alone is still looked at
    assert meter.figures()["usage"] == 1 / 8


def test_every_scale_has_figures_and_so_have_all_together():
    layout = interfaces.TokenLayout((4,), ((1, 1), (2, 2)))
    tokens_BLG = np.array([[3, 0, 1, 2, 3], [3, 0, 1, 2, 3]])[..., None]
    meter = safeguards.Meter(layout)
    meter.add(jnp.asarray(tokens_BLG))
    found = meter.figures()
    assert (found["usage"], found["usage_0"], found["usage_1"]) == (1, 1 / 4, 1)
    assert (found["dead_codes"], found["dead_codes_0"], found["dead_codes_1"]) == (0, 3, 0)
    share = np.array([2, 2, 2, 4]) / 10
    np.testing.assert_allclose(found["perplexity"], np.exp(-(share * np.log(share)).sum()))
    assert found["perplexity_0"] == 1
    np.testing.assert_allclose(found["perplexity_1"], 4)
    assert (found["idle_bits"], found["idle_bits_0"], found["idle_bits_1"]) == (0, 2, 0)
    reached = [0.25 / (1 - math.exp(-2 / 4)), 1 / (1 - math.exp(-8 / 4))]
    np.testing.assert_allclose([found["reached_0"], found["reached_1"]], reached)
    # a collapse is told by all: the coarsest grid may well need few codes
    np.testing.assert_allclose(found["reached"], 1 / (1 - math.exp(-10 / 4)))


def test_of_several_symbols_the_worst(key):
    layout = interfaces.TokenLayout((4, 6), ((3, 5),))
    first = np.asarray(jax.random.randint(key, (7, 15), 0, 4))
    second = np.asarray(jax.random.randint(jax.random.fold_in(key, 1), (7, 15), 0, 2))
    found = safeguards.measured(np.stack([first, second], -1), layout)
    assert found["usage"] == 2 / 6 and found["dead_codes"] == 4
    share = np.bincount(second.ravel()) / second.size
    np.testing.assert_allclose(found["perplexity"], np.exp(-(share * np.log(share)).sum()))
    assert found["idle_bits"] == 0  # of the alphabet of 4; 6 codes are no words of bits


def test_a_bit_is_idle_when_99_in_a_hundred_agree(key):
    layout = interfaces.TokenLayout((16,), ((20, 50),))
    for ones, idle in ((9, True), (10, False), (990, False), (991, True)):
        tokens = np.asarray(jax.random.randint(key, (1000,), 0, 8))
        tokens = tokens | (8 * (np.arange(1000) < ones))
        found = safeguards.measured(tokens.reshape(1, 1000, 1), layout)
        share = bits_of(tokens, 4).mean(0)
        expected = (np.minimum(share, 1 - share) < 0.01).sum()
        assert found["idle_bits"] == expected == idle


# ---------------------------------------------------------------- the tripwire

FINE = {"reached": 0.5, "perplexity": 9.0}


@pytest.mark.parametrize(
    ("limits", "step", "stops"),
    [
        (dict(), 100, False),  # off
        (dict(usage=0.4), 100, False),
        (dict(usage=0.6), 100, True),
        (dict(usage=0.6, grace=0.1), 10, False),  # the last step that is forgiven
        (dict(usage=0.6, grace=0.1), 11, True),
        (dict(usage=0.6, grace=0.0), 1, True),
        (dict(usage=0.5), 100, False),  # as much as is asked for
    ],
)
def test_the_tripwire(limits, step, stops):
    said = safeguards.collapsed(safeguards.Limits(**limits), FINE, step, 100)
    assert bool(said) == stops
    parts = (f"step {step}", "50.0 %", "perplexity 9.0", "safeguards.usage=0.6", "revive")
    assert all(part in said for part in parts) or not stops


def test_returns_are_counted_and_settled(tmp_path):
    assert safeguards.returned(tmp_path) == 0 and not safeguards.unsettled(tmp_path)
    assert safeguards.note_return(tmp_path) == 1
    assert safeguards.returned(tmp_path) == 1 and safeguards.unsettled(tmp_path)
    safeguards.settle(tmp_path)
    assert safeguards.returned(tmp_path) == 1 and not safeguards.unsettled(tmp_path)
    assert safeguards.note_return(tmp_path) == 2 and safeguards.unsettled(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [safeguards.RETURNS]


def test_worse_compares_with_the_step_before_the_adversarial_term(tmp_path, monkeypatch):
    then = {"l2": 0.2}  # of an older version, which took it from the mean of PSNR
    figures = {4: then | {"l2_error": None}, 5: {"l2": None}, 7: then}
    monkeypatch.setattr(runs, "metrics", lambda run, step: figures.get(step, {}))

    def worse(error, returns=0, play=4, psnr_db=0.0, **limits):
        found = {"l2": error, "l2_error": 0.1, "psnr_db": psnr_db}
        run = types.SimpleNamespace(workdir=tmp_path)
        return train_tokenizer.worse(run, play, found, safeguards.Limits(**limits), returns)

    assert worse(0.41, worse=2.0) and not worse(0.39, worse=2.0)
    assert not worse(100.0, worse=0.0)  # off
    assert worse(0.41, 2, worse=2.0) and not worse(0.41, 3, worse=2.0)  # as often as allowed
    for play in (5, 6):  # nothing to compare with
        assert not worse(0.41, play=play, worse=2.0)
    assert worse(math.nan, worse=2.0)  # no number is worse than any
    assert worse(0.1, play=7, psnr_db=9.9, worse=2.0)  # 0.409 as it was told then
    assert not worse(9.0, play=7, psnr_db=10.1, worse=2.0)


# ---------------------------------------------------------------- whole runs, of a few steps

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = (
    *("data.size=(8, 8)", "data.count=40", "view.size=(8, 8)", "encoder.widths=(16,)"),
    *("decoder.widths=(16,)", "encoder.blocks=1", "decoder.blocks=1", "batch_size=8"),
    *("quantizer.codes=32", "held_out.images=4", "report.scalars=1", "report.save=2"),
    *(
        "keep.latest=9",
        "optimizer.warmup=1",
        "discriminator.network.width=4",
        "discriminator.network.layers=1",
    ),
    *("discriminator.network.norm=none", "safeguards.usage=0.0", "safeguards.worse=0.0", "ema=0.9"),
)
# An adversarial term that is always found worse: the factor is tiny.
BAD = (
    "discriminator.weight=0.5",
    "discriminator.start=0.2",
    "discriminator.warmup=0.3",
    "safeguards.worse=1e-9",
    "steps=7",
)


class Killed(BaseException):
    """As if the process ended."""


def train(workdir, *overrides, back=None, **guards):
    settings = reading.load("configs/tokenizer/shapes.py:vq", (*SMALL, *overrides))
    with settings.unlocked():
        settings.safeguards.update(guards)
    with runs.lock(workdir):
        train_tokenizer.main(launch.Request(settings, workdir, back=back))


def killed(monkeypatch, workdir, *overrides, function, at, module=sharding, **guards):
    """A run that ends before the call number `at` of a function; saves under way are finished."""
    calls, begun = [], []
    whole, start = getattr(module, function), runs.start

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return whole(*arguments, **options)

    def started(*arguments, **options):
        begun.append(start(*arguments, **options))
        return begun[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module, function, counted)
        patch.setattr(runs, "start", started)
        with pytest.raises(Killed):
            train(workdir, *overrides, **guards)
    begun[-1].manager.wait_until_finished()
    begun[-1].manager.close()


def steps_of(workdir):
    folder = workdir / checkpoint.FOLDER
    return sorted(int(step.name) for step in folder.iterdir() if step.name.isdigit())


def entries(workdir, step):
    return checkpoint.read_meta(workdir / checkpoint.FOLDER / str(step))["manifest"]


def test_a_collapsed_run_stops_after_its_grace_and_is_saved(tmp_path):
    with pytest.raises(interfaces.UserError, match="step 3: of the codes"):
        train(tmp_path, "steps=6", "report.save=9", "safeguards.usage=1.0", grace=1 / 3)
    assert steps_of(tmp_path) == [4]  # its figures are read while the next step is under way
    assert [
        record["step"] for record in metrics_log.read(tmp_path) if record["split"] == "train"
    ] == [*(1, 2, 3, 4)]
    assert loading.load_tokenizer(tmp_path).layout.vocab == (32,)


@pytest.fixture(scope="module")
def returned(one_device, tmp_path_factory):
    """A run that goes back twice: to half the discriminator, then to none."""
    workdir = tmp_path_factory.mktemp("returned")
    train(workdir, *BAD, returns=2)
    return workdir


def test_a_bad_gan_ends_without_its_discriminator(returned):
    """Steps 1 to 3 go before it; at 4 it is found worse, twice; then the run ends without it."""
    assert json.loads((returned / safeguards.RETURNS).read_text()) == {
        "returns": 2,
        "settled": True,
    }
    assert steps_of(returned) == [2, 3, 4, 6, 7]
    records = {r["step"]: r for r in metrics_log.read(returned) if r["split"] == "train"}
    assert sorted(records) == [1, 2, 3, 4, 5, 6, 7]
    assert (
        records[3]["adversarial_weight"] == 0
    )  # the discriminator learns, the tokenizer does not hear it
    assert all("adversarial_weight" not in records[step] for step in (4, 5, 6, 7))
    first, last = entries(returned, 3), entries(returned, 7)
    for path, record in first.items():
        moved = record["checksum"] != last[path]["checksum"]
        if path.startswith("discriminator/"):
            assert not moved, path  # left out since step 3
    assert (
        first["model/params/decoder/conv_out/kernel"]
        != (last["model/params/decoder/conv_out/kernel"])
    )


def test_a_run_killed_on_its_way_back_ends_with_the_same_bits(returned, tmp_path, monkeypatch):
    """Noted, not yet undone: the next start undoes it."""
    killed(monkeypatch, tmp_path, *BAD, function="drop_after", at=2, module=runs, returns=2)
    assert json.loads((tmp_path / safeguards.RETURNS).read_text()) == {
        "returns": 2,
        "settled": False,
    }
    assert steps_of(tmp_path)[-1] == 4
    other = shutil.copytree(tmp_path, tmp_path / "other")  # one that is told to go on as it is
    killed(monkeypatch, other, *BAD, function="global_batch", at=1, back=4, returns=2)
    assert steps_of(other)[-1] == 4 and not safeguards.unsettled(other)
    train(tmp_path, *BAD, returns=2)
    assert json.loads((tmp_path / safeguards.RETURNS).read_text()) == {
        "returns": 2,
        "settled": True,
    }
    assert entries(tmp_path, 7) == entries(returned, 7)


def test_what_came_after_a_return_is_not_lost_to_a_kill(returned, tmp_path, monkeypatch, capfd):
    """3 steps, the lost one, the lost one again, 3 more: killed before the next."""
    killed(monkeypatch, tmp_path, *BAD, function="global_batch", at=9, returns=2)
    assert steps_of(tmp_path)[-1] == 6
    capfd.readouterr()
    train(tmp_path, *BAD, returns=2)
    assert "resumed step 6" in capfd.readouterr().err
    assert entries(tmp_path, 7) == entries(returned, 7)


# ---------------------------------------------------------------- where a run ends


def held_out_lines(workdir):
    return [r["step"] for r in metrics_log.read(workdir) if r["split"] == "held_out"]


@pytest.fixture(scope="module")
def undisturbed(one_device, tmp_path_factory):
    """Four steps, saved and measured at 2 and 4."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(workdir, "steps=4")
    return workdir


def test_a_run_that_is_asked_to_end_saves_its_step_and_goes_on(undisturbed, tmp_path, monkeypatch):
    class Asked(launch.Stop):
        times = 0

        def agreed(self):
            self.times += 1
            if self.times == 3:
                self._ask(signal.SIGTERM, None)
            return super().agreed()

    with monkeypatch.context() as patch:
        patch.setattr(launch, "Stop", Asked)
        with pytest.raises(runtime.Stopped, match="step 3 of 4 is saved in .*goes on from there"):
            train(tmp_path, "steps=4")
    assert steps_of(tmp_path) == [2, 3]
    assert held_out_lines(tmp_path) == [2]  # who ends it has no time for figures
    assert checkpoint.find(tmp_path).name == "2"
    train(tmp_path, "steps=4")
    assert entries(tmp_path, 4) == entries(undisturbed, 4)
    assert held_out_lines(tmp_path) == held_out_lines(undisturbed) == [2, 4]


@pytest.mark.parametrize("failure", [interfaces.UserError("a picture is broken"), Killed()])
def test_what_fails_while_measuring_costs_no_step(undisturbed, tmp_path, monkeypatch, failure):
    """It is on disk before; when the run goes on it is measured, and once."""

    def broken(*arguments, **options):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(validation, "reconstruction", broken)
        with pytest.raises(type(failure)) as caught:
            train(tmp_path, "steps=4")
    if isinstance(failure, interfaces.UserError):
        assert str(caught.value) == f"a picture is broken; step 2 is saved in {tmp_path}"
    assert steps_of(tmp_path) == [2] and held_out_lines(tmp_path) == []
    train(tmp_path, "steps=4")
    assert entries(tmp_path, 4) == entries(undisturbed, 4)
    assert held_out_lines(tmp_path) == [2, 4]
    for step in (2, 4):
        figures = [checkpoint.read_meta(w / "checkpoints" / str(step))["metrics"]["l2"]
                   for w in (tmp_path, undisturbed)]  # fmt: skip
        assert figures[0] == figures[1]


def test_data_that_cannot_be_read_cost_no_step(tmp_path, monkeypatch):
    whole, calls = sharding.global_batch, []

    def third(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise interfaces.UserError("too many images are broken")
        return whole(*arguments)

    monkeypatch.setattr(sharding, "global_batch", third)
    with pytest.raises(interfaces.UserError, match="broken; step 3 is saved in"):
        train(tmp_path, "steps=4")
    assert steps_of(tmp_path) == [2, 3]


def test_a_held_out_error_is_the_mean_of_squares(undisturbed):
    """On the scale of the loss, [-1, 1]; a mean of decibels would be that of logarithms."""
    (line,) = [
        r for r in metrics_log.read(undisturbed) if r["split"] == "held_out" and r["step"] == 4
    ]
    settings = reading.load("configs/tokenizer/shapes.py:vq", SMALL)
    source = building.build(settings.data, "data", split="held_out")
    loaded = loading.load_tokenizer(undisturbed / checkpoint.FOLDER / "4")
    _, (image, reconstructed) = validation.reconstruction(
        loaded.module, source, datasets.view_of(settings), count=4, shown=4
    )
    error = (np.asarray(image, np.float64) - np.asarray(reconstructed, np.float64)) / 127.5
    assert abs(line["l2"] - (error**2).mean()) < 1e-6 * line["l2"] + 1e-7
    assert line["l2"] > 4 * 10 ** (-line["psnr_db"] / 10) * 1.0001
    spread = np.std((error**2).mean((1, 2, 3)), ddof=1) / 2  # of the mean of four
    assert math.isclose(line["l2_error"], spread, rel_tol=1e-5)


def test_a_return_across_a_boundary_of_stages(tmp_path):
    """Back from a stage into the one before, whose optimizer keeps other arrays."""
    settings = reading.load("configs/tokenizer/shapes.py:vq", (*SMALL, *BAD, "report.save=5"))
    with settings.unlocked():
        settings.safeguards.returns = 1
        settings.optimizer.weight_decay = 0.1
        second = dict(share=3 / 7, train="decoder/.*", optimizer=dict(clip=0.0, weight_decay=0.0))
        settings.stages = (dict(share=4 / 7), second)
    with runs.lock(tmp_path):
        train_tokenizer.main(launch.Request(settings, tmp_path))
    assert steps_of(tmp_path) == [3, 5, 7] and safeguards.returned(tmp_path) == 1
    before, after = entries(tmp_path, 5), entries(tmp_path, 7)
    for path, entry in before.items():
        if path.startswith("model/params/encoder/"):
            assert entry == after[path], path
