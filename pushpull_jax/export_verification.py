"""Whether what was exported says of real images what the training code says, on the device at hand.

Images are uint8 at their native sizes. Every program takes them in the same batches; scores are compared in units of
the training code's score, maps in units of the largest value of its map.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pushpull_jax.data.images import decode_image
from pushpull_jax.data.manifest import is_image_name
from pushpull_jax.detector import Detector
from pushpull_jax.errors import InputError
from pushpull_jax.progress import progress_bar

Program = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

# Of the difference of scores and of maps: what a project asked of its artefacts before any was measured.
TOLERANCE = 1e-4
# Images of a batch, so that more than one shape is tried; what is left over of one goes into the next.
BATCHES = (16, 3, 1)


class Agreement(NamedTuple):
    """How far an artefact is from the training code.

    Attributes:
        name: of the artefact.
        images: how many were compared.
        score: the largest |score - reference| / |reference|.
        map: the largest |map - reference| of any pixel, over the largest value of the reference's map.
    """

    name: str
    images: int
    score: float
    map: float

    def within(self, tolerance: float) -> bool:
        """False where a difference is not a number, too."""
        return self.score <= tolerance and self.map <= tolerance

    def __str__(self) -> str:
        return f"{self.name}: {self.images} images, scores differ by {self.score:.1e}, maps by {self.map:.1e} at most"


def find_samples(source: str | os.PathLike) -> list[Path]:
    """The images of a folder, at any depth, sorted.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"--verify {folder}: there is no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and is_image_name(path.name))
    if not paths:
        raise InputError(f"--verify {folder}: there are no images in it")
    return paths


def compare(detector: Detector, programs: dict[str, Program], paths: Sequence[Path]) -> list[Agreement]:
    """Run images through the training code and through every program.

    Args:
        detector: the training code.
        programs: what is compared with it, by name: uint8 [B,H,W,3] -> scores [B] and maps [B,H,W].
        paths: of the images, at least one.

    Raises:
        InputError: an image cannot be read.
    """
    worst = {name: np.zeros(2) for name in programs}
    with progress_bar(desc="verifying", total=len(paths), unit="image") as bar:
        for images in _batches(paths):
            reference = detector(images)
            for name, program in programs.items():
                # A maximum of NumPy keeps what is not a number.
                worst[name] = np.maximum(worst[name], _differences(program(images), reference))
            bar.update(len(images))
    return [Agreement(name, len(paths), *map(float, differences)) for name, differences in worst.items()]


def _differences(result: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray]) -> tuple:
    (scores, maps), (wanted, wanted_maps) = (
        tuple(np.asarray(part, np.float64) for part in r) for r in (result, reference)
    )
    smallest = np.finfo(np.float32).tiny
    of_scores = np.abs(scores - wanted) / np.maximum(np.abs(wanted), smallest)
    of_maps = np.abs(maps - wanted_maps).max((1, 2)) / np.maximum(wanted_maps.max((1, 2)), smallest)
    return of_scores.max(), of_maps.max()


def _batches(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Decoded images, batches of one size of image each."""
    waiting: dict[tuple[int, ...], list[np.ndarray]] = {}
    for path in paths:
        image = decode_image(path)
        group = waiting.setdefault(image.shape, [])
        group.append(image)
        if len(group) == BATCHES[0]:
            yield np.stack(waiting.pop(image.shape))
    for group in waiting.values():
        for size in BATCHES:
            while len(group) >= size:
                yield np.stack(group[:size])
                del group[:size]
