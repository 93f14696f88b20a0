"""Frozen feature networks: they look at images in [-1, 1] and return what they saw on the way.

A trunk holds weights somebody else trained on ImageNet (`perceptual.py` puts them in) and
normalises its input as it was trained, so its callers know of [-1, 1] only. A gray image is
seen as three equal channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen import interfaces

# ImageNet's mean (0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225) are said of [0, 1];
# of [-1, 1] they are 2 mean - 1 and 2 deviation, the "scaling layer" of LPIPS.
MEAN_3 = (-0.030, -0.088, -0.188)
DEVIATION_3 = (0.458, 0.448, 0.450)


class VGG16(nnx.Module):
    """image_BHW3 in [-1, 1] -> five maps: after relu1_2, 2_2, 3_3, 4_3 and 5_3.

    Configuration D of arXiv:1409.1556, without its last pooling and its classifier. The maps
    have 64, 128, 256, 512 and 512 channels, at 1, 1/2, 1/4, 1/8 and 1/16 of the image's size.
    """

    widths = (64, 128, 256, 512, 512)
    smallest = 16  # pixels: one is left after four poolings

    def __init__(self, *, rngs: nnx.Rngs):
        stages, before = [], 3
        for width, depth in zip(self.widths, (2, 2, 3, 3, 3), strict=True):
            convs = []
            for _ in range(depth):
                convs.append(_conv(before, width, 3, rngs=rngs))
                before = width
            stages.append(nnx.List(convs))
        self.stages = nnx.List(stages)

    def convs(self) -> dict[int, nnx.Conv]:
        """The convolutions by their number in torchvision's `features`."""
        numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
        return dict(zip(numbers, [conv for stage in self.stages for conv in stage], strict=True))

    def __call__(self, image_BHW3: jax.Array) -> tuple[jax.Array, ...]:
        x, maps = normalised(image_BHW3, self.smallest), []
        for number, stage in enumerate(self.stages):
            if number > 0:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            for conv in stage:
                x = jax.nn.relu(conv(x))
            maps.append(x)
        return tuple(maps)


class AlexNet(nnx.Module):
    """image_BHW3 in [-1, 1] -> five maps: after each of the five ReLUs.

    The one-column form of arXiv:1404.5997, without its last pooling and its classifier. The
    maps have 64, 192, 384, 256 and 256 channels; the first is at about 1/4 of the image's size,
    the second at 1/8, the others at 1/16.
    """

    widths = (64, 192, 384, 256, 256)
    smallest = 31  # pixels: 31 -> 7 by the first stride, 7 -> 3 -> 1 by two poolings

    def __init__(self, *, rngs: nnx.Rngs):
        befores, kernels = (3, *self.widths), (11, 5, 3, 3, 3)
        self.stages = nnx.List(
            _conv(before, width, size, stride=4 if size == 11 else 1, rngs=rngs)
            for before, width, size in zip(befores[:-1], self.widths, kernels, strict=True)
        )

    def convs(self) -> dict[int, nnx.Conv]:
        """The convolutions by their number in torchvision's `features`."""
        return dict(zip((0, 3, 6, 8, 10), self.stages, strict=True))

    def __call__(self, image_BHW3: jax.Array) -> tuple[jax.Array, ...]:
        x, maps = normalised(image_BHW3, self.smallest), []
        for number, conv in enumerate(self.stages):
            if number in (1, 2):
                x = nnx.max_pool(x, (3, 3), strides=(2, 2))
            x = jax.nn.relu(conv(x))
            maps.append(x)
        return tuple(maps)


def _conv(before: int, after: int, size: int, *, stride: int = 1, rngs: nnx.Rngs) -> nnx.Conv:
    padding = 2 if size == 11 else size // 2  # the 11x11 kernel is padded by two, not by five
    return nnx.Conv(
        before,
        after,
        (size, size),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        rngs=rngs,
    )


def normalised(image_BHW3: jax.Array, smallest: int) -> jax.Array:
    """image [B, H, W, 1 or 3] in [-1, 1] -> [B, H, W, 3] as ImageNet's networks were trained."""
    shape = image_BHW3.shape
    if len(shape) != 4 or shape[3] not in (1, 3) or min(shape[1:3]) < smallest:
        raise interfaces.UserError(
            f"this feature network needs images [B, H, W, 1 or 3] of at least {smallest} x "
            f"{smallest} pixels, found {shape}: train on larger images, or without this loss"
        )
    mean_3 = jnp.asarray(MEAN_3).reshape(1, 1, 1, 3)
    deviation_3 = jnp.asarray(DEVIATION_3).reshape(1, 1, 1, 3)
    # float32: distances between near images are differences of large, nearly equal features.
    return (image_BHW3.astype(jnp.float32) - mean_3) / deviation_3
