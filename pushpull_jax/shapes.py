"""The check that the pure functions make of the shapes they are given, and the split of channels by stage.

A spec names the axes of an array, "*B h w C" for instance; `*B` stands for any number of leading axes, none included.
A letter that occurs twice means one size, so [B, 3, 1] never broadcasts silently against [B, 3, 3]. Shapes are known
while JAX traces: the check works under `jit`, `vmap` and `grad` alike and costs nothing in the compiled program.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def check_shapes(spec: str, **arrays: ArrayLike) -> dict[str, int | tuple[int, ...]]:
    """Check named arrays against a spec whose letters they share.

    Args:
        spec: axes separated by spaces. Either one spec for all arrays, or one for each, in their order, separated by
            commas: "*B h w, *B" with phi and label. An empty one means a scalar. Only the first axis can be starred.
        **arrays: what is checked, under the names that an error should use.

    Returns:
        The size of each axis by its letter; for a starred one the tuple of sizes, under "*B".

    Raises:
        ValueError: number of axes or a size does not agree, or an axis without a star is empty.
    """
    specs = [part.split() for part in spec.split(",")]
    if len(specs) == 1:
        specs *= len(arrays)
    shapes = {name: tuple(np.shape(array)) for name, array in arrays.items()}
    sizes: dict[str, int | tuple[int, ...]] = {}
    for axes, shape in zip(specs, shapes.values(), strict=True):
        if not _bind(axes, shape, sizes):
            expected = ", ".join(f"{name} [{', '.join(axes)}]" for name, axes in zip(shapes, specs, strict=True))
            came = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise ValueError(f"expected {expected} (a letter is one size, at least 1; * any leading axes), got {came}")
    return sizes


def _bind(axes: list[str], shape: tuple[int, ...], sizes: dict[str, int | tuple[int, ...]]) -> bool:
    """Enter the sizes of one array; False where they contradict the spec or what was entered before."""
    if axes and axes[0].startswith("*"):
        leading = len(shape) - len(axes) + 1
        if leading < 0:
            return False
        shape = (shape[:leading], *shape[leading:])
    if len(axes) != len(shape):
        return False
    return all(size != 0 and sizes.setdefault(axis, size) == size for axis, size in zip(axes, shape, strict=True))


def split_channels(array: ArrayLike, widths: Sequence[int]) -> list[jax.Array]:
    """Split [..., C] into parts [..., width], one for each width in order; their sum is C."""
    return jnp.split(jnp.asarray(array), np.cumsum(widths)[:-1].tolist(), axis=-1)
