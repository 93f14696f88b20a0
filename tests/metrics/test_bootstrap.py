"""Intervals cover what they should as often as they say; lines are least squares."""

import numpy as np
import pytest

from tokgen.interfaces import UserError
from tokgen.metrics import bootstrap, frechet, moments


@pytest.fixture
def random():
    return np.random.default_rng(2)


def covered(intervals, truth):
    return np.mean([found.low <= truth <= found.high for found in intervals])


def test_the_mean_of_a_value_per_image(random):
    """Of skewed values: the interval, the error, and their levels."""
    values = random.exponential(size=(200, 80))
    found = [bootstrap.of_mean(v, seed=n, replicates=200) for n, v in enumerate(values)]
    assert 0.88 < covered(found, 1.0) < 0.98
    error = np.mean([one.error for one in found])
    assert error == pytest.approx(1 / np.sqrt(80), rel=0.1)
    half = [bootstrap.of_mean(v, seed=0, replicates=99, level=0.5) for v in values]
    assert 0.4 < covered(half, 1.0) < 0.6
    assert found[0].value == pytest.approx(values[0].mean()) and found[0].bias == 0
    assert found[0] == bootstrap.of_mean(values[0], seed=0, replicates=200)
    assert found[0] != bootstrap.of_mean(values[0], seed=1, replicates=200)
    for bad in (values, values[0, :1], values[0] * np.nan):
        with pytest.raises(UserError, match="a finite value of 2 images or more"):
            bootstrap.of_mean(bad, seed=0)


def chunks_of(rows, seed, count=32):
    return moments.grouped([(rows, moments.chunk_of(0, len(rows), count, seed))], count)


def test_a_frechet_distance_is_covered(random):
    """Of normals in five dimensions to another one, at a count that has a bias."""
    exact = moments.Moments.from_covariance(np.full(5, 0.3), np.diag([0.5, 1, 1, 2, 1]), 10**9)
    statistic = frechet.against(exact)
    found = []
    for seed in range(120):
        parts = chunks_of(random.standard_normal((320, 5)), seed)
        found.append(bootstrap.of_moments(parts, statistic, seed=seed, replicates=60))
        assert found[-1].value == pytest.approx(statistic(moments.merged(parts)), rel=1e-12)
    values = [one.value for one in found]
    assert 0.88 < covered(found, np.mean(values)) <= 0.99
    assert np.mean([one.error for one in found]) == pytest.approx(np.std(values), rel=0.15)
    truth = frechet.distance(np.zeros(5), np.eye(5), exact.mean_D, exact.covariance_DD)
    assert np.mean(values) - truth == pytest.approx(np.mean([one.bias for one in found]), abs=0.01)
    assert found[0] != found[1]


def test_the_bias_of_features_with_heavy_tails(random):
    """Where the bias of normals says half of it, drawing again says all of it."""
    mixing = random.standard_normal((6, 12))

    def drawn(count):
        return np.maximum(random.standard_normal((count, 6)) @ mixing - 1, 0) ** 1.5

    exact = moments.Moments.of(drawn(200_000))
    statistic = frechet.against(exact)
    true = np.mean([statistic(moments.Moments.of(drawn(600))) for _ in range(150)])
    found, normal = [], []
    for seed in range(8):
        parts = chunks_of(drawn(600), seed)
        found.append(bootstrap.of_moments(parts, statistic, seed=seed, replicates=50).bias)
        normal.append(frechet.between(moments.merged(parts), exact).bias)
    assert np.mean(found) == pytest.approx(true, rel=0.15)
    assert np.mean(normal) < 0.75 * true


def test_chunks_give_the_error_of_a_mean(random):
    """A linear statistic has a known one: that of the mean of all images, and no bias."""
    rows = random.standard_normal((640, 3))
    errors, biases = [], []
    for seed in range(20):
        parts = chunks_of(rows, seed)
        one = bootstrap.of_moments(parts, lambda m: m.mean_D[0], seed=seed, replicates=200)
        errors.append(one.error)
        biases.append(one.bias)
    wanted = rows[:, 0].std(ddof=1) / np.sqrt(640)
    assert np.mean(errors) == pytest.approx(wanted, rel=0.1)
    assert abs(np.mean(biases)) < wanted / 10
    with pytest.raises(UserError, match="at least 8 chunks of images, better 32; found 7"):
        bootstrap.of_moments(parts[:7], lambda m: 0.0, seed=0)


def test_a_line_is_least_squares(random):
    """With numpy's covariance of its coefficients."""
    sizes = bootstrap.subset_sizes(2000, 100, 50_000, 15)
    assert sizes[0] == 100 and sizes[-1] == 2000 and np.ptp(np.diff(sizes)) <= 1
    assert bootstrap.subset_sizes(99_000, 5000, 50_000, 15)[-1] == 50_000
    inverse = 1 / np.array(sizes)
    exact = bootstrap.line(sizes, 3 + 70 * inverse)
    assert (exact.value, exact.slope) == pytest.approx((3, 70)) and exact.error < 1e-9
    values = 3 + 70 * inverse + 0.1 * random.standard_normal(15)
    (slope, value), covariance = np.polyfit(inverse, values, 1, cov="unscaled")
    rest = values - value - slope * inverse
    found = bootstrap.line(sizes, values)
    assert (found.value, found.slope) == pytest.approx((value, slope))
    assert found.error == pytest.approx(np.sqrt(covariance[1, 1] * (rest @ rest) / 13))
    for count, smallest, points in ((100, 100, 15), (100, 1, 15), (100, 10, 2)):
        with pytest.raises(UserError, match="choose a smaller `smallest`"):
            bootstrap.subset_sizes(count, smallest, 50_000, points)


def test_subsets_are_drawn_without_replacement():
    seen = []
    found = bootstrap.infinity(50, lambda rows: seen.append(rows) or 1.0, (10, 20, 50), seed=3)
    assert [len(np.unique(rows)) for rows in seen] == [10, 20, 50]
    assert not np.array_equal(seen[0], np.arange(10))
    assert (found.value, found.slope) == pytest.approx((1.0, 0.0))
    assert found.sizes == (10, 20, 50) and found.values == (1.0, 1.0, 1.0)
