"""Frozen features: stage ends of a backbone on one grid, standardised a channel at a time.

Images are [B,S,S,3] in 0..255, features [B,h,w,C] float32. Resampling follows UniAD (bilinear, corners aligned, no
antialias), or averages over the cell. The backbone is frozen, so the features of a data set are computed once.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pushpull_jax.backbones import Backbone
from pushpull_jax.batching import padded
from pushpull_jax.conversion.tensors import Parameters
from pushpull_jax.data.images import resize_weights
from pushpull_jax.scoring import interpolation_matrix

Resample = Literal["bilinear", "area"]
# A channel that deviates less than this share of its mean's size is constant to float32; dividing by its own deviation
# would blow rounding up to the size of a feature.
CONSTANT = 1e-6


class FeatureSpec(NamedTuple):
    """What is extracted; hashable, so that it can be a static argument.

    Attributes:
        backbone: the frozen network and its conventions.
        stages: stage ends to concatenate, 1..5.
        grid: cells a side, h = w.
        resample: from a stage's own size to the grid.
    """

    backbone: Backbone
    stages: tuple[int, ...]
    grid: int
    resample: Resample

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage used; their sum is C."""
        return tuple(self.backbone.network.stage_widths[stage - 1] for stage in self.stages)


def extract(spec: FeatureSpec, parameters: Parameters, images: jax.Array) -> jax.Array:
    """Features of images: [B,S,S,3] in 0..255 -> [B,h,w,C] float32, stages concatenated in order, not standardised."""
    ends = spec.backbone.stage_ends(parameters, images, spec.stages)
    return jnp.concatenate([to_grid(end, spec.grid, spec.resample) for end in ends], axis=-1)


def to_grid(end: jax.Array, grid: int, resample: Resample) -> jax.Array:
    """Resample a stage end [B,i,j,c] to [B,grid,grid,c] float32."""
    if end.shape[1:3] == (grid, grid):
        return end.astype(jnp.float32)
    # The triangle filter of `resize_weights` is twice as wide as a cell; the mean over a cell is the sharper choice.
    matrix = {"bilinear": interpolation_matrix, "area": _cell_means}[resample]
    rows, columns = matrix(end.shape[1], grid), matrix(end.shape[2], grid)
    end = jnp.einsum("gi,bijc->bgjc", rows, end.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("gj,bijc->bigc", columns, end, precision=jax.lax.Precision.HIGHEST)


def _cell_means(n_in: int, n_out: int) -> np.ndarray:
    """[n_out, n_in]: means over the cells of an axis; bilinear between centres where cells are finer than the input."""
    if n_in < n_out:
        return resize_weights(n_in, n_out)
    pixels, cells = np.arange(n_in) / n_in, np.arange(n_out)[:, None] / n_out
    overlap = np.minimum(pixels + 1 / n_in, cells + 1 / n_out) - np.maximum(pixels, cells)
    return (np.maximum(overlap, 0) * n_out).astype(np.float32)


class Standardisation(NamedTuple):
    """Affine map of features, a channel at a time: (features - shift) * scale, both [C] float32."""

    shift: np.ndarray
    scale: np.ndarray

    def __call__(self, features: jax.Array) -> jax.Array:
        shift, scale = (part.reshape((1,) * (features.ndim - 1) + (-1,)) for part in self)
        return (features - shift) * scale


def raw(channels: int) -> Standardisation:
    """The standardisation that changes nothing: the paper's raw features."""
    return Standardisation(np.zeros(channels, np.float32), np.ones(channels, np.float32))


def fit_standardisation(
    moments: np.ndarray, widths: tuple[int, ...], *, stage_weights: tuple[float, ...] = ()
) -> tuple[Standardisation, list[int]]:
    """Mean and deviation of the training features, and the weight of each stage, as one affine map.

    Args:
        moments: of the training features, see `channel_moments`.
        widths: channels of each stage; they sum to C.
        stage_weights: share of each stage in the mean square over C, whatever its width; empty: in proportion to it.

    Returns:
        The standardisation, after which the mean square over all channels is 1, and the channels that are
        constant: these are shifted only, so that they carry no score unless an image departs from the constant.
    """
    count, mean, squares = moments
    deviation = np.sqrt(squares / count)
    constant = deviation <= CONSTANT * np.maximum(np.abs(mean), 1.0)
    shares = np.asarray(stage_weights or widths, np.float64)
    weight = np.repeat(shares / shares.sum() / np.asarray(widths), widths) * sum(widths)
    scale = np.sqrt(weight) / np.where(constant, 1.0, deviation)
    return Standardisation(mean.astype(np.float32), scale.astype(np.float32)), np.flatnonzero(constant).tolist()


def channel_moments(features: Iterable[np.ndarray], channels: int) -> np.ndarray:
    """Count, mean and squares about the mean over all axes but the last, [3,C] float64.

    Args:
        features: [N,h,w,C], or such batches of them, or none; one after another is enough.
        channels: C.
    """
    return joined_moments(map(_moments, features), channels)


def joined_moments(parts: Iterable[np.ndarray], channels: int) -> np.ndarray:
    """Moments [3,C] of several parts together.

    Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983: counts, means and squares about the
    mean of two parts give those of both, and nothing cancels.
    """
    count, mean, squares = np.zeros((3, channels))
    for size, own, about in parts:
        step, total = own - mean, np.maximum(count + size, 1)  # of nothing and nothing, 0
        mean, squares = mean + step * size / total, squares + about + step**2 * count * size / total
        count = count + size
    return np.stack([count, mean, squares])


def _moments(features: np.ndarray) -> np.ndarray:
    axes, size = tuple(range(features.ndim - 1)), math.prod(features.shape[:-1])
    mean = features.mean(axes, dtype=np.float64)
    about = np.square(features - mean.astype(np.float32)).sum(axes, dtype=np.float64)
    return np.stack([np.full_like(mean, size), mean, about])


@functools.cache
def compiled_extract(spec: FeatureSpec) -> Callable[[Parameters, jax.Array], jax.Array]:
    """`extract` of one specification, compiled."""
    return jax.jit(functools.partial(extract, spec))


def extract_all(
    spec: FeatureSpec, parameters: Parameters, batches: Iterable[dict[str, np.ndarray]], *, batch_size: int
) -> np.ndarray:
    """Features of all batches of `pipeline.image_batches`, [N,h,w,C] float32; the last one is padded, not dropped."""
    features = [np.zeros((0, spec.grid, spec.grid, sum(spec.widths)), np.float32)]
    program = functools.partial(compiled_extract(spec), parameters)
    features.extend(padded(program, batch["image"], size=batch_size) for batch in batches)
    return np.concatenate(features)
