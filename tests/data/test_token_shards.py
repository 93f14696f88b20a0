"""Token shards come back as they were written, or are refused; a killed writer goes on."""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from array_record.python import array_record_module

from tests import buckets
from tokgen import archives, interfaces, records, storage
from tokgen.data import token_header, token_shards, token_verdicts, token_writer
from tokgen.output import locks

COUNTS = {"train": 11, "held_out": 3}


def plan(**changes):
    return {
        "images": COUNTS,
        "layout": {"vocab": (300, 16), "grids": ((1, 1), (2, 2))},
        "tokenizer": {"path": "runs/tokenizer", "fingerprint": "abc", "precision": "float32"},
        "data": {"source": "folder flowers", "fingerprint": "def"},
        "views": ("center", "flip"),
        "classes": ("daisy", "rose"),
        "shard_images": 4,
        **changes,
    }


def content(split, start=0, stop=None):
    """tokens [images, views, L, G] and labels of a split: whatever, but always the same."""
    count = COUNTS[split]
    rng = np.random.default_rng(count)
    tokens_BXLG = rng.integers(0, (300, 16), (count, 2, 5, 2))
    return tokens_BXLG[start:stop], rng.integers(0, 2, count)[start:stop]


def fill(writer, shards):
    for shard in shards:
        writer.write(shard, *content(shard.split, shard.start, shard.stop))


def write(path, **changes):
    writer = token_writer.Writer(path, **plan(**changes))
    fill(writer, writer.remaining())
    writer.finish()
    return path


def contents(path):
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "tokens")


@pytest.mark.parametrize("verify", token_verdicts.MODES)
@pytest.mark.parametrize("split", token_header.SPLITS)
def test_tokens_come_back_as_they_were_written(folder, split, verify):
    source = token_shards.Source(folder, split=split, verify=verify)
    tokens_BXLG, label_B = content(split)
    assert len(source) == COUNTS[split] and source.classes == ("daisy", "rose")
    assert source.layout == {"vocab": [300, 16], "grids": [[1, 1], [2, 2]]}
    assert source.views == ("center", "flip") and source.header["dtype"] == "uint16"
    order = np.random.default_rng(0).permutation(len(source))
    for index, record in zip(order, source.__getitems__(order), strict=True):
        np.testing.assert_array_equal(record["tokens"], tokens_BXLG[index])
        assert record["tokens"].dtype == np.uint16 and record["label"] == label_B[index]
        np.testing.assert_array_equal(source[index]["tokens"], record["tokens"])
    np.testing.assert_array_equal(source[-1]["tokens"], tokens_BXLG[-1])
    view_B = np.arange(len(order)) // 2 % 2
    for index, view, record in zip(order, view_B, source.one_view(order, view_B), strict=True):
        np.testing.assert_array_equal(record["tokens"], tokens_BXLG[index, view])
        assert record["label"] == label_B[index]
    with pytest.raises(IndexError):
        source[len(source)]


def test_records_are_packed_as_documented(folder):
    """Read without tokgen: a little-endian uint32 label, then little-endian uint16 tokens."""
    reader = array_record_module.ArrayRecordReader(
        str(folder / "train-00001-of-00003.array_record")
    )
    records = reader.read_all()
    reader.close()
    tokens_BXLG, label_B = content("train")
    assert len(records) == 8  # image 5 is the second of its shard
    for view, record in enumerate(records[2:4]):
        assert int.from_bytes(record[:4], "little") == label_B[5]
        np.testing.assert_array_equal(
            np.frombuffer(record[4:], "<u2"), tokens_BXLG[5, view].ravel()
        )
    assert sorted(os.listdir(folder)) == [
        "held_out-00000-of-00001.array_record",
        "layout.json",
        *(f"train-0000{shard}-of-00003.array_record" for shard in range(3)),
    ]


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_the_smallest_integer_that_holds_the_alphabet(tmp_path, vocab, dtype):
    layout = {"vocab": [vocab], "grids": [[1, 2]]}
    writer = token_writer.Writer(
        tmp_path, **plan(layout=layout, images={"train": 2}, views=["center"])
    )
    (shard,) = writer.remaining()
    tokens_BXLG = np.array([0, vocab - 1, vocab - 1, 1]).reshape(2, 1, 2, 1)
    for wrong in (vocab, -1):
        with pytest.raises(ValueError, match="must lie in"):
            writer.write(shard, np.where(tokens_BXLG == 0, wrong, tokens_BXLG), [0, 1])
    with pytest.raises(ValueError, match="labels"):
        writer.write(shard, tokens_BXLG, [0, 2])
    with pytest.raises(ValueError, match="integers"):
        writer.write(shard, tokens_BXLG.astype(float), [0, 1])
    with pytest.raises(ValueError, match="takes 2 images"):
        writer.write(shard, tokens_BXLG[:1], [0])
    writer.write(shard, tokens_BXLG, [0, 1])
    writer.finish()
    source = token_shards.Source(tmp_path)
    assert source.header["dtype"] == dtype
    np.testing.assert_array_equal(
        [record["tokens"] for record in source.__getitems__([0, 1])], tokens_BXLG
    )


def test_fingerprints_follow_the_tokens_and_not_the_place(tmp_path):
    first = token_shards.Source(write(tmp_path / "a"))
    moved = plan()["tokenizer"] | {"path": "elsewhere"}
    assert (
        first.fingerprint == token_shards.Source(write(tmp_path / "b", tokenizer=moved)).fingerprint
    )
    other = plan()["tokenizer"] | {"fingerprint": "xyz"}
    assert (
        first.fingerprint != token_shards.Source(write(tmp_path / "c", tokenizer=other)).fingerprint
    )
    assert first.fingerprint != token_shards.Source(tmp_path / "a", split="held_out").fingerprint
    copy = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(copy[4]["tokens"], first[4]["tokens"])


def test_processes_share_the_shards(tmp_path, folder):
    path = tmp_path / "shared"
    writers = [token_writer.Writer(path, **plan()) for _ in range(2)]
    parts = [writer.remaining((part, 2)) for part, writer in enumerate(writers)]
    assert sorted(shard.file for part in parts for shard in part) == sorted(
        shard.file for shard in writers[0].shards()
    )
    fill(writers[1], parts[1])
    with pytest.raises(interfaces.UserError, match="shards of .* are missing"):
        writers[0].finish()
    fill(writers[0], parts[0])
    writers[0].finish()
    assert contents(path) == contents(folder)


def test_a_stopped_writer_writes_only_what_is_missing(tmp_path, folder):
    path = tmp_path / "stopped"
    writer = token_writer.Writer(path, **plan())
    fill(writer, writer.remaining()[:2])
    with pytest.raises(interfaces.UserError, match="not finished"):
        token_shards.Source(path)
    again = token_writer.Writer(path, **plan())
    assert [shard.file for shard in again.remaining()] == [s.file for s in again.shards()[2:]]
    # One that was damaged meanwhile, and one that lost its note, are written again.
    shards = again.shards()
    os.truncate(path / shards[0].file, 1000)
    os.remove(path / f".{shards[1].file}.note")
    assert again.remaining() == shards
    fill(again, again.remaining())
    again.finish()
    assert contents(path) == contents(folder)
    assert token_writer.Writer(path, **plan()).remaining() == []


def test_images_that_could_not_be_read_are_listed_and_have_no_tokens(tmp_path):
    path = tmp_path / "tokens"
    writer = token_writer.Writer(path, **plan())
    first, *others = writer.shards()
    missing = {1: ("daisy/1.png", "cut off"), 3: ("rose/3.png", "empty")}
    writer.write(first, *content(first.split, first.start, first.stop), missing)
    assert writer.written("train") == [(first, missing)]
    writer = token_writer.Writer(path, **plan())  # stopped, and begun again
    assert writer.written("train") == [(first, missing)]
    fill(writer, writer.remaining())
    writer.finish()
    source = token_shards.Source(path)
    assert source.missing == missing and source.name(3) == "rose/3.png"
    assert source.header["splits"]["train"]["unreadable"] == 2
    assert token_shards.Source(path, split="held_out").missing == {}
    assert token_shards.Source(write(tmp_path / "whole")).missing == {}
    for wrong in ([[99, "a", "b"]], [[1, "a"]], [["1", "a", "b"]], 5, [[1, None, "b"]]):
        edit(path, lambda h, w=wrong: h["splits"]["train"]["shards"][0].update(unreadable=w))
        with pytest.raises(interfaces.UserError, match="cannot be used"):
            token_shards.Source(path)


def test_a_split_without_a_readable_image_is_refused(tmp_path):
    writer = token_writer.Writer(tmp_path, **plan())
    for shard in writer.shards():
        numbers = range(shard.start, shard.stop) if shard.split == "held_out" else ()
        missing = dict.fromkeys(numbers, ("a", "b"))
        writer.write(shard, *content(shard.split, shard.start, shard.stop), missing)
    with pytest.raises(interfaces.UserError, match="none of the .* images of held_out"):
        writer.finish()


def test_a_fingerprint_of_before_is_known(tmp_path):
    new = {"source": "folder", "fingerprint": {"train": "n", "held_out": "m"}}
    old = {**new, "fingerprint": {"train": "o", "held_out": "p"}}
    write(tmp_path / "old", data=old)
    earlier = {"train": ("o",), "held_out": ("p",)}
    assert (
        token_writer.Writer(tmp_path / "old", **plan(data=new), earlier=earlier).remaining() == []
    )
    for changed in ({"earlier": {}}, {"earlier": {"train": ("o",)}}):
        with pytest.raises(interfaces.UserError, match="something else"):
            token_writer.Writer(tmp_path / "old", **plan(data=new), **changed)
    with pytest.raises(interfaces.UserError, match="something else"):
        token_writer.Writer(tmp_path / "old", **plan(data={**new, "source": "x"}), earlier=earlier)


class Killed(BaseException):
    """Not an Exception: nothing may catch it to tidy up, as nothing can after a kill."""


def kill_at_rename(monkeypatch, stop, kill):
    """Call `kill` at the stop-th of the places before and after each rename."""
    replace, places = os.replace, iter(range(1000))

    def counted(*names):
        if next(places) == stop:
            kill()
        replace(*names)
        if next(places) == stop:
            kill()

    monkeypatch.setattr(os, "replace", counted)


def killed():
    raise Killed


def test_a_writer_that_stops_at_any_rename_resumes(tmp_path, folder, monkeypatch):
    # Plan, four shards with their notes, header: ten renames, two places each.
    for stop in range(20):
        path = tmp_path / f"killed{stop}"
        with monkeypatch.context() as patch:
            kill_at_rename(patch, stop, killed)
            with pytest.raises(Killed):
                write(path)
        if not (path / token_header.HEADER).exists():
            with pytest.raises(interfaces.UserError):
                token_shards.Source(path)
        write(path)
        assert contents(path) == contents(folder)


KILLED = """
import os, pathlib, signal, sys
import pytest
from tests.data import test_token_shards
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
test_token_shards.kill_at_rename(pytest.MonkeyPatch(), 6, kill)
test_token_shards.write(pathlib.Path(sys.argv[1]))
"""


def test_a_killed_process_resumes(tmp_path, folder):
    root = pathlib.Path(__file__).parents[2]
    path = tmp_path / "killed"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=root, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert len(token_writer.Writer(path, **plan()).remaining()) == 3
    write(path)
    assert contents(path) == contents(folder)


def test_another_plan_is_refused_and_overwrites_nothing(folder):
    before = contents(folder)
    for changes in (
        {"tokenizer": plan()["tokenizer"] | {"fingerprint": "other"}},
        {"layout": {"vocab": (300, 8), "grids": ((1, 1), (2, 2))}},
        {"views": ("center",)},
        {"data": {"source": "folder trees", "fingerprint": "def"}},
        {"classes": ("rose", "daisy")},
        {"images": {"train": 12, "held_out": 3}},
    ):
        with pytest.raises(interfaces.UserError, match=next(iter(changes))):
            token_writer.Writer(folder, **plan(**changes))
    assert contents(folder) == before
    assert token_writer.Writer(folder, **plan(tokenizer=plan()["tokenizer"] | {"path": "moved"}))


def test_other_folders_are_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(interfaces.UserError, match="thesis.tex"):
        token_writer.Writer(tmp_path, **plan())
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(interfaces.UserError, match="is a file"):
        token_writer.Writer(tmp_path / "thesis.tex", **plan())


SHARD = "train-00001-of-00003.array_record"


def truncate(path):
    os.truncate(path / SHARD, os.path.getsize(path / SHARD) // 2)


def empty(path):
    os.truncate(path / SHARD, 0)


def flip(path):
    data = bytearray((path / SHARD).read_bytes())
    data[len(data) // 3] ^= 1
    (path / SHARD).write_bytes(data)


def remove(path):
    os.remove(path / SHARD)


def duplicate(path):
    shutil.copy(path / "train-00000-of-00003.array_record", path / SHARD)


def replaced(path, record, count):
    """A shard of other records, with a header that vouches for it."""
    writer = array_record_module.ArrayRecordWriter(str(path / SHARD), "group_size:1")
    for _ in range(count):
        writer.write(record)
    writer.close()
    edit(path, lambda h: h["splits"]["train"]["shards"][1].update(sha256=digest(path / SHARD)))


def digest(file):
    return archives.sha256(file)


def fewer_records(path):
    replaced(path, bytes(24), 7)


def narrow_records(path):
    replaced(path, bytes(22), 8)


def token_beyond_its_alphabet(path):
    replaced(path, bytes(4) + np.full(10, 16, "<u2").tobytes(), 8)


def label_beyond_the_classes(path):
    replaced(path, b"\2\0\0\0" + bytes(20), 8)


def edit(path, change):
    """Change a header and its digest with it: what else is wrong is told."""
    header = json.loads((path / token_header.HEADER).read_text())
    change(header)
    with contextlib.suppress(KeyError):  # of what is missing, a digest says nothing
        header["digest"] = token_header.digest(header)
    (path / token_header.HEADER).write_text(json.dumps(header))


def before_digests(path):
    header = json.loads((path / token_header.HEADER).read_text())
    header.pop("digest", None)
    (path / token_header.HEADER).write_text(json.dumps({**header, "format": 1}))


def edited(change):
    def damage(path):
        edit(path, change)

    return damage


def no_json(path):
    (path / token_header.HEADER).write_text('{"format": 1,')


BODIES = (
    truncate,
    empty,
    flip,
    remove,
    duplicate,
    fewer_records,
    narrow_records,
    token_beyond_its_alphabet,
    label_beyond_the_classes,
)
HEADERS = {
    "no json": no_json,
    "a list": lambda path: (path / token_header.HEADER).write_text("[]"),
    "other version": edited(lambda h: h.update(format=4)),
    "smaller alphabet": edited(lambda h: h["layout"].update(vocab=[200, 16])),
    "alphabet beyond the integer": edited(lambda h: h["layout"].update(vocab=[70_000, 16])),
    "other grids": edited(lambda h: h["layout"].update(grids=[[2, 2]])),
    "another symbol": edited(lambda h: h["layout"].update(vocab=[300, 16, 16])),
    "narrower integer": edited(lambda h: h.update(dtype="uint8")),
    "fewer views": edited(lambda h: h.update(views=["center"])),
    "fewer classes": edited(lambda h: h.update(classes=["daisy"])),
    "count": edited(lambda h: h["splits"]["train"].update(images=12)),
    "a shard less": edited(lambda h: h["splits"]["train"]["shards"].pop()),
    "a shard twice": edited(
        lambda h: h["splits"]["train"]["shards"].__setitem__(1, h["splits"]["train"]["shards"][0])
    ),
    "a path outside": edited(
        lambda h: h["splits"]["train"]["shards"][0].update(file="../x.array_record")
    ),
    "no layout": edited(lambda h: h.pop("layout")),
    "no tokenizer": edited(lambda h: h.pop("tokenizer")),
    "no data": edited(lambda h: h.update(data=None)),
    "classes are numbers": edited(lambda h: h.update(classes=[1, 2])),
    "no classes": edited(lambda h: h.pop("classes")),
    "splits are a list": edited(lambda h: h.update(splits=[])),
}


@pytest.mark.parametrize("damage", BODIES)
def test_damaged_shards_are_refused_by_name(folder, damage):
    damage(folder)
    with pytest.raises(interfaces.UserError, match="tokgen pretokenize") as error:
        token_shards.Source(folder)
    assert SHARD in str(error.value)
    assert len(token_shards.Source(folder, split="held_out")) == 3  # which is whole


@pytest.mark.parametrize("damage", HEADERS)
def test_damaged_headers_are_refused_by_name(folder, damage):
    HEADERS[damage](folder)
    with pytest.raises(interfaces.UserError, match="tokgen pretokenize") as error:
        token_shards.Source(folder)
    assert str(folder) in str(error.value)


def shards_of(header, split="train"):
    return header["splits"][split]["shards"]


def swap(items, first=0, second=1):
    items[first], items[second] = items[second], items[first]


def swap_shards(header):
    """The files of two shards of one length, each under the other's name."""
    first, second = shards_of(header)[:2]
    first["sha256"], second["sha256"] = second["sha256"], first["sha256"]


# Whatever a header says: none of it can be changed, well-formed or not.
TAMPERED = {
    "a larger alphabet": lambda h: h["layout"].update(vocab=[310, 16]),
    "a smaller alphabet that holds them": lambda h: h["layout"].update(vocab=[300, 17]),
    "alphabets swapped": lambda h: swap(h["layout"]["vocab"]),
    "a grid turned": lambda h: h["layout"].update(grids=[[1, 1], [1, 4]]),
    "one grid of two": lambda h: h["layout"].update(grids=[[1, 5]]),
    "grids swapped": lambda h: swap(h["layout"]["grids"]),
    "views swapped": lambda h: swap(h["views"]),
    "a view renamed": lambda h: h["views"].__setitem__(1, "top_left"),
    "a view and its tokens made classes": lambda h: h.update(views=["center"]),
    "classes swapped": lambda h: swap(h["classes"]),
    "a class renamed": lambda h: h["classes"].__setitem__(0, "tulip"),
    "a class more": lambda h: h["classes"].append("tulip"),
    "no classes": lambda h: h.update(classes=[]),
    "another tokenizer": lambda h: h["tokenizer"].update(fingerprint="abd"),
    "another precision": lambda h: h["tokenizer"].update(precision="bfloat16"),
    "other images": lambda h: h["data"].update(fingerprint="dee"),
    "a field of the data more": lambda h: h["data"].update(path="elsewhere"),
    "a wider integer": lambda h: h.update(dtype="uint32"),
    "larger shards": lambda h: h.update(shard_images=11),
    "a split less": lambda h: h["splits"].pop("held_out"),
    "a split as another": lambda h: h["splits"].update(held_out=h["splits"]["train"]),
    "shards swapped": lambda h: swap(shards_of(h)),
    "shards under each other's names": swap_shards,
    "a checksum": lambda h: shards_of(h)[0].update(sha256=64 * "0"),
    "an image called unreadable": lambda h: shards_of(h)[0].update(unreadable=[[1, "a", "b"]]),
    "an older format": lambda h: h.update(format=1),
    "no digest": lambda h: h.pop("digest"),
    "another digest": lambda h: h.update(digest=64 * "0"),
    "a field more": lambda h: h.update(note="mine"),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_header_that_was_changed_is_refused(folder, kind):
    header = json.loads((folder / token_header.HEADER).read_text())
    TAMPERED[kind](header)
    (folder / token_header.HEADER).write_text(json.dumps(header))
    for split in token_header.SPLITS:
        with pytest.raises(interfaces.UserError, match="tokgen pretokenize") as error:
            token_shards.Source(folder, split=split, verify="never")
        assert str(folder) in str(error.value)


def test_where_the_tokenizer_lies_may_change(folder):
    before = token_shards.Source(folder).fingerprint
    header = json.loads((folder / token_header.HEADER).read_text())
    header["tokenizer"]["path"] = "moved"
    (folder / token_header.HEADER).write_text(json.dumps(header, indent=3))
    assert token_shards.Source(folder).fingerprint == before


@pytest.fixture
def all_views(tmp_path, monkeypatch):
    """A folder as it was written before views had records of their own."""
    with monkeypatch.context() as patch:
        patch.setattr(token_header, "FORMAT", 2)
        return write(tmp_path / "all_views")


def test_records_of_all_views_are_read_and_gone_on_with(all_views):
    reader = array_record_module.ArrayRecordReader(str(all_views / SHARD))
    record = reader.read_all()[1]
    reader.close()
    tokens_BXLG, label_B = content("train")
    np.testing.assert_array_equal(np.frombuffer(record[4:], "<u2"), tokens_BXLG[5].ravel())
    source, every, view_B = token_shards.Source(all_views), range(11), np.arange(11) % 2
    for index, (whole, one) in enumerate(
        zip(source.__getitems__(every), source.one_view(every, view_B), strict=True)
    ):
        np.testing.assert_array_equal(whole["tokens"], tokens_BXLG[index])
        np.testing.assert_array_equal(one["tokens"], tokens_BXLG[index, view_B[index]])
        assert whole["label"] == one["label"] == label_B[index]
    kept = contents(all_views)
    for name in (SHARD, token_header.HEADER):  # as when it was stopped
        (all_views / name).unlink()
    token_header.save(str(all_views), token_header.PLAN, token_header.plan_of(source.header))
    again = token_writer.Writer(all_views, **plan())
    fill(again, again.remaining())
    again.finish()
    assert contents(all_views) == kept


def test_a_plan_of_a_later_version_is_not_gone_on_with(tmp_path):
    token_writer.Writer(tmp_path, **plan())
    begun = json.loads((tmp_path / token_header.PLAN).read_text())
    (tmp_path / token_header.PLAN).write_text(json.dumps({**begun, "format": 4}))
    with pytest.raises(interfaces.UserError, match="plan.json cannot be used: format 3 is needed"):
        token_writer.Writer(tmp_path, **plan())


def test_token_sets_without_a_digest_are_the_same_token_sets(all_views):
    """As they were written before: read, with the fingerprint that runs know; and finished anew."""
    folder = all_views
    before, kept = token_shards.Source(folder), contents(folder)
    before_digests(folder)
    header = json.loads((folder / token_header.HEADER).read_text())
    assert header["format"] == 1 and "digest" not in header
    header["tokenizer"]["path"] = ""
    written = hashlib.sha256(json.dumps(["train", header], sort_keys=True).encode()).hexdigest()
    assert token_shards.Source(folder).fingerprint == written == before.fingerprint
    again = token_writer.Writer(folder, **plan())
    assert not again.remaining()
    again.finish()
    assert contents(folder) == kept


def test_shards_of_which_the_header_knows_nothing_are_named(folder, tmp_path):
    other = write(tmp_path / "other", shard_images=2)
    for name in ("train-00005-of-00006.array_record", "held_out-00001-of-00002.array_record"):
        shutil.copy(other / name, folder / name)
    for split in token_header.SPLITS:
        with pytest.raises(interfaces.UserError, match="does not name: held_out-00001.*, train-00"):
            token_shards.Source(folder, split=split)


def test_a_shard_of_another_set_is_refused(folder, tmp_path):
    """Of as many images, as wide, within the alphabet."""
    other = write(tmp_path / "other", classes=("rose", "daisy"))
    rng = np.random.default_rng(1)
    writer = token_writer.Writer(tmp_path / "third", **plan())
    for shard in writer.shards():
        count = shard.stop - shard.start
        writer.write(shard, rng.integers(0, 16, (count, 2, 5, 2)), np.zeros(count, int))
    writer.finish()
    assert (other / SHARD).read_bytes() == (folder / SHARD).read_bytes()  # records alone
    shutil.copy(tmp_path / "third" / SHARD, folder / SHARD)
    with pytest.raises(interfaces.UserError, match=f"{SHARD}.*checksum"):
        token_shards.Source(folder)


@pytest.mark.parametrize("damage", [truncate, empty, remove, fewer_records])
def test_what_costs_nothing_is_checked_even_without_verification(folder, damage):
    damage(folder)
    with pytest.raises(interfaces.UserError, match=SHARD):
        token_shards.Source(folder, verify="never")


@pytest.fixture
def settled(folder, tmp_path, monkeypatch):
    """A folder that was written long enough ago, and a host without verdicts."""
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_verdicts, "_SETTLED", 0.0)
    return folder


def hashed(monkeypatch):
    """The shards of which the checksum is taken from now on."""
    seen, sha256 = [], archives.sha256

    def noted(path):
        seen.append(os.path.basename(path))
        return sha256(path)

    monkeypatch.setattr(archives, "sha256", noted)
    return seen


def test_an_untouched_set_is_read_whole_once_and_that_is_said(settled, monkeypatch, capfd):
    seen = hashed(monkeypatch)
    first = token_shards.Source(settled)
    assert len(seen) == 3 and "verified again" not in capfd.readouterr().err
    second = token_shards.Source(settled)
    assert len(seen) == 3 and second.counts.tolist() == first.counts.tolist()
    said = capfd.readouterr().err
    assert "train, is unchanged since it was read whole on" in said and "--scan full" in said
    token_shards.Source(settled, split="held_out")  # of which nothing was known
    assert len(seen) == 4
    token_shards.Source(settled, verify="always")
    assert len(seen) == 7


def test_damage_after_a_verdict_is_found(settled):
    token_shards.Source(settled)
    kept = os.stat(settled / SHARD)
    content = bytearray((settled / SHARD).read_bytes())
    content[len(content) // 2] ^= 1
    (settled / SHARD).write_bytes(content)
    os.utime(settled / SHARD, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as a tool that keeps times
    for _ in range(2):  # and of it no verdict is kept
        with pytest.raises(interfaces.UserError, match=f"{SHARD}.*checksum"):
            token_shards.Source(settled)


def test_damage_that_leaves_no_trace_is_found_by_a_full_scan(settled, monkeypatch):
    monkeypatch.setattr(token_verdicts, "_states", lambda files: [(0, 0, 0, 0)] * len(files))
    token_shards.Source(settled)
    shutil.copy(settled / "train-00000-of-00003.array_record", settled / SHARD)
    assert len(token_shards.Source(settled)) == 11
    with pytest.raises(interfaces.UserError, match=f"{SHARD}.*checksum"):
        token_shards.Source(settled, verify="always")


def verdicts(tmp_path):
    return sorted((tmp_path / "cache" / "verdicts").glob("*"))


def test_a_set_that_was_written_a_moment_ago_has_no_verdict_yet(settled, monkeypatch, capfd):
    monkeypatch.setattr(token_verdicts, "_SETTLED", 1000.0)
    seen = hashed(monkeypatch)
    for count in (3, 6):
        token_shards.Source(settled)
        assert len(seen) == count
        assert "reads it again: train-00000-of-00003.array_record was" in capfd.readouterr().err


def test_a_set_that_is_changed_while_it_is_read_has_no_verdict(
    settled, monkeypatch, capfd, tmp_path
):
    sha256 = archives.sha256

    def touched(path):
        os.utime(path, ns=(0, 0))
        return sha256(path)

    monkeypatch.setattr(archives, "sha256", touched)
    token_shards.Source(settled)
    assert "changed while it was read" in capfd.readouterr().err and not verdicts(tmp_path)


def test_files_from_the_future_are_read_once_too(settled, monkeypatch):
    os.utime(settled / SHARD, (2**32, 2**32))  # as unpacked from another host's archive
    seen = hashed(monkeypatch)
    for _ in range(2):
        token_shards.Source(settled)
        assert len(seen) == 3


@pytest.mark.parametrize(
    "text", ["", "{}", "null", "7", "[11]", "[5, 6, 0]", '["5", "6"]', "[5, null]", "[5, [6]]"]
)
def test_a_damaged_verdict_is_none(settled, monkeypatch, tmp_path, text):
    counts = token_shards.Source(settled).counts.tolist()
    (kept,) = verdicts(tmp_path)
    kept.write_text(text)
    seen = hashed(monkeypatch)
    for _ in range(2):  # the second finds a new verdict
        assert token_shards.Source(settled).counts.tolist() == counts
        assert len(seen) == 3


def test_a_verdict_that_cannot_be_kept_ends_no_run(settled, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records, "save", full)
    assert token_shards.Source(settled).counts.sum() == 11
    assert capfd.readouterr().err.count("No space left on device") == 1


def test_without_a_lock_a_set_is_read_all_the_same(settled, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(locks, "waiting", full)
    assert token_shards.Source(settled).counts.sum() == 11
    assert capfd.readouterr().err.count("Disk quota exceeded") == 1


def test_a_split_without_files_has_no_verdict(settled, tmp_path, capfd):
    edit(settled, lambda h: h["splits"].pop("held_out"))
    (settled / "held_out-00000-of-00001.array_record").unlink()
    for _ in range(2):
        assert len(token_shards.Source(settled, split="held_out")) == 0
    assert not verdicts(tmp_path) and "read whole" not in capfd.readouterr().err


def test_processes_of_a_host_wait_for_one_verdict(settled, monkeypatch):
    seen = hashed(monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: token_shards.Source(settled).counts.tolist(), range(4)))
    assert len(seen) == 3 and found == [found[0]] * 4


def test_a_host_that_keeps_nothing_reads_every_time(settled, monkeypatch, capfd):
    (settled / "no_folder").touch()
    monkeypatch.setenv("TOKGEN_CACHE", str(settled / "no_folder"))
    seen = hashed(monkeypatch)
    for count in (3, 6):
        token_shards.Source(settled)
        assert len(seen) == count
    assert "cannot be written, so each start reads" in capfd.readouterr().err


def test_what_is_no_folder_of_tokens_is_refused(tmp_path, folder):
    for path, named in (
        (tmp_path / "gone", "nothing"),
        (tmp_path, "layout.json"),
        (folder / SHARD, "a file"),
    ):
        with pytest.raises(interfaces.UserError, match=named):
            token_shards.Source(path)
    with pytest.raises(interfaces.UserError, match="'test'"):
        token_shards.Source(folder, split="test")
    edit(folder, lambda h: h["splits"].pop("held_out"))
    (folder / "held_out-00000-of-00001.array_record").unlink()
    assert len(token_shards.Source(folder, split="held_out")) == 0  # nothing was held out


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": {}},
        {"images": {"train": 0}},
        {"images": {"test": 4}},
        {"views": ()},
        {"views": ("center", "center")},
        {"shard_images": 0},
        {"layout": {"vocab": [0], "grids": [[1, 1]]}},
        {"layout": {"vocab": [2**31 + 1], "grids": [[1, 1]]}},
    ],
)
def test_impossible_plans_are_refused(tmp_path, wrong):
    with pytest.raises(interfaces.UserError):
        token_writer.Writer(tmp_path / "new", **plan(**wrong))
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- in a bucket


@pytest.fixture
def remote(bucket, tmp_path, monkeypatch):
    """A token set in a bucket, read by a host with a cache of its own."""
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path / "cache"))
    return write(f"{bucket}/tokens")


def cached(tmp_path):
    return sorted((tmp_path / "cache" / "tokens").glob("*.array_record"))


def test_shards_of_a_bucket_are_those_of_a_folder(remote, folder, tmp_path):
    there = storage.path(remote)
    assert storage.names(there) == sorted(contents(folder))
    assert {name: (there / name).read_bytes() for name in contents(folder)} == contents(folder)
    ours, theirs = (token_shards.Source(path) for path in (remote, folder))
    assert ours.fingerprint == theirs.fingerprint and ours.counts.tolist() == theirs.counts.tolist()
    for a, b in zip(ours.__getitems__(range(11)), theirs.__getitems__(range(11)), strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    assert ours.name(3) == f"{remote}/train/3" and len(cached(tmp_path)) == 3
    assert token_header.recorded_classes(remote) == ("daisy", "rose")


def test_shards_are_fetched_once_and_again_where_the_copy_is_damaged(remote, tmp_path, monkeypatch):
    fetched, download = [], storage.download
    monkeypatch.setattr(storage, "download", lambda a, b: (fetched.append(a.name), download(a, b)))
    for verify in ("once", "never", "always"):
        token_shards.Source(remote, verify=verify)
    assert len(fetched) == 3
    cached(tmp_path)[0].write_bytes(b"damaged")
    token_shards.Source(remote)
    assert len(fetched) == 4
    cached(tmp_path)[0].write_bytes(
        cached(tmp_path)[0].read_bytes()[:-9]
    )  # as a disk that was full
    token_shards.Source(remote, verify="never")
    assert len(fetched) == 5
    assert not list((tmp_path / "cache" / "tokens").glob("*.part"))


def test_processes_of_a_host_read_a_bucket_once(remote, tmp_path, monkeypatch):
    seen = hashed(monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: token_shards.Source(remote).counts.tolist(), range(4)))
    assert len(seen) == 3 and found == [found[0]] * 4  # each as it came
    token_shards.Source(remote)  # a later start
    assert len(seen) == 3 and len(verdicts(tmp_path)) == 1


def test_a_writer_of_a_bucket_goes_on_where_it_was_stopped(bucket, folder):
    path = f"{bucket}/tokens"
    first = token_writer.Writer(path, **plan())
    fill(first, first.remaining((0, 2)))
    shard = first.remaining((1, 2))[0]
    storage.save(storage.path(path) / shard.file, b"half")  # its note was never written
    with pytest.raises(interfaces.UserError, match="were not finished: run the same"):
        token_shards.Source(path)
    again = token_writer.Writer(path, **plan())
    assert again.remaining((0, 2)) == [] and shard in again.remaining()
    fill(again, again.remaining())
    again.finish()
    there = storage.path(path)
    assert {name: (there / name).read_bytes() for name in storage.names(there)} == contents(folder)
    with pytest.raises(interfaces.UserError, match="holds token shards of something else"):
        token_writer.Writer(path, **plan(views=("center",)))


def test_damaged_sets_of_a_bucket_are_refused(remote, tmp_path, monkeypatch):
    there = storage.path(remote)
    content = (there / SHARD).read_bytes()
    storage.save(there / SHARD, content[:-1] + b"x")
    with pytest.raises(interfaces.UserError, match=f"{SHARD} cannot be used: .* checksum"):
        token_shards.Source(remote)
    (there / SHARD).unlink()
    with pytest.raises(interfaces.UserError, match=f"{SHARD} cannot be used: the file is missing"):
        token_shards.Source(remote)
    storage.save(there / SHARD, content)
    storage.save(there / "train-00005-of-00006.array_record", b"")
    with pytest.raises(interfaces.UserError, match="holds shards that its layout.json does not"):
        token_shards.Source(remote)
    (there / "train-00005-of-00006.array_record").unlink()
    shutil.rmtree(tmp_path / "cache")
    room = type("Usage", (), {"free": 3})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(interfaces.UserError, match="found 3 bytes free: make room, or say by TOK"):
        token_shards.Source(remote)


def test_a_fetch_that_was_cut_off_is_repeated_once(remote, monkeypatch):
    fetched, download = [], storage.download

    def cut(source, target):
        download(source, target)
        fetched.append(source.name)
        if len(fetched) == 1:
            target.write_bytes(target.read_bytes()[:-9])

    monkeypatch.setattr(storage, "download", cut)
    assert len(token_shards.Source(remote)) == 11 and len(fetched) == 4


def test_a_bucket_that_is_not_reached_damages_no_tokens(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKGEN_CACHE", str(tmp_path / "cache"))
    path = f"{bucket}/tokens"
    writer = token_writer.Writer(path, **plan())
    fill(writer, writer.remaining((0, 2)))
    shard = writer.shards()[0]
    there = storage.sizes(storage.path(path))

    with buckets.down():
        for act in (
            lambda: token_header.read(path),
            lambda: token_header.recorded_classes(path),
            lambda: token_writer.Writer(path, **plan()),
            lambda: writer.remaining(),  # none is taken for one that is to be made again
            lambda: writer.written(shard.split),
            writer.finish,
            lambda: token_shards.Source(path),
        ):
            with pytest.raises(storage.NotReached, match="cannot be used: no route; see to the"):
                act()
    assert storage.sizes(storage.path(path)) == there
    assert shard not in writer.remaining()


def test_a_checksum_leads_to_no_other_file(remote, tmp_path):
    header = json.loads((storage.path(remote) / token_header.HEADER).read_text())
    header["splits"]["train"]["shards"][0]["sha256"] = "../" * 9 + "etc"
    header["digest"] = token_header.digest(header)
    token_header.save(remote, token_header.HEADER, header)
    with pytest.raises(interfaces.UserError, match="cannot be used: its checksum is none"):
        token_shards.Source(remote)
