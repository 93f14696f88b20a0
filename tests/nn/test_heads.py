import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import interfaces
from tokgen.nn import heads, variants
from tokgen.nn.precision import FLOAT32, Precision

LAYOUT = interfaces.TokenLayout((4, 16), ((2, 2),))
OPTIONS = dict(precision=FLOAT32, rngs=nnx.Rngs(0))


def test_a_head_starts_uniform_in_float32_and_never_offers_what_is_not_there():
    half = Precision("float32", "bfloat16")
    head = heads.Linear(heads.Config(LAYOUT, 8, variants.LLAMA), precision=half, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 8)), jnp.bfloat16)
    logits = np.asarray(head(x))
    assert logits.dtype == np.float32 and logits.shape == (2, 3, 2, 16)
    assert np.all(np.isneginf(logits[:, :, 0, 4:]))
    assert np.all(logits[:, :, 0, :4] == 0) and np.all(logits[:, :, 1] == 0)


def test_a_head_is_a_norm_and_a_product():
    head = heads.Linear(heads.Config(LAYOUT, 8, variants.LLAMA), **OPTIONS)
    rng = np.random.default_rng(2)
    head.head.kernel[...] = jnp.asarray(rng.normal(size=(8, 2, 16)), jnp.float32)
    x = rng.normal(size=(2, 3, 8))
    unit = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    expected = np.einsum("bld,dgv->blgv", unit, np.asarray(head.head.kernel[...], np.float64))
    logits = np.asarray(head(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(logits[:, :, 1], expected[:, :, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[:, :, 0, :4], expected[:, :, 0, :4], rtol=1e-4, atol=1e-5)


def test_the_likeliest_is_the_first_of_the_largest():
    logits = np.random.default_rng(3).integers(0, 4, (5, 7, 6)).astype(np.float32)  # many ties
    logits[0, 0] = -np.inf
    np.testing.assert_array_equal(heads.likeliest(jnp.asarray(logits)), logits.argmax(-1))
