"""Detection and localisation metrics on the host: AUROC, average precision, best F1 and AU-PRO, each a float in [0, 1].

Truth comes first and scores second, of one shape: labels [N] or masks [N,H,W], 1 anomalous. A missing class gives nan
and a DegenerateInputWarning; other shapes, truth other than 0 and 1, and NaN scores are a ValueError. Nothing is
clamped, binned, flipped or fitted. Every score is sorted once, in the dtype it comes in: normal ones apart from
anomalous ones, which alone move the curve that every metric is a sum over (`ranking`). A call on float32 maps takes
less than 8 times their memory, the arguments included.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from pushpull_jax import ranking
from pushpull_jax.ranking import Groups, checked


class DegenerateInputWarning(UserWarning):
    """A metric is undefined on this input, because one of the two classes is missing, and nan is returned."""


def image_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve over images: P(anomalous > normal) + P(anomalous = normal) / 2.

    Args:
        labels: [N], boolean or 0/1.
        scores: [N], any real dtype; infinities are allowed.

    Returns:
        The area; nan, with a warning, where a class is missing.
    """
    return _measure(_images(labels, scores), ranking.roc_area)[0]


def pixel_auroc(masks: ArrayLike, maps: ArrayLike) -> float:
    """Area under the ROC curve over the pixels of all images together.

    Args:
        masks: [N,H,W], boolean or 0/1.
        maps: [N,H,W], any real dtype; infinities are allowed.

    Returns:
        The area; nan, with a warning, where a class is missing.
    """
    return _measure(_pixels("masks", masks, "maps", maps, "[N,H,W]"), ranking.roc_area)[0]


def average_precision(truth: ArrayLike, scores: ArrayLike) -> float:
    """Average precision, sum_t (R_t - R_{t-1}) P_t over the distinct scores t from the highest (scikit-learn's sum).

    Args:
        truth: labels or masks of any shape, boolean or 0/1.
        scores: the same shape, any real dtype; infinities are allowed.

    Returns:
        The average precision; nan, with a warning, where a class is missing.
    """
    return _measure(_pixels("truth", truth, "scores", scores), ranking.mean_precision)[0]


def f1_max(truth: ArrayLike, scores: ArrayLike) -> float:
    """Best F1 = 2 TP / (2 TP + FP + FN) over all thresholds: an upper bound fitted on the truth, not a verdict's F1.

    Args:
        truth: labels or masks of any shape, boolean or 0/1.
        scores: the same shape, any real dtype; infinities are allowed.

    Returns:
        The best F1; nan, with a warning, where a class is missing.
    """
    return _measure(_pixels("truth", truth, "scores", scores), ranking.best_f1)[0]


def aupro(masks: ArrayLike, maps: ArrayLike, *, fpr_limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, divided by that rate.

        PRO(t) = mean over regions r of |{u in r: s(u) >= t}| / |r|,    AU-PRO = (1/limit) int_0^limit PRO dFPR

    (Bergmann et al., CVPR 2019.) One curve over all images. Regions are 8-connected within an image and weigh equally;
    FPR is over all normal pixels, those of defective images included. The curve starts at (0, 0), has a vertex for
    each distinct score and is linear between them, at the limit too: a constant map gives fpr_limit / 2.

    Args:
        masks: [N,H,W], boolean or 0/1.
        maps: [N,H,W], any real dtype; infinities are allowed.
        fpr_limit: in (0, 1]; 0.3 is that paper's.

    Returns:
        The normalised area; nan, with a warning, where there is no region or no normal pixel.

    Raises:
        ValueError: fpr_limit is outside (0, 1], beside what every metric refuses.
    """
    ranking.check_fpr_limit(fpr_limit)
    return _measure(_regions(masks, maps), partial(ranking.pro_area, fpr_limit=fpr_limit))[0]


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """All metrics over images: image_auroc, image_ap and image_f1max, as the single functions.

    Args: those of `image_auroc`.

    Returns:
        A float for each name; all nan, with one warning, where a class is missing.
    """
    values = _measure(_images(labels, scores), ranking.roc_area, ranking.mean_precision, ranking.best_f1)
    return dict(zip(("image_auroc", "image_ap", "image_f1max"), values, strict=True))


def pixel_metrics(masks: ArrayLike, maps: ArrayLike, *, fpr_limit: float = 0.3) -> dict[str, float]:
    """All metrics over pixels: pixel_auroc, pixel_ap, pixel_f1max and aupro, as the single functions, from one sort.

    Args, Raises: those of `aupro`.

    Returns:
        A float for each name; all nan, with one warning, where a class is missing.
    """
    ranking.check_fpr_limit(fpr_limit)
    return measure_pixels(_regions(masks, maps), fpr_limit=fpr_limit, stacklevel=3)


def roc_curve(truth: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The ROC curve by its corners, from the highest score.

    It has a corner for each distinct score of the anomalous, and one where the normal ones above that score end: what
    lies between two of them is straight, whatever its scores are.

    Args: those of `average_precision`.

    Returns:
        fpr and tpr, each [corners] float64, from (0, 0) to (1, 1). The rate of a missing class is nan, with a warning.
    """
    groups = _pixels("truth", truth, "scores", scores)
    warn_if_one_class(groups, stacklevel=3)
    return ranking.whole_curve(groups, groups.anomalous)


def pro_curve(masks: ArrayLike, maps: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The per-region-overlap curve of `aupro` over all rates, by its corners as those of `roc_curve`.

    Args: those of `pixel_auroc`.

    Returns:
        fpr and pro, each [corners] float64, from (0, 0) to (1, 1). The rate of a missing class is nan, with a warning.
    """
    groups = _regions(masks, maps)
    warn_if_one_class(groups, stacklevel=3)
    return ranking.whole_curve(groups, groups.overlap)


def thin_curve(x: np.ndarray, y: np.ndarray, *, points: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Some vertices of a rising curve, for plotting: evenly spread along x + y, both ends among them.

    With step = (rise of x + rise of y) / (points - 1), every vertex left out lies within a step, in |dx| + |dy|, of
    the vertex kept before it.

    Args:
        x, y: [P], neither falling anywhere.
        points: how many vertices to keep at most, 2 or more.

    Returns:
        The kept x and y, each [at most points].

    Raises:
        ValueError: the shapes differ or are not [P], or points is below 2.
    """
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"x {x.shape} and y {y.shape} must have the same shape [P]")
    if points < 2:
        raise ValueError(f"points must be 2 or more to keep both ends, got {points}")
    if x.size <= points:
        return x, y
    length = x + y
    kept = np.searchsorted(length, np.linspace(length[0], length[-1], points)[1:-1])
    kept = np.unique(np.concatenate(([0], kept, [x.size - 1])))
    return x[kept], y[kept]


def measure_pixels(groups: Groups, *, fpr_limit: float, stacklevel: int = 2) -> dict[str, float]:
    """`pixel_metrics` of pixels that are grouped already.

    Args:
        groups: with overlaps.
        fpr_limit: in (0, 1].
        stacklevel: whom the warning blames, 1 being this function.
    """
    areas = (ranking.roc_area, ranking.mean_precision, ranking.best_f1, partial(ranking.pro_area, fpr_limit=fpr_limit))
    values = _measure(groups, *areas, stacklevel=stacklevel + 2)
    return dict(zip(("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"), values, strict=True))


def warn_if_one_class(groups: Groups, *, stacklevel: int) -> bool:
    """Whether a class is missing; then also a DegenerateInputWarning that names it."""
    counts = {"anomalous": groups.anomalous_total, "normal": groups.normal_total}
    missing = " or ".join(name for name, count in counts.items() if not count)
    if missing:
        message = f"undefined, nan is returned: of {sum(counts.values())} truth values none is {missing}"
        warnings.warn(message, DegenerateInputWarning, stacklevel)
    return bool(missing)


def _measure(groups: Groups, *metrics: Callable[[Groups], float], stacklevel: int = 4) -> list[float]:
    if warn_if_one_class(groups, stacklevel=stacklevel):
        return [math.nan] * len(metrics)
    return [metric(groups) for metric in metrics]


def _images(labels: ArrayLike, scores: ArrayLike) -> Groups:
    return _pixels("labels", labels, "scores", scores, "[N]")


def _pixels(
    truth_name: str, truth: ArrayLike, scores_name: str, scores: ArrayLike, layout: str | None = None
) -> Groups:
    truth, scores = checked(truth_name, truth, scores_name, scores, layout)
    return ranking.group_scores(scores[~truth], scores[truth])


def _regions(masks: ArrayLike, maps: ArrayLike) -> Groups:
    masks, maps = checked("masks", masks, "maps", maps, "[N,H,W]")
    return ranking.group_scores(maps[~masks], maps[masks], ranking.region_areas(masks))
