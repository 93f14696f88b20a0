"""Open-MAGVIT2's bit tokenizer (arXiv:2409.04410)."""

from __future__ import annotations

import ml_collections
import numpy as np

from tokgen import config as configs
from tokgen.pretrained import convolutional, table, taming
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


def rows(tokenizer) -> list[table.Row]:
    """The keys of `imagenet_256_L.ckpt` and its siblings."""
    return [
        *convolutional.rows(tokenizer.encoder, "encoder", name, prefix="encoder."),
        *convolutional.rows(tokenizer.decoder, "decoder", name, prefix="decoder."),
    ]


def settings(published: dict, weights) -> ml_collections.ConfigDict:
    """Our config, sizes read from the weights where nothing is published."""
    config = configs.load("configs/tokenizer/openmagvit2.py")
    base = convolutional.side(weights, "encoder.conv_in.weight")[0]
    levels = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.down."))
    found = tuple(
        convolutional.side(weights, f"encoder.down.{level}.block.0.conv1.weight")[0] // base
        for level in range(levels)
    )
    blocks = sum(f"encoder.down.0.block.{i}.conv1.weight" in weights for i in range(64))
    convolutional.sections(
        config,
        base=base,
        multipliers=tuple(published.get("ch_mult", found)),
        blocks=published.get("num_res_blocks", blocks),
        parts="magvit2",
    )
    size = published.get("resolution", 256)
    config.view.size = (size, size)
    config.quantizer.bits = convolutional.side(weights, "encoder.conv_out.weight")[0]
    return config


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `openmagvit2`, and of one with moving averages."""
    tokenizer = folder.module()
    tokenizer.quantizer.groups = (tokenizer.quantizer.channels,)
    found = taming.painted(folder, tokenizer)
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
    training, _, gradient = taming.trained(folder, tokenizer.quantizer, weights)
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
        unwrap=("state_dict",),
        wrap=("state_dict",),
        aside=(r"loss\..*", r"model_ema\.loss.*", r"model_ema\.(decay|num_updates)"),
        average=taming.average,
        home="huggingface.co/TencentARC/Open-MAGVIT2-Tokenizer-256-resolution (and others)",
        licence="Apache-2.0",
    ),
}
