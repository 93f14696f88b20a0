"""In-painting by every family: what stays, what it depends on, and what is refused."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import tokgen
from tests import recipes
from tests.editing.families import HOW, each
from tokgen import runtime, tokens as coding
from tokgen.editing import edits, redrawing, regions
from tokgen.interfaces import UserError


@functools.cache
def masks():
    """A free form, a half, and one that frees few."""
    mask_NHW = np.zeros((3, 32, 32), bool)
    mask_NHW[0] = np.random.default_rng(1).random((32, 32)) < 0.01
    mask_NHW[1], mask_NHW[2] = (
        regions.region("left", (32, 32)),
        regions.region("box=9,9,3,3", (32, 32)),
    )
    return mask_NHW


@each
def test_kept_tokens_and_pixels_stay_and_nothing_under_the_mask_is_seen(family, model, images):
    found = model(family)
    free_NL = regions.free(masks(), found.layout)
    edits = found.edit(images, [0, 1, 2], mask=masks(), **HOW)
    np.testing.assert_array_equal(edits.image_NHW3[~masks()], images[~masks()])
    filled = [regions.filled(*pair) for pair in zip(images, masks(), strict=True)]
    held = found.encode(np.stack(filled))
    if family != "next_scale":  # whose tokens are what coarser ones leave: below
        np.testing.assert_array_equal(edits.tokens_NLG[~free_NL], held[~free_NL])
    # the same, alone, in another batch, and with other pixels under the mask
    other = np.where(masks()[..., None], 255 - images, images)
    for i in range(3):
        own = found.edit(other[i : i + 1], i, mask=masks()[i], **HOW)
        np.testing.assert_array_equal(own.image_NHW3[0], edits.image_NHW3[i])
    again = found.edit(images, [0, 1, 2], mask=masks(), seed=1, **HOW)
    assert (again.image_NHW3 != edits.image_NHW3).any()


@pytest.mark.long
def test_of_scales_what_is_kept_is_what_the_drawn_coarse_tokens_leave_of_it(model, images):
    found = model("next_scale")
    free_NL, encoder = regions.free(masks(), found.layout), found.tokenizer.encoder
    edits = found.edit(images, [0, 1, 2], mask=masks(), **HOW)
    filled = [regions.filled(*pair) for pair in zip(images, masks(), strict=True)]
    kept_NPC = coding.latents(encoder, np.stack(filled))
    codec = encoder.module.quantizer
    known = [codec.empty(3), *codec.partial(jnp.asarray(edits.tokens_NLG))]
    left = [codec.left(jnp.asarray(kept_NPC), k, scale) for scale, k in enumerate(known[:-1])]
    left_NLG = np.concatenate([np.asarray(tokens_NlG) for tokens_NlG in left], axis=1)
    np.testing.assert_array_equal(edits.tokens_NLG[~free_NL], left_NLG[~free_NL])
    assert free_NL[:, 0].all() and not free_NL.all(), "else nothing was asked"


@each
def test_nothing_masked_is_the_image_and_everything_is_a_sample(family, model, images):
    found = model(family)
    edits = found.edit(images, 4, mask=np.zeros((32, 32), bool), **HOW)
    np.testing.assert_array_equal(edits.image_NHW3, images)
    edits = found.edit(images, 4, mask="all", number=2, batch=2, **HOW)
    samples = found.sample([4], number=2, progress=False)
    for i in range(3):
        np.testing.assert_array_equal(edits.image_NHW3[2 * i : 2 * i + 2], samples.image_NHW3)


def test_gray_images_stay_gray(tmp_path, monkeypatch, images):
    monkeypatch.setattr(runtime, "devices", lambda batch_size=0: None)
    recipes.tiny(tmp_path, "masked", channels=1)
    found, gray = tokgen.load(tmp_path / "runs" / "generator"), images[..., :1]
    edits = found.edit(gray, 3, mask="left", **HOW)
    assert edits.image_NHW3.shape == gray.shape and edits.sheet().shape[-1] == 1
    np.testing.assert_array_equal(edits.image_NHW3[:, :, 16:], gray[:, :, 16:])
    grown = found.edit(gray[:1], 3, grow="right=8", **HOW)
    assert grown.images[0].mode == "L" and grown.images[0].size == (40, 32)
    np.testing.assert_array_equal(grown.image_NHW3[0, :, :32], gray[0])
    trace = found.trace(3)
    assert trace.image_NHW3.shape == (1, 32, 32, 1) and trace.gif()[:3] == b"GIF"


@each
def test_blind_is_who_draws_before_what_is_held(family, model):
    """Against a loop over all pairs of tokens."""
    generator = model(family).loaded.module
    free_NL = np.random.default_rng(2).random((40, generator.layout.length)) < 0.05
    free_NL[:10] = np.arange(generator.layout.length) >= 60
    found_N = redrawing.blind(generator, free_NL)
    step_L = np.arange(64)
    if family == "next_scale":
        step_L = np.repeat([0, 1, 2, 3], [1, 4, 16, 64])
    for free_L, found in zip(free_NL, found_N, strict=True):
        pairs = free_L[:, None] & ~free_L[None] & (step_L[:, None] <= step_L[None])
        assert found == (pairs.any() and family in ("raster", "next_scale"))
    assert found_N.any() == (family in ("raster", "next_scale"))


def test_a_sheet_shows_what_goes_and_what_came(model, images):
    edits = model("masked").edit(images[:2], 4, mask="left", number=3, **HOW)
    assert repr(edits) == "6 edits of 2 images, 32 x 32 pixels"
    np.testing.assert_array_equal(edits.source_N, [0, 0, 0, 1, 1, 1])
    sheet = edits.sheet()
    assert sheet.shape == (2 * 66 + 2, 4 * 66 + 2, 3)  # each pixel twice, two between
    np.testing.assert_array_equal(sheet[2:66:2, 34:66:2], images[0, :, 16:])
    np.testing.assert_array_equal(sheet[2:66:2, 68:132:2], edits.image_NHW3[0])
    assert edits._repr_png_()[:4] == b"\x89PNG"


def test_gray_lies_over_a_part_and_never_over_all():
    image_KHW3 = np.arange(3 * 32 * 32 * 3).reshape(3, 32, 32, 3).astype(np.uint8)
    for columns, shown in ((16, False), (32, True)):
        mask_KHW = np.zeros((3, 32, 32), bool)
        mask_KHW[:, :, :columns] = True
        found = edits.Edits(image_KHW3, None, np.arange(3), image_KHW3, mask_KHW)
        first = found.first(2).sheet()[2 : 2 + 64 : 2, 2 : 2 + 64 : 2]
        assert (first[:, 16:] == image_KHW3[0, :, 16:]).all()
        assert (first[:, :16] == image_KHW3[0, :, :16]).all() == shown


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(), "one of --mask"),
        (dict(mask="left", strength=0.5), "--mask and --strength"),
        (dict(mask="left", number=0), "number"),
        (dict(mask="left", particles=0), "particles"),
        (dict(mask="left", feather=-1.0), "feather"),
        (dict(mask=["left", "right"]), "one for each of 3; found 2"),
        (dict(mask="leftt"), "no file"),
        (dict(mask="left", feather="3"), "feather"),
        (dict(mask=5), "found int"),
        (dict(mask=np.ones((32, 32), np.uint8)), r"astype\(bool\)"),
        (dict(strength="0.3"), "strength"),
        (dict(scales=1.5), "scales must be a whole number"),
        (dict(grow=8), "right=128"),
        (dict(grow="right=8", overlap="half"), "overlap"),
        (dict(mask="left", candidates=1.5), "candidates must be a whole number"),
        (dict(mask="left", candidates=2, rank=None), "--rank is likelihood"),
        (dict(strength=0.0), "above 0"),
        (dict(strength=1.5), "at most 1"),
        (dict(grow="right"), "right=128"),
        (dict(grow="right=0"), "right=128"),
        (dict(grow="right=8", overlap=1.0), "overlap"),
        (dict(scales=1), "next-scale"),
        (dict(mask="left", classes=77), "77"),
        (dict(mask="left", classes=None), "class of each image is needed"),
    ],
)
def test_what_cannot_be_drawn_is_refused(asked, words, model, images):
    with pytest.raises(UserError, match=words):
        model("masked").edit(
            images, **({"classes": 3} | asked), **{k: v for k, v in HOW.items() if k not in asked}
        )
