"""Bootstrap intervals: against the plain metrics of images that are repeated, and how often they hold the truth."""

import math

import numpy as np
import pytest

from pushpull_jax import bootstrap, metrics
from pushpull_jax.bootstrap import Resampled, image_histogram, intervals, resampled_metrics, separated_auroc_interval

NAMES = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")


def drawn_images(seed=0, normal=7, anomalous=6, size=12):
    """Labels, scores with ties, masks with several regions, and maps that are exact in a bin of the histogram."""
    generator = np.random.default_rng(seed)
    labels = np.arange(normal + anomalous) >= normal
    masks = (generator.random((labels.size, size, size)) < 0.1) & labels[:, None, None]
    maps = generator.integers(1, 40, masks.shape) / 8 + masks * generator.integers(0, 3, masks.shape)
    return labels, np.round(generator.normal(labels, 1.0), 1), masks, maps.astype(np.float32)


def repeated(labels, scores, masks, maps, counts):
    """The plain metrics of a set in which each image stands as often as it was drawn."""
    index = np.repeat(np.arange(labels.size), counts.astype(int))
    pixels = metrics.pixel_metrics(masks[index], maps[index], fpr_limit=0.3)
    return metrics.image_metrics(labels[index], scores[index]) | pixels


def test_resampled_metrics_are_those_of_repeated_images(monkeypatch):
    labels, scores, masks, maps = drawn_images()
    counts, draws = [], bootstrap._draws
    monkeypatch.setattr(bootstrap, "_draws", lambda *arguments: counts.append(draws(*arguments)) or counts[-1])
    histograms = [image_histogram(*image) for image in zip(masks, maps, strict=True)]
    found = resampled_metrics(np.random.default_rng(1), labels, scores, histograms, fpr_limit=0.3, resamples=130)
    of_images, of_pixels = counts
    for i in range(0, 130, 10):
        for names, own in ((NAMES[:3], of_images[i]), (NAMES[3:], of_pixels[i])):
            expected = repeated(labels, scores, masks, maps, own)
            assert {n: found[n].drawn[i] for n in names} == pytest.approx({n: expected[n] for n in names}, abs=1e-6)
    assert {n: found[n].value for n in NAMES} == pytest.approx(repeated(labels, scores, masks, maps, np.ones(13)))
    # The influence by its definition: the mean over its kind of the metric without an image, less that without it.
    without = [repeated(labels, scores, masks, maps, np.arange(13) != i) for i in range(13)]
    for name in NAMES:
        left = np.array([values[name] for values in without])
        expected = [(left[labels == label].mean() - value) for value, label in zip(left, labels, strict=True)]
        sizes = np.where(labels, 6, 7)
        np.testing.assert_allclose(found[name].influence, expected * (sizes - 1) / sizes, atol=1e-6)


def test_every_resample_has_as_many_of_each_kind():
    labels = np.arange(30) % 3 == 0
    counts = bootstrap._draws(np.random.default_rng(0), labels, 2000)
    assert (counts[:, labels].sum(1) == 10).all() and (counts[:, ~labels].sum(1) == 20).all()
    # Each image is as likely as any other of its kind: once on average, with deviation sqrt(9/10 / 2000) = 0.021.
    assert np.abs(counts.mean(0) - 1).max() < 0.1
    # Missing from a resample with chance (1 - 1/10)^10 = 0.349 and (1 - 1/20)^20 = 0.358.
    assert np.mean(counts[:, labels] == 0) == pytest.approx(0.349, abs=0.01)
    assert np.mean(counts[:, ~labels] == 0) == pytest.approx(0.358, abs=0.01)


def test_pixels_of_unknown_truth_are_left_out():
    labels, scores, masks, maps = drawn_images(normal=8, anomalous=8)
    histograms = [image_histogram(*image) for image in zip(masks, maps, strict=True)]
    known = [None if i in (2, 9) else histogram for i, histogram in enumerate(histograms)]
    keep = np.array([histogram is not None for histogram in known])
    fewer = [histogram for histogram in known if histogram]
    generators = [np.random.default_rng(4) for _ in range(2)]
    bootstrap._draws(generators[1], labels, 50)  # what the images take, which are all of them
    found = resampled_metrics(generators[0], labels, scores, known, fpr_limit=0.3, resamples=50)
    counts = bootstrap._draws(generators[1], labels[keep], 50)
    expected = bootstrap._of_pixels(fewer, counts, fpr_limit=0.3)["aupro"]
    np.testing.assert_allclose(found["aupro"].drawn, expected, rtol=1e-6)


def test_too_few_images_have_no_interval():
    labels, scores, masks, maps = drawn_images(normal=9, anomalous=4)
    histograms = [image_histogram(*image) for image in zip(masks, maps, strict=True)]
    found = intervals(resampled_metrics(np.random.default_rng(0), labels, scores, histograms, fpr_limit=0.3))
    assert set(found) == set(NAMES) and all(math.isnan(end) for ends in found.values() for end in ends)
    nothing = resampled_metrics(np.random.default_rng(0), labels, scores, [None] * 13, fpr_limit=0.3)
    assert all(np.isnan(own.drawn).all() for own in nothing.values())


def test_intervals_by_hand():
    level, none, many = 0.95, np.zeros(0), np.arange(1001) / 1000
    # In the middle of symmetric resamples it is the percentile interval.
    plain = {"a": Resampled(0.5, none, many), "b": Resampled(0.5, np.array([1.0, -1.0]), many)}
    assert all(ends == pytest.approx((0.025, 0.975)) for ends in intervals(plain, level=level).values())
    # 84.13 % below the value: z0 = 1, and the ends are Phi(2 - 1.96) = 0.516 and Phi(3.96) = 1.000.
    (ends,) = intervals({"a": Resampled(0.8413, none, many)}, level=level).values()
    assert ends == pytest.approx((0.516, 1.0), abs=1e-3)
    # Influences 1, 1, 1: a = 3 / (6 * 3^1.5) = 0.0962; z = -+1.96 gives Phi(-1.649) = 0.0496 and Phi(2.415) = 0.9921.
    (ends,) = intervals({"a": Resampled(0.5, np.ones(3), many)}, level=level).values()
    assert ends == pytest.approx((0.0496, 0.9921), abs=1e-3)
    # An acceleration beyond all bounds: 1 - 1.96 a < 0.
    (ends,) = intervals({"a": Resampled(0.5, np.array([1e3]), np.append(many, 2.0))}, level=0.9999).values()
    assert 0 <= ends[0] < ends[1] <= 2


def test_resamples_that_do_not_vary_or_have_no_answer_give_no_interval():
    values = {"b": np.ones(1000), "c": np.append(np.arange(9.0), np.nan)}
    found = intervals({name: Resampled(1.0, np.zeros(0), drawn) for name, drawn in values.items()})
    assert all(math.isnan(end) for ends in found.values() for end in ends)


def test_mean_of_sets_that_were_resampled_apart():
    first, second = (Resampled(v, np.array([v]), np.array([v, 2 * v])) for v in (1.0, 3.0))
    found = bootstrap.mean_of([{"a": first}, {"a": second}])["a"]
    assert found.value == 2 and found.influence.tolist() == [0.5, 1.5] and found.drawn.tolist() == [2, 4]


def test_many_images_are_not_left_out_one_by_one(monkeypatch):
    monkeypatch.setattr(bootstrap, "_MOST_LEFT_OUT", 12)
    labels, scores, _, _ = drawn_images()
    found = resampled_metrics(np.random.default_rng(0), labels, scores, [None] * 13, fpr_limit=0.3)
    assert found["image_auroc"].influence.size == 0 and found["image_auroc"].drawn.size == 1000
    assert found["image_auroc"].value == pytest.approx(metrics.image_auroc(labels, scores))


def test_separated_images_have_the_interval_of_disjoint_pairs():
    labels, scores = np.arange(30) >= 20, np.arange(30.0)
    # Ten pairs: p^10 = 0.025 at the lower end.
    low, high = separated_auroc_interval(labels, scores)
    assert high == 1 and low**10 == pytest.approx(0.025)
    assert separated_auroc_interval(labels, -scores) is None
    assert separated_auroc_interval(labels, np.where(scores == 20, 19.0, scores)) is None  # a tie
    assert separated_auroc_interval(np.zeros(3, bool), np.arange(3.0)) is None


@pytest.mark.parametrize("distance", [1.0, 2.0, 3.0])
def test_intervals_hold_the_true_auroc_as_often_as_they_say(distance):
    # Scores N(0, 1) and N(distance, 1): the AUROC is Phi(distance / sqrt 2), 0.760, 0.921 and 0.983. Of 40 images the
    # intervals are a little short, those of images in perfect order too long; of 300 sets 0.95 deviates by 0.013.
    truth = 0.5 * (1 + math.erf(distance / 2))
    generator = np.random.default_rng(7)
    labels = np.arange(40) >= 20
    held = 0
    for _ in range(300):
        scores = generator.normal(distance * labels, 1.0)
        found = resampled_metrics(generator, labels, scores, [None] * 40, fpr_limit=0.3, resamples=200)
        low, high = separated_auroc_interval(labels, scores) or intervals(found)["image_auroc"]
        held += low <= truth <= high
    assert 0.90 <= held / 300


def test_intervals_of_pixels_hold_the_true_auroc_although_pixels_of_an_image_are_alike():
    # All pixels of an image share its brightness, N(0, 1); a defect, half of a defective image, adds 2. The truth is
    # that of 4000 other images. Resampling pixels as if they were independent would give too short intervals.
    generator = np.random.default_rng(8)
    labels = np.arange(40) >= 20
    large = np.arange(4000) >= 2000
    truth = metrics.pixel_auroc(*_bright(generator, large))
    held = 0
    for _ in range(60):
        histograms = [image_histogram(*image) for image in zip(*_bright(generator, labels), strict=True)]
        found = resampled_metrics(generator, labels, np.zeros(40), histograms, fpr_limit=0.3, resamples=100)
        low, high = intervals(found)["pixel_auroc"]
        held += low <= truth <= high
    assert 0.83 <= held / 60 <= 1.0  # 0.95 less four deviations of 0.028


def _bright(generator, labels):
    masks = np.zeros((labels.size, 2, 2), bool)
    masks[labels, 0] = True
    return masks, (10 + generator.normal(size=(labels.size, 1, 1)) + 2 * masks).astype(np.float32)
