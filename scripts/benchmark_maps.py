"""Masks and maps as the rows on metrics of scripts/benchmark.py want them: noise, higher on elliptic defects."""

from collections.abc import Iterator

import numpy as np


def drawn_maps(count: int, side: int, *, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Masks and maps, [side,side] bool and float32: three of four have an elliptic defect, which scores higher."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    for i in range(count):
        y, x, height, width = rng.uniform((0.2, 0.2, 0.02, 0.02), (0.8, 0.8, 0.1, 0.1)) * side
        mask = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 < 1
        mask &= i % 4 != 0
        yield mask, rng.standard_normal((side, side), np.float32) + 2 * mask
