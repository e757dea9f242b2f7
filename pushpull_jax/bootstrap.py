"""Confidence intervals of the metrics: what another draw of test images, from where these came, could have given.

A resample draws, with replacement, as many normal and as many anomalous images as there are; an interval lies between
two quantiles of a metric over the resamples (the percentile interval of Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, section 13.3). Pixels of an image stay together, as a histogram of it. N images, R resamples, G groups
of images or pixels of tied scores, from the highest. What another training would give is not in it: that is the
deviation over seeds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pushpull_jax.ranking import region_areas
from pushpull_jax.streaming_metrics import BINS, bins_of

LEVEL = 0.95
RESAMPLES = 1000  # of which 25 lie beyond either end
# Of four there are 35 different resamples, too few for a tail of 2.5 %; of five 126.
LEAST_IMAGES = 5
_BLOCK = 100  # resamples at a time: for a thousand groups some megabytes

Interval = tuple[float, float]


class ImageHistogram(NamedTuple):
    """The pixels of one image, by bins of `PixelHistogram`, without the empty ones: ten kilobytes for most maps."""

    bins: np.ndarray  # [K] uint16, rising
    normal: np.ndarray  # [K] uint32
    anomalous: np.ndarray  # [K] uint32
    overlap: np.ndarray  # [K] float32: the sum of 1 / |region| over the anomalous ones


def image_histogram(mask: np.ndarray, score_map: np.ndarray) -> ImageHistogram:
    """The histogram of one image.

    Args:
        mask: [H,W] bool.
        score_map: [H,W] float32, without NaN.
    """
    bins = bins_of(score_map)
    every = np.bincount(bins.ravel(), minlength=BINS)
    hit = bins[mask]
    anomalous = np.bincount(hit, minlength=BINS)
    overlap = np.bincount(hit, 1.0 / region_areas(mask[None]), minlength=BINS)
    kept = np.flatnonzero(every)
    normal = (every - anomalous)[kept].astype(np.uint32)
    return ImageHistogram(
        kept.astype(np.uint16), normal, anomalous[kept].astype(np.uint32), overlap[kept].astype(np.float32)
    )


def resampled_metrics(
    generator: np.random.Generator,
    labels: np.ndarray,
    scores: np.ndarray,
    histograms: Sequence[ImageHistogram | None],
    *,
    fpr_limit: float,
    resamples: int = RESAMPLES,
) -> dict[str, np.ndarray]:
    """Every metric of `metrics.image_metrics` and `pixel_metrics`, of resampled images.

    Args:
        generator: of the resamples; sets of images that are resampled apart need different ones.
        labels: [N] bool.
        scores: [N].
        histograms: [N]; None where the truth of the pixels is unknown.
        fpr_limit: of AU-PRO, in (0, 1].
        resamples: R.

    Returns:
        [R] float64 for each name; nan where there are fewer than `LEAST_IMAGES` of a kind that the metric needs. Those
        over pixels count the pixels of a bin as tied.
    """
    values = _of_images(labels, scores, _draws(generator, labels, resamples))
    known = np.array([histogram is not None for histogram in histograms], bool)
    pixels = [histogram for histogram in histograms if histogram is not None]
    return values | _of_pixels(pixels, _draws(generator, labels[known], resamples), fpr_limit=fpr_limit)


def intervals(resampled: Mapping[str, np.ndarray], *, level: float = LEVEL) -> dict[str, Interval]:
    """Percentile intervals.

    Args:
        resampled: [R] for each name.
        level: the share of resamples between the ends.

    Returns:
        The ends for each name; nan where a resample has no answer, or all have the same one: then they tell nothing.
    """
    ends = ((1 - level) / 2, (1 + level) / 2)
    found = {}
    for name, values in resampled.items():
        # Also where any is nan, which compares false.
        varies = np.ptp(values) > 1e-12
        found[name] = tuple(np.quantile(values, ends).tolist()) if varies else (math.nan, math.nan)
    return found


def separated_auroc_interval(labels: np.ndarray, scores: np.ndarray, *, level: float = LEVEL) -> Interval | None:
    """The interval of the AUROC where every anomalous image scores above every normal one; None where one does not.

    Resamples of such images all give 1. But k disjoint pairs, one image of each kind, are k independent trials of what
    the AUROC is the chance of, and all k succeeded: from ((1 - level) / 2)^(1 / k) to 1 (Clopper and Pearson, 1934), k
    the smaller number of images. It is wider than it need be, since there are more pairs than these.

    Args:
        labels: [N] bool.
        scores: [N].
        level: of confidence.
    """
    pairs = min(np.count_nonzero(labels), np.count_nonzero(~labels))
    if not pairs or scores[labels].min() <= scores[~labels].max():
        return None
    return (((1 - level) / 2) ** (1 / pairs), 1.0)


def _draws(generator: np.random.Generator, labels: np.ndarray, resamples: int) -> np.ndarray:
    """How often each image is in each resample: [R,N] float32; all 0 where there are too few of a kind."""
    counts = np.zeros((resamples, labels.size), np.float32)
    kinds = [np.flatnonzero(labels == label) for label in (False, True)]
    if min(kind.size for kind in kinds) >= LEAST_IMAGES:
        for kind in kinds:
            counts[:, kind] = generator.multinomial(kind.size, np.full(kind.size, 1 / kind.size), size=resamples)
    return counts


def _of_images(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(scores[order]) != 0))
    counts, labels = counts[:, order].astype(np.float64), labels[order]
    normal, anomalous = (np.add.reduceat(counts * (labels == kind), starts, axis=1) for kind in (False, True))
    return dict(zip(("image_auroc", "image_ap", "image_f1max"), _areas(normal, anomalous), strict=True))


def _of_pixels(histograms: list[ImageHistogram], counts: np.ndarray, *, fpr_limit: float) -> dict[str, np.ndarray]:
    names = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")
    if not any(histogram.anomalous.any() for histogram in histograms):
        return dict.fromkeys(names, np.full(len(counts), math.nan))
    tables = _tables(histograms)
    blocks = []
    for start in range(0, len(counts), _BLOCK):
        normal, anomalous, overlap = ((counts[start : start + _BLOCK] @ table).astype(np.float64) for table in tables)
        pro = _pro_area(normal, overlap, fpr_limit=fpr_limit)
        blocks.append(np.stack([*_areas(normal, anomalous), pro]))
    return dict(zip(names, np.concatenate(blocks, axis=1), strict=True))


def _tables(histograms: list[ImageHistogram]) -> list[np.ndarray]:
    """Normal and anomalous pixels and overlap by image and group, each [N,G] float32: bins, from the highest.

    Neighbouring bins without an anomalous pixel are one group: the curve is level there, and no metric sees a corner.
    """
    some = np.zeros((2, BINS), bool)  # whether any image has a pixel in the bin, and an anomalous one
    for histogram in histograms:
        some[0, histogram.bins] = True
        some[1, histogram.bins[histogram.anomalous > 0]] = True
    occupied = np.flatnonzero(some[0])[::-1]
    rises = some[1, occupied]
    group = np.zeros(BINS, np.intp)
    group[occupied] = np.cumsum(rises | np.append(False, rises[:-1]))
    size = int(group.max()) + 1
    tables = np.zeros((3, len(histograms), size), np.float32)
    for i, histogram in enumerate(histograms):
        for table, pixels in zip(tables, histogram[1:], strict=True):
            table[i] = np.bincount(group[histogram.bins], pixels, minlength=size)
    return list(tables)


def _areas(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUROC, average precision and best F1 of groups [R,G], from the highest: those of `ranking`, [R] each."""
    fp, tp = np.cumsum(normal, axis=1), np.cumsum(anomalous, axis=1)
    normal_total, total = fp[:, -1:], tp[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = np.sum(normal * (tp - anomalous / 2), axis=1) / (normal_total * total)[:, 0]
        precision = np.sum(anomalous * tp / np.maximum(tp + fp, 1), axis=1) / total[:, 0]
        f1 = np.max(2 * tp / (tp + fp + total), axis=1)
    return auroc, precision, f1


def _pro_area(normal: np.ndarray, overlap: np.ndarray, *, fpr_limit: float) -> np.ndarray:
    """AU-PRO of groups [R,G], from the highest: `ranking.pro_area`, [R]."""
    fp, covered = np.cumsum(normal, axis=1), np.cumsum(overlap, axis=1)
    limit = fpr_limit * fp[:, -1:]
    width = np.clip(limit - (fp - normal), 0, normal)  # the part of the group that the limit lets count
    heights = covered - overlap + overlap * width / np.maximum(normal, 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sum(width * heights, axis=1) / (limit * covered[:, -1:])[:, 0]
