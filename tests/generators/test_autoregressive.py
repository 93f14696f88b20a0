import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tokgen import interfaces, orders
from tokgen.generators import autoregressive
from tokgen.nn import dropout, linear, transformer
from tokgen.nn.precision import FLOAT32
from tokgen.sampling import decode, sampler as samplers

LAYOUT = interfaces.TokenLayout((16,), ((3, 3),))
UNEQUAL = interfaces.TokenLayout((4, 16), ((2, 3),))
CLASSES, L = 5, LAYOUT.length
ORDERS = orders.known()
PAIRS = [(order, "rotary") for order in ORDERS]
PAIRS += [("random", "learned"), ("columns", "learned"), ("random", "target_aware")]
# Each order and each way of telling positions is among the others.
COMBINED = {("columns", "rotary"), ("random", "learned")}
PAIRS = [pytest.param(*each, marks=[pytest.mark.long] * (each in COMBINED)) for each in PAIRS]

generate = jax.jit(decode.generate, static_argnums=(1, 3))
teacher_forced = jax.jit(lambda generator, batch: generator.logits(batch))
nats = jax.jit(lambda generator, batch: generator.nats(batch))
loss = jax.jit(lambda generator, batch, key: generator.loss(batch, None, step=0, key=key))


def _make(layout=LAYOUT, classes=CLASSES, depth=2, **options):
    """A tiny generator as it starts: its logits are zero."""
    return autoregressive.Generator(
        layout,
        classes,
        width=16,
        depth=depth,
        heads=2,
        variant="llama_narrow",
        precision=FLOAT32,
        rngs=nnx.Rngs(0),
        **options,
    )


@functools.cache
def _lively(layout=LAYOUT, classes=CLASSES, **options):
    """One with logits of standard deviation 3."""
    generator = _make(layout, classes, **options)
    kernel = generator.head.head.kernel
    kernel[...] = 0.75 * jax.random.normal(jax.random.key(1), kernel.shape)
    return generator


def _batch(generator, B=3, seed=0):
    """Random tokens and labels, and an order per image as the generator draws them."""
    rng = np.random.default_rng(seed)
    layout = generator.layout
    tokens = rng.integers(0, layout.vocab, (B, layout.length, layout.groups))
    label_B = rng.integers(0, max(generator.classes, 1), B)
    order_BL = generator.orders(jax.random.split(jax.random.key(seed), B))
    return interfaces.TokenBatch(jnp.asarray(tokens), jnp.asarray(label_B), order_BL)


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


@pytest.mark.parametrize("order, positions", PAIRS)
def test_a_place_depends_on_every_earlier_place_and_on_nothing_later(order, positions):
    generator = _lively(order=order, positions=positions)
    (order_L,) = np.asarray(generator.orders(jax.random.split(jax.random.key(3), 1)))
    # the token of position p is p: row p of the table is the input of position p, and of no other
    batch = interfaces.TokenBatch(
        jnp.arange(L).reshape(1, L, 1), jnp.asarray([2]), jnp.asarray(order_L)[None]
    )
    mix_LV = jax.random.normal(jax.random.key(4), (L, LAYOUT.absent))

    @jax.jit
    def slopes(generator):
        slope = jax.jacrev(lambda g: jnp.sum(g.logits(batch)[0, :, 0] * mix_LV, -1))(generator)
        return slope.embeddings.table[...], slope.conditioning.labels.table[...]

    by_token, by_label = (np.abs(np.asarray(slope)).max(-1) for slope in slopes(generator))
    by_place = by_token[:, 0][:, order_L]
    np.testing.assert_array_equal(by_place != 0, np.tri(L, k=-1, dtype=bool))
    # the label reaches every place, and no other class does
    np.testing.assert_array_equal(by_label != 0, np.tile(np.arange(CLASSES + 1) == 2, (L, 1)))


WEIGHTS = (3.0, 1.0, 0.5, 2.0, 4.0, 1.5, 2.5, 1.0, 1.0)  # one per step, the last two unguided


def _check_greedy(generator, weights):
    """Decoding must choose, place by place, what the teacher-forced logits say is best."""
    B, rng = 3, np.random.default_rng(5)
    label_B = jnp.asarray([0, 3, 4])
    mask = rng.uniform(size=(B, L, 1)) < 0.3
    mask[1] = False
    given = rng.integers(0, LAYOUT.absent, (B, L, 1))
    state = generate(
        generator,
        None,
        label_B,
        samplers.Sampler(temperature=0, guidance=weights),
        keys_B=jax.random.split(jax.random.key(6), B),
        given=(jnp.asarray(given), jnp.asarray(mask)),
    )
    tokens, order_BL = np.asarray(state.tokens_BLG), np.asarray(state.order_BL)
    np.testing.assert_array_equal(tokens[mask], given[mask])
    assert tokens.min() >= 0 and tokens.max() < LAYOUT.absent and not np.any(state.invalid_B)

    def logits(label_B):
        batch = interfaces.TokenBatch(state.tokens_BLG, label_B, state.order_BL)
        return np.asarray(teacher_forced(generator, batch), np.float64)[:, :, 0]

    cond, weight_L1 = logits(label_B), np.asarray(weights or (1.0,) * L)[:, None]
    null = logits(jnp.full_like(label_B, CLASSES))
    merged = null + weight_L1 * (cond - null)
    drawn = np.take_along_axis(tokens[..., 0], order_BL, 1)
    known = np.take_along_axis(mask[..., 0], order_BL, 1)
    best = merged.argmax(-1)
    # float32 may turn a tie over: what was drawn is the best to rounding, and nearly always itself
    regret = merged.max(-1) - np.take_along_axis(merged, drawn[..., None], -1)[..., 0]
    assert regret[~known].max() < 1e-3
    assert (drawn == best)[~known].mean() > 0.95
    assert len(np.unique(drawn[~known])) > 3  # not one token everywhere
    if weights:
        assert np.any(cond.argmax(-1) != best)  # guidance makes a difference here


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param((), marks=pytest.mark.long, id="unguided"),
        pytest.param(WEIGHTS, id="guided"),
    ],
)
@pytest.mark.parametrize("window", [1, 5, 64])
def test_cached_decoding_equals_teacher_forcing_for_any_window(window, weights):
    _check_greedy(_lively(window=window), weights)


@pytest.mark.parametrize("order, positions", PAIRS)
def test_cached_decoding_equals_teacher_forcing_for_every_order(order, positions):
    # one layer, guided to the end: the windows above have two, and cut the plan
    _check_greedy(_lively(order=order, positions=positions, depth=1), WEIGHTS[:7] + (2.0, 3.0))


def test_what_is_laid_out_already_holds_the_same_arrays():
    """Or a network would be there twice, and each part of a sample another program."""
    options = dict(heads=2, variant="rar", conditioning="cls_label", head="adaptive")
    generator = autoregressive.Generator(
        *(LAYOUT, CLASSES), width=128, depth=1, **options, precision=FLOAT32, rngs=nnx.Rngs(0)
    )
    once, anew = decode.laid_out(generator), decode.laid_out(generator)
    twice = decode.laid_out(once)
    assert any(isinstance(part, linear.Panels) for _, part in nnx.iter_modules(once))
    assert jax.tree.structure(once) == jax.tree.structure(twice) == jax.tree.structure(anew)
    leaves = zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True)
    assert all(ours is theirs for ours, theirs in leaves)
    assert not any(isinstance(part, linear.Panels) for _, part in nnx.iter_modules(generator))
    assert once.plan() == twice.plan()


def test_what_is_laid_out_leaves_the_layers_that_it_was_made_of():
    options = dict(heads=2, variant="rar", conditioning="cls_label", head="adaptive")
    generator = autoregressive.Generator(
        *(LAYOUT, CLASSES), width=128, depth=1, **options, precision=FLOAT32, rngs=nnx.Rngs(0)
    )
    apart = transformer.unstacked(generator, "transformer")
    before = jax.tree.structure(apart), apart.transformer.cached
    assert jax.tree.structure(decode.laid_out(apart)) != before[0]
    assert (jax.tree.structure(apart), apart.transformer.cached) == before


def test_the_plan_handles_every_place_once_with_slots_for_all_before():
    for window in (1, 5, 8, 64):
        plan = _make(window=window).plan()
        places, first = [], 0
        for phase in plan:
            assert phase.first == first and phase.size == 1
            first += phase.steps
            last = phase.place(first - 1)
            places += range(phase.start, last + 1)
            # the last step reads its own slot and every one before it: label, then the places
            assert phase.slots == last + 1
            assert phase.steps <= window
        assert places == list(range(L))


class _Recorder:
    """A sampler that keeps the logits it was shown; for plans without loops."""

    steps, guidance = None, ()

    def __init__(self, sampler):
        self.sampler, self.seen = sampler, []

    def draw(self, logits_BlGV, **options):
        self.seen.append(logits_BlGV)
        return self.sampler.draw(logits_BlGV, **options)


def test_the_likelihood_of_a_sample_is_the_product_of_its_draws():
    layout, B = UNEQUAL, 4
    generator = _lively(layout=layout, order="random", positions="target_aware", window=1)
    label_B = jnp.asarray([0, 1, 2, 3])

    @jax.jit
    def sampled(generator):
        recorder = _Recorder(samplers.Sampler())
        keys_B = jax.random.split(jax.random.key(7), B)
        state = decode.generate(generator, None, label_B, recorder, keys_B=keys_B)
        batch = interfaces.TokenBatch(state.tokens_BLG, label_B, state.order_BL)
        return state, jnp.concatenate(recorder.seen, 1), generator.nats(batch)

    state, logits_BLGV, nats_BL = sampled(generator)
    order_BL = np.asarray(state.order_BL)
    assert len(np.unique(order_BL, axis=0)) == B  # every image in its own order
    tokens = np.take_along_axis(np.asarray(state.tokens_BLG), order_BL[..., None], 1)
    assert np.all(tokens < np.asarray(layout.vocab))
    chosen = np.take_along_axis(_log_softmax(logits_BLGV), tokens[..., None], -1)
    assert nats_BL.shape == (B, layout.length)
    np.testing.assert_allclose(nats_BL, -chosen[..., 0].sum(-1), rtol=1e-4, atol=1e-4)
    # the likelihood under the raster order is another one: the order does matter
    raster_BL = jnp.broadcast_to(jnp.arange(layout.length), (B, layout.length))
    raster = interfaces.TokenBatch(state.tokens_BLG, label_B, raster_BL)
    other_BL = nats(generator, raster)
    assert np.abs(np.sum(other_BL, 1) - np.sum(nats_BL, 1)).min() > 1e-2


@pytest.mark.parametrize("layout", [LAYOUT, UNEQUAL], ids=["plain", "groups"])
def test_the_first_loss_is_the_entropy_of_a_uniform_guess(layout):
    generator = _make(layout)
    batch = _batch(generator)
    value, scalars = loss(generator, batch, jax.random.key(0))
    expected = sum(math.log(size) for size in layout.vocab)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(scalars["nats_per_token"], expected, rtol=1e-6)


def test_the_loss_is_the_mean_of_the_nats():
    for layout in (LAYOUT, UNEQUAL):
        generator = _lively(layout=layout, label_drop=0.0)
        batch = _batch(generator)
        value, scalars = loss(generator, batch, jax.random.key(0))
        logits = np.asarray(teacher_forced(generator, batch))
        total, hits = 0.0, 0
        B, count, G = batch.tokens_BLG.shape
        for b in range(B):
            for place in range(count):
                for g in range(G):
                    token = int(batch.tokens_BLG[b, batch.order_BL[b, place], g])
                    total -= _log_softmax(logits[b, place, g])[token]
                    hits += int(logits[b, place, g].argmax() == token)
        np.testing.assert_allclose(value, total / (B * count), rtol=1e-5)
        np.testing.assert_allclose(scalars["token_accuracy"], hits / (B * count * G), rtol=1e-5)
        np.testing.assert_allclose(nats(generator, batch).mean(), value, rtol=1e-5)


def test_training_draws_a_new_order_for_every_image_and_key():
    generator = _make(order="random", positions="target_aware")
    keys_B = jax.random.split(jax.random.key(0), 6)
    drawn = np.asarray(generator.orders(keys_B))
    assert len(np.unique(drawn, axis=0)) == 6
    np.testing.assert_array_equal(generator.orders(keys_B[2:3])[0], drawn[2])
    lively = _lively(order="random", positions="target_aware", label_drop=0.0)
    batch = _batch(lively).replace(order_BL=None)
    one, again, other = (float(loss(lively, batch, jax.random.key(i))[0]) for i in (0, 0, 1))
    assert one == again and abs(one - other) > 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_labels_are_dropped_at_their_rate_for_the_row_of_no_class(rate):
    # every image has a class of its own: a row of the table without gradient was dropped
    classes = 1000
    layout = interfaces.TokenLayout((4,), ((1, 2),))
    generator = _lively(layout=layout, classes=classes, depth=1, label_drop=rate)
    assert np.all(np.asarray(generator.null(jnp.arange(3))) == classes)
    tokens = jnp.zeros((classes, 2, 1), jnp.int32)
    batch = interfaces.TokenBatch(tokens, jnp.arange(classes))

    @jax.jit
    def dropped(key):
        slope = jax.grad(lambda g: g.loss(batch, None, step=0, key=key)[0])(generator)
        return jnp.abs(slope.conditioning.labels.table[...]).max(-1) == 0

    first, second = (np.asarray(dropped(jax.random.key(seed))) for seed in (0, 1))
    assert first[classes] == (rate == 0)  # the last row learns from those that were dropped
    spread = (rate * (1 - rate) / classes) ** 0.5
    assert abs(first[:classes].mean() - rate) <= 4 * spread
    assert np.any(first != second) == (rate > 0)


def test_eight_images_are_learned_by_heart():
    layout = interfaces.TokenLayout((16,), ((4, 4),))
    generator = _make(layout, classes=8, label_drop=0.0)
    tokens = np.random.default_rng(8).integers(0, 16, (8, 16, 1))
    batch = interfaces.TokenBatch(jnp.asarray(tokens), jnp.arange(8))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(generator):
        def step(carry, _):
            generator, moments = carry
            slope = jax.grad(lambda g: g.loss(batch, None, step=0, key=jax.random.key(0))[0])
            updates, moments = optimizer.update(slope(generator), moments)
            return (optax.apply_updates(generator, updates), moments), None

        carry, _ = jax.lax.scan(step, (generator, optimizer.init(generator)), length=150)
        return carry[0]

    generator = train(generator)
    assert float(nats(generator, batch).mean()) < 0.05
    keys_B = jax.random.split(jax.random.key(9), 8)
    state = generate(generator, None, batch.cond, samplers.Sampler(temperature=0), keys_B=keys_B)
    assert np.mean(np.asarray(state.tokens_BLG) == tokens) > 0.97


def test_a_smaller_alphabet_is_never_left_and_its_gradient_is_finite():
    generator = _lively(layout=UNEQUAL)
    batch = _batch(generator)
    logits = np.asarray(teacher_forced(generator, batch))
    assert np.all(np.isneginf(logits[:, :, 0, 4:]))
    assert np.all(np.isfinite(logits[:, :, 0, :4])) and np.all(np.isfinite(logits[:, :, 1]))
    slope = jax.jit(jax.grad(lambda g: g.loss(batch, None, step=0, key=jax.random.key(0))[0]))(
        generator
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))
    kernel = np.asarray(slope.head.head.kernel[...])
    assert np.all(kernel[:, 0, 4:] == 0) and np.all(np.abs(kernel[:, 0, :4]).max(0) > 0)
    state = generate(
        generator,
        None,
        jnp.zeros(16, jnp.int32),
        samplers.Sampler(temperature=4.0, guidance=(2.0,) * 6),
        keys_B=jax.random.split(jax.random.key(10), 16),
    )
    tokens = np.asarray(state.tokens_BLG).reshape(-1, 2)
    assert set(tokens[:, 0]) == set(range(4)) and set(tokens[:, 1]) == set(range(16))
    assert not np.any(state.invalid_B)


def test_a_model_without_classes_has_one_row_and_nothing_to_be_guided_by():
    generator = _lively(classes=0)
    none = jnp.zeros(3, jnp.int32)
    np.testing.assert_array_equal(generator.null(none), none)
    batch = _batch(generator).replace(cond=none)
    one, other = (float(loss(generator, batch, jax.random.key(i))[0]) for i in (0, 1))
    assert one == other  # dropping the label of nothing changes nothing
    keys_B = jax.random.split(jax.random.key(11), 3)
    plain, guided = (
        generate(generator, None, none, samplers.Sampler(guidance=weights), keys_B=keys_B)
        for weights in ((), (4.0,) * L)
    )
    np.testing.assert_array_equal(plain.tokens_BLG, guided.tokens_BLG)
    assert len(np.unique(plain.tokens_BLG, axis=0)) == 3


@pytest.mark.parametrize("rate", ["token", "attention", "residual"])
def test_every_dropout_rate_acts_in_training_and_in_training_only(rate):
    generator = _lively(rates=dropout.Rates(**{rate: 0.3}), label_drop=0.0)
    batch = _batch(generator)
    losses = [float(loss(generator, batch, jax.random.key(i))[0]) for i in (0, 0, 1)]
    assert losses[0] == losses[1] and abs(losses[0] - losses[2]) > 1e-3
    still = _lively(label_drop=0.0)
    np.testing.assert_array_equal(nats(generator, batch), nats(still, batch))


def test_groups_of_one_are_the_plain_loss_and_end_with_their_step():
    generator = _lively(groups=((1, 10),), label_drop=0.0)
    batch, key = _batch(generator), jax.random.key(0)
    both = jax.jit(lambda step: generator.loss(batch, None, step=step, key=key)[0])
    np.testing.assert_allclose(both(9), both(10), rtol=1e-6)
    np.testing.assert_allclose(both(10), nats(generator, batch).mean(), rtol=1e-6)


def test_grouped_tokens_are_a_mean_that_predicts_all_tokens_of_the_next_group():
    """NPP (arXiv:2412.15321), with a generator over groups whose table holds the means."""
    fine = interfaces.TokenLayout((16,), ((4, 4),))
    coarse = interfaces.TokenLayout((16,), ((2, 2),))
    generator = _lively(layout=fine, groups=((2, 10),), label_drop=0.0)
    tokens = np.random.default_rng(3).integers(0, 16, (2, 16, 1))
    label_B = jnp.asarray([1, 4])
    batch = interfaces.TokenBatch(jnp.asarray(tokens), label_B)
    step = jax.jit(lambda step: generator.loss(batch, None, step=step, key=jax.random.key(0)))
    value, scalars = step(9)
    table = np.asarray(generator.embeddings.table[...])[0]
    total, hits = 0.0, 0
    over_groups = _make(coarse)
    for name in ("conditioning", "transformer", "head"):
        setattr(over_groups, name, getattr(generator, name))
    for b in range(2):
        grid = tokens[b, :, 0].reshape(4, 4)
        groups = [grid[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].ravel() for r, c in np.ndindex(2, 2)]
        means = jnp.asarray([table[group].mean(0) for group in groups])
        over_groups.embeddings.table[...] = over_groups.embeddings.table[...].at[0, :4].set(means)
        named = interfaces.TokenBatch(jnp.arange(4)[None, :, None], label_B[b : b + 1])
        chances = _log_softmax(teacher_forced(over_groups, named))[0, :, 0]
        for k, group in enumerate(groups):
            for token in group:
                total -= chances[k, token]
                hits += int(chances[k].argmax() == token)
    np.testing.assert_allclose(value, total / tokens.size, rtol=1e-5)
    np.testing.assert_allclose(scalars["token_accuracy"], hits / tokens.size, rtol=1e-6)
    # at the step that ends the groups, every token is its own input and its own target
    np.testing.assert_allclose(step(10)[0], nats(generator, batch).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(variant="rar"), "an adaptive variant needs conditioning.*cls_label"),
        (dict(conditioning="adaptive_label"), "no other can be told one"),
        (dict(head="adaptive"), "an adaptive head needs it too"),
        (dict(head="tied_to_all"), "for masked generators"),
        (
            dict(order="columns", positions="learned", layout=((1, 1), (2, 2))),
            "columns need one grid",
        ),
    ],
)
def test_names_that_do_not_go_together_are_told(options, said):
    layout = interfaces.TokenLayout((16,), options.get("layout", LAYOUT.grids))
    options = dict(variant="llama_narrow") | options | dict(layout=layout)
    with pytest.raises(ValueError, match=said):
        autoregressive.Generator(
            *(options.pop("layout"), CLASSES),
            **(dict(width=16, depth=1, heads=2, precision=FLOAT32, rngs=nnx.Rngs(0)) | options),
        )
