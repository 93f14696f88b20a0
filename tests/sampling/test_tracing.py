"""What of an image is known after each step, against a decode that is watched."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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


class Painter(nnx.Module):
    """Every token is its own shade of gray."""

    def __init__(self, layout: TokenLayout, side: int):
        self.layout, self.side = layout, side
        self.quantizer = types.SimpleNamespace(
            decode=lambda tokens_BLG: tokens_BLG / 10.0, partial=self._partial
        )

    def _partial(self, tokens_BLG):
        spans = self.layout.spans
        return [
            jnp.repeat(tokens_BLG[:, start : start + size] / 10.0, self.side**2 // size, axis=1)
            for start, size in spans
        ]

    def decode_latents(self, latents_BPC):
        """[B, side, side, 3]: cells of one shade."""
        B, P, _ = latents_BPC.shape
        grid = int(P**0.5)
        image_BHW = latents_BPC.reshape(B, grid, grid)
        each = self.side // grid
        image_BHW = jnp.repeat(jnp.repeat(image_BHW, each, 1), each, 2)
        return jnp.repeat(image_BHW[..., None], 3, -1)


def test_cells_appear_when_they_are_drawn_and_stay():
    layout = TokenLayout((10,), ((4, 4),))
    painter = Painter(layout, 8)
    numbers = np.random.default_rng(0)
    tokens_BLG = numbers.integers(0, 10, (2, 16, 1))
    when_BL = np.stack([numbers.permutation(16), np.arange(16)])
    when_BL[1, 3] = -1  # given
    after_S = tracing.shown(layout, 16, when_BL)
    np.testing.assert_array_equal(after_S, np.arange(17))
    frames = tracing._of_places(painter, tokens_BLG, when_BL, after_S)
    for step, frame_BHW3 in enumerate(frames):
        for b in range(2):
            for place in range(16):
                cell = frame_BHW3[b, place // 4 * 2 :, place % 4 * 2 :][:2, :2]
                known = when_BL[b, place] < step
                shade = round(255 * tokens_BLG[b, place, 0] / 10) if known else tracing.GRAY
                assert (np.abs(cell.astype(int) - shade) <= 1).all()


def test_of_many_steps_some_are_shown_and_the_last_always():
    one, grids = TokenLayout((10,), ((16, 16),)), TokenLayout((10,), ((1, 1), (2, 2), (4, 4)))
    after_S = tracing.shown(one, 256, np.zeros((1, 256), int))
    assert len(after_S) == 1 + tracing.FRAMES and (np.diff(after_S) > 0).all()
    assert after_S[0] == 0 and after_S[-1] == 256
    raster = np.arange(21)[None]  # one token at a time over grids: a frame for each grid
    np.testing.assert_array_equal(tracing.shown(grids, 21, raster), [0, 1, 5, 21])


def test_tokens_without_a_place_and_scales_are_decoded_as_far_as_they_are_known():
    row = TokenLayout((10,), ((1, 16),))
    tokens_BLG = np.random.default_rng(1).integers(0, 10, (2, 16, 1))
    when_BL = np.tile(np.arange(16), (2, 1))
    painter = Painter(row, 4)
    frames = tracing._of_all(painter, tokens_BLG, when_BL, np.array([0, 5, 16]))
    shades = np.rint(255 * tokens_BLG[..., 0] / 10).reshape(2, 4, 4)
    mean = np.rint(255 * tokens_BLG.mean(1) / 10)
    np.testing.assert_allclose(frames[2][..., 0], shades, atol=1)
    np.testing.assert_allclose(
        frames[1][..., 0].reshape(2, -1)[:, :5], shades.reshape(2, -1)[:, :5], atol=1
    )
    np.testing.assert_allclose(frames[1][..., 0].reshape(2, -1)[:, 5:], mean + np.zeros(11), atol=1)
    assert (frames[0] == tracing.GRAY).all()

    grids = TokenLayout((10,), ((1, 1), (2, 2), (4, 4)))
    tokens_BLG = np.random.default_rng(1).integers(0, 10, (2, 21, 1))
    painter = Painter(grids, 4)
    frames = tracing._of_scales(painter, tokens_BLG, None, None)
    assert len(frames) == 4
    np.testing.assert_allclose(
        frames[3][..., 0].reshape(2, -1), np.rint(255 * tokens_BLG[:, 5:, 0] / 10), atol=1
    )
