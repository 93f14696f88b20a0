"""The fixture of FID's Inception, computed with our network."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokgen.backbones import inception
from tokgen.pretrained import system

PYTORCH_FID = ("64", "192", "768", "pool3")
FIDELITY = ("pool3", "logits_unbiased", "logits")


@functools.partial(jax.jit, static_argnums=2)
def _seen(
    network: inception.Inception, x_BHW3: jax.Array, names: tuple[str, ...]
) -> dict[str, jax.Array]:
    return network.seen(x_BHW3, names)


def inception_fid(folder) -> dict[str, np.ndarray]:
    """Features with the pixels of pytorch-fid, and with those of torch-fidelity."""
    images_BHW3 = jnp.asarray(folder.given("image_u8").transpose(0, 2, 3, 1))
    network = inception.from_weights(folder.weights())
    arrays = {}
    for form, pixels, names in (
        ("pytorch_fid", inception.torch, PYTORCH_FID),
        ("fidelity", inception.tf1, FIDELITY),
    ):
        # all features in both: one program instead of two
        seen = _seen(network, pixels(images_BHW3), inception.NAMES)
        arrays |= {f"{form}_{name}": seen[name] for name in names}
    return arrays


SYSTEMS = {
    "inception_fid": system.System(
        inception_fid, home="github.com/mseitzer/pytorch-fid", licence="Apache-2.0"
    ),
}
