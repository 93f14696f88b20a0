"""Decoding and encoding by the published tokenizers, one image of 256 pixels at a time.

    python benchmarks/tokenizers.py [--peers DIR --python PYTHON] [--rows NAME ...]

Prints CPU seconds of one call on one core, weights random, and the same of the peer from its
checkout (peers.py), turn by turn. What is made of the image doesn't matter, how long it takes does.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import beside
import jax
import machine
import networks
import numpy as np
import roofline

from tokgen import flops
from tokgen.tokenizers import tokenizer as tokenizers

PACKAGES = ("jax", "flax", "numpy")
TASKS = ("decode", "encode")


@dataclasses.dataclass(frozen=True)
class Row:
    """A published tokenizer: its recipe by its name in configs/, and the side of its images."""

    config: str
    size: int = 256
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the config, changed
    peer: str = ""  # by its name in peers.py; "": as the row
    ours: bool = False  # the peer runs on jax


ROWS = {
    "maskgit-vqgan": Row("tokenizer/maskgit_vqgan.py:256"),
    "the same, its JAX": Row(
        "tokenizer/maskgit_vqgan.py:256", peer="maskgit-vqgan in JAX", ours=True
    ),
    "LlamaGen VQ-16": Row("tokenizer/llamagen_vq.py:vq16"),
    "VAR VQVAE": Row("tokenizer/var_vqvae.py:256"),
    "TiTok-S-128": Row("tokenizer/titok.py:s128"),
    "TiTok-L-32": Row("tokenizer/titok.py:l32"),
    "MaskBit 14-bit": Row("tokenizer/maskbit.py:lfq14"),
}
# What a turn is called: "maskgit-vqgan decode"
PEERS = {
    f"{name} {task}": beside.Peer(f"{row.peer or name} {task}", ours=row.ours)
    for name, row in ROWS.items()
    for task in TASKS
}
# --quick: of the convolutional rows
NARROW = {
    f"{side}.{field}": value
    for side in ("encoder", "decoder")
    for field, value in {"widths": (32, 32), "blocks": 1}.items()
}


def way_of(name: str, precision: str, quick: bool) -> tuple[Callable, Callable[[], float]]:
    """(what one turn of a row calls, in how many seconds this core could do it at best)."""
    name, _, task = name.rpartition(" ")
    row = ROWS[name]
    size = 8 if quick else row.size
    fields = {**row.fields, **(NARROW if quick else {}), "view.size": (size, size)}
    tokenizer = networks.tokenizer(row.config, fields, precision)
    draw, layout = np.random.default_rng(0), tokenizer.layout
    if task == "decode":
        tokens_BLG = draw.integers(0, layout.vocab, (1, layout.length, layout.groups), np.int32)
        given = jax.device_put(tokens_BLG)
        program = decode
    else:
        given = jax.device_put(draw.uniform(size=(1, size, size, 3)).astype(np.float32))
        program = encode

    def least() -> float:
        return flops.of(program, tokenizer, given) / roofline.this_cpu(precision).flops

    return lambda: jax.block_until_ready(program(tokenizer, given)), least


@jax.jit
def decode(tokenizer: tokenizers.Tokenizer, tokens_BLG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images of tokens, and which are not finite."""
    return tokenizer.decoded(tokens_BLG)


@jax.jit
def encode(tokenizer: tokenizers.Tokenizer, image_BHW3: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens of images, and whose latents are not finite."""
    return tokenizer.encoded(image_BHW3)


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=beside.PRECISIONS, help="default: both")
    parser.add_argument("--quick", action="store_true", help="tiny networks: does it work?")
    beside.arguments(parser)
    arguments = parser.parse_args()
    if arguments.serve:
        return machine.serve(lambda: way_of(arguments.serve, arguments.precision, arguments.quick))
    if arguments.quick:
        arguments.pairs = 1
        arguments.rows = arguments.rows or ["MaskBit 14-bit decode", "MaskBit 14-bit encode"]
    print(machine.header(PACKAGES))
    precisions = (arguments.precision,) if arguments.precision else beside.PRECISIONS
    return beside.table("tokenizers.py", PEERS, precisions, arguments)


if __name__ == "__main__":
    sys.exit(main())
