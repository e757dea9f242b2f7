"""Small charts as inline SVG text: score histogram, rate curve (ROC, PRO), a quantity over the training steps of one
run or of many, and a metric of many runs against one of their settings.

Each function takes arrays and returns one <svg> element without colours of its own: the page that holds it styles the
classes grid, axis, normal, anomalous, curve, area, mark, guide, member and mean, so that charts follow its light or
dark theme. All share the width of one view box; a chart fills the width it is given.
"""

import html
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pushpull_jax.metrics import thin_curve

_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 380, 10, 208
_POINTS = 300  # of a curve: nearly one for each unit of the view box
_LETTER = 6.6  # mean width of one at the 12 px that axes have at most
_LONGEST = 16  # letters of a slanted text: what the margin on the left holds
_SLANT = 60  # degrees
_LOG_RATIO = 30  # of the largest to the smallest setting, from which their axis is logarithmic


class Histogram(NamedTuple):
    """Counts of scores in bins of one width, the threshold being an edge."""

    edges: np.ndarray  # [1 + bins] float64
    normal: np.ndarray  # [bins] int64
    anomalous: np.ndarray  # [bins] int64


def score_histogram(labels: np.ndarray, scores: np.ndarray, *, threshold: float, bins: int = 40) -> Histogram:
    """Count scores by label in equal bins over their range, placed so that no bin lies on both sides of the threshold.

    Args:
        labels: [N], 0 or 1, N >= 1.
        scores: [N], finite.
        threshold: finite; the range is widened to reach it.
        bins: how many, up to one more where the placement needs it.

    Returns:
        The histogram; its counts sum to N. A score equal to the threshold is not above it and counts on its left.
    """
    low, high = min(scores.min(), threshold), max(scores.max(), threshold)
    width = float(high - low) / bins or abs(threshold) / bins or 1.0
    # Bin i holds threshold + i width < score <= threshold + (i + 1) width.
    index = np.ceil((np.asarray(scores, np.float64) - threshold) / width).astype(int) - 1
    first, last = min(index.min(), -1), max(index.max(), 0)
    edges = threshold + width * np.arange(first, last + 2)
    normal, anomalous = (np.bincount(index[labels == label] - first, minlength=last - first + 1) for label in (0, 1))
    return Histogram(edges, normal, anomalous)


def histogram_chart(histogram: Histogram, *, threshold: float) -> str:
    """Draw a score histogram, normal images upwards and anomalous ones downwards, with the threshold."""
    edges = histogram.edges
    x = _linear_axis(edges[0], edges[-1], (_LEFT, _RIGHT))
    y = _linear_axis(-histogram.anomalous.max(), histogram.normal.max(), (_BOTTOM, _TOP), whole=True)
    bars = []
    for kind, counts, sign in (("normal", histogram.normal, 1), ("anomalous", histogram.anomalous, -1)):
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
            if count:
                top, bottom = sorted((y.at(0), y.at(sign * count)))
                place = f'x="{x.at(left) + 0.5:.1f}" y="{top:.1f}"'
                size = f'width="{max(x.at(right) - x.at(left) - 1, 0.5):.1f}" height="{bottom - top:.1f}"'
                hint = f"<title>{count} {kind}: {left:.4g} to {right:.4g}</title>"
                bars.append(f'<rect class="{kind}" {place} {size}>{hint}</rect>')
    bars.append(_segment("rule", (_LEFT, y.at(0)), (_RIGHT, y.at(0))))
    bars.append(_segment("guide", (x.at(threshold), _TOP), (x.at(threshold), _BOTTOM)))
    return _svg("Histogram of image scores", x, y, ("image score", "images"), bars)


def rate_chart(
    name: str,
    curve: tuple[np.ndarray, np.ndarray],
    *,
    titles: tuple[str, str],
    limit: float = 1.0,
    mark: tuple[float, float] | None = None,
) -> str:
    """Draw a rising curve of rates over the unit square, the area under it shaded up to a limit.

    Args:
        name: what is drawn, for readers that cannot see it.
        curve: x and y, each [P] in 0..1, neither falling anywhere.
        titles: of the two axes.
        limit: the x up to which the area counts; below 1 it gets a line.
        mark: a point to emphasise.

    Returns:
        An <svg> element.
    """
    x = _linear_axis(0.0, 1.0, (_LEFT, _RIGHT), percent=True)
    y = _linear_axis(0.0, 1.0, (_BOTTOM, _TOP), percent=True)
    fpr, rate = thin_curve(*curve, points=_POINTS)
    inside = fpr <= limit
    area_x = np.concatenate(([0.0], fpr[inside], [limit, limit]))
    area_y = np.concatenate(([0.0], rate[inside], [np.interp(limit, fpr, rate), 0.0]))
    shapes = [_path("area", x.at(area_x), y.at(area_y)), _path("curve", x.at(fpr), y.at(rate))]
    if limit < 1:
        shapes.append(_segment("guide", (x.at(limit), _TOP), (x.at(limit), _BOTTOM)))
    if mark is not None:
        shapes.append(f'<circle class="mark" cx="{x.at(mark[0]):.1f}" cy="{y.at(mark[1]):.1f}" r="4.5"></circle>')
    return _svg(name, x, y, titles, shapes)


def step_chart(name: str, steps: Sequence[float], values: Sequence[float]) -> str:
    """Draw a quantity over the training steps, on a logarithmic axis where it is positive and spans over a decade.

    Args:
        name: what is drawn; also the title of the vertical axis.
        steps, values: [P] finite, P >= 1, in the order of the steps.

    Returns:
        An <svg> element.
    """
    (x, y), (line,) = _step_axes([_thinned(steps, values)])
    return _svg(name, x, y, ("step", name), [_steps("curve", *line)])


def steps_chart(name: str, curves: Sequence[tuple[Sequence[float], Sequence[float]]], *, hints: Sequence[str]) -> str:
    """Draw a quantity over the training steps of several runs, on one pair of axes as `step_chart` chooses them.

    Args:
        name: what is drawn; also the title of the vertical axis.
        curves: of each run steps and values, [P] each and finite, P >= 1, in the order of the steps; at least one run.
        hints: of each run, what is shown where the pointer rests on its line.

    Returns:
        An <svg> element.
    """
    (x, y), lines = _step_axes([_thinned(*curve) for curve in curves])
    shapes = [_steps("member", *line, hint=hint) for line, hint in zip(lines, hints, strict=True)]
    return _svg(name, x, y, ("step", name), shapes)


def is_numeric(setting: object) -> bool:
    """Whether a setting has its place on an axis of numbers: a finite number, and not a truth value."""
    return isinstance(setting, numbers.Real) and not isinstance(setting, bool) and math.isfinite(setting)


def setting_chart(
    name: str, settings: Sequence[float | str], shares: Sequence[float], *, title: str, hints: Sequence[str]
) -> str:
    """Draw a metric of several runs against one of their settings: a dot a run, a bar at the mean of several.

    Finite numbers lie on a linear axis, or a logarithmic one where none is negative and the largest is 30 times the
    smallest above 0 or more, a 0 lying before that one by the mean distance of two; a line joins their means. Anything
    else lies side by side in the order of first appearance.

    Args:
        name: the metric; also the title of the vertical axis, which spans at least one percent.
        settings: [M], M >= 1; all numbers, or else texts.
        shares: [M], finite, in 0..1; shown in percent.
        title: the setting's name.
        hints: [M], what is shown where the pointer rests on a dot.

    Returns:
        An <svg> element.
    """
    places, x, slant = _setting_axis(settings)
    percents = 100 * np.asarray(shares, np.float64)
    y = _percent_axis(percents.min(), percents.max())
    at_place = {place: percents[places == place] for place in np.unique(places).tolist()}
    means = {place: own.mean() for place, own in at_place.items()}
    shapes = []
    if all(map(is_numeric, settings)):
        shapes.append(_path("mean", x.at(np.array(list(means))), y.at(np.array(list(means.values())))))
    for place, percent, hint in zip(places, percents, hints, strict=True):
        centre = f'cx="{x.at(place):.1f}" cy="{y.at(percent):.1f}"'
        text = html.escape(f"{hint}: {percent:.2f}%")
        shapes.append(f'<circle class="member" {centre} r="4"><title>{text}</title></circle>')
    for place, mean in means.items():
        if at_place[place].size > 1:
            shapes.append(_segment("mean", (x.at(place) - 7, y.at(mean)), (x.at(place) + 7, y.at(mean))))
    titles = (html.escape(title), f"{html.escape(name)}, %")
    return _svg(f"{html.escape(name)} against {html.escape(title)}", x, y, titles, shapes, slant=slant)


class _Axis(NamedTuple):
    """A linear map from low..high to a span of the view box, with its ticks."""

    low: float
    high: float
    span: tuple[float, float]
    ticks: list[tuple[float, str]]  # value and text

    def at(self, value: np.ndarray | float) -> np.ndarray | float:
        start, stop = self.span
        return start + (value - self.low) / (self.high - self.low) * (stop - start)


def _linear_axis(
    low: float, high: float, span: tuple[float, float], *, whole: bool = False, percent: bool = False
) -> _Axis:
    """An axis with about five ticks at 1, 2 or 5 times a power of ten; whole ones are counts, shown without a sign."""
    low, high = float(low), float(high)
    if not high > low:
        low, high = low - (0.5 * abs(low) or 0.5), high + (0.5 * abs(high) or 0.5)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    if whole:
        step = max(step, 1.0)
    values = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    if percent:
        texts = [f"{100 * value:.0f}%" for value in values]
    else:
        texts = [f"{abs(value) if whole else value:g}" for value in values]
    return _Axis(low, high, span, list(zip(values, texts, strict=True)))


def _percent_axis(low: float, high: float) -> _Axis:
    """A vertical axis of percents up to 100, over one at least, so that noise does not look like an effect."""
    margin = max(0.04 * (high - low), (1 - (high - low)) / 2)
    high = min(high + margin, 100.0)
    return _linear_axis(min(low - margin, high - 1), high, (_BOTTOM, _TOP))


def _setting_axis(settings: Sequence[float | str]) -> tuple[np.ndarray, _Axis, float]:
    """Where each setting lies on the axis, the axis with the settings as its ticks, and how far slanted ticks hang."""
    numeric = all(map(is_numeric, settings))
    distinct = sorted(set(settings)) if numeric else list(dict.fromkeys(settings))
    places = np.arange(len(distinct), dtype=np.float64)
    if numeric:
        places = np.array(distinct, np.float64)
        positive = places[places > 0]
        if places[0] >= 0 and positive.size > 1 and positive[-1] >= _LOG_RATIO * positive[0]:
            logarithms = np.log10(positive)
            zero = logarithms[0] - (logarithms[-1] - logarithms[0]) / (positive.size - 1)
            places = np.append([zero] * (places.size - positive.size), logarithms)
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in distinct]
    margin = (0.06 if numeric else 0.5 / max(len(distinct) - 1, 1)) * (places[-1] - places[0]) or 0.5
    axis = _Axis(places[0] - margin, places[-1] + margin, (_LEFT, _RIGHT), [])
    slot = (_RIGHT - _LEFT) / len(distinct)
    slant = 0.0
    if not numeric and _LETTER * max(map(len, texts)) > slot:
        texts = [text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…" for text in texts]
        slant = _LETTER * max(map(len, texts)) * math.sin(math.radians(_SLANT))
    reached = -math.inf  # the right end of the last text, which the next one keeps clear of
    for place, text in zip(places.tolist(), texts, strict=True):
        half = _LETTER if slant else _LETTER * (len(text) + 1) / 2
        if axis.at(place) - half >= reached:
            axis.ticks.append((place, html.escape(text)))
            reached = axis.at(place) + half
    return places[[distinct.index(value) for value in settings]], axis, slant


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    kept = np.unique(np.linspace(0, len(steps) - 1, _POINTS).astype(int))
    return np.asarray(steps, np.float64)[kept], np.asarray(values, np.float64)[kept]


def _step_axes(
    curves: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[tuple[_Axis, _Axis], list[tuple[np.ndarray, np.ndarray]]]:
    """The axes that hold all curves, and the curves in the units of the view box."""
    steps, values = (np.concatenate(parts) for parts in zip(*curves, strict=True))
    low, high = values.min(), values.max()
    x = _linear_axis(steps.min(), steps.max(), (_LEFT, _RIGHT))
    if low > 0 and high > 10 * low:
        y = _decade_axis(np.log10(low), np.log10(high), (_BOTTOM, _TOP))
        return (x, y), [(x.at(steps), y.at(np.log10(values))) for steps, values in curves]
    y = _linear_axis(min(low, 0.0), high, (_BOTTOM, _TOP))
    return (x, y), [(x.at(steps), y.at(values)) for steps, values in curves]


def _decade_axis(low: float, high: float, span: tuple[float, float]) -> _Axis:
    """An axis of log10 values with a tick at powers of ten, at most seven of them."""
    first, last = math.floor(low), math.ceil(high)
    powers = range(first, last + 1, math.ceil((last - first) / 6))
    texts = [f"{10.0**power:g}" if abs(power) < 4 else f"1e{power}" for power in powers]
    return _Axis(first, last, span, list(zip(powers, texts, strict=True)))


def _segment(kind: str, start: tuple[float, float], stop: tuple[float, float]) -> str:
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{stop[0]:.1f}" y2="{stop[1]:.1f}"'
    return f'<line class="{kind}" {ends}></line>'


def _path(kind: str, x: np.ndarray, y: np.ndarray, *, hint: str = "") -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    title = f"<title>{html.escape(hint)}</title>" if hint else ""
    return f'<polyline class="{kind}" points="{points}">{title}</polyline>'


def _steps(kind: str, x: np.ndarray, y: np.ndarray, *, hint: str = "") -> str:
    """A quantity over the steps: a line, or a dot where it was logged once."""
    if x.size > 1:
        return _path(kind, x, y, hint=hint)
    title = f"<title>{html.escape(hint)}</title>" if hint else ""
    return f'<circle class="{kind}" cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="4">{title}</circle>'


def _svg(name: str, x: _Axis, y: _Axis, titles: tuple[str, str], shapes: list[str], *, slant: float = 0.0) -> str:
    """The chart; with a slant, the texts of x hang that far below level ones, and the chart is higher by it."""
    parts = []
    for value, text in x.ticks:
        at = f"{x.at(value):.1f}"
        parts.append(_segment("grid", (x.at(value), _TOP), (x.at(value), _BOTTOM)))
        place = f'x="{at}" y="{_BOTTOM + 15}" text-anchor="middle"'
        if slant:
            place = f'x="{at}" y="{_BOTTOM + 12}" transform="rotate(-{_SLANT} {at} {_BOTTOM + 12})" text-anchor="end"'
        parts.append(f'<text class="axis" {place}>{text}</text>')
    for value, text in y.ticks:
        parts.append(_segment("grid", (_LEFT, y.at(value)), (_RIGHT, y.at(value))))
        parts.append(f'<text class="axis" x="{_LEFT - 6}" y="{y.at(value) + 4:.1f}" text-anchor="end">{text}</text>')
    height = round(_HEIGHT + slant)
    middle_x, middle_y = (_LEFT + _RIGHT) / 2, (_TOP + _BOTTOM) / 2
    parts.append(f'<text class="axis" x="{middle_x}" y="{height - 6}" text-anchor="middle">{titles[0]}</text>')
    turned = f'transform="translate(12 {middle_y}) rotate(-90)" text-anchor="middle"'
    parts.append(f'<text class="axis" {turned}>{titles[1]}</text>')
    drawing = "\n".join([*parts, *shapes])
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{name}">\n{drawing}\n</svg>'
