"""How fast a run goes, how near that is to what its devices can do, and what it waits for.

The host is at most one step ahead of the devices: while they compute a step it reads the figures of
the one before, and waits for the next batch. So nothing that is logged makes them wait, and a wait
for data is one that loading is to blame for.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from tokgen import chips, flops

SHOWN = ("images_per_second", "mfu", "waited")  # beside a progress bar


class Pace:
    """Clocks and counts of a run, from one report to the next.

    Args:
        batch: images of a step, of all processes together.
        devices: those that share its work.
    """

    def __init__(
        self,
        batch: int,
        devices: Sequence[jax.Device],
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.batch, self.devices, self.clock = batch, devices, clock
        # None where no maker's rate is known
        self.chip = chips.CHIPS.get(chips.of(devices[0].device_kind))
        self.work: dict[Callable, float] = {}  # step -> operations of its model
        self.images, self.operations, self.waiting = 0, 0.0, 0.0
        self.before = ()
        self.again()

    def again(self) -> None:
        """Count from here: what was saved, measured or compiled before is no part of the pace."""
        self.since = self.clock(), self.waiting, self.images, self.operations

    def waits(self, following: Callable, *arguments: Any) -> Any:
        """following(*arguments), the next batch: the time that this takes is a wait for data."""
        begun = self.clock()
        found = following(*arguments)
        self.waiting += self.clock() - begun
        return found

    def calls(self, step: Callable, *arguments: Any) -> Any:
        """step(*arguments), under way; the step before has ended when this returns.

        A step gives what the next one works on, its figures, and perhaps more. Its operations are
        counted where the chip has a rate to compare them with, before its first call: that traces
        it, and the call does not trace it again.
        """
        first = step not in self.work
        if first:
            self.work[step] = flops.of_training(step, *arguments) if self.chip else 0.0
        found = step(*arguments)
        if first:  # it has been compiled
            self.again()
        self.images += self.batch
        self.operations += self.work[step]
        jax.block_until_ready(self.before)
        self.before = found[1]
        return found

    def counted(self) -> tuple[int, float]:
        """(images, operations) up to the step that was called last, for `figures` of it."""
        return self.images, self.operations

    def figures(self, counted: tuple[int, float]) -> dict[str, float]:
        """What is logged of the steps since the last report, now that the last of them has ended.

        images_per_second: of all processes together.
        mfu: model FLOPs utilization (arXiv:2204.02311), against the rate of dense bfloat16 products
            in `chips.CHIPS`; what is computed again (remat) does not count. Absent where there is
            no rate.
        waited: share of the time that passed in waiting for batches.
        memory_gb: the most that a device of this process has held, or the process itself where
            devices do not say.
        """
        now, (began, waited, images, operations) = self.clock(), self.since
        told, seconds = {"memory_gb": held(self.devices) / chips.GB}, now - began
        if counted[0] > images and seconds > 0:
            told["images_per_second"] = (counted[0] - images) / seconds
            told["waited"] = min((self.waiting - waited) / seconds, 1.0)
            if self.chip:
                rate = self.chip.flops * len(self.devices)
                told["mfu"] = (counted[1] - operations) / seconds / rate
        self.since = now, self.waiting, *counted
        return told


def held(devices: Sequence[jax.Device]) -> int:
    """Bytes that a device of this process has held at most, or else this process."""
    own = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() or {} for device in own]
    peaks = [each.get("peak_bytes_in_use", each.get("bytes_in_use", 0)) for each in stats]
    if any(peaks):
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
