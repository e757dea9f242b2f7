"""The one way from what a config names to records: folders and prepared data sets, one category or all.

A source is a layout of folders or a data set of tensorflow-datasets; its categories are what one model is trained for.
In the one-class protocol (classes, CIFAR-10) a category is the class that is normal. Nothing is decoded here.
"""

import warnings
from pathlib import Path

from pushpull_jax.config import Source
from pushpull_jax.data.btad import read_btad
from pushpull_jax.data.class_folders import class_names, read_class_folders
from pushpull_jax.data.folders import Faults, existing_folder
from pushpull_jax.data.good_bad import good_bad_categories, read_good_bad
from pushpull_jax.data.kolektor_sdd import KOLEKTOR_SDD, commutators, read_kolektor_sdd
from pushpull_jax.data.manifest import Record, Stored, is_image_name, listed
from pushpull_jax.data.manifest_table import read_table, table_categories
from pushpull_jax.data.mvtec_ad import MVTEC_AD_CATEGORIES, read_mvtec_ad
from pushpull_jax.data.mvtec_loco import read_mvtec_loco
from pushpull_jax.data.prepared import (
    CIFAR10_CLASSES,
    labelled_images,
    read_cifar10,
    read_prepared_mvtec_ad,
    read_prepared_visa,
)
from pushpull_jax.data.split_folders import categories
from pushpull_jax.data.visa import VISA_CATEGORIES, Protocol, read_visa, visa_categories
from pushpull_jax.errors import InputError

_ONE_CLASS = ("classes", "cifar10")
_PROTOCOLS: dict[Source, Protocol] = {
    "visa": "1cls",
    "visa_2cls_fewshot": "2cls_fewshot",
    "visa_2cls_highshot": "2cls_highshot",
}


def read_records(source: Source, root: str, category: str, *, faults: Faults | None = None) -> tuple[Record, ...]:
    """Read the manifest of a category.

    Args:
        source: the three of VisA, "cifar10" and "tfds_mvtec_ad" are prepared by tensorflow-datasets, VisA unless root
            is the extracted archive, which holds a folder split_csv; the others are folders, and "manifest" a table:
            see the modules of the layouts.
        root: folder of the data, or the table; for what is prepared, the data folder of tensorflow-datasets, empty
            for its own.
        category: name of a category or of the normal class; "all": the records of all categories.
        faults: receives what is wrong with the files of a folder or a table in place of an error.

    Returns:
        Its records sorted by key.

    Raises:
        InputError: the data are not there or cannot be made, have no such category, or "all" is asked of the one-class
            protocol, where the category says what is normal; without `faults` also where files are wrong.
    """
    if source in _ONE_CLASS and category == "all":
        raise InputError(
            f'category "all" is none of {source}, where the category is the class that is normal: '
            f"{listed(category_names(source, root))}"
        )
    if source == "cifar10":
        return read_cifar10(root, category)
    if source == "tfds_mvtec_ad":
        return read_prepared_mvtec_ad(root, category)
    if source in _PROTOCOLS and not is_extracted_visa(root):
        return read_prepared_visa(root, category, protocol=_PROTOCOLS[source])
    names = category_names(source, root) if category == "all" else (category,)
    if not names:
        raise InputError(f"{existing_folder(root)} holds no category")
    records = [record for name in names for record in _read_folder(source, root, name, faults)]
    return tuple(sorted(records, key=lambda record: record.key))


def category_names(source: Source, root: str) -> tuple[str, ...]:
    """Names of the categories of a source: those in its folders, or all that the data set has.

    Raises:
        InputError: the folder or the table does not exist.
    """
    match source:
        case "mvtec_ad" | "mvtec_loco" | "btad":
            return categories(root)
        case "kolektor_sdd":
            return (KOLEKTOR_SDD,) if commutators(root) else ()
        case "good_bad":
            return good_bad_categories(root)
        case "manifest":
            return table_categories(root)
        case "classes":
            return class_names(root)
        case "cifar10":
            return CIFAR10_CLASSES
        case "tfds_mvtec_ad":
            return MVTEC_AD_CATEGORIES
        case _:
            return visa_categories(root, _PROTOCOLS[source]) if is_extracted_visa(root) else VISA_CATEGORIES


def read_irrelevant(source: str, *, count: int, seed: int, root: str = "") -> tuple[Record, ...]:
    """Draw images that have nothing to do with the data, as anomalies that are known by image (eq. 9).

    Args:
        source: "cifar100", its training images by tensorflow-datasets; or a folder, whose images at any depth are
            taken.
        count: how many; all of them, with a warning, where there are fewer.
        seed: 0 or more; the draw is a permutation of the images in the order of their keys.
        root: data folder of "cifar100"; empty: that of tensorflow-datasets.

    Returns:
        Records of split "train", label 1, type and category "irrelevant", sorted by key, which begins so too.

    Raises:
        InputError: the folder does not exist or holds no image, CIFAR-100 is neither prepared nor can it be
            downloaded, or count is not positive.
    """
    import numpy as np  # here, so that the command line can read a manifest quickly

    if count < 1:
        raise InputError(f"the number of irrelevant images must be at least 1, got {count}")
    images = _cifar100_images(root) if source == "cifar100" else _folder_images(source)
    if not images:
        raise InputError(f"{existing_folder(source)}: no image in it or below, where irrelevant ones were sought")
    if len(images) < count:
        warnings.warn(f"{source}: {len(images)} irrelevant images, {count} were asked for: all taken", stacklevel=2)
    drawn = sorted(np.random.default_rng(seed).permutation(len(images))[:count].tolist())
    return tuple(
        Record(f"irrelevant/{key}", image, None, 1, "irrelevant", "train", category="irrelevant")
        for key, image in (images[position] for position in drawn)
    )


def _read_folder(source: Source, root: str, category: str, faults: Faults | None) -> tuple[Record, ...]:
    match source:
        case "mvtec_ad":
            return read_mvtec_ad(root, category, faults=faults)
        case "mvtec_loco":
            return read_mvtec_loco(root, category, faults=faults)
        case "btad":
            return read_btad(root, category, faults=faults)
        case "kolektor_sdd":
            return read_kolektor_sdd(root, category, faults=faults)
        case "good_bad":
            return read_good_bad(root, category, faults=faults)
        case "manifest":
            return read_table(root, category, faults=faults)
        case "classes":
            return read_class_folders(root, category, faults=faults)
        case _:
            return read_visa(root, category, protocol=_PROTOCOLS[source], faults=faults)


def is_extracted_visa(root: str) -> bool:
    """Whether a folder is VisA as its archive extracts it, and not a folder of prepared data."""
    return bool(root) and (Path(root) / "split_csv").is_dir()


def _cifar100_images(root: str) -> list[tuple[str, str | Stored]]:
    return sorted((key, image) for key, _, image in labelled_images("cifar100", root, split="train"))


def _folder_images(folder: str) -> list[tuple[str, str | Stored]]:
    base = existing_folder(folder)
    paths = [(path.relative_to(base).as_posix(), path) for path in base.rglob("*") if is_image_name(path.name)]
    return sorted((key, str(path)) for key, path in paths if path.is_file() and "/." not in f"/{key}")
