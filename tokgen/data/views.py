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
STORED = ("center", "flip", *TEN)  # what pretokenizing stores: a function of the image alone
TEN_ZOOM = 1.1  # LlamaGen and RAR cut their ten crops from int(1.1 size)

# A strip is cut to this many times its view before it is resized; otherwise a 1 x 10,000 image
# would become 256 x 2,560,000 on its way to 256 x 256.
_LONGEST = 16
# a batch of such images is refused by its bytes, long before any exists
Pixels = Annotated[int, ranges.Range(1, 2**14)]


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
      decoder: `pil`, or `simplejpeg` (extra `fastdata`): the same pixels of JPEGs, sooner.
    """

    size: tuple[Pixels, Pixels]
    channels: int = 3
    crop: str = "center"
    zoom: float = 1.25
    flip: bool = False
    decoder: str = "pil"

    def __post_init__(self):
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

    def __call__(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [rows, columns, channels]; `rng` is drawn from by a random crop and by `flip`."""
        if self.crop in TEN:
            image_HWC = _one_of_ten(image_HWC, self.size, self.zoom, self.crop)
        elif image_HWC.shape[:2] != self.size:
            image_HWC = (
                _random_crop(image_HWC, self.size, self.zoom, rng)
                if self.crop == "random"
                else centre(image_HWC, self.size)
            )
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

    def __call__(self, image_HWC: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        resized, seen = {}, []
        for view in self.views:
            size = _wider(view.size, view.zoom) if view.crop in TEN else view.size
            if size not in resized:
                resized[size] = centre(image_HWC, size)
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


def centre(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest centred part with the shape of `size`, resized to it: ADM's evaluation crop."""
    rows, columns = size
    if image_HWC.shape[:2] == (rows, columns):
        return image_HWC
    image_HWC = _cover(image_HWC, (rows, columns))
    top = (image_HWC.shape[0] - rows) // 2
    left = (image_HWC.shape[1] - columns) // 2
    return image_HWC[top : top + rows, left : left + columns]


def _random_crop(
    image_HWC: np.ndarray, size: tuple[int, int], zoom: float, rng: np.random.Generator
) -> np.ndarray:
    shorter = min(size)
    drawn = int(rng.integers(shorter, math.ceil(zoom * shorter) + 1))
    image_HWC = _cover(image_HWC, tuple(side * drawn / shorter for side in size))
    rows, columns = size
    top = int(rng.integers(image_HWC.shape[0] - rows + 1))
    left = int(rng.integers(image_HWC.shape[1] - columns + 1))
    return image_HWC[top : top + rows, left : left + columns]


def _one_of_ten(image_HWC: np.ndarray, size: tuple[int, int], zoom: float, crop: str) -> np.ndarray:
    # mirrored before the cut: where the room is odd, the middle is not its own mirror image
    rows, columns = size
    image_HWC = centre(image_HWC, _wider(size, zoom))
    if crop.startswith("mirrored_"):
        image_HWC = image_HWC[:, ::-1]
    down, right = CORNERS[crop.removeprefix("mirrored_")]
    top = round(down * (image_HWC.shape[0] - rows))
    left = round(right * (image_HWC.shape[1] - columns))
    return image_HWC[top : top + rows, left : left + columns]


def _wider(size: tuple[int, int], zoom: float) -> tuple[int, int]:
    return int(size[0] * zoom), int(size[1] * zoom)


def _cover(image_HWC: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """Resize so that `size` fits just inside: halvings by box, then one bicubic step."""
    image_HWC = _shorten(image_HWC, size)
    rows, columns = size
    channels = image_HWC.shape[2]
    image = Image.fromarray(image_HWC if channels == 3 else image_HWC[..., 0])
    while image.height >= 2 * rows and image.width >= 2 * columns:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(rows / image.height, columns / image.width)
    # The rounding of one side must never leave it a pixel short of the cut.
    target = (
        max(round(image.width * scale), math.floor(columns)),
        max(round(image.height * scale), math.floor(rows)),
    )
    image = image.resize(target, Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _shorten(image_HWC: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """Cut the ends off a strip more than _LONGEST times as long as the view's shape asks for."""
    height, width = image_HWC.shape[:2]
    rows, columns = size
    high = min(height, max(1, round(_LONGEST * width * rows / columns)))
    wide = min(width, max(1, round(_LONGEST * height * columns / rows)))
    top, left = (height - high) // 2, (width - wide) // 2
    return image_HWC[top : top + high, left : left + wide]
