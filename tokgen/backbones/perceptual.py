"""Perceptual distances: images compared by what a trained network sees in them.

LPIPS (arXiv:1801.03924). The features of a frozen trunk are brought to unit length at every
place; their squared differences are weighted per channel by learned heads and averaged.
Logits (MaskBit, arXiv:2409.16211, and TiTok, arXiv:2406.07550): the opinions of a classifier.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import classifiers, trunks, weights as files
from tokgen.nn import resample

NAMES = ("lpips", *classifiers.CLASSIFIERS)  # of the distances
EPSILON = 1e-10  # added to the length of a feature vector, as published
# Parts of the published files that LPIPS does not need: torchvision's classifier; and in a saved
# LPIPS module its input constants and a second mention of the heads.
UNUSED = ("classifier.", "scaling_layer.", "lins.")
SOURCES = (
    "LPIPS needs a trunk from torchvision (vgg16-397923af.pth, keys features.N.*) and the heads "
    "of the LPIPS repository, github.com/richzhang/PerceptualSimilarity "
    "(lpips/weights/v0.1/vgg.pth, keys linN.*); config.loss.lpips=0 trains without them"
)

CLASSIFIER_SOURCES = {
    name: f"the perceptual loss {name} needs torchvision's {file}; config.loss.{name}=0 trains "
    "without it"
    for name, file in (
        ("resnet50", "ResNet50_Weights.IMAGENET1K_V1 (resnet50-0676ba61.pth)"),
        ("convnext_small", "ConvNeXt_Small_Weights.IMAGENET1K_V1 (convnext_small-0c510722.pth)"),
    )
}


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


class Logits(nnx.Module):
    """a_BHW3, b_BHW3 in [-1, 1] -> distance_B: mean squared difference of a classifier's logits.

    Images are brought to 224 pixels, as the classifier was trained. For gradients and `jit` see
    LPIPS.
    """

    size = 224

    def __init__(self, classifier: nnx.Module):
        self.classifier = classifier

    def __call__(self, a_BHW3: jax.Array, b_BHW3: jax.Array) -> jax.Array:
        if a_BHW3.shape != b_BHW3.shape:
            raise interfaces.UserError(
                f"logits are compared of images of one size: {a_BHW3.shape} and {b_BHW3.shape}"
            )
        return jnp.square(self._logits(a_BHW3) - self._logits(b_BHW3)).mean(1)

    def _logits(self, image_BHW3: jax.Array) -> jax.Array:
        size = (self.size, self.size)
        return self.classifier(resample.resize(image_BHW3, size, resample.linear_antialias))


class Sum(nnx.Module):
    """a_BHW3, b_BHW3 in [-1, 1] -> distance_B: several distances, weighted and added."""

    def __init__(self, distances: Sequence[nnx.Module], shares: Sequence[float]):
        if len(distances) != len(shares):
            raise ValueError(
                f"a sum needs one weight per distance; found {len(distances)} distances and "
                f"{len(shares)} weights"
            )
        self.distances, self.shares = nnx.List(distances), tuple(shares)

    def __call__(self, a_BHW3: jax.Array, b_BHW3: jax.Array) -> jax.Array:
        pairs = zip(self.distances, self.shares, strict=True)
        return sum(share * distance(a_BHW3, b_BHW3) for distance, share in pairs)


Read = Callable[[str], dict[str, np.ndarray]]


def build(terms: Mapping[str, tuple[float, Sequence[str]]], *, read: Read) -> Sum:
    """The sum of distances by name: {"lpips": (1.0, paths), "convnext_small": (0.1, paths)}."""
    unknown = [name for name in terms if name not in NAMES]
    if unknown:
        raise interfaces.UserError(
            f"a perceptual distance must be one of {', '.join(NAMES)}; found {', '.join(unknown)}"
        )
    distances = [
        load(*paths, read=read) if name == "lpips" else load_logits(name, *paths, read=read)
        for name, (_, paths) in terms.items()
    ]
    return Sum(distances, [share for share, _ in terms.values()])


def load_logits(name: str, *paths: str, read: Read) -> Logits:
    """Logits of "resnet50" or "convnext_small" from torchvision's weight file at `paths`."""
    source = CLASSIFIER_SOURCES[name]
    return logits_from_weights(name, files.gather(paths, read, source=source))


def logits_from_weights(name: str, weights: dict[str, np.ndarray]) -> Logits:
    """Logits from arrays under torchvision's names, in PyTorch's axis order."""
    network = nnx.eval_shape(lambda: classifiers.CLASSIFIERS[name](rngs=nnx.Rngs(0)))
    unused = re.compile("|".join(network.unused) or "$^")
    weights = {key: array for key, array in weights.items() if not unused.fullmatch(key)}
    files.fill(network.slots(), weights, what=name, source=CLASSIFIER_SOURCES[name])
    return Logits(network)


def load(*paths: str, read: Read) -> LPIPS:
    """LPIPS from the weight files at `paths`, read by `pretrained.reader.read`.

    Two files (torchvision's trunk, LPIPS's heads), or one with both; a folder stands for the
    weight files in it. VGG16 or AlexNet is told from the weights.
    """
    return from_weights(files.gather(paths, read, source=SOURCES))


def from_weights(weights: dict[str, np.ndarray]) -> LPIPS:
    """LPIPS from arrays under their published names, in PyTorch's axis order."""
    weights = {_published(key): array for key, array in weights.items()}
    weights = {key: array for key, array in weights.items() if not key.startswith(UNUSED)}
    # Shapes only: drawing 15 million initial values to throw them away takes seconds.
    trunk = nnx.eval_shape(lambda: _kind(weights)(rngs=nnx.Rngs(0)))
    files.check(_needed(trunk), weights, what="LPIPS", source=SOURCES)
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
