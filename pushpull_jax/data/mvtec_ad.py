"""The layout of MVTec-AD on disk, read into a manifest. Nothing is decoded here.

    CATEGORY/train/good/NAME.png            normal training images
    CATEGORY/test/good/NAME.png             normal test images
    CATEGORY/test/DEFECT/NAME.png           anomalous test images, one folder for each type of defect
    CATEGORY/ground_truth/DEFECT/NAME_mask.png

(P. Bergmann et al., CVPR 2019.) Masks are paired by their exact name, never by their place in a sorted list. A type
of defect without a folder in ground_truth has labels for its images only; one with such a folder has a mask for each.
"""

import os
from collections import defaultdict
from pathlib import Path

from pushpull_jax.data.folders import Faults, entries, existing_folder, image_files, relative, report_faults, subfolders
from pushpull_jax.data.manifest import IMAGE_SUFFIXES, Record, is_image_name, missing_category
from pushpull_jax.errors import InputError

# The official archive and what it holds.
MVTEC_AD_ARCHIVE = "mvtec_anomaly_detection.tar.xz"
MVTEC_AD_CATEGORIES = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile",
    "toothbrush", "transistor", "wood", "zipper",
)  # fmt: skip


def categories(root: str | os.PathLike) -> tuple[str, ...]:
    """Names of the categories in a folder: its subfolders that hold a folder train or test, sorted.

    Raises:
        InputError: the folder does not exist.
    """
    root = existing_folder(root)
    return tuple(
        folder.name for folder in subfolders(root) if (folder / "train").is_dir() or (folder / "test").is_dir()
    )


def read_mvtec_ad(root: str | os.PathLike, category: str) -> tuple[Record, ...]:
    """Read the manifest of one category.

    Args:
        root: the folder that holds the categories; keys are relative to it.
        category: name of a subfolder.

    Returns:
        Its records sorted by key. Images of a folder "good" have label 0, all others 1.

    Raises:
        InputError: root or category does not exist, train/good is missing or empty, an image or a mask has no
            partner or more than one, or files lie where the layout has none. All faults of a category are listed.
    """
    base = _category(existing_folder(root), category)
    faults: Faults = defaultdict(list)
    good = base / "train" / "good"
    if not good.is_dir():
        raise InputError(f"category {category}: no folder {good}, where the normal training images belong")
    train = image_files(good, base, faults)
    if not train:
        raise InputError(f"category {category}: {good} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    records = [_record(path, None, base, split="train") for path in train]
    kinds = {folder.name for part in ("test", "ground_truth") for folder in subfolders(base / part)}
    for kind in sorted(kinds):
        records.extend(_paired(base, kind, faults))
    _find_strays(base, faults)
    report_faults(faults, what=f"category {category}", base=base)
    return tuple(sorted(records, key=lambda record: record.key))


def _paired(base: Path, kind: str, faults: Faults) -> list[Record]:
    """The test records of one type of defect, with their masks."""
    images = image_files(base / "test" / kind, base, faults)
    truth = base / "ground_truth" / kind
    if not truth.is_dir():
        return [_record(path, None, base, split="test") for path in images]
    masks = _by_stem(image_files(truth, base, faults))
    records = []
    for stem, twins in _by_stem(images).items():
        partners = masks.pop(f"{stem}_mask", [])
        if len(twins) > 1:
            faults["images of one name, so that their mask is ambiguous"] += relative(twins, base)
        if len(partners) > 1:
            faults["more than one mask for one image"] += relative(partners, base)
        if not partners and kind != "good":
            faults[f"anomalous images without their mask ground_truth/{kind}/NAME_mask.png"] += relative(twins, base)
        records += [_record(path, next(iter(partners), None), base, split="test") for path in twins]
    for orphans in masks.values():
        faults[f"masks without their image (NAME_mask.png belongs to test/{kind}/NAME.png)"] += relative(orphans, base)
    return records


def _record(path: Path, mask: Path | None, base: Path, *, split: str) -> Record:
    kind = path.parent.name
    key = path.relative_to(base.parent).as_posix()
    label = 0 if kind == "good" else 1
    return Record(key, str(path), mask and str(mask), label, kind, split, category=base.name)


def _find_strays(base: Path, faults: Faults) -> None:
    """Images that the layout has no place for would otherwise be left out in silence."""
    for part in ("train", "test", "ground_truth"):
        strays = [path for path in entries(base / part) if path.is_file() and is_image_name(path.name)]
        faults["images that belong in a folder below"] += relative(strays, base)
    others = [folder for folder in subfolders(base / "train") if folder.name != "good"]
    faults["training folders other than train/good"] += relative(others, base)


def _by_stem(paths: list[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[path.stem].append(path)
    return groups


def _category(root: Path, category: str) -> Path:
    """The folder of a category, or an error that names those there are."""
    if category in ("", ".", "..") or "/" in category or os.sep in category:
        raise InputError(f"category must be the name of a folder in {root}, got {category!r}")
    if (root / category).is_dir():
        return root / category
    hint = ""
    if (root / "train" / "good").is_dir():
        hint = f"; {root} looks like a category itself: the data folder is {root.parent}, the category {root.name}"
    raise missing_category(category, categories(root), where=str(root), hint=hint)
