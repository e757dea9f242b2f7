"""Pictures of score maps for people: heat colours, and their overlay on the image, at the image's size.

Layout [*B, H, W] for maps, [H, W, 3] uint8 for images. One colour scale, fixed for a run: it reads score / threshold,
so a colour means the same in every image. Blue is below the threshold, pale yellow at it, red at twice the threshold
and above; an overlay shows nothing up to half the threshold. A good part therefore looks cold, whatever its own
highest value is: nothing is stretched to the range of one map.
"""

import io
import math
import os

import numpy as np
from PIL import Image

from pushpull_jax.workdir import write_bytes

# score / threshold and its colour, of ColorBrewer's diverging RdYlBu in 11 classes, reversed (colorbrewer2.org; safe
# for the common colour-vision deficiencies). Red minus blue rises throughout. The stops are ours: blue is kept up to
# 0.85, since good parts reach 0.5 to 0.8 and should look cold; the pale middle is the threshold.
_STOPS = np.array([0.0, 0.7, 0.85, 1.0, 1.5, 2.0])
_COLOURS = np.array(
    [[69, 117, 180], [116, 173, 209], [171, 217, 233], [255, 255, 191], [253, 174, 97], [215, 48, 39]], np.float64
)
# Around what lies above the threshold: the dark red end of the same palette.
CONTOUR = (165, 0, 38)
# Overlay: transparent up to half the threshold, so that a cold image stays as it is, full from 1.5 times it.
_FADE_IN = (0.5, 1.5)
# The shorter side, in pixels, for each pixel of a line's width: by eye, visible where an image is shown much reduced.
LINE_SIDE = 160


def heat_colours(maps: np.ndarray, *, threshold: float) -> np.ndarray:
    """Colour of every score: linear in score / threshold between fixed colours, from 0 (blue) to 2 (red).

    Args:
        maps: [*B, H, W], any real dtype; what is below 0 or above 2 thresholds, infinities too, gets the end's colour.
        threshold: the score at which the scale turns; finite and above 0.

    Returns:
        [*B, H, W, 3] uint8.

    Raises:
        ValueError: a map holds NaN or has fewer than two axes, or the threshold is not finite and above 0.
    """
    return np.rint(_colours(_relative(maps, threshold))).astype(np.uint8)


def css_gradient() -> str:
    """The colours of the heat scale as stops of a CSS gradient, from 0 to twice the threshold."""
    colours = heat_colours(np.linspace(0.0, 2.0, 41)[None], threshold=1.0)[0]
    return ", ".join("rgb({}, {}, {})".format(*colour) for colour in colours)


def fade_in(relative: np.ndarray) -> np.ndarray:
    """How far colours show in an overlay, 0 to 1, where the score is `relative` thresholds; any shape."""
    start, stop = _FADE_IN
    return np.clip((relative - start) / (stop - start), 0.0, 1.0)


def overlay(image: np.ndarray, score_map: np.ndarray, *, threshold: float, opacity: float = 0.6) -> np.ndarray:
    """The image under its heat colours, with a line around what lies above the threshold.

        out = (1 - a) image + a colour,    a = opacity * clip(score / threshold - 0.5, 0, 1)

    Args:
        image: [H, W, 3] uint8.
        score_map: [H, W], any real dtype.
        threshold: the score at which the scale turns; finite and above 0.
        opacity: of the hottest colours, 0 to 1; 0.6 was chosen by eye, so that a defect stays visible under its heat.

    Returns:
        [H, W, 3] uint8; where the score is at most half the threshold, and no line passes, the image as it was.

    Raises:
        ValueError: image and map differ in size, opacity is outside 0..1, or what `heat_colours` refuses.
    """
    _check_image(image)
    if np.shape(score_map) != image.shape[:2]:
        raise ValueError(f"score_map {np.shape(score_map)} must have the size of the image, {image.shape[:2]}")
    if not 0.0 <= opacity <= 1.0:
        raise ValueError(f"opacity must be in 0..1, got {opacity}")
    relative = _relative(score_map, threshold)
    alpha = opacity * fade_in(relative)[..., None]
    blended = np.rint((1.0 - alpha) * image + alpha * _colours(relative)).astype(np.uint8)
    return outline(blended, relative > 1.0, colour=CONTOUR)


def outline(image: np.ndarray, region: np.ndarray, *, colour: tuple[int, int, int]) -> np.ndarray:
    """Draw a line around a region, on the pixels just outside it, so that even a thin region stays visible.

    Args:
        image: [H, W, 3] uint8.
        region: [H, W] boolean; empty or full draws nothing.
        colour: red, green and blue, 0..255.

    Returns:
        [H, W, 3] uint8, a copy; the line is 1 pixel wide for each 160 pixels of the shorter side.

    Raises:
        ValueError: image and region differ in size, or have another dtype.
    """
    from scipy import ndimage  # a third of a second to import

    _check_image(image)
    if region.shape != image.shape[:2] or region.dtype != bool:
        expected = f"boolean with the size of the image, {image.shape[:2]}"
        raise ValueError(f"region {region.shape} {region.dtype} must be {expected}")
    drawn = image.copy()
    width = max(1, round(min(region.shape) / LINE_SIDE))
    drawn[ndimage.binary_dilation(region, iterations=width) & ~region] = colour
    return drawn


def save_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write a picture as PNG, whole or not at all: a file that was there before stays until the new one is complete.

    Args:
        path: the file; its folder must exist.
        array: [H, W, 3] or [H, W] uint8.
    """
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, "PNG")
    write_bytes(path, encoded.getvalue())


def _relative(maps: np.ndarray, threshold: float) -> np.ndarray:
    """maps / threshold in float64, checked."""
    if not (math.isfinite(threshold) and threshold > 0):
        raise ValueError(f"threshold must be finite and above 0, got {threshold}")
    maps = np.asarray(maps, np.float64)
    if maps.ndim < 2:
        raise ValueError(f"maps must be [*B, H, W], got shape {maps.shape}")
    missing = np.count_nonzero(np.isnan(maps))
    if missing:
        raise ValueError(f"maps: {missing} of {maps.size} values are NaN")
    return maps / threshold


def _colours(relative: np.ndarray) -> np.ndarray:
    return np.stack([np.interp(relative, _STOPS, channel) for channel in _COLOURS.T], axis=-1)


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be [H, W, 3] uint8, got {image.shape} {image.dtype}")
