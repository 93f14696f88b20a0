"""FID's Inception: a small one against a network written out in float64, names, and refusals."""

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from tokgen import interfaces
from tokgen.backbones import inception

SIZE = (107, 91)  # ends at 2 x 1 places: pools with and without neighbours
WIDTHS = {"Mixed_6d.branch1x1": 9, "Mixed_7c.branch1x1": 5}  # of others 2 and 3 in turn

# TensorFlow's scopes within a block: the published branch.
A = {
    "conv": "branch1x1",
    "tower/conv": "branch5x5_1",
    "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3",
    "tower_2/conv": "branch_pool",
}
B = {
    "conv": "branch3x3",
    "tower/conv": "branch3x3dbl_1",
    "tower/conv_1": "branch3x3dbl_2",
    "tower/conv_2": "branch3x3dbl_3",
}
C = {
    "conv": "branch1x1",
    "tower/conv": "branch7x7_1",
    "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3",
    "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2",
    "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4",
    "tower_1/conv_4": "branch7x7dbl_5",
    "tower_2/conv": "branch_pool",
}
D = {
    "tower/conv": "branch3x3_1",
    "tower/conv_1": "branch3x3_2",
    "tower_1/conv": "branch7x7x3_1",
    "tower_1/conv_1": "branch7x7x3_2",
    "tower_1/conv_2": "branch7x7x3_3",
    "tower_1/conv_3": "branch7x7x3_4",
}
E = {
    "conv": "branch1x1",
    "tower/conv": "branch3x3_1",
    "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b",
    "tower_2/conv": "branch_pool",
}
BLOCKS = {
    **{"mixed": ("5b", A), "mixed_1": ("5c", A), "mixed_2": ("5d", A), "mixed_3": ("6a", B)},
    **{"mixed_4": ("6b", C), "mixed_5": ("6c", C), "mixed_6": ("6d", C), "mixed_7": ("6e", C)},
    **{"mixed_8": ("7a", D), "mixed_9": ("7b", E), "mixed_10": ("7c", E)},
}
STEM = {"conv": "1a_3x3", "conv_1": "2a_3x3", "conv_2": "2b_3x3", "conv_3": "3b_1x1"}
STEM |= {"conv_4": "4a_3x3"}


class Written:
    """The network by the table of its description, in float64; draws its weights as it meets them.

    Maps are [H, W, C].
    """

    def __init__(self):
        self.random, self.weights = np.random.default_rng(0), {}

    def draw(self, key, *shape, scale=1.0, offset=0.0):
        if key not in self.weights:
            value = offset + scale * self.random.standard_normal(shape)
            self.weights[key] = value.astype(np.float32)
        return self.weights[key].astype(np.float64)

    def conv(self, x, name, rows, columns, stride=1, same=True):
        inputs, outputs = x.shape[2], WIDTHS.get(name, 2 + len(self.weights) // 5 % 2)
        if f"{name}.bn.weight" in self.weights:
            outputs = len(self.weights[f"{name}.bn.weight"])
        shape = (outputs, inputs, rows, columns)
        kernel = self.draw(f"{name}.conv.weight", *shape, scale=(rows * columns * inputs) ** -0.5)
        scale = self.draw(f"{name}.bn.weight", outputs, scale=0.1, offset=1)
        bias = self.draw(f"{name}.bn.bias", outputs, scale=0.3, offset=0.2)
        mean = self.draw(f"{name}.bn.running_mean", outputs, scale=0.1)
        variance = self.draw(f"{name}.bn.running_var", outputs, scale=0.01, offset=0.1)
        if same:
            x = np.pad(x, ((rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (rows, columns), (0, 1))
        y = np.einsum("hwcij,ocij->hwo", windows[::stride, ::stride], kernel)
        return np.maximum((y - mean) / np.sqrt(variance + 1e-3) * scale + bias, 0)

    def forward(self, x):
        """All features of one image."""
        x = self.conv(x, "Conv2d_1a_3x3", 3, 3, 2, same=False)
        x = self.conv(x, "Conv2d_2a_3x3", 3, 3, same=False)
        x = _largest(self.conv(x, "Conv2d_2b_3x3", 3, 3))
        found = {"64": x.mean((0, 1))}
        x = self.conv(self.conv(x, "Conv2d_3b_1x1", 1, 1), "Conv2d_4a_3x3", 3, 3, same=False)
        x = _largest(x)
        found["192"] = x.mean((0, 1))
        for letter in "bcd":
            x = self.a(x, f"Mixed_5{letter}")
        x = self.b(x, "Mixed_6a")
        for letter in "bcde":
            if letter == "d":
                spatial = self.conv(x, "Mixed_6d.branch1x1", 1, 1)
                found["spatial"] = spatial[:, :, :7].ravel()
            x = self.c(x, f"Mixed_6{letter}")
        found["768"] = x.mean((0, 1))
        x = self.d(x, "Mixed_7a")
        x = self.e(x, "Mixed_7b", _mean_around)
        x = self.e(x, "Mixed_7c", _largest_around)
        found["pool3"] = x.mean((0, 1))
        weight = self.draw("fc.weight", 6, x.shape[2])
        found["logits_unbiased"] = weight @ found["pool3"]
        found["logits"] = found["logits_unbiased"] + self.draw("fc.bias", 6)
        return found

    def line(self, x, block, *parts):
        for name, rows, columns in parts:
            x = self.conv(x, f"{block}.{name}", rows, columns)
        return x

    def a(self, x, block):
        double = (("branch3x3dbl_1", 1, 1), ("branch3x3dbl_2", 3, 3), ("branch3x3dbl_3", 3, 3))
        parts = [
            self.line(x, block, ("branch1x1", 1, 1)),
            self.line(x, block, ("branch5x5_1", 1, 1), ("branch5x5_2", 5, 5)),
            self.line(x, block, *double),
            self.line(_mean_around(x), block, ("branch_pool", 1, 1)),
        ]
        return np.concatenate(parts, -1)

    def b(self, x, block):
        double = self.line(x, block, ("branch3x3dbl_1", 1, 1), ("branch3x3dbl_2", 3, 3))
        parts = [
            self.conv(x, f"{block}.branch3x3", 3, 3, 2, same=False),
            self.conv(double, f"{block}.branch3x3dbl_3", 3, 3, 2, same=False),
            _largest(x),
        ]
        return np.concatenate(parts, -1)

    def c(self, x, block):
        double = (("branch7x7dbl_1", 1, 1), ("branch7x7dbl_2", 7, 1), ("branch7x7dbl_3", 1, 7))
        double += (("branch7x7dbl_4", 7, 1), ("branch7x7dbl_5", 1, 7))
        single = (("branch7x7_1", 1, 1), ("branch7x7_2", 1, 7), ("branch7x7_3", 7, 1))
        parts = [
            self.line(x, block, ("branch1x1", 1, 1)),
            self.line(x, block, *single),
            self.line(x, block, *double),
            self.line(_mean_around(x), block, ("branch_pool", 1, 1)),
        ]
        return np.concatenate(parts, -1)

    def d(self, x, block):
        first = self.line(x, block, ("branch3x3_1", 1, 1))
        wide = (("branch7x7x3_1", 1, 1), ("branch7x7x3_2", 1, 7), ("branch7x7x3_3", 7, 1))
        parts = [
            self.conv(first, f"{block}.branch3x3_2", 3, 3, 2, same=False),
            self.conv(self.line(x, block, *wide), f"{block}.branch7x7x3_4", 3, 3, 2, same=False),
            _largest(x),
        ]
        return np.concatenate(parts, -1)

    def e(self, x, block, pool):
        y = self.line(x, block, ("branch3x3_1", 1, 1))
        z = self.line(x, block, ("branch3x3dbl_1", 1, 1), ("branch3x3dbl_2", 3, 3))
        parts = [
            self.line(x, block, ("branch1x1", 1, 1)),
            self.line(y, block, ("branch3x3_2a", 1, 3)),
            self.line(y, block, ("branch3x3_2b", 3, 1)),
            self.line(z, block, ("branch3x3dbl_3a", 1, 3)),
            self.line(z, block, ("branch3x3dbl_3b", 3, 1)),
            self.line(pool(x), block, ("branch_pool", 1, 1)),
        ]
        return np.concatenate(parts, -1)


def _around(x):
    """The values of the 3 x 3 around every place, NaN outside: [H, W, C, 3, 3]."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=np.nan)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))


def _mean_around(x):
    return np.nanmean(_around(x), (3, 4))


def _largest_around(x):
    return np.nanmax(_around(x), (3, 4))


def _largest(x):
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (0, 1))
    return windows[::2, ::2].max((3, 4))


@pytest.fixture(scope="module")
def written():
    """(two images, the features that the written-out network finds, its weights)."""
    network = Written()
    x_BHW3 = network.random.standard_normal((2, *SIZE, 3)).astype(np.float32)
    found = [network.forward(x_HW3.astype(np.float64)) for x_HW3 in x_BHW3]
    features = {name: np.stack([each[name] for each in found]) for name in found[0]}
    return x_BHW3, features, network.weights


def test_every_feature_follows_the_description(written):
    x_BHW3, wanted, weights = written
    network = inception.from_weights(weights)
    assert not jax.tree.leaves(nnx.state(network, nnx.Param))  # nothing is trained
    found = jax.jit(lambda network, x: network.seen(x, inception.NAMES))(network, x_BHW3)
    assert set(found) == set(wanted) == set(inception.NAMES)
    assert wanted["spatial"].shape[1] % 7 == 0 and len(set(wanted["spatial"].ravel())) > 7
    for name, values in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], values, atol=3e-6 * abs(values).max(), err_msg=name)


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("64", 3), ("192", 5), ("spatial", 51), ("768", 70), ("pool3", 94), ("logits", 94)],
)
def test_only_what_is_asked_for_is_computed(written, name, convolutions):
    network = inception.from_weights(written[2])
    image_BHW3 = jax.ShapeDtypeStruct((1, 9, 9, 3), np.uint8)
    lowered = jax.jit(lambda network, image: network(image, (name,))).lower(network, image_BHW3)
    assert lowered.as_text().count("stablehlo.convolution") == convolutions
    assert lowered.out_info.keys() == {name}


def _tensorflow(weights):
    """The same numbers as the graph has them."""
    nodes = {node: f"Conv2d_{layer}" for node, layer in STEM.items()}
    for block, (name, branches) in BLOCKS.items():
        nodes |= {f"{block}/{at}": f"Mixed_{name}.{branch}" for at, branch in branches.items()}
    assert len(nodes) == 94
    arrays = {"softmax/weights": weights["fc.weight"].T, "softmax/biases": weights["fc.bias"]}
    for node, layer in nodes.items():
        kernel = weights[f"{layer}.conv.weight"]
        arrays[f"{node}/conv2d_params"] = kernel.transpose(2, 3, 1, 0)
        arrays[f"{node}/batchnorm/gamma"] = weights[f"{layer}.bn.weight"]
        arrays[f"{node}/batchnorm/beta"] = weights[f"{layer}.bn.bias"]
        arrays[f"{node}/batchnorm/moving_mean"] = weights[f"{layer}.bn.running_mean"]
        arrays[f"{node}/batchnorm/moving_variance"] = weights[f"{layer}.bn.running_var"]
    return arrays


def test_the_graph_of_tensorflow_gives_the_same_network(written):
    weights = written[2]
    graph = _tensorflow(weights) | {"ResizeBilinear/size": np.array([299, 299], np.int32)}
    found = inception.renamed(graph)
    assert set(found) == set(weights)
    for key, array in weights.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    network = inception.from_weights(graph)
    np.testing.assert_array_equal(network.head[...], weights["fc.weight"].T)
    del graph["mixed_9/tower/mixed/conv_1/conv2d_params"]
    with pytest.raises(interfaces.UserError, match=r"missing: Mixed_7b.branch3x3_2b.conv.weight\."):
        inception.from_weights(graph)
    graph["conv/conv2d_params"] = np.zeros(3, np.float32)
    with pytest.raises(interfaces.UserError, match="conv/conv2d_params must have 4 axes, has 1"):
        inception.from_weights(graph)


def test_what_does_not_fit_is_listed_in_one_error(written):
    weights = dict(written[2]) | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0)}
    del weights["Mixed_5b.branch1x1.bn.bias"]
    kernel = weights["Mixed_6c.branch7x7_2.conv.weight"]
    weights["Mixed_6c.branch7x7_2.conv.weight"] = kernel.transpose(0, 1, 3, 2)
    weights["AuxLogits.fc.bias"] = np.zeros(1000, np.float32)
    with pytest.raises(interfaces.UserError) as caught:
        inception.from_weights(weights)
    message = str(caught.value)
    assert "missing: Mixed_5b.branch1x1.bn.bias;" in message
    assert "left over: AuxLogits.fc.bias;" in message
    assert message.count("must have the shape") == 1 and "7), has" in message
    assert "pt_inception-2015-12-05-6726825d.pth" in message


def test_images_and_names_that_cannot_be_used(written):
    network = inception.from_weights(written[2])
    for image in (
        np.zeros((1, 9, 9, 3), np.float32),
        np.zeros((1, 9, 9, 1), np.uint8),
        np.zeros((9, 9, 3), np.uint8),
    ):
        with pytest.raises(interfaces.UserError, match="uint8"):
            network(image)
    with pytest.raises(interfaces.UserError, match="found pool_3"):
        network.seen(np.zeros((1, 299, 299, 3), np.float32), ("pool_3",))


@pytest.fixture(scope="module")
def bytes_():
    """Images [B, H, W, 3] that grow and shrink."""
    random = np.random.default_rng(5)
    shapes = ((1, 33, 47, 3), (1, 512, 300, 3), (1, 299, 64, 3))
    return [random.integers(0, 256, shape, np.uint8) for shape in shapes]


def _tf1(image_HWC, size):
    """The definition, place by place: no half pixels, the upper neighbour stays inside."""
    height, width, _ = image_HWC.shape
    y, x = np.arange(size) * (height / size), np.arange(size) * (width / size)
    top, left = y.astype(int), x.astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    y, x = (y - top)[:, None, None], (x - left)[None, :, None]
    image = image_HWC.astype(np.float64)
    upper = image[top][:, left] * (1 - x) + image[top][:, right] * x
    lower = image[bottom][:, left] * (1 - x) + image[bottom][:, right] * x
    return upper * (1 - y) + lower * y


def test_pixels_of_tensorflow(bytes_):
    for image_BHW3 in bytes_:
        found = inception.tf1(image_BHW3)
        wanted = (_tf1(image_BHW3[0], 299) - 128) / 128
        np.testing.assert_allclose(found[0], wanted, atol=2e-6)


def test_pixels_of_pytorch_fid(bytes_):
    for image_BHW3 in bytes_:
        unit = image_BHW3.astype(np.float32) / 255
        resized = jax.image.resize(unit, (1, 299, 299, 3), "linear", antialias=False)
        # which works its centres out in float32
        np.testing.assert_allclose(inception.torch(image_BHW3), 2 * resized - 1, atol=2e-4)


def test_pixels_of_clean_fid(bytes_):
    for image_BHW3 in bytes_:
        planes = []
        for plane_HW in np.moveaxis(image_BHW3[0].astype(np.float32), -1, 0):
            plane = PIL.Image.fromarray(plane_HW, mode="F")
            planes.append(np.asarray(plane.resize((299, 299), PIL.Image.Resampling.BICUBIC)))
        wanted = (np.clip(np.stack(planes, -1), 0, 255) - 128) / 128
        np.testing.assert_allclose(inception.clean(image_BHW3)[0], wanted, atol=2e-6)
