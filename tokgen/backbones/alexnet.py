"""AlexNet (arXiv:1404.5997), frozen: the feature maps that LPIPS compares."""

from __future__ import annotations

import jax
from flax import nnx

from tokgen.backbones import imagenet, weights


class AlexNet(nnx.Module):
    """image_BHW3 in [-1, 1] -> five maps: after each of the five ReLUs.

    The one-column form of arXiv:1404.5997, without its last pooling and its classifier. The
    maps have 64, 192, 384, 256 and 256 channels; the first is at about 1/4 of the image's size,
    the second at 1/8, the others at 1/16.
    """

    widths = (64, 192, 384, 256, 256)
    smallest = 31  # pixels: 31 -> 7 by the first stride, 7 -> 3 -> 1 by two poolings

    def __init__(self, *, rngs: nnx.Rngs):
        befores = (3, *self.widths)
        kernels = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
        self.stages = nnx.List(
            imagenet.conv(before, width, size, stride=stride, padding=padding, rngs=rngs)
            for before, width, (size, stride, padding) in zip(
                befores[:-1], self.widths, kernels, strict=True
            )
        )

    def convs(self) -> dict[int, nnx.Conv]:
        """The convolutions by their number in torchvision's `features`."""
        return dict(zip((0, 3, 6, 8, 10), self.stages, strict=True))

    def slots(self) -> dict[str, weights.Slot]:
        """Torchvision's names."""
        slots = {}
        for number, conv in self.convs().items():
            slots |= weights.affine(f"features.{number}", conv)
        return slots

    def __call__(self, image_BHW3: jax.Array) -> tuple[jax.Array, ...]:
        x, maps = imagenet.normalised(image_BHW3, self.smallest), []
        for number, conv in enumerate(self.stages):
            if number in (1, 2):
                x = nnx.max_pool(x, (3, 3), strides=(2, 2))
            x = jax.nn.relu(conv(x))
            maps.append(x)
        return tuple(maps)
