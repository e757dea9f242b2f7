"""The test images of a run, scored batch by batch: a score an image, and of the pixels only what is needed.

Pixels flow into exact metrics, or above `EXACT_PIXELS` into a histogram of bounded memory; maps and masks are kept of
those images alone that the report will show. S is the image size of the run.
"""

from collections.abc import Collection, Mapping
from functools import reduce
from operator import add
from typing import NamedTuple

import numpy as np

from pushpull_jax.batching import BATCH_SIZE
from pushpull_jax.config import Config
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.pipeline import image_batches
from pushpull_jax.data.sources import read_records
from pushpull_jax.detector import Detector
from pushpull_jax.errors import InputError
from pushpull_jax.progress import progress_bar, say
from pushpull_jax.report import choose_cases
from pushpull_jax.streaming_metrics import ExactPixels, PixelHistogram

# Half a gigabyte of float32 scores, and twice that while they are sorted: 2048 images of 256 px, 128 of 1024.
EXACT_PIXELS = 2**27

Pixels = ExactPixels | PixelHistogram


class Shown(NamedTuple):
    """What the report shows of an image."""

    map: np.ndarray  # [S,S] float32
    mask: np.ndarray | None  # [S,S] bool; None where the truth of the pixels is unknown


class Scored(NamedTuple):
    """The test images that could be read, with what the detector says of them."""

    records: tuple[Record, ...]
    scores: np.ndarray  # [N] float32
    has_mask: np.ndarray  # [N] bool: whether the truth of the pixels is known
    pixels_of: Mapping[str, Pixels]  # by category, of those images
    shown: Mapping[str, Shown]  # by key, of the images that `report.choose_cases` chooses

    @property
    def labels(self) -> np.ndarray:
        return np.asarray([record.label for record in self.records], bool)

    @property
    def pixels(self) -> Pixels:
        """Those of all categories."""
        return reduce(add, self.pixels_of.values())

    def of_category(self, category: str) -> "Scored":
        """Those of one category."""
        own = np.asarray([record.category == category for record in self.records])
        records = tuple(record for record in self.records if record.category == category)
        shown = {record.key: self.shown[record.key] for record in records if record.key in self.shown}
        return Scored(records, self.scores[own], self.has_mask[own], {category: self.pixels_of[category]}, shown)


def score(detector: Detector, config: Config, *, without: Collection[str] = ()) -> tuple[Scored, dict[str, str]]:
    """Score the test images of a config's category.

    Args:
        detector: of the run.
        config: of the run.
        without: keys of test images that were trained on, or withheld.

    Returns:
        The images, and why some were left out, by key, if the config says to skip what cannot be read.

    Raises:
        InputError: the data, or any of the images, cannot be read.
    """
    records = read_records(config.data.source, config.data.root, config.data.category)
    records = tuple(record for record in records if record.split == "test" and record.key not in without)
    dropped: dict[str, str] = {}
    batches = image_batches(
        records,
        image_size=config.data.image_size,
        batch_size=BATCH_SIZE,
        resize=config.data.resize,
        with_masks=True,
        on_unreadable=config.data.on_unreadable,
        dropped=dropped,
    )
    is_exact = len(records) * config.data.image_size**2 <= EXACT_PIXELS
    scored = Scored((), np.zeros(0, np.float32), np.zeros(0, bool), {}, {})
    bar = progress_bar(batches, desc="scoring", total=-(-len(records) // BATCH_SIZE), unit="batch")
    for batch in bar:
        scores, maps = detector.detect_resized(batch["image"])
        of_batch = tuple(records[i] for i in batch["index"])
        pixels = with_pixels(scored.pixels_of, of_batch, batch, maps, ExactPixels() if is_exact else PixelHistogram())
        scored = Scored(
            scored.records + of_batch,
            np.concatenate((scored.scores, scores)),
            np.concatenate((scored.has_mask, batch["has_mask"])),
            pixels,
            scored.shown,
        )
        scored = scored._replace(shown=_still_shown(scored, maps, batch, detector.threshold))
    if not scored.records:
        raise InputError(
            f"{config.data.root}: none of {len(records)} test images of {config.data.category} can be read"
        )
    for key, reason in dropped.items():
        say(f"left out {key}: {reason}")
    return scored, dropped


def with_pixels(
    pixels_of: Mapping[str, Pixels], records: tuple[Record, ...], batch: dict, maps: np.ndarray, empty: Pixels
) -> dict[str, Pixels]:
    """The pixels by category with those of a batch whose truth is known."""
    pixels_of = dict(pixels_of)
    for category in sorted({record.category for record in records}):
        own = batch["has_mask"] & [record.category == category for record in records]
        pixels_of[category] = pixels_of.get(category, empty).update(batch["mask"][own], maps[own])
    return pixels_of


def _still_shown(scored: Scored, maps: np.ndarray, batch: dict, threshold: float) -> dict[str, Shown]:
    """What to show if there came no other batch. Who is not chosen now will not be chosen among more images."""
    first = len(scored.records) - len(maps)
    chosen = choose_cases(scored.labels, scored.scores, threshold)
    shown = {}
    for i in sorted({i for group in chosen.values() for i in group}):
        key = scored.records[i].key
        if i < first:
            shown[key] = scored.shown[key]
        else:
            mask = batch["mask"][i - first].copy() if batch["has_mask"][i - first] else None
            shown[key] = Shown(maps[i - first].copy(), mask)
    return shown
