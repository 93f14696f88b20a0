import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen import flops
from tokgen.nn import attention, bands, masks


@pytest.mark.parametrize("sizes", [(1, 4, 9, 2), (1,) * 13, (7,)])
def test_a_rules_rows_meet_the_keys_that_they_see_and_no_others(sizes, monkeypatch):
    """Bands of rows, each with its own keys: the same numbers and slopes, in fewer products."""
    length = sum(sizes)
    q, k, v, weight = (
        jnp.asarray(np.random.default_rng(seed).normal(size=(2, 3, length, 4)), jnp.float32)
        for seed in range(4)
    )
    mask = masks.Blocks(sizes)

    def total(attend, q, k, v):
        return jnp.sum(weight * attend(q, k, v))

    def plain(q, k, v):
        return attention._together(q, k, v, mask=mask.written())

    def banded(q, k, v):
        return attention.attend(q, k, v, mask)

    monkeypatch.setattr(attention, "TOGETHER", 1)
    monkeypatch.setattr(bands, "LEAST", 3)
    np.testing.assert_allclose(banded(q, k, v), plain(q, k, v), rtol=1e-5, atol=1e-6)
    found = jax.grad(functools.partial(total, banded), (0, 1, 2))(q, k, v)
    expected = jax.grad(functools.partial(total, plain), (0, 1, 2))(q, k, v)
    for slope, own in zip(found, expected, strict=True):
        np.testing.assert_allclose(slope, own, rtol=1e-5, atol=1e-6)
    operations = [flops.of(f, q, k, v) for f in (banded, plain)]
    assert operations[0] < operations[1] or sizes == (7,)


def test_bands_are_of_whole_blocks_of_enough_rows_and_few(monkeypatch):
    monkeypatch.setattr(bands, "LEAST", 3)

    def rows(*sizes):
        found = bands.of_rule(masks.Blocks(sizes))
        assert all(band.seen == band.end for band in found)
        return [(band.begin, band.end, band.masked) for band in found]

    assert rows(1, 4, 9, 2) == [(0, 5, True), (5, 14, False), (14, 16, False)]
    assert rows(1, 1, 1, 1) == [(0, 3, True), (3, 4, False)]
    assert rows(16) == [(0, 16, False)] == rows(16, 0)
    assert len(bands.of_rule(masks.causal(4096))) <= bands.MOST + 1
