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

from pushpull_jax.data.folders import Faults, existing_folder, report_faults
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


def read_visa(root: str | os.PathLike, category: str, *, protocol: Protocol) -> tuple[Record, ...]:
    """Read the manifest of one category.

    Args:
        root: the folder that holds split_csv and the categories; keys are relative to it.
        category: name of a category.
        protocol: which of the official tables.

    Returns:
        Its records sorted by key. The type of a defect is that of image_anno.csv, "combined" where that names several,
        "anomaly" where there is no such file.

    Raises:
        InputError: root, table or category does not exist, a row of the table is none, or files are missing. All
            faults of a category are listed.
    """
    root = existing_folder(root)
    table = _table(root, protocol)
    rows = [row for row in _rows(table, _COLUMNS) if row["object"] == category]
    if not rows:
        raise missing_category(category, visa_categories(root, protocol), where=str(table))
    types, faults = _defect_types(root, category), defaultdict(list)
    records = {}
    for row in rows:
        _check_row(row, root, faults)
        if row["image"] in records:
            faults["images that stand in the table twice"].append(row["image"])
        label = _LABELS.get(row["label"])
        records[row["image"]] = Record(
            row["image"],
            str(root / row["image"]),
            str(root / row["mask"]) if row["mask"] else None,
            label,
            types.get(row["image"], "anomaly") if label else "good",
            row["split"],
            category=category,
        )
    report_faults(faults, what=f"category {category} of {table}", base=root)
    return tuple(records[key] for key in sorted(records))


def _check_row(row: dict[str, str], root: Path, faults: Faults) -> None:
    if row["split"] not in ("train", "test") or row["label"] not in _LABELS:
        faults["rows without a split (train, test) or a label (normal, anomaly)"].append(",".join(row.values()))
    if row["label"] == "anomaly" and not row["mask"]:
        faults["anomalies without a mask"].append(row["image"])
    for name in (row["image"], row["mask"]):
        if name and not (root / name).is_file():
            faults["files that the table names, but that do not exist"].append(name)


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
