"""Perceptual distance: images compared by what a trained network sees in them.

LPIPS (arXiv:1801.03924). The features of a frozen trunk are brought to unit length at every
place; their squared differences are weighted per channel by learned heads and averaged.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import interfaces
from tokgen.critics import trunks

EPSILON = 1e-10  # added to the length of a feature vector, as published
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Parts of the published files that LPIPS does not need: torchvision's classifier; and in a saved
# LPIPS module its input constants and a second mention of the heads.
UNUSED = ("classifier.", "scaling_layer.", "lins.")
SOURCES = (
    "LPIPS needs a trunk from torchvision (vgg16-397923af.pth, keys features.N.*) and the heads "
    "of the LPIPS repository, github.com/richzhang/PerceptualSimilarity "
    "(lpips/weights/v0.1/vgg.pth, keys linN.*); training works without them, the perceptual "
    "loss left out"
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


def load(*paths: str, read: Callable[[str], dict[str, np.ndarray]]) -> LPIPS:
    """LPIPS from the weight files at `paths`, read by `pretrained.reader.read`.

    Two files (torchvision's trunk, LPIPS's heads), or one with both; a folder stands for the
    weight files in it. VGG16 or AlexNet is told from the weights.
    """
    weights = {}
    for file in _files(paths):
        weights.update(read(file))
    return from_weights(weights)


def from_weights(weights: dict[str, np.ndarray]) -> LPIPS:
    """LPIPS from arrays under their published names, in PyTorch's axis order."""
    weights = {_published(key): array for key, array in weights.items()}
    weights = {key: array for key, array in weights.items() if not key.startswith(UNUSED)}
    # Shapes only: drawing 15 million initial values to throw them away takes seconds.
    trunk = nnx.eval_shape(lambda: _kind(weights)(rngs=nnx.Rngs(0)))
    _check(weights, _needed(trunk))
    for number, conv in trunk.convs().items():
        kernel_OIHW = weights[f"features.{number}.weight"]
        conv.kernel = nnx.Param(jnp.asarray(kernel_OIHW.transpose(2, 3, 1, 0), jnp.float32))
        conv.bias = nnx.Param(jnp.asarray(weights[f"features.{number}.bias"], jnp.float32))
    heads = [
        weights[f"lin{level}.model.1.weight"].reshape(-1) for level in range(len(trunk.widths))
    ]
    return LPIPS(trunk, heads)


def _directions(x_BHWC: jax.Array) -> jax.Array:
    squares_BHW1 = jnp.square(x_BHWC).sum(-1, keepdims=True)
    # The floor is for the gradient: that of a root is infinite at zero, where ReLUs left nothing.
    return x_BHWC / (jnp.sqrt(jnp.maximum(squares_BHW1, 1e-30)) + EPSILON)


def _files(paths: Sequence[str]) -> list[str]:
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise interfaces.UserError(f"no weight file at {path}. {SOURCES}")
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not found:
            raise interfaces.UserError(
                f"no weight file ({', '.join(SUFFIXES)}) in the folder {path}. {SOURCES}"
            )
        files.extend(str(file) for file in found)
    return files


def _published(key: str) -> str:
    """Torchvision's name of a key that a saved LPIPS module calls net.sliceN.M.weight."""
    head, _, rest = key.partition(".")
    piece, _, number = rest.partition(".")
    return f"features.{number}" if head == "net" and piece.startswith("slice") else key


def _kind(weights: dict[str, np.ndarray]) -> type[nnx.Module]:
    first = weights.get("features.0.weight", weights.get("lin1.model.1.weight"))
    alex = first is not None and (first.shape[2:] == (11, 11) or first.shape[:2] == (1, 192))
    return trunks.AlexNet if alex else trunks.VGG16


def _needed(trunk: nnx.Module) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for number, conv in trunk.convs().items():
        height, width, before, after = conv.kernel.shape
        shapes[f"features.{number}.weight"] = (after, before, height, width)
        shapes[f"features.{number}.bias"] = (after,)
    for level, width in enumerate(trunk.widths):
        shapes[f"lin{level}.model.1.weight"] = (1, width, 1, 1)
    return shapes


def _check(weights: dict[str, np.ndarray], needed: dict[str, tuple[int, ...]]):
    problems = []
    missing = [key for key in needed if key not in weights]
    leftover = [key for key in weights if key not in needed]
    if missing:
        problems.append(f"missing: {', '.join(missing)}")
    if leftover:
        problems.append(f"left over: {', '.join(leftover)}")
    for key, shape in needed.items():
        if key in weights and weights[key].shape != shape:
            problems.append(f"{key} must have the shape {shape}, has {weights[key].shape}")
    if problems:
        raise interfaces.UserError(f"weights for LPIPS: {'; '.join(problems)}. {SOURCES}")
