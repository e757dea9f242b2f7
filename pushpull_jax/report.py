"""The report of an evaluated run for people: one self-contained HTML file, on any screen, in light and dark.

Labels are 1 anomalous, 0 normal; a score above the threshold raises an alarm, one equal to it does not, as the
conformal quantile promises its false-positive rate for scores above it. Charts are inline SVG, and `gallery` says what
is embedded of the images. The page is `templates/report.*`, filled in by `page`; every text that comes from outside is
escaped.
"""

import base64
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pushpull_jax import bootstrap, charts, gallery, heatmap, metrics
from pushpull_jax.gallery import Case, verdict
from pushpull_jax.page import absent, escape, four_digits, pair_rows, write_page

_IMAGE_METRICS = {
    "image_auroc": ("AUROC", "chance that a defective image scores higher than a normal one; 50% is guessing"),
    "image_ap": ("Average precision", "how free of normal images the top of the ranking is"),
    "image_f1max": ("Best F1", "balance of precision and recall at the best threshold, chosen with hindsight"),
}
_PIXEL_METRICS = {
    "pixel_auroc": ("AUROC", "chance that a defective pixel scores higher than a normal one; large defects dominate"),
    "pixel_ap": ("Average precision", "how free of normal pixels the hottest spots are; strict, as defects are small"),
    "pixel_f1max": ("Best F1", "overlap of marked and true pixels at the best threshold, chosen with hindsight"),
    "aupro": ("AU-PRO", "share of every defect that is covered, small ones counting like large ones"),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """All that the report shows; N test images."""

    title: str
    metrics: Mapping[str, float]  # image_auroc, ..., aupro; missing or nan ones are shown as a dash with the reason
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of them; nan where there is none
    threshold: float  # of scores; finite, above 0
    map_threshold: float  # of maps, which it colours; finite, above 0
    false_positive_rate: float  # that the threshold was set for
    threshold_note: str
    labels: Sequence[int]  # [N], 0 or 1
    scores: Sequence[float]  # [N], finite
    defect_types: Sequence[str]  # [N]
    roc: tuple[np.ndarray, np.ndarray]  # fpr and tpr over images; nan where a class is missing
    pro: tuple[np.ndarray, np.ndarray] | None  # fpr over pixels and overlap; None without masks
    pro_limit: float = 0.3
    cases: Sequence[Case] = ()  # the most important first
    history: Sequence[Mapping[str, float]] = ()  # rows of metrics.jsonl: step, loss, learning_rate
    config: Mapping[str, object]  # nested
    details: Mapping[str, str]  # provenance: data fingerprint, versions, command, ...


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Write the report as one HTML file, whole or not at all.

    Args:
        path: the file; its folder must exist.
        report: what to show.

    Raises:
        ValueError: labels, scores and defect_types differ in length, are empty, or hold other than 0 and 1 or finite
            values; a threshold is not finite and above 0; a metric's name is unknown; or the map of a case is not
            finite.
    """
    labels, scores = _checked(report)
    alarms = scores > report.threshold
    items, count = gallery.render_cases(report.cases, threshold=report.threshold, map_threshold=report.map_threshold)
    parts = _measured(report, labels, alarms) | _drawn(report, labels, scores, alarms)
    parts |= {
        "cases": items,
        "shown": _shown(count, labels.size),
        "types": _options(case.defect_type for case in report.cases[:count]),
        "scale": gallery.scale_json(),
        "scale_picture": _scale_picture(),
        "map_threshold": f"{report.map_threshold:.6g}",
        "details": pair_rows(report.details),
        "config": pair_rows(dict(_flat(report.config))),
    }
    write_page(path, "report", title=report.title, parts=parts)


def _measured(report: Report, labels: np.ndarray, alarms: np.ndarray) -> dict[str, str]:
    """Parts of the page that are numbers of the whole test set."""
    undefined = _why_undefined(report, labels)
    return {
        "summary": _summary(labels, alarms),
        "image_cards": _cards(report, _IMAGE_METRICS, undefined["image"]),
        "pixel_cards": _cards(report, _PIXEL_METRICS, undefined["pixel"]),
        "intervals": _about_intervals(report),
        "verdicts": _verdict_rows(labels, alarms),
        "threshold": four_digits(report.threshold),
        "rate": f"{100 * report.false_positive_rate:.3g}%",
        "note": escape(report.threshold_note.removesuffix(".")),
        "roc": _roc_chart(report.roc, labels, alarms) or absent(undefined["image"]),
        "pro": _pro_chart(report.pro, report.pro_limit) or absent(undefined["pixel"]),
        "pro_limit": f"{100 * report.pro_limit:.3g}%",
    }


def _drawn(report: Report, labels: np.ndarray, scores: np.ndarray, alarms: np.ndarray) -> dict[str, str]:
    """Parts of the page that show scores, and the training."""
    histogram = charts.score_histogram(labels, scores, threshold=report.threshold)
    return {
        "histogram": charts.histogram_chart(histogram, threshold=report.threshold),
        "kinds": _type_rows(labels, scores, np.asarray(report.defect_types), alarms),
        "training": _training_charts(report.history) or absent("no training history"),
    }


def _checked(report: Report) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(report.labels), np.asarray(report.scores, np.float64)
    count = len(report.defect_types)
    if not (labels.shape == scores.shape == (count,) and count):
        found = f"labels {labels.shape}, scores {scores.shape}, defect_types ({count},)"
        raise ValueError(f"{found} must have the same shape [N], N at least 1")
    if not (np.isin(labels, (0, 1)).all() and np.isfinite(scores).all()):
        raise ValueError("labels must be 0 or 1, and scores finite")
    for name in ("threshold", "map_threshold"):
        value = getattr(report, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and above 0, got {value}")
    unknown = sorted(report.metrics.keys() - _IMAGE_METRICS.keys() - _PIXEL_METRICS.keys())
    if unknown:
        raise ValueError(f"metrics: unknown {unknown}, expected of {sorted(_IMAGE_METRICS | _PIXEL_METRICS)}")
    return labels.astype(int), scores


def _why_undefined(report: Report, labels: np.ndarray) -> dict[str, str]:
    """Why a metric of images or of pixels can be missing here."""
    if not labels.any():
        return dict.fromkeys(("image", "pixel"), "no defective image in the test set")
    image = "no normal image in the test set" if labels.all() else "not computed"
    if report.pro is None:
        return {"image": image, "pixel": "no masks"}
    one_class = np.isnan(report.pro).any()
    return {"image": image, "pixel": "no defective or no normal pixel in the masks" if one_class else "not computed"}


def _summary(labels: np.ndarray, alarms: np.ndarray) -> str:
    right = np.count_nonzero(alarms == labels)
    parts = [f"{right} of {_count(labels.size, 'test image')} judged right."]
    if not labels.all():
        false_alarms, normal = np.count_nonzero(alarms & (labels == 0)), np.count_nonzero(labels == 0)
        parts.append(f"{_count(false_alarms, 'false alarm')} among {normal} normal.")
    if labels.any():
        missed, defective = np.count_nonzero(~alarms & (labels == 1)), np.count_nonzero(labels)
        parts.append(f"{missed} of {_count(defective, 'defective image')} missed.")
    return " ".join(parts)


def _cards(report: Report, names: Mapping[str, tuple[str, str]], undefined: str) -> str:
    cards = []
    for name, (title, meaning) in names.items():
        value = report.metrics.get(name, math.nan)
        if math.isnan(value):
            cards.append(f'<div class="card"><h3>{title}</h3><b>&ndash;</b><p>undefined: {undefined}</p></div>')
            continue
        ends = report.intervals.get(name)
        interval = f'<p class="interval">{_interval(ends)}</p>' if ends else ""
        cards.append(f'<div class="card"><h3>{title}</h3><b>{_percent(value)}</b>{interval}<p>{meaning}</p></div>')
    return "\n".join(cards)


def _interval(ends: tuple[float, float]) -> str:
    low, high = (100 * end for end in ends)
    return "no interval" if math.isnan(low) else f"{low:.1f} to {high:.1f} <small>({100 * bootstrap.LEVEL:g}%)</small>"


def _about_intervals(report: Report) -> str:
    if not report.intervals:
        return ""
    said = f"""The interval below each number: what another draw of as many test images could have given, by
{bootstrap.RESAMPLES} resamples. Another training is not in it."""
    if any(math.isnan(low) for low, _ in report.intervals.values()):
        said += f""" There is none where a kind has fewer than {bootstrap.LEAST_IMAGES} images, or where every resample
gives the same number: they are too few, or too easy, to say more."""
    return f'<p class="soft">{said}</p>'


def _verdict_rows(labels: np.ndarray, alarms: np.ndarray) -> str:
    rows = []
    for label, name in enumerate(("normal", "defective")):
        of_label = alarms[labels == label]
        cells = ""
        for alarm in (False, True):
            own = verdict(label, float(alarm), 0.5)
            count = np.count_nonzero(of_label == alarm)
            rate = f" <small>{_percent(count / of_label.size)}</small>" if of_label.size else ""
            cells += f'<td class="{own.kind}"><b>{count}</b>{rate}<br><small>{own.sign}</small></td>'
        rows.append(f'<tr><th scope="row">{name} <small>{of_label.size}</small></th>{cells}</tr>')
    return "\n".join(rows)


def _roc_chart(curve: tuple[np.ndarray, np.ndarray], labels: np.ndarray, alarms: np.ndarray) -> str:
    """The ROC curve with the threshold's place on it; empty where a class is missing."""
    if not 0 < labels.sum() < labels.size:
        return ""
    mark = (alarms[labels == 0].mean(), alarms[labels == 1].mean())
    titles = ("false alarms among normal images", "defects found")
    return charts.rate_chart("ROC curve", curve, titles=titles, mark=mark)


def _pro_chart(curve: tuple[np.ndarray, np.ndarray] | None, limit: float) -> str:
    if curve is None or np.isnan(curve).any():
        return ""
    titles = ("normal pixels marked", "of each defect marked")
    return charts.rate_chart("PRO curve", curve, titles=titles, limit=limit)


def _training_charts(history: Sequence[Mapping[str, float]]) -> str:
    drawn = []
    for column, name in (("loss", "loss"), ("learning_rate", "learning rate")):
        rows = [(row["step"], row[column]) for row in history if row.get(column) is not None]
        rows = [row for row in rows if math.isfinite(row[1])]
        if rows:
            drawn.append(charts.step_chart(name, *zip(*rows, strict=True)))
    return "\n".join(drawn)


def _type_rows(labels: np.ndarray, scores: np.ndarray, types: np.ndarray, alarms: np.ndarray) -> str:
    rows = []
    for label, name in sorted(set(zip(labels.tolist(), types.tolist(), strict=True))):
        own = (labels == label) & (types == name)
        rate = alarms[own].mean()
        area = "&ndash;"
        if label and not labels.all():
            compared = own | (labels == 0)
            area = _percent(metrics.image_auroc(labels[compared], scores[compared]))
        kind = "anomalous" if label else "normal"
        rect = f'<rect class="{kind}" width="{100 * rate:.1f}" height="9"></rect>'
        bar = f'<svg class="bar" viewBox="0 0 100 9" aria-hidden="true">{rect}</svg> {_percent(rate)}'
        cells = (f"{np.count_nonzero(own)}", four_digits(scores[own].mean()), bar, area)
        # On a phone a long name is broken after an underscore.
        head = f'<th scope="row"><i class="dot {kind}"></i>{escape(name).replace("_", "_<wbr>")}</th>'
        rows.append(f"<tr>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return "\n".join(rows)


def _shown(count: int, images: int) -> str:
    """How many of the test images the gallery holds."""
    if count == images:
        return f"All {_count(images, 'test image')}."
    least = f"{gallery.LIMIT} at most, of every defect type and verdict in turn those farthest from the threshold"
    return f"{count} of {_count(images, 'test image')}: {least}. predictions.csv has all."


def _options(names: Iterator[str]) -> str:
    return "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in sorted(set(names)))


def _scale_picture() -> str:
    """The heat scale from 0 to twice the threshold, as a picture."""
    colours = heatmap.heat_colours(np.linspace(0.0, 2.0, 256)[None], threshold=1.0)
    encoded = io.BytesIO()
    Image.fromarray(colours).save(encoded, "PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def _flat(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
