"""Packed token shards: what pretokenizing writes and a generator is trained on.

    tokens/
      layout.json                          the header: what was tokenized, by what, into what
      train-00000-of-00003.array_record    one record per image, all of the same width
      held_out-00000-of-00001.array_record

A record is the label and the tokens of every view (`token_records`). The header (`token_header`) is
written last: a folder without it was not finished, and `token_writer` goes on where it was stopped.
It holds the checksum of every shard and a digest of itself, so that what it says of the tokens
cannot be changed without being noticed.

An image that could not be read has a record all the same, of zeros, so that record i belongs to
image i; the header lists these (`unreadable` of a shard, if it has any), and no reader sees them.
"""

import bisect
import hashlib
import json
import os
from collections.abc import Sequence

import numpy as np

from tokgen import archives, interfaces, storage
from tokgen.data import sources, token_cache, token_header, token_records


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
        self.header = token_header.read(self.path)
        # a set of which nothing was held out has an empty part
        parts = {"held_out": {"images": 0, "shards": []}} | self.header["splits"]
        if split not in parts:
            raise interfaces.UserError(
                f"{self.path} has no split {split!r}, only {', '.join(self.header['splits'])}; "
                f"choose one of these, or {token_header.REMEDY}"
            )
        self.layout = self.header["layout"]
        self.classes = tuple(self.header["classes"])
        self.views = tuple(self.header["views"])
        # of images that could not be read; the stream reads none of these
        self.missing = {}
        for shard in parts[split]["shards"]:
            self.missing |= token_header.unreadable(shard)
        self._packing = token_records.Packing(self.header)
        shards = parts[split]["shards"]
        self._files = token_cache.files(self.path, shards, verify=verify)
        self._ends = np.cumsum([shard["images"] for shard in shards]).tolist()
        self._readers: list = [None] * len(shards)
        # images of each class, where all were looked at
        self.counts = np.zeros(self._packing.labels, np.int64) if verify else None
        for shard, file in zip(shards, self._files, strict=True):
            self._check(shard, file, verify)
        if verify:
            self.counts[0] -= len(self.missing)
        self._check_folder()
        canonical = json.dumps([split, token_header.canonical(self.header)], sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def _check_folder(self) -> None:
        """An error where shards lie in the folder of which the header knows nothing."""
        named = token_header.shards_by_file(self.header)
        with storage.reached(self.path):
            listed = storage.names(storage.path(self.path))
        there = (name for name in listed if name.endswith(".array_record"))
        other = sorted(name for name in there if name not in named and name[0] != ".")
        if other:
            listed = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if other[5:] else "")
            raise interfaces.UserError(
                f"{self.path} holds shards that its {token_header.HEADER} does not name: "
                f"{listed}; move what is of another token set away, or {token_header.REMEDY}"
            )

    def _check(self, shard: dict, path: str, verify: bool) -> None:
        if not os.path.isfile(path):
            raise token_header.damage(path, "the file is missing")
        if verify and archives.sha256(path) != shard["sha256"]:
            raise token_header.damage(
                path, "the contents do not have the checksum that the header states"
            )
        try:
            reader = token_records.reader(path)
            count = reader.num_records()
            # All of them, or a first one to tell the width by.
            records = reader.read_all() if verify else reader.read([0])
            reader.close()
        except (RuntimeError, IndexError) as error:
            raise token_header.damage(path, str(error)) from error
        if count != shard["images"]:
            raise token_header.damage(path, f"{shard['images']} images are stated; found {count}")
        for record in records:
            if len(record) != self._packing.width:
                raise token_header.damage(
                    path, f"records of {self._packing.width} bytes are needed; found {len(record)}"
                )
        tokens_BXLG, label_B = self._packing.unpack(records)
        problem = self._packing.range_problem(tokens_BXLG, label_B)
        if problem:
            raise token_header.damage(path, problem)
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
                self._readers[shard] = token_records.reader(self._files[shard])
            return self._readers[shard].read(places)
        except RuntimeError as error:
            raise token_header.damage(self._files[shard], str(error)) from error

    def name(self, index: int) -> str:
        """That of an image that could not be read; of others folder, split and number."""
        if index in self.missing:
            return self.missing[index][0]
        return f"{self.path}/{self.split}/{index}"

    def __getstate__(self) -> dict:
        # Open readers do not travel to another process.
        return {**self.__dict__, "_readers": [None] * len(self._readers)}
