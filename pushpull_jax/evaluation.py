"""The evaluation program: score the test images of a run, and write metrics.json, predictions.csv and report.html.

Nothing is chosen on the test images: the detector and its threshold are the run's. Pixel metrics are computed at the
image size of the run, against masks reduced by area; the label of an image is the data set's, never its mask's. Each
metric has a bootstrap interval over the test images; the deviation over seeds is `ablation`'s.
"""

import csv
import io
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from PIL import Image

from pushpull_jax import bootstrap, metrics, report
from pushpull_jax import workdir as files
from pushpull_jax.config import Config, to_dict
from pushpull_jax.data.images import read_image, resize_image
from pushpull_jax.detector import Detector, load
from pushpull_jax.gallery import PICTURE_SIDE, Case
from pushpull_jax.scored import Pixels, Scored, score
from pushpull_jax.streaming_metrics import PixelHistogram
from pushpull_jax.tensorboard import EventFile, side_by_side

FPR_LIMIT = 0.3
_TENSORBOARD_CASES = 24
METRICS = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")


def evaluate(
    workdir: str | os.PathLike, *, root: str | os.PathLike | None = None, reconstructor: nn.Module | None = None
) -> dict[str, Any]:
    """Evaluate a finished run on the test images of its category.

    Args:
        workdir: folder of the run.
        root: where the data are now, if they have moved.
        reconstructor: as given to `train`.

    Returns:
        The contents of metrics.json: each metric in [0,1] (nan where it has no answer), what they mean, and their
        "intervals", which hold "level", "resamples", and for each metric its two ends, or None where there are none.

    Raises:
        InputError: the run or the data cannot be used.
    """
    folder = files.run_folder(workdir)
    config, run = files.read_config(folder)
    if root is not None:
        config = replace(config, data=replace(config.data, root=str(root)))
    detector = load(folder, reconstructor=reconstructor)
    data = run["data"]
    # Older runs do not tell what they trained on.
    used = {*data.get("trained", ()), *data["held_out"], *data["labelled"]}
    scored, left_out = score(detector, config, without=data["out_of_test"], used=used)
    result = with_intervals(measure_categories(scored, detector.threshold), scored) | {
        "resolution": config.data.image_size,
        "mask_rule": "anomalous where at least half of the area is, at the resolution; a letterbox's margin is normal",
        "fpr_limit": FPR_LIMIT,
        "left_out": left_out,
    }
    files.write_text(folder / files.PREDICTIONS, _predictions(scored, detector.threshold))
    contents = _contents(folder, config, run, scored, detector, result)
    report.write_report(folder / files.REPORT, contents)
    if config.log.tensorboard:
        _show(folder / files.TENSORBOARD / "test", contents, step=config.training.steps)
    files.write_json(folder / files.METRICS, result)  # last, so that it stands for all three
    return result


def measure_categories(scored: Scored, threshold: float) -> dict[str, Any]:
    """`measure`; of several categories the mean of each metric over them, and "categories" with those of each."""
    categories = sorted({record.category for record in scored.records})
    if len(categories) == 1:
        return measure(scored, threshold)
    parts = {name: measure(scored.of_category(name), threshold) for name in categories}
    # Where a category has no answer, the mean over all of them has none either.
    means = {name: float(np.mean([part[name] for part in parts.values()])) for name in METRICS}
    precision = {"pixel_metrics": parts[categories[0]]["pixel_metrics"]}
    if all(bounds := [part.get("pixel_metrics_bounds") for part in parts.values()]):
        precision["pixel_metrics_bounds"] = {n: float(np.mean([bound[n] for bound in bounds])) for n in bounds[0]}
    return means | precision | count_verdicts(scored, threshold) | {"averaged_over": "categories", "categories": parts}


def with_intervals(result: dict[str, Any], scored: Scored) -> dict[str, Any]:
    """What `measure_categories` gives, with the bootstrap interval of each metric, those of each category included."""
    names = sorted({record.category for record in scored.records})
    parts = {name: scored.of_category(name) for name in names}
    # Each category has a stream of its own: else those of one size would be resampled alike, and their mean vary more.
    streams = np.random.default_rng(0).spawn(len(names))
    resampled = {
        name: bootstrap.resampled_metrics(stream, part.labels, part.scores, part.histograms, fpr_limit=FPR_LIMIT)
        for stream, (name, part) in zip(streams, parts.items(), strict=True)
    }
    own = {name: _intervals(values, parts[name]) for name, values in resampled.items()}
    if len(names) == 1:
        return result | {"intervals": own[names[0]]}
    categories = {name: part | {"intervals": own[name]} for name, part in result["categories"].items()}
    mean = bootstrap.mean_of(list(resampled.values()))
    return result | {"intervals": _as_fields(bootstrap.intervals(mean)), "categories": categories}


def _intervals(resampled: dict[str, bootstrap.Resampled], scored: Scored) -> dict[str, Any]:
    found = bootstrap.intervals(resampled)
    if separated := bootstrap.separated_auroc_interval(scored.labels, scored.scores):
        found["image_auroc"] = separated
    return _as_fields(found)


def _as_fields(intervals: dict[str, bootstrap.Interval]) -> dict[str, Any]:
    fields = {name: None if math.isnan(ends[0]) else list(ends) for name, ends in intervals.items()}
    return {"level": bootstrap.LEVEL, "resamples": bootstrap.RESAMPLES} | fields


def measure(scored: Scored, threshold: float) -> dict[str, Any]:
    """All metrics of scored images, how those over pixels were computed, and the verdicts at the threshold."""
    pixels = scored.pixels
    result = metrics.image_metrics(scored.labels, scored.scores)
    if pixels.has_regions:
        result |= pixels.metrics(fpr_limit=FPR_LIMIT)
    else:  # one-class data sets have no masks: that is no reason to warn
        result |= {name: math.nan for name in METRICS if name not in result}
    return result | _precision(pixels) | count_verdicts(scored, threshold)


def _precision(pixels: Pixels) -> dict[str, Any]:
    """How far the metrics over pixels can be from those of all scores in their order."""
    if not isinstance(pixels, PixelHistogram):
        return {"pixel_metrics": "exact"}
    return {"pixel_metrics": "histogram", "pixel_metrics_bounds": pixels.bounds(fpr_limit=FPR_LIMIT)}


def count_verdicts(scored: Scored, threshold: float) -> dict[str, Any]:
    """How many images there are, and how many the threshold tells wrongly."""
    verdicts, labels, known = scored.scores > threshold, scored.labels, scored.has_mask
    return {
        "threshold": threshold,
        "images": len(labels),
        "images_with_pixel_truth": int(known.sum()),
        "false_alarms": int((verdicts & ~labels).sum()),
        "normal": int((~labels).sum()),
        "missed": int((~verdicts & labels).sum()),
        "anomalous": int(labels.sum()),
    }


def _predictions(scored: Scored, threshold: float) -> str:
    """predictions.csv: a row an image."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("path", "label", "defect_type", "score", "threshold", "verdict"))
    for record, value in zip(scored.records, scored.scores.tolist(), strict=True):
        verdict = "anomalous" if value > threshold else "normal"
        rows.writerow((record.key, record.label, record.defect_type, f"{value:.6g}", f"{threshold:.6g}", verdict))
    return text.getvalue()


def _show(folder: Path, contents: report.Report, *, step: int) -> None:
    """Metrics and the most important cases of the report, for TensorBoard."""
    with EventFile(folder) as events:
        events.add_scalars(step, contents.metrics)
        for case in contents.cases[:_TENSORBOARD_CASES]:
            image = np.asarray(Image.fromarray(case.image).resize(case.map.shape[::-1]))
            events.add_picture(
                step, case.key, side_by_side(image, case.mask, case.map, threshold=contents.map_threshold)
            )


def _contents(
    folder: Path, config: Config, run: dict[str, Any], scored: Scored, detector: Detector, result: dict[str, Any]
) -> report.Report:
    """What the report shows."""
    threshold = files.read_json(folder / files.THRESHOLD)
    pixels = scored.pixels
    return report.Report(
        title=f"{config.data.category} · {folder.name}",
        metrics={name: result[name] for name in METRICS},
        intervals={name: tuple(result["intervals"][name] or (math.nan, math.nan)) for name in METRICS},
        threshold=detector.threshold,
        map_threshold=detector.map_threshold,
        false_positive_rate=threshold["false_positive_rate"],
        threshold_note=threshold["note"],
        labels=scored.labels.astype(int),
        scores=scored.scores,
        defect_types=[record.defect_type for record in scored.records],
        roc=metrics.roc_curve(scored.labels, scored.scores),
        pro=pixels.pro_curve() if pixels.has_regions else None,
        pro_limit=FPR_LIMIT,
        cases=_cases(scored, config),
        history=files.read_lines(folder / files.LOG),
        config=to_dict(config),
        details=_details(run, result),
    )


def _cases(scored: Scored, config: Config) -> list[Case]:
    """The test images that the report shows, framed as the detector saw them."""
    index = {record.key: i for i, record in enumerate(scored.records)}
    cases = []
    for key, shown in scored.shown.items():
        record = scored.records[index[key]]
        image = read_image(record)
        framed = resize_image(image, size=min(max(image.shape[:2]), PICTURE_SIDE), mode=config.data.resize)
        cases.append(
            Case(
                key=key,
                defect_type=record.defect_type,
                label=record.label,
                score=float(scored.scores[index[key]]),
                image=np.rint(framed).astype(np.uint8),
                mask=shown.mask,
                map=shown.map,
            )
        )
    return cases


def _details(run: dict[str, Any], result: dict[str, Any]) -> dict[str, str]:
    """Where the numbers come from."""
    data = run["data"]
    anomalies = {"labelled": len(data["labelled"]), "confetti": data["confetti"], "irrelevant": data["irrelevant"]}
    shown = ", ".join(f"{count} {name}" for name, count in anomalies.items() if count) or "none"
    parts = result.get("categories", {})
    by_category = {
        f"{name} by category": ", ".join(f"{category} {100 * part[name]:.1f}" for category, part in parts.items())
        for name in ("image_auroc", "pixel_auroc", "aupro")
        if parts
    }
    return by_category | {
        "command": " ".join(run["command"]) or "called from Python",
        "data fingerprint": data["fingerprint"],
        "images": f"{data['train']} to train, {len(data['held_out'])} held out, {result['images']} to test",
        "anomalies trained on": shown,
        "resolution of pixel metrics": f"{result['resolution']} px; masks {result['mask_rule']}",
        "pixel metrics": _said(result),
        "false-positive rate limit of AU-PRO": str(result["fpr_limit"]),
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }


def _said(result: dict[str, Any]) -> str:
    """How the pixel metrics were computed, for people."""
    bounds = result.get("pixel_metrics_bounds", {})
    return ", ".join((result["pixel_metrics"], *(f"{name} within {bound:.1e}" for name, bound in bounds.items())))
