import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen import interfaces

FLAT = interfaces.TokenLayout((1024,), ((16, 16),))
LINE = interfaces.TokenLayout((4096,), ((1, 32),))
HALVES = interfaces.TokenLayout((64, 4096), ((16, 16),))
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PYRAMID = interfaces.TokenLayout((4096,), tuple((side, side) for side in SIDES))
OBLONG = interfaces.TokenLayout((5, 3, 7), ((2, 3), (4, 6)))
LAYOUTS = (FLAT, LINE, HALVES, PYRAMID, OBLONG)


@pytest.mark.parametrize(
    "layout, groups, absent, length",
    [
        (FLAT, 1, 1024, 256),
        (LINE, 1, 4096, 32),
        (HALVES, 2, 4096, 256),
        (PYRAMID, 1, 4096, 680),
        (OBLONG, 3, 7, 30),
    ],
)
def test_the_figures_of_published_layouts(layout, groups, absent, length):
    assert (layout.groups, layout.absent, layout.length) == (groups, absent, length)


def test_spans_follow_each_other():
    three = interfaces.TokenLayout((8,), ((1, 1), (2, 2), (3, 3)))
    assert three.spans == ((0, 1), (1, 4), (5, 9))
    for layout in LAYOUTS:
        place = 0
        for (start, size), (rows, columns) in zip(layout.spans, layout.grids, strict=True):
            assert (start, size) == (place, rows * columns)
            place += size
        assert place == layout.length


def test_a_layout_survives_json_and_stays_hashable():
    for layout in LAYOUTS:
        again = interfaces.TokenLayout.from_json(json.loads(json.dumps(layout.to_json())))
        assert again == layout and hash(again) == hash(layout)
    listed = interfaces.TokenLayout([1024], [[16, 16]])
    assert listed == FLAT and hash(listed) == hash(FLAT)
    assert interfaces.TokenLayout((1024,), ((8, 32),)) != FLAT  # the same length, another grid


@pytest.mark.parametrize(
    "vocab, grids", [((), ((1, 1),)), ((8, 1), ((1, 1),)), ((8,), ()), ((8,), ((4, 0),))]
)
def test_a_layout_of_nothing_is_refused(vocab, grids):
    with pytest.raises(ValueError, match="needs"):
        interfaces.TokenLayout(vocab, grids)


@pytest.mark.parametrize("phase", [interfaces.Phase(3, 4, 10, 5, 40), interfaces.Phase(0, 6, 0, 1)])
def test_a_split_phase_handles_the_same_places(phase):
    def handled(phase):
        places = []
        for index in range(phase.first, phase.first + phase.steps):
            first = phase.place(index)
            places.append((index, tuple(range(first, first + phase.size))))
        return places

    places = handled(phase)
    assert places[0][1][0] == phase.start
    flat = [place for _, group in places for place in group]
    assert flat == list(range(phase.start, phase.start + phase.steps * phase.size))
    for index in range(phase.first + 1, phase.first + phase.steps):
        left, right = phase.split(index)
        assert right.first == index and left.steps + right.steps == phase.steps
        assert handled(left) + handled(right) == places
        assert left.slots == right.slots == phase.slots
    traced = jax.jit(phase.place)(phase.first + 2)
    assert int(traced) == phase.place(phase.first + 2)


def _state(given_BLG):
    B, L, G = given_BLG.shape
    tokens_BLG = jnp.where(given_BLG, jnp.arange(B * L * G).reshape(B, L, G), 99)
    return interfaces.DecodeState(
        tokens_BLG=tokens_BLG,
        given_BLG=given_BLG,
        order_BL=jnp.broadcast_to(jnp.arange(L), (B, L)),
        cond=jnp.zeros(B, jnp.int32),
        keys_B=jax.random.split(jax.random.key(0), B),
    )


def test_writing_never_touches_a_given_token():
    rng = np.random.default_rng(0)
    B, L, G, l = 3, 9, 2, 4  # noqa: E741  (the axis)
    given_BLG = rng.uniform(size=(B, L, G)) < 0.4  # one symbol of a position may be given alone
    positions_Bl = np.stack([rng.permutation(L)[:l] for _ in range(B)])
    drawn_BlG = 200 + rng.integers(0, 9, (B, l, G))
    state = _state(jnp.asarray(given_BLG))
    after = state.write(jnp.asarray(positions_Bl), jnp.asarray(drawn_BlG))
    expected_BLG = np.array(state.tokens_BLG)
    for b in range(B):
        for j in range(l):
            for g in range(G):
                if not given_BLG[b, positions_Bl[b, j], g]:
                    expected_BLG[b, positions_Bl[b, j], g] = drawn_BlG[b, j, g]
    np.testing.assert_array_equal(after.tokens_BLG, expected_BLG)
    assert np.any(expected_BLG != np.asarray(state.tokens_BLG))
    for b in range(B):
        np.testing.assert_array_equal(
            after.read(jnp.asarray(positions_Bl))[b], expected_BLG[b, positions_Bl[b]]
        )
    for field in dataclasses.fields(state):
        if field.name != "tokens_BLG":
            assert getattr(after, field.name) is getattr(state, field.name)


def test_no_message_says_where_an_object_lies():
    told = str(interfaces.UserError(f"cannot read {object()} or {(lambda: 0)}"))
    assert "0x" not in told and "cannot read <object>" in told
