"""Pixels as the target: space-to-depth by hand, nothing lost, and a backbone without parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.backbones import find_backbone
from pushpull_jax.errors import InputError
from pushpull_jax.models.pixels import Pixels, space_to_depth
from pushpull_jax.weights import load_backbone, load_parameters, save_parameters

PIXELS = find_backbone("pixels")


def test_space_to_depth_by_hand():
    x = jnp.arange(2 * 4 * 2).reshape(1, 2, 4, 2)  # two rows of four cells of two channels, counted through
    expected = [[[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]]
    np.testing.assert_array_equal(space_to_depth(x, 2)[0], expected)


def test_stages_have_the_grids_of_a_trunk_and_lose_nothing():
    network, x = Pixels(), np.random.default_rng(0).standard_normal((2, 64, 96, 3), np.float32)
    ends = [np.asarray(end) for end in jax.jit(network.apply)({}, x)]
    assert [end.shape for end in ends] == [
        (2, 64 // 2**stage, 96 // 2**stage, width) for stage, width in enumerate(network.stage_widths, start=1)
    ]
    assert network.stage_widths == (12, 48, 192, 768, 3072)  # by hand: 3 x 4^stage
    for end in ends:
        np.testing.assert_array_equal(np.sort(end.ravel()), np.sort(x.ravel()))
    # A cell's channels are its own pixels: the last cell at stride 32 is the last corner.
    np.testing.assert_array_equal(ends[4][1, 1, 2].reshape(32, 32, 3), x[1, 32:, 64:])


def test_stages_come_in_the_order_asked_for():
    x = jnp.zeros((1, 32, 32, 3))
    assert [end.shape[-1] for end in Pixels().apply({}, x, (3, 1))] == [192, 12]


@pytest.mark.parametrize("stages", [(), (0,), (1, 6)])
def test_stages_there_are_not_are_refused(stages):
    with pytest.raises(ValueError, match="stages must be some of 1 to 5, got "):
        Pixels().apply({}, jnp.zeros((1, 32, 32, 3)), stages)


def test_sides_that_the_deepest_stride_does_not_divide_are_refused():
    assert Pixels().apply({}, jnp.zeros((1, 252, 252, 3)), (2,))[0].shape == (1, 63, 63, 48)
    with pytest.raises(InputError, match="stage 5 need sides that are multiples of 32, got 256x252 px"):
        Pixels().apply({}, jnp.zeros((1, 256, 252, 3)), (1, 5))


def test_backbone_without_parameters_shows_the_normalised_image():
    backbone, parameters = load_backbone("pixels")
    assert parameters == {} == backbone.abstract_parameters()
    images = jnp.full((1, 2, 2, 3), 255.0)
    (end,) = jax.jit(lambda p, x: backbone.stage_ends(p, x, (1,)))(parameters, images)
    # By hand, from ImageNet's mean and deviation on 0..1.
    white = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(end[0, 0, 0], white * 4, rtol=1e-6)


def test_file_of_no_parameters_can_be_written_and_read(tmp_path):
    path = tmp_path / "backbone.safetensors"
    save_parameters(path, {}, metadata={"backbone": "pixels"})
    assert load_parameters(path, like=PIXELS.abstract_parameters()) == {}


def test_weights_for_it_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_parameters(path, {"stem": {"bias": np.zeros(3, np.float32)}}, metadata={})
    with pytest.raises(InputError, match="stem/bias"):
        load_backbone("pixels", weights=path)
