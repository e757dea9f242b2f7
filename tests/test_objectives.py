"""What training minimises, against the pure losses and a float64 oracle of the loss by stage."""

import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax import losses
from pushpull_jax.objectives import push_pull, squared

WIDTHS = (2, 3)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 4, 4, 5)).astype(np.float32)
    mask = np.zeros((3, 4, 4), np.float32)
    mask[2, 1, 1:3] = 1
    return {
        "features": features,
        "mask": mask,
        "label": np.array([0, 1, 1], np.float32),
        "kind": np.array([losses.MASK, losses.IMAGE_LABEL, losses.MASK], np.int32),
    }


@pytest.fixture
def reconstruction():
    return np.random.default_rng(1).normal(size=(3, 4, 4, 5)).astype(np.float32)


def test_squared_is_eq_1_over_the_channels(batch, reconstruction):
    expected = np.square(batch["features"] - reconstruction).astype(np.float64).mean((1, 2, 3))
    np.testing.assert_allclose(squared(batch, reconstruction), expected, rtol=1e-5)


def test_push_pull_is_the_papers_over_all_channels(batch, reconstruction):
    phi = losses.pseudo_huber_map(batch["features"], reconstruction)
    expected = losses.push_pull_loss(phi, batch["kind"], batch["label"], batch["mask"], k=3, alpha=0.2)
    np.testing.assert_array_equal(push_pull(batch, reconstruction, k=3, alpha=0.2), expected)


def test_push_pull_by_stage(batch, reconstruction):
    # Eq. 6 for each stage's channels in their unit, eq. 7 and 9, and the mean: float64, straight from the paper.
    units = (0.5, 4.0)
    difference = np.abs(batch["features"].astype(np.float64) - reconstruction)
    stages = []
    for part, unit in zip(np.split(difference, [WIDTHS[0]], axis=-1), units, strict=True):
        phi = np.sqrt((part / unit).mean(-1) ** 2 + 1) - 1
        top = np.sort(phi[1], axis=None)[-3:].mean()
        pull, push = ((1 - batch["mask"][2]) * phi[2]).mean(), (batch["mask"][2] * phi[2]).mean()
        stages.append([phi[0].mean(), -0.2 * np.log(1 - np.exp(-top)), pull - 0.2 * np.log(1 - np.exp(-push))])
    came = push_pull(batch, reconstruction, k=3, alpha=0.2, units=tuple(zip(WIDTHS, units, strict=True)))
    np.testing.assert_allclose(came, np.mean(stages, axis=0), rtol=1e-5)


def test_one_stage_in_unit_one_is_the_papers(batch, reconstruction):
    one = push_pull(batch, jnp.asarray(reconstruction), k=3, alpha=0.2, units=((5, 1.0),))
    np.testing.assert_allclose(one, push_pull(batch, reconstruction, k=3, alpha=0.2), rtol=1e-6)
