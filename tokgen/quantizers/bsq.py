"""Binary spherical quantization: the signs of a unit vector (arXiv:2406.07548).

Latents are put on the unit sphere and codes are +-1/sqrt(C), so that they lie on it too and the
error is bounded however many bits there are. Infinity (arXiv:2412.04431) packs bits big-endian.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import ranges
from tokgen.interfaces import Quantized, TokenLayout
from tokgen.nn import norms
from tokgen.quantizers import bits as words

GUARD = 1e-8  # of the logarithms


class Quantizer(nnx.Module):
    """2^bits codes on the unit sphere, no parameters.

    Args:
        groups: channels of each symbol of a position; above 18 bits more than one is needed.
        order: "little", or "big" where a group's first channel is its most significant bit.
        temperature: of the entropies; 0 computes none. Published: 0.01. Both are bitwise: the
            batch entropy is the sum over bits of the entropy of their mean, an upper bound.
    """

    @ranges.checked
    def __init__(
        self,
        bits: Annotated[int, ranges.Range(1, 1024)],
        *,
        grid: tuple[int, int],
        groups: tuple[ranges.Count, ...] | None = None,
        order: str = "little",
        temperature: ranges.Amount = 0.0,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        self.groups, self.order = words.checked(bits, groups, order), order
        self.inputs = self.channels = bits
        self.temperature = temperature
        self.layout = TokenLayout(tuple(2**size for size in self.groups), (grid,))

    def __call__(self, latents_BPC: jax.Array, *, key: jax.Array | None = None) -> Quantized:
        """Training path: codes with the gradient of the unit vector, loss `commitment`."""
        del key
        units_BPC = norms.unit(latents_BPC.astype(jnp.float32))
        codes_BPC = jnp.where(units_BPC > 0, 1.0, -1.0) * self.channels**-0.5
        losses = {"commitment": jnp.mean((codes_BPC - units_BPC) ** 2)}
        if self.temperature > 0:
            losses |= self._entropies(units_BPC)
        straight_BPC = units_BPC + jax.lax.stop_gradient(codes_BPC - units_BPC)
        return Quantized(straight_BPC, self.encode(latents_BPC), losses)

    def encode(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P, C] -> tokens [B, P, G]; signs do not depend on the length of a vector."""
        return words.pack(latents_BPC > 0, self.groups, self.order)

    def decode(self, tokens_BLG: jax.Array) -> jax.Array:
        """Tokens [B, P, G] -> codes [B, P, C] of length 1."""
        bits_BPC = words.unpack(tokens_BLG, self.groups, self.order).astype(jnp.float32)
        return (2.0 * bits_BPC - 1) * self.channels**-0.5

    def maintain(self, latents_BPC: jax.Array, *, key: jax.Array) -> None:
        """Nothing to keep up between steps."""

    def _entropies(self, units_BPC: jax.Array) -> dict[str, jax.Array]:
        # softmax of 2 u c / T over the two values c = +-1/sqrt(C) of a bit
        log_odds_BPC = 4 * units_BPC * self.channels**-0.5 / self.temperature
        # both values by themselves: a compiled 1 - sigmoid may fall below zero
        one_BPC, other_BPC = jax.nn.sigmoid(log_odds_BPC), jax.nn.sigmoid(-log_odds_BPC)
        means = jnp.mean(one_BPC, (0, 1)), jnp.mean(other_BPC, (0, 1))
        return {
            "sample_entropy": jnp.mean(jnp.sum(_binary(one_BPC, other_BPC), -1)),
            "batch_entropy": jnp.sum(_binary(*means)),
        }


def _binary(one: jax.Array, other: jax.Array) -> jax.Array:
    """The entropy of each bit, from the chances of its values."""
    return -(one * jnp.log(one + GUARD) + other * jnp.log(other + GUARD))
