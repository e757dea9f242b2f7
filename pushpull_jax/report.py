"""The report of an evaluated run for people: one self-contained HTML file, on any screen, in light and dark.

Labels are 1 anomalous, 0 normal; a score above the threshold raises an alarm, one equal to it does not, as the
conformal quantile promises its false-positive rate for scores above it. Charts are inline SVG, pictures data: URIs;
nothing is loaded from anywhere. Page, style and script are `templates/report.html`; here its parts are filled in, and
every text that comes from outside is escaped.
"""

import base64
import html
import io
import math
import os
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import numpy as np
from PIL import Image

from pushpull_jax import charts, heatmap, metrics
from pushpull_jax.workdir import write_bytes

_PICTURE_SIDE = 400  # longer side of an embedded picture in pixels: sharp at the width it has, about 10 kB each
_MASK_COLOUR = (255, 0, 200)  # magenta: in no colour of the heat scale and rare on parts
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
class Case:
    """One test image to show."""

    key: str
    defect_type: str
    label: int
    score: float
    image: np.ndarray  # [H, W, 3] uint8
    mask: np.ndarray | None  # [H, W] bool; None where there is none
    map: np.ndarray  # [H, W] float32


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """All that the report shows; N test images."""

    title: str
    metrics: Mapping[str, float]  # image_auroc, ..., aupro; missing or nan ones are shown as a dash with the reason
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
    cases: Sequence[Case] = ()
    history: Sequence[Mapping[str, float]] = ()  # rows of metrics.jsonl: step, loss, learning_rate
    config: Mapping[str, object]  # nested
    details: Mapping[str, str]  # provenance: data fingerprint, versions, command, ...


class _Group(NamedTuple):
    title: str
    label: int
    alarm: bool
    highest_first: bool
    verdict: str
    order: str

    @property
    def kind(self) -> str:
        return "right" if self.label == self.alarm else "wrong"


_GROUPS = (
    _Group("Missed defects", 1, False, False, "✗ missed", "lowest score first"),
    _Group("False alarms", 0, True, True, "✗ false alarm", "highest score first"),
    _Group("Found defects", 1, True, True, "✓ found", "highest score first"),
    _Group("Normal images passed", 0, False, False, "✓ passed", "coldest first"),
)


def choose_cases(labels: np.ndarray, scores: np.ndarray, threshold: float, *, count: int = 6) -> dict[str, list[int]]:
    """Choose the images to show: worst errors and best hits, up to `count` of each kind.

    Args:
        labels: [N], 0 or 1.
        scores: [N].
        threshold: a score above it is an alarm.
        count: images a group at most.

    Returns:
        Indices into N by the group's title: missed defects with the lowest scores, false alarms with the highest,
        found defects with the highest, passed normal images with the lowest; ties in their order. A group may be empty.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    chosen = {}
    for group in _GROUPS:
        members = np.flatnonzero((labels == group.label) & ((scores > threshold) == group.alarm))
        rank = -scores[members] if group.highest_first else scores[members]
        chosen[group.title] = members[np.argsort(rank, kind="stable")][:count].tolist()
    return chosen


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Write the report as one HTML file, whole or not at all.

    Args:
        path: the file; its folder must exist.
        report: what to show.

    Raises:
        ValueError: labels, scores and defect_types differ in length, are empty, or hold other than 0 and 1 or finite
            values; a threshold is not finite and above 0; a metric's name is unknown; or image, mask and map of a
            case differ in size.
    """
    page = _render(report)
    # A file name may hold bytes that are no UTF-8, which Python keeps as lone surrogates: they become "?".
    write_bytes(path, page.encode("utf-8", "replace"))


def _render(report: Report) -> str:
    labels, scores = _checked(report)
    alarms = scores > report.threshold
    undefined = _why_undefined(report, labels)
    histogram = charts.score_histogram(labels, scores, threshold=report.threshold)
    template = resources.files("pushpull_jax").joinpath("templates/report.html").read_text("utf-8")
    return string.Template(template).substitute(
        title=_text(report.title),
        summary=_summary(labels, alarms),
        image_cards=_cards(report.metrics, _IMAGE_METRICS, undefined["image"]),
        pixel_cards=_cards(report.metrics, _PIXEL_METRICS, undefined["pixel"]),
        verdicts=_verdict_rows(labels, alarms),
        threshold=f"{report.threshold:.4g}",
        rate=f"{100 * report.false_positive_rate:.3g}%",
        note=_text(report.threshold_note),
        histogram=charts.histogram_chart(histogram, threshold=report.threshold),
        roc=_roc_chart(report.roc, labels, alarms) or _missing(undefined["image"]),
        pro=_pro_chart(report.pro, report.pro_limit) or _missing(undefined["pixel"]),
        pro_limit=f"{100 * report.pro_limit:.3g}%",
        training=_training_charts(report.history) or _missing("no training history"),
        types=_type_rows(labels, scores, np.asarray(report.defect_types), alarms),
        heat_scale=heatmap.css_gradient(),
        galleries="\n".join(_gallery(group, report) for group in _GROUPS),
        details=_pair_rows(report.details.items()),
        config=_pair_rows(_flat(report.config)),
    )


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


def _cards(values: Mapping[str, float], names: Mapping[str, tuple[str, str]], undefined: str) -> str:
    cards = []
    for name, (title, meaning) in names.items():
        value = values.get(name, math.nan)
        shown, small = ("&ndash;", f"undefined: {undefined}") if math.isnan(value) else (_percent(value), meaning)
        cards.append(f'<div class="card"><h3>{title}</h3><b>{shown}</b><p>{small}</p></div>')
    return "\n".join(cards)


def _verdict_rows(labels: np.ndarray, alarms: np.ndarray) -> str:
    rows = []
    for label, name in enumerate(("normal", "defective")):
        of_label = alarms[labels == label]
        cells = ""
        for group in sorted((group for group in _GROUPS if group.label == label), key=lambda group: group.alarm):
            count = np.count_nonzero(of_label == group.alarm)
            rate = f" <small>{_percent(count / of_label.size)}</small>" if of_label.size else ""
            cells += f'<td class="{group.kind}"><b>{count}</b>{rate}<br><small>{group.verdict}</small></td>'
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
    for field, name in (("loss", "loss"), ("learning_rate", "learning rate")):
        rows = [(row["step"], row[field]) for row in history if row.get(field) is not None]
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
        bar = f'<span class="bar"><i class="{kind}" style="width:{100 * rate:.1f}%"></i></span> {_percent(rate)}'
        cells = (f"{np.count_nonzero(own)}", f"{scores[own].mean():.4g}", bar, area)
        head = f'<th scope="row"><i class="dot {kind}"></i>{_text(name)}</th>'
        rows.append(f"<tr>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return "\n".join(rows)


def _gallery(group: _Group, report: Report) -> str:
    def belongs(case: Case) -> bool:
        return case.label == group.label and (case.score > report.threshold) == group.alarm

    cases = sorted(filter(belongs, report.cases), key=lambda case: case.score, reverse=group.highest_first)
    if not cases:
        return f"<h3>{group.title}</h3>{_missing('none shown')}"
    shown = "\n".join(_case(case, group, report.map_threshold) for case in cases)
    return f'<h3>{group.title} <small>{group.order}</small></h3>\n<div class="cases">\n{shown}\n</div>'


def _case(case: Case, group: _Group, map_threshold: float) -> str:
    pictures = [_picture(case.image, "image", case.key)]
    if case.mask is not None and case.mask.any():
        outlined = heatmap.outline(case.image, np.asarray(case.mask, bool), colour=_MASK_COLOUR)
        pictures.append(_picture(outlined, "true defect", case.key))
    else:
        pictures.append(f'<span class="none">{"no mask" if case.label else "no defect"}</span>')
    pictures.append(_picture(heatmap.overlay(case.image, case.map, threshold=map_threshold), "heat map", case.key))
    verdict = f'<span class="{group.kind}">{group.verdict}</span>'
    line = f"{verdict} {_text(case.defect_type)} &middot; score {case.score:.4g}"
    head = f"<header>{line}<br><small>{_text(case.key)}</small></header>"
    return f'<article class="case">{head}<div class="pictures">{"".join(pictures)}</div></article>'


def _picture(image: np.ndarray, caption: str, key: str) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=85)
    source = "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
    alt = f"{caption} of {_text(key)}"
    return f'<figure><button><img src="{source}" alt="{alt}"></button><figcaption>{caption}</figcaption></figure>'


def _flat(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _pair_rows(pairs: Iterable[tuple[str, object]]) -> str:
    return "\n".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in pairs)


def _missing(reason: str) -> str:
    return f'<p class="missing">&ndash; {reason}</p>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _text(value: object) -> str:
    return html.escape(str(value))
