"""What a run has of its machine and what it takes: devices and memory, in bytes, and as single lines for its log.

An accelerator tells of its memory itself; that of a CPU is the machine's, as Linux tells it, or less where a container
or a cluster's job may not have all of it.
"""

import functools
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from pushpull_jax.progress import say


def devices_line(mesh: Mesh) -> str:
    """The devices that a run computes on, how they are arranged, and the memory that they have."""
    axes = " x ".join(f"{axis} {count}" for axis, count in mesh.shape.items())
    here = jax.local_devices()[0]
    limit = (here.memory_stats() or {}).get("bytes_limit")
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = f"{_size(limit)} each" if limit else f"{_size(machine)} of the machine, {os.cpu_count()} processors"
    return f"devices: {mesh.size} of {jax.device_count()} {here.device_kind}, {axes}; memory: {memory}"


def saying_memory(program: Callable, *, what: str) -> Callable:
    """A compiled function that says after its first call what memory it took.

    Args:
        program: of `jax.jit`; its first result takes the place of its first argument, which may be donated.
        what: it is called.
    """
    is_said = False

    @functools.wraps(program)
    def call(first: Any, *rest: Any) -> Any:
        nonlocal is_said
        result = program(first, *rest)
        if not is_said:
            is_said = True
            jax.block_until_ready(result)
            # For the same shapes jit finds what it has compiled.
            say(_memory_line(program.lower(result[0], *rest).compile(), what))
        return result

    return call


def free_memory(device: jax.Device, *, devices: int | None = None) -> tuple[int, str]:
    """Bytes that are free for a device, and whose they are.

    Args:
        device: of this process.
        devices: so many of a CPU share the machine's memory; None: all that it is divided into.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0), "the device's free memory"
    return free_host_memory() // (devices or len(jax.local_devices())), "the machine's free memory, by device"


def free_host_memory(*, root: Path = Path("/")) -> int:
    """Bytes that a program on this machine may take without swapping, or being killed for it.

    Args:
        root: of the file system that tells of them.
    """
    machine = root / "proc/meminfo"
    if not machine.is_file():  # macOS tells what there is, not what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([1024 * _numbers(machine)["MemAvailable"], *_free_in_groups(root)])


def _free_in_groups(root: Path) -> Iterator[int]:
    """Bytes that are free in each control group of this process that has a limit, those around its own included."""
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:  # version 2 names no controllers; no other group has such files
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        # Within a container the path may be that of the machine, of which only the base is there.
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base) and (folder / names[0]).is_file():
                yield from _free_in_group(folder, *names)


def _free_in_group(folder: Path, limit: str, used: str, inactive: str) -> Iterator[int]:
    most = (folder / limit).read_text().strip()
    if most != "max":
        # Files that the kernel keeps in memory count as used, but it gives up those that were not read lately.
        kept = _numbers(folder / "memory.stat").get(inactive, 0)
        yield max(int(most) - int((folder / used).read_text()) + kept, 0)


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file of the kernel that has a name and a number on each line."""
    lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}


def needed_memory(compiled: Any) -> int:
    """Bytes that a compiled program needs on a device besides its arguments, by XLA's account."""
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def _memory_line(compiled: Any, what: str) -> str:
    given = compiled.memory_analysis().argument_size_in_bytes
    line = f"memory: {what} needs {_size(needed_memory(compiled))} a device, and {_size(given)} for what it is given"
    most = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if most:
        line += f"; the most that a device had in use was {_size(most)}"
    # The kernel counts kilobytes, that of macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{line}; the process had {_size(peak)} at most"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB"
