"""Convolutions of the frozen backbones: dense, pointwise and depthwise, NHWC, with the padding of either weight family.

Batch normalisation is folded into kernel and bias when weights are converted, so that a layer here is a
convolution plus a bias. The bias cancels much of the convolution, so that their sum is taken in float32 and then
rounded to the dtype of the input. Convolutions have two lowerings that agree to float rounding: XLA's own, right on GPU
and TPU, and shifted slices for the CPU: a depthwise convolution is their weighted sum, which XLA fuses into one loop
and which is 10 to 60 times faster there, a dense one of few channels the sum of as many.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Padding = Literal["tf", "symmetric"]
Lowering = Literal["auto", "shift", "conv"]


def pad_amounts(length: int, *, kernel: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Rows to add before and after an axis of `length`.

    "tf" is TensorFlow's SAME (the odd row comes last; Keras, EfficientNet-PyTorch, timm's `tf_*`), "symmetric" is
    kernel // 2 on both sides (timm's own weights, torchvision).
    """
    if padding == "symmetric":
        return kernel // 2, kernel // 2
    total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


def _spatial_pads(x: jax.Array, kernel: int, stride: int, padding: Padding) -> list[tuple[int, int]]:
    return [pad_amounts(length, kernel=kernel, stride=stride, padding=padding) for length in x.shape[1:3]]


def _shifted(x: jax.Array, size: int, *, stride: int, padding: Padding) -> list[jax.Array]:
    """The k*k slices [B,H',W',C] of the padded [B,H,W,C] that meet each cell of a kernel, row by row.

    For stride 2 the padded rows and columns are first split into phases, so that every slice is contiguous.
    """
    rows, columns = _spatial_pads(x, size, stride, padding)
    out_h, out_w = ((n + sum(pads) - size) // stride + 1 for n, pads in zip(x.shape[1:3], (rows, columns), strict=True))
    # Padding up to a multiple of the stride makes the phase split a reshape; the extra rows are never read.
    more_h, more_w = ((-(n + sum(pads))) % stride for n, pads in zip(x.shape[1:3], (rows, columns), strict=True))
    x = jnp.pad(x, ((0, 0), (rows[0], rows[1] + more_h), (columns[0], columns[1] + more_w), (0, 0)))
    x = x.reshape(x.shape[0], x.shape[1] // stride, stride, x.shape[2] // stride, stride, x.shape[-1])
    return [
        x[:, i // stride : i // stride + out_h, i % stride, j // stride : j // stride + out_w, j % stride]
        for i in range(size)
        for j in range(size)
    ]


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B,H,W,Cin] times [Cin,Cout], accumulated to float32."""
    return jnp.einsum("bhwc,cd->bhwd", x, kernel, preferred_element_type=jnp.float32)


def depthwise_by_shifts(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """Depthwise convolution of [B,H,W,C] with [k,k,C], float32: a sum of k*k shifted slices, each times its weight."""
    slices = _shifted(x, kernel.shape[0], stride=stride, padding=padding)
    weights = kernel.astype(jnp.float32).reshape(-1, 1, 1, 1, kernel.shape[-1])
    return sum(part.astype(jnp.float32) * weights[i] for i, part in enumerate(slices))


def depthwise_by_conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """The same convolution by XLA's grouped convolution."""
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        window_strides=(stride, stride),
        padding=_spatial_pads(x, kernel.shape[0], stride, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    ).astype(jnp.float32)


def dense_by_shifts(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """Convolution of [B,H,W,Cin] with [k,k,Cin,Cout], float32: a sum of k*k*Cin channels of shifted slices."""
    slices = _shifted(x, kernel.shape[0], stride=stride, padding=padding)
    weights = kernel.astype(jnp.float32).reshape(-1, kernel.shape[2], 1, 1, 1, kernel.shape[3])
    channels = range(kernel.shape[2])
    return sum(
        part[..., c, None].astype(jnp.float32) * weights[i, c] for i, part in enumerate(slices) for c in channels
    )


def dense_by_conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """The same convolution by XLA's own."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=_spatial_pads(x, kernel.shape[0], stride, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).astype(jnp.float32)


def lowered(lowering: Lowering, *operands: Any, shift: Callable[..., Any], conv: Callable[..., Any]) -> Any:
    """One of two functions that agree; "auto" takes `shift` on CPU and `conv` elsewhere, decided when XLA compiles."""
    if lowering == "auto":
        return lax.platform_dependent(*operands, cpu=shift, default=conv)
    return (shift if lowering == "shift" else conv)(*operands)


def depthwise_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding, lowering: Lowering = "auto"
) -> jax.Array:
    """Depthwise convolution; "auto" sums shifts on CPU and convolves elsewhere, decided when XLA compiles."""
    shift, conv = (
        functools.partial(by, stride=stride, padding=padding) for by in (depthwise_by_shifts, depthwise_by_conv)
    )
    return lowered(lowering, x, kernel, shift=shift, conv=conv)


def dense_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding, lowering: Lowering = "conv"
) -> jax.Array:
    """Dense convolution; "shift" and "auto" are for few input channels, each of which is k*k terms of a sum."""
    shift, conv = (functools.partial(by, stride=stride, padding=padding) for by in (dense_by_shifts, dense_by_conv))
    return lowered(lowering, x, kernel, shift=shift, conv=conv)


def in_parts(function: Callable[..., jax.Array], parameters: Any, x: jax.Array, *, limit: int) -> jax.Array:
    """Apply `function(parameters, part)` to parts of a batch in turn, in one loop that reuses its memory.

    Args:
        function: [b,...] -> [b,...], each example by itself.
        parameters: handed to every call.
        x: [B,...]. A symbolic batch size, as `jax.export` has them, has no divisors: it is taken whole.
        limit: examples a part; the largest divisor of B that does not exceed it is taken, 1 at least.
    """
    if not isinstance(x.shape[0], int):
        return function(parameters, x)
    size = max(n for n in range(1, max(limit, 1) + 1) if x.shape[0] % n == 0)
    if size == x.shape[0]:
        return function(parameters, x)
    parts = x.reshape(x.shape[0] // size, size, *x.shape[1:])
    out = lax.map(functools.partial(function, parameters), parts)
    return out.reshape(x.shape[0], *out.shape[2:])


class Conv(nn.Module):
    """Dense convolution [B,H,W,Cin] -> [B,H',W',features] with a bias."""

    features: int
    kernel: int
    stride: int
    padding: Padding
    lowering: Lowering = "conv"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        out = dense_conv(x, kernel, stride=self.stride, padding=self.padding, lowering=self.lowering)
        return (out + bias[None, None, None, :]).astype(x.dtype)


class Pointwise(nn.Module):
    """1x1 convolution as a matrix product, which is as fast or faster than the convolution on every platform."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features)).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return (_product(x, kernel) + bias[None, None, None, :]).astype(x.dtype)


class Depthwise(nn.Module):
    """Depthwise convolution [B,H,W,C] -> [B,H',W',C] with a bias."""

    kernel: int
    stride: int
    padding: Padding
    lowering: Lowering = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(1 / self.kernel), shape).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        out = depthwise_conv(x, kernel, stride=self.stride, padding=self.padding, lowering=self.lowering)
        return (out + bias[None, None, None, :]).astype(x.dtype)
