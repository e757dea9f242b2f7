"""From files to arrays: the one way to decode an image or a mask (Pillow), and to bring them to the size of a run.

Images are uint8 [H,W,3] in RGB as decoded, float32 [S,S,3] in 0..255 once resized, never rounded in between; masks are
bool [H,W], True anomalous. S is the image size of the run. Resizing is bilinear with antialias: a triangle filter as
wide as the reduction, the same as `jax.image.resize(method="linear", antialias=True)`. Masks are reduced by area, in
integers, so that no pixel is lost to rounding. A "letterbox" keeps the aspect and centres the picture on grey.
"""

import contextlib
import functools
import io
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pushpull_jax.data.manifest import Record, Stored, mask_files
from pushpull_jax.errors import InputError

Resize = Literal["stretch", "letterbox"]
Source = bytes | str | os.PathLike | Stored

# Pillow reads many more formats, some by calling other programs.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
# Grey of the letterbox: 0 for the backbone, whose input is (x - 127) / 128.
LETTERBOX_GREY = 127.0
# In a mask stored as JPEG the compression leaves small values around the edges; in all others any value but 0 counts.
_JPEG_MASK_THRESHOLD = 128
# MPO is what Pillow calls a JPEG that more pictures follow, as some phones write it.
_JPEG = ("JPEG", "MPO")
# Tags of TIFF 6.0: BitsPerSample, and PlanarConfiguration (2: a plane for each channel).
_TIFF_BITS, _TIFF_PLANES = 258, 284
# The byte order that this machine does not have, as Pillow writes it.
_NATIVE_SWAPPED = "B" if sys.byteorder == "little" else "L"


def decode_image(source: Source, *, name: str | None = None) -> np.ndarray:
    """Decode a PNG, JPEG, BMP or TIFF, whatever its extension says, to 8 bits and three channels.

    The EXIF orientation is applied. Grey and 1 bit (0 and 255) are replicated, palettes resolved, CMYK converted by
    Pillow's plain formula, ICC profiles ignored. Alpha is dropped: colours are taken as they are stored. 16 bits
    become 8 as round(value / 257), grey or colour; only for CMYK, for grey with alpha and for channels in separate
    planes Pillow gives no more than the high byte. 32-bit integers are taken for 16 bits and must lie in 0..65535;
    floats must lie in 0..1 and become round(255 value). Of several frames or pages the first is read.

    Args:
        source: contents of a file, its path, or where it is stored.
        name: what messages call it; by default the path, or the name of what is stored.

    Returns:
        [H,W,3] uint8 RGB.

    Raises:
        InputError: not such a file, damaged, truncated (be it by its last byte), larger than
            `PIL.Image.MAX_IMAGE_PIXELS`, or of values without a rule above.
    """
    data, name = _contents(source, name)
    with _blaming(name):
        pixels = _to_uint8(_decode(data)[0])
        # A copy, since what Pillow hands out cannot be written to.
        return np.array(np.broadcast_to(np.atleast_3d(pixels), (*pixels.shape[:2], 3)), order="C")


def decode_mask(source: Source, *, name: str | None = None) -> np.ndarray:
    """Decode a mask: a pixel is anomalous where any channel of its colour is not 0, at the full depth of the file.

    Palettes are resolved first, so the colour counts and not its index; alpha is dropped. In a JPEG, which leaves
    small values around edges, a channel counts from 128 up.

    Args:
        source: as for `decode_image`.
        name: as for `decode_image`.

    Returns:
        [H,W] bool, True anomalous.

    Raises:
        InputError: as for `decode_image`.
    """
    data, name = _contents(source, name)
    with _blaming(name):
        pixels, file_format = _decode(data)
        marked = pixels >= _JPEG_MASK_THRESHOLD if file_format in _JPEG else pixels != 0
        return marked.any(axis=-1) if marked.ndim == 3 else marked


def image_size(source: Source, *, name: str | None = None) -> tuple[int, int]:
    """Height and width that the header of an image tells, before its orientation is applied; nothing is decoded.

    Args:
        source: as for `decode_image`.
        name: as for `decode_image`.

    Raises:
        InputError: not such a file, or larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    data, name = _contents(source, name)
    with _blaming(name), _opened(data) as image:
        return image.height, image.width


def read_image(record: Record) -> np.ndarray:
    """The image of a record, [H,W,3] uint8, by `decode_image`."""
    return decode_image(record.image)


def read_mask(record: Record, *, size: tuple[int, int]) -> np.ndarray | None:
    """The mask of a record at its native size, united where it has several.

    Args:
        record: its label says what a missing mask means.
        size: (H, W) of the decoded image.

    Returns:
        [H,W] bool; all False for a normal image without a mask, None for any other without one.

    Raises:
        InputError: the mask cannot be decoded, has another size than the image, marks pixels of a normal image, or
            none of an anomalous one.
    """
    if record.mask is None:
        return np.zeros(size, bool) if record.label == 0 else None
    mask = np.zeros(size, bool)
    for file in mask_files(record):
        part = decode_mask(file)
        if part.shape != mask.shape:
            raise InputError(
                f"mask {file} is {part.shape[1]}x{part.shape[0]}, its image {record.image} {size[1]}x{size[0]} "
                "(width x height): they must be equal"
            )
        mask |= part
    name = " with ".join(map(str, mask_files(record)))
    if record.label == 1 and not mask.any():
        raise InputError(f"mask {name} marks no pixel, but its image {record.image} is labelled anomalous")
    if record.label == 0 and mask.any():
        raise InputError(f"mask {name} marks anomalous pixels, but its image {record.image} is labelled normal")
    return mask


def resize_weights(n_in: int, n_out: int) -> np.ndarray:
    """Bilinear resizing with antialias along one axis: resized = weights @ values.

    The weight of input p for output i is max(0, 1 - |p + 1/2 - (i + 1/2) r| / max(r, 1)), r = n_in / n_out, divided
    by the sum of its row.

    Args:
        n_in: length of the axis, at least 1.
        n_out: length wanted, at least 1.

    Returns:
        [n_out, n_in] float32; rows are 0 or more and sum to 1.
    """
    ratio = n_in / n_out
    centres = (np.arange(n_out) + 0.5) * ratio
    distance = np.abs(np.arange(n_in) + 0.5 - centres[:, None]) / max(ratio, 1.0)
    weights = np.maximum(0.0, 1.0 - distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resize_image(image: np.ndarray, *, size: int, mode: Resize = "stretch") -> np.ndarray:
    """Bring an image to the square of a run, by `resize_weights` along both axes.

    Args:
        image: [H,W,3], any real dtype, in 0..255.
        size: S.
        mode: "stretch" ignores the aspect; "letterbox" keeps it, see `letterbox_box`, on LETTERBOX_GREY.

    Returns:
        [S,S,3] float32 in 0..255, not rounded.
    """
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"image must be [H,W,3], at least one pixel, got {list(image.shape)}")
    top, left, height, width = _box(*image.shape[:2], size, mode)
    rows, columns = _resize_matrix(image.shape[0], height), _resize_matrix(image.shape[1], width)
    resized = _resampled(image.astype(np.float32), rows, columns)
    if (height, width) == (size, size):
        return resized
    square = np.full((size, size, 3), LETTERBOX_GREY, np.float32)
    square[top : top + height, left : left + width] = resized
    return square


def letterbox_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Where a letterbox puts an image: the longer side fills the square, the shorter is rounded (half up) and centred.

    A map m [S,S] goes back to the image as m[top : top + h, left : left + w], resized to [height, width].

    Args:
        height: H of the image.
        width: W of the image.
        size: S.

    Returns:
        (top, left, h, w) in pixels of the square; h and w at least 1, an odd rest at the bottom or at the right.
    """
    longer = max(height, width)
    h, w = (max(1, (2 * side * size + longer) // (2 * longer)) for side in (height, width))
    return (size - h) // 2, (size - w) // 2, h, w


def mask_to_grid(
    mask: np.ndarray,
    *,
    grid: tuple[int, int],
    rule: Literal["any", "fraction"],
    size: int | None = None,
    mode: Resize = "stretch",
) -> np.ndarray:
    """Reduce a mask to the feature grid for training; cells partition the image, at fractions of a pixel if need be.

    Args:
        mask: [H,W] bool, at its native size.
        grid: (h, w).
        rule: "any", 1 where a cell has any part of an anomalous pixel, so that none is lost; "fraction", the
            anomalous share of the area of the cell.
        size: S, to which the images are resized; only a letterbox depends on it.
        mode: how the images are resized; cells of a letterbox cover its grey margin too, which is normal.

    Returns:
        [h,w] float32 in [0,1].
    """
    if rule not in ("any", "fraction"):
        raise ValueError(f'rule must be "any" or "fraction", got {rule!r}')
    if mode == "letterbox" and size is None:
        raise ValueError("a letterbox needs size, the image size of the run")
    area, cell = _anomalous_area(mask, grid, size or 1, mode)
    return (area > 0).astype(np.float32) if rule == "any" else (area / cell).astype(np.float32)


def mask_to_image(mask: np.ndarray, *, size: int, mode: Resize = "stretch") -> np.ndarray:
    """Bring a mask to the image size of a run for evaluation: anomalous where at least half of the area is.

    Args:
        mask: [H,W] bool, at its native size.
        size: S.
        mode: how the images are resized; the margin of a letterbox is normal.

    Returns:
        [S,S] bool.
    """
    area, cell = _anomalous_area(mask, (size, size), size, mode)
    return 2 * area >= cell


def _box(height: int, width: int, size: int, mode: Resize) -> tuple[int, int, int, int]:
    if mode not in ("stretch", "letterbox"):
        raise ValueError(f'resize must be "stretch" or "letterbox", got {mode!r}')
    return letterbox_box(height, width, size) if mode == "letterbox" else (0, 0, size, size)


def _anomalous_area(mask: np.ndarray, grid: tuple[int, int], size: int, mode: Resize) -> tuple[np.ndarray, int]:
    """Anomalous area of each cell, and the area of a cell: whole numbers of one unit, exact in float64 below 2^53."""
    if mask.ndim != 2 or mask.dtype != bool or 0 in mask.shape:
        raise ValueError(f"mask must be bool [H,W], at least one pixel, got {mask.dtype} {list(mask.shape)}")
    top, left, height, width = _box(*mask.shape, size, mode)
    rows = _overlaps(mask.shape[0], grid[0], start=top, length=height, total=size)
    columns = _overlaps(mask.shape[1], grid[1], start=left, length=width, total=size)
    from scipy import sparse

    area = _resampled(mask[..., None].astype(np.float64), sparse.csr_array(rows), sparse.csr_array(columns))[..., 0]
    return area, size * mask.shape[0] * size * mask.shape[1]


def _overlaps(n_in: int, n_out: int, *, start: int, length: int, total: int) -> np.ndarray:
    """Overlap [n_out, n_in] of cells and pixels along one axis, in units of 1 / (n_in n_out).

    The axis is `total` long and cut into n_out cells; the n_in pixels fill its part of `length` from `start` on.
    """
    pixels = start * n_in * n_out + np.arange(n_in + 1) * length * n_out
    cells = np.arange(n_out + 1)[:, None] * total * n_in
    overlap = np.minimum(pixels[1:], cells[1:]) - np.maximum(pixels[:-1], cells[:-1])
    return np.maximum(overlap, 0).astype(np.float64)


@functools.lru_cache(maxsize=64)
def _resize_matrix(n_in: int, n_out: int) -> Any:
    """`resize_weights`, sparse: an output has few inputs that carry weight."""
    from scipy import sparse  # a fifth of a second to import

    return sparse.csr_array(resize_weights(n_in, n_out))


def _resampled(values: np.ndarray, rows: Any, columns: Any) -> np.ndarray:
    """rows @ values @ columns.T in every channel of [H,W,c], for sparse matrices; C-contiguous.

    In one thread, since images are read in several, beside a network that wants every core: products of dense blocks
    by BLAS, which has threads of its own, take more of the processor.
    """
    for matrix in (rows, columns):
        length, other, channels = values.shape
        values = (matrix @ values.reshape(length, -1)).reshape(-1, other, channels).swapaxes(0, 1)
    return np.ascontiguousarray(values)


def _contents(source: Source, name: str | None) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, name or "image"
    if isinstance(source, Stored):
        return source.read(), name or source.name
    name = name or os.fspath(source)
    try:
        with open(source, "rb") as file:
            return file.read(), name
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Name the file in whatever goes wrong: Pillow's decoders raise a dozen kinds of exceptions on damaged files."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{name}: cannot be read as an image: {error or type(error).__name__}") from error


def _decode(data: bytes) -> tuple[np.ndarray, str]:
    """Samples [H,W] or [H,W,3] at the depth of the file, upright, and the format of the file."""
    _check_complete(data)
    image = _opened(data)
    file_format = image.format
    other_bytes = _other_bytes(image)
    samples = _samples(image)
    if other_bytes is not None:
        image = _opened(data)
        image.tile = other_bytes
        samples = samples.astype(np.uint16) << 8 | _samples(image)
    return samples, file_format


def _opened(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"not a PNG, JPEG, BMP or TIFF file, or without its header; begins {data[:12]!r}") from None
    # Pillow itself only warns up to twice its limit.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{image.width}x{image.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS}"
        )
    if image.format == "TIFF" and image.tag_v2.get(_TIFF_PLANES) == 2 and image.tile[0].codec_name == "raw":
        # Pillow takes each plane for 8 bits, whatever it is, and would return noise.
        if set(image.tag_v2[_TIFF_BITS]) != {8}:
            raise ValueError("an uncompressed TIFF in separate planes of more than 8 bits is not supported")
    return image


def _other_bytes(image: Image.Image) -> list | None:
    """For 16-bit colour, of which Pillow keeps the high byte: the same tiles read in the other byte order."""
    tiles = []
    for tile in image.tile:
        raw_mode = tile.args if isinstance(tile.args, str) else tile.args[0]
        match = re.fullmatch(r"(RGB[AX]?;16)([LBN])", str(raw_mode))
        if match is None:
            return None
        swapped = match[1] + {"L": "B", "B": "L", "N": _NATIVE_SWAPPED}[match[2]]
        tiles.append(tile._replace(args=swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:])))
    return tiles or None


def _samples(image: Image.Image) -> np.ndarray:
    """Decode; orientation applied, palette and colour model resolved, alpha dropped, depth kept."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "1":
        image = image.convert("L")
    if image.mode in ("L", "I", "F"):
        return np.asarray(image)
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "LA":
        return np.asarray(image)[..., 0]
    if image.mode in ("P", "PA"):
        # By way of RGBA: Pillow warns where a palette with transparency is converted to RGB.
        image = image.convert("RGBA")
    if image.mode in ("RGBX", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(f"colour model {image.mode} is not supported")
    return np.asarray(image)[..., :3]


def _to_uint8(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.uint8:
        return samples
    low, high = samples.min(), samples.max()
    if samples.dtype == np.float32:
        if not (low >= 0 and high <= 1):
            raise ValueError(f"float values must lie in 0..1, got {low:g}..{high:g}")
        return np.rint(samples * 255).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"32-bit integers must lie in 0..65535, as 16 bits, got {low}..{high}")
    # round(value / 257) in integers; 257 is odd, so there are no ties.
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _check_complete(data: bytes) -> None:
    """Find the truncation and damage that Pillow passes over."""
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data.startswith(b"BM") and len(data) < int.from_bytes(data[2:6], "little"):
        raise ValueError(f"truncated: {len(data)} bytes of {int.from_bytes(data[2:6], 'little')}")


def _check_png(data: bytes) -> None:
    """Walk the chunks up to IEND; checksums of the critical ones, whose names begin with a capital, must hold."""
    view = memoryview(data)
    position, kind = 8, b""
    while kind != b"IEND":
        if position + 12 > len(data):
            raise ValueError("truncated: ends before its IEND chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        name = kind.decode("latin-1")
        end = position + 12 + length
        if end > len(data):
            raise ValueError(f"truncated: ends within its {name} chunk, which begins at byte {position}")
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if kind[:1].isupper() and zlib.crc32(view[position + 4 : end - 4]) != checksum:
            raise ValueError(f"damaged: wrong checksum of its {name} chunk at byte {position}")
        position = end
