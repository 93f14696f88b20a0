"""LFQ and BSQ: bits written out, both orders, entropies against the full codebook in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokgen.quantizers import bsq, entropy, lfq


def sizes(jaxpr):
    """Elements of every array of a program, those of its parts included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def sure(probabilities):
    return -np.sum(probabilities * np.log(np.maximum(probabilities, 1e-300)), -1)


def full(latents_nC, temperature):
    """(chances [n, V], their mean): every code of +-1 written out, little-endian, in float64."""
    C = latents_nC.shape[-1]
    codes = np.array([row[::-1] for row in itertools.product([-1.0, 1.0], repeat=C)])
    logits = 2 * latents_nC @ codes.T / temperature
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    return chances, chances.mean(0)


@pytest.mark.parametrize("package", [lfq, bsq])
@pytest.mark.parametrize("order", ["little", "big"])
def test_tokens_are_the_written_out_sums(package, order, key):
    groups = (3, 1, 4)
    quantizer = package.Quantizer(8, groups=groups, order=order, grid=(2, 3))
    latents_BPC = jax.random.normal(key, (5, 6, 8)).at[0].set(0.0)
    tokens_BLG = np.asarray(quantizer.encode(latents_BPC))
    for b, p in np.ndindex(5, 6):
        first = 0
        for g, size in enumerate(groups):
            bits = [float(z) > 0 for z in latents_BPC[b, p, first : first + size]]
            expected = sum(
                bit << (c if order == "little" else size - 1 - c) for c, bit in enumerate(bits)
            )
            assert tokens_BLG[b, p, g] == expected
            first += size
    assert not tokens_BLG[0].any()  # zero is a bit 0, and so a negative code
    assert (np.asarray(quantizer.decode(tokens_BLG))[0] < 0).all()
    assert quantizer.layout.vocab == (8, 2, 16)


def test_codes_of_bsq_have_length_one(key):
    quantizer = bsq.Quantizer(32, groups=(16, 16), grid=(1, 4))
    out = quantizer(5 * jax.random.normal(key, (3, 4, 32)))
    np.testing.assert_allclose(jnp.sum(out.latents_BPC**2, -1), 1, atol=1e-5)
    assert len(np.unique(np.abs(quantizer.decode(out.tokens_BLG)))) == 1
    gradient = jax.grad(lambda z: quantizer(z).losses["commitment"])(jnp.zeros((1, 4, 32)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("temperature", [0.01, 0.5, 3.0])
def test_the_factorised_entropies_are_those_of_the_full_codebook(temperature):
    """8 bits in float64, log forms with their guards where both have them."""
    latents_nC = np.random.default_rng(0).normal(size=(40, 8))
    chances, batch = full(latents_nC, temperature)
    with jax.enable_x64(True):
        log_odds_BPC = jnp.asarray(4 * latents_nC.reshape(4, 10, 8) / temperature)
        for form, logs in (
            ("shifted", np.log(batch + 1e-5)),
            ("clamped", np.log(np.maximum(batch, 1e-5))),
        ):
            found = entropy.of_bits(log_odds_BPC, form)
            assert found["batch_entropy"].dtype == jnp.float64
            expected = np.mean(sure(chances))
            np.testing.assert_allclose(found["sample_entropy"], expected, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found["batch_entropy"], -np.sum(batch * logs), rtol=1e-9)


@pytest.mark.parametrize("bits", [1, 7])
@pytest.mark.parametrize("form", ["shifted", "clamped"])
def test_both_ways_of_lfq_agree_in_value_and_gradient(bits, form, key, monkeypatch):
    latents_BPC = jax.random.normal(key, (4, 9, bits))
    quantizer = lfq.Quantizer(bits, grid=(3, 3), temperature=0.7, entropy=form)

    def difference(latents_BPC):
        losses = quantizer(latents_BPC).losses
        return losses["sample_entropy"] - 0.5 * losses["batch_entropy"]

    whole = jax.jit(jax.value_and_grad(difference))(latents_BPC)
    monkeypatch.setattr(lfq, "WHOLE", 0)
    # a function of its own: jit would remember the first way
    factorised = jax.jit(jax.value_and_grad(lambda z: difference(z)))(latents_BPC)
    # the clamp of the sample entropy is all that differs
    tolerance = 1e-5 if form == "shifted" else 2e-3
    for a, b in zip(whole, factorised, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_nothing_of_eighteen_bits_is_written_out_per_latent(key):
    """The largest array of the training step is the batch's codebook, 2^9 x 2^9, whatever n."""
    quantizer = lfq.Quantizer(18, grid=(16, 16), temperature=0.01)

    def loss(latents_BPC):
        return sum(quantizer(latents_BPC).losses.values())

    latents_BPC = jnp.zeros((8, 256, 18))
    program = jax.make_jaxpr(jax.value_and_grad(loss))(latents_BPC)
    largest = max(sizes(program.jaxpr))
    assert largest <= 8 * 256 * 2**9  # n x the codes of a half
    # whereas a codebook that is written out is seen by this test
    small = lfq.Quantizer(12, grid=(16, 16), temperature=0.01)
    program = jax.make_jaxpr(lambda z: small(z).losses)(latents_BPC[..., :12])
    assert max(sizes(program.jaxpr)) == 8 * 256 * 2**12


def test_entropies_at_their_ends():
    """Decided and even: 0 and 18 log 2; undecided: the other way round in the first."""
    quantizer = lfq.Quantizer(18, grid=(1, 1), temperature=0.01, entropy="clamped")
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (4096, 1, 18))
    losses = jax.jit(lambda z: quantizer(z).losses)
    decided = losses(jnp.asarray(signs, jnp.float32))
    assert decided["sample_entropy"] < 1e-3
    # 4096 codes out of 2^18, nearly all of them different
    np.testing.assert_allclose(decided["batch_entropy"], np.log(4096), rtol=0.01)
    undecided = losses(jnp.zeros((4, 1, 18)))
    np.testing.assert_allclose(undecided["sample_entropy"], 18 * np.log(2), rtol=1e-5)


def test_entropies_of_bsq_are_bitwise(key):
    temperature, C = 0.2, 6
    quantizer = bsq.Quantizer(C, grid=(3, 3), temperature=temperature)
    latents_BPC = 3 * jax.random.normal(key, (4, 9, C))
    units = np.asarray(latents_BPC, np.float64).reshape(-1, C)
    units /= np.linalg.norm(units, axis=-1, keepdims=True)
    chances = 1 / (1 + np.exp(-4 * units / np.sqrt(C) / temperature))

    def binary(p):
        return -(p * np.log(p + 1e-8) + (1 - p) * np.log(1 - p + 1e-8))

    losses = jax.jit(lambda z: quantizer(z).losses)(latents_BPC)
    np.testing.assert_allclose(losses["sample_entropy"], binary(chances).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(losses["batch_entropy"], binary(chances.mean(0)).sum(), rtol=1e-5)
    signs = np.where(units > 0, 1, -1) / np.sqrt(C)
    np.testing.assert_allclose(losses["commitment"], np.mean((signs - units) ** 2), rtol=1e-5)
    # and the sample entropy is that of the full codebook on the sphere
    full_chances, _ = full(units / np.sqrt(C), temperature)
    np.testing.assert_allclose(losses["sample_entropy"], np.mean(sure(full_chances)), rtol=1e-4)


@pytest.mark.parametrize("package", [lfq, bsq])
def test_no_temperature_no_entropies(package, key):
    quantizer = package.Quantizer(6, grid=(2, 2))
    assert set(quantizer(jax.random.normal(key, (1, 4, 6))).losses) == {"commitment"}


@pytest.mark.parametrize(
    ("package", "arguments", "word"),
    [
        (lfq, dict(bits=19), "from 1 to 18"),
        (lfq, dict(bits=0), "from 1 to 18"),
        (lfq, dict(bits=8, groups=(4, 3)), "sum to"),
        (lfq, dict(bits=8, order="middle"), "middle"),
        (lfq, dict(bits=8, entropy="none"), "none"),
        (lfq, dict(bits=8, temperature=-1.0), "temperature"),
        (bsq, dict(bits=32), "16, 16"),
        (bsq, dict(bits=0), "bits must be a whole number from 1"),
    ],
)
def test_wrong_settings_are_named(package, arguments, word):
    with pytest.raises(ValueError, match=word):
        package.Quantizer(**arguments, grid=(1, 1))
