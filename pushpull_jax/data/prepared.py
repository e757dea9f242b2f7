"""Records of data sets that tensorflow-datasets keeps: prepared at first use, then read one example at a time.

The data folder is that of tensorflow-datasets, which holds NAME/CONFIG/VERSION for each data set, and downloads/manual
for archives that are put there by hand. Files are ArrayRecord, whose examples are read in any order; nothing is
decoded here. tensorflow-datasets is imported at first use, and tensorflow kept off accelerators.
"""

import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from pushpull_jax.data.class_folders import one_class_record
from pushpull_jax.data.manifest import Record, Stored, missing_category
from pushpull_jax.data.mvtec_ad import MVTEC_AD_CATEGORIES
from pushpull_jax.data.pipeline import _tensorflow
from pushpull_jax.data.visa import VISA_CATEGORIES, Protocol
from pushpull_jax.errors import InputError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_FILE_FORMAT = "array_record"
# Seconds to wait for a host before it counts as out of reach; tensorflow-datasets itself tries for minutes.
_PATIENCE = 5


def read_prepared_mvtec_ad(root: str, category: str) -> tuple[Record, ...]:
    """The manifest of one category of MVTec-AD, or of "all": the same records as those of the extracted archive.

    Args:
        root: data folder; empty: that of tensorflow-datasets.
        category: prepared by itself where not all categories are prepared already.

    Raises:
        InputError: the category is unknown, or the data are neither prepared nor is their archive there.
    """
    if category not in ("all", *MVTEC_AD_CATEGORIES):
        raise missing_category(category, MVTEC_AD_CATEGORIES, where="MVTec-AD")
    from pushpull_jax.data.tfds_builders import MvtecAd

    builder = MvtecAd(config="all", data_dir=root or None)
    if category != "all" and not _is_prepared(builder):
        builder = MvtecAd(config=category, data_dir=root or None)
    return _archive_records(builder, category)


def read_prepared_visa(root: str, category: str, *, protocol: Protocol) -> tuple[Record, ...]:
    """The manifest of one category of VisA, or of "all": the same records as those of the extracted archive.

    Args:
        root: data folder; empty: that of tensorflow-datasets.
        category: name of a category.
        protocol: which of the official splits.

    Raises:
        InputError: the category is unknown, or the data are neither prepared nor is their archive there.
    """
    if category not in ("all", *VISA_CATEGORIES):
        raise missing_category(category, VISA_CATEGORIES, where="VisA")
    from pushpull_jax.data.tfds_builders import Visa

    return _archive_records(Visa(config=protocol, data_dir=root or None), category)


def read_cifar10(root: str, normal: str) -> tuple[Record, ...]:
    """The manifest of one run on CIFAR-10: its training images of the normal class and all test images.

    Args:
        root: data folder; empty: that of tensorflow-datasets.
        normal: name of the normal class.

    Raises:
        InputError: the class is unknown, or the data are neither prepared nor can they be downloaded.
    """
    if normal not in CIFAR10_CLASSES:
        raise missing_category(normal, CIFAR10_CLASSES, where="CIFAR-10")
    records = [
        one_class_record(key, image, shows=shows, split=split, normal=normal)
        for split in ("train", "test")
        for key, shows, image in labelled_images("cifar10", root, split=split)
        if split == "test" or shows == normal
    ]
    return tuple(sorted(records, key=lambda record: record.key))


def labelled_images(name: str, root: str, *, split: Literal["train", "test"]) -> list[tuple[str, str, Stored]]:
    """The images of a data set of tensorflow-datasets that has the features id, image and label, as CIFAR has.

    Args:
        name: name of the data set.
        root: data folder; empty: that of tensorflow-datasets.
        split: which of its splits.

    Returns:
        (key, name of the class, image) of each; the key is SPLIT/CLASS/ID.

    Raises:
        InputError: the data are neither prepared nor can they be downloaded.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=root or None)
    _prepare(builder)
    source = _source(builder, split)
    names = builder.info.features["label"].names
    images = []
    for position in range(len(source)):
        example = _example(source, position, builder.data_dir)
        shows = names[example["label"]]
        key = f"{split}/{shows}/{example['id'].decode()}"
        images.append((key, shows, _stored(source, position, "image", f"{key} in {builder.data_dir}")))
    return images


def _archive_records(builder: Any, category: str) -> tuple[Record, ...]:
    """The records of one of our builders, as its metadata give them."""
    _prepare(builder)
    records = []
    for split, entries in builder.info.metadata.items():
        source = _source(builder, split)
        for position, (key, has_mask, label, defect_type, shows) in enumerate(entries):
            name = f"{key} in {builder.data_dir}"
            image = _stored(source, position, "image", name)
            mask = _stored(source, position, "mask", f"mask of {name}") if has_mask else None
            records.append(Record(key, image, mask, label, defect_type, split, category=shows))
    if category != "all":
        names = sorted({record.category for record in records})
        if category not in names:
            raise missing_category(category, names, where=builder.data_dir)
        records = [record for record in records if record.category == category]
    return tuple(sorted(records, key=lambda record: record.key))


def _source(builder: Any, split: str) -> Sequence[dict[str, Any]]:
    """The examples of a split at random access, with images as the bytes that are stored."""
    from tensorflow_datasets import decode

    try:
        return builder.as_data_source(split, decoders={"image": decode.SkipDecoding()})
    except NotImplementedError as error:
        raise InputError(
            f"{builder.data_dir} is prepared as {builder.info.file_format.value}, of which no single example can be "
            f"read: give another data folder to prepare it in as {_FILE_FORMAT}, or remove it"
        ) from error


def _stored(source: Sequence[dict[str, Any]], position: int, feature: str, name: str) -> Stored:
    return Stored(name, partial(_read, source, position, feature, name))


def _read(source: Sequence[dict[str, Any]], position: int, feature: str, name: str) -> bytes:
    return _example(source, position, name)[feature]


def _example(source: Sequence[dict[str, Any]], position: int, name: str) -> dict[str, Any]:
    try:
        return source[position]
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise InputError(f"{name}: cannot be read: {error}") from error


def _is_prepared(builder: Any) -> bool:
    return (builder.data_path / "dataset_info.json").exists()


def _prepare(builder: Any) -> None:
    """Prepare a data set where it is not, after a check that it can be."""
    if _is_prepared(builder):
        return
    _check_available(builder)
    _tensorflow()
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.extractor import ExtractError
    from tensorflow_datasets.core.download.util import DownloadError

    try:
        # What is said of the progress is none of a program's results.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format=_FILE_FORMAT)
    except (NonMatchingChecksumError, DownloadError, ExtractError, OSError) as error:
        raise InputError(f"{builder.info.full_name} cannot be prepared in {builder.data_dir}: {error}") from error


def _check_available(builder: Any) -> None:
    """Whether the archives of a data set are in the manual folder, or else can be downloaded."""
    manual = builder.data_dir_root / "downloads" / "manual"
    missing = f"{builder.info.full_name} is not prepared in {builder.data_dir_root}"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        if not any((manual / name).exists() for name in builder.ARCHIVES):
            raise InputError(
                f"{missing}, and its archive is not in {manual}. {builder.MANUAL_DOWNLOAD_INSTRUCTIONS} Put it at "
                f"{manual / builder.ARCHIVES[0]}, or give the folder of data that holds it so."
            )
        return
    import requests

    for url, file in builder.url_infos.items():
        if (manual / file.filename).exists():
            continue
        try:
            requests.head(url, timeout=_PATIENCE, allow_redirects=True).raise_for_status()
        except requests.RequestException as error:
            raise InputError(
                f"{missing}, and cannot be downloaded: {url} does not answer ({type(error).__name__}). Put its archive "
                f"at {manual / file.filename}, or give the folder of data where it is prepared."
            ) from error
