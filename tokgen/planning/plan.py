"""The plan of a training run: the mesh, what a device holds, how long a step and the run take."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType

from tokgen import report, sharding
from tokgen.interfaces import UserError
from tokgen.planning import (
    devices as planned,
    estimate as estimates,
    recipes,
    steps,
    tiles,
)

ROOM = 0.9  # of a device's memory, that a plan may fill: the rest is the runtime's


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mesh, with what is reckoned of it: an estimate for each of a recipe's kinds of steps."""

    sizes: tuple[int, int, int]
    strategy: str
    estimates: tuple[estimates.Estimate, ...]

    @property
    def estimate(self) -> estimates.Estimate:
        """Of the kind with most to compute."""
        return self.estimates[0]

    @property
    def largest(self) -> estimates.Estimate:
        """Of the kind that needs most memory."""
        return max(self.estimates, key=lambda each: each.peak)

    def parts(
        self, devices: planned.Devices, found: estimates.Estimate | None = None
    ) -> dict[str, float]:
        """The least seconds of each of what a step waits for, at a chip's published rates.

        GPUs of a host reach each other faster than those of others: what an axis that stays within
        a host exchanges goes over its links, the rest over the network, through as many of a host's
        adapters, one a device, as it has members of that axis.
        """
        found, chip = found or self.estimate, devices.chip
        _, fsdp, tensor = self.sizes
        # (how far apart members of an axis stand, over how many devices it spans): tensor's are
        # next to each other
        axes = {"gathered": (tensor, fsdp * tensor), "summed over tensor": (1, tensor)}
        axes["scattered"] = axes["gathered"]
        rates = {}
        for what in found.exchanged:
            apart, span = axes.get(what, (fsdp * tensor, devices.count))
            members = max(devices.host // apart, 1)
            far = span > devices.host
            rates[what] = min(chip.network * members, chip.link) if far else chip.link
        return {
            "products": found.operations / chip.flops,
            # the state is read and written, all else read
            "memory": (2 * found.arguments - found.told) / chip.bandwidth,
            "links": sum(n / rates[what] for what, n in found.exchanged.items()),
        }

    def seconds(
        self, devices: planned.Devices, found: estimates.Estimate | None = None
    ) -> tuple[float, float]:
        """A step's least time: where all that waits is hidden, and where nothing of it is."""
        parts = self.parts(devices, found)
        links = parts.pop("links")
        alone = max(parts.values())
        return max(alone, links), alone + links

    def run(self, devices: planned.Devices, recipe: recipes.Recipe) -> tuple[float, float]:
        """The least seconds of all steps, likewise."""
        pairs = zip(recipe.kinds, self.estimates, strict=True)
        times = [(kind.count, self.seconds(devices, found)) for kind, found in pairs]
        return tuple(sum(count * bounds[n] for count, bounds in times) for n in range(2))


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
    sharding.check_batch(recipe.images, mesh, parts=recipe.parts)
    found = [
        estimates.of(
            *(kind.step, kind.network, mesh, strategy),
            work=kind.work,
            operations=kind.operations,
            lies=lies,
        )
        for kind in recipe.kinds
    ]
    return Choice(tuple(sizes), strategy, tuple(found))


def proposed(recipe: recipes.Recipe, devices: planned.Devices) -> Choice:
    """The mesh with the shortest step of those that have room; UserError if none has.

    Of those as quick, the one that splits the networks least. `tensor` is tried where nothing else
    has room: it splits layers, and its sums wait for each other.
    """
    recipe = recipe.on(devices.platform)
    choices, refusals = [], []
    for wide in (False, True):
        for sizes in candidates(devices.count, recipe.images // recipe.parts):
            if (sizes[2] > 1) == wide:
                try:
                    choices.append(reckoned(recipe, sizes, devices.lies))
                except UserError as error:
                    refusals.append(str(error))
        if devices.chip is None and choices:
            return choices[0]
        if fitting := [c for c in choices if fits(c, devices)]:
            return min(fitting, key=lambda c: (round(c.seconds(devices)[1], 4), c.sizes[1:]))
    if not choices:
        told_of = uneven(recipe, devices) or "".join(refusals[:1])
        raise UserError(
            f"no mesh of {devices.name} serves {recipe.images} images a step: {told_of}"
        )
    least = min(choices, key=lambda c: c.largest.peak)
    said = [lacking(recipe, least, devices), uneven(recipe, devices)]
    raise UserError(f"no mesh of {devices.name} has room: {'; '.join(filter(None, said))}")


def uneven(recipe: recipes.Recipe, devices: planned.Devices) -> str:
    """That a batch does not lie evenly over all devices, and what would; "" where it does.

    Meshes with as many rows as devices are then none, but for those that split layers.
    """
    unit = devices.count * recipe.parts
    if recipe.images % unit == 0:
        return ""
    below = recipe.images // unit * unit
    near = " or ".join(f"--set batch_size={n}" for n in (below, below + unit) if n)
    parts = f" in {recipe.parts} parts" if recipe.parts > 1 else ""
    return (
        f"{recipe.images:,} images{parts} do not lie evenly over {devices.count} devices: for a "
        f"mesh of data and fsdp alone give {near}"
    )


def fits(choice: Choice, devices: planned.Devices) -> bool:
    """Whether a device has room for what is reckoned; of a CPU it is not known, and not refused."""
    return devices.chip is None or choice.largest.peak <= ROOM * devices.chip.memory


def lacking(recipe: recipes.Recipe, choice: Choice, devices: planned.Devices) -> str:
    """Why a choice does not fit, and what would help, the mildest first."""
    most, chip = choice.largest, devices.chip
    helps = "more devices", "a smaller batch_size", "a smaller network"
    if most.arguments < ROOM * devices.chip.memory:
        helps = remedies(recipe, in_parts(recipe, choice, devices))
    return (
        f"a device needs {report.amount(most.peak)}, {report.amount(most.arguments)} of it between "
        f"steps; a plan fills {report.amount(ROOM * chip.memory)} of {report.amount(chip.memory)}; "
        f"remedies, in this order: {', '.join(helps)}"
    )


def remedies(recipe: recipes.Recipe, parts: int | None) -> list[str]:
    """What helps a step without room, the mildest first; `parts` of a batch, if they do."""
    return [
        *([f"the batch in parts (--set accumulate={parts})"] if parts else []),
        *(f"--set {field}=full" for field in recipe.kept_whole),
        *("more devices", "a smaller batch_size", "a smaller network"),
    ]


def divisors(recipe: recipes.Recipe, choice: Choice) -> Iterator[int]:
    """Numbers of parts, of more than now, that lie evenly over a choice's mesh."""
    rows = recipe.images // sharding.ways(mesh_of(choice.sizes))
    return (n for n in range(recipe.parts + 1, rows + 1) if rows % n == 0)


def in_parts(recipe: recipes.Recipe, choice: Choice, devices: planned.Devices) -> int | None:
    """The fewest parts of a batch with room on a choice's mesh; None where no number of them helps.

    Numbers that are far from enough are told by the step as it is, with fewer images at a time; of
    the others the step is reckoned anew.
    """
    mesh = mesh_of(choice.sizes)
    kind = recipe.kinds[choice.estimates.index(choice.largest)]
    for parts in divisors(recipe, choice):
        fewer = estimates.computed_with(
            *(kind.step, kind.network, mesh, choice.strategy),
            lies=devices.lies,
            share=recipe.parts / parts,
        )
        if choice.largest.arguments + fewer > ROOM * devices.chip.memory:
            continue
        try:
            again = reckoned(recipe.again([f"accumulate={parts}"]), choice.sizes, devices.lies)
        except UserError:
            continue  # what a step needs beside its images may forbid it
        if fits(again, devices):
            return parts
    return None


def told(sizes: Sequence[int]) -> str:
    """A mesh as the config has it."""
    return ", ".join(f"{axis} {size}" for axis, size in zip(sharding.AXES, sizes, strict=True))


def compiled(step: steps.Step, choice: Choice, devices: planned.Devices, effort: float = 0.0):
    """The step, compiled for a TPU's topology that is not here; `effort` as a recipe has it."""
    mesh = sharding.make_mesh(*choice.sizes, devices=planned.described(devices))
    with jax.set_mesh(mesh):
        lowered = step.compiled(choice.strategy).lower(*step.over(mesh, choice.strategy))
        return lowered.compile({"exec_time_optimization_effort": effort} if effort else None)
