"""The plan of a training run: the mesh, what a device holds, how long a step and the run take."""

from __future__ import annotations

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
)

GIB = 2**30
ROOM = 0.9  # of a device's memory, that a plan may fill: the rest is the runtime's


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mesh, with what is reckoned of it."""

    sizes: tuple[int, int, int]
    strategy: str
    estimate: estimates.Estimate

    def seconds(self, devices: planned.Devices) -> tuple[float, float]:
        """A step's least time: where all that waits is hidden, and where nothing of it is."""
        parts = self.estimate.seconds(devices.chip)
        return max(parts.values()), parts["products"] + parts["links"]


def mesh_of(sizes: Sequence[int]) -> AbstractMesh:
    """A mesh of devices that are not here."""
    return AbstractMesh(tuple(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def strategy_of(sizes: Sequence[int]) -> str:
    """The strategy that uses the axes of a mesh."""
    data, fsdp, tensor = sizes
    return "tensor" if tensor > 1 else "fsdp" if fsdp > 1 else "data"


def candidates(count: int, images: int) -> list[tuple[int, int, int]]:
    """Meshes of so many devices whose axes are powers of two, over which a batch lies evenly."""
    powers = [2**n for n in range(count.bit_length())]
    found = []
    for fsdp, tensor in itertools.product(powers, powers):
        data, rest = divmod(count, fsdp * tensor)
        if data and not rest and images % (data * fsdp) == 0:
            found.append((data, fsdp, tensor))
    return found


def reckoned(
    step: steps.Step, network: steps.Network, sizes: Sequence[int], operations: float
) -> Choice:
    """A mesh with its estimate; UserError where a parameter or the batch does not fit it."""
    mesh, strategy = mesh_of(sizes), strategy_of(sizes)
    sharding.check_batch(step.images, mesh)
    found = estimates.of(
        *(step, mesh, strategy), operations=operations, **dataclasses.asdict(network)
    )
    return Choice(tuple(sizes), strategy, found)


def proposed(
    step: steps.Step, network: steps.Network, devices: planned.Devices, operations: float
) -> Choice:
    """The mesh with the shortest step of those whose arguments leave room; UserError if none is.

    Of those as quick, the one that splits the networks least.
    """
    choices, refusals = [], []
    for sizes in candidates(devices.count, step.images):
        try:
            choices.append(reckoned(step, network, sizes, operations))
        except UserError as error:
            refusals.append(str(error))
    if not choices:
        told = (
            refusals[0]
            if refusals
            else (
                f"a batch of {step.images} images does not lie evenly over {devices.count} devices"
            )
        )
        raise UserError(f"no mesh of {devices.name} serves: {told}")
    if devices.chip is None:
        return choices[0]
    # what a step computes with takes about as much as it is given
    fitting = [c for c in choices if 2 * c.estimate.arguments <= ROOM * devices.chip.memory]
    if not fitting:
        least = min(choices, key=lambda c: c.estimate.arguments)
        raise UserError(
            f"no mesh of {devices.name} has room: on {told(least.sizes)} a device holds "
            f"{least.estimate.arguments / GIB:.2f} GiB between steps and needs about as much for a "
            f"step, of {devices.chip.memory / GIB:.1f} GiB; remedies, in this order: more devices, "
            "a smaller config.batch_size with gradient accumulation, a smaller network"
        )
    return min(
        fitting,
        key=lambda c: (round(c.seconds(devices)[1], 4), c.sizes[1] * c.sizes[2], c.sizes[2]),
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


def lines_of_estimate(step: steps.Step, choice: Choice, devices: planned.Devices) -> list[str]:
    """What is known without a compiler, in words."""
    found, chip = choice.estimate, devices.chip
    lines = [
        f"mesh: {told(choice.sizes)}; strategy {choice.strategy}; {step.images} images a step, "
        f"{step.images / devices.count:g} a device",
        "bytes of a device, exact: "
        + ", ".join(f"{name} {report.amount(size)}" for name, size in found.kept.items())
        + f"; arguments of a step {report.amount(found.arguments)} ({found.arguments:,.0f} bytes)",
        f"operations: {found.operations * devices.count / step.images / 1e9:,.1f} GFLOP an image, "
        f"{found.operations / 1e12:,.2f} TFLOP a step and device",
        "received by a device in a step: "
        + (", ".join(f"{k} {report.amount(v)}" for k, v in found.exchanged.items()) or "nothing"),
    ]
    if chip is None:
        return [*lines, "a CPU has no published rates: no times are said of it"]
    parts = found.seconds(chip)
    hidden, shown = choice.seconds(devices)
    lines.append(
        "least time of a step: "
        + ", ".join(f"{name} {1000 * each:,.1f} ms" for name, each in parts.items())
        + f"; {1000 * hidden:,.1f} ms where all are hidden behind each other, {1000 * shown:,.1f} "
        "ms where links are not"
    )
    lines.append(
        f"MFU at most {parts['products'] / hidden:.0%}, {parts['products'] / shown:.0%} where links "
        "are not hidden"
    )
    if parts["links"] > parts["products"]:
        lines.append(
            f"warning: links bound the step: {step.images / devices.count:g} images a device are "
            "too few for this network; a larger config.batch_size, or fewer devices"
        )
    return lines


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


def lines_of_program(made, devices: planned.Devices) -> list[str]:
    """What the compiler says of the step that it made."""
    memory = made.memory_analysis()
    kept = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak, room = sum(kept) + fresh, devices.chip.memory
    by_kind: dict[str, float] = {}
    for each in program.Program(made.as_text()).collectives():
        by_kind[each.kind] = by_kind.get(each.kind, 0.0) + each.total
    return [
        f"memory per chip: arguments {report.amount(kept[0])}, temporaries {report.amount(kept[1])}, outputs that "
        f"are not arguments {report.amount(fresh)}; in all {report.amount(peak)} of {report.amount(room)}"
        + (", fits" if peak <= room else ": it does not fit"),
        "received by a device in a step, in the compiled program: "
        + (
            ", ".join(f"{kind} {report.amount(size)}" for kind, size in by_kind.items())
            or "nothing"
        ),
    ]


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
    step, network = recipe.step, recipe.network
    operations = estimates.count(step)
    if sizes is None:
        choice = proposed(step, network, devices, operations)
    else:
        choice = reckoned(step, network, sizes, operations)
    state, _, _ = step.over(mesh_of(choice.sizes), choice.strategy)
    yield report.table(parameters.paths(steps.parameters_of(state)))
    yield from lines_of_estimate(step, choice, devices)
    yield from lines_of_run(choice, devices, recipe.settings.steps, price)
    if compile and devices.tpu:
        yield from lines_of_program(compiled(step, choice, devices), devices)
