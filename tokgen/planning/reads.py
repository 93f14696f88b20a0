"""What a program reads of its arguments, from its jaxpr: the bytes that no compiler can spare.

An array is read where a product, or whatever else is no mere view of it, uses it: whole, or the
part that was cut out of it before. A loop over stacked layers reads each of them in its turn. An
array that is updated where it lies is the same array afterwards.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping

from jax.extend import core as extended

VIEWS = {"reshape", "transpose", "squeeze", "expand_dims", "convert_element_type", "copy", "rev"}
CUTS = {"slice", "dynamic_slice"}
ROWS = {"gather"}
UPDATES = {"dynamic_update_slice"}

Origin = tuple[int, int]  # which argument an array is a view of, bytes of a value there


def read(jaxpr, groups: Mapping[int, str]) -> dict[str, float]:
    """Bytes that are read of arguments, by the group that each argument (by its number) is of.

    Of each at most all of it: what is read again may have stayed near.
    """
    known = {
        id(variable): (number, variable.aval.dtype.itemsize)
        for number, variable in enumerate(jaxpr.invars)
        if number in groups
    }
    uses: collections.Counter = collections.Counter()
    for number, size in _read(jaxpr, known):
        uses[number] += size
    found: collections.Counter = collections.Counter()
    for number, size in uses.items():
        aval = jaxpr.invars[number].aval
        found[groups[number]] += min(size, aval.size * aval.dtype.itemsize)
    return dict(found)


def _read(jaxpr, known: dict[int, Origin]) -> Iterator[tuple[int, float]]:
    """(argument, bytes) of each use; what is known grows by the views of what is."""
    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, equation.invars
        origins = [known.get(id(v)) for v in operands]
        if not any(origins):
            continue
        if name in VIEWS | CUTS or name in UPDATES and origins[0]:
            known[id(equation.outvars[0])] = origins[0]
        elif name == "optimization_barrier":
            known |= {
                id(out): origin
                for out, origin in zip(equation.outvars, origins, strict=True)
                if origin
            }
        elif bodies := list(extended.jaxprs_in_params(equation.params)):
            yield from _inside(equation, bodies, origins, known)
        elif name in ROWS and origins[0]:
            yield origins[0][0], equation.outvars[0].aval.size * origins[0][1]
        else:
            yield from (
                (origin[0], operand.aval.size * origin[1])
                for operand, origin in zip(operands, origins, strict=True)
                if origin
            )


def _inside(
    equation, bodies: list, origins: list[Origin | None], known: dict[int, Origin]
) -> Iterator[tuple[int, float]]:
    """What the body of an equation reads; of branches the one that reads most."""
    turns, name = equation.params.get("length", 1), equation.primitive.name
    most: list[tuple[int, float]] = []
    for body in bodies:
        if name == "while":  # its own number of constants lead those of its condition
            continue
        given = origins[len(origins) - len(body.invars) :]
        own = {id(v): o for v, o in zip(body.invars, given, strict=True) if o}
        uses = [(number, turns * size) for number, size in _read(body, own)]
        most = max(most, uses, key=lambda found: sum(size for _, size in found))
        # what is carried and only updated comes out as what went in
        for out, inner in zip(equation.outvars, body.outvars, strict=True):
            if id(inner) in own:
                known[id(out)] = own[id(inner)]
    yield from most
