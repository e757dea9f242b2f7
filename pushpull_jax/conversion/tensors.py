"""What all conversions of pretrained weights share: recognising a naming, the strict check, folding, kernel layouts.

A `Naming` is one way to name and lay out the tensors of a network: timm's, Keras's. It says layer by layer which
tensors a part of our tree is made of; nothing else is allowed in the file but what the naming leaves out on purpose.
Each BatchNorm is folded into the kernel and bias before it, in float64. All functions are pure, state dicts are NumPy.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import numpy as np

from pushpull_jax.errors import InputError

Parameters = dict[str, Any]
State = Mapping[str, np.ndarray]
Shape = tuple[int, ...]
Path = tuple[str, ...]
# How many names an error shows of a state dict that nobody knows.
SHOWN = 6


class Layer(NamedTuple):
    """What one part of our tree is made of.

    Attributes:
        tensors: names of the source's tensors and the shapes they must have.
        leaves: from these tensors, float64 and in that order, to our leaves by path.
    """

    tensors: dict[str, Shape]
    leaves: Callable[..., dict[Path, np.ndarray]]


@dataclass(frozen=True)
class Naming:
    """One convention for the tensors of a network.

    Attributes:
        name: what messages call it.
        sign: beginning of the names of tensors, by which a state dict of this naming is known.
        left_out: regular expression of the names, in full, that are left out on purpose.
        layers: network, shapes of our leaves by path, epsilon of the BatchNorms -> what our tree is made of, by parts.
    """

    name: str
    sign: str
    left_out: str
    layers: Callable[[nn.Module, dict[Path, Shape], float], Iterable[Layer]]


class Convention(NamedTuple):
    """How a framework names and lays out the parts of a convolution and its BatchNorm.

    Attributes:
        separator: between the name of a layer and its part.
        kernel: name of a kernel.
        norm: names of gain, bias, mean and variance.
        axes: by the number of axes that our kernel has, which of these each axis of theirs is, None for an axis of 1.
    """

    separator: str
    kernel: str
    norm: tuple[str, str, str, str]
    axes: dict[int, tuple[int | None, ...]]


# Our kernels: pointwise [in,out], depthwise [k,k,C], dense [k,k,in,out]; the output's channels are the last axis.
TORCH = Convention(
    separator=".",
    kernel="weight",
    norm=("weight", "bias", "running_mean", "running_var"),
    axes={2: (1, 0, None, None), 3: (2, None, 0, 1), 4: (3, 2, 0, 1)},
)
KERAS = Convention(
    separator="/",
    kernel="kernel",
    norm=("gamma", "beta", "moving_mean", "moving_variance"),
    axes={2: (None, None, 0, 1), 3: (0, 1, 2, None), 4: (0, 1, 2, 3)},
)


def conv_layer(
    path: Path, shape: Shape, conv: str, norm: str | None, *, convention: Convention, epsilon: float
) -> Layer:
    """A convolution of ours from theirs with the BatchNorm behind it folded in, or, norm None, with its own bias.

    kernel = k g / sqrt(v + epsilon), bias = b - m g / sqrt(v + epsilon), of gain g, bias b, mean m, variance v.

    Args:
        path: of our layer, which has the leaves kernel and bias.
        shape: of our kernel.
        conv: their convolution.
        norm: their BatchNorm.
        convention: of their framework.
        epsilon: of their BatchNorm.
    """
    axes = convention.axes[len(shape)]
    kept = [axis for axis in axes if axis is not None]
    dot = convention.separator
    tensors = {f"{conv}{dot}{convention.kernel}": tuple(1 if axis is None else shape[axis] for axis in axes)}
    if norm is None:
        tensors[f"{conv}{dot}bias"] = shape[-1:]
    else:
        tensors |= {f"{norm}{dot}{part}": shape[-1:] for part in convention.norm}

    def leaves(kernel: np.ndarray, *rest: np.ndarray) -> dict[Path, np.ndarray]:
        kernel = kernel.reshape([shape[axis] for axis in kept]).transpose(np.argsort(kept))
        if norm is None:
            (bias,) = rest
        else:
            gain, bias, mean, variance = rest
            gain = gain / np.sqrt(variance + epsilon)
            kernel, bias = kernel * gain, bias - mean * gain
        return {(*path, "kernel"): kernel, (*path, "bias"): bias}

    return Layer(tensors, leaves)


def convert(
    state: State,
    namings: tuple[Naming, ...],
    network: nn.Module,
    like: Parameters,
    *,
    epsilon: float,
    source: str,
) -> Parameters:
    """Our parameters from a state dict in one of several namings.

    Args:
        state: tensors by name.
        namings: that the network can be converted from.
        network: that the parameters are for.
        like: its tree of anything with a shape.
        epsilon: of the BatchNorms that are folded.
        source: what messages call the file.

    Returns:
        Nested dicts of float32 arrays, as `like`.

    Raises:
        InputError: the naming is none of these, or tensors are missing, unknown or of another shape; all are listed.
    """
    naming = _recognised(state, namings, source)
    shapes = {path: tuple(leaf.shape) for path, leaf in flax.traverse_util.flatten_dict(like).items()}
    layers = list(naming.layers(network, shapes, epsilon))
    expected = {name: shape for layer in layers for name, shape in layer.tensors.items()}
    used = {name: tensor for name, tensor in state.items() if not re.fullmatch(naming.left_out, name)}
    check_tensors(expected, {name: tensor.shape for name, tensor in used.items()}, source)
    flat = {}
    for layer in layers:
        flat |= layer.leaves(*(used[name].astype(np.float64) for name in layer.tensors))
    got = {path: leaf.shape for path, leaf in flat.items()}
    if got != shapes:
        raise ValueError(f"naming {naming.name}: its layers give {got}, not the leaves of the network, {shapes}")
    return flax.traverse_util.unflatten_dict({path: np.asarray(leaf, np.float32, "C") for path, leaf in flat.items()})


def _recognised(state: State, namings: tuple[Naming, ...], source: str) -> Naming:
    for naming in namings:
        if any(name.startswith(naming.sign) for name in state):
            return naming
    known = " or ".join(f"{naming.sign!r} ({naming.name})" for naming in namings) or "nothing"
    names = ", ".join(sorted(state)[:SHOWN]) + (", ..." if len(state) > SHOWN else "")
    raise InputError(
        f"{source}: its tensors are in no naming that is known for this network: expected names that begin with "
        f"{known}, got {len(state)} tensors: {names or 'none'}"
    )


def check_tensors(expected: Mapping[str, Shape], came: Mapping[str, Shape], source: str) -> None:
    """Raises one InputError for everything that differs in names and shapes: all of it, sorted."""
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
