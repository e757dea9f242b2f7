"""Tables and report of an ablation grid: numbers against values by hand; the page well-formed and escaped."""

import csv
import io
import math
import os
import re
from html.parser import HTMLParser

import pytest

from pushpull_jax import charts
from pushpull_jax.ablation_report import ablation_csv, summarise, text_table, write_ablation_report

NAN = math.nan
NONE = "\u2013"  # what is undefined
VOID = {"meta", "link", "wbr"}


def row(member, settings, metrics=(0.9, 0.8, 0.7), loss=((1, 2.0), (2, 1.0)), group=0):
    names = ("image_auroc", "pixel_auroc", "aupro")
    return {
        "member": member,
        "group": group,
        "settings": settings,
        "metrics": dict(zip(names, metrics, strict=True)),
        "loss": [list(point) for point in loss],
    }


# Two values of alpha with seeds 0 and 1, and a third with one seed, the rows of a value not beside each other.
ROWS = [
    row(0, {"supervision.alpha": 0.003, "seed": 0}, (0.98, 0.5, 0.25)),
    row(1, {"supervision.alpha": 0.1, "seed": 0}, (1.0, NAN, 0.5)),
    row(2, {"supervision.alpha": 0.003, "seed": 1}, (0.96, 0.6, 0.25)),
    row(3, {"supervision.alpha": 0.1, "seed": 1}, (0.9, 0.5, 0.5)),
    row(4, {"supervision.alpha": 0.03, "seed": 1}, (0.9, 0.5, NAN), group=1),
]


class Page(HTMLParser):
    """Keeps every element with its attributes and the texts of table rows, and asserts that tags nest."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.rows, self.titles = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "title":
            self.titles.append(data)

    def all(self, tag, kind=None):
        found = [attributes for name, attributes in self.elements if name == tag]
        return [attributes for attributes in found if kind in (None, attributes.get("class"))]


def written(tmp_path, rows=ROWS, title="Ablation", details=None):
    path = tmp_path / "report.html"
    write_ablation_report(path, rows, title=title, details={"command": "pushpull ablate x"} | (details or {}))
    return path.read_text("utf-8")


def chart(settings, shares, title="k"):
    return charts.setting_chart("AUROC", settings, shares, title=title, hints=[""] * len(shares))


def dots(svg):
    return [(float(dot["cx"]), float(dot["cy"])) for dot in Page(svg).all("circle", "member")]


def ticks(svg):
    return re.findall(r'text-anchor="middle">([^<]*)<', svg)[:-2]  # without the titles of the axes


def test_csv_has_a_row_a_member_in_full_precision():
    rows = [
        row(0, {"data.category": "a, b", "supervision.labels": ("mask", "image"), "seed": 3}, (0.1 + 0.2, NAN, 1.0)),
        row(1, {"data.category": "c", "supervision.labels": (), "seed": 3}, (1, 0.0, 1e-17), group=2),
    ]
    assert ablation_csv(rows) == (
        "member,group,data.category,supervision.labels,seed,image_auroc,pixel_auroc,aupro\n"
        '0,0,"a, b",mask image,3,0.30000000000000004,nan,1.0\n'
        "1,2,c,,3,1.0,0.0,1e-17\n"
    )


def test_csv_leaves_empty_what_a_member_does_not_have():
    rows = [row(0, {"seed": 0}), row(1, {"training.steps": 5})]
    del rows[1]["metrics"]["aupro"]
    read = list(csv.DictReader(io.StringIO(ablation_csv(rows))))
    assert [(line["seed"], line["training.steps"], line["aupro"]) for line in read] == [("0", "", "0.7"), ("", "5", "")]


def test_summary_by_hand():
    # 0.98, 0.96: mean 0.97, deviation 0.02/sqrt(2); 1.0, 0.9: mean 0.95, 0.1/sqrt(2); of equal values 0.
    first, second, third = summarise(ROWS)
    assert [line["settings"] for line in (first, second, third)] == [
        {"supervision.alpha": value} for value in (0.003, 0.1, 0.03)
    ]
    assert [line["seeds"] for line in (first, second, third)] == [2, 2, 1]
    assert first["mean"] == pytest.approx({"image_auroc": 0.97, "pixel_auroc": 0.55, "aupro": 0.25}, abs=1e-15)
    root = math.sqrt(2)
    assert first["deviation"] == pytest.approx({"image_auroc": 0.02 / root, "pixel_auroc": 0.1 / root, "aupro": 0})
    assert second["mean"]["image_auroc"] == pytest.approx(0.95)
    assert math.isnan(second["mean"]["pixel_auroc"]) and math.isnan(second["deviation"]["pixel_auroc"])
    assert third["mean"]["image_auroc"] == 0.9 and math.isnan(third["mean"]["aupro"])
    assert third["deviation"] == dict.fromkeys(("image_auroc", "pixel_auroc", "aupro"))


def test_summary_takes_a_list_for_a_tuple():
    settings = ({"supervision.labels": labels, "seed": seed} for seed, labels in enumerate((("mask",), ["mask"])))
    assert [line["seeds"] for line in summarise([row(i, own) for i, own in enumerate(settings)])] == [2]


def test_summary_of_seeds_alone_is_one_line():
    (line,) = summarise([row(seed, {"seed": seed}, (0.9 + 0.01 * seed, 0.5, 0.5)) for seed in range(3)])
    assert line["settings"] == {} and line["seeds"] == 3
    assert line["mean"]["image_auroc"] == pytest.approx(0.91)  # of 0.90, 0.91, 0.92, which deviate by 0.01
    assert line["deviation"]["image_auroc"] == pytest.approx(0.01)


def test_text_table_by_hand():
    assert text_table(summarise(ROWS)).split("\n") == [
        "supervision.alpha  seeds  image AUROC   pixel AUROC   AU-PRO",
        "0.003              2      97.0 ± 1.4 *  55.0 ± 7.1 *  25.0 ± 0.0",
        f"0.1                2      95.0 ± 7.1    {NONE}             50.0 ± 0.0 *",
        f"0.03               1      90.0          50.0          {NONE}",
        "* is the best mean on the test images themselves: a choice to be confirmed on other images",
    ]


def test_text_table_marks_the_best_within_the_same_data():
    values = {("a", 1): 0.9, ("a", 2): 0.8, ("b", 1): 0.5, ("b", 2): 0.50001, ("c", 1): 0.6, ("c", 2): 0.7}
    rows = [
        row(i, {"data.category": name, "supervision.k": k}, (value, NAN, 0.5))
        for i, ((name, k), value) in enumerate(values.items())
    ]
    lines = [line.split() for line in text_table(summarise(rows)).split("\n")[1:-1]]
    # Of a the first, of c the second; those of b read alike, as does every AU-PRO.
    assert [line[3:-2] for line in lines] == [["90.0", "*"], ["80.0"], ["50.0"], ["50.0"], ["60.0"], ["70.0", "*"]]
    assert {(line[-2], line[-1]) for line in lines} == {(NONE, "50.0")}


def test_categories_of_one_line_each_have_a_mean_and_no_best(tmp_path):
    rows = [row(0, {"data.category": "bottle"}, (1.0, 0.9, NAN)), row(1, {"data.category": "cable"}, (0.9, 0.8, 0.5))]
    text = text_table(summarise(rows))
    assert text.split("\n")[-1].split() == ["mean", "of", "all", "95.0", "85.0", NONE]
    page = written(tmp_path, rows)
    assert "*" not in text and not Page(page).all("td", "best") and "<b>Bold</b>" not in page
    assert "2 settings with 1 seed each. Mean over all: image AUROC 95.0%, pixel AUROC 85.0%." in page


def test_page_is_well_formed_and_self_contained(tmp_path):
    page = written(tmp_path)
    reader = Page(page)
    assert page.startswith("<!DOCTYPE html>") and not re.search(r"https?:|//[a-z]|\$[a-z{]|\bnan\b", page)
    for tag, attributes in reader.elements:
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        assert tag not in ("iframe", "object", "base")
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_page_shows_the_summary(tmp_path):
    page = written(tmp_path)
    reader = Page(page)
    assert reader.rows[0] == ["supervision.alpha", "seeds", "image AUROC", "pixel AUROC", "AU\u2011PRO"]
    assert reader.rows[1:4] == [
        ["0.003", "2", "97.0 ± 1.4", "55.0 ± 7.1", "25.0 ± 0.0"],
        ["0.1", "2", "95.0 ± 7.1", NONE, "50.0 ± 0.0"],
        ["0.03", "1", "90.0", "50.0", NONE],
    ]
    # What the script sorts by: the mean itself, or nothing.
    cells = [cell["data-value"] for cell in reader.all("td") if "data-value" in cell]
    assert cells[:2] == ["0.003", "2"] and float(cells[2]) == pytest.approx(0.97) and cells[8] == ""
    assert len(reader.all("td", "best")) == 3
    assert "5 members: 3 settings with 1 to 2 seeds each." in page
    assert "Highest image AUROC: 97.0 ± 1.4% at supervision.alpha 0.003." in page
    assert ["command", "pushpull ablate x"] in reader.rows


def test_no_setting_of_several_alike_is_called_the_highest(tmp_path):
    rows = [row(i, {"supervision.alpha": alpha, "seed": 0}, (1.0, 0.5, 0.5)) for i, alpha in enumerate((0.1, 0.2))]
    assert "Highest image AUROC: 100.0% at 2 settings alike." in written(tmp_path, rows)


def test_page_draws_each_member_against_each_field_but_the_seed(tmp_path):
    reader = Page(written(tmp_path))
    labels = [chart["aria-label"] for chart in reader.all("svg")]
    against = [f"{name} against supervision.alpha" for name in ("image AUROC", "pixel AUROC", "AU-PRO")]
    assert labels == [*against, "loss"]
    assert len(reader.all("circle", "member")) == 5 + 4 + 4  # without the undefined ones
    assert len(reader.all("polyline", "member")) == 5
    assert "supervision.alpha 0.003, seed 1: 96.00%" in reader.titles
    assert "member 4: supervision.alpha 0.03, seed 1" in reader.titles


def test_page_without_masks_seeds_settings_or_losses(tmp_path):
    page = written(tmp_path, [row(0, {"seed": 7}, (NAN, NAN, NAN), loss=[(1, NAN), (2, math.inf), (3, None)])])
    reader = Page(page)
    assert not reader.all("svg") and "only the seed varies" in page and "no training history" in page
    assert reader.rows[1] == ["1", NONE, NONE, NONE] and "1 member: 1 setting with 1 seed." in page
    page = written(tmp_path, [row(0, {"supervision.k": 1}, (0.5, NAN, NAN))])
    assert "undefined in all members: pixel AUROC, AU-PRO" in page and len(Page(page).all("svg")) == 2


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "\" onload='x' &amp; ${title} $note", "a\ud800"])
def test_every_text_from_outside_is_escaped(tmp_path, hostile):
    rows = [row(i, {hostile: value, "x": (hostile, 1), "seed": 0}) for i, value in enumerate((hostile, "other"))]
    for own in rows:
        own["metrics"][hostile] = 0.5
    reader = Page(written(tmp_path, rows, title=hostile, details={hostile: hostile}))
    names = {name for _, attributes in reader.elements for name in attributes}
    rows = [row(i, {"y": value, "x": ("b", 1), "seed": 0}) for i, value in enumerate(("c", "other"))]
    plain = Page(written(tmp_path, rows))
    assert len(reader.all("script")) == 1
    # A long text may slant, which takes one attribute more.
    assert names - {"transform"} == {name for _, attributes in plain.elements for name in attributes} - {"transform"}
    shown = hostile.replace("\ud800", "?")
    assert shown in reader.titles and [shown, shown] in reader.rows and reader.rows[1][:2] == [shown, f"{shown} 1"]


def test_a_grid_without_members_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one member"):
        written(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_the_old_report(tmp_path, monkeypatch):
    old = written(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        written(tmp_path, title="new")
    assert [path.read_text("utf-8") for path in tmp_path.iterdir()] == [old]


def test_setting_chart_by_hand():
    # 0, 5, 10 with 0.6 on either side span x 62..380: 62 + 318 * 0.6/11.2 = 79.0, the middle 221, and 363.0.
    # 50 to 100 percent, with 4% of it below and nothing above 100: 48..100 span y 208..10, so 50 is at 200.4.
    svg = chart([10, 0, 5, 0], [1.0, 0.5, 0.75, 1.0])
    assert dots(svg) == [(363.0, 10.0), (79.0, 200.4), (221.0, 105.2), (79.0, 10.0)]
    assert ticks(svg) == ["0", "5", "10"]
    # The mean of the two at 0 is 75 as well; it alone has a bar, and the line joins all three.
    assert Page(svg).all("polyline", "mean")[0]["points"] == "79.0,105.2 221.0,105.2 363.0,10.0"
    bars = [(bar["x1"], bar["x2"], bar["y1"]) for bar in Page(svg).all("line", "mean")]
    assert bars == [("72.0", "86.0", "105.2")]


def test_setting_axis_is_logarithmic_from_a_ratio_of_30():
    def middle(*settings):
        left, centre, right = (x for x, _ in dots(chart(settings, [0.5] * 3)))
        return (centre - left) / (right - left)

    assert middle(1e-4, 1e-3, 1e-2) == pytest.approx(0.5, abs=1e-3)
    assert middle(1, 5.477, 30) == pytest.approx(0.5, abs=1e-3)  # the square root of 30
    assert middle(1, 15, 29) == pytest.approx(0.5, abs=1e-3)
    assert middle(0, 50, 100) == pytest.approx(0.5, abs=1e-3)
    assert middle(0, 1, 100) == pytest.approx(1 / 2, abs=1e-3)  # 0 as far before 1 as 100 is behind it
    assert ticks(chart([0, 0.003, 0.01, 0.03, 0.1, 0.3], [0.5] * 6)) == ["0", "0.003", "0.01", "0.03", "0.1", "0.3"]


@pytest.mark.parametrize("settings", [["b", "a", "c"], [True, False, "x"], [1, math.inf, 0.5]])
def test_what_is_no_number_lies_side_by_side_in_its_order(settings):
    svg = chart(settings, [0.5, 0.6, 0.7])
    assert [x for x, _ in dots(svg)] == [115.0, 221.0, 327.0]  # the middles of three slots of 106
    assert ticks(svg) == [str(setting) for setting in settings] and not Page(svg).all("polyline")


def test_long_names_are_slanted_and_cut_inside_the_picture():
    names = [f"category_{i:02d}_of_many" for i in range(15)]
    svg = chart(names, [0.5] * 15)
    assert svg.count('transform="rotate(-60') == 15 and ">category_00_of_…<" in svg
    height = int(re.search(r'viewBox="0 0 400 (\d+)"', svg)[1])
    assert height == 250 + 91  # 16 letters of 6.6, at 60 degrees: 91.4
    assert "rotate(-60" not in chart(["a", "b"], [0.5, 0.5])


def test_numbers_that_would_overlap_have_no_text():
    # Three decades and 6% on either side take 318: from 2 to 3 it is 94.6 * 0.176 = 16.7, and a text takes 13.2.
    assert ticks(chart([1, 2, 3, 1000], [0.5] * 4)) == ["1", "2", "3", "1000"]
    assert ticks(chart([100, 101, 102, 900], [0.5] * 4)) == ["100", "900"]


@pytest.mark.parametrize("shares", [[1.0], [0.0], [0.9991, 0.9999], [0.5, 0.5], [0.0, 1.0]])
def test_percents_span_one_at_least_and_end_at_100(shares):
    svg = chart([1] * len(shares), shares)
    values = [float(text) for text in re.findall(r'text-anchor="end">([^<]*)<', svg)]
    assert 3 <= len(values) <= 12 and max(values) <= 100 and max(values) - min(values) >= 0.6
    assert all(10 <= y <= 208 for _, y in dots(svg)) and not re.search(r"\b(nan|inf)\b", svg)


def test_steps_chart_shares_its_axes():
    # Steps 0..10 over x 62..380; 1 and 0.01 are the ends of two decades, 0.1 their middle, y 109.
    svg = charts.steps_chart("loss", [([0, 10], [1.0, 0.1]), ([0, 5], [0.1, 0.01])], hints=["<a>", "b"])
    reader = Page(svg)
    lines = [line["points"] for line in reader.all("polyline", "member")]
    assert lines == ["62.0,10.0 380.0,109.0", "62.0,109.0 221.0,208.0"]
    assert reader.titles == ["<a>", "b"]


def test_what_was_logged_once_is_a_dot():
    (dot,) = Page(charts.steps_chart("loss", [([10], [0.5])], hints=["a"])).all("circle", "member")
    assert (dot["cx"], dot["cy"]) == ("221.0", "10.0")  # the middle of 5..15, and the top of 0..0.5
