"""Variations: some tokens drawn anew, the others kept, wherever in the image they lie.

Of a pyramid of grids the finest are drawn anew: the image's plan stays. Of one grid, and of tokens
without a place, those of which the generator is least certain.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import rng, sharding
from tokgen.editing import redrawing
from tokgen.errors import UserError
from tokgen.interfaces import Generator, PyTree, TokenBatch, TokenLayout
from tokgen.sampling import drawing

HALVES = 4  # times that a masked generator is asked, half of the tokens at a time


def freed(
    model: redrawing.Model, tokens_NLG: np.ndarray, cond: PyTree, strength: float, *, batch: int
) -> np.ndarray:
    """[N, L] true for the tokens that a variation draws anew: a share `strength` of them, or of the
    grids where there are several; at least one, rounded up."""
    check_strength(strength)
    layout = model.generator.layout
    if len(layout.grids) > 1:
        kept = len(layout.grids) - math.ceil(strength * len(layout.grids) - 1e-9)
        return np.repeat(~prefix(layout, kept)[None], len(tokens_NLG), axis=0)
    nats_NL = nats(model, tokens_NLG, cond, batch=batch)
    count = math.ceil(strength * layout.length - 1e-9)
    rank_NL = np.argsort(np.argsort(-nats_NL, axis=1, kind="stable"), axis=1)
    return rank_NL < count


def check_strength(strength: float) -> None:
    """UserError where it is no share of something."""
    if not 0 < strength <= 1:
        raise UserError(
            f"strength must lie above 0, where nothing changes, and be at most 1; found {strength}"
        )


def prefix(layout: TokenLayout, scales: int) -> np.ndarray:
    """[L] true for the tokens of the `scales` coarsest grids."""
    return np.arange(layout.length) < sum(size for _, size in layout.spans[:scales])


def check_scales(generator: Generator, scales: int) -> None:
    """UserError where so many of the coarsest grids cannot be kept, and others drawn."""
    grids = len(generator.layout.grids)
    if grids == 1:
        raise UserError(
            "--scales keeps the coarsest of several grids; found a generator of one: use a "
            "next-scale one (VAR), or --strength"
        )
    if not 1 <= scales < grids:
        raise UserError(
            f"--scales must be from 1 to {grids - 1}, of the generator's {grids} grids; found "
            f"{scales}"
        )


def nats(model: redrawing.Model, tokens_NLG: np.ndarray, cond: PyTree, *, batch: int) -> np.ndarray:
    """[N, L] nats of every token: how little the generator expected it there.

    Of a generator with an order, given those before it; of a masked one the mean over random
    halves, each given the other.
    """
    generator, codec = model.generator, model.decoder.module.quantizer
    how = _halves if not generator.exact else _ordered
    mesh, count = sharding.current(), len(tokens_NLG)
    batch = drawing.even(count, batch, sharding.ways(mesh))
    found = []
    for start in range(0, count, batch):
        part = jax.tree.map(lambda leaf, a=start: leaf[a : a + batch], (tokens_NLG, cond))
        with jax.set_mesh(mesh):
            nats_BL = how(generator, codec, *sharding.filled(part, batch, mesh))
        found.append(np.asarray(nats_BL)[: len(part[0])])
    return np.concatenate(found)


@jax.jit
def _ordered(generator: Generator, codec, tokens_BLG: jax.Array, cond: PyTree) -> jax.Array:
    order_L = generator.order(generator.layout, jax.random.key(0))
    nats_BL = generator.nats(TokenBatch(tokens_BLG, cond), codec)  # place by place
    return jnp.zeros_like(nats_BL).at[:, order_L].set(nats_BL)


@jax.jit
def _halves(generator: Generator, codec, tokens_BLG: jax.Array, cond: PyTree) -> jax.Array:
    shape = tokens_BLG.shape[1:]

    def one(key):
        rank_N = jax.random.permutation(key, math.prod(shape)).reshape(shape)
        return jnp.stack([rank_N % 2 == half for half in (0, 1)])

    masks = jax.vmap(one)(rng.numbered(rng.key(0, "eval"), HALVES)).reshape(-1, *shape)

    def under(mask_LG):
        mask_BLG = jnp.broadcast_to(mask_LG[None], tokens_BLG.shape)
        seen_BLG = jnp.where(mask_BLG, generator.layout.absent, tokens_BLG)
        logs_BLGV = jax.nn.log_softmax(generator.logits(TokenBatch(seen_BLG, cond), codec), axis=-1)
        nats_BLG = -jnp.take_along_axis(logs_BLGV, tokens_BLG[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(mask_BLG, nats_BLG, 0), axis=-1)

    return functools.reduce(jnp.add, jax.lax.map(under, masks)) / HALVES
