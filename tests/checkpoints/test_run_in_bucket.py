"""Steps of a run in a bucket: which count as saved, and which go."""

import json
import pathlib

import jax
import numpy as np
import pytest

from tests import buckets
from tests.checkpoints import test_run
from tokgen import parameters, records, storage
from tokgen.checkpoints import checkpoint, in_bucket, manifest, run as runs
from tokgen.interfaces import UserError
from tokgen.output import leases

AT = test_run.at


@pytest.fixture
def workdir(bucket):
    return storage.path(bucket) / "run"


def folder(workdir, step):
    return workdir / checkpoint.FOLDER / str(step)


@pytest.mark.long
def test_steps_are_saved_measured_kept_and_found(workdir, tmp_path):
    for place in (tmp_path, workdir):
        run = test_run.open_run(place)
        for step, figure in ((1, 0.5), (2, 0.4), (3, 0.6)):
            run.save(AT(step))
            run.note(step, {"l2": figure})
        run.close()
        assert checkpoint.steps(place / checkpoint.FOLDER) == [2, 3]
        assert checkpoint.find(str(place)) == folder(place, 2)
        assert runs.metrics(run, 3) == {"l2": 0.6} and runs.is_measured(run, 3)
    ours, theirs = (checkpoint.read_meta(folder(place, 3)) for place in (workdir, tmp_path))
    assert ours["manifest"] == theirs["manifest"]  # every array, by its checksum
    checkpoint.verify(folder(workdir, 3))
    meta, leaves = ours, parameters.paths(AT(0))
    wanted = {path: leaf for path, leaf in leaves.items() if path in meta["manifest"]}
    for path, _, numbers in checkpoint.in_pieces(folder(workdir, 3), wanted, meta, ()):
        np.testing.assert_array_equal(numbers, jax.device_get(AT(3)["model"].step)
                                      if path == "model/step" else leaves[path])  # fmt: skip
    run = test_run.open_run(workdir)
    _, said = runs.resume_or_start(run, AT(0))
    assert said == f"resumed step 3 of {workdir}"
    run.close()


def test_a_save_that_never_ended_is_no_step_and_goes(workdir, monkeypatch):
    monkeypatch.setattr(in_bucket, "COPYING", 0.0)
    run = test_run.open_run(workdir, latest=2)
    for step in (1, 2):
        run.save(AT(step), {"l2": 1.0 / step})
    run.close()
    storage.unmark(folder(workdir, 2), checkpoint.MARKS)  # as it is before Orbax is done
    assert checkpoint.steps(workdir / checkpoint.FOLDER) == [1]
    assert checkpoint.find(str(workdir)).name == "1"
    run = test_run.open_run(workdir)
    assert not folder(workdir, 2).exists() and runs.latest(run) == 1
    run.save(AT(2), {"l2": 0.5})  # and its place is free
    run.close()
    assert checkpoint.steps(workdir / checkpoint.FOLDER) == [2]


def test_a_step_that_was_copied_before_it_was_sealed_is_kept(workdir, monkeypatch, capsys):
    monkeypatch.setattr(in_bucket, "COPYING", 0.0)
    local = {"meta/metadata": b"{}", "state/d/a": b"1"}
    ended = {checkpoint.ENDED: b'{"commit_timestamp_nsecs": 1764500000000000000}'}
    begun = {checkpoint.ENDED: b'{"commit_timestamp_nsecs": null}'}
    for step, content in ((1, local | ended), (2, local | begun), (3, local)):
        for name, text in content.items():
            storage.save(folder(workdir, step) / name, text)
    in_bucket.settle(workdir / checkpoint.FOLDER)
    assert checkpoint.steps(workdir / checkpoint.FOLDER) == [1]
    assert set(storage.sizes(folder(workdir, 1))) == {*local, *ended, checkpoint.COMMITTED}
    assert not folder(workdir, 2).exists() and not folder(workdir, 3).exists()
    said = capsys.readouterr().err
    for step in (2, 3):
        assert f"{folder(workdir, step)} was not written to its end, and is removed" in said


@pytest.mark.long
def test_a_step_that_is_being_copied_there_is_left_and_gives_way_to_this_runs_own(workdir, capsys):
    storage.save(folder(workdir, 2) / "state/d/a", b"1")  # the rest is under way
    run = test_run.open_run(workdir)
    assert (
        f"{folder(workdir, 2)} was not written to its end, or is being" in capsys.readouterr().err
    )
    assert storage.sizes(folder(workdir, 2)) == {"state/d/a": 1} and run.manager.all_steps() == []
    run.save(AT(2), {"l2": 0.5})
    run.close()
    checkpoint.verify(folder(workdir, 2))


def test_nothing_is_saved_or_deleted_once_the_lease_is_lost(workdir, monkeypatch):
    """As on a host that slept: no thread has seen it yet."""
    monkeypatch.setattr(leases, "_end", lambda said: None)
    monkeypatch.setattr(leases, "RENEWED", 20.0)
    with runs.lock(workdir):
        run = test_run.open_run(workdir, latest=9)
        for step in (1, 2):
            run.save(AT(step), {"l2": 1.0 / step})
        run.wait()
        there = storage.sizes(workdir)
        leases._held[str(workdir)].ends = leases._now() - 5
        for act in (
            lambda: run.save(AT(3)),
            lambda: run._commit(3, None, None),
            lambda: run.note(2, {"l2": 0.1}),
            lambda: run._delete(1),
            lambda: runs.drop_after(run, 1),
            lambda: runs.go_back(run, 1),
            lambda: test_run.open_run(workdir),
            run.wait,
        ):
            with pytest.raises(UserError, match=f"the lease of {workdir} is lost .*Start the same"):
                act()
        assert storage.sizes(workdir) == there


# ---------------------------------------------------------------- a bucket that is not reached


def forbidden(*_, **how):
    raise OSError("Forbidden: b/bucket/o\nme does not have storage.objects.get access to it.")


@pytest.mark.parametrize(
    "error, told",
    [
        (buckets.no_route, "no route; see to"),
        (forbidden, "lacks the permission storage.objects.get: "),
    ],
)
def test_a_bucket_that_is_not_reached_is_no_damage(workdir, error, told):
    """What was saved is read as nothing at all, and neither damaged nor missing nor deleted."""
    run = test_run.open_run(workdir, latest=9)
    for step in (1, 2):
        run.save(AT(step), {"l2": 1.0 / step})
    meta = checkpoint.read_meta(folder(workdir, 2))
    leaves = {p: a for p, a in parameters.paths(AT(0)).items() if p in meta["manifest"]}
    steps, there = workdir / checkpoint.FOLDER, storage.sizes(workdir)
    with buckets.down(error):
        for act in (
            lambda: checkpoint.read_meta(folder(workdir, 2)),
            lambda: checkpoint.is_whole(folder(workdir, 2)),
            lambda: checkpoint.is_ended(folder(workdir, 2)),
            lambda: checkpoint.restore(folder(workdir, 2), leaves, meta),
            lambda: checkpoint.steps(steps),
            lambda: checkpoint.find(str(workdir)),
            lambda: manifest.misfit(folder(workdir, 2)),
            lambda: runs.check_whole(workdir, 1),
            lambda: runs.classes(workdir),
            lambda: runs.is_measured(run, 2),
            lambda: runs.drop_after(run, 1),
            lambda: test_run.open_run(workdir),
            lambda: run.note(2, {"l2": 0.1}),
            lambda: run._delete(1),
            run.wait,
        ):
            with pytest.raises(storage.NotReached, match=f"cannot be used: .*{told}"):
                act()
        with pytest.raises(UserError, match=f"cannot be used: .*{told}"):
            run.save(AT(3))
    assert storage.sizes(workdir) == there and run.told == set()


def test_arrays_that_do_not_arrive_are_not_damaged(workdir):
    """tensorstore tells both in one class; the words are its own."""
    storage.save(folder(workdir, 1) / "state/a", b"")
    far = "ABORTED: All 32 retry attempts failed: CURL error Could not connect [curl_code='7']"
    denied = "PERMISSION_DENIED: me does not have storage.objects.get [http_response_code='403']"
    for said, found in ((far, "connect"), (denied, "lacks the permission storage.objects.get")):
        with pytest.raises(storage.NotReached, match=f"cannot be used: {said[:9]}.*{found}"):
            with checkpoint._readable(folder(workdir, 1)):
                raise ValueError(said)
    for said in ("DATA_LOSS: a checksum", "NOT_FOUND: gs://bucket/a"):
        with pytest.raises(UserError, match="is damaged: its arrays cannot be read"):
            with checkpoint._readable(folder(workdir, 1)):
                raise ValueError(said)


@pytest.mark.long
def test_a_step_that_is_deleted_half_way_says_no_longer_that_it_is_whole(workdir, monkeypatch):
    monkeypatch.setattr(in_bucket, "COPYING", 0.0)
    run = test_run.open_run(workdir)
    run.save(AT(1), {"l2": 0.5})

    def killed(step):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.manager, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save(AT(2), {"l2": 0.4})
        run.wait()
    assert checkpoint.steps(workdir / checkpoint.FOLDER) == [2]
    assert storage.sizes(folder(workdir, 1))  # the rest of it
    run = test_run.open_run(workdir)
    assert not folder(workdir, 1).exists()
    run.close()


@pytest.mark.long
def test_a_run_that_was_copied_there_goes_on_and_one_copied_in_part_stays(workdir, tmp_path):
    run = test_run.open_run(tmp_path, latest=9)
    for step in (1, 2):
        run.save(AT(step), {"l2": 1.0 / step})
    run.close()
    local = tmp_path / checkpoint.FOLDER
    seal = local / "1" / manifest.SIZES
    noted = records.load(seal)
    seal.write_text(json.dumps({n: noted[n] for n in noted if n != checkpoint.COMMITTED}))
    for name in storage.sizes(local):
        if name not in (f"1/{checkpoint.COMMITTED}", "2/meta/metadata"):
            storage.upload(local / name, workdir / checkpoint.FOLDER / name)
    run = test_run.open_run(workdir)
    assert run.manager.all_steps() == [1, 2]  # 1, of an older Orbax, is whole by its seal
    with pytest.raises(UserError, match="2 is damaged: .*, or train on from it with --from 1"):
        runs.resume_or_start(run, AT(0))
    storage.unmark(folder(workdir, 2), [checkpoint.COMMITTED])
    run = test_run.open_run(workdir)
    _, said = runs.resume_or_start(run, AT(0))
    assert said == f"resumed step 1 of {workdir}"
    run.close()
    assert "state/_METADATA" in storage.sizes(folder(workdir, 2))  # it is nobody's to delete
    assert manifest.misfit(folder(workdir, 2)).startswith("its files are not as they were saved")


@pytest.mark.long
def test_from_an_earlier_step_later_ones_are_set_aside(workdir):
    run = test_run.open_run(workdir, latest=9)
    for step in (1, 2, 3):
        run.save(AT(step), {"l2": 1.0 / step})
    runs.go_back(run, 1)
    assert checkpoint.steps(workdir / checkpoint.FOLDER) == [1]
    assert storage.names(workdir / runs.ASIDE) == ["2", "3"]
    checkpoint.verify(workdir / runs.ASIDE / "3")
    run.save(AT(2), {"l2": 0.1})
    runs.go_back(run, 1)
    assert storage.names(workdir / runs.ASIDE) == ["2", "2.2", "3"]
    run.close()


def test_what_a_checkpoint_refers_to_is_found_from_wherever_it_lies(workdir, tmp_path):
    tokenizer = workdir.parent / "tokenizer" / "checkpoints" / "5"
    storage.save(tokenizer / "sizes.json", b"{}")
    step = folder(workdir, 1)
    near = checkpoint.reference(tokenizer, workdir)
    assert near == {"path": str(tokenizer), "relative": "../tokenizer/checkpoints/5"}
    assert checkpoint.referred(near, step) == tokenizer
    moved = near | {"path": "gs://gone/5"}  # both moved
    assert checkpoint.referred(moved, step) == tokenizer
    local = tmp_path / "run"
    far = checkpoint.reference(tokenizer, local)
    assert far == {"path": str(tokenizer), "relative": str(tokenizer)}
    assert checkpoint.referred(far, local / "checkpoints" / "1") == tokenizer
    (tmp_path / "tokenizer").mkdir()
    back = checkpoint.reference(tmp_path / "tokenizer", workdir)
    assert checkpoint.referred(back, step) == tmp_path / "tokenizer"
    assert isinstance(checkpoint.referred(back, step), pathlib.Path)
    copied = checkpoint.reference(tmp_path / "tokenizer", local)  # and was copied into a bucket
    assert checkpoint.referred(copied, step) == tokenizer.parents[1]


def test_nothing_at_all_is_told_as_it_is(bucket):
    with pytest.raises(UserError, match=f"no checkpoint at {bucket}/none: there is no such path"):
        checkpoint.find(f"{bucket}/none")
    with pytest.raises(UserError, match="s3://bucket/run: need a local path or gs://"):
        checkpoint.find("s3://bucket/run")


@pytest.mark.long
def test_a_bucket_that_refuses_a_save_costs_no_step(workdir, monkeypatch):
    run = test_run.open_run(workdir)
    run.save(AT(1), {"l2": 0.5})

    def down(*args, **how):
        raise ValueError(f'ABORTED: Error writing "{workdir}/x": no route')

    monkeypatch.setattr(run.manager, "save", down)
    with pytest.raises(
        UserError, match="step 2 could not be saved in .*: ABORTED.*before: 1. The same"
    ):
        run.save(AT(2), {"l2": 0.4})
    assert checkpoint.steps(workdir / checkpoint.FOLDER) == [1]
