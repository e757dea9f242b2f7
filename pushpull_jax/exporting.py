"""The export program: one folder that runs elsewhere, whole or not at all.

detector.jaxexport    images to scores and maps, weights inside (`artefact`); needs jax alone
weights.safetensors   the same weights for other tools, names joined by "/", thresholds among them
config.json           config, thresholds, what it was trained on and computed with
metrics.json          the evaluation, where there is one
README.md             the model card
example.py            loads and runs the artefact
saved_model/          the artefact for TensorFlow, on request
detector.onnx         written into the folder by scripts/export_onnx.py

Nothing in it names a folder of the machine that trained.
"""

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from pushpull_jax import export_example
from pushpull_jax import workdir as files
from pushpull_jax.artefact import PLATFORMS, export_detector, read_artefact
from pushpull_jax.config import Config
from pushpull_jax.detector import Detector, load
from pushpull_jax.errors import InputError
from pushpull_jax.export_card import model_card
from pushpull_jax.export_formats import read_onnx, read_saved_model, write_saved_model
from pushpull_jax.export_verification import TOLERANCE, Agreement, Program, compare, find_samples
from pushpull_jax.weights import load_parameters, save_parameters

ARTEFACT, WEIGHTS, CARD, EXAMPLE = "detector.jaxexport", "weights.safetensors", "README.md", "example.py"
SAVED_MODEL, ONNX = "saved_model", "detector.onnx"


def export(
    workdir: str | os.PathLike,
    output: str | os.PathLike,
    *,
    verify: str | os.PathLike | None = None,
    tolerance: float = TOLERANCE,
    saved_model: bool = False,
    reconstructor: nn.Module | None = None,
    say: Callable[[str], None] = print,
) -> list[Agreement]:
    """Export a finished run to a new folder, or verify one that was exported before.

    Args:
        workdir: folder of the run.
        output: folder that is made. It must not exist, unless `verify` is given: an export that is there is then
            verified as it is, on this machine, and left as it is.
        verify: folder of images, which every artefact must score as the training code does.
        tolerance: of `Agreement.score` and `Agreement.map`.
        saved_model: whether to write a TensorFlow SavedModel too.
        reconstructor: as given to `train`.
        say: takes a line for each artefact that was verified.

    Returns:
        How far each artefact is from the training code; empty without `verify`.

    Raises:
        InputError: the run or the images cannot be used, the output exists, or an artefact differs by more than the
            tolerance: no folder is made then.
    """
    source, target = files.run_folder(workdir), files.local_folder(output, name="--output")
    is_there = target.exists()
    if is_there and not (verify and (target / ARTEFACT).is_file()):
        raise InputError(f"--output {target} exists: choose a new folder (--verify checks an export that is there)")
    samples = find_samples(verify) if verify else []
    detector = load(source, reconstructor=reconstructor)
    if is_there:
        return _verified(target, detector, samples, tolerance, say)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        told = _write_parts(part, source, detector)
        if saved_model:
            write_saved_model(part / SAVED_MODEL, (part / ARTEFACT).read_bytes())
        agreements = _verified(part, detector, samples, tolerance, say)
        metrics = files.read_json(part / files.METRICS) if (part / files.METRICS).is_file() else {}
        files.write_text(part / CARD, model_card(told, metrics, agreements, saved_model=saved_model))
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return agreements


def _write_parts(folder: Path, source: Path, detector: Detector) -> dict[str, Any]:
    """Write everything but the card; the contents of config.json."""
    config, run = files.read_config(source)
    threshold = files.read_json(source / files.THRESHOLD)
    (folder / ARTEFACT).write_bytes(export_detector(detector))
    save_parameters(folder / WEIGHTS, detector.parameters, metadata=run["backbone"])
    shutil.copyfile(export_example.__file__, folder / EXAMPLE)
    if (source / files.METRICS).is_file():
        files.write_json(folder / files.METRICS, _without_reasons(files.read_json(source / files.METRICS)))
    names = ("threshold", "map_threshold", "false_positive_rate", "note")
    rest = {name: run[name] for name in ("backbone", "loss", "reconstructor", "versions", "computed_on")}
    rest |= {
        "data": _without_reasons(run["data"]),
        "thresholds": {name: threshold[name] for name in names} | {"tile": threshold.get("tile")},
        "exported": {"platforms": PLATFORMS, "versions": files.versions()},
    }
    files.write_config(folder, _without_folders(config), **rest)
    return files.read_json(folder / files.CONFIG)


def _without_reasons(values: dict[str, Any]) -> dict[str, Any]:
    """Which files were left out, but not why: a reason names the file by its whole path."""
    return values | {"left_out": sorted(values["left_out"])}


def _without_folders(config: Config) -> Config:
    """The config with no more than the names of the files and folders that it was given."""

    def names(part: Any, *fields: str) -> Any:
        return replace(part, **{field: Path(getattr(part, field)).name for field in fields})

    return replace(
        config,
        data=names(config.data, "root"),
        features=names(config.features, "weights"),
        training=names(config.training, "start"),
        supervision=names(config.supervision, "irrelevant"),
    )


def _verified(
    folder: Path, detector: Detector, samples: list[Path], tolerance: float, say: Callable[[str], None]
) -> list[Agreement]:
    """How far every artefact of a folder is from the training code; InputError where it is too far."""
    if not samples:
        return []
    agreements = compare(detector, _programs(folder, detector, say), samples)
    for agreement in agreements:
        say(f"{agreement} (tolerance {tolerance:.1e})")
    failed = [agreement.name for agreement in agreements if not agreement.within(tolerance)]
    if failed:
        raise InputError(f"{', '.join(failed)}: more than the tolerance of {tolerance:.1e} from the training code")
    return agreements


def _programs(folder: Path, detector: Detector, say: Callable[[str], None]) -> dict[str, Program]:
    """What the artefacts of a folder compute, by their names."""
    artefact = read_artefact((folder / ARTEFACT).read_bytes())
    weights = load_parameters(folder / WEIGHTS, like=detector.parameters)
    programs = {
        ARTEFACT: lambda images: jax.device_get(artefact(images)),
        WEIGHTS: Detector(detector.network, jax.device_put(weights)),
    }
    others = (SAVED_MODEL, "tensorflow", read_saved_model), (ONNX, "onnxruntime", read_onnx)
    for name, package, read in others:
        if (folder / name).exists() and find_spec(package):
            programs[name] = read(folder / name)
        elif (folder / name).exists():
            say(f"{name}: not verified, {package} is not installed")
    return programs
