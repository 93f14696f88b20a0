"""How undecided single latents are, and how evenly a batch uses the codes: entropies in nats.

Training lowers the first and raises the second (arXiv:2310.05737); a config weighs each. Means are
over the whole batch, on however many devices it lies.

Published code guards its logarithms in two ways, which training at a low temperature can feel:
"shifted" takes log(p + 1e-5) (MaskGIT, LlamaGen, Open-MAGVIT2, IBQ), "clamped" takes
log(max(p, 1e-5)) (MaskBit).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import choices
from tokgen.interfaces import UserError

FORMS = ("shifted", "clamped")
GUARD = 1e-5


def check(form: str) -> None:
    """Refuse what no published loss is."""
    if form not in FORMS:
        raise UserError(choices.refusal(FORMS, form, "entropy"))


def of_affinities(affinities: jax.Array, temperature: float, form: str) -> dict[str, jax.Array]:
    """`sample_entropy` and `batch_entropy` of softmax(affinities / temperature) over V."""
    scaled = affinities / temperature
    chances = jax.nn.softmax(scaled)
    return _entropies(chances, chances, scaled, form)


def of_choices(affinities: jax.Array, temperature: float, form: str) -> dict[str, jax.Array]:
    """As `of_affinities` with the likeliest code as target, the "argmax" form of MaskGIT.

    The gradient of a target is that of its softmax.
    """
    scaled = affinities / temperature
    chances = jax.nn.softmax(scaled)
    chosen = jax.nn.one_hot(jnp.argmax(scaled, -1), scaled.shape[-1], dtype=scaled.dtype)
    return _entropies(chosen + (chances - jax.lax.stop_gradient(chances)), chances, scaled, form)


def of_bits(log_odds_BPC: jax.Array, form: str) -> dict[str, jax.Array]:
    """`sample_entropy` and `batch_entropy` over all 2^C codes of C independent bits.

    No code is written down per latent.

    A code's chance is the product of its bits' chances, so the sample entropy is the sum over bits
    (its logarithms need no guard). The batch's chances do not factorise, but are one product of
    two halves: mean_n p(n, a) p(n, b), a matrix of 2^(C / 2) rows.
    """
    C = log_odds_BPC.shape[-1]
    likely, unlikely = jax.nn.log_sigmoid(log_odds_BPC), jax.nn.log_sigmoid(-log_odds_BPC)
    bits_BPC = -(jnp.exp(likely) * likely + jnp.exp(unlikely) * unlikely)
    log_odds_nC = log_odds_BPC.reshape(-1, C)
    low_na, high_nb = _chances(log_odds_nC[:, : C // 2]), _chances(log_odds_nC[:, C // 2 :])
    batch_ab = highest("na,nb->ab", low_na, high_nb) / len(log_odds_nC)
    return {
        "sample_entropy": jnp.mean(jnp.sum(bits_BPC, -1)),
        "batch_entropy": -jnp.sum(batch_ab * _log(batch_ab, form)),
    }


def signs(bits: int) -> np.ndarray:
    """All codes [2^bits, bits] of -1 and 1; channel 0 is the least significant bit."""
    return (np.arange(2**bits)[:, None] >> np.arange(bits) & 1) * 2.0 - 1.0


def _chances(log_odds_nC: jax.Array) -> jax.Array:
    """[n, 2^C]: what C bits make of each of their codes."""
    codes_VC = jnp.asarray(signs(log_odds_nC.shape[-1]), log_odds_nC.dtype)
    return jax.nn.softmax(highest("nC,VC->nV", log_odds_nC / 2, codes_VC))


def _entropies(
    targets: jax.Array, chances: jax.Array, scaled: jax.Array, form: str
) -> dict[str, jax.Array]:
    if form == "shifted":  # by a constant, which a softmax does not see
        logs = jax.nn.log_softmax(scaled + GUARD)
    else:
        logs = _log(chances, form)
    batch_V = jnp.mean(targets, axis=tuple(range(targets.ndim - 1)))
    return {
        "sample_entropy": -jnp.mean(jnp.sum(targets * logs, -1)),
        "batch_entropy": -jnp.sum(batch_V * _log(batch_V, form)),
    }


def _log(chances: jax.Array, form: str) -> jax.Array:
    return jnp.log(chances + GUARD if form == "shifted" else jnp.maximum(chances, GUARD))


def highest(formula: str, *operands: jax.Array) -> jax.Array:
    """A product in float32 all through, for distances and chances."""
    # accelerators multiply float32 in TF32 or bfloat16 unless told otherwise
    return jnp.einsum(formula, *operands, precision=jax.lax.Precision.HIGHEST)
