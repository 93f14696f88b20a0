"""Which generator fits which tokenizer: every pair is built, and what cannot be says why."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from flax import nnx

from tokgen import rng
from tokgen.config import building
from tokgen.errors import UserError
from tokgen.interfaces import Generator, Quantizer, TokenLayout

# What stands for each kind of token -> a quantizer's section; "1-D" ones write a row of tokens.
TOKENIZERS = {
    "vq": dict(name="vq", codes=16, channels=4),
    "vq, 1-D": dict(name="vq", codes=16, channels=4),
    "ibq": dict(name="ibq", codes=16, channels=4),
    "fsq": dict(name="fsq", levels=(4, 3)),
    "lfq": dict(name="lfq", bits=4),
    "lfq, equal groups": dict(name="lfq", bits=4, groups=(2, 2)),
    "lfq, unequal groups": dict(name="lfq", bits=4, groups=(1, 3)),
    "bsq, equal groups": dict(name="bsq", bits=4, groups=(2, 2)),
    "pyramid of vq": dict(name="multiscale", quantizer=dict(name="vq", codes=16, channels=4)),
    "pyramid of bits": dict(name="multiscale", quantizer=dict(name="bsq", bits=4, groups=(2, 2))),
    "gaussian": dict(name="gaussian", channels=4),
}
# Generator -> its section; sizes are added.
GENERATORS = {
    "raster": dict(name="autoregressive", positions="learned", variant="llama_narrow"),
    "rotary": dict(name="autoregressive", positions="rotary", variant="llama_narrow"),
    "random": dict(
        name="autoregressive", order="random", positions="target_aware", variant="llama_narrow"
    ),
    "rar": dict(
        name="autoregressive",
        conditioning="cls_label",
        positions="target_aware",
        variant="rar",
        head="adaptive",
        shuffle=(2, 4),
    ),
    "factor": dict(
        name="autoregressive", positions="learned", variant="llama_narrow", head="factor"
    ),
    "next_scale": dict(name="next_scale", variant="var"),
    "masked": dict(name="masked", variant="vit", head="linear"),
    "masked bits": dict(
        name="masked", inputs="bits", entry="normed", variant="bert", head="transformed"
    ),
}
SMALL = dict(width=16, depth=1, heads=2)


def quantizer(kind: str, side: int) -> Quantizer:
    """A small quantizer of a kind, for grids of `side`."""
    grid = (1, side * side) if kind.endswith("1-D") else (side, side)
    section = dict(TOKENIZERS[kind])
    if section["name"] == "multiscale":
        section["scales"] = tuple(range(1, side + 1))
    return building.build(section, "quantizer", grid=grid, rngs=rng.rngs(0))


def generator(
    kind: str, codec: Quantizer, *, classes: int, sizes: Mapping[str, int] = SMALL
) -> Generator:
    """A small generator of a kind for the tokens of a codec; UserError where it does not fit."""
    if codec.layout is None:
        raise UserError("a continuous bottleneck writes no tokens")
    section = GENERATORS[kind] | sizes
    if section["name"] == "next_scale":
        section["channels"] = codec.channels
    if section.get("head") == "factor":
        section["factor"] = 1
    settings = dict(generator=section, precision=dict(params="float32", compute="float32"))
    return building.generator(settings, codec.layout, classes, rngs=rng.rngs(0))


def reason(kind: str, codec: Quantizer) -> str:
    """Why a generator does not fit; empty if it does."""
    try:
        nnx.eval_shape(lambda: generator(kind, codec, classes=3))
    except UserError as error:
        return str(error).removeprefix("config section 'generator': ")
    return ""


def described(layout: TokenLayout | None) -> str:
    """A layout in few words."""
    if layout is None:
        return "continuous"
    grids = ", ".join(f"{rows}x{columns}" for rows, columns in layout.grids)
    return f"{layout.length} tokens ({grids}) of {layout.vocab}"


def table(codecs: Mapping[str, Quantizer]) -> str:
    """The table of all generators over some codecs, with a number for each reason."""
    first = max(len(name) for name in codecs)
    lines = [" " * first + "  " + "  ".join(GENERATORS)]
    reasons: dict[str, int] = {}
    for name, codec in codecs.items():
        cells = []
        for kind in GENERATORS:
            why = reason(kind, codec)
            number = reasons.setdefault(why, len(reasons) + 1) if why else 0
            cells.append((f"- {number}" if why else "yes").ljust(len(kind)))
        lines.append(f"{name.ljust(first)}  {'  '.join(cells)}".rstrip())
    for why, number in reasons.items():
        lines += ["", *textwrap.wrap(f"{number}: {why}", 88, subsequent_indent="   ")]
    return "\n".join(lines)


def stand_ins(side: int = 4) -> dict[str, Quantizer]:
    """A quantizer of every kind, not built but in shape, for grids of `side`."""
    return {kind: nnx.eval_shape(lambda k=kind: quantizer(k, side)) for kind in TOKENIZERS}
