"""Dropout: what it draws, and that it draws the same wherever the operand lies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tokgen import sharding
from tokgen.nn import dropout

RATE, SHARE = 0.1, 230 / 256  # of which 26/256 is dropped


@functools.partial(jax.jit, static_argnums=(1, 2))
def _kept(key, shape, rate=RATE):
    return dropout.dropout(jnp.ones(shape), rate, key) != 0


def test_it_is_a_function_of_the_key_alone():
    x, key = jax.random.normal(jax.random.key(1), (40, 51)), jax.random.key(0)
    np.testing.assert_array_equal(dropout.dropout(x, RATE, None), x)
    np.testing.assert_array_equal(dropout.dropout(x, 0.0, key), x)
    out = np.asarray(dropout.dropout(x, RATE, key))
    kept = out != 0
    np.testing.assert_array_equal(kept, _kept(key, x.shape))
    assert np.any(kept != _kept(jax.random.key(1), x.shape))
    np.testing.assert_allclose(out[kept], np.asarray(x)[kept] / SHARE, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 3, 257])
@pytest.mark.parametrize("rate", [RATE, 0.5, 0.01, 1e-5])
def test_any_length_keeps_the_share_by_which_it_scales(length, rate):
    shape = (length, 400_000 // length)
    out = np.asarray(jax.jit(lambda key: dropout.dropout(jnp.ones(shape), rate, key))(
        jax.random.key(2)
    ))  # fmt: skip
    share = 1 / np.float64(out.max())
    assert abs(1 - share - rate) <= rate / 20 + 1e-7
    assert set(np.unique(out)) == {0, out.max()}
    spread = (share * (1 - share) / out.size) ** 0.5  # of the share of independent draws
    assert abs((out != 0).mean() - share) < 4 * spread
    assert abs(out.mean() - 1) < 4 * spread / share
    # the variance of the values is (1 - share) / share
    fourth = (1 - share) * ((1 - share) ** 3 + share**3) / share**3
    assert abs(out.var() - (1 - share) / share) < 4 * (fourth / out.size) ** 0.5


@pytest.mark.parametrize("rate", [1e-12, 1 - 1e-12, 0.998])
def test_extreme_rates_neither_drop_nor_keep_all_for_certain(rate):
    out = dropout.dropout(jnp.ones(1000), rate, jax.random.key(3))
    assert np.isfinite(np.asarray(out)).all()
    share = 2.0**-32 if rate > 0.999 else 1 - rate
    if np.any(out):
        np.testing.assert_allclose(out.max(), 1 / share, rtol=0.06)


@pytest.mark.parametrize("shape, axis", [((7,), 0), ((1,), 0), ((3, 5, 1, 6), 1)])
def test_words_are_those_of_jax(shape, axis):
    """Whatever the platform, a step draws the same."""
    key = jax.random.key(2**31 - 1)
    expected = jax.random.bits(key, shape, jnp.uint32)
    np.testing.assert_array_equal(dropout._words(key, shape, axis), expected)
    other = jax.random.key(3, impl="rbg")  # another generator is asked itself
    expected = jax.random.bits(other, shape, jnp.uint32)
    np.testing.assert_array_equal(dropout._words(other, shape, axis), expected)


def test_entries_of_a_word_and_of_neighbours_are_independent():
    kept = np.asarray(_kept(jax.random.key(4), (259, 2000), 0.5)) - 0.5
    kept = kept - kept.mean()
    for axis, steps in ((1, (1, 2)), (0, (1, 2, 3, 4, 5, 64, 65, 128))):
        for step in steps:
            ahead = np.take(kept, np.arange(step, kept.shape[axis]), axis)
            behind = np.take(kept, np.arange(kept.shape[axis] - step), axis)
            # of independent bits the mean product is 0, with a deviation of 1/4 of 1/sqrt(count)
            assert abs((ahead * behind).mean()) < 4.5 * 0.25 * ahead.size**-0.5, (axis, step)


def test_bfloat16_is_scaled_in_float32():
    x = jax.random.normal(jax.random.key(5), (64, 33)).astype(jnp.bfloat16)
    out = dropout.dropout(x, RATE, jax.random.key(0))
    assert out.dtype == jnp.bfloat16
    wide = dropout.dropout(x.astype(jnp.float32), RATE, jax.random.key(0))
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("axes", [("data", None), (None, "data"), (("data", "fsdp"), "tensor")])
def test_the_draw_is_the_same_wherever_the_operand_lies(axes):
    shape, key = (16, 12, 32), jax.random.key(6)
    expected = _kept(key, shape)
    sizes = (2, 2, 2) if "tensor" in axes else (8, 1, 1)
    mesh = sharding.make_mesh(*sizes)
    place = NamedSharding(mesh, PartitionSpec(axes[0], None, axes[1]))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones(shape), place)
        found = jax.jit(lambda x: dropout.dropout(x, RATE, key) != 0, out_shardings=place)(x)

        def total(x):
            return dropout.dropout(jax.lax.with_sharding_constraint(x, place), RATE, key).sum()

        inside = jax.jit(jax.grad(total))(x)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(inside != 0, expected)
