"""Moments against numpy's covariance; streams, merges and groups against all rows at once."""

import numpy as np
import pytest

from tokgen.interfaces import UserError
from tokgen.metrics import moments

of = moments.Moments.of


@pytest.fixture
def random():
    return np.random.default_rng(7)


def features(random, count, width=5, offset=0.0):
    """Correlated rows, far from the origin if asked."""
    return random.standard_normal((count, width)) @ random.standard_normal((width, width)) + offset


def near(a, b, limit):
    """Equal in parts of the largest magnitude of each array."""
    assert a.count == pytest.approx(b.count, rel=limit)
    assert a.squares == pytest.approx(b.squares, rel=limit)
    for one, two in ((a.mean_D, b.mean_D), (a.scatter_DD, b.scatter_DD)):
        assert np.abs(one - two).max() <= limit * np.abs(two).max()


def test_mean_and_covariance_are_numpys(random):
    """Far from the origin sums of raw squares would keep 4 digits here."""
    rows = features(random, 5000, offset=1e6)
    found = of(rows)
    assert found.count == found.squares == 5000 and found.width == 5
    np.testing.assert_allclose(found.mean_D, rows.mean(0), rtol=1e-13)
    covariance = np.cov(rows, rowvar=False)
    np.testing.assert_allclose(found.covariance_DD, covariance, atol=1e-9 * covariance.max())
    np.testing.assert_array_equal(found.scatter_DD, found.scatter_DD.T)


def test_float32_and_integers_are_summed_in_float64(random):
    rows = features(random, 3000, offset=100.0).astype(np.float32)
    near(of(rows), of(rows.astype(np.float64)), 0)
    ints = random.integers(0, 255, (100, 3)).astype(np.uint8)
    np.testing.assert_allclose(of(ints).covariance_DD, np.cov(ints, rowvar=False), rtol=1e-13)


def test_batches_of_any_size_give_the_same_bits(random):
    rows = features(random, 3 * moments.ROWS + 11).astype(np.float32)
    whole = of(rows)
    for sizes in ((64,), (1, 999, 5000), (moments.ROWS,), (len(rows),)):
        cuts, n, turn = [], 0, 0
        while n < len(rows):
            cuts.append(rows[n : n + sizes[turn % len(sizes)]])
            n, turn = n + len(cuts[-1]), turn + 1
        found = moments.stream(iter(cuts))
        for name, array in whole.arrays().items():
            np.testing.assert_array_equal(found.arrays()[name], array)


def test_a_batch_may_be_overwritten_and_moments_asked_for_in_between(random):
    rows, accumulator = features(random, 40), moments.Accumulator(rows=16)
    buffer = np.empty((10, 5))
    for n in range(0, 40, 10):
        buffer[:] = rows[n : n + 10]
        accumulator.add(buffer)
        near(accumulator.moments(), of(rows[: n + 10]), 1e-12)


def test_merging_is_associative_and_equals_a_single_pass(random):
    """Sets of unlike sizes and far apart means."""
    sets = [
        features(random, n, offset=c) for n, c in ((3, 1e3), (700, -1e3), (50, 0), (1, 5), (0, 0))
    ]
    a, b, c, d, e = parts = [of(rows) for rows in sets]
    whole = of(np.concatenate(sets))
    left = a.merge(b).merge(c).merge(d).merge(e)
    right = a.merge(b.merge(c.merge(d.merge(e))))
    near(left, right, 1e-12)
    near(d.merge(a).merge(c).merge(b), left, 1e-12)
    for found in (left, moments.merged(parts), a.add(np.concatenate(sets[1:]))):
        near(found, whole, 1e-10)


def test_times_are_repetitions(random):
    a, b, c = features(random, 4), features(random, 9, offset=2), features(random, 5)
    found = moments.merged([of(a), of(b), of(c)], np.array([3, 1, 0]))
    near(found, of(np.concatenate([a, a, a, b])), 1e-12)


def test_weights_are_numpys_aweights(random):
    rows, weight = features(random, 3000), random.random(3000) ** 3
    found = of(rows, weight)
    np.testing.assert_allclose(found.mean_D, np.average(rows, 0, weight), atol=1e-13)
    wanted = np.cov(rows, rowvar=False, aweights=weight)
    np.testing.assert_allclose(found.covariance_DD, wanted, atol=1e-12 * wanted.max())
    chosen = random.random(3000) < 0.3
    near(of(rows, chosen), of(rows[chosen]), 1e-12)
    for bad in (weight[:-1], -weight, weight * np.nan):
        with pytest.raises(UserError, match="3000 rows need as many weights of 0 or more"):
            of(rows, bad)


def test_groups(random, monkeypatch):
    """By label; an absent group is empty."""
    monkeypatch.setattr(moments, "GROUP_ROWS", 32)
    rows, label = features(random, 400), random.integers(0, 3, 400)
    batches = [(rows[n : n + 57], label[n : n + 57]) for n in range(0, 400, 57)]
    found = moments.grouped(iter(batches), 4)
    for k in range(3):
        near(found[k], of(rows[label == k]), 1e-12)
    assert found[3].count == 0
    with pytest.raises(UserError, match="at least 2 images; found 0"):
        _ = found[3].covariance_DD
    with pytest.raises(UserError, match="from 0 to 1; found 0 to 2"):
        moments.grouped(batches, 2)


def test_images_are_dealt_to_chunks_evenly_and_by_their_number():
    chunk = moments.chunk_of(0, 1000, 32, seed=3)
    parts = [moments.chunk_of(n, min(77, 1000 - n), 32, seed=3) for n in range(0, 1000, 77)]
    np.testing.assert_array_equal(chunk, np.concatenate(parts))
    assert np.ptp(np.bincount(chunk, minlength=32)) <= 1
    # sorted by class, 64 images each: two of every class in every chunk
    for first in range(0, 960, 64):
        assert set(np.bincount(chunk[first : first + 64], minlength=32)) == {2}
    assert not np.array_equal(chunk, moments.chunk_of(0, 1000, 32, seed=4))
    # labels that go round must not meet the same chunk each time
    assert len(np.unique(chunk[::32])) > 10
    assert len(moments.chunk_of(5, 0, 32, seed=3)) == 0


def test_projecting_moments_is_projecting_rows(random):
    rows, basis = features(random, 200, offset=3), random.standard_normal((5, 2))
    near(of(rows).project(basis), of(rows @ basis), 1e-12)


def test_saved_and_read_bit_for_bit(random, tmp_path):
    found = of(features(random, 30), random.random(30))
    np.savez(tmp_path / "moments.npz", **found.arrays())
    with np.load(tmp_path / "moments.npz", allow_pickle=False) as file:
        again = moments.Moments.from_arrays(file)
    near(again, found, 0)
    arrays = found.arrays()
    with pytest.raises(UserError, match="need count, squares, mean, scatter; scatter lack"):
        moments.Moments.from_arrays({n: a for n, a in arrays.items() if n != "scatter"})
    with pytest.raises(UserError, match=r"need \(\), \(\), \(D,\) and \(D, D\); found"):
        moments.Moments.from_arrays(arrays | {"mean": arrays["mean"][1:]})
    with pytest.raises(UserError, match="must be finite"):
        moments.Moments.from_arrays(arrays | {"mean": arrays["mean"] * np.nan})


def test_statistics_of_others(random):
    rows = features(random, 30)
    found = moments.Moments.from_covariance(rows.mean(0), np.cov(rows, rowvar=False), 30)
    near(found, of(rows), 1e-12)


def test_what_is_not_finite_is_named_by_its_row(random):
    rows = features(random, 300)
    rows[217, 2], rows[250, 0] = np.nan, np.inf
    with pytest.raises(UserError, match="found nan in row 217 and 2 such rows"):
        of(rows)
    with pytest.raises(UserError, match="found nan in row 217 "):
        moments.stream(rows[n : n + 64] for n in range(0, 300, 64))


def test_what_is_no_set_of_features_is_refused(random):
    for bad in (np.ones(3), np.ones((2, 3, 4)), np.ones((2, 3), bool), np.array([["a"]])):
        with pytest.raises(UserError, match=r"must be numbers \[images, width\]; found"):
            of(bad)
    with pytest.raises(UserError, match="one width; found 5 and 4"):
        moments.stream([features(random, 4), features(random, 4, 4)])
    with pytest.raises(UserError, match="one width to be merged"):
        of(np.ones((3, 4))).merge(of(np.ones((3, 5))))
    with pytest.raises(UserError, match="at least 2 images; found 1"):
        _ = of(np.ones((1, 4))).covariance_DD
    with pytest.raises(UserError, match="at least one batch"):
        moments.stream([])
