"""Neighbours against distances written out in float64, whatever the block; expected shares."""

import numpy as np
import pytest

from tokgen import interfaces
from tokgen.metrics import neighbours

COMPARISONS = {"closed": np.less_equal, "open": np.less}


def distances(x_ND, y_MD):
    """Every distance [N, M], one row of differences at a time."""
    y_MD = y_MD.astype(np.float64)
    return np.stack([np.sqrt(((x_D - y_MD) ** 2).sum(1)) for x_D in x_ND.astype(np.float64)])


def ranked(distance_NM, k):
    index_NK = np.argsort(distance_NM, axis=1, kind="stable")[:, :k]
    return index_NK, np.take_along_axis(distance_NM, index_NK, axis=1)


def written_out(real, generated, k, compare):
    """Precision, recall, density and coverage, ball by ball."""
    radii = {}
    for name, set_ND in (("real", real), ("generated", generated)):
        own_NN = distances(set_ND, set_ND)
        np.fill_diagonal(own_NN, np.inf)
        radii[name] = np.sort(own_NN, axis=1)[:, k - 1]
    between = distances(real, generated)
    real_balls = compare(between, radii["real"][:, None])
    generated_balls = compare(between, radii["generated"][None])
    return (
        (real_balls.any(0).mean(), generated_balls.any(1).mean()),
        (real_balls.sum() / (k * len(generated)), real_balls.any(1).mean()),
    )


def grid(draws, count):
    """Whole numbers in the plane: equal distances and copies everywhere."""
    return draws.integers(0, 12, (count, 2)).astype(np.float32)


def cloud(draws, count):
    """Far from the origin, with copies: a set whose squares cancel badly."""
    x_ND = (300 + draws.standard_normal((count, 24))).astype(np.float32)
    x_ND[1:9] = x_ND[0]
    return x_ND


def speck(draws, count):
    """So tight that float32 cannot tell any two of its points apart by their products."""
    return 1 + 1e-9 * draws.standard_normal((count, 5))


@pytest.mark.parametrize("draw", [grid, cloud, speck])
def test_neighbours_are_those_of_the_written_out_distances(draw):
    draws = np.random.default_rng(1)
    features_ND, reference_MD = draw(draws, 60), draw(draws, 83)
    far = np.full((1, reference_MD.shape[1]), 1e4, reference_MD.dtype)
    reference_MD = np.concatenate([reference_MD, far])  # it stretches what float32 has to hold
    index_NK, distance_NK = ranked(distances(features_ND, reference_MD), 4)
    own_MM = distances(reference_MD, reference_MD)
    np.fill_diagonal(own_MM, np.inf)
    radius_M = np.sort(own_MM, axis=1)[:, 2]
    for block in (17, 4096):
        found_NK, found = neighbours.nearest(features_ND, reference_MD, 4, block=block)
        np.testing.assert_array_equal(found_NK, index_NK)
        np.testing.assert_allclose(found, distance_NK, rtol=1e-12, atol=0)
        radii = neighbours.radii(reference_MD, 3, block=block)
        np.testing.assert_allclose(radii, radius_M, rtol=1e-12, atol=0)


@pytest.mark.parametrize("compare", COMPARISONS.values(), ids=COMPARISONS)
@pytest.mark.parametrize("draw", [grid, cloud])
def test_shares_are_those_of_the_balls(draw, compare):
    draws = np.random.default_rng(2)
    real, generated = draw(draws, 60), draw(draws, 83)
    for k in (1, 3):
        spread, dense = written_out(real, generated, k, compare)
        for block in (17, 4096):
            found = neighbours.precision_recall(real, generated, k, compare=compare, block=block)
            np.testing.assert_allclose(found, spread, rtol=1e-12)
            found = neighbours.density_coverage(real, generated, k, compare=compare, block=block)
            np.testing.assert_allclose(found, dense, rtol=1e-12)


def test_the_comparison_matters_where_distances_are_equal():
    """Corners of a square and its middle: every ball's edge goes through points."""
    square = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    closed, opened = (
        neighbours.precision_recall(square, square + np.float32([1, 0]), 1, compare=compare)
        for compare in COMPARISONS.values()
    )
    assert closed == (1, 1) and opened == (0.5, 0.5)


def test_copies_are_others():
    """Of five copies each has four at a distance of exactly 0; a point alone is not its own."""
    features_ND = np.random.default_rng(3).standard_normal((40, 7)).astype(np.float32)
    features_ND[:5] = features_ND[0]
    assert np.all(neighbours.radii(features_ND, 4)[:5] == 0)
    assert np.all(neighbours.radii(features_ND, 5) > 0)
    assert np.all(neighbours.radii(features_ND, 1)[5:] > 0)
    # a copy of the other set is on the ball of radius 0 and not in it
    for compare, held in ((np.less_equal, 1), (np.less, 0)):
        balls_N, _ = neighbours.inside(features_ND[:1], features_ND[:1], np.zeros(1), compare)
        assert balls_N.tolist() == [held]


def test_copies_cost_nothing(monkeypatch):
    """Half of a set is one point: 90,000 pairs that float32 leaves open, and few distances."""
    features_ND = np.random.default_rng(8).standard_normal((600, 12)).astype(np.float32)
    features_ND[:300] = features_ND[0]
    own_NN = distances(features_ND, features_ND)
    np.fill_diagonal(own_NN, np.inf)
    taken, exact = [], neighbours._distance
    monkeypatch.setattr(neighbours, "_distance", lambda x, y: taken.append(len(x)) or exact(x, y))
    radius_N = neighbours.radii(features_ND, 2)
    assert sum(taken) < 10 * len(features_ND)
    np.testing.assert_allclose(radius_N, np.sort(own_NN, axis=1)[:, 1], rtol=1e-12, atol=0)


def test_rows_of_one_code_are_not_copies_for_that(monkeypatch):
    features_ND = np.random.default_rng(9).standard_normal((50, 4)).astype(np.float32)
    expected_N = neighbours.radii(features_ND, 3)

    class Zeros:
        def integers(self, low, high, size, dtype):
            return np.zeros(size, dtype)

    monkeypatch.setattr(neighbours.np.random, "default_rng", lambda seed: Zeros())
    np.testing.assert_array_equal(neighbours.radii(features_ND, 3), expected_N)


def test_tight_cluster_in_a_wide_cloud():
    """Precise and of little recall; the other way round the other way round, exactly."""
    draws = np.random.default_rng(4)
    cloud_ND = draws.standard_normal((300, 8)).astype(np.float32)
    cluster_ND = (0.05 * draws.standard_normal((300, 8))).astype(np.float32)
    precision, recall = neighbours.precision_recall(cloud_ND, cluster_ND)
    assert precision > 0.95 and recall < 0.05
    assert neighbours.precision_recall(cluster_ND, cloud_ND) == (recall, precision)
    density, coverage = neighbours.density_coverage(cloud_ND, cluster_ND)
    assert density > 1 and coverage < 0.5


@pytest.mark.parametrize("k", [2, 3, 5])
def test_density_and_coverage_of_one_distribution(k):
    draws = np.random.default_rng(5)
    real, generated = draws.standard_normal((2, 4000, 4)).astype(np.float32)
    density, coverage = neighbours.density_coverage(real, generated, k)
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(1 - 0.5**k, abs=0.01)


def test_precision_falls_with_the_dimension():
    """Two samples of a normal are not alike to it: 0.98 in 2 dimensions, 0.60 in 64."""
    for width, expected in ((2, 0.98), (64, 0.60)):
        real, generated = np.random.default_rng(6).standard_normal((2, 3000, width), np.float32)
        found = neighbours.precision_recall(real, generated)
        np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize("measure", [neighbours.cosine, neighbours.absolute_cosine])
def test_directions(measure):
    draws = np.random.default_rng(7)
    x_ND = draws.standard_normal((30, 6)).astype(np.float32)
    y_MD = draws.standard_normal((50, 6)).astype(np.float32)
    y_MD[40], y_MD[45] = 4 * x_ND[0], -8 * x_ND[1]
    y_MD[10:16] = 2 * x_ND[2:3] + 3e-4 * y_MD[10:16]  # nearer to each other than float32 can tell
    x, y = (set_ND.astype(np.float64) for set_ND in (x_ND, y_MD))
    cos_NM = x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)[None]
    if measure is neighbours.absolute_cosine:
        cos_NM = np.abs(cos_NM)
    index_NK, distance_NK = ranked(1 - cos_NM, 3)
    for block in (9, 4096):
        found_NK, found = neighbours.nearest(x_ND, y_MD, 3, measure=measure, block=block)
        np.testing.assert_array_equal(found_NK, index_NK)
        np.testing.assert_allclose(found, distance_NK, atol=1e-14)
    assert found[0, 0] == 0 and (found[1, 0] == 0) == (measure is neighbours.absolute_cosine)


def test_the_published_evaluator(shared):
    case = np.load(shared / "parity" / "metrics" / "case.npz")
    real, generated = case["ref_features"], case["gen_features"]
    radius_N = neighbours.radii(real, 3)
    np.testing.assert_allclose(radius_N**2, case["ref_radii_k3"], atol=1e-4 * max(radius_N**2))
    for k in (3, 5):
        expected = case[f"precision_k{k}"], case[f"recall_k{k}"]
        found = neighbours.precision_recall(real, generated, k)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_cannot_be_measured_is_refused():
    points = np.ones((4, 3), np.float32)
    with pytest.raises(interfaces.UserError, match="found 3"):
        neighbours.radii(points, 4)
    assert neighbours.radii(points, 3).tolist() == [0] * 4
    with pytest.raises(interfaces.UserError, match="found 3 and 2"):
        neighbours.nearest(points, points[:, :2])
    with pytest.raises(interfaces.UserError, match=r"\(4,\)"):
        neighbours.nearest(points[:, 0], points)
    for bad in (np.nan, np.inf, 1e18):
        broken = points.copy()
        broken[2, 1] = bad
        with pytest.raises(interfaces.UserError, match="row 2"):
            neighbours.nearest(points, broken)
