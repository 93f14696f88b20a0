"""Lookup-free quantization: every channel gives one bit, its sign (arXiv:2310.05737).

Codes are all corners of a cube, -1 or 1 per channel; zero counts as negative. There is nothing to
learn and nothing to look up: entropies keep the bits decided and the codes evenly used.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import ranges
from tokgen.interfaces import Quantized, TokenLayout
from tokgen.quantizers import bits as words, entropy as entropies

WHOLE = 12  # 2^bits chances for every latent are 64 MiB per 4,096 latents


class Quantizer(nnx.Module):
    """2^bits codes, no parameters.

    Args:
        groups: channels of each symbol of a position, such as (6, 12); None: one symbol.
        order: "little", or "big" where a group's first channel is its most significant bit.
        temperature: of the entropies; 0 computes none. Published: 0.01.
        entropy: the form of their logarithms, see `entropy.py`.
        whole: bits up to which entropies run over the written-out codebook. Above, the sample
            entropy has no guard, which is the "shifted" form and a little less than the
            "clamped" one.
    """

    @ranges.checked
    def __init__(
        self,
        bits: Annotated[int, ranges.Range(1, words.LARGEST)],
        *,
        grid: tuple[int, int],
        groups: tuple[ranges.Count, ...] | None = None,
        order: str = "little",
        temperature: ranges.Amount = 0.0,
        entropy: str = "clamped",
        whole: Annotated[int, ranges.Range(0, words.LARGEST)] = WHOLE,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        entropies.check(entropy)
        self.groups, self.order = words.checked(bits, groups, order), order
        self.inputs = self.channels = bits
        self.temperature, self.entropy, self.whole = temperature, entropy, whole
        self.layout = TokenLayout(tuple(2**size for size in self.groups), (grid,))

    def __call__(self, latents_BPC: jax.Array, *, key: jax.Array | None = None) -> Quantized:
        """Training path: signs with the gradient of the latents, loss `commitment`, entropies."""
        del key
        latents_BPC = latents_BPC.astype(jnp.float32)
        codes_BPC = jnp.where(latents_BPC > 0, 1.0, -1.0)
        losses = {"commitment": jnp.mean((codes_BPC - latents_BPC) ** 2)}
        if self.temperature > 0:
            losses |= self._entropies(latents_BPC)
        straight_BPC = latents_BPC + jax.lax.stop_gradient(codes_BPC - latents_BPC)
        return Quantized(straight_BPC, self.encode(latents_BPC), losses)

    def encode(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P, C] -> tokens [B, P, G]."""
        return words.pack(latents_BPC > 0, self.groups, self.order)

    def decode(self, tokens_BLG: jax.Array) -> jax.Array:
        """Tokens [B, P, G] -> codes [B, P, C] of -1 and 1."""
        return 2.0 * words.unpack(tokens_BLG, self.groups, self.order).astype(jnp.float32) - 1

    def maintain(self, latents_BPC: jax.Array, *, key: jax.Array) -> None:
        """Nothing to keep up between steps."""

    def _entropies(self, latents_BPC: jax.Array) -> dict[str, jax.Array]:
        """Of softmax(2 z c / T) over all codes c: minus the distance, without what is constant."""
        if self.channels > self.whole:
            # softmax over the two values of a bit: sigmoid(4 z / T)
            return entropies.of_bits(4 * latents_BPC / self.temperature, self.entropy)
        codes_VC = jnp.asarray(entropies.signs(self.channels), jnp.float32)
        affinities_BPV = 2 * jnp.einsum(
            "BPC,VC->BPV", latents_BPC, codes_VC, precision=jax.lax.Precision.HIGHEST
        )
        return entropies.of_affinities(affinities_BPV, self.temperature, self.entropy)
