"""The discriminators of StyleGAN's and VQGAN+'s form, where fixtures do not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, rng
from tokgen.discriminators import blur, stylegan


def _made(make, scale=0.2):
    rng = np.random.default_rng(0)
    module = nnx.eval_shape(make)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), "f4"), module)


def _image(*shape):
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("stages, published", [(3, 1_909_889), (4, 7_431_297)])
def test_the_blur_discriminator_has_as_many_parameters_as_published(stages, published):
    network = nnx.eval_shape(lambda: blur.Discriminator(stages=stages, rngs=rng.rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) == published


def test_published_widths_of_the_stylegan_discriminator():
    """The table of its paper: 512 up to 32 pixels, then halved at each doubling."""
    network = nnx.eval_shape(lambda: stylegan.Discriminator(multiplier=2, rngs=rng.rngs(0)))
    widths = [block.conv_out.kernel.shape[2:] for block in network.blocks]
    assert network.conv_in.kernel.shape == (3, 3, 3, 128)
    assert widths == [(128, 256), (256, 512), (512, 512), (512, 512), (512, 512), (512, 512)]


@pytest.mark.parametrize("form, skips", [("blur", 1), ("average", 1), ("strided", 2)])
def test_the_forms_of_the_stylegan_discriminator(form, skips):
    network = _made(lambda: stylegan.Discriminator(1, 16, (4, 6, 8), form=form, rngs=nnx.Rngs(0)))
    logits = network(_image(3, 16, 16, 1))
    assert logits.shape == (3, 1) and logits.dtype == jnp.float32 and np.ptp(logits) > 0
    # one logit per image, of the image alone
    np.testing.assert_allclose(network(_image(3, 16, 16, 1)[:1]), logits[:1], rtol=1e-5)
    assert len(jax.tree.leaves(nnx.state(network.blocks[0].conv_skip))) == skips


def test_the_flat_map_starts_as_a_linear_layer_would():
    network = stylegan.Discriminator(1, 8, (4, 32), rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))
    limit = np.sqrt(6 / (16 * 32 + 32))  # Xavier, of 16 * 32 inputs and 32 outputs
    found = np.abs(network.conv_flat.kernel[...]).max()
    assert 0.98 * limit < found <= limit


def test_the_blur_discriminator_gives_one_grid_at_any_size():
    network = _made(lambda: blur.Discriminator(1, 8, 2, rngs=nnx.Rngs(0)))
    for size in ((64, 64), (96, 80), (20, 24)):
        logits = jax.eval_shape(type(network).__call__, network, _image(1, *size, 1))
        assert logits.shape == (1, 16, 16, 1)


def test_bfloat16_images_are_judged_in_float32():
    for network, size in (
        (_made(lambda: blur.Discriminator(1, 4, 1, rngs=nnx.Rngs(0))), 32),
        (_made(lambda: stylegan.Discriminator(1, 8, (4, 4), rngs=nnx.Rngs(0))), 8),
    ):
        image = jnp.asarray(_image(1, size, size, 1), jnp.bfloat16)
        assert network(image).dtype == jnp.float32
        np.testing.assert_array_equal(network(image), network(image.astype(jnp.float32)))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda rngs: stylegan.Discriminator(form="blurred", rngs=rngs), "blur, average, strided"),
        (lambda rngs: stylegan.Discriminator(size=48, rngs=rngs), "size=48"),
        (lambda rngs: stylegan.Discriminator(size=4, rngs=rngs), "size=4"),
        (lambda rngs: stylegan.Discriminator(size=16, widths=(4, 4), rngs=rngs), "needs 3 widths"),
        (lambda rngs: blur.Discriminator(down="blur6", rngs=rngs), "blur5, average.*blur6"),
        (lambda rngs: blur.Discriminator(activation="relu", rngs=rngs), "leaky_relu, silu"),
        (lambda rngs: blur.Discriminator(stages=0, rngs=rngs), "stages must be .* from 1"),
    ],
)
def test_wrong_arguments_are_named(make, words):
    with pytest.raises(interfaces.UserError, match=words):
        nnx.eval_shape(lambda: make(rng.rngs(0)))


def test_wrong_images_are_named():
    whole = nnx.eval_shape(lambda: stylegan.Discriminator(3, 16, (4, 4, 4), rngs=rng.rngs(0)))
    with pytest.raises(interfaces.UserError, match=r"\[16, 16, 3\].*\(1, 16, 8, 3\)"):
        whole(_image(1, 16, 8, 3))
    patches = nnx.eval_shape(lambda: blur.Discriminator(3, 4, 3, rngs=rng.rngs(0)))
    with pytest.raises(interfaces.UserError, match=r"at least 8 x 8.*\(1, 7, 8, 3\)"):
        patches(_image(1, 7, 8, 3))
    with pytest.raises(interfaces.UserError, match=r"\[B, H, W, 3\]"):
        patches(_image(1, 8, 8, 1))
