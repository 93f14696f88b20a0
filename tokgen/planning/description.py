"""A plan in words, for people: the table of parameters, then a row for each thing one asks.

A range of two numbers is where links are hidden behind products, and where they are not.
"""

from __future__ import annotations

import collections
import decimal
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from tokgen import parameters, report, sharding
from tokgen.interfaces import UserError
from tokgen.planning import devices as planned, plan, program, recipes, steps, token_set

COLUMNS, FIRST = 100, 20  # of a terminal; of what a row is called

LASTING = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
UNITS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("FLOP", 1))

Rows = Iterator[tuple[str, str]]


def lines(
    recipe: recipes.Recipe,
    devices: planned.Devices,
    sizes: Sequence[int] | None = None,
    *,
    price: float | None = None,
    compile: bool = True,
) -> Iterator[str]:
    """The plan, line by line as it is known; UserError in its end where a device has no room.

    Args:
        sizes: of the mesh, one of which may be -1; None: as `plan.proposed`.
        price: of a device for an hour, in any money.
        compile: for a TPU's topology, ask its compiler, too.
    """
    recipe = recipe.on(devices.platform)
    if sizes is None:
        choice = plan.proposed(recipe, devices)
    else:
        sizes = sharding.sizes_of(*sizes, devices.count)
        choice = plan.reckoned(recipe, sizes, devices.lies)
    state, _, _ = recipe.dearest.step.over(plan.mesh_of(choice.sizes), choice.strategy)
    yield report.table(parameters.paths(steps.parameters_of(state)))
    yield ""
    yield from map(row, of_estimate(recipe, choice, devices))
    if choice.sizes[2] > 1 and (reason := plan.uneven(recipe, devices)):
        yield row(("warning", reason))
    yield from map(row, token_set.rows(recipe))
    if devices.chip is not None:
        yield from map(row, of_times(recipe, choice, devices, price))
        yield row(("of a recipe", of_recipe(choice, devices)))
    if not plan.fits(choice, devices):
        lacking = plan.lacking(recipe, choice, devices)
        raise UserError(f"{plan.told(choice.sizes)} does not fit: {lacking}")
    if compile and devices.tpu:
        yield ""
        try:
            made = plan.compiled(recipe.dearest.step, choice, devices, recipe.effort)
        except RuntimeError as error:  # the compiler's
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            parts = next(plan.divisors(recipe, choice), None)
            raise UserError(
                f"the step has no room on {devices.name}: {str(error).splitlines()[0][:300]}; "
                f"remedies, in this order: {', '.join(plan.remedies(recipe, parts))}"
            ) from error
        yield from map(row, of_program(made, devices))


def of_recipe(choice: plan.Choice, devices: planned.Devices) -> str:
    """The cells of a recipe's table of meshes: devices, mesh, what one of them holds, a step."""
    sizes = ",".join(map(str, choice.sizes))
    times = _two(1000 * each for each in choice.seconds(devices))
    held = report.amount(choice.largest.peak)
    return f"{devices.name} | {sizes} {choice.strategy} | {held} | {times} ms"


def of_estimate(recipe: recipes.Recipe, choice: plan.Choice, devices: planned.Devices) -> Rows:
    """What a device holds, computes and receives, without a compiler."""
    found, chip, images = choice.estimate, devices.chip, recipe.images
    ways = choice.sizes[0] * choice.sizes[1]
    fields = [f"--config.mesh.{a}={n}" for a, n in zip(sharding.AXES, choice.sizes, strict=True)]
    yield "mesh", f"{plan.told(choice.sizes)}; strategy {choice.strategy}"
    yield "to train with", f"{' '.join(fields)} --config.strategy={choice.strategy}"
    if len(recipe.kinds) > 1:
        told = ", ".join(f"{kind.count:,} {kind.name}" for kind in recipe.kinds)
        yield "steps", f"{told}; what follows is of the first kind"
    parts = recipe.parts
    in_parts = f" in {parts} parts" if parts > 1 else ""
    yield "images", f"{images:,} a step{in_parts}, {images / ways / parts:g} on a device at once"
    yield "kept", f"{report.amount(found.arguments)} on a device: {amounts(found.kept)}"
    room = f" of {report.amount(chip.memory)}" if chip else ""
    fits = ""
    if chip is not None:
        fits = ", fits" if plan.fits(choice, devices) else ": IT DOES NOT FIT"
    most = choice.largest
    yield (
        "peak",
        f"about {report.amount(most.peak)}{room} in a step, {report.amount(most.temporaries)} of "
        f"it to compute with{fits}",
    )
    again = found.operations / found.work - 1
    yield (
        "operations",
        f"{_flops(recipe.dearest.work / images)} an image, forward and backward; "
        f"{_flops(found.operations)} a step and device"
        + (f", {again:.0%} more for remat and optimizer" if again > 0.005 else ""),
    )
    yield "received", f"by a device in a step: {amounts(found.exchanged) or 'nothing'}"
    if chip is None:
        yield "time", "a CPU has no published rates: nothing is said of it"


def of_times(
    recipe: recipes.Recipe, choice: plan.Choice, devices: planned.Devices, price: float | None
) -> Rows:
    """The least time of a step and of all, at published rates, and what that costs."""
    found, images, count = choice.estimate, recipe.images, devices.count
    parts, bounds = choice.parts(devices), choice.seconds(devices)
    useful, wide = found.work / devices.chip.flops, recipe.dearest.network.itemsize == 4
    times = ", ".join(f"{name} {digits(1000 * each)} ms" for name, each in parts.items())
    yield (
        "a step at least",
        f"{_two(1000 * each for each in bounds)} ms ({times}): links hidden behind products, or "
        "not" + (", products at bfloat16's rate: float32's is lower" if wide else ""),
    )
    yield "MFU at most", f"{useful / bounds[0]:.0%}, or {useful / bounds[1]:.0%}"
    sums, products = found.exchanged.get("summed over tensor", 0.0), parts["products"]
    slow = parts["links"] > max(products, parts["memory"])
    if slow and sums > sum(found.exchanged.values()) / 2:
        yield (
            "warning",
            f"links bound the step: what {choice.sizes[2]} devices sum over tensor takes longer "
            "than their products; take a smaller tensor",
        )
    elif slow:
        yield (
            "warning",
            f"links bound the step: {images / count:g} images a device are few for this network; "
            "take fewer devices, or a larger config.batch_size and fewer steps",
        )
    run = choice.run(devices, recipe)
    hours = [each / 3600 for each in run]
    yield (
        f"{recipe.settings.steps:,} steps",
        f"at least {_two(run, _lasting)}, {_two(count * each for each in hours)} device hours",
    )
    if price is not None:
        costs = _two(price * count * each for each in hours)
        yield "cost", f"at least {costs}, at {price:g} for a device hour"


def of_program(made, devices: planned.Devices) -> Rows:
    """What the compiler says of the step that it made."""
    memory, room = made.memory_analysis(), devices.chip.memory
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results beside them": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    peak = sum(parts.values())
    yield (
        "memory per chip:",
        f"{report.amount(peak)} of {report.amount(room)} as compiled ({amounts(parts)})"
        + (", fits" if peak <= plan.ROOM * room else ": IT DOES NOT FIT"),
    )
    received = collections.Counter()
    for each in program.Program(made.as_text()).collectives():
        received[each.kind] += each.total
    yield "received", f"by a chip in a step, as compiled: {amounts(received) or 'nothing'}"


def _flops(operations: float) -> str:
    """`2,343 GFLOP` of a number of operations."""
    unit, size = next(pair for pair in UNITS if operations >= pair[1] or pair[1] == 1)
    return f"{operations / size:,.4g} {unit}"


def amounts(parts: Mapping[str, float]) -> str:
    """Numbers of bytes by name."""
    return ", ".join(f"{name} {report.amount(size)}" for name, size in parts.items())


def digits(number: float) -> str:
    """A number with as many digits as it deserves."""
    if number >= 100:
        return f"{number:,.0f}"
    told = f"{number:,.3g}"
    return f"{decimal.Decimal(told):f}" if "e" in told else told


def _two(numbers: Iterable[float], told: Callable[[float], str] = digits) -> str:
    """Two bounds in words, with as many digits as they deserve."""
    first, second = map(told, numbers)
    return first if first == second else f"{first} or {second}"


def _lasting(seconds: float) -> str:
    name, unit = next((n, u) for n, u in LASTING if seconds >= u or u == 1)
    return f"{digits(seconds / unit)} {name}"


def row(pair: tuple[str, str]) -> str:
    """A name and what is said of it, in lines of a terminal's width."""
    name, words = pair
    return textwrap.fill(
        words,
        COLUMNS,
        initial_indent=f"{name:<{FIRST}}",
        subsequent_indent=" " * FIRST,
        break_long_words=False,
        break_on_hyphens=False,
    )
