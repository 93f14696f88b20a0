"""The log of a run in a bucket: what is there when the host is gone."""

import numpy as np
import pytest

from tokgen import metrics_log, storage


@pytest.fixture
def workdir(bucket):
    return storage.path(bucket)


def lines(workdir):
    return (workdir / metrics_log.LOG).read_text().splitlines()


def test_what_was_logged_before_a_save_is_kept_and_the_rest_taken_again(workdir):
    log = metrics_log.opened(workdir)
    log.scalars(1, {"loss": 2.0})
    log.image(1, "samples", np.zeros((4, 4, 3), np.uint8))
    log.keep()
    log.scalars(2, {"loss": 1.0})
    assert [line.count('"loss"') for line in lines(workdir)] == [1]  # and here the host is gone
    assert "images/samples-0000001.png" in storage.sizes(workdir)
    log = metrics_log.opened(workdir, step=1)
    log.scalars(2, {"loss": 3.0})
    log.scalars(3, {"loss": 4.0})
    log.close()
    assert [line[:10] for line in lines(workdir)] == ['{"step": 1', '{"step": 2', '{"step": 3']
    there = storage.sizes(workdir)
    assert "curves.png" in there and any(name.startswith("tensorboard/events") for name in there)
    assert not any(name.endswith(".part") for name in there)


def test_it_is_copied_now_and_then(workdir, monkeypatch):
    monkeypatch.setattr(metrics_log, "EVERY", 0.05)
    log = metrics_log.opened(workdir)
    log.scalars(1, {"loss": 2.0})
    for _ in range(200):
        if (workdir / metrics_log.LOG).exists() and lines(workdir):
            break
        log.ended.wait(0.05)
    assert len(lines(workdir)) == 1
    log.close()


def test_nothing_is_copied_into_another_jobs_place(workdir):
    held = [True]
    log = metrics_log.opened(workdir, is_held=lambda: held[0])
    log.scalars(1, {"loss": 2.0})
    log.keep()
    log.scalars(2, {"loss": 2.0})
    held[0] = False
    log.keep()
    log.close()
    assert len(lines(workdir)) == 1 and "curves.png" not in storage.sizes(workdir)


def test_only_what_changed_is_copied(workdir, monkeypatch):
    log, saved, save = metrics_log.opened(workdir), [], storage.save
    log.scalars(1, {"loss": 2.0})
    log.keep()
    monkeypatch.setattr(storage, "save", lambda f, c: (saved.append(f.name), save(f, c)))
    log.keep()
    assert saved == []
    log.scalars(2, {"loss": 2.0})
    log.keep()
    assert metrics_log.LOG in saved and "curves.png" not in saved
    log.close()


def test_a_bucket_that_cannot_be_reached_ends_no_run(workdir, monkeypatch, capsys):
    log, save = metrics_log.opened(workdir), storage.save

    def down(*_):
        raise OSError("no route")

    monkeypatch.setattr(storage, "save", down)
    log.scalars(1, {"loss": 2.0})
    log.keep()
    assert (
        f"{workdir}: metrics.jsonl could not be copied there: no route" in capsys.readouterr().err
    )
    monkeypatch.setattr(storage, "save", save)
    log.close()
    assert len(lines(workdir)) == 1
