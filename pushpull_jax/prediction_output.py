"""The folder that predictions are written to, of one detector with its thresholds and options.

predict.json       the detector's digest, thresholds and options, to which all rows belong
predictions.jsonl  a row an image, written after its pictures, with the version of its file: what is done
predictions.csv    the same rows, for people
heatmaps/          the image under its heat colours, at native size
masks/             white where the map is above the pixel threshold
maps/              16 bits: round(10000 map / pixel threshold), at most 65535, so that 10000 is the threshold
"""

import csv
import io
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pushpull_jax import heatmap
from pushpull_jax import workdir as files
from pushpull_jax.detector import Detector
from pushpull_jax.errors import InputError

BINDING, ROWS, TABLE = "predict.json", "predictions.jsonl", "predictions.csv"
HEATMAPS, MASKS, MAPS = "heatmaps", "masks", "maps"
# Of a 16-bit map, at the pixel threshold: the scale reaches 6.5 times the threshold.
MAP_UNIT = 10_000


class Pictures(NamedTuple):
    """Which pictures of an image are written, at its native size."""

    heatmaps: bool = True
    masks: bool = False
    maps: bool = False


class Prediction(NamedTuple):
    """What the detector says of one image."""

    path: str
    score: float
    threshold: float
    verdict: str
    pixel_threshold: float
    defect_area: float  # share of the pixels that are above the pixel threshold

    @property
    def cells(self) -> tuple[str, ...]:
        """Its row of the table."""
        numbers = (f"{value:.6g}" for value in (self.score, self.threshold))
        return (self.path, *numbers, self.verdict, f"{self.pixel_threshold:.6g}", f"{self.defect_area:.6g}")


class Version(NamedTuple):
    """By which a file is known to be the same."""

    bytes: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, path: Path) -> "Version | None":
        """That of a file; None where there is none."""
        try:
            told = path.stat()
        except OSError:
            return None
        return cls(told.st_size, told.st_mtime_ns)


class Output:
    """The rows and pictures of one folder; a context manager that keeps the tables open.

    Attributes:
        rows: those that are written, the last of each path.
    """

    def __init__(self, folder: str | PathLike, detector: Detector, *, pictures: Pictures, tile: int | None):
        """Begin a folder, or go on with one.

        Raises:
            InputError: it is a file, or holds predictions of another detector, threshold or option.
        """
        self._folder, self._pictures = Path(folder), pictures
        self._threshold, self._pixel_threshold = detector.threshold, detector.map_threshold
        if self._folder.exists() and not self._folder.is_dir():
            raise InputError(f"--output {folder}: expected a folder, this is a file")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._bind(
            {
                "detector": detector.digest,
                "threshold": self._threshold,
                "pixel_threshold": self._pixel_threshold,
                "tile": tile,
                **pictures._asdict(),
            }
        )
        self.rows: dict[str, Prediction] = {}
        self._versions: dict[str, Version] = {}
        self._resume()

    def _bind(self, binding: dict[str, Any]) -> None:
        """Write what all rows belong to, or compare it with what is there."""
        path = self._folder / BINDING
        if not path.is_file():
            if (self._folder / ROWS).is_file():
                raise InputError(f"--output {self._folder}: holds {ROWS} without {BINDING}: choose a new folder")
            files.write_json(path, binding)
            return
        there = files.read_json(path)
        there = there if isinstance(there, dict) else {}
        differing = [name for name, value in binding.items() if there.get(name) != value]
        if differing:
            shown = ", ".join(f"{name} {there.get(name)!r} there, {binding[name]!r} here" for name in differing)
            raise InputError(f"--output {self._folder} holds other predictions ({shown}): choose a new folder")

    def _resume(self) -> None:
        """Take what is done from the rows, without a last one that was torn, and write the table anew from them."""
        kept = files.read_lines(self._folder / ROWS)
        try:
            for row in kept:
                version = Version(row.pop("bytes"), row.pop("modified"))
                prediction = Prediction(**row)
                self.rows[prediction.path], self._versions[prediction.path] = prediction, version
        except (KeyError, TypeError) as error:
            raise InputError(f"{self._folder / ROWS}: a row is not one of ours: {error}") from error
        self._write_rows()
        files.write_text(self._folder / TABLE, _csv([Prediction._fields, *(row.cells for row in self.rows.values())]))

    def _write_rows(self) -> None:
        lines = (_line(row, self._versions[path]) for path, row in self.rows.items())
        files.write_text(self._folder / ROWS, "".join(lines))

    def __enter__(self) -> "Output":
        # File names may hold bytes that are no UTF-8: they are written as they are.
        options = {"mode": "a", "encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
        self._lines, self._table = ((self._folder / name).open(**options) for name in (ROWS, TABLE))
        return self

    def __exit__(self, *raised: Any) -> None:
        self._lines.close()
        self._table.close()

    def has(self, path: Path) -> bool:
        """Whether an image is done, and its file still the same."""
        return str(path) in self._versions and self._versions[str(path)] == Version.of(path)

    def draw(self, path: Path, name: Path, pixels: np.ndarray, score: float, native: np.ndarray) -> Prediction:
        """Write the pictures of an image; its row.

        Args:
            path: of the image.
            name: of its pictures, below their folders.
            pixels: [H,W,3] uint8.
            score: of the image.
            native: its map [H,W].
        """
        above = native > self._pixel_threshold
        if self._pictures.heatmaps:
            self._save(HEATMAPS, name, heatmap.overlay(pixels, native, threshold=self._pixel_threshold))
        if self._pictures.masks:
            self._save(MASKS, name, np.where(above, np.uint8(255), np.uint8(0)))
        if self._pictures.maps:
            relative = np.rint(native * (MAP_UNIT / self._pixel_threshold))
            self._save(MAPS, name, np.clip(relative, 0, 65535).astype(np.uint16))
        verdict = "anomalous" if score > self._threshold else "normal"
        return Prediction(str(path), score, self._threshold, verdict, self._pixel_threshold, float(above.mean()))

    def _save(self, kind: str, name: Path, picture: np.ndarray) -> None:
        target = self._folder / kind / name
        target.parent.mkdir(parents=True, exist_ok=True)
        heatmap.save_png(target, picture)

    def append(self, rows: Sequence[Prediction], versions: Sequence[Version]) -> None:
        """Write rows whose pictures are written, with the versions of their files; they are on file when it returns."""
        for row, version in zip(rows, versions, strict=True):
            self._lines.write(_line(row, version))
            self.rows[row.path], self._versions[row.path] = row, version
        self._table.write(_csv([row.cells for row in rows]))
        self._lines.flush()
        self._table.flush()


def _line(row: Prediction, version: Version) -> str:
    return json.dumps(row._asdict() | version._asdict()) + "\n"


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
