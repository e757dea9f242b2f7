"""Weights: strict conversion, BatchNorm folding against a float64 oracle that does not fold, files in and out."""

import dataclasses
import os
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from pushpull_jax.errors import InputError
from pushpull_jax.models.efficientnet import EfficientNet
from pushpull_jax.weights import (
    EFFICIENTNET_LITE0,
    convert_efficientnet_pytorch,
    find_backbone,
    load_backbone,
    load_parameters,
    save_parameters,
)

ALL_STAGES = (1, 2, 3, 4, 5)
# One row of the paper's table 1 each: kernel, stride, expansion, and the widths of the tiny network of that row.
KERNELS, STRIDES, EXPANSIONS = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1), (1, 6, 6, 6, 6, 6, 6)
WIDTHS = (8, 8, 8, 8, 8, 16, 16)
ENDS = (0, 1, 2, 4, 6)


def tiny_backbone(lite):
    """One block a row. By hand: times 0.05, 192 and 320 become 16 and all else 8; Lite's stem stays 32."""
    return dataclasses.replace(
        EFFICIENTNET_LITE0, name="tiny", network=EfficientNet(width=0.05, depth=0.1, lite=lite, padding="tf")
    )


def random_state(lite, seed=0):
    """A state dict in the naming of EfficientNet-PyTorch with the head that it also holds."""
    rng = np.random.default_rng(seed)
    state = {}

    def convolution(name, out, inputs, kernel, norm=None):
        scale = 1 / np.sqrt(inputs * kernel**2)
        state[f"{name}.weight"] = rng.normal(size=(out, inputs, kernel, kernel), scale=scale)
        if norm is None:
            state[f"{name}.bias"] = rng.normal(size=out)
            return
        state[f"{norm}.weight"] = rng.uniform(0.5, 1.5, out)
        state[f"{norm}.bias"] = rng.normal(size=out, scale=0.5)
        state[f"{norm}.running_mean"] = rng.normal(size=out, scale=0.1)
        # Small enough for another epsilon than 1e-3 to show.
        state[f"{norm}.running_var"] = rng.uniform(0.1, 2, out)
        state[f"{norm}.num_batches_tracked"] = np.array(7)

    width = 32 if lite else 8
    convolution("_conv_stem", width, 3, 3, "_bn0")
    for i, out in enumerate(WIDTHS):
        block, wide = f"_blocks.{i}", width * EXPANSIONS[i]
        if EXPANSIONS[i] != 1:
            convolution(f"{block}._expand_conv", wide, width, 1, f"{block}._bn0")
        convolution(f"{block}._depthwise_conv", wide, 1, KERNELS[i], f"{block}._bn1")
        if not lite:
            convolution(f"{block}._se_reduce", width // 4, wide, 1)
            convolution(f"{block}._se_expand", wide, width // 4, 1)
        convolution(f"{block}._project_conv", out, wide, 1, f"{block}._bn2")
        width = out
    convolution("_conv_head", 24, width, 1, "_bn1")
    state["_fc.weight"], state["_fc.bias"] = rng.normal(size=(10, 24)), rng.normal(size=10)
    return {name: value.astype(np.int64 if value.ndim == 0 else np.float32) for name, value in state.items()}


def oracle_stage_ends(state, image, lite):
    """The network as published, in float64 and with its BatchNorms: image [H,W,3] -> stage ends [h,w,C]."""
    state = {name: value.astype(np.float64) for name, value in state.items()}

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def activation(x):
        return np.clip(x, 0, 6) if lite else x * sigmoid(x)

    def convolution(x, name, stride=1):
        weight = state[f"{name}.weight"]
        size, depthwise = weight.shape[2], weight.shape[1] == 1 and x.shape[-1] > 1
        out = [-(-n // stride) for n in x.shape[:2]]
        total = [max((m - 1) * stride + size - n, 0) for m, n in zip(out, x.shape[:2], strict=True)]
        x = np.pad(x, (*((t // 2, t - t // 2) for t in total), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))[::stride, ::stride]
        if depthwise:
            return np.einsum("hwcij,cij->hwc", windows, weight[:, 0])
        return np.einsum("hwcij,dcij->hwd", windows, weight)

    def norm(x, name):
        gain, bias, mean, variance = (state[f"{name}.{p}"] for p in ("weight", "bias", "running_mean", "running_var"))
        return gain * (x - mean) / np.sqrt(variance + 1e-3) + bias

    x = activation(norm(convolution(image.astype(np.float64), "_conv_stem", 2), "_bn0"))
    ends = []
    for i in range(len(WIDTHS)):
        block, inputs = f"_blocks.{i}", x
        if EXPANSIONS[i] != 1:
            x = activation(norm(convolution(x, f"{block}._expand_conv"), f"{block}._bn0"))
        x = activation(norm(convolution(x, f"{block}._depthwise_conv", STRIDES[i]), f"{block}._bn1"))
        if not lite:
            squeezed = x.mean((0, 1), keepdims=True)
            squeezed = convolution(squeezed, f"{block}._se_reduce") + state[f"{block}._se_reduce.bias"]
            gate = convolution(squeezed * sigmoid(squeezed), f"{block}._se_expand") + state[f"{block}._se_expand.bias"]
            x = x * sigmoid(gate)
        x = norm(convolution(x, f"{block}._project_conv"), f"{block}._bn2")
        if x.shape == inputs.shape:
            x = x + inputs
        ends.append(x)
    return [ends[i] for i in ENDS]


@pytest.mark.parametrize("lite", [True, False], ids=["lite", "squeeze-and-excite"])
def test_folded_network_equals_an_oracle_with_batch_norms(lite):
    backbone, state = tiny_backbone(lite), random_state(lite)
    image = np.random.default_rng(1).uniform(0, 255, (37, 42, 3)).astype(np.float32)
    parameters = convert_efficientnet_pytorch(state, backbone, source="random")
    got = jax.jit(lambda p, x: backbone.stage_ends(p, x, ALL_STAGES))(parameters, image[None])
    expected = oracle_stage_ends(state, (image.astype(np.float64) - 127) / 128, lite)
    for one, end in zip(got, expected, strict=True):
        assert one.shape == (1, *end.shape)
        assert np.linalg.norm(one[0] - end) <= 1e-5 * np.linalg.norm(end)


def test_conversion_is_float32_in_the_shapes_of_the_network():
    backbone = tiny_backbone(lite=False)
    parameters = convert_efficientnet_pytorch(random_state(lite=False), backbone, source="random")
    like = backbone.abstract_parameters()
    assert jax.tree.structure(parameters) == jax.tree.structure(like)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), parameters) == jax.tree.map(lambda a: (a.shape, a.dtype), like)


@pytest.fixture(scope="module")
def lite():
    return tiny_backbone(lite=True)


@pytest.fixture
def state():
    return random_state(lite=True)


def test_head_and_batch_counters_may_be_absent(lite, state):
    head = ("_conv_head.", "_bn1.", "_fc.")
    left_out = [name for name in state if name.startswith(head) or name.endswith(".num_batches_tracked")]
    # By hand: the head is 1 + 5 + 2 tensors; the stem has one counter, the blocks 2 and six times 3.
    assert len(left_out) == 8 + 21
    bare = {name: value for name, value in state.items() if name not in left_out}
    whole, without = (convert_efficientnet_pytorch(s, lite, source="file") for s in (state, bare))
    jax.tree.map(np.testing.assert_array_equal, whole, without)


def test_one_error_lists_every_wrong_tensor_sorted(lite, state):
    del state["_conv_stem.weight"], state["_blocks.6._bn2.running_var"], state["_blocks.1._bn0.bias"]
    state |= {"_swish.gain": np.zeros(1), "_blocks.7._bn2.bias": np.zeros(8), "_conv_headless.weight": np.zeros(2)}
    state["_bn0.bias"] = np.zeros(31, np.float32)
    state["_blocks.2._depthwise_conv.weight"] = np.zeros((48, 1, 3, 3), np.float32)
    with pytest.raises(InputError) as error:
        convert_efficientnet_pytorch(state, lite, source="lite0.pth")
    assert str(error.value).splitlines() == [
        "lite0.pth: these are not the tensors of the network",
        "  3 missing: _blocks.1._bn0.bias, _blocks.6._bn2.running_var, _conv_stem.weight",
        "  3 unknown: _blocks.7._bn2.bias, _conv_headless.weight, _swish.gain",
        "  2 of another shape: _blocks.2._depthwise_conv.weight (expected [48, 1, 5, 5], got [48, 1, 3, 3]), "
        "_bn0.bias (expected [32], got [31])",
    ]


def test_each_kind_of_wrong_tensor_is_an_error_by_itself(lite, state):
    missing = {name: value for name, value in state.items() if name != "_bn0.bias"}
    for wrong in (missing, state | {"more": np.zeros(1)}, state | {"_bn0.bias": np.zeros((32, 1), np.float32)}):
        with pytest.raises(InputError, match="^file: these are not the tensors of the network\n  1 "):
            convert_efficientnet_pytorch(wrong, lite, source="file")


def test_weights_of_another_variant_are_refused(state):
    with pytest.raises(InputError, match=r"missing: _blocks\.0\._se_expand\.bias"):
        convert_efficientnet_pytorch(state, tiny_backbone(lite=False), source="file")


class Identity:
    """Stands in for a network: returns what it is given."""

    def apply(self, variables, images, stages):
        return images, variables, stages


def test_input_of_lite0_is_scaled_from_0_255():
    backbone = dataclasses.replace(EFFICIENTNET_LITE0, network=Identity())
    images = np.array([0, 127, 255], np.float32)[None, :, None, None] * np.ones((1, 3, 2, 3), np.float32)
    got, variables, stages = backbone.stage_ends({"a": 1}, jnp.asarray(images), (2, 3))
    # (x - 127) / 128, exact in float32.
    np.testing.assert_array_equal(got[0, :, 0, 0], np.array([-127 / 128, 0, 1], np.float32))
    np.testing.assert_array_equal(got, np.broadcast_to(got[:, :, :1, :1], images.shape))
    assert (variables, stages) == ({"params": {"a": 1}}, (2, 3))


def test_input_is_normalised_channel_by_channel_in_its_own_dtype():
    numbers = {"mean": (0.0, 1.0, 2.0), "deviation": (1.0, 2.0, 4.0)}
    backbone = dataclasses.replace(EFFICIENTNET_LITE0, network=Identity(), **numbers)
    got, _, _ = backbone.stage_ends({}, jnp.full((2, 1, 1, 3), 10, jnp.bfloat16), ALL_STAGES)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[1, 0, 0].astype(np.float32), [10.0, 4.5, 2.0])


def test_integer_images_are_refused_rather_than_wrapped_around():
    with pytest.raises(ValueError, match="uint8"):
        EFFICIENTNET_LITE0.stage_ends({}, np.zeros((1, 32, 32, 3), np.uint8), (1,))


def test_imagenet_weights_are_found_without_a_path_and_agree_with_the_network():
    backbone, parameters = load_backbone("efficientnet_lite0")
    assert backbone is EFFICIENTNET_LITE0 is find_backbone("efficientnet_lite0")
    assert backbone.licence == "Apache-2.0"
    like = backbone.abstract_parameters()
    assert jax.tree.map(lambda a: (a.shape, a.dtype), parameters) == jax.tree.map(lambda a: (a.shape, a.dtype), like)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters))


def test_converted_parameters_survive_a_file(tmp_path):
    """The arrays of a conversion are transposed views, whose bytes do not lie in the order of their entries."""
    backbone, parameters = load_backbone("efficientnet_lite0")
    path = tmp_path / "backbone.safetensors"
    save_parameters(path, parameters, metadata={"licence": "Apache-2.0"})
    again, from_file = load_backbone("efficientnet_lite0", weights=path)
    assert again is backbone
    jax.tree.map(np.testing.assert_array_equal, from_file, parameters)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"licence": "Apache-2.0"}
        assert "block_0/depthwise/kernel" in file.keys()
    assert os.listdir(tmp_path) == ["backbone.safetensors"]


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    return {
        "shift": rng.normal(size=3).astype(np.float32),
        "layer": {"kernel": np.asfortranarray(rng.normal(size=(3, 4)).astype(np.float32)), "step": np.float32(0.5)},
    }


def test_saved_parameters_come_back(tmp_path, tree):
    for leaves in (tree, jax.tree.map(jnp.asarray, tree)):
        save_parameters(tmp_path / "a.safetensors", leaves, metadata={})
        back = load_parameters(tmp_path / "a.safetensors", like=tree)
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, back, tree)
        assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(np.float32)}
        assert back["layer"]["step"].shape == ()


def test_files_tensors_must_be_exactly_those_asked_for(tmp_path, tree):
    path = tmp_path / "a.safetensors"
    save_parameters(path, tree, metadata={})
    like = {"shift": np.zeros((1, 3)), "layer": {"kernel": np.zeros((3, 4))}, "scale": np.zeros(3)}
    with pytest.raises(InputError) as error:
        load_parameters(path, like=like)
    assert str(error.value).splitlines() == [
        f"{path}: these are not the tensors of the network",
        "  1 missing: scale",
        "  1 unknown: layer/step",
        "  1 of another shape: shift (expected [1, 3], got [3])",
    ]


def test_every_truncation_of_a_file_is_an_error_that_names_it(tmp_path, tree):
    path = tmp_path / "a.safetensors"
    save_parameters(path, tree, metadata={"source": "test"})
    data = path.read_bytes()
    for n_bytes in range(len(data)):
        path.write_bytes(data[:n_bytes])
        with pytest.raises(InputError, match=re.escape(str(path))):
            load_parameters(path, like=tree)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, tree, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_parameters(path, tree, metadata={})
    before = path.read_bytes()

    def disk_full(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_parameters(path, tree, metadata={})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("call", [find_backbone, load_backbone])
def test_unknown_backbone_offers_the_nearest(call):
    with pytest.raises(InputError, match=r"no backbone 'efficientnet_light0'; did you mean efficientnet_lite0\?"):
        call("efficientnet_light0")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_that_cannot_be_used_is_named(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(InputError, match=re.escape(str(path))):  # absent
        load_backbone("efficientnet_lite0", weights=path)
    path.write_text("no weights, but a text that is long enough to be taken for a header\n" * 4)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_backbone("efficientnet_lite0", weights=str(path))
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_backbone("efficientnet_lite0", weights=path)


def test_a_file_of_another_network_is_named(tmp_path, tree):
    path = tmp_path / "weights.safetensors"
    save_parameters(path, tree, metadata={})
    names = flax.traverse_util.flatten_dict(EFFICIENTNET_LITE0.abstract_parameters())
    with pytest.raises(InputError, match=f"{len(names)} missing: block_0/depthwise/bias, ") as error:
        load_backbone("efficientnet_lite0", weights=path)
    assert str(error.value).startswith(f"{path}: ")
    assert "3 unknown: layer/kernel, layer/step, shift" in str(error.value)
