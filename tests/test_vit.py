"""DINOv2: grid, parameter counts, resampled positions, and every block against a golden file made by torch and timm.

The weights are random (scripts/make_golden_networks.py), LayerScale included; the slow tests compare whole tensors with
timm's networks, whose position embeddings timm resamples itself, where torch and timm are installed.
"""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_checks import (
    abstract_parameters,
    assert_equals_timm,
    assert_golden,
    converted,
    count,
    golden_image,
    load_golden,
    random_parameters,
    script,
    stage_ends,
)
from PIL import Image

from pushpull_jax.backbones import find_backbone
from pushpull_jax.conversion.vit import bicubic_weights, resample_positions
from pushpull_jax.errors import InputError
from pushpull_jax.models.vit import VisionTransformer

VITS = find_backbone("dinov2_vits14")
TINY = VisionTransformer(width=8, heads=2, depth=3, grid=(2, 3))


@pytest.mark.parametrize(("name", "width"), [("dinov2_vits14", 384), ("dinov2_vitb14", 768)])
def test_twelve_stages_of_18x18_tokens_at_252_px(name, width):
    network = find_backbone(name).network
    assert network.stage_widths == (width,) * 12
    image = jax.ShapeDtypeStruct((2, 252, 252, 3), jnp.float32)
    ends, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), image)
    assert [end.shape for end in ends] == [(2, 18, 18, width)] * 12


# As the authors' repository counts them, the token of masked patches included.
@pytest.mark.parametrize(("name", "total"), [("dinov2_vits14", 22_056_576), ("dinov2_vitb14", 86_580_480)])
def test_parameter_counts_are_the_published_ones(name, total):
    backbone = find_backbone(name)
    width = backbone.network.width
    positions = (1 + 37 * 37 - 18 * 18) * width  # theirs on the larger grid, and the class token's own
    folded = 12 * 2 * width  # two LayerScales a block
    left_out = 2 * width + width  # final norm, token of masked patches
    assert count(backbone.abstract_parameters()) + positions + folded + left_out == total


def test_images_of_256_px_are_refused_with_the_size_to_use():
    images = jnp.zeros((1, 256, 256, 3))
    with pytest.raises(InputError, match="built for images of 252x252 px, got 256x256; set data.image_size to 252"):
        jax.eval_shape(lambda p, x: VITS.stage_ends(p, x, (12,)), VITS.abstract_parameters(), images)
    with pytest.raises(ValueError, match="must be 252x252 px, got 256x256; use an image size of 252 .a multiple of 14"):
        jax.eval_shape(VITS.network.init, jax.random.key(0), images)


@pytest.mark.parametrize(("stages", "blocks"), [((1,), (1,)), ((2, 1), (1, 2)), ((3,), (1, 2, 3)), (None, (1, 2, 3))])
def test_blocks_behind_the_deepest_stage_wanted_are_not_run(stages, blocks):
    variables = jax.eval_shape(lambda x: TINY.init(jax.random.key(0), x, stages), jnp.zeros((1, 28, 42, 3)))
    embedding = {"patch", "positions", "class_token"}
    assert variables["params"].keys() == {*embedding, *(f"block_{number}" for number in blocks)}


@pytest.mark.parametrize("stages", [(), (0,), (1, 4)])
def test_stages_there_are_not_are_refused(stages):
    with pytest.raises(ValueError, match="stages must be some of 1 to 3, got "):
        TINY.init(jax.random.key(0), jnp.zeros((1, 28, 42, 3)), stages)


def test_stages_are_those_of_the_whole_trunk_in_the_order_asked_for():
    images = np.random.default_rng(1).standard_normal((2, 28, 42, 3), np.float32)
    variables = {"params": random_parameters(TINY, (28, 42))}
    run = jax.jit(lambda v, x: (TINY.apply(v, x), TINY.apply(v, x, (3, 1)), TINY.apply(v, x[1:])))
    ends, (third, first), alone = run(variables, images)
    np.testing.assert_allclose(third, ends[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first, ends[0], rtol=1e-4, atol=1e-5)
    # Nor does an image see the others of its batch.
    np.testing.assert_allclose(alone[2], ends[2][1:], rtol=1e-4, atol=1e-5)


def test_bicubic_weights_by_hand():
    # Halving an axis of 4: cell 0 lies at 1, cells 0 to 3, in units of two, 1/4, 1/4, 3/4 and 5/4 from it; the kernel
    # there is (1.5 x - 2.5) x^2 + 1 = 0.8671875, twice, 0.2265625, and ((-0.5 x + 2.5) x - 4) x + 2 = -0.0703125.
    kernel = np.array([0.8671875, 0.8671875, 0.2265625, -0.0703125])
    expected = np.stack([kernel, kernel[::-1]]) / kernel.sum()
    np.testing.assert_allclose(bicubic_weights(4, 2), expected, rtol=1e-14)


@pytest.mark.parametrize("grid", [(18, 18), (4, 6), (16, 40)], ids=lambda grid: "{}x{}".format(*grid))
def test_positions_are_resampled_as_pillow_does(grid):
    positions = np.random.default_rng(0).normal(size=(37, 37, 2))
    resampled = resample_positions(positions, grid)
    for channel in range(2):
        image = Image.fromarray(positions[..., channel].astype(np.float32))
        expected = image.resize(grid[::-1], Image.Resampling.BICUBIC)  # which always antialiases
        np.testing.assert_allclose(resampled[..., channel], np.asarray(expected), rtol=0, atol=2e-6)


def test_positions_on_their_own_grid_are_kept():
    positions = np.random.default_rng(0).normal(size=(37, 37, 2))
    np.testing.assert_array_equal(resample_positions(positions, (37, 37)), positions)


@functools.cache
def golden_state():
    golden = load_golden("dinov2_vits14")
    return golden, script.random_state(golden["tensors"])


def test_class_token_gets_its_own_position_and_is_not_resampled():
    _, state = golden_state()
    changed = state | {"pos_embed": state["pos_embed"].copy()}
    changed["pos_embed"][:, 0] += 1
    before, after = (VITS.convert(one, source="state") for one in (state, changed))
    np.testing.assert_allclose(before["class_token"], state["cls_token"][0, 0] + state["pos_embed"][0, 0], rtol=1e-6)
    np.testing.assert_allclose(after["class_token"], before["class_token"] + 1, rtol=1e-6)
    np.testing.assert_array_equal(after["positions"], before["positions"])


def test_random_weights_give_the_golden_blocks():
    golden, state = golden_state()
    network = VITS.network.clone(grid=(4, 6))
    parameters = converted(VITS, network, golden["size"], state)
    assert_golden(stage_ends(VITS, network, parameters, golden_image(golden)), golden)


def test_tensors_of_another_network_are_refused_with_all_that_differs():
    _, state = golden_state()
    wrong = {name: tensor for name, tensor in state.items() if name != "blocks.3.ls2.gamma"}
    wrong |= {"reg_token": np.zeros((1, 4, 384), np.float32), "pos_embed": state["pos_embed"][:, 1:]}
    with pytest.raises(InputError) as error:
        VITS.convert(wrong, source="file.safetensors")
    assert str(error.value).splitlines() == [
        "file.safetensors: these are not the tensors of the network",
        "  1 missing: blocks.3.ls2.gamma",
        "  1 unknown: reg_token",
        "  1 of another shape: pos_embed (expected [1, 1370, 384], got [1, 1369, 384])",
    ]


def test_final_norm_may_be_absent_and_the_token_of_masked_patches_present():
    _, state = golden_state()
    other = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    assert len(other) == len(state) - 2
    other["mask_token"] = np.zeros((1, 384), np.float32)
    ours, theirs = (
        flax.traverse_util.flatten_dict(VITS.convert(one, source="state"), sep="/") for one in (other, state)
    )
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_trunk_computes_in_bfloat16_on_request():
    like = abstract_parameters(TINY, (28, 42))
    images = jax.ShapeDtypeStruct((1, 28, 42, 3), jnp.float32)
    ends = jax.eval_shape(TINY.clone(dtype=jnp.bfloat16).apply, {"params": like}, images)
    assert {end.dtype for end in ends} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # importing torch and timm
@pytest.mark.parametrize("grid", [(18, 18), (7, 10)], ids=lambda grid: "{}x{}".format(*grid))
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitb14"])
def test_random_weights_equal_timm(name, grid):
    backbone = find_backbone(name)
    network = backbone.network.clone(grid=grid)
    assert_equals_timm(name, backbone, network, network.image_size)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # importing torch
@pytest.mark.parametrize("grid", [(18, 18), (4, 6), (16, 40)], ids=lambda grid: "{}x{}".format(*grid))
def test_positions_are_resampled_as_torch_does(grid):
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).normal(size=(37, 37, 8))
    planes = torch.from_numpy(positions.transpose(2, 0, 1)[None])
    expected = torch.nn.functional.interpolate(planes, size=grid, mode="bicubic", antialias=True)
    np.testing.assert_allclose(resample_positions(positions, grid), expected[0].permute(1, 2, 0).numpy(), atol=1e-12)
