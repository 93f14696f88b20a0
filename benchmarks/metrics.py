"""Seconds and memory of FID and of precision and recall, beside a plain numpy and scipy version.

    python benchmarks/metrics.py [--cases fid recall ...] [--images N] [--neighbours N] [--width D]

From two sets of float32 features in memory, rectified and correlated as those of a network are, to
the figure; each case in a process of its own, whose peak holds the features, too. "first" is the
peak before the measurement: imports and features. The plain versions are what one writes down
first: the covariance of all rows at once and the root of a matrix product; all distances at once.
"""

import argparse
import json
import subprocess
import sys
import time

import machine
import numpy as np

PACKAGES = ("jax", "numpy", "scipy")
K = 3
COLUMNS = ("case", "features", "value", "seconds", "CPU s", "peak MiB", "first")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=tuple(CASES), choices=tuple(CASES))
    parser.add_argument("--images", type=int, default=50_000, help="of FID, in each set")
    parser.add_argument("--neighbours", type=int, default=10_000, help="images of the other, each")
    parser.add_argument("--width", type=int, default=2048, help="features of an image")
    parser.add_argument("--case", choices=tuple(CASES), help="only this, in this process")
    parser.add_argument("--quick", action="store_true", help="few features: does it work?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.neighbours, arguments.width = 400, 300, 32
    if arguments.case:
        print(json.dumps(measure(arguments)))
        return 0
    print(machine.header(PACKAGES), flush=True)
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS), flush=True)
    for case in arguments.cases:
        # its own process: a peak never comes down again
        done = subprocess.run(
            [sys.executable, *sys.argv, "--case", case], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            return done.returncode
        found = json.loads(done.stdout)
        cells = [case, found["features"], " ".join(f"{value:.6g}" for value in found["value"])]
        cells += [f"{found[name]:.1f}" for name in ("wall", "cpu")]
        cells += [f"{found[name]:.0f}" for name in ("peak", "first")]
        print("| " + " | ".join(cells) + " |", flush=True)
    return 0


def measure(arguments: argparse.Namespace) -> dict:
    """The measurements of one case."""
    made = CASES[arguments.case]()  # imports, which are not measured
    count = arguments.images if arguments.case.startswith("fid") else arguments.neighbours
    draws = np.random.default_rng(0)
    basis = draws.standard_normal((64, arguments.width), np.float32) / 8
    real, generated = (features(draws, basis, count, shift) for shift in (0.0, 0.05))
    first = machine.peak_mib()
    wall, cpu = time.perf_counter(), time.process_time()
    value = made(real, generated)
    return {
        "features": f"2 x {count} x {arguments.width}",
        "value": [float(part) for part in value],
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak": machine.peak_mib(),
        "first": first,
    }


def features(draws: np.random.Generator, basis: np.ndarray, count: int, shift: float) -> np.ndarray:
    """Rectified normals of 64 common directions, and noise: [count, D] float32."""
    found = np.empty((count, basis.shape[1]), np.float32)
    for start in range(0, count, 1000):
        rows = found[start : start + 1000]
        draws.standard_normal(out=rows, dtype=np.float32)
        rows *= 0.5
        rows += draws.standard_normal((len(rows), len(basis)), np.float32) @ basis + shift
        np.maximum(rows, 0, out=rows)
    return found


def fid():
    from tokgen.metrics import frechet, moments

    def value(real, generated):
        found = frechet.between(moments.Moments.of(generated), moments.Moments.of(real))
        return [found.value]

    return value


def fid_plain():
    import scipy.linalg

    def value(real, generated):
        means = [np.mean(x, axis=0, dtype=np.float64) for x in (real, generated)]
        covariances = [np.cov(x, rowvar=False) for x in (real, generated)]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
        traces = sum(np.trace(covariance) for covariance in covariances)
        return [np.sum((means[0] - means[1]) ** 2) + traces - 2 * np.trace(root).real]

    return value


def recall():
    from tokgen.metrics import neighbours

    return lambda real, generated: neighbours.precision_recall(real, generated, K)


def recall_plain():
    def squares(x, y):
        return np.sum(x * x, 1)[:, None] + np.sum(y * y, 1)[None] - 2 * x @ y.T

    def value(real, generated):
        radii = [np.partition(squares(x, x), K, axis=1)[:, K] for x in (real, generated)]
        between = squares(real, generated)
        precision = (between <= radii[0][:, None]).any(0).mean()
        return [precision, (between <= radii[1][None]).any(1).mean()]

    return value


CASES = {"fid": fid, "fid_plain": fid_plain, "recall": recall, "recall_plain": recall_plain}


if __name__ == "__main__":
    sys.exit(main())
