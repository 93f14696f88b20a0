"""The tokenizer's step: the networks of a run, what a stage descends, its steps.

`gan.py` has the discriminator's step and the weight of its term.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from tokgen import losses, parameters, ranges, rng, sharding
from tokgen.backbones import perceptual
from tokgen.checkpoints import loading
from tokgen.config import building
from tokgen.interfaces import Array, PyTree, UserError
from tokgen.metrics import reconstruction
from tokgen.pretrained.formats import reader
from tokgen.tokenizers import tokenizer as tokenizers
from tokgen.training import (
    accumulation,
    gan as gans,
    optimizer as optimizers,
    safeguards,
    stages,
    train_state,
)

Graphs = Mapping[str, nnx.GraphDef]  # of "model" and, with one, of "discriminator"
Networks = dict[str, PyTree]  # "model"; with a discriminator also "discriminator" and "averages"


def create(
    settings: ml_collections.ConfigDict,
    stage: stages.Stage,
    gan: gans.GAN,
    mesh: jax.sharding.Mesh,
    *,
    discriminator: Callable[..., nnx.Module] = gans.build,
) -> tuple[Networks, Graphs, optimizers.Optimizer | None]:
    """(states by name, structures by name, the discriminator's optimizer), as they start.

    `discriminator` makes it, as `gans.build` does.
    """
    seed, steps = settings.seed, settings.steps
    train_state.average_of(settings.get("average", "muse"))
    graph, model = train_state.create(
        lambda: building.tokenizer(settings, rngs=rng.rngs(rng.key(seed, "init"))),
        stages.optimizer(settings, stage),
        mesh=mesh,
        strategy=settings.strategy,
        ema=settings.ema,
    )
    if gan.weight == 0:
        return {"model": model}, {"model": graph}, None
    optimizer = building.call(
        optimizers.optimizer,
        gan.optimizer,
        "discriminator.optimizer",
        steps=steps - gan.steps(steps)[0],
    )
    discriminator_graph, rival = train_state.create(
        lambda: discriminator(gan, settings, rngs=rng.rngs(rng.key(seed, "init", 1))),
        optimizer,
        mesh=mesh,
        strategy=settings.strategy,
    )
    averages = jax.device_put(losses.averages(), sharding.replicated(mesh))
    networks = {"model": model, "discriminator": rival, "averages": averages}
    return networks, {"model": graph, "discriminator": discriminator_graph}, optimizer


# ---------------------------------------------------------------- what a stage descends


def pixels(
    settings: ml_collections.ConfigDict,
    weights: Mapping[str, float],
    tokenizer: tokenizers.Tokenizer,
    batch: Mapping[str, Array],
    frozen: PyTree,
    step: Array,
    key: Array,
) -> tuple[Array, tuple[Array, Array, dict[str, Array], Array]]:
    """(weighted loss, (latents, reconstruction, terms, tokens)): the image itself."""
    image_BHW3 = reconstruction.from_uint8(batch["image"])
    latents_BPC = tokenizer.latents(image_BHW3)
    quantized = tokenizer.quantizer(latents_BPC, key=rng.use(key, rng.QUANTIZER))
    reconstruction_BHW3 = tokenizer.decode_unclipped(quantized.latents_BPC, cond=batch.get("text"))
    terms = losses.reconstruction(image_BHW3, reconstruction_BHW3) | quantized.losses
    for name, distance in frozen.get("perceptual", {}).items():
        terms[name] = jnp.mean(distance(2 * image_BHW3 - 1, 2 * reconstruction_BHW3 - 1))
    total = weighted(settings, terms, weights, step)
    return total, (latents_BPC, reconstruction_BHW3, terms, quantized.tokens_BLG)


def codes(
    settings: ml_collections.ConfigDict,
    weights: Mapping[str, float],
    tokenizer: tokenizers.Tokenizer,
    batch: Mapping[str, Array],
    frozen: PyTree,
    step: Array,
    key: Array,
) -> tuple[Array, tuple[Array, Array, dict[str, Array], Array]]:
    """(weighted loss, (latents, image, terms, tokens)): the codes of another tokenizer.

    TiTok's first stage, arXiv:2406.07550: their cross entropy, as `frozen["teacher"]` has them.
    """
    image_BHW3 = reconstruction.from_uint8(batch["image"])
    latents_BPC = tokenizer.latents(image_BHW3)
    quantized = tokenizer.quantizer(latents_BPC, key=rng.use(key, rng.QUANTIZER))
    logits_BPV = tokenizer.decoder.logits(quantized.latents_BPC)
    target_BP1 = frozen["teacher"].encode(image_BHW3)
    # as an index, the mark of images that were not encoded is the last code
    distance = losses.code_cross_entropy(logits_BPV, target_BP1)
    terms = {"codes": jnp.where(jnp.any(target_BP1 < 0), jnp.nan, distance)} | quantized.losses
    total = weighted(settings, terms, weights, step)
    return total, (latents_BPC, image_BHW3, terms, quantized.tokens_BLG)


OBJECTIVES = {"pixels": pixels, "codes": codes}


def weighted(
    settings: ml_collections.ConfigDict,
    terms: Mapping[str, Array],
    weights: Mapping[str, float],
    step: Array,
) -> Array:
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
    """The compiled step of a stage, with or without the discriminator: made when first needed."""

    def __init__(
        self,
        settings: ml_collections.ConfigDict,
        gan: gans.GAN,
        limits: safeguards.Limits,
        graphs: Graphs,
        discriminator_optimizer: optimizers.Optimizer | None,
        returns: int,
    ):
        """`returns`: how often the run went back to before its adversarial term."""
        self.strength = safeguards.strength(limits, returns)
        self.arguments = settings, gan, graphs, discriminator_optimizer
        self.made = {}

    def __call__(self, stage: stages.Stage, learning: bool) -> Callable:
        """(networks, batch, frozen) -> (networks, scalars, tokens).

        `learning`: whether the run has come to where the discriminator learns.
        """
        adversarial = learning and stage.objective == "pixels" and self.strength > 0
        key = (stage.begin, adversarial)
        if key not in self.made:
            settings, gan, graphs, optimizer = self.arguments
            self.made[key] = (
                adversarial_step(settings, gan, graphs, optimizer, stage, strength=self.strength)
                if adversarial
                else plain_step(settings, graphs, stage)
            )
        return self.made[key]


def plain_step(
    settings: ml_collections.ConfigDict, graphs: Graphs, stage: stages.Stage
) -> Callable:
    """A step without discriminator: (networks, batch, frozen) -> (networks, scalars, tokens)."""
    optimizer, objective = stages.optimizer(settings, stage), OBJECTIVES[stage.objective]
    weights, graph = {**settings.loss, **stage.loss}, graphs["model"]
    parts = dict(parts=settings.get("accumulate", 1), strategy=settings.strategy)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        networks: Networks, batch: Mapping[str, Array], frozen: PyTree
    ) -> tuple[Networks, dict[str, Array], Array]:
        model = networks["model"]
        key = rng.key(settings.seed, "train", model.step)

        def of_part(params, batch, key):
            def loss(params):
                tokenizer = train_state.learner(graph, model, params)
                return objective(settings, weights, tokenizer, batch, frozen, model.step, key)

            (total, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            latents_BPC, _, terms, tokens_BLG = aux
            return gradients, (total, terms), (latents_BPC, tokens_BLG)

        gradients, (total, terms), (latents_BPC, tokens_BLG) = accumulation.averaged(
            *(of_part, model.params, batch, key), **parts
        )
        model, scalars = improved(settings, stage, model, gradients, optimizer, total)
        model = upkept(stage, graph, model, latents_BPC, key)
        networks = train_state.laid(networks | {"model": model}, settings.strategy)
        return networks, terms | scalars, tokens_BLG

    return step


def adversarial_step(
    settings: ml_collections.ConfigDict,
    gan: gans.GAN,
    graphs: Graphs,
    discriminator_optimizer: optimizers.Optimizer,
    stage: stages.Stage,
    *,
    strength: float,
) -> Callable:
    """A step with the discriminator: (networks, batch, frozen) -> (networks, scalars, tokens).

    Two pure losses and two states: the discriminator's gradient stops at the image, the tokenizer's
    loss closes over the discriminator's parameters. Until the adversarial term begins its weight is
    0. Where the step of either is not finite, neither moves: a loss that is no number has no
    gradient, and one network that went on alone would be trained against another than it was.
    """
    optimizer, objective = stages.optimizer(settings, stage), OBJECTIVES[stage.objective]
    weights, graph = {**settings.loss, **stage.loss}, graphs["model"]
    parts = dict(parts=settings.get("accumulate", 1), strategy=settings.strategy)
    # the weight of gradients that are compared is known when those of all parts are: they are
    # first compared, and then taken, so that of each part one gradient is kept and summed over
    # devices; what is computed again forwards is less than what another pass backwards would be
    in_parts = parts["parts"] > 1 and gan.limit > 0
    discriminate = gans.discriminator_step(
        gan, graphs["discriminator"], discriminator_optimizer, **parts
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        networks: Networks, batch: Mapping[str, Array], frozen: PyTree
    ) -> tuple[Networks, dict[str, Array], Array]:
        names = ("model", "discriminator", "averages")
        model, discriminator, averages = (networks[name] for name in names)
        image_BHW3 = reconstruction.from_uint8(batch["image"])
        key = rng.key(settings.seed, "train", model.step)
        moves = rng.use(key, rng.DISCRIMINATOR)

        def reconstructed(params, batch, key):
            tokenizer = train_state.learner(graph, model, params)
            return objective(settings, weights, tokenizer, batch, frozen, model.step, key)

        seen = {}
        if gan.first == "discriminator":
            *_, fake_BHW3 = accumulation.averaged(
                lambda *given: ((), (), reconstructed(*given)[1][1]),
                *(model.params, batch, key),
                **parts,
                like=(),
            )
            discriminator, averages, seen = discriminate(
                discriminator, averages, image_BHW3, fake_BHW3, moves
            )
        network = parameters.merge(
            graphs["discriminator"], discriminator.params, discriminator.stats
        )
        ramp = gans.ramp(gan, strength, model.step, settings.steps)

        def forwards(params, batch, key):
            played = rng.use(rng.use(key, rng.DISCRIMINATOR), rng.TOKENIZER)
            _, logits_of = gans.views(network, gan, played)

            def shown(params):
                total, aux = reconstructed(params, batch, key)
                return (total, aux[1]), aux

            def played(fake_BHW3):
                return losses.adversarial(logits_of, fake_BHW3, loss=gan.generator_loss)

            (total, fake_BHW3), pull, aux = jax.vjp(shown, params, has_aux=True)
            generator_loss, at_image_BHW3 = jax.value_and_grad(played)(fake_BHW3)
            latents_BPC, _, terms, tokens_BLG = aux
            figures, rows = (total + generator_loss, terms), (latents_BPC, fake_BHW3, tokens_BLG)
            return (pull, at_image_BHW3), figures, rows

        whole = None
        if in_parts:
            _, compared, _ = accumulation.averaged(
                lambda *given: ((), gans.compared(*forwards(*given)[0]), ()),
                *(model.params, batch, key),
                **parts,
                like=(),
            )
            whole = gans.weighed(gan, ramp, *compared)

        def of_part(params, batch, key):
            back, figures, rows = forwards(params, batch, key)
            weight = gans.adaptive(gan, ramp, *back) if whole is None else whole
            pull, at_image_BHW3 = back
            return gans.pulled(pull, weight, at_image_BHW3), (*figures, weight), rows

        gradients, (total, terms, weight), rows = accumulation.averaged(
            *(of_part, model.params, batch, key), **parts
        )
        latents_BPC, fake_BHW3, tokens_BLG = rows
        model, scalars = improved(settings, stage, model, gradients, optimizer, total)
        model = upkept(stage, graph, model, latents_BPC, key)
        if gan.first == "tokenizer":
            discriminator, averages, seen = discriminate(
                discriminator, averages, image_BHW3, fake_BHW3, moves
            )
        moved = (model.skipped == 0) & (discriminator.skipped == 0)
        networks = networks | {
            "model": train_state.held_back(moved, model, networks["model"]),
            "discriminator": train_state.held_back(moved, discriminator, networks["discriminator"]),
            "averages": train_state.kept(moved, averages, networks["averages"]),
        }
        scalars = terms | scalars | seen | {"adversarial_weight": weight}
        scalars |= {"discriminator_skipped": discriminator.skipped}
        if discriminator.skips is not None:
            scalars |= {"discriminator_skips": discriminator.skips}
        return train_state.laid(networks, settings.strategy), scalars, tokens_BLG

    return step


def improved(
    settings: ml_collections.ConfigDict,
    stage: stages.Stage,
    model: train_state.TrainState,
    gradients: PyTree,
    optimizer: optimizers.Optimizer,
    loss: Array,
) -> tuple[train_state.TrainState, dict[str, Array]]:
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


def upkept(
    stage: stages.Stage,
    graph: nnx.GraphDef,
    model: train_state.TrainState,
    latents_BPC: Array,
    key: Array,
) -> train_state.TrainState:
    """The model after its quantizer's upkeep, where the quantizer learns."""
    if not stages.learns(stage, "quantizer"):
        return model
    return train_state.maintained(graph, model, latents_BPC, key=key)


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
        frozen["teacher"] = loading.load_tokenizer(settings.teacher).module
    return frozen


def frozen_shapes(settings, plan, teacher: nnx.Module | None = None) -> dict:
    """What `load_frozen` gives where the published files are named, its arrays as shapes."""
    frozen = {"perceptual": {name: perceptual.shapes(name) for name in _distances(settings, plan)}}
    return frozen if teacher is None else frozen | {"teacher": teacher}


def _distances(settings, plan) -> dict[str, tuple[str, ...]]:
    """Weight files of every perceptual distance that some stage gives a weight; () where none."""
    needed = {name for stage in plan for name, w in {**settings.loss, **stage.loss}.items() if w}
    given = settings.get("perceptual", {})
    return {
        name: tuple(filter(None, given.get(name, "").split(",")))
        for name in perceptual.known()
        if name in needed
    }


def adopt(model: train_state.TrainState, teacher: nnx.Module) -> train_state.TrainState:
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
        # copies, where the model's own lie: the step donates its arrays, the teacher teaches on
        decoder[name] = jax.tree.map(_copied, tree, decoder[name])
    params = {**model.params, "decoder": decoder}
    ema = None if model.ema is None else jax.tree.map(jnp.copy, params)
    return model.replace(params=params, ema=ema)


def _copied(leaf: jax.Array, own: jax.Array) -> jax.Array:
    return jax.device_put(jnp.copy(leaf), own.sharding)
