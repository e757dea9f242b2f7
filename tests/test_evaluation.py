"""The evaluation's own part, with a detector that needs no training: pixels batch by batch against all at once."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pushpull_jax import bootstrap, evaluation, metrics, scored
from pushpull_jax.config import Config, Data
from pushpull_jax.data.demo import write_demo
from pushpull_jax.data.images import mask_to_image, read_image, read_mask, resize_image
from pushpull_jax.data.sources import read_records
from pushpull_jax.examples import read_run
from pushpull_jax.gallery import choose_cases
from pushpull_jax.streaming_metrics import PixelHistogram

SIZE = 32


def maps_of(images):
    """Distance of each pixel to mid-grey: [B,S,S] float32."""
    return np.abs(np.asarray(images, np.float32) - 127).mean(-1)


DETECTOR = SimpleNamespace(
    threshold=70.0, detect_resized=lambda images: (maps_of(images).mean((1, 2)), maps_of(images))
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Of two categories, which share batches."""
    root = tmp_path_factory.mktemp("data")
    for seed, category in enumerate("ab"):
        write_demo(root, seed=seed, train=1, good=3, per_defect=2, size=64, category=category)
    return Config(data=Data(root=str(root), category="all", image_size=SIZE))


@pytest.fixture(scope="module")
def everything(config) -> dict[str, tuple]:
    """Labels, scores, masks and maps of all test images at once, by category and of "all"."""
    records = [r for r in read_records("mvtec_ad", config.data.root, "all") if r.split == "test"]
    images = [read_image(record) for record in records]
    maps = maps_of([resize_image(image, size=SIZE, mode="stretch") for image in images])
    masks = [
        mask_to_image(read_mask(record, size=image.shape[:2]), size=SIZE, mode="stretch")
        for record, image in zip(records, images, strict=True)
    ]
    columns = np.array([r.label for r in records]), maps.mean((1, 2)), np.array(masks), maps
    own = {name: np.array([record.category == name for record in records]) for name in ("a", "b")}
    return {"all": columns} | {name: tuple(column[of] for column in columns) for name, of in own.items()}


def expected(labels, scores, masks, maps):
    return metrics.image_metrics(labels, scores) | metrics.pixel_metrics(masks, maps)


def test_metrics_of_batches_are_those_of_all_images_at_once(config, everything):
    images, dropped = evaluation.score(DETECTOR, config)
    assert not dropped and len(images.records) == len(everything["all"][0]) > 2 * 8
    for category in ("a", "b"):
        found = evaluation.measure(images.of_category(category), DETECTOR.threshold)
        assert found["pixel_metrics"] == "exact" and "pixel_metrics_bounds" not in found
        assert {name: found[name] for name in evaluation.METRICS} == pytest.approx(
            expected(*everything[category]), abs=1e-9
        )
    together = evaluation.measure(images, DETECTOR.threshold)
    assert together["aupro"] == pytest.approx(metrics.aupro(*everything["all"][2:]), abs=1e-9)
    np.testing.assert_allclose(images.pixels.pro_curve(), metrics.pro_curve(*everything["all"][2:]), atol=1e-9)


def test_above_a_size_pixels_are_counted_in_a_histogram(config, everything, monkeypatch):
    count = len(everything["all"][0])
    monkeypatch.setattr(scored, "EXACT_PIXELS", count * SIZE**2)
    assert evaluation.measure(evaluation.score(DETECTOR, config)[0], 0.0)["pixel_metrics"] == "exact"
    monkeypatch.setattr(scored, "EXACT_PIXELS", count * SIZE**2 - 1)
    images, _ = evaluation.score(DETECTOR, config)
    found = evaluation.measure_categories(images, DETECTOR.threshold)
    assert found["pixel_metrics"] == "histogram" and found["averaged_over"] == "categories"
    for name in ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"):
        bounds = []
        for category in ("a", "b"):
            part = found["categories"][category]
            bounds.append(part["pixel_metrics_bounds"][name])
            assert abs(part[name] - expected(*everything[category])[name]) <= bounds[-1] + 1e-12
        assert found["pixel_metrics_bounds"][name] == pytest.approx(np.mean(bounds))
    by_hand = sum((PixelHistogram().update(*everything[c][2:]) for c in ("a", "b")), PixelHistogram())
    np.testing.assert_array_equal(images.pixels.normal, by_hand.normal)
    details = evaluation._details({"data": DATA, "command": [], "versions": {}}, found | {"resolution": SIZE} | RULES)
    assert details["pixel metrics"].startswith("histogram, pixel_auroc within ")


DATA = {"train": 1, "labelled": [], "confetti": 0, "irrelevant": 0, "held_out": [], "fingerprint": ""}
RULES = {"mask_rule": "", "fpr_limit": 0.3}


@pytest.mark.parametrize("threshold", [0.0, 60.0, 70.0, 1e9])
def test_maps_are_kept_of_the_cases_that_all_images_give(config, everything, threshold, monkeypatch):
    monkeypatch.setattr(scored, "choose_cases", partial(choose_cases, limit=9))
    detector = SimpleNamespace(threshold=threshold, detect_resized=DETECTOR.detect_resized)
    images, _ = evaluation.score(detector, config)
    labels, _, masks, maps = everything["all"]
    types = [record.defect_type for record in images.records]
    chosen = choose_cases(labels, images.scores, types, threshold, limit=9)
    assert list(images.shown) == [images.records[i].key for i in chosen] and len(chosen) == 9 < len(labels)
    cases = evaluation._cases(images, config)
    for i, case in zip(chosen, cases, strict=True):
        shown = images.shown[images.records[i].key]
        np.testing.assert_allclose(shown.map, maps[i], rtol=1e-6)
        np.testing.assert_array_equal(shown.mask, masks[i])
        assert shown.map.base is None and shown.mask.base is None  # or the whole batch stays in memory
        # The images have 64 pixels a side, twice those of the run; a photograph keeps them.
        assert case.key == images.records[i].key and case.image.shape == (64, 64, 3) and case.map is shown.map


def test_intervals_are_those_of_each_category_and_of_their_mean(config, everything, monkeypatch):
    monkeypatch.setattr(bootstrap, "LEAST_IMAGES", 3)  # of good ones there are no more
    images, _ = evaluation.score(DETECTOR, config)
    plain = evaluation.measure_categories(images, DETECTOR.threshold)
    found = evaluation.with_intervals(plain, images)
    assert {name: found[name] for name in evaluation.METRICS} == {name: plain[name] for name in evaluation.METRICS}
    resampled = {}
    for name, stream in zip(("a", "b"), np.random.default_rng(0).spawn(2), strict=True):
        labels, scores, masks, maps = everything[name]
        histograms = [bootstrap.image_histogram(*image) for image in zip(masks, maps, strict=True)]
        resampled[name] = bootstrap.resampled_metrics(stream, labels == 1, scores, histograms, fpr_limit=0.3)
        own = found["categories"][name]["intervals"]
        assert (own["level"], own["resamples"]) == (0.95, 1000)
        assert own["aupro"] == pytest.approx(bootstrap.intervals(resampled[name])["aupro"], abs=1e-4)
        assert own["aupro"][0] <= found["categories"][name]["aupro"] <= own["aupro"][1]
    mean = bootstrap.intervals(bootstrap.mean_of([resampled["a"], resampled["b"]]))
    assert found["intervals"]["aupro"] == pytest.approx(mean["aupro"], abs=1e-4)


def test_images_in_perfect_order_have_an_interval_of_the_auroc_alone(config):
    detector = SimpleNamespace(threshold=0.5, detect_resized=lambda images: (np.zeros(len(images)), maps_of(images)))
    images, _ = evaluation.score(detector, config)
    images = images._replace(scores=images.labels.astype(np.float32)).of_category("a")
    found = evaluation.with_intervals(evaluation.measure_categories(images, 0.5), images)["intervals"]
    # Three pairs, since there are three good images: 0.025^(1/3) = 0.292.
    assert found["image_auroc"] == pytest.approx([0.292, 1.0], abs=1e-3)
    assert found["image_ap"] is None and found["aupro"] is None  # fewer than five


def test_images_without_masks_have_no_pixel_metrics_and_no_warning(config, tmp_path):
    # One class of a folder of classes: the label is known, the pixels of anomalous images are not.
    for name in ("a", "b"):
        source = next(r for r in read_records("mvtec_ad", config.data.root, name) if r.split == "test")
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(Path(source.image).read_bytes())
    classes = replace(config, data=replace(config.data, source="classes", root=str(tmp_path), category="a"))
    images, _ = evaluation.score(DETECTOR, classes)
    found = evaluation.measure_categories(images, DETECTOR.threshold)
    assert np.isnan(found["aupro"]) and (found["normal"], found["anomalous"]) == (1, 1)
    assert not images.pixels.has_regions
    # What is unknown is not taken for normal.
    assert images.has_mask.tolist() == [True, False] and sum(part.size for part in images.pixels.normal) == SIZE**2


def test_unlabelled_test_images_are_left_out(config, tmp_path, capsys):
    records = read_records("mvtec_ad", config.data.root, "a")
    labels = {r.key: "" if r.key.endswith("good/000.png") and r.split == "test" else r.label for r in records}
    rows = (f"{r.image},{labels[r.key]},{r.mask or ''},{r.split},a" for r in records)
    (tmp_path / "parts.csv").write_text("\n".join(("path,label,mask,split,category", *rows)))
    table = replace(config, data=Data("manifest", str(tmp_path / "parts.csv"), "a", image_size=SIZE))
    images, _ = evaluation.score(DETECTOR, table)
    whole, _ = evaluation.score(DETECTOR, replace(config, data=replace(config.data, category="a")))
    # Three good images a category, one of which has no label here.
    assert list(labels.values()).count("") == 1 and (~images.labels).sum() == 2 and (~whole.labels).sum() == 3
    assert len(read_run(table).test) == len(images.records) == len(whole.records) - 1
    assert "1 test images are unlabelled" in capsys.readouterr().err
