"""What of an image is known after each step, against a decode that is watched."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generators import test_contract
from tokgen import rng
from tokgen.interfaces import TokenLayout
from tokgen.sampling import decode, sampler, tracing


@pytest.mark.parametrize(
    "name",
    [
        "autoregressive",
        pytest.param("rar", marks=pytest.mark.long),
        pytest.param("factor", marks=pytest.mark.long),
        "masked",
        pytest.param("next_scale", marks=pytest.mark.long),
    ],
)
def test_the_step_of_each_position_is_the_one_that_drew_it(name):
    generator, codec, cond = test_contract.make(name)
    keys_B, seen = rng.per_image(0, "sample", jnp.arange(test_contract.B)), []
    asked = (generator, codec, jax.tree.map(jnp.asarray, cond), sampler.Sampler(top_k=3))

    def observe(state, index):
        seen.append(np.asarray(state.tokens_BLG))

    decode.generate(*asked, keys_B=keys_B, observe=observe)
    state = decode.generate(*asked, keys_B=keys_B, noted=True)
    seen.append(np.asarray(state.tokens_BLG))
    known_SBL = (np.stack(seen) != generator.layout.absent).all(-1)
    assert known_SBL[-1].all() and not known_SBL[0].any()
    np.testing.assert_array_equal(state.when_BL, known_SBL.argmax(0) - 1)


def painted(layout: TokenLayout, side: int):
    """Pixels in the place of a tokenizer's: a token is a shade, of its cell, or of a place."""

    def partial(tokens_BLG):
        spans = layout.spans
        sums = [
            np.repeat(tokens_BLG[:, start : start + size], side**2 // size, axis=1)
            for start, size in spans
        ]
        return list(np.cumsum(sums, 0))

    quantizer = types.SimpleNamespace(decode=lambda tokens_BLG: tokens_BLG / 1.0, partial=partial)

    def pixels(latents, *arrays, scale=0):
        latents_BPC = np.asarray(latents(quantizer, scale, *arrays))
        grid = int(latents_BPC.shape[1] ** 0.5)
        image_BHW = latents_BPC.reshape(-1, grid, grid)
        each = side // grid
        return np.rint(image_BHW.repeat(each, 1).repeat(each, 2)[..., None]).astype(np.uint8)

    return pixels


def test_cells_appear_when_they_are_drawn_and_stay():
    layout = TokenLayout((10,), ((4, 4),))
    numbers = np.random.default_rng(0)
    tokens_BLG = numbers.integers(0, 10, (2, 16, 1))
    when_BL = np.stack([numbers.permutation(16), np.arange(16)])
    when_BL[1, 3] = -1  # given
    after_S = tracing.shown(layout, 16, when_BL)
    np.testing.assert_array_equal(after_S, np.arange(17))
    frames = tracing._of_places(painted(layout, 8), layout, tokens_BLG, when_BL, after_S)
    for step, frame_BHW1 in enumerate(frames):
        for b in range(2):
            for place in range(16):
                cell = frame_BHW1[b, place // 4 * 2 :, place % 4 * 2 :][:2, :2]
                known = when_BL[b, place] < step
                assert (cell == (tokens_BLG[b, place, 0] if known else tracing.GRAY)).all()


def test_of_many_steps_some_are_shown_and_the_last_always():
    one, grids = TokenLayout((10,), ((16, 16),)), TokenLayout((10,), ((1, 1), (2, 2), (4, 4)))
    after_S = tracing.shown(one, 256, np.zeros((1, 256), int))
    assert len(after_S) == 1 + tracing.FRAMES and (np.diff(after_S) > 0).all()
    assert after_S[0] == 0 and after_S[-1] == 256
    raster = np.arange(21)[None]  # one token at a time over grids: a frame for each grid
    np.testing.assert_array_equal(tracing.shown(grids, 21, raster), [0, 1, 5, 21])
    mixed = np.random.default_rng(2).permutation(21)[None]  # as a masked generator may: in turn
    np.testing.assert_array_equal(tracing.shown(grids, 21, mixed), np.arange(22))


def test_tokens_without_a_place_are_decoded_as_far_as_they_are_known():
    row = TokenLayout((10,), ((1, 16),))
    tokens_BLG = np.random.default_rng(1).integers(0, 10, (2, 16, 1))
    when_BL = np.tile(np.arange(16), (2, 1))
    asked = (painted(row, 4), row, tokens_BLG, when_BL)
    frames = tracing._of_all(*asked, np.array([0, 5, 16]))[..., 0].reshape(3, 2, 16)
    known_BL = np.arange(16)[None] < 5
    np.testing.assert_array_equal(frames[2], tokens_BLG[..., 0])
    first = np.where(known_BL, tokens_BLG[..., 0], np.rint(tokens_BLG.mean(1)))
    np.testing.assert_array_equal(frames[1], first)
    assert (frames[0] == tracing.GRAY).all()


def test_grids_add_up_in_their_order_and_out_of_it_a_cell_waits_for_all_of_its_tokens():
    grids = TokenLayout((10,), ((1, 1), (2, 2), (4, 4)))
    numbers = np.random.default_rng(1)
    tokens_BLG = numbers.integers(0, 10, (2, 21, 1))
    one, four, all_ = (tokens_BLG[:, a:b, 0] for a, b in ((0, 1), (1, 5), (5, 21)))
    frames = tracing._of_grids(painted(grids, 4), grids, tokens_BLG, None, None)
    sums = [np.repeat(one, 16, 1), np.repeat(four, 4, 1), all_]
    for grid in range(3):
        found = frames[1 + grid][..., 0].reshape(2, -1)
        np.testing.assert_array_equal(found, sum(sums[: grid + 1]))
    assert (frames[0] == tracing.GRAY).all() and len(frames) == 4

    when_BL = np.stack([numbers.permutation(21) for _ in range(2)])
    assert not tracing.grid_by_grid(grids, when_BL)

    def pixels(latents, tokens_BLG, scale=0):
        return np.ones((2, 4, 4, 1), np.uint8)

    frames = tracing._of_places(pixels, grids, tokens_BLG, when_BL, np.arange(22))
    for step, frame_BHW1 in enumerate(frames):
        for b in range(2):
            for row in range(4):
                for column in range(4):
                    its = (0, 1 + row // 2 * 2 + column // 2, 5 + row * 4 + column)
                    known = all(when_BL[b, place] < step for place in its)
                    assert (frame_BHW1[b, row, column] == 1) == known
