"""The report: well-formed, self-contained, escaped, and with the numbers that were counted by hand."""

import base64
import io
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pushpull_jax import charts, metrics
from pushpull_jax.report import Case, Report, choose_cases, write_report

VOID = {"meta", "link", "br", "img"}

# Threshold 2: of four normal images one alarms (2.5; 2.0 is not above it), of five defective ones two are missed.
LABELS = [0, 0, 0, 0, 1, 1, 1, 1, 1]
SCORES = [1.0, 2.5, 0.5, 2.0, 1.5, 3.0, 0.7, 9.0, 4.0]
TYPES = ["good"] * 4 + ["dent", "dent", "dent", "stain", "stain"]


class Reader(HTMLParser):
    """Keeps every element with its attributes, the texts of table rows, and asserts that tags nest."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.rows, self.cards = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if ("class", "card") in attributes:
            self.cards.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.cards and len(self.cards[-1]) < 3 and self.open[-2:] in (["div", "h3"], ["div", "b"], ["div", "p"]):
            self.cards[-1].append(data)

    def all(self, tag, kind=None):
        found = [attributes for name, attributes in self.elements if name == tag]
        return [attributes for attributes in found if kind in (None, attributes.get("class"))]


def case(key="test/dent/000.png", label=1, score=3.0, mask=True, size=(20, 30)):
    image = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)
    region = np.zeros(size, bool)
    region[4:9, 5:12] = True
    scores = np.where(region, score, 0.5).astype(np.float32)
    return Case(
        key=key, defect_type="dent", label=label, score=score, image=image, mask=region if mask else None, map=scores
    )


def report(**changes):
    curve = (np.array([0.0, 0.0, 0.5, 1.0]), np.array([0.0, 0.6, 1.0, 1.0]))
    fields = dict(
        title="bottle",
        metrics=dict.fromkeys(("image_auroc", "image_ap", "image_f1max"), 0.9876)
        | dict(pixel_auroc=1.0, pixel_ap=0.5, pixel_f1max=0.25, aupro=0.81249),
        threshold=2.0,
        map_threshold=2.0,
        false_positive_rate=0.05,
        threshold_note="Of 20 held-out images.",
        labels=LABELS,
        scores=SCORES,
        defect_types=TYPES,
        roc=curve,
        pro=curve,
        cases=[case(), case(key="test/good/001.png", label=0, score=2.5, mask=False)],
        history=[dict(step=i, loss=2.0 / (1 + i), learning_rate=1e-3) for i in range(1, 50)],
        config={"data": {"root": "here", "size": 256}, "seed": 0},
        details={"versions": "numpy 2"},
    )
    return Report(**(fields | changes))


def written(tmp_path, **changes):
    write_report(tmp_path / "report.html", report(**changes))
    return (tmp_path / "report.html").read_text("utf-8")


def test_page_is_well_formed_and_self_contained(tmp_path):
    page = written(tmp_path)
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>") and not re.search(r"https?:|\$[a-z{]", page)
    for tag, attributes in reader.elements:
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        assert tag not in ("iframe", "object", "base")
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_cards_show_percents_to_one_decimal(tmp_path):
    shown = [tuple(card[:2]) for card in Reader(written(tmp_path)).cards]
    assert shown == [
        ("AUROC", "98.8%"),
        ("Average precision", "98.8%"),
        ("Best F1", "98.8%"),
        ("AUROC", "100.0%"),
        ("Average precision", "50.0%"),
        ("Best F1", "25.0%"),
        ("AU-PRO", "81.2%"),
    ]


def test_verdicts_are_counted_by_hand(tmp_path):
    page = written(tmp_path)
    rows = Reader(page).rows
    assert [cell["class"] for cell in Reader(page).all("td") if "class" in cell] == ["right", "wrong", "wrong", "right"]
    assert ["normal 4", "3 75.0%✓ passed", "1 25.0%✗ false alarm"] in rows
    assert ["defective 5", "2 40.0%✗ missed", "3 60.0%✓ found"] in rows
    assert "6 of 9 test images judged right. 1 false alarm among 4 normal. 2 of 5 defective images missed." in page
    assert "5% of normal images. Of 20 held-out images." in page


def test_kinds_of_defects_by_hand(tmp_path):
    # dent: 1.5, 3, 0.7 against 0.5, 1, 2, 2.5: of 12 pairs 2 + 4 + 1 = 7 are in order; stain: all 8 of 8.
    rows = [[cell.strip() for cell in row] for row in Reader(written(tmp_path)).rows]
    assert ["good", "4", "1.5", "25.0%", "\u2013"] in rows
    assert ["dent", "3", "1.733", "33.3%", "58.3%"] in rows
    assert ["stain", "2", "6.5", "100.0%", "100.0%"] in rows


def test_choose_cases_by_hand():
    assert choose_cases(np.array(LABELS), np.array(SCORES), 2.0, count=2) == {
        "Missed defects": [6, 4],
        "False alarms": [1],
        "Found defects": [7, 8],
        "Normal images passed": [2, 0],
    }
    # Ties stay in their order, and a score equal to the threshold is no alarm.
    assert choose_cases([1, 1, 0, 0], [2.0, 2.0, 2.0, 2.0], 2.0, count=9) == {
        "Missed defects": [0, 1],
        "False alarms": [],
        "Found defects": [],
        "Normal images passed": [2, 3],
    }


def test_galleries_sort_cases_by_their_verdict(tmp_path):
    shown = [("a", 1, 3.0), ("b", 1, 1.9), ("c", 0, 2.5), ("d", 1, 5.0), ("e", 0, 2.0), ("f", 1, 0.3), ("g", 0, 9.0)]
    cases = [case(key=f"key-{key}", label=label, score=score) for key, label, score in shown]
    page = written(tmp_path, cases=cases)
    # Missed from the lowest, false alarms from the highest, found from the highest, passed.
    order = re.findall(r"<small>key-(.)</small>", page)
    assert order == ["f", "b", "g", "c", "d", "a", "e"]
    assert page.count("none shown") == 0 and written(tmp_path, cases=[]).count("none shown") == 4


def test_pictures_are_image_outline_and_overlay(tmp_path):
    shown = case(size=(120, 900))
    page = written(tmp_path, cases=[shown])
    images = Reader(page).all("img")[:3]
    assert [image["alt"].split(" of ")[0] for image in images] == ["image", "true defect", "heat map"]
    decoded = []
    for image in images:
        kind, data = image["src"].split(";base64,")
        assert kind == "data:image/webp"
        decoded.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    assert {picture.size for picture in decoded} == {(400, 53)}  # 900 x 120 within 400 x 400
    assert len({picture.tobytes() for picture in decoded}) == 3


def test_without_a_mask_a_word_stands_in_for_it(tmp_path):
    assert "no mask" in written(tmp_path, cases=[case(mask=False)])
    page = written(tmp_path, cases=[case(label=0, mask=False)])
    assert "no defect</span>" in page and "true defect of" not in page


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "\" onerror='x' &amp; ${title} $note", "a\ud800\x00b"]
)
def test_every_text_from_outside_is_escaped(tmp_path, hostile):
    changes = dict(
        title=hostile,
        threshold_note=hostile,
        defect_types=[hostile] * 9,
        cases=[case(key=hostile)],
        config={hostile: {hostile: hostile}},
        details={hostile: hostile},
    )
    reader, plain = Reader(written(tmp_path, **changes)), Reader(written(tmp_path))
    assert len(reader.all("script")) == 1
    assert {name for _, attributes in reader.elements for name in attributes} == {
        name for _, attributes in plain.elements for name in attributes
    }
    shown = hostile.replace("\ud800", "?").replace("\x00", "\ufffd")
    texts = [cell.replace("\x00", "\ufffd") for row in reader.rows for cell in row]
    assert f"{shown}.{shown}" in texts and shown in texts


def test_config_is_flattened_to_dotted_names(tmp_path):
    rows = Reader(written(tmp_path)).rows
    for row in (["data.root", "here"], ["data.size", "256"], ["seed", "0"], ["versions", "numpy 2"]):
        assert row in rows


def test_undefined_metrics_are_dashes_with_their_reason(tmp_path):
    undefined = dict.fromkeys(("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "aupro"), math.nan)
    nothing = (np.array([0.0, 1.0]), np.array([math.nan, math.nan]))
    changes = dict(metrics=undefined, labels=[0] * 9, defect_types=["good"] * 9, roc=nothing, pro=nothing)
    page = written(tmp_path, **changes)
    reason = "undefined: no defective image in the test set"
    assert [card[1:] for card in Reader(page).cards] == [["\u2013", reason]] * 7
    assert not re.search(r"\bnan\b", re.sub('base64,[^"]*', "", page))
    assert "defective images missed" not in page and "among 9 normal" in page


def test_reasons_name_what_is_missing(tmp_path):
    undefined = dict.fromkeys(("pixel_auroc", "aupro"), math.nan)
    assert "undefined: no masks" in written(tmp_path, metrics=undefined, pro=None)
    nothing = (np.array([math.nan, math.nan]), np.array([0.0, 1.0]))
    page = written(tmp_path, metrics=undefined, pro=nothing)
    assert "undefined: no defective or no normal pixel in the masks" in page
    assert "undefined: not computed" in written(tmp_path, metrics={})
    assert "undefined: no normal image in the test set" in written(tmp_path, labels=[1] * 9, metrics={}, roc=nothing)


@pytest.mark.parametrize("label", [0, 1])
def test_one_image_is_enough(tmp_path, label):
    nothing = dict(metrics={}, cases=[], history=[], config={}, details={}, pro=None)
    page = written(tmp_path, labels=[label], scores=[2.0], defect_types=["x"], **nothing)
    Reader(page)
    assert "no training history" in page and f"{1 - label} of 1 test image judged right" in page
    assert not re.search(r"\b(nan|inf)\b", page)


def test_history_may_have_gaps(tmp_path):
    rows = [dict(step=1, loss=math.nan, learning_rate=0.0), dict(step=2, loss=None), dict(step=3, loss=math.inf)]
    rows.append(dict(step=4))
    page = written(tmp_path, history=rows)
    assert 'aria-label="learning rate"' in page and 'aria-label="loss"' not in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scores=SCORES[:-1]), r"labels \(9,\), scores \(8,\), defect_types \(9,\)"),
        (dict(labels=[], scores=[], defect_types=[]), "N at least 1"),
        (dict(labels=[2] * 9), "labels must be 0 or 1"),
        (dict(scores=[math.nan] * 9), "scores finite"),
        (dict(threshold=math.inf), "threshold must be finite and above 0, got inf"),
        (dict(map_threshold=0.0), "map_threshold must be finite and above 0, got 0.0"),
        (dict(metrics={"auroc": 1.0}), r"unknown \['auroc'\]"),
    ],
)
def test_a_report_that_does_not_fit_together_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_the_old_report(tmp_path, monkeypatch):
    old = written(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path / "report.html", report(title="new"))
    assert (tmp_path / "report.html").read_text("utf-8") == old
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_report_is_small_enough_to_send(tmp_path):
    # 24 cases of pure noise, which compresses worst, at 256 px: three pictures each.
    cases = [case(key=str(i), size=(256, 256)) for i in range(24)]
    assert len(written(tmp_path, cases=cases)) < 8e6


@pytest.mark.parametrize("seed", range(20))
def test_histogram_counts_every_score_once_on_its_side_of_the_threshold(seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 60))
    labels = generator.integers(0, 2, count)
    scores = np.round(generator.gamma(2.0, 1.0, count), int(generator.integers(0, 4)))
    threshold = float(generator.choice([*scores, 0.01, 1.0, 30.0]))
    histogram = charts.score_histogram(labels, scores, threshold=threshold)
    assert histogram.normal.sum() == np.count_nonzero(labels == 0)
    assert histogram.anomalous.sum() == np.count_nonzero(labels == 1)
    assert len(histogram.edges) == len(histogram.normal) + 1 <= 43
    assert np.ptp(np.diff(histogram.edges)) < 1e-9
    above = histogram.edges[:-1] >= threshold
    for label, counts in ((0, histogram.normal), (1, histogram.anomalous)):
        assert counts[above].sum() == np.count_nonzero(scores[labels == label] > threshold)
    assert threshold in histogram.edges


def test_histogram_by_hand():
    # Range 0..4 around the threshold 2 in four bins of 1, each open on its left.
    histogram = charts.score_histogram(np.array([0, 0, 1, 1, 1]), np.array([0.5, 2, 2.1, 4, 4]), threshold=2.0, bins=2)
    # (4 - 0.5) / 2 = 1.75: bins (0.25, 2], (2, 3.75], (3.75, 5.5].
    assert histogram.edges.tolist() == [0.25, 2.0, 3.75, 5.5]
    assert histogram.normal.tolist() == [2, 0, 0] and histogram.anomalous.tolist() == [0, 1, 2]


@pytest.mark.parametrize("scores", [[1.0], [1.0, 1.0 + 1e-16], [0.0, 1e9], [-5.0, 5.0]])
def test_histogram_of_extreme_ranges(scores):
    histogram = charts.score_histogram(np.zeros(len(scores), int), np.array(scores), threshold=1.0)
    assert histogram.normal.sum() == len(scores)
    chart = charts.histogram_chart(histogram, threshold=1.0)
    assert "nan" not in chart and "inf" not in chart


def test_histogram_chart_draws_a_bar_for_each_filled_bin():
    labels, scores = np.array(LABELS), np.array(SCORES)
    histogram = charts.score_histogram(labels, scores, threshold=2.0)
    reader = Reader(charts.histogram_chart(histogram, threshold=2.0))
    assert len(reader.all("rect", "normal")) == np.count_nonzero(histogram.normal)
    # Normal bars stand on the zero line, anomalous ones hang from it.
    zero = float(reader.all("line", "rule")[0]["y1"])
    assert {float(bar["y"]) + float(bar["height"]) for bar in reader.all("rect", "normal")} == {zero}
    assert {float(bar["y"]) for bar in reader.all("rect", "anomalous")} == {zero}


def points(svg, kind):
    line = Reader(svg).all("polyline", kind)[0]["points"]
    return [tuple(map(float, point.split(","))) for point in line.split()]


def test_rate_chart_shades_up_to_the_limit():
    # The view box holds the unit square as x 62..380, y 208..10: fpr 0.3 is x 157.4, where the line is at 0.65, y 79.3.
    svg = charts.rate_chart("PRO", (np.array([0, 0.2, 1]), np.array([0, 0.6, 1.0])), titles=("x", "y"), limit=0.3)
    assert points(svg, "curve") == [(62.0, 208.0), (125.6, 89.2), (380.0, 10.0)]
    assert points(svg, "area") == [(62.0, 208.0), (62.0, 208.0), (125.6, 89.2), (157.4, 79.3), (157.4, 208.0)]
    assert Reader(svg).all("line", "guide")[0]["x1"] == "157.4"


def test_roc_chart_marks_the_threshold(tmp_path):
    # One of 4 normal and 3 of 5 defective above it: x 62 + 318/4 = 141.5, y 208 - 198 * 0.6 = 89.2.
    mark = Reader(written(tmp_path)).all("circle", "mark")[0]
    assert (mark["cx"], mark["cy"]) == ("141.5", "89.2")


def test_long_curves_are_thinned():
    generator = np.random.default_rng(0)
    masks, maps = generator.random((1, 200, 200)) < 0.1, generator.random((1, 200, 200))
    svg = charts.rate_chart("PRO", metrics.pro_curve(masks, maps), titles=("x", "y"), limit=0.3)
    assert 100 < len(points(svg, "curve")) <= 300
    steps = list(range(100_000))
    drawn = points(charts.step_chart("loss", steps, [1.0] * 100_000), "curve")
    assert len(drawn) == 300 and drawn[0][0] == 62.0 and drawn[-1][0] == 380.0


def test_step_chart_is_logarithmic_over_a_decade_only():
    # 1, 0.1, 0.01 lie equally far apart on decades 0.01..1, so at 10, 109, 208; of 3, 2, 1 the axis starts at 0.
    assert [y for _, y in points(charts.step_chart("loss", [1, 2, 3], [1, 0.1, 0.01]), "curve")] == [10.0, 109.0, 208.0]
    assert [y for _, y in points(charts.step_chart("loss", [1, 2, 3], [3, 2, 1]), "curve")] == [10.0, 76.0, 142.0]
    svg = charts.step_chart("loss", [1, 2, 3], [1, 0.1, 0.01])
    assert re.findall(r'text-anchor="end">([^<]*)<', svg) == ["0.01", "0.1", "1"]


@pytest.mark.parametrize("values", [[0.0], [5.0], [-1.0, -1.0], [1e-30, 1e30], [0.0, 1e-12], [1.0, 1.0 + 1e-15]])
def test_step_chart_of_extreme_values(values):
    svg = charts.step_chart("loss", list(range(len(values))), values)
    assert "nan" not in svg and "inf" not in svg
    assert 1 <= svg.count('text-anchor="end"') <= 12
    assert all(0 <= x <= 400 and 0 <= y <= 250 for x, y in points(svg, "curve"))
