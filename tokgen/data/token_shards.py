"""Packed token shards: what pretokenizing writes and a generator is trained on.

    tokens/
      layout.json                          the header: what was tokenized, by what, into what
      train-00000-of-00003.array_record    a record per view of an image, of one width
      held_out-00000-of-00001.array_record

A record is the label and the tokens of a view of an image (`token_records`). The header
(`token_header`) is written last: a folder without it was not finished, and `token_writer` goes on
where it was stopped. It holds the checksum of every shard and a digest of itself, so that what it
says of the tokens cannot be changed without being noticed.

An image that could not be read has its records all the same, of zeros, so that those of image i
are where its number says; the header lists these (`unreadable` of a shard, if it has any), and no
reader sees them.
"""

import bisect
import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

from tokgen import archives, interfaces, report, storage
from tokgen.data import sources, token_cache, token_header, token_records, token_verdicts

_AT_ONCE = 4096  # records in memory while a shard is verified


class Source(sources.RandomAccess):
    """Random access to token shards: `{"tokens": [views, L, G], "label": int}`.

    Tokens are uint8 or uint16 where the alphabet allows, else int32.

    Whatever is wrong with the folder is a UserError here, before any training.

    Args:
      split: `train` or `held_out`.
      verify: also compare each shard with its checksum, and every token with its alphabet: `once`,
        unless this host did so before and the files did not change since (`token_verdicts`);
        `always`; or `never`.
    """

    holds = "tokens"

    def __init__(self, path: str | os.PathLike, *, split: str = "train", verify: str = "once"):
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
        self._ends = np.cumsum([shard["images"] for shard in shards]).tolist()
        self._readers: list = [None] * len(shards)
        canonical = json.dumps([split, token_header.canonical(self.header)], sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self.counts = None  # images of each class, where all were looked at
        self._files = token_cache.places(self.path, shards)
        if verify not in token_verdicts.MODES:
            raise interfaces.UserError(
                f"verify must be one of {', '.join(token_verdicts.MODES)}; found {verify!r}"
            )
        if verify == "never":
            self._look(shards)
        else:
            self.counts = token_verdicts.counts(
                f"{self.path}, {split},",
                self.fingerprint,
                self._files,
                self._packing.labels,
                functools.partial(self._read_whole, shards),
                again=verify == "always",
            )
            self._look(shards)
            self.counts[0] -= len(self.missing)
        self._check_folder()

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

    def _look(self, shards: Sequence[dict]) -> None:
        """What costs little: the files are there, of as many records as stated, of their width."""
        token_cache.files(self.path, shards, verify=False)
        for shard, path in zip(shards, self._files, strict=True):
            with self._opened(shard, path) as reader:
                self._counted(reader.read([0]), path)

    def _read_whole(self, shards: Sequence[dict]) -> np.ndarray:
        """How many images each class has, after everything was compared with the header."""
        token_cache.files(self.path, shards, verify=True)
        compared = storage.is_remote(self.path)  # with their checksums, by `files`
        counts = np.zeros(self._packing.labels, np.int64)
        with report.bar(len(shards), unit="shard", what="verify", delay=2) as bar:
            for shard, path in zip(shards, self._files, strict=True):
                if (
                    not compared
                    and os.path.isfile(path)
                    and archives.sha256(path) != shard["sha256"]
                ):
                    raise token_header.damage(
                        path, "the contents do not have the checksum that the header states"
                    )
                with self._opened(shard, path) as reader:
                    count = reader.num_records()
                    for start in range(0, count, _AT_ONCE):
                        stop = min(start + _AT_ONCE, count)
                        counts += self._counted(reader.read(start, stop), path)
                bar.update()
        return counts // self._packing.records_each

    @contextlib.contextmanager
    def _opened(self, shard: dict, path: str) -> Iterator:
        """A reader of a shard with as many records as are stated."""
        if not os.path.isfile(path):
            raise token_header.damage(path, "the file is missing")
        try:
            reader = token_records.reader(path)
            count = reader.num_records()
            need = shard["images"] * self._packing.records_each
            if count != need:
                raise token_header.damage(
                    path,
                    f"{shard['images']} images are stated, which are {need} records; found {count}",
                )
            yield reader
            reader.close()
        except (RuntimeError, IndexError) as error:
            raise token_header.damage(path, str(error)) from error

    def _counted(self, records: Sequence[bytes], path: str) -> np.ndarray:
        """How many of these records each class has, after they were compared with the layout."""
        for record in records:
            if len(record) != self._packing.width:
                raise token_header.damage(
                    path, f"records of {self._packing.width} bytes are needed; found {len(record)}"
                )
        tokens_RXLG, label_R = self._packing.unpack(records)
        problem = self._packing.range_problem(tokens_RXLG, label_R)
        if problem:
            raise token_header.damage(path, problem)
        return np.bincount(label_R, minlength=self._packing.labels)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Many records; each shard is read once."""
        return self._found(indices, [None] * len(indices))

    def one_view(self, indices: Sequence[int], view_B: Sequence[int]) -> list[dict]:
        """Many records of one view each; of the others nothing is read, from format 3 on."""
        found = self._found(indices, view_B)
        if self._packing.records_each == 1:
            return [
                {**record, "tokens": record["tokens"][view]}
                for record, view in zip(found, view_B, strict=True)
            ]
        return [{**record, "tokens": record["tokens"][0]} for record in found]

    def _found(self, indices: Sequence[int], view_B: Sequence[int | None]) -> list[dict]:
        """{"tokens": [what `places` has of views, L, G], "label"} by number and view."""
        rows: dict[int, list[int]] = {}
        places: dict[int, list[int]] = {}
        for row, (index, view) in enumerate(zip(indices, view_B, strict=True)):
            index = range(len(self))[int(index)]  # raises beyond the end
            shard = bisect.bisect_right(self._ends, index)
            start = self._ends[shard - 1] if shard else 0
            rows.setdefault(shard, []).append(row)
            places.setdefault(shard, []).extend(self._packing.places(index - start, view))
        found: list[dict] = [{}] * len(indices)
        for shard, own in rows.items():
            tokens_RXLG, label_R = self._packing.unpack(self._read(shard, places[shard]))
            shape = (len(own), -1, *tokens_RXLG.shape[2:])
            label_B = label_R.reshape(len(own), -1)[:, 0]
            for row, tokens_XLG, label in zip(
                own, tokens_RXLG.reshape(shape), label_B, strict=True
            ):
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
