"""The nearest-neighbour baseline as a "reconstruction": [B,h,w,C] -> [B,h,w,C] float32, every cell by a stored one.

The stored cells are drawn from the normal training images by `sample_cells`; nothing is trained. Each cell is replaced
by the nearest of them in L2, so that `score_map(features, reconstruction)` is the distance to it, and whatever scores a
reconstruction scores this one. Not of the paper: the yardstick of the memory-bank detectors (SPADE, PatchCore).
"""

import itertools

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


def sample_cells(features: ArrayLike, *, size: int, seed: int) -> np.ndarray:
    """Cells to store: a uniform draw without replacement from all cells of the training images, on the host.

    Args:
        features: [N, h, w, C], of normal images.
        size: number of cells, at least 1.
        seed: of the draw; the cells are a function of (features, size, seed).

    Returns:
        [size, C] float32, in the order of `features`.

    Raises:
        InputError: there are fewer cells than `size`; repeating some would hide how few there are.
        ValueError: features has another number of axes, or size is below 1.
    """
    shape = check_shapes("N h w C", features=features)
    count = shape["N"] * shape["h"] * shape["w"]
    if size < 1:
        raise ValueError(f"expected a size of at least 1, got {size}")
    if size > count:
        raise InputError(
            f"{size} cells cannot be drawn from {shape['N']} training images of {shape['h']}x{shape['w']} cells, "
            f"which have {count}; store {count} at most"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(count, size, replace=False))
    return np.asarray(np.asarray(features).reshape(count, shape["C"])[chosen], np.float32)


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
