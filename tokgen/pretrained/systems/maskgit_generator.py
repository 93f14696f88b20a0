"""MaskGIT's transformer (arXiv:2202.04200) in the form of its Flax file."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from tokgen.config import reading as configs
from tokgen.generators import mask_schedules
from tokgen.interfaces import TokenBatch, TokenLayout, UserError
from tokgen.pretrained import keymap, parity
from tokgen.pretrained.families import masked
from tokgen.pretrained.system import System, Weights
from tokgen.sampling import sampler as samplers

CODES = 1024  # as published: of 2,025 words, the classes are those that are neither code nor mask
WORDS = "params.Embed_0.word_embeddings.embedding"
PLACES = "params.Embed_0.position_embeddings.embedding"
QUERY = "params.TransformerLayer_0.Attention_0.self_attention.query.kernel"
NORMED = (
    "params.Embed_0.word_embeddings.embedding",
    "params.Embed_0.position_embeddings.embedding",
    "params.Embed_0.embeddings_ln.scale",
    "params.TransformerLayer_0.Attention_0.self_attention.query.kernel",
    "params.TransformerLayer_1.Mlp_0.layer_output.kernel",
    "params.MlmLayer_0.mlm_dense.kernel",
    "params.MlmLayer_0.mlm_bias.bias",
)
# Schedules 1 - r^power whose counts would differ by one if r were a quotient.
COMPILED = {"linear": 1, "power": 2}
# The published names of the schedules.
SCHEDULES = {"uniform": "linear", "cosine": "cosine", "log": "log", "exp": "exponential"}


def _words() -> keymap.Rule:
    """Codes, classes, the mask <-> symbols [1, V + 1, D], whose last row is the mask, and labels.

    The file writes the mask as -1: the last row.
    """

    def ours(a, shapes):
        codes = shapes[0][1] - 1
        symbols = np.concatenate([a[:codes], a[-1:]])
        return [symbols.reshape(shapes[0]), a[codes:-1].reshape(shapes[1])]

    def published(parts):
        symbols, labels = parts
        return np.concatenate([symbols[0, :-1], labels, symbols[0, -1:]])

    return keymap.Rule(ours, published)


def _sides(published: dict, weights: Weights) -> tuple[int, int, int]:
    """(codes, classes, cells along an edge)."""
    words = keymap.need(weights, WORDS, 2, "MaskGIT's transformer")[0]
    slots = keymap.need(weights, PLACES, 2, "MaskGIT's transformer")[0]
    classes = published.get("num_class", words - 1 - published.get("codebook_size", CODES))
    codes, edge = words - 1 - classes, math.isqrt(max(slots - 1, 0))
    if codes < 2 or classes < 1 or edge**2 != slots - 1:
        raise UserError(
            f"{words} words need to be codes, {classes} classes and the mask, {slots} positions a "
            "class and a square of tokens; give a config with codebook_size and num_class"
        )
    return codes, classes, edge


def tokens(published: dict, weights: Weights) -> tuple[TokenLayout, int]:
    """(layout, classes)."""
    codes, classes, edge = _sides(published, weights)
    return TokenLayout((codes,), ((edge, edge),)), classes


def settings(published: dict, weights: Weights) -> ml_collections.ConfigDict:
    """Our config: all sizes are read from the weights."""
    _, _, edge = _sides(published, weights)
    width, heads, _ = keymap.need(weights, QUERY, 3, "MaskGIT's transformer")
    config = configs.load(f"configs/generator/maskgit.py:{512 if edge > 16 else 256}")
    config.precision.compute = "float32"
    section = config.generator
    section.width, section.heads = width, heads
    section.depth = sum(key.endswith("Mlp_0.layer_output.bias") for key in weights)
    key = "params.TransformerLayer_0.Mlp_0.intermediate_output.bias"
    section.hidden = keymap.need(weights, key, 1, "MaskGIT's transformer")[0]
    section.smoothing = published.get("label_smoothing", section.smoothing)
    hidden = published.get("hidden_dropout_prob", section.rates.residual)
    section.rates.token = section.rates.residual = hidden
    attention = published.get("attention_probs_dropout_prob", section.rates.attention)
    section.rates.attention = attention
    noise = published.get("sample_choice_temperature", config.presets.default.noise)
    for preset in config.presets.values():
        preset.noise = noise
    return config


def rows(generator) -> list[keymap.Row]:
    """The key table."""
    found = [
        keymap.Row(WORDS, ("embeddings/table", "labels/table"), _words()),
        keymap.row(PLACES, "positions/table"),
        *_pair("params.Embed_0.embeddings_ln", "entry", "scale"),
        *_pair("params.MlmLayer_0.mlm_dense", "head/dense"),
        *_pair("params.MlmLayer_0.mlm_ln", "head/norm", "scale"),
        keymap.row("params.MlmLayer_0.mlm_bias.bias", "head/bias"),
    ]
    path = "transformer/blocks"
    for layer in range(generator.transformer.depth):
        key = f"params.TransformerLayer_{layer}"
        attention = f"{key}.Attention_0"
        block = [
            *_pair(f"{attention}.attention_output_ln", f"{path}/attention_norm", "scale"),
            *_pair(f"{key}.Mlp_0.intermediate_output", f"{path}/mlp/up"),
            *_pair(f"{key}.Mlp_0.layer_output", f"{path}/mlp/down"),
            *_pair(f"{key}.Mlp_0.layer_output_ln", f"{path}/mlp_norm", "scale"),
        ]
        for name in ("query", "key", "value", "out"):
            block += _pair(f"{attention}.self_attention.{name}", f"{path}/attention/{name}")
        found += masked.layered(block, layer)
    return found


def _pair(key: str, path: str, first: str = "kernel") -> list[keymap.Row]:
    return [keymap.row(f"{key}.{part}", f"{path}/{part}") for part in (first, "bias")]


# ---------------------------------------------------------------- the fixture


def _published(generator: nnx.Module, tokens_BL: jax.Array, labels_B: jax.Array) -> np.ndarray:
    """Tokens behind their class's word, as the published decoder records them."""
    words_B1 = np.asarray(labels_B)[:, None] + generator.layout.absent
    return np.concatenate([words_B1, tokens_BL], axis=1)


def compiled(schedule: str, steps: int) -> np.ndarray:
    """[T] shares of the published loop, whose counts come from how XLA compiles it.

    A quotient by T is a product with its rounded inverse there, and 1 - x y is rounded once.
    """
    done_T, inverse = np.arange(1, steps + 1, dtype=np.float64), np.float32(1 / steps)
    power = COMPILED[schedule]
    # float64 holds these products exactly
    left_T = 1 - done_T**power * np.float64(inverse**power)
    return np.clip(left_T.astype(np.float32), np.float32(mask_schedules.LEAST), np.float32(1))


def _wanted(share_T: jax.Array, index: jax.Array | int, count_B: jax.Array) -> jax.Array:
    return jnp.floor(count_B * share_T[index])


def _decodes(folder, generator) -> dict[str, np.ndarray]:
    labels_B, found = folder.given("labels"), {}
    inpainted = folder.given("inpaint_input")[:, 1:, None]
    known = np.where(inpainted < 0, 0, inpainted), inpainted >= 0
    replayed = _replayed(generator, folder)
    plans = {
        "greedy_cosine16": ("cosine", None, masked.greedy(())),
        "greedy_cosine8": ("cosine", None, masked.greedy(())),
        "greedy_pow2": ("power", None, masked.greedy(())),
        "greedy_uniform_inpaint": ("linear", tuple(map(jnp.asarray, known)), masked.greedy(())),
        "sampled_rng42": ("cosine", None, replayed),
    }
    for name, (schedule, given, sampler) in plans.items():
        knobs = dict(steps=folder.arrays[name].shape[1], schedule=schedule, exponent=2.0)
        if schedule in COMPILED:
            share_T = compiled(schedule, knobs["steps"])
            knobs["wanted"] = functools.partial(_wanted, share_T)
        watched = masked.watched(generator, **knobs)
        labels = labels_B if given is None else folder.given("inpaint_input")[:, 0]
        labels = labels if given is None else labels - generator.layout.absent
        _, _, drawn_SBLG = masked.run(watched, labels, sampler, given=given)
        record = [_published(generator, drawn_BLG[..., 0], labels) for drawn_BLG in drawn_SBLG]
        found[name] = np.stack(record, axis=1)
    return found


def _replayed(generator, folder) -> masked.Replay:
    """JAX's own draws in the published order: one split for the tokens, one for the noise."""
    steps, length = folder.arrays["sampled_rng42"].shape[1], generator.layout.length
    keys, key = [], jax.random.PRNGKey(42)
    for _ in range(steps):
        key, of_tokens = jax.random.split(key)
        key, of_noise = jax.random.split(key)
        keys.append((of_tokens, of_noise))

    def choose(logits_BlGV, step):
        of_tokens, of_noise = keys[step]
        B, V = len(logits_BlGV), logits_BlGV.shape[-1]
        # drawn for the class's slot, too
        whole = jnp.zeros((B, 1 + length, V)).at[:, 1:].set(logits_BlGV[:, :, 0])
        drawn = jax.random.categorical(of_tokens, whole)[:, 1:, None]
        left = 1 - jnp.float32(step + 1) / steps
        noise = 4.5 * left * jax.random.gumbel(of_noise, (B, 1 + length))
        return drawn.astype(jnp.int32), noise[:, 1:, None]

    return masked.Replay(choose, confidence=samplers.log_probability)


def _schedules(folder, generator) -> dict[str, np.ndarray]:
    found = {}
    for name, wanted in folder.arrays.items():
        if not name.startswith("schedule_"):
            continue
        method = name.removeprefix("schedule_")
        ours, exponent = SCHEDULES.get(method, "power"), 1.0
        if ours == "power":
            exponent = float(method.removeprefix("pow"))
        r = np.arange(1, len(wanted) + 1, dtype=np.float32) / np.float32(len(wanted) + 1)
        found[name] = mask_schedules.share(ours, r, generator.layout.length, exponent)
    return found


@jax.jit
def _words_of(generator, batch: TokenBatch):
    hidden_BlD = generator.hidden(batch.tokens_BLG, batch.cond)
    return generator.read_out(hidden_BlD)[:, :, 0]


def arrays(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixture `maskgit_transformer`."""
    generator = folder.module()
    whole, mask_BLG = masked.batch(folder)
    shown = masked.seen(generator, whole, mask_BLG)
    # the class's slot is given no weight there, and is no slot here
    weights_BL = folder.arrays["loss_weights"][:, 1:]
    loss = functools.partial(_loss, whole=whole, mask_BLG=jnp.asarray(weights_BL)[..., None] > 0)
    value, _, gradients = parity.gradients(generator, loss, rows(generator))
    norms, total = parity.grad_norms(gradients, parity.there(gradients, NORMED))
    words_BL = np.where(mask_BLG, -1, whole.tokens_BLG)[..., 0]
    return {
        "input_ids": _published(generator, words_BL, whole.cond),
        "logits": _words_of(generator, shown),
        "loss_weights": np.pad(np.asarray(mask_BLG)[..., 0], ((0, 0), (1, 0))).astype(np.float32),
        "loss": value,
        "grad_norms": norms,
        "grad_norm_all": total,
        **_decodes(folder, generator),
        **_schedules(folder, generator),
    }


def _loss(generator: nnx.Module, *, whole: TokenBatch, mask_BLG: jax.Array):
    return generator.masked_loss(whole, mask_BLG)


SYSTEMS = {
    "maskgit_transformer": System(
        arrays,
        settings,
        rows,
        tokens=tokens,
        beside="maskgit_tokenizer",
        form="flax",
        licence="Apache-2.0",
    ),
}
