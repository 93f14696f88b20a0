"""Convolutions as products of bfloat16: against sums over the window in float64; only on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen import sharding
from tokgen.nn import conv, tiles, winograd
from tokgen.nn.precision import Precision


def drawn(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.bfloat16)


def windows(x, kernel):
    """The convolution written out, in float64, of what bfloat16 holds."""
    x, kernel = (np.asarray(a, np.float64) for a in (x, kernel))
    _, H, W, _ = x.shape
    size = len(kernel)
    edge = size // 2
    padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    places = np.ndindex(size, size)
    return sum(padded[:, i : i + H, j : j + W] @ kernel[i, j] for i, j in places)


def shown_twice(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


FORMS = {
    "same": (tiles.same, winograd.plain, lambda x: x),
    "doubled": (tiles.doubled, winograd.plain_doubled, shown_twice),
}


@pytest.mark.parametrize("shape, size", [((5, 7), 3), ((19, 33), 3), ((16, 17), 1), ((24, 9), 5)])
@pytest.mark.parametrize("name", FORMS)
def test_sums_are_rounded_once(name, shape, size):
    fast, _, seen = FORMS[name]
    x, kernel = drawn(2, *shape, 6), drawn(size, size, 6, 5, seed=1)
    found = jax.jit(lambda x, kernel: fast(x, kernel))(x, kernel)
    assert found.dtype == jnp.bfloat16
    exact = windows(seen(x), kernel)
    # half a unit of the last of eight bits, and sums of float32
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-4)


def test_derivatives_are_those_of_the_plain_form():
    x, kernel = drawn(1, 18, 6, 8), drawn(3, 3, 8, 8, seed=1)

    def slopes(product):
        def value(x, kernel):
            return jnp.sum(product(x, kernel).astype(jnp.float32))

        return jax.jit(jax.grad(value, (0, 1)))(x, kernel)

    for found, wanted in zip(slopes(tiles.same), slopes(winograd.plain), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", FORMS)
def test_images_over_devices_need_no_others(name):
    fast, plain, _ = FORMS[name]
    mesh = sharding.make_mesh()
    x, kernel = drawn(len(mesh.devices.flat), 18, 4, 8), drawn(3, 3, 8, 8, seed=1)
    laid = sharding.global_batch({"image": np.asarray(x)}, mesh)["image"]
    compiled = jax.jit(lambda x, kernel: fast(x, kernel)).lower(laid, kernel).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "permute"))
    found = compiled(laid, kernel)
    assert found.sharding.is_equivalent_to(laid.sharding, 4)
    wanted = np.asarray(plain(x, kernel), np.float32)
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("here", [True, False], ids=["unit", "none"])
def test_only_a_cpu_with_the_unit_takes_tiles(here, monkeypatch):
    monkeypatch.setattr(tiles, "unit", lambda: here)
    x = jnp.zeros((1, 16, 32, 96), jnp.bfloat16)

    def lowered(precision, platform):
        layer = conv.Conv(96, 96, precision=precision, rngs=conv.nnx.Rngs(0))
        traced = jax.jit(lambda x: layer(x)).trace(x)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    low, full = Precision(), Precision(compute="float32")
    assert ("stablehlo.dot_general" in lowered(low, "cpu")) == here
    assert "stablehlo.dot_general" not in lowered(full, "cpu")
    for platform in ("tpu", "cuda"):
        text = lowered(low, platform)
        assert text.count("stablehlo.convolution") == 1 and "stablehlo.dot" not in text


def test_silu_rounds_once_on_a_cpu_and_in_bfloat16_elsewhere():
    x = drawn(4096)
    wide = np.asarray(x, np.float64)
    found = np.asarray(jax.jit(conv.silu)(x), np.float64)
    np.testing.assert_allclose(found, wide / (1 + np.exp(-wide)), rtol=2**-8, atol=1e-6)

    for platform, wide in (("cpu", True), ("tpu", False), ("cuda", False)):
        text = jax.jit(conv.silu).trace(x).lower(lowering_platforms=(platform,)).as_text()
        assert ("xf32>" in text) == wide
