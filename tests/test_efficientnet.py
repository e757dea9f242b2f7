"""The trunk: published widths, strides and parameter counts, and Lite0 against a golden file made by torch and timm.

The golden file's generator is scripts/make_golden_backbone.py; the slow tests compare whole tensors with the reference
that it builds, where torch and timm are installed.
"""

import dataclasses
import functools
import importlib.util
import json
import zlib
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.models.efficientnet import EfficientNet, scaled_width
from pushpull_jax.weights import EFFICIENTNET_LITE0, convert_efficientnet_pytorch, load_backbone

HERE = Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "golden" / "efficientnet_lite0.json").read_text())
ALL_STAGES = (1, 2, 3, 4, 5)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, HERE.parent / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script("make_golden_backbone")


def network(name, **changes):
    """Compound scaling (width, depth) of the paper's table; Lite0 has the numbers of B0."""
    width, depth = {
        "lite0": (1.0, 1.0), "b0": (1.0, 1.0), "b1": (1.0, 1.1), "b2": (1.1, 1.2), "b3": (1.2, 1.4), "b4": (1.4, 1.8),
    }[name]  # fmt: skip
    return EfficientNet(**{"width": width, "depth": depth, "lite": name == "lite0", "padding": "tf"} | changes)


# Smallest of its kind: every width 8 but the last two, 16, one block a row; has blocks with and without identity.
TINY = EfficientNet(width=0.05, depth=0.1, lite=False, padding="tf")


@functools.cache
def shapes(net, size=(64, 64), stages=ALL_STAGES):
    """Shapes of the stage ends, and of the parameters by path, without computing anything."""
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    ends, variables = jax.eval_shape(lambda key, x: net.init_with_output(key, x, stages), jax.random.key(0), image)
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return [end.shape for end in ends], {name: leaf.shape for name, leaf in flat.items()}


# Rows of widths and repeats as torchvision, timm and Keras have them; B4's five ends are the paper's 720 channels.
PUBLISHED = {
    "lite0": (32, (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    "b0": (32, (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    "b1": (32, (16, 24, 40, 80, 112, 192, 320), (2, 3, 3, 4, 4, 5, 2)),
    "b2": (32, (16, 24, 48, 88, 120, 208, 352), (2, 3, 3, 4, 4, 5, 2)),
    "b3": (40, (24, 32, 48, 96, 136, 232, 384), (2, 3, 3, 5, 5, 6, 2)),
    "b4": (48, (24, 32, 56, 112, 160, 272, 448), (2, 4, 4, 6, 6, 8, 2)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_widths_repeats_and_strides_are_the_published_ones(name):
    stem, widths, repeats = PUBLISHED[name]
    net = network(name)
    assert tuple(row.width for row in net.rows) == widths
    assert tuple(row.repeats for row in net.rows) == repeats
    assert net.stage_widths == tuple(widths[i] for i in (0, 1, 2, 4, 6))
    ends, parameters = shapes(net)
    assert ends == [(1, 64 // 2**i, 64 // 2**i, width) for i, width in enumerate(net.stage_widths, start=1)]
    assert parameters["stem/kernel"] == (3, 3, 3, stem)
    assert len({name.split("/")[0] for name in parameters} - {"stem"}) == sum(repeats)


def test_b4_has_the_papers_channels():
    assert network("b4").stage_widths == (24, 32, 56, 160, 448)
    assert sum(network("b4").stage_widths) == 720
    assert sum(network("lite0").stage_widths) == 512


@pytest.mark.parametrize(
    ("width", "factor", "expected"),
    # By hand: to the nearest multiple of 8, at least 8; up instead where that would lose more than a tenth.
    [(32, 1.4, 48), (80, 1.1, 88), (16, 1.1, 16), (8, 1.4, 16), (16, 0.1, 8), (320, 1.0, 320)],
)
def test_scaled_width_by_hand(width, factor, expected):
    assert scaled_width(width, factor) == expected


# Totals with a classifier of 1000 classes: torchvision's documentation (B0-B4; BatchNorm's two parameters a channel
# counted, its statistics not) and, for Lite0, the checkpoint itself, whose every tensor the strict conversion accounts
# for. The head behind the trunk is a 1x1 convolution to `head` channels, its BatchNorm, and the classifier.
TOTALS = {
    "lite0": (4_652_008, 1280),
    "b0": (5_288_548, 1280),
    "b1": (7_794_184, 1280),
    "b2": (9_109_994, 1408),
    "b3": (12_233_232, 1536),
    "b4": (19_341_616, 1792),
}


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_counts_are_the_published_ones(name):
    total, head = TOTALS[name]
    net = network(name)
    last = net.stage_widths[-1]
    trunk = total - (last * head + 2 * head + head * 1000 + 1000)
    _, parameters = shapes(net)
    ours = sum(int(np.prod(shape)) for shape in parameters.values())
    # Folding leaves one bias of BatchNorm's gain and bias; squeeze-and-excitation has a bias and no BatchNorm.
    gains = sum(
        shape[0]
        for name, shape in parameters.items()
        if name.endswith("bias") and "/squeeze/" not in name and "/excite/" not in name
    )
    assert ours + gains == trunk


def test_squeezed_width_is_a_quarter_of_the_blocks_input():
    _, parameters = shapes(network("b0"))
    assert parameters["block_0/squeeze/kernel"] == (32, 8)
    assert parameters["block_1/squeeze/kernel"] == (96, 4)  # expansion of 16
    assert parameters["block_1/excite/kernel"] == (4, 96)
    assert not any("squeeze" in name or "excite" in name for name in shapes(network("lite0"))[1])


@pytest.mark.parametrize("padding", ["tf", "symmetric"])
def test_odd_sizes_round_up_at_every_stride(padding):
    ends, _ = shapes(network("b0", padding=padding), size=(97, 131))
    # By hand: 97, 49, 25, 13, 7, 4 and 131, 66, 33, 17, 9, 5.
    assert [end[1:3] for end in ends] == [(49, 66), (25, 33), (13, 17), (7, 9), (4, 5)]


@pytest.mark.parametrize(("stages", "blocks"), [((1,), 1), ((1, 2), 3), ((3,), 5), ((2, 4), 11), ((5,), 16)])
def test_blocks_behind_the_deepest_stage_wanted_are_not_run(stages, blocks):
    ends, parameters = shapes(network("lite0"), stages=stages)
    # By hand: Lite0 has 1 2 2 3 3 4 1 blocks, and its ends close rows 1, 2, 3, 5 and 7.
    assert {name.split("/")[0] for name in parameters} == {"stem", *(f"block_{i}" for i in range(blocks))}
    assert [end[3] for end in ends] == [(16, 24, 40, 112, 320)[stage - 1] for stage in stages]


@pytest.mark.parametrize("stages", [(), (0,), (1, 6)])
def test_stages_there_are_not_are_refused(stages):
    with pytest.raises(ValueError, match="stages must be some of 1 to 5, got "):
        shapes(TINY, stages=stages)


@pytest.fixture(scope="module")
def tiny():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 32, 32, 3)).astype(np.float32)
    _, flat = shapes(TINY)
    # Of the size that keeps activations near 1: one over the root of the inputs that are summed.
    flat = {
        name: (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32) for name, shape in flat.items()
    }
    variables = {"params": flax.traverse_util.unflatten_dict(flat, sep="/")}
    return image, variables, jax.jit(TINY.apply)(variables, image)


def test_stages_are_those_of_the_whole_trunk_in_the_order_asked_for(tiny):
    image, variables, ends = tiny
    fourth, second = jax.jit(lambda v, x: TINY.apply(v, x, (4, 2)))(variables, image)
    np.testing.assert_allclose(fourth, ends[3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second, ends[1], rtol=1e-4, atol=1e-5)


def test_both_depthwise_lowerings_give_the_same_trunk(tiny):
    image, variables, ends = tiny
    by_convolution = jax.jit(TINY.clone(depthwise="conv").apply)(variables, image)
    for one, expected in zip(by_convolution, ends, strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def lite0():
    backbone, parameters = load_backbone("efficientnet_lite0")
    return backbone, jax.device_put(parameters)


def jax_stage_ends(backbone, parameters, image):
    stages = jax.jit(lambda p, x: backbone.stage_ends(p, x, ALL_STAGES))(parameters, image[None].astype(np.float32))
    return [np.asarray(stage[0]) for stage in stages]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: "{}x{}".format(*golden["size"]))
def test_lite0_with_its_imagenet_weights_equals_the_golden_file(lite0, golden):
    image = script.probe_image(*golden["size"])
    assert zlib.crc32(image.tobytes()) == golden["crc32"], "the probe image is no longer that of the golden file"
    ends = jax_stage_ends(*lite0, image)
    assert len(ends) == len(golden["stages"]) == 5
    for end, expected in zip(ends, golden["stages"], strict=True):
        assert list(end.shape) == expected["shape"]
        entries = end.ravel()[script.places(end.size)]
        assert relative_error(entries, expected["entries"]) <= 1e-4
        # The mean is next to nothing beside the deviation, which is what its error is measured against.
        assert abs(end.mean(dtype=np.float64) - expected["mean"]) <= 1e-4 * expected["deviation"]
        assert abs(end.std(dtype=np.float64) - expected["deviation"]) <= 1e-4 * expected["deviation"]


def reference_or_skip(architecture):
    pytest.importorskip("torch")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return script.torch_reference(architecture)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # importing torch and timm
@pytest.mark.parametrize("size", script.SIZES, ids=lambda size: "{}x{}".format(*size))
def test_lite0_equals_timm(lite0, size):
    reference_or_skip("tf_efficientnet_lite0")
    image = script.probe_image(*size)
    expected = script.lite0_stage_ends(script.checkpoint_path(), image)
    errors = [relative_error(*pair) for pair in zip(jax_stage_ends(*lite0, image), expected, strict=True)]
    print(f"lite0 {size}: relative errors of the stages", " ".join(f"{error:.1e}" for error in errors))
    assert max(errors) <= 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # importing torch and timm
@pytest.mark.parametrize("name", ["b0", "b1", "b2", "b3", "b4"])
def test_b_networks_with_random_weights_equal_timm(name):
    """Scaling, SiLU and squeeze-and-excitation; the statistics of BatchNorm are those of the probe images."""
    model = reference_or_skip(f"tf_efficientnet_{name}")
    image = script.probe_image(97, 131)
    normalised = (image.astype(np.float64) - 127) / 128
    script.settle_statistics(model, normalised)
    expected = script.stage_ends(model, normalised)
    tensors = model.state_dict()
    state = {theirs: tensors[ours].numpy() for ours, theirs in script.source_names(tensors).items()}
    backbone = dataclasses.replace(EFFICIENTNET_LITE0, name=name, network=network(name))
    parameters = convert_efficientnet_pytorch(state, backbone, source=name)
    errors = [relative_error(*pair) for pair in zip(jax_stage_ends(backbone, parameters, image), expected, strict=True)]
    print(f"{name}: relative errors of the stages", " ".join(f"{error:.1e}" for error in errors))
    assert max(errors) <= 1e-4
