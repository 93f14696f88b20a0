"""VQGAN of taming-transformers (arXiv:2012.09841)."""

from __future__ import annotations

import functools

import numpy as np

from tokgen.pretrained.families import vqgan
from tokgen.pretrained.system import System


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of a fixture of taming's VQGAN."""
    tokenizer = folder.module()
    found = vqgan.reconstructed(folder, tokenizer)
    # `legacy`, as published: beta weighs the codebook's term
    near, far = (
        ("codebook", "commitment") if folder.setting("legacy") else ("commitment", "codebook")
    )
    weights = {far: 1.0, near: folder.setting("beta")}
    training, out, gradient = vqgan.trained(folder, tokenizer.quantizer, weights)
    return vqgan.compared(found, training, out, gradient) | {
        "q_loss": training.loss,
    }


RECIPE = "configs/tokenizer/taming_vqgan.py"
SYSTEMS = {
    "taming_vqgan": System(
        parity,
        functools.partial(
            vqgan.settings, recipe="configs/tokenizer/taming_vqgan.py", blocks=vqgan.BLOCKS
        ),
        vqgan.rows,
        unwrap=("state_dict",),
        wrap=("state_dict",),
        aside=(r"loss\..*",),  # LPIPS and the discriminator
        licence="MIT",
    ),
}
