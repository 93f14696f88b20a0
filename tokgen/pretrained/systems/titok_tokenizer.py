"""The tokenizers of TiTok (arXiv:2406.07550) and TA-TiTok (arXiv:2501.07730)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tokgen import losses
from tokgen.pretrained import keymap, system
from tokgen.pretrained.families import convolutional, titok

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
    arrays = keymap.publish(gradient, titok.rows(tokenizer))
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


def _system(name: str, **options) -> system.System:
    options |= dict(settings=titok.settings_of(name), rows=titok.rows, licence="Apache-2.0")
    return system.System(**options)


SYSTEMS = {
    "titok_legacy": _system(
        "titok_legacy",
        parity=legacy,
    ),
    "titok_onestage_vq": _system(
        "titok_onestage_vq",
        parity=codes,
        form="safetensors",
    ),
    "titok_onestage_vae": _system(
        "titok_onestage_vae",
        parity=continuous,
        form="safetensors",
    ),
    "tatitok_vq": _system(
        "tatitok_vq",
        parity=codes,
        # a running share of every code, kept by training with clustering
        aside=(r"quantize\.embed_prob",),
    ),
    "tatitok_vae": _system(
        "tatitok_vae",
        parity=continuous,
    ),
}
