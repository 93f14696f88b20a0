"""Shapes are a function of (seed, split, index), inside the frame, and distinct."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest

from tokgen import interfaces
from tokgen.data import shapes

# White on black, and nothing else free: what is lit is the shape.
PLAIN = dataclasses.replace(
    shapes.EASY, rotation=0.0, colours=((1.0,) * 3, (0.0,) * 3), jitter=0.0, radius=(12.0, 12.0)
)


def silhouettes(freedom, count, size=(32, 32), split="train"):
    """float [count, rows, columns] in [0, 1]: how much of a pixel the shape covers."""
    source = shapes.Source(size, form=freedom, count=count, split=split)
    image_BHW = source.batch(range(count))[..., 0] / 255
    # The corner of the image is background for every shape and place.
    return np.where(image_BHW[:, :1, :1] > 0.5, 1 - image_BHW, image_BHW)


@pytest.mark.parametrize("form", shapes.FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_does_not_depend_on_its_batch(form, channels):
    source = shapes.Source((32, 48), channels, form=form, count=600)
    everything = source.batch(range(600))
    assert everything.shape == (600, 32, 48, channels) and everything.dtype == np.uint8
    some = np.random.default_rng(0).permutation(600)[:300]
    np.testing.assert_array_equal(source.batch(some), everything[some])
    record = source[int(some[0])]
    np.testing.assert_array_equal(record["image"], everything[some[0]])
    assert record["label"] == some[0] % 10
    assert source[-1]["label"] == 599 % 10


def test_seeds_splits_and_indices_differ_and_reruns_do_not():
    one = shapes.Source(seed=1, count=200)
    same = shapes.Source(seed=1, count=200).batch(range(200))
    np.testing.assert_array_equal(one.batch(range(200)), same)
    others = [
        shapes.Source(seed=2, count=200),
        shapes.Source(seed=1, count=200, split="held_out"),
    ]
    seen = np.concatenate([same] + [other.batch(range(200)) for other in others])
    assert len({image.tobytes() for image in seen}) == 600
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 3


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (64, 64), (16, 40)])
@pytest.mark.parametrize("freedom", [shapes.EASY, shapes.PALETTED])
def test_shapes_stay_inside_the_frame(freedom, size):
    bare = dataclasses.replace(freedom, colours=PLAIN.colours, jitter=0.0)
    lit = silhouettes(bare, 500, size)
    border = np.concatenate([lit[:, 0], lit[:, -1], lit[:, :, 0], lit[:, :, -1]], axis=1)
    assert border.max() == 0
    assert (lit.mean(axis=(1, 2)) * size[0] * size[1] / min(size) ** 2).min() > 0.03


def test_shapes_are_drawn_as_large_as_geometry_says():
    """Anti-aliased areas against closed forms, radius 12."""
    area = silhouettes(PLAIN, 100).sum(axis=(1, 2)).reshape(10, 10).mean(axis=0) / 144
    expected = {
        "disc": np.pi,
        "ring": np.pi * (1 - 0.52**2),
        "square": 1.4**2,
        "frame": 1.4**2 - 0.72**2,
        "triangle": 3 * 3**0.5 / 4,
        "bar": 1.9 * 0.56,
        "pair": 2 * np.pi * 0.43**2,
        "corner": 1.4**2 - 0.88**2,
        "equals": 2 * 1.48 * 0.4,
    }
    for name, value in expected.items():
        assert area[shapes.CLASSES.index(name)] == pytest.approx(value, rel=0.02), name


def test_edges_are_soft():
    lit = silhouettes(shapes.EASY, 10)
    disc = silhouettes(PLAIN, 1)[0]
    between = (disc > 0.05) & (disc < 0.95)
    assert 40 < between.sum() < 110  # about the 75 pixels of the circumference
    assert lit.shape == (10, 32, 32)


def test_classes_stay_distinct_under_rotation():
    """Radial profiles, which no rotation changes, tell the classes apart."""
    free = dataclasses.replace(PLAIN, rotation=180.0)
    lit = silhouettes(free, 400)
    rows, columns = np.mgrid[:32, :32] + 0.5
    profiles = []
    for image in lit:
        mass = image.sum()
        row, column = (image * rows).sum() / mass, (image * columns).sum() / mass
        radius = np.hypot(rows - row, columns - column)
        profile = np.histogram(radius, bins=10, range=(0, 15), weights=image)[0]
        profiles.append(profile)
    profiles = np.array(profiles).reshape(40, 10, 10)
    means = profiles[:20].mean(axis=0)
    distance = ((profiles[20:, :, None] - means[None, None]) ** 2).sum(axis=-1)
    right = (distance.argmin(axis=-1) == np.arange(10)).mean(axis=0)
    assert right.min() >= 0.95, dict(zip(shapes.CLASSES, right, strict=True))


def test_colours_of_the_palette_are_well_separated():
    for one, other in itertools.combinations(np.array(shapes.PALETTE), 2):
        assert np.linalg.norm(one - other) >= shapes.CONTRAST


def test_hard_foregrounds_stand_out_from_the_whole_gradient():
    source = shapes.Source(form="hard", count=500)
    uniform = shapes._uniform(0, 0, np.arange(500))
    front, near, far = shapes._colours(uniform, source.freedom)
    for share in np.linspace(0, 1, 9)[:, None]:
        back = near + share * (far - near)
        assert np.linalg.norm(front - back, axis=1).min() >= shapes.CONTRAST - 1e-6
    # And the gradient is one: opposite corners of most images differ.
    images = source.batch(range(500)).astype(int)
    assert (np.abs(images[:, 0, 0] - images[:, -1, -1]).max(axis=1) > 30).mean() > 0.5


def test_random_numbers_are_uniform_and_independent():
    uniform = shapes._uniform(3, 0, np.arange(4000))
    assert uniform.min() >= 0 and uniform.max() < 1
    counts = np.stack([np.histogram(u, bins=16, range=(0, 1))[0] for u in uniform.T])
    chi = ((counts - 250) ** 2 / 250).sum(axis=1)  # 15 degrees of freedom, one per column
    assert chi.mean() == pytest.approx(15, abs=4) and chi.max() < 50
    correlation = np.corrcoef(uniform.T) - np.eye(uniform.shape[1])
    assert np.abs(correlation).max() < 0.08


def test_a_source_travels_and_ends():
    source = shapes.Source(count=20)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint == source.fingerprint and len(list(copy)) == 20
    with pytest.raises(IndexError):
        source[20]


@pytest.mark.parametrize(
    "wrong",
    [{"size": (4, 32)}, {"channels": 4}, {"split": "test"}, {"count": 0}, {"form": "simple"}],
)
def test_impossible_requests_are_refused(wrong):
    with pytest.raises(interfaces.UserError):
        shapes.Source(**wrong)
