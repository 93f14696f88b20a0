"""Every kind of file becomes its documented pixels, or BrokenImage; views are ADM's."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from tokgen import interfaces
from tokgen.data import pixels, views

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noise(rows, columns, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, columns, channels)).astype(np.uint8)


def rgba(pixel):
    return encoded(Image.new("RGBA", (3, 2), pixel))


def palette(**options):
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0, 10, 20, 30])
    return encoded(image, **options)


def cmyk():
    # C, M, Y, K of 0, 255, 255, 0 is red. Quality 100 keeps a flat image flat.
    return encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, depth, colour, rows, extra=b""):
    """A PNG written by hand: PIL can't write 16-bit colour."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + extra
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def animated(form):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 255, 0))]
    lossless = {"lossless": True} if form == "WEBP" else {}
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], **lossless)


FLAT = {
    "gray": (encoded(Image.new("L", (3, 2), 77)), (77, 77, 77)),
    "gray and alpha": (encoded(Image.new("LA", (3, 2), (0, 51))), (204, 204, 204)),
    "gray with a transparent value": (
        encoded(Image.new("L", (3, 2), 9), transparency=9),
        WHITE,
    ),
    "one bit": (encoded(Image.new("1", (3, 2), 1)), WHITE),
    "alpha 0 hides its colour": (rgba((10, 20, 30, 0)), WHITE),
    "alpha 51 on white": (rgba((0, 0, 0, 51)), (204, 204, 204)),
    "alpha 255": (rgba((10, 20, 30, 255)), (10, 20, 30)),
    "palette": (palette(), RED),
    "palette with a transparent entry": (palette(transparency=1), WHITE),
    "palette GIF": (palette(form="GIF"), RED),
    "animated GIF": (animated("GIF"), RED),
    "animated WEBP": (animated("WEBP"), RED),
    "cmyk": (cmyk(), RED),
    "bmp": (encoded(Image.new("RGB", (3, 2), (1, 2, 3)), "BMP"), (1, 2, 3)),
    "tiff": (encoded(Image.new("RGB", (3, 2), (1, 2, 3)), "TIFF"), (1, 2, 3)),
    "ppm": (encoded(Image.new("RGB", (3, 2), (1, 2, 3)), "PPM"), (1, 2, 3)),
    "16-bit colour": (
        png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 257 * 3, 257 * 200, 65535)),
        (3, 200, 255),
    ),
}


@pytest.mark.parametrize("kind", FLAT)
def test_kinds_of_file_have_their_documented_pixels(kind):
    data, pixel = FLAT[kind]
    array = pixels.decode(data, 3)
    assert array.dtype == np.uint8 and array.shape[2] == 3
    np.testing.assert_allclose(
        array.astype(int), np.broadcast_to(pixel, array.shape), atol=1 if kind == "cmyk" else 0
    )


@pytest.mark.parametrize("kind", FLAT)
def test_an_image_that_is_open_is_read_as_its_file(kind):
    data, _ = FLAT[kind]
    for channels in (1, 3):
        with Image.open(io.BytesIO(data)) as image:
            found = pixels.of_image(image, channels)
        # of 16-bit colour PIL keeps the high bytes
        off = 1 if kind == "16-bit colour" else 0
        np.testing.assert_allclose(found, pixels.decode(data, channels).astype(int), atol=off)


def test_images_without_a_stated_range_are_refused_open_too():
    for mode in ("F", "I"):
        with pytest.raises(pixels.BrokenImage, match="no stated range"):
            pixels.of_image(Image.new(mode, (2, 2)), 3)
    deep = Image.fromarray(np.array([[0, 257 * 9, 65535]], np.uint16))
    np.testing.assert_array_equal(pixels.of_image(deep, 1)[..., 0], [[0, 9, 255]])


def test_an_open_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(noise(4, 6))
    with Image.open(io.BytesIO(encoded(stored, exif=exif))) as image:
        found = pixels.of_image(image, 3)
    np.testing.assert_array_equal(found, pixels.decode(encoded(stored, exif=exif), 3))
    assert found.shape == (6, 4, 3)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_divided_by_257_and_never_saturate(form):
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    array = pixels.decode(encoded(Image.fromarray(ramp), form), 1)
    np.testing.assert_array_equal(array[..., 0], np.floor(ramp / 257 + 0.5))
    assert (array == 255).mean() < 0.01


def wide_png(colour, rows, *, significant=(), clear=()):
    """A PNG of 16 bits a sample: one row of pixels, with what it states of them."""
    extra = png_chunk(b"sBIT", bytes(significant)) if significant else b""
    extra += png_chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    array = np.array(rows, ">u2")
    return png(len(array), 1, 16, colour, b"\0" + array.tobytes(), extra)


def tiff(bits, form, kind, row, largest=0):
    """A TIFF of one row of two samples, written by hand: little-endian, not compressed."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, kind), (273, 8), (277, 1), (278, 1)]
    tags += [(279, len(row)), *([(281, largest)] if largest else []), (339, form)]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    at = struct.pack("<I", 8 + len(row))
    return b"II*\0" + at + row + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


TWELVE = [0, 819, 2048, 4095]
DEEP = {
    "12 bits at the lower end": (wide_png(0, TWELVE, significant=[12]), [0, 51, 128, 255]),
    "12 bits at the upper end": (
        wide_png(0, [v << 4 for v in TWELVE], significant=[12]),
        [0, 51, 128, 255],
    ),
    "14 bits of a dark image": (
        wide_png(0, [0, 257 * 4, 64 * 257], significant=[14]),
        [0, 4, 64],
    ),
    "nothing stated": (wide_png(0, TWELVE), [0, 3, 8, 16]),
    "colour": (
        wide_png(2, [TWELVE[1:], [0, 0, 4095]], significant=[12] * 3),
        [[51, 128, 255], [0, 0, 255]],
    ),
    "colour and alpha": (
        wide_png(6, [[0, 819, 2048, 4095], [0, 0, 0, 0]], significant=[12] * 4),
        [[0, 51, 128], [255] * 3],
    ),
    "a transparent colour": (
        wide_png(2, [[100, 200, 300], [100, 200, 301]], clear=[100, 200, 300]),
        [[255] * 3, [0, 1, 1]],
    ),
    "a transparent gray": (wide_png(0, [257, 514], clear=[257]), [255, 2]),
    "two bits and a transparent gray": (
        png(4, 1, 2, 0, b"\0\x1b", png_chunk(b"tRNS", b"\0\1")),
        [0, 255, 170, 255],
    ),
    "12-bit TIFF": (tiff(12, 1, 1, bytes([0x33, 0x3F, 0xFF])), [51, 255]),
    "white is 0": (tiff(16, 1, 0, struct.pack("<HH", 0, 65535)), [255, 0]),
    "a largest value": (tiff(16, 1, 1, struct.pack("<HH", 819, 4095), 4095), [51, 255]),
    "8 of 32 bits": (tiff(32, 2, 1, struct.pack("<ii", 51, 255), 255), [51, 255]),
    "PGM of 12 bits": (b"P5 2 1 4095\n" + struct.pack(">HH", 819, 4095), [51, 255]),
}


@pytest.mark.parametrize("kind", DEEP)
def test_the_significant_bits_are_those_that_the_file_states(kind):
    data, array = DEEP[kind]
    found = pixels.decode(data, 3 if np.ndim(array) == 2 else 1)
    np.testing.assert_array_equal(found[0].squeeze(-1) if found.shape[2] == 1 else found[0], array)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (tiff(32, 2, 1, struct.pack("<ii", 0, 255)), "signed samples of 32 bits"),
        (tiff(32, 1, 1, struct.pack("<ii", 0, 255)), "integers of 32 bits"),
        (tiff(16, 2, 1, struct.pack("<hh", 0, 255)), "signed samples of 16 bits"),
        (tiff(8, 2, 1, bytes([0, 255])), "signed samples of 8 bits"),
        (tiff(32, 3, 1, struct.pack("<ff", 0, 1)), "floating-point"),
        (tiff(32, 2, 1, struct.pack("<ii", -1, 255), 255), "stated range"),
        (wide_png(4, [[4095, 65535]], significant=[12, 16]), "gray with alpha"),
    ],
)
def test_depths_without_a_range_are_broken(data, why):
    with pytest.raises(pixels.BrokenImage, match=why):
        pixels.decode(data, 3)


def test_deep_images_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.array([[0, 257, 514]], np.uint16)
    found = pixels.decode(encoded(Image.fromarray(ramp), exif=exif), 1)
    np.testing.assert_array_equal(found[..., 0], [[0], [1], [2]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = noise(4, 6)
    # What a camera stores so that the viewer's turn gives `upright` back.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(pixels.decode(data, 3), upright)


def test_one_channel_is_the_luma_of_the_composite():
    array = pixels.decode(rgba((0, 0, 0, 0)), 1)
    assert array.shape == (2, 3, 1) and (array == 255).all()
    colour = pixels.decode(encoded(Image.new("RGB", (1, 1), (10, 200, 90))), 1)
    assert abs(int(colour[0, 0, 0]) - (0.299 * 10 + 0.587 * 200 + 0.114 * 90)) <= 1


def bomb():
    """A small file whose header promises 400 million pixels."""
    return png(20_000, 20_000, 1, 0, bytes(20_000 * 2501))


PNG = encoded(Image.fromarray(noise(32, 32)))
JPEG = encoded(Image.fromarray(noise(32, 32)), "JPEG")
BROKEN = {
    "empty": b"",
    "one byte": b"\xff",
    "text": b"this is not an image",
    "html": b"<html><body>404</body></html>",
    "truncated png": PNG[: len(PNG) // 2],
    "truncated jpeg": JPEG[: len(JPEG) // 2],
    "header only": JPEG[:20],
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "float tiff": encoded(Image.new("F", (2, 2), 0.5), "TIFF"),
    "32-bit tiff": encoded(Image.new("I", (2, 2), 70_000), "TIFF"),
    "chunk with a wrong checksum": png(
        1,
        1,
        8,
        0,
        b"\0\0",
        b"".join([struct.pack(">I", 12), b"zTXt", b"a\0\0" + bytes(9), bytes(4)]),
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_image_is_a_broken_image(kind):
    with pytest.raises(pixels.BrokenImage):
        pixels.decode(BROKEN[kind], 3)


def test_a_bomb_is_refused_from_its_header(monkeypatch):
    data = bomb()
    assert len(data) < 200_000

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(pixels.BrokenImage, match="pixels"):
        pixels.decode(data, 3)
    # Below PIL's own limits ours still counts.
    with pytest.raises(pixels.BrokenImage, match="more than the 1023"):
        pixels.decode(PNG, 3, max_pixels=1023)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_damaged_bytes_decode_or_are_broken_and_nothing_else(form):
    data = {"PNG": PNG, "JPEG": JPEG}[form]
    rng = np.random.default_rng(1)
    broken = 0
    for _ in range(200):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        try:
            assert pixels.decode(bytes(damaged), 3).shape[2] == 3
        except pixels.BrokenImage:
            broken += 1
    assert broken >= (150 if form == "PNG" else 1)  # JPEG has no checksums


def test_channels_are_one_or_three():
    with pytest.raises(interfaces.UserError, match="channels=4"):
        pixels.decode(PNG, 4)


def adm(image, size):
    """Guided diffusion's centre crop, written out for squares."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), Image.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), Image.BICUBIC)
    array = np.array(picture)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(375, 500), (97, 64), (31, 200), (20, 24), (64, 64)])
def test_the_centre_of_a_square_is_adms(shape):
    image = noise(*shape)
    np.testing.assert_array_equal(views.centre(image, (32, 32)), adm(image, 32))


SHAPES = [(100, 150), (150, 100), (5, 5), (1, 1), (1, 3000), (33, 48)]


@pytest.mark.parametrize("crop", views.CROPS)
def test_any_image_becomes_the_size_that_was_asked_for(crop):
    for channels, size in ((1, (32, 48)), (3, (32, 48)), (3, (48, 32)), (3, (7, 64))):
        view = views.View(size, channels, crop=crop)
        for shape in SHAPES:
            out = view(noise(*shape, channels), np.random.default_rng(0))
            assert out.shape == (*size, channels) and out.dtype == np.uint8, (shape, size)


@pytest.mark.parametrize("crop", views.CROPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_seen_as_its_pixels_are(crop, channels):
    for shape in ((40, 53), (16, 16), (90, 33)):
        data = encoded(Image.fromarray(noise(*shape)))
        view = views.View((16, 16), channels, crop=crop, flip=True)
        seen = view(pixels.picture(data, channels), np.random.default_rng(3))
        expected = view(pixels.decode(data, channels), np.random.default_rng(3))
        assert seen.shape == (16, 16, channels) and seen.dtype == np.uint8
        np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("resize", views.RESIZES[1:])
@pytest.mark.parametrize("crop", views.CROPS)
def test_a_part_that_is_resized_alone_is_the_part_that_adm_shows(crop, resize):
    """The same part, of the same size; of a smooth picture, all but the same pixels."""
    for shape in ((60, 93), (93, 61), (40, 41), (20, 33), (257, 300)):
        rows, columns = np.linspace(0, 200, shape[0]), np.linspace(0, 50, shape[1])
        image = np.repeat((rows[:, None] + columns).astype(np.uint8)[..., None], 3, axis=2)
        seen = [
            views.View((32, 32), crop=crop, flip=True, resize=how)(image, np.random.default_rng(7))
            for how in ("adm", resize)
        ]
        assert seen[0].shape == seen[1].shape == (32, 32, 3)
        # a pixel of the view is 250 / 32 at most
        assert np.abs(seen[0].astype(int) - seen[1]).max() <= 4


def test_a_box_is_the_mean_of_what_a_pixel_covers():
    image = noise(64, 96)
    seen = views.View((32, 32), resize="box")(image, None)
    means = image[:, 16:80].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(seen - means).max() <= 1  # rounded after each pass
    with pytest.raises(
        interfaces.UserError, match="resize must be one of adm, bicubic, bilinear, box; found"
    ):
        views.View((8, 8), resize="fast")


def test_a_rectangle_shows_the_middle_undistorted():
    # Twice as large as the view, with 8 further columns on each side: halved and cut.
    inner = np.kron(noise(32, 48, seed=3), np.ones((2, 2, 1), np.uint8))
    image = np.pad(inner, ((0, 0), (8, 8), (0, 0)))
    np.testing.assert_array_equal(views.centre(image, (32, 48)), inner[::2, ::2])


def test_right_sized_images_are_not_touched():
    image = noise(32, 48)
    for crop in ("center", "random"):
        view = views.View((32, 48), crop=crop)
        np.testing.assert_array_equal(view(image, np.random.default_rng(0)), image)


def test_views_are_functions_of_the_image_and_the_generator():
    image = noise(80, 60)
    view = views.View([32, 32], crop="random", flip=True)
    assert hash(view) == hash(views.View((32, 32), crop="random", flip=True))
    seen = [view(image, np.random.default_rng(seed)) for seed in range(8)]
    again = [view(image, np.random.default_rng(seed)) for seed in range(8)]
    np.testing.assert_array_equal(seen, again)
    assert len({array.tobytes() for array in seen}) == 8


def test_random_crops_keep_to_the_zoom():
    """On a ramp of slope 1 per pixel the slope of the crop is the scale."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None], (200, 200))
    image = np.repeat(ramp[..., None], 3, axis=2)
    view = views.View((80, 80), crop="random", zoom=1.25)
    rng = np.random.default_rng(0)
    seen = np.array([view(image, rng)[:, 0, 0].astype(float) for _ in range(60)])
    side = 200 / ((seen[:, 70] - seen[:, 10]) / 60)  # the shorter side before the cut
    assert side.min() > 78 and side.max() < 103
    assert side.min() < 84 and side.max() > 96
    # The places differ too: the first row is not a function of the scale.
    assert seen[:, 0].std() > 3


def test_half_of_the_images_are_flipped():
    image = noise(8, 8)
    view = views.View((8, 8), flip=True)
    rng = np.random.default_rng(0)
    flipped = [np.array_equal(view(image, rng), image[:, ::-1]) for _ in range(400)]
    assert 150 < sum(flipped) < 250


def test_stored_views_are_the_centre_and_its_mirror_image():
    image = noise(50, 70)
    middle = views.fixed("center", (32, 48))(image, None)
    np.testing.assert_array_equal(middle, views.centre(image, (32, 48)))
    np.testing.assert_array_equal(views.fixed("flip", (32, 48))(image, None), middle[:, ::-1])
    with pytest.raises(interfaces.UserError, match="center, flip, top_left"):
        views.fixed("random", (32, 48))


@pytest.mark.parametrize("shape", [(375, 500), (97, 64), (32, 32)])
@pytest.mark.parametrize("size", [30, 40])  # rooms of 3 and 4: an odd one has no middle
def test_the_ten_crops_are_those_of_adms_centre_at_a_tenth_more(shape, size):
    """Five of the image, then five of its mirror image, written out; as torchvision orders them."""
    image, larger = noise(*shape), int(1.1 * size)
    centre = adm(image, larger)
    end, middle = larger - size, int(round((larger - size) / 2.0))
    places = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    expected = []
    for array in (centre, centre[:, ::-1]):
        for top, left in places:
            expected.append(array[top : top + size, left : left + size])
    names = views.stored("ten")
    assert len(names) == 10
    found = [views.fixed(name, (size, size))(image, None) for name in names]
    np.testing.assert_array_equal(found, expected)
    assert len({array.tobytes() for array in found}) == 10


def test_ten_crops_of_published_sizes_and_lists_of_views():
    assert [int(side * views.TEN_ZOOM) for side in (256, 384)] == [281, 422]
    assert views.stored("center,flip") == ("center", "flip")
    assert views.stored("center,ten") == ("center", *views.TEN)
    for wrong in ("", "centre", "flip,flip", "ten,middle", "random"):
        with pytest.raises(interfaces.UserError, match="views must be different ones"):
            views.stored(wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"size": (32,)}, {"size": (0, 32)}, {"channels": 2}, {"crop": "centre"}, {"zoom": 0.5}],
)
def test_impossible_views_are_refused(wrong):
    with pytest.raises(interfaces.UserError):
        views.View(**{"size": (32, 32), **wrong})
