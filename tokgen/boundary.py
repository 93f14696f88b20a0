"""What is asked of an array where it enters or leaves the library: rank, type, size, values.

Rank, type and size are known while a program is traced, and asking costs nothing. Values are looked
at where they are there to be looked at; of a traced array the compiled program carries a flag for
each image out (`not_finite`), and whoever brings the result to the host asks for it (`refuse`). One
rule of finiteness for images, latents and logits: what is not finite is never turned into a pixel,
a token or a figure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokgen.interfaces import Array, TokenLayout, UserError

SLACK = 1e-3  # beyond [0, 1]: what resizing and rounding leave
NAMED = 5  # images in a message


def known(array: Any) -> bool:
    """Whether the values are there to be looked at: neither traced nor of another process."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


# ---------------------------------------------------------------- finiteness


def not_finite(x: Array) -> Array:
    """[B] true where an entry of a row is not finite; to be carried out of a compiled program."""
    return ~jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))


def damaged(module: Any) -> Array:
    """True where a floating number that a module owns is not finite."""
    leaves = [leaf for leaf in jax.tree.leaves(module) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    found = [~jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
    return jnp.any(jnp.stack(found)) if found else jnp.zeros((), bool)


def refuse(invalid_B: Array, what: str, named: Callable[[int], str] | None = None) -> None:
    """An error that names the images whose flag is set; `named` says what row i is called."""
    rows = np.flatnonzero(np.asarray(invalid_B)).tolist()
    if not rows:
        return
    named = named or (lambda row: str(row))
    listed = ", ".join(named(row) for row in rows[:NAMED])
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    raise UserError(
        f"{what} must be finite; found values that are not in {len(rows)} of {np.size(invalid_B)} "
        f"images: {listed}{more}; either those images hold such values, or the checkpoint's "
        "weights do, since its run diverged or its file is damaged: use an earlier step, or import "
        "it again"
    )


# ---------------------------------------------------------------- images


def images(image: Any, size: tuple[int, ...] | None = None, what: str = "images") -> None:
    """Floating numbers [B, H, W, C] in [0, 1]; `size` is (rows, columns, channels) where known."""
    _ranked(image, 4, what, "[images, rows, columns, channels]", "one image: image[None]")
    _typed(image, jnp.floating, what, "float32 in [0, 1]", "bytes: reconstruction.from_uint8")
    if size is not None and tuple(image.shape[1:]) != tuple(size):
        need, found = (" x ".join(map(str, shape)) for shape in (size, image.shape[1:]))
        raise UserError(
            f"{what} must be of {need} (rows, columns, channels), the size that the tokenizer was "
            f"made for; found {found}: cut or resize them to it"
        )
    if image.size and known(image):
        least, most = _extremes(image)
        if least < -SLACK or most > 1 + SLACK:
            raise UserError(
                f"{what} must lie in [0, 1]; found {least:.4g} to {most:.4g}: divide by 255 what "
                "goes to 255, (x + 1) / 2 of what begins at -1"
            )


def pair(image: Any, decoded: Any) -> None:
    """Images and their reconstructions: of one shape, as `images` has them."""
    for array, what in ((image, "images"), (decoded, "reconstructions")):
        images(array, what=what)
    if image.shape != decoded.shape:
        raise UserError(
            f"images and reconstructions must be of one shape; found {tuple(image.shape)} and "
            f"{tuple(decoded.shape)}: give each image its own"
        )


def latents(latents_BPC: Any, positions: int, channels: int, what: str = "latents") -> None:
    """Floating numbers [B, P, C] of so many positions and channels."""
    _ranked(latents_BPC, 3, what, "[images, positions, channels]", "one image's: latents[None]")
    _typed(latents_BPC, jnp.floating, what, "floating numbers", "tokens: decode")
    if tuple(latents_BPC.shape[1:]) != (positions, channels):
        raise UserError(
            f"{what} must have {positions} positions of {channels} channels; found "
            f"{latents_BPC.shape[1]} of {latents_BPC.shape[2]}: give those of this tokenizer, of "
            "images of its size"
        )


# ---------------------------------------------------------------- tokens and conditions


def tokens(
    tokens_BLG: Any, layout: TokenLayout, *, absent: bool = False, what: str = "tokens"
) -> Array:
    """Integers [B, L, G] of a layout, as int32; `absent`: V may say "nothing here"."""
    _ranked(tokens_BLG, 3, what, "[images, positions, symbols]", "one symbol: tokens[..., None]")
    _typed(tokens_BLG, jnp.integer, what, "integers", "latents: decode_latents")
    if tuple(tokens_BLG.shape[1:]) != (layout.length, layout.groups):
        raise UserError(
            f"{what} must be {layout.length} positions of {layout.groups} symbols each, as the "
            f"layout {layout.grids} has them; found {tokens_BLG.shape[1]} of "
            f"{tokens_BLG.shape[2]}: give those of its tokenizer"
        )
    if tokens_BLG.size and known(tokens_BLG):
        values_BLG = _values(tokens_BLG)
        if absent:  # what is not there belongs to no alphabet
            values_BLG = np.where(values_BLG == layout.absent, 0, values_BLG)
        for symbol, size in enumerate(layout.vocab):
            least, most = _extremes(values_BLG[..., symbol])
            if least < 0 or most >= size:
                raise UserError(
                    f"{what} must lie in 0 to {size - 1}, the alphabet of symbol {symbol}; found "
                    f"{least} to {most}: give those of its own tokenizer"
                )
    # 8 and 16 bits cannot hold every alphabet, and arithmetic on tokens would wrap around
    return jnp.asarray(tokens_BLG, jnp.int32)


def labels(label_B: Any, classes: int, nulls: int = 1) -> Array:
    """Classes [B] as int32: 0 to `classes` - 1, and above them "no class" where there is one."""
    _ranked(label_B, 1, "labels", "[images]", "one label: label[None]")
    _typed(label_B, jnp.integer, "labels", "integers", "names: their numbers")
    if label_B.size and known(label_B):
        least, most = _extremes(label_B)
        if least < 0 or most >= classes + nulls:
            known_as = f"0 to {classes - 1}" if classes else "0, the model is unconditional"
            raise UserError(
                f"labels must be {known_as}; found {least} to {most}"
                + (": `null` gives the label of no class" if nulls and classes else "")
            )
    return jnp.asarray(label_B, jnp.int32)


def orders(order_BL: Any, layout: TokenLayout) -> None:
    """Integers [B, L], a permutation of the positions in every row."""
    _ranked(order_BL, 2, "orders", "[images, places]", "one order: order[None]")
    _typed(order_BL, jnp.integer, "orders", "integers", "positions: their numbers")
    good = order_BL.shape[1] == layout.length
    if good and known(order_BL):
        good = (np.sort(_values(order_BL), axis=1) == np.arange(layout.length)[None]).all()
    if not good:
        raise UserError(
            f"orders must be permutations of the {layout.length} positions; found rows of "
            f"{order_BL.shape[1]} that are none: use orders.named(NAME)"
        )


def rows(**trees: Any) -> None:
    """An error where arrays, or trees of them, do not lead with as many images; None is no tree."""
    found = {what: len(leaf) for what, tree in trees.items() for leaf in jax.tree.leaves(tree)}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{what} of {count}" for what, count in found.items())
        raise UserError(
            f"all must be of as many images; found {listed}: give one of each per image"
        )


def _ranked(array: Any, rank: int, what: str, form: str, remedy: str) -> None:
    shape = tuple(np.shape(array)) if not hasattr(array, "shape") else tuple(array.shape)
    if not hasattr(array, "dtype"):
        raise UserError(f"{what} must be an array {form}; found {type(array).__name__}")
    if len(shape) != rank:
        raise UserError(f"{what} must be an array {form}; found the shape {shape}; of {remedy}")


def _typed(array: Any, kind: Any, what: str, need: str, remedy: str) -> None:
    if not jnp.issubdtype(array.dtype, kind):
        raise UserError(f"{what} must be {need}; found {array.dtype}; of {remedy}")


def _values(array: Any) -> np.ndarray:
    # on the host: in the middle of a trace even the sum of known numbers is traced
    return np.asarray(jax.device_get(array))


def _extremes(array: Any) -> tuple[Any, Any]:
    values = _values(array)
    return values.min(), values.max()
