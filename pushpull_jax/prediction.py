"""The prediction program: a row for every image of some files and folders, and pictures at native size.

Decoding and writing happen in threads beside the detector, a few images ahead, so that memory does not grow with the
number of images. What is done is in the output (`prediction_output`): a run that was stopped goes on.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pushpull_jax.data.images import decode_image, resize_image
from pushpull_jax.data.manifest import is_image_name
from pushpull_jax.detector import BATCH_SIZE, Detector
from pushpull_jax.errors import InputError
from pushpull_jax.prediction_output import Output, Pictures, Prediction, Version
from pushpull_jax.progress import progress_bar
from pushpull_jax.tiling import detect_tiles
from pushpull_jax.workdir import local_folder

# Images that are decoded ahead of the detector, besides those of a batch.
_AHEAD = 4
_THREADS = 4
HEATMAPS_ONLY = Pictures()
# Seconds between two looks at a watched folder.
_POLL = 0.5


class Image(NamedTuple):
    """An image to predict."""

    path: Path
    version: Version
    pixels: np.ndarray  # [H,W,3] uint8
    resized: np.ndarray | None  # [S,S,3] float32; None where it is cut into tiles


def predict(
    detector: Detector,
    inputs: Sequence[str | PathLike],
    output: str | PathLike,
    *,
    pictures: Pictures = HEATMAPS_ONLY,
    tile: int | None = None,
) -> tuple[list[Prediction], dict[str, str]]:
    """Score images, and write predictions.csv, predictions.jsonl and pictures under `output`; go on where it stopped.

    Args:
        detector: see `pushpull_jax.load`.
        inputs: image files, and folders that are searched for images at any depth.
        output: folder, new, or of the same detector, thresholds and options: images whose row is there are not
            predicted again, unless the file has changed since.
        pictures: which are written.
        tile: side in native pixels of the tiles that images are cut into; by default they are scored whole.

    Returns:
        The rows of all inputs that could be read, and the reason for each file that could not: the others are predicted
        all the same.

    Raises:
        InputError: an input does not exist, there is no image in any, or the output is of something else.
    """
    output = local_folder(output, name="--output")
    images = find_images(inputs, apart_from=output)
    unreadable: dict[str, str] = {}
    with Output(output, detector, pictures=pictures, tile=tile) as out:
        new = [path for path, _ in images if not out.has(path)]
        for path, place in images:
            out.name_pictures(path, place)
        bar = progress_bar(desc="predicting", total=len(images), unit="image", initial=len(images) - len(new))
        with bar, ThreadPoolExecutor(_THREADS) as pool:
            for batch in _batches(detector, new, unreadable, pool, tile):
                _predict_batch(detector, batch, out, pool, tile=tile, size=BATCH_SIZE)
                bar.update(len(batch))
        for path in unreadable:
            out.drop(path)
        rows = [out.row(path) for path, _ in images]
    return [row for row in rows if row], unreadable


def watch(
    detector: Detector,
    folder: str | PathLike,
    output: str | PathLike,
    *,
    pictures: Pictures = HEATMAPS_ONLY,
    tile: int | None = None,
    report: Callable[[Prediction | str], None],
    is_over: Callable[[], bool],
) -> None:
    """Predict the images that are in a folder, and those that come, as soon as they are whole, until it is over.

    A file is taken when its size and time have not changed between two looks; one that cannot be read is told once,
    and tried again when it changes.

    Args:
        detector: see `pushpull_jax.load`.
        folder: that is watched, at any depth.
        output: as for `predict`.
        pictures: as for `predict`.
        tile: as for `predict`.
        report: is given each row when it is written, and the reason for each file that cannot be read.
        is_over: asked between two looks.

    Raises:
        InputError: there is no such folder, or the output is of something else.
    """
    output = local_folder(output, name="--output")
    if not Path(folder).is_dir():
        raise InputError(f"--watch {folder}: there is no such folder")
    refused: dict[Path, Version] = {}
    before: dict[Path, Version] = {}
    with Output(output, detector, pictures=pictures, tile=tile) as out, ThreadPoolExecutor(_THREADS) as pool:
        while not is_over():
            began = time.monotonic()
            now = {path: Version.of(path) for path, _ in _find(Path(folder), apart_from=output)}
            whole = [path for path, version in now.items() if version and before.get(path) == version]
            new = [path for path in whole if not out.has(path) and refused.get(path) != now[path]]
            looked = time.monotonic() - began
            for path in new:
                unreadable: dict[str, str] = {}
                out.name_pictures(path, path.relative_to(folder))
                for batch in _batches(detector, [path], unreadable, pool, tile):
                    for row in _predict_batch(detector, batch, out, pool, tile=tile, size=1):
                        report(row)
                for reason in unreadable.values():
                    out.drop(str(path))
                    refused[path] = now[path]
                    report(reason)
                if is_over():
                    break
            before = now
            time.sleep(max(_POLL, looked))  # a look at a full folder must not take a core


def find_images(inputs: Sequence[str | PathLike], *, apart_from: str | PathLike) -> list[tuple[Path, Path]]:
    """Images of files and folders, sorted within a folder, each with its place in the output.

    That is the folder that was given, and the place below it, extension included, so that a.png and a.jpg do not
    collide; images of one name from different places have the same. What lies in `apart_from`, the output, is not an
    input: a second run would find the pictures of the first.
    """
    if not inputs:
        raise InputError("expected image files, or folders of images, after the folder of the run")
    found: dict[Path, Path] = {}
    for source in map(Path, inputs):
        if source.is_dir():
            name = source.resolve().name  # that of "." and ".." too
            pairs = _find(source, apart_from=apart_from)
            found |= {path: Path(name) / inside for path, inside in pairs if path not in found}
        elif source.is_file():
            found.setdefault(source, Path(source.name))
        else:
            raise InputError(f"{source}: there is no such file or folder")
    if not found:
        raise InputError(f"no images in {', '.join(str(source) for source in inputs)}")
    return list(found.items())


def _find(folder: Path, *, apart_from: str | PathLike) -> list[tuple[Path, Path]]:
    """Images below a folder but for those in `apart_from`, sorted, each with its path inside."""
    paths = sorted(path for path in folder.rglob("*") if is_image_name(path.name) and path.is_file())
    output = Path(apart_from).resolve()
    if output.is_relative_to(folder.resolve()):
        paths = [path for path in paths if not path.resolve().is_relative_to(output)]
    return [(path, path.relative_to(folder)) for path in paths]


def _batches(
    detector: Detector,
    images: Iterable[Path],
    unreadable: dict[str, str],
    pool: ThreadPoolExecutor,
    tile: int | None,
) -> Iterator[list[Image]]:
    """Decoded images, a few at a time; files that cannot be read go to `unreadable`."""
    batch: list[Image] = []
    for path, decoded in _ahead(pool, lambda path: _decoded(detector, path, tile), images):
        try:
            batch.append(decoded.result())
        except InputError as error:
            unreadable[str(path)] = str(error)
        if len(batch) == BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


def _ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable) -> Iterator[tuple[Any, Future]]:
    """Items and what a function makes of them, in order, computed at most _AHEAD ahead of who asks."""
    waiting: deque = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting


def _decoded(detector: Detector, path: Path, tile: int | None) -> Image:
    version = Version.of(path)
    pixels = decode_image(path)
    if version is None:  # it was there a moment ago
        raise InputError(f"{path}: cannot be read: No such file or directory")
    network = detector.network
    resized = resize_image(pixels, size=network.image_size, mode=network.resize) if tile is None else None
    return Image(path, version, pixels, resized)


def _predict_batch(
    detector: Detector, batch: list[Image], out: Output, pool: ThreadPoolExecutor, *, tile: int | None, size: int
) -> list[Prediction]:
    """Score images, `size` at a time, write their pictures, and then their rows."""
    if tile is None:
        scores, maps = detector.detect_resized(np.stack([image.resized for image in batch]), size=size)
        found = [
            (float(score), detector.to_native(score_map, image.pixels.shape[:2]))
            for image, score, score_map in zip(batch, scores, maps, strict=True)
        ]
    else:
        found = [detect_tiles(detector, image.pixels, side=tile) for image in batch]
    rows = list(pool.map(lambda image, result: out.draw(image.path, image.pixels, *result), batch, found))
    out.append(rows, [image.version for image in batch])
    return rows
