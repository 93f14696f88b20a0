"""Metrics of held-out images: reconstruction by a tokenizer, likelihood under a generator.

Processes whose devices compute together (a mesh over all of them, as while training) have the same
images; of those with a mesh each, every one takes its share, and all have the metrics of them all.
"""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import boundary, distributed, orders, report, rng, sharding
from tokgen.data import datasets, loader, scan, sources, views
from tokgen.interfaces import Generator, PyTree, Text, TokenLayout, UserError
from tokgen.metrics import codebook, reconstruction as quality

PIXELS = 50 * 256 * 256  # of the images that are put through a tokenizer at a time
PIXEL_METRICS = ("psnr_db", "ssim", "codebook_usage", "codebook_perplexity")


def spread(length: int, count: int) -> np.ndarray:
    """At most `count` indices, evenly over a set that may be sorted by class, in a mixed order.

    The first few are what a picture shows: they shouldn't be of one class.
    """
    return np.random.default_rng(0).permutation(sources.evenly(length, count))


@jax.jit
def _reconstruct(
    tokenizer: nnx.Module,
    image_BHW3: jax.Array,
    text_BTE: jax.Array | None,
    distances: dict[str, nnx.Module],
) -> tuple[jax.Array | None, jax.Array, dict[str, jax.Array], jax.Array]:
    """(tokens_BLG or None, bytes_BHW3, {measure: [B] values}, [B] true where one is not finite)."""

    def of(tokenizer, distances, image_BHW3, text_BTE):
        latents_BPC = tokenizer.latents(image_BHW3)
        invalid_B = boundary.not_finite(latents_BPC) | boundary.damaged(tokenizer.quantizer)
        if tokenizer.layout is None:  # continuous: the most likely latents in the place of codes
            tokens_BLG, codes_BPC = None, tokenizer.quantizer.mode(latents_BPC)
        else:
            tokens_BLG = tokenizer.quantizer.encode(latents_BPC)
            codes_BPC = tokenizer.quantizer.decode(tokens_BLG)
        decoded = tokenizer.decode_latents(codes_BPC, cond=text_BTE)
        bytes_BHW3, undecoded_B = quality.bytes_of(decoded)
        # through bytes: the metrics are those of the files that a user would get
        decoded = quality.from_uint8(bytes_BHW3)
        measured = {"psnr_db": quality.psnr(image_BHW3, decoded)}
        # on the scale of the loss, [-1, 1]
        measured["l2"] = 4 * jnp.mean(jnp.square(image_BHW3 - decoded), (1, 2, 3))
        if min(image_BHW3.shape[1:3]) >= quality.WINDOW:
            measured["ssim"] = quality.ssim(image_BHW3, decoded)
        for name, distance in distances.items():
            measured[name] = distance(2 * image_BHW3 - 1, 2 * decoded - 1)
        return tokens_BLG, bytes_BHW3, measured, invalid_B | undecoded_B

    return sharding.by_rows(of, (tokenizer, distances), (image_BHW3, text_BTE))


def reconstruct(
    tokenizer: nnx.Module,
    part: dict,
    distances: Mapping = types.MappingProxyType({}),
    *,
    batch: int = 0,
    named: Callable[[int], str] | None = None,
) -> tuple[np.ndarray | None, np.ndarray, dict[str, np.ndarray]]:
    """(tokens_BLG or None, uint8 reconstructions, {measure: its value for each image}).

    `distances` are further measures of pairs of images in [-1, 1], such as LPIPS. A part shorter
    than `batch` is filled up, so that one program serves all. What is not finite on the way is an
    error that says which images, by `named` of their rows.
    """
    rows, mesh = len(part["image"]), sharding.current()
    given = sharding.filled((quality.from_uint8(part["image"]), part.get("text")), batch, mesh)
    with jax.set_mesh(mesh):
        found = jax.device_get(_reconstruct(tokenizer, *given, dict(distances)))
    tokens_BLG, decoded, values, invalid_B = jax.tree.map(lambda leaf: leaf[:rows], found)
    boundary.refuse(invalid_B, "what encoder and decoder make of an image", named)
    for name, value_B in values.items():
        boundary.refuse(~np.isfinite(value_B), name, named)
    return tokens_BLG, decoded, values


def watched(batches: Iterable[dict], total: int, what: str) -> Iterator[dict]:
    """The batches, with a progress bar where `what` names the job; none inside a training run."""
    if not what:
        yield from batches
        return
    with report.bar(total, unit="image", what=what) as bar:
        for part in batches:
            yield part
            bar.update(len(part["label"]))


def bounded(view: views.View, count: int, batch: int = 0) -> int:
    """Images at a time: `batch`, or by default fewer of larger ones; no more than there are."""
    rows, columns = view.size
    return min(batch or max(1, min(50, PIXELS // (rows * columns))), count)


def reconstruction(
    tokenizer: nnx.Module,
    source: sources.RandomAccess,
    view: views.View,
    *,
    count: int,
    batch: int = 0,
    shown: int = 0,
    what: str = "",
) -> tuple[dict, tuple]:
    """(metrics, (originals, reconstructions) of the first `shown`, uint8) over `count` images.

    Of the first batch, where `shown` is 0.

    `images` counts those that were measured: what cannot be read is told and left out.
    """
    measured, counts, pairs = {}, None, []
    chosen = spread(len(source), count)
    with distributed.shared():
        for part, made in reconstructed(
            tokenizer, source, view, chosen=chosen, batch=batch, what=what
        ):
            tokens_BLG, decoded, values = made
            for name, value_B in (values | {"index": part["index"]}).items():
                measured.setdefault(name, []).append(value_B)
            if tokens_BLG is not None:
                found = codebook.counts(tokens_BLG, tokenizer.layout)
                counts = found if counts is None else tuple(map(np.add, counts, found))
            if not pairs or sum(len(image) for image, _ in pairs) < shown:
                pairs.append((part["image"], decoded))
    measured, counts = _of_all(source, chosen, measured, counts)
    metrics, images_ = {}, 0
    for name, value_N in measured.items():
        metrics[name], images_ = float(value_N.mean()), len(value_N)
        metrics[f"{name}_error"] = standard_error(value_N)
    if counts is not None:
        metrics["codebook_usage"] = float(np.mean([codebook.usage(c) for c in counts]))
        metrics["codebook_perplexity"] = float(np.mean([codebook.perplexity(c) for c in counts]))
    pairs = tuple(np.concatenate(parts)[: shown or None] for parts in zip(*pairs, strict=True))
    return metrics | numbers(images_, len(chosen)), pairs


def reconstructed(
    tokenizer: nnx.Module,
    source: sources.RandomAccess,
    view: views.View,
    *,
    chosen: np.ndarray,
    batch: int = 0,
    what: str = "",
) -> Iterator[tuple[dict, tuple]]:
    """(a batch of the `chosen` images, what `reconstruct` gives of it), of this process's share."""
    own = _share(source, chosen, bounded(view, len(chosen), batch), view.channels)
    how = dict(batch_size=own.batch, indices=own.index_N, least=0, threads=loader.THREADS)
    for part in watched(loader.once(source, view, **how), len(own.index_N), what):
        naming = datasets.named(source, part["index"])
        yield part, reconstruct(tokenizer, part, batch=own.filled, named=naming)


class _Share(NamedTuple):
    """What this process measures: so many at a time, filled up to as many rows."""

    index_N: np.ndarray
    batch: int
    filled: int


def _share(
    source: sources.RandomAccess, chosen: np.ndarray, batch: int, channels: int = 0
) -> _Share:
    """Of each batch that one process would have, the rows that lie on the devices of this one.

    So every image has the place in a program of the same size that it has there, to the last bit;
    what cannot be read is left out before, also where all have the same images: none may miss one
    that others have.
    """
    if not distributed.many():
        return _Share(chosen, batch, batch)
    share, shares = distributed.share()
    channels = channels or (source.view.channels if source.view is not None else 0)
    readable = np.asarray(distributed.decided(_readable, source, chosen, channels), np.int64)
    if shares == 1:
        return _Share(readable, batch, batch)
    filled = distributed.rows(batch)
    rows = slice(share * filled, (share + 1) * filled)
    parts = [readable[first : first + batch][rows] for first in range(0, len(readable), batch)]
    if not parts:  # of the scores: `_of_all` says so
        return _Share(readable, 1, filled)
    return _Share(np.concatenate(parts), max(1, len(parts[0])), filled)


def _readable(source: sources.RandomAccess, chosen: np.ndarray, channels: int) -> list[int]:
    """Those that can be read; of token shards, those that have tokens."""
    if scan.pictures(source) is not None:
        chosen = scan.readable(source, chosen, channels)
    for index in chosen.tolist():
        if index in source.missing:
            source.unreadable.add(index, source.missing[index][1])
    return [index for index in chosen.tolist() if index not in source.missing]


def _of_all(
    source: sources.RandomAccess,
    chosen: np.ndarray,
    measured: Mapping[str, list[np.ndarray]],
    counts: Sequence[np.ndarray] | None = None,
) -> tuple[dict[str, np.ndarray], Sequence[np.ndarray] | None]:
    """(float64 values that lead with the images, how often each code occurs) of all shares.

    In the order in which the images were chosen, so that no figure depends on who measured which.
    `measured` also says of which images its values are, as `index`.
    """
    found = {n: np.concatenate(parts) for n, parts in measured.items() if parts}
    if distributed.share()[1] > 1:
        own = {
            "values": {name: values.tolist() for name, values in found.items()},
            "counts": None if counts is None else [count_V.tolist() for count_V in counts],
        }
        texts = distributed.gathered("what was measured", json.dumps(own))
        told = [json.loads(text) for text in texts]
        full = [each for each in told if each["values"]]  # a share may have no image
        names = full[0]["values"] if full else ()
        found = {n: np.concatenate([np.asarray(each["values"][n]) for each in full]) for n in names}
        several = [each["counts"] for each in full if each["counts"] is not None]
        counts = [np.sum(of, axis=0) for of in zip(*several, strict=True)] if several else None
    if not found:
        raise UserError(
            "0 images can be read, and metrics need at least 1; is this a set of images?\n"
            f"{source.unreadable.listed()}"
        )
    sorted_N = np.argsort(chosen)
    place_N = sorted_N[np.searchsorted(chosen, found.pop("index"), sorter=sorted_N)]
    order_N = np.argsort(place_N)
    return {name: values[order_N].astype(np.float64) for name, values in found.items()}, counts


def numbers(images_: int, wanted: int) -> dict[str, int]:
    """How many images metrics are of; and how many more they should be of, if any is unreadable."""
    return {"images": images_} | ({"unreadable": wanted - images_} if images_ < wanted else {})


def standard_error(value_B: np.ndarray) -> float | None:
    """Of the mean; one value says nothing of it."""
    return float(np.std(value_B, ddof=1) / math.sqrt(len(value_B))) if len(value_B) > 1 else None


@functools.partial(jax.jit, static_argnames="order")
def _exact(
    generator: Generator,
    codec: nnx.Module | None,
    batch: dict,
    keys_B: jax.Array,
    order: orders.Order | None = None,
) -> jax.Array:
    """[B] nats of the images, under the generator's own order or each under one of its key."""

    def of(generator, codec, batch, keys_B):
        order_BL = None
        if order is not None:
            order_BL = jax.vmap(lambda key: order(generator.layout, key))(keys_B)
        return generator.nats(datasets.token_batch(batch, order_BL), codec).sum(-1)

    return sharding.by_rows(of, (generator, codec), (batch, keys_B))


@jax.jit
def _bound(
    generator: Generator, codec: nnx.Module | None, batch: dict, keys_B: jax.Array
) -> jax.Array:
    """[B] nats of the images, each by a draw of its own key: it depends on nothing beside it."""

    def of(generator, codec, batch, keys_B):
        def of_one(one, key):
            one = jax.tree.map(lambda leaf: leaf[None], one)
            return generator.nats(one, codec, key=key)[0].sum()

        return jax.vmap(of_one)(datasets.token_batch(batch), keys_B)

    return sharding.by_rows(of, (generator, codec), (batch, keys_B))


def likelihood(
    generator: Generator,
    codec: nnx.Module | None,
    source: sources.RandomAccess,
    *,
    count: int,
    batch: int = 50,
    what: str = "",
    order: str = "",
    draws: int = 8,
    seed: int = 0,
    label_C: np.ndarray | None = None,
) -> dict[str, float]:
    """Held-out nats and bits per token, summed over the symbols of a token.

    Images are the sample of which `nats_error` is the standard error. Exact, but for a generator
    that says otherwise (`exact`): then the mean of an upper bound over `draws` random orders for
    each image, and `nats_orders_error` is the share of the error that more draws would mend. An
    `order` by name is for generators that go in any; under "random" each of the draws is exact.
    `label_C` has the generator's number of each class of the source, where these differ.
    """
    exact, order_of = generator.exact, None
    if order:
        order_of = _order(generator, order)
    draws = draws if order == "random" or not exact else 1
    program = functools.partial(_exact, order=order_of) if exact else _bound
    chosen = spread(len(source), count)  # of which some may not be readable
    own = _share(source, chosen, min(batch, len(chosen)))
    mesh, found = sharding.current(), {"index": [], "nats": []}
    how = dict(batch_size=own.batch, indices=own.index_N, least=0)
    with distributed.shared():
        for part in watched(loader.once(source, **how), len(own.index_N), what):
            rows = len(part["label"])
            if label_C is not None:
                part["label"] = label_C[part["label"]]
            padded = sharding.filled(part, own.filled, mesh)
            keys_B = rng.per_image(seed, "eval", padded.pop("index"))
            if "image" in padded:
                with jax.set_mesh(mesh):
                    padded["tokens"] = source.encode(padded.pop("image"))
            naming = datasets.named(source, part["index"])
            seen_BLG = np.asarray(jax.device_get(padded["tokens"]))[:rows]
            boundary.refuse((seen_BLG < 0).any((1, 2)), "what the encoder sees", naming)
            boundary.tokens(seen_BLG, generator.layout)
            generator.check(datasets.condition(part))
            asked = padded, keys_B, draws, rows, naming
            with jax.set_mesh(mesh):
                found["nats"].append(_drawn(program, generator, codec, *asked))
            found["index"].append(part["index"])
    measured, _ = _of_all(source, chosen, found)
    nats_NR = measured["nats"] / generator.layout.length
    nats_N = nats_NR.mean(axis=1)
    metrics = {
        "nats_per_token": float(nats_N.mean()),
        "nats_error": standard_error(nats_N),
        "bits_per_token": float(nats_N.mean() / math.log(2)),
        **numbers(len(nats_N), len(chosen)),
    }
    if draws > 1 or not exact:
        metrics |= {"nats_orders_error": draw_error(nats_NR), "orders": draws}
    return metrics


def nats(
    generator: Generator,
    codec: nnx.Module | None,
    tokens_NLG: np.ndarray,
    cond: PyTree,
    *,
    batch: int,
    draws: int = 1,
    seed: int = 0,
) -> np.ndarray:
    """[N, draws] nats of the tokens of each image, in float64.

    Exact, and a draw like another, or, of a generator that says otherwise (`exact`), each the
    estimate of an upper bound by a random order that depends on (seed, the image's place).
    `cond` leads with the images: label_N, or a Text.
    """
    generator.check(cond)
    program = _exact if generator.exact else _bound
    given = {"tokens": tokens_NLG, "index": np.arange(len(tokens_NLG))}
    if isinstance(cond, Text):
        given |= {"text": cond.features_BTE, "mask": cond.mask_BT}
    else:
        given |= {"label": cond}
    total, mesh = [], sharding.current()
    for start in range(0, len(tokens_NLG), batch):
        part = {name: np.asarray(array[start : start + batch]) for name, array in given.items()}
        rows = len(part["index"])
        padded = sharding.filled(part, batch, mesh)
        keys_B = rng.per_image(seed, "eval", padded.pop("index"))
        named = functools.partial(_number, start)
        with jax.set_mesh(mesh):
            total.append(_drawn(program, generator, codec, padded, keys_B, draws, rows, named))
    return np.concatenate(total)


def _number(first: int, row: int) -> str:
    return f"number {first + row}"


def _drawn(
    program: Callable[..., jax.Array],
    generator: Generator,
    codec: nnx.Module | None,
    padded: dict,
    keys_B: jax.Array,
    draws: int,
    rows: int,
    named: Callable[[int], str],
) -> np.ndarray:
    """[rows, draws] nats of the images of a batch, draw by draw; they are finite."""
    found = []
    for draw in range(draws):
        own_B = jax.vmap(rng.number, (0, None))(keys_B, draw)
        nats_B = jax.device_get(program(generator, codec, padded, own_B))[:rows]
        boundary.refuse(~np.isfinite(nats_B), "nats of an image", named)
        found.append(nats_B)
    return np.stack(found, axis=1).astype(np.float64)


def draw_error(value_NR: np.ndarray) -> float | None:
    """Standard error of the mean over R draws for each of N fixed images; none of one draw."""
    images, draws = value_NR.shape
    if draws < 2:
        return None
    return float(np.sqrt((value_NR.var(axis=1, ddof=1) / draws).sum()) / images)


def _order(generator, name: str):
    """The order of that name, or the error of a generator that has none."""
    try:
        found = orders.named(name)
        found(generator.layout, jax.random.key(0))
    except ValueError as error:
        raise UserError(
            f"--order {name} is no order of {generator.layout.grids}: {error}"
        ) from error
    if not generator.any_order:
        raise UserError(
            f"--order needs a generator that goes through its tokens one by one; found one of "
            f"{type(generator).__module__.rpartition('.')[2]}: leave it out"
        )
    return found


def unigram(
    train: sources.RandomAccess,
    held_out: sources.RandomAccess,
    layout: TokenLayout,
    *,
    count: int = 20_000,
) -> dict[str, float]:
    """What a model pays that knows only how often each token occurs in training, in nats."""
    seen = [np.full(size, 0.5) for size in layout.vocab]  # half a count: nothing is impossible
    for part in loader.once(train, batch_size=1000, indices=spread(len(train), count)):
        for total, found in zip(seen, codebook.counts(part["tokens"], layout), strict=True):
            total += found
    logs = [np.log(total / total.sum()) for total in seen]
    costs = []
    for part in loader.once(held_out, batch_size=1000):
        token_BLG = part["tokens"]
        boundary.tokens(token_BLG, layout)
        costs.append(-sum(logs[g][token_BLG[..., g]] for g in range(len(logs))).mean(-1))
    costs = np.concatenate(costs)
    return {"unigram_nats": float(costs.mean()), "unigram_error": standard_error(costs)}
