"""The critic's side of training: how a config describes the game, and the critic's own step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tokgen import losses, parameters, ranges, report, rng
from tokgen.config import building as configs
from tokgen.discriminators import augment, feature_heads
from tokgen.interfaces import Array, UserError
from tokgen.pretrained.formats import reader
from tokgen.training import optimizer as optimizers, train_state

TRUNK = r"(?!trunk/).*"  # everything but a frozen feature network


@dataclasses.dataclass(frozen=True)
class Game:
    """The section `critic` of a config.

    Attributes:
        weight: of the adversarial term; 0: no critic.
        limit, floor, epsilon: of the adaptive weight (Eq. 7 of arXiv:2012.09841), by which
            `weight` is multiplied; limit 0 makes the weight constant.
        start: as a share of the run: the critic begins to learn.
        warmup: this much later the painter begins to play against it; half-way ones in between
            with `ramp`.
        ramp: share of the run over which the weight rises to its full value.
        loss, painter: what critic and painter descend, names of `losses.DISCRIMINATOR` and
            `losses.GENERATOR`.
        critic_weight: of the critic's loss (LlamaGen multiplies it too).
        lecam, lecam_form: weight and form of LeCam.
        r1: weight of the gradient penalty on real images.
        augmented: differentiable augmentations that both sides are seen through, names of
            `critics.augment.KINDS` in the order in which they are done; none: ().
        consistency: weight of agreement between two augmentations of an image, of the sum over
            real and painted ones.
        first: who moves first in a step, "painter" or "critic".
        features: weight file of the frozen feature network, for `network.name="feature_heads"`.
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
    painter: str = "hinge"
    critic_weight: ranges.Amount = 1.0
    lecam: ranges.Amount = 0.0
    lecam_form: str = "means"
    r1: ranges.Amount = 0.0
    augmented: tuple[str, ...] = ()
    consistency: ranges.Amount = 0.0
    first: str = "painter"
    features: str = ""
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        ranges.check(self)
        losses.named(losses.DISCRIMINATOR, self.loss, "critic.loss")
        losses.named(losses.GENERATOR, self.painter, "critic.painter")
        losses.named(losses.LECAM, self.lecam_form, "critic.lecam_form")
        if self.first not in ("painter", "critic"):
            raise UserError(f"critic.first must be painter or critic; found {self.first!r}")
        kinds = list(self.augmented) if isinstance(self.augmented, tuple) else [None]
        if [kind for kind in kinds if kind not in augment.KINDS or kinds.count(kind) > 1]:
            raise UserError(
                f"critic.augmented must be different ones of {', '.join(augment.KINDS)} in the "
                f"order in which they are done, as {augment.KINDS!r}; found {self.augmented!r}"
            )

    def steps(self, total: int) -> tuple[int, int]:
        """(step at which the critic begins to learn, step at which the painter begins to play)."""
        if self.weight == 0:
            return total, total
        begin = round(self.start * total)
        return begin, begin + round(self.warmup * total)


def build(game: Game, settings, *, rngs):
    """The critic; without the weights that a feature network needs, PatchGAN in its place."""
    section = dict(game.network)
    if section.get("name") == "feature_heads" and not game.features:
        report.say(
            "critic: PatchGAN, since config.critic.features names no weights of DINO ViT-S/16 "
            "(docs/data.md)"
        )
        section = dict(name="patchgan")
    context = dict(channels=settings.view.channels, rngs=rngs)
    if section.get("name") == "stylegan":
        context["size"] = settings.view.size[0]
    critic = configs.build(section, "critic.network", **context)
    if isinstance(critic, feature_heads.Discriminator):
        critic.load(*game.features.split(","), read=reader.network)
    return critic


def views(judge, game: Game, key: Array) -> tuple[Callable, Callable]:
    """The critic as it sees images while it learns, and as the painter is judged by it."""
    learning, judging = judge, judge
    if isinstance(judge, feature_heads.Discriminator):
        # running statistics for the painter: its image is judged alone
        crop = rng.use(key, rng.CROP)
        learning = functools.partial(judge, key=crop)
        judging = functools.partial(judge.evaluated, key=crop)
    if game.augmented:
        changed = functools.partial(
            augment.augment, kinds=game.augmented, key=rng.use(key, rng.AUGMENT)
        )
        learning, judging = (
            functools.partial(_through, look, changed) for look in (learning, judging)
        )
    return learning, judging


def _through(look: Callable, change: Callable, image_BHW3: Array) -> Array:
    return look(change(image_BHW3))


def critic_step(game: Game, graph, optimizer: optimizers.Optimizer) -> Callable:
    """(critic, averages, image, painted, key) -> (critic, averages, scalars)."""

    def step(critic, averages, image_BHW3, painted_BHW3, key):
        painted_BHW3 = jax.lax.stop_gradient(painted_BHW3)

        def loss(params):
            judge = parameters.merge(graph, params, critic.stats)
            look, _ = views(judge, game, rng.use(key, rng.REAL))
            other, _ = views(judge, game, rng.use(key, rng.PAINTED))
            total, seen = losses.critic_loss(
                look,
                image_BHW3,
                painted_BHW3,
                averages,
                painted_critic=other,
                loss=game.loss,
                lecam=game.lecam_form,
                lecam_weight=game.lecam,
                r1_weight=game.r1,
            )
            if game.consistency > 0:
                seen["consistency"] = 0.0
                sides = (look, rng.REAL, image_BHW3), (other, rng.PAINTED, painted_BHW3)
                for once, side, image in sides:
                    again, _ = views(judge, game, rng.use(rng.use(key, rng.AGAIN), side))
                    apart = losses.consistency(once(2 * image - 1), again(2 * image - 1))
                    seen["consistency"] += apart
                total = total + game.consistency * seen["consistency"]
            return game.critic_weight * total, seen

        (total, seen), gradients = jax.value_and_grad(loss, has_aux=True)(critic.params)
        # of logits that are infinite the hinge may still be finite; the averages would not be
        looked = total + seen["critic_real"] + seen["critic_fake"]
        critic, _ = train_state.apply_gradients(
            critic, gradients, optimizer, trained=TRUNK, loss=looked
        )
        after = losses.moved(averages, seen["critic_real"], seen["critic_fake"])
        averages = train_state.kept(critic.skipped == 0, after, averages)
        return _maintained(graph, critic, image_BHW3, painted_BHW3, key), averages, seen

    return step


def _maintained(graph, critic: train_state.TrainState, image_BHW3, painted_BHW3, key):
    """The critic after its upkeep: running statistics, spectral directions. A skip moves none."""
    judge = parameters.merge(graph, critic.params, critic.stats)
    if not isinstance(judge, feature_heads.Discriminator):
        return critic
    for side, image in ((rng.REAL, image_BHW3), (rng.PAINTED, painted_BHW3)):
        crop = rng.use(rng.use(rng.use(key, rng.UPKEEP), side), rng.CROP)
        judge.maintain(2 * image - 1, key=crop)
    moved = critic.skipped == 0
    return critic.replace(stats=train_state.kept(moved, parameters.statistics(judge), critic.stats))


def weight(
    game: Game, faithful: Array | None, pleasing: Array | None, step: Array, total: int
) -> Array:
    """Weight of the adversarial gradient, from both gradients at the last layer.

    A constant weight (limit 0) reads neither.
    """
    _, play = game.steps(total)
    value = jnp.asarray(game.weight)
    if game.limit > 0:
        value = value * losses.adaptive_weight(
            faithful, pleasing, limit=game.limit, floor=game.floor, epsilon=game.epsilon
        )
    ramp = jnp.clip((step - play + 1) / max(game.ramp * total, 1), 0, 1)
    return jnp.where(step >= play, value * ramp, 0.0)
