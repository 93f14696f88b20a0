import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import alexnet as alexnets, vgg


@pytest.fixture(scope="module")
def alexnet():
    rng = np.random.default_rng(0)
    module = nnx.eval_shape(lambda: alexnets.AlexNet(rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.05, leaf.shape), "f4"), module)


def _image(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def test_shapes_of_vgg16():
    trunk = nnx.eval_shape(lambda: vgg.VGG16(rngs=nnx.Rngs(0)))
    maps = nnx.eval_shape(lambda trunk: trunk(np.zeros((1, 33, 48, 3))), trunk)
    shapes = [each.shape[1:] for each in maps]
    assert shapes == [(33, 48, 64), (16, 24, 128), (8, 12, 256), (4, 6, 512), (2, 3, 512)]


def test_shapes_of_alexnet(alexnet):
    shapes = [each.shape[1:] for each in nnx.eval_shape(alexnet, _image(1, 64, 31, 3))]
    assert shapes == [(15, 7, 64), (7, 3, 192), (3, 1, 384), (3, 1, 256), (3, 1, 256)]


def test_a_map_follows_the_written_out_convolution(alexnet):
    """The input's normalisation, the stride and the padding of AlexNet's first map."""
    image = _image(1, 35, 31, 3)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normal = ((image.astype(np.float64) + 1) / 2 - mean) / deviation
    padded = np.pad(normal, ((0, 0), (2, 2), (2, 2), (0, 0)))
    kernel = np.asarray(alexnet.stages[0].kernel[...], np.float64)
    wanted = np.zeros((1, 8, 7, 64))
    for i in range(8):
        for j in range(7):
            window = padded[:, 4 * i : 4 * i + 11, 4 * j : 4 * j + 11]
            wanted[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel)
    wanted += np.asarray(alexnet.stages[0].bias[...])
    np.testing.assert_allclose(alexnet(image)[0], np.maximum(wanted, 0), atol=1e-4)


def test_gray_is_three_equal_channels(alexnet):
    gray = _image(1, 31, 31, 1)
    for seen, wanted in zip(alexnet(gray), alexnet(gray.repeat(3, 3)), strict=True):
        np.testing.assert_array_equal(seen, wanted)


def test_images_too_small_are_refused(alexnet):
    with pytest.raises(
        interfaces.UserError, match=r"at least 31 x 31 pixels, found \(1, 30, 31, 3\)"
    ):
        alexnet(_image(1, 30, 31, 3))
