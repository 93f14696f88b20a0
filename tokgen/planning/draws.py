"""Drawing as programs of shapes: the driver's state, a step of a phase, what is told ahead.

What is planned is the generators' own `start` and `step`, with the driver's draw; and the two
programs that `tokgen sample` runs, to be compiled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tokgen import parameters, rng, sharding
from tokgen.interfaces import DecodeState, Phase, PyTree, Text
from tokgen.planning import networks
from tokgen.sampling import decode, drawing, guidance

WEIGHTS, CACHED, TOLD = "weights", "keys and values", "told to blocks"
KINDS = {"cache": CACHED, "modulation": TOLD}  # of a state's fields, those whose bytes count


def condition(found: networks.Networks, rows: int) -> PyTree:
    """Conditions of so many rows, as shapes."""
    if found.generator.cond == "label":
        return jax.ShapeDtypeStruct((rows,), jnp.int32)
    length, channels = found.generator.text
    return Text(
        jax.ShapeDtypeStruct((rows, length, channels), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), bool),
    )


def keys(rows: int) -> jax.ShapeDtypeStruct:
    """A key for each row."""
    return jax.eval_shape(lambda: rng.per_image(0, "sample", jnp.arange(rows)))


def _begin(found: networks.Networks, guided: bool, images: int):
    """(the function that makes the generator's first state, its arguments as shapes)."""
    rows, layout = 2 * images if guided else images, found.generator.layout

    def begin(generator, codec, cond, keys_B) -> DecodeState:
        shape = (rows, layout.length, layout.groups)
        given = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
        made = generator.start(cond, codec, keys_B=keys_B, given=given)
        return made.replace(invalid_B=jnp.zeros(rows, bool), near_B=jnp.zeros(rows, bool))

    asked = condition(found, rows), keys(rows)
    return begin, (found.generator, found.tokenizer.quantizer, *asked)


def begun(found: networks.Networks, guided: bool, images: int) -> Any:
    """The jaxpr that makes the generator's first state."""
    function, given = _begin(found, guided, images)
    return jax.make_jaxpr(function)(*given).jaxpr


def state(found: networks.Networks, phase: Phase, guided: bool, images: int) -> DecodeState:
    """The generator's own state in a phase, as shapes."""
    function, given = _begin(found, guided, images)
    most = found.generator.plan()[-1].slots

    def now(*given) -> DecodeState:
        made = function(*given)
        if made.cache is None:
            return made
        return made.replace(cache=tuple(c.grow(phase.slots, most) for c in made.cache))

    return jax.eval_shape(now, *given)


def cached(found: networks.Networks) -> bool:
    """Whether the generator keeps keys and values."""
    return state(found, found.generator.plan()[0], False, 1).cache is not None


def ahead_of(
    found: networks.Networks, now: DecodeState, images: int, phase: Phase, steps: int
) -> tuple[PyTree, Any]:
    """(what blocks are told ahead of so many steps, as shapes; the jaxpr that makes it)."""

    def run(generator, now, index):
        return decode.told_ahead(generator, now, images, phase, index, steps)

    index = phase.first if phase.steps == 1 else jnp.asarray(phase.first)
    run = functools.partial(run, index=index)
    jaxpr, made = jax.make_jaxpr(run, return_shape=True)(found.generator, now)
    return made, jaxpr.jaxpr


def span(found: networks.Networks, now: DecodeState, images: int, phase: Phase) -> int:
    """Of how many steps of a phase the driver asks at once what blocks are told."""
    if phase.steps == 1:
        return 1
    return decode.at_once(phase.steps, ahead_of(found, now, images, phase, 2)[0])


def traced(
    found: networks.Networks,
    now: DecodeState,
    phase: Phase,
    guided: bool,
    images: int,
    ahead: PyTree,
) -> tuple[Any, list[str]]:
    """(jaxpr of a step of a phase, of each of its arguments what it is).

    `ahead` is what its blocks are told that was computed before, as shapes; None: nothing.
    """

    def step(generator, codec, now, ahead, index):
        def draw(logits_BlGV, symbol=0, wanted_BlG=None):
            if guided:
                halves = logits_BlGV[:images], logits_BlGV[images:]
                logits_BlGV = guidance.merge(*halves, jnp.float32(2))
            where = {} if wanted_BlG is None else dict(wanted_BlG=wanted_BlG[:images])
            how = dict(keys_B=now.keys_B[:images], step=index, symbol=symbol, **where)
            drawn = found.sampler.draw(logits_BlGV, **how)
            unsure_BlG = jnp.broadcast_to(drawn.unsure_BlG, drawn.confidence_BlG.shape)
            rows = drawn.tokens_BlG, drawn.confidence_BlG, unsure_BlG
            return tuple(jnp.concatenate([a, a]) if guided else a for a in rows)

        asked = now if ahead is None else now.replace(modulation=ahead)
        return generator.step(asked, phase, index, codec, draw)

    given = found.generator, found.tokenizer.quantizer, now, ahead
    names = [field.name for field in dataclasses.fields(now)]
    kinds = {name: _all(getattr(now, name), KINDS.get(name, "")) for name in names}
    groups = (_all(given[:2], WEIGHTS), now.replace(**kinds), _all(ahead, TOLD))
    groups = jax.tree.leaves(groups)
    if phase.steps == 1:
        run = functools.partial(step, index=phase.first)
        return jax.make_jaxpr(run)(*given).jaxpr, groups
    index = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.make_jaxpr(step)(*given, index).jaxpr, groups


def _all(tree: PyTree, what: str) -> PyTree:
    return jax.tree.map(lambda leaf: what, tree)


def of_parameter(
    path: str, leaf: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> jax.sharding.NamedSharding:
    """How a parameter of a generator lies; whole, if it is one number."""
    if not leaf.ndim:
        return sharding.replicated(mesh)
    return sharding.of_network(path, leaf.shape, mesh)


def programs(
    found: networks.Networks, batch: int, mesh: jax.sharding.Mesh
) -> dict[str, tuple[Any, Sequence[Any], dict[str, Any]]]:
    """The programs that draw, by name: jitted, arguments as they lie over the mesh, static ones."""
    layout = found.generator.layout
    whole, rows = sharding.replicated(mesh), sharding.of_batch(mesh)

    def placed(tree: PyTree, where: jax.sharding.Sharding) -> PyTree:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
        )

    graph, params, stats = parameters.split(found.generator)
    split = jax.tree_util.tree_map_with_path(
        lambda path, leaf: placed(
            leaf, of_parameter("/".join(map(parameters.entry, path)), leaf, mesh)
        ),
        params,
    )
    generator = parameters.merge(graph, split, placed(stats, whole))
    tokenizer = placed(found.tokenizer, whole)
    asked = placed((condition(found, batch), keys(batch)), rows)
    tokens_BLG = placed(
        jax.ShapeDtypeStruct((batch, layout.length, layout.groups), jnp.int32), rows
    )
    options = drawing.TOLD.get(mesh.devices.flat[0].platform)
    draw = jax.jit(
        drawing.draw_tokens.__wrapped__, static_argnames="sampler", compiler_options=options
    )
    return {
        "tokens": (draw, (generator, tokenizer.quantizer, *asked), dict(sampler=found.sampler)),
        "pixels": (drawing.decode_pixels, (tokenizer, tokens_BLG), {}),
    }
