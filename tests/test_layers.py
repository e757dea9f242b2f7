"""Convolutions: padding by hand, the two lowerings against each other and slow numpy in float64; batches in parts."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.models.layers import (
    Conv,
    Depthwise,
    Pointwise,
    dense_by_conv,
    dense_by_shifts,
    depthwise_by_conv,
    depthwise_by_shifts,
    depthwise_conv,
    in_parts,
    pad_amounts,
)


@pytest.mark.parametrize(
    ("length", "kernel", "stride", "expected"),
    [
        # By hand: ceil(n / s) windows of k, s apart, need (ceil(n / s) - 1) s + k cells; the odd one comes last.
        (8, 3, 1, (1, 1)),
        (7, 5, 1, (2, 2)),
        (8, 3, 2, (0, 1)),  # 4 windows reach over 9
        (7, 3, 2, (1, 1)),  # 4 windows reach over 9
        (8, 5, 2, (1, 2)),  # 4 windows reach over 11
        (7, 5, 2, (2, 2)),
        (1, 3, 2, (1, 1)),
        (4, 1, 2, (0, 0)),  # windows with gaps between them need no padding, rather than a negative one
        (8, 1, 1, (0, 0)),
    ],
)
def test_tf_padding_by_hand(length, kernel, stride, expected):
    assert pad_amounts(length, kernel=kernel, stride=stride, padding="tf") == expected


@pytest.mark.parametrize(("kernel", "expected"), [(1, (0, 0)), (3, (1, 1)), (5, (2, 2))])
@pytest.mark.parametrize("length", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_symmetric_padding_is_half_the_kernel(length, stride, kernel, expected):
    assert pad_amounts(length, kernel=kernel, stride=stride, padding="symmetric") == expected


def slow_convolution(x, kernel, *, stride, before, after):
    """Float64, one output cell at a time: [H,W,Cin] with [k,k,Cin,Cout] and (rows, columns) to pad -> [H',W',Cout]."""
    padded = np.pad(x.astype(np.float64), (*zip(before, after, strict=True), (0, 0)))
    size = kernel.shape[0]
    rows, columns = ((n - size) // stride + 1 for n in padded.shape[:2])
    out = np.zeros((rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = padded[i * stride : i * stride + size, j * stride : j * stride + size]
            out[i, j] = np.tensordot(window, kernel.astype(np.float64), axes=3)
    return out


def tensors(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("padding", ["tf", "symmetric"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 7), (5, 6), (3, 1)])
def test_lowerings_agree(size, kernel, stride, padding):
    x, weights = tensors(0, (2, *size, 3), (kernel, kernel, 3))
    shifts = depthwise_by_shifts(x, weights, stride=stride, padding=padding)
    conv = depthwise_by_conv(x, weights, stride=stride, padding=padding)
    assert shifts.shape == conv.shape == (2, -(-size[0] // stride), -(-size[1] // stride), 3)
    np.testing.assert_allclose(shifts, conv, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["tf", "symmetric"])
@pytest.mark.parametrize(("size", "kernel", "stride"), [((8, 7), 3, 2), ((5, 6), 3, 1), ((7, 8), 5, 2), ((3, 1), 3, 2)])
def test_dense_lowerings_agree(size, kernel, stride, padding):
    x, weights = tensors(6, (2, *size, 3), (kernel, kernel, 3, 4))
    shifts = dense_by_shifts(x, weights, stride=stride, padding=padding)
    conv = dense_by_conv(x, weights, stride=stride, padding=padding)
    assert shifts.shape == conv.shape == (2, -(-size[0] // stride), -(-size[1] // stride), 4)
    np.testing.assert_allclose(shifts, conv, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lowering", ["auto", "shift", "conv"])
def test_depthwise_against_slow_numpy(lowering):
    x, weights = tensors(1, (1, 8, 7, 2), (5, 5, 2))
    got = depthwise_conv(x, weights, stride=2, padding="tf", lowering=lowering)
    for c in range(2):
        # "tf", kernel 5, stride 2: (1, 2) on the even axis, (2, 2) on the odd one, as above.
        one = slow_convolution(x[0, ..., c : c + 1], weights[..., c, None, None], stride=2, before=(1, 2), after=(2, 2))
        np.testing.assert_allclose(got[0, ..., c], one[..., 0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(os.environ["JAX_PLATFORMS"] != "cpu", reason="is about the CPU")
def test_auto_sums_shifts_on_cpu():
    x, weights = tensors(2, (1, 6, 6, 2), (3, 3, 2))

    def hlo(lowering):
        function = jax.jit(lambda x, w: depthwise_conv(x, w, stride=1, padding="tf", lowering=lowering))
        return function.lower(x, weights).compile().as_text()

    assert "convolution(" in hlo("conv")
    assert "convolution(" not in hlo("auto")


@pytest.mark.parametrize("lowering", ["auto", "shift", "conv"])
def test_conv_module_against_slow_numpy(lowering):
    x, kernel, bias = tensors(3, (2, 8, 7, 3), (3, 3, 3, 4), (4,))
    layer = Conv(features=4, kernel=3, stride=2, padding="tf", lowering=lowering)
    got = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    for image, one in zip(x, got, strict=True):
        expected = slow_convolution(image, kernel, stride=2, before=(0, 1), after=(1, 1)) + bias
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)


def test_depthwise_module_adds_a_bias():
    x, kernel, bias = tensors(4, (1, 4, 4, 3), (3, 3, 3), (3,))
    layer = Depthwise(kernel=3, stride=1, padding="symmetric")
    got = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    without = depthwise_by_conv(x, kernel, stride=1, padding="symmetric")
    np.testing.assert_allclose(got - without, np.broadcast_to(bias, got.shape), atol=1e-5)


def test_pointwise_module_is_a_matrix_product_at_every_cell():
    x, kernel, bias = tensors(5, (2, 3, 4, 5), (5, 6), (6,))
    got = Pointwise(features=6).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    expected = np.stack([cell.astype(np.float64) @ kernel + bias for cell in x.reshape(-1, 5)])
    np.testing.assert_allclose(got, expected.reshape(2, 3, 4, 6), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (Conv(features=4, kernel=3, stride=2, padding="tf"), {"kernel": (3, 3, 2, 4), "bias": (4,)}),
        (Depthwise(kernel=5, stride=2, padding="tf"), {"kernel": (5, 5, 2), "bias": (2,)}),
        (Pointwise(features=4), {"kernel": (2, 4), "bias": (4,)}),
    ],
)
def test_parameters_are_float32_and_the_output_has_the_dtype_of_the_input(layer, shapes):
    x = jnp.ones((1, 6, 6, 2), jnp.bfloat16)
    out, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    assert {name: leaf.shape for name, leaf in variables["params"].items()} == shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert out.dtype == jnp.bfloat16


# Batches in parts.


@pytest.mark.parametrize(
    ("batch", "limit", "part"),
    # By hand: the largest divisor of the batch up to the limit, and one image at least.
    [(6, 0, 1), (6, 1, 1), (6, 2, 2), (6, 4, 3), (6, 6, 6), (6, 50, 6), (7, 5, 1), (1, 3, 1)],
)
def test_parts_are_the_largest_that_divide_the_batch(batch, limit, part):
    shapes = []

    def function(scale, x):
        shapes.append(x.shape)
        return x[:, ::2] * scale

    (x,) = tensors(7, (batch, 4, 3))
    got = in_parts(function, 2.0, x, limit=limit)
    assert set(shapes) == {(part, 4, 3)}
    np.testing.assert_array_equal(got, x[:, ::2] * 2)


def test_a_symbolic_batch_is_taken_whole():
    (batch,) = jax.export.symbolic_shape("batch")
    double = jax.jit(lambda x: in_parts(lambda scale, x: x * scale, 2.0, x, limit=1))
    exported = jax.export.export(double)(jax.ShapeDtypeStruct((batch, 3), jnp.float32))
    np.testing.assert_array_equal(exported.call(np.ones((5, 3), np.float32)), np.full((5, 3), 2.0))
