"""The network of a step, loaded for use: whole, for drawing or for decoding alone.

And whether what was loaded fits: the tokenizer that a generator or a token set was made with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
from flax import nnx

from tokgen import parameters, rng, sharding, storage
from tokgen.checkpoints import checkpoint
from tokgen.config import building as configs, migration
from tokgen.interfaces import TokenLayout, UserError
from tokgen.nn import precision
from tokgen.sampling import decode


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A network loaded for use, with what its checkpoint says of it.

    Attributes:
        module: the network: plain functions of arrays, as `generators` and `tokenizers` have them.
        config: the whole config that it was trained or imported with.
        layout: of its tokens; None of a continuous bottleneck.
        classes: names by label; () where there are none.
        step: where the checkpoint lies.
        meta: its record, in JSON.
        fingerprint: a hash of weights and form: equal where it computes the same.

    Examples:
        >>> loaded = tokgen.load_generator("runs/generator")
        >>> loaded.layout.length, loaded.classes[:2], loaded.config.generator.name
        (64, ('disc', 'ring'), 'autoregressive')
    """

    module: nnx.Module
    config: ml_collections.ConfigDict
    layout: TokenLayout | None
    classes: tuple[str, ...]
    step: pathlib.Path
    meta: dict
    fingerprint: str


def load_tokenizer(path: str | os.PathLike, *, compute: str = "") -> Loaded:
    """The tokenizer of a checkpoint, with its averaged weights, as a module that can be changed.

    Args:
        path: a work directory, one step of it, or the name of a published model that is here.
        compute: "float32" or "bfloat16", in the place of the config's `precision.compute`.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or holds a generator.

    Examples:
        >>> tokenizer = tokgen.load_tokenizer("runs/tokenizer")
        >>> tokenizer.module.encode(np.zeros((1, 32, 32, 3), np.float32)).shape
        (1, 64, 1)
    """
    return load(path, "tokenizer", compute=compute)


def load_generator(path: str | os.PathLike, *, compute: str = "") -> Loaded:
    """The generator of a checkpoint, with its averaged weights, as a module that can be changed.

    Args:
        path: a work directory, one step of it, or the name of a published model that is here.
        compute: "float32" or "bfloat16", in the place of the config's `precision.compute`.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or holds a tokenizer.

    Examples:
        >>> generator = tokgen.load_generator("runs/generator", compute="bfloat16")
        >>> generator.module.layout.grids, generator.config.precision.compute
        (((8, 8),), 'bfloat16')
    """
    return load(path, "generator", compute=compute)


def load_tokenizer_of(generator: Loaded, path: str = "") -> Loaded:
    """The tokenizer that a generator was trained with.

    Args:
        generator: what `load_generator` gives.
        path: where its tokenizer lies now, if it was moved.

    Raises:
        UserError: it is not there, or is another one.

    Examples:
        >>> generator = tokgen.load_generator("runs/generator")
        >>> tokgen.load_tokenizer_of(generator).layout == generator.layout
        True
    """
    return _tokenizer_of(generator, path, load_tokenizer)


def _tokenizer_of(generator: Loaded, path: str, load: Callable[[Any], Loaded]) -> Loaded:
    wanted = generator.meta["tokenizer"]
    try:
        given = checkpoint.find(path) if path else None
    except UserError as error:
        raise UserError(f"--tokenizer {path}: {error}") from error
    if wanted is None:  # imported alone
        if given is None:
            raise UserError(
                f"generator {generator.step} was imported without its tokenizer; say where that "
                "is with --tokenizer PATH"
            )
        tokenizer = load(given)
        check_layout(tokenizer, generator.layout, f"generator {generator.step}")
        return tokenizer
    place = given or checkpoint.referred(wanted, generator.step)
    if not (place.exists() if storage.is_remote(place) else os.path.exists(place)):
        raise UserError(
            f"the tokenizer of {generator.step} is not at {place}; say where it is now with "
            "--tokenizer PATH"
        )
    tokenizer = load(place)
    check_tokenizer(tokenizer, wanted["fingerprint"], f"generator {generator.step}")
    check_layout(tokenizer, generator.layout, f"generator {generator.step}")
    return tokenizer


def check_tokenizer(tokenizer: Loaded, fingerprint: str, whose: str) -> None:
    """An error when tokens were made by another tokenizer."""
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{whose} was made with another tokenizer: its tokenizer's fingerprint is "
            f"{fingerprint[:16]}, that of {tokenizer.step} is {tokenizer.fingerprint[:16]}; use "
            "the tokenizer that made it, or run tokgen pretokenize and train again"
        )


def check_tokens(tokenizer: Loaded, header: Mapping, path: str) -> None:
    """An error when a token set is not of this tokenizer: of its weights, and in form."""
    whose = f"token set {path}"
    check_tokenizer(tokenizer, header["tokenizer"]["fingerprint"], whose)
    check_layout(tokenizer, TokenLayout.from_json(header["layout"]), whose)


def check_layout(tokenizer: Loaded, layout: TokenLayout, whose: str) -> None:
    """An error when a tokenizer's tokens cannot be those of a generator."""
    if tokenizer.layout != layout:
        raise UserError(
            f"{whose} writes tokens of {layout}, the tokenizer {tokenizer.step} has "
            f"{tokenizer.layout}; use the tokenizer that its tokens are of, imported with the same "
            "size and grouping of bits"
        )


def load(path: str | os.PathLike, kind: str = "", *, compute: str = "", which: str = "") -> Loaded:
    """The network of a checkpoint, an error when it is not of `kind`.

    `which` weights: "params" or "ema"; the averaged ones where there are, unless it says.
    """
    return _loaded(path, kind, compute, which, lambda module: module)


def load_reference(
    path: str | os.PathLike, kind: str = "tokenizer", *, compute: str = ""
) -> Loaded:
    """Of a network what others refer to, without a module; none of its arrays is read."""
    return _loaded(path, kind, compute, "", lambda module: nnx.Dict())


def load_reference_of(generator: Loaded, path: str = "") -> Loaded:
    """As `load_tokenizer_of`, but none of its arrays is read."""
    return _tokenizer_of(generator, path, load_reference)


def load_to_draw(path: str | os.PathLike, *, compute: str = "") -> Loaded:
    """The generator of a checkpoint, for nothing but drawing: laid out as it is decoded best.

    Parameters have the dtype that they are used in. As with `load_generator` the tokens are, but
    no second copy of the parameters is made on the way.
    """
    return _laid_out(path, "generator", compute)


def load_to_code(path: str | os.PathLike, *, compute: str = "") -> Loaded:
    """The tokenizer of a checkpoint, for nothing but encoding and decoding: as `load_to_draw`."""
    return _laid_out(path, "tokenizer", compute)


def load_to_code_of(generator: Loaded, path: str = "") -> Loaded:
    """As `load_tokenizer_of`, for nothing but encoding and decoding."""
    return _tokenizer_of(generator, path, load_to_code)


def load_to_decode(generator: Loaded, path: str = "") -> Loaded:
    """As `load_tokenizer_of`, without the encoder: for nothing but decoding."""
    return _tokenizer_of(generator, path, load_decoder)


def load_decoder(path: str | os.PathLike) -> Loaded:
    """The tokenizer of a checkpoint without its encoder: its quantizer, and what decodes."""

    def decoding(module: nnx.Module) -> nnx.Module:
        module.encoder = None
        return module

    return _laid_out(path, "tokenizer", "", decoding)


def _laid_out(
    path: str | os.PathLike,
    kind: str,
    compute: str,
    part: Callable[[nnx.Module], nnx.Module] = lambda module: module,
) -> Loaded:
    """`_loaded` as this platform runs what is wanted of it best, in the dtypes of its use.

    Without `compute` that is the config's, if the devices have units for it.
    """

    def form(module: nnx.Module) -> nnx.Module:
        return decode.laid_out(parameters.narrowed(part(module)))

    loaded = _loaded(path, kind, compute, "", form, precision.fitting)
    # once more, now that there are values: shapes do not say how a network lies over a mesh
    return dataclasses.replace(loaded, module=decode.laid_out(loaded.module))


def _loaded(
    path: str | os.PathLike,
    kind: str,
    compute: str,
    which: str,
    form: Callable[[nnx.Module], nnx.Module],
    own: Callable[[str], str] = lambda compute: compute,
) -> Loaded:
    """`load`; `form` makes of the network's shapes those of what is wanted of it, and `own` of what
    its config computes in, where nothing is asked for.

    It may leave parts out, change dtypes of floating leaves, and take rows of leaves.
    """
    step = checkpoint.find(path)
    meta = checkpoint.read_meta(step)
    if kind and meta["kind"] != kind:
        raise UserError(f"{step} holds a {meta['kind']}; need the checkpoint of a {kind}")
    config = ml_collections.ConfigDict(meta["config"])
    own_compute = config.precision.compute
    config.precision.compute = precision.asked(compute) if compute else own(own_compute)
    layout = TokenLayout.from_json(meta["layout"]) if meta["layout"] else None
    classes = tuple(meta["classes"])
    if meta["kind"] == "tokenizer":

        def make():
            return configs.tokenizer(config, rngs=rng.rngs(0))
    else:

        def make():
            return configs.generator(config, layout, len(classes), rngs=rng.rngs(0))

    shapes = nnx.eval_shape(make)  # no number is drawn
    _, params, stats = parameters.split(shapes)
    averaged = any(p.startswith("model/ema/") for p in meta["manifest"])
    which = which or ("ema" if averaged else "params")
    mesh = sharding.current()
    # averages are float32 whatever the parameters are
    wanted = {
        f"model/{which}/{p}": checkpoint.as_recorded(
            leaf, meta["manifest"].get(f"model/{which}/{p}")
        )
        if which == "ema"
        else leaf
        for p, leaf in parameters.paths(params).items()
    }
    wanted.update({f"model/stats/{p}": leaf for p, leaf in parameters.paths(stats).items()})
    whole = sharding.replicated(mesh)
    cpus = all(device.platform == "cpu" for device in mesh.devices.flat)
    marks = parameters.marked(shapes, on_cpu=cpus and mesh.shape["data"] == mesh.size)
    graph, *trees = parameters.split(form(marks))
    users: dict[str, list] = {}
    filled: list[dict[str, jax.Array]] = [{}, {}]
    for number, tree in enumerate(trees):
        for ours, mark in parameters.paths(tree).items():
            if not isinstance(mark, parameters.Mark):  # a constant of the form
                filled[number][ours] = jax.device_put(mark, whole)
                continue
            part, _, inside = mark.path.partition("/")
            stored = f"model/{which if part == 'params' else part}/{inside}"
            users.setdefault(stored, []).append((number, ours, mark))
    wanted = {path: leaf for path, leaf in wanted.items() if path in users}
    apart = {path for path, uses in users.items() if all(mark.rows for *_, mark in uses)}
    for path, layer, numbers in checkpoint.in_pieces(step, wanted, meta, apart):
        for number, ours, mark in users[path]:
            if layer is not None and mark.rows[0] != layer:
                continue
            found, where = mark.of(numbers, layer is not None), whole
            if meta["kind"] == "generator" and number == 0:
                where = sharding.of_network(ours, found.shape, mesh)
            filled[number][ours] = jax.device_put(found, where)
    params, stats = (checkpoint.unflatten(*pair) for pair in zip(trees, filled, strict=True))
    return Loaded(
        module=parameters.merge(graph, params, stats),
        config=config,
        layout=layout,
        classes=classes,
        step=step,
        meta=meta,
        fingerprint=fingerprint(meta, which),
    )


def fingerprint(meta: dict, which: str) -> str:
    """What a network computes, as a hash: its weights and the sections that shape it.

    Of `meta` as `read_meta` tells it, in the words that came first: token sets and generators have
    noted it, and whatever a network is called since, it computes what it did.
    """
    paths = {path: migration.first_parameter(path) for path in meta["manifest"]}
    used = {
        first: meta["manifest"][path]
        for path, first in paths.items()
        if first.startswith((f"model/{which}/", "model/stats/"))
    }
    sections = ("view", "encoder", "quantizer", "decoder", "pixels", "generator")
    config = migration.first_config(meta["config"])
    shape = {name: config.get(name) for name in sections}
    record = json.dumps([used, shape, meta["layout"]], sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()
