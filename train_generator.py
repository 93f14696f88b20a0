"""The story of training a generator, top to bottom.

    python train_generator.py --config configs/generator/shapes.py --workdir runs/generator \\
        --config.data.tokens=runs/tokens
"""

from __future__ import annotations

import functools
import pathlib
import sys

import jax
import ml_collections
import numpy as np
from flax import nnx

from tokgen import checkpoint, config, launch, report, rng, sharding, state
from tokgen.commands import evaluate, sample
from tokgen.data import stream, tokens
from tokgen.interfaces import TokenBatch, TokenLayout, UserError
from tokgen.nn import precision, transformer
from tokgen.sampling import decode, presets


def main(settings: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Train until `settings.steps`, from wherever the work directory stands."""
    seed, steps, every = settings.seed, settings.steps, settings.report
    config.check(
        settings,
        precision=(precision.Precision, ()),
        generator__rates=(transformer.Rates, ()),
        optimizer=(state.optimizer, ("steps",)),
        mesh=(sharding.make_mesh, ()),
    )
    if not settings.data.tokens:
        raise UserError(
            "config.data.tokens names no token shards; make them with tokgen pretokenize and give "
            "the folder as --config.data.tokens=DIR"
        )
    source = tokens.Source(settings.data.tokens, split="train")
    held_out = tokens.Source(settings.data.tokens, split="held_out")
    layout, classes = TokenLayout.from_json(source.layout), source.classes
    made_by = source.header["tokenizer"]
    tokenizer = checkpoint.load_tokenizer(settings.data.tokenizer or made_by["path"])
    checkpoint.check_tokenizer(tokenizer, made_by["fingerprint"], f"token set {source.path}")
    codec = tokenizer.module.quantizer
    optimizer = config.call(state.optimizer, settings.optimizer, "optimizer", steps=steps)

    def make():
        rngs = nnx.Rngs(rng.key(seed, "init"))
        return config.generator(settings, layout, len(classes), rngs=rngs)

    plan = decode.steps(nnx.eval_shape(make))  # built abstractly, before any work
    sampler = presets.sampler(presets.named(settings.presets.to_dict(), "default"), plan)

    mesh = config.call(sharding.make_mesh, settings.mesh, "mesh")
    jax.set_mesh(mesh)
    graph, network = state.create(
        make, optimizer, mesh=mesh, strategy=settings.strategy, ema=settings.ema
    )
    run = checkpoint.start(
        workdir,
        settings,
        kind="generator",
        layout=layout,
        classes=classes,
        best="nats_per_token",
        data=source.fingerprint,
        tokenizer=checkpoint.reference(tokenizer.step, workdir)
        | {"fingerprint": tokenizer.fingerprint},
        tokens=checkpoint.reference(source.path, workdir),
    )
    networks, what = checkpoint.resume_or_start(run, {"model": network})
    network = networks["model"]
    report.say(report.table(state.paths(network.params)))
    report.say(f"{what}; {len(source)} images of {layout.length} tokens, {dict(mesh.shape)}")
    step_of = train_step(settings, graph, optimizer)

    start = int(jax.device_get(network.step))
    log, stop = report.Log(workdir, step=start), launch.Stop()
    batches = stream.batches(
        source,
        seed=seed,
        batch_size=settings.batch_size,
        start=start,
        process=(jax.process_index(), jax.process_count()),
    )
    with batches, report.bar(steps, initial=start, what="generator") as bar:
        for step in range(start, steps):
            batch = sharding.global_batch(next(batches), mesh)
            with jax.transfer_guard("disallow"):
                network, scalars = step_of(network, batch, codec)
            bar.update()
            done = step + 1
            if done % every.scalars == 0 or done == steps:
                values = jax.device_get(scalars)
                log.scalars(done, values)
                bar.set_postfix_str(report.figures(values, ("nats_per_token", "token_accuracy")))
                give_up(values, done)
            last = done == steps or bool(stop)
            if done % every.save == 0 or last:
                save(run, network, graph, (held_out, tokenizer, sampler, classes), log, settings)
            if stop:
                break
    run.close()
    log.close()
    report.say(f"step {done if start < steps else start} of {steps} is saved in {workdir}")


def train_step(settings, graph, optimizer):
    """(network, batch, codec) -> (network, scalars)."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(network, batch, codec):
        key = rng.key(settings.seed, "train", network.step)
        batch = TokenBatch(batch["tokens"], batch["label"])

        def loss(params):
            generator = state.merge(graph, params, network.stats)
            return generator.loss(batch, codec, step=network.step, key=key)

        gradients, terms = jax.grad(loss, has_aux=True)(network.params)
        network, scalars = state.apply_gradients(network, gradients, optimizer, ema=settings.ema)
        return network, terms | scalars

    return step


def give_up(values, step: int) -> None:
    """Stop a run that computes nothing any more."""
    if values["skipped"] >= state.PATIENCE:
        raise UserError(
            f"{int(values['skipped'])} steps in a row up to step {step} had gradients that are not "
            "finite and were skipped; lower config.optimizer.learning_rate, or go back to an "
            "earlier checkpoint"
        )


def save(run, network, graph, with_what, log, settings) -> None:
    """Held-out nats and a sample grid from the averaged weights, then a checkpoint."""
    held_out, tokenizer, sampler, classes = with_what
    step = int(jax.device_get(network.step))
    generator = state.merge(graph, state.averaged(network), network.stats)
    codec = tokenizer.module.quantizer
    figures = evaluate.likelihood(generator, codec, held_out, count=settings.held_out.images)
    report.say(f"step {step}: held out {report.figures(figures, ('nats_per_token', 'nats_error'))}")
    log.scalars(step, figures, split="held_out")
    if settings.held_out.samples:
        shown = min(max(len(classes), 1), 10)
        label_N = np.repeat(np.arange(shown, dtype=np.int32), settings.held_out.samples)
        _, image_NHW3 = sample.draw(
            generator, tokenizer.module, label_N, sampler, seed=settings.seed, batch=len(label_N)
        )
        log.image(step, "samples", report.grid(image_NHW3, settings.held_out.samples, scale=2))
    run.save({"model": network}, figures)


if __name__ == "__main__":
    launch.run(main, sys.modules[__name__].__doc__)
