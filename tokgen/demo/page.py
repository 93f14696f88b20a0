"""The demo's page: one HTML file with its pictures inside, which can be sent to somebody."""

from __future__ import annotations

import html
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tokgen.data import shapes
from tokgen.demo import edited, families
from tokgen.evaluation import page as pages

SHOWN = 12  # samples of a class on the page
# Columns of the pictures: on a phone, 390 pixels wide, an image is still 44 pixels or more
ACROSS, FIRST, PAIRS = 6, 5, 3
# Which samples are drawn; the settings were chosen on other seeds.
SEED = 1000
TRACED = ("ring", "bar", "crescent", "pair")  # whose decode is shown, step by step
TITLE = "tokgen: shapes drawn from tokens"
STYLE = """<style>
img { image-rendering: pixelated; } .wide { margin: .8rem 0; }
img.curve { image-rendering: auto; min-width: 56rem; }
.side { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; } .side figure { max-width: 100%; }
.side.edits figure { width: min-content; } .side.edits img { max-width: none; }
figcaption b { color: var(--ink); } .families th, .families td { font-size: .9rem; }
.families img { max-width: 11.5rem; } .families td { min-width: 8rem; }
code { white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem .8rem;
  border: 1px solid var(--line); border-radius: .4rem; }
</style>
"""


def document(
    summary: Mapping[str, Any], pictures: Mapping[str, np.ndarray | bytes], told: Mapping[str, Any]
) -> str:
    """The whole page, pictures inside: one file that can be sent to somebody."""

    def picture(name: str, text: str) -> str:
        return f'<img src="{pages.data_uri(pictures[name])}" alt="{html.escape(text)}">'

    share = summary["class_accuracy_by_class"]
    classes = "\n".join(
        f"<figure>{picture('class_' + name, f'samples of {name}')}<figcaption><b>{name}</b>, "
        f"{100 * share[name]:.0f} % recognised</figcaption></figure>"
        for name in shapes.CLASSES
    )
    settings = ", ".join(f"{k} {v}" for k, v in summary["sampling"].items())
    parts = f"""<p class="faint">The first sample of each of {len(shapes.CLASSES)} classes that a
small generator learned to draw in this run; none is picked.</p>
{picture("first", "a sample of every class")}
<p>A <b>tokenizer</b> learned to write 32 x 32 images as {told["layout"]} and to decode them
back to pixels ({told["tokenizer_parameters"]} parameters, {told["tokenizer_steps"]:,} steps). A
<b>generator</b> learned to write such tokens for a class, one after the other
({told["generator_parameters"]} parameters, {told["generator_steps"]:,} steps). A <b>classifier</b>,
a small network that was trained on real shapes alone and has a part in neither training, looks at
what is drawn and says which class it sees: that is what "recognised" means below. Everything on
this page was trained and drawn by this run. The shapes: {told["freedom"]}.</p>
<h2>Figures</h2>
{_figures(summary, told)}
<h2>What the generator draws</h2>
<p>The first samples of every class, up to {SHOWN}, none picked, and the share that the classifier
recognises. Sampling: {html.escape(settings)}, seed {SEED}.</p>
<div class="side">
{classes}
</div>
<h2>How they come to be</h2>
<p>Token by token, each as a part of the finished image; the end stands a moment.</p>
{picture("decode", "decodes, step by step")}
{families.section(summary.get("families", {}), picture)}
{edited.section(summary["edits"], summary["class_accuracy"], picture)}
<h2>Completing a half</h2>
<p>From left to right: a held-out image; what was given of it (the upper half); the image as the
tokenizer decodes it; the lower half drawn anew by the generator.</p>
<div class="side">
<figure>{picture("completions_0", "completions of the lower half")}</figure>
<figure>{picture("completions_1", "more completions of the lower half")}</figure>
</div>
<h2>Originals and reconstructions</h2>
<p>Held-out images, each with its reconstruction to the right.</p>
{picture("pairs", "originals and reconstructions")}
{_durations(summary)}
{_next(told["folder"])}
<h2>Curves</h2>
<p>The tokenizer, then the generator; wider than a phone, to be moved sideways.</p>
{curves("tokenizer", picture)}
{curves("generator", picture)}"""
    return pages.document(TITLE, [parts], head=STYLE)


def curves(whose: str, picture: Callable[[str, str], str]) -> str:
    """The curves of a training, as wide as they can be read."""
    drawn = picture(f"{whose}_curves", f"curves of the {whose}")
    return f'<div class="wide">{drawn.replace("<img", "<img class=curve")}</div>'


def _figures(summary: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    shares = ("class_accuracy", "classifier_accuracy", "classifier_on_reconstructions")
    percent = {name: f"{100 * summary[name]:.1f} %" for name in shares}
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
            f"{summary['nats_per_token']:.3f} \N{PLUS-MINUS SIGN} {summary['nats_error']:.3f} nats "
            f"per token; a unigram model pays {summary['unigram_nats']:.3f}",
        ),
        (
            f"Samples recognised as the class asked for, of {summary['classified_samples']}",
            percent["class_accuracy"],
        ),
        ("Real shapes recognised", percent["classifier_accuracy"]),
        ("Reconstructions recognised", percent["classifier_on_reconstructions"]),
    ]
    return pages.table((), rows)


def _durations(summary: Mapping[str, Any]) -> str:
    since = " since it was gone on with" if summary.get("resumed") else ""
    whole = f"{summary['minutes']:.1f} minutes, {summary['cpu_minutes']:.1f} CPU minutes{since}"
    rows = [(name, lasted(seconds)) for name, seconds in summary.get("seconds", {}).items()]
    rows += [
        ("The whole demo", whole),
        ("Machine", f"{summary['machine']}, {summary['date']}"),
        ("Versions", ", ".join(f"{k} {v}" for k, v in summary["versions"].items())),
    ]
    return f"<h2>How long it took</h2>\n{pages.table((), rows)}"


def lasted(seconds: float) -> str:
    """A duration as minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def _next(folder: str) -> str:
    """What to try now, on what this run has trained."""

    def quoted(part: str = "") -> str:
        return html.escape(shlex.quote(f"{folder.rstrip('/')}{part}"))

    environment = f".venv-{sys.version_info.major}.{sys.version_info.minor}"  # as the Makefile's
    generator, tokenizer = quoted("/generator"), quoted("/tokenizer")
    return f"""<h2>What to do next</h2>
<p>In tokgen's folder, and the environment that made this page (after <code>make demo</code>:
<code>. {environment}/bin/activate</code>). A page to play with: draw, see how a picture came to be,
paint over a part and have it drawn anew. It needs <code>pip install -e '.[app]'</code>, and says
its address:</p>
<pre>tokgen app {generator} {tokenizer}</pre>
<p>Rings, each with its decode step by step; then the left half of one of them drawn anew:</p>
<pre>tokgen sample {generator} --classes ring --number 8 --trace --out {quoted("-rings")}
tokgen edit {quoted("-rings/seed0-00000-class1-ring.png")} --label ring --mask left \\
  --generator {generator} --out {quoted("-edit")}</pre>
<p>A generator of every family beside this one, masked, random order and next scale:</p>
<pre>tokgen demo --all --out {quoted("-all")}</pre>
<p>Notebooks, in the folder <code>colab</code>, run here or on Colab: <code>quickstart</code> (these
shapes), <code>published_models</code> (pictures from published weights), <code>your_images</code>
(a folder of images to a tokenizer and a generator of its own), <code>editing</code>,
<code>evaluate</code>, <code>tpu</code>.</p>"""
