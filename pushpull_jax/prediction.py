"""The prediction program: a row of CSV and a heat map at native size for every image of some files and folders."""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pushpull_jax import heatmap
from pushpull_jax.data.images import decode_image, resize_image
from pushpull_jax.data.manifest import is_image_name
from pushpull_jax.detector import BATCH_SIZE, Detector
from pushpull_jax.errors import InputError
from pushpull_jax.progress import progress_bar

PREDICTIONS, HEATMAPS = "predictions.csv", "heatmaps"


class Prediction(NamedTuple):
    """What the detector says of one image."""

    path: str
    score: float
    threshold: float
    verdict: str


def predict(
    detector: Detector, inputs: Sequence[str | os.PathLike], output: str | os.PathLike
) -> tuple[list[Prediction], dict[str, str]]:
    """Score images, and write predictions.csv and heat maps under `output`.

    Args:
        detector: see `pushpull_jax.load`.
        inputs: image files, and folders that are searched for images at any depth.
        output: folder, new or not; files of the same name are replaced.

    Returns:
        The predictions, and the reason for each file that could not be read: the others are predicted all the same.

    Raises:
        InputError: an input does not exist, or there is no image in any.
    """
    folder = Path(output)
    images = find_images(inputs, apart_from=folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: expected a folder, this is a file")
    (folder / HEATMAPS).mkdir(parents=True, exist_ok=True)
    predictions, unreadable = [], {}
    bar = progress_bar(total=len(images), desc="predicting", unit="image")
    table = folder / f"{PREDICTIONS}.part"
    # A file name may hold bytes that are no UTF-8: they are written as they are.
    with bar, table.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(Prediction._fields)
        for batch in _batches(images, unreadable):
            resized = np.stack([_resized(detector, pixels) for _, _, pixels in batch])
            for (path, name, pixels), score, score_map in zip(batch, *detector.detect_resized(resized), strict=True):
                verdict = "anomalous" if score > detector.threshold else "normal"
                predictions.append(Prediction(str(path), float(score), detector.threshold, verdict))
                rows.writerow((path, f"{score:.6g}", f"{detector.threshold:.6g}", verdict))
                native = detector.to_native(score_map, pixels.shape[:2])
                target = folder / HEATMAPS / name
                target.parent.mkdir(parents=True, exist_ok=True)
                heatmap.save_png(target, heatmap.overlay(pixels, native, threshold=detector.map_threshold))
            bar.update(len(batch))
    os.replace(table, folder / PREDICTIONS)
    return predictions, unreadable


def find_images(inputs: Sequence[str | os.PathLike], *, apart_from: str | os.PathLike) -> list[tuple[Path, Path]]:
    """Images of files and folders, each with the relative path of its heat map, sorted within a folder.

    A heat map keeps the name of its image, extension included, so that a.png and a.jpg do not collide, and its place
    below the folder that was given. What lies in `apart_from`, the output, is not an input: a second run would find the
    heat maps of the first.
    """
    if not inputs:
        raise InputError("expected image files, or folders of images, after the folder of the run")
    found: dict[Path, Path] = {}
    for source in map(Path, inputs):
        if source.is_dir():
            paths = sorted(p for p in source.rglob("*") if p.is_file() and is_image_name(p.name))
            paths = [path for path in paths if not path.resolve().is_relative_to(Path(apart_from).resolve())]
            name = source.resolve().name  # that of "." and ".." too
            found |= {path: Path(name) / path.relative_to(source) for path in paths if path not in found}
        elif source.is_file():
            found.setdefault(source, Path(source.name))
        else:
            raise InputError(f"{source}: there is no such file or folder")
    if not found:
        raise InputError(f"no images in {', '.join(str(source) for source in inputs)}")
    return _apart(found)


def _apart(found: dict[Path, Path]) -> list[tuple[Path, Path]]:
    """Give images of one name from different places different heat maps."""
    taken: set[Path] = set()
    result = []
    for path, name in found.items():
        target, count = name.with_name(f"{name.name}.png"), 1
        while target in taken:
            count += 1
            target = name.with_name(f"{name.name}.{count}.png")
        taken.add(target)
        result.append((path, target))
    return result


def _batches(images: list[tuple[Path, Path]], unreadable: dict[str, str]) -> Iterable[list]:
    """Decoded images, a few at a time; files that cannot be read go to `unreadable`."""
    batch = []
    for path, name in images:
        try:
            batch.append((path, name, decode_image(path)))
        except InputError as error:
            unreadable[str(path)] = str(error)
        if len(batch) == BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


def _resized(detector: Detector, pixels: np.ndarray) -> np.ndarray:
    return resize_image(pixels, size=detector.network.image_size, mode=detector.network.resize)
