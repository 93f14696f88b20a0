"""Published arrays into frozen networks: files, names, axis orders, and one clear error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import archives, interfaces

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
Weights = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a published array belongs; `shape` is the published one where only that differs."""

    owner: nnx.Module
    name: str
    shape: tuple[int, ...] = ()

    def needed(self) -> tuple[int, ...]:
        """The shape in the file: PyTorch writes (out, in) and (out, in, height, width)."""
        shape = getattr(self.owner, self.name).shape
        match len(shape):
            case 4:
                return (shape[3], shape[2], shape[0], shape[1])
            case 2:
                return (shape[1], shape[0])
        return self.shape or shape

    def put(self, array: np.ndarray):
        """Fill it, in float32."""
        variable = getattr(self.owner, self.name)
        match variable.ndim:
            case 4:
                array = array.transpose(2, 3, 1, 0)
            case 2:
                array = array.T
        array = jnp.asarray(array.reshape(variable.shape), jnp.float32)
        setattr(self.owner, self.name, type(variable)(array))


def affine(key: str, owner: nnx.Module, weight: str = "kernel") -> dict[str, Slot]:
    """Slots of `key.weight` and, where the module has one, `key.bias`."""
    slots = {f"{key}.weight": Slot(owner, weight)}
    return slots if owner.bias is None else slots | {f"{key}.bias": Slot(owner, "bias")}


def fill(slots: Mapping[str, Slot], weights: Weights, *, what: str, source: str):
    """Fill all slots; arrays missing, left over or of another shape are listed in one error."""
    check({key: slot.needed() for key, slot in slots.items()}, weights, what=what, source=source)
    for key, slot in slots.items():
        slot.put(weights[key])


def check(needed: Mapping[str, tuple[int, ...]], weights: Weights, *, what: str, source: str):
    """Nothing, or the error that lists what does not fit and says where the file comes from."""
    problems = []
    missing = [key for key in needed if key not in weights]
    leftover = [key for key in weights if key not in needed]
    if missing:
        problems.append(f"missing: {', '.join(missing)}")
    if leftover:
        problems.append(f"left over: {', '.join(leftover)}")
    for key, shape in needed.items():
        if key in weights and weights[key].shape != shape:
            problems.append(f"{key} must have the shape {shape}, has {weights[key].shape}")
    if problems:
        raise interfaces.UserError(f"weights for {what}: {'; '.join(problems)}. {source}")
    archives.check_numbers({key: weights[key] for key in needed}, f"the weight file of {what}")


def gather(paths: Sequence[str], read: Callable[[str], Weights], *, source: str) -> Weights:
    """The arrays of all files at `paths`; a folder stands for the weight files in it."""
    weights = {}
    for path in map(Path, paths):
        if not path.exists():
            raise interfaces.UserError(f"no weight file at {path}. {source}")
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not found:
            raise interfaces.UserError(
                f"no weight file ({', '.join(SUFFIXES)}) in the folder {path}. {source}"
            )
        for file in found:
            weights.update(read(str(file)))
    return weights
