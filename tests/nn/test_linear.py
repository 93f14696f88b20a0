import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import sharding
from tokgen.nn import linear, norms
from tokgen.nn.precision import FLOAT32, Precision

HALF = Precision("float32", "bfloat16")


def _numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _set(module, seed=1):
    """Scale and bias away from 1 and 0, where they could be forgotten."""
    module.scale[...] = jnp.asarray(_numbers(seed, *module.scale.shape))
    if hasattr(module, "bias"):
        module.bias[...] = jnp.asarray(_numbers(seed + 1, *module.bias.shape))
    return module


@pytest.mark.parametrize(
    "inputs, outputs, bias", [(6, 4, False), (6, (2, 3), True), ((2, 3), 5, True)]
)
def test_a_linear_map_is_a_sum_over_its_inputs(inputs, outputs, bias):
    layer = linear.Linear(inputs, outputs, bias=bias, precision=FLOAT32, rngs=nnx.Rngs(0))
    if bias:
        layer.bias[...] = jnp.asarray(_numbers(3, *layer.bias.shape))
    rank = 1 if isinstance(inputs, int) else len(inputs)
    x = _numbers(2, 3, 5, *layer.kernel.shape[:rank])
    size = int(np.prod(x.shape[2:]))
    kernel = np.asarray(layer.kernel[...], np.float64).reshape(size, -1)
    expected = np.zeros((3, 5, kernel.shape[1]))
    for b in range(3):
        for j in range(5):
            for i in range(size):
                expected[b, j] += np.float64(x[b, j].reshape(-1)[i]) * kernel[i]
    expected = expected.reshape(3, 5, *layer.kernel.shape[rank:])
    expected += np.asarray(layer.bias[...], np.float64) if bias else 0
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inputs, outputs", [(6, 4), (6, (2, 3)), ((2, 3), 5)])
def test_slopes_of_a_linear_map(inputs, outputs):
    """By its input the sums over outputs, by its kernel those over rows; and those of the slopes,
    which a penalty of gradients needs."""
    layer = linear.Linear(inputs, outputs, precision=FLOAT32, rngs=nnx.Rngs(0))
    kernel = _numbers(4, *layer.kernel.shape)
    graph, rest = nnx.split(layer, nnx.Param)[0], nnx.state(layer, nnx.Param)

    def mapped(x, kernel):
        return nnx.merge(graph, nnx.State({"kernel": rest["kernel"].replace(kernel)}))(x)

    rank = layer.rank
    x, weight = _numbers(5, 3, 2, *kernel.shape[:rank]), _numbers(6, 3, 2, *kernel.shape[rank:])

    def total(x, kernel):
        return jnp.sum(mapped(x, kernel) * weight)

    to_x, to_kernel = jax.grad(total, (0, 1))(x, kernel)
    outs = list(range(2, 2 + kernel.ndim - rank))
    own = np.tensordot(weight.astype(np.float64), kernel, (outs, range(rank, kernel.ndim)))
    np.testing.assert_allclose(to_x, own, rtol=1e-5, atol=1e-5)
    own = np.tensordot(x.astype(np.float64), weight, ((0, 1), (0, 1)))
    np.testing.assert_allclose(to_kernel, own, rtol=1e-5, atol=1e-5)
    # d/d kernel of |d total / d x|^2 / 2: the slope by x, summed with the weights over rows
    second = jax.grad(lambda kernel: 0.5 * jnp.sum(jax.grad(total)(x, kernel) ** 2))(kernel)
    own = np.tensordot(np.asarray(to_x, np.float64), weight, ((0, 1), (0, 1)))
    np.testing.assert_allclose(second, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, linear.MANY + 1])
@pytest.mark.parametrize("inputs, outputs", [(24, 128), ((2, 12), (4, 48))])
def test_panels_are_the_linear_map(inputs, outputs, rows):
    layer = linear.Linear(inputs, outputs, bias=True, precision=FLOAT32, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(_numbers(2, *layer.kernel.shape))
    layer.bias[...] = jnp.asarray(_numbers(3, *layer.bias.shape))
    x = _numbers(4, rows, 1, *layer.kernel.shape[: layer.rank])
    size = x[0].size
    kernel = np.asarray(layer.kernel[...], np.float64).reshape(size, -1)
    expected = x.reshape(rows, size).astype(np.float64) @ kernel
    expected = expected.reshape(rows, 1, *layer.bias.shape) + np.asarray(layer.bias[...])
    found = linear.Panels(layer)(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def test_panels_in_bfloat16_round_once():
    layer = linear.Linear(64, 128, bias=True, precision=HALF, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.asarray(_numbers(2, 64, 128))
    layer.bias[...] = jnp.asarray(_numbers(3, 128))
    panels, x = linear.Panels(layer), jnp.asarray(_numbers(4, 3, 64), jnp.bfloat16)
    assert panels.kernel[...].dtype == jnp.bfloat16
    kernel = np.asarray(layer.kernel[...].astype(jnp.bfloat16), np.float64)
    exact = np.asarray(x, np.float64) @ kernel + np.asarray(layer.bias[...], np.float64)
    found = np.asarray(panels(x), np.float64)
    # half a unit in the last of eight bits, and float32's rounding of the sum
    assert np.all(np.abs(found - exact) <= 2.0**-8 * np.abs(exact) + 1e-5)


def test_what_goes_to_panels():
    some = dict(precision=FLOAT32, rngs=nnx.Rngs(0))

    class Layer(nnx.Module):
        def __init__(self):
            self.wide, self.left = linear.Linear(8, (2, 64), **some), linear.Linear(8, 128, **some)

    class Whole(nnx.Module):
        def __init__(self):
            self.wide, self.layers = linear.Linear(8, 128, **some), nnx.List([Layer()])
            self.narrow, self.uneven = linear.Linear(8, 64, **some), linear.Linear(8, 100, **some)

    @jax.jit
    def traced(whole):
        linear.panelled(whole)
        return isinstance(whole.wide, linear.Linear)

    whole = Whole()
    assert traced(whole)
    linear.panelled(whole, but=("left",))
    layer = whole.layers[0]
    assert isinstance(whole.wide, linear.Panels) and isinstance(layer.wide, linear.Panels)
    for left in (layer.left, whole.narrow, whole.uneven):
        assert isinstance(left, linear.Linear)


def test_starts_have_their_stated_scale():
    for std, expected in ((linear.published, 0.02), (linear.fan_in, 128**-0.5)):
        layer = linear.Linear(128, 256, std=std, precision=FLOAT32, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(np.std(layer.kernel[...]), expected, rtol=0.02)
    heads = linear.Linear(
        (4, 32), 256, std=linear.fan_in, precision=FLOAT32, rngs=nnx.Rngs(0)
    )  # the fan in counts both axes
    np.testing.assert_allclose(np.std(heads.kernel[...]), 128**-0.5, rtol=0.02)
    zero = linear.Linear(8, 8, std=None, precision=FLOAT32, rngs=nnx.Rngs(0))
    assert not np.any(zero.kernel[...])


def test_root_mean_square_norm():
    x = _numbers(4, 2, 3, 16) * 5 + 2
    norm = _set(norms.RMSNorm(16, precision=FLOAT32))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    expected *= np.asarray(norm.scale[...], np.float64)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)
    # eps inside the root: a vector of 1e-3 shrinks to 1e-3 / sqrt(1e-6 + 1e-5)
    small = norms.RMSNorm(16, precision=FLOAT32)(jnp.full((1, 16), 1e-3))
    np.testing.assert_allclose(small, 1e-3 / np.sqrt(1.1e-5), rtol=1e-5)


def test_layer_norm():
    x = _numbers(5, 2, 3, 16) * 5 + 2
    norm = _set(norms.LayerNorm(16, precision=FLOAT32))
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    expected = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_group_norm():
    B, H, W, C, groups = 2, 3, 5, 8, 4
    x = _numbers(6, B, H, W, C) * 3 + 4
    norm = _set(norms.GroupNorm(C, groups=groups, precision=FLOAT32))
    expected = np.zeros(x.shape)
    for b in range(B):
        for g in range(groups):
            part = x[b, :, :, 2 * g : 2 * g + 2].astype(np.float64)
            part = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
            expected[b, :, :, 2 * g : 2 * g + 2] = part
    expected = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="width=10, groups=4"):
        norms.GroupNorm(10, groups=4, precision=FLOAT32)


@pytest.mark.parametrize("kind", [norms.RMSNorm, norms.LayerNorm])
def test_statistics_are_float32_and_the_dtype_stays(kind):
    # in bfloat16 a sum of 4096 squares stops growing at 256, and its root would be far off
    x = jnp.asarray(_numbers(7, 1, 4096), jnp.bfloat16)
    norm = kind(4096, precision=HALF)
    half, wide = norm(x), norm(x.astype(jnp.float32))
    assert half.dtype == jnp.bfloat16 and norm.scale[...].dtype == jnp.float32
    np.testing.assert_allclose(np.float32(half), wide, rtol=2**-7, atol=1e-6)


def test_a_linear_map_runs_in_the_compute_dtype():
    layer = linear.Linear(16, 8, bias=True, precision=HALF, rngs=nnx.Rngs(0))
    assert layer.kernel[...].dtype == jnp.float32
    assert layer(jnp.ones((1, 16), jnp.float32)).dtype == jnp.bfloat16
    program = str(jax.make_jaxpr(lambda x: layer(x))(jnp.ones((1, 16))))
    (product,) = [line for line in program.splitlines() if "dot_general" in line]
    assert "bf16[1,8]" in product
    with pytest.raises(ValueError, match="float16"):
        Precision("float16")


@pytest.mark.parametrize("inputs, outputs", [(16, (4, 6)), ((4, 6), 16)])
def test_a_map_over_fsdp_is_the_same_map(inputs, outputs):
    """Also its gradient, which is laid over `fsdp` as a matrix, before it has heads again."""
    layer = linear.Linear(inputs, outputs, precision=FLOAT32, rngs=nnx.Rngs(0))
    kernel, rank = layer.kernel[...], layer.rank
    x = jnp.asarray(_numbers(2, 8, 3, *kernel.shape[:rank]))

    graph = nnx.split(layer)[0]

    def loss(kernel, x):
        state = nnx.State({"kernel": nnx.Param(kernel)})
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x)))

    wanted = jax.value_and_grad(loss)(kernel, x)
    mesh = sharding.make_mesh(2, 2, 2, devices=jax.devices()[:8])
    path = "attention/query/kernel" if rank == 1 else "attention/out/kernel"
    with jax.set_mesh(mesh):
        where = sharding.of_parameter(path, kernel.shape, "tensor", mesh)
        placed = jax.device_put(kernel, where), jax.device_put(x, sharding.of_batch(mesh))
        found = jax.jit(jax.value_and_grad(loss))(*placed)
        traced = jax.make_jaxpr(jax.grad(loss))(*placed)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    constraints = [e for e in traced.eqns if e.primitive.name == "sharding_constraint"]
    assert len(constraints) == 2 and all(e.outvars[0].aval.ndim == 2 for e in constraints)
