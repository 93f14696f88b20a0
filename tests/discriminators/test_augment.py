import jax
import jax.numpy as jnp
import numpy as np

from tokgen import rng
from tokgen.discriminators import augment


def _image(*shape):
    return jnp.asarray(np.random.default_rng(0).uniform(0.2, 1, shape).astype(np.float32))


def test_colours_change_by_their_published_ranges(key):
    """Each factor is read back from the result: they are three affine maps, one after another."""
    image = _image(400, 2, 2, 3)
    found = np.asarray(augment.colored(image, key), np.float64)
    image = np.asarray(image, np.float64)
    brightness = found.mean((1, 2, 3)) - image.mean((1, 2, 3))
    gray, before = found.mean(3), image.mean(3)
    contrast = np.ptp(gray, (1, 2)) / np.ptp(before, (1, 2))
    chroma = np.ptp(found[:, 0, 0] - gray[:, :1, 0], 1) / np.ptp(image[:, 0, 0], 1)
    saturation = chroma / contrast
    for values, low, high in ((brightness, -0.5, 0.5), (contrast, 0.5, 1.5), (saturation, 0, 2)):
        assert low - 1e-3 <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high + 1e-3
        assert abs(values.mean() - (low + high) / 2) < 0.06 * (high - low)
    draws = np.corrcoef([brightness, contrast, saturation])
    assert np.abs(draws - np.eye(3)).max() < 0.2


def test_translation_moves_whole_images_and_fills_with_zero(key):
    image = _image(60, 16, 8, 2)
    moved = np.asarray(augment.translated(image, key, 0.125))
    shifts = set()
    for each, original in zip(moved, np.asarray(image), strict=True):
        padded = np.pad(original, ((2, 2), (1, 1), (0, 0)))
        fitting = [
            (i, j)
            for i in range(5)
            for j in range(3)
            if np.array_equal(each, padded[i : i + 16, j : j + 8])
        ]
        assert len(fitting) == 1
        shifts.update(fitting)
    assert len(shifts) == 15  # all of five by three


def test_cutout_hides_a_rectangle(key):
    image = _image(80, 20, 10, 1)
    cut = np.asarray(augment.cut_out(image, key, 0.2))
    hidden = cut[..., 0] == 0
    np.testing.assert_array_equal(np.where(hidden[..., None], 0, image), cut)
    heights, widths = hidden.any(2).sum(1), hidden.any(1).sum(1)
    np.testing.assert_array_equal(hidden.sum((1, 2)), heights * widths)  # rectangles
    assert heights.max() == 4 and heights.min() == 2 and widths.max() == 2 and widths.min() == 1
    assert hidden[:, 0].any() and hidden[:, -1].any()


def test_augmentations_come_in_the_order_that_is_named(key):
    """By hand from the parts; what is drawn for each does not depend on the order."""
    image = _image(4, 8, 8, 3)
    uses = (rng.COLOR, rng.TRANSLATION, rng.CUTOUT)
    color, shift, cut = (rng.use(key, what) for what in uses)
    moved = augment.translated(image, shift, 0.125)
    kinds = ("translation", "color", "cutout")  # VAR's trainer
    expected = augment.cut_out(augment.colored(moved, color), cut, 0.2)
    np.testing.assert_array_equal(augment.augment(image, key, kinds=kinds), expected)
    other = augment.augment(image, key)
    expected = augment.translated(augment.colored(image, color), shift, 0.125)
    np.testing.assert_array_equal(other, augment.cut_out(expected, cut, 0.2))
    # what a translation leaves black a later change of colour lights up
    assert not np.allclose(other, augment.augment(image, key, kinds=kinds))
    np.testing.assert_array_equal(augment.augment(image, key, kinds=("translation",)), moved)


def test_gradients_pass_and_keys_decide(key):
    image = _image(2, 8, 8, 3)
    gradient = jax.grad(lambda image: augment.augment(image, key).sum())(image)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    same, other = augment.augment(image, key), augment.augment(image, jax.random.key(7))
    np.testing.assert_array_equal(same, augment.augment(image, key))
    assert not np.allclose(same, other)
