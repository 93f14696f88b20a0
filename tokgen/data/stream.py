"""The step-indexed stream: batch t is a function of (seed, t), so its whole state is the step.

The global order is an endless sequence: a permutation of the source for epoch 0, another one for
epoch 1, and so on; grain computes it, nothing stores it. Element k has a random generator of its
own, from (seed, k), for its crop and flip. Batch t is elements t * B to (t + 1) * B, and process p
of n loads the p-th contiguous n-th of it: the rows that its devices hold when the global array is
assembled process by process. So n processes see the same global batches as one, row by row, and a
run may be resumed on another number of them.

Nothing is ever filtered, for that would shift what follows. An element that cannot be decoded is
replaced by the next one of the same permutation that can be, and counted; see `Batches`.
"""

import os
from collections.abc import Callable, Sequence

import grain
import numpy as np

from tokgen import interfaces
from tokgen.data import images

_PATIENCE = 16  # neighbours tried for one broken element; so many in a row are no accident
_ENOUGH = 10_000  # elements over which the allowed rate is judged at least
_NAMED = 5  # broken files that an error names
# Streams of random numbers from one seed: grain takes the first for itself.
_VIEW_STREAM = 1


class Batches:
    """An iterator over batches, which counts what it had to replace.

    `seen` and `bad` count the elements that were handed out and those of them that stand in for
    a broken one. More broken ones than `max_bad` of all seen (or of the first 10,000) are a
    UserError that names some. `step` is the number of the next batch. Close it, or use `with`.
    """

    def __init__(self, loaded, source, *, step: int, max_bad: float):
        self._loaded = iter(loaded)
        self._source = source
        self._max_bad = max_bad
        self._broken: dict[int, str] = {}  # index to reason, the first few
        self.step = step
        self.seen = 0
        self.bad = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        # Counted here and not where it is loaded: threads run ahead, and the counts would too.
        batch, broken = next(self._loaded)
        self.step += 1
        self.seen += len(batch["label"])
        self.bad += len(broken)
        for index, reason in broken:
            if len(self._broken) < _NAMED:
                self._broken.setdefault(index, reason)
        if self.bad > self._max_bad * max(self.seen, _ENOUGH):
            raise interfaces.UserError(
                f"{self.bad} of {self.seen} elements cannot be decoded, and max_bad="
                f"{self._max_bad:g} allows fewer; repair or remove them, among others\n"
                + _list(self._source, self._broken.items())
            )
        return batch

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the first few broken elements that were replaced."""
        return tuple(_name(self._source, index) for index in self._broken)

    def close(self) -> None:
        """Stop the threads. Batches that were loaded ahead are dropped."""
        close = getattr(self._loaded, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def batches(
    source,
    view: images.View | None = None,
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
    process: tuple[int, int] = (0, 1),
    threads: int = min(4, os.cpu_count() or 1),
    prefetch: int = 4,
    max_bad: float = 1e-3,
) -> Batches:
    """Endless shuffled batches from step `start` on.

    {"image": uint8 [B/n, rows, columns, channels], "label": int32 [B/n]} of an image source seen
    through `view`, or through its own; {"tokens": int32 [B/n, L, G], "label": int32 [B/n]} of
    token shards, one of the stored views per element. {"text": float32 [B/n, T, E]} where a source
    has text, and {"mask": bool [B/n, T]} where that has a mask.

    Args:
      batch_size: B, of all processes together.
      process: (p, n), which of how many.
      threads: batches loaded at the same time; 0 loads them when they are asked for.
      prefetch: batches kept ready, at least `threads`.
    """
    part, parts = process
    if batch_size < 1 or parts < 1 or batch_size % parts or not 0 <= part < parts:
        raise interfaces.UserError(
            f"batch_size must be a positive multiple of the number of processes: "
            f"batch_size={batch_size}, process={part} of {parts}"
        )
    if start < 0 or not 0 <= seed < 2**32:
        raise interfaces.UserError(
            f"a step is at least 0 and a seed at least 0 and below 2**32; found start={start}, "
            f"seed={seed}"
        )
    if not 0.0 <= max_bad <= 1.0:
        raise interfaces.UserError(f"max_bad is a rate between 0 and 1; found {max_bad}")
    order = _order(len(source), seed)
    load = _loader(source, view)
    own = batch_size // parts

    def local(step: int, index_B: np.ndarray) -> tuple[dict, list]:
        first = part * own
        elements = step * batch_size + first + np.arange(own)
        rngs = [_rng(seed, element) for element in elements]
        return load(index_B[first : first + own], rngs, _epoch_neighbours(order, elements, source))

    loaded = (
        order.batch(batch_size)
        .map_with_index(local)[start:]
        .to_iter_dataset(
            # grain objects to fewer buffers than threads.
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
        )
    )
    return Batches(loaded, source, step=start, max_bad=max_bad)


def once(
    source,
    view: images.View | None = None,
    *,
    batch_size: int,
    indices: Sequence[int] | None = None,
    max_bad: float = 1e-3,
) -> Batches:
    """One pass in order, of all elements or of `indices`; the last batch may be shorter.

    For evaluation: nothing is random, so views and token views are the first of what they might
    be. A broken image is replaced by the next of the pass and counted, so that counts agree.
    """
    if batch_size < 1:
        raise interfaces.UserError(f"batch_size must be at least 1; found {batch_size}")
    if view is not None and (view.crop == "random" or view.flip):
        raise interfaces.UserError(
            f"one pass in order has nothing random; found {view}: use crop='center' or 'flip', and "
            "flip=False"
        )
    index_N = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    load = _loader(source, view)

    def passing():
        for first in range(0, len(index_N), batch_size):
            part = index_N[first : first + batch_size]

            def neighbours(row: int, first=first):
                return (index_N[(first + row + n) % len(index_N)] for n in range(1, len(index_N)))

            yield load(part, [None] * len(part), neighbours)

    return Batches(passing(), source, step=0, max_bad=max_bad)


def _order(length: int, seed: int) -> grain.MapDataset:
    """The endless global order: element k is an index of the source."""
    if length < 1:
        raise interfaces.UserError("the source is empty: there is nothing to read")
    # not without end: grain rounds the number of batches in floats, beyond its own largest length
    return grain.MapDataset.range(length).seed(seed).shuffle().repeat(1 + 2**50 // length)


def _rng(seed: int, element: int) -> np.random.Generator:
    # The element is the highest word of the counter: 2**192 numbers lie before the next one.
    counter = np.array([0, 0, 0, element], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=[seed, _VIEW_STREAM]))


def _epoch_neighbours(order, elements: np.ndarray, source) -> Callable:
    """row -> the indices that follow it in its own permutation, round its end."""
    length = len(source)

    def neighbours(row: int):
        epoch, place = divmod(int(elements[row]), length)
        return (order[epoch * length + (place + n) % length] for n in range(1, length))

    return neighbours


def _loader(source, view: images.View | None) -> Callable:
    """(indices, rngs, neighbours) -> (batch, [(index, reason) of the broken]), for this source."""
    view = getattr(source, "view", None) if view is None else view
    if view is not None:
        return lambda *which: _load_images(source, view, *which)
    if not hasattr(source, "layout"):
        raise interfaces.UserError("a source of images needs a view: its size, channels and crop")
    return lambda *which: _load_tokens(source, *which)


def _load_tokens(source, index_B, rngs, neighbours) -> tuple[dict, list]:
    records = source.__getitems__(index_B)
    view_B = [
        0 if rng is None else int(rng.integers(len(record["tokens"])))
        for record, rng in zip(records, rngs, strict=True)
    ]
    tokens_BLG = np.stack(
        [record["tokens"][view] for record, view in zip(records, view_B, strict=True)]
    )
    return {"tokens": tokens_BLG, "label": _labels(records), **_texts(records)}, []


def _load_images(source, view, index_B, rngs, neighbours) -> tuple[dict, list]:
    image_BHWC = np.empty((len(index_B), *view.size, view.channels), np.uint8)
    # A source that draws its images draws many at the price of few.
    drawn = source.__getitems__(index_B) if hasattr(source, "__getitems__") else None
    records, broken = [], []
    for row, (index, rng) in enumerate(zip(index_B, rngs, strict=True)):
        record = drawn[row] if drawn else {"image": b""}
        if isinstance(record["image"], bytes):
            record = _readable(source, view, index, neighbours, row, broken)
        image_BHWC[row] = view(_checked(record["image"], view), rng)
        records.append(record)
    return {"image": image_BHWC, "label": _labels(records), **_texts(records)}, broken


def _readable(source, view, index, neighbours, row: int, broken: list) -> dict:
    """The record at `index`, or the next one in the order that decodes; its image as pixels."""
    failures = []
    record = _attempt(source, view, int(index), failures)
    if record is not None:
        return record
    for n, neighbour in enumerate(neighbours(row), 1):
        if n > _PATIENCE:
            break
        record = _attempt(source, view, int(neighbour), failures)
        if record is not None:
            broken.append(failures[0])
            return record
    raise interfaces.UserError(
        f"none of {len(failures)} elements in a row can be decoded; is this a set of images?\n"
        + _list(source, failures[:_NAMED])
    )


def _attempt(source, view, index: int, failures: list) -> dict | None:
    try:
        record = source[index]
        if isinstance(record["image"], bytes):
            record = {
                **record,
                "image": images.decode(record["image"], view.channels, decoder=view.decoder),
            }
        return record
    except (images.BrokenImage, OSError) as error:
        failures.append((index, str(error)))
        return None


def _checked(image_HWC: np.ndarray, view: images.View) -> np.ndarray:
    if image_HWC.shape[2] != view.channels:
        raise interfaces.UserError(
            f"the source draws {image_HWC.shape[2]} channels and the view has {view.channels}; "
            "set both to the same"
        )
    return image_HWC


def _labels(records: list[dict]) -> np.ndarray:
    return np.array([record["label"] for record in records], np.int32)


def _texts(records: list[dict]) -> dict[str, np.ndarray]:
    """Text and its mask, where the records have them."""
    found = [name for name in ("text", "mask") if name in records[0]]
    return {name: np.stack([record[name] for record in records]) for name in found}


def _name(source, index: int) -> str:
    return source.name(index) if hasattr(source, "name") else f"element {index}"


def _list(source, failures) -> str:
    return "\n".join(f"  {_name(source, index)}: {reason}" for index, reason in failures)
