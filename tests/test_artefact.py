"""What an exported program computes of sizes: against the matrices of the host, which have tests of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.artefact import boxes_of, native_matrix, resize_matrix, to_native, to_square
from pushpull_jax.data.images import letterbox_box, resize_image, resize_weights
from pushpull_jax.models.nearest import NearestNeighbour
from pushpull_jax.scoring import interpolation_matrix

SIZES = [(1, 1), (1, 8), (7, 8), (8, 8), (61, 8), (4001, 256)]


def compiled(function, **static):
    """One compilation is quicker than that of each operation."""
    return jax.jit(functools.partial(function, **static))


@pytest.mark.parametrize(("n_in", "size"), SIZES)
def test_resizing_is_that_of_the_host(n_in, size):
    # Both are rounded once or twice to float32 after a sum of at most 2 ratio weights.
    matrix = jax.jit(lambda: resize_matrix(n_in, size, (0, size)))()
    np.testing.assert_allclose(matrix, resize_weights(n_in, size), atol=2e-7)


@pytest.mark.parametrize(("n_out", "size"), SIZES)
def test_interpolation_is_that_of_the_host(n_out, size):
    matrix = jax.jit(lambda: native_matrix(n_out, size, (0, size)))()
    np.testing.assert_allclose(matrix, interpolation_matrix(size, n_out), atol=2e-7)


def test_letterbox_is_that_of_the_host():
    sides = np.random.default_rng(0).integers(1, 5000, (200, 2))
    sides[:4] = [[1, 4000], [4000, 1], [3, 2], [256, 256]]
    (tops, heights), (lefts, widths) = compiled(boxes_of, size=256, mode="letterbox")(*sides.T)
    expected = [letterbox_box(int(height), int(width), 256) for height, width in sides]
    np.testing.assert_array_equal(np.stack([tops, lefts, heights, widths], axis=1), expected)


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
@pytest.mark.parametrize("sides", [(50, 30), (30, 50), (1, 40)])
def test_an_image_becomes_the_square_of_the_host(mode, sides):
    image = np.random.default_rng(1).integers(0, 256, (*sides, 3), np.uint8)
    square = compiled(to_square, size=16, mode=mode)(image[None])[0]
    np.testing.assert_allclose(square, resize_image(image, size=16, mode=mode), atol=1e-4)  # of 255


def test_a_map_goes_back_into_its_image():
    # By hand: of a letterbox of 40 x 20 in 4 x 4, columns 1 and 2 are the picture; corners are kept.
    square = jnp.arange(16.0).reshape(1, 4, 4)
    native = compiled(to_native, sides=(40, 20), mode="letterbox")(square)
    assert native.shape == (1, 40, 20)
    np.testing.assert_allclose(native[0, [0, 0, -1, -1], [0, -1, 0, -1]], [1, 2, 13, 14], atol=1e-5)
    np.testing.assert_allclose(native[0].mean(), 7.5, atol=1e-5)


def test_sizes_can_be_symbolic_and_are_chosen_when_it_runs():
    def there_and_back(images):
        return to_native(to_square(images, size=8, mode="letterbox")[..., 0], images.shape[1:3], mode="letterbox")

    shape = jax.export.symbolic_shape("b, h, w, 3")
    exported = jax.export.export(jax.jit(there_and_back))(jax.ShapeDtypeStruct(shape, jnp.uint8))
    # A constant picture stays constant, whatever the grey beside it.
    call = jax.jit(exported.call)
    for sides in ((5, 9), (20, 8)):
        np.testing.assert_allclose(call(np.full((2, *sides, 3), 200, np.uint8)), 200.0, atol=1e-3)


def test_a_nearest_neighbour_takes_any_number_of_images():
    random = np.random.default_rng(2)
    network = NearestNeighbour(size=5, block=4)
    parameters = {"params": {"cells": jnp.asarray(random.normal(size=(5, 3)), jnp.float32)}}
    shape = jax.export.symbolic_shape("b, 2, 2, 3")
    program = jax.jit(functools.partial(network.apply, parameters))
    call = jax.jit(jax.export.export(program)(jax.ShapeDtypeStruct(shape, jnp.float32)).call)
    for count in (1, 3):
        features = random.normal(size=(count, 2, 2, 3)).astype(np.float32)
        np.testing.assert_array_equal(call(features), program(features))
