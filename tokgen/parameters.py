"""A module as plain trees: its structure, parameters and statistics, and paths of their leaves."""

from __future__ import annotations

import re

import jax
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


def count(params: PyTree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
