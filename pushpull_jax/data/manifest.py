"""A data set as a tuple of records, one for each image, sorted by key; nothing is decoded here.

The key is the path of the image relative to the root of the data, with forward slashes. It is the identity of the
example: splits and the fingerprint depend on keys and contents, never on where the data lie or in which order a file
system lists them. Labels: 1 anomalous, 0 normal, None unlabelled. numpy is imported where it is used, so that the
command line can read a manifest quickly.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pushpull_jax.config import nearest
from pushpull_jax.errors import InputError

# What counts as an image by its name: the formats that `images.decode_image` reads.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Stored:
    """A file inside a prepared data set, which is read when it is wanted and not before.

    Attributes:
        name: what messages call it: where it is stored, and the key.
        read: returns the contents of the file; raises InputError where they cannot be read.
    """

    name: str
    read: Callable[[], bytes] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Record:
    """One image of a data set.

    Attributes:
        key: path relative to the root of the data, with forward slashes.
        image: absolute path of the image, or the file stored in a prepared data set.
        mask: the same of its mask, or of several that are united; None where there is none.
        label: 1 anomalous, 0 normal, None unlabelled.
        defect_type: name of the kind of defect, "good" for normal images.
        split: "train" or "test".
        category: what the image shows, the unit that metrics are reported for; "" where that is not known.
    """

    key: str
    image: str | Stored
    mask: str | Stored | tuple[str, ...] | None
    label: int | None
    defect_type: str
    split: Literal["train", "test"]
    category: str = ""


def mask_files(record: Record) -> tuple[str | Stored, ...]:
    """The files whose union is the mask of a record."""
    if record.mask is None:
        return ()
    return record.mask if isinstance(record.mask, tuple) else (record.mask,)


def is_image_name(name: str) -> bool:
    """Whether a file name is that of an image: its extension in any case, and not hidden (macOS leaves ._NAME.png)."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def listed(names: Sequence[str], *, separator: str = ", ", limit: int = 10) -> str:
    """The names for a message: the first ones, then how many more there are."""
    shown = list(names[:limit])
    if len(names) > limit:
        shown.append(f"and {len(names) - limit} more")
    return separator.join(shown)


def measurable(records: Iterable[Record]) -> tuple[Record, ...]:
    """The test images whose label is known; of an unlabelled one no verdict is right or wrong."""
    return tuple(record for record in records if record.split == "test" and record.label is not None)


def missing_category(category: str, names: Sequence[str], *, where: str, hint: str = "") -> InputError:
    """The error for a category that is not there: it names those that are, and the nearest one or a hint instead."""
    hint = hint or nearest(category, names)
    return InputError(f"no category {category!r} in {where}, which holds: {listed(names, limit=20) or 'none'}{hint}")


def hold_out(records: Sequence[Record], *, fraction: float, seed: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Split the normal training records into those that are fitted and those held out for the threshold.

    A permutation drawn from the seed over the records in the order of their keys; the first round(fraction * n) are
    held out, but at least one, and one at least stays to be fitted. A single record is fitted and none is held out.

    Args:
        records: any records; only those of split "train" with label 0 are split, the others are in neither part.
        fraction: share to hold out, above 0 and below 1.
        seed: 0 or more.

    Returns:
        (fit, held), each sorted by key; together exactly the normal training records.

    Raises:
        InputError: fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the fraction of images held out must be above 0 and below 1, got {fraction}")
    normal, order = _permuted(records, seed)
    count = min(max(round(fraction * len(normal)), 1), len(normal) - 1)
    return _parted(normal, held=set(order[: max(count, 0)]))


def share_for_test(keys: Iterable[str]) -> frozenset[str]:
    """The normal images that are tested where a data set has no split: a fifth, those of the least SHA-256 of the key.

    It depends on the keys alone, and images that are added move few others. All anomalies are tested; a fifth leaves
    most normal images to be trained on (our choice).

    Returns:
        round(n / 5) of n keys, at least one of two or more.
    """
    ordered = sorted(keys, key=lambda key: hashlib.sha256(os.fsencode(key)).digest())
    return frozenset(ordered[: max(round(len(ordered) / 5), 1 if len(ordered) > 1 else 0)])


def fingerprint(records: Sequence[Record]) -> str:
    """SHA-256 over the records and the contents of their files, in the order of the keys.

    It covers key, label, defect type, split, and the bytes of image and mask; not where the files lie, so that a
    folder and a data set prepared from it have the same. The category is not covered: the key or the labels tell it.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for record in sorted(records, key=lambda record: record.key):
        masks = [file_digest(mask) for mask in mask_files(record)]
        # One mask stands by itself, none is null: digests of data sets without several stay what they were.
        mask = masks if len(masks) > 1 else next(iter(masks), None)
        entry = [record.key, record.label, record.defect_type, record.split, file_digest(record.image), mask]
        # One JSON array a line: no two different records have the same bytes.
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


def file_digest(path: str | Stored) -> str:
    """SHA-256 of the contents of a file; InputError where it cannot be read."""
    if isinstance(path, Stored):
        return hashlib.sha256(path.read()).hexdigest()
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _permuted(records: Sequence[Record], seed: int) -> tuple[list[Record], list[int]]:
    """The normal training records sorted by key, and a permutation of their positions."""
    import numpy as np

    normal = [record for record in records if record.split == "train" and record.label == 0]
    normal.sort(key=lambda record: record.key)
    return normal, np.random.default_rng(seed).permutation(len(normal)).tolist()


def _parted(normal: list[Record], *, held: set[int]) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    fit = tuple(record for position, record in enumerate(normal) if position not in held)
    return fit, tuple(normal[position] for position in sorted(held))
