"""TiTok and TA-TiTok (bytedance/1d-tokenizer): settings, key table and fixture of each form.

arXiv:2406.07550 and arXiv:2501.07730. All sizes are read from the weights; from the published
configuration come only the number of heads, which no array shows, the image's size, and whether
codes are normalised. Without a configuration these follow from the width and from the form.
"""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tokgen import losses
from tokgen.config import reading as configs
from tokgen.interfaces import UserError
from tokgen.pretrained import keymap, system
from tokgen.pretrained.families import convolutional
from tokgen.pretrained.systems import maskgit_tokenizer
from tokgen.tokenizers import two_stage, vit

HEADS = {512: 8, 768: 12, 1024: 16}  # by width: the sizes called small, base and large
COMMITMENT = 0.25

# Whose gradients the array stage1_grad_norms holds, in its order.
STAGE1_KEYS = (
    "latent_tokens",
    "encoder.positional_embedding",
    "encoder.transformer.0.attn.in_proj_weight",
    "encoder.conv_out.weight",
    "decoder.mask_token",
    "decoder.ffn.0.weight",
    "quantize.embedding.weight",
)


def _shape(weights: system.Weights, key: str, rank: int) -> tuple[int, ...]:
    if key not in weights:
        raise UserError(
            f"a TiTok file needs the key {key!r}; found {len(weights)} keys without it, such as "
            f"{', '.join(sorted(weights)[:3])}"
        )
    shape = weights[key].shape
    if len(shape) != rank:
        raise UserError(f"{key} of a TiTok file has {rank} axes; found the shape {shape}")
    return shape


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
    places = _shape(weights, f"{side}.positional_embedding", 2)[0] - 1
    edge = math.isqrt(max(places, 0))
    if edge == 0 or edge**2 != places:
        raise UserError(
            f"{side}.positional_embedding needs a row for the class and one for every patch of a "
            f"square; found {places + 1} rows"
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


def _form(weights: system.Weights) -> str:
    """The system that the keys of a file belong to."""
    if "decoder.ffn.2.weight" in weights:
        return "titok_legacy"
    family = "tatitok" if "decoder.text_guidance_proj.weight" in weights else "titok_onestage"
    return f"{family}_{'vq' if 'quantize.embedding.weight' in weights else 'vae'}"


def _settings_of(name: str):
    """`settings`, which refuses a file of another form than the one that was asked for."""

    def checked(published: dict, weights: system.Weights) -> ml_collections.ConfigDict:
        config, form = settings(published, weights), _form(weights)
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
        pixels = maskgit_tokenizer.decoder_rows(decoder.pixels, "decoder/pixels", "pixel_decoder.")
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


def _columns(latents_BPC: jax.Array) -> jax.Array:
    """[B, P, C] as the published (B, C, 1, N)."""
    return jnp.swapaxes(latents_BPC, 1, 2)[:, :, None]


def _latents(columns: np.ndarray) -> jax.Array:
    """The published (B, C, 1, N) as [B, P, C]."""
    return jnp.swapaxes(jnp.asarray(columns)[:, :, 0], 1, 2)


def _weights(folder) -> dict[str, float]:
    """What the quantizer's losses are published with."""
    model = folder.setting("model")["vq_model"]
    return {"commitment": model.get("commitment_cost", COMMITMENT), "codebook": 1.0}


def _text(folder) -> list[jax.Array]:
    """The text features, where the decoder is given some."""
    return [jnp.asarray(folder.given("text"))] if "text" in folder.arrays else []


def _codes(folder, tokenizer) -> dict[str, jax.Array]:
    """What the forms with a codebook have in common; images not clipped."""
    image_BHW3 = convolutional.nhwc(folder.given("image"))

    @jax.jit
    def of(tokenizer, image_BHW3, *text):
        latents_BPC = tokenizer.latents(image_BHW3)
        tokens_BLG = tokenizer.quantizer.encode(latents_BPC)
        codes_BPC = tokenizer.quantizer.decode(tokens_BLG)
        straight_BPC = tokenizer.quantizer(latents_BPC).latents_BPC
        decoded = [tokenizer.decoder(codes, *text) for codes in (codes_BPC, straight_BPC)]
        return latents_BPC, tokens_BLG, codes_BPC, *decoded

    found = of(tokenizer, image_BHW3, *_text(folder))
    latents_BPC, tokens_BLG, codes_BPC, decoded, forward = found
    return {
        "latents": _columns(latents_BPC),
        "indices": jnp.swapaxes(tokens_BLG, 1, 2),
        "quantized": _columns(codes_BPC),
        "decoded": convolutional.nchw(decoded),
        "forward": convolutional.nchw(forward),
        **_training(folder, tokenizer.quantizer),
    }


def _training(folder, quantizer) -> dict[str, jax.Array]:
    """The quantizer's losses and gradients, of sum(output * cotangent) + quantizer loss."""
    latents_BPC = _latents(folder.given("q_latents"))
    weights = _weights(folder)
    cotangent_BPC = _latents(folder.given("q_cotangent"))
    trained = convolutional.trained(quantizer, latents_BPC, cotangent_BPC, weights)
    terms = trained.out.losses
    return {
        "q_indices": jnp.swapaxes(trained.out.tokens_BLG, 1, 2),
        "q_out": _columns(trained.out.latents_BPC),
        "q_quantizer_loss": trained.loss,
        "q_commitment_loss": weights["commitment"] * terms["commitment"],
        "q_codebook_loss": terms["codebook"],
        "q_grad_latents": _columns(trained.latents),
        "q_grad_codebook": trained.params["codebook"],
    }


def _stage1(folder, tokenizer) -> dict[str, jax.Array]:
    """The loss of the first stage and the sizes of its gradients, by published key."""
    image_BHW3 = convolutional.nhwc(folder.given("image"))
    targets_BLG = jnp.asarray(folder.given("stage1_target_codes"))[..., None]
    weights = _weights(folder)

    def loss(tokenizer):
        quantized = tokenizer.quantizer(tokenizer.latents(image_BHW3))
        logits_BPV = tokenizer.decoder.logits(quantized.latents_BPC)
        terms = sum(weight * quantized.losses[name] for name, weight in weights.items())
        return losses.code_cross_entropy(logits_BPV, targets_BLG) + terms

    value, gradient = jax.jit(jax.value_and_grad(loss, allow_int=True))(tokenizer)
    # the pixel decoder has no part in the loss: its gradient is zero and adds nothing
    arrays = keymap.publish(gradient, rows(tokenizer))
    norms = {key: np.linalg.norm(array.astype(np.float64)) for key, array in arrays.items()}
    return {
        "stage1_loss": value,
        "stage1_grad_norms": np.array([norms[key] for key in STAGE1_KEYS]),
        "stage1_grad_norm_all": np.sqrt(sum(norm**2 for norm in norms.values())),
    }


def legacy(folder) -> dict[str, jax.Array]:
    """Every array of the form with proxy codes."""
    tokenizer = folder.module()
    arrays = _codes(folder, tokenizer)
    decoder = tokenizer.decoder

    @jax.jit
    def of(decoder, codes_BPC):
        logits_BPV = decoder.logits(codes_BPC)
        return logits_BPV, decoder.mixture(logits_BPV)

    maps = of(decoder, _latents(arrays["quantized"]))
    logits, states = (convolutional.mapped(array, decoder.codes.grid) for array in maps)
    arrays["pixel_logits"] = convolutional.nchw(logits)
    arrays["soft_states"] = convolutional.nchw(states)
    return arrays | _stage1(folder, tokenizer)


def codes(folder) -> dict[str, jax.Array]:
    """Every array of the one-stage form with a codebook, with or without text."""
    return _codes(folder, folder.module())


def continuous(folder) -> dict[str, jax.Array]:
    """Every array of the form with a Gaussian bottleneck, with or without text."""
    tokenizer = folder.module()
    image_BHW3 = convolutional.nhwc(folder.given("image"))

    @jax.jit
    def of(tokenizer, image_BHW3, *text):
        moments_BPC = tokenizer.latents(image_BHW3)
        mean_BPC, logvar_BPC = tokenizer.quantizer.moments(moments_BPC)
        divergence_BP = tokenizer.quantizer.divergence(moments_BPC)
        return moments_BPC, mean_BPC, logvar_BPC, divergence_BP, tokenizer.decoder(mean_BPC, *text)

    moments, mean, logvar, divergence, decoded = of(tokenizer, image_BHW3, *_text(folder))
    return {
        "moments": _columns(moments),
        "mean": _columns(mean),
        "logvar": _columns(logvar),
        "kl": divergence,
        "decoded": convolutional.nchw(decoded),
    }


def _system(name: str, home: str, **options) -> system.System:
    options |= dict(settings=_settings_of(name), rows=rows, licence="Apache-2.0")
    return system.System(home=f"huggingface.co/{home}", **options)


HUB = "model.safetensors"
SYSTEMS = {
    "titok_legacy": _system(
        "titok_legacy",
        "fun-research/TiTok",
        files=("tokenizer_titok_{l32,b64,s128}.bin",),
        parity=legacy,
    ),
    "titok_onestage_vq": _system(
        "titok_onestage_vq",
        "yucornetto/tokenizer_titok_{bl64,bl128,sl256}_vq8k_imagenet",
        files=(HUB,),
        parity=codes,
        form="safetensors",
    ),
    "titok_onestage_vae": _system(
        "titok_onestage_vae",
        "yucornetto/tokenizer_titok_{ll32,bl64,bl128}_vae_c16_imagenet",
        files=(HUB,),
        parity=continuous,
        form="safetensors",
    ),
    "tatitok_vq": _system(
        "tatitok_vq",
        "turkeyju/tokenizer_tatitok_{bl32,bl64,bl128}_vq",
        files=(HUB,),
        parity=codes,
        # a running share of every code, kept by training with clustering
        aside=(r"quantize\.embed_prob",),
    ),
    "tatitok_vae": _system(
        "tatitok_vae",
        "turkeyju/tokenizer_tatitok_{bl32_vae,bl64_vae,sl128_vae}",
        files=(HUB,),
        parity=continuous,
    ),
}
