"""The trunk: published widths, strides and parameter counts, and every network against another implementation.

TensorFlow's family, B0 to B4, is compared live with Keras; Lite0 and timm's own family with golden files made by torch
and timm (scripts/make_golden_backbone.py and make_golden_efficientnet.py). The slow tests compare whole tensors with
the references that these scripts build, where torch and timm are installed.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import zlib
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.backbones import BACKBONES, find_backbone
from pushpull_jax.models import efficientnet
from pushpull_jax.models.efficientnet import EfficientNet, scaled_width
from pushpull_jax.weights import load_backbone

HERE = Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "golden" / "efficientnet_lite0.json").read_text())
ALL_STAGES = (1, 2, 3, 4, 5)


SCRIPTS = HERE.parent / "scripts"


def load_script(name):
    """A script as a module; scripts import each other as Python does when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return importlib.import_module(name)


script = load_script("make_golden_backbone")
random_script = load_script("make_golden_efficientnet")


def network(name, **changes):
    """Compound scaling (width, depth) of the paper's table; Lite0 has the numbers of B0."""
    width, depth = {
        "lite0": (1.0, 1.0), "b0": (1.0, 1.0), "b1": (1.0, 1.1), "b2": (1.1, 1.2), "b3": (1.2, 1.4), "b4": (1.4, 1.8),
    }[name]  # fmt: skip
    # The plain depthwise convolution is compiled more quickly, and is one of two lowerings that agree.
    fixed = {"lite": name == "lite0", "padding": "tf", "depthwise": "conv"}
    return EfficientNet(**{"width": width, "depth": depth} | fixed | changes)


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


@pytest.fixture(scope="module")
def batch(tiny):
    """Six images, and their stage ends by XLA's own convolutions, all at once."""
    images = np.random.default_rng(1).normal(size=(6, 32, 32, 3)).astype(np.float32)
    return images, jax.jit(TINY.clone(depthwise="conv").apply)(tiny[1], images)


@pytest.mark.skipif(os.environ["JAX_PLATFORMS"] != "cpu", reason="only a CPU takes a few at a time")
@pytest.mark.parametrize("images_a_part", [1, 2])
def test_images_a_few_at_a_time_give_the_same_trunk(tiny, batch, monkeypatch, images_a_part):
    images, expected = batch
    # By hand: the second row expands 16 x 16 x 8 to 16 x 16 x 48 float32, the widest tensor of the network.
    monkeypatch.setattr(efficientnet, "PART_BYTES", images_a_part * 16 * 16 * 48 * 4)
    lowered = jax.jit(TINY.clone().apply).lower(tiny[1], images)
    widest = {line.split("->")[-1].strip() for line in lowered.as_text().splitlines() if "16x16x48xf32" in line}
    assert any(f"tensor<{images_a_part}x16x16x48xf32>" in line for line in widest)
    assert not any("tensor<6x16x16x48xf32>" in line for line in widest)
    program = lowered.compile()
    for one, of_all in zip(program(tiny[1], images), expected, strict=True):
        np.testing.assert_allclose(one, of_all, rtol=1e-4, atol=1e-5)


def test_a_symbolic_batch_is_exported(tiny, batch):
    images, expected = batch
    (count,) = jax.export.symbolic_shape("count")
    exported = jax.export.export(jax.jit(functools.partial(TINY.apply, tiny[1])))(
        jax.ShapeDtypeStruct((count, 32, 32, 3), jnp.float32)
    )
    for one, of_all in zip(exported.call(images), expected, strict=True):
        np.testing.assert_allclose(one, of_all, rtol=1e-4, atol=1e-5)


def test_gpu_and_tpu_get_plain_convolutions_of_the_whole_batch(tiny, batch):
    lower = jax.export.export(jax.jit(TINY.apply), platforms=["cuda"])
    text = lower(tiny[1], batch[0]).mlir_module()
    assert "stablehlo.while" not in text
    # By hand: a stem and seven depthwise convolutions.
    assert text.count("stablehlo.convolution") == 8


def test_the_trunk_computes_in_bfloat16_on_request(tiny, batch):
    images, expected = batch
    net = TINY.clone(dtype=jnp.bfloat16, depthwise="conv")
    ends = jax.jit(net.apply)(tiny[1], images)
    # bfloat16 has 8 bits: roundings of 2^-9 a layer, of which some twenty are passed through.
    for one, in_float32 in zip(ends, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert 1e-4 < relative_error(one.astype(jnp.float32), in_float32) < 5e-2
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0), images))} == {
        jnp.dtype(jnp.float32)
    }


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def lite0():
    backbone, parameters = load_backbone("efficientnet_lite0")
    return backbone, jax.device_put(parameters)


def jax_stage_ends(backbone, parameters, image, **options):
    program = jax.jit(lambda p, x: backbone.stage_ends(p, x, ALL_STAGES), **options)
    return [np.asarray(stage[0]) for stage in program(parameters, image[None].astype(np.float32))]


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


@pytest.fixture
def quick(monkeypatch):
    """Gives the backbone of a name the depthwise lowering that is traced and compiled more quickly."""

    def of(name):
        backbone = dataclasses.replace(BACKBONES[name], network=BACKBONES[name].network.clone(depthwise="conv"))
        monkeypatch.setitem(BACKBONES, name, backbone)
        return backbone

    return of


def quick_stage_ends(backbone, parameters, image):
    """The stage ends by a program that is less optimised, and compiled in half the time."""
    return jax_stage_ends(backbone, parameters, image, compiler_options={"xla_backend_optimization_level": 0})


def slow_but(quick_ones, names):
    """Names as parameters, all but some of them marked slow."""
    return [pytest.param(name, marks=() if name in quick_ones else pytest.mark.slow) for name in names]


# ---- timm's own weight family: symmetric padding, epsilon 1e-5


@pytest.mark.parametrize("name", slow_but(("efficientnet_b0", "efficientnet_b4"), random_script.NETWORKS))
def test_timms_family_with_random_weights_equals_the_golden_file(quick, name):
    golden = json.loads((HERE / "golden" / f"{name}.json").read_text())
    image = script.probe_image(*golden["size"])
    assert zlib.crc32(image.tobytes()) == golden["crc32"], "the probe image is no longer that of the golden file"
    backbone = quick(name)
    parameters = backbone.convert(random_script.random_state(golden["tensors"]), source=name)
    for end, expected in zip(quick_stage_ends(backbone, parameters, image), golden["stages"], strict=True):
        assert list(end.shape) == expected["shape"]
        assert relative_error(end.ravel()[script.places(end.size)], expected["entries"]) <= 1e-4
        assert abs(end.mean(dtype=np.float64) - expected["mean"]) <= 1e-4 * expected["deviation"]
        assert abs(end.std(dtype=np.float64) - expected["deviation"]) <= 1e-4 * expected["deviation"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # importing torch and timm
@pytest.mark.parametrize("name", [name for name in BACKBONES if "efficientnet_b" in name])
def test_b_networks_with_random_weights_equal_timm(name):
    """Both families; TensorFlow's also by EfficientNet-PyTorch's naming of the same tensors."""
    reference_or_skip(name)
    model, shapes = random_script.random_reference(name)
    state = random_script.random_state(shapes)
    backbone, image = find_backbone(name), script.probe_image(97, 131)
    normalised = (image - random_script.MEAN) / random_script.DEVIATION
    expected = script.stage_ends(model, normalised)
    parameters = backbone.convert(state, source=name)
    errors = [relative_error(*pair) for pair in zip(jax_stage_ends(backbone, parameters, image), expected, strict=True)]
    print(f"{name}: relative errors of the stages", " ".join(f"{error:.1e}" for error in errors))
    assert max(errors) <= 1e-4
    if name.startswith("tf_"):
        kept = {ours: state[ours] for ours in state if not ours.endswith(".num_batches_tracked")}
        renamed = {theirs: kept[ours] for ours, theirs in script.source_names(kept).items()}
        jax.tree.map(np.testing.assert_array_equal, backbone.convert(renamed, source=name), parameters)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # importing torch and timm
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_torch_wrote_is_read(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    reference_or_skip("efficientnet_b0")
    model, shapes = random_script.random_reference("efficientnet_b0")
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": model.float().state_dict()}, path, _use_new_zipfile_serialization=zipped)
    backbone, parameters = load_backbone("efficientnet_b0", weights=path)
    expected = backbone.convert(random_script.random_state(shapes), source="state")
    jax.tree.map(np.testing.assert_array_equal, parameters, expected)


# ---- TensorFlow's weight family, live against Keras: SAME padding, epsilon 1e-3

KERAS_ENDS = {
    # A row of a single block has no identity to add.
    "b0": ("block1a_project_bn", "block2b_add", "block3b_add", "block5c_add", "block7a_project_bn"),
    "b1": ("block1b_add", "block2c_add", "block3c_add", "block5d_add", "block7b_add"),
    "b2": ("block1b_add", "block2c_add", "block3c_add", "block5d_add", "block7b_add"),
    "b3": ("block1b_add", "block2c_add", "block3c_add", "block5e_add", "block7b_add"),
    "b4": ("block1b_add", "block2d_add", "block3d_add", "block5f_add", "block7b_add"),
}
KERAS_SIZE = (72, 61)
# The file of ImageNet weights holds ImageNet's mean, and as its variance ImageNet's deviation (tensorflow #49930).
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def fill_at_random(model, mean, variance):
    """Weights that keep activations near 1, and statistics of BatchNorm that let its epsilon show."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        for weight in layer.weights:
            shape = weight.shape
            fan_in = np.prod(shape[:2] if "dwconv" in layer.name else shape[:-1])
            draw = {
                "kernel": lambda shape=shape, fan_in=fan_in: rng.normal(0, 0.15 / np.sqrt(fan_in), shape),
                "bias": lambda shape=shape: rng.uniform(-0.2, 0.2, shape),
                "gamma": lambda shape=shape: rng.uniform(0.5, 1.5, shape),
                "beta": lambda shape=shape: rng.uniform(-0.2, 0.2, shape),
                "moving_mean": lambda shape=shape: rng.uniform(-0.2, 0.2, shape),
                "moving_variance": lambda shape=shape: rng.uniform(0.005, 0.05, shape),
                "mean": lambda: np.array(mean),
                "variance": lambda: np.array(variance),
                "count": lambda: np.array(0),
            }[weight.name]
            weight.assign(draw())


def write_keras_2_file(model, path):
    """A weights file in the layout of keras.applications' downloads, which Keras 3 reads by the order in it."""
    import h5py

    with h5py.File(path, "w") as file:
        layers = [layer for layer in model.layers if layer.weights]
        file.attrs["layer_names"] = [layer.name.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = "tensorflow", "2.4.0"
        for layer in layers:
            parts = {"kernel": "depthwise_kernel"} if "dwconv" in layer.name else {}
            names = [f"{layer.name}/{parts.get(weight.name, weight.name)}:0" for weight in layer.weights]
            group = file.create_group(layer.name)
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, weight in zip(names, layer.weights, strict=True):
                group[name] = np.asarray(weight)


def keras_stage_ends(model, name, image):
    import keras

    ends = keras.Model(model.input, [model.get_layer(end).output for end in KERAS_ENDS[name]])
    return [np.asarray(end[0]) for end in ends(image[None].astype(np.float32))]


def assert_stages_agree(name, got, expected):
    errors = [relative_error(*pair) for pair in zip(got, expected, strict=True)]
    print(f"{name}: relative errors of the stages", " ".join(f"{error:.1e}" for error in errors))
    assert [end.shape for end in got] == [end.shape for end in expected]
    assert max(errors) <= 1e-4


@pytest.fixture
def keras_application():
    """Builds the network of a name, or skips where Keras is not installed."""
    applications = pytest.importorskip("keras").applications
    options = {"include_top": False, "input_shape": (*KERAS_SIZE, 3)}
    return lambda name, weights: getattr(applications, f"EfficientNet{name.upper()}")(weights=weights, **options)


@pytest.mark.filterwarnings("ignore")  # importing Keras
@pytest.mark.parametrize("name", slow_but(("b4",), ("b1", "b2", "b3", "b4")))
def test_tensorflows_family_with_random_weights_equals_keras(keras_application, quick, tmp_path, name):
    """Pixels in 0..255 on both sides; the file brings a normalisation of its own."""
    model = keras_application(name, None)
    fill_at_random(model, mean=(0.1, 0.2, 0.7), variance=(0.05, 0.1, 0.02))
    write_keras_2_file(model, tmp_path / "weights.h5")
    model.load_weights(tmp_path / "weights.h5")  # which also brings the normalisation into force
    quick(f"tf_efficientnet_{name}")
    backbone, parameters = load_backbone(f"tf_efficientnet_{name}", weights=tmp_path / "weights.h5")
    # By hand: 255 times the mean, and 255 times the root of the variance.
    np.testing.assert_allclose(backbone.mean, [25.5, 51.0, 178.5], rtol=1e-6)
    np.testing.assert_allclose(backbone.deviation, 255 * np.sqrt([0.05, 0.1, 0.02]), rtol=1e-6)
    image = script.probe_image(*KERAS_SIZE)
    assert_stages_agree(name, quick_stage_ends(backbone, parameters, image), keras_stage_ends(model, name, image))


@pytest.mark.filterwarnings("ignore")  # importing Keras
def test_weights_in_keras_own_cache_equal_its_imagenet_network(keras_application, quick, tmp_path, monkeypatch):
    """Keras reads the same file as its ImageNet weights, for which its network normalises once more."""
    random = keras_application("b0", None)
    fill_at_random(random, *IMAGENET)
    path = tmp_path / "models" / "efficientnetb0_notop.h5"
    path.parent.mkdir()
    write_keras_2_file(random, path)
    builder = importlib.import_module("keras.src.applications.efficientnet")
    monkeypatch.setattr(builder.file_utils, "get_file", lambda name, *_, **__: str(path.with_name(name)))
    model = keras_application("b0", "imagenet")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    by_name = quick("tf_efficientnet_b0")
    backbone, parameters = load_backbone("tf_efficientnet_b0", weights="keras")
    np.testing.assert_allclose(backbone.mean, by_name.mean, rtol=1e-6)
    np.testing.assert_allclose(backbone.deviation, by_name.deviation, rtol=1e-6)
    assert backbone.source.startswith("keras.applications.EfficientNetB0")
    assert backbone.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    image = script.probe_image(*KERAS_SIZE)
    assert_stages_agree("b0", quick_stage_ends(backbone, parameters, image), keras_stage_ends(model, "b0", image))
