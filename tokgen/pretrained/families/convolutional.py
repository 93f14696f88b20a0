"""Key tables of convolutional encoders and decoders, for all families.

Our stages lie in one list in the order in which they run; published keys name levels. `walk` says
of every stage what it is, and a family is one function from that to the published prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from tokgen import parameters
from tokgen.interfaces import Quantized, UserError
from tokgen.nn import conv
from tokgen.pretrained import keymap
from tokgen.tokenizers import conv as networks

KINDS = {
    conv.Attention: "attention",
    conv.Downsample: "down",
    conv.Average: "down",
    conv.Upsample: "up",
    conv.Unfold: "up",
    conv.AdaptiveNorm: "adapt",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one entry of `stages` is. Level 0 is the finest; `up` and `down` belong to the level
    that they leave."""

    module: object
    path: str
    kind: str  # block, attention, down, up, adapt; "middle" blocks and attention have level None
    level: int | None
    index: int  # among its kind within the level; within the middle, among all


def walk(network, path: str) -> Iterator[Stage]:
    """The stages of an Encoder or a Decoder."""
    kinds = [KINDS.get(type(stage), "block") for stage in network.stages]
    extra = kinds.count("block") - network.blocks * network.levels
    between = kinds.count("attention") - network.blocks * len(network.attended)
    middle = extra + between
    encoding = isinstance(network, networks.Encoder)
    level, seen = (0 if encoding else network.levels - 1), {}
    for number, (stage, kind) in enumerate(zip(network.stages, kinds, strict=True)):
        place = f"{path}/stages/{number}"
        inside = number - (len(kinds) - middle) if encoding else number
        if (encoding and inside >= 0) or (not encoding and number < middle):
            yield Stage(stage, place, kind, None, inside)
            continue
        yield Stage(stage, place, kind, level, seen.get(kind, 0))
        seen[kind] = seen.get(kind, 0) + 1
        if kind in ("down", "up"):
            level, seen = level + (1 if encoding else -1), {}


def separate(key: str, path: str) -> list[keymap.Row]:
    """An attention block with query, key and value apart."""
    rows = keymap.norm(f"{key}.norm", f"{path}/norm")
    for name, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        rows += keymap.pair(f"{key}.{name}", f"{path}/attention/{ours}", keymap.POINTWISE)
    return rows + keymap.pair(f"{key}.proj_out", f"{path}/attention/out", keymap.POINTWISE_OUT)


def fused(key: str, path: str) -> list[keymap.Row]:
    """An attention block with one map for query, key and value."""
    three = [f"{path}/attention/{name}" for name in ("query", "key", "value")]
    return [
        *keymap.norm(f"{key}.norm", f"{path}/norm"),
        keymap.Row(
            f"{key}.qkv.weight",
            tuple(f"{p}/kernel" for p in three),
            keymap.thirds(keymap.POINTWISE),
        ),
        keymap.Row(
            f"{key}.qkv.bias", tuple(f"{p}/bias" for p in three), keymap.thirds(keymap.VECTOR)
        ),
        *keymap.pair(f"{key}.proj_out", f"{path}/attention/out", keymap.POINTWISE_OUT),
    ]


def rows(
    network: nnx.Module,
    path: str,
    name: Callable[[Stage], str],
    *,
    prefix: str,
    attention: Callable[[str, str], list[keymap.Row]] = separate,
) -> list[keymap.Row]:
    """The table of one network: `name` gives the published prefix of a stage."""
    found = keymap.pair(
        f"{prefix}conv_in",
        f"{path}/conv_in",
        keymap.CONV,
        bias=network.conv_in.bias is not None,
    )
    for stage in walk(network, path):
        key, bias = f"{prefix}{name(stage)}", True
        if stage.kind == "block":
            bias = stage.module.conv1.bias is not None
            for part in ("1", "2"):
                found += keymap.norm(f"{key}.norm{part}", f"{stage.path}/norm{part}")
                found += keymap.pair(
                    f"{key}.conv{part}", f"{stage.path}/conv{part}", keymap.CONV, bias=bias
                )
            if stage.module.conv_skip is not None:
                skip = f"{stage.path}/conv_skip"
                found += keymap.pair(f"{key}.nin_shortcut", skip, keymap.CONV, bias=bias)
        elif stage.kind == "attention":
            found += attention(key, stage.path)
        elif stage.kind == "adapt":
            found += keymap.pair(f"{key}.gamma", f"{stage.path}/scale", keymap.LINEAR)
            found += keymap.pair(f"{key}.beta", f"{stage.path}/shift", keymap.LINEAR)
        elif not isinstance(stage.module, conv.Average):
            found += keymap.pair(key, f"{stage.path}/conv", keymap.CONV)
    found += keymap.norm(f"{prefix}norm_out", f"{path}/norm")
    return found + keymap.pair(f"{prefix}conv_out", f"{path}/conv_out", keymap.CONV)


def cells(encoder, image_BHW3) -> tuple[int, int]:
    """(rows, columns) of the latents of an image, which need not be those of the config."""
    stride = 2 ** (encoder.levels - 1)
    return image_BHW3.shape[1] // stride, image_BHW3.shape[2] // stride


def nchw(array_BHWC) -> np.ndarray:
    """[B, H, W, C] in PyTorch's order."""
    return np.asarray(array_BHWC).transpose(0, 3, 1, 2)


def nhwc(array_BCHW: np.ndarray) -> np.ndarray:
    """PyTorch's images in ours."""
    return np.ascontiguousarray(array_BCHW.transpose(0, 2, 3, 1))


def rowed(array_BHWC) -> np.ndarray:
    """A map [B, H, W, C] as latents [B, P, C]."""
    return np.reshape(array_BHWC, (len(array_BHWC), -1, array_BHWC.shape[-1]))


def mapped(latents_BPC, grid: tuple[int, int]) -> np.ndarray:
    """Latents [B, P, C] as a map [B, H, W, C]."""
    return np.reshape(np.asarray(latents_BPC), (len(latents_BPC), *grid, -1))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A quantizer in its training form on fixed latents, and the gradient of
    sum(out * cotangent) + sum(weight * loss)."""

    out: Quantized
    loss: jax.Array  # the weighted sum
    latents: jax.Array  # gradients
    params: dict[str, jax.Array]


def trained(
    quantizer: nnx.Module,
    latents_BPC: jax.Array,
    cotangent_BPC: jax.Array,
    weights: dict[str, float],
) -> Trained:
    """Run the training form; losses without a weight are left out."""
    graph, params, stats = parameters.split(quantizer)

    def scalar(latents_BPC, params):
        out = parameters.merge(graph, params, stats)(latents_BPC)
        loss = sum((w * out.losses[name] for name, w in weights.items()), start=jnp.zeros(()))
        return jnp.sum(out.latents_BPC * cotangent_BPC) + loss, (out, loss)

    gradients, (out, loss) = jax.grad(scalar, (0, 1), has_aux=True)(
        jnp.asarray(latents_BPC), params
    )
    return Trained(out, loss, gradients[0], parameters.paths(gradients[1]))


def sections(
    settings: ml_collections.ConfigDict,
    *,
    base: int,
    multipliers: tuple[int, ...],
    blocks: int,
    **common,
) -> None:
    """Set encoder and decoder of a config to the sizes of a published file, in float32."""
    settings.precision.compute = "float32"  # whatever the recipe trains in
    widths = tuple(base * m for m in multipliers)
    settings.encoder = dict(name="conv", widths=widths, start=base, blocks=blocks, **common)
    settings.decoder = dict(name="conv", widths=widths, blocks=blocks, **common)


def side(weights: dict[str, np.ndarray], key: str) -> tuple[int, ...]:
    """The shape of one array that must be there."""
    if key not in weights:
        raise UserError(
            f"no {key} in the file: is --system right? It holds {', '.join(list(weights)[:5])} ..."
        )
    return weights[key].shape
