"""Residual quantization over a pyramid of grids, around any discrete quantizer (arXiv:2404.02905).

What is left of a latent map is averaged down to a grid, quantized, brought back to full size,
smoothed by a convolution phi(h) = (1 - ratio) h + ratio conv(h), and taken away; so it goes on with
the next finer grid. The sum of all that was taken away is the quantized map. `_walk` is that loop;
encoding, decoding, training and teacher forcing are readings of it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import ranges, rng
from tokgen.interfaces import Quantized, Statistic, TokenLayout, UserError
from tokgen.nn import conv, precision, resample

# Sides of the grids that VAR published for stride 16 at 256, 512 and 1024 pixels.
VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
VAR_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)

Scale = ranges.Side | tuple[ranges.Side, ranges.Side]
Scales = Annotated[tuple[Scale, ...], ranges.Length(1, 64)]
FREEDOM = 4.0  # in how many directions, about, the latents of an image differ
USED = 0.08  # of the fair share of the hits that makes a code count as used


class Quantizer(nnx.Module):
    """Tokens of all scales in one sequence [B, L, G], coarse to fine.

    Args:
        quantizer: the section of a config, `dict(name="vq", ...)`, or a module.
        scales: sides of the grids, or (rows, columns); the last is the whole grid.
        phi: convolutions shared by the scales; 0 for none, None for one per scale.
        ratio: share of the convolution in phi.
    """

    @ranges.checked
    def __init__(
        self,
        quantizer: dict | nnx.Module,
        scales: Scales,
        phi: Annotated[int, ranges.Range(0, 64)] | None = 4,
        ratio: ranges.Share = 0.5,
        *,
        grid: tuple[int, int],
        rngs: nnx.Rngs,
    ):
        grids = tuple((s, s) if isinstance(s, int) else tuple(s) for s in scales)
        if not grids or grids[-1] != tuple(grid):
            raise UserError(
                f"the last of the scales must be the latent grid {tuple(grid)}; found {grids}"
            )
        if any(rows > grid[0] or columns > grid[1] for rows, columns in grids):
            raise UserError(
                f"no scale may be larger than the latent grid {tuple(grid)}; found {grids}"
            )
        count = len(grids) if phi is None else phi
        self.inner = _built(quantizer, grid, rngs) if isinstance(quantizer, dict) else quantizer
        if self.inner.layout is None or len(self.inner.layout.grids) != 1:
            raise UserError("the quantizer of every scale must be discrete and of a single grid")
        self.inputs = self.channels = self.inner.channels
        self.layout = TokenLayout(self.inner.layout.vocab, grids)
        self.phi, self.ratio, self.which = phi, ratio, shared(len(grids), count)
        self.convs = nnx.List(
            [
                conv.Conv(self.channels, self.channels, 3, precision=precision.FLOAT32, rngs=rngs)
                for _ in range(count)
            ]
        )
        # hits of every code per scale and symbol, as a moving average
        self.counts = Statistic(jnp.zeros((len(grids), self.layout.groups, self.layout.absent)))
        self.updates = Statistic(jnp.zeros((), jnp.int32))

    def __call__(self, latents_BPC: jax.Array, *, key: jax.Array | None = None) -> Quantized:
        """Training path; losses are means over scales.

        `codebook` and `commitment` compare the latents with the running sum after each scale; what
        else the inner quantizer measures, it measures on what it saw.
        """
        latents_BPC = latents_BPC.astype(jnp.float32)
        fixed_BPC, seen, tokens, losses = jax.lax.stop_gradient(latents_BPC), [], [], []

        def choose(rest_BlC, scale):
            seen.append(self.inner(rest_BlC, key=rng.number(key, scale)))
            return seen[-1].tokens_BLG

        for tokens_BlG, known_BPC in self._walk(latents_BPC, choose):
            tokens.append(tokens_BlG)
            behind = jnp.mean((jax.lax.stop_gradient(known_BPC) - latents_BPC) ** 2)
            moved = {"commitment": behind, "codebook": jnp.mean((known_BPC - fixed_BPC) ** 2)}
            losses.append(seen[-1].losses | moved)
        losses = {name: sum(scale[name] for scale in losses) / len(losses) for name in losses[0]}
        straight_BPC = latents_BPC + jax.lax.stop_gradient(known_BPC - latents_BPC)
        return Quantized(straight_BPC, jnp.concatenate(tokens, 1), losses)

    def encode(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P, C] -> tokens [B, L, G]."""
        walk = self._walk(latents_BPC, lambda rest_BlC, scale: self.inner.encode(rest_BlC))
        return jnp.concatenate([tokens_BlG for tokens_BlG, _ in walk], 1)

    def decode(self, tokens_BLG: jax.Array) -> jax.Array:
        """Tokens [B, L, G] -> latents [B, P, C]."""
        return self.partial(tokens_BLG)[-1]

    def partial(self, tokens_BLG: jax.Array) -> list[jax.Array]:
        """Latents [B, P, C] as they are known after each scale."""
        spans = self.layout.spans

        def told(rest_BlC, scale):
            start, size = spans[scale]
            return tokens_BLG[:, start : start + size]

        return [known for _, known in self._walk(self.empty(len(tokens_BLG)), told)]

    def maintain(self, latents_BPC: jax.Array, *, key: jax.Array) -> None:
        """After an optimizer step: count the hits, keep the inner quantizer up."""
        seen, hits = [], []

        def choose(rest_BlC, scale):
            seen.append(rest_BlC)
            return self.inner.encode(rest_BlC)

        for tokens_BlG, _ in self._walk(latents_BPC, choose):
            symbols = [tokens_BlG[..., g].reshape(-1) for g in range(self.layout.groups)]
            # integers: their scatter has no order to depend on
            hits.append(jnp.stack([jnp.bincount(s, length=self.layout.absent) for s in symbols]))
        done = self.updates[...]
        # the first count is taken whole, a hundred follow quickly, the rest slowly
        decay = jnp.where(done == 0, 0.0, jnp.where(done < 100, 0.9, 0.99))
        self.counts.set_value(decay * self.counts[...] + (1 - decay) * jnp.stack(hits))
        self.updates.set_value(done + 1)
        self.inner.maintain(jnp.concatenate(seen, 1), key=key)

    def usage(self, positions: int) -> jax.Array:
        """[scales, G]: share of each alphabet in use, `positions` being B P of the batches counted.

        A code is in use with 8 % of the hits that it would get if the finest scale used all alike.
        """
        used = [
            jnp.mean(self.counts[...][:, g, :size] >= positions / size * USED, -1)
            for g, size in enumerate(self.layout.vocab)
        ]
        return jnp.stack(used, -1)

    def empty(self, batch: int) -> jax.Array:
        """[batch, P, C]: nothing known yet."""
        return jnp.zeros((batch, self.layout.spans[-1][1], self.channels))

    def known_before(self, tokens_BLG: jax.Array) -> jax.Array:
        """[B, L - first, C]: of every scale but the first, what is known when its turn comes."""
        known = self.partial(tokens_BLG)[:-1]
        return jnp.concatenate([self.view(k, scale + 1) for scale, k in enumerate(known)], 1)

    def absorb(self, latents_BPC: jax.Array, tokens_BlG: jax.Array, scale: int) -> jax.Array:
        """What is known once the tokens of a scale are."""
        return latents_BPC + self._upsampled(tokens_BlG, scale)

    def view(self, latents_BPC: jax.Array, scale: int) -> jax.Array:
        """[B, P, C] averaged down to the grid of the scale that is to be drawn: [B, l, C]."""
        return self._resized(latents_BPC, -1, scale, resample.area)

    def left(self, latents_BPC: jax.Array, known_BPC: jax.Array, scale: int) -> jax.Array:
        """Tokens of a scale [B, l, G]: of what is left of latents once so much is known."""
        return self.inner.encode(self.view(latents_BPC.astype(jnp.float32) - known_BPC, scale))

    def toward(
        self, latents_BPC: jax.Array, known_BPC: jax.Array, held_BP: jax.Array, scale: int
    ) -> jax.Array | None:
        """[B, l, 1, V] how well the codes of a scale suit what is held of latents; None of several
        symbols, and of the finest grid, whose cells are held or not.

        Of a cell that is held in part, the code is that of the mean of what is left. Its held part
        tells it up to what the rest may differ by, which is about as much as is left here at all:
        -|m - c|^2 FREEDOM / 2 s^2 of the held part's mean m and a code c, with s^2 the square of
        what is left times that of the part that is free, and what the nearest code is off by.
        """
        if self.layout.groups > 1 or scale == len(self.layout.grids) - 1:
            return None
        held_BP1 = held_BP[..., None].astype(jnp.float32)
        rest_BPC = (latents_BPC.astype(jnp.float32) - known_BPC) * held_BP1
        share_Bl1 = self.view(held_BP1, scale)
        mean_BlC = self.view(rest_BPC, scale) / jnp.maximum(share_Bl1, 1e-6)
        codes_VC = self.inner.decode(jnp.arange(self.layout.vocab[0])[None, :, None])[0]
        if self.convs:  # of a map of one code
            smooth = self.convs[self.which[scale]]
            with jax.default_matmul_precision("highest"):
                smooth_VC = codes_VC @ smooth.kernel[...].sum((0, 1)) + smooth.bias[...][None]
            codes_VC = (1 - self.ratio) * codes_VC + self.ratio * smooth_VC
        with jax.default_matmul_precision("highest"):
            both_BlV = mean_BlC @ codes_VC.T
        squares_BlV = jnp.sum(mean_BlC**2, -1, keepdims=True) + jnp.sum(codes_VC**2, -1)[None, None]
        off_BlV = jnp.maximum(squares_BlV - 2 * both_BlV, 0)
        left_B = jnp.sum(rest_BPC**2, (1, 2)) / jnp.maximum(jnp.sum(held_BP1, (1, 2)), 1)
        may_Bl1 = (1 - share_Bl1) ** 2 * left_B[:, None, None]
        may_Bl1 = may_Bl1 + jnp.min(off_BlV, -1, keepdims=True) + 1e-6
        toward_BlV = -FREEDOM / 2 * off_BlV / may_Bl1
        return jnp.where(share_Bl1 > 0, toward_BlV, 0.0)[:, :, None]

    def _walk(
        self, latents_BPC: jax.Array, choose: Callable[[jax.Array, int], jax.Array]
    ) -> Iterator[tuple[jax.Array, jax.Array]]:
        """(tokens of a scale, latents known after it), coarse to fine.

        `choose(rest_BlC, scale)` picks the tokens. No gradient passes from the choice of one scale
        into those that follow.
        """
        rest_BPC = latents_BPC.astype(jnp.float32)
        known_BPC = jnp.zeros_like(rest_BPC)
        for scale in range(len(self.layout.grids)):
            tokens_BlG = choose(self.view(rest_BPC, scale), scale)
            upsampled_BPC = self._upsampled(tokens_BlG, scale)
            known_BPC = known_BPC + upsampled_BPC
            rest_BPC = rest_BPC - jax.lax.stop_gradient(upsampled_BPC)
            yield tokens_BlG, known_BPC

    def _upsampled(self, tokens_BlG: jax.Array, scale: int) -> jax.Array:
        """[B, P, C]: codes of one scale at full size, through phi."""
        codes_BlC = self.inner.decode(tokens_BlG)
        upsampled_BPC = self._resized(codes_BlC, scale, -1, resample.bicubic_torch)
        if not self.convs:
            return upsampled_BPC
        B, P, C = upsampled_BPC.shape
        # accelerators multiply float32 in TF32 or bfloat16 unless told otherwise
        with jax.default_matmul_precision("highest"):
            smooth_BHWC = self.convs[self.which[scale]](
                upsampled_BPC.reshape(B, *self.layout.grids[-1], C)
            )
        smooth_BPC = smooth_BHWC.reshape(B, P, C)
        return (1 - self.ratio) * upsampled_BPC + self.ratio * smooth_BPC

    def _resized(
        self, latents_BlC: jax.Array, source: int, target: int, matrix: Callable
    ) -> jax.Array:
        """From the grid of one scale to that of another."""
        B, _, C = latents_BlC.shape
        image_BHWC = latents_BlC.reshape(B, *self.layout.grids[source], C)
        return resample.resize(image_BHWC, self.layout.grids[target], matrix).reshape(B, -1, C)


def shared(scales: int, phi: int) -> tuple[int, ...]:
    """Which of `phi` convolutions each scale uses: the nearest of as many ticks.

    10 scales and 4 convolutions: 0, 0, 1, 1, 1, 2, 2, 3, 3, 3. The first tick wins a draw.
    """
    if phi == 0:
        return ()
    margin = 1 / 3 / phi if phi == 4 else 1 / 2 / phi  # as published
    ticks = np.linspace(margin, 1 - margin, phi)
    places = [scale / max(scales - 1, 1) for scale in range(scales)]
    return tuple(int(np.argmin(np.abs(ticks - place))) for place in places)


def _built(section: dict, grid: tuple[int, int], rngs: nnx.Rngs) -> nnx.Module:
    """The quantizer of this package that a section names."""
    section = dict(section)
    name, package = section.pop("name", None), __name__.rpartition(".")[0]
    files = sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__))
    module = importlib.import_module(f"{package}.{name}") if name in files else None
    if not hasattr(module, "Quantizer"):
        raise UserError(
            f"quantizer.name must be the name of a quantizer, such as 'vq'; found {name!r}"
        )
    return module.Quantizer(**section, grid=grid, rngs=rngs)
