"""The tokenizer's program: whose figures are measured, and its average."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import train_tokenizer
from tokgen import sharding
from tokgen.config import reading
from tokgen.evaluation import validation
from tokgen.training import optimizer as optimizers, stages, tokenizer_step, train_state


class Net(nnx.Module):
    """A network of three numbers."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(3))


def test_the_average_has_the_decay_of_the_config():
    settings = reading.load("configs/tokenizer/shapes.py:ema", ("ema=0.9",))
    optimizer = optimizers.optimizer(9, learning_rate=0.1, decay="constant")
    _, state = train_state.create(Net, optimizer, mesh=sharding.make_mesh(), ema=settings.ema)
    average = np.ones(3)
    for number in range(12):
        gradients = {"scale": jnp.ones(3)}
        state, _ = tokenizer_step.improved(
            settings, stages.Stage(), state, gradients, optimizer, 0.0
        )
        kernel = np.asarray(state.params["scale"], np.float64)
        decay = min(0.9, number / (9 + number))
        average = decay * average + (1 - decay) * kernel
        np.testing.assert_allclose(state.ema["scale"], average, rtol=1e-5, atol=1e-6)
    assert np.abs(average - kernel).max() > 0.05


def test_held_out_figures_are_those_of_the_average(monkeypatch):
    settings = reading.load("configs/tokenizer/shapes.py:ema")
    optimizer = optimizers.optimizer(9, learning_rate=0.1)
    graph, state = train_state.create(Net, optimizer, mesh=sharding.make_mesh(), ema=0.9)
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf + 5, state.params))
    seen, logged = [], []
    picture = np.zeros((2, 4, 4, 3), np.uint8)

    def reconstruction(tokenizer, source, view, **options):
        seen.append(tokenizer.scale[...])
        return {"psnr_db": 20.0, "l2": 0.25, "images": 2}, (picture, picture)

    monkeypatch.setattr(validation, "reconstruction", reconstruction)
    log = types.SimpleNamespace(
        scalars=lambda *given, **options: logged.append((given, options)),
        keep=lambda: None,
        image=lambda *given: None,
    )
    found = train_tokenizer.measure({"model": state}, graph, ["held out"], log, settings)
    np.testing.assert_array_equal(seen[0], np.full(3, 6.0))
    assert found["l2"] == 0.25 and logged == [((0, found), {"split": "held_out"})]
