"""The layout of MVTec-AD on disk, read into a manifest. Nothing is decoded here.

    CATEGORY/train/good/NAME.png            normal training images
    CATEGORY/test/good/NAME.png             normal test images
    CATEGORY/test/DEFECT/NAME.png           anomalous test images, one folder for each type of defect
    CATEGORY/ground_truth/DEFECT/NAME_mask.png

(P. Bergmann et al., CVPR 2019.) Masks are paired by their exact name, never by their place in a sorted list. A type
of defect without a folder in ground_truth has labels for its images only; one with such a folder has a mask for each.
"""

import difflib
import os
import warnings
from collections import defaultdict
from pathlib import Path

from pushpull_jax.data.manifest import IMAGE_SUFFIXES, Record, is_image_name, listed
from pushpull_jax.errors import InputError

# Files that data sets and file managers leave beside images, passed over without a word.
_BYSTANDERS = (".txt", ".md", ".db", ".ini")

# Faults of a category: what is wrong -> the files, relative to the category.
_Faults = dict[str, list[str]]


def categories(root: str | os.PathLike) -> tuple[str, ...]:
    """Names of the categories in a folder: its subfolders that hold a folder train or test, sorted.

    Raises:
        InputError: the folder does not exist.
    """
    root = _existing(root)
    return tuple(folder.name for folder in _folders(root) if (folder / "train").is_dir() or (folder / "test").is_dir())


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
    base = _category(_existing(root), category)
    faults: _Faults = defaultdict(list)
    good = base / "train" / "good"
    if not good.is_dir():
        raise InputError(f"category {category}: no folder {good}, where the normal training images belong")
    train = _files(good, base, faults)
    if not train:
        raise InputError(f"category {category}: {good} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    records = [_record(path, None, base, split="train") for path in train]
    kinds = {folder.name for part in ("test", "ground_truth") for folder in _folders(base / part)}
    for kind in sorted(kinds):
        records.extend(_paired(base, kind, faults))
    _find_strays(base, faults)
    unknown = faults.pop("ignored", [])
    if any(faults.values()):
        lines = [f"{fault}: {listed(sorted(files))}" for fault, files in sorted(faults.items()) if files]
        raise InputError("\n  ".join([f"category {category} in {base}:", *lines]))
    if unknown:
        warnings.warn(f"{base}: not images by their names, ignored: {listed(sorted(unknown))}", stacklevel=2)
    return tuple(sorted(records, key=lambda record: record.key))


def _paired(base: Path, kind: str, faults: _Faults) -> list[Record]:
    """The test records of one type of defect, with their masks."""
    images = _files(base / "test" / kind, base, faults)
    truth = base / "ground_truth" / kind
    if not truth.is_dir():
        return [_record(path, None, base, split="test") for path in images]
    masks = _by_stem(_files(truth, base, faults))
    records = []
    for stem, twins in _by_stem(images).items():
        partners = masks.pop(f"{stem}_mask", [])
        if len(twins) > 1:
            faults["images of one name, so that their mask is ambiguous"] += _relative(twins, base)
        if len(partners) > 1:
            faults["more than one mask for one image"] += _relative(partners, base)
        if not partners and kind != "good":
            faults[f"anomalous images without their mask ground_truth/{kind}/NAME_mask.png"] += _relative(twins, base)
        records += [_record(path, next(iter(partners), None), base, split="test") for path in twins]
    for orphans in masks.values():
        faults[f"masks without their image (NAME_mask.png belongs to test/{kind}/NAME.png)"] += _relative(orphans, base)
    return records


def _record(path: Path, mask: Path | None, base: Path, *, split: str) -> Record:
    kind = path.parent.name
    key = path.relative_to(base.parent).as_posix()
    return Record(key, str(path), mask and str(mask), 0 if kind == "good" else 1, kind, split)


def _find_strays(base: Path, faults: _Faults) -> None:
    """Images that the layout has no place for would otherwise be left out in silence."""
    for part in ("train", "test", "ground_truth"):
        strays = [path for path in _entries(base / part) if path.is_file() and is_image_name(path.name)]
        faults["images that belong in a folder below"] += _relative(strays, base)
    others = [folder for folder in _folders(base / "train") if folder.name != "good"]
    faults["training folders other than train/good"] += _relative(others, base)


def _files(folder: Path, base: Path, faults: _Faults) -> list[Path]:
    """The images of a folder at the end of the layout; what else lies there is entered under its fault."""
    images = []
    for path in _entries(folder):
        if path.is_dir():
            faults["folders where images belong"] += _relative([path], base)
        elif is_image_name(path.name):
            images.append(path)
        elif path.suffix.lower() not in _BYSTANDERS:
            faults["ignored"] += _relative([path], base)
    return images


def _by_stem(paths: list[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[path.stem].append(path)
    return groups


def _relative(paths: list[Path], base: Path) -> list[str]:
    return [path.relative_to(base).as_posix() for path in paths]


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden entries; nothing where there is no such folder."""
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror or error}") from error


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _existing(root: str | os.PathLike) -> Path:
    """The root as an absolute path, or an error that says how far the path can be followed."""
    path = Path(os.path.abspath(root))
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"data folder {path} is a file, not a folder")
    missing, parent = path, path.parent
    while not parent.is_dir():
        missing, parent = parent, parent.parent
    names = [folder.name for folder in _folders(parent)]
    near = difflib.get_close_matches(missing.name, names, n=1)
    hint = f"; did you mean {parent / near[0]}?" if near else f"; it holds the folders: {listed(names) or 'none'}"
    raise InputError(f"data folder {path} does not exist; the nearest folder that does is {parent}{hint}")


def _category(root: Path, category: str) -> Path:
    """The folder of a category, or an error that names those there are."""
    if category in ("", ".", "..") or "/" in category or os.sep in category:
        raise InputError(f"category must be the name of a folder in {root}, got {category!r}")
    if (root / category).is_dir():
        return root / category
    names = categories(root)
    near = difflib.get_close_matches(category, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    if (root / "train" / "good").is_dir():
        hint = f"; {root} looks like a category itself: the data folder is {root.parent}, the category {root.name}"
    raise InputError(f"no category {category!r} in {root}, which holds: {listed(names) or 'none'}{hint}")
