import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import interfaces
from tokgen.nn import embeddings, linear
from tokgen.nn.precision import FLOAT32

LAYOUT = interfaces.TokenLayout((4, 16), ((2, 2),))
OPTIONS = dict(precision=FLOAT32, rngs=nnx.Rngs(0))


def test_a_position_is_the_sum_of_the_rows_of_its_symbols():
    layer = embeddings.Tokens(LAYOUT, 8, std=linear.fan_in, **OPTIONS)
    tokens = np.random.default_rng(0).integers(0, (4, 16), (3, 5, 2))
    table = np.asarray(layer.table[...], np.float64)
    expected = np.zeros((3, 5, 8))
    for b in range(3):
        for j in range(5):
            expected[b, j] = table[0, tokens[b, j, 0]] + table[1, tokens[b, j, 1]]
    np.testing.assert_allclose(layer(jnp.asarray(tokens)), expected, rtol=1e-6)


def test_the_last_label_stands_for_none():
    layer = embeddings.Labels(5, 8, std=linear.fan_in, **OPTIONS)
    label_B = jnp.asarray([4, 0, 2])
    np.testing.assert_array_equal(layer(label_B), layer.table[...][label_B])
    assert layer.null(label_B).tolist() == [5, 5, 5] and layer.table.shape == (6, 8)
    none = embeddings.Labels(0, 8, std=linear.fan_in, **OPTIONS)
    assert none.null(jnp.zeros(2, jnp.int32)).tolist() == [0, 0] and none.table.shape == (1, 8)
