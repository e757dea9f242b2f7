"""TensorBoard's files of a run: scalars of the training and of the evaluation, and pictures of test images.

Tensorflow writes them, which reads the images too; the package tensorboard, which shows them, need not be installed.
Files are derived from others of the run, and written anew by whatever goes on with it.
"""

import contextlib
import io
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from pushpull_jax.data.pipeline import _tensorflow
from pushpull_jax.heatmap import overlay


class EventFile:
    """The one file of a folder, written anew: what stood there goes. A context manager.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path):
        self._folder, self._tf = folder, _tensorflow()
        shutil.rmtree(folder, ignore_errors=True)
        with self._writing():
            self._writer = self._tf.summary.create_file_writer(os.fspath(folder))

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(self, *raised: object) -> None:
        with self._writing():
            self._writer.close()

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers of one step, by name; one that is not finite has no place in a curve."""
        summary = self._tf.compat.v1.Summary()
        for name, value in values.items():
            if math.isfinite(value):
                summary.value.add(tag=name, simple_value=value)
        self._add(step, summary)

    def add_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Add a picture [H,W,3] uint8."""
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, "PNG")
        summary = self._tf.compat.v1.Summary()
        # "replace": a file name may hold bytes that are no UTF-8, which Python keeps as lone surrogates.
        image = summary.value.add(tag=name.encode("utf-8", "replace").decode()).image
        image.height, image.width, image.colorspace = picture.shape
        image.encoded_image_string = encoded.getvalue()
        self._add(step, summary)

    def _add(self, step: int, summary: object) -> None:
        # tf.summary.scalar and image need the package tensorboard.
        with self._writing(), self._writer.as_default():
            self._tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step=step)
            self._writer.flush()  # a few lines a minute, and somebody may be watching

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except self._tf.errors.OpError as error:
            raise OSError(f"{self._folder}: cannot be written: {' '.join(error.message.split())[:300]}") from error


@contextlib.contextmanager
def training_scalars(
    folder: Path, rows: Iterable[Mapping[str, float]], *, is_wanted: bool
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A function that adds a row of metrics.jsonl to the scalars of the training.

    Args:
        folder: that is written to.
        rows: of the steps that were done before.
        is_wanted: otherwise nothing is written.
    """
    if not is_wanted:
        yield lambda row: None
        return
    with EventFile(folder) as events:

        def add(row: Mapping[str, float]) -> None:
            events.add_scalars(row["step"], {name: value for name, value in row.items() if name != "step"})

        for row in rows:
            add(row)
        yield add


def side_by_side(image: np.ndarray, mask: np.ndarray | None, score_map: np.ndarray, *, threshold: float) -> np.ndarray:
    """An image, its mask where that is known, and its heat map, in one picture.

    Args:
        image: [H,W,3] uint8.
        mask: [H,W] bool, or None.
        score_map: [H,W] float32.
        threshold: of maps.

    Returns:
        [H,2W,3] or [H,3W,3] uint8.
    """
    drawn = [] if mask is None else [np.repeat(np.where(mask, 255, 0)[..., None], 3, axis=-1).astype(np.uint8)]
    return np.concatenate([image, *drawn, overlay(image, score_map, threshold=threshold)], axis=1)
