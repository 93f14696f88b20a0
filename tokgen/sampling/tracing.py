"""The picture of a decode: what of an image is known after each of its steps.

Tokens with a place show their part of the finished image from the step on that drew them. Those of
a pyramid of grids, drawn grid by grid, add up: each frame is the decode of the grids so far. Tokens
without a place are each of the whole image: a frame is the decode of those so far, with the mean
latent of the image in the place of the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import boundary, rng, sharding
from tokgen.interfaces import Generator, PyTree, Quantizer, Sampler, TokenLayout
from tokgen.metrics import reconstruction
from tokgen.sampling import decode, drawing, memory

FRAMES = 24  # at most, beside the first, of which nothing is known
GRAY = 160  # of what is not known yet

# (quantizer, number of a grid, arrays of tokens and the like) -> latents_BPC
Latents = Callable[..., jax.Array]


def trace(
    generator: Generator,
    tokenizer: nnx.Module,
    cond: PyTree,
    sampler: Sampler,
    *,
    seed: int,
    index_N: np.ndarray,
    batch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 frames [S, N, H, W, 3], [S] how many steps each is after) of images by their numbers.

    The last frame is what `drawing.draw` gives of the same numbers.
    """
    generator.check(cond)
    mesh, N = sharding.current(), len(index_N)
    batch = drawing.even(N, batch, sharding.ways(mesh))
    memory.check(generator, tokenizer.quantizer, cond, sampler, batch, mesh)
    generator, steps = decode.laid_out(generator), decode.steps(generator)
    tokens, when = [], []
    for start in range(0, N, batch):
        part = slice(start, start + batch)
        asked = jax.tree.map(lambda leaf, part=part: np.asarray(leaf)[part], cond)
        data_B2 = rng.data_per_image(seed, "sample", np.asarray(index_N)[part])
        cond_B, data_B2 = sharding.filled((asked, data_B2), batch, mesh)
        with jax.set_mesh(mesh):
            found = _tokens(
                *(generator, tokenizer.quantizer, cond_B),
                *(jax.random.wrap_key_data(data_B2), sampler),
            )
        tokens_BLG, when_BL, invalid_B = (np.asarray(a)[: N - start] for a in found)
        boundary.refuse(invalid_B, "logits", lambda row, start=start: _number(index_N, start + row))
        tokens.append(tokens_BLG)
        when.append(when_BL)
    tokens_NLG, when_NL = np.concatenate(tokens), np.concatenate(when)
    after_S = shown(generator.layout, steps, when_NL)
    make = _of_places if tokenizer.decoder.places else _of_all
    make = _of_grids if grid_by_grid(generator.layout, when_NL) else make
    pixels = functools.partial(_pixels, tokenizer, index_N, batch)
    return make(pixels, tokenizer.layout, tokens_NLG, when_NL, after_S), after_S


@functools.partial(drawing.Program, static_argnames=("sampler",))
def _tokens(
    generator: Generator, codec: Quantizer | None, cond: PyTree, keys_B: jax.Array, sampler: Sampler
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens_BLG, when_BL, invalid_B)."""

    def of(generator, codec, cond, keys_B):
        state = decode.generate(generator, codec, cond, sampler, keys_B=keys_B, noted=True)
        return state.tokens_BLG, state.when_BL, state.invalid_B

    return sharding.by_rows(of, (generator, codec), (cond, keys_B))


def grid_by_grid(layout: TokenLayout, when_NL: np.ndarray) -> bool:
    """Whether each of several grids was whole before the next one began."""
    parts = [when_NL[:, start : start + size] for start, size in layout.spans]
    pairs = zip(parts[:-1], parts[1:], strict=True)
    return len(parts) > 1 and all(a.max() < b.min() for a, b in pairs)


def shown(layout: TokenLayout, steps: int, when_NL: np.ndarray) -> np.ndarray:
    """[S] after how many steps there is a frame: none, then evenly; of grids after each."""
    if grid_by_grid(layout, when_NL):
        ends = [when_NL[:, start : start + size].max() + 1 for start, size in layout.spans]
        return np.array([0, *ends])
    count = min(steps, FRAMES)
    return np.array([0, *(-(-steps * (n + 1) // count) for n in range(count))])


def _of_places(pixels, layout, tokens_NLG, when_NL, after_S) -> np.ndarray:
    """Cells of the finished image; of several grids, once a token of each is known there."""
    image_NHW3 = pixels(_whole, tokens_NLG)
    _, H, W, _ = image_NHW3.shape
    when_NHW1 = np.full((len(image_NHW3), H, W, 1), -1)
    for (start, _), (rows, columns) in zip(layout.spans, layout.grids, strict=True):
        row_H, column_W = np.arange(H) * rows // H, np.arange(W) * columns // W
        place_HW = start + row_H[:, None] * columns + column_W[None]
        when_NHW1 = np.maximum(when_NHW1, when_NL[:, place_HW][..., None])
    return np.stack([np.where(when_NHW1 < n, image_NHW3, np.uint8(GRAY)) for n in after_S])


def _of_grids(pixels, layout, tokens_NLG, when_NL, after_S) -> np.ndarray:
    """Decodes of the latents that are known after each grid."""
    return _gray_first(
        [pixels(_upto, tokens_NLG, scale=scale) for scale in range(len(layout.grids))]
    )


def _of_all(pixels, layout, tokens_NLG, when_NL, after_S) -> np.ndarray:
    """Decodes of the tokens that are known."""
    return _gray_first([pixels(_so_far, tokens_NLG, when_NL < n) for n in after_S[1:]])


def _gray_first(frames: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.full_like(frames[0], GRAY), *frames])


def _whole(quantizer: Quantizer, scale: int, tokens_BLG: jax.Array) -> jax.Array:
    return quantizer.decode(tokens_BLG)


def _upto(quantizer: Quantizer, scale: int, tokens_BLG: jax.Array) -> jax.Array:
    return quantizer.partial(tokens_BLG)[scale]


def _so_far(
    quantizer: Quantizer, scale: int, tokens_BLG: jax.Array, known_BL: jax.Array
) -> jax.Array:
    latents_BPC = quantizer.decode(tokens_BLG)
    mean_B1C = latents_BPC.mean(1, keepdims=True)
    if latents_BPC.shape[1] != known_BL.shape[1]:  # grids that came out of order
        known_BL = jnp.all(known_BL, axis=1, keepdims=True)
    return jnp.where(known_BL[..., None], latents_BPC, mean_B1C)


@functools.partial(jax.jit, static_argnames=("latents", "scale"))
def _decoded(tokenizer: nnx.Module, arrays: tuple[jax.Array, ...], latents: Latents, scale: int):
    def of(tokenizer, *arrays):
        latents_BPC = latents(tokenizer.quantizer, scale, *arrays)
        return reconstruction.bytes_of(tokenizer.decode_latents(latents_BPC))

    return sharding.by_rows(of, (tokenizer,), arrays)


def _pixels(
    tokenizer: nnx.Module,
    index_N: np.ndarray,
    batch: int,
    latents: Latents,
    *arrays: np.ndarray,
    scale: int = 0,
) -> np.ndarray:
    """uint8 [N, H, W, 3] of the latents that a function makes of arrays, part by part."""
    mesh, found = sharding.current(), []
    for start in range(0, len(index_N), batch):
        part = tuple(array[start : start + batch] for array in arrays)
        with jax.set_mesh(mesh):
            filled = sharding.filled(part, batch, mesh)
            image_BHW3, broken_B = _decoded(tokenizer, filled, latents, scale)
        count = len(part[0])
        boundary.refuse(
            np.asarray(broken_B)[:count],
            "what the decoder gives",
            lambda row, start=start: _number(index_N, start + row),
        )
        found.append(np.asarray(image_BHW3)[:count])
    return np.concatenate(found)


def _number(index_N: np.ndarray, place: int) -> str:
    return f"number {index_N[place]}"
