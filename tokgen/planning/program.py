"""What a compiled program moves, through a device's memory and between devices: its text, read.

`cost_analysis()` counts the body of a loop once. Here `compiled.as_text()` is walked from its
entry, every loop's body as often as it runs. Bytes are those of the arrays that an instruction
reads and writes, as they lie there (tiles are filled up); what lies in a chip's fast memory, S(1)
in a layout, costs nothing. Of an array that is only sliced, the slice counts; of one that is
updated in place, the update.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4}
SIZES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "token": 0}
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota")
ENDS = ("copy-done", "slice-done", "async-done", "opt-barrier", "partition-id")
SLICES = ("dynamic-slice", "slice", "gather")
MOVES = {"copy", "transpose", "bitcast", "reshape", "slice", "dynamic-slice", "pad", "concatenate"}
MOVES |= {"parameter", "constant", "tuple", "convert", "get-tuple-element", "broadcast"}
ARRAY = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(r"(calls|body|condition|to_apply)=%?([\w.\-]+)")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array as it lies: its bytes with what fills its tiles, and whether they are far."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    far: bool  # in the device's large memory


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program."""

    name: str
    kind: str
    arrays: tuple[Array, ...]  # what it gives
    operands: tuple[str, ...]
    called: dict[str, str]
    line: str
    root: bool

    @property
    def far(self) -> int:
        """Bytes of what it gives, in the large memory."""
        return sum(array.bytes for array in self.arrays if array.far)


@dataclasses.dataclass(frozen=True)
class Move:
    """An instruction that only copies from the large memory into the large memory."""

    name: str
    size: int  # values
    bytes: int
    times: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """What devices exchange in one place of a program."""

    kind: str  # of COLLECTIVES
    ways: int  # devices that take part together
    bytes: float  # that each of them receives, in one turn
    times: int

    @property
    def total(self) -> float:
        """Bytes that a device receives in a run of the program."""
        return self.times * self.bytes


@dataclasses.dataclass
class Loop:
    """A loop of the entry: what one turn of it moves."""

    turns: int
    bytes: float
    moves: list[Move]
    inner: list[int]  # turns of the loops in it


class Program:
    """A compiled program's text, taken apart."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            if line.endswith("{") and "->" in line and not line.startswith(" "):
                name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
                current = self.computations.setdefault(name, {})
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif current is not None and " = " in line and line.startswith(" "):
                instruction = parsed(line)
                current[instruction.name] = instruction
            elif line == "}":  # attributes of a kernel may go over lines, and end so, too
                current = None

    def bytes(self) -> float:
        """Of the whole program."""
        return self._bytes(self.entry)

    def loops(self, moved: int = 1) -> list[Loop]:
        """The loops of the entry, with the moves in them of at least `moved` bytes."""
        found = []
        for instruction in self.computations[self.entry].values():
            if instruction.kind == "while":
                body = instruction.called["body"]
                moves = list(self._moves(body, moved, 1))
                within = (i for i in self.computations[body].values() if i.kind == "while")
                inner = [self.turns(i) for i in within]
                found.append(Loop(self.turns(instruction), self._bytes(body), moves, inner))
        return found

    def collectives(self) -> list[Collective]:
        """What devices exchange, wherever it stands.

        A TPU's compiler takes a collective apart, into fusions and inner loops of other work that
        carry it along, all of its channel: it runs as often as the outermost of them.
        """
        found = {}
        for number, (channel, collective) in enumerate(self._collectives(self.entry, 1)):
            key = channel or number
            if key not in found or collective.times < found[key].times:
                found[key] = collective
        return list(found.values())

    def _collectives(self, name: str, times: int) -> Iterator[tuple[str, Collective]]:
        """(channel, collective) of a computation and of what it calls."""
        inside = self.computations[name]
        scattered = _is_scatter(inside)
        for instruction in inside.values():
            kind = instruction.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", instruction.line)
                kind = "reduce-scatter" if scattered and kind == "all-reduce" else kind
                yield channel[1] if channel else "", exchanged(kind, instruction, times)
            elif instruction.kind == "while":
                turns = times * self.turns(instruction)
                yield from self._collectives(instruction.called["body"], turns)
            else:
                for how, called in instruction.called.items():
                    if how == "calls" or instruction.kind in ("call", "conditional"):
                        yield from self._collectives(called, times)

    def turns(self, loop: Instruction) -> int:
        """How often a loop runs: it counts from 0 to the constant that its condition names.

        By ones, or by as many as its body was unrolled to.
        """
        condition = self.computations[loop.called["condition"]]
        root = next(i for i in condition.values() if i.root)
        if root.kind == "fusion":
            condition = condition | self.computations[root.called["calls"]]
        numbers = [n for i in condition.values() if (n := constant(i)) is not None]
        if len(numbers) != 1:
            raise ValueError(f"no single bound in the condition of {loop.name}: {numbers}")
        counter = next((place(i) for i in condition.values() if place(i) is not None), None)
        return -(-numbers[0] // self._stride(loop.called["body"], counter))

    def _stride(self, body: str, counter: int | None) -> int:
        """By how much a loop's body raises its counter; 1 where that is not said plainly."""
        inside, total = self.computations[body], 0
        result = next(i for i in inside.values() if i.root)
        if counter is None or result.kind != "tuple":
            return 1
        value = inside.get(result.operands[counter])
        while value is not None and value.kind in ("add", "copy", "bitcast"):
            parts = [inside[name] for name in value.operands if name in inside]
            total += sum(constant(part) or 0 for part in parts)
            value = next((part for part in parts if constant(part) is None), None)
        return total if value is not None and place(value) == counter and total else 1

    @functools.cache  # noqa: B019 - a program lives as long as the benchmark
    def _bytes(self, name: str) -> float:
        return sum(self._cost(name, i) for i in self.computations[name].values())

    def _cost(self, name: str, instruction: Instruction) -> float:
        if instruction.kind == "while":
            return self.turns(instruction) * self._bytes(instruction.called["body"])
        if instruction.kind in ("call", "conditional"):
            return max(self._bytes(called) for called in instruction.called.values())
        if instruction.kind in (*FREE, *ENDS) or "ConcatBitcast" in instruction.line:
            return 0
        return self._read(name, instruction) + self._written(instruction)

    def _read(self, name: str, instruction: Instruction) -> float:
        inside, total = self.computations[name], 0
        seen = set()
        for number, operand in enumerate(instruction.operands):
            far = inside[operand].far if operand in inside else 0
            if not far or operand in seen:
                continue
            seen.add(operand)
            if instruction.kind in (*SLICES, "slice-start"):
                far = min(far, sum(array.bytes for array in instruction.arrays[-2:]))
            elif instruction.kind == "dynamic-update-slice":
                far = 0 if number == 0 else far
            elif instruction.kind == "fusion":
                far = min(far, self._used(instruction.called["calls"], number, far))
            total += far
        return total

    def _used(self, name: str, number: int, whole: int) -> float:
        """Bytes that a fusion reads of a parameter: slices where it is only sliced."""
        inside = self.computations[name].values()
        parameter = next(
            i for i in inside if i.kind == "parameter" and f"parameter({number})" in i.line
        )
        return min(whole, self._used_of(name, parameter.name))

    def _used_of(self, name: str, value: str) -> float:
        total = 0
        for user in self.computations[name].values():
            if value not in user.operands:
                continue
            first = user.operands[0] == value
            if user.kind == "bitcast" and not user.root:
                total += self._used_of(name, user.name)
            elif user.kind in SLICES and first:
                size = sum(array.bytes for array in user.arrays)
                total += size if user.root else min(size, self._used_of(name, user.name))
            elif user.kind == "dynamic-update-slice" and first:
                continue
            elif user.kind == "fusion":
                total += self._used(user.called["calls"], user.operands.index(value), math.inf)
            else:
                return math.inf
        return total

    def _written(self, instruction: Instruction) -> float:
        if instruction.kind == "copy-start":
            return instruction.arrays[0].bytes if instruction.arrays[0].far else 0
        if instruction.kind == "slice-start":
            return instruction.arrays[1].bytes if instruction.arrays[1].far else 0
        if instruction.kind == "dynamic-update-slice":
            return 0  # the update was counted where it was read
        if instruction.kind != "fusion" or not instruction.far:
            return instruction.far
        return sum(
            min(array.bytes, self._fresh(instruction.called["calls"], number))
            for number, array in enumerate(instruction.arrays)
            if array.far
        )

    def _fresh(self, name: str, number: int) -> float:
        """Bytes that a fusion writes of one of its results: the update where it is one."""
        inside = self.computations[name]
        value = next(i for i in inside.values() if i.root)
        if value.kind == "tuple":
            value = inside[value.operands[number]]
        while value.kind == "bitcast":
            value = inside[value.operands[0]]
        if value.kind == "fusion":
            return self._fresh(value.called["calls"], 0)
        if value.kind == "dynamic-update-slice":
            return sum(array.bytes for array in inside[value.operands[1]].arrays)
        return math.inf

    def _moves(self, name: str, least: int, times: int) -> Iterator[Move]:
        for instruction in self.computations[name].values():
            if instruction.kind == "while":
                inner = times * self.turns(instruction)
                yield from self._moves(instruction.called["body"], least, inner)
            elif instruction.kind in ("copy", "transpose", "copy-start", *SLICES, "fusion"):
                kinds = {instruction.kind.removesuffix("-start")}
                if instruction.kind == "fusion":
                    body = self.computations[instruction.called["calls"]].values()
                    kinds = {i.kind for i in body}
                size = self._written(instruction)
                if kinds <= MOVES and size >= least:
                    read = self._read(name, instruction)
                    if read >= least:  # what comes from fast memory was computed, not copied
                        values = max(math.prod(array.shape) for array in instruction.arrays)
                        yield Move(instruction.name, values, int(size), times)


def constant(instruction: Instruction) -> int | None:
    """The number of a constant, where it is one whole number."""
    found = re.search(r" constant\((\d+)\)", instruction.line)
    return int(found[1]) if instruction.kind == "constant" and found else None


def place(instruction: Instruction) -> int | None:
    """Which part of a tuple an instruction takes, where that is what it does."""
    found = re.search(r"index=(\d+)", instruction.line.partition("metadata=")[0])
    return int(found[1]) if instruction.kind == "get-tuple-element" and found else None


def exchanged(kind: str, instruction: Instruction, times: int) -> Collective:
    """What a device receives in a collective, by the fewest bytes that any way of it takes."""
    ways = group(instruction.line)
    arrays = instruction.arrays
    if instruction.kind.endswith("-start") and kind in ("all-gather", "collective-permute"):
        arrays = arrays[1:2]  # what goes in, what comes out, and what they wait for
    size = sum(math.prod(a.shape) * SIZES.get(a.dtype, 1) for a in arrays)
    share = (ways - 1) / max(ways, 1)
    parts = {
        "all-reduce": 2 * share,
        "reduce-scatter": share if size and "all-reduce" in instruction.kind else ways - 1,
        "collective-permute": 1,
    }
    return Collective(kind, ways, size * parts.get(kind, share), times)


def group(line: str) -> int:
    """How many devices take part together in a collective."""
    if names := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{('[^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", names[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", names[2]))
    if shape := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(shape[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    return 1


def _is_scatter(inside: dict[str, Instruction]) -> bool:
    """Whether a fusion keeps of an all-reduce each device's own slice."""
    kinds = {instruction.kind for instruction in inside.values()}
    root = next((i for i in inside.values() if i.root), None)
    sliced = "dynamic-slice" in kinds and root is not None and root.kind in ("dynamic-slice",)
    return sliced and "all-reduce" in kinds


def parsed(line: str) -> Instruction:
    """An instruction of its line."""
    left, _, rest = line.partition(" = ")
    root = left.lstrip().startswith("ROOT ")
    name = left.strip().removeprefix("ROOT ").lstrip("%")
    end = closing(rest) if rest.startswith("(") else rest.index(" ") - 1
    kind, _, arguments = rest[end + 1 :].lstrip().partition("(")
    inside = arguments[: closing("(" + arguments) - 1]
    attributes = arguments[len(inside) :]
    return Instruction(
        name,
        kind,
        tuple(array(*found) for found in ARRAY.findall(rest[: end + 1])),
        tuple(re.findall(r"%([\w.\-]+)", inside)),
        dict(CALLED.findall(attributes.partition("metadata=")[0])),
        line,
        root,
    )


def closing(text: str) -> int:
    """Where the parenthesis closes with which a text begins."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    raise ValueError(f"no end of {text[:80]!r}")


def array(dtype: str, dimensions: str, layout: str) -> Array:
    """An array of its text: `bf16`, `128,16,66,88`, `0,3,1,2:T(8,128)(2,1)`."""
    shape = tuple(int(n) for n in dimensions.split(",") if n)
    order, _, tiling = layout.partition(":")
    sizes = [shape[int(d)] for d in order.split(",") if d] or list(shape[::-1])  # minor first
    if tile := re.search(r"T\(([\d,]+)\)", tiling):
        for place, least in enumerate(reversed([int(n) for n in tile[1].split(",")])):
            if place < len(sizes):
                sizes[place] = -(-sizes[place] // least) * least
    place = re.search(r"S\((\d+)\)", tiling)
    return Array(dtype, shape, SIZES.get(dtype, 1) * math.prod(sizes), not place or place[1] == "0")


def counted(moves: list[Move]) -> str:
    """Moves in words: how many, and how many bytes of them in a turn."""
    if not moves:
        return "none"
    times = collections.Counter()
    for move in moves:
        times[move.bytes] += move.times
    return ", ".join(f"{count} of {size / 1e6:.1f} MB" for size, count in sorted(times.items()))
