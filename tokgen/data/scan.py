"""Which images of a source cannot be read: looked at before step 1, and in full by `tokgen data`.

Before training: the header of every file, all held-out images that will be measured, decoded, and
of the training images an evenly spaced sample, decoded for a minute at most. The rest is counted as
it comes. What was found is kept in the user's cache by the source's fingerprint, and by when a file
last changed: the next run begins at once. A scan is made once per job: by its first process.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from tokgen import records, report, runtime
from tokgen.data import pixels, sources, unreadable
from tokgen.interfaces import UserError

FORMAT = 1
SECONDS = 60.0  # for the sample of the training images
KEPT = 1000  # scans whose results are kept, the latest
SHOWN = 2000  # images from which on a scan shows its progress
_CHUNK, _WAITING = 64, 16  # images that a thread looks at together; threads that wait for headers


@dataclasses.dataclass
class Found:
    """What a scan saw.

    Attributes:
        count: images that were looked at; decoded: those of them that were decoded.
        forms: {"JPEG": how many}; sizes: {(rows, columns): how many}, by the headers.
        sha256: of all files, where each was read in full.
    """

    count: int = 0
    decoded: int = 0
    forms: dict[str, int] = dataclasses.field(default_factory=dict)
    sizes: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    sha256: str = ""


def pictures(source: sources.RandomAccess) -> sources.RandomAccess | None:
    """The source of image files inside a source; None where it holds pixels or tokens."""
    source = sources.innermost(source)
    return source if source.holds in ("files", "bytes") else None


def before(
    source: sources.RandomAccess,
    held_out: sources.RandomAccess,
    measured: np.ndarray,
    *,
    channels: int,
    max_bad: float,
) -> None:
    """The scan before step 1: what cannot be read is told, or is an error where it is too much.

    `measured` are the held-out images that figures will be of.
    """
    seen = pictures(held_out)
    if seen is not None and len(measured):
        readable(held_out, measured, channels)
    _tokens_told(source, unreadable.REPLACED)
    _tokens_told(held_out, unreadable.LEFT_OUT)
    if len(measured) and set(measured.tolist()) <= held_out.missing.keys():
        raise UserError(
            f"none of the {len(measured)} held-out images that are to be measured has tokens; "
            "repair them and run `tokgen pretokenize` again, into an empty folder:\n"
            f"{held_out.unreadable.listed()}"
        )
    taught = pictures(source)
    if taught is None:
        return
    found = _kept(taught, f"start {channels}", lambda: _start(taught, channels))
    record = taught.unreadable
    record.looked = max(found.count, found.decoded)
    record.check(max_bad)
    record.tell(unreadable.REPLACED)
    report.say(
        f"scanned {len(taught)} training images: {found.count} headers, {found.decoded} decoded"
        f"{f'; and {len(measured)} held-out ones, decoded' if seen is not None else ''}"
    )


def _start(source: sources.RandomAccess, channels: int) -> Found:
    found = headers(source)
    found.decoded = decode(source, evenly(len(source)), channels, seconds=SECONDS)
    return found


def _tokens_told(source: sources.RandomAccess, fate: str) -> None:
    """Say which images of token shards have no tokens."""
    if source.missing:
        record = source.unreadable
        for index, (_, reason) in source.missing.items():
            record.add(index, reason)
        record.tell(fate)


def readable(source: sources.RandomAccess, index_N: np.ndarray, channels: int = 3) -> np.ndarray:
    """Those of some indices whose images can be read: all are decoded, and the others told.

    None at all is an error: nothing could be measured.
    """
    inner = pictures(source)
    if inner is None:
        return index_N
    which = hashlib.sha256(np.sort(index_N).astype("<i8").tobytes()).hexdigest()

    def look() -> Found:
        return Found(len(index_N), decode(inner, index_N, channels))

    _kept(inner, f"some {channels} {which}", look)
    record = inner.unreadable
    record.tell(unreadable.LEFT_OUT)
    found = index_N[[int(index) not in record for index in index_N]]
    if len(index_N) and not len(found):
        raise UserError(
            f"none of the {len(index_N)} images that are to be measured can be read; repair them, "
            f"or give others:\n{record.listed()}"
        )
    return found


def full(source: sources.RandomAccess, channels: int = 3) -> Found:
    """Every image in full: its header, its pixels, and a hash of all bytes."""

    def look() -> Found:
        seen, digests = {}, {}

        def one(index: int) -> None:
            digests[index] = b"unreadable"
            record = sources.record(source, index)
            digests[index] = hashlib.sha256(record["image"]).digest()
            seen[index] = pixels.header(record["image"])
            sources.decoded(record, channels)

        decoded = _each(source, range(len(source)), one, what="scan")
        found = _found(len(source), decoded, seen)
        names = (unreadable.name_of(source, index) for index in range(len(source)))
        digest = hashlib.sha256()
        for index, name in enumerate(names):
            digest.update(os.fsencode(name) + b"\0" + digests[index] + b"\n")
        found.sha256 = digest.hexdigest()
        return found

    return _kept(source, f"full {channels}", look)


def headers(source: sources.RandomAccess) -> Found:
    """The header of every image; nothing is decoded.

    Nor looked at, where a source gives whole images only: that would read all of them.
    """
    if source.holds != "files":
        return Found()
    seen = {}

    def one(index: int) -> None:
        seen[index] = sources.header(source, index)

    # a header is little to decode and long to wait for, on a disk that is far away
    _each(source, range(len(source)), one, what="headers", threads=_WAITING)
    return _found(len(source), 0, seen)


def _found(count: int, decoded: int, seen: Mapping[int, tuple[str, tuple[int, int]]]) -> Found:
    forms = collections.Counter(form for form, _ in seen.values())
    sizes = collections.Counter(size for _, size in seen.values())
    return Found(count, decoded, dict(forms), dict(sizes))


def decode(
    source: sources.RandomAccess,
    indices: Iterable[int],
    channels: int,
    *,
    seconds: float = math.inf,
) -> int:
    """Decode images, as many as there is time for; how many were."""

    def one(index: int) -> None:
        sources.read(source, index, channels)

    return _each(source, indices, one, what="scan", seconds=seconds)


def evenly(length: int) -> np.ndarray:
    """All indices, each beginning of which is spread evenly: their bits in reverse order."""
    bits = max(1, (length - 1).bit_length())
    count_N = np.arange(2**bits)
    index_N = np.zeros_like(count_N)
    for bit in range(bits):
        index_N |= ((count_N >> bit) & 1) << (bits - 1 - bit)
    return index_N[index_N < length]


def _each(
    source: sources.RandomAccess,
    indices: Iterable[int],
    one: Callable,
    *,
    what: str,
    seconds: float = math.inf,
    threads: int = 0,
) -> int:
    """Call `one(index)` of many threads; notes of which images it raised BrokenImage."""
    record = source.unreadable
    index_N = np.asarray(indices, np.int64)
    ends, done = time.monotonic() + seconds, 0

    def some(part: np.ndarray) -> tuple[int, list]:
        broken, count = [], 0
        for index in part.tolist():
            if time.monotonic() > ends:
                break
            count += 1
            try:
                one(index)
            except pixels.BrokenImage as error:
                broken.append((index, error))
        return count, broken

    parts = [index_N[start : start + _CHUNK] for start in range(0, len(index_N), _CHUNK)]
    threads = threads or runtime.cores()
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    shown = len(index_N) >= SHOWN
    try:
        with report.bar(len(index_N), unit="image", what=what, shown=shown) as bar:
            for count, broken in pool.map(some, parts):
                done += count
                bar.update(count)
                for index, error in broken:
                    record.add(index, str(error))
                    record.unavailable += isinstance(error, sources.Unavailable)
    finally:
        pool.shutdown(cancel_futures=True)
    return done


def _kept(source: sources.RandomAccess, what: str, look: Callable[[], Found]) -> Found:
    """What `look` finds, or found before: with the images that could not be read then."""
    record, file = source.unreadable, _file(source, what)
    if file is not None and (kept := _read(file, source)) is not None:
        found, unreadable = kept
        for index, reason in unreadable:
            record.add(index, reason)
        return found
    before = record.unavailable
    found = look()
    # a disk that fails, or a permission that lacks, may be mended without a change to the file
    if file is not None and record.unavailable == before:
        _write(file, found, record)
    return found


def _file(source, what: str) -> pathlib.Path | None:
    """Where the result of a scan is kept; nowhere for a source that does not say what it is of."""
    if not source.fingerprint:
        return None
    key = json.dumps([FORMAT, source.fingerprint, source.changed, what])
    return (
        runtime.cache_folder() / "scans" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    )


def _read(file: pathlib.Path, source) -> tuple[Found, list] | None:
    """(what a scan found, the unreadable) of a file; None where it is not there, or damaged."""
    try:
        kept = records.load(file)
        sizes = {(int(r), int(c)): int(n) for r, c, n in kept["sizes"]}
        forms = {str(form): int(count) for form, count in kept["forms"].items()}
        found = Found(int(kept["count"]), int(kept["decoded"]), forms, sizes, str(kept["sha256"]))
        unreadable = [(int(index), str(reason)) for index, reason in kept["unreadable"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if any(not 0 <= index < len(source) for index, _ in unreadable):
        return None
    return found, unreadable


def _write(file: pathlib.Path, found: Found, record: unreadable.Record) -> None:
    content = {
        "count": found.count,
        "decoded": found.decoded,
        "forms": found.forms,
        "sizes": [[*size, count] for size, count in found.sizes.items()],
        "sha256": found.sha256,
        "unreadable": record.listing(),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        records.save(file, json.dumps(content))
        for old in sorted(file.parent.glob("*.json"), key=os.path.getmtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:  # the cache saves time, and nothing else
        report.say(f"what the scan found is not kept: {error}")
