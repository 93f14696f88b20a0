"""What is given after what is drawn: a particle filter over the steps of a decode.

A generator with an order of its own draws a token given those before it, and not given what is held
fixed after it. Several particles, rows of one image, are drawn at once; each is weighed by how
likely it makes the given tokens when their turn comes, and as soon as few carry the weight, those
go on in the place of the others (the bootstrap filter: Gordon et al., 1993, with the systematic
resampling of Kitagawa, 1996). The more particles, the nearer is what is drawn to
p(drawn | given) of the model, of which one particle knows the given tokens before alone.

A generator that can tell how well a token suits what is held and comes later draws toward it
(`interfaces.Draw`). A particle is then weighed as if what its draws promise had come, at the next
step what came takes the place of what was promised, and what draws owe is paid: the more one can
tell, the fewer particles are lost, and p(drawn | given) stays what it is (Guarniero et al., "The
iterated auxiliary particle filter", 2017, has the same weights of a learned promise).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokgen import rng
from tokgen.interfaces import Array, DecodeState, Drawn, Phase, PyTree

FEW = 0.5  # of the particles: when fewer than so many carry the weight, they are resampled


def rows(asked: PyTree, keys_N: Array, count: int) -> tuple:
    """(what is asked for, keys) of `count` rows of each image, with keys of their own."""
    keys_NX = jax.vmap(lambda key: rng.numbered(rng.use(key, rng.PARTICLE), count))(keys_N)
    asked = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), asked)
    return asked, keys_NX.reshape(-1)


def held(state: DecodeState, phase: Phase, index: Array | int) -> tuple[Array, Array]:
    """(tokens [B, l, G], true where one was given) of the places that a step handles."""
    at = phase.place(index)
    positions_Bl = jax.lax.dynamic_slice_in_dim(state.order_BL, at, phase.size, axis=1)
    return state.read(positions_Bl), jnp.take_along_axis(
        state.given_BLG, positions_Bl[..., None], axis=1
    )


def gained(logits_BlGV: Array, symbol: int, tokens_BlG: Array, given_BlG: Array) -> Array:
    """[B] ln of the probability of what is given, of the symbols from `symbol` on.

    Under the logits as they are merged, without temperature and filters: those may forbid it.
    """
    reach = slice(symbol, symbol + logits_BlGV.shape[2])
    tokens_BlG, given_BlG = tokens_BlG[..., reach], given_BlG[..., reach]
    logs_BlGV = jax.nn.log_softmax(logits_BlGV.astype(jnp.float32), axis=-1)
    tokens_BlG = jnp.where(given_BlG, tokens_BlG, 0)  # V, where none is there yet
    logs_BlG = jnp.take_along_axis(logs_BlGV, tokens_BlG[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(given_BlG, logs_BlG, 0), axis=(1, 2))


def promised(
    drawn: Drawn, *, toward_BlGV: Array, wanted_BlG: Array | None = None
) -> tuple[Array, Array]:
    """([B] what draws owe, [B] what they promise of what is still to come) of draws toward it."""
    taken_BlG = jnp.take_along_axis(toward_BlGV, drawn.tokens_BlG[..., None], axis=-1)[..., 0]

    def summed(part_BlG):
        part_BlG = jnp.broadcast_to(part_BlG, taken_BlG.shape)
        part_BlG = part_BlG if wanted_BlG is None else jnp.where(wanted_BlG, part_BlG, 0)
        return jnp.sum(part_BlG, axis=(1, 2))

    return summed(drawn.owed_BlG), summed(taken_BlG)


def resampled(carried: dict[str, PyTree], keys_B: Array, index: Array | int, count: int) -> PyTree:
    """What a step carries on, of each image's `count` rows those that shall go on.

    The rows may be followed by as many of the null condition, which go with them.
    """
    B = len(keys_B)
    weight_B = carried["weight_B"][:B]
    weight_NX = weight_B.reshape(-1, count)
    # where none can have what is given, no one is likelier than another
    none_N1 = jnp.all(jnp.isneginf(weight_NX), axis=1, keepdims=True)
    weight_NX = jnp.where(none_N1, 0.0, weight_NX)
    share_NX = jax.nn.softmax(weight_NX, axis=1)
    few_N = jnp.sum(share_NX**2, axis=1) * count * FEW > 1  # 1 / sum of squares: how many carry it
    key_N = keys_B[::count]

    def place(key):
        return jax.random.uniform(rng.number(rng.use(key, rng.RESAMPLE), index))

    ancestor_NX = jax.vmap(systematic)(share_NX, jax.vmap(place)(key_N))
    ancestor_NX = jnp.where(few_N[:, None], ancestor_NX, jnp.arange(count)[None])
    ancestor_B = (ancestor_NX + count * jnp.arange(len(weight_NX))[:, None]).reshape(-1)
    rest_NX = jnp.where(few_N[:, None], 0.0, weight_NX - jnp.max(weight_NX, axis=1, keepdims=True))
    carried = carried | {"weight_B": _like(rest_NX.reshape(-1), carried["weight_B"])}
    rows = jnp.concatenate([ancestor_B, B + ancestor_B])[: len(carried["weight_B"])]

    def moved(tree):
        return jax.tree.map(lambda leaf: leaf[rows], tree)

    return jax.lax.cond(jnp.any(few_N), moved, lambda tree: tree, carried)


def systematic(share_X: Array, uniform: Array) -> Array:
    """[X] who goes on, each about X times its share, by one number for all (Kitagawa, 1996)."""
    X = len(share_X)
    upto_X = jnp.cumsum(share_X)
    points_X = (jnp.arange(X) + uniform) / X * upto_X[-1]
    return jnp.minimum(jnp.searchsorted(upto_X, points_X, side="right"), X - 1)


def chosen(state: DecodeState, count: int) -> tuple[Array, Array, Array]:
    """(tokens_NLG, invalid_N, near_N): one of each image's particles, as likely as its weight."""
    weight_NX = state.weight_B.reshape(-1, count)
    key_N = state.keys_B[::count]
    found_N = jax.vmap(
        lambda key, weight_X: jax.random.categorical(rng.use(key, rng.CHOICE), weight_X)
    )(key_N, weight_NX)
    tokens_NLG = state.tokens_BLG[found_N + count * jnp.arange(len(weight_NX))]
    # of all of them: which one it is was decided among them
    invalid_N, near_N = (
        jnp.any(flag_B.reshape(-1, count), axis=1) for flag_B in (state.invalid_B, state.near_B)
    )
    return tokens_NLG, invalid_N, near_N


def _like(weight_B: Array, other: Array) -> Array:
    """Weights of the images' rows, and of the rows of null conditions behind them."""
    return jnp.concatenate([weight_B, weight_B])[: len(other)]
