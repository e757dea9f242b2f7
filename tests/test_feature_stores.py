"""Features in memory, on disk and nowhere: the same numbers, and a cache that never meets what it was not made from."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pushpull_jax.config import (
    Checkpoint,
    Config,
    Data,
    Features,
    Log,
    Mesh,
    Reconstructor,
    Scoring,
    Supervision,
    Training,
)
from pushpull_jax.data.demo import write_demo
from pushpull_jax.training import train

SIZE, GRID = 64, 8


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_demo(folder, train=11, good=2, per_defect=1, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def config(root) -> Config:
    """Every source of examples; batches of 6, in which three are anomalous."""
    return Config(
        data=Data(root=str(root), category="flange", image_size=SIZE),
        features=Features(stages=(2, 3), grid=GRID, standardise=True),
        reconstructor=Reconstructor(width=16, heads=2, hidden=16, encoder_layers=0, decoder_layers=1, fold=2),
        training=Training(steps=20, batch_size=6, learning_rate=1e-3, jitter=0.1, loss="push_pull"),
        supervision=Supervision(shots=2, confetti_copies=2, by_stage=True, k=5),
        scoring=Scoring(held_out=0.2, map="whitened", blocks=(1,)),
        log=Log(every=5),
        checkpoint=Checkpoint(every=10),
    )


def kept(config: Config, keep: str, **others) -> Config:
    return replace(config, features=replace(config.features, keep=keep, **others))


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def resident(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "memory"
    train(kept(config, "memory"), workdir)
    return workdir


@pytest.mark.parametrize(
    ("keep", "mesh", "prefetch"), [("stream", 1, 2), ("disk", 1, 0), ("stream", 4, 0)], ids=["stream", "disk", "four"]
)
def test_a_run_is_the_same_wherever_its_features_are(keep, mesh, prefetch, config, resident, tmp_path, capsys):
    """On four devices batches of 6 are filled up to 8."""
    elsewhere = kept(config, keep, prefetch=prefetch, cache=str(tmp_path / "cache"))
    train(replace(elsewhere, mesh=Mesh(data=mesh)), tmp_path / "run")
    said = {"stream": "they are extracted with each batch", "disk": f"they are kept in files in {tmp_path / 'cache'}"}
    # 11 normal images, as many copies twice over, and two shots.
    assert "features of 35 images, 0.0156 MB each" in (err := capsys.readouterr().err) and said[keep] in err
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(resident), rtol=1e-5)
    thresholds = [json.loads((folder / "threshold.json").read_text()) for folder in (resident, tmp_path / "run")]
    assert thresholds[1]["threshold"] == pytest.approx(thresholds[0]["threshold"], rel=1e-3)
