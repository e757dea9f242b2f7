"""The shape check: which shapes agree, what it returns, and what its error says. Expected values are by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.shapes import check_shapes


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (0,)])
def test_star_takes_any_leading_axes(leading):
    sizes = check_shapes("*B h w C", features=np.zeros((*leading, 4, 5, 6)), other=np.zeros((*leading, 4, 5, 6)))
    assert sizes == {"*B": leading, "h": 4, "w": 5, "C": 6}


def test_one_spec_for_each_array_shares_letters():
    sizes = check_shapes("*B h w, *B,", phi=np.zeros((2, 4, 5)), label=[0, 1], alpha=0.003)
    assert sizes == {"*B": (2,), "h": 4, "w": 5}


@pytest.mark.parametrize(
    ("spec", "first", "second"),
    [
        ("*B h C", (2, 3, 1), (2, 3, 3)),  # would broadcast
        ("*B h C", (3, 3), (2, 3, 3)),  # would broadcast over the batch
        ("*B h C", (1, 3, 3), (2, 3, 3)),
        ("*B h C", (2, 3), (3, 2)),
        ("*B h C", (3,), (3,)),  # too few axes
        ("*B h C", (2, 0), (2, 0)),  # an empty axis
        ("h C", (1, 2, 3), (1, 2, 3)),  # too many axes without a star
        ("h h", (2, 3), (2, 3)),  # a letter twice in one spec
        ("*B h, *B", (2, 3), (3,)),
        ("*B h, *B", (2, 3), (2, 1)),
        ("*B h,", (2, 3), (1,)),  # not a scalar
    ],
)
def test_what_does_not_agree_is_refused(spec, first, second):
    with pytest.raises(ValueError, match="expected first"):
        check_shapes(spec, first=np.zeros(first), second=np.zeros(second))


def test_error_names_arrays_spec_and_shapes():
    with pytest.raises(ValueError) as error:
        check_shapes("*B h w, *B", phi=np.zeros((2, 4, 5)), label=np.zeros(3))
    message = str(error.value)
    assert "phi [*B, h, w], label [*B]" in message
    assert message.endswith("got phi [2, 4, 5], label [3]")


def test_number_of_specs_must_be_that_of_arrays():
    with pytest.raises(ValueError):
        check_shapes("h, h", only=np.zeros(3))


def test_works_on_tracers():
    def double(x, y):
        check_shapes("h w", x=x, y=y)
        return x + y

    x = jnp.ones((2, 3, 4))
    assert jax.jit(jax.vmap(double))(x, x).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="expected x"):
        jax.jit(double)(x, x)
    with pytest.raises(ValueError, match=r"got x \[3, 4\], y \[3, 1\]"):
        jax.jit(jax.vmap(double))(x, x[..., :1])
    with pytest.raises(ValueError, match="expected x"):
        jax.eval_shape(double, x[0], x[1, :1])
