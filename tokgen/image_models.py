"""Models as a library user holds them: loaded once, asked often; images in and out.

`load` gives an ImageGenerator, which draws images and has its tokenizer with it, or an
ImageTokenizer, which turns images into tokens and back. Networks are loaded and compiled once.
Images that come in are PIL images, lists of them, or arrays (data/pictures.py); what goes out is
arrays, and `tokgen.to_pil` makes PIL images of them.
"""

from __future__ import annotations

import os

from tokgen import choices, image_generator, image_tokenizer, runtime
from tokgen.checkpoints import checkpoint, loading, pulling
from tokgen.errors import UserError
from tokgen.sampling import presets
from tokgen.zoo import model as zoo

PRECISIONS = ("float32", "bfloat16")


def load(
    path: str | os.PathLike, *, tokenizer: str = "", precision: str = "", yes: bool = False
) -> image_generator.ImageGenerator | image_tokenizer.ImageTokenizer:
    """A trained, imported or published model: what it is decides what is given.

    Args:
        path: a work directory (its best step is meant), one step of it, `hf://OWNER/NAME`, or
            the name of a published model, of `tokgen.models()`.
        tokenizer: of a generator: where its tokenizer lies now; "": where it lay in training.
        precision: of the network, "float32" or "bfloat16"; "" is the preset's, or float32.
        yes: fetch a published model that is not here yet without asking.

    Returns:
        ImageGenerator or ImageTokenizer.

    Raises:
        UserError: there is no such checkpoint, it is damaged, its tokenizer is another one, or a
            published model was not fetched.

    Examples:
        >>> model = tokgen.load("runs/generator")
        >>> model.sample(classes="ring", number=2)
        2 samples of 32 x 32 pixels: ring
        >>> tokgen.load("runs/tokenizer").layout
        TokenLayout(vocab=(240,), grids=((8, 8),))
        >>> tokgen.load("rar-b", yes=True).classes[207]
        'golden retriever'
    """
    if precision and precision not in PRECISIONS:
        raise UserError(choices.refusal(PRECISIONS, precision, "precision"))
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UserError(
            "load needs the path of a checkpoint, or the name of a published model, of "
            f"tokgen.models(); found {path!r:.100}"
        )
    runtime.devices()
    name = str(path) if zoo.is_name(path) else ""
    if name:
        pulling.pull(name, yes=yes)
    step = checkpoint.find(path)
    meta = checkpoint.read_meta(step)
    if meta["kind"] == "tokenizer":
        if tokenizer:
            raise UserError(
                f"tokenizer= is for generators; {path} is a tokenizer itself: leave it out"
            )
        loaded = loading.load_to_code(step, compute=precision or "float32")
        return image_tokenizer.ImageTokenizer(loaded, loaded, name)
    compute = precision or presets.precision(meta, presets.Choice())
    loaded = loading.load_generator(step, compute=compute)
    decoder = loading.load_to_code_of(loaded, tokenizer)
    encoder = decoder
    if decoder.config.precision.compute != "float32":  # tokens are those of token sets
        encoder = loading.load_to_code(decoder.step, compute="float32")
    tokenizer_ = image_tokenizer.ImageTokenizer(encoder, decoder)
    return image_generator.ImageGenerator(loaded, tokenizer_, name, precision)
