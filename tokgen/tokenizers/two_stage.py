"""A decoder of two: it predicts the codes of another tokenizer, whose decoder gives them.

The two-stage form of TiTok (arXiv:2406.07550, section 3.3). First `codes` learns to predict what a
frozen tokenizer writes for the image; then the pixel decoder of that tokenizer is tuned on what
the predictions mix from its codebook. The mixture stays soft when it is used: no code is chosen.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import ranges
from tokgen.interfaces import UserError
from tokgen.nn.precision import Precision


class Decoder(nnx.Module):
    """Latents to logits, logits to a mixture of codebook rows, the mixture to an image.

    Args:
        codes: latents [B, P, C] -> logits [B, P', V'].
        pixels: rows [B, P', C'] of the other tokenizer's codebook -> images [B, H, W, 3].
        codebook: (V', C') of that codebook.
    """

    places = False  # every token is of the whole image

    @ranges.checked
    def __init__(
        self,
        *,
        codes: nnx.Module,
        pixels: nnx.Module,
        codebook: tuple[ranges.Codes, ranges.Width],
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        if codes.channels != codebook[0]:
            raise UserError(
                f"codes must give a logit per row of the codebook: codebook={tuple(codebook)}, "
                f"codes.channels={codes.channels}"
            )
        if codes.grid != pixels.grid:
            raise UserError(
                f"pixels must read the positions that codes predicts, a grid of {codes.grid}; "
                f"found pixels.grid={pixels.grid}"
            )
        self.codes, self.pixels = codes, pixels
        # the first state of MaskGIT's codebook, for which its weights are to be put
        bound = (3 / codebook[0]) ** 0.5
        self.codebook = nnx.Param(
            jax.random.uniform(
                rngs.params(), tuple(codebook), precision.params_dtype, -bound, bound
            )
        )

    def logits(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P, C] -> [B, P', V'], what the first stage trains."""
        return self.codes(latents_BPC)

    def mixture(self, logits_BPV: jax.Array) -> jax.Array:
        """[B, P', V'] -> [B, P', C']: the codebook's mean under the softmax, in float32."""
        weights_BPV = jax.nn.softmax(logits_BPV.astype(jnp.float32), axis=-1)
        rows_VC = self.codebook[...].astype(jnp.float32)
        return jnp.einsum("BPV,VC->BPC", weights_BPV, rows_VC, precision=jax.lax.Precision.HIGHEST)

    def __call__(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P, C] -> [B, H, W, 3] in the tokenizer's range."""
        return self.pixels(self.mixture(self.logits(latents_BPC)))
