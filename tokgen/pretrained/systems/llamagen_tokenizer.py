"""LlamaGen's tokenizers (arXiv:2406.06525): VQGAN's networks under keys of their own."""

from __future__ import annotations

import ml_collections
import numpy as np

from tokgen.config import reading as configs
from tokgen.pretrained import keymap
from tokgen.pretrained.families import convolutional, vqgan
from tokgen.pretrained.system import System


def _stage_keys(levels: int):
    def key(stage: convolutional.Stage) -> str:
        if stage.level is None:
            return f"mid.{stage.index}"
        # the decoder's blocks are stored in the order of execution
        encoding = stage.path.startswith("encoder")
        place = f"conv_blocks.{stage.level if encoding else levels - 1 - stage.level}"
        if stage.kind in ("down", "up"):
            return f"{place}.{stage.kind}sample.conv"
        return f"{place}.{'attn' if stage.kind == 'attention' else 'res'}.{stage.index}"

    return key


def rows(tokenizer) -> list[keymap.Row]:
    """The keys of `vq_ds16_c2i.pt` and `vq_ds8_c2i.pt`."""
    return [
        *vqgan.networks(tokenizer, _stage_keys(tokenizer.decoder.levels)),
        keymap.row("quantize.embedding.weight", "quantizer/codebook"),
    ]


def settings(published: dict, weights) -> ml_collections.ConfigDict:
    """Our config of LlamaGen's tokenizers; the stride is told from the number of levels."""
    config = configs.load("configs/tokenizer/llamagen_vq.py")
    prefix = "encoder.conv_blocks."
    levels = 1 + max((int(k.split(".")[2]) for k in weights if k.startswith(prefix)), default=0)
    found = vqgan.multipliers(weights, prefix + "{}.res.0.conv1.weight", levels)
    widths = tuple(published.get("encoder_ch_mult", found))
    blocks = published.get("num_res_blocks", vqgan.BLOCKS)
    vqgan.sized(config, weights, widths=widths, blocks=blocks)
    widths = published.get("decoder_ch_mult", widths)
    config.decoder.widths = tuple(config.encoder.start * width for width in widths)
    config.quantizer.normalize = published.get("codebook_l2_norm", True)
    # the published trainer pays for the entropies at weight 0; we don't
    config.quantizer.temperature = 0.01 if published.get("entropy_loss_ratio", 0.0) else 0.0
    return config


def meter(tokenizer) -> dict[str, np.ndarray]:
    """LlamaGen's record of its last 65,536 tokens, a meter of usage; it begins empty."""
    del tokenizer
    return {"quantize.codebook_used": np.zeros(65536, np.float32)}


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `llamagen_vq`."""
    tokenizer = folder.module()
    found = vqgan.reconstructed(folder, tokenizer)
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
    training, out, gradient = vqgan.trained(folder, tokenizer.quantizer, weights)
    losses = training.out.losses
    entropy = losses.get("sample_entropy", 0.0) - losses.get("batch_entropy", 0.0)
    return vqgan.compared(found, training, out, gradient) | {
        "forward": found["decoded"],
        "q_vq_loss": losses["codebook"],
        "q_commit_loss": beta * losses["commitment"],
        "q_entropy_loss": ratio * entropy,
    }


SYSTEMS = {
    "llamagen_vq": System(
        parity,
        settings,
        rows,
        unwrap=("model", "state_dict"),
        averaged="ema",
        wrap=("model",),
        aside=(r"quantize\.codebook_used",),
        derived=meter,
        licence="MIT",
    ),
}
