"""The losses against float64 oracles written straight from the paper's equations, numbers by hand, and properties."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.losses import (
    IMAGE_LABEL,
    MASK,
    PUSH_FLOOR,
    UNLABELLED,
    image_push_pull_loss,
    pixel_push_pull_loss,
    pseudo_huber_map,
    push_pull_loss,
    reconstruction_loss,
    top_k_score,
)

# The oracles: numpy, float64, one example, no floor, nothing rearranged.


def oracle_phi(features, reconstruction):
    d = np.asarray(features, np.float64) - np.asarray(reconstruction, np.float64)
    return np.sqrt(np.abs(d).mean(axis=-1) ** 2 + 1) - 1  # eq. 6


def oracle_pixel(phi, mask, alpha=0.003):
    phi, y = np.asarray(phi, np.float64), np.asarray(mask, np.float64)
    pull = ((1 - y) * phi).sum() / phi.size
    if y.sum() == 0:
        return pull
    return pull - alpha * np.log(1 - np.exp(-(y * phi).sum() / phi.size))  # eq. 7


def oracle_top_k(phi, k):
    return np.sort(np.asarray(phi, np.float64), axis=None)[::-1][:k].sum() / k  # eq. 8


def oracle_image(phi, label, k=20, alpha=0.003):
    q = oracle_top_k(phi, k)
    return (1 - label) * q - (alpha * label * np.log(1 - np.exp(-q)) if label else 0)  # eq. 9


def oracle_reconstruction(features, reconstruction):
    d = np.asarray(features, np.float64) - np.asarray(reconstruction, np.float64)
    return np.sum(d**2) / (d.shape[0] * d.shape[1])  # eq. 1


def difference_quotient(function, x, index, step):
    """Central difference of a float64 oracle in one entry of x."""
    values = []
    for sign in (1, -1):
        moved = np.array(x, np.float64)
        moved[index] += sign * step
        values.append(function(moved))
    return (values[0] - values[1]) / (2 * step)


def random_pair(seed, shape, scale=1.0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=shape)
    return features.astype(np.float32), (features + scale * rng.normal(size=shape)).astype(np.float32)


def pixel_of_features(reconstruction, features, mask):
    return jnp.sum(pixel_push_pull_loss(pseudo_huber_map(features, reconstruction), mask))


def image_of_features(reconstruction, features, label, k):
    return jnp.sum(image_push_pull_loss(pseudo_huber_map(features, reconstruction), label, k=k))


pixel_gradient = jax.jit(jax.grad(pixel_of_features))
image_gradient = jax.jit(jax.grad(image_of_features), static_argnums=3)


# Values by hand.


def test_phi_by_hand():
    # Mean |d| over two channels: 0, 3/4, 4/3 and 12/5; sqrt(x^2 + 1) is then 1, 5/4, 5/3 and 13/5.
    features = np.array([[[0, 0], [1.5, 0]], [[2, 2 / 3], [-4, 0.8]]])
    expected = [[0, 1 / 4], [2 / 3, 8 / 5]]
    np.testing.assert_allclose(pseudo_huber_map(features, np.zeros((2, 2, 2))), expected, rtol=1e-6)


def test_pixel_loss_by_hand():
    # Two of four cells anomalous, (ln 2) * 4 / 2 each: the mean over hw is ln 2, and log(1 - 1/2) = -ln 2.
    phi = np.array([[2 * math.log(2), 3.0], [2 * math.log(2), 5.0]])
    mask = np.array([[1, 0], [1, 0]])
    assert float(pixel_push_pull_loss(phi, mask, alpha=0.5)) == pytest.approx(2 + 0.5 * math.log(2), rel=1e-6)
    # A soft mask weights both terms: pull (1 + 1.5 + 2.5 + 1) / 4 with every y = 1/2 and phi = 2, 3, 5, 2.
    soft = pixel_push_pull_loss(np.array([[2.0, 3.0], [5.0, 2.0]]), np.full((2, 2), 0.5), alpha=1.0)
    assert float(soft) == pytest.approx(1.5 - math.log(1 - math.exp(-1.5)), rel=1e-6)


def test_top_k_and_image_loss_by_hand():
    phi = np.array([[1.0, 4.0], [3.0, 2.0]])
    assert [float(top_k_score(phi, k=k)) for k in (1, 2, 3, 4)] == [4.0, 3.5, 3.0, 2.5]
    assert float(image_push_pull_loss(phi, 0, k=2)) == 3.5
    assert float(image_push_pull_loss(phi, 1, k=4, alpha=2.0)) == pytest.approx(-2 * math.log(1 - math.exp(-2.5)))


def test_reconstruction_loss_by_hand():
    features = np.arange(6.0).reshape(1, 2, 3)  # squares 0 1 4 9 16 25: 55 over two cells, summed over channels
    assert float(reconstruction_loss(features, np.zeros((1, 2, 3)))) == 27.5


def test_defaults_are_the_papers():
    phi = np.random.default_rng(0).random((8, 8))
    np.testing.assert_allclose(image_push_pull_loss(phi, 1), oracle_image(phi, 1, k=20, alpha=0.003), rtol=1e-6)
    mask = phi > 0.7
    np.testing.assert_allclose(pixel_push_pull_loss(phi, mask), oracle_pixel(phi, mask, alpha=0.003), rtol=1e-6)


# Values against the oracles.


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.1, 1.0, 30.0, 1e3, 1e6])
def test_values_agree_with_float64(scale):
    rng = np.random.default_rng(1)
    features = np.zeros((6, 6, 7), np.float32)
    reconstruction = (scale * rng.uniform(-1, 1, size=features.shape)).astype(np.float32)
    phi = oracle_phi(features, reconstruction)
    # At 1e-5 the oracle itself has lost digits: 2.2e-16 beside 5e-12. Smaller distances are tested by hand.
    rtol = 1e-4 if scale < 1e-4 else 1e-6
    np.testing.assert_allclose(pseudo_huber_map(features, reconstruction), phi, rtol=rtol)
    expected = oracle_reconstruction(features, reconstruction)
    np.testing.assert_allclose(reconstruction_loss(features, reconstruction), expected, rtol=1e-6)
    mask = rng.random((6, 6)) < 0.3
    # The floor, 1e-13 beside a mean of 3e-12, changes the logarithm of -26 by 0.03 at the smallest scale.
    rtol = 2e-3 if scale < 1e-4 else 1e-5
    np.testing.assert_allclose(pixel_push_pull_loss(phi, mask), oracle_pixel(phi, mask), rtol=rtol)
    for k in (1, 5, 36):
        np.testing.assert_allclose(top_k_score(phi, k=k), oracle_top_k(phi, k), rtol=1e-6)
        for label in (0, 1):
            expected = oracle_image(phi, label, k=k)
            np.testing.assert_allclose(image_push_pull_loss(phi, label, k=k), expected, rtol=rtol, atol=1e-12)


def test_small_distances_do_not_vanish():
    # sqrt(x^2 + 1) - 1 would be exactly 0 in float32; x^2 / 2 is right to 1e-8 here.
    x = np.array([1e-8, 1e-5, 3e-4], np.float32)
    np.testing.assert_allclose(pseudo_huber_map(x[None, :, None], np.zeros((1, 3, 1)))[0], x**2 / 2, rtol=1e-6)


def test_push_term_at_a_tiny_distance():
    # q = 1e-8: log(1 - exp(-q)) = log(q) - q/2 + ... = -18.42068; the plain form is -inf in float32.
    assert float(image_push_pull_loss(np.full((2, 2), 1e-8), 1, k=4, alpha=1.0)) == pytest.approx(18.42068, abs=1e-4)


def test_push_term_only_where_the_mask_is_not_empty():
    phi = np.random.default_rng(2).random((3, 4, 4)).astype(np.float32)
    mask = np.zeros((3, 4, 4), np.float32)
    mask[1, 2, 2] = 1e-6
    mask[2, 2, 2] = 1
    expected = [oracle_pixel(p, m) for p, m in zip(phi, mask, strict=True)]
    assert expected[1] - phi[1].mean() > 0.04  # -0.003 log(1e-7): however soft, it counts
    np.testing.assert_allclose(pixel_push_pull_loss(phi, mask), expected, rtol=1e-5)


# Gradients.


@pytest.mark.parametrize("grid", [16, 128])
@pytest.mark.parametrize("distance", [1e-3, 1.0, 50.0])
def test_gradient_of_one_anomalous_cell_is_the_oracles(grid, distance):
    rng = np.random.default_rng(3)
    features = np.zeros((grid, grid, 4), np.float32)
    reconstruction = (distance * np.array([0.5, -1, 1.5, 1], np.float32)) * np.ones_like(features)
    mask = np.zeros((grid, grid))
    cell = tuple(rng.integers(grid, size=2))
    mask[cell] = 1
    gradient = np.asarray(pixel_gradient(reconstruction, features, mask))
    for index in [(*cell, 0), (*cell, 1), ((cell[0] + 1) % grid, cell[1], 2)]:
        # The oracle leaves out the other cells, whose derivative is 0: the difference quotient needs the digits.
        one = np.s_[index[0] : index[0] + 1, index[1] : index[1] + 1]
        weight = mask[one].item()

        def loss(r, one=one, weight=weight):
            phi = oracle_phi(features[one], r).item()
            return -0.003 * np.log(-np.expm1(-phi / grid**2)) if weight else phi / grid**2

        expected = difference_quotient(loss, reconstruction[one], (0, 0, index[2]), 1e-4 * distance)
        assert gradient[index] == pytest.approx(expected, rel=0.01, abs=1e-12)
        assert abs(expected) > 1e-9


def test_gradient_of_one_anomalous_cell_by_hand():
    # -alpha / q * dq/dx with q = x^2 / 2 / hw is -2 alpha / x = -6 at x = 1e-3, whatever the grid; C = 1.
    mask = np.zeros((16, 16))
    mask[4, 5] = 1
    gradient = pixel_gradient(np.full((16, 16, 1), 1e-3, np.float32), np.zeros((16, 16, 1)), mask)
    assert float(gradient[4, 5, 0]) == pytest.approx(-6.0, rel=0.01)
    image = image_gradient(np.full((1, 1, 1), 1e-3, np.float32), np.zeros((1, 1, 1)), 1, 1)
    assert float(image[0, 0, 0]) == pytest.approx(-6.0, rel=0.01)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_gradients_agree_with_difference_quotients(scale):
    features, reconstruction = random_pair(4, (3, 3, 2), scale)
    rng = np.random.default_rng(5)
    mask = rng.random((3, 3))
    cases = [
        (lambda r: jnp.sum(reconstruction_loss(features, r)), lambda r: oracle_reconstruction(features, r)),
        (lambda r: pixel_of_features(r, features, mask), lambda r: oracle_pixel(oracle_phi(features, r), mask)),
        (lambda r: image_of_features(r, features, 0, 3), lambda r: oracle_image(oracle_phi(features, r), 0, k=3)),
        (lambda r: image_of_features(r, features, 1, 3), lambda r: oracle_image(oracle_phi(features, r), 1, k=3)),
    ]
    for loss, oracle in cases:
        gradient = np.asarray(jax.jit(jax.grad(loss))(reconstruction))
        indices = list(np.ndindex(gradient.shape))
        expected = np.array([difference_quotient(oracle, reconstruction, i, 1e-6 * scale) for i in indices])
        assert np.abs(expected).max() > 0
        tolerance = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected.reshape(gradient.shape), rtol=1e-3, atol=tolerance)


def test_gradient_at_phi_zero_is_finite_and_negative():
    # -alpha / (hw * floor) in the anomalous cell, 1/hw in the others.
    mask = np.zeros((16, 16))
    mask[3, 7] = 1
    gradient = np.asarray(jax.grad(lambda phi: pixel_push_pull_loss(phi, mask))(jnp.zeros((16, 16))))
    assert gradient[3, 7] == pytest.approx(-0.003 / (256 * PUSH_FLOOR), rel=1e-4)
    np.testing.assert_allclose(np.delete(gradient.ravel(), 3 * 16 + 7), 1 / 256, rtol=1e-6)
    image = np.asarray(jax.jit(jax.grad(lambda phi: image_push_pull_loss(phi, 1, k=4)))(jnp.zeros((4, 4))))
    np.testing.assert_allclose(image.ravel(), [-0.003 / (4 * PUSH_FLOOR)] * 4 + [0] * 12, rtol=1e-4)
    assert PUSH_FLOOR <= 1e-12


def test_gradient_at_perfect_reconstruction_is_zero():
    features, _ = random_pair(6, (4, 4, 3))
    for mask in (np.zeros((4, 4)), np.ones((4, 4)), np.eye(4)):
        np.testing.assert_array_equal(pixel_gradient(features, features, mask), 0)
    for label in (0, 1):
        np.testing.assert_array_equal(image_gradient(features, features, label, 3), 0)


def test_descending_pulls_normal_cells_and_pushes_anomalous_ones():
    features, reconstruction = random_pair(7, (4, 4, 3), 0.1)
    mask = np.eye(4)
    gradient = pixel_gradient(reconstruction, features, mask)
    moved = reconstruction - 1e-3 * np.asarray(gradient)
    closer = oracle_phi(features, moved) < oracle_phi(features, reconstruction)
    np.testing.assert_array_equal(closer, mask == 0)


def test_no_gradient_to_mask_or_label():
    phi = np.random.default_rng(8).random((4, 4))
    mask_gradient = jax.grad(lambda mask: pixel_push_pull_loss(phi, mask))(jnp.full((4, 4), 0.5))
    np.testing.assert_array_equal(mask_gradient, 0)
    assert float(jax.grad(lambda label: image_push_pull_loss(phi, label, k=3))(0.5)) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_value_and_gradient_are_finite(dtype):
    # One batch of every mask with every size of features and every reconstruction; the examples are independent.
    rng = np.random.default_rng(9)
    soft, one = rng.random((4, 4)), np.eye(1, 16, 5).reshape(4, 4)
    masks = [np.zeros((4, 4)), np.ones((4, 4)), one, soft, 1e-30 * one, np.full((4, 4), 0.5)]
    largest = 3e4 if dtype == "float16" else 1e6
    cases = [
        (mask, size * np.sign(rng.normal(size=(4, 4, 3))), sign)
        for mask in masks
        for size in (0.0, 1e-30, 1e-20, 1e-7, 1e-3, 1.0, 1e4, largest)
        for sign in (-1, 0, 1)  # far off, zero, perfect
    ]
    mask = np.stack([mask for mask, _, _ in cases])
    features = jnp.asarray(np.stack([features for _, features, _ in cases]), dtype)
    reconstruction = features * jnp.asarray(np.reshape([sign for _, _, sign in cases], (-1, 1, 1, 1)), dtype)

    def losses(f, r, m):
        phi = pseudo_huber_map(f, r)
        image = [image_push_pull_loss(phi, jnp.max(m), k=k) for k in (1, 7, 16)]
        return jnp.stack([pixel_push_pull_loss(phi, m), *image, reconstruction_loss(f, r)])

    values = np.asarray(jax.jit(jax.vmap(losses))(features, reconstruction, mask))
    assert np.isfinite(values).all() and (values >= 0).all()
    for gradient in jax.jit(jax.vmap(jax.jacrev(losses, argnums=(0, 1))))(features, reconstruction, mask):
        assert gradient.dtype == dtype and gradient.shape == (len(cases), 5, 4, 4, 3)
        assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_finite_at_the_largest_features_of_the_paper():
    # 720 channels at +-1e6: the sum of squares is 720 * 4e12 by hand, phi = sqrt(4e12 + 1) - 1.
    features = np.full((2, 2, 720), 1e6, np.float32)
    np.testing.assert_allclose(reconstruction_loss(features, -features), 720 * 4e12, rtol=1e-6)
    np.testing.assert_allclose(pseudo_huber_map(features, -features), 2e6 - 1, rtol=1e-6)
    gradient = pixel_gradient(features, -features, np.eye(2))
    np.testing.assert_allclose(gradient[0, 1], 1 / 4 / 720, rtol=1e-5)  # phi' = 1 far out
    np.testing.assert_array_equal(gradient[0, 0], 0)  # pushed far enough


# Types, axes and transformations.


def all_losses(features, reconstruction, mask, label):
    phi = pseudo_huber_map(features, reconstruction)
    return {
        "phi": phi,
        "pixel": pixel_push_pull_loss(phi, mask),
        "top_k": top_k_score(phi, k=5),
        "image": image_push_pull_loss(phi, label, k=5),
        "reconstruction": reconstruction_loss(features, reconstruction),
    }


jitted_losses = jax.jit(all_losses)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_float32_whatever_comes_in(dtype):
    features, reconstruction = random_pair(11, (4, 5, 6))
    features, reconstruction = 3 * features + 100, 3 * reconstruction  # far apart: half precision can't subtract them
    if dtype != "float64":
        features, reconstruction = jnp.asarray(features, dtype), jnp.asarray(reconstruction, dtype)
    else:
        features, reconstruction = features.astype(np.float64), reconstruction.astype(np.float64)
    mask = np.eye(4, 5)
    losses = all_losses(features, reconstruction, mask, 1)
    assert {loss.dtype for loss in losses.values()} == {jnp.dtype("float32")}
    phi = oracle_phi(features, reconstruction)  # of the rounded inputs: the cast must come before the difference
    np.testing.assert_allclose(losses["phi"], phi, rtol=1e-5)
    np.testing.assert_allclose(losses["pixel"], oracle_pixel(phi, mask), rtol=1e-5)
    np.testing.assert_allclose(losses["image"], oracle_image(phi, 1, k=5), rtol=1e-5)
    expected = oracle_reconstruction(features, reconstruction)
    np.testing.assert_allclose(losses["reconstruction"], expected, rtol=1e-5)


def test_float32_under_x64_too():
    with jax.enable_x64(True):
        features = jnp.asarray(np.random.default_rng(12).normal(size=(3, 4, 4, 2)))
        assert features.dtype == jnp.float64
        assert jnp.asarray(np.float64(0.003)).dtype == jnp.float64
        losses = jitted_losses(features, 0 * features, jnp.ones((3, 4, 4)), jnp.ones(3))
        losses["alpha"] = pixel_push_pull_loss(losses["phi"], np.ones((3, 4, 4)), alpha=np.float64(0.003))
        losses["phi64"] = pixel_push_pull_loss(features[..., 0] ** 2, np.ones((3, 4, 4)))
    assert {loss.dtype for loss in losses.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_phi_is_averaged_in_float32(dtype):
    phi = jnp.asarray(np.random.default_rng(18).random((5, 5)), dtype)
    losses = [top_k_score(phi, k=7), image_push_pull_loss(phi, 0, k=7), pixel_push_pull_loss(phi, np.eye(5))]
    assert {loss.dtype for loss in losses} == {jnp.dtype("float32")}
    exact = np.asarray(phi, np.float64)
    expected = [oracle_top_k(exact, 7), oracle_top_k(exact, 7), oracle_pixel(exact, np.eye(5))]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float64, jnp.bfloat16])
def test_masks_and_labels_of_any_type(dtype):
    phi = np.random.default_rng(13).random((2, 4, 4)).astype(np.float32)
    mask = phi > 0.6
    expected = [oracle_pixel(p, m) for p, m in zip(phi, mask, strict=True)]
    np.testing.assert_allclose(pixel_push_pull_loss(phi, mask.astype(dtype)), expected, rtol=1e-5)
    expected = [oracle_image(phi[0], 1, k=3), oracle_image(phi[1], 0, k=3)]
    np.testing.assert_allclose(image_push_pull_loss(phi, np.array([1, 0]).astype(dtype), k=3), expected, rtol=1e-5)


@pytest.mark.parametrize("leading", [(), (2, 3), (0,)])
def test_any_leading_axes_jit_and_vmap(leading):
    features, reconstruction = random_pair(14, (*leading, 4, 5, 6))
    rng = np.random.default_rng(15)
    mask, label = rng.integers(2, size=(*leading, 4, 5)), rng.integers(2, size=leading)
    losses = all_losses(features, reconstruction, mask, label)
    assert {name: loss.shape for name, loss in losses.items()} == {
        name: (*leading, 4, 5) if name == "phi" else leading for name in losses
    }
    jitted = jitted_losses(features, reconstruction, mask, label)
    mapped = all_losses
    for _ in leading:
        mapped = jax.vmap(mapped)
    mapped = jax.jit(mapped)(features, reconstruction, mask, label) if 0 not in leading else losses
    for name, loss in losses.items():
        np.testing.assert_allclose(jitted[name], loss, rtol=1e-5)
        np.testing.assert_allclose(mapped[name], loss, rtol=1e-5)
        for index in np.ndindex(leading):
            alone = jitted_losses(features[index], reconstruction[index], mask[index], label[index])
            np.testing.assert_allclose(loss[index], alone[name], rtol=1e-5)


def test_gradients_under_vmap_and_jit():
    features, reconstruction = random_pair(16, (3, 4, 4, 2))
    mask = np.stack([np.zeros((4, 4)), np.eye(4), np.ones((4, 4))])
    batched = jax.grad(pixel_of_features)(reconstruction, features, mask)  # and eagerly
    mapped = jax.jit(jax.vmap(jax.grad(pixel_of_features)))(reconstruction, features, mask)
    np.testing.assert_allclose(mapped, batched, rtol=1e-4, atol=1e-9)


def test_alpha_can_be_mapped():
    phi = np.random.default_rng(17).random((4, 4))
    alphas = np.array([0.001, 0.003, 1.0])
    expected = [oracle_pixel(phi, np.eye(4), alpha) for alpha in alphas]
    losses = jax.vmap(lambda alpha: pixel_push_pull_loss(phi, np.eye(4), alpha=alpha))(alphas)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    expected = [oracle_image(phi, 1, k=3, alpha=alpha) for alpha in alphas]
    losses = jax.vmap(lambda alpha: image_push_pull_loss(phi, 1, k=3, alpha=alpha))(alphas)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_traced_once_for_one_shape():
    traces = []

    @jax.jit
    def compiled(*arguments):
        traces.append(1)
        return all_losses(*arguments)

    for seed in range(3):
        features, reconstruction = random_pair(seed, (2, 4, 4, 3))
        compiled(features, reconstruction, np.full((2, 4, 4), seed, np.float32) / 2, np.full(2, seed / 2, np.float32))
    assert len(traces) == 1


@pytest.mark.parametrize("seed", range(3))
def test_properties(seed):
    rng = np.random.default_rng(seed)
    features, reconstruction = random_pair(seed, (5, 5, 3), 10.0 ** rng.integers(-3, 3))
    phi = np.asarray(pseudo_huber_map(features, reconstruction))
    np.testing.assert_array_equal(phi, pseudo_huber_map(reconstruction, features))  # symmetric
    distance = np.abs(features - reconstruction).mean(axis=-1)
    assert (phi >= 0).all() and (phi <= distance).all() and (phi <= distance**2 / 2 * (1 + 1e-6)).all()
    scores = np.array([top_k_score(phi, k=k) for k in (1, 2, 10, 25)])
    assert scores[0] == phi.max() and scores[-1] == pytest.approx(phi.mean(), rel=1e-5)
    assert (np.diff(scores) <= 0).all()
    shuffled = rng.permutation(phi.ravel()).reshape(phi.shape)
    np.testing.assert_allclose(top_k_score(shuffled, k=7), top_k_score(phi, k=7), rtol=1e-5)
    # An empty mask leaves the mean of phi, and alpha has no effect.
    np.testing.assert_allclose(pixel_push_pull_loss(phi, np.zeros((5, 5)), alpha=1e3), phi.mean(), rtol=1e-5)


# Errors.


PAIRS = [((2, 3, 1), (2, 3, 3)), ((2, 4, 4, 3), (4, 4, 3)), ((2, 4, 4, 1), (2, 4, 4, 3)), ((4, 3), (4, 3))]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("function", [pseudo_huber_map, reconstruction_loss])
def test_features_are_not_broadcast(function, first, second):
    for transform in (lambda f: f, jax.jit, jax.grad):
        with pytest.raises(ValueError, match=r"features \[\*B, h, w, C\], reconstruction"):
            transform(function)(jnp.zeros(first), jnp.zeros(second))


@pytest.mark.parametrize("mask", [(4, 4), (1, 4, 4), (2, 4, 1), (2, 4, 4, 1)])
def test_mask_is_not_broadcast(mask):
    with pytest.raises(ValueError, match=r"phi \[2, 4, 4\], mask \["):
        pixel_push_pull_loss(jnp.zeros((2, 4, 4)), jnp.zeros(mask))


@pytest.mark.parametrize("label", [(), (1,), (3,), (2, 1)])
def test_label_is_not_broadcast(label):
    with pytest.raises(ValueError, match=r"phi \[2, 4, 4\], label \["):
        image_push_pull_loss(jnp.zeros((2, 4, 4)), jnp.zeros(label), k=3)


def test_alpha_is_not_broadcast():
    phi = jnp.zeros((2, 4, 4))
    with pytest.raises(ValueError, match=r"alpha \[2\]"):
        pixel_push_pull_loss(phi, phi, alpha=jnp.ones(2))
    with pytest.raises(ValueError, match=r"alpha \[2\]"):
        image_push_pull_loss(phi, jnp.ones(2), k=3, alpha=jnp.ones(2))


@pytest.mark.parametrize("k", [-1, 0, 13, 20])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"1\.\.12.*k = {k}$"):
        top_k_score(jnp.zeros((2, 3, 4)), k=k)
    with pytest.raises(ValueError, match=rf"1\.\.12.*k = {k}$"):
        image_push_pull_loss(jnp.zeros((2, 3, 4)), jnp.zeros(2), k=k)
    with pytest.raises(TypeError):
        top_k_score(jnp.zeros((2, 3, 4)), k=2.0)


def mixed_batch():
    """Every kind, with labels and masks that say something where they must not be read."""
    rng = np.random.default_rng(3)
    phi = rng.gamma(1.0, 0.3, (6, 4, 5)).astype(np.float32)
    kind = np.array([UNLABELLED, IMAGE_LABEL, IMAGE_LABEL, MASK, MASK, UNLABELLED], np.int32)
    label = np.array([1, 0, 1, 0, 1, 0], np.float32)
    mask = (rng.random((6, 4, 5)) < 0.3).astype(np.float32)
    mask[3] = 0
    return phi, kind, label, mask


def test_loss_of_a_mixed_batch_is_what_each_would_get_alone():
    phi, kind, label, mask = mixed_batch()
    came = push_pull_loss(phi, kind, label, mask, k=3, alpha=0.1)
    # Eq. 7 with the mask, eq. 9 with the label, eq. 7's pull alone where nothing is known.
    expected = [
        oracle_phi_mean(phi[0]),
        oracle_image(phi[1], 0, k=3, alpha=0.1),
        oracle_image(phi[2], 1, k=3, alpha=0.1),
        oracle_pixel(phi[3], mask[3], alpha=0.1),
        oracle_pixel(phi[4], mask[4], alpha=0.1),
        oracle_phi_mean(phi[5]),
    ]
    np.testing.assert_allclose(came, expected, rtol=1e-6)
    alone = [push_pull_loss(phi[i], kind[i], label[i], mask[i], k=3, alpha=0.1) for i in range(6)]
    assert float(jnp.mean(came)) == pytest.approx(np.mean(alone), rel=1e-6)


def oracle_phi_mean(phi):
    return np.asarray(phi, np.float64).mean()


def test_gradient_of_a_mixed_batch_is_what_each_would_get_alone():
    phi, kind, label, mask = mixed_batch()
    phi[2] = phi[4] = 0  # perfect reconstructions of anomalies
    came = jax.grad(lambda phi: jnp.sum(push_pull_loss(phi, kind, label, mask, k=3)))(phi)
    by_cell = jax.grad(lambda phi, mask: pixel_push_pull_loss(phi, mask))
    by_image = jax.grad(lambda phi, label: image_push_pull_loss(phi, label, k=3))
    zero = np.zeros((4, 5), np.float32)
    expected = [
        by_cell(phi[0], zero), by_image(phi[1], 0.0), by_image(phi[2], 1.0),
        by_cell(phi[3], zero), by_cell(phi[4], mask[4]), by_cell(phi[5], zero),
    ]  # fmt: skip
    np.testing.assert_allclose(came, np.stack(expected), rtol=1e-6)
    assert np.isfinite(came).all()


def test_changing_the_mix_does_not_trace_again():
    phi, kind, label, mask = mixed_batch()
    traces = []

    @jax.jit
    def loss(*batch):
        traces.append(1)
        return push_pull_loss(*batch, k=3)

    for shift in range(6):
        loss(phi, np.roll(kind, shift), np.roll(label, shift), np.roll(mask, shift, 0))
    assert len(traces) == 1


def test_a_kind_that_does_not_exist_is_not_trained_on():
    phi, kind, label, mask = mixed_batch()
    kind[:2] = (3, -1)
    assert np.isnan(push_pull_loss(phi, kind, label, mask, k=3)).tolist() == [True, True, *[False] * 4]


def test_mixed_shapes_must_agree():
    phi, kind, label, mask = mixed_batch()
    with pytest.raises(ValueError, match="kind"):
        push_pull_loss(phi, kind[:, None], label, mask)


@pytest.mark.parametrize("k", [1, 3, 7, 24, 25])
def test_a_traced_k_gives_what_top_k_gives_ties_and_gradients_included(k):
    rng = np.random.default_rng(k)
    phi = np.float32(rng.integers(0, 4, (3, 5, 5)))  # many ties
    kinds, labels = np.array([IMAGE_LABEL, IMAGE_LABEL, MASK]), np.array([1, 0, 1], np.float32)
    masks = np.float32(rng.random((3, 5, 5)) < 0.3)

    def score(phi, k):
        return top_k_score(phi, k=k).sum()

    def loss(phi, k):
        return push_pull_loss(phi, kinds, labels, masks, k=k, alpha=0.1).sum()

    for function in (score, loss):
        fixed = jax.value_and_grad(functools.partial(function, k=k))(phi)
        traced = jax.jit(jax.value_and_grad(function))(phi, k)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), traced, fixed)


def test_a_traced_k_out_of_range_gives_nan():
    scores = jax.vmap(lambda k: top_k_score(np.ones((2, 2)), k=k))(np.array([0, 1, 4, 5]))
    np.testing.assert_array_equal(scores, [np.nan, 1, 1, np.nan])
