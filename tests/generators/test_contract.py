"""Every generator against what `interfaces` says that it and its driver may assume."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import interfaces, rng
from tokgen.generators import autoregressive, masked, next_scale
from tokgen.interfaces import Text, TokenBatch, TokenLayout, UserError
from tokgen.nn import attention
from tokgen.nn.precision import FLOAT32
from tokgen.quantizers import multiscale
from tokgen.sampling import decode, sampler

B, CLASSES = 3, 5
SMALL = dict(width=16, depth=1, heads=2, hidden=16, precision=FLOAT32)
FLAT, PAIRS = TokenLayout((7,), ((2, 2),)), TokenLayout((4, 8), ((2, 2),))
PYRAMID = TokenLayout((8,), ((1, 1), (2, 2)))
TEXTS = (3, 6)

# What differs between generators in decoding: the head, what adaptive blocks are told, the
# condition, the order, one symbol or two, the stack.
GENERATORS = {
    "autoregressive": (autoregressive, FLAT, dict(variant="llama_narrow", window=2)),
    "columns": (autoregressive, PAIRS, dict(order="columns", variant="llama_narrow")),
    "factor": (autoregressive, PAIRS, dict(variant="llama_narrow", head="factor", factor=1)),
    "rar": (
        autoregressive,
        FLAT,
        dict(
            variant="rar",
            conditioning="cls_label",
            positions="rar",
            head="adaptive",
            order="random",
        ),
    ),
    "captions": (
        autoregressive,
        FLAT,
        dict(variant="llama_narrow", conditioning="captions", texts=TEXTS),
    ),
    "masked": (masked, PAIRS, dict(steps=3, inputs="bits")),
    "u_shaped": (
        masked,
        FLAT,
        dict(steps=3, stack="u_shaped", depth=2, variant="uvit", head="biased"),
    ),
    "next_scale": (next_scale, PYRAMID, dict(channels=3)),
}


@functools.cache
def make(name: str):
    """(generator, codec, conditions) of that name."""
    module, layout, options = GENERATORS[name]
    generator = module.Generator(layout, CLASSES, **(SMALL | options), rngs=nnx.Rngs(0))
    codec = None
    if module is next_scale:
        inner = dict(name="vq", codes=8, channels=3)
        codec = multiscale.Quantizer(inner, (1, 2), 0, grid=(2, 2), rngs=nnx.Rngs(1))
    cond = np.arange(B, dtype=np.int32)
    if generator.cond == "text":
        features = jax.random.normal(jax.random.key(2), (B, *TEXTS))
        cond = Text(features, jnp.arange(TEXTS[0])[None] >= jnp.arange(B)[:, None])
    return generator, codec, cond


def given_of(layout, mask_BLG) -> tuple[jax.Array, jax.Array]:
    """Zeros where a mask is true, V elsewhere."""
    return jnp.where(mask_BLG, 0, layout.absent).astype(jnp.int32), jnp.asarray(mask_BLG)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_states_what_is_asked_of_it(name):
    generator, _, cond = make(name)
    assert isinstance(generator.layout, TokenLayout) and generator.classes == CLASSES
    assert isinstance(generator.exact, bool) and isinstance(generator.any_order, bool)
    assert isinstance(generator.sees_given, bool)
    assert (generator.cond, generator.text) in (("label", None), ("text", TEXTS))
    assert generator.label_drop == 0.1
    assert all(hasattr(generator, knob) for knob in generator.knobs)
    methods = {n for n, v in vars(interfaces.Generator).items() if is_method(n, v)}
    assert methods == {
        *("check", "null", "logits", "loss", "nats", "unstacked", "plan", "start", "step")
    }
    assert all(callable(getattr(generator, method)) for method in methods)
    fields = set(interfaces.Generator.__annotations__)
    assert all(hasattr(generator, field) for field in fields)


def is_method(name: str, value) -> bool:
    """Whether a protocol declares it as a method."""
    return callable(value) and not name.startswith("_")


@pytest.mark.parametrize("name", GENERATORS)
def test_a_condition_is_checked_and_has_a_null_of_its_kind(name):
    generator, codec, cond = make(name)
    generator.check(cond)
    null = generator.null(cond)
    like = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cond)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), null) == like
    wrong = jax.tree.map(lambda leaf: leaf[:, :2] if leaf.ndim > 1 else leaf + CLASSES + 1, cond)
    with pytest.raises(UserError):
        generator.check(wrong)
    mask_BLG = np.zeros((B, generator.layout.length, generator.layout.groups), bool)
    with pytest.raises(UserError):
        keys_B = rng.per_image(0, "sample", jnp.arange(B))
        generator.start(wrong, codec, keys_B=keys_B, given=given_of(generator.layout, mask_BLG))


@pytest.mark.parametrize("name", GENERATORS)
def test_a_plan_is_static_and_its_phases_follow_each_other(name):
    generator, _, _ = make(name)
    plan, step = generator.plan(), 0
    assert hash(plan) == hash(generator.plan()) and plan == generator.plan()
    seen = np.zeros(generator.layout.length, int)
    for phase in plan:
        assert phase.first == step and phase.steps >= 1 and phase.size >= 1
        step += phase.steps
        for index in range(phase.first, step):
            place = 0 if phase.size == len(seen) else phase.place(index)
            assert 0 <= place <= len(seen) - phase.size
            seen[place : place + phase.size] += 1
    assert seen.min() >= 1  # every position is handled


@pytest.mark.parametrize("name", GENERATORS)
def test_a_step_changes_only_what_is_carried_and_no_shape(name):
    generator, codec, cond = make(name)
    layout, asked = generator.layout, []
    shape = (2 * B, layout.length, layout.groups)

    def draw(logits_BlGV, symbol=0, wanted_BlG=None):
        rows, positions, groups, size = logits_BlGV.shape
        assert rows == 2 * B and size == layout.absent and logits_BlGV.dtype == jnp.float32
        assert symbol + groups <= layout.groups
        asked.extend((positions, g) for g in range(symbol, symbol + groups))
        shape = (rows, positions, groups)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape)

    def walk(generator, cond):
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, generator.null(cond))
        keys_B = rng.per_image(0, "sample", jnp.arange(2 * B))
        given = given_of(layout, jnp.zeros(shape, bool))
        generator = generator.unstacked()
        state = generator.start(both, codec, keys_B=keys_B, given=given)
        assert state.invalid_B is None and state.tokens_BLG.shape == shape
        assert all(len(leaf) == 2 * B for leaf in jax.tree.leaves((state.keys_B, state.order_BL)))
        for phase in generator.plan():
            if state.cache is not None:
                state = state.replace(cache=tuple(c.grow(phase.slots) for c in state.cache))
            asked.clear()
            # in parts, as where guidance ends inside of it
            part = phase.split(phase.first + phase.steps - 1)[1] if phase.steps > 1 else phase
            after = generator.step(state, part, part.first, codec, draw)
            assert asked == [(phase.size, g) for g in range(layout.groups)]
            for field in state.__dataclass_fields__:
                if field not in interfaces.CARRIED:
                    before, now = (getattr(s, field) for s in (state, after))
                    same = zip(jax.tree.leaves(before), jax.tree.leaves(now), strict=True)
                    assert all(a is b for a, b in same), f"{field} changed, and would be lost"
            shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), s) for s in (state, after)]
            assert shapes[0] == shapes[1]
            state = after
        return state.tokens_BLG

    assert jax.eval_shape(walk, generator, cond).shape == shape
    assert not isinstance(generator.transformer.blocks, nnx.List)  # a copy was taken apart


@functools.partial(jax.jit, static_argnums=4)
def drawn(generator, codec, cond, keys_B, how, given):
    """The tokens of one decode, and which images are near a tie."""
    state = decode.generate(generator, codec, cond, how, keys_B=keys_B, given=given)
    return state.tokens_BLG, state.near_B


@dataclasses.dataclass(frozen=True)
class Wary:
    """A sampler all of whose draws that are taken are near a tie."""

    sampler: sampler.Sampler
    steps = None
    guidance = property(lambda self: self.sampler.guidance)

    def draw(self, logits_BlGV, *, wanted_BlG=None, **where):
        """As the sampler inside."""
        found = self.sampler.draw(logits_BlGV, wanted_BlG=wanted_BlG, **where)
        taken_BlG = jnp.ones(logits_BlGV.shape[:3], bool) if wanted_BlG is None else wanted_BlG
        return found._replace(near_B=jnp.any(taken_BlG, axis=(1, 2)))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("autoregressive", marks=pytest.mark.long),  # as rar, in one order
        *("factor", "rar", "masked", "next_scale"),
    ],
)
def test_given_tokens_stay_all_others_are_drawn_and_rows_do_not_see_each_other(name):
    generator, codec, cond = make(name)
    layout = generator.layout
    mask_BLG = np.random.default_rng(0).random((B, layout.length, layout.groups)) < 0.4
    mask_BLG[1], mask_BLG[2] = True, False
    tokens_BLG, keys_B = np.where(mask_BLG, 3, 99), rng.per_image(0, "sample", jnp.arange(B))
    how = Wary(sampler.Sampler(guidance=(2.0,) + (1.0,) * (decode.steps(generator) - 1)))
    found, near_B = drawn(generator, codec, cond, keys_B, how, (tokens_BLG, mask_BLG))
    found = np.asarray(found)
    np.testing.assert_array_equal(near_B, [True, False, True])  # not where all were held
    assert np.all(found[mask_BLG] == 3)
    assert np.all((found >= 0) & (found < np.asarray(layout.vocab)))
    back = jax.tree.map(lambda leaf: leaf[::-1], (cond, keys_B, (tokens_BLG, mask_BLG)))
    other, _ = drawn(generator, codec, back[0], back[1], how, back[2])
    np.testing.assert_array_equal(np.asarray(other)[::-1], found)


@pytest.mark.parametrize("name", ["rar", "next_scale"])
def test_a_decode_that_scans_over_layers_draws_the_same(name, monkeypatch):
    """As on a TPU, where the cache is one, and rows are dropped from it when guidance ends."""
    monkeypatch.setattr(decode, "SCANNED", ("cpu",))
    module, layout, options = GENERATORS[name]
    how = dict(SMALL, **options, depth=2)
    generator, codec, cond = module.Generator(layout, 5, **how, rngs=nnx.Rngs(3)), *make(name)[1:]
    keys_B = rng.per_image(0, "sample", jnp.arange(B))
    guided = sampler.Sampler(guidance=(2.0,) + (1.0,) * (decode.steps(generator) - 1))

    @jax.jit
    def last_state(generator):
        return decode.generate(generator, codec, cond, guided, keys_B=keys_B)

    states = [last_state(form) for form in (generator, generator.unstacked())]
    np.testing.assert_array_equal(*(state.tokens_BLG for state in states))
    (whole,), layers = (state.cache for state in states)
    for number, layer in enumerate(layers):
        found = attention.Layer(whole, jnp.asarray(number), how["heads"]).read()
        for ours, apart in zip(found, (layer.keys_BNSK, layer.values_BNSK), strict=True):
            np.testing.assert_allclose(ours, apart, atol=1e-5)


@pytest.mark.parametrize("name", GENERATORS)
def test_logits_loss_and_nats_have_their_shapes(name):
    generator, codec, cond = make(name)
    layout = generator.layout
    batch = TokenBatch(jnp.zeros((B, layout.length, layout.groups), jnp.int32), cond)
    key = jax.random.key(0)
    logits = jax.eval_shape(lambda g: g.logits(batch, codec), generator)
    assert logits.shape == (B, layout.length, layout.groups, layout.absent)
    assert logits.dtype == jnp.float32
    loss, scalars = jax.eval_shape(lambda g: g.loss(batch, codec, step=0, key=key), generator)
    assert loss.shape == () and all(value.shape == () for value in scalars.values())
    nats = jax.eval_shape(lambda g: g.nats(batch, codec, key=key), generator)
    assert nats.shape == (B, layout.length)
    if generator.any_order:
        order_BL = jnp.broadcast_to(jnp.arange(layout.length)[::-1], (B, layout.length))
        jax.eval_shape(lambda g: g.nats(batch.replace(order_BL=order_BL), codec), generator)
