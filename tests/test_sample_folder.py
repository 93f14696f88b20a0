"""Samples in a folder: few as one result, many part by part, by processes that know of no other."""

import argparse
import collections
import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types

import numpy as np
import PIL.Image
import pytest

from tests import recipes
from tests.evaluation import test_made_images
from tests.test_samples import Painter, Reader, _loaded, _text
from tokgen import archives, options, records, sample_folder, samples, traces
from tokgen.commands import sample
from tokgen.evaluation import sample_parts
from tokgen.interfaces import TokenLayout, UserError
from tokgen.sampling import drawing

ROOT = pathlib.Path(__file__).resolve().parents[1]
NEAR = 7  # of the images below, those with such a divisor are near a tie


def _args(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sample.arguments(parser)
    words = ["runs/generator", *words]
    args = parser.parse_args(words)
    args.given = options.given(parser, words)
    return args


def _run(out, *words: str) -> str:
    """What is in a folder after `tokgen sample`: bytes by name."""
    args = _args("--out", str(out), *words)
    sample.check(args)
    sample.run(args)
    return _bytes(out)


def _bytes(out) -> dict[str, bytes]:
    names = [name for name in os.listdir(out) if not name.startswith("lock")]  # of other processes
    return {n: (out / n).read_bytes() for n in names if (out / n).is_file()}


def _image(seed: int, index: int, label: int) -> np.ndarray:
    return np.random.default_rng([seed, index, label]).integers(0, 256, (6, 5, 3), np.uint8)


@pytest.fixture
def painted(monkeypatch):
    """Images that are a function of (seed, number, class), in the place of networks.

    `rows` are the numbers of what was drawn, batch by batch.
    """
    rows = []

    def drawn(generator, tokenizer, cond, sampler, *, seed, batch, index_N, what):
        for k in range(0, len(index_N), batch):
            index_B, label_B = index_N[k : k + batch], cond[k : k + batch]
            rows.append(index_B.tolist())
            yield drawing.Part(
                np.stack([index_B * 10 + label_B, index_B], 1)[:, :, None].astype(np.int32),
                np.stack([_image(seed, *each) for each in zip(index_B, label_B, strict=True)]),
                index_B % NEAR == 0,
            )

    loaded = test_made_images.loaded(types.SimpleNamespace(cond="label"), classes=("a", "b", "c"))
    ready = types.SimpleNamespace(loaded=loaded, tokenizer=loaded, generator=None, sampler=None)
    ready.settings = {"weight": 1.0}
    loaded.config.view.size, loaded.layout = (6, 5), TokenLayout((999,), ((1, 2),))

    def prepared(settings, *networks):
        return types.SimpleNamespace(**vars(ready), kinds=samples.kinds(settings, loaded))

    monkeypatch.setattr(sample_folder.runtime, "devices", lambda: None)
    monkeypatch.setattr(samples, "networks", lambda settings: (loaded, loaded))
    monkeypatch.setattr(samples, "prepared", prepared)
    monkeypatch.setattr(drawing, "drawn", drawn)
    monkeypatch.setattr(drawing.sharding, "current", drawing.sharding.single)
    monkeypatch.setattr(sample_parts, "EACH", 8)
    return types.SimpleNamespace(rows=rows, loaded=loaded)


class Killed(BaseException):
    """In the place of SIGKILL: nothing catches it."""


TOTAL = ("--total", "50", "--seed", "4")


def test_a_trace_lies_beside_the_images_also_where_it_was_stopped(
    painted, tmp_path, monkeypatch, capsys
):
    def traced(ready, settings):
        frames = np.zeros((3, 2, 6, 5, 3), np.uint8)
        frames[2] = np.stack([_image(settings.seed, i, label) for i, label in ((0, 0), (2, 1))])
        return traces.Trace(frames, np.array([0, 4, 8]))

    def stopped(ready, settings):
        raise Killed

    asked = ("--classes", "0-1", "--number", "2", "--trace")
    monkeypatch.setattr(sample_folder.traces, "traced", stopped)
    with pytest.raises(Killed):
        _run(tmp_path / "out", *asked)
    monkeypatch.setattr(sample_folder.traces, "traced", traced)
    drawn, found = len(painted.rows), _run(tmp_path / "out", *asked)
    assert len(painted.rows) == drawn, "only the trace was missing"
    with PIL.Image.open(tmp_path / "out" / "trace.gif") as animation:
        assert animation.n_frames == 2  # the first two are alike: one, twice as long
    with PIL.Image.open(tmp_path / "out" / "trace.png") as strip:
        assert strip.size == (3 * (5 * 10 + 2) + 2, 2 * (6 * 10 + 2) + 2)
    assert "trace.gif and trace.png: 3 frames of 2 images" in capsys.readouterr().err
    assert {"samples.npz", "grid.png", "trace.gif", "trace.png"} < set(found)
    for words, told in (
        (("--total", "50"), "found --total"),
        (("--number", "2", "--candidates", "4"), "found candidates=4"),
    ):
        with pytest.raises(UserError, match=told):
            sample.check(_args("--out", str(tmp_path / "other"), "--trace", *words))


def test_so_many_in_all_are_one_archive_in_the_order_that_is_stated(painted, tmp_path, capsys):
    found = _run(tmp_path / "out", *TOTAL, "--batch", "6")
    assert set(found) == {
        *("samples.npz", "samples.npz.sha256", "samples.json", "tokens.npy", "grid.png")
    }
    record = json.loads(found["samples.json"])
    given = {"arange": np.arange, "numpy": np, "len": len, "total": 50, "seed": 4}
    label_N = eval(record["order"], given | {"classes": np.arange(3)})
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_1"], label_N)
        expected = np.stack([_image(4, i, label) for i, label in enumerate(label_N)])
        np.testing.assert_array_equal(arrays["arr_0"], expected)
    tokens_NLG = np.load(tmp_path / "out" / "tokens.npy")
    np.testing.assert_array_equal(tokens_NLG[:, 1, 0], np.arange(50))
    assert record["near_ties"] == list(range(0, 50, NEAR))
    digest = archives.sha256(tmp_path / "out" / "samples.npz")
    assert record["sha256"] == digest
    assert found["samples.npz.sha256"] == f"{digest}  samples.npz\n".encode()
    said = capsys.readouterr().err
    assert "50 images of 6 x 5 pixels are 4.5 kB in samples.npz" in said
    assert "50 images are no multiple of 3 classes or texts: 17 of each of the first 2, 16" in said
    assert "8 of them have a draw near a tie" in said and "48 of 50 images" in said
    # once more: nothing is drawn, and what is there is held against its checksum
    drawn = len(painted.rows)
    assert _run(tmp_path / "out", *TOTAL) == found and len(painted.rows) == drawn
    assert "there already, and samples.npz has its checksum" in capsys.readouterr().err
    whole = found["samples.npz"]
    (tmp_path / "out" / "samples.npz").write_bytes(whole[:900] + b"!" + whole[901:])
    with pytest.raises(UserError, match="samples.npz is damaged: its SHA-256 must be "):
        _run(tmp_path / "out", *TOTAL)


@pytest.mark.parametrize("batch", [3, 8, 20, 64])
def test_killed_after_any_batch_it_goes_on_without_duplicates_or_gaps(
    painted, tmp_path, monkeypatch, batch
):
    """The same batches, so that the same program sees the same rows; and no finished part again."""
    words = (*TOTAL, "--batch", str(batch))
    whole = _run(tmp_path / "whole", *words)
    every = list(painted.rows)
    assert sorted(set(sum(every, []))) == list(range(50))
    save, saved = sample_parts.save, collections.Counter()

    def dying(out, start, arrays):
        if len(saved) >= limit:
            raise Killed
        saved[start] += 1
        save(out, start, arrays)

    for limit in range(8):
        painted.rows.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sample_parts, "save", dying)
            try:
                assert _run(tmp_path / "out", *words) == whole and limit == 7
            except Killed:
                assert len(sample_parts.there(tmp_path / "out")) == limit < 7
        assert all(rows in every for rows in painted.rows)
        finished = set(range(min(50, 8 * max(0, limit - 1))))
        assert not any(set(rows) <= finished for rows in painted.rows)
    assert saved == dict.fromkeys(range(0, 50, 8), 1)  # each part once
    painted.rows.clear()
    assert _run(tmp_path / "other", *TOTAL, "--batch", "7") == whole


def test_killed_while_it_is_put_together_it_is_put_together_by_the_next_call(
    painted, tmp_path, monkeypatch
):
    whole = _run(tmp_path / "whole", *TOTAL)
    moments = ((pathlib.Path, "replace"), (shutil, "rmtree"), (os, "fsync"))
    ended, left = 0, 0
    for where, name in moments:
        for nth in range(1, 30):
            out, calls, real = tmp_path / f"{name}{nth}", [], getattr(where, name)

            def dying(*words, calls=calls, real=real, nth=nth, **options):
                calls.append(1)
                if len(calls) >= nth:
                    raise Killed
                return real(*words, **options)

            with monkeypatch.context() as patch:
                patch.setattr(where, name, dying)
                try:
                    _run(out, *TOTAL)
                    break
                except Killed:
                    ended += 1
            left += len(list(out.glob(".samples.npz.*.part")))
            for part in out.glob(".*.part"):  # of another process
                part.rename(out / part.name.replace(str(os.getpid()), "1"))
            assert _run(out, *TOTAL) == whole, (name, nth)
            assert sorted(os.listdir(out)) == sorted(whole), (name, nth)
    assert ended > 25 and left  # seven parts, and five files of the whole


def test_one_part_is_in_memory_while_they_are_put_together(painted, tmp_path, monkeypatch):
    total, size = 1600, (64, 48)
    monkeypatch.setattr(sample_parts, "EACH", 40)
    for start, stop in sample_parts.bounds(total):
        image_BHW3 = np.full((stop - start, *size, 3), start % 256, np.uint8)
        part = {"image": image_BHW3, "tokens": np.zeros((stop - start, 2, 1), np.int32)}
        sample_parts.save(tmp_path, start, part | {"near": np.zeros(stop - start, bool)})
    index_KX = np.arange(0, total, 40)[:, None]  # an image of each part stands on the sheet
    tracemalloc.start()
    try:
        kind_N = np.arange(total) // 40
        sample_folder._merged(tmp_path, kind_N, index_KX, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "samples.npz").stat().st_size > total * 64 * 48 * 3 > 2 * peak


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_shares_in_any_order_are_the_whole(painted, tmp_path, capsys, order):
    whole = _run(tmp_path / "whole", *TOTAL)
    painted.rows.clear()
    for n, share in enumerate(order):
        found = _run(tmp_path / "out", *TOTAL, "--part", f"{share}/3", "--batch", str(5 + share))
        said = capsys.readouterr().err
        if n < 2:
            assert set(found) == {"samples.json"}
            assert "images are in" in said and "ends last puts them together" in said
    assert found == whole and sorted(os.listdir(tmp_path / "out")) == sorted(whole)
    drawn = collections.Counter(sum(painted.rows, []))
    assert set(drawn) == set(range(50))
    # one that is begun again when all is there has nothing to do
    assert _run(tmp_path / "out", *TOTAL, "--part", "2/3") == whole
    # more shares than parts
    for share in range(1, 12):
        found = _run(tmp_path / "many", *TOTAL, "--part", f"{share}/11")
    assert found == whole
    # and after some shares the rest in one
    _run(tmp_path / "rest", *TOTAL, "--part", "2/3")
    assert _run(tmp_path / "rest", *TOTAL) == whole


def test_two_that_end_at_once_do_not_clash(painted, tmp_path, monkeypatch):
    whole = _run(tmp_path / "whole", *TOTAL)
    real, merged, gate = sample_folder._merged, [], threading.Barrier(2)
    save = sample_parts.save

    def slow(*words):
        merged.append(1)
        time.sleep(0.3)
        return real(*words)

    def last(out, start, arrays):
        save(out, start, arrays)
        if start in (16, 48):  # the last part of each share: both see that all are there
            gate.wait(20)

    monkeypatch.setattr(sample_folder, "_merged", slow)
    monkeypatch.setattr(sample_parts, "save", last)
    monkeypatch.setattr(sample_folder.locks, "WAIT", 0.02)
    found = {}

    def work(share):
        found[share] = _run(tmp_path / "out", *TOTAL, "--part", f"{share}/2")

    threads = [threading.Thread(target=work, args=(share,)) for share in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1: whole, 2: whole} and merged == [1]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(whole)


def test_another_division_that_is_faster_ends_the_slower(painted, tmp_path, monkeypatch, capsys):
    whole = _run(tmp_path / "whole", *TOTAL)
    painted.rows.clear()
    save, calls = sample_parts.save, []

    def overtaken(out, start, arrays):
        calls.append(start)
        if len(calls) == 1:
            _run(out, *TOTAL)
        save(out, start, arrays)

    monkeypatch.setattr(sample_parts, "save", overtaken)
    capsys.readouterr()
    found = _run(tmp_path / "out", *TOTAL, "--part", "1/2", "--batch", "4")
    assert found == whole and sorted(os.listdir(tmp_path / "out")) == sorted(whole)
    said = capsys.readouterr().err
    assert said.count(f"50 images in {tmp_path / 'out'}") == 2 and "is drawn" not in said
    assert list(range(8, 12)) in painted.rows and list(range(20, 24)) not in painted.rows


def test_what_killed_processes_left_is_gone_in_the_end(painted, tmp_path):
    whole = _run(tmp_path / "whole", *TOTAL)
    names = (
        *(".samples.json.host.1.2.part", "..samples.json.host.1.2.part.1.part"),
        *(".samples.json.1.part", ".grid.png.part", ".tokens.npy.host.1.2.part"),
        *("lock-1-of-3", "lock"),
    )
    for words in (("--part", "1/2"), ("--part", "2/2"), ()):
        (tmp_path / "out").mkdir(exist_ok=True)
        for name in names:
            (tmp_path / "out" / name).touch()
        found = _run(tmp_path / "out", *TOTAL, *words)
    assert found == whole and sorted(os.listdir(tmp_path / "out")) == sorted(whole)


def test_a_part_that_is_gone_amid_putting_together_is_told(painted, tmp_path, monkeypatch):
    load = sample_parts.load

    def gone(out, start, stop):
        if start == 24:
            sample_parts.file(out, start).unlink()
        return load(out, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(sample_parts, "load", gone)
        with pytest.raises(UserError, match="0000024.npz is gone: .*; run the same command again"):
            _run(tmp_path / "out", *TOTAL)
    assert not list((tmp_path / "out").rglob(".*.part"))
    assert _run(tmp_path / "out", *TOTAL) == _run(tmp_path / "whole", *TOTAL)


def test_one_share_is_drawn_by_one_process(painted, tmp_path):
    words = [*TOTAL, "--part", "1/2"]
    with sample_folder.output.growing(
        tmp_path / "out", records=sample_folder.RECORDS, lock="lock-1-of-2"
    ):
        with pytest.raises(UserError, match="in use by process"):
            _run(tmp_path / "out", *words)
        _run(tmp_path / "out", *TOTAL, "--part", "2/2")
    _run(tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--seed", "5"), "seed: 4 there, 5 here"),
        (("--total", "51"), "total: 50 there, 51 here"),
        (("--class-counts", "drawn"), "class_counts: equal there, drawn here"),
        (("--classes", "a,b"), "conditions: "),
        (("--png",), "png: False there, True here"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_is_of_one_set(painted, tmp_path, words, told, finished):
    before = _run(tmp_path / "out", *TOTAL, *(() if finished else ("--part", "1/2")))
    painted.rows.clear()
    with pytest.raises(UserError, match=f"(?s)holds samples of another command line.*{told}"):
        _run(tmp_path / "out", *TOTAL, *words)
    assert _bytes(tmp_path / "out") == before and not painted.rows


def test_a_folder_of_something_else_is_not_drawn_into(painted, tmp_path):
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "a.jpg").write_text("")
    for words in (TOTAL, (*TOTAL, "--overwrite")):
        with pytest.raises(UserError, match="a.jpg"):
            _run(tmp_path / "photographs", *words)
    assert os.listdir(tmp_path / "photographs") == ["a.jpg"]
    _run(tmp_path / "few", "--number", "2")
    with pytest.raises(UserError, match="number: 2 there, None here"):
        _run(tmp_path / "few", *TOTAL)
    with pytest.raises(UserError, match="not empty"):
        _run(tmp_path / "few", "--number", "2")
    whole = _run(tmp_path / "few", *TOTAL, "--overwrite")
    assert whole == _run(tmp_path / "new", *TOTAL)
    # what another process of the set has just begun to write is nothing else
    (tmp_path / "begun").mkdir()
    for name in ("lock-2-of-2", ".samples.json.host.1.part"):
        (tmp_path / "begun" / name).touch()
    assert set(_run(tmp_path / "begun", *TOTAL)) == set(whole)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--total", "0"), "--total must be at least 1"),
        (("--total", "-3"), "--total must lie in"),
        (("--total", "5000001"), "--total must lie in .1, 5,000,000"),
        (("--total", "8", "--number", "2"), "--number .it is for images of each class, without"),
        (("--number", "2", "--part", "1/2"), "--part .it is for a number of images in all"),
        (("--class-counts", "drawn"), "--class-counts .it is for"),
        (("--total", "8", "--part", "1/2", "--overwrite"), "--overwrite would replace what the"),
        *(
            (("--total", "8", "--part", part), "--part must be I/N, the share I of N")
            for part in ("0/2", "3/2", "1", "1/2/3", "a/b", "1/0", "1 / 2", "1/99999999")
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(tmp_path, words, told):
    with pytest.raises(UserError, match=told):
        sample.check(_args("--out", str(tmp_path / "out"), *words))
    assert not (tmp_path / "out").exists()


def test_as_many_as_may_be_drawn_can_all_be_listed_as_near_a_tie():
    last = sample_parts.MOST - 1
    line = json.dumps({"near_ties": [last, last]}, indent=2).splitlines()[2] + "\n"
    assert sample_parts.MOST * len(line) < records.BYTES - 10**6
    assert sample_parts.file(pathlib.Path(), last).name == f"{last}.npz"


def test_a_disk_without_room_is_told_before_anything_is_drawn(painted, tmp_path, monkeypatch):
    def free(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=count))

    # tokens of two numbers, images of 90 bytes: 98 of each part, and again in the whole
    free(100 * 98)
    _run(tmp_path / "out", *TOTAL, "--part", "1/2")  # three parts of 8
    free((26 + 50) * 98 - 1)
    painted.rows.clear()
    for name, need in (("out", "7.448 kB"), ("new", "9.8 kB")):
        with pytest.raises(
            UserError, match=f"{need} are to be written; .*{name} has 7.447 kB free"
        ):
            _run(tmp_path / name, *TOTAL)
    assert not painted.rows
    # what was left of putting together makes room before it is made anew
    free((26 + 50) * 98 - 100)
    left = [tmp_path / "out" / name for name in (".samples.npz.host.1.2.part", "samples.npz")]
    left[0].write_bytes(bytes(60))
    left[1].write_bytes(bytes(40))
    whole = _run(tmp_path / "out", *TOTAL)
    assert len(whole["samples.npz"]) > 40 and not left[0].exists()


@pytest.mark.parametrize("nth", [5, 9])  # of the record, seven parts, the whole
def test_a_disk_that_is_full_is_told_and_gone_on_with(painted, tmp_path, monkeypatch, nth):
    whole = _run(tmp_path / "whole", *TOTAL)
    real, calls = os.fsync, []

    def full(number):
        calls.append(1)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="cannot write .*out: no space left.*make room") as told:
            _run(tmp_path / "out", *TOTAL)
    assert "same command again" in str(told.value)
    assert not list((tmp_path / "out").rglob(".*.part"))
    assert _run(tmp_path / "out", *TOTAL) == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt(), sample_folder.runtime.Stopped(15, "")])
def test_an_interrupt_says_how_far_it_is(painted, tmp_path, monkeypatch, capsys, error):
    save = sample_parts.save

    def stopped(out, start, arrays):
        if start == 24:
            raise error
        save(out, start, arrays)

    monkeypatch.setattr(sample_parts, "save", stopped)
    with pytest.raises(type(error)):
        _run(tmp_path / "out", *TOTAL, "--batch", "8")
    said = capsys.readouterr().err
    assert f"24 of 50 images are in {tmp_path / 'out'}, and the same command goes on" in said


def test_an_interrupt_of_a_finished_folder_says_that_all_is_there(
    painted, tmp_path, monkeypatch, capsys
):
    _run(tmp_path / "out", *TOTAL)

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(archives, "sha256", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", *TOTAL)
    assert f"50 of 50 images are in {tmp_path / 'out'}" in capsys.readouterr().err


def test_a_damaged_part_is_named_and_made_again(painted, tmp_path):
    whole = _run(tmp_path / "whole", *TOTAL)
    _run(tmp_path / "out", *TOTAL, "--part", "1/2")
    file = tmp_path / "out" / "parts" / "0000008.npz"
    bytes_ = file.read_bytes()
    flipped = bytes_[:500] + bytes([bytes_[500] ^ 4]) + bytes_[501:]
    short = tmp_path / "short.npz"
    np.savez(short, image=np.zeros((7, 6, 5, 3), np.uint8))
    for wrong, told in ((flipped, ""), (bytes_[:99], ""), (short.read_bytes(), "hold 8 images")):
        file.write_bytes(wrong)
        with pytest.raises(UserError, match=f"0000008.npz is damaged.*{told}.*made again"):
            _run(tmp_path / "out", *TOTAL)
    file.unlink()
    painted.rows.clear()
    assert _run(tmp_path / "out", *TOTAL, "--batch", "8") == whole
    assert painted.rows == [list(range(8, 16))]  # and not all of them again


def test_with_png_each_image_has_a_file(painted, tmp_path):
    for share in (2, 1):
        found = _run(tmp_path / "out", *TOTAL, "--png", "--part", f"{share}/2")
    assert len([name for name in found if name.startswith("seed4-")]) == 50


# ---------------------------------------------------------------- so many of each class


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A generator and tokenizer in the place of checkpoints; what was drawn, batch by batch."""
    np.savez(tmp_path / "text.npz", **_text(5))
    loaded = _loaded(Reader(), default={"temperature": 2.0})
    loaded.step, loaded.fingerprint = tmp_path / "G", "f"
    config = types.SimpleNamespace(view=types.SimpleNamespace(size=(2, 2), channels=3))
    painter = types.SimpleNamespace(module=Painter(), fingerprint="t", config=config)
    monkeypatch.setattr(sample_folder.runtime, "devices", lambda: None)
    monkeypatch.setattr(samples.checkpoint, "find", lambda path: path)
    monkeypatch.setattr(samples.checkpoint, "read_meta", lambda step: {"kind": "tokenizer"})
    monkeypatch.setattr(samples.loading, "load_to_draw", lambda *_, **more: loaded)
    monkeypatch.setattr(samples.loading, "load_to_decode", lambda *_: painter)
    monkeypatch.setattr(drawing.sharding, "current", drawing.sharding.single)
    monkeypatch.setattr(sample_parts, "EACH", 4)
    real, batches = drawing.sharding.filled, []

    def filled(tree, batch, mesh):
        batches.append(batch)
        return real(tree, batch, mesh)

    monkeypatch.setattr(drawing.sharding, "filled", filled)

    def run(name, *words):
        return _run(tmp_path / name, "--text", str(tmp_path / "text.npz"), *words)

    return types.SimpleNamespace(run=run, batches=batches, loaded=loaded)


def test_samples_that_were_killed_go_on_to_the_same_images(stand_ins, monkeypatch, tmp_path):
    whole = stand_ins.run("whole", "--number", "3", "--batch", "4")
    assert stand_ins.batches == [4, 4, 4, 4]
    png = [name for name in whole if name.startswith("seed0-")]
    assert len(png) == 15 and set(whole) - set(png) == {
        *("samples.npz", "samples.npz.sha256", "samples.json", "tokens.npy", "grid.png")
    }
    save = sample_parts.save

    def dying(out, start, arrays):
        if start == 4:
            raise KeyboardInterrupt
        save(out, start, arrays)

    stand_ins.batches.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample_parts, "save", dying)
        stand_ins.run("killed", "--number", "3", "--batch", "4")
    assert not (tmp_path / "killed").exists()
    with pytest.raises(UserError, match="seed: 0 there, 1 here"):
        stand_ins.run("killed", "--number", "3", "--seed", "1")
    # in other batches: eleven are left
    assert stand_ins.run("killed", "--number", "3", "--batch", "6") == whole
    # one was under way, and one begun
    assert stand_ins.batches == [4, 4, 4, 4, 5, 5, 5]
    assert list(tmp_path.glob(".*")) == []


def test_python_draws_the_images_that_the_command_writes(stand_ins, tmp_path):
    stand_ins.run("out", "--number", "2", "--temperature", "0.5", "--no-png")
    text = str(tmp_path / "text.npz")
    found = samples.sample("G", text=text, number=2, temperature=0.5, batch=3)
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        np.testing.assert_array_equal(found.image_NHW3, arrays["arr_0"])
        np.testing.assert_array_equal(found.kind_N, arrays["arr_1"])
    np.testing.assert_array_equal(found.tokens_NLG, np.load(tmp_path / "out" / "tokens.npy"))
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert found.classes == () and found.settings == record["settings"]
    assert record["settings"]["temperature"] == 0.5
    with pytest.raises(UserError, match="--number and --batch must be at least 1; found 0, 32"):
        samples.sample("G", text=text, number=0)


def test_samples_are_not_mixed_with_others(stand_ins, tmp_path):
    first = stand_ins.run("out", "--number", "2", "--batch", "32")
    assert stand_ins.batches == [10]  # and not 32
    with pytest.raises(UserError, match="--overwrite"):
        stand_ins.run("out", "--number", "1")
    stand_ins.loaded.module = None  # noticed before anything is loaded
    with pytest.raises(UserError, match="--overwrite"):
        stand_ins.run("out", "--number", "1")
    stand_ins.loaded.module = Reader()
    second = stand_ins.run("out", "--number", "1", "--overwrite", "--no-png")
    assert set(second) == {
        *("samples.npz", "samples.npz.sha256", "samples.json", "tokens.npy", "grid.png")
    }
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 2, 2, 3)
    assert len(first) == 15


def test_an_image_that_is_not_finite_ends_it(stand_ins, monkeypatch, tmp_path):
    draw_tokens = drawing.draw_tokens

    def invalid(*words, **named):
        tokens, invalid_B, near_B = draw_tokens(*words, **named)
        return tokens, invalid_B | (len(stand_ins.batches) > 1), near_B

    monkeypatch.setattr(drawing, "draw_tokens", invalid)
    with pytest.raises(UserError, match="logits must be finite.*: number 2"):
        stand_ins.run("out", "--number", "1", "--batch", "2")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- real processes, really killed


def _started(place: pathlib.Path, out: pathlib.Path, *words: str, devices: int = 1):
    """`tokgen sample` of a tiny generator in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "NPROC": str(max(4, 4 * devices)),
    }
    command = [sys.executable, "-m", "tokgen.cli", "sample", str(place / "runs" / "generator")]
    return subprocess.Popen(
        [*command, "--out", str(out), *words],
        cwd=place,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ended(process) -> str:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def _same(one: pathlib.Path, other: pathlib.Path) -> int:
    """How many images have other tokens, all near a tie; the pixels of the others are the same.

    But for a grey level.
    """
    near = set()
    for folder in (one, other):
        near |= set(json.loads((folder / "samples.json").read_text())["near_ties"])
    tokens = [np.load(folder / "tokens.npy") for folder in (one, other)]
    images = []
    for folder in (one, other):
        with np.load(folder / "samples.npz") as arrays:
            images.append(arrays["arr_0"].astype(int))
            labels = arrays["arr_1"]
    assert len(labels) == len(tokens[0])
    differs_N = (tokens[0] != tokens[1]).any((1, 2))
    assert set(np.flatnonzero(differs_N).tolist()) <= near
    assert np.abs(images[0] - images[1])[~differs_N].max() <= 1
    return int(differs_N.sum())


@pytest.mark.long
def test_killed_ten_times_the_files_are_the_same_to_the_byte(tmp_path):
    """By SIGKILL, amid drawing and amid putting together."""
    recipes.tiny(tmp_path, "raster")
    words = ("--total", "512", "--batch", "16", "--seed", "3")
    _ended(_started(tmp_path, tmp_path / "whole", *words))
    whole, out, kills = _bytes(tmp_path / "whole"), tmp_path / "out", 0
    moments = random.Random(0)
    # how many parts there are, of 16, when a process is killed; 17: while they are put together
    for parts in (1, 2, 4, 5, 7, 9, 12, 15, 16, 17):
        process = _started(tmp_path, out, *words)
        while process.poll() is None:
            there = len(sample_parts.there(out))
            merging = list(out.glob(".samples.npz.*.part")) if parts > 16 else there >= parts
            if merging:
                time.sleep(moments.uniform(0, 0.05))
                process.kill()
                kills += process.wait() == -signal.SIGKILL
                break
            time.sleep(0.001)
        process.communicate()
    _ended(_started(tmp_path, out, *words))
    assert kills >= 9  # the last may have been too late
    assert _bytes(out) == whole and sorted(os.listdir(out)) == sorted(whole)


@pytest.mark.long
@pytest.mark.parametrize("family", ["raster", "random", "masked"])
def test_elsewhere_and_in_shares_the_images_are_the_same(family, tmp_path):
    recipes.tiny(tmp_path, family)
    words = ("--total", "512", "--batch", "16", "--seed", "3")
    _ended(_started(tmp_path, tmp_path / "whole", *words))
    whole = _bytes(tmp_path / "whole")
    # another batch and other devices go on with what one process left; and all anew in shares
    process = _started(tmp_path, tmp_path / "other", *words, devices=8)
    while len(sample_parts.there(tmp_path / "other")) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    seven = (*words[:2], "--batch", "7", *words[4:])
    _ended(_started(tmp_path, tmp_path / "other", *seven))
    shares = [_started(tmp_path, tmp_path / "shares", *seven, "--part", f"{i}/2") for i in (1, 2)]
    said = "".join(_ended(process) for process in shares)
    assert "512 images in" in said
    for name in ("other", "shares"):
        _same(tmp_path / "whole", tmp_path / name)
    assert sorted(os.listdir(tmp_path / "shares")) == sorted(whole)
