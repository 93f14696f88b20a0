"""Feature networks by name: frozen networks that images are measured by.

A file of this folder that has one declares it: FEATURE_NETWORKS, by name (`inception.py`,
`dinov2.py`). The name is what `tokgen reference --network` takes.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable

from flax import nnx

from tokgen import backbones
from tokgen.backbones import weights as files


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """How a feature network is made from a weight file.

    Attributes:
        make: arrays by their published names -> a module that maps uint8 images [B, H, W, 3] to
            {layer: [B, D]}, float32.
        layers: the layers that are measured; the first is the one that distances are taken in.
        source: where the weight file is published, and its licence.
    """

    make: Callable[[files.Weights], nnx.Module]
    layers: tuple[str, ...]
    source: str


def known() -> dict[str, FeatureNetwork]:
    """Every feature network by name."""
    networks: dict[str, FeatureNetwork] = {}
    for file in pkgutil.iter_modules(backbones.__path__):
        module = importlib.import_module(f"tokgen.backbones.{file.name}")
        networks |= getattr(module, "FEATURE_NETWORKS", {})
    return networks
