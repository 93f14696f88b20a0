"""Gradient accumulation: the batch of a step in equal parts, one after the other.

`config.accumulate = 4` needs a quarter of the activations. Gradients are averaged in float32 before
the one clip, update and average of the step: what is a mean over images is that of the whole batch,
to rounding. Not so a term that couples the images of a batch (the entropy of codes over a batch,
LeCam of mean logits, a batch norm of the discriminator, a mean over the masked tokens of a batch):
it is of each part, and averaged. The adaptive weight compares the gradients of the whole batch, and
a quantizer's upkeep sees all of its latents.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokgen import rng, sharding
from tokgen.interfaces import Array, PyTree
from tokgen.training import train_state

# of the parameters, a batch and its key: (gradients, figures, what has a row per image)
OfPart = Callable[[PyTree, PyTree, Array], tuple[PyTree, PyTree, PyTree]]


def averaged(
    of_part: OfPart,
    params: PyTree,
    batch: PyTree,
    key: Array,
    *,
    parts: int,
    strategy: str,
    like: PyTree | None = None,
) -> tuple[PyTree, PyTree, PyTree]:
    """(gradients, figures, rows) of a batch: means over its parts, rows in the batch's order.

    `like` has the structure and shapes of the gradients; None: those of `params`. One part is the
    batch itself, under `key`; of several each draws by a key of its own.
    """
    if parts == 1:
        return of_part(params, batch, key)
    like = params if like is None else like
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), like)

    def one(total: PyTree, each: tuple[PyTree, Array]) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        rows, number = each
        # parameters that lie over several devices are gathered anew, and not kept whole
        held, total = sharding.step_by_step(params, total)
        own = rng.number(rng.use(key, rng.PART), number)
        gradients, figures, found = of_part(held, rows, own)
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradients)
        return train_state.laid(total, strategy), (figures, found)

    each = cut(batch, parts), jnp.arange(parts)
    total, (figures, rows) = jax.lax.scan(one, train_state.laid(zeros, strategy), each)
    means = jax.tree.map(lambda values: jnp.mean(values.astype(jnp.float32), 0), figures)
    return jax.tree.map(lambda leaf: leaf / parts, total), means, joined(rows)


def cut(batch: PyTree, parts: int) -> PyTree:
    """[B, ...] -> [parts, B / parts, ...]: part k has the rows k, k + parts, k + 2 parts, ...

    A device holds a run of rows, of which every part takes as many: none moves to another device,
    and the parts are the same on any mesh.
    """

    def of(array: Array) -> Array:
        array = array.reshape(len(array) // parts, parts, *array.shape[1:])
        array = sharding.constrain(array, "B".ljust(array.ndim, "."))
        return sharding.constrain(jnp.moveaxis(array, 1, 0), ".B".ljust(array.ndim, "."))

    return jax.tree.map(of, batch)


def joined(rows: PyTree) -> PyTree:
    """The inverse of `cut`."""

    def of(array: Array) -> Array:
        array = sharding.constrain(jnp.moveaxis(array, 0, 1), "B".ljust(array.ndim, "."))
        whole = array.reshape(-1, *array.shape[2:])
        return sharding.constrain(whole, "B".ljust(whole.ndim, "."))

    return jax.tree.map(of, rows)
