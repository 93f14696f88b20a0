"""Resize matrices against published check values and loops written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tokgen.nn import resample

KERNELS = [
    resample.area,
    resample.bicubic_pil,
    resample.bicubic_torch,
    resample.linear_antialias,
    resample.linear_tf1,
    resample.linear_torch,
    resample.nearest,
]
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=[k.__name__ for k in KERNELS])


def test_published_values_of_the_cubic():
    np.testing.assert_allclose(
        resample.bicubic_torch(2, 4),
        [
            [1.105469, -0.105469],
            [0.773438, 0.226562],
            [0.226562, 0.773438],
            [-0.105469, 1.105469],
        ],
        atol=1e-6,
    )
    np.testing.assert_allclose(
        resample.bicubic_torch(4, 16)[:4],
        [
            [1.109863, -0.109863, 0, 0],
            [1.071777, -0.071777, 0, 0],
            [0.895508, 0.114746, -0.010254, 0],
            [0.639648, 0.426270, -0.065918, 0],
        ],
        atol=1e-6,
    )
    np.testing.assert_array_equal(resample.bicubic_torch(1, 7), np.ones((7, 1)))


def test_published_bins_of_the_area():
    bins = [np.flatnonzero(row).tolist() for row in resample.area(16, 5)]
    assert bins == [list(range(first, first + 4)) for first in (0, 3, 6, 9, 12)]
    assert set(resample.area(16, 5).ravel()) == {0, 0.25}
    bins = [np.flatnonzero(row).tolist() for row in resample.area(16, 13)]
    assert bins[:4] == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert set(resample.area(16, 13)[:4].ravel()) == {0, 0.5}


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 16), (16, 7), (5, 5), (1, 3), (3, 1)])
def test_the_cubic_is_a_sum_over_four_taps(inputs, outputs):
    """Also where it shrinks: no smoothing, as in PyTorch."""
    samples = np.random.default_rng(0).normal(size=inputs)

    def weight(x):
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3

    expected = []
    for i in range(outputs):
        source = (i + 0.5) * inputs / outputs - 0.5
        base = int(np.floor(source))
        t = source - base
        taps = [samples[np.clip(base + k, 0, inputs - 1)] for k in (-1, 0, 1, 2)]
        expected.append(sum(s * weight(t - k) for s, k in zip(taps, (-1, 0, 1, 2), strict=True)))
    found = resample.bicubic_torch(inputs, outputs) @ samples
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(256, 224), (8, 3), (5, 12), (6, 6)])
def test_the_triangle_is_jax_own(inputs, outputs):
    identity = jnp.eye(inputs)
    expected = jax.image.resize(identity, (outputs, inputs), "linear", antialias=True)
    # which works its centres out in float32
    np.testing.assert_allclose(resample.linear_antialias(inputs, outputs), expected, atol=3e-5)


def test_published_values_of_the_two_linear_forms():
    """TensorFlow 1 repeats the last sample; half-pixel centres repeat both ends."""
    tf1 = [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]
    np.testing.assert_array_equal(resample.linear_tf1(2, 4), tf1)
    half = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_array_equal(resample.linear_torch(2, 4), half)
    # shrinking takes two samples, whatever lies between
    np.testing.assert_array_equal(resample.linear_tf1(6, 2), np.eye(6)[[0, 3]])
    np.testing.assert_array_equal(resample.linear_torch(6, 2), np.eye(6)[[1, 4]])
    np.testing.assert_array_equal(resample.linear_torch(4, 1), [[0, 0.5, 0.5, 0]])


@pytest.mark.parametrize(("inputs", "outputs"), [(33, 299), (512, 299), (5, 3), (1, 4)])
def test_linear_forms_by_their_definitions(inputs, outputs):
    samples = np.random.default_rng(1).normal(size=inputs)
    for kernel, offset in ((resample.linear_tf1, 0.0), (resample.linear_torch, 0.5)):
        places = [(i + offset) * inputs / outputs - offset for i in range(outputs)]
        # numpy holds its ends beyond them, as both forms do
        expected = np.interp(places, np.arange(inputs), samples)
        np.testing.assert_allclose(kernel(inputs, outputs) @ samples, expected, atol=1e-6)
    if inputs > 1:
        expected = jax.image.resize(jnp.eye(inputs), (outputs, inputs), "linear", antialias=False)
        found = resample.linear_torch(inputs, outputs)
        # which works its centres out in float32
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_nearest_takes_the_sample_below():
    samples = np.arange(6)
    np.testing.assert_array_equal(resample.nearest(6, 12) @ samples, np.repeat(samples, 2))
    np.testing.assert_array_equal(resample.nearest(6, 4) @ samples, [0, 1, 3, 4])


@kernels
@pytest.mark.parametrize(("inputs", "outputs"), [(9, 4), (4, 9), (6, 6), (16, 13), (13, 16)])
def test_constants_stay_and_equal_sizes_change_nothing(kernel, inputs, outputs):
    matrix = kernel(inputs, outputs)
    assert matrix.shape == (outputs, inputs) and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix.sum(-1), 1, atol=1e-6)
    if inputs == outputs:
        np.testing.assert_array_equal(matrix, np.eye(inputs))


@kernels
def test_rows_and_columns_are_resized_apart(kernel, key):
    x_BHWC = jax.random.normal(key, (2, 4, 6, 3))
    found = resample.resize(x_BHWC, (7, 5), kernel)
    rows, columns = kernel(4, 7).astype(np.float64), kernel(6, 5).astype(np.float64)
    expected = np.zeros((2, 7, 5, 3))
    for b in range(2):
        for c in range(3):
            expected[b, :, :, c] = rows @ np.asarray(x_BHWC[b, :, :, c], np.float64) @ columns.T
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert resample.resize(x_BHWC.astype(jnp.bfloat16), (7, 5), kernel).dtype == jnp.float32
    # an axis that stays is not touched at all
    np.testing.assert_array_equal(resample.resize(x_BHWC, (4, 6), kernel), x_BHWC)


@pytest.mark.parametrize(("inputs", "outputs"), [(256, 224), (33, 98), (61, 9), (100, 7)])
def test_the_matrix_of_pil_is_what_it_does_to_floats(inputs, outputs):
    image = np.random.default_rng(3).normal(size=(4, inputs)).astype(np.float32)
    expected = Image.fromarray(image).resize((outputs, 4), Image.Resampling.BICUBIC)
    found = image.astype(np.float64) @ resample.bicubic_pil(inputs, outputs).T
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(256, 256, (32, 32)), (33, 47, (40, 56)), (90, 40, (32, 32)), (40, 200, (40, 16))],
)
def test_bytes_are_those_of_pil(height, width, size):
    """Columns first: written as two resizes, because Pillow 13 takes rows first of (90, 40)."""
    images = np.random.default_rng(4).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    images[1] = np.where(images[1] > 127, 255, 0)  # where sums leave the range of a byte
    found = resample.resize_pil(jnp.asarray(images), size)
    cubic, expected = Image.Resampling.BICUBIC, []
    for image in map(Image.fromarray, images):
        columns = image.resize((size[1], height), cubic)
        expected.append(np.asarray(columns.resize(size[::-1], cubic)))
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, np.stack(expected))
