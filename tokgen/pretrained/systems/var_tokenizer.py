"""VAR's multi-scale VQVAE (arXiv:2404.02905)."""

from __future__ import annotations

import ml_collections
import numpy as np

from tokgen.config import reading as configs
from tokgen.pretrained import keymap
from tokgen.pretrained.families import convolutional, vqgan
from tokgen.pretrained.system import System
from tokgen.quantizers import multiscale

# [S, V] there; here every scale has one symbol per position
COUNTS = keymap.one(lambda a, shape: a.reshape(shape), lambda a: a[:, 0])
MULTIPLIERS, BLOCKS = (1, 1, 2, 2, 4), 2  # as published
# Where phi's convolutions lie: one per scale, one for all, or a list of a few
SHARED = {None: "quantize.quant_resi.{}", 1: "quantize.quant_resi.qresi"}


def rows(tokenizer) -> list[keymap.Row]:
    """The keys of `vae_ch160v4096z32.pth`."""
    found = vqgan.networks(tokenizer, attention=convolutional.fused)
    for number in range(len(tokenizer.quantizer.convs)):
        key = SHARED.get(tokenizer.quantizer.phi, "quantize.quant_resi.qresi_ls.{}")
        found += keymap.pair(key.format(number), f"quantizer/convs/{number}", keymap.CONV)
    return [
        *found,
        keymap.row("quantize.embedding.weight", "quantizer/inner/codebook"),
        keymap.row("quantize.ema_vocab_hit_SV", "quantizer/counts", COUNTS),
    ]


def settings(published: dict, weights) -> ml_collections.ConfigDict:
    """Our config; the number of scales tells the published schedules apart."""
    config = configs.load("configs/tokenizer/var_vqvae.py")
    base = convolutional.side(weights, "encoder.conv_in.weight")[0]
    channels, hidden, kernel = convolutional.side(weights, "quant_conv.weight")[:3]
    multipliers = tuple(published.get("ch_mult", MULTIPLIERS))
    convolutional.sections(
        config,
        base=base,
        multipliers=multipliers,
        blocks=published.get("num_res_blocks", BLOCKS),
        hidden=hidden,
        projection=kernel,
        variant="taming",
    )
    scales = tuple(published.get("v_patch_nums", multiscale.VAR_256))
    config.view.size = (scales[-1] * 2 ** (len(multipliers) - 1),) * 2
    config.quantizer.scales = scales
    convs = [key for key in weights if key.startswith("quantize.quant_resi.")]
    apart = "quantize.quant_resi.0.weight" in weights
    config.quantizer.phi = None if apart else len(convs) // 2
    config.quantizer.ratio = abs(published.get("quant_resi", 0.5))
    config.quantizer.quantizer.match = "angle" if published.get("using_znorm") else "distance"
    config.quantizer.quantizer.codes = convolutional.side(weights, "quantize.embedding.weight")[0]
    config.quantizer.quantizer.channels = channels
    return config


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `var_vqvae`."""
    tokenizer = folder.module()
    quantizer, grid = tokenizer.quantizer, tokenizer.decoder.grid
    nchw, mapped = convolutional.nchw, convolutional.mapped
    latents_BPC = tokenizer.encoder(convolutional.nhwc(folder.given("image")))
    tokens_BLG = quantizer.encode(latents_BPC)
    partial = list(quantizer.partial(tokens_BLG))
    found = {"features": nchw(mapped(latents_BPC, grid))}
    for scale, (start, size) in enumerate(quantizer.layout.spans):
        found[f"indices_{scale}"] = tokens_BLG[:, start : start + size, 0]
        found[f"f_hat_{scale}"] = nchw(mapped(partial[scale], grid))

    def image(latents_BPC):
        return np.clip(nchw(tokenizer.decoder(latents_BPC)), -1, 1)

    beta = folder.config.get("beta", 0.25)
    weights = {"codebook": 1.0, "commitment": beta}
    training, out, gradient = vqgan.trained(folder, quantizer, weights)
    if "q_grad_phi0" in folder.arrays:
        phi = np.asarray(training.params["convs/0/kernel"])
        found["q_grad_phi0"] = phi.transpose(3, 2, 0, 1)
    return found | {
        "var_input": quantizer.known_before(tokens_BLG),
        "recon_last": image(partial[-1]),
        "recon_scale1": image(partial[1]),
        "q_f_hat": out,
        "q_loss": training.loss,
        "q_usages": 100 * quantizer.usage(out.size // quantizer.channels)[:, 0],
        "q_grad_latents": gradient,
        "q_grad_codebook": training.params["inner/codebook"],
    }


SYSTEMS = {
    "var_vqvae": System(
        parity,
        settings,
        rows,
        unwrap=("trainer.vae_local",),  # of the generator's training checkpoints
        licence="MIT",
    ),
}
