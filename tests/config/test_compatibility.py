"""Every tokenizer with every generator that fits it: trained a step and sampled, or refused."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen.config import compatibility
from tokgen.interfaces import TokenBatch, UserError
from tokgen.sampling import decode, sampler as samplers

ROOT = pathlib.Path(__file__).resolve().parents[2]
B, SIDE = 2, 2
# What fits is stated here by itself: an empty reason alone would prove nothing.
REFUSED = {
    "rotary": {"pyramid of vq", "pyramid of bits"},
    "factor": {"vq", "vq, 1-D", "ibq", "fsq", "lfq", "pyramid of vq"},
    "next_scale": {
        *("vq", "vq, 1-D", "ibq", "fsq", "lfq"),
        *("lfq, equal groups", "lfq, unequal groups", "bsq, equal groups"),
    },
    "masked bits": {"fsq"},
}


@functools.cache
def codec_of(kind: str):
    return compatibility.quantizer(kind, SIDE)


def fits(kind: str, tokens: str) -> bool:
    return tokens != "gaussian" and tokens not in REFUSED.get(kind, ())


@pytest.mark.parametrize("tokens", compatibility.TOKENIZERS)
def test_what_does_not_fit_says_why(tokens):
    codec = codec_of(tokens)
    for kind in compatibility.GENERATORS:
        reason = compatibility.reason(kind, codec)
        assert (reason == "") == fits(kind, tokens), (kind, tokens, reason)
        if reason:
            assert "Error" not in reason and "unpack" not in reason


# Those of one symbol on one grid differ in nothing that a generator sees.
ALIKE = {"vq", "ibq", "lfq"}
PAIRS = [
    (kind, tokens)
    for kind in compatibility.GENERATORS
    for tokens in compatibility.TOKENIZERS
    if fits(kind, tokens) and tokens not in ALIKE
]


# Numbers are computed for these, which no other test has; the rest are traced.
COMPUTED = (
    ("random", "pyramid of bits", 3),
    ("factor", "lfq, equal groups", 0),
    ("next_scale", "pyramid of bits", 0),
    ("masked bits", "bsq, equal groups", 3),
)


def made(kind, tokens, classes):
    codec = codec_of(tokens)
    layout, random = codec.layout, np.random.default_rng(0)
    tokens_BLG = random.integers(0, layout.vocab, (B, layout.length, layout.groups))
    label_B = jnp.arange(B, dtype=jnp.int32) % max(classes, 1)
    batch = TokenBatch(jnp.asarray(tokens_BLG, jnp.int32), label_B)
    return compatibility.generator(kind, codec, classes=classes), codec, batch


def trained(params, graph, batch, codec):
    return nnx.merge(graph, params).loss(batch, codec, step=0, key=jax.random.key(1))


def sampled(generator, codec, label_B, guided):
    sampler = samplers.Sampler(guidance=(2.0,) * decode.steps(generator) if guided else ())
    keys_B = jax.random.split(jax.random.key(2), B)
    state = decode.generate(generator, codec, label_B, sampler, keys_B=keys_B)
    return state.tokens_BLG, state.invalid_B


@pytest.mark.parametrize(("kind", "tokens"), PAIRS)
def test_a_pair_has_a_gradient_and_samples_of_its_shape(kind, tokens):
    generator, codec, batch = made(kind, tokens, 3)
    graph, params = nnx.split(generator)
    slopes = jax.grad(trained, has_aux=True)
    gradients, scalars = jax.eval_shape(slopes, params, graph, batch, codec)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, params)
    assert {"nats_per_token", "token_accuracy"} <= set(scalars)
    drawn, _ = jax.eval_shape(functools.partial(sampled, guided=True), generator, codec, batch.cond)
    assert drawn.shape == batch.tokens_BLG.shape and drawn.dtype == jnp.int32


@pytest.mark.parametrize(("kind", "tokens", "classes"), COMPUTED)
def test_a_pair_trains_and_samples(kind, tokens, classes):
    generator, codec, batch = made(kind, tokens, classes)
    graph, params = nnx.split(generator)
    loss, scalars = jax.jit(trained)(params, graph, batch, codec)
    assert np.isfinite(loss) and np.isfinite(scalars["nats_per_token"])
    draw = jax.jit(functools.partial(sampled, guided=classes > 0))
    drawn, invalid = draw(generator, codec, batch.cond)
    assert drawn.shape == batch.tokens_BLG.shape and not np.asarray(invalid).any()
    assert np.min(drawn) >= 0 and (np.asarray(drawn) < np.asarray(codec.layout.vocab)).all()


def test_the_table_numbers_its_reasons():
    codecs = {name: codec_of(name) for name in ("vq", "pyramid of vq", "gaussian")}
    lines = compatibility.table(codecs).splitlines()
    assert lines[0].split() == ["raster", "rotary", "random", "rar", "factor", "next_scale"] + [
        *("masked", "masked", "bits")
    ]
    assert lines[1].startswith("vq ") and "yes" in lines[1] and "- " in lines[1]
    assert "yes" not in lines[3] and "continuous" in "".join(lines[4:])


def test_the_document_shows_this_matrix():
    """docs/generators.md has the table that `tokgen matrix` prints."""
    text = (ROOT / "docs" / "generators.md").read_text(encoding="utf-8")
    lines = text.split("for one tokenizer):\n\n```\n")[1].split("\n```")[0].splitlines()
    header, *rows = (re.split(r"\s{2,}", line.strip()) for line in lines)
    assert header == list(compatibility.GENERATORS)
    assert [name for name, *_ in rows] == list(compatibility.TOKENIZERS)
    for name, *cells in rows:
        assert [cell == "yes" for cell in cells] == [fits(kind, name) for kind in header], name


def test_a_continuous_tokenizer_fits_nothing():
    with pytest.raises(UserError, match="continuous"):
        compatibility.generator("raster", codec_of("gaussian"), classes=3)
