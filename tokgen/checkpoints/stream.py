"""A step whose arrays arrive in pieces: what is written is forgotten, so memory holds a piece.

Orbax asks for arrays that are there. Here it is handed their shapes, and a handler of that type
writes the pieces as they come; a leaf of stacked layers is stored layer by layer. The record with
the checksums is known when the last piece is, so it waits for that. What lies on disk is read as
any other step is.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from tokgen.checkpoints import manifest

Piece = tuple[str, int | None, np.ndarray]  # path, layer of a stacked leaf, numbers


class Stream:
    """Leaves by path, of which shapes and dtypes are known, and the pieces that they are made of.

    `pieces` may raise: the step then fails with its error, and nothing of it is left.
    """

    def __init__(self, leaves: Mapping[str, jax.ShapeDtypeStruct], pieces: Iterable[Piece]):
        self.leaves, self.pieces = dict(leaves), pieces
        self.specs: dict[str, tuple[dict, Any]] = {}
        self.sums = manifest.Sums()
        self.error: BaseException | None = None
        self.begun, self.ended, self.stopped = (threading.Event() for _ in range(3))

    def tree(self, name: Callable[[str], str]) -> dict[str, _Leaf]:
        """What Orbax is to save, by the names that leaves have in the store."""
        return {name(path): _Leaf(self, path) for path in self.leaves}

    def manifest(self) -> dict[str, dict]:
        """Shape, dtype and checksum of every leaf, when all are written."""
        self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.sums.manifest(self.leaves)

    def stop(self) -> None:
        """Write no further piece: the step fails. Returns when the last one is written."""
        self.stopped.set()
        if self.begun.is_set():
            self.ended.wait()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """An error inside ends the stream: who waits for the record is told of it."""
        self.begun.set()
        try:
            yield
        except BaseException as error:
            self.error = self.error or error
            self.ended.set()
            raise

    async def add(self, path: str, spec: dict, context: Any) -> None:
        """Say where a leaf lies in the store; with the last of them, write all."""
        self.specs[path] = spec, context
        if len(self.specs) == len(self.leaves):
            await self._write()
            self.ended.set()

    async def _write(self) -> None:
        stores: dict[str, Any] = {}
        missing = {path: int(np.prod(leaf.shape)) for path, leaf in self.leaves.items()}
        for path, layer, numbers in self.pieces:
            if self.stopped.is_set():
                raise InterruptedError("stopped before its end")
            numbers = np.asarray(numbers, self.leaves[path].dtype, order="C")
            if path not in stores:
                stores[path] = await self._opened(path, layered=layer is not None)
            place = stores[path] if layer is None else stores[path][layer]
            if place.shape != numbers.shape:
                raise ValueError(f"{path} needs {place.shape}, got {numbers.shape}")
            self.sums.add(path, layer or 0, numbers)
            await place.write(numbers, can_reference_source_data_indefinitely=True)
            missing[path] -= numbers.size
        if wrong := [path for path, count in missing.items() if count]:
            raise ValueError(f"{', '.join(wrong[:5])} came in other pieces than they have")

    async def _opened(self, path: str, *, layered: bool) -> Any:
        spec, context = self.specs[path]
        shape = self.leaves[path].shape
        if layered:
            chunk = {"chunks": [1, *shape[1:]]}
            base = spec["base"] if "base" in spec else spec
            base["metadata"] = base["metadata"] | chunk
        return await tensorstore.open(
            tensorstore.Spec(spec), create=True, open=True, context=context
        )


class _Leaf:
    """One of a stream's, in the place of an array."""

    def __init__(self, stream: Stream, path: str):
        self.stream, self.path = stream, path
        self.shape, self.dtype = stream.leaves[path].shape, np.dtype(stream.leaves[path].dtype)
        self.size = int(np.prod(self.shape))
        self.nbytes = self.size * self.dtype.itemsize
        self.ndim = len(self.shape)


class _Handler(ocp.type_handlers.NumpyHandler):
    """Stores leaves as numpy arrays are stored."""

    async def _background_serialize(self, values: Sequence[_Leaf], *args: Any, **kwargs: Any):
        # Orbax waits for the record first, whatever became of the arrays
        with values[0].stream.failing():
            await super()._background_serialize(values, *args, **kwargs)

    async def _open_and_write(self, value: _Leaf, tspec: dict, ts_context: Any) -> None:
        await value.stream.add(value.path, tspec, ts_context)


class _StateHandler(ocp.PyTreeCheckpointHandler):
    """Saves trees of leaves of a stream, and nothing else."""

    def __init__(self):
        handler = _Handler(deepcopy_host_arrays=False)
        registry = ocp.type_handlers.create_type_handler_registry((_Leaf, handler))
        super().__init__(type_handler_registry=registry)


@ocp.args.register_with_handler(_StateHandler, for_save=True, for_restore=True)
class StateSave(ocp.args.PyTreeSave):
    """What `Stream.tree` gives, to be saved."""


class _RecordHandler(ocp.AsyncCheckpointHandler):
    """Writes a record as `JsonSave` does, when there is one."""

    async def async_save(self, directory: Any, args: RecordSave) -> list[_Later]:
        """What is to be waited for."""
        return [_Later(directory, args)]

    def save(self, directory: Any, args: RecordSave) -> None:
        """Wait for the record and write it."""
        _Later(directory, args).result()

    def restore(self, directory: Any, args: Any = None) -> Any:
        """Records are read by checkpoint.py."""
        raise NotImplementedError


class _Later:
    """A record that is asked for when everything else is under way."""

    def __init__(self, directory: Any, args: RecordSave):
        self.directory, self.args = directory, args

    def result(self, timeout: float | None = None) -> None:
        """Write it."""
        del timeout  # the stream ends, or fails
        (self.directory / "metadata").write_text(json.dumps(self.args.record()))


@ocp.args.register_with_handler(_RecordHandler, for_save=True, for_restore=True)
class RecordSave(ocp.args.CheckpointArgs):
    """A record to be saved, made by `record` once a stream has ended."""

    def __init__(self, record: Callable[[], dict]):
        self.record = record
