"""Every quantizer with one encoder, decoder, data set and budget: the table of the ablation.

    python benchmarks/quantizers.py --data DIR --workdir DIR [--steps N] [--names NAME ...]

Trains `configs/tokenizer/ablation.py:NAME` for each name in a process of its own, as a user would
(a run that is there already is taken up), then prints a table: held-out PSNR and SSIM with the
standard error over images, usage and perplexity of the codes, bits that the tokens of an image
could hold and that they do hold (perplexity), the median time of a step by the clock, and CPU
seconds of the whole run (compiling and evaluation included). DIR is an image folder with `train`
and `test`, such as CIFAR-10's.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys

import machine

from tokgen import metrics_log
from tokgen.checkpoints import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[1]
ABLATION = "configs/tokenizer/ablation.py"
NAMES = (
    *("vq", "vq_ema", "vq_l2", "vq_entropy", "vq_clustering", "fsq", "ibq", "lfq", "bsq"),
    *("multiscale_vq", "multiscale_fsq", "gaussian"),
)
PACKAGES = ("jax", "flax", "optax", "numpy")
COLUMNS = (
    "quantizer",
    "PSNR dB",
    "SSIM",
    "usage",
    "perplexity",
    "bits",
    "used bits",
    "ms/step",
    "CPU s",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="image folder")
    parser.add_argument("--workdir", required=True, help="a run per quantizer is kept below it")
    parser.add_argument("--steps", type=int, default=0, help="default: the config's")
    parser.add_argument("--images", type=int, default=1000, help="held-out ones")
    parser.add_argument("--names", nargs="+", default=NAMES, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="tiny networks: does it work?")
    arguments = parser.parse_args()
    print(machine.header(PACKAGES), flush=True)
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS), flush=True)
    for name in arguments.names:
        workdir = pathlib.Path(arguments.workdir) / name
        train(name, workdir, arguments)
        print("| " + " | ".join([name, *row(workdir)]) + " |", flush=True)


def train(name: str, workdir: pathlib.Path, arguments: argparse.Namespace) -> None:
    """Run the training program; its CPU seconds are noted beside the run."""
    words = [
        *("--config", f"{ABLATION}:{name}", "--workdir", str(workdir)),
        *(f"--config.data.path={arguments.data}", f"--config.held_out.images={arguments.images}"),
    ]
    if arguments.steps:
        words += [f"--config.steps={arguments.steps}", f"--config.report.save={arguments.steps}"]
    if arguments.quick:
        words += ["--config.encoder.widths=(16,)", "--config.decoder.widths=(16,)"]
        words += ["--config.encoder.blocks=1", "--config.decoder.blocks=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_tokenizer.py"), *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(
            f"{name}: the training program ended with {done.returncode}\n{done.stderr[-2000:]}"
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    note = workdir / "cpu_seconds.json"
    if not note.exists():  # a run that was there already has its own
        note.write_text(json.dumps(seconds))


def row(workdir: pathlib.Path) -> list[str]:
    """The cells of a trained run."""
    step = checkpoint.find(workdir)
    meta = checkpoint.read_meta(step)
    metrics, layout = meta["metrics"], meta["layout"]
    seconds = json.loads((workdir / "cpu_seconds.json").read_text())
    cells = [
        f"{metrics['psnr_db']:.2f} ± {metrics['psnr_db_error']:.2f}",
        f"{metrics['ssim']:.3f} ± {metrics['ssim_error']:.3f}",
    ]
    if layout:
        length = sum(rows * columns for rows, columns in layout["grids"])
        bits = length * sum(math.log2(size) for size in layout["vocab"])
        used = length * len(layout["vocab"]) * math.log2(metrics["codebook_perplexity"])
        cells += [
            f"{100 * metrics['codebook_usage']:.1f} %",
            f"{metrics['codebook_perplexity']:.0f}",
            f"{bits:.0f}",
            f"{used:.0f}",
        ]
    else:
        cells += ["continuous", "", "", ""]
    return [*cells, f"{milliseconds(workdir):.1f}", f"{seconds:.0f}"]


def milliseconds(workdir: pathlib.Path) -> float:
    """Of a step, the median over the intervals of the log."""
    train = [record for record in metrics_log.read(workdir) if record["split"] == "train"]
    paces = [
        1000 * (late["seconds"] - early["seconds"]) / (late["step"] - early["step"])
        for early, late in itertools.pairwise(train)
    ]
    return statistics.median(paces) if paces else math.nan


if __name__ == "__main__":
    main()
