"""EfficientNet trunks in inference form, from Lite0 to B4: [B,H,W,3] normalised pixels -> five stage ends, NHWC.

Architecture: Tan and Le, EfficientNet, ICML 2019, table 1, with its compound scaling; the Lite variants drop
squeeze-and-excitation, use ReLU6 and leave stem, first and last stage unscaled. A network is nothing but the numbers of
`EfficientNet`'s fields. Stage ends are those of ADTR and UniAD: the last block at each of the strides 2, 4, 8, 16, 32.
On CPU each row of blocks takes as many images at a time as its widest tensor keeps in the cache.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pushpull_jax.models.layers import Conv, Depthwise, Lowering, Padding, Pointwise, in_parts, lowered


class Stage(NamedTuple):
    """One row of the paper's table 1; `end` is the number 1..5 of the stage end it closes, 0 for none."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    width: int
    end: int


BASE_STAGES = (
    Stage(1, 3, 1, 1, 16, 1),
    Stage(2, 3, 2, 6, 24, 2),
    Stage(2, 5, 2, 6, 40, 3),
    Stage(3, 3, 2, 6, 80, 0),
    Stage(3, 5, 1, 6, 112, 4),
    Stage(4, 5, 2, 6, 192, 0),
    Stage(1, 3, 1, 6, 320, 5),
)
STEM_WIDTH = 32
# Bytes of a row's widest tensor, over the images that are taken at once on CPU; chosen by timing Lite0 and B4.
PART_BYTES = 4 << 20


def scaled_width(width: int, factor: float) -> int:
    """Width times factor, rounded to a multiple of 8 without losing more than a tenth (the reference's rule)."""
    rounded = max(8, int(width * factor + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width * factor else rounded


class MBConv(nn.Module):
    """Inverted residual block: expand, depthwise, squeeze-and-excite, project; identity added where shapes allow."""

    width: int
    kernel: int
    stride: int
    expand: int
    lite: bool
    padding: Padding
    depthwise: Lowering

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        activation = nn.relu6 if self.lite else nn.silu
        inputs, width_in = x, x.shape[-1]
        if self.expand != 1:
            x = activation(Pointwise(width_in * self.expand, name="expand")(x))
        x = Depthwise(self.kernel, self.stride, self.padding, self.depthwise, name="depthwise")(x)
        x = activation(x)
        if not self.lite:
            # The squeezed width is a quarter of the block's input, not of its expansion (reference implementation).
            gate = nn.silu(Pointwise(max(1, width_in // 4), name="squeeze")(x.mean((1, 2), keepdims=True)))
            x = x * nn.sigmoid(Pointwise(x.shape[-1], name="excite")(gate))
        x = Pointwise(self.width, name="project")(x)
        return x + inputs if self.stride == 1 and width_in == self.width else x


class EfficientNet(nn.Module):
    """The trunk.

    Attributes:
        width: compound scaling of the widths.
        depth: compound scaling of the repeats.
        lite: the Lite variants' form.
        padding: that of the weight family.
        depthwise: lowering of depthwise convolutions and stem. "shift" is for CPU and takes images a few at a time,
            "conv" is XLA's own, and "auto" chooses when XLA compiles.
        dtype: what is computed in, and that of the stage ends.
    """

    width: float
    depth: float
    lite: bool
    padding: Padding
    depthwise: Lowering = "auto"
    dtype: Any = jnp.float32

    @property
    def rows(self) -> tuple[Stage, ...]:
        """The table's rows with this network's widths and repeats."""
        last = len(BASE_STAGES) - 1
        return tuple(
            row._replace(
                width=scaled_width(row.width, self.width),
                repeats=row.repeats if self.lite and i in (0, last) else math.ceil(row.repeats * self.depth),
            )
            for i, row in enumerate(BASE_STAGES)
        )

    @property
    def stem_width(self) -> int:
        """Channels of the stem."""
        return STEM_WIDTH if self.lite else scaled_width(STEM_WIDTH, self.width)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of the five stage ends."""
        return tuple(row.width for row in self.rows if row.end)

    @nn.compact
    def __call__(self, x: jax.Array, stages: tuple[int, ...] = (1, 2, 3, 4, 5)) -> tuple[jax.Array, ...]:
        """The stage ends named in `stages` (1..5), in that order; blocks behind the deepest of them are not run."""
        x = x.astype(self.dtype)
        parameters = None if self.is_initializing() else self.variables["params"]
        if self.depthwise == "auto" and parameters is not None:
            return lowered("auto", parameters, x, shift=self._as("shift", stages), conv=self._as("conv", stages))
        ends = {}
        for number, row in enumerate(self.rows):
            if self.depthwise == "shift" and parameters is not None:
                x = in_parts(functools.partial(self._row, number), parameters, x, limit=self._part(number, x))
            else:
                x = self._row(number, None, x)
            ends[row.end] = x
            if row.end == max(stages):
                break
        return tuple(ends[stage] for stage in stages)

    def _as(self, lowering: Lowering, stages: tuple[int, ...]) -> Callable[..., tuple[jax.Array, ...]]:
        """The network of one lowering as a function of parameters and images."""
        network = self.clone(depthwise=lowering, parent=None)
        return lambda parameters, x: network.apply({"params": parameters}, x, stages)

    def _row(self, number: int, parameters: dict[str, Any] | None, x: jax.Array) -> jax.Array:
        """A row of the table, with the stem before the first; its layers are the module's own, or get `parameters`."""

        def run(layer: nn.Module, x: jax.Array) -> jax.Array:
            if parameters is None:
                return layer.clone(parent=self)(x)
            return layer.apply({"params": parameters[layer.name]}, x)

        if number == 0:
            stem = Conv(self.stem_width, 3, 2, self.padding, self.depthwise, name="stem", parent=None)
            x = (nn.relu6 if self.lite else nn.silu)(run(stem, x))
        row, first = self.rows[number], sum(row.repeats for row in self.rows[:number])
        for repeat in range(row.repeats):
            block = MBConv(
                row.width, row.kernel, row.stride if repeat == 0 else 1, row.expand, self.lite, self.padding,
                self.depthwise, name=f"block_{first + repeat}", parent=None,
            )  # fmt: skip
            x = run(block, x)
        return x

    def _part(self, number: int, x: jax.Array) -> int:
        """Images at a time for a row that is given `x`: its widest tensor is the stem's, or the first expansion."""
        _, height, width, channels = x.shape
        widest = height * width * (self.stem_width // 4 if number == 0 else channels * self.rows[number].expand)
        return PART_BYTES // (widest * x.dtype.itemsize)
