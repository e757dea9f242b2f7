"""Frozen features: resampling by hand and against slow oracles, the standardisation's moments, and whole data sets."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.backbones import Backbone
from pushpull_jax.features import (
    FeatureSpec,
    Standardisation,
    channel_moments,
    extract,
    extract_all,
    fit_standardisation,
    joined_moments,
    raw,
    to_grid,
)
from pushpull_jax.models.efficientnet import EfficientNet
from pushpull_jax.scoring import upsample

TRACES = []


@dataclass(frozen=True)
class CountingBackbone(Backbone):
    """Notes every trace of the trunk: compiled code does not come by here."""

    def stage_ends(self, parameters, images, stages):
        TRACES.append(images.shape)
        return super().stage_ends(parameters, images, stages)


TINY = CountingBackbone(
    name="tiny",
    network=EfficientNet(width=0.1, depth=0.1, lite=True, padding="tf", depthwise="conv"),
    mean=(120.0, 127.0, 134.0),
    deviation=(128.0, 64.0, 100.0),
    epsilon=1e-3,
    source="random",
    licence="none",
)
SPEC = FeatureSpec(backbone=TINY, stages=(1, 3), grid=8, resample="bilinear")


@pytest.fixture(scope="module")
def parameters():
    image = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda: TINY.network.init(jax.random.key(0), image, (1, 2, 3)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def extract_two(parameters):
    """`extract` of two images, compiled once for the module."""
    return functools.partial(jax.jit(functools.partial(extract, SPEC)), parameters)


def random_images(seed, count):
    return np.random.default_rng(seed).uniform(0, 255, (count, 32, 32, 3)).astype(np.float32)


# Resampling.


def oracle_bilinear(end, grid):
    """Bilinear with aligned corners, from its definition, in float64; [i,j,c] -> [grid,grid,c]."""
    result = np.zeros((grid, grid, end.shape[-1]))
    for cell in np.ndindex(grid, grid):
        at = [k * (n - 1) / (grid - 1) if grid > 1 else 0 for k, n in zip(cell, end.shape[:2], strict=True)]
        for index in np.ndindex(end.shape[:2]):
            weight = np.prod([max(0, 1 - abs(a - i)) for a, i in zip(at, index, strict=True)])
            result[cell] += weight * end[index].astype(np.float64)
    return result


def oracle_area(end, grid):
    """Means over cells: every pixel is cut into grid x grid equal parts, so that cells are whole parts."""
    parts = end.astype(np.float64).repeat(grid, axis=0).repeat(grid, axis=1)
    height, width = end.shape[:2]
    return parts.reshape(grid, height, grid, width, -1).mean(axis=(1, 3))


@pytest.mark.parametrize(
    ("shape", "grid"), [((3, 3), 7), ((7, 7), 3), ((2, 5), 4), ((1, 1), 4), ((1, 3), 5), ((4, 4), 1)]
)
def test_bilinear_against_float64(shape, grid):
    end = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    result = to_grid(jnp.asarray(end), grid, "bilinear")
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, [oracle_bilinear(one, grid) for one in end], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "grid"), [(4, 16), (16, 4), (3, 8)])
def test_bilinear_is_that_of_scoring(size, grid):
    end = np.random.default_rng(1).normal(size=(2, size, size, 5)).astype(np.float32)
    expected = np.moveaxis(upsample(np.moveaxis(end, -1, 1), grid), 1, -1)
    np.testing.assert_allclose(to_grid(jnp.asarray(end), grid, "bilinear"), expected, rtol=1e-5, atol=1e-6)


def column(values):
    """A stage end [1,n,n,1] whose rows hold the values."""
    return jnp.broadcast_to(jnp.asarray(values, jnp.float32)[None, :, None, None], (1, len(values), len(values), 1))


def test_area_by_hand():
    # 4 -> 2: pairs. 3 -> 2: a cell is one and a half pixels, (a + b / 2) / 1.5 and (b / 2 + c) / 1.5.
    np.testing.assert_allclose(to_grid(column([1, 3, 5, 9]), 2, "area")[0, :, 0, 0], [2, 7], rtol=1e-6)
    np.testing.assert_allclose(to_grid(column([3, 6, 12]), 2, "area")[0, :, 0, 0], [4, 10], rtol=1e-6)
    # 2 -> 4, finer than the stage: centres of cells at -1/4, 1/4, 3/4, 5/4 between the two pixels, held at the ends.
    np.testing.assert_allclose(to_grid(column([0, 8]), 4, "area")[0, :, 0, 0], [0, 2, 6, 8], rtol=1e-6)


@pytest.mark.parametrize(("shape", "grid"), [((8, 8), 4), ((5, 5), 3), ((7, 4), 3), ((4, 9), 4), ((6, 6), 1)])
def test_area_against_float64(shape, grid):
    end = np.random.default_rng(2).normal(size=(2, *shape, 3)).astype(np.float32)
    result = np.asarray(to_grid(jnp.asarray(end), grid, "area"))
    np.testing.assert_allclose(result, [oracle_area(one, grid) for one in end], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.mean((1, 2)), end.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("grid", [6, 9])
def test_area_on_a_finer_grid_is_bilinear_between_centres(grid):
    end = np.random.default_rng(3).normal(size=(2, 4, 4, 3)).astype(np.float32)
    expected = jax.image.resize(end, (2, grid, grid, 3), "linear")
    np.testing.assert_allclose(to_grid(jnp.asarray(end), grid, "area"), expected, atol=1e-5)


@pytest.mark.parametrize("resample", ["bilinear", "area"])
def test_a_single_cell_is_broadcast(resample):
    end = jnp.asarray([[[[1.0, -2.0]]], [[[3.0, 4.0]]]])
    np.testing.assert_array_equal(to_grid(end, 3, resample), np.broadcast_to(end, (2, 3, 3, 2)))


@pytest.mark.parametrize("resample", ["bilinear", "area"])
def test_a_stage_of_the_grids_size_is_unchanged(resample):
    end = jnp.asarray(np.random.default_rng(4).normal(size=(1, 4, 4, 2)), jnp.bfloat16)
    result = to_grid(end, 4, resample)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, end.astype(jnp.float32))


# Standardisation.


def fitted_to(features, widths, **options):
    return fit_standardisation(channel_moments(features, sum(widths)), widths, **options)


def test_moments_of_parts_are_those_of_the_whole():
    """However they are parted, none in one part, by numpy in float64."""
    features = np.random.default_rng(4).normal(30, 2, (9, 4, 4, 3)).astype(np.float32)
    parts = [channel_moments(part, 3) for part in np.split(features, (2, 2, 7))]
    assert not parts[1].any()
    exact = features.astype(np.float64)
    count, mean, squares = joined_moments(parts, 3)
    np.testing.assert_array_equal(count, 9 * 16)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(squares, exact.var((0, 1, 2)) * 9 * 16, rtol=1e-5)


def test_moments_after_standardisation():
    rng = np.random.default_rng(5)
    features = rng.gamma(2.0, size=(20, 4, 4, 6)).astype(np.float32) * [1e-3, 1, 1e3, 1, 1, 1] + [0, 5, -7, 0, 0, 1e3]
    fitted, constant = fitted_to(features.astype(np.float32), (2, 4))
    assert fitted.shift.dtype == fitted.scale.dtype == np.float32 and constant == []
    after = fitted(features.astype(np.float32)).astype(np.float64)
    np.testing.assert_allclose(after.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(after.std((0, 1, 2)), 1, rtol=1e-4)


def test_standardisation_by_hand():
    # Values 1 and 5: mean 3, deviation 2 (of the population, not the sample).
    fitted, _ = fitted_to(np.array([1.0, 5.0], np.float32).reshape(2, 1, 1, 1), (1,))
    np.testing.assert_allclose([fitted.shift[0], fitted.scale[0]], [3, 0.5], rtol=1e-6)
    np.testing.assert_allclose(fitted(np.float32([[[[7.0]]]])), 2, rtol=1e-6)


def test_stage_weights_are_shares_of_the_mean_square():
    features = np.random.default_rng(6).normal(3, 2, (50, 4, 4, 8)).astype(np.float32)
    weights, widths = (1.0, 3.0, 4.0), (1, 5, 2)
    after = fitted_to(features, widths, stage_weights=weights)[0](features).astype(np.float64)
    squares = (after**2).mean((0, 1, 2))
    assert squares.mean() == pytest.approx(1, rel=1e-4)
    shares = [part.sum() / squares.sum() for part in np.split(squares, np.cumsum(widths)[:-1])]
    np.testing.assert_allclose(shares, [1 / 8, 3 / 8, 4 / 8], rtol=1e-4)
    # Within a stage the channels weigh the same.
    np.testing.assert_allclose(squares[1:6], squares[1], rtol=1e-4)


def test_only_the_ratio_of_stage_weights_counts():
    features = np.random.default_rng(7).normal(size=(9, 2, 2, 4)).astype(np.float32)
    one, other = (fitted_to(features, (1, 3), stage_weights=w)[0] for w in ((1.0, 2.0), (10.0, 20.0)))
    np.testing.assert_allclose(one.scale, other.scale, rtol=1e-6)
    plain = fitted_to(features, (1, 3))[0]
    in_proportion = fitted_to(features, (1, 3), stage_weights=(1.0, 3.0))[0]
    np.testing.assert_allclose(plain.scale, in_proportion.scale, rtol=1e-6)


def test_constant_channels_are_listed_and_only_shifted():
    features = np.random.default_rng(8).normal(size=(9, 2, 2, 4)).astype(np.float32)
    features[..., 1] = 0.1  # not a float32 number: its mean must still be itself
    features[..., 3] = 0
    fitted, constant = fitted_to(features, (2, 2))
    assert constant == [1, 3]
    np.testing.assert_array_equal(fitted(features)[..., [1, 3]], 0)
    np.testing.assert_array_equal(fitted.scale[[1, 3]], 1)
    assert np.isfinite(fitted.scale).all()
    changed = features.copy()
    changed[..., 3] = 0.25
    np.testing.assert_array_equal(fitted(changed)[..., 3], 0.25)


def test_rounding_noise_is_constant_too():
    # One unit in the last place, about 1e-7 of the value; divided by its own deviation it would be as loud as any.
    values = np.full((40, 2, 2, 2), 3.7, np.float32)
    values[::2] = np.nextafter(np.float32(3.7), np.float32(4))
    values[..., 1] = np.random.default_rng(9).normal(size=(40, 2, 2))
    fitted, constant = fitted_to(values, (2,))
    assert constant == [0] and np.abs(fitted(values)[..., 0]).max() < 1e-6


def test_a_large_offset_is_accumulated_in_float64():
    # Summed in float32, 16,384 values of 1e4 lose about 0.03 of their mean, and squares of 1e8 all of the deviation.
    features = np.random.default_rng(10).normal(1e4, 1, (64, 16, 16, 3)).astype(np.float32)
    fitted, constant = fitted_to(features, (3,))
    exact = features.astype(np.float64)
    np.testing.assert_allclose(fitted.shift, exact.mean((0, 1, 2)), atol=6e-4)  # half a unit in the last place
    np.testing.assert_allclose(1 / fitted.scale, exact.std((0, 1, 2)), rtol=1e-5)
    assert constant == []


def test_the_deviation_is_accumulated_in_float64():
    # Equal addends all round the same way: in float32 the sum of 65,536 squares of 0.3 is off by about 1e-4 of it.
    features = np.where(np.arange(65536) % 2, 0.3, -0.3).astype(np.float32).reshape(256, 16, 16, 1).repeat(3, -1)
    fitted, _ = fitted_to(features, (3,))
    np.testing.assert_allclose(fitted.shift, 0, atol=1e-9)
    np.testing.assert_allclose(fitted.scale, 1 / 0.3, rtol=1e-6)


def test_raw_changes_nothing():
    features = np.random.default_rng(11).normal(size=(2, 3, 3, 5)).astype(np.float32)
    np.testing.assert_array_equal(raw(5)(features), features)


def test_standardisation_is_a_tree():
    fitted = Standardisation(np.float32([1.0, 2.0]), np.float32([3.0, 4.0]))
    features = jnp.ones((1, 1, 1, 2))
    np.testing.assert_array_equal(jax.jit(lambda s, f: s(f))(fitted, features), [[[[0.0, -4.0]]]])


# Extraction.


def test_widths():
    assert SPEC.widths == tuple(TINY.network.stage_widths[i] for i in (0, 2))
    assert SPEC._replace(stages=(1, 2, 3, 4, 5)).widths == TINY.network.stage_widths


def test_extract_is_stages_resampled_and_concatenated(parameters, extract_two):
    images = random_images(0, 2)
    normalised = (images - np.float32(TINY.mean)) / np.float32(TINY.deviation)
    first, third = jax.jit(lambda p, x: TINY.network.apply({"params": p}, x, (1, 3)))(parameters, normalised)
    assert (first.shape[1:3], third.shape[1:3]) == ((16, 16), (4, 4))
    expected = [np.stack([oracle_bilinear(np.asarray(one), 8) for one in end]) for end in (first, third)]
    result = extract_two(images)
    assert result.shape == (2, 8, 8, sum(SPEC.widths)) and result.dtype == jnp.float32
    np.testing.assert_allclose(result, np.concatenate(expected, -1), rtol=1e-4, atol=1e-5)


def batched(images, size):
    return ({"image": images[start : start + size]} for start in range(0, len(images), size))


def test_extract_all_pads_the_last_batch_and_drops_nothing(parameters, extract_two):
    TRACES.clear()
    images = random_images(1, 7)
    features = extract_all(SPEC, parameters, batched(images, 3), batch_size=3)
    assert features.shape == (7, 8, 8, sum(SPEC.widths)) and features.dtype == np.float32
    assert TRACES == [(3, 32, 32, 3)]
    singly = [extract_all(SPEC, parameters, batched(images[i : i + 1], 3), batch_size=3) for i in range(7)]
    assert TRACES == [(3, 32, 32, 3)]
    np.testing.assert_array_equal(features, np.concatenate(singly))
    # Without any padding.
    np.testing.assert_allclose(features[[0, 6]], extract_two(images[[0, 6]]), rtol=1e-4, atol=1e-5)


def test_extract_all_of_nothing(parameters):
    assert extract_all(SPEC, parameters, iter(()), batch_size=3).shape == (0, 8, 8, sum(SPEC.widths))
