"""Real processes that are told to stop, killed, or out of disk: nothing is lost, and the numbers are the same bits.

Each fault ends a process of `pushpull train`; the same command goes on. What is compared with is one run, in this
process, that nothing happened to.
"""

import collections
import json
import os
import random
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

from pushpull_jax import cli, extraction
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import load_config
from pushpull_jax.data.demo import write_demo
from pushpull_jax.detector import initial_state, load, read_network
from pushpull_jax.errors import InputError
from pushpull_jax.training import train

STEPS, LOG_EVERY = 200, 2
CONFIG = f"""\
from pushpull_jax.config import Checkpoint, Config, Data, Features, Log, Reconstructor, Scoring, Training

config = Config(
    data=Data(root={{root!r}}, category="flange", image_size=64),
    features=Features(backbone="pixels", stages=(3,), grid=8),
    reconstructor=Reconstructor(width=16, encoder_layers=0, decoder_layers=1, heads=2, hidden=16),
    training=Training(steps={STEPS}, batch_size=4, learning_rate=3e-3),
    scoring=Scoring(held_out=0.2),
    log=Log(every={LOG_EVERY}),
    checkpoint=Checkpoint(every={LOG_EVERY}),
)
"""
ENTRY = "from pushpull_jax.cli import main; main()"
# As on a full disk. A checkpoint has files of 40 KB and more, config.json has 3.
SMALL_FILES_ONLY = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); {ENTRY}"
TIMEOUT = 300


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_demo(folder / "data", train=8, good=1, per_defect=1, size=64)
    (folder / "config.py").write_text(CONFIG.format(root=str(folder / "data")))
    return folder / "config.py"


@pytest.fixture(scope="module")
def uninterrupted(config_file, tmp_path_factory) -> Path:
    """Folder of the run that nothing happened to; it compiles for the others too."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    config = load_config(str(config_file))
    train(replace(config, checkpoint=replace(config.checkpoint, every=STEPS // 2)), workdir)
    return workdir


def start(config_file: Path, workdir: Path, *options: str, entry=ENTRY, log=subprocess.PIPE, environment=()):
    command = [sys.executable, "-c", entry, "train", str(config_file), "--workdir", str(workdir), *options]
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=os.environ | dict(environment))


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and stderr."""
    stderr = process.communicate(timeout=TIMEOUT)[1]
    return process.returncode, stderr


def wait_until(process: subprocess.Popen, is_so) -> bool:
    """Whether something became so before the process ended."""
    until = time.monotonic() + TIMEOUT
    while process.poll() is None:
        if is_so():
            return True
        assert time.monotonic() < until
        time.sleep(0.002)
    return False


def logged(workdir: Path) -> int:
    """Whole lines of metrics.jsonl."""
    log = workdir / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def being_written(workdir: Path) -> set[int]:
    """The folders that a checkpoint is written to before it has its name."""
    return {path.stat().st_ino for path in workdir.glob("checkpoints/*.orbax-checkpoint-tmp")}


def last_state(workdir: Path):
    like = jax.eval_shape(lambda: initial_state(*read_network(workdir)))
    with Checkpoints(workdir / "checkpoints", create=False) as checkpoints:
        return checkpoints.restore(like)


def assert_nothing_lost(workdir: Path, uninterrupted: Path) -> None:
    """The same bits of the state, every logged step once and in order, the same threshold and metrics."""
    for leaf, expected in zip(*(jax.tree.leaves(last_state(run)) for run in (workdir, uninterrupted)), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    here, there = rows(workdir), rows(uninterrupted)
    assert [row["step"] for row in here] == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
    for row, expected in zip(here, there, strict=True):
        assert row | {"seconds_per_step": 0} == expected | {"seconds_per_step": 0}
    for name in ("threshold.json", "metrics.json", "predictions.csv"):
        assert (workdir / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert not being_written(workdir)


def test_a_run_through_every_fault(config_file, uninterrupted, tmp_path):
    """Told to stop; killed while it writes a checkpoint; out of disk; and to its end."""
    workdir = tmp_path / "run"
    rarely = ("--checkpoint.every", str(STEPS))
    process = start(config_file, workdir, *rarely)
    assert wait_until(process, lambda: logged(workdir) >= 3)
    process.send_signal(signal.SIGTERM)
    code, stderr = ended(process)
    step = rows(workdir)[-1]["step"]
    last_line = stderr.splitlines()[-1]
    assert code == 75
    assert last_line == (
        f"pushpull train: {workdir}: told to stop; the state of step {step} is saved; "
        "the same command goes on from there"
    )
    assert 3 * LOG_EVERY <= step < STEPS and int(last_state(workdir).step) == step

    often = (*rarely, "--checkpoint.minutes", "1e-6")  # at every logging step, by the clock alone
    process, before = start(config_file, workdir, *often, log=subprocess.DEVNULL), logged(workdir)
    assert wait_until(process, lambda: logged(workdir) > before + 2 and being_written(workdir))
    process.kill()
    process.wait()
    killed_at = int(last_state(workdir).step)
    assert step < killed_at < STEPS

    code, stderr = ended(start(config_file, workdir, entry=SMALL_FILES_ONLY))
    said = stderr.splitlines()[-1]
    assert code == 1 and "Traceback" not in stderr and "orbax" not in stderr and stderr.count("cannot be written") == 1
    assert said == f"pushpull train: {workdir / 'checkpoints'}: checkpoints cannot be written: File too large"
    assert int(last_state(workdir).step) == killed_at
    assert [row["step"] for row in rows(workdir)] == list(range(LOG_EVERY, rows(workdir)[-1]["step"] + 1, LOG_EVERY))

    code, stderr = ended(start(config_file, workdir, *rarely))
    assert code == 0, stderr
    assert_nothing_lost(workdir, uninterrupted)


def test_a_run_that_is_told_to_stop_outside_of_its_training(config_file, uninterrupted, tmp_path, monkeypatch, capsys):
    """While features are extracted, and as the threshold and the report get their names."""
    workdir = tmp_path / "run"
    command = ("pushpull", "train", str(config_file), "--workdir", str(workdir), "--checkpoint.every", str(STEPS))
    monkeypatch.setattr(sys, "argv", list(command))

    def told(module, name: str, is_time) -> None:
        """The command, told to stop as it calls a function with some arguments."""
        original = getattr(module, name)

        def call(*arguments, **options):
            if is_time(*arguments):
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ending:
            patch.setattr(module, name, call)
            cli.main()
        assert ending.value.code == 75
        said = capsys.readouterr().err
        assert said.splitlines()[-1] == "pushpull train: told to stop; the same command goes on from there"
        assert "Traceback" not in said and not list(tmp_path.rglob("*.part"))

    told(extraction, "padded", lambda *_: True)
    assert not workdir.exists()
    told(os, "replace", lambda _, to: Path(to).name == "threshold.json")
    assert logged(workdir) == STEPS // LOG_EVERY and not (workdir / "threshold.json").exists()
    told(os, "replace", lambda _, to: Path(to).name == "report.html")
    assert (workdir / "threshold.json").exists() and not (workdir / "report.html").exists()
    cli.main()
    assert_nothing_lost(workdir, uninterrupted)


def test_a_finished_run_whose_last_checkpoint_is_damaged(config_file, uninterrupted, tmp_path, capsys):
    """An older state is nowhere taken for the last: thresholds and metrics are not of it."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    (workdir / "checkpoints" / f"{STEPS}" / "default" / "_METADATA").unlink()
    with pytest.raises(InputError, match=f"checkpoints/{STEPS}: cannot be restored"):
        load(workdir)
    train(load_config(str(config_file)), workdir)
    assert f"; that of step {STEPS // 2} is used instead" in capsys.readouterr().err
    assert_nothing_lost(workdir, uninterrupted)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, which some ten checkpoints fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk(config_file, uninterrupted, small_disk):
    """Whatever is written when nothing is left, one line says so; with more space the run goes on."""
    workdir = small_disk / "run"
    code, stderr = ended(start(config_file, workdir, "--checkpoint.keep", str(STEPS)))
    assert code == 1 and "Traceback" not in stderr and stderr.splitlines()[-1].endswith("No space left on device")
    step = int(last_state(workdir).step)
    assert 0 < step < STEPS and not list(workdir.glob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    code, stderr = ended(start(config_file, workdir, "--checkpoint.every", str(STEPS)))
    assert code == 0, stderr
    assert_nothing_lost(workdir, uninterrupted)


# How a kill is aimed; where it lands is seen afterwards.
STARTING, COMPILING, WRITING = "while it starts", "while it compiles", "in a checkpoint's write"
TRAINING, AFTER = "between two checkpoints", "after the last step"


def saved(workdir: Path) -> int:
    """Step of the newest checkpoint, by its name."""
    return max((int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()), default=0)


def kill_once(config_file: Path, workdir: Path, aim: str, rng: random.Random) -> str | None:
    """Start the run, kill it, and tell where that landed; None if it had ended before."""
    debris, resumed = being_written(workdir), saved(workdir) // LOG_EVERY
    said, most = workdir.with_name("stderr.txt"), STEPS // LOG_EVERY

    def is_writing() -> bool:
        return bool(being_written(workdir) - debris)

    def is_training() -> bool:
        return b"training:" in said.read_bytes()

    # With nothing compiled before it has to compile, which takes a second.
    new = {"JAX_COMPILATION_CACHE_DIR": str(workdir.with_name(f"compiled_{rng.random()}"))} if aim == COMPILING else {}
    with said.open("w") as log:
        process = start(config_file, workdir, log=log, environment=new)
    skipped = rng.randrange(1, 4)
    ready, delay = {
        STARTING: (lambda: True, 6.0),
        COMPILING: (is_training, 0.5),
        WRITING: (lambda: saved(workdir) // LOG_EVERY >= resumed + skipped and is_writing(), 0.01),
        TRAINING: (lambda: is_training() and logged(workdir) > resumed, 0.2),
        AFTER: (lambda: logged(workdir) == most, 8.0 if resumed == most else 2.0),
    }[aim]
    wait_until(process, ready)
    time.sleep(rng.uniform(0.0, delay))
    if process.poll() is not None:
        assert process.returncode == 0, said.read_text()
        return None
    process.kill()
    process.wait()
    if logged(workdir) == most:
        return AFTER
    if is_writing():
        return WRITING
    if is_training():
        return TRAINING if logged(workdir) > resumed else COMPILING
    return STARTING


@pytest.mark.slow
def test_twenty_kills(config_file, uninterrupted, tmp_path, capsys):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    workdir = tmp_path / "run"
    aims = [STARTING] * 2 + [COMPILING] * 3 + [WRITING] * 8 + [TRAINING] * 3
    rng.shuffle(aims)
    landed = collections.Counter()
    for number, aim in enumerate([*aims, *[AFTER] * 4], start=1):
        while (where := kill_once(config_file, workdir, aim, rng)) is None:
            assert aim == AFTER, (seed, aim)  # it may end before; the next time it only evaluates again
        landed[where] += 1
        with capsys.disabled():
            print(f"seed {seed}: kill {number} {where}, at step {saved(workdir)}", flush=True)
    assert landed[WRITING] >= 5 and landed[COMPILING] and landed[AFTER] and sum(landed.values()) == 20, (seed, landed)
    code, stderr = ended(start(config_file, workdir))
    assert code == 0, (seed, stderr)
    assert_nothing_lost(workdir, uninterrupted)
