"""Open-MAGVIT2 (arXiv:2409.04410): its bit tokenizer, and its generator (`AR_256_*.ckpt`)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tokgen.config import reading as configs
from tokgen.interfaces import TokenLayout
from tokgen.pretrained import convolutional, keymap, sequence
from tokgen.pretrained.system import System
from tokgen.pretrained.systems import taming

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


# ---------------------------------------------------------------- the generator

PUBLISHED = ("model", "init_args", "transformer_config", "params")
VARIANTS = {1024: "b", 1280: "l", 1536: "xl"}
CELLS = 256
PAIR = ("pre", "post")  # what the two symbols are called
GRADIENTS = (
    *("pre_emb.weight", "post_emb.weight", "class_emb.embedding_table.weight"),
    *("spatial_blocks.0.attention.wqkv.weight", "spatial_blocks.1.feed_forward.w3.weight"),
    *("factorized_blocks.0.attention.wqkv.weight", "factorized_blocks.1.ffn_norm.weight"),
    *("norm.weight", "head.0.weight", "head.1.weight"),
)


def generator_rows(generator) -> list[keymap.Row]:
    """The keys of a Lightning checkpoint's `transformer`."""
    blocks = (
        ("spatial_blocks", "transformer", generator.transformer),
        ("factorized_blocks", "head/transformer", generator.head.transformer),
    )
    rows = [
        keymap.row("transformer.class_emb.embedding_table.weight", "conditioning/labels/table"),
        keymap.row("transformer.norm.weight", "head/norm/scale"),
    ]
    for keys, path, stack in blocks:
        rows += sequence.llama_blocks(f"transformer.{keys}", f"{path}/blocks", stack.depth)
    for i, count in enumerate(generator.layout.vocab):
        key = f"transformer.{PAIR[i]}_emb.weight"
        rows += [
            keymap.row(key, ("embeddings/table", i), sequence.rows_of_symbol(count)),
            keymap.row(
                f"transformer.head.{i}.weight",
                ("head/logits/kernel", i),
                sequence.map_to_symbol(count),
            ),
        ]
    return rows


def generator_tokens(published: dict, weights: Mapping[str, np.ndarray]) -> tuple[TokenLayout, int]:
    """(layout, classes)."""
    cells = sequence.section(published, *PUBLISHED).get("block_size", CELLS)
    vocab = tuple(len(weights[f"transformer.head.{i}.weight"]) for i in range(len(PAIR)))
    classes = len(weights["transformer.class_emb.embedding_table.weight"]) - 1
    return sequence.square(vocab, cells), classes


def generator_settings(
    published: dict, weights: Mapping[str, np.ndarray]
) -> ml_collections.ConfigDict:
    """Our config; without a published one, sizes are the weights' and heads have 64 channels."""
    width = weights["transformer.norm.weight"].shape[0]
    found = sequence.section(published, *PUBLISHED)
    config = configs.load(f"configs/generator/openmagvit2.py:{VARIANTS.get(width, 'b')}")
    config.precision.compute = "float32"  # whatever the recipe trains in
    config.generator.width = width
    config.generator.depth = sequence.depth(weights, "transformer.spatial_blocks")
    config.generator.factor = sequence.depth(weights, "transformer.factorized_blocks")
    config.generator.heads = sequence.heads(found, "n_head", width)
    config.generator.hidden = len(weights["transformer.spatial_blocks.0.feed_forward.w1.weight"])
    return config


@jax.jit
def _logits(generator, batch):
    return generator.logits(batch)


def generator_parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `openmagvit2_generator`."""
    generator = sequence.still(folder.module())
    label_B = jnp.asarray(folder.given("labels"))
    tokens_BLG = np.stack([folder.given(f"tokens_{name}") for name in PAIR], axis=-1)
    batch = sequence.batch(tokens_BLG, label_B)
    null = batch.replace(cond=generator.null(label_B))
    found = sequence.losses(folder, generator, batch, [f"transformer.{name}" for name in GRADIENTS])
    computed = {name: found[name] for name in ("loss", "grad_norms", "grad_norm_all")}
    for i, name in enumerate(PAIR):
        for kind, some in (("logits", batch), ("logits_uncond", null)):
            logits_BLV = _logits(generator, some)[:, :, i, : generator.layout.vocab[i]]
            computed[f"{kind}_{name}"] = logits_BLV
        chances_BLV = jax.nn.log_softmax(computed[f"logits_{name}"])
        nats_BL1 = -jnp.take_along_axis(chances_BLV, batch.tokens_BLG[..., i : i + 1], axis=-1)
        computed[f"loss_{name}"] = nats_BL1.mean()
    for name, weights in sequence.decodes(folder.arrays, generator.layout.length):
        computed[name] = sequence.greedy(generator, label_B, weights)
    return computed


SYSTEMS = {
    "openmagvit2": System(
        parity,
        settings,
        rows,
        unwrap=("state_dict.first_stage_model", "state_dict"),  # within a generator's file
        wrap=("state_dict",),
        aside=(r"loss\..*", r"model_ema\.loss.*", r"model_ema\.(decay|num_updates)"),
        average=taming.average,
        home="huggingface.co/TencentARC/Open-MAGVIT2-Tokenizer-{128,256}-resolution; of the others "
        "huggingface.co/TencentARC/Open-MAGVIT2-Tokenizer-{16384,262144}-Pretrain",
        files=("imagenet_{128,256}_L.ckpt", "pretrain256_{16384,262144}.ckpt"),
        licence="Apache-2.0",
    ),
    "openmagvit2_generator": System(
        generator_parity,
        generator_settings,
        generator_rows,
        tokens=generator_tokens,
        unwrap=("state_dict",),
        wrap=("state_dict",),
        aside=(r"(first|cond)_stage_model\..*",),  # the tokenizer
        beside="openmagvit2",
        home="huggingface.co/TencentARC/Open-MAGVIT2-AR-{B,L,XL}-256-resolution",
        files=("AR_256_{B,L,XL}.ckpt",),
        licence="Apache-2.0",
    ),
}
