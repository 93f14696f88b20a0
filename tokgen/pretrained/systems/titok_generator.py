"""TiTok's generators (arXiv:2406.07550): the BERT form and the U-ViT form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tokgen.config import reading as configs
from tokgen.interfaces import TokenLayout, UserError
from tokgen.pretrained import keymap, parity
from tokgen.pretrained.families import masked
from tokgen.pretrained.system import System, Weights
from tokgen.sampling import guidance, sampler as samplers

HEADS = 16  # of both published widths, 768 and 1024
BERT, UVIT = "model.", ""  # what the keys outside the blocks begin with
NAMES = {BERT: "TiTok's ImageBert", UVIT: "TiTok's U-ViT"}
WORDS = {BERT: "model.embeddings.word_embeddings.weight", UVIT: "embeddings.weight"}
PLACES = {BERT: "model.embeddings.position_embeddings.weight", UVIT: "pos_embed"}
HIDDEN = {BERT: "model.encoder.layer.0.intermediate.dense.bias", UVIT: "mid_block.mlp.fc1.bias"}
NORMED = {
    BERT: (
        "model.embeddings.word_embeddings.weight",
        "model.embeddings.position_embeddings.weight",
        "model.encoder.layer.0.attention.self.query.weight",
        "model.encoder.layer.1.output.dense.bias",
        "model.lm_head.weight",
    ),
    UVIT: (
        "embeddings.weight",
        "pos_embed",
        "in_blocks.0.attn.qkv.weight",
        "out_blocks.0.skip_linear.weight",
        "mid_block.mlp.fc2.bias",
        "lm_head.weight",
    ),
}
# Array -> guidance of T steps; published as cond + s (cond - uncond) but for the power-cosine
DECODES = {
    "greedy_linear": lambda steps: guidance.linear(1 + 3.0, steps),
    "greedy_constant": lambda steps: guidance.constant(1 + 4.5, steps),
    "greedy_power_cosine": lambda steps: guidance.power_cosine(6.0, steps, power=3.0),
    "greedy_annealed": lambda steps: guidance.linear(1 + 4.5, steps),
}


def tokens(published: dict, weights: Mapping[str, np.ndarray], *, form: str):
    """(layout, classes): rows of the table are codes, the mask, classes, no class."""
    words, _ = keymap.need(weights, WORDS[form], 2, NAMES[form])
    codes, _ = keymap.need(weights, f"{form}lm_head.weight", 2, NAMES[form])
    shape = keymap.need(weights, PLACES[form], 2 if form == BERT else 3, NAMES[form])
    classes = words - codes - 2
    if classes < 1:
        raise UserError(
            f"{WORDS[form]} needs a row for each of {codes} codes, the mask, every class and no "
            f"class; found {words} rows"
        )
    return TokenLayout((codes,), ((1, shape[-2] - 1),)), classes


def settings(published: dict, weights: Weights, *, form: str) -> ml_collections.ConfigDict:
    """Our config: all but the number of heads is read from the weights."""
    layout, _ = tokens(published, weights, form=form)
    section = published.get("model", {}).get("generator", {})
    variant = "s128" if form == UVIT else "l32" if layout.length <= 32 else "b64"
    config = configs.load(f"configs/generator/titok.py:{variant}")
    config.precision.compute = "float32"
    ours = config.generator
    ours.width = keymap.need(weights, WORDS[form], 2, NAMES[form])[1]
    ours.heads = section.get("num_attention_heads", HEADS)
    ours.hidden = keymap.need(weights, HIDDEN[form], 1, NAMES[form])[0]
    last = ".output.dense.bias" if form == BERT else ".mlp.fc2.bias"
    ours.depth = sum(key.endswith(last) and ".attention." not in key for key in weights)
    if form == BERT:
        rate = section.get("dropout", ours.rates.residual)
        ours.rates.token = ours.rates.residual = rate
        ours.rates.attention = section.get("attn_drop", ours.rates.attention)
    published_losses = published.get("losses", {})
    ours.smoothing = published_losses.get("label_smoothing", ours.smoothing)
    ours.visible = published_losses.get("loss_weight_unmasked_token", ours.visible)
    ours.label_drop = section.get("class_label_dropout", ours.label_drop)
    return config


def bert_rows(generator) -> list[keymap.Row]:
    """The key table of `generator_titok_{l32,b64}.bin`."""
    key = "model.embeddings"
    found = [
        keymap.Row(WORDS[BERT], ("embeddings/table", "labels/table"), keymap.rows_apart()),
        keymap.row(PLACES[BERT], "positions/table"),
        keymap.row(f"{key}.token_type_embeddings.weight", "entry/types/table"),
        *keymap.norm(f"{key}.LayerNorm", "entry/norm"),
        *keymap.pair("model.lm_head", "head/head", keymap.LINEAR),
    ]
    path = "transformer/blocks"
    for layer in range(generator.transformer.depth):
        key = f"model.encoder.layer.{layer}"
        block = [
            *keymap.pair(
                f"{key}.attention.output.dense", f"{path}/attention/out", keymap.LINEAR_OUT
            ),
            *keymap.norm(f"{key}.attention.output.LayerNorm", f"{path}/attention_norm"),
            *keymap.pair(f"{key}.intermediate.dense", f"{path}/mlp/up", keymap.LINEAR),
            *keymap.pair(f"{key}.output.dense", f"{path}/mlp/down", keymap.LINEAR),
            *keymap.norm(f"{key}.output.LayerNorm", f"{path}/mlp_norm"),
        ]
        for name in ("query", "key", "value"):
            part = f"{key}.attention.self.{name}"
            block += keymap.pair(part, f"{path}/attention/{name}", keymap.LINEAR)
        found += masked.layered(block, layer)
    return found


def uvit_rows(generator) -> list[keymap.Row]:
    """The key table of `generator_titok_s128.bin`: skips belong to the blocks on the way out."""
    half = generator.transformer.half
    found = [
        keymap.Row(WORDS[UVIT], ("embeddings/table", "labels/table"), keymap.rows_apart()),
        keymap.row(PLACES[UVIT], "positions/table", masked.TABLE),
        *keymap.norm("norm", "head/norm"),
        *keymap.pair("lm_head", "head/head", keymap.LINEAR),
    ]
    names = [f"in_blocks.{i}" for i in range(half)]
    names += ["mid_block", *(f"out_blocks.{i}" for i in range(half))]
    path = "transformer/blocks"
    for layer, key in enumerate(names):
        block = [
            *keymap.norm(f"{key}.norm1", f"{path}/attention_norm"),
            *masked.fused(f"{key}.attn.qkv.weight", f"{path}/attention"),
            *keymap.pair(f"{key}.attn.proj", f"{path}/attention/out", keymap.LINEAR_OUT),
            *keymap.norm(f"{key}.norm2", f"{path}/mlp_norm"),
            *keymap.pair(f"{key}.mlp.fc1", f"{path}/mlp/up", keymap.LINEAR),
            *keymap.pair(f"{key}.mlp.fc2", f"{path}/mlp/down", keymap.LINEAR),
        ]
        found += masked.layered(block, layer)
    for layer in range(half):
        skip = keymap.pair(f"out_blocks.{layer}.skip_linear", "transformer/skips", keymap.LINEAR)
        found += masked.layered(skip, layer)
    return found


# ---------------------------------------------------------------- the fixtures


def _gumbel(uniform: np.ndarray) -> jax.Array:
    """-log(-log u), both arguments held off 0, as published."""
    inner = -jnp.log(jnp.maximum(jnp.asarray(uniform), 1e-20))
    return -jnp.log(jnp.maximum(inner, 1e-20))


def _replayed(folder) -> tuple[int, masked.Replay]:
    """(steps, a sampler): tokens and confidence with noise that falls from 2 to 0."""
    steps = sum(name.startswith("noise_u_token_") for name in folder.arrays)

    def choose(logits_BlGV, step):
        left = 2.0 * (1 - (step + 1) / steps)
        token = _gumbel(folder.given(f"noise_u_token_{step}"))[:, :, None]
        confidence = _gumbel(folder.given(f"noise_u_conf_{step}"))[..., None]
        drawn_BlG = jnp.argmax(logits_BlGV + left * token, axis=-1)
        return drawn_BlG.astype(jnp.int32), left * confidence

    weights = guidance.linear(1 + 3.0, steps)
    return steps, masked.Replay(choose, guidance=weights, confidence=samplers.raw_logit)


def _decodes(folder, generator) -> dict[str, np.ndarray]:
    labels_B, found = folder.given("labels"), {}
    for name, weights_of in DECODES.items():
        steps = len(folder.arrays[f"{name}_steps"])
        softening = masked.annealing(steps) if name == "greedy_annealed" else 1.0
        sampler = masked.greedy(
            weights_of(steps), confidence=samplers.raw_logit, confidence_temperature=softening
        )
        final, grids, _ = masked.run(masked.watched(generator, steps=steps), labels_B, sampler)
        found |= {name: final[..., 0], f"{name}_steps": grids[..., 0]}
    steps, sampler = _replayed(folder)
    final, _, _ = masked.run(masked.watched(generator, steps=steps), labels_B, sampler)
    return found | {"noise_tokens": final[..., 0]}


def arrays(folder: parity.Folder, *, form: str, rows: Callable) -> dict[str, np.ndarray]:
    """The arrays of the fixtures `titok_imagebert` and `titok_uvit`."""
    generator = folder.module()
    whole, mask_BLG = masked.batch(folder)
    shown = masked.seen(generator, whole, mask_BLG)
    unlabelled = shown.replace(cond=generator.null(shown.cond))
    watched = masked.watched(generator)
    value, _, gradients = parity.gradients(
        generator, lambda module: module.masked_loss(whole, mask_BLG), rows(generator)
    )
    norms, total = parity.grad_norms(gradients, parity.there(gradients, NORMED[form]))
    logits_BLGV = watched.logits(shown)
    hits_BLG = mask_BLG & (logits_BLGV.argmax(-1) == whole.tokens_BLG)
    times_B, uniform_BN = (jnp.asarray(folder.given(n)) for n in ("train_u", "train_rand"))
    return {
        "logits_cond": logits_BLGV[:, :, 0],
        "logits_uncond": watched.logits(unlabelled)[:, :, 0],
        "loss": value,
        # the mean of every sample's own share
        "correct_tokens": jnp.mean(hits_BLG.sum((1, 2)) / jnp.maximum(mask_BLG.sum((1, 2)), 1)),
        "grad_norms": norms,
        "grad_norm_all": total,
        "train_mask": generator.hidden_slots(times_B, uniform_BN)[..., 0],
        **_decodes(folder, generator),
    }


def _system(form: str, rows, **options) -> System:
    return System(
        functools.partial(arrays, form=form, rows=rows),
        functools.partial(settings, form=form),
        rows,
        tokens=functools.partial(tokens, form=form),
        beside="titok_legacy",
        licence="Apache-2.0",
        **options,
    )


SYSTEMS = {
    # a constant buffer that some versions of its library write
    "titok_imagebert": _system(
        BERT,
        bert_rows,
        aside=(r"model\.embeddings\.position_ids",),
    ),
    "titok_uvit": _system(UVIT, uvit_rows),
}
