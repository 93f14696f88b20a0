"""MaskGIT's VQGAN (arXiv:2202.04200): the original Flax file and its PyTorch port."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tokgen.config import reading as configs
from tokgen.interfaces import UserError
from tokgen.pretrained import keymap
from tokgen.pretrained.families import convolutional, titok
from tokgen.pretrained.system import System
from tokgen.quantizers import entropy

BASE, MULTIPLIERS, BLOCKS = 128, (1, 1, 2, 2, 4), 2  # as published
# Choices of the Flax config of which only the published one is known here.
CHOICES = {
    "activation_fn": "swish",
    "conv_downsample": False,
    "entropy_loss_type": "softmax",
    "norm_type": "GN",
    "quantizer": "vq",
}


def port_rows(tokenizer) -> list[keymap.Row]:
    """The keys of `maskgit-vqgan-imagenet-f16-256.bin`."""
    return [
        *convolutional.rows(tokenizer.encoder, "encoder", titok.port_stage_key, prefix="encoder."),
        *titok.decoder_rows(tokenizer.decoder, "decoder", "decoder."),
        keymap.row("quantize.embedding.weight", "quantizer/codebook"),
    ]


def flax_rows(tokenizer) -> list[keymap.Row]:
    """The keys of `tokenizer_imagenet256_checkpoint`: Flax numbers modules as they are called."""
    rows = [keymap.row("params.quantizer.codebook", "quantizer/codebook")]
    for side in ("encoder", "decoder"):
        network = getattr(tokenizer, side)
        stages = list(convolutional.walk(network, side))
        blocks = [stage for stage in stages if stage.kind == "block"]
        for number, stage in enumerate(blocks):
            key = f"params.{side}.ResBlock_{number}"
            for part in (1, 2):
                rows += _norm(f"{key}.GroupNorm_{part - 1}", f"{stage.path}/norm{part}")
                place = f"{stage.path}/conv{part}/kernel"
                rows.append(keymap.row(f"{key}.Conv_{part - 1}.kernel", place))
            if stage.module.conv_skip is not None:
                rows.append(keymap.row(f"{key}.Conv_2.kernel", f"{stage.path}/conv_skip/kernel"))
        between = [f"{s.path}/conv" for s in stages if s.kind in ("up", "down")]
        if network.stages and side == "encoder":
            between = []  # averages
        for number, path in enumerate([f"{side}/conv_in", *between, f"{side}/conv_out"]):
            rows.append(keymap.row(f"params.{side}.Conv_{number}.kernel", f"{path}/kernel"))
            if path != "encoder/conv_in":
                rows.append(keymap.row(f"params.{side}.Conv_{number}.bias", f"{path}/bias"))
        rows += _norm(f"params.{side}.GroupNorm_0", f"{side}/norm")
    return rows


def _norm(key: str, path: str) -> list[keymap.Row]:
    return [keymap.row(f"{key}.{part}", f"{path}/{part}") for part in ("scale", "bias")]


def settings(published: dict, weights) -> ml_collections.ConfigDict:
    """Our config for either form; `published` has the fields of the port or of the Flax config."""
    for choice, known in CHOICES.items():
        if published.get(choice, known) != known:
            raise UserError(
                f"{choice} of a MaskGIT tokenizer must be {known!r}, as published; found "
                f"{published[choice]!r}: there is no such network here"
            )
    config = configs.load("configs/tokenizer/maskgit_vqgan.py")
    codebook = "quantize.embedding.weight"
    codebook = codebook if codebook in weights else "params.quantizer.codebook"
    codes, channels = convolutional.side(weights, codebook)
    multipliers = published.get("channel_mult", published.get("channel_multipliers", MULTIPLIERS))
    base = published.get("hidden_channels", published.get("filters", BASE))
    size = published.get("resolution", published.get("image_size", 256))
    convolutional.sections(
        config,
        base=base,
        multipliers=multipliers,
        blocks=published.get("num_res_blocks", BLOCKS),
        variant="maskgit",
    )
    config.view.size = (size, size)
    config.view.channels = published.get("num_channels", 3)
    config.quantizer.codes, config.quantizer.channels = codes, channels
    config.quantizer.temperature = published.get("entropy_temperature", 0.01)
    return config


def port_parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `maskgit_vqgan`."""
    tokenizer = folder.module()
    nchw, image_BHW3 = convolutional.nchw, convolutional.nhwc(folder.given("image"))
    grid = tokenizer.decoder.grid = convolutional.cells(tokenizer.encoder, image_BHW3)
    latents_BPC = tokenizer.encoder(image_BHW3)
    tokens_BLG = tokenizer.quantizer.encode(latents_BPC)
    codes_BPC = tokenizer.quantizer.decode(tokens_BLG)
    decoded = nchw(tokenizer.decoder(codes_BPC))
    q_BHWC = convolutional.nhwc(folder.given("q_latents"))
    flat_BPC, codebook_VC = convolutional.rowed(q_BHWC), tokenizer.quantizer.codebook[...]
    trained = convolutional.trained(
        tokenizer.quantizer,
        flat_BPC,
        convolutional.rowed(convolutional.nhwc(folder.given("q_cotangent"))),
        # the port weighs the codebook's term, not the commitment
        {"commitment": 1.0, "codebook": folder.config.get("commitment_cost", 0.25)},
    )
    distances_BPV = (
        jnp.sum(flat_BPC**2, -1, keepdims=True)
        - 2 * jnp.einsum("BPC,VC->BPV", flat_BPC, codebook_VC)
        + jnp.sum(codebook_VC**2, -1)[None, None]
    )
    return {
        "latents": nchw(convolutional.mapped(latents_BPC, grid)),
        "indices": tokens_BLG[..., 0],
        "quantized": nchw(convolutional.mapped(codes_BPC, grid)),
        "recon_unclamped": decoded,
        "decoded": np.clip(decoded, 0, 1),
        "q_indices": trained.out.tokens_BLG[..., 0],
        "q_loss": trained.loss,
        "q_grad_latents": nchw(convolutional.mapped(trained.latents, q_BHWC.shape[1:3])),
        "q_grad_codebook": trained.params["codebook"],
        "q_soft_code_t2": jax.nn.softmax(-distances_BPV / 2, axis=-1),
    }


def flax_parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `maskgit_tokenizer`."""
    tokenizer = folder.module()
    image_BHW3 = folder.given("image")
    grid = tokenizer.decoder.grid = convolutional.cells(tokenizer.encoder, image_BHW3)
    latents_BPC = tokenizer.encoder(image_BHW3)
    tokens_BLG = tokenizer.quantizer.encode(latents_BPC)
    codes_BPC = tokenizer.quantizer.decode(tokens_BLG)
    q_BHWC = folder.given("q_latents")
    weight = folder.setting("entropy_loss_ratio")
    trained = convolutional.trained(
        tokenizer.quantizer,
        convolutional.rowed(q_BHWC),
        convolutional.rowed(folder.given("q_cotangent")),
        {
            "commitment": folder.setting("commitment_cost"),
            "codebook": 1.0,
            "sample_entropy": weight,
            "batch_entropy": -weight,
        },
    )
    losses = trained.out.losses
    affinity = jnp.asarray(folder.given("ent_affinity"))
    side = q_BHWC.shape[1:3]
    return {
        "latents": convolutional.mapped(latents_BPC, grid),
        "indices": convolutional.mapped(tokens_BLG, grid)[..., 0],
        "quantized": convolutional.mapped(codes_BPC, grid),
        "decoded": tokenizer.decoder(codes_BPC),
        "q_indices": convolutional.mapped(trained.out.tokens_BLG, side)[..., 0],
        "q_quantizer_loss": trained.loss,
        "q_e_latent_loss": folder.setting("commitment_cost") * losses["commitment"],
        "q_q_latent_loss": losses["codebook"],
        "q_entropy_loss": weight * (losses["sample_entropy"] - losses["batch_entropy"]),
        "q_grad_latents": convolutional.mapped(trained.latents, side),
        "q_grad_codebook": trained.params["codebook"],
        "ent_softmax": _entropy(entropy.of_affinities(affinity, 0.5, "shifted")),
        "ent_argmax": _entropy(entropy.of_choices(affinity, 0.5, "shifted")),
    }


def _entropy(terms) -> jax.Array:
    return terms["sample_entropy"] - terms["batch_entropy"]


SYSTEMS = {
    "maskgit_vqgan": System(
        port_parity,
        settings,
        port_rows,
        licence="Apache-2.0",
    ),
    "maskgit_tokenizer": System(
        flax_parity,
        settings,
        flax_rows,
        form="flax",
        licence="Apache-2.0",
    ),
}
