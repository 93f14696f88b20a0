"""A training program without its numbers: all that it will run is traced, before any work.

The networks, a step of every kind that the run will take and the default preset's decode are traced
with shapes in the place of arrays: what cannot run is told in one message, before the work
directory holds anything and before a device has computed. `fields.py` has held every field before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from tokgen import parameters, rng, sharding
from tokgen.config import building, evaluators
from tokgen.data import datasets, token_header
from tokgen.interfaces import PyTree, Text, TokenLayout, UserError
from tokgen.sampling import decode, presets, sampler as samplers
from tokgen.training import (
    fields,
    gan as gans,
    generator_step,
    optimizer as optimizers,
    safeguards,
    stages,
    tokenizer_step,
    train_state,
)

# ---------------------------------------------------------------- what runs, traced


def tokenizer(
    settings: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    frozen: PyTree,
    *,
    text: tuple[int, int] | None = None,
    memory: int | None = None,
) -> nnx.Module:
    """The Tokenizer as shapes, after every kind of step was traced; UserError for what cannot run.

    `frozen` is what `tokenizer_step.load_frozen` gives, as arrays or as shapes; `text` the shape of
    the features of one image, where the data has any; `memory` the bytes of all devices together.
    """
    fields.check_tokenizer(settings)
    plan = stages.plan(settings)
    gan = building.call(gans.GAN, settings.discriminator, "discriminator")
    limits = building.call(safeguards.Limits, settings.get("safeguards", {}), "safeguards")
    sharding.check_batch(settings.batch_size, mesh, parts=settings.get("accumulate", 1))
    shapes = nnx.eval_shape(lambda: building.tokenizer(settings, rngs=rng.rngs(0)))
    stages.check(plan, shapes)
    begin, _ = gan.steps(settings.steps)
    batch = pictures(settings, text)
    for stage in plan:
        networks, graphs, optimizer = networks_of(settings, stage, gan, mesh)
        check_memory(networks, batch, memory or bytes_of(mesh))
        steps = tokenizer_step.Steps(settings, gan, limits, graphs, optimizer, 0)
        # a stage may see the discriminator begin
        for playing in sorted({stage.begin >= begin, stage.end - 1 >= begin}):
            jax.eval_shape(steps(stage, playing), networks, batch, frozen)
    return shapes


def generator(
    settings: ml_collections.ConfigDict,
    layout: TokenLayout,
    classes: int,
    mesh: jax.sharding.Mesh,
    codec: nnx.Module,
    *,
    text: tuple[int, int] | None = None,
    memory: int | None = None,
) -> tuple[nnx.Module, samplers.Sampler]:
    """(the Generator as shapes, the default preset's Sampler) after all that will run was traced.

    That is a step of training, and the decode by the presets that it draws with meanwhile;
    UserError for what cannot run.

    `codec` is the tokenizer's quantizer, as arrays or as shapes.
    """
    fields.check_generator(settings)
    sharding.check_batch(settings.batch_size, mesh, parts=settings.get("accumulate", 1))
    optimizer = building.call(
        optimizers.optimizer, settings.optimizer, "optimizer", steps=settings.steps
    )

    def make():
        rngs = rng.rngs(rng.key(settings.seed, "init"))
        return building.generator(settings, layout, classes, rngs=rngs)

    shapes = nnx.eval_shape(make)
    datasets.check_text(shapes, settings.data.get("text", ""), "config.data.text")
    drawn = _drawn(settings, classes)
    known = dict.fromkeys([*settings.presets, *drawn])
    samplers = {name: _prepared(settings, shapes, name, name in drawn) for name in known}
    batch = tokens(settings, layout, shapes, text)
    graph, network = created(
        lambda: train_state.create(
            make, optimizer, mesh=mesh, strategy=settings.strategy, ema=settings.ema
        )
    )
    check_memory(network, batch, memory or bytes_of(mesh))
    jax.eval_shape(generator_step.step(settings, graph, optimizer), network, batch, codec)
    for preset, rows in drawn.items():
        cond = _of_rows(_cond(shapes, batch), rows)
        made, sampler = samplers[preset]
        jax.eval_shape(functools.partial(_decoded, sampler), made, codec, cond)
    return shapes, samplers["default"][1]


def _drawn(settings: ml_collections.ConfigDict, classes: int) -> dict[str, int]:
    """Preset -> images at a time, of what the run will draw while it trains."""
    shown, found = min(max(classes, 1), 10), {}
    if settings.held_out.samples:
        found["default"] = settings.held_out.samples * shown
    for one in evaluators.of(settings).values():
        if isinstance(one, evaluators.Score):
            found[one.preset] = min(one.batch, one.samples)
        if isinstance(one, evaluators.Grid):
            found[one.preset] = one.columns * shown
    return found


def _decoded(
    sampler: samplers.Sampler, generator: nnx.Module, codec: nnx.Module, cond: PyTree
) -> jax.Array:
    keys_B = rng.per_image(0, "sample", jnp.arange(len(jax.tree.leaves(cond)[0])))
    return decode.generate(generator, codec, cond, sampler, keys_B=keys_B).tokens_BLG


def _prepared(
    settings: ml_collections.ConfigDict, shapes: nnx.Module, name: str, drawn: bool
) -> tuple[nnx.Module, samplers.Sampler]:
    """(generator, sampler) of a preset; one without "no class" cannot be guided while training."""
    try:
        made, sampler = presets.prepare(shapes, presets.named(settings.presets.to_dict(), name))
        labels = shapes.cond == "label"
        if (drawn or name == "default") and sampler.guidance and labels:
            shapes.null(np.zeros(1, np.int32))
    except UserError as error:
        raise UserError(f"config.presets.{name}: {error}") from error
    return made, sampler


def _cond(shapes: nnx.Module, batch: Mapping[str, Any]) -> PyTree:
    """What of a batch is the condition."""
    if shapes.cond == "label":
        return batch["label"]
    return Text(batch["text"], batch["mask"])


def _of_rows(tree: PyTree, rows: int) -> PyTree:
    """Shapes that lead with a batch, of so many rows."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), tree
    )


def tokens(
    settings: ml_collections.ConfigDict,
    layout: TokenLayout,
    shapes: nnx.Module,
    text: tuple[int, int] | None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the stream, as shapes."""
    B = settings.batch_size
    # tokens that are made as they come are int32, as encoders give them
    of_shards = bool(settings.data.get("tokens", ""))
    dtype = token_header.loaded_integer(layout.vocab) if of_shards else jnp.int32
    batch = {
        "tokens": jax.ShapeDtypeStruct((B, layout.length, layout.groups), dtype),
        "label": jax.ShapeDtypeStruct((B,), jnp.int32),
    }
    if shapes.cond == "text":
        shape = text or shapes.text
        batch["text"] = jax.ShapeDtypeStruct((B, *shape), jnp.float32)
        batch["mask"] = jax.ShapeDtypeStruct((B, shape[0]), bool)
    return batch


def pictures(settings, text: tuple[int, int] | None) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of images, and of their texts where `text` is their shape, as shapes."""
    B, (rows, columns) = settings.batch_size, settings.view.size
    shape = (B, rows, columns, settings.view.get("channels", 3))
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "label": jax.ShapeDtypeStruct((B,), jnp.int32),
    }
    if text is not None:
        batch["text"] = jax.ShapeDtypeStruct((B, *text), jnp.float32)
    return batch


def networks_of(
    settings: ml_collections.ConfigDict,
    stage: stages.Stage,
    gan: gans.GAN,
    mesh: jax.sharding.Mesh,
    *,
    discriminator: Callable[..., nnx.Module] = gans.build,
) -> tuple[PyTree, tokenizer_step.Graphs, optimizers.Optimizer | None]:
    """What `tokenizer_step.create` gives, its arrays as shapes."""
    create = functools.partial(
        tokenizer_step.create, settings, stage, gan, mesh, discriminator=discriminator
    )
    (graphs, optimizer), networks = created(lambda: _turned(*create()))
    return networks, graphs, optimizer


def _turned(networks: PyTree, graphs: Any, optimizer: Any) -> tuple[Any, PyTree]:
    return (graphs, optimizer), networks


def created(create: Callable[[], tuple[Any, PyTree]]) -> tuple[Any, PyTree]:
    """(structure, arrays as shapes) of what gives a structure and arrays."""
    kept = []

    def arrays():
        structure, made = create()
        kept.append(structure)
        return made

    made = jax.eval_shape(arrays)
    return kept[-1], made


# ---------------------------------------------------------------- sizes


def check_memory(networks: PyTree, batch: PyTree, memory: int) -> None:
    """Refuse what cannot fit, by the least that must be there at once.

    That is the state, the gradients of its parameters, and a batch in float32; activations and
    copies come on top.
    """
    trained = [n for n in jax.tree.leaves(networks, is_leaf=_is_state) if _is_state(n)]
    parts = {
        "parameters, moments and averages": _bytes(networks),
        "gradients": sum(4 * parameters.count(network.params) for network in trained),
        "a batch": sum(4 * leaf.size for leaf in jax.tree.leaves(batch)),
    }
    need = sum(parts.values())
    if need > memory:
        told = ", ".join(f"{name} {size / 2**30:,.1f}" for name, size in parts.items())
        raise UserError(
            f"this config needs at least {need / 2**30:,.1f} GiB ({told}); found "
            f"{memory / 2**30:,.1f} GiB on all devices together: a smaller batch_size, smaller "
            "networks, or more devices"
        )


def bytes_of(mesh: jax.sharding.Mesh) -> int:
    """Memory of all devices of a mesh; of devices that share the host's, that of the hosts."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.local_devices]
    if all(limits):
        return sum(limits) * jax.process_count()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()


def _is_state(tree: Any) -> bool:
    return isinstance(tree, train_state.TrainState)


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
