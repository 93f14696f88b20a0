import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import recipes
from tokgen import interfaces, rng
from tokgen.generators import autoregressive, masked
from tokgen.nn.precision import FLOAT32
from tokgen.sampling import decode, sampler as samplers

LAYOUT = interfaces.TokenLayout((16,), ((3, 3),))
L, CLASSES, V = LAYOUT.length, 5, LAYOUT.absent

# the generator is an argument, the sampler static: as every command calls it
_generate = jax.jit(decode.generate, static_argnums=(1, 3))


class Spy(autoregressive.Generator):
    """A generator that notes, while it is traced, how many rows each phase works on."""

    def step(self, state, phase, index, codec, draw):
        ROWS.append((phase.first, phase.steps, len(state.tokens_BLG)))
        return super().step(state, phase, index, codec, draw)


class MaskedSpy(masked.Generator):
    """The same of a generator that has no cache."""

    def step(self, state, phase, index, codec, draw):
        ROWS.append((phase.first, phase.steps, len(state.tokens_BLG)))
        return super().step(state, phase, index, codec, draw)


class Nobody(autoregressive.Generator):
    """The same network, told nothing: the null class as a network of its own."""

    def start(self, cond, codec=None, *, keys_B, given):
        return super().start(self.null(cond), codec, keys_B=keys_B, given=given)


class Stumbling(autoregressive.Generator):
    """A generator with one broken step for one image, and none after it."""

    def step(self, state, phase, index, codec, draw):
        def stumble(logits_BlGV, symbol=0, wanted_BlG=None):
            broken_B = (jnp.arange(len(logits_BlGV)) == 1) & (index == 4)
            return draw(
                jnp.where(broken_B[:, None, None, None], jnp.nan, logits_BlGV), symbol, wanted_BlG
            )

        return super().step(state, phase, index, codec, stumble)


ROWS = []


@functools.cache
def _make(kind=autoregressive.Generator, **options):
    generator = kind(
        LAYOUT,
        CLASSES,
        width=16,
        depth=1,
        heads=2,
        variant="llama_narrow",
        precision=FLOAT32,
        rngs=nnx.Rngs(0),
        **options,
    )
    kernel = generator.head.head.kernel
    kernel[...] = 0.75 * jax.random.normal(jax.random.key(1), kernel.shape)
    return generator


LABELS = np.asarray([3, 0, 4, 3, 1, 2, 3])


def _draw(sampler, generator=None, images=range(7), **options):
    """The final state for some of seven images; each has its label and its key."""
    images = jnp.asarray(list(images))
    generator = _make() if generator is None else generator
    keys_B = rng.per_image(0, "sample", images)
    return _generate(
        generator, None, jnp.asarray(LABELS)[images], sampler, keys_B=keys_B, **options
    )


GUIDED = samplers.Sampler(temperature=0.9, top_k=12, guidance=(3.0,) * L)
# Guided decodes have all that plain ones have, and the null rows.
both_ways = pytest.mark.parametrize(
    "sampler",
    [pytest.param(samplers.Sampler(), marks=pytest.mark.long, id="plain"),
     pytest.param(GUIDED, id="guided")],
)  # fmt: skip


def test_an_image_alone_is_the_image_in_any_batch():
    state = _draw(GUIDED)
    together = np.asarray(state.tokens_BLG)
    assert together.shape == (7, L, 1) and together.min() >= 0 and together.max() < V
    assert len(np.unique(together, axis=0)) == 7  # images 0, 3 and 6 share a label, not a key
    for images in ([2, 5, 0, 6], [5]):
        part = _draw(GUIDED, images=images)
        np.testing.assert_array_equal(part.tokens_BLG, together[images])
        assert part.invalid_B.shape == (len(images),) and len(part.keys_B) == len(images)
    assert len(state.cond) == 7 and not np.any(state.invalid_B)


def test_weight_1_everywhere_is_no_guidance_and_costs_nothing():
    ROWS.clear()
    plain = _draw(samplers.Sampler(), _make(Spy))
    ones = _draw(samplers.Sampler(guidance=(1.0,) * L), _make(Spy))
    np.testing.assert_array_equal(ones.tokens_BLG, plain.tokens_BLG)
    assert {rows for _, _, rows in ROWS} == {7}
    assert np.any(np.asarray(_draw(GUIDED).tokens_BLG) != np.asarray(plain.tokens_BLG))


@pytest.mark.parametrize("guided", [2, pytest.param(7, marks=pytest.mark.long)])
def test_null_rows_dropped_half_way_change_nothing(guided):
    # windows of 3 begin at steps 1, 4 and 7: one cut lies inside a window, one between two
    spy = _make(Spy, window=3)
    ROWS.clear()
    dropped = _draw(samplers.Sampler(guidance=(3.0,) * guided + (1.0,) * (L - guided)), spy)
    rows = dict.fromkeys(ROWS)  # a loop may be traced twice
    steps = {first + i: rows for first, count, rows in rows for i in range(count)}
    assert steps == {i: 14 if i < guided else 7 for i in range(L)}
    # the smallest weight above 1 keeps the null rows to the end, and moves logits by rounding only
    almost = float(np.nextafter(np.float32(1), np.float32(2)))
    ROWS.clear()
    kept = _draw(samplers.Sampler(guidance=(3.0,) * guided + (almost,) * (L - guided)), spy)
    assert {rows for _, _, rows in ROWS} == {14}
    np.testing.assert_array_equal(dropped.tokens_BLG, kept.tokens_BLG)
    for name in ("keys_B", "cond", "invalid_B", "given_BLG", "order_BL"):
        assert len(getattr(dropped, name)) == len(getattr(kept, name)) == 7


def test_null_rows_come_with_the_first_guided_step_where_nothing_is_cached():
    options = dict(width=16, depth=1, heads=2, precision=FLOAT32, rngs=nnx.Rngs(0))
    spy = recipes.scattered(MaskedSpy(LAYOUT, CLASSES, steps=5, **options))
    ROWS.clear()
    late = _draw(samplers.Sampler(guidance=(1.0, 1.0, 9.0, 1.0, 9.0)), spy)
    steps = {first + i: rows for first, count, rows in ROWS for i in range(count)}
    assert steps == {0: 7, 1: 7, 2: 14, 3: 14, 4: 14}
    ROWS.clear()
    almost = float(np.nextafter(np.float32(1), np.float32(2)))
    always = _draw(samplers.Sampler(guidance=(almost, 1.0, 9.0, 1.0, 9.0)), spy)
    assert {rows for _, _, rows in ROWS} == {14}
    np.testing.assert_array_equal(late.tokens_BLG, always.tokens_BLG)
    for name in ("keys_B", "cond", "invalid_B", "near_B", "given_BLG"):
        assert len(getattr(late, name)) == 7


@pytest.mark.parametrize("last", [pytest.param(L, marks=pytest.mark.long), 6])
def test_guidance_against_the_null_class_as_a_network_is_guidance(last):
    weights = ((3.0, 0.5, 1.0) * 3)[:last] + (1.0,) * (L - last)
    sampler = samplers.Sampler(guidance=weights)
    guided = _draw(sampler)
    against = _draw(sampler, against=_make(Nobody))
    np.testing.assert_array_equal(against.tokens_BLG, guided.tokens_BLG)
    assert len(against.keys_B) == 7 and not np.any(against.invalid_B)
    # against itself there is nothing to be guided away from
    itself = _draw(sampler, against=_make())
    plain = _draw(samplers.Sampler())
    np.testing.assert_array_equal(itself.tokens_BLG, plain.tokens_BLG)


@both_ways
def test_given_tokens_are_kept_and_the_others_drawn(sampler):
    numbers = np.random.default_rng(0)
    mask = numbers.uniform(size=(7, L, 1)) < 0.5
    mask[2], mask[4] = False, True
    # what stands outside the mask is not looked at, whatever it is
    given = np.where(mask, numbers.integers(0, V, mask.shape), 10**6)
    free = _draw(sampler)
    state = _draw(sampler, given=(jnp.asarray(given), jnp.asarray(mask)))
    tokens = np.asarray(state.tokens_BLG)
    np.testing.assert_array_equal(tokens[mask], given[mask])
    assert np.all((tokens >= 0) & (tokens < V))
    np.testing.assert_array_equal(tokens[2], free.tokens_BLG[2])
    # raster order: up to the first given token everything is drawn as before
    for b in range(7):
        until = np.argmax(mask[b, :, 0]) if mask[b].any() else L
        np.testing.assert_array_equal(tokens[b, :until], free.tokens_BLG[b, :until])
    drawn = ~mask[[0, 1, 3, 5, 6]]
    changed = tokens[[0, 1, 3, 5, 6]] != np.asarray(free.tokens_BLG)[[0, 1, 3, 5, 6]]
    assert np.any(changed & drawn)  # what is given is seen by what follows


@pytest.mark.parametrize("sampler", [samplers.Sampler(), GUIDED], ids=["plain", "guided"])
def test_the_image_with_broken_logits_is_flagged_and_no_other(sampler):
    broken = jax.tree.map(lambda leaf: leaf, _make())
    table = broken.conditioning.labels.table
    table[...] = table[...].at[4].set(jnp.nan)  # the class of image 2
    state = _draw(sampler, broken)
    np.testing.assert_array_equal(state.invalid_B, LABELS == 4)
    sound = np.flatnonzero(LABELS != 4)
    np.testing.assert_array_equal(
        np.asarray(state.tokens_BLG)[sound], np.asarray(_draw(sampler).tokens_BLG)[sound]
    )
    assert np.all((np.asarray(state.tokens_BLG) >= 0) & (np.asarray(state.tokens_BLG) < V))


@both_ways
def test_a_flag_stays_up_when_later_logits_are_sound(sampler):
    state = _draw(sampler, _make(Stumbling), images=range(3))
    np.testing.assert_array_equal(state.invalid_B, [False, True, False])


def test_logits_that_break_late_are_flagged_too():
    # only after token 7: row 7 of the table is broken, and every image that draws it has a flag
    broken = jax.tree.map(lambda leaf: leaf, _make())
    broken.embeddings.table[...] = broken.embeddings.table[...].at[0, 7].set(jnp.inf)
    sampler = samplers.Sampler(temperature=2.0)
    flags = np.asarray(_draw(sampler, broken).invalid_B)
    tokens = np.asarray(_draw(sampler).tokens_BLG)[..., 0]
    expected = np.any(tokens[:, :-1] == 7, axis=1)  # the last token is no input
    np.testing.assert_array_equal(flags, expected)
    assert 0 < expected.sum() < 7


def test_settings_per_step_are_read_at_their_step():
    # greedy but for one step inside a window
    hot = 5
    temperature = tuple(3.0 if step == hot else 0.0 for step in range(L))
    best = np.asarray(_draw(samplers.Sampler(temperature=0)).tokens_BLG)
    mixed = np.asarray(_draw(samplers.Sampler(temperature=temperature)).tokens_BLG)
    np.testing.assert_array_equal(mixed[:, :hot], best[:, :hot])
    assert np.any(mixed[:, hot] != best[:, hot])


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.Sampler(guidance=(2.0,) * (L - 1)),
        samplers.Sampler(guidance=(2.0,) * (L + 1)),
        samplers.Sampler(guidance=(1.0,) * (L + 1)),
        samplers.Sampler(temperature=(1.0,) * 2),
    ],
)
def test_settings_for_another_plan_are_refused(sampler):
    with pytest.raises(ValueError, match=f"the plan has {L} steps.*{sampler.steps}"):
        _draw(sampler)


@both_ways
def test_a_watched_decode_draws_the_same_tokens(sampler):
    generator = _make(window=4)
    if sampler.guidance:  # null rows go after step 5, inside a window
        sampler = samplers.Sampler(temperature=0.9, guidance=(3.0,) * 6 + (1.0,) * 3)
    keys_B = rng.per_image(0, "sample", jnp.arange(7))

    @jax.jit
    def watched(generator):
        seen = []
        state = decode.generate(
            generator,
            None,
            jnp.asarray(LABELS),
            sampler,
            keys_B=keys_B,
            observe=lambda state, index: seen.append((index, state.cond, state.tokens_BLG)),
        )
        return state.tokens_BLG, seen

    tokens, seen = watched(generator)
    np.testing.assert_array_equal(tokens, _draw(sampler, generator).tokens_BLG)
    assert [int(index) for index, _, _ in seen] == list(range(L))
    for index, label_B, before_BLG in seen:
        np.testing.assert_array_equal(label_B, LABELS)  # the conditions' rows, not their nulls
        np.testing.assert_array_equal(before_BLG[:, :index], tokens[:, :index])
        np.testing.assert_array_equal(before_BLG[:, index:], V)


class Table(nnx.Module):
    """Three steps, each of which draws every position, its symbols at once or in turn."""

    layout = interfaces.TokenLayout((6, 6), ((1, 4),))

    def __init__(self, in_turn: bool):
        self.in_turn, self.apart = in_turn, False
        self.logits_cGV = nnx.Param(2 * jax.random.normal(jax.random.key(3), (2, 2, 6)))

    def null(self, cond):
        return jnp.zeros_like(cond)

    def unstacked(self):
        copy = jax.tree.map(lambda leaf: leaf, self)
        copy.apart = True
        return copy

    def plan(self):
        return (interfaces.Phase(0, 3, 0, 4),)

    def start(self, cond, codec=None, *, keys_B, given):
        order_BL = jnp.broadcast_to(jnp.arange(4), (len(keys_B), 4))
        return interfaces.DecodeState(*given, order_BL=order_BL, cond=cond, keys_B=keys_B)

    def step(self, state, phase, index, codec, draw):
        assert self.apart
        logits_BGV = self.logits_cGV[...][state.cond]
        logits_BlGV = jnp.broadcast_to(logits_BGV[:, None], (len(logits_BGV), 4, 2, 6))
        if self.in_turn:
            parts = [draw(logits_BlGV[:, :, g : g + 1], symbol=g)[0] for g in range(2)]
            return state.write(state.order_BL, jnp.concatenate(parts, -1))
        return state.write(state.order_BL, draw(logits_BlGV)[0])


@pytest.mark.parametrize("in_turn", [False, True])
def test_each_symbol_has_its_own_weight(in_turn):
    generator = Table(in_turn)
    logits = np.asarray(generator.logits_cGV[...], np.float64)
    weights = np.asarray([-1.5, 2.5])
    expected = np.argmax(logits[0] + weights[:, None] * (logits[1] - logits[0]), -1)
    swapped = np.argmax(logits[0] + weights[::-1, None] * (logits[1] - logits[0]), -1)
    assert np.all(expected != swapped), "these logits cannot tell the symbols apart"
    sampler = samplers.Sampler(temperature=0, guidance=(1.0, 1.0, tuple(weights)))
    keys_B = rng.per_image(0, "sample", jnp.arange(2))
    state = _generate(generator, None, jnp.ones(2, jnp.int32), sampler, keys_B=keys_B)
    np.testing.assert_array_equal(state.tokens_BLG, np.broadcast_to(expected, (2, 4, 2)))
    assert not generator.apart
    sampler = samplers.Sampler(guidance=((1.0, 2.0, 3.0),) * 3)
    with pytest.raises(ValueError, match="needs 2 weights.*found 3"):
        decode.generate(generator, None, jnp.ones(2, jnp.int32), sampler, keys_B=keys_B)


class Replay:
    """What `generate` asks of a sampler, and no more: it draws recorded tokens."""

    steps, guidance = 3, (1.0, 2.0, 1.0)

    def __init__(self, recorded):
        self.recorded = recorded

    def draw(self, logits_BlGV, *, keys_B, step, symbol=0):
        tokens_BlG = self.recorded[step][:, :, symbol : symbol + logits_BlGV.shape[2]]
        near_B = jnp.zeros(len(keys_B), bool)
        return interfaces.Drawn(tokens_BlG, jnp.zeros(tokens_BlG.shape), near_B)


def test_a_sampler_is_whatever_draws():
    recorded = jnp.asarray(np.random.default_rng(4).integers(0, 6, (3, 2, 4, 2)), jnp.int32)
    keys_B = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def replayed(generator):
        seen = []
        state = decode.generate(
            generator,
            None,
            jnp.ones(2, jnp.int32),
            Replay(recorded),
            keys_B=keys_B,
            observe=lambda state, index: seen.append(state.tokens_BLG),
        )
        return seen, state.tokens_BLG

    seen, tokens = replayed(Table(False))
    np.testing.assert_array_equal(seen[1:] + [tokens], recorded)


def test_generating_leaves_the_generator_as_it_was():
    generator = _make()
    decode.steps(generator)
    jax.eval_shape(
        lambda g: decode.generate(
            g, None, jnp.zeros(2, jnp.int32), GUIDED, keys_B=jax.random.split(jax.random.key(0), 2)
        ),
        generator,
    )
    assert not isinstance(generator.transformer.blocks, nnx.List)
    assert decode.steps(generator) == L


def test_what_a_loop_does_not_carry_is_not_needed_in_it():
    # a state must hold what CARRIED names, else a loop would lose it without a word
    fields = {field.name for field in interfaces.DecodeState.__dataclass_fields__.values()}
    assert set(interfaces.CARRIED) < fields


@pytest.mark.parametrize("weight", [pytest.param(1.0, marks=pytest.mark.long), 4.0])
def test_one_token_is_the_greedy_one_under_guidance_too(weight):
    generator, alone = _make(), []
    for options in (dict(temperature=0.0), dict(top_k=1), dict(top_p=1e-6)):
        state = _draw(samplers.Sampler(guidance=(weight,) * L, **options), generator)
        alone.append(np.asarray(state.tokens_BLG))
    np.testing.assert_array_equal(alone[0], alone[1])
    np.testing.assert_array_equal(alone[0], alone[2])
    if weight == 1:  # no guidance, to the bit
        plain = _draw(samplers.Sampler(temperature=0.0), generator)
        np.testing.assert_array_equal(alone[0], plain.tokens_BLG)


def test_what_is_given_must_be_of_the_layout():
    mask = np.zeros((7, L, 1), bool)
    mask[:, 2] = True
    for tokens, where, words in (
        (np.full((7, L, 1), V), mask, "found 0 to 16"),  # held, and no token
        (np.zeros((7, L, 1), np.int32), mask.astype(np.int32), "need a mask"),
        (np.zeros((7, L, 1), np.int32), mask[:, :3], "need a mask"),
        (np.zeros((7, L - 1, 1), np.int32), mask[:, 1:], "found 8 of 1"),
        (np.zeros((6, L, 1), np.int32), mask[1:], "given of 6"),
    ):
        with pytest.raises(interfaces.UserError, match=words):
            decode.generate(
                *(_make(), None, jnp.asarray(LABELS), samplers.Sampler()),
                keys_B=rng.per_image(0, "sample", jnp.arange(7)),
                given=(tokens, where),
            )


def test_conditions_must_be_as_many_as_keys():
    with pytest.raises(interfaces.UserError, match="keys of 6, conditions of 7"):
        decode.generate(
            *(_make(), None, jnp.asarray(LABELS), samplers.Sampler()),
            keys_B=rng.per_image(0, "sample", jnp.arange(6)),
        )
