"""The programs end to end on a small drawn data set: train, resume, evaluate, predict, and what can go wrong."""

import csv
import hashlib
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pushpull_jax
from pushpull_jax import cli, losses
from pushpull_jax import fit as fit_module
from pushpull_jax import training as train_module
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Checkpoint, Config, Data, Features, Log, Reconstructor, Scoring, Training
from pushpull_jax.data.demo import write_demo
from pushpull_jax.detector import build_network, detect_features, initial_state
from pushpull_jax.errors import InputError
from pushpull_jax.evaluation import evaluate
from pushpull_jax.features import Standardisation, extract
from pushpull_jax.prediction import predict
from pushpull_jax.recalibration import calibrate
from pushpull_jax.training import train
from pushpull_jax.whitening import Moments, fit_whitening

SIZE = 64
COUNTS = ("images", "normal", "anomalous", "image_auroc")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_demo(folder, train=12, good=3, per_defect=1, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def config(root) -> Config:
    return Config(
        data=Data(root=str(root), category="flange", image_size=SIZE),
        features=Features(backbone="pixels", stages=(2, 3), grid=8, standardise=True),
        reconstructor=Reconstructor(width=16, heads=2, hidden=16, encoder_layers=1, decoder_layers=1, fold=2),
        training=Training(steps=10, batch_size=4, learning_rate=1e-3, jitter=0.1),
        scoring=Scoring(held_out=0.25, smoothing=2.0, map="whitened", map_weights=(1.0, 0.5), blocks=(1,)),
        log=Log(every=2),
        checkpoint=Checkpoint(every=4),
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(config, workdir)
    return workdir


@pytest.fixture
def damaged(root, tmp_path) -> Path:
    """A copy of the data to spoil."""
    shutil.copytree(root / "flange", tmp_path / "data" / "flange")
    return tmp_path / "data"


def parameters(workdir: Path, config: Config) -> dict:
    with Checkpoints(workdir / "checkpoints", create=False) as checkpoints:
        return checkpoints.restore(initial_state(config, build_network(config))).parameters


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `pushpull ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["pushpull", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_run_folder_holds_the_files_of_the_design(run):
    assert {path.name for path in run.iterdir()} == {
        "config.json", "backbone.safetensors", "residuals.safetensors", "checkpoints", "metrics.jsonl",
        "threshold.json", "metrics.json", "predictions.csv", "report.html",
    }  # fmt: skip


def test_log_has_one_line_a_logging_step_in_order(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert all(np.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in rows)


def test_metrics_name_resolution_mask_rule_and_limit(run):
    metrics = json.loads((run / "metrics.json").read_text())
    names = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")
    assert all(0 <= metrics[name] <= 1 for name in names)
    assert (metrics["resolution"], metrics["fpr_limit"]) == (SIZE, 0.3)
    assert "half of the area" in metrics["mask_rule"]
    assert (metrics["images"], metrics["normal"], metrics["anomalous"]) == (8, 3, 5)


def test_threshold_is_the_conformal_quantile_of_held_out_scores(run):
    # 12 normal images, a quarter held out: n = 3 cannot promise 5 %, so the largest score.
    threshold = json.loads((run / "threshold.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert sorted(threshold["held_out_scores"]) == config["data"]["held_out"]
    assert len(threshold["held_out_scores"]) == 3
    assert threshold["threshold"] == max(threshold["held_out_scores"].values())
    assert "25.0%" in threshold["note"]


def test_residuals_are_those_of_all_normal_images(run, config, root):
    keys = sorted(p.relative_to(root).as_posix() for p in (root / "flange/train/good").iterdir())
    images = np.stack([pixels(root / key) for key in keys]).astype(np.float32)
    detector = pushpull_jax.load(run)
    features = extract(detector.network.features, detector.parameters["backbone"], images)
    features = Standardisation(**detector.parameters["standardisation"])(features)
    trained = {"params": detector.parameters["reconstructor"]}
    residuals = np.asarray(features - detector.network.reconstructor.apply(trained, features), np.float64)
    stages = np.split(residuals, np.cumsum(detector.network.features.widths)[:-1], axis=-1)
    for stage, part in zip((2, 3), stages, strict=True):
        flat = part.reshape(-1, part.shape[-1])
        usual = detector.parameters["residuals"][f"stage_{stage}"]
        np.testing.assert_allclose(usual["mean"], flat.mean(0), atol=1e-4)
        # What is whitened has the covariance C / (1 + ridge), but for the ridge in all directions: C of them sum to C.
        whitened = (flat - flat.mean(0)) @ np.float64(usual["matrix"])
        assert 0.4 < np.mean(whitened**2) <= 1.0
    of_images = detector.parameters["residuals"]["blocks_1"]
    np.testing.assert_allclose(of_images["mean"], residuals.mean((0, 1, 2)), atol=1e-4)


def test_held_out_images_are_scored_by_what_is_usual_of_the_others(run, root):
    detector = pushpull_jax.load(run)
    network, parameters = detector.network, detector.parameters
    held = json.loads((run / "threshold.json").read_text())["held_out_scores"]
    keys = sorted(p.relative_to(root).as_posix() for p in (root / "flange/train/good").iterdir())
    images = {key: pixels(root / key)[None].astype(np.float32) for key in keys}
    trained = {"params": parameters["reconstructor"]}

    def standardised(image):
        return Standardisation(**parameters["standardisation"])(
            extract(network.features, parameters["backbone"], image)
        )

    features = {key: standardised(image) for key, image in images.items()}
    residuals = {
        key: np.asarray(x - network.reconstructor.apply(trained, x), np.float64) for key, x in features.items()
    }
    edges = np.cumsum((0, *network.features.widths))
    for key, score in held.items():
        others = np.concatenate([residual for name, residual in residuals.items() if name != key])
        usual = {}
        for stage, (a, b) in zip((2, 3), itertools.pairwise(edges), strict=True):
            flat = others[..., a:b].reshape(-1, b - a)
            usual[f"stage_{stage}"] = fit_whitening(Moments(len(flat), flat.sum(0), flat.T @ flat))._asdict()
        means = others.mean((1, 2))
        usual["blocks_1"] = fit_whitening(Moments(len(means), means.sum(0), means.T @ means))._asdict()
        expected, _ = detect_features(network, parameters | {"residuals": usual}, features[key])
        assert score == pytest.approx(float(expected[0]), rel=2e-3)


def test_predictions_agree_with_metrics_and_with_the_detector(run, root):
    rows = table(run / "predictions.csv")
    metrics = json.loads((run / "metrics.json").read_text())
    labels, scores = np.array([int(row["label"]) for row in rows]), np.array([float(row["score"]) for row in rows])
    # The AUROC by its definition: the share of pairs in the right order.
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
    assert metrics["image_auroc"] == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))
    image = pixels(root / rows[0]["path"])[None]
    assert pushpull_jax.load(run)(image)[0][0] == pytest.approx(scores[0], rel=1e-4)


def test_two_runs_of_one_command_are_bitwise_equal(run, config, tmp_path):
    train(config, tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, parameters(run, config), parameters(tmp_path / "again", config))
    assert (run / "predictions.csv").read_text() == (tmp_path / "again" / "predictions.csv").read_text()


def test_a_stopped_run_resumes_to_the_same_numbers(run, config, tmp_path, stopped_at):
    workdir = tmp_path / "stopped"
    with stopped_at(8):
        train(config, workdir)
    assert not (workdir / "metrics.json").exists()
    with pytest.raises(InputError, match="not finished"):
        pushpull_jax.load(workdir)
    # A line of a step that no checkpoint holds, as a killed run leaves it.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "loss": 0.0}\n{"step": 12, "lo')
    train(config, workdir)
    jax.tree.map(np.testing.assert_array_equal, parameters(run, config), parameters(workdir, config))
    rows = [[json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()] for w in (run, workdir)]
    assert [(row["step"], row["loss"]) for row in rows[0]] == [(row["step"], row["loss"]) for row in rows[1]]


def test_chunk_of_steps_does_not_change_the_numbers(run, config, tmp_path):
    # log.every is the length of the compiled scan: 5 does not divide 10 by 4, so the last chunk is masked.
    other = replace(config, log=Log(every=4), checkpoint=Checkpoint(every=8))
    train(other, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, parameters(run, config), parameters(tmp_path / "run", config))


def test_cross_fitting_scores_every_image_by_a_detector_without_it(config, tmp_path, monkeypatch):
    trained_on = []
    original = fit_module.chunk_indices

    def recorded(config, pools, first, last):
        trained_on.append(set(pools[0].examples.tolist()))
        return original(config, pools, first, last)

    monkeypatch.setattr(fit_module, "chunk_indices", recorded)
    train(replace(config, scoring=replace(config.scoring, folds=3)), tmp_path / "run")
    threshold = json.loads((tmp_path / "run/threshold.json").read_text())
    assert len(threshold["held_out_scores"]) == 12  # all of them
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["held_out"] == []
    # Five chunks on all images, then five for each of three folds that leave out four images, none twice.
    assert trained_on[:5] == [set(range(12))] * 5
    left_out = [set(range(12)) - trained_on[5 * fold] for fold in (1, 2, 3)]
    assert [len(part) for part in left_out] == [4, 4, 4] and set.union(*left_out) == set(range(12))


def test_training_lowers_the_loss(config, tmp_path):
    longer = replace(config, training=replace(config.training, steps=60, learning_rate=3e-3), log=Log(every=20),
                     checkpoint=Checkpoint(every=60))  # fmt: skip
    train(longer, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_a_loss_and_a_reconstructor_of_ones_own(config, tmp_path):
    import flax.linen as nn

    class Blur(nn.Module):
        @nn.compact
        def __call__(self, features, *, train=False):
            return nn.Conv(features.shape[-1], (3, 3))(features)

    calls = []

    def loss(batch, reconstruction):
        calls.append(reconstruction.shape)
        return losses.reconstruction_loss(batch["features"], reconstruction)

    train(config, tmp_path / "run", loss_fn=loss, reconstructor=Blur())
    assert len(calls) == 1  # traced once
    scores, maps = pushpull_jax.load(tmp_path / "run", reconstructor=Blur())(np.zeros((1, 50, 70, 3), np.uint8))
    assert scores.shape == (1,) and maps.shape == (1, 50, 70)
    with pytest.raises(InputError):
        pushpull_jax.load(tmp_path / "run")


def test_evaluate_again_gives_the_same_files(run, root, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copied"
    shutil.copytree(run, copy)
    for name in ("metrics.json", "predictions.csv", "report.html"):
        (copy / name).unlink()
    code, out, _ = command(monkeypatch, capsys, "evaluate", copy, "--root", root)
    assert code == 0 and "image_auroc" in out
    for name in ("metrics.json", "predictions.csv"):
        assert (copy / name).read_text() == (run / name).read_text()


def test_predict_writes_a_row_and_a_heat_map_at_native_size(run, root, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(pixels(root / "flange/test/good/000.png")).resize((90, 50)).save(folder / "wide.jpg")
    shutil.copy(root / "flange/test/dent/000.png", folder / "dent.png")
    (folder / "broken.png").write_text("this is a text file")
    out = tmp_path / "out"
    code, _, error = command(monkeypatch, capsys, "predict", run, folder, "--output", out)
    assert code == 1 and "broken.png" in error and "Traceback" not in error
    rows = table(out / "predictions.csv")
    assert [Path(row["path"]).name for row in rows] == ["dent.png", "wide.jpg"]
    assert list(rows[0]) == ["path", "score", "threshold", "verdict", "pixel_threshold", "defect_area"]
    assert all(
        row["verdict"] == ("anomalous" if float(row["score"]) > float(row["threshold"]) else "normal") for row in rows
    )
    assert pixels(out / "heatmaps/in/wide.jpg.png").shape == (50, 90, 3)
    assert not list(out.rglob("*.part"))


def test_predict_of_nothing_readable_still_exits_cleanly(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.png").write_bytes(b"")
    code, _, error = command(monkeypatch, capsys, "predict", run, tmp_path / "a.png", "--output", tmp_path / "out")
    assert code == 1 and "a.png" in error


def test_predict_does_not_take_its_own_heat_maps_for_images(run, root, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    shutil.copy(root / "flange/test/good/000.png", tmp_path / "in/000.png")
    monkeypatch.chdir(tmp_path / "in")
    for _ in range(2):
        predictions, _ = predict(pushpull_jax.load(run), ["."], "out")
        assert [prediction.path for prediction in predictions] == ["000.png"]
    written = sorted(path.name for path in Path("out").rglob("*.*"))
    assert written == ["000.png.png", "predict.json", "predictions.csv", "predictions.jsonl"]
    assert Path("out/heatmaps/in/000.png.png").is_file()  # the name of "."


def test_data_without_test_images_give_a_detector(damaged, config, tmp_path, capsys):
    shutil.rmtree(damaged / "flange/test")
    shutil.rmtree(damaged / "flange/ground_truth")
    data = replace(config.data, root=str(damaged))
    assert train(replace(config, data=data), tmp_path / "run") == {}
    assert "no test images" in capsys.readouterr().err
    assert pushpull_jax.load(tmp_path / "run").threshold > 0


def test_a_longer_run_forgets_the_threshold_of_the_shorter(config, tmp_path, monkeypatch):
    constant = replace(config, training=replace(config.training, schedule="constant"))
    train(constant, tmp_path / "run")
    longer = replace(constant, training=replace(constant.training, steps=14))
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "conformal_threshold", lambda *_, **__: pytest.fail("stopped here"))
        with pytest.raises(pytest.fail.Exception):
            train(longer, tmp_path / "run")
    with pytest.raises(InputError, match="not finished"):
        pushpull_jax.load(tmp_path / "run")
    train(longer, tmp_path / "run")
    train(longer, tmp_path / "straight")
    jax.tree.map(
        np.testing.assert_array_equal, parameters(tmp_path / "run", longer), parameters(tmp_path / "straight", longer)
    )


def test_a_run_with_another_loss_is_another_run(run, config):
    def other(batch, reconstruction):
        return losses.reconstruction_loss(batch["features"], reconstruction)

    with pytest.raises(InputError, match="another loss"):
        train(config, run, loss_fn=other)


def test_a_gradient_that_is_not_finite_is_never_saved(config, tmp_path):
    def singular(batch, reconstruction):
        difference = reconstruction - batch["features"]
        return losses.reconstruction_loss(batch["features"], reconstruction) + jnp.sqrt(0 * difference).sum((1, 2, 3))

    every_step = replace(config, log=Log(every=1), checkpoint=Checkpoint(every=1))
    with pytest.raises(InputError, match="gradient_norm of step 1 is nan"):
        train(every_step, tmp_path / "run", loss_fn=singular)
    assert not list((tmp_path / "run/checkpoints").glob("[0-9]*"))


def test_workdir_below_a_file(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    code, _, error = command(monkeypatch, capsys, *train_arguments(root, tmp_path / "file/run"))
    assert code == 1 and "not a folder that may be written to" in error


SMALL = f"""
    --features.stages 2 3 --features.stage_weights 1 1 --scoring.map_weights 1 1 --features.grid 8
    --reconstructor.width 16 --reconstructor.hidden 16 --data.image_size {SIZE} --training.steps 2
    --log.every 1 --checkpoint.every 1
""".split()


def train_arguments(root: Path, workdir: Path, *more) -> list:
    return ["train", "quick", "--data.root", root, "--data.category", "flange", "--workdir", workdir, *SMALL, *more]


def assert_refused(result: tuple[int, str, str], workdir: Path, *words: str) -> None:
    """One clear message, a non-zero exit, and nothing written."""
    code, out, error = result
    assert code != 0
    assert "Traceback" not in error
    for word in words:
        assert word in out + error
    assert not workdir.exists()


def test_data_folder_that_does_not_exist(tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    result = command(monkeypatch, capsys, *train_arguments(tmp_path / "nowhere", workdir))
    assert_refused(result, workdir, "nowhere", "does not exist")


def test_category_that_does_not_exist(root, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    result = command(monkeypatch, capsys, *train_arguments(root, workdir, "--data.category", "flanje"))
    assert_refused(result, workdir, "flanje", "flange")


def test_category_without_training_images(damaged, tmp_path, monkeypatch, capsys):
    shutil.rmtree(damaged / "flange/train")
    result = command(monkeypatch, capsys, *train_arguments(damaged, tmp_path / "run"))
    assert_refused(result, tmp_path / "run", "train/good")


@pytest.mark.parametrize("place", ["train/good/003.png", "test/good/001.png"])
def test_truncated_image_stops_before_training(damaged, tmp_path, monkeypatch, capsys, place):
    path = damaged / "flange" / place
    path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr(train_module, "fit", lambda *_: pytest.fail("it trained"))
    result = command(monkeypatch, capsys, *train_arguments(damaged, tmp_path / "run"))
    assert_refused(result, tmp_path / "run", place)


def test_truncated_images_are_left_out_if_told_to(damaged, config, tmp_path):
    for place in ("train/good/003.png", "test/good/001.png"):
        path = damaged / "flange" / place
        path.write_bytes(path.read_bytes()[:-20])
    data = replace(config.data, root=str(damaged), on_unreadable="skip")
    metrics = train(replace(config, data=data), tmp_path / "run")
    left_out = json.loads((tmp_path / "run/config.json").read_text())["data"]["left_out"]
    assert sorted(left_out) == ["flange/test/good/001.png", "flange/train/good/003.png"]
    assert metrics["images"] == 7


def test_mask_of_another_size(damaged, tmp_path, monkeypatch, capsys):
    path = damaged / "flange/ground_truth/dent/000_mask.png"
    Image.fromarray(pixels(path)).resize((30, 40)).save(path)
    result = command(monkeypatch, capsys, *train_arguments(damaged, tmp_path / "run"))
    assert_refused(result, tmp_path / "run", "dent", "30x40", f"{SIZE}x{SIZE}")


def test_mask_without_an_image(damaged, tmp_path, monkeypatch, capsys):
    (damaged / "flange/test/dent/000.png").rename(damaged / "flange/test/dent/007.png")
    result = command(monkeypatch, capsys, *train_arguments(damaged, tmp_path / "run"))
    assert_refused(result, tmp_path / "run", "000_mask.png")


def test_misspelt_field_on_the_command_line(root, tmp_path, monkeypatch, capsys):
    result = command(monkeypatch, capsys, *train_arguments(root, tmp_path / "run", "--training.stepz", 3))
    assert_refused(result, tmp_path / "run", "--training.stepz", "--training.steps")


def test_misspelt_field_in_a_config_file(root, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.py"
    path.write_text("from pushpull_jax.config import Config, Training\nconfig = Config(training=Training(stepz=3))\n")
    result = command(monkeypatch, capsys, "train", path, "--workdir", tmp_path / "run")
    assert_refused(result, tmp_path / "run", "mine.py", "stepz", "did you mean steps?")


def test_value_of_the_wrong_type(root, tmp_path, monkeypatch, capsys):
    result = command(monkeypatch, capsys, *train_arguments(root, tmp_path / "run", "--training.batch_size", "many"))
    assert_refused(result, tmp_path / "run", "batch_size", "many")


def test_value_out_of_range(root, tmp_path, monkeypatch, capsys):
    result = command(monkeypatch, capsys, *train_arguments(root, tmp_path / "run", "--training.batch_size", "0"))
    assert_refused(result, tmp_path / "run", "training.batch_size", "positive", "0")


def test_workdir_of_another_config(run, root, monkeypatch, capsys):
    before = (run / "config.json").read_text()
    code, _, error = command(monkeypatch, capsys, *train_arguments(root, run))
    assert code == 1 and "another config" in error and "training.steps = 10 there, 2 here" in error
    assert (run / "config.json").read_text() == before


def test_workdir_of_other_data(run, config, damaged):
    path = damaged / "flange/train/good/000.png"
    shutil.copy(damaged / "flange/train/good/001.png", path)
    with pytest.raises(InputError, match="other data"):
        train(replace(config, data=replace(config.data, root=str(damaged))), run)


def test_workdir_that_is_full_of_something_else(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("Dear")
    code, _, error = command(monkeypatch, capsys, *train_arguments(root, tmp_path / "letters"))
    assert code == 1 and "not a run" in error
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["dear.txt"]


@pytest.mark.parametrize("program", ["evaluate", "predict"])
def test_workdir_that_is_not_a_run(program, root, tmp_path, monkeypatch, capsys):
    more = [root / "flange/test/good/000.png", "--output", tmp_path / "out"] if program == "predict" else []
    code, _, error = command(monkeypatch, capsys, program, tmp_path, *more)
    assert code == 1 and "is not a run" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_predict_of_a_path_that_does_not_exist(run, tmp_path, monkeypatch, capsys):
    code, _, error = command(monkeypatch, capsys, "predict", run, tmp_path / "no.png", "--output", tmp_path / "out")
    assert code == 1 and "no.png" in error
    assert not (tmp_path / "out").exists()


def test_misspelt_command(monkeypatch, capsys):
    code, _, error = command(monkeypatch, capsys, "trian")
    assert code == 2 and "did you mean train?" in error


def test_real_bottle_is_read_and_learned_from(shared_data, config, tmp_path):
    data = Data(root=str(shared_data / "mvtec_ad_256"), category="toothbrush", image_size=SIZE)
    metrics = train(replace(config, data=data, training=replace(config.training, steps=2)), tmp_path / "run")
    # The counts of this copy of the category: 12 good test images, 30 defective ones.
    assert (metrics["normal"], metrics["anomalous"]) == (12, 30)


def test_images_trained_on_are_never_tested_however_the_split_moves(root, config, tmp_path, capsys):
    def digest(key: str) -> bytes:
        return hashlib.sha256(key.encode()).digest()  # that of `manifest.share_for_test`

    base = tmp_path / "data/flange"
    shutil.copytree(root / "flange/train/good", base / "good")
    shutil.copytree(root / "flange/test/dent", base / "bad")
    data = replace(config.data, root=str(base.parent), source="good_bad")
    first = train(replace(config, data=data), tmp_path / "run")
    assert (first["normal"], first["anomalous"]) == (2, 1)  # round(12 / 5)
    order = sorted((f"flange/good/{path.name}" for path in (base / "good").iterdir()), key=digest)
    # Twelve more, none of which belongs to the first five, which are the fifth that is tested of 24.
    later = [name for name in map("new{}.png".format, range(100)) if digest(f"flange/good/{name}") > digest(order[4])]
    for name in later[:12]:
        shutil.copy(base.parent / order[0], base / "good" / name)
    capsys.readouterr()
    again = evaluate(tmp_path / "run")
    assert {name: again[name] for name in COUNTS} == {name: first[name] for name in COUNTS}
    assert "3 test images are left out, for the run has used them: flange/good/" in capsys.readouterr().err
    run = json.loads((tmp_path / "run/config.json").read_text())["data"]
    moved = next(key for key in order[2:5] if key not in run["held_out"])
    with pytest.raises(InputError, match="1 of the images were trained on"):
        calibrate(tmp_path / "run", [base.parent / moved], false_positive_rate=0.2)
