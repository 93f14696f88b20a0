"""generate(): the only decode driver, guided, edited or neither.

What it and a generator may assume of each other is told in `interfaces`. A generator does not know
that it is guided, nor that an image is being edited. It is started on the conditions followed by
their nulls; the `draw` handed to each of its steps merges the two halves, samples, and gives both
the same tokens (classifier-free guidance, arXiv:2207.12598).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import boundary, interfaces, sharding
from tokgen.interfaces import (
    Array,
    DecodeState,
    Generator,
    Phase,
    PyTree,
    Quantizer,
    Sampler,
    TokenLayout,
    UserError,
)
from tokgen.sampling import guidance, particles as particle_filter, sampler as samplers, settings

Network = TypeVar("Network")
# Platforms whose compiler reads a layer of a stack, and writes its cache, where they lie.
SCANNED = ("tpu",)


def laid_out(network: Network) -> Network:
    """A generator or a tokenizer as its platform runs it best: its layers stacked, or apart.

    A scan over stacked layers makes a program of one layer, whatever the depth: on a TPU it
    compiles sooner than four layers apart do, and moves no byte more (`benchmarks/decode.py --aot`,
    RESULTS.md). Elsewhere it copies the layer's weights and cache at every step.
    """
    return network if sharding.platform() in SCANNED else network.unstacked()


def steps(generator: Generator) -> int:
    """Decoding steps of a generator's plan."""
    last = generator.plan()[-1]
    return last.first + last.steps


def phases(
    generator: Generator, sampler: Sampler, *, cached: bool, alone: bool = True
) -> list[tuple[Phase, bool]]:
    """The plan as it is walked, cut where guidance begins and ends: (phase, is it guided?).

    Rows without a cache remember nothing but the tokens: nulls are there from the first guided
    step, and with a cache, or where the network is not `alone` but guided away from another, from
    the first of all (another program of the network: for no less than a sixteenth of the steps).
    """
    _, first, guided = _guidance(generator, sampler)
    if cached or not alone or 16 * first < guided:
        first = 0
    plan = _split(_split(generator.plan(), first), guided)
    return [(phase, first <= phase.first < guided) for phase in plan]


def generate(
    generator: Generator,
    codec: Quantizer | None,
    cond: PyTree,
    sampler: Sampler,
    *,
    keys_B: Array,
    given: tuple[Array, Array] | None = None,
    kept: Array | None = None,
    particles: int = 1,
    against: Generator | None = None,
    noted: bool = False,
    observe: Callable[[DecodeState, int], None] | None = None,
) -> DecodeState:
    """Walk the generator's plan and draw every token that isn't given.

    Args:
        cond: the condition, leading with the batch; label_B for class-conditional generators.
        sampler: static; the one that a preset makes, or another of `interfaces.Sampler`.
        keys_B: one key per image. An image depends on its own key only, not on its batch.
        given: tokens_BLG and a mask, true where a token is held fixed.
        kept: latents_BPC of the image whose tokens are held, of a generator that `holds_latents`:
            what is held of a scale is then what it has of them once the coarser scales are drawn,
            and the given tokens only say where.
        particles: rows of one image, which follow each other, of a generator with an exact
            likelihood and an order of its own: those that make what is given likelier go on in the
            place of others (`particles`). With 1, what comes later in the order changes nothing
            drawn before.
        against: another generator of the same plan, guided away from in the place of the null
            condition ("autoguidance", arXiv:2406.02507).
        noted: whether `when_BL` of the state says which step drew each position.
        observe: called before each step with the state, without its null rows, and the number of
            the step. Steps are then taken one at a time and not in compiled loops: for looking at
            a decode outside `jax.jit`, the tokens are the same.

    Returns:
        The final state; `invalid_B` is true where some logits were not finite, `near_B` where
        rounding could have changed a token.
    """
    weights, _, guided = _guidance(generator, sampler)
    B, layout = len(keys_B), generator.layout
    if particles > 1:
        # one that sees what is given has an order for each row, and rows that go on have but one's
        blind = generator.exact and not generator.sees_given
        if not blind or against is not None or B % particles:
            raise ValueError(
                "particles need an exact generator with one order for all rows, alone, and as "
                "many rows of each image"
            )
    if kept is not None and not getattr(generator, "holds_latents", False):
        raise ValueError("latents are kept by a generator that holds them: leave kept out")
    boundary.rows(keys=keys_B, conditions=cond, given=given, kept=kept)
    if given is None:
        shape = (B, layout.length, layout.groups)
        given = jnp.full(shape, layout.absent, jnp.int32), jnp.zeros(shape, bool)
    else:
        given = _held(given, layout)
    given = jnp.where(given[1], given[0], layout.absent).astype(jnp.int32), given[1]

    generator = laid_out(generator)
    double = guided > 0 and against is None
    if double:
        both = jax.tree.map(_join, cond, generator.null(cond))
        state = generator.start(both, codec, keys_B=_twice(keys_B), given=_twice(given))
    else:
        state = generator.start(cond, codec, keys_B=keys_B, given=given)
    no_B = jnp.zeros(len(state.keys_B), bool)
    weight_B = jnp.zeros(len(state.keys_B)) if particles > 1 else None
    never_BL = jnp.full(state.tokens_BLG.shape[:2], -1, jnp.int32) if noted else None
    begun = state = state.replace(
        invalid_B=no_B,
        near_B=no_B,
        weight_B=weight_B,
        ahead_B=weight_B,
        kept_BPC=_twice(kept) if double else kept,
        when_BL=never_BL,
    )
    weak = None
    if against is not None:
        against = laid_out(against)
        weak = against.start(cond, codec, keys_B=keys_B, given=given).replace(kept_BPC=kept)

    def step(
        state: DecodeState,
        weak: DecodeState | None,
        told: tuple[PyTree, PyTree],
        phase: Phase,
        index: Array | int,
    ) -> tuple[DecodeState, DecodeState | None]:
        double = len(state.tokens_BLG) == 2 * B
        weight = None if weights is None else jnp.asarray(weights, jnp.float32)[index]
        seen: dict[str, Any] = {"logits": []}

        def merge(cond_BlGV: Array, uncond_BlGV: Array, symbol: int) -> Array:
            scale = settings.of_symbols(weight, symbol, cond_BlGV.shape[2])
            scale = scale[..., None] if scale.ndim else scale
            return guidance.merge(cond_BlGV, uncond_BlGV, scale)

        def sample(logits_BlGV, symbol, wanted_BlG, toward_BlGV=None):
            seen["invalid_B"] = seen.get("invalid_B", False) | samplers.invalid(logits_BlGV)
            seen["logits"].append((logits_BlGV, symbol))
            where = dict(wanted_BlG=wanted_BlG, toward_BlGV=toward_BlGV)
            where = {name: what[:B] for name, what in where.items() if what is not None}
            drawn = sampler.draw(logits_BlGV, keys_B=keys_B, step=index, symbol=symbol, **where)
            seen["near_B"] = seen.get("near_B", False) | drawn.near_B
            if toward_BlGV is not None:
                owed_B, ahead_B = particle_filter.promised(drawn, **where)
                seen["owed_B"] = seen.get("owed_B", 0) + owed_B
                seen["ahead_B"] = seen.get("ahead_B", 0) + ahead_B
            unsure_BlG = jnp.broadcast_to(drawn.unsure_BlG, drawn.confidence_BlG.shape)
            return drawn.tokens_BlG, drawn.confidence_BlG, unsure_BlG

        def draw(logits_BlGV, symbol=0, wanted_BlG=None, toward_BlGV=None):
            if double:
                merged_BlGV = merge(logits_BlGV[:B], logits_BlGV[B:], symbol)
                return _twice(sample(merged_BlGV, symbol, wanted_BlG, toward_BlGV))
            if against is None or phase.first >= guided:
                return sample(logits_BlGV, symbol, wanted_BlG, toward_BlGV)
            if "weak" in seen:
                raise ValueError("guidance against a network needs one draw per step; found more")

            def draw_weak(weak_BlGV, symbol=0, wanted_BlG=wanted_BlG):
                merged_BlGV = merge(logits_BlGV, weak_BlGV, symbol)
                seen["drawn"] = sample(merged_BlGV, symbol, wanted_BlG)
                return seen["drawn"]

            # both networks must see the same token, so the weak one's step is taken in the draw
            network, before = sharding.step_by_step(against, weak)
            seen["weak"] = _stepped(network, before, told[1], phase, index, codec, draw_weak)
            return seen["drawn"]

        network, state = sharding.step_by_step(generator, state)
        before_BLG = state.tokens_BLG
        state = _stepped(network, state, told[0], phase, index, codec, draw)
        flags = {name: seen[name] for name in ("invalid_B", "near_B")}
        flags = _twice(flags) if double else flags
        flags = {name: getattr(state, name) | flag for name, flag in flags.items()}
        state = state.replace(**flags)
        if noted:
            before_BL, after_BL = (_whole(t, layout) for t in (before_BLG, state.tokens_BLG))
            came_BL = after_BL & ~before_BL
            state = state.replace(when_BL=jnp.where(came_BL, index, state.when_BL))
        if particles > 1:
            held = particle_filter.held(_first(state, B), phase, index)  # known after the step
            gained_B = sum(particle_filter.gained(*part, *held) for part in seen["logits"])
            ahead_B = seen.get("ahead_B", jnp.zeros(B))
            # what the last step promised is taken back: by now some of it has come, or has not
            gained_B = gained_B + seen.get("owed_B", 0) + ahead_B - state.ahead_B[:B]
            gained_B, ahead_B = _twice((gained_B, ahead_B)) if double else (gained_B, ahead_B)
            state = state.replace(weight_B=state.weight_B + gained_B, ahead_B=ahead_B)
            carried = particle_filter.resampled(_carried(state), keys_B, index, particles)
            state = _insert(state, carried)
        return state, seen.get("weak", weak)

    cached = state.cache is not None
    plan = phases(generator, sampler, cached=cached, alone=against is None)
    for phase, with_nulls in plan:
        if double and not with_nulls:
            state = _first(state, B)
        elif double and len(state.keys_B) == B:
            state = _insert(begun, _twice(_carried(state)))
        state, weak = (_grow(s, phase.slots, plan[-1][0].slots) for s in (state, weak))

        def tell(
            index: Array | int,
            steps: int,
            phase: Phase = phase,
            states: tuple[DecodeState, DecodeState | None] = (state, weak),
        ) -> tuple[PyTree, PyTree]:
            return tuple(
                None if state is None else told_ahead(network, state, B, phase, index, steps)
                for network, state in zip((generator, against), states, strict=True)
            )

        if phase.steps == 1 or observe is not None:
            for index in range(phase.first, phase.first + phase.steps):
                if observe is not None:
                    observe(_first(state, B), index)
                state, weak = step(state, weak, tell(index, 1), phase, index)
            continue

        # of shapes alone: what is the same at all steps is asked for once
        two = jax.eval_shape(functools.partial(tell, phase.first, 2))
        span = at_once(phase.steps, two)

        def several(
            carry: PyTree,
            first: Array | int,
            phase: Phase = phase,
            span: int = span,
            fixed: tuple[DecodeState, DecodeState | None] = (state, weak),
            tell: Callable[[Array | int, int], tuple[PyTree, PyTree]] = tell,
        ):
            told = tell(first, span)

            def body(carry: PyTree, offset: Array):
                state, weak = (_insert(*pair) for pair in zip(fixed, carry, strict=True))
                now = tuple(_at(each, offset) for each in told)
                state, weak = step(state, weak, now, phase, first + offset)
                return (_carried(state), _carried(weak)), None

            return jax.lax.scan(body, carry, jnp.arange(span))

        carry = (_carried(state), _carried(weak))
        if span == phase.steps:
            carry, _ = several(carry, phase.first)
        else:
            firsts = jnp.arange(phase.first, phase.first + phase.steps, span)
            carry, _ = jax.lax.scan(several, carry, firsts)
        state, weak = (_insert(*pair) for pair in zip((state, weak), carry, strict=True))
    return _first(state, B)


def _held(given: tuple[Array, Array], layout) -> tuple[Array, Array]:
    """The tokens that are held and where, checked: what is not held may be anything."""
    tokens_BLG, mask_BLG = given
    if mask_BLG.dtype != bool or tuple(mask_BLG.shape) != tuple(tokens_BLG.shape):
        raise UserError(
            "given tokens need a mask of their shape, true where they are held; found "
            f"{mask_BLG.dtype} {tuple(mask_BLG.shape)} for tokens {tuple(tokens_BLG.shape)}"
        )
    known = boundary.known(tokens_BLG) and boundary.known(mask_BLG)
    held_BLG = np.where(mask_BLG, tokens_BLG, 0) if known else tokens_BLG
    boundary.tokens(held_BLG, layout, what="given tokens")
    return jnp.asarray(tokens_BLG, jnp.int32), mask_BLG


def _whole(tokens_BLG: Array, layout: TokenLayout) -> Array:
    """[B, L] true for positions of which every symbol is known."""
    return jnp.all(tokens_BLG != layout.absent, axis=-1)


def _guidance(generator: Generator, sampler: Sampler) -> tuple[Any, int, int]:
    """The weights, and the numbers of the first guided step and of the one after the last."""
    total = steps(generator)
    if sampler.steps not in (None, total):
        raise UserError(
            f"settings per step need one entry for each: the plan has {total} steps, the sampler "
            f"has entries for {sampler.steps}"
        )
    if not sampler.guidance:
        return None, 0, 0
    weights = np.asarray(sampler.guidance, np.float32)
    if weights.ndim == 2 and weights.shape[1] != generator.layout.groups:
        raise UserError(
            f"guidance per symbol needs {generator.layout.groups} weights in every entry, one per "
            f"symbol of a position; found {weights.shape[1]}"
        )
    guided = np.flatnonzero((weights != 1).reshape(total, -1).any(-1))
    return weights, *((int(guided[0]), int(guided[-1]) + 1) if len(guided) else (0, 0))


def _split(plan: Sequence[Phase], step: int) -> list[Phase]:
    """The plan, cut where guidance begins or ends: null rows come or go before that step."""
    phases = []
    for phase in plan:
        inside = phase.first < step < phase.first + phase.steps
        phases.extend(phase.split(step) if inside else (phase,))
    return phases


SPAN = 32  # steps at most for which at once is computed what a generator computes beforehand


def at_once(steps: int, two: PyTree) -> int:
    """Of a phase of `steps`, how many are told at once: as many in each turn, if not too few.

    `two` is what two of them are told: what does not change from step to step is told once.
    """
    if not _changes(two):
        return steps
    span = max(count for count in range(1, SPAN + 1) if steps % count == 0)
    return span if span >= min(steps, SPAN // 4) else steps


def told_ahead(
    generator: Generator, state: DecodeState, B: int, phase: Phase, index: Array | int, steps: int
) -> PyTree:
    """What a generator computes beforehand for some steps; of the null rows, for the first."""
    ask, rows = getattr(generator, "told", None), len(state.tokens_BLG)

    def all_rows(leaf):
        null = jnp.broadcast_to(leaf[-1:], (rows - len(leaf), *leaf.shape[1:]))
        return jnp.concatenate([leaf, null]) if len(leaf) < rows else leaf

    if ask is None:
        return None
    return jax.tree.map(all_rows, ask(_first(state.cond, B + 1), phase, index, steps))


def _changes(told: PyTree) -> bool:
    """Whether it differs from step to step."""
    return any(leaf.shape[-3] > 1 for leaf in jax.tree.leaves(told))


def _at(told: PyTree, offset: Array) -> PyTree:
    """Of what was told for several steps, that of one."""

    def one(leaf):
        if leaf.shape[-3] == 1:
            return leaf
        return jax.lax.dynamic_slice_in_dim(leaf, offset, 1, axis=leaf.ndim - 3)

    return jax.tree.map(one, told)


def _stepped(
    generator: Generator,
    state: DecodeState,
    told: PyTree,
    phase: Phase,
    index: Array | int,
    codec: Quantizer | None,
    draw: interfaces.Draw,
) -> DecodeState:
    """The state after a step, for which `told` is the modulation, if anything is told."""
    if told is None:
        return generator.step(state, phase, index, codec, draw)
    before, state = state.modulation, state.replace(modulation=told)
    return generator.step(state, phase, index, codec, draw).replace(modulation=before)


def _first(tree, count: int):
    return jax.tree.map(lambda leaf: leaf[:count], tree)


def _join(a, b):
    return jnp.concatenate([a, b])


def _twice(tree):
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), tree)


def _grow(state: DecodeState | None, slots: int, most: int) -> DecodeState | None:
    if state is None or state.cache is None:
        return state
    return state.replace(cache=tuple(layer.grow(slots, most) for layer in state.cache))


def _carried(state: DecodeState | None):
    return None if state is None else {name: getattr(state, name) for name in interfaces.CARRIED}


def _insert(state: DecodeState | None, carried) -> DecodeState | None:
    return None if state is None else state.replace(**carried)
