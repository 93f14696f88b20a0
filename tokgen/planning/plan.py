"""The plan of a training run: the mesh, what a device holds, how long a step and the run take."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType

from tokgen import parameters, report, sharding
from tokgen.interfaces import UserError
from tokgen.planning import (
    devices as planned,
    estimate as estimates,
    program,
    recipes,
    steps,
    tiles,
)

GIB = 2**30
ROOM = 0.9  # of a device's memory, that a plan may fill: the rest is the runtime's


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mesh, with what is reckoned of it."""

    sizes: tuple[int, int, int]
    strategy: str
    estimate: estimates.Estimate

    def parts(self, devices: planned.Devices) -> dict[str, float]:
        """The least seconds of each of what a step waits for, at a chip's published rates.

        GPUs of a host reach each other faster than those of others: what an axis that stays within
        a host exchanges goes over its links, the rest over the network.
        """
        found, chip = self.estimate, devices.chip
        _, fsdp, tensor = self.sizes
        # over how many neighbours each of them spans; tensor's are next to each other
        spans = {
            "gathered": fsdp * tensor,
            "scattered": fsdp * tensor,
            "summed over tensor": tensor,
        }
        far = {w for w in found.exchanged if spans.get(w, devices.count) > devices.host}
        rates = {what: chip.network if what in far else chip.link for what in found.exchanged}
        return {
            "products": found.operations / chip.flops,
            # the state is read and written, all else read
            "memory": (2 * found.arguments - found.told) / chip.bandwidth,
            "links": sum(n / rates[what] for what, n in found.exchanged.items()),
        }

    def seconds(self, devices: planned.Devices) -> tuple[float, float]:
        """A step's least time: where all that waits is hidden, and where nothing of it is."""
        parts = self.parts(devices)
        links = parts.pop("links")
        alone = max(parts.values())
        return max(alone, links), alone + links


def mesh_of(sizes: Sequence[int]) -> AbstractMesh:
    """A mesh of devices that are not here."""
    return AbstractMesh(tuple(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def strategy_of(sizes: Sequence[int]) -> str:
    """The strategy that uses the axes of a mesh."""
    data, fsdp, tensor = sizes
    return "tensor" if tensor > 1 else "fsdp" if fsdp > 1 else "data"


def candidates(count: int, images: int) -> list[tuple[int, int, int]]:
    """Meshes of so many devices whose axes are powers of two, over which `images` lie evenly."""
    powers = [2**n for n in range(count.bit_length())]
    found = []
    for fsdp, tensor in itertools.product(powers, powers):
        data, rest = divmod(count, fsdp * tensor)
        if data and not rest and images % (data * fsdp) == 0:
            found.append((data, fsdp, tensor))
    return found


def reckoned(
    recipe: recipes.Recipe, sizes: Sequence[int], lies: tiles.Lies = tiles.plain
) -> Choice:
    """A mesh with its estimate; UserError where a parameter or the batch does not fit it."""
    mesh, strategy = mesh_of(sizes), strategy_of(sizes)
    sharding.check_batch(recipe.step.images, mesh, parts=recipe.network.parts)
    found = estimates.of(
        *(recipe.step, recipe.network, mesh, strategy),
        work=recipe.work,
        operations=recipe.operations,
        lies=lies,
    )
    return Choice(tuple(sizes), strategy, found)


def proposed(recipe: recipes.Recipe, devices: planned.Devices) -> Choice:
    """The mesh with the shortest step of those that have room; UserError if none has.

    Of those as quick, the one that splits the networks least. `tensor` is tried where nothing else
    has room: it splits layers, and its sums wait for each other.
    """
    choices, refusals = [], []
    for wide in (False, True):
        for sizes in candidates(devices.count, recipe.step.images // recipe.network.parts):
            if (sizes[2] > 1) == wide:
                try:
                    choices.append(reckoned(recipe, sizes, devices.lies))
                except UserError as error:
                    refusals.append(str(error))
        if devices.chip is None and choices:
            return choices[0]
        room = ROOM * devices.chip.memory if devices.chip else 0.0
        if fitting := [c for c in choices if c.estimate.peak <= room]:
            return min(fitting, key=lambda c: (round(c.seconds(devices)[1], 4), c.sizes[1:]))
    if not choices:
        told_of = refusals[0] if refusals else "the batch does not lie evenly over them"
        raise UserError(
            f"no mesh of {devices.name} serves {recipe.step.images} images a step: {told_of}"
        )
    least = min(choices, key=lambda c: c.estimate.peak).estimate
    raise UserError(
        f"no mesh of {devices.name} has room: at least {report.amount(least.arguments)} lie on a "
        f"device between steps, and {report.amount(least.temporaries)} in one, of "
        f"{report.amount(devices.chip.memory)}; remedies, in this order: more devices, a smaller "
        "config.batch_size, generator.remat='full', a smaller network"
    )


def told(sizes: Sequence[int]) -> str:
    """A mesh as the config has it."""
    return ", ".join(f"{axis} {size}" for axis, size in zip(sharding.AXES, sizes, strict=True))


def compiled(step: steps.Step, choice: Choice, devices: planned.Devices):
    """The step, compiled for a TPU's topology that is not here."""
    mesh = sharding.make_mesh(*choice.sizes, devices=planned.described(devices))
    with jax.set_mesh(mesh):
        lowered = step.compiled(choice.strategy).lower(*step.over(mesh, choice.strategy))
        return lowered.compile()


def lines_of_estimate(
    recipe: recipes.Recipe, choice: Choice, devices: planned.Devices
) -> Iterator[str]:
    """What is known without a compiler, in words."""
    found, chip, images = choice.estimate, devices.chip, recipe.step.images
    amounts = ", ".join(f"{name} {report.amount(n)}" for name, n in found.kept.items())
    yield (
        f"mesh: {told(choice.sizes)}; strategy {choice.strategy}; {images} images a step, "
        f"{images / devices.count:g} a device"
    )
    yield f"a device keeps: {amounts}; arguments of a step {found.arguments:,.0f} bytes"
    yield (
        f"a step computes with about {report.amount(found.temporaries)} more: in all "
        f"{report.amount(found.peak)}" + (f" of {report.amount(chip.memory)}" if chip else "")
    )
    if chip is not None and found.peak > ROOM * chip.memory:
        yield f"warning: it does not fit: a runtime leaves about {ROOM:.0%} of the memory"
    again = found.operations / found.work - 1
    yield (
        f"operations: {recipe.work / images / 1e9:,.1f} GFLOP an image, "
        f"{found.operations / 1e12:,.2f} TFLOP a step and device"
        + (f", {again:.0%} computed again" if again else "")
    )
    received = ", ".join(f"{what} {report.amount(n)}" for what, n in found.exchanged.items())
    yield f"a device receives in a step: {received or 'nothing'}"
    if chip is None:
        yield "a CPU has no published rates: no times are said of it"
        return
    parts = choice.parts(devices)
    hidden, shown = choice.seconds(devices)
    useful = found.work / chip.flops
    times = ", ".join(f"{name} {1000 * each:,.1f} ms" for name, each in parts.items())
    yield (
        f"a step takes at least: {times}; {1000 * hidden:,.1f} ms where links are hidden behind "
        f"products, {1000 * shown:,.1f} ms where they are not; MFU at most {useful / hidden:.0%} "
        f"and {useful / shown:.0%}"
    )
    if parts["links"] > parts["products"]:
        yield (
            f"warning: links bound the step: {images / devices.count:g} images a device are few "
            "for this network; take a larger config.batch_size, or fewer devices"
        )


def lines_of_run(
    choice: Choice, devices: planned.Devices, remaining: int, price: float | None
) -> list[str]:
    """How long all steps take at best, and what that costs."""
    if devices.chip is None:
        return []
    hours = [remaining * each / 3600 for each in choice.seconds(devices)]
    words = f"{remaining:,} steps: at best {hours[0]:,.1f} to {hours[1]:,.1f} hours, "
    words += f"{devices.count * hours[0]:,.0f} to {devices.count * hours[1]:,.0f} device hours"
    if price is not None:
        costs = [price * devices.count * each for each in hours]
        words += f"; at {price:g} a device hour {costs[0]:,.0f} to {costs[1]:,.0f}"
    return [words]


def lines_of_program(made, devices: planned.Devices) -> Iterator[str]:
    """What the compiler says of the step that it made."""
    memory, room = made.memory_analysis(), devices.chip.memory
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results beside them": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    peak = sum(parts.values())
    amounts = ", ".join(f"{name} {report.amount(size)}" for name, size in parts.items())
    yield (
        f"memory per chip: {report.amount(peak)} of {report.amount(room)} ({amounts})"
        + (", fits" if peak <= ROOM * room else ": it does not fit")
    )
    by_kind = collections.Counter()
    for each in program.Program(made.as_text()).collectives():
        by_kind[each.kind] += each.total
    received = ", ".join(f"{kind} {report.amount(size)}" for kind, size in by_kind.items())
    yield f"a chip receives in a step, as compiled: {received or 'nothing'}"


def lines(
    recipe: recipes.Recipe,
    devices: planned.Devices,
    sizes: Sequence[int] | None = None,
    *,
    price: float | None = None,
    compile: bool = True,
) -> Iterator[str]:
    """The plan in words, line by line as it is known.

    Args:
        sizes: of the mesh; None: as `proposed`.
        price: of a device for an hour, in any money.
        compile: for a TPU's topology, ask its compiler, too.
    """
    step = recipe.step
    if sizes is None:
        choice = proposed(recipe, devices)
    else:
        choice = reckoned(recipe, sharding.sizes_of(*sizes, devices.count), devices.lies)
    state, _, _ = step.over(mesh_of(choice.sizes), choice.strategy)
    yield report.table(parameters.paths(steps.parameters_of(state)))
    yield from lines_of_estimate(recipe, choice, devices)
    yield from lines_of_run(choice, devices, recipe.settings.steps, price)
    if compile and devices.tpu:
        yield from lines_of_program(compiled(step, choice, devices), devices)
