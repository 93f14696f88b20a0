"""Pixels: from the bytes of an image file to an array, by PIL.

What the files become is listed in docs/data.md: alpha is laid over white, deeper samples are
brought to 8 bits by the range that their file states, EXIF orientation is applied, of an animation
the first frame counts, and colour profiles are ignored.
"""

import io
import struct
import warnings
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from tokgen import interfaces

# By format the endings of its files. Raster formats only: PIL would hand an EPS file to
# ghostscript, and a few others to plug-ins that nobody looks after.
ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
} | ({"AVIF": (".avif",)} if "avif" in features.get_supported() else {})
FORMATS = tuple(ENDINGS)
EXTENSIONS = tuple(ending for endings in ENDINGS.values() for ending in endings)
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)  # by these, columns become rows
# What PIL's decoders raise on damaged files, besides the OSError they promise.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
MAX_PIXELS = 64_000_000
# PIL warns of large images and odd metadata without saying of which file: the limit above is ours,
# and what does not decode is told by name.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenImage(ValueError):
    """Bytes that do not decode to pixels; the stream replaces and counts them."""


def decode(
    data: bytes, channels: int, *, max_pixels: int = MAX_PIXELS, decoder: str = "pil"
) -> np.ndarray:
    """uint8 [H, W, channels] of an image file, or BrokenImage.

    `max_pixels` is compared with the header, before anything is decoded.
    """
    return array(picture(data, channels, max_pixels=max_pixels, decoder=decoder))


def picture(
    data: bytes, channels: int, *, max_pixels: int = MAX_PIXELS, decoder: str = "pil"
) -> Image.Image:
    """What `decode` gives, as an image of PIL's: "RGB" or "L", and upright.

    For what is resized next: an array would be copied to and fro.
    """
    check_channels(channels)
    try:
        with _opened(io.BytesIO(data), max_pixels) as image:
            return _plain(_upright(DECODERS[decoder](image, data), image), channels)
    except BrokenImage:
        raise
    except _DAMAGE as error:
        raise BrokenImage(_why(error)) from error


def size(image: Image.Image) -> tuple[int, int]:
    """(rows, columns) of an opened file as `decode` gives it, upright."""
    columns, rows = image.size
    return (columns, rows) if _orientation(image) in _TURNED else (rows, columns)


def array(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, channels] of an image in mode "RGB" or "L"."""
    return np.array(image).reshape(image.height, image.width, -1)


def of_image(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 [H, W, channels] of a PIL image in memory, by the rules of files, or BrokenImage.

    16 bits have their full range: what a file states of them, PIL does not keep.
    """
    check_channels(channels)
    try:
        image.load()
        found = image
        if image.mode.startswith("I;16"):
            found = Image.fromarray(_eight_bits(np.asarray(image), 65535))
        elif image.mode == "I":
            raise BrokenImage("integers of 32 bits have no stated range")
        return array(_plain(_upright(found, image), channels))
    except BrokenImage:
        raise
    except _DAMAGE as error:
        raise BrokenImage(_why(error)) from error


def header(file: BinaryIO | bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[str, tuple[int, int]]:
    """(format, (rows, columns)) as the header says, or BrokenImage; nothing is decoded."""
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with _opened(file, max_pixels) as image:
            return image.format, (image.height, image.width)
    except BrokenImage:
        raise
    except _DAMAGE as error:
        raise BrokenImage(_why(error)) from error


def _opened(file: BinaryIO, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        file.seek(0)
        begin = file.read(12)
        if not begin:
            raise BrokenImage("the file is empty (0 bytes)") from error
        raise BrokenImage(
            f"no image of a format that is read, or cut off in its header: it begins with {begin!r}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenImage(
            f"more than the {max_pixels} pixels that are allowed ({error})"
        ) from error
    columns, rows = image.size
    if columns * rows > max_pixels:
        image.close()
        raise BrokenImage(f"{columns} x {rows} pixels, more than the {max_pixels} that are allowed")
    return image


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _with_pil(image: Image.Image, data: bytes) -> Image.Image:
    """What PIL makes of it, but for deep samples: of these it knows no range but their type's."""
    deep = {"PNG": _deep_png, "TIFF": _deep_tiff}.get(image.format)
    found = deep(image, data) if deep else None
    if found is not None:
        return found
    image.load()
    if image.mode.startswith("I"):  # of PPM and PGM, which PIL brings to 16 bits by their maximum
        return Image.fromarray(_eight_bits(np.asarray(image), 65535))
    return image


def _with_simplejpeg(image: Image.Image, data: bytes) -> Image.Image:
    """libjpeg-turbo without PIL's detours; whatever is no plain JPEG goes through PIL."""
    import simplejpeg

    spaces = {"RGB": "RGB", "L": "GRAY"}
    turned = _orientation(image) != 1
    if image.format != "JPEG" or image.mode not in spaces or turned:
        return _with_pil(image, data)
    pixels_HWC = simplejpeg.decode_jpeg(data, colorspace=spaces[image.mode])
    return Image.fromarray(pixels_HWC[..., 0] if image.mode == "L" else pixels_HWC)


def _upright(image: Image.Image, original: Image.Image) -> Image.Image:
    # after the pixels were read: in a PNG it may come last
    turn = _UPRIGHT.get(_orientation(original))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _DAMAGE:  # cameras write broken EXIF beside sound pixels
        return 1


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """A loaded image in any of PIL's modes, as "RGB" or "L"."""
    if image.mode == "F":
        raise BrokenImage("floating-point pixels have no stated range")
    # Dropping alpha would uncover whatever colour the file hides under it.
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def _deep_png(image: Image.Image, data: bytes) -> Image.Image | None:
    """A PNG of 16 bits a sample as 8; of fewer bits with a transparent gray, that as PIL's gray.

    None where PIL reads it right. `sBIT` states how many of the bits are significant. They belong
    at the upper end; but who writes 12 bits into 16 often leaves them at the lower.
    """
    depth, chunks = _png_header(data)
    gray = image.mode in ("L", "I;16")
    clear = image.info.get("transparency")
    if depth < 16:
        if depth in (2, 4) and image.mode == "L" and isinstance(clear, int):
            image.info["transparency"] = clear * 255 // (2**depth - 1)
        return None
    stated = chunks.get(b"sBIT", b"")
    if not stated and (gray or clear is None):
        bits = None
    else:
        bits = tuple(stated) or (16,)
    if gray:
        image.load()
        wide_HW = np.asarray(image)
        light_HW = _eight_bits(wide_HW, _range(wide_HW, bits[0] if bits else 16))
        if isinstance(clear, int):
            light_HW = np.where(wide_HW == clear, np.uint8(255), light_HW)
        return Image.fromarray(light_HW)
    if bits is None:
        return None  # the high bytes, at most 1 away from the value / 257
    args = image.tile[0].args
    raw = args if isinstance(args, str) else args[0]
    if raw == "LA;16B":  # PIL can be asked for the high bytes only
        image.load()
        high = int(np.asarray(image)[..., 0].max())
        if bits[0] < 16 and high < max(1, 2 ** (bits[0] - 8)):
            raise BrokenImage(f"{bits[0]} significant bits in 16, of gray with alpha, are not read")
        return None
    low = _low_bytes(image, data, raw)
    image.load()
    wide_HWC = np.asarray(image).astype(np.uint16) << 8 | low
    colour = _range(wide_HWC[..., :3], max(bits[:3]))
    planes = [_eight_bits(wide_HWC[..., :3], colour)]
    if wide_HWC.shape[2] == 4:
        alpha_HW1 = wide_HWC[..., 3:]
        planes.append(_eight_bits(alpha_HW1, _range(alpha_HW1, bits[3] if len(bits) > 3 else 16)))
    elif isinstance(clear, tuple):
        seen_HW = (wide_HWC != np.array(clear)).any(axis=2)
        planes.append(np.where(seen_HW, 255, 0).astype(np.uint8)[..., None])
    return Image.fromarray(np.concatenate(planes, axis=2))


def _low_bytes(image: Image.Image, data: bytes, raw: str) -> np.ndarray:
    """Of 16-bit colour, the bytes that PIL leaves out: it is asked for the other byte order."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as other:
        tile = other.tile[0]
        swapped = raw.replace("16B", "16L")
        args = swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:])
        other.tile = [tile._replace(args=args)]
        other.load()
        return np.asarray(other).astype(np.uint16)


def _png_header(data: bytes) -> tuple[int, dict[bytes, bytes]]:
    """(bits of a sample, the chunks before the pixels)."""
    depth, chunks, place = data[24], {}, 33
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        if kind == b"IDAT":
            break
        chunks[kind] = data[place + 8 : place + 8 + length]
        place += 12 + length
    return depth, chunks


def _range(wide: np.ndarray, bits: int) -> int:
    """The largest value that samples of so many significant bits in 16 may have.

    Values that never leave the lower bits lie there, unless they look like upper bits of a very
    dark image: with nothing below them. Of 12 bits or fewer such an image would be all but black.
    """
    if not 0 < bits < 16 or wide.size == 0 or int(wide.max()) >= 2**bits:
        return 65535
    # upper bits are filled up with zeros, or by scaling, which adds one at most here
    if bits > 12 and int((wide & (2 ** (16 - bits) - 1)).max()) <= 1:
        return 65535
    return 2**bits - 1


_TIFF_BITS, _TIFF_KIND, _TIFF_FORMAT = 258, 262, 339
_TIFF_LARGEST = (341, 281)  # SMaxSampleValue, MaxSampleValue
_SIGNED, _FLOAT = 2, 3


def _deep_tiff(image: Image.Image, data: bytes) -> Image.Image | None:
    """A TIFF of more than 8 bits a sample, or with a sign, as 8; None where PIL reads it right."""
    del data
    tags = image.tag_v2
    bits = max(tags.get(_TIFF_BITS, (1,)))
    forms = set(tags.get(_TIFF_FORMAT, (1,)))
    largest = next((max(np.ravel(tags[tag])) for tag in _TIFF_LARGEST if tag in tags), 0)
    # the number of bits: some writers state the largest value that occurs
    stated = int(largest).bit_length() if 0 < largest < 2**31 and bits > 8 else 0
    if _FLOAT in forms:
        raise BrokenImage("floating-point pixels have no stated range")
    if _SIGNED in forms and not stated:
        raise BrokenImage(f"signed samples of {bits} bits have no stated range")
    if not image.mode.startswith("I"):
        if bits > 8 and 0 < stated < 16:
            raise BrokenImage(f"{stated} significant bits in {bits}, of colour, are not read")
        return None
    if bits > 16 and not stated:
        raise BrokenImage(f"integers of {bits} bits have no stated range")
    image.load()
    top = 2 ** (stated or bits) - 1
    light_HW = _eight_bits(np.asarray(image), top)
    return Image.fromarray(255 - light_HW if tags.get(_TIFF_KIND) == 0 else light_HW)


def _eight_bits(wide: np.ndarray, top: int) -> np.ndarray:
    """uint8 of values 0 to `top`, rounded. PIL's own conversion cuts everything above 255 off."""
    wide = wide.astype(np.int64)
    if wide.size and (wide.min() < 0 or wide.max() > top):
        raise BrokenImage(
            f"values from {wide.min()} to {wide.max()} do not lie in the stated range, 0 to {top}"
        )
    return ((wide * 255 + top // 2) // top).astype(np.uint8)


def check_channels(channels: int) -> None:
    """An error for images that are neither gray nor of three colours."""
    if channels not in (1, 3):
        raise interfaces.UserError(f"images have 1 or 3 channels; found channels={channels}")


DECODERS = {"pil": _with_pil, "simplejpeg": _with_simplejpeg}
