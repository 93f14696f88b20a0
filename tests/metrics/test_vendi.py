"""Vendi scores that are known: clusters, copies, and the kernel matrix written out."""

import math

import numpy as np
import pytest

from tokgen import interfaces
from tokgen.metrics import vendi


@pytest.mark.parametrize("order", [0, 0.5, 1, 2, math.inf])
def test_clusters_of_equal_mass_count_one_each(order):
    """At every order, in the form of N and in that of D."""
    for count in (6, 600):
        features_ND = np.tile(3 * np.eye(6, 12, dtype=np.float32), (count // 6, 1))
        assert vendi.score(features_ND, order) == pytest.approx(6, rel=1e-9)
    assert vendi.score(np.full((9, 4), 0.3, np.float32), order) == pytest.approx(1, rel=1e-9)


def test_random_classes():
    label_N = np.random.default_rng(0).integers(0, 10, 5000)
    assert vendi.score(np.eye(10)[label_N]) == pytest.approx(10, rel=0.005)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_both_forms_are_the_kernel_matrix(shape):
    features_ND = np.random.default_rng(1).standard_normal(shape)
    unit = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    share = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    share = share[share > 1e-12]
    expected = {
        1: np.exp(-(share * np.log(share)).sum()),
        2: 1 / (share**2).sum(),
        0.5: np.sqrt(share).sum() ** 2,
        math.inf: 1 / share.max(),
    }
    for order, value in expected.items():
        assert vendi.score(features_ND, order) == pytest.approx(value, rel=1e-9)
    assert vendi.score(features_ND, 0) == pytest.approx(40, rel=1e-9)
    assert expected[math.inf] < expected[2] < expected[1] < expected[0.5] < 40


def test_blocks_and_orders_of_rows_change_nothing(monkeypatch):
    features_ND = np.random.default_rng(2).standard_normal((100, 7)).astype(np.float32)
    whole = vendi.score(features_ND)
    monkeypatch.setattr(vendi, "BLOCK", 13)
    assert vendi.score(features_ND[::-1]) == pytest.approx(whole, rel=1e-12)


def test_within_a_class():
    """Class 3 holds copies, class 7 three directions."""
    features_ND = np.concatenate([np.ones((6, 3)), np.tile(np.eye(3), (2, 1))])
    label_C, score_C = vendi.by_class(features_ND, np.repeat([3, 7], 6))
    assert label_C.tolist() == [3, 7]
    np.testing.assert_allclose(score_C, [1, 3], rtol=1e-9)


def test_what_has_no_direction_is_refused():
    for bad in (0, np.nan):
        features_ND = np.ones((4, 3))
        features_ND[2] = bad
        with pytest.raises(interfaces.UserError, match="row 2"):
            vendi.score(features_ND)
    with pytest.raises(interfaces.UserError, match="-1"):
        vendi.score(np.ones((4, 3)), -1)
    with pytest.raises(interfaces.UserError, match=r"\(0, 3\)"):
        vendi.score(np.ones((0, 3)))
