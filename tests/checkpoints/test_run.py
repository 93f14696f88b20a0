"""A run's steps: which stay, what is on disk when something fails, and the way back."""

import errno
import functools
import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.checkpoints import test_checkpoint
from tokgen import interfaces, parameters
from tokgen.checkpoints import checkpoint, continuation, manifest, run as runs
from tokgen.discriminators import augment
from tokgen.errors import SharedError
from tokgen.training import fields, optimizer as optimizers, train_state

# ---------------------------------------------------------------- which steps stay


def walked(generator: np.random.Generator) -> None:
    """One run: steps with figures of all kinds, measured or not, restarts, other settings.

    The disk is a dictionary, and all that is told of it is what `staying` reads.
    """
    disk, stated, step = {}, set(generator.integers(0, 60, 2).tolist()), 0
    measured = set()
    latest, best = generator.integers(1, 4, 2).tolist()
    kinds = [math.nan, math.inf, -math.inf, None]
    seen = {}  # everything that was ever measured, whatever became of it
    for _ in range(int(generator.integers(3, 25))):
        step += int(generator.integers(1, 4))
        odd = generator.random() < 0.4
        # a few values only, so that some are equal
        figure = kinds[generator.integers(4)] if odd else float(generator.integers(0, 12)) / 4
        disk[step] = seen[step] = figure
        if figure is not None or generator.random() < 0.5:
            measured.add(step)
        found = [runs.Saved(s, f, s in stated, s in measured) for s, f in disk.items()]
        generator.shuffle(found)  # no order of a listing matters
        stay = runs.staying(found, latest=latest, best=best)
        assert stay == runs.staying(
            [each for each in found if each.step in stay], latest=latest, best=best
        )  # a restart that looks again deletes nothing
        disk = {s: f for s, f in disk.items() if s in stay}
        # told anew from all that ever was: what was deleted could never have come back
        finite = sorted((f, -s) for s, f in seen.items() if f is not None and math.isfinite(f))
        leading = {-s for _, s in finite[:best]}
        newest = set(sorted(seen)[-latest:])
        before = {max(measured)} if measured else set()
        assert set(disk) == leading | newest | before | (stated & set(seen))


def test_the_best_finite_and_the_latest_stay_and_nothing_else():
    generator = np.random.default_rng(0)
    for _ in range(500):
        walked(generator)


def test_figures_of_an_older_version_are_compared_as_they_were_taken(tmp_path):
    """Then of the mean of PSNR, which is at most the mean of the errors."""

    def now(l2, psnr_db):
        return {"l2": l2, "l2_error": 0.1, "psnr_db": psnr_db}

    run = open_run(tmp_path, latest=9)
    run.save(at(1), {"l2": 0.4, "psnr_db": 10.0})
    run.save(at(2), now(0.5, 11.0))  # 0.318 as it was taken then
    run.save(at(3), now(0.45, 10.5))
    run.close()
    assert checkpoint.find(tmp_path).name == "2"
    run = open_run(tmp_path)
    run.wait()
    assert steps_of(tmp_path) == [2, 3]
    run.save(at(4), now(0.6, 11.5))  # none is left that was taken then
    run.close()
    assert steps_of(tmp_path) == [3, 4]


def test_retention_asks_for_no_more_than_is_there():
    assert runs.staying([], latest=1, best=1) == set()
    only = [runs.Saved(3, math.nan), runs.Saved(5, None)]
    assert runs.staying(only, latest=1, best=2) == {5}
    assert runs.staying(only, latest=9, best=9) == {3, 5}
    assert runs.staying(only, latest=0, best=0) == {5}  # the latest always


@functools.cache
def tiny():
    """A state of a few numbers; step and figures are what these tests are of."""
    optimizer = optimizers.optimizer(9, learning_rate=0.1)

    class Net(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((2, 2)))

    _, params, stats = parameters.split(Net())
    zero = jnp.zeros((), jnp.int32)
    return train_state.TrainState(
        zero, zero, params, stats, optimizer.chain.init(params), params, zero
    )


def at(step):
    return {"model": tiny().replace(step=jnp.asarray(step, jnp.int32))}


def config(latest=1, best=1):
    settings = test_checkpoint.load_config("steps=100", "report.save=20")
    settings.keep.latest, settings.keep.best = latest, best
    return settings


def steps_of(workdir):
    folder = workdir / checkpoint.FOLDER
    return sorted(int(s.name) for s in folder.iterdir() if s.name.isdigit())


def open_run(workdir, kept=(), **keep):
    return test_checkpoint.start(workdir, config(**keep), kept=kept)


def test_a_figure_that_is_not_finite_deletes_nothing_and_is_never_found(tmp_path):
    run = open_run(tmp_path)
    for step, figure in ((1, 0.5), (2, 0.4), (3, math.nan), (4, math.inf)):
        run.save(at(step), {"l2": figure})
    run.close()
    assert steps_of(tmp_path) == [2, 4]
    assert checkpoint.find(tmp_path).name == "2"
    assert checkpoint.read_meta(tmp_path / checkpoint.FOLDER / "4")["metrics"] == {"l2": None}


def test_restarts_come_to_what_one_run_comes_to(tmp_path):
    """Every step by a process of its own; figures of earlier ones are read from their records."""
    figures = {2: 0.4, 4: 0.2, 6: 0.3, 8: math.nan, 10: 0.5}
    for step, figure in figures.items():
        run = open_run(tmp_path, kept=(2,))
        run.save(at(step))
        run.note(step, {"l2": figure})
        run.close()
        assert runs.metrics(run, step) == {"l2": figure if math.isfinite(figure) else None}
    assert steps_of(tmp_path) == [2, 4, 10]
    run = open_run(tmp_path, latest=2)  # another setting, from now on; 2 is stated no more
    run.save(at(12), {"l2": 0.9})
    run.close()
    assert steps_of(tmp_path) == [4, 10, 12]


def test_nothing_makes_room_before_the_newest_step_has_its_figures(tmp_path):
    """A run that was refused while it measured goes back to the step before."""
    run = open_run(tmp_path)
    for step, figure in ((1, 0.3), (2, 0.4)):
        run.save(at(step), {"l2": figure})
    run.save(at(3))
    run.wait()
    assert steps_of(tmp_path) == [1, 2, 3] and not runs.is_measured(run, 3)
    assert checkpoint.find(tmp_path).name == "1"
    run.close()
    run = open_run(tmp_path)
    assert steps_of(tmp_path) == [1, 2, 3]  # nor does a restart
    run.note(3, {"l2": 0.5})
    assert steps_of(tmp_path) == [1, 3] and runs.is_measured(run, 3)
    run.note(3, {})  # one that has none, and needs none
    assert steps_of(tmp_path) == [1, 3] and runs.is_measured(run, 3)
    run.close()


def test_a_run_that_is_stopped_again_and_again_fills_no_disk(tmp_path):
    """Each start saves a step that is never measured: only the last of them stays."""
    run = open_run(tmp_path)
    for step, figure in ((1, 0.3), (2, 0.4)):
        run.save(at(step), {"l2": figure})
    run.close()
    for step in (3, 4, 5):
        run = open_run(tmp_path)
        run.save(at(step))
        run.close()
    assert steps_of(tmp_path) == [1, 2, 5]


def test_the_classes_of_a_run_are_those_of_its_last_step(tmp_path):
    assert runs.classes(tmp_path) == ()
    run = open_run(tmp_path)
    run.meta["classes"] = ["0", "10", "2"]
    run.save(at(3), {"l2": 0.5})
    run.close()
    assert runs.classes(tmp_path) == ("0", "10", "2")
    (tmp_path / checkpoint.FOLDER / "7").mkdir()  # told when it is read to go on from
    assert runs.classes(tmp_path) == ()


def test_what_cannot_be_read_is_not_deleted(tmp_path, capfd):
    run = open_run(tmp_path)
    run.save(at(1), {"l2": 0.9})
    run.wait()
    file = tmp_path / checkpoint.FOLDER / "1" / "meta" / "metadata"
    file.write_text(file.read_text()[:-30])
    for step in (2, 3):
        run.save(at(step), {"l2": 0.1})
    run.close()
    assert steps_of(tmp_path) == [1, 3]
    assert capfd.readouterr().err.count("it stays where it is") == 1


def test_a_step_without_figures_goes_before_one_of_none_that_is_finite(tmp_path):
    run = open_run(tmp_path, latest=9)
    run.save(at(1))
    run.save(at(2), {"l2": math.nan})
    run.close()
    assert checkpoint.find(tmp_path).name == "1"
    run = open_run(tmp_path, latest=9)
    run.save(at(3), {"l2": math.inf})
    run.note(1, {"l2": math.nan})
    run.close()
    assert checkpoint.find(tmp_path).name == "3"  # all alike: the latest


def test_damaged_figures_are_refused_and_name_the_way_on(tmp_path):
    run = open_run(tmp_path, latest=9)
    for step in (1, 2):
        run.save(at(step))
        run.note(step, {"l2": 0.5})
    run.close()
    step = tmp_path / checkpoint.FOLDER / "2"
    content = json.loads((step / "figures.json").read_text())
    for text in (json.dumps(content | {"figures": {"l2": 0.1}}), "{", "null", "[" * 10**5):
        (step / "figures.json").write_text(text)
        with pytest.raises(interfaces.UserError, match=r"2 is damaged: its figures.*--from 1"):
            checkpoint.find(tmp_path)


# ---------------------------------------------------------------- what fails while saving


def test_rescue_saves_what_was_made_and_says_so(tmp_path):
    run = open_run(tmp_path)
    for step, said in (
        (0, "broken$"),
        (3, "broken; step 3 is saved in .*"),
        (3, "step 3 is saved"),
    ):
        with pytest.raises(interfaces.UserError, match=said), run.rescuing(at(step)):
            raise interfaces.UserError("broken")
    assert steps_of(tmp_path) == [3]
    with pytest.raises(KeyError), run.rescuing(at(4)):  # ours keep their traceback
        raise KeyError("x")
    assert steps_of(tmp_path) == [3]
    run.close()


def test_a_full_disk_is_one_message_and_costs_no_step(tmp_path, capfd):
    """A limit on the size of files stands for the disk: the store fails in the same words."""
    run = open_run(tmp_path, latest=9)
    run.save(at(1), {"l2": 0.5})
    big = at(2)
    noise = jax.random.normal(jax.random.key(0), (300, 300))  # of which nothing can be packed
    big["model"] = big["model"].replace(params={"kernel": noise})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(interfaces.UserError) as caught:
            run.save(big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)
    said = str(caught.value)
    assert f"step 2 could not be saved in {tmp_path / checkpoint.FOLDER}: File too large; " in said
    assert "saved before: 1." in said and "\n" not in said
    assert "Traceback" not in capfd.readouterr().err
    assert [s.name for s in (tmp_path / checkpoint.FOLDER).iterdir()] == ["1"]  # no half of one
    run.save(big, {"l2": 0.4})  # and once there is room
    run.close()
    assert steps_of(tmp_path) == [1, 2]


def test_what_a_killed_save_left_is_cleared(tmp_path):
    left = tmp_path / checkpoint.FOLDER / "7.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "x").write_text("x")
    run = open_run(tmp_path)
    run.save(at(7), {"l2": 0.5})
    run.close()
    assert [s.name for s in (tmp_path / checkpoint.FOLDER).iterdir()] == ["7"]


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (10**9, ""),
        # kernel, its moments and average of 16 bytes, four counts: 80 bytes; 4 of them at once
        (200, "warning: .*takes 80 bytes, and up to 4 more.*320 bytes; found 200 bytes free"),
        (79, "not enough for one"),
    ],
)
def test_room_is_looked_for_before_the_work(tmp_path, monkeypatch, capfd, free, said):
    run = open_run(tmp_path, kept=(5,))
    usage = types.SimpleNamespace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if free < 80:
        with pytest.raises(interfaces.UserError, match=said):
            runs.resume_or_start(run, at(0))
    else:
        runs.resume_or_start(run, at(0))
        found = capfd.readouterr().err
        assert bool(found) == bool(said)
        assert not said or re.search(said, found)
    run.close()


# ---------------------------------------------------------------- the way back


@pytest.fixture
def three(tmp_path):
    """Steps 1, 2 and 3; no two alike."""
    run = open_run(tmp_path, latest=9)
    for step in (1, 2, 3):
        run.save(at(step), {"l2": 1.0 / step})
    run.close()
    return tmp_path


def damage(step: pathlib.Path) -> None:
    for file in (step / "state").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


def test_from_an_earlier_step_later_ones_are_set_aside(three, capfd):
    damage(three / checkpoint.FOLDER / "3")
    run = open_run(three, latest=9)
    with pytest.raises(interfaces.UserError, match=r"damaged.*earlier step \(1, 2\).*--from 2"):
        runs.resume_or_start(run, at(0))
    runs.go_back(run, 2)
    assert f"step 3 is set aside: {three / runs.ASIDE / '3'}" in capfd.readouterr().err
    found, what = runs.resume_or_start(run, at(0))
    assert what.startswith("resumed step 2") and found["model"].step == 2
    run.save(at(3), {"l2": 0.1})
    runs.go_back(run, 1)  # once more: what lies there stays
    assert sorted(p.name for p in (three / runs.ASIDE).iterdir()) == ["2", "3", "3.2"]
    assert steps_of(three) == [1]
    assert checkpoint.read_meta(three / runs.ASIDE / "2")["metrics"] == {"l2": 0.5}
    runs.go_back(run, 1)  # where it stands already
    run.close()
    assert steps_of(three) == [1]


def test_a_way_back_in_another_config_moves_nothing(three):
    """The command is corrected, and may be without --from."""
    run = test_checkpoint.start(three, test_checkpoint.load_config("batch_size=4"))
    with pytest.raises(interfaces.UserError, match="batch_size: 8 there, 4 here"):
        runs.go_back(run, 1)
    assert steps_of(three) == [1, 2, 3] and not (three / runs.ASIDE).exists()


@pytest.mark.parametrize("step", [0, 2, 7])
def test_from_a_step_that_is_none_moves_nothing(three, step):
    damage(three / checkpoint.FOLDER / "2")
    run = open_run(three, latest=9)
    for ask in (lambda: runs.check_whole(three, step), lambda: runs.go_back(run, step)):
        with pytest.raises(interfaces.UserError, match=f"--from {step} needs.*whole are 1, 3$"):
            ask()
    run.close()
    assert steps_of(three) == [1, 2, 3] and not (three / runs.ASIDE).exists()
    with pytest.raises(interfaces.UserError, match="whole are none"):
        runs.check_whole(three / "nowhere", 1)


def test_a_full_disk_by_errno_is_told(tmp_path, monkeypatch):
    run = open_run(tmp_path)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run.manager, "save", full)
    with pytest.raises(
        interfaces.UserError, match="No space left on device; steps saved before: none"
    ):
        run.save(at(1))
    run.close()


def test_a_distance_that_had_no_weight_files_was_not_trained():
    """Such a run goes on by a config that says so itself."""
    fields = {"loss.l2": 1.0, "loss.lpips": 1.0, "perceptual.lpips": ""}
    assert continuation.as_trained(fields) == fields | {"loss.lpips": 0.0}
    for other in ({"perceptual.lpips": "vgg.pth"}, {"perceptual.other": ""}):
        kept = {"loss.lpips": 1.0} | other
        assert continuation.as_trained(kept) == kept


def test_a_config_in_the_words_of_an_earlier_version_is_the_same():
    kinds = ["color", "translation", "cutout"]
    for then, now in ((True, kinds), (False, [])):
        assert continuation.as_trained({"discriminator.augmented": then}) == {
            "discriminator.augmented": now
        }
    kept = {"discriminator.augmented": kinds, "average": "var", "optimizer.warmup": 5}
    kept |= {"optimizer.start": 0.1}
    assert continuation.as_trained(kept) == kept
    plain = {"average": "muse", "optimizer.warmup": 0, "optimizer.start": 0.1}
    assert continuation.as_trained(plain) == {}  # `start` is of a warm-up
    assert continuation.as_trained({"optimizer.warmup": 5, "optimizer.start": None}) == {
        "optimizer.warmup": 5
    }


def test_how_a_network_runs_may_change_on_the_way(tmp_path):
    here = dict(kind="generator", layout=[], classes=[], tokenizer=None, data="a", held_out="b")
    then, now = (
        {
            "generator": {"width": 8} | dict(zip(("remat", "unroll"), running, strict=False)),
            "decoder": {"codes": {"remat": running[0]}},
        }
        for running in (("full", 1), ("none",))
    )
    continuation.check(here | {"config": then}, tmp_path, tmp_path, now, here)
    now["generator"]["width"] = 16
    with pytest.raises(interfaces.UserError, match="generator.width: 8 there, 16 here$"):
        continuation.check(here | {"config": then}, tmp_path, tmp_path, now, here)


def resumed(workdir, kinds=(), **changes):
    """The run of a work directory, its discriminator seen through `kinds`, and what it says."""
    run = test_checkpoint.start(workdir, augmented(*kinds), **changes)
    try:
        return run, runs.resume_or_start(run, at(0))[1]
    finally:
        run.close()


def rewritten(step: pathlib.Path, change) -> None:
    """The record of a step as another version would have written it."""
    file = step / "meta" / "metadata"
    meta = json.loads(file.read_text())
    meta.pop("digest")
    change(meta)
    file.write_text(json.dumps(meta | {"digest": manifest.digest(meta)}))
    (step / manifest.SIZES).unlink()


def augmented(*kinds):
    settings = config()
    with settings.unlocked():
        settings.discriminator.augmented = kinds
    return settings


@pytest.fixture
def saved(tmp_path):
    """Step 5."""
    run = test_checkpoint.start(tmp_path, augmented())
    run.save(at(5), {"l2": 0.5})
    run.close()
    return tmp_path


def test_a_run_that_said_yes_to_augmentation_goes_on(saved):
    def then(meta):
        meta["config"]["discriminator"]["augmented"] = True

    rewritten(saved / checkpoint.FOLDER / "5", then)
    assert resumed(saved, augment.KINDS)[1].startswith("resumed step 5")
    told = r"discriminator.augmented: \['color', 'translation', 'cutout'\] there, \[\] here"
    with pytest.raises(interfaces.UserError, match=told):  # a value that can be used
        resumed(saved)


def test_what_a_config_file_kept_for_itself_is_not_compared(saved):
    def then(meta):
        meta["config"] |= {"image_size": 64, "own": {"rate": 1.0}}

    rewritten(saved / checkpoint.FOLDER / "5", then)
    known = fields.names(fields.TokenizerFields)
    assert resumed(saved, fields=known)[1].startswith("resumed step 5")
    with pytest.raises(interfaces.UserError, match="image_size: 64 there, 'absent' here"):
        resumed(saved)

    def trains(meta):  # one that trains something is
        meta["config"]["teacher"] = "runs/teacher"

    rewritten(saved / checkpoint.FOLDER / "5", trains)
    with pytest.raises(
        interfaces.UserError, match="\n  teacher: 'runs/teacher' there, 'absent' here$"
    ):
        resumed(saved, fields=known)


def test_a_run_from_before_a_config_spoke_of_labels_goes_on(saved):
    """What they mean is in the classes and the fingerprint, which are compared."""

    def then(meta):
        meta["config"]["data"]["labels"] = ""

    rewritten(saved / checkpoint.FOLDER / "5", then)
    assert resumed(saved)[1].startswith("resumed step 5")


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_other_classes_are_other_images_to_a_tokenizer_alone(tmp_path, kind):
    run = test_checkpoint.start(tmp_path, augmented(), kind=kind)
    run.save(at(5), {"l2": 0.5})
    run.close()
    new = dict(kind=kind, classes=("c",), data="new")
    words = {"tokenizer": "--accept-data", "generator": "another config"}
    with pytest.raises(interfaces.UserError, match=words[kind]):
        resumed(tmp_path, **new)
    if kind == "generator":
        with pytest.raises(interfaces.UserError, match=r"classes: \['a', 'b'\] there"):
            resumed(tmp_path, **new, accept=("data",))
        return
    run, what = resumed(tmp_path, **new, accept=("data",))
    assert what.startswith("resumed step 5")
    assert run.meta["data_changes"] == [
        {"step": 5, "from": "abc", "to": "new", "classes": ["a", "b"]}
    ]


def test_a_run_goes_back_behind_a_change_of_what_it_is_measured_on(tmp_path, capfd):
    """Accepted once; the step before it was measured on the images as they were then."""
    run = open_run(tmp_path, kept=(2,))
    run.save(at(2), {"l2": 0.5})
    run.close()
    new = dict(held_out="new", classes=(), kept=(2,))
    run = test_checkpoint.start(tmp_path, config(), **new, accept=("data",))
    runs.resume_or_start(run, at(0))
    assert "has changed held-out images, classes\n" in capfd.readouterr().err
    run.save(at(3), {"l2": 0.4})
    run.close()
    change = {"step": 2, "from": "abc", "to": "abc", "held_out": "h", "classes": ["a", "b"]}
    assert checkpoint.read_meta(tmp_path / checkpoint.FOLDER / "3")["data_changes"] == [change]
    run = test_checkpoint.start(tmp_path, config(), **new)  # one that a kill cut off on its way
    runs.drop_after(run, 2)
    assert steps_of(tmp_path) == [2]
    assert runs.resume_or_start(run, at(0))[1].startswith("resumed step 2")
    assert run.meta["data_changes"] == [change]
    run.close()


def test_nothing_is_dropped_for_a_step_that_the_run_cannot_go_on_from(three):
    for change, words in ((dict(held_out="x"), "held-out data: h there"), (dict(data="x"), "data")):
        run = test_checkpoint.start(three, config(latest=9), **change)
        with pytest.raises(interfaces.UserError, match=words):
            runs.drop_after(run, 1)
        run.close()
    run = open_run(three, latest=9)
    runs.drop_after(run, 7)
    runs.drop_after(run, 0)  # there is none
    damage(three / checkpoint.FOLDER / "1")
    with pytest.raises(interfaces.UserError, match="1 is damaged.*no later step is dropped"):
        runs.drop_after(run, 1)
    run.close()
    assert steps_of(three) == [1, 2, 3]


def test_what_need_not_stay_makes_room_before_room_is_looked_for(three, monkeypatch):
    """Fewer are kept from now on."""

    def usage(path):
        return types.SimpleNamespace(free=500 if steps_of(three) == [3] else 0)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    run = open_run(three)
    assert runs.resume_or_start(run, at(0))[1].startswith("resumed step 3")
    run.close()


def test_a_start_that_is_refused_deletes_nothing(three):
    """Whatever its config says of how many stay."""
    run = test_checkpoint.start(three, config(), data="x")
    with pytest.raises(interfaces.UserError, match="other images"):
        runs.resume_or_start(run, at(0))
    damage(three / checkpoint.FOLDER / "3")
    run.meta["data"] = "abc"
    with pytest.raises(interfaces.UserError, match="damaged"):
        runs.resume_or_start(run, at(0))
    assert steps_of(three) == [1, 2, 3]


def test_a_rescue_among_processes_waits_for_none(tmp_path, monkeypatch):
    """A save is for all of them, and the others are in their next step."""
    run = open_run(tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(interfaces.UserError, match="broken$"), run.rescuing(at(3)):
        raise interfaces.UserError("broken")
    monkeypatch.undo()
    assert steps_of(tmp_path) == []
    # what all raise at one step all can save
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(run, "save", lambda states: saved.append(states))
    saved = []
    with pytest.raises(SharedError, match="broken; step 3 is saved"), run.rescuing(at(3)):
        raise SharedError("broken")
    assert len(saved) == 1
    monkeypatch.undo()
    run.close()


def test_a_run_from_before_its_recipe_said_what_it_is_made_for_goes_on():
    """`made_for` is read by plans alone: it may come, and be another."""
    told = dict(tokenizer="configs/tokenizer/shapes.py", pixels=32, classes=10)
    record = dict(kind="generator", data="d", held_out="", layout=1, classes=[], tokenizer=None)
    for before, after in (({}, {"made_for": told}), ({"made_for": told}, {"made_for": {}})):
        config = dict(seed=0) | after
        meta = record | dict(config=dict(seed=0) | before)
        continuation.check(meta, "DIR/step", "DIR", config, record)
        meta["config"]["seed"] = 1
        with pytest.raises(interfaces.UserError, match="seed: 1 there, 0 here"):
            continuation.check(meta, "DIR/step", "DIR", config, record)
