"""Options that have no effect: a command says when each of its own has one, and no other is taken.

What was given is what stood on the command line, at whatever value: `--seed 0` asks for something.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence

from tokgen.errors import UserError

# Modes of tokgen evaluate
TOKENIZER, GENERATOR = "held-out metrics of a tokenizer", "the likelihood of a generator"
SAMPLES, RECONSTRUCTED = "a score of samples", "a score of a tokenizer"
DRAWN = "a score of a generator"
SCORES, HELD_OUT = (SAMPLES, RECONSTRUCTED, DRAWN), (TOKENIZER, GENERATOR)
EVALUATE = {
    "reconstruction": (TOKENIZER, RECONSTRUCTED),
    "data": (*HELD_OUT, RECONSTRUCTED),
    "split": (*HELD_OUT, RECONSTRUCTED),
    "labels": (*HELD_OUT, RECONSTRUCTED, SAMPLES),
    "images": HELD_OUT,
    "text": (*HELD_OUT, DRAWN),
    "order": (GENERATOR,),
    "orders": (GENERATOR,),
    "tokenizer": (GENERATOR, DRAWN),
    "seed": (GENERATOR, *SCORES),
    "batch": (*HELD_OUT, DRAWN),
    "mesh": (*HELD_OUT, RECONSTRUCTED, DRAWN),
    "precision": (*HELD_OUT, RECONSTRUCTED, DRAWN),
    "lpips": (RECONSTRUCTED,),
    **dict.fromkeys(("overwrite", "protocol", "reference", "assume", "weights"), SCORES),
    **dict.fromkeys(("samples", "accept"), SCORES),
    **dict.fromkeys(("preset", "temperature", "top_k", "top_p"), (DRAWN,)),
    **dict.fromkeys(("guidance", "steps", "noise"), (DRAWN,)),
}


def checkpoint(text: str) -> str:
    """The type of an argument that is a CKPT: a path, or the name of a published model."""
    return text


def checkpoints(parser: argparse.ArgumentParser) -> list[str]:
    """The arguments of a command that are CKPTs."""
    return [action.dest for action in parser._actions if action.type is checkpoint]


def mesh(parser: argparse._ActionsContainer) -> None:
    """`--mesh`, of every command that draws or measures."""
    parser.add_argument(
        "--mesh",
        default="",
        metavar="DATA,FSDP,TENSOR",
        help="how devices share the work, as 2,1,4: images over 2, a network over 4; default: "
        "images over all, each with the whole network",
    )


def sizes(text: str) -> tuple[int, ...]:
    """The three numbers of `--mesh`; UserError where they are none."""
    found = text.split(",")
    if len(found) != 3 or not all(size.strip().lstrip("-").isdigit() for size in found):
        raise UserError(f"--mesh must be three numbers, DATA,FSDP,TENSOR, as 2,1,4; found {text!r}")
    return tuple(map(int, found))


def processes(parser: argparse._ActionsContainer) -> None:
    """`--coordinator` and its like, of every program that several processes may run together."""
    group = parser.add_argument_group(
        "several processes",
        "SLURM, Open MPI, TPU pods, Kubernetes say it themselves (docs/pods.md); else all three",
    )
    group.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="of process 0, a port that is free"
    )
    group.add_argument(
        "--processes", type=int, metavar="N", help="how many there are; 1: this alone"
    )
    group.add_argument("--process", type=int, metavar="I", help="which this one is, from 0")
    group.add_argument(
        "--wait",
        type=int,
        default=300,
        metavar="SECONDS",
        help="that processes wait for each other at the start (default 300)",
    )


def may_be_many(parser: argparse.ArgumentParser) -> bool:
    """Whether several processes may run this program together."""
    return any(action.dest == "coordinator" for action in parser._actions)


def consent(parser: argparse._ActionsContainer) -> None:
    """`--yes`, of every command that may fetch a published model."""
    parser.add_argument(
        "--yes",
        action="store_true",
        help="fetch a published model that is named and not here yet without a question",
    )


def labels(parser: argparse._ActionsContainer, default: str) -> None:
    """`--labels`, of every command that reads images with classes."""
    parser.add_argument(
        "--labels",
        default="",
        choices=("folders", "outer", "none"),
        help=f"what class folders mean (docs/data.md); default: {default}",
    )


def accept(parser: argparse._ActionsContainer) -> None:
    """`--accept`, of every command that scores."""
    parser.add_argument(
        "--accept",
        action="extend",
        nargs="+",
        default=[],
        choices=("duplicates", "constant", "few", "lossy"),
        help="score although there are copies, images of one colour, few samples, or JPEGs",
    )


def given(parser: argparse.ArgumentParser, words: Sequence[str]) -> frozenset[str]:
    """The names of what stands on a command line, also where it equals the default."""
    defaults = [(action, action.default) for action in parser._actions]
    try:
        for action, _ in defaults:
            action.default = argparse.SUPPRESS
        return frozenset(vars(parser.parse_args(words)))
    finally:
        for action, default in defaults:
            action.default = default


def is_given(args: argparse.Namespace, name: str) -> bool:
    """Whether an option stands on the command line; unknown of arguments made by hand."""
    return name in getattr(args, "given", ())


def check(args: argparse.Namespace, idle: Mapping[str, str]) -> None:
    """One error for all options that were given and are idle; `idle` says when each is not."""
    refuse({name: when for name, when in idle.items() if is_given(args, name)})


def refuse(wrong: Mapping[str, str]) -> None:
    """One error for what is asked for in vain; {option: when it has an effect}."""
    if wrong:
        told = ", ".join(f"{spelled(name)} (it is for {when})" for name, when in wrong.items())
        what, which = ("option has", "it") if len(wrong) == 1 else ("options have", "them")
        raise UserError(f"{len(wrong)} {what} no effect here: {told}: leave {which} out")


def check_mode(args: argparse.Namespace, modes: Mapping[str, Collection[str]], mode: str) -> None:
    """One error for all options that were given and are idle in this mode of a command.

    `modes` names those in which each option has an effect.
    """
    check(args, {name: " and ".join(of) for name, of in modes.items() if mode not in of})


def spelled(name: str) -> str:
    """`top_k` as it is written on a command line."""
    return f"--{name.replace('_', '-')}"
