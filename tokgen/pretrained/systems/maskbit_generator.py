"""MaskBit's generators (arXiv:2409.16211): LFQ-BERT over bits, BERT over tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from tokgen.config import reading as configs
from tokgen.generators import mask_schedules, masked as objectives
from tokgen.interfaces import DecodeState, TokenBatch, TokenLayout, UserError
from tokgen.pretrained import keymap, parity
from tokgen.pretrained.families import convolutional, masked
from tokgen.pretrained.system import System, Weights
from tokgen.sampling import guidance, sampler as samplers

HEADS = 16  # as published
WHAT = "MaskBit's generator"
INPUT = "input_proj"  # "token_emb" in older files
SHARED_NORMED = (
    "transformer.layers.0.0.mha.in_proj_weight",
    "transformer.layers.1.1.net.2.bias",
    "last_layer.0.weight",
)
LFQ_NORMED = (
    *("class_emb.weight", "pos_emb", "input_proj.weight"),
    *SHARED_NORMED,
    "prediction_layer.weight",
)
BERT_NORMED = ("class_emb.weight", "pos_emb", "tok_emb_list.0.weight", *SHARED_NORMED, "bias.1")
# Array -> schedule, guidance of T steps; published as cond + s (cond - uncond)
DECODES = {
    "greedy_default": ("arccos", lambda steps: guidance.power_cosine(1 + 7.1, steps, power=3.0)),
    "greedy_linear": ("cosine", lambda steps: guidance.linear(1 + 3.0, steps)),
    "greedy_none_annealed": ("square", lambda steps: guidance.constant(1 + 2.0, steps)),
    "greedy_nocfg_root": ("root", lambda steps: ()),
}
NOISE = 4.0  # of the recorded run
RATIOS = ("arccos", "cosine", "linear", "square", "root")


def lfq_tokens(published: dict, weights: Mapping[str, np.ndarray], *, key: str = INPUT):
    """(layout, classes) of LFQ-BERT: bits in symbols of equal size."""
    bits = keymap.need(weights, f"{key}.weight", 2, WHAT)[1]
    columns = keymap.need(weights, "prediction_layer.bias", 1, WHAT)[0]
    splits = published.get("codebook_splits")
    if splits is None:
        # symbols of 2^b values each: as many as give the head its columns, two where one would, too
        fitting = [m for m in (2, *range(1, bits + 1)) if m * 2 ** (bits / m) == columns]
        splits = fitting[0] if fitting else 0
    if not splits or bits % splits or splits * 2 ** (bits // splits) != columns:
        raise UserError(
            f"{bits} bits in equal symbols need a head of that many of their values; found "
            f"{columns} columns for codebook_splits={splits}"
        )
    return _layout(weights, (2 ** (bits // splits),) * splits)


def bert_tokens(published: dict, weights: Mapping[str, np.ndarray]):
    """(layout, classes) of the BERT over tokens: a table per symbol."""
    del published
    rows = keymap.need(weights, "tok_emb_list.0.weight", 2, WHAT)[0]
    splits = sum(key.startswith("tok_emb_list.") for key in weights)
    return _layout(weights, (rows - 1,) * splits)


def _layout(weights: Mapping[str, np.ndarray], vocab: tuple[int, ...]):
    slots = keymap.need(weights, "pos_emb", 3, WHAT)[1]
    edge = math.isqrt(max(slots - 1, 0))
    if edge == 0 or edge**2 != slots - 1:
        raise UserError(f"pos_emb needs a square of tokens and the class; found {slots} positions")
    classes = keymap.need(weights, "class_emb.weight", 2, WHAT)[0] - 1
    return TokenLayout(vocab, ((edge, edge),)), classes


def settings(
    published: dict, weights: Weights, *, layout_of: Callable
) -> ml_collections.ConfigDict:
    """Our config: all but the number of heads is read from the weights."""
    layout, _ = layout_of(published, weights)
    bits = sum(size.bit_length() - 1 for size in layout.vocab)
    bert = "tok_emb_list.0.weight" in weights
    variant = "tokens" if bert else f"{min(max(bits + bits % 2, 10), 18)}bit"
    config = configs.load(f"configs/generator/maskbit.py:{variant}")
    config.precision.compute = "float32"
    ours = config.generator
    ours.width = keymap.need(weights, "class_emb.weight", 2, WHAT)[1]
    ours.heads = published.get("heads", HEADS)
    ours.hidden = keymap.need(weights, "transformer.layers.0.1.net.0.bias", 1, WHAT)[0]
    ours.depth = sum(key.endswith(".1.net.2.bias") for key in weights)
    ours.variant = "bert_prenorm" if "norm_after_transformer.weight" in weights else "bert"
    rate = published.get("dropout", ours.rates.residual)
    ours.rates = dict(token=rate, attention=rate, residual=rate)
    return config


def _rows(generator) -> list[keymap.Row]:
    """What both have in common."""
    found = [
        keymap.row("class_emb.weight", "labels/table"),
        keymap.row("pos_emb", "positions/table", masked.LAST_TO_FIRST),
        *keymap.norm("first_layer.0", "entry"),
        *keymap.pair("last_layer.0", "head/dense", keymap.LINEAR),
        *keymap.norm("last_layer.2", "head/norm"),
    ]
    if generator.closing is not None:
        found += keymap.norm("norm_after_transformer", "closing")
    path = "transformer/blocks"
    for layer in range(generator.transformer.depth):
        key = f"transformer.layers.{layer}"
        mha, attention = f"{key}.0.mha", f"{path}/attention"
        block = [
            *masked.fused(f"{mha}.in_proj_weight", attention, bias=f"{mha}.in_proj_bias"),
            *keymap.pair(f"{mha}.out_proj", f"{attention}/out", keymap.LINEAR_OUT),
            *keymap.norm(f"{key}.0.norm", f"{path}/attention_norm"),
            *keymap.pair(f"{key}.1.net.0", f"{path}/mlp/up", keymap.LINEAR),
            *keymap.pair(f"{key}.1.net.2", f"{path}/mlp/down", keymap.LINEAR),
            *keymap.norm(f"{key}.1.norm", f"{path}/mlp_norm"),
        ]
        found += masked.layered(block, layer)
    return found


def lfq_rows(generator, *, key: str = INPUT) -> list[keymap.Row]:
    """The keys of `maskbit_generator_*bit.bin`."""
    return [
        *_rows(generator),
        *keymap.pair(key, "embeddings/embed", keymap.LINEAR),
        *keymap.pair("prediction_layer", "head/head", keymap.LINEAR),
    ]


def bert_rows(generator) -> list[keymap.Row]:
    """The keys of the BERT over tokens."""
    found = _rows(generator)
    for symbol in range(generator.layout.groups):
        found.append(keymap.row(f"tok_emb_list.{symbol}.weight", ("embeddings/table", symbol)))
        found.append(keymap.row(f"bias.{symbol}", ("head/bias", symbol)))
    return found


def bit_values(generator) -> Weights:
    """What the published class stores beside its parameters: the value of each bit of a symbol."""
    bits = generator.layout.vocab[0].bit_length() - 1
    return {"bits_to_indices": 2 ** np.arange(bits, dtype=np.int32)}


# ---------------------------------------------------------------- the fixtures


def _probability(logits_BLGV, tokens_BLG) -> jax.Array:
    """The logarithm of rounded probabilities: those of sure tokens are alike, as published."""
    return jnp.log(samplers.raw_logit(jax.nn.softmax(logits_BLGV, axis=-1), tokens_BLG))


def _watched(generator, **knobs):
    """A copy that masks as the published sampler: up to a threshold, ties too.

    The count is the first sample's. With one slot unknown before the last step it is 0, and the
    threshold then the largest confidence, that of what is known: all slots are masked again.
    """
    inner = masked.watched(generator, **knobs)
    absent, slots = generator.layout.absent, generator.layout.length * generator.layout.groups

    def step(
        state: DecodeState, phase: Any, index: jax.Array | int, codec: nnx.Module, draw: Callable
    ):
        unknown_BLG = state.tokens_BLG == absent
        drawn_BLG, confidence_BLG, _ = draw(inner.logits(TokenBatch(state.tokens_BLG, state.cond)))
        sorted_BN = jnp.where(unknown_BLG, confidence_BLG, jnp.inf).reshape(-1, slots).sort(-1)
        wanted = inner.wanted(index, jnp.float32(slots)).astype(jnp.int32)
        count = jnp.minimum(jnp.maximum(wanted, 1), jnp.sum(unknown_BLG[0]) - 1)
        threshold_B11 = sorted_BN[:, count - 1][:, None, None]
        again_BLG = jnp.where(unknown_BLG, confidence_BLG, jnp.inf) <= threshold_B11
        again_BLG = again_BLG & (jnp.asarray(index) < inner.steps - 1)
        tokens_BLG = jnp.where(unknown_BLG, drawn_BLG, state.tokens_BLG)
        return state.replace(tokens_BLG=jnp.where(again_BLG, absent, tokens_BLG))

    copy = jax.tree.map(lambda leaf: leaf, inner)
    copy.step = step
    return copy


def _decodes(folder, generator) -> dict[str, np.ndarray]:
    labels_B, found = folder.given("labels"), {}
    for name, (schedule, weights_of) in DECODES.items():
        steps = len(folder.arrays[f"{name}_steps"])
        softening = masked.annealing(steps) if name == "greedy_none_annealed" else 1.0
        sampler = masked.greedy(
            weights_of(steps), confidence=_probability, confidence_temperature=softening
        )
        watched = _watched(generator, steps=steps, schedule=schedule)
        found[name], found[f"{name}_steps"], _ = masked.run(watched, labels_B, sampler)
    recorded = jnp.asarray(folder.given("noise_gumbel"))
    steps = len(recorded)
    sampler = masked.greedy(
        guidance.power_cosine(1 + 7.1, steps, power=3.0),
        confidence=_probability,
        jitter=tuple(NOISE * (1 - (step + 1) / steps) for step in range(steps)),
        gumbel=lambda keys_B, step, symbol, shape: recorded[step],
    )
    watched = _watched(generator, steps=steps, schedule="arccos")
    found["noise_tokens"], found["noise_steps"], _ = masked.run(watched, labels_B, sampler)
    return found


def _joined(generator, tokens_BLG) -> np.ndarray:
    """Ids [B, L]: the first symbol has the lowest bits."""
    values_G = np.cumprod([1, *generator.layout.vocab[:-1]])
    return np.sum(np.asarray(tokens_BLG) * values_G, axis=-1)


def _images(folder: parity.Folder, generator: nnx.Module, tokens_BLG: jax.Array) -> np.ndarray:
    """Images of tokens by the tokenizer beside, which writes them as one symbol."""
    tokenizer = folder.beside().module()
    tokenizer.quantizer.groups = (tokenizer.quantizer.channels,)
    tokenizer.decoder.grid = generator.layout.grids[0]
    ids_BL1 = jnp.asarray(_joined(generator, tokens_BLG))[..., None]
    decode = jax.jit(lambda tokenizer, ids: tokenizer.decoder(tokenizer.quantizer.decode(ids)))
    return convolutional.nchw(decode(tokenizer, ids_BL1))


def _losses(
    generator: nnx.Module, whole: TokenBatch, mask_BLG: jax.Array, logits_BLGV: jax.Array
) -> dict[str, jax.Array]:
    """The terms of the published loss module but the loss itself."""
    splits = generator.layout.groups
    hits_BLG = logits_BLGV.argmax(-1) == whole.tokens_BLG
    program = jax.jit(lambda module, *arrays: module.costs(*arrays))
    cost_BLG, _ = program(generator, logits_BLGV, whole.tokens_BLG)
    return {
        # the share of all slots, once for each of a token's
        "correct_tokens": jnp.mean(hits_BLG) ** splits,
        "masked_token_loss": objectives.over_slots(cost_BLG, mask_BLG),
        "masked_correct_tokens": objectives.over_slots(hits_BLG, mask_BLG) ** splits,
    }


def arrays(
    folder: parity.Folder, *, rows: Callable, normed: Sequence[str]
) -> dict[str, np.ndarray]:
    """The arrays of the fixtures `maskbit_lfqbert` and `maskbit_bert`."""
    generator = folder.module()
    whole, mask_BLG = masked.batch(folder)
    shown = masked.seen(generator, whole, mask_BLG)
    unlabelled = shown.replace(cond=generator.null(shown.cond))
    watched = masked.watched(generator)
    logits_BLGV = watched.logits(shown)
    value, _, gradients = parity.gradients(
        generator, lambda module: module.masked_loss(whole, mask_BLG), rows(generator)
    )
    norms, total = parity.grad_norms(gradients, parity.there(gradients, normed))
    found = {
        "token_ids": _joined(generator, whole.tokens_BLG).astype(np.float32),
        "logits_cond": logits_BLGV,
        "logits_uncond": watched.logits(unlabelled),
        "loss": value,
        "loss_sum_splits": value * generator.layout.groups,
        "grad_norms": norms,
        "grad_norm_all": total,
        **_losses(generator, whole, mask_BLG, logits_BLGV),
        **_decodes(folder, generator),
    }
    found["greedy_default_image"] = _images(folder, generator, found["greedy_default"])
    for name in RATIOS:
        steps = len(folder.arrays[f"ratio_{name}"])
        r = np.arange(1, steps + 1, dtype=np.float32) / np.float32(steps)
        found[f"ratio_{name}"] = mask_schedules.share(name, r, generator.layout.length)
    return found


def _system(layout_of: Callable, rows: Callable, normed: Sequence[str], **options) -> System:
    return System(
        functools.partial(arrays, rows=rows, normed=normed),
        functools.partial(settings, layout_of=layout_of),
        rows,
        tokens=layout_of,
        beside="maskbit_tokenizer",
        licence="Apache-2.0",
        **options,
    )


BITS = dict(
    aside=("bits_to_indices",),
    derived=bit_values,
)
OLDER = dict(key="token_emb")

SYSTEMS = {
    "maskbit_lfqbert": _system(lfq_tokens, lfq_rows, LFQ_NORMED, **BITS),
    # maskbit_lfqbert when its first map was called an embedding
    "maskbit_lfqbert_older": _system(
        functools.partial(lfq_tokens, **OLDER),
        functools.partial(lfq_rows, **OLDER),
        tuple(name.replace(INPUT, "token_emb") for name in LFQ_NORMED),
        **BITS,
    ),
    "maskbit_bert": _system(bert_tokens, bert_rows, BERT_NORMED),
}
