"""What the readers of folders share: listings in a fixed order, images told from bystanders, errors that help.

Nothing is decoded here. Listings are sorted and leave hidden entries out. Faults are collected rather than raised one
by one, so that a data set is mended in one go: what is wrong -> the files.
"""

import difflib
import os
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

from pushpull_jax.data.manifest import is_image_name, listed
from pushpull_jax.errors import InputError

# Files that data sets and file managers leave beside images, passed over without a word.
_BYSTANDERS = (".txt", ".md", ".db", ".ini")


class Fault(NamedTuple):
    """What can be wrong with files of a layout; "ignored" is a warning only."""

    message: str
    kind: Literal[
        "misplaced", "ambiguous_mask", "mask_without_image", "image_without_mask", "no_training_image", "missing_file",
        "table", "ignored",
    ]  # fmt: skip


# The files are absolute paths, or what a table holds in place of one.
Faults = dict[Fault, list[Path | str]]
NOT_AN_IMAGE = Fault("not images by their names, ignored", "ignored")


def existing_folder(root: str | os.PathLike) -> Path:
    """The root of some data as an absolute path.

    Raises:
        InputError: it does not exist; the message says how far the path can be followed.
    """
    path = Path(os.path.abspath(root))
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"data folder {path} is a file, not a folder")
    missing, parent = path, path.parent
    while not parent.is_dir():
        missing, parent = parent, parent.parent
    names = [folder.name for folder in subfolders(parent)]
    near = difflib.get_close_matches(missing.name, names, n=1)
    hint = f"; did you mean {parent / near[0]}?" if near else f"; it holds the folders: {listed(names) or 'none'}"
    raise InputError(f"data folder {path} does not exist; the nearest folder that does is {parent}{hint}")


def entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden entries; nothing where there is no such folder."""
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror or error}") from error


def subfolders(folder: Path) -> list[Path]:
    """The folders within a folder, as `entries`."""
    return [path for path in entries(folder) if path.is_dir()]


def image_files(folder: Path, faults: Faults) -> list[Path]:
    """The images of a folder at the end of a layout; what else lies there is entered under its fault."""
    images = []
    for path in entries(folder):
        if path.is_dir():
            faults[Fault("folders where images belong", "misplaced")].append(path)
        elif is_image_name(path.name):
            images.append(path)
        elif path.suffix.lower() not in _BYSTANDERS:
            faults[NOT_AN_IMAGE].append(path)
    return images


def settle(found: Faults, faults: Faults | None, *, what: str, base: Path) -> None:
    """Hand the faults that were found to whoever asked for them; otherwise raise what is wrong, or warn of the ignored.

    Args:
        found: of one reading.
        faults: receives them, or None.
        what: what was read, for messages.
        base: files are named relative to it.

    Raises:
        InputError: without `faults`, lists all that are found but the ignored.
    """
    if faults is not None:
        for fault, files in found.items():
            faults.setdefault(fault, []).extend(files)
        return
    named = {fault: sorted(_named(files, base)) for fault, files in sorted(found.items()) if files}
    lines = [f"{fault.message}: {listed(files)}" for fault, files in named.items() if fault.kind != "ignored"]
    if lines:
        raise InputError("\n  ".join([f"{what} in {base}:", *lines]))
    for fault, files in named.items():
        warnings.warn(f"{base}: {fault.message}: {listed(files)}", stacklevel=3)


def relative(path: Path, base: Path) -> str:
    """A path relative to a base, with forward slashes."""
    return path.relative_to(base).as_posix()


def _named(files: list[Path | str], base: Path) -> list[str]:
    return [relative(file, base) if isinstance(file, Path) else file for file in files]
