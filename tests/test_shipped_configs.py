"""Every shipped config trains and is evaluated for two steps on drawn images, its data, size and widths made small.

In the place of all backbones but the image itself is a network of five stage ends at the same strides, since compiling
the real ones takes ten times as long; the slow suite has them, with random weights. All else is the config's own, so
that what is asserted is that its fields fit together and reach the end of the program.
"""

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from pushpull_jax import cli
from pushpull_jax.backbones import BACKBONES, find_backbone
from pushpull_jax.config import load_config, shipped_configs
from pushpull_jax.data.demo import write_demo
from pushpull_jax.weights import backbone_metadata, save_parameters

SIZE = 64
SMALL = """
    --features.grid 8 --reconstructor.width 16 --reconstructor.heads 2 --reconstructor.hidden 16
    --reconstructor.encoder_layers 0 --reconstructor.decoder_layers 0 --reconstructor.cells 50 --log.every 1
    --checkpoint.every 2
""".split()
# Layers cost time to compile; there is one where they are what a config is about.
WITH_A_LAYER = ("ablation_no_attention", "ablation_no_query")
# The run that a config starts from, as its own header has it.
STARTS = {"adtr_plus_pixels": "adtr", "quick_confetti": "quick", "quick_images": "quick", "quick_masks": "quick"}
WITHOUT_SHOTS = ["--supervision.shots", "2", "--supervision.labels", "unused"]


class StageEnds(nn.Module):
    """Five stage ends at strides 2 to 32: a dense layer on means over blocks of pixels."""

    stage_widths: ClassVar[tuple[int, ...]] = (4, 6, 8, 10, 12)

    @nn.compact
    def __call__(self, images, stages=(1, 2, 3, 4, 5)):
        ends = []
        for stage, width in enumerate(self.stage_widths, start=1):
            block = (2**stage, 2**stage)
            ends.append(nn.Dense(width, name=f"stage_{stage}")(nn.avg_pool(images, block, strides=block)))
        return tuple(ends[stage - 1] for stage in stages)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    write_demo(folder, train=6, good=2, per_defect=1, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """Two classes of grey noise at 32 px, and a folder of irrelevant images beside."""
    folder = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for place in ("train/airplane", "train/ship", "test/airplane", "test/ship", "irrelevant"):
        (folder / place).mkdir(parents=True)
        level = 190 if "ship" in place else 60
        for i in range(6):
            image = np.clip(rng.normal(level, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / place / f"{i}.png")
    return folder


def random_weights(name: str, folder: Path) -> list[str]:
    """Arguments that give a backbone random weights, of the size that keeps activations near 1; none if it has none."""
    backbone, path = find_backbone(name), folder / f"{name}.safetensors"
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) * np.float32(np.prod(leaf.shape[:-1]) ** -0.5),
        backbone.abstract_parameters(),
    )
    if not parameters:
        return []
    folder.mkdir(exist_ok=True)
    save_parameters(path, parameters, metadata=backbone_metadata(backbone))
    return ["--features.weights", str(path)]


def data_arguments(config, drawn: Path, classes: Path) -> list[str]:
    """Drawn data in place of the config's own."""
    if config.data.source == "cifar10":
        more = ["--supervision.irrelevant", str(classes / "irrelevant")] if config.supervision.irrelevant else []
        return ["--data.source", "classes", "--data.root", str(classes), "--data.category", "airplane", *more]
    shots = ["--supervision.shots", "2"] if config.supervision.shots else []
    return ["--data.root", str(drawn), "--data.category", "flange", "--data.image_size", str(SIZE), *shots]


@pytest.fixture(scope="module")
def compiled_quickly():
    """Most of the time goes into compiling programs that run twice."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def trained(drawn, classes, compiled_quickly, tmp_path_factory):
    """The folder of a config's run, trained once, after the run that it starts from."""
    folders = tmp_path_factory.mktemp("runs")

    def run(name: str, *more: str, real: bool) -> Path:
        config, workdir = load_config(name), folders / "_".join((name, str(real), *more))
        if (workdir / "metrics.json").is_file():
            return workdir
        arguments = [name, "--workdir", str(workdir), *SMALL, *data_arguments(config, drawn, classes)]
        arguments += ["--training.steps", str(min(config.training.steps, 2)), "--training.batch_size", "4"]
        if name in WITH_A_LAYER:
            arguments += ["--reconstructor.decoder_layers", "1"]
        if name in STARTS:
            unused = WITHOUT_SHOTS if config.supervision.shots else ()
            arguments += ["--training.start", str(run(STARTS[name], *unused, real=real))]
        with pytest.MonkeyPatch.context() as patch:
            backbone = BACKBONES[config.features.backbone]
            if not real:
                patch.setitem(BACKBONES, backbone.name, replace(backbone, network=StageEnds()))
            cli.train([*arguments, *random_weights(backbone.name, folders / f"weights_{real}"), *more])
        return workdir

    return run


def assert_is_a_whole_run(workdir: Path, name: str) -> None:
    metrics, config = (json.loads((workdir / f"{file}.json").read_text()) for file in ("metrics", "config"))
    assert 0 <= metrics["image_auroc"] <= 1 and (workdir / "report.html").is_file()
    one_class = config["config"]["data"]["source"] == "classes"
    assert (metrics["pixel_auroc"] is None) == one_class  # there are no masks of classes
    # 6 of the anomalous class; five types of defects, of which labelled ones are out of the test set.
    shots = config["config"]["supervision"]["shots"]
    assert metrics["anomalous"] == (6 if one_class else 5 - shots)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == ([] if name == "nearest" else [1, 2])
    assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("name", shipped_configs())
def test_trains_and_is_evaluated(trained, name):
    workdir = trained(name, real=name == "ablation_pixels")
    assert_is_a_whole_run(workdir, name)
    supervision = load_config(name).supervision
    data = json.loads((workdir / "config.json").read_text())["data"]
    # 6 images of which 1 is held out: 5 a copy, and as many irrelevant ones as there are normal ones.
    assert data["confetti"] == 5 * supervision.confetti_copies
    assert data["irrelevant"] == (6 if supervision.irrelevant else 0)
    assert len(data["labelled"]) == min(supervision.shots, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_configs() if name != "ablation_pixels"])
def test_trains_with_its_own_backbone(trained, name):
    workdir = trained(name, real=True)
    assert_is_a_whole_run(workdir, name)
    metadata = json.loads((workdir / "config.json").read_text())["backbone"]
    assert metadata["backbone"] == load_config(name).features.backbone


@pytest.mark.parametrize(("name", "path"), shipped_configs().items())
def test_header_tells_command_data_and_what_was_verified(name, path):
    header = ast.get_docstring(ast.parse(path.read_text()))
    assert ("pushpull demo" if name == "demo" else f"pushpull train {name} ") in header
    assert "Data:" in header and "Verified here:" in header
    # What the paper has a figure for gives it.
    if name.startswith(("adtr", "ablation")):
        assert "Paper:" in header and "AUROC" in header
