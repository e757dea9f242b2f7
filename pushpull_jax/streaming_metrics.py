"""Metrics over the pixels of images that come batch by batch: exact ones, and ones of bounded memory with their bounds.

`ExactPixels` keeps every score, 4 bytes a pixel, and gives the numbers of `metrics`. `PixelHistogram` keeps a histogram
of 65,536 bins, whatever comes: the upper 16 bits of a float32, read as an integer that has the order of the scores, so
that there is no range to know and a bin is 0.8 % wide at most (sign, exponent and 7 of 23 bits of the fraction). Both
are values: `update` returns a new one, and a sum is what one would hold that had seen the images of both.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from numpy.typing import ArrayLike

from pushpull_jax import metrics, ranking
from pushpull_jax.ranking import Groups

BINS = 2**16


@dataclass(frozen=True, eq=False)
class ExactPixels:
    """Every score seen, in the dtype it came in; memory grows with the images."""

    normal: tuple[np.ndarray, ...] = ()  # of each update [N]
    anomalous: tuple[np.ndarray, ...] = ()  # of each update [A]
    areas: tuple[np.ndarray, ...] = ()  # of each update [A]: pixels of the region that each of those belongs to

    def update(self, masks: ArrayLike, maps: ArrayLike) -> "ExactPixels":
        """With some more images, which may be none. Args: those of `metrics.pixel_metrics`."""
        masks, maps = ranking.checked("masks", masks, "maps", maps, "[N,H,W]")
        return self + ExactPixels((maps[~masks],), (maps[masks],), (ranking.region_areas(masks),))

    def __add__(self, other: "ExactPixels") -> "ExactPixels":
        return ExactPixels(self.normal + other.normal, self.anomalous + other.anomalous, self.areas + other.areas)

    @property
    def has_regions(self) -> bool:
        """Whether any pixel seen is anomalous."""
        return any(part.size for part in self.anomalous)

    def metrics(self, *, fpr_limit: float = 0.3) -> dict[str, float]:
        """Those of `metrics.pixel_metrics`, of all images seen."""
        ranking.check_fpr_limit(fpr_limit)
        return metrics.measure_pixels(self._groups, fpr_limit=fpr_limit, stacklevel=3)

    def roc_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """That of `metrics.roc_curve`."""
        return _curve(self._groups, self._groups.anomalous)

    def pro_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """That of `metrics.pro_curve`."""
        return _curve(self._groups, self._groups.overlap)

    @cached_property
    def _groups(self) -> Groups:
        none = np.zeros(0, np.float32)
        normal, anomalous = (np.concatenate(parts or (none,)) for parts in (self.normal, self.anomalous))
        return ranking.group_scores(normal, anomalous, np.concatenate(self.areas or (np.zeros(0, np.int32),)))


_no_pixels = partial(np.zeros, BINS, np.int64)


@dataclass(frozen=True, eq=False)
class PixelHistogram:
    """How many pixels of each kind fall in each bin, from the lowest: 1.5 MB however many images are seen.

    Metrics count the pixels of a bin as tied. The curve through the ends of the bins is exact there, and both it and
    the exact curve rise within the rectangle that a bin spans; `bounds` sums what can go wrong in them.
    """

    normal: np.ndarray = field(default_factory=_no_pixels)  # [BINS]
    anomalous: np.ndarray = field(default_factory=_no_pixels)  # [BINS]
    # [BINS]: the sum of 1 / |region| over the anomalous ones
    overlap: np.ndarray = field(default_factory=partial(np.zeros, BINS, np.float64))

    def update(self, masks: ArrayLike, maps: ArrayLike) -> "PixelHistogram":
        """With some more images, which may be none. Args: those of `metrics.pixel_metrics`."""
        masks, maps = ranking.checked("masks", masks, "maps", maps, "[N,H,W]")
        normal, anomalous, overlap = self.normal.copy(), self.anomalous.copy(), self.overlap.copy()
        for mask, values in zip(masks, maps, strict=True):  # one at a time, for the temporaries' sake
            bins = bins_of(values)
            hit = bins[mask]
            hits = np.bincount(hit, minlength=BINS)
            normal += np.bincount(bins.ravel(), minlength=BINS) - hits
            anomalous += hits
            overlap += np.bincount(hit, 1.0 / ranking.region_areas(mask[None]), minlength=BINS)
        return PixelHistogram(normal, anomalous, overlap)

    def __add__(self, other: "PixelHistogram") -> "PixelHistogram":
        return PixelHistogram(
            self.normal + other.normal, self.anomalous + other.anomalous, self.overlap + other.overlap
        )

    @property
    def has_regions(self) -> bool:
        """Whether any pixel seen is anomalous."""
        return bool(self.anomalous.any())

    def metrics(self, *, fpr_limit: float = 0.3) -> dict[str, float]:
        """Those of `metrics.pixel_metrics`, each within its bound of the exact one."""
        ranking.check_fpr_limit(fpr_limit)
        return metrics.measure_pixels(self._groups, fpr_limit=fpr_limit, stacklevel=3)

    def roc_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """That of `metrics.roc_curve`, with corners at the ends of bins alone."""
        return _curve(self._groups, self._groups.anomalous)

    def pro_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """That of `metrics.pro_curve`, with corners at the ends of bins alone."""
        return _curve(self._groups, self._groups.overlap)

    def bounds(self, *, fpr_limit: float = 0.3) -> dict[str, float]:
        """How far each of `metrics` can be from the exact one, on these data; rounding aside.

        Bin b holds n of N normal and p of P anomalous pixels and the share w of all regions; TP0, FP0 are counted above
        it, TP1 = TP0 + p and FP1 = FP0 + n with it. The exact curve goes from corner to corner of that rectangle in
        any way that rises, ours along its diagonal:

            pixel_auroc     sum_b (n / N) (p / P) / 2
            aupro           sum_b (n / N) w / 2 / limit over the bins above the limit; (m / N) w (1 - m / (2 n)) / limit
                            for the bin that crosses it, of whose n pixels m lie before the limit
            pixel_ap        ours counts p precisions TP1 / (TP1 + FP1). None exceeds TP1 / (TP1 + FP0), and that of the
                            i-th is at least (TP0 + i) / (TP0 + i + FP1), all of them together at least
                            p - FP1 log((TP1 + FP1) / (TP0 + FP1)); the farther of the two, summed, over P
            pixel_f1max     no threshold within a bin exceeds 2 TP1 / (TP1 + FP0 + P): the largest of those less ours

        Pixels that are truly tied are in one bin too, and count as if they were not: for a constant map the bound of
        the AUROC is 0.5 and its error 0.

        Args:
            fpr_limit: in (0, 1].

        Returns:
            A float for each name of `metrics`; nan where those are.
        """
        ranking.check_fpr_limit(fpr_limit)
        groups = self._groups
        normal, anomalous = groups.normal_total, groups.anomalous_total
        if not (normal and anomalous):
            return dict.fromkeys(("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"), math.nan)
        n, p = groups.tied.astype(np.float64), groups.anomalous.astype(np.float64)
        fp1, tp1 = np.cumsum(n), np.cumsum(p)
        fp0, tp0 = fp1 - n, tp1 - p
        before = np.clip(fpr_limit * normal - fp0, 0, n)  # the part of the bin that the limit lets count
        # The part of the rectangle above the diagonal: as large as that below it, or larger where the limit cuts it.
        off = before * groups.overlap * (1 - before / (2 * np.maximum(n, 1)))
        some = p > 0
        fp0, fp1, tp0, tp1, p = (values[some] for values in (fp0, fp1, tp0, tp1, p))
        ours = p * tp1 / (tp1 + fp1)
        least = p - fp1 * np.log1p(p / np.maximum(tp0 + fp1, 1))
        most = p * tp1 / (tp1 + fp0)
        best = np.max(2 * tp1 / (tp1 + fp0 + anomalous))
        return {
            "pixel_auroc": float(np.sum(n[some] * p) / (2 * normal * anomalous)),
            "pixel_ap": float(np.sum(np.maximum(ours - least, most - ours)) / anomalous),
            "pixel_f1max": float(best) - ranking.best_f1(groups),
            "aupro": float(np.sum(off) / (fpr_limit * normal * groups.overlap.sum())),
        }

    @property
    def _groups(self) -> Groups:
        none_between = np.zeros(BINS, np.int64)
        return Groups(none_between, self.normal[::-1], self.anomalous[::-1], self.overlap[::-1], 0)


def bins_of(scores: np.ndarray) -> np.ndarray:
    """The bin of each score: uint16, rising with it."""
    with np.errstate(over="ignore"):  # beyond float32 is infinite, in the order it had
        values = scores.astype(np.float32) + np.float32(0)  # -0.0 becomes 0.0, to which it is equal
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    return np.where(upper >> 15, ~upper, upper | np.uint16(0x8000))


def _curve(groups: Groups, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    metrics.warn_if_one_class(groups, stacklevel=4)
    return ranking.whole_curve(groups, heights)
