"""The training program: features once, then one compiled scan of steps after another, then threshold and evaluation.

A run trains on the normal training images of one category, or of all, but for those held out, which fit the threshold,
or on all of them where the threshold is cross-fitted; and on whatever anomalies its supervision gives it. The same
command continues a run that was stopped, to the same numbers.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from pushpull_jax import hosts
from pushpull_jax import workdir as files
from pushpull_jax.bucket import is_address, is_bucket
from pushpull_jax.calibration import conformal_threshold
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Config, check, flatten
from pushpull_jax.data.manifest import fingerprint
from pushpull_jax.detector import Network, build_network, initial_state, load_frozen, read_network
from pushpull_jax.errors import InputError
from pushpull_jax.evaluation import evaluate
from pushpull_jax.examples import RunRecords, TrainingData, prepare, read_run
from pushpull_jax.extraction import Extractor
from pushpull_jax.feature_bank import FeatureBank
from pushpull_jax.feature_stores import OnDisk, Resident, Streamed, choose_store
from pushpull_jax.features import Standardisation
from pushpull_jax.fit import (
    Examples,
    Program,
    ResidentExamples,
    build_program,
    cross_fit,
    fit,
    residual_sums,
    score_held_out,
    with_residuals,
)
from pushpull_jax.mesh import computed_on, device_mesh, replicate
from pushpull_jax.objectives import configured_loss
from pushpull_jax.progress import say
from pushpull_jax.resources import devices_line
from pushpull_jax.start import check_start, read_start
from pushpull_jax.steps import LossFunction
from pushpull_jax.streaming import StreamedExamples
from pushpull_jax.weights import backbone_metadata, load_backbone, save_parameters


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    loss_fn: LossFunction | None = None,
    reconstructor: nn.Module | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a detector, or go on with a run that was stopped, and evaluate it.

    Args:
        config: the run.
        workdir: its folder, new or empty, or that of the same run.
        loss_fn: replaces the config's loss: (batch, reconstruction [B,h,w,C]) -> [B], see `steps.make_step`. A batch
            has "features" [B,h,w,C], "mask" [B,h,w], "label" [B] and "kind" [B], see `losses.push_pull_loss`.
        reconstructor: replaces the config's reconstructor by any linen module [B,h,w,C] -> [B,h,w,C] that takes
            `train`; `load` and `evaluate` must be given it too.
        command: what was typed, for config.json.

    Returns:
        The contents of metrics.json; empty where the data have no test images, and in all processes but the first.

    Raises:
        InputError: the config, the data or the folder cannot be used: nothing is written then. Or the loss is not
            finite: the last good checkpoint is kept.
    """
    check(config, source="config")
    with hosts.connected(config.hosts):
        with hosts.agreed():  # whether a bucket can be reached, too
            folder = _run_folder(config, workdir)
            records = _trained(_with_absolute_paths(config), folder, loss_fn, reconstructor, command)
        return _evaluated(folder, records, reconstructor) if hosts.is_first() else {}


def _run_folder(config: Config, workdir: str | os.PathLike) -> Path:
    folder = files.run_folder(workdir)
    if is_bucket(folder) and (config.log.tensorboard or config.log.profile):
        raise InputError(f"workdir {folder}: log.tensorboard and log.profile write to a folder only, not to a bucket")
    return folder


def _trained(
    config: Config,
    folder: Path,
    loss_fn: LossFunction | None,
    reconstructor: nn.Module | None,
    command: Sequence[str],
) -> RunRecords:
    """Train a detector, or go on with a run that was stopped, up to its thresholds; the records of the run."""
    hosts.check_same("a config", _of_all_hosts(config))
    hosts.check_shared(folder)
    described = build_network(config, reconstructor=reconstructor)  # a wrong field is said before anything is read
    name = config.training.loss if loss_fn is None else _name_of(loss_fn)
    # What was passed from Python stands beside the config: a resumed run must have been given the same.
    given = {"loss": name, "reconstructor": repr(described.reconstructor)}
    with hosts.agreed():  # before any of them writes
        resumed = files.check_startable(folder, config)
    records = read_run(config)  # wrong data are said before weights are downloaded
    if resumed:
        _check_same(folder, records, given)
        if _is_finished(folder, config, described):
            _write_anew(folder, config)
            say(f"{folder} is finished")
            return records
    say(devices_line(device_mesh(data=config.mesh.data)))
    start = read_start(config, reconstructor) if config.training.start else None
    if resumed:
        _, network = read_network(folder, reconstructor=reconstructor)
        frozen = load_frozen(folder, network)
    elif start:
        network, frozen = build_network(config, backbone=start.backbone, reconstructor=reconstructor), start.frozen
    else:
        backbone, parameters = load_backbone(config.features.backbone, weights=config.features.weights or None)
        network = build_network(config, backbone=backbone, reconstructor=reconstructor)
        frozen = {"backbone": parameters}
    bank = FeatureBank(
        network.features, frozen["backbone"], config.data, store=functools.partial(_store, config, records)
    )
    known = Standardisation(**frozen["standardisation"]) if "standardisation" in frozen else None
    data = prepare(config, bank, records, standardisation=known)
    hosts.check_same("data", data.summary)
    frozen |= {"standardisation": data.standardisation._asdict()}
    if start:
        data.summary["start"] = check_start(start, data)
    if resumed:
        there = files.read_config(folder)[1]["data"]
        if {name: data.summary.get(name) for name in there} != there:
            raise InputError(
                f"workdir {folder} holds a run on other data: other files can be read now, or it started from "
                "another run"
            )
        _say_if_bits_differ(folder, config)
        _write_anew(folder, config)
        if hosts.is_first():
            for name in (files.THRESHOLD, files.METRICS, files.PREDICTIONS, files.REPORT):
                (folder / name).unlink(missing_ok=True)  # of the shorter run that goes on
    elif hosts.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        told = backbone_metadata(network.features.backbone)
        save_parameters(folder / files.BACKBONE, frozen, metadata=told)
        rest = {"data": data.summary, "backbone": told, "versions": files.versions(), "command": list(command)}
        files.write_config(folder, config, **rest, **given, computed_on=_computed_on(config))
    first = start.parameters if start else None
    normal, held = data.features(bank, data.normal), data.features(bank, data.held)
    program = build_program(config, network, loss_fn or configured_loss(config, network, first, normal))
    examples = _examples(config, program, data, bank)
    state = fit(config, program, examples, data.pools, folder, normal=normal, start=first)
    trained = frozen | {"reconstructor": state.parameters}
    sums = residual_sums(program, trained, data.features(bank, np.concatenate([data.normal, data.held])))
    if sums and hosts.is_first():
        save_parameters(folder / files.RESIDUALS, with_residuals(trained, sums)["residuals"], metadata={})
    if config.scoring.folds:
        unseen = cross_fit(config, program, frozen, examples, data.pools, normal=normal)
    else:
        unseen = score_held_out(program, trained, sums, held)
    if hosts.is_first():
        _write_threshold(folder, config, data, *unseen)
    return records


def _of_all_hosts(config: Config) -> dict[str, Any]:
    """The fields that all processes must have been given alike."""
    return {name: value for name, value in files.as_json(flatten(config)).items() if not name.startswith("hosts.")}


def _write_anew(folder: Path, config: Config) -> None:
    """Write the config of a run that goes on.

    The intervals, the place of the data and, with a constant schedule, the steps may be new.
    """
    if hosts.is_first():
        files.write_config(folder, config, **files.read_config(folder)[1])


def _computed_on(config: Config) -> dict[str, Any]:
    """Where and in what a run is computed."""
    return computed_on() | asdict(config.compute)


def _store(config: Config, records: RunRecords, extractor: Extractor) -> Resident | OnDisk | Streamed:
    """Where the features of a run are while it trains; it is said, and why."""
    images = len(records.labelled) + len(records.irrelevant)
    images += len(records.normal) * (1 + config.supervision.confetti_copies)
    store, why = choose_store(config, images, extractor)
    say(why)
    return store


def _examples(config: Config, program: Program, data: TrainingData, bank: FeatureBank) -> Examples:
    if isinstance(bank.store, Resident):
        return ResidentExamples(config, program, replicate(data.batch(bank), program.mesh))
    return StreamedExamples(config, program, bank.store, data.standardisation, data.examples)


def _say_if_bits_differ(folder: Path, config: Config) -> None:
    """A run that goes on elsewhere comes to the same numbers up to rounding, not to the last bit."""
    there = files.read_config(folder)[1]
    pairs = [
        (f"{name} {before or 'none'}", f"{now or 'none'}")
        for part, here in (("computed_on", _computed_on(config)), ("versions", files.versions()))
        for name, now in here.items()
        if (before := there.get(part, {}).get(name)) != now
    ]
    if pairs:
        changes = ", ".join(f"{before} there, {now} here" for before, now in pairs)
        say(f"{folder} was begun elsewhere, so its bits will differ: {changes}")


def _write_threshold(folder: Path, config: Config, data: TrainingData, scores: np.ndarray, peaks: np.ndarray) -> None:
    rate = config.scoring.false_positive_rate
    threshold = conformal_threshold(scores, false_positive_rate=rate)
    note = threshold.note(folds=config.scoring.folds)
    say(note)
    values = {
        "threshold": threshold.value,
        "false_positive_rate": threshold.false_positive_rate,
        "note": note,
        "map_threshold": conformal_threshold(peaks, false_positive_rate=rate).value,
        "held_out_scores": dict(zip(data.threshold_keys, scores.tolist(), strict=True)),
        "held_out_peaks": dict(zip(data.threshold_keys, peaks.tolist(), strict=True)),
    }
    files.write_json(folder / files.THRESHOLD, values)


def _evaluated(folder: Path, records: RunRecords, reconstructor: nn.Module | None) -> dict[str, Any]:
    """The evaluation of a finished run; empty where the data have no test images."""
    if not records.test:
        say("there are no test images: the detector is ready, and cannot be evaluated")
        return {}
    return evaluate(folder, reconstructor=reconstructor)


def _name_of(loss_fn: LossFunction) -> str:
    """What config.json calls a loss of one's own, a partial with what it fixes."""
    inner, fixed = getattr(loss_fn, "func", loss_fn), getattr(loss_fn, "keywords", None)
    return f"{inner.__module__}.{inner.__qualname__}" + (f" with {fixed}" if fixed else "")


def _with_absolute_paths(config: Config) -> Config:
    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if path and not is_address(path) else path

    return replace(
        config,
        data=replace(config.data, root=absolute(config.data.root)),
        features=replace(config.features, cache=absolute(config.features.cache)),
        training=replace(config.training, start=absolute(config.training.start)),
        supervision=config.supervision
        if config.supervision.irrelevant == "cifar100"
        else replace(config.supervision, irrelevant=absolute(config.supervision.irrelevant)),
    )


def _is_finished(folder: Path, config: Config, network: Network) -> bool:
    """Whether the thresholds are there, and the state of the last step, whole."""
    with Checkpoints(folder / files.CHECKPOINTS, create=False) as checkpoints:
        if not (folder / files.THRESHOLD).is_file() or checkpoints.latest != config.training.steps:
            return False
        try:
            checkpoints.restore(jax.eval_shape(lambda: initial_state(config, network)), step=checkpoints.latest)
        except InputError:  # it is damaged: the run goes on from the one before, and says so
            return False
        return True


def _check_same(folder: Path, records: RunRecords, given: dict[str, str]) -> None:
    """Raise unless a run was started with the same data, loss and reconstructor."""
    run = files.read_config(folder)[1]
    for name, value in given.items():
        if run[name] != value:
            raise InputError(f"workdir {folder} holds a run with another {name}: {run[name]} there, {value} here")
    there = run["data"]
    here = fingerprint([record for record in records.all if record.key not in there["left_out"]])
    if there["fingerprint"] != here:
        raise InputError(f"workdir {folder} holds a run on other data: its files differ from those at data.root now")
