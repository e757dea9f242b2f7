"""The devices that a program runs on, as a mesh of two axes: "grid", members of an ablation, and "data", of a batch.

Arrays are placed by the leading axis that is spread; what every device needs is replicated.
"""

import contextlib
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pushpull_jax.errors import InputError

AXES = ("grid", "data")


def divide_cpu(count: int) -> None:
    """Let the CPU be `count` devices, unless the user has said how many, or jax has begun to compute."""
    is_told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_num_cpu_devices == -1 and not is_told:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def device_mesh(*, grid: int = 1, data: int = 1) -> Mesh:
    """The first devices as a mesh.

    Args:
        grid: devices along "grid"; -1 takes all that "data" leaves.
        data: devices along "data"; likewise.

    Raises:
        InputError: there are fewer devices, or both are -1; or not all devices of several processes are taken.
    """
    count = jax.device_count()
    if grid == data == -1:
        raise InputError("mesh.grid and mesh.data: only one of them can be -1, all devices")
    shape = (count // data if grid == -1 else grid, count // grid if data == -1 else data)
    if min(shape) < 1 or shape[0] * shape[1] > count:
        raise InputError(f"mesh.grid {grid} and mesh.data {data}: there are {count} devices")
    if shape[0] * shape[1] < count and jax.process_count() > 1:
        raise InputError(
            f"mesh.data {data}: there are {count} devices of {jax.process_count()} processes, and all must be used: "
            "mesh.data -1"
        )
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 2, devices=devices)


def computed_on() -> dict[str, Any]:
    """What the bits of a result depend on besides config and versions: devices, CPUs, and options of XLA."""
    devices = jax.devices()
    flags = os.environ.get("XLA_FLAGS", "").split()
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "xla_flags": " ".join(flag for flag in flags if "/" not in flag),  # a path is the user's own affair
    }


def spread(tree: Any, mesh: Mesh, axis: str) -> Any:
    """Leaves on the devices of a mesh axis, by their leading axis, which that divides."""
    return jax.device_put(tree, NamedSharding(mesh, P(axis)))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same on every device, of all processes; each has it."""
    sharding = NamedSharding(mesh, P())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf)))
        # device_put would gather what all processes have, and compare it.
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), np.shape(leaf))

    return jax.tree.map(place, tree)


def replicate_memory(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """The same on every device of one process; devices of a CPU read the same memory.

    That may be the caller's own, which must not change while it is used.
    """
    if mesh.devices.flat[0].platform == "cpu":
        # What jax has taken or allocated is aligned as it wants it, and then not copied once more for each device.
        array = np.asarray(jax.device_put(array, mesh.devices.flat[0]))
    return replicate(array, mesh)


def on_one_device(tree: Any) -> Any:
    """What is replicated, on one device of this process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
