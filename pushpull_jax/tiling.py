"""Large images in tiles: each is scored like an image of its own, and their maps are joined at native size.

Tiles overlap. Where they do, the map is their mean, weighted by the distance from the edge of the tile, so that no seam
shows; the score of the image is that of its worst tile. A detector has to be trained, or at least calibrated, on images
that show parts as large as its tiles do.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pushpull_jax.batching import BATCH_SIZE
from pushpull_jax.data.images import resize_image
from pushpull_jax.detector import Detector

# Share of a tile that the next one shows too: a defect of up to this share of a tile is whole in one of them.
OVERLAP = 0.25


class Tile(NamedTuple):
    """A part of an image, in native pixels."""

    rows: slice
    columns: slice


def tiles(height: int, width: int, *, side: int) -> list[Tile]:
    """The fewest tiles that cover an image, row by row; none reaches beyond it, and a short axis is not cut.

    Args:
        height: H of the image.
        width: W of the image.
        side: of a tile, in native pixels, at least 1.
    """
    rows, columns = _parts(height, side), _parts(width, side)
    return [Tile(row, column) for row in rows for column in columns]


def _parts(length: int, side: int) -> list[slice]:
    """Parts of an axis, evenly spread, each at least OVERLAP of its side into the one before."""
    if length <= side:
        return [slice(0, length)]
    count = math.ceil((length - side) / max(1, math.floor(side * (1 - OVERLAP)))) + 1
    starts = np.linspace(0, length - side, count).round().astype(int).tolist()
    return [slice(start, start + side) for start in starts]


class Part(NamedTuple):
    """What a detector says of a tile."""

    tile: Tile
    score: float
    map: np.ndarray  # [S,S] float32


def detect_parts(detector: Detector, image: np.ndarray, *, side: int | None) -> Iterator[Part]:
    """Score and map of each tile of an image, a few at a time.

    Args:
        detector: what scores a tile.
        image: [H,W,3] uint8.
        side: of a tile, in native pixels; None: the whole image is the only one.
    """
    network, parts = detector.network, tiles(*image.shape[:2], side=side or max(image.shape[:2]))
    for first in range(0, len(parts), BATCH_SIZE):
        some = parts[first : first + BATCH_SIZE]
        resized = [resize_image(image[tile], size=network.image_size, mode=network.resize) for tile in some]
        scores, maps = detector.detect_resized(np.stack(resized))
        yield from map(Part, some, scores.tolist(), maps)


def detect_tiles(detector: Detector, image: np.ndarray, *, side: int) -> tuple[float, np.ndarray]:
    """Score of the worst tile of an image, and the joined map [H,W] float32; see `detect_parts`."""
    total, weight = np.zeros(image.shape[:2], np.float32), np.zeros(image.shape[:2], np.float32)
    worst = -math.inf
    for part in detect_parts(detector, image, side=side):
        shape = total[part.tile].shape
        weights = np.minimum.outer(*map(_from_edge, shape)).astype(np.float32)
        total[part.tile] += weights * detector.to_native(part.map, shape)
        weight[part.tile] += weights
        worst = max(worst, part.score)
    return worst, total / weight


def _from_edge(length: int) -> np.ndarray:
    """Distance of the pixels of an axis from its nearer end, in lengths: above 0, at most 1/2."""
    centres = (np.arange(length) + 0.5) / length
    return np.minimum(centres, 1 - centres)
