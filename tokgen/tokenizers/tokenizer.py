"""Tokenizer = encoder + quantizer + decoder; the only one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import ranges
from tokgen.interfaces import Quantized, Quantizer, TokenLayout, UserError


class Tokenizer(nnx.Module):
    """Images in [0, 1] to tokens and back; `pixels` is the range that its networks see."""

    @ranges.checked
    def __init__(
        self,
        encoder: nnx.Module,
        quantizer: Quantizer,
        decoder: nnx.Module,
        *,
        pixels: tuple[ranges.Weight, ranges.Weight] = (-1.0, 1.0),
    ):
        low, high = pixels
        if not low < high:
            raise UserError(f"pixels must be (low, high) with low < high; found {pixels}")
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.pixels = (float(low), float(high))

    @property
    def layout(self) -> TokenLayout | None:
        """The layout of its tokens; None where the bottleneck is continuous."""
        return self.quantizer.layout

    def latents(self, image_BHW3: jax.Array) -> jax.Array:
        """What the encoder sees in an image: [B, P, C], not yet quantized."""
        low, high = self.pixels
        return self.encoder(image_BHW3 * (high - low) + low)

    def encode(self, image_BHW3: jax.Array) -> jax.Array:
        """Tokens [B, L, G] of images in [0, 1]."""
        return self.quantizer.encode(self.latents(image_BHW3))

    def decode(self, tokens_BLG: jax.Array, *, cond: jax.Array | None = None) -> jax.Array:
        """Images [B, H, W, 3] of tokens, in [0, 1]; `cond` for a decoder that reads text."""
        return self.decode_latents(self.quantizer.decode(tokens_BLG), cond=cond)

    def decode_latents(self, latents_BPC: jax.Array, *, cond: jax.Array | None = None) -> jax.Array:
        """Images of quantized latents, clipped to [0, 1]."""
        return jnp.clip(self.paint(latents_BPC, cond=cond), 0, 1)

    def reconstruct(
        self,
        image_BHW3: jax.Array,
        *,
        cond: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Quantized]:
        """(images, not clipped: training needs the gradient; what the quantizer returned)."""
        quantized = self.quantizer(self.latents(image_BHW3), key=key)
        return self.paint(quantized.latents_BPC, cond=cond), quantized

    def paint(self, latents_BPC: jax.Array, *, cond: jax.Array | None = None) -> jax.Array:
        """Images of quantized latents, not clipped: a loss needs the gradient beyond white."""
        low, high = self.pixels
        text = () if cond is None else (cond,)
        # float32: losses and pixels are compared in it
        painted = self.decoder(latents_BPC, *text).astype(jnp.float32)
        return (painted - low) / (high - low)
