"""Tables and the report of an ablation grid: one CSV row a member, mean and deviation over seeds, one HTML page.

A member is one trained and scored run of the grid, as a dict: member and group (numbers), settings (the fields that
vary, by dotted names), metrics (shares in 0..1, nan where there is no answer) and loss (pairs of step and loss). M
members, L lines of members that differ in nothing but `seed`. The page is `templates/ablation.*`, filled in by `page`;
every text that comes from outside is escaped.
"""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pushpull_jax import charts
from pushpull_jax.page import absent, escape, pair_rows, write_page

_SEED = "seed"
_DATA = "data."  # opens the names of the fields that choose the test images
_MAIN = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AU-PRO"}
_TITLES = _MAIN | {
    "image_ap": "image AP",
    "image_f1max": "image best F1",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel best F1",
}
_NONE = "\u2013"
_WARNING = "is the best mean on the test images themselves: a choice to be confirmed on other images"

Row = Mapping[str, Any]


def ablation_csv(rows: Sequence[Row]) -> str:
    """The members as CSV: member, group, the fields that vary by their dotted names, and the metrics in full precision.

    Args:
        rows: [M].

    Returns:
        A heading and a line a member; an undefined metric is `nan`, a tuple its items with spaces between, as on the
        command line, and what a member does not have is empty.
    """
    fields, metrics = _names(rows, "settings"), _names(rows, "metrics")
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("member", "group", *fields, *metrics))
    for row in rows:
        settings = (_shown(row["settings"].get(name, "")) for name in fields)
        values = (repr(float(row["metrics"][name])) if name in row["metrics"] else "" for name in metrics)
        lines.writerow((row["member"], row["group"], *settings, *values))
    return text.getvalue()


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean and deviation of each metric over the members that differ in nothing but `seed`.

    mean = sum x / n and deviation = sqrt(sum (x - mean)^2 / (n - 1)).

    Args:
        rows: [M].

    Returns:
        [L] in the order of first appearance, each with settings (without seed), seeds (n), mean and deviation (by
        metric). One undefined value makes its mean and deviation nan; the deviation of one seed is None.
    """
    lines: dict[str, list[Row]] = {}
    for row in rows:
        settings = _without_seed(row["settings"])
        lines.setdefault(json.dumps(settings, sort_keys=True), []).append(row)  # a tuple and a list are the same
    summary = []
    for members in lines.values():
        columns = {name: [row["metrics"].get(name, math.nan) for row in members] for name in _names(members, "metrics")}
        deviation = {name: float(np.std(x, ddof=1)) if len(x) > 1 else None for name, x in columns.items()}
        summary.append(
            {
                "settings": _without_seed(members[0]["settings"]),
                "seeds": len(members),
                "mean": {name: float(np.mean(x)) for name, x in columns.items()},
                "deviation": deviation,
            }
        )
    return summary


def text_table(summary: Sequence[Row]) -> str:
    """The summary for the terminal: settings, seeds, and image AUROC, pixel AUROC and AU-PRO in percent.

    The best mean of each metric has a star, among the lines of the same data (fields `data.*`), and what reads the same
    has one too. Where each line has data of its own, there is nothing to choose: the last line is their mean instead.

    Args:
        summary: [L], of `summarise`.

    Returns:
        Aligned lines without a newline at the end.
    """
    fields = _names(summary, "settings")
    best = {metric: _best(summary, metric) for metric in _MAIN}
    table = [[*fields, "seeds", *_MAIN.values()]]
    for index, line in enumerate(summary):
        settings = [_shown(line["settings"].get(name, "")) or _NONE for name in fields]
        scores = [_score(line, metric) + (" *" if index in best[metric] else "") for metric in _MAIN]
        table.append([*settings, str(line["seeds"]), *scores])
    mean = _mean_of_lines(summary)
    if mean:
        table.append([*["mean of all"][: len(fields)], *[""] * (len(fields) - 1), "", *mean.values()])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(text + ([f"* {_WARNING}"] if any(best.values()) else []))


def write_ablation_report(
    path: str | os.PathLike, rows: Sequence[Row], *, title: str, details: Mapping[str, str]
) -> None:
    """Write the report of a grid as one HTML file, whole or not at all.

    Args:
        path: the file; its folder must exist.
        rows: [M], M >= 1.
        title: the heading.
        details: provenance: command, versions, data fingerprint, ...

    Raises:
        ValueError: there is no member.
    """
    if not rows:
        raise ValueError("rows must hold at least one member")
    summary = summarise(rows)
    fields = [name for name in _names(rows, "settings") if name != _SEED]
    best = any(_best(summary, name) for name in _names(summary, "mean"))
    parts = {
        "lead": _lead(rows, summary),
        "headings": _headings(summary),
        "lines": _table_lines(summary),
        "note": f"<b>Bold</b> {_WARNING}." if best else "",
        "settings": "\n".join(_setting_section(name, rows) for name in fields) or absent("only the seed varies"),
        "losses": _losses(rows),
        "details": pair_rows(details),
    }
    write_page(path, "ablation", title=title, parts=parts)


def _names(rows: Sequence[Row], part: str) -> list[str]:
    """Names in a part of all rows, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row[part]))


def _without_seed(settings: Row) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != _SEED}


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _described(settings: Row) -> str:
    return ", ".join(f"{name} {_shown(value) or _NONE}" for name, value in settings.items())


def _percent(share: float) -> str:
    return _NONE if math.isnan(share) else f"{100 * share:.1f}"


def _score(line: Row, metric: str) -> str:
    """Mean and deviation in percent, without the deviation where there is one seed."""
    mean, deviation = line["mean"].get(metric, math.nan), line["deviation"].get(metric)
    shown = _percent(mean)
    return shown if deviation is None or math.isnan(mean) else f"{shown} \u00b1 {100 * deviation:.1f}"


def _by_data(summary: Sequence[Row]) -> list[list[int]]:
    """Indices of the lines that share their data."""
    groups: dict[str, list[int]] = {}
    for index, line in enumerate(summary):
        data = {name: value for name, value in line["settings"].items() if name.startswith(_DATA)}
        groups.setdefault(json.dumps(data, sort_keys=True), []).append(index)
    return list(groups.values())


def _best(summary: Sequence[Row], metric: str) -> set[int]:
    """Lines with the highest mean, as it is shown, among those of the same data; none where all are shown alike."""
    best = set()
    for group in _by_data(summary):
        means = {index: summary[index]["mean"].get(metric, math.nan) for index in group}
        shown = {index: _percent(mean) for index, mean in means.items() if not math.isnan(mean)}
        if len(set(shown.values())) > 1:
            top = _percent(max(means[index] for index in shown))
            best |= {index for index, percent in shown.items() if percent == top}
    return best


def _mean_of_lines(summary: Sequence[Row]) -> dict[str, str]:
    """The main metrics averaged over the lines, in percent, where each of several lines has data of its own."""
    if not 1 < len(summary) == len(_by_data(summary)):
        return {}
    columns = {metric: [line["mean"].get(metric, math.nan) for line in summary] for metric in _MAIN}
    return {metric: _percent(float(np.mean(values))) for metric, values in columns.items()}


def _lead(rows: Sequence[Row], summary: Sequence[Row]) -> str:
    counts = sorted({line["seeds"] for line in summary})
    seeds = " to ".join(map(str, counts if len(counts) < 3 else (counts[0], counts[-1])))
    members, settings = (f"{n} {word}{'s' * (n > 1)}" for n, word in ((len(rows), "member"), (len(summary), "setting")))
    size = f"{members}: {settings} with {seeds} seed{'s' * (counts[-1] > 1)}{' each' * (len(summary) > 1)}."
    mean = _mean_of_lines(summary)
    if mean:
        shown = ", ".join(f"{_MAIN[metric]} {value}%" for metric, value in mean.items() if value != _NONE)
        return f"{size} Mean over all: {shown}." if shown else size
    defined = [line for line in summary if not math.isnan(line["mean"].get("image_auroc", math.nan))]
    if not defined or len(_by_data(summary)) > 1:
        return size
    top = max(defined, key=lambda line: line["mean"]["image_auroc"])
    alike = sum(_percent(line["mean"]["image_auroc"]) == _percent(top["mean"]["image_auroc"]) for line in defined)
    if alike > 1:
        return f"{size} Highest image AUROC: {_percent(top['mean']['image_auroc'])}% at {alike} settings alike."
    where = f" at {escape(_described(top['settings']))}" if top["settings"] and len(summary) > 1 else ""
    return f"{size} {'Highest image' if where else 'Image'} AUROC: {_score(top, 'image_auroc')}%{where}."


def _headings(summary: Sequence[Row]) -> str:
    shown = [escape(name).replace(".", ".<wbr>") for name in _names(summary, "settings")]
    titles = (_TITLES.get(name, name) for name in _names(summary, "mean"))
    shown += ["seeds", *(escape(title).replace("-", "&#8209;") for title in titles)]  # AU-PRO stays on one line
    return "".join(f'<th scope="col"><button>{name}</button></th>' for name in shown)


def _table_lines(summary: Sequence[Row]) -> str:
    fields, metrics = _names(summary, "settings"), _names(summary, "mean")
    best = {metric: _best(summary, metric) for metric in metrics}
    lines = []
    for index, line in enumerate(summary):
        settings = [_shown(line["settings"].get(name, "")) for name in fields]
        cells = [_cell(value, value or _NONE) for value in (*settings, str(line["seeds"]))]
        for metric in metrics:
            mean = line["mean"].get(metric, math.nan)
            kind = ' class="best"' if index in best[metric] else ""
            cells.append(_cell("" if math.isnan(mean) else repr(mean), _score(line, metric), kind))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join(lines)


def _cell(value: str, shown: str, kind: str = "") -> str:
    """A cell, and in data-value what the script sorts it by."""
    return f'<td{kind} data-value="{escape(value)}">{escape(shown)}</td>'


def _setting_section(name: str, rows: Sequence[Row]) -> str:
    """The main metrics against one field, over the members that have both."""
    drawn, undefined = [], []
    for metric, title in _MAIN.items():
        own = [row for row in rows if name in row["settings"] and math.isfinite(row["metrics"].get(metric, math.nan))]
        if own:
            values = [row["settings"][name] for row in own]
            if not all(charts.is_numeric(value) for value in values):
                values = [_shown(value) or _NONE for value in values]
            shares, hints = [row["metrics"][metric] for row in own], [_described(row["settings"]) for row in own]
            drawn.append(charts.setting_chart(title, values, shares, title=name, hints=hints))
        else:
            undefined.append(title)
    figures = "".join(f'<figure class="panel">\n{chart}\n</figure>' for chart in drawn)
    missing = absent(f"undefined in all members: {', '.join(undefined)}") if undefined else ""
    return f'<h3>{escape(name)}</h3>\n<div class="panels">\n{figures}\n</div>{missing}'


def _losses(rows: Sequence[Row]) -> str:
    curves, hints = [], []
    for row in rows:
        points = [(step, loss) for step, loss in row["loss"] if loss is not None and math.isfinite(loss)]
        if points:
            curves.append(tuple(zip(*points, strict=True)))
            hints.append(f"member {row['member']}: {_described(row['settings'])}")
    return charts.steps_chart("loss", curves, hints=hints) if curves else absent("no training history")
