"""LlamaGen's own rules: sizes, angles, text as a prefix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.generators import autoregressive
from tokgen.nn import mlp, positions
from tokgen.nn.precision import FLOAT32

LAYOUT = interfaces.TokenLayout((16,), ((3, 3),))
TEXTS, CHANNELS, L = 4, 6, 9

logits = jax.jit(lambda generator, batch: generator.logits(batch))


@pytest.mark.parametrize(
    ("width", "hidden"),
    [
        *((768, 2048), (1024, 2816), (1280, 3584), (1536, 4096)),
        *((2048, 5632), (2560, 6912), (3200, 8704), (4096, 11008)),
    ],
)
def test_the_hidden_width_is_the_published_one(width, hidden):
    assert mlp.swiglu_hidden(width) == hidden


def test_angles_are_the_published_ones():
    angles = positions.rotary_angles((24, 24), 64)
    frequencies = angles[24, :16]  # row 1, column 0
    np.testing.assert_allclose(
        frequencies[[0, 1, 2, 3, 15]],
        [1.0, 0.56234133, 0.31622777, 0.17782794, 0.00017783],
        atol=5e-9,
    )
    row, column = 7, 19
    np.testing.assert_allclose(
        angles[row * 24 + column], np.concatenate([row * frequencies, column * frequencies])
    )
    layout = interfaces.TokenLayout((16,), ((24, 24),))
    places = positions.Rotary2D(layout, 120, 64 * 2, 2, precision=FLOAT32, rngs=None)
    _, (cos, sin) = places(jnp.arange(576)[None], jnp.asarray([0, 119, 120, 121]))
    # of the text no angle at all, of the first token none to turn by
    np.testing.assert_array_equal(cos[0, 0, :3], np.repeat([[0.0], [0.0], [1.0]], 32, axis=1))
    np.testing.assert_array_equal(sin[0, 0, :3], np.zeros((3, 32)))
    np.testing.assert_allclose(cos[0, 0, 3, 16:], np.cos(frequencies), rtol=1e-6)


@pytest.fixture(scope="module")
def told():
    """(a generator with text, a batch of two whose texts have 1 and 3 features)."""
    generator = autoregressive.Generator(
        LAYOUT,
        0,
        width=16,
        depth=2,
        heads=2,
        hidden=32,
        conditioning="captions",
        texts=(TEXTS, CHANNELS),
        precision=FLOAT32,
        rngs=nnx.Rngs(0),
    )
    rng = np.random.default_rng(1)
    leaves, structure = jax.tree.flatten(generator)
    generator = jax.tree.unflatten(
        structure, [jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    )
    features = rng.normal(size=(2, TEXTS, CHANNELS)).astype(np.float32)
    mask = np.arange(TEXTS)[None] >= np.array([[3], [1]])  # padded on the left
    text = interfaces.Text(jnp.asarray(features), jnp.asarray(mask))
    tokens = jnp.asarray(rng.integers(0, 16, (2, L, 1)))
    return generator, interfaces.TokenBatch(tokens, text)


def test_padding_of_a_text_changes_nothing_and_its_features_all(told):
    generator, batch = told
    mask_BT1 = batch.cond.mask_BT[..., None]

    @jax.jit
    def slopes(features_BTE):
        def mixed(features_BTE):
            text = batch.cond.replace(features_BTE=features_BTE)
            found = generator.logits(batch.replace(cond=text))
            return jnp.sum(found * jnp.cos(jnp.arange(16.0))[None, None, None], (2, 3))

        return jax.jacrev(mixed)(features_BTE)

    reach = np.abs(np.asarray(slopes(batch.cond.features_BTE))).max(-1)  # [B, L, B, T]
    for b in range(2):
        expected = np.tile(np.asarray(batch.cond.mask_BT)[b], (L, 1))
        np.testing.assert_array_equal(reach[b, :, b] > 0, expected)
        assert np.all(reach[b, :, 1 - b] == 0)
    other = jnp.where(mask_BT1, batch.cond.features_BTE, 100.0)
    changed = batch.replace(cond=batch.cond.replace(features_BTE=other))
    np.testing.assert_array_equal(logits(generator, changed), logits(generator, batch))


def test_no_text_is_one_fixed_array_padded_as_the_text_was(told):
    generator, batch = told
    null = generator.null(batch.cond)
    np.testing.assert_array_equal(null.mask_BT, batch.cond.mask_BT)
    absent = np.asarray(generator.conditioning.absent[...])
    np.testing.assert_array_equal(null.features_BTE, np.stack([absent, absent]))
    assert not any(path[-1] == "absent" for path in _trained(generator))
    # dropped conditions train as no text, the others as they are
    batch_of = lambda cond: batch.replace(cond=cond)  # noqa: E731
    found = jax.jit(lambda g, b: g.loss(b, None, step=0, key=jax.random.key(0))[0])
    generator.label_drop = 1.0
    np.testing.assert_allclose(found(generator, batch), found(generator, batch_of(null)), rtol=1e-6)
    generator.label_drop = 0.0
    kept = float(found(generator, batch))
    generator.label_drop = 0.1
    expected = np.asarray(jax.jit(lambda g, b: g.nats(b))(generator, batch)).mean()
    np.testing.assert_allclose(kept, expected, rtol=1e-5)


def _trained(generator):
    """Paths of the parameters."""
    return [path for path, _ in nnx.to_flat_state(nnx.state(generator, nnx.Param))]
