"""Causal generators as published: what their key tables, fixtures and checks have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import interfaces, rng
from tokgen.interfaces import TokenBatch, TokenLayout, UserError
from tokgen.nn import dropout
from tokgen.pretrained import keymap, parity
from tokgen.sampling import decode, guidance, sampler as samplers

QKV = ("query", "key", "value")


def llama_blocks(keys: str, path: str, depth: int) -> list[keymap.Row]:
    """The keys of LlamaGen's blocks `keys`.0, `keys`.1, ...; `path` is our stacked ones'."""
    rows = []
    for i in range(depth):
        key = f"{keys}.{i}"
        fused = tuple((f"{path}/attention/{name}/kernel", i) for name in QKV)
        rows += [
            keymap.Row(f"{key}.attention.wqkv.weight", fused, keymap.thirds(keymap.LINEAR)),
            keymap.row(
                f"{key}.attention.wo.weight",
                (f"{path}/attention/out/kernel", i),
                keymap.LINEAR_OUT,
            ),
            keymap.row(f"{key}.attention_norm.weight", (f"{path}/attention_norm/scale", i)),
            keymap.row(f"{key}.ffn_norm.weight", (f"{path}/mlp_norm/scale", i)),
        ]
        for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            place = (f"{path}/mlp/{ours}/kernel", i)
            rows.append(keymap.row(f"{key}.feed_forward.{theirs}.weight", place, keymap.LINEAR))
    return rows


def depth(weights: Mapping[str, np.ndarray], keys: str) -> int:
    """How many blocks `keys`.0, `keys`.1, ... there are."""
    numbers = [key[len(keys) + 1 :].split(".")[0] for key in weights if key.startswith(f"{keys}.")]
    if not numbers:
        raise UserError(f"no key begins with {keys}.0: is --system right?")
    return 1 + max(int(number) for number in numbers)


def side(cells: int) -> int:
    """The side of a square grid."""
    root = round(cells**0.5)
    if root * root != cells:
        raise UserError(f"a square grid of {cells} positions is not to be had: wrong --config?")
    return root


def square(vocab: tuple[int, ...], cells: int) -> TokenLayout:
    """The layout of a square grid of so many positions."""
    return TokenLayout(vocab, ((side(cells), side(cells)),))


def heads(published: Mapping, name: str, width: int, known: int | None = None) -> int:
    """How many heads, which no array shows: as published, or `known`, or of 64 channels each."""
    found = published.get(name, known)
    if found is None and width % 64:
        raise UserError(
            f"a width of {width} is none of the published ones, whose heads have 64 channels: give "
            f"the configuration, --config FILE, with {name}"
        )
    found = width // 64 if found is None else found
    if type(found) is not int or found < 1 or width < 1 or width % found:
        raise UserError(f"{name} must divide the width {width}; found {found!r:.50}: see --config")
    return found


def section(published: dict, *path: str) -> dict:
    """A section of a published configuration; {} where it is not given."""
    for name in path:
        published = published.get(name, {})
    return published


def rows_of_symbol(count: int) -> keymap.Rule:
    """A table (count, D) <-> the first rows of ours [V, D]; nobody reads those beyond."""
    return keymap.one(
        lambda a, shape: np.pad(a, ((0, shape[0] - len(a)), (0, 0))), lambda ours: ours[:count]
    )


def map_to_symbol(count: int) -> keymap.Rule:
    """A linear map (count, D) <-> the first columns of ours [D, V]; nobody reads those beyond."""
    return keymap.one(
        lambda a, shape: np.pad(a.T, ((0, 0), (0, shape[1] - len(a)))),
        lambda ours: ours[:, :count].T,
    )


# ---------------------------------------------------------------- what fixtures ask


def still(generator):
    """The generator with dropout of all kinds off."""
    generator.label_drop = 0.0
    for module in (generator, generator.head):
        if hasattr(module, "transformer"):
            module.transformer.rates = dropout.Rates()
    return generator


def batch(tokens_BLG: jax.Array, cond: Any, order_BL: jax.Array = None) -> TokenBatch:
    """Arrays of a fixture as a batch; tokens without an axis of symbols have one."""
    tokens = jnp.asarray(tokens_BLG)
    tokens = tokens[..., None] if tokens.ndim == 2 else tokens
    if order_BL is None:
        order_BL = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
    return TokenBatch(tokens, cond, jnp.asarray(order_BL))


@jax.jit
def slots(generator, batch: TokenBatch) -> jax.Array:
    """Logits [B, prefix + L, V] of a single symbol at every slot: of the prefix, of every token."""
    sequence = jnp.take_along_axis(batch.tokens_BLG, batch.order_BL[..., None], axis=1)
    x_BlD = jnp.concatenate(
        [generator.conditioning(batch.cond), generator.embeddings(sequence)], axis=1
    )
    slots_l = jnp.arange(x_BlD.shape[1])
    hidden_BlD, _ = generator.hidden(
        x_BlD, batch.order_BL, slots_l, batch.cond, generator.positions, slots=len(slots_l)
    )
    return generator.head(hidden_BlD, cond=generator.conditioning.adapt(batch.cond, slots_l))[
        :, :, 0
    ]


@jax.jit
def prefilled(generator: nnx.Module, cond: Any, order_BL: jax.Array) -> jax.Array:
    """Logits [B, prefix, V] of a single symbol, as the prefix fills the cache."""
    x_BlD, slots_l = generator.conditioning(cond), jnp.arange(generator.conditioning.slots)
    cache = tuple(
        layer.grow(generator.conditioning.slots)
        for layer in generator.transformer.cache(len(x_BlD))
    )
    hidden_BlD, _ = generator.hidden(
        x_BlD, order_BL, slots_l, cond, generator.positions, slots=len(slots_l), cache=cache
    )
    return generator.head(hidden_BlD, cond=generator.conditioning.adapt(cond, slots_l))[:, :, 0]


class Recorder:
    """A sampler that keeps the logits that it was shown, out of compiled loops too."""

    guidance, steps = (), None

    def __init__(self):
        self.seen: list[np.ndarray] = []

    def draw(self, logits_BlGV, *, keys_B, **_):
        """The likeliest tokens, and no confidence."""
        jax.experimental.io_callback(self.seen.append, None, logits_BlGV, ordered=True)
        tokens_BlG = logits_BlGV.argmax(-1).astype(jnp.int32)
        near_B = jnp.zeros(len(keys_B), bool)
        return interfaces.Drawn(tokens_BlG, jnp.zeros(tokens_BlG.shape), near_B)


_generate = jax.jit(decode.generate, static_argnums=(1, 3))


def stepped(generator: nnx.Module, tokens_BLG: jax.Array, cond: Any) -> np.ndarray:
    """Logits [B, L, G, V] of one-token steps through the cache, fed with `tokens_BLG`."""
    recorder, tokens_BLG = Recorder(), jnp.asarray(tokens_BLG)
    B, L, G = tokens_BLG.shape
    given = tokens_BLG, jnp.ones((B, L, G), bool)
    keys_B = rng.numbered(jax.random.key(0), B)
    jax.block_until_ready(
        _generate(generator, None, cond, recorder, keys_B=keys_B, given=given).tokens_BLG
    )
    jax.effects_barrier()
    shown = np.concatenate([np.asarray(logits) for logits in recorder.seen], axis=1)
    return shown.reshape(B, L, G, -1)  # all symbols of a position, or one after the other


def greedy(generator: nnx.Module, cond: Any, weights: Sequence[float]) -> np.ndarray:
    """The likeliest tokens [B, L, G] under guidance, one weight per step (and symbol).

    -1 where decoding through the cache and without one differ.
    """
    keys_B = rng.numbered(jax.random.key(0), len(jax.tree.leaves(cond)[0]))
    sampler = samplers.Sampler(temperature=0.0, guidance=tuple(weights))
    cached = _generate(generator, None, cond, sampler, keys_B=keys_B)
    plain_BLG = _uncached(generator, cond, np.asarray(weights, np.float32))
    return np.where(cached.tokens_BLG == plain_BLG, plain_BLG, -1)


def decodes(names: Sequence[str], steps: int) -> Iterator[tuple[str, tuple]]:
    """(name, guidance per step) of decodes called greedy_cfgW, greedy_cfgW_W or greedy_nocfg."""
    for name in names:
        found = re.fullmatch(r"greedy_(?:nocfg|cfg([\d.]+)(?:_([\d.]+))?)", name)
        if found is not None:
            scales = tuple(float(scale) for scale in found.groups() if scale is not None)
            entry = scales if len(scales) > 1 else (*scales, 1.0)[0]
            yield name, (entry,) * steps


@jax.jit
def _chosen(
    generator: nnx.Module, tokens_BLG: jax.Array, both: Any, place: int, symbol: int, weight: float
):
    """The tokens with the likeliest symbol at a place of the raster order."""
    twice = jnp.concatenate([tokens_BLG, tokens_BLG])
    logits_BLGV = generator.logits(batch(twice, both))
    here_BV = logits_BLGV[:, place, symbol]
    cond_BV, null_BV = jnp.split(here_BV, 2)
    return tokens_BLG.at[:, place, symbol].set(guidance.merge(cond_BV, null_BV, weight).argmax(-1))


def _uncached(generator: nnx.Module, cond: Any, weights: Sequence[float]) -> np.ndarray:
    both = jax.tree.map(lambda *pair: jnp.concatenate(pair), cond, generator.null(cond))
    L, G = generator.layout.length, generator.layout.groups
    tokens_BLG = jnp.zeros((len(jax.tree.leaves(cond)[0]), L, G), jnp.int32)
    weights_LG = np.broadcast_to(weights.reshape(L, -1), (L, G))
    for place in range(L):
        for symbol in range(G):
            tokens_BLG = _chosen(
                generator, tokens_BLG, both, place, symbol, weights_LG[place, symbol]
            )
    return np.asarray(tokens_BLG)


def losses(
    folder: parity.Folder, generator: nnx.Module, batch: TokenBatch, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The training loss of a batch, the share of tokens that are right, norms of gradients."""

    def loss(module):
        return module.loss(batch, None, step=2**30, key=rng.key(0, "train"))

    value, scalars, gradients = parity.gradients(generator, loss, folder.system.rows(generator))
    norms, norm = parity.grad_norms(gradients, parity.there(gradients, names))
    return {
        "loss": value,
        "correct": scalars["token_accuracy"],
        "grad_norms": norms,
        "grad_norm_all": norm,
    }
