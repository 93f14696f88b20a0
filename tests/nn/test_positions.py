import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.nn import positions
from tokgen.nn.precision import FLOAT32

LAYOUT = interfaces.TokenLayout((16,), ((3, 4),))


def _make(kind, prefix, width=16, heads=2):
    return kind(LAYOUT, prefix, width, heads, precision=FLOAT32, rngs=nnx.Rngs(0))


def _orders():
    """[B, L] two orders, so that place and position differ."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(12), np.arange(12)])


def test_frequencies_are_the_published_ones():
    angles = positions.rotary_angles((2, 2), 64)
    assert angles.shape == (4, 32)
    # cell (1, 0) is row 2 of the table: its first half holds the frequencies themselves
    frequencies = angles[2, :16]
    known = [1.00000000, 0.56234133, 0.31622777, 0.17782794]
    np.testing.assert_allclose(frequencies[:4], known, atol=5e-9)
    np.testing.assert_allclose(frequencies[15], 0.00017783, atol=5e-9)
    np.testing.assert_array_equal(angles[0], 0)
    np.testing.assert_array_equal(angles[2, 16:], 0)
    np.testing.assert_array_equal(angles[1], np.concatenate([np.zeros(16), frequencies]))
    with pytest.raises(ValueError, match="divisible by 4; found 10"):
        positions.rotary_angles((2, 2), 10)


def test_angles_go_by_row_then_by_column():
    rows, columns, size = 3, 5, 8
    expected = [
        [r * 10000 ** (-2 * j / (size / 2)) for j in range(size // 4)]
        + [c * 10000 ** (-2 * j / (size / 2)) for j in range(size // 4)]
        for r in range(rows)
        for c in range(columns)
    ]
    np.testing.assert_allclose(positions.rotary_angles((rows, columns), size), expected)


def test_rotation_is_a_product_of_complex_numbers():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
    angles = rng.normal(size=(2, 1, 5, 4))
    numbers = x[..., 0::2].astype(np.float64) + 1j * x[..., 1::2]
    turned = numbers * np.exp(1j * angles)
    rotary = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    y = np.asarray(positions.rotate(jnp.asarray(x), rotary))
    np.testing.assert_allclose(y[..., 0::2], turned.real, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[..., 1::2], turned.imag, rtol=1e-5, atol=1e-6)


def test_scores_know_the_distance_only():
    rng = np.random.default_rng(2)
    angles = positions.rotary_angles((4, 4), 16)
    cos, sin = (jnp.asarray(f(angles)[None, None], jnp.float32) for f in (np.cos, np.sin))
    q, k = (np.tile(rng.normal(size=16), (16, 1))[None, None] for _ in range(2))
    q, k = (
        np.asarray(positions.rotate(jnp.asarray(x, jnp.float32), (cos, sin)))[0, 0] for x in (q, k)
    )
    scores = q @ k.T
    # one cell down and one to the right, from anywhere
    shifted = [scores[r * 4 + c, (r + 1) * 4 + c + 1] for r in range(3) for c in range(3)]
    np.testing.assert_allclose(shifted, shifted[0], rtol=1e-4, atol=1e-5)
    assert abs(scores[0, 1] - scores[0, 4]) > 1e-3  # right is not down


def test_a_slot_has_the_angle_of_its_position_and_the_prefix_has_zero_rows():
    for prefix in (1, 3):
        rotary = _make(positions.Rotary2D, prefix)
        order, slots = _orders(), np.arange(prefix + 11)
        added, (cos, sin) = rotary(jnp.asarray(order), jnp.asarray(slots))
        assert added is None and cos.shape == (2, 1, prefix + 11, 4)
        angles = positions.rotary_angles((3, 4), 8)
        for b in range(2):
            np.testing.assert_array_equal(cos[b, 0, :prefix], 0)
            np.testing.assert_array_equal(sin[b, 0, :prefix], 0)
            for slot in slots[prefix:]:
                at = angles[order[b, slot - prefix]]
                np.testing.assert_allclose(cos[b, 0, slot], np.cos(at), atol=1e-6)
                np.testing.assert_allclose(sin[b, 0, slot], np.sin(at), atol=1e-6)
    # cell (0, 0): the identity, which zero rows are not
    _, (cos, sin) = rotary(jnp.arange(12)[None], jnp.asarray([3]))
    assert np.all(np.asarray(cos) == 1) and np.all(np.asarray(sin) == 0)


def test_rotary_positions_need_one_grid():
    pyramid = interfaces.TokenLayout((16,), ((1, 1), (2, 2)))
    with pytest.raises(ValueError, match="one grid"):
        positions.Rotary2D(pyramid, 1, 16, 2, precision=FLOAT32, rngs=nnx.Rngs(0))


def test_learned_places_are_rows_of_prefix_then_position():
    learned = _make(positions.Learned, 3)
    order, slots = _orders(), np.arange(14)
    added, rotary = learned(jnp.asarray(order), jnp.asarray(slots))
    assert rotary is None
    table = np.asarray(learned.table[...])
    assert table.shape == (3 + 12, 16)
    for b in range(2):
        for slot in slots:
            row = slot if slot < 3 else 3 + order[b, slot - 3]
            np.testing.assert_array_equal(added[b, slot], table[row])


@pytest.mark.parametrize("prefix", [1, 3])
def test_target_aware_places_also_say_which_position_is_asked_for(prefix):
    places = _make(positions.TargetAware, prefix)
    order, slots = _orders(), np.arange(prefix + 11)
    added, rotary = places(jnp.asarray(order), jnp.asarray(slots))
    assert rotary is None
    own, target = np.asarray(places.own.table[...]), np.asarray(places.target.table[...])
    assert target.shape == (12, 16)
    for b in range(2):
        for slot in slots:
            expected = own[slot if slot < prefix else prefix + order[b, slot - prefix]]
            if slot >= prefix - 1:  # the output of the last slot of the prefix is place 0
                expected = expected + target[order[b, slot - prefix + 1]]
            np.testing.assert_allclose(added[b, slot], expected, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(positions.KINDS))
def test_one_slot_at_a_time_gives_the_same_rows(name):
    places, order = _make(positions.named(name), 1), jnp.asarray(_orders())
    together = _flat(places(order, jnp.arange(12)))
    for slot in (0, 1, 7, 11):
        for whole, alone in zip(together, _flat(places(order, jnp.asarray([slot]))), strict=True):
            np.testing.assert_array_equal(alone[..., 0, :], whole[..., slot, :])


def _flat(rows):
    added, rotary = rows
    return [added] if rotary is None else list(rotary)


def test_an_unknown_kind_of_positions_is_refused():
    with pytest.raises(ValueError, match="target_aware"):
        positions.named("target")
