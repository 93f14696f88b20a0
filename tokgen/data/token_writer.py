"""Writes token shards, each whole or not at all, and goes on where it was stopped.

Every process knows from the counts alone which shards are its own. A shard is there when its file
is, with a hidden note beside it that has its checksum; the header, which is written last, takes up
the notes, and they go.
"""

import contextlib
import json
import os
import pathlib
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tokgen import archives, interfaces, storage
from tokgen.data import token_header, token_records
from tokgen.output import leases

SHARD = 8192  # images of a shard


class Writer:
    """Writes shards into a folder, each whole or not at all, and skips those already there.

        writer = token_writer.Writer(out, images={"train": 50_000}, layout=..., ...)
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
            "format": token_header.FORMAT,
            "layout": token_header.plain_layout(layout),
            "tokenizer": dict(tokenizer),
            "data": dict(data),
            "views": list(views),
            "dtype": token_header.smallest_integer(layout["vocab"]),
            "classes": list(classes),
            "shard_images": int(shard_images),
            "images": {split: int(count) for split, count in images.items()},
        }
        token_header.check_plan(plan)
        self._plan = json.loads(json.dumps(plan))  # as it will be read back: lists, no tuples
        self._folder = storage.path(self.path)
        with storage.reached(self.path):
            is_file = self._folder.exists() and not storage.is_dir(self._folder)
        if is_file:
            raise interfaces.UserError(f"token shards need a folder; {self.path} is a file")
        if not storage.is_remote(self.path):  # a bucket has no empty folders
            os.makedirs(self.path, exist_ok=True)
        self._resume(earlier)
        self._packing = token_records.Packing(self._plan)

    def _resume(self, earlier: Mapping[str, Sequence[str]]) -> None:
        """Take up the plan that is there if it is this one; refuse any other."""
        for name in (token_header.HEADER, token_header.PLAN):
            if token_header.has(self.path, name):
                finished = name == token_header.HEADER
                read = token_header.read if finished else token_header.read_plan
                found = read(self.path)
                if _is_known(self._plan["data"], found.get("data"), earlier):
                    self._plan["data"] = found["data"]  # as it was written
                if found.get("format") not in token_header.FORMATS:
                    raise token_header.damage(
                        os.path.join(self.path, name),
                        f"format {token_header.FORMAT} is needed; found {found.get('format')}",
                    )
                if found["format"] < token_header.BY_VIEW:  # so are the shards that are there
                    self._plan["format"] = token_header.BY_VIEW - 1
                differences = _differences(self._plan, token_header.plan_of(found))
                if differences:
                    raise interfaces.UserError(
                        f"{self.path} holds token shards of something else; choose another folder, "
                        "or empty this one. Different are\n" + "\n".join(differences)
                    )
                self._finished = token_header.shards_by_file(found) if finished else {}
                return
        # Another process may have written the plan a moment ago.
        with storage.reached(self.path):
            there = storage.names(self._folder)
        others = [name for name in there if name[0] != "." and name != token_header.PLAN]
        if others:
            raise interfaces.UserError(
                f"token shards need an empty folder; {self.path} holds {sorted(others)[0]} and no "
                f"{token_header.PLAN}: choose another folder"
            )
        self._finished = {}
        token_header.save(self.path, token_header.PLAN, self._plan)

    def shards(self) -> list[token_header.Shard]:
        """Every shard of every split."""
        return [
            shard
            for split, count in self._plan["images"].items()
            for shard in token_header.shards_of_split(split, count, self._plan["shard_images"])
        ]

    def remaining(self, process: tuple[int, int] = (0, 1)) -> list[token_header.Shard]:
        """The shards of process (p, n) that are not there, or not as their notes say."""
        part, parts = process
        return [shard for shard in self.shards()[part::parts] if self._note(shard) is None]

    def written(self, split: str) -> list[tuple[token_header.Shard, dict[int, tuple[str, str]]]]:
        """The shards of a split that are there, and {index: (name, why)} of their unreadable."""
        found = [(s, self._noted(s)) for s in self.shards() if s.split == split]
        return [(shard, token_header.unreadable(note)) for shard, note in found if note is not None]

    def is_written(self) -> bool:
        """Whether a note of each shard is there."""
        return all(self._noted(shard) is not None for shard in self.shards())

    def _note(self, shard: token_header.Shard) -> dict | None:
        """What was written of a shard; None where the file doesn't bear it out."""
        note, path = self._noted(shard), self._folder / shard.file
        with storage.reached(path):
            if note is None or not path.exists() or archives.sha256(path) != note.get("sha256"):
                return None
        return note

    def _noted(self, shard: token_header.Shard) -> dict | None:
        """What is said of a shard that was written."""
        note, beside = self._finished.get(shard.file), _beside(self._folder / shard.file)
        if note is None and token_header.has(self.path, beside.name):
            try:
                note = token_header.load(self.path, beside.name)
                token_header.unreadable(note)
            except storage.NotReached:  # nothing is known of it
                raise
            except (ValueError, TypeError):  # cut off: the shard is written again
                return None
        return note

    def write(
        self,
        shard: token_header.Shard,
        tokens_BXLG: np.ndarray,
        label_B: np.ndarray,
        unreadable: Mapping[int, tuple[str, str]] = types.MappingProxyType({}),
    ) -> None:
        """One shard: its tokens [images, views, L, G] and its labels.

        `unreadable` has (name, reason) of the images, by their numbers in the split, whose tokens
        are none because they could not be read.
        """
        record_RU = self._packing.records(tokens_BXLG, label_B)
        if len(label_B) != shard.stop - shard.start:
            raise ValueError(
                f"{shard.file} takes {shard.stop - shard.start} images; found {len(label_B)}"
            )
        path = self._folder / shard.file
        with _temporary(path) as temporary:
            try:
                writer = token_records.writer(str(temporary))
                for record_U in record_RU:
                    writer.write(record_U.tobytes())
                writer.close()
            except RuntimeError as error:
                raise interfaces.UserError(
                    f"{path} could not be written: {error}; make room, then run the same command "
                    "again"
                ) from error
            sha256 = archives.sha256(temporary)
            _commit(temporary, path)
        note = {"file": shard.file, "images": len(label_B), "sha256": sha256}
        if unreadable:
            note["unreadable"] = [[int(index), *unreadable[index]] for index in sorted(unreadable)]
        # The note comes second: a shard without one is written again, which costs time only.
        token_header.save(self.path, _beside(path).name, note)

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
            own = [
                notes[s.file]
                for s in token_header.shards_of_split(split, count, self._plan["shard_images"])
            ]
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
        token_header.save(
            self.path, token_header.HEADER, {**header, "digest": token_header.digest(header)}
        )
        self._finished = notes
        leases.check(self._folder)
        with storage.reached(self.path):
            for name in storage.names(self._folder):
                if name == token_header.PLAN or (
                    name.startswith(".") and name.endswith((".note", ".part"))
                ):
                    (self._folder / name).unlink()


def _is_known(data: dict, found: object, earlier: Mapping[str, Sequence[str]]) -> bool:
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


def _differences(need: dict, found: dict) -> list[str]:
    """In what a plan that is there differs from the one wanted, a line each."""
    lines = []
    # not the format: one that can be read can be gone on with
    for key in sorted((need.keys() | found.keys()) - {"format"}):
        left, right = need.get(key), found.get(key)
        if key == "tokenizer" and isinstance(left, dict) and isinstance(right, dict):
            left, right = ({**side, "path": ""} for side in (left, right))
        if left != right:
            lines.append(f"  {key}: {right} there, {left} wanted")
    return lines


def _beside(path: pathlib.Path) -> pathlib.Path:
    """The note of a shard: hidden, and gone when the header holds it."""
    return path.with_name(f".{path.name}.note")


@contextlib.contextmanager
def _temporary(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write what is to be a shard: beside it, or on this host before it is in a bucket."""
    if storage.is_remote(path):
        with tempfile.TemporaryDirectory(prefix="tokgen-shard-") as folder:
            yield pathlib.Path(folder, path.name)
        return
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)  # of a run that was killed
    yield temporary


def _commit(temporary: pathlib.Path, target: pathlib.Path) -> None:
    """Into its place, with the contents on the disk first: a crash shows the old state or the new
    one.
    """
    if storage.is_remote(target):
        leases.check(target.parent)
        with storage.reached(target):
            storage.upload(temporary, target)
        return
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
