"""The demo's page: one HTML file with its pictures inside, which can be sent to somebody."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np

from tokgen.data import shapes
from tokgen.demo import edited, families
from tokgen.evaluation import page as pages

SHOWN = 12  # samples of a class on the page
# Which samples are drawn; the settings were chosen on other seeds.
SEED = 1000
TRACED = ("ring", "bar", "crescent", "pair")  # whose decode is shown, step by step


def document(
    summary: Mapping[str, Any], pictures: Mapping[str, np.ndarray | bytes], told: Mapping[str, Any]
) -> str:
    """The whole page, pictures inside: one file that can be sent to somebody."""

    def picture(name: str, text: str) -> str:
        return f'<img src="{pages.data_uri(pictures[name])}" alt="{html.escape(text)}">'

    since = " since it was gone on with" if summary.get("resumed") else ""
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
            f"{summary['nats_per_token']:.3f} &plusmn; {summary['nats_error']:.3f} nats per token; "
            f"a unigram model pays {summary['unigram_nats']:.3f}",
        ),
        (
            f"Samples of the class asked for ({summary['classified_samples']})",
            percent["class_accuracy"],
        ),
        ("The classifier on real shapes", percent["classifier_accuracy"]),
        ("The classifier on reconstructions", percent["classifier_on_reconstructions"]),
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
  .edits {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
  figure {{ margin: 0; width: min-content; }} figcaption {{ font-size: .85rem; color: #444; }}
  .edits img {{ max-width: none; }}
  .share {{ display: block; font-weight: 400; color: #666; font-size: .85rem; }}
</style>
<h1>tokgen: shapes drawn from tokens</h1>
<p>A tokenizer learned to write 32 x 32 images as {told["layout"]} and to decode them
back to pixels ({told["tokenizer_parameters"]} parameters, {told["tokenizer_steps"]:,} steps). A
generator learned to write such tokens for a class, one after the other
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
<h2>How they come to be</h2>
<p>Token by token, each as a part of the finished image; the end stands a moment.</p>
{picture("decode", "decodes, step by step")}
{families.section(summary.get("families", {}), picture)}
{edited.section(summary["edits"], summary["class_accuracy"], picture)}
<h2>Completing a half</h2>
<p>Row by row: a held-out image; what was given of it (the upper half); the image as the tokenizer
decodes it; the lower half drawn anew by the generator.</p>
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
