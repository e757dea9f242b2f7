"""Vision transformer trunks of DINOv2: [B,H,W,3] normalised pixels -> the blocks' outputs [B,H/14,W/14,D], NHWC.

Architecture: Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021, with pre-norm blocks and exact GELU; Oquab
et al., DINOv2, TMLR 2024, for patches of 14 px and a scale on each residual branch (Touvron et al., LayerScale, ICCV
2021), which conversion folds into the matrix before it. No registers. Stage i is the output of block i, not
normalised, without the class token. The position embedding is learned for one grid, and conversion resamples it once.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

PATCH = 14
MLP_RATIO = 4
EPSILON = 1e-6  # of every LayerNorm


class Block(nn.Module):
    """Pre-norm self-attention and MLP, each added to its input: [B,T,D] -> [B,T,D]."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, dtype = x.shape[-1], x.dtype
        update = self._attend(nn.LayerNorm(epsilon=EPSILON, dtype=dtype, name="norm1")(x))
        x = x + nn.Dense(width, dtype=dtype, name="project")(update)
        update = nn.LayerNorm(epsilon=EPSILON, dtype=dtype, name="norm2")(x)
        update = nn.gelu(nn.Dense(MLP_RATIO * width, dtype=dtype, name="expand")(update), approximate=False)
        return x + nn.Dense(width, dtype=dtype, name="contract")(update)

    def _attend(self, x: jax.Array) -> jax.Array:
        """Attention of all tokens to all, heads moved in front of tokens (the fast order on CPU)."""
        batch, tokens, width = x.shape
        head = width // self.heads
        x = nn.Dense(3 * width, dtype=x.dtype, name="qkv")(x)
        q, k, v = x.reshape(batch, tokens, 3, self.heads, head).transpose(2, 0, 3, 1, 4)
        logits = jnp.einsum("bntd,bnsd->bnts", q, k) / head**0.5
        weights = nn.softmax(logits.astype(jnp.float32)).astype(x.dtype)
        return jnp.einsum("bnts,bnsd->bntd", weights, v).transpose(0, 2, 1, 3).reshape(batch, tokens, width)


class VisionTransformer(nn.Module):
    """The trunk for images of one size, `grid` patches of 14 px; the default grid is that of 252 x 252 px.

    It computes in `dtype`, which the stage ends have too.
    """

    width: int
    heads: int
    depth: int = 12
    grid: tuple[int, int] = (18, 18)
    dtype: Any = jnp.float32

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of the stage ends, one a block."""
        return (self.width,) * self.depth

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the only images that the network takes."""
        return PATCH * self.grid[0], PATCH * self.grid[1]

    @nn.compact
    def __call__(self, x: jax.Array, stages: tuple[int, ...] | None = None) -> tuple[jax.Array, ...]:
        """The outputs of the blocks named in `stages` (1..depth; None: all), in that order.

        Blocks behind the deepest of them are not run.

        Raises:
            ValueError: there is no such stage, or images are of another size than the grid's.
        """
        stages = tuple(range(1, self.depth + 1)) if stages is None else stages
        if not stages or not set(stages) <= set(range(1, self.depth + 1)):
            raise ValueError(f"stages must be some of 1 to {self.depth}, got {stages}")
        x = self._tokens(x.astype(self.dtype))
        ends = {}
        for number in range(1, max(stages) + 1):
            x = Block(self.heads, name=f"block_{number}")(x)
            ends[number] = x
        return tuple(ends[i][:, 1:].reshape(x.shape[0], *self.grid, self.width) for i in stages)

    def _tokens(self, x: jax.Array) -> jax.Array:
        """The class token and the embedded patches, positions added: [B,1+T,D]."""
        if x.shape[1:3] != self.image_size:
            wanted, came = ("x".join(map(str, size)) for size in (self.image_size, x.shape[1:3]))
            raise ValueError(
                f"this vision transformer sees {self.grid[0]}x{self.grid[1]} patches of {PATCH} px: images must be "
                f"{wanted} px, got {came}; use an image size of {self.image_size[0]} (a multiple of {PATCH})"
            )
        batch, (h, w) = x.shape[0], self.grid
        # A convolution whose stride is its size is a matrix product over the patches' pixels.
        patches = x.reshape(batch, h, PATCH, w, PATCH, 3).transpose(0, 1, 3, 2, 4, 5).reshape(batch, h * w, -1)
        patches = nn.Dense(self.width, dtype=x.dtype, name="patch")(patches)
        positions = self.param("positions", nn.initializers.normal(0.02), (h * w, self.width)).astype(x.dtype)
        # With its own position added: nothing else ever reads either.
        token = self.param("class_token", nn.initializers.normal(0.02), (self.width,)).astype(x.dtype)
        token = jnp.broadcast_to(token, (batch, 1, self.width))
        return jnp.concatenate([token, patches + positions[None]], axis=1)
