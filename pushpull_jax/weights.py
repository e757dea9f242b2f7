"""Where the frozen parameters of a backbone come from, and files of ours: `load_backbone(name)` is the way in.

A backbone has an origin of its own (an installed package, or the Hugging Face hub, whose client downloads and caches),
may have weights in keras.applications (Keras downloads and caches), and takes any file in a naming that it knows. What
belongs to the weights rather than to the network, above all the normalisation of the input, comes back with them.
Files of ours are safetensors with names joined by "/", and say in their metadata what they were made from.
"""

import dataclasses
import hashlib
import importlib.resources
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.traverse_util
import numpy as np
import safetensors
import safetensors.numpy

from pushpull_jax.backbones import Backbone, HubFile, PackageFile, find_backbone
from pushpull_jax.conversion.keras_h5 import keras_preprocessing, read_keras_h5
from pushpull_jax.conversion.tensors import Parameters, check_tensors
from pushpull_jax.errors import InputError
from pushpull_jax.torch_checkpoint import read_torch_checkpoint
from pushpull_jax.workdir import write_bytes

# Seconds until a server that does not answer counts as unreachable.
TIMEOUT = 10
BY_HAND = "a file can be given by hand, with --features.weights FILE"
# Run by a Python of its own, because TensorFlow, once it computes, takes all memory of every GPU it sees.
_KERAS_DOWNLOAD = """
import socket, sys, keras
socket.setdefaulttimeout(float(sys.argv[2]))
getattr(keras.applications, sys.argv[1])(include_top=False, weights="imagenet")
"""


def load_backbone(name: str, *, weights: str | os.PathLike | None = None) -> tuple[Backbone, Parameters]:
    """A backbone and its frozen parameters.

    Args:
        name: of the backbone.
        weights: None for the backbone's own origin; "keras" for the ImageNet weights of keras.applications; or a file:
            .safetensors (ours, or tensors in a naming that the backbone knows), .h5 of keras.applications, or a PyTorch
            checkpoint.

    Returns:
        The backbone with the normalisation, source, licence and sha256 of these weights, and its parameters as nested
        dicts of float32 arrays.

    Raises:
        InputError: no such backbone, the file is not there and cannot be downloaded, it cannot be read, or its tensors
            are not this network's.
    """
    backbone = find_backbone(name)
    if not weights:
        if backbone.origin is None and not backbone.abstract_parameters():
            return backbone, {}
        path = _fetch(backbone)
    elif weights == "keras":
        path = _fetch_from_keras(backbone)
        source = f"keras.applications.{backbone.keras}, ImageNet, converted from TensorFlow's"
        backbone = dataclasses.replace(backbone, source=source, licence="Apache-2.0")
    else:
        path = Path(weights)
        backbone = dataclasses.replace(backbone, source=f"file {path.name}", licence="unknown, as the file's")
    return read_backbone(backbone, path)


def read_backbone(backbone: Backbone, path: Path) -> tuple[Backbone, Parameters]:
    """The backbone as the weights of a file have it, and its parameters; see `load_backbone`."""
    source = str(path)
    if source.endswith(".safetensors"):
        state, metadata = _read_safetensors(path)
        ours = backbone.abstract_parameters()
        if not flatten(ours).keys().isdisjoint(state):
            parameters = _checked(state, ours, source)
            return described(dataclasses.replace(backbone, sha256=_sha256(path)), metadata, source=source), parameters
    elif source.endswith((".h5", ".hdf5")):
        state = read_keras_h5(path)
        parameters = backbone.convert(state, source=source)
        mean, deviation = keras_preprocessing(state, source=source)
        return dataclasses.replace(backbone, mean=mean, deviation=deviation, sha256=_sha256(path)), parameters
    else:
        state = read_torch_checkpoint(path)
    return dataclasses.replace(backbone, sha256=_sha256(path)), backbone.convert(state, source=source)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(backbone: Backbone) -> Path:
    """The file of the backbone's own origin, downloaded if it must be."""
    origin = backbone.origin
    if isinstance(origin, PackageFile):
        return Path(str(importlib.resources.files(origin.package) / origin.path))
    if isinstance(origin, HubFile):
        return _fetch_from_hub(backbone, origin)
    raise InputError(f"backbone {backbone.name} has no weights of its own; {BY_HAND}")


def _fetch_from_hub(backbone: Backbone, file: HubFile) -> Path:
    """A file from the hub's cache, or else from the hub, which is asked once, briefly, before anything is retried."""
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(file.repository, file.filename)
    if isinstance(cached, str):
        return Path(cached)
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(file.repository, file.filename), timeout=TIMEOUT)
        return Path(hub.hf_hub_download(file.repository, file.filename))
    except Exception as error:  # which errors is a matter of the HTTP library that its version is built on
        raise InputError(
            f"backbone {backbone.name}: {file.filename} of {file.repository} is not in the cache and cannot be had "
            f"from the Hugging Face hub: {_one_line(error)}; {BY_HAND}"
        ) from error


def _fetch_from_keras(backbone: Backbone) -> Path:
    """The file that keras.applications caches, downloaded by Keras where it is absent."""
    if backbone.keras is None:
        raise InputError(f"backbone {backbone.name}: keras.applications has no weights for it")
    folder = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models"
    path = folder / f"{backbone.keras.lower()}_notop.h5"
    if path.is_file():
        return path
    command = [sys.executable, "-c", _KERAS_DOWNLOAD, backbone.keras, str(TIMEOUT)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0 and path.is_file():
        return path
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else "it is not there"
    raise InputError(
        f"backbone {backbone.name}: {path.name} of keras.applications is not in {folder} and Keras could not download "
        f"it: {reason}; {BY_HAND}"
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def backbone_metadata(backbone: Backbone) -> dict[str, str]:
    """What a file of parameters says about their backbone: all that depends on the weights, not on the name alone."""
    return {
        "backbone": backbone.name,
        "source": backbone.source,
        "licence": backbone.licence,
        "sha256": backbone.sha256,
        "mean": json.dumps(backbone.mean),
        "deviation": json.dumps(backbone.deviation),
    }


def described(backbone: Backbone, metadata: dict[str, str], *, source: str) -> Backbone:
    """The backbone as the metadata of a file have it; what they do not tell stays. Inverse of `backbone_metadata`.

    Raises:
        InputError: the metadata are those of another backbone, or a normalisation is not three numbers.
    """
    if metadata.get("backbone", backbone.name) != backbone.name:
        raise InputError(f"{source}: expected weights of {backbone.name}, got those of {metadata['backbone']}")
    changes = {key: metadata[key] for key in ("source", "licence", "sha256") if key in metadata}
    for key in {"mean", "deviation"} & metadata.keys():
        try:
            values = tuple(map(float, json.loads(metadata[key])))
        except (ValueError, TypeError):
            values = ()
        if len(values) != 3 or not np.isfinite(values).all() or (key == "deviation" and min(values) <= 0):
            raise InputError(f"{source}: metadata {key}: expected three numbers, got {metadata[key]!r}")
        changes[key] = values
    return dataclasses.replace(backbone, **changes)


def flatten(tree: Parameters) -> dict[str, np.ndarray]:
    """Leaves of a tree by their path, joined by "/", as files of ours name them."""
    return {"/".join(path): leaf for path, leaf in flax.traverse_util.flatten_dict(tree).items()}


def save_parameters(path: str | os.PathLike, parameters: Parameters, *, metadata: dict[str, str]) -> None:
    """Write a tree of arrays as safetensors, atomically; names are paths joined by "/"."""
    # safetensors writes the bytes as they lie in memory, so that a transposed view would come back scrambled.
    flat = {name: np.asarray(leaf, order="C") for name, leaf in flatten(parameters).items()}
    write_bytes(path, safetensors.numpy.save(flat, metadata=metadata))


def load_parameters(path: Path, *, like: Parameters) -> Parameters:
    """Read what `save_parameters` wrote.

    Args:
        path: of the file.
        like: tree of anything with a shape; names and shapes must be exactly these.

    Raises:
        InputError: the file cannot be read, or its tensors are others or not float32; all are listed, sorted.
    """
    try:
        # As bytes, for it may lie in a bucket.
        state = safetensors.numpy.load(path.read_bytes())
    except (OSError, KeyError, safetensors.SafetensorError) as error:  # NumPy may lack the dtype
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error
    return _checked(state, like, str(path))


def _read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name, and metadata."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, TypeError, AttributeError, safetensors.SafetensorError) as error:  # NumPy may lack the dtype
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error


def _checked(state: dict[str, np.ndarray], like: Parameters, source: str) -> Parameters:
    """The tree of a file of ours, whose names, shapes and dtypes are those of `like`."""
    expected = {name: tuple(leaf.shape) for name, leaf in flatten(like).items()}
    check_tensors(expected, {name: tensor.shape for name, tensor in state.items()}, source)
    others = sorted(f"{name} ({tensor.dtype})" for name, tensor in state.items() if tensor.dtype != np.float32)
    if others:
        raise InputError(f"{source}: expected tensors of float32, got {len(others)} others: {', '.join(others)}")
    # Empty branches, of a part without parameters, are in no file and come back all the same.
    nodes = flax.traverse_util.flatten_dict(like, keep_empty_nodes=True)
    return flax.traverse_util.unflatten_dict({path: state.get("/".join(path), leaf) for path, leaf in nodes.items()})
