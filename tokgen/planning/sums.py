"""What devices that share a batch sum over it: bytes of a step, from its jaxpr.

A product or a sum whose result does not grow with the images, made of what does, is a device's part
of it, and a compiler sums it over devices where it is made, in its own dtype. So the gradient of
weights is summed once for every use of them, unless those are added as they are, and in every turn
of a loop: in every part of a batch that is taken in parts.
"""

from __future__ import annotations

from tokgen.planning import steps, temporaries

SUMS = ("dot_general", "conv_general_dilated", "reduce_sum", "scatter-add")
SAME = ("transpose", "reshape", "squeeze", "expand_dims")  # as values, lying otherwise


def of(step: steps.Step, images: int, *, parts: int = 1) -> float:
    """Bytes of such results, on a device that has so many images and all parameters."""
    one, two, _ = temporaries.pair(step, images, parts)
    return summed(one, two)


def summed(one, two) -> float:
    """Those of a jaxpr; `two` is the same of more images."""
    total, alone = 0.0, set()
    for a, b in zip(one.eqns, two.eqns, strict=True):
        name = a.primitive.name
        turns = a.params["length"] if name == "scan" else 1
        bodies = zip(temporaries.bodies_of(a), temporaries.bodies_of(b), strict=True)
        inside = [summed(x, y) for x, y in bodies]
        total += turns * (max(inside, default=0.0) if name == "cond" else sum(inside))
        if name in SUMS and any(map(_grows, a.invars, b.invars)):
            if not _grows(a.outvars[0], b.outvars[0]):
                total += temporaries.size(a.outvars[0])
                alone.add(a.outvars[0])
        elif name in SAME and alone.issuperset(a.invars):
            alone.add(a.outvars[0])
        elif name == "add_any" and alone.issuperset(a.invars):
            # the sum of two such is summed over devices, and not each of them
            total -= temporaries.size(a.outvars[0])
            alone.add(a.outvars[0])
    return total


def _grows(variable, larger) -> bool:
    return temporaries.size(larger) > temporaries.size(variable)
