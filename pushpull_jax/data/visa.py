"""The layout of VisA on disk, read into a manifest. Nothing is decoded here.

    CATEGORY/Data/Images/{Normal,Anomaly}/NAME.JPG
    CATEGORY/Data/Masks/Anomaly/NAME.png             values other than 0 are anomalous
    CATEGORY/image_anno.csv                          image,label,mask: what is wrong with each image
    split_csv/{1cls,2cls_fewshot,2cls_highshot}.csv  object,split,label,image,mask: the three official protocols

(Y. Zou et al., ECCV 2022; the repository amazon-science/spot-diff.) In the two-class protocols labelled anomalies are
part of the training split. Paths in the tables are relative to the root, and are the keys.
"""

import csv
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pushpull_jax.data.folders import Fault, Faults, existing_folder, settle
from pushpull_jax.data.manifest import Record, missing_category
from pushpull_jax.errors import InputError

Protocol = Literal["1cls", "2cls_fewshot", "2cls_highshot"]

# The official archive, under the name it has now and the one it was published under.
VISA_ARCHIVES = ("VisA_20220922.tar", "VisA.tar")
VISA_CATEGORIES = (
    "candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3", "pcb4",
    "pipe_fryum",
)  # fmt: skip
_COLUMNS = ("object", "split", "label", "image", "mask")
_LABELS = {"normal": 0, "anomaly": 1}


def visa_categories(root: str | os.PathLike, protocol: Protocol) -> tuple[str, ...]:
    """Names of the categories in the table of a protocol, sorted.

    Raises:
        InputError: the folder or its table does not exist or cannot be read.
    """
    return tuple(sorted({row["object"] for row in _rows(_table(existing_folder(root), protocol), _COLUMNS)}))


def read_visa(
    root: str | os.PathLike, category: str, *, protocol: Protocol, faults: Faults | None = None
) -> tuple[Record, ...]:
    """Read the manifest of one category.

    Args:
        root: the folder that holds split_csv and the categories; keys are relative to it.
        category: name of a category.
        protocol: which of the official tables.
        faults: receives what is wrong in place of an error; the records are then those of files that exist.

    Returns:
        Its records sorted by key. The type of a defect is that of image_anno.csv, "combined" where that names several,
        "anomaly" where there is no such file.

    Raises:
        InputError: root, table or category does not exist, or a row of the table is none; without `faults` also where
            files are missing. All faults of a category are listed.
    """
    root = existing_folder(root)
    table = _table(root, protocol)
    rows = [row for row in _rows(table, _COLUMNS) if row["object"] == category]
    if not rows:
        raise missing_category(category, visa_categories(root, protocol), where=str(table))
    types, found = _defect_types(root, category), defaultdict(list)
    records = {}
    for row in rows:
        missing = _check_row(row, root, found)
        if row["image"] in records:
            found[Fault("images that stand in the table twice", "table")].append(root / row["image"])
        if row["image"] in missing:
            continue
        label = _LABELS.get(row["label"])
        records[row["image"]] = Record(
            row["image"],
            str(root / row["image"]),
            str(root / row["mask"]) if row["mask"] and row["mask"] not in missing else None,
            label,
            types.get(row["image"], "anomaly") if label else "good",
            "test" if row["split"] == "test" else "train",
            category=category,
        )
    settle(found, faults, what=f"category {category} of {table}", base=root)
    return tuple(records[key] for key in sorted(records))


def _check_row(row: dict[str, str], root: Path, faults: Faults) -> list[str]:
    """Those of its files that do not exist."""
    if row["split"] not in ("train", "test") or row["label"] not in _LABELS:
        message = "rows without a split (train, test) or a label (normal, anomaly)"
        faults[Fault(message, "table")].append(",".join(row.values()))
    if row["label"] == "anomaly" and not row["mask"]:
        faults[Fault("anomalies without a mask", "image_without_mask")].append(root / row["image"])
    missing = [name for name in (row["image"], row["mask"]) if name and not (root / name).is_file()]
    message = "files that the table names, but that do not exist"
    faults[Fault(message, "missing_file")] += [root / name for name in missing]
    return missing


def _defect_types(root: Path, category: str) -> dict[str, str]:
    """Image -> type of its defect."""
    annotations = root / category / "image_anno.csv"
    if not annotations.is_file():
        return {}
    labels = {row["image"]: row["label"].strip() for row in _rows(annotations, ("image", "label", "mask"))}
    return {image: "combined" if "," in label else label for image, label in labels.items()}


def _table(root: Path, protocol: Protocol) -> Path:
    table = root / "split_csv" / f"{protocol}.csv"
    if not table.is_file():
        raise InputError(f"no file {table}, which says what each image of VisA is for")
    return table


def _rows(table: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    try:
        with open(table, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as a table: {error}") from error
    if tuple(header) != columns:
        raise InputError(f"{table}: the first line must be {','.join(columns)}, got {','.join(header)}")
    for line, row in enumerate(rows, start=2):
        if len(row) != len(columns):
            raise InputError(f"{table}: row {line} has {len(row)} fields, expected {len(columns)}")
        yield dict(zip(columns, row, strict=True))
