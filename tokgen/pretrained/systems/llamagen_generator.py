"""LlamaGen's generators (arXiv:2406.06525): `c2i_*.pt` (NPP's too) and `t2i_XL_*.pt`.

The weights don't say how large the grid is, unless an old table of angles lies among them: it is
16 x 16 where `block_size` of a configuration says nothing else (24 x 24: `{"block_size": 576}`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from tokgen.config import reading as configs
from tokgen.interfaces import Text, TokenBatch, TokenLayout, UserError
from tokgen.pretrained import keymap, parity as comparison
from tokgen.pretrained.families import causal
from tokgen.pretrained.system import System
from tokgen.sampling import guidance

VARIANTS = {768: "b", 1024: "l", 1280: "xl", 1536: "xxl", 3200: "3b"}
WIDE_HEADS = {3200: 32, 4096: 32}  # all other widths have heads of 64
CELLS = 256
STALE = r"freqs_cis"  # a table of angles that some files keep
FIXED = {"rope_base": 10000, "norm_eps": 1e-5}  # of every published size
GRADIENTS = (
    *("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.attention.wo.weight"),
    *("layers.1.feed_forward.w1.weight", "layers.1.feed_forward.w3.weight"),
    *("layers.1.ffn_norm.weight", "norm.weight", "output.weight"),
)
CLASS_TABLE = "cls_embedding.embedding_table.weight"
CAPTIONS = ("cls_embedding.cap_proj.fc1.weight", "cls_embedding.cap_proj.fc2.weight")
NO_TEXT = "cls_embedding.uncond_embedding"


def rows(generator) -> list[keymap.Row]:
    """The keys of LlamaGen's state dict, with a class or a text as the condition."""
    if generator.cond == "text":
        condition = [
            keymap.row(CAPTIONS[0], "conditioning/hidden/kernel", keymap.LINEAR),
            keymap.row(CAPTIONS[1], "conditioning/dense/kernel", keymap.LINEAR),
            keymap.row(NO_TEXT, "conditioning/absent"),
        ]
    else:
        condition = [keymap.row(CLASS_TABLE, "conditioning/labels/table")]
    lead = keymap.one(lambda a, shape: a.reshape(shape), lambda a: a[0])
    return [
        *condition,
        keymap.row("tok_embeddings.weight", "embeddings/table", lead),
        *causal.llama_blocks("layers", "transformer/blocks", generator.transformer.depth),
        keymap.row("norm.weight", "head/norm/scale"),
        keymap.row("output.weight", "head/head/kernel", keymap.LINEAR),
    ]


def tokens(published: dict, weights: Mapping[str, np.ndarray]) -> tuple[TokenLayout, int]:
    """(layout, classes): classes are 0 where texts are the condition."""
    cells = CELLS
    if "block_size" in published:
        cells = published["block_size"]
    elif STALE in weights:
        prefix = 1 if CLASS_TABLE in weights else len(weights[NO_TEXT])
        cells = len(weights[STALE]) - prefix
    classes = len(weights[CLASS_TABLE]) - 1 if CLASS_TABLE in weights else 0
    return causal.square((len(weights["output.weight"]),), cells), classes


def settings(published: dict, weights: Mapping[str, np.ndarray]) -> ml_collections.ConfigDict:
    """Our config; without a published one, sizes are the weights'."""
    width = weights["output.weight"].shape[1]
    heads = causal.heads(published, "n_head", width, WIDE_HEADS.get(width))
    _check(published, heads)
    fine = published.get("block_size", CELLS) != CELLS
    variant = VARIANTS.get(width, "b")
    if NO_TEXT in weights:
        config = configs.load(f"configs/generator/llamagen.py:t2i_xl_{512 if fine else 256}")
        config.generator.texts = weights[NO_TEXT].shape
    else:
        config = configs.load(f"configs/generator/llamagen.py:{variant}{'384' if fine else ''}")
    config.precision.compute = "float32"  # whatever the recipe trains in
    config.generator.width = width
    config.generator.depth = causal.depth(weights, "layers")
    config.generator.heads = heads
    config.generator.hidden = len(weights["layers.0.feed_forward.w1.weight"])
    config.generator.label_drop = published.get("class_dropout_prob", 0.1)
    return config


def _check(published: dict, heads: int) -> None:
    """Refuse what no published size has and our parts do not do."""
    for name, value in (*FIXED.items(), ("n_kv_head", heads)):
        found = published.get(name)
        if found is not None and found != value:
            raise UserError(f"LlamaGen's {name} must be {value}; found {found} in --config")


def _decodes(names, steps: int):
    """(name, guidance of every step, whether the texts' mask is used) of a fixture's decodes."""
    for name in names:
        form = r"greedy_(?:nocfg|cfg([\d.]+))(?:_interval(\d+))?(_mask)?"
        found = re.fullmatch(form, name)
        if found is None:
            continue
        scale, last, mask = found.groups()
        weights = guidance.constant(float(scale or 1.0), steps)
        if last is not None:
            # the prefill, and the steps 0 to `last` after it
            guided = min(int(last) + 2, steps)
            weights = weights[:guided] + (1.0,) * (steps - guided)
        yield name, weights, mask is not None


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixtures `llamagen_c2i` and `llamagen_t2i`."""
    generator = causal.still(folder.module())
    tokens_BL, L = folder.given("tokens"), generator.layout.length
    cond = masked = jnp.asarray(folder.given("cond"))
    if generator.cond == "text":
        mask_BT = jnp.asarray(folder.given("emb_masks")) != 0
        cond, masked = Text(cond, jnp.ones_like(mask_BT)), Text(cond, mask_BT)
    batch = causal.batch(tokens_BL, cond)
    logits_BLV = causal.slots(generator, batch)[:, generator.conditioning.slots - 1 : -1]
    computed = {
        "logits": logits_BLV,
        "prefill_logits": causal.prefilled(generator, cond, batch.order_BL),
        "decode_logits": causal.stepped(generator, batch.tokens_BLG, cond)[:, 1:, 0],
        "rope": _angles(generator, batch.order_BL),
    }
    for name, weights, mask in _decodes(folder.arrays, L):
        tokens_BLG = causal.greedy(generator, masked if mask else cond, weights)
        computed[name] = tokens_BLG[..., 0]
    if generator.cond == "text":
        return computed | _taught(folder, generator, causal.batch(tokens_BL, masked))
    found = causal.losses(folder, generator, batch, (CLASS_TABLE, *GRADIENTS))
    return computed | {name: found[name] for name in ("loss", "grad_norms", "grad_norm_all")}


def _taught(
    folder: comparison.Folder, generator: nnx.Module, batch: TokenBatch
) -> dict[str, np.ndarray]:
    """What t2i is trained with: the mask, and a mean over the samples that count."""
    valid_B = jnp.asarray(folder.given("train_valid")).astype(jnp.float32)
    text, slots = batch.cond, generator.conditioning.slots - 1 + generator.layout.length

    def loss(module):
        share_B = valid_B / jnp.maximum(valid_B.sum(), 1)
        return jnp.sum(module.nats(batch).mean(1) * share_B), {}

    value, _, gradients = comparison.gradients(generator, loss, rows(generator))
    norms, norm = comparison.grad_norms(
        gradients, comparison.there(gradients, (*CAPTIONS, *GRADIENTS))
    )
    return {
        "train_mask": generator.conditioning.seen(text, jnp.arange(slots), slots),
        "logits_masked": causal.slots(generator, batch)[:, generator.conditioning.slots - 1 : -1],
        "loss": value,
        "grad_norms": norms,
        "grad_norm_all": norm,
    }


def _angles(generator, order_BL) -> np.ndarray:
    """Cosines and sines (prefix + L, K / 2, 2) of every slot."""
    slots = generator.conditioning.slots + generator.layout.length
    _, (cos, sin) = generator.positions(order_BL[:1], jnp.arange(slots))
    return np.stack([cos[0, 0], sin[0, 0]], axis=-1)


_COMMON = dict(
    settings=settings,
    rows=rows,
    tokens=tokens,
    unwrap=("model", "module"),
    averaged="ema",
    wrap=("model",),
    aside=(STALE,),
    beside="llamagen_vq",
    licence="MIT",
)
SYSTEMS = {
    "llamagen_c2i": System(
        parity,
        **_COMMON,
    ),
    "llamagen_t2i": System(
        parity,
        **_COMMON,
    ),
}
