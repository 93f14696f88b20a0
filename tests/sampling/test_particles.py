"""Particles: what is given after what is drawn, against the posterior written out in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen.generators import autoregressive, next_scale
from tokgen.interfaces import TokenBatch, TokenLayout
from tokgen.nn.precision import Precision
from tokgen.quantizers import multiscale
from tokgen.sampling import decode, drawing, particles, sampler

SMALL = dict(width=16, depth=1, heads=2, precision=Precision())


def raster():
    """A generator of four places of three symbols, with opinions."""
    layout = TokenLayout((3,), ((2, 2),))
    made = autoregressive.Generator(
        layout, 2, order="raster", positions="rotary", **SMALL, rngs=nnx.Rngs(0)
    )
    return strong(made), None


def scales():
    """Scales of one and of four places."""
    codec = multiscale.Quantizer(
        dict(name="vq", codes=3, channels=3), (1, 2), 0, grid=(2, 2), rngs=nnx.Rngs(1)
    )
    made = next_scale.Generator(codec.layout, 2, channels=3, **SMALL, rngs=nnx.Rngs(0))
    return strong(made), codec


def strong(generator):
    """Every parameter drawn anew, larger: tokens depend on those before them."""
    numbers = np.random.default_rng(3)
    graph, state = nnx.split(generator)
    drawn = jax.tree.map(lambda a: jnp.asarray(numbers.normal(0, 0.5, a.shape), a.dtype), state)
    return nnx.merge(graph, drawn)


@pytest.mark.parametrize(
    ("make", "weight", "images", "count"),
    [
        pytest.param(raster, 1.0, 512, 32, marks=pytest.mark.long),
        (raster, 1.5, 400, 16),
        pytest.param(scales, 1.0, 512, 32, marks=pytest.mark.long),
        pytest.param(scales, 1.5, 512, 32, marks=pytest.mark.long),
    ],
)
def test_what_is_drawn_is_distributed_as_given_what_comes_later(make, weight, images, count):
    generator, codec = make()
    L, V = generator.layout.length, generator.layout.absent
    held = {1: 0, L - 1: 2}  # one in the middle, and the last
    every = np.array(list(itertools.product(range(V), repeat=L)), np.int32)[..., None]
    nats = guided_nats(generator, codec, every, weight)
    suits = np.all([every[:, place, 0] == token for place, token in held.items()], axis=0)
    wanted = np.exp(-nats[suits])
    wanted /= wanted.sum()

    tokens_LG = np.full((L, 1), V, np.int32)
    tokens_LG[list(held), 0] = list(held.values())
    given = np.repeat(tokens_LG[None], images, 0), np.repeat(tokens_LG[None] < V, images, 0)
    draw = functools.partial(
        drawing.draw_tokens,
        *(generator.unstacked(), codec, jnp.zeros(images, jnp.int32)),
        jax.random.split(jax.random.key(1), images),
        sampler.Sampler(guidance=(weight,) * len(plan_steps(generator))),
    )
    far = {}
    for particles_ in (1, count):
        found, invalid, _ = map(np.asarray, draw(given, particles=particles_))
        assert not invalid.any() and (found[:, list(held), 0] == list(held.values())).all()
        shares = (found[:, None] == every[suits][None]).all((-1, -2)).mean(0)
        far[particles_] = np.abs(shares - wanted).sum() / 2
    noise = np.sqrt(wanted * (1 - wanted) / images).sum() / 2
    assert far[1] > 3 * noise, "the case needs no particles: choose another"
    assert far[count] < 1.6 * noise


def test_of_scales_what_is_held_is_what_the_coarser_leave_of_latents_that_are_kept():
    generator, codec = scales()
    kept_BPC = jnp.asarray(np.random.default_rng(5).normal(size=(16, 4, 3)), jnp.float32)
    own_BLG = codec.encode(kept_BPC)
    held_L = np.array([False, True, False, True, True])
    guided = sampler.Sampler(guidance=(2.0, 1.0))  # the null rows go after the first scale
    # whether the coarsest is held, too
    for first, how in ((False, sampler.Sampler()), (True, sampler.Sampler()), (False, guided)):
        held_BLG = jnp.broadcast_to(jnp.asarray(held_L | (np.arange(5) == 0) & first), (16, 5))
        state = decode.generate(
            *(generator, codec, jnp.zeros(16, int), how),
            keys_B=jax.random.split(jax.random.key(0), 16),
            given=(own_BLG, held_BLG[..., None]),
            kept=kept_BPC,
        )
        known_BPC = codec.absorb(codec.empty(16), state.tokens_BLG[:, :1], 0)
        left_BlG = codec.left(kept_BPC, known_BPC, 1)
        np.testing.assert_array_equal(state.tokens_BLG[:, held_L], left_BlG[:, held_L[1:]])
        same = (state.tokens_BLG == own_BLG)[:, held_L].all()
        assert same if first else not same


def test_a_network_that_is_guided_away_from_sees_what_is_kept_too():
    """Away from itself is no guidance at all."""
    generator, codec = scales()
    held_BLG = jnp.tile(jnp.asarray([0, 1, 0, 1, 1], bool)[None, :, None], (16, 1, 1))
    how = dict(
        keys_B=jax.random.split(jax.random.key(0), 16),
        given=(jnp.zeros((16, 5, 1), int), held_BLG),
        kept=jnp.asarray(np.random.default_rng(5).normal(size=(16, 4, 3)), jnp.float32),
    )
    asked = (generator, codec, jnp.zeros(16, int))
    plain = decode.generate(*asked, sampler.Sampler(), **how)
    away = sampler.Sampler(guidance=(2.0, 2.0))
    again = decode.generate(*asked, away, against=generator, **how)
    np.testing.assert_array_equal(again.tokens_BLG, plain.tokens_BLG)


def test_latents_are_kept_by_a_generator_that_holds_them_alone():
    generator, _ = raster()
    keys_B = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="leave kept out"):
        decode.generate(
            *(generator, None, jnp.zeros(2, int), sampler.Sampler()),
            keys_B=keys_B,
            kept=jnp.zeros((2, 4, 3)),
        )


@pytest.mark.long
@pytest.mark.parametrize("freedom", [multiscale.FREEDOM, 40.0])
def test_of_scales_the_posterior_is_of_those_that_suit_the_latents_that_are_kept(
    freedom, monkeypatch
):
    """However sure the codec is of what to draw toward: it is paid back."""
    monkeypatch.setattr(multiscale, "FREEDOM", freedom)
    generator, codec = scales()
    images, held_L = 256, np.array([False, False, True, False, True])
    kept_1PC = jnp.asarray(np.random.default_rng(34).normal(size=(1, 4, 3)), jnp.float32)
    every = np.array(list(itertools.product(range(3), repeat=5)), np.int32)[..., None]
    known = codec.absorb(codec.empty(len(every)), jnp.asarray(every[:, :1]), 0)
    left = np.asarray(codec.left(jnp.repeat(kept_1PC, len(every), 0), known, 1))
    suits = (left == every[:, 1:])[:, held_L[1:]].all((1, 2))
    wanted = np.exp(-guided_nats(generator, codec, every, 0.4)[suits])
    wanted /= wanted.sum()
    given = (np.zeros((images, 5, 1), np.int32), np.tile(held_L[None, :, None], (images, 1, 1)))
    found, invalid, _ = drawing.draw_tokens(
        *(generator.unstacked(), codec, jnp.zeros(images, jnp.int32)),
        *(jax.random.split(jax.random.key(1), images), sampler.Sampler(guidance=(0.4, 0.4))),
        *(given, jnp.repeat(kept_1PC, images, 0)),
        particles=16,
    )
    shares = (np.asarray(found)[:, None] == every[suits][None]).all((-1, -2)).mean(0)
    noise = np.sqrt(wanted * (1 - wanted) / images).sum() / 2
    assert not np.asarray(invalid).any() and shares.sum() == 1
    assert np.abs(shares - wanted).sum() / 2 < 1.6 * noise


def plan_steps(generator):
    """Numbers of the decoding steps."""
    last = generator.plan()[-1]
    return range(last.first + last.steps)


def guided_nats(generator, codec, tokens_NLG, weight):
    """Nats under the guided conditionals, place by place, of teacher-forced logits, in float64."""
    logits = []
    for label in (0, generator.classes):
        batch = TokenBatch(jnp.asarray(tokens_NLG), jnp.full(len(tokens_NLG), label))
        logits.append(np.asarray(generator.logits(batch, codec), np.float64)[:, :, 0])
    merged = logits[1] + weight * (logits[0] - logits[1])
    merged -= np.log(np.exp(merged).sum(-1, keepdims=True))
    return -np.take_along_axis(merged, tokens_NLG, -1)[..., 0].sum(-1)


def test_systematic_resampling_gives_each_its_share_and_is_off_by_less_than_one():
    shares = np.random.default_rng(0).dirichlet(np.ones(8) * 0.5, 20)
    for share in shares:
        counts = []
        for uniform in (np.arange(200) + 0.5) / 200:
            found = np.asarray(particles.systematic(jnp.asarray(share), jnp.asarray(uniform)))
            assert (np.diff(found) >= 0).all() and found.max() < 8
            counts.append(np.bincount(found, minlength=8))
        counts = np.array(counts)
        assert np.abs(counts - 8 * share).max() < 1 + 1e-5
        np.testing.assert_allclose(counts.mean(0), 8 * share, atol=0.02)


def test_rows_of_an_image_are_its_own_whatever_the_batch():
    generator, _ = raster()
    tokens = np.full((6, 4, 1), 3, np.int32)
    tokens[:, 3] = np.arange(6)[:, None] % 3
    keys = jax.random.split(jax.random.key(2), 6)
    labels = jnp.asarray([0, 1, 0, 1, 0, 1])
    draw = functools.partial(drawing.draw_tokens, generator.unstacked(), None)
    how = sampler.Sampler()
    whole, *_ = draw(labels, keys, how, (tokens, tokens < 3), particles=8)
    for part in (slice(0, 2), slice(4, 6)):
        given = tokens[part], tokens[part] < 3
        own, *_ = draw(labels[part], keys[part], how, given, particles=8)
        np.testing.assert_array_equal(own, whole[part])


def test_where_no_particle_can_have_what_is_given_none_is_likelier():
    never = -np.inf
    weight_B = jnp.asarray([never] * 4 + [0.0, never, 1.0, never])
    carried = {"weight_B": weight_B, "tokens_BLG": jnp.arange(8)[:, None, None]}
    keys_B = jax.random.split(jax.random.key(0), 8)
    found = jax.jit(particles.resampled, static_argnums=3)(carried, keys_B, 1, 4)
    np.testing.assert_array_equal(found["weight_B"][:4], 0)
    np.testing.assert_array_equal(found["tokens_BLG"][:4, 0, 0], np.arange(4))
    assert {4, 6} >= set(np.asarray(found["tokens_BLG"][4:, 0, 0])), "only those that can"


def test_rows_with_orders_of_their_own_do_not_follow_each_other():
    layout = TokenLayout((3,), ((2, 2),))
    made = autoregressive.Generator(layout, 2, order="random", **SMALL, rngs=nnx.Rngs(0))
    keys_B = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="one order for all rows"):
        decode.generate(
            made, None, jnp.zeros(2, int), sampler.Sampler(), keys_B=keys_B, particles=2
        )
