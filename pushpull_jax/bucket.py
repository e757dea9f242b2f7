"""Runs in a bucket of Google Cloud Storage, gs://BUCKET/FOLDER: paths by etils, requests by gcsfs.

An object appears whole or not at all, in the place of the one before it. None is appended to, and none is renamed.
orbax writes checkpoints there by itself, with a file that says when one is complete.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pushpull_jax.errors import InputError

_SCHEME = "gs://"
# Packages whose exceptions are of no kind of Python's own.
_CLIENTS = ("aiohttp", "gcsfs", "google")


def is_address(path: str | os.PathLike) -> bool:
    """Whether something names a place that is no folder, or did before `pathlib` took a slash from it."""
    return bool(re.match(r"\w\w+:/", os.fspath(path)))


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is one of `bucket_path`."""
    return os.fspath(path).startswith(_SCHEME)


def bucket_path(address: str | os.PathLike) -> Path:
    """The path of an address, which has the methods of a `pathlib.Path` that the files of a run are used with.

    Raises:
        InputError: it is another address, gcsfs is not installed, or the bucket cannot be reached.
    """
    address = os.fspath(address)
    if not re.match(_SCHEME + "[^/]+/[^/]", address):
        raise InputError(
            f"{address}: expected a folder, or gs://BUCKET/FOLDER as a string; any other bucket must be "
            "mounted as a folder (docs/hosts.md)"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{address}: needs gcsfs, of the extra `gcs`: pip install 'pushpull_jax[gcs]'")
    path_of = _client()
    path = path_of(address)
    try:
        is_there = path_of(_SCHEME + path.parts[2]).exists()
    except Exception as error:  # whatever the client raises: of the network, of credentials
        raise InputError(f"{address}: the bucket cannot be reached: {error}") from error
    if not is_there:
        raise InputError(f"{address}: there is no such bucket, or it may not be read")
    return path


@functools.cache
def _client() -> Callable[[str], Path]:
    """From addresses to paths."""
    import fsspec
    from etils.epath import Path, gpath

    # Where tensorflow is installed, etils takes its client, which speaks to Google's servers alone: no test could run.
    os.environ["EPATH_USE_TF"] = "false"
    gpath._is_tf_installed.cache_clear()  # it may have been asked already, and has no public name
    # What gcsfs calls experimental asks for the kind of a bucket whenever it does anything.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of what it raises too
    # What one process writes, the others see at once.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return Path


@contextlib.contextmanager
def faults_said() -> Iterator[None]:
    """What the clients of a bucket raise within it, of the network or of rights, is raised as an InputError."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        raise InputError(f"a bucket could not be used: {type(error).__name__}: {error}") from error


def write_object(path: Path, content: bytes) -> None:
    """Write an object; whoever reads it has the old one until the new one is complete.

    Raises:
        OSError: it could not be written.
    """
    try:
        path.write_bytes(content)
    except Exception as error:  # whatever the client raises
        raise OSError(f"{path}: cannot be written: {error}") from error


def absolute(path: Path) -> Path:
    """A path that does not depend on the folder that a process is in."""
    return path if is_bucket(path) else path.resolve()
