"""VQ against loops in float64: neighbours, losses, moving averages; and codes that come to life."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tokgen import parameters
from tokgen.quantizers import vq

CODES, CHANNELS = 24, 5


def build(codes=CODES, channels=CHANNELS, **options):
    return vq.Quantizer(codes, channels, grid=(4, 4), rngs=nnx.Rngs(1), **options)


def latents(key, batch=4, channels=CHANNELS):
    return 0.5 + jax.random.normal(key, (batch, 16, channels))


def wide(x):
    return np.asarray(x, np.float64)


def unit(rows):
    return rows / np.sqrt((rows**2).sum(-1, keepdims=True))


def nearest(latents_nC, rows_VC):
    """The index of the nearest row, one latent and one row at a time."""
    tokens = []
    for latent_C in latents_nC:
        distances = [sum((latent_C - row_C) ** 2) for row_C in rows_VC]
        tokens.append(int(np.argmin(distances)))
    return np.array(tokens)


def prepared(quantizer, latents_BPC):
    """(latents [n, C], rows [V, C]) in float64 as they are to be compared."""
    latents_nC, rows_VC = (
        wide(latents_BPC).reshape(-1, quantizer.channels),
        wide(quantizer.codebook[...]),
    )
    return (unit(latents_nC), unit(rows_VC)) if quantizer.normalize else (latents_nC, rows_VC)


@pytest.mark.parametrize("normalize", [True, False])
def test_tokens_are_the_nearest_rows(normalize, key):
    quantizer = build(normalize=normalize)
    quantizer.codebook[...] *= 1 + jnp.arange(CODES)[:, None] / 8  # rows of different lengths
    latents_BPC = latents(key)
    latents_nC, rows_VC = prepared(quantizer, latents_BPC)
    expected = nearest(latents_nC, rows_VC)
    tokens_BLG = quantizer.encode(latents_BPC)
    np.testing.assert_array_equal(np.asarray(tokens_BLG).reshape(-1), expected)
    np.testing.assert_allclose(
        wide(quantizer.decode(tokens_BLG)).reshape(-1, CHANNELS), rows_VC[expected], atol=1e-6
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_losses_and_their_gradients_in_closed_form(normalize, key):
    """mean (e - z)^2: 2 (z - e) / n to the latents, 2 (e - z) / n to each row that was chosen."""
    quantizer = build(normalize=normalize)
    quantizer.codebook[...] *= 3.0
    latents_BPC = latents(key)
    graph, params, stats = parameters.split(quantizer)

    def losses(params, latents_BPC):
        return parameters.merge(graph, params, stats)(latents_BPC).losses

    z, e = prepared(quantizer, latents_BPC)
    tokens = nearest(z, e)
    value = np.mean((e[tokens] - z) ** 2)
    to_z, to_e = 2 * (z - e[tokens]) / z.size, np.zeros_like(e)
    for n, token in enumerate(tokens):
        to_e[token] += 2 * (e[token] - z[n]) / z.size
    if normalize:  # through u = x / |x|: (g - u (u . g)) / |x|
        lengths_z = np.linalg.norm(wide(latents_BPC).reshape(-1, CHANNELS), axis=-1, keepdims=True)
        to_z = (to_z - z * (z * to_z).sum(-1, keepdims=True)) / lengths_z
        lengths_e = np.linalg.norm(wide(quantizer.codebook[...]), axis=-1, keepdims=True)
        to_e = (to_e - e * (e * to_e).sum(-1, keepdims=True)) / lengths_e
    found = losses(params, latents_BPC)
    assert set(found) == {"commitment", "codebook"}
    for name, in_rows, in_latents in (("commitment", 0 * to_e, to_z), ("codebook", to_e, 0 * to_z)):
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
        by_rows, by_latents = jax.grad(lambda p, x, n=name: losses(p, x)[n], (0, 1))(
            params, latents_BPC
        )
        np.testing.assert_allclose(by_rows["codebook"], in_rows, atol=1e-6)
        np.testing.assert_allclose(by_latents.reshape(-1, CHANNELS), in_latents, atol=1e-6)


@pytest.mark.parametrize("update", ["ema", "frozen"])
def test_only_a_codebook_with_a_gradient_has_a_codebook_loss(update, key):
    quantizer = build(update=update)
    assert set(quantizer(latents(key)).losses) == {"commitment"}
    assert parameters.split(quantizer)[1] == {}  # the optimizer has nothing to move


def test_zero_latents_have_finite_gradients():
    quantizer = build()
    gradient = jax.grad(lambda z: quantizer(z).losses["commitment"])(jnp.zeros((1, 16, CHANNELS)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_moving_averages_are_the_written_out_loop(normalize, key):
    decay = 0.8
    quantizer = build(update="ema", decay=decay, revive=0.0, normalize=normalize)
    counts, sums = np.zeros(CODES), np.zeros((CODES, CHANNELS))
    rows = wide(quantizer.codebook[...])
    for step in range(4):
        latents_BPC = latents(jax.random.fold_in(key, step))
        z, compared = prepared(quantizer, latents_BPC)
        tokens = nearest(z, compared)
        counts *= decay
        sums *= decay
        for n, token in enumerate(tokens):
            counts[token] += (1 - decay) / len(tokens)
            sums[token] += (1 - decay) * z[n] / len(tokens)
        for token in range(CODES):
            if counts[token] > 0:
                rows[token] = sums[token] / counts[token]
        quantizer.maintain(latents_BPC, key=key)
        np.testing.assert_allclose(quantizer.counts[...], counts, atol=1e-6)
        np.testing.assert_allclose(quantizer.codebook[...], rows, rtol=1e-4, atol=1e-5)
    if normalize:  # and a row that nobody ever chose is where it was
        assert (counts == 0).any()


def among(rows_VC, latents_nC):
    """Which rows are, bit for bit, one of the latents."""
    return (np.asarray(rows_VC)[:, None] == np.asarray(latents_nC)[None]).all(-1).any(-1)


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_the_first_upkeep_is_an_initialisation_from_data(update, spread, key):
    """Also where all latents choose one row, which would otherwise stay where it began."""
    quantizer = build(update=update, normalize=False)
    latents_BPC = 3 + spread * jax.random.normal(key, (4, 16, CHANNELS))
    quantizer.maintain(latents_BPC, key=key)
    assert among(quantizer.codebook[...], latents_BPC.reshape(-1, CHANNELS)).all()
    np.testing.assert_allclose(quantizer.counts[...], 1 / CODES)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_dead_rows_are_revived_and_survive(update, key):
    quantizer = build(update=update, normalize=False, decay=0.5, revive=0.1)
    quantizer.counts[...] = jnp.full(CODES, 1 / CODES)
    quantizer.codebook[...] = rows = jnp.asarray(
        [[100.0 + v] * CHANNELS for v in range(CODES - 1)] + [[0.0] * CHANNELS]
    )
    if update == "ema":
        quantizer.sums[...] = rows / CODES
    latents_BPC = latents(key)  # all of them choose the last row
    latents_nC = latents_BPC.reshape(-1, CHANNELS)
    for halvings in range(1, 4):  # 1/2, 1/4 and 1/8 of the fair share: not dead at 1/10
        quantizer.maintain(latents_BPC, key=jax.random.fold_in(key, halvings))
        np.testing.assert_allclose(quantizer.codebook[...][:-1], rows[:-1], rtol=1e-5)
        np.testing.assert_allclose(quantizer.counts[...][:-1], 0.5**halvings / CODES, rtol=1e-5)
    quantizer.maintain(latents_BPC, key=key)
    revived = np.asarray(quantizer.codebook[...])
    np.testing.assert_array_equal(among(revived, latents_nC), [True] * (CODES - 1) + [False])
    np.testing.assert_allclose(quantizer.counts[...][:-1], 1 / CODES)
    assert quantizer.counts[...][-1] > 0.9
    # nobody comes near them in the next batch: they have until their count has faded
    away_BPC = jnp.full_like(latents_BPC, -50.0)
    quantizer.codebook[...] = quantizer.codebook[...].at[-1].set(-50.0)
    quantizer.maintain(away_BPC, key=key)
    np.testing.assert_allclose(quantizer.codebook[...][:-1], revived[:-1], rtol=1e-5)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_clustering_pulls_every_row_by_its_disuse(update, key):
    """The online clustering of TA-TiTok, one row at a time."""
    decay = 0.9
    quantizer = build(update=update, normalize=False, decay=decay, revival="clustering")
    rows, shares = wide(quantizer.codebook[...]), np.zeros(CODES)
    sums = np.zeros((CODES, CHANNELS))
    for step in range(3):
        latents_BPC = latents(jax.random.fold_in(key, step))
        z = wide(latents_BPC).reshape(-1, CHANNELS)
        tokens = nearest(z, rows)
        squares = ((z[:, None] - rows[None]) ** 2).sum(-1)
        shares = decay * shares + (1 - decay) * np.bincount(tokens, minlength=CODES) / len(z)
        if update == "ema":
            fresh = np.stack([z[tokens == v].sum(0) / len(z) for v in range(CODES)])
            sums = decay * sums + (1 - decay) * fresh
            rows = np.where(shares[:, None] > 0, sums / np.maximum(shares, 1e-12)[:, None], rows)
        for v in range(CODES):
            pull = np.exp(-shares[v] * CODES * 10 / (1 - decay) - 1e-3)
            rows[v] += pull * (z[squares[:, v].argmin()] - rows[v])
        sums = rows * shares[:, None]
        quantizer.maintain(latents_BPC, key=key)
        np.testing.assert_allclose(quantizer.codebook[...], rows, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(quantizer.counts[...], shares, atol=1e-6)
        if step == 0:  # all rows moved, those in use by nearly nothing
            assert (shares == 0).any() and (shares > 0).any()


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_without_revival_a_row_that_nobody_chooses_stays(update, key):
    quantizer = build(update=update, normalize=False, revival="none", revive=0.5)
    before = np.asarray(quantizer.codebook[...])
    latents_BPC = latents(key)
    tokens = np.asarray(quantizer.encode(latents_BPC))
    quantizer.maintain(latents_BPC, key=key)
    idle = ~np.isin(np.arange(CODES), tokens)
    assert idle.any()
    np.testing.assert_array_equal(np.asarray(quantizer.codebook[...])[idle], before[idle])


@pytest.mark.parametrize(
    ("init", "low", "high", "std"),
    [
        ("uniform", -1 / 1024, 1 / 1024, 3**-0.5 / 1024),
        ("fan_in", -((3 / 1024) ** 0.5), (3 / 1024) ** 0.5, 1 / 32),
        ("normal", -6, 6, 1),
        ("sphere", -1, 1, 8**-0.5),
    ],
)
def test_published_starts(init, low, high, std):
    rows_VC = np.asarray(build(codes=1024, channels=8, init=init).codebook[...])
    assert low <= rows_VC.min() and rows_VC.max() <= high
    np.testing.assert_allclose(rows_VC.std(), std, rtol=0.03)
    lengths = np.linalg.norm(rows_VC, axis=-1)
    assert (np.abs(lengths - 1) < 1e-5).all() == (init == "sphere")


@pytest.mark.parametrize("form", ["shifted", "clamped"])
def test_entropies_are_those_of_the_full_distances(form, key):
    """With |z|^2, which the implementation leaves out, one latent at a time in float64."""
    quantizer = build(normalize=False, temperature=0.8, entropy=form)
    latents_BPC = latents(key)
    z, rows = prepared(quantizer, latents_BPC)
    logits = -((z[:, None] - rows[None]) ** 2).sum(-1) / 0.8
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    batch = chances.mean(0)
    guard = (lambda p: p + 1e-5) if form == "shifted" else (lambda p: np.maximum(p, 1e-5))
    inside = chances if form == "shifted" else guard(chances)
    losses = quantizer(latents_BPC).losses
    expected = -np.sum(chances * np.log(inside), -1).mean()
    np.testing.assert_allclose(losses["sample_entropy"], expected, rtol=1e-4)
    np.testing.assert_allclose(
        losses["batch_entropy"], -np.sum(batch * np.log(guard(batch))), rtol=1e-4
    )


@pytest.mark.parametrize("revive", [0.0, 0.5])
def test_a_frozen_codebook_never_moves(revive, key):
    quantizer = build(update="frozen", revive=revive, decay=0.5)
    before = np.array(quantizer.codebook[...])
    shares = np.zeros(CODES)
    for step in range(3):
        latents_BPC = latents(jax.random.fold_in(key, step))
        tokens = np.asarray(quantizer.encode(latents_BPC)).reshape(-1)
        shares = 0.5 * shares + 0.5 * np.bincount(tokens, minlength=CODES) / len(tokens)
        quantizer.maintain(latents_BPC, key=key)
    np.testing.assert_array_equal(quantizer.codebook[...], before)
    np.testing.assert_allclose(quantizer.counts[...], shares, atol=1e-6)


def trained(key, **options):
    """(share of the codes in use, mean squared distance) after 40 steps on 16 Gaussians."""
    quantizer = build(codes=32, channels=3, normalize=False, decay=0.8, **options)
    centres = 8 + 4 * jax.random.normal(key, (16, 3))  # far from where the rows begin
    graph, params, stats = parameters.split(quantizer)
    chain = optax.adam(0.05)

    def drawn(key, count):
        which, noise = jax.random.split(key)
        chosen = jax.random.randint(which, (count,), 0, 16)
        return (centres[chosen] + 0.3 * jax.random.normal(noise, (count, 3)))[None]

    @jax.jit
    def step(params, stats, moments, key):
        latents_BPC = drawn(key, 256)

        def loss(params):
            losses = parameters.merge(graph, params, stats)(latents_BPC).losses
            return losses.get("codebook", 0.0)

        gradients = jax.grad(loss)(params)
        updates, moments = chain.update(gradients, moments, params)
        quantizer = parameters.merge(graph, optax.apply_updates(params, updates), stats)
        quantizer.maintain(latents_BPC, key=jax.random.fold_in(key, 1))
        return *parameters.split(quantizer)[1:], moments

    moments = chain.init(params)
    for number in range(40):
        params, stats, moments = step(params, stats, moments, jax.random.fold_in(key, number))
    out = parameters.merge(graph, params, stats)(drawn(key, 4096))
    return len(np.unique(out.tokens_BLG)) / 32, float(out.losses["commitment"])


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_mixture_of_gaussians_uses_every_code(update, key):
    used, distance = trained(key, update=update)
    assert used == 1 and distance < 0.3
    # what revival is for: without it most rows are never chosen
    used, far = trained(key, update=update, revive=0.0)
    assert used < 0.5 and far > 4 * distance


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"update": "magic"}, "magic"),
        ({"decay": 1.0}, "decay"),
        ({"revival": "prayer"}, "prayer"),
        ({"init": "zero"}, "zero"),
        ({"entropy": "none"}, "none"),
        ({"temperature": -0.1}, "temperature"),
    ],
)
def test_wrong_settings_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        build(**options)
