"""IBQ's tokenizer (arXiv:2412.02692): VQGAN's networks, index backpropagation."""

from __future__ import annotations

import functools

import numpy as np

from tokgen.pretrained.families import seed_voken, vqgan
from tokgen.pretrained.system import System


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of a fixture of IBQ."""
    tokenizer = folder.module()
    found = vqgan.reconstructed(folder, tokenizer)
    published = folder.config
    entropy = {
        "sample_entropy": published["sample_minimization_weight"],
        "batch_entropy": -published["batch_maximization_weight"],
    }
    quant = {"index": 1.0, "commitment": 1.0, "codebook": published["beta"]}
    weights = {name: w * published["quant_loss_weight"] for name, w in quant.items()}
    weights |= {name: w * published["entropy_loss_weight"] for name, w in entropy.items()}
    training, out, gradient = vqgan.trained(folder, tokenizer.quantizer, weights)
    losses = training.out.losses
    return vqgan.compared(found, training, out, gradient) | {
        "q_loss": training.loss,
        "q_quant_loss": sum(w * losses[name] for name, w in quant.items()),
        "q_entropy_loss": sum(w * losses[name] for name, w in entropy.items()),
        "q_sample_entropy": losses["sample_entropy"],
        "q_avg_entropy": losses["batch_entropy"],
    }


SYSTEMS = {
    "ibq": System(
        parity,
        functools.partial(vqgan.settings, recipe="configs/tokenizer/ibq.py", blocks=4),
        vqgan.rows,
        **seed_voken.TOKENIZER,
    ),
}
