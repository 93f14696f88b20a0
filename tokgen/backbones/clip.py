"""CLIP's image tower (arXiv:2103.00020) as a feature network: ViT-L/14 at 336 pixels, for CMMD.

Pixels come in as CMMD (arXiv:2401.09603) was released: a centred square is cut out first, its
corner rounded down, then PIL's antialiased cubic, with its rounding to bytes, brings it to 336.
CLIP's own preprocessing resizes first and cuts then.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import features, vit, weights as files
from tokgen.nn import resample

SOURCE = (
    "CLIP's ViT-L/14 at 336 pixels is ViT-L-14-336px.pt of github.com/openai/CLIP (keys visual.*; "
    "it is a TorchScript archive: save its state_dict once), or pytorch_model.bin of "
    "huggingface.co/openai/clip-vit-large-patch14-336 (keys vision_model.*); the code is under the "
    "MIT License, for the weights OpenAI states no other"
)
MEAN_3 = (0.48145466, 0.4578275, 0.40821073)
DEVIATION_3 = (0.26862954, 0.26130258, 0.27577711)
EPSILON = 1e-5
PUBLISHED = {"D": 1024, "Y": 24, "F": 4096, "P": 14, "L": 1 + 24**2, "E": 768}

OPENAI = vit.Form(
    single={
        "token": ("visual.class_embedding", "D"),
        "positions": ("visual.positional_embedding", "LD"),
        "patches_kernel": ("visual.conv1.weight", "D3PQ"),
        **vit.norm("norm_in", "visual.ln_pre"),
        **vit.norm("norm_out", "visual.ln_post"),
        "head_kernel": ("visual.proj", "DE"),
    },
    block="visual.transformer.resblocks.{}.",
    parts=vit.whole(
        {
            **vit.norm("norm_attention", "ln_1"),
            "qkv_kernel": ("attn.in_proj_weight", "TD"),
            "qkv_bias": ("attn.in_proj_bias", "T"),
            **vit.linear("out", "attn.out_proj", "DA"),
            **vit.norm("norm_mlp", "ln_2"),
            **vit.linear("up", "mlp.c_fc", "FD"),
            **vit.linear("down", "mlp.c_proj", "DF"),
        }
    ),
    # the text tower and three sizes
    unused=(
        r"(transformer|token_embedding|ln_final)\.|(positional_embedding|text_projection|"
        r"logit_scale|input_resolution|context_length|vocab_size)$"
    ),
)
_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
TRANSFORMERS = vit.Form(
    single={
        "token": ("vision_model.embeddings.class_embedding", "D"),
        "positions": ("vision_model.embeddings.position_embedding.weight", "LD"),
        "patches_kernel": ("vision_model.embeddings.patch_embedding.weight", "D3PQ"),
        **vit.norm("norm_in", "vision_model.pre_layrnorm"),  # so they spell it
        **vit.norm("norm_out", "vision_model.post_layernorm"),
        "head_kernel": ("visual_projection.weight", "ED"),
    },
    block="vision_model.encoder.layers.{}.",
    parts={
        "qkv_kernel": (tuple(f"{name}.weight" for name in _QKV), "TD"),
        "qkv_bias": (tuple(f"{name}.bias" for name in _QKV), "T"),
        **vit.whole(
            {
                **vit.norm("norm_attention", "layer_norm1"),
                **vit.linear("out", "self_attn.out_proj", "DA"),
                **vit.norm("norm_mlp", "layer_norm2"),
                **vit.linear("up", "mlp.fc1", "FD"),
                **vit.linear("down", "mlp.fc2", "DF"),
            }
        ),
    },
    unused=(
        r"text_model\.|text_projection\.|logit_scale$|"
        r"vision_model\.embeddings\.position_ids$"
    ),
)


class CLIP(nnx.Module):
    """uint8 images [B, H, W, 3] -> {"embedding": [B, E]}, projected, of length 1."""

    features = ("embedding",)

    def __init__(self, trunk: vit.ViT, head_DE: jax.Array):
        self.trunk = trunk
        self.head = interfaces.Statistic(jnp.asarray(head_DE))

    def __call__(self, image_BHW3: jax.Array) -> dict[str, jax.Array]:
        size = self.trunk.size
        image_BHW3 = resample.resize_pil(square(vit.checked(image_BHW3, "CLIP")), (size, size))
        token_BD = self.trunk(vit.normalised(image_BHW3, MEAN_3, DEVIATION_3))
        embedding_BE = jnp.matmul(token_BD, self.head[...], precision=vit.HIGHEST)
        return {"embedding": embedding_BE / jnp.linalg.norm(embedding_BE, axis=1, keepdims=True)}


def square(image_BHW3: jax.Array) -> jax.Array:
    """The largest square in the middle, its corner rounded down."""
    _, height, width, _ = image_BHW3.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image_BHW3[:, top : top + side, left : left + side]


def from_weights(weights: files.Weights, *, heads: int | None = None) -> CLIP:
    """CLIP's image tower from arrays under either publisher's names, text tower or not.

    `heads` is width // 64 unless given; the size of the images follows from the positions.
    """
    form = OPENAI if any(key.startswith("visual.") for key in weights) else TRANSFORMERS
    arrays = form.take(weights, PUBLISHED, what="CLIP", source=SOURCE)
    heads = max(len(arrays["token"]) // 64, 1) if heads is None else heads
    trunk = vit.ViT(arrays, heads, epsilon=EPSILON, activation=quick_gelu)
    return CLIP(trunk, arrays["head_kernel"])


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


FEATURE_NETWORKS = {"clip": features.FeatureNetwork(from_weights, ("embedding",), SOURCE)}
