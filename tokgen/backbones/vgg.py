"""VGG16 (arXiv:1409.1556), frozen: the feature maps that LPIPS compares."""

from __future__ import annotations

import jax
from flax import nnx

from tokgen.backbones import imagenet, weights


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
                convs.append(imagenet.conv(before, width, 3, padding=1, rngs=rngs))
                before = width
            stages.append(nnx.List(convs))
        self.stages = nnx.List(stages)

    def convs(self) -> dict[int, nnx.Conv]:
        """The convolutions by their number in torchvision's `features`."""
        numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
        return dict(zip(numbers, [conv for stage in self.stages for conv in stage], strict=True))

    def slots(self) -> dict[str, weights.Slot]:
        """Torchvision's names."""
        slots = {}
        for number, conv in self.convs().items():
            slots |= weights.affine(f"features.{number}", conv)
        return slots

    def __call__(self, image_BHW3: jax.Array) -> tuple[jax.Array, ...]:
        x, maps = imagenet.normalised(image_BHW3, self.smallest), []
        for number, stage in enumerate(self.stages):
            if number > 0:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            for conv in stage:
                x = jax.nn.relu(conv(x))
            maps.append(x)
        return tuple(maps)
