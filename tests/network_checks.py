"""What the tests of the ResNets and of DINOv2 share: timm's fixed random weights, its golden files and its networks.

The generator is scripts/make_golden_networks.py. Weights go through the conversion as tensors in timm's naming, under
the names and shapes that the golden file has from timm.
"""

import importlib
import importlib.util
import json
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.conversion.tensors import convert

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "scripts"))
script = importlib.import_module("make_golden_networks")
places = importlib.import_module("make_golden_backbone").places

TOLERANCE = 1e-4


def load_golden(name):
    """The golden file, its tensors' shapes as tuples."""
    golden = json.loads((HERE / "golden" / f"{name}.json").read_text())
    return golden | {"tensors": {tensor: tuple(shape) for tensor, shape in golden["tensors"].items()}}


def abstract_parameters(network, size):
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), image)["params"]


def random_parameters(network, size):
    """A tree of a small network, of the size that keeps activations near 1: one over the root of what is summed."""
    rng = np.random.default_rng(0)
    like = abstract_parameters(network, size)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) * np.float32(np.prod(leaf.shape[:-1]) ** -0.5), like
    )


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def converted(backbone, network, size, state):
    """Parameters of a network, the backbone's or one for another size of image, by the backbone's own namings."""
    like = abstract_parameters(network, size)
    return convert(state, backbone.namings, network, like, epsilon=backbone.epsilon, source="the state dict")


def stage_ends(backbone, network, parameters, image):
    """All stage ends [h,w,C] of an image [H,W,3] in 0..255, normalised as the backbone says."""
    inputs = (image - np.array(backbone.mean)) / np.array(backbone.deviation)
    ends = jax.jit(network.apply)({"params": parameters}, inputs[None].astype(np.float32))
    return [np.asarray(end[0]) for end in ends]


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def assert_golden(ends, golden):
    """Shapes, 64 entries, mean and deviation of each stage end; the mean against the deviation, being near 0."""
    assert len(ends) == len(golden["stages"])
    for end, expected in zip(ends, golden["stages"], strict=True):
        assert list(end.shape) == expected["shape"]
        entries = end.ravel()[places(end.size)]
        assert relative_error(entries, expected["entries"]) <= TOLERANCE
        assert abs(end.mean(dtype=np.float64) - expected["mean"]) <= TOLERANCE * expected["deviation"]
        assert abs(end.std(dtype=np.float64) - expected["deviation"]) <= TOLERANCE * expected["deviation"]


def golden_image(golden):
    """The probe image of a golden file."""
    image = script.probe_image(*golden["size"])
    assert zlib.crc32(image.tobytes()) == golden["crc32"], "the probe image is no longer that of the golden file"
    return image


def reference_or_skip(name):
    """timm's network with the fixed random weights, or a skip."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return script.torch_reference(name)


def assert_equals_timm(name, backbone, network, size):
    """Whole tensors of every stage end, live; prints the relative errors."""
    model = reference_or_skip(name)
    image = script.probe_image(*size)
    expected = script.stage_ends(model, image)
    state = {tensor: value.numpy() for tensor, value in model.float().state_dict().items()}
    parameters = converted(backbone, network, size, state)
    ends = stage_ends(backbone, network, parameters, image)
    errors = [relative_error(*pair) for pair in zip(ends, expected, strict=True)]
    print(f"{name} {size}: relative errors of the stages", " ".join(f"{error:.1e}" for error in errors))
    assert [end.shape for end in ends] == [end.shape for end in expected]
    assert max(errors) <= TOLERANCE
