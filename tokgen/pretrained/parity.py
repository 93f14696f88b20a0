"""Hold a fixture folder against our model, array by array.

A folder has the published weight file (or several), `config.json` with the published
hyper-parameters, and `case.npz` with inputs and the outputs that the system's own code gives.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import operator
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from tokgen import archives, output, parameters, records, runtime
from tokgen.interfaces import UserError
from tokgen.pretrained import entries, keymap, system as systems, transfer

TOLERANCE = 1e-4  # of the array's largest magnitude, in float32
LOOSE = 1e-3  # gradients and entropies: sums with cancellation
ABSOLUTE = {"fid_self": 1e-6}  # 0 but for rounding, which no two programs share
MOST = 2**28  # numbers that a fixture may describe instead of storing them
VERDICTS = ("pass", "fail", "uncovered", "given")


class Folder:
    """A fixture folder; remembers which arrays were taken from it as inputs."""

    def __init__(self, path: str | pathlib.Path, name: str = "", unknown: str = "refuse"):
        self.path, self.unknown = pathlib.Path(path), unknown
        if not (self.path / "case.npz").is_file():
            raise UserError(
                f"a fixture folder needs case.npz and config.json; found none in {path}"
            )
        self.name = name or self.path.resolve().name
        self.system = systems.named(self.name)
        try:
            file = self.path / "config.json"
            self.config = records.load(file) if file.is_file() else {}
        except (ValueError, OSError) as error:
            raise UserError(f"the fixture {self.path} cannot be read: {error}") from error
        if not isinstance(self.config, dict):
            raise UserError(f"{file} must hold a table of names and values")
        self.arrays = archives.arrays(self.path / "case.npz")
        self.inputs: set[str] = set()

    def given(self, name: str) -> np.ndarray:
        """An input."""
        if name not in self.arrays:
            raise UserError(f"the fixture {self.path} lacks the array {name!r}")
        self.inputs.add(name)
        return self.arrays[name]

    def setting(self, name: str) -> Any:
        """A published hyper-parameter; a dotted name leads through sections."""
        value = self.config
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise UserError(
                    f"{self.path / 'config.json'} lacks {name!r}, which {self.name} "
                    "needs; is --system right?"
                )
            value = value[part]
        return value

    def beside(self) -> Folder:
        """The tokenizer's fixture: where `vae` of the configuration says, or the next folder."""
        name = self.system.beside
        said = self.config.get("vae", f"../{name}/config.json")
        if not isinstance(said, str) or not name:
            raise UserError(
                f"{self.path / 'config.json'} must name its tokenizer's config.json as 'vae' (a "
                f"path), of a system that has a tokenizer; found {said!r} and {self.name}"
            )
        up, *inner = pathlib.PurePath(said).parts or ("",)
        if not all(archives.is_plain(part) for part in ([up] if up != ".." else []) + inner):
            raise UserError(
                f"{self.path / 'config.json'} says vae {said!r:.100}; its tokenizer's "
                "fixture must lie beside this one: ../NAME/config.json"
            )
        place = (self.path / said).parent
        if not (place / "case.npz").is_file():
            raise UserError(
                f"the fixture {self.path} needs its tokenizer's ({name}) at {place}; there is "
                "none: copy that folder to this place, too"
            )
        return Folder(place, name, self.unknown)

    def file(self) -> pathlib.Path:
        """Its only weight file."""
        found = sorted(
            f
            for f in self.path.iterdir()
            if f.is_file() and f.suffix not in (".npz", ".json", ".md")
        )
        if len(found) != 1:
            names = ", ".join(f.name for f in found) or "none"
            raise UserError(f"the fixture {self.path} needs one weight file; found {names}")
        return found[0]

    def weights(self) -> dict[str, np.ndarray]:
        """The arrays of its weight file, or those that `salt` and `keys` of its config describe."""
        if "salt" not in self.config or "keys" not in self.config:
            return entries.weights(self.file(), self.system, unknown=self.unknown)
        try:
            records.checked(self.config, salt=str, keys=dict)
            values = (
                records.checked(self.config, values=dict)["values"]
                if "values" in self.config
                else {}
            )
            sizes = [math.prod(map(operator.index, s)) for s in self.config["keys"].values()]
            if (
                any(min(s, default=0) < 0 for s in self.config["keys"].values())
                or sum(sizes) > MOST
            ):
                raise ValueError(f"its keys must be shapes of at most {MOST} numbers in all")
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path / 'config.json'} describes no weights: {error}") from error
        return {
            key: np.asarray(values[key])
            if key in values
            else drawn(self.config["salt"], key, shape)
            for key, shape in self.config["keys"].items()
        }

    def imported(self) -> transfer.Imported:
        """Our model of its weights and config."""
        return transfer.fit(self.weights(), self.name, self.config, source=str(self.path))

    def module(self):
        """Our model with the weights that the outputs were made with: averages where there are."""
        return self.imported().used


def gradients(
    module: nnx.Module, loss: Callable[[nnx.Module], tuple[Any, Any]], rows: Iterable[keymap.Row]
) -> tuple[jax.Array, Any, dict[str, np.ndarray]]:
    """(loss, its scalars, gradients by published key) of `loss(module)` -> (loss, scalars)."""
    rows = list(rows)
    graph, params, stats = parameters.split(module)

    @jax.jit
    def differentiate(params, stats):
        def scalar(params):
            return loss(parameters.merge(graph, params, stats))

        return jax.value_and_grad(scalar, has_aux=True)(params)

    (value, scalars), found = jax.device_get(differentiate(params, stats))
    slopes = {path: np.asarray(leaf, np.float64) for path, leaf in parameters.paths(found).items()}
    return value, scalars, keymap.gradients(rows, slopes, keymap.publish(module, rows))


def grad_norms(
    gradients: dict[str, np.ndarray], names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """(l2 norms of the gradients of the published arrays `names`, norm over all of them)."""
    missing = sorted(set(names) - set(gradients))
    if missing:
        raise UserError(f"there is no gradient of {', '.join(missing)}: is --system right?")
    norms = {key: np.linalg.norm(array) for key, array in gradients.items()}
    return np.array([norms[name] for name in names]), np.sqrt(sum(n**2 for n in norms.values()))


def there(gradients: dict[str, np.ndarray], names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that the model has: a fixture of one layer lacks the second one's."""
    return tuple(name for name in names if name in gradients)


def drawn(salt: str, key: str, shape: Sequence[int]) -> np.ndarray:
    """A weight that a fixture describes and does not store: equal numbers on every machine."""
    random = np.random.default_rng(zlib.crc32((salt + key).encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_var"):
        return (0.5 + random.random(shape)).astype(np.float32)
    value = random.standard_normal(shape)
    if key.endswith(("bias", "running_mean")):
        value = 0.1 * value
    elif len(shape) == 1:
        value = 1 + 0.1 * value  # the scale of a norm
    elif shape:
        value = value * np.sqrt(2 / np.prod(shape[1:]))
    return value.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Line:
    """What was found of one array."""

    name: str
    absolute: float | None
    relative: float | None
    tolerance: float | None
    verdict: str
    note: str = ""


def tolerance(name: str, dtype: np.dtype) -> float:
    """Relative to the array's largest magnitude; 0 for integers and truth values."""
    if not np.issubdtype(dtype, np.floating):
        return 0.0
    return LOOSE if "grad" in name or "entropy" in name or name == "q_quantizer_loss" else TOLERANCE


def compare(name: str, wanted: np.ndarray, found: np.ndarray) -> Line:
    """One array: the largest difference, absolute and in parts of the largest magnitude."""
    found, limit = np.asarray(found), tolerance(name, wanted.dtype)
    if found.shape != wanted.shape:
        return Line(name, None, None, limit, "fail", f"shape {found.shape}, not {wanted.shape}")
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    absolute = float(np.max(np.abs(a - b), initial=0.0))
    scale = float(np.max(np.abs(a), initial=0.0))
    relative = absolute / scale if scale else absolute
    close = relative <= limit or absolute <= ABSOLUTE.get(name, 0.0)
    verdict = "pass" if np.isfinite(b).all() and close else "fail"
    return Line(name, absolute, relative, limit, verdict)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A fixture held against our model: a line per array, and what our model computed."""

    folder: Folder
    lines: tuple[Line, ...]
    computed: dict[str, np.ndarray]

    @property
    def counts(self) -> dict[str, int]:
        """How many arrays have each verdict; those without any are left out."""
        counts = collections.Counter(line.verdict for line in self.lines)
        return {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}

    @property
    def passed(self) -> bool:
        """Whether every array that is no input was computed, and as published."""
        return not {"fail", "uncovered"} & set(self.counts)


def compare_fixture(
    path: str | os.PathLike,
    system: str = "",
    *,
    unknown: str = "refuse",
    arrays: str | os.PathLike = "",
    overwrite: bool = False,
) -> Comparison:
    """Hold the fixture folder at `path` against our model; `system` is by default its name.

    `unknown` is the reader's: what is to be done about objects of unknown classes. `arrays` is an
    .npz file that what our model computed is written to; `overwrite` replaces an earlier one.

    Raises:
        UserError: the folder is no fixture, or not of this system.
    """
    place = contextlib.nullcontext()
    if arrays:
        there = sorted(pathlib.Path(path).glob("*"))
        inputs = [file for file in there if file.suffix != ".npz" or file.name == "case.npz"]
        place = output.file(arrays, option="--arrays", overwrite=overwrite, inputs=inputs)
    with place as file:
        runtime.check_platform()
        folder = Folder(path, system, unknown)
        lines, computed = hold(folder)
        if file is not None:
            with open(file, "wb") as opened:
                np.savez_compressed(opened, **computed)
    return Comparison(folder, tuple(lines), computed)


def hold(folder: Folder) -> tuple[list[Line], dict[str, np.ndarray]]:
    """(a line per array of the fixture, what our model computed, by the names of these)."""
    # accelerators multiply float32 in TF32 or bfloat16 unless told otherwise
    with jax.default_matmul_precision("highest"):
        computed = jax.device_get(folder.system.parity(folder))
    unknown = sorted(set(computed) - set(folder.arrays))
    if unknown:
        raise UserError(f"the fixture {folder.path} lacks the arrays {', '.join(unknown)}")
    lines = []
    for name, wanted in folder.arrays.items():
        if name in computed:
            lines.append(compare(name, wanted, computed[name]))
        elif name in folder.inputs or name.endswith(("margin", "margins")):
            lines.append(Line(name, None, None, None, "given"))
        else:
            lines.append(Line(name, None, None, None, "uncovered"))
    return lines, {
        name: np.asarray(array).astype(folder.arrays[name].dtype)
        for name, array in computed.items()
    }
