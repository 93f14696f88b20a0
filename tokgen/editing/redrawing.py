"""Pixels drawn anew, and all others as they were: in-painting by every family that can.

An image's tokens are held fixed but for those that a region frees, and a generator draws these. A
masked one, and one in random order, sees all that is held at every draw; one with an order of its
own sees what comes before, and of what comes later it is told by particles (`sampling.particles`).
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from tokgen import tokens as coding
from tokgen.checkpoints import loading
from tokgen.editing import regions
from tokgen.errors import UserError
from tokgen.interfaces import Generator, PyTree, Sampler
from tokgen.sampling import drawing

PARTICLES = 64  # with 32, a top half over shapes has now and then another colour than the rest
DELAY = 2  # seconds before a draw says how far it is


@dataclasses.dataclass(frozen=True)
class Model:
    """What an edit needs of a model.

    Args:
        generator, sampler: as they draw.
        encoder, decoder: the tokenizer, as it encodes and as it decodes.
    """

    generator: Generator
    sampler: Sampler
    encoder: loading.Loaded
    decoder: loading.Loaded


@dataclasses.dataclass(frozen=True)
class How:
    """How tokens are drawn: the seed, particles where they are needed, images at a time, the name
    of the job on a progress bar."""

    seed: int = 0
    particles: int = PARTICLES
    batch: int = 32
    what: str = ""


def redraw(
    model: Model,
    image_KHW3: np.ndarray,
    mask_KHW: np.ndarray,
    source_N: np.ndarray,
    cond: PyTree,
    index_N: np.ndarray,
    how: How,
    *,
    feather: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_NLG, uint8 image_NHW3) of images with what their masks mark drawn anew.

    Draw n is of image `source_N[n]`, and depends on (seed, `index_N[n]`, the image, its mask, the
    condition): not on other images, nor on what the image has in the mask. `cond` leads with the
    draws.
    """
    free_KL = regions.free(mask_KHW, model.generator.layout)
    check_places(model, free_KL)
    filled = [regions.filled(*pair) for pair in zip(image_KHW3, mask_KHW, strict=True)]
    seen_KHW3, kept_NPC = np.stack(filled), None
    tokens_KLG = coding.encode(model.encoder, seen_KHW3, batch=how.batch)
    if getattr(model.generator, "holds_latents", False):
        kept_NPC = coding.latents(model.encoder, seen_KHW3, batch=how.batch)[source_N]
    asked = (tokens_KLG[source_N], free_KL[source_N], cond, index_N, how)
    tokens_NLG, drawn_NHW3 = draw(model, *asked, kept_NPC=kept_NPC)
    rows = zip(source_N, drawn_NHW3, strict=True)
    joined = [regions.joined(image_KHW3[k], drawn, mask_KHW[k], feather) for k, drawn in rows]
    return tokens_NLG, np.stack(joined)


def draw(
    model: Model,
    tokens_NLG: np.ndarray,
    free_NL: np.ndarray,
    cond: PyTree,
    index_N: np.ndarray,
    how: How,
    *,
    kept_NPC: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_NLG, uint8 image_NHW3) with the tokens that are free drawn anew.

    `kept_NPC` are the latents of the images, of which the tokens of a pyramid of grids are what
    coarser ones leave: where these are drawn anew, a token that stays stands for something else.
    """
    held_NLG = np.repeat(~free_NL[..., None], model.generator.layout.groups, axis=-1)
    blind_N = blind(model.generator, free_NL)
    tokens, images = [None] * len(tokens_NLG), [None] * len(tokens_NLG)
    for particles, rows_M in (
        (1, np.flatnonzero(~blind_N)),
        (how.particles, np.flatnonzero(blind_N)),
    ):
        if not len(rows_M):
            continue
        drawn = drawing.draw(
            *(model.generator, model.decoder.module),
            *(jax.tree.map(lambda leaf, rows_M=rows_M: leaf[rows_M], cond), model.sampler),
            seed=how.seed,
            batch=max(1, how.batch // particles),
            index_N=index_N[rows_M],
            given=(tokens_NLG[rows_M], held_NLG[rows_M]),
            kept=None if kept_NPC is None else kept_NPC[rows_M],
            particles=particles,
            what=how.what,
            delay=DELAY,
        )
        for row, *found in zip(rows_M.tolist(), *drawn, strict=True):
            tokens[row], images[row] = found
    return np.stack(tokens), np.stack(images)


def blind(generator: Generator, free_NL: np.ndarray) -> np.ndarray:
    """[N] true where a token is drawn before one that is held, and without seeing it."""
    if generator.sees_given:
        return np.zeros(len(free_NL), bool)
    step_L = _steps(generator)
    first_N1 = np.where(free_NL, step_L, len(step_L)).min(1, keepdims=True)
    return (~free_NL & (step_L >= first_N1)).any(1)


def _steps(generator: Generator) -> np.ndarray:
    """[L] the number of the step that draws each token, in the generator's own order."""
    order_L = np.asarray(generator.order(generator.layout, jax.random.key(0)))
    step_L = np.empty(len(order_L), int)
    for phase in generator.plan():
        for index in range(phase.first, phase.first + phase.steps):
            at = phase.place(index)
            step_L[order_L[at : at + phase.size]] = index
    return step_L


def check_places(model: Model, free_NL: np.ndarray) -> None:
    """UserError where tokens have no place in the image, and a part of it is asked for."""
    if not model.encoder.module.encoder.places and not (free_NL.all(1) | ~free_NL.any(1)).all():
        raise UserError(
            "a part of an image needs tokens that lie on its grid; found a tokenizer of "
            f"{model.generator.layout.length} tokens of which each is of the whole image: use "
            "a generator over a 2-D tokenizer, or --strength, which draws some tokens anew"
        )
