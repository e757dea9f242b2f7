"""What is usual of a reconstruction error on normal images, and errors in units of it (Mahalanobis distances).

A residual is a feature minus its reconstruction. Some of its directions vary much on normal images, and say little; a
direction that hardly varies says a lot. Whitening divides each by its own deviation. Statistics are fitted on the host
in float64 from sums that are gathered batch by batch; applying them is one matrix product, in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pushpull_jax.shapes import check_shapes, split_channels

# Added to the covariance, as a share of each channel's own variance: ours. The figures hardly depend on it from 0.003
# to 0.1 (docs/experiments.md); it bounds how far rounding, or fewer samples than channels, can blow up a direction.
RIDGE = 0.03


class Whitening(NamedTuple):
    """An affine map of residuals, (residual - mean) @ matrix, after which normal ones have about unit variance.

    Attributes:
        mean: [C] float32.
        matrix: [C,C] float32.
    """

    mean: jax.Array
    matrix: jax.Array

    def distance(self, residuals: jax.Array) -> jax.Array:
        """Mahalanobis distance over the root of C, [*B,C] -> [*B] float32: 1 where a residual is as large as usual."""
        # HIGHEST: the default of GPU and TPU would multiply in TF32 or bfloat16.
        centred = jnp.asarray(residuals, jnp.float32) - jnp.reshape(self.mean, (1,) * (residuals.ndim - 1) + (-1,))
        whitened = jnp.matmul(centred, self.matrix, precision=jax.lax.Precision.HIGHEST)
        return jnp.sqrt(jnp.mean(whitened * whitened, axis=-1))


class Moments(NamedTuple):
    """Count, sum [C] and sum of outer products [C,C] of residuals; they add up over images."""

    count: jax.Array
    total: jax.Array
    outer: jax.Array


def moments(residuals: ArrayLike) -> Moments:
    """Moments of each image over the cells of its residuals, [*B,h,w,C] -> [*B], [*B,C] and [*B,C,C] float32."""
    size = check_shapes("*B h w C", residuals=residuals)
    residuals = jnp.asarray(residuals, jnp.float32)
    outer = jnp.einsum("...hwc,...hwd->...cd", residuals, residuals, precision=jax.lax.Precision.HIGHEST)
    return Moments(jnp.full(size["*B"], size["h"] * size["w"], jnp.float32), residuals.sum((-3, -2)), outer)


def fit_whitening(sums: Moments, *, ridge: float = RIDGE) -> Whitening:
    """The whitening of residuals with these moments.

    The covariance S becomes S + ridge diag(S), which is the same whatever the units of a channel; the matrix is an
    inverse root of it. A channel that never errs counts as if it erred by a millionth of what the worst one does: any
    error of it is then enormous, not nan.

    Args:
        sums: of at least one residual.
        ridge: above 0.

    Raises:
        ValueError: there is no residual, the ridge is not above 0, or a moment is not finite.
    """
    if sums.count < 1 or not ridge > 0:
        raise ValueError(f"expected at least one residual and a ridge above 0, got {sums.count} and {ridge}")
    if not (np.isfinite(sums.total).all() and np.isfinite(sums.outer).all()):
        raise ValueError("expected finite moments of the residuals")
    mean = np.asarray(sums.total, np.float64) / sums.count
    covariance = np.asarray(sums.outer, np.float64) / sums.count - np.outer(mean, mean)
    variance = np.maximum(np.diag(covariance), 0.0)
    # What cancellation leaves of a constant is no variance.
    variance = np.where(variance > 1e-12 * mean**2, variance, 0.0)
    deviation = np.maximum(np.sqrt(variance), 1e-6 * (np.sqrt(variance.max()) or 1.0))
    correlation = covariance / np.outer(deviation, deviation)
    correlation[variance == 0, :] = correlation[:, variance == 0] = 0.0
    np.fill_diagonal(correlation, 1.0 + ridge)
    # Cancellation can leave a direction slightly below 0: such a one is as small as the ridge.
    values, vectors = np.linalg.eigh(correlation)
    matrix = vectors / np.sqrt(np.maximum(values, ridge)) / deviation[:, None]
    return Whitening(np.float32(mean), np.float32(matrix))


def whitened_score_map(
    features: ArrayLike, reconstruction: ArrayLike, whitenings: tuple[Whitening, ...], *, weights: tuple[float, ...]
) -> jax.Array:
    """Weighted geometric mean over stages of the distance of the stage's residual, on the feature grid.

    s(u) = prod_k m_k(u)^(w_k / sum w),  m_k = distance of the channels of stage k

    A cell must be unusual in every stage to score high: fine stages keep a coarse one from smearing the map, and a
    stage that varies on normal images does not drown the others.

    Args:
        features: [*B,h,w,C], extracted.
        reconstruction: [*B,h,w,C], reconstructed.
        whitenings: one a stage; their channels, in order, are the C channels.
        weights: one a stage, 0 or more, not all 0.

    Returns:
        [*B,h,w] float32, 0 or more, about 1 on normal images.

    Raises:
        ValueError: the shapes differ, or do not fit the whitenings.
    """
    channels = check_shapes("*B h w C", features=features, reconstruction=reconstruction)["C"]
    widths = [len(whitening.mean) for whitening in whitenings]
    if sum(widths) != channels or len(weights) != len(widths):
        raise ValueError(
            f"expected whitenings of {channels} channels in all and a weight for each, got {widths} and {weights}"
        )
    residuals = jnp.asarray(features, jnp.float32) - jnp.asarray(reconstruction, jnp.float32)
    log = 0.0
    for whitening, part, weight in zip(whitenings, split_channels(residuals, widths), weights, strict=True):
        # A perfect reconstruction scores as close to 0 as float32 gets without a logarithm of 0.
        distance = jnp.maximum(whitening.distance(part), jnp.finfo(jnp.float32).tiny)
        log = log + weight / sum(weights) * jnp.log(distance)
    return jnp.exp(log)


def block_means(residuals: ArrayLike, blocks: int) -> jax.Array:
    """Means over blocks x blocks equal parts of the grid, [*B,h,w,C] -> [*B,blocks,blocks,C] float32."""
    size = check_shapes("*B h w C", residuals=residuals)
    if size["h"] % blocks or size["w"] % blocks:
        raise ValueError(f"expected a number of blocks that divides a grid of {size['h']}x{size['w']}, got {blocks}")
    shape = (blocks, size["h"] // blocks, blocks, size["w"] // blocks, size["C"])
    return jnp.asarray(residuals, jnp.float32).reshape(*size["*B"], *shape).mean((-4, -2))


def largest_block_distance(
    features: ArrayLike, reconstruction: ArrayLike, whitening: Whitening, *, blocks: int
) -> jax.Array:
    """Largest distance of the residual's mean over one of blocks x blocks parts of the image, all channels together.

    What is missing or in another place shifts the mean of a large part a little, in a direction that is not usual; no
    cell of the map sees it.

    Args:
        features: [*B,h,w,C], extracted.
        reconstruction: [*B,h,w,C], reconstructed.
        whitening: of such means.
        blocks: parts a side; 1 is the whole image.

    Returns:
        [*B] float32.
    """
    check_shapes("*B h w C", features=features, reconstruction=reconstruction)
    residuals = jnp.asarray(features, jnp.float32) - jnp.asarray(reconstruction, jnp.float32)
    return whitening.distance(block_means(residuals, blocks)).max((-2, -1))
