"""Inception Score against loops, its bounds, and the two published ways to take parts."""

import numpy as np
import pytest
import scipy.special

from tokgen.interfaces import UserError
from tokgen.metrics import inception_score


@pytest.fixture
def random():
    return np.random.default_rng(5)


def whole(count):
    return [np.arange(count)]


def loop(logits):
    """The definition, image by image and class by class."""
    shares = scipy.special.softmax(logits.astype(np.float64), axis=1)
    mean = shares.mean(0)
    total = 0.0
    for row in shares:
        total += sum(p * (np.log(p) - np.log(q)) for p, q in zip(row, mean, strict=True))
    return np.exp(total / len(shares))


def test_against_loops(random, monkeypatch):
    """Whatever is taken at a time; and shares are a softmax."""
    logits = random.standard_normal((50, 7)).astype(np.float32) * 3
    for rows in (4096, 8):
        monkeypatch.setattr(inception_score, "ROWS", rows)
        parts = [np.arange(20), np.array([49, 3, 30, 21])]
        found = inception_score.score(logits, parts)
        wanted = [loop(logits[rows]) for rows in parts]
        np.testing.assert_allclose(found.values, wanted, rtol=1e-12)
        assert found.mean == pytest.approx(np.mean(wanted))
        assert found.std == pytest.approx(abs(wanted[0] - wanted[1]) / 2)
    wanted = scipy.special.softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(inception_score.shares(logits), wanted, rtol=1e-12)


def test_bounds(random):
    """One p for all images: 1. K classes alike and sure: K, though probabilities vanish."""
    same = np.repeat(random.standard_normal((1, 30)), 40, 0)
    assert inception_score.score(same, whole(40)).mean == pytest.approx(1, abs=1e-12)
    for height in (800.0, 1e6):  # exp(-800) is 0 in float64
        sure = height * np.tile(np.eye(12), (5, 1)).astype(np.float32)
        assert inception_score.score(sure, whole(60)).mean == pytest.approx(12, rel=1e-12)
        # the last classes never occur: 0 log 0 is 0 in the mean, too
        few = sure[np.tile(np.arange(12), 5) < 9]
        assert inception_score.score(few, whole(45)).mean == pytest.approx(9, rel=1e-12)
    logits = 10 * random.standard_normal((500, 30))
    assert 1 < inception_score.score(logits, whole(500)).mean < 30


def test_parts_cover_all_images_once():
    parts = inception_score.consecutive(23, 10)
    assert [len(rows) for rows in parts] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(23))
    parts = inception_score.shuffled(23, 4, seed=1)
    assert [len(rows) for rows in parts] == [5, 6, 6, 6]  # n * 23 // 4: 0, 5, 11, 17, 23
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(23))
    assert not np.array_equal(parts[0], inception_score.shuffled(23, 4, seed=2)[0])
    # torch-fidelity's order, of numpy's older generator with its seed
    order = np.random.RandomState(2020).permutation(1000)
    np.testing.assert_array_equal(np.concatenate(inception_score.shuffled(1000)), order)


def test_sorted_samples_score_low_in_consecutive_parts_only(random):
    """And without parts order means nothing."""
    label = np.repeat(np.arange(40), 25)
    logits = 8 * np.eye(40)[label] + random.standard_normal((1000, 40))
    mixed = random.permutation(logits)
    sizes = inception_score.consecutive(1000, 250)
    assert inception_score.score(mixed, sizes).mean > 2 * inception_score.score(logits, sizes).mean
    found = [
        inception_score.score(x, inception_score.shuffled(1000, 4)).mean for x in (logits, mixed)
    ]
    assert found[0] == pytest.approx(found[1], rel=0.05)
    alone = [inception_score.score(x, whole(1000)).mean for x in (logits, mixed)]
    assert alone[0] == pytest.approx(alone[1], rel=1e-12)


def in_one_part(logits):
    return inception_score.score(logits, whole(len(logits))).mean


def test_infinity_is_nearer_to_the_truth(random):
    """The score of few images is too low by c / n; the line takes that away."""
    centres = 4 * np.eye(60)

    def drawn(count):
        return centres[random.integers(0, 60, count)] + random.standard_normal((count, 60))

    truth = inception_score.score(drawn(30_000), whole(30_000)).mean
    gaps, slopes = [], []
    for seed in range(4):
        logits = drawn(1000)
        line = inception_score.infinity(logits, seed=seed, smallest=100)
        gaps.append((line.value - truth, line.values[0] - truth))
        slopes.append(line.slope)
        assert 0 < line.error < 0.1 * truth and len(line.values) == 15
        assert line.values[-1] == pytest.approx(in_one_part(logits), rel=1e-9)
    near, far = np.abs(np.mean(gaps, 0))
    assert np.mean(slopes) < 0 and near < far / 4


def test_what_cannot_be_scored_is_refused(random):
    logits = random.standard_normal((10, 3))
    with pytest.raises(UserError, match="at least one image; found 10 images in 11 parts"):
        inception_score.score(logits, inception_score.shuffled(10, 11))
    logits[7, 1] = np.nan
    with pytest.raises(UserError, match="row 7 is not"):
        inception_score.score(logits, whole(10))
    with pytest.raises(UserError, match=r"\[images, classes\]; found shape \(10,\)"):
        inception_score.shares(logits[:, 0])
