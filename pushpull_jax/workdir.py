"""The files of a run's folder, written in whole parts: a reader sees the old file or the new one, never half of one.

The folder is a `pathlib.Path`, or a place in a bucket with the same methods (`bucket`).

config.json           the resolved config, versions, command, and what data it saw
backbone.safetensors  frozen parameters: the backbone's and the standardisation
checkpoints/          states of the reconstructor and its optimiser (orbax)
metrics.jsonl         a line a logging step
residuals.safetensors what is usual of the residuals on normal images, where the score is in units of it
threshold.json        the thresholds, and the held-out scores that they were fitted on
metrics.json, predictions.csv, report.html            the evaluation
profile/              traces of a few steps, where log.profile asks for them
tensorboard/          train and test, where log.tensorboard asks for them
"""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pushpull_jax.bucket import bucket_path, is_address, is_bucket, write_object
from pushpull_jax.config import HOW_IT_RUNS, Config, check, flatten, from_dict, to_dict
from pushpull_jax.errors import InputError

CONFIG, BACKBONE, CHECKPOINTS, LOG = "config.json", "backbone.safetensors", "checkpoints", "metrics.jsonl"
RESIDUALS, PROFILE, TENSORBOARD = "residuals.safetensors", "profile", "tensorboard"
THRESHOLD, METRICS, PREDICTIONS, REPORT = "threshold.json", "metrics.json", "predictions.csv", "report.html"

# A bucket takes the same object about once a second (its documentation), and a row may come far more often.
_SECONDS = 10.0

# What the numbers of a run depend on.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "pillow")


def run_folder(workdir: str | os.PathLike) -> Path:
    """The folder of a run, or its place in a bucket.

    Raises:
        InputError: it is an address that cannot be used.
    """
    return bucket_path(workdir) if is_address(workdir) else Path(workdir)


def local_folder(path: str | os.PathLike, *, name: str) -> Path:
    """A folder of this machine, which `name` gives.

    Raises:
        InputError: it is an address, which would become a folder of that name.
    """
    if is_address(path):
        raise InputError(f"{name} {path}: expected a folder; only the folder of a run may lie in a bucket")
    return Path(path)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all: what was there stays until the new one is complete. Its folder must exist."""
    if is_bucket(path):
        return write_object(path, content)
    path = Path(path)
    part = path.with_name(f".{uuid.uuid4().hex}.part")  # as long whatever the name is, and no other process's
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text whole or not at all; file names in it that are no UTF-8 keep their bytes."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, values: Any) -> None:
    """Write JSON in one step; a float that is not finite becomes null, since JSON has no such number."""
    write_text(path, json.dumps(_finite(values), indent=2) + "\n")


def as_json(values: Any) -> Any:
    """Values as they come back from `write_json` and `read_json`."""
    return json.loads(json.dumps(_finite(values)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        InputError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; none where there is no file. A torn last line, of a run killed, is left out.

    Raises:
        InputError: another line is not JSON.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}: line {number} cannot be read as JSON: {error}") from error
    return rows


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Replace a JSON-lines file."""
    write_text(path, "".join(json.dumps(_finite(row)) + "\n" for row in rows))


class Log:
    """Rows of a JSON-lines file that grows, which is written whole. A context manager: leaving it writes what is left.

    In a bucket rows wait until `_SECONDS` have passed.

    Args:
        path: of the file.
        rows: that stand in it.
        is_wanted: otherwise nothing is written.
    """

    def __init__(self, path: Path, rows: Iterable[dict], *, is_wanted: bool = True):
        self._path, self._rows, self._is_wanted = path, list(rows), is_wanted
        self._is_behind, self._written_at = False, time.monotonic()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *raised: Any) -> None:
        self.flush()

    def add(self, row: dict) -> None:
        """Add a row."""
        self._rows.append(row)
        self._is_behind = True
        if not is_bucket(self._path) or time.monotonic() - self._written_at > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that were added; to be done before the state that they lead to is saved."""
        if self._is_wanted and self._is_behind:
            self._is_behind = False  # whatever comes: leaving would wait for a bucket that is down once more
            write_lines(self._path, self._rows)
            self._written_at = time.monotonic()


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the packages that the numbers depend on."""
    names = ("pushpull_jax", *_PACKAGES)
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def is_run(workdir: Path) -> bool:
    """Whether a folder holds a run."""
    return (workdir / CONFIG).is_file()


def read_config(workdir: Path) -> tuple[Config, dict[str, Any]]:
    """The config of a run, and the rest of its config.json.

    Raises:
        InputError: the folder does not exist, is not a run, or its config.json is not one of ours.
    """
    if not workdir.is_dir():
        raise InputError(f"workdir {workdir}: there is no such folder")
    if not is_run(workdir):
        raise InputError(f"workdir {workdir} is not a run: it has no {CONFIG} (`pushpull train` writes one)")
    values = read_json(workdir / CONFIG)
    if not isinstance(values, dict) or "config" not in values:
        raise InputError(f"{workdir / CONFIG}: expected an object with a field `config`")
    config = from_dict(values.pop("config"), source=str(workdir / CONFIG))
    check(config, source=str(workdir / CONFIG))
    return config, values


def check_finished(workdir: Path, *, called: str = "workdir") -> None:
    """Raise where a run has no detector yet.

    Args:
        workdir: folder of a run.
        called: what the user gave it as.

    Raises:
        InputError: it has not; the message tells the command that goes on with it.
    """
    if (workdir / THRESHOLD).is_file():
        return
    command = shlex.join(read_config(workdir)[1].get("command", []))
    raise InputError(
        f"{called} {workdir}: the run is not finished; the command that started it goes on with it"
        + (f": {command}" if command else "")
    )


def write_config(workdir: Path, config: Config, **rest: Any) -> None:
    """Write config.json: the config, and whatever else is worth knowing of the run."""
    write_json(workdir / CONFIG, {"config": to_dict(config), **rest})


def _is_foreign(path: Path) -> bool:
    """Whether a file is not what a run leaves that was killed before it wrote its config.json."""
    return path.name != BACKBONE and path.suffix != ".part"


def contents(folder: Path) -> list[Path]:
    """What is in a folder; in a bucket without the empty object that stands for a folder made in Google's console."""
    entries = list(folder.iterdir())
    # It is listed as FOLDER/FOLDER, which is not there.
    return [entry for entry in entries if not is_bucket(folder) or entry.name != folder.name or entry.exists()]


def check_startable(workdir: Path, config: Config) -> bool:
    """Whether a run is resumed (True) or started (False).

    Raises:
        InputError: the folder holds a run of another config, or something that is not a run.
    """
    if not is_run(workdir):
        if workdir.exists() and (not workdir.is_dir() or any(map(_is_foreign, contents(workdir)))):
            raise InputError(f"workdir {workdir} exists and is not a run: choose an empty or a new folder")
        if is_bucket(workdir):
            return False
        parent = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"workdir {workdir}: {parent} is not a folder that may be written to")
        return False
    there, here = flatten(read_config(workdir)[0]), flatten(config)
    may_differ = HOW_IT_RUNS
    if here["training.schedule"] == "constant" and here["training.steps"] > there["training.steps"]:
        may_differ += ("training.steps",)  # the steps that are done stay what they are
    differing = [name for name in here if here[name] != there[name] and not name.startswith(may_differ)]
    if differing:
        shown = ", ".join(f"{name} = {there[name]!r} there, {here[name]!r} here" for name in differing)
        raise InputError(f"workdir {workdir} holds a run of another config: {shown}")
    return True
