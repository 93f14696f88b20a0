"""Views: what a model gets to see of an image, an array of a stated size.

Everything here is PIL, because the resize filter is a part of every published figure. The centre
and random crops are those of guided diffusion (ADM, arXiv:2105.05233): halve with a box filter
while that is possible, then one bicubic step, then cut. ADM knows squares; here the size is any
(rows, columns), and a square gives ADM's pixels exactly.
"""

import dataclasses
import math
from typing import Annotated

import numpy as np
from PIL import Image

from tokgen import interfaces, ranges
from tokgen.data import pixels

# Where a crop of the ten begins, as shares of the room above and to the left of it.
CORNERS = {
    "top_left": (0.0, 0.0),
    "top_right": (0.0, 1.0),
    "bottom_left": (1.0, 0.0),
    "bottom_right": (1.0, 1.0),
    "middle": (0.5, 0.5),
}
# In the order of torchvision's TenCrop: five of the image, then five of its mirror image.
TEN = (*CORNERS, *(f"mirrored_{name}" for name in CORNERS))
CROPS = ("center", "flip", "random", *TEN)
RESIZES = ("adm", "bicubic", "bilinear", "box")
STORED = ("center", "flip", *TEN)  # what pretokenizing stores: a function of the image alone
TEN_ZOOM = 1.1  # LlamaGen and RAR cut their ten crops from int(1.1 size)

# A strip is cut to this many times its view before it is resized; otherwise a 1 x 10,000 image
# would become 256 x 2,560,000 on its way to 256 x 256.
_LONGEST = 16
# a batch of such images is refused by its bytes, long before any exists
Pixels = Annotated[int, ranges.Range(1, 2**14)]
# uint8 [H, W, channels], or an image of PIL's in mode "RGB" or "L": what views are of
Picture = np.ndarray | Image.Image


@dataclasses.dataclass(frozen=True)
class View:
    """What the model gets to see of an image: a function of the image and a generator.

    An image that has exactly the right size is not touched, except by `flip` and the ten crops.

    Args:
      size: (rows, columns).
      crop: `center`, the largest part of the right shape; `flip`, the same mirrored; `random`, the
        random crop of ADM; one of TEN, a corner or the middle of the centre at int(zoom size), of
        the image or of its mirror image.
      zoom: for the random crop: the shorter side is resized to a whole number between its size and
        `zoom` times its size, before the cut.
      flip: mirror every second image, at random.
      resize: `adm`, as above; or a filter, `bicubic`, `bilinear` or `box`, for training: the part
        that is seen is resized alone, in one step by this filter (by `bicubic` where it becomes
        larger). Less work, other pixels: figures, and tokens that are stored, are of `adm`.
      decoder: `pil`, or `simplejpeg` (extra `fastdata`): the same pixels of JPEGs, sooner.
    """

    size: tuple[Pixels, Pixels]
    channels: int = 3
    crop: str = "center"
    zoom: float = 1.25
    flip: bool = False
    resize: str = "adm"
    decoder: str = "pil"

    def __post_init__(self):
        if self.resize not in RESIZES:
            raise interfaces.UserError(
                f"resize must be one of {', '.join(RESIZES)}; found {self.resize!r}"
            )
        if self.decoder not in pixels.DECODERS:
            raise interfaces.UserError(
                f"decoder must be one of {', '.join(pixels.DECODERS)}; found {self.decoder!r}"
            )
        if self.decoder == "simplejpeg":
            import simplejpeg  # noqa: F401  (said here when it is missing, not in a thread)
        size = tuple(int(side) for side in self.size)
        object.__setattr__(self, "size", size)  # a list, as configs hold it, would not hash
        if len(size) != 2 or min(size) < 1:
            raise interfaces.UserError(
                f"an image size is (rows, columns), both at least 1; found {self.size}"
            )
        pixels.check_channels(self.channels)
        if self.crop not in CROPS:
            raise interfaces.UserError(
                f"crop must be one of {', '.join(CROPS)}; found {self.crop!r}"
            )
        if not 1.0 <= self.zoom <= 8.0:
            raise interfaces.UserError(f"zoom must lie between 1 and 8; found {self.zoom}")

    def __call__(self, image: Picture, rng: np.random.Generator) -> np.ndarray:
        """uint8 [rows, columns, channels]; `rng` is drawn from by a random crop and by `flip`."""
        if self.crop in TEN:
            image_HWC = _one_of_ten(image, self.size, self.zoom, self.crop, self.resize)
        elif self.crop == "random" and _sides(image) != self.size:
            image_HWC = _random_crop(image, self.size, self.zoom, self.resize, rng)
        else:
            image_HWC = centre(image, self.size, self.resize)
        mirrored = self.crop == "flip"
        if self.flip and rng.random() < 0.5:
            mirrored = not mirrored
        return image_HWC[:, ::-1] if mirrored else image_HWC


@dataclasses.dataclass(frozen=True)
class Every:
    """Several fixed views of an image at once: uint8 [views, rows, columns, channels].

    What views are cut from is resized once for all of them.
    """

    views: tuple[View, ...]
    crop, flip = "center", False  # nothing is random

    @property
    def channels(self) -> int:
        return self.views[0].channels

    @property
    def decoder(self) -> str:
        return self.views[0].decoder

    def __call__(self, image: Picture, rng: np.random.Generator | None) -> np.ndarray:
        resized, seen = {}, []
        for view in self.views:
            size = _wider(view.size, view.zoom) if view.crop in TEN else view.size
            if size not in resized:
                resized[size] = centre(image, size)
            seen.append(view(resized[size], rng))  # which finds the right size already
        return np.stack(seen)


def fixed(name: str, size: tuple[int, int], channels: int = 3) -> View:
    """The view that pretokenizing stores under a name, one of STORED."""
    if name not in STORED:
        raise interfaces.UserError(
            f"the views that can be stored are {', '.join(STORED)}; found {name!r}"
        )
    return View(size, channels, crop=name, zoom=TEN_ZOOM)


def stored(text: str) -> tuple[str, ...]:
    """Names of stored views from `center,flip`; `ten` stands for the ten crops."""
    listed = text.split(",")
    names = [name for part in listed for name in (TEN if part == "ten" else (part,))]
    if not set(names) <= set(STORED) or len(set(names)) != len(names):
        raise interfaces.UserError(
            f"views must be different ones of {', '.join(STORED)}, or ten for the last ten; "
            f"found {text!r}"
        )
    return tuple(names)


def centre(image: Picture, size: tuple[int, int], resize: str = "adm") -> np.ndarray:
    """The largest centred part with the shape of `size`, resized to it: ADM's evaluation crop."""
    if _sides(image) == size:
        return image if isinstance(image, np.ndarray) else pixels.array(image)
    image, target = _covering(image, size, resize)
    top, left = (target[0] - size[0]) // 2, (target[1] - size[1]) // 2
    return _cut(image, target, (top, left), size, resize)


def _random_crop(
    image: Picture, size: tuple[int, int], zoom: float, resize: str, rng: np.random.Generator
) -> np.ndarray:
    shorter = min(size)
    drawn = int(rng.integers(shorter, math.ceil(zoom * shorter) + 1))
    image, target = _covering(image, tuple(side * drawn / shorter for side in size), resize)
    top = int(rng.integers(target[0] - size[0] + 1))
    left = int(rng.integers(target[1] - size[1] + 1))
    return _cut(image, target, (top, left), size, resize)


def _one_of_ten(
    image: Picture, size: tuple[int, int], zoom: float, crop: str, resize: str
) -> np.ndarray:
    # mirrored before the cut: where the room is odd, the middle is not its own mirror image
    rows, columns = size
    image_HWC = centre(image, _wider(size, zoom), resize)
    if crop.startswith("mirrored_"):
        image_HWC = image_HWC[:, ::-1]
    down, right = CORNERS[crop.removeprefix("mirrored_")]
    top = round(down * (image_HWC.shape[0] - rows))
    left = round(right * (image_HWC.shape[1] - columns))
    return image_HWC[top : top + rows, left : left + columns]


def _wider(size: tuple[int, int], zoom: float) -> tuple[int, int]:
    return int(size[0] * zoom), int(size[1] * zoom)


def _sides(image: Picture) -> tuple[int, int]:
    """(rows, columns)"""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def _covering(
    image: Picture, size: tuple[float, float], resize: str
) -> tuple[Image.Image, tuple[int, int]]:
    """(the image, the size of a resized one in which `size` fits just inside).

    ADM's is halved by box before.
    """
    rows, columns = size
    image = _shorten(_pil(image), size)
    while resize == "adm" and image.height >= 2 * rows and image.width >= 2 * columns:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(rows / image.height, columns / image.width)
    # The rounding of one side must never leave it a pixel short of the cut.
    return image, (
        max(round(image.height * scale), math.floor(rows)),
        max(round(image.width * scale), math.floor(columns)),
    )


def _cut(
    image: Image.Image,
    target: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
    resize: str,
) -> np.ndarray:
    """A part of the image as it is when the whole is resized to `target`."""
    (high, wide), (top, left), (rows, columns) = target, corner, size
    if resize == "adm":
        # The whole, and then the cut: which of its two passes PIL makes first depends on its
        # version and the sizes, so that a cut between them would not be bit for bit the same.
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        return pixels.array(image.crop((left, top, left + columns, top + rows)))
    down, right = image.height / high, image.width / wide
    filter_ = Image.Resampling[resize.upper() if min(down, right) >= 1 else "BICUBIC"]
    # rounding must not leave the image
    bottom = min((top + rows) * down, image.height)
    box = (left * right, top * down, min((left + columns) * right, image.width), bottom)
    return pixels.array(image.resize((columns, rows), filter_, box))


def _pil(image: Picture) -> Image.Image:
    if not isinstance(image, np.ndarray):
        return image
    return Image.fromarray(image if image.shape[2] == 3 else image[..., 0])


def _shorten(image: Image.Image, size: tuple[float, float]) -> Image.Image:
    """Cut the ends off a strip more than _LONGEST times as long as the view's shape asks for."""
    rows, columns = size
    high = min(image.height, max(1, round(_LONGEST * image.width * rows / columns)))
    wide = min(image.width, max(1, round(_LONGEST * image.height * columns / rows)))
    if (high, wide) == (image.height, image.width):
        return image
    top, left = (image.height - high) // 2, (image.width - wide) // 2
    return image.crop((left, top, left + wide, top + high))
