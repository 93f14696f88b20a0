"""Open-MAGVIT2's generator (arXiv:2409.04410), `AR_256_{B,L,XL}.ckpt`: a token has two symbols."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tokgen.interfaces import TokenLayout
from tokgen.pretrained import keymap
from tokgen.pretrained.families import causal, seed_voken
from tokgen.pretrained.system import System

VARIANTS = {1024: "b", 1280: "l", 1536: "xl"}
PAIR = ("pre", "post")  # what the two symbols are called
GRADIENTS = (
    *("pre_emb.weight", "post_emb.weight", "class_emb.embedding_table.weight"),
    *("spatial_blocks.0.attention.wqkv.weight", "spatial_blocks.1.feed_forward.w3.weight"),
    *("factorized_blocks.0.attention.wqkv.weight", "factorized_blocks.1.ffn_norm.weight"),
    *("norm.weight", "head.0.weight", "head.1.weight"),
)


def rows(generator) -> list[keymap.Row]:
    """The keys of a Lightning checkpoint's `transformer`."""
    blocks = (
        ("spatial_blocks", "transformer", generator.transformer),
        ("factorized_blocks", "head/transformer", generator.head.transformer),
    )
    rows = [
        keymap.row(seed_voken.CLASS_TABLE, "conditioning/labels/table"),
        keymap.row("transformer.norm.weight", "head/norm/scale"),
    ]
    for keys, path, stack in blocks:
        rows += causal.llama_blocks(f"transformer.{keys}", f"{path}/blocks", stack.depth)
    for i, count in enumerate(generator.layout.vocab):
        key = f"transformer.{PAIR[i]}_emb.weight"
        rows += [
            keymap.row(key, ("embeddings/table", i), causal.rows_of_symbol(count)),
            keymap.row(
                f"transformer.head.{i}.weight",
                ("head/logits/kernel", i),
                causal.map_to_symbol(count),
            ),
        ]
    return rows


def tokens(published: dict, weights: Mapping[str, np.ndarray]) -> tuple[TokenLayout, int]:
    """(layout, classes)."""
    vocab = tuple(len(weights[f"transformer.head.{i}.weight"]) for i in range(len(PAIR)))
    return seed_voken.tokens(published, weights, vocab)


def settings(published: dict, weights: Mapping[str, np.ndarray]) -> ml_collections.ConfigDict:
    """Our config, as `seed_voken.settings` finds it, and the blocks over the symbols of a token."""
    width = weights["transformer.norm.weight"].shape[0]
    recipe = f"configs/generator/openmagvit2.py:{VARIANTS.get(width, 'b')}"
    config = seed_voken.settings(
        published, weights, recipe=recipe, width=width, blocks="transformer.spatial_blocks"
    )
    config.generator.factor = causal.depth(weights, "transformer.factorized_blocks")
    return config


@jax.jit
def _logits(generator, batch):
    return generator.logits(batch)


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `openmagvit2_generator`."""
    generator = causal.still(folder.module())
    label_B = jnp.asarray(folder.given("labels"))
    tokens_BLG = np.stack([folder.given(f"tokens_{name}") for name in PAIR], axis=-1)
    batch = causal.batch(tokens_BLG, label_B)
    null = batch.replace(cond=generator.null(label_B))
    found = causal.losses(folder, generator, batch, [f"transformer.{name}" for name in GRADIENTS])
    computed = {name: found[name] for name in ("loss", "grad_norms", "grad_norm_all")}
    for i, name in enumerate(PAIR):
        for kind, some in (("logits", batch), ("logits_uncond", null)):
            logits_BLV = _logits(generator, some)[:, :, i, : generator.layout.vocab[i]]
            computed[f"{kind}_{name}"] = logits_BLV
        chances_BLV = jax.nn.log_softmax(computed[f"logits_{name}"])
        nats_BL1 = -jnp.take_along_axis(chances_BLV, batch.tokens_BLG[..., i : i + 1], axis=-1)
        computed[f"loss_{name}"] = nats_BL1.mean()
    for name, weights in causal.decodes(folder.arrays, generator.layout.length):
        computed[name] = causal.greedy(generator, label_B, weights)
    return computed


SYSTEMS = {
    "openmagvit2_generator": System(
        parity,
        settings,
        rows,
        tokens=tokens,
        beside="openmagvit2",
        **seed_voken.GENERATOR,
    ),
}
