"""The devices of a plan by their name: `v5e:16x16`, `h100:8x8`, `cpu:8`; they need not be here."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from tokgen import chips
from tokgen.interfaces import UserError
from tokgen.planning import tiles

FORMS = "cpu:8, h200:1, h100:8x8 (hosts x devices), v5e:16x16, v6e:16x16, v5p:4x4x4"
TPUS = ("v4", "v5e", "v5p", "v6e")
# The slices that there are, by Google Cloud's documentation of each: of a torus of two dimensions
# these, of one of three those of less than a cube of 4 x 4 x 4, and cubes side by side
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
BELOW = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
MOST = {"v4": (16, 16, 16), "v5p": (16, 16, 24)}  # the largest of three dimensions
# Without these libtpu asks a cloud where it is, and says on stderr that there is none
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nor does a plan take a chip from a process that has it
}


@dataclasses.dataclass(frozen=True)
class Devices:
    """So many of one kind.

    Args:
        name: as it was given.
        kind: of `chips.CHIPS`; "" of a CPU, which has no published rates.
        sizes: of the name: of a TPU its topology, of GPUs hosts and devices of each.
    """

    name: str
    kind: str
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return math.prod(self.sizes)

    @property
    def chip(self) -> chips.Chip | None:
        """Rates and room of one; None of a CPU."""
        return chips.CHIPS.get(self.kind)

    @property
    def tpu(self) -> bool:
        """Whether a compiler for them needs none of them."""
        return self.kind in TPUS

    @property
    def platform(self) -> str:
        """As jax calls it."""
        return "cpu" if self.chip is None else "tpu" if self.tpu else "gpu"

    @property
    def host(self) -> int:
        """How many reach each other by their links; others by the network."""
        return self.count if self.tpu or self.chip is None else self.sizes[-1]

    @property
    def lies(self) -> tiles.Lies:
        """How many bytes an array takes on one."""
        return tiles.tiled if self.tpu else tiles.plain

    def called(self) -> str:
        """In words: `v5e:16x16, 256 chips of 197 TFLOP/s, 819 GB/s, 16 GB`."""
        what = "chips" if self.tpu else "devices"
        if self.chip is None:
            return f"{self.name}, {self.count} {what}"
        return (
            f"{self.name}, {self.count} {what} of {self.chip.flops / 1e12:.0f} TFLOP/s, "
            f"{self.chip.bandwidth / 1e9:,.0f} GB/s, {self.chip.memory / 1e9:.0f} GB "
            f"({self.chip.source})"
        )


def read(name: str) -> Devices:
    """The devices of a name; UserError with the forms that there are."""
    kind, _, rest = name.partition(":")
    known = {chip.lower(): chip for chip in chips.CHIPS} | {"cpu": ""}
    if kind.lower() not in known:
        raise UserError(
            f"no figures of {kind!r}: known are {', '.join(known)}; devices are as {FORMS}"
        )
    if not re.fullmatch(r"\d+(x\d+){0,2}", rest):
        raise UserError(f"devices are as {FORMS}; found {name!r}")
    found = Devices(name.lower(), known[kind.lower()], tuple(map(int, rest.split("x"))))
    many = {"cpu": (1,), **dict.fromkeys(TPUS, (2, 3))}.get(kind.lower(), (1, 2))
    if len(found.sizes) not in many or not found.count:
        raise UserError(
            f"a TPU is named by its topology, GPUs and CPUs by their number: {FORMS}; found "
            f"{name!r}"
        )
    if found.tpu and found.sizes not in slices(found.kind):
        shapes = [f"{found.kind}:{'x'.join(map(str, each))}" for each in near(found)]
        many = "three" if found.kind in MOST else "two"
        raise UserError(
            f"there is no slice {name!r}: those of {found.kind} have {many} dimensions; of about "
            f"as many chips there are {' and '.join(shapes)}"
        )
    if found.kind not in ("", *TPUS) and found.host > found.chip.host:
        raise UserError(
            f"a host has at most {found.chip.host} devices of {kind}; found {name!r}: say how many "
            f"hosts, as {kind}:{-(-found.count // found.chip.host)}x{found.chip.host}"
        )
    return found


def slices(kind: str) -> list[tuple[int, ...]]:
    """The topologies of a kind of TPU."""
    if kind not in MOST:
        return list(FLAT)
    sides = [range(4, most + 1, 4) for most in MOST[kind]]
    cubes = [each for each in itertools.product(*sides) if list(each) == sorted(each)]
    return [*BELOW, *cubes]


def near(devices: Devices) -> list[tuple[int, ...]]:
    """Slices of the two numbers of chips that are nearest, of each the one most like a cube."""
    found: dict[int, tuple[int, ...]] = {}
    for each in sorted(slices(devices.kind), key=max, reverse=True):
        found[math.prod(each)] = each
    two = sorted(found, key=lambda count: abs(math.log(count / devices.count)))[:2]
    return [found[count] for count in sorted(two)]


def described(devices: Devices) -> Sequence[jax.Device]:
    """The devices of a TPU's topology, to compile for; UserError without its compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"to compile for {devices.name} needs libtpu, the compiler of TPUs, which runs without "
            'one; install it with pip install "tokgen[tpu]", or give --estimate for what is known '
            "without compiling"
        )
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    try:
        alone = dict(chips_per_host_bounds=(1, 1, 1)) if devices.count == 1 else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=devices.name, **alone)
    except Exception as error:  # libtpu's own, of several kinds
        raise UserError(f"libtpu knows no topology {devices.name!r}: {error}") from error
    return found.devices
