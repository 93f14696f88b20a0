"""Index backpropagation quantization: a softmax over the whole codebook (arXiv:2412.02692).

A latent takes the row with the largest product, without distances or norms. Its one-hot choice has
the gradient of the softmax, so that every row is trained by every latent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import ranges
from tokgen.interfaces import Quantized, TokenLayout
from tokgen.quantizers import entropy as entropies


class Quantizer(nnx.Module):
    """`codes` rows of `channels` numbers; `temperature` of the entropies as in `lfq.py`."""

    @ranges.checked
    def __init__(
        self,
        codes: ranges.Codes,
        channels: ranges.Width,
        *,
        grid: tuple[int, int],
        temperature: ranges.Amount = 0.0,
        entropy: str = "shifted",
        rngs: nnx.Rngs,
    ):
        entropies.check(entropy)
        self.layout = TokenLayout((codes,), (grid,))
        self.inputs = self.channels = channels
        self.temperature, self.entropy = temperature, entropy
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (codes, channels)))

    def __call__(self, latents_BPC: jax.Array, *, key: jax.Array | None = None) -> Quantized:
        """Training path: the chosen row, with the gradient of the softmax's mean row.

        Losses `index` (moves latents and all rows), `commitment`, `codebook`.
        """
        del key
        latents_BPC = latents_BPC.astype(jnp.float32)
        rows_VC = self.codebook[...].astype(jnp.float32)
        logits_BPV = entropies.highest("BPC,VC->BPV", latents_BPC, rows_VC)
        tokens_BLG = jnp.argmax(logits_BPV, -1)[..., None]
        hard_BPC = rows_VC[tokens_BLG[..., 0]]
        # one_hot + p - stop(p), times the codebook: the rows' gradient is the one-hot's, the
        # chances' gradient is the rows; written so that the value is a row, to the bit
        soft_BPC = entropies.highest(
            "BPV,VC->BPC", jax.nn.softmax(logits_BPV), jax.lax.stop_gradient(rows_VC)
        )
        codes_BPC = hard_BPC + (soft_BPC - jax.lax.stop_gradient(soft_BPC))
        losses = {
            "index": jnp.mean((codes_BPC - latents_BPC) ** 2),
            "commitment": jnp.mean((jax.lax.stop_gradient(hard_BPC) - latents_BPC) ** 2),
            "codebook": jnp.mean((hard_BPC - jax.lax.stop_gradient(latents_BPC)) ** 2),
        }
        if self.temperature > 0:
            losses |= entropies.of_affinities(logits_BPV, self.temperature, self.entropy)
        return Quantized(codes_BPC, tokens_BLG, losses)

    def encode(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P, C] -> tokens [B, P, 1]."""
        rows_VC = self.codebook[...].astype(jnp.float32)
        products_BPV = entropies.highest("BPC,VC->BPV", latents_BPC.astype(jnp.float32), rows_VC)
        return jnp.argmax(products_BPV, -1)[..., None]

    def decode(self, tokens_BLG: jax.Array) -> jax.Array:
        """Tokens [B, P, 1] -> rows [B, P, C]."""
        return self.codebook[...].astype(jnp.float32)[tokens_BLG[..., 0]]

    def maintain(self, latents_BPC: jax.Array, *, key: jax.Array) -> None:
        """Nothing to keep up between steps: the softmax reaches rows that nobody chose."""
