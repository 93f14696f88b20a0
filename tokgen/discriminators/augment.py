"""Differentiable augmentation (arXiv:2006.10738) of what a discriminator sees, real or fake.

Images are in [-1, 1], as discriminators see them; each of a batch is changed by its own draw.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tokgen import rng

KINDS = ("color", "translation", "cutout")  # in the paper's order


def augment(
    image_BHW3: jax.Array,
    key: jax.Array,
    *,
    kinds: tuple[str, ...] = KINDS,
    translation: float = 0.125,
    cutout: float = 0.2,
) -> jax.Array:
    """The kinds that are named, one after another; shares of the image's size."""
    change = dict(
        color=functools.partial(colored, key=rng.use(key, rng.COLOR)),
        translation=functools.partial(
            translated, key=rng.use(key, rng.TRANSLATION), share=translation
        ),
        cutout=functools.partial(cut_out, key=rng.use(key, rng.CUTOUT), share=cutout),
    )
    for kind in kinds:
        image_BHW3 = change[kind](image_BHW3)
    return image_BHW3


def colored(image_BHW3: jax.Array, key: jax.Array) -> jax.Array:
    """Brightness +-0.5, then saturation times 0 to 2, then contrast times 0.5 to 1.5."""
    draws_3B = jax.random.uniform(key, (3, len(image_BHW3)))
    brightness, saturation, contrast = draws_3B.reshape(3, -1, 1, 1, 1)
    image_BHW3 = image_BHW3 + brightness - 0.5
    gray_BHW1 = image_BHW3.mean(3, keepdims=True)
    image_BHW3 = gray_BHW1 + 2 * saturation * (image_BHW3 - gray_BHW1)
    mean_B111 = image_BHW3.mean((1, 2, 3), keepdims=True)
    return mean_B111 + (contrast + 0.5) * (image_BHW3 - mean_B111)


def translated(image_BHW3: jax.Array, key: jax.Array, share: float) -> jax.Array:
    """Moved by up to `share` of each side; what comes into view is zero."""
    for axis, each in zip((1, 2), rng.numbered(key, 2), strict=True):
        size = image_BHW3.shape[axis]
        most = int(size * share + 0.5)
        shift_B1 = jax.random.randint(each, (len(image_BHW3), 1), -most, most + 1)
        place_Bs = jnp.arange(size)[None, :] + shift_B1
        inside = _along(axis, (place_Bs >= 0) & (place_Bs < size))
        place = _along(axis, jnp.clip(place_Bs, 0, size - 1))
        image_BHW3 = jnp.take_along_axis(image_BHW3, place, axis) * inside
    return image_BHW3


def cut_out(image_BHW3: jax.Array, key: jax.Array, share: float) -> jax.Array:
    """A rectangle of `share` of each side is zero; at the border a part of it lies outside."""
    hidden = jnp.ones((len(image_BHW3), 1, 1, 1), bool)
    for axis, each in zip((1, 2), rng.numbered(key, 2), strict=True):
        size = image_BHW3.shape[axis]
        length = int(size * share + 0.5)
        centre_B1 = jax.random.randint(each, (len(image_BHW3), 1), 0, size + 1 - length % 2)
        start_B1 = centre_B1 - length // 2
        place_1s = jnp.arange(size)[None, :]
        inside_Bs = (place_1s >= start_B1) & (place_1s < start_B1 + length)
        hidden = hidden & _along(axis, inside_Bs)
    return jnp.where(hidden, 0, image_BHW3)


def _along(axis: int, values_Bs: jax.Array) -> jax.Array:
    """[B, s] -> [B, s, 1, 1] or [B, 1, s, 1]."""
    return values_Bs[:, :, None, None] if axis == 1 else values_Bs[:, None, :, None]
