"""ResNets: published widths and parameter counts, and every stage end against golden files made by torch and timm.

The weights are random (scripts/make_golden_networks.py), BatchNorm's statistics included; the slow tests compare whole
tensors with timm's networks, where torch and timm are installed.
"""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_checks import (
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

from pushpull_jax.backbones import find_backbone
from pushpull_jax.errors import InputError
from pushpull_jax.models.resnet import ResNet, max_pool

NAMES = ("resnet18", "resnet34", "wide_resnet50_2")
# One block a group, of the cheaper kind.
TINY = ResNet(repeats=(1, 1, 1, 1), bottleneck=False)


@functools.cache
def shapes(network, size=(64, 64), stages=(1, 2, 3, 4, 5)):
    """Shapes of the stage ends, and of the parameters by path, without computing anything."""
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    ends, variables = jax.eval_shape(lambda key, x: network.init_with_output(key, x, stages), jax.random.key(0), image)
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return [end.shape for end in ends], {name: leaf.shape for name, leaf in flat.items()}


# Stage ends of He et al., table 1, and Zagoruyko and Komodakis, with the stem before its pooling.
WIDTHS = {
    "resnet18": (64, 64, 128, 256, 512),
    "resnet34": (64, 64, 128, 256, 512),
    "wide_resnet50_2": (64, 256, 512, 1024, 2048),
}


@pytest.mark.parametrize("name", NAMES)
def test_widths_and_strides_are_the_published_ones(name):
    network = find_backbone(name).network
    assert network.stage_widths == WIDTHS[name]
    ends, _ = shapes(network)
    assert ends == [(1, 64 // 2**i, 64 // 2**i, width) for i, width in enumerate(WIDTHS[name], start=1)]


# Totals with a classifier of 1000 classes, as torchvision's documentation has them: BatchNorm's two parameters a
# channel counted, its statistics not.
TOTALS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "wide_resnet50_2": 68_883_240}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_the_published_ones(name):
    backbone = find_backbone(name)
    classifier = (backbone.network.stage_widths[-1] + 1) * 1000
    flat = flax.traverse_util.flatten_dict(backbone.abstract_parameters(), sep="/")
    # Folding leaves one bias of BatchNorm's gain and bias.
    gains = count({path: leaf for path, leaf in flat.items() if path.endswith("bias")})
    assert count(flat) + gains == TOTALS[name] - classifier


def test_odd_sizes_round_up_at_every_stride():
    ends, _ = shapes(TINY, size=(97, 131))
    # By hand: 97, 49, 25, 13, 7, 4 and 131, 66, 33, 17, 9, 5.
    assert [end[1:3] for end in ends] == [(49, 66), (25, 33), (13, 17), (7, 9), (4, 5)]


@pytest.mark.parametrize(("stages", "groups"), [((1,), ()), ((2,), (1,)), ((4, 2), (1, 2, 3)), ((5,), (1, 2, 3, 4))])
def test_blocks_behind_the_deepest_stage_wanted_are_not_run(stages, groups):
    ends, parameters = shapes(find_backbone("resnet18").network, stages=stages)
    blocks = {f"layer{group}_{repeat}" for group in groups for repeat in range(2)}
    assert {name.split("/")[0] for name in parameters} == {"stem", *blocks}
    assert [end[3] for end in ends] == [WIDTHS["resnet18"][stage - 1] for stage in stages]


@pytest.mark.parametrize("stages", [(), (0,), (1, 6)])
def test_stages_there_are_not_are_refused(stages):
    with pytest.raises(ValueError, match="stages must be some of 1 to 5, got "):
        shapes(TINY, stages=stages)


def test_stages_are_those_of_the_whole_trunk_in_the_order_asked_for():
    image = np.random.default_rng(1).standard_normal((1, 32, 32, 3), np.float32)
    variables = {"params": random_parameters(TINY, (32, 32))}
    run = jax.jit(lambda v, x: (TINY.apply(v, x), TINY.apply(v, x, (3, 1))))
    ends, (third, first) = run(variables, image)
    np.testing.assert_allclose(third, ends[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first, ends[0], rtol=1e-4, atol=1e-5)


def test_max_pool_by_hand():
    # Rows -1 to -4 by columns; padding of zeros would win everywhere, and SAME padding would shift the windows.
    x = -jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(max_pool(x)[0, :, :, 0], [[-1, -2], [-5, -6]])


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_give_the_golden_stage_ends(name):
    golden, backbone = load_golden(name), find_backbone(name)
    image = golden_image(golden)
    parameters = converted(backbone, backbone.network, golden["size"], script.random_state(golden["tensors"]))
    assert_golden(stage_ends(backbone, backbone.network, parameters, image), golden)


def test_tensors_of_another_network_are_refused_with_all_that_differs():
    backbone, wrong = find_backbone("resnet18"), script.random_state(load_golden("resnet18")["tensors"])
    del wrong["layer4.1.bn2.running_var"]
    wrong["layer1.2.conv1.weight"] = np.zeros((64, 64, 3, 3), np.float32)
    wrong["conv1.weight"] = np.zeros((64, 3, 3, 3), np.float32)
    with pytest.raises(InputError) as error:
        backbone.convert(wrong, source="file.pth")
    assert str(error.value).splitlines() == [
        "file.pth: these are not the tensors of the network",
        "  1 missing: layer4.1.bn2.running_var",
        "  1 unknown: layer1.2.conv1.weight",
        "  1 of another shape: conv1.weight (expected [64, 3, 7, 7], got [64, 3, 3, 3])",
    ]


def test_classifier_and_batch_counters_may_be_absent():
    backbone, tensors = find_backbone("resnet18"), load_golden("resnet18")["tensors"]
    left_out = {name for name in tensors if name.startswith("fc.") or name.endswith("num_batches_tracked")}
    assert len(left_out) == 2 + 20  # by hand: weight and bias; 20 BatchNorms, three of them in shortcuts
    trunk = script.random_state({name: shape for name, shape in tensors.items() if name not in left_out})
    parameters = backbone.convert(trunk, source="trunk")
    assert jax.tree.map(np.shape, parameters) == jax.tree.map(lambda leaf: leaf.shape, backbone.abstract_parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # importing torch and timm
@pytest.mark.parametrize("size", [(256, 256), (97, 131)], ids=lambda size: "{}x{}".format(*size))
@pytest.mark.parametrize("name", NAMES)
def test_random_weights_equal_timm(name, size):
    backbone = find_backbone(name)
    assert_equals_timm(name, backbone, backbone.network, size)
