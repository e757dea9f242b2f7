"""ResNet's tensors in the naming of torchvision, which is timm's too: layer1.0.conv1, layer1.0.bn1, and so on.

The classifier and BatchNorm's batch counters are left out on purpose.
"""

from collections.abc import Iterator

from pushpull_jax.conversion.tensors import TORCH, Layer, Naming, Path, Shape, conv_layer
from pushpull_jax.models.resnet import ResNet

# The BatchNorm behind each convolution.
_NORMS = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "downsample.0": "downsample.1"}


def _layers(network: ResNet, shapes: dict[Path, Shape], epsilon: float) -> Iterator[Layer]:
    for path, shape in shapes.items():
        if path[-1] != "kernel":
            continue
        if path[0] == "stem":
            prefix, conv = "", "conv1"
        else:
            block, layer, _ = path
            prefix = block.replace("_", ".") + "."
            conv = "downsample.0" if layer == "downsample" else layer
        norm = prefix + _NORMS[conv]
        yield conv_layer(path[:-1], shape, prefix + conv, norm, convention=TORCH, epsilon=epsilon)


TORCHVISION = Naming(
    name="torchvision",
    sign="layer1.",
    left_out=r"fc\..*|.*\.num_batches_tracked",
    layers=_layers,
)
