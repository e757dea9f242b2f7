"""Whitening against numpy's own covariance and inverse in float64, by hand, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.whitening import (
    Moments,
    Whitening,
    block_means,
    fit_whitening,
    largest_block_distance,
    moments,
    whitened_score_map,
)


def sums_of(residuals: np.ndarray) -> Moments:
    flat = residuals.reshape(-1, residuals.shape[-1]).astype(np.float64)
    return Moments(len(flat), flat.sum(0), flat.T @ flat)


def correlated(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(shape[-1], shape[-1]))
    return (rng.normal(size=shape) @ mixing + rng.normal(size=shape[-1])).astype(np.float32)


def oracle_distance(residuals, train, ridge):
    """Mahalanobis distance over the root of C, by numpy's covariance and inverse."""
    flat = np.asarray(train, np.float64).reshape(-1, train.shape[-1])
    covariance = np.cov(flat.T, bias=True)
    covariance = covariance + ridge * np.diag(np.diag(covariance))
    centred = np.asarray(residuals, np.float64) - flat.mean(0)
    return np.sqrt(np.einsum("...c,cd,...d->...", centred, np.linalg.inv(covariance), centred) / flat.shape[-1])


@pytest.mark.parametrize("ridge", [0.01, 0.3])
def test_distance_is_mahalanobis(ridge):
    train, test = correlated(0, (5, 6, 7, 4)), 3 * correlated(1, (2, 3, 4))
    whitening = fit_whitening(sums_of(train), ridge=ridge)
    np.testing.assert_allclose(whitening.distance(test), oracle_distance(test, train, ridge), rtol=1e-4)


def test_distance_by_hand():
    # Two independent channels with deviations 2 and 0.5 about (1, 0), a ridge of a third: variances 16/3 and 1/3.
    train = np.array([[3, 0.5], [-1, -0.5], [3, -0.5], [-1, 0.5]], np.float32)
    whitening = fit_whitening(sums_of(train), ridge=1 / 3)
    came = whitening.distance(np.array([[1, 0], [5, 0], [1, 1]], np.float32))
    np.testing.assert_allclose(came, [0, np.sqrt(16 / (16 / 3) / 2), np.sqrt(1 / (1 / 3) / 2)], rtol=1e-5)


def test_usual_residuals_have_a_distance_of_one():
    train = correlated(2, (400, 5))
    squares = np.asarray(fit_whitening(sums_of(train), ridge=1e-6).distance(train)) ** 2
    assert squares.mean() == pytest.approx(1, rel=1e-3)  # E d^2 = C / C


def test_units_of_a_channel_do_not_matter():
    train, test, units = correlated(3, (50, 4)), correlated(4, (9, 4)), np.float32([1e-2, 1, 5, 1e2])
    one = fit_whitening(sums_of(train), ridge=0.03).distance(test)
    other = fit_whitening(sums_of(train * units), ridge=0.03).distance(test * units)
    np.testing.assert_allclose(one, other, rtol=1e-3)


def test_fewer_samples_than_channels_are_finite():
    train = correlated(5, (3, 20))
    whitening = fit_whitening(sums_of(train), ridge=0.03)
    np.testing.assert_allclose(
        whitening.distance(correlated(6, (4, 20))), oracle_distance(correlated(6, (4, 20)), train, 0.03), rtol=1e-3
    )


def test_a_channel_that_never_errs_makes_any_error_enormous():
    train = correlated(7, (30, 3))
    train[:, 1] = 0.5
    whitening = fit_whitening(sums_of(train), ridge=0.01)
    test = train[:2].copy()
    usual = np.asarray(whitening.distance(test))
    test[1, 1] += 0.1
    came = np.asarray(whitening.distance(test))
    assert np.isfinite(came).all() and came[0] == usual[0] and came[1] > 1e3 * usual[1]


def test_no_error_at_all():
    whitening = fit_whitening(Moments(10, np.zeros(3), np.zeros((3, 3))), ridge=0.01)
    assert np.asarray(whitening.distance(np.zeros((2, 3), np.float32))).tolist() == [0, 0]
    assert np.isfinite(whitening.distance(np.ones((2, 3), np.float32))).all()


def test_moments_add_up_over_cells():
    residuals = correlated(8, (2, 3, 4, 5))
    count, total, outer = moments(residuals)
    np.testing.assert_array_equal(count, [12, 12])
    flat = residuals.reshape(2, 12, 5).astype(np.float64)
    np.testing.assert_allclose(total, flat.sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outer, np.einsum("bnc,bnd->bcd", flat, flat), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sums", "ridge"),
    [
        (Moments(0, np.zeros(2), np.zeros((2, 2))), 0.1),
        (Moments(3, np.zeros(2), np.eye(2)), 0.0),
        (Moments(3, np.array([0, np.nan]), np.eye(2)), 0.1),
    ],
)
def test_moments_that_cannot_be(sums, ridge):
    with pytest.raises(ValueError, match="expected"):
        fit_whitening(sums, ridge=ridge)


def test_map_is_the_weighted_geometric_mean_of_the_stages():
    features, reconstruction = correlated(9, (2, 3, 4, 6)), correlated(10, (2, 3, 4, 6))
    whitenings = tuple(
        fit_whitening(sums_of(correlated(11 + i, (40, width))), ridge=0.01) for i, width in enumerate((2, 4))
    )
    came = whitened_score_map(features, reconstruction, whitenings, weights=(3.0, 1.0))
    residuals = features - reconstruction
    first, second = (
        np.asarray(w.distance(part), np.float64)
        for w, part in zip(whitenings, (residuals[..., :2], residuals[..., 2:]), strict=True)
    )
    np.testing.assert_allclose(came, first**0.75 * second**0.25, rtol=1e-4)
    alone = whitened_score_map(features, reconstruction, whitenings, weights=(0.0, 5.0))
    np.testing.assert_allclose(alone, second, rtol=1e-4)


def test_a_perfect_reconstruction_scores_nothing():
    exact = Whitening(np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
    features = correlated(12, (1, 2, 2, 3))
    came = whitened_score_map(features, features, (exact,), weights=(1.0,))
    assert np.isfinite(came).all() and (np.asarray(came) < 1e-30).all()


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_largest_block_by_its_definition(blocks):
    features, reconstruction = correlated(13, (2, 4, 8, 5)), correlated(14, (2, 4, 8, 5))
    train = correlated(15, (60, 5))
    residuals, distances = features.astype(np.float64) - reconstruction, []
    for rows in np.split(residuals, blocks, axis=1):
        for part in np.split(rows, blocks, axis=2):
            distances.append(oracle_distance(part.mean((1, 2)), train, 0.03))
    came = largest_block_distance(features, reconstruction, fit_whitening(sums_of(train)), blocks=blocks)
    np.testing.assert_allclose(came, np.max(distances, axis=0), rtol=1e-4)


def test_blocks_must_divide_the_grid():
    with pytest.raises(ValueError, match="divides a grid of 4x6, got 4"):
        block_means(np.zeros((4, 6, 2), np.float32), 4)


def test_under_jit_and_vmap():
    features, reconstruction = correlated(16, (3, 2, 2, 4)), correlated(17, (3, 2, 2, 4))
    whitening = fit_whitening(sums_of(correlated(18, (40, 4))), ridge=0.01)

    def both(a, b, whitening):
        return whitened_score_map(a, b, (whitening,), weights=(1.0,)), largest_block_distance(a, b, whitening, blocks=2)

    plain = both(features, reconstruction, whitening)
    mapped = jax.jit(jax.vmap(both, (0, 0, None)))(features, reconstruction, jax.tree.map(jnp.asarray, whitening))
    for one, other in zip(plain, mapped, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_widths_must_fit():
    whitening = Whitening(np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match="whitenings of 4 channels"):
        whitened_score_map(np.zeros((2, 2, 4)), np.zeros((2, 2, 4)), (whitening,), weights=(1.0,))
