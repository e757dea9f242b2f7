"""Free memory, in bytes: of an accelerator by its own account, of a CPU as Linux tells it."""

import jax


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
