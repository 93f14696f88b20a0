"""A plan of drawing in words, for people: what a device holds, phase by phase what it does."""

from __future__ import annotations

import time
from collections.abc import Iterator

import jax

from tokgen import report, sharding
from tokgen.interfaces import UserError
from tokgen.planning import (
    decoding,
    description,
    devices as planned,
    draws,
    networks,
    plan,
)

HEADING = ("phase", "steps", "positions", "slots", "rows", "GFLOP", "GB read", "at least")
WIDTHS = (FIRST := description.FIRST, 7, 11, 7, 7, 10, 10, 22)
IMAGES = 50_000  # that a score is of: what they cost


def lines(
    found: networks.Networks,
    batch: int,
    devices: planned.Devices,
    sizes: tuple[int, ...] | None = None,
    *,
    price: float | None = None,
    compile: bool = True,
) -> Iterator[str]:
    """The plan of a batch, line by line as it is known; UserError at its end where it has no room.

    Args:
        sizes: of the mesh, one of which may be -1; None: images over all devices.
        price: of a device for an hour, in any money.
        compile: for a TPU's topology, or for CPUs that are here, ask the compiler, too.
    """
    sizes = sharding.sizes_of(*(sizes or (-1, 1, 1)), devices.count)
    mesh = plan.mesh_of(sizes)
    asked, batch = batch, -(-batch // sharding.ways(mesh)) * sharding.ways(mesh)
    reckoned = decoding.reckoned(found, batch, mesh, devices.lies, platform=devices.platform)
    yield report.table(found.parameters)
    yield ""
    if asked < batch:
        why = f"{asked:,} images do not lie evenly over the mesh: drawn, and planned, are {batch:,}"
        yield description.row(("warning", why))
    yield from map(description.row, of_memory(found, batch, reckoned, devices))
    yield ""
    yield from of_phases(reckoned, devices)
    if devices.chip is not None:
        yield from map(description.row, of_times(found, batch, reckoned, devices, price))
        refuse(found, batch, reckoned, devices)
    if compile and devices.tpu:
        yield ""
        mesh = sharding.make_mesh(*sizes, devices=planned.described(devices))
        yield from map(description.row, of_programs(found, batch, mesh, devices))
    elif compile and devices.chip is None and devices.count <= jax.local_device_count():
        yield ""
        mesh = sharding.make_mesh(*sizes, devices=jax.local_devices()[: devices.count])
        yield from map(description.row, of_programs(found, batch, mesh, devices))
    elif devices.chip is None:
        yield from map(description.row, [("compiling", "these are more CPUs than there are here")])
    elif not devices.tpu:
        yield from map(description.row, [("compiling", "how long it takes, a GPU alone can say")])


def of_memory(
    found: networks.Networks, batch: int, reckoned: decoding.Decode, devices: planned.Devices
) -> description.Rows:
    """What a device holds while it draws, and how many images it has room for."""
    chip, amount = devices.chip, report.amount
    ways = reckoned.sizes[0] * reckoned.sizes[1]
    told = {name: value for name, value in found.settings.items() if name != "precision"}
    settings = ", ".join(f"{name} {value}" for name, value in told.items())
    yield "mesh", plan.told(reckoned.sizes)
    yield "drawn in", f"{found.precision}, pixels in {found.pixels}: {settings}"
    yield "images", f"{batch:,} a batch, {reckoned.images:,} on a device"
    yield (
        "kept",
        f"{amount(sum(reckoned.kept.values()))} on a device: {description.amounts(reckoned.kept)}",
    )
    if reckoned.cache:
        each = reckoned.cache_of_image
        guided = any(part.guided for part in reckoned.parts)
        yield (
            "keys and values",
            f"{amount(each)} of an image"
            + (f", {amount(2 * each)} with those of its null condition" if guided else ""),
        )
    yield "logits", f"{amount(reckoned.logits)} of a step at most"
    room = f" of {amount(chip.memory)}" if chip else ""
    fits = ""
    if chip is not None:
        fits = ", fits" if reckoned.peak <= plan.ROOM * chip.memory else ": IT DOES NOT FIT"
    yield (
        "peak",
        f"about {amount(reckoned.peak)}{room}: {amount(reckoned.drawing)} while tokens are drawn, "
        f"{amount(reckoned.pixels)} while they are turned into pixels{fits}",
    )
    if chip is not None:
        most = reckoned.most(plan.ROOM * chip.memory) * ways
        yield "largest batch", f"about {most:,} images would fit" if most else "none fits"


def of_phases(reckoned: decoding.Decode, devices: planned.Devices) -> Iterator[str]:
    """A table of what a device does, phase by phase: of one step, and the time of all."""
    yield _columns(HEADING if devices.chip else HEADING[:-1])
    for part in reckoned.parts:
        phase, rows = part.phase, reckoned.images * (2 if part.guided else 1)
        cells = ["pixels", "1", "", "", f"{rows:,}"]
        if phase is not None:
            last = phase.first + phase.steps - 1
            name = f"step {phase.first}" + (f" to {last}" if last > phase.first else "")
            slots = f"{phase.slots:,}" if phase.slots else ""
            cells = [name, f"{phase.steps:,}", f"{phase.size:,}", slots, f"{rows:,}"]
        steps = phase.steps if phase else 1
        cells += [description.digits(part.operations / steps / 1e9)]
        cells += [description.digits(part.bytes / steps / 1e9)]
        if devices.chip is not None:
            seconds = description.digits(1e3 * part.seconds(devices.chip))
            cells += [f"{seconds} ms, {part.bound(devices.chip)}"]
        yield _columns(cells)


def of_times(
    found: networks.Networks,
    batch: int,
    reckoned: decoding.Decode,
    devices: planned.Devices,
    price: float | None,
) -> description.Rows:
    """The least time of a batch, at published rates, and what images cost."""
    seconds = reckoned.seconds(devices.chip)
    pixels = reckoned.parts[-1].seconds(devices.chip)
    rate = batch / seconds
    float32 = "float32" in (found.precision, found.pixels)
    wide = ", by the rates of products in bfloat16" if float32 else ""
    yield (
        "a batch at least",
        f"{description.digits(1e3 * seconds)} ms, {description.digits(1e3 * pixels)} ms of it "
        f"pixels: at most {description.digits(rate)} images a second{wide}",
    )
    received = sum(w.times * w.received for part in reckoned.parts for w in part.works)
    yield (
        "received",
        f"by a device in a batch: {report.amount(received) if received else 'nothing'}",
    )
    if price is not None:
        hours = devices.count * IMAGES / rate / 3600
        yield (
            "cost",
            f"of {IMAGES:,} images at least {description.digits(price * hours)}, at {price:g} for "
            "a device hour",
        )


def refuse(
    found: networks.Networks, batch: int, reckoned: decoding.Decode, devices: planned.Devices
) -> None:
    """UserError with remedies, in their order, where a batch has no room."""
    room = plan.ROOM * devices.chip.memory
    if reckoned.peak <= room:
        return
    data, fsdp, tensor = reckoned.sizes
    remedies = []
    if most := reckoned.most(room) * data * fsdp:
        remedies.append(f"a smaller batch (--batch {most})")
    if found.precision == "float32" and reckoned.drawing > reckoned.pixels:
        remedies.append("--precision bfloat16")
    if not most and devices.count > fsdp * tensor:
        remedies.append(f"the network over the devices (--mesh 1,1,{devices.count})")
    remedies.append("more devices")
    raise UserError(
        f"{batch:,} images at a time have no room on {devices.name}: a device needs about "
        f"{report.amount(reckoned.peak)} of {report.amount(devices.chip.memory)}, of which a plan "
        f"fills {plan.ROOM:.0%}; remedies, in this order: {', '.join(remedies)}"
    )


def of_programs(
    found: networks.Networks, batch: int, mesh: jax.sharding.Mesh, devices: planned.Devices
) -> description.Rows:
    """What the compiler says of the programs that draw, and how long it takes, here."""
    kept = decoding.weights(found, mesh.abstract_mesh, devices.lies)
    codec = decoding.size(found.tokenizer.quantizer, devices.lies)
    beside = {"tokens": kept["tokenizer"] - codec, "pixels": kept["generator"]}
    peaks = {}
    for name, (function, given, static) in draws.programs(found, batch, mesh).items():
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            lowered = function.lower(*given, **static)
            traced = time.perf_counter() - began
            made = lowered.compile()
        seconds = time.perf_counter() - began
        memory = made.memory_analysis()
        parts = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "results beside them": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "other network": beside[name],
        }
        peaks[name] = sum(parts.values())
        yield (
            f"{name} compiled",
            f"in {description.digits(seconds)} s on this machine, {description.digits(traced)} s "
            f"of it traced; {report.amount(peaks[name])}: {description.amounts(parts)}",
        )
    peak = max(peaks.values())
    if devices.chip is not None:
        room = devices.chip.memory
        yield (
            "memory per chip:",
            f"{report.amount(peak)} of {report.amount(room)} as compiled"
            + (", fits" if peak <= plan.ROOM * room else ": IT DOES NOT FIT"),
        )


def _columns(cells) -> str:
    first, *rest = zip(cells, WIDTHS, strict=False)
    line = f"{first[0]:<{first[1]}}" + "".join(f" {cell:>{width - 1}}" for cell, width in rest)
    return line.rstrip()
