"""IBQ's generator (arXiv:2412.02692): LlamaGen's with adaptive norms."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import ml_collections
import numpy as np

from tokgen.interfaces import TokenLayout
from tokgen.pretrained import keymap
from tokgen.pretrained.families import causal, seed_voken
from tokgen.pretrained.system import System

VARIANTS = {1024: "b", 1280: "l", 1536: "xl", 1920: "xxl"}
# Gates of attention and MLP, scales, shifts; ours are shift, scale, gate of the one and the other
CHUNKS = (4, 2, 0, 5, 3, 1)
GRADIENTS = (
    *("tok_emb.weight", "class_emb.embedding_table.weight", "blocks.0.attention.wqkv.weight"),
    *("blocks.1.feed_forward.w2.weight", "blocks.0.attention_norm.weight"),
    *("blocks.0.ada_lin.1.weight", "blocks.1.ada_lin.1.bias", "head_nm.rmsnorm.weight"),
    *("head_nm.ada_lin.1.weight", "head.weight"),
)


def rows(generator) -> list[keymap.Row]:
    """The keys of a Lightning checkpoint's `transformer`."""
    lead = keymap.one(lambda a, shape: a.reshape(shape), lambda a: a[0])
    depth, path = generator.transformer.depth, "transformer/blocks"
    rows = [
        keymap.row("transformer.tok_emb.weight", "embeddings/table", lead),
        keymap.row(seed_voken.CLASS_TABLE, "conditioning/labels/table"),
        *causal.llama_blocks("transformer.blocks", path, depth),
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


def tokens(published: dict, weights: Mapping[str, np.ndarray]) -> tuple[TokenLayout, int]:
    """(layout, classes)."""
    return seed_voken.tokens(published, weights, (len(weights["transformer.head.weight"]),))


def settings(published: dict, weights: Mapping[str, np.ndarray]) -> ml_collections.ConfigDict:
    """Our config, as `seed_voken.settings` finds it."""
    width = weights["transformer.head.weight"].shape[1]
    recipe = f"configs/generator/ibq.py:{VARIANTS.get(width, 'b')}"
    return seed_voken.settings(
        published, weights, recipe=recipe, width=width, blocks="transformer.blocks"
    )


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `ibq_generator`."""
    generator = causal.still(folder.module())
    label_B = jnp.asarray(folder.given("labels"))
    batch = causal.batch(folder.given("tokens"), label_B)
    null = batch.replace(cond=generator.null(label_B))
    found = causal.losses(folder, generator, batch, [f"transformer.{name}" for name in GRADIENTS])
    computed = {
        "logits": causal.slots(generator, batch)[:, :-1],
        "logits_uncond": causal.slots(generator, null)[:, :-1],
        **{name: found[name] for name in ("loss", "grad_norms", "grad_norm_all")},
    }
    for name, weights in causal.decodes(folder.arrays, generator.layout.length):
        computed[name] = causal.greedy(generator, label_B, weights)[..., 0]
    return computed


SYSTEMS = {
    "ibq_generator": System(
        parity,
        settings,
        rows,
        tokens=tokens,
        beside="ibq",
        **seed_voken.GENERATOR,
    ),
}
