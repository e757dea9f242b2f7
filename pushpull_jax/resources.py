"""What a run has of its machine and what it takes: devices and memory, in bytes, and as single lines for its log.

An accelerator tells of its memory itself; that of a CPU is the machine's, as Linux tells it.
"""

import functools
import os
import resource
import sys
from collections.abc import Callable
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


def free_memory(device: jax.Device) -> tuple[int, str]:
    """Bytes that are free for a device, and whose they are; fake devices of a CPU share the machine's."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0), "the device's free memory"
    return free_host_memory() // len(jax.local_devices()), "the machine's free memory, by device"


def free_host_memory() -> int:
    """Bytes that a program on this machine may take without swapping."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


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
