"""A data set by a table of one's own, CSV or JSON lines, a row for each image; nothing is decoded.

    path,label,mask,split,category,defect_type

    path         of the image, absolute or relative to the table's folder; it is the key
    label        normal, good, ok, 0; anomalous, anomaly, bad, ko, 1; or empty: unlabelled
    mask         as path, or empty; several, which are united, as a list in JSON lines
    split        train or test
    category     empty: the name of the table without its extension
    defect_type  empty: "good", "bad" or "unlabelled" by the label

Only path and label must be there. The rule where no row has a split: all anomalous images are tested, and so is a fifth
of the normal ones of each category (`manifest.share_for_test`); the others are trained on.
"""

import csv
import json
import os
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from pushpull_jax.config import nearest
from pushpull_jax.data.folders import Fault, Faults, existing_folder, settle
from pushpull_jax.data.manifest import Record, missing_category, share_for_test
from pushpull_jax.errors import InputError

TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson")
_COLUMNS = ("path", "label", "mask", "split", "category", "defect_type")
_LABELS = {
    "normal": 0, "good": 0, "ok": 0, "0": 0, "anomalous": 1, "anomaly": 1, "bad": 1, "ko": 1, "1": 1, "": None,
}  # fmt: skip
_TYPES = {0: "good", 1: "bad", None: "unlabelled"}


def table_categories(table: str | os.PathLike) -> tuple[str, ...]:
    """Names of the categories in a table, sorted.

    Raises:
        InputError: the table does not exist or cannot be read.
    """
    return tuple(sorted({row["category"] for row in _rows(Path(os.path.abspath(table)))}))


def read_table(table: str | os.PathLike, category: str, *, faults: Faults | None = None) -> tuple[Record, ...]:
    """Read the manifest of one category.

    Args:
        table: a .csv file, or .jsonl with an object a line.
        category: name of a category.
        faults: receives what is wrong in place of an error; the records are then those of images that exist.

    Returns:
        Its records sorted by key.

    Raises:
        InputError: the table or the category does not exist, or the table cannot be read; without `faults` also where
            a row is none, or files are missing. All faults of a category are listed.
    """
    table = Path(os.path.abspath(table))
    rows = _rows(table)
    chosen = [row for row in rows if row["category"] == category]
    if not chosen:
        raise missing_category(category, sorted({row["category"] for row in rows}), where=str(table))
    found: Faults = defaultdict(list)
    times = Counter(_file(row, table) for row in rows)
    has_split = any(row["split"] for row in rows)
    records = {}
    for row in chosen:
        if times[_file(row, table)] > 1:
            found[Fault("images that stand in the table twice", "table")].append(row["path"])
        if _has_faults(row, table, found, has_split=has_split):
            continue
        records[row["path"]] = _record(row, table.parent)
    if not has_split:
        tested = share_for_test(key for key, record in records.items() if record.label == 0)
        records = {
            key: replace(record, split="test" if record.label == 1 or key in tested else "train")
            for key, record in records.items()
        }
    settle(found, faults, what=f"category {category} of {table.name}", base=table.parent)
    return tuple(records[key] for key in sorted(records))


def _file(row: dict[str, Any], table: Path) -> str:
    """The image of a row, however its path is written."""
    return os.path.normpath(os.path.join(table.parent, row["path"]))


def _record(row: dict[str, Any], base: Path) -> Record:
    label = _LABELS[row["label"].lower()]
    masks = tuple(str(base / mask) for mask in row["mask"] if (base / mask).is_file())
    return Record(
        row["path"],
        str(base / row["path"]),
        masks[0] if len(masks) == 1 else masks or None,
        label,
        row["defect_type"] or _TYPES[label],
        row["split"] or "train",
        row["category"],
    )


def _has_faults(row: dict[str, Any], table: Path, faults: Faults, *, has_split: bool) -> bool:
    """Whether a row cannot be used; what is wrong is entered."""
    missing = [table.parent / name for name in (row["path"], *row["mask"]) if not (table.parent / name).is_file()]
    faults[Fault("files that the table names, but that do not exist", "missing_file")] += missing
    wrong = []
    if row["label"].lower() not in _LABELS:
        wrong.append(f"label must be one of {', '.join(filter(None, _LABELS))} or empty, got {row['label']!r}")
    if has_split and row["split"] not in ("train", "test"):
        wrong.append(f"split must be train or test, got {row['split']!r}")
    if "\\" in row["path"]:
        wrong.append("path must have forward slashes")
    faults[Fault("rows that are none", "table")] += [f"row {row['row']}: {reason}" for reason in wrong]
    return bool(wrong) or table.parent / row["path"] in missing


def _rows(table: Path) -> list[dict[str, Any]]:
    """The rows with all columns: text, but masks as a tuple and "row", its place in the file."""
    if not table.is_file():
        existing_folder(table.parent)
        raise InputError(f"no file {table}; expected a table ({', '.join(TABLE_SUFFIXES)}) of the data set")
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            read = _csv_rows(file, table) if table.suffix.lower() == ".csv" else _json_rows(file, table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as a table: {error}") from error
    if not read:
        raise InputError(f"{table}: holds no row")
    return [_normalised(number, row, table) for number, row in read]


def _csv_rows(file, table: Path) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.reader(file)
    header = [name.strip() for name in next(reader, [])]
    _check_columns(header, table)
    rows = []
    for row in reader:
        if row and len(row) != len(header):
            raise InputError(f"{table}: row {reader.line_num} has {len(row)} fields, expected {len(header)}")
        if row:
            rows.append((reader.line_num, dict(zip(header, row, strict=True))))
    return rows


def _json_rows(file, table: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{table}: row {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{table}: row {number} must be an object, got {line.strip()[:60]}")
        _check_columns(row, table)
        rows.append((number, row))
    return rows


def _check_columns(names, table: Path) -> None:
    for name in names:
        if name not in _COLUMNS:
            hint = nearest(name, _COLUMNS)
            raise InputError(f"{table}: unknown column {name!r}{hint} (there are: {', '.join(_COLUMNS)})")
    for name in ("path", "label"):
        if name not in names:
            raise InputError(f"{table}: no column {name!r}, got: {', '.join(names)}")


def _normalised(number: int, row: dict[str, Any], table: Path) -> dict[str, Any]:
    values: dict[str, Any] = {name: row.get(name, "") for name in _COLUMNS} | {"row": number}
    masks = values["mask"] if isinstance(values["mask"], list) else [values["mask"]]
    text = {name: _text(values[name]) for name in _COLUMNS if name != "mask"}
    if not text["path"]:
        raise InputError(f"{table}: row {number} has no path")
    text["category"] = text["category"] or table.stem
    return text | {"row": number, "mask": tuple(_text(mask) for mask in masks if _text(mask))}


def _text(value: Any) -> str:
    """JSON has null, true and numbers where a CSV has text; true and false are labels."""
    if isinstance(value, bool):
        return str(int(value))
    return "" if value is None else str(value).strip()
