"""Metrics of images that come batch by batch: against the exact ones of all images at once, and numbers by hand."""

import itertools
import math
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from pushpull_jax import metrics
from pushpull_jax.streaming_metrics import BINS, ExactPixels, PixelHistogram

NAMES = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")
LIMITS = (0.01, 0.3, 1.0)


def stacks():
    """Masks and maps [6,40,30] by name: continuous scores, ties, few bins, and what float32 has at its ends."""
    rng = np.random.default_rng(11)
    masks = np.zeros((6, 40, 30), bool)
    masks[1, 3:12, 4:9] = masks[1, 30, 2] = masks[2, 20:38, 10:28] = masks[4, 0, 0] = masks[4, 1, 1] = True
    noise = rng.normal(size=masks.shape).astype(np.float32)
    informed = noise + 2 * masks
    infinite = informed.copy()
    infinite[1, 4, 4], infinite[0, 0, 0], infinite[2, 2, 2], infinite[2, 30, 20] = np.inf, np.inf, -np.inf, -np.inf
    return {
        "positive": (masks, rng.gamma(2.0, size=masks.shape).astype(np.float32) + masks),
        "signed": (masks, informed),
        "inverted": (masks, -informed),
        "negative": (masks, informed - 100),
        "perfect": (masks, masks + 0.25 * rng.random(masks.shape, np.float32)),
        "one octave": (masks, (1 + rng.random(masks.shape) ** (1 + masks)).astype(np.float32)),
        "one bin": (masks, (1 + 1e-3 * rng.random(masks.shape) + 1e-4 * masks).astype(np.float32)),
        "two bins": (masks, (1 + 9e-3 * rng.random(masks.shape) ** (1 + ~masks)).astype(np.float32)),
        "few levels": (masks, np.round(informed)),
        "constant": (masks, np.full(masks.shape, 3.5, np.float32)),
        "zero": (masks, np.where(rng.random(masks.shape) < 0.5, np.float32(0), np.float32(-0.0))),
        "infinite": (masks, infinite),
        "subnormal": (masks, (informed * 1e-40).astype(np.float32)),
        "huge": (masks, informed.astype(np.float64) * 1e300),
        "integers": (masks, rng.integers(-(2**60), 2**60, masks.shape) + masks * 2**59),
        "narrow": (masks, informed.astype(ml_dtypes.bfloat16)),
        "half anomalous": (rng.random(masks.shape) < 0.5, noise),
    }


STACKS = stacks()


@pytest.fixture(params=STACKS, ids=lambda name: name.replace(" ", "-"))
def stack(request):
    return STACKS[request.param]


def in_parts(empty, masks, maps, cuts=(0, 1, 1, 4, 6)):
    for start, stop in itertools.pairwise(cuts):
        empty = empty.update(masks[start:stop], maps[start:stop])
    return empty


# The exact ones, of all images at once, are tested against loops elsewhere.


def test_exact_pixels_give_the_numbers_of_all_images_at_once(stack):
    found = in_parts(ExactPixels(), *stack)
    for limit in LIMITS:
        assert found.metrics(fpr_limit=limit) == metrics.pixel_metrics(*stack, fpr_limit=limit)
    for curve, expected in (
        (found.roc_curve(), metrics.roc_curve(*stack)),
        (found.pro_curve(), metrics.pro_curve(*stack)),
    ):
        np.testing.assert_array_equal(curve, expected)


@pytest.mark.parametrize("limit", LIMITS)
def test_the_histogram_is_within_its_bounds(stack, limit):
    exact = metrics.pixel_metrics(*stack, fpr_limit=limit)
    histogram = in_parts(PixelHistogram(), *stack)
    found, bounds = histogram.metrics(fpr_limit=limit), histogram.bounds(fpr_limit=limit)
    assert tuple(found) == tuple(exact) == NAMES and sorted(bounds) == sorted(NAMES)
    for name in NAMES:
        assert abs(found[name] - exact[name]) <= bounds[name] + 1e-12, name
        assert type(found[name]) is type(bounds[name]) is float


@pytest.mark.parametrize("limit", LIMITS)
def test_the_bounds_are_reached(limit):
    # One bin of n = 90 normal and p = 10 anomalous pixels: the exact curve may be any, ours is the diagonal.
    masks = np.zeros((1, 10, 10), bool)
    masks[0, 0] = True
    bounds = PixelHistogram().update(masks, np.ones(masks.shape)).bounds(fpr_limit=limit)
    ours = PixelHistogram().update(masks, np.ones(masks.shape)).metrics(fpr_limit=limit)
    best = metrics.pixel_metrics(masks, 1 + 1e-3 * masks, fpr_limit=limit)
    worst = metrics.pixel_metrics(masks, 1 - 1e-3 * masks, fpr_limit=limit)
    assert bounds["pixel_auroc"] == 0.5 == best["pixel_auroc"] - ours["pixel_auroc"]
    assert bounds["aupro"] == pytest.approx(1 - limit / 2) == pytest.approx(best["aupro"] - ours["aupro"])
    assert bounds["pixel_ap"] == pytest.approx(0.9) == pytest.approx(best["pixel_ap"] - ours["pixel_ap"])
    assert bounds["pixel_f1max"] == pytest.approx(1 - 20 / 110) == best["pixel_f1max"] - ours["pixel_f1max"]
    assert worst["pixel_auroc"] == 0.0  # as far below


def test_the_lower_bound_of_the_precision_is_nearly_reached():
    # A bin above with 1000 normal pixels, then one with 20 normal before 500 anomalous ones.
    # Ours counts 500 precisions 500 / 1520, the exact one sum_i i / (1020 + i).
    masks = np.ones((1, 1520), bool)
    masks[0, :1020] = False
    maps = np.linspace(1.0005, 1, 1520)[None]
    maps[0, :1000] = 2.0
    histogram = PixelHistogram().update(masks[None], maps[None])
    off = histogram.metrics()["pixel_ap"] - metrics.average_precision(masks, maps)
    i = np.arange(1, 501)
    assert off == pytest.approx(np.mean(500 / 1520 - i / (1020 + i)))
    assert off <= histogram.bounds()["pixel_ap"] < 1.01 * off


def test_the_bounds_of_smooth_maps_are_small():
    # There are 128 bins an octave: over a range of a factor 100 some 850, of which each holds few of both kinds.
    rng = np.random.default_rng(2)
    masks = np.zeros((4, 128, 128), bool)
    masks[1:, 20:40, 30:70] = True
    histogram = PixelHistogram().update(masks, np.exp(rng.normal(size=masks.shape) + 2 * masks))
    bounds = histogram.bounds()
    assert 0 < bounds["pixel_auroc"] < 1e-3 and 0 < bounds["aupro"] < 1e-2


@pytest.mark.parametrize("empty", [ExactPixels(), PixelHistogram()], ids=["exact", "histogram"])
def test_a_sum_has_seen_the_images_of_both(empty, stack):
    masks, maps = stack
    whole = empty.update(masks, maps)
    for parts in (
        empty.update(masks[:2], maps[:2]) + empty.update(masks[2:], maps[2:]),
        empty.update(masks[2:], maps[2:]) + empty + empty.update(masks[:2], maps[:2]),
    ):
        assert parts.metrics() == pytest.approx(whole.metrics(), abs=1e-12)
    assert not empty.has_regions and whole.has_regions


@pytest.mark.parametrize("empty", [ExactPixels(), PixelHistogram()], ids=["exact", "histogram"])
def test_updates_leave_everything_as_it_was(empty):
    masks, maps = (array.copy() for array in STACKS["signed"])
    first = empty.update(masks, maps)
    before = first.metrics()
    first.update(masks, -maps)
    assert first.metrics() == before and not empty.has_regions
    np.testing.assert_array_equal(masks, STACKS["signed"][0])
    np.testing.assert_array_equal(maps, STACKS["signed"][1])


def test_equal_scores_share_a_bin_and_higher_ones_no_lower_bin():
    # The upper half of float32's bits, by hand: 1.0 is 0x3f80, -1.0 the complement of 0xbf80.
    values = np.array([-np.inf, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.007, 1.0079, 3e38, np.inf], np.float32)
    bins = [int(np.flatnonzero(PixelHistogram().update([[[0]]], [[[value]]]).normal)[0]) for value in values]
    assert bins == sorted(bins)
    assert (bins[2], bins[7]) == (0xFFFF ^ 0xBF80, 0x8000 | 0x3F80)
    assert bins[4] == bins[5] == 0x8000 and bins[7] == bins[8] and bins[9] == bins[8] + 1
    assert bins[0] < bins[1] and bins[-2] < bins[-1] < BINS


def test_curves_of_the_histogram_are_those_of_the_lower_ends_of_bins():
    masks, maps = STACKS["positive"]
    histogram = PixelHistogram().update(masks, maps)
    lowest = (maps.view(np.uint32) >> 16 << 16).view(np.float32)
    for (x, y), expected in (
        (histogram.roc_curve(), metrics.roc_curve(masks, lowest)),
        (histogram.pro_curve(), metrics.pro_curve(masks, lowest)),
    ):
        bends = np.ones(x.size, bool)
        bends[1:-1] = (np.diff(y)[1:] > 0) | (np.diff(y)[:-1] > 0)
        np.testing.assert_allclose((x[bends], y[bends]), expected, atol=1e-12)


def test_regions_end_with_their_image():
    # Image 0: one pixel, hit. Image 1: three pixels at the same place, missed. PRO 1/2 at FPR 0: 0.5 + 0.5 * 0.15.
    masks, maps = np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), np.float32)
    masks[0, 0, 0] = masks[1, 0, :2] = masks[1, 1, 0] = True
    maps[0, 0, 0] = 1.0
    for pixels in (ExactPixels(), PixelHistogram()):
        assert pixels.update(masks, maps).metrics()["aupro"] == pytest.approx(0.575, rel=1e-12)


# Input that has no answer, or is no input.


@pytest.mark.parametrize("empty", [ExactPixels(), PixelHistogram()], ids=["exact", "histogram"])
@pytest.mark.parametrize("anomalous", [0, 1, None])
def test_one_class_is_nan_and_a_warning(empty, anomalous):
    shape = (0 if anomalous is None else 2, 2, 2)
    pixels = empty.update(np.full(shape, bool(anomalous)), np.zeros(shape))
    missing = {0: "is anomalous", 1: "is normal", None: "anomalous or normal"}[anomalous]
    with pytest.warns(metrics.DegenerateInputWarning, match=missing) as caught:
        found = pixels.metrics()
    assert list(found) == list(NAMES) and all(math.isnan(value) for value in found.values())
    with pytest.warns(metrics.DegenerateInputWarning, match=missing) as of_curves:
        curves = pixels.roc_curve(), pixels.pro_curve()
    assert {warning.filename for warning in [*caught, *of_curves]} == {__file__} and len(of_curves) == 2
    missing_axes = {0: [False, True], 1: [True, False], None: [True, True]}[anomalous]
    assert [[bool(np.isnan(axis).all()) for axis in curve] for curve in curves] == [missing_axes] * 2
    if isinstance(pixels, PixelHistogram):
        assert all(math.isnan(value) for value in pixels.bounds().values())


@pytest.mark.parametrize("empty", [ExactPixels(), PixelHistogram()], ids=["exact", "histogram"])
def test_what_is_no_input_is_refused(empty):
    with pytest.raises(ValueError, match=r"maps: 1 of 4 values are NaN, first nan at \(0, 0, 1\)"):
        empty.update(np.zeros((1, 2, 2)), [[[0.0, np.nan], [1.0, 2.0]]])
    with pytest.raises(ValueError, match=r"masks \(2, 2\) and maps \(2, 2\) .* \[N,H,W\]"):
        empty.update(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        empty.update([[[3]]], [[[0.0]]])
    for limit in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="fpr_limit"):
            empty.metrics(fpr_limit=limit)
    with pytest.raises(ValueError, match="fpr_limit"):
        PixelHistogram().bounds(fpr_limit=0)


# Cost.


def peak_of_a_stream(images):
    rng = np.random.default_rng(0)
    PixelHistogram().update(np.eye(4, dtype=bool)[None], np.zeros((1, 4, 4)))  # what is imported on the first call
    tracemalloc.start()
    try:
        histogram = PixelHistogram()
        for _ in range(images):
            maps = rng.random((1, 128, 128), np.float32)
            histogram = histogram.update(maps > 0.9, maps)
        histogram.metrics(), histogram.bounds(), histogram.pro_curve()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_peak_memory_of_the_histogram_does_not_grow_with_the_images():
    few, many = peak_of_a_stream(2), peak_of_a_stream(40)
    assert many < 1.05 * few  # 38 more maps alone are 2.5 MB
    assert few < 30e6


def test_importing_is_light():
    heavy = "{'jax', 'tensorflow', 'sklearn', 'scipy', 'matplotlib'}"
    command = f"import sys, pushpull_jax.streaming_metrics; print(sorted({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
