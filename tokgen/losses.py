"""Losses of tokenizers: reconstruction and the two sides of the adversarial game.

Images are in [0, 1]; errors are measured in [-1, 1], the range of the published weights.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokgen.interfaces import Array


def reconstruction(image_BHW3: Array, painted_BHW3: Array) -> dict[str, Array]:
    """Mean absolute and mean squared error on the scale of [-1, 1]."""
    error = 2 * (painted_BHW3.astype(jnp.float32) - image_BHW3.astype(jnp.float32))
    return {"l1": jnp.mean(jnp.abs(error)), "l2": jnp.mean(error * error)}


def hinge_discriminator(real: Array, fake: Array) -> Array:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2, arXiv:1705.02894."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def hinge_generator(fake: Array) -> Array:
    """-mean(fake)."""
    return -jnp.mean(fake)


def critic_loss(critic: Callable, image_BHW3: Array, painted_BHW3: Array) -> tuple[Array, dict]:
    """What the critic descends. The painter gets no gradient: it is cut here, in the interface."""
    painted_BHW3 = jax.lax.stop_gradient(painted_BHW3)
    real, fake = critic(2 * image_BHW3 - 1), critic(2 * painted_BHW3 - 1)
    loss = hinge_discriminator(real, fake)
    return loss, {"critic": loss, "critic_real": jnp.mean(real), "critic_fake": jnp.mean(fake)}


def adversarial(critic: Callable, painted_BHW3: Array) -> Array:
    """What the painter descends. `critic` closes over constants: its parameters get no gradient."""
    return hinge_generator(critic(2 * painted_BHW3 - 1))


def adaptive_weight(reconstruction_gradient: Array, adversarial_gradient: Array) -> Array:
    """|d reconstruction / d w| / |d adversarial / d w| at the last layer, clamped to [0, 1e4].

    Eq. 7 of arXiv:2012.09841; a constant for the gradient.
    """
    ratio = jnp.linalg.norm(reconstruction_gradient) / (
        jnp.linalg.norm(adversarial_gradient) + 1e-4
    )
    return jax.lax.stop_gradient(jnp.clip(ratio, 0, 1e4))
