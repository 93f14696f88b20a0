"""RAR (arXiv:2411.00776), as published in `rar_b.bin` ... `rar_xxl.bin`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import ml_collections
import numpy as np

from tokgen.config import reading as configs
from tokgen.interfaces import TokenLayout
from tokgen.pretrained import keymap
from tokgen.pretrained.families import causal
from tokgen.pretrained.system import System
from tokgen.sampling import guidance

HEADS, SPARE = 16, 1024  # heads of every published size; rows of the tables beyond the image's
VARIANTS = {768: "b", 1024: "l", 1280: "xl", 1408: "xxl"}
# Guidance scale and power of the decodes that a fixture names
GREEDY = {
    "greedy_b_default": (16.0, 2.75),
    "greedy_constant": (4.0, 0.0),
    "greedy_xl_default": (6.9, 1.5),
    "greedy_nocfg": (0.0, 0.0),
}
LEAVES = ("kernel", "bias")
GRADIENTS = (
    *("cls_token", "pos_embed", "target_aware_pos_embed", "timesteps_embeddings"),
    *("embeddings.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.q_norm.weight"),
    *("blocks.1.adaLN_modulation.1.weight", "blocks.1.mlp.fc2.weight"),
    *("adaln_before_head.adaLN_modulation.1.bias", "lm_head.weight"),
)


def _rolled(unused: int) -> keymap.Rule:
    """A table (1, N, D) whose first rows are unused <-> ours [N, D], which has them last."""
    return keymap.one(
        lambda a, shape: np.roll(a[0], -unused, axis=0).reshape(shape),
        lambda ours: np.roll(ours, unused, axis=0)[None],
    )


def rows(generator) -> list[keymap.Row]:
    """The keys of RAR's state dict."""
    linear, vector = keymap.thirds(keymap.LINEAR), keymap.thirds(keymap.VECTOR)
    lead = keymap.one(lambda a, shape: a.reshape(shape), lambda a: a[None])
    found = [
        keymap.row("cls_token", "conditioning/token", keymap.reshaped(1, 1, -1)),
        keymap.row("pos_embed", "positions/own/table", lead),
        keymap.row("target_aware_pos_embed", "positions/target/table", _rolled(2)),
        keymap.row("timesteps_embeddings", "conditioning/steps/table", lead),
        keymap.Row(
            "embeddings.weight",
            ("embeddings/table", "conditioning/labels/table"),
            keymap.rows_apart(),
        ),
        *_adaptive("adaln_before_head.adaLN_modulation.1", "head/modulation", None, (1, 0)),
        keymap.row("lm_head.weight", "head/head/kernel", keymap.LINEAR),
        keymap.row("lm_head.bias", "head/head/bias", keymap.VECTOR),
    ]
    for i in range(generator.transformer.depth):
        key, path = f"blocks.{i}", "transformer/blocks"

        def both(
            theirs: str,
            ours: str,
            kernel: tuple[str, keymap.Rule],
            bias: keymap.Rule,
            key: str = key,
            path: str = path,
            i: int = i,
        ):
            return [
                keymap.row(f"{key}.{theirs}.weight", (f"{path}/{ours}/{kernel[0]}", i), kernel[1]),
                keymap.row(f"{key}.{theirs}.bias", (f"{path}/{ours}/bias", i), bias),
            ]

        norm = ("scale", keymap.AS_IS)
        fused = [[(f"{path}/attention/{n}/{leaf}", i) for n in causal.QKV] for leaf in LEAVES]
        found += [
            *both("norm1", "attention_norm", norm, keymap.AS_IS),
            *both("norm2", "mlp_norm", norm, keymap.AS_IS),
            keymap.Row(f"{key}.attn.qkv.weight", tuple(fused[0]), linear),
            keymap.Row(f"{key}.attn.qkv.bias", tuple(fused[1]), vector),
            *both("attn.q_norm", "attention/similarity/query_norm", norm, keymap.AS_IS),
            *both("attn.k_norm", "attention/similarity/key_norm", norm, keymap.AS_IS),
            *both("attn.proj", "attention/out", ("kernel", keymap.LINEAR_OUT), keymap.VECTOR),
            *both("mlp.fc1", "mlp/up", ("kernel", keymap.LINEAR), keymap.VECTOR),
            *both("mlp.fc2", "mlp/down", ("kernel", keymap.LINEAR), keymap.VECTOR),
            *_adaptive(f"{key}.adaLN_modulation.1", f"{path}/modulation", i, range(6)),
        ]
    return found


def _adaptive(key: str, path: str, layer: int | None, order: Sequence[int]) -> list[keymap.Row]:
    """A linear map to shifts, scales and gates, in the published order."""
    places = [f"{path}/{leaf}" if layer is None else (f"{path}/{leaf}", layer) for leaf in LEAVES]
    return [
        keymap.row(f"{key}.weight", places[0], keymap.chunks(tuple(order))),
        keymap.row(f"{key}.bias", places[1], keymap.chunks_bias(tuple(order))),
    ]


def tokens(published: dict, weights: Mapping[str, np.ndarray]) -> tuple[TokenLayout, int]:
    """(layout, classes), from the sizes of the tables."""
    codes = len(weights["lm_head.weight"])
    cells = weights["pos_embed"].shape[1] - SPARE
    # codes, the mask, classes, no class
    classes = len(weights["embeddings.weight"]) - codes - 2
    return causal.square((codes,), cells), classes


def settings(published: dict, weights: Mapping[str, np.ndarray]) -> ml_collections.ConfigDict:
    """Our config; without a published one, sizes are the weights' and heads 16."""
    width = weights["lm_head.weight"].shape[1]
    config = configs.load(f"configs/generator/rar.py:{VARIANTS.get(width, 'b')}")
    found = causal.section(published, "model", "generator")
    config.precision.compute = "float32"  # whatever the recipe trains in
    config.generator.width = width
    config.generator.depth = causal.depth(weights, "blocks")
    config.generator.heads = causal.heads(found, "num_attention_heads", width, HEADS)
    config.generator.hidden = len(weights["blocks.0.mlp.fc1.weight"])
    config.generator.label_drop = found.get("class_label_dropout", 0.1)
    rate = found.get("dropout", 0.1)
    config.generator.rates.update(attention=found.get("attn_drop", 0.1), residual=rate, hidden=rate)
    if "guidance_scale" in found:
        scale, power = found["guidance_scale"], found.get("guidance_scale_pow", 1.0)
        preset = dict(temperature=found.get("randomize_temperature", 1.0))
        if scale == 0:
            preset |= dict(guidance="constant", weight=1.0)
        elif power == 0:
            preset |= dict(guidance="constant", weight=scale)
        else:
            preset |= dict(guidance="power_cosine", weight=scale, power=power)
        config.presets.default = preset
    return config


def weights_of(scale: float, power: float, steps: int) -> tuple[float, ...]:
    """Guidance per step from RAR's numbers: a scale of 0 is none, a power of 0 is constant."""
    if scale == 0:
        return guidance.constant(1.0, steps)
    if power == 0:
        return guidance.constant(scale, steps)
    return guidance.power_cosine(scale, steps, power)


def parity(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `rar`."""
    generator = causal.still(folder.module())
    label_B, tokens_BL = jnp.asarray(folder.given("labels")), folder.given("tokens")
    order_BL, L = folder.given("orders"), generator.layout.length
    raster = causal.batch(tokens_BL, label_B)
    permuted = causal.batch(tokens_BL, label_B, order_BL)
    # the slot of the learned vector predicts nothing
    logits_BLV = causal.slots(generator, raster)[:, 1:]
    computed = {
        "logits_raster": logits_BLV,
        "logits_permuted": causal.slots(generator, permuted)[:, 1:],
        "labels_permuted": np.take_along_axis(tokens_BL, order_BL, axis=1),
        "logits_uncond": causal.slots(generator, raster.replace(cond=generator.null(label_B)))[
            :, 1:
        ],
        "logits_prefix": logits_BLV[:, : L // 2 + 1],
    }
    for name in GREEDY:
        weights = weights_of(*GREEDY[name], L)
        computed[name] = causal.greedy(generator, label_B, weights)[..., 0]
    for name, batch in (("raster", raster), ("permuted", permuted)):
        for kind, value in causal.losses(folder, generator, batch, GRADIENTS).items():
            computed[f"{kind}_{name}"] = value
    return computed


SYSTEMS = {
    "rar": System(
        parity,
        settings,
        rows,
        tokens=tokens,
        unwrap=("state_dict", "model"),
        beside="maskgit_vqgan",
        licence="Apache-2.0",
    ),
}
