"""LPIPS (arXiv:1801.03924): images compared by the feature maps of a frozen network.

Features are brought to unit length at every position; their squared differences are weighted per
channel by learned heads and averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import interfaces, rng
from tokgen.backbones import alexnet, perceptual, vgg, weights as files

EPSILON = 1e-10  # added to the length of a feature vector, as published
# Parts of the published files that LPIPS does not need: torchvision's classifier; and in a saved
# LPIPS module its input constants and a second mention of the heads.
UNUSED = ("classifier.", "scaling_layer.", "lins.")
SOURCE = (
    "LPIPS needs a trunk from torchvision (vgg16-397923af.pth, keys features.N.*) and the heads "
    "of the LPIPS repository, github.com/richzhang/PerceptualSimilarity "
    "(lpips/weights/v0.1/vgg.pth, keys linN.*); config.loss.lpips=0 trains without them"
)


class LPIPS(nnx.Module):
    """a_BHW3, b_BHW3 in [-1, 1] -> distance_B: Eq. 1 of arXiv:1801.03924.

    `trunk` maps images to feature maps, `heads` holds one weight per channel of each map.
    Gradients flow to both images; the caller differentiates with respect to nothing in here.
    Under `jit` it is an argument: weights that are closed over are folded into constants, and
    compiling takes six times as long.
    """

    def __init__(self, trunk: nnx.Module, heads: Sequence[jax.Array]):
        self.trunk = trunk
        self.heads = nnx.List(nnx.Param(jnp.asarray(head_C, jnp.float32)) for head_C in heads)

    def __call__(self, a_BHW3: jax.Array, b_BHW3: jax.Array) -> jax.Array:
        return self.levels(a_BHW3, b_BHW3).sum(1)

    def levels(self, a_BHW3: jax.Array, b_BHW3: jax.Array) -> jax.Array:
        """What each feature map adds to the distance: [B, maps]."""
        if a_BHW3.shape != b_BHW3.shape:
            raise interfaces.UserError(
                f"LPIPS compares images of one size: {a_BHW3.shape} and {b_BHW3.shape}"
            )
        # Two passes, not one over both: the originals' half needs no backward pass.
        pairs = zip(self.trunk(a_BHW3), self.trunk(b_BHW3), self.heads, strict=True)
        distances = []
        for a_BHWC, b_BHWC, head_C in pairs:
            squares_BHWC = jnp.square(_directions(a_BHWC) - _directions(b_BHWC))
            distances.append((squares_BHWC @ head_C[...]).mean((1, 2)))
        return jnp.stack(distances, 1)


def from_weights(weights: files.Weights) -> LPIPS:
    """LPIPS from arrays under their published names, in PyTorch's axis order.

    Torchvision's trunk, VGG16 or AlexNet as the shapes say, and the heads of the LPIPS repository.
    """
    weights = {_published(key): array for key, array in weights.items()}
    weights = {key: array for key, array in weights.items() if not key.startswith(UNUSED)}
    # Shapes only: drawing 15 million initial values to throw them away takes seconds.
    trunk = nnx.eval_shape(lambda: _kind(weights)(rngs=rng.rngs(0)))
    heads = {
        f"lin{level}.model.1.weight": (1, width, 1, 1) for level, width in enumerate(trunk.widths)
    }
    needed = {key: slot.needed() for key, slot in trunk.slots().items()}
    files.check(needed | heads, weights, what="LPIPS", source=SOURCE)
    for key, slot in trunk.slots().items():
        slot.put(weights[key])
    return LPIPS(trunk, [weights[key].reshape(-1) for key in heads])


def published() -> LPIPS:
    """The published form, on VGG16, drawn at random."""
    trunk = vgg.VGG16(rngs=rng.rngs(0))
    return LPIPS(trunk, [jnp.zeros(width) for width in trunk.widths])


def _directions(x_BHWC: jax.Array) -> jax.Array:
    squares_BHW1 = jnp.square(x_BHWC).sum(-1, keepdims=True)
    # The floor is for the gradient: that of a root is infinite at zero, where ReLUs left nothing.
    return x_BHWC / (jnp.sqrt(jnp.maximum(squares_BHW1, 1e-30)) + EPSILON)


def _published(key: str) -> str:
    """Torchvision's name of a key that a saved LPIPS module calls net.sliceN.M.weight."""
    head, _, rest = key.partition(".")
    piece, _, number = rest.partition(".")
    return f"features.{number}" if head == "net" and piece.startswith("slice") else key


def _kind(weights: dict[str, np.ndarray]) -> type[nnx.Module]:
    first = weights.get("features.0.weight", weights.get("lin1.model.1.weight"))
    alex = first is not None and (first.shape[2:] == (11, 11) or first.shape[:2] == (1, 192))
    return alexnet.AlexNet if alex else vgg.VGG16


DISTANCES = {"lpips": perceptual.Distance(from_weights, SOURCE, published)}
