"""FSQ against the product of its levels, written out digit by digit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen.quantizers import fsq

LEVELS = [(8, 6, 5), (7, 5, 5, 5), (2, 3)]


def written_out(levels):
    """Codes of all tokens: the first channel is the fastest, and 0 is a level of every channel."""
    digits = [range(size) for size in reversed(levels)]
    rows = [tuple(reversed(row)) for row in itertools.product(*digits)]
    half = np.array(levels) // 2
    return np.array([(np.array(row) - half) / half for row in rows])


def rounded(latents_nC, levels):
    """Eq. 2 of arXiv:2309.15505 one number at a time, in float64; digits from 0."""
    digits = np.zeros(latents_nC.shape, int)
    margin = np.zeros(latents_nC.shape)  # how far from the edge of a bin
    for (n, c), value in np.ndenumerate(latents_nC):
        size = levels[c]
        half, offset = (size - 1) * 1.001 / 2, 0.5 * (size % 2 == 0)
        bounded = np.tanh(value + np.arctanh(offset / half)) * half - offset
        digits[n, c] = int(np.rint(bounded)) + size // 2
        margin[n, c] = abs(abs(bounded - np.rint(bounded)) - 0.5)
    return digits, margin


@pytest.mark.parametrize("levels", LEVELS)
def test_all_codes(levels):
    quantizer = fsq.Quantizer(levels, grid=(4, 4))
    size = int(np.prod(levels))
    assert quantizer.layout.vocab == (size,) and quantizer.channels == len(levels)
    tokens_BLG = jnp.arange(size)[None, :, None]
    codes_BPC = quantizer.decode(tokens_BLG)
    np.testing.assert_allclose(codes_BPC[0], written_out(levels), atol=1e-6)
    assert np.abs(codes_BPC).max() == 1 and (np.abs(codes_BPC).sum(-1) == 0).any()


@pytest.mark.parametrize("levels", LEVELS)
def test_encode_is_the_written_out_rounding(levels, key):
    quantizer = fsq.Quantizer(levels, grid=(4, 4))
    latents_nC = np.asarray(2 * jax.random.normal(key, (400, len(levels))), np.float64)
    digits, margin = rounded(latents_nC, levels)
    sure = margin.min(-1) > 1e-4  # float32 may fall to the other side of an edge
    assert sure.mean() > 0.98
    expected = digits @ np.cumprod([1, *levels[:-1]])
    found = np.asarray(quantizer.encode(jnp.asarray(latents_nC, jnp.float32)[None]))[0, :, 0]
    np.testing.assert_array_equal(found[sure], expected[sure])


@pytest.mark.parametrize("levels", LEVELS)
def test_zero_is_the_middle_code(levels):
    """The shift undoes the offset of even numbers of levels."""
    quantizer = fsq.Quantizer(levels, grid=(1, 1))
    out = quantizer(jnp.zeros((1, 1, len(levels))))
    np.testing.assert_array_equal(out.latents_BPC, 0)


def test_every_code_is_used_and_the_outer_levels_are_reached(key):
    quantizer = fsq.Quantizer((8, 6, 5), grid=(8, 8))
    tokens_BLG = quantizer.encode(2 * jax.random.normal(key, (200, 64, 3)))
    assert len(np.unique(tokens_BLG)) == 240
    far = quantizer(jnp.asarray([[[-50.0] * 3, [50.0] * 3]])).latents_BPC[0]
    np.testing.assert_allclose(far, [[-1, -1, -1], [3 / 4, 2 / 3, 1]], atol=1e-6)


def test_huge_latents_keep_tokens_and_gradients_finite():
    quantizer = fsq.Quantizer((8, 6, 5), grid=(1, 1))
    latents_BPC = jnp.full((1, 1, 3), 1e30)
    gradient = jax.grad(lambda z: quantizer(z).latents_BPC.sum())(latents_BPC)
    assert np.isfinite(gradient).all() and quantizer.encode(latents_BPC).item() == 239


@pytest.mark.parametrize("levels", [(), (8, 1)])
def test_levels_of_one_value_are_refused(levels):
    with pytest.raises(ValueError, match="levels must be"):
        fsq.Quantizer(levels, grid=(1, 1))
