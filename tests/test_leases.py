"""Leases of places in a bucket: one job at a time, whatever becomes of the others."""

import contextlib
import json
import threading
import time
import types

import pytest

from tests import test_coordination
from tokgen import coordination, output, storage
from tokgen.checkpoints import run as runs
from tokgen.errors import UserError
from tokgen.output import leases

REFUSAL = "the place is in use by {}; wait"
MARGIN = leases.MARGIN


@pytest.fixture
def place(bucket, monkeypatch):
    """The object of a lease; seconds are tenths here."""
    for name in ("LASTS", "RENEWED", "APART", "MARGIN"):
        monkeypatch.setattr(leases, name, getattr(leases, name) / 30)
    return storage.path(bucket) / "lock"


def test_it_is_there_while_it_is_held(place):
    with leases.hold(place, REFUSAL):
        _, told = leases._Lease(place).found()
        assert told.who.startswith("process ") and told.until > time.time()
        time.sleep(2 * leases.RENEWED)
        assert leases._Lease(place).found()[1].until > told.until  # it was renewed
    assert not place.exists()
    with leases.hold(place, REFUSAL), contextlib.suppress(ZeroDivisionError):
        raise ZeroDivisionError
    assert not place.exists()


def test_a_second_job_is_told_who_holds_it_and_until_when(place, capsys):
    with leases.hold(place, REFUSAL):
        begun = time.monotonic()
        with pytest.raises(
            UserError, match=r"in use by process \d+ on .* until \d\d:\d\d:\d\d UTC; wait"
        ):
            with leases.hold(place, REFUSAL):
                pass
        assert time.monotonic() - begun < leases.LASTS  # as soon as it was renewed
        assert place.exists()
    assert "is held by process" in capsys.readouterr().err


def test_what_a_killed_job_leaves_is_taken_over_when_it_expires(place):
    dead = leases._taken(place, REFUSAL)  # and nobody renews it
    begun = time.monotonic()
    with leases.hold(place, REFUSAL):
        assert leases.LASTS < time.monotonic() - begun < 3 * leases.LASTS
        assert not dead.write(dead.generation)  # it is another's now
        dead.give_back()
        assert place.exists()


@pytest.mark.long
def test_of_many_that_wait_for_a_dead_one_a_single_one_goes_on(place):
    leases._taken(place, REFUSAL)
    entered, refused, ended = [], [], threading.Event()

    def job():
        try:
            with leases.hold(place, REFUSAL):
                entered.append(1)
                ended.wait(20)
        except UserError as error:
            refused.append(str(error))
            if len(refused) == 3:
                ended.set()

    jobs = [threading.Thread(target=job) for _ in range(4)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join()
    assert len(entered) == 1 and len(refused) == 3


def test_who_was_overtaken_ends_at_once(place, monkeypatch):
    said = []
    monkeypatch.setattr(leases, "_end", said.append)
    with leases.hold(place, REFUSAL):
        other = {"holder": "process 1 on other", "until": time.time() + 60, "lease": "other"}
        storage.save(place, json.dumps(other).encode())
        time.sleep(2 * leases.RENEWED)
    assert said and "another job holds it now" in said[0]
    assert json.loads(place.read_text()) == other  # and takes nothing with it


@pytest.mark.long
def test_who_cannot_renew_ends_before_another_may_begin(place, monkeypatch):
    said = []
    monkeypatch.setattr(leases, "_end", lambda text: said.append((time.monotonic(), text)))
    with leases.hold(place, REFUSAL):
        until = leases._Lease(place).found()[1].until - time.time() + time.monotonic()

        def down(*_):
            raise ConnectionError("no route")

        monkeypatch.setattr(leases._Lease, "write", down)
        time.sleep(leases.LASTS + leases.APART)
    assert said[0][0] < until and "could not be renewed: no route" in said[0][1]


left = test_coordination.left


def test_all_processes_of_a_job_end_before_another_may_begin(place, left, monkeypatch):
    """Those that hear of it, and those that miss the heartbeat of one that is gone."""
    service = test_coordination.Service(3)
    jobs = [coordination.Job(service, index, 3) for index in range(3)]
    monkeypatch.setattr(coordination, "job", lambda: jobs[0])
    gone, lease = [], leases._Lease(place)
    monkeypatch.setattr(leases, "os", types.SimpleNamespace(_exit=gone.append))
    leases._lost(lease, "it could not be renewed: no route")
    for job in jobs:
        job._thread.join(10)
    assert len(left) == 3 and len(set(left)) == 1 and gone == [1]
    code, line = left[0]
    assert code == 1 and line.startswith(f"error: {place.parent} is lost (it could not be renewed")
    assert MARGIN >= coordination.HEARTBEAT + 5  # GRACE, which is less here


@pytest.fixture
def asleep(place, monkeypatch):
    """Lets the lease of the place run out, and no thread has seen it yet."""
    monkeypatch.setattr(leases, "_end", lambda said: None)
    monkeypatch.setattr(leases, "RENEWED", 20.0)

    def sleep():
        leases._held[str(place.parent)].ends = leases._now() - 5

    return sleep


def test_a_host_that_slept_is_told_before_it_writes(place, asleep):
    with leases.hold(place, REFUSAL):
        leases.check(place.parent)
        leases.check(place.parent / "beside")  # nobody's
        asleep()
        assert not leases.is_held(place.parent)
        with pytest.raises(
            UserError, match="the lease of .* is lost .*nothing was written since. S"
        ):
            leases.check(place.parent)
    leases.check(place.parent)  # given back: it is no longer this process's to ask for


def test_who_was_overtaken_is_told_so(place, asleep):
    with leases.hold(place, REFUSAL):
        leases._lost(leases._held[str(place.parent)], "another job holds it now")
        with pytest.raises(UserError, match="is lost .another job holds it now., as on a host"):
            leases.check(place.parent)


def test_an_answer_that_was_lost_is_no_refusal(place):
    lease = leases._Lease(place)
    assert lease.write(0)
    generation = lease.generation
    assert lease.write(0) and lease.generation == generation  # as a request that is repeated


def test_a_lease_ends_when_it_was_said_to_though_the_answer_was_lost(place, monkeypatch):
    from google.cloud.storage import Blob

    lease, upload = leases._Lease(place), Blob.upload_from_string
    assert lease.write(0)

    def lost(*args, **how):
        upload(*args, **how)
        raise ConnectionError("reset")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(Blob, "upload_from_string", lost)
        lease.write(lease.generation)
    lasts = leases.LASTS
    monkeypatch.setattr(leases, "LASTS", 1000.0)
    assert lease.write(lease.generation)  # the first attempt is there, with its own end
    assert lease.ends < leases._now() + lasts
    assert lease.write(lease.generation) and lease.ends > leases._now() + lasts


def test_a_request_that_hangs_keeps_no_place_longer_than_the_lease(place, monkeypatch):
    said, lease, ended = [], leases._Lease(place), threading.Event()
    monkeypatch.setattr(leases, "_end", said.append)
    lease.ends = leases._now() + leases.MARGIN  # nobody renews it
    leases._watch(lease, ended)
    assert len(said) == 1 and "it could not be renewed: the store did not answer" in said[0]
    ended.set()
    leases._watch(lease, ended)
    assert len(said) == 1  # what was given back is not lost


def test_whatever_a_renewal_raises_it_is_tried_again(place, monkeypatch):
    lease, ended, errors = leases._Lease(place), threading.Event(), [MemoryError(), KeyError("a")]
    monkeypatch.setattr(leases, "RENEWED", 0.01)

    def write(generation):
        if errors:
            raise errors.pop()
        ended.set()
        return True

    monkeypatch.setattr(lease, "write", write)
    leases._keep(lease, ended)
    assert not errors and lease.refused == "MemoryError()"


def test_a_clock_that_is_ahead_takes_no_lease_of_one_that_lives(place, monkeypatch):
    with leases.hold(place, REFUSAL):
        monkeypatch.setattr(leases, "APART", -1000.0)  # every lease looks expired
        with pytest.raises(UserError, match="in use by"):
            with leases.hold(place, REFUSAL):
                pass


def test_somebody_elses_object_is_kept(place):
    storage.save(place, b"mine")
    with pytest.raises(UserError, match="lock is no lease of a job: .*; remove it, if no job"):
        with leases.hold(place, REFUSAL):
            pass
    assert place.read_text() == "mine"


def test_work_directories_and_token_folders_are_held(place):
    folder = place.parent
    with runs.lock(folder), pytest.raises(UserError, match=f"the work directory {folder} is in"):
        with runs.lock(folder):
            pass
    given = dict(records={"layout.json": ()}, lock=".lock")
    with output.growing_in_bucket(folder, **given) as out:
        assert out.path == folder and (folder / ".lock").exists()
    storage.save(folder / "holiday.png", b"")
    with pytest.raises(UserError, match="is not empty: it holds holiday.png of something else"):
        with output.growing_in_bucket(folder, **given):
            pass
    with pytest.raises(UserError, match="--overwrite replaces no result in a bucket"):
        with output.growing_in_bucket(folder, overwrite=True, **given):
            pass
    assert storage.names(folder) == ["holiday.png"]


def test_results_that_are_local_files_are_refused_there(place, tmp_path):
    folder, record = str(place.parent), {"a.json": ()}
    given = dict(records=record)
    for open_ in (
        lambda: output.folder(folder, **given),
        lambda: output.growing(folder, **given),
        lambda: output.file(folder),
        lambda: output.lines(folder),
    ):
        with pytest.raises(UserError, match="--out: results of this command must be local files"):
            with open_():
                pass
    for check in (output.check_folder, output.check_growing):
        with pytest.raises(UserError, match="must be local files; found gs://"):
            check(folder, **given)
    with pytest.raises(UserError, match="must be local files; found s3://bucket/a"):
        output.check_folder("s3://bucket/a", **given)


def test_nothing_is_written_into_what_is_read(place):
    with pytest.raises(UserError, match="must not lie in what is read"):
        with runs.lock(place.parent / "run", [str(place.parent)]):
            pass
    with pytest.raises(UserError, match="holds what the command reads"):
        with output.growing_in_bucket(place.parent, records={}, inputs=[str(place.parent / "a")]):
            pass
    assert storage.names(place.parent) == []
