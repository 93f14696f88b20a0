"""Decodes at full size, compiled for one TPU that is not here.

    python benchmarks/decode.py --aot v5e:2x2 [--cases rar-xxl:64 ...] [--apart]

The compiler is libtpu's (`pip install -c constraints.txt "tokgen[tpu]"`), in a process of the CPU.
Shapes alone go in, bfloat16; no weights are made. Said of each program: the compiler's CPU seconds;
bytes of arguments, temporaries and outputs against the chip's memory; what a step moves through it,
read from the program's text (`tokgen.planning.program`), against weights and the cache in use
(`roofline`); copies of the size of a layer's matrix or cache inside of a loop; and the images a
second that the chip's roofline allows. All steps are guided, as published.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import roofline
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokgen import chips, rng
from tokgen.config import building, reading
from tokgen.planning import program as programs
from tokgen.sampling import decode, presets

CASES = {
    "v5e": (("rar-b", 64), ("rar-xxl", 64), ("var-d30", 16), ("maskbit", 64)),
    "v6e": (("rar-xxl", 128), ("var-d30", 64)),
}
BOUND = 1.25  # bytes of a step may be so many times weights and cache in use
GB = 1e9


def run(topology: str, cases=(), *, scanned: bool = True, shrunk: tuple[str, ...] = ()) -> bool:
    """Compile and print; whether every program fits, and moves no more than it may.

    Args:
        cases: (generator, batch) pairs; those of the topology's chip where there are none.
        scanned: over stacked layers, as `decode.laid_out` has it on a TPU; or layers apart.
        shrunk: overrides of the recipes, for a try.
    """
    jax.config.update("jax_platforms", "cpu")
    chip = topology.partition(":")[0]
    # this process is the CPU's, the program a TPU's
    decode.SCANNED = (*decode.SCANNED, "cpu") if scanned else ()
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    where = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
    print(f"{topology}, one {device.device_kind}; {said(chip)}", flush=True)
    found = [case(name, batch, chip, where, shrunk) for name, batch in cases or CASES[chip]]
    return all(found)


def said(chip: str) -> str:
    """A chip's constants."""
    found = chips.CHIPS[chip]
    return (
        f"{found.memory / GB:.0f} GB, {found.bandwidth / 1e12:.3f} TB/s, "
        f"{found.flops / 1e12:.0f} TFLOP/s ({found.source})"
    )


def case(name: str, batch: int, chip: str, where: NamedSharding, shrunk: tuple[str, ...]) -> bool:
    """Compile one, print what is said of it; whether it is as it should be."""
    began = time.process_time()
    generator, codec, sampler = made(name, shrunk)
    net = roofline.network(generator)
    lowered = jax.jit(draw, static_argnames="sampler").lower(
        *placed((generator, codec, conditions(batch), keys(batch)), where), sampler=sampler
    )
    traced = time.process_time() - began
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{name}, batch {batch}: {str(error).splitlines()[0]}", flush=True)
        return False
    seconds = time.process_time() - began
    memory = compiled.memory_analysis()
    parts = [memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes]
    room = chips.CHIPS[chip].memory
    fits = sum(parts) <= room
    rows = (batch + 1) * min(decode.SPAN, net.told)
    table = rows * net.adaptive // net.width * net.itemsize  # of what adaptive norms need
    steps = roofline.steps(net, batch, ahead=table <= getattr(generator, "budget", table))
    rate = roofline.images_per_second(net, batch, chips.CHIPS[chip])
    work = sum(step.flops for step in steps) / batch
    print(
        f"{name}, batch {batch}: {seconds:.0f} CPU s ({traced:.0f} of them traced); arguments, "
        f"temporaries, outputs {', '.join(f'{part / GB:.2f}' for part in parts)} GB, "
        f"{sum(parts) / room:.0%} of {room / GB:.0f} GB{'' if fits else ': it does not fit'}\n"
        f"  cache {2 * batch * roofline.cache_per_row(net) / GB:.2f} GB, "
        f"{roofline.cache_per_row(net) / 1e6:.1f} MB a row; {work / 1e9:.0f} GFLOP an image; "
        f"roofline {rate:.1f} images/s",
        flush=True,
    )
    phases = [phase.steps for phase in generator.plan() if phase.steps > 1]
    program = programs.Program(compiled.as_text())
    # against all weights: maps to adaptive norms are read for some steps at a time
    steps = roofline.steps(net, batch, ahead=False)
    return moved(net, batch, steps, phases, program) and fits


def moved(
    net: roofline.Network,
    batch: int,
    steps: list[roofline.Step],
    phases: list[int],
    program: programs.Program,
) -> bool:
    """Print what the steps move, those of `phases` of many steps; is it as it should be?"""
    wanted = [step.bytes for step in steps]
    # others are over layers, of what comes before a phase; a phase may be a loop in a loop
    waiting, loops = list(phases), []
    for loop in reversed(program.loops(net.width**2 * net.itemsize)):
        if waiting and (
            loop.turns == waiting[-1] or waiting[-1] in [loop.turns * n for n in loop.inner]
        ):
            loops.insert(0, (waiting.pop(), loop))
    if waiting:
        raise ValueError(f"no loops of {waiting} steps in the program")
    if not loops:  # every step is a part of the entry
        ratio = program.bytes() / sum(wanted)
        print(
            f"  all steps: {program.bytes() / GB:.2f} GB moved, {ratio:.2f} times matrices, cache "
            f"in use and what lies between layers, {sum(wanted) / GB:.2f} GB",
            flush=True,
        )
        return True
    # loops take the last steps
    first, found, good = len(wanted) - sum(phases), [], True
    for count, loop in loops:
        need, each = sum(wanted[first : first + count]) / count, loop.turns * loop.bytes / count
        moves = [move for move in loop.moves if kept(move, net, batch)]
        print(
            f"  {count} steps: {each / GB:.3f} GB each, {each / need:.2f} times {need / GB:.3f} GB;"
            f" copies of weights or cache: {programs.counted(moves)}"
        )
        first += count
        found.append(count * each)
        good = good and not moves
    ratio = sum(found) / sum(wanted[-sum(phases) :])
    bound = f" (at most {BOUND})" if net.cached else ""
    print(f"  all of them: {ratio:.2f} times{bound}", flush=True)
    return good and (ratio <= BOUND or not net.cached)


def kept(move: programs.Move, net: roofline.Network, batch: int) -> bool:
    """Whether what is copied has the size of a matrix, a layer's or all layers', or of a cache.

    Not what lies between layers: a vector per row and position.
    """
    rows, slots = 2 * batch, net.steps[-1][1]
    matrices = {net.width**2 * n for n in (1, 2, 6)} | {net.width * hidden for hidden in net.hidden}
    sizes = matrices | {net.layers * size for size in matrices}
    seen = [move.size / (rows * net.width * layers) for layers in (1, net.layers)]
    cached = net.cached and any(n == int(n) and slots // 8 < n <= slots for n in seen)
    return move.size in sizes or cached


def made(name: str, shrunk: tuple[str, ...] = ()):
    """(generator, codec, sampler) of a published model: shapes alone, the published preset."""
    settings, layout = roofline.settings_of(name)
    reading.override(settings, shrunk)
    make = lambda: building.generator(settings, layout, 1000, rngs=nnx.Rngs(0))  # noqa: E731
    generator, codec = nnx.eval_shape(make), None
    if name.startswith("var"):
        tokenizer = reading.load("configs/tokenizer/var_vqvae.py:256")
        build = lambda: building.tokenizer(tokenizer, rngs=nnx.Rngs(0))  # noqa: E731
        codec = nnx.eval_shape(build).quantizer
    preset = {k: v for k, v in dict(settings.presets.paper).items() if k != "precision"}
    generator, sampler = presets.prepare(generator, preset)
    return jax.eval_shape(decode.laid_out, generator), codec, sampler


def draw(generator, codec, label_B, keys_B, sampler):
    """Tokens [B, L, G] and what is said of them, as `tokgen sample` draws them."""
    state = decode.generate(generator, codec, label_B, sampler, keys_B=keys_B)
    return state.tokens_BLG, state.invalid_B


def conditions(batch: int) -> jax.ShapeDtypeStruct:
    """Labels."""
    return jax.ShapeDtypeStruct((batch,), jnp.int32)


def keys(batch: int) -> jax.ShapeDtypeStruct:
    """A key per image."""
    return jax.eval_shape(lambda: rng.per_image(0, "sample", jnp.arange(batch)))


def placed(tree, where: NamedSharding):
    """Shapes, said to lie on a device."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
    )
