"""Losses of tokenizers: of reconstruction, of the discriminator, and the adversarial one.

Images are in [0, 1]; errors are measured in [-1, 1], the range of the published weights. A config
names the adversarial pair; where systems differ by a factor, the name says so or the weight does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from tokgen import choices
from tokgen.interfaces import Array


def reconstruction(image_BHW3: Array, reconstruction_BHW3: Array) -> dict[str, Array]:
    """Mean absolute and mean squared error on the scale of [-1, 1]."""
    error = 2 * (reconstruction_BHW3.astype(jnp.float32) - image_BHW3.astype(jnp.float32))
    return {"l1": jnp.mean(jnp.abs(error)), "l2": jnp.mean(error * error)}


def hinge_discriminator(real: Array, fake: Array) -> Array:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2, arXiv:1705.02894."""
    return 0.5 * hinge_sum_discriminator(real, fake)


def hinge_sum_discriminator(real: Array, fake: Array) -> Array:
    """mean relu(1 - real) + mean relu(1 + fake): the hinge of MaskGIT and VAR, without the half."""
    return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))


def vanilla_discriminator(real: Array, fake: Array) -> Array:
    """(mean softplus(-real) + mean softplus(fake)) / 2: half of `non_saturating`; VQGAN."""
    return 0.5 * non_saturating_discriminator(real, fake)


def non_saturating_discriminator(real: Array, fake: Array) -> Array:
    """mean softplus(-real) + mean softplus(fake), arXiv:1406.2661."""
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))


def hinge_generator(fake: Array) -> Array:
    """-mean(fake)."""
    return -jnp.mean(fake)


def non_saturating_generator(fake: Array) -> Array:
    """mean softplus(-fake), arXiv:1406.2661."""
    return jnp.mean(jax.nn.softplus(-fake))


def pooled_generator(fake: Array) -> Array:
    """Mean over images of softplus(-mean of its logits): Open-MAGVIT2, arXiv:2409.04410."""
    return jnp.mean(jax.nn.softplus(-fake.reshape(len(fake), -1).mean(1)))


DISCRIMINATOR: Mapping[str, Callable[[Array, Array], Array]] = {
    "hinge": hinge_discriminator,
    "hinge_sum": hinge_sum_discriminator,
    "vanilla": vanilla_discriminator,
    "non_saturating": non_saturating_discriminator,
}
GENERATOR: Mapping[str, Callable[[Array], Array]] = {
    "hinge": hinge_generator,
    "non_saturating": non_saturating_generator,
    "pooled": pooled_generator,
}


def averages() -> dict[str, Array]:
    """The running averages that LeCam needs, as they start."""
    return {"real": jnp.zeros(()), "fake": jnp.zeros(())}


def moved(
    averages: Mapping[str, Array], real: Array, fake: Array, decay: float = 0.999
) -> dict[str, Array]:
    """The averages after one more batch of logits (or their means); constants for the gradient."""
    seen = jax.lax.stop_gradient({"real": jnp.mean(real), "fake": jnp.mean(fake)})
    return {name: decay * averages[name] + (1 - decay) * seen[name] for name in seen}


def lecam_means(real: Array, fake: Array, averages: Mapping[str, Array]) -> Array:
    """Eq. 5 of arXiv:2104.03310 on the batch's means, averages not yet moved: MaskBit, TiTok."""
    return lecam(jnp.mean(real), jnp.mean(fake), averages)


def lecam_logits(
    real: Array, fake: Array, averages: Mapping[str, Array], decay: float = 0.999
) -> Array:
    """Eq. 5 of each logit, against averages that have seen the batch: Open-MAGVIT2, IBQ."""
    return lecam(real, fake, moved(averages, real, fake, decay))


def lecam(real: Array, fake: Array, averages: Mapping[str, Array]) -> Array:
    """mean relu(real - average fake)^2 + mean relu(average real - fake)^2."""
    above = jax.nn.relu(real - averages["fake"])
    below = jax.nn.relu(averages["real"] - fake)
    return jnp.mean(above * above) + jnp.mean(below * below)


LECAM: Mapping[str, Callable[[Array, Array, Mapping[str, Array]], Array]] = {
    "means": lecam_means,
    "logits": lecam_logits,
}


def r1(discriminator: Callable, image_BHW3: Array) -> Array:
    """Mean over images of the squared length of d logit / d image, Eq. 9 of arXiv:1801.04406.

    The image is in [0, 1]. MaskGIT's penalty is this at weight 10, not halved.
    """
    gradient_BHW3 = jax.grad(lambda image: jnp.sum(discriminator(2 * image - 1)))(
        image_BHW3.astype(jnp.float32)
    )
    return jnp.mean(jnp.sum(gradient_BHW3 * gradient_BHW3, (1, 2, 3)))


def discriminator_loss(
    discriminator: Callable,
    image_BHW3: Array,
    reconstruction_BHW3: Array,
    averages: Mapping[str, Array] | None = None,
    *,
    on_fake: Callable | None = None,
    loss: str = "hinge",
    lecam: str = "means",
    lecam_weight: float = 0.0,
    r1_weight: float = 0.0,
    again: Sequence[Callable] = (),
    consistency_weight: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """(loss of the discriminator, its terms). The tokenizer gets no gradient: it is cut here.

    `averages` are those before the step; the caller moves them by `moved(averages,
    seen["logits_real"], seen["logits_fake"])`. A weight of zero leaves its term out. Where the
    discriminator sees images at random, `on_fake` is how it sees the reconstructions, and `again`
    how it sees images and reconstructions another time; "discriminator_loss" among the terms is
    without their consistency.
    """
    reconstruction_BHW3 = jax.lax.stop_gradient(reconstruction_BHW3)
    real = discriminator(2 * image_BHW3 - 1)
    fake = (on_fake or discriminator)(2 * reconstruction_BHW3 - 1)
    total = choices.named(DISCRIMINATOR, loss, "loss of the discriminator")(real, fake)
    seen = {"logits_real": jnp.mean(real), "logits_fake": jnp.mean(fake)}
    if lecam_weight > 0:
        if averages is None:
            raise ValueError("LeCam needs running averages; found none: pass losses.averages()")
        seen["lecam"] = choices.named(LECAM, lecam, "form of LeCam")(real, fake, averages)
        total = total + lecam_weight * seen["lecam"]
    if r1_weight > 0:
        seen["r1"] = r1(discriminator, image_BHW3)
        total = total + r1_weight * seen["r1"]
    seen = {"discriminator_loss": total, **seen}
    if consistency_weight > 0:
        pairs = zip((real, fake), again, (image_BHW3, reconstruction_BHW3), strict=True)
        seen["consistency"] = sum(
            consistency(logits, view(2 * image - 1)) for logits, view, image in pairs
        )
        total = total + consistency_weight * seen["consistency"]
    return total, seen


def adversarial(discriminator: Callable, reconstruction_BHW3: Array, *, loss: str) -> Array:
    """The tokenizer's adversarial loss, `loss` a name of GENERATOR.

    `discriminator` closes over constants: its parameters get no gradient.
    """
    logits = discriminator(2 * reconstruction_BHW3 - 1)
    return choices.named(GENERATOR, loss, "generator loss")(logits)


def adaptive_weight(
    reconstruction_gradient: Array,
    adversarial_gradient: Array,
    *,
    limit: float = 1e4,
    floor: float = 0.0,
    epsilon: float = 1e-4,
) -> Array:
    """|d reconstruction / d w| / |d adversarial / d w| at the last layer, clamped to its limits.

    Eq. 7 of arXiv:2012.09841; a constant for the gradient. VAR: floor 0.015, epsilon 1e-6.
    """
    ratio = jnp.linalg.norm(reconstruction_gradient) / (
        jnp.linalg.norm(adversarial_gradient) + epsilon
    )
    return jax.lax.stop_gradient(jnp.clip(ratio, floor, limit))


def consistency(logits: Array, augmented_logits: Array) -> Array:
    """Mean squared difference of the logits of two views of an image, arXiv:1910.12027."""
    return jnp.mean(jnp.square(logits - augmented_logits))


def code_cross_entropy(logits: Array, tokens: Array) -> Array:
    """Mean nats of codes [B, P, 1] under logits [B, P, V]: TiTok's first stage."""
    # float32: a log-sum of exponentials in bfloat16 has three significant digits
    logs_BPV = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.mean(jnp.take_along_axis(logs_BPV, tokens, axis=-1))
