"""Held-out figures of a checkpoint: reconstruction of a tokenizer, likelihood of a generator."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time

import jax
import numpy as np

from tokgen import checkpoint, config, launch, report
from tokgen.data import images, stream, tokens
from tokgen.interfaces import TokenBatch, UserError
from tokgen.metrics import codebook
from tokgen.metrics import reconstruction as quality

PIXEL_METRICS = ("psnr_db", "ssim", "codebook_usage", "codebook_perplexity")


def spread(length: int, count: int) -> np.ndarray:
    """At most `count` indices, evenly over a set that may be sorted by class, in a mixed order.

    The first few are what a picture shows: they shouldn't be of one class.
    """
    count = min(count, length)
    return np.random.default_rng(0).permutation(np.arange(count) * length // count)


@jax.jit
def _reconstruct(tokenizer, image_BHW3, text_BTE):
    latents_BPC = tokenizer.latents(image_BHW3)
    if tokenizer.layout is None:  # continuous: the most likely latents in the place of codes
        tokens_BLG, codes_BPC = None, tokenizer.quantizer.mode(latents_BPC)
    else:
        tokens_BLG = tokenizer.quantizer.encode(latents_BPC)
        codes_BPC = tokenizer.quantizer.decode(tokens_BLG)
    painted = tokenizer.decode_latents(codes_BPC, cond=text_BTE)
    # through bytes: the figures are those of the files that a user would get
    painted = quality.from_uint8(quality.to_uint8(painted))
    measured = {"psnr_db": quality.psnr(image_BHW3, painted)}
    if min(image_BHW3.shape[1:3]) >= quality.WINDOW:
        measured["ssim"] = quality.ssim(image_BHW3, painted)
    return tokens_BLG, painted, measured


def watched(batches, total: int, what: str):
    """The batches, with a progress bar where `what` names the job; none inside a training run."""
    if not what:
        yield from batches
        return
    with report.bar(total, unit="image", what=what) as bar:
        for part in batches:
            yield part
            bar.update(len(part["label"]))


def reconstruction(
    tokenizer, source, view, *, count: int, batch: int = 50, what: str = ""
) -> tuple[dict, tuple]:
    """(figures, (originals, reconstructions) of the first batch, uint8) over `count` images."""
    measured, counts, shown = {}, None, None
    chosen = spread(len(source), count)
    passing = stream.once(source, view, batch_size=batch, indices=chosen)
    for part in watched(passing, len(chosen), what):
        image = part["image"]
        missing = batch - len(image)  # padded, so that one program serves all batches
        padded = np.concatenate([image, np.repeat(image[-1:], missing, axis=0)])
        text = part.get("text")
        if text is not None:
            text = np.concatenate([text, np.repeat(text[-1:], missing, axis=0)])
        tokens_BLG, painted, values = jax.device_get(
            _reconstruct(tokenizer, *jax.device_put((quality.from_uint8(padded), text)))
        )
        painted = painted[: len(image)]
        for name, value_B in values.items():
            measured.setdefault(name, []).append(value_B[: len(image)])
        if tokens_BLG is not None:
            found = codebook.counts(tokens_BLG[: len(image)], tokenizer.layout)
            counts = found if counts is None else tuple(map(np.add, counts, found))
        if shown is None:
            shown = image, np.round(painted * 255).astype(np.uint8)
    figures = {}
    for name, parts in measured.items():
        value_B = np.concatenate(parts).astype(np.float64)
        figures[name] = float(value_B.mean())
        figures[f"{name}_error"] = standard_error(value_B)
    if counts is not None:
        figures["codebook_usage"] = float(np.mean([codebook.usage(c) for c in counts]))
        figures["codebook_perplexity"] = float(np.mean([codebook.perplexity(c) for c in counts]))
    figures["images"] = len(chosen)
    return figures, shown


def standard_error(value_B: np.ndarray) -> float:
    """Of the mean."""
    return float(np.std(value_B, ddof=1) / math.sqrt(len(value_B))) if len(value_B) > 1 else 0.0


@jax.jit
def _nats(generator, codec, tokens_BLG, label_B):
    return generator.nats(TokenBatch(tokens_BLG, label_B), codec).sum(-1)


def likelihood(
    generator, codec, source, *, count: int, batch: int = 50, what: str = ""
) -> dict[str, float]:
    """Held-out nats and bits per token; images are the sample of which the error is stated."""
    total, chosen = [], spread(len(source), count)
    for part in watched(stream.once(source, batch_size=batch, indices=chosen), len(chosen), what):
        label_B = part["label"]
        missing = batch - len(label_B)
        padded = [np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for a in part.values()]
        padded = dict(zip(part, padded, strict=True))
        nats_B = _nats(generator, codec, *jax.device_put((padded["tokens"], padded["label"])))
        total.append(jax.device_get(nats_B)[: len(label_B)])
    nats_B = np.concatenate(total).astype(np.float64) / generator.layout.length
    return {
        "nats_per_token": float(nats_B.mean()),
        "nats_error": standard_error(nats_B),
        "bits_per_token": float(nats_B.mean() / math.log(2)),
        "images": len(chosen),
    }


def unigram(train, held_out, layout, *, count: int = 20_000) -> dict[str, float]:
    """What a model pays that knows only how often each token occurs in training, in nats."""
    seen = [np.full(size, 0.5) for size in layout.vocab]  # half a count: nothing is impossible
    for part in stream.once(train, batch_size=1000, indices=spread(len(train), count)):
        for total, found in zip(seen, codebook.counts(part["tokens"], layout), strict=True):
            total += found
    logs = [np.log(total / total.sum()) for total in seen]
    costs = []
    for part in stream.once(held_out, batch_size=1000):
        token_BLG = part["tokens"]
        costs.append(-sum(logs[g][token_BLG[..., g]] for g in range(len(logs))).mean(-1))
    costs = np.concatenate(costs)
    return {"unigram_nats": float(costs.mean()), "unigram_error": standard_error(costs)}


def view_of(settings) -> images.View:
    """The centre view of the pixels that a tokenizer's config names."""
    return images.fixed("center", tuple(settings.view.size), settings.view.channels)


def image_source(settings, path: str, split: str):
    """The images of a folder, or of the data set that the config names."""
    if path:
        return config.build({"name": "folder", "path": path}, "data", split=split)
    return config.build(settings.data, "data", split=split)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a work directory, or one step of it")
    parser.add_argument(
        "--reconstruction", action="store_true", help="of a tokenizer; told from the checkpoint"
    )
    parser.add_argument("--data", default="", help="image folder, or token shards; default: config")
    parser.add_argument("--split", default="held_out", help="held_out (default), train or all")
    parser.add_argument("--images", type=int, default=1000, help="at most so many (default 1000)")
    parser.add_argument("--out", default="", help="also append the figures to this JSONL file")
    parser.add_argument("--tokenizer", default="", help="where the generator's tokenizer lies now")


def run(args: argparse.Namespace) -> None:
    """Print the figures and, with --out, append them to a file."""
    if args.images < 1:
        raise UserError(f"--images must be at least 1; found {args.images}")
    launch.devices()
    step = checkpoint.find(args.checkpoint)
    kind = checkpoint.read_meta(step)["kind"]
    if args.reconstruction and kind != "tokenizer":
        raise UserError(f"--reconstruction needs a tokenizer; {step} holds a {kind}")
    figures = (_tokenizer if kind == "tokenizer" else _generator)(step, args)
    for name, value in figures.items():
        print(f"{name:<20} {value:.4f}" if isinstance(value, float) else f"{name:<20} {value}")
    if args.out:
        record = {
            "checkpoint": str(step),
            "split": args.split,
            "data": args.data,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **figures,
        }
        out = pathlib.Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a") as file:
            file.write(json.dumps(record) + "\n")


def _tokenizer(step: pathlib.Path, args: argparse.Namespace) -> dict:
    loaded = checkpoint.load_tokenizer(step)
    source = image_source(loaded.config, args.data, args.split)
    report.say(f"{min(args.images, len(source))} of {len(source)} images, step {step.name}")
    view = view_of(loaded.config)
    return reconstruction(loaded.module, source, view, count=args.images, what="reconstruct")[0]


def _generator(step: pathlib.Path, args: argparse.Namespace) -> dict:
    loaded = checkpoint.load_generator(step)
    path = args.data or checkpoint.referred(loaded.meta["tokens"], step)
    source = tokens.Source(path, split=args.split)
    wanted = loaded.meta["tokenizer"]["fingerprint"]
    if source.header["tokenizer"]["fingerprint"] != wanted:
        raise UserError(
            f"the tokens in {path} were made by another tokenizer than the one of {step}; "
            "need shards of the generator's own tokenizer: run tokgen pretokenize with it"
        )
    codec = checkpoint.load_tokenizer_of(loaded, args.tokenizer).module.quantizer
    report.say(f"{min(args.images, len(source))} of {len(source)} images, step {step.name}")
    figures = likelihood(loaded.module, codec, source, count=args.images, what="likelihood")
    return figures | unigram(tokens.Source(path), source, loaded.layout)
