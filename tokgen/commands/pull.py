"""Fetch a published model and its tokenizer, and import both into the cache of this user.

Every command that takes a checkpoint takes the name of a published model as well, and pulls it.
"""

from __future__ import annotations

import argparse

from tokgen import options, report


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="of a published model, as tokgen models lists them")
    options.consent(parser)
    parser.add_argument(
        "--file",
        default="",
        help="the published file, where you have it already: nothing is fetched in its place",
    )
    parser.add_argument(
        "--remove", action="store_true", help="remove the model from the cache instead"
    )


def run(args: argparse.Namespace) -> None:
    """Pull it, or say that it is here; what can be done with it."""
    from tokgen.checkpoints import pulling
    from tokgen.zoo import model as zoo

    model = zoo.named(args.name)
    if args.remove:
        options.check(args, dict.fromkeys(("yes", "file"), "pulling"))
        report.say(pulling.remove(args.name))
        return
    if pulling.missing(args.name):
        pulling.pull(args.name, yes=args.yes, file=args.file)
    else:
        options.check(args, {"file": f"a model that is not here: tokgen pull {args.name} --remove"})
        place = pulling.folder(args.name)
        report.say(f"{args.name} is here: {place} ({report.amount(pulling.taken(place))})")
    report.say(f"try: {_next(args.name, model)}")


def _next(name: str, model) -> str:
    """What can be done with it."""
    if model.kind == "tokenizer":
        return f"tokgen reconstruct {name} IMAGES --out DIR"
    if model.classes:
        return f"tokgen sample {name} --classes 207 --number 2 --out DIR"
    return f"tokgen sample {name} --text FILE.npz --number 2 --out DIR"
