"""Small files in the form of published ones, under the names that the zoo knows them by.

`rows` gives the rows of the zoo with the size of these files; `write` makes what the hub has. The
numbers in them are random, so what they draw is noise: of the right size, of a thousand classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants

from tests import loopback
from tokgen import parameters, rng
from tokgen.config import building, reading
from tokgen.interfaces import TokenLayout
from tokgen.pretrained import hub, system
from tokgen.pretrained.formats import writer
from tokgen.zoo import model as zoo

KNOWN = zoo.known()  # those of full size, whatever a test puts in their place
CODES, SIDE, CLASSES = 16, 4, 1000
FLAT = TokenLayout((CODES,), ((SIDE, SIDE),))
SCALES = (1, 2, 4)
PYRAMID = TokenLayout((CODES,), tuple((n, n) for n in SCALES))
NETWORK = dict(widths=(32, 32), blocks=1)


@dataclasses.dataclass(frozen=True)
class Small:
    """A model as small as its system allows: what is set in its recipe, and what is said of it."""

    recipe: str
    fields: Callable[[object], None]
    layout: TokenLayout = FLAT
    configuration: dict = dataclasses.field(default_factory=dict)
    overrides: tuple[str, ...] = ()


def _llamagen_vq(config):
    for part in (config.encoder, config.decoder):
        part.update(NETWORK, hidden=32)
    config.quantizer.codes = CODES


def _maskgit_vqgan(config):
    for part in (config.encoder, config.decoder):
        part.update(NETWORK)
    config.quantizer.update(codes=CODES, channels=32)


def _var_vqvae(config):
    for part in (config.encoder, config.decoder):
        part.update(NETWORK, hidden=8)
    config.view.size = (8, 8)
    config.quantizer.scales = SCALES
    config.quantizer.quantizer.update(codes=CODES, channels=8)


def _maskbit_tokenizer(config):
    for part in (config.encoder, config.decoder):
        part.update(NETWORK)
    config.quantizer.update(bits=4, groups=(2, 2))


def _generator(**more):
    def fields(config):
        config.generator.update(width=32, depth=2, heads=4, hidden=64, **more)

    return fields


SMALL = {
    "llamagen-tokenizer": Small(
        "tokenizer/llamagen_vq",
        _llamagen_vq,
        configuration=dict(num_res_blocks=1),
        overrides=("view.size=8,8",),
    ),
    "llamagen-b": Small(
        "generator/llamagen",
        _generator(),
        configuration=dict(n_head=4, block_size=16),
    ),
    "maskgit-vqgan": Small(
        "tokenizer/maskgit_vqgan",
        _maskgit_vqgan,
        configuration=dict(hidden_channels=32, channel_mult=[1, 1], num_res_blocks=1, resolution=8),
    ),
    "rar-b": Small(
        "generator/rar",
        _generator(),
        configuration=dict(model=dict(generator=dict(num_attention_heads=4))),
    ),
    "var-tokenizer": Small(
        "tokenizer/var_vqvae",
        _var_vqvae,
        configuration=dict(ch_mult=[1, 1], num_res_blocks=1, v_patch_nums=list(SCALES)),
    ),
    "var-d16": Small(
        "generator/var",
        _generator(channels=8),
        layout=PYRAMID,
        configuration=dict(patch_nums=list(SCALES)),
    ),
    "maskbit-tokenizer-14bit": Small(
        "tokenizer/maskbit",
        _maskbit_tokenizer,
        configuration=dict(hidden_channels=32, channel_mult=[1, 1], num_res_blocks=1),
        overrides=("view.size=8,8",),
    ),
    "maskbit-14bit": Small(
        "generator/maskbit",
        _generator(),
        layout=TokenLayout((4, 4), ((SIDE, SIDE),)),
        configuration=dict(heads=4),
    ),
}


@contextlib.contextmanager
def served(
    rows: dict[str, zoo.Model],
    files: dict[str, pathlib.Path],
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[loopback.Hub]:
    """A hub that has these files, a zoo that knows these rows, and caches in `folder`."""
    monkeypatch.setattr(zoo, "known", lambda: rows)
    monkeypatch.setenv("TOKGEN_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(hub, "PAUSE", 0.001)
    with loopback.serving() as found:
        found.files |= files
        form = found.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", form)
        yield found


def write(name: str, file: pathlib.Path) -> None:
    """The published file of a model of SMALL."""
    small, found = SMALL[name], system.named(KNOWN[name].system)
    config = reading.load(f"configs/{small.recipe}.py")
    small.fields(config)
    config.precision.compute = "float32"
    if found.tokens is None:
        make = nnx.eval_shape(lambda: building.tokenizer(config, rngs=rng.rngs(0)))
    else:
        make = nnx.eval_shape(
            lambda: building.generator(config, small.layout, CLASSES, rngs=rng.rngs(0))
        )
    random = np.random.default_rng(len(name))
    _, params, stats = parameters.split(make)
    filled = {
        path: random.normal(size=leaf.shape, scale=0.1).astype(np.float32)
        for tree in (params, stats)
        for path, leaf in parameters.paths(tree).items()
    }
    weights = {}
    for row in found.rows(make):
        parts = [
            filled[place] if isinstance(place, str) else filled[place[0]][place[1]]
            for place in row.places
        ]
        weights[row.key] = np.asarray(row.rule.published(parts), np.float32)
    file.parent.mkdir(parents=True, exist_ok=True)
    writer.write(file, weights, form=found.form, wrap=found.wrap)


def rows(folder: pathlib.Path, *names: str) -> tuple[dict[str, zoo.Model], dict[str, pathlib.Path]]:
    """(rows of the zoo of these and their tokenizers, what a hub has of them), made in `folder`."""
    models, files = {}, {}
    for name in dict.fromkeys(one for n in names for one in (KNOWN[n].tokenizer, n) if one):
        key = f"{KNOWN[name].repository}/{KNOWN[name].file}"
        files[key] = folder / key
        if not files[key].exists():
            write(name, files[key])
        size = files[key].stat().st_size
        models[name] = dataclasses.replace(
            KNOWN[name],
            parameters=size // 4,
            size=size,
            configuration=SMALL[name].configuration,
            overrides=SMALL[name].overrides,
        )
    return models, files
