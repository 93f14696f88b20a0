"""Key tables: which array of a published file is which parameter of ours.

A table is a list of rows, made by walking our own module's structure. A row names one published
key, the parameters that it fills, and the rule between the two layouts, which works both ways: the
same table imports and exports. Whatever is left over or left unset is an error that lists it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from tokgen import archives, parameters
from tokgen.interfaces import UserError
from tokgen.pretrained.formats import stored

Shape = tuple[int, ...]
Weights = Mapping[str, np.ndarray | stored.Stored]
SHOWN = 40  # names in a message


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a published array becomes ours (given the shapes of ours) and back."""

    ours: Callable[[np.ndarray, Sequence[Shape]], Sequence[np.ndarray]]
    published: Callable[[Sequence[np.ndarray]], np.ndarray]


def one(
    ours: Callable[[np.ndarray, Shape], np.ndarray], published: Callable[[np.ndarray], np.ndarray]
) -> Rule:
    """A rule between one array and one parameter."""
    return Rule(lambda a, shapes: [ours(a, shapes[0])], lambda parts: published(parts[0]))


def _rows_first(kernel: np.ndarray) -> np.ndarray:
    """[D, *out] -> (out, D)."""
    return kernel.reshape(kernel.shape[0], -1).T


def _rows_last(kernel: np.ndarray) -> np.ndarray:
    """[*inputs, D] -> (D, inputs)."""
    return kernel.reshape(-1, kernel.shape[-1]).T


# PyTorch keeps weights as (out, in) and (out, in, height, width); ours are [in, out] and HWIO.
AS_IS = one(lambda a, shape: a, lambda a: a)
VECTOR = one(lambda a, shape: a.reshape(shape), np.ravel)  # a bias of several axes here
CONV = one(lambda a, shape: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
LINEAR = one(lambda a, shape: a.T.reshape(shape), _rows_first)
LINEAR_OUT = one(lambda a, shape: a.T.reshape(shape), _rows_last)  # of a kernel [N, K, D]
POINTWISE = one(
    lambda a, shape: a[:, :, 0, 0].T.reshape(shape), lambda a: _rows_first(a)[:, :, None, None]
)
POINTWISE_OUT = one(
    lambda a, shape: a[:, :, 0, 0].T.reshape(shape), lambda a: _rows_last(a)[:, :, None, None]
)


def reshaped(*published: int) -> Rule:
    """Numbers in the order of the file, in our shape; `published` is the shape in the file."""
    return one(lambda a, shape: a.reshape(shape), lambda a: a.reshape(published))


def thirds(rule: Rule) -> Rule:
    """A fused (3 W, ...) array over query, key and value, each by `rule`."""

    def ours(a, shapes):
        parts = np.split(a, 3) if len(a) % 3 == 0 else [a] * 3
        pairs = zip(parts, shapes, strict=True)
        return [rule.ours(part, [shape])[0] for part, shape in pairs]

    return Rule(ours, lambda parts: np.concatenate([rule.published([part]) for part in parts]))


def rows_apart(trailing: int = 1) -> Rule:
    """One published array over several of ours, each with as many of its rows as it has room for.

    A table of V symbols, a mask and K classes (V + 1 + K, D) fills [1, V + 1, D] and [K, D].
    `trailing` is the number of axes of a row: 1 in a table, 0 in a bias.
    """

    def ours(a, shapes):
        row = max(math.prod(a.shape[1:]), 1)
        counts = [math.prod(shape) // row for shape in shapes]
        if a.ndim != 1 + trailing or sum(counts) != len(a):
            raise ValueError(f"{len(a)} rows do not fill {counts}")
        parts = np.split(a, np.cumsum(counts)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def published(parts):
        return np.concatenate([p.reshape(-1, *p.shape[p.ndim - trailing :]) for p in parts])

    return Rule(ours, published)


def chunks(order: Sequence[int]) -> Rule:
    """A fused linear map (n * K, D) of equal chunks <-> our kernel [D, n, K].

    `order[i]` says which published chunk is our chunk i.
    """
    order, back = _both_ways(order)

    def ours(a, shape):
        return a.reshape(len(order), -1, a.shape[-1])[order].transpose(2, 0, 1).reshape(shape)

    def published(kernel):
        kernel = kernel.reshape(len(kernel), len(order), -1)
        return kernel[:, back].reshape(len(kernel), -1).T

    return one(ours, published)


def chunks_bias(order: Sequence[int]) -> Rule:
    """The bias (n * K,) of a fused linear map <-> ours [n, K]; `order` as in `chunks`."""
    order, back = _both_ways(order)
    return one(
        lambda a, shape: a.reshape(len(order), -1)[order].reshape(shape),
        lambda bias: bias.reshape(len(order), -1)[back].ravel(),
    )


def _both_ways(order: Sequence[int]) -> tuple[list[int], list[int]]:
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"an order of chunks must name each from 0 once; found {tuple(order)}")
    return list(order), np.argsort(order).tolist()


Place = str | tuple[str, int]  # a parameter's path; with a number, that layer of a stacked one


@dataclasses.dataclass(frozen=True)
class Row:
    """One published key."""

    key: str
    places: tuple[Place, ...]
    rule: Rule = AS_IS

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the parameters that it fills, or layers of."""
        return tuple(place if isinstance(place, str) else place[0] for place in self.places)


def row(key: str, place: Place, rule: Rule = AS_IS) -> Row:
    """A row with a single place."""
    return Row(key, (place,), rule)


def pair(key: str, path: str, kernel: Rule, *, bias: bool = True) -> list[Row]:
    """`key.weight` and `key.bias` of a convolution or a linear map."""
    rows = [row(f"{key}.weight", f"{path}/kernel", kernel)]
    return [*rows, row(f"{key}.bias", f"{path}/bias", VECTOR)] if bias else rows


def norm(key: str, path: str) -> list[Row]:
    """`key.weight` and `key.bias` of a norm."""
    return [row(f"{key}.weight", f"{path}/scale"), row(f"{key}.bias", f"{path}/bias")]


class Misfit(UserError):
    """Arrays that a table does not account for, or that do not fit; `problems` of them."""

    def __init__(self, message: str, problems: int):
        super().__init__(message)
        self.problems = problems


def _flat(module: nnx.Module) -> dict:
    _, params, stats = parameters.split(module)
    return {**parameters.paths(params), **parameters.paths(stats)}


def numbers(array: np.ndarray | stored.Stored) -> np.ndarray:
    """The numbers of an array, which may lie in a file still."""
    return array.read() if isinstance(array, stored.Stored) else np.asarray(array)


def _shapes(entry: Row, places: Mapping[str, Shape]) -> list[Shape]:
    """Of what a row fills."""
    return [
        tuple(places[place]) if isinstance(place, str) else tuple(places[place[0]][1:])
        for place in entry.places
    ]


def _fits(entry: Row, shape: Shape, shapes: Sequence[Shape]) -> bool:
    """Whether an array of `shape` becomes ours by the rule of a row, and ours become one again."""
    try:
        parts = entry.rule.ours(np.broadcast_to(np.int8(0), shape), shapes)
        # as many numbers in another order would be other weights
        blank = [np.broadcast_to(np.int8(0), part.shape) for part in parts]
        back = entry.rule.published(blank).shape
    except (ValueError, IndexError):
        return False
    return back == shape and [part.shape for part in parts] == list(shapes)


def _problems(
    places: Mapping[str, Shape], rows: Iterable[Row], weights: Weights
) -> tuple[set[str], list[str], int]:
    """(paths that are filled, everything that does not fit, how many arrays that is)."""
    filled: set[str] = set()
    layers: dict[str, set[int]] = {}
    missing, wrong, used = [], [], set()
    for entry in rows:
        if entry.key not in weights:
            missing.append(entry.key)
            continue
        used.add(entry.key)
        shape, shapes = tuple(weights[entry.key].shape), _shapes(entry, places)
        if not _fits(entry, shape, shapes):
            need = f"for {', '.join(entry.paths)} {', '.join(map(str, shapes))}"
            wrong.append(f"{entry.key} has the shape {shape}, which does not fit {need}")
            continue
        for place in entry.places:
            if isinstance(place, str):
                filled.add(place)
            else:
                layers.setdefault(place[0], set()).add(place[1])
    filled |= {path for path, there in layers.items() if there == set(range(places[path][0]))}
    left = sorted(set(weights) - used)
    problems = []
    for what, names in (("missing", missing), ("left over", left)):
        if names:
            shown = ", ".join(f"{name:.200}" for name in names[:SHOWN])
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            problems.append(f"{len(names)} {what}: {shown}{more}")
    more = [f"and {len(wrong) - SHOWN} more of another shape"] if len(wrong) > SHOWN else []
    return filled, [*problems, *wrong[:SHOWN], *more], len(missing) + len(left) + len(wrong)


def check(module: nnx.Module, rows: Iterable[Row], weights: Weights, *, source: str) -> None:
    """Misfit, with everything that does not fit, unless the arrays fill `module`; none is read.

    Statistics may lack a row. `source` names the file in errors.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in _flat(module).items()}
    filled, problems, count = _problems(shapes, rows, weights)
    unset = sorted(set(parameters.paths(parameters.split(module)[1])) - filled)
    if unset and not problems:
        problems.append(f"no key for {len(unset)} of our parameters: {', '.join(unset)}")
    if problems:
        problems.append("are --system and the sizes (--config) those of the file?")
        lines = [f"{source} does not fit this system and sizes:", *problems]
        raise Misfit("\n  ".join(lines), count)


def parts(
    entry: Row, array: np.ndarray, leaves: Mapping
) -> list[tuple[str, int | None, np.ndarray]]:
    """(our path, layer of a stacked one, numbers in its dtype) of all that one array fills.

    `leaves` are ours by path, their shapes and dtypes suffice.
    """
    shapes = _shapes(entry, {path: leaf.shape for path, leaf in leaves.items()})
    found = []
    for place, part in zip(entry.places, entry.rule.ours(array, shapes), strict=True):
        path, layer = (place, None) if isinstance(place, str) else place
        found.append((path, layer, part.astype(leaves[path].dtype, copy=False)))
    return found


def fill(module: nnx.Module, rows: Iterable[Row], weights: Weights, *, source: str) -> nnx.Module:
    """`module` (its shapes suffice) with the parameters of a published file, in float32.

    Statistics without a row start at zero, as in a new module. `source` names the file in errors.
    """
    rows = list(rows)
    check(module, rows, weights, source=source)
    graph, params, stats = parameters.split(module)
    leaves, wrong = _flat(module), []
    # ours: views of what was given would be shared between runs
    filled = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for entry in rows:
        array = numbers(weights[entry.key])
        if found := archives.not_finite(entry.key, array, source):
            wrong.append(found)
            continue
        for path, layer, part in parts(entry, array, leaves):
            filled[path][... if layer is None else layer] = part
    archives.refuse_numbers(wrong, source)

    def value(path, leaf):
        del leaf
        return jax.numpy.asarray(filled.pop("/".join(parameters.entry(key) for key in path)))

    params, stats = (jax.tree_util.tree_map_with_path(value, tree) for tree in (params, stats))
    return parameters.merge(graph, params, stats)


def publish(module: nnx.Module, rows: Iterable[Row]) -> dict[str, np.ndarray]:
    """The arrays of `module` under their published names and layouts: the inverse of `fill`."""
    arrays = {path: np.asarray(leaf) for path, leaf in _flat(module).items()}
    return {
        entry.key: np.ascontiguousarray(entry.rule.published(_parts(entry, arrays)))
        for entry in rows
    }


def _parts(entry: Row, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What a row's places hold."""
    return [
        arrays[place] if isinstance(place, str) else arrays[place[0]][place[1]]
        for place in entry.places
    ]


def gradients(
    rows: Iterable[Row], slopes: dict[str, np.ndarray], published: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Gradients of the published arrays, from `slopes`: those of our parameters, by path.

    `published` are the arrays of `publish`. Where one is copied into two of ours, the gradient is
    the sum; where some of it is unused, zero.
    """
    found = {}
    for entry in rows:
        if set(entry.paths) <= set(slopes):  # no statistic
            shape = published[entry.key].shape
            found[entry.key] = _transposed(entry.rule, _parts(entry, slopes), shape)
    return found


def _transposed(rule: Rule, slopes: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    """The transpose of a rule's `ours`, applied.

    An element of ours is one of the published array times a constant, plus another. Which one, and
    the constants, show in what becomes of zeros, of ones and of the numbers of the elements.
    """
    size = math.prod(shape)
    zeros, ones, numbers = (
        rule.ours(probe.reshape(shape), [slope.shape for slope in slopes])
        for probe in (np.zeros(size), np.ones(size), np.arange(size, dtype=float))
    )
    total = np.zeros(size)
    for slope, zero, unit, number in zip(slopes, zeros, ones, numbers, strict=True):
        factor = unit - zero
        constant = factor == 0
        source = np.where(constant, 0, (number - zero) / np.where(constant, 1, factor))
        np.add.at(total, np.rint(source).astype(int).ravel(), (factor * slope).ravel())
    return total.reshape(shape)


def split(
    weights: dict[str, np.ndarray], patterns: Iterable[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(what the table must account for, what matches a pattern and has no place in our model)."""
    patterns = [re.compile(pattern) for pattern in patterns]
    aside = {k: a for k, a in weights.items() if any(p.fullmatch(k) for p in patterns)}
    return {k: a for k, a in weights.items() if k not in aside}, aside


def count(weights: dict[str, np.ndarray]) -> int:
    """Elements of all arrays."""
    return sum(math.prod(array.shape) for array in weights.values())


def need(weights: Mapping[str, np.ndarray], key: str, rank: int, what: str) -> tuple[int, ...]:
    """The shape of an array that must be there."""
    if key not in weights:
        raise UserError(
            f"a file of {what} needs the key {key!r}; found {len(weights)} keys without it, such "
            f"as {', '.join(sorted(weights)[:3])}: is --system right?"
        )
    shape = weights[key].shape
    if len(shape) != rank:
        raise UserError(f"{key} of {what} has {rank} axes; found the shape {shape}")
    return shape
