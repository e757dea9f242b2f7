"""From features to scores: the score map of ADTR, its resizing to the image, its smoothing, and the image score.

Features are [*B, h, w, C]; maps [*B, h, w] on the feature grid or [*B, H, W] on the image, where *B is any leading
axes, none included. Scores are unclamped distances, higher is more anomalous. Everything is computed in float32,
whatever comes in. Resizing and smoothing are two small constant matrices and an einsum each: separable, exact at the
edges, differentiable, and exportable with a symbolic batch.
"""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pushpull_jax.shapes import check_shapes

# Side of the averaging window of the image score: UniAD's, for images of 256 px.
WINDOW = 16
# Where the Gaussian is cut off, in sigmas: the default of scipy.ndimage.gaussian_filter.
TRUNCATE = 4.0


def score_map(features: ArrayLike, reconstruction: ArrayLike) -> jax.Array:
    """Anomaly score of every cell of the grid: s(u) = ||d(:,u)||_2 with d = features - reconstruction.

    The gradient at d = 0, where the norm has none, is 0.

    Args:
        features: [*B, h, w, C], extracted; |features| <= 1e6.
        reconstruction: [*B, h, w, C], reconstructed.

    Returns:
        s, [*B, h, w] float32, 0 or more.

    Raises:
        ValueError: the two shapes differ; nothing is broadcast.
    """
    check_shapes("*B h w C", features=features, reconstruction=reconstruction)
    difference = jnp.asarray(features, jnp.float32) - jnp.asarray(reconstruction, jnp.float32)
    squared = jnp.sum(difference * difference, axis=-1)
    # The root must not see a 0: its infinite derivative would make the gradient NaN even where it is not selected.
    is_zero = squared == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squared)))


def interpolation_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Linear interpolation of one axis with align_corners: resized = matrix @ values.

    Output i lies at i (n_in - 1) / (n_out - 1) of the input, so that first falls on first and last on last; a single
    output takes the first input, as in PyTorch. An input of length 1 is broadcast. There is no antialiasing: fewer
    outputs than inputs only sample.

    Args:
        n_in: length of the axis, at least 1.
        n_out: length wanted, at least 1.

    Returns:
        [n_out, n_in] float32; rows are 0 or more and sum to 1.

    Raises:
        ValueError: a length is below 1.
    """
    n_in, n_out = operator.index(n_in), operator.index(n_out)
    if n_in < 1 or n_out < 1:
        raise ValueError(f"expected lengths of at least 1, got n_in = {n_in}, n_out = {n_out}")
    position = np.arange(n_out) * (n_in - 1) / max(n_out - 1, 1)
    lower = np.minimum(np.floor(position).astype(int), max(n_in - 2, 0))
    weight = position - lower
    matrix = np.zeros((n_out, n_in))
    rows = np.arange(n_out)
    matrix[rows, lower] = 1 - weight
    matrix[rows, np.minimum(lower + 1, n_in - 1)] += weight
    return matrix.astype(np.float32)


def upsample(maps: ArrayLike, size: int | tuple[int, int]) -> jax.Array:
    """Resize maps to the image, bilinear with align_corners (see `interpolation_matrix`).

    Args:
        maps: [*B, h, w].
        size: (H, W) in pixels, or the side of a square.

    Returns:
        [*B, H, W] float32.

    Raises:
        ValueError: maps has fewer than two axes, or size is below 1.
    """
    grid = check_shapes("*B h w", maps=maps)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return _along_axes(interpolation_matrix(grid["h"], height), interpolation_matrix(grid["w"], width), maps)


def smooth(maps: ArrayLike, *, sigma: float) -> jax.Array:
    """Smooth maps with a Gaussian, as scipy.ndimage.gaussian_filter(mode="nearest") does.

    The kernel exp(-o^2 / (2 sigma^2)) is cut off at 4 sigma and sums to 1; beyond an edge its pixels are repeated.

    Args:
        maps: [*B, H, W].
        sigma: standard deviation in pixels of `maps`, 0 or more; 0 leaves the maps as they are.

    Returns:
        [*B, H, W] float32.

    Raises:
        ValueError: maps has fewer than two axes, or sigma is negative or not finite.
    """
    size = check_shapes("*B H W", maps=maps)
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"expected a finite sigma of 0 or more, got sigma = {sigma}")
    if sigma == 0:
        return jnp.asarray(maps, jnp.float32)
    return _along_axes(_gaussian_matrix(size["H"], sigma), _gaussian_matrix(size["W"], sigma), maps)


def image_score(maps: ArrayLike, *, window: int = WINDOW) -> jax.Array:
    """Score of an image: the maximum of its average-pooled map (window x window, stride 1, no padding).

    The default window is for maps of 256x256 pixels. Scale it with the image: max(1, round(16 * side / 256)).

    Args:
        maps: [*B, H, W], upsampled to the image.
        window: side of the window in pixels, 1 to min(H, W).

    Returns:
        [*B] float32.

    Raises:
        ValueError: maps has fewer than two axes, or the window does not fit into it.
    """
    size = check_shapes("*B H W", maps=maps)
    window = operator.index(window)
    if not 1 <= window <= min(size["H"], size["W"]):
        raise ValueError(
            f"expected a window in 1..{min(size['H'], size['W'])}, to fit into maps of {size['H']}x{size['W']}, "
            f"got window = {window}"
        )
    # Rows, then columns: 2 window additions a pixel instead of window^2. Cumulative sums would need two, but cancel.
    rows = _window_sums(jnp.asarray(maps, jnp.float32), window, axis=-2)
    return jnp.max(_window_sums(rows, window, axis=-1), axis=(-2, -1)) / window**2


def _along_axes(rows: np.ndarray, columns: np.ndarray, maps: ArrayLike) -> jax.Array:
    """Apply a matrix to the rows' axis and one to the columns' axis of maps [*B, h, w]."""
    # HIGHEST: the default of GPU and TPU would multiply in TF32 or bfloat16.
    precision = jax.lax.Precision.HIGHEST
    maps = jnp.asarray(maps, jnp.float32)
    maps = jnp.einsum("Hh,...hw->...Hw", rows, maps, precision=precision)
    return jnp.einsum("...Hw,Ww->...HW", maps, columns, precision=precision)


def _gaussian_matrix(n: int, sigma: float) -> np.ndarray:
    """The Gaussian filter of an axis of length n as a banded matrix, [n, n] float32."""
    radius = int(TRUNCATE * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    rows = np.arange(n)[:, None]
    matrix = np.zeros((n, n))
    # add.at, because the offsets beyond an edge all fall on its last pixel.
    np.add.at(matrix, (rows, np.clip(rows + offsets, 0, n - 1)), kernel / kernel.sum())
    return matrix.astype(np.float32)


def _window_sums(maps: jax.Array, window: int, *, axis: int) -> jax.Array:
    """Sum over every run of `window` values along an axis."""
    dimensions = [1] * maps.ndim
    dimensions[axis] = window
    return jax.lax.reduce_window(maps, 0.0, jax.lax.add, dimensions, [1] * maps.ndim, "VALID")
