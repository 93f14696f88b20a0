"""The painter's side of training a tokenizer: its networks, what a stage descends, its steps.

The painter is the tokenizer as its critic sees it; `adversary.py` is the other side of the game.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import losses, parameters, ranges, rng, sharding
from tokgen.backbones import perceptual
from tokgen.checkpoints import checkpoint
from tokgen.config import building
from tokgen.interfaces import UserError
from tokgen.metrics import reconstruction
from tokgen.pretrained.formats import reader
from tokgen.training import gan, optimizer as optimizers, stages, train_state

LAST_LAYER = ("conv_out", "kernel")  # of the decoder: where the adaptive weight compares gradients


def create(settings, stage, game, mesh):
    """(states by name, structures by name, the critic's optimizer), as they start."""
    seed, steps = settings.seed, settings.steps
    train_state.average_of(settings.get("average", "muse"))
    graph, model = train_state.create(
        lambda: building.tokenizer(settings, rngs=nnx.Rngs(rng.key(seed, "init"))),
        stages.optimizer(settings, stage),
        mesh=mesh,
        strategy=settings.strategy,
        ema=settings.ema,
    )
    if game.weight == 0:
        return {"model": model}, {"model": graph}, None
    optimizer = building.call(
        optimizers.optimizer, game.optimizer, "critic.optimizer", steps=steps - game.steps(steps)[0]
    )
    critic_graph, critic = train_state.create(
        lambda: gan.build(game, settings, rngs=nnx.Rngs(rng.key(seed, "init", 1))),
        optimizer,
        mesh=mesh,
    )
    averages = jax.device_put(losses.averages(), sharding.replicated(mesh))
    networks = {"model": model, "critic": critic, "averages": averages}
    return networks, {"model": graph, "critic": critic_graph}, optimizer


# ---------------------------------------------------------------- what a stage descends


def pixels(settings, weights, tokenizer, batch, frozen, step):
    """(weighted loss, (latents, image painted, terms, tokens)): the image itself."""
    image_BHW3 = reconstruction.from_uint8(batch["image"])
    latents_BPC = tokenizer.latents(image_BHW3)
    key = rng.use(rng.key(settings.seed, "train", step), rng.QUANTIZER)
    quantized = tokenizer.quantizer(latents_BPC, key=key)
    painted_BHW3 = tokenizer.paint(quantized.latents_BPC, cond=batch.get("text"))
    terms = losses.reconstruction(image_BHW3, painted_BHW3) | quantized.losses
    for name, distance in frozen.get("perceptual", {}).items():
        terms[name] = jnp.mean(distance(2 * image_BHW3 - 1, 2 * painted_BHW3 - 1))
    total = weighted(settings, terms, weights, step)
    return total, (latents_BPC, painted_BHW3, terms, quantized.tokens_BLG)


def codes(settings, weights, tokenizer, batch, frozen, step):
    """The same of TiTok's first stage: what another tokenizer writes for the image."""
    image_BHW3 = reconstruction.from_uint8(batch["image"])
    latents_BPC = tokenizer.latents(image_BHW3)
    key = rng.use(rng.key(settings.seed, "train", step), rng.QUANTIZER)
    quantized = tokenizer.quantizer(latents_BPC, key=key)
    logits_BPV = tokenizer.decoder.logits(quantized.latents_BPC)
    target_BP1 = frozen["teacher"].encode(image_BHW3)
    # as an index, the mark of images that were not encoded is the last code
    distance = losses.code_cross_entropy(logits_BPV, target_BP1)
    terms = {"codes": jnp.where(jnp.any(target_BP1 < 0), jnp.nan, distance)} | quantized.losses
    total = weighted(settings, terms, weights, step)
    return total, (latents_BPC, image_BHW3, terms, quantized.tokens_BLG)


OBJECTIVES = {"pixels": pixels, "codes": codes}


def weighted(settings, terms, weights, step):
    """The sum of the terms; each must have a weight, if it is 0.

    `config.anneal` names terms that begin stronger: name=(factor, share of the run over which the
    factor falls to 1), as the entropies of MaskBit do.
    """
    anneal = settings.get("anneal", {})
    missing = sorted(set(terms) - set(weights))
    if missing:
        raise UserError(f"config.loss needs a weight for {', '.join(missing)}; 0 turns a term off")
    total = 0.0
    for name, value in terms.items():
        factor, share = anneal.get(name, (1.0, 1.0))
        left = jnp.clip(1 - step / (share * settings.steps), 0, 1)
        total = total + weights[name] * (1 + (factor - 1) * left) * value
    return total


# ---------------------------------------------------------------- steps


class Steps:
    """The compiled step of a stage, with or without the critic: made when first needed."""

    def __init__(self, settings, game, limits, graphs, critic_optimizer, returns: int):
        self.strength = 0.0 if returns >= limits.returns else 0.5**returns
        self.arguments = settings, game, graphs, critic_optimizer
        self.made = {}

    def __call__(self, stage: stages.Stage, playing: bool):
        """(networks, batch, frozen) -> (networks, scalars, tokens)."""
        playing = playing and stage.objective == "pixels" and self.strength > 0
        key = (stage.begin, playing)
        if key not in self.made:
            make = adversarial_step if playing else plain_step
            options = {"strength": self.strength} if playing else {}
            self.made[key] = make(*self.arguments, stage, **options)
        return self.made[key]


def plain_step(settings, game, graphs, critic_optimizer, stage):
    """A step without critic: (networks, batch, frozen) -> (networks, scalars, tokens)."""
    optimizer, objective = stages.optimizer(settings, stage), OBJECTIVES[stage.objective]
    weights, graph = {**settings.loss, **stage.loss}, graphs["model"]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(networks, batch, frozen):
        model = networks["model"]
        key = rng.key(settings.seed, "train", model.step)

        def loss(params):
            tokenizer = parameters.merge(graph, params, model.stats)
            return objective(settings, weights, tokenizer, batch, frozen, model.step)

        (total, aux), gradients = jax.value_and_grad(loss, has_aux=True)(model.params)
        latents_BPC, _, terms, tokens_BLG = aux
        model, scalars = improved(settings, stage, model, gradients, optimizer, total)
        model = upkept(stage, graph, model, latents_BPC, key)
        return networks | {"model": model}, terms | scalars, tokens_BLG

    return step


def adversarial_step(settings, game, graphs, critic_optimizer, stage, *, strength: float):
    """A step against the critic. Until the game begins only the critic learns from it.

    Two pure losses and two states: the critic's gradient stops at the image, the tokenizer's loss
    closes over the critic's parameters. Where the step of either is not finite, neither moves: an
    opinion that is no number has no weight, and a painter without one would play another game.
    """
    optimizer, objective = stages.optimizer(settings, stage), OBJECTIVES[stage.objective]
    weights, graph = {**settings.loss, **stage.loss}, graphs["model"]
    move_critic = gan.critic_step(game, graphs["critic"], critic_optimizer)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(networks, batch, frozen):
        model, critic, averages = (networks[n] for n in ("model", "critic", "averages"))
        image_BHW3 = reconstruction.from_uint8(batch["image"])
        key = rng.key(settings.seed, "train", model.step)
        moves = rng.use(key, rng.CRITIC)

        def painted(params):
            tokenizer = parameters.merge(graph, params, model.stats)
            return objective(settings, weights, tokenizer, batch, frozen, model.step)

        seen = {}
        if game.first == "critic":
            painted_BHW3 = painted(model.params)[1][1]
            critic, averages, seen = move_critic(critic, averages, image_BHW3, painted_BHW3, moves)
        judge = parameters.merge(graphs["critic"], critic.params, critic.stats)
        _, look = gan.views(judge, game, rng.use(moves, rng.PAINTER))

        def pair(params):
            total, aux = painted(params)
            return (total, losses.adversarial(look, aux[1], loss=game.painter)), aux

        (total, opinion), pull, aux = jax.vjp(pair, model.params, has_aux=True)
        latents_BPC, painted_BHW3, terms, tokens_BLG = aux
        gradients, weight = together(game, strength, pull, model.step, settings.steps)
        model, scalars = improved(settings, stage, model, gradients, optimizer, total + opinion)
        model = upkept(stage, graph, model, latents_BPC, key)
        if game.first == "painter":
            critic, averages, seen = move_critic(critic, averages, image_BHW3, painted_BHW3, moves)
        moved = (model.skipped == 0) & (critic.skipped == 0)
        networks = networks | {
            "model": train_state.held_back(moved, model, networks["model"]),
            "critic": train_state.held_back(moved, critic, networks["critic"]),
            "averages": train_state.kept(moved, averages, networks["averages"]),
        }
        scalars = terms | scalars | seen | {"adversarial_weight": weight}
        scalars |= {"critic_skipped": critic.skipped}
        scalars |= {} if critic.skips is None else {"critic_skips": critic.skips}
        return networks, scalars, tokens_BLG

    return step


def together(game, strength, pull, step, total):
    """(gradient of the loss and the weighted game, that weight); `pull` as of `jax.vjp`."""
    if game.limit == 0:  # constant: known before the gradients, so one pass backwards does
        weight = strength * gan.weight(game, None, None, step, total)
        return pull((1.0, weight))[0], weight
    (faithful,), (pleasing,) = pull((1.0, 0.0)), pull((0.0, 1.0))
    weight = strength * gan.weight(game, last_layer(faithful), last_layer(pleasing), step, total)
    return jax.tree.map(lambda a, b: a + weight * b, faithful, pleasing), weight


def improved(settings, stage, model, gradients, optimizer, loss):
    """(model, scalars) after the optimizer; what the stage does not train stays."""
    average = settings.get("average", "muse")
    return train_state.apply_gradients(
        model,
        gradients,
        optimizer,
        ema=settings.ema,
        average=average,
        trained=stage.train,
        loss=loss,
    )


def upkept(stage, graph, model, latents_BPC, key):
    """The model after its quantizer's upkeep, where the quantizer learns."""
    if not stages.learns(stage, "quantizer"):
        return model
    return train_state.maintained(graph, model, latents_BPC, key=key)


def last_layer(gradients):
    """The gradient at the last layer of whatever paints the pixels."""
    tree = gradients["decoder"]
    for name in ("pixels", "head"):  # of a decoder in two parts; of a transformer
        tree = tree.get(name, tree)
    return functools.reduce(lambda tree, name: tree[name], LAST_LAYER, tree)


# ---------------------------------------------------------------- what is not trained


def check_frozen(settings, plan) -> None:
    """An error that lists the files that the losses of a plan need and the config does not name."""
    problems = []
    for name, paths in _distances(settings, plan).items():
        lost = [path for path in paths if not os.path.exists(path)]
        if not paths:
            problems.append(
                f"loss.{name} has a weight, and perceptual.{name} names no weight files: give "
                f"--config.perceptual.{name}=FILE (docs/data.md), or train without it, "
                f"--config.loss.{name}=0"
            )
        elif lost:
            problems.append(f"perceptual.{name} names {', '.join(lost)}; nothing is there")
    if any(stage.objective == "codes" for stage in plan) and not settings.get("teacher"):
        problems.append(
            "a stage of config.stages learns another tokenizer's codes: config.teacher must "
            "name its checkpoint; import MaskGIT's VQGAN with tokgen import, or train "
            "configs/tokenizer/maskgit_vqgan.py"
        )
    ranges.refuse(problems)


def load_frozen(settings, plan) -> dict:
    """Feature networks by the name of their loss; the teacher of a stage."""
    check_frozen(settings, plan)
    frozen = {"perceptual": {}}
    for name, files in _distances(settings, plan).items():
        frozen["perceptual"][name] = perceptual.build({name: (1.0, files)}, read=reader.network)
    if any(stage.objective == "codes" for stage in plan):
        frozen["teacher"] = checkpoint.load_tokenizer(settings.teacher).module
    return frozen


def _distances(settings, plan) -> dict[str, tuple[str, ...]]:
    """Weight files of every perceptual distance that some stage gives a weight; () where none."""
    needed = {name for stage in plan for name, w in {**settings.loss, **stage.loss}.items() if w}
    given = settings.get("perceptual", {})
    return {
        name: tuple(filter(None, given.get(name, "").split(",")))
        for name in perceptual.known()
        if name in needed
    }


def adopt(graph, model: train_state.TrainState, teacher) -> train_state.TrainState:
    """The model with the teacher's decoder and codebook as its pixel decoder, as TiTok starts."""
    _, theirs, _ = parameters.split(teacher)
    if "codebook" not in theirs.get("quantizer", {}):
        raise UserError(
            "config.teacher must be a tokenizer with a learned codebook, such as MaskGIT's VQGAN; "
            "found one without"
        )
    decoder = dict(model.params["decoder"])
    taken = {"pixels": theirs["decoder"], "codebook": theirs["quantizer"]["codebook"]}
    for name, tree in taken.items():
        if jax.tree.map(jnp.shape, decoder[name]) != jax.tree.map(jnp.shape, tree):
            raise UserError(
                f"config.decoder.{name} and the teacher's differ in size: give config.decoder the "
                "widths, blocks and codebook of the teacher"
            )
        # copies: the step donates its arrays, and the teacher goes on teaching
        decoder[name] = jax.tree.map(jnp.copy, tree)
    params = {**model.params, "decoder": decoder}
    ema = None if model.ema is None else jax.tree.map(jnp.copy, params)
    return model.replace(params=params, ema=ema)
