"""Vision transformers that write an image into a few tokens of one dimension, and read them back.

TiTok (arXiv:2406.07550) and its relatives with text (TA-TiTok, arXiv:2501.07730). The encoder sees
the patches followed by learned latent tokens, whose outputs are the latents. The decoder sees a
mask token for every patch followed by the latents, and by text features where it was given any;
what stands at the masks becomes pixels. Both begin with a class token that nobody reads.
"""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import choices, ranges
from tokgen.interfaces import UserError
from tokgen.nn import blocks, conv, linear, transformer, variants
from tokgen.nn.precision import Precision


def cells(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """(rows, columns) of the patches of an image."""
    if size[0] % patch or size[1] % patch:
        raise UserError(
            f"the image must be divisible by its patches: size={tuple(size)}, patch={patch}"
        )
    return size[0] // patch, size[1] // patch


class Table(nnx.Module):
    """Learned rows [l, D], of the scale D^-0.5."""

    def __init__(self, length: int, width: int, *, precision: Precision, rngs: nnx.Rngs):
        rows = jax.random.normal(rngs.params(), (length, width), precision.params_dtype)
        self.table = nnx.Param(rows * width**-0.5)

    def __call__(self, rows: int) -> jax.Array:
        """[rows, l, D]: all rows alike, one per image of a batch."""
        table_lD = self.table[...]
        return jnp.broadcast_to(table_lD[None], (rows, *table_lD.shape))


def _gain(std: linear.Std, fan_in: int) -> float:
    """The gain with which a convolution starts at the spread that linear maps have."""
    # Conv draws with gain / sqrt(fan in) and cuts at two of it, which leaves 0.8796 of the spread
    return std(fan_in) * fan_in**0.5 / 0.8796


def in_order(x_BPD: jax.Array) -> jax.Array:
    """A token's vector is its own output."""
    return x_BPD


def reinterpreted(x_BPD: jax.Array) -> jax.Array:
    """[B, P, D] read in memory as [B, D, P]: channel c of token n is number c P + n of the P D.

    A transpose that was left out; the two-stage TiTok weights were trained with it.
    """
    B, P, D = x_BPD.shape
    return jnp.swapaxes(x_BPD.reshape(B, D, P), 1, 2)


Patch = Annotated[int, ranges.Range(1, 1024)]
READOUTS = {"in_order": in_order, "reinterpreted": reinterpreted}


class Encoder(nnx.Module):
    """Images [B, H, W, 3] to latents [B, tokens, C].

    Args:
        latent: numbers per token; of a Gaussian bottleneck mean and log-variance.
        readout: how the outputs of the last block are read, one of READOUTS.
    """

    places = False  # every token is of the whole image

    @ranges.checked
    def __init__(
        self,
        *,
        channels: int,
        latent: int,
        size: tuple[int, int],
        tokens: ranges.Positions,
        width: ranges.Width,
        depth: ranges.Depth,
        heads: ranges.Heads,
        patch: Patch = 16,
        readout: str = "in_order",
        variant: str = "vit",
        remat: str = "none",
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        variant, options = variants.named(variant), dict(precision=precision, rngs=rngs)
        rows, columns = cells(size, patch)
        self.order = choices.named(READOUTS, readout, "readout")
        gain = _gain(variant.std, patch * patch * channels)
        self.conv_patch = conv.Conv(channels, width, patch, stride=patch, gain=gain, **options)
        self.first = Table(1, width, **options)
        self.positions = Table(1 + rows * columns, width, **options)
        self.latents = Table(tokens, width, **options)
        self.latent_positions = Table(tokens, width, **options)
        self.norm_in = variant.norm(width, **options)
        self.transformer = transformer.Transformer(
            blocks.Config(width, depth, heads, variant, remat=remat), **options
        )
        self.norm_out = variant.norm(width, **options)
        self.readout = linear.Linear(width, latent, bias=True, std=variant.std, **options)

    @staticmethod
    @ranges.checked
    def grid(
        size: tuple[int, int], *, tokens: ranges.Positions, patch: Patch = 16, **others
    ) -> tuple[int, int]:
        """(rows, columns) of the latents: a single row."""
        del others
        cells(size, patch)  # raises here, at construction
        return 1, tokens

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        """[B, H, W, 3] in the tokenizer's range -> [B, P, C]."""
        B, tokens = len(image_BHW3), self.latents.table.shape[0]
        x_BHWD = self.conv_patch(image_BHW3)
        patches_BLD = x_BHWD.reshape(B, -1, x_BHWD.shape[-1])
        image_BLD = jnp.concatenate([self.first(B), patches_BLD], axis=1) + self.positions(B)
        latents_BPD = self.latents(B) + self.latent_positions(B)
        x_BlD = self.norm_in(jnp.concatenate([image_BLD, latents_BPD], axis=1))
        x_BlD, _ = self.transformer(x_BlD)
        return self.readout(self.order(self.norm_out(x_BlD[:, -tokens:])))


class Pixels(nnx.Module):
    """A patch per position, then a 3 x 3 convolution over the image that smooths their seams."""

    def __init__(
        self,
        width: int,
        channels: int,
        grid: tuple[int, int],
        patch: int,
        *,
        std: linear.Std,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        options = dict(precision=precision, rngs=rngs)
        self.patches = linear.Linear(width, patch**2 * channels, bias=True, std=std, **options)
        self.conv_out = conv.Conv(channels, channels, gain=_gain(std, 9 * channels), **options)
        self.grid, self.patch = grid, patch

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        """[B, P, D] -> [B, H, W, 3]; the numbers of a patch are ordered row, column, colour."""
        x_BHWC = self.patches(x_BPD).reshape(len(x_BPD), *self.grid, -1)
        return self.conv_out(conv.depth_to_space(x_BHWC, self.patch))


class Codes(nnx.Module):
    """Logits over `channels` codes of another tokenizer: two maps with a tanh between them."""

    def __init__(
        self, width: int, channels: int, *_, std: linear.Std, precision: Precision, rngs: nnx.Rngs
    ):
        options = dict(bias=True, std=std, precision=precision, rngs=rngs)
        self.hidden = linear.Linear(width, 2 * width, **options)
        self.logits = linear.Linear(2 * width, channels, **options)

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        """[B, P, D] -> [B, P, V]."""
        # float32: differences of logits decide draws and losses
        return self.logits(jnp.tanh(self.hidden(x_BPD))).astype(jnp.float32)


HEADS = {"pixels": Pixels, "codes": Codes}


class Text(nnx.Module):
    """Text features [B, l, inputs] as slots of the sequence."""

    def __init__(
        self,
        length: int,
        inputs: int,
        width: int,
        *,
        std: linear.Std,
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        options = dict(precision=precision, rngs=rngs)
        self.embed = linear.Linear(inputs, width, bias=True, std=std, **options)
        self.positions = Table(length, width, **options)
        self.shape = (length, inputs)

    def __call__(self, cond: jax.Array | None, rows: int) -> list[jax.Array]:
        """What is appended to the sequence: [[B, l, D]]."""
        if cond is None or cond.shape != (rows, *self.shape):
            found = "none" if cond is None else cond.shape
            raise UserError(
                f"this decoder needs text features of shape {(rows, *self.shape)} as `cond`; "
                f"found {found}; for an image without a text, those of the empty text"
            )
        return [self.embed(cond) + self.positions(rows)]


class NoText(nnx.Module):
    """Nothing is appended."""

    def __call__(self, cond: jax.Array | None, rows: int) -> list[jax.Array]:
        """[], and no features are taken."""
        if cond is not None:
            raise UserError("this decoder takes no text features; found some as `cond`")
        return []


class Decoder(nnx.Module):
    """Latents [B, tokens, C] to what the head makes of every patch.

    Args:
        channels: colours of a pixel with head="pixels", codes with head="codes".
        text: (length, channels) of the text features that it is given; None without.
    """

    places = False  # every token is of the whole image

    @ranges.checked
    def __init__(
        self,
        *,
        channels: int,
        latent: int,
        size: tuple[int, int],
        grid: tuple[int, int] | None = None,
        tokens: ranges.Positions,
        width: ranges.Width,
        depth: ranges.Depth,
        heads: ranges.Heads,
        patch: Patch = 16,
        head: str = "pixels",
        text: tuple[ranges.Positions, ranges.Width] | None = None,
        variant: str = "vit",
        remat: str = "none",
        precision: Precision,
        rngs: nnx.Rngs,
    ):
        variant, options = variants.named(variant), dict(precision=precision, rngs=rngs)
        self.grid, self.channels = cells(size, patch), channels
        if grid is not None and grid[0] * grid[1] != tokens:
            raise UserError(
                f"the decoder must read as many tokens as the latents have positions, "
                f"{grid[0] * grid[1]}; found tokens={tokens}"
            )
        self.embed = linear.Linear(latent, width, bias=True, std=variant.std, **options)
        self.first = Table(1, width, **options)
        self.mask = Table(1, width, **options)
        self.positions = Table(1 + self.grid[0] * self.grid[1], width, **options)
        self.latent_positions = Table(tokens, width, **options)
        self.text = NoText() if text is None else Text(*text, width, std=variant.std, **options)
        self.norm_in = variant.norm(width, **options)
        self.transformer = transformer.Transformer(
            blocks.Config(width, depth, heads, variant, remat=remat), **options
        )
        self.norm_out = variant.norm(width, **options)
        make = choices.named(HEADS, head, "head")
        self.head = make(width, channels, self.grid, patch, std=variant.std, **options)

    def __call__(self, latents_BPC: jax.Array, cond: jax.Array | None = None) -> jax.Array:
        """[B, P, C], text features -> [B, H, W, 3] in the tokenizer's range, or [B, L, V]."""
        B, patches = len(latents_BPC), self.grid[0] * self.grid[1]
        masks_BLD = jnp.repeat(self.mask(B), patches, axis=1)
        image_BLD = jnp.concatenate([self.first(B), masks_BLD], axis=1) + self.positions(B)
        latents_BPD = self.embed(latents_BPC) + self.latent_positions(B)
        sequence = [image_BLD, latents_BPD, *self.text(cond, B)]
        x_BlD, _ = self.transformer(self.norm_in(jnp.concatenate(sequence, axis=1)))
        return self.head(self.norm_out(x_BlD[:, 1 : 1 + patches]))
