"""IBQ (arXiv:2412.02692): taming's networks around a codebook trained by index backpropagation."""

from __future__ import annotations

import numpy as np

from tokgen.pretrained import taming
from tokgen.pretrained.system import System


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of a fixture of IBQ."""
    tokenizer = folder.module()
    found = taming.painted(folder, tokenizer)
    published = folder.config
    entropy = {
        "sample_entropy": published["sample_minimization_weight"],
        "batch_entropy": -published["batch_maximization_weight"],
    }
    quant = {"index": 1.0, "commitment": 1.0, "codebook": published["beta"]}
    weights = {name: w * published["quant_loss_weight"] for name, w in quant.items()}
    weights |= {name: w * published["entropy_loss_weight"] for name, w in entropy.items()}
    training, out, gradient = taming.trained(folder, tokenizer.quantizer, weights)
    losses = training.out.losses
    return {
        "latents": found["latents"],
        "indices": found["tokens"].ravel(),
        "quantized": found["quantized"],
        "decoded": found["decoded"],
        "q_indices": training.out.tokens_BLG.ravel(),
        "q_out": out,
        "q_loss": training.loss,
        "q_quant_loss": sum(w * losses[name] for name, w in quant.items()),
        "q_entropy_loss": sum(w * losses[name] for name, w in entropy.items()),
        "q_sample_entropy": losses["sample_entropy"],
        "q_avg_entropy": losses["batch_entropy"],
        "q_grad_latents": gradient,
        "q_grad_codebook": training.params["codebook"],
    }


SYSTEMS = {
    "ibq": System(
        parity,
        taming.settings_of("configs/tokenizer/ibq.py", 4),
        taming.rows,
        unwrap=("state_dict",),
        wrap=("state_dict",),
        aside=(r"loss\..*", r"model_ema\.loss.*", r"model_ema\.(decay|num_updates)"),
        average=taming.average,
        home="huggingface.co/TencentARC (IBQ-Tokenizer-*)",
        licence="Apache-2.0",
    ),
}
