"""The nearest-neighbour baseline as a "reconstruction": [B,h,w,C] -> [B,h,w,C] float32, every cell by a stored one.

The stored cells are drawn from the normal training images by `sample_cells`; nothing is trained. Each cell is replaced
by the nearest of them in L2, so that `score_map(features, reconstruction)` is the distance to it, and whatever scores a
reconstruction scores this one. Not of the paper: the yardstick of the memory-bank detectors (SPADE, PatchCore).
"""

import itertools
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pushpull_jax.errors import InputError
from pushpull_jax.shapes import check_shapes

# Cells whose distances are held at a time: 25 MB for 6,000 stored ones. Ours: from 256 to 2,048 it makes no difference
# on CPU (nine tenths of the speed of the matrix product alone), and a GPU wants the larger ones.
BLOCK = 1024


def sample_cells(batches: Iterable[ArrayLike], *, images: int, size: int, seed: int) -> np.ndarray:
    """Cells to store: a uniform draw without replacement from all cells of the training images, on the host.

    Args:
        batches: features [n,h,w,C] of normal images, batch after batch.
        images: how many there are in all.
        size: number of cells, at least 1.
        seed: of the draw; the cells are a function of (features, size, seed), however they are batched.

    Returns:
        [size, C] float32, in the order of the images.

    Raises:
        InputError: there are fewer cells than `size`; repeating some would hide how few there are.
        ValueError: features have another number of axes, or size is below 1.
    """
    if size < 1:
        raise ValueError(f"expected a size of at least 1, got {size}")
    chosen, cells, first = None, [], 0
    for batch in batches:
        shape = check_shapes("n h w C", features=batch)
        chosen = _draw(images, (shape["h"], shape["w"]), size, seed) if chosen is None else chosen
        flat = np.asarray(batch).reshape(-1, shape["C"])
        inside = chosen[(chosen >= first) & (chosen < first + len(flat))]
        cells.append(np.asarray(flat[inside - first], np.float32))
        first += len(flat)
    return np.concatenate(cells)


def _draw(images: int, grid: tuple[int, int], size: int, seed: int) -> np.ndarray:
    """Positions of the stored cells among those of all images, ascending."""
    count = images * grid[0] * grid[1]
    if size > count:
        raise InputError(
            f"{size} cells cannot be drawn from {images} training images of {grid[0]}x{grid[1]} cells, "
            f"which have {count}; store {count} at most"
        )
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False))


def nearest_indices(features: ArrayLike, cells: ArrayLike) -> jax.Array:
    """The nearest stored cell of every feature in L2: argmin_j ||x - c_j||^2 = argmin_j ||c_j||^2 / 2 - x . c_j.

    ||x||^2 is the same for all j and left out. Both sides are centred at the mean stored cell: it changes no distance,
    and keeps a common offset, large in raw features, from cancelling. The rounding that is left can only choose among
    cells whose squared distances agree to about 1e-7 ||x|| ||c_j||, centred; equal ones give the first.

    Args:
        features: [N, C].
        cells: [M, C].

    Returns:
        [N] int32, in 0..M-1.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_shapes("N C, M C", features=features, cells=cells)
    features, cells = jnp.asarray(features, jnp.float32), jnp.asarray(cells, jnp.float32)
    centre = jnp.mean(cells, axis=0, keepdims=True)
    cells = cells - centre
    # HIGHEST: the default of GPU and TPU would multiply in TF32 or bfloat16.
    products = jnp.matmul(features - centre, cells.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(cells * cells, axis=-1)[None] / 2 - products, axis=-1)


class NearestNeighbour(nn.Module):
    """Every cell replaced by the nearest stored one, [B,h,w,C] -> [B,h,w,C] float32.

    The stored cells are the parameter "cells" [size, C], from `sample_cells`; until they are set they are NaN, so that
    forgetting them shows. With `widths`, channels of each group in order, every group (a stage, say) finds its own
    nearest cell; empty: one group of all channels. `train` changes nothing, and no `dtype` is offered: float32 always,
    for bfloat16 would choose wrong neighbours. Memory is bounded by `block`, the cells that are compared at a time.
    """

    size: int = 6000
    widths: tuple[int, ...] = ()
    block: int = BLOCK

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
        channels = check_shapes("B h w C", features=features)["C"]
        cells = self.param("cells", nn.initializers.constant(jnp.nan), (self.size, channels), jnp.float32)
        widths = self.widths or (channels,)
        if sum(widths) != channels:
            raise ValueError(f"expected widths that sum to the {channels} channels, got {widths}")
        groups = [slice(*edges) for edges in itertools.pairwise(np.cumsum((0, *widths)).tolist())]

        def reconstruct(block: jax.Array) -> jax.Array:
            chosen = [cells[nearest_indices(block[:, group], cells[:, group]), group] for group in groups]
            return jnp.concatenate(chosen, axis=-1)

        flat = jnp.asarray(features, jnp.float32).reshape(-1, channels)
        count = flat.shape[0]
        # A symbolic number, as `jax.export` has them, cannot be compared.
        block = min(self.block, count) if isinstance(count, int) else self.block
        blocks = jnp.pad(flat, ((0, -count % block), (0, 0))).reshape(-1, block, channels)
        return jax.lax.map(reconstruct, blocks).reshape(-1, channels)[:count].reshape(features.shape)
