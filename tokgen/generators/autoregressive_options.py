"""Which options of an autoregressive generator fit each other; refusals before any work."""

from __future__ import annotations

from tokgen.interfaces import UserError
from tokgen.nn import conditioning as conditioning_names, heads as head_names, variants


def check(
    conditioning: str,
    texts: tuple[int, int] | None,
    head: str,
    factor: int,
    shuffle: tuple[int, int] | None,
) -> None:
    """What only one conditioning or head takes; the rest would be read by nobody."""
    if texts is not None and conditioning != "captions":
        raise UserError(
            f"texts are for conditioning='captions'; found conditioning={conditioning!r}, "
            f"texts={texts}"
        )
    if (head == "factor") != (factor > 0):
        raise UserError(
            "factor is the depth of the head 'factor', at least 1 there and 0 with all others; "
            f"found head={head!r}, factor={factor}"
        )
    if shuffle is not None and shuffle[0] > shuffle[1]:
        raise UserError(f"shuffle is (first, last) step of its fall; found {tuple(shuffle)}")


def check_variant(variant: str, conditioning: str, head: str) -> None:
    """Adaptive blocks and heads need a conditioning that tells them something."""
    told = conditioning in conditioning_names.ADAPTIVE
    if variants.named(variant).adaptive != told or (head in head_names.ADAPTIVE and not told):
        raise UserError(
            "an adaptive variant needs conditioning that its blocks are told, no other can be told "
            f"one, and an adaptive head needs it too; found variant={variant!r}, "
            f"conditioning={conditioning!r}, head={head!r}: blocks are told "
            f"{' and '.join(conditioning_names.ADAPTIVE)}"
        )
    if head in head_names.TIED:
        raise UserError(f"head {head!r} is for masked generators; use 'linear', for example")
