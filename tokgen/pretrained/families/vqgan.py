"""VQGANs with attention, after taming-transformers: keys, sizes and checks of its descendants."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_collections
import numpy as np
from flax import nnx

from tokgen.config import reading as configs
from tokgen.pretrained import keymap, parity as comparison
from tokgen.pretrained.families import convolutional

BASE, MULTIPLIERS, BLOCKS, HIDDEN = 128, (1, 1, 2, 2, 4), 2, 256  # as published


def stage_key(stage: convolutional.Stage) -> str:
    """Taming's prefix of a stage; `up` is indexed by level, 0 the finest."""
    if stage.level is None:
        return f"mid.{('block_1', 'attn_1', 'block_2')[stage.index]}"
    side = "down" if stage.path.startswith("encoder") else "up"
    if stage.kind in ("down", "up"):
        return f"{side}.{stage.level}.{stage.kind}sample.conv"
    return f"{side}.{stage.level}.{'attn' if stage.kind == 'attention' else 'block'}.{stage.index}"


def networks(
    tokenizer: nnx.Module, key: Callable = stage_key, attention: Callable = convolutional.separate
) -> list[keymap.Row]:
    """Encoder, decoder and the convolutions between them and the quantizer."""
    rows = []
    for side, prefix in (("encoder", "quant_conv"), ("decoder", "post_quant_conv")):
        network = getattr(tokenizer, side)
        rows += convolutional.rows(network, side, key, prefix=f"{side}.", attention=attention)
        rows += keymap.pair(prefix, f"{side}/conv_latent", keymap.CONV)
    return rows


def rows(tokenizer) -> list[keymap.Row]:
    """The keys of taming's and IBQ's `.ckpt`."""
    return [*networks(tokenizer), keymap.row("quantize.embedding.weight", "quantizer/codebook")]


def levels(weights: Mapping[str, np.ndarray]) -> tuple[tuple[int, ...], int]:
    """(widths of the encoder's levels in units of the first convolution's, blocks of a level)."""
    count = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.down."))
    blocks = sum(f"encoder.down.0.block.{i}.conv1.weight" in weights for i in range(64))
    return multipliers(weights, "encoder.down.{}.block.0.conv1.weight", count), blocks


def multipliers(weights: Mapping[str, np.ndarray], pattern: str, count: int) -> tuple[int, ...]:
    """Widths of so many levels in units of the first convolution's; `pattern` is a level's key."""
    base = convolutional.side(weights, "encoder.conv_in.weight")[0]
    return tuple(
        convolutional.side(weights, pattern.format(level))[0] // base for level in range(count)
    )


def sized(
    config: ml_collections.ConfigDict,
    weights: Mapping[str, np.ndarray],
    *,
    widths: tuple[int, ...],
    blocks: int,
) -> ml_collections.ConfigDict:
    """`config` with the sizes of a file; `widths` in units of the first convolution's."""
    channels, hidden, kernel = convolutional.side(weights, "quant_conv.weight")[:3]
    convolutional.sections(
        config,
        base=convolutional.side(weights, "encoder.conv_in.weight")[0],
        multipliers=widths,
        blocks=blocks,
        hidden=hidden,
        projection=kernel,
        variant="taming",
    )
    config.quantizer.codes = convolutional.side(weights, "quantize.embedding.weight")[0]
    config.quantizer.channels = channels
    return config


def settings(
    published: dict, weights: Mapping[str, np.ndarray], *, recipe: str, blocks: int
) -> ml_collections.ConfigDict:
    """Our config of taming's form, sizes read from the weights where nothing is published.

    `recipe` is our config file; `blocks` those of a level where the first one shows none.
    """
    config = configs.load(recipe)
    found, counted = levels(weights)
    size = published.get("resolution", 256)
    config.view.size = (size, size)
    sized(
        config,
        weights,
        widths=tuple(published.get("ch_mult", found)),
        blocks=published.get("num_res_blocks", counted or blocks),
    )
    if "entropy_temperature" in published:
        config.quantizer.temperature = published["entropy_temperature"]
    attended = tuple(
        level for level in range(len(found)) if f"encoder.down.{level}.attn.0.q.weight" in weights
    )
    for name in ("encoder", "decoder"):
        config[name].attend = attended
    return config


def reconstructed(folder, tokenizer) -> dict[str, np.ndarray]:
    """The arrays that all fixtures of this form share; tokens are [B, P, G]."""
    image_BHW3 = convolutional.nhwc(folder.given("image"))
    grid = tokenizer.decoder.grid = convolutional.cells(tokenizer.encoder, image_BHW3)
    latents_BPC = tokenizer.encoder(image_BHW3)
    tokens_BLG = tokenizer.quantizer.encode(latents_BPC)
    codes_BPC = tokenizer.quantizer.decode(tokens_BLG)
    return {
        "latents": convolutional.nchw(convolutional.mapped(latents_BPC, grid)),
        "tokens": np.asarray(tokens_BLG),
        "quantized": convolutional.nchw(convolutional.mapped(codes_BPC, grid)),
        "decoded": convolutional.nchw(tokenizer.decoder(codes_BPC)),
    }


def trained(folder: comparison.Folder, quantizer: nnx.Module, weights: dict[str, float]):
    """(the training form on the fixture's latents, gradient of the latents as a map)"""
    q_BHWC = convolutional.nhwc(folder.given("q_latents"))
    found = convolutional.trained(
        quantizer,
        convolutional.rowed(q_BHWC),
        convolutional.rowed(convolutional.nhwc(folder.given("q_cotangent"))),
        weights,
    )
    side = q_BHWC.shape[1:3]
    out, gradient = (
        convolutional.nchw(convolutional.mapped(array, side))
        for array in (found.out.latents_BPC, found.latents)
    )
    return found, out, gradient


def compared(
    found: dict[str, np.ndarray],
    training: convolutional.Trained,
    out: np.ndarray,
    gradient: np.ndarray,
) -> dict[str, np.ndarray]:
    """What fixtures of one codebook share: `found` of `reconstructed`, the rest of `trained`."""
    return {
        "latents": found["latents"],
        "indices": found["tokens"].ravel(),
        "quantized": found["quantized"],
        "decoded": found["decoded"],
        "q_indices": training.out.tokens_BLG.ravel(),
        "q_out": out,
        "q_grad_latents": gradient,
        "q_grad_codebook": training.params["codebook"],
    }


def average(key: str) -> str:
    """Where LitEma keeps the moving average of a parameter."""
    return f"model_ema.{key.replace('.', '')}"
