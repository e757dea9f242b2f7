"""A detector as one file of jax.export: uint8 [B,H,W,3] to scores [B] and maps [B,H,W], weights inside, B, H, W free.

It computes what a `Detector` does when it is called. There the host resizes images and maps, by matrices of their
sizes; here the same matrices are computed inside the program, since a symbolic size is known only where it runs. Their
entries are ratios of whole numbers, exact in int32 up to the rounding of the result. The file is StableHLO, lowered
for all platforms at once: what `lax.platform_dependent` chooses is chosen where it is compiled.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from pushpull_jax.data.images import LETTERBOX_GREY, Resize
from pushpull_jax.detector import Detector, Network, detect
from pushpull_jax.errors import InputError

PLATFORMS = ("cpu", "cuda", "tpu")
# Of jax.export, from JAX's guide "Exporting and serializing staged-out computations".
NEWER, OLDER = "6 months", "3 weeks"


def detect_native(network: Network, parameters: dict[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores and maps of images as they are decoded; a pure function, whose sizes may be symbolic.

    Args:
        network: what is computed.
        parameters: its tree, see `Detector`.
        images: [B,H,W,3] uint8.

    Returns:
        Scores [B] and maps [B,H,W], float32.
    """
    scores, maps = detect(network, parameters, to_square(images, size=network.image_size, mode=network.resize))
    return scores, to_native(maps, images.shape[1:3], mode=network.resize)


def to_square(images: jax.Array, *, size: int, mode: Resize) -> jax.Array:
    """Images [B,H,W,3] at the size of a run, [B,S,S,3] float32 in 0..255, as `resize_image` does."""
    rows, columns = (
        resize_matrix(side, size, box)
        for side, box in zip(images.shape[1:3], boxes_of(*images.shape[1:3], size=size, mode=mode), strict=True)
    )
    precision = jax.lax.Precision.HIGHEST
    resized = jnp.einsum("sh,bhwc->bswc", rows, images.astype(jnp.float32), precision=precision)
    resized = jnp.einsum("tw,bswc->bstc", columns, resized, precision=precision)
    if mode == "stretch":
        return resized
    filled = rows.any(axis=1)[:, None] & columns.any(axis=1)[None]
    return jnp.where(filled[None, :, :, None], resized, LETTERBOX_GREY)


def to_native(maps: jax.Array, sides: tuple[int, int], *, mode: Resize) -> jax.Array:
    """Maps [B,S,S] at the native size (H, W) of their images, as `Detector.to_native` does: [B,H,W]."""
    size = maps.shape[-1]
    rows, columns = (
        native_matrix(side, size, box) for side, box in zip(sides, boxes_of(*sides, size=size, mode=mode), strict=True)
    )
    maps = jnp.einsum("hs,bst->bht", rows, maps, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("wt,bht->bhw", columns, maps, precision=jax.lax.Precision.HIGHEST)


def boxes_of(height: int, width: int, *, size: int, mode: Resize) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """(start, length) along rows and columns of what an image fills of the square, as `letterbox_box` has them.

    The sides may be symbolic, so that the box holds values that are traced.
    """
    if mode == "stretch":
        return (0, size), (0, size)
    height, width = jnp.asarray(height), jnp.asarray(width)
    longer = jnp.maximum(height, width)
    lengths = (jnp.maximum(1, (2 * side * size + longer) // (2 * longer)) for side in (height, width))
    first, second = (((size - length) // 2, length) for length in lengths)
    return first, second


def resize_matrix(n_in: int, size: int, box: tuple[Any, Any]) -> jax.Array:
    """`resize_weights` of an axis into a box of the square: [size, n_in] float32, rows outside the box 0.

    Args:
        n_in: length of the axis, may be symbolic.
        size: S.
        box: start and length of what the axis fills.
    """
    start, length = box
    n = jnp.asarray(n_in)
    place, pixel = (jax.lax.broadcasted_iota(jnp.int32, (size, n_in), axis) for axis in (0, 1))
    place = place - start
    weights = 2 * jnp.maximum(n, length) - jnp.abs((2 * pixel + 1) * length - (2 * place + 1) * n)
    weights = jnp.where((place >= 0) & (place < length), jnp.maximum(weights, 0), 0).astype(jnp.float32)
    return weights / jnp.maximum(weights.sum(1, keepdims=True), 1)


def native_matrix(n_out: int, size: int, box: tuple[Any, Any]) -> jax.Array:
    """`scoring.interpolation_matrix` from a box of the square to an axis: [n_out, size] float32.

    Args:
        n_out: length of the axis, may be symbolic.
        size: S.
        box: start and length of what the axis fills.
    """
    start, length = box
    last = jnp.maximum(jnp.asarray(n_out) - 1, 1)
    pixel, place = (jax.lax.broadcasted_iota(jnp.int32, (n_out, size), axis) for axis in (0, 1))
    place = place - start
    # Outside the box the distance is at least `last`, hence the weight 0.
    weights = jnp.maximum(last - jnp.abs(place * last - pixel * (length - 1)), 0)
    return weights.astype(jnp.float32) / last


def export_detector(detector: Detector) -> bytes:
    """The serialised artefact of a detector, for CPU, CUDA and TPU.

    Raises:
        InputError: the network cannot be traced with a symbolic number of images.
    """
    # The weights are closed over, and so become constants of the program.
    program = jax.jit(lambda images: detect_native(detector.network, detector.parameters, images))
    images = jax.ShapeDtypeStruct(jax_export.symbolic_shape("b, h, w, 3"), jnp.uint8)
    try:
        with _without_folders():
            return bytes(jax_export.export(program, platforms=PLATFORMS)(images).serialize())
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the network cannot be exported for any number of images at once: {reason}") from error


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Where an operation came from is kept by the name of its source file alone."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, r".*[/\\]")
    try:
        yield
    finally:
        jax.config.update(name, before)


def read_artefact(content: bytes) -> Any:
    """The compiled function of an artefact, uint8 [B,H,W,3] -> scores [B], maps [B,H,W]; it compiles once a shape."""
    return jax.jit(jax_export.deserialize(bytearray(content)).call)
