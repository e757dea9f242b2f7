"""The convolutional reconstructor: its size, its bottleneck, grids of any side, and that it learns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pushpull_jax.models.convolutional import Convolution, ConvolutionalReconstructor

TINY = ConvolutionalReconstructor(width=6, halvings=1)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_parameters(model, features):
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), features), np.random.default_rng(1)

    def draw(leaf):
        scale = (2 / (9 * leaf.shape[2])) ** 0.5 if leaf.ndim == 4 else 0.3
        return np.float32(rng.normal(size=leaf.shape, scale=scale))

    return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def features():
    return draw(2, 8, 8, 3)


@pytest.fixture(scope="module")
def tiny(features):
    """A tiny network: its variables, and the compiled function of (variables, features)."""
    return random_parameters(TINY, features), jax.jit(TINY.apply)


def count(model, channels):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, channels)))
    assert set(variables) == {"params"}
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def test_parameter_count_by_hand():
    # A convolution has 9 in out + out: 720 -> 256, then four in each of two halvings, then 256 -> 720.
    expected = (9 * 720 * 256 + 256) + 8 * (9 * 256 * 256 + 256) + (9 * 256 * 720 + 720)
    assert expected == 8_039_376
    assert count(ConvolutionalReconstructor(), 720) == expected
    assert abs(expected / 7_812_560 - 1) < 0.05  # the transformer's


@pytest.mark.parametrize(("grid", "stride"), [((4, 6), 1), ((4, 6), 2), ((5, 7), 2), ((5, 4), 1), ((1, 3), 2)])
def test_a_convolution_is_xlas(grid, stride):
    """TensorFlow's SAME padding is XLA's: of an even side and a stride of 2 the one cell comes last."""
    x, kernel, bias = draw(2, *grid, 3), draw(3, 3, 3, 5, seed=1), draw(5, seed=2)
    got = Convolution(5, stride).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=layout)
    np.testing.assert_allclose(got, expected + bias[None, None, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(8, 8), (18, 18), (16, 16), (32, 32), (5, 7), (1, 3), (1, 1)])
@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_any_grid_keeps_its_shape(grid, halvings):
    model = ConvolutionalReconstructor(width=4, halvings=halvings)
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, *grid, 3)))
    assert out.shape == (2, *grid, 3)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize(
    ("grid", "halvings", "expected"),
    [((16, 16), 2, (4, 4)), ((18, 18), 2, (5, 5)), ((8, 6), 1, (4, 3)), ((5, 1), 2, (2, 1))],
)
def test_the_bottleneck_is_the_grid_halved_and_rounded_up(grid, halvings, expected):
    model, sizes = ConvolutionalReconstructor(width=4, halvings=halvings), {}

    def note(method, args, kwargs, context):
        out = method(*args, **kwargs)
        sizes[context.module.name] = out.shape[1:3]
        return out

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *grid, 3)))
    assert min(sizes.values()) == sizes[f"down_{halvings - 1}"] == expected
    assert sizes["in"] == sizes["out"] == grid


def test_everything_passes_the_bottleneck(tiny, features):
    """With the convolution at the bottleneck silenced, no feature reaches the output: nothing goes around it."""
    variables, apply = tiny
    assert np.abs(apply(variables, features) - apply(variables, features * 3 + 1)).max() > 0.01
    silent = {"params": variables["params"] | {"down_0": jax.tree.map(jnp.zeros_like, variables["params"]["down_0"])}}
    np.testing.assert_array_equal(apply(silent, features), apply(silent, features * 3 + 1))


def test_images_of_a_batch_do_not_see_each_other(tiny, features):
    variables, apply = tiny
    before, after = apply(variables, features), apply(variables, features.at[1].multiply(-2))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-6)
    assert np.abs(after[1] - before[1]).max() > 0.01


def test_output_is_float32_whatever_is_computed_in(tiny, features):
    variables, apply = tiny
    expected = apply(variables, features)
    half = ConvolutionalReconstructor(width=6, halvings=1, dtype=jnp.bfloat16)
    got = jax.jit(half.apply)(variables, features)
    assert got.dtype == jnp.float32
    # bfloat16 has 8 bits: near, and yet not the same, or it was not computed in bfloat16.
    assert 1e-4 < np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.1
    shapes = jax.eval_shape(half.init, jax.random.key(0), features)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_training_mode_needs_no_key(tiny, features):
    shape = jax.eval_shape(lambda variables: TINY.apply(variables, features, train=True), tiny[0])
    assert shape.shape == features.shape


def test_it_learns_what_is_normal():
    """Images that differ in one number, times a pattern: from an error near their variance, 1, to a tenth of it."""
    pattern = draw(1, 8, 8, 4, seed=3)
    features = jnp.asarray([-1.5, -0.5, 0.5, 1.5])[:, None, None, None] * pattern
    model, optimizer = ConvolutionalReconstructor(width=8, halvings=1), optax.adam(5e-3)
    variables = jax.jit(model.init)(jax.random.key(0, impl="rbg"), features)  # compiles in a sixth of the time

    def error(variables):
        return jnp.square(model.apply(variables, features) - features).mean() / jnp.square(features).mean()

    def step(carry, _):
        variables, state = carry
        value, gradients = jax.value_and_grad(error)(variables)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(variables, updates), state), value

    _, errors = jax.jit(lambda carry: jax.lax.scan(step, carry, length=100))((variables, optimizer.init(variables)))
    assert errors[0] > 0.5
    assert errors[-1] < 0.1
