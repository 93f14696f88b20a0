"""The dtypes of parameters and of compute."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

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
