"""The step-indexed stream: batch t is a function of (seed, t), so its whole state is the step.

The global order is an endless sequence: a permutation of the source for epoch 0, another one for
epoch 1, and so on; grain computes it, nothing stores it. Element k has a random generator of its
own, from (seed, k), for its crop and flip. Batch t is elements t * B to (t + 1) * B, and a process
loads the rows that its devices hold (`sharding.rows_here`), whichever these are. So n processes see
the same global batches as one, row by row, and a run may be resumed on another number of them. Each
notes the unreadable of its own rows, and `Batches.agree` makes one record of all.

Nothing is ever filtered, for that would shift what follows. An element that cannot be read is
replaced by the next one of the same permutation that can be. One pass in order, `once`, is for
measuring: it leaves out what cannot be read. Either way it is counted and told by `reader`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokgen import distributed, interfaces
from tokgen.data import pixels, sources, unreadable, views
from tokgen.errors import SharedError

if TYPE_CHECKING:
    import grain

_PATIENCE = 16  # neighbours tried for one broken element; so many in a row are no accident
THREADS = min(4, os.cpu_count() or 1)
# Streams of random numbers from one seed: grain takes the first for itself.
_VIEW_STREAM = 1
# Of a row of a batch: the indices that follow it in its permutation
_Neighbours = Callable[[int], Iterator[int]]


class Batches:
    """An iterator over batches; close it, or use `with`.

    `seen` counts the elements that were handed out, by all processes of a job together, `step` is
    the number of the next batch, and `unreadable` the record of the distinct images of the source
    that could not be read, `bad` their number. Of the distinct images seen, or of 10,000 where
    these are more, a share of `max_bad` may be so: one more is a UserError that names some.
    """

    def __init__(
        self,
        loaded: Iterable[tuple[dict, Sequence]],
        source: sources.RandomAccess,
        *,
        step: int,
        max_bad: float,
        fate: str,
        last: bool = True,
        size: int | None = None,
    ):
        """`size`: of a batch of all processes, where a batch here may hold some of its rows."""
        self._size, self._told = size, 0
        self._loaded = iter(loaded)
        self._length = len(source)
        self._max_bad = max_bad
        self._fate, self._last = fate, last
        self.unreadable = source.unreadable
        self.step = step
        self.seen = 0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        # Counted here and not where it is loaded: threads run ahead, and the counts would too.
        try:
            batch, broken = next(self._loaded)
        except StopIteration:
            self.unreadable.tell(self._fate, last=self._last)
            raise
        self.step += 1
        self.seen += len(batch["label"]) if self._size is None else self._size
        for index, reason in broken:
            self.unreadable.add(index, reason)
        self.unreadable.looked = max(self.unreadable.looked, min(self.seen, self._length))
        if not distributed.many():
            self.agree()
        return batch

    def agree(self) -> int:
        """How many distinct images no process of the job could read so far.

        All of them ask at the same step. They wait for each other here, so not at every step: one
        alone is asked at each.

        Raises:
            UserError: more than may be; on all processes.
        """
        if distributed.many():
            own = self.unreadable.listing()[self._told :]
            for text in distributed.gathered("images that cannot be read", json.dumps(own)):
                for index, reason in json.loads(text):
                    self.unreadable.add(index, reason)
            self._told = len(self.unreadable)
        try:
            self.unreadable.check(self._max_bad)
        except interfaces.UserError as error:
            raise SharedError(str(error)) from error
        self.unreadable.tell(self._fate, last=False)
        return self.bad

    @property
    def bad(self) -> int:
        """How many distinct images of the source could not be read so far."""
        return len(self.unreadable)

    @property
    def broken(self) -> tuple[str, ...]:
        """Their names."""
        return self.unreadable.names()

    def close(self) -> None:
        """Stop the threads. Batches that were loaded ahead are dropped."""
        self.unreadable.tell(self._fate)
        close = getattr(self._loaded, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def batches(
    source: sources.RandomAccess,
    view: views.View | None = None,
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
    rows: np.ndarray | None = None,
    threads: int = THREADS,
    prefetch: int = 4,
    max_bad: float = 1e-3,
) -> Batches:
    """Endless shuffled batches from step `start` on.

    {"image": uint8 [b, rows, columns, channels], "label": int32 [b]} of an image source seen
    through `view`, or through its own; {"tokens": [b, L, G], "label": int32 [b]} of token
    shards, one of the stored views per element, in the source's type of integer. {"text": float32
    [b, T, E]} where a source has text, and {"mask": bool [b, T]} where that has a mask.

    Args:
      batch_size: B, of all processes together.
      rows: the b of them that this process loads, as `sharding.rows_here` has them; None: all.
      threads: batches loaded at the same time; 0 loads them when they are asked for.
      prefetch: batches kept ready, at least `threads`.
      max_bad: the share of images that may be unreadable; of token shards, when made. Of several
        processes, all that they met; whoever reads then calls `Batches.agree` now and then.
    """
    if batch_size < 1:
        raise interfaces.UserError(f"batch_size must be at least 1; found {batch_size}")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if start < 0 or not 0 <= seed < 2**32:
        raise interfaces.UserError(
            f"a step is at least 0 and a seed at least 0 and below 2**32; found start={start}, "
            f"seed={seed}"
        )
    if not 0.0 <= max_bad <= 1.0:
        raise interfaces.UserError(f"max_bad is a rate between 0 and 1; found {max_bad}")
    order = _order(len(source), seed)
    load = _loader(source, view)

    def local(step: int, index_B: np.ndarray) -> tuple[dict, list]:
        elements = step * batch_size + rows
        rngs = [_rng(seed, element) for element in elements]
        return load(index_B[rows], rngs, _epoch_neighbours(order, elements, source))

    import grain  # it brings all of Orbax, and drawing reads no images

    loaded = (
        order.batch(batch_size)
        .map_with_index(local)[start:]
        .to_iter_dataset(
            # grain objects to fewer buffers than threads.
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
        )
    )
    return Batches(
        loaded,
        source,
        step=start,
        max_bad=1.0 if source.holds == "tokens" else max_bad,
        fate=unreadable.REPLACED,
        size=batch_size,
    )


def once(
    source: sources.RandomAccess,
    view: views.View | None = None,
    *,
    batch_size: int,
    indices: Sequence[int] | None = None,
    least: int = 1,
    threads: int = 0,
    last: bool = True,
) -> Batches:
    """One pass in order, over all elements or `indices`, of those that can be read.

    For measuring: nothing is random, so views and token views are the first of what they might be.
    What cannot be read is left out and told; batches are full but for the last. `"index"`, int64
    [B], says which elements of the source they hold. Fewer than `least` are a UserError. `threads`
    load the next batch while the last one is used; 0 loads it when it is asked for. Before the
    `last` of several passes, of what cannot be read only the first few are told.
    """
    if batch_size < 1:
        raise interfaces.UserError(f"batch_size must be at least 1; found {batch_size}")
    if view is not None and (view.crop == "random" or view.flip):
        raise interfaces.UserError(
            f"one pass in order has nothing random; found {view}: use crop='center' or 'flip', and "
            "flip=False"
        )
    index_N = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    load, record = _loader(source, view), source.unreadable

    def passing():
        held = None
        parts = (index_N[f : f + batch_size] for f in range(0, len(index_N), batch_size))
        for batch, broken in _ahead(
            lambda part: load(part, [None] * len(part), None), parts, threads
        ):
            for index, reason in broken:
                record.add(index, reason)
            if not broken and not held:
                yield batch, ()
            elif batch:
                held = batch if not held else {k: np.concatenate([held[k], batch[k]]) for k in held}
                if len(held["label"]) >= batch_size:
                    yield {k: array[:batch_size] for k, array in held.items()}, ()
                    held = {k: array[batch_size:] for k, array in held.items()}
                    held = held if len(held["label"]) else None
        if held:
            yield held, ()

    found = _enough(passing(), record, min(least, len(index_N)))
    return Batches(found, source, step=0, max_bad=1.0, fate=unreadable.LEFT_OUT, last=last)


def _ahead(load: Callable, parts: Iterable[np.ndarray], threads: int):
    """What is loaded of each part, in order: by threads, a part ahead, each a piece of it."""
    if not threads:
        yield from map(load, parts)
        return
    pool, waiting = concurrent.futures.ThreadPoolExecutor(threads), collections.deque()
    try:
        for part in parts:
            pieces = np.array_split(part, min(threads, len(part)))
            waiting.append([pool.submit(load, piece) for piece in pieces])
            if len(waiting) > 1:
                yield _joined([piece.result() for piece in waiting.popleft()])
        for pieces in waiting:
            yield _joined([piece.result() for piece in pieces])
    finally:
        pool.shutdown(cancel_futures=True)


def _joined(pieces: list[tuple[dict, list]]) -> tuple[dict, list]:
    """One batch of its pieces, of which some may be empty."""
    full = [batch for batch, _ in pieces if batch]
    names = full[0] if full else ()
    batch = {name: np.concatenate([piece[name] for piece in full]) for name in names}
    return batch, [failure for _, broken in pieces for failure in broken]


def _enough(
    passing: Iterable[tuple[dict, Sequence]], record: unreadable.Record, least: int
) -> Iterator[tuple[dict, Sequence]]:
    """What passes; an error at its end where it was too little."""
    count = 0
    for batch, broken in passing:
        count += len(batch["label"])
        yield batch, broken
    if count < least:
        raise interfaces.UserError(
            f"{count} images can be read, of {least} at least that are needed; is this a set of "
            f"images?\n{record.listed()}"
        )


def _order(length: int, seed: int) -> grain.MapDataset:
    """The endless global order: element k is an index of the source."""
    if length < 1:
        raise interfaces.UserError("the source is empty: there is nothing to read")
    import grain

    # not without end: grain rounds the number of batches in floats, beyond its own largest length
    return grain.MapDataset.range(length).seed(seed).shuffle().repeat(1 + 2**50 // length)


def _rng(seed: int, element: int) -> np.random.Generator:
    # The element is the highest word of the counter: 2**192 numbers lie before the next one.
    counter = np.array([0, 0, 0, element], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=[seed, _VIEW_STREAM]))


def _epoch_neighbours(
    order: grain.MapDataset, elements: np.ndarray, source: sources.RandomAccess
) -> _Neighbours:
    """row -> the indices that follow it in its own permutation, round its end."""
    length = len(source)

    def neighbours(row: int) -> Iterator[int]:
        epoch, place = divmod(int(elements[row]), length)
        return (order[epoch * length + (place + n) % length] for n in range(1, length))

    return neighbours


def _loader(source: sources.RandomAccess, view: views.View | None) -> Callable:
    """(indices, rngs, neighbours) -> (batch, [(index, reason) of the broken]), for this source.

    Without neighbours the broken are left out, and a batch of nothing is empty.
    """
    view = source.view if view is None else view
    if view is not None:
        return lambda *which: _load_images(source, view, *which)
    if source.layout is None:
        raise interfaces.UserError("a source of images needs a view: its size, channels and crop")
    return lambda *which: _load_tokens(source, *which)


def _load_tokens(
    source: sources.RandomAccess,
    index_B: np.ndarray,
    rngs: Sequence[np.random.Generator | None],
    neighbours: _Neighbours | None,
) -> tuple[dict, list]:
    missing, places, broken = source.missing, [], []
    for row, index in enumerate(index_B):
        if int(index) in missing:
            broken.append((int(index), missing[int(index)][1]))
            if neighbours is None:
                continue
            index = _readable_tokens(source, missing, int(index), neighbours, row)
        places.append((int(index), rngs[row]))
    if not places:
        return {}, broken
    count = max(1, len(source.views))
    view_B = [0 if rng is None else int(rng.integers(count)) for _, rng in places]
    records = source.one_view([index for index, _ in places], view_B)
    tokens_BLG = np.stack([record["tokens"] for record in records])
    return {"tokens": tokens_BLG, **_told(records, places, neighbours)}, broken


def _readable_tokens(
    source: sources.RandomAccess,
    missing: Mapping[int, tuple[str, str]],
    index: int,
    neighbours: _Neighbours,
    row: int,
) -> int:
    """The next index in the order whose image could be read when the tokens were made."""
    for neighbour in itertools.islice(neighbours(row), _PATIENCE):
        if int(neighbour) not in missing:
            return int(neighbour)
    raise _hopeless(source, [(index, missing[index][1])], _PATIENCE + 1)


def _load_images(
    source: sources.RandomAccess,
    view: views.View,
    index_B: np.ndarray,
    rngs: Sequence[np.random.Generator | None],
    neighbours: _Neighbours | None,
) -> tuple[dict, list]:
    # A source that draws its images draws many at the price of few.
    drawn = source.__getitems__(index_B) if source.holds == "pixels" else None
    places, records, seen, broken = [], [], [], []
    for row, (index, rng) in enumerate(zip(index_B, rngs, strict=True)):
        record = drawn[row] if drawn else {"image": b""}
        if isinstance(record["image"], bytes):
            record, failures = _readable(source, view, int(index), neighbours, row)
            broken += failures
        if record is None:
            continue
        seen.append(view(_checked(record["image"], view), rng))
        # kept without its pixels: those of a photograph are many times those of its view
        records.append({name: value for name, value in record.items() if name != "image"})
        places.append((int(index), rng))
    if not places:
        return {}, broken
    return {"image": np.stack(seen), **_told(records, places, neighbours)}, broken


def _readable(
    source: sources.RandomAccess,
    view: views.View,
    index: int,
    neighbours: _Neighbours | None,
    row: int,
) -> tuple[dict | None, list]:
    """(record at `index`, or the next one in the order that can be read; what could not be).

    Its image decoded. None where it cannot be read and there are no neighbours.
    """
    failures = []
    following = itertools.islice(neighbours(row), _PATIENCE) if neighbours else ()
    for place in itertools.chain((index,), following):
        try:
            record = sources.record(source, int(place))
            return sources.pictured(record, view.channels, view.decoder), failures
        except pixels.BrokenImage as error:
            failures.append((int(place), str(error)))
    if neighbours:
        raise _hopeless(source, failures, len(failures))
    return None, failures


def _hopeless(source: sources.RandomAccess, failures: list, count: int) -> interfaces.UserError:
    named = "\n".join(
        f"  {unreadable.name_of(source, index)}: {reason}"
        for index, reason in failures[: unreadable.NAMED]
    )
    return interfaces.UserError(
        f"none of {count} images in a row can be read; is this a set of images?\n{named}"
    )


def _checked(image: views.Picture, view: views.View) -> views.Picture:
    channels = image.shape[2] if isinstance(image, np.ndarray) else view.channels
    if channels != view.channels:
        raise interfaces.UserError(
            f"the source draws {channels} channels and the view has {view.channels}; set both to "
            "the same"
        )
    return image


def _told(
    records: list[dict], places: list, neighbours: _Neighbours | None
) -> dict[str, np.ndarray]:
    """Labels; text and its mask, where the records have them; in one pass, which these are."""
    told = {"label": np.array([record["label"] for record in records], np.int32)}
    for name in ("text", "mask"):
        if name in records[0]:
            told[name] = np.stack([record[name] for record in records])
    if neighbours is None:
        told["index"] = np.array([index for index, _ in places], np.int64)
    return told
