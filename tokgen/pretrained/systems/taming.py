"""VQGAN with attention: taming's (arXiv:2012.09841), LlamaGen's and IBQ's."""

from __future__ import annotations

import ml_collections
import numpy as np

from tokgen.config import reading as configs
from tokgen.pretrained import convolutional, keymap
from tokgen.pretrained.system import System

BASE, MULTIPLIERS, BLOCKS, HIDDEN = 128, (1, 1, 2, 2, 4), 2, 256  # as published


def name(stage: convolutional.Stage) -> str:
    """Taming's prefix of a stage; `up` is indexed by level, 0 the finest."""
    if stage.level is None:
        return f"mid.{('block_1', 'attn_1', 'block_2')[stage.index]}"
    side = "down" if stage.path.startswith("encoder") else "up"
    if stage.kind in ("down", "up"):
        return f"{side}.{stage.level}.{stage.kind}sample.conv"
    return f"{side}.{stage.level}.{'attn' if stage.kind == 'attention' else 'block'}.{stage.index}"


def networks(tokenizer, name=name, attention=convolutional.separate) -> list[keymap.Row]:
    """Encoder, decoder and the convolutions between them and the quantizer."""
    rows = []
    for side, prefix in (("encoder", "quant_conv"), ("decoder", "post_quant_conv")):
        network = getattr(tokenizer, side)
        rows += convolutional.rows(network, side, name, prefix=f"{side}.", attention=attention)
        rows += keymap.pair(prefix, f"{side}/conv_latent", keymap.CONV)
    return rows


def rows(tokenizer) -> list[keymap.Row]:
    """The keys of taming's and IBQ's `.ckpt`."""
    return [*networks(tokenizer), keymap.row("quantize.embedding.weight", "quantizer/codebook")]


def _llamagen_names(levels: int):
    def llamagen_name(stage: convolutional.Stage) -> str:
        if stage.level is None:
            return f"mid.{stage.index}"
        # the decoder's blocks are stored in the order of execution
        encoding = stage.path.startswith("encoder")
        place = f"conv_blocks.{stage.level if encoding else levels - 1 - stage.level}"
        if stage.kind in ("down", "up"):
            return f"{place}.{stage.kind}sample.conv"
        return f"{place}.{'attn' if stage.kind == 'attention' else 'res'}.{stage.index}"

    return llamagen_name


def llamagen_rows(tokenizer) -> list[keymap.Row]:
    """The keys of `vq_ds16_c2i.pt` and `vq_ds8_c2i.pt`."""
    return [
        *networks(tokenizer, _llamagen_names(tokenizer.decoder.levels)),
        keymap.row("quantize.embedding.weight", "quantizer/codebook"),
    ]


def _sized(
    config: ml_collections.ConfigDict, published: dict, weights, *, multipliers, blocks: int
) -> ml_collections.ConfigDict:
    channels, hidden = convolutional.side(weights, "quant_conv.weight")[:2]
    convolutional.sections(
        config,
        base=convolutional.side(weights, "encoder.conv_in.weight")[0],
        multipliers=multipliers,
        blocks=published.get("num_res_blocks", blocks),
        hidden=hidden,
        projection=convolutional.side(weights, "quant_conv.weight")[2],
        variant="taming",
    )
    config.quantizer.codes = convolutional.side(weights, "quantize.embedding.weight")[0]
    config.quantizer.channels = channels
    return config


def _multipliers(weights, pattern: str, levels: int) -> tuple[int, ...]:
    """Widths of the encoder's levels in units of the first convolution's."""
    base = convolutional.side(weights, "encoder.conv_in.weight")[0]
    return tuple(
        convolutional.side(weights, pattern.format(level))[0] // base for level in range(levels)
    )


def settings_of(recipe: str, blocks: int):
    """Our config of taming's form, sizes read from the weights where nothing is published."""

    def settings(published: dict, weights) -> ml_collections.ConfigDict:
        config = configs.load(recipe)
        levels = 1 + max(
            int(key.split(".")[2]) for key in weights if key.startswith("encoder.down.")
        )
        found = _multipliers(weights, "encoder.down.{}.block.0.conv1.weight", levels)
        blocks_found = sum(f"encoder.down.0.block.{i}.conv1.weight" in weights for i in range(64))
        options = {"num_res_blocks": blocks_found or blocks} | published
        size = published.get("resolution", 256)
        config.view.size = (size, size)
        multipliers = tuple(published.get("ch_mult", found))
        _sized(config, options, weights, multipliers=multipliers, blocks=blocks)
        if "entropy_temperature" in published:
            config.quantizer.temperature = published["entropy_temperature"]
        for name in ("encoder", "decoder"):
            config[name].attend = tuple(
                level
                for level in range(levels)
                if f"encoder.down.{level}.attn.0.q.weight" in weights
            )
        return config

    return settings


def llamagen_settings(published: dict, weights) -> ml_collections.ConfigDict:
    """Our config of LlamaGen's tokenizers; the stride is told from the number of levels."""
    config = configs.load("configs/tokenizer/llamagen_vq.py")
    prefix = "encoder.conv_blocks."
    levels = 1 + max((int(k.split(".")[2]) for k in weights if k.startswith(prefix)), default=0)
    found = _multipliers(weights, prefix + "{}.res.0.conv1.weight", levels)
    multipliers = tuple(published.get("encoder_ch_mult", found))
    _sized(config, published, weights, multipliers=multipliers, blocks=BLOCKS)
    multipliers = published.get("decoder_ch_mult", multipliers)
    config.decoder.widths = tuple(config.encoder.start * m for m in multipliers)
    config.quantizer.normalize = published.get("codebook_l2_norm", True)
    # the published trainer pays for the entropies at weight 0; we don't
    config.quantizer.temperature = 0.01 if published.get("entropy_loss_ratio", 0.0) else 0.0
    return config


def painted(folder, tokenizer) -> dict[str, np.ndarray]:
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


def trained(folder, quantizer, weights: dict[str, float]):
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


def llamagen_parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `llamagen_vq`."""
    tokenizer = folder.module()
    found = painted(folder, tokenizer)
    ratio = folder.setting("entropy_loss_ratio")
    beta = folder.setting("commit_loss_beta")
    weights = {
        "codebook": 1.0,
        "commitment": beta,
        "sample_entropy": ratio,
        "batch_entropy": -ratio,
    }
    if not ratio:
        weights = {name: w for name, w in weights.items() if "entropy" not in name}
    training, out, gradient = trained(folder, tokenizer.quantizer, weights)
    losses = training.out.losses
    entropy = losses.get("sample_entropy", 0.0) - losses.get("batch_entropy", 0.0)
    return {
        "latents": found["latents"],
        "indices": found["tokens"].ravel(),
        "quantized": found["quantized"],
        "decoded": found["decoded"],
        "forward": found["decoded"],
        "q_indices": training.out.tokens_BLG.ravel(),
        "q_out": out,
        "q_vq_loss": losses["codebook"],
        "q_commit_loss": beta * losses["commitment"],
        "q_entropy_loss": ratio * entropy,
        "q_grad_latents": gradient,
        "q_grad_codebook": training.params["codebook"],
    }


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of a fixture of taming's VQGAN."""
    tokenizer = folder.module()
    found = painted(folder, tokenizer)
    # `legacy`, as published: beta weighs the codebook's term
    near, far = (
        ("codebook", "commitment") if folder.setting("legacy") else ("commitment", "codebook")
    )
    weights = {far: 1.0, near: folder.setting("beta")}
    training, out, gradient = trained(folder, tokenizer.quantizer, weights)
    return {
        "latents": found["latents"],
        "indices": found["tokens"].ravel(),
        "quantized": found["quantized"],
        "decoded": found["decoded"],
        "q_indices": training.out.tokens_BLG.ravel(),
        "q_out": out,
        "q_loss": training.loss,
        "q_grad_latents": gradient,
        "q_grad_codebook": training.params["codebook"],
    }


def average(key: str) -> str:
    """Where LitEma keeps the moving average of a parameter."""
    return f"model_ema.{key.replace('.', '')}"


def meter(tokenizer) -> dict[str, np.ndarray]:
    """LlamaGen's record of its last 65,536 tokens, a meter of usage; it begins empty."""
    del tokenizer
    return {"quantize.codebook_used": np.zeros(65536, np.float32)}


SYSTEMS = {
    "taming_vqgan": System(
        parity,
        settings_of("configs/tokenizer/taming_vqgan.py", BLOCKS),
        rows,
        unwrap=("state_dict",),
        wrap=("state_dict",),
        aside=(r"loss\..*",),  # LPIPS and the discriminator
        home="github.com/CompVis/taming-transformers (links to heibox.uni-heidelberg.de)",
        files=("last.ckpt",),
        licence="MIT",
    ),
    "llamagen_vq": System(
        llamagen_parity,
        llamagen_settings,
        llamagen_rows,
        unwrap=("model", "state_dict"),
        averaged="ema",
        wrap=("model",),
        aside=(r"quantize\.codebook_used",),
        derived=meter,
        home="huggingface.co/FoundationVision/LlamaGen; huggingface.co/peizesun/llamagen_t2i",
        files=("vq_ds{8,16}_c2i.pt", "vq_ds16_t2i.pt"),
        licence="MIT",
    ),
}
