"""One compiled program for any number of examples: batches of one size, the last one padded and cut again. Host."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Images, or their features, that a frozen network sees at a time; fewer are padded, so that one program serves all.
BATCH_SIZE = 8


def padded(function: Callable[..., Any], *arrays: np.ndarray, size: int) -> Any:
    """Apply a function of batches to one batch of at most `size` examples, padded with zeros to exactly `size`.

    Args:
        function: arrays with `size` leading -> a tree of arrays with `size` leading.
        *arrays: what it takes, with the same number of examples, 1 to `size`, leading.
        size: examples that the function is compiled for.

    Returns:
        The tree, on the host, of the examples that were given.
    """
    count = len(arrays[0])
    filled = [np.pad(array, ((0, size - count), *((0, 0),) * (array.ndim - 1))) for array in arrays]
    return jax.tree.map(lambda leaf: leaf[:count], jax.device_get(function(*filled)))


def in_batches(function: Callable[..., Any], *arrays: np.ndarray, size: int) -> Any:
    """Apply a function of batches to any number of examples, at least one, `size` at a time; see `padded`."""
    starts = range(0, len(arrays[0]), size)
    parts = [padded(function, *(array[start : start + size] for array in arrays), size=size) for start in starts]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
