"""The story of training a tokenizer, top to bottom.

python train_tokenizer.py --config configs/tokenizer/shapes.py --workdir runs/tokenizer
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Sequence

import jax
import ml_collections
from flax import nnx

from tokgen import distributed, image_grid, metrics_log, parameters, report, sharding
from tokgen.checkpoints import checkpoint, manifest, run as runs
from tokgen.config import building, migration
from tokgen.data import datasets, loader, scan, views
from tokgen.evaluation import evaluators, validation
from tokgen.interfaces import UserError
from tokgen.training import (
    dry_run,
    fields,
    gan as gans,
    launch,
    pace as paces,
    safeguards,
    stages,
    tokenizer_step,
    trace as traces,
    train_state,
)

SHOWN = ("l1", "l2", "codes", "lpips", "discriminator_loss", "usage", *paces.SHOWN)


def main(request: launch.Request) -> None:
    """Train until `settings.steps`, from wherever the work directory stands."""
    settings, workdir, back = request.settings, request.workdir, request.back
    fields.check_tokenizer(settings)
    trace = traces.Trace(settings.get("profile", ()), workdir)
    mesh = building.call(sharding.make_mesh, settings.mesh, "mesh")
    jax.set_mesh(mesh)  # before anything is loaded: all lies over one
    seed, steps, every = settings.seed, settings.steps, settings.report
    plan = stages.plan(settings)
    gan = building.call(gans.GAN, settings.discriminator, "discriminator")
    limits = building.call(safeguards.Limits, settings.get("safeguards", {}), "safeguards")
    # classes in the order of the run that goes on; a tokenizer needs none
    known = dict(order=runs.classes(workdir, back), doubtful="drop")
    source = building.build(settings.data, "data", split="train", **known)
    held_out = building.build(settings.data, "data", split="held_out", **known)
    datasets.tell(datasets.called(settings.data), train=source, held_out=held_out)
    view = building.call(views.View, settings.view, "view")
    begin, play = gan.steps(steps)

    sharding.check_batch(settings.batch_size, mesh, parts=settings.get("accumulate", 1))
    frozen = tokenizer_step.load_frozen(settings, plan)
    # all that will run is traced with shapes, before any work
    layout = dry_run.tokenizer(settings, mesh, frozen, text=source.text_shape).layout
    distributed.check_alike(
        {"data": source.fingerprint, "held-out data": held_out.fingerprint}
        | {"classes": source.classes}
    )
    if distributed.many():  # their files may lie on a disk of each host
        arrays = manifest.digest(manifest.of(parameters.paths(frozen)))
        distributed.check_alike({"networks that are not trained": arrays})
    evaluating = evaluators.made(
        evaluators.Material(settings, dict(train=source, held_out=held_out))
    )
    run = runs.start(
        workdir,
        settings,
        kind="tokenizer",
        layout=layout,
        classes=source.classes,
        best="l2",
        data=source.fingerprint,
        held_out=held_out.fingerprint,
        earlier=source.earlier,
        accept=request.accept,
        fields=fields.names(fields.TokenizerFields),
        kept=(play,),
    )
    returns = safeguards.returned(workdir)
    if back is not None:
        runs.go_back(run, back)
    elif safeguards.unsettled(workdir):
        runs.drop_after(run, play)
    if safeguards.unsettled(workdir):
        safeguards.settle(workdir)
    frozen = jax.device_put(frozen, sharding.replicated(mesh))
    # what a checkpoint holds is of the stage that made its last step
    made = stages.at(plan, max((runs.latest(run) or 0) - 1, 0))
    networks, graphs, discriminator_optimizer = tokenizer_step.create(settings, made, gan, mesh)
    graph = graphs["model"]

    networks, what = runs.resume_or_start(run, networks)
    if what.startswith("started") and "teacher" in frozen:
        networks["model"] = tokenizer_step.adopt(networks["model"], frozen["teacher"])
    report.say(report.table(parameters.paths(networks["model"].params)))
    length = f"{layout.length} tokens" if layout else "continuous latents"
    report.say(f"{what}; {len(source)} images, {length} each, {sharding.told(mesh)}")

    distributed.first(
        scan.before,
        source,
        held_out,
        validation.spread(len(held_out), settings.held_out.images),
        channels=view.channels,
        max_bad=settings.max_bad,
    )

    start = step = int(jax.device_get(networks["model"].step))
    measured = runs.is_measured(run, start)
    opened = functools.partial(metrics_log.opened, workdir, is_held=run.is_held)
    log, stop = opened(step=start, measured=measured, told=migration.metrics), launch.Stop()
    meter = safeguards.Meter(layout) if layout else None
    step_of = tokenizer_step.Steps(settings, gan, limits, graphs, discriminator_optimizer, returns)
    passing = functools.partial(
        loader.batches,
        source,
        view,
        seed=seed,
        batch_size=settings.batch_size,
        rows=sharding.rows_here(settings.batch_size, mesh),
        max_bad=settings.max_bad,
    )

    def due(step: int) -> bool:
        return step % every.save == 0 or step == steps or (step == play < steps)

    if start and due(start) and not measured:  # it was saved, and the run ended while measuring
        run.note(start, measure(networks, graph, held_out, log, settings))
    if asking := evaluators.left(evaluating, start, steps, log):
        evaluators.run(asking, averaged(graph, networks), start, log)
    with report.bar(steps, initial=start, what="tokenizer") as bar, contextlib.ExitStack() as ends:
        pace = paces.Pace(settings.batch_size, list(mesh.devices.flat))
        late = []  # the figures of a step, until the next is under way

        def tell() -> str:
            """Why to end the run, or nothing."""
            why = ""
            while late:
                at, scalars, seen, counted = late.pop()
                values = jax.device_get(scalars) | (meter.figures() if meter else {}) | seen
                values |= pace.figures(counted)
                log.scalars(at, values)
                bar.set_postfix_str(report.metrics(values, SHOWN))
                train_state.give_up(values, at)
                why = safeguards.collapsed(limits, values, at, steps)
            return why

        ends.callback(lambda: log.keep())  # whichever is open then, also after an error
        if not distributed.many():  # of many, others may have ended, and their part of a step
            ends.callback(tell)
        ends.callback(trace.stop)
        trace.told(start)
        batches = passing(start=start)
        while step < steps:
            trace.before(step)
            stage = stages.at(plan, step)
            if step == stage.begin and step > 0:
                optimizer = stages.optimizer(settings, stage)
                networks["model"] = train_state.restarted(
                    train_state.from_average(networks["model"]),
                    optimizer,
                    mesh=mesh,
                    strategy=settings.strategy,
                )
            with run.rescuing(networks):
                batch = sharding.global_batch(pace.waits(next, batches), mesh)
            with jax.transfer_guard("disallow"):
                networks, scalars, tokens_BLG = pace.calls(
                    step_of(stage, step >= begin), networks, batch, frozen
                )
            collapsed = tell()
            bar.update()
            step += 1
            if meter:
                meter.add(tokens_BLG, scalars["skipped"])
            if step % every.scalars == 0 or step == steps:
                with run.rescuing(networks):
                    broken = batches.agree()
                late.append((step, scalars, {"broken_images": broken}, pace.counted()))
            trace.after(step, scalars)
            asked, asking = stop.agreed(), evaluators.due(evaluating, step, steps)
            # saved before it is measured, which may end the run
            if due(step) or asked or collapsed or asking:
                later = tell()
                collapsed = collapsed or later
                log.keep()
                run.save(networks)
            if asked:
                break
            if asking and not collapsed:
                with run.rescuing(networks):
                    evaluators.run(asking, averaged(graph, networks), step, log)
                pace.again()
            if due(step):
                with run.rescuing(networks):
                    figures = measure(networks, graph, held_out, log, settings)
                told = run, play, figures, limits, returns
                if figures and step > play and distributed.decided(worse, *told):
                    networks, returns = go_back(run, networks, settings, plan, play, mesh)
                    step_of = tokenizer_step.Steps(
                        settings, gan, limits, graphs, discriminator_optimizer, returns
                    )
                    report.say(
                        f"back at step {play}, the discriminator's weight times "
                        f"{step_of.strength:g}"
                    )
                    trace.stop()  # steps that are taken again are none of those asked for
                    step = bar.n = play
                    collapsed = ""
                    batches.close()
                    log.close()
                    batches, log = passing(start=step), opened(step=step)
                elif not collapsed:  # without its figures it pushes out no step to go back to
                    run.note(step, figures)
                pace.again()
            if collapsed:
                run.close()
                raise UserError(f"{collapsed}; step {step} is saved")
        batches.close()
    run.close()
    log.close()
    stop.end(f"step {step} of {steps} is saved in {workdir}")


def averaged(graph: nnx.GraphDef, networks: tokenizer_step.Networks) -> nnx.Module:
    """The tokenizer with its averaged weights, as it is measured."""
    model = networks["model"]
    return parameters.merge(graph, train_state.averaged(model), model.stats)


def measure(
    networks: tokenizer_step.Networks,
    graph: nnx.GraphDef,
    held_out: Sequence,
    log: metrics_log.AnyLog,
    settings: ml_collections.ConfigDict,
) -> dict[str, float]:
    """Held-out figures and a grid from the averaged weights of a step that is saved.

    None where nothing is held out: then the latest step is the best.
    """
    if not len(held_out):
        return {}
    step, tokenizer = int(jax.device_get(networks["model"].step)), averaged(graph, networks)
    figures, (image, reconstructed) = validation.reconstruction(
        *(tokenizer, held_out, datasets.view_of(settings)),
        count=settings.held_out.images,
        shown=32,
    )
    report.say(
        f"step {step}: held out {report.metrics(figures, validation.PIXEL_METRICS)} "
        f"({figures['images']} images)"
    )
    log.scalars(step, figures, split="held_out")
    log.image(step, "reconstructions", image_grid.beside(image, reconstructed))
    log.keep()
    return figures


def worse(
    run: runs.Run, play: int, figures: dict[str, float], limits: safeguards.Limits, returns: int
) -> bool:
    """Whether the adversarial term has cost more fidelity than the config allows."""
    if limits.worse == 0 or returns >= limits.returns:
        return False
    pair = [{"best": "l2", "metrics": found} for found in (runs.metrics(run, play), figures)]
    before, error = checkpoint.figures(pair)
    error = math.inf if error is None else error  # no number is worse than any
    if before is None or error <= limits.worse * before:
        return False
    report.say(
        f"held-out squared error {error:.4g} is {error / before:.2f} times that of step {play}, "
        f"before the discriminator (config.safeguards.worse={limits.worse:g})"
    )
    return True


def go_back(
    run: runs.Run,
    networks: tokenizer_step.Networks,
    settings: ml_collections.ConfigDict,
    plan: Sequence[stages.Stage],
    play: int,
    mesh: jax.sharding.Mesh,
) -> tuple[tokenizer_step.Networks, int]:
    """(networks of the step before the adversarial term, how often a run has now gone back)."""
    returns = safeguards.note_return(run.workdir)
    runs.drop_after(run, play)
    safeguards.settle(run.workdir)
    # a checkpoint is restored into the optimizer of the stage that made it
    before = stages.optimizer(settings, stages.at(plan, play - 1))
    model = train_state.restarted(networks["model"], before, mesh=mesh, strategy=settings.strategy)
    return runs.resume_or_start(run, networks | {"model": model})[0], returns


if __name__ == "__main__":
    launch.run(main, fields.check_tokenizer, sys.modules[__name__].__doc__)
