"""The fixture of LPIPS, computed with our distance."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from tokgen.backbones import lpips as distance
from tokgen.pretrained import system
from tokgen.pretrained.formats import reader

Arrays = dict[str, np.ndarray]


def lpips(folder) -> Arrays:
    """Distances of both trunks, their parts, features and gradients."""
    a, b = (jnp.asarray(folder.given(name).transpose(0, 2, 3, 1)) for name in ("image0", "image1"))
    arrays = {}
    for kind, name in folder.setting("heads").items():
        weights = reader.read(folder.path / name)
        for key, shape in folder.setting(f"{kind}_keys").items():
            weights[key] = _recreated(folder.setting("salt"), key, shape)
        arrays |= {f"{kind}_{key}": array for key, array in _lpips(weights, a, b).items()}
    return arrays


def _lpips(weights: Arrays, a_BHW3: jax.Array, b_BHW3: jax.Array) -> Arrays:
    def seen(b_BHW3, network):
        levels = network.levels(a_BHW3, b_BHW3)
        means = [features.mean((1, 2)) for features in network.trunk(a_BHW3)]
        return levels.sum(), (levels, means)

    network = distance.from_weights(weights)
    gradient, (levels, means) = jax.jit(jax.grad(seen, has_aux=True))(b_BHW3, network)
    arrays = {"distance": levels.sum(1), "grad": np.asarray(gradient).transpose(0, 3, 1, 2)}
    for number, mean in enumerate(means):
        arrays |= {f"layer{number}": levels[:, number], f"feat{number}_mean": mean}
    return arrays


def _recreated(salt: str, key: str, shape: list[int]) -> np.ndarray:
    """The trunk weight that the fixture's README describes."""
    rng = np.random.default_rng(zlib.crc32((salt + key).encode()))
    scale = 0.1 if key.endswith("bias") else np.sqrt(2 / np.prod(shape[1:]))
    return (rng.standard_normal(shape) * scale).astype(np.float32)


SYSTEMS = {
    "lpips": system.System(
        lpips, home="github.com/richzhang/PerceptualSimilarity", licence="BSD-2-Clause"
    ),
}
