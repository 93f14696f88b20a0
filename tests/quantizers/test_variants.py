"""Published options of quantizers that no recipe turns on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen.quantizers import lfq, multiscale, vq


def test_an_angle_chooses_and_the_row_stays_as_long_as_it_is(key):
    quantizer = vq.Quantizer(
        9, 4, grid=(2, 3), normalize=False, match="angle", init="normal", rngs=nnx.Rngs(0)
    )
    latents_BPC = jax.random.normal(key, (2, 6, 4))
    rows_VC = np.asarray(quantizer.codebook[...], np.float64)
    wanted_BP = np.zeros((2, 6), int)
    for b, p in np.ndindex(2, 6):
        latent_C = np.asarray(latents_BPC[b, p], np.float64)
        cosines = [row @ latent_C / np.linalg.norm(row) for row in rows_VC]
        wanted_BP[b, p] = int(np.argmax(cosines))
    out = quantizer(latents_BPC)
    nearest_BP = ((np.asarray(latents_BPC)[:, :, None] - rows_VC) ** 2).sum(-1).argmin(-1)
    assert (nearest_BP != wanted_BP).any()
    np.testing.assert_array_equal(quantizer.encode(latents_BPC)[..., 0], wanted_BP)
    np.testing.assert_array_equal(out.tokens_BLG[..., 0], wanted_BP)
    np.testing.assert_allclose(quantizer.decode(out.tokens_BLG), rows_VC[wanted_BP], atol=1e-6)


def test_one_phi_for_every_scale():
    sides, inner = (1, 2, 3), dict(name="vq", codes=8, channels=4)
    quantizer = multiscale.Quantizer(inner, sides, phi=None, grid=(3, 3), rngs=nnx.Rngs(0))
    assert len(quantizer.convs) == 3 and quantizer.which == (0, 1, 2)


def test_written_out_entropies_are_clamped_at_any_number_of_bits(key):
    latents_BPC = 0.2 * jax.random.normal(key, (1, 3, 13))
    options = dict(grid=(1, 3), temperature=1.0, entropy="clamped")
    found = lfq.Quantizer(13, whole=13, **options)(latents_BPC).losses["sample_entropy"]
    codes_VC = (np.arange(2**13)[:, None] >> np.arange(13) & 1) * 2.0 - 1
    scores_PV = 2 * np.asarray(latents_BPC[0], np.float64) @ codes_VC.T
    chances_PV = np.exp(scores_PV - scores_PV.max(-1, keepdims=True))
    chances_PV /= chances_PV.sum(-1, keepdims=True)
    wanted = -np.mean(np.sum(chances_PV * np.log(np.maximum(chances_PV, 1e-5)), -1))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # the form without a guard, for more bits than fit, is another number
    loose = lfq.Quantizer(13, **options)(latents_BPC).losses["sample_entropy"]
    assert abs(loose - jnp.asarray(wanted)) > 1e-3
