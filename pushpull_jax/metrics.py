"""Detection and localisation metrics on the host: AUROC, average precision, best F1 and AU-PRO, each a float in [0, 1].

Truth comes first and scores second, of one shape: labels [N] or masks [N,H,W], 1 anomalous. A missing class gives nan
and a DegenerateInputWarning; other shapes, truth other than 0 and 1, and NaN scores are a ValueError. Nothing is
clamped, binned, flipped or fitted. Scores are sorted once, in the dtype they come in; every metric is a sum over the
vertices of one curve, a vertex for each distinct score, so that ties always count together. The curve is walked in
blocks in float64: a call on float32 maps takes less than 8 times their memory, the arguments included.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_BLOCK = 2**16  # pixels walked at a time: a megabyte or two of float64 temporaries, small beside any stack of maps


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
    return _measure(_image_ranking(labels, scores), _roc_area)[0]


def pixel_auroc(masks: ArrayLike, maps: ArrayLike) -> float:
    """Area under the ROC curve over the pixels of all images together.

    Args:
        masks: [N,H,W], boolean or 0/1.
        maps: [N,H,W], any real dtype; infinities are allowed.

    Returns:
        The area; nan, with a warning, where a class is missing.
    """
    return _measure(_rank(*_checked("masks", masks, "maps", maps, "[N,H,W]")), _roc_area)[0]


def average_precision(truth: ArrayLike, scores: ArrayLike) -> float:
    """Average precision, sum_t (R_t - R_{t-1}) P_t over the distinct scores t from the highest (scikit-learn's sum).

    Args:
        truth: labels or masks of any shape, boolean or 0/1.
        scores: the same shape, any real dtype; infinities are allowed.

    Returns:
        The average precision; nan, with a warning, where a class is missing.
    """
    return _measure(_rank(*_checked("truth", truth, "scores", scores)), _mean_precision)[0]


def f1_max(truth: ArrayLike, scores: ArrayLike) -> float:
    """Best F1 = 2 TP / (2 TP + FP + FN) over all thresholds: an upper bound fitted on the truth, not a verdict's F1.

    Args:
        truth: labels or masks of any shape, boolean or 0/1.
        scores: the same shape, any real dtype; infinities are allowed.

    Returns:
        The best F1; nan, with a warning, where a class is missing.
    """
    return _measure(_rank(*_checked("truth", truth, "scores", scores)), _best_f1)[0]


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
    return _measure(_region_ranking(masks, maps), _pro_area_up_to(fpr_limit))[0]


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """All metrics over images: image_auroc, image_ap and image_f1max, as the single functions.

    Args: those of `image_auroc`.

    Returns:
        A float for each name; all nan, with one warning, where a class is missing.
    """
    values = _measure(_image_ranking(labels, scores), _roc_area, _mean_precision, _best_f1)
    return dict(zip(("image_auroc", "image_ap", "image_f1max"), values, strict=True))


def pixel_metrics(masks: ArrayLike, maps: ArrayLike, *, fpr_limit: float = 0.3) -> dict[str, float]:
    """All metrics over pixels: pixel_auroc, pixel_ap, pixel_f1max and aupro, as the single functions, from one sort.

    Args, Raises: those of `aupro`.

    Returns:
        A float for each name; all nan, with one warning, where a class is missing.
    """
    metrics = (_roc_area, _mean_precision, _best_f1, _pro_area_up_to(fpr_limit))
    values = _measure(_region_ranking(masks, maps), *metrics)
    return dict(zip(("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"), values, strict=True))


def roc_curve(truth: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The ROC curve: (FPR, TPR) at every distinct score, from the highest.

    Args: those of `average_precision`.

    Returns:
        fpr and tpr, each [1 + distinct scores] float64, from (0, 0) to (1, 1). The rate
        of a missing class is nan, with a warning.
    """
    ranking = _rank(*_checked("truth", truth, "scores", scores))
    _warn_if_one_class(ranking, stacklevel=3)
    return _whole_curve(ranking, ranking.pixel_weights())


def pro_curve(masks: ArrayLike, maps: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The per-region-overlap curve of `aupro`: (FPR, PRO) at every distinct score, from the highest, over all rates.

    Args: those of `pixel_auroc`.

    Returns:
        fpr and pro, each [1 + distinct scores] float64, from (0, 0) to (1, 1). The rate
        of a missing class is nan, with a warning.
    """
    ranking = _region_ranking(masks, maps)
    _warn_if_one_class(ranking, stacklevel=3)
    return _whole_curve(ranking, ranking.region_weights())


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


class _Ranking(NamedTuple):
    """Pixels (or images) from the highest score to the lowest: all that any metric needs to know of them."""

    regions: np.ndarray  # [P] unsigned or int32: 0 normal, else the number of the region
    closes: np.ndarray  # [P] bool: the last of its group of tied scores, hence a vertex of the curve
    areas: np.ndarray  # [1 + regions] int64: pixels of each region, the normal ones first

    @property
    def normal(self) -> int:
        return int(self.areas[0])

    @property
    def anomalous(self) -> int:
        return int(self.areas[1:].sum())

    def pixel_weights(self) -> np.ndarray:
        """[1 + regions] float64 that let every anomalous pixel weigh 1."""
        return np.concatenate(([0.0], np.ones(len(self.areas) - 1)))

    def region_weights(self) -> np.ndarray:
        """[1 + regions] float64 that let every region weigh 1."""
        return np.concatenate(([0.0], 1.0 / self.areas[1:]))


def _rank(regions: np.ndarray, scores: np.ndarray) -> _Ranking:
    order = np.argsort(scores, axis=None)
    ranked = scores.ravel()[order]
    opens = np.ones(ranked.size, bool)
    np.not_equal(ranked[1:], ranked[:-1], out=opens[1:])
    areas = np.bincount(regions.ravel(), minlength=1)
    return _Ranking(regions.ravel()[order][::-1], opens[::-1], areas)


def _image_ranking(labels: ArrayLike, scores: ArrayLike) -> _Ranking:
    return _rank(*_checked("labels", labels, "scores", scores, "[N]"))


def _region_ranking(masks: ArrayLike, maps: ArrayLike) -> _Ranking:
    from scipy import ndimage  # a third of a second to import

    masks, maps = _checked("masks", masks, "maps", maps, "[N,H,W]")
    within_image = np.zeros((3, 3, 3), bool)
    within_image[1] = True
    return _rank(ndimage.label(masks, within_image)[0], maps)


def _checked(
    truth_name: str, truth: ArrayLike, scores_name: str, scores: ArrayLike, layout: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Truth as uint8 and scores in a dtype that orders them as given, or a ValueError that names the fault."""
    truth, scores = np.asarray(truth), np.asarray(scores)
    if truth.shape != scores.shape or (layout and truth.ndim != layout.count(",") + 1):
        found = f"{truth_name} {truth.shape} and {scores_name} {scores.shape}"
        raise ValueError(f"{found} must have the same shape {layout or ''}".rstrip())
    if truth.dtype == bool:
        truth = truth.view(np.uint8)
    else:
        _refuse((truth != 0) & (truth != 1), truth, truth_name, "neither 0 nor 1")
        truth = truth.astype(np.uint8, copy=False)
    if scores.dtype.kind not in "iuf" or scores.dtype.itemsize < 4:
        if not np.can_cast(scores.dtype, np.float32):
            raise ValueError(f"{scores_name} must hold real numbers, got dtype {scores.dtype}")
        scores = scores.astype(np.float32)
    _refuse(scores != scores, scores, scores_name, "NaN")
    return truth, scores


def _refuse(faulty: np.ndarray, values: np.ndarray, name: str, what: str) -> None:
    count = np.count_nonzero(faulty)
    if count:
        first = tuple(int(i) for i in np.unravel_index(np.argmax(faulty), faulty.shape))
        raise ValueError(f"{name}: {count} of {faulty.size} values are {what}, first {values[first]} at {first}")


def _warn_if_one_class(ranking: _Ranking, *, stacklevel: int) -> bool:
    counts = {"anomalous": ranking.anomalous, "normal": ranking.normal}
    missing = " or ".join(name for name, count in counts.items() if not count)
    if missing:
        message = f"undefined, nan is returned: of {sum(counts.values())} truth values none is {missing}"
        warnings.warn(message, DegenerateInputWarning, stacklevel)
    return bool(missing)


def _measure(ranking: _Ranking, *metrics: Callable[[_Ranking], float]) -> list[float]:
    if _warn_if_one_class(ranking, stacklevel=4):
        return [math.nan] * len(metrics)
    return [float(metric(ranking)) for metric in metrics]


def _curve(ranking: _Ranking, weights: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The curve's vertices from (0, 0), in blocks that each start with the last vertex of the block before.

    Yields:
        x, normal pixels passed, and y, sum of weights[region] over the anomalous pixels passed: each [V] float64.
    """
    vertex_x = vertex_y = passed_x = passed_y = 0.0
    for start in range(0, ranking.closes.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        regions, closes = ranking.regions[block], ranking.closes[block]
        x = passed_x + np.cumsum(regions == 0, dtype=np.float64)
        y = passed_y + np.cumsum(weights[regions])
        passed_x, passed_y = x[-1], y[-1]
        x, y = np.concatenate(([vertex_x], x[closes])), np.concatenate(([vertex_y], y[closes]))
        vertex_x, vertex_y = x[-1], y[-1]
        yield x, y


def _whole_curve(ranking: _Ranking, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve in one piece, each axis divided by its last value."""
    whole_x, whole_y = np.zeros((2, 1 + np.count_nonzero(ranking.closes)))
    at = 0
    for x, y in _curve(ranking, weights):
        whole_x[at : at + x.size], whole_y[at : at + y.size] = x, y
        at += x.size - 1
    whole_x /= whole_x[-1] or math.nan
    whole_y /= whole_y[-1] or math.nan
    return whole_x, whole_y


def _roc_area(ranking: _Ranking) -> float:
    area = sum(np.sum(np.diff(fp) * (tp[1:] + tp[:-1])) for fp, tp in _curve(ranking, ranking.pixel_weights()))
    return area / (2.0 * ranking.normal * ranking.anomalous)


def _mean_precision(ranking: _Ranking) -> float:
    curve = _curve(ranking, ranking.pixel_weights())
    return sum(np.sum(np.diff(tp) * tp[1:] / (tp[1:] + fp[1:])) for fp, tp in curve) / ranking.anomalous


def _best_f1(ranking: _Ranking) -> float:
    # 2 TP + FP + FN = (TP + FP) + (TP + FN), and TP + FN is the number of anomalous pixels.
    return max(np.max(2.0 * tp / (tp + fp + ranking.anomalous)) for fp, tp in _curve(ranking, ranking.pixel_weights()))


def _pro_area_up_to(fpr_limit: float) -> Callable[[_Ranking], float]:
    if not 0.0 < fpr_limit <= 1.0:
        raise ValueError(f"fpr_limit must be in (0, 1], got {fpr_limit}")

    def pro_area(ranking: _Ranking) -> float:
        limit = fpr_limit * ranking.normal
        area = 0.0
        for fp, overlap in _curve(ranking, ranking.region_weights()):
            width = np.diff(np.minimum(fp, limit))
            # Of the step that crosses the limit only a part counts, and there the overlap has risen by that part alone.
            part = width / np.maximum(np.diff(fp), 1.0)
            area += np.sum(width * (overlap[:-1] + 0.5 * part * np.diff(overlap)))
        # The last overlap is the number of regions, up to the rounding that the whole curve shares.
        return area / (limit * overlap[-1])

    return pro_area
