"""What the readers of folders share: listings in a fixed order, images told from bystanders, errors that help.

Nothing is decoded here. Listings are sorted and leave hidden entries out. Faults are collected rather than raised one
by one, so that a data set is mended in one go: what is wrong -> the files, relative to a base.
"""

import difflib
import os
import warnings
from pathlib import Path

from pushpull_jax.data.manifest import is_image_name, listed
from pushpull_jax.errors import InputError

# Files that data sets and file managers leave beside images, passed over without a word.
_BYSTANDERS = (".txt", ".md", ".db", ".ini")
# The fault that is a warning only.
_IGNORED = "ignored"

Faults = dict[str, list[str]]


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


def image_files(folder: Path, base: Path, faults: Faults) -> list[Path]:
    """The images of a folder at the end of a layout; what else lies there is entered under its fault."""
    images = []
    for path in entries(folder):
        if path.is_dir():
            faults["folders where images belong"] += relative([path], base)
        elif is_image_name(path.name):
            images.append(path)
        elif path.suffix.lower() not in _BYSTANDERS:
            faults[_IGNORED] += relative([path], base)
    return images


def report_faults(faults: Faults, *, what: str, base: Path) -> None:
    """Raise an InputError that lists all faults, or warn of what is not an image by its name."""
    unknown = faults.pop(_IGNORED, [])
    if any(faults.values()):
        lines = [f"{fault}: {listed(sorted(files))}" for fault, files in sorted(faults.items()) if files]
        raise InputError("\n  ".join([f"{what} in {base}:", *lines]))
    if unknown:
        warnings.warn(f"{base}: not images by their names, ignored: {listed(sorted(unknown))}", stacklevel=3)


def relative(paths: list[Path], base: Path) -> list[str]:
    """Paths relative to a base, with forward slashes."""
    return [path.relative_to(base).as_posix() for path in paths]
