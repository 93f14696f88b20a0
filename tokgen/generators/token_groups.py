"""Training on square groups of tokens (NPP, arXiv:2412.15321): each predicts all of the next.

A group is read as the mean of its tokens' vectors; its output is one distribution, that of every
token of the next group. The autoregressive generator trains so up to a step, then on tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tokgen.interfaces import TokenBatch, TokenLayout, UserError
from tokgen.nn import positions

Groups = tuple[tuple[int, int], ...]  # (side, last step) of each kind of groups, in their order


def check(groups: Groups, layout: TokenLayout, positions: str) -> None:
    """UserError where a layout cannot be cut into these groups, or positions do not fit them."""
    if not groups:
        return
    grids, sides = layout.grids, [side for side, _ in groups]
    fits = len(grids) == 1 and all(n % side == 0 for n in grids[0] for side in sides)
    if not fits or positions != "rotary" or layout.groups != 1:
        raise UserError(
            "groups of tokens need rotary positions and one grid of single symbols that their "
            f"sides divide; found positions={positions!r}, {layout}, sides {sides}"
        )
    ends = [end for _, end in groups]
    if ends != sorted(set(ends)):
        raise UserError(f"groups are in the order of their last steps; found {groups}")


def loss(
    generator: nnx.Module, side: int, batch: TokenBatch, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(mean nats per position, share of likeliest tokens that are right) of an autoregressive
    generator on groups of `side` x `side` tokens."""
    ((rows, columns),) = generator.layout.grids
    coarse = TokenLayout(generator.layout.vocab, ((rows // side, columns // side),))

    def gathered(x_BL_):
        """[B, L, ...] -> [B, groups, side^2, ...]."""
        rest = x_BL_.shape[2:]
        x = x_BL_.reshape(-1, rows // side, side, columns // side, side, *rest)
        return x.swapaxes(2, 3).reshape(-1, coarse.length, side * side, *rest)

    inputs_BlD = gathered(generator.embeddings(batch.tokens_BLG)).mean(2)[:, :-1]
    order_Bl = jnp.broadcast_to(jnp.arange(coarse.length), (len(inputs_BlD), coarse.length))
    width, precision = inputs_BlD.shape[-1], generator.transformer.precision
    coarsely = positions.Rotary2D(
        coarse,
        generator.conditioning.slots,
        width,
        generator.transformer.heads,
        precision=precision,
        rngs=None,
    )
    hidden_BlD, cond = generator.taught(inputs_BlD, order_Bl, batch.cond, coarsely, key)
    targets_BlPG = gathered(batch.tokens_BLG)
    logits_Bl1GV = generator.ended(hidden_BlD, cond, targets_BlPG[:, :, 0, :-1])[:, :, None]
    logits_BlPGV = jnp.broadcast_to(logits_Bl1GV, (*targets_BlPG.shape, generator.layout.absent))
    nats = optax.softmax_cross_entropy_with_integer_labels(logits_BlPGV, targets_BlPG)
    return nats.sum(-1).mean(), (logits_BlPGV.argmax(-1) == targets_BlPG).mean()
