"""What RAR, IBQ and Open-MAGVIT2 add to the autoregressive generator."""

import functools

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.generators import autoregressive
from tokgen.nn import dropout, linear
from tokgen.nn.precision import FLOAT32
from tokgen.sampling import decode, sampler

PLAIN = interfaces.TokenLayout((16,), ((3, 3),))
PAIRED = interfaces.TokenLayout((9, 16), ((3, 3),))
CLASSES, L = 5, 9
RAR = dict(conditioning="cls_label", positions="rar", variant="rar", head="adaptive", unused=1)
KINDS = {
    "rar": (PLAIN, RAR),
    "ibq": (PLAIN, dict(conditioning="adaptive_label", variant="ibq", head="adaptive_rms")),
    "factor": (PAIRED, dict(variant="llama_narrow", head="factor", factor=2)),
}

logits = jax.jit(lambda generator, batch: generator.logits(batch))
loss = jax.jit(lambda generator, batch, step, key: generator.loss(batch, None, step=step, key=key))


@functools.cache
def make(kind, **options):
    """A tiny generator, nothing of which is zero."""
    layout, own = KINDS[kind]
    build = functools.partial(autoregressive.Generator, layout, CLASSES, **own, **options)
    sizes = dict(width=16, depth=2, heads=2, hidden=32)
    generator = nnx.eval_shape(lambda: build(**sizes, precision=FLOAT32, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(generator)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        structure, [jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_symbol_depends_on_all_before_it_and_on_nothing_later(kind):
    generator = make(kind)
    layout, order_L = generator.layout, np.random.default_rng(2).permutation(L)
    G = layout.groups
    # the tokens of position p are p: row p of a table is the input of position p, and of no other
    tokens_BLG = jnp.broadcast_to(jnp.arange(L)[None, :, None], (1, L, G))
    batch = interfaces.TokenBatch(tokens_BLG, jnp.asarray([2]), jnp.asarray(order_L)[None])
    mix_LGV = jax.random.normal(jax.random.key(4), (L, G, layout.absent))

    @jax.jit
    def slopes(table):
        def mixed(table):
            other = jax.tree.map(lambda leaf: leaf, generator)
            other.embeddings.table[...] = table
            found = other.logits(batch)[0]
            return jnp.sum(jnp.where(jnp.isfinite(found), found, 0) * mix_LGV, -1).ravel()

        return jax.jacrev(mixed)(table)

    reached = np.abs(np.asarray(slopes(generator.embeddings.table[...]))).max(-1)[:, :, :L] != 0
    by_place = reached[:, :, order_L].transpose(0, 2, 1).reshape(L * G, L * G)
    # symbols in order, places in order; a plain position's last symbol is not asked about itself
    np.testing.assert_array_equal(by_place, np.tri(L * G, k=-1, dtype=bool))


class Recorder:
    """A sampler that keeps the logits that it draws from, out of compiled loops too."""

    steps, guidance = None, ()

    def __init__(self, own=None):
        self.seen, self.sampler = [], own or sampler.Sampler()

    def draw(self, logits_BlGV, **options):
        jax.experimental.io_callback(self.seen.append, None, logits_BlGV, ordered=True)
        return self.sampler.draw(logits_BlGV, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("rar", {"order": "random"}),
        pytest.param("rar", {"order": "random", "budget": 0}, marks=pytest.mark.long),
        pytest.param("ibq", {"order": "columns", "window": 4}, marks=pytest.mark.long),
        ("factor", {"order": "random"}),
    ],
    ids=["rar", "rar_by_the_step", "ibq", "factor"],
)
def test_what_is_drawn_from_is_what_teacher_forcing_says_of_the_sample(kind, options):
    B, generator, recorder = 3, make(kind, **options), Recorder()
    label_B, keys_B = jnp.asarray([0, 3, 4]), jax.random.split(jax.random.key(5), B)
    run = jax.jit(decode.generate, static_argnums=(1, 3))
    state = run(generator, None, label_B, recorder, keys_B=keys_B)
    jax.block_until_ready(state.tokens_BLG)
    jax.effects_barrier()
    # a budget of 0: nothing is computed beforehand, every step asks the blocks anew
    phase = generator.plan()[1]
    kept = jax.eval_shape(lambda label_B: generator.told(label_B, phase, 1, 2), label_B)
    assert (kept is None) == (kind == "factor" or options.get("budget") == 0)
    batch = interfaces.TokenBatch(state.tokens_BLG, label_B, state.order_BL)
    forced = np.asarray(logits(generator, batch))
    shown = np.concatenate(recorder.seen, axis=1).reshape(forced.shape)
    np.testing.assert_allclose(shown, forced, rtol=0, atol=1e-4 * np.abs(forced[:, :, :, :9]).max())
    tokens = np.take_along_axis(
        np.asarray(state.tokens_BLG), np.asarray(state.order_BL)[..., None], 1
    )
    assert np.all((tokens >= 0) & (tokens < np.asarray(generator.layout.vocab)))
    # the likelihood of the sample is the product of its draws
    wide = shown.astype(np.float64)
    peak = wide.max(-1, keepdims=True)
    chances = wide - peak - np.log(np.exp(wide - peak).sum(-1, keepdims=True))
    chosen = np.take_along_axis(chances, tokens[..., None], -1)[..., 0].sum(-1)
    found = jax.jit(lambda generator, batch: generator.nats(batch))(generator, batch)
    np.testing.assert_allclose(found, -chosen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "weights", "window"),
    [
        ("rar", (4.0,) * 4 + (1.0,) * 5, 8),
        pytest.param("rar", (), 3, marks=pytest.mark.long),
        pytest.param("ibq", (2.0,) * 9, 8, marks=pytest.mark.long),
        ("factor", (0.5, 3.0) + (1.0,) * 7, 4),
    ],
)
def test_what_a_cpu_decodes_fast_is_what_teacher_forcing_says(kind, weights, window, monkeypatch):
    """Maps in panels, windows that span turns of the told steps, one null row for the batch."""
    monkeypatch.setattr(decode, "SPAN", 4)
    layout, own = KINDS[kind]
    sizes = dict(width=128, depth=2, heads=2, hidden=256, window=window)
    build = functools.partial(autoregressive.Generator, layout, CLASSES, **sizes, **own)
    plain = nnx.eval_shape(lambda: build(precision=FLOAT32, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(1)
    leaves, structure = jax.tree.flatten(plain)
    some = [jnp.asarray(0.06 * draw.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    plain = jax.tree.unflatten(structure, some)
    fast = plain.unstacked()
    assert isinstance(fast.transformer.blocks[0].attention.query, linear.Panels)
    recorder = Recorder(sampler.Sampler(temperature=0))
    recorder.guidance = weights
    label_B, keys_B = jnp.asarray([0, 3, 4]), jax.random.split(jax.random.key(5), 3)
    run = jax.jit(decode.generate, static_argnums=(1, 3))
    state = run(fast, None, label_B, recorder, keys_B=keys_B)
    jax.block_until_ready(state.tokens_BLG)
    jax.effects_barrier()

    def forced(label_B):
        batch = interfaces.TokenBatch(state.tokens_BLG, label_B, state.order_BL)
        return np.asarray(logits(plain, batch), np.float64)

    cond, weight = forced(label_B), np.asarray(weights or (1.0,) * L)[:, None, None]
    null = forced(jnp.full_like(label_B, CLASSES)) if weights else cond
    finite = np.isfinite(cond)
    cond, null = np.where(finite, cond, -1e9), np.where(finite, null, -1e9)
    merged = null + weight * (cond - null)
    shown = np.concatenate(recorder.seen, axis=1).reshape(merged.shape)
    np.testing.assert_allclose(np.where(finite, shown, -1e9), merged, rtol=0, atol=1e-5)
    tokens = np.take_along_axis(
        np.asarray(state.tokens_BLG), np.asarray(state.order_BL)[..., None], 1
    )
    taken = np.take_along_axis(merged, tokens[..., None], -1)[..., 0]
    assert np.all(merged.max(-1) - taken < 2e-5)  # greedy, but for ties
    assert len(np.unique(tokens)) > 3


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 1.0), (124_999, 1.0), (125_000, 1.0), (140_625, 0.75), (156_250, 0.5), (187_500, 0.0)],
)
def test_the_share_of_shuffled_samples_falls_as_published(step, share):
    generator, B = make("rar", shuffle=(125_000, 187_500)), 4000
    orders = np.asarray(generator.training_orders(step, jax.random.key(7), B))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(L), (B, 1)))
    shuffled = np.any(orders != np.arange(L), axis=1)
    assert abs(shuffled.mean() - share) <= 4 * (share * (1 - share) / B) ** 0.5
    # of those, every place is as likely anywhere (chi-square, 8 degrees of freedom)
    if share == 1:
        seen = np.bincount(orders[:, 0], minlength=L)
        assert ((seen - B / L) ** 2 / (B / L)).sum() < 26.1


def test_after_the_shuffle_training_is_in_raster_order_and_an_identity_is_no_shuffle():
    generator, key = make("rar", shuffle=(2, 4), label_drop=0.0), jax.random.key(8)
    tokens = jnp.asarray(np.random.default_rng(9).integers(0, 16, (4, L, 1)))
    free = interfaces.TokenBatch(tokens, jnp.arange(4))
    raster = free.replace(order_BL=jnp.broadcast_to(jnp.arange(L), (4, L)))
    late, early, stated = (
        float(loss(generator, batch, step, key)[0])
        for batch, step in ((free, 4), (free, 0), (raster, 0))
    )
    assert late == stated and abs(early - late) > 1e-3
    np.testing.assert_array_equal(logits(generator, free), logits(generator, raster))


def test_a_target_of_its_own_tells_the_places_of_a_random_order_apart():
    """Two orders that begin alike ask for other places after the same tokens."""
    generator = make("rar")
    tokens = jnp.asarray(np.random.default_rng(10).integers(0, 16, (1, L, 1)))
    orders = np.tile(np.arange(L), (2, 1))
    orders[1, [4, 7]] = [7, 4]
    batch = interfaces.TokenBatch(
        jnp.concatenate([tokens, tokens]), jnp.asarray([1, 1]), jnp.asarray(orders)
    )
    one, other = np.asarray(logits(generator, batch))[:, :, 0]
    np.testing.assert_array_equal(one[:4], other[:4])
    assert np.abs(one[4] - other[4]).max() > 1e-2


def test_the_class_reaches_every_block_of_ibq_and_dropout_reaches_the_factors():
    generator = make("ibq")
    tokens = jnp.zeros((1, L, 1), jnp.int32)

    @jax.jit
    def slope(generator):
        batch = interfaces.TokenBatch(tokens, jnp.asarray([3]))
        return jax.grad(lambda g: g.logits(batch)[0, 5, 0, 1])(generator)

    found = slope(generator)
    kernels = np.asarray(found.transformer.blocks.modulation.kernel[...])
    assert np.all(np.abs(kernels).max((1, 3)) > 0)  # of both layers, all six vectors
    rows = np.abs(np.asarray(found.conditioning.labels.table[...])).max(1)
    np.testing.assert_array_equal(rows > 0, np.arange(CLASSES + 1) == 3)
    dropped = make("factor", rates=dropout.Rates(residual=0.5), label_drop=0.0)
    batch = interfaces.TokenBatch(jnp.zeros((2, L, 2), jnp.int32), jnp.asarray([0, 1]))
    dropped.transformer.rates = dropout.Rates()  # what is left acts in the head alone
    one, two = (float(loss(dropped, batch, 0, jax.random.key(i))[0]) for i in range(2))
    assert abs(one - two) > 1e-3
