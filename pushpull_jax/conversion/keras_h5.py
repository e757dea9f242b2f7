"""Reads a weights file of keras.applications with h5py, without Keras, and the normalisation of the input in it.

The files are those of Keras 2: one group a layer, in it the tensors, `stem_conv/stem_conv/kernel:0`. Names are returned
as Keras 3 has them, `stem_conv/kernel`; there a depthwise kernel, too, is called kernel.
"""

import os
import re

import h5py
import numpy as np

from pushpull_jax.conversion.tensors import State
from pushpull_jax.errors import InputError

# keras.applications.efficientnet.IMAGENET_STDDEV_RGB. Its ImageNet files hold these deviations where the Normalization
# layer takes the variance, and Keras divides once more by their root: tensorflow/tensorflow issue 49930.
IMAGENET_STDDEV_RGB = (0.229, 0.224, 0.225)


def read_keras_h5(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Tensors by "LAYER/PART" of a weights file in the layout of Keras 2.

    Raises:
        InputError: the file cannot be read, or is of another layout.
    """
    state = {}

    def add(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset):
            layer, _, part = name.removesuffix(":0").rpartition("/")
            part = "kernel" if part == "depthwise_kernel" else part
            state[f"{layer.rpartition('/')[2]}/{part}"] = item[()]

    try:
        with h5py.File(path, "r") as file:
            if "layer_names" not in file.attrs:
                raise InputError(
                    f"{path}: expected a weights file as keras.applications downloads it, with the attribute "
                    f"layer_names, got attributes {sorted(file.attrs)} and groups {sorted(file)[:6]}"
                )
            file.visititems(add)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read as HDF5: {error}") from error
    return state


def keras_preprocessing(state: State, *, source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the input, on 0..255, that a Keras EfficientNet applies in its first layers.

    Keras computes (x / 255 - mean) / sqrt(variance), and where the weights are its ImageNet weights divides by
    sqrt(IMAGENET_STDDEV_RGB) once more, so that the deviation is that of ImageNet.

    Raises:
        InputError: the tensors hold no normalisation of three channels, or a variance that is not positive.
    """
    values = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"normalization(?:_\d+)?/(mean|variance)", name)
        if match:
            values[match[1]] = np.asarray(tensor, np.float64).ravel()
    if values.keys() != {"mean", "variance"} or any(value.shape != (3,) for value in values.values()):
        got = {name: value.tolist() for name, value in sorted(values.items())}
        raise InputError(f"{source}: expected normalization/mean and normalization/variance of 3 channels, got {got}")
    variance = values["variance"]
    if not (variance > 0).all():
        raise InputError(f"{source}: normalization/variance must be positive, got {variance.tolist()}")
    deviation = 255 * np.sqrt(variance)
    if np.allclose(variance, IMAGENET_STDDEV_RGB, rtol=1e-4, atol=0):
        deviation *= np.sqrt(IMAGENET_STDDEV_RGB)
    return tuple((255 * values["mean"]).tolist()), tuple(deviation.tolist())
