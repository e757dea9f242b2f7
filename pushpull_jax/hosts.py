"""Several processes that train together, each with devices of its own: how they meet, and what they agree on.

jax.distributed connects them. All run the same program on the same data, and hold the same features and state; the
first one writes the files of the run. What one of them finds wrong stops all with the same message, for in the next
collective operation the others would wait for it.
"""

import atexit
import contextlib
import itertools
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from pushpull_jax import config as settings
from pushpull_jax.bucket import faults_said
from pushpull_jax.errors import InputError
from pushpull_jax.preemption import Preempted

# How long processes wait for one that has more to do, the first one which evaluates for instance. Whether they live is
# another question: they are heard of all the time.
_PATIENCE_SECONDS = 7 * 24 * 3600
# Network file systems keep what they know of a folder for so long, 60 s by default (man 5 nfs, acdirmax).
_VISIBLE_SECONDS = 90.0

_exchanges = itertools.count()  # all processes make the same ones


class _Agreed(InputError):
    """What all processes know of already."""


def process_count(hosts: settings.Hosts) -> int:
    """Processes that are to train together: as given, or as the environment tells; 1 where it tells nothing.

    Raises:
        InputError: the environment is that of a cluster and cannot tell.
    """
    if hosts.processes:
        return hosts.processes
    # JAX's own list of clusters is not public, and `jax.distributed.initialize` would connect a process to itself.
    from jax._src.clusters import ClusterEnv

    try:
        found = (one for one in ClusterEnv._cluster_types if not one.opt_in_only_method and one.is_env_present())
        cluster = next(found, None)
        return 1 if cluster is None else cluster.get_process_count()
    except Exception as error:  # whatever the interface of a cluster raises
        raise InputError(f"hosts.processes: the environment does not tell how many: {error!r}; give it") from error


@contextlib.contextmanager
def connected(hosts: settings.Hosts) -> Iterator[None]:
    """While it lasts this process is connected to the others; nothing is done where there are none, or it is already.

    To be entered before anything is computed, once. It is left when all processes have left it.

    Raises:
        InputError: the processes do not find each other.
    """
    if jax.distributed.is_initialized() or process_count(hosts) == 1:
        yield
        return
    _connect(hosts)
    try:
        yield
    except (InputError, Preempted):  # in all processes, or in the first one when the others are done
        jax.distributed.shutdown()
        raise
    except BaseException:
        # At its end JAX would wait for the others, which wait for this one; that it is gone they learn at once.
        atexit.register(_leave)
        raise
    jax.distributed.shutdown()


def _connect(hosts: settings.Hosts) -> None:
    given = {}
    if hosts.coordinator:
        given = {
            "coordinator_address": hosts.coordinator,
            "num_processes": hosts.processes,
            "process_id": hosts.process,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            **given,
            heartbeat_timeout_seconds=hosts.heartbeat_timeout_seconds,
            shutdown_timeout_seconds=_PATIENCE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        where = hosts.coordinator or "found from the environment"
        raise InputError(f"hosts.coordinator {where}: the processes do not meet there: {error}") from error


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def is_first() -> bool:
    """Whether this is the process that writes the files of the run."""
    return jax.process_index() == 0


def exchange(value: Any = None, *, error: str = "") -> list[Any]:
    """What each process gives, of what JSON can hold, in the order of the processes.

    Args:
        value: of this process.
        error: what it has found wrong, instead.

    Raises:
        InputError: in all processes, what any of them has found wrong.
    """
    told = [[error, value]]
    if jax.process_count() > 1:
        told = [json.loads(text) for text in _exchanged(json.dumps([error, value]))]
    if errors := list(dict.fromkeys(error for error, _ in told if error)):
        raise _Agreed("\n".join(errors))
    return [value for _, value in told]


def _exchanged(text: str) -> list[str]:
    """The texts of all processes, by way of the service that connects them.

    A collective operation of devices would not wait for a process that has more to read: on CPUs the first one gives
    up after 30 s.
    """
    from jax._src.distributed import global_state  # JAX has no public name for its key-value store

    number = next(_exchanges)
    global_state.client.key_value_set(f"pushpull_jax/{number}/{jax.process_index()}", text)
    names = (f"pushpull_jax/{number}/{process}" for process in range(jax.process_count()))
    return [global_state.client.blocking_key_value_get(name, _PATIENCE_SECONDS * 1000) for name in names]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """An InputError of one process within it is raised in all, at the end of it or where they next exchange."""
    try:
        with faults_said():
            yield
    except InputError as error:
        if isinstance(error, _Agreed) or jax.process_count() == 1:
            raise
        exchange(error=str(error))
    exchange()


def check_same(what: str, values: dict[str, Any]) -> None:
    """Check that all processes were given the same.

    Raises:
        InputError: in all processes, which of the values differ.
    """
    told = exchange(values)
    for process, other in enumerate(told):
        if differing := [name for name in told[0] if told[0][name] != other[name]]:
            shown = ", ".join(f"{name} = {told[0][name]!r} in process 0, {other[name]!r} here" for name in differing)
            raise InputError(f"process {process} has {what} of its own: {shown}")


def check_shared(folder: Path) -> None:
    """Check that all processes see one folder: the first one makes it and writes a file, the others look for it.

    Raises:
        InputError: in all processes, which of them do not see it.
    """
    if jax.process_count() == 1:
        return
    part = folder / f".{exchange(uuid.uuid4().hex)[0]}.part"
    with agreed():
        if is_first():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                part.write_bytes(b"")
            except OSError as error:
                raise InputError(f"workdir {folder}: cannot be written to: {error.strerror or error}") from error
    seen = exchange(_appears(part))
    if is_first():
        part.unlink()
    if blind := [str(process) for process, sees in enumerate(seen) if not sees]:
        raise InputError(
            f"workdir {folder}: what process 0 writes there is not seen by {', '.join(blind)} of {len(seen)} "
            "processes; it must be on a file system that all share, or in a bucket"
        )


def _appears(path: Path) -> bool:
    until = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True
