"""The continuous bottleneck of a variational autoencoder (arXiv:1312.6114): no tokens.

An encoder gives a mean and a log-variance per channel, training sees a draw, and a KL loss holds
the draws near the standard normal. It trains and reconstructs; no generator of tokens accepts it.
"""

from __future__ import annotations

from typing import NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import ranges
from tokgen.interfaces import Quantized, UserError

BOUNDS = (-30.0, 20.0)  # of the log-variance


class Quantizer(nnx.Module):
    """`inputs` = 2 `channels`: all means first, then all log-variances."""

    @ranges.checked
    def __init__(
        self,
        channels: ranges.Width,
        *,
        grid: tuple[int, int] | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        del grid, rngs
        self.channels, self.inputs, self.layout = channels, 2 * channels, None

    def __call__(self, latents_BPC: jax.Array, *, key: jax.Array | None = None) -> Quantized:
        """A draw where there is a key, else the mean; loss `kl`: per image, mean over the batch."""
        mean_BPC, logvar_BPC = self.moments(latents_BPC)
        drawn_BPC = mean_BPC
        if key is not None:
            noise_BPC = jax.random.normal(key, mean_BPC.shape)
            drawn_BPC = mean_BPC + jnp.exp(0.5 * logvar_BPC) * noise_BPC
        loss = jnp.mean(jnp.sum(self.divergence(latents_BPC), -1))
        return Quantized(drawn_BPC, None, {"kl": loss})

    def moments(self, latents_BPC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, P, 2 C] -> mean and clamped log-variance, [B, P, C] each."""
        mean_BPC, logvar_BPC = jnp.split(latents_BPC.astype(jnp.float32), 2, -1)
        return mean_BPC, jnp.clip(logvar_BPC, *BOUNDS)

    def mode(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P, 2 C] -> the mean [B, P, C], which reconstruction uses."""
        return self.moments(latents_BPC)[0]

    def divergence(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P]: KL from the standard normal in nats, summed over channels."""
        mean_BPC, logvar_BPC = self.moments(latents_BPC)
        return 0.5 * jnp.sum(mean_BPC**2 + jnp.exp(logvar_BPC) - 1 - logvar_BPC, -1)

    def encode(self, latents_BPC: jax.Array) -> NoReturn:
        """There are no tokens to encode to."""
        del latents_BPC
        raise UserError(_CONTINUOUS)

    def decode(self, tokens_BLG: jax.Array) -> NoReturn:
        """There are no tokens to decode."""
        del tokens_BLG
        raise UserError(_CONTINUOUS)

    def maintain(self, latents_BPC: jax.Array, *, key: jax.Array) -> None:
        """Nothing to keep up between steps."""


_CONTINUOUS = (
    "this tokenizer is continuous: it has no tokens; it reconstructs images (`reconstruct`, or "
    "`mode` and `decode_latents`), and a generator needs one of the discrete quantizers"
)
