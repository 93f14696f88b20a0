"""Usage, entropy and perplexity where they are known exactly."""

import numpy as np
import pytest

from tokgen import interfaces
from tokgen.metrics import codebook


def test_counts_are_per_symbol_of_a_position():
    layout = interfaces.TokenLayout((5, 3), ((1, 2),))
    tokens_BLG = np.array([[[0, 2], [4, 2]], [[0, 1], [0, 2]]])
    first, second = codebook.counts(tokens_BLG, layout)
    np.testing.assert_array_equal(first, [3, 0, 0, 0, 1])
    np.testing.assert_array_equal(second, [0, 1, 3])


def test_uniform_over_k_of_v():
    count_V = np.zeros(64, int)
    count_V[:16] = 7
    assert codebook.usage(count_V) == 0.25
    assert codebook.entropy(count_V) == pytest.approx(np.log(16), abs=1e-12)
    assert codebook.perplexity(count_V) == pytest.approx(16, abs=1e-10)


def test_one_half_and_two_quarters():
    assert codebook.entropy(np.array([2, 1, 0, 1])) == pytest.approx(1.5 * np.log(2))
    assert codebook.perplexity(np.array([2, 1, 0, 1])) == pytest.approx(2**1.5)


def test_a_single_code_and_none():
    assert codebook.entropy(np.array([0, 9, 0])) == 0 and codebook.perplexity(np.array([9])) == 1
    assert codebook.usage(np.zeros(4)) == 0 and codebook.entropy(np.zeros(4)) == 0


def test_large_counts_keep_their_precision():
    """Beyond 2^24 a float32 sum would lose single counts."""
    count_V = np.array([2**30, 2**30, 1])
    assert codebook.usage(count_V) == 1
    share = 1 / (2**31 + 1)
    expected = -(share * np.log(share) + (1 - share) * np.log((1 - share) / 2))
    assert codebook.entropy(count_V) == pytest.approx(expected, abs=1e-12)
