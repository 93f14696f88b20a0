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
from tokgen.training import accumulation, optimizer as optimizers, train_state


def step(
    settings: ml_collections.ConfigDict, graph: nnx.GraphDef, optimizer: optimizers.Optimizer
) -> Callable:
    """(network, batch, codec) -> (network, scalars)."""
    average = settings.get("average", "muse")

    @functools.partial(jax.jit, donate_argnums=0)
    def moved(network: train_state.TrainState, batch: Mapping[str, jax.Array], codec: nnx.Module):
        def of_part(params, batch, key):
            def loss(params):
                generator = train_state.learner(graph, network, params)
                found = generator.loss(batch, codec, step=network.step, key=key)
                # as an index, the mark of images that were not encoded is the last code
                marked = jnp.any(batch.tokens_BLG < 0)
                return jax.tree.map(lambda value: jnp.where(marked, jnp.nan, value), found)

            found, gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return gradients, found, ()

        gradients, (total, terms), _ = accumulation.averaged(
            *(of_part, network.params, datasets.token_batch(batch)),
            rng.key(settings.seed, "train", network.step),
            parts=settings.get("accumulate", 1),
            strategy=settings.strategy,
        )
        network, scalars = train_state.apply_gradients(
            network, gradients, optimizer, ema=settings.ema, average=average, loss=total
        )
        return train_state.laid(network, settings.strategy), terms | scalars

    return moved
