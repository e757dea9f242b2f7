"""Layouts that have folders train, test and ground_truth for each category, read into a manifest; nothing is decoded.

    CATEGORY/train/NORMAL/NAME.png          normal training images
    CATEGORY/test/NORMAL/NAME.png           normal test images
    CATEGORY/test/DEFECT/NAME.png           anomalous test images, one folder for each type of defect
    CATEGORY/ground_truth/DEFECT/...        their masks

Masks are paired by name, never by their place in a sorted list. A type of defect without a folder in ground_truth has
labels for its images only; one with such a folder has a mask for each.
"""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pushpull_jax.data.folders import (
    Fault,
    Faults,
    entries,
    existing_folder,
    image_files,
    relative,
    settle,
    subfolders,
)
from pushpull_jax.data.manifest import IMAGE_SUFFIXES, Record, is_image_name, missing_category
from pushpull_jax.errors import InputError


@dataclass(frozen=True)
class SplitFolders:
    """The names that a data set has for its folders and masks."""

    normal: str = "good"
    """Folder of the normal images, in train and test."""
    training: tuple[str, ...] = ("train",)
    """Folders of training images; the first must be there."""
    masks: Literal["NAME_mask.png", "NAME.png", "NAME/*.png"] = "NAME_mask.png"
    """What belongs to NAME of any extension: a file of any extension, or the files of a folder, which are united."""


def categories(root: str | os.PathLike) -> tuple[str, ...]:
    """Names of the categories in a folder: its subfolders that hold a folder train or test, sorted.

    Raises:
        InputError: the folder does not exist.
    """
    root = existing_folder(root)
    return tuple(
        folder.name for folder in subfolders(root) if (folder / "train").is_dir() or (folder / "test").is_dir()
    )


def read_split_folders(
    root: str | os.PathLike, category: str, *, layout: SplitFolders, faults: Faults | None = None
) -> tuple[Record, ...]:
    """Read the manifest of one category.

    Args:
        root: the folder that holds the categories; keys are relative to it.
        category: name of a subfolder.
        layout: its names.
        faults: receives what is wrong in place of an error; the records are then those that could be made out.

    Returns:
        Its records sorted by key. Images of the normal folders have label 0, all others 1.

    Raises:
        InputError: root or category does not exist; without `faults` also where the normal training images are
            missing, an image or a mask has no partner or more than one, or files lie where the layout has none. All
            faults of a category are listed.
    """
    base = _category(existing_folder(root), category, layout)
    found: Faults = defaultdict(list)
    records = _training_records(base, layout, found)
    kinds = {folder.name for part in ("test", "ground_truth") for folder in subfolders(base / part)}
    for kind in sorted(kinds):
        records += _paired(base, kind, layout, found)
    _find_strays(base, layout, found)
    settle(found, faults, what=f"category {category}", base=base)
    return tuple(sorted(records, key=lambda record: record.key))


def _training_records(base: Path, layout: SplitFolders, faults: Faults) -> list[Record]:
    folders = [base / part / layout.normal for part in layout.training]
    images = [path for folder in folders for path in image_files(folder, faults)]
    if not folders[0].is_dir():
        faults[Fault("no folder of normal training images", "no_training_image")].append(folders[0])
    elif not images:
        message = f"no image ({', '.join(IMAGE_SUFFIXES)}) among the normal training images"
        faults[Fault(message, "no_training_image")].append(folders[0])
    return [_record(path, None, base, layout, split="train") for path in images]


def _paired(base: Path, kind: str, layout: SplitFolders, faults: Faults) -> list[Record]:
    """The test records of one type of defect, with their masks."""
    images = image_files(base / "test" / kind, faults)
    truth = base / "ground_truth" / kind
    if not truth.is_dir():
        return [_record(path, None, base, layout, split="test") for path in images]
    masks = _masks(truth, layout, faults)
    records = []
    for stem, twins in _by_stem(images).items():
        partners = masks.pop(stem, [])
        if len(twins) > 1:
            faults[Fault("images of one name, so that their mask is ambiguous", "ambiguous_mask")] += twins
        if len(partners) > 1 and layout.masks != "NAME/*.png":
            faults[Fault("more than one mask for one image", "ambiguous_mask")] += partners
            partners = partners[:1]
        if not partners and kind != layout.normal:
            message = f"anomalous images without their mask ground_truth/{kind}/{layout.masks}"
            faults[Fault(message, "image_without_mask")] += twins
        records += [_record(path, partners, base, layout, split="test") for path in twins]
    message = f"masks without their image ({layout.masks} belongs to test/{kind}/NAME.png)"
    for orphans in masks.values():
        faults[Fault(message, "mask_without_image")] += orphans
    return records


def _masks(truth: Path, layout: SplitFolders, faults: Faults) -> dict[str, list[Path]]:
    """Stem of an image -> its masks; a mask of another name is that of a stem that no image has."""
    if layout.masks == "NAME/*.png":
        strays = [path for path in entries(truth) if path.is_file() and is_image_name(path.name)]
        faults[_BELOW] += strays
        return {folder.name: image_files(folder, faults) for folder in subfolders(truth)}
    masks = _by_stem(image_files(truth, faults))
    if layout.masks == "NAME.png":
        return masks
    return {stem.removesuffix("_mask") if stem.endswith("_mask") else f"{stem}/": m for stem, m in masks.items()}


def _record(path: Path, masks: list[Path] | None, base: Path, layout: SplitFolders, *, split: str) -> Record:
    is_normal = path.parent.name == layout.normal
    mask = tuple(map(str, masks or ())) or None
    return Record(
        relative(path, base.parent),
        str(path),
        mask[0] if mask and len(mask) == 1 else mask,
        0 if is_normal else 1,
        "good" if is_normal else path.parent.name,
        split,
        category=base.name,
    )


_BELOW = Fault("images that belong in a folder below", "misplaced")


def _find_strays(base: Path, layout: SplitFolders, faults: Faults) -> None:
    """Images that the layout has no place for would otherwise be left out in silence."""
    for part in (*layout.training, "test", "ground_truth"):
        faults[_BELOW] += [path for path in entries(base / part) if path.is_file() and is_image_name(path.name)]
    for part in layout.training:
        others = [folder for folder in subfolders(base / part) if folder.name != layout.normal]
        faults[Fault(f"training folders other than {part}/{layout.normal}", "misplaced")] += others


def _by_stem(paths: list[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[path.stem].append(path)
    return groups


def _category(root: Path, category: str, layout: SplitFolders) -> Path:
    """The folder of a category, or an error that names those there are."""
    if category in ("", ".", "..") or "/" in category or os.sep in category:
        raise InputError(f"category must be the name of a folder in {root}, got {category!r}")
    if (root / category).is_dir():
        return root / category
    hint = ""
    if (root / "train" / layout.normal).is_dir():
        hint = f"; {root} looks like a category itself: the data folder is {root.parent}, the category {root.name}"
    raise missing_category(category, categories(root), where=str(root), hint=hint)
