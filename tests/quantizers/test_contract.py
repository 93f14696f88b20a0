"""What every quantizer promises: the files of tokgen/quantizers are found, none is listed.

A new file needs constructor arguments in ARGUMENTS below, and for the straight-through test the
smooth map that its rounding stands on.
"""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tokgen
from tokgen import sharding
from tokgen import state as states

FOLDER = pathlib.Path(tokgen.__file__).parent / "quantizers"
FILES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__")
GRID = (4, 4)


def identity(latents_BPC, arguments):
    return latents_BPC


def on_the_sphere(latents_BPC, arguments):
    return latents_BPC / jnp.sqrt(jnp.sum(latents_BPC**2, -1, keepdims=True))


def bounded(latents_BPC, arguments):
    """tanh between the outer levels (Eq. 2 of arXiv:2309.15505), in units of half the levels."""
    levels = np.asarray(arguments["levels"])
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = np.where(levels % 2, 0, 0.5)
    inside = jnp.tanh(latents_BPC + np.arctanh(offset / half)[None, None])
    return (inside * half[None, None] - offset[None, None]) / (levels // 2)[None, None]


# File -> (constructor arguments, the smooth map before rounding): once for every way of working.
ARGUMENTS = {
    "fsq": [
        (dict(levels=(8, 6, 5)), bounded),
        (dict(levels=(7, 5, 5, 5)), bounded),
    ],
    "vq": [
        (dict(codes=128, channels=8), on_the_sphere),
        (dict(codes=128, channels=8, normalize=False), identity),
        (dict(codes=128, channels=8, update="ema", decay=0.9), on_the_sphere),
        (dict(codes=128, channels=4, normalize=False, update="frozen"), identity),
    ],
}
CASES = [
    pytest.param(name, arguments, smooth, id=f"{name}-{number}")
    for name in FILES
    for number, (arguments, smooth) in enumerate(ARGUMENTS.get(name, []))
]
contract = pytest.mark.parametrize(("name", "arguments", "smooth"), CASES)


def build(name, arguments):
    module = importlib.import_module(f"tokgen.quantizers.{name}")
    return module.Quantizer(**arguments, grid=GRID, rngs=nnx.Rngs(3))


def latents(quantizer, key, batch=16):
    return jax.random.normal(key, (batch, quantizer.layout.length, quantizer.channels))


@pytest.mark.parametrize("name", FILES)
def test_has_arguments(name):
    assert ARGUMENTS.get(name), f"give tokgen/quantizers/{name}.py a line in ARGUMENTS of this file"


@contract
def test_all_codes_make_the_round_trip(name, arguments, smooth):
    quantizer = build(name, arguments)
    (size,) = quantizer.layout.vocab
    tokens_BLG = jnp.arange(size)[None, :, None]
    back = getattr(quantizer, "preimage", quantizer.decode)
    np.testing.assert_array_equal(quantizer.encode(back(tokens_BLG)), tokens_BLG)


@contract
def test_layout_shapes_and_values(name, arguments, smooth, key):
    quantizer = build(name, arguments)
    latents_BPC = latents(quantizer, key)
    out = quantizer(latents_BPC)
    layout = quantizer.layout
    assert layout.grids == (GRID,)
    assert out.tokens_BLG.shape == (16, layout.length, layout.groups)
    assert jnp.issubdtype(out.tokens_BLG.dtype, jnp.integer)
    for g, size in enumerate(layout.vocab):
        assert 0 <= out.tokens_BLG[..., g].min() and out.tokens_BLG[..., g].max() < size
    assert out.latents_BPC.shape == latents_BPC.shape and out.latents_BPC.dtype == jnp.float32
    # the value of the code, and of the code of these very tokens
    np.testing.assert_array_equal(out.tokens_BLG, quantizer.encode(latents_BPC))
    np.testing.assert_allclose(out.latents_BPC, quantizer.decode(out.tokens_BLG), atol=1e-5)
    assert len(np.unique(out.tokens_BLG)) > 20
    for loss in out.losses.values():
        assert loss.shape == () and loss > 0


@contract
def test_straight_through_gradient(name, arguments, smooth, key):
    """d out / d latents is that of the smooth map: the rounding itself is the identity."""
    quantizer = build(name, arguments)
    latents_BPC = latents(quantizer, key, batch=2)
    cotangent = jax.random.normal(jax.random.fold_in(key, 1), latents_BPC.shape)
    out, pull = jax.vjp(lambda z: quantizer(z).latents_BPC, latents_BPC)
    smoothed, expected = jax.vjp(lambda z: smooth(z, arguments), latents_BPC)
    assert jnp.abs(out - smoothed).max() > 0.05  # it does round
    np.testing.assert_allclose(pull(cotangent)[0], expected(cotangent)[0], rtol=1e-4, atol=1e-5)


@contract
def test_no_gradient_reaches_the_codes_through_the_latents(name, arguments, smooth, key):
    graph, params, stats = states.split(build(name, arguments))

    def painted(params, stats):
        quantizer = states.merge(graph, params, stats)
        return jnp.sum(quantizer(latents(quantizer, key)).latents_BPC ** 3)

    for leaf in jax.tree.leaves(jax.grad(painted, (0, 1))(params, stats)):
        assert not np.asarray(leaf).any()


@contract
def test_deterministic_with_and_without_jit(name, arguments, smooth, key):
    quantizer = build(name, arguments)
    latents_BPC = latents(quantizer, key)
    first, second = quantizer(latents_BPC), quantizer(latents_BPC, key=key)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    compiled = jax.jit(lambda q, z: q(z))(quantizer, latents_BPC)
    np.testing.assert_array_equal(first.tokens_BLG, compiled.tokens_BLG)
    np.testing.assert_allclose(first.latents_BPC, compiled.latents_BPC, atol=1e-5)


@contract
def test_float32_inside(name, arguments, smooth, key):
    quantizer = build(name, arguments)
    half_BPC = latents(quantizer, key, batch=64).astype(jnp.bfloat16)
    whole_BPC = half_BPC.astype(jnp.float32)
    np.testing.assert_array_equal(quantizer.encode(half_BPC), quantizer.encode(whole_BPC))
    low, high = quantizer(half_BPC), quantizer(whole_BPC)
    jax.tree.map(np.testing.assert_array_equal, low, high)
    assert {leaf.dtype for leaf in jax.tree.leaves((low.latents_BPC, low.losses))} == {
        jnp.dtype("float32")
    }
    assert quantizer.decode(low.tokens_BLG).dtype == jnp.float32


@contract
def test_eight_devices_compute_what_one_does(name, arguments, smooth, key):
    quantizer = build(name, arguments)
    graph, params, stats = states.split(quantizer)

    @jax.jit
    def work(params, stats, latents_BPC):
        quantizer = states.merge(graph, params, stats)
        out = quantizer(latents_BPC)
        quantizer.maintain(latents_BPC, key=key)
        return out, *states.split(quantizer)[1:]

    mesh = sharding.make_mesh()
    assert mesh.size == 8
    one = many = (params, stats)
    for step in range(3):  # enough for the averages to move and for codes to be revived
        latents_BPC = latents(quantizer, jax.random.fold_in(key, step))
        out, *one = work(*one, latents_BPC)
        spread_BPC = jax.device_put(latents_BPC, sharding.of_batch(mesh))
        many = jax.device_put(many, sharding.replicated(mesh))
        out_many, *many = work(*many, spread_BPC)
        np.testing.assert_array_equal(out.tokens_BLG, out_many.tokens_BLG)
        pairs = (out.latents_BPC, out.losses, one), (out_many.latents_BPC, out_many.losses, many)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *pairs)
    before, after = jax.tree.leaves(stats), jax.tree.leaves(one[1])
    moved = [np.abs(a - b).max() for a, b in zip(before, after, strict=True)]
    assert not moved or max(moved) > 0
