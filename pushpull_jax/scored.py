"""The test images of a run, scored batch by batch: a score an image, and of the pixels only what is needed.

Pixels flow into exact metrics, or above `EXACT_PIXELS` into a histogram of bounded memory; maps and masks are kept of
those images alone that the report will show. What an interval needs is a histogram of each image, some ten kilobytes.
S is the image size of the run.
"""

from collections.abc import Collection, Mapping
from functools import reduce
from operator import add
from typing import NamedTuple

import numpy as np

from pushpull_jax.batching import BATCH_SIZE
from pushpull_jax.bootstrap import ImageHistogram, image_histogram
from pushpull_jax.config import Config
from pushpull_jax.data.manifest import Record, listed, measurable
from pushpull_jax.data.pipeline import image_batches
from pushpull_jax.data.sources import read_records
from pushpull_jax.detector import Detector
from pushpull_jax.errors import InputError
from pushpull_jax.gallery import choose_cases, shrink_map, shrink_mask
from pushpull_jax.progress import progress_bar, say
from pushpull_jax.streaming_metrics import ExactPixels, PixelHistogram

# Half a gigabyte of float32 scores, and twice that while they are sorted: 2048 images of 256 px, 128 of 1024.
EXACT_PIXELS = 2**27

Pixels = ExactPixels | PixelHistogram


class Shown(NamedTuple):
    """What the report shows of an image."""

    map: np.ndarray  # [s,s] float32, s at most `gallery.MAP_SIDE`
    mask: np.ndarray | None  # [s,s] bool; None where the truth of the pixels is unknown


class Scored(NamedTuple):
    """The test images that could be read, with what the detector says of them."""

    records: tuple[Record, ...]
    scores: np.ndarray  # [N] float32
    has_mask: np.ndarray  # [N] bool: whether the truth of the pixels is known
    pixels_of: Mapping[str, Pixels]  # by category, of those images
    shown: Mapping[str, Shown]  # by key, of the images that `choose_cases` chooses, in its order
    histograms: tuple[ImageHistogram | None, ...] = ()  # [N], None where there is no mask; () where nobody asks

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
        histograms = tuple(histogram for histogram, kept in zip(self.histograms, own, strict=False) if kept)
        pixels = {category: self.pixels_of[category]}
        return Scored(records, self.scores[own], self.has_mask[own], pixels, shown, histograms)


def score(
    detector: Detector, config: Config, *, without: Collection[str] = (), used: Collection[str] = ()
) -> tuple[Scored, dict[str, str]]:
    """Score the labelled test images of a config's category.

    Args:
        detector: of the run.
        config: of the run.
        without: keys of test images that were drawn to be trained on, or withheld.
        used: keys of other images that were trained on, or fitted the threshold; where the data have no split of their
            own and have changed, they may be test images now, and are left out.

    Returns:
        The images, and why some were left out, by key, if the config says to skip what cannot be read.

    Raises:
        InputError: the data, or any of the images, cannot be read.
    """
    records = read_records(config.data.source, config.data.root, config.data.category)
    if unlabelled := sum(record.split == "test" and record.label is None for record in records):
        say(f"{unlabelled} test images are unlabelled, and left out")
    records = tuple(record for record in measurable(records) if record.key not in without)
    if moved := [record.key for record in records if record.key in used]:
        say(f"the data have changed: {len(moved)} test images are left out, for the run has used them: {listed(moved)}")
        records = tuple(record for record in records if record.key not in used)
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
            scored.histograms + _histograms(batch, maps),
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


def _histograms(batch: dict, maps: np.ndarray) -> tuple[ImageHistogram | None, ...]:
    truth = zip(batch["has_mask"], batch["mask"], maps, strict=True)
    return tuple(image_histogram(mask, of_image) if known else None for known, mask, of_image in truth)


def _still_shown(scored: Scored, maps: np.ndarray, batch: dict, threshold: float) -> dict[str, Shown]:
    """What to show if there came no other batch. Who is not chosen now will not be chosen among more images."""
    first = len(scored.records) - len(maps)
    candidates = [i for i, record in enumerate(scored.records) if i >= first or record.key in scored.shown]
    types = [scored.records[i].defect_type for i in candidates]
    chosen = choose_cases(scored.labels[candidates], scored.scores[candidates], types, threshold)
    shown = {}
    for i in (candidates[at] for at in chosen):
        key = scored.records[i].key
        if i < first:
            shown[key] = scored.shown[key]
        else:
            mask = shrink_mask(batch["mask"][i - first]) if batch["has_mask"][i - first] else None
            # Copies, or the whole batch stays in memory.
            shown[key] = Shown(shrink_map(maps[i - first]).copy(), None if mask is None else mask.copy())
    return shown
