"""What a step computes with beside its arguments: the most that lives at once, from its jaxpr.

The step is traced with the images of one device. A value lies in memory from the product, the sum
or the loop that makes it until it is last read; what is made value by value of another is computed
where it is read, and keeps its operands alive until then. Of a loop lie what it stacks for all of
its turns, and what one turn computes with.

Values that do not grow with the batch are parameters' or their gradients': outside of loops a
device has its part of them, inside, a layer's whole.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
from jax.extend import core as extended

from tokgen.nn import fused
from tokgen.planning import steps, tiles

FEW = 8  # images
# libtpu lays maps of so many channels, and of at least so many pixels a side, for convolutions:
# channels into lanes, filled up to 128, and images into rows, to a multiple of 8
CHANNELS, SIDE = 64, 64
# Fewer images it takes apart into strips, as so many more images ("space to batch"), and of several
# of them keeps what it convolves both ways
FOLDED = 2.0

# Computed where they are read: no memory of their own
FUSED = {
    *("add", "sub", "mul", "div", "neg", "exp", "log", "tanh", "logistic", "erf", "rsqrt", "sqrt"),
    *("integer_pow", "pow", "max", "min", "abs", "sign", "square", "select_n"),
    "convert_element_type",
    *("broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "slice", "rev", "iota"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite", "stop_gradient", "copy"),
    *("dynamic_slice", "pad", "concatenate", "cos", "sin", "log1p", "expm1", "add_any", "clamp"),
    *("shift_right_logical", "shift_left", "xor", "bitcast_convert_type", "floor", "round"),
    *("sharding_constraint", "optimization_barrier", "name", "random_bits", "copy_p"),
    *("random_wrap", "random_unwrap", "random_fold_in", "threefry2x32", "exp2", "erf_inv", "atan2"),
}
CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


def of(
    step: steps.Step,
    images: int,
    *,
    part: float,
    lies: tiles.Lies = tiles.plain,
    parts: int = 1,
    share: float = 1.0,
) -> float:
    """Bytes of a device that has so many images, and a `part` of what does not grow with them.

    Args:
        parts: those in which the step takes them.
        share: of the images that are taken alone, and then the others.
    """
    one, two, count = pair(step, images, parts)
    fuses = _in_place_of_calls
    if step.platform == "tpu":
        few = images / parts < FEW
        fuses = _named if few else fuses  # between strips and images calls are not fused
        times = FOLDED if few and images > parts else 1.0
        lies = functools.partial(_convolved, lies, times)
    return most(one, two, part, lies, share * images / count, fuses)


def pair(step: steps.Step, images: int, parts: int) -> tuple:
    """(jaxpr of a step, that of more images, images of the first), for a device with so many."""
    # of few images a program may be another: one of them is a dimension less
    count = max(images, FEW * parts)
    return *(_traced(step, n) for n in (count, max(step.images, 2 * count))), count


def _convolved(lies: tiles.Lies, times: float, shape: tuple[int, ...], dtype) -> float:
    """Bytes of an array where libtpu convolves it; `times` as many where it folds it."""
    if len(shape) != 4 or min(shape[1:3]) < SIDE or shape[3] < CHANNELS:
        return lies(shape, dtype)
    images, height, width, channels = shape
    rows, lanes = (-(-n // tile) * tile for n, tile in ((images, FEW), (channels, tiles.LANES)))
    return times * height * width * rows * lanes * dtype.itemsize


@functools.lru_cache(maxsize=32)
def _traced(step: steps.Step, images: int):
    return step.of(images).traced


def size(variable, lies: tiles.Lies = tiles.plain) -> float:
    aval = variable.aval
    if not hasattr(aval, "shape"):
        return 0.0
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return 8.0 * aval.size
    return lies(tuple(aval.shape), aval.dtype)


def _named(equation) -> bool:
    return equation.primitive.name in FUSED


def _in_place_of_calls(equation) -> bool:
    """Whether an equation is computed where it is read, as a call of nothing else is."""
    bodies = bodies_of(equation) if equation.primitive.name in CALLS else ()
    inside = [each for body in bodies for each in getattr(body, "jaxpr", body).eqns]
    return _named(equation) or bool(inside) and all(map(_in_place_of_calls, inside))


def most(
    one,
    two,
    part: float,
    lies: tiles.Lies = tiles.plain,
    images: float = 1.0,
    fuses: Callable[..., bool] = _in_place_of_calls,
) -> float:
    """The most bytes at once of a jaxpr, its arguments not counted.

    Args:
        two: the same of twice the images: what is larger there grows with the batch.
        part: the share that a device has of what does not grow.
        images: the share that it has of what grows.
        fuses: whether an equation is computed where it is read.
    """
    sizes: dict[int, float] = {}
    roots: dict[int, frozenset] = {}
    held = in_place(one, {id(v) for v in (*one.invars, *one.constvars)})
    names: dict[int, int] = {}  # of variables; those of a body that is called twice are two

    def known(name: int | None) -> frozenset:
        return roots.get(name, frozenset())  # of a literal nothing

    done: list[tuple[set, set, float]] = []  # made, read, within
    for a, b, ins, outs in _unfolded(one, two, names):
        read = frozenset().union(*map(known, ins))
        inside, made = 0.0, set()
        name = a.primitive.name
        if fuses(a):
            for out in outs:
                roots[out] = read
            done.append((set(), set(), 0.0))
            continue
        bodies = list(zip(bodies_of(a), bodies_of(b), strict=True))
        if bodies:
            within = 1.0 if name == "while" or _of_layers(a, b) else part
            inside = max(most(x, y, within, lies, images, fuses) for x, y in bodies)
        if part < 1 and _of_layers(a, b):
            inside += _gathered(a, b)
        for at, out, larger in zip(outs, a.outvars, b.outvars, strict=True):
            if type(out).__name__ != "DropVar" and id(out) not in held:
                grows = size(larger) > size(out)
                sizes[at] = size(out, lies) * (images if grows else part)
                roots[at] = frozenset({at})
                made.add(at)
        if name not in ("scan", "while"):
            inside = max(inside - sum(sizes[m] for m in made), 0.0)
        done.append((made, set(read), inside))
    kept = frozenset().union(*(known(names.get(id(v))) for v in one.outvars))
    last: dict[int, int] = {}
    for number, (made, read, _) in enumerate(done):
        for each in (*made, *read):
            last[each] = number
    for each in kept:
        last[each] = len(done)
    live, top = 0.0, 0.0
    ends: dict[int, list[int]] = {}
    for each, number in last.items():
        ends.setdefault(number, []).append(each)
    for number, (made, _, inside) in enumerate(done):
        live += sum(sizes[each] for each in made)
        top = max(top, live + inside)
        live -= sum(sizes[each] for each in ends.get(number, ()) if each in sizes)
    return top


def _unfolded(one, two, names: dict[int, int]) -> Iterator[tuple]:
    """(equation, the same of twice the images, names read, names made), in order.

    Of what differs by platform the body of the one that is planned for stands in its place: what it
    keeps for a backward pass may be computed where it is read, as any other.
    """
    for a, b in zip(one.eqns, two.eqns, strict=True):
        ins = [names.get(id(v)) for v in a.invars]
        if a.params.get("branches_platforms") and a.primitive.name == "cond":
            (body,), (other,) = bodies_of(a), bodies_of(b)
            within = dict(zip(map(id, body.invars), ins[1:], strict=True))
            yield from _unfolded(body, other, within)
            names |= {
                id(out): within.get(id(v)) for v, out in zip(body.outvars, a.outvars, strict=True)
            }
            continue
        outs = [next(_NAMES) for _ in a.outvars]
        names |= dict(zip(map(id, a.outvars), outs, strict=True))
        yield a, b, ins, outs


_NAMES = itertools.count()


def in_place(jaxpr, held: set[int]) -> set[int]:
    """What lies where an argument did, one of `held`: it is updated there, and carried so."""
    for equation in jaxpr.eqns:
        name, ins, outs = equation.primitive.name, equation.invars, equation.outvars
        if name == "dynamic_update_slice" and id(ins[0]) in held:
            held.add(id(outs[0]))
        elif name == "scan":
            first, count = equation.params["num_consts"], equation.params["num_carry"]
            pairs = zip(ins[first:], outs[:count], strict=False)
            held |= {id(out) for given, out in pairs if id(given) in held}
        else:
            ins = ins[1:] if name == "cond" else ins  # one branch may leave what another updates
            for body in (b for b in bodies_of(equation) if len(b.invars) == len(ins)):
                pairs = zip(body.invars, ins, strict=True)
                inner = in_place(body, {id(v) for v, given in pairs if id(given) in held})
                pairs = zip(body.outvars, outs, strict=True)
                held |= {id(out) for v, out in pairs if id(v) in inner}
    return held


def _of_layers(one, two) -> bool:
    """Whether a loop's turns are layers: what they read one by one does not grow with the batch.

    Another one's turns are parts of a batch, and what they carry are gradients of all parameters.
    """
    if one.primitive.name != "scan":
        return False
    first = one.params["num_consts"] + one.params["num_carry"]
    pairs = list(zip(one.invars, two.invars, strict=True))
    stacks, others = (
        sum(size(a) for a, b in some if size(a) == size(b))
        for some in (pairs[first:], pairs[:first])
    )
    return stacks > others


def _gathered(one, two) -> float:
    """Bytes of a layer's weights that a loop gathers: this turn's, and ahead the next one's."""
    first = one.params["num_consts"] + one.params["num_carry"]
    pairs = zip(one.invars[first:], two.invars[first:], strict=True)
    stacks = [a for a, b in pairs if size(a) == size(b) and a.aval.ndim > 2]
    return 2 * sum(2 * stack.aval.size / stack.aval.shape[0] for stack in stacks)


def bodies_of(equation) -> Iterable:
    """The bodies of an equation; of those for platforms the one for all that have no own.

    A CPU's form of a convolution may take several times as much, and nobody plans for its memory.
    What a kernel stands for computes in a device's fast memory: it has none.
    """
    if equation.params.get("name") in fused.KERNELS:
        return []
    bodies = list(extended.jaxprs_in_params(equation.params))
    platforms = equation.params.get("branches_platforms") or ()
    return [bodies[platforms.index(None)]] if None in platforms else bodies
