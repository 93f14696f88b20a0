"""Train a tokenizer and a generator on procedural shapes; write one page to look at."""

from __future__ import annotations

import argparse
import html
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tokgen import output, report, runtime
from tokgen.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from tokgen.data import shapes

RECORDS = {"summary.json": ("psnr_db", "judged_samples")}
TOKENIZER, GENERATOR = "configs/tokenizer/shapes.py", "configs/generator/shapes.py"
SHOWN = 12  # samples of a class on the page
# Which samples are drawn; the settings were chosen on other seeds.
SEED = 1000


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder of the page (runs/demo)")
    output.arguments(parser)
    parser.add_argument("--tokenizer-steps", type=int, help="fewer: a shorter, poorer demo")
    parser.add_argument("--generator-steps", type=int, help="fewer: a shorter, poorer demo")
    parser.add_argument(
        "--all", action="store_true", help="one generator of every family, side by side"
    )
    parser.add_argument("--samples", type=int, default=500, help="judged samples (default 500)")


def run(args: argparse.Namespace) -> None:
    """Train beside OUT; only a complete page takes the place of an earlier one."""
    from tokgen.checkpoints import checkpoint
    from tokgen.demo import families
    from tokgen.evaluation import local_classifier

    if args.samples < 10:
        raise UserError(f"--samples must be at least 10, one per class; found {args.samples}")
    for option in ("tokenizer_steps", "generator_steps"):
        steps = getattr(args, option)
        if steps is not None and steps < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1; found {steps}")
    started, out = time.monotonic(), pathlib.Path(args.out)
    with output.folder(args.out, records=RECORDS, overwrite=args.overwrite) as place:
        fresh = place.path
        # each part goes on where it was stopped; of other steps it would be another demo
        names = ("tokenizer_steps", "generator_steps", "all", "samples")
        resumed = place.claim({name: getattr(args, name) for name in names})
        runtime.devices(local_classifier.BATCH)
        cpu = os.times()
        examiner = local_classifier.load_or_train()
        train("train_tokenizer.py", TOKENIZER, fresh / "tokenizer", args.tokenizer_steps)
        pretokenized(fresh / "tokenizer", fresh / "tokens")
        given = [f"--config.data.tokens={fresh / 'tokens'}"]
        train("train_generator.py", GENERATOR, fresh / "generator", args.generator_steps, given)
        if args.all:
            steps = args.tokenizer_steps, args.generator_steps
            families.train(fresh, train, pretokenized, *steps)
        summary, pictures, told = measure(fresh, examiner, args.samples)
        if args.all:
            summary["families"], more = families.measure(fresh, examiner, args.samples, SEED)
            pictures |= more
            save(fresh, more)
        summary["minutes"] = round((time.monotonic() - started) / 60, 2)
        summary["cpu_minutes"] = round(_cpu_seconds(cpu) / 60, 2)
        summary["resumed"] = resumed
        summary["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        summary["date"] = time.strftime("%Y-%m-%d")
        summary["versions"] = checkpoint.versions()
        (fresh / "index.html").write_text(page(summary, pictures, told))
        (fresh / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name in KEYS:
        print(f"{name:<26} {summary[name]}")
    report.say(f"open {out / 'index.html'}")


KEYS = (
    "psnr_db",
    "codebook_usage",
    "class_accuracy",
    "judge_accuracy",
    "judge_on_reconstructions",
    "nats_per_token",
    "unigram_nats",
    "minutes",
)


def train(program: str, settings: str, workdir: pathlib.Path, steps: int | None, more=()) -> None:
    """Run a training program as a user would, in a process of its own."""
    from tokgen.config import reading

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

    UserError when it failed, `cli.Stopped` when a signal to it alone has ended it.
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


def pretokenized(tokenizer: pathlib.Path, out: pathlib.Path) -> None:
    """Token shards of a tokenizer's own images, written in a process of its own."""
    command = [sys.executable, "-m", "tokgen.cli", "pretokenize", "--views", "center"]
    command += ["--tokenizer", str(tokenizer), "--out", str(out)]
    finished(command, "tokgen pretokenize")


def save(folder: pathlib.Path, pictures: dict[str, np.ndarray]) -> None:
    """The page's pictures as files beside it."""
    from tokgen import image_grid

    (folder / "images").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        image_grid.save_png(folder / "images" / f"{name}.png", picture)


def measure(folder: pathlib.Path, examiner, number: int) -> tuple[dict, dict, dict]:
    """(figures, pictures, what the page tells beside them) of a trained pair."""
    import numpy as np
    from PIL import Image

    from tokgen import image_grid, sharding
    from tokgen.checkpoints import checkpoint
    from tokgen.config import building
    from tokgen.data import datasets, shapes, token_shards
    from tokgen.evaluation import local_classifier, validation
    from tokgen.sampling import decode, drawing, presets

    loaded = checkpoint.load_generator(folder / "generator")
    tokenizer = checkpoint.load_tokenizer_of(loaded, str(folder / "tokenizer"))
    settings = tokenizer.config
    held_out = building.build(settings.data, "data", split="held_out")
    real = held_out.batch(range(1000))
    label_N = np.arange(1000) % len(shapes.CLASSES)

    view = datasets.view_of(settings)
    figures, _ = validation.reconstruction(tokenizer.module, held_out, view, count=1000)
    coded, repainted, mesh = [], [], sharding.current()
    for start in range(0, len(real), 100):
        part = sharding.filled(real[start : start + 100], 100, mesh)
        part = datasets.encode(tokenizer.module, part)
        coded.append(np.asarray(part)[:100])
        repainted.append(np.asarray(drawing.paint(tokenizer.module, part)[0])[:100])
    coded, repainted = np.concatenate(coded), np.concatenate(repainted)

    held_tokens = token_shards.Source(folder / "tokens", split="held_out")
    codec = tokenizer.module.quantizer
    likelihood = validation.likelihood(loaded.module, codec, held_tokens, count=1000)
    unigram = validation.unigram(token_shards.Source(folder / "tokens"), held_tokens, loaded.layout)

    chosen = presets.named(loaded.config.presets.to_dict(), "default")
    sampler = presets.sampler(chosen, decode.steps(loaded.module))
    wanted = np.repeat(np.arange(len(shapes.CLASSES), dtype=np.int32), number // 10)
    _, drawn = drawing.draw(
        loaded.module, tokenizer.module, wanted, sampler, seed=SEED, batch=100, what="samples"
    )
    hits = local_classifier.predictions(examiner, drawn) == wanted
    per_class = hits.reshape(len(shapes.CLASSES), -1).mean(1)

    rows, columns = loaded.layout.grids[0]
    upper = np.zeros((10, rows * columns, 1), bool)
    upper[:, : rows // 2 * columns] = True
    _, completed = drawing.draw(
        loaded.module,
        tokenizer.module,
        np.arange(10, dtype=np.int32),
        sampler,
        seed=SEED,
        batch=10,
        given=(coded[:10], upper),
        what="completions",
    )
    covered = real[:10].copy()
    covered[:, real.shape[1] // 2 :] = 128

    summary = {
        "psnr_db": round(figures["psnr_db"], 2),
        "ssim": round(figures["ssim"], 4),
        "codebook_usage": round(figures["codebook_usage"], 4),
        "codebook_perplexity": round(figures["codebook_perplexity"], 1),
        "class_accuracy": round(float(hits.mean()), 4),
        "class_accuracy_by_class": dict(
            zip(shapes.CLASSES, per_class.round(3).tolist(), strict=True)
        ),
        "judged_samples": len(wanted),
        "judge_accuracy": round(
            float((local_classifier.predictions(examiner, real) == label_N).mean()), 4
        ),
        "judge_on_reconstructions": round(
            float((local_classifier.predictions(examiner, repainted) == label_N).mean()), 4
        ),
        "nats_per_token": round(likelihood["nats_per_token"], 4),
        "nats_error": round(likelihood["nats_error"], 4),
        "unigram_nats": round(unigram["unigram_nats"], 4),
        "sampling": chosen,
        "freedom": settings.data.form,
    }
    by_class = drawn.reshape(len(shapes.CLASSES), -1, *drawn.shape[1:])[:, :SHOWN]
    pictures = {
        "pairs": image_grid.beside(real[:40], repainted[:40], pairs=5, scale=2),
        "completions": image_grid.grid(
            np.concatenate([real[:10], covered, repainted[:10], completed]), 10, scale=2
        ),
        "tokenizer_curves": np.asarray(Image.open(folder / "tokenizer" / "curves.png")),
        "generator_curves": np.asarray(Image.open(folder / "generator" / "curves.png")),
    }
    for name, image_NHW3 in zip(shapes.CLASSES, by_class, strict=True):
        pictures[f"class_{name}"] = image_grid.grid(image_NHW3, SHOWN, scale=2)
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


def page(summary: dict, pictures: dict, told: dict) -> str:
    """The whole page, pictures inside: one file that can be sent to somebody."""
    from tokgen.data import shapes
    from tokgen.demo import families
    from tokgen.evaluation import page as pages

    def picture(name: str, text: str) -> str:
        return f'<img src="{pages.data_uri(pictures[name])}" alt="{html.escape(text)}">'

    since = " since it was gone on with" if summary.get("resumed") else ""
    percent = {k: f"{100 * summary[k]:.1f} %" for k in KEYS if "accuracy" in k or "judge" in k}
    rows = [
        (
            "Reconstruction, held out",
            f"{summary['psnr_db']:.2f} dB PSNR, SSIM {summary['ssim']:.3f}",
        ),
        (
            "Codes in use",
            f"{100 * summary['codebook_usage']:.1f} %, perplexity "
            f"{summary['codebook_perplexity']:.0f} of {told['layout'].split()[-2]}",
        ),
        (
            "Held-out likelihood",
            f"{summary['nats_per_token']:.3f} &plusmn; {summary['nats_error']:.3f} nats per token; "
            f"a unigram model pays {summary['unigram_nats']:.3f}",
        ),
        (
            f"Samples of the class asked for ({summary['judged_samples']})",
            percent["class_accuracy"],
        ),
        ("The judge on real shapes", percent["judge_accuracy"]),
        ("The judge on reconstructions", percent["judge_on_reconstructions"]),
        (
            "Time",
            f"{summary['minutes']:.1f} minutes, {summary['cpu_minutes']:.1f} CPU minutes{since}",
        ),
        ("Machine", html.escape(f"{summary['machine']}, {summary['date']}")),
        ("Versions", html.escape(", ".join(f"{k} {v}" for k, v in summary["versions"].items()))),
    ]
    table = "\n".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    share = summary["class_accuracy_by_class"]
    classes = "\n".join(
        f'<tr><th>{name}<span class="share">{100 * share[name]:.0f} %</span></th>'
        f"<td>{picture('class_' + name, f'samples of {name}')}</td></tr>"
        for name in shapes.CLASSES
    )
    settings = ", ".join(f"{k} {v}" for k, v in summary["sampling"].items())
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tokgen: shapes</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
         max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
  h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .5rem; }}
  p {{ max-width: 44rem; }}
  img {{ max-width: 100%; image-rendering: pixelated; display: block; }}
  img.curve {{ image-rendering: auto; }}
  table {{ border-collapse: collapse; }}
  th {{ text-align: left; font-weight: 600; padding: .25rem 1rem .25rem 0; }}
  td {{ padding: .25rem 0; }}
  .families td, .families th {{ vertical-align: top; padding-right: 1rem; font-size: .9rem; }}
  .share {{ display: block; font-weight: 400; color: #666; font-size: .85rem; }}
</style>
<h1>tokgen: shapes drawn from tokens</h1>
<p>A tokenizer learned to write 32 x 32 images as {told["layout"]} and to paint them back
({told["tokenizer_parameters"]} parameters, {told["tokenizer_steps"]:,} steps). A generator learned
to write such tokens for a class, one after the other
({told["generator_parameters"]} parameters, {told["generator_steps"]:,} steps). Everything on this
page was trained and drawn by this run. The shapes: {told["freedom"]}.</p>
<table>
{table}
</table>
<h2>What the generator draws</h2>
<p>The first {SHOWN} samples of every class, none picked; under the name, the share that an
independent classifier recognises. Sampling: {html.escape(settings)}, seed {SEED}.</p>
<table>
{classes}
</table>
{families.section(summary.get("families", {}), picture)}
<h2>Completing a half</h2>
<p>Row by row: a held-out image; what was given of it (the upper half); the image as the tokenizer
paints it; the lower half drawn anew by the generator.</p>
{picture("completions", "completions of the lower half")}
<h2>Originals and reconstructions</h2>
<p>Held-out images, each with its reconstruction to the right.</p>
{picture("pairs", "originals and reconstructions")}
<h2>Curves</h2>
<p>The tokenizer, then the generator.</p>
{picture("tokenizer_curves", "curves of the tokenizer").replace("<img", '<img class="curve"')}
{picture("generator_curves", "curves of the generator").replace("<img", '<img class="curve"')}
</html>
"""


def _parameters(meta: dict) -> str:
    import numpy as np

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
