"""Quantizers against the outputs of the systems' own code: tokens, losses, gradients.

The scalar whose gradients a fixture holds is sum(out * cotangent) + the weighted losses.
"""

import json

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tokgen import state as states
from tokgen.pretrained import reader
from tokgen.quantizers import entropy, gaussian, lfq, multiscale, vq

TABLE = "quantize.embedding.weight"


class Case:
    """The arrays of a fixture; those of a loose tolerance are known by their names."""

    def __init__(self, folder):
        self.folder = folder
        with np.load(folder / "case.npz") as arrays:
            self.arrays = dict(arrays)
        self.config = json.loads((folder / "config.json").read_text())

    def latents(self, name):
        """[B, P, C], from NHWC (MaskGIT in Flax) or NCHW."""
        array = self.arrays[name]
        if self.folder.name != "maskgit_tokenizer":
            array = np.moveaxis(array, 1, -1)
        return jnp.asarray(array.reshape(len(array), -1, array.shape[-1]))

    def same_map(self, found_BPC, name):
        np.testing.assert_allclose(found_BPC, self.latents(name), **self.tolerance(name))

    def same_tokens(self, found_BLG, name):
        np.testing.assert_array_equal(np.ravel(found_BLG), np.ravel(self.arrays[name]), name)

    def same(self, found, name):
        np.testing.assert_allclose(found, self.arrays[name], err_msg=name, **self.tolerance(name))

    def tolerance(self, name):
        loose = "grad" in name or "entropy" in name or name == "q_quantizer_loss"
        return dict(rtol=0, atol=(1e-3 if loose else 1e-4) * np.abs(self.arrays[name]).max())


def differentiated(case, quantizer, weights):
    """(Quantized of q_latents, gradient to the parameters, gradient to the latents)"""
    graph, params, stats = states.split(quantizer)
    cotangent_BPC = case.latents("q_cotangent")

    def scalar(params, latents_BPC):
        out = states.merge(graph, params, stats)(latents_BPC)
        total = sum(weight * out.losses[name] for name, weight in weights.items())
        return jnp.sum(out.latents_BPC * cotangent_BPC) + total, out

    by_params, by_latents, out = _gradients(scalar, params, case.latents("q_latents"))
    return out, by_params, by_latents


def _gradients(scalar, params, latents_BPC):
    (by_params, by_latents), out = jax.jit(jax.grad(scalar, (0, 1), has_aux=True))(
        params, latents_BPC
    )
    return by_params, by_latents, out


def torch_table(file, *unwrap):
    return lambda folder: reader.read(folder / file, *unwrap)[TABLE]


def flax_table(folder):
    tree = flax.serialization.msgpack_restore(
        (folder / "tokenizer_imagenet_checkpoint").read_bytes()
    )
    return tree["params"]["quantizer"]["codebook"]


PAPER = {"commitment": 0.25, "codebook": 1.0}
SWAPPED = {"commitment": 1.0, "codebook": 0.25}
TITOK = {"q_quantizer_loss": PAPER, "q_commitment_loss": {"commitment": 0.25}} | {
    "q_codebook_loss": {"codebook": 1.0}
}


def undecided(weight):
    return {"sample_entropy": weight, "batch_entropy": -weight}


def maskbit(suffix, **more):
    """What MaskBit's fixtures hold at one temperature."""
    return {
        f"q_quantizer_loss{suffix}": {"commitment": 0.25} | more | undecided(0.02),
        f"q_commitment_loss{suffix}": {"commitment": 0.25},
        f"q_entropy_loss{suffix}": undecided(0.02),
        f"q_per_sample_entropy{suffix}": {"sample_entropy": 1.0},
        f"q_avg_entropy{suffix}": {"batch_entropy": 1.0},
    }


# folder, table, arguments, the losses as weighted sums (the first is that of the scalar), suffix
LOOKUPS = [
    ("maskgit_vqgan", torch_table("maskgit-vqgan-imagenet-f16-256.bin"), {}, {"q_loss": SWAPPED}),
    (
        "maskgit_tokenizer",
        flax_table,
        {"temperature": 0.01},
        {
            "q_quantizer_loss": PAPER | undecided(0.1),
            "q_e_latent_loss": {"commitment": 0.25},
            "q_q_latent_loss": {"codebook": 1.0},
            "q_entropy_loss": undecided(0.1),
        },
    ),
    (
        "llamagen_vq",
        torch_table("vq_ds2.pt", "model"),
        {"normalize": True, "temperature": 0.01},
        {
            "": PAPER | undecided(0.1),
            "q_vq_loss": {"codebook": 1.0},
            "q_commit_loss": {"commitment": 0.25},
            "q_entropy_loss": undecided(0.1),
        },
    ),
    (
        "maskbit_vqganplus",
        torch_table("maskbit_vqganplus.bin"),
        {"temperature": 0.01, "entropy": "clamped"},
        maskbit("", codebook=1.0) | {"q_codebook_loss": {"codebook": 1.0}},
    ),
    (
        "maskbit_vqganplus",
        torch_table("maskbit_vqganplus.bin"),
        {"temperature": 1.0, "entropy": "clamped"},
        maskbit("_t1", codebook=1.0) | {"q_codebook_loss_t1": {"codebook": 1.0}},
    ),
    ("titok_legacy", torch_table("tokenizer_titok.bin"), {"normalize": True}, TITOK),
    ("titok_onestage_vq", torch_table("model.safetensors"), {}, TITOK),
    ("tatitok_vq", torch_table("tatitok.bin"), {}, TITOK),
]


@pytest.mark.parametrize(
    ("folder", "table", "arguments", "sums"),
    LOOKUPS,
    ids=[f"{row[0]}{'-t1' if row[2].get('temperature') == 1 else ''}" for row in LOOKUPS],
)
def test_lookup_quantizers(folder, table, arguments, sums, shared):
    case = Case(shared / "parity" / folder)
    rows_VC = table(case.folder)
    quantizer = vq.Quantizer(
        *rows_VC.shape, grid=(1, 1), **{"normalize": False} | arguments, rngs=nnx.Rngs(0)
    )
    quantizer.codebook[...] = jnp.asarray(rows_VC)
    tokens_BLG = quantizer.encode(case.latents("latents"))
    case.same_tokens(tokens_BLG, "indices")
    case.same_map(quantizer.decode(tokens_BLG), "quantized")
    out, by_params, by_latents = differentiated(case, quantizer, next(iter(sums.values())))
    case.same_tokens(out.tokens_BLG, "q_indices")
    for name, weights in sums.items():
        if name:
            case.same(sum(w * out.losses[loss] for loss, w in weights.items()), name)
    suffix = "_t1" if arguments.get("temperature") == 1 else ""
    case.same_map(by_latents, f"q_grad_latents{suffix}")
    case.same(by_params["codebook"], f"q_grad_codebook{suffix}")
    if "q_out" in case.arrays:
        case.same_map(out.latents_BPC, "q_out")
    if "q_soft_code_t2" in case.arrays:
        case.same(quantizer.soft(case.latents("q_latents"), 2.0), "q_soft_code_t2")


def test_both_targets_of_maskgits_entropy(shared):
    case = Case(shared / "parity" / "maskgit_tokenizer")
    affinities = jnp.asarray(case.arrays["ent_affinity"])
    for name, function in (
        ("ent_softmax", entropy.of_affinities),
        ("ent_argmax", entropy.of_choices),
    ):
        found = function(affinities, 0.5, "shifted")
        case.same(found["sample_entropy"] - found["batch_entropy"], name)


BITS = [
    ("maskbit_tokenizer", 0.01, "clamped", maskbit(""), ""),
    ("maskbit_tokenizer", 1.0, "clamped", maskbit("_t1"), "_t1"),
    (
        "openmagvit2",
        0.01,
        "shifted",
        {
            "": {"commitment": 0.25} | undecided(1.0),
            "q_entropy_aux_loss": undecided(1.0),
            "q_per_sample_entropy": {"sample_entropy": 1.0},
            "q_codebook_entropy": {"batch_entropy": 1.0},
            "q_commitment": {"commitment": 1.0},
        },
        "",
    ),
]


# bits up to which the codebook is written out: 0 factorises, without the clamp that only a
# temperature of 1 feels
WAYS = [(*row, whole) for row in BITS for whole in (12, 0) if (row[4], whole) != ("_t1", 0)]


@pytest.mark.parametrize(
    ("folder", "temperature", "form", "sums", "suffix", "whole"),
    WAYS,
    ids=[f"{row[0]}{row[4]}-{'whole' if row[5] else 'factorised'}" for row in WAYS],
)
def test_lookup_free_quantizers(
    folder, temperature, form, sums, suffix, whole, shared, monkeypatch
):
    monkeypatch.setattr(lfq, "WHOLE", whole)
    case = Case(shared / "parity" / folder)
    bits = case.arrays["latents"].shape[1]
    quantizer = lfq.Quantizer(bits, grid=(1, 1), temperature=temperature, entropy=form)
    tokens_BLG = quantizer.encode(case.latents("latents"))
    case.same_tokens(tokens_BLG, "indices")
    case.same_map(quantizer.decode(tokens_BLG), "quantized")
    out, _, by_latents = differentiated(case, quantizer, next(iter(sums.values())))
    case.same_tokens(out.tokens_BLG, "q_indices")
    for name, weights in sums.items():
        if name:
            case.same(sum(w * out.losses[loss] for loss, w in weights.items()), name)
    case.same_map(by_latents, f"q_grad_latents{suffix}")
    if "all_bits" in case.arrays:
        case.same(quantizer.decode(jnp.arange(2**bits)[None, :, None])[0], "all_bits")


def test_gaussian_of_titok(shared):
    case = Case(shared / "parity" / "titok_onestage_vae")
    moments_BPC = case.latents("moments")
    quantizer = gaussian.Quantizer(moments_BPC.shape[-1] // 2)
    mean_BPC, logvar_BPC = quantizer.moments(moments_BPC)
    case.same_map(mean_BPC, "mean")
    case.same_map(logvar_BPC, "logvar")
    case.same_map(quantizer(moments_BPC).latents_BPC, "mean")
    case.same(quantizer.divergence(moments_BPC), "kl")


def var(case):
    """The quantizer of a VAR fixture, and its scales."""
    weights, settings = reader.read(case.folder / "vae_ch32.pth"), case.config
    scales = tuple(settings["v_patch_nums"])
    quantizer = multiscale.Quantizer(
        dict(
            name="vq",
            codes=settings["vocab_size"],
            channels=settings["z_channels"],
            normalize=settings["using_znorm"],
        ),
        scales,
        settings["share_quant_resi"],
        settings["quant_resi"],
        grid=(scales[-1], scales[-1]),
        rngs=nnx.Rngs(0),
    )
    quantizer.inner.codebook[...] = jnp.asarray(weights[TABLE])
    quantizer.counts[...] = jnp.asarray(weights["quantize.ema_vocab_hit_SV"])[:, None]
    for number, phi in enumerate(quantizer.convs):
        key = f"quantize.quant_resi.qresi_ls.{number}"
        phi.kernel[...] = jnp.asarray(weights[f"{key}.weight"].transpose(2, 3, 1, 0))
        phi.bias[...] = jnp.asarray(weights[f"{key}.bias"])
    return quantizer


def test_multi_scale_quantizer_of_var(shared):
    case = Case(shared / "parity" / "var_vqvae")
    quantizer = var(case)
    tokens_BLG = quantizer.encode(case.latents("features"))
    known = quantizer.partial(tokens_BLG)
    for scale, (start, size) in enumerate(quantizer.layout.spans):
        case.same_tokens(tokens_BLG[:, start : start + size], f"indices_{scale}")
        case.same_map(known[scale], f"f_hat_{scale}")
    case.same(quantizer.known_before(tokens_BLG), "var_input")
    out, by_params, by_latents = differentiated(case, quantizer, PAPER)
    case.same_map(out.latents_BPC, "q_f_hat")
    case.same(0.25 * out.losses["commitment"] + out.losses["codebook"], "q_loss")
    case.same_map(by_latents, "q_grad_latents")
    case.same(by_params["inner"]["codebook"], "q_grad_codebook")
    phi0 = np.asarray(by_params["convs"][0]["kernel"]).transpose(3, 2, 0, 1)
    case.same(phi0, "q_grad_phi0")
    B, _, H, W = case.arrays["q_latents"].shape
    case.same(100 * quantizer.usage(B * H * W)[:, 0], "q_usages")
