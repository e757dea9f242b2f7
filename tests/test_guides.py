"""The guides: every block of code in them is run, on drawn parts and with a training of two steps."""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import pushpull_jax
from pushpull_jax import ablation, cli, training
from pushpull_jax.config import Checkpoint, Config, Log, Reconstructor
from pushpull_jax.data.demo import write_demo

GUIDES = sorted((Path(__file__).parents[1] / "docs/guides").glob("*.md"))
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A file that a guide calls by this name holds the block before the command.
WRITTEN = re.compile(r"`(\w+\.py)`:\n\n```python")


def tiny(config: Config) -> Config:
    """A run of two steps on small images; a backbone of the guide's own stays."""
    features = replace(config.features, grid=8)
    if features.backbone == "efficientnet_lite0":
        features = replace(features, backbone="pixels", stages=(2, 3), stage_weights=())
    return replace(
        config,
        data=replace(config.data, image_size=64),
        features=features,
        reconstructor=Reconstructor(width=16, heads=2, hidden=16, encoder_layers=0, decoder_layers=1),
        training=replace(config.training, steps=2, warmup_steps=0, batch_size=4),
        scoring=replace(config.scoring, map_weights=(), held_out=0.25, folds=min(config.scoring.folds, 2)),
        log=Log(every=2),
        checkpoint=Checkpoint(every=2),
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("guides") / "photographs"
    write_demo(root, train=12, good=3, per_defect=1, size=64, category="screws")
    return root


def listed(path: Path):
    """The first guide that a newcomer opens is run always, the others in the slow suite."""
    return pytest.param(path, id=path.stem, marks=[] if path.stem == "own_folder" else pytest.mark.slow)


@pytest.mark.parametrize("guide", [listed(guide) for guide in GUIDES])
def test_every_block_runs(guide, photographs, tmp_path, monkeypatch, capsys):
    (tmp_path / "photographs").symlink_to(photographs)
    monkeypatch.chdir(tmp_path)
    train, ablate = training.train, ablation.ablate
    monkeypatch.setattr(training, "train", lambda config, *a, **k: train(tiny(config), *a, **k))
    monkeypatch.setattr(
        ablation, "ablate", lambda grid, *a, **k: ablate(replace(grid, config=tiny(grid.config)), *a, **k)
    )
    assert pushpull_jax.train is training.train  # names are looked up when they are used
    text, names = guide.read_text(), {}
    blocks = BLOCK.findall(text)
    assert blocks
    for name, (_, code) in zip(
        WRITTEN.findall(text), [b for b in blocks if "ablation = Ablation(" in b[1]], strict=True
    ):
        Path(name).write_text(code)
    for language, code in blocks:
        if language == "python":
            exec(compile(code, guide.name, "exec"), names)
        else:
            for words in commands(code):
                run(words, monkeypatch)
    assert "Traceback" not in capsys.readouterr().err


def commands(code: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def run(words: list[str], monkeypatch) -> None:
    assert words[0] == "pushpull", words
    monkeypatch.setattr(sys, "argv", words)
    try:
        cli.main()
    except SystemExit as end:
        assert end.code in (0, None), words
