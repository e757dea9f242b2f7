"""The training program: features once, then one compiled scan of steps after another, then threshold and evaluation.

A run trains on the normal training images of one category but for those held out, which fit the threshold, or on all of
them where the threshold is cross-fitted. The same command continues a run that was stopped, to the same numbers.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pushpull_jax import losses
from pushpull_jax import workdir as files
from pushpull_jax.calibration import conformal_threshold
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Config, check
from pushpull_jax.data.manifest import Record, fingerprint, hold_out
from pushpull_jax.data.mvtec_ad import read_mvtec_ad
from pushpull_jax.data.pipeline import check_readable, image_batches
from pushpull_jax.detector import BATCH_SIZE, Network, build_network
from pushpull_jax.errors import InputError
from pushpull_jax.evaluation import evaluate
from pushpull_jax.features import Standardisation, extract_all, fit_standardisation, raw
from pushpull_jax.fit import build_program, cross_fit, fit, score_features, with_levels
from pushpull_jax.steps import Batch, LossFunction
from pushpull_jax.weights import load_backbone, save_parameters


class TrainingData(NamedTuple):
    """What a run trains on: standardised features, and everything frozen that belongs to them."""

    fit: np.ndarray  # [N,h,w,C], trained on
    held: np.ndarray  # [n,h,w,C], kept for the threshold
    threshold_keys: tuple[str, ...]  # whose scores fit the threshold: the held-out images, all where cross-fitted
    frozen: dict[str, Any]  # "backbone" and "standardisation", saved once a run
    summary: dict[str, Any]  # for config.json


def squared(batch: Batch, reconstruction: jax.Array) -> jax.Array:
    """Eq. 1, divided by C so that clipping and learning rate do not depend on the backbone."""
    channels = reconstruction.shape[-1]
    return losses.reconstruction_loss(batch["features"], reconstruction) / channels


def pseudo_huber(batch: Batch, reconstruction: jax.Array) -> jax.Array:
    """Eq. 7 of a normal image: the mean of the pseudo-Huber map."""
    return jnp.mean(losses.pseudo_huber_map(batch["features"], reconstruction), axis=(-2, -1))


LOSSES: dict[str, LossFunction] = {"squared": squared, "pseudo_huber": pseudo_huber}


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
        loss_fn: replaces the config's loss: (batch, reconstruction [B,h,w,C]) -> [B], see `steps.make_step`.
        reconstructor: replaces the config's reconstructor by any linen module [B,h,w,C] -> [B,h,w,C] that takes
            `train`; `load` and `evaluate` must be given it too.
        command: what was typed, for config.json.

    Returns:
        The contents of metrics.json; empty where the data have no test images.

    Raises:
        InputError: the config, the data or the folder cannot be used: nothing is written then. Or the loss is not
            finite: the last good checkpoint is kept.
    """
    folder = Path(workdir)
    check(config, source="config")
    network = build_network(config, reconstructor=reconstructor)
    config = replace(config, data=replace(config.data, root=str(Path(config.data.root).resolve())))
    loss_fn = loss_fn or LOSSES[config.training.loss]
    # What was passed from Python stands beside the config: a resumed run must have been given the same.
    given = {"loss": f"{loss_fn.__module__}.{loss_fn.__qualname__}", "reconstructor": repr(network.reconstructor)}
    resumed = files.check_startable(folder, config)
    if resumed:
        _check_same(folder, config, given)
        # The intervals, the place of the data and, with a constant schedule, the steps may be new.
        files.write_config(folder, config, **files.read_config(folder)[1])
        if _is_finished(folder, config):
            _say(f"{folder} is finished")
            return _evaluated(folder, reconstructor)
        for name in (files.THRESHOLD, files.METRICS, files.PREDICTIONS, files.REPORT):
            (folder / name).unlink(missing_ok=True)  # of the shorter run that goes on
    data = prepare(config, network)
    if not resumed:
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"source": network.features.backbone.source, "licence": network.features.backbone.licence}
        save_parameters(folder / files.BACKBONE, data.frozen, metadata=metadata)
        files.write_config(folder, config, data=data.summary, versions=files.versions(), command=list(command), **given)
    elif data.summary != files.read_config(folder)[1]["data"]:
        raise InputError(f"workdir {folder} holds a run on other data: other files can be read now")
    program = build_program(config, network, loss_fn)
    state = fit(config, program, data.fit, folder)
    parameters = with_levels(program, data.frozen | {"reconstructor": state.parameters}, data.fit)
    if config.scoring.folds:
        scores = cross_fit(config, program, data.frozen, data.fit)
    else:
        scores = score_features(program, parameters, data.held)
    threshold = conformal_threshold(scores, false_positive_rate=config.scoring.false_positive_rate)
    note = threshold.note
    if config.scoring.folds:
        note += f" (each scored by a detector trained without its fold, {config.scoring.folds} in all)"
    _say(note)
    values = {
        "threshold": threshold.value,
        "false_positive_rate": threshold.false_positive_rate,
        "note": note,
        "levels": parameters["levels"].tolist(),
        "held_out_scores": dict(zip(data.threshold_keys, scores.tolist(), strict=True)),
    }
    files.write_json(folder / files.THRESHOLD, values)
    return _evaluated(folder, reconstructor)


def _evaluated(folder: Path, reconstructor: nn.Module | None) -> dict[str, Any]:
    """The evaluation of a finished run; empty where the data have no test images."""
    config, _ = files.read_config(folder)
    if not _read_records(config)[1]:
        _say(f"{config.data.category} has no test images: the detector is ready, and cannot be evaluated")
        return {}
    return evaluate(folder, reconstructor=reconstructor)


def prepare(config: Config, network: Network) -> TrainingData:
    """Read the data, check every file of it, extract features and fit their standardisation.

    Raises:
        InputError: see `read_mvtec_ad` and `image_batches`; or fewer than two normal images are left.
    """
    policy, dropped = config.data.on_unreadable, {}
    normal, test = _read_records(config)
    with tqdm(desc="checking test images", total=len(test), unit="image", file=sys.stderr) as bar:
        test = check_readable(test, on_unreadable=policy, dropped=dropped, progress=lambda *_: bar.update())
    _, parameters = load_backbone(config.features.backbone)
    normal, features = _extract(config, network, parameters, normal, dropped)
    for key, reason in dropped.items():
        _say(f"left out {key}: {reason}")
    if len(normal) < 2:
        raise InputError(
            f"{config.data.root}: {len(normal)} normal training images; at least 2 are needed, one held out"
        )
    fit, held = normal, ()
    if not config.scoring.folds:
        fit, held = hold_out(normal, fraction=config.scoring.held_out, seed=config.seed)
    elif config.scoring.folds > len(normal):
        raise InputError(f"scoring.folds: {config.scoring.folds} folds of {len(normal)} normal training images")
    position = {record.key: i for i, record in enumerate(normal)}
    fit_features, held_features = (features[[position[r.key] for r in part]] for part in (fit, held))
    standardisation = _standardisation(config, network, fit_features)
    return TrainingData(
        fit=np.asarray(standardisation(fit_features)),
        held=np.asarray(standardisation(held_features)),
        threshold_keys=tuple(record.key for record in held or fit),
        frozen={"backbone": parameters, "standardisation": standardisation._asdict()},
        summary={
            "fingerprint": fingerprint([*normal, *test]),
            "train": len(fit),
            "held_out": [record.key for record in held],
            "test": len(test),
            "left_out": dropped,
        },
    )


def _read_records(config: Config) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """The normal training records, and all test records."""
    records = read_mvtec_ad(config.data.root, config.data.category)
    normal = tuple(record for record in records if record.split == "train" and record.label == 0)
    return normal, tuple(record for record in records if record.split == "test")


def _extract(
    config: Config, network: Network, parameters: dict, records: tuple[Record, ...], dropped: dict[str, str]
) -> tuple[tuple[Record, ...], np.ndarray]:
    """The records that could be read, and their features [N,h,w,C], not standardised."""
    batches = image_batches(
        records,
        image_size=config.data.image_size,
        batch_size=BATCH_SIZE,
        resize=config.data.resize,
        on_unreadable=config.data.on_unreadable,
        dropped=dropped,
    )
    bar = tqdm(batches, desc="features", total=-(-len(records) // BATCH_SIZE), unit="batch", file=sys.stderr)
    features = extract_all(network.features, parameters, bar, batch_size=BATCH_SIZE)
    return tuple(record for record in records if record.key not in dropped), features


def _standardisation(config: Config, network: Network, features: np.ndarray) -> Standardisation:
    widths = network.features.widths
    if not config.features.standardise:
        return raw(sum(widths))
    fitted, constant = fit_standardisation(features, widths, stage_weights=config.features.stage_weights)
    if constant:
        _say(f"channels {constant} of the features are constant over the training images; they are only shifted")
    return fitted


def _is_finished(folder: Path, config: Config) -> bool:
    with Checkpoints(folder / files.CHECKPOINTS, create=False) as checkpoints:
        return (folder / files.THRESHOLD).is_file() and checkpoints.latest == config.training.steps


def _check_same(folder: Path, config: Config, given: dict[str, str]) -> None:
    """Raise unless a run was started with the same data, loss and reconstructor."""
    run = files.read_config(folder)[1]
    for name, value in given.items():
        if run[name] != value:
            raise InputError(f"workdir {folder} holds a run with another {name}: {run[name]} there, {value} here")
    there = run["data"]
    normal, test = _read_records(config)
    here = fingerprint([record for record in (*normal, *test) if record.key not in there["left_out"]])
    if there["fingerprint"] != here:
        raise InputError(f"workdir {folder} holds a run on other data: its files differ from those at data.root now")


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
