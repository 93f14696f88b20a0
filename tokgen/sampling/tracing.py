"""The picture of a decode: what of an image is known after each of its steps.

Tokens with a place show their part of the finished image from the step on that drew them. Those of
a pyramid of grids add up: each frame is the decode of the scales so far. Tokens without a place
are each of the whole image: a frame is the decode of those so far, with the mean latent of the
image in the place of the others.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import boundary, rng, sharding
from tokgen.interfaces import Generator, PyTree, Quantizer, Sampler, TokenLayout
from tokgen.metrics import reconstruction
from tokgen.sampling import decode, drawing

FRAMES = 24  # at most, beside the first, of which nothing is known
GRAY = 160  # of what is not known yet


def trace(
    generator: Generator,
    tokenizer,
    cond: PyTree,
    sampler: Sampler,
    *,
    seed: int,
    index_N: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 frames [S, N, H, W, 3], [S] how many steps each is after) of images by their numbers.

    The last frame is what `drawing.draw` gives of the same numbers.
    """
    generator.check(cond)
    mesh, N = sharding.current(), len(index_N)
    batch = drawing.even(N, N, sharding.ways(mesh))
    asked = cond, rng.data_per_image(seed, "sample", np.asarray(index_N))
    cond_B, data_B2 = sharding.filled(asked, batch, mesh)
    keys_B = jax.random.wrap_key_data(data_B2)
    with jax.set_mesh(mesh):
        found = _tokens(decode.laid_out(generator), tokenizer.quantizer, cond_B, keys_B, sampler)
        tokens_BLG, when_BL, invalid_B = map(np.asarray, found)
        boundary.refuse(invalid_B[:N], "logits", lambda row: f"number {index_N[row]}")
        after_S = shown(generator.layout, decode.steps(generator), when_BL)
        make = _of_scales if len(generator.layout.grids) > 1 else _of_places
        if generator.layout.grids[-1][0] == 1:  # a row of tokens is no grid of an image
            make = _of_all
        frames_SNHW3 = make(tokenizer, tokens_BLG, when_BL, after_S)
    return frames_SNHW3[:, :N], after_S


@functools.partial(drawing.Program, static_argnames=("sampler",))
def _tokens(
    generator: Generator, codec: Quantizer | None, cond: PyTree, keys_B: jax.Array, sampler: Sampler
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens_BLG, when_BL, invalid_B)."""

    def of(generator, codec, cond, keys_B):
        state = decode.generate(generator, codec, cond, sampler, keys_B=keys_B, noted=True)
        return state.tokens_BLG, state.when_BL, state.invalid_B

    return sharding.by_rows(of, (generator, codec), (cond, keys_B))


def shown(layout: TokenLayout, steps: int, when_BL: np.ndarray) -> np.ndarray:
    """[S] after how many steps there is a frame: none, then evenly; of grids after each."""
    if len(layout.grids) > 1:
        ends = [when_BL[:, start : start + size].max() + 1 for start, size in layout.spans]
        return np.array([0, *ends])
    count = min(steps, FRAMES)
    return np.array([0, *(-(-steps * (n + 1) // count) for n in range(count))])


def _of_places(tokenizer, tokens_BLG, when_BL, after_S) -> np.ndarray:
    """Cells of the finished image."""
    image_BHW3 = _pixels(tokenizer, tokenizer.quantizer.decode(jnp.asarray(tokens_BLG)))
    rows, columns = tokenizer.layout.grids[0]
    _, H, W, _ = image_BHW3.shape
    row_H, column_W = np.arange(H) * rows // H, np.arange(W) * columns // W
    cell_HW = row_H[:, None] * columns + column_W[None]
    when_BHW1 = when_BL[:, cell_HW][..., None]
    return np.stack([np.where(when_BHW1 < after, image_BHW3, GRAY) for after in after_S]).astype(
        np.uint8
    )


def _of_scales(tokenizer, tokens_BLG, when_BL, after_S) -> np.ndarray:
    """Decodes of the latents that are known after each scale."""
    known = tokenizer.quantizer.partial(jnp.asarray(tokens_BLG))
    frames = [_pixels(tokenizer, latents_BPC) for latents_BPC in known]
    return np.stack([np.full_like(frames[0], GRAY), *frames])


def _of_all(tokenizer, tokens_BLG, when_BL, after_S) -> np.ndarray:
    """Decodes of the tokens that are known."""
    latents_BPC = tokenizer.quantizer.decode(jnp.asarray(tokens_BLG))
    mean_B1C = latents_BPC.mean(1, keepdims=True)
    frames = [
        _pixels(tokenizer, jnp.where(when_BL[..., None] < after, latents_BPC, mean_B1C))
        for after in after_S[1:]
    ]
    return np.stack([np.full_like(frames[0], GRAY), *frames])


@jax.jit
def _decoded(tokenizer, latents_BPC):
    def of(tokenizer, latents_BPC):
        return reconstruction.bytes_of(tokenizer.decode_latents(latents_BPC))

    return sharding.by_rows(of, (tokenizer,), (latents_BPC,))


def _pixels(tokenizer, latents_BPC: jax.Array) -> np.ndarray:
    image_BHW3, broken_B = _decoded(tokenizer, latents_BPC)
    boundary.refuse(np.asarray(broken_B), "what the decoder gives")
    return np.asarray(image_BHW3)
