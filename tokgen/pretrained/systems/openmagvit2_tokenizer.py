"""Open-MAGVIT2's bit tokenizer (arXiv:2409.04410)."""

from __future__ import annotations

import ml_collections
import numpy as np

from tokgen.config import reading as configs
from tokgen.pretrained import keymap
from tokgen.pretrained.families import convolutional, seed_voken, vqgan
from tokgen.pretrained.system import System

MULTIPLIERS, BLOCKS = (1, 1, 2, 2, 4), 4  # as published


def name(stage: convolutional.Stage) -> str:
    """The published prefix of a stage; `up` and `adaptive` are indexed by level, 0 the finest."""
    if stage.level is None:
        return f"mid_block.{stage.index}"
    leaf = {
        "block": f".block.{stage.index}",
        "down": ".downsample",
        "up": ".upsample.conv1",
        "adapt": "",
    }[stage.kind]
    if stage.kind == "adapt":
        return f"adaptive.{stage.level}"
    side = "down" if stage.path.startswith("encoder") else "up"
    return f"{side}.{stage.level}{leaf}"


def rows(tokenizer) -> list[keymap.Row]:
    """The keys of `imagenet_256_L.ckpt` and its siblings."""
    return [
        *convolutional.rows(tokenizer.encoder, "encoder", name, prefix="encoder."),
        *convolutional.rows(tokenizer.decoder, "decoder", name, prefix="decoder."),
    ]


def settings(published: dict, weights) -> ml_collections.ConfigDict:
    """Our config, sizes read from the weights where nothing is published."""
    config = configs.load("configs/tokenizer/openmagvit2.py")
    base = convolutional.side(weights, "encoder.conv_in.weight")[0]
    found, blocks = vqgan.levels(weights)
    convolutional.sections(
        config,
        base=base,
        multipliers=tuple(published.get("ch_mult", found)),
        blocks=published.get("num_res_blocks", blocks),
        variant="magvit2",
    )
    size = published.get("resolution", 256)
    config.view.size = (size, size)
    bits = convolutional.side(weights, "encoder.conv_out.weight")[0]
    config.quantizer.bits = bits
    if sum(config.quantizer.groups) != bits:
        config.quantizer = {**config.quantizer.to_dict(), "groups": None}
    return config


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `openmagvit2`, and of one with moving averages."""
    tokenizer = folder.module()
    tokenizer.quantizer.groups = (tokenizer.quantizer.channels,)
    found = vqgan.reconstructed(folder, tokenizer)
    computed = {
        "latents": found["latents"],
        "indices": found["tokens"].ravel(),
        "quantized": found["quantized"],
        "decoded": found["decoded"],
    }
    if "bits" in folder.arrays:
        computed["bits"] = found["quantized"]
    if "q_latents" not in folder.arrays:
        return computed
    weights = {
        "sample_entropy": folder.config.get("sample_minimization_weight", 1.0),
        "batch_entropy": -folder.config.get("batch_maximization_weight", 1.0),
        "commitment": 0.25,
    }
    training, _, gradient = vqgan.trained(folder, tokenizer.quantizer, weights)
    losses = training.out.losses
    return computed | {
        "q_indices": training.out.tokens_BLG.ravel(),
        "q_entropy_aux_loss": sum(
            weights[name] * losses[name] for name in ("sample_entropy", "batch_entropy")
        ),
        "q_per_sample_entropy": losses["sample_entropy"],
        "q_codebook_entropy": losses["batch_entropy"],
        "q_commitment": losses["commitment"],
        "q_grad_latents": gradient,
    }


SYSTEMS = {
    "openmagvit2": System(
        parity,
        settings,
        rows,
        **seed_voken.TOKENIZER,
    ),
}
