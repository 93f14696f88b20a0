import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import interfaces
from tokgen.nn import linear, symbols
from tokgen.nn.precision import FLOAT32, Precision

LAYOUT = interfaces.TokenLayout((4, 16), ((2, 2),))
OPTIONS = dict(precision=FLOAT32, rngs=nnx.Rngs(0))


def test_a_position_is_the_sum_of_the_rows_of_its_symbols():
    layer = symbols.Symbols(LAYOUT, 8, std=linear.fan_in, **OPTIONS)
    tokens = np.random.default_rng(0).integers(0, (4, 16), (3, 5, 2))
    table = np.asarray(layer.table[...], np.float64)
    expected = np.zeros((3, 5, 8))
    for b in range(3):
        for j in range(5):
            expected[b, j] = table[0, tokens[b, j, 0]] + table[1, tokens[b, j, 1]]
    np.testing.assert_allclose(layer(jnp.asarray(tokens)), expected, rtol=1e-6)


def test_the_last_label_stands_for_none():
    layer = symbols.Labels(5, 8, std=linear.fan_in, **OPTIONS)
    label_B = jnp.asarray([4, 0, 2])
    np.testing.assert_array_equal(layer(label_B), layer.table[...][label_B])
    assert layer.null(label_B).tolist() == [5, 5, 5] and layer.table.shape == (6, 8)
    none = symbols.Labels(0, 8, std=linear.fan_in, **OPTIONS)
    assert none.null(jnp.zeros(2, jnp.int32)).tolist() == [0, 0] and none.table.shape == (1, 8)


def test_a_head_starts_uniform_in_float32_and_never_offers_what_is_not_there():
    half = Precision("float32", "bfloat16")
    head = symbols.Head(LAYOUT, 8, norm=linear.RMSNorm, precision=half, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 8)), jnp.bfloat16)
    logits = np.asarray(head(x))
    assert logits.dtype == np.float32 and logits.shape == (2, 3, 2, 16)
    assert np.all(np.isneginf(logits[:, :, 0, 4:]))
    assert np.all(logits[:, :, 0, :4] == 0) and np.all(logits[:, :, 1] == 0)


def test_a_head_is_a_norm_and_a_product():
    head = symbols.Head(LAYOUT, 8, norm=linear.RMSNorm, **OPTIONS)
    rng = np.random.default_rng(2)
    head.head.kernel[...] = jnp.asarray(rng.normal(size=(8, 2, 16)), jnp.float32)
    x = rng.normal(size=(2, 3, 8))
    unit = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    expected = np.einsum("bld,dgv->blgv", unit, np.asarray(head.head.kernel[...], np.float64))
    logits = np.asarray(head(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(logits[:, :, 1], expected[:, :, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[:, :, 0, :4], expected[:, :, 0, :4], rtol=1e-4, atol=1e-5)
