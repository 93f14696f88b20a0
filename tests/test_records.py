"""Records on disk: bounded before they are read; what is none is one message."""

import math
import os
import pathlib

import pytest

from tokgen import metrics_log, records
from tokgen.interfaces import TokenLayout, UserError
from tokgen.training import safeguards

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", ["", "{", "[1, ", '{"a": nope}', DEEP, "1" * 5000, b"\xff\xfe"])
def test_what_is_no_json_is_one_reason(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        records.load(file)
    assert len(str(caught.value)) < 500
    with pytest.raises(UserError, match=f"{file} cannot be read as a list: .*; write it anew"):
        records.read(file, "a list", "write it anew")


def test_depth_and_size_are_bounded_before_work(tmp_path, monkeypatch):
    assert records.parsed("[" * records.DEPTH + "]" * records.DEPTH)
    with pytest.raises(ValueError, match="deep"):
        records.parsed("[" * (records.DEPTH + 1) + "]" * (records.DEPTH + 1))
    with pytest.raises(ValueError, match="deep"):
        records.parsed('{"a":' * (records.DEPTH + 1) + "1" + "}" * (records.DEPTH + 1))
    file = tmp_path / "x.json"
    with open(file, "wb") as stream:
        os.truncate(stream.fileno(), 10**10)  # a hole: it takes no room
    for read in (records.load, lambda file: records.lines(file, "a log", "mend it", say=print)):
        with pytest.raises(ValueError, match="10,000,000,000 bytes"):
            read(file)
    file.write_text("[1, 2, 3]")
    with pytest.raises(ValueError, match="at most 8"):
        records.load(file, limit=8)
    monkeypatch.setattr(records, "BYTES", 10)
    file.write_text('{"a": 1}\n{"a": "' + "b" * 20 + '"}\n')
    with pytest.raises(UserError, match="line 2: it has more than 10 bytes"):
        records.lines(file, "a log", "mend it", say=print)


@pytest.mark.parametrize(
    "record", [None, [], 3, {}, {"n": None}, {"n": "3"}, {"n": True}, {"n": [1] * 10**5}]
)
def test_fields_have_types(record):
    with pytest.raises(ValueError) as caught:
        records.checked(record, n=int)
    assert len(str(caught.value)) < 300
    assert records.checked({"n": 3, "m": None}, n=int, m=(str, type(None)))["n"] == 3


def test_a_last_line_that_was_cut_off_is_left_out_and_said(tmp_path):
    file, said = tmp_path / "x.jsonl", []

    def read():
        return records.lines(file, "a log", "mend it", say=said.append, n=int)

    file.write_text('{"n": 1}\n\n{"n": 2}\n')
    assert read() == [{"n": 1}, {"n": 2}] and not said
    file.write_text('{"n": 1}\n{"n": ')
    assert read() == [{"n": 1}] and "cut off" in said.pop()
    for text in ('{"n": \n{"n": 2}\n', '{"n": 1}\n{"n": null}\n', "[]\n"):
        file.write_text(text)
        with pytest.raises(UserError, match=f"{file} cannot be read as a log: line .*; mend it"):
            read()
    assert not said


def test_what_is_written_is_json_for_every_reader(tmp_path):
    value = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": {"d": (1, None, "x")}}
    assert records.save(tmp_path / "x.json", records.text(value)) == tmp_path / "x.json"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert records.load(tmp_path / "x.json") == {
        "a": None,
        "b": [None, None, 1.5],
        "c": {"d": [1, None, "x"]},
    }


def test_a_text_is_written_whole_in_one_encoding_and_by_many(tmp_path, monkeypatch):
    file, parts = tmp_path / "page.html", []
    real = pathlib.Path.replace

    def seen(part, target):
        parts.append(part)
        return real(part, target)

    monkeypatch.setattr(pathlib.Path, "replace", seen)
    for process in (1, 2):
        monkeypatch.setattr(records.os, "getpid", lambda process=process: process)
        records.save(file, f"±{process}")
    assert file.read_bytes() == "±2".encode() and len(set(parts)) == 2
    with pytest.raises(UnicodeEncodeError):
        records.save(file, "half \ud800")
    assert file.read_text(encoding="utf-8") == "±2" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "record",
    [
        *(None, [], {}, {"vocab": 3, "grids": 4}, {"vocab": [8], "grids": [[1]]}),
        *({"vocab": [8.5], "grids": [[2, 2]]}, {"vocab": ["8"], "grids": [[2, 2]]}),
        *({"vocab": [10**9], "grids": [[2, 2]]}, {"vocab": [8], "grids": [[10**9, 10**9]]}),
        *({"vocab": [8] * 5000, "grids": [[1, 1]]}, {"vocab": [8], "grids": [[2, 2]] * 5000}),
        *({"vocab": [True], "grids": [[2, 2]]}, {"vocab": [8], "grids": None}),
    ],
)
def test_a_layout_is_believed_within_bounds(record):
    with pytest.raises(UserError):
        TokenLayout.from_json(record)


@pytest.mark.parametrize("text", ["", "{", "null", '{"returns": null, "settled": true}', DEEP])
def test_a_cut_record_of_a_run_is_one_message(tmp_path, text):
    (tmp_path / safeguards.RETURNS).write_text(text)
    for read in (safeguards.returned, safeguards.unsettled):
        with pytest.raises(UserError, match=r"returns.json cannot be read.*remove it"):
            read(tmp_path)
    (tmp_path / metrics_log.LOG).write_text(
        f"{text or 'null'}\n" + '{"step": 1, "split": "train"}\n'
    )
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read as the log of a run: line"):
        metrics_log.read(tmp_path)
