"""Perceptual distances by name: images compared by what a frozen network sees in them.

A file of this folder that has one declares it: DISTANCES, by name (`lpips.py`, `resnet.py`). The
name is a term of `config.loss`, and says in `config.perceptual` where its weight files lie.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import backbones, choices, interfaces, rng
from tokgen.backbones import weights as files
from tokgen.nn import resample

Read = Callable[[str], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Distance:
    """How a distance is made from weight files.

    Attributes:
        make: arrays by their published names -> a module (a_BHW3, b_BHW3), images in [-1, 1], whose
            result is distance_B; gradients flow to both images.
        source: where the weight files are published, for errors.
        published: the module of the published networks, its arrays drawn: for their shapes.
    """

    make: Callable[[files.Weights], nnx.Module]
    source: str
    published: Callable[[], nnx.Module]


def known() -> dict[str, Distance]:
    """Every distance by name."""
    distances: dict[str, Distance] = {}
    for file in pkgutil.iter_modules(backbones.__path__):
        module = importlib.import_module(f"tokgen.backbones.{file.name}")
        distances |= getattr(module, "DISTANCES", {})
    return dict(sorted(distances.items()))


def load(name: str, paths: Sequence[str], *, read: Read) -> nnx.Module:
    """The distance of that name from the weight files at `paths`, each read by `read`.

    A folder stands for the weight files in it; what lies in several files is put together.

    Raises:
        UserError: there is no such distance, or the files do not fit it.
    """
    found = choices.named(known(), name, "a perceptual distance")
    return found.make(files.gather(paths, read, source=found.source))


def shapes(name: str) -> Sum:
    """What `build` makes of one distance's published files, its arrays as shapes."""
    found = choices.named(known(), name, "a perceptual distance")
    return nnx.eval_shape(lambda: Sum([found.published()], [1.0]))


def build(terms: Mapping[str, tuple[float, Sequence[str]]], *, read: Read) -> Sum:
    """The sum of distances by name: {"lpips": (1.0, paths), "convnext_small": (0.1, paths)}."""
    distances = [load(name, paths, read=read) for name, (_, paths) in terms.items()]
    return Sum(distances, [share for share, _ in terms.values()])


class Logits(nnx.Module):
    """a_BHW3, b_BHW3 in [-1, 1] -> distance_B: mean squared difference of a classifier's logits.

    Images are brought to 224 pixels, as the classifier was trained. Gradients flow to both
    images; under `jit` it is an argument, as LPIPS is.
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


def of_classifier(network: type[nnx.Module], name: str, source: str) -> Distance:
    """The distance of the logits of a classifier: MaskBit's (arXiv:2409.16211), and TiTok's.

    `network(rngs=...)` says by `slots` how its arrays are published, by `unused` which it has not.
    """

    def make(weights: files.Weights) -> Logits:
        module = nnx.eval_shape(lambda: network(rngs=rng.rngs(0)))
        unused = re.compile("|".join(module.unused) or "$^")
        weights = {key: array for key, array in weights.items() if not unused.fullmatch(key)}
        files.fill(module.slots(), weights, what=name, source=source)
        return Logits(module)

    return Distance(make, source, lambda: Logits(network(rngs=rng.rngs(0))))


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
