"""The dtypes of parameters and of compute, and which of them suits the devices that are here."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import report
from tokgen.interfaces import UserError


@dataclasses.dataclass(frozen=True)
class Precision:
    """Parameters live in `params`, matrix products run in `compute`.

    Always float32 whatever it says: quantization distances, softmax, norm statistics, logits,
    losses, optimizer moments, EMA. Each of these casts once, on the line where it matters.
    """

    params: str = "float32"
    compute: str = "bfloat16"

    def __post_init__(self):
        for name in (self.params, self.compute):
            if name not in ("float32", "bfloat16"):
                raise UserError(f"precision must be float32 or bfloat16; found {name!r}")

    @property
    def params_dtype(self) -> np.dtype:
        """dtype in which parameters are created and stored."""
        return jnp.dtype(self.params)

    @property
    def compute_dtype(self) -> np.dtype:
        """dtype of activations and of the operands of matrix products."""
        return jnp.dtype(self.compute)


FLOAT32 = Precision("float32", "float32")


def has_bfloat16(device: jax.Device) -> bool:
    """Whether a device multiplies bfloat16 sooner than float32: NVIDIA's GPUs do from Ampere on.

    Before, as on a T4 (7.5), XLA computes in float32 all the same, and converts at every step.
    """
    capability = str(getattr(device, "compute_capability", ""))
    number = re.fullmatch(r"(\d+)\.\d+", capability)  # AMD's are words, as gfx90a
    return device.platform != "gpu" or number is None or int(number[1]) >= 8


def fitting(compute: str) -> str:
    """What suits these devices of what a checkpoint or a preset says; a departure is said."""
    lacking = _lacking() if compute == "bfloat16" else ""
    if not lacking:
        return compute
    _say(f"{lacking} has no bfloat16 units: networks compute in float32")
    return "float32"


def asked(compute: str) -> str:
    """What a user, or the config of a run, asks for: it stands, with a word where it is slow."""
    lacking = _lacking() if compute == "bfloat16" else ""
    if lacking:
        _say(
            f"{lacking} has no bfloat16 units: bfloat16, as it is asked for, is slower there than "
            "float32, and saves memory alone"
        )
    return compute


def _lacking() -> str:
    """What a device of this process without bfloat16 units is called; "" where all have them."""
    found = (device for device in jax.local_devices() if not has_bfloat16(device))
    return next((device.device_kind for device in found), "")


@functools.cache
def _say(text: str) -> None:
    """Once, however many networks are loaded."""
    report.say(text)
