"""Copies of one photograph that were re-encoded, resized or made a little brighter, among any number of images.

The perceptual hash of an image is its thumbnail, SIDE x SIDE x 3, as real numbers. Bits will not do: photographs of
aligned parts agree in nearly all of them (of 64 bits above the mean, half of all pairs of bottles of MVTec-AD differ in
none). The distance of two images is the root mean square, in grey levels of 0..255, of what a gain and an offset leave
of the difference of their thumbnails; no gain beyond 10 % and no offset beyond 10 levels is granted. Turned, mirrored
and cropped copies are not found.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pushpull_jax.data.images import resize_image

SIDE = 32
# The largest distance of copies by the side of the thumbnails that are compared, about an eighth of the image's: a
# coding error averages out over so many pixels. Copies of photographs of bottle, toothbrush and juice_bottle at 256 px
# (JPEG of quality 50 and more, half to double the size, 2 % brightness, and these together) were at most 1.4 apart at
# 32 and 1.0 at 16; different photographs 1.8 and 1.2 or more, but for one toothbrush that was photographed twice.
LARGEST_DISTANCE = {32: 1.5, 16: 1.1, 8: 0.5}
# Of this many images or more the median distance of two means something. Copies are nearer than a third of it, so that
# no two photographs of a flat surface are copies; and what is nearer than a twentieth is one.
_ENOUGH, _NEAR, _CERTAIN = 8, 1 / 3, 1 / 20
_GAIN, _OFFSET = 0.1, 10.0


class Pair(NamedTuple):
    """Two images by their places, first < second, and their distance."""

    first: int
    second: int
    distance: float


def thumbnail(image: np.ndarray) -> np.ndarray:
    """The perceptual hash of an image [H,W,3] uint8: [SIDE,SIDE,3] float16 in 0..255."""
    return resize_image(image, size=SIDE).astype(np.float16)


def near_duplicates(thumbnails: np.ndarray, sides: Sequence[int], groups: Sequence[int] | None = None) -> list[Pair]:
    """Find images that are copies of one photograph: of each image the nearest before it, in each group.

    All pairs are compared in thumbnails that are reduced first, where a distance is never larger; what is near there is
    verified at 32 x 32, or at 16 x 16 and 8 x 8 where one of two images has a shorter side below 192 and 96 pixels.

    Args:
        thumbnails: [N,SIDE,SIDE,3] of `thumbnail`, of one category.
        sides: [N], the shorter side of each image in pixels.
        groups: [N], as 0 for training and 1 for test images; None: one group. The frames of a film are pairs by the
            million, of which N for each group are kept.

    Returns:
        Pairs within LARGEST_DISTANCE, sorted; see above for what the usual distance changes of it.
    """
    if len(thumbnails) < 2:
        return []
    levels = np.where(np.asarray(sides) >= 192, 32, np.where(np.asarray(sides) >= 96, 16, 8))
    usual = _usual_distance(thumbnails)
    largest = {side: _largest(distance, usual) for side, distance in LARGEST_DISTANCE.items()}
    coarse = _Normalised(_reduced(thumbnails, min(16, int(levels.min()))))
    groups = np.zeros(len(thumbnails), int) if groups is None else np.asarray(groups, int)
    # Of each image, for each group, the nearest so far.
    nearest = np.full((len(thumbnails), groups.max() + 1), np.inf)
    partner = np.full(nearest.shape, -1)
    for first, second, bound in _near(coarse, max(largest.values())):
        nearer = bound < nearest[second, groups[first]]
        first, second = first[nearer], second[nearer]
        compared = np.minimum(levels[first], levels[second])
        for side in np.unique(compared):
            chosen = np.flatnonzero(compared == side)
            distance = _distances(thumbnails, first[chosen], second[chosen], int(side))
            for place in np.flatnonzero(distance <= largest[int(side)]):
                key = second[chosen[place]], groups[first[chosen[place]]]
                if distance[place] < nearest[key]:
                    nearest[key], partner[key] = distance[place], first[chosen[place]]
    found = np.argwhere(partner >= 0)
    return sorted(Pair(int(partner[key]), int(key[0]), float(nearest[key])) for key in map(tuple, found))


class _Normalised:
    """Vectors [N,D] without their mean, of length 1; with their mean and deviation."""

    def __init__(self, vectors: np.ndarray):
        self.mean = vectors.mean(axis=1)
        centred = vectors - self.mean[:, None]
        self.deviation = np.sqrt(np.square(centred).mean(axis=1))
        self.unit = centred / np.maximum(self.deviation, 1e-6)[:, None] / np.sqrt(vectors.shape[1])

    def __getitem__(self, chosen) -> tuple[np.ndarray, np.ndarray]:
        return self.mean[chosen], self.deviation[chosen]


def _usual_distance(thumbnails: np.ndarray) -> float | None:
    """The median distance of two images; None where they are few."""
    if len(thumbnails) < _ENOUGH:
        return None
    rng = np.random.default_rng(0)  # a fixed sample: the same data, the same pairs
    first, second = rng.integers(0, len(thumbnails), (2, 1000))
    apart = first != second
    return float(np.median(_distances(thumbnails, first[apart], second[apart], SIDE, limit=False)))


def _largest(distance: float, usual: float | None) -> float:
    return distance if usual is None else min(max(distance, _CERTAIN * usual), _NEAR * usual)


def _near(coarse: _Normalised, largest: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs that are near in the small thumbnails, and how near, some at a time so that memory stays bounded."""
    count = len(coarse.unit)
    rows = max(1, 2**22 // count)
    for start in range(0, count, rows):
        block = slice(start, min(start + rows, count))
        correlation = coarse.unit[block] @ coarse.unit[start:].T
        mine, others = coarse[block], coarse[slice(start, None)]
        distance = _distance(correlation, [part[:, None] for part in mine], others)
        first, second = np.nonzero(np.triu(distance <= largest, 1))
        # A few at a time: their thumbnails are compared whole.
        for part in range(0, len(first), 2**10):
            pairs = first[part : part + 2**10], second[part : part + 2**10]
            yield pairs[0] + start, pairs[1] + start, distance[pairs]


def _distances(
    thumbnails: np.ndarray, first: np.ndarray, second: np.ndarray, side: int, *, limit: bool = True
) -> np.ndarray:
    one, other = (_Normalised(_reduced(thumbnails[chosen], side)) for chosen in (first, second))
    correlation = np.einsum("nd,nd->n", one.unit, other.unit)
    return _distance(correlation, one[:], other[:], limit=limit)


def _distance(correlation: np.ndarray, one, other, *, limit: bool = True) -> np.ndarray:
    """The smaller residual of fitting either image to the other; infinite beyond the gain and offset that are granted.

    Reducing thumbnails never makes it larger: the residual of the fit is reduced with them.
    """
    (mean, deviation), (other_mean, other_deviation) = one, other
    smaller, larger = np.minimum(deviation, other_deviation), np.maximum(deviation, other_deviation)
    residual = smaller * np.sqrt(np.clip(1 - np.square(correlation), 0, None))
    if not limit:
        return residual
    granted = (larger <= (1 + _GAIN) * smaller + 1) & (np.abs(mean - other_mean) <= _OFFSET)
    return np.where(granted & ((correlation > 0) | (larger < 1)), residual, np.inf)


def _reduced(thumbnails: np.ndarray, side: int) -> np.ndarray:
    """[N,SIDE,SIDE,3] -> [N,side*side*3] float32, means of blocks."""
    block = SIDE // side
    parts = thumbnails.astype(np.float32).reshape(len(thumbnails), side, block, side, block, 3)
    return parts.mean(axis=(2, 4)).reshape(len(thumbnails), -1)
