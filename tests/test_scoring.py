"""Scores and maps against slow float64 oracles, numbers by hand, scipy, and properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from scipy.ndimage import gaussian_filter

from pushpull_jax.scoring import image_score, interpolation_matrix, score_map, smooth, upsample

DTYPES = ["float32", "bfloat16", "float16", "float64", "int32"]


def random_maps(seed, shape):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def as_dtype(array, dtype):
    return array.astype(dtype) if dtype == "float64" else jnp.asarray(array, dtype)


def oracle_upsample(values, size):
    """Bilinear with align_corners, pixel by pixel, from its definition; one map."""
    result = np.zeros(size)
    for index in np.ndindex(size):
        position = [i * (n - 1) / (m - 1) if m > 1 else 0 for i, n, m in zip(index, values.shape, size, strict=True)]
        for corner in np.ndindex(values.shape):
            weight = np.prod([max(0, 1 - abs(p - c)) for p, c in zip(position, corner, strict=True)])
            result[index] += weight * values[corner]
    return result


def oracle_image_score(values, window):
    """Maximum of all window means, by a double loop; one map."""
    height, width = values.shape
    means = [
        values[i : i + window, j : j + window].mean()
        for i in range(height - window + 1)
        for j in range(width - window + 1)
    ]
    return max(means)


# The score map.


def test_score_map_by_hand():
    features = np.array([[[3.0, 4, 0], [0, 0, 0]], [[1, 2, 2], [-5, 0, 12]]])
    np.testing.assert_allclose(score_map(features, np.zeros((2, 2, 3))), [[5, 0], [3, 13]], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_map_agrees_with_float64(dtype):
    rng = np.random.default_rng(0)
    # Of different sizes, so that half precision could not subtract them exactly.
    features = as_dtype(100 + 3 * rng.normal(size=(2, 4, 5, 9)), dtype)
    reconstruction = as_dtype(3 * rng.normal(size=(2, 4, 5, 9)), dtype)
    scores = score_map(features, reconstruction)
    expected = np.linalg.norm(np.asarray(features, np.float64) - np.asarray(reconstruction, np.float64), axis=-1)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_score_map_gradient():
    # d / ||d|| where d is not 0, and 0 where it is: (3, 4) gives (0.6, 0.8).
    features = np.array([[[3.0, 4.0], [0.0, 0.0]]], np.float32)
    gradient = jax.grad(lambda f: jnp.sum(score_map(f, jnp.zeros((1, 2, 2)))))(features)
    np.testing.assert_allclose(gradient, [[[0.6, 0.8], [0, 0]]], rtol=1e-6)


def test_score_map_is_finite_to_the_end_of_its_domain():
    for size in (1e-30, 1e-20, 1e6):
        features = jnp.full((1, 1, 720), size)
        value, gradient = jax.jit(jax.value_and_grad(lambda f: score_map(f, -f)[0, 0]))(features)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    assert float(value) == pytest.approx(2e6 * 720**0.5, rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 1), (3, 3), (1, 2, 3, 3), (2, 3, 4)])
def test_score_map_does_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"reconstruction \[2, 3, 3\]"):
        score_map(jnp.zeros(shape), jnp.zeros((2, 3, 3)))


# Upsampling.


def test_interpolation_matrix_by_hand():
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    matrix = interpolation_matrix(3, 5)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_array_equal(interpolation_matrix(1, 3), [[1], [1], [1]])
    np.testing.assert_array_equal(interpolation_matrix(3, 1), [[1, 0, 0]])
    np.testing.assert_array_equal(interpolation_matrix(5, 3), np.eye(5)[::2])
    np.testing.assert_array_equal(interpolation_matrix(1, 1), [[1]])


@pytest.mark.parametrize("n_in", [1, 2, 7, 16, 38])
@pytest.mark.parametrize("n_out", [1, 2, 7, 38, 256])
def test_interpolation_matrix_properties(n_in, n_out):
    matrix = interpolation_matrix(n_in, n_out)
    assert matrix.shape == (n_out, n_in) and (matrix >= 0).all() and ((matrix > 0).sum(axis=1) <= 2).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-7)
    if n_in > 1:
        np.testing.assert_allclose(matrix @ np.linspace(-1, 2, n_in), np.linspace(-1, 2, n_out), atol=1e-6)
    np.testing.assert_array_equal(interpolation_matrix(n_in, n_in), np.eye(n_in))


@pytest.mark.parametrize(
    ("shape", "size"), [((4, 4), (9, 9)), ((3, 5), (7, 12)), ((1, 4), (5, 6)), ((4, 1), (3, 2)), ((5, 6), (3, 1))]
)
def test_upsample_agrees_with_float64(shape, size):
    maps = random_maps(1, shape)
    np.testing.assert_allclose(upsample(maps, size), oracle_upsample(maps.astype(np.float64), size), rtol=1e-5)


def test_upsample_reproduces_ramps_and_corners():
    rows, columns = np.mgrid[:16, :16] / 15
    large_rows, large_columns = np.mgrid[:256, :256] / 255
    ramp = upsample(2 * rows - 3 * columns + 1, 256)
    np.testing.assert_allclose(ramp, 2 * large_rows - 3 * large_columns + 1, atol=2e-6)
    maps = random_maps(2, (5, 7))
    large = np.asarray(upsample(maps, (20, 30)))
    np.testing.assert_array_equal(large[::19, ::29], maps[::4, ::6])
    assert large.min() >= maps.min() * (1 - 1e-6) and large.max() <= maps.max() * (1 + 1e-6)


def test_upsample_size():
    maps = random_maps(3, (2, 4, 4))
    np.testing.assert_array_equal(upsample(maps, 9), upsample(maps, (9, 9)))
    np.testing.assert_array_equal(upsample(maps, 4), maps)
    np.testing.assert_array_equal(upsample(maps[:, :1, :1], (3, 5))[1], np.full((3, 5), maps[1, 0, 0]))
    for size in (0, (4, 0), (-1, 4)):
        with pytest.raises(ValueError, match="at least 1"):
            upsample(maps, size)
    with pytest.raises(TypeError):
        upsample(maps, 8.0)


# Smoothing.


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.3, 4.0, 30.0])
@pytest.mark.parametrize("shape", [(20, 31), (3, 9), (1, 8)])
def test_smooth_agrees_with_scipy(shape, sigma):
    maps = random_maps(4, shape)
    expected = gaussian_filter(maps.astype(np.float64), sigma, mode="nearest")
    np.testing.assert_allclose(smooth(maps, sigma=sigma), expected, rtol=1e-5)


def test_smooth_by_hand_and_properties():
    # A point far from the edges becomes the kernel: neighbours at exp(-1/2) of the centre, at sigma 1.
    point = np.zeros((21, 21))
    point[10, 10] = 1
    smoothed = np.asarray(smooth(point, sigma=1.0))
    assert smoothed[10, 11] / smoothed[10, 10] == pytest.approx(np.exp(-0.5), rel=1e-5)
    assert smoothed[10, 14] > 0 and smoothed[10, 15] == 0  # cut off at 4 sigma
    assert smoothed.sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(smoothed, smoothed.T, rtol=1e-5)
    np.testing.assert_allclose(smooth(np.full((8, 9), 7.0), sigma=3.0), 7, rtol=1e-6)
    maps = random_maps(5, (2, 8, 9))
    np.testing.assert_array_equal(smooth(maps, sigma=0), maps)
    for sigma in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sigma"):
            smooth(maps, sigma=sigma)


# The image score.


def test_image_score_by_hand():
    # Window means of 2x2: 3, 4, 6, 7. Columns and rows are told apart by the second, [1, 2, 9] over [0, 0, 0].
    assert float(image_score(np.arange(1.0, 10).reshape(3, 3), window=2)) == 7.0
    assert float(image_score(np.array([[1.0, 2, 9], [0, 0, 0]]), window=2)) == 2.75
    assert float(image_score(np.array([[-3.0, -1], [-2, -5]]), window=1)) == -1


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
def test_image_score_agrees_with_a_double_loop(window):
    maps = random_maps(6, (3, 8, 11)) * np.float32([[[1]], [[-1]], [[1e6]]])
    expected = [oracle_image_score(m.astype(np.float64), window) for m in maps]
    np.testing.assert_allclose(image_score(maps, window=window), expected, rtol=1e-6)


def test_image_score_default_window_is_16():
    maps = random_maps(7, (20, 24))
    np.testing.assert_allclose(image_score(maps), oracle_image_score(maps.astype(np.float64), 16), rtol=1e-6)


def test_image_score_does_not_cancel():
    # One pixel of 1e6 before many of 1e-3: with cumulative sums the windows behind it would lose their digits.
    maps = np.full((40, 40), 1e-3, np.float32)
    maps[0, 0] = -1e6
    np.testing.assert_allclose(image_score(maps), 1e-3, rtol=1e-6)


def test_image_score_gradient():
    # The mean over the best window alone: 1/4 on each of its pixels.
    gradient = jax.grad(lambda maps: image_score(maps, window=2))(jnp.arange(9.0).reshape(3, 3))
    np.testing.assert_array_equal(gradient, [[0, 0, 0], [0, 0.25, 0.25], [0, 0.25, 0.25]])


@pytest.mark.parametrize("window", [-1, 0, 7, 16])
def test_image_score_window_out_of_range(window):
    with pytest.raises(ValueError, match=rf"1\.\.6.*6x9.*window = {window}$"):
        image_score(jnp.zeros((2, 6, 9)), window=window)


# Types, axes and transformations.


def score(features, reconstruction):
    """The whole way from features to image scores, and the maps in between."""
    grid = score_map(features, reconstruction)
    maps = smooth(upsample(grid, (12, 15)), sigma=1.2)
    return {"grid": grid, "maps": maps, "scores": image_score(maps, window=3)}


jitted_score = jax.jit(score)


@pytest.mark.parametrize("leading", [(), (2, 3), (0,)])
def test_any_leading_axes_jit_and_vmap(leading):
    features, reconstruction = random_maps(8, (*leading, 4, 5, 6)), random_maps(9, (*leading, 4, 5, 6))
    results = score(features, reconstruction)
    assert [results[name].shape for name in ("grid", "maps", "scores")] == [
        (*leading, 4, 5),
        (*leading, 12, 15),
        leading,
    ]
    jitted = jitted_score(features, reconstruction)
    mapped = score
    for _ in leading:
        mapped = jax.vmap(mapped)
    mapped = jax.jit(mapped)(features, reconstruction) if 0 not in leading else results
    for name, result in results.items():
        np.testing.assert_allclose(jitted[name], result, rtol=1e-5)
        np.testing.assert_allclose(mapped[name], result, rtol=1e-5)
        for index in np.ndindex(leading):
            alone = jitted_score(features[index], reconstruction[index])
            np.testing.assert_allclose(result[index], alone[name], rtol=1e-5)


def test_gradient_under_vmap_and_jit():
    features, reconstruction = random_maps(10, (3, 4, 5, 6)), random_maps(11, (3, 4, 5, 6))
    batched = jax.grad(lambda f: jnp.sum(score(f, reconstruction)["scores"]))(features)
    mapped = jax.jit(jax.vmap(jax.grad(lambda f, r: score(f, r)["scores"])))(features, reconstruction)
    assert np.isfinite(batched).all() and np.abs(batched).max() > 0
    np.testing.assert_allclose(mapped, batched, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_are_float32_whatever_comes_in(dtype):
    maps = as_dtype(100 * random_maps(12, (2, 6, 7)), dtype)
    exact = np.asarray(maps, np.float64)
    functions = [
        (lambda m: upsample(m, (9, 10)), lambda m: oracle_upsample(m, (9, 10))),
        (lambda m: smooth(m, sigma=1.0), lambda m: gaussian_filter(m, 1.0, mode="nearest")),
        (lambda m: smooth(m, sigma=0), lambda m: m),
        (lambda m: image_score(m, window=3), lambda m: oracle_image_score(m, 3)),
    ]
    for function, oracle in functions:
        result = function(maps)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, [oracle(m) for m in exact], rtol=1e-5)


def test_float32_under_x64_too():
    with jax.enable_x64(True):
        features = jnp.asarray(np.random.default_rng(13).normal(size=(2, 4, 5, 3)))
        assert features.dtype == jnp.float64
        results = jitted_score(features, 0 * features)
        maps = features[..., 0]
        results |= {"upsample": upsample(maps, 8), "smooth": smooth(maps, sigma=1.0), "same": smooth(maps, sigma=0)}
    assert {result.dtype for result in results.values()} == {jnp.dtype("float32")}


def test_full_precision_is_asked_for():
    # On CPU every precision is float32, so the program is read: both contractions of both functions ask for it.
    for function in (lambda maps: upsample(maps, 8), lambda maps: smooth(maps, sigma=1.0)):
        assert str(jax.make_jaxpr(function)(jnp.zeros((4, 4)))).count("Precision.HIGHEST, Precision.HIGHEST") == 2


def test_traced_once_for_one_shape():
    traces = []

    @jax.jit
    def compiled(features, reconstruction):
        traces.append(1)
        return score(features, reconstruction)

    for seed in range(3):
        compiled(random_maps(seed, (2, 4, 5, 3)), random_maps(seed + 1, (2, 4, 5, 3)))
    assert len(traces) == 1


def test_exports_with_a_symbolic_batch():
    shape = export.symbolic_shape("b, 4, 5, 6")
    argument = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = export.export(jax.jit(score))(argument, argument)
    features, reconstruction = random_maps(14, (3, 4, 5, 6)), random_maps(15, (3, 4, 5, 6))
    expected = score(features, reconstruction)
    for name, result in exported.call(features, reconstruction).items():
        np.testing.assert_allclose(result, expected[name], rtol=1e-5)


@pytest.mark.parametrize("function", [lambda m: upsample(m, 8), lambda m: smooth(m, sigma=0), image_score])
def test_maps_need_two_axes(function):
    with pytest.raises(ValueError, match=r"got maps \[4\]"):
        function(jnp.zeros(4))
