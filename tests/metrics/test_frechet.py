"""Frechet distances against closed forms, general eigenvalues, and simulated normals."""

import numpy as np
import pytest
import scipy.linalg

from tokgen.interfaces import UserError
from tokgen.metrics import frechet, moments

of = moments.Moments.of


@pytest.fixture
def random():
    return np.random.default_rng(11)


def distance(a, b):
    """Of two sets, by their moments."""
    a, b = of(a), of(b)
    return frechet.distance(a.mean_D, a.covariance_DD, b.mean_D, b.covariance_DD)


def reference(a, b):
    """The definition, with the eigenvalues of the product of the covariances as they come."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(scipy.linalg.eigvals(first @ second).astype(complex)).real.sum()
    step = a.mean(0) - b.mean(0)
    return step @ step + np.trace(first) + np.trace(second) - 2 * root


def relu(random, count, width, mixing):
    return np.maximum(random.standard_normal((count, width)) @ mixing + 0.2, 0)


def pair(random, count, width, other=None):
    mixing = random.standard_normal((width, width)) / np.sqrt(width)
    turned = mixing + 0.3 * random.standard_normal((width, width)) / np.sqrt(width)
    return relu(random, count, width, mixing), relu(random, other or count, width, turned)


def population(mean_D, covariance_DD):
    """A reference that is known exactly."""
    return moments.Moments.from_covariance(mean_D, covariance_DD, 10**12)


def sample(random, count, root_DD):
    """Moments of `count` normal rows with covariance root root^T, by Bartlett's decomposition."""
    width = len(root_DD)
    lower = np.tril(random.standard_normal((width, width)), -1)
    lower += np.diag(np.sqrt(random.chisquare(count - 1 - np.arange(width))))
    half = root_DD @ lower
    mean = root_DD @ random.standard_normal(width) / np.sqrt(count)
    return moments.Moments(count, count, mean, half @ half.T)


# ---------------------------------------------------------------- the distance


def test_diagonal_normals(random):
    mean_a, mean_b = random.standard_normal((2, 50))
    s_a, s_b = random.random((2, 50)) * 10.0 ** random.integers(-4, 2, (2, 50))
    wanted = np.sum((mean_a - mean_b) ** 2) + np.sum((s_a - s_b) ** 2)
    found = frechet.distance(mean_a, np.diag(s_a**2), mean_b, np.diag(s_b**2))
    assert found == pytest.approx(wanted, rel=1e-9)


def test_covariances_that_share_no_axes(random):
    """Of one normal and its image under a symmetric map x -> T x, the distance is E|x - T x|^2."""
    root = random.standard_normal((20, 20))
    covariance = root @ root.T
    turn = np.linalg.qr(random.standard_normal((20, 20)))[0]
    map_ = turn @ np.diag(random.random(20) * 3) @ turn.T
    rest = np.eye(20) - map_
    zero = np.zeros(20)
    found = frechet.distance(zero, covariance, zero, map_ @ covariance @ map_)
    assert found == pytest.approx(np.trace(rest @ covariance @ rest), rel=1e-10)


@pytest.mark.parametrize("count", [300, 40])  # of 64 features: full rank, and not
def test_general_eigenvalues_give_the_same(random, count):
    a, b = pair(random, count, 64)
    assert distance(a, b) == pytest.approx(reference(a, b), rel=1e-6)
    assert frechet.from_features(a, b) == pytest.approx(reference(a, b), rel=1e-6)
    a, b = a, b[:30]
    assert distance(a, b) == pytest.approx(reference(a, b), rel=1e-6)


def test_rows_as_roots_agree_with_covariances(random):
    """Also for unlike sizes, features that are always 0, and two that are the same."""
    for count, other in ((30, 500), (30, 40), (63, 64), (64, 65), (500, 500)):
        a, b = pair(random, count, 64, other)
        for rows in (a, b):
            rows[:, 3], rows[:, 5] = 0, rows[:, 6]
        assert distance(a, b) == pytest.approx(frechet.from_features(a, b), rel=1e-10)
    single = a[:2]  # rank one: sqrt of a product of rank one is its own trace
    d = single[0] - single[1]
    covariance = np.cov(b, rowvar=False)
    wanted = np.sum((single.mean(0) - b.mean(0)) ** 2) + d @ d / 2 + np.trace(covariance)
    wanted -= 2 * np.sqrt(d @ covariance @ d / 2)
    assert frechet.from_features(single, b) == pytest.approx(wanted, rel=1e-10)
    assert distance(single, b) == pytest.approx(wanted, rel=1e-10)


def test_small_directions_keep_their_digits():
    """Standard deviations over eight decades; their squares' products span 32."""
    s = 10.0 ** -np.arange(9)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 9)))[0]
    big, small = np.diag(s**2), np.diag((s[::-1]) ** 2)
    wanted = np.sum((s - s[::-1]) ** 2)
    zero = np.zeros(9)
    turned = (turn @ cov @ turn.T for cov in (big, small))
    a, b = turned
    assert frechet.distance(zero, a, zero, b) == pytest.approx(wanted, rel=1e-8)


def test_a_set_with_itself_is_nought(random):
    for count in (400, 20):
        a, _ = pair(random, count, 64)
        assert 0 <= distance(a, a) < 1e-6 and 0 <= frechet.from_features(a, a) < 1e-6


def test_shift_scale_rotation_order_and_swap(random):
    a, b = pair(random, 200, 24)
    c = random.standard_normal((1, 24))
    turn = np.linalg.qr(random.standard_normal((24, 24)))[0]
    whole = distance(a, b)
    assert distance(a, a + c) == pytest.approx(np.sum(c**2), rel=1e-9)
    centred = a - a.mean(0) + b.mean(0)
    assert distance(centred + c, b) == pytest.approx(distance(centred, b) + np.sum(c**2), rel=1e-9)
    assert distance(-3.5 * a, -3.5 * b) == pytest.approx(3.5**2 * whole, rel=1e-9)
    assert distance(a @ turn, b @ turn) == pytest.approx(whole, rel=1e-9)
    assert distance(random.permutation(a), b) == pytest.approx(whole, rel=1e-9)
    assert distance(b, a) == pytest.approx(whole, rel=1e-9)


def test_float32_covariances_of_low_rank(random):
    """What others summed in float32 has small negative eigenvalues, which are rounding."""
    a, b = pair(random, 40, 64)
    wanted = frechet.from_features(a, b)
    a, b = of(a), of(b)
    covariances = [x.covariance_DD.astype(np.float32) for x in (a, b)]
    found = frechet.distance(a.mean_D, covariances[0], b.mean_D, covariances[1])
    assert found == pytest.approx(wanted, rel=1e-6)


def test_what_is_no_normal_is_refused(random):
    a, b = (of(x) for x in pair(random, 50, 6))
    wrong = np.diag([1.0, 1, 1, 1, 1, -0.2])
    with pytest.raises(UserError, match="no negative eigenvalues; this one's are from -0.2 to 1"):
        frechet.distance(a.mean_D, wrong, b.mean_D, b.covariance_DD)
    with pytest.raises(UserError, match=r"need.* a covariance \(D, D\); found \(6,\) and \(5, 6\)"):
        frechet.distance(a.mean_D, a.covariance_DD[1:], b.mean_D, b.covariance_DD)
    with pytest.raises(UserError, match="must be finite"):
        frechet.distance(a.mean_D * np.nan, a.covariance_DD, b.mean_D, b.covariance_DD)
    with pytest.raises(UserError, match="the same features; found 6 and 4"):
        frechet.between(a, b.project(np.eye(6)[:, :4]))
    few = of(random.standard_normal((6, 6)))
    with pytest.raises(UserError, match="at least 7 images.*found 6 generated ones"):
        frechet.between(few, b)
    with pytest.raises(UserError, match="at least 51 images.*found 50 reference ones"):
        frechet.between(of(random.standard_normal((60, 6))), b, least=51)
    assert frechet.between(few, b, least=6).value == frechet.against(b)(few)


def test_a_distance_below_nought_is_rounding_or_an_error(random, monkeypatch):
    a = of(random.standard_normal((50, 6)))
    root = frechet._root
    for excess, value in ((1e-3, None), (1e-5, 0.0)):
        monkeypatch.setattr(frechet, "_root", lambda c, excess=excess: root(c) * (1 + excess))
        if value is None:
            with pytest.raises(UserError, match="is not negative; found -0.0"):
                frechet.against(a)(a)
        else:
            assert frechet.against(a)(a) == value


# ---------------------------------------------------------------- few images


def test_the_closed_bias():
    assert frechet.bias(64, 10_000) == pytest.approx(0.1104, abs=1e-4)
    assert 2 * frechet.bias(64, 2000) == pytest.approx(1.104, abs=1e-3)


@pytest.mark.parametrize("count", [2000, 10_000])
def test_bias_of_standard_normals(random, count):
    """Against the exact distribution, and between two samples: twice that; 3 %."""
    eye, exact = np.eye(64), population(np.zeros(64), np.eye(64))
    pairs = [(sample(random, count, eye), sample(random, count, eye)) for _ in range(30)]
    one = np.mean([frechet.between(a, exact).value for a, _ in pairs])
    assert one == pytest.approx(frechet.bias(64, count), rel=0.03)
    both = [frechet.between(a, b) for a, b in pairs]
    assert np.mean([found.value for found in both]) == pytest.approx(2 * one, rel=0.03)
    # estimated from the samples themselves
    assert both[0].bias == pytest.approx(frechet.bias(64, count), rel=0.03)
    assert both[0].reference_bias == pytest.approx(frechet.bias(64, count), rel=0.03)


def test_the_simulated_sample_is_that_of_rows(random):
    """What the simulations above and below draw is what rows of normals would give."""
    exact = population(np.zeros(64), np.eye(64))
    values = [
        frechet.between(of(random.standard_normal((2000, 64))), exact).value for _ in range(6)
    ]
    assert np.mean(values) == pytest.approx(frechet.bias(64, 2000), rel=0.05)


def test_bias_of_other_spectra(random):
    """Standard deviations over a decade; against their own and against another distribution."""
    s = np.exp(-np.arange(24) / 10)
    turn = np.linalg.qr(random.standard_normal((24, 24)))[0]
    other = turn @ np.diag(s[::-1] ** 2 * 2) @ turn.T
    own, foreign = population(np.zeros(24), np.diag(s**2)), population(np.zeros(24), other)
    for exact, draws in ((own, 200), (foreign, 1500)):
        true = frechet.distance(np.zeros(24), np.diag(s**2), np.zeros(24), exact.covariance_DD)
        found = [frechet.between(sample(random, 1000, np.diag(s)), exact) for _ in range(draws)]
        simulated = np.array([one.value for one in found]) - true
        error = simulated.std() / np.sqrt(draws)
        expected = np.mean([one.bias for one in found[:20]])
        assert abs(simulated.mean() - expected) < 0.03 * expected + 2 * error
        assert error < 0.05 * expected  # or it would show nothing


def test_infinity_of_equal_normals(random):
    rows = random.standard_normal((10_000, 64)).astype(np.float32)
    exact = population(np.zeros(64), np.eye(64))
    found = frechet.infinity(rows, exact, seed=1)
    assert found.sizes[0] == 5000 and found.sizes[-1] == 10_000 and len(found.sizes) == 15
    assert found.values[-1] == pytest.approx(frechet.between(of(rows), exact).value, rel=1e-9)
    assert abs(found.value) < 0.05 and 0 < found.error < 0.05
    assert found.slope == pytest.approx(64 + 64 * 65 / 4, rel=0.15)
    assert found == frechet.infinity(rows, exact, seed=1)
    assert found.values != frechet.infinity(rows, exact, seed=2).values
    with pytest.raises(UserError, match="smallest 5000, and 4999 images"):
        frechet.infinity(rows[:4999], exact, seed=1)


# ---------------------------------------------------------------- by class


def test_classwise_is_the_mean_of_the_classes(random):
    real, made = pair(random, 900, 4)
    label, given = random.integers(0, 3, 900), np.sort(random.integers(0, 3, 900))
    sets = [moments.grouped([(x, k)], 3) for x, k in ((made, given), (real, label))]
    found = frechet.classwise(*sets)
    wanted = [reference(made[given == k], real[label == k]) for k in range(3)]
    np.testing.assert_allclose(found.value_K, wanted, rtol=1e-9)
    assert found.value == pytest.approx(np.mean(wanted)) and found.missing == ()
    shares = [np.bincount(x, minlength=3) / 900 for x in (label, given)]
    assert found.divergence == pytest.approx(np.sum(shares[0] * np.log(shares[0] / shares[1])))
    itself = frechet.classwise(sets[1], sets[1])
    assert itself.value < 1e-6 and itself.divergence == 0


def test_classes_that_are_mixed_up_or_missing_are_found(random):
    """The distance of all images together sees neither."""
    centres = 5 * np.eye(3)
    label = np.repeat([0, 1, 2], 200)
    rows = centres[label] + random.standard_normal((600, 3))
    real = moments.grouped([(rows, label)], 3)
    permuted = frechet.classwise(moments.grouped([(rows, (label + 1) % 3)], 3), real)
    np.testing.assert_allclose(permuted.value_K, 50, rtol=0.1)
    dropped = frechet.classwise(moments.grouped([(rows[:401], label[:401])], 3), real)
    assert dropped.missing == (2,) and np.isinf(dropped.value)
    assert np.isfinite(dropped.value_K[:2]).all()
    assert frechet.classwise(moments.grouped([(rows[:400], label[:400])], 3), real).divergence > 1e9
    with pytest.raises(UserError, match="2 images of every class; it has fewer of 1"):
        frechet.classwise(real[:2], [real[0], moments.empty(3)])
    with pytest.raises(UserError, match="same classes; found 3 and 2"):
        frechet.classwise(real, real[:2])


def test_principal_axes(random):
    rows = random.standard_normal((500, 6)) * np.array([[1, 9, 3, 0.1, 5, 2]])
    axes = frechet.principal(of(rows), 3)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    kept = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:3]
    np.testing.assert_allclose(axes @ axes.T, kept.T @ kept, atol=1e-9)
    assert [int(np.abs(a).argmax()) for a in axes.T] == [1, 4, 2]
    with pytest.raises(UserError, match="from 1 to 6; found 7"):
        frechet.principal(of(rows), 7)
    assert [frechet.class_width(n, 2048) for n in (3, 50, 300, 999, 1000)] == [1, 12, 64, 64, 2048]
