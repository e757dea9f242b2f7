"""Checkpoints of the training state by orbax: written asynchronously and atomically, the newest few kept.

Each carries a digest of its leaves, since orbax restores a flipped bit without a word. One that is damaged is passed
over for the one before it, and named.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils

from pushpull_jax.bucket import absolute, is_bucket
from pushpull_jax.errors import InputError
from pushpull_jax.progress import say
from pushpull_jax.steps import State

_DIGEST = "digest"
_CACHE_BYTES = 2**24


class Checkpoints:
    """The checkpoints of one run, by step. A context manager: leaving it waits for what is being written.

    Of several processes all save, and one writes, since all have the same state.
    """

    def __init__(self, folder: Path, *, keep: int | None = None, minutes: float = 0.0, create: bool = True):
        # What a killed process was writing goes; whoever only reads (create=False) leaves it, it may be in the making.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create, cleanup_tmp_directories=create)
        if not create:  # each process reads for itself, and waits for no other
            me = jax.process_index()
            alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
            options = dataclasses.replace(options, multiprocessing_options=alone)
        # orbax refuses relative paths, and leaves debris when it does.
        self._manager = _Manager(absolute(folder), options=options)
        self._folder, self._stack = folder, contextlib.ExitStack()
        self._seconds, self._saved_at = 60 * minutes, time.monotonic()

    def __enter__(self) -> "Checkpoints":
        self._stack.enter_context(_failing_quietly())
        self._stack.enter_context(contextlib.closing(self))
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def close(self) -> None:
        """Wait for what is being written.

        Raises:
            OSError: it could not be written.
        """
        with _writing(self._folder):
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def is_due(self) -> bool:
        """Whether `minutes` have passed since the last save; of several processes that of the first, asked by all."""
        if not self._seconds:
            return False
        is_due = time.monotonic() - self._saved_at >= self._seconds
        if jax.process_count() > 1:
            is_due = bool(multihost_utils.broadcast_one_to_all(np.bool_(is_due)))
        return is_due

    def save(self, state: State, *, step: int | None = None) -> None:
        """Start writing a state; it is copied first, for the next step takes its memory.

        Args:
            state: of one run, or of several, stacked.
            step: that they stand for; by default the state's own.

        Raises:
            OSError: this write or the one before it failed, as where the disk is full.
        """
        copied = jax.tree.map(np.array, jax.device_get(state))
        tree = copied._asdict() | {_DIGEST: _digest(copied)}
        self._saved_at = time.monotonic()
        with _writing(self._folder):
            self._manager.save(int(copied.step) if step is None else step, args=ocp.args.StandardSave(tree))

    def check(self) -> None:
        """Raise what a write in the background has met, unless it still goes on: OSError where the disk is full."""
        # orbax's own check_for_errors tells nothing: its finalising thread has taken the error by then.
        if not self._manager.is_saving_in_progress():
            with _writing(self._folder):
                self._manager.wait_until_finished()

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints newer than a step, which a run that goes on from there writes again."""
        for newer in self._manager.all_steps():
            if newer > step:
                self._manager.delete(newer)

    def restore(self, like: State, *, step: int | None = None) -> State:
        """The newest state that is whole, or that of one step.

        Args:
            like: the tree with a shape and dtype at every leaf.
            step: the only one that will do.

        Raises:
            InputError: there is no checkpoint, or none can be restored into this tree; what is said is of the newest.
        """
        steps = [one for one in sorted(self._manager.all_steps(), reverse=True) if step in (None, one)]
        if not steps:
            raise InputError(f"{self._folder}: there is no checkpoint{'' if step is None else f' of step {step}'}")
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
        newest = None
        for one in steps:
            try:
                state = self._restore(one, abstract)
            except InputError as error:
                newest = newest or error
            else:
                if newest:
                    say(f"{newest}; that of step {one} is used instead")
                return state
        raise newest

    def _restore(self, step: int, abstract: State) -> State:
        tree = abstract._asdict() | {_DIGEST: jax.ShapeDtypeStruct((32,), np.uint8)}
        path = self._folder / str(step)
        try:
            _read_all(absolute(path))
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(tree))
        except Exception as error:  # whatever a damaged file brings about in orbax, tensorstore or zstd
            raise InputError(f"{path}: cannot be restored: {_reason(error)}") from error
        self._check_shapes(path, restored, tree)
        expected = bytes(np.asarray(restored.pop(_DIGEST)))
        state = State(**restored)
        if bytes(_digest(state)) != expected:
            raise InputError(f"{path}: is damaged: its arrays are not those that were saved")
        return state

    def _check_shapes(self, path: Path, restored: dict[str, Any], like: dict[str, Any]) -> None:
        """orbax compares names only, and returns the arrays as they were saved."""
        others = []
        for (name, leaf), to in zip(jax.tree.leaves_with_path(restored), jax.tree.leaves(like), strict=True):
            if leaf.shape != to.shape:
                shown = jax.tree_util.keystr(name, simple=True, separator="/")
                others.append(f"{shown} (expected {list(to.shape)}, got {list(leaf.shape)})")
        if others:
            raise InputError(f"{path}: arrays of another shape: {', '.join(sorted(others))}")


class _Manager(ocp.CheckpointManager):
    """Of orbax, which would ask whether to stop by the number of the step; `preemption` asks, by that of the chunk."""

    def reached_preemption(self, step: int) -> bool:
        return False


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Whatever fails in orbax and tensorstore, which raise a ValueError for a full disk, becomes an OSError."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{folder}: checkpoints cannot be written: {_reason(error)}") from error


@contextlib.contextmanager
def _failing_quietly() -> Iterator[None]:
    """What is raised is not told on stderr too, in a traceback for each of the threads and arrays of a failed write."""
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def is_other(record: logging.LogRecord) -> bool:
        is_orbax = "orbax" in Path(record.pathname).parts or "never retrieved" in record.getMessage()
        return record.levelno < logging.ERROR or not is_orbax

    for logger in loggers:
        logger.addFilter(is_other)
    sys.unraisablehook = report
    try:
        yield
    finally:
        if not isinstance(sys.exception(), OSError):  # after one the writes of other arrays may fail even later
            sys.unraisablehook = hook
            for logger in loggers:
                logger.removeFilter(is_other)


def _read_all(path: Path) -> None:
    """Read the arrays of a checkpoint, one after another.

    orbax reads all of them at once; where one cannot be read, asyncio tells of each of the others, at whatever moment.
    """
    base = f"{path}/default/"
    store = {"driver": "ocdbt", "base": base if is_bucket(path) else {"driver": "file", "path": base}}
    # What all arrays are found by is read once, not over the network for each of them.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    for key in tensorstore.KvStore.open(store, context=context).result().list().result():
        if key.endswith(b"/.zarray"):
            array = {"driver": "zarr", "kvstore": store | {"path": key.decode().removesuffix(".zarray")}}
            array |= {"recheck_cached_data": False, "recheck_cached_metadata": False}
            tensorstore.open(array, context=context).result().read().result()


def _reason(error: Exception) -> str:
    """What went wrong, in a line: in the words of the operating system where tensorstore tells its number."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else " ".join(str(error).split())[:300]


def _digest(state: State) -> np.ndarray:
    """SHA-256 of the leaves of a state, in order, [32] uint8."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.ascontiguousarray(leaf).data)
    return np.frombuffer(digest.digest(), np.uint8)
