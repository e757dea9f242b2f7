"""The nearest-neighbour baseline against a slow float64 brute force, and the draw of its cells."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.errors import InputError
from pushpull_jax.models.nearest import NearestNeighbour, nearest_indices, sample_cells
from pushpull_jax.scoring import score_map

SHAPE, SIZE = (2, 3, 5, 7), 11


def stored(cells):
    """The parameters of a network that stores these cells."""
    return {"params": {"cells": jnp.asarray(cells, jnp.float32)}}


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.fixture
def cells():
    return np.random.default_rng(1).normal(size=(SIZE, SHAPE[-1])).astype(np.float32)


def slow_distances(features, cells):
    """Distances [..., M] to every stored cell, in float64 and as they are defined."""
    difference = features[..., None, :].astype(np.float64) - cells.astype(np.float64)
    return np.sqrt((difference**2).sum(-1))


@pytest.mark.parametrize("block", [1, 7, 30, 1024], ids=lambda block: f"block_{block}")
def test_score_is_the_distance_to_the_nearest_stored_cell(features, cells, block):
    """Blocks of one, with a rest, of exactly the 30 cells, and larger than they are."""
    reconstruction = NearestNeighbour(SIZE, block=block).apply(stored(cells), features)
    assert reconstruction.dtype == jnp.float32
    distances = slow_distances(features, cells)
    np.testing.assert_allclose(score_map(features, reconstruction), distances.min(-1), rtol=1e-6)
    np.testing.assert_array_equal(reconstruction, cells[distances.argmin(-1)])


def test_a_common_offset_changes_no_neighbour():
    """Cells that differ by 1 around 1,000, as raw features do: there ||x||^2 is 64,000,000, and float32 rounds by 4."""
    rng = np.random.default_rng(2)
    cells = (1000 + rng.normal(size=(300, 64))).astype(np.float32)
    features = (1000 + rng.normal(size=(1, 10, 10, 64))).astype(np.float32)
    got = nearest_indices(features.reshape(100, 64), cells)
    np.testing.assert_array_equal(got, slow_distances(features, cells).argmin(-1).ravel())
    # The plain expansion is what the test is about: it fails here.
    plain = np.argmin((cells**2).sum(-1) / 2 - features.reshape(100, 64) @ cells.T, axis=-1)
    assert np.mean(plain != np.asarray(got)) > 0.1


def test_stored_cells_are_reconstructed_exactly(cells):
    """Far from the origin too: the residual is a difference of the features themselves, not of their products."""
    moved = np.float32(cells + 1e4)
    got = NearestNeighbour(SIZE).apply(stored(moved), moved.reshape(1, 1, SIZE, -1))
    np.testing.assert_array_equal(got[0, 0], moved)


def test_equal_distances_give_the_first():
    # By hand, on a line: 1 lies between 0 and 2; the second 0 and the second 2 are never chosen.
    cells = np.float32([[0], [2], [0], [2]])
    np.testing.assert_array_equal(nearest_indices(np.float32([[1], [0], [2], [5]]), cells), [0, 0, 1, 1])
    np.testing.assert_array_equal(nearest_indices(np.float32([[1], [0], [2], [5]]), cells[::-1]), [0, 1, 0, 0])


def test_every_group_has_its_own_neighbour(features, cells):
    """As brute force finds it among the channels of that group alone, and not the one of all channels."""
    widths = (2, 4, 1)
    got = NearestNeighbour(SIZE, widths=widths, block=8).apply(stored(cells), features)
    for start, end in ((0, 2), (2, 6), (6, 7)):
        alone = slow_distances(features[..., start:end], cells[:, start:end])
        np.testing.assert_array_equal(got[..., start:end], cells[alone.argmin(-1), start:end])
    assert not np.array_equal(got, cells[slow_distances(features, cells).argmin(-1)])


def test_widths_must_sum_to_the_channels(features, cells):
    with pytest.raises(ValueError, match=r"widths that sum to the 7 channels, got \(2, 4\)"):
        NearestNeighbour(SIZE, widths=(2, 4)).apply(stored(cells), features)


def test_cells_of_another_number_or_width_do_not_fit(features, cells):
    for wrong in (cells[:-1], cells[:, :-1]):
        with pytest.raises(flax.errors.ScopeParamShapeError, match="cells"):
            NearestNeighbour(SIZE).apply(stored(wrong), features)


def test_forgotten_cells_show(features):
    reconstruction, variables = NearestNeighbour(SIZE).init_with_output(jax.random.key(0), features)
    assert variables["params"]["cells"].shape == (SIZE, SHAPE[-1])
    assert set(variables["params"]) == {"cells"}
    assert np.isnan(score_map(features, reconstruction)).all()


def test_training_changes_nothing_and_needs_no_key(features, cells):
    model = NearestNeighbour(SIZE)
    np.testing.assert_array_equal(
        model.apply(stored(cells), features, train=True), model.apply(stored(cells), features)
    )


def test_memory_is_bounded_by_the_block():
    """4,096 cells against 2,000 are 33 MB of distances at once; a block of 128 takes 1 MB of them."""
    shapes = jax.ShapeDtypeStruct((4, 32, 32, 8), jnp.float32), jax.ShapeDtypeStruct((2000, 8), jnp.float32)

    def temporary(block):
        model = NearestNeighbour(2000, block=block)
        compiled = jax.jit(lambda features, cells: model.apply(stored(cells), features)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(block=4096) > 32e6
    assert temporary(block=128) < 4e6


def test_sets_of_cells_run_side_by_side_under_vmap(features, cells):
    apply = jax.jit(jax.vmap(NearestNeighbour(SIZE, block=8).apply, in_axes=(0, None)))
    got = apply(stored(np.stack([cells, 2 * cells])), features)
    for one, each in zip(got, (cells, 2 * cells), strict=True):
        np.testing.assert_array_equal(one, each[slow_distances(features, each).argmin(-1)])


def test_drawing_as_many_as_there_are_gives_every_cell_once(features):
    np.testing.assert_array_equal(sample_cells([features], images=2, size=30, seed=3), features.reshape(30, 7))


def test_the_draw_is_without_replacement_and_a_function_of_the_seed():
    numbers = np.arange(60.0).reshape(3, 4, 5, 1)
    first, again, other = (sample_cells([numbers], images=3, size=20, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (20, 1)
    assert first.dtype == np.float32
    assert len(np.unique(first)) == 20
    assert (np.diff(first[:, 0]) > 0).all()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_draw_is_uniform_over_all_cells_of_all_images():
    """Each of 12 cells is in a third of 3,000 draws of 4: 1,000 times, with a binomial deviation of 26."""
    numbers = np.arange(12.0).reshape(3, 2, 2, 1)
    drawn = np.concatenate([sample_cells([numbers], images=3, size=4, seed=seed)[:, 0] for seed in range(3000)])
    counts = np.bincount(drawn.astype(int), minlength=12)
    assert np.abs(counts - 1000).max() < 5 * 26


def test_the_draw_does_not_depend_on_the_batches():
    numbers = np.arange(120.0).reshape(5, 4, 3, 2)
    whole, parts = (sample_cells(some, images=5, size=20, seed=0) for some in ([numbers], np.split(numbers, (2, 3))))
    np.testing.assert_array_equal(whole, parts)


def test_features_of_a_device_or_in_half_precision_give_the_same_cells(features):
    expected = sample_cells([features], images=2, size=5, seed=0)
    np.testing.assert_array_equal(sample_cells([jnp.asarray(features)], images=2, size=5, seed=0), expected)
    half = sample_cells([jnp.asarray(features, jnp.bfloat16)], images=2, size=5, seed=0)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, expected, rtol=2**-8)


def test_too_few_cells_are_an_error_of_the_users(features):
    with pytest.raises(InputError, match="31 cells cannot be drawn from 2 training images of 3x5 cells.* have 30"):
        sample_cells([features], images=2, size=31, seed=0)
    with pytest.raises(ValueError, match="size of at least 1, got 0"):
        sample_cells([features], images=2, size=0, seed=0)
