"""A tokenizer's training as a GAN: what a config says of it, the discriminator's step, the weight.

The tokenizer is what the literature of GANs calls the generator; its own step is
`tokenizer_step.py`'s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from tokgen import choices, losses, parameters, ranges, report, rng
from tokgen.config import building
from tokgen.discriminators import augment, feature_heads
from tokgen.interfaces import Array, PyTree, UserError
from tokgen.pretrained.formats import reader
from tokgen.training import accumulation, optimizer as optimizers, train_state

TRUNK = r"(?!trunk/).*"  # everything but a frozen feature network
LAST_LAYER = ("conv_out", "kernel")  # of the decoder: where the adaptive weight compares gradients


@dataclasses.dataclass(frozen=True)
class GAN:
    """The section `discriminator` of a config.

    Attributes:
        weight: of the adversarial term; 0: no discriminator.
        limit, floor, epsilon: of the adaptive weight (Eq. 7 of arXiv:2012.09841), by which
            `weight` is multiplied; limit 0 makes the weight constant.
        start: as a share of the run: the discriminator begins to learn.
        warmup: this much later the tokenizer's loss gets its adversarial term; all at once, but
            with `ramp`.
        ramp: share of the run over which the weight rises to its full value.
        loss, generator_loss: what discriminator and tokenizer descend, names of
            `losses.DISCRIMINATOR` and `losses.GENERATOR`.
        loss_weight: of the discriminator's loss (LlamaGen multiplies it too).
        lecam, lecam_form: weight and form of LeCam.
        r1: weight of the gradient penalty on real images.
        augmented: differentiable augmentations of real and reconstructed images, names of
            `discriminators.augment.KINDS` in the order in which they are done; none: ().
        consistency: weight of agreement between two augmentations of an image, of the sum over
            real and reconstructed ones.
        first: whose step comes first, "tokenizer" or "discriminator".
        features: weight file of the frozen network, for `network.name="feature_heads"`.
        network, optimizer: sections of their own.
    """

    weight: ranges.Amount = 0.0
    limit: ranges.Amount = 1e4
    floor: ranges.Amount = 0.0
    epsilon: ranges.Amount = 1e-4
    start: ranges.Share = 0.0
    warmup: ranges.Share = 0.0
    ramp: ranges.Share = 0.0
    loss: str = "hinge"
    generator_loss: str = "hinge"
    loss_weight: ranges.Amount = 1.0
    lecam: ranges.Amount = 0.0
    lecam_form: str = "means"
    r1: ranges.Amount = 0.0
    augmented: tuple[str, ...] = ()
    consistency: ranges.Amount = 0.0
    first: str = "tokenizer"
    features: str = ""
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        ranges.check(self)
        choices.named(losses.DISCRIMINATOR, self.loss, "discriminator.loss")
        choices.named(losses.GENERATOR, self.generator_loss, "discriminator.generator_loss")
        choices.named(losses.LECAM, self.lecam_form, "discriminator.lecam_form")
        if self.first not in ("tokenizer", "discriminator"):
            known = ("tokenizer", "discriminator")
            raise UserError(choices.refusal(known, self.first, "discriminator.first"))
        kinds = list(self.augmented) if isinstance(self.augmented, tuple) else [None]
        if [kind for kind in kinds if kind not in augment.KINDS or kinds.count(kind) > 1]:
            raise UserError(
                f"discriminator.augmented must be different ones of {', '.join(augment.KINDS)} in "
                f"the order in which they are done, as {augment.KINDS!r}; found {self.augmented!r}"
            )

    def steps(self, total: int) -> tuple[int, int]:
        """(step at which the discriminator begins to learn, step of the first adversarial term)."""
        if self.weight == 0:
            return total, total
        begin = round(self.start * total)
        return begin, begin + round(self.warmup * total)


def build(gan: GAN, settings: ml_collections.ConfigDict, *, rngs: nnx.Rngs) -> nnx.Module:
    """The discriminator; a PatchGAN where a feature network has no weights to look through."""
    section = gan.network
    if section.get("name") == "feature_heads" and not gan.features:
        report.say(
            "discriminator: PatchGAN, since config.discriminator.features names no weights of DINO "
            "ViT-S/16 (docs/data.md)"
        )
        section = dict(name="patchgan")
    discriminator = drawn(section, settings, rngs=rngs)
    if isinstance(discriminator, feature_heads.Discriminator):
        discriminator.load(*gan.features.split(","), read=reader.network)
    return discriminator


def drawn(
    section: Mapping[str, Any], settings: ml_collections.ConfigDict, *, rngs: nnx.Rngs
) -> nnx.Module:
    """The discriminator of a section `network`; a feature network in it is random numbers."""
    context = dict(channels=settings.view.channels, rngs=rngs)
    if section.get("name") == "stylegan":
        context["size"] = settings.view.size[0]
    return building.build(dict(section), "discriminator.network", **context)


def views(discriminator: nnx.Module, gan: GAN, key: Array) -> tuple[Callable, Callable]:
    """(image -> logits for the discriminator's own loss, image -> logits for the tokenizer's).

    They differ where a network normalises by the batch it is handed: the tokenizer's images are
    scored by running statistics, each alone.
    """
    learning = scoring = discriminator
    if isinstance(discriminator, feature_heads.Discriminator):
        crop = rng.use(key, rng.CROP)
        learning = functools.partial(discriminator, key=crop)
        scoring = functools.partial(discriminator.evaluated, key=crop)
    if gan.augmented:
        changed = functools.partial(
            augment.augment, kinds=gan.augmented, key=rng.use(key, rng.AUGMENT)
        )
        learning, scoring = (
            functools.partial(_through, view, changed) for view in (learning, scoring)
        )
    return learning, scoring


def _through(view: Callable, change: Callable, image_BHW3: Array) -> Array:
    return view(change(image_BHW3))


# ---------------------------------------------------------------- the discriminator's step


def discriminator_step(
    gan: GAN,
    graph: nnx.GraphDef,
    optimizer: optimizers.Optimizer,
    *,
    parts: int = 1,
    strategy: str = "data",
) -> Callable:
    """(state, averages, image, reconstruction, key) -> (state, averages, scalars).

    Gradients and upkeep are means over `parts` of the batch, each normalised by its own statistics
    where the network normalises by a batch; `strategy` says how gradients lie over devices.
    """

    def step(
        state: train_state.TrainState,
        averages: Mapping[str, Array],
        image_BHW3: Array,
        reconstruction_BHW3: Array,
        key: Array,
    ) -> tuple[train_state.TrainState, dict[str, Array], dict[str, Array]]:
        batch = image_BHW3, jax.lax.stop_gradient(reconstruction_BHW3)
        over = dict(parts=parts, strategy=strategy)

        def of_part(params, batch, key):
            def loss(params):
                discriminator = parameters.merge(graph, params, state.stats)
                return descended(gan, discriminator, averages, *batch, key)

            found, gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return gradients, found, ()

        gradients, (total, seen), _ = accumulation.averaged(
            *(of_part, state.params, batch, key), **over
        )
        # of logits that are infinite the hinge may still be finite; the averages would not be
        looked = total + seen["logits_real"] + seen["logits_fake"]
        state, _ = train_state.apply_gradients(
            state, gradients, optimizer, trained=TRUNK, loss=looked
        )
        after = losses.moved(averages, seen["logits_real"], seen["logits_fake"])
        averages = train_state.kept(state.skipped == 0, after, averages)
        network = parameters.merge(graph, state.params, state.stats)
        if isinstance(network, feature_heads.Discriminator):
            _, stats, _ = accumulation.averaged(
                lambda params, batch, key: ((), _maintained(graph, state, params, *batch, key), ()),
                *(state.params, batch, key),
                **over,
                like=(),
            )
            # a skip moves none
            stats = train_state.kept(state.skipped == 0, stats, state.stats)
            state = state.replace(stats=stats)
        return state, averages, seen

    return step


def descended(
    gan: GAN,
    discriminator: nnx.Module,
    averages: Mapping[str, Array],
    image_BHW3: Array,
    reconstruction_BHW3: Array,
    key: Array,
) -> tuple[Array, dict[str, Array]]:
    """(weighted loss of the discriminator, its terms)."""
    sides = rng.REAL, rng.FAKE
    (on_real, on_fake), again = (
        [views(discriminator, gan, rng.use(each, side))[0] for side in sides]
        for each in (key, rng.use(key, rng.AGAIN))
    )
    total, seen = losses.discriminator_loss(
        on_real,
        image_BHW3,
        reconstruction_BHW3,
        averages,
        on_fake=on_fake,
        loss=gan.loss,
        lecam=gan.lecam_form,
        lecam_weight=gan.lecam,
        r1_weight=gan.r1,
        again=again,
        consistency_weight=gan.consistency,
    )
    return gan.loss_weight * total, seen


@jax.named_scope("upkeep")
def _maintained(
    graph: nnx.GraphDef,
    state: train_state.TrainState,
    params: PyTree,
    image_BHW3: Array,
    reconstruction_BHW3: Array,
    key: Array,
) -> PyTree:
    """The statistics after their upkeep: running ones, spectral directions."""
    discriminator = parameters.merge(graph, params, state.stats)
    for side, image in ((rng.REAL, image_BHW3), (rng.FAKE, reconstruction_BHW3)):
        crop = rng.use(rng.use(rng.use(key, rng.UPKEEP), side), rng.CROP)
        discriminator.maintain(2 * image - 1, key=crop)
    return parameters.statistics(discriminator)


# ---------------------------------------------------------------- the weight of its term


def ramp(gan: GAN, strength: float, step: Array, total: int) -> Array:
    """What the weight is multiplied by at a step of `total`: 0 until the term begins.

    `strength` is 1, less after the returns of `safeguards`.
    """
    _, begin = gan.steps(total)
    share = jnp.clip((step - begin + 1) / max(gan.ramp * total, 1), 0, 1)
    return strength * jnp.where(step >= begin, share, 0.0)


# (cotangent of the reconstruction's loss, that of the image) -> (gradient of the parameters,)
Pull = Callable[[tuple[Array, Array]], tuple[PyTree]]


def adaptive(gan: GAN, ramp: Array, pull: Pull, image_BHW3: Array) -> Array:
    """The weight of the adversarial term of a batch that is taken whole.

        weight = ramp * gan.weight * adaptive

    `adaptive` compares both gradients at the decoder's last layer (`losses.adaptive_weight`), or is
    1 where `gan.limit` is 0. `image_BHW3` is the adversarial loss's gradient at the image.
    """
    if gan.limit > 0:
        return weighed(gan, ramp, *compared(pull, image_BHW3))
    return gan.weight * ramp


def compared(pull: Pull, image_BHW3: Array) -> tuple[Array, Array]:
    """Gradients of reconstruction and adversarial loss at the decoder's last layer.

    Nothing else is computed of the two passes backwards.
    """
    factors = (1, jnp.zeros_like(image_BHW3)), (0, image_BHW3)
    return tuple(last_layer(*pull((jnp.float32(one), image))) for one, image in factors)


def pulled(pull: Pull, weight: Array, image_BHW3: Array) -> PyTree:
    """The gradient of reconstruction + weight * adversarial loss, in one pass backwards."""
    return pull((jnp.float32(1), weight * image_BHW3))[0]


def weighed(gan: GAN, ramp: Array, reconstruction: Array, adversarial: Array) -> Array:
    """The adaptive weight of gradients at the decoder's last layer, `compared`."""
    adaptive = losses.adaptive_weight(
        reconstruction, adversarial, limit=gan.limit, floor=gan.floor, epsilon=gan.epsilon
    )
    return jnp.where(ramp > 0, gan.weight * adaptive * ramp, 0.0)


def last_layer(gradients: PyTree) -> Array:
    """The gradient at the last layer of whatever decodes to pixels."""
    tree = gradients["decoder"]
    for name in ("pixels", "head"):  # of a decoder in two parts; of a transformer
        tree = tree.get(name, tree)
    return functools.reduce(lambda tree, name: tree[name], LAST_LAYER, tree)
