"""The story of training a generator, top to bottom.

    python train_generator.py --config configs/generator/shapes.py --workdir runs/generator \\
        --config.data.tokens=runs/tokens
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from tokgen import distributed, metrics_log, parameters, report, rng, sharding
from tokgen.checkpoints import checkpoint, loading, run as runs
from tokgen.config import building, migration
from tokgen.data import datasets, loader, scan, token_header
from tokgen.evaluation import evaluators, validation
from tokgen.interfaces import TokenLayout, UserError
from tokgen.sampling import presets
from tokgen.training import (
    dry_run,
    fields,
    generator_step,
    launch,
    optimizer as optimizers,
    pace as paces,
    trace as traces,
    train_state,
)

WithWhat = tuple[Sequence, loading.Loaded]  # the held-out source, the tokenizer
SHOWN = ("nats_per_token", "token_accuracy", *paces.SHOWN)


def main(request: launch.Request) -> None:
    """Train until `settings.steps`, from wherever the work directory stands."""
    settings, workdir, back = request.settings, request.workdir, request.back
    fields.check_generator(settings)
    trace = traces.Trace(settings.get("profile", ()), workdir)
    mesh = building.call(sharding.make_mesh, settings.mesh, "mesh")
    jax.set_mesh(mesh)  # before anything is loaded: all lies over one
    seed, steps, every = settings.seed, settings.steps, settings.report
    source, held_out, tokenizer = read(settings.data, runs.classes(workdir, back))
    told = settings.data if settings.data.tokens else tokenizer.config.get("data", {})
    datasets.tell(
        datasets.called(told, settings.data.get("images", "")), train=source, held_out=held_out
    )
    layout, classes = TokenLayout.from_json(source.layout), source.classes
    codec = tokenizer.module.quantizer
    optimizer = building.call(optimizers.optimizer, settings.optimizer, "optimizer", steps=steps)

    def make():
        rngs = rng.rngs(rng.key(seed, "init"))
        return building.generator(settings, layout, len(classes), rngs=rngs)

    # all that will run is traced with shapes, before any work
    shapes, sampler = dry_run.generator(
        *(settings, layout, len(classes), mesh, codec),
        text=source.text_shape,
    )
    if sampler.guidance and classes and not shapes.label_drop:
        report.say(
            "the default preset is guided, but generator.label_drop=0 never trains what it is "
            "guided away from: set label_drop=0.1, or the preset's weight to 1"
        )
    material = evaluators.Material(
        settings, dict(train=source, held_out=held_out), tokenizer, cond=shapes.cond
    )
    evaluating = evaluators.made(material)
    graph, network = train_state.create(
        make, optimizer, mesh=mesh, strategy=settings.strategy, ema=settings.ema
    )
    distributed.check_alike(
        {"data": source.fingerprint, "held-out data": held_out.fingerprint}
        | {"classes": classes, "tokenizer": tokenizer.fingerprint}
    )
    run = runs.start(
        workdir,
        settings,
        kind="generator",
        layout=layout,
        classes=classes,
        best="nats_per_token",
        data=source.fingerprint,
        held_out=held_out.fingerprint,
        earlier=source.earlier,
        accept=request.accept,
        fields=fields.names(fields.GeneratorFields),
        tokenizer=checkpoint.reference(tokenizer.step, workdir)
        | {"fingerprint": tokenizer.fingerprint},
        tokens=checkpoint.reference(source.path, workdir) if settings.data.tokens else None,
    )
    if back is not None:
        runs.go_back(run, back)
    networks, what = runs.resume_or_start(run, {"model": network})
    network = networks["model"]
    report.say(report.table(parameters.paths(network.params)))
    report.say(f"{what}; {len(source)} images of {layout.length} tokens, {sharding.told(mesh)}")
    step_of = generator_step.step(settings, graph, optimizer)

    distributed.first(
        scan.before,
        source,
        held_out,
        validation.spread(len(held_out), settings.held_out.images),
        channels=tokenizer.config.view.channels,
        max_bad=settings.get("max_bad", 1e-3),
    )

    start = done = int(jax.device_get(network.step))
    measured = runs.is_measured(run, start)
    how = dict(is_held=run.is_held, told=migration.metrics)
    log, stop = metrics_log.opened(workdir, step=start, measured=measured, **how), launch.Stop()
    with_what = held_out, tokenizer

    def due(step: int) -> bool:
        return step % every.save == 0 or step == steps

    evaluators.check_room(material, averaged(graph, network))  # beside all that is trained
    if what.startswith("started from") and settings.held_out.samples:
        show_imported(settings, with_what, log)
    if start and due(start) and not measured:  # it was saved, and the run ended while measuring
        run.note(start, measure(network, graph, with_what, log, settings))
    if asking := evaluators.left(evaluating, start, steps, log):
        evaluators.run(asking, averaged(graph, network), start, log)
    batches = loader.batches(
        source,
        seed=seed,
        batch_size=settings.batch_size,
        start=start,
        rows=sharding.rows_here(settings.batch_size, mesh),
        max_bad=settings.get("max_bad", 1e-3),
    )
    with (
        batches,
        report.bar(steps, initial=start, what="generator") as bar,
        contextlib.ExitStack() as ends,
    ):
        pace = paces.Pace(settings.batch_size, list(mesh.devices.flat))
        late = []  # the figures of a step, until the next is under way

        def tell() -> None:
            while late:
                step, scalars, seen, counted = late.pop()
                values = jax.device_get(scalars) | seen
                values |= pace.figures(counted)
                log.scalars(step, values)
                bar.set_postfix_str(report.metrics(values, SHOWN))
                train_state.give_up(values, step)

        ends.callback(log.keep)  # also after an error
        if not distributed.many():  # of many, others may have ended, and their part of a step
            ends.callback(tell)
        ends.callback(trace.stop)
        trace.told(done)
        while done < steps:
            trace.before(done)
            with run.rescuing({"model": network}):
                batch = sharding.global_batch(pace.waits(next, batches), mesh)
            with jax.transfer_guard("disallow"):
                if "image" in batch:
                    batch["tokens"] = source.encode(batch.pop("image"))
                network, scalars = pace.calls(step_of, network, batch, codec)
            tell()
            bar.update()
            done += 1
            if done % every.scalars == 0 or done == steps:
                with run.rescuing({"model": network}):
                    broken = batches.agree()
                seen = {"images_seen": done * settings.batch_size, "broken_images": broken}
                late.append((done, scalars, seen, pace.counted()))
            trace.after(done, scalars)
            asked, asking = stop.agreed(), evaluators.due(evaluating, done, steps)
            if due(done) or asked or asking:  # saved before it is measured, which may end the run
                tell()
                log.keep()
                run.save({"model": network})
            if asked:
                break
            if asking:
                with run.rescuing({"model": network}):
                    evaluators.run(asking, averaged(graph, network), done, log)
                pace.again()
            if due(done):
                with run.rescuing({"model": network}):
                    figures = measure(network, graph, with_what, log, settings)
                run.note(done, figures)
                pace.again()
    run.close()
    log.close()
    seen = f"{done * settings.batch_size:,} images seen"
    stop.end(f"step {done} of {steps} ({seen}) is saved in {workdir}")


def read(data, order):
    """(training, held-out source, tokenizer): token shards, or images that are encoded here.

    The classes of images are in `order`, where they are the same: that of the run that goes on.
    """
    if data.tokens:
        source, held_out = (datasets.generator_source(data, s) for s in token_header.SPLITS)
        made_by = source.header["tokenizer"]
        # nothing is encoded here: no device has an encoder to hold
        tokenizer = loading.load_decoder(data.tokenizer or made_by["path"])
        loading.check_tokens(tokenizer, source.header, source.path)
        return source, held_out, tokenizer
    if not data.tokenizer:
        raise UserError(
            "config.data.tokens names no token shards; make them with tokgen pretokenize and give "
            "the folder as --config.data.tokens=DIR. Or name a tokenizer, --config.data.tokenizer="
            "CKPT, which then encodes its own data, or the folder --config.data.images=DIR"
        )
    # in float32, as shards are made
    tokenizer = loading.load_tokenizer(data.tokenizer, compute="float32")
    parts = (datasets.generator_source(data, s, tokenizer, order) for s in token_header.SPLITS)
    return *parts, tokenizer


def averaged(graph: nnx.GraphDef, network: train_state.TrainState) -> nnx.Module:
    """The generator with its averaged weights, as it is measured."""
    return parameters.merge(graph, train_state.averaged(network), network.stats)


def measure(
    network: train_state.TrainState,
    graph: nnx.GraphDef,
    with_what: WithWhat,
    log: metrics_log.AnyLog,
    settings: ml_collections.ConfigDict,
) -> dict[str, float]:
    """Held-out nats and a sample grid from the averaged weights of a step that is saved.

    No nats where nothing is held out: then the latest step is the best.
    """
    held_out, tokenizer = with_what
    step = int(jax.device_get(network.step))
    generator = averaged(graph, network)
    codec = tokenizer.module.quantizer
    figures = {}
    if len(held_out):
        count = settings.held_out.images
        figures = validation.likelihood(generator, codec, held_out, count=count)
        shown = report.metrics(figures, ("nats_per_token", "nats_error"))
        report.say(f"step {step}: held out {shown}")
        log.scalars(step, figures, split="held_out")
    text = generator.cond == "text"  # whose samples are of held-out texts
    if settings.held_out.samples and (len(held_out) or not text):
        preset = presets.named(settings.presets.to_dict(), "default")
        image_HW3 = grid(generator, preset, held_out.classes, with_what, settings)
        log.image(step, "samples", image_HW3)
    log.keep()
    return figures


def show_imported(
    settings: ml_collections.ConfigDict,
    with_what: WithWhat,
    log: metrics_log.AnyLog,
) -> None:
    """What the model that a run starts from could do: its own classes, its own preset."""
    imported = loading.load_generator(settings.init_from)
    distributed.check_alike({"init_from": imported.fingerprint})
    own = imported.config.get("presets", ml_collections.ConfigDict()).to_dict()
    preset = presets.named(own, "default" if "default" in own else "no_guidance")
    image_HW3 = grid(imported.module, preset, imported.classes, with_what, settings)
    log.image(0, "imported", image_HW3)


def grid(
    generator: nnx.Module,
    preset: Mapping[str, Any],
    classes: Sequence[str],
    with_what: WithWhat,
    settings: ml_collections.ConfigDict,
) -> np.ndarray:
    """Samples of the first ten classes, or of the first ten held-out texts, a row for each."""
    held_out, tokenizer = with_what
    _, image_HW3 = evaluators.grid(
        *(generator, preset, classes, held_out, tokenizer.module),
        columns=settings.held_out.samples,
        seed=settings.seed,
    )
    return image_HW3


if __name__ == "__main__":
    launch.run(main, fields.check_generator, sys.modules[__name__].__doc__)
