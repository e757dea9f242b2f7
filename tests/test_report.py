"""The report: well-formed, self-contained, escaped, and with the numbers that were counted by hand."""

import base64
import hashlib
import math
import os
import re
from html.parser import HTMLParser

import chromium
import numpy as np
import pytest

from pushpull_jax import bootstrap, charts, gallery, heatmap, metrics
from pushpull_jax.gallery import Case
from pushpull_jax.report import Report, write_report

VOID = {"meta", "link", "br", "img", "input"}

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
    assert page.startswith("<!DOCTYPE html>") and "https:" not in page and "http:" not in page
    assert not re.search(r"\$[a-z{]", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    for tag, attributes in reader.elements:
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        assert tag not in ("iframe", "object", "base")
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_policy_names_the_one_style_and_the_one_script(tmp_path):
    page = written(tmp_path)
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in page
    # What a policy without 'unsafe-inline' would refuse.
    names = {name for _, attributes in Reader(page).elements for name in attributes}
    assert "style" not in names and not any(name.startswith("on") for name in names)
    assert "'unsafe-inline'" not in page and "default-src 'none'" in page


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


def test_intervals_stand_below_their_metrics(tmp_path):
    ends = {"image_auroc": (0.9512, 0.99949), "image_ap": (math.nan, math.nan), "aupro": (0.0, 1.0)}
    page = written(tmp_path, intervals=ends)
    cards = {tuple(card[:3]) for card in Reader(page).cards}
    assert {("AUROC", "98.8%", "95.1 to 99.9 "), ("AU-PRO", "81.2%", "0.0 to 100.0 ")} <= cards
    assert ("Average precision", "98.8%", "no interval") in cards
    assert f"by\n{bootstrap.RESAMPLES} resamples" in page and "fewer than 5 images" in page
    assert "resamples" not in written(tmp_path)


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
    assert ["good", "4", "1.500", "25.0%", "\u2013"] in rows
    assert ["dent", "3", "1.733", "33.3%", "58.3%"] in rows
    assert ["stain", "2", "6.500", "100.0%", "100.0%"] in rows


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
    assert len(reader.all("script")) == len(plain.all("script")) == 2  # the scale, and what runs
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
    reader = Reader(svg)
    dots = [f"{dot['cx']},{dot['cy']}" for dot in reader.all("circle", kind)]  # of what was logged once
    line = (dots or [line["points"] for line in reader.all("polyline", kind)])[0]
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


@pytest.fixture(scope="module")
def browser():
    with chromium.opened() as page:
        yield page


def ramp(size=64):
    """A map of thresholds [0, 2.56), a quarter of a hundredth a pixel, from left to right and from row to row."""
    return (np.arange(size * size, dtype=np.float32) / size**2 * 2.56).reshape(size, size)


@pytest.fixture(scope="module")
def shown(browser, tmp_path_factory):
    """The page of six images with the threshold 2, in the browser; maps in units of the threshold 0.5."""
    scores = [("a", "dent", 1, 3.0), ("b", "dent", 1, 1.5), ("c", "good", 0, 2.5), ("d", "stain", 1, 9.0)]
    scores += [("e", "good", 0, 2.0), ("f", "stain", 1, 0.5)]
    region = np.zeros((64, 64), bool)
    region[8:16, 8:16] = True
    cases = [
        Case(key=key, defect_type=kind, label=label, score=score, image=np.full((80, 80, 3), 99, np.uint8),
             mask=region if label else None, map=0.5 * ramp())
        for key, kind, label, score in scores
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, report(cases=cases, map_threshold=0.5))
    browser.show(path.as_uri(), width=1280)
    return browser


def keys(page):
    """Of the images that the gallery shows, in its order."""
    return page.evaluate(
        "[...gallery.children].filter((item) => !item.hidden).map((item) => item.dataset.key).join('')"
    )


def choose(page, control, value):
    event = "new Event('input', {bubbles: true})"
    page.evaluate(f"byId({control!r}).value = {value!r}; byId({control!r}).dispatchEvent({event}); 0")


def test_browser_filters_and_sorts_the_gallery(shown):
    assert keys(shown) == "dacebf"  # 9, 3, 2.5, 2, 1.5, 0.5
    choose(shown, "order", "rise")
    assert keys(shown) == "fbecad"
    # On the wrong side by: f 2 - 0.5 = 1.5, b 0.5, c 0.5 (in the order of scores), then e 0, a -1, d -7.
    choose(shown, "order", "wrong")
    assert keys(shown) in ("fbcead", "fcbead")
    choose(shown, "order", "fall")
    for verdict, expected in (("wrong", "cbf"), ("right", "dae"), ("missed", "bf"), ("false alarm", "c")):
        choose(shown, "verdict", verdict)
        assert keys(shown) == expected
    choose(shown, "verdict", "wrong")
    choose(shown, "type", "stain")
    assert keys(shown) == "f" and shown.evaluate("byId('count').textContent") == "1 of 6 images"
    choose(shown, "verdict", "")
    choose(shown, "type", "")
    assert keys(shown) == "dacebf" and shown.errors == []


def test_browser_colours_maps_as_the_heat_map_is_drawn(shown):
    # What `levels` reads is what `map_levels` wrote: no colour management, no rounding.
    shown.evaluate("gallery.children[0].scrollIntoView()")
    read = shown.evaluate("load(gallery.children[0]).then(([map]) => [...map.values])")
    levels = gallery.map_levels(0.5 * ramp(), threshold=0.5)
    np.testing.assert_array_equal(read, levels.ravel())
    # A row of the canvas without lines: colour and opacity of `overlay`, which the canvas stores premultiplied.
    style = "{opacity: 0.6, level: 100, lineAbove: false, lineTruth: false}"
    drawn = shown.evaluate(
        "load(cases[0]).then((maps) => { const canvas = document.createElement('canvas');"
        f" paint(canvas, maps, {style});"
        " return [...canvas.getContext('2d').getImageData(0, 0, 64, 64).data]; })"
    )
    drawn = np.reshape(drawn, (64, 64, 4)) / 255
    image = np.full((64, 64, 3), 99, np.uint8)
    seen = (1 - drawn[..., 3:]) * image + drawn[..., 3:] * drawn[..., :3] * 255
    expected = heatmap.overlay(image, levels / 100, threshold=3.0)  # above 3 is nothing, so no line
    fade = 0.6 * heatmap.fade_in(levels / 100)[..., None]
    expected = (1 - fade) * image + fade * heatmap.heat_colours(levels[None] / 100, threshold=1.0)[0]
    assert np.abs(seen - expected).max() < 2


def test_browser_sliders_are_exact(shown):
    shown.evaluate("gallery.children[0].querySelector('button').focus()")
    shown.press("Enter")
    shown.wait_for("viewer.open && byId('above').textContent !== ''")
    assert shown.evaluate("byId('viewer-key').textContent") == "d"
    maps = ramp().astype(np.float64)
    for level in (100, 0, 37, 250):
        choose(shown, "level", str(level))
        share = 100 * np.mean(maps > level / 100)
        shown.wait_for(f"byId('above').textContent === '{share:.2f}% of the image is above'")
        assert shown.evaluate("byId('level-value').textContent") == f"{level / 100:.2f} \u00d7 0.5000"
    pixel = "[...byId('viewer-map').getContext('2d').getImageData({}, {}, 1, 1).data]"
    choose(shown, "level", "250")
    assert shown.evaluate(pixel.format(7, 10)) == [255, 0, 200, 255]  # beside the mask, which begins at 8
    # At 2.3 thresholds the hottest colour at 0.6 * 255, kept multiplied by it in 8 bits.
    np.testing.assert_allclose(shown.evaluate(pixel.format(40, 58)), [215, 48, 39, 153], atol=1)
    choose(shown, "opacity", "0")
    shown.wait_for(f"{pixel.format(40, 58)}[3] === 0")
    shown.evaluate("byId('line-truth').click()")
    shown.wait_for(f"{pixel.format(7, 10)}[3] === 0")
    shown.evaluate("byId('reset').click()")
    shown.wait_for("byId('opacity-value').textContent === '60%'")
    assert shown.errors == []


def test_browser_viewer_answers_to_the_keyboard(shown):
    shown.evaluate("viewer.close(); gallery.children[0].querySelector('button').focus()")
    shown.press("Enter")
    shown.wait_for("viewer.open")
    order = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        shown.press(key)
        order.append(shown.evaluate("byId('viewer-key').textContent"))
    assert order == ["a", "c", "a"]
    shown.press("Escape")
    shown.wait_for("!viewer.open")
    shown.wait_for("document.activeElement.closest('.case')?.dataset.key === 'a'")  # where one has gone on to


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_browser_shows_many_images_without_errors(browser, tmp_path, width, dark):
    cases = [case(key=f"{i:02d}", score=float(i)) for i in range(30)]
    write_report(tmp_path / "report.html", report(cases=cases))
    browser.show((tmp_path / "report.html").as_uri(), width=width, dark=dark)
    assert len(keys(browser)) == 2 * 24 and keys(browser).startswith("2928")
    browser.evaluate("byId('more').click()")
    assert len(keys(browser)) == 2 * 30 and browser.evaluate("byId('more').hidden")
    assert browser.evaluate("document.activeElement.closest('.case').dataset.key") == "05"
    # Nothing is wider than the screen, and every control has a name.
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate("[...document.querySelectorAll('select, input')].every((item) => item.labels.length === 1)")
    dark_page = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
    assert dark_page == dark and browser.errors == []
