"""Confetti noise: synthetic anomalies for training on normal images alone, and their masks.

Two layers of rotated squares, coloured and black, are added to an image, blurred and clamped. Images are
[*B, H, W, 3] float32 in [0, 1], colours in grey levels of 1/255, masks [*B, H, W] with True where a pixel changed.
Lengths are in pixels of a 240x240 image and grow with the root of the area. Everything has a fixed shape: it compiles
once and stays on the device. Figure 3 of the paper has it from FCDD (Liznerski et al., ICLR 2021, arXiv 2007.01760).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pushpull_jax.shapes import check_shapes

# All of these are FCDD's (noise mode "confetti"), for the side in pixels that its MVTec-AD images have.
SIDE_OF_IMAGE = 240
# Mean numbers of coloured and black squares before "at least one", 1.04 and 0.69: chance of a centre x pixels.
COUNTS = (1.8e-5 * SIDE_OF_IMAGE**2, 1.2e-5 * SIDE_OF_IMAGE**2)
# Smallest and largest side of a square, both drawn.
SIDES = (8, 54)
# Largest rotation to either side, in degrees.
ANGLE = 45.0
# Lowest and highest value that a coloured square adds to a channel, both drawn; and what a black one adds.
COLORS = (-256, -1)
BLACK = -255
# Length and standard deviation of the Gaussian.
KERNEL = 25
SIGMA = 5.0
# Mean change in grey levels under which the noise is inverted.
INVERT_BELOW = 0.025

# Change in grey levels from which a pixel is anomalous: ours; FCDD takes any change of its rounded images.
CHANGED = 0.5
# Probability under which higher numbers of squares are never drawn: ours. At most 8 coloured and 7 black ones remain.
TAIL = 1e-5


class Squares(NamedTuple):
    """The squares of one layer, N slots of which some are used; a later square covers an earlier one.

    Attributes:
        present: [N] bool, whether the slot is used.
        center: [N, 2] float32, row and column in pixels.
        side: [N] float32, in pixels.
        angle: [N] float32, rotation in degrees.
        color: [N, 3] float32, what it adds to the channels, in grey levels.
    """

    present: jax.Array
    center: jax.Array
    side: jax.Array
    angle: jax.Array
    color: jax.Array


def confetti(
    key: jax.Array,
    images: ArrayLike,
    *,
    counts: tuple[float, float] = COUNTS,
    sides: tuple[int, int] = SIDES,
    angle: float = ANGLE,
    kernel: int = KERNEL,
    sigma: float = SIGMA,
) -> tuple[jax.Array, jax.Array]:
    """Add confetti noise to every image: clamp(image + blur(coloured + black) / 255) (see `add_squares`).

    Image i draws from fold_in(key, i), whatever the others are. The keyword arguments are constants of the compiled
    program, lengths for 240x240 pixels. Which images to use is the caller's draw (FCDD: each with probability 0.5).

    Args:
        key: a JAX key.
        images: [*B, H, W, 3], real and in [0, 1]; leading axes count as one, in C order.
        counts: means of the Poisson numbers of coloured and black squares, before "at least one" of each.
        sides: smallest and largest side of a square.
        angle: largest rotation in degrees.
        kernel, sigma: length, odd, and standard deviation of the Gaussian.

    Returns:
        The images, [*B, H, W, 3] float32 in [0, 1], and their masks, [*B, H, W] bool, True where anomalous.

    Raises:
        ValueError: images have another shape or are not real, or a parameter is out of range.
    """
    images = _as_images(images)
    height, width = images.shape[-3:-1]
    flat = images.reshape(math.prod(images.shape[:-3]), height, width, 3)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(flat)))
    sample = functools.partial(sample_squares, size=(height, width), counts=counts, sides=sides, angle=angle)
    add = functools.partial(add_squares, kernel=kernel, sigma=sigma)
    noisy, masks = jax.vmap(lambda key, image: add(image, *sample(key)))(keys, flat)
    return noisy.reshape(images.shape), masks.reshape(images.shape[:-1])


def sample_squares(
    key: jax.Array,
    *,
    size: tuple[int, int],
    counts: tuple[float, float] = COUNTS,
    sides: tuple[int, int] = SIDES,
    angle: float = ANGLE,
) -> tuple[Squares, Squares]:
    """Draw the squares of one image.

    A number n >= 1 of squares has probability proportional to mean^n / n!, as FCDD draws again until there is a
    square; numbers whose joint probability is under `TAIL` are left out. Centres are uniform over pixels, sides over
    the integers of `sides`, angles over [-angle, angle], colours over the integers of `COLORS`, one a channel.

    Args:
        key: a JAX key.
        size: (H, W) of the image in pixels.
        counts, sides, angle: as for `confetti`.

    Returns:
        The coloured squares and the black ones.

    Raises:
        ValueError: a parameter is out of range.
    """
    if not (len(counts) == 2 and all(0 < count <= 50 for count in counts)):
        raise ValueError(f"expected two counts above 0, at most 50, got counts = {counts}")
    if not (len(sides) == 2 and 1 <= sides[0] <= sides[1]):
        raise ValueError(f"expected sides = (smallest, largest) of at least 1 px, got sides = {sides}")
    if not (math.isfinite(angle) and angle >= 0):
        raise ValueError(f"expected a finite angle of 0 degrees or more, got angle = {angle}")
    distributions = [_count_distribution(count) for count in counts]
    # One draw for all: every call of the generator adds about half a second to the compilation on a CPU.
    uniform = jax.random.uniform(key, (sum(map(len, distributions)), 8), jnp.float32)
    colored, black = (
        _layer(draws, distribution, size=size, sides=sides, angle=angle)
        for draws, distribution in zip(jnp.split(uniform, [len(distributions[0])]), distributions, strict=True)
    )
    return colored, black._replace(color=jnp.full_like(black.color, BLACK))


def add_squares(
    image: ArrayLike, colored: Squares, black: Squares, *, kernel: int = KERNEL, sigma: float = SIGMA
) -> tuple[jax.Array, jax.Array]:
    """Add squares to one image: clamp(image + blur(colored + black) / 255), and where that changed it.

    Inside a layer the last square counts, and the layers are summed. A pixel belongs to a square if its centre does.
    The Gaussian sums to 1 and mirrors its input beyond the edges, without repeating the edge, as in FCDD. Noise that
    changes the image by less than 0.025 grey levels on average is inverted, if that changes it more: noise is
    negative, and does nothing to an image that is dark already.

    Args:
        image: [H, W, 3], real and in [0, 1].
        colored: squares of the first layer.
        black: squares of the second.
        kernel, sigma: as for `confetti`.

    Returns:
        The image, [H, W, 3] float32 in [0, 1], and its mask, [H, W] bool: a channel changed by `CHANGED` or more.

    Raises:
        ValueError: image has another shape or is not real, or a parameter is out of range.
    """
    image = _as_images(image, name="image", spec="H W C")
    size = image.shape[:2]
    if not (kernel >= 1 and kernel % 2 == 1 and math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"expected an odd kernel and a sigma above 0, got kernel = {kernel}, sigma = {sigma}")
    radius, sigma = round((kernel - 1) / 2 * _scale(size)), sigma * _scale(size)
    noise = _rasterize(colored, size) + _rasterize(black, size)
    # HIGHEST: the default of GPU and TPU would multiply in TF32 or bfloat16.
    precision = jax.lax.Precision.HIGHEST
    noise = jnp.einsum("Hh,hwc->Hwc", _gaussian_matrix(size[0], radius, sigma), noise, precision=precision)
    noise = jnp.einsum("Hwc,Ww->HWc", noise, _gaussian_matrix(size[1], radius, sigma), precision=precision) / 255
    added, subtracted = jnp.clip(image + noise, 0, 1), jnp.clip(image - noise, 0, 1)
    change, inverse_change = (255 * jnp.abs(jnp.mean(result - image)) for result in (added, subtracted))
    result = jnp.where((change < INVERT_BELOW) & (inverse_change > change), subtracted, added)
    return result, jnp.any(jnp.abs(result - image) >= CHANGED / 255, axis=-1)


def _as_images(images: ArrayLike, *, name: str = "images", spec: str = "*B H W C") -> jax.Array:
    """Images as float32, or a ValueError that names them."""
    dtype = jnp.result_type(images)
    if check_shapes(spec, **{name: images})["C"] != 3 or not jnp.issubdtype(dtype, jnp.floating):
        expected = f"[{', '.join(spec.split()[:-1])}, 3] floating point in [0, 1]"
        raise ValueError(f"{name} must be {expected}, got {list(np.shape(images))} {dtype}")
    return jnp.asarray(images, jnp.float32)


def _scale(size: tuple[int, int]) -> float:
    """Pixels of an image of this size for one of a 240x240 image."""
    return math.sqrt(size[0] * size[1]) / SIDE_OF_IMAGE


def _layer(
    uniform: jax.Array, cumulative: np.ndarray, *, size: tuple[int, int], sides: tuple[int, int], angle: float
) -> Squares:
    """Squares of random colours from uniform numbers, [N, 8], and the distribution of their number, [N]."""
    return Squares(
        present=jnp.arange(len(cumulative)) <= jnp.sum(uniform[0, 0] >= cumulative),
        center=_integers(uniform[:, 1:3], np.zeros((1, 2)), np.array([size]) - 1),
        side=_integers(uniform[:, 3], *sides) * _scale(size),
        angle=angle * (2 * uniform[:, 4] - 1),
        color=_integers(uniform[:, 5:], *COLORS),
    )


def _integers(uniform: jax.Array, low: ArrayLike, high: ArrayLike) -> jax.Array:
    """Uniform integers in low..high, both possible, from uniform numbers in [0, 1); float32, as they are used."""
    low, high = np.float32(low), np.float32(high)
    return low + jnp.floor(uniform * (high - low + 1))


def _count_distribution(mean: float) -> np.ndarray:
    """P(count <= n | count >= 1) of a Poisson count for n = 1, 2, ..., [N] float32 that ends in 1."""
    mass = mean * math.exp(-mean) / -math.expm1(-mean)
    cumulative = [mass]
    while cumulative[-1] < 1 - TAIL:
        mass *= mean / (len(cumulative) + 1)
        cumulative.append(cumulative[-1] + mass)
    return np.array(cumulative, np.float32) / np.float32(cumulative[-1])


def _rasterize(squares: Squares, size: tuple[int, int]) -> jax.Array:
    """A layer as an image in grey levels, [H, W, 3] float32; 0 outside the squares."""
    center, side, angle = squares.center[:, :, None, None], squares.side[:, None, None], squares.angle[:, None, None]
    y = jnp.arange(size[0], dtype=jnp.float32)[None, :, None] - center[:, 0]
    x = jnp.arange(size[1], dtype=jnp.float32)[None, None, :] - center[:, 1]
    cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
    inside = (jnp.abs(cos * x + sin * y) <= side / 2) & (jnp.abs(cos * y - sin * x) <= side / 2)
    order = jnp.arange(1, len(squares.present) + 1)[:, None, None]
    last = jnp.max(jnp.where(inside & squares.present[:, None, None], order, 0), axis=0)
    return jnp.concatenate([jnp.zeros((1, 3), jnp.float32), squares.color])[last]


def _gaussian_matrix(n: int, radius: int, sigma: float) -> np.ndarray:
    """The Gaussian filter of an axis of length n as a banded matrix, [n, n] float32; edges are mirrored."""
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    rows = np.arange(n)[:, None]
    matrix = np.zeros((n, n))
    # add.at, because offsets beyond an edge fall on pixels that are hit already.
    source = np.pad(np.arange(n), radius, mode="reflect")
    np.add.at(matrix, (rows, source[rows + radius + offsets]), kernel / kernel.sum())
    return matrix.astype(np.float32)
