"""IBQ (arXiv:2412.02692): taming's networks around a codebook trained by index backpropagation.

Its generator (`AR_256_B.ckpt` ... `AR_256_XXL.ckpt`) is LlamaGen's with adaptive norms.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import ml_collections
import numpy as np

from tokgen.config import reading as configs
from tokgen.interfaces import TokenLayout
from tokgen.pretrained import keymap, sequence
from tokgen.pretrained.system import System
from tokgen.pretrained.systems import taming


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


# ---------------------------------------------------------------- the generator

PUBLISHED = ("model", "init_args", "transformer_config", "params")
VARIANTS = {1024: "b", 1280: "l", 1536: "xl", 1920: "xxl"}
CELLS = 256
# Gates of attention and MLP, scales, shifts; ours are shift, scale, gate of the one and the other
CHUNKS = (4, 2, 0, 5, 3, 1)
GRADIENTS = (
    *("tok_emb.weight", "class_emb.embedding_table.weight", "blocks.0.attention.wqkv.weight"),
    *("blocks.1.feed_forward.w2.weight", "blocks.0.attention_norm.weight"),
    *("blocks.0.ada_lin.1.weight", "blocks.1.ada_lin.1.bias", "head_nm.rmsnorm.weight"),
    *("head_nm.ada_lin.1.weight", "head.weight"),
)


def generator_rows(generator) -> list[keymap.Row]:
    """The keys of a Lightning checkpoint's `transformer`."""
    lead = keymap.one(lambda a, shape: a.reshape(shape), lambda a: a[0])
    depth, path = generator.transformer.depth, "transformer/blocks"
    rows = [
        keymap.row("transformer.tok_emb.weight", "embeddings/table", lead),
        keymap.row("transformer.class_emb.embedding_table.weight", "conditioning/labels/table"),
        *sequence.llama_blocks("transformer.blocks", path, depth),
        keymap.row("transformer.head_nm.rmsnorm.weight", "head/norm/scale"),
        # scale, shift
        keymap.row(
            "transformer.head_nm.ada_lin.1.weight", "head/modulation/kernel", keymap.chunks((1, 0))
        ),
        keymap.row(
            "transformer.head_nm.ada_lin.1.bias", "head/modulation/bias", keymap.chunks_bias((1, 0))
        ),
        keymap.row("transformer.head.weight", "head/head/kernel", keymap.LINEAR),
    ]
    for i in range(depth):
        key, place = f"transformer.blocks.{i}.ada_lin.1", f"{path}/modulation"
        rows += [
            keymap.row(f"{key}.weight", (f"{place}/kernel", i), keymap.chunks(CHUNKS)),
            keymap.row(f"{key}.bias", (f"{place}/bias", i), keymap.chunks_bias(CHUNKS)),
        ]
    return rows


def generator_tokens(published: dict, weights: Mapping[str, np.ndarray]) -> tuple[TokenLayout, int]:
    """(layout, classes)."""
    cells = sequence.section(published, *PUBLISHED).get("block_size", CELLS)
    classes = len(weights["transformer.class_emb.embedding_table.weight"]) - 1
    return sequence.square((len(weights["transformer.head.weight"]),), cells), classes


def generator_settings(
    published: dict, weights: Mapping[str, np.ndarray]
) -> ml_collections.ConfigDict:
    """Our config; without a published one, sizes are the weights' and heads have 64 channels."""
    width = weights["transformer.head.weight"].shape[1]
    found = sequence.section(published, *PUBLISHED)
    config = configs.load(f"configs/generator/ibq.py:{VARIANTS.get(width, 'b')}")
    config.precision.compute = "float32"  # whatever the recipe trains in
    config.generator.width = width
    config.generator.depth = sequence.depth(weights, "transformer.blocks")
    config.generator.heads = sequence.heads(found, "n_head", width)
    config.generator.hidden = len(weights["transformer.blocks.0.feed_forward.w1.weight"])
    return config


def generator_parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `ibq_generator`."""
    generator = sequence.still(folder.module())
    label_B = jnp.asarray(folder.given("labels"))
    batch = sequence.batch(folder.given("tokens"), label_B)
    null = batch.replace(cond=generator.null(label_B))
    found = sequence.losses(folder, generator, batch, [f"transformer.{name}" for name in GRADIENTS])
    computed = {
        "logits": sequence.slots(generator, batch)[:, :-1],
        "logits_uncond": sequence.slots(generator, null)[:, :-1],
        **{name: found[name] for name in ("loss", "grad_norms", "grad_norm_all")},
    }
    for name, weights in sequence.decodes(folder.arrays, generator.layout.length):
        computed[name] = sequence.greedy(generator, label_B, weights)[..., 0]
    return computed


SYSTEMS = {
    "ibq": System(
        parity,
        taming.settings_of("configs/tokenizer/ibq.py", 4),
        taming.rows,
        unwrap=("state_dict.first_stage_model", "state_dict"),  # within a generator's file
        wrap=("state_dict",),
        aside=(r"loss\..*", r"model_ema\.loss.*", r"model_ema\.(decay|num_updates)"),
        average=taming.average,
        home="huggingface.co/TencentARC/IBQ-Tokenizer-{1024,8192,16384,262144}; of the others "
        "huggingface.co/TencentARC/IBQ-Tokenizer-{16384,262144}-Pretrain",
        files=("imagenet256_{1024,8192,16384,262144}.ckpt", "IBQ_pretrain_{16384,262144}.ckpt"),
        licence="Apache-2.0",
    ),
    "ibq_generator": System(
        generator_parity,
        generator_settings,
        generator_rows,
        tokens=generator_tokens,
        unwrap=("state_dict",),
        wrap=("state_dict",),
        aside=(r"(first|cond)_stage_model\..*",),  # the tokenizer
        beside="ibq",
        home="huggingface.co/TencentARC/IBQ-AR-{B,L,XL,XXL}",
        files=("AR_256_{B,L,XL,XXL}.ckpt",),
        licence="Apache-2.0",
    ),
}
