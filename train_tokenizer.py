"""The story of training a tokenizer, top to bottom.

python train_tokenizer.py --config configs/tokenizer/shapes.py --workdir runs/tokenizer
"""

from __future__ import annotations

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from tokgen import checkpoint, config, launch, losses, report, rng, sharding, state
from tokgen.commands import evaluate
from tokgen.critics import discriminator, perceptual
from tokgen.data import images, stream
from tokgen.interfaces import UserError
from tokgen.metrics import reconstruction
from tokgen.nn import precision
from tokgen.pretrained import reader

LAST_LAYER = ("decoder", "conv_out", "kernel")  # where the adaptive weight compares gradients


def main(settings: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Train until `settings.steps`, from wherever the work directory stands."""
    seed, steps, every = settings.seed, settings.steps, settings.report
    config.check(
        settings,
        precision=(precision.Precision, ()),
        view=(images.View, ()),
        optimizer=(state.optimizer, ("steps",)),
        critic__network=(discriminator.Discriminator, ("channels", "rngs")),
        critic__optimizer=(state.optimizer, ("steps",)),
        mesh=(sharding.make_mesh, ()),
    )
    source = config.build(settings.data, "data", split="train")
    held_out = config.build(settings.data, "data", split="held_out")
    view = config.call(images.View, settings.view, "view")
    optimizer = config.call(state.optimizer, settings.optimizer, "optimizer", steps=steps)

    def make():
        return config.tokenizer(settings, rngs=nnx.Rngs(rng.key(seed, "init")))

    layout = nnx.eval_shape(make).layout  # the whole config is built abstractly, before any work

    mesh = config.call(sharding.make_mesh, settings.mesh, "mesh")
    jax.set_mesh(mesh)
    graph, network = state.create(
        make, optimizer, mesh=mesh, strategy=settings.strategy, ema=settings.ema
    )
    networks = {"model": network}
    step_of = {"plain": plain_step(settings, graph, optimizer)}
    begin = end = steps  # of the critic's warm-up: nobody plays against it yet
    if settings.critic.weight > 0:
        begin = round(settings.critic.start * steps)
        end = begin + round(settings.critic.warmup * steps)
        critic_optimizer = config.call(
            state.optimizer, settings.critic.optimizer, "critic.optimizer", steps=steps
        )
        critic_graph, networks["critic"] = state.create(
            lambda: config.call(
                discriminator.Discriminator,
                settings.critic.network,
                "critic.network",
                channels=settings.view.channels,
                rngs=nnx.Rngs(rng.key(seed, "init", 1)),
            ),
            critic_optimizer,
            mesh=mesh,
        )
        step_of["adversarial"] = adversarial_step(
            settings, (graph, critic_graph), (optimizer, critic_optimizer), begin_play=end
        )
    lpips = jax.device_put(load_lpips(settings), sharding.replicated(mesh))

    run = checkpoint.start(
        workdir,
        settings,
        kind="tokenizer",
        layout=layout,
        classes=source.classes,
        best="l2",
        data=source.fingerprint,
    )
    networks, what = checkpoint.resume_or_start(run, networks)
    report.say(report.table(state.paths(networks["model"].params)))
    report.say(f"{what}; {len(source)} images, {layout.length} tokens each, {dict(mesh.shape)}")

    start = int(jax.device_get(networks["model"].step))
    log, stop = report.Log(workdir, step=start), launch.Stop()
    batches = stream.batches(
        source,
        view,
        seed=seed,
        batch_size=settings.batch_size,
        start=start,
        process=(jax.process_index(), jax.process_count()),
        max_bad=settings.max_bad,
    )
    with batches, report.bar(steps, initial=start, what="tokenizer") as bar:
        for step in range(start, steps):
            batch = sharding.global_batch(next(batches), mesh)
            kind = "adversarial" if step >= begin else "plain"
            with jax.transfer_guard("disallow"):
                networks, scalars = step_of[kind](networks, batch, lpips)
            bar.update()
            done = step + 1
            if done % every.scalars == 0 or done == steps:
                values = jax.device_get(scalars)
                log.scalars(done, values | {"broken_images": batches.bad})
                bar.set_postfix_str(report.figures(values, ("l1", "l2", "perceptual", "critic")))
                give_up(values, done)
            last = done == steps or bool(stop)
            if done % every.save == 0 or last:
                save(run, networks, graph, held_out, log, settings)
            if stop:
                break
    run.close()
    log.close()
    report.say(f"step {done if start < steps else start} of {steps} is saved in {workdir}")


def forward(settings, tokenizer, image_BHW3, lpips, key):
    """(weighted loss, (latents, image painted, scalars))"""
    weights = settings.loss
    latents_BPC = tokenizer.latents(image_BHW3)
    quantized = tokenizer.quantizer(latents_BPC, key=jax.random.fold_in(key, rng.QUANTIZER))
    painted_BHW3 = tokenizer.paint(quantized.latents_BPC)
    terms = losses.reconstruction(image_BHW3, painted_BHW3) | quantized.losses
    if lpips is not None:
        terms["perceptual"] = jnp.mean(lpips(2 * image_BHW3 - 1, 2 * painted_BHW3 - 1))
    missing = sorted(set(terms) - set(weights))
    if missing:
        raise UserError(f"config.loss needs a weight for {', '.join(missing)}; 0 turns a term off")
    total = sum(weights[name] * value for name, value in terms.items())
    return total, (latents_BPC, painted_BHW3, terms)


def plain_step(settings, graph, optimizer):
    """A step without critic: (networks, batch, lpips) -> (networks, scalars)."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(networks, batch, lpips):
        model = networks["model"]
        image_BHW3 = reconstruction.from_uint8(batch["image"])
        key = rng.key(settings.seed, "train", model.step)

        def loss(params):
            tokenizer = state.merge(graph, params, model.stats)
            total, (latents_BPC, _, terms) = forward(settings, tokenizer, image_BHW3, lpips, key)
            return total, (latents_BPC, terms)

        gradients, (latents_BPC, terms) = jax.grad(loss, has_aux=True)(model.params)
        model, scalars = state.apply_gradients(model, gradients, optimizer, ema=settings.ema)
        model = state.maintained(graph, model, latents_BPC, key=key)
        return networks | {"model": model}, terms | scalars

    return step


def adversarial_step(settings, graphs, optimizers, *, begin_play: int):
    """A step against the critic. Until `begin_play` only the critic learns from it.

    Two pure losses and two states: the critic's gradient stops at the image, the tokenizer's loss
    closes over the critic's parameters.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(networks, batch, lpips):
        model, critic = networks["model"], networks["critic"]
        image_BHW3 = reconstruction.from_uint8(batch["image"])
        key = rng.key(settings.seed, "train", model.step)
        judge = state.merge(graphs[1], critic.params, critic.stats)

        def pair(params):
            tokenizer = state.merge(graphs[0], params, model.stats)
            total, aux = forward(settings, tokenizer, image_BHW3, lpips, key)
            return (total, losses.adversarial(judge, aux[1])), aux

        _, pull, (latents_BPC, painted_BHW3, terms) = jax.vjp(pair, model.params, has_aux=True)
        (faithful,), (pleasing,) = pull((1.0, 0.0)), pull((0.0, 1.0))
        weight = settings.critic.weight * losses.adaptive_weight(
            functools.reduce(lambda tree, name: tree[name], LAST_LAYER, faithful),
            functools.reduce(lambda tree, name: tree[name], LAST_LAYER, pleasing),
        )
        weight = jnp.where(model.step >= begin_play, weight, 0.0)
        gradients = jax.tree.map(lambda a, b: a + weight * b, faithful, pleasing)
        model, scalars = state.apply_gradients(model, gradients, optimizers[0], ema=settings.ema)
        model = state.maintained(graphs[0], model, latents_BPC, key=key)

        def critic_loss(params):
            judge = state.merge(graphs[1], params, critic.stats)
            return losses.critic_loss(judge, image_BHW3, painted_BHW3)

        gradients, seen = jax.grad(critic_loss, has_aux=True)(critic.params)
        critic, _ = state.apply_gradients(critic, gradients, optimizers[1])
        networks = networks | {"model": model, "critic": critic}
        return networks, terms | scalars | seen | {"adversarial_weight": weight}

    return step


def load_lpips(settings):
    """The perceptual distance when weights are given; None, and said, when they are not."""
    if settings.loss.perceptual == 0:
        return None
    if not settings.perceptual:
        report.say(
            "perceptual loss: off, since config.perceptual names no weights (VGG16 and LPIPS "
            "files, docs/data.md)"
        )
        return None
    return perceptual.load(*settings.perceptual.split(","), read=reader.read)


def give_up(values, step: int) -> None:
    """Stop a run that computes nothing any more."""
    if values["skipped"] >= state.PATIENCE:
        raise UserError(
            f"{int(values['skipped'])} steps in a row up to step {step} had gradients that are not "
            "finite and were skipped; lower config.optimizer.learning_rate, or go back to an "
            "earlier checkpoint"
        )


def save(run, networks, graph, held_out, log, settings) -> None:
    """Held-out figures and a grid from the averaged weights, then a checkpoint."""
    model = networks["model"]
    step = int(jax.device_get(model.step))
    tokenizer = state.merge(graph, state.averaged(model), model.stats)
    figures, (image, painted) = evaluate.reconstruction(
        tokenizer, held_out, evaluate.view_of(settings), count=settings.held_out.images
    )
    report.say(
        f"step {step}: held out {report.figures(figures, evaluate.PIXEL_METRICS)} "
        f"({figures['images']} images)"
    )
    log.scalars(step, figures, split="held_out")
    log.image(step, "reconstructions", report.beside(image[:32], painted[:32]))
    # on the scale of the loss: what the best checkpoint is chosen by
    run.save(networks, figures | {"l2": 4 * 10 ** (-figures["psnr_db"] / 10)})


if __name__ == "__main__":
    launch.run(main, sys.modules[__name__].__doc__)
