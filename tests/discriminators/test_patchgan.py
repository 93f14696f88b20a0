import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, rng
from tokgen.discriminators import patchgan
from tokgen.pretrained.formats import reader

FIXTURE = Path(__file__).parents[3] / "shared" / "parity" / "disc_patchgan"


def _made(channels=3, width=4, layers=1, norm="batch"):
    """With parameters from numpy: JAX compiles a program for each shape that it draws."""
    rng = np.random.default_rng(0)
    module = nnx.eval_shape(
        lambda: patchgan.Discriminator(channels, width, layers, norm, rngs=nnx.Rngs(0))
    )
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.2, leaf.shape), "f4"), module)


def _image(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def _conv_loops(x_BHWC, conv, stride):
    kernel = np.asarray(conv.kernel[...], np.float64)
    padded = np.pad(x_BHWC.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = ((size - 4) // stride + 1 for size in padded.shape[1:3])
    out = np.zeros((len(padded), rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = padded[:, i * stride : i * stride + 4, j * stride : j * stride + 4]
            out[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel)
    return out if conv.bias is None else out + np.asarray(conv.bias[...], np.float64)


def _leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def test_logits_follow_the_written_out_network():
    network = _made(layers=2)
    x = image = _image(1, 3, 12, 16, 3)
    x = _leaky(_conv_loops(x, network.first, 2))
    for conv, norm, stride in zip(network.convs, network.norms, (2, 1), strict=True):
        x = _conv_loops(x, conv, stride)
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        x = (x - mean) / np.sqrt(variance + 1e-5) * np.asarray(norm.scale[...])
        x = _leaky(x + np.asarray(norm.bias[...]))
    x = _conv_loops(x, network.last, 1)
    assert x.shape == (3, 1, 2, 1)
    logits = jax.jit(type(network).__call__)(network, image)
    np.testing.assert_allclose(logits, x, atol=1e-5 * np.abs(x).max())


def test_parameters_are_as_many_as_published():
    network = nnx.eval_shape(lambda: patchgan.Discriminator(rngs=rng.rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) == 2_765_633


def test_parameters_start_as_published():
    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))  # compiles in a third of the time
    network = patchgan.Discriminator(1, 64, 1, rngs=rngs)
    assert np.std(network.convs[0].kernel[...]) == pytest.approx(0.02, rel=0.02)
    scale = np.asarray(network.norms[0].scale[...])
    assert scale.mean() == pytest.approx(1, abs=0.01)
    assert scale.std() == pytest.approx(0.02, rel=0.3)
    assert not np.any(network.norms[0].bias[...])


def test_only_batch_norm_mixes_images():
    image = _image(2, 2, 12, 12, 1)
    for norm, alone in (("batch", False), ("group", True), ("none", True)):
        network = _made(channels=1, width=8, norm=norm)
        logits_of = jax.jit(type(network).__call__)
        same = np.allclose(logits_of(network, image)[:1], logits_of(network, image[:1]), atol=1e-5)
        assert same == alone, norm


def test_bfloat16_images_are_judged_in_float32():
    image = jnp.asarray(_image(3, 2, 8, 8, 3), jnp.bfloat16)
    network = _made()
    assert network(image).dtype == jnp.float32
    np.testing.assert_array_equal(network(image), network(image.astype(jnp.float32)))


def test_the_smallest_image_leaves_one_logit():
    network = _made(width=1, layers=3)
    logits = nnx.eval_shape(network, np.zeros((1, 24, 31, 3), np.float32))
    assert logits.shape == (1, 1, 1, 1)
    with pytest.raises(interfaces.UserError, match=r"at least 24 x 24.*\(1, 23, 31, 3\).*layers=2"):
        network(np.zeros((1, 23, 31, 3), np.float32))
    with pytest.raises(interfaces.UserError, match="channels=3"):
        network(np.zeros((1, 24, 24, 1), np.float32))


def test_wrong_arguments_are_named():
    with pytest.raises(interfaces.UserError, match="batch, group, none.*spectral"):
        _made(norm="spectral")
    with pytest.raises(interfaces.UserError, match="layers must be .*found 0"):
        _made(layers=0)


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="no parity fixtures")
def test_published_discriminator_is_reproduced():
    config = json.loads((FIXTURE / "config.json").read_text())
    weights = reader.read(FIXTURE / "discriminator.pt")
    case = np.load(FIXTURE / "case.npz")
    real, fake = (case[name].transpose(0, 2, 3, 1) for name in ("real", "fake"))
    width, layers = config["ndf"], config["n_layers"]

    training = _made(width=width, layers=layers)
    evaluating = _made(width=width, layers=layers, norm="none")
    for network in (training, evaluating):
        _fill(network.first, weights, "main.0")
        _fill(network.last, weights, f"main.{3 * layers + 2}")
    for stage in range(layers):
        conv, norm = f"main.{3 * stage + 2}", f"main.{3 * stage + 3}"
        training.convs[stage].kernel = _kernel(weights, conv)
        training.norms[stage].scale = nnx.Param(jnp.asarray(weights[f"{norm}.weight"]))
        training.norms[stage].bias = nnx.Param(jnp.asarray(weights[f"{norm}.bias"]))
        # With fixed statistics a batch norm is one factor and one bias per channel.
        factor = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + 1e-5)
        bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * factor
        evaluating.convs[stage].kernel = nnx.Param(
            _kernel(weights, conv)[...] * factor.reshape(1, 1, 1, -1)
        )
        evaluating.convs[stage].bias = nnx.Param(jnp.asarray(bias))

    def logits_of(network, image):
        return network(image).sum(), network(image)

    _close(jax.jit(logits_of)(training, real)[1], case["logits_real_train"], 1e-4)
    logits_of = jax.jit(jax.grad(logits_of, argnums=1, has_aux=True))
    gradient, logits = logits_of(evaluating, real)
    _close(logits, case["logits_real"], 1e-4)
    _close(gradient, case["grad_real"], 1e-3)
    _close(logits_of(evaluating, fake)[1], case["logits_fake"], 1e-4)


def _fill(conv, weights, name):
    conv.kernel = _kernel(weights, name)
    conv.bias = nnx.Param(jnp.asarray(weights[f"{name}.bias"]))


def _kernel(weights, name):
    return nnx.Param(jnp.asarray(weights[f"{name}.weight"].transpose(2, 3, 1, 0)))


def _close(array_BHWC, wanted_BCHW, tolerance):
    wanted = wanted_BCHW.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(array_BHWC, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
