"""Which layout a folder has, told by names of folders and files alone, and only where no other fits.

A folder may be the root of a data set or one category of it; a table (CSV, JSON lines) is a data set by itself. VisA is
taken in its one-class split, the first of its three. CATEGORY below stands for any folder in the root.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, get_args

from pushpull_jax.config import FILE_SOURCES, Source
from pushpull_jax.data.folders import existing_folder, subfolders
from pushpull_jax.data.kolektor_sdd import commutators
from pushpull_jax.data.manifest_table import TABLE_SUFFIXES
from pushpull_jax.data.sources import category_names, is_extracted_visa
from pushpull_jax.errors import InputError

_NAMES: dict[Source, str] = {
    "mvtec_ad": "MVTec-AD", "mvtec_loco": "MVTec LOCO AD", "btad": "BTAD", "kolektor_sdd": "KolektorSDD",
    "visa": "VisA, one-class split", "visa_2cls_fewshot": "VisA, few-shot split",
    "visa_2cls_highshot": "VisA, high-shot split", "good_bad": "good and bad", "manifest": "table",
    "classes": "classes",
}  # fmt: skip
_SIGNS = """\
  mvtec_ad      CATEGORY/train/good, CATEGORY/test/good, CATEGORY/test/DEFECT, CATEGORY/ground_truth/DEFECT
  mvtec_loco    the same, and CATEGORY/validation/good, or a folder of masks for each image
  btad          CATEGORY/train/ok, CATEGORY/test/ko
  kolektor_sdd  kos01/Part0.jpg and kos01/Part0_label.bmp
  visa          split_csv and CATEGORY/Data
  good_bad      CATEGORY/good and CATEGORY/bad
  manifest      a .csv or .jsonl file, or a folder with one named manifest
  classes       train/CLASS and test/CLASS"""


class Layout(NamedTuple):
    """What a folder holds."""

    source: Source
    root: Path
    categories: tuple[str, ...]
    reason: str

    @property
    def name(self) -> str:
        return _NAMES[self.source]


def recognise(root: str | os.PathLike, *, source: Source | None = None, category: str | None = None) -> Layout:
    """Tell the layout of a folder or a table.

    Args:
        root: the data set, or the folder of one category.
        source: its layout, if that is known.
        category: one category of it, or the normal class; None: all.

    Returns:
        The layout; where root is the folder of a category, its root is the folder above.

    Raises:
        InputError: root does not exist, has no layout that is known or more than one, or holds no category.
    """
    path = Path(os.path.abspath(root))
    if not path.is_file():
        path = existing_folder(path)
    if source is not None:
        return _chosen(path, source, category, "as --source says")
    found = _signs(path)
    if not found and not path.is_file():
        found, own = _signs_of_category(path), path.name
        path, category = path.parent, category or own
    if not found:
        raise InputError(f"{root}: no layout that is known. A data set has one of these:\n{_SIGNS}")
    if len(found) > 1:
        told = "; ".join(f"{name}, by {sign}" for name, sign in sorted(found.items()))
        raise InputError(f"{root}: more than one layout fits: {told}. Say which it is: --source NAME")
    ((name, sign),) = found.items()
    table = path / sign
    return _chosen(
        table if name == "manifest" and not path.is_file() else path, name, category, f"recognised by {sign}"
    )


def _chosen(path: Path, source: Source, category: str | None, reason: str) -> Layout:
    if source not in _NAMES:
        folders = [name for name in get_args(Source) if name in (*FILE_SOURCES, *_NAMES)]
        raise InputError(f"a layout must be one of {', '.join(folders)}, got {source!r}")
    if category is None and source == "classes":
        names = ", ".join(category_names(source, str(path)))
        raise InputError(f"{path} holds classes ({names}): say with --category which is normal")
    categories = (category,) if category is not None else category_names(source, str(path))
    if not categories:
        raise InputError(f"{path}: no category in the layout {source}")
    return Layout(source, path, categories, reason)


def _signs(path: Path) -> dict[Source, str]:
    """Each layout that fits, with what it was told by."""
    if path.is_file():
        return {"manifest": path.name} if path.suffix.lower() in TABLE_SUFFIXES else {}
    found: dict[Source, str] = {}
    for folder in subfolders(path):
        found |= {name: sign for name, sign in _signs_of_category(folder).items() if name not in found}
    if "mvtec_loco" in found:  # whose other categories may look like MVTec-AD's
        found.pop("mvtec_ad", None)
    if is_extracted_visa(str(path)):
        found["visa"] = "split_csv"
    for name in commutators(path):
        if any(file.name.endswith("_label.bmp") for file in (path / name).iterdir()):
            found["kolektor_sdd"] = f"{name}/*_label.bmp"
            break
    for suffix in TABLE_SUFFIXES:
        if (path / f"manifest{suffix}").is_file():
            found["manifest"] = f"manifest{suffix}"
    parts = [part for part in ("train", "test") if _has(path, f"{part}/")]
    if len(parts) == 2 and not _signs_of_category(path) and len(subfolders(path / "train")) > 1:
        found["classes"] = "train/CLASS"
    return found


def _signs_of_category(folder: Path) -> dict[Source, str]:
    def first(signs: Iterable[str]) -> str | None:
        return next((f"{folder.name}/{sign}" for sign in signs if _has(folder, sign)), None)

    found: dict[Source, str] = {}
    if sign := first(("train/ok/", "test/ok/", "test/ko/")):
        found["btad"] = sign
    if sign := first(("train/good/", "test/good/")):
        truth = subfolders(folder / "ground_truth")
        masks = next((f"ground_truth/{kind.name}/{one.name}/" for kind in truth for one in subfolders(kind)), "/")
        loco = first(("validation/good/", masks)) if masks != "/" else first(("validation/good/",))
        found["mvtec_loco" if loco else "mvtec_ad"] = loco or sign
    if _has(folder, "good/") and _has(folder, "bad/"):
        found["good_bad"] = f"{folder.name}/good/"
    return found


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_dir()
