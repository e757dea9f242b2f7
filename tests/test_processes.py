"""Real processes that train together: the same numbers as one, and what happens when one is told to stop or killed.

scripts/launch_local.py starts two of four fake devices each. The scripts for clusters, which nobody here can run, are
checked as far as they can be: their syntax, and that their flags are ours.
"""

import collections
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from pushpull_jax import cli
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Mesh, load_config
from pushpull_jax.data.demo import write_demo
from pushpull_jax.detector import initial_state, load, read_network
from pushpull_jax.training import train

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = [sys.executable, str(ROOT / "scripts" / "launch_local.py"), "-n", "2", "--devices", "4", "--"]
CLUSTERS = ROOT / "scripts" / "launch"
STEPS, HEARTBEAT, TIMEOUT = 100, 10, 1200
CONFIG = f"""\
from pushpull_jax.config import Checkpoint, Config, Data, Features, Hosts, Log, Reconstructor, Scoring, Training

config = Config(
    data=Data(root={{root!r}}, category="flange", image_size=64),
    features=Features(backbone="pixels", stages=(3,), grid=8),
    reconstructor=Reconstructor(width=16, encoder_layers=0, decoder_layers=1, heads=2, hidden=16),
    training=Training(steps={STEPS}, batch_size=6),
    scoring=Scoring(held_out=0.2),
    log=Log(every=1),
    checkpoint=Checkpoint(every={STEPS}),
    hosts=Hosts(heartbeat_timeout_seconds={HEARTBEAT}),
)
"""
ENTRY = "from pushpull_jax.cli import main; main()"


# The scripts for clusters.


@pytest.mark.parametrize("script", sorted(CLUSTERS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_shell(script):
    subprocess.run(["bash", "-n", script], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, script], check=True)


def test_the_jobset_is_one():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((CLUSTERS / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    shell, option, text = container["command"]
    subprocess.run([shell, "-n", option, text], check=True)
    # Names are JobSet's: JOBSET-JOB-0-0.JOBSET is the first pod.
    first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
    assert f"--hosts.coordinator {first}:{container['ports'][0]['containerPort']}" in text
    assert f"--hosts.processes {job['completions']}" in text and job["parallelism"] == job["completions"]


@pytest.mark.parametrize("script", sorted(CLUSTERS.iterdir()), ids=lambda path: path.name)
def test_flags_of_the_scripts_are_ours(script, monkeypatch):
    text = script.read_text().replace("\\\n", " ").replace("$JOB_COMPLETION_INDEX", "3")
    found = re.search(r"pushpull (train quick\b.*(?:\n +--.*)*)", text)[1]
    command, *arguments = shlex.split(found.rstrip(")"))
    seen = []
    monkeypatch.setattr("pushpull_jax.training.train", lambda config, *_, **__: seen.append(config) or {})
    monkeypatch.setattr(cli, "prepare_jax", lambda: None)
    cli.COMMANDS[command](arguments)
    assert seen[0].mesh.data == -1 and seen[0].hosts.heartbeat_timeout_seconds == 60
    assert "Not run" in script.read_text()


# The same numbers.


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """What spread_training.py writes on 1 device, on 8, and on 2 processes of 4."""
    folder, program = tmp_path_factory.mktemp("spread"), [sys.executable, str(ROOT / "tests" / "spread_training.py")]
    flags = "--xla_force_host_platform_device_count={}"
    for name, command, devices in (("1", program, 1), ("8", program, 8), ("2x4", [*LAUNCH, *program], 4)):
        environment = os.environ | {"XLA_FLAGS": flags.format(devices)}
        subprocess.run([*command, str(folder / name)], env=environment, check=True, timeout=TIMEOUT)
    return {path.name: dict(np.load(path)) for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["8", "2x4"])
def test_steps_do_not_depend_on_the_processes(spread, devices):
    one, other = spread["1"], spread[devices]
    assert one["devices"] == 1 and other["devices"] == 8
    assert one["float64"].dtype == np.float64 and len(one["float64"]) == 50
    np.testing.assert_allclose(other["float64"], one["float64"], rtol=1e-9)
    np.testing.assert_allclose(other["float32"][:20], one["float32"][:20], rtol=1e-5)
    np.testing.assert_allclose(other["float32"], one["float32"], rtol=1e-3)
    gradients = [name for name in one if name.startswith("gradient")]
    assert len(gradients) > 20
    for name in gradients:  # those of the biases of keys are 0 but for rounding
        np.testing.assert_allclose(other[name], one[name], atol=1e-5 * max(np.abs(one[name]).max(), 1e-2))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_demo(folder / "data", train=8, good=2, per_defect=1, size=64)
    (folder / "config.py").write_text(CONFIG.format(root=str(folder / "data")))
    return folder / "config.py"


def start(config_file: Path, workdir: Path, *options: str, said: Path) -> subprocess.Popen:
    """Two processes that train; what they say goes to a file."""
    command = [sys.executable, "-c", ENTRY, "train", str(config_file), "--workdir", str(workdir), "--mesh.data", "-1"]
    environment = os.environ | {"XLA_FLAGS": ""}
    with said.open("w") as log:
        return subprocess.Popen([*LAUNCH, *command, *options], stdout=log, stderr=log, env=environment)


def wait_until(process: subprocess.Popen, is_so) -> None:
    until = time.monotonic() + TIMEOUT
    while not is_so():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


def rows(workdir: Path) -> list[dict]:
    log = workdir / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


@pytest.fixture(scope="module")
def uninterrupted(config_file, tmp_path_factory) -> Path:
    """Folder of a run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(config_file, folder / "run", said=folder / "said.txt")
    assert process.wait(TIMEOUT) == 0, (folder / "said.txt").read_text()
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_of_two_processes_is_the_run_of_one(config_file, uninterrupted, tmp_path, devices):
    config = load_config(str(config_file))
    train(replace(config, mesh=Mesh(data=devices)), tmp_path / "one")
    losses, expected = ([row["loss"] for row in rows(run)] for run in (uninterrupted, tmp_path / "one"))
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses[:20], expected[:20], rtol=1e-5)
    np.testing.assert_allclose(losses[:50], expected[:50], rtol=1e-3)
    two, one = (json.loads((run / "metrics.json").read_text()) for run in (uninterrupted, tmp_path / "one"))
    # A pair of a normal and an anomalous image in another order.
    assert two["image_auroc"] == pytest.approx(one["image_auroc"], abs=1 / (one["normal"] * one["anomalous"]) + 1e-9)
    for name in ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"):
        assert two[name] == pytest.approx(one[name], abs=1e-3)
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    for got, wanted in zip(*(load(run)(images) for run in (uninterrupted, tmp_path / "one")), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3)


# Features elsewhere than in memory.

COUNTED = ROOT / "tests" / "counted_training.py"
EVERY_SOURCE = """\
from dataclasses import replace
from pushpull_jax.config import Log, Supervision, Training, load_config

config = replace(
    load_config({plain!r}),
    training=Training(steps=20, batch_size=6, loss="push_pull", jitter=0.1),
    supervision=Supervision(shots=2, confetti_copies=2),
    log=Log(every=1),
)
"""


@pytest.fixture(scope="module")
def every_source(config_file) -> Path:
    """Batches of normal images, of labelled ones, and of copies with confetti noise."""
    path = config_file.with_name("every_source.py")
    path.write_text(EVERY_SOURCE.format(plain=str(config_file)))
    return path


@pytest.fixture(scope="module")
def in_memory(every_source, tmp_path_factory) -> Path:
    """Folder of a run of one process on one device, with its features in memory."""
    config = load_config(str(every_source))
    workdir = tmp_path_factory.mktemp("in_memory") / "run"
    train(replace(config, features=replace(config.features, keep="memory")), workdir)
    return workdir


def counted(launch: list[str], config_file: Path, folder: Path, keep: str, cache: Path) -> list[collections.Counter]:
    """How often each process decoded each image, in a run on eight devices."""
    command = [sys.executable, str(COUNTED), str(folder / "decoded"), "train", str(config_file)]
    options = ["--workdir", str(folder / "run"), "--mesh.data", "-1", "--features.keep", keep]
    devices = "" if launch else "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": devices}
    options += ["--features.cache", str(cache)]
    subprocess.run([*launch, *command, *options], env=environment, check=True, timeout=TIMEOUT)
    paths = sorted((folder / "decoded").iterdir())
    return [collections.Counter(json.loads(path.read_text())) for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["stream", "disk"])
def test_two_processes_share_the_decoding_and_come_to_the_losses_of_one(keep, every_source, in_memory, tmp_path):
    """Whatever is decoded by one process on eight devices is decoded by one of two, and by one alone."""
    (one,) = counted([], every_source, tmp_path / "one", keep, tmp_path / "cache_of_one")
    cache = tmp_path / "cache"
    two = counted(LAUNCH, every_source, tmp_path / "two", keep, cache)
    expected = [row["loss"] for row in rows(in_memory)]
    assert len(expected) == 20
    for folder in ("one", "two"):
        losses = [row["loss"] for row in rows(tmp_path / folder / "run")]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
    thresholds = [json.loads((run / "threshold.json").read_text()) for run in (in_memory, tmp_path / "two" / "run")]
    assert thresholds[1]["held_out_scores"] == pytest.approx(thresholds[0]["held_out_scores"], rel=1e-3)
    assert sum(two, collections.Counter()) == one
    # The second one evaluates nothing, so that only training images are alike; it has 4 of 8 places in each batch.
    trained = [sum(times for key, times in decoded.items() if "/train/" in f"/{key}") for decoded in two]
    assert abs(trained[0] - trained[1]) <= 0.1 * sum(trained)
    if keep == "disk":
        # 8 normal images, 2 copies of the 6 that are trained on, and 2 labelled ones, none of them twice.
        assert len(list(cache.rglob("*.npz"))) == 8 + 2 * 6 + 2 and not list(cache.rglob("*.part"))
        again = counted(LAUNCH, every_source, tmp_path / "again", keep, cache)
        assert not [key for decoded in again for key in decoded if "/train/" in f"/{key}"]
        assert [row["loss"] for row in rows(tmp_path / "again" / "run")] == losses


# Faults.


def last_state(workdir: Path):
    like = jax.eval_shape(lambda: initial_state(*read_network(workdir)))
    with Checkpoints(workdir / "checkpoints", create=False) as checkpoints:
        return checkpoints.restore(like)


@pytest.mark.slow
def test_two_processes_told_to_stop_and_one_killed(config_file, uninterrupted, tmp_path):
    """Both save the same step; of the killed one it is said; and the same command comes to the same bits."""
    workdir, said = tmp_path / "run", tmp_path / "said.txt"
    process = start(config_file, workdir, said=said)
    wait_until(process, lambda: len(rows(workdir)) >= 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 75, said.read_text()
    step = rows(workdir)[-1]["step"]
    assert saved(workdir) == [step] and 3 <= step < STEPS
    for rank in (0, 1):
        assert (
            f"[{rank}] pushpull train: {workdir}: told to stop; the state of step {step} is saved" in said.read_text()
        )

    often = ("--checkpoint.every", "5")
    process = start(config_file, workdir, *often, said=said)
    wait_until(process, lambda: saved(workdir)[-1] > step)
    killed = int(re.search(r"rank 1 is process (\d+)", said.read_text())[1])
    os.kill(killed, signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(TIMEOUT) == 128 + signal.SIGKILL
    assert time.monotonic() - began < HEARTBEAT + 15
    assert "launch_local: rank 1 was killed by SIGKILL; to resume: " + shlex.join(process.args) in said.read_text()
    survivor = int(re.search(r"rank 0 is process (\d+)", said.read_text())[1])
    with pytest.raises(ProcessLookupError):
        os.kill(survivor, 0)
    assert saved(workdir)[-1] < STEPS

    process = start(config_file, workdir, *often, said=said)
    assert process.wait(TIMEOUT) == 0, said.read_text()
    here, there = rows(workdir), rows(uninterrupted)
    assert [row["step"] for row in here] == list(range(1, STEPS + 1))
    for row, expected in zip(here, there, strict=True):
        assert row | {"seconds_per_step": 0} == expected | {"seconds_per_step": 0}
    for leaf, expected in zip(*(jax.tree.leaves(last_state(run)) for run in (workdir, uninterrupted)), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    for name in ("threshold.json", "metrics.json", "predictions.csv"):
        assert (workdir / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.mark.slow
def test_a_file_that_one_process_cannot_read_stops_both(config_file, tmp_path):
    """The second half of the training images is the second process's to read."""
    shutil.copytree(config_file.parent / "data", tmp_path / "data")
    last = sorted((tmp_path / "data" / "flange" / "train" / "good").iterdir())[-1]
    last.write_bytes(b"no image")
    process = start(config_file, tmp_path / "run", "--data.root", str(tmp_path / "data"), said=tmp_path / "said.txt")
    assert process.wait(TIMEOUT) == 1
    said = (tmp_path / "said.txt").read_text()
    for rank in (0, 1):
        own = "\n".join(line for line in said.splitlines() if line.startswith(f"[{rank}]"))
        assert re.search(rf"pushpull train: 1 of \d examples cannot be read:\n.*{last.name}", own)
    assert not (tmp_path / "run" / "config.json").exists() and "Traceback" not in said
