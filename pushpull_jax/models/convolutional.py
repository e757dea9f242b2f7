"""The paper's ablation "CNN instead of transformer": a convolutional autoencoder, [B,h,w,C] -> [B,h,w,C].

The paper gives this network's result and nothing else of it, so that every choice here is ours: 3x3 convolutions with
ReLU, a bottleneck of a quarter of the grid's side, no connection around it, and a width that gives about as many
parameters as the transformer has: 8,039,376 for the paper's 720 channels, against 7,812,560.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pushpull_jax.models.layers import pad_amounts


class Convolution(nn.Module):
    """A 3x3 convolution with TensorFlow's SAME padding, [B,h,w,C] -> [B,ceil(h/stride),ceil(w/stride),width] float32.

    One matrix product of the nine shifted slices side by side: within a loop, where training steps are, XLA's
    own convolution and its gradient take about 50 times as long on CPU.
    """

    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, h, w, channels = x.shape
        # He's initialisation keeps the variance through ReLU.
        kernel = self.param("kernel", nn.initializers.he_uniform(), (3, 3, channels, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        pads = [pad_amounts(length, kernel=3, stride=self.stride, padding="tf") for length in (h, w)]
        x = jnp.pad(x.astype(self.dtype), ((0, 0), *pads, (0, 0)))
        rows, columns = (slice(0, length, self.stride) for length in (h, w))
        shifted = [x[:, i : i + h, j : j + w][:, rows, columns] for i in range(3) for j in range(3)]
        kernel = kernel.reshape(-1, self.width).astype(self.dtype)
        out = jnp.matmul(jnp.concatenate(shifted, axis=-1), kernel, preferred_element_type=jnp.float32)
        return out + bias[None, None, None]


class ConvolutionalReconstructor(nn.Module):
    """An autoencoder of 3x3 convolutions on the feature grid, [B,h,w,C] -> [B,h,w,C] float32.

    Each of `halvings` halves the grid by a stride of 2, an odd side rounded up; on the way back every cell is repeated
    2 x 2, an odd side cut to what it was. Each such step ends with one more convolution. There is no dropout: `train`
    changes nothing.
    """

    width: int = 256
    halvings: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
        def convolve(x: jax.Array, name: str, stride: int = 1) -> jax.Array:
            return nn.relu(Convolution(self.width, stride, self.dtype, name=name)(x))

        x, sizes = convolve(features, "in"), []
        for i in range(self.halvings):
            sizes.append(x.shape[1:3])
            x = convolve(convolve(x, f"down_{i}_halve", stride=2), f"down_{i}")
        for i in reversed(range(self.halvings)):
            h, w = sizes[i]
            x = x.repeat(2, axis=1).repeat(2, axis=2)[:, :h, :w]
            x = convolve(convolve(x, f"up_{i}_double"), f"up_{i}")
        return Convolution(features.shape[-1], dtype=self.dtype, name="out")(x)
