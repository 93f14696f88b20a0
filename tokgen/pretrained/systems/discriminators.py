"""Published discriminators: their key tables, and their fixtures computed with ours."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import losses
from tokgen.discriminators import blur, patchgan, stylegan
from tokgen.pretrained import keymap, system
from tokgen.pretrained.formats import reader

Arrays = dict[str, np.ndarray]
MOMENTUM = 0.1  # of PyTorch's running statistics

# The linear map over the 4x4 map is a convolution of ours; files flatten channels first (PyTorch)
# or last (Flax).
FLAT_CHW = keymap.one(
    lambda a, shape: a.reshape(shape[3], shape[2], *shape[:2]).transpose(2, 3, 1, 0),
    lambda a: a.transpose(3, 2, 0, 1).reshape(a.shape[3], -1),
)
FLAT_HWC = keymap.one(lambda a, shape: a.reshape(shape), lambda a: a.reshape(-1, a.shape[3]))


def patchgan_rows(network: patchgan.Discriminator) -> list[keymap.Row]:
    """`main.N` of the PatchGAN of VQGAN and its descendants."""
    rows, last = keymap.pair("main.0", "first", keymap.CONV), 3 * len(network.convs) + 2
    for n in range(len(network.convs)):
        rows += keymap.pair(f"main.{3 * n + 2}", f"convs/{n}", keymap.CONV, bias=False)
        rows += keymap.norm(f"main.{3 * n + 3}", f"norms/{n}")
    return rows + keymap.pair(f"main.{last}", "last", keymap.CONV)


def strided_rows(network: stylegan.Discriminator) -> list[keymap.Row]:
    """LlamaGen's StyleGAN form; place 1 of its `blocks` is an activation."""
    rows = keymap.pair("blocks.0", "conv_in", keymap.CONV)
    for n in range(len(network.blocks)):
        key, path = f"blocks.{n + 2}", f"blocks/{n}"
        rows += keymap.pair(f"{key}.conv_res", f"{path}/conv_skip", keymap.CONV)
        rows += keymap.pair(f"{key}.net.0", f"{path}/conv_in", keymap.CONV)
        rows += keymap.pair(f"{key}.net.2", f"{path}/conv_out", keymap.CONV)
        rows += keymap.pair(f"{key}.downsample.1", f"{path}/conv_down", keymap.CONV)
    rows += keymap.pair("final_conv.0", "conv_out", keymap.CONV)
    rows += keymap.pair("final_linear.0", "conv_flat", FLAT_CHW)
    return rows + keymap.pair("final_linear.2", "last", FLAT_CHW)


def maskgit_rows(network: stylegan.Discriminator) -> list[keymap.Row]:
    """MaskGIT's Flax tree, its path joined by dots."""
    places = {
        "Conv_0": ("conv_in", keymap.AS_IS),
        "Conv_1": ("conv_out", keymap.AS_IS),
        "Dense_0": ("conv_flat", FLAT_HWC),
        "Dense_1": ("last", FLAT_HWC),
    }
    for n in range(len(network.blocks)):
        for key, name in (("Conv_0", "conv_in"), ("Conv_1", "conv_skip"), ("Conv_2", "conv_out")):
            places[f"ResBlock_{n}.{key}"] = (f"blocks/{n}/{name}", keymap.AS_IS)
    rows = []
    for key, (path, rule) in places.items():
        rows.append(keymap.row(f"{key}.kernel", f"{path}/kernel", rule))
        if not path.endswith("conv_skip"):
            rows.append(keymap.row(f"{key}.bias", f"{path}/bias"))
    return rows


def blur_rows(network: blur.Discriminator) -> list[keymap.Row]:
    """The discriminator of VQGAN+, MaskBit and TiTok."""
    rows = keymap.pair("block_in.0", "first", keymap.CONV)
    for n in range(len(network.stages)):
        rows += keymap.pair(f"blocks.{n}.0", f"stages/{n}/conv", keymap.CONV)
        rows += keymap.norm(f"blocks.{n}.2", f"stages/{n}/norm")
    rows += keymap.pair("to_logits.0", "conv_out", keymap.CONV)
    return rows + keymap.pair("to_logits.2", "last", keymap.CONV)


def _filled(
    make: Callable, rows: Callable, weights: Arrays, file, aside: tuple[str, ...] = ()
) -> nnx.Module:
    network = nnx.eval_shape(make)
    weights, _ = keymap.split(weights, aside)
    return keymap.fill(network, rows(network), weights, source=str(file))


def _image(array_BCHW: np.ndarray, lowest: float = -1.0) -> jax.Array:
    """[B, C, H, W] in [lowest, 1] -> image_BHW3 in [-1, 1]."""
    return jnp.asarray(2 * (array_BCHW.transpose(0, 2, 3, 1) - lowest) / (1 - lowest) - 1)


def _channels_first(array: jax.Array) -> np.ndarray:
    array = np.asarray(array)
    return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array


def _judged(network: nnx.Module, image_BHW3: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(logits, gradient of their sum w.r.t. the image), channels first."""

    def judged(image_BHW3):
        logits = network(image_BHW3)
        return logits.sum(), logits

    gradient, logits = jax.jit(jax.grad(judged, has_aux=True))(image_BHW3)
    return _channels_first(logits), _channels_first(gradient)


def _patchgan_pair(
    weights: Arrays, width: int, layers: int, channels: int, file
) -> tuple[nnx.Module, nnx.Module]:
    """(the network as it trains, the network with its running statistics put in)."""
    training = _filled(
        lambda: patchgan.Discriminator(channels, width, layers, rngs=nnx.Rngs(0)),
        patchgan_rows,
        weights,
        file,
        (r".*\.(running_mean|running_var|num_batches_tracked)",),
    )
    # with fixed statistics a batch norm is one factor and one bias per channel
    folded = {key: array for key, array in weights.items() if ".running" not in key}
    rows = keymap.pair("main.0", "first", keymap.CONV)
    for n in range(layers):
        conv, norm = f"main.{3 * n + 2}", f"main.{3 * n + 3}"
        deviation = np.sqrt(weights[f"{norm}.running_var"] + patchgan.EPSILON)
        factor = folded.pop(f"{norm}.weight") / deviation
        bias = folded.pop(f"{norm}.bias") - weights[f"{norm}.running_mean"] * factor
        folded[f"{conv}.weight"] = weights[f"{conv}.weight"] * factor.reshape(-1, 1, 1, 1)
        folded[f"{conv}.bias"] = bias
        rows += keymap.pair(conv, f"convs/{n}", keymap.CONV)
    rows += keymap.pair(f"main.{3 * layers + 2}", "last", keymap.CONV)
    evaluating = _filled(
        lambda: patchgan.Discriminator(channels, width, layers, norm="none", rngs=nnx.Rngs(0)),
        lambda network: rows,
        folded,
        file,
        (r".*\.num_batches_tracked",),
    )
    return training, evaluating


def _running(network: patchgan.Discriminator, weights: Arrays, image_BHW3: jax.Array) -> Arrays:
    """PyTorch's running statistics after one training call on `image_BHW3`."""
    after, x = {}, jax.nn.leaky_relu(network.first(image_BHW3), patchgan.SLOPE)
    for n, (conv, norm) in enumerate(zip(network.convs, network.norms, strict=True)):
        x = conv(x)
        places = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        seen = {"running_mean": places.mean(0), "running_var": places.var(0, ddof=1)}
        for name, value in seen.items():
            key = f"main.{3 * n + 3}.{name}"
            after[f"after_{key}"] = (1 - MOMENTUM) * weights[key] + MOMENTUM * value
        x = jax.nn.leaky_relu(norm(x), patchgan.SLOPE)
    return after


def disc_patchgan(folder) -> Arrays:
    """LlamaGen's PatchGAN in both modes, its losses and the adaptive weight."""
    file = folder.file()
    weights = reader.read(file)
    sizes = (folder.setting(name) for name in ("ndf", "n_layers", "input_nc"))
    training, evaluating = _patchgan_pair(weights, *sizes, file)
    real, fake = _image(folder.given("real")), _image(folder.given("fake"))
    arrays = _running(training, weights, real)
    arrays["logits_real_train"] = _judged(training, real)[0]
    arrays["logits_real"], arrays["grad_real"] = _judged(evaluating, real)
    arrays["logits_fake"], _ = _judged(evaluating, fake)
    real, fake = arrays["logits_real"], arrays["logits_fake"]
    arrays["hinge_d_loss"] = losses.hinge_discriminator(real, fake)
    arrays["vanilla_d_loss"] = losses.vanilla_discriminator(real, fake)
    arrays["hinge_gen_loss"] = losses.hinge_generator(fake)
    arrays["non_saturating_d_loss"] = 0.5 * (
        _swapped(np.ones_like(real), real) + _swapped(np.zeros_like(fake), fake)
    )
    arrays["non_saturating_gen_loss"] = _swapped(np.ones_like(fake), fake)
    weight = folder.given("aw_weight")
    u, v = jnp.asarray(folder.given("aw_u")), jnp.asarray(folder.given("aw_v"))
    reconstruction = jax.grad(lambda w: jnp.sum((w * u) ** 2))(jnp.asarray(weight))
    adversarial = jax.grad(lambda w: jnp.sum(w * v))(jnp.asarray(weight))
    arrays["aw_value"] = losses.adaptive_weight(reconstruction, adversarial)
    return arrays


def _swapped(target: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """LlamaGen's cross-entropy with prediction and target in each other's place.

    Wrong, and recorded in its fixture; `losses.non_saturating_*` are the right ones.
    """
    target, logits = target.astype(np.float64), logits.astype(np.float64)
    return np.mean(np.logaddexp(0, target) - target * logits)


def disc_stylegan(folder) -> Arrays:
    """LlamaGen's StyleGAN form."""
    size, channels = folder.setting("image_size"), folder.setting("channels")
    real, fake = _image(folder.given("real")), _image(folder.given("fake"))
    file = folder.file()
    network = _filled(
        lambda: stylegan.Discriminator(
            real.shape[3], size, _widths(size, channels), form="strided", rngs=nnx.Rngs(0)
        ),
        strided_rows,
        reader.read(file),
        file,
        (r"blocks\.\d+\.downsample\.0\.f",),
    )
    logits, gradient = _judged(network, real)
    return {
        "logits_real": logits,
        "grad_real": gradient,
        "logits_fake": _judged(network, fake)[0],
    }


def _widths(size: int, widths: dict[str, int]) -> list[int]:
    """Widths from `size` pixels down to 4, of a table by resolution."""
    return [widths[str(size >> n)] for n in range(size.bit_length() - 2)]


def disc_maskbit(folder) -> Arrays:
    """MaskBit's discriminators, each from its own file, and the losses of the first."""
    arrays = {}
    images = {name: folder.given(name) for name in ("real", "fake")}
    for name, options in folder.setting("files").items():
        options, label = {**folder.config, **options}, _label(name)
        weights = reader.read(folder.path / name)
        if label == "original":
            sizes = (options["hidden_channels"], options["num_stages"], options["num_channels"])
            _, network = _patchgan_pair(weights, *sizes, name)
            # this one is published on [0, 1]; ours takes what it is given
            judged = {key: _image(image, -1.0) for key, image in images.items()}
        else:
            network = _blur_discriminator(weights, options, name)
            judged = {key: _image(image, 0.0) for key, image in images.items()}
        for key, image_BHW3 in judged.items():
            logits, gradient = _judged(network, image_BHW3)
            arrays[f"logits_{key}_{label}"] = logits
            if f"grad_{key}_{label}" in folder.arrays:
                # d/d image in [0, 1]: the discriminator's own range is twice as wide
                arrays[f"grad_{key}_{label}"] = (1 if label == "original" else 2) * gradient
    # of the README's name for the first; a folder with other files has another first one
    label = (
        "blur4" if "logits_real_blur4" in arrays else _label(next(iter(folder.setting("files"))))
    )
    real, fake = arrays[f"logits_real_{label}"], arrays[f"logits_fake_{label}"]
    for name in ("hinge", "vanilla", "non_saturating"):
        arrays[f"{name}_d_loss"] = losses.DISCRIMINATOR[name](real, fake)
    for name in ("hinge", "non_saturating"):
        arrays[f"{name}_g_loss"] = losses.GENERATOR[name](fake)
    averages = {"real": jnp.asarray(0.3), "fake": jnp.asarray(-0.2)}  # of the fixture's README
    arrays["lecam_loss"] = losses.lecam_means(real, fake, averages)
    return arrays


def _label(name: str) -> str:
    """What a file of MaskBit's discriminators adds to the names of its arrays."""
    return name.partition(".")[0].removeprefix("v2_")


def _blur_discriminator(weights: Arrays, options: dict, file) -> blur.Discriminator:
    down = "average"
    if options.get("blur_resample", False):
        down = f"blur{options.get('blur_kernel_size', 4)}"
    # there, every other name is taken for SiLU
    activation = (
        "leaky_relu" if options.get("activation_fn", "leaky_relu") == "leaky_relu" else "silu"
    )
    return _filled(
        lambda: blur.Discriminator(
            options["num_channels"],
            options["hidden_channels"],
            options["num_stages"],
            down,
            activation,
            rngs=nnx.Rngs(0),
        ),
        blur_rows,
        weights,
        file,
        (r"blocks\.\d+\.1\.kernel",),
    )


def maskgit_discriminator(folder) -> Arrays:
    """MaskGIT's StyleGAN form with and without blur, its losses and its penalty."""
    size, file, arrays = folder.setting("image_size"), folder.file(), {}
    image, fake = (jnp.asarray(folder.given(name)) for name in ("image", "image_fake"))
    weights = reader.read(file, "params", flatten=True)
    for form, name in (("blur", "blur"), ("average", "avg")):
        network = _filled(
            lambda form=form: stylegan.Discriminator(
                image.shape[3],
                size,
                _widths(size, folder.setting("filters")),
                form=form,
                rngs=nnx.Rngs(0),
            ),
            maskgit_rows,
            weights,
            file,
        )
        arrays[f"logits_{name}"] = _judged(network, 2 * image - 1)[0]
        if form == "blur":
            arrays["logits_fake_blur"] = _judged(network, 2 * fake - 1)[0]
            arrays["r1_penalty"] = 10 * losses.r1(network, image)
    logits = arrays["logits_blur"], arrays["logits_fake_blur"]
    arrays["d_loss_hinge"] = losses.hinge_sum_discriminator(*logits)
    arrays["g_loss_hinge"] = losses.hinge_generator(logits[1])
    arrays["d_loss_non-saturating"] = losses.non_saturating_discriminator(*logits)
    arrays["g_loss_non-saturating"] = losses.non_saturating_generator(logits[1])
    return arrays


SYSTEMS = {
    "disc_patchgan": system.System(
        disc_patchgan, home="github.com/FoundationVision/LlamaGen", licence="MIT"
    ),
    "disc_stylegan": system.System(
        disc_stylegan, home="github.com/FoundationVision/LlamaGen", licence="MIT"
    ),
    "disc_maskbit": system.System(
        disc_maskbit, home="github.com/markweberdev/maskbit", licence="Apache-2.0"
    ),
    "maskgit_discriminator": system.System(
        maskgit_discriminator,
        form="flax",
        home="github.com/google-research/maskgit",
        licence="Apache-2.0",
    ),
}
