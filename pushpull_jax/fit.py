"""The training loop on features that are on the device: chunks of compiled steps, logged, checkpointed, resumed.

Everything here takes standardised features [N,h,w,C] of normal images.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

from pushpull_jax import workdir as files
from pushpull_jax.batching import in_batches
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Config
from pushpull_jax.detector import BATCH_SIZE, Network, build_optimizer, detect_features, group_maps, initial_state
from pushpull_jax.errors import InputError
from pushpull_jax.steps import METRICS, LossFunction, State, batch_indices, make_chunk, make_step, training_apply


class Program(NamedTuple):
    """What is compiled once a run: the scan of steps, the scores of features, and the schedule it follows."""

    network: Network
    chunk: Callable
    maps: Callable
    scores: Callable
    learning_rate: optax.Schedule


def build_program(config: Config, network: Network, loss_fn: LossFunction) -> Program:
    """The compiled parts of a training run."""
    optimizer, rate = build_optimizer(config)
    apply_fn = training_apply(network.reconstructor, jitter=config.training.jitter)
    chunk = make_chunk(make_step(loss_fn, apply_fn, optimizer))
    maps = jax.jit(lambda parameters, features: group_maps(network, parameters, features))
    scores = jax.jit(lambda parameters, features: detect_features(network, parameters, features)[0])
    return Program(network, chunk, maps, scores, rate)


def fit(config: Config, program: Program, features: np.ndarray, folder: Path) -> State:
    """Train to the last step, from the newest checkpoint of a run's folder on; writes metrics.jsonl and checkpoints.

    Raises:
        InputError: the loss is not finite; the checkpoints before it are kept.
    """
    steps, size = config.training.steps, config.log.every
    examples, everything = {"features": jax.device_put(features)}, np.arange(len(features))
    with Checkpoints(folder / files.CHECKPOINTS, keep=config.checkpoint.keep) as checkpoints:
        state = initial_state(config, program.network)
        if checkpoints.latest is not None:
            state = jax.device_put(checkpoints.restore(state))
        step, log = int(state.step), folder / files.LOG
        files.write_lines(log, (row for row in files.read_lines(log) if row["step"] <= step))
        with tqdm(desc="training", total=steps, initial=step, unit="step", file=sys.stderr) as bar:
            while step < steps:
                # To the next multiple of `size`, which a resumed run may have changed.
                began, last = time.perf_counter(), min((step // size + 1) * size, steps)
                indices = _chunk_indices(config, everything, step, last)
                state, metrics = program.chunk(state, examples, indices, jax.random.key(config.seed))
                row = {"step": last, **_means(metrics, last - step)}
                row["learning_rate"] = float(program.learning_rate(last - 1))
                row["seconds_per_step"] = (time.perf_counter() - began) / (last - step)
                _check_finite(row, step, config)
                files.append_line(log, row)
                if last % config.checkpoint.every == 0 or last == steps:
                    checkpoints.save(state)
                bar.update(last - step)
                bar.set_postfix(loss=f"{row['loss']:.4f}", rate=f"{row['learning_rate']:.1e}")
                step = last
    return state


def cross_fit(config: Config, program: Program, frozen: dict[str, Any], features: np.ndarray) -> np.ndarray:
    """Scores [N] of the training images themselves, each by a detector that was trained without its fold.

    Costs `scoring.folds` more trainings, in the program that is compiled already. The standardisation is that of all
    images.
    """
    examples = {"features": jax.device_put(features)}
    count, steps, size = config.scoring.folds, config.training.steps, config.log.every
    order = np.random.default_rng(config.seed).permutation(len(features))
    scores = np.empty(len(features), np.float32)
    with tqdm(desc="cross-fitting", total=count * steps, unit="step", file=sys.stderr) as bar:
        for fold in range(count):
            held = order[fold::count]
            kept, state = np.setdiff1d(order, held), initial_state(config, program.network)
            for step in range(0, steps, size):
                last = min(step + size, steps)
                indices = _chunk_indices(config, kept, step, last)
                state, metrics = program.chunk(state, examples, indices, jax.random.key(config.seed))
                _check_finite(_means(metrics, last - step), step, config)
                bar.update(last - step)
            parameters = with_levels(program, frozen | {"reconstructor": state.parameters}, features[kept])
            scores[held] = score_features(program, parameters, features[held])
    return scores


def with_levels(program: Program, parameters: dict[str, Any], features: np.ndarray) -> dict[str, Any]:
    """The parameters with "levels" [G]: the mean score of each group of channels over training features, or 1 for one.

    A single group keeps the units of the paper's score map.
    """
    groups = program.network.groups
    if len(groups) == 1:
        return parameters | {"levels": np.ones(1, np.float32)}
    means = in_batches(lambda batch: program.maps(parameters, batch).mean((-2, -1)), features, size=BATCH_SIZE)
    # A group that is always reconstructed to the last bit has no unit: any error at all is then enormous, not NaN.
    levels = np.maximum(means.mean(0, dtype=np.float64), np.finfo(np.float32).tiny ** 0.5)
    return parameters | {"levels": levels.astype(np.float32)}


def score_features(program: Program, parameters: dict[str, Any], features: np.ndarray) -> np.ndarray:
    """Scores [N] float32 of features."""
    return in_batches(lambda batch: program.scores(parameters, batch), features, size=BATCH_SIZE)


def _chunk_indices(config: Config, examples: np.ndarray, first: int, last: int) -> np.ndarray:
    """Batches of steps `first` to `last` from some examples, [log.every, batch_size], filled up with rows of -1."""
    batch_size = config.training.batch_size
    indices = np.full((config.log.every, batch_size), -1, np.int32)
    for row, step in enumerate(range(first, last)):
        indices[row] = examples[batch_indices(config.seed, step, batch_size=batch_size, count=len(examples))]
    return indices


def _means(metrics: dict[str, jax.Array], count: int) -> dict[str, float]:
    """Means of what the first `count` steps of a chunk tell, read from the device once."""
    return {name: float(np.mean(values[:count])) for name, values in jax.device_get(metrics).items()}


def _check_finite(row: dict[str, float], step: int, config: Config) -> None:
    # The gradient too: a finite loss whose gradient is not leaves a state that must not be saved.
    for name in METRICS:
        if not np.isfinite(row[name]):
            raise InputError(
                f"the {name} is {row[name]} soon after step {step}; training.learning_rate is "
                f"{config.training.learning_rate}, and a lower one may help"
            )
