"""KID and CMMD against loops over all pairs; their expectations by simulation."""

import numpy as np
import pytest

from tokgen.interfaces import UserError
from tokgen.metrics import kernels


@pytest.fixture
def random():
    return np.random.default_rng(3)


def cubic(x, y):
    return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3


def pairs(xs, ys, kernel):
    """Sums of a kernel over all pairs of two sets, and over pairs of unlike numbers."""
    values = np.array([[kernel(x, y) for y in ys] for x in xs])
    unlike = values[~np.eye(*values.shape, dtype=bool)] if len(xs) == len(ys) else None
    return values, unlike


def unbiased(xs, ys):
    return (
        pairs(xs, xs, cubic)[1].mean()
        + pairs(ys, ys, cubic)[1].mean()
        - 2 * pairs(xs, ys, cubic)[0].mean()
    )


# ---------------------------------------------------------------- KID


def test_one_subset_of_all_images_against_loops(random):
    x = random.standard_normal((12, 5)).astype(np.float32)
    y = (random.standard_normal((12, 5)) + 1).astype(np.float32)
    found = kernels.kid(x, y, seed=0, subsets=3)
    wanted = unbiased(x.astype(np.float64), y.astype(np.float64))
    assert found.value == pytest.approx(wanted, rel=1e-12)
    assert (found.size, found.subsets) == (12, 3)
    assert found.std == pytest.approx(0, abs=1e-12) and found.error > 0


def test_subsets_are_those_of_the_older_generator(random):
    """In torch-fidelity's order: of the first set, then of the second, subset by subset."""
    x, y = random.standard_normal((30, 4)), random.standard_normal((25, 4)) * 1.5
    source, values = np.random.RandomState(2020), []
    for _ in range(4):
        a = x[source.choice(30, 10, replace=False)]
        values.append(unbiased(a, y[source.choice(25, 10, replace=False)]))
    found = kernels.kid(x, y, seed=2020, subsets=4, size=10)
    assert found.value == pytest.approx(np.mean(values), rel=1e-12)
    assert found.std == pytest.approx(np.std(values), rel=1e-12)
    assert found != kernels.kid(x, y, seed=2021, subsets=4, size=10)


def test_one_distribution_is_no_distance(random):
    """Within three standard errors of 0, on either side of it."""
    values = []
    for seed in range(20):
        x, y = random.standard_normal((2, 300, 32))
        found = kernels.kid(x, y, seed=seed, subsets=10, size=100)
        assert abs(found.value) < 3 * found.error
        values.append(found.value)
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("size", [60, 240])  # of 240 images: few subsets, and all of them
def test_the_error_is_that_of_other_images(random, shift, size):
    """Where the sets differ, and where they do not: there the spread falls with 1 / N."""
    draws = [
        kernels.kid(
            random.standard_normal((240, 32)),
            random.standard_normal((240, 32)) + shift,
            seed=seed,
            subsets=240 // size,
            size=size,
        )
        for seed in range(80)
    ]
    spread = np.std([found.value for found in draws])
    assert np.mean([found.error for found in draws]) == pytest.approx(spread, rel=0.3)


def test_few_images_are_refused(random):
    with pytest.raises(UserError, match="3 images or more of each set, and a subset; found 2"):
        kernels.kid(np.ones((9, 3)), np.ones((2, 3)), seed=0)
    for first, second in (((3,), (3, 3)), ((4, 3), (4, 2)), ((0, 3), (4, 3))):
        with pytest.raises(UserError, match="need features"):
            kernels.kid(np.ones(first), np.ones(second), seed=0)
    bad = np.ones((5, 3))
    bad[4, 0] = np.inf
    with pytest.raises(UserError, match="row 4 of the second set is not"):
        kernels.cmmd(np.ones((5, 3)), bad)


# ---------------------------------------------------------------- CMMD


def gaussian(sigma):
    return lambda x, y: np.exp(-np.sum((x - y) ** 2) / (2 * sigma**2))


@pytest.mark.parametrize("sigma", [10.0, 0.7])
@pytest.mark.parametrize("rows", [2048, 7])
def test_against_loops_whatever_the_blocks(random, monkeypatch, sigma, rows):
    monkeypatch.setattr(kernels, "ROWS", rows)
    x = kernels.unit(random.standard_normal((23, 6)))
    y = kernels.unit(random.standard_normal((17, 6)) + 0.5)
    kernel = gaussian(sigma)
    within = pairs(x, x, kernel)[0].mean() + pairs(y, y, kernel)[0].mean()
    wanted = 1000 * (within - 2 * pairs(x, y, kernel)[0].mean())
    assert kernels.cmmd(x, y, sigma) == pytest.approx(wanted, rel=1e-9)
    assert kernels.cmmd(x, y) == kernels.cmmd(x, y, 10.0)


def test_symmetric_and_nought_of_itself(random):
    """Also far from the origin, where |x|^2 + |y|^2 - 2 x.y would lose everything."""
    x, y = random.standard_normal((40, 6)), random.standard_normal((30, 6))
    for offset in (0.0, 1e5):
        a, b = x + offset, y + offset
        assert abs(kernels.cmmd(a, a)) < 1e-6
        assert kernels.cmmd(a, b) == pytest.approx(kernels.cmmd(b, a), rel=1e-9)
        assert kernels.cmmd(a, b) == pytest.approx(kernels.cmmd(x, y), rel=1e-6)
    assert abs(kernels.cmmd(random.permutation(x), x)) < 1e-6


def test_the_offset_of_small_sets(random):
    """Two samples of one distribution: about (1/m + 1/n)(1 - mean k), times 1000."""
    drawn = [kernels.unit(random.standard_normal((50, 8))) for _ in range(80)]
    found = [kernels.cmmd(a, b) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
    far = 1 - np.exp(-2 / 200)  # of two directions at random: |x - y|^2 is 2 on average
    assert np.mean(found) == pytest.approx(1000 * 2 / 50 * far, rel=0.1)


def test_rows_of_length_one(random):
    rows = random.standard_normal((9, 4)).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(kernels.unit(rows), axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(kernels.unit(3 * rows), kernels.unit(rows), rtol=1e-6)
    rows[5] = 0
    with pytest.raises(UserError, match="length 0 have no direction; row 5 has"):
        kernels.unit(rows)
