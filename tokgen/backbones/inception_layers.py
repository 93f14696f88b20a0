"""The layers of InceptionV3 (arXiv:1512.00567) as FID knows it, and how both files name them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution without bias, its batch norm and ReLU, by the published name."""

    name: str
    rows: int
    columns: int
    stride: int = 1
    padding: str = "SAME"


def largest(x_BHWC: jax.Array) -> jax.Array:
    """Maxima of 3 x 3, every second one, inside the image."""
    return _window(x_BHWC, -jnp.inf, jax.lax.max, 2, "VALID")


def largest_around(x_BHWC: jax.Array) -> jax.Array:
    """Maxima of the 3 x 3 around every place; the size stays."""
    return _window(x_BHWC, -jnp.inf, jax.lax.max, 1, "SAME")


def mean_around(x_BHWC: jax.Array) -> jax.Array:
    """Means of the positions among the 3 x 3 around every one that lie inside the image."""
    sums_BHWC = _window(x_BHWC, 0.0, jax.lax.add, 1, "SAME")
    ones_BHW1 = jnp.ones((1, *x_BHWC.shape[1:3], 1), jnp.float32)
    return sums_BHWC / _window(ones_BHW1, 0.0, jax.lax.add, 1, "SAME")


def _window(
    x_BHWC: jax.Array, start: float, join: Callable, stride: int, padding: str
) -> jax.Array:
    return jax.lax.reduce_window(x_BHWC, start, join, (1, 3, 3, 1), (1, stride, stride, 1), padding)


# A chain is applied in order; a fork (a tuple of chains) applies all of them to the same map and
# joins their channels.
Step = Layer | Callable[[jax.Array], jax.Array] | tuple["Chain", ...]
Chain = tuple[Step, ...]


def _line(block: str, *parts: tuple[str, int, int]) -> Chain:
    """Layers of stride 1 that keep the size."""
    return tuple(Layer(f"{block}.{name}", rows, columns) for name, rows, columns in parts)


def _numbered(name: str, *sizes: tuple[int, int]) -> Iterator[tuple[str, int, int]]:
    return ((f"{name}_{number}", *size) for number, size in enumerate(sizes, 1))


def _reduce(name: str) -> Layer:
    return Layer(name, 3, 3, 2, "VALID")


def _a(block: str) -> Step:
    return (
        _line(block, ("branch1x1", 1, 1)),
        _line(block, *_numbered("branch5x5", (1, 1), (5, 5))),
        _line(block, *_numbered("branch3x3dbl", (1, 1), (3, 3), (3, 3))),
        (mean_around, *_line(block, ("branch_pool", 1, 1))),
    )


def _b(block: str) -> Step:
    double = _line(block, *_numbered("branch3x3dbl", (1, 1), (3, 3)))
    return (
        (_reduce(f"{block}.branch3x3"),),
        (*double, _reduce(f"{block}.branch3x3dbl_3")),
        (largest,),
    )


def _c(block: str) -> Step:
    row, column = (1, 7), (7, 1)
    return (
        _line(block, ("branch1x1", 1, 1)),
        _line(block, *_numbered("branch7x7", (1, 1), row, column)),
        _line(block, *_numbered("branch7x7dbl", (1, 1), column, row, column, row)),
        (mean_around, *_line(block, ("branch_pool", 1, 1))),
    )


def _d(block: str) -> Step:
    wide = _line(block, *_numbered("branch7x7x3", (1, 1), (1, 7), (7, 1)))
    return (
        (*_line(block, ("branch3x3_1", 1, 1)), _reduce(f"{block}.branch3x3_2")),
        (*wide, _reduce(f"{block}.branch7x7x3_4")),
        (largest,),
    )


def _e(block: str, pool: Callable[[jax.Array], jax.Array]) -> Step:
    def split(name: str) -> Step:
        return (_line(block, (f"{name}a", 1, 3)), _line(block, (f"{name}b", 3, 1)))

    double = _line(block, *_numbered("branch3x3dbl", (1, 1), (3, 3)))
    return (
        _line(block, ("branch1x1", 1, 1)),
        (*_line(block, ("branch3x3_1", 1, 1)), split("branch3x3_2")),
        (*double, split("branch3x3dbl_3")),
        (pool, *_line(block, ("branch_pool", 1, 1))),
    )


TO_64: Chain = (
    _reduce("Conv2d_1a_3x3"),
    Layer("Conv2d_2a_3x3", 3, 3, padding="VALID"),
    Layer("Conv2d_2b_3x3", 3, 3),
    largest,
)
TO_192: Chain = (
    Layer("Conv2d_3b_1x1", 1, 1),
    Layer("Conv2d_4a_3x3", 3, 3, padding="VALID"),
    largest,
)
TO_SPATIAL: Chain = (
    *(_a(f"Mixed_5{letter}") for letter in "bcd"),
    _b("Mixed_6a"),
    *(_c(f"Mixed_6{letter}") for letter in "bc"),
)
TO_768: Chain = (_c("Mixed_6d"), _c("Mixed_6e"))
TO_POOL: Chain = (
    _d("Mixed_7a"),
    _e("Mixed_7b", mean_around),
    _e("Mixed_7c", largest_around),
)
WHOLE: Chain = (*TO_64, *TO_192, *TO_SPATIAL, *TO_768, *TO_POOL)


def layers(chain: Chain) -> Iterator[Layer]:
    """All layers of a chain, in order."""
    for step in chain:
        if isinstance(step, Layer):
            yield step
        elif isinstance(step, tuple):
            for branch in step:
                yield from layers(branch)


def nodes(chain: Chain, scope: str = "") -> Iterator[tuple[str, str]]:
    """(published name, TensorFlow's scope) of every layer.

    The graph numbers what is alike within a scope: conv, conv_1; a fork is a scope `mixed`, and in
    it a branch of more than one operation is a scope `tower`.
    """
    met: collections.Counter[str] = collections.Counter()

    def fresh(kind: str) -> str:
        met[kind] += 1
        return scope + (kind if met[kind] == 1 else f"{kind}_{met[kind] - 1}")

    for step in chain:
        if isinstance(step, Layer):
            yield step.name, fresh("conv")
        elif isinstance(step, tuple):
            yield from _branches(step, fresh("mixed") + "/")


def _branches(fork: tuple[Chain, ...], scope: str) -> Iterator[tuple[str, str]]:
    alone = tuple(branch[0] for branch in fork if len(branch) == 1)
    yield from nodes(alone, scope)
    towers = [branch for branch in fork if len(branch) > 1]
    for number, branch in enumerate(towers):
        yield from nodes(branch, f"{scope}tower_{number}/" if number else f"{scope}tower/")
