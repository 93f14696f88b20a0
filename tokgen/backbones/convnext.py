"""ConvNeXt-S (arXiv:2201.03545), a frozen classifier whose logits tell images apart.

It has the structure of torchvision's, whose published weights fill it (`slots`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tokgen.backbones import imagenet, perceptual, weights


def _norm(width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class ConvNeXtBlock(nnx.Module):
    """[B, H, W, C] -> [B, H, W, C]: 7x7 per channel, norm, two linear maps; arXiv:2201.03545."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = imagenet.conv(width, width, 7, padding=3, feature_group_count=width, rngs=rngs)
        self.norm = _norm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.scale = nnx.Param(jnp.full((width,), 1e-6))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = self.up(self.norm(self.conv(x_BHWC)))
        y = self.down(jax.nn.gelu(y, approximate=False))
        return x_BHWC + self.scale[...].reshape(1, 1, 1, -1) * y

    def slots(self, key: str) -> dict[str, weights.Slot]:
        """Torchvision's names below `key`."""
        slots = weights.affine(f"{key}.block.0", self.conv)
        slots |= weights.affine(f"{key}.block.2", self.norm, "scale")
        slots |= weights.affine(f"{key}.block.3", self.up)
        slots |= weights.affine(f"{key}.block.5", self.down)
        scale = weights.Slot(self, "scale", (*self.scale.shape, 1, 1))
        return slots | {f"{key}.layer_scale": scale}


class ConvNeXtSmall(nnx.Module):
    """image_BHW3 in [-1, 1] -> logits [B, 1000]; 50,223,688 parameters."""

    unused = ()

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 27, 3),
        width: int = 96,
        classes: int = 1000,
        *,
        rngs: nnx.Rngs,
    ):
        convs, norms, stages, before = [], [], [], 3
        for number, depth in enumerate(depths):
            after, size = width * 2**number, 4 if number == 0 else 2
            convs.append(imagenet.conv(before, after, size, stride=size, rngs=rngs))
            # the first norm follows its convolution, the others stand before theirs
            norms.append(_norm(after if number == 0 else before, rngs=rngs))
            stages.append(nnx.List(ConvNeXtBlock(after, rngs=rngs) for _ in range(depth)))
            before = after
        self.convs, self.norms, self.stages = nnx.List(convs), nnx.List(norms), nnx.List(stages)
        self.norm_out = _norm(before, rngs=rngs)
        self.last = nnx.Linear(before, classes, rngs=rngs)

    def __call__(self, image_BHW3: jax.Array) -> jax.Array:
        x = self.norms[0](self.convs[0](imagenet.normalised(image_BHW3, 32)))
        for number, stage in enumerate(self.stages):
            if number > 0:
                x = self.convs[number](self.norms[number](x))
            for block in stage:
                x = block(x)
        return self.last(self.norm_out(x.mean((1, 2))))

    def slots(self) -> dict[str, weights.Slot]:
        """Torchvision's names: even parts of `features` halve the map, odd ones are stages."""
        slots = {}
        for number, (conv, norm, stage) in enumerate(
            zip(self.convs, self.norms, self.stages, strict=True)
        ):
            conv_part, norm_part = (0, 1) if number == 0 else (1, 0)
            slots |= weights.affine(f"features.{2 * number}.{conv_part}", conv)
            slots |= weights.affine(f"features.{2 * number}.{norm_part}", norm, "scale")
            for index, block in enumerate(stage):
                slots |= block.slots(f"features.{2 * number + 1}.{index}")
        slots |= weights.affine("classifier.0", self.norm_out, "scale")
        return slots | weights.affine("classifier.2", self.last)


SOURCE = (
    "the perceptual loss convnext_small needs torchvision's "
    "ConvNeXt_Small_Weights.IMAGENET1K_V1 (convnext_small-0c510722.pth); "
    "config.loss.convnext_small=0 trains without it"
)
DISTANCES = {"convnext_small": perceptual.of_classifier(ConvNeXtSmall, "convnext_small", SOURCE)}
