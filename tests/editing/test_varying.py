"""Variations: how many tokens, which ones, and scales that are kept."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.editing.families import HOW, each
from tokgen import rng
from tokgen.editing import varying
from tokgen.interfaces import TokenBatch, UserError
from tokgen.sampling import presets


@each
@pytest.mark.parametrize("strength", [0.01, 0.5])
def test_a_share_of_the_tokens_is_drawn_and_all_others_stay(family, strength, model, images):
    found = model(family)
    tokens_NLG = found.encode(images)
    edits = found.edit(images, 5, strength=strength, number=2, **HOW)
    same = (edits.tokens_NLG == tokens_NLG[edits.source_N])[..., 0]
    free_NL = varying.freed(
        found._editing(presets.Choice()), tokens_NLG, np.full(3, 5, np.int32), strength, batch=2
    )
    assert same[~free_NL[edits.source_N]].all() and not same.all()
    wanted = {0.01: 64, 0.5: 80} if family == "next_scale" else {0.01: 1, 0.5: 32}
    np.testing.assert_array_equal(free_NL.sum(1), wanted[strength])


def test_the_least_certain_are_those_of_most_nats(model, images):
    found = model("raster")
    tokens_NLG, cond = found.encode(images), np.full(3, 5, np.int32)
    asked = found._editing(presets.Choice())
    nats_NL = varying.nats(asked, tokens_NLG, cond, batch=2)
    np.testing.assert_allclose(-nats_NL.sum(1), found.log_likelihood(images, classes=5), rtol=1e-5)
    free_NL = varying.freed(asked, tokens_NLG, cond, 0.25, batch=3)
    for nats_L, free_L in zip(nats_NL, free_NL, strict=True):
        assert nats_L[free_L].min() >= nats_L[~free_L].max()


def test_a_masked_generator_is_asked_for_each_token_where_half_of_them_are_hidden(model, images):
    """Against a loop over the halves, and over the tokens of each."""
    found = model("masked")
    tokens_NLG, cond = found.encode(images), np.full(3, 5, np.int32)
    asked = found._editing(presets.Choice())
    nats_NL = varying.nats(asked, tokens_NLG, cond, batch=2)
    wanted_NL = np.zeros((3, 64))
    for key in rng.numbered(rng.key(0, "eval"), varying.HALVES):
        order = np.asarray(jax.random.permutation(key, 64))
        for hidden in (order % 2 == 0, order % 2 == 1):
            seen = np.where(hidden[:, None], asked.generator.layout.absent, tokens_NLG)
            logits = asked.generator.logits(TokenBatch(jnp.asarray(seen), jnp.asarray(cond)))
            logits = np.asarray(logits, np.float64)[:, :, 0]
            for i, place in itertools.product(range(3), np.flatnonzero(hidden)):
                row = logits[i, place]
                wanted_NL[i, place] += np.log(np.exp(row).sum()) - row[tokens_NLG[i, place, 0]]
    np.testing.assert_allclose(nats_NL, wanted_NL / varying.HALVES, rtol=1e-4)


@pytest.mark.long
def test_coarse_scales_are_kept(model, images):
    found = model("next_scale")
    tokens_NLG = found.encode(images)
    for scales, kept in ((1, 1), (3, 21)):
        edits = found.edit(images, 5, scales=scales, number=2, **HOW)
        np.testing.assert_array_equal(
            edits.tokens_NLG[:, :kept], tokens_NLG[edits.source_N][:, :kept]
        )
        assert (edits.tokens_NLG[:, kept:] != tokens_NLG[edits.source_N][:, kept:]).any()
    for scales in (0, 4):
        with pytest.raises(UserError, match="from 1 to 3"):
            found.edit(images, 5, scales=scales, **HOW)
