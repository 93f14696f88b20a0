"""The demo: a tokenizer and a generator trained on procedural shapes, measured, and their page."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from tokgen import image_grid, image_models, options, output, report, runtime, sharding
from tokgen.checkpoints import checkpoint, loading
from tokgen.config import building, reading
from tokgen.data import datasets, online_tokens, shapes, token_shards
from tokgen.demo import edited, families, growing, page
from tokgen.errors import UserError
from tokgen.evaluation import local_classifier, validation
from tokgen.sampling import decode, drawing, presets

# What every summary has; earlier versions called other figures otherwise
RECORDS = {"summary.json": ("psnr_db", "class_accuracy")}
STAGES = (
    "The classifier is trained, once on a machine",
    "The tokenizer is trained",
    "The tokenizer writes images as tokens",
    "The generator is trained",
    "Samples are drawn and measured",
    "Images are edited",
)
FAMILIES = "The other families are trained"
TOKENIZER, GENERATOR = "configs/tokenizer/shapes.py", "configs/generator/shapes.py"


def run(
    out: str | os.PathLike,
    *,
    tokenizer_steps: int | None = None,
    generator_steps: int | None = None,
    samples: int = 500,
    all_families: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train, measure and write the page in the folder `out`; what summary.json holds.

    Steps of None are those of the configs; `samples` are classified, as many of each class. With
    `all_families` a generator of every family is trained beside the first. All is made beside
    `out`; only a complete page takes the place of an earlier one, with `overwrite`.
    """
    if samples < 10:
        raise UserError(f"--samples must be at least 10, one per class; found {samples}")
    asked = {"tokenizer_steps": tokenizer_steps, "generator_steps": generator_steps}
    for name, steps in asked.items():
        if steps is not None and steps < 1:
            raise UserError(f"{options.spelled(name)} must be at least 1; found {steps}")
    started = time.monotonic()
    stages = [*STAGES[:4], *([FAMILIES] if all_families else []), *STAGES[4:]]
    with (
        growing.Page(out) as so_far,
        output.folder(out, records=RECORDS, overwrite=overwrite) as place,
    ):
        fresh = place.path
        # each part goes on where it was stopped; of other steps it would be another demo
        resumed = place.claim(asked | {"all": all_families, "samples": samples})
        so_far.begin(fresh, stages)
        runtime.devices(local_classifier.BATCH)
        cpu = os.times()
        with so_far.stage(STAGES[0]):
            classifier = local_classifier.load_or_train()
        with so_far.stage(STAGES[1]):
            train("train_tokenizer.py", TOKENIZER, fresh / "tokenizer", tokenizer_steps)
        with so_far.stage(STAGES[2]):
            pretokenize(fresh / "tokenizer", fresh / "tokens")
        with so_far.stage(STAGES[3]):
            given = [f"--config.data.tokens={fresh / 'tokens'}"]
            train("train_generator.py", GENERATOR, fresh / "generator", generator_steps, given)
        if all_families:
            with so_far.stage(FAMILIES):
                families.train(fresh, train, pretokenize, tokenizer_steps, generator_steps)
        with so_far.stage(STAGES[4]):
            summary, pictures, told = measure(fresh, classifier, samples)
        with so_far.stage(STAGES[5]):
            networks = (fresh / "generator", fresh / "tokenizer", classifier)
            summary["edits"], sheets = edited.measure(*networks, edited.SHOWN, page.SEED)
            more = {f"edit_{kind}": sheet for kind, sheet in sheets.items()}
            if all_families:
                summary["families"], its = families.measure(fresh, classifier, samples, page.SEED)
                more |= its
        pictures |= more
        save(fresh, more)
        summary["minutes"] = round((time.monotonic() - started) / 60, 2)
        summary["cpu_minutes"] = round(_cpu_seconds(cpu) / 60, 2)
        summary["seconds"] = dict(so_far.seconds)
        summary["resumed"] = resumed
        summary["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        summary["date"] = time.strftime("%Y-%m-%d")
        summary["versions"] = checkpoint.versions()
        so_far.finished()
        told |= {"folder": os.fspath(out)}
        (fresh / "index.html").write_text(page.document(summary, pictures, told))
        (fresh / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


PRINTED = (
    "psnr_db",
    "codebook_usage",
    "class_accuracy",
    "classifier_accuracy",
    "classifier_on_reconstructions",
    "nats_per_token",
    "unigram_nats",
    "minutes",
)


def train(
    program: str,
    settings: str,
    workdir: pathlib.Path,
    steps: int | None,
    more: Sequence[str] = (),
) -> None:
    """Run a training program as a user would, in a process of its own."""
    command = [sys.executable, str(reading.programs() / program), f"--config={settings}"]
    command += [f"--workdir={workdir}", *more]
    if steps is not None:
        every = max(1, steps // 2)
        command += [f"--config.steps={steps}", f"--config.report.save={every}"]
        command += [f"--config.report.scalars={max(1, steps // 20)}"]
    path = os.pathsep.join(
        [str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    report.say(f"\n$ {program} {' '.join(command[2:])}")
    finished(command, program, env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)})


def finished(command: list[str], program: str, **options) -> None:
    """Run a program to its end; who ends this process ends that one, which saves its step first.

    UserError when it failed, `runtime.Stopped` when a signal to it alone has ended it.
    """
    with subprocess.Popen(command, **options) as child:
        try:
            code = child.wait()
        except (KeyboardInterrupt, runtime.Stopped) as ended:
            # a terminal tells both, others this process alone; told twice it is one request
            number = ended.number if isinstance(ended, runtime.Stopped) else signal.SIGINT
            try:
                child.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                child.send_signal(number)
            child.wait()
            raise
    for number, its in runtime.CODES.items():
        if code in (its, -number):
            raise runtime.Stopped(number, f"{program} was stopped; the same command goes on")
    if code:
        raise UserError(f"{program} ended with exit code {code}; its message is above")


def pretokenize(tokenizer: pathlib.Path, out: pathlib.Path) -> None:
    """Token shards of a tokenizer's own images, written in a process of its own."""
    command = [sys.executable, "-m", "tokgen.cli", "pretokenize", "--views", "center"]
    command += ["--tokenizer", str(tokenizer), "--out", str(out)]
    finished(command, "tokgen pretokenize")


def save(folder: pathlib.Path, pictures: Mapping[str, np.ndarray | bytes]) -> None:
    """The page's pictures as files beside it; bytes are those of a GIF."""
    (folder / "images").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        if isinstance(picture, bytes):
            (folder / "images" / f"{name}.gif").write_bytes(picture)
        else:
            image_grid.save_png(folder / "images" / f"{name}.png", picture)


def measure(folder: pathlib.Path, classifier: nnx.Module, number: int) -> tuple[dict, dict, dict]:
    """(metrics, pictures, what the page tells beside them) of a trained pair."""
    loaded = loading.load_generator(folder / "generator")
    tokenizer = loading.load_tokenizer_of(loaded, str(folder / "tokenizer"))
    settings = tokenizer.config
    held_out = building.build(settings.data, "data", split="held_out")
    real = held_out.batch(range(1000))
    label_N = np.arange(1000) % len(shapes.CLASSES)

    view = datasets.view_of(settings)
    metrics, _ = validation.reconstruction(tokenizer.module, held_out, view, count=1000)
    coded, reconstructed, mesh = [], [], sharding.current()
    for start in range(0, len(real), 100):
        part = sharding.filled(real[start : start + 100], 100, mesh)
        with jax.set_mesh(mesh):
            part = online_tokens.encode(tokenizer.module, part)
            image_BHW3, _ = drawing.decode_pixels(tokenizer.module, part)
        coded.append(np.asarray(part)[:100])
        reconstructed.append(np.asarray(image_BHW3)[:100])
    coded, reconstructed = np.concatenate(coded), np.concatenate(reconstructed)

    held_tokens = token_shards.Source(folder / "tokens", split="held_out")
    codec = tokenizer.module.quantizer
    likelihood = validation.likelihood(loaded.module, codec, held_tokens, count=1000)
    unigram = validation.unigram(token_shards.Source(folder / "tokens"), held_tokens, loaded.layout)

    chosen = presets.named(loaded.config.presets.to_dict(), "default")
    sampler = presets.sampler(chosen, decode.steps(loaded.module))
    wanted = np.repeat(np.arange(len(shapes.CLASSES), dtype=np.int32), number // 10)
    generator = decode.laid_out(loaded.module)  # once for both draws
    _, drawn = drawing.draw(
        generator, tokenizer.module, wanted, sampler, seed=page.SEED, batch=100, what="samples"
    )
    hits = local_classifier.predictions(classifier, drawn) == wanted
    per_class = hits.reshape(len(shapes.CLASSES), -1).mean(1)

    rows, columns = loaded.layout.grids[0]
    upper = np.zeros((10, rows * columns, 1), bool)
    upper[:, : rows // 2 * columns] = True
    _, completed = drawing.draw(
        generator,
        tokenizer.module,
        np.arange(10, dtype=np.int32),
        sampler,
        seed=page.SEED,
        batch=10,
        given=(coded[:10], upper),
        what="completions",
    )
    covered = real[:10].copy()
    covered[:, real.shape[1] // 2 :] = 128

    summary = {
        "psnr_db": round(metrics["psnr_db"], 2),
        "ssim": round(metrics["ssim"], 4),
        "codebook_usage": round(metrics["codebook_usage"], 4),
        "codebook_perplexity": round(metrics["codebook_perplexity"], 1),
        "class_accuracy": round(float(hits.mean()), 4),
        "class_accuracy_by_class": dict(
            zip(shapes.CLASSES, per_class.round(3).tolist(), strict=True)
        ),
        "classified_samples": len(wanted),
        "classifier_accuracy": round(
            float((local_classifier.predictions(classifier, real) == label_N).mean()), 4
        ),
        "classifier_on_reconstructions": round(
            float((local_classifier.predictions(classifier, reconstructed) == label_N).mean()), 4
        ),
        "nats_per_token": round(likelihood["nats_per_token"], 4),
        "nats_error": round(likelihood["nats_error"], 4),
        "unigram_nats": round(unigram["unigram_nats"], 4),
        "sampling": chosen,
        "freedom": settings.data.form,
    }
    by_class = drawn.reshape(len(shapes.CLASSES), -1, *drawn.shape[1:])[:, : page.SHOWN]
    pictures = {
        "first": image_grid.grid(by_class[:, 0], page.FIRST, scale=2),
        "pairs": image_grid.beside(real[:30], reconstructed[:30], pairs=page.PAIRS, scale=2),
        "tokenizer_curves": np.asarray(Image.open(folder / "tokenizer" / "curves.png")),
        "generator_curves": np.asarray(Image.open(folder / "generator" / "curves.png")),
    }
    for name, image_NHW3 in zip(shapes.CLASSES, by_class, strict=True):
        pictures[f"class_{name}"] = image_grid.grid(image_NHW3, page.ACROSS, scale=2)
    steps_NKHW3 = np.stack([real[:10], covered, reconstructed[:10], completed], axis=1)
    for i, half in enumerate(np.split(steps_NKHW3, 2)):
        pictures[f"completions_{i}"] = image_grid.grid(
            half.reshape(-1, *half.shape[2:]), half.shape[1], scale=2
        )
    model = image_models.load(folder / "generator", tokenizer=str(folder / "tokenizer"))
    pictures["decode"] = model.trace(page.TRACED, seed=page.SEED).gif()
    save(folder, pictures)
    told = {
        "layout": f"{rows} x {columns} tokens of {loaded.layout.absent} codes",
        "tokenizer_parameters": _parameters(tokenizer.meta),
        "generator_parameters": _parameters(loaded.meta),
        "tokenizer_steps": tokenizer.meta["step"],
        "generator_steps": loaded.meta["step"],
        "freedom": describe(held_out.freedom),
    }
    return summary, pictures, told


def describe(freedom: shapes.Freedom) -> str:
    """How free the shapes are, in words."""
    low, high = freedom.radius
    colours = f"{len(freedom.colours)} colours" if freedom.colours else "any two distinct colours"
    ground = "a two-colour gradient" if freedom.gradient else "a flat background"
    return (
        f"any place inside the frame, radius {low:g} to {high:g} pixels of 32, turned by up to "
        f"{freedom.rotation:g} degrees either way, {colours} with a jitter of {freedom.jitter:g}, "
        f"on {ground}"
    )


def _parameters(meta: dict) -> str:
    sizes = [
        int(np.prod(entry["shape"]))
        for path, entry in meta["manifest"].items()
        if path.startswith("model/params/")
    ]
    return f"{sum(sizes):,}"


def _cpu_seconds(before) -> float:
    """CPU seconds of this process and of those it has waited for."""
    now = os.times()
    return sum(now[:4]) - sum(before[:4])
