"""TiTok's and TA-TiTok's tokenizers (bytedance/1d-tokenizer): settings and keys of each form.

arXiv:2406.07550 and arXiv:2501.07730. All sizes are read from the weights; from the published
configuration come only the number of heads, which no array shows, the image's size, and whether
codes are normalised. Without a configuration these follow from the width and from the form.
"""

from __future__ import annotations

import math
import re

import ml_collections
from flax import nnx

from tokgen.config import reading as configs
from tokgen.interfaces import UserError
from tokgen.pretrained import keymap, system
from tokgen.pretrained.families import convolutional
from tokgen.tokenizers import two_stage, vit

HEADS = {512: 8, 768: 12, 1024: 16}  # by width: the sizes called small, base and large


def _shape(weights: system.Weights, key: str, rank: int) -> tuple[int, ...]:
    return keymap.need(weights, key, rank, "TiTok's tokenizer")


def _count(weights: system.Weights, pattern: str) -> int:
    """One more than the largest number that stands at the group of `pattern` in a key."""
    found = [re.match(pattern, key) for key in weights]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _side(published: dict, weights: system.Weights, side: str) -> dict:
    """Arguments of the encoder ("enc") or decoder ("dec") that both have."""
    prefix = {"enc": "encoder", "dec": "decoder"}[side]
    width = _shape(weights, f"{prefix}.ln_pre.weight", 1)[0]
    heads = published.get("arch", {}).get(f"vit_{side}_heads", HEADS.get(width))
    if heads is None:
        raise UserError(
            f"the {prefix} has the width {width}, whose number of heads is not among the published "
            f"ones {HEADS}; give a config with arch.vit_{side}_heads"
        )
    return dict(
        name="vit",
        tokens=_shape(weights, "latent_tokens", 2)[0],
        width=width,
        depth=_count(weights, rf"{prefix}\.transformer\.(\d+)\."),
        heads=heads,
    )


def _edge(weights: system.Weights, side: str) -> int:
    """Patches along one edge of the image."""
    patches = _shape(weights, f"{side}.positional_embedding", 2)[0] - 1
    edge = math.isqrt(max(patches, 0))
    if edge == 0 or edge**2 != patches:
        raise UserError(
            f"{side}.positional_embedding needs a row for the class and one for every patch of a "
            f"square; found {patches + 1} rows"
        )
    return edge


def settings(published: dict, weights: system.Weights) -> ml_collections.ConfigDict:
    """Our config of a published file of any of the forms."""
    model = published.get("model", {}).get("vq_model", {})
    _, channels, patch, _ = _shape(weights, "encoder.patch_embed.weight", 4)
    size = published.get("dataset", {}).get("preprocessing", {}).get("crop_size")
    size = size or patch * _edge(weights, "encoder")
    two = "decoder.ffn.2.weight" in weights
    readout = "reinterpreted" if two else "in_order"
    latent = _shape(weights, "decoder.decoder_embed.weight", 2)[1]
    quantizer = dict(name="gaussian", channels=latent)
    if "quantize.embedding.weight" in weights:
        codes = _shape(weights, "quantize.embedding.weight", 2)[0]
        normalize = bool(model.get("use_l2_norm", two))
        quantizer = dict(name="vq", codes=codes, channels=latent, normalize=normalize)
        # nothing is revived: an import has no counts yet, by which all rows would be dead
        quantizer |= dict(update="gradient", revive=0.0)
    decoder = dict(_side(published, weights, "dec"), patch=size // _edge(weights, "decoder"))
    if "decoder.text_guidance_proj.weight" in weights:
        length = _shape(weights, "decoder.text_guidance_positional_embedding", 2)[0]
        decoder["text"] = (length, _shape(weights, "decoder.text_guidance_proj.weight", 2)[1])
    recipe = "titok" if two else "tatitok" if "text" in decoder else "titok_onestage"
    config = configs.load(f"configs/tokenizer/{recipe}.py")
    config.view.size, config.view.channels = (size, size), channels
    config.pixels = (0.0, 1.0)
    config.precision = dict(params="float32", compute="float32")
    config.encoder = dict(_side(published, weights, "enc"), patch=patch, readout=readout)
    config.quantizer = quantizer
    config.decoder = _two_stage(decoder, weights) if two else decoder
    return config


def form_of(weights: system.Weights) -> str:
    """The system that the keys of a file belong to."""
    if "decoder.ffn.2.weight" in weights:
        return "titok_legacy"
    family = "tatitok" if "decoder.text_guidance_proj.weight" in weights else "titok_onestage"
    return f"{family}_{'vq' if 'quantize.embedding.weight' in weights else 'vae'}"


def settings_of(name: str):
    """`settings`, which refuses a file of another form than the one that was asked for."""

    def checked(published: dict, weights: system.Weights) -> ml_collections.ConfigDict:
        config, form = settings(published, weights), form_of(weights)
        if form != name:
            raise UserError(
                f"a file of {name} was asked for, and the keys are those of {form}: use --system "
                f"{form}, unless the file lacks keys"
            )
        return config

    return checked


def _two_stage(codes: dict, weights: system.Weights) -> dict:
    """The decoder section of the form with proxy codes."""
    if "pixel_quantize.embedding.weight" not in weights:
        raise UserError(
            "this file predicts codes and lacks the decoder of these to pixels (pixel_quantize.*, "
            "pixel_decoder.*): it is the result of the first stage; import one of the second stage"
        )
    codebook = _shape(weights, "pixel_quantize.embedding.weight", 2)
    levels = _count(weights, r"pixel_decoder\.up\.(\d+)\.")
    names = [f"pixel_decoder.up.{level}.block.0.conv1.weight" for level in range(levels)]
    side = _edge(weights, "decoder")
    pixels = dict(
        name="conv",
        latent=codebook[1],
        grid=(side, side),
        widths=tuple(_shape(weights, name, 4)[0] for name in names),
        blocks=_count(weights, r"pixel_decoder\.up\.0\.block\.(\d+)\."),
        variant="maskgit",
    )
    codes = dict(codes, channels=codebook[0], head="codes")
    return dict(name="two_stage", codebook=codebook, codes=codes, pixels=pixels)


def rows(tokenizer) -> list[keymap.Row]:
    """The key table of any of the forms, from our module's structure."""
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    found = [
        keymap.row("latent_tokens", "encoder/latents/table"),
        *keymap.pair("encoder.patch_embed", "encoder/conv_patch", keymap.CONV),
        *keymap.pair("encoder.conv_out", "encoder/readout", keymap.POINTWISE),
        *_network("encoder", "encoder", encoder.transformer.depth),
    ]
    if hasattr(tokenizer.quantizer, "codebook"):
        found.append(keymap.row("quantize.embedding.weight", "quantizer/codebook"))
    if isinstance(decoder, two_stage.Decoder):
        found += _decoder(decoder.codes, "decoder/codes")
        found.append(keymap.row("pixel_quantize.embedding.weight", "decoder/codebook"))
        pixels = decoder_rows(decoder.pixels, "decoder/pixels", "pixel_decoder.")
        return [*found, *pixels]
    return [*found, *_decoder(decoder, "decoder")]


def _network(key: str, path: str, depth: int) -> list[keymap.Row]:
    """What encoder and decoder have in common."""
    found = [
        keymap.row(f"{key}.class_embedding", f"{path}/first/table"),
        keymap.row(f"{key}.positional_embedding", f"{path}/positions/table"),
        keymap.row(f"{key}.latent_token_positional_embedding", f"{path}/latent_positions/table"),
        *keymap.norm(f"{key}.ln_pre", f"{path}/norm_in"),
        *keymap.norm(f"{key}.ln_post", f"{path}/norm_out"),
    ]
    for layer in range(depth):
        found += _block(f"{key}.transformer.{layer}", f"{path}/transformer/blocks", layer)
    return found


def _block(key: str, path: str, layer: int) -> list[keymap.Row]:
    """One layer: its parameters are row `layer` of ours."""
    fused = [f"{path}/attention/{name}" for name in ("query", "key", "value")]
    kernels = tuple((f"{name}/kernel", layer) for name in fused)
    biases = tuple((f"{name}/bias", layer) for name in fused)
    plain = [
        *keymap.norm(f"{key}.ln_1", f"{path}/attention_norm"),
        *keymap.pair(f"{key}.attn.out_proj", f"{path}/attention/out", keymap.LINEAR_OUT),
        *keymap.norm(f"{key}.ln_2", f"{path}/mlp_norm"),
        *keymap.pair(f"{key}.mlp.c_fc", f"{path}/mlp/up", keymap.LINEAR),
        *keymap.pair(f"{key}.mlp.c_proj", f"{path}/mlp/down", keymap.LINEAR),
    ]
    return [
        keymap.Row(f"{key}.attn.in_proj_weight", kernels, keymap.thirds(keymap.LINEAR)),
        keymap.Row(f"{key}.attn.in_proj_bias", biases, keymap.thirds(keymap.VECTOR)),
        *(keymap.row(entry.key, (entry.places[0], layer), entry.rule) for entry in plain),
    ]


def _decoder(decoder: vit.Decoder, path: str) -> list[keymap.Row]:
    width = decoder.mask.table.shape[1]
    found = [
        keymap.row("decoder.mask_token", f"{path}/mask/table", keymap.reshaped(1, 1, width)),
        *keymap.pair("decoder.decoder_embed", f"{path}/embed", keymap.LINEAR),
        *_network("decoder", path, decoder.transformer.depth),
    ]
    if isinstance(decoder.text, vit.Text):
        key = "decoder.text_guidance_positional_embedding"
        found += keymap.pair("decoder.text_guidance_proj", f"{path}/text/embed", keymap.LINEAR)
        found.append(keymap.row(key, f"{path}/text/positions/table"))
    if isinstance(decoder.head, vit.Codes):
        return [
            *found,
            *keymap.pair("decoder.ffn.0", f"{path}/head/hidden", keymap.POINTWISE),
            *keymap.pair("decoder.ffn.2", f"{path}/head/logits", keymap.POINTWISE),
        ]
    return [
        *found,
        *keymap.pair("decoder.ffn.0", f"{path}/head/patches", keymap.POINTWISE),
        *keymap.pair("decoder.conv_out", f"{path}/head/conv_out", keymap.CONV),
    ]


def port_stage_key(stage: convolutional.Stage) -> str:
    """A stage's prefix in the port of MaskGIT's tokenizer; `up` counts levels, 0 the finest."""
    if stage.level is None:
        return f"mid.{stage.index}"
    side = "down" if stage.path.startswith("encoder") else "up"
    if stage.kind == "up":
        return f"up.{stage.level}.upsample_conv"
    return f"{side}.{stage.level}.block.{stage.index}"


def decoder_rows(decoder: nnx.Module, path: str, prefix: str) -> list[keymap.Row]:
    """The decoder of that port, which TiTok keeps a fine-tuned copy of."""
    return convolutional.rows(decoder, path, port_stage_key, prefix=prefix)
