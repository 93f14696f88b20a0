"""A training step with shapes in the place of arrays, laid over a mesh of devices that may not be.

What is planned is the training programs' own state and step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from flax import nnx

from tokgen import flops, parameters, rng, sharding
from tokgen.config import building
from tokgen.interfaces import PyTree, TokenLayout
from tokgen.nn import precision
from tokgen.training import (
    dry_run,
    fields,
    gan as gans,
    generator_step,
    optimizer as optimizers,
    safeguards,
    stages,
    tokenizer_step,
    train_state,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One step of training.

    Args:
        state: what it moves, as shapes.
        batch: images or tokens of all devices together, as shapes.
        frozen: what it is told beside the batch, as shapes: every device has all of it.
        compiled: the step under a strategy, to be lowered.
        platform: of the devices that are planned for: some forms are one platform's own.
    """

    state: PyTree
    batch: dict[str, jax.ShapeDtypeStruct]
    frozen: PyTree
    compiled: Callable[[str], Any]
    platform: str = "cpu"

    @property
    def images(self) -> int:
        """How many a step takes."""
        return next(iter(self.batch.values())).shape[0]

    def of(self, images: int) -> Step:
        """The same step for another number of images."""
        if images == self.images:
            return self
        return dataclasses.replace(
            self,
            batch={
                name: jax.ShapeDtypeStruct((images, *leaf.shape[1:]), leaf.dtype)
                for name, leaf in self.batch.items()
            },
        )

    @functools.cached_property
    def traced(self) -> Any:
        """The jaxpr of the step on one device that has all images."""
        with jax.sharding.use_abstract_mesh(sharding.on_paper(self.platform)):
            made = jax.make_jaxpr(self.compiled("data"))(self.state, self.batch, self.frozen).jaxpr
        (call,) = made.eqns
        body = call.params["jaxpr"]
        inner = body.replace(jaxpr=flops.live(body.jaxpr))
        return made.replace(eqns=[call.replace(params=call.params | {"jaxpr": inner})])

    def read(self, arguments: tuple) -> tuple:
        """Of (state, batch, frozen) what the step reads: a compiler drops the rest."""
        (call,) = self.traced.eqns
        inner = call.params["jaxpr"].jaxpr
        seen = {id(v) for equation in inner.eqns for v in equation.invars}
        seen |= {id(v) for v in inner.outvars}
        leaves, tree = jax.tree.flatten(arguments)
        pairs = zip(leaves, inner.invars, strict=True)
        return jax.tree.unflatten(tree, [leaf if id(v) in seen else None for leaf, v in pairs])

    def over(self, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, strategy: str) -> tuple:
        """(state, batch, frozen) as they lie over a mesh."""
        return (
            jax.tree.map(laid, self.state, train_state.shardings(self.state, mesh, strategy)),
            {name: laid(leaf, sharding.of_batch(mesh)) for name, leaf in self.batch.items()},
            jax.tree.map(lambda leaf: laid(leaf, sharding.replicated(mesh)), self.frozen),
        )


@dataclasses.dataclass(frozen=True)
class Network:
    """What of a network decides how a step is estimated beside its parameters."""

    itemsize: int  # bytes of a value while it computes
    parts: int  # in which a batch is taken
    passes: int  # that read its weights
    width: int = 0
    layers: int = 0
    positions: int = 0


def laid(leaf: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """The shape of an array that lies so."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def generator(
    settings: ml_collections.ConfigDict, layout: TokenLayout, classes: int, codec: nnx.Module
) -> tuple[Step, Network]:
    """A generator's step, for tokens of a layout; `codec` is their quantizer, as shapes."""
    fields.check_generator(settings)
    optimizer = building.call(
        optimizers.optimizer, settings.optimizer, "optimizer", steps=settings.steps
    )

    def make():
        rngs = rng.rngs(rng.key(settings.seed, "init"))
        return building.generator(settings, layout, classes, rngs=rngs)

    graph, state = dry_run.created(
        lambda: train_state.create(make, optimizer, mesh=sharding.single(), ema=settings.ema)
    )
    shapes = nnx.eval_shape(make)
    batch = dry_run.tokens(settings, layout, shapes, None)

    def compiled(strategy: str):
        given = ml_collections.ConfigDict({**settings, "strategy": strategy})
        return generator_step.step(given, graph, optimizer)

    return Step(state, batch, codec, compiled), _network(settings, shapes)


def tokenizer(
    settings: ml_collections.ConfigDict,
    stage: stages.Stage,
    frozen: PyTree,
    *,
    adversarial: bool,
) -> tuple[Step, Network]:
    """A tokenizer's step in a stage, with the discriminator or without; `frozen` as shapes."""
    gan = building.call(gans.GAN, settings.discriminator, "discriminator")
    limits = building.call(safeguards.Limits, settings.get("safeguards", {}), "safeguards")
    state, graphs, optimizer = dry_run.networks_of(
        settings, stage, gan, sharding.single(), discriminator=_drawn
    )

    def compiled(strategy: str):
        given = ml_collections.ConfigDict({**settings, "strategy": strategy})
        made = tokenizer_step.Steps(given, gan, limits, graphs, optimizer, 0)
        return made(stage, adversarial)

    network = Network(
        itemsize=building.call(
            precision.Precision, settings.precision, "precision"
        ).compute_dtype.itemsize,
        passes=2,
        parts=settings.get("accumulate", 1),
    )
    return Step(
        state, dry_run.pictures(settings, settings.decoder.get("text")), frozen, compiled
    ), network


def _drawn(gan: gans.GAN, settings: ml_collections.ConfigDict, *, rngs: nnx.Rngs) -> nnx.Module:
    """The discriminator that the published run has, whose files a plan does without."""
    return gans.drawn(gan.network, settings, rngs=rngs)


def parameters_of(state: PyTree) -> PyTree:
    """The parameters that a step moves, of its networks by their names."""
    if isinstance(state, train_state.TrainState):
        return state.params
    networks = {n: s for n, s in state.items() if isinstance(s, train_state.TrainState)}
    return {name: network.params for name, network in networks.items()}


def _network(settings: ml_collections.ConfigDict, shapes: nnx.Module) -> Network:
    transformer = shapes.transformer
    kernels = parameters.paths(parameters.split(shapes)[1])
    width = next(k.shape[-1] for path, k in kernels.items() if path.endswith("mlp/down/kernel"))
    return Network(
        itemsize=transformer.precision.compute_dtype.itemsize,
        # "dots" keeps what comes of products with weights
        passes=3 if settings.generator.get("remat", "none") == "full" else 2,
        parts=settings.get("accumulate", 1),
        width=width,
        layers=transformer.depth,
        positions=shapes.layout.length,
    )
