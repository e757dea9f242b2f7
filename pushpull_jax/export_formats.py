"""The artefact in the formats of others: a TensorFlow SavedModel, and ONNX, which scripts/export_onnx.py writes.

Both take and give what the jax.export artefact does. TensorFlow and onnxruntime are imported where they are used.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from jax import export as jax_export

from pushpull_jax.data.pipeline import _tensorflow
from pushpull_jax.export_verification import Program


def write_saved_model(folder: Path, artefact: bytes) -> None:
    """Write a SavedModel whose function "detect" has TensorFlow run the StableHLO of an artefact, weights and all."""
    tf = _tensorflow()
    from jax.experimental import jax2tf

    call = jax_export.deserialize(bytearray(artefact)).call
    images = tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")
    module: Any = tf.Module()
    detect = jax2tf.convert(call, polymorphic_shapes=["b, h, w, 3"], with_gradient=False)
    module.detect = tf.function(detect, input_signature=[images], autograph=False)
    tf.saved_model.save(module, os.fspath(folder))


def read_saved_model(folder: Path) -> Program:
    """What a SavedModel computes."""
    # Its functions live no longer than the module.
    module = _tensorflow().saved_model.load(os.fspath(folder))
    return lambda images: tuple(part.numpy() for part in module.detect(images))


def read_onnx(path: Path) -> Program:
    """What an ONNX file computes, by onnxruntime on CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])

    def program(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, maps = session.run(["scores", "maps"], {"images": images})
        return scores, maps

    return program
