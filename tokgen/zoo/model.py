"""What the zoo says of a published model; every other file of the folder is data, MODELS by name.

Nothing heavy is imported here: `tokgen models` prints the table without jax.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import os
import pkgutil
from collections.abc import Mapping

from tokgen import zoo
from tokgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    """A published file, and what it takes to use it.

    Attributes:
        system: of `pretrained.system`: how the file is read.
        file: its name; in a repository of the hub, its path there.
        repository: OWNER/NAME on the Hugging Face hub; "" where the file lies elsewhere.
        address: where a file lies that is not on the hub: a URL to be opened by the user.
        parameters: numbers that an optimizer would move, in our model.
        size: bytes of the file, about: those of its arrays where no source states the file's own.
            The hub says it exactly when the file is asked for.
        licence: the terms of the weights, as where they lie states them. Where only the code that
            made them has a licence: that one, and "(code)"; the weights' own are not stated.
        family: the name of the published work.
        tokenizer: of a generator, the name of its tokenizer in the zoo; "" of a tokenizer.
        pixels: rows and columns of the images that it was made for.
        fid: as published: of a generator FID of 50,000 samples, of a tokenizer rFID; None where
            none is.
        paper: where the model is described.
        configuration: the published configuration, where the weights do not say it all.
        overrides: fields of our config that change no weight, as `tokgen import --set` takes them.
        unknown: "opaque" for files with objects beside the weights, which are stepped over.
        classes: the names that labels have: "imagenet", or "" for none.
        text: features of texts that a generator, or a tokenizer's decoder, reads: of which network,
            how many of how many channels; "" where it reads none.
        otherwise: another system, of a file whose keys are not those of `system`.
    """

    system: str
    file: str
    parameters: int
    size: int
    licence: str
    family: str
    paper: str
    repository: str = ""
    address: str = ""
    tokenizer: str = ""
    pixels: int = 256
    fid: float | None = None
    configuration: Mapping[str, object] = dataclasses.field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    unknown: str = "refuse"
    classes: str = ""
    text: str = ""
    otherwise: str = ""

    @property
    def home(self) -> str:
        """Where the file lies, for people."""
        return f"huggingface.co/{self.repository}" if self.repository else self.address

    @property
    def kind(self) -> str:
        """A tokenizer or a generator."""
        return "generator" if self.tokenizer else "tokenizer"


@functools.cache
def known() -> dict[str, Model]:
    """Every published model by name: the files of the folder in order, their rows as they stand.

    Returns:
        {name: Model}: system, file, its bytes, parameters, licence, published FID, tokenizer.

    Examples:
        >>> tokgen.models()["var-d16"].tokenizer
        'var-tokenizer'
        >>> sum(model.kind == "generator" for model in tokgen.models().values()) > 1
        True
    """
    models: dict[str, Model] = {}
    for file in pkgutil.iter_modules(zoo.__path__):
        module = importlib.import_module(f"tokgen.zoo.{file.name}")
        models |= getattr(module, "MODELS", {})
    return models


def named(name: str) -> Model:
    """The model of a name, or an error with the nearest names."""
    if name in known():
        return known()[name]
    near = difflib.get_close_matches(str(name).lower(), known(), 3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise UserError(
        f"no published model is called {name!r:.100}{hint} `tokgen models` lists them, "
        f"{len(known())} in all"
    )


def of(system: str) -> dict[str, Model]:
    """The models that are read as a system, by name."""
    return {n: model for n, model in known().items() if system in (model.system, model.otherwise)}


def is_name(text: str | os.PathLike) -> bool:
    """Whether a CKPT names a published model; a path that exists is that path."""
    return isinstance(text, str) and text in known() and not os.path.exists(text)
