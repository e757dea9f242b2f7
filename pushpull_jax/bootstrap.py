"""Confidence intervals of the metrics: what another draw of test images, from where these came, could have given.

A resample draws, with replacement, as many normal and as many anomalous images as there are; an interval lies between
two quantiles of a metric over the resamples, corrected for bias and acceleration (BCa: Efron, Better Bootstrap
Confidence Intervals, 1987; for two samples Davison and Hinkley, Bootstrap Methods, 1997, section 5.3.2). Pixels of an
image stay together, as a histogram of it. N images, R resamples, W weightings of the images, G groups of images or
pixels of tied scores, from the highest. What another training would give is not in it: see the deviation over seeds.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from pushpull_jax.ranking import region_areas
from pushpull_jax.streaming_metrics import BINS, bins_of

LEVEL = 0.95
RESAMPLES = 1000  # of which 25 lie beyond either end
# Of four there are 35 different resamples, too few for a tail of 2.5 %; of five 126.
LEAST_IMAGES = 5
# The acceleration takes each image away in turn. It falls as 1 / sqrt(N), and is left out where that takes too long.
_MOST_LEFT_OUT = 2000
_BLOCK = 100  # weightings at a time: for a thousand groups some megabytes
_NORMAL = NormalDist()

Interval = tuple[float, float]


class ImageHistogram(NamedTuple):
    """The pixels of one image, by bins of `PixelHistogram`, without the empty ones: ten kilobytes for most maps."""

    bins: np.ndarray  # [K] uint16, rising
    normal: np.ndarray  # [K] uint32
    anomalous: np.ndarray  # [K] uint32
    overlap: np.ndarray  # [K] float32: the sum of 1 / |region| over the anomalous ones


class Resampled(NamedTuple):
    """A metric of one set of images, and of what was made of it."""

    value: float  # of the set
    influence: np.ndarray  # [N]: by how much each image raises it, over the images of its kind; [0] where N is large
    drawn: np.ndarray  # [R]: of the resamples


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
) -> dict[str, Resampled]:
    """Every metric of `metrics.image_metrics` and `pixel_metrics`, of resampled images.

    Args:
        generator: of the resamples; sets of images that are resampled apart need different ones.
        labels: [N] bool.
        scores: [N].
        histograms: [N]; None where the truth of the pixels is unknown.
        fpr_limit: of AU-PRO, in (0, 1].
        resamples: R.

    Returns:
        For each name the metric, those over pixels with the pixels of a bin tied; the resamples are nan where there are
        fewer than `LEAST_IMAGES` of a kind that it needs.
    """
    weights = _weights(generator, labels, resamples)
    found = {name: _parted(values, labels, resamples) for name, values in _of_images(labels, scores, weights).items()}
    known = np.array([histogram is not None for histogram in histograms], bool)
    pixels = [histogram for histogram in histograms if histogram is not None]
    values = _of_pixels(pixels, _weights(generator, labels[known], resamples), fpr_limit=fpr_limit)
    return found | {name: _parted(own, labels[known], resamples) for name, own in values.items()}


def mean_of(parts: Sequence[Mapping[str, Resampled]]) -> dict[str, Resampled]:
    """The means of metrics over several sets of images, which were resampled apart.

    A set in perfect order does not vary, so that intervals of the mean are too short where many are.
    """
    return {
        name: Resampled(
            float(np.mean([part[name].value for part in parts])),
            np.concatenate([part[name].influence for part in parts]) / len(parts),
            np.mean([part[name].drawn for part in parts], axis=0),
        )
        for name in parts[0]
    }


def intervals(resampled: Mapping[str, Resampled], *, level: float = LEVEL) -> dict[str, Interval]:
    """The BCa interval of each metric.

    With z0 = Phi^-1(share of resamples below the value, ties half), the acceleration a = sum l^3 / (6 (sum l^2)^1.5)
    over the influences l, and z = z0 + Phi^-1((1 -+ level) / 2), an end is the quantile Phi(z0 + z / (1 - a z)).

    Args:
        resampled: of each metric, by name.
        level: how often intervals hold the truth, for many images.

    Returns:
        The ends for each name; nan where a resample has no answer, or all have the same one: then they tell nothing.
    """
    return {name: _interval(own, level) for name, own in resampled.items()}


def _interval(resampled: Resampled, level: float) -> Interval:
    value, influence, drawn = resampled
    if not np.ptp(drawn) > 1e-12:  # also where any is nan, which compares false
        return (math.nan, math.nan)
    below = np.mean(drawn < value - 1e-12) + np.mean(np.abs(drawn - value) <= 1e-12) / 2
    bias = _NORMAL.inv_cdf(float(np.clip(below, 1 / drawn.size, 1 - 1 / drawn.size)))
    spread = np.sum(influence**2) ** 1.5
    acceleration = float(np.sum(influence**3) / (6 * spread)) if spread else 0.0
    shares = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = bias + _NORMAL.inv_cdf(tail)
        stretch = 1 - acceleration * z
        # Where it is not positive, the limit is passed at which the quotient is infinite.
        shares.append(_NORMAL.cdf(bias + z / stretch) if stretch > 0 else float(z > 0))
    return tuple(np.quantile(drawn, shares).tolist())


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


def _weights(generator: np.random.Generator, labels: np.ndarray, resamples: int) -> np.ndarray:
    """How often each image counts: [W,N] float32, first all once, then without each in turn, then the R resamples."""
    count = labels.size
    without = 1 - np.eye(count, dtype=np.float32) if count <= _MOST_LEFT_OUT else np.zeros((0, count), np.float32)
    return np.concatenate((np.ones((1, count), np.float32), without, _draws(generator, labels, resamples)))


def _parted(values: np.ndarray, labels: np.ndarray, resamples: int) -> Resampled:
    """The values [W] of a metric under `_weights`."""
    without = values[1:-resamples]
    influence = np.zeros(without.size)
    if without.size:
        for kind in (labels, ~labels):
            own = without[kind]
            influence[kind] = (own.mean() - own) * (own.size - 1) / own.size if own.size else 0.0
    return Resampled(float(values[0]), influence, values[-resamples:])


def _draws(generator: np.random.Generator, labels: np.ndarray, resamples: int) -> np.ndarray:
    """How often each image is in each resample: [R,N] float32; all 0 where there are too few of a kind."""
    counts = np.zeros((resamples, labels.size), np.float32)
    kinds = [np.flatnonzero(labels == label) for label in (False, True)]
    if min(kind.size for kind in kinds) >= LEAST_IMAGES:
        for kind in kinds:
            counts[:, kind] = generator.multinomial(kind.size, np.full(kind.size, 1 / kind.size), size=resamples)
    return counts


def _of_images(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(scores[order]) != 0))
    weights, labels = weights[:, order].astype(np.float64), labels[order]
    normal, anomalous = (np.add.reduceat(weights * (labels == kind), starts, axis=1) for kind in (False, True))
    return dict(zip(("image_auroc", "image_ap", "image_f1max"), _areas(normal, anomalous), strict=True))


def _of_pixels(histograms: list[ImageHistogram], weights: np.ndarray, *, fpr_limit: float) -> dict[str, np.ndarray]:
    names = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")
    if not any(histogram.anomalous.any() for histogram in histograms):
        return dict.fromkeys(names, np.full(len(weights), math.nan))
    tables = _tables(histograms)
    blocks = []
    for start in range(0, len(weights), _BLOCK):
        normal, anomalous, overlap = ((weights[start : start + _BLOCK] @ table).astype(np.float64) for table in tables)
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
    """AUROC, average precision and best F1 of groups [W,G], from the highest: those of `ranking`, [W] each."""
    fp, tp = np.cumsum(normal, axis=1), np.cumsum(anomalous, axis=1)
    normal_total, total = fp[:, -1:], tp[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = np.sum(normal * (tp - anomalous / 2), axis=1) / (normal_total * total)[:, 0]
        precision = np.sum(anomalous * tp / np.maximum(tp + fp, 1), axis=1) / total[:, 0]
        f1 = np.max(2 * tp / (tp + fp + total), axis=1)
    return auroc, precision, f1


def _pro_area(normal: np.ndarray, overlap: np.ndarray, *, fpr_limit: float) -> np.ndarray:
    """AU-PRO of groups [W,G], from the highest: `ranking.pro_area`, [W]."""
    fp, covered = np.cumsum(normal, axis=1), np.cumsum(overlap, axis=1)
    limit = fpr_limit * fp[:, -1:]
    width = np.clip(limit - (fp - normal), 0, normal)  # the part of the group that the limit lets count
    heights = covered - overlap + overlap * width / np.maximum(normal, 1) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sum(width * heights, axis=1) / (limit * covered[:, -1:])[:, 0]
