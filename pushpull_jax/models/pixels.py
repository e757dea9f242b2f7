"""Pixels in place of features, for the ablation "pixels as the target": [B,H,W,3] normalised -> the same, folded.

Stage s (1..5) gathers cells of 2^s x 2^s pixels into channels, [B,H/2^s,W/2^s,3*4^s], so that it lies on the grid of a
convolutional trunk's stage s and loses nothing. There are no parameters.
"""

import flax.linen as nn
import jax

from pushpull_jax.errors import InputError


def space_to_depth(x: jax.Array, cell: int) -> jax.Array:
    """Gather cell x cell pixels into channels, by row, column, channel: [B,H,W,C] -> [B,H/cell,W/cell,cell^2 C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // cell, cell, width // cell, cell, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // cell, width // cell, cell * cell * channels)


class Pixels(nn.Module):
    """The network that shows the image itself at five strides."""

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of the five stages."""
        return tuple(3 * 4**stage for stage in (1, 2, 3, 4, 5))

    def __call__(self, x: jax.Array, stages: tuple[int, ...] = (1, 2, 3, 4, 5)) -> tuple[jax.Array, ...]:
        """The stages named in `stages` (1..5), in that order.

        Raises:
            InputError: the sides of the images are no multiples of the deepest stage's stride.
        """
        if not stages or not set(stages) <= {1, 2, 3, 4, 5}:
            raise ValueError(f"stages must be some of 1 to 5, got {stages}")
        stride = 2 ** max(stages)
        if x.shape[1] % stride or x.shape[2] % stride:
            size = f"{x.shape[1]}x{x.shape[2]}"
            raise InputError(f"pixels at stage {max(stages)} need sides that are multiples of {stride}, got {size} px")
        return tuple(space_to_depth(x, 2**stage) for stage in stages)
