"""A pickle followed without being run: what it claims, and the work that it asks for.

Only the opcodes that build containers, strings and numbers, and those that call a name, are let
through. Which names there are is not decided here.
"""

from __future__ import annotations

import pickletools

from tokgen import interfaces

DEEPEST = 64  # containers within containers
MOST_ENTRIES = 10**6  # of one value, each mention of a shared one counted
MOST_OPCODES = 10**6  # a tensor takes about 35
MOST_WORK = 10**7  # entries of all that is hashed or given to a call
WIDE = 2**60, 10**4  # whole numbers beyond this may be made to have one hash: this much work

OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    SHORT_BINUNICODE BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
    BYTEARRAY8 GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID BINPUT LONG_BINPUT MEMOIZE BINGET
    LONG_BINGET
    """.split()
)
_MUTATING = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
# What is hashed (keys) or handed to a call, out of all that the opcode takes.
_WORK = {
    "SETITEM": slice(1, None, 2),
    "SETITEMS": slice(1, None, 2),
    "REDUCE": slice(1, None),
    "NEWOBJ": slice(1, None),
    "ADDITEMS": slice(1, None),
    "FROZENSET": slice(0, None),
    "BINPERSID": slice(0, None),
}


def inspected(program: bytes) -> int:
    """The length of the pickle at the start of `program`, or an error if it may not be run.

    Follows the stack with (depth, entries) in the place of each value: hashing a tuple would
    overrun the C stack where it is nested a million times, and would never end where fifty
    levels mention the one below twice.
    """
    stack: list[tuple[int, int] | None] = []  # None is a mark
    memo: dict[int, tuple[int, int] | None] = {}
    work = 0
    for count, (opcode, argument, position) in enumerate(pickletools.genops(program)):
        if opcode.name not in OPCODES:
            raise interfaces.UserError(f"a pickle with the opcode {opcode.name} is refused")
        if opcode.name == "FRAME" and argument > len(program):
            raise interfaces.UserError("a pickle that claims more bytes than it has is refused")
        if opcode.name == "STOP":
            return position + 1
        if opcode.name == "MARK":
            stack.append(None)
        elif opcode.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if argument is None else argument
            # The unpickler's memo is an array that grows to the largest place.
            if place > count:
                raise interfaces.UserError(f"a pickle that numbers {place} values is refused")
            memo[place] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            work += _follow(opcode, stack)
            if opcode.name == "LONG1" and abs(argument) >= WIDE[0]:
                work += WIDE[1]
        if count >= MOST_OPCODES or work > MOST_WORK:
            raise interfaces.UserError("a pickle that asks for endless work is refused")
    raise interfaces.UserError("its pickle does not end")


def _follow(opcode: pickletools.OpcodeInfo, stack: list[tuple[int, int] | None]) -> int:
    """Pop what `opcode` takes, push the depth and the entries of what it leaves.

    Returns how many entries are hashed, or given to a call.
    """
    kinds = list(opcode.stack_before)
    taken = []
    if pickletools.markobject in kinds:
        kinds = kinds[: kinds.index(pickletools.markobject)]
        while (value := stack.pop()) is not None:
            taken.append(value)
    taken = [stack.pop() for _ in kinds][::-1] + taken[::-1]
    if None in taken:
        raise interfaces.UserError("a pickle that takes a mark for a value is refused")
    depth = 1 + max((depth for depth, _ in taken), default=0)
    if opcode.name in _MUTATING:  # taken[0] grows; that makes it no deeper than what it is given
        depth = max(taken[0][0], 1 + max((depth for depth, _ in taken[1:]), default=0))
    entries = 1 + sum(entries for _, entries in taken)
    if depth > DEEPEST or entries > MOST_ENTRIES:
        raise interfaces.UserError(
            f"a pickle nested more than {DEEPEST} deep, or of more than {MOST_ENTRIES} entries, is "
            "refused"
        )
    if opcode.stack_after:
        stack.append((depth, entries))
    return sum(entries for _, entries in taken[_WORK.get(opcode.name, slice(0))])
