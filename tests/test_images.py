"""Decoding, resizing and the reduction of masks. Files of 16 bits, which Pillow cannot write, are built by hand."""

import io
import re
import struct
import warnings
import zlib
from fractions import Fraction

import jax
import numpy as np
import pytest
from PIL import Image

from pushpull_jax.data.images import (
    LETTERBOX_GREY,
    decode_image,
    decode_mask,
    image_size,
    letterbox_box,
    mask_to_grid,
    mask_to_image,
    read_image,
    read_mask,
    resize_image,
    resize_weights,
)
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.pipeline import _tensorflow
from pushpull_jax.errors import InputError

tf = _tensorflow()
RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (9, 13, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
GREY3 = np.repeat(GREY[..., None], 3, axis=-1)
ALPHA = RANDOM.integers(0, 256, GREY.shape, dtype=np.uint8)
DEEP = RANDOM.integers(0, 65536, (9, 13, 4), dtype=np.uint16)
# What each EXIF orientation does to bring the stored picture upright (EXIF 2.3, tag 274).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def encoded(image, file_format: str, **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, *, depth: int, colour_type: int, extra: bytes = b"") -> bytes:
    """A PNG of unfiltered rows, written out from its specification."""
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour_type, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + data + chunk(b"IEND", b"")


def tiff(samples: np.ndarray, *, order: str, planes: int = 1, deflate: bool = False) -> bytes:
    """A TIFF of one strip of 16-bit RGB, written out from its specification."""
    height, width, channels = samples.shape
    data = samples.astype(order + "u2").tobytes()
    data = zlib.compress(data) if deflate else data
    tags = [(256, width), (257, height), (258, None), (259, 8 if deflate else 1), (262, 2), (273, None)]
    tags += [(277, channels), (278, height), (279, len(data)), (284, planes)]
    end = 8 + 2 + 12 * len(tags) + 4
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    for tag, value in tags:
        if tag == 258:
            out += struct.pack(order + "HHII", tag, 3, channels, end)
        else:
            out += struct.pack(order + "HHII", tag, 4, 1, end + 2 * channels if value is None else value)
    return out + bytes(4) + struct.pack(order + f"{channels}H", *[16] * channels) + data


def to_8_bits(samples: np.ndarray) -> np.ndarray:
    """The stated rule in float64; 257 is odd, so that there are no ties."""
    return np.rint(samples / 257.0).astype(np.uint8)


def grey(samples: np.ndarray) -> np.ndarray:
    return np.repeat(samples[..., None], 3, axis=-1)


PALETTE = RANDOM.integers(0, 256, (256, 3), dtype=np.uint8)
INDEXED = Image.fromarray(GREY)
INDEXED.putpalette(PALETTE.tobytes())
CMYK = np.zeros((4, 4, 4), np.uint8)
CMYK[:2, :, 3] = 255  # black above, white below
BITS = Image.fromarray(np.where(GREY > 127, 255, 0).astype(np.uint8)).convert("1", dither=Image.Dither.NONE)
FLOATS = np.linspace(0, 1, 117, dtype=np.float32).reshape(9, 13)

EXACT = {
    "png colour": (encoded(COLOUR, "PNG"), COLOUR),
    "png grey": (encoded(GREY, "PNG"), GREY3),
    "png grey and alpha": (encoded(np.stack([GREY, ALPHA], -1), "PNG"), GREY3),
    "png colour and alpha": (encoded(np.dstack([COLOUR, ALPHA]), "PNG"), COLOUR),
    "png palette": (encoded(INDEXED, "PNG"), PALETTE[GREY]),
    "png palette, alpha each": (encoded(INDEXED, "PNG", transparency=ALPHA.tobytes()[:100]), PALETTE[GREY]),
    "png palette, one clear": (encoded(INDEXED, "PNG", transparency=int(GREY[0, 0])), PALETTE[GREY]),
    "png grey, one clear": (encoded(GREY, "PNG", transparency=int(GREY[0, 0])), GREY3),
    "png 1 bit": (encoded(BITS, "PNG"), grey(np.where(GREY > 127, 255, 0).astype(np.uint8))),
    "png 16 grey": (encoded(DEEP[..., 0], "PNG"), to_8_bits(grey(DEEP[..., 0]))),
    "png 16 colour": (png(DEEP[..., :3], depth=16, colour_type=2), to_8_bits(DEEP[..., :3])),
    "png 16 colour and alpha": (png(DEEP, depth=16, colour_type=6), to_8_bits(DEEP[..., :3])),
    "png 16 grey and alpha": (png(DEEP[..., :2], depth=16, colour_type=4), grey((DEEP[..., 0] >> 8).astype(np.uint8))),
    "bmp colour": (encoded(COLOUR, "BMP"), COLOUR),
    "bmp grey": (encoded(GREY, "BMP"), GREY3),
    "bmp palette": (encoded(INDEXED, "BMP"), PALETTE[GREY]),
    "bmp 1 bit": (encoded(BITS, "BMP"), grey(np.where(GREY > 127, 255, 0).astype(np.uint8))),
    "tiff colour": (encoded(COLOUR, "TIFF"), COLOUR),
    "tiff lzw": (encoded(COLOUR, "TIFF", compression="tiff_lzw"), COLOUR),
    "tiff palette": (encoded(INDEXED, "TIFF"), PALETTE[GREY]),
    "tiff cmyk": (encoded(Image.fromarray(CMYK, "CMYK"), "TIFF"), grey(255 - CMYK[..., 3])),
    "tiff 16 grey": (encoded(DEEP[..., 0], "TIFF"), to_8_bits(grey(DEEP[..., 0]))),
    "tiff 16 colour, low byte first": (tiff(DEEP[..., :3], order="<"), to_8_bits(DEEP[..., :3])),
    "tiff 16 colour, high byte first": (tiff(DEEP[..., :3], order=">"), to_8_bits(DEEP[..., :3])),
    "tiff 16 colour, deflate": (tiff(DEEP[..., :3], order="<", deflate=True), to_8_bits(DEEP[..., :3])),
    "tiff 32": (encoded(DEEP[..., 0].astype(np.int32), "TIFF"), to_8_bits(grey(DEEP[..., 0]))),
    "tiff float": (encoded(FLOATS, "TIFF"), grey(np.rint(FLOATS.astype(np.float64) * 255).astype(np.uint8))),
    "png animated": (encoded(COLOUR, "PNG", save_all=True, append_images=[Image.fromarray(255 - COLOUR)]), COLOUR),
    "tiff pages": (encoded(COLOUR, "TIFF", save_all=True, append_images=[Image.fromarray(255 - COLOUR)]), COLOUR),
}


@pytest.mark.parametrize("kind", EXACT)
def test_lossless_files_decode_exactly(kind, tmp_path):
    data, expected = EXACT[kind]
    decoded = decode_image(data)
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, expected)
    (tmp_path / "wrongly_named.jpg").write_bytes(data)
    np.testing.assert_array_equal(decode_image(tmp_path / "wrongly_named.jpg"), expected)


def test_every_16_bit_value_is_rounded():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(decode_image(encoded(values, "PNG")), to_8_bits(grey(values)))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2, "quality": 40}])
def test_jpeg_is_the_accurate_integer_transform(options):
    # Another decoder of the same transform: tensorflow's, told not to use its fast one.
    for image in (COLOUR, GREY):
        data = encoded(image, "JPEG", **({} if image.ndim == 2 else options))
        expected = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE").numpy()
        np.testing.assert_array_equal(decode_image(data), expected)


def test_cmyk_jpeg_is_not_inverted():
    decoded = decode_image(encoded(Image.fromarray(np.kron(CMYK, np.ones((8, 8, 1), np.uint8)), "CMYK"), "JPEG"))
    assert decoded[:16].max() <= 4 and decoded[16:].min() >= 251


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    upright = UPRIGHT[orientation](COLOUR)
    for file_format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode_image(encoded(COLOUR, file_format, exif=exif)), upright)
    # A JPEG of the same pixels without the tag, turned by hand.
    plain = decode_image(encoded(COLOUR, "JPEG"))
    np.testing.assert_array_equal(decode_image(encoded(COLOUR, "JPEG", exif=exif)), UPRIGHT[orientation](plain))
    # Both bytes of a deep sample are turned.
    deep = png(DEEP[..., :3], depth=16, colour_type=2, extra=chunk(b"eXIf", exif.tobytes()[6:]))
    np.testing.assert_array_equal(decode_image(deep), to_8_bits(UPRIGHT[orientation](DEEP[..., :3])))
    mask = encoded(np.where(GREY > 127, 255, 0).astype(np.uint8), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_mask(mask), UPRIGHT[orientation](GREY > 127))


TRUNCATED = ["png colour", "png palette", "png 16 colour", "bmp colour", "bmp palette", "tiff colour", "tiff 16 grey"]


@pytest.mark.parametrize("kind", TRUNCATED)
def test_every_truncation_is_refused(kind):
    data = EXACT[kind][0]
    for length in range(len(data)):
        with pytest.raises(InputError, match="^cut: cannot be read as an image: "):
            decode_image(data[:length], name="cut")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_every_truncation_of_a_jpeg_is_refused_even_with_a_thumbnail(options):
    data = encoded(COLOUR, "JPEG", **options)
    # An application segment that holds the end-of-image marker of another picture.
    thumbnail = b"\xff\xe5" + struct.pack(">H", 8) + b"abcd\xff\xd9"
    data = data[:2] + b"\xff" + thumbnail + data[2:]
    decode_image(data)
    decode_image(data + b"trailing")
    for length in range(len(data)):
        with pytest.raises(InputError):
            decode_image(data[:length])


def test_a_flipped_bit_of_a_png_is_refused():
    data = EXACT["png colour"][0]
    start = data.index(b"IDAT") + 4
    for position in range(start, len(data) - 16):
        damaged = bytearray(data)
        damaged[position] ^= 1
        with pytest.raises(InputError, match="wrong checksum of its IDAT chunk at byte 33"):
            decode_image(bytes(damaged))


def test_the_size_is_that_of_the_header():
    encoded = io.BytesIO()
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(encoded, "PNG")
    assert image_size(encoded.getvalue()[:41]) == (3, 5)  # IHDR, and not a byte of the data


def test_what_is_not_an_image_is_named(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(InputError, match=re.escape(f"{text}: cannot be read as an image: not a PNG, JPEG, ")):
        decode_image(text)
    with pytest.raises(InputError, match="the file is empty"):
        decode_image(b"", name="nothing")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'none.png'}: cannot be read: No such file")):
        decode_image(str(tmp_path / "none.png"))
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        decode_image(tmp_path)
    with pytest.raises(InputError, match="not a PNG, JPEG, BMP or TIFF"):
        decode_image(encoded(GREY, "GIF"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(FLOATS * 255, "TIFF"), r"float values must lie in 0..1, got 0..255"),
        (encoded(FLOATS * np.float32("nan"), "TIFF"), "float values must lie in 0..1, got nan..nan"),
        (encoded(np.array([[-1, 5]], np.int32), "TIFF"), "must lie in 0..65535, as 16 bits, got -1..5"),
        (encoded(np.array([[5, 65536]], np.int32), "TIFF"), "must lie in 0..65535, as 16 bits, got 5..65536"),
        (encoded(Image.new("LAB", (2, 2)), "TIFF"), "colour model LAB is not supported"),
        (tiff(DEEP[..., :3], order="<", planes=2), "TIFF in separate planes"),
    ],
)
def test_values_without_a_rule_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        decode_image(data, name="odd")


def test_the_limit_of_pixels_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", COLOUR[..., 0].size)
    decode_image(EXACT["png colour"][0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", COLOUR[..., 0].size - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow only warns up to twice the limit
        with pytest.raises(InputError, match="13x9 pixels are more than PIL.Image.MAX_IMAGE_PIXELS = 116"):
            decode_image(EXACT["png colour"][0])


def test_mask_rules_of_each_kind():
    faint = np.zeros((4, 6), np.uint16)
    faint[1, 2] = 1
    expected = faint > 0
    colours = np.zeros((4, 6, 3), np.uint16)
    colours[1, 2, 1] = 1
    # Index 0 is white here, index 1 black, as optimisers of files reorder palettes.
    swapped = Image.fromarray(np.where(expected, 0, 1).astype(np.uint8))
    swapped.putpalette([255, 255, 255, 0, 0, 0])
    clear = np.dstack([np.where(expected, 255, 0)] * 3 + [np.zeros((4, 6))]).astype(np.uint8)
    for data in (
        encoded(faint.astype(np.uint8), "PNG"),
        encoded(faint, "PNG"),
        encoded(Image.fromarray(expected), "PNG"),
        encoded(swapped, "PNG"),
        encoded(swapped, "BMP"),
        encoded(clear, "PNG"),
        png(colours, depth=16, colour_type=2),
        encoded(expected.astype(np.float32) * 1e-6, "TIFF"),
    ):
        mask = decode_mask(data)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)


def test_a_jpeg_mask_is_cut_at_half():
    truth = np.zeros((32, 32), bool)
    truth[5:20, 9:27] = True
    data = encoded(np.where(truth, 255, 0).astype(np.uint8), "JPEG", quality=85)
    assert (decode_image(data)[..., 0][~truth] > 0).any(), "without ringing this would test nothing"
    np.testing.assert_array_equal(decode_mask(data), truth)


def test_read_mask_checks_size_and_label(tmp_path):
    images = {"i": COLOUR, "m": GREY, "small": GREY[:5], "turned": GREY.T.copy(), "empty": GREY * 0}
    paths = {name: str(tmp_path / f"{name}.png") for name in images}
    for name, image in images.items():
        (tmp_path / f"{name}.png").write_bytes(encoded(image, "PNG"))

    def record(mask, label):
        return Record("k", paths["i"], mask and paths[mask], label, "d", "test")

    np.testing.assert_array_equal(read_image(record(None, 0)), COLOUR)
    np.testing.assert_array_equal(read_mask(record("m", 1), size=(9, 13)), GREY != 0)
    assert not read_mask(record(None, 0), size=(9, 13)).any() and not read_mask(record("empty", 0), size=(9, 13)).any()
    assert read_mask(record(None, 1), size=(9, 13)) is None and read_mask(record(None, None), size=(9, 13)) is None
    message = f"mask {paths['small']} is 13x5, its image {paths['i']} 13x9 (width x height)"
    with pytest.raises(InputError, match=re.escape(message)):
        read_mask(record("small", 1), size=(9, 13))
    with pytest.raises(InputError, match="is 9x13, its image"):
        read_mask(record("turned", 1), size=(9, 13))
    with pytest.raises(InputError, match=re.escape(f"{paths['i']} is labelled normal")):
        read_mask(record("m", 0), size=(9, 13))


def test_resize_weights_by_hand():
    # 4 -> 2: centres of the outputs at 1 and 3, of the inputs at 0.5, 1.5, 2.5, 3.5; half width 2.
    np.testing.assert_allclose(resize_weights(4, 2) * 7, [[3, 3, 1, 0], [0, 1, 3, 3]], rtol=1e-6)
    # 2 -> 4: centres at 0.25, 0.75, 1.25, 1.75; half width 1, cut off at the edges.
    np.testing.assert_allclose(resize_weights(2, 4) * 4, [[4, 0], [3, 1], [1, 3], [0, 4]], rtol=1e-6)
    np.testing.assert_array_equal(resize_weights(5, 5), np.eye(5))
    np.testing.assert_array_equal(resize_weights(1, 3), np.ones((3, 1)))


SHAPES = [(900, 900, 256), (700, 1000, 256), (37, 301, 64), (60, 100, 256), (256, 256, 256), (1, 5, 8), (257, 255, 256)]


@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_resizing_agrees_with_jax_and_tensorflow(height, width, size):
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = resize_image(image, size=size)
    assert resized.shape == (size, size, 3) and resized.dtype == np.float32
    rows, columns = resize_weights(height, size), resize_weights(width, size)
    by_matrices = np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float64), columns, optimize=True)
    np.testing.assert_allclose(resized, by_matrices, rtol=0, atol=2e-4)
    by_jax = jax.image.resize(image.astype(np.float32), (size, size, 3), "linear", antialias=True)
    np.testing.assert_allclose(resized, by_jax, rtol=0, atol=2e-4)
    # tensorflow computes its weights in float32 and is off by 2e-3 where the ratio is not a short fraction.
    by_tensorflow = tf.image.resize(image, (size, size), antialias=True)
    np.testing.assert_allclose(resized, by_tensorflow, rtol=0, atol=4e-3)


def test_resizing_neither_rounds_nor_changes_a_constant():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0] = 255
    # Averages of 2x2 with weights 3/4 and 1/4 along each axis.
    assert resize_image(image, size=4)[1, 1, 0] == pytest.approx(255 * 9 / 16, abs=1e-4)
    for size in (7, 64):
        np.testing.assert_allclose(resize_image(np.full((31, 17, 3), 201, np.uint8), size=size), 201, atol=1e-4)
    np.testing.assert_array_equal(resize_image(COLOUR[:9, :9], size=9), COLOUR[:9, :9])


def test_letterbox_by_hand():
    assert letterbox_box(900, 900, 256) == (0, 0, 256, 256)
    assert letterbox_box(700, 1000, 256) == (38, 0, 179, 256)  # 179.2 rows; 77 left over, 38 above and 39 below
    assert letterbox_box(1000, 700, 256) == (0, 38, 256, 179)
    assert letterbox_box(1, 1000, 64) == (31, 0, 1, 64)
    assert letterbox_box(3, 4, 2) == (0, 0, 2, 2)  # 1.5 rows, half up


def test_letterbox_keeps_the_aspect_and_is_grey_around():
    image = np.random.default_rng(1).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    boxed = resize_image(image, size=16, mode="letterbox")
    top, left, height, width = letterbox_box(20, 40, 16)
    assert (top, left, height, width) == (4, 0, 8, 16)
    inside = np.einsum("ih,hwc,jw->ijc", resize_weights(20, 8), image.astype(np.float64), resize_weights(40, 16))
    np.testing.assert_allclose(boxed[4:12], inside, atol=1e-3)
    assert (boxed[:4] == LETTERBOX_GREY).all() and (boxed[12:] == LETTERBOX_GREY).all()


def area_by_fractions(mask: np.ndarray, grid: tuple[int, int], size: int, mode: str) -> np.ndarray:
    """Anomalous share of each cell, pixel by pixel in exact rational numbers, on a square of side 1."""
    box = letterbox_box(*mask.shape, size) if mode == "letterbox" else (0, 0, size, size)
    share = np.full(grid, Fraction(0))
    for y, x in np.argwhere(mask):
        for i in range(grid[0]):
            for j in range(grid[1]):
                part = Fraction(1)
                for cell, cells, pixel, pixels, start, length in (
                    (i, grid[0], int(y), mask.shape[0], box[0], box[2]),
                    (j, grid[1], int(x), mask.shape[1], box[1], box[3]),
                ):
                    low = Fraction(start, size) + Fraction(pixel * length, pixels * size)
                    high = low + Fraction(length, pixels * size)
                    overlap = min(high, Fraction(cell + 1, cells)) - max(low, Fraction(cell, cells))
                    part *= max(overlap, Fraction(0)) * cells
                share[i, j] += part
    return share


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
@pytest.mark.parametrize(("shape", "grid", "size"), [((13, 7), (4, 5), 11), ((5, 9), (8, 8), 16), ((8, 8), (4, 4), 8)])
def test_masks_against_exact_areas(shape, grid, size, mode):
    mask = np.random.default_rng(2).random(shape) < 0.3
    share = area_by_fractions(mask, grid, size, mode)
    options = {"grid": grid, "size": size, "mode": mode}
    np.testing.assert_array_equal(mask_to_grid(mask, rule="any", **options), (share > 0).astype(np.float32))
    np.testing.assert_array_equal(mask_to_grid(mask, rule="fraction", **options), share.astype(np.float32))
    at_size = area_by_fractions(mask, (size, size), size, mode)
    np.testing.assert_array_equal(mask_to_image(mask, size=size, mode=mode), at_size >= Fraction(1, 2))


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
@pytest.mark.parametrize(("shape", "grid"), [((256, 256), (16, 16)), ((37, 101), (16, 16)), ((7, 5), (16, 3))])
def test_no_scratch_of_one_pixel_is_lost(shape, grid, mode):
    for axis in (0, 1):
        for position in range(shape[axis]):
            mask = np.zeros(shape, bool)
            np.moveaxis(mask, axis, 0)[position, shape[1 - axis] // 2] = True
            cells = mask_to_grid(mask, grid=grid, rule="any", size=64, mode=mode)
            assert cells.dtype == np.float32 and cells.sum() >= 1 and set(np.unique(cells)) <= {0, 1}


def test_any_marks_a_cell_of_exactly_its_own_pixels():
    for y, x in np.ndindex(8, 8):
        mask = np.zeros((8, 8), bool)
        mask[y, x] = True
        np.testing.assert_array_equal(np.argwhere(mask_to_grid(mask, grid=(2, 4), rule="any")), [[y // 4, x // 2]])


def test_half_of_the_area_is_anomalous_less_is_not():
    mask = np.zeros((4, 4), bool)
    mask[0, :2] = mask[2, 2] = True
    np.testing.assert_array_equal(mask_to_image(mask, size=2), [[True, False], [False, False]])
    np.testing.assert_array_equal(mask_to_image(mask, size=4), mask)
    np.testing.assert_array_equal(mask_to_image(mask, size=8), np.kron(mask, np.ones((2, 2), bool)))


def test_wrong_arrays_and_names_are_refused():
    mask = np.zeros((4, 4), bool)
    for wrong in (np.zeros((4, 4)), np.zeros((4, 4, 1), bool), np.zeros((0, 4), bool)):
        with pytest.raises(ValueError, match=r"mask must be bool \[H,W\]"):
            mask_to_image(wrong, size=4)
    with pytest.raises(ValueError, match="rule must be"):
        mask_to_grid(mask, grid=(2, 2), rule="all")
    with pytest.raises(ValueError, match="resize must be"):
        mask_to_image(mask, size=2, mode="crop")
    with pytest.raises(ValueError, match="letterbox needs size"):
        mask_to_grid(mask, grid=(2, 2), rule="any", mode="letterbox")
    with pytest.raises(ValueError, match=r"image must be \[H,W,3\]"):
        resize_image(np.zeros((4, 4), np.uint8), size=4)
