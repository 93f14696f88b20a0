"""The pyramid against a residual loop in float64, its four readings, and what it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import parameters
from tokgen.nn import resample
from tokgen.quantizers import gaussian, multiscale, vq

CODES, CHANNELS, SCALES, GRID = 12, 3, (1, (2, 3), 4), (4, 4)
INNER = dict(name="vq", codes=CODES, channels=CHANNELS, normalize=False)


def build(inner=INNER, scales=SCALES, grid=GRID, **options):
    return multiscale.Quantizer(inner, scales, grid=grid, rngs=nnx.Rngs(2), **options)


@jax.jit
def kept_up(quantizer, latents_BPC, key):
    quantizer.maintain(latents_BPC, key=key)
    return quantizer


@jax.jit
def read(quantizer, latents_BPC):
    """(tokens, what is known after each scale, what training returns)"""
    tokens_BLG = quantizer.encode(latents_BPC)
    return tokens_BLG, quantizer.partial(tokens_BLG), quantizer(latents_BPC)


def latents(key, batch=3, positions=16):
    return 2 * jax.random.normal(key, (batch, positions, CHANNELS))


def resized(image_HWC, size, matrix):
    rows, columns = (
        matrix(a, b).astype(np.float64) for a, b in zip(image_HWC.shape[:2], size, strict=True)
    )
    return np.einsum("hH,HWC,wW->hwC", rows, image_HWC, columns)


def convolved(image_HWC, phi):
    """A 3 x 3 convolution with zeros around, one position at a time."""
    kernel, bias = (np.asarray(p[...], np.float64) for p in (phi.kernel, phi.bias))
    padded = np.pad(image_HWC, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros_like(image_HWC)
    for r, c in np.ndindex(*image_HWC.shape[:2]):
        window = padded[r : r + 3, c : c + 3]
        out[r, c] = np.einsum("ijI,ijIO->O", window, kernel) + bias
    return out


def written_out(quantizer, latents_PC, which):
    """(tokens of each scale, latents known after each) of one image, in float64."""
    grids = quantizer.layout.grids
    rows = np.asarray(quantizer.inner.codebook[...], np.float64)
    rest = np.asarray(latents_PC, np.float64).reshape(*grids[-1], -1)
    known, tokens, sums = np.zeros_like(rest), [], []
    for scale, grid in enumerate(grids):
        small = resized(rest, grid, resample.area)
        chosen = ((small[:, :, None] - rows[None, None]) ** 2).sum(-1).argmin(-1)
        painted = resized(rows[chosen], grids[-1], resample.bicubic_torch)
        if which:
            painted = 0.5 * painted + 0.5 * convolved(painted, quantizer.convs[which[scale]])
        known, rest = known + painted, rest - painted
        tokens.append(chosen.ravel())
        sums.append(known.reshape(-1, known.shape[-1]))
    return tokens, sums


@pytest.mark.parametrize(("phi", "which"), [(2, (0, 0, 1)), (3, (0, 1, 2)), (0, ())])
def test_the_residual_loop(phi, which, key):
    quantizer = build(phi=phi)
    for number, conv in enumerate(quantizer.convs):
        conv.bias[...] = 0.1 * jax.random.normal(jax.random.fold_in(key, number), conv.bias.shape)
    latents_BPC = latents(key)
    tokens_BLG, known, out = read(quantizer, latents_BPC)
    for image in range(len(latents_BPC)):
        tokens, sums = written_out(quantizer, latents_BPC[image], which)
        np.testing.assert_array_equal(tokens_BLG[image, :, 0], np.concatenate(tokens))
        for found, expected in zip(known, sums, strict=True):
            np.testing.assert_allclose(found[image], expected, atol=1e-4)
    np.testing.assert_array_equal(out.tokens_BLG, tokens_BLG)
    # mean over scales of the error of the running sum
    error = np.mean([np.mean((np.asarray(k) - np.asarray(latents_BPC)) ** 2) for k in known])
    assert set(out.losses) == {"codebook", "commitment"}
    for loss in out.losses.values():
        np.testing.assert_allclose(loss, error, rtol=1e-5)


def test_what_a_generator_sees_step_by_step_is_what_it_was_taught(key):
    quantizer = build()
    latents_BPC = latents(key)
    tokens_BLG = quantizer.encode(latents_BPC)
    known_BPC, seen = quantizer.empty(len(latents_BPC)), []
    for scale, (start, size) in enumerate(quantizer.layout.spans):
        view_BlC = quantizer.view(known_BPC, scale)
        assert view_BlC.shape == (3, size, CHANNELS)
        seen.append(view_BlC)
        known_BPC = quantizer.absorb(known_BPC, tokens_BLG[:, start : start + size], scale)
    assert not np.asarray(seen[0]).any()
    taught_BlC = quantizer.known_before(tokens_BLG)
    np.testing.assert_allclose(jnp.concatenate(seen[1:], 1), taught_BlC, atol=1e-5)
    np.testing.assert_allclose(quantizer.decode(tokens_BLG), known_BPC, atol=1e-5)
    # teacher forcing does not look ahead: the last scale's tokens are in none of it
    other_BLG = tokens_BLG.at[:, -16:].set(0)
    np.testing.assert_array_equal(quantizer.known_before(other_BLG), taught_BlC)


def test_phi_of_each_scale_as_published():
    assert multiscale.shared(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert multiscale.shared(14, 4) == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    assert multiscale.shared(10, 10) == tuple(range(10))
    assert multiscale.shared(5, 1) == (0,) * 5 and multiscale.shared(1, 2) == (0,)
    for scales, length in (
        (multiscale.VAR_256, 680),
        (multiscale.VAR_512, 2240),
        (multiscale.VAR_1024, 9451),
    ):
        side = scales[-1]
        quantizer = nnx.eval_shape(lambda s=scales, n=side: build(scales=s, grid=(n, n)))
        assert quantizer.layout.length == length


@pytest.mark.parametrize("scales", [(4,) * 6, (4, 4, 4)])
def test_the_error_does_not_grow_with_depth(scales, key):
    """With a row of zeros a position may always stay where it is; whatever the latents."""
    quantizer = build(scales=scales, phi=0)
    quantizer.inner.codebook[...] = quantizer.inner.codebook[...].at[0].set(0.0)
    for spread in (0.1, 1.0, 10.0):
        latents_BPC = spread * latents(key)
        _, known, _ = read(quantizer, latents_BPC)
        errors = [
            jnp.sum((k - latents_BPC) ** 2, -1) for k in [jnp.zeros_like(latents_BPC), *known]
        ]
        for before, after in zip(errors, errors[1:], strict=False):
            assert (after <= before * (1 + 1e-5) + 1e-6).all()
        assert jnp.mean(errors[-1]) < 0.99 * jnp.mean(errors[0])


def test_finer_scales_of_a_pyramid_from_data_see_less_and_less(key):
    """Area down, bicubic up, rows taken from the residuals by the first upkeep of each round."""
    quantizer = build(scales=(1, 2, 3, 4), phi=0)
    smooth = resample.resize(
        2 * jax.random.normal(key, (32, 2, 2, CHANNELS)), GRID, resample.bicubic_torch
    )
    latents_BPC = smooth.reshape(32, 16, CHANNELS)
    for step in range(8):
        quantizer = kept_up(quantizer, latents_BPC, jax.random.fold_in(key, step))
    _, known, _ = read(quantizer, latents_BPC)
    errors = [float(jnp.mean((k - latents_BPC) ** 2)) for k in known]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0] < 0.5 * float(jnp.mean(latents_BPC**2))


def test_hits_are_counted_first_whole_then_quickly_then_slowly(key):
    quantizer = build()
    counts = None
    for step in (0, 1, 2):
        latents_BPC = latents(jax.random.fold_in(key, step))
        tokens_BLG = np.asarray(quantizer.encode(latents_BPC))
        hits = np.array(
            [
                np.bincount(tokens_BLG[:, start : start + size, 0].ravel(), minlength=CODES)
                for start, size in quantizer.layout.spans
            ]
        )
        decay = (0.0, 0.9, 0.99)[step]
        counts = hits if step == 0 else decay * counts + (1 - decay) * hits
        if step == 2:
            quantizer.updates[...] = jnp.asarray(100, jnp.int32)
        quantizer = kept_up(quantizer, latents_BPC, key)
        np.testing.assert_allclose(quantizer.counts[...][:, 0], counts, atol=1e-5)
    usage = quantizer.usage(48)
    assert usage.shape == (3, 1)
    np.testing.assert_allclose(usage[:, 0], (counts >= 48 / CODES * 0.08).mean(-1), atol=1e-6)
    assert 0 < usage[0, 0] < usage[-1, 0] <= 1


def test_the_inner_quantizer_is_kept_up_with_what_it_saw(key):
    """Its first upkeep takes all its rows from the residuals of all scales."""
    quantizer = build(phi=0)
    latents_BPC, seen = latents(key), []
    list(
        quantizer._walk(
            latents_BPC, lambda rest, scale: seen.append(rest) or quantizer.inner.encode(rest)
        )
    )
    seen_nC = np.concatenate([np.asarray(rest).reshape(-1, CHANNELS) for rest in seen])
    quantizer.maintain(latents_BPC, key=key)
    rows_VC = np.asarray(quantizer.inner.codebook[...])
    assert (rows_VC[:, None] == seen_nC[None]).all(-1).any(-1).all()


def test_gradients_reach_rows_and_convolutions_by_the_codebook_loss_only(key):
    graph, params, stats = parameters.split(build())

    def loss(params, name):
        return parameters.merge(graph, params, stats)(latents(key)).losses[name]

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    moved = gradient(params, "codebook")
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(moved["inner"]))
    assert np.asarray(moved["convs"][0]["kernel"]).any()
    held = gradient(params, "commitment")
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(held))


@pytest.mark.parametrize(
    "inner",
    [
        dict(name="fsq", levels=(5, 5, 5)),
        dict(name="lfq", bits=3, groups=(1, 2), temperature=1.0),
        dict(name="bsq", bits=3, order="big", temperature=1.0),
        dict(name="ibq", codes=16, channels=3),
        dict(name="vq", codes=16, channels=3, temperature=0.5),
        vq.Quantizer(8, 3, grid=GRID, rngs=nnx.Rngs(0)),
    ],
    ids=["fsq", "lfq", "bsq", "ibq", "vq", "module"],
)
def test_any_discrete_quantizer_inside(inner, key):
    quantizer = build(inner, scales=(1, 4), phi=1)
    latents_BPC = latents(key)
    _, known, out = read(quantizer, latents_BPC)
    assert out.tokens_BLG.shape == (3, 17, quantizer.layout.groups)
    np.testing.assert_allclose(out.latents_BPC, known[-1], atol=1e-5)
    wanted = {"codebook", "commitment"}
    if isinstance(inner, dict) and "temperature" in inner:
        wanted |= {"sample_entropy", "batch_entropy"}
    assert wanted <= set(out.losses)
    quantizer = kept_up(quantizer, latents_BPC, key)
    assert quantizer.usage(48).shape == (2, quantizer.layout.groups)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(scales=(1, 2)), "latent grid"),
        (dict(scales=()), "1 to 64 entries"),
        (dict(phi=-1), "phi"),
        (dict(ratio=1.5), "ratio"),
        (dict(scales=(1, (5, 1), 4)), "larger than"),
        (dict(inner=dict(name="magic")), "magic"),
        (dict(inner=dict(name="entropy")), "entropy"),
        (dict(inner=gaussian.Quantizer(3)), "discrete"),
    ],
)
def test_wrong_settings_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        build(**options)


@pytest.mark.parametrize("scale", [0, 1])
def test_codes_suit_what_is_held_as_a_loop_over_cells_has_it(scale):
    quantizer = build(phi=1)
    rows, columns = quantizer.layout.grids[scale]
    kept_BPC, known_BPC = latents(jax.random.key(0)), 0.3 * latents(jax.random.key(1))
    held_BP = np.array(jax.random.bernoulli(jax.random.key(2), 0.6, (3, 16)))
    held_BP[0, :8], held_BP[2] = False, False
    found = quantizer.toward(kept_BPC, known_BPC, jnp.asarray(held_BP), scale)
    assert found.shape == (3, rows * columns, 1, CODES)

    smooth = quantizer.convs[0]
    codes = np.asarray(quantizer.inner.codebook[...], np.float64)
    codes = 0.5 * codes + 0.5 * (codes @ np.asarray(smooth.kernel[...], np.float64).sum((0, 1)))
    codes = codes + 0.5 * np.asarray(smooth.bias[...])
    rest_BPC = np.asarray(kept_BPC - known_BPC, np.float64)
    for b in range(3):
        left = (rest_BPC[b][held_BP[b]] ** 2).sum(-1).mean() if held_BP[b].any() else 0
        mask, rest = held_BP[b].reshape(4, 4), rest_BPC[b].reshape(4, 4, -1)
        for cell, (r, c) in enumerate(np.ndindex(rows, columns)):
            weight = np.outer(_bin(r, rows), _bin(c, columns))
            part = (weight * mask).sum()
            if part == 0:
                assert not np.any(found[b, cell])
                continue
            mean = np.einsum("hw,hwc->c", weight * mask, rest) / part
            off = ((mean - codes) ** 2).sum(-1)
            may = (1 - part / weight.sum()) ** 2 * left + off.min() + 1e-6
            wanted = -multiscale.FREEDOM / 2 * off / may
            np.testing.assert_allclose(found[b, cell, 0], wanted, rtol=1e-3, atol=1e-3)


def _bin(cell, count, places=4):
    """[places] 1 of those whose mean a cell of `count` has: bins may overlap."""
    numbers = np.arange(places)
    return (numbers >= cell * places // count) & (numbers < -(-(cell + 1) * places // count))


def test_of_several_symbols_and_of_the_finest_grid_nobody_can_tell_which_suit():
    zeros = jnp.zeros((1, 16, CHANNELS))
    assert build(phi=0).toward(zeros, zeros, jnp.ones((1, 16), bool), 2) is None
    quantizer = build(dict(name="lfq", bits=6, groups=(3, 3)), (1, 2), (2, 2), phi=0)
    zeros = jnp.zeros((1, 4, quantizer.channels))
    assert quantizer.toward(zeros, zeros, jnp.ones((1, 4), bool), 0) is None
