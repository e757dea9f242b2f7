"""What several processes divide among themselves: each works on its share of the images, and all get what they need.

Rows are numpy arrays, one for each item, [n,...]. Where there is one process, its share is the whole.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from pushpull_jax.hosts import agreed, exchange

Made = TypeVar("Made")
_ROWS = 64  # gathered at a time: 47 MB of [16,16,720], of each process, on each device


def share(items: Any) -> Any:
    """The slice of some items that is this process's to work on; those of all, one after another, are all items."""
    start, end = (len(items) * (jax.process_index() + i) // jax.process_count() for i in (0, 1))
    return items[start:end]


def shared_out(
    work: Callable[[Sequence[Any], dict[str, str]], Made], items: Sequence[Any], dropped: dict[str, str]
) -> Made:
    """What this process makes of its share of some items, when all have done theirs.

    Args:
        work: (items, dropped) -> what it makes of those items that it does not enter in dropped.
        items: the same in all processes.
        dropped: receives what `work` enters, of all processes.

    Raises:
        InputError: in all processes, what `work` raises in any of them.
    """
    left_out: dict[str, str] = {}
    with agreed():
        made = work(share(items), left_out)
    for reasons in exchange(left_out):
        dropped |= reasons
    return made


def gathered(rows: np.ndarray) -> np.ndarray:
    """Rows [n,...] of all processes, one process after another; one may have more than another, or none."""
    counts = exchange(len(rows))
    if len(counts) == 1:
        return rows
    # As bytes: JAX would make float32 of float64.
    flat = np.ascontiguousarray(rows).reshape(len(rows), math.prod(rows.shape[1:])).view(np.uint8)
    parts: list[list[np.ndarray]] = [[] for _ in counts]
    size = min(_ROWS, max(counts))
    for start in range(0, max(counts), _ROWS):
        block = flat[start : start + size]
        block = np.pad(block, ((0, size - len(block)), (0, 0)))
        for part, whole, count in zip(parts, multihost_utils.process_allgather(block), counts, strict=True):
            part.append(whole[: max(count - start, 0)])
    whole = np.concatenate([block for part in parts for block in part] or [flat])
    return whole.view(rows.dtype).reshape(-1, *rows.shape[1:])


def summed(tree: Any) -> Any:
    """Sums over all processes of each leaf of a tree, the same bits in all."""
    return jax.tree.map(lambda leaf: gathered(np.asarray(leaf)[None]).sum(0), tree)
