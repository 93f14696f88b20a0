"""Accuracy of classes against ranks counted by hand."""

import numpy as np
import pytest

from tokgen import interfaces
from tokgen.metrics import accuracy


def test_against_sorted_logits():
    draws = np.random.default_rng(0)
    logits_NV = draws.integers(0, 6, (200, 9)).astype(np.float32)  # many ties
    label_N = draws.integers(0, 9, 200)
    for k in (1, 5, 9):
        best_NK = np.argsort(-logits_NV, axis=1, kind="stable")[:, :k]
        share = np.mean([label in best for label, best in zip(label_N, best_NK, strict=True)])
        found = accuracy.top(logits_NV, label_N, k)
        assert found.value == share
        assert found.error == pytest.approx(np.sqrt(share * (1 - share) / 200), abs=1e-15)


def test_the_error_is_the_spread_over_repetitions():
    draws = np.random.default_rng(1)
    found = [accuracy.top(draws.standard_normal((100, 4)), np.zeros(100, int)) for _ in range(2000)]
    spread = np.std([each.value for each in found])
    assert np.mean([each.error for each in found]) == pytest.approx(spread, rel=0.05)


def test_what_is_no_prediction_is_refused():
    logits_NV = np.zeros((3, 4))
    for label_N, k, word in (
        ([0, 1], 1, r"\(3, 4\) and \(2,\)"),
        ([0, 1, 4], 1, "row 2 has the label 4"),
        ([0, -1, 2], 1, "row 1 has the label -1"),
        ([0, 1, 2], 5, "at least 5 classes"),
    ):
        with pytest.raises(interfaces.UserError, match=word):
            accuracy.top(logits_NV, label_N, k)
    logits_NV[1, 2] = np.nan
    with pytest.raises(interfaces.UserError, match="row 1"):
        accuracy.top(logits_NV, [0, 1, 2])
