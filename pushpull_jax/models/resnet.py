"""ResNet trunks in inference form, with basic or bottleneck blocks: [B,H,W,3] normalised pixels -> stage ends, NHWC.

Architecture: He et al., Deep residual learning for image recognition, CVPR 2016, table 1, with the stride on the 3x3
convolution of a bottleneck, and Zagoruyko and Komodakis, Wide residual networks, BMVC 2016, for the wider one: all as
torchvision's weights have them. A network is nothing but the numbers of `ResNet`'s fields. The five stage ends are the
stem after its ReLU, at stride 2, and the four groups of blocks, at strides 4, 8, 16, 32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pushpull_jax.models.layers import Conv, Pointwise

STEM_WIDTH = 64
GROUP_WIDTHS = (64, 128, 256, 512)
BOTTLENECK_EXPANSION = 4


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 3x3 windows, stride 2, one row and column of -inf on every side: [B,H,W,C] -> [B,H',W',C]."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or with `bottleneck` 1x1, 3x3, 1x1; ReLU after the sum."""

    inner: int
    width: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x
        if self.bottleneck:
            x = nn.relu(Pointwise(self.inner, name="conv1")(x))
            x = nn.relu(Conv(self.inner, 3, self.stride, "symmetric", name="conv2")(x))
            x = Pointwise(self.width, name="conv3")(x)
        else:
            x = nn.relu(Conv(self.inner, 3, self.stride, "symmetric", name="conv1")(x))
            x = Conv(self.width, 3, 1, "symmetric", name="conv2")(x)
        if self.stride != 1 or inputs.shape[-1] != self.width:
            inputs = Pointwise(self.width, name="downsample")(inputs[:, :: self.stride, :: self.stride])
        return nn.relu(x + inputs)


class ResNet(nn.Module):
    """The trunk; `widening` multiplies the inner width of the blocks, 2 in Wide-ResNet-50-2.

    It computes in `dtype`, which the stage ends have too.
    """

    repeats: tuple[int, int, int, int]
    bottleneck: bool
    widening: int = 1
    dtype: Any = jnp.float32

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of the five stage ends."""
        expansion = BOTTLENECK_EXPANSION if self.bottleneck else 1
        return (STEM_WIDTH, *(expansion * width for width in GROUP_WIDTHS))

    @nn.compact
    def __call__(self, x: jax.Array, stages: tuple[int, ...] = (1, 2, 3, 4, 5)) -> tuple[jax.Array, ...]:
        """The stage ends named in `stages` (1..5), in that order; what is behind the deepest of them is not run."""
        if not stages or not set(stages) <= {1, 2, 3, 4, 5}:
            raise ValueError(f"stages must be some of 1 to 5, got {stages}")
        ends = {1: nn.relu(Conv(STEM_WIDTH, 7, 2, "symmetric", name="stem")(x.astype(self.dtype)))}
        for group in range(1, max(stages)):
            x = max_pool(ends[1]) if group == 1 else ends[group]
            inner, width = GROUP_WIDTHS[group - 1] * self.widening, self.stage_widths[group]
            for repeat in range(self.repeats[group - 1]):
                stride = 2 if group > 1 and repeat == 0 else 1
                x = Block(inner, width, stride, self.bottleneck, name=f"layer{group}_{repeat}")(x)
            ends[group + 1] = x
        return tuple(ends[stage] for stage in stages)
