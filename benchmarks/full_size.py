"""Published models at their full size: how much memory and time an import and a first picture take.

    python benchmarks/full_size.py [--models var-d16,rar-b] [--out FOLDER] [--limit MINUTES]

Each model's file, and its tokenizer's, is written in the published form, its names, shapes and
dtypes those of the zoo's row, its numbers random: nothing is downloaded. Then `tokgen import` and
`tokgen sample --number 1 --batch 1` (one class) run, each in a process of its own. "peak" is the
most memory that the process ever held, "s" its seconds from start to end, compiling included.
A picture that would take longer than the limit, by what its steps read of parameters, is not drawn.
Files are deleted when their row is printed; FOLDER needs room for two of each size.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zlib

import machine
import numpy as np
from flax import nnx

from tokgen import parameters
from tokgen.config import building, reading
from tokgen.pretrained import system as systems
from tokgen.pretrained.formats import stored, writer
from tokgen.sampling import decode
from tokgen.zoo import model as zoo

PACKAGES = ("jax", "flax", "orbax-checkpoint", "tensorstore", "numpy")
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
CLASSES, CLASS = 1000, "207"
# Models by the zoo's names: the recipes of their sizes
RECIPES = {
    "var-tokenizer": "tokenizer/var_vqvae.py:256",
    "maskgit-vqgan": "tokenizer/maskgit_vqgan.py:256",
    "llamagen-tokenizer": "tokenizer/llamagen_vq.py:vq16",
    "llamagen-tokenizer-384": "tokenizer/llamagen_vq.py:vq16",
    "titok-tokenizer-l32": "tokenizer/titok.py:l32",
    "maskbit-tokenizer-14bit": "tokenizer/maskbit.py:lfq14",
    "var-d16": "generator/var.py:d16",
    "rar-b": "generator/rar.py:b",
    "llamagen-l": "generator/llamagen.py:l",
    "titok-l32": "generator/titok.py:l32",
    "maskbit-14bit": "generator/maskbit.py:14bit",
    "rar-xxl": "generator/rar.py:xxl",
    "var-d30": "generator/var.py:d30",
    "llamagen-3b": "generator/llamagen.py:3b384",
}
GENERATORS = [name for name, recipe in RECIPES.items() if recipe.startswith("generator")]
# --quick: fields of the recipes, the published configuration, what an import sets
SIDE = {"encoder.widths": (32, 32), "encoder.blocks": 1, "encoder.hidden": 32}
TINY = {
    "llamagen-tokenizer": (
        {**SIDE, **{name.replace("encoder", "decoder"): value for name, value in SIDE.items()}}
        | {"quantizer.codes": 16},
        {"num_res_blocks": 1},
        ("view.size=8,8",),
    ),
    "llamagen-l": (
        {"generator.width": 32, "generator.depth": 2, "generator.heads": 4, "generator.hidden": 64},
        {"n_head": 4, "block_size": 16},
        (),
    ),
}
GB = 1e9
READ = 5 * GB  # bytes of parameters that a core reads in a second: every step reads all of them


@dataclasses.dataclass(frozen=True)
class Measured:
    """One process, or why there was none."""

    peak: float = 0.0  # bytes
    seconds: float = 0.0
    failed: str = ""

    def __str__(self) -> str:
        return self.failed or f"{self.peak / GB:6.2f} GB {self.seconds:6.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(GENERATORS), help="names of the zoo")
    parser.add_argument("--out", help="folder for the files; default: a temporary one")
    parser.add_argument("--limit", type=float, default=15, help="minutes of one process")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--quick", action="store_true", help="a tiny network: does it work?")
    arguments = parser.parse_args()
    names, sizes = arguments.models.split(","), {}
    if arguments.quick:
        names, sizes = ["llamagen-l"], TINY
    precisions = arguments.precisions.split(",")
    print(machine.header(PACKAGES), flush=True)
    columns = "".join(f"{f'picture, {name}':>26}" for name in precisions)
    print(f"{'model':24}{'file':>9}{'import':>20}{'of file':>9}{columns}", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        for name in names:
            shown(name, pathlib.Path(folder), arguments.limit * 60, precisions, sizes)
    return 0


def shown(
    name: str, folder: pathlib.Path, limit: float, precisions: list[str], sizes: dict
) -> None:
    """Measure a generator and print its row, and that of its tokenizer."""
    tokenizer = zoo.named(name).tokenizer
    runs = {each: folder / each for each in (tokenizer, name)}
    for each, out in runs.items():
        _, *said = sizes.get(each, ({}, zoo.named(each).configuration, zoo.named(each).overrides))
        model = dataclasses.replace(zoo.named(each), configuration=said[0], overrides=said[1])
        file = folder / model.file
        if problem := lacking(model, folder):
            print(f"{each:24}{model.size / GB:6.2f} GB  not measured: {problem}", flush=True)
            break
        network = made(each, sizes)
        written(file, model, network)
        taken = imported(file, model, out, runs[tokenizer] if model.tokenizer else None, limit)
        size = file.stat().st_size
        file.unlink()
        row = f"{each:24}{size / GB:6.2f} GB{taken!s:>20}{taken.peak / size:8.2f}x"
        if each == name and not taken.failed:
            minutes = decode.steps(network) * model.size / READ / 60
            late = Measured(failed=f"about {minutes:.0f} minutes") if 60 * minutes > limit else None
            row += "".join(f"{late or picture(out, found, limit)!s:>26}" for found in precisions)
        print(row, flush=True)
        if taken.failed:
            break
    for out in runs.values():
        shutil.rmtree(out, ignore_errors=True)


def lacking(model: zoo.Model, folder: pathlib.Path) -> str:
    """What this machine has too little of for a model; "" if it has enough."""
    free, wanted = shutil.disk_usage(folder).free, 2.1 * model.size
    if free < wanted:
        return f"it needs {wanted / GB:.0f} GB of disk, {free / GB:.0f} are free"
    there = available()
    if model.size > there:
        return f"its parameters take {model.size / GB:.1f} GB, {there / GB:.1f} are free"
    return ""


def available() -> float:
    """Bytes of memory that a new process can have."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    found = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return int(found) * 2**10


def made(name: str, sizes: dict) -> nnx.Module:
    """The network of a row: shapes, no numbers."""
    config = reading.load(str(CONFIGS / RECIPES[name]))
    model = zoo.named(name)
    fields, _, overrides = sizes.get(name, ({}, {}, model.overrides))
    config.update_from_flattened_dict(fields)
    if model.tokenizer:
        layout = made(model.tokenizer, sizes).layout
        make = lambda: building.generator(config, layout, CLASSES, rngs=nnx.Rngs(0))  # noqa: E731
    else:
        reading.override(config, overrides)
        make = lambda: building.tokenizer(config, rngs=nnx.Rngs(0))  # noqa: E731
    return nnx.eval_shape(make)


def written(file: pathlib.Path, model: zoo.Model, network: nnx.Module) -> None:
    """The file of a row, array by array."""
    system = systems.named(model.system)
    _, params, stats = parameters.split(network)
    shapes = {
        path: leaf.shape
        for tree in (params, stats)
        for path, leaf in parameters.paths(tree).items()
    }
    arrays = {}
    for row in system.rows(network):
        parts = [
            np.broadcast_to(np.int8(0), shapes[p] if isinstance(p, str) else shapes[p[0]][1:])
            for p in row.places
        ]
        arrays[row.key] = drawn(row.key, row.rule.published(parts).shape)
    if system.derived:
        arrays |= system.derived(network)
    writer.write(file, arrays, form=system.form, wrap=system.wrap)


def drawn(key: str, shape: tuple[int, ...]) -> stored.Stored:
    """Random numbers of a key, drawn when they are written; small, as of weights."""

    def fetch() -> np.ndarray:
        random = np.random.default_rng(zlib.crc32(key.encode()))
        array = random.standard_normal(shape, np.float32)
        array *= np.float32(0.02)
        return np.abs(array) if key.endswith("running_var") else array

    return stored.Stored(np.dtype(np.float32), tuple(shape), fetch)


def imported(
    file: pathlib.Path,
    model: zoo.Model,
    out: pathlib.Path,
    tokenizer: pathlib.Path | None,
    limit: float,
) -> Measured:
    """What `tokgen import` takes."""
    words = ["import", file, "--system", model.system, "--out", out]
    if model.configuration:
        config = file.with_suffix(".json")
        config.write_text(json.dumps(dict(model.configuration)))
        words += ["--config", config]
    for field in model.overrides:
        words += ["--set", field]
    words += ["--tokenizer", tokenizer] if tokenizer else []
    return ran(words, limit, file.parent / "cache")


def picture(run: pathlib.Path, precision: str, limit: float) -> Measured:
    """What the first picture takes, of one class."""
    out = run.with_name(f"{run.name}-{precision}")
    words = ["sample", run, "--classes", CLASS, "--number", 1, "--batch", 1]
    cache = run.with_name(f"{run.name}-{precision}-cache")
    found = ran([*words, "--precision", precision, "--out", out], limit, cache)
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    return found


def ran(words: list, limit: float, cache: pathlib.Path) -> Measured:
    """A command of tokgen in its own process: a peak never comes down again.

    `cache` keeps no program that was compiled before.
    """
    started = time.monotonic()
    log = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "tokgen.cli", *map(str, words)],
        stdout=log,
        stderr=log,
        env=os.environ | {"TOKGEN_CACHE": str(cache)},
    )
    peak = 0.0
    while True:
        peak = held(process.pid) or peak
        found, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.monotonic() - started
        if found:
            break
        if seconds > limit:
            process.kill()
            os.wait4(process.pid, 0)
            return Measured(failed=f"over {limit / 60:.0f} minutes")
        time.sleep(0.1)
    if status:
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines() or ["no word"]
        killed = " (killed)" if os.WIFSIGNALED(status) else ""
        return Measured(failed=f"failed{killed}: {said[-1]:.200}")
    unit = 1 if sys.platform == "darwin" else 2**10
    return Measured(peak or usage.ru_maxrss * unit, seconds)


def held(process: int) -> float:
    """The most bytes that a process has held so far; 0 where the system does not say.

    Not `ru_maxrss`: on Linux that is never less than what its parent held when it began.
    """
    try:
        lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 2.0**10 for line in lines if line.startswith("VmHWM")), 0.0)


if __name__ == "__main__":
    sys.exit(main())
