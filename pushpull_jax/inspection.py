"""What is in a data set before anything is trained: counts, sizes, masks, and what is wrong with it.

Every image and mask is decoded once, in threads, by the function that all programs decode with. What is kept of an
image is small, a digest of its pixels and its thumbnail (6 kB). Identical images are told by digests, whatever files
they are stored in, and copies that were changed a little by `near_duplicates`. Areas are shares of the image.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pushpull_jax.config import Source
from pushpull_jax.data.folders import Faults
from pushpull_jax.data.images import decode_image, decode_mask
from pushpull_jax.data.layouts import Layout, recognise
from pushpull_jax.data.manifest import Record, mask_files
from pushpull_jax.data.near_duplicates import near_duplicates, thumbnail
from pushpull_jax.data.pipeline import cores
from pushpull_jax.data.sources import read_records
from pushpull_jax.errors import InputError
from pushpull_jax.progress import progress_bar

# All other kinds of problems are errors: training stops on them, or what it measures is wrong.
WARNINGS = ("near_leak", "duplicate", "near_duplicate", "ignored")


class Problem(NamedTuple):
    """Something that is wrong with a file."""

    kind: str
    file: str  # relative to the root of the data
    message: str
    other: str | None = None  # the file that it is compared with

    @property
    def is_error(self) -> bool:
        return self.kind not in WARNINGS


class Facts(NamedTuple):
    """What was found of the image of a record."""

    size: tuple[int, int] | None  # (width, height); None where it cannot be read
    storage: str  # "PNG RGB": format and mode of Pillow
    area: float | None  # anomalous share of the image by its masks; None without a mask that fits
    digest: str
    thumbnail: np.ndarray | None
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Inspection:
    """A data set as it was found; facts are in the order of the records."""

    layout: Layout
    records: tuple[Record, ...]
    facts: tuple[Facts, ...]
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> int:
        return sum(problem.is_error for problem in self.problems)

    def sizes(self) -> list[tuple[str, str, int]]:
        """("900x900", "PNG RGB", how many images), the commonest first."""
        counts = Counter(
            (f"{facts.size[0]}x{facts.size[1]}", facts.storage) for facts in self.facts if facts.size is not None
        )
        return [(*key, count) for key, count in counts.most_common()]

    def groups(self) -> dict[tuple[str, str, str], list[int]]:
        """(category, split, type of defect) -> places of its records, sorted; training and normal images first."""
        groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for place, record in enumerate(self.records):
            groups[record.category, record.split, record.defect_type].append(place)
        return dict(sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] == "test", item[0][2] != "good")))


def inspect(
    root: str | os.PathLike, *, source: Source | None = None, category: str | None = None, threads: int | None = None
) -> Inspection:
    """Look at a data set.

    Args:
        root: its folder, the folder of one category, or a table.
        source: its layout, if it cannot be told.
        category: one category of it, or the normal class; None: all.
        threads: images decoded at a time; by default one a core.

    Returns:
        What it holds and what is wrong with it.

    Raises:
        InputError: root does not exist, its layout cannot be told, or a table of it cannot be read.
    """
    layout = recognise(root, source=source, category=category)
    faults: Faults = {}
    records = [
        record
        for name in layout.categories
        for record in read_records(layout.source, str(layout.root), name, faults=faults)
    ]
    base = layout.root.parent if layout.root.is_file() else layout.root
    facts = list(progress_bar(_examined(records, base, threads), desc="reading", total=len(records), unit="image"))
    problems = [*_layout_problems(faults, layout, base), *(p for found in facts for p in found.problems)]
    problems += _identical(records, facts)
    problems += _nearly_identical(records, facts)
    kinds = [*dict.fromkeys(problem.kind for problem in problems if problem.is_error), *WARNINGS]
    problems.sort(key=lambda problem: (kinds.index(problem.kind), problem.file))
    return Inspection(layout, tuple(records), tuple(facts), tuple(problems))


def relative_to(file: str | os.PathLike, base: Path) -> str:
    """A path relative to the root of the data, or whole where it lies elsewhere."""
    path = Path(file)
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def _examined(records: Sequence[Record], base: Path, threads: int | None) -> Iterator[Facts]:
    with ThreadPoolExecutor(threads or cores()) as pool:
        # Some at a time: whoever interrupts it waits for those that were handed out.
        for start in range(0, len(records), 256):
            yield from pool.map(lambda record: _examine(record, base), records[start : start + 256])


def _examine(record: Record, base: Path) -> Facts:
    name = relative_to(record.image, base)
    try:
        pixels = decode_image(record.image, name=name)
    except InputError as error:
        problem = Problem("unreadable", name, _reason(error, name))
        return Facts(None, "", None, "", None, (problem, *_mask_problems(record, None, base)[1]))
    with Image.open(record.image) as header:
        storage = f"{header.format} {header.mode}"
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(f"{width}x{height}".encode() + pixels.tobytes()).hexdigest()
    mask, problems = _mask_problems(record, (height, width), base)
    area = None if mask is None else float(mask.mean())
    return Facts((width, height), storage, area, digest, thumbnail(pixels), tuple(problems))


def _mask_problems(record: Record, size: tuple[int, int] | None, base: Path) -> tuple[np.ndarray | None, list[Problem]]:
    """The masks of a record united, None where there is none or one of them does not fit, and what is wrong."""
    files, problems, united = mask_files(record), [], None
    for file in files:
        name = relative_to(file, base)
        try:
            mask = decode_mask(file, name=name)
        except InputError as error:
            problems.append(Problem("unreadable", name, _reason(error, name)))
            continue
        if size is not None and mask.shape != size:
            message = f"the mask is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]} (width x height)"
            problems.append(Problem("mask_size", name, message, relative_to(record.image, base)))
        elif size is not None:
            united = mask if united is None else united | mask
    if problems or united is None:
        return None, problems
    name, image = relative_to(files[0], base), relative_to(record.image, base)
    if record.label == 1 and not united.any():
        problems.append(Problem("empty_mask", name, "the mask marks no pixel of an anomalous image", image))
    if record.label == 0 and united.any():
        problems.append(Problem("marked_normal", name, "the mask marks pixels of a normal image", image))
    return united, problems


def _reason(error: InputError, name: str) -> str:
    return str(error).removeprefix(f"{name}: ")


def _layout_problems(faults: Faults, layout: Layout, base: Path) -> Iterator[Problem]:
    for fault, files in faults.items():
        for file in files:
            if isinstance(file, Path):
                yield Problem(fault.kind, relative_to(file, base), fault.message)
            else:  # a row
                yield Problem(fault.kind, layout.root.name, f"{fault.message}: {file}")


def _identical(records: Sequence[Record], facts: Sequence[Facts]) -> Iterator[Problem]:
    """Leaks, contradictions and repetitions among images whose pixels are the same."""
    by_digest: dict[str, list[Record]] = defaultdict(list)
    for record, found in zip(records, facts, strict=True):
        if found.digest:
            by_digest[found.digest].append(record)
    for same in by_digest.values():
        trained = [record for record in same if record.split == "train"]
        for place, record in enumerate(same):
            other = next((one for one in same[:place] if {one.label, record.label} == {0, 1}), None)
            if other is not None:
                message = f"identical to {other.key}, which has another label"
                yield Problem("contradiction", record.key, message, other.key)
            if record.split == "test" and trained:
                message = f"a test image identical to {trained[0].key}, a training image"
                yield Problem("leak", record.key, message, trained[0].key)
            elif (first := next(one for one in same if one.split == record.split)) is not record:
                yield Problem("duplicate", record.key, f"identical to {first.key}", first.key)


def _nearly_identical(records: Sequence[Record], facts: Sequence[Facts]) -> Iterator[Problem]:
    for category in sorted({record.category for record in records}):
        # Of identical images one stands for all: what they repeat was said.
        chosen = list(
            {
                found.digest: (record, found)
                for record, found in zip(records, facts, strict=True)
                if record.category == category and found.thumbnail is not None
            }.values()
        )
        if not chosen:
            continue
        # Test images come last, so that each is compared with all training images.
        chosen.sort(key=lambda pair: pair[0].split == "test")
        thumbnails = np.stack([found.thumbnail for _, found in chosen])
        groups = [record.split == "test" for record, _ in chosen]
        for pair in near_duplicates(thumbnails, [min(found.size) for _, found in chosen], groups):
            mine, other = chosen[pair.second][0], chosen[pair.first][0]
            kind = "near_leak" if mine.split != other.split else "near_duplicate"
            message = f"nearly identical to {other.key} ({pair.distance:.2f} grey levels apart)"
            yield Problem(kind, mine.key, message, other.key)
