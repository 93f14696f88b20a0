"""DINOv2 (arXiv:2304.07193) as a feature network: the class token, for the distance FD-DINOv2.

Images are brought to 224 x 224 whole, without a crop, by PIL's antialiased cubic and its rounding
to bytes; arXiv:2306.04675 compares generators so. ViT-S/14, B/14 and L/14, without registers.
"""

from __future__ import annotations

import math
import re

import jax
import numpy as np
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import features, vit, weights as files
from tokgen.nn import resample

SOURCE = (
    "DINOv2's ViT-L/14 is dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth "
    "(keys blocks.N.*), or model.safetensors of huggingface.co/facebook/dinov2-large (keys "
    "encoder.layer.N.*); code and weights under the Apache License 2.0. ViT-B/14 and S/14 are "
    "published beside it; files with registers (reg4) and ViT-g are other networks"
)
MEAN_3 = (0.485, 0.456, 0.406)
DEVIATION_3 = (0.229, 0.224, 0.225)
EPSILON = 1e-6
SIZE = 224
OFFSET = 0.1
PUBLISHED = {"D": 1024, "Y": 24, "F": 4096, "P": 14, "L": 1 + 37**2}  # ViT-L/14

FACEBOOK = vit.Form(
    single={
        "token": ("cls_token", "11D"),
        "positions": ("pos_embed", "1LD"),
        "patches_kernel": ("patch_embed.proj.weight", "D3PQ"),
        "patches_bias": ("patch_embed.proj.bias", "D"),
        **vit.norm("norm_out", "norm"),
    },
    block="blocks.{}.",
    parts=vit.whole(
        {
            **vit.norm("norm_attention", "norm1"),
            **vit.linear("qkv", "attn.qkv", "TD"),
            **vit.linear("out", "attn.proj", "DA"),
            "out_gain": ("ls1.gamma", "D"),
            **vit.norm("norm_mlp", "norm2"),
            **vit.linear("up", "mlp.fc1", "FD"),
            **vit.linear("down", "mlp.fc2", "DF"),
            "down_gain": ("ls2.gamma", "D"),
        }
    ),
    unused=r"mask_token$",
)
_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
TRANSFORMERS = vit.Form(
    single={
        "token": ("embeddings.cls_token", "11D"),
        "positions": ("embeddings.position_embeddings", "1LD"),
        "patches_kernel": ("embeddings.patch_embeddings.projection.weight", "D3PQ"),
        "patches_bias": ("embeddings.patch_embeddings.projection.bias", "D"),
        **vit.norm("norm_out", "layernorm"),
    },
    block="encoder.layer.{}.",
    parts={
        "qkv_kernel": (tuple(f"{name}.weight" for name in _QKV), "TD"),
        "qkv_bias": (tuple(f"{name}.bias" for name in _QKV), "T"),
        **vit.whole(
            {
                **vit.norm("norm_attention", "norm1"),
                **vit.linear("out", "attention.output.dense", "DA"),
                "out_gain": ("layer_scale1.lambda1", "D"),
                **vit.norm("norm_mlp", "norm2"),
                **vit.linear("up", "mlp.fc1", "FD"),
                **vit.linear("down", "mlp.fc2", "DF"),
                "down_gain": ("layer_scale2.lambda1", "D"),
            }
        ),
    },
    unused=r"embeddings\.mask_token$",
)


class DINOv2(nnx.Module):
    """uint8 images [B, H, W, 3] -> {"cls": [B, D]}, the class token after the last norm."""

    features = ("cls",)

    def __init__(self, trunk: vit.ViT):
        self.trunk = trunk

    def __call__(self, image_BHW3: jax.Array) -> dict[str, jax.Array]:
        size = self.trunk.size
        image_BHW3 = resample.resize_pil(vit.checked(image_BHW3, "DINOv2"), (size, size))
        return {"cls": self.trunk(vit.normalised(image_BHW3, MEAN_3, DEVIATION_3))}


def from_weights(
    weights: files.Weights, *, size: int = SIZE, heads: int | None = None, offset: float = OFFSET
) -> DINOv2:
    """DINOv2 from arrays under either publisher's names; `heads` is width // 64 unless given.

    `offset` 0.1 is Facebook's interpolation of the positions, with which features were published;
    0 the form of newer versions of `transformers`, which know the size only.
    """
    # training files group blocks: blocks.GROUP.NUMBER, numbers counting through
    weights = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", key): a for key, a in weights.items()}
    named = any(key.startswith("embeddings.") for key in weights)
    form = TRANSFORMERS if named else FACEBOOK
    arrays = form.take(weights, PUBLISHED, what="DINOv2", source=SOURCE)
    patch, width = len(arrays["patches_kernel"]), len(arrays["token"])
    if size < patch or size % patch:
        raise interfaces.UserError(
            f"DINOv2 needs images of whole patches of {patch} pixels; found a size of {size}"
        )
    arrays["positions"] = positions(arrays["positions"], size // patch, offset)
    heads = max(width // 64, 1) if heads is None else heads
    return DINOv2(vit.ViT(arrays, heads, epsilon=EPSILON, activation=gelu))


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's share below x, not its approximation by tanh."""
    return jax.nn.gelu(x, approximate=False)


def positions(table_LD: np.ndarray, grid: int, offset: float) -> np.ndarray:
    """[1 + n n, D] -> [1 + grid grid, D]: cubic, not smoothed, by steps of n / (grid + offset).

    The first row, the token's, stays.
    """
    side = math.isqrt(len(table_LD) - 1)
    if side == grid:
        return table_LD
    matrix = resample.bicubic_torch(side, grid, side / (grid + offset)).astype(np.float64)
    table = table_LD[1:].reshape(side, side, -1)
    table = np.einsum("rR,cC,RCD->rcD", matrix, matrix, table, optimize=True)
    table = table.reshape(grid * grid, -1).astype(np.float32)
    return np.concatenate([table_LD[:1], table])


FEATURE_NETWORKS = {"dinov2": features.FeatureNetwork(from_weights, ("cls",), SOURCE)}
