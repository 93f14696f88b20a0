"""Guidance, temperature and steps of a generator, scored on shared seeds; the best, with errors.

Every setting is drawn with the same seeds, so that differences are less noisy. Each setting and
seed is an evaluation of its own in DIR/SETTING-SEED; killed at any point, the same command goes on.
"""

from __future__ import annotations

import argparse

from tokgen import options, output, report, runtime
from tokgen.commands import evaluate
from tokgen.evaluation import protocols


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=options.checkpoint,
        help="of a generator: a work directory, one step of it, or a published model's name",
    )
    parser.add_argument("--protocol", required=True, help=", ".join(protocols.PROTOCOLS))
    parser.add_argument("--reference", required=True, help="what tokgen reference wrote")
    parser.add_argument("--out", required=True, help="folder of the evaluations and the page")
    output.arguments(parser)
    swept = parser.add_argument_group("what is swept: every combination is scored")
    swept.add_argument("--guidance", type=float, nargs="+", default=[], help="weights; 1 is off")
    swept.add_argument("--temperature", type=float, nargs="+", default=[])
    swept.add_argument("--steps", type=int, nargs="+", default=[], help="of a masked generator")
    swept.add_argument("--seeds", type=int, default=3, help="of every setting (default 3)")
    swept.add_argument("--seed", type=int, default=0, help="the first of them (default 0)")
    swept.add_argument("--by", default="fid", help="the metric that chooses the best (fid)")
    score = parser.add_argument_group("the rest, as of tokgen evaluate")
    score.add_argument("--samples", type=int, default=0, help="default: the protocol's, or 1000")
    score.add_argument("--assume", default="", help="the protocol of a reference without a record")
    score.add_argument("--weights", default="", help="weight file of a published feature network")
    options.accept(score)
    score.add_argument("--preset", default="default", help="what is not swept is as in it")
    score.add_argument("--top-k", type=int, help="in the place of the preset's; 0 keeps all")
    score.add_argument("--top-p", type=float, help="in the place of the preset's")
    score.add_argument("--noise", type=float, help="of a masked generator's choice of tokens")
    score.add_argument("--batch", type=int, default=32, help="images decoded together")
    score.add_argument("--precision", choices=("float32", "bfloat16"), help="of the networks")
    options.mesh(score)
    score.add_argument("--text", default="", help="captions of a generator that reads text")
    score.add_argument(
        "--tokenizer",
        type=options.checkpoint,
        default="",
        help="where the tokenizer lies now, if moved",
    )
    options.processes(parser)


def check(args: argparse.Namespace) -> None:
    """Refuse what is no generator, and what is refused of any."""
    from tokgen.checkpoints import pulling
    from tokgen.evaluation import sweep

    pulling.check_kind(args.checkpoint, "generator")
    settings = settings_of(args)
    sweep.grid_of(settings)
    sweep.check(settings)


def run(args: argparse.Namespace) -> None:
    """Score every setting with every seed, and say which is the best, and how surely."""
    from tokgen.evaluation import sweep

    with runtime.over(args.mesh):
        report.result(sweep.listed(sweep.sweep(settings_of(args))))


def settings_of(args: argparse.Namespace):
    """The sweep.Settings that a command line asks for."""
    from tokgen.evaluation import score_settings, sweep
    from tokgen.sampling import presets

    choice = presets.Choice(args.preset, top_k=args.top_k, top_p=args.top_p, noise=args.noise)
    return sweep.Settings(
        score_settings.Settings(**evaluate.shared(args), sampling=choice),
        guidance=tuple(args.guidance),
        temperature=tuple(args.temperature),
        steps=tuple(args.steps),
        seeds=args.seeds,
        by=args.by,
    )
