"""IBQ against its formula with one-hot rows written out, and the shapes that it must not make."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import parameters
from tokgen.quantizers import ibq

CODES, CHANNELS = 40, 6


def build(**options):
    return ibq.Quantizer(CODES, CHANNELS, grid=(2, 3), rngs=nnx.Rngs(1), **options)


def published(rows_VC, latents_BPC):
    """(output, losses) as the paper writes them: a one-hot that carries the softmax's gradient."""
    logits_BPV = jnp.einsum("BPC,VC->BPV", latents_BPC, rows_VC)
    chances_BPV = jax.nn.softmax(logits_BPV)
    hard_BPV = jax.nn.one_hot(jnp.argmax(logits_BPV, -1), CODES)
    soft_BPV = hard_BPV + chances_BPV - jax.lax.stop_gradient(chances_BPV)
    out, second = (jnp.einsum("BPV,VC->BPC", w, rows_VC) for w in (soft_BPV, hard_BPV))
    stop = jax.lax.stop_gradient
    sharp = jax.nn.log_softmax(logits_BPV / 0.01 + 1e-5)
    mean_V = jnp.mean(jnp.exp(sharp), (0, 1))
    return out, {
        "index": jnp.mean((out - latents_BPC) ** 2),
        "commitment": jnp.mean((stop(second) - latents_BPC) ** 2),
        "codebook": jnp.mean((second - stop(latents_BPC)) ** 2),
        "sample_entropy": -jnp.mean(jnp.sum(jnp.exp(sharp) * sharp, -1)),
        "batch_entropy": -jnp.sum(mean_V * jnp.log(mean_V + 1e-5)),
    }


def test_values_and_gradients_are_those_of_the_formula(key):
    quantizer = build(temperature=0.01)
    graph, params, stats = parameters.split(quantizer)
    first, second, third = jax.random.split(key, 3)
    latents_BPC = 0.3 * jax.random.normal(first, (4, 6, CHANNELS))
    cotangent_BPC = jax.random.normal(second, latents_BPC.shape)
    names = ("index", "commitment", "codebook", "sample_entropy", "batch_entropy")
    weights = dict(zip(names, jax.random.normal(third, (5,)), strict=True))

    def ours(rows_VC, latents_BPC):
        out = parameters.merge(graph, {"codebook": rows_VC}, stats)(latents_BPC)
        return out.latents_BPC, out.losses

    def total(function):
        def scalar(rows_VC, latents_BPC):
            out_BPC, losses = function(rows_VC, latents_BPC)
            assert set(losses) == set(names)
            return jnp.sum(out_BPC * cotangent_BPC) + sum(weights[n] * losses[n] for n in names)

        return jax.jit(jax.value_and_grad(scalar, (0, 1)))

    found = total(ours)(params["codebook"], latents_BPC)
    expected = total(published)(params["codebook"], latents_BPC)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, expected
    )


def test_every_row_learns_and_the_value_is_a_row_to_the_bit(key):
    quantizer = build()
    graph, params, stats = parameters.split(quantizer)
    latents_BPC = jax.random.normal(key, (1, 2, CHANNELS))  # two latents, forty rows
    out = quantizer(latents_BPC)
    assert set(out.losses) == {"index", "commitment", "codebook"}
    np.testing.assert_array_equal(out.latents_BPC, quantizer.decode(out.tokens_BLG))
    products = np.asarray(latents_BPC, np.float64)[0] @ np.asarray(params["codebook"]).T
    np.testing.assert_array_equal(out.tokens_BLG[0, :, 0], products.argmax(-1))

    def loss(params, name):
        return parameters.merge(graph, params, stats)(latents_BPC).losses[name]

    def moved(name):
        return np.abs(jax.grad(loss)(params, name)["codebook"]).max(-1) > 0

    assert moved("index").all()
    assert moved("codebook").sum() == len(np.unique(out.tokens_BLG))
    assert not moved("commitment").any()


def test_no_array_holds_a_row_per_latent_and_code(key):
    quantizer = build(temperature=0.01)

    def loss(latents_BPC):
        out = quantizer(latents_BPC)
        return jnp.sum(out.latents_BPC) + sum(out.losses.values())

    program = jax.make_jaxpr(jax.grad(loss))(jnp.zeros((4, 6, CHANNELS)))
    sizes = [v.aval.size for equation in program.jaxpr.eqns for v in equation.outvars]
    assert max(sizes) == 4 * 6 * CODES
