"""Masked generators: counts per step, what is seen and committed, loss, likelihood bound, masks."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.generators import masked
from tokgen.nn import dropout
from tokgen.nn.precision import FLOAT32
from tokgen.sampling import decode, presets, sampler as samplers

PLAIN = interfaces.TokenLayout((6,), ((2, 4),))
HALVES = interfaces.TokenLayout((4, 4), ((2, 3),))
UNEQUAL = interfaces.TokenLayout((4, 6), ((2, 3),))
CLASSES = 3
# What published systems are made of: layout, variant, and what else their recipes say
FORMS = {
    "titok": (PLAIN, dict(variant="bert", entry="typed", head="bare", visible=0.1)),
    "titok_uvit": (
        PLAIN,
        dict(variant="uvit", stack="u_shaped", depth=3, head="biased", visible=0.1),
    ),
    "maskgit": (
        PLAIN,
        dict(
            variant="maskgit", entry="normed", head="tied_to_all", label_drop=None, mean="samples"
        ),
    ),
    "maskbit": (
        HALVES,
        dict(
            variant="bert",
            entry="normed",
            inputs="bits",
            head="transformed",
            masking="tossed",
            visible=1.0,
        ),
    ),
    "maskbit_tokens": (
        HALVES,
        dict(variant="bert_prenorm", entry="normed", head="tied_per_position", masking="tossed"),
    ),
    "unequal": (UNEQUAL, dict(variant="vit", smoothing=0.1)),
}


def _make(layout=PLAIN, classes=CLASSES, depth=1, **options):
    return masked.Generator(
        layout,
        classes,
        width=16,
        depth=depth,
        heads=2,
        precision=FLOAT32,
        rngs=nnx.Rngs(0),
        **options,
    )


def _shaken(generator, scale=0.6, seed=1):
    """Every parameter drawn anew: logits of some size, no layer without effect."""
    graph, params, rest = nnx.split(generator, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [
        leaf + scale * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


@functools.cache
def form(name):
    layout, options = FORMS[name]
    return _shaken(_make(layout, **options))


logits_of = jax.jit(lambda generator, batch: generator.logits(batch))
generate = jax.jit(decode.generate, static_argnums=(1, 3))


def _batch(layout, B=3, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, layout.vocab, (B, layout.length, layout.groups))
    mask = rng.uniform(size=tokens.shape) < 0.5
    mask[:, 0], mask[:, -1] = True, False
    label_B = rng.integers(0, CLASSES, B)
    return interfaces.TokenBatch(jnp.asarray(tokens), jnp.asarray(label_B)), jnp.asarray(mask)


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


# ---------------------------------------------------------------- how many stay unknown

# Facts of the published samplers: schedule, slots, steps, unknown after each step before the last
COUNTS = [
    ("cosine", 256, (251, 236, 212, 181, 142, 97, 49, 1)),
    # the 8th of 12 is 256 cos(pi/3): 128 in float64, 127 in the float32 of the published sampler
    ("cosine", 256, (253, 247, 236, 221, 203, 181, 155, 127, 97, 66, 33, 1)),
    (
        "cosine",
        256,
        (254, 251, 244, 236, 225, 212, 197, 181, 162, 142, 120, 97, 74, 49, 25, 1),
    ),
    ("arccos", 32, (29, 26, 24, 21, 18, 14, 10, 1)),
    ("arccos", 64, (58, 53, 48, 42, 36, 29, 20, 1)),
    (
        "arccos",
        128,
        (
            *(126, 125, 124, 122, 121, 120, 119, 117, 116, 115, 113, 112, 111, 110, 108, 107),
            *(106, 104, 103, 102, 100, 99, 98, 96, 95, 93, 92, 91, 89, 88, 86, 85),
            *(83, 82, 80, 79, 77, 76, 74, 72, 71, 69, 67, 66, 64, 62, 60, 58),
            *(56, 54, 52, 50, 48, 46, 43, 41, 38, 35, 32, 28, 25, 20, 14, 1),
        ),
    ),
    (
        "arccos",
        512,
        (
            *(506, 501, 496, 491, 486, 481, 476, 471, 466, 460, 455, 450, 445, 440, 434, 429),
            *(424, 419, 413, 408, 403, 397, 392, 386, 381, 375, 370, 364, 358, 352, 347, 341),
            *(335, 329, 323, 317, 311, 304, 298, 291, 285, 278, 271, 264, 257, 250, 243, 235),
            *(227, 219, 211, 202, 193, 184, 174, 164, 153, 142, 129, 115, 100, 81, 57, 1),
        ),
    ),
]


@functools.cache
def _abstract(schedule, slots, steps):
    layout = interfaces.TokenLayout((2,), ((1, slots),))
    return nnx.eval_shape(lambda: _make(layout, steps=steps, schedule=schedule))


@pytest.mark.parametrize("schedule, slots, wanted", COUNTS)
def test_unknown_slots_after_each_step_are_the_published_ones(schedule, slots, wanted):
    steps = len(wanted)
    generator = _abstract(schedule, slots, steps)
    first_B = jnp.asarray([slots, slots // 2, 3, 0])

    @jax.jit
    def walk():
        def step(unknown_B, index):
            left_B = generator.left(index, first_B, unknown_B)
            return left_B, left_B

        return jax.lax.scan(step, first_B, jnp.arange(steps))[1]

    found = np.asarray(walk())
    np.testing.assert_array_equal(found[:-1, 0], wanted[:-1])
    assert wanted[-1] == 1 and (found[-1] == 0).all()  # the published list stops before the last
    # compiled or one by one, the same
    unknown_B = first_B
    for index in range(steps):
        unknown_B = generator.left(index, first_B, unknown_B)
        np.testing.assert_array_equal(unknown_B, found[index])
    # fewer than before at every step, until one is left
    before, after = np.vstack([first_B, found[:-1]])[:-1], found[:-1]
    fewer = (after < before) | (after == 1)
    assert fewer[:, :3].all() and (found[:-1, :3] >= 1).all()


# ---------------------------------------------------------------- decoding


@functools.partial(jax.jit, static_argnames=("sampler",))
def watched(generator, sampler, labels_B, given):
    """(final tokens, grids before every step): the steps unrolled in one program."""
    grids = []
    state = decode.generate(
        generator,
        None,
        labels_B,
        sampler,
        keys_B=jax.random.split(jax.random.key(7), len(labels_B)),
        given=given,
        observe=lambda state, index: grids.append(state.tokens_BLG),
    )
    return state.tokens_BLG, jnp.stack(grids)


def _with_steps(name, steps):
    generator = jax.tree.map(lambda leaf: leaf, form(name))
    generator.steps = steps
    return generator


def test_tokens_are_kept_once_committed_and_as_many_as_the_schedule_says():
    steps, B = 5, 4
    generator = _with_steps("maskbit", steps)
    layout = generator.layout
    slots = layout.length * layout.groups
    sampler = samplers.Sampler(guidance=(2.0, 1.0, 3.0, 2.0, 2.0), jitter=(3.0, 2.0, 1.0, 0.5, 0.0))
    mask = np.zeros((B, layout.length, layout.groups), bool)
    mask[1, ::2], mask[2, 1:, 0], mask[3] = True, True, True
    tokens = np.random.default_rng(3).integers(0, layout.vocab, mask.shape)
    given = jnp.asarray(tokens), jnp.asarray(mask)
    found = watched(generator, sampler, jnp.arange(B) % CLASSES, given)
    final, grids = map(np.asarray, found)
    unknown = np.concatenate([grids, final[None]]) == layout.absent
    # a step makes known, never unknown; what is known stays as it is, given tokens from the start
    assert (unknown[1:] <= unknown[:-1]).all() and not unknown[-1].any()
    for grid in (*grids, final):
        np.testing.assert_array_equal(grid[mask], tokens[mask])
        known = grid != layout.absent
        np.testing.assert_array_equal(grid[known], final[known])
    # only what is not given is counted
    count = unknown.sum((2, 3))
    first_B = slots - mask.sum((1, 2))
    np.testing.assert_array_equal(count[0], first_B)
    for step in range(steps - 1):
        share = math.acos((step + 1) / steps) * 2 / math.pi
        wanted = np.maximum(np.minimum(count[step] - 1, np.floor(first_B * share)), 1)
        np.testing.assert_array_equal(count[step + 1], np.minimum(wanted, first_B))
    sizes_G = np.asarray(layout.vocab)
    assert (final >= 0).all() and (final < sizes_G).all()


def test_an_image_does_not_depend_on_its_batch():
    generator = _with_steps("maskbit", 4)
    sampler = samplers.Sampler(temperature=10.0, guidance=(1.0, 2.0, 3.0, 4.0), jitter=1.0)
    keys_B, labels_B = jax.random.split(jax.random.key(5), 8), jnp.arange(8) % CLASSES
    together = generate(generator, None, labels_B, sampler, keys_B=keys_B).tokens_BLG
    for i in range(8):
        rows = slice(i, i + 1)
        alone = generate(generator, None, labels_B[rows], sampler, keys_B=keys_B[rows])
        np.testing.assert_array_equal(alone.tokens_BLG[0], together[i])
    assert len(np.unique(np.asarray(together).reshape(8, -1), axis=0)) == 8


def test_a_model_that_knows_no_absence_of_a_class_is_not_guided():
    with pytest.raises(interfaces.UserError, match="trained without: sample it with"):
        generate(
            form("maskgit"),
            None,
            jnp.arange(2),
            samplers.Sampler(guidance=(2.0,) * 8),
            keys_B=jax.random.split(jax.random.key(0), 2),
        )


def test_steps_are_the_plan():
    generator = _abstract("arccos", 8, 6)
    assert generator.plan() == (interfaces.Phase(0, 6, 0, 8),) and not generator.exact
    assert set(generator.knobs) == {"steps", "schedule", "exponent"}


# ---------------------------------------------------------------- the loss


def _reference(generator, columns, batch, mask):
    """The loss in float64, of the columns that the generator gives."""
    log = _log_softmax(columns)
    nats = -np.take_along_axis(log, np.asarray(batch.tokens_BLG)[..., None], -1)[..., 0]
    there = np.isfinite(log)
    even = -np.where(there, log, 0).sum(-1) / there.sum(-1)
    cost = (1 - generator.smoothing) * nats + generator.smoothing * even
    weight = np.where(mask, 1.0, generator.visible)
    if generator.mean is masked.over_samples:
        return np.mean([np.average(c, weights=w) for c, w in zip(cost, weight, strict=True)])
    return np.average(cost, weights=weight)


@jax.jit
def graded(generator, batch, mask):
    """(tokens that the loss shows, its columns, the loss, its scalars, its slope)."""
    seen = jnp.where(mask, generator.layout.absent, batch.tokens_BLG)
    columns = generator.columns(seen, batch.cond)

    def loss(columns):
        copy, shown = jax.tree.map(lambda leaf: leaf, generator), []

        def stand_in(tokens, cond, key=None):
            shown.append(tokens)
            return columns

        copy.columns = stand_in
        value, scalars = copy.masked_loss(batch, mask)
        return value, (scalars, shown[0])

    (value, (scalars, shown)), slope = jax.value_and_grad(loss, has_aux=True)(columns)
    return shown, columns, value, scalars, slope


@pytest.mark.parametrize("name", FORMS)
def test_the_loss_is_its_reference_and_what_is_masked_stays_hidden(name):
    generator = form(name)
    batch, mask = _batch(generator.layout)
    sizes_G = jnp.asarray(generator.layout.vocab)[None, None]
    other = (batch.tokens_BLG + 1) % sizes_G
    shown, columns, loss, scalars, slope = graded(generator, batch, mask)
    np.testing.assert_allclose(loss, _reference(generator, columns, batch, mask), rtol=2e-5)
    hits = (np.argmax(columns[..., : generator.layout.absent], -1) == batch.tokens_BLG) & mask
    np.testing.assert_allclose(scalars["token_accuracy"], hits.sum() / mask.sum(), rtol=1e-6)
    # the tokens under the mask are targets and nothing else
    under = batch.replace(tokens_BLG=jnp.where(mask, other, batch.tokens_BLG))
    again, same, its_loss, _, _ = graded(generator, under, mask)
    np.testing.assert_array_equal(shown, again)
    np.testing.assert_array_equal(shown == generator.layout.absent, mask)
    np.testing.assert_array_equal(columns, same)
    assert its_loss != loss
    # and a visible token is seen
    seen = graded(generator, batch.replace(tokens_BLG=other), mask)[1]
    assert np.abs(np.asarray(seen - columns)[np.isfinite(columns)]).max() > 1e-3
    # TiTok's loss gives visible slots a tenth of the weight, MaskBit's all of it
    hit = np.abs(np.asarray(slope)).max(-1) > 0
    everywhere = generator.visible > 0
    np.testing.assert_array_equal(hit, np.ones_like(hit) if everywhere else np.asarray(mask))
    assert everywhere == (name in ("titok", "titok_uvit", "maskbit"))
    assert np.isfinite(slope).all() and np.isfinite(jax.tree.leaves(scalars)).all()


def test_a_training_step_hides_slots_and_labels_by_its_key():
    drops = _make(PLAIN, label_drop=0.5, rates=dropout.Rates(residual=0.5))
    batch, _ = _batch(PLAIN, B=6)
    seen = []

    def columns(tokens, cond, *, key=None):
        seen.append((np.asarray(tokens), np.asarray(cond), key))
        return jnp.zeros((*tokens.shape, PLAIN.absent))

    drops.columns = columns
    for seed in (0, 0, 1):
        drops.loss(batch, None, step=0, key=jax.random.key(seed))
    (tokens, cond, key), again, other = seen
    np.testing.assert_array_equal(tokens, again[0])
    assert (tokens != other[0]).any() and key is not None
    hidden = tokens == PLAIN.absent
    np.testing.assert_array_equal(tokens[~hidden], np.asarray(batch.tokens_BLG)[~hidden])
    assert hidden.any((1, 2)).all()
    # no class, or the image's own
    assert ((cond == CLASSES) | (cond == np.asarray(batch.cond))).all()
    assert 0 < (cond == CLASSES).sum() < 6


# ---------------------------------------------------------------- masks

MANY = 4000
TIMES = np.linspace(0, 1, 9, dtype=np.float32)


def test_counted_masks_have_the_rounded_share_and_at_least_one():
    slots = 36
    layout = interfaces.TokenLayout((2,), ((1, slots),))
    generator = nnx.eval_shape(lambda: _make(layout, schedule="arccos"))
    uniform = np.random.default_rng(0).uniform(size=(len(TIMES), slots)).astype(np.float32)
    mask = np.asarray(generator.hidden_slots(jnp.asarray(TIMES), jnp.asarray(uniform)))
    share = np.arccos(TIMES.astype(np.float64)) * 2 / np.pi
    np.testing.assert_array_equal(mask.sum((1, 2)), np.maximum(np.round(share * slots), 1))
    # over random times and places: every slot as often as any other, the mean of the schedule
    keys = jax.random.split(jax.random.key(1), MANY)
    often = np.asarray(generator.masks(keys))[..., 0].mean(0)
    error = 0.5 / math.sqrt(MANY)  # of a share, at most
    np.testing.assert_allclose(often, 2 / math.pi, atol=5 * error)


def test_tossed_masks_are_bernoulli_of_the_schedule():
    slots, rows = 8, 2000
    layout = interfaces.TokenLayout((4, 4), ((1, slots // 2),))
    options = dict(schedule="cosine", masking="tossed")
    generator = nnx.eval_shape(lambda: _make(layout, **options))
    times = np.repeat(TIMES, rows)
    uniform = np.random.default_rng(0).uniform(size=(len(times), slots)).astype(np.float32)
    mask = np.asarray(generator.hidden_slots(jnp.asarray(times), jnp.asarray(uniform)))
    assert mask.shape == (len(times), slots // 2, 2)
    share = np.cos(np.pi / 2 * TIMES.astype(np.float64))
    found = mask.reshape(len(TIMES), -1).mean(1)
    np.testing.assert_allclose(found, share, atol=5 * 0.5 / math.sqrt(rows * slots))
    # none at all may be masked: the loss of such a batch is no division by zero
    assert not mask[-1].any()
    batch, _ = _batch(HALVES)
    nothing = jnp.zeros(batch.tokens_BLG.shape, bool)
    _, _, loss, scalars, slope = graded(form("maskbit_tokens"), batch, nothing)
    assert loss == 0 and scalars["nats_per_token"] == 0 and not np.any(slope)


# ---------------------------------------------------------------- the bound on the likelihood


def test_nats_are_an_unbiased_estimate_of_the_mean_over_orders():
    """L = 3, V = 2: all 6 orders and all 7 masks, written out in float64."""
    layout = interfaces.TokenLayout((2,), ((1, 3),))
    generator = _shaken(_make(layout), 0.2)
    tokens, label = np.array([1, 0, 1]), 2
    masks = np.array(list(itertools.product([False, True], repeat=3)))[1:]
    seen = np.where(masks, 2, tokens)[..., None]
    batch = interfaces.TokenBatch(jnp.asarray(seen), jnp.full(len(masks), label))
    log = _log_softmax(logits_of(generator, batch))[:, :, 0]
    nats = -log[:, np.arange(3), tokens]  # [mask, position]
    at = {tuple(mask): row for mask, row in zip(masks, nats, strict=True)}

    def chain(order):
        unknown, total = [True] * 3, 0.0
        for position in order:
            total += at[tuple(unknown)][position]
            unknown[position] = False
        return total

    by_order = [chain(order) for order in itertools.permutations(range(3))]
    exact = np.mean(by_order)
    # no less than what the mixture of all orders pays
    assert exact >= -np.log(np.mean(np.exp(-np.array(by_order)))) and np.ptp(by_order) > 0.1

    whole = interfaces.TokenBatch(jnp.tile(tokens[None, :, None], (MANY, 1, 1)), jnp.full(MANY, 2))
    estimate = np.asarray(jax.jit(lambda g, k: g.nats(whole, key=k))(generator, jax.random.key(2)))
    assert estimate.shape == (MANY, 3)
    total = estimate.astype(np.float64).sum(-1)
    # each is the cost of one of the 7 masks, by their number
    costs = np.array(
        [3 / mask.sum() * row[mask].sum() for mask, row in zip(masks, nats, strict=True)]
    )
    nearest = np.abs(total[:, None] - costs).argmin(-1)
    np.testing.assert_allclose(total, costs[nearest], rtol=1e-5)
    # the number is uniform, and the mask among those of its number
    often = np.bincount(nearest, minlength=7) / MANY
    wanted = np.array([1 / 3 / math.comb(3, mask.sum()) for mask in masks])
    np.testing.assert_allclose(often, wanted, atol=5 * 0.5 / math.sqrt(MANY))
    np.testing.assert_allclose(wanted @ costs, exact, rtol=1e-12)  # so it has no bias


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(steps=0), "steps must be"),
        (dict(visible=-0.1), "visible must be"),
        (dict(smoothing=1.0), "smoothing must be"),
        (dict(schedule="arcos"), "schedule must be one of"),
        (dict(masking="all"), "masking must be one of .*counted.*found 'all'"),
        (dict(mean="batch"), "mean must be one of .*samples.*found 'batch'"),
        (dict(entry="none"), "entry must be one of"),
        (dict(stack="heap"), "stack must be one of"),
        (dict(inputs="bits"), "bits need alphabets that are powers of two"),
        (dict(layout=HALVES, head="tied_to_all"), "one symbol per position"),
        (dict(classes=0, label_drop=None), "needs the row of no class.*label_drop=0.0"),
        (dict(variant="var"), "no condition for an adaptive variant"),
        (dict(head="factor"), "nor symbols in turn"),
        (dict(inputs="bits", head="tied_per_position"), "needs inputs='tokens'"),
        (dict(stack="u_shaped", rates=dropout.Rates(path=0.1)), "drops no whole branches"),
    ],
)
def test_a_constructor_says_what_it_needs(options, said):
    with pytest.raises(ValueError, match=said):
        nnx.eval_shape(lambda: _make(**options))


def test_a_preset_with_an_unknown_schedule_is_told():
    with pytest.raises(interfaces.UserError, match="schedule must be one of.*found 'arcos'"):
        presets.prepare(nnx.eval_shape(_make), {"schedule": "arcos"})


def test_a_head_that_is_tied_to_all_words_leaves_no_class_out():
    """Any head with any labels: MaskGIT's, trained to be guided."""
    generator = _make(variant="maskgit", entry="normed", head="tied_to_all", label_drop=0.1)
    batch, mask = _batch(PLAIN)
    columns = jax.eval_shape(graded, generator, batch, mask)[1]
    assert columns.shape[-1] == PLAIN.absent + CLASSES + 1
    assert jax.eval_shape(logits_of, generator, batch).shape[-1] == PLAIN.absent
