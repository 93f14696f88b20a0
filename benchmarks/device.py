"""Decodes on the accelerator at hand, against its roofline; it ends in time.

    python benchmarks/device.py [--seconds 460] [--cases rar-b:64 ...] [--repeats 3]

In order of worth: RAR-B, VAR-d16, MaskBit (64 steps), RAR-XXL and VAR-d30 at batch 64, in bfloat16,
weights made up on the device, guided and sampled as published, tokens alone. Each runs in a process
of its own, which is ended when its time is over; what was not reached is listed. Printed are the
compiler's seconds, images a second (the median), their share of the roofline (`roofline`) beside
what is asked and what is aimed at, and the peak of the device's memory. "scanned" takes the layers
in a loop, as `decode.laid_out` has it on a TPU, to see whether this device should, too. With a
folder OUT in the environment, device.json there has the same.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import machine
import numpy as np
import roofline
from flax import nnx

from tokgen import chips, rng
from tokgen.config import building, reading
from tokgen.interfaces import UserError
from tokgen.sampling import decode, drawing, presets

# In order of worth: the case, and the seconds that it may take at most
CASES = {
    "rar-b:64": 90,
    "var-d16:64": 90,
    "maskbit:64": 90,
    "rar-xxl:64": 150,
    "var-d30:64": 120,
    "rar-b:64:scanned": 60,
    "rar-xxl:64:scanned": 60,
    "rar-b:256": 90,
    "rar-b:1": 60,
}
ASKED = {"rar": (0.25, 0.60), "var": (0.35, 0.70), "maskbit": (0.40, 0.65)}  # must, aim
TINY = ("generator.width=32", "generator.depth=1", "generator.heads=2", "generator.hidden=32")
LEAST = 20  # seconds in which a process hardly starts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=460, help="for all of it")
    parser.add_argument("--cases", nargs="+", default=tuple(CASES), help="GENERATOR:BATCH")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny network: does it work?")
    parser.add_argument("--case", help="only this, in this process")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measured(arguments.case, arguments.repeats, arguments.quick)))
        return 0
    if arguments.quick:
        arguments.cases, arguments.repeats = (arguments.cases[0], *arguments.cases[-1:]), 1
    end = time.monotonic() + arguments.seconds
    print(machine.header(("jax", "flax", "numpy")), flush=True)
    print(
        f"{'case':20}{'device':20}{'compiled s':>11}{'images/s':>24}{'roofline':>10}{'share':>8}"
        f"{'must, aim':>12}{'peak GB':>9}"
    )
    found, missed = [], []
    for name in arguments.cases:
        left = min(end - time.monotonic(), CASES.get(name, 120))
        # --quick: the first alone, so that the list of what was missed is seen to work
        if left < LEAST or (arguments.quick and found):
            missed.append(f"{name} (no time left)")
            continue
        result, problem = apart(name, left, arguments)
        if problem:
            missed.append(f"{name} ({problem})")
        else:
            found.append(result)
            print(row(result), flush=True)
    print(f"not reached: {', '.join(missed) or 'nothing'}")
    if folder := os.environ.get("OUT"):
        said = json.dumps({"found": found, "missed": missed}, indent=2)
        (pathlib.Path(folder) / "device.json").write_text(said, encoding="utf-8")
    return 0


def apart(name: str, seconds: float, arguments: argparse.Namespace) -> tuple[dict, str]:
    """(what a process of its own measured, why there is nothing of it)."""
    command = [sys.executable, __file__, "--case", name, "--repeats", str(arguments.repeats)]
    command += ["--quick"] if arguments.quick else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {}, f"ended after {seconds:.0f} s"
    if done.returncode:
        last = (done.stderr.strip() or "without a word").splitlines()[-1]
        return {}, f"failed: {last[:200]}"
    return json.loads(done.stdout.splitlines()[-1]), ""


def row(result: dict) -> str:
    """A line of the table."""
    rates, asked = (
        result["images_per_second"],
        ASKED[result["case"].partition("-")[0].split(":")[0]],
    )
    peak = f"{result['peak'] / 1e9:.2f}" if result["peak"] else "-"
    flag = "" if result["sound"] else "  logits were not finite"
    return (
        f"{result['case']:20}{result['device'][:19]:20}{result['compiled']:11.1f}"
        f"{machine.middle(rates):>24}{result['roofline']:10.1f}{result['share']:8.1%}"
        f"{f'{asked[0]:.0%}, {asked[1]:.0%}':>12}{peak:>9}{flag}"
    )


def measured(case: str, repeats: int, quick: bool) -> dict:
    """One case, in this process."""
    name, count, *how = case.split(":")
    batch = 2 if quick else int(count)
    decode.SCANNED = (jax.default_backend(),) if how == ["scanned"] else decode.SCANNED
    settings, layout = roofline.settings_of(name)
    if quick:
        reading.override(settings, TINY)
    make = lambda: building.generator(settings, layout, 1000, rngs=nnx.Rngs(0))  # noqa: E731
    preset = {k: v for k, v in dict(settings.presets.paper).items() if k != "precision"}
    generator, sampler = presets.prepare(nnx.eval_shape(make), preset)
    net = roofline.network(generator)
    generator = jax.tree.map(filled, jax.eval_shape(decode.laid_out, generator))
    codec = codec_of(name)
    label_B = jnp.asarray(np.arange(batch) % 1000, jnp.int32)
    keys_B = rng.per_image(0, "sample", jnp.arange(batch))
    began = time.perf_counter()
    operands = generator, codec, label_B, keys_B
    program = drawing.draw_tokens.lower(*operands, sampler).compile()
    compiled = time.perf_counter() - began
    _, invalid_B, *_ = jax.block_until_ready(program(*operands))
    walls, _ = machine.measured(lambda: jax.block_until_ready(program(*operands)), repeats)
    device = jax.devices()[0]
    known = chips.of(device.device_kind)
    chip = chips.CHIPS[known] if known else roofline.this_cpu("bfloat16")
    limit = roofline.images_per_second(net, batch, chip)
    return {
        "case": case,
        "batch": batch,
        "device": device.device_kind,
        "chip": chip.source,
        "compiled": compiled,
        "images_per_second": [batch / wall for wall in walls],
        "roofline": limit,
        "share": batch / statistics.median(walls) / limit,
        "peak": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
        "sound": not bool(np.any(np.asarray(invalid_B))),
    }


def codec_of(name: str) -> nnx.Module | None:
    """The codec that a generator decodes with, its numbers made up."""
    if not name.startswith("var"):
        return None
    settings = reading.load("configs/tokenizer/var_vqvae.py:256")
    make = lambda: building.tokenizer(settings, rngs=nnx.Rngs(0)).quantizer  # noqa: E731
    return jax.tree.map(filled, nnx.eval_shape(make))


def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of this shape, made on the device: one program for all of the same shape."""
    return _filled(leaf.shape, leaf.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _filled(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    size = int(np.prod(shape))
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    # looks random, and no generator of random numbers has to be compiled for it
    waves = jnp.sin(jnp.arange(size, dtype=jnp.float32) * 12.9898) * 43.0
    return (0.02 * jnp.sin(waves)).astype(dtype).reshape(shape)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"device.py: {error}")
