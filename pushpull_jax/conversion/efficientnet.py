"""EfficientNet's tensors in three namings: EfficientNet-PyTorch, timm (both of its families) and Keras.

The three agree on the layers, and name and count blocks differently: EfficientNet-PyTorch through the whole trunk, timm
by stage and place in it from 0, Keras by stage from 1 and a letter. The classifier, the convolution before it and
BatchNorm's batch counters are left out on purpose.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pushpull_jax.conversion.tensors import KERAS, TORCH, Convention, Layer, Naming, Path, Shape, conv_layer
from pushpull_jax.models.efficientnet import EfficientNet


class _Names(NamedTuple):
    """Their names: of the stem, of block number n, repeat r of stage s (from 0), and of the layers in a block."""

    convention: Convention
    stem: tuple[str, str]
    block: Callable[[int, int, int], str]
    layers: dict[str, tuple[str, str | None]]
    # Where these differ in a block without expansion.
    unexpanded: dict[str, tuple[str, str | None]]


_EFFICIENTNET_PYTORCH = _Names(
    convention=TORCH,
    stem=("_conv_stem", "_bn0"),
    block=lambda number, stage, repeat: f"_blocks.{number}.",
    layers={
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "squeeze": ("_se_reduce", None),
        "excite": ("_se_expand", None),
        "project": ("_project_conv", "_bn2"),
    },
    unexpanded={},
)
_TIMM = _Names(
    convention=TORCH,
    stem=("conv_stem", "bn1"),
    block=lambda number, stage, repeat: f"blocks.{stage}.{repeat}.",
    layers={
        "expand": ("conv_pw", "bn1"),
        "depthwise": ("conv_dw", "bn2"),
        "squeeze": ("se.conv_reduce", None),
        "excite": ("se.conv_expand", None),
        "project": ("conv_pwl", "bn3"),
    },
    unexpanded={"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")},
)
_KERAS = _Names(
    convention=KERAS,
    stem=("stem_conv", "stem_bn"),
    block=lambda number, stage, repeat: f"block{stage + 1}{chr(ord('a') + repeat)}_",
    layers={
        "expand": ("expand_conv", "expand_bn"),
        "depthwise": ("dwconv", "bn"),
        "squeeze": ("se_reduce", None),
        "excite": ("se_expand", None),
        "project": ("project_conv", "project_bn"),
    },
    unexpanded={},
)


def _layers(names: _Names, network: EfficientNet, shapes: dict[Path, Shape], epsilon: float) -> Iterator[Layer]:
    prefixes = {}
    for stage, row in enumerate(network.rows):
        for repeat in range(row.repeats):
            prefixes[f"block_{len(prefixes)}"] = names.block(len(prefixes), stage, repeat)
    for path, shape in shapes.items():
        if path[-1] != "kernel":
            continue
        if path[0] == "stem":
            prefix, (conv, norm) = "", names.stem
        else:
            block, layer, _ = path
            expanded = (block, "expand", "kernel") in shapes
            prefix = prefixes[block]
            conv, norm = (names.layers if expanded else names.layers | names.unexpanded)[layer]
        norm = norm and prefix + norm
        yield conv_layer(path[:-1], shape, prefix + conv, norm, convention=names.convention, epsilon=epsilon)


EFFICIENTNET_PYTORCH = Naming(
    name="EfficientNet-PyTorch",
    sign="_blocks.",
    left_out=r"(_conv_head|_bn1|_fc)\..*|.*\.num_batches_tracked",
    layers=functools.partial(_layers, _EFFICIENTNET_PYTORCH),
)
TIMM = Naming(
    name="timm",
    sign="blocks.",
    left_out=r"(conv_head|bn2|classifier)\..*|.*\.num_batches_tracked",
    layers=functools.partial(_layers, _TIMM),
)
KERAS_APPLICATIONS = Naming(
    name="keras.applications",
    sign="block1a_",
    # The normalisation of the input is read as preprocessing, not as parameters.
    left_out=r"(top_conv|top_bn|predictions|normalization(_\d+)?)/.*",
    layers=functools.partial(_layers, _KERAS),
)
