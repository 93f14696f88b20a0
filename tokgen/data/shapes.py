"""Procedural coloured shapes: ten classes, drawn from (seed, split, index), no files.

Every image is one shape on a background. A shape is a signed distance d in pixels (negative
inside) on coordinates rotated about its centre, its coverage is clip(1/2 - d, 0, 1), and the pixel
is the mixture of two colours by that coverage: anti-aliased without supersampling. How free the
place, size, angle and colours are is a `Freedom`; the three at the top are the forms one can ask
for by name.

All random numbers are a hash of (seed, split, index, which), so an image does not depend on its
batch, and any number of them is drawn at once.
"""

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Sequence

import numpy as np

from tokgen import interfaces, ranges
from tokgen.data import sources

# Ten that stay apart at 32 pixels and under any rotation. No star and no plus: generators of this
# size break them into fragments. No rhombus, hexagon or ellipse: these turn into a square or disc.
CLASSES = (
    "disc",
    "ring",
    "square",
    "frame",
    "triangle",
    "bar",
    "crescent",
    "pair",
    "corner",
    "equals",
)
SPLITS = ("train", "held_out")

# Eight colours, every two of them at least CONTRAST apart.
PALETTE = (
    (0.90, 0.13, 0.13),  # red
    (0.12, 0.66, 0.22),  # green
    (0.14, 0.22, 0.88),  # blue
    (0.96, 0.86, 0.16),  # yellow
    (0.80, 0.18, 0.80),  # magenta
    (0.20, 0.82, 0.88),  # cyan
    (0.96, 0.96, 0.96),  # white
    (0.06, 0.06, 0.06),  # black
)
CONTRAST = 0.55  # Euclidean distance of two colours in [0, 1]^3


@dataclasses.dataclass(frozen=True)
class Freedom:
    """How free a shape is. Lengths are pixels of an image whose shorter side is 32.

    Args:
      radius: of the circle around the shape, from and to.
      rotation: degrees, either way.
      colours: what foreground and background are picked from; empty for any colours.
      jitter: of each channel of a picked colour, either way.
      gradient: how far the background moves from one side to the other, as a share of the way to
        a second random colour; 0 is a flat background.
    """

    radius: tuple[float, float]
    rotation: float
    colours: tuple[tuple[float, float, float], ...] = PALETTE
    jitter: float = 0.02
    gradient: float = 0.0


EASY = Freedom(radius=(10.5, 13.5), rotation=17.0)
PALETTED = Freedom(radius=(8.0, 13.0), rotation=180.0)
HARD = Freedom(radius=(8.0, 13.0), rotation=180.0, colours=(), jitter=0.0, gradient=1.0)
FORMS = {"easy": EASY, "palette": PALETTED, "hard": HARD}

_VERSION = 1  # of the pictures: part of the fingerprint, so that old token shards are refused
_CHUNK = 256  # images drawn at a time: they stay in the cache
_MARGIN = 1.5  # pixels to the edge: the soft tip of a triangle reaches one pixel beyond its corner
_CANDIDATES = 8  # foregrounds tried before the farthest corner of the colour cube is taken
_CORNERS = np.array([[r, g, b] for r in (0, 1) for g in (0, 1) for b in (0, 1)], np.float32)

# Which random number serves what.
_RADIUS, _ANGLE, _ROW, _COLUMN, _FRONT, _BACK, _SLOPE = range(7)
_JITTER, _NEAR, _FAR, _TRIED = 8, 16, 20, 24
_NUMBERS = _TRIED + 3 * _CANDIDATES


class Source(sources.RandomAccess):
    """Random access to drawn shapes: `{"image": uint8 [rows, columns, channels], "label": int}`.

    The label of image i is i % 10. The splits share nothing but the kind of picture.

    Args:
      form: `easy`, `palette` or `hard`; or a Freedom of one's own.
    """

    holds = "pixels"
    classes = CLASSES

    def __init__(
        self,
        size: Sequence[int] = (32, 32),
        channels: int = 3,
        *,
        split: str = "train",
        seed: ranges.Seed = 0,
        count: ranges.Count = 20_000,
        form: str | Freedom = "easy",
    ):
        self.size = tuple(int(side) for side in size)
        if len(self.size) != 2 or min(self.size) < 8:
            raise interfaces.UserError(
                f"shapes need a size (rows, columns) of at least 8 pixels; found {self.size}"
            )
        if channels not in (1, 3):
            raise interfaces.UserError(f"images have 1 or 3 channels; found channels={channels}")
        if split not in SPLITS:
            raise interfaces.UserError(f"split must be one of {', '.join(SPLITS)}; found {split!r}")
        if count < 1:
            raise interfaces.UserError(f"count must be at least 1; found {count}")
        if isinstance(form, str) and form not in FORMS:
            raise interfaces.UserError(f"form must be one of {', '.join(FORMS)}; found {form!r}")
        self.channels, self.split, self.seed, self.count = channels, split, int(seed), int(count)
        self.freedom = form if isinstance(form, Freedom) else FORMS[form]
        what = (_VERSION, self.size, channels, split, self.seed, self.count, self.freedom)
        self.fingerprint = hashlib.sha256(repr(what).encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Many records at the price of few."""
        # An index beyond the end must raise, as iteration and grain expect of a sequence.
        indices = [range(self.count)[operator.index(index)] for index in indices]
        return [
            {"image": image_HWC, "label": index % len(CLASSES)}
            for index, image_HWC in zip(indices, self.batch(indices), strict=True)
        ]

    def name(self, index: int) -> str:
        """Split, number and class."""
        return f"shapes/{self.split}/{index}-{CLASSES[index % len(CLASSES)]}"

    def batch(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [n, rows, columns, channels]"""
        index_B = np.asarray(indices, np.int64)
        image_BHWC = np.empty((len(index_B), *self.size, self.channels), np.uint8)
        for start in range(0, len(index_B), _CHUNK):
            part = slice(start, start + _CHUNK)
            image_BHWC[part] = self._draw(index_B[part])
        return image_BHWC

    def _draw(self, index_B: np.ndarray) -> np.ndarray:
        uniform_BU = _uniform(self.seed, SPLITS.index(self.split), index_B)
        alpha_BHW1 = _coverage(uniform_BU, index_B % len(CLASSES), self.size, self.freedom)
        colours = _colours if self.channels == 3 else _grays
        front_BC, near_BC, far_BC = colours(uniform_BU, self.freedom)
        back_BHWC = near_BC[:, None, None]
        if self.freedom.gradient:
            ramp_BHW1 = _ramp(uniform_BU[:, _SLOPE], self.size)
            back_BHWC = back_BHWC + ramp_BHW1 * (far_BC - near_BC)[:, None, None]
        image_BHWC = back_BHWC + alpha_BHW1 * (front_BC[:, None, None] - back_BHWC)
        return np.rint(np.clip(image_BHWC, 0, 1) * 255).astype(np.uint8)


def _uniform(seed: int, split: int, index_B: np.ndarray) -> np.ndarray:
    """float32 [B, _NUMBERS] in [0, 1): the finaliser of splitmix64 over a counter."""
    start = hashlib.sha256(f"tokgen shapes {seed} {split}".encode()).digest()[:8]
    counter_BU = index_B.astype(np.uint64)[:, None] * np.uint64(_NUMBERS) + np.arange(
        _NUMBERS, dtype=np.uint64
    )
    x = np.frombuffer(start, "<u8")[0] + (counter_BU + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _coverage(
    uniform_BU: np.ndarray, label_B: np.ndarray, size: tuple[int, int], freedom: Freedom
) -> np.ndarray:
    """float32 [B, H, W, 1]: the share of each pixel that the shape covers."""
    rows, columns = size
    scale = min(size) / 32
    low, high = freedom.radius
    radius_B = scale * (low + (high - low) * uniform_BU[:, _RADIUS])
    radius_B = np.minimum(radius_B, min(size) / 2 - _MARGIN)  # bites below 32 pixels only
    angle_B = np.deg2rad(freedom.rotation) * (2 * uniform_BU[:, _ANGLE] - 1)
    row_B = _inside(uniform_BU[:, _ROW], radius_B + _MARGIN, rows)
    column_B = _inside(uniform_BU[:, _COLUMN], radius_B + _MARGIN, columns)
    cosine_B, sine_B = np.cos(angle_B), np.sin(angle_B)
    alpha_BHW1 = np.empty((len(label_B), rows, columns, 1), np.float32)
    down_H1 = np.arange(rows, dtype=np.float32)[:, None] + np.float32(0.5)
    right_W = np.arange(columns, dtype=np.float32) + np.float32(0.5)
    for label in np.unique(label_B):
        (which_N,) = np.nonzero(label_B == label)
        one = (which_N, None, None)
        down_NH1 = down_H1 - row_B[one]
        right_NW = right_W - column_B[one]
        x = cosine_B[one] * right_NW + sine_B[one] * down_NH1
        y = cosine_B[one] * down_NH1 - sine_B[one] * right_NW
        distance = _DISTANCES[CLASSES[label]](x, y, radius_B[one])
        alpha_BHW1[which_N, :, :, 0] = np.clip(np.float32(0.5) - distance, 0, 1)
    return alpha_BHW1


def _inside(uniform_B: np.ndarray, margin_B: np.ndarray, side: int) -> np.ndarray:
    """A coordinate at least `margin` from both ends; the middle where there is no such place."""
    free_B = np.maximum(side - 2 * margin_B, 0)
    return side / 2 + (uniform_B - np.float32(0.5)) * free_B


def _colours(uniform_BU, freedom: Freedom) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [B, 3] each: the foreground, and the background at its two ends."""
    if freedom.colours:
        colours = np.array(freedom.colours, np.float32)
        front_B = (uniform_BU[:, _FRONT] * len(colours)).astype(np.int64)
        other_B = (uniform_BU[:, _BACK] * (len(colours) - 1)).astype(np.int64)
        back_B = (front_B + 1 + other_B) % len(colours)  # never the same
        jitter_BJ = freedom.jitter * (2 * uniform_BU[:, _JITTER : _JITTER + 6] - 1)
        front_B3 = colours[front_B] + jitter_BJ[:, :3]
        near_B3 = colours[back_B] + jitter_BJ[:, 3:]
        return front_B3, near_B3, near_B3
    near_B3 = uniform_BU[:, _NEAR : _NEAR + 3]
    far_B3 = near_B3 + freedom.gradient * (uniform_BU[:, _FAR : _FAR + 3] - near_B3)
    return _contrasting(uniform_BU, near_B3, far_B3), near_B3, far_B3


def _contrasting(uniform_BU: np.ndarray, near_B3: np.ndarray, far_B3: np.ndarray) -> np.ndarray:
    """The first candidate at least CONTRAST from the whole gradient, else the farthest corner.

    From the ends alone would not do: gray is far from black and white, and vanishes between them.
    """
    tried_BN3 = uniform_BU[:, _TRIED:_NUMBERS].reshape(-1, _CANDIDATES, 3)
    corners_BN3 = np.broadcast_to(_CORNERS, (len(tried_BN3), *_CORNERS.shape))
    choice_BN3 = np.concatenate([tried_BN3, corners_BN3], axis=1)
    distance_BN = _segment_distance(choice_BN3, near_B3[:, None], far_B3[:, None])
    good_BN = distance_BN >= CONTRAST
    corner_B = _CANDIDATES + np.argmax(distance_BN[:, _CANDIDATES:], axis=1)
    tried_BN = good_BN[:, :_CANDIDATES]
    chosen_B = np.where(tried_BN.any(axis=1), np.argmax(tried_BN, axis=1), corner_B)
    return np.take_along_axis(choice_BN3, chosen_B[:, None, None], axis=1)[:, 0]


def _segment_distance(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    along = end - start
    length = np.maximum(np.sum(along * along, axis=-1, keepdims=True), 1e-12)
    share = np.clip(np.sum((point - start) * along, axis=-1, keepdims=True) / length, 0, 1)
    return np.sqrt(np.sum((point - start - share * along) ** 2, axis=-1))


def _grays(uniform_BU, freedom: Freedom) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As _colours with one channel: one side of the contrast is dark, the other light."""
    front_B1, near_B1, far_B1 = (
        np.float32(0.25) * uniform_BU[:, [which]] for which in (_FRONT, _NEAR, _FAR)
    )
    front_B1 = np.float32(0.75) + front_B1
    far_B1 = near_B1 + freedom.gradient * (far_B1 - near_B1)
    light_B1 = uniform_BU[:, [_BACK]] < 0.5
    return tuple(np.where(light_B1, 1 - gray, gray) for gray in (front_B1, near_B1, far_B1))


def _ramp(uniform_B, size: tuple[int, int]) -> np.ndarray:
    """float32 [B, H, W, 1]: from 0 to 1 across the image, in a direction of its own."""
    rows, columns = size
    angle_B11 = (2 * np.pi * uniform_B).astype(np.float32)[:, None, None]
    down, right = np.sin(angle_B11), np.cos(angle_B11)
    y_H1 = ((np.arange(rows, dtype=np.float32) + np.float32(0.5)) / rows - np.float32(0.5))[:, None]
    x_W = (np.arange(columns, dtype=np.float32) + np.float32(0.5)) / columns - np.float32(0.5)
    reach = np.abs(down) + np.abs(right)  # of the corners: the ramp ends there
    return (np.float32(0.5) + (down * y_H1 + right * x_W) / reach)[..., None]


def _disc(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - r


def _ring(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r


def _box(x: np.ndarray, y: np.ndarray, half_x: np.ndarray, half_y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)


def _square(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return _box(x, y, 0.7 * r, 0.7 * r)


def _frame(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(_square(x, y, r), -_box(x, y, 0.36 * r, 0.36 * r))


def _triangle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Equilateral, its corners on the circle of radius r: three half-planes at r / 2."""
    return np.maximum(y, np.abs(x) * np.float32(0.75**0.5) - 0.5 * y) - 0.5 * r


def _bar(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return _box(x, y, 0.95 * r, 0.28 * r)


def _crescent(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - r, 0.8 * r - np.hypot(x - 0.5 * r, y))


def _pair(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.hypot(np.abs(x) - 0.56 * r, y) - 0.43 * r


def _corner(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """A thick L: the square less its upper right part."""
    return np.maximum(_square(x, y, r), np.minimum(0.18 * r - y, 0.18 * r + x))


def _equals(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return _box(x, np.abs(y) - 0.46 * r, 0.74 * r, 0.2 * r)


_DISTANCES: dict[str, Callable] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "frame": _frame,
    "triangle": _triangle,
    "bar": _bar,
    "crescent": _crescent,
    "pair": _pair,
    "corner": _corner,
    "equals": _equals,
}
