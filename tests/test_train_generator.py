"""The generator's program: its step's key and average, and whose figures are measured."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import train_generator
from tokgen import parameters, rng, sharding
from tokgen.config import reading
from tokgen.evaluation import validation
from tokgen.training import generator_step, optimizer as optimizers, train_state


class Telling(nnx.Module):
    """A generator whose loss tells the key that it was given."""

    cond = "label"

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(3))

    def loss(self, batch, codec, *, step, key):
        drawn = jax.random.uniform(key)
        return jnp.sum(self.scale[...] * (1 + drawn)), {"drawn": drawn, "at": step}


@pytest.fixture
def step():
    """(settings, state, its compiled step) with an average."""
    settings = reading.load("configs/generator/shapes.py", ("seed=3", "ema=0.9"))
    optimizer = optimizers.optimizer(9, learning_rate=0.1, decay="constant")
    graph, state = train_state.create(
        Telling, optimizer, mesh=sharding.make_mesh(), ema=settings.ema
    )
    made = generator_step.step(settings, graph, optimizer)

    def copied(state, batch=BATCH):
        return made(jax.tree.map(jnp.copy, state), batch, None)

    return settings, state, copied


BATCH = {"tokens": np.zeros((2, 4, 1), np.int32), "label": np.zeros(2, np.int32)}


def test_every_step_has_a_key_of_its_own(step):
    settings, state, made = step
    for number in (0, 1, 2, 7):
        _, scalars = made(state.replace(step=jnp.asarray(number, jnp.int32)))
        assert scalars["drawn"] == jax.random.uniform(rng.key(3, "train", number))
        assert scalars["at"] == number


def test_a_step_works_in_the_memory_of_the_state_that_it_is_given(step):
    """Donated, and really reused: every array of it, or the compiler warns."""
    settings, state, _ = step
    optimizer = optimizers.optimizer(9, learning_rate=0.1, decay="constant")
    made = generator_step.step(settings, parameters.split(Telling())[0], optimizer)
    given = jax.tree.map(jnp.copy, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(given, BATCH, None)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_nothing_is_learnt_from_images_that_were_not_encoded(step):
    """Their tokens are marked -1, which as an index would be the last code."""
    _, state, made = step
    tokens_BLG = BATCH["tokens"].copy()
    tokens_BLG[1] = -1
    after, scalars = made(state, BATCH | {"tokens": tokens_BLG})
    np.testing.assert_array_equal(after.params["scale"], state.params["scale"])
    assert after.step == 1 and scalars["skipped"] == 1
    assert np.isnan(scalars["drawn"])  # a figure of this step is none
    after, scalars = made(after)
    assert after.step == 2 and scalars["skipped"] == 0
    assert np.all(after.params["scale"] != state.params["scale"])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_packed_tokens_are_the_same_numbers_on_the_device(step, dtype, monkeypatch):
    """They come in the source's integers; what a generator sees has room for sums, and a sign."""
    _, state, made = step
    seen = []

    def loss(self, batch, codec, *, step, key):
        seen.append(batch.tokens_BLG.dtype)
        wide = batch.tokens_BLG + 1 - 2 * batch.tokens_BLG  # beyond any packed type
        return jnp.sum(self.scale[...]) * 1e-6 * jnp.sum(wide), {}

    monkeypatch.setattr(Telling, "loss", loss)
    top = np.iinfo(dtype).max
    tokens_BLG = np.array([0, 1, top - 1, top] * 2, np.int32).reshape(2, 4, 1)
    packed, plain = (
        made(state, BATCH | {"tokens": tokens_BLG.astype(kind)}) for kind in (dtype, np.int32)
    )
    jax.tree.map(np.testing.assert_array_equal, packed, plain)
    assert set(seen) == {jnp.dtype(jnp.int32)}


def test_the_average_has_the_decay_of_the_config(step):
    settings, state, made = step
    kernel = average = np.ones(3)
    for number in range(12):
        state, _ = made(state)
        kernel = np.asarray(state.params["scale"], np.float64)
        decay = min(0.9, number / (9 + number))
        average = decay * average + (1 - decay) * kernel
        np.testing.assert_allclose(state.ema["scale"], average, rtol=1e-5, atol=1e-6)
    assert np.abs(average - kernel).max() > 0.05


def test_held_out_figures_are_those_of_the_average(step, monkeypatch):
    settings, state, _ = step
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf + 5, state.params))
    graph, seen, logged = parameters.split(Telling())[0], [], []

    def likelihood(generator, codec, source, **options):
        seen.append(generator.scale[...])
        return {"nats_per_token": 1.5, "nats_error": 0.1}

    monkeypatch.setattr(validation, "likelihood", likelihood)
    with settings.unlocked():
        settings.held_out.samples = 0
    tokenizer = types.SimpleNamespace(module=types.SimpleNamespace(quantizer=None))
    log = types.SimpleNamespace(
        scalars=lambda *given, **options: logged.append((given, options)), keep=lambda: None
    )
    found = train_generator.measure(state, graph, ("held out", tokenizer), log, settings)
    np.testing.assert_array_equal(seen[0], np.full(3, 6.0))
    assert found["nats_per_token"] == 1.5 and logged == [((0, found), {"split": "held_out"})]
