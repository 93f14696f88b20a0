"""InceptionV3 (arXiv:1512.00567) as FID knows it: TensorFlow's graph of 2015-12-05.

It is not torchvision's network: average pools leave the padding out of their mean, the last block
pools by maximum, there are 1008 logits, and the weights are others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import features, inception_layers as plan, weights as files
from tokgen.nn import resample

SIZE = 299  # pixels
EPSILON = 1e-3  # of the batch norms
SFID_CHANNELS = 7
# Means over the positions after the first and second pooling, before the auxiliary head and at the
# end (FID); the first channels of Mixed_6d's 1x1 branch (sFID); logits, also without their bias
# (Inception Score).
NAMES = ("64", "192", "768", "pool3", "spatial", "logits", "logits_unbiased")
SOURCE = (
    "The FID network is published as pt_inception-2015-12-05-6726825d.pth at github.com/mseitzer/"
    "pytorch-fid (release fid_weights; code Apache-2.0), or as classify_image_graph_def.pb in "
    "TensorFlow's inception-2015-12-05.tgz, from which it was converted (weights of Google, "
    "Apache-2.0). torchvision's InceptionV3 is another network"
)

Images = jax.Array
Look = Callable[[Images], jax.Array]


def tf1(image_BHW3: Images) -> jax.Array:
    """Bytes -> [B, 299, 299, 3] as TensorFlow's graph resizes them: ADM's FID, torch-fidelity's."""
    return _centred(resample.resize(image_BHW3, (SIZE, SIZE), resample.linear_tf1))


def torch(image_BHW3: Images) -> jax.Array:
    """Bytes -> [B, 299, 299, 3] as pytorch-fid resizes them."""
    unit_BHW3 = image_BHW3.astype(jnp.float32) / 255
    return 2 * resample.resize(unit_BHW3, (SIZE, SIZE), resample.linear_torch) - 1


def clean(image_BHW3: Images) -> jax.Array:
    """Bytes -> [B, 299, 299, 3] as clean-fid resizes them (arXiv:2104.11222), without rounding."""
    resized_BHW3 = resample.resize(image_BHW3, (SIZE, SIZE), resample.bicubic_pil)
    return _centred(jnp.clip(resized_BHW3, 0, 255))


def _centred(x_BHW3: jax.Array) -> jax.Array:
    return (x_BHW3 - 128) * 0.0078125


class Conv(nnx.Module):
    """[B, H, W, I] -> [B, H', W', O]: convolution, recorded batch norm, ReLU."""

    def __init__(self, layer: plan.Layer, weights: Mapping[str, np.ndarray]):
        self.kernel = _array(weights[f"{layer.name}.conv.weight"].transpose(2, 3, 1, 0))
        norm = f"{layer.name}.bn"
        self.scale, self.bias = _array(weights[f"{norm}.weight"]), _array(weights[f"{norm}.bias"])
        self.mean = _array(weights[f"{norm}.running_mean"])
        self.variance = _array(weights[f"{norm}.running_var"])
        self.stride, self.padding = layer.stride, layer.padding

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y_BHWC = jax.lax.conv_general_dilated(
            x_BHWC,
            self.kernel[...],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        factor_C = self.scale[...] / jnp.sqrt(self.variance[...] + EPSILON)
        shift_C = self.bias[...] - self.mean[...] * factor_C
        return jax.nn.relu(y_BHWC * factor_C.reshape(1, 1, 1, -1) + shift_C.reshape(1, 1, 1, -1))


class Inception(nnx.Module):
    """Bytes [B, H, W, 3] -> the features of `NAMES` that are asked for, each [B, D].

    `look` (`tf1`, `torch` or `clean`) says how images come in. Under `jit` the network is an
    argument, and the names are closed over.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], look: Look = tf1):
        self.convs = nnx.Dict(
            {layer.name: Conv(layer, weights) for layer in plan.layers(plan.WHOLE)}
        )
        self.head = _array(weights["fc.weight"].T)
        self.head_bias = _array(weights["fc.bias"])
        self.look = look

    def __call__(self, image_BHW3: Images, names: Sequence[str] = NAMES) -> dict[str, jax.Array]:
        shape, dtype = image_BHW3.shape, image_BHW3.dtype
        if len(shape) != 4 or shape[3] != 3 or 0 in shape[1:] or dtype != jnp.uint8:
            raise interfaces.UserError(
                f"Inception needs images as bytes, uint8 [B, H, W, 3]; found {dtype} {shape}: "
                "round to bytes as they would be saved, and give gray images three channels"
            )
        return self.seen(self.look(image_BHW3), names)

    def seen(self, x_BHW3: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
        """Features of pixels that are resized and scaled already; compiling drops the others."""
        unknown = [name for name in names if name not in NAMES]
        if unknown:
            raise interfaces.UserError(
                f"features of Inception are {', '.join(NAMES)}; found {', '.join(unknown)}"
            )
        found = {}
        x = self._run(plan.TO_64, x_BHW3)
        found["64"] = x.mean((1, 2))
        x = self._run(plan.TO_192, x)
        found["192"] = x.mean((1, 2))
        x = self._run(plan.TO_SPATIAL, x)
        branch_BHWC = self.convs["Mixed_6d.branch1x1"](x)
        found["spatial"] = branch_BHWC[..., :SFID_CHANNELS].reshape(len(x), -1)
        x = self._run(plan.TO_768, x)
        found["768"] = x.mean((1, 2))
        found["pool3"] = self._run(plan.TO_POOL, x).mean((1, 2))
        highest = jax.lax.Precision.HIGHEST
        logits_BV = jnp.matmul(found["pool3"], self.head[...], precision=highest)
        found["logits_unbiased"] = logits_BV
        found["logits"] = logits_BV + self.head_bias[...].reshape(1, -1)
        return {name: found[name] for name in names}

    def _run(self, chain: plan.Chain, x_BHWC: jax.Array) -> jax.Array:
        for step in chain:
            if isinstance(step, tuple):
                x_BHWC = jnp.concatenate([self._run(branch, x_BHWC) for branch in step], -1)
            else:
                x_BHWC = (self.convs[step.name] if isinstance(step, plan.Layer) else step)(x_BHWC)
        return x_BHWC


def _array(array: np.ndarray) -> interfaces.Statistic:
    return interfaces.Statistic(jnp.asarray(array, jnp.float32))


def from_weights(weights: Mapping[str, np.ndarray], look: Look = tf1) -> Inception:
    """The network from published arrays, of the .pth or of the .pb; widths are the arrays' own."""
    if any(name.endswith("/conv2d_params") for name in weights):
        weights = renamed(weights)
    weights = {k: array for k, array in weights.items() if not k.endswith("num_batches_tracked")}
    needed: dict[str, tuple[int, ...]] = {}
    width = _shapes(plan.WHOLE, 3, weights, needed)
    classes = _length(weights, "fc.bias", "fc.weight")
    needed |= {"fc.weight": (classes, width), "fc.bias": (classes,)}
    files.check(needed, weights, what="Inception", source=SOURCE)
    return Inception(weights, look)


def _shapes(
    chain: plan.Chain, inputs: int, weights: Mapping[str, np.ndarray], needed: dict[str, tuple]
) -> int:
    """Add the shapes that a chain needs; its outputs."""
    for step in chain:
        if isinstance(step, tuple):
            inputs = sum(_shapes(branch, inputs, weights, needed) for branch in step)
        elif isinstance(step, plan.Layer):
            norm, kernel = f"{step.name}.bn", f"{step.name}.conv.weight"
            # the norm's: a kernel of the wrong shape is then one problem, not all that follow
            outputs = _length(weights, f"{norm}.weight", f"{norm}.bias", kernel)
            needed[kernel] = (outputs, inputs, step.rows, step.columns)
            for name in ("weight", "bias", "running_mean", "running_var"):
                needed[f"{norm}.{name}"] = (outputs,)
            inputs = outputs
    return inputs


def _length(weights: Mapping[str, np.ndarray], *keys: str) -> int:
    """Of the first axis of the first array that is there."""
    return next((weights[k].shape[0] for k in keys if k in weights and weights[k].ndim), 0)


def renamed(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """TensorFlow's constants under the names and in the axis order of the .pth.

    Constants of the graph that are no weights are left out.
    """
    places = {"softmax/weights": ("fc.weight", (1, 0)), "softmax/biases": ("fc.bias", (0,))}
    for layer, node in plan.nodes(plan.WHOLE):
        places[f"{node}/conv2d_params"] = (f"{layer}.conv.weight", (3, 2, 0, 1))
        for ours, theirs in (
            ("gamma", "weight"),
            ("beta", "bias"),
            ("moving_mean", "running_mean"),
            ("moving_variance", "running_var"),
        ):
            places[f"{node}/batchnorm/{ours}"] = (f"{layer}.bn.{theirs}", (0,))
    wrong = [
        f"{name} must have {len(axes)} axes, has {weights[name].ndim}"
        for name, (_, axes) in places.items()
        if name in weights and weights[name].ndim != len(axes)
    ]
    if wrong:
        raise interfaces.UserError(f"weights for Inception: {'; '.join(wrong)}. {SOURCE}")
    return {
        key: weights[name].transpose(axes)
        for name, (key, axes) in places.items()
        if name in weights
    }


MEASURED = ("pool3", "spatial", "logits_unbiased")
FEATURE_NETWORKS = {
    name: features.FeatureNetwork(functools.partial(from_weights, look=look), MEASURED, SOURCE)
    for name, look in (("inception", tf1), ("inception_torch", torch), ("inception_clean", clean))
}
