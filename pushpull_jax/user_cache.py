"""Folders of this user in which programs keep what they need not compute again; deleting them costs only time."""

import os
import uuid
from pathlib import Path


def cache_folder(name: str) -> Path:
    """pushpull_jax/NAME in XDG_CACHE_HOME, or in ~/.cache."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is invalid and to be ignored, says the XDG base directory specification.
    return (Path(caches) if os.path.isabs(caches) else Path("~/.cache").expanduser()) / "pushpull_jax" / name


def prepare_folder(folder: Path) -> None:
    """Make a folder for the user alone; OSError if it cannot be written to."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    probe = folder / f".{uuid.uuid4().hex}.part"
    probe.write_bytes(b"")
    probe.unlink()
