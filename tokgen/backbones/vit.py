"""A frozen vision transformer with its blocks stacked, and how published arrays come into it.

Norms stand before attention and MLP. What publishers differ in are values: names and orders of
axes (a `Form`), the activation, the epsilon of the norms, arrays that one has and another lacks.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import weights as files

HIGHEST = jax.lax.Precision.HIGHEST

# Axes: D width, T = 3 D (query, key, value), A = D (heads side by side), F hidden width of the MLP,
# L positions, P x Q pixels of a patch, E width of a head on top.
SINGLE = {
    "token": "D",
    "positions": "LD",
    "patches_kernel": "PQ3D",
    "patches_bias": "D",
    "norm_in_scale": "D",
    "norm_in_bias": "D",
    "norm_out_scale": "D",
    "norm_out_bias": "D",
    "head_kernel": "DE",
}
BLOCK = {
    "norm_attention_scale": "D",
    "norm_attention_bias": "D",
    "qkv_kernel": "DT",
    "qkv_bias": "T",
    "out_kernel": "AD",
    "out_bias": "D",
    "out_gain": "D",
    "norm_mlp_scale": "D",
    "norm_mlp_bias": "D",
    "up_kernel": "DF",
    "up_bias": "F",
    "down_kernel": "FD",
    "down_bias": "D",
    "down_gain": "D",
}


@dataclasses.dataclass(frozen=True)
class Form:
    """How a publisher calls arrays, and the axes it gives them.

    `block` is the name of block {}; what it holds may be published in parts along the first axis.
    """

    single: Mapping[str, tuple[str, str]]  # ours: (name, axes)
    block: str
    parts: Mapping[str, tuple[tuple[str, ...], str]]  # ours: (names, axes of the whole)
    unused: str  # pattern of what else may lie in the file

    def sizes(self, weights: files.Weights, published: Mapping[str, int]) -> dict[str, int]:
        """The length of every axis by its letter, and Y blocks; `published` where it is absent."""
        pattern = re.escape(self.block).replace(r"\{\}", r"(\d+)")
        found = {match[1] for key in weights if (match := re.match(pattern, key))}
        sizes = dict(published) | {"1": 1, "3": 3}
        sizes["Y"] = len(found) or sizes["Y"]
        first = {self.block.format(0) + names[0]: axes for names, axes in self.parts.values()}
        votes = {letter: collections.Counter() for letter in "DFLPE"}
        for key, axes in [*self.single.values(), *first.items()]:
            array = weights.get(key)
            if array is not None and array.ndim == len(axes):
                for letter, length in zip(axes, array.shape, strict=True):
                    votes.get(letter, collections.Counter())[length] += 1
        # the commonest length: one wrong array is then told apart from the others
        sizes |= {a: votes[a].most_common(1)[0][0] for a in votes if votes[a]}
        # the table's first row belongs to the token, the others are a square
        sizes["L"] = 1 + math.isqrt(max(sizes["L"] - 1, 0)) ** 2
        return sizes | {"T": 3 * sizes["D"], "A": sizes["D"], "Q": sizes["P"]}

    def needed(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The shape of every published array."""
        needed = {key: _shape(axes, sizes) for key, axes in self.single.values()}
        for number in range(sizes["Y"]):
            for names, axes in self.parts.values():
                first, *rest = _shape(axes, sizes)
                keys = [self.block.format(number) + name for name in names]
                needed |= dict.fromkeys(keys, (first // len(names), *rest))
        return needed

    def take(
        self, weights: files.Weights, published: Mapping[str, int], *, what: str, source: str
    ) -> dict[str, np.ndarray]:
        """All arrays by our names in our axes, those of blocks stacked [Y, ...], in float32."""
        weights = {key: a for key, a in weights.items() if not re.match(self.unused, key)}
        sizes = self.sizes(weights, published)
        blocks = [self.block.format(number) for number in range(sizes["Y"])]
        files.check(self.needed(sizes), weights, what=what, source=source)
        if min(sizes.values()) < 1 or sizes["L"] < 2:
            raise interfaces.UserError(f"weights for {what}: there are empty arrays. {source}")
        arrays = {
            ours: _turned(weights[key], axes, SINGLE[ours])
            for ours, (key, axes) in self.single.items()
        }
        for ours, (names, axes) in self.parts.items():
            arrays[ours] = np.stack(
                [
                    _turned(np.concatenate([weights[block + n] for n in names]), axes, BLOCK[ours])
                    for block in blocks
                ]
            )
        return arrays


def linear(ours: str, theirs: str, axes: str) -> dict[str, tuple[str, str]]:
    """Names of a linear map's kernel, whose published `axes` are (out, in), and of its bias."""
    return {
        f"{ours}_kernel": (f"{theirs}.weight", axes),
        f"{ours}_bias": (f"{theirs}.bias", axes[0]),
    }


def norm(ours: str, theirs: str) -> dict[str, tuple[str, str]]:
    """Names of a norm's scale and bias."""
    return {f"{ours}_scale": (f"{theirs}.weight", "D"), f"{ours}_bias": (f"{theirs}.bias", "D")}


def whole(names: Mapping[str, tuple[str, str]]) -> dict[str, tuple[tuple[str, ...], str]]:
    """Arrays of a block that are published in one part each."""
    return {ours: ((theirs,), axes) for ours, (theirs, axes) in names.items()}


def _shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[axis] for axis in axes)


def _turned(array: np.ndarray, axes: str, wanted: str) -> np.ndarray:
    array = array.astype(np.float32).reshape(array.shape[axes.count("1") :])
    axes = axes.replace("1", "")
    return array.transpose([axes.index(axis) for axis in wanted])


class ViT(nnx.Module):
    """image [B, size, size, 3], normalised -> the class token [B, D] after the last norm.

    `arrays` are those of SINGLE and BLOCK; biases of patches, gains and `norm_in` may be absent.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        heads: int,
        *,
        epsilon: float,
        activation: Callable[[jax.Array], jax.Array],
    ):
        width, depth = len(arrays["token"]), len(arrays["qkv_kernel"])
        if heads < 1 or width % heads:
            raise interfaces.UserError(
                f"a width of {width} needs a number of heads that divides it; found {heads}: give "
                "the published number"
            )
        self.heads, self.epsilon, self.activation = heads, epsilon, activation
        gain_YD = np.ones((depth, width), np.float32)
        absent = {
            "patches_bias": np.zeros(width, np.float32),
            "out_gain": gain_YD,
            "down_gain": gain_YD,
        }
        arrays = absent | {name: array for name, array in arrays.items() if name != "head_kernel"}
        self.single = _frozen({name: arrays[name] for name in SINGLE if name in arrays})
        self.blocks = _frozen({name: arrays[name] for name in BLOCK})

    @property
    def size(self) -> int:
        """Pixels of a side."""
        grid = math.isqrt(self.single["positions"].shape[0] - 1)
        return grid * self.single["patches_kernel"].shape[0]

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        part = {name: array[...] for name, array in self.single.items()}
        x_BLD = _patches(image_BHW3, part["patches_kernel"], part["patches_bias"])
        batch, _, width = x_BLD.shape
        token_B1D = jnp.broadcast_to(part["token"].reshape(1, 1, width), (batch, 1, width))
        x_BLD = jnp.concatenate([token_B1D, x_BLD], 1) + part["positions"][None]
        if "norm_in_scale" in part:
            x_BLD = self._normed(x_BLD, part["norm_in_scale"], part["norm_in_bias"])
        blocks = {name: array[...] for name, array in self.blocks.items()}
        # stacked: 24 blocks compile as one
        x_BLD, _ = jax.lax.scan(lambda x, block: (self._block(x, block), None), x_BLD, blocks)
        x_B1D = self._normed(x_BLD[:, :1], part["norm_out_scale"], part["norm_out_bias"])
        return x_B1D[:, 0]

    def _block(self, x_BLD: jax.Array, block: Mapping[str, jax.Array]) -> jax.Array:
        y = self._normed(x_BLD, block["norm_attention_scale"], block["norm_attention_bias"])
        y = self._attention(_linear(y, block["qkv_kernel"], block["qkv_bias"]))
        y = _linear(y, block["out_kernel"], block["out_bias"])
        x_BLD = x_BLD + y * block["out_gain"].reshape(1, 1, -1)
        y = self._normed(x_BLD, block["norm_mlp_scale"], block["norm_mlp_bias"])
        y = self.activation(_linear(y, block["up_kernel"], block["up_bias"]))
        y = _linear(y, block["down_kernel"], block["down_bias"])
        return x_BLD + y * block["down_gain"].reshape(1, 1, -1)

    def _attention(self, qkv_BLT: jax.Array) -> jax.Array:
        batch, length, triple = qkv_BLT.shape
        qkv = qkv_BLT.reshape(batch, length, 3, self.heads, -1)
        query_BLNK, key_BSNK, value_BSNK = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        query_BLNK = query_BLNK * query_BLNK.shape[-1] ** -0.5
        logits_BNLS = jnp.einsum("BLNK,BSNK->BNLS", query_BLNK, key_BSNK, precision=HIGHEST)
        share_BNLS = jax.nn.softmax(logits_BNLS, -1)
        mixed_BLNK = jnp.einsum("BNLS,BSNK->BLNK", share_BNLS, value_BSNK, precision=HIGHEST)
        return mixed_BLNK.reshape(batch, length, triple // 3)

    def _normed(self, x_BLD: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
        centred_BLD = x_BLD - x_BLD.mean(-1, keepdims=True)
        variance_BL1 = jnp.square(centred_BLD).mean(-1, keepdims=True)
        x_BLD = centred_BLD * jax.lax.rsqrt(variance_BL1 + self.epsilon)
        return x_BLD * scale_D.reshape(1, 1, -1) + bias_D.reshape(1, 1, -1)


def _frozen(arrays: Mapping[str, np.ndarray]) -> nnx.Dict:
    return nnx.Dict(
        {name: interfaces.Statistic(jnp.asarray(array)) for name, array in arrays.items()}
    )


def _linear(x_BLD: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.matmul(x_BLD, kernel, precision=HIGHEST) + bias.reshape(1, 1, -1)


def _patches(image_BHW3: jax.Array, kernel_PQ3D: jax.Array, bias_D: jax.Array) -> jax.Array:
    x = jax.lax.conv_general_dilated(
        image_BHW3,
        kernel_PQ3D,
        kernel_PQ3D.shape[:2],
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=HIGHEST,
    )
    return x.reshape(len(x), -1, x.shape[-1]) + bias_D.reshape(1, 1, -1)


def checked(image_BHW3: jax.Array, what: str) -> jax.Array:
    """The images, if they are uint8 [B, H, W, 3]."""
    image_BHW3 = jnp.asarray(image_BHW3)
    if image_BHW3.ndim != 4 or image_BHW3.shape[3] != 3 or image_BHW3.dtype != jnp.uint8:
        raise interfaces.UserError(
            f"{what} needs images of uint8 [B, H, W, 3], those that would be saved; found "
            f"{image_BHW3.dtype} {image_BHW3.shape}: round to bytes, repeat gray three times"
        )
    return image_BHW3


def normalised(
    image_BHW3: jax.Array, mean_3: Sequence[float], deviation_3: Sequence[float]
) -> jax.Array:
    """Bytes as a network was trained on them: of [0, 1], less the mean, by the deviation."""
    image_BHW3 = image_BHW3.astype(jnp.float32) / 255
    mean = jnp.asarray(mean_3, jnp.float32).reshape(1, 1, 1, 3)
    return (image_BHW3 - mean) / jnp.asarray(deviation_3, jnp.float32).reshape(1, 1, 1, 3)
