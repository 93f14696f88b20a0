"""Memorisation: copies are told from samples of the same distribution, by values that are known."""

import numpy as np
import pytest

from tokgen import interfaces
from tokgen.metrics import memorisation


def normal(seed, count=200, width=16):
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def test_mifid_of_copies_explodes_and_of_strangers_is_fid():
    training = normal(0)
    found = memorisation.mifid(7.5, training[:50], training)
    assert found.distance < 1e-15 and found.value > 1e15
    strangers = memorisation.mifid(7.5, np.eye(16, dtype=np.float32)[:8] + 1e-3, training)
    assert strangers.distance > 0.1 and strangers.value == pytest.approx(7.5, rel=1e-12)
    assert (strangers.dropped_generated, strangers.dropped_training) == (0, 0)


def test_mifid_is_the_mean_of_smallest_angles():
    """Written out in float64; opposite directions count as the same; zeros are dropped."""
    generated, training = normal(1, 30, 6), normal(2, 40, 6)
    training[3] = -2 * generated[4]
    x, y = (
        set_ND / np.linalg.norm(set_ND, axis=1, keepdims=True)
        for set_ND in (generated.astype(np.float64), training.astype(np.float64))
    )
    expected = np.mean([min(1 - abs(a @ b) for b in y) for a in x])
    generated = np.concatenate([np.zeros((2, 6), np.float32), generated])
    training = np.concatenate([training, np.zeros((1, 6), np.float32)])
    for threshold, divisor in ((1.0, expected), (expected / 2, 1)):
        found = memorisation.mifid(3.0, generated, training, threshold)
        assert found.distance == pytest.approx(expected, rel=1e-12)
        assert found.value == pytest.approx(3.0 / divisor, rel=1e-12)
        assert (found.dropped_generated, found.dropped_training) == (2, 1)
    with pytest.raises(interfaces.UserError, match="generated"):
        memorisation.mifid(3.0, np.zeros((4, 6)), training)


def test_authenticity():
    """Copies never, strangers always, and by the definition in between."""
    training, generated = normal(3), normal(4, 90)
    assert not memorisation.authentic(training, training).any()
    assert memorisation.authentic(training[:30] + 100, training).all()
    expected = []
    for sample in generated.astype(np.float64):
        distance_N = np.linalg.norm(training - sample, axis=1)
        nearest = distance_N.argmin()
        others_N = np.linalg.norm(np.delete(training, nearest, 0) - training[nearest], axis=1)
        expected.append(others_N.min() < distance_N[nearest])
    found_N = memorisation.authentic(generated, training)
    assert found_N.tolist() == expected and 0.2 < np.mean(expected) < 0.8


def test_copying_is_told_from_fair_samples_and_from_poor_ones():
    """z-scores: a normal number for fair samples, far below for near copies, far above for wide."""
    draws, width = np.random.default_rng(5), 8
    place_3D = 6 * draws.standard_normal((3, width))
    training, test, fair = (
        place_3D[draws.integers(0, 3, count)] + draws.standard_normal((count, width))
        for count in (600, 300, 300)
    )
    near = training[:300] + 0.05 * draws.standard_normal((300, width))
    wide = place_3D[draws.integers(0, 3, 300)] + 2 * draws.standard_normal((300, width))
    assert abs(memorisation.copying(fair, test, training)) < 2.5
    assert memorisation.copying(near, test, training) < -5
    assert memorisation.copying(wide, test, training) > 5


def test_copying_is_mann_whitney_of_each_cell():
    """Three islands far apart are the cells; one holds too few samples to count.

    Turned into 80 dimensions they are the same points, which the 64 principal ones must hold.
    """
    draws = np.random.default_rng(6)

    def island(place, count, spread=1.0):
        return 100 * np.eye(3)[place] + spread * draws.standard_normal((count, 3))

    training = [island(place, 50) for place in range(3)]
    test = [island(place, count) for place, count in ((0, 40), (1, 20), (2, 30))]
    samples = [island(0, 25, 0.5), island(1, 30, 3.0), island(2, memorisation.FEWEST - 1)]
    values = []
    for place in range(2):
        distance_N, distance_M = (
            [np.linalg.norm(training[place] - point, axis=1).min() for point in points]
            for points in (samples[place], test[place])
        )
        n, m = len(distance_N), len(distance_M)
        larger = sum(a > b for a in distance_N for b in distance_M)
        values.append((larger - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))
    expected = (40 * values[0] + 20 * values[1]) / 60
    turn = np.linalg.qr(draws.standard_normal((80, 3)))[0].T
    for seed, basis in ((0, np.eye(3)), (1, np.eye(3)), (0, turn)):
        sets = (np.concatenate(parts) @ basis + 7 for parts in (samples, test, training))
        assert memorisation.copying(*sets, seed=seed) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(interfaces.UserError, match="none among 5 samples"):
        memorisation.copying(samples[0][:5], test[0], training[0])


def test_report_shows_who_is_copied():
    training, generated, held_out = normal(7, 300), normal(8, 100), normal(9, 150)
    generated[[11, 42, 5]] = 4 * training[[200, 7, 31]]
    generated[42] += 1e-3
    generated[5] += 1e-1
    found = memorisation.report(generated, held_out, training, count=3)
    assert found.sample_N.tolist() == [11, 42, 5] and found.training_N.tolist() == [200, 7, 31]
    assert found.similarity_N[0] == 1 and np.all(np.diff(found.similarity_N) < 0)

    def similarity(x, y):
        x, y = (
            set_ND.astype(np.float64) / np.linalg.norm(set_ND, axis=1)[:, None] for set_ND in (x, y)
        )
        return np.quantile((x @ y.T).max(1), [0.5, 0.99, 1])

    np.testing.assert_allclose(found.generated_quantiles, similarity(generated, training), 1e-6)
    np.testing.assert_allclose(found.held_out_quantiles, similarity(held_out, training), 1e-6)
    assert found.generated_quantiles[2] > 0.9999 > found.held_out_quantiles[2]
