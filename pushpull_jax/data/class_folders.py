"""The one-class protocol on images that are sorted by class: one class is normal, all others are anomalous.

Trained on are the training images of the normal class; tested are the test images of all classes (the paper's
CIFAR-10). A folder of class subfolders is read here, ROOT/{train,test}/CLASS/NAME.png; a prepared data set of labelled
images goes by the same `one_class_record`. Nothing is decoded here.
"""

import os
from collections import defaultdict
from typing import Literal

from pushpull_jax.data.folders import Fault, Faults, existing_folder, image_files, relative, settle, subfolders
from pushpull_jax.data.manifest import IMAGE_SUFFIXES, Record, Stored, missing_category
from pushpull_jax.errors import InputError


def class_names(root: str | os.PathLike) -> tuple[str, ...]:
    """Names of the classes in a folder: the subfolders of its folder train, sorted.

    Raises:
        InputError: the folder does not exist, or holds no folder train.
    """
    root = existing_folder(root)
    if not (root / "train").is_dir():
        raise InputError(f"{root}: no folder train, where a folder of images for each class belongs")
    return tuple(folder.name for folder in subfolders(root / "train"))


def read_class_folders(root: str | os.PathLike, normal: str, *, faults: Faults | None = None) -> tuple[Record, ...]:
    """Read the manifest of one run: a class is normal, the others are anomalous.

    Args:
        root: the folder that holds train and test; keys are relative to it.
        normal: name of the normal class.
        faults: receives what is wrong in place of an error.

    Returns:
        The training images of the normal class and all test images, sorted by key.

    Raises:
        InputError: the folder or the class does not exist; without `faults` also where it has no training image, or
            folders lie where images belong.
    """
    root = existing_folder(root)
    names = class_names(root)
    if normal not in names:
        raise missing_category(normal, names, where=str(root / "train"))
    found: Faults = defaultdict(list)
    folders = [("train", root / "train" / normal), *(("test", folder) for folder in subfolders(root / "test"))]
    records = []
    for split, folder in folders:
        for path in image_files(folder, found):
            key = relative(path, root)
            records.append(one_class_record(key, str(path), shows=folder.name, split=split, normal=normal))
    if not any(record.split == "train" for record in records):
        found[Fault(f"no image ({', '.join(IMAGE_SUFFIXES)}) of the normal class", "no_training_image")].append(
            folders[0][1]
        )
    settle(found, faults, what=f"class {normal}", base=root)
    return tuple(sorted(records, key=lambda record: record.key))


def one_class_record(
    key: str, image: str | Stored, *, shows: str, split: Literal["train", "test"], normal: str
) -> Record:
    """The record of an image of class `shows` where `normal` is the normal class; an anomaly's type is its class."""
    is_normal = shows == normal
    return Record(key, image, None, 0 if is_normal else 1, "good" if is_normal else shows, split, category=normal)
