"""Conversion: three namings of one network, folding against a float64 oracle with BatchNorms, strictness."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from pushpull_jax.backbones import EFFICIENTNET_LITE0
from pushpull_jax.conversion.efficientnet import EFFICIENTNET_PYTORCH, KERAS_APPLICATIONS, TIMM
from pushpull_jax.conversion.tensors import KERAS, TORCH, conv_layer
from pushpull_jax.errors import InputError
from pushpull_jax.models.efficientnet import EfficientNet

ALL_STAGES = (1, 2, 3, 4, 5)
# One row of the paper's table 1 each: kernel, stride, expansion, and the widths of the tiny network of that row.
KERNELS, STRIDES, EXPANSIONS = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1), (1, 6, 6, 6, 6, 6, 6)
WIDTHS = (8, 8, 8, 8, 8, 16, 16)
ENDS = (0, 1, 2, 4, 6)


def tiny_backbone(lite):
    """One block a row. By hand: times 0.05, 192 and 320 become 16 and all else 8; Lite's stem stays 32."""
    return dataclasses.replace(
        EFFICIENTNET_LITE0,
        name="tiny",
        network=EfficientNet(width=0.05, depth=0.1, lite=lite, padding="tf", depthwise="conv"),
        namings=(TIMM, EFFICIENTNET_PYTORCH, KERAS_APPLICATIONS),
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
    parameters = backbone.convert(state, source="random")
    got = jax.jit(lambda p, x: backbone.stage_ends(p, x, ALL_STAGES))(parameters, image[None])
    expected = oracle_stage_ends(state, (image.astype(np.float64) - 127) / 128, lite)
    for one, end in zip(got, expected, strict=True):
        assert one.shape == (1, *end.shape)
        assert np.linalg.norm(one[0] - end) <= 1e-5 * np.linalg.norm(end)


def test_conversion_is_float32_in_the_shapes_of_the_network():
    backbone = tiny_backbone(lite=False)
    parameters = backbone.convert(random_state(lite=False), source="random")
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
    whole, without = (lite.convert(s, source="file") for s in (state, bare))
    jax.tree.map(np.testing.assert_array_equal, whole, without)


def test_one_error_lists_every_wrong_tensor_sorted(lite, state):
    del state["_conv_stem.weight"], state["_blocks.6._bn2.running_var"], state["_blocks.1._bn0.bias"]
    state |= {"_swish.gain": np.zeros(1), "_blocks.7._bn2.bias": np.zeros(8), "_conv_headless.weight": np.zeros(2)}
    state["_bn0.bias"] = np.zeros(31, np.float32)
    state["_blocks.2._depthwise_conv.weight"] = np.zeros((48, 1, 3, 3), np.float32)
    with pytest.raises(InputError) as error:
        lite.convert(state, source="lite0.pth")
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
            lite.convert(wrong, source="file")


def test_weights_of_another_variant_are_refused(state):
    with pytest.raises(InputError, match=r"missing: _blocks\.0\._se_expand\.bias"):
        tiny_backbone(lite=False).convert(state, source="file")


# Block i of the tiny network is the only one of stage i. Theirs by EfficientNet-PyTorch's names of layers.
TIMM_LAYERS = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_se_reduce":
    "se.conv_reduce", "_se_expand": "se.conv_expand", "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
TIMM_UNEXPANDED = TIMM_LAYERS | {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
KERAS_LAYERS = {
    "_expand_conv": "expand_conv", "_bn0": "expand_bn", "_depthwise_conv": "dwconv", "_bn1": "bn",
    "_se_reduce": "se_reduce", "_se_expand": "se_expand", "_project_conv": "project_conv", "_bn2": "project_bn",
}  # fmt: skip
KERAS_PARTS = {"running_mean": "moving_mean", "running_var": "moving_variance"}


def renamed_to_timm(state):
    found = {}
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    for name, tensor in state.items():
        *block, layer, part = name.split(".")
        if block:
            layers = TIMM_LAYERS if EXPANSIONS[int(block[1])] != 1 else TIMM_UNEXPANDED
            found[f"blocks.{block[1]}.0.{layers[layer]}.{part}"] = tensor
        else:
            found[f"{outside[layer]}.{part}"] = tensor
    return found


def renamed_to_keras(state):
    found = {
        "normalization/mean": np.zeros(3),
        "normalization/variance": np.ones(3),
        "normalization/count": np.array(0),
    }
    outside = {"_conv_stem": "stem_conv", "_bn0": "stem_bn", "_conv_head": "top_conv", "_bn1": "top_bn"}
    for name, tensor in state.items():
        *block, layer, part = name.split(".")
        if part == "num_batches_tracked" or layer == "_fc":
            continue
        if tensor.ndim == 4:  # [out,in,k,k] -> [k,k,in,out], and [C,1,k,k] -> [k,k,C,1]
            part, tensor = (
                "kernel",
                tensor.transpose(2, 3, 0, 1) if layer == "_depthwise_conv" else tensor.T.swapaxes(0, 1),
            )
        elif layer.startswith("_bn"):
            part = {"weight": "gamma", "bias": "beta"}.get(part) or KERAS_PARTS[part]
        prefix = f"block{int(block[1]) + 1}a_{KERAS_LAYERS[layer]}" if block else outside[layer]
        found[f"{prefix}/{part}"] = tensor
    return found


@pytest.mark.parametrize("lite", [True, False], ids=["lite", "squeeze-and-excite"])
@pytest.mark.parametrize("renamed", [renamed_to_timm, renamed_to_keras])
def test_three_namings_of_the_same_tensors_give_the_same_parameters(lite, renamed):
    backbone, state = tiny_backbone(lite), random_state(lite)
    expected = backbone.convert(state, source="EfficientNet-PyTorch")
    jax.tree.map(np.testing.assert_array_equal, backbone.convert(renamed(state), source="renamed"), expected)


@pytest.mark.parametrize("renamed", [lambda state: state, renamed_to_timm, renamed_to_keras])
def test_every_tensor_is_used_or_left_out_by_name(lite, state, renamed):
    """Without any one tensor a conversion fails, unless that tensor is left out on purpose: a head, a counter."""
    state = renamed(state)
    optional = set()
    for name in state:
        try:
            lite.convert({other: tensor for other, tensor in state.items() if other != name}, source="file")
            optional.add(name)
        except InputError as error:
            assert f"1 missing: {name}" in str(error)
    heads = (
        "_conv_head.",
        "_bn1.",
        "_fc.",
        "conv_head.",
        "bn2.",
        "classifier.",
        "top_conv/",
        "top_bn/",
        "normalization/",
    )
    assert optional == {n for n in state if n.startswith(heads) or n.endswith(".num_batches_tracked")}


def test_tensors_of_no_known_naming_are_one_error_that_shows_both_sides(lite):
    state = {f"layer{i}.conv.weight": np.zeros(1) for i in range(8)}
    with pytest.raises(InputError) as error:
        lite.convert(state, source="other.pth")
    assert str(error.value) == (
        "other.pth: its tensors are in no naming that is known for this network: expected names that begin with "
        "'blocks.' (timm) or '_blocks.' (EfficientNet-PyTorch) or 'block1a_' (keras.applications), got 8 tensors: "
        "layer0.conv.weight, layer1.conv.weight, layer2.conv.weight, layer3.conv.weight, layer4.conv.weight, "
        "layer5.conv.weight, ..."
    )


def test_half_precision_is_converted_in_double(lite, state):
    """bfloat16 entries are exact in float64, so that only their own rounding shows: 2 ** -9 of each, before folding."""
    half = {name: t.astype(ml_dtypes.bfloat16) if t.ndim else t for name, t in state.items()}
    exact = {name: t.astype(np.float64) for name, t in half.items()}
    jax.tree.map(np.testing.assert_array_equal, *(lite.convert(s, source="file") for s in (half, exact)))


@pytest.mark.parametrize(("convention", "kernel"), [(TORCH, (1, 2, 1, 1)), (KERAS, (1, 1, 2, 1))])
def test_folding_by_hand(convention, kernel):
    layer = conv_layer(("a",), (2, 1), "conv", "norm", convention=convention, epsilon=0.5)
    assert list(layer.tensors.values()) == [kernel, (1,), (1,), (1,), (1,)]
    # gain 3 / sqrt(3.5 + 0.5) = 1.5; bias 5 - 2 * 1.5 = 2.
    leaves = layer.leaves(np.array([2.0, 4.0]).reshape(kernel), *map(np.atleast_1d, (3.0, 5.0, 2.0, 3.5)))
    np.testing.assert_array_equal(leaves["a", "kernel"], [[3.0], [6.0]])
    np.testing.assert_array_equal(leaves["a", "bias"], [2.0])


def test_a_naming_that_forgets_a_leaf_is_a_bug_of_ours(lite, state):
    def all_but_the_stem(network, shapes, epsilon):
        return [
            layer for layer in EFFICIENTNET_PYTORCH.layers(network, shapes, epsilon) if "_bn0.bias" not in layer.tensors
        ]

    naming = dataclasses.replace(
        EFFICIENTNET_PYTORCH, layers=all_but_the_stem, left_out=r"_conv_stem.*|_bn0.*|_conv_h.*|_bn1.*|_fc.*|.*tracked"
    )
    with pytest.raises(ValueError, match="naming EfficientNet-PyTorch: its layers give "):
        dataclasses.replace(lite, namings=(naming,)).convert(state, source="file")
