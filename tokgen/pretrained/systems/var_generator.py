"""VAR's generator (arXiv:2404.02905), with adaptive norms per block or shared (d36)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from tokgen import rng
from tokgen.config import reading as configs
from tokgen.interfaces import TokenBatch, TokenLayout, UserError
from tokgen.nn import dropout
from tokgen.pretrained import keymap, parity, system
from tokgen.pretrained.families import causal, convolutional
from tokgen.quantizers import multiscale
from tokgen.sampling import decode, guidance, sampler as samplers

# The generator's six vectors are published as two gates, two scales, two shifts, those of its last
# norm as scale and shift; ours are shift, scale and gate, twice, and shift and scale.
SIX, TWO = (4, 2, 0, 5, 3, 1), (1, 0)
RECIPE = "configs/generator/var.py"
NESTED = ("trainer.var_wo_ddp",)  # where training checkpoints have the state dict
BUFFERS = r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias"
PYRAMIDS = (multiscale.VAR_256, multiscale.VAR_512, multiscale.VAR_1024)
LEADING = keymap.one(lambda a, shape: a.reshape(shape), lambda a: a[None])
PER_HEAD = keymap.reshaped(1, -1, 1, 1)
ADDED = keymap.one(
    lambda a, shape: a[..., SIX, :].reshape(shape),
    lambda a: a[np.argsort(SIX)][None, None],
)
# The published arrays whose gradients the fixtures measure, in their order.
NORMS = (
    *("pos_start", "pos_1LC", "lvl_embed.weight", "class_emb.weight", "word_embed.weight"),
    *("blocks.0.attn.mat_qkv.weight", "blocks.0.attn.q_bias", "blocks.0.attn.scale_mul_1H11"),
    "blocks.1.ffn.fc2.weight",
)
HEAD_NORMS = ("head_nm.ada_lin.1.weight", "head.weight")


def rows(generator) -> list[keymap.Row]:
    """The keys of `var_d*.pth`."""
    net = generator.transformer
    found = [
        keymap.row("pos_start", "token", LEADING),
        keymap.row("pos_1LC", "positions/table", LEADING),
        keymap.row("lvl_embed.weight", "levels/table"),
        keymap.row("class_emb.weight", "labels/table"),
        *keymap.pair("word_embed", "embed", keymap.LINEAR),
        *_modulated("head_nm.ada_lin.1", "head/modulation", TWO),
        *keymap.pair("head", "head/head", keymap.LINEAR),
    ]
    if net.shared is not None:
        found += _modulated("shared_ada_lin.1", "transformer/shared/modulation", SIX)
    for layer in range(net.depth):
        found += _block(net, layer)
    return found


def _modulated(key: str, path: str, order: tuple[int, ...]) -> list[keymap.Row]:
    return [
        keymap.row(f"{key}.weight", f"{path}/kernel", keymap.chunks(order)),
        keymap.row(f"{key}.bias", f"{path}/bias", keymap.chunks_bias(order)),
    ]


def _block(net, layer: int) -> list[keymap.Row]:
    """The keys of one block; ours are stacked."""
    key, attention = f"blocks.{layer}", "transformer/blocks/attention"
    fused = tuple((f"{attention}/{name}/kernel", layer) for name in ("query", "key", "value"))
    found = [
        keymap.Row(f"{key}.attn.mat_qkv.weight", fused, keymap.thirds(keymap.LINEAR)),
        keymap.row(f"{key}.attn.q_bias", (f"{attention}/query/bias", layer), keymap.VECTOR),
        keymap.row(f"{key}.attn.v_bias", (f"{attention}/value/bias", layer), keymap.VECTOR),
    ]
    if hasattr(net.blocks.attention.similarity, "scale"):
        place = (f"{attention}/similarity/scale", layer)
        found.append(keymap.row(f"{key}.attn.scale_mul_1H11", place, PER_HEAD))
    maps = [
        ("attn.proj", "attention/out", keymap.LINEAR_OUT, keymap.VECTOR),
        ("ffn.fc1", "mlp/up", keymap.LINEAR, keymap.VECTOR),
        ("ffn.fc2", "mlp/down", keymap.LINEAR, keymap.VECTOR),
    ]
    if net.shared is None:
        maps.append(("ada_lin.1", "modulation", keymap.chunks(SIX), keymap.chunks_bias(SIX)))
    else:
        found.append(keymap.row(f"{key}.ada_gss", ("transformer/blocks/table", layer), ADDED))
    for name, path, kernel, bias in maps:
        path = f"transformer/blocks/{path}"
        found.append(keymap.row(f"{key}.{name}.weight", (f"{path}/kernel", layer), kernel))
        found.append(keymap.row(f"{key}.{name}.bias", (f"{path}/bias", layer), bias))
    return found


def buffers(generator) -> system.Weights:
    """Constants that the published file holds: scales of slots, the mask, biases of the keys."""
    sizes = [size for _, size in generator.layout.spans]
    scale_L = np.repeat(np.arange(len(sizes)), sizes)
    seen_LL = scale_L[:, None] >= scale_L[None]
    width = generator.embed.kernel.shape[-1]
    return {
        "lvl_1L": scale_L[None],
        "attn_bias_for_masking": np.where(seen_LL, 0, -np.inf).astype(np.float32)[None, None],
    } | {
        f"blocks.{layer}.attn.zero_k_bias": np.zeros(width, np.float32)
        for layer in range(generator.transformer.depth)
    }


def settings(published: dict, weights: system.Weights) -> ml_collections.ConfigDict:
    """Our config; sizes are those of the weights, the form that of the keys."""
    if published.get("norm_eps", 1e-6) != 1e-6:
        raise UserError(f"VAR's norms have eps 1e-6; found norm_eps={published['norm_eps']}")
    side = convolutional.side
    width, channels = side(weights, "word_embed.weight")
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    cosine, shared = (
        key in weights for key in ("blocks.0.attn.scale_mul_1H11", "shared_ada_lin.1.weight")
    )
    heads = side(weights, "blocks.0.attn.scale_mul_1H11")[1] if cosine else None
    config = configs.load(RECIPE)
    config.precision.compute = "float32"  # whatever the recipe trains in
    config.generator.update(
        channels=channels,
        width=width,
        depth=depth,
        heads=causal.heads(published, "num_heads", width, heads),
        hidden=side(weights, "blocks.0.ffn.fc1.weight")[0],
        variant="var" + "_shared" * shared + "_plain" * (not cosine),
        label_drop=float(published.get("cond_drop_rate", 0.1)),
        rates=dict(
            attention=float(published.get("attn_drop_rate", 0)),
            residual=float(published.get("drop_rate", 0)),
            path=float(published.get("drop_path_rate", 0.1 * depth / 24)),
        ),
    )
    return config


def tokens(published: dict, weights: system.Weights) -> tuple[TokenLayout, int]:
    """(layout, classes): the sides of the grids are published, or known by their cells."""
    length = convolutional.side(weights, "pos_1LC")[1]
    known = next((sides for sides in PYRAMIDS if sum(n * n for n in sides) == length), None)
    sides = published.get("patch_nums", known)
    if sides is None or sum(n * n for n in sides) != length:
        raise UserError(
            f"the grids of a VAR need the sides patch_nums whose squares add up to its {length} "
            f"positions; found {sides}: give its configuration as --config FILE"
        )
    codes, classes = (
        convolutional.side(weights, key)[0] for key in ("head.weight", "class_emb.weight")
    )
    return TokenLayout((codes,), tuple((n, n) for n in sides)), classes - 1


class Recorder:
    """A sampler that takes the likeliest and keeps the logits that it was shown."""

    def __init__(self, weights: tuple[float, ...]):
        self.greedy, self.seen = samplers.Sampler(temperature=0, guidance=weights), []
        self.guidance, self.steps = self.greedy.guidance, self.greedy.steps

    def draw(self, logits_BlGV, **options):
        self.seen.append(logits_BlGV[:, :, 0])
        return self.greedy.draw(logits_BlGV, **options)


def arrays(folder) -> dict[str, np.ndarray]:
    """The arrays of the fixtures `var` and `var_shared_aln`."""
    generator, tokenizer = folder.module(), folder.beside().module()
    codec, label_B = tokenizer.quantizer, jnp.asarray(folder.given("labels"))
    parts = [folder.given(f"gt_indices_{k}") for k in range(len(generator.layout.grids))]
    batch = TokenBatch(jnp.asarray(np.concatenate(parts, axis=1))[..., None], label_B)
    without = batch.replace(cond=generator.null(label_B))
    known_BlC, logits_BLV = _taught(generator, codec, batch)
    found = {
        "var_input": known_BlC,
        "logits": logits_BLV,
        "logits_uncond": _taught(generator, codec, without)[1],
    }
    for name in folder.arrays:
        if name.startswith("greedy_cfg"):
            number = name.removeprefix("greedy_cfg")
            weights = guidance.per_scale(float(number), len(generator.layout.grids))
            tokens_BL, seen_BLV, image = _greedy(generator, tokenizer, label_B, weights)
            found |= {name: tokens_BL, f"greedy_image_cfg{number}": image}
            if f"greedy_logits_cfg{number}" in folder.arrays:
                found[f"greedy_logits_cfg{number}"] = seen_BLV
        if name.startswith("loss_ls"):
            found |= _trained(generator, codec, batch, name.removeprefix("loss_ls"))
    return found


@jax.jit
def _taught(generator: nnx.Module, codec: nnx.Module, batch: TokenBatch):
    known_BlC = codec.known_before(batch.tokens_BLG)
    return known_BlC, generator.logits(batch, codec)[:, :, 0]


def _greedy(
    generator: nnx.Module, tokenizer: nnx.Module, label_B: jax.Array, weights: tuple[float, ...]
):
    """(tokens [B, L], guided logits [B, L, V], images NCHW in [0, 1]).

    -1 where decoding through the cache and without one differ.
    """

    @jax.jit
    def run(generator, codec):
        sampler = Recorder(weights)
        keys_B = rng.numbered(jax.random.key(0), len(label_B))
        state = decode.generate(generator, codec, label_B, sampler, keys_B=keys_B)
        return state.tokens_BLG, jnp.concatenate(sampler.seen, axis=1), state.latents_BPC

    codec = tokenizer.quantizer
    tokens_BLG, logits_BLV, latents_BPC = run(generator, codec)
    cond_BLV, null_BLV = (
        _taught(generator, codec, TokenBatch(tokens_BLG, cond))[1]
        for cond in (label_B, generator.null(label_B))
    )
    weight_L = np.repeat(np.float32(weights), [size for _, size in generator.layout.spans])
    plain_BLV = guidance.merge(cond_BLV, null_BLV, weight_L[None, :, None])
    tokens_BL = np.where(plain_BLV.argmax(-1) == tokens_BLG[..., 0], tokens_BLG[..., 0], -1)
    return tokens_BL, logits_BLV, convolutional.nchw(_decoded(tokenizer, latents_BPC))


@jax.jit
def _decoded(tokenizer, latents_BPC):
    return tokenizer.decode_latents(latents_BPC)


def _trained(
    generator: nnx.Module, codec: nnx.Module, batch: TokenBatch, smoothing: str
) -> dict[str, np.ndarray]:
    """Loss and gradient norms, nothing dropped."""
    generator = jax.tree.map(lambda leaf: leaf, generator)
    generator.smoothing, generator.label_drop = float(smoothing), 0.0
    generator.transformer.rates = dropout.Rates()
    key = jax.random.key(0)
    loss, _, gradients = parity.gradients(
        generator,
        lambda module: module.loss(batch, codec, step=0, key=key),
        rows(generator),
    )
    own = (
        "blocks.1.ada_lin.1.weight" if generator.transformer.shared is None else "blocks.1.ada_gss"
    )
    norms, total = parity.grad_norms(gradients, parity.there(gradients, [*NORMS, own, *HEAD_NORMS]))
    return {
        f"loss_ls{smoothing}": loss,
        f"grad_norms_ls{smoothing}": norms,
        f"grad_norm_all_ls{smoothing}": total,
    }


PUBLISHED = dict(
    parity=arrays,
    settings=settings,
    rows=rows,
    unwrap=NESTED,
    aside=(BUFFERS,),
    derived=buffers,
    licence="MIT",
    tokens=tokens,
    beside="var_vqvae",
)

SYSTEMS = {
    "var": system.System(**PUBLISHED),
    "var_shared_aln": system.System(**PUBLISHED),
}
