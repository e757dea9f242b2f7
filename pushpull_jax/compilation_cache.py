"""Compiled programs kept from one command to the next: JAX's persistent cache in a folder of the user, bounded, mended.

JAX writes an entry in place, so that a process killed meanwhile leaves half of one; it then warns of that entry in
every command and never replaces it. Before anything is compiled, entries that are new since the last time are therefore
read once, and those that cannot be read are deleted. Only programs enable the cache; importing never does.
"""

import contextlib
import importlib
import json
import os
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

from pushpull_jax.progress import say
from pushpull_jax.user_cache import cache_folder, prepare_folder

_MAX_BYTES = 2**29  # programs of ours take 0.01 to 0.3 MB on a CPU; larger ones a few
_MIN_SECONDS = (
    0.5  # below that reading an entry and the clutter gain little; JAX's own value, 1 s, is half our programs
)
_ENTRY, _USED = "-cache", "-atime"  # the ends of names that JAX gives to an entry and to when it was used last
_CHECKED = "checked.json"  # sizes and times of the entries that were found whole
_LOCK, _LOCK_SECONDS = ".lockfile", 10  # JAX's own lock of a bounded cache, and how long it waits for it


def enable() -> Path | None:
    """Keep compiled programs, unless the user has said otherwise.

    The folder is pushpull_jax/compiled in XDG_CACHE_HOME or ~/.cache, holds 512 MiB at most, the least recently used
    going first, and takes what took half a second to compile. JAX_COMPILATION_CACHE_DIR names another folder, which is
    mended too but keeps JAX's settings; JAX_ENABLE_COMPILATION_CACHE=false switches the cache off. A folder that
    cannot be written to is a line on stderr, and nothing is kept. To be called before anything is compiled.

    Returns:
        The folder, or None where nothing is kept in a folder of this machine.
    """
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return None
    chosen = jax.config.jax_compilation_cache_dir
    if chosen and "://" in chosen:
        return None  # JAX's own affair
    folder = Path(chosen or cache_folder("compiled"))
    try:
        prepare_folder(folder)  # for the user alone, since whoever writes to it can have code run
    except OSError as error:
        say(f"compiled programs are not kept: {error}")
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if not chosen:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        for name, value in (
            ("jax_compilation_cache_max_size", _MAX_BYTES),
            ("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS),
        ):
            if name.upper() not in os.environ:
                jax.config.update(name, value)
    _mend(folder, is_bounded=jax.config.jax_compilation_cache_max_size != -1)
    return folder


def _mend(folder: Path, *, is_bounded: bool) -> None:
    """Delete the entries that cannot be read; in a bounded cache those too that JAX could not evict."""
    import filelock

    try:
        # Nobody is in the middle of writing; an unbounded cache is not locked, and at worst loses an entry here.
        with filelock.FileLock(folder / _LOCK, timeout=_LOCK_SECONDS if is_bounded else 0):
            checked = _read_checked(folder / _CHECKED)
            whole = _delete_broken(folder, checked, is_bounded=is_bounded)
            if whole != checked:
                _write_checked(folder / _CHECKED, whole)
    except (filelock.Timeout, OSError):
        pass  # mended the next time


def _delete_broken(folder: Path, checked: dict[str, list[int]], *, is_bounded: bool) -> dict[str, list[int]]:
    """Size and time of the entries that remain, by name; those that are as in `checked` are not read."""
    whole = {}
    for entry in sorted(folder.glob(f"*{_ENTRY}")):
        used = entry.with_name(entry.name.removesuffix(_ENTRY) + _USED)
        with contextlib.suppress(OSError):  # another process was quicker, or it is no file
            status = entry.stat()
            state = [status.st_size, status.st_mtime_ns]
            is_whole = checked.get(entry.name) == state or _is_whole(entry)
            if is_whole and (used.exists() or not is_bounded):
                whole[entry.name] = state
            else:
                entry.unlink()
                used.unlink(missing_ok=True)
    return whole


def _read_checked(path: Path) -> dict[str, list[int]]:
    try:
        checked = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return checked if isinstance(checked, dict) else {}


def _write_checked(path: Path, checked: dict[str, list[int]]) -> None:
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_text(json.dumps(checked))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _is_whole(entry: Path) -> bool:
    """Whether an entry can be decompressed to its end; of a format that is unknown here, whether it is not empty."""
    try:
        content = entry.read_bytes()
    except OSError:
        return False
    decompress, error = _codec(content[:4])
    try:
        return bool(content) and (decompress is None or bool(decompress(content)))
    except error:
        return False


def _codec(start: bytes) -> tuple[Callable[[bytes], bytes] | None, type[Exception]]:
    """How to decompress what starts like that, and what it raises: zlib, or zstandard where JAX has found it."""
    if start[:1] == b"\x78":
        return zlib.decompress, zlib.error
    if start == b"\x28\xb5\x2f\xfd":
        with contextlib.suppress(ImportError):
            zstandard = importlib.import_module("zstandard")
            return zstandard.ZstdDecompressor().decompress, zstandard.ZstdError
    return None, zlib.error
