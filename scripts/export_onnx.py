"""Add detector.onnx to a folder that `pushpull export` wrote, and compare it, run by onnxruntime, with our code.

It takes images of any number and size and gives scores and maps, as the other artefacts do. In an environment of its
own, since jax2onnx requires an older orbax than we do:

    python3 -m venv .venv-onnx
    .venv-onnx/bin/pip install -r scripts/requirements_onnx.txt && .venv-onnx/bin/pip install --no-deps -e .
    .venv-onnx/bin/python scripts/export_onnx.py OUT IMAGES

IMAGES is a folder; where a score or a map differs by more than --tolerance, no file is written.
"""

import argparse
import dataclasses
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import jax2onnx
import onnx
import safetensors.numpy

from pushpull_jax.artefact import detect_native
from pushpull_jax.detector import Detector, Network, read_network
from pushpull_jax.errors import InputError
from pushpull_jax.export_formats import read_onnx
from pushpull_jax.export_verification import TOLERANCE, compare, find_samples
from pushpull_jax.exporting import ONNX, WEIGHTS
from pushpull_jax.workdir import write_bytes


def read_exported(folder: Path) -> Detector:
    """The detector of an exported folder, from its config and weights."""
    _, network = read_network(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{folder}: expected a folder that `pushpull export` wrote, there is no {WEIGHTS}")
    flat = {tuple(name.split("/")): tensor for name, tensor in safetensors.numpy.load_file(path).items()}
    # What has no tensor is in no file.
    tree = {"backbone": {}, "residuals": {}} | flax.traverse_util.unflatten_dict(flat)
    return Detector(network, jax.device_put(tree))


def without_platforms(network: Network) -> Network:
    """The network with one lowering for all platforms: `lax.platform_dependent` cannot be converted."""
    backbone = network.features.backbone
    if not hasattr(backbone.network, "depthwise"):
        return network
    backbone = dataclasses.replace(backbone, network=backbone.network.clone(depthwise="conv"))
    return dataclasses.replace(network, features=network.features._replace(backbone=backbone))


def convert(detector: Detector) -> bytes:
    """The detector as an ONNX file."""
    network = without_platforms(detector.network)
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape("B, H, W, 3"), jnp.uint8)
    model = jax2onnx.to_onnx(
        lambda images: detect_native(network, detector.parameters, images),
        [images],
        model_name="detector",
        input_names=["images"],
        output_names=["scores", "maps"],
    )
    name_batches(model.graph)
    # jax2onnx declares one map.
    for axis, name in zip(model.graph.output[1].type.tensor_type.shape.dim, "BHW", strict=True):
        axis.dim_param = name
    onnx.checker.check_model(model)
    return model.SerializeToString()


def name_batches(graph: onnx.GraphProto) -> None:
    """Give the batch of maps a letter in every Einsum, and its size where sizes are declared.

    jax2onnx keeps the "..." of `scoring` and pads the matrix, which has no batch, by an axis of 1; the results are
    right, but whoever infers shapes finds batches of 1 from there on.
    """
    made = {node.output[0]: node for node in graph.node}
    padding = []
    for node in graph.node:
        if node.op_type != "Einsum" or b"..." not in node.attribute[0].s:
            continue
        operands, result = node.attribute[0].s.decode().split("->")
        terms = operands.split(",")
        for i, name in enumerate(node.input):
            if name in made and made[name].op_type == "Unsqueeze":
                padding.append(made[name])
                node.input[i], terms[i] = made[name].input[0], terms[i].removeprefix("...")
        node.attribute[0].s = f"{','.join(terms)}->{result}".replace("...", "b").encode()
    axes = {name for node in padding for name in node.input[1:]}
    for node in padding:
        graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name in axes]:
        graph.initializer.remove(tensor)
    del graph.value_info[:]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that `pushpull export` wrote")
    parser.add_argument("images", type=Path, help="folder of images to compare on")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of scores and maps, relative")
    given = parser.parse_args(arguments)
    # Of types of shapes that no tensor has, and of an x64 that nobody asked for.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Explicitly requested dtype")
    try:
        samples = find_samples(given.images)
        detector = read_exported(given.folder)
        content = convert(detector)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ONNX
            path.write_bytes(content)
            (agreement,) = compare(detector, {ONNX: read_onnx(path)}, samples)
        print(f"{agreement} (tolerance {given.tolerance:.1e})")
        if not agreement.within(given.tolerance):
            raise InputError(f"{ONNX}: more than the tolerance of {given.tolerance:.1e} from our code")
        write_bytes(given.folder / ONNX, content)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
