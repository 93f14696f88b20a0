"""Convolutions from fewer products: against sums over the window in float64, and only on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen import sharding
from tokgen.nn import winograd


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def windows(x, kernel):
    """The convolution written out, in float64."""
    B, H, W, _ = x.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [
        padded[:, i : i + H, j : j + W] @ kernel[i, j].astype(np.float64)
        for i in range(3)
        for j in range(3)
    ]
    return sum(parts)


def shown_twice(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


FORMS = {
    "same": (winograd.same, winograd.plain, lambda x: x),
    "doubled": (winograd.doubled, winograd.plain_doubled, shown_twice),
}


@pytest.mark.parametrize("points", [winograd.POINTS, (0.0, 1.0, -1.0), (0.0, 2.0)])
def test_the_matrices_make_every_output_the_sum_of_its_window(points):
    outputs, filters, inputs = winograd._matrices(points, 3)
    x, kernel = drawn(len(inputs)).astype(np.float64), drawn(3, seed=1).astype(np.float64)
    found = outputs @ ((filters @ kernel) * (inputs @ x))
    np.testing.assert_allclose(found, np.correlate(x, kernel), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows, loops", [(16, False), (24, True)], ids=["whole", "strips"])
@pytest.mark.parametrize("name", FORMS)
def test_fewer_products_make_the_same_sums(name, rows, loops, monkeypatch):
    # whole as far as 16 rows go
    monkeypatch.setattr(winograd, "WHOLE", 16 * 5 * (4 if name == "doubled" else 1))
    fast, plain, seen = FORMS[name]
    x, kernel = drawn(2, rows, 5, 24), drawn(3, 3, 24, 7, seed=1)
    program = jax.jit(lambda x, kernel: fast(x, kernel))
    assert ("while" in program.lower(x, kernel).as_text()) == loops
    exact = windows(seen(x), kernel)
    found = np.asarray(program(x, kernel))
    assert found.shape == exact.shape
    rounding = np.abs(np.asarray(plain(x, kernel)) - exact).std()
    assert 0 < np.abs(found - exact).std() < 4 * rounding


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_are_those_of_the_plain_form(name):
    fast, plain, _ = FORMS[name]
    x, kernel = drawn(1, 4, 3, 6), drawn(3, 3, 6, 5, seed=1)

    def slope(product):
        """A gradient of a gradient: what a penalty of a gradient trains."""

        def value(x, kernel):
            return jnp.sum(product(x, kernel) ** 3)

        return jax.grad(lambda x, kernel: jnp.sum(jax.grad(value)(x, kernel) ** 2), (0, 1))

    for found, wanted in zip(
        jax.jit(slope(fast))(x, kernel), jax.jit(slope(plain))(x, kernel), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_bfloat16_is_rounded_once():
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in (drawn(1, 8, 4, 32), drawn(3, 3, 32, 8)))
    found = winograd.same(x, kernel)
    assert found.dtype == jnp.bfloat16
    exact = windows(np.asarray(x, np.float32), np.asarray(kernel, np.float32))
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=2**-8, atol=1e-3)


def test_layers_of_one_size_are_one_program_and_hold_what_one_needs():
    x, kernel = jnp.zeros((1, 16, 16, 64)), jnp.zeros((3, 3, 64, 64))

    def layers(count):
        def network(x, kernels):
            for kernel in kernels:
                x = jnp.tanh(winograd.same(x, kernel))
            return x

        compiled = jax.jit(network).lower(x, [kernel] * count).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text().count(" call(")

    (one, _), (four, calls) = layers(1), layers(4)
    # the sums of a layer's weights are twice as large as the weights, the map is less than half
    assert one > 2 * kernel.nbytes and four < one + kernel.nbytes and calls >= 4


@pytest.mark.parametrize("name", FORMS)
def test_images_over_devices_need_no_others(name, monkeypatch):
    monkeypatch.setattr(winograd, "WHOLE", 0)
    fast, plain, _ = FORMS[name]
    mesh = sharding.make_mesh()
    x, kernel = drawn(len(mesh.devices.flat), 8, 4, 32), drawn(3, 3, 32, 16, seed=1)
    program = jax.jit(lambda x, kernel: fast(x, kernel))
    laid = sharding.global_batch({"image": x}, mesh)["image"]
    compiled = program.lower(laid, kernel).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "permute"))
    found = compiled(laid, jnp.asarray(kernel))
    assert found.sharding.is_equivalent_to(laid.sharding, 4)
    np.testing.assert_allclose(found, plain(x, kernel), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_accelerators_get_the_plain_form(name):
    fast, plain, _ = FORMS[name]
    x, kernel = jnp.zeros((1, 8, 8, 128)), jnp.zeros((3, 3, 128, 128))

    def lowered(product, platform):
        traced = jax.jit(lambda x, kernel: product(x, kernel)).trace(x, kernel)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    def products(text):
        kinds = ("stablehlo.convolution", "stablehlo.dot_general")
        return [line.split(":")[-1] for line in text.splitlines() if any(k in line for k in kinds)]

    for platform in ("tpu", "cuda"):
        written = products(lowered(plain, platform))
        assert len(written) == 1 and products(lowered(fast, platform)) == written
    assert len(products(lowered(fast, "cpu"))) == {"same": 6, "doubled": 9}[name]


@pytest.mark.parametrize(
    "shape, kernel, gains",
    [
        ((1, 32, 33, 128), (3, 3, 128, 128), True),
        ((9, 16, 16, 128), (3, 3, 128, 128), False),  # an image at a time, whatever the batch
        ((1, 34, 32, 128), (3, 3, 128, 128), False),  # rows are taken by fours
        ((1, 32, 32, 128), (1, 1, 128, 128), False),
        ((1, 32, 32, 3), (3, 3, 3, 128), False),
        ((1, 32, 32, 128), (3, 3, 128, 3), False),
    ],
)
def test_sizes_that_gain(shape, kernel, gains):
    assert winograd.pays(shape, kernel) == gains
