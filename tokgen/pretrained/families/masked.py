"""What the published masked generators have in common: rows of a stack, and watched decodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import interfaces, rng
from tokgen.generators import masked
from tokgen.interfaces import TokenBatch
from tokgen.pretrained import keymap
from tokgen.sampling import decode, sampler as samplers

# The first row of the published table, the class's place, is the last one: rolled on import.
LAST_TO_FIRST = keymap.one(
    lambda a, shape: np.roll(a, 1, axis=1).reshape(shape),
    lambda rows: np.roll(rows, -1, axis=0)[None],
)
TABLE = keymap.one(lambda a, shape: a.reshape(shape), lambda rows: rows[None])  # (1, L, D)


def layered(rows: list[keymap.Row], layer: int) -> list[keymap.Row]:
    """The rows of one layer, of parameters that are stacked."""
    return [
        keymap.Row(row.key, tuple((place, layer) for place in row.places), row.rule) for row in rows
    ]


def fused(key: str, path: str, *, bias: str = "") -> list[keymap.Row]:
    """One published map for query, key and value; `key` and `bias` are its arrays' names."""
    three = [f"{path}/{name}" for name in ("query", "key", "value")]
    kernels = tuple(f"{name}/kernel" for name in three)
    found = [keymap.Row(key, kernels, keymap.thirds(keymap.LINEAR))]
    if bias:
        biases = tuple(f"{name}/bias" for name in three)
        found.append(keymap.Row(bias, biases, keymap.thirds(keymap.VECTOR)))
    return found


# ---------------------------------------------------------------- fixtures


def batch(folder) -> tuple[TokenBatch, jax.Array]:
    """(tokens and labels, mask [B, L, G]) of a fixture."""
    tokens, mask = (jnp.asarray(folder.given(name)) for name in ("tokens", "mask"))
    if tokens.ndim == 2:
        tokens, mask = tokens[..., None], mask[..., None]
    return TokenBatch(tokens, jnp.asarray(folder.given("labels"))), mask


def seen(generator: masked.Generator, whole: TokenBatch, mask_BLG: jax.Array) -> TokenBatch:
    """What the generator is shown of a batch."""
    return whole.replace(
        tokens_BLG=jnp.where(mask_BLG, generator.layout.absent, whole.tokens_BLG),
    )


@jax.jit
def _logits(generator, batch):
    return generator.logits(batch)


def watched(generator: masked.Generator, **knobs) -> masked.Generator:
    """A copy with other knobs, whose logits are one program for all of its steps and runs."""
    copy = jax.tree.map(lambda leaf: leaf, generator)
    for name, value in knobs.items():
        setattr(copy, name, value)
    copy.logits = functools.partial(_logits, generator)
    return copy


class Recorder:
    """A sampler that keeps the tokens drawn at every step."""

    def __init__(self, sampler):
        self.sampler, self.drawn = sampler, []
        self.guidance, self.steps = sampler.guidance, sampler.steps

    def draw(self, logits_BlGV, **where):
        """What the sampler draws."""
        drawn = self.sampler.draw(logits_BlGV, **where)
        self.drawn.append(np.asarray(drawn.tokens_BlG))
        return drawn


class Replay:
    """A sampler of recorded noise: (logits, step) -> (tokens, what is added to the confidence)."""

    steps = None

    def __init__(self, choose: Callable, *, guidance: tuple = (), confidence: Callable):
        self.choose, self.guidance, self.confidence = choose, guidance, confidence

    def draw(self, logits_BlGV: jax.Array, *, keys_B: jax.Array, step: int, **_):
        """Tokens and confidence as recorded, none of them near a tie."""
        tokens_BlG, noise_BlG = self.choose(logits_BlGV, step)
        confidence_BlG = self.confidence(logits_BlGV, tokens_BlG) + noise_BlG
        return interfaces.Drawn(tokens_BlG, confidence_BlG, jnp.zeros(len(keys_B), bool))


def run(
    generator: masked.Generator,
    labels_B: jax.Array,
    sampler: Any,
    *,
    given: tuple[jax.Array, jax.Array] | None = None,
):
    """(final tokens [B, L, G], grids that the model was fed, tokens drawn), the last two [S, ...].

    Of drawn tokens, those at known slots are the known ones.
    """
    grids, recorder = [], Recorder(sampler)
    state = decode.generate(
        generator,
        None,
        jnp.asarray(labels_B),
        recorder,
        keys_B=rng.numbered(jax.random.key(0), len(labels_B)),
        given=given,
        observe=lambda state, index: grids.append(np.asarray(state.tokens_BLG)),
    )
    grids_SBLG, drawn_SBLG = np.stack(grids), np.stack(recorder.drawn)
    drawn_SBLG = np.where(grids_SBLG == generator.layout.absent, drawn_SBLG, grids_SBLG)
    return np.asarray(state.tokens_BLG), grids_SBLG, drawn_SBLG


def annealing(steps: int) -> tuple[float, ...]:
    """0.5 + 0.8 (1 - (s + 1) / T), by which logits are divided."""
    return tuple(0.5 + 0.8 * (1 - (step + 1) / steps) for step in range(steps))


def greedy(weights: tuple[float, ...], **options) -> samplers.Sampler:
    """The arg-max at every step."""
    return samplers.Sampler(temperature=0.0, guidance=weights, **options)
