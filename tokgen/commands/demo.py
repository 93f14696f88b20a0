"""Train a tokenizer and a generator on procedural shapes; write one page to look at."""

from __future__ import annotations

import argparse
import pathlib

from tokgen import output, report


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder of the page (runs/demo)")
    output.arguments(parser)
    parser.add_argument("--tokenizer-steps", type=int, help="fewer: a shorter, poorer demo")
    parser.add_argument("--generator-steps", type=int, help="fewer: a shorter, poorer demo")
    parser.add_argument(
        "--all", action="store_true", help="one generator of every family, side by side"
    )
    parser.add_argument("--samples", type=int, default=500, help="classified samples (default 500)")


def run(args: argparse.Namespace) -> None:
    """Train, measure, write the page, and print the metrics."""
    from tokgen.demo import demo

    summary = demo.run(
        args.out,
        tokenizer_steps=args.tokenizer_steps,
        generator_steps=args.generator_steps,
        samples=args.samples,
        all_families=args.all,
        overwrite=args.overwrite,
    )
    for name in demo.PRINTED:
        print(f"{name:<30} {summary[name]}")
    report.say(f"open {pathlib.Path(args.out) / 'index.html'}")
