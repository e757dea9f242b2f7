"""Runs in a bucket, of a server on this machine that answers as Google Cloud Storage does."""

import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from object_store import ObjectStore, serving

from pushpull_jax import workdir as files
from pushpull_jax.ablation import ablate
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.cli import main
from pushpull_jax.config import Ablation, Checkpoint, Config, Data, Features, Log, Reconstructor, Scoring, Training
from pushpull_jax.data.demo import write_demo
from pushpull_jax.detector import initial_state, load, read_network
from pushpull_jax.errors import InputError
from pushpull_jax.evaluation import evaluate
from pushpull_jax.exporting import export
from pushpull_jax.recalibration import at_false_positive_rate, calibrate
from pushpull_jax.training import train

if importlib.util.find_spec("gcsfs") is None:
    pytest.skip("gcsfs is not installed", allow_module_level=True)

STEPS = 6


@pytest.fixture(scope="module")
def store() -> ObjectStore:
    """A bucket whose clients are told where it is."""
    with pytest.MonkeyPatch.context() as patch, serving() as store:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, store.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("GOOGLE_CLOUD_PROJECT", "none")
        yield store


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("data")
    write_demo(folder, train=8, good=2, per_defect=1, size=64)
    return Config(
        data=Data(root=str(folder), category="flange", image_size=64),
        features=Features(backbone="pixels", stages=(3,), grid=8, standardise=True),
        reconstructor=Reconstructor(width=16, encoder_layers=0, decoder_layers=1, heads=2, hidden=16),
        training=Training(steps=STEPS, batch_size=6),
        scoring=Scoring(held_out=0.2),
        log=Log(every=1),
        checkpoint=Checkpoint(every=2),
    )


@pytest.fixture(scope="module")
def in_a_folder(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(config, folder)
    return folder


def rows(workdir) -> list[dict]:
    return [row | {"seconds_per_step": 0} for row in files.read_lines(workdir / files.LOG)]


def last_state(workdir):
    like = jax.eval_shape(lambda: initial_state(*read_network(workdir)))
    with Checkpoints(workdir / files.CHECKPOINTS, create=False) as checkpoints:
        return checkpoints.restore(like)


def check_same(address: str, folder: Path) -> None:
    """The same bits in a bucket as in a folder, in files of the same names."""
    there = files.run_folder(address)
    assert rows(there) == rows(folder)
    for leaf, expected in zip(*map(jax.tree.leaves, map(last_state, (there, folder))), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    for name in ("threshold.json", "metrics.json", "predictions.csv"):
        assert (there / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in there.iterdir()) == sorted(path.name for path in folder.iterdir())


def test_a_run_in_a_bucket_is_the_run_in_a_folder(store, config, in_a_folder, stopped_at, capsys, monkeypatch):
    """Stopped, gone on with, evaluated again, loaded."""
    address = "gs://bucket/runs/stopped"
    monkeypatch.setattr(files, "_SECONDS", math.inf)
    with stopped_at(4):
        train(config, address)
    # Once at the start, and before each checkpoint.
    assert store.writes.count("runs/stopped/metrics.jsonl") == 3
    assert [row["step"] for row in rows(files.run_folder(address))] == [1, 2, 3, 4]
    train(config, address)
    check_same(address, in_a_folder)
    train(config, address)
    assert f"{address} is finished" in capsys.readouterr().err
    metrics = evaluate(address)
    assert metrics["image_auroc"] == json.loads((in_a_folder / "metrics.json").read_text())["image_auroc"]
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    for got, expected in zip(load(address)(images), load(in_a_folder)(images), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_a_run_starts_from_one_in_a_bucket_and_is_calibrated_and_exported(store, config, in_a_folder, tmp_path):
    address = "gs://bucket/runs/first"
    train(replace(config, training=replace(config.training, steps=2)), address)
    started = replace(config, training=replace(config.training, start=address))
    train(started, tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["config"]["training"]["start"] == address
    before = load(address)
    folder = Path(config.data.root) / config.data.category / "test" / "good"
    result = calibrate(address, [folder], false_positive_rate=0.5)
    assert result.threshold.n == 2 and load(address).threshold == np.float32(result.threshold.value)
    assert at_false_positive_rate(address, before, rate=0.5).threshold == np.float32(result.threshold.value)
    export(address, tmp_path / "exported", say=lambda line: None)
    assert (tmp_path / "exported" / "weights.safetensors").is_file()


def test_what_cannot_be_is_one_message(store, config, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="gs://none/run: there is no such bucket, or it may not be read"):
        train(config, "gs://none/run")
    with pytest.raises(InputError, match="workdir gs://bucket/none: there is no such folder"):
        load("gs://bucket/none")
    for log in (Log(every=1, tensorboard=True), Log(every=1, profile=1)):
        with pytest.raises(InputError, match="log.tensorboard and log.profile write to a folder only"):
            train(replace(config, log=log), "gs://bucket/runs/log")
    monkeypatch.setattr(store, "is_denied", True)
    with pytest.raises(OSError, match=r"gs://bucket/runs/denied/backbone.safetensors: cannot be written"):
        train(config, "gs://bucket/runs/denied")
    assert not [name for name in store.objects if name.startswith(("runs/log", "runs/denied"))]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs gcsfs, of the extra `gcs`: pip install 'pushpull_jax\[gcs\]'"):
        files.run_folder("gs://bucket/run")


def test_a_bucket_that_takes_no_more_stops_the_run_and_it_goes_on(store, config, in_a_folder, monkeypatch):
    def is_lost(name: str) -> bool:
        store.is_denied |= name.startswith("runs/full/checkpoints/4/")
        return False

    monkeypatch.setattr(store, "is_lost", is_lost)
    with pytest.raises(OSError, match="gs://bucket/runs/full.* cannot be written"):
        train(config, "gs://bucket/runs/full")
    monkeypatch.undo()
    store.is_denied = False
    assert "runs/full/checkpoints/4/commit_success.txt" not in store.objects
    train(config, "gs://bucket/runs/full")
    check_same("gs://bucket/runs/full", in_a_folder)


def test_a_checkpoint_that_was_damaged_there_is_passed_over(store, config, in_a_folder, capsys):
    address = "gs://bucket/runs/damaged"
    train(config, address)
    part = max(
        (name for name in store.objects if f"damaged/{files.CHECKPOINTS}/{STEPS}/" in name),
        key=lambda name: len(store.objects[name][1]),
    )
    generation, content = store.objects[part]
    store.objects[part] = generation + 1, content[: len(content) // 2]
    train(config, address)
    said = capsys.readouterr().err
    assert f"{address}/checkpoints/{STEPS}: " in said and f"that of step {STEPS - 2} is used instead" in said
    check_same(address, in_a_folder)


@pytest.mark.slow
def test_an_ablation_in_a_bucket(store, config, tmp_path):
    grid = Ablation(config, {"training.learning_rate": (1e-3, 1e-4)})
    there, here = ablate(grid, "gs://bucket/grids/rates"), ablate(grid, tmp_path / "rates")
    assert [row["metrics"] for row in there] == [row["metrics"] for row in here]
    assert store.objects["grids/rates/ablation.csv"][1] == (tmp_path / "rates" / "ablation.csv").read_bytes()
    assert ablate(grid, "gs://bucket/grids/rates") == there  # it is finished


def test_a_bucket_that_refuses_to_be_read_is_one_message(store, monkeypatch, capsys):
    store.objects["refused/config.json"] = 1, b"{}"
    monkeypatch.setattr(store, "is_refused", lambda name: name == "refused/config.json")
    monkeypatch.setattr(sys, "argv", ["pushpull", "evaluate", "gs://bucket/refused"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("pushpull evaluate: a bucket could not be used: HttpError: ")


def test_an_empty_folder_that_was_made_in_the_console_takes_a_run(store, config):
    store.objects["console/"] = 1, b""
    assert not files.check_startable(files.run_folder("gs://bucket/console"), config)
    store.objects["console/console"] = 2, b"something"
    with pytest.raises(InputError, match="is not a run"):
        files.check_startable(files.run_folder("gs://bucket/console"), config)


@pytest.mark.parametrize("words", [["demo", "--workdir"], ["export", "run", "--output"]])
def test_what_is_no_run_is_not_written_to_a_bucket(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pushpull", *words, "gs://bucket/place"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1 and "only the folder of a run may lie in a bucket" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Real processes.

ROOT = Path(__file__).resolve().parents[1]
ENTRY = "from pushpull_jax.cli import main; main()"
TIMEOUT = 1200


@pytest.fixture(scope="module")
def config_file(config, tmp_path_factory) -> Path:
    """The config as a user would write it."""
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(f"from pushpull_jax.config import *\n\nconfig = {config!r}\n")
    return path


def started(config_file: Path, address: str, *, said: Path, launch: tuple[str, ...] = (), devices: str = "1"):
    """A process that trains; what it says goes to a file."""
    command = [*launch, sys.executable, "-c", ENTRY, "train", str(config_file), "--workdir", address]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if launch:
        environment["XLA_FLAGS"] = ""
    with said.open("w") as log:
        return subprocess.Popen([*command, "--mesh.data", devices], env=environment, stdout=log, stderr=log)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["checkpoints/4/default/", "checkpoints/4/commit_success.txt", "threshold.json"])
def test_a_process_killed_while_it_writes_loses_nothing(store, config_file, in_a_folder, moment, tmp_path, monkeypatch):
    """Before an object is there: an array, what makes a checkpoint complete, the thresholds."""
    folder, said = f"killed/{moment.replace('/', '_')}", tmp_path / "said.txt"
    process = started(config_file, f"gs://bucket/{folder}", said=said)
    monkeypatch.setattr(store, "is_lost", lambda name: name.startswith(f"{folder}/{moment}") and not process.kill())
    assert process.wait(TIMEOUT) == -signal.SIGKILL, said.read_text()
    monkeypatch.undo()
    assert not [name for name in store.objects if name.startswith(f"{folder}/{moment}")]
    process = started(config_file, f"gs://bucket/{folder}", said=said)
    assert process.wait(TIMEOUT) == 0, said.read_text()
    assert f"report: gs://bucket/{folder}/report.html" in said.read_text()
    check_same(f"gs://bucket/{folder}", in_a_folder)


@pytest.mark.slow
def test_two_processes_train_in_a_bucket_and_one_is_killed(store, config_file, in_a_folder, tmp_path, monkeypatch):
    launch = (sys.executable, str(ROOT / "scripts" / "launch_local.py"), "-n", "2", "--devices", "4", "--")
    address, said = "gs://bucket/two", tmp_path / "said.txt"

    def is_lost(name: str) -> bool:
        """The second process dies while the first one writes the state of step 4."""
        if name.startswith("two/checkpoints/4/") and "rank 1 was killed" not in said.read_text():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(re.search(r"rank 1 is process (\d+)", said.read_text())[1]), signal.SIGKILL)
        return False

    process = started(config_file, address, said=said, launch=launch, devices="-1")
    monkeypatch.setattr(store, "is_lost", is_lost)
    assert process.wait(TIMEOUT) == 128 + signal.SIGKILL, said.read_text()
    monkeypatch.undo()
    process = started(config_file, address, said=said, launch=launch, devices="-1")
    assert process.wait(TIMEOUT) == 0, said.read_text()
    there = files.run_folder(address)
    losses, expected = ([row["loss"] for row in rows(folder)] for folder in (there, in_a_folder))
    assert [row["step"] for row in rows(there)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert not [name for name in store.objects if name.endswith(".part")]
