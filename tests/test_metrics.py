"""Metrics against loops over every threshold, numbers by hand, scikit-learn, and properties."""

import math
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import sklearn.metrics

from pushpull_jax import metrics, ranking


def mask_of(shape, pixels):
    masks = np.zeros(shape, bool)
    for pixel in pixels:
        masks[pixel] = True
    return masks


def cases():
    """Small stacks (masks, maps) by name; those with few levels have heavy ties."""
    rng = np.random.default_rng(7)
    shape = (3, 6, 5)
    blobs = mask_of(shape, [(0, slice(1, 4), slice(1, 3)), (0, 5, 4), (2, slice(0, 2), slice(3, 5))])
    noise = rng.normal(size=shape).astype(np.float32)
    informed = noise + 1.5 * blobs.astype(np.float32)
    singles = mask_of(shape, [(0, 0, 0), (0, 2, 2), (0, 5, 4), (1, 3, 0)])
    diagonal = mask_of(shape, [(0, 0, 0), (0, 1, 1), (0, 2, 0), (1, 4, 3), (1, 3, 4), (2, 0, 4)])
    borders = mask_of(shape, [(0, 5, slice(None)), (1, 0, slice(None)), (1, slice(None), 4), (2, slice(None), 4)])
    whole = mask_of(shape, [(1,), (2, 0, 0)])
    infinite = informed.copy()
    infinite[0, 1, 1], infinite[0, 0, 0], infinite[1, 2, 2], infinite[2, 0, 3] = np.inf, np.inf, -np.inf, -np.inf
    return {
        "random": (blobs, noise),
        "informed": (blobs, informed),
        "inverted": (blobs, -informed),
        "four levels": (blobs, np.round(np.clip(informed, -1, 2))),
        "two levels": (blobs, (informed > 0.5).astype(np.float32)),
        "constant": (blobs, np.full(shape, 3.5, np.float32)),
        "single pixels": (singles, noise + singles),
        "diagonal": (diagonal, noise + diagonal),
        "diagonal, tied": (diagonal, np.round(noise + diagonal)),
        "borders": (borders, noise + borders),
        "an image all anomalous": (whole, np.round(2 * (noise + whole)) / 2),
        "infinite": (blobs, infinite),
        "perfect": (blobs, blobs.astype(np.float64)),
        "half the pixels": (rng.random(shape) < 0.5, rng.integers(0, 9, shape)),
    }


CASES = cases()


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request):
    return CASES[request.param]


@pytest.fixture(params=[1, 7, 2**16], ids="block{}".format)
def block(request, monkeypatch):
    monkeypatch.setattr(ranking, "_BLOCK", request.param)


def counts_at_every_threshold(truth, scores):
    """(TP, FP, FN) of `scores >= t` for each distinct score t, from the highest, by counting."""
    pairs = list(zip(np.ravel(truth).tolist(), np.ravel(scores).tolist(), strict=True))
    counts = []
    for threshold in sorted({score for _, score in pairs}, reverse=True):
        tp = sum(1 for anomalous, score in pairs if anomalous and score >= threshold)
        fp = sum(1 for anomalous, score in pairs if not anomalous and score >= threshold)
        counts.append((tp, fp, sum(1 for anomalous, _ in pairs if anomalous) - tp))
    return counts


def auroc_by_pairs(truth, scores):
    anomalous, normal = scores[truth].tolist(), scores[~truth].tolist()
    won = sum((a > n) + 0.5 * (a == n) for a in anomalous for n in normal)
    return won / (len(anomalous) * len(normal))


def average_precision_by_counts(truth, scores):
    total = recall_before = 0.0
    for tp, fp, fn in counts_at_every_threshold(truth, scores):
        recall = tp / (tp + fn)
        total += (recall - recall_before) * tp / (tp + fp)
        recall_before = recall
    return total


def f1_max_by_counts(truth, scores):
    return max(2 * tp / (2 * tp + fp + fn) for tp, fp, fn in counts_at_every_threshold(truth, scores))


def regions_by_flooding(masks):
    """Sets of 8-connected pixels (image, row, column), each within one image."""
    left = {tuple(pixel) for pixel in np.argwhere(masks).tolist()}
    regions = []
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            image, row, column = edge.pop()
            region.add((image, row, column))
            around = {(image, row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)}
            edge.extend(around & left)
            left -= around
        regions.append(region)
    return regions


def pro_curve_by_loops(masks, maps):
    regions = regions_by_flooding(masks)
    normal = maps[~masks].tolist()
    fpr, pro = [0.0], [0.0]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        overlaps = [sum(float(maps[pixel]) >= threshold for pixel in region) / len(region) for region in regions]
        fpr.append(sum(score >= threshold for score in normal) / len(normal))
        pro.append(sum(overlaps) / len(overlaps))
    return fpr, pro


def without_level_vertices(x, y):
    """A curve without the vertices that lie within a level stretch, as they do not bend it."""
    inside = [0 < i < len(y) - 1 and y[i - 1] == y[i] == y[i + 1] for i in range(len(y))]
    return np.asarray(x)[np.logical_not(inside)], np.asarray(y)[np.logical_not(inside)]


def aupro_by_loops(masks, maps, limit):
    fpr, pro = pro_curve_by_loops(masks, maps)
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr, fpr[1:], pro, pro[1:], strict=False):
        if x1 > limit:
            area += (limit - x0) * (y0 + y0 + (y1 - y0) * (limit - x0) / (x1 - x0)) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def noisy_stack(shape=(4, 32, 32), *, levels=None):
    rng = np.random.default_rng(3)
    masks = mask_of(shape, [(1, slice(4, 20), slice(8, 12)), (1, 30, 30), (3, slice(0, 9), slice(0, 32))])
    maps = (rng.gamma(2.0, size=shape) + 1.2 * masks).astype(np.float32)
    return masks, maps if levels is None else np.floor(maps * levels)


# Against the loops above.


def test_pixel_auroc_counts_won_pairs(case, block):
    assert metrics.pixel_auroc(*case) == pytest.approx(auroc_by_pairs(*case), abs=1e-12)


def test_image_auroc_counts_won_pairs(case):
    labels, scores = case[0].ravel(), case[1].ravel()
    assert metrics.image_auroc(labels.astype(int), scores) == pytest.approx(auroc_by_pairs(labels, scores), abs=1e-12)


def test_average_precision_sums_the_steps(case, block):
    assert metrics.average_precision(*case) == pytest.approx(average_precision_by_counts(*case), abs=1e-12)


def test_f1_max_is_the_best_of_all_thresholds(case, block):
    assert metrics.f1_max(*case) == pytest.approx(f1_max_by_counts(*case), abs=1e-12)


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3, 1.0])
def test_aupro_integrates_the_curve_of_every_threshold(case, block, limit):
    assert metrics.aupro(*case, fpr_limit=limit) == pytest.approx(aupro_by_loops(*case, limit), abs=1e-12)


def test_pro_curve_bends_where_that_of_every_threshold_does(case, block):
    fpr, pro = metrics.pro_curve(*case)
    expected_fpr, expected_pro = without_level_vertices(*pro_curve_by_loops(*case))
    np.testing.assert_allclose(fpr, expected_fpr, atol=1e-12)
    np.testing.assert_allclose(pro, expected_pro, atol=1e-12)
    assert (fpr[0], pro[0], fpr[-1], pro[-1]) == (0.0, 0.0, 1.0, 1.0)


def test_roc_curve_bends_where_that_of_every_threshold_does(case, block):
    fpr, tpr = metrics.roc_curve(*case)
    counts = counts_at_every_threshold(*case)
    normal, anomalous = counts[-1][1], counts[-1][0]
    expected_fpr, expected_tpr = without_level_vertices(
        [0.0, *(fp / normal for _, fp, _ in counts)], [0.0, *(tp / anomalous for tp, _, _ in counts)]
    )
    np.testing.assert_allclose(tpr, expected_tpr, atol=1e-12)
    np.testing.assert_allclose(fpr, expected_fpr, atol=1e-12)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0.0, 0.0, 1.0, 1.0)


# Against scikit-learn, on more pixels than the loops can take.


@pytest.mark.parametrize("levels", [None, 3])
def test_pixel_metrics_agree_with_scikit_learn(levels):
    masks, maps = noisy_stack(levels=levels)
    truth, scores = masks.ravel(), maps.ravel()
    precision, recall, _ = sklearn.metrics.precision_recall_curve(truth, scores)
    found = metrics.pixel_metrics(masks, maps)
    assert found["pixel_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores), abs=1e-12)
    assert found["pixel_ap"] == pytest.approx(sklearn.metrics.average_precision_score(truth, scores), abs=1e-12)
    best_f1 = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-30))
    assert found["pixel_f1max"] == pytest.approx(best_f1, abs=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
def test_roc_curve_agrees_with_scikit_learn(levels):
    masks, maps = noisy_stack(levels=levels)
    fpr, tpr = metrics.roc_curve(masks, maps)
    expected_fpr, expected_tpr, _ = sklearn.metrics.roc_curve(masks.ravel(), maps.ravel(), drop_intermediate=False)
    expected_fpr, expected_tpr = without_level_vertices(expected_fpr, expected_tpr)
    np.testing.assert_allclose(fpr, expected_fpr, atol=1e-12)
    np.testing.assert_allclose(tpr, expected_tpr, atol=1e-12)


# By hand.


@pytest.mark.parametrize("level", [0.0, 1.0, -7.5, np.inf])
@pytest.mark.parametrize("limit", [0.3, 0.05, 1.0])
def test_a_constant_map_scores_half_the_limit(level, limit):
    # The curve is the one segment from (0, 0) to (1, 1): the mean of y = x over [0, limit].
    masks = CASES["diagonal"][0]
    assert metrics.aupro(masks, np.full(masks.shape, level), fpr_limit=limit) == pytest.approx(limit / 2, rel=1e-12)
    assert metrics.pixel_auroc(masks, np.full(masks.shape, level)) == 0.5


def test_the_limit_is_0_3_unless_given():
    masks = CASES["diagonal"][0]
    assert metrics.aupro(masks, np.zeros(masks.shape)) == pytest.approx(0.15, rel=1e-12)
    assert metrics.pixel_metrics(masks, np.zeros(masks.shape))["aupro"] == pytest.approx(0.15, rel=1e-12)


def test_pixels_that_touch_at_a_corner_are_one_region():
    # {hit, missed} and {hit}: PRO 3/4 at FPR 0, then straight to (1, 1); mean over [0, 0.3] is 0.75 + 0.25 * 0.15.
    masks = mask_of((1, 5, 5), [(0, 0, 1), (0, 1, 0), (0, 4, 4)])
    maps = mask_of((1, 5, 5), [(0, 0, 1), (0, 4, 4)]).astype(np.float32)
    assert metrics.aupro(masks, maps) == pytest.approx(0.7875, rel=1e-12)


def test_regions_end_with_their_image():
    # Image 0: one pixel, hit. Image 1: three pixels at the same place, missed. PRO 1/2 at FPR 0: 0.5 + 0.5 * 0.15.
    masks = mask_of((2, 4, 4), [(0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0)])
    maps = mask_of((2, 4, 4), [(0, 0, 0)]).astype(np.float32)
    assert metrics.aupro(masks, maps) == pytest.approx(0.575, rel=1e-12)


def test_normal_pixels_of_defective_images_are_false_positives():
    # Of 12 normal pixels 3 outrank the region, all in its own image: PRO is 0 up to FPR 1/4 and 1 from there.
    masks = mask_of((2, 2, 4), [(0, 0, slice(None))])
    maps = np.zeros((2, 2, 4))
    maps[0, 0], maps[0, 1, :3] = 1.0, [4.0, 3.0, 2.0]
    assert metrics.aupro(masks, maps, fpr_limit=0.5) == pytest.approx(0.5, rel=1e-12)
    assert metrics.aupro(masks, maps, fpr_limit=0.25) == 0.0


def test_image_metrics_by_hand():
    # From the highest: anomalous, normal, {anomalous, normal} tied. Pairs won: 1 + 1 + 0 + 1/2 of 4. Precision 1 at
    # recall 1/2, 2/4 at recall 1. F1: 2/3, 2/4, 4/6.
    found = metrics.image_metrics([1, 0, 1, 0], [9.0, 5.0, -1.0, -1.0])
    assert found == pytest.approx({"image_auroc": 0.625, "image_ap": 0.75, "image_f1max": 2 / 3}, rel=1e-12)


def test_a_detector_worse_than_chance_stays_below_half():
    assert metrics.image_auroc([1, 1, 0, 0], [1.0, 2.0, 3.0, 4.0]) == 0.0


@pytest.mark.parametrize("levels", [None, 1])
def test_perfect_maps_give_one(levels):
    masks, maps = noisy_stack()
    maps = masks * 100.0 + (maps if levels is None else 0.0)
    assert metrics.pixel_metrics(masks, maps) == pytest.approx(
        {"pixel_auroc": 1.0, "pixel_ap": 1.0, "pixel_f1max": 1.0, "aupro": 1.0}, rel=1e-12
    )


# Properties.


def test_one_call_gives_the_numbers_of_the_single_functions(case):
    masks, maps = case
    expected = {
        "pixel_auroc": metrics.pixel_auroc(masks, maps),
        "pixel_ap": metrics.average_precision(masks, maps),
        "pixel_f1max": metrics.f1_max(masks, maps),
        "aupro": metrics.aupro(masks, maps, fpr_limit=0.2),
    }
    assert metrics.pixel_metrics(masks, maps, fpr_limit=0.2) == expected
    labels, scores = masks[:, 0, :].ravel(), maps[:, 0, :].ravel()
    assert metrics.image_metrics(labels, scores) == {
        "image_auroc": metrics.image_auroc(labels, scores),
        "image_ap": metrics.average_precision(labels, scores),
        "image_f1max": metrics.f1_max(labels, scores),
    }
    assert {type(value) for value in expected.values()} == {float}


@pytest.mark.parametrize("name", ["informed", "half the pixels", "four levels"])
def test_all_pixel_metrics_sort_every_pixel_once(name, monkeypatch):
    masks, maps = (array.copy() for array in CASES[name])
    maps = np.asarray(maps, np.float32)
    normal, anomalous, groups = [], [], ranking.group_scores
    monkeypatch.setattr(
        ranking,
        "group_scores",
        lambda n, a, areas: normal.append(n.size) or anomalous.append(a.size) or groups(n, a, areas),
    )
    metrics.pixel_metrics(masks, maps)
    assert (normal, anomalous) == ([np.sum(~masks)], [np.sum(masks)])


def test_only_the_order_of_scores_matters():
    masks, maps = noisy_stack(levels=20)
    expected = metrics.pixel_metrics(masks, maps)
    ranks = np.unique(maps, return_inverse=True)[1].reshape(maps.shape)
    assert metrics.pixel_metrics(masks, ranks) == expected
    assert metrics.pixel_metrics(masks, np.exp(-maps.astype(np.float64) / 10)) != expected
    assert metrics.pixel_metrics(masks, -np.exp(-maps.astype(np.float64) / 10)) == expected
    assert metrics.pixel_metrics(masks, 1e6 * maps.astype(np.float64) - 1e9) == expected


@pytest.mark.parametrize("levels", [None, 3])
def test_the_order_of_images_does_not_matter(levels):
    masks, maps = noisy_stack(levels=levels)
    order = [2, 3, 0, 1]
    found = metrics.pixel_metrics(masks[order], maps[order])
    assert found == pytest.approx(metrics.pixel_metrics(masks, maps), abs=1e-12)


def test_inverted_scores_invert_the_auroc():
    masks, maps = noisy_stack(levels=3)
    assert metrics.pixel_auroc(masks, -maps) == pytest.approx(1 - metrics.pixel_auroc(masks, maps), abs=1e-12)


def test_the_whole_pro_curve_has_the_area_of_limit_one():
    masks, maps = noisy_stack()
    assert sklearn.metrics.auc(*metrics.pro_curve(masks, maps)) == pytest.approx(
        metrics.aupro(masks, maps, fpr_limit=1.0), abs=1e-12
    )


@pytest.mark.parametrize(
    "scores",
    [
        np.array([1.0, 1.0 + 1e-12]),
        np.array([1.0, np.nextafter(np.float32(1.0), np.float32(2.0))], np.float32),
        np.array([2**60, 2**60 + 1]),
        np.array([-np.inf, -1e300]),
    ],
    ids=["float64", "float32", "int64", "infinite"],
)
def test_the_smallest_difference_of_the_dtype_counts(scores):
    assert metrics.image_auroc([0, 1], scores) == 1.0
    assert metrics.image_auroc([1, 0], scores) == 0.0


def test_the_two_zeros_are_tied():
    assert metrics.image_auroc([0, 1], np.array([-0.0, 0.0])) == 0.5


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int8, bool])
def test_score_dtypes_give_the_numbers_of_their_values(dtype):
    masks, maps = noisy_stack(levels=2)
    narrow = maps.astype(dtype)
    assert metrics.pixel_metrics(masks, narrow) == metrics.pixel_metrics(masks, narrow.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, ml_dtypes.bfloat16])
def test_mask_dtypes_give_the_numbers_of_booleans(dtype):
    masks, maps = noisy_stack()
    assert metrics.pixel_metrics(masks.astype(dtype), maps) == metrics.pixel_metrics(masks, maps)


def test_memory_layout_does_not_matter():
    masks, maps = noisy_stack()
    strided = np.repeat(maps, 2, axis=2)[:, :, ::2]
    assert metrics.pixel_metrics(np.asfortranarray(masks), strided) == metrics.pixel_metrics(masks, maps)


def test_arguments_are_left_as_they_were():
    masks, maps = noisy_stack()
    kept = masks.copy(), maps.copy()
    metrics.pixel_metrics(masks, maps)
    np.testing.assert_array_equal(masks, kept[0])
    np.testing.assert_array_equal(maps, kept[1])


# Input that has no answer, or is no input.

PIXELWISE = [metrics.pixel_auroc, metrics.average_precision, metrics.f1_max, metrics.aupro]


@pytest.mark.parametrize("anomalous", [True, False])
@pytest.mark.parametrize("metric", PIXELWISE)
def test_one_class_is_nan_and_a_warning_that_names_the_other(metric, anomalous):
    masks, maps = np.full((2, 3, 3), anomalous), CASES["random"][1][:2, :3, :3]
    with pytest.warns(metrics.DegenerateInputWarning, match="normal" if anomalous else "of 18 .*anomalous") as caught:
        value = metric(masks, maps)
    assert math.isnan(value) and type(value) is float
    assert [warning.filename for warning in caught] == [__file__]
    assert ("anomalous" in str(caught[0].message)) is not anomalous


@pytest.mark.parametrize("anomalous", [0, 1])
def test_one_class_in_the_collected_metrics_warns_once(anomalous):
    with pytest.warns(metrics.DegenerateInputWarning) as caught:
        of_images = metrics.image_metrics([anomalous] * 3, [1.0, 2.0, 3.0])
        of_pixels = metrics.pixel_metrics(np.full((1, 2, 2), anomalous), np.zeros((1, 2, 2)))
        assert math.isnan(metrics.image_auroc([anomalous], [1.0]))
    assert [warning.filename for warning in caught] == [__file__] * 3
    assert list(of_images) == ["image_auroc", "image_ap", "image_f1max"]
    assert list(of_pixels) == ["pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"]
    assert all(math.isnan(value) for value in [*of_images.values(), *of_pixels.values()])


@pytest.mark.parametrize("curve", [metrics.roc_curve, metrics.pro_curve])
@pytest.mark.parametrize("anomalous", [0, 1])
def test_a_curve_of_one_class_has_one_nan_axis(curve, anomalous):
    maps = np.arange(4.0).reshape(1, 2, 2)
    with pytest.warns(metrics.DegenerateInputWarning) as caught:
        fpr, hit = curve(np.full((1, 2, 2), anomalous), maps)
    assert [warning.filename for warning in caught] == [__file__]
    missing, present = (fpr, hit) if anomalous else (hit, fpr)
    assert np.isnan(missing).all()
    # Only anomalous pixels bend a curve.
    np.testing.assert_allclose(present, [0, 0.25, 0.5, 0.75, 1] if anomalous else [0, 1])
    assert [axis.size for axis in metrics.thin_curve(fpr, hit, points=3)] == [2, 2]


@pytest.mark.parametrize("metric", PIXELWISE)
def test_no_pixel_at_all_is_nan(metric):
    with pytest.warns(metrics.DegenerateInputWarning, match="of 0 .*anomalous or normal"):
        assert math.isnan(metric(np.zeros((0, 4, 4), bool), np.zeros((0, 4, 4))))


@pytest.mark.parametrize("metric", [*PIXELWISE, metrics.pixel_metrics, metrics.roc_curve, metrics.pro_curve])
def test_nan_scores_are_counted_and_located(metric):
    masks, maps = (array.copy() for array in CASES["random"])
    maps[1, 2, 3] = maps[2, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"(maps|scores): 2 of 90 values are NaN, first nan at \(1, 2, 3\)"):
        metric(masks, maps)


def test_nan_image_scores_are_refused():
    with pytest.raises(ValueError, match=r"scores: 1 of 3 values are NaN, first nan at \(2,\)"):
        metrics.image_metrics([0, 1, 1], [0.0, 1.0, np.nan])


@pytest.mark.parametrize("value", [255, 0.5, -1, np.nan])
@pytest.mark.parametrize("metric", PIXELWISE)
def test_masks_other_than_0_and_1_are_refused(metric, value):
    masks, maps = CASES["random"]
    masks = masks.astype(type(value))
    masks[0, 1, 2] = value
    with pytest.raises(ValueError, match=rf"(masks|truth): 1 of 90 .*neither 0 nor 1, first {value} at \(0, 1, 2\)"):
        metric(masks, maps)


def test_shapes_that_differ_are_both_named():
    masks, maps = CASES["random"]
    for metric in PIXELWISE:
        with pytest.raises(ValueError, match=r"\(3, 6, 5\) and \w+ \(3, 1, 5\)"):
            metric(masks, maps[:, :1])
    with pytest.raises(ValueError, match=r"labels \(3,\) and scores \(3, 1\)"):
        metrics.image_auroc([0, 1, 1], [[0.0], [1.0], [2.0]])


def test_layouts_are_named():
    masks, maps = CASES["random"]
    for metric in (metrics.pixel_auroc, metrics.aupro, metrics.pixel_metrics, metrics.pro_curve):
        with pytest.raises(ValueError, match=r"masks \(6, 5\) and maps \(6, 5\) .* \[N,H,W\]"):
            metric(masks[0], maps[0])
    with pytest.raises(ValueError, match=r"\[N\]$"):
        metrics.image_metrics(masks, maps)


@pytest.mark.parametrize("scores", [["a", "b"], [1j, 2j], [None, 1.0]])
def test_scores_that_are_no_real_numbers_are_refused(scores):
    with pytest.raises(ValueError, match="scores must hold real numbers"):
        metrics.average_precision([0, 1], scores)


@pytest.mark.parametrize("limit", [0.0, -0.3, 1.01, math.nan])
def test_limits_outside_0_to_1_are_refused(limit):
    for metric in (metrics.aupro, metrics.pixel_metrics):
        with pytest.raises(ValueError, match="fpr_limit"):
            metric(*CASES["random"], fpr_limit=limit)


# Thin curves.


@pytest.mark.parametrize("points", [2, 3, 10, 200])
def test_a_thin_curve_stays_within_a_step(points):
    x, y = metrics.pro_curve(*noisy_stack())
    thin_x, thin_y = metrics.thin_curve(x, y, points=points)
    assert 2 <= thin_x.size == thin_y.size <= points
    assert (thin_x[0], thin_y[0], thin_x[-1], thin_y[-1]) == (0, 0, 1, 1)
    kept = np.isin(x, thin_x) & np.isin(y, thin_y)
    before = np.maximum.accumulate(np.where(kept, np.arange(x.size), 0))
    away = np.abs(x - x[before]) + np.abs(y - y[before])
    assert np.max(away) <= 2 / (points - 1) + 1e-12
    assert points < 200 or thin_x.size > 100


def test_a_short_curve_is_kept_whole():
    x, y = np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0])
    thin_x, thin_y = metrics.thin_curve(x, y, points=3)
    assert thin_x.tolist() == x.tolist() and thin_y.tolist() == y.tolist()


def test_a_jump_keeps_its_foot():
    # 0 ... 0.1 along x, then one jump to (1, 1): the chord may not start further than a step before the jump.
    x = np.concatenate((np.linspace(0, 0.1, 1001), [1.0]))
    y = np.concatenate((np.zeros(1001), [1.0]))
    thin_x, _ = metrics.thin_curve(x, y, points=41)
    assert thin_x[-2] >= 0.1 - 2 / 40


def test_thin_curve_refuses_what_it_cannot_thin():
    with pytest.raises(ValueError, match="points"):
        metrics.thin_curve(np.zeros(5), np.zeros(5), points=1)
    with pytest.raises(ValueError, match=r"\(5,\) and y \(4,\)"):
        metrics.thin_curve(np.zeros(5), np.zeros(4))


# Cost.


@pytest.mark.parametrize("density", [0.02, 0.5])
@pytest.mark.parametrize("metric", [metrics.pixel_metrics, metrics.aupro, metrics.pixel_auroc, metrics.pro_curve])
def test_peak_memory_is_at_most_8_times_the_maps(metric, density):
    rng = np.random.default_rng(0)
    maps = rng.random((16, 256, 256), dtype=np.float32)
    masks = rng.random(maps.shape, dtype=np.float32) < density
    metric(masks[:1], maps[:1])  # so that what is imported on the first call is not counted
    tracemalloc.start()
    try:
        metric(masks, maps)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert maps.nbytes + masks.nbytes + peak <= 8 * maps.nbytes


def test_importing_the_metrics_is_light():
    heavy = "{'jax', 'tensorflow', 'sklearn', 'scipy', 'matplotlib'}"
    command = f"import sys, pushpull_jax.metrics; print(sorted({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
