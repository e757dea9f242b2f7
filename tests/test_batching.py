"""Batches of one size: each example is its own, whatever it is padded with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.batching import in_batches, padded


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_any_number_of_examples_by_one_program(count):
    traced = []

    @jax.jit
    def program(a, b):
        traced.append(a.shape)
        return {"sum": a.sum(-1) + b, "double": 2 * a}

    a, b = np.arange(3.0 * count).reshape(count, 3).astype(np.float32), np.arange(count, dtype=np.float32)
    result = in_batches(program, a, b, size=4)
    np.testing.assert_array_equal(result["sum"], a.sum(-1) + b)
    np.testing.assert_array_equal(result["double"], 2 * a)
    assert traced == [(4, 3)]


def test_padding_is_of_zeros_and_cut_again():
    seen = []
    result = padded(lambda x: seen.append(x) or jnp.asarray(x) + 1, np.ones((2, 2), np.float32), size=3)
    np.testing.assert_array_equal(seen[0], [[1, 1], [1, 1], [0, 0]])
    np.testing.assert_array_equal(result, np.full((2, 2), 2.0))
