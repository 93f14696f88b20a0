"""Peak memory of a tokenizer's step, a generator's step, and sampling; each in its own process.

    python benchmarks/memory.py [--tokenizer PATH[:variant]] [--generator PATH[:variant]]

"peak" is the most that the process ever held, compilation included; "imports" is the part of it
that was there before the first array. "device" is the peak of one accelerator, which a CPU does not
count. "compiled" is what XLA says of the program for one device: arguments, temporary arrays, and
outputs that reuse no argument.
"""

import argparse
import subprocess
import sys

import jax
import jax.numpy as jnp
import machine
import training_step

from tokgen import rng, runtime
from tokgen.sampling import decode, presets

CASES = ("tokenizer", "generator", "sampling")
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default=training_step.CONFIGS[0], metavar="PATH[:variant]")
    parser.add_argument("--generator", default=training_step.CONFIGS[1], metavar="PATH[:variant]")
    parser.add_argument("--batch", type=int, default=32, help="images sampled together, guided")
    parser.add_argument("--devices", type=int, help="of the CPU; default: as the programs do")
    parser.add_argument("--case", choices=CASES, help="only this, in this process")
    parser.add_argument("--quick", action="store_true", help="tiny networks: does it work?")
    arguments = parser.parse_args()
    if arguments.case:
        measure(arguments)
        return 0
    print(machine.header(training_step.PACKAGES), flush=True)
    columns = f"{'devices':16}{'peak':>7}{'imports':>9}{'device':>8}  compiled (all in MiB)"
    print(f"{'program':44}{'batch':>5}  {columns}", flush=True)
    for case in CASES:
        # Its own process: a peak never comes down again. This one must not start jax, which would
        # take the accelerator.
        done = subprocess.run([sys.executable, *sys.argv, "--case", case])
        if done.returncode:
            return done.returncode
    return 0


def measure(arguments: argparse.Namespace) -> None:
    """Print the measurements of one program."""
    imported = machine.peak_mib()
    reference = arguments.tokenizer if arguments.case == "tokenizer" else arguments.generator
    settings = training_step.load(reference, arguments.quick)
    if arguments.case == "sampling":
        import decode as decoding  # the benchmark beside this one

        runtime.devices()
        batch = 2 if arguments.quick else arguments.batch
        generator = decoding.make(settings)
        sampler = presets.sampler({"weight": decoding.WEIGHT}, decode.steps(generator))
        operands = (
            generator,
            jnp.arange(batch) % training_step.CLASSES,
            rng.per_image(0, "sample", jnp.arange(batch)),
        )
        compiled = decoding.with_cache.lower(*operands, sampler).compile()
    else:
        training_step.set_devices(arguments.devices, [settings.batch_size])
        batch = settings.batch_size
        step, operands, _ = training_step.training(settings)
        compiled = step.lower(*operands).compile()
    for _ in range(2):
        found = jax.block_until_ready(compiled(*operands))
        if arguments.case != "sampling":
            operands = (found[0], *operands[1:])
    peaks = f"{machine.peak_mib():7.0f}{imported:9.0f}{on_device():>8}"
    print(
        f"{arguments.case + ' of ' + reference:44}{batch:5}  {machine.devices():16}{peaks}  "
        f"{said(compiled)}"
    )


def on_device() -> str:
    """Peak of the first device, where it counts."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return f"{statistics['peak_bytes_in_use'] / MIB:.0f}" if statistics else "-"


def said(compiled) -> str:
    """What XLA says that a program needs."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "unknown to this backend"
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return (
        f"arguments {analysis.argument_size_in_bytes / MIB:.1f}, temporary "
        f"{analysis.temp_size_in_bytes / MIB:.1f}, new outputs {max(fresh, 0) / MIB:.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
