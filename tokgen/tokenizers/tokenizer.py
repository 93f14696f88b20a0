"""Tokenizer = encoder + quantizer + decoder; the only one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import boundary, ranges
from tokgen.interfaces import Quantized, Quantizer, TokenLayout, UserError
from tokgen.nn import linear, transformer


class Tokenizer(nnx.Module):
    """Images in [0, 1] to tokens and back; `pixels` is the range that its networks see.

    `size` is (rows, columns, channels) of the images, where it is known: of others the tokens would
    be those of another layout. Called with arrays, `encode` and `decode` raise where something is
    not finite; inside a compiled program they mark it (-1 and NaN), and `encoded` and `decoded`
    carry a flag for each image out.
    """

    @ranges.checked
    def __init__(
        self,
        encoder: nnx.Module,
        quantizer: Quantizer,
        decoder: nnx.Module,
        *,
        pixels: tuple[ranges.Weight, ranges.Weight] = (-1.0, 1.0),
        size: tuple[ranges.Side, ranges.Side, int] | None = None,
    ):
        low, high = pixels
        if not low < high:
            raise UserError(f"pixels must be (low, high) with low < high; found {pixels}")
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.pixels = (float(low), float(high))
        self.size = None if size is None else tuple(map(int, size))

    @property
    def layout(self) -> TokenLayout | None:
        """The layout of its tokens; None where the bottleneck is continuous."""
        return self.quantizer.layout

    def unstacked(self) -> Tokenizer:
        """A copy for encoding and decoding alone, with the layers of its transformers apart."""
        apart = transformer.without_stacks(self)
        linear.widened(apart)
        return apart

    def latents(self, image_BHW3: jax.Array) -> jax.Array:
        """What the encoder sees in an image: [B, P, C], not yet quantized."""
        boundary.images(image_BHW3, self.size)
        low, high = self.pixels
        latents_BPC = self.encoder(image_BHW3 * (high - low) + low)
        if self.layout is not None and latents_BPC.ndim == 3:
            what = f"latents of images {tuple(image_BHW3.shape[1:])}"
            positions = self.layout.spans[-1][1]
            boundary.latents(latents_BPC, positions, self.quantizer.inputs, what)
        return latents_BPC

    def encode(self, image_BHW3: jax.Array) -> jax.Array:
        """Tokens [B, L, G] of images in [0, 1]; in a compiled program -1 where not finite."""
        tokens_BLG, invalid_B = self.encoded(image_BHW3)
        if boundary.known(invalid_B):
            boundary.refuse(invalid_B, "what the encoder sees in an image")
        return jnp.where(invalid_B[:, None, None], -1, tokens_BLG)

    def encoded(self, image_BHW3: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(tokens [B, L, G], [B] true where something was not finite: they mean nothing)."""
        latents_BPC = self.latents(image_BHW3)
        # a nearest code is found among distances that are no numbers, too
        invalid_B = boundary.not_finite(latents_BPC) | boundary.damaged(self.quantizer)
        return self.quantizer.encode(latents_BPC), invalid_B

    def decode(self, tokens_BLG: jax.Array, *, cond: jax.Array | None = None) -> jax.Array:
        """Images [B, H, W, 3] of tokens, in [0, 1]; `cond` for a decoder that reads text."""
        image_BHW3, invalid_B = self.decoded(tokens_BLG, cond=cond)
        if boundary.known(invalid_B):
            boundary.refuse(invalid_B, "what the decoder gives")
        return image_BHW3

    def decoded(
        self, tokens_BLG: jax.Array, *, cond: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(images of tokens, [B] true where a pixel is not finite: it is NaN)."""
        if self.layout is not None:
            tokens_BLG = boundary.tokens(tokens_BLG, self.layout)
        image_BHW3 = self.decode_latents(self.quantizer.decode(tokens_BLG), cond=cond)
        return image_BHW3, boundary.not_finite(image_BHW3)

    def decode_latents(self, latents_BPC: jax.Array, *, cond: jax.Array | None = None) -> jax.Array:
        """Images of quantized latents, clipped to [0, 1]; what is not finite is NaN."""
        image_BHW3 = self.decode_unclipped(latents_BPC, cond=cond)
        # an infinite pixel is not white
        return jnp.where(jnp.isfinite(image_BHW3), jnp.clip(image_BHW3, 0, 1), jnp.nan)

    def reconstruct(
        self,
        image_BHW3: jax.Array,
        *,
        cond: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Quantized]:
        """(images, not clipped: training needs the gradient; what the quantizer returned)."""
        quantized = self.quantizer(self.latents(image_BHW3), key=key)
        return self.decode_unclipped(quantized.latents_BPC, cond=cond), quantized

    def decode_unclipped(
        self, latents_BPC: jax.Array, *, cond: jax.Array | None = None
    ) -> jax.Array:
        """Images of quantized latents, not clipped: a loss needs the gradient beyond white."""
        low, high = self.pixels
        text = () if cond is None else (cond,)
        # float32: losses and pixels are compared in it
        image_BHW3 = self.decoder(latents_BPC, *text).astype(jnp.float32)
        return (image_BHW3 - low) / (high - low)
