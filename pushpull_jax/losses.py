"""The training losses: eq. 1 (normal samples only) and the push-pull losses of eq. 6-9 of ADTR (arXiv 2209.01816).

Layout NHWC: features [*B, h, w, C], maps and masks [*B, h, w], labels [*B]; *B is any leading axes, none included; 1 is
anomalous, 0 normal. Each loss returns one value an example; the mean over the batch is the caller's, who alone knows
which examples are padding. Everything is computed in float32, whatever comes in: inputs are cast before they are
subtracted, and gradients come back in the type of the input. Values and gradients are finite for |features| <= 1e6 and
masks and labels in [0, 1]; only gradients with respect to a float16 `phi` can overflow (65504).
"""

import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pushpull_jax.shapes import check_shapes

# Weight of the push term: the paper's, for MVTec-AD and for CIFAR-10.
ALPHA = 0.003
# Cells in the image score of eq. 8: the paper's, for CIFAR-10.
TOP_K = 20
# What is known of an example, for `push_pull_loss`: nothing (it is pulled, as a normal one), the label of the image, or
# the mask of its cells.
UNLABELLED, IMAGE_LABEL, MASK = 0, 1, 2
# Added to the distance inside the push term, so that the gradient stays bounded where an anomaly is reconstructed
# perfectly. Added, not a clamp: a clamp would leave that anomaly no gradient. Ours, chosen so that the gradient for
# one anomalous cell with mean |d| = 1e-3, whose distance is 5e-7 / (h w), is off by 0.005 % at 16x16 and by 0.3 % at
# 128x128.
PUSH_FLOOR = 1e-13


def pseudo_huber_map(features: ArrayLike, reconstruction: ArrayLike) -> jax.Array:
    """Pseudo-Huber distance of every cell, eq. 6.

    phi(u) = sqrt(x(u)^2 + 1) - 1,  x(u) = (1/C) sum_i |d(i,u)|,  d = features - reconstruction

    It is computed as x^2 / (sqrt(x^2 + 1) + 1): the plain form is exactly 0 in float32 from x = 3e-4 down. The gradient
    at d = 0 is 0, because phi'(0) = 0.

    Args:
        features: [*B, h, w, C], extracted.
        reconstruction: [*B, h, w, C], reconstructed.

    Returns:
        phi, [*B, h, w] float32, 0 or more.

    Raises:
        ValueError: the two shapes differ; nothing is broadcast.
    """
    check_shapes("*B h w C", features=features, reconstruction=reconstruction)
    x = jnp.mean(jnp.abs(_difference(features, reconstruction)), axis=-1)
    return x * x / (jnp.sqrt(x * x + 1) + 1)


def pixel_push_pull_loss(phi: ArrayLike, mask: ArrayLike, *, alpha: ArrayLike = ALPHA) -> jax.Array:
    """Push-pull loss of an image with a mask on the feature grid, eq. 7.

    L = (1/hw) sum_u (1 - y(u)) phi(u) - alpha log(1 - exp(-(1/hw) sum_u y(u) phi(u)))

    What the equation leaves open: the push term (the second) is dropped if and only if sum(mask) = 0, as FCDD does, for
    there it would be log(0). Elsewhere `PUSH_FLOOR` is added to its distance, which bounds the gradient with respect to
    phi by alpha / (hw PUSH_FLOOR) and keeps it negative at phi = 0. With respect to the reconstruction the gradient at
    d = 0 is 0 whatever the floor, because phi'(0) = 0: an exactly reconstructed anomaly is not pushed. A soft mask
    weights both terms just as the equation says. No gradient flows to the mask.

    Args:
        phi: [*B, h, w], from `pseudo_huber_map`.
        mask: [*B, h, w], in [0, 1], of any real type or bool.
        alpha: scalar, weight of the push term.

    Returns:
        [*B] float32.

    Raises:
        ValueError: the shapes of phi and mask differ, or alpha is not a scalar.
    """
    check_shapes("*B h w, *B h w,", phi=phi, mask=mask, alpha=alpha)
    phi = jnp.asarray(phi, jnp.float32)
    mask = jax.lax.stop_gradient(jnp.asarray(mask, jnp.float32))
    pull = jnp.mean((1 - mask) * phi, axis=(-2, -1))
    # The floor already makes this term finite without an anomalous cell, gradient included: one `where` is enough.
    push = _push(jnp.mean(mask * phi, axis=(-2, -1)), alpha)
    return pull + jnp.where(jnp.sum(mask, axis=(-2, -1)) > 0, push, 0.0)


def top_k_score(phi: ArrayLike, *, k: int | jax.Array) -> jax.Array:
    """Mean of the k largest cells, eq. 8: q = (1/k) sum top_k(phi).

    Among equal cells the first in row order are taken, and receive the gradient. A traced k, as when several are tried
    in one program, gives the same from a sort of all cells, of which the first k count.

    Args:
        phi: [*B, h, w].
        k: number of cells, 1 to h*w; an integer, traced or not.

    Returns:
        q, [*B] float32; nan where a traced k is not in 1..h*w.

    Raises:
        ValueError: phi has fewer than two axes, or k is not in 1..h*w.
    """
    grid = check_shapes("*B h w", phi=phi)
    cells = grid["h"] * grid["w"]
    if isinstance(k, jax.core.Tracer):
        return _top_traced_k(jnp.reshape(jnp.asarray(phi, jnp.float32), (*grid["*B"], cells)), k)
    k = operator.index(k)
    if not 1 <= k <= cells:
        raise ValueError(f"expected k in 1..{cells}, the cells of a {grid['h']}x{grid['w']} grid, got k = {k}")
    flat = jnp.reshape(jnp.asarray(phi, jnp.float32), (*grid["*B"], cells))
    return jnp.mean(jax.lax.top_k(flat, k)[0], axis=-1)


def _top_traced_k(flat: jax.Array, k: jax.Array) -> jax.Array:
    """Mean of the k largest of [*B, cells]."""
    cells = flat.shape[-1]
    order = jnp.argsort(flat, axis=-1, stable=True, descending=True)
    ranked = jnp.take_along_axis(flat, order, axis=-1)
    total = jnp.sum(jnp.where(jnp.arange(cells) < k, ranked, 0.0), axis=-1)
    return jnp.where((k >= 1) & (k <= cells), total / k, jnp.nan)


def image_push_pull_loss(
    phi: ArrayLike, label: ArrayLike, *, k: int | jax.Array = TOP_K, alpha: ArrayLike = ALPHA
) -> jax.Array:
    """Push-pull loss of an image with a label only, eq. 9 on the score q of eq. 8.

    L = (1 - y) q - alpha y log(1 - exp(-q))

    `PUSH_FLOOR` is added to q in the push term (the second), which bounds the gradient as it does in
    `pixel_push_pull_loss`; for a normal image the term is 0, gradient included. No gradient flows to the label.

    Args:
        phi: [*B, h, w], from `pseudo_huber_map`.
        label: [*B], in [0, 1], of any real type or bool.
        k: number of cells in q, 1 to h*w.
        alpha: scalar, weight of the push term.

    Returns:
        [*B] float32.

    Raises:
        ValueError: label is not [*B], alpha is not a scalar, or k is not in 1..h*w.
    """
    check_shapes("*B h w, *B,", phi=phi, label=label, alpha=alpha)
    label = jax.lax.stop_gradient(jnp.asarray(label, jnp.float32))
    score = top_k_score(phi, k=k)
    return (1 - label) * score + label * _push(score, alpha)


def push_pull_loss(
    phi: ArrayLike,
    kind: ArrayLike,
    label: ArrayLike,
    mask: ArrayLike,
    *,
    k: int | jax.Array = TOP_K,
    alpha: ArrayLike = ALPHA,
) -> jax.Array:
    """The loss that each example's own kind of label calls for, so that one batch can mix them.

    MASK: eq. 7. IMAGE_LABEL: eq. 9. UNLABELLED: the pull of eq. 7 on all cells, as for a normal image; defects among
    unlabelled images are learned as normal. Each is in units of phi (eq. 6), so that the pull of one kind does not
    drown that of another, as the squares of eq. 1 would. The kinds are values, not shapes: changing the mix compiles
    nothing.

    Args:
        phi: [*B, h, w], from `pseudo_huber_map`.
        kind: [*B] integers, UNLABELLED, IMAGE_LABEL or MASK.
        label: [*B], in [0, 1]; read for IMAGE_LABEL only.
        mask: [*B, h, w], in [0, 1]; read for MASK only.
        k: number of cells in q of eq. 8, 1 to h*w.
        alpha: scalar, weight of the push terms.

    Returns:
        [*B] float32; nan where kind is another number.

    Raises:
        ValueError: the shapes do not agree, alpha is not a scalar, or k is not in 1..h*w.
    """
    check_shapes("*B h w, *B, *B, *B h w,", phi=phi, kind=kind, label=label, mask=mask, alpha=alpha)
    phi, kind = jnp.asarray(phi, jnp.float32), jnp.asarray(kind)
    # An unlabelled example is one whose mask is empty. All three are finite wherever phi is: a `where` is enough.
    known = jnp.where((kind == MASK)[..., None, None], jnp.asarray(mask, jnp.float32), 0.0)
    by_cell = pixel_push_pull_loss(phi, known, alpha=alpha)
    by_image = image_push_pull_loss(phi, jnp.where(kind == IMAGE_LABEL, label, 0), k=k, alpha=alpha)
    chosen = jnp.where(kind == IMAGE_LABEL, by_image, by_cell)
    return jnp.where((kind >= UNLABELLED) & (kind <= MASK), chosen, jnp.nan)


def reconstruction_loss(features: ArrayLike, reconstruction: ArrayLike) -> jax.Array:
    """Squared error of the reconstruction, for training on normal samples only, eq. 1.

    L = (1/hw) ||features - reconstruction||^2

    The squares are summed over C, where eq. 6 averages: the two losses differ about a thousandfold and don't mix.

    Args:
        features: [*B, h, w, C], extracted.
        reconstruction: [*B, h, w, C], reconstructed.

    Returns:
        [*B] float32.

    Raises:
        ValueError: the two shapes differ; nothing is broadcast.
    """
    check_shapes("*B h w C", features=features, reconstruction=reconstruction)
    squares = jnp.sum(_difference(features, reconstruction) ** 2, axis=-1)
    return jnp.mean(squares, axis=(-2, -1))


def _difference(features: ArrayLike, reconstruction: ArrayLike) -> jax.Array:
    return jnp.asarray(features, jnp.float32) - jnp.asarray(reconstruction, jnp.float32)


def _push(distance: jax.Array, alpha: ArrayLike) -> jax.Array:
    # log1mexp: the plain log(1 - exp(-q)) is -inf in float32 at q = 1e-8, where the true value is -18.42.
    return -jnp.asarray(alpha, jnp.float32) * jax.nn.log1mexp(distance + PUSH_FLOOR)
