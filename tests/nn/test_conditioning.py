import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.nn import conditioning, variants
from tokgen.nn.precision import FLOAT32

OPTIONS = dict(variant=variants.LLAMA, precision=FLOAT32, rngs=nnx.Rngs(0))


def test_a_label_is_one_slot():
    prefix = conditioning.Label(5, 8, 9, **OPTIONS)
    label_B = jnp.asarray([4, 0])
    np.testing.assert_array_equal(prefix(label_B)[:, 0], prefix.labels.table[...][label_B])
    assert prefix(label_B).shape == (2, prefix.slots, 8)
    assert prefix.null(label_B).tolist() == [5, 5]
    assert prefix.adapt(label_B, jnp.arange(3)) is None


def test_adaptive_blocks_are_told_the_class_and_the_slot():
    prefix = conditioning.ClsLabel(5, 8, 9, **OPTIONS)
    label_B, slots_l = jnp.asarray([4, 0]), jnp.asarray([0, 3, 10])
    labels, steps = prefix.labels.table[...], prefix.steps.table[...]
    told = prefix.adapt(label_B, slots_l)
    for b in range(2):
        for i, slot in enumerate((0, 3, 10)):
            np.testing.assert_allclose(told[b, i], labels[label_B[b]] + steps[slot], rtol=1e-6)
    assert steps.shape == (9 + 100, 8)  # as RAR's files have it
    np.testing.assert_array_equal(prefix(label_B)[:, 1], labels[label_B])
    assert not np.asarray(prefix(label_B)[:, 0]).any()  # published: a vector of zeros at first


@pytest.fixture(scope="module")
def captions():
    prefix = conditioning.Captions(0, 8, 9, texts=(4, 6), **OPTIONS)
    features = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
    return prefix, interfaces.Text(features, jnp.asarray([[0, 0, 1, 1], [1, 1, 1, 1]]))


def test_captions_are_two_maps_with_a_gelu_between(captions):
    prefix, text = captions
    hidden, dense = (np.asarray(m.kernel[...], np.float64) for m in (prefix.hidden, prefix.dense))
    x = np.asarray(text.features_BTE, np.float64) @ hidden
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(prefix(text), x @ dense, rtol=1e-4, atol=1e-7)


def test_padding_is_seen_by_itself_alone(captions):
    prefix, text = captions
    slots = 7
    seen = np.asarray(prefix.seen(text, jnp.arange(slots), slots))
    mask = np.asarray(text.mask_BT)
    for b in range(2):
        for i in range(slots):
            for j in range(slots):
                valid = j >= 4 or mask[b, j] or i == j
                assert seen[b, 0, i, j] == (j <= i and bool(valid))
    # a single slot asks for its own row alone
    one = prefix.seen(text, jnp.asarray([5]), slots)
    np.testing.assert_array_equal(one[:, :, 0], seen[:, :, 5])
    np.testing.assert_array_equal(prefix.rule(text, slots).written(), seen)
    label = conditioning.Label(5, 8, 9, **OPTIONS)
    np.testing.assert_array_equal(label.rule(None, 3).written(), label.seen(None, jnp.arange(3), 3))


def test_no_text_is_a_fixed_draw_padded_alike(captions):
    prefix, text = captions
    null = prefix.null(text)
    np.testing.assert_array_equal(null.features_BTE[0], prefix.absent[...])
    np.testing.assert_array_equal(null.features_BTE[1], prefix.absent[...])
    np.testing.assert_array_equal(null.mask_BT, text.mask_BT)
    # it is no parameter: nothing trains it
    assert all("absent" not in str(path) for path, _ in _leaves(nnx.state(prefix, nnx.Param)))


def test_texts_of_another_form_are_refused(captions):
    prefix, text = captions
    for channels, length in ((6, 3), (5, 4)):
        other = interfaces.Text(jnp.zeros((2, length, channels)), text.mask_BT[:, :length])
        for asked in (prefix, prefix.null):
            said = f"4 features of 6 channels; found {length} of {channels}"
            with pytest.raises(interfaces.UserError, match=said):
                asked(other)


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_unknown_conditioning_is_told():
    with pytest.raises(ValueError, match="label.*cls_label.*captions.*found 'text'"):
        conditioning.named("text")
