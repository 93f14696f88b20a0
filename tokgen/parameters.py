"""A module as plain trees: its structure, parameters and statistics, and paths of their leaves."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from tokgen.interfaces import PyTree, Statistic


def split(module: nnx.Module) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """(structure, parameters, statistics); the last two as plain nested dictionaries."""
    graph, params, stats = nnx.split(module, nnx.Param, Statistic)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def merge(graph: nnx.GraphDef, params: PyTree, stats: PyTree) -> nnx.Module:
    """The module again. A copy: inside `grad` it must not share variables with the outer trace."""
    return nnx.merge(graph, params, stats, copy=True)


def statistics(module: nnx.Module) -> PyTree:
    """The statistics that a merged module holds now."""
    return split(module)[2]


def paths(tree: PyTree) -> dict[str, PyTree]:
    """Leaves by path, as `params/encoder/conv_in/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(entry(key) for key in path): leaf for path, leaf in leaves}


def entry(key) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown path entry {key!r}")


def matching(tree: PyTree, pattern: str) -> PyTree:
    """Which leaves have a path that the pattern matches whole."""
    compiled = re.compile(pattern)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: compiled.fullmatch("/".join(map(entry, path))) is not None, tree
    )


@dataclasses.dataclass(frozen=True)
class Mark:
    """In the place of an array that is not there yet: which one, or which of its first axis.

    What only moves arrays and takes rows of them, as `unstacked` does, may be called on a module of
    marks; they say afterwards what has to go where, and in which form.
    """

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()
    on_cpu: bool = False  # whether it will lie there, and whole
    form: Callable[[np.ndarray], np.ndarray] | None = None  # the last that is done to it

    def __getitem__(self, row: int | types.EllipsisType) -> Mark:
        if row is Ellipsis:  # the value of a variable, as nnx writes it
            return self
        return dataclasses.replace(self, shape=self.shape[1:], rows=(*self.rows, row))

    def formed(
        self,
        form: Callable[[np.ndarray], np.ndarray],
        shape: tuple[int, ...],
        dtype: jax.typing.DTypeLike,
    ) -> Mark:
        """What `form` makes of it."""
        return dataclasses.replace(self, form=form, shape=shape, dtype=np.dtype(dtype))

    def of(self, array: np.ndarray, layer: bool = False) -> np.ndarray:
        """What is marked, of the array that is at `path`; or of its right layer alone."""
        array = array[self.rows[layer:]]
        return np.asarray(array if self.form is None else self.form(array), self.dtype, order="C")


def marked(module: nnx.Module, *, on_cpu: bool = False) -> nnx.Module:
    """A module of shapes as one of marks; paths begin with params/ or stats/."""
    graph, params, stats = split(module)

    def mark(name):
        def of(path, leaf):
            where = f"{name}/{'/'.join(map(entry, path))}"
            return Mark(where, leaf.dtype, tuple(leaf.shape), on_cpu=on_cpu)

        return of

    return merge(
        graph,
        jax.tree_util.tree_map_with_path(mark("params"), params),
        jax.tree_util.tree_map_with_path(mark("stats"), stats),
    )


def narrowed(module: nnx.Module) -> nnx.Module:
    """A module of marks whose parameters have the dtype in which they are used.

    Modules whose parameters are cast before anything is done with them name these in `CAST`.
    """
    dtypes = {
        "/".join(map(str, (*path, leaf))): part.precision.compute_dtype
        for path, part in nnx.iter_modules(module)
        for leaf in getattr(part, "CAST", ())
    }
    graph, params, stats = split(module)

    def narrow(path: Any, mark: Mark) -> Mark:
        dtype = dtypes.get("/".join(map(entry, path)), mark.dtype)
        smaller = np.dtype(dtype).itemsize < np.dtype(mark.dtype).itemsize
        return dataclasses.replace(mark, dtype=dtype) if smaller else mark

    return merge(graph, jax.tree_util.tree_map_with_path(narrow, params), stats)


def count(params: PyTree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
