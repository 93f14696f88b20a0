import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen.nn import linear, mlp, variants
from tokgen.nn.precision import FLOAT32

# width -> hidden width of the released LlamaGen models
HIDDEN = {
    768: 2048,
    1024: 2816,
    1280: 3584,
    1536: 4096,
    2048: 5632,
    2560: 6912,
    3200: 8704,
    4096: 11008,
}


def test_hidden_widths_are_the_published_ones():
    assert {width: mlp.swiglu_hidden(width) for width in HIDDEN} == HIDDEN


def test_narrow_hidden_widths_are_the_next_multiple_of_32():
    for width in range(16, 600, 8):
        hidden = mlp.swiglu_hidden_narrow(width)
        assert hidden % 32 == 0 and hidden - 32 < int(8 * width / 3) <= hidden


def test_swiglu_against_its_equation():
    rng = np.random.default_rng(0)
    layer = mlp.SwiGLU(
        16,
        mlp.swiglu_hidden_narrow(16),
        std=linear.fan_in,
        precision=FLOAT32,
        rngs=nnx.Rngs(0),
    )
    x = rng.normal(size=(2, 3, 16)).astype(np.float32)
    gate, up, down = (
        np.asarray(part.kernel[...], np.float64) for part in (layer.gate, layer.up, layer.down)
    )
    a = x @ gate
    expected = (a / (1 + np.exp(-a)) * (x @ up)) @ down
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-6)


def test_a_config_names_its_parts():
    assert variants.named("llama") is variants.LLAMA
    assert variants.named("llama_narrow") is variants.LLAMA_NARROW
    for name in ("Llama", "variant", "swiglu_hidden"):
        with pytest.raises(ValueError, match="llama_narrow"):
            variants.named(name)
