"""The one way from images to scores and maps, on a tiny random network: padding, resizing and the run's folder."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax import backbones
from pushpull_jax import workdir as files
from pushpull_jax.backbones import Backbone
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Compute, Config, Data, Features, Reconstructor, Scoring, Training
from pushpull_jax.data.images import resize_image
from pushpull_jax.detector import (
    Detector,
    build_network,
    detect,
    detect_features,
    initial_state,
    load,
    peaks,
)
from pushpull_jax.errors import InputError
from pushpull_jax.models.efficientnet import EfficientNet
from pushpull_jax.scoring import image_score, smooth, upsample
from pushpull_jax.weights import backbone_metadata, save_parameters

TINY = Backbone(
    name="tiny",
    network=EfficientNet(width=0.1, depth=0.1, lite=True, padding="tf", depthwise="conv"),
    mean=(127.0,) * 3,
    deviation=(128.0,) * 3,
    epsilon=1e-3,
    source="random",
    licence="none",
)
CONFIG = Config(
    data=Data(root="images", category="bolt", image_size=64),
    features=Features(backbone="tiny", stages=(2, 3), grid=8),
    reconstructor=Reconstructor(width=8, encoder_layers=0, decoder_layers=1, heads=2, hidden=8, fold=2),
    training=Training(steps=4),
    scoring=Scoring(smoothing=4.0, window=16),
    compute=Compute(depthwise="conv"),
)
SIZE = CONFIG.data.image_size


def random_tree(seed, shapes):
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module", autouse=True)
def tiny_backbone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbones.BACKBONES, "tiny", TINY)
        yield


@pytest.fixture(scope="module")
def detector():
    network = build_network(CONFIG)
    image = jnp.zeros((1, 64, 64, 3))
    backbone = jax.eval_shape(lambda: TINY.network.init(jax.random.key(0), image))["params"]
    state = jax.eval_shape(lambda: initial_state(CONFIG, network))
    channels = sum(network.features.widths)
    rng = np.random.default_rng(2)
    parameters = {
        "backbone": random_tree(0, backbone),
        "reconstructor": random_tree(1, state.parameters),
        "standardisation": {
            "shift": rng.normal(size=channels).astype(np.float32),
            "scale": rng.uniform(0.5, 2, channels).astype(np.float32),
        },
        "residuals": {},
        "threshold": np.float32(1.25),
        "map_threshold": np.float32(0.75),
    }
    return Detector(network, jax.device_put(parameters))


def photographs(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def resized(images, mode="stretch"):
    return np.stack([resize_image(image, size=SIZE, mode=mode) for image in images])


def test_network(detector):
    network = detector.network
    assert network.features.backbone.network == TINY.network
    assert network.features.stages == (2, 3) and network.features.grid == 8
    assert network.reconstructor.width == 8 and network.reconstructor.fold == 2
    assert (network.image_size, network.scale, network.smoothing, network.window) == (64, 0.25, 4.0, 16)
    assert hash(network) == hash(build_network(CONFIG)) and network == build_network(CONFIG)
    other = build_network(CONFIG, reconstructor=network.reconstructor.clone(width=4))
    assert other.reconstructor.width == 4
    assert (detector.threshold, detector.map_threshold) == (1.25, 0.75)


@pytest.mark.parametrize("size", [(64, 64), (48, 100), (7, 5), (1, 1)])
def test_images_of_any_size(detector, size):
    scores, maps = detector(photographs(0, (2, *size, 3)))
    assert (scores.shape, scores.dtype, maps.shape, maps.dtype) == ((2,), np.float32, (2, *size), np.float32)
    assert np.isfinite(maps).all() and (maps >= 0).all() and scores[0] != scores[1]


@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_the_company_of_an_image_does_not_change_its_numbers(detector, count):
    images = photographs(1, (17, 40, 56, 3))
    scores, maps = detector(images)
    few_scores, few_maps = detector(images[17 - count :])
    np.testing.assert_array_equal(few_scores, scores[17 - count :])
    np.testing.assert_array_equal(few_maps, maps[17 - count :])


def test_no_images(detector):
    scores, maps = detector(photographs(0, (0, 40, 56, 3)))
    assert (scores.shape, scores.dtype, maps.shape, maps.dtype) == ((0,), np.float32, (0, 40, 56), np.float32)


def test_same_images_same_numbers(detector):
    images = photographs(2, (2, 40, 56, 3))
    given = images.copy()
    first, second = detector(images), detector(images)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(images, given)


@pytest.fixture(scope="module")
def detected(detector):
    """Three images at the size of the run, and what `detect` says of them under jit."""
    images = resized(photographs(3, (3, 40, 56, 3)))
    return images, jax.jit(functools.partial(detect, detector.network))(detector.parameters, images)


def test_a_detector_is_detect(detector, detected):
    images, (scores, maps) = detected
    assert scores.shape == (3,) and maps.shape == (3, SIZE, SIZE) and scores.dtype == maps.dtype == jnp.float32
    for one, other in zip(detector.detect_resized(images), (scores, maps), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    for one, other in zip(detector.detect_resized(images, size=2), (scores, maps), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    photographs_scores, native = detector(photographs(3, (3, 40, 56, 3)))
    np.testing.assert_allclose(photographs_scores, scores, rtol=1e-5)
    np.testing.assert_allclose(native, upsample(maps, (40, 56)), rtol=1e-4)


def test_detect_is_its_parts(detector, detected):
    """The steps of the paper one after another; smoothing and window are scaled from 256 px to 64."""
    images, (scores, maps) = detected
    parameters, network = detector.parameters, detector.network

    @jax.jit
    def cells(images):
        ends = TINY.network.apply({"params": parameters["backbone"]}, (images - 127) / 128, (2, 3))
        at_grid = [jnp.moveaxis(upsample(jnp.moveaxis(end, -1, 1), 8), 1, -1) for end in ends]
        return jnp.concatenate(at_grid, -1)

    shift, scale = (np.asarray(parameters["standardisation"][name]) for name in ("shift", "scale"))
    features = (np.asarray(cells(images)) - shift) * scale
    rebuilt = jax.jit(network.reconstructor.apply)({"params": parameters["reconstructor"]}, features)
    distance = np.sqrt(((features - np.asarray(rebuilt)).astype(np.float64) ** 2).sum(-1))
    expected = smooth(upsample(distance, SIZE), sigma=1.0)
    np.testing.assert_allclose(maps, expected, rtol=1e-4)
    np.testing.assert_allclose(scores, image_score(expected, window=4), rtol=1e-4)


def test_the_window_is_at_least_one_pixel(detector):
    tiny = replace(detector.network, image_size=32, window=1, smoothing=0.0)
    images = np.full((1, 32, 32, 3), 90, np.float32)
    scores, maps = jax.jit(functools.partial(detect, tiny))(detector.parameters, images)
    np.testing.assert_allclose(scores, np.asarray(maps).max((1, 2)), rtol=1e-6)


# Native size.


@pytest.mark.parametrize("size", [(900, 700), (64, 64), (33, 20), (1, 90)])
def test_to_native_is_scorings_upsample(detector, size):
    score_map = np.random.default_rng(4).random((SIZE, SIZE)).astype(np.float32)
    native = detector.to_native(score_map, size)
    assert native.shape == size and native.dtype == np.float32
    np.testing.assert_allclose(native, upsample(score_map, size), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def letterbox(detector):
    return replace(detector, network=replace(detector.network, resize="letterbox"))


@pytest.mark.parametrize(
    ("size", "box"),
    [
        # 40x80 fills 32 of 64 rows, from row 16 on; 90x30 fills 21 of 64 columns, from column 21 on.
        ((40, 80), (slice(16, 48), slice(0, 64))),
        ((90, 30), (slice(0, 64), slice(21, 42))),
        ((50, 50), (slice(0, 64), slice(0, 64))),
        ((64, 64), (slice(0, 64), slice(0, 64))),
    ],
)
def test_a_letterbox_is_undone(letterbox, size, box):
    score_map = np.random.default_rng(5).random((SIZE, SIZE)).astype(np.float32)
    native = letterbox.to_native(score_map, size)
    assert native.shape == size
    np.testing.assert_allclose(native, upsample(score_map[box], size), rtol=1e-5, atol=1e-6)
    # Whatever the margin holds, none of it is left.
    margin = np.full((SIZE, SIZE), 9.0, np.float32)
    margin[box] = 1
    np.testing.assert_allclose(letterbox.to_native(margin, size), 1, rtol=1e-6)


def test_a_letterboxed_detector(letterbox):
    images = photographs(6, (2, 40, 80, 3))
    scores, maps = letterbox(images)
    square_scores, square = letterbox.detect_resized(resized(images, mode="letterbox"))
    assert maps.shape == (2, 40, 80)
    np.testing.assert_array_equal(scores, square_scores)
    np.testing.assert_allclose(maps, upsample(square[:, 16:48], (40, 80)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "came"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"float32 \[2, 8, 8, 3\]"),
        (np.zeros((2, 8, 8, 3), np.int64), r"int64 \[2, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \[8, 8, 3\]"),
        (np.zeros((2, 8, 8, 1), np.uint8), r"uint8 \[2, 8, 8, 1\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"uint8 \[2, 8, 8, 4\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"uint8 \[2, 3, 8, 8\]"),
    ],
)
def test_what_is_not_a_batch_of_images(detector, images, came):
    with pytest.raises(ValueError, match=rf"images must be uint8 \[B,H,W,3\], got {came}"):
        detector(images)


def test_images_without_pixels(detector):
    with pytest.raises(ValueError, match="at least one pixel"):
        detector(np.zeros((1, 0, 8, 3), np.uint8))


# A run's folder.


def write_run(folder, detector, config=CONFIG):
    """The files of a finished run with the parameters of a detector."""
    folder.mkdir(parents=True)
    frozen = {name: detector.parameters[name] for name in ("backbone", "standardisation")}
    save_parameters(folder / files.BACKBONE, frozen, metadata={"source": "random"})
    backbone = backbone_metadata(detector.network.features.backbone)
    files.write_config(folder, config, versions={}, command=[], backbone=backbone)
    state = random_tree(9, jax.eval_shape(lambda: initial_state(config, detector.network)))
    state = state._replace(step=np.int32(4), parameters=jax.device_get(detector.parameters["reconstructor"]))
    with Checkpoints(folder / files.CHECKPOINTS) as checkpoints:
        checkpoints.save(state)
    if detector.parameters["residuals"]:
        save_parameters(folder / files.RESIDUALS, jax.device_get(detector.parameters["residuals"]), metadata={})
    thresholds = {"threshold": detector.threshold, "map_threshold": detector.map_threshold}
    files.write_json(folder / files.THRESHOLD, thresholds)
    return folder


def assert_same_detector(one, other):
    assert one.network == other.network and one.threshold == other.threshold
    images = photographs(7, (2, 40, 56, 3))
    for a, b in zip(one(images), other(images), strict=True):
        np.testing.assert_array_equal(a, b)


def test_load(tmp_path, detector, monkeypatch):
    write_run(tmp_path / "runs" / "bolt", detector)
    assert_same_detector(load(tmp_path / "runs" / "bolt"), detector)
    monkeypatch.chdir(tmp_path)
    assert_same_detector(load("runs/bolt"), detector)
    Path("runs/bolt").rename("elsewhere")
    assert_same_detector(load("elsewhere"), detector)


def test_load_with_a_reconstructor_of_ones_own(tmp_path, detector):
    other = replace(CONFIG, reconstructor=replace(CONFIG.reconstructor, width=64))
    folder = write_run(tmp_path / "run", detector, other)
    assert_same_detector(load(folder, reconstructor=detector.network.reconstructor), detector)
    with pytest.raises(InputError, match="arrays of another shape"):
        load(folder)


def test_load_leaves_the_run_as_it_is(tmp_path, detector):
    folder = write_run(tmp_path / "run", detector)
    contents = lambda: {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}  # noqa: E731
    before = contents()
    load(folder)
    assert contents() == before


def test_load_where_there_is_no_run(tmp_path):
    with pytest.raises(InputError, match="none: there is no such folder"):
        load(tmp_path / "none")
    with pytest.raises(InputError, match="is not a run: it has no config.json"):
        load(tmp_path)
    files.write_config(tmp_path, CONFIG)
    with pytest.raises(InputError, match="the run is not finished; the command that started it goes on with it$"):
        load(tmp_path)
    files.write_config(tmp_path, CONFIG, command=["pushpull", "train", "my parts.py"])
    with pytest.raises(InputError, match="goes on with it: pushpull train 'my parts.py'$"):
        load(tmp_path)
    files.write_config(tmp_path, replace(CONFIG, features=replace(CONFIG.features, backbone="tyni")))
    with pytest.raises(InputError, match=r"no backbone 'tyni'; did you mean tiny\?"):
        load(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "backbone.safetensors"), r"backbone\.safetensors: cannot be read as safetensors"),
        (lambda folder: (folder / "backbone.safetensors").unlink(), r"backbone\.safetensors: cannot be read"),
        (lambda folder: cut(next(folder.rglob("_METADATA"))), "4: cannot be restored"),
        (lambda folder: (folder / "checkpoints").rename(folder / "moved"), "checkpoints: there is no checkpoint"),
        (lambda folder: (folder / "threshold.json").write_text("{"), r"threshold\.json: cannot be read as JSON"),
        *(
            (lambda folder, text=text: (folder / "threshold.json").write_text(text), r"threshold\.json")
            for text in (
                "{}",
                "[]",
                '{"threshold": null}',
                '{"threshold": 1.5}',
                '{"threshold": 1.5, "map_threshold": NaN}',
            )
        ),
    ],
)
def test_load_names_the_damaged_file(tmp_path, detector, damage, message):
    folder = write_run(tmp_path / "run", detector)
    damage(folder)
    contents = set(folder.rglob("*"))
    with pytest.raises(InputError, match=message):
        load(folder)
    assert set(folder.rglob("*")) == contents


@pytest.fixture(scope="module")
def whitened(detector):
    """A detector whose scores are in units of what is usual, with any statistics at all."""
    scores = replace(CONFIG.scoring, map="whitened", map_weights=(1.0, 0.25), blocks=(1, 4), smoothing=0.0)
    network = build_network(replace(CONFIG, scoring=scores))
    rng, usual = np.random.default_rng(5), {}
    names = {"stage_2": network.features.widths[0], "stage_3": network.features.widths[1]}
    joint = dict.fromkeys(("blocks_1", "blocks_4"), sum(network.features.widths))
    for name, width in (names | joint).items():
        usual[name] = {
            "mean": rng.normal(size=width).astype(np.float32),
            "matrix": rng.normal(size=(width, width)).astype(np.float32),
        }
    return Detector(network, detector.parameters | {"residuals": usual})


def test_whitened_scores_by_their_definition(whitened):
    network, usual = whitened.network, whitened.parameters["residuals"]
    grid, (first, second) = network.features.grid, network.features.widths
    features = np.random.default_rng(6).normal(size=(2, grid, grid, first + second)).astype(np.float32)
    reconstruction = network.reconstructor.apply({"params": whitened.parameters["reconstructor"]}, features)
    residuals = np.asarray(features, np.float64) - np.asarray(reconstruction, np.float64)

    def distance(values, name):
        return np.sqrt(np.mean(((values - usual[name]["mean"]) @ np.float64(usual[name]["matrix"])) ** 2, axis=-1))

    stages = distance(residuals[..., :first], "stage_2") ** 0.8 * distance(residuals[..., first:], "stage_3") ** 0.2
    scores, maps = detect_features(network, whitened.parameters, features)
    # Upsampling with aligned corners keeps the corners of the grid.
    np.testing.assert_allclose(maps[:, :: SIZE - 1, :: SIZE - 1], stages[:, :: grid - 1, :: grid - 1], rtol=1e-4)
    parts = residuals.reshape(2, 4, grid // 4, 4, grid // 4, -1).mean((2, 4))
    expected = peaks(network, maps) * distance(residuals.mean((1, 2)), "blocks_1")
    expected = expected * distance(parts, "blocks_4").max((1, 2))
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_load_of_whitened_scores(tmp_path, whitened):
    scores = replace(CONFIG.scoring, map="whitened", map_weights=(1.0, 0.25), blocks=(1, 4), smoothing=0.0)
    folder = write_run(tmp_path / "run", whitened, replace(CONFIG, scoring=scores))
    assert_same_detector(load(folder), whitened)
    cut(folder / "residuals.safetensors")
    with pytest.raises(InputError, match=r"residuals\.safetensors"):
        load(folder)


def test_load_without_word_of_the_weights(tmp_path, detector):
    folder = write_run(tmp_path / "run", detector)
    files.write_config(folder, CONFIG)
    with pytest.raises(InputError, match=r"config\.json: expected an object `backbone`"):
        load(folder)
