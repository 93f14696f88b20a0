"""Which slots a slot sees, told as a rule: what fuses attention must know what it can leave out.

A rule is of all slots of a sequence; where some of them are computed, as with a cache, a mask is an
array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Blocks:
    """A slot sees its own block of slots and those before it; of padding, it sees itself alone.

    Args:
        sizes: slots of each block, in order.
        valid_BL: false where a slot is padding; None: nowhere.
    """

    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    valid_BL: jax.Array | None = None

    @property
    def length(self) -> int:
        """Slots in all."""
        return sum(self.sizes)

    @property
    def causal(self) -> bool:
        """Whether a slot sees itself and the slots before it."""
        return self.length == len(self.sizes)

    def numbers(self) -> np.ndarray:
        """[L] the block of every slot."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def written(self) -> jax.Array:
        """[B or 1, 1, L, L]: true where the slot of a row sees that of a column."""
        numbers_L = jnp.asarray(self.numbers())
        seen_11LL = (numbers_L[None, :] <= numbers_L[:, None])[None, None]
        if self.valid_BL is None:
            return seen_11LL
        own_11LL = jnp.eye(self.length, dtype=bool)[None, None]
        return seen_11LL & (self.valid_BL[:, None, None] | own_11LL)


def causal(length: int, valid_BL: jax.Array | None = None) -> Blocks:
    """A slot sees itself and the slots before it, but for those that are padding."""
    return Blocks((1,) * length, valid_BL)
