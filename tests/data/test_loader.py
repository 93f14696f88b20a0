"""Batches are a function of (seed, step), whoever loads them and wherever they start."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from tokgen import distributed, interfaces
from tokgen.data import (
    folder,
    loader,
    shapes,
    sources,
    token_shards,
    token_writer,
    unreadable,
    views,
)
from tokgen.errors import SharedError


class Numbered(sources.RandomAccess):
    """Images that say which they are: the index in the first pixel, noise elsewhere."""

    def __init__(self, count, size=(12, 18), broken=()):
        self.count, self.size, self.broken = count, size, set(broken)
        self.read = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.broken:
            return {"image": b"broken", "label": index}
        image = np.full((*self.size, 3), index, np.uint8)
        image[:, : self.size[1] // 2] = 255 - index
        loader = io.BytesIO()
        Image.fromarray(image).save(loader, "PNG")
        return {"image": loader.getvalue(), "label": index}

    def name(self, index):
        return f"picture-{index}"


RANDOM = views.View((8, 12), crop="random", flip=True)


def take(count, *arguments, **keywords):
    with loader.batches(*arguments, **keywords) as batches:
        return [next(batches) for _ in range(count)]


def same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_sees_the_same_global_batches(processes):
    source = Numbered(30)  # 8 does not divide 30: batches cross epochs
    alone = take(10, source, RANDOM, seed=3, batch_size=8)
    parts = [
        take(10, source, RANDOM, seed=3, batch_size=8, rows=rows, threads=2)
        for rows in np.arange(8).reshape(processes, -1)
    ]
    for step, whole in enumerate(alone):
        assert whole["image"].shape == (8, 8, 12, 3) and whole["image"].dtype == np.uint8
        assert whole["label"].dtype == np.int32
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in whole}
        same(whole, joined)


def test_a_stream_starts_at_any_step():
    source = Numbered(30, broken=(4, 5))
    keywords = {"seed": 1, "batch_size": 8, "max_bad": 1.0}
    whole = take(12, source, RANDOM, **keywords)
    for start in range(12):
        rest = take(12 - start, source, RANDOM, start=start, threads=start % 3, **keywords)
        for left, right in zip(whole[start:], rest, strict=True):
            same(left, right)
    # Against comparing a constant with itself:
    assert any((whole[0]["image"] != batch["image"]).any() for batch in whole[1:])


def test_every_index_once_per_epoch_in_a_new_order():
    labels = np.concatenate(
        [batch["label"] for batch in take(9, Numbered(24), RANDOM, seed=0, batch_size=8)]
    ).reshape(3, 24)
    np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile(np.arange(24), (3, 1)))
    assert len({tuple(epoch) for epoch in labels}) == 3
    other = take(3, Numbered(24), RANDOM, seed=1, batch_size=8)
    assert (np.concatenate([batch["label"] for batch in other]) != labels[0]).any()


def test_batches_of_one_image_have_no_end_to_overflow():
    """grain rounded the number of batches of an endless set beyond its own largest length."""
    single = take(7, Numbered(3), RANDOM, seed=5, batch_size=1)
    three = take(2, Numbered(3), RANDOM, seed=5, batch_size=3)
    labels = [int(batch["label"][0]) for batch in single]
    assert labels[:6] == [int(label) for batch in three for label in batch["label"]]


def test_the_order_does_not_change_between_releases():
    """A run that is resumed by another version of grain must go on in the same order."""
    found = take(2, Numbered(10), RANDOM, seed=0, batch_size=10)
    expected = [[1, 2, 4, 5, 9, 7, 8, 6, 0, 3], [9, 6, 1, 8, 2, 0, 3, 5, 4, 7]]
    np.testing.assert_array_equal([batch["label"] for batch in found], expected)


def test_crops_and_flips_change_from_epoch_to_epoch():
    batches = take(4, Numbered(1, size=(40, 60)), RANDOM, seed=0, batch_size=4)
    assert len({image.tobytes() for batch in batches for image in batch["image"]}) > 8


def test_views_do_not_shift_the_order():
    plain = take(3, Numbered(20), views.View((12, 18)), seed=5, batch_size=8)
    random = take(3, Numbered(20), RANDOM, seed=5, batch_size=8)
    for left, right in zip(plain, random, strict=True):
        np.testing.assert_array_equal(left["label"], right["label"])
        # The plain view leaves the picture alone, whose first pixel says which it is.
        np.testing.assert_array_equal(left["image"][:, 0, 0, 0], 255 - left["label"])
        np.testing.assert_array_equal(left["image"][:, -1, -1, 0], left["label"])


def test_a_broken_image_is_replaced_by_the_next_of_its_permutation_and_moves_no_other():
    view = views.View((12, 18))
    sound = take(6, Numbered(20), view, seed=2, batch_size=10)
    order = np.concatenate([batch["label"] for batch in sound]).reshape(3, 20)
    broken = {int(order[0, 3]), int(order[0, 4]), int(order[1, 19])}
    expected = order.copy()
    for epoch, row in enumerate(order):
        for place in range(20):
            n = place
            while row[n % 20] in broken:
                n += 1
            expected[epoch, place] = row[n % 20]
    with loader.batches(
        Numbered(20, broken=broken), view, seed=2, batch_size=10, max_bad=1.0
    ) as batches:
        found = [next(batches) for _ in range(6)]
        assert (batches.seen, batches.bad, batches.step) == (60, 3, 6)  # files, not how often met
        assert set(batches.broken) == {f"picture-{index}" for index in broken}
    labels = np.concatenate([batch["label"] for batch in found])
    np.testing.assert_array_equal(labels, expected.ravel())
    pixels = np.concatenate([batch["image"] for batch in found])
    np.testing.assert_array_equal(pixels[:, -1, -1, 0], labels)


def test_counts_are_of_what_was_handed_out_and_not_of_what_was_loaded_ahead():
    source = Numbered(64, broken=range(0, 64, 4))
    with loader.batches(
        source, RANDOM, seed=0, batch_size=8, threads=2, prefetch=6, max_bad=1.0
    ) as batches:
        assert (batches.seen, batches.bad) == (0, 0)
        next(batches)
        assert batches.seen == 8 and batches.bad <= 8


def test_distinct_files_are_allowed_however_often_they_are_met():
    source = Numbered(50, broken=(7, 9))
    with loader.batches(source, RANDOM, seed=0, batch_size=50, threads=0) as batches:
        for _ in range(30):  # 60 elements
            next(batches)
        assert batches.bad == 2 and batches.seen == 1500
    source = Numbered(50, broken=range(0, 44, 4))
    with loader.batches(source, RANDOM, seed=0, batch_size=50) as batches:
        with pytest.raises(interfaces.UserError, match="11 of 50 images.*max_bad=SHARE") as error:
            next(batches)  # ten of ten thousand are allowed
    assert "picture-" in str(error.value)


def test_what_is_unreadable_is_told_once_by_name(capfd):
    source = Numbered(20, broken=(3, 8))
    for _ in range(2):
        with loader.once(source, views.View((12, 18)), batch_size=5) as batches:
            assert [len(batch["label"]) for batch in batches] == [5, 5, 5, 3]
    with loader.batches(source, RANDOM, seed=0, batch_size=20, max_bad=1.0) as batches:
        next(batches)
    said = capfd.readouterr().err
    assert said.count("picture-3: ") == said.count("picture-8: ") == 1
    assert "of 20 images cannot be read" in said and " at 0x" not in said


def test_a_wall_of_broken_files_is_a_few_lines(capfd):
    source = Numbered(250, broken=range(1, 250, 2))
    list(loader.once(source, views.View((12, 18)), batch_size=10))
    said = capfd.readouterr().err
    assert "125 of 250 images cannot be read" in said and len(said.splitlines()) < 75


def test_a_set_without_one_sound_image_stops_at_once():
    with loader.batches(Numbered(40, broken=range(40)), RANDOM, seed=0, batch_size=4) as batches:
        with pytest.raises(interfaces.UserError, match="picture-") as error:
            next(batches)
    assert "in a row" in str(error.value)


def test_a_file_that_vanishes_is_a_broken_image(tmp_path):
    for number in range(6):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    source = folder.Source(tmp_path, split="all")
    (tmp_path / "2.png").unlink()
    with loader.batches(source, views.View((4, 4)), seed=0, batch_size=6) as batches:
        batch = next(batches)
        assert batches.bad == 1 and batches.broken == ("2.png",)
    assert sorted(set(batch["image"][:, 0, 0, 0].tolist())) == [0, 1, 3, 4, 5]


def test_drawn_images_come_in_batches_and_are_the_same_as_one_by_one():
    source = shapes.Source((16, 24), count=50)
    view = views.View((16, 24), flip=True)

    class OneByOne(sources.RandomAccess):
        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            return source[index]

    for left, right in zip(
        take(5, source, view, seed=0, batch_size=16),
        take(5, OneByOne(), view, seed=0, batch_size=16),
        strict=True,
    ):
        same(left, right)


def test_one_pass_is_in_order_and_whole():
    source = Numbered(11, broken=(3, 10))
    view = views.View((12, 18))
    with loader.once(source, view, batch_size=4) as batches:
        found = list(batches)
        assert batches.bad == 2 and batches.seen == 9
    assert [len(batch["label"]) for batch in found] == [4, 4, 1]
    for name in ("label", "index"):  # what cannot be read is left out, and nothing in its place
        values = np.concatenate([batch[name] for batch in found])
        np.testing.assert_array_equal(values, [0, 1, 2, 4, 5, 6, 7, 8, 9])
    pixels = np.concatenate([batch["image"] for batch in found])
    np.testing.assert_array_equal(pixels[:, -1, -1, 0], values)
    some = loader.once(source, view, batch_size=2, indices=[9, 3, 4, 6])
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in some]), [9, 4, 6])
    with pytest.raises(interfaces.UserError, match="0 images can be read.*(\n.*)*picture-10"):
        list(loader.once(source, view, batch_size=4, indices=[10, 3]))
    assert not list(loader.once(source, view, batch_size=4, indices=[10, 3], least=0))
    with pytest.raises(interfaces.UserError, match="random"):
        loader.once(source, RANDOM, batch_size=2)


def test_threads_change_nothing_of_one_pass_and_decode_once():
    """In pieces of a batch, by threads, for several views at once."""
    source = Numbered(23, broken=(3, 4, 5, 6, 7, 22))
    names = views.stored("ten,center")
    every = views.Every(tuple(views.fixed(name, (12, 18)) for name in names))
    alone = list(loader.once(source, every, batch_size=5))
    assert sorted(source.read) == list(range(23))
    for threads in (1, 2, 4, 9):
        source.read.clear()
        found = list(loader.once(source, every, batch_size=5, threads=threads))
        for batch, other in zip(found, alone, strict=True):
            same(batch, other)
        assert sorted(source.read) == list(range(23))
    with loader.once(source, every, batch_size=2, threads=3) as passing:
        next(passing)  # what was loaded ahead is dropped
    several = [loader.once(source, view, batch_size=5) for view in every.views]
    for batch, *singles in zip(alone, *several, strict=True):
        pixels = np.stack([single["image"] for single in singles], axis=1)
        np.testing.assert_array_equal(batch["image"], pixels)


@pytest.fixture
def shards(tmp_path):
    writer = token_writer.Writer(
        tmp_path / "tokens",
        images={"train": 10},
        layout={"vocab": [100, 7], "grids": [[1, 3]]},
        tokenizer={"path": "t", "fingerprint": "f", "precision": "float32"},
        data={"fingerprint": "d"},
        views=("center", "flip"),
        shard_images=4,
    )
    for shard in writer.remaining():
        index = np.arange(shard.start, shard.stop)
        tokens_BXLG = np.zeros((len(index), 2, 3, 2), np.int32)
        tokens_BXLG[..., 0] = index[:, None, None] + np.array([0, 50])[:, None]
        writer.write(shard, tokens_BXLG, np.zeros(len(index), int))
    writer.finish()
    return token_shards.Source(tmp_path / "tokens")


def test_token_shards_are_streamed_with_one_of_their_views(shards):
    whole = take(20, shards, seed=0, batch_size=10)
    first = np.stack([batch["tokens"] for batch in whole])
    assert first.shape == (20, 10, 3, 2) and first.dtype == np.uint8
    images_seen = np.sort(first[:, :, 0, 0] % 50, axis=1)
    np.testing.assert_array_equal(images_seen, np.tile(np.arange(10), (20, 1)))
    assert 70 < (first[:, :, 0, 0] >= 50).sum() < 130
    # Both views of an image turn up: they are drawn anew each epoch.
    assert {1, 51} <= set(first[:, :, 0, 0].ravel().tolist())
    for part in range(2):
        half = take(20, shards, seed=0, batch_size=10, rows=np.arange(10).reshape(2, 5)[part])
        for left, right in zip(whole, half, strict=True):
            same({key: left[key][part * 5 : part * 5 + 5] for key in left}, right)
    passed = list(loader.once(shards, batch_size=4))
    np.testing.assert_array_equal(np.concatenate(passed_tokens(passed))[:, 0, 0], np.arange(10))


def test_images_without_tokens_are_broken_elements_of_shards(shards, capfd):
    """The order stays that of all images; another one stands in, or it is left out."""
    order = take(4, shards, seed=0, batch_size=5)
    shards.missing = {4: ("cat/4.png", "cut off"), 5: ("cat/5.png", "cut off")}
    with loader.batches(shards, seed=0, batch_size=5, max_bad=0.0) as batches:
        found = [next(batches) for _ in range(4)]
    before, after = (
        np.concatenate(passed_tokens(part))[:, 0, 0].reshape(2, 10) % 50 for part in (order, found)
    )
    for left, right in zip(before, after, strict=True):
        expected = left.copy()
        for place in range(10):
            n = place
            while left[n % 10] in (4, 5):
                n += 1
            expected[place] = left[n % 10]
        np.testing.assert_array_equal(right, expected)
    passed = list(loader.once(shards, batch_size=4))
    kept = np.concatenate(passed_tokens(passed))[:, 0, 0]
    np.testing.assert_array_equal(kept, [0, 1, 2, 3, 6, 7, 8, 9])
    assert capfd.readouterr().err.count("cat/4.png: cut off") == 1


def passed_tokens(batches):
    return [batch["tokens"] for batch in batches]


def test_processes_agree_on_what_cannot_be_read(monkeypatch):
    """Each meets few, all together too many: an error of all, when they compare, not before."""
    broken = range(6)
    told, rows = [], np.arange(8).reshape(2, 4)
    monkeypatch.setattr(distributed, "many", lambda: True)
    monkeypatch.setattr(distributed, "gathered", lambda what, text: told.append(text) or [text])
    # 3 of 10,000 may be; each begins with what the other has met
    keywords = dict(seed=1, batch_size=8, max_bad=3e-4)
    sources_ = [Numbered(12, broken=broken) for _ in rows]
    parts = [
        loader.batches(source, RANDOM, rows=part, **keywords)
        for source, part in zip(sources_, rows, strict=True)
    ]
    for part in parts:
        next(part)
        assert part.seen == 8 and 0 < part.bad <= 3  # of all processes
        assert part.agree() == part.bad
    both = told.copy()
    monkeypatch.setattr(distributed, "gathered", lambda what, text: both)
    parts[1]._told = parts[0]._told = 0
    for part in parts:
        with pytest.raises(SharedError, match=r"of 8 images cannot be read.* or 3, may be"):
            part.agree()
    assert set(parts[0].broken) == set(parts[1].broken) and len(parts[0].broken) > 3
    monkeypatch.setattr(distributed, "gathered", lambda what, text: told.append(text) or [text])
    with pytest.raises(SharedError):
        parts[0].agree()
    assert told[-1] == "[]"  # nothing is told twice
    for part in parts:
        part.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"start": -1},
        {"seed": -1},
        {"seed": 2**32},
        {"max_bad": 2.0},
    ],
)
def test_impossible_streams_are_refused(wrong):
    with pytest.raises(interfaces.UserError):
        loader.batches(Numbered(4), RANDOM, **{"seed": 0, "batch_size": 4, **wrong})


def test_a_view_is_needed_for_images_and_channels_agree():
    with pytest.raises(interfaces.UserError, match="needs a view"):
        loader.batches(Numbered(4), seed=0, batch_size=2)
    with pytest.raises(interfaces.UserError, match="channels"):
        take(1, shapes.Source(), views.View((32, 32), 1), seed=0, batch_size=2)


def test_names_of_any_bytes_and_files_that_may_not_be_read_are_told(tmp_path, capfd, monkeypatch):
    for name in (b"1.png", b"a\xff\nb.png"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
            pass
    source = folder.Source(tmp_path, split="all")
    read = source.open

    def refused(index):
        if index == 0:
            raise PermissionError(13, "Permission denied", "1.png")
        return read(index)

    monkeypatch.setattr(source, "open", refused)
    assert not list(loader.once(source, views.View((4, 4)), batch_size=2, least=0))
    said = capfd.readouterr().err
    assert "1.png: PermissionError: Permission denied" in said
    assert "a\\udcff\\nb.png: the file is empty (0 bytes)" in said


def test_labels_beyond_the_classes_are_no_labels():
    source = Numbered(9)
    source.classes = tuple("abcdefg")
    with loader.once(source, views.View((12, 18)), batch_size=9) as batches:
        np.testing.assert_array_equal(next(batches)["label"], np.arange(7))
        assert batches.broken == ("picture-7", "picture-8")


def test_sources_of_one_set_tell_each_image_once(capfd):
    first, second = Numbered(9, broken=(4,)), Numbered(9, broken=(4, 5))
    unreadable.share(first, second)
    for source in (first, second):
        list(loader.once(source, views.View((12, 18)), batch_size=9))
    said = capfd.readouterr().err
    assert said.count("picture-4: ") == said.count("picture-5: ") == 1
