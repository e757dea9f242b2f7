"""New thresholds for a finished run, without training: for another false-positive rate, or from other normal images.

A threshold belongs to the images that it was fitted on, and to how they were scored: whole, or cut into tiles.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pushpull_jax import workdir as files
from pushpull_jax.calibration import Threshold, conformal_threshold
from pushpull_jax.config import Config
from pushpull_jax.data.images import decode_image
from pushpull_jax.data.manifest import listed
from pushpull_jax.data.sources import read_records
from pushpull_jax.detector import Detector, load
from pushpull_jax.errors import InputError
from pushpull_jax.prediction import find_images
from pushpull_jax.progress import progress_bar
from pushpull_jax.tiling import detect_parts


class Calibration(NamedTuple):
    """What a run's thresholds became."""

    threshold: Threshold  # of the images
    map_threshold: float
    unreadable: dict[str, str]  # the reason for each file that was left out


def calibrate(
    workdir: str | os.PathLike,
    normals: Sequence[str | os.PathLike],
    *,
    false_positive_rate: float,
    tile: int | None = None,
) -> Calibration:
    """Fit the thresholds of a run to normal images that it was not trained on, and write its threshold.json.

    Args:
        workdir: folder of the finished run.
        normals: image files, and folders that are searched for images at any depth, all of them normal.
        false_positive_rate: share of normal images that may be called anomalous, between 0 and 1.
        tile: side in native pixels of the tiles that images are cut into; by default they are scored whole.

    Raises:
        InputError: the run or the images cannot be used, or the run was trained on one of them.
    """
    if not 0 < false_positive_rate < 1:
        raise InputError(f"--fpr {false_positive_rate}: expected a share between 0 and 1")
    folder = files.run_folder(workdir)
    config, run = files.read_config(folder)
    paths = [path for path, _ in find_images(normals, apart_from=folder)]
    _check_unseen(paths, config, run["data"])
    scores, peaks, unreadable = _score(load(folder), paths, tile)
    if not scores:
        raise InputError(f"none of {len(paths)} images can be read: {next(iter(unreadable.values()))}")
    threshold = conformal_threshold(np.asarray(list(scores.values())), false_positive_rate=false_positive_rate)
    map_threshold = conformal_threshold(np.asarray(list(peaks.values())), false_positive_rate=false_positive_rate)
    values = {
        "threshold": threshold.value,
        "false_positive_rate": false_positive_rate,
        "note": threshold.note(),
        "map_threshold": map_threshold.value,
        "held_out_scores": scores,
        "held_out_peaks": peaks,
        "calibrated_on": [str(source) for source in normals],
        "tile": tile,
    }
    files.write_json(folder / files.THRESHOLD, values)
    return Calibration(threshold, map_threshold.value, unreadable)


def at_false_positive_rate(workdir: str | os.PathLike, detector: Detector, *, rate: float) -> Detector:
    """The detector of a run with the thresholds for another rate, by the images that its own were fitted on.

    Args:
        workdir: folder of the run.
        detector: of the run.
        rate: share of normal images that may be called anomalous, between 0 and 1.

    Raises:
        InputError: the rate is not between 0 and 1, or the run does not tell the scores of those images.
    """
    if not 0 < rate < 1:
        raise InputError(f"--fpr {rate}: expected a share between 0 and 1")
    path = files.run_folder(workdir) / files.THRESHOLD
    values = files.read_json(path)
    parts = [values.get(name) for name in ("held_out_scores", "held_out_peaks")]
    if not all(isinstance(part, dict) and part for part in parts):
        raise InputError(
            f"{path} does not tell the scores of its normal images; `pushpull calibrate` fits thresholds anew"
        )
    fitted = [conformal_threshold(np.asarray(list(part.values())), false_positive_rate=rate) for part in parts]
    return detector.with_thresholds(*(threshold.value for threshold in fitted))


def _check_unseen(paths: Sequence[Path], config: Config, data: dict[str, Any]) -> None:
    """Raise where an image is one that a run was trained on, as far as its data are still where they were."""
    try:
        records = read_records(config.data.source, config.data.root, config.data.category)
    except InputError:
        return
    normal = {record.key for record in records if record.split == "train" and record.label == 0}
    # The split may be another than it was; older runs do not tell what they trained on.
    keys = set(data.get("trained", normal - set(data["held_out"]))) | set(data["labelled"])
    trained = {os.path.realpath(r.image) for r in records if r.key in keys and isinstance(r.image, str)}
    seen = [str(path) for path in paths if os.path.realpath(path) in trained]
    if seen:
        raise InputError(
            f"{len(seen)} of the images were trained on, and their scores are too low for a threshold: {listed(seen)}"
        )


def _score(
    detector: Detector, paths: Sequence[Path], tile: int | None
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Scores and peaks of the maps of images by their paths, and the reasons for those that cannot be read."""
    scores, peaks, unreadable = {}, {}, {}
    for path in progress_bar(paths, desc="calibrating", total=len(paths), unit="image"):
        try:
            pixels = decode_image(path)
        except InputError as error:
            unreadable[str(path)] = str(error)
            continue
        parts = list(detect_parts(detector, pixels, side=tile))
        scores[str(path)] = max(float(part.score) for part in parts)
        peaks[str(path)] = max(detector.peak(part.map) for part in parts)
    return scores, peaks, unreadable
