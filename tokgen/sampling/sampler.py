"""Temperature, top-k, top-p and the draw, without sorting.

In the order of LlamaGen's sampler (arXiv:2406.06525), with guidance merged before: temperature,
top-k, top-p, draw. Both filters are the question for a threshold: the largest value such that
what is at least as large still weighs enough, where top-k weighs tokens and top-p weighs
probability (the nucleus of arXiv:1904.09751). It is answered by bisecting the bits of float32,
32 halvings and exact, at the cost of one pass over the logits each, by a CPU in its cache; the draw
inverts the cumulative distribution at one uniform number per image, position and symbol. Beside its
token a draw has a confidence, for generators that keep the surest.

Ties stay together. Every token as large as the k-th is kept, as in LlamaGen and VAR, and every
token as likely as the one that reaches p. So a filter never asks in which order tokens stand.
Where one token is asked for there is nothing to draw: temperature 0, top-k 1 and a p that the
likeliest of V tokens always reaches alone (1 / V) are one program, the first of the largest.

A program of another batch size rounds logits otherwise, and a draw near a tie may then fall
otherwise. Such draws are flagged, `Drawn.near_B`: the uniform lies next to a boundary of the
cumulative distribution, nearer than rounding may move it and than the mass that rounding may bring
over a filter's threshold; or the two largest of which one is asked for are as good as equal.

Guidance makes errors larger. Where w c - (w - 1) u is drawn from and c and u err by d each, it
errs by (|w| + |w - 1|) d, and a temperature t divides that. Where every logit errs by at most e, a
boundary of the cumulative distribution at F moves by at most 2 F (1 - F) e: at worst what is below
it gains a factor exp(e), and what is above loses one. A confidence moves by at most e where it is a
logit, and by 2 (1 - p) e where it is the logarithm of the probability p: d ln p is what the token's
own logit errs by, less the mean over all of them, of which its own share p cancels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tokgen import interfaces, rng, sharding
from tokgen.sampling import settings

SETTINGS = ("temperature", "top_k", "top_p", "guidance", "jitter", "confidence_temperature")
# What rounding is trusted to stay below. Of a uniform: float32 sums of masses err by some 1e-7 of
# their total, and logits that err by 1e-6 move a boundary by at most 2.5e-7 of it for each that
# errs one way. Of logits: float32 products of a few hundred numbers err by some 1e-6.
# Both are for logits as a network gives them: guided ones err `Sampler.error` times as much.
NEAR, NEAR_LOGITS = 1e-6, 1e-5
CACHED = 2**17  # bytes of logits that are filtered at a time where a core has a cache of its own


def log_probability(
    logits_BlGV: interfaces.Array, tokens_BlG: interfaces.Array
) -> interfaces.Array:
    """[B, l, G] log-probability of tokens under the logits as given: no temperature, no filter."""
    # the peak goes first: beside guided logits near 100 a logsumexp resolves 8e-6 only
    return raw_logit(jax.nn.log_softmax(logits_BlGV, axis=-1), tokens_BlG)


def raw_logit(logits_BlGV: interfaces.Array, tokens_BlG: interfaces.Array) -> interfaces.Array:
    """[B, l, G] logits of tokens, not normalised: what TiTok and MaskGen rank by."""
    return jnp.take_along_axis(logits_BlGV, tokens_BlG[..., None], axis=-1)[..., 0]


RANKINGS = {"log_probability": log_probability, "raw_logit": raw_logit}  # what a preset may name


def per_image_uniform(
    keys_B: interfaces.Array,
    step: interfaces.Array | int,
    symbol: int,
    shape: tuple[int, int, int],
) -> interfaces.Array:
    """[B, l, G] uniforms in [0, 1), each from its image's key, step, place in the step and symbol.

    `symbol` is the first of the G symbols: drawn in turn or at once, they see the same numbers.
    """
    return _uniform(keys_B, rng.DRAW, step, symbol, shape)


def per_image_gumbel(
    keys_B: interfaces.Array,
    step: interfaces.Array | int,
    symbol: int,
    shape: tuple[int, int, int],
) -> interfaces.Array:
    """[B, l, G] draws of Gumbel(0, 1), as `per_image_uniform` and independent of it."""
    uniform_BlG = _uniform(keys_B, rng.JITTER, step, symbol, shape)
    # one uniform in eight million is 0; the bound is TiTok's. The largest is 1 - 2^-23
    return -jnp.log(-jnp.log(jnp.maximum(uniform_BlG, 1e-20)))


ALIKE = 256  # places, up to a multiple of which numbers are made


def _uniform(
    keys_B: interfaces.Array,
    use: int,
    step: interfaces.Array | int,
    symbol: int,
    shape: tuple[int, int, int],
) -> interfaces.Array:
    _, places, groups = shape

    def one_image(key):
        key = rng.number(rng.use(key, use), step)
        symbols_G = symbol + jnp.arange(groups)
        keys_G = jax.vmap(lambda g: rng.number(key, g))(symbols_G)
        return jax.vmap(lambda k: jax.random.uniform(k, (made,)), out_axes=1)(keys_G)

    # numbers are counted by place (jax_threefry_partitionable): the first stay what they are, and
    # scales that ask for the same many share the kernels that make them
    made = -(-places // ALIKE) * ALIKE if places > 1 else places
    return jax.vmap(one_image)(keys_B)[:, :places]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a token is drawn from logits; static under jit.

    A setting is one number, or a tuple with one entry per decoding step; of temperature and
    guidance, an entry is one number or a tuple with one per symbol. A filter that a number turns
    off is not compiled.
    """

    temperature: float | tuple[float | tuple[float, ...], ...] = 1.0  # 0: first of the largest
    top_k: int | tuple[int, ...] = 0  # 0 keeps all, as does any number beyond the alphabet
    top_p: float | tuple[float, ...] = 1.0  # 1 keeps all
    guidance: tuple[float | tuple[float, ...], ...] = ()  # per step, or per step and symbol
    confidence: Callable = log_probability  # (logits_BlGV, tokens_BlG) -> confidence_BlG
    noise: Callable = per_image_uniform  # a value, so that a recorded draw can be replayed
    jitter: float | tuple[float, ...] = 0.0  # scale of the noise that is added to the confidence
    confidence_temperature: float | tuple[float, ...] = 1.0  # the draw does not see it
    gumbel: Callable = per_image_gumbel  # the confidence's noise, as `noise` is the draw's

    def __post_init__(self):
        for name in SETTINGS:
            object.__setattr__(self, name, settings.checked(name, getattr(self, name)))
        lengths = self._lengths()
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise interfaces.UserError(
                f"settings per step need one entry for every decoding step; found {found}; give "
                "one number where all steps are alike"
            )

    def _lengths(self) -> dict[str, int]:
        """Number of entries of the settings that have one per step."""
        entries = {name: getattr(self, name) for name in SETTINGS}
        return {name: len(e) for name, e in entries.items() if isinstance(e, tuple) and e}

    @property
    def steps(self) -> int | None:
        """Decoding steps that the settings are written for; None fits any number.

        For the driver to compare with its plan: a traced step beyond the last reads the last.
        """
        return next(iter(self._lengths().values()), None)

    def draw(
        self,
        logits_BlGV: interfaces.Array,
        *,
        keys_B: interfaces.Array,
        step: interfaces.Array | int,
        symbol: int = 0,
        wanted_BlG: interfaces.Array | None = None,
        toward_BlGV: interfaces.Array | None = None,
    ) -> interfaces.Drawn:
        """Tokens [B, l, G] and their confidence, float32 inside whatever the logits are.

        `step` may be traced, as in a scan. Logits of -inf are never drawn; where `invalid` is
        true a token is still in range, and means nothing. Where `wanted_BlG` is false no near tie
        counts. Of what the filters keep, draws go toward what makes `toward_BlGV` large.
        """
        chex.assert_rank(logits_BlGV, 4)
        chex.assert_shape(keys_B, logits_BlGV.shape[:1])
        logits_BlGV = logits_BlGV.astype(jnp.float32)
        temperature = settings.at_step(self.temperature, step)
        temperature = settings.of_symbols(temperature, symbol, logits_BlGV.shape[2])

        top_k, top_p = settings.at_step(self.top_k, step), settings.at_step(self.top_p, step)
        # Python numbers decide here, and what is traced in the program
        alone = (temperature == 0, top_k == 1, top_p * logits_BlGV.shape[-1] <= 1)

        error = self.error(step, symbol, logits_BlGV.shape[2])
        tokens_BlG, near_BlG = likeliest(logits_BlGV, error)
        owed_BlG = jnp.zeros(tokens_BlG.shape)
        if not any(one is True for one in alone):
            uniform_BlG = self.noise(keys_B, step, symbol, tokens_BlG.shape)
            chex.assert_shape(uniform_BlG, tokens_BlG.shape)
            options = dict(temperature=temperature, top_k=top_k, top_p=top_p, error=error)
            found = drawn(logits_BlGV, uniform_BlG, toward_BlGV, **options)
            greedy = functools.reduce(jnp.logical_or, map(jnp.asarray, alone))
            greedy_BlG = jnp.broadcast_to(greedy, tokens_BlG.shape)
            tokens_BlG = jnp.where(greedy_BlG, tokens_BlG, found[0])
            near_BlG = jnp.where(greedy_BlG, near_BlG, found[1])
            owed_BlG = jnp.where(greedy_BlG, owed_BlG, found[2])
        confidence_BlG, unsure_BlG = self._confidence(
            logits_BlGV, tokens_BlG, error, keys_B, step, symbol
        )
        near_BlG = near_BlG if wanted_BlG is None else near_BlG & wanted_BlG
        near_B = jnp.any(near_BlG, axis=(1, 2))
        return interfaces.Drawn(tokens_BlG, confidence_BlG, near_B, unsure_BlG, owed_BlG)

    def error(
        self, step: interfaces.Array | int, symbol: int, groups: int
    ) -> interfaces.Array | float:
        """How many times as much as a network's own logits the guided ones err, [1, 1, G] or one.

        |w| + |w - 1|, which is 1 where nothing is guided.
        """
        if not self.guidance:
            return 1.0
        weight = settings.of_symbols(settings.at_step(self.guidance, step), symbol, groups)
        return abs(weight) + abs(weight - 1)

    def _confidence(
        self,
        logits_BlGV: interfaces.Array,
        tokens_BlG: interfaces.Array,
        error: interfaces.Array | float,
        keys_B: interfaces.Array,
        step: interfaces.Array | int,
        symbol: int,
    ) -> tuple[interfaces.Array, interfaces.Array]:
        """(softened confidence [B, l, G] with Gumbel noise, by how much rounding may move it).

        The noise is MaskGIT's (arXiv:2202.04200, sec. 3.2).
        """
        softening = settings.at_step(self.confidence_temperature, step)
        if not (isinstance(softening, float) and softening == 1):
            logits_BlGV = logits_BlGV / softening
        confidence_BlG = self.confidence(logits_BlGV, tokens_BlG)
        # of a logarithm near 0 little may move, and all ties of sure tokens would else be near
        rest_BlG = jnp.ones(tokens_BlG.shape)
        if self.confidence is log_probability:
            rest_BlG = -2 * jnp.expm1(jnp.minimum(confidence_BlG, 0))
        unsure_BlG = NEAR + NEAR_LOGITS / 2 * error * rest_BlG / softening
        jitter = settings.at_step(self.jitter, step)
        if isinstance(jitter, float) and jitter == 0:
            return confidence_BlG, unsure_BlG
        gumbel_BlG = self.gumbel(keys_B, step, symbol, tokens_BlG.shape)
        chex.assert_shape(gumbel_BlG, tokens_BlG.shape)
        # so large a sum is rounded, too
        return confidence_BlG + jitter * gumbel_BlG, unsure_BlG + NEAR * jitter


def likeliest(
    logits_BlGV: interfaces.Array, error: interfaces.Array | float = 1.0
) -> tuple[interfaces.Array, interfaces.Array]:
    """([B, l, G] the first of the largest, int32; true where another is as good as equal).

    A token in range where a logit is no number. `error` broadcasts with [B, l, G], see
    `Sampler.error`.
    """
    symbols_BlGV, V = _symbols(logits_BlGV), logits_BlGV.shape[-1]
    peak_BlG1 = jnp.max(logits_BlGV, axis=-1, keepdims=True)
    # XLA's own argmax is a reduction of pairs, far slower on a CPU
    first_BlG = jnp.min(jnp.where(logits_BlGV == peak_BlG1, symbols_BlGV, V - 1), axis=-1)
    others_BlGV = jnp.where(symbols_BlGV == first_BlG[..., None], -jnp.inf, logits_BlGV)
    return first_BlG, peak_BlG1[..., 0] - jnp.max(others_BlGV, axis=-1) < NEAR_LOGITS * error


def drawn(
    logits_BlGV: interfaces.Array,
    uniform_BlG: interfaces.Array,
    toward_BlGV: interfaces.Array | None = None,
    *,
    temperature: interfaces.Array | float = 1.0,
    top_k: interfaces.Array | int = 0,
    top_p: interfaces.Array | float = 1.0,
    error: interfaces.Array | float = 1.0,
) -> tuple[interfaces.Array, interfaces.Array, interfaces.Array]:
    """([B, l, G] tokens of what the filters keep, true where one is near a tie, what is owed).

    Row by row; on a CPU, as many rows at a time as its cache holds, which the filters read some
    seventy times.
    """
    shape, over = uniform_BlG.shape, _devices(len(logits_BlGV))
    temperature_BlG, error_BlG = (
        jnp.broadcast_to(jnp.asarray(a, jnp.float32), shape) for a in (temperature, error)
    )
    rows = (uniform_BlG, temperature_BlG, error_BlG, logits_BlGV)
    rows = rows if toward_BlGV is None else (*rows, toward_BlGV.astype(jnp.float32))
    # every device has a row of its own, whose rows it takes in turn: none goes to another device
    rows = [a.reshape(over, -1, *a.shape[len(shape) :]) for a in rows]

    def some(uniform_NR, temperature_NR, error_NR, logits_NRV, toward_NRV=None):
        options = dict(temperature=temperature_NR, top_k=top_k, top_p=top_p, error=error_NR)
        mass_NRV, unsure_NR = filtered(logits_NRV, **options)
        gain_NRV = None if toward_NRV is None else _gain(mass_NRV, toward_NRV)
        mass_NRV = mass_NRV if gain_NRV is None else mass_NRV * gain_NRV
        tokens_NR, margin_NR = inverse_cdf(mass_NRV, uniform_NR)
        owed_NR = jnp.zeros(tokens_NR.shape)
        if gain_NRV is not None:
            owed_NR = -jnp.log(_taken(gain_NRV, tokens_NR[..., None])[..., 0])
            # what a filter may bring weighs as much more, and what is drawn toward errs as well
            unsure_NR = unsure_NR * jnp.max(gain_NRV, axis=-1)
            error_NR = 2 * error_NR
        moved_NR = _moved(uniform_NR, temperature_NR, error_NR)  # a boundary that is met is at it
        return tokens_NR, margin_NR < moved_NR + unsure_NR, owed_NR

    size = max(1, CACHED // (4 * logits_BlGV.shape[-1]))
    in_turn = functools.partial(_in_turn, some, size)
    if size >= rows[0].shape[1]:
        in_turn = some
    found = jax.lax.platform_dependent(*rows, cpu=in_turn, default=some)
    return tuple(array.reshape(shape) for array in found)


ASIDE = 0.1  # share of the draws toward something that do not look at it: what is owed is bounded


def _gain(mass_BlGV: interfaces.Array, toward_BlGV: interfaces.Array) -> interfaces.Array:
    """[B, l, G, V] how many times as likely a token becomes by what it is drawn toward."""
    gain_BlGV = jnp.exp(toward_BlGV - jnp.max(toward_BlGV, axis=-1, keepdims=True))
    total_BlG1 = jnp.sum(mass_BlGV, axis=-1, keepdims=True)
    mean_BlG1 = jnp.sum(mass_BlGV * gain_BlGV, axis=-1, keepdims=True) / total_BlG1
    # where all that suits was filtered out, nothing is drawn toward
    gain_BlGV = jnp.where(mean_BlG1 > 1e-30, gain_BlGV / jnp.maximum(mean_BlG1, 1e-30), 1.0)
    return ASIDE + (1 - ASIDE) * gain_BlGV


def _moved(
    share: interfaces.Array | float,
    temperature: interfaces.Array | float,
    error: interfaces.Array | float,
) -> interfaces.Array:
    """How far rounding may move a boundary at `share` of the mass: NEAR, or more of guided logits.

    2 F (1 - F) e as the head of this file has it, with e = 2 NEAR error / temperature.
    """
    error = error / jnp.where(temperature > 0, temperature, 1)
    return NEAR * jnp.maximum(1, 4 * share * (1 - share) * error)


def _in_turn(function: Callable, size: int, *rows: interfaces.Array) -> tuple:
    """`function` of arrays [N, R, ...], `size` rows of R at a time."""
    count = rows[0].shape[1]
    last = count - size  # where the last ones begin, some of which were done before

    def part(start):
        some = (jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in rows)
        return function(*some)

    starts = np.minimum(np.arange(0, count, size), last)
    found = jax.lax.map(part, jnp.asarray(starts))

    def joined(array_XNR):
        whole_NR = jnp.moveaxis(array_XNR[:-1], 0, 1).reshape(len(rows[0]), -1)
        return jnp.concatenate([whole_NR, array_XNR[-1][:, whole_NR.shape[1] - last :]], axis=1)

    return jax.tree.map(joined, found)


def _devices(images: int) -> int:
    """Over how many devices so many images lie evenly, of the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.manual_axes  # these are a device's own already
    over = 1 if alone else sharding.ways(mesh)
    return over if images % over == 0 else 1


def filtered(
    logits_BlGV: interfaces.Array,
    *,
    temperature: interfaces.Array | float = 1.0,
    top_k: interfaces.Array | int = 0,
    top_p: interfaces.Array | float = 1.0,
    error: interfaces.Array | float = 1.0,
) -> tuple[interfaces.Array, interfaces.Array]:
    """(masses [B, l, G, V], the share of their sum that rounding may bring or take [B, l, G]).

    A mass is a probability up to a factor: the likeliest has 1, what is filtered out 0.
    `temperature` and `error`, see `Sampler.error`, are numbers, or arrays that broadcast with
    [B, l, G]. A filter that a Python
    number turns off is not in the program. Thresholds are put to the logits and not to what
    temperature makes of them: the order is the same, and no two logits become a tie by rounding.
    """
    logits_BlGV = logits_BlGV.astype(jnp.float32)
    peak_BlG1 = jnp.max(logits_BlGV, axis=-1, keepdims=True)
    peak_BlG1 = jnp.where(jnp.isfinite(peak_BlG1), peak_BlG1, 0)  # -inf - -inf is no number
    # the peak goes first, else 3e38 at temperature 0.1 overflows; temperature 0 is the caller's
    scale = jnp.where(jnp.asarray(temperature) > 0, temperature, 1).astype(jnp.float32)
    scale = scale[..., None] if scale.ndim else scale
    mass_BlGV = jnp.exp((logits_BlGV - peak_BlG1) / scale)
    moved_BlG = jnp.zeros(logits_BlGV.shape[:-1])

    if not (isinstance(top_k, int) and (top_k == 0 or top_k >= logits_BlGV.shape[-1])):
        # weighing every token 1, the k-th largest reaches k; never reached, all are kept
        need = jnp.where(jnp.asarray(top_k) > 0, top_k, jnp.inf)
        least_BlG1 = _reaching(logits_BlGV, jnp.float32(1), need)
        moved_BlG = _unsure(logits_BlGV, mass_BlGV, least_BlG1, error)
        mass_BlGV = jnp.where(logits_BlGV >= least_BlG1, mass_BlGV, 0)
    if not (isinstance(top_p, float | int) and top_p == 1):
        total_BlG = jnp.sum(mass_BlGV, axis=-1)
        # a p that rounds to nothing still needs something: the likeliest token
        need_BlG = jnp.maximum(jnp.asarray(top_p, jnp.float32) * total_BlG, settings.SMALLEST)
        need_BlG = jnp.where(jnp.asarray(top_p) < 1, need_BlG, jnp.inf)
        least_BlG1 = _reaching(logits_BlGV, mass_BlGV, need_BlG)
        reach_BlG = moved_BlG + _moved(top_p, temperature, error) * total_BlG
        moved_BlG += _unsure(logits_BlGV, mass_BlGV, least_BlG1, error, need_BlG, reach_BlG)
        mass_BlGV = jnp.where(logits_BlGV >= least_BlG1, mass_BlGV, 0)
    # what comes or goes moves a boundary by at most its share, above and below it alike
    return mass_BlGV, moved_BlG / jnp.sum(mass_BlGV, axis=-1)


def inverse_cdf(
    mass_BlGV: interfaces.Array, uniform_BlG: interfaces.Array
) -> tuple[interfaces.Array, interfaces.Array]:
    """Tokens [B, l, G]: the first of positive mass whose cumulative mass exceeds uniform x total.

    And [B, l, G] how far the uniform lies from where another token begins.

    The sum runs in float32 along the alphabet, over blocks first and then inside of the one that
    is met. It is a parallel one, so rounding may lower it from one token to the next, or raise it
    where the mass is 0: hence "of positive mass", and where none exceeds, the last of positive mass
    (0 where there is none). A token of mass 0 is never drawn, and none out of range.
    """
    V = mass_BlGV.shape[-1]
    size = 1 << (V - 1).bit_length() // 2  # as many blocks as tokens in each
    padding = [(0, 0)] * (mass_BlGV.ndim - 1) + [(0, -V % size)]
    mass_BlGNS = jnp.pad(mass_BlGV, padding).reshape(*mass_BlGV.shape[:-1], -1, size)
    block_BlGN = jnp.sum(mass_BlGNS, axis=-1)
    upto_BlGN = jnp.cumsum(block_BlGN, axis=-1)
    total_BlG = upto_BlGN[..., -1]
    bound_BlG1 = (uniform_BlG * total_BlG)[..., None]

    block_BlG1 = _first(block_BlGN > 0, upto_BlGN > bound_BlG1)
    below_BlG1 = _taken(upto_BlGN, block_BlG1) - _taken(block_BlGN, block_BlG1)
    mass_BlGS = jnp.take_along_axis(mass_BlGNS, block_BlG1[..., None], axis=-2)[..., 0, :]
    upto_BlGS = below_BlG1 + jnp.cumsum(mass_BlGS, axis=-1)
    place_BlG1 = _first(mass_BlGS > 0, upto_BlGS > bound_BlG1)

    above_BlG1 = _taken(upto_BlGS, place_BlG1) - bound_BlG1
    margin_BlG1 = jnp.minimum(above_BlG1, _taken(mass_BlGS, place_BlG1) - above_BlG1)
    tokens_BlG = (block_BlG1 * size + place_BlG1)[..., 0]
    return tokens_BlG, margin_BlG1[..., 0] / total_BlG


def _first(kept_BlGV: interfaces.Array, beyond_BlGV: interfaces.Array) -> interfaces.Array:
    """[B, l, G, 1] the first that is kept and beyond, else the last that is kept, else 0."""
    symbols_BlGV, V = _symbols(kept_BlGV), kept_BlGV.shape[-1]
    first_BlG = jnp.min(jnp.where(kept_BlGV & beyond_BlGV, symbols_BlGV, V), axis=-1)
    last_BlG = jnp.max(jnp.where(kept_BlGV, symbols_BlGV, 0), axis=-1)
    return jnp.minimum(first_BlG, last_BlG)[..., None]


def _symbols(array_BlGV: interfaces.Array) -> interfaces.Array:
    """[B, l, G, V] numbers of the symbols."""
    return jax.lax.broadcasted_iota(jnp.int32, array_BlGV.shape, array_BlGV.ndim - 1)


def _taken(array_BlGV: interfaces.Array, index_BlG1: interfaces.Array) -> interfaces.Array:
    return jnp.take_along_axis(array_BlGV, index_BlG1, axis=-1)


def invalid(logits_BlGV: interfaces.Array) -> interfaces.Array:
    """[B] true where some logit is NaN or +inf, or some symbol has no finite logit at all.

    To be asked of float32 logits before the draw; -inf alone is an ordinary "never".
    """
    # of numbers of which one is none, the largest is none
    peak_BlG = jnp.max(logits_BlGV, axis=-1)
    return jnp.any(~jnp.isfinite(peak_BlG), axis=(1, 2))


def _reaching(
    logits_BlGV: interfaces.Array, weights_BlGV: interfaces.Array, need: interfaces.Array
) -> interfaces.Array:
    """[B, l, G, 1] the largest threshold at which the weights of what is not below reach `need`.

    -inf where they never do. It is found bit by bit, from the highest down. Rounding is monotone,
    so a sum over fewer tokens in the same order is never larger, and the halvings agree with each
    other.
    """

    def halve(i, least_BlG):
        higher_BlG = least_BlG | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        counted_BlGV = jnp.where(logits_BlGV >= _float(higher_BlG)[..., None], weights_BlGV, 0)
        return jnp.where(jnp.sum(counted_BlGV, axis=-1) >= need, higher_BlG, least_BlG)

    lowest_BlG = jnp.zeros(logits_BlGV.shape[:-1], jnp.uint32)
    least_BlG = jax.lax.fori_loop(0, 32, halve, lowest_BlG)
    return jnp.where(least_BlG == 0, -jnp.inf, _float(least_BlG))[..., None]


def _unsure(
    logits_BlGV: interfaces.Array,
    mass_BlGV: interfaces.Array,
    least_BlG1: interfaces.Array,
    error: interfaces.Array | float,
    need_BlG: interfaces.Array | None = None,
    reach_BlG: interfaces.Array | None = None,
) -> interfaces.Array:
    """[B, l, G] mass that may come or go, where rounding may move a threshold by a logit; else 0.

    It may where the logits on its two sides are as good as equal; or where the sums of masses with
    and without those at the threshold are within `reach` of what is needed.
    """

    def mass_of(chosen_BlGV):
        return jnp.sum(jnp.where(chosen_BlGV, mass_BlGV, 0), axis=-1)

    lower_BlGV = jnp.where(logits_BlGV < least_BlG1, logits_BlGV, -jnp.inf)
    next_BlG1 = jnp.max(lower_BlGV, axis=-1, keepdims=True)
    here_BlG, below_BlG = mass_of(logits_BlGV == least_BlG1), mass_of(logits_BlGV == next_BlG1)
    unsure_BlG = (least_BlG1 - next_BlG1)[..., 0] < NEAR_LOGITS * error
    if need_BlG is not None:
        spare_BlG = mass_of(logits_BlGV >= least_BlG1) - need_BlG
        unsure_BlG |= (spare_BlG < reach_BlG) | (here_BlG - spare_BlG < reach_BlG)
    # all that are as good as equal may change places, not the nearest two alone
    bound = NEAR_LOGITS * error
    bound = bound[..., None] if jnp.ndim(bound) else bound
    about_BlGV = jnp.abs(logits_BlGV - least_BlG1) < bound
    over_BlGV = logits_BlGV >= least_BlG1
    come_BlG, go_BlG = mass_of(about_BlGV & ~over_BlGV), mass_of(about_BlGV & over_BlGV)
    masses = here_BlG, below_BlG, come_BlG, go_BlG
    return jnp.where(unsure_BlG, functools.reduce(jnp.maximum, masses), 0)


def _float(order: interfaces.Array) -> interfaces.Array:
    """Floats by their order: uint32, the sign bit set for positive ones, negative turned over."""
    sign = jnp.uint32(1 << 31)
    bits = jnp.where(order >= sign, order ^ sign, ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
