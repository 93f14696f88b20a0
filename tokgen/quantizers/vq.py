"""Vector quantization: the nearest row of a learned codebook (arXiv:1711.00937).

With `normalize`, latents and rows lie on the unit sphere (arXiv:2110.04627; LlamaGen uses 8
channels). The codebook follows its gradient, or the moving average of the latents that chose each
row (appendix A.1 of arXiv:1711.00937). Rows that nobody chooses are revived from the batch: drawn
at random, or pulled to the nearest latent in proportion to their disuse (arXiv:2307.15139).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import choices, ranges
from tokgen.interfaces import Quantized, Statistic, TokenLayout, UserError
from tokgen.nn import norms
from tokgen.quantizers import entropy as entropies

UPDATES = ("gradient", "ema", "frozen")
REVIVALS = ("random", "clustering", "none")


class Quantizer(nnx.Module):
    """`codes` rows of `channels` numbers.

    Args:
        match: what a latent chooses a row by: "distance", or "angle", which compares unit vectors
            where `normalize` also decodes to them.
        update: how rows move: "gradient" (losses `codebook` and `commitment`), "ema" (loss
            `commitment`), or "frozen".
        decay: of the moving averages of usage and, with "ema", of the rows.
        revive: a row is replaced by a latent of the batch when its share of the tokens falls
            below `revive / codes`; 0 never. All rows count as dead before the first step, which
            makes it an initialisation from data.
        revival: "random" as above; "clustering" pulls every row to the latent nearest to it by
            exp(-10 usage codes / (1 - decay) - 0.001), whatever `revive` is; "none".
        init: of the rows: "sphere", "uniform" (+-1/codes), "normal", or "fan_in"
            (+-sqrt(3/codes), MaskGIT).
        temperature: of the entropies; 0 computes none. Published: 0.01.
        entropy: the form of their logarithms, see `entropy.py`.
    """

    @ranges.checked
    def __init__(
        self,
        codes: ranges.Codes,
        channels: ranges.Width,
        *,
        grid: tuple[int, int],
        normalize: bool = True,
        match: str = "distance",
        update: str = "gradient",
        decay: ranges.Rate = 0.99,
        revive: ranges.Rate = 0.05,
        revival: str = "random",
        init: str = "sphere",
        temperature: ranges.Amount = 0.0,
        entropy: str = "shifted",
        rngs: nnx.Rngs,
    ):
        words = dict(match=match, update=update, revival=revival, init=init)
        for name, known in CHOICES.items():
            if words[name] not in known:
                raise UserError(choices.refusal(known, words[name], f"quantizer.{name}"))
        entropies.check(entropy)
        self.layout = TokenLayout((codes,), (grid,))
        self.codes, self.normalize, self.match = codes, normalize, match
        self.inputs = self.channels = channels
        self.update, self.decay, self.revive, self.revival = update, decay, revive, revival
        self.temperature, self.entropy = temperature, entropy
        rows_VC = STARTS[init](rngs.params(), (codes, channels))
        kind = nnx.Param if update == "gradient" else Statistic
        self.codebook = kind(rows_VC)
        self.counts = Statistic(jnp.zeros(codes))  # share of the tokens, as a moving average
        # None and not an empty array, which Orbax refuses to save
        self.sums = Statistic(jnp.zeros((codes, channels))) if update == "ema" else None

    def rows(self) -> jax.Array:
        """The codebook [V, C] as it is compared and decoded."""
        rows_VC = self.codebook[...].astype(jnp.float32)
        return norms.unit(rows_VC) if self.normalize else rows_VC

    def __call__(self, latents_BPC: jax.Array, *, key: jax.Array | None = None) -> Quantized:
        """Training path: straight-through latents, tokens, losses."""
        del key
        latents_BPC, rows_VC = self._latents(latents_BPC), self.rows()
        distances_BPV = self._distances(latents_BPC)
        tokens_BLG = jnp.argmin(distances_BPV, axis=-1)[..., None]
        codes_BPC = rows_VC[tokens_BLG[..., 0]]
        fixed_BPC = jax.lax.stop_gradient(codes_BPC)
        losses = {"commitment": jnp.mean((fixed_BPC - latents_BPC) ** 2)}
        if self.update == "gradient":
            losses["codebook"] = jnp.mean((codes_BPC - jax.lax.stop_gradient(latents_BPC)) ** 2)
        if self.temperature > 0:
            losses |= entropies.of_affinities(-distances_BPV, self.temperature, self.entropy)
        straight_BPC = latents_BPC + jax.lax.stop_gradient(codes_BPC - latents_BPC)
        return Quantized(straight_BPC, tokens_BLG, losses)

    def encode(self, latents_BPC: jax.Array) -> jax.Array:
        """[B, P, C] -> tokens [B, P, 1]."""
        return jnp.argmin(self._distances(self._latents(latents_BPC)), axis=-1)[..., None]

    def decode(self, tokens_BLG: jax.Array) -> jax.Array:
        """Tokens [B, P, 1] -> rows [B, P, C]."""
        return self.rows()[tokens_BLG[..., 0]]

    def maintain(self, latents_BPC: jax.Array, *, key: jax.Array) -> None:
        """After an optimizer step: count, move the averages, revive dead rows.

        The only place where a quantizer changes its variables.
        """
        raw_nC = latents_BPC.astype(jnp.float32).reshape(-1, self.channels)
        latents_nC = self._latents(raw_nC)
        distances_nV = self._distances(latents_nC)
        tokens_n = jnp.argmin(distances_nV, axis=-1)
        share_V = jnp.bincount(tokens_n, length=self.codes) / len(tokens_n)
        counts_V = self.decay * self.counts[...] + (1 - self.decay) * share_V
        rows_VC, sums_VC = self.codebook[...].astype(jnp.float32), None
        if self.update == "ema":
            rows_VC, sums_VC = self._averaged(latents_nC, tokens_n, counts_V)
        if self.update != "frozen" and self.revival == "clustering":
            # the distances lack |z|^2, which a comparison of latents needs
            squares_n1 = jnp.sum(MATCHES[self.match](latents_nC) ** 2, -1, keepdims=True)
            near_V = jnp.argmin(distances_nV + squares_n1, axis=0)
            pull_V = jnp.exp(-counts_V * self.codes * 10 / (1 - self.decay) - 1e-3)
            rows_VC += pull_V[:, None] * (raw_nC[near_V] - rows_VC)
            if self.update == "ema":
                sums_VC = rows_VC * counts_V[:, None]
        elif self.update != "frozen" and self.revival == "random" and self.revive > 0:
            # at first also the row that all latents chose: it began at random like the others
            first = jnp.all(self.counts[...] == 0)
            dead_V = first | (counts_V < self.revive / self.codes)
            picks_V = jax.random.choice(key, len(latents_nC), (self.codes,))
            rows_VC = jnp.where(dead_V[:, None], latents_nC[picks_V], rows_VC)
            counts_V = jnp.where(dead_V, 1 / self.codes, counts_V)
            if self.update == "ema":
                # else the next average would put the row back where it was
                sums_VC = jnp.where(dead_V[:, None], rows_VC / self.codes, sums_VC)
        self.counts.set_value(counts_V)
        if self.update == "ema":
            self.sums.set_value(sums_VC)
        if self.update != "frozen":
            self.codebook.set_value(rows_VC.astype(self.codebook[...].dtype))

    def _averaged(
        self, latents_nC: jax.Array, tokens_n: jax.Array, counts_V: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(rows that are the means of their latents, sums of the latents), as moving averages."""
        # a product with one-hot rows and not a scatter: float scatters have no fixed order on GPUs
        chosen_nV = jax.nn.one_hot(tokens_n, self.codes, dtype=jnp.float32)
        fresh_VC = entropies.highest("nV,nC->VC", chosen_nV, latents_nC) / len(latents_nC)
        sums_VC = self.decay * self.sums[...] + (1 - self.decay) * fresh_VC
        means_VC = sums_VC / jnp.maximum(counts_V, 1e-12)[:, None]
        rows_VC = jnp.where(counts_V[:, None] > 1e-12, means_VC, self.codebook[...])
        return rows_VC, sums_VC

    def _latents(self, latents_BPC: jax.Array) -> jax.Array:
        # float32: in bfloat16 near neighbours are equally far
        latents_BPC = latents_BPC.astype(jnp.float32)
        return norms.unit(latents_BPC) if self.normalize else latents_BPC

    def _distances(self, latents_BPC: jax.Array) -> jax.Array:
        """[..., V] squared distances less |z|^2, which no choice or softmax among rows sees."""
        seen = MATCHES[self.match]
        latents_BPC, rows_VC = seen(latents_BPC), seen(self.rows())
        products = entropies.highest("...C,VC->...V", latents_BPC, rows_VC)
        squares_V = jnp.sum(rows_VC * rows_VC, axis=-1)
        return squares_V.reshape((1,) * (products.ndim - 1) + (-1,)) - 2 * products


def _sphere(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return norms.unit(jax.random.normal(key, shape))


def _uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1 / shape[0], maxval=1 / shape[0])


def _fan_in(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    bound = (3 / shape[0]) ** 0.5  # variance 1 / codes: Flax takes the first axis for the fan
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


STARTS = {
    "sphere": _sphere,
    "uniform": _uniform,
    "normal": jax.random.normal,
    "fan_in": _fan_in,
}

MATCHES = {"distance": lambda x: x, "angle": norms.unit}
CHOICES = {"match": MATCHES, "update": UPDATES, "revival": REVIVALS, "init": STARTS}
