"""What every metric is a sum over: the curve of anomalous against normal pixels passed, from the highest score down.

Truth and scores have one shape, 1 anomalous. Only anomalous pixels move the curve up, so that it is known from one
group for each distinct score of theirs, with the normal pixels tied to it and those between it and the group above it.
Groups are arrays [G], from the highest score. The curve has its corners there; it is level between groups and straight
within one, so that ties always count together. It is walked in blocks in float64, which keeps temporaries small.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_BLOCK = 2**15  # groups walked at a time: a megabyte or two of float64 temporaries, small beside any stack of maps


class Groups(NamedTuple):
    """Pixels (or images) in groups of tied scores, from the highest: all that any metric needs to know of them."""

    above: np.ndarray  # [G] normal pixels below the group before and above this one
    tied: np.ndarray  # [G] normal pixels in the group
    anomalous: np.ndarray  # [G] anomalous pixels in the group
    overlap: np.ndarray  # [G] float64: the sum of 1 / |region| over them; [0] where regions do not matter
    below: int  # normal pixels below the last group

    @property
    def normal_total(self) -> int:
        return int(self.above.sum(dtype=np.int64) + self.tied.sum(dtype=np.int64)) + self.below

    @property
    def anomalous_total(self) -> int:
        return int(self.anomalous.sum(dtype=np.int64))


def checked(
    truth_name: str, truth: ArrayLike, scores_name: str, scores: ArrayLike, layout: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Truth as bool and scores in a dtype that orders them as given, or a ValueError that names the fault."""
    truth, scores = np.asarray(truth), np.asarray(scores)
    if truth.shape != scores.shape or (layout and truth.ndim != layout.count(",") + 1):
        found = f"{truth_name} {truth.shape} and {scores_name} {scores.shape}"
        raise ValueError(f"{found} must have the same shape {layout or ''}".rstrip())
    if truth.dtype != bool:
        _refuse((truth != 0) & (truth != 1), truth, truth_name, "neither 0 nor 1")
        truth = truth.astype(bool)
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


def region_areas(masks: np.ndarray) -> np.ndarray:
    """For each anomalous pixel of masks [N,H,W], in their order, the pixels of its 8-connected region: [A] int32."""
    from scipy import ndimage  # a third of a second to import

    areas = [np.zeros(0, np.int32)]
    for mask in masks:
        if mask.any():
            own = ndimage.label(mask, np.ones((3, 3), bool))[0][mask]
            areas.append(np.bincount(own).astype(np.int32)[own])
    return np.concatenate(areas)


def group_scores(normal: np.ndarray, anomalous: np.ndarray, areas: np.ndarray | None = None) -> Groups:
    """The groups of scores [N] of normal pixels, which are sorted in place, and [A] of anomalous ones.

    Args:
        normal, anomalous: without NaN, of one dtype.
        areas: [A], as `region_areas`; None where regions do not matter.
    """
    normal.sort()
    order = np.argsort(anomalous)
    anomalous = anomalous[order]
    opens = np.ones(anomalous.size, bool)
    np.not_equal(anomalous[1:], anomalous[:-1], out=opens[1:])
    starts = np.flatnonzero(opens)
    if areas is None:
        overlap = np.zeros(0)
    else:
        areas = areas[order]
        overlap = np.add.reduceat(1.0 / areas, starts)[::-1] if starts.size else np.zeros(0)
    del order
    scores = anomalous[starts]
    # The largest of these arrays are as long as the anomalous pixels: half the bytes where half suffice.
    count = np.uint32 if max(normal.size, anomalous.size) < 2**32 else np.int64
    sizes = np.diff(starts, append=anomalous.size).astype(count)
    del starts
    lower = np.searchsorted(normal, scores, "left").astype(count)
    upper = np.searchsorted(normal, scores, "right").astype(count)
    ends = np.append(lower[1:], np.asarray([normal.size], count))[: lower.size]
    below = int(lower[0]) if lower.size else normal.size
    return Groups((ends - upper)[::-1], (upper - lower)[::-1], sizes[::-1], overlap, below)


def corners(groups: Groups, heights: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The corners of the curve from (0, 0), in blocks that each start with the last corner of the block before.

    Args:
        groups: G groups.
        heights: [G], by how much the curve rises in each: groups.anomalous or groups.overlap.

    Yields:
        x, normal pixels passed, and y, sum of heights passed: each [V] float64. Corners may coincide.
    """
    x_passed = y_passed = 0.0
    for start in range(0, len(heights), _BLOCK):
        block = slice(start, start + _BLOCK)
        rises = np.asarray(heights[block], np.float64)
        x, y = np.zeros((2, 1 + 2 * rises.size))
        x[1::2], x[2::2], y[2::2] = groups.above[block], groups.tied[block], rises
        x[0], y[0] = x_passed, y_passed
        np.cumsum(x, out=x)
        np.cumsum(y, out=y)
        x_passed, y_passed = x[-1], y[-1]
        yield x, y
    yield np.array([x_passed, x_passed + groups.below]), np.array([y_passed, y_passed])


def whole_curve(groups: Groups, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve in one piece, each corner once, each axis divided by its last value."""
    moving = np.count_nonzero(groups.above) + np.count_nonzero((groups.tied > 0) | (heights > 0))
    whole_x, whole_y = np.zeros((2, 1 + moving + (groups.below > 0)))
    at = 1
    for x, y in corners(groups, heights):
        moves = (np.diff(x) > 0) | (np.diff(y) > 0)
        block = slice(at, at + np.count_nonzero(moves))
        whole_x[block], whole_y[block] = x[1:][moves], y[1:][moves]
        at = block.stop
    whole_x /= whole_x[-1] or math.nan
    whole_y /= whole_y[-1] or math.nan
    return whole_x, whole_y


def roc_area(groups: Groups) -> float:
    """Area under the curve over its bounding box; there must be pixels of both kinds, here as below."""
    area = sum(np.sum(np.diff(fp) * (tp[1:] + tp[:-1])) for fp, tp in corners(groups, groups.anomalous))
    return float(area / (2.0 * groups.normal_total * groups.anomalous_total))


def mean_precision(groups: Groups) -> float:
    """sum_t (R_t - R_{t-1}) P_t over the groups t."""
    total = 0.0
    for fp, tp in corners(groups, groups.anomalous):
        total += np.sum(np.diff(tp) * tp[1:] / np.maximum(tp[1:] + fp[1:], 1.0))
    return float(total / groups.anomalous_total)


def best_f1(groups: Groups) -> float:
    """max_t 2 TP / (2 TP + FP + FN) over the groups t."""
    # 2 TP + FP + FN = (TP + FP) + (TP + FN), and TP + FN is the number of anomalous pixels.
    total = groups.anomalous_total
    return float(max(np.max(2.0 * tp / (tp + fp + total)) for fp, tp in corners(groups, groups.anomalous)))


def pro_area(groups: Groups, *, fpr_limit: float) -> float:
    """Area under the curve of overlaps up to a false-positive rate, over its bounding box up to there."""
    limit = fpr_limit * groups.normal_total
    area = 0.0
    for fp, overlap in corners(groups, groups.overlap):
        width = np.diff(np.minimum(fp, limit))
        # Of the step that crosses the limit only a part counts, and there the overlap has risen by that part alone.
        part = width / np.maximum(np.diff(fp), 1.0)
        area += np.sum(width * (overlap[:-1] + 0.5 * part * np.diff(overlap)))
    # The last overlap is the number of regions, up to the rounding that the whole curve shares.
    return float(area / (limit * overlap[-1]))


def check_fpr_limit(fpr_limit: float) -> None:
    if not 0.0 < fpr_limit <= 1.0:
        raise ValueError(f"fpr_limit must be in (0, 1], got {fpr_limit}")
