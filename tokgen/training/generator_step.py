"""The generator's step: the loss of a batch of tokens, its gradients, the state that follows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from tokgen import rng
from tokgen.data import datasets
from tokgen.interfaces import TokenBatch
from tokgen.training import optimizer as optimizers, train_state


def step(
    settings: ml_collections.ConfigDict, graph: nnx.GraphDef, optimizer: optimizers.Optimizer
) -> Callable:
    """(network, batch, codec) -> (network, scalars)."""
    average = settings.get("average", "muse")

    @functools.partial(jax.jit, donate_argnums=0)
    def moved(network: train_state.TrainState, batch: Mapping[str, jax.Array], codec: nnx.Module):
        key = rng.key(settings.seed, "train", network.step)
        batch = TokenBatch(batch["tokens"], datasets.condition(batch))

        def loss(params):
            generator = train_state.learner(graph, network, params)
            found = generator.loss(batch, codec, step=network.step, key=key)
            # as an index, the mark of images that were not encoded is the last code
            marked = jnp.any(batch.tokens_BLG < 0)
            return jax.tree.map(lambda value: jnp.where(marked, jnp.nan, value), found)

        (total, terms), gradients = jax.value_and_grad(loss, has_aux=True)(network.params)
        network, scalars = train_state.apply_gradients(
            network, gradients, optimizer, ema=settings.ema, average=average, loss=total
        )
        return train_state.laid(network, settings.strategy), terms | scalars

    return moved
