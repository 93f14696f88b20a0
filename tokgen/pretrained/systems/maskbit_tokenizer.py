"""VQGAN+ and the bit tokenizers of MaskBit (arXiv:2409.16211)."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import ml_collections
import numpy as np

from tokgen.config import reading as configs
from tokgen.pretrained import keymap
from tokgen.pretrained.families import convolutional
from tokgen.pretrained.system import System
from tokgen.quantizers import lfq

BASE, MULTIPLIERS, BLOCKS = 128, (1, 1, 2, 2, 4), 2  # as published


def _names(levels: int):
    def name(stage: convolutional.Stage) -> str:
        if stage.level is None:
            return f"mid.res_blocks.{stage.index}"
        if stage.path.startswith("encoder"):
            place = f"down.{stage.level}"
        else:
            place = f"up.{levels - 1 - stage.level}"  # in the order of execution
        leaf = {"down": "down_conv", "up": "upsample_conv"}
        return f"{place}.{leaf.get(stage.kind, f'res_blocks.{stage.index}')}"

    return name


def _networks(tokenizer) -> list[keymap.Row]:
    name = _names(tokenizer.decoder.levels)
    return [
        *convolutional.rows(tokenizer.encoder, "encoder", name, prefix="encoder."),
        *convolutional.rows(tokenizer.decoder, "decoder", name, prefix="decoder."),
    ]


def lookup_rows(tokenizer) -> list[keymap.Row]:
    """The keys of `vqgan_plus_*bit.bin`."""
    return [
        *_networks(tokenizer),
        keymap.row("quantize.embedding.weight", "quantizer/codebook"),
    ]


def _settings(
    recipe: str, published: dict, weights: Mapping[str, np.ndarray]
) -> ml_collections.ConfigDict:
    config = configs.load(recipe)
    learned = published.get("sample_with_conv", "encoder.down.0.down_conv.weight" in weights)
    convolutional.sections(
        config,
        base=published.get("hidden_channels", BASE),
        multipliers=published.get("channel_mult", MULTIPLIERS),
        blocks=published.get("num_res_blocks", BLOCKS),
        variant="maskbit" if learned else "maskgit",
    )
    config.decoder.blocks = published.get("num_res_blocks_decoder", config.decoder.blocks)
    stride = 2 ** (len(config.encoder.widths) - 1)
    config.view.size = (max(256, stride),) * 2
    config.view.channels = published.get("num_channels", 3)
    return config


def bit_buffers(tokenizer) -> dict[str, np.ndarray]:
    """What the published class stores beside its parameters: all codes, and each bit's value."""
    bits = tokenizer.quantizer.channels
    ids = jnp.arange(2**bits)[None, :, None]
    return {
        "quantize.bits_to_indices": 2 ** np.arange(bits, dtype=np.int32),
        "quantize.codebook": np.asarray(_whole(tokenizer.quantizer).decode(ids)[0]),
    }


def _whole(quantizer):
    """A quantizer of as many bits, with one symbol for all, as published."""
    return lfq.Quantizer(quantizer.channels, grid=quantizer.layout.grids[0])


def lookup_settings(published: dict, weights) -> ml_collections.ConfigDict:
    """Our config of VQGAN+."""
    config = _settings("configs/tokenizer/vqgan_plus.py", published, weights)
    codes, channels = convolutional.side(weights, "quantize.embedding.weight")
    temperature = published.get("entropy_loss_temperature", 0.01)
    weight = published.get("entropy_loss_weight", 0.0)
    config.quantizer = dict(
        name="vq",
        codes=codes,
        channels=channels,
        normalize=published.get("use_l2_normalisation", False),
        revive=0.0,
        temperature=temperature if weight else 0.0,
        entropy="clamped",
    )
    return config


def bit_settings(published: dict, weights) -> ml_collections.ConfigDict:
    """Our config of a bit tokenizer; the size of the codebook in published files does not bind.

    A token has two symbols, as the published generators read it, or as many as the
    `codebook_splits` of a generator's configuration says.
    """
    config = _settings("configs/tokenizer/maskbit.py", published, weights)
    bits = convolutional.side(weights, "encoder.conv_out.weight")[0]
    splits = published.get("codebook_splits", 2)
    splits = splits if bits % splits == 0 else 1
    config.quantizer.bits, config.quantizer.groups = bits, (bits // splits,) * splits
    return config


def _parity(folder, learned: bool) -> dict[str, np.ndarray]:
    tokenizer = folder.module()
    if not learned:
        tokenizer.quantizer.groups = (tokenizer.quantizer.channels,)  # codes as published
    nchw, nhwc, mapped = convolutional.nchw, convolutional.nhwc, convolutional.mapped
    image_BHW3 = nhwc(folder.given("image"))
    grid = tokenizer.decoder.grid = convolutional.cells(tokenizer.encoder, image_BHW3)
    latents_BPC = tokenizer.encoder(image_BHW3)
    tokens_BLG = tokenizer.quantizer.encode(latents_BPC)
    codes_BPC = tokenizer.quantizer.decode(tokens_BLG)
    decoded = nchw(tokenizer.decoder(codes_BPC))
    found = {
        "latents": nchw(mapped(latents_BPC, grid)),
        "indices": mapped(tokens_BLG, grid)[..., 0],
        "quantized": nchw(mapped(codes_BPC, grid)),
        "decoded": decoded,
        "forward": decoded,
    }
    q_BHWC = nhwc(folder.given("q_latents"))
    side, published = q_BHWC.shape[1:3], folder.config
    weight, gamma = published["entropy_loss_weight"], published["entropy_gamma"]
    weights = {
        "commitment": published["commitment_cost"],
        "sample_entropy": weight,
        "batch_entropy": -weight * gamma,
    }
    if learned:
        weights["codebook"] = 1.0
    # written out whatever the number of bits: the clamp of their logarithms is felt at 1.0
    tokenizer.quantizer.whole = tokenizer.quantizer.channels
    for temperature, suffix in ((published["entropy_loss_temperature"], ""), (1.0, "_t1")):
        tokenizer.quantizer.temperature = temperature
        trained = convolutional.trained(
            tokenizer.quantizer,
            convolutional.rowed(q_BHWC),
            convolutional.rowed(nhwc(folder.given("q_cotangent"))),
            weights,
        )
        losses = trained.out.losses
        found |= {
            f"q_quantizer_loss{suffix}": trained.loss,
            f"q_commitment_loss{suffix}": published["commitment_cost"] * losses["commitment"],
            f"q_entropy_loss{suffix}": sum(
                weights[name] * losses[name] for name in ("sample_entropy", "batch_entropy")
            ),
            # not computed there at weight 0
            f"q_per_sample_entropy{suffix}": bool(weight) * losses["sample_entropy"],
            f"q_avg_entropy{suffix}": bool(weight) * gamma * losses["batch_entropy"],
            f"q_grad_latents{suffix}": nchw(mapped(trained.latents, side)),
        }
        if learned:
            found[f"q_codebook_loss{suffix}"] = losses["codebook"]
            found[f"q_grad_codebook{suffix}"] = trained.params["codebook"]
    return found | {"q_indices": mapped(trained.out.tokens_BLG, side)[..., 0]}


def bit_parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `maskbit_tokenizer`."""
    codes = bit_buffers(folder.module())["quantize.codebook"]
    return _parity(folder, learned=False) | {"all_bits": codes}


def lookup_parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `maskbit_vqganplus`."""
    return _parity(folder, learned=True)


SYSTEMS = {
    "maskbit_tokenizer": System(
        bit_parity,
        bit_settings,
        _networks,
        aside=(r"quantize\.(bits_to_indices|codebook)",),
        derived=bit_buffers,
        licence="Apache-2.0",
    ),
    "maskbit_vqganplus": System(
        lookup_parity,
        lookup_settings,
        lookup_rows,
        licence="Apache-2.0",
    ),
}
