"""The folder that predictions are written to, of one detector with its thresholds and options.

predict.json       the detector's digest, thresholds and options, to which all rows belong
predictions.jsonl  a row an image, written after its pictures, with their name and the version of the file: what is done
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
    """The rows and pictures of one folder; a context manager that keeps the tables open."""

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
        # By the path of the image, the last of each.
        self._rows: dict[str, Prediction] = {}
        self._versions: dict[str, Version] = {}
        self._names: dict[str, str] = {}
        self._resume()
        self._taken = set(self._names.values())
        self._wanted: dict[Path, int] = {}  # how many images wanted a name
        self._is_stale = False  # whether the tables hold a row that is no longer one

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
                path, version = row["path"], Version(row.pop("bytes"), row.pop("modified"))
                self._names[path] = row.pop("picture")
                self._rows[path], self._versions[path] = Prediction(**row), version
        except (KeyError, TypeError) as error:
            raise InputError(f"{self._folder / ROWS}: a row is not one of ours: {error}") from error
        self._write_tables()

    def _write_tables(self) -> None:
        """Write every row anew, once."""
        files.write_text(self._folder / ROWS, "".join(map(self._line, self._rows)))
        cells = (row.cells for row in self._rows.values())
        files.write_text(self._folder / TABLE, _csv([Prediction._fields, *cells]))

    def _line(self, path: str) -> str:
        row, version = self._rows[path]._asdict(), self._versions[path]._asdict()
        return json.dumps(row | {"picture": self._names[path]} | version) + "\n"

    def __enter__(self) -> "Output":
        # File names may hold bytes that are no UTF-8: they are written as they are.
        options = {"mode": "a", "encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
        self._lines, self._table = ((self._folder / name).open(**options) for name in (ROWS, TABLE))
        return self

    def __exit__(self, *raised: Any) -> None:
        self._lines.close()
        self._table.close()
        if self._is_stale:
            self._write_tables()

    def has(self, path: Path) -> bool:
        """Whether an image is done, and its file still the same."""
        return str(path) in self._versions and self._versions[str(path)] == Version.of(path)

    def row(self, path: Path) -> Prediction | None:
        """That of an image that is done."""
        return self._rows.get(str(path))

    def drop(self, path: str) -> None:
        """Take back the row of an image, if it has one: its file is another now, and cannot be read."""
        self._is_stale |= self._rows.pop(path, None) is not None
        self._versions.pop(path, None)

    def name_pictures(self, path: Path, wanted: Path) -> None:
        """Give an image's pictures a name for as long as the folder lives: as wanted, or numbered if that is taken."""
        while str(path) not in self._names:
            count = self._wanted[wanted] = self._wanted.get(wanted, 0) + 1
            name = f"{wanted}.png" if count == 1 else f"{wanted}.{count}.png"
            if name not in self._taken:
                self._names[str(path)] = name
                self._taken.add(name)

    def draw(self, path: Path, pixels: np.ndarray, score: float, native: np.ndarray) -> Prediction:
        """Write the pictures of an image; its row.

        Args:
            path: of the image, whose pictures have a name.
            pixels: [H,W,3] uint8.
            score: of the image.
            native: its map [H,W].
        """
        above = native > self._pixel_threshold
        if self._pictures.heatmaps:
            self._save(HEATMAPS, path, heatmap.overlay(pixels, native, threshold=self._pixel_threshold))
        if self._pictures.masks:
            self._save(MASKS, path, np.where(above, np.uint8(255), np.uint8(0)))
        if self._pictures.maps:
            relative = np.rint(native * (MAP_UNIT / self._pixel_threshold))
            self._save(MAPS, path, np.clip(relative, 0, 65535).astype(np.uint16))
        verdict = "anomalous" if score > self._threshold else "normal"
        return Prediction(str(path), score, self._threshold, verdict, self._pixel_threshold, float(above.mean()))

    def _save(self, kind: str, path: Path, picture: np.ndarray) -> None:
        target = self._folder / kind / self._names[str(path)]
        target.parent.mkdir(parents=True, exist_ok=True)
        heatmap.save_png(target, picture)

    def append(self, rows: Sequence[Prediction], versions: Sequence[Version]) -> None:
        """Write rows whose pictures are written, with the versions of their files; they are on file when it returns."""
        for row, version in zip(rows, versions, strict=True):
            self._is_stale |= row.path in self._rows
            self._rows[row.path], self._versions[row.path] = row, version
            self._lines.write(self._line(row.path))
        self._table.write(_csv([row.cells for row in rows]))
        self._lines.flush()
        self._table.flush()


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
