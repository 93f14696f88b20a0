"""Packed token shards: what pretokenizing writes and a generator is trained on.

    tokens/
      layout.json                          the header: what was tokenized, by what, into what
      train-00000-of-00003.array_record    one record per image, all of the same width
      held_out-00000-of-00001.array_record

A record is the label as a little-endian uint32, then views x L x G tokens in the smallest unsigned
integer that holds the alphabet, little-endian. The header is written last: a folder without it was
not finished, and `Writer` goes on where it was stopped. It holds the checksum of every shard and a
digest of itself, so that what it says of the tokens cannot be changed without being noticed.

An image that could not be read has a record all the same, of zeros, so that record i belongs to
image i; the header lists these (`unreadable` of a shard, if it has any), and no reader sees them.
"""

import bisect
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import types
from collections.abc import Mapping, Sequence

import numpy as np
from array_record.python import array_record_module

from tokgen import archives, interfaces, records as records_
from tokgen.data import sources

FORMAT = 2  # the version of all of the above
FORMATS = (1, FORMAT)  # that are read; 1 knew no digest of the header
HEADER = "layout.json"
PLAN = "plan.json"  # the header before there are shards; what a resumed writer compares
RECORDS = {HEADER: ("format", "layout"), PLAN: ("format", "layout")}
SHARD = 8192  # images of a shard
SPLITS = ("train", "held_out")

_LABEL_BYTES = 4
_DTYPES = ("uint8", "uint16", "uint32")
_REMEDY = "run `tokgen pretokenize` again, into an empty folder"
# One record per group: a read decodes what it asked for and nothing else.
_WRITER_OPTIONS = "group_size:1"
# Reading ahead is waste where every read goes somewhere else.
_READER_OPTIONS = "readahead_buffer_size:0"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Images `start` to `stop` of a split, and the file they go into."""

    split: str
    file: str
    start: int
    stop: int


class Writer:
    """Writes shards into a folder, each whole or not at all, and skips those already there.

        writer = tokens.Writer(out, images={"train": 50_000}, layout=..., ...)
        for shard in writer.remaining(process=(0, 1)):
            writer.write(shard, tokens_BXLG, label_B)       # X: the views
        writer.finish()                                     # one process, after all have written

    Args:
      images: split to number of images.
      layout: {"vocab": [...], "grids": [[rows, columns], ...]}.
      tokenizer: {"path", "fingerprint", "precision"}; a moved tokenizer is still the same one.
      data: JSON that describes the source, with its "fingerprint".
      views: their names, in the order in which they are written.
      classes: the names of the labels; empty if there are none.
      earlier: fingerprints that earlier versions gave the same source, by split.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        images: Mapping[str, int],
        layout: Mapping,
        tokenizer: Mapping,
        data: Mapping,
        views: Sequence[str] = ("center",),
        classes: Sequence[str] = (),
        shard_images: int = SHARD,
        earlier: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
    ):
        self.path = os.fspath(path)
        plan = {
            "format": FORMAT,
            "layout": _plain_layout(layout),
            "tokenizer": dict(tokenizer),
            "data": dict(data),
            "views": list(views),
            "dtype": _dtype(layout["vocab"]),
            "classes": list(classes),
            "shard_images": int(shard_images),
            "images": {split: int(count) for split, count in images.items()},
        }
        _check_plan(plan)
        self._plan = json.loads(json.dumps(plan))  # as it will be read back: lists, no tuples
        self._packing = _Packing(self._plan)
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise interfaces.UserError(f"token shards need a folder; {self.path} is a file")
        os.makedirs(self.path, exist_ok=True)
        self._resume(earlier)

    def _resume(self, earlier: Mapping[str, Sequence[str]]) -> None:
        """Take up the plan that is there if it is this one; refuse any other."""
        for name in (HEADER, PLAN):
            if os.path.exists(os.path.join(self.path, name)):
                found = (_read_header if name == HEADER else _read_plan)(self.path)
                if _is_known(self._plan["data"], found.get("data"), earlier):
                    self._plan["data"] = found["data"]  # as it was written
                differences = _differences(self._plan, _plan_of(found))
                if differences:
                    raise interfaces.UserError(
                        f"{self.path} holds token shards of something else; choose another folder, "
                        "or empty this one. Different are\n" + "\n".join(differences)
                    )
                self._finished = _header_shards(found) if name == HEADER else {}
                return
        # Another process may have written the plan a moment ago.
        others = [name for name in os.listdir(self.path) if name[0] != "." and name != PLAN]
        if others:
            raise interfaces.UserError(
                f"token shards need an empty folder; {self.path} holds {sorted(others)[0]} and no "
                f"{PLAN}: choose another folder"
            )
        self._finished = {}
        _write_json(self.path, PLAN, self._plan)

    def shards(self) -> list[Shard]:
        """Every shard of every split."""
        return [
            shard
            for split, count in self._plan["images"].items()
            for shard in _planned(split, count, self._plan["shard_images"])
        ]

    def remaining(self, process: tuple[int, int] = (0, 1)) -> list[Shard]:
        """The shards of process (p, n) that are not there, or not as their notes say."""
        part, parts = process
        return [shard for shard in self.shards()[part::parts] if self._note(shard) is None]

    def written(self, split: str) -> list[tuple[Shard, dict[int, tuple[str, str]]]]:
        """The shards of a split that are there, and {index: (name, why)} of their unreadable."""
        found = [(s, self._noted(s)) for s in self.shards() if s.split == split]
        return [(shard, _missing(note)) for shard, note in found if note is not None]

    def _note(self, shard: Shard) -> dict | None:
        """What was written of a shard; None where the file doesn't bear it out."""
        note, path = self._noted(shard), os.path.join(self.path, shard.file)
        if note is None or not os.path.exists(path) or archives.sha256(path) != note.get("sha256"):
            return None
        return note

    def _noted(self, shard: Shard) -> dict | None:
        """What is said of a shard that was written."""
        note, beside = self._finished.get(shard.file), _beside(os.path.join(self.path, shard.file))
        if note is None and os.path.exists(beside):
            try:
                note = _read_json(self.path, os.path.basename(beside))
                _missing(note)
            except (ValueError, TypeError):  # cut off: the shard is written again
                return None
        return note

    def write(
        self,
        shard: Shard,
        tokens_BXLG: np.ndarray,
        label_B: np.ndarray,
        unreadable: Mapping[int, tuple[str, str]] = types.MappingProxyType({}),
    ) -> None:
        """One shard: its tokens [images, views, L, G] and its labels.

        `unreadable` has (name, reason) of the images, by their numbers in the split, whose tokens
        are none because they could not be read.
        """
        record_BU = self._packing.records(tokens_BXLG, label_B)
        if len(record_BU) != shard.stop - shard.start:
            raise ValueError(
                f"{shard.file} takes {shard.stop - shard.start} images; found {len(record_BU)}"
            )
        path = os.path.join(self.path, shard.file)
        temporary = _temporary(path)
        if os.path.exists(temporary):  # of a run that was killed
            os.remove(temporary)
        try:
            writer = array_record_module.ArrayRecordWriter(temporary, _WRITER_OPTIONS)
            for record_U in record_BU:
                writer.write(record_U.tobytes())
            writer.close()
        except RuntimeError as error:
            raise interfaces.UserError(
                f"{path} could not be written: {error}; make room, then run the same command again"
            ) from error
        note = {"file": shard.file, "images": len(record_BU), "sha256": archives.sha256(temporary)}
        if unreadable:
            note["unreadable"] = [[int(index), *unreadable[index]] for index in sorted(unreadable)]
        _commit(temporary, path)
        # The note comes second: a shard without one is written again, which costs time only.
        _write_json(self.path, os.path.basename(_beside(path)), note)

    def finish(self) -> None:
        """Write the header, and by that declare the folder complete."""
        notes = {shard.file: self._note(shard) for shard in self.shards()}
        missing = [file for file, note in notes.items() if note is None]
        if missing:
            raise interfaces.UserError(
                f"{len(missing)} shards of {self.path} are missing, {missing[0]} the first: run "
                "the same command again; it writes only these"
            )
        splits = {}
        for split, count in self._plan["images"].items():
            own = [notes[s.file] for s in _planned(split, count, self._plan["shard_images"])]
            splits[split] = {"images": count, "shards": own}
            if unreadable := sum(len(note.get("unreadable", [])) for note in own):
                if unreadable == count:
                    raise interfaces.UserError(
                        f"none of the {count} images of {split} could be read: no tokens; "
                        "repair them, or give other images"
                    )
                splits[split]["unreadable"] = unreadable
        header = {key: value for key, value in self._plan.items() if key != "images"}
        header["splits"] = splits
        _write_json(self.path, HEADER, {**header, "digest": _digest(header)})
        self._finished = notes
        for name in os.listdir(self.path):
            if name == PLAN or (name.startswith(".") and name.endswith((".note", ".part"))):
                os.remove(os.path.join(self.path, name))


class Source(sources.RandomAccess):
    """Random access to token shards: `{"tokens": int32 [views, L, G], "label": int}`.

    Whatever is wrong with the folder is a UserError here, before any training.

    Args:
      split: `train` or `held_out`.
      verify: also compare each shard with its checksum, and every token with its alphabet.
    """

    holds = "tokens"

    def __init__(self, path: str | os.PathLike, *, split: str = "train", verify: bool = True):
        self.path = os.fspath(path)
        self.split = split
        self.header = _read_header(self.path)
        # a set of which nothing was held out has an empty part
        parts = {"held_out": {"images": 0, "shards": []}} | self.header["splits"]
        if split not in parts:
            raise interfaces.UserError(
                f"{self.path} has no split {split!r}, only {', '.join(self.header['splits'])}; "
                f"choose one of these, or {_REMEDY}"
            )
        self.layout = self.header["layout"]
        self.classes = tuple(self.header["classes"])
        self.views = tuple(self.header["views"])
        # of images that could not be read; the stream reads none of these
        self.missing = {}
        for shard in parts[split]["shards"]:
            self.missing |= _missing(shard)
        self._packing = _Packing(self.header)
        shards = parts[split]["shards"]
        self._files = [os.path.join(self.path, shard["file"]) for shard in shards]
        self._ends = np.cumsum([shard["images"] for shard in shards]).tolist()
        self._readers: list = [None] * len(shards)
        # images of each class, where all were looked at
        self.counts = np.zeros(self._packing.labels, np.int64) if verify else None
        for shard in shards:
            self._check(shard, verify)
        if verify:
            self.counts[0] -= len(self.missing)
        self._check_folder()
        canonical = json.dumps([split, _told(self.header)], sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def _check_folder(self) -> None:
        """An error where shards lie in the folder of which the header knows nothing."""
        named = _header_shards(self.header)
        there = (name for name in os.listdir(self.path) if name.endswith(".array_record"))
        other = sorted(name for name in there if name not in named and name[0] != ".")
        if other:
            listed = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if other[5:] else "")
            raise interfaces.UserError(
                f"{self.path} holds shards that its {HEADER} does not name: {listed}; move what is "
                f"of another token set away, or {_REMEDY}"
            )

    def _check(self, shard: dict, verify: bool) -> None:
        path = os.path.join(self.path, shard["file"])
        if not os.path.isfile(path):
            raise _damage(path, "the file is missing")
        if verify and archives.sha256(path) != shard["sha256"]:
            raise _damage(path, "the contents do not have the checksum that the header states")
        try:
            reader = _reader(path)
            count = reader.num_records()
            # All of them, or a first one to tell the width by.
            records = reader.read_all() if verify else reader.read([0])
            reader.close()
        except (RuntimeError, IndexError) as error:
            raise _damage(path, str(error)) from error
        if count != shard["images"]:
            raise _damage(path, f"{shard['images']} images are stated; found {count}")
        for record in records:
            if len(record) != self._packing.width:
                raise _damage(
                    path, f"records of {self._packing.width} bytes are needed; found {len(record)}"
                )
        tokens_BXLG, label_B = self._packing.unpack(records)
        problem = self._packing.range_problem(tokens_BXLG, label_B)
        if problem:
            raise _damage(path, problem)
        if verify:
            self.counts += np.bincount(label_B, minlength=self._packing.labels)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Many records; each shard is read once."""
        places: dict[int, list[tuple[int, int]]] = {}
        for row, index in enumerate(indices):
            index = range(len(self))[int(index)]  # raises beyond the end
            shard = bisect.bisect_right(self._ends, index)
            start = self._ends[shard - 1] if shard else 0
            places.setdefault(shard, []).append((row, index - start))
        found: list[dict] = [{}] * len(indices)
        for shard, rows in places.items():
            records = self._read(shard, [place for _, place in rows])
            tokens_BXLG, label_B = self._packing.unpack(records)
            for (row, _), tokens_XLG, label in zip(rows, tokens_BXLG, label_B, strict=True):
                found[row] = {"tokens": tokens_XLG, "label": int(label)}
        return found

    def _read(self, shard: int, places: list[int]) -> list[bytes]:
        try:
            if self._readers[shard] is None:
                self._readers[shard] = _reader(self._files[shard])
            return self._readers[shard].read(places)
        except RuntimeError as error:
            raise _damage(self._files[shard], str(error)) from error

    def name(self, index: int) -> str:
        """That of an image that could not be read; of others folder, split and number."""
        if index in self.missing:
            return self.missing[index][0]
        return f"{self.path}/{self.split}/{index}"

    def __getstate__(self) -> dict:
        # Open readers do not travel to another process.
        return {**self.__dict__, "_readers": [None] * len(self._readers)}


class _Packing:
    """Between arrays and records, as a header describes them."""

    def __init__(self, header: Mapping):
        vocab, grids = header["layout"]["vocab"], header["layout"]["grids"]
        self.vocab_G = np.array(vocab, np.int64)
        self.labels = max(1, len(header["classes"]))
        length = sum(rows * columns for rows, columns in grids)
        self.shape = (len(header["views"]), length, len(vocab))
        self.dtype = np.dtype(header["dtype"]).newbyteorder("<")
        self.width = _LABEL_BYTES + math.prod(self.shape) * self.dtype.itemsize

    def records(self, tokens_BXLG: np.ndarray, label_B: np.ndarray) -> np.ndarray:
        """uint8 [B, width]"""
        tokens_BXLG, label_B = np.asarray(tokens_BXLG), np.asarray(label_B)
        shape = (len(label_B), *self.shape)
        if tokens_BXLG.shape != shape or tokens_BXLG.dtype.kind not in "iu":
            raise ValueError(
                f"tokens must be integers {shape}: images, views, positions, symbols; found "
                f"{tokens_BXLG.dtype} {tokens_BXLG.shape}"
            )
        problem = self.range_problem(tokens_BXLG, label_B)
        if problem:
            raise ValueError(problem)
        count = len(label_B)
        tokens_BU = np.ascontiguousarray(tokens_BXLG.astype(self.dtype)).reshape(count, -1)
        labels_B1 = label_B.astype("<u4").reshape(count, 1)
        return np.concatenate([labels_B1.view(np.uint8), tokens_BU.view(np.uint8)], axis=1)

    def unpack(self, records: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """int32 [B, views, L, G] and int64 [B]"""
        record_BU = np.frombuffer(b"".join(records), np.uint8).reshape(-1, self.width)
        labels_B1 = np.ascontiguousarray(record_BU[:, :_LABEL_BYTES]).view("<u4")
        tokens_BU = np.ascontiguousarray(record_BU[:, _LABEL_BYTES:]).view(self.dtype)
        return (
            tokens_BU.reshape(-1, *self.shape).astype(np.int32),
            labels_B1[:, 0].astype(np.int64),
        )

    def range_problem(self, tokens_BXLG: np.ndarray, label_B: np.ndarray) -> str:
        """What lies outside its alphabet; empty if nothing does."""
        if not len(label_B):
            return ""
        low_G, high_G = tokens_BXLG.min(axis=(0, 1, 2)), tokens_BXLG.max(axis=(0, 1, 2))
        for symbol, (low, high) in enumerate(zip(low_G, high_G, strict=True)):
            if low < 0 or high >= self.vocab_G[symbol]:
                return (
                    f"tokens of symbol {symbol} must lie in [0, {self.vocab_G[symbol]}); found "
                    f"{low} to {high}"
                )
        if label_B.min() < 0 or label_B.max() >= self.labels:
            return (
                f"labels must lie in [0, {self.labels}); found {label_B.min()} to {label_B.max()}"
            )
        return ""


def _plain_layout(layout: Mapping) -> dict:
    return {
        "vocab": [int(size) for size in layout["vocab"]],
        "grids": [[int(rows), int(columns)] for rows, columns in layout["grids"]],
    }


def _dtype(vocab: Sequence[int]) -> str:
    """The smallest unsigned integer that holds the largest token."""
    # Not more than int32, which is what the tokens become on the device.
    if not vocab or min(vocab) < 1 or max(vocab) > 2**31:
        raise interfaces.UserError(
            f"alphabets must have between 1 and 2**31 symbols; found vocab={list(vocab)}"
        )
    return next(name for name in _DTYPES if max(vocab) - 1 <= np.iinfo(name).max)


def _check_plan(plan: dict) -> None:
    unknown = sorted(set(plan["images"]) - set(SPLITS))
    if unknown or not plan["images"] or min(plan["images"].values()) < 1:
        raise interfaces.UserError(
            f"the splits must be among {', '.join(SPLITS)}, each with an image at least; found "
            f"{plan['images']}"
        )
    if not plan["views"] or len(set(plan["views"])) != len(plan["views"]):
        raise interfaces.UserError(
            f"views must be different and at least one; found {plan['views']}"
        )
    if plan["shard_images"] < 1:
        raise interfaces.UserError(f"a shard needs an image at least; found {plan['shard_images']}")


def _planned(split: str, count: int, shard_images: int) -> list[Shard]:
    """The shards of a split, from its count alone, so that every process agrees."""
    number = math.ceil(count / shard_images)
    return [
        Shard(
            split,
            f"{split}-{shard:05d}-of-{number:05d}.array_record",
            shard * shard_images,
            min(count, (shard + 1) * shard_images),
        )
        for shard in range(number)
    ]


def recorded_classes(path: str | os.PathLike) -> tuple[str, ...]:
    """The classes, in their order, of a folder of shards, finished or begun; none without one."""
    path = os.fspath(path)
    for name in (HEADER, PLAN):
        if os.path.exists(os.path.join(path, name)):
            found = _read_json(path, name).get("classes")
            named = isinstance(found, list) and all(isinstance(name, str) for name in found)
            return tuple(found) if named else ()
    return ()


def _plan_of(header: dict) -> dict:
    """The plan that a finished header came from; a plan as it is."""
    if "splits" not in header:
        return header
    plan = {key: value for key, value in header.items() if key not in ("splits", "digest")}
    return {**plan, "images": {name: part["images"] for name, part in header["splits"].items()}}


def _is_known(data: dict, found, earlier: Mapping[str, Sequence[str]]) -> bool:
    """Whether a header's `data` are the same but for fingerprints of an earlier version."""
    if not isinstance(found, dict) or not isinstance(data.get("fingerprint"), dict):
        return False
    known = {
        s: (fingerprint, *earlier.get(s, ())) for s, fingerprint in data["fingerprint"].items()
    }
    there = found.get("fingerprint")
    same = isinstance(there, dict) and there.keys() == known.keys()
    rest = {name: value for name, value in found.items() if name != "fingerprint"}
    return (
        same
        and all(there[split] in known[split] for split in known)
        and rest == {name: value for name, value in data.items() if name != "fingerprint"}
    )


def _header_shards(header: dict) -> dict[str, dict]:
    return {shard["file"]: shard for part in header["splits"].values() for shard in part["shards"]}


def _differences(need: dict, found: dict) -> list[str]:
    lines = []
    # not the format: one that can be read can be gone on with
    for key in sorted((need.keys() | found.keys()) - {"format"}):
        left, right = need.get(key), found.get(key)
        if key == "tokenizer" and isinstance(left, dict) and isinstance(right, dict):
            left, right = ({**side, "path": ""} for side in (left, right))
        if left != right:
            lines.append(f"  {key}: {right} there, {left} wanted")
    return lines


def _read_plan(path: str) -> dict:
    return _read_json(path, PLAN)


def _read_header(path: str) -> dict:
    if not os.path.isdir(path):
        found = "a file" if os.path.exists(path) else "nothing"
        raise interfaces.UserError(
            f"token shards are needed at {path}; found {found} there; make them with "
            "`tokgen pretokenize`"
        )
    if not os.path.exists(os.path.join(path, HEADER)):
        if os.path.exists(os.path.join(path, PLAN)):
            raise interfaces.UserError(
                f"the token shards in {path} were not finished: run the same `tokgen pretokenize` "
                "command again, and it goes on where it was stopped"
            )
        raise interfaces.UserError(
            f"{path} has no {HEADER}, so it holds no token shards; make them with "
            "`tokgen pretokenize`"
        )
    header = _read_json(path, HEADER)
    problem = _header_problem(header)
    if problem:
        raise _damage(os.path.join(path, HEADER), problem)
    return header


def _header_problem(header: dict) -> str:
    """What is wrong with a header; empty if it can be used."""
    if header.get("format") not in FORMATS:
        return f"format {FORMAT} is needed; found {header.get('format')}"
    try:
        if header["layout"] != _plain_layout(header["layout"]):
            return f"{header['layout']} is no layout"
        plan = _plan_of(header)
        _check_plan(plan)
        needed = _dtype(header["layout"]["vocab"])
        if header["dtype"] != needed:
            return f"tokens of {header['layout']['vocab']} need {needed}; found {header['dtype']}"
        if not all(isinstance(name, str) for name in header["classes"] + header["views"]):
            return "classes and views must be names"
        if not isinstance(header["tokenizer"]["fingerprint"], str):
            return "the tokenizer has no fingerprint"
        if not isinstance(header["data"], dict):
            return "the data are not described"
        for split, count in plan["images"].items():
            listed = len(header["splits"][split]["shards"])
            # before as many are made as it claims
            if math.ceil(count / header["shard_images"]) != listed:
                return f"{count} images of {split} do not lie in the {listed} shards that it lists"
            planned = _planned(split, count, header["shard_images"])
            need = [(shard.file, shard.stop - shard.start) for shard in planned]
            found = [
                (shard["file"], shard["images"]) for shard in header["splits"][split]["shards"]
            ]
            if need != found:
                return f"{count} images of {split} are {len(need)} shards; found {found[:3]} ..."
            for shard, there in zip(planned, header["splits"][split]["shards"], strict=True):
                for index, told in _missing(there).items():
                    if not isinstance(index, int) or not shard.start <= index < shard.stop:
                        return f"{index!r} is no image of {shard.file}"
                    if not all(isinstance(text, str) for text in told):
                        return f"image {index} of {split} needs a name and why it is unreadable"
            if not all(isinstance(s["sha256"], str) for s in header["splits"][split]["shards"]):
                return f"a shard of {split} has no checksum"
        if (header["format"] > 1 or "digest" in header) and header["digest"] != _digest(header):
            return "it was changed since it was written: it does not have the digest that it states"
    except KeyError as error:
        return f"{error} is missing"
    except (TypeError, ValueError, AttributeError) as error:
        return f"it does not have the form of a header ({error})"
    return ""


def _told(header: dict) -> dict:
    """What a header says of the tokens, in every format alike.

    Where the tokenizer lies is no part of it: that may change without changing a token.
    """
    told = {key: value for key, value in header.items() if key != "digest"}
    return {**told, "format": 1, "tokenizer": {**header["tokenizer"], "path": ""}}


def _digest(header: dict) -> str:
    what = {**_told(header), "format": header["format"]}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _missing(note: Mapping) -> dict[int, tuple[str, str]]:
    """{index: (name, why)} of the images of a shard that could not be read."""
    return {index: (name, why) for index, name, why in note.get("unreadable", [])}


def _damage(path: str, problem: str) -> interfaces.UserError:
    return interfaces.UserError(f"{path} cannot be used: {problem}; {_REMEDY}")


def _reader(path: str):
    return array_record_module.ArrayRecordReader(path, options=_READER_OPTIONS)


def _beside(path: str) -> str:
    """The note of a shard: hidden, and gone when the header holds it."""
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.note")


def _temporary(path: str) -> str:
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.part")


def _read_json(path: str, name: str) -> dict:
    file = os.path.join(path, name)
    try:
        content = records_.load(pathlib.Path(file))
    except ValueError as error:
        raise _damage(file, f"it is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damage(file, "it does not have the form of a header")
    return content


def _write_json(path: str, name: str, content: dict) -> None:
    # Several processes may write the plan, all of them the same.
    records_.save(pathlib.Path(path, name), json.dumps(content, indent=1) + "\n")


def _commit(temporary: str, target: str) -> None:
    """Rename, with the contents on the disk first: a crash shows the old state or the new one."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
