"""TensorBoard's files, read back: each step once whatever happened to the run, and pictures of test images."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pushpull_jax.config import Checkpoint, Config, Data, Features, Log, Reconstructor, Scoring, Training
from pushpull_jax.data.demo import write_demo
from pushpull_jax.data.pipeline import _tensorflow
from pushpull_jax.evaluation import METRICS, evaluate
from pushpull_jax.heatmap import overlay
from pushpull_jax.tensorboard import EventFile, side_by_side, training_scalars
from pushpull_jax.training import train

SIZE = 64


def read(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, np.ndarray]]:
    """Scalars, by name, with their steps in order, and pictures, by name, of the one file of a folder."""
    tf = _tensorflow()
    (path,) = folder.iterdir()
    scalars: dict[str, list[tuple[int, float]]] = {}
    pictures = {}
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        event = tf.compat.v1.Event.FromString(record)
        for value in event.summary.value:
            if value.HasField("image"):
                assert value.tag not in pictures
                pictures[value.tag] = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
            else:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars, pictures


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("data")
    write_demo(folder, train=8, good=1, per_defect=1, size=SIZE)
    return Config(
        data=Data(root=str(folder), category="flange", image_size=SIZE),
        features=Features(backbone="pixels", stages=(3,), grid=8),
        reconstructor=Reconstructor(width=16, encoder_layers=0, decoder_layers=0, heads=2, hidden=16),
        training=Training(steps=8, batch_size=4, learning_rate=3e-3),
        scoring=Scoring(held_out=0.2),
        log=Log(every=2, tensorboard=True),
        checkpoint=Checkpoint(every=4),
    )


def test_a_run_that_was_stopped_and_evaluated_again_has_each_step_once(config, tmp_path, stopped_at):
    with stopped_at(4):
        train(config, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as log:  # a line behind the checkpoint, as of a run that was killed
        log.write('{"step": 6, "loss": 1.0}\n')
    train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scalars, pictures = read(tmp_path / "tensorboard" / "train")
    assert set(scalars) == {"loss", "gradient_norm", "learning_rate", "seconds_per_step"} and not pictures
    for name, pairs in scalars.items():
        assert [step for step, _ in pairs] == [2, 4, 6, 8]
        np.testing.assert_array_equal(np.float32([row[name] for row in rows]), np.float32([v for _, v in pairs]))

    evaluate(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    scalars, pictures = read(tmp_path / "tensorboard" / "test")
    assert scalars == {name: [(8, pytest.approx(metrics[name], rel=1e-6))] for name in METRICS}
    assert len(pictures) == 6 and {picture.shape for picture in pictures.values()} == {(SIZE, 3 * SIZE, 3)}


def test_nothing_is_written_unless_it_is_asked_for(tmp_path):
    with training_scalars(tmp_path / "train", [], is_wanted=False) as add:
        add({"step": 1, "loss": 0.5})
    assert not list(tmp_path.iterdir())


def test_a_picture_comes_back_and_what_is_not_finite_is_left_out(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    with EventFile(tmp_path) as events:
        events.add_picture(3, "a/b\udcff.png", picture)  # of a file whose name is no UTF-8
        events.add_scalars(3, {"aupro": float("nan"), "image_auroc": 0.5})
    scalars, pictures = read(tmp_path)
    assert scalars == {"image_auroc": [(3, 0.5)]}
    np.testing.assert_array_equal(pictures["a/b?.png"], picture)


def test_a_folder_that_cannot_be_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/train: cannot be written: "):
        EventFile(tmp_path / "file" / "train")


def test_image_mask_and_heat_map_stand_side_by_side():
    image, score_map = np.full((4, 4, 3), 90, np.uint8), np.zeros((4, 4), np.float32)
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = score_map[3, 3] = True
    picture = side_by_side(image, mask, score_map, threshold=0.5)
    assert picture.shape == (4, 12, 3)
    np.testing.assert_array_equal(picture[:, :4], image)
    assert picture[:, 4:8].sum() == 3 * 255 and (picture[1, 6] == 255).all()
    np.testing.assert_array_equal(picture[:, 8:], overlay(image, score_map, threshold=0.5))
    np.testing.assert_array_equal(
        side_by_side(image, None, score_map, threshold=0.5), np.delete(picture, range(4, 8), 1)
    )
